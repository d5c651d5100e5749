"""Control vectors in GGUF: `direction.N`, a vector for each layer, which llama.cpp adds at the output of block N.

llama.cpp's loader puts `direction.N` at row N - 1 of a buffer that has no row for block 0, and its graph takes row
il - 1 at the output of block il: the offsets cancel, and N is lensteer's layer. A file with `direction.0` is refused as
a whole. Its own generator (`cvector-generator`) names what it measured at the output of block N - 1 `direction.N`.

llama.cpp has no operation but addition, and reads nothing but the tensors. The keys `glp.*` (GGUF Layer Projection 1,
https://github.com/msuiche/weightless/blob/main/spec/GLP.md) say what a file means, for readers of that format.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer._version import __version__
from lensteer.errors import LensteerError
from lensteer.export.edits import additions, check_vectors, projected_out, projects, scope_of
from lensteer.files import write_given
from lensteer.positions import PositionScope, everywhere
from lensteer.results import Result
from lensteer.steering import Plan, SteeringPlan
from lensteer.steering.plans import Plans, check_unit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ARCHITECTURE = "controlvector"
HOOK_POINT = "residual_stream_post_layer"
"""GLP's name of `resid_post`, where llama.cpp adds."""
GLP_VERSION = 1
MIN_LAYER = 1
"""The first block whose output llama.cpp can steer."""

WRITERS = {
    "repeng": (0, "direction.N is of the output of block N"),
    "easysteer": (0, "direction.N is of the output of decoder layer N"),
    "llama.cpp": (0, "direction.N is what llama.cpp adds at the output of block N, whoever wrote the file"),
    "cvector-generator": (-1, "direction.N was measured at the output of block N - 1, by llama.cpp's own generator"),
}
"""Who may have written a file: what to add to N to get the layer that the vector is of, and why."""

_MODEL, _PLAN, _EVIDENCE = "lensteer.model", "lensteer.plan", "lensteer.evidence"


def gguf(plan: Plan, path: str | Path, *, model: TransformerBridge | None = None) -> Path:
    """Write a plan as a control vector for llama.cpp and what is built on it (extra `gguf`).

    Of an added vector, `direction.l` is Σ coefficient × vector over the edits of layer l: strength 1 (llama.cpp's
    default) is the plan, and `glp.alpha_default` is 1. Of a projection, `direction.l` has length 1 and
    `glp.alpha_default` is the coefficient. Every layer's vector is 1-D, in float32. The file also holds the model's
    identity, the plan and its evidence, which llama.cpp does not read. The same plan makes the same bytes.

    Args:
        plan: One edit or several, of the scope `everywhere`: llama.cpp steers every position.
        path: Of the file, which is replaced atomically.
        model: That the plan is for: its layers and width are checked, and its identity is recorded.

    Returns:
        The path.

    Raises:
        LensteerError: What the format cannot hold: block 0, another scope, cache slots, additions together with
            projections, several projections of one layer or with different coefficients; a vector that is zero, not
            finite or of another model; no gguf package; a path that cannot be written.

    Warns:
        UserWarning: A projection: llama.cpp itself does not read `glp.mode`, and would add it.
    """
    fmt = "a GGUF control vector"
    scope_of(plan, fmt, [everywhere])
    for edit in plan.edits:
        if edit.layer < MIN_LAYER:
            raise LensteerError(
                f"{fmt} cannot steer layer {edit.layer}: llama.cpp has no vector for block 0, and refuses a whole file "
                "that holds `direction.0`; steer a later layer, or use ls.export.checkpoint"
            )
    if projects(plan, fmt):
        mode, (vectors, alpha) = "project", _projections(plan, fmt)
        warnings.warn(
            f"{str(path)!r} is a projection: it says so (glp.mode='project'), but llama.cpp itself does not read that "
            "and would add the vector; give it to a reader of GLP, or use ls.export.checkpoint",
            stacklevel=2,
        )
    else:
        mode, vectors, alpha = "add", additions(plan, fmt, [everywhere], MIN_LAYER), 1.0
    check_vectors(vectors, model, fmt)
    identity = None if model is None else models.fingerprint(model).to_dict()
    hint = "unknown" if model is None else str(model.original_model.config.model_type)
    evidence = [None if edit.measured is None else edit.measured.to_dict() for edit in plan.edits]
    texts = {
        f"{ARCHITECTURE}.model_hint": hint,
        "glp.mode": mode,
        "glp.hook_point": HOOK_POINT,
        "glp.derived_at": HOOK_POINT,
        "glp.generator": f"lensteer {__version__}",
        "glp.layer_ids_zero_based": ",".join(map(str, vectors)),
        "glp.content_sha256": _content(vectors),
        _PLAN: json.dumps([_said(edit) for edit in plan.edits]),
        _EVIDENCE: json.dumps(evidence) if any(evidence) else "not evaluated",
    }
    if identity is not None:
        texts |= _base_model(identity["name"], identity["revision"]) | {_MODEL: json.dumps(identity)}
    numbers = {f"{ARCHITECTURE}.layer_count": len(vectors), "glp.spec_version": GLP_VERSION, "glp.rank": 1}
    if identity is not None:
        numbers["general.base_model.count"] = 1
    data = _encoded(texts, numbers, alpha, mode == "project", vectors)
    return write_given(path, data)


