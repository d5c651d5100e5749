"""Attention between sentences against slow sums over whole patterns; planted effects are found; heads come back."""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lensteer import models, plots, positions
from lensteer.attention import (
    ELSEWHERE,
    ablated,
    behavior_attention,
    forward_padded,
    knocked_out,
    mean_z,
    receiver_heads,
    sentence_attention,
    stream_attention,
)
from lensteer.attention.behaviors import BINS, PairSums, pair_sums
from lensteer.attention.receivers import _figures, excess_kurtosis
from lensteer.attention.sentences import _groups, received
from lensteer.behaviors import BEHAVIORS, Span
from lensteer.errors import LensteerError
from lensteer.statistics import averaged
from lensteer.steering import SteeringPlan, foreign_hooks
from lensteer.tasks import Task
from lensteer.traces import Trace

FAMILIES = ("qwen2", "llama", "qwen3", "gemma3")
UNCERTAIN, BACK = BEHAVIORS.index("uncertainty-estimation"), BEHAVIORS.index("backtracking")


def chain(seed: int, n_spans: int = 12, n_prompt: int = 5, labels=BEHAVIORS[1:]) -> Trace:
    """Random tokens; sentences of one to four, now and then with something in between."""
    rng = random.Random(seed)
    position, spans = n_prompt, []
    for _ in range(n_spans):
        position += rng.choice([0, 0, 1])
        end = position + rng.choice([1, 2, 4])
        spans.append(Span(rng.choice(labels), position, end, position - n_prompt, end - n_prompt))
        position = end
    n = position - n_prompt + 2
    return Trace(
        Task(f"chain-{seed}", "random", "test", "?"),
        "?" * n_prompt,
        "".join(rng.choice("abc ") for _ in range(n)),
        tuple(rng.randrange(5, 250) for _ in range(n_prompt)),
        tuple(rng.randrange(5, 250) for _ in range(n)),
        tuple(range(n)),
        True,
        spans=tuple(spans),
    )


def whole_patterns(model, trace) -> torch.Tensor:
    """Every pattern of a trace at once: layer, head, query, key."""
    _, cache = model.run_with_cache(torch.tensor([trace.ids]))
    return torch.stack([cache[f"blocks.{i}.attn.hook_pattern"][0] for i in range(models.n_layers(model))]).double()


def slow_values(patterns, trace) -> torch.Tensor:
    """Mean over the query sentence's tokens of the sum over the key sentence's."""
    n = len(trace.spans)
    out = torch.zeros(*patterns.shape[:2], n, n, dtype=torch.float64)
    for i, asking in enumerate(trace.spans):
        for j, asked in enumerate(trace.spans):
            for q in range(asking.start, asking.end):
                for k in range(asked.start, asked.end):
                    out[:, :, i, j] += patterns[:, :, q, k] / (asking.end - asking.start)
    return out


def planted(trace, weight) -> torch.Tensor:
    """One head's rows, as the stream hands them over, with `weight(i, j)` per token of sentence j."""
    n = len(trace.spans)
    rows = torch.zeros(1, n, n + len(ELSEWHERE))
    for i in range(n):
        for j in range(i):
            rows[0, i, j] = weight(i, j) * (trace.spans[j].end - trace.spans[j].start)
    return rows


def summed(traces, weight) -> PairSums:
    sums = PairSums(BEHAVIORS)
    for t, trace in enumerate(traces):
        sums.add(trace, pair_sums(trace, planted(trace, lambda i, j, t=t: weight(t, i, j)), BEHAVIORS)[None])
    return sums


