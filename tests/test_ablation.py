"""Effects on a given chain equal those of full teacher forcing, however little is rerun; leaving a group out counts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import lensteer as ls
from lensteer import ablation, models, twins
from lensteer.ablation import ForcedChain, forced_effect, leave_one_out
from lensteer.cache_steering import CachePlan, CacheVector
from lensteer.caches import new_cache
from lensteer.forward import forced_logits
from lensteer.metrics import kl_divergence
from lensteer.positions import at, everywhere, generated, onsets, prompt, thinking
from lensteer.steering import Gate, Schedule, SteeringPlan, foreign_hooks
from lensteer.traces import Trace

FAMILIES = ("qwen2", "llama", "qwen3", "gemma3")
PROMPT, RESPONSE = "Take three. Next", "<think>I am. So</think> The. next one is forty-two"


def trace_of(model):
    ids = models.encode(model, RESPONSE)
    text, offsets = models.decode_offsets(model.tokenizer, ids)
    prompt_ids = tuple(models.encode(model, PROMPT))
    return Trace(ls.Task("a", "b", "dev", "How?"), PROMPT, text, prompt_ids, tuple(ids), tuple(offsets), False)


def slow(model, trace, plan, prefill=""):
    """KL and change of each response token, from two whole forwards of the library."""
    prompt_ids = models.encode(model, trace.prompt + prefill)
    steered, base = (forced_logits(model, [prompt_ids], [trace.response_ids], plans=p)[0] for p in ([plan], None))
    ids = torch.tensor(trace.response_ids)[:, None]
    now, then = (x.double().log_softmax(-1).gather(-1, ids)[:, 0] for x in (steered, base))
    return kl_divergence(steered, base), now - then


def close(effect, expected):
    for found, wanted in zip((effect.kl, effect.change), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # of fp32 logits, in batches of another shape


def plans_of(model, random_direction, trace):
    one, two = random_direction(model, 1), random_direction(model, 2)
    n = len(trace.ids)
    return [
        SteeringPlan(one, 1, 1.0, everywhere),
        SteeringPlan(one, 0, -0.7, generated),
        SteeringPlan(two, 3, 1.0, thinking, "project_out") + SteeringPlan(one, 3, 0.5, onsets),
        SteeringPlan(two, 2, 1.0, at([trace.prompt_length])),
        SteeringPlan(one, 1, 2.0, at([n - 4, n - 1])),
        SteeringPlan(one, 1, 2.0, at([n - 1])),  # nothing is predicted from there
        SteeringPlan(one, 1, 0.0),
        SteeringPlan(one, 2, 1.0, prompt),
        None,
        SteeringPlan(two, 1, 1.0, at([0])),
    ]


@pytest.mark.medium
@pytest.mark.parametrize("family", FAMILIES)
def test_effects_are_those_of_teacher_forcing(tiny_model, random_direction, family):
    model = tiny_model(family)
    trace = trace_of(model)
    plans = plans_of(model, random_direction, trace)
    chain = ForcedChain.of(model, trace)
    together = chain.effects(plans)
    for plan, effect in zip(plans, together, strict=True):
        close(effect, slow(model, trace, plan))
        close(chain.effect(plan), (effect.kl, effect.change))
        first = chain.first_changed(plan)
        untouched = max(first + 1 - trace.prompt_length, 0)
        assert not effect.kl[:untouched].any()
        assert not effect.change[:untouched].any()
        if plan is not None and plan.edits[0].coefficient and first < len(trace.ids) - 1:
            assert effect.total > 1e-3
    assert [together[i].total for i in (5, 6, 8)] == [0.0, 0.0, 0.0]
    assert not foreign_hooks(model)


def test_only_what_follows_the_first_edit_is_run_again(organism, random_direction):
    (trace,) = ls.generate_traces(organism, ls.load_tasks(split="dev", n=1), max_new_tokens=60)
    chain, tokens, blocks = ForcedChain.of(organism, trace), [], []
    twin = twins.plain_twin(organism)
    chain.effect(None)
    handles = [
        twin.register_forward_pre_hook(
            lambda _m, _a, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
        ),
        *(
            _mlp(twin, layer).register_forward_hook(lambda *_, layer=layer: blocks.append(layer))
            for layer in range(models.n_layers(organism))
        ),
    ]
    try:
        n, direction = len(trace.ids), random_direction(organism)
        for first, layer in ((n - 10, 2), (trace.prompt_length + 5, 5), (n - 1, 0)):
            chain.effect(SteeringPlan(direction, layer, 1.0, at([first, n - 2 if first < n - 2 else n - 1])))
    finally:
        for handle in handles:
            handle.remove()
    second = n - 1 - trace.prompt_length - 5
    assert tokens == [9, 9, second, second]  # each pass and its head; nothing is predicted after the last token
    assert blocks == [*range(3, 8), *range(6, 8)]  # those after the edited one


def every_kind(model, random_direction, trace, length=3.0):
    """Plans with each operator, a gate, a schedule, several scopes and a cache slot, at several layers."""
    one, two = random_direction(model, 1, length), random_direction(model, 2, length)
    last, begin = models.n_layers(model) - 1, trace.prompt_length
    return {
        "add": SteeringPlan(one, last // 2, 1.0, generated),
        "first layer": SteeringPlan(one, 0, 1.0, everywhere),
        "last layer": SteeringPlan(one, last, 4.0, thinking | onsets),
        "project out": SteeringPlan(two, 2, 20.0, generated, "project_out"),
        "clamp": SteeringPlan(two, 1, 4.0, at([begin + 3, begin + 9]), "clamp"),
        "rotate": SteeringPlan(one, 2, 40.0, generated, "rotate"),
        "gate": SteeringPlan(one, 2, 1.0, generated, gate=Gate(0.0, direction=two.at(2))),
        "schedule": SteeringPlan(one, 2, 1.0, generated, schedule=Schedule.linear(30.0, 0.5)),
        "two layers": SteeringPlan(one, 3, 1.0, at([begin + 2])) + SteeringPlan(two, 1, 1.0, at([begin + 8])),
        "cache": CachePlan(cache_vector(model), 2.0, 0.5),
        "cache and residual": CachePlan(cache_vector(model), 2.0) + SteeringPlan(one, 2, 1.0, generated),
    }


@pytest.mark.medium
@pytest.mark.parametrize("kept", [True, False], ids=["logits kept", "logits made again"])
def test_the_short_way_gives_what_two_whole_forwards_give(organism, random_direction, monkeypatch, kept):
    (trace,) = ls.generate_traces(organism, ls.load_tasks(split="dev", n=1), max_new_tokens=40)
    n_heads = []
    monkeypatch.setattr(twins, "head", lambda *given, head=twins.head: n_heads.append(given) or head(*given))
    monkeypatch.setitem(ablation.HEADS, "cpu", 11 * int(organism.cfg.d_vocab))  # several parts, none of equal length
    if not kept:
        monkeypatch.setattr(ablation, "MAX_LOGITS", 1)
    plans = every_kind(organism, random_direction, trace, 100.0)  # its residual streams are 100 to 600 long
    chain, twin = ForcedChain.of(organism, trace), twins.plain_twin(organism)
    on = {"residual": plans["gate"], "two layers": plans["two layers"], "cache": plans["cache"]}
    for name in (None, *on):
        with nullcontext() if name is None else on[name].on(organism, prompt_length=trace.prompt_length):
            n_heads.clear()
            for plan in plans.values():
                found = chain.effect(plan)
                close(found, slow(organism, trace, plan))
                assert name is not None or found.total > 0.01
            assert len(n_heads) > 2 * len(plans)
            assert (chain._kept.logits.twin is None) == kept
            for plan, effect in zip(plans.values(), chain.effects(list(plans.values())), strict=True):
                close(effect, slow(organism, trace, plan))
    n_heads.clear()
    with organism.hooks(fwd_hooks=[(models.resid_hook(1), lambda resid, hook: 0.5 * resid)]):
        for plan in plans.values():  # only the bridge itself runs hooks of others
            close(chain.effect(plan), slow(organism, trace, plan))
    assert not n_heads
    assert not any("forward" in vars(twins.twin_layer(twin, layer)) for layer in range(models.n_layers(organism)))


def test_in_bfloat16_the_short_way_differs_by_rounding_only(tiny_checkpoint, random_direction, monkeypatch):
    model = ls.load_model(tiny_checkpoint("llama"), dtype="bfloat16")
    trace = trace_of(model)
    monkeypatch.setitem(ablation.HEADS, "cpu", 5 * int(model.cfg.d_vocab))
    for name, plan in every_kind(model, random_direction, trace).items():
        found = ForcedChain.of(model, trace).effect(plan)
        with monkeypatch.context() as patch:
            patch.setattr(twins, "resumes", lambda *_: False)
            whole = ForcedChain.of(model, trace).effect(plan)
        assert found.total == pytest.approx(whole.total, rel=0.02), name
        torch.testing.assert_close(found.change, whole.change, rtol=0.02, atol=0.05)


def test_a_pass_can_be_interrupted(organism, random_direction):
    (trace,) = ls.generate_traces(organism, ls.load_tasks(split="dev", n=1), max_new_tokens=30)
    chain, plan = ForcedChain.of(organism, trace), SteeringPlan(random_direction(organism), 3, 1.0, generated)
    expected, kept = chain.effect(plan), chain._kept
    calls: list[int] = []

    def check() -> None:
        calls.append(len(calls))
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chain.effect(plan, check=check)
    assert len(calls) == 4
    again = chain.effect(plan, check=lambda: calls.append(0))
    assert len(calls) > models.n_layers(organism)  # at every block, and for every part of the logits
    assert chain._kept is kept
    torch.testing.assert_close(again.kl, expected.kl, rtol=0, atol=0)


def _mlp(twin, layer) -> torch.nn.Module:
    mlp = twins.twin_layer(twin, layer).mlp
    assert isinstance(mlp, torch.nn.Module)
    return mlp


def test_a_pass_starts_at_a_block_only_if_the_residual_stream_is_all_it_reads(tiny_model, random_direction):
    model = tiny_model("qwen2")
    trace, plan = trace_of(model), SteeringPlan(random_direction(model), 2, 1.0, generated)
    expected, twin = slow(model, trace, plan), twins.plain_twin(model)
    assert twins.resumes(twin, lambda: new_cache(model))
    twins._resumes.clear()
    left: list[None] = []  # by the first block, for the third
    handles = [
        _mlp(twin, 0).register_forward_hook(lambda *_: left.append(None)),
        _mlp(twin, 2).register_forward_hook(lambda *_: left.pop()),
    ]
    try:
        close(ForcedChain.of(model, trace).effect(plan), expected)
        assert not twins.resumes(twin, lambda: new_cache(model))
    finally:
        twins._resumes.clear()
        for handle in handles:
            handle.remove()
    assert not any("forward" in vars(twins.twin_layer(twin, layer)) for layer in range(models.n_layers(model)))


def cache_vector(model, seed=0):
    config = model.original_model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    generator = torch.Generator().manual_seed(seed)
    keys, values = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    return CacheVector("random", keys, values, "last_prompt")


def test_cache_plans_and_plans_that_are_on(tiny_model, random_direction):
    model = tiny_model("llama")
    trace, vector = trace_of(model), cache_vector(model)
    cache, residual = CachePlan(vector, 2.0, 0.5), SteeringPlan(random_direction(model), 2, 1.0, generated)
    close(forced_effect(model, trace, cache), slow(model, trace, cache))
    offset = CachePlan(vector, 2.0, position="offset_token")
    close(forced_effect(model, trace, offset), slow(model, trace, offset, "\n"))
    chain = ForcedChain.of(model, trace)
    for on in (residual, cache, SteeringPlan(random_direction(model, 5), 0, 1.0)):
        for plan in (cache, residual):
            before = chain.effect(plan)
            with on.on(model, prompt_length=trace.prompt_length):
                inside = chain.effect(plan)
                close(inside, slow(model, trace, plan))
            close(chain.effect(plan), (before.kl, before.change))
            assert abs(inside.total - before.total) > 1e-3


def test_hooks_of_others_belong_to_both_sides(tiny_model, random_direction):
    model = tiny_model("qwen2")
    trace, plan = trace_of(model), SteeringPlan(random_direction(model), 2, 1.0, generated)
    chain = ForcedChain.of(model, trace)
    before = chain.effect(plan)
    with model.hooks(fwd_hooks=[(models.resid_hook(0), lambda resid, hook: 0.5 * resid)]):
        close(chain.effect(plan), slow(model, trace, plan))
        assert abs(chain.effect(plan).total - before.total) > 1e-3
    close(chain.effect(plan), (before.kl, before.change))


def test_leaving_out_finds_the_group_that_does_it(tiny_model, random_direction):
    model = tiny_model("qwen2")
    trace, direction = trace_of(model), random_direction(model)
    n, begin = len(trace.ids), trace.prompt_length
    groups = {"all of it": [begin, begin + 1], "too late": [n - 1]}
    done = []
    found = leave_one_out(model, trace, lambda p: SteeringPlan(direction, 1, 1.0, at(p)), groups, advance=done.append)
    assert sum(done) == 2
    assert found.full > 0.01
    assert found.importance == pytest.approx((found.full, 0.0), rel=1e-4, abs=1e-5)  # of fp32 logits, rows of one batch
    assert found.groups == ((begin, begin + 1), (n - 1,))
    alone = leave_one_out(model, trace, lambda p: SteeringPlan(direction, 1, 1.0, at(p)), {"one": [begin]})
    assert alone.without == (0.0,)
    table = found.to_dataframe()
    assert list(table["group"]) == ["all of it", "too late"]
    assert table["importance"].tolist() == list(found.importance)


@pytest.mark.parametrize("measure", ["kl", "log_prob"])
def test_each_group_is_really_left_out(tiny_model, random_direction, measure):
    model = tiny_model("llama")
    trace, direction = trace_of(model), random_direction(model)
    begin = trace.prompt_length
    groups = {f"{p}": [p, p + 1] for p in range(begin - 2, len(trace.ids) - 1, 2)}
    assert len(groups) > 8  # more than run together
    targets = [begin, begin + 5, len(trace.ids) - 1] if measure == "log_prob" else None

    def plan_of(positions):
        return SteeringPlan(direction, 1, 0.8, at(positions))

    found = leave_one_out(model, ForcedChain.of(model, trace), plan_of, groups, targets=targets)

    def expected(positions):
        kl, change = slow(model, trace, plan_of(positions))
        return float(kl.sum()) if targets is None else float(change[[p - begin for p in targets]].sum())

    everything = {p for group in groups.values() for p in group}
    assert found.full == pytest.approx(expected(everything), abs=1e-4)
    for without, group in zip(found.without, groups.values(), strict=True):
        assert without == pytest.approx(expected(everything - set(group)), abs=1e-4)
    assert found.measure == measure


def test_leaving_out_a_group_after_the_last_target_changes_nothing(tiny_checkpoint, random_direction):
    model = ls.load_model(tiny_checkpoint("llama"), dtype="bfloat16")  # whose rounding depends on the batch
    trace, direction = trace_of(model), random_direction(model)
    done: list[int] = []
    begin = trace.prompt_length
    groups = {f"{p}": [p] for p in range(begin, begin + 6)}
    options: dict[str, Any] = dict(targets=[begin + 1, begin + 2], advance=done.append)
    found = leave_one_out(model, trace, lambda p: SteeringPlan(direction, 1, 3.0, at(p)), groups, **options)
    assert found.importance[2:] == (0, 0, 0, 0)  # a position changes what comes after it
    assert found.importance[1] != 0
    assert done[0] == 4
    assert sum(done) == 6


def test_what_cannot_be_done_is_said(tiny_model, random_direction):
    model = tiny_model("qwen2")
    trace, direction = trace_of(model), random_direction(model)

    def plan_of(positions):
        return SteeringPlan(direction, 1, 1.0, at(positions))

    last = len(trace.ids) - 1
    refused: list[tuple[dict[str, list[int]], dict[str, Any], str]] = [
        ({}, {}, "at least one"),
        ({"a": []}, {}, "at least one position"),
        ({"a": [last + 1]}, {}, f"0 to {last}"),
        ({"a": [-1]}, {}, f"0 to {last}"),
        ({"a": [1]}, {"targets": [0]}, "no response token"),
    ]
    for groups, options, words in refused:
        with pytest.raises(ls.LensteerError, match=words):
            leave_one_out(model, trace, plan_of, groups, **options)
    with pytest.raises(ls.LensteerError, match="0 response tokens"):
        ForcedChain(model, [1], [])
    with pytest.raises(ls.LensteerError, match="not finite"):
        forced_effect(model, trace, SteeringPlan(direction, 1, 3e38, everywhere))
    assert not foreign_hooks(model)
    frame = forced_effect(model, trace, SteeringPlan(direction, 1)).to_dataframe()
    assert frame["position"].tolist() == list(range(trace.prompt_length, last + 1))
