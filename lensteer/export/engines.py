"""Files for serving engines of the vLLM family, and for two libraries: what each can hold, and refusals by name.

None of these engines is run by the tests (most need a GPU): the files are checked by schemas of ours, and what they
hold is applied to the model and compared with the hooked one. The formats are those of these versions:

EasySteer   commit 3e242a6 of ZJU-REAL/EasySteer, 4b85a7f of its vLLM (`docs/user-guide/steering.md`, `payloads.py`)
vllm-lens   commit 103c143 of UKGovernmentBEIS/vllm-lens (`vllm_lens/_helpers/types.py`)
RhizoNymph  commit 0990d9d of RhizoNymph/vllm (`docs/features/steering.md`)
AISteer360  commit 51b61df of IBM/AISteer360 (`.../state_control/_common/steering_vector.py`)
lm-eval     commit bb0a902 of EleutherAI/lm-evaluation-harness (`lm_eval/models/hf_steered.py`)

In all of them a layer is 0-based and means the output of that block, as here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from lensteer import models
from lensteer.errors import LensteerError
from lensteer.export.cards import plan_name
from lensteer.export.edits import additions, check_vectors, projected_out, projects, scope_of
from lensteer.files import new_folder, write_given
from lensteer.positions import PositionScope, everywhere, everywhere_but_first, generated, prompt
from lensteer.steering import Plan

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Scopes that no engine has: what is known while text is generated decides them.
_NEAREST = (
    "; engines choose positions by phase, index or token id: the nearest to sentence starts that EasySteer has is "
    "SEAL's choice, `generation_tokens` with the ids that hold a paragraph break"
)


def easysteer(plan: Plan, path: str | Path, *, model: TransformerBridge | None = None) -> Path:
    """Write a steering spec for EasySteer: `vllm serve MODEL --steering-config FILE`, or a request's `steering`.

    The vectors are in the file (`data`), float32 in base64; the spec has `scale` 1, because coefficients are part of
    the vectors. A projection becomes the algorithm `erase`, which removes a direction whole.

    Args:
        plan: of one scope: `everywhere`, `everywhere_but_first`, `prompt`, `generated`, `first(n)` or `at([...])`
            within the prompt (EasySteer moves a position after its end to its last token).
        path: of the JSON file, which is replaced atomically.
        model: that the plan is for; if given, layers and width are checked.

    Returns:
        The path.

    Raises:
        LensteerError: a scope or an operation that EasySteer does not have, a plan of another model, or a path that
            cannot be written.
    """
    fmt = "EasySteer"
    scope = _scope(plan, fmt, [everywhere, everywhere_but_first, prompt, generated, "first", "at"])
    if projects(plan, fmt):
        _only_coefficient(plan, fmt, [1.0])
        vectors, algorithm = projected_out(plan, fmt), "erase"
    else:
        vectors, algorithm = additions(plan, fmt, [scope]), "direct"
    check_vectors(vectors, model, fmt)
    whole: dict[str, dict[str, Any]] = {
        "everywhere": {"prompt": "all", "generation": "all"},
        "everywhere_but_first": {"prompt": "all", "exclude_prompt_positions": [0], "generation": "all"},
        "prompt": {"prompt": "all"},
        "generated": {"generation": "all"},
    }
    numbers = _numbers(scope)
    if scope.name in whole:
        apply = whole[scope.name]
    else:
        apply = {"generation_window": [0, *numbers]} if _is(scope, "first") else {"prompt_positions": numbers}
    tensors = {f"layer.{layer}": vector for layer, vector in vectors.items()}
    spec = {
        "vectors": [
            {
                "data": _payload("direction", tensors),
                "algorithm": algorithm,
                "scale": 1.0,
                "layers": list(vectors),
                "normalize": False,
                "apply": apply,
                "name": plan_name(plan),
            }
        ]
    }
    return _write(path, spec)


def vllm_lens(plan: Plan, path: str | Path, *, model: TransformerBridge | None = None) -> Path:
    """Write the `extra_args` of vllm-lens: `{"apply_steering_vectors": [...]}`, one vector with all layers.

    Offline it is `SamplingParams(extra_args=...)`; over HTTP the value is sent as a JSON text in `vllm_xargs`.

    Args:
        plan: added, of one scope: `everywhere` or `at([...])`.
        path: of the JSON file, which is replaced atomically.
        model: that the plan is for; if given, layers and width are checked.

    Returns:
        The path.

    Raises:
        LensteerError: a scope or an operation that vllm-lens does not have, a plan of another model, or a path that
            cannot be written.
    """
    fmt = "vllm-lens"
    scope = _scope(plan, fmt, [everywhere, "at"])
    vectors = additions(plan, fmt, [scope])
    check_vectors(vectors, model, fmt)
    stacked = torch.stack(list(vectors.values()))
    positions = _numbers(scope) if _is(scope, "at") else None
    if positions is not None:
        stacked = stacked[:, None].expand(-1, len(positions), -1)
    spec = {
        "apply_steering_vectors": [
            {
                "activations": {
                    "data": _base64(stacked),
                    "dtype": "float32",
                    "original_dtype": "torch.float32",
                    "shape": list(stacked.shape),
                },
                "layer_indices": list(vectors),
                "scale": 1.0,
                "norm_match": False,
                "position_indices": positions,
            }
        ]
    }
    return _write(path, spec)


def rhizonymph(plan: Plan, path: str | Path, *, model: TransformerBridge | None = None) -> Path:
    """Write a named steering module for RhizoNymph's vLLM: `--steering-modules NAME=FILE`, hook point `post_block`.

    A projection becomes a directional clamp to 0, whose strength is the coefficient.

    Args:
        plan: of one scope: `everywhere`, `prompt` or `generated`, its tiers for both phases, prefill and decode.
        path: of the JSON file, which is replaced atomically.
        model: that the plan is for; if given, layers and width are checked.

    Returns:
        The path.

    Raises:
        LensteerError: a scope or an operation that it does not have, a projection with a coefficient outside of 0 to 1,
            a plan of another model, or a path that cannot be written.
    """
    fmt = "RhizoNymph's vLLM"
    scope = _scope(plan, fmt, [everywhere, prompt, generated])
    tier = {"everywhere": "", "prompt": "prefill_", "generated": "decode_"}[scope.name]
    if projects(plan, fmt):
        if any(not 0 <= edit.coefficient <= 1 for edit in plan.edits):
            wrong = [edit.coefficient for edit in plan.edits]
            raise LensteerError(f"{fmt} projects out with a strength from 0 to 1, and this plan has {wrong}")
        units = projected_out(plan, fmt)
        check_vectors(units, model, fmt)
        strength = {edit.layer: edit.coefficient for edit in plan.edits}
        clamps = {str(n): [{"vector": v.tolist(), "value": 0.0, "strength": strength[n]}] for n, v in units.items()}
        return _write(path, {f"{tier}clamps": {"post_block": clamps}})
    vectors = additions(plan, fmt, [scope])
    check_vectors(vectors, model, fmt)
    return _write(path, {f"{tier}vectors": {"post_block": {str(n): v.tolist() for n, v in vectors.items()}}})


def svec(plan: Plan, path: str | Path, *, model: TransformerBridge) -> Path:
    """Write a `.svec` of AISteer360: JSON with one direction, for its control `CAA`.

    The file holds no positions: give the control what the file says under "lensteer" (its loader skips that): the
    layer, `multiplier` 1, and `token_scope` "all" or "after_prompt".

    Args:
        plan: added, of one layer, of the scope `everywhere` or `generated`.
        path: of the file, which is replaced atomically; it must end in ".svec", which the loader appends.
        model: that the plan is for; its kind goes into the file.

    Returns:
        The path.

    Raises:
        LensteerError: several layers, a scope or an operation that it does not have, a plan of another model, another
            ending, or a path that cannot be written.
    """
    fmt = "AISteer360's CAA"
    scope = _scope(plan, fmt, [everywhere, generated])
    vectors = additions(plan, fmt, [scope])
    check_vectors(vectors, model, fmt)
    if len(vectors) > 1:
        raise LensteerError(f"{fmt} steers one layer, and this plan steers {list(vectors)}: export each by itself")
    if Path(path).suffix != ".svec":
        raise LensteerError(f"{str(path)!r} does not end in '.svec', which AISteer360 appends when it loads")
    ((layer, vector),) = vectors.items()
    values = {
        "model_type": str(model.original_model.config.model_type),
        "directions": {str(layer): [vector.tolist()]},
        "lensteer": {
            "name": plan_name(plan),
            "layer_id": layer,
            "multiplier": 1.0,
            "token_scope": "all" if scope == everywhere else "after_prompt",
        },
    }
    return _write(path, values)


#: lm-eval reads its vectors by `torch.load` only, and lensteer writes no pickle: the user's own torch makes the file.
_LM_EVAL = '''"""Makes steer.pt for lm-evaluation-harness from steering_vector.safetensors, which lies beside this file.

    python make_steer_pt.py
    lm_eval --model steered --model_args pretrained={name},steer_path=steer.pt --tasks ...
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