@pytest.fixture(scope="module")
def analysis():
    path = Path(__file__).resolve().parent.parent / "analyses" / "backtracking_heads.py"
    spec = importlib.util.spec_from_file_location("analysis_backtracking_heads", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(organism, analysis):
    """Chains that the organism's grammar wrote."""
    return [c.trace for c in analysis.write(organism, 6, seed=3)]


# Sentences of one trace


@pytest.mark.parametrize("family", FAMILIES)
def test_sentence_attention_is_the_slow_sum_and_rows_add_to_one(tiny_model, family):
    model, trace = tiny_model(family), chain(0)
    found = sentence_attention(model, trace)
    truth = slow_values(whole_patterns(model, trace), trace)
    torch.testing.assert_close(found.values.double(), truth, rtol=1e-4, atol=1e-6)
    total = found.values.sum(-1) + found.elsewhere.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert not found.values.triu(1).any()  # nobody sees what comes later
    assert found.labels == tuple(span.label for span in trace.spans)
    assert found.texts[0] == trace.response[trace.spans[0].char_start : trace.spans[0].char_end]
    assert found.lengths == tuple(span.end - span.start for span in trace.spans)
    assert not foreign_hooks(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_gives_what_single_traces_give(tiny_model, family):
    model = tiny_model(family)
    traces = [chain(i, n_spans=n, n_prompt=p) for i, (n, p) in enumerate([(3, 4), (9, 12), (5, 3), (1, 6)])]
    traces.insert(2, replace(traces[0], spans=()))  # left out
    found = dict(stream_attention(model, traces, lambda _, rows: rows, batch_size=3))
    assert sorted(found) == [0, 1, 3, 4]
    for i, rows in found.items():
        alone = sentence_attention(model, traces[i])
        torch.testing.assert_close(rows, torch.cat([alone.values, alone.elsewhere], -1), rtol=1e-4, atol=1e-6)


def test_what_is_in_no_sentence_is_sorted_into_sink_template_prompt_and_rest(organism, written):
    trace = replace(written[0], spans=written[0].spans[1:])
    queries, keys = _groups(organism, trace)
    n = len(trace.spans)
    text = {
        name: organism.tokenizer.decode([t for t, c in zip(trace.ids, keys.argmax(1), strict=True) if c == n + k])
        for k, name in enumerate(ELSEWHERE)
    }
    assert text["sink"] == "<|im_start|>"
    assert text["template"] == "user\n<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert text["prompt"] == trace.task.prompt
    assert text["rest"].startswith("We need") or "." in text["rest"].split("\n")[0]  # the sentence that has no span
    assert "</think>" in text["rest"]
    assert (keys.sum(1) == 1).all()
    torch.testing.assert_close(queries.sum(1), torch.ones(n))


def test_prefill_and_closed_thinking_belong_to_the_template(organism, written):
    task = written[0].task
    prompt = models.chat_text(organism, task.prompt, thinking=False) + "Answer:"
    ids = tuple(models.encode(organism, prompt))
    trace = replace(written[0], prompt=prompt, prompt_ids=ids, prefill="Answer:", spans=())
    trace = replace(trace, spans=(Span("deduction", len(ids), len(ids) + 2, 0, 2),))
    _, keys = _groups(organism, trace)
    column = 1 + ELSEWHERE.index("prompt")
    assert (
        organism.tokenizer.decode([t for t, c in zip(ids, keys.argmax(1), strict=False) if c == column]) == task.prompt
    )


def test_one_layer_and_head_and_the_table(tiny_model):
    model, trace = tiny_model("qwen2"), chain(1, n_spans=4)
    every, some = sentence_attention(model, trace), sentence_attention(model, trace, layers=[2])
    torch.testing.assert_close(some.at(2, 1), every.at(2, 1))
    table = every.to_dataframe()
    assert len(table) == 4 * every.values.shape[1] * 10
    row = table[(table.layer == 3) & (table["head"] == 1) & (table["query"] == 3) & (table.key == 2)].iloc[0]
    assert row.mass == pytest.approx(float(every.values[3, 1, 3, 2]))
    assert (row.query_label, row.key_label) == (trace.spans[3].label, trace.spans[2].label)
    with pytest.raises(LensteerError, match=r"no head 9 of layer 2.*layers \[2\] with heads 0 to 3"):
        some.at(2, 9)


def test_what_cannot_be_streamed_is_refused(tiny_model):
    model, trace = tiny_model("qwen2"), chain(0)
    with pytest.raises(LensteerError, match="'chain-0/0' has no spans"):
        sentence_attention(model, replace(trace, spans=()))
    for options, message in (
        (dict(layers=[]), r"layers=\[\]"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(layers=[7]), "no layer 7"),
    ):
        with pytest.raises(LensteerError, match=message):
            list(stream_attention(model, [trace], lambda _, rows: rows, **options))
    assert not foreign_hooks(model)


def test_attention_that_is_not_finite_names_layer_and_trace(tiny_model):
    model = tiny_model("qwen2")
    spoil = ("blocks.1.hook_resid_post", lambda resid, hook: resid * math.nan)
    with (
        model.hooks(fwd_hooks=[spoil]),
        pytest.raises(LensteerError, match="layer 2 is not finite in trace 'chain-0/0'"),
    ):
        sentence_attention(model, chain(0))
    assert not foreign_hooks(model)


def test_only_one_pattern_lives_at_a_time(tiny_model):
    import weakref

    model, alive, seen = tiny_model("qwen2"), [], []

    def watch(pattern, hook):
        seen.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(pattern))

    hooks = [(f"blocks.{i}.attn.hook_pattern", watch) for i in range(4)]
    with model.hooks(fwd_hooks=hooks):
        list(stream_attention(model, [chain(0), chain(1)], lambda _, rows: rows[:, :1], batch_size=2))
    assert len(seen) == 4
    assert max(seen) <= 1


# Steering


def test_a_plan_is_read_as_if_it_were_on_and_sees_each_prompt(tiny_model, random_direction):
    model = tiny_model("qwen2")
    plan = SteeringPlan(random_direction(model), 1, 1.0, positions.generated)
    traces = [chain(0, n_prompt=9), chain(1, n_spans=5, n_prompt=4)]
    found = dict(stream_attention(model, traces, lambda _, rows: rows, batch_size=2, plan=plan))
    for i, trace in enumerate(traces):
        with plan.on(model, prompt_length=trace.prompt_length):
            truth = slow_values(whole_patterns(model, trace), trace)
            within = sentence_attention(model, trace)
        rows = found[i][..., : len(trace.spans)]
        torch.testing.assert_close(rows.double(), truth, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(within.values, sentence_attention(model, trace, plan=plan).values)
        plain = sentence_attention(model, trace)
        torch.testing.assert_close(plain.values[:2], rows[:2], rtol=1e-4, atol=1e-6)  # the edit is behind layer 1
        assert (plain.values[2:] - rows[2:]).abs().max() > 1e-3
    assert not foreign_hooks(model)


def test_changes_under_a_plan_are_steered_less_unsteered(tiny_model, random_direction):
    model, traces = tiny_model("llama"), [chain(i) for i in range(5)]
    plan = SteeringPlan(random_direction(model), 0, 1.0)
    change, plain = (behavior_attention(model, traces, plan=p) for p in (plan, None))
    with plan.on(model):
        steered = behavior_attention(model, traces)
    torch.testing.assert_close(change.mass, steered.mass - plain.mass, equal_nan=True, atol=1e-6, rtol=1e-4)
    assert change.change
    assert not plain.change
    assert change.lift.nan_to_num().abs().max() > 0.01
    assert ((change.low <= change.lift) & (change.lift <= change.high)).sum() == change.low.isfinite().sum()
    heads = [receiver_heads(model, traces, plan=p) for p in (plan, None)]
    with plan.on(model):
        under = receiver_heads(model, traces)
    torch.testing.assert_close(heads[0].kurtosis, under.kurtosis - heads[1].kurtosis, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(heads[0].relative, under.relative - heads[1].relative, atol=1e-4, rtol=1e-4)
    off = SteeringPlan(random_direction(model), 0, 0.0)
    assert behavior_attention(model, traces, plan=off).lift.nan_to_num().abs().max() == 0
    assert receiver_heads(model, traces, plan=off).kurtosis.abs().max() == 0


# Behaviors


def test_lift_is_the_slow_ratio_of_observed_and_expected(tiny_model):
    model, traces = tiny_model("qwen2"), [chain(i, n_spans=4 + 3 * i) for i in range(4)]
    found = behavior_attention(model, traces, layers=[1, 3], batch_size=3)
    per_token = []
    for trace in traces:
        lengths = torch.tensor([span.end - span.start for span in trace.spans])
        per_token.append(slow_values(whole_patterns(model, trace), trace)[[1, 3]] / lengths)

    def cell(i, j):
        return sum(i - j >= b for b in BINS), sum(i >= b for b in BINS)

    pairs = [(t, i, j) for t, trace in enumerate(traces) for i in range(len(trace.spans)) for j in range(i)]
    by_cell = {}
    for t, i, j in pairs:
        by_cell.setdefault(cell(i, j), []).append(per_token[t][..., i, j])
    mean = {key: torch.stack(values).mean(0) for key, values in by_cell.items()}
    for a, query in enumerate(BEHAVIORS):
        for b, key in enumerate(BEHAVIORS):
            own = [
                (t, i, j) for t, i, j in pairs if traces[t].spans[i].label == query and traces[t].spans[j].label == key
            ]
            assert int(found.n_pairs[a, b]) == len(own)
            if own:
                observed = sum(per_token[t][..., i, j] for t, i, j in own)
                expected = sum(mean[cell(i, j)] for _, i, j in own)
                torch.testing.assert_close(found.lift[..., a, b], observed / expected, rtol=1e-4, atol=1e-5)
            else:
                assert found.lift[..., a, b].isnan().all()
                assert found.mass[..., a, b].isnan().all()


def test_attention_by_place_alone_is_no_effect_and_a_planted_one_is_found():
    rng = random.Random(0)
    # Backtracking comes late and follows uncertainty: nearness and lateness alone would look like an effect.
    traces = []
    for seed in range(40):
        trace, labels = chain(seed, n_spans=20), []
        for i in range(20):
            late = rng.random() < i / 25
            labels.append("backtracking" if late and labels[-1] == BEHAVIORS[UNCERTAIN] else BEHAVIORS[UNCERTAIN])
            if labels[-1] == BEHAVIORS[UNCERTAIN] and rng.random() < 0.3:
                labels[-1] = "deduction"
        traces.append(
            replace(trace, spans=tuple(replace(s, label=x) for s, x in zip(trace.spans, labels, strict=True)))
        )

    def by_place(t, i, j):
        return (1 + (i - j == 1)) / (1 + (i > 8))

    found = summed(traces, by_place).result([0])
    some = found.n_pairs > 0
    ones = torch.ones(int(some.sum()), dtype=torch.float64)
    torch.testing.assert_close(found.lift[0, 0][some], ones, rtol=1e-5, atol=0)  # of fp32 sums

    def drawn(t, i, j):
        labels = [traces[t].spans[k].label for k in (i, j)]
        noise = random.Random(f"{t} {i} {j}").uniform(0.5, 1.5)
        return by_place(t, i, j) * noise * (3 if labels == ["backtracking", "deduction"] else 1)

    found = summed(traces, drawn).result([0])
    lift, low = found.lift[0, 0], found.low[0, 0]
    ded = BEHAVIORS.index("deduction")
    assert low[BACK, ded] > 2
    others = some.clone()
    others[BACK, ded] = False
    assert (lift[others] < 1.25).all()


@pytest.mark.medium
def test_intervals_of_lift_hold_their_level_where_nothing_is_planted():
    traces = [chain(seed, n_spans=15) for seed in range(30)]
    missed = total = 0
    for head in range(15):
        found = summed(traces, lambda t, i, j, h=head: random.Random(f"{h} {t} {i} {j}").expovariate(1)).result([0])
        some = found.low.isfinite()
        missed += int(((found.low > 1) | (found.high < 1))[some].sum())
        total += int(some.sum())
    assert total >= 350
    assert missed / total < 0.1  # 95 % intervals; the common pairs' are wide


def test_sums_merge_into_those_of_the_whole():
    traces = [chain(seed) for seed in range(6)]

    def weight(t, i, j):
        return (1 + t) / (1 + i + 2 * j)

    whole, first, second = summed(traces, weight), summed(traces[:2], weight), PairSums(BEHAVIORS)
    for t in range(2, 6):
        second.add(
            traces[t], pair_sums(traces[t], planted(traces[t], lambda i, j, t=t: weight(t, i, j)), BEHAVIORS)[None]
        )
    first.merge(second)
    one, other = whole.result([0]), first.result([0])
    for name in ("lift", "low", "high", "mass"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), equal_nan=True)


def test_heads_of_a_pair_are_ranked_by_the_sure_end_of_the_interval(tiny_model):
    found = behavior_attention(tiny_model("qwen2"), [chain(i) for i in range(6)])
    low = found.low[..., BACK, 1].clone()
    low[2, 3], low[1, 0], low[0, 1] = 9.0, 8.0, 7.0
    planted_low = found.low.clone()
    planted_low[..., BACK, 1] = low
    assert replace(found, low=planted_low).top("backtracking", "deduction", 3) == [(2, 3), (1, 0), (0, 1)]
    zeros = torch.zeros_like(found.low)
    low, high = zeros - 0.1, zeros + 0.1
    low[1, 2, BACK, 1], high[1, 2, BACK, 1] = -5, -4
    low[3, 0, BACK, 1], high[3, 0, BACK, 1] = 1, 9
    low[0, 0, BACK, 1], high[0, 0, BACK, 1] = -9, 9
    change = replace(found, low=low, high=high, change=True)
    assert change.top("backtracking", "deduction", 2) == [(1, 2), (3, 0)]
    with pytest.raises(LensteerError, match="unknown behavior 'musing'"):
        found.top("musing", "deduction")
    table = found.to_dataframe()
    row = table[
        (table.layer == 2) & (table["head"] == 1) & (table["query"] == "backtracking") & (table.key == "deduction")
    ]
    assert float(row.lift.iloc[0]) == pytest.approx(float(found.lift[2, 1, BACK, 1]))
    assert int(row.n_pairs.iloc[0]) == int(found.n_pairs[BACK, 1])


def test_behaviors_need_a_pair_of_sentences(tiny_model):
    with pytest.raises(LensteerError, match="none of 1 traces has two annotated sentences"):
        behavior_attention(tiny_model("qwen2"), [chain(0, n_spans=1)])


def test_averages_leave_out_what_has_no_weight():
    values = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    mean, low, high = averaged(values, weights)
    assert mean[:2].tolist() == [2.0, 2.0]
    assert low[0] <= mean[0] <= high[0]
    assert low[1:].isnan().all()  # one trace has no interval
    assert mean[2].isnan()


# Receiver heads


def test_what_sentences_receive_is_the_mean_over_later_ones():
    values = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0)).tril()
    for nearest in (1, 4):
        slow = torch.stack([values[:, j + nearest :, j].mean(1) for j in range(9 - nearest)], 1)
        torch.testing.assert_close(received(values, nearest), slow)
    assert received(values, 9).shape == (2, 0)
    with pytest.raises(LensteerError, match="nearest=0"):
        received(values, 0)


