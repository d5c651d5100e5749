"""The measured KL against whole forwards and against the chain rule; the search on functions; budgets that are met."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from lensteer import models, twins
from lensteer.attribution import LayerScores
from lensteer.calibration import RolloutKL, calibrate, calibrate_many, rollout_kl, starting_coefficient
from lensteer.calibration.budgets import START, Search
from lensteer.errors import LensteerError
from lensteer.forward import forced_logits
from lensteer.generation import generate
from lensteer.generation.jobs import chain_seed
from lensteer.positions import everywhere, generated, onsets, thinking
from lensteer.steering import SteeringPlan
from lensteer.steering.plans import UNITS
from lensteer.tasks import Task, load_tasks

FAMILIES = ("qwen2", "llama", "gemma3")
TEXTS = ["Take three. Next", "So", "The answer. I am not sure. For example, take", "Wait,<think>", "First. Let"]


def prompts_of(model, n=5):
    return [models.encode(model, f"{TEXTS[i % 5]}{' so' * (i // 5 % 8)}") for i in range(n)]


def slow_logits(model, prompt, response, plan=None):
    """Logits that predict each token of a response: the row alone, a whole forward of the bridge for every token."""
    out = []
    for end in range(len(response)):
        ids = torch.tensor([[*prompt, *response[:end]]])
        with torch.no_grad():
            if plan is None:
                out.append(model(ids, attention_mask=torch.ones_like(ids))[0, -1])
            else:
                with plan.on(model, prompt_length=len(prompt)):
                    out.append(model(ids, attention_mask=torch.ones_like(ids))[0, -1])
    return torch.stack(out).double()


def slow_kl(p, q):
    """Row by row, token by token of the vocabulary."""
    return [
        sum(float(a.exp() * (a - b)) for a, b in zip(row_p, row_q, strict=True))
        for row_p, row_q in zip(p.log_softmax(-1), q.log_softmax(-1), strict=True)
    ]


# --- forced logits --------------------------------------------------------------------------------


@pytest.mark.parametrize("through_bridge", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_forced_logits_are_those_of_each_row_alone(family, through_bridge, tiny_model, random_direction):
    model = tiny_model(family)
    prompts = prompts_of(model)
    responses = [[9, 30, 41], [100], [7, 8, 9, 10, 11, 12, 13, 14, 15], [44, 45], [60, 61, 62, 63]]
    one, two = random_direction(model, 1), random_direction(model, 2)
    plans = [
        SteeringPlan(one, 1, 1.0) + SteeringPlan(two, 3, -0.5, generated),
        None,
        SteeringPlan(two, 2, 1.5, onsets),
        SteeringPlan(one, 0, -1.0, thinking),
        SteeringPlan(one, 1, 1.0, operator="project_out"),
    ]
    hooks = [("blocks.0.hook_resid_post", lambda resid, hook: resid)] if through_bridge else []
    with model.hooks(fwd_hooks=hooks):
        found = forced_logits(model, prompts, responses, plans=plans)
    for prompt, response, plan, logits in zip(prompts, responses, plans, found, strict=True):
        torch.testing.assert_close(logits.double(), slow_logits(model, prompt, response, plan), atol=2e-4, rtol=1e-4)


def test_a_plan_that_is_on_holds_for_forced_logits_too(tiny_model, random_direction):
    model = tiny_model("qwen2")
    prompts, responses = prompts_of(model)[:2], [[9, 30, 41], [100, 7]]
    outer = SteeringPlan(random_direction(model, 1), 1, 1.0)
    inner = SteeringPlan(random_direction(model, 2), 1, 1.0, operator="project_out")
    with outer.on(model):
        found = forced_logits(model, prompts, responses, plans=[inner, None])
    for i, plan in enumerate([outer + inner, outer]):
        expected = slow_logits(model, prompts[i], responses[i], plan)
        torch.testing.assert_close(found[i].double(), expected, atol=2e-4, rtol=1e-4)
        assert (found[i].double() - slow_logits(model, prompts[i], responses[i])).abs().max() > 0.1


def test_forced_logits_refuse_what_does_not_match(tiny_model):
    model = tiny_model("qwen2")
    with pytest.raises(LensteerError, match="1 responses for 2 prompts"):
        forced_logits(model, [[5], [6]], [[7]])
    with pytest.raises(LensteerError, match="2 plans for 1 prompts"):
        forced_logits(model, [[5]], [[7]], plans=[None, None])
    for prompt, response in (([], [7]), ([5], [])):
        with pytest.raises(LensteerError, match="an empty prompt or response"):
            forced_logits(model, [prompt], [response])
    assert forced_logits(model, [], []) == []


# --- the KL of rollouts ---------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_kl_is_that_of_whole_forwards(family, tiny_model, random_direction):
    model = tiny_model(family)
    prompts = prompts_of(model)
    plans = [
        SteeringPlan(random_direction(model, 1), 1, 0.4, everywhere),
        SteeringPlan(random_direction(model, 2), 2, -0.8, onsets),
    ]
    # Little memory, so that every row is a pass of its own, and its KL is made in pieces.
    small = rollout_kl(model, prompts, plans, max_new_tokens=10, seed=3, memory=1)
    large = rollout_kl(model, prompts, plans, max_new_tokens=10, seed=3)
    for plan, kl, other in zip(plans, small, large, strict=True):
        seeds = [chain_seed(3, str(i), 0) for i in range(len(prompts))]
        rollouts = generate(
            model, prompts, max_new_tokens=10, temperature=1.0, seeds=seeds, plans=[plan] * len(prompts)
        )
        assert len({len(r.ids) for r in rollouts} | {0}) > 1
        for row, rollout in enumerate(rollouts):
            p, q = (slow_logits(model, prompts[row], rollout.ids, how) for how in (plan, None))
            for found in (kl.tokens[row], other.tokens[row]):
                assert found.tolist() == pytest.approx(slow_kl(p, q), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("operator", ["add", "project_out"])
def test_nothing_done_is_exactly_nothing(operator, tiny_model, random_direction):
    model = tiny_model("qwen2")
    direction = random_direction(model)
    nothing, something = (SteeringPlan(direction, 1, c, everywhere, operator) for c in (0.0, 0.5))
    zero, more = rollout_kl(model, prompts_of(model), [nothing, something], max_new_tokens=8)
    assert torch.cat(zero.tokens).abs().max() == 0
    assert zero.statistic(0.95) == zero.statistic(None) == 0
    assert torch.cat(more.tokens).max() > 0
    with something.on(model):  # what is on belongs to both sides
        (zero,) = rollout_kl(model, prompts_of(model), [nothing], max_new_tokens=8)
    assert torch.cat(zero.tokens).abs().max() == 0


def test_token_kls_add_up_to_that_of_whole_chains(tiny_model, random_direction):
    """E Σ KL_t = E log p_steered(x) / p_unsteered(x) for x from the steered model: the two differ by noise only."""
    model = tiny_model("llama")
    prompts, plan = prompts_of(model, 150), SteeringPlan(random_direction(model), 2, 4.0)
    plans = [plan] * len(prompts)
    (kl,) = rollout_kl(model, prompts, [plan], max_new_tokens=4, seed=1)
    seeds = [chain_seed(1, str(i), 0) for i in range(len(prompts))]
    rollouts = generate(model, prompts, max_new_tokens=4, temperature=1.0, seeds=seeds, plans=plans)
    chains = [rollout.ids for rollout in rollouts]
    sums = np.array([float(row.sum()) for row in kl.tokens])
    ratios = []
    for chain, *sides in zip(
        chains, forced_logits(model, prompts, chains, plans=plans), forced_logits(model, prompts, chains), strict=True
    ):
        p, q = (side.log_softmax(-1)[torch.arange(len(chain)), torch.tensor(chain)] for side in sides)
        ratios.append(float((p - q).sum()))
    error = np.std(sums - ratios) / len(sums) ** 0.5
    assert abs(np.mean(sums - ratios)) < 3.3 * error  # the seeds are fixed: a right one misses in 1 of 1000
    assert np.mean(sums) > 8 * error


def test_more_is_more(tiny_model, random_direction):
    model = tiny_model("qwen2")
    for sign in (1, -1):
        plans = [SteeringPlan(random_direction(model), 1, sign * c) for c in (0.01, 0.03, 0.1, 0.3, 0.9)]
        means = [kl.statistic(None) for kl in rollout_kl(model, prompts_of(model, 20), plans, max_new_tokens=8)]
        assert means == sorted(means)
        assert means[1] / means[0] == pytest.approx(9, rel=0.3)  # quadratic where it is small


def test_statistics_and_intervals_by_hand():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(n, generator=generator, dtype=torch.float64).square() for n in (3, 30, 11, 7, 20, 1)]
    kl, everything = RolloutKL(tuple(rows)), torch.cat(rows).numpy()
    drawn = np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), size=500)
    for q in (0.05, 0.5, 0.95, 0.999):
        assert kl.statistic(q) == np.quantile(everything, q, method="inverted_cdf")
        again = [
            np.quantile(
                np.concatenate([np.tile(r, n) for r, n in zip(rows, times, strict=True)]), q, method="inverted_cdf"
            )
            for times in drawn
        ]
        ends = kl.estimate(q, n=500, seed=5)
        assert [ends.low, ends.high] == pytest.approx(np.quantile(again, [0.025, 0.975]), rel=1e-12)
    assert kl.statistic(None) == pytest.approx(everything.mean())
    mean = kl.estimate(None)
    assert mean.low < everything.mean() < mean.high
    assert all(math.isnan(RolloutKL((rows[0],)).estimate(q).low) for q in (None, 0.95))


# --- the search -----------------------------------------------------------------------------------


def run(search, f, limit=60):
    while (x := search.next()) is not None and len(search.steps) < limit:
        search.steps.append((x, f(x)))
    return search


@pytest.mark.parametrize("start", [1e-3, 0.3, 40.0])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_a_power_law_takes_few_steps(power, start):
    search = run(Search(0.1, 0.05, start, 100.0), lambda x: 0.02 * x**power)
    x, y = search.steps[search.best()]
    assert search.reached()
    assert y == pytest.approx(0.1, rel=0.05)
    assert x == pytest.approx(5 ** (1 / power), rel=0.06)
    assert len(search.steps) <= (3 if power == 2 and start == 0.3 else 9)


def test_a_function_that_levels_off_or_explodes():
    assert run(Search(0.5, 0.05, 0.3, 1e3), lambda x: x * x / (1 + x * x)).reached()
    assert len(run(Search(2.0, 0.05, 0.3, 1e3), lambda x: math.expm1(min(x, 500))).steps) <= 9


def test_what_is_out_of_reach_ends_at_the_ceiling():
    search = run(Search(0.5, 0.05, 0.3, 20.0), lambda x: 0.4 * x * x / (1 + x * x))
    assert not search.reached()
    assert search.steps[search.best()][0] == search.steps[-1][0] == 20
    assert len(search.steps) <= 20
    nothing = run(Search(0.5, 0.05, 0.3, 20.0), lambda x: 0.0)
    assert not nothing.reached()
    assert nothing.steps[nothing.best()] == (20.0, 0.0)
    assert Search(0.5, 0.05, 30.0, 20.0).next() == 20


def test_a_jump_across_the_target_ends_at_the_jump():
    search = run(Search(0.5, 0.05, 0.3, 1e3), lambda x: 0.1 if x < math.pi else 0.9)
    xs = sorted(x for x, _ in search.steps)
    low, high = max(x for x in xs if x < math.pi), min(x for x in xs if x > math.pi)
    assert high / low < 1.01
    assert not search.reached()
    assert len(search.steps) <= 20


def test_of_several_crossings_the_lowest_coefficient_is_found():
    def dips(x):  # over the target at 1 … 2, under it at 2 … 8, over it again
        return 0.2 * x if x < 2 else 0.05 if x < 8 else 1.0

    search = Search(0.2, 0.05, 1.8, 100.0)
    search.steps = [(4.0, dips(4.0)), (10.0, dips(10.0)), (1.8, dips(1.8))]
    run(search, dips)
    assert search.steps[search.best()][0] == pytest.approx(1.0, rel=0.06)


def test_noise_does_not_keep_a_search_from_ending():
    rng = np.random.default_rng(0)

    def noisy(noise):  # as rollouts are: another coefficient, another draw
        return lambda x: 0.1 * x * x * math.exp(0.3 * noise[int(x * 1e4) % 1000])

    for _ in range(50):
        search = run(Search(0.1, 0.05, 0.3, 100.0), noisy(rng.normal(size=1000)))
        assert len(search.steps) < 40
        assert 0.5 < search.steps[search.best()][0] < 2


# --- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_the_budget_is_what_a_fresh_measurement_finds(sign, tiny_model, random_direction):
    model = tiny_model("qwen2")
    prompts = prompts_of(model, 20)
    options: dict[str, Any] = dict(max_new_tokens=10, seed=7)
    for quantile, budget in ((0.95, 0.2), (None, 0.02)):
        found = calibrate(
            model,
            prompts,
            random_direction(model),
            1,
            budget=budget,
            sign=sign,
            scope=everywhere,
            quantile=quantile,
            **options,
        )
        assert found.reached
        assert math.copysign(1, found.coefficient) == sign
        assert found.plan.scope == everywhere
        (again,) = rollout_kl(model, prompts, [found.plan], **options)
        assert again.statistic(quantile) == pytest.approx(budget, rel=0.1)
        assert again.statistic(quantile) == pytest.approx(found.kl, rel=1e-6)
        assert found.estimate.low <= found.kl <= found.estimate.high
        assert f"{found.estimate:.6g}" == f"{again.estimate(quantile, seed=7):.6g}"
        assert found.step.n_tokens == sum(map(len, again.tokens))
        assert (found.step.p50, found.step.p95) == pytest.approx((again.statistic(0.5), again.statistic(0.95)))
        assert found.path[0].coefficient == sign * START


@pytest.mark.parametrize("unit", UNITS)
def test_a_budget_is_spent_in_any_unit(unit, tiny_model, random_direction):
    model = tiny_model("qwen2")
    direction = dataclasses.replace(random_direction(model), mean_norm=torch.full((4,), 0.5))  # raw vectors are 3 long
    options: dict[str, Any] = dict(budget=0.2, scope=everywhere, max_new_tokens=8, seed=7)
    found = calibrate(model, prompts_of(model, 12), direction, 1, unit=unit, **options)
    again = calibrate(model, prompts_of(model, 12), direction, 1, **options)
    length = {"difference": 3.0, "mean_norm": 0.5, "unit": 1.0}[unit]
    assert found.plan.unit == unit
    assert found.reached
    assert found.path[0].coefficient == pytest.approx(START * 3.0 / length, rel=1e-5)
    # The search takes the same steps, but for rounding.
    assert found.coefficient * length == pytest.approx(again.coefficient * 3.0, rel=0.05)
    assert set(found.to_dataframe()["coefficient_unit"]) == {unit}
    with pytest.raises(LensteerError, match="no unit 'norm' of a coefficient"):
        calibrate(model, prompts_of(model), direction, 1, unit="norm", **options)


@pytest.mark.medium
def test_together_is_as_alone(tiny_model, random_direction):
    model = tiny_model("llama")
    prompts = prompts_of(model, 6)
    options: dict[str, Any] = dict(budget=0.1, max_new_tokens=8, seed=2)
    plans = [
        SteeringPlan(random_direction(model, 1), 0, 0.3, everywhere),
        SteeringPlan(random_direction(model, 2), 3, -2.0, onsets),
        SteeringPlan(random_direction(model, 1), 2, 0.5, generated, "project_out"),
    ]
    together = calibrate_many(model, prompts, plans, batch_size=7, **options)
    assert [len(found.path) for found in together] != [1, 1, 1]
    for plan, found in zip(plans, together, strict=True):
        (alone,) = calibrate_many(model, prompts, [plan], **options)
        assert [s.coefficient for s in alone.path] == pytest.approx([s.coefficient for s in found.path], rel=1e-3)
        assert alone.kl == pytest.approx(found.kl, rel=1e-3)
        assert alone.reached == found.reached
        assert dataclasses.replace(found.plan, coefficient=plan.coefficient) == plan


def test_what_was_measured_is_not_lost(tiny_model, random_direction):
    model = tiny_model("qwen2")
    options: dict[str, Any] = dict(max_new_tokens=6, scope=everywhere)
    far = calibrate(model, prompts_of(model), random_direction(model), 1, budget=1e6, max_coefficient=5.0, **options)
    assert not far.reached
    assert far.path[-1].coefficient == 5.0
    assert len(far.path) < 8
    assert far.kl == max(step.kl for step in far.path)
    short = calibrate(model, prompts_of(model), random_direction(model), 1, budget=1e-4, max_rounds=1, **options)
    assert not short.reached
    assert short.coefficient == short.path[0].coefficient == START
    frame = far.to_dataframe()
    assert list(frame.coefficient) == [step.coefficient for step in far.path]
    assert frame.chosen.sum() == 1
    assert frame[frame.chosen].kl.item() == far.kl
    assert set(frame.columns) >= {"direction", "layer", "budget", "mean", "p50", "p95", "n_tokens", "reached"}


def test_forwards_are_counted(tiny_model, random_direction):
    model = tiny_model("qwen2")
    twin, calls = twins.plain_twin(model), []
    handle = twin.register_forward_pre_hook(lambda module, args, kwargs: calls.append(1), with_kwargs=True)
    try:
        found = calibrate(model, prompts_of(model), random_direction(model), 1, budget=0.1, max_new_tokens=6)
    finally:
        handle.remove()
    assert found.cost["forwards"] == len(calls)
    assert found.cost["rounds"] == len(found.path)
    assert found.cost["generated"] >= sum(step.n_tokens for step in found.path)
    assert found.n_prompts == 5


@pytest.mark.medium
def test_tasks_on_the_organism(organism, random_direction):
    tasks = load_tasks(split="dev", n=4)
    plan = SteeringPlan(random_direction(organism, length=40.0), 3, 0.5, onsets)
    (found,) = calibrate_many(organism, tasks, [plan], budget=0.05, max_new_tokens=40, max_rounds=3)
    assert 1 <= len(found.path) <= 3
    assert abs(math.log(found.kl / 0.05)) == min(abs(math.log(step.kl / 0.05)) for step in found.path if step.kl > 0)
    assert found.step.mean > 0


# --- where to start -------------------------------------------------------------------------------


def scores_of(**changes):
    mean = torch.tensor([[0.08, 0.5, 0.0, math.nan]], dtype=torch.float64)
    values = dict(
        labels=("backtracking",),
        layers=(0, 1, 2, 5),
        n_layers=6,
        mean=mean,
        low=mean,
        high=mean,
        n_spans=(9,),
        n_traces=3,
        method="fisher",
        coefficient=2.0,
        coefficient_unit="difference",
        spans="own",
    )
    return LayerScores(**{**values, **changes})


def test_the_start_is_where_the_second_order_meets_the_budget():
    # K = ½ c² Var at c = 2, so Var = 0.04 and α₀ = √(2 · 0.02 / 0.04) = 1.
    assert starting_coefficient(scores_of(), "backtracking", 0, 0.02) == pytest.approx(1.0)
    for changes, label, layer, message in [
        (
            dict(method="published"),
            "backtracking",
            0,
            "method 'published', unit 'difference' and window 'onset' imply no",
        ),
        (dict(coefficient_unit="unit"), "backtracking", 0, "unit 'unit' and window 'onset' imply no coefficient"),
        (dict(coefficient_unit="mean_norm"), "backtracking", 0, "unit 'mean_norm' and window 'onset' imply no"),
        (dict(window="span"), "backtracking", 0, "window 'span' imply no coefficient"),
        ({}, "backtracking", 3, r"no score at layer 3: these have layers \[0, 1, 2, 5\]"),
        ({}, "deduction", 0, "unknown behavior 'deduction'"),
        ({}, "backtracking", 2, "layer 2 is 0.0: give a number"),
        ({}, "backtracking", 5, "layer 5 is nan: give a number"),
    ]:
        with pytest.raises(LensteerError, match=message):
            starting_coefficient(scores_of(**changes), label, layer, 0.02)
    with pytest.raises(LensteerError, match="budget 0"):
        starting_coefficient(scores_of(), "backtracking", 0, 0.0)
    for unit in UNITS:
        own = scores_of(coefficient_unit=unit)
        assert starting_coefficient(own, "backtracking", 0, 0.02, unit) == pytest.approx(1.0)
    with pytest.raises(LensteerError, match=r"unit 'difference' .* 'mean_norm' and 'onset'"):
        starting_coefficient(scores_of(), "backtracking", 0, 0.02, "mean_norm")
    with pytest.raises(LensteerError, match="no unit 'norm' of a coefficient"):
        starting_coefficient(scores_of(), "backtracking", 0, 0.02, "norm")


def test_a_search_may_start_from_scores(tiny_model, random_direction):
    model = tiny_model("qwen2")
    direction = dataclasses.replace(random_direction(model), label="backtracking")
    options: dict[str, Any] = dict(budget=0.02, max_new_tokens=5, max_rounds=1)
    found = calibrate(model, prompts_of(model), direction, 0, sign=-1, start=scores_of(), **options)
    assert found.path[0].coefficient == pytest.approx(-1.0)
    assert calibrate(model, prompts_of(model), direction, 0, start=0.7, **options).path[0].coefficient == 0.7
    with pytest.raises(LensteerError, match="not of 'project_out': give a number"):
        calibrate(model, prompts_of(model), direction, 0, start=scores_of(), operator="project_out", **options)


def test_what_cannot_be_calibrated_is_refused_by_name(tiny_model, random_direction):
    model, task = tiny_model("qwen2"), Task("a", "b", "dev", "?")
    direction = random_direction(model)
    prompts = prompts_of(model)

    def attempt(given=prompts, layer=1, **options):
        calibrate(model, given, direction, layer, **{"budget": 0.1, "max_new_tokens": 2, **options})

    refused: list[tuple[dict[str, Any], str]] = [
        (dict(budget=0.0), "budget 0.0: give a positive, finite KL"),
        (dict(budget=-1.0), "budget -1.0"),
        (dict(budget=math.inf), "budget inf"),
        (dict(budget=math.nan), "budget nan"),
        (dict(quantile=1.0), "quantile=1.0: give a number between 0 and 1"),
        (dict(tolerance=0.0), "tolerance=0.0: give a number between 0 and 1"),
        (dict(max_rounds=0), "max_rounds=0, max_coefficient=32.0: give positive"),
        (dict(max_coefficient=math.inf), "max_coefficient=inf"),
        (dict(sign=0), "sign=0: give 1 to add"),
        (dict(start=-0.5), "start=-0.5: give a positive, finite coefficient"),
        (dict(start=math.inf), "start=inf"),
        (dict(layer=4), "has no vector at layer 4"),
        (dict(given=[]), "no prompts to roll out"),
        (dict(given=[[5], []]), "an empty prompt"),
        (dict(given=[task, task]), r"tasks share an id: \['a'\]"),
        (dict(max_new_tokens=0), "max_new_tokens=0: give a positive number"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(operator="multiply"), "no operator 'multiply'"),
    ]
    for options, message in refused:
        with pytest.raises(LensteerError, match=message):
            attempt(**options)
    with pytest.raises(LensteerError, match="'random 0' at layer 1 has coefficient 0: give one with the sign"):
        calibrate_many(model, prompts, [SteeringPlan(direction, 1, 0.0)], budget=0.1)
    deeper = random_direction(tiny_model("qwen2", n_layers=6))
    with pytest.raises(LensteerError, match="no layer 5: this model has layers 0 to 3"):
        calibrate_many(model, prompts, [SteeringPlan(deeper, 5, 0.1)], budget=0.1)
