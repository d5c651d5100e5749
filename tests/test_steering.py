"""Edits reach the right positions however the forward is run, and leave no hook."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lensteer as ls
from lensteer import models
from lensteer.positions import Context, at, everywhere, first, generated, onsets, prompt, sentence_starts, thinking
from lensteer.steering import Edits, SteeringPlan, active_plans, foreign_hooks
from lensteer.steering.plans import UNITS

FAMILIES = ("qwen2", "llama", "qwen3", "gemma3")
SCOPES = [
    everywhere,
    prompt,
    generated,
    thinking,
    sentence_starts,
    onsets,
    first(3),
    at([0, 7, 11]),
    thinking & sentence_starts,
    prompt | (thinking & ~onsets),
    ~thinking,
    ~(generated & ~first(2)) & ~at([1]),
]
#: Prompts of different lengths, and what follows them word for word: thought, sentence ends, an answer.
PROMPTS = ["Take three. Next", "So", "The answer. I am not sure.<think>For"]
ANSWERS = ["<think>I am. So</think>The. next", ". <think>step.</think><think>42", ". The.</think> I.<think> am"]


def rows_of(model):
    """Token ids of each row, cut to one number of answer tokens; that number; each prompt's length."""
    prompts = [models.encode(model, text) for text in PROMPTS]
    answers = [models.encode(model, text) for text in ANSWERS]
    n = min(map(len, answers))
    return [p + a[:n] for p, a in zip(prompts, answers, strict=True)], n, [len(p) for p in prompts]


def alone(model, row, prompt_length, plan=None):
    """Logits of a single whole row, all in one forward."""
    ids = torch.tensor([row])
    with torch.no_grad():
        if plan is None:
            return model(ids, attention_mask=torch.ones_like(ids))[0]
        with plan.on(model, prompt_length=prompt_length):
            return model(ids, attention_mask=torch.ones_like(ids))[0]


def token_by_token(model, rows, n_new, lengths):
    """Logits at the last prompt token and at each answer token, from a left-padded batch with a KV cache."""
    width = max(map(len, rows))
    pad = torch.tensor([width - len(row) for row in rows])
    ids = torch.tensor([[5] * (width - len(row)) + row for row in rows])
    position = torch.arange(width)[None] - pad[:, None]
    cache, out = None, []
    with torch.no_grad():
        for end in range(width - n_new, width + 1):
            begin = 0 if cache is None else end - 1
            logits, cache = model(
                ids[:, begin:end],
                attention_mask=(position[:, :end] >= 0).long(),
                position_ids=position[:, begin:end].clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                return_type="logits_and_cache",
            )
            out.append(logits[:, -1])
    return torch.stack(out, 1)


def clean(model) -> bool:
    """No hook at any hook point, and none of ours that watches the tokens."""
    points = [m for m in model.modules() if hasattr(m, "fwd_hooks") and (m.fwd_hooks or m.bwd_hooks)]
    watching = [h for h in model.original_model._forward_pre_hooks.values() if "lensteer" in h.__module__]
    return not points and not watching and not active_plans(model) and not foreign_hooks(model)


def both_operators(model, random_direction, scope):
    """An addition and a projection at two layers, so that one run tests both."""
    add = SteeringPlan(random_direction(model, 1), 1, 0.7, scope)
    return add + SteeringPlan(random_direction(model, 2), 2, 1.0, scope, "project_out")