here = Path(__file__).parent
vector = load_file(here / "steering_vector.safetensors")["{hook}"]
entry = {{"action": "add", "steering_vector": vector, "steering_coefficient": 1.0, "bias": None, "head_index": None}}
torch.save({{"{hook}": entry}}, here / "steer.pt")
'''


def lm_eval(plan: Plan, path: str | Path, *, model: TransformerBridge) -> Path:
    """Write a folder that makes the `steer_path` of lm-evaluation-harness: a dict by hook point, here `layers.l`.

    It reads its vectors by `torch.load` only, and lensteer writes no pickle: the folder holds the vector in
    safetensors and a script of ten lines, which the user's own torch runs, `python make_steer_pt.py`.

    Only one hook point: in some versions (such as commit 0478792) all hook points of a file get the last one's vector.

    Args:
        plan: added, of one layer, of the scope `everywhere`.
        path: a new or an empty folder.
        model: that the plan is for.

    Returns:
        The folder.

    Raises:
        LensteerError: several layers, another scope or operation, a plan of another model, or a folder that holds
            something.
    """
    fmt = "lm-eval"
    vectors = additions(plan, fmt, [_scope(plan, fmt, [everywhere])])
    check_vectors(vectors, model, fmt)
    if len(vectors) > 1:
        raise LensteerError(
            f"some versions of {fmt} give all hook points of a file the vector of the last one, and this plan steers "
            f"the layers {list(vectors)}: export each by itself"
        )
    ((layer, vector),) = vectors.items()
    _module(model, layer)
    with new_folder(Path(path)) as made:
        (made / "steering_vector.safetensors").write_bytes(save({f"layers.{layer}": vector.contiguous()}))
        text = _LM_EVAL.format(name=models.fingerprint(model).name, hook=f"layers.{layer}")
        (made / "make_steer_pt.py").write_text(text, encoding="utf-8")
    return Path(path)


def _module(model: TransformerBridge, layer: int) -> None:
    """Make sure that the base model's blocks are called `layers`, as lm-eval looks them up."""
    kind = str(model.original_model.config.model_type)
    base = getattr(model.original_model, "base_model", None)
    if not hasattr(base, "layers"):
        raise LensteerError(f"the blocks of a {kind!r} are not called 'layers.{layer}', where lm-eval's hook would go")


def _scope(plan: Plan, fmt: str, scopes: Sequence[PositionScope | str]) -> PositionScope:
    try:
        return scope_of(plan, fmt, scopes)
    except LensteerError as error:
        unknown = "cannot express the scope" in str(error)
        raise LensteerError(f"{error}{_NEAREST if unknown else ''}") from error


def _is(scope: PositionScope, name: str) -> bool:
    return scope.name.partition("(")[0] == name


def _numbers(scope: PositionScope) -> list[int]:
    """The numbers in the name of `first(n)` or `at([...])`."""
    return [int(number) for number in re.findall(r"\d+", scope.name)] if "(" in scope.name else []


def _only_coefficient(plan: Plan, fmt: str, allowed: Sequence[float]) -> None:
    for edit in plan.edits:
        if edit.coefficient not in allowed:
            raise LensteerError(
                f"{fmt} removes a direction whole (coefficient {allowed[0]:g}), and this plan has {edit.coefficient:g}"
            )


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().astype("<f4").tobytes()).decode()


def _payload(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """EasySteer's wire form of named tensors, with its hash of kind, names, shapes and bytes."""
    hashed = hashlib.sha256(f"{kind}:1".encode())
    entries = {}
    for name in sorted(tensors):
        values = tensors[name].contiguous().numpy().astype("<f4")
        hashed.update(name.encode() + str(tuple(values.shape)).encode() + values.tobytes())
        entries[name] = {"shape": list(values.shape), "data": _base64(tensors[name])}
    return {"version": 1, "kind": kind, "tensors": entries, "extra": {}, "sha256": hashed.hexdigest()}


def _write(path: str | Path, values: Mapping[str, Any]) -> Path:
    return write_given(path, json.dumps(values, allow_nan=False) + "\n")
