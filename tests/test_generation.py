"""Rows of a batch are chains of their own, whatever runs beside them, however it is run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lensteer as ls
from lensteer import models, twins
from lensteer.generation import generate
from lensteer.positions import at, everywhere, generated, onsets, prompt, sentence_starts, thinking
from lensteer.steering import SteeringPlan, active_plans, foreign_hooks

FAMILIES = ("qwen2", "llama", "qwen3", "gemma3")
TEXTS = ["Take three. Next", "So", "The answer. I am not sure. For example, take", "Wait,<think>", "First. Let"]
MARGIN = 1e-4  # of logits; of the shares that sampling draws from, a tenth of it


def prompts_of(model):
    return [models.encode(model, text) for text in TEXTS]


def plans_of(model, random_direction):
    """A plan of its own for each row: none, other layers and scopes, other orders on one layer."""
    one, two = random_direction(model, 1), random_direction(model, 2)
    add, remove = SteeringPlan(one, 1, 1.0), SteeringPlan(one, 1, 1.0, operator="project_out")
    return [
        add + remove,
        None,
        remove + add,
        SteeringPlan(two, 0, -1.0, thinking | sentence_starts) + SteeringPlan(two, 3, 0.5, ~prompt),
        SteeringPlan(two, 2, 1.5, onsets & generated) + SteeringPlan(one, 2, 1.5, at([1])),
    ]


def slow(model, ids, n, *, temperature=0.0, seed=None, plan=None):
    """One row, no batch, no cache, no padding: a whole forward of the bridge for every token.

    Also returns how clear each choice was: the top-two margin of the logits, or how far the drawn number is from
    the edges of the chosen token's share.
    """
    length, out, margins = len(ids), list(ids), []
    uniforms = None
    if seed is not None:
        uniforms = torch.rand(n, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float64)
    ends = models.end_ids(model)
    for step in range(n):
        row = torch.tensor([out])
        with torch.no_grad():
            if plan is None:
                logits = model(row, attention_mask=torch.ones_like(row))[0, -1]
            else:
                with plan.on(model, prompt_length=length):
                    logits = model(row, attention_mask=torch.ones_like(row))[0, -1]
        if temperature:
            shares = (logits.double() / temperature).softmax(-1).cumsum(-1)
            u = float(uniforms[step])
            new = int((shares <= u).sum())
            margins.append(10 * float((shares - u).abs().min()))
        else:
            top = logits.topk(2)
            new = int(top.indices[0])
            margins.append(float(top.values[0] - top.values[1]))
        out.append(new)
        if new in ends:
            break
    return out[length:], margins


def agree(ids, reference, margins):
    """Equal up to the first step that rounding may decide; returns whether there is such a step."""
    close = next((i for i, margin in enumerate(margins) if margin < MARGIN), None)
    assert list(ids)[:close] == list(reference)[:close]
    return close is not None


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_what_the_slow_loop_makes_of_it_alone(family, temperature, tiny_model, random_direction):
    model = tiny_model(family)
    prompts, plans = prompts_of(model), plans_of(model, random_direction)
    seeds = [11, 12, 13, 2**64 - 1, 15]
    together = generate(model, prompts, max_new_tokens=12, temperature=temperature, seeds=seeds, plans=plans)
    unclear = 0
    for row, result in enumerate(together):
        seed = seeds[row] if temperature else None
        expected = slow(model, prompts[row], 12, temperature=temperature, seed=seed, plan=plans[row])
        unclear += agree(result.ids, *expected)
        (single,) = generate(
            model,
            prompts[row : row + 1],
            max_new_tokens=12,
            temperature=temperature,
            seeds=seeds[row : row + 1],
            plans=plans[row : row + 1],
        )
        agree(single.ids, *expected)
    assert unclear <= 1  # steps that rounding may decide are rare, or this test would show nothing
    plain = generate(model, prompts, max_new_tokens=12, temperature=temperature, seeds=seeds)
    assert [p.ids == t.ids for p, t in zip(plain, together, strict=True)].count(False) >= 3
    assert plain[1].ids == together[1].ids


@pytest.mark.parametrize("nested", [False, True])
def test_twin_and_bridge_write_the_same_under_plans_that_are_on(nested, tiny_model, random_direction):
    model = tiny_model("qwen3")
    prompts, direction = prompts_of(model), random_direction(model)
    add = SteeringPlan(direction, 1, 2.0)
    remove = SteeringPlan(direction, 1, 1.0, operator="project_out")  # nested, so the order of the two matters
    own = [None, None, SteeringPlan(random_direction(model, 3), 1, 1.0, generated), None, remove]
    options = dict(max_new_tokens=16, temperature=1.0, seeds=list(range(5)), plans=own)
    results = []
    for through_bridge in (False, True):
        fired = []
        with (remove if nested else add + remove).on(model):
            if nested:
                with add.on(model):
                    results.append(_generate(model, prompts, through_bridge, fired, options))
            else:
                results.append(_generate(model, prompts, through_bridge, fired, options))
        assert bool(fired) == through_bridge
    assert results[0] == results[1]
    assert twins.plain_twin(model) is not None


def _generate(model, prompts, through_bridge, fired, options):
    """With a foreign hook that changes nothing, generation has to go through the bridge."""
    if not through_bridge:
        return generate(model, prompts, **options)
    with model.hooks(fwd_hooks=[(models.resid_hook(0), lambda resid, hook: fired.append(resid.shape))]):
        assert foreign_hooks(model)
        return generate(model, prompts, **options)


def test_a_foreign_hook_changes_what_is_written(tiny_model):
    model = tiny_model()
    prompts = prompts_of(model)
    plain = generate(model, prompts, max_new_tokens=8)
    with model.hooks(fwd_hooks=[(models.resid_hook(2), lambda resid, hook: -resid)]):
        turned = generate(model, prompts, max_new_tokens=8)
    assert [t.ids for t in turned] != [p.ids for p in plain]
    assert generate(model, prompts, max_new_tokens=8) == plain


@pytest.mark.parametrize("through_bridge", [False, True])
def test_finished_rows_leave_and_the_others_do_not_notice(through_bridge, tiny_model, random_direction, monkeypatch):
    model = tiny_model()
    prompts, plans = prompts_of(model) * 3, plans_of(model, random_direction) * 3
    options = dict(max_new_tokens=24, temperature=2.0, seeds=list(range(15)), plans=plans)
    monkeypatch.setattr(model.original_model.generation_config, "eos_token_id", list(range(100, 116)))
    widths = []
    results = _generate(model, prompts, through_bridge, [], options | {"advance": widths.append})
    lengths = [len(r.ids) for r in results]
    ends = models.end_ids(model)
    assert len(set(lengths)) > 3
    assert widths[0] == 15
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 15
    assert len(widths) == max(lengths)
    for row, result in enumerate(results):
        (single,) = generate(model, [prompts[row]], max_new_tokens=24, temperature=2.0, seeds=[row], plans=[plans[row]])
        assert single == result
        assert result.finished == (result.ids[-1] in ends)
        assert result.finished or len(result.ids) == 24
        assert not ends & set(result.ids[:-1])


def test_a_longer_limit_only_continues(tiny_model):
    model = tiny_model("llama")
    options = dict(temperature=1.0, seeds=[3, 4])
    short = generate(model, prompts_of(model)[:2], max_new_tokens=5, **options)
    long = generate(model, prompts_of(model)[:2], max_new_tokens=100, **options)  # beyond the cache's spare room
    for a, b in zip(short, long, strict=True):
        assert b.ids[: len(a.ids)] == a.ids


def test_sampling_follows_the_models_distribution(tiny_model):
    model = tiny_model()
    ids = models.encode(model, "Take three.")
    n = 4000
    with torch.no_grad():
        wanted = (model(torch.tensor([ids]))[0, -1] / 0.2).softmax(-1).double()
    results = generate(model, [ids] * n, max_new_tokens=1, temperature=0.2, seeds=list(range(n)))
    counts = torch.bincount(torch.tensor([r.ids[0] for r in results]), minlength=len(wanted)).double()
    common = wanted > 0.01
    assert int(common.sum()) > 5
    z = (counts - n * wanted)[common] / (n * wanted * (1 - wanted))[common].sqrt()
    assert float(z.abs().max()) < 4
    greedy = generate(model, [ids] * 2, max_new_tokens=6)
    assert greedy[0] == greedy[1]
    assert greedy == generate(model, [ids] * 2, max_new_tokens=6, temperature=1e-4, seeds=[1, 2])


def test_a_huge_coefficient_is_an_error_or_finite_never_a_silent_nan(tiny_model, random_direction):
    model = tiny_model()
    prompts = prompts_of(model)
    for coefficient in (1e6, 1e30, -1e38):
        plan = SteeringPlan(random_direction(model), 2, coefficient)
        try:
            with plan.on(model):
                results = generate(model, prompts, max_new_tokens=3)
        except ls.LensteerError as error:
            assert "coefficient" in str(error)  # noqa: PT017  # either outcome is right
        else:
            assert all(r.ids for r in results)
        assert not active_plans(model)
    overflows = SteeringPlan(random_direction(model, length=1e3), 2, 1e38)
    with pytest.raises(ls.LensteerError, match=r"row 1 .*step 0: lower the coefficient"):
        generate(model, prompts[:2], max_new_tokens=3, plans=[None, overflows])


@pytest.mark.parametrize("through_bridge", [False, True])
def test_no_hook_is_left_when_generation_is_interrupted(through_bridge, tiny_model, random_direction):
    model = tiny_model()
    plan = SteeringPlan(random_direction(model), 1, 1.0, everywhere)

    def stop(_n):
        raise KeyboardInterrupt

    options = dict(max_new_tokens=4, plans=[plan] * 5, advance=stop)
    with pytest.raises(KeyboardInterrupt), plan.on(model):
        _generate(model, prompts_of(model), through_bridge, [], options)
    tall = dataclasses.replace(plan.direction, layers=(0, 1, 2, 99))
    with pytest.raises(ls.LensteerError, match="no layer 99"):
        generate(model, prompts_of(model)[:1], max_new_tokens=4, plans=[plan + SteeringPlan(tall, 99)])
    assert not foreign_hooks(model)
    assert not active_plans(model)
    hooks = [h for m in twins.plain_twin(model).modules() for h in m._forward_hooks.values()]
    assert not [h for h in hooks if h.__module__.startswith("lensteer")]  # Hugging Face has some of its own


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": [[5], []]}, "empty prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.5}, "-0.5"),
        ({"temperature": float("nan")}, "nan"),
        ({"temperature": 1.0, "seeds": None}, "needs seeds"),
        ({"temperature": 1.0, "seeds": [1]}, "1 seeds for 2 prompts"),
        ({"plans": [None] * 3}, "3 plans for 2 prompts"),
    ],
)
def test_impossible_requests_are_refused(change, words, tiny_model):
    options = {"prompts": [[5], [6, 7]], "max_new_tokens": 2, "temperature": 0.0} | change
    with pytest.raises(ls.LensteerError, match=words):
        generate(tiny_model(), options.pop("prompts"), **options)
    assert generate(tiny_model(), [], max_new_tokens=1) == []
