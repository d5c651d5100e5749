"""Files of serving engines: their schemas, what they steer when applied to the model, and what they refuse by name.

The engines themselves are not run. Each file is read the way its engine documents it, by code of this test, and what it
holds is applied to the plain model with a forward hook: the logits must be those of the hooked plan.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

import lensteer as ls
from engine_schemas import EASYSTEER, RHIZONYMPH, SVEC, VLLM_LENS
from exports_table import record

PROMPT, IDS = 5, [7, 30, 41, 9, 12, 50, 33, 21]  # the first five tokens are the prompt
WRITERS = {"easysteer": EASYSTEER, "vllm_lens": VLLM_LENS, "rhizonymph": RHIZONYMPH}

Edit = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def plan(model, random_direction):
    direction = random_direction(model)
    return ls.SteeringPlan(direction, 1, 0.8) + ls.SteeringPlan(direction, 0, -1.2)


def scoped(plan, scope, **changes):
    first, second = (replace(edit, scope=scope, **changes) for edit in plan.edits)
    return first + second


def hooked(model, plan) -> torch.Tensor:
    with torch.no_grad(), plan.on(model, prompt_length=PROMPT):
        return model(torch.tensor([IDS]))[0]


def at_hook_point(edit: Edit) -> Callable[..., torch.Tensor]:
    return lambda resid, hook: edit(resid)


def erased(vector: torch.Tensor) -> Edit:
    return lambda h: h - (h @ vector)[..., None] / (vector @ vector) * vector


def added(rows: torch.Tensor) -> Edit:
    return lambda h: h + rows


def clamped(clamp: dict) -> Edit:
    unit = torch.tensor(clamp["vector"]) / torch.tensor(clamp["vector"]).norm()
    return lambda h: h + clamp["strength"] * (clamp["value"] - (h @ unit))[..., None] * unit


def applied(model, edits: dict[int, Edit]) -> torch.Tensor:
    """Logits with each edit at the output of its block, by hook points and nothing of lensteer's."""
    with torch.no_grad(), ExitStack() as stack:
        hooks = [(f"blocks.{n}.hook_resid_post", at_hook_point(edit)) for n, edit in edits.items()]
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        return model(torch.tensor([IDS]))[0]


def at_positions(vector: torch.Tensor, chosen: list[int]) -> Edit:
    mask = torch.zeros(len(IDS), 1)
    mask[chosen] = 1
    return lambda h: h + mask * vector


def floats(text: str, shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float32).reshape(shape).copy())


def easysteer_edits(spec: dict) -> dict[int, Edit]:
    """As `docs/user-guide/steering.md` describes: includes unite, excludes subtract."""
    (entry,) = spec["vectors"]
    apply = entry["apply"]
    assert not entry["normalize"]
    chosen: set[int] = set()
    if apply.get("prompt") == "all":
        chosen |= set(range(PROMPT))
    if apply.get("generation") == "all":
        chosen |= set(range(PROMPT, len(IDS)))
    chosen |= {min(p, PROMPT - 1) for p in apply.get("prompt_positions", ())}
    if "generation_window" in apply:
        start, stop = apply["generation_window"]
        chosen |= set(range(PROMPT + start, min(PROMPT + stop, len(IDS))))
    chosen -= set(apply.get("exclude_prompt_positions", ()))
    data = entry["data"]
    digest = hashlib.sha256(b"direction:1")
    for name, tensor in sorted(data["tensors"].items()):
        digest.update(name.encode() + str(tuple(tensor["shape"])).encode() + base64.b64decode(tensor["data"]))
    assert digest.hexdigest() == data["sha256"]
    found: dict[int, Edit] = {}
    for layer in entry["layers"]:
        tensor = data["tensors"][f"layer.{layer}"]
        vector = entry["scale"] * floats(tensor["data"], tensor["shape"])
        if entry["algorithm"] == "direct":
            found[layer] = at_positions(vector, sorted(chosen))
        else:
            found[layer] = erased(vector)
    return found


def vllm_lens_edits(spec: dict) -> dict[int, Edit]:
    (entry,) = spec["apply_steering_vectors"]
    activations = floats(entry["activations"]["data"], entry["activations"]["shape"])
    assert len(activations) == len(entry["layer_indices"])
    assert not entry["norm_match"]
    positions, found = entry["position_indices"], {}
    for layer, rows in zip(entry["layer_indices"], entry["scale"] * activations, strict=True):
        full = rows.expand(len(IDS), -1) if rows.dim() == 1 else torch.zeros(len(IDS), rows.shape[-1])
        if rows.dim() == 2:
            full = full.index_copy(0, torch.tensor(positions), rows)
        found[layer] = added(full)
    return found


