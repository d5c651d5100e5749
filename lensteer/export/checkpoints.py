"""A steered checkpoint: plain weights that steer themselves, for any engine that loads the architecture.

It is written beside its name, loaded by plain transformers, compared with the hooked model, and put in place only if
the two agree.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer.errors import LensteerError
from lensteer.export.cards import edits_table, evaluation_section, front_matter, limits_section, model_facts, plan_name
from lensteer.export.edits import additions, check_fixed, check_residual, furthest, rescoped, scope_of
from lensteer.export.plan_files import CARD, folder, identity_of
from lensteer.export.rewrites import Rewrite, added, projected
from lensteer.export.weights import Weights, names_of, weights_of, write_weights
from lensteer.files import new_folder
from lensteer.models import DTYPES, ModelId
from lensteer.positions import everywhere
from lensteer.progress import no_loading_bar
from lensteer.results import Result
from lensteer.steering import Plan, SteeringPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformer_lens.model_bridge import TransformerBridge

FORMAT = "a steered checkpoint"
#: Largest difference of logits, weights and arithmetic in float32.
TOLERANCE = 1e-4
#: Where weights or arithmetic are coarser, it may be larger by so many times the noise (the difference between the same
#: two models without the vector), and by this share of the largest change of a logit: bfloat16 rounds the vector to 8
#: bits, which is up to 0.4 %.
COARSE_NOISE, COARSE_EFFECT = 3.0, 0.02
_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Wait, let me check that again. 17 + 25 = 42, so the second number is",
    "Please explain in two sentences why the sky is blue, and how sure you are about it.",
)
_RANDOM = 24  # tokens of a check on random ids, for tokenizers that have few of these words
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class SteeredCheckpoint(Result):
    """What was written, and how it compares with the hooked model.

    Attributes:
        path: the folder.
        architecture: of the export.
        how: what was changed in the weights.
        layers: that the plan steers.
        dtype: of the weights.
        difference: the largest difference of a logit from the hooked model's, on the check's prompts.
        tolerance: that was allowed.
        effect: the largest difference of a logit that steering makes, on the same prompts.
        tokens: of these prompts.
    """

    path: Path
    architecture: str
    how: str
    layers: tuple[int, ...]
    dtype: str
    difference: float
    tolerance: float
    effect: float
    tokens: int

    @property
    def conclusive(self) -> bool:
        """Whether the check tells steered from unsteered: rounding in a coarse dtype may change logits by more."""
        return self.tolerance < self.effect


def checkpoint(
    plan: Plan,
    path: str | Path,
    *,
    model: TransformerBridge,
    dtype: torch.dtype | str | None = None,
    orthogonalize: bool = False,
    base_model: str = "",
    license: str = "",
    max_shard: int = 2 * 2**30,
) -> SteeredCheckpoint:
    """Write a checkpoint that steers itself at every position, and compare it with the hooked model.

    Args:
        plan: one edit or several that add vectors; or one that projects a direction out, with `orthogonalize`.
        path: a new or an empty folder.
        model: the bridge that the plan steers, as it was loaded.
        dtype: of the weights; None: as the checkpoint has them. In bfloat16 the added vectors are rounded, too.
        orthogonalize: write a projection of coefficient 1 at layer l into every matrix up to block l. That is more than
            the plan does, which projects at the output of block l alone: no site up to l keeps the direction.
        base_model: the model's name on the hub, for the card.
        license: for the card.
        max_shard: most bytes of a file.

    Returns:
        What was written, with the largest difference of a logit.

    Raises:
        LensteerError: a plan that steers fewer positions and was not evaluated at all of them, an architecture that
            cannot hold it (the message says why), a clamp, a rotation, a gate or a schedule, a quantized model, a
            folder that holds something, or an export whose logits differ: then the folder is removed.
    """
    target, kind = Path(path), _dtype(dtype)
    check_residual(plan, FORMAT)
    check_fixed(plan, FORMAT)
    scope = everywhere if _evaluated_everywhere(plan) else scope_of(plan, FORMAT, [everywhere])
    identity = identity_of(plan, model)
    plan = rescoped(plan, scope)
    projection = _projection(plan, orthogonalize)
    config, weights = model.original_model.config, weights_of(model)
    kind = weights.dtype if kind is None else kind
    if projection is not None:
        rewrite = projected(config, weights, projection.vector, projection.layer)
    else:
        rewrite = added(config, weights, additions(plan, FORMAT, [everywhere]))
    if missing := names_of(rewrite.config) ^ set(rewrite.tensors):
        raise LensteerError(
            f"a {rewrite.config.model_type!r} with this configuration has tensors that the export does not "
            f"({sorted(missing)[:3]}): this variant of it cannot be exported"
        )
    with new_folder(target) as made:
        write_weights(made, rewrite.tensors, weights, dtype=kind, max_shard=max_shard)
        _write_config(made, rewrite, kind)
        _write_tokenizer(made, model, weights)
        done = _compared(made, target, model, plan, projection, rewrite, kind, weights)
        folder(plan, made / "plan", model=identity, base_model=base_model, license=license)
        (made / CARD).write_text(
            _card(plan, identity, done, projection, base_model, license), encoding="utf-8", errors="backslashreplace"
        )
    return done


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and (found is None or not found.is_floating_point):
        raise LensteerError(f"no dtype {dtype!r} for weights: choose one of {', '.join(DTYPES)}")
    return found


def _evaluated_everywhere(plan: Plan) -> bool:
    return all(edit.measured is not None and edit.measured.scope == everywhere.name for edit in plan.edits)


def _projection(plan: Plan, orthogonalize: bool) -> SteeringPlan | None:
    """The plan's projection; None if it adds.

    Raises:
        LensteerError: a projection that cannot be written into weights.
    """
    found = [edit for edit in plan.edits if edit.operator == "project_out"]
    if not found:
        if orthogonalize:
            raise LensteerError(
                "orthogonalize=True with a plan that adds: it is for operator='project_out', leave it out"
            )
        return None
    if len(plan.edits) > 1 or found[0].coefficient != 1:
        raise LensteerError(
            f"weights hold one projection of coefficient 1 and nothing beside it, and this plan has {len(plan.edits)} "
            f"edit(s), with the coefficient {found[0].coefficient:g}: export one, or steer by ls.export.hf"
        )
    if not orthogonalize:
        raise LensteerError(
            f"weights cannot project at the output of layer {found[0].layer} alone: give orthogonalize=True to remove "
            f"the direction from every matrix that writes to the residual stream up to block {found[0].layer}, which "
            "is more than the plan does"
        )
    return found[0]


def _write_config(made: Path, rewrite: Rewrite, dtype: torch.dtype) -> None:
    values = rewrite.config.to_dict()
    name = str(dtype).removeprefix("torch.")
    values |= {"dtype": name, "torch_dtype": name}  # the second is what older readers know
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # the same; they would take a default instead
        values["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    for key in ("_name_or_path", "_commit_hash"):
        values.pop(key, None)
    (made / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")


def _write_tokenizer(made: Path, model: TransformerBridge, weights: Weights) -> None:
    """The checkpoint's own files, which say more than the loaded tokenizer; that one where there are none."""
    tokenizer = model.tokenizer
    for name in _FILES:
        if weights.folder is not None and (weights.folder / name).is_file():
            shutil.copyfile(weights.folder / name, made / name)
    if not (made / "tokenizer_config.json").exists():
        tokenizer.save_pretrained(made)
    own = getattr(model.original_model, "generation_config", None)
    if not (made / "generation_config.json").exists() and own is not None:
        (made / "generation_config.json").write_text(json.dumps(own.to_diff_dict(), indent=2), encoding="utf-8")
    from transformers import AutoTokenizer

    if AutoTokenizer.from_pretrained(made).chat_template != tokenizer.chat_template and tokenizer.chat_template:
        (made / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


@torch.inference_mode()
def _compared(
    made: Path,
    target: Path,
    model: TransformerBridge,
    plan: Plan,
    projection: SteeringPlan | None,
    rewrite: Rewrite,
    stored: torch.dtype,
    weights: Weights,
) -> SteeredCheckpoint:
    """Load the export as anyone would, and compare its tokenizer and logits.

    Raises:
        LensteerError: they differ.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = _prompts(model)
    tokenizer = AutoTokenizer.from_pretrained(made)
    for text in _TEXTS:
        if list(tokenizer(text, add_special_tokens=False).input_ids) != models.encode(model, text):
            raise LensteerError(f"the export's tokenizer gives other ids for {text!r}: nothing was written")
    own = model.original_model.dtype
    # In float32 the bridge's own attention, so that rounding is not compared. In less, any, so that noise is measured.
    attention = dict(attn_implementation="eager") if own == torch.float32 else {}
    with no_loading_bar():
        export, said = AutoModelForCausalLM.from_pretrained(made, dtype=own, output_loading_info=True, **attention)
    if said["missing_keys"] or said["mismatched_keys"]:
        raise LensteerError(
            f"the export lacks tensors ({sorted(map(str, said['missing_keys']))[:3]}): nothing was written"
        )
    export.to(models.device(model)).eval()
    plain = [model(ids).float() for ids in prompts]
    with _hooked(model, plan, projection):
        expected = [model(ids).float() for ids in prompts]
    found = [export(input_ids=ids).logits.float() for ids in prompts]
    if not all(logits.isfinite().all() for logits in (*expected, *found)):
        raise LensteerError("steered logits are not finite: lower the coefficient; nothing was written")
    largest, effect = furthest(found, expected), furthest(expected, plain)
    tolerance = TOLERANCE
    if not stored == own == torch.float32:
        for name, original in rewrite.steering.items():
            export.get_parameter(name).copy_(torch.tensor(0.0) if original is None else weights.get(original))
        noise = furthest([export(input_ids=ids).logits.float() for ids in prompts], plain)
        tolerance += COARSE_NOISE * noise + COARSE_EFFECT * effect if rewrite.steering else COARSE_EFFECT * effect
    if largest > tolerance:
        raise LensteerError(
            f"the export's logits differ from the hooked model's by up to {largest:.2g}, more than {tolerance:.2g} "
            f"(steering changes them by up to {effect:.2g}): nothing was written. A {rewrite.config.model_type!r} may "
            "not compute what is assumed here"
        )
    return SteeredCheckpoint(
        target,
        type(export).__name__,
        rewrite.how,
        tuple(sorted({edit.layer for edit in plan.edits})),
        str(stored).removeprefix("torch."),
        largest,
        tolerance,
        effect,
        sum(ids.shape[1] for ids in prompts),
    )


def _prompts(model: TransformerBridge) -> list[Tensor]:
    """A few texts, one of them as a chat, and random ids."""
    texts = list(_TEXTS)
    if model.tokenizer.chat_template:
        texts.append(models.chat_text(model, _TEXTS[-1]))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(min(int(model.cfg.d_vocab), len(model.tokenizer)), (_RANDOM,), generator=generator)
    rows = [models.encode(model, text) for text in texts] + [drawn.tolist()]
    return [torch.tensor([row], device=models.device(model)) for row in rows if row]


@contextmanager
def _hooked(model: TransformerBridge, plan: Plan, projection: SteeringPlan | None) -> Iterator[None]:
    """The plan's hooks; for a projection, hooks at every site up to its layer."""
    if projection is None:
        with plan.on(model):
            yield
        return
    unit = projection.vector.to(models.device(model), model.original_model.dtype)

    def project(resid: Float[Tensor, "batch pos d_model"], hook: object) -> Tensor:
        return resid - (resid @ unit)[..., None] * unit

    with model.hooks(fwd_hooks=[(name, project) for name in sites_up_to(model, projection.layer)]):
        yield


def sites_up_to(model: TransformerBridge, layer: int) -> list[str]:
    """The hook points of the residual stream from the embedding up to the output of a layer."""
    wanted = [models.resid_hook(block, site) for block in range(layer + 1) for site in models.SITES]
    return [name for name in wanted if name in model.hook_dict]


def _card(
    plan: Plan,
    model: ModelId,
    done: SteeredCheckpoint,
    projection: SteeringPlan | None,
    base_model: str,
    license_name: str,
) -> str:
    more = [
        "**More than the plan was written**: the direction is removed at every site up to its layer, not only at the "
        "layer's output. An evaluation of the plan is not one of these weights."
    ]
    return (
        "\n\n".join(
            [
                front_matter(["steered", "lensteer"], base_model or model.name, license_name),
                f"# {base_model or model.name}, steered: {plan_name(plan)}",
                f"These weights steer themselves, at every position: a `{done.architecture}` {done.how}. Load them as "
                "any checkpoint. `plan/` holds the vectors and settings that went into them.",
                model_facts(model, base_model),
                edits_table(plan),
                f"Checked when written: on {done.tokens} tokens of a few prompts, logits of the plain model with these "
                f"weights ({done.dtype}) differ from those of the base model with hooks by at most "
                f"{done.difference:.2g} (allowed: {done.tolerance:.2g}). Steering itself changes them by up to "
                f"{done.effect:.3g}{'' if done.conclusive else ', which rounding in this dtype hides'}.",
                "## Evaluation",
                *([] if projection is None else more),
                evaluation_section(plan, model),
                "## Limits",
                limits_section(plan),
            ]
        )
        + "\n"
    )
