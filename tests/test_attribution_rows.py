"""Rows over a shared cache: chains against full forwards, sliding windows, refusals, noise, hooks and what is left."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lensteer import models, twins
from lensteer.attribution import attribute
from lensteer.attribution.estimators import exact_cells
from lensteer.attribution.rows import MAX_ROWS, Rows, SharedCache, row_edits, rows_per_forward
from lensteer.errors import LensteerError
from reference import patched_forward_kl
from test_attribution import N_LAYERS, NOISE, close, no_hook_is_left, trace_of, vectors_for

IDS = trace_of(40, [], seed=5).ids
FAMILIES = ["qwen2", "llama", "qwen3", "gemma3"]


@pytest.fixture(scope="module")
def traces():
    return [trace_of(30, [("deduction", 6, 9), ("backtracking", 9, 14), ("uncertainty-estimation", 14, 30)], seed=1)]


def test_rows_of_chains():
    rows = Rows.of(torch.tensor([7, 2]), torch.tensor([8, 5]))
    assert rows.position.tolist() == [7, 2, 3, 4]
    assert rows.chain.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)  # Gemma's windows are 8 tokens, shorter than the text and one chain
def test_chains_reproduce_the_full_forward(tiny_model, family):
    model = tiny_model(family)
    begin, end = torch.tensor([0, 3, 12, 39, 20, 21]), torch.tensor([1, 8, 30, 40, 21, 24])
    rows = Rows.of(begin, end)
    cache = SharedCache(model, IDS, rows.position)
    with torch.no_grad():
        found = cache.run(rows)
        full = model(torch.tensor([IDS]))[0]
    torch.testing.assert_close(found, full[rows.position], rtol=1e-4, atol=1e-4)
    cache.check(rows.position, found)
    assert 0 <= cache.noise_floor < NOISE
    assert (cache.n_forwards, cache.n_rows) == (2, len(rows.position))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_sees_what_was_added_earlier_in_it_and_no_other_does(tiny_model, family):
    model = tiny_model(family)
    rows = Rows.of(torch.tensor([10, 10, 14]), torch.tensor([14, 14, 18]))
    added = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    cache = SharedCache(model, IDS, rows.position)
    with torch.no_grad(), row_edits(cache, [1]) as edits:
        plain = cache.run(rows)
        edits[1] = (torch.tensor([4]), added[None])  # the first row of the second chain
        edited = cache.run(rows)

    def patch(resid, hook):
        return resid.index_add(1, torch.tensor([10]), added[None, None])

    with torch.no_grad():
        full = model.run_with_hooks(torch.tensor([IDS]), fwd_hooks=[(models.resid_hook(1), patch)])[0]
    torch.testing.assert_close(edited[4:8], full[10:14], rtol=1e-4, atol=1e-4)
    others = [0, 1, 2, 3, 8, 9, 10, 11]
    torch.testing.assert_close(edited[others], plain[others], rtol=1e-5, atol=1e-5)


def test_a_sliding_window_is_kept_in_rows(tiny_model):
    """What lies further back than the window acts through other layers only; here no layer sees it."""
    model = tiny_model("gemma3", n_layers=1)  # one layer, with a window of 8
    position = torch.tensor([20])
    changed = list(IDS)
    changed[12] = (changed[12] + 1) % 300  # 8 back: outside
    seen = list(IDS)
    seen[13] = (seen[13] + 1) % 300  # 7 back: inside
    rows = Rows.of(position, position + 1)
    with torch.no_grad():
        base, outside, inside = (SharedCache(model, ids, position).run(rows) for ids in (IDS, changed, seen))
    torch.testing.assert_close(outside, base)
    assert (inside - base).abs().max() > 1e-3


def test_rows_per_forward_keeps_to_the_memory(tiny_model):
    model = tiny_model("qwen2")
    assert rows_per_forward(model, 100, 2**30) == MAX_ROWS
    assert rows_per_forward(model, 100, 1) == 1
    few = rows_per_forward(model, 100, 2**20)
    assert 1 < few < MAX_ROWS
    assert rows_per_forward(model, 100, 2**20, samples=8, graph_layers=4) < few


@pytest.mark.parametrize("kind", ["chunked_attention", "linear_attention"])
def test_a_past_that_cannot_be_shared_is_refused_by_name(tiny_checkpoint, traces, kind):
    model = models.load_model(tiny_checkpoint("gemma3", n_layers=N_LAYERS))
    model.original_model.config.attention_chunk_size = 8
    model.original_model.config.layer_types = ["full_attention", kind, "full_attention", "full_attention"]
    with pytest.raises(LensteerError, match=f"layer 1 of this model has '{kind}' and keeps its past in a"):
        attribute(model, traces, vectors_for(model))


def test_an_attention_that_ignores_the_mask_is_noticed(tiny_model, traces, monkeypatch):
    """What a model with its own masks would do: rows see one another."""
    model = tiny_model("qwen2")
    monkeypatch.setattr(SharedCache, "_mask", lambda self, seen: torch.zeros(1, 1, *seen.shape))
    for method in ("exact", "fisher", "fisher_jvp"):
        with pytest.raises(LensteerError, match="does not take a 4-D mask"):
            attribute(model, traces, vectors_for(model), method=method)
        assert no_hook_is_left(model)


def test_a_steering_plan_that_is_on_is_refused(tiny_model, traces, random_direction):
    from lensteer.steering import SteeringPlan

    model = tiny_model("qwen2")
    with (
        SteeringPlan(random_direction(model), layer=1, coefficient=1.0).on(model),
        pytest.raises(LensteerError, match="a steering plan is on"),
    ):
        attribute(model, traces, vectors_for(model))
    assert no_hook_is_left(model)


def test_somebody_elses_hooks_stay_in_force(tiny_model, traces):
    """The model with its MLP of block 2 ablated is another model, and that one is attributed."""
    model = tiny_model("qwen2")
    vectors = vectors_for(model)
    before = attribute(model, traces, vectors, method="fisher_jvp", behaviors=["backtracking"])
    ablation = [("blocks.2.hook_mlp_out", lambda out, hook: out * 0)]
    with model.hooks(fwd_hooks=ablation):
        scores = attribute(model, traces, vectors, behaviors=["backtracking"])
        slow = [
            patched_forward_kl(model, traces[0].ids, 8, layer, vectors["backtracking"].scaled(layer))
            for layer in range(N_LAYERS)
        ]
        curvature = attribute(model, traces, vectors, method="fisher_jvp", behaviors=["backtracking"])
        drawn = attribute(model, traces, vectors, method="fisher", samples=256, behaviors=["backtracking"])
    assert scores.mean[0].tolist() == pytest.approx(slow, rel=1e-4, abs=1e-6)
    assert not torch.allclose(curvature.mean, before.mean, rtol=0.1)
    assert ((drawn.mean - curvature.mean).abs() < 4.5 * drawn.standard_error).all()
    assert no_hook_is_left(model)


def test_bridge_and_plain_twin_agree(tiny_model, traces, monkeypatch):
    model = tiny_model("qwen2")
    vectors = vectors_for(model)
    assert twins.plain_twin(model) is not None
    methods = ("exact", "fisher", "fisher_jvp", "signed", "published")
    positions: dict[str, Any] = dict(spans="all", keep_cells=True)
    twin = [attribute(model, traces, vectors, method=m, **positions) for m in methods]
    monkeypatch.setattr(twins, "plain_twin", lambda model: None)
    bridge = [attribute(model, traces, vectors, method=m, **positions) for m in methods]
    for ours, theirs in zip(bridge, twin, strict=True):
        torch.testing.assert_close(ours.cells.values, theirs.cells.values, rtol=1e-3, atol=1e-5)


def test_the_cache_is_left_as_it_was(tiny_model):
    model = tiny_model("qwen2")
    onsets = torch.tensor([3, 11, 20])
    rows = Rows.of(onsets, onsets + 1)
    cache = SharedCache(model, IDS, onsets)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache._cache.layers]
    with torch.no_grad():
        first = cache.run(rows)
    torch.testing.assert_close(first, cache.logits, rtol=1e-4, atol=1e-4)

    def fail(layer, resid):
        raise KeyError("interrupted")

    with pytest.raises(KeyError, match="interrupted"), cache.hooked([1], fail):
        cache.run(rows)
    for layer, (keys, values) in zip(cache._cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    with torch.no_grad():
        assert torch.equal(cache.run(rows), first)


def test_hooks_go_whatever_happens(tiny_model):
    model = tiny_model("qwen2")
    cache = SharedCache(model, IDS, torch.tensor([5]))

    def interrupted():
        with row_edits(cache, [0, 1]):
            assert not no_hook_is_left(model)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert no_hook_is_left(model)


def test_exact_makes_no_gradients(tiny_model):
    model = tiny_model("qwen2")
    cache = SharedCache(model, IDS, torch.tensor([5]))
    at = torch.tensor([5])
    ones, none = torch.ones(1, 1, 1, models.d_model(model)), torch.tensor([0])
    kl = exact_cells(cache, at, at + 1, ones, none, [2], torch.ones(1, 1, dtype=torch.bool))
    assert torch.is_grad_enabled()
    assert not kl.requires_grad
    assert (cache.n_forwards, cache.n_rows) == (2, 2)


def test_noise_is_reported_and_flags_what_it_drowns(tiny_model, traces, monkeypatch):
    model = tiny_model("qwen2")
    run, generator = SharedCache.run, torch.Generator().manual_seed(0)

    def rounded(self, rows):
        logits = run(self, rows)
        return logits + 0.001 * torch.randn(logits.shape, generator=generator)

    monkeypatch.setattr(SharedCache, "run", rounded)
    for method in ("exact", "fisher", "fisher_jvp"):
        weak, strong = attribute(model, traces, vectors_for(model), method=method, coefficient=[1e-4, 1.0])
        assert 1e-7 < weak.noise_floor < 1e-5
        assert weak.below_noise().all()
        assert weak.to_dataframe()["below_noise"].all()
        assert not strong.below_noise().any()
    signed = attribute(model, traces, vectors_for(model), method="signed", coefficient=[1e-6, 1.0])
    assert 1e-5 < signed[0].noise_floor < 1e-2  # in logits
    assert signed[0].below_noise().all()
    assert attribute(model, traces, vectors_for(model), method="published").noise_floor is None


def test_padding_behind_a_trace_is_never_seen(tiny_model, traces):
    model = tiny_model("qwen2")
    trace, vectors = traces[0], vectors_for(model)
    padded = dataclasses.replace(
        trace, response_ids=(*trace.response_ids, 0, 0, 0), offsets=(*trace.offsets, 25, 25, 25)
    )
    for method, window in (("exact", "onset"), ("exact", "span"), ("fisher_jvp", "span")):
        ours, theirs = (attribute(model, [t], vectors, method=method, window=window) for t in (trace, padded))
        close(ours.mean, theirs.mean)
