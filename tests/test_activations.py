"""Streamed features against one trace at a time with all activations kept; windows at every edge."""

from __future__ import annotations

import random
import weakref
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import pytest
import torch

from lensteer import activations, models
from lensteer.activations import Window, stream_features
from lensteer.behaviors import STEERED, Span
from lensteer.errors import LensteerError
from lensteer.tasks import Task
from lensteer.traces import Trace
from lensteer.twins import plain_twin
from reference import kept_activations, window_positions

WINDOWS = ("onset", "onset±2", "onset-2", "onset+2", "span", "published")


def make_trace(rng: random.Random, number: int, labels=STEERED, n_prompt=4, n_spans=5) -> Trace:
    """A trace of random tokens whose spans follow one another; some are longer than the published window."""
    position, spans = n_prompt, []
    for _ in range(n_spans):
        end = position + rng.choice([1, 2, 4, 15])
        spans.append(Span(rng.choice(labels), position, end, position - n_prompt, end - n_prompt))
        position = end
    n_response = position - n_prompt + rng.choice([0, 3])
    return Trace(
        task=Task(f"task-{number}", "random", "train", "?"),
        prompt="?" * n_prompt,
        response="." * n_response,
        prompt_ids=tuple(rng.randrange(5, 250) for _ in range(n_prompt)),
        response_ids=tuple(rng.randrange(5, 250) for _ in range(n_response)),
        offsets=tuple(range(n_response)),
        finished=True,
        spans=tuple(spans),
    )


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return models.load_model(tiny_checkpoint("qwen2"))


@pytest.fixture(scope="module")
def traces():
    rng = random.Random(0)
    made = [make_trace(rng, i, n_prompt=rng.choice([2, 6]), n_spans=rng.choice([1, 3, 6])) for i in range(7)]
    bare = make_trace(rng, 7)
    made.insert(3, Trace(**{**vars(bare), "spans": ()}))
    return made


@pytest.mark.medium
@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_streamed_features_are_those_of_one_trace_at_a_time(tiny_checkpoint, traces, family, batch_size):
    model = models.load_model(tiny_checkpoint(family))
    seen = []
    for features in stream_features(model, traces, windows=WINDOWS, batch_size=batch_size):
        trace = traces[features.index]
        seen.append(features.index)
        assert features.labels == tuple(span.label for span in trace.spans)
        assert features.layers == (0, 1, 2, 3)
        acts = kept_activations(model, trace)
        for w, window in enumerate(WINDOWS):
            for s, span in enumerate(trace.spans):
                positions = window_positions(span, window, len(trace.ids))
                truth = acts[:, positions].mean(1)
                torch.testing.assert_close(features.spans[w, s].double(), truth, rtol=1e-4, atol=1e-4)  # fp32
                assert int(features.lengths[w, s]) == len(positions)
        begin, end = trace.spans[0].start, trace.spans[-1].end
        assert features.n_tokens == end - begin
        truth = acts[:, begin:end].mean(1)
        torch.testing.assert_close(features.tokens.double(), truth, rtol=1e-4, atol=1e-4)
    assert sorted(seen) == [0, 1, 2, 4, 5, 6, 7]  # the fourth has no spans


def test_layers_are_those_asked_for(model, traces):
    every = {f.index: f.spans for f in stream_features(model, traces)}
    for layers in ([2], [3, 1], [0, 1]):
        for features in stream_features(model, traces, layers=layers):
            assert features.layers == tuple(layers)
            torch.testing.assert_close(features.spans, every[features.index][:, :, layers], rtol=1e-4, atol=1e-4)


def test_keys_follow_the_trace_not_its_place(model, traces):
    forward = {f.index: f.key for f in stream_features(model, traces)}
    backward = {len(traces) - 1 - f.index: f.key for f in stream_features(model, traces[::-1], batch_size=2)}
    assert forward == backward
    assert len(set(forward.values())) == len(forward)


def test_one_layer_of_one_batch_is_held_and_no_logits(model, traces):
    twin: Any = plain_twin(model)
    outputs, alive, logits = [], [], []

    def watch(_module, _inputs, output):
        resid = output[0] if isinstance(output, tuple) else output
        alive.append(sum(ref() is not None for ref in outputs))
        outputs.append(weakref.ref(resid))

    handles = [layer.register_forward_hook(watch) for layer in twin.model.layers]
    handles += [module.register_forward_hook(lambda *_: logits.append(1)) for module in (twin.model.norm, twin.lm_head)]
    made = list(stream_features(model, traces, batch_size=3))
    for handle in handles:
        handle.remove()
    assert len(made) == 7
    assert len(outputs) >= 4 * 3  # of every batch, every layer
    assert max(alive) == 1  # the block's input, while its output is made
    assert logits == []


def test_blocks_above_the_last_layer_do_not_run(model, traces):
    ran = []
    twin: Any = plain_twin(model)
    blocks = twin.model.layers
    handles = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    list(stream_features(model, traces, layers=[2, 1], batch_size=3))
    for handle in handles:
        handle.remove()
    assert set(ran) == {0, 1, 2}


