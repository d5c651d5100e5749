"""Every row of a batch is an independent chain, whatever the batch composition and the code path."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import lensteer as ls
from lensteer import models, twins
from lensteer.cache_steering import CachePlan, CacheVector
from lensteer.generation import generate
from lensteer.generation.decoding import inverse_cdf
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


@pytest.mark.medium
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
    options: dict[str, Any] = dict(max_new_tokens=16, temperature=1.0, seeds=list(range(5)), plans=own)
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


@pytest.mark.medium
@pytest.mark.parametrize("through_bridge", [False, True])
def test_finished_rows_leave_and_the_others_do_not_notice(through_bridge, tiny_model, random_direction, monkeypatch):
    model = tiny_model()
    prompts, plans = prompts_of(model) * 3, plans_of(model, random_direction) * 3
    options: dict[str, Any] = dict(max_new_tokens=24, temperature=2.0, seeds=list(range(15)), plans=plans)
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
        if single != result:  # then at a step that rounding decides
            assert agree(
                single.ids, result.ids, slow(model, prompts[row], 24, temperature=2.0, seed=row, plan=plans[row])[1]
            )
        assert result.finished == (result.ids[-1] in ends)
        assert result.finished or len(result.ids) == 24
        assert not ends & set(result.ids[:-1])


def groups_of(model, random_direction):
    """Prompts and plans that share prefills: for each row the kind of prefill that it needs."""
    one, two = random_direction(model, 1), random_direction(model, 2)
    a, b = models.encode(model, TEXTS[0]), models.encode(model, TEXTS[2])
    every, later = SteeringPlan(one, 1, 1.0, everywhere), SteeringPlan(two, 2, 1.0, generated)
    rows = [
        (a, None, "a"),
        (a, SteeringPlan(one, 1, 0.0, everywhere), "a"),  # nothing is added
        (a, later, "a"),  # the prompt is not edited
        (a, later + SteeringPlan(one, 0, -1.0, at([len(a) - 1])), "a"),  # only its last token, which every row runs
        (a, every, "a, every"),
        (b, every, "b, every"),
        (b, None, "b"),
        (a, SteeringPlan(one, 1, 1.0, at([0])), "a, its first token"),
        (a, every, "a, every"),
    ]
    return [list(part) for part in zip(*rows, strict=True)]


@contextmanager
def shapes_seen(model):
    """Rows and columns of each forward of what generation runs."""
    shapes = []

    def see(_module, args, kwargs):
        shapes.append(tuple((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape))

    runs = twins.plain_twin(model) or model.original_model
    handle = runs.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.mark.medium
@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_prompt_share_its_prefill(family, temperature, tiny_model, random_direction):
    model = tiny_model(family)
    prompts, plans, kinds = groups_of(model, random_direction)
    width, seeds = max(map(len, prompts)), list(range(40, 49))
    options: dict[str, Any] = dict(max_new_tokens=8, temperature=temperature)
    with shapes_seen(model) as shapes:
        together = generate(model, prompts, seeds=seeds, plans=plans, **options)
    assert shapes[:2] == [(len(set(kinds)), width - 1), (len(prompts), 1)]
    for row, result in enumerate(together):
        seed = seeds[row] if temperature else None
        expected = slow(model, prompts[row], 8, temperature=temperature, seed=seed, plan=plans[row])
        agree(result.ids, *expected)
        with shapes_seen(model) as shapes:
            (single,) = generate(model, prompts[row : row + 1], seeds=[seeds[row]], plans=[plans[row]], **options)
        assert shapes[0] == (1, len(prompts[row]))  # nobody to share with
        agree(single.ids, *expected)
    if not temperature:
        assert together[0].ids == together[1].ids  # a coefficient of 0
        assert together[4].ids == together[8].ids
    assert len({together[row].ids for row in (0, 3, 4)}) == 3


def test_a_coefficient_of_zero_shares_the_unsteered_prefill_to_the_bit(tiny_model, random_direction):
    model = tiny_model()
    ids = models.encode(model, TEXTS[2])
    zero = SteeringPlan(random_direction(model), 1, 0.0, everywhere)
    options: dict[str, Any] = dict(max_new_tokens=20, temperature=1.0, seeds=[5, 6, 5, 6])
    plain = generate(model, [ids] * 4, **options)
    assert generate(model, [ids] * 4, plans=[zero] * 4, **options) == plain
    assert generate(model, [ids] * 4, plans=[None, zero, zero, None], **options) == plain
    assert plain[:2] == plain[2:]
    assert plain[0] != plain[1]


@pytest.mark.parametrize("on", [everywhere, generated])
def test_plans_that_are_on_keep_the_prefill_shared(on, tiny_model, random_direction):
    model = tiny_model()
    ids, direction = models.encode(model, TEXTS[2]), random_direction(model)
    outer, own = SteeringPlan(direction, 1, 1.0, on), SteeringPlan(random_direction(model, 2), 2, 1.0, generated)
    with outer.on(model), shapes_seen(model) as shapes:
        found = generate(model, [ids] * 4, max_new_tokens=8, plans=[None, own, None, own])
    # An edit of the prompt is taken to be the row's own, though here all rows have the same.
    assert shapes[0] == (2 if on is everywhere else 1, len(ids) - 1)
    expected = [slow(model, ids, 8, plan=plan) for plan in (outer, outer + own)]
    for row, result in enumerate(found):
        agree(result.ids, *expected[row % 2])
    assert found[:2] == found[2:]


def test_hooks_of_others_and_cache_edits_switch_sharing_off(tiny_model):
    model = tiny_model()
    ids = models.encode(model, TEXTS[2])
    rows = []

    def by_row(resid, hook):  # tells rows apart
        rows.append(tuple(resid.shape[:2]))
        return resid + torch.arange(len(resid))[:, None, None]

    with model.hooks(fwd_hooks=[(models.resid_hook(0), by_row)]):
        found = generate(model, [ids] * 3, max_new_tokens=6)
    assert rows[0] == (3, len(ids))
    assert len({result.ids for result in found}) > 1
    config = model.original_model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    keys, values = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
    vector = CacheVector("random", keys, values, 1)
    plans = [None, CachePlan(vector, 3.0, 1.0)]
    generate(model, [ids], max_new_tokens=1, plans=plans[1:])  # how keys are turned is measured once
    with shapes_seen(model) as shapes:
        edited = generate(model, [ids] * 2, max_new_tokens=6, plans=plans)
    assert next(shape for shape in shapes if shape != (1, 1)) == (2, 2)  # through the edited slot, after a probe
    for result, plan in zip(edited, plans, strict=True):
        (single,) = generate(model, [ids], max_new_tokens=6, plans=[plan])
        agree(result.ids, single.ids, slow(model, ids, 6)[1] if plan is None else [1.0] * 6)


def test_a_prompt_of_one_token_has_nothing_to_share(tiny_model):
    model = tiny_model()
    assert len(set(generate(model, [[5]] * 3, max_new_tokens=4))) == 1


@pytest.mark.parametrize("size", [1, 7, 256, 257, 1000])
def test_the_inverse_of_the_cumulative_distribution_is_the_plain_one(size):
    generator = torch.Generator().manual_seed(size)
    p = (4 * torch.randn(300, size, generator=generator)).softmax(-1)
    p[:, size // 2] = 0.0  # an id that never is drawn, unless it is the only one
    p[:9, 1:] = 0.0
    p[0] = torch.nn.functional.one_hot(torch.tensor(size - 1), size).float()
    uniform = torch.rand(300, generator=generator, dtype=torch.float64)
    uniform[1:4] = torch.tensor([0.0, 1 - 1e-16, 0.5], dtype=torch.float64)
    for block in (1, 4, 256):
        found = inverse_cdf(p, uniform, block)
        assert ((found >= 0) & (found < size)).all()
        ends = p.double().cumsum(-1)
        wanted = uniform[:, None] * ends[:, -1:]
        plain = torch.searchsorted(ends, wanted, right=True)[:, 0].clamp(max=size - 1)
        # Sums of another order: only a number within rounding of an edge may fall on its other side.
        clear = (ends - wanted).abs().amin(-1) > 1e-12
        assert clear.float().mean() > 0.9 or size == 1
        assert torch.equal(found[clear], plain[clear])
        drawn = p.gather(1, found[:, None])[:, 0] > 0
        assert drawn[clear].all()


def test_the_inverse_of_the_cumulative_distribution_draws_from_it():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    n = 20000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    shares = torch.bincount(inverse_cdf(p.expand(n, 4), uniform, 2), minlength=4) / n
    torch.testing.assert_close(shares, p, rtol=0, atol=2e-4)


def test_a_longer_limit_only_continues(tiny_model):
    model = tiny_model("llama")
    options: dict[str, Any] = dict(temperature=1.0, seeds=[3, 4])
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

    options: dict[str, Any] = dict(max_new_tokens=4, plans=[plan] * 5, advance=stop)
    with pytest.raises(KeyboardInterrupt), plan.on(model):
        _generate(model, prompts_of(model), through_bridge, [], options)
    tall = dataclasses.replace(random_direction(model), layers=(0, 1, 2, 99))
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