def _projections(plan: Plan, fmt: str) -> tuple[dict[int, Tensor], float]:
    """Per layer the unit vector that is projected out, and the coefficient of all."""
    coefficients = sorted({edit.coefficient for edit in plan.edits})
    if len(coefficients) > 1:
        raise LensteerError(f"{fmt} projects out with one coefficient, and this plan has {coefficients}: give one")
    return projected_out(plan, fmt), coefficients[0]


def _said(edit: SteeringPlan) -> dict[str, Any]:
    return {
        "behavior": edit.direction.label,
        "layer": edit.layer,
        "coefficient": edit.coefficient,
        "unit": edit.unit,
        "operator": edit.operator,
        "scope": edit.scope.name,
    }


def _base_model(name: str, revision: str) -> dict[str, str]:
    """GGUF's own keys for the model that a file is for; a name without an organization is not one of the hub."""
    organization, _, short = name.rpartition("/")
    found = {"general.base_model.0.name": short}
    if organization:
        found["general.base_model.0.organization"] = organization
        found["general.base_model.0.repo_url"] = f"https://huggingface.co/{name}"
    if revision:
        found["general.base_model.0.version"] = revision
    return found


def _content(vectors: Mapping[int, Tensor]) -> str:
    """GLP's hash: SHA-256 of the tensors' bytes (float32, little endian), in the order of layers."""
    return hashlib.sha256(
        b"".join(vectors[layer].numpy().astype("<f4").tobytes() for layer in sorted(vectors))
    ).hexdigest()


def _package() -> Any:
    try:
        import gguf as package
    except ImportError as error:
        raise LensteerError("a GGUF file needs the package gguf: pip install 'lensteer[gguf]'") from error
    return package


def _encoded(
    texts: Mapping[str, str], numbers: Mapping[str, int], alpha: float, orthonormal: bool, vectors: Mapping[int, Tensor]
) -> bytes:
    package = _package()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vector.gguf"
        writer = package.GGUFWriter(file, ARCHITECTURE)
        for key, text in texts.items():
            writer.add_string(key, text)
        for key, number in numbers.items():
            writer.add_uint32(key, number)
        writer.add_float32("glp.alpha_default", alpha)
        writer.add_bool("glp.orthonormal", orthonormal)
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()