@pytest.mark.parametrize("seed", range(5))
def test_both_ways_to_average_agree(seed):
    rng = random.Random(seed)
    width = rng.randint(3, 40)

    def a_range():
        begin = rng.randrange(width)
        return begin, rng.randint(begin + 1, width)

    ranges = [[a_range() for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 4))]
    resid = torch.randn(len(ranges), width, 5, generator=torch.Generator().manual_seed(seed))
    truth = torch.stack([resid[row, b:e].mean(0) for row, each in enumerate(ranges) for b, e in each])
    for way in (activations._bag_means, activations._dense_means):
        torch.testing.assert_close(way(ranges, width)(resid), truth)


@pytest.mark.parametrize("seed", range(5))
def test_batches_hold_every_text_once_and_little_padding(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, rng.choice([20, 200, 900])) for _ in range(60)]
    made = list(activations.batches(lengths, 8, 512))
    assert sorted(i for batch in made for i in batch) == list(range(60))
    assert max(map(len, made)) == 8
    for batch in made:
        width = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * width <= 512
        assert all(width - lengths[i] <= max(0.1 * width, 16) for i in batch)
    assert list(activations.batches([600, 600], 8, 512)) == [[0], [1]]
    assert list(activations.batches([100, 90, 89], 8, 512)) == [[0, 1, 2]]  # 11 tokens are few
    assert list(activations.batches([200, 180, 179], 8, 512)) == [[0, 1], [2]]
    assert list(activations.batches([], 8, 512)) == []


def test_no_hook_stays(model, traces):
    def hooks():
        return sum(len(point.fwd_hooks) for point in model.hook_dict.values())

    before = hooks()
    stream = stream_features(model, traces, batch_size=2)
    assert isinstance(stream, Generator)
    next(stream)
    assert hooks() == before  # between two batches, too
    assert torch.is_grad_enabled()
    stream.close()
    assert hooks() == before


def test_windows_at_the_edges():
    span = Span("backtracking", 3, 5, 0, 2)
    assert {w: Window.parse(w).bounds(span, 6) for w in (*WINDOWS, "onset+-1", "onset±9", "onset±0")} == {
        "onset": (2, 3),
        "onset±2": (1, 5),  # not position 0
        "onset-2": (1, 3),
        "onset+2": (2, 5),
        "span": (2, 5),
        "published": (2, 4),  # the published code leaves out the last token
        "onset+-1": (1, 4),
        "onset±9": (1, 6),  # not beyond the trace
        "onset±0": (2, 3),
    }
    assert Window.parse("published").bounds(Span("backtracking", 3, 90, 0, 9), 95) == (2, 13)
    for spec, name in {"onset+-2": "onset±2", "onset-2": "onset-2", "onset+2": "onset+2", "onset+0": "onset"}.items():
        assert str(Window.parse(spec)) == name
    assert str(Window.parse("span")) == "span"
    assert Window.parse("span").bounds(Span("backtracking", 1, 2, 0, 1), 6) == (1, 2)
    with pytest.raises(LensteerError, match="nothing but position 0"):
        Window.parse("onset").bounds(Span("backtracking", 1, 2, 0, 1), 6)


@pytest.mark.parametrize("spec", ["offset", "onset±", "onset-", "onset*2", "onset±-1", "onset±1.5", ""])
def test_an_unknown_window_lists_the_choices(spec):
    with pytest.raises(LensteerError, match=r"unknown window .*'onset', 'onset±k' .*'span' or 'published'"):
        Window.parse(spec)


def test_bad_input_is_named(model, traces):
    with pytest.raises(LensteerError, match="layer 4"):
        list(stream_features(model, traces, layers=[4]))
    with pytest.raises(LensteerError, match="batch_size=0"):
        list(stream_features(model, traces, batch_size=0))
    other = replace(traces[0], prompt_ids=(10**6,) * traces[0].prompt_length)
    with pytest.raises(LensteerError, match=r"the token id 1000000: .* has 0 to \d+, so the text is of another"):
        list(stream_features(model, [other]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_layer_and_trace(tiny_checkpoint, traces, bad):
    model = models.load_model(tiny_checkpoint("qwen2", seed=1))
    number = 5
    lengths = [len(t.ids) for t in traces if t.spans]
    order = sorted((i for i, t in enumerate(traces) if t.spans), key=lambda i: -len(traces[i].ids))
    made = [[order[i] for i in batch] for batch in activations.batches(sorted(lengths, reverse=True), 8, 4096)]
    (batch,) = [batch for batch in made if number in batch]
    passes = []

    def poison(resid, hook):
        passes.append(resid.shape)
        if len(passes) == 1 + made.index(batch):
            resid = resid.clone()
            resid[batch.index(number), traces[number].spans[0].start] = bad
        return resid

    with (
        model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", poison)]),
        pytest.raises(LensteerError, match=r"layer 2 are not finite in trace 5 \(task 'task-4'\)"),
    ):
        list(stream_features(model, traces, windows=WINDOWS, batch_size=8))