@pytest.mark.medium
@pytest.mark.parametrize("scope", SCOPES, ids=lambda s: s.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_padded_decode_is_the_full_single_forward(family, scope, tiny_model, random_direction):
    model = tiny_model(family)
    rows, n_new, lengths = rows_of(model)
    plan = both_operators(model, random_direction, scope)
    with plan.on(model):
        decoded = token_by_token(model, rows, n_new, lengths)
    touched = 0
    for row, length, ours in zip(rows, lengths, decoded, strict=True):
        whole = alone(model, row, length, plan)
        scale = max(1.0, float(whole.abs().max()))
        torch.testing.assert_close(ours, whole[length - 1 :], atol=1e-4 * scale, rtol=0)  # fp32, another shape
        # Not a vacuous equality: the first chosen position is the first whose logits move.
        context = Context(torch.tensor([row]), torch.tensor([0]), torch.tensor([length]), models.token_table(model))
        chosen = scope.mask(context)[0]
        moved = ((whole - alone(model, row, length)).abs().amax(-1) > 1e-3 * scale).long()
        touched += int(chosen.sum())
        if chosen.any():
            assert int(moved.argmax()) == int(chosen.long().argmax())
        else:
            assert not moved.any()
    assert touched
    assert clean(model)


@pytest.mark.parametrize("operator", ["add", "project_out"])
@pytest.mark.parametrize("family", FAMILIES)
def test_coefficient_zero_changes_no_bit(family, operator, tiny_model, random_direction):
    model = tiny_model(family)
    rows, n_new, lengths = rows_of(model)
    plan = SteeringPlan(random_direction(model), 1, 0.0, everywhere, operator)
    plain = token_by_token(model, rows, n_new, lengths)
    with plan.on(model):
        steered = token_by_token(model, rows, n_new, lengths)
    assert torch.equal(plain, steered)


def test_addition_adds_and_projection_removes(tiny_model, random_direction):
    model, direction = tiny_model(), random_direction(tiny_model(), length=2.5)
    ids = torch.tensor([models.encode(model, "Wait, maybe that is wrong.")])
    point, unit = models.resid_hook(2), direction.at(2) / direction.at(2).norm()
    _, plain = model.run_with_cache(ids, names_filter=point)
    with SteeringPlan(direction, 2, -2.0, at([1, 3])).on(model):
        _, added = model.run_with_cache(ids, names_filter=point)
    with SteeringPlan(direction, 2, 1.0, at([1, 3]), "project_out").on(model):
        _, removed = model.run_with_cache(ids, names_filter=point)
    chosen = torch.zeros(ids.shape[1], dtype=torch.bool).index_fill(0, torch.tensor([1, 3]), True)
    torch.testing.assert_close(added[point][0, chosen], plain[point][0, chosen] - 2 * 2.5 * unit, atol=1e-5, rtol=0)
    assert (plain[point][0, chosen] @ unit).abs().min() > 1e-2
    torch.testing.assert_close(removed[point][0, chosen] @ unit, torch.zeros(2), atol=1e-5, rtol=0)
    others = removed[point][0, chosen] - plain[point][0, chosen]
    torch.testing.assert_close(others - (others @ unit)[:, None] * unit, torch.zeros_like(others), atol=1e-5, rtol=0)
    for cache in (added, removed):
        assert torch.equal(cache[point][0, ~chosen], plain[point][0, ~chosen])


@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_is_how_long_what_is_added_is(unit, tiny_model, random_direction):
    model = tiny_model()
    direction = dataclasses.replace(random_direction(model), mean_norm=torch.full((4,), 0.5))  # raw vectors are 3 long
    ids = torch.tensor([models.encode(model, "Wait, maybe that is wrong.")])
    point, along = models.resid_hook(2), direction.at(2) / direction.at(2).norm()
    _, plain = model.run_with_cache(ids, names_filter=point)
    plan = SteeringPlan(direction, 2, -2.0, unit=unit)
    with plan.on(model):
        _, steered = model.run_with_cache(ids, names_filter=point)
    length = {"difference": 3.0, "mean_norm": 0.5, "unit": 1.0}[unit]
    added = (steered[point] - plain[point])[0]
    torch.testing.assert_close(added, -2 * length * along.expand_as(added), atol=1e-4, rtol=0)
    others = [dataclasses.replace(plan, unit=other) for other in UNITS if other != unit]
    assert all(other.identity() != plan.identity() for other in others)
    remove = SteeringPlan(direction, 2, 1.0, operator="project_out", unit=unit)
    torch.testing.assert_close(remove.vector, along)  # whatever the unit


def test_by_default_a_plan_adds_the_direction_itself(tiny_model, random_direction):
    direction = dataclasses.replace(random_direction(tiny_model()), mean_norm=torch.full((4,), 0.5))
    plan = SteeringPlan(direction, 2)
    assert (plan.coefficient, plan.unit) == (1.0, "difference")
    assert torch.equal(plan.vector, direction.raw[2])


def test_edits_of_one_layer_apply_in_the_order_given(tiny_model, random_direction):
    model, direction = tiny_model(), random_direction(tiny_model())
    add = SteeringPlan(direction, 1, 1.0)
    remove = SteeringPlan(direction, 1, 1.0, operator="project_out")
    row = models.encode(model, "For example, take three.")
    point, unit = models.resid_hook(1), direction.at(1) / direction.at(1).norm()

    def along(*plans):
        ids = torch.tensor([row])
        with torch.no_grad():
            if len(plans) == 1:
                with plans[0].on(model):
                    return model.run_with_cache(ids, names_filter=point)[1][point][0] @ unit
            with plans[0].on(model), plans[1].on(model):
                return model.run_with_cache(ids, names_filter=point)[1][point][0] @ unit

    zero, three = torch.zeros(len(row)), torch.full((len(row),), 3.0)
    for joined, nested in ((along(add + remove), along(add, remove)), (along(remove + add), along(remove, add))):
        torch.testing.assert_close(joined, nested)
    torch.testing.assert_close(along(add + remove), zero, atol=1e-5, rtol=0)
    torch.testing.assert_close(along(remove + add), three, atol=1e-5, rtol=0)
    # In one batch, each row keeps its own order.
    context = Context(
        torch.tensor([row] * 4), torch.zeros(4).long(), torch.full((4,), len(row)), models.token_table(model)
    )
    resid = torch.randn(4, len(row), models.d_model(model), generator=torch.Generator().manual_seed(0))
    plans = [add + remove, remove + add, None, add + remove + add]
    edited = Edits.of(plans, model).apply(1, resid, context)
    torch.testing.assert_close(edited[0] @ unit, zero, atol=1e-5, rtol=0)
    torch.testing.assert_close(edited[1] @ unit, three, atol=1e-5, rtol=0)
    assert torch.equal(edited[2], resid[2])
    torch.testing.assert_close(edited[3] @ unit, three, atol=1e-5, rtol=0)


def test_nested_and_joined_plans_agree(tiny_model, random_direction):
    model = tiny_model("llama")
    one = SteeringPlan(random_direction(model, 1), 0, 1.0, prompt)
    two = SteeringPlan(random_direction(model, 2), 2, -1.0, generated)
    rows, n_new, lengths = rows_of(model)
    with (one + two).on(model):
        joined = token_by_token(model, rows, n_new, lengths)
    with one.on(model):
        with two.on(model), one.on(model):  # the same plan twice is twice the plan
            assert [len(p.edits) for p in active_plans(model)] == [1, 1, 1]
            token_by_token(model, rows, n_new, lengths)
        assert len(active_plans(model)) == 1
        left = token_by_token(model, rows, n_new, lengths)
        with two.on(model):
            nested = token_by_token(model, rows, n_new, lengths)
    with one.on(model):
        only = token_by_token(model, rows, n_new, lengths)
    torch.testing.assert_close(nested, joined, atol=1e-4, rtol=0)
    assert torch.equal(left, only)
    assert not torch.allclose(only, joined, atol=1e-2)
    assert clean(model)


def test_nothing_stays_behind_an_exception_and_foreign_hooks_stay(tiny_model, random_direction):
    model = tiny_model()
    plan = SteeringPlan(random_direction(model), 1)
    row = models.encode(model, "I am not sure.")
    before = alone(model, row, 1)

    def inside():
        with plan.on(model), plan.on(model):
            model(torch.tensor([row]))
            assert not clean(model)
            raise KeyboardInterrupt

    def in_set_up():
        tall = dataclasses.replace(random_direction(model), layers=(0, 1, 2, 99))
        with (plan + dataclasses.replace(plan, direction=tall, layer=99)).on(model):
            raise AssertionError("unreachable")

    def in_the_forward():
        with dataclasses.replace(plan, scope=at([0])).on(model):
            model(inputs_embeds=torch.zeros(1, 2, models.d_model(model)))

    for break_it, error in ((inside, KeyboardInterrupt), (in_set_up, ls.LensteerError), (in_the_forward, Exception)):
        with pytest.raises(error):
            break_it()
        assert clean(model)
    assert torch.equal(alone(model, row, 1), before)

    fired = []
    model.add_hook(models.resid_hook(1), lambda resid, hook: fired.append(1))
    try:
        with plan.on(model):
            assert foreign_hooks(model)
            model(torch.tensor([row]))
        assert foreign_hooks(model)
        model(torch.tensor([row]))
        assert len(fired) == 2
    finally:
        model.reset_hooks()
    assert clean(model)


def test_a_cache_from_before_the_plan_is_refused(tiny_model, random_direction):
    model = tiny_model()
    ids = torch.tensor([models.encode(model, "So the next step")])
    _, cache = model(ids, use_cache=True, return_type="logits_and_cache")
    with (
        pytest.raises(ls.LensteerError, match=f"a cache of {ids.shape[1]} tokens"),
        SteeringPlan(random_direction(model), 1).on(model),
    ):
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert clean(model)


def test_the_models_own_generate_loops_are_steered(tiny_model, random_direction):
    """Hugging Face's generation loop under the bridge passes only new tokens, with a cache."""
    model = tiny_model()
    prompt_ids = models.encode(model, "First, let me think")
    plan = SteeringPlan(random_direction(model), 2, 2.0, generated)
    with plan.on(model):
        theirs = model.hf_generate(torch.tensor([prompt_ids]), max_new_tokens=8, do_sample=False, return_type="tokens")[
            0
        ].tolist()
        (ours,) = ls.generation.generate(model, [prompt_ids], max_new_tokens=8)
    (plain,) = ls.generation.generate(model, [prompt_ids], max_new_tokens=8)
    assert theirs == prompt_ids + list(ours.ids)
    assert plain.ids != ours.ids


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coefficient": float("nan")}, "nan"),
        ({"coefficient": float("-inf")}, "-inf"),
        ({"operator": "multiply"}, "'multiply'"),
        ({"unit": "norm"}, r"no unit 'norm' of a coefficient: choose one of \['difference', 'mean_norm', 'unit'\]"),
        ({"layer": 17}, "17"),
        ({"layer": -1}, "-1"),
    ],
)
def test_an_impossible_plan_is_refused_by_name(change, words, tiny_model, random_direction):
    plan = SteeringPlan(random_direction(tiny_model()), 1)
    with pytest.raises(ls.LensteerError, match=words):
        dataclasses.replace(plan, **change)


def test_a_coefficient_beyond_the_models_numbers_is_refused_before_any_hook(tiny_model, random_direction):
    model = tiny_model()
    plan = SteeringPlan(random_direction(model), 1, 1e39)
    with pytest.raises(ls.LensteerError, match=r"coefficient 1e\+39 is beyond torch.float32"), plan.on(model):
        raise AssertionError("unreachable")
    assert clean(model)


@pytest.mark.parametrize("operator", ["add", "project_out"])
@pytest.mark.parametrize("raw", [torch.zeros(4, 32), torch.full((4, 32), torch.nan), torch.ones(4, 48)])
def test_vectors_that_cannot_be_used_are_refused_before_any_hook(raw, operator, tiny_model, random_direction):
    model = tiny_model()
    direction = dataclasses.replace(random_direction(model), raw=raw, label="odd")
    with (
        pytest.raises(ls.LensteerError, match="'odd'"),
        SteeringPlan(direction, 1, operator=operator).on(model),
    ):
        raise AssertionError("unreachable")
    assert clean(model)