@dataclass(frozen=True, eq=False, repr=False)
class ControlVector(Result):
    """A control vector that was read, as a direction to steer along.

    Attributes:
        label: its name.
        raw: one vector per layer, as in the file.
        layers: of the layer axis; `l` is the output of block `l`.
        operator: what the file says is done with it, "add" or "project_out".
        coefficient: that the file says.
        model: what the file says of its model: lensteer's identity, or a name, a revision and a hint at its kind.
    """

    label: str
    raw: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    operator: str = "add"
    coefficient: float = 1.0
    model: Mapping[str, Any] = field(default_factory=dict)

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """The vector of one layer.

        Raises:
            LensteerError: a layer that the file lacks.
        """
        if layer not in self.layers:
            raise LensteerError(f"{self.label!r} has no vector at layer {layer}: its layers are {list(self.layers)}")
        return self.raw[self.layers.index(layer)]

    def scaled(self, layer: int, unit: str = "difference") -> Float[Tensor, " d_model"]:
        """What coefficient 1 adds: the vector as in the file, or with `unit="unit"` one of length 1.

        Raises:
            LensteerError: a layer that it lacks or at which it is zero; the unit "mean_norm", which needs activations.
        """
        vector = self.at(layer)
        if vector.norm() == 0:
            raise LensteerError(f"{self.label!r} is zero at layer {layer}: it has no direction to scale")
        if check_unit(unit) == "mean_norm":
            raise LensteerError(
                f"a control vector holds no mean activation: give {self.label!r} the unit 'difference' (the vector as "
                "in the file) or 'unit' (length 1)"
            )
        return vector if unit == "difference" else vector / vector.norm()

    def plan(self, scope: PositionScope = everywhere) -> Plans:
        """The plan that the file describes: its operation and coefficient at all of its layers that are not zero."""
        return Plans(
            tuple(
                SteeringPlan(self, layer, self.coefficient, scope, self.operator)
                for layer in self.layers
                if self.at(layer).any()
            )
        )

    def check_model(self, model: TransformerBridge) -> None:
        """Make sure that the vector may be of this model.

        Raises:
            LensteerError: another width, a layer that the model lacks, or the file names another model.
        """
        mine, width = models.fingerprint(model), models.d_model(model)
        if self.raw.shape[1] != width:
            raise LensteerError(
                f"{self.label!r} is {self.raw.shape[1]} wide, and {mine.name!r} is {width}: it is another model's"
            )
        for layer in self.layers:
            models.check_layer(model, layer)
        if "weights" in self.model and (wrong := mine.differences(self.model)):
            raise LensteerError(
                f"{self.label!r} is of model {self.model.get('name')!r}, not {mine.name!r}: they differ in "
                f"{', '.join(wrong)}"
            )


def read_control_vector(
    path: str | Path, *, written_by: str | None = None, model: TransformerBridge | None = None
) -> ControlVector:
    """Read a GGUF control vector, of lensteer, repeng, llama.cpp, EasySteer or a writer of GLP (extra `gguf`).

    Which block a `direction.N` is of depends on who wrote the file. Files with `glp.hook_point` say it themselves; the
    others look alike, and a vector of the neighboring layer steers nearly as well as the right one, so nothing is
    guessed: say `written_by`.

    Args:
        path: Of the file.
        written_by: One of `WRITERS`; None for a file that says it itself.
        model: If given, the vector must fit it, and be of it if the file names a model.

    Raises:
        LensteerError: No such file, a truncated or corrupt one, one that holds something else (a model, vectors that
            are not 1-D float32, of different widths, zero or not finite, an unknown operation or hook point, several
            directions a layer), a hash or layers that do not fit, a file that does not say which layers it holds, or
            one that contradicts `written_by`; a vector of another model; no gguf package.
    """
    where = str(path)
    meta, tensors = _decoded(Path(path))
    if meta.get("general.architecture") != ARCHITECTURE:
        raise LensteerError(
            f"{where!r} is a GGUF file of {meta.get('general.architecture')!r}, not of a control vector: a model's "
            "file is read by ls.load_model"
        )
    stored = {_index(name, where): vector for name, vector in tensors.items()}
    if not stored:
        raise LensteerError(f"{where!r} holds no tensor `direction.N`: it is no control vector")
    widths = sorted({tuple(vector.shape) for vector in stored.values()})
    if len(widths) > 1 or len(widths[0]) != 1:
        raise LensteerError(f"{where!r}: its directions have the shapes {widths}, give one width for all, 1-D")
    mode, coefficient = _operation(meta, where)
    shift = _shift(meta, stored, where, written_by)
    vectors = {n + shift: stored[n] for n in sorted(stored)}
    if not all(vector.isfinite().all() for vector in vectors.values()):
        raise LensteerError(f"{where!r} holds values that are not finite: write it again")
    if not any(vector.any() for vector in vectors.values()):
        raise LensteerError(f"{where!r} is zero at all of its layers: it would steer nothing; write it again")
    hashed = meta.get("glp.content_sha256")
    if hashed is not None and hashed != _content(vectors):
        raise LensteerError(f"{where!r} was changed or damaged: its vectors do not have the hash glp.content_sha256")
    found = ControlVector(
        Path(path).stem, torch.stack(list(vectors.values())), tuple(vectors), mode, coefficient, _model_of(meta)
    )
    if model is not None:
        found.check_model(model)
    return found


