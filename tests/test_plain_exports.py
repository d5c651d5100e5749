"""Scripts for plain transformers: run without lensteer, they generate the same ids."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from exports_table import record
from lensteer import models
from lensteer.errors import LensteerError
from lensteer.export import cache, hf
from lensteer.generation import generate
from lensteer.positions import generated, onsets
from lensteer.steering import SteeringPlan
from lensteer.steering.cache import CACHE_UNITS, OFFSET, CachePlan, CacheVector

#: Generates greedily in a process that cannot import lensteer. Arguments: model, prompt ids, number of tokens.
DRIVER = """
import json, sys
sys.modules["lensteer"] = None
import torch
from transformers import AutoModelForCausalLM
name, ids, n = sys.argv[1], torch.tensor([json.loads(sys.argv[2])]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
{run}
print("IDS" + json.dumps(out[0, ids.shape[1]:].tolist()))
"""
STEER = DRIVER.format(run="from steer import steered\nwith steered(model):\n    out = model.generate(ids, **options)")
EDIT = DRIVER.format(
    run="from steer_cache import edited_cache\n"
    "out = model.generate(ids, past_key_values=edited_cache(model, ids), **options)"
)


def without_lensteer(driver, folder, source, ids, n):
    run = subprocess.run(
        [sys.executable, "-c", driver, str(source), json.dumps(ids), str(n)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return tuple(json.loads(run.stdout.rsplit("IDS", 1)[1]))


def cache_vector(model, seed=0, length=5.0, position: int | str = "last_prompt"):
    layers, config = models.n_layers(model), model.original_model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (layers, config.num_key_value_heads, head)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values = length * values / values.flatten(1).norm(dim=1)[:, None, None]
    return CacheVector("think", torch.zeros(shape), values, position, {"model": models.fingerprint(model).to_dict()})


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["everywhere", "generated", "both"])
def test_the_organism_steered_by_the_script_generates_the_same_ids(scope, organism, random_direction, tmp_path):
    one, other = random_direction(organism, length=8.0), random_direction(organism, seed=1)
    plan = {
        "everywhere": SteeringPlan(one, 4),
        "generated": SteeringPlan(one, 4, 2.0, generated),
        "both": SteeringPlan(one, 4, 1.0, generated) + SteeringPlan(other, 2, 1.0, operator="project_out"),
    }[scope]
    done = hf(plan, tmp_path / "export", model=organism)
    ids = models.encode(organism, models.chat_text(organism, "Is there a way from A to B?"))
    expected, plain = generate(organism, [ids, ids], max_new_tokens=40, plans=[plan, None])
    assert expected.ids != plain.ids
    found = without_lensteer(STEER, done.path, models.ORGANISM, ids, 40)
    assert found == expected.ids
    assert done.difference <= done.tolerance < done.effect
    if scope == "both":
        record("script for plain transformers", "organism (Qwen2)", "F32", done.difference, "everywhere, generated")


@pytest.mark.slow
@pytest.mark.parametrize("position", ["last_prompt", "offset_token", -4])
def test_a_cache_vector_generates_the_same_ids(position, organism, tmp_path):
    plan = CachePlan(cache_vector(organism, length=30.0, position=position), 1.0)
    done = cache(plan, tmp_path / "export", model=organism)
    text = models.chat_text(organism, "Is there a way from A to B?") + (OFFSET if position == "offset_token" else "")
    ids = models.encode(organism, text)
    expected, plain = generate(organism, [ids, ids], max_new_tokens=40, plans=[plan, None])
    assert expected.ids != plain.ids
    assert without_lensteer(EDIT, done.path, models.ORGANISM, ids, 40) == expected.ids
    assert done.difference <= done.tolerance < done.effect
    if position == "last_prompt":
        record("recipe for one edit of the cache", "organism (Qwen2)", "F32", done.difference, "one slot of the prompt")


@pytest.mark.slow
def test_the_script_is_a_command(organism, random_direction, tmp_path):
    plan = SteeringPlan(random_direction(organism, length=8.0), 4, 1.0, generated)
    done = hf(plan, tmp_path / "export", model=organism)
    words = [sys.executable, "steer.py", str(models.ORGANISM), "Is there a way from A to B?"]
    run = subprocess.run(words, capture_output=True, text=True, cwd=done.path, check=True)
    ids = models.encode(organism, models.chat_text(organism, words[-1]))
    (expected,) = generate(organism, [ids], max_new_tokens=200, plans=[plan])
    assert run.stdout == organism.tokenizer.decode(list(expected.ids)) + "\n"
    wrong = subprocess.run(words[:2], capture_output=True, text=True, cwd=done.path)
    assert "usage" in wrong.stderr


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_scripts_are_checked_in_the_process(family, tiny_model, random_direction, tmp_path):
    model = tiny_model(family)
    plan = SteeringPlan(random_direction(model), 1, 0.5, generated) + SteeringPlan(
        random_direction(model, seed=1), 2, 1.0, operator="project_out"
    )
    done = hf(plan, tmp_path / "export", model=model)
    assert done.difference <= done.tolerance < done.effect
    assert sorted(path.name for path in done.path.iterdir()) == ["README.md", "steer.py", "steering_vector.safetensors"]
    assert "lensteer" not in (done.path / "steer.py").read_text()
    card = (done.path / "README.md").read_text()
    assert "The edits together were not evaluated" in card
    assert "with steered(model)" in card


@pytest.mark.parametrize("unit", CACHE_UNITS)
def test_a_cache_recipe_is_checked_in_the_process(unit, tiny_model, tmp_path):
    model = tiny_model("llama")
    vector = cache_vector(model)
    vector = replace(vector, provenance={**vector.provenance, "norms": {"keys": 1.0, "values": 40.0}})
    done = cache(CachePlan(vector, 2.0, layers=(0, 2), unit=unit), tmp_path / "export", model=model)
    assert done.difference <= done.tolerance < done.effect
    assert "lensteer" not in (done.path / "steer_cache.py").read_text()


def test_what_a_script_cannot_say(tiny_model, random_direction, tmp_path):
    model = tiny_model("llama")
    plan, edit = SteeringPlan(random_direction(model), 1), CachePlan(cache_vector(model))
    refused = [
        (lambda: hf(replace(plan, scope=onsets), tmp_path / "no", model=model), "cannot express the scope 'onsets'"),
        (lambda: hf(edit, tmp_path / "no", model=model), r"ls\.export\.cache"),
        (lambda: hf(plan, tmp_path / "no", model=tiny_model("llama", d_model=64)), "64 wide"),
        (lambda: cache(plan, tmp_path / "no", model=model), r"1 edit\(s\) of residuals"),
        (lambda: cache(replace(edit, c_keys=1.0), tmp_path / "no", model=model), "c_keys=1: keys turn"),
        (lambda: cache(edit, tmp_path / "no", model=tiny_model("llama", seed=1)), "fit it on this model"),
    ]
    for call, words in refused:
        with pytest.raises(LensteerError, match=words):
            call()
    assert not list(tmp_path.iterdir())


def test_a_script_that_is_off_is_not_written(tiny_model, random_direction, tmp_path, monkeypatch):
    from lensteer.export import plain

    model = tiny_model("llama")
    right = plain._write

    def off(made, name, tensors, settings, script):
        right(made, name, {key: 1.01 * tensor for key, tensor in tensors.items()}, settings, script)

    monkeypatch.setattr(plain, "_write", off)
    for call, plan in ((hf, SteeringPlan(random_direction(model), 1)), (cache, CachePlan(cache_vector(model)))):
        with pytest.raises(LensteerError, match="logits differ from lensteer's"):
            call(plan, tmp_path / "no", model=model)
    assert not list(tmp_path.iterdir())


def test_the_script_refuses_another_model(tiny_model, random_direction, tmp_path):
    from lensteer.export.standalone import steer

    model = tiny_model("llama")
    done = hf(SteeringPlan(random_direction(model), 1), tmp_path / "export", model=model)
    from lensteer import twins

    other = twins.plain_twin(tiny_model("llama", d_model=64))
    with (
        pytest.raises(ValueError, match="these vectors are of"),
        steer.steered(other, file=done.path / "steering_vector.safetensors"),
    ):
        pass