def test_kurtosis_is_scipys():
    from scipy.stats import kurtosis

    values = torch.rand(3, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(excess_kurtosis(values), kurtosis(values.numpy(), axis=1), rtol=1e-9)
    assert excess_kurtosis(torch.ones(2, 5)).isnan().all()


def test_receiver_scores_are_those_of_single_traces(tiny_model):
    from scipy.stats import kurtosis

    model, traces = tiny_model("qwen3"), [chain(i, n_spans=n) for i, n in enumerate([12, 7, 9, 15])]
    found = receiver_heads(model, traces, batch_size=3)
    assert (found.n_traces, found.n_left_out) == (3, 1)
    scores, sums = [], torch.zeros(4, 4, len(BEHAVIORS), dtype=torch.float64)
    for trace in (traces[0], traces[2], traces[3]):
        got = sentence_attention(model, trace).received().double()
        assert got[..., -4:].isnan().all()
        got = got[..., :-4]
        scores.append(kurtosis(got.numpy(), axis=-1))
        for j, span in enumerate(trace.spans[:-4]):
            sums[..., BEHAVIORS.index(span.label)] += got[..., j] / got.mean(-1)
    np.testing.assert_allclose(found.kurtosis, np.mean(scores, axis=0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.relative.sum(0), sums, rtol=1e-3, atol=1e-3)
    assert ((found.low <= found.kurtosis) & (found.kurtosis <= found.high)).all()
    heads = [(0, 1), (2, 3)]
    table = found.broadcasting(heads).set_index("behavior")
    expected = (sums[0, 1, BACK] + sums[2, 3, BACK]) / 2 / found.counts[:, BACK].sum()
    assert table.received["backtracking"] == pytest.approx(float(expected), rel=1e-3)
    assert table.n["backtracking"] == int(found.counts[:, BACK].sum())
    assert table.low["backtracking"] <= table.received["backtracking"] <= table.high["backtracking"]


def test_a_planted_receiver_head_and_its_broadcast_are_found(tiny_model):
    rng = random.Random(0)
    traces = [chain(seed, n_spans=20) for seed in range(8)]
    hub = "uncertainty-estimation"
    model = tiny_model("qwen2")

    def spotlight(pattern, hook):  # head 2 looks at one uncertain sentence, whoever asks
        pattern = pattern.clone()
        for row, trace in enumerate(batch):
            anchor = next(s for s in trace.spans if s.label == hub)
            pattern[row, 2] *= 0.1
            pattern[row, 2, anchor.end :, anchor.start : anchor.end] += 0.9 / (anchor.end - anchor.start)
        return pattern

    rng.shuffle(traces)
    traces = [t for t in traces if any(s.label == hub for s in t.spans[:14])]
    batch = sorted(traces, key=lambda t: len(t.ids))  # the order in which they are run
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", spotlight)]):
        found = receiver_heads(model, traces)
    assert found.top(1) == [(1, 2)]
    table = found.broadcasting([(1, 2)]).set_index("behavior")
    assert table.received.idxmax() == hub
    assert table.low[hub] > table.received.drop(hub).max()
    assert replace(found, kurtosis=-found.kurtosis, change=True).top(1) == [(1, 2)]
    frame = found.to_dataframe()
    assert frame["kurtosis"].idxmax() == 1 * 4 + 2


def test_receiver_heads_refuse_what_cannot_be(tiny_model):
    model = tiny_model("qwen2")
    with pytest.raises(LensteerError, match="longest of 1 traces has 7 sentences: receiver heads need at least 8"):
        receiver_heads(model, [chain(0, n_spans=7)])
    found = receiver_heads(model, [chain(0), chain(1)])
    with pytest.raises(LensteerError, match="no head 4 of layer 0"):
        found.broadcasting([(0, 4)])
    with pytest.raises(LensteerError, match=r"heads=\[\]"):
        found.broadcasting([])


def test_a_head_that_sees_nothing_of_others_has_no_peak():
    trace = chain(0)
    figures = _figures(trace, planted(trace, lambda i, j: 0.0), 4, BEHAVIORS)
    assert figures[0, 0].isnan()
    assert figures[0, 1:].sum() == len(trace.spans) - 4  # every sentence as the average one


# Taking heads out


def test_ablated_heads_read_zero_or_their_mean_and_nothing_else_changes(tiny_model):
    model, traces = tiny_model("llama"), [chain(0), chain(1, n_spans=4)]
    seen = {}
    means = mean_z(model, traces, batch_size=1)
    slow = []
    for trace in traces:
        _, cache = model.run_with_cache(torch.tensor([trace.ids]))
        slow.append(torch.stack([cache[f"blocks.{i}.attn.hook_z"][0, trace.prompt_length :] for i in range(4)]))
    torch.testing.assert_close(means, torch.cat(slow, 1).mean(1), rtol=1e-4, atol=1e-5)
    plain = forward_padded(model, traces)
    for values in (None, means):
        with ablated(model, [(1, 2), (1, 0), (3, 1)], values):
            read = [(f"blocks.{i}.attn.hook_z", lambda z, hook, i=i: seen.update({i: z})) for i in (1, 3)]
            with model.hooks(fwd_hooks=read):
                assert (forward_padded(model, traces) - plain).abs().max() > 1e-3
        wanted = torch.zeros(2, means.shape[2]) if values is None else means[1, [0, 2]]
        torch.testing.assert_close(seen[1][:, :, [0, 2]], wanted.expand_as(seen[1][:, :, [0, 2]]))
        torch.testing.assert_close(seen[1][0, 5:][:, [1, 3]], slow[0][1][:, [1, 3]], rtol=1e-4, atol=1e-5)
    with ablated(model, []):
        torch.testing.assert_close(forward_padded(model, traces), plain)
    torch.testing.assert_close(forward_padded(model, traces), plain)


def test_knocked_out_heads_no_longer_see_and_share_out_the_rest(tiny_model):
    model, trace = tiny_model("qwen2"), chain(0)
    n, seen = len(trace.ids), {}
    cut = torch.zeros(1, n, n, dtype=torch.bool)
    cut[0, 9, 2:5] = True
    cut[0, 3] = True  # sees nothing at all any more
    plain = whole_patterns(model, trace)[2]
    with knocked_out(model, [(2, 1)], cut):
        hooks = [("blocks.2.attn.hook_pattern", lambda p, hook: seen.update(p=p))]
        with model.hooks(fwd_hooks=hooks):
            forward_padded(model, [trace])
    found = seen["p"][0].double()
    kept = [k for k in range(n) if k not in (2, 3, 4)]
    torch.testing.assert_close(found[1, 9, kept], plain[1, 9, kept] / plain[1, 9, kept].sum(), rtol=1e-4, atol=1e-6)
    assert not found[1, 9, 2:5].any()
    assert not found[1, 3].any()
    same = [q for q in range(n) if q not in (3, 9)]
    torch.testing.assert_close(found[1, same], plain[1, same], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[[0, 2, 3]], plain[[0, 2, 3]], rtol=1e-4, atol=1e-6)
    with (
        pytest.raises(LensteerError, match=r"cut has shape \[1, 2, 2\].*\[1, \d+, \d+\]"),
        knocked_out(model, [(2, 1)], cut[:, :2, :2]),
    ):
        forward_padded(model, [trace])
    assert not foreign_hooks(model)


def test_heads_come_back_after_an_exception(tiny_model):
    model, trace = tiny_model("qwen2"), chain(0)
    plain = forward_padded(model, [trace])
    with pytest.raises(ZeroDivisionError), ablated(model, [(0, 0)]):
        _ = 1 / 0
    cut = torch.ones(1, len(trace.ids), len(trace.ids), dtype=torch.bool)
    with pytest.raises(ZeroDivisionError), knocked_out(model, [(0, 0)], cut):
        _ = 1 / 0
    assert not foreign_hooks(model)
    torch.testing.assert_close(forward_padded(model, [trace]), plain)
    for broken, message in (((9, 0), "no layer 9"), ((0, 4), "no head 4: layers of this model have heads 0 to 3")):
        with pytest.raises(LensteerError, match=message), ablated(model, [broken]):
            pass
    with pytest.raises(LensteerError, match="1 traces have no token after their prompts"):
        mean_z(model, [replace(trace, response_ids=(), offsets=(), spans=())])


# Figures


def test_the_heat_map_shows_one_head_with_behaviors_on_both_axes(tiny_model):
    attention = sentence_attention(tiny_model("qwen2"), chain(0, n_spans=6))
    figure = plots.sentence_attention(attention, 2, 1)
    grid, *marks = figure.data
    for i in range(6):
        for j in range(6):
            expected = float(attention.at(2, 1)[i, j])
            assert grid.z[i][j] == (pytest.approx(expected) if j <= i else None)
    assert attention.labels[3] in grid.customdata[3][2]
    assert "tokens" in grid.customdata[3][2]
    assert {m.marker.color for m in marks} == {plots.color(label) for label in attention.labels}
    assert sum(len(m.x) for m in marks) == 12  # every sentence on both axes
    assert "on prompt" in marks[0].customdata[0]
    assert "key sentence" in figure.layout.xaxis.title.text
    assert "head 1 of layer 2" in figure.layout.title.text
    with pytest.raises(LensteerError, match="no head 7 of layer 2"):
        plots.sentence_attention(attention, 2, 7)


def test_head_maps_show_scores_with_their_intervals(tiny_model, random_direction):
    model, traces = tiny_model("qwen2"), [chain(i) for i in range(4)]
    receivers = receiver_heads(model, traces, layers=[1, 3])
    figure = plots.head_map(receivers, heads=receivers.top(2))
    assert figure.data[0].z[1][2] == pytest.approx(float(receivers.kurtosis[1, 2]))
    assert f"{float(receivers.low[1, 2]):.3g} to {float(receivers.high[1, 2]):.3g}" in figure.data[0].customdata[1][2]
    assert "n = 4 traces" in figure.data[0].customdata[1][2]
    assert len(figure.data[1].x) == 2
    assert list(figure.layout.yaxis.ticktext) == ["1", "3"]
    behaviors = behavior_attention(model, traces)
    figure = plots.head_map(behaviors, ("backtracking", "deduction"))
    assert figure.data[0].z[1][2] == pytest.approx(math.log2(float(behaviors.lift[1, 2, BACK, 1])))
    assert f"n = {int(behaviors.n_pairs[BACK, 1])} pairs" in figure.data[0].customdata[0][0]
    assert figure.data[0].zmax == -figure.data[0].zmin  # no effect, a logarithm of 0, is in the middle
    change = receiver_heads(model, traces, plan=SteeringPlan(random_direction(model), 0))
    assert plots.head_map(change).layout.title.text.startswith("Change under steering: kurtosis")
    with pytest.raises(LensteerError, match="receiver heads have one score each"):
        plots.head_map(receivers, ("backtracking", "deduction"))
    for pair in (None, ("backtracking", "musing")):
        with pytest.raises(LensteerError, match="give query and key behavior"):
            plots.head_map(behaviors, pair)


def test_the_behavior_matrix_shows_multiples_intervals_and_pairs(tiny_model, random_direction):
    model, traces = tiny_model("qwen2"), [chain(i) for i in range(5)]
    found = behavior_attention(model, traces)
    figure = plots.behavior_attention(found, 1, 3)
    lift = float(found.lift[1, 3, BACK, 1])
    assert figure.data[0].text[BACK][1].rstrip("*") == f"{lift:.2f}"
    assert figure.data[0].z[BACK][1] == pytest.approx(math.log2(lift))
    assert f"n = {int(found.n_pairs[BACK, 1])} pairs of sentences, 5 traces" in figure.data[0].customdata[BACK][1]
    assert f"{float(found.low[1, 3, BACK, 1]):.3g} to" in figure.data[0].customdata[BACK][1]
    assert figure.data[0].text[0][0] == ""  # no initializing sentence
    sure = replace(found, low=found.lift * 0 + 1.5, high=found.lift * 0 + 2)
    assert plots.behavior_attention(sure, 1, 3).data[0].text[BACK][1].endswith("*")
    change = behavior_attention(model, traces, plan=SteeringPlan(random_direction(model), 0))
    assert plots.behavior_attention(change, 1, 3).data[0].text[BACK][1][0] in "+−"
    with pytest.raises(LensteerError, match="no head 4 of layer 1"):
        plots.behavior_attention(found, 1, 4)


# The analysis


def test_the_analysis_finds_returns_steps_and_nodes(organism, analysis, written):
    for trace in written:
        read = analysis.read(trace)
        assert read.returns
        for r in read.returns:
            text = trace.response[trace.spans[r.sentence].char_start : trace.spans[r.sentence].char_end]
            y = analysis.NODE.findall(text)[-1]
            assert organism.tokenizer.decode([trace.ids[r.position + 1]]).strip() == y
            assert read.kinds[r.position + 1] == "y"
            for i in (*r.right, *r.wrong):
                span = trace.spans[i]
                source, _ = analysis.NODE.findall(trace.response[span.char_start : span.char_end])
                assert (source == y) == (i in r.right)
                assert i < r.sentence
        assert {"node", "word"} <= set(read.kinds.values())
        mask = analysis.cut([read], len(trace.ids), True)[0]
        r = read.returns[0]
        right = {p for i in r.right for p in range(trace.spans[i].start, trace.spans[i].end)}
        assert set(mask[r.position].nonzero()[:, 0].tolist()) == right
        wrong = analysis.cut([read], len(trace.ids), False)[0, r.position].nonzero()[:, 0].tolist()
        assert not right & set(wrong)


def test_the_ranking_finds_a_planted_head(organism, analysis):
    chains = analysis.write(organism, 10, seed=5)

    def planted_head(pattern, hook):
        pattern = pattern.clone()
        for row, c in enumerate(batch):
            for r in c.returns:
                pattern[row, 3, r.position] *= 0.1
                spans = [c.trace.spans[i] for i in r.right]
                for s in spans:
                    pattern[row, 3, r.position, s.start : s.end] += 0.9 / len(spans) / (s.end - s.start)
        return pattern

    batch = sorted(chains, key=lambda c: len(c.trace.ids))
    with organism.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", planted_head)]):
        best = analysis.rank(organism, chains, analysis.Config())[0]
    assert (best.layer, best.head) == (2, 3)
    assert best.low <= best.score <= best.high
    assert best.attention > 0.85


@pytest.mark.medium
def test_the_analysis_runs_and_its_figures_fit_together(analysis):
    result = analysis.main(analysis.Config(n=6, sizes=(2,), n_controls=1))
    assert result.n_chains == (3, 3)
    assert len(result.ranking) == 32
    assert [e.what.split(" top")[0] for e in result.effects[:2]] == ["zero ablation of the", "mean ablation of the"]
    assert result.effects[0].heads == tuple((h.layer, h.head) for h in result.ranking[:2])
    for e in result.effects:
        assert e.y_low <= e.y <= e.y_high
        assert 0 <= e.right_low <= e.right <= e.right_high <= 1
    assert "of 1 reduce y as much" in result.effects[0].against_random
    assert "of 1 reduce y as much" in result.effects[2].against_random  # the cut, too, against random heads
    assert analysis.table(result).count("\n") == 2 + 10 + 3 + len(result.effects)