def _decoded(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All metadata that are texts or numbers, and all float32 tensors; others are refused."""
    package = _package()
    if not path.is_file():
        raise LensteerError(f"no control vector at {str(path)!r}: give a GGUF file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise LensteerError(f"{str(path)!r} is no GGUF file: give a control vector")
    try:
        reader = _reader(package, path)
        meta = {}
        for key, entry in reader.fields.items():
            if entry.types == [package.GGUFValueType.STRING]:
                meta[key] = bytes(entry.parts[entry.data[0]]).decode()
            elif len(entry.types) == 1 and len(entry.data) == 1:
                meta[key] = entry.parts[entry.data[0]][0].item()
        kinds = {str(tensor.name): tensor.tensor_type.name for tensor in reader.tensors}
        tensors = {str(tensor.name): torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, OSError) as error:
        raise LensteerError(
            f"{str(path)!r} is truncated or damaged ({type(error).__name__}: {str(error)[:200]}): fetch it again"
        ) from error
    if meta.get("general.architecture") == ARCHITECTURE:
        if wrong := {name: kind for name, kind in kinds.items() if kind != "F32"}:
            raise LensteerError(f"{str(path)!r} holds {wrong}: the vectors of a control vector are F32")
    return meta, tensors


def _reader(package: Any, path: Path) -> Any:
    """Gguf's reader, made to stop at the file's end: it would read nothing there as often as a damaged count says."""

    class Bounded(package.GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"a value ends at byte {end} of {len(self.data)}")
            return super()._get(offset, dtype, count, override_order)

    return Bounded(path)


def _index(name: str, where: str) -> int:
    word, _, number = name.partition(".")
    if word != "direction" or not (number.isdecimal() and len(number) < 7 and str(int(number)) == number):
        hint = "; files with several directions a layer are not supported" if word == "direction" else ""
        raise LensteerError(f"{where!r} holds the tensor {name!r}, and a control vector holds `direction.N`{hint}")
    return int(number)


def _operation(meta: Mapping[str, Any], where: str) -> tuple[str, float]:
    """The operator and coefficient that a file states; without `glp.mode` a control vector is added."""
    version = meta.get("glp.spec_version", GLP_VERSION)
    if version != GLP_VERSION:
        raise LensteerError(f"{where!r} has glp.spec_version {version!r}, and lensteer reads {GLP_VERSION}")
    mode = meta.get("glp.mode", "add")
    operators = {"add": "add", "project": "project_out"}
    if mode not in operators:
        raise LensteerError(f"{where!r} has glp.mode={mode!r}: there are {list(operators)}")
    coefficient = meta.get("glp.alpha_default", 1.0)
    if not isinstance(coefficient, (int, float)) or isinstance(coefficient, bool) or not np.isfinite(coefficient):
        raise LensteerError(f"{where!r} has glp.alpha_default={coefficient!r}: give a finite number")
    return operators[mode], float(coefficient)


def _shift(meta: Mapping[str, Any], stored: Mapping[int, Any], where: str, written_by: str | None) -> int:
    """What to add to N to get the layer."""
    choices = "; ".join(f"{name!r}: {what}" for name, (_, what) in WRITERS.items())
    if written_by is not None and written_by not in WRITERS:
        raise LensteerError(f"written_by={written_by!r}: choose one of {choices}")
    hook = meta.get("glp.hook_point")
    if hook is not None:
        if hook != HOOK_POINT:
            raise LensteerError(f"{where!r} is for the hook point {hook!r}: lensteer steers {HOOK_POINT!r}")
        if written_by is not None and WRITERS[written_by][0]:
            raise LensteerError(f"{where!r} says that direction.N is of block N, which {written_by!r} contradicts")
        said = meta.get("glp.layer_ids_zero_based", "")
        if said and said != ",".join(map(str, sorted(stored))):
            raise LensteerError(
                f"{where!r} says that its layers are {said}, and its tensors are {sorted(stored)}: write it again"
            )
        return 0
    if written_by is None:
        raise LensteerError(
            f"{where!r} has vectors {min(stored)} to {max(stored)} and does not say which layers they are of: give "
            f"written_by=... ({choices})"
        )
    shift = WRITERS[written_by][0]
    if min(stored) + shift < 0:
        raise LensteerError(f"{where!r} has `direction.0`, which {written_by!r} never writes: choose one of {choices}")
    return shift


def _model_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads(meta.get(_MODEL, "{}"))
    except (TypeError, ValueError, RecursionError):
        found = {}
    named = {
        "name": meta.get("general.base_model.0.name"),
        "revision": meta.get("general.base_model.0.version"),
        "hint": meta.get(f"{ARCHITECTURE}.model_hint"),
    }
    return {name: value for name, value in named.items() if value is not None} | (
        found if isinstance(found, dict) else {}
    )
