"""Plans for plain transformers: one Python file and one safetensors file, which need nothing of lensteer.

The scripts are `standalone/steer.py` and `standalone/steer_cache.py`, copied as they are; a plan is in the tensors'
file. Each export is run on the model, without lensteer's hooks, before it takes its name.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lensteer import models, twins
from lensteer._version import __version__
from lensteer.errors import LensteerError
from lensteer.export.cards import edits_table, evaluation_section, limits_section, model_facts
from lensteer.export.edits import check_residual, furthest, scope_of
from lensteer.export.plan_files import CARD, VECTORS, identity_of
from lensteer.export.standalone import steer, steer_cache
from lensteer.export.weights import folder_of
from lensteer.files import new_folder
from lensteer.forward import forced_logits
from lensteer.models import ModelId
from lensteer.positions import everywhere, generated
from lensteer.progress import no_loading_bar
from lensteer.results import Result
from lensteer.steering import Plan
from lensteer.steering.cache import POSITIONS, CachePlan, check_plan

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

CACHE_VECTOR = "cache_vector.safetensors"
#: Largest difference of logits in float32; in less, the share of the largest logit.
TOLERANCE, COARSE_TOLERANCE = 1e-4, 0.05
_TEXTS = ("The quick brown fox jumps over the lazy dog.", "Wait, let me check that again. 17 + 25 = 42, so")


@dataclass(frozen=True, repr=False)
class PlainExport(Result):
    """What was written, and how it compares with the hooked model.

    Attributes:
        path: the folder.
        script: the Python file in it.
        difference: the largest difference of a logit from lensteer's, on the check's texts.
        tolerance: that was allowed.
        effect: the largest difference of a logit that steering makes there.
    """

    path: Path
    script: str
    difference: float
    tolerance: float
    effect: float


def hf(plan: Plan, path: str | Path, *, model: TransformerBridge, base_model: str = "") -> PlainExport:
    """Write a plan as a script with hooks for plain transformers, and compare it with the hooked model.

    Args:
        plan: one edit or several, each at the scope `everywhere` or `generated`; with any operator, gate and schedule.
        path: a new or an empty folder.
        model: the bridge that the plan steers.
        base_model: the model's name on the hub, for the card.

    Raises:
        LensteerError: another scope, a cache plan, another model's plan, a folder that holds something, or logits that
            differ: then the folder is removed.
    """
    check_residual(plan, "a script for transformers")
    for edit in plan.edits:
        scope_of(edit, "a script for transformers", [everywhere, generated])
    identity = identity_of(plan, model)
    # Copies: two edits may share one direction, and the format allows no shared memory.
    tensors = {str(number): edit.vector.detach().cpu().clone().contiguous() for number, edit in enumerate(plan.edits)}
    edits = []
    for number, edit in enumerate(plan.edits):
        row: dict[str, Any] = dict(
            vector=str(number),
            layer=edit.layer,
            operator=edit.operator,
            coefficient=edit.coefficient,
            scope=edit.scope.name,
        )
        if edit.schedule is not None:
            row["schedule"] = asdict(edit.schedule)
        if (gate := edit.gate) is not None:
            tensors[f"{number}.gate"] = gate.unit(edit.direction.at(edit.layer)).detach().cpu().contiguous()
            row["gate"] = dict(
                vector=f"{number}.gate", threshold=gate.threshold, above=gate.above, measure=gate.measure
            )
        edits.append(row)
    settings = dict(
        model=base_model or identity.name,
        n_layers=identity.n_layers,
        d_model=identity.d_model,
        blocks=_blocks(model),
        edits=edits,
    )
    runner, target = _runner(model), Path(path)
    with new_folder(target) as made:
        _write(made, VECTORS, tensors, settings, steer)
        found, expected, plain = [], [], []
        for ids in _ids(model):
            length = ids.shape[1] // 2
            with torch.inference_mode():
                plain.append(model(ids).float())
                with plan.on(model, prompt_length=length):
                    expected.append(model(ids).float())
                with steer.steered(runner, length, made / VECTORS):
                    found.append(runner(input_ids=ids).logits.float())
        done = _compared(target, steer, found, expected, plain, model)
        use = (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\nfrom steer import steered\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{settings["model"]}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{settings["model"]}")\n'
            'ids = tokenizer("...", return_tensors="pt").input_ids\n'
            "with steered(model):  # one generate; its prompt is what `generated` leaves alone\n"
            "    out = model.generate(ids, max_new_tokens=200)\n```"
        )
        parts = [edits_table(plan), "## Evaluation", evaluation_section(plan, identity)]
        _write_card(made, identity, base_model, use, [*parts, "## Limits", limits_section(plan)], done)
    return done


def cache(plan: Plan, path: str | Path, *, model: TransformerBridge, base_model: str = "") -> PlainExport:
    """Write a cache plan as a script that edits a prompt's cache in plain transformers, and compare it.

    Args:
        plan: a `CachePlan` that edits values.
        path: a new or an empty folder.
        model: the bridge that the plan steers.
        base_model: the model's name on the hub, for the card.

    Raises:
        LensteerError: a plan of residuals, or of keys, whose edit turns with the position; another model's vector; a
            folder that holds something; or logits that differ: then the folder is removed.
    """
    if plan.edits or len(plan.slots) != 1 or not isinstance(plan.slots[0], CachePlan):
        raise LensteerError(
            f"a cache recipe holds one CachePlan, and this plan has {len(plan.edits)} edit(s) of residuals and "
            f"{len(plan.slots)} of the cache: export edits of residuals by ls.export.hf"
        )
    slot = plan.slots[0]
    if slot.c_keys:
        raise LensteerError(
            f"c_keys={slot.c_keys:g}: keys turn with the position, which a recipe for plain transformers does not; "
            "export a plan with c_keys=0, which edits values"
        )
    check_plan(model, slot)
    identity = models.fingerprint(model)
    chosen = slot.vector.layers if slot.layers is None else slot.layers
    values = torch.zeros_like(slot.vector.values, dtype=torch.float32)
    for layer in chosen:
        values[layer] = slot.factor("values") * slot.vector.values[layer].float()
    where = "last_prompt" if slot.where == "offset_token" else slot.where
    index = POSITIONS[where] if isinstance(where, str) else where
    settings = dict(model=base_model or identity.name, slot=index, append=slot.prefill, label=slot.vector.label)
    runner, target = _runner(model), Path(path)
    with new_folder(target) as made:
        _write(made, CACHE_VECTOR, {"values": values}, settings, steer_cache)
        found, expected, plain = [], [], []
        for ids in _ids(model):
            with torch.inference_mode():
                edited = steer_cache.edited_cache(runner, ids, made / CACHE_VECTOR)
                rest = ids[:, edited.get_seq_length() :]
                found.append(runner(input_ids=rest, past_key_values=edited).logits[:, -1].float())
            row, first = ids[0].tolist(), [0]  # the logits that predict the first token of a response
            expected.append(forced_logits(model, [row], [first], plans=[plan])[0].float())
            plain.append(forced_logits(model, [row], [first])[0].float())
        done = _compared(target, steer_cache, found, expected, plain, model)
        use = (
            "```python\nfrom steer_cache import edited_cache, settings\n\n"
            'text = prompt + settings()["append"]\n'
            'ids = tokenizer(text, return_tensors="pt").input_ids\n'
            "out = model.generate(ids, past_key_values=edited_cache(model, ids), max_new_tokens=200)\n```"
        )
        what = (
            f"Adds {slot.factor('values'):g} × the difference of values of `{slot.vector.label}` to slot {index} of "
            f"the prompt, once, in {len(chosen)} layers. What is put after the prompt: {slot.prefill!r}."
        )
        _write_card(made, identity, base_model, use, [what, "**No evaluation goes along with a cache plan.**"], done)
    return done


def _write(made: Path, name: str, tensors: dict[str, Tensor], settings: dict[str, Any], script: Any) -> None:
    (made / name).write_bytes(save(tensors, {"steering": json.dumps({"lensteer": __version__, **settings})}))
    source = Path(script.__file__)
    (made / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")


def _write_card(made: Path, identity: ModelId, base_model: str, use: str, parts: list[str], done: PlainExport) -> None:
    checked = (
        f"Checked when written: logits differ from lensteer's by at most {done.difference:.2g} (allowed: "
        f"{done.tolerance:.2g}); steering changes them by up to {done.effect:.3g}."
    )
    title = f"# Steering {base_model or identity.name} with plain transformers"
    text = "\n\n".join([title, model_facts(identity, base_model), use, checked, *parts]) + "\n"
    (made / CARD).write_text(text, encoding="utf-8", errors="backslashreplace")


def _blocks(model: TransformerBridge) -> str:
    """Where transformers keeps a model's blocks, such as "model.layers".

    Raises:
        LensteerError: nowhere as one list.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.original_model.config)
    for name, module in empty.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == models.n_layers(model):
            return str(name)
    raise LensteerError(
        f"a {type(model.original_model).__name__} has no one list of blocks: it cannot be hooked simply"
    )


