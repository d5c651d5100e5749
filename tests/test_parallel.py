"""Batches at once: the same results in the same order as one after another, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from lensteer import twins
from lensteer.errors import LensteerError
from lensteer.generation import generate, run_batches
from lensteer.generation.parallel import LARGE, n_at_once
from lensteer.positions import generated
from lensteer.steering import SteeringPlan


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["qwen2", "llama"])
def model(tiny_model, request):
    return tiny_model(request.param)


def batches_of(random_direction, model, n=7):
    """Rows of different prompts, plans and seeds; no two batches alike."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for number in range(n):
        prompts = [torch.randint(3, 200, (3 + number + row,), generator=rng).tolist() for row in range(3)]
        plan = SteeringPlan(random_direction(model, number), number % 4, 1.0, generated)
        found.append((prompts, [None, plan, plan], [number, number + 100, number + 200]))
    return found


def run(model, batch):
    prompts, plans, seeds = batch
    return generate(model, prompts, max_new_tokens=6, temperature=1.0, plans=plans, seeds=seeds)


def hooks(model):
    return sum(len(module._forward_hooks) for module in twins.plain_twin(model).modules())


@pytest.mark.medium
def test_batches_at_once_give_what_they_give_one_after_another(model, random_direction, two_threads):
    batches = batches_of(random_direction, model)
    assert n_at_once(model, least=0) == 2
    torch.set_num_threads(1)
    alone = [(batch, run(model, batch)) for batch in batches]
    before = hooks(model)  # Hugging Face has some of its own
    torch.set_num_threads(2)
    for _ in range(3):
        assert list(run_batches(model, run, batches, least=0)) == alone
    assert torch.get_num_threads() == 2
    assert hooks(model) == before
    assert list(run_batches(model, run, [], least=0)) == []


def test_a_batch_that_fails_stops_the_others_and_restores_the_threads(model, random_direction, two_threads):
    batches, seen = batches_of(random_direction, model), []

    def failing(model, batch):
        seen.append(batch)
        if batch is batches[2]:
            raise LensteerError("batch 2 is broken")
        return run(model, batch)

    found = run_batches(model, failing, batches, least=0)
    assert [next(found)[0], next(found)[0]] == batches[:2]
    with pytest.raises(LensteerError, match="batch 2"):
        next(found)
    assert len(seen) < len(batches)
    assert torch.get_num_threads() == 2


def test_what_cannot_run_beside_another_runs_alone(model, random_direction, two_threads):
    assert sum(p.numel() for p in model.original_model.parameters()) < LARGE
    assert n_at_once(model) == 1  # too small for it to pay
    with SteeringPlan(random_direction(model), 1).on(model):
        assert n_at_once(model, least=0) == 1
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: x)]):
        assert n_at_once(model, least=0) == 1
    torch.set_num_threads(1)
    assert n_at_once(model, least=0) == 1