def rhizonymph_edits(spec: dict) -> dict[int, Edit]:
    phases = {"": range(len(IDS)), "prefill_": range(PROMPT), "decode_": range(PROMPT, len(IDS))}
    found: dict[int, Edit] = {}
    for phase, chosen in phases.items():
        for layer, values in spec.get(f"{phase}vectors", {}).get("post_block", {}).items():
            found[int(layer)] = at_positions(torch.tensor(values), list(chosen))
        for layer, (clamp,) in spec.get(f"{phase}clamps", {}).get("post_block", {}).items():
            found[int(layer)] = clamped(clamp)
    return found


READERS = {"easysteer": easysteer_edits, "vllm_lens": vllm_lens_edits, "rhizonymph": rhizonymph_edits}
SCOPES = {
    "easysteer": [
        ls.everywhere, ls.everywhere_but_first, ls.prompt, ls.generated, ls.first(2), ls.at([0, 3]),
    ],
    "vllm_lens": [ls.everywhere, ls.at([1, 6])],
    "rhizonymph": [ls.everywhere, ls.prompt, ls.generated],
}  # fmt: skip


@pytest.mark.parametrize("engine", WRITERS)
def test_what_a_file_steers_is_what_the_plan_steers(engine, model, plan, tmp_path):
    worst = 0.0
    for scope in SCOPES[engine]:
        own = scoped(plan, scope)
        path = getattr(ls.export, engine)(own, tmp_path / "steering.json", model=model)
        spec = json.loads(path.read_text())
        jsonschema.validate(spec, WRITERS[engine])
        found, wanted = applied(model, READERS[engine](spec)), hooked(model, own)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert (wanted - applied(model, {})).abs().max() > 0.1
        worst = max(worst, float((found - wanted).abs().max()))
    record(f"{engine} (format checked)", "random Llama", "F32", worst, ", ".join(s.name for s in SCOPES[engine]))


@pytest.mark.parametrize("engine", ["easysteer", "rhizonymph"])
def test_a_projection_where_an_engine_has_one(engine, model, plan, tmp_path):
    own = scoped(plan, ls.everywhere, operator="project_out", coefficient=1.0)
    spec = json.loads(getattr(ls.export, engine)(own, tmp_path / "steering.json", model=model).read_text())
    jsonschema.validate(spec, WRITERS[engine])
    torch.testing.assert_close(applied(model, READERS[engine](spec)), hooked(model, own), atol=1e-4, rtol=1e-4)


def test_svec_holds_one_direction_and_says_how_to_use_it(model, plan, tmp_path):
    one = plan.edits[0]
    values = json.loads(ls.export.svec(one, tmp_path / "polite.svec", model=model).read_text())
    jsonschema.validate(values, SVEC)
    assert values["model_type"] == "llama"
    assert values["lensteer"] == {"name": "random 0", "layer_id": 1, "multiplier": 1.0, "token_scope": "all"}
    ((layer, rows),) = values["directions"].items()
    found = applied(model, {int(layer): lambda h: h + torch.tensor(rows)[0]})
    wanted = hooked(model, one)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    difference = float((found - wanted).abs().max())
    record("svec, AISteer360 (format checked)", "random Llama", "F32", difference, "everywhere, generated")
    after = ls.export.svec(replace(one, scope=ls.generated), tmp_path / "after.svec", model=model)
    assert json.loads(after.read_text())["lensteer"]["token_scope"] == "after_prompt"


