"""Plan files: a folder with a plan's vectors, its settings and what was measured for it, ready for the hub.

`steering_vector.safetensors` holds the vectors, `steering_config.json` everything else (docs/serving.md lists its
keys), `README.md` is the card. Nothing is pickled. A folder is complete or not there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lensteer import models
from lensteer._version import __version__
from lensteer.arguments import checked
from lensteer.errors import LensteerError
from lensteer.export.cards import edits_table, evaluation_section, front_matter, limits_section, model_facts, plan_name
from lensteer.export.edits import check_residual
from lensteer.expressions import parse_scope
from lensteer.files import new_folder, parse_json, read_text, seal, unseal
from lensteer.models import ModelId
from lensteer.results import Result, check_arrays, reading, revived
from lensteer.steering import Evidence, Gate, Plan, Plans, Schedule, SteeringPlan

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

VECTORS, CONFIG, CARD = "steering_vector.safetensors", "steering_config.json", "README.md"
KIND, VERSION = "steering plan", 2
"""Of `steering_config.json`; the version is raised when an earlier reader would misread the file.

Version 2 has gates and schedules, which a reader of version 1 would leave out. Plans without them are written as 1.
"""


@dataclass(frozen=True, eq=False)
class FixedDirection:
    """One direction at one layer, as a file holds it.

    Attributes:
        label: its name.
        layer: of the vector.
        unit: that `vector` is scaled by.
        raw: unscaled.
        vector: what coefficient 1 adds.
    """

    label: str
    layer: int
    unit: str
    raw: Float[Tensor, " d_model"]
    vector: Float[Tensor, " d_model"]

    def __post_init__(self) -> None:
        check_arrays(self)

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """The unscaled vector.

        Raises:
            LensteerError: another layer.
        """
        if layer != self.layer:
            raise LensteerError(f"{self.label!r} has no vector at layer {layer}: this file holds layer {self.layer}")
        return self.raw

    def scaled(self, layer: int, unit: str = "difference") -> Float[Tensor, " d_model"]:
        """What coefficient 1 adds.

        Raises:
            LensteerError: another layer, or a unit that the file does not hold.
        """
        raw = self.at(layer)
        if unit == self.unit:
            return self.vector
        if unit == "mean_norm":
            raise LensteerError(
                f"{self.label!r} was saved in the unit {self.unit!r}, without its mean activation's length"
            )
        return raw if unit == "difference" else raw / raw.norm()


@dataclass(frozen=True, eq=False, repr=False)
class PlanFile(Result):
    """A plan, and the model that it is of.

    Attributes:
        plan: one edit or several, with evidence if there is any.
        model: its model's identity.
        base_model: the model's name on the hub; empty if none was given.
    """

    plan: Plan
    model: ModelId
    base_model: str = ""

    def check_model(self, model: TransformerBridge) -> None:
        """Make sure that the plan is of this model (its folder may have been renamed).

        Raises:
            LensteerError: it is of another one.
        """
        found = models.fingerprint(model)
        if wrong := found.differences(self.model.to_dict()):
            details = ", ".join(f"{n} {getattr(self.model, n)!r} is not {getattr(found, n)!r}" for n in wrong)
            raise LensteerError(
                f"a plan of {self.model.name!r} does not fit {found.name!r} ({details}): fit one on this model"
            )


def identity_of(plan: Plan, model: TransformerBridge | ModelId | None) -> ModelId:
    """The identity of a plan's model: as given, or as its evidence says.

    Raises:
        LensteerError: neither says it, or a bridge that is not the model of the evidence or of another width.
    """
    if isinstance(model, ModelId):
        found = model
    elif model is not None:
        found = models.fingerprint(model)
    else:
        known = [edit.evidence.model for edit in plan.edits if edit.evidence is not None and edit.evidence.model]
        if not known:
            raise LensteerError("this plan does not say which model it is of: give model=, the bridge that it steers")
        found = ModelId(**known[0])
    for edit in plan.edits:
        if len(edit.vector) != found.d_model or not 0 <= edit.layer < found.n_layers:
            raise LensteerError(
                f"{edit.direction.label!r} is {len(edit.vector)} wide and edits layer {edit.layer}: {found.name!r} is "
                f"{found.d_model} wide and has layers 0 to {found.n_layers - 1}, so it is another model's"
            )
        if edit.evidence is not None and edit.evidence.model and found.differences(edit.evidence.model):
            raise LensteerError(
                f"{edit.direction.label!r} was evaluated on {edit.evidence.model.get('name')!r}, which differs from "
                f"{found.name!r} in {found.differences(edit.evidence.model)}: give that model"
            )
    return found


def folder(
    plan: Plan,
    path: str | Path,
    *,
    model: TransformerBridge | ModelId | None = None,
    base_model: str = "",
    license: str = "",
    files: Sequence[str | Path] = (),
) -> Path:
    """Write a plan as a folder that `load_plan` reads and `push_to_hub` publishes.

    Args:
        plan: one edit or several of the residual stream.
        path: a new or an empty folder.
        model: that the plan steers, or its identity; None: as the plan's evidence says.
        base_model: the model's name on the hub, for the card; by default its name, if it is one of the hub.
        license: for the card, such as "apache-2.0".
        files: to put beside, such as a GGUF control vector.

    Returns:
        The folder.

    Raises:
        LensteerError: a cache plan, a plan of another model, a model that is not known, a vector that is not finite, a
            folder that holds something, or a file that is missing.
    """
    check_residual(plan, "a plan's folder")
    found = identity_of(plan, model)
    missing = [str(file) for file in files if not Path(file).is_file()]
    if missing:
        raise LensteerError(f"no file {missing[0]!r} to put beside the plan: give files that exist")
    tensors: dict[str, Tensor] = {}
    rows = []
    for number, edit in enumerate(plan.edits):
        vector, raw = edit.vector.detach().cpu().contiguous(), edit.direction.at(edit.layer).detach().cpu().contiguous()
        if not vector.isfinite().all():
            raise LensteerError(f"{edit.direction.label!r} at layer {edit.layer} is not finite: fit it again")
        tensors[f"{number}.vector"] = vector.clone()  # two edits may share one direction, which the format does not
        if not torch.equal(vector, raw):
            tensors[f"{number}.raw"] = raw.clone()
        row: dict[str, Any] = {
            "vector": f"{number}.vector",
            "label": edit.direction.label,
            "layer": edit.layer,
            "hook_point": models.resid_hook(edit.layer),
            "operator": edit.operator,
            "coefficient": edit.coefficient,
            "unit": edit.unit,
            "scope": edit.scope.name,
            "evidence": None if edit.evidence is None else edit.evidence.to_dict(),
        }
        if edit.schedule is not None:
            row["schedule"] = asdict(edit.schedule)
        if (gate := edit.gate) is not None:
            row["gate"] = {"threshold": gate.threshold, "above": gate.above, "measure": gate.measure}
            if gate.direction is not None:
                tensors[f"{number}.gate"] = gate.direction.detach().cpu().clone().contiguous()
                row["gate"]["vector"] = f"{number}.gate"
        rows.append(row)
    data = save(tensors, {"kind": KIND})  # one entry: their order in the file is random
    config = {
        "kind": KIND,
        "version": VERSION if any("gate" in row or "schedule" in row for row in rows) else 1,
        "lensteer": __version__,
        "model": found.to_dict(),
        "base_model": base_model,
        "sha256": hashlib.sha256(data).hexdigest(),
        "edits": rows,
    }
    with new_folder(Path(path)) as made:
        (made / VECTORS).write_bytes(data)
        (made / CONFIG).write_text(json.dumps(seal(config), indent=1, allow_nan=False), encoding="utf-8")
        (made / CARD).write_text(_card(plan, found, base_model, license), encoding="utf-8", errors="backslashreplace")
        for file in files:
            shutil.copyfile(file, made / Path(file).name)
        if read_plan(made).plan.identity() != plan.identity():
            raise LensteerError(f"{str(path)!r} would not read back as the same plan: its scopes or vectors differ")
    return Path(path)


def _card(plan: Plan, model: ModelId, base_model: str, license_name: str) -> str:
    return (
        "\n\n".join(
            [
                front_matter(["steering-vector", "lensteer"], base_model or model.name, license_name),
                f"# Steering vector: {plan_name(plan)}",
                model_facts(model, base_model),
                edits_table(plan),
                "## Use",
                "```python\nimport lensteer as ls\n\n"
                f'model = ls.load_model("{base_model or model.name}")\n'
                'plan = ls.load_plan("this-repository", model)\nwith plan.on(model):\n    ...\n```',
                f"`{VECTORS}` holds, per edit, what coefficient 1 adds (no pickle); `{CONFIG}` the settings.",
                "## Evaluation",
                evaluation_section(plan, model),
                "## Limits",
                limits_section(plan),
            ]
        )
        + "\n"
    )


@checked()
def load_plan(source: str | Path, model: TransformerBridge | None = None, *, revision: str | None = None) -> Plan:
    """Read a plan from a folder that `ls.export.folder` wrote, or from the hub.

    Args:
        source: the folder, or a repository on the hub, such as "user/repo".
        model: if given, the plan must be of this model.
        revision: of the repository.

    Returns:
        The plan, with its evidence.

    Raises:
        LensteerError: no such folder or repository, a missing, damaged or truncated file, a newer schema, or another
            model's plan.
    """
    found = read_plan(source, revision=revision)
    if model is not None:
        found.check_model(model)
    return found.plan


def read_plan(source: str | Path, *, revision: str | None = None) -> PlanFile:
    """The same with the identity of the model, which the plan itself does not hold. Errors are those of `load_plan`."""
    path = Path(source)
    if not path.is_dir():
        path = _downloaded(str(source), revision)
    for name in (CONFIG, VECTORS):
        if not (path / name).is_file():
            raise LensteerError(f"{str(source)!r} has no {name}: give a folder that `ls.export.folder` wrote")
    try:
        values = parse_json(read_text(path / CONFIG), path / CONFIG)
        values = unseal(values, path / CONFIG) if isinstance(values, dict) else values
    except ValueError as error:
        raise LensteerError(f"{path / CONFIG} cannot be read ({error}): export the plan again") from error
    kind, version = (values.get("kind"), values.get("version")) if isinstance(values, dict) else (None, None)
    if kind != KIND or not isinstance(version, int):
        raise LensteerError(f"{path / CONFIG} is no steering plan: its 'kind' and 'version' are {kind!r}, {version!r}")
    if version > VERSION:
        raise LensteerError(
            f"{path / CONFIG} has version {version}, and this lensteer reads up to {VERSION}: install a newer lensteer "
            f"(it was written by {values.get('lensteer')})"
        )
    data = (path / VECTORS).read_bytes()
    if hashlib.sha256(data).hexdigest() != values.get("sha256"):
        raise LensteerError(
            f"{path / VECTORS} is not the file that {CONFIG} was written for (another SHA-256): it is truncated or of "
            "another plan"
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise LensteerError(f"{path / VECTORS} is no safetensors file ({error}): export the plan again") from error
    with reading(f"the plan in {str(source)!r}", "export it again"):
        model = revived(ModelId, values["model"])
        edits = tuple(_read_edit(row, tensors) for row in values["edits"])
    for edit in edits:
        if edit.vector.shape != (model.d_model,) or not 0 <= edit.layer < model.n_layers:
            raise LensteerError(
                f"{str(source)!r}: {edit.direction.label!r} at layer {edit.layer} has shape {list(edit.vector.shape)}, "
                f"where {model.name!r} is {model.d_model} wide and has layers 0 to {model.n_layers - 1}"
            )
    if not edits:
        raise LensteerError(f"{path / CONFIG} holds no edit: export the plan again")
    plan: Plan = edits[0] if len(edits) == 1 else Plans(edits)
    return PlanFile(plan, model, str(values.get("base_model", "")))


def _read_edit(row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SteeringPlan:
    vector = tensors[row["vector"]]
    raw = tensors.get(row["vector"].replace(".vector", ".raw"), vector)
    label, unit, scope, operator = (revived(str, row[name]) for name in ("label", "unit", "scope", "operator"))
    layer, coefficient = revived(int, row["layer"]), revived(float, row["coefficient"])
    evidence = None if row["evidence"] is None else Evidence.from_dict(row["evidence"])
    gate, schedule = row.get("gate"), row.get("schedule")
    if gate is not None:
        own = tensors[gate["vector"]] if "vector" in gate else None
        gate = Gate(revived(float, gate["threshold"]), revived(bool, gate["above"]), own, gate["measure"])
    return SteeringPlan(
        FixedDirection(label, layer, unit, raw, vector),
        layer,
        coefficient,
        parse_scope(scope),
        operator,
        unit,
        evidence,
        gate,
        None if schedule is None else revived(Schedule, schedule),
    )


def _downloaded(name: str, revision: str | None) -> Path:
    """The folder of a repository on the hub, in Hugging Face's cache."""
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise LensteerError(f"no folder {name!r}: give one that `ls.export.folder` wrote, or a repository as user/repo")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[CONFIG, VECTORS, CARD]))
    except Exception as error:  # whatever the hub's client raises is about this repository or the network
        raise LensteerError(
            f"{name!r} is no folder here, and cannot be read from the hub: give "
            " a folder that `ls.export.folder` wrote, or a repository that you can read "
            f"({type(error).__name__}: {str(error)[:300]})"
        ) from error


def push_to_hub(
    path: str | Path, repo: str, *, private: bool = False, revision: str | None = None, message: str = ""
) -> str:
    """Upload a plan's folder to the hub, after checking that it can be read. The login is Hugging Face's own.

    Args:
        path: the folder that `folder` wrote.
        repo: such as "user/repo"; made if it is not there.
        private: make it private.
        revision: the branch to write to.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        LensteerError: a folder that holds no plan, or a repository that cannot be written.
    """
    plan = read_plan(path).plan
    if repo.count("/") != 1:
        raise LensteerError(f"no repository {repo!r}: give one as user/repo")
    import huggingface_hub

    said = message or f"Steering vector: {', '.join(edit.direction.label for edit in plan.edits)}"
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=str(path), revision=revision, commit_message=said)
    except Exception as error:  # whatever the hub's client raises is about this repository or the network
        raise LensteerError(
            f"cannot write {repo!r} on the hub: log in by `hf auth login`, with a token that may write it "
            f"({type(error).__name__}: {str(error)[:300]})"
        ) from error
    return str(done.commit_url if hasattr(done, "commit_url") else done)
