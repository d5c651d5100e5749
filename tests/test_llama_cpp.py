"""Exported control vectors in real llama.cpp: its steered logits against the hooked model's, and the map of layers.

Adjacent layers' vectors point nearly the same way, so a file that is one layer off steers worse without an error. Only
a comparison of logits, layer by layer, can tell.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import lensteer as ls
from exports_table import record
from gguf_models import write_model
from lensteer import models
from lensteer.steering import Plan
from llama_runs import Llama, control_vector_rows

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: nothing is compared with llama.cpp")
pytest.importorskip("gguf")

TOLERANCE = 1e-3  # largest difference of logits, F32 weights and F32 cache
SENTENCES = (
    "The derivative of x squared is two x. Wait, maybe I should check that again, because I am not sure.",
    "First, let me think about the problem. For example, take three and add four to it.",
)


def hooked(model, ids: list[int], plan: Plan | None = None) -> np.ndarray:
    """The bridge's logits at every position, with a plan on."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        if plan is None:
            return model(tokens)[0].float().numpy()
        with plan.on(model):
            return model(tokens)[0].float().numpy()


def largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def organism_in_llama(tmp_path_factory):
    llama = Llama(write_model(models.ORGANISM, tmp_path_factory.mktemp("organism") / "organism.gguf"))
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def prompt_ids(organism):
    task = ls.load_tasks(split="test", n=1)[0]
    return models.encode(organism, models.chat_text(organism, task.prompt))


@pytest.mark.medium
def test_steered_logits_of_the_organism_and_its_map_of_layers(
    organism, organism_in_llama, prompt_ids, random_direction, tmp_path
):
    """A file of each layer gives the logits of the model hooked at that layer, and of no other."""
    direction = random_direction(organism, length=3.0)
    same = ls.Direction(
        "same", direction.raw[:1].expand_as(direction.raw).clone(), direction.mean_norm, direction.layers
    )
    base = hooked(organism, prompt_ids)
    unsteered = largest(organism_in_llama.logits(prompt_ids), base)
    assert unsteered < TOLERANCE
    # one vector for all layers: what differs is only where it is added
    plans = {layer: ls.SteeringPlan(same, layer, coefficient=2.0) for layer in range(models.n_layers(organism))}
    wanted = {layer: hooked(organism, prompt_ids, plan) for layer, plan in plans.items()}
    worst = 0.0
    for layer in range(1, models.n_layers(organism)):
        rows = control_vector_rows(ls.export.gguf(plans[layer], tmp_path / f"{layer}.gguf", model=organism))
        found = organism_in_llama.logits(prompt_ids, rows)
        differences = {other: largest(found, logits) for other, logits in wanted.items()}
        assert differences.pop(layer) < TOLERANCE
        assert min(differences.values()) > 10 * TOLERANCE, (layer, differences)
        assert largest(found, base) > 10 * TOLERANCE
        worst = max(worst, largest(found, wanted[layer]))
    assert largest(organism_in_llama.logits(prompt_ids), base) < TOLERANCE  # cleared
    record("GGUF control vector, llama.cpp", "organism (Qwen2)", "F32", worst, "everywhere")


@pytest.mark.medium
def test_several_layers_and_vectors_at_once(organism, organism_in_llama, prompt_ids, random_direction, tmp_path):
    a, b = (random_direction(organism, seed=seed, length=2.0) for seed in (1, 2))
    plan = ls.SteeringPlan(a, 2) + ls.SteeringPlan(b, 2, -0.5) + ls.SteeringPlan(b, 7, 1.5)
    rows = control_vector_rows(ls.export.gguf(plan, tmp_path / "v.gguf"))
    assert rows.shape == (7, 128)
    assert largest(organism_in_llama.logits(prompt_ids, rows), hooked(organism, prompt_ids, plan)) < TOLERANCE


@pytest.mark.medium
def test_a_file_that_is_one_layer_off_is_caught(organism, organism_in_llama, prompt_ids, random_direction, tmp_path):
    """llama.cpp's own generator names what it measured at block l `direction.(l+1)`: that file steers another layer."""
    plan = ls.SteeringPlan(random_direction(organism), 3)
    rows = control_vector_rows(ls.export.gguf(plan, tmp_path / "v.gguf"))
    late = np.concatenate([np.zeros_like(rows[:1]), rows])
    assert largest(organism_in_llama.logits(prompt_ids, rows), hooked(organism, prompt_ids, plan)) < TOLERANCE
    assert largest(organism_in_llama.logits(prompt_ids, late), hooked(organism, prompt_ids, plan)) > 10 * TOLERANCE


@pytest.mark.medium
def test_llama_cpp_refuses_a_vector_of_another_width(organism_in_llama):
    with pytest.raises(ValueError, match="llama_set_adapter_cvec"):
        organism_in_llama.steer(np.ones((7, 64), np.float32))
    organism_in_llama.steer(None)


def check_real(model, path: Path, tmp_path: Path, random_direction, name: str, dtype: str) -> float:
    """Compare steered logits at three layers; returns their largest difference, and records it.

    The vector is as long as the residual stream is on average. Then the effect (steered less unsteered logits) has a
    cosine of more than .99 with the hooked model's on each text, also with quantized weights, whose rounding changes
    logits by .2 to .3 (root mean square) in any case.
    """
    random = random_direction(model).raw[0]
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([models.encode(model, SENTENCES[0])]))
    worst, least, llama = 0.0, 1.0, Llama(path)
    try:
        for layer in (1, 15, 29):
            length = cache[models.resid_hook(layer)][0, 1:].norm(dim=-1).mean()
            raw = (length * random / random.norm()).expand(models.n_layers(model), -1).clone()
            same = ls.Direction("same", raw, torch.ones(len(raw)), tuple(range(len(raw))))
            plan = ls.SteeringPlan(same, layer)
            rows = control_vector_rows(ls.export.gguf(plan, tmp_path / f"{layer}.gguf", model=model))
            for text in SENTENCES:
                ids = models.encode(model, text)
                assert llama.ids(text) == ids
                base, steered = hooked(model, ids), hooked(model, ids, plan)
                assert largest(base, steered) > 100 * TOLERANCE  # else the comparison says nothing
                own_base, own = llama.logits(ids), llama.logits(ids, rows)
                worst = max(worst, largest(own, steered))
                least = min(least, cosine(own - own_base, steered - base))
                for other in {layer - 1, layer + 1} & set(range(models.n_layers(model))):
                    assert largest(own, hooked(model, ids, ls.SteeringPlan(same, other))) > 10 * TOLERANCE
    finally:
        llama.close()
    assert least > 0.99
    record("GGUF control vector, llama.cpp", name, dtype, worst, "everywhere", least)
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_mini_r1(real_model, random_direction, tmp_path, dtype):
    path = write_model(Path(os.environ["LENSTEER_REAL"]) / "mini-r1", tmp_path / "mini-r1.gguf", dtype=dtype)
    worst = check_real(real_model("mini-r1"), path, tmp_path, random_direction, "mini-R1 (Llama)", dtype)
    if dtype == "F32":
        assert worst < TOLERANCE


@pytest.mark.slow
def test_smollm2_in_its_own_quantized_file(real_model, random_direction, tmp_path):
    path = os.environ.get("LENSTEER_GGUF")
    if not path:
        pytest.skip("LENSTEER_GGUF is not set: it names the GGUF file that smollm2 was made from")
    check_real(real_model("smollm2"), Path(path), tmp_path, random_direction, "SmolLM2-135M (Llama)", "Q4_1")