@pytest.mark.medium
def test_lm_evals_file_is_made_by_the_script_and_steers_the_same(model, plan, tiny_checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    one = plan.edits[0]
    folder = ls.export.lm_eval(one, tmp_path / "steered", model=model)
    assert sorted(file.name for file in folder.iterdir()) == ["make_steer_pt.py", "steering_vector.safetensors"]
    subprocess.run([sys.executable, str(folder / "make_steer_pt.py")], check=True)
    config = torch.load(folder / "steer.pt", weights_only=True)
    ((name, entry),) = config.items()
    assert set(entry) == {"action", "steering_vector", "steering_coefficient", "bias", "head_index"}
    assert (name, entry["action"], entry["bias"], entry["head_index"]) == ("layers.1", "add", None, None)
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
    (module,) = [module for own, module in plain.base_model.named_modules() if own == name]  # as lm-eval finds it

    def add(_module, _inputs, output):
        changed = (output[0] if isinstance(output, tuple) else output) + (
            entry["steering_vector"] * entry["steering_coefficient"]
        )
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    module.register_forward_hook(add)
    with torch.no_grad():
        found = plain(torch.tensor([IDS])).logits[0]
    wanted = hooked(model, one)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    difference = float((found - wanted).abs().max())
    record("lm-eval steer_path (format checked)", "random Llama", "F32", difference, "everywhere")


@pytest.mark.parametrize("engine", [*WRITERS, "svec", "lm_eval"])
def test_scopes_that_no_engine_has_are_refused_by_name(engine, model, plan, tmp_path):
    write = getattr(ls.export, engine)
    for scope in (ls.onsets, ls.sentence_starts, ls.thinking, ls.generated & ls.onsets):
        with pytest.raises(ls.LensteerError, match=r"cannot express the scope .*it has 'everywhere'.*paragraph break"):
            write(replace(plan.edits[0], scope=scope), tmp_path / "x.svec", model=model)
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(model, plan, tiny_model, random_direction, tmp_path):
    one, path = plan.edits[0], tmp_path / "x.svec"
    half = replace(one, operator="project_out", coefficient=0.5)
    wide = ls.SteeringPlan(ls.Direction("wide", torch.ones(4, 40), torch.ones(4), (0, 1, 2, 3)), 1)
    deep = ls.SteeringPlan(ls.Direction("deep", torch.ones(1, 32), torch.ones(1), (9,)), 9)
    both = one + half
    for engine, wrong, said in [
        ("easysteer", half, "removes a direction whole"),
        ("easysteer", both, "either adds or projects out"),
        ("easysteer", replace(half, coefficient=1.0) + replace(half, coefficient=1.0), "two at 1"),
        ("rhizonymph", replace(half, coefficient=1.5), "from 0 to 1, and this plan has .1.5."),
        ("rhizonymph", replace(one, scope=ls.at([1])), "cannot express"),
        ("vllm_lens", half, "adds vectors"),
        ("vllm_lens", replace(one, scope=ls.generated), "cannot express the scope 'generated'"),
        ("vllm_lens", replace(one, coefficient=1e39), "not finite in float32"),
        ("svec", plan, r"steers one layer, and this plan steers \[0, 1\]"),
        ("lm_eval", plan, r"the vector of the last one, and this plan steers the layers \[0, 1\]"),
        *((engine, wide, "40 wide, and .* is 32") for engine in [*WRITERS, "svec", "lm_eval"]),
        *((engine, deep, "no layer 9") for engine in [*WRITERS, "svec", "lm_eval"]),
    ]:
        with pytest.raises(ls.LensteerError, match=said):
            getattr(ls.export, engine)(wrong, path, model=model)
    with pytest.raises(ls.LensteerError, match=r"does not end in '.svec'"):
        ls.export.svec(one, tmp_path / "x.json", model=model)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(ls.LensteerError, match="cannot write"):
        ls.export.easysteer(one, tmp_path / "file" / "x.json")
    with pytest.raises(ls.LensteerError, match="exists and holds something"):
        ls.export.lm_eval(one, tmp_path, model=model)


def test_schemas_notice_a_wrong_file(model, plan, tmp_path):
    spec = json.loads(ls.export.easysteer(plan, tmp_path / "s.json").read_text())
    for wrong in (
        {**spec, "vector": []},
        {"vectors": []},
        {"vectors": [{**spec["vectors"][0], "apply": {}}]},
        {"vectors": [{**spec["vectors"][0], "apply": {"phases": ["prompt"]}}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, EASYSTEER)


def test_no_engine_file_holds_a_pickle(model, plan, tmp_path):
    for engine in WRITERS:
        assert getattr(ls.export, engine)(plan, tmp_path / f"{engine}.json").read_bytes()[:1] == b"{"
    folder = ls.export.lm_eval(plan.edits[0], tmp_path / "lm", model=model)
    assert not [file for file in Path(folder).rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".pkl")]