def _runner(model: TransformerBridge) -> Any:
    """A plain model to try a script on: on the bridge's own parameters where that is possible, else loaded again."""
    from transformers import AutoModelForCausalLM

    twin = twins.plain_twin(model)
    if twin is not None:
        return twin
    source = folder_of(model)
    if source is None:
        raise LensteerError(
            f"{model.original_model.config._name_or_path!r} is no checkpoint that transformers can load by itself, so "
            "a script for it cannot be checked: export from the checkpoint's folder or its name on the hub"
        )
    with no_loading_bar():
        found = AutoModelForCausalLM.from_pretrained(source, dtype=model.original_model.dtype)
    return found.to(models.device(model)).eval()


def _ids(model: TransformerBridge) -> list[Tensor]:
    rows = [models.encode(model, text) for text in _TEXTS]
    if model.tokenizer.chat_template:
        rows.append(models.encode(model, models.chat_text(model, _TEXTS[-1])))
    return [torch.tensor([row], device=models.device(model)) for row in rows]


def _compared(
    target: Path,
    script: Any,
    found: list[Tensor],
    expected: list[Tensor],
    plain: list[Tensor],
    model: TransformerBridge,
) -> PlainExport:
    largest, effect = furthest(found, expected), furthest(expected, plain)
    scale = max(float(logits.abs().max()) for logits in expected)
    exact = model.original_model.dtype == torch.float32
    tolerance = max(TOLERANCE, 1e-5 * scale) if exact else COARSE_TOLERANCE * scale
    if not largest <= tolerance:  # NaN, too
        raise LensteerError(
            f"the script's logits differ from lensteer's by up to {largest:.2g}, more than {tolerance:.2g} (steering "
            f"changes them by up to {effect:.2g}): nothing was written"
        )
    return PlainExport(target, Path(script.__file__).name, largest, tolerance, effect)
