"""The exact score against brute-force patched forwards, planted vectors, refusals, intervals and the file."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import lensteer.attribution.exact as exact_module
from lensteer import models
from lensteer.attribution import LayerScores, attribute
from lensteer.attribution.exact import exact_cells, rows_per_forward
from lensteer.attribution.rows import SharedCache, row_edits
from lensteer.attribution.scores import Cells, average
from lensteer.behaviors import Span
from lensteer.directions import Recipe
from lensteer.errors import LensteerError
from lensteer.tasks import Task
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors
from reference import patched_forward_kl

LABELS = ("uncertainty-estimation", "backtracking")
N_LAYERS = 4


def trace_of(n_tokens: int, spans: list[tuple[str, int, int]], *, seed: int) -> Trace:
    """Random ids with spans at given token positions; texts and characters play no part in attribution."""
    ids = torch.randint(3, 300, (n_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Trace(
        task=Task(f"planted-{seed}", "planted", "train", "?"),
        prompt="?",
        response="x" * (n_tokens - 5),
        prompt_ids=tuple(ids[:5]),
        response_ids=tuple(ids[5:]),
        offsets=tuple(range(n_tokens - 5)),
        finished=True,
        spans=tuple(Span(label, start, end, start, end) for label, start, end in spans),
    )


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    return [
        trace_of(30, [("deduction", 6, 9), ("backtracking", 9, 14), ("uncertainty-estimation", 14, 30)], seed=1),
        trace_of(17, [("backtracking", 6, 7), ("backtracking", 7, 17)], seed=2),
        trace_of(24, [("uncertainty-estimation", 1, 4), ("backtracking", 20, 24)], seed=3),  # an onset at position 0
        trace_of(9, [], seed=4),
    ]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return models.load_model(tiny_checkpoint("qwen2", n_layers=N_LAYERS))


def vectors_for(model, raw: torch.Tensor | None = None, labels=LABELS) -> BehaviorVectors:
    generator = torch.Generator().manual_seed(7)
    n, d = models.n_layers(model), models.d_model(model)
    if raw is None:
        raw = torch.randn(len(labels), n, d, generator=generator)
    return BehaviorVectors(
        raw=raw,
        mean_norm=torch.arange(1.0, n + 1),
        labels=labels,
        layers=tuple(range(n)),
        counts=dict.fromkeys(labels, 3),
        n_traces=3,
        recipe=Recipe("onset", "spans", "span"),
        provenance={"model": models.fingerprint(model).to_dict()},
    )


def no_hook_is_left(model) -> bool:
    return all(not hook.fwd_hooks for hook in model.hook_dict.values())


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("scaling", ["mean_norm", "unit"])
def test_exact_equals_brute_force(tiny_checkpoint, traces, family, scaling):
    model = models.load_model(tiny_checkpoint(family, n_layers=N_LAYERS))
    vectors = vectors_for(model)
    scores = attribute(model, traces, vectors, scaling=scaling, coefficient=0.7, positions="all", keep_cells=True)
    frame = scores.cells_dataframe()
    assert len(frame) == (3 + 2 + 2) * len(LABELS) * N_LAYERS
    for cell in frame.itertuples():
        direction = vectors[cell.behavior].at(cell.layer)
        length = vectors.mean_norm[cell.layer] if scaling == "mean_norm" else 1.0
        added = 0.7 * direction / direction.norm() * length
        slow = patched_forward_kl(model, traces[cell.trace].ids, cell.onset, cell.layer, added)
        assert cell.value == pytest.approx(slow, rel=1e-4, abs=1e-6)
        assert traces[cell.trace].spans[cell.span].onset == cell.onset
    assert frame["value"].min() > 1e-4  # what is compared is not nothing
    assert scores.noise_floor < 1e-9
    assert no_hook_is_left(model)


def test_chunks_and_company_do_not_matter(model, traces, monkeypatch):
    vectors = vectors_for(model)
    whole = attribute(model, traces, vectors, positions="all", keep_cells=True)
    monkeypatch.setattr(exact_module, "MAX_ROWS", 3)  # splits the layers of one onset
    split = attribute(model, traces, vectors, positions="all", keep_cells=True)
    assert split.cost["forwards"] > 3 * whole.cost["forwards"]
    torch.testing.assert_close(split.cells.values, whole.cells.values, rtol=1e-4, atol=1e-6)
    monkeypatch.undo()
    alone = attribute(model, traces[1:2], vectors, positions="all", keep_cells=True)
    of_that = whole.cells.values[whole.cells.trace == 1]
    torch.testing.assert_close(alone.cells.values, of_that, rtol=1e-4, atol=1e-6)


def test_padding_behind_a_trace_is_never_seen(model, traces):
    vectors = vectors_for(model)
    trace = traces[0]
    padded = dataclasses.replace(
        trace, response_ids=(*trace.response_ids, 0, 0, 0), offsets=(*trace.offsets, 25, 25, 25)
    )
    for name in ("mean", "low"):
        ours, theirs = (getattr(attribute(model, [t], vectors), name) for t in (trace, padded))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_rows_per_forward_keeps_to_the_memory(model):
    assert rows_per_forward(model, 100, 2**30) == exact_module.MAX_ROWS
    assert rows_per_forward(model, 100, 1) == 1
    few = rows_per_forward(model, 100, 2**20)
    assert 1 < few < exact_module.MAX_ROWS


def test_a_vector_of_one_layer_acts_at_that_layer_only(model, traces):
    raw = torch.zeros(2, N_LAYERS, models.d_model(model))
    raw[0, 2] = torch.randn(models.d_model(model), generator=torch.Generator().manual_seed(0))
    raw[1, 0] = raw[0, 2]
    scores = attribute(model, traces, vectors_for(model, raw))
    assert (scores.mean > 1e-2).nonzero().tolist() == [[0, 2], [1, 0]]
    # A row that is not edited is the very row it is compared with.
    assert scores.mean[scores.mean <= 1e-2].abs().max() < 1e-9
    assert scores.below_noise().sum() >= 6


def test_coefficient_zero_disturbs_nothing_and_strength_counts(model, traces):
    vectors = vectors_for(model)
    none = attribute(model, traces, vectors, coefficient=0.0)
    weak = attribute(model, traces, vectors, coefficient=0.1)
    strong = attribute(model, traces, vectors, coefficient=-1.0)
    assert none.mean.abs().max() < 1e-9
    assert (weak.mean > 10 * none.mean).all()
    assert (strong.mean > weak.mean).all()


def test_positions_choose_the_onsets(model, traces):
    vectors = vectors_for(model)
    own, other, every = (
        attribute(model, traces, vectors, positions=p, keep_cells=True) for p in ("own", "other", "all")
    )
    assert (own.n_spans, other.n_spans, every.n_spans) == ((2, 4), (5, 3), (7, 7))
    assert own.n_traces == 3  # the trace without spans is no unit
    labels = [traces[t].spans[s].label for t, s in zip(own.cells.trace, own.cells.span, strict=True)]
    assert labels == [LABELS[b] for b in own.cells.behavior.tolist()]
    n_own, n_other = torch.tensor(own.n_spans), torch.tensor(other.n_spans)
    pooled = (own.mean * n_own[:, None] + other.mean * n_other[:, None]) / (n_own + n_other)[:, None]
    torch.testing.assert_close(every.mean, pooled)


def test_behaviors_layers_and_limits(model, traces):
    vectors = vectors_for(model)
    whole = attribute(model, traces, vectors)
    part = attribute(model, traces, vectors, behaviors=["backtracking"], layers=[3, 1, 3])
    assert (part.labels, part.layers) == (("backtracking",), (3, 1))
    torch.testing.assert_close(part.mean[0], whole.mean[1, [3, 1]], rtol=1e-4, atol=1e-6)
    one = attribute(model, traces, vectors, max_spans=1, positions="all", keep_cells=True)
    assert one.n_spans == (1, 1)
    assert one.max_spans == 1
    again = attribute(model, traces, vectors, max_spans=1, positions="all", keep_cells=True)
    assert torch.equal(one.cells.onset, again.cells.onset)
    drawn = {
        tuple(attribute(model, traces, vectors, max_spans=1, positions="all", seed=s, keep_cells=True).cells.onset)
        for s in range(4)
    }
    assert len(drawn) > 1


def test_a_behavior_without_spans_has_no_score(model, traces):
    scores = attribute(model, traces[1:2], vectors_for(model))
    assert scores.n_spans == (0, 2)
    assert scores.mean[0].isnan().all()
    assert not scores.mean[1].isnan().any()
    assert scores.low.isnan().all(), "one trace makes no interval"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="saliency"), "unknown method 'saliency': choose one of 'exact'"),
        (dict(scaling="norm"), "unknown scaling 'norm': choose one of 'mean_norm', 'unit'"),
        (dict(positions="mine"), "unknown positions 'mine': choose one of 'own', 'other', 'all'"),
        (dict(behaviors=["doubt"]), "unknown behavior 'doubt': choose one of 'uncertainty-estimation'"),
        (dict(behaviors=[]), r"nothing to score: behaviors=\[\]"),
        (dict(layers=[9]), "no layer 9"),
        (dict(coefficient=math.nan), "coefficient nan is not finite"),
        (dict(coefficient=-math.inf), "coefficient -inf is not finite"),
        (dict(max_spans=0), "max_spans=0 leaves no span"),
    ],
)
def test_bad_options_are_refused(model, traces, options, message):
    with pytest.raises(LensteerError, match=message):
        attribute(model, traces, vectors_for(model), **options)


def test_bad_input_is_refused(model, traces, tiny_checkpoint):
    vectors = vectors_for(model)
    with pytest.raises(LensteerError, match="no onset to score: 1 traces with 0 spans"):
        attribute(model, traces[3:], vectors)
    with pytest.raises(LensteerError, match="0 traces"):
        attribute(model, [], vectors)
    late = dataclasses.replace(traces[1], spans=(Span("backtracking", 15, 40, 0, 3),))
    with pytest.raises(LensteerError, match=r"planted-2.* 17 tokens, but a span of 'backtracking' at \[15, 40\)"):
        attribute(model, [late], vectors)
    elsewhere = models.load_model(tiny_checkpoint("qwen2", n_layers=N_LAYERS, seed=1))
    with pytest.raises(LensteerError, match="do not fit"):
        attribute(elsewhere, traces, vectors)
    some = dataclasses.replace(vectors, raw=vectors.raw[:, :2], mean_norm=vectors.mean_norm[:2], layers=(0, 1))
    with pytest.raises(LensteerError, match=r"no vectors at layer 3: these have layers \[0, 1\]"):
        attribute(model, traces, some, layers=[3])


def test_numbers_that_overflow_are_refused(model, traces):
    huge = dataclasses.replace(vectors_for(model), mean_norm=torch.tensor([1.0, 1.0, 3e38, 1.0]))
    with pytest.raises(LensteerError, match=r"coefficient 10\.0 .* 'uncertainty-estimation' at layer 2 overflow"):
        attribute(model, traces, huge, coefficient=10.0)

    def overflow(resid, hook):
        return resid * torch.inf if resid.shape[1] == 1 + N_LAYERS else None  # only where the rows run

    one = dataclasses.replace(traces[0], spans=traces[0].spans[1:2])
    with (
        model.hooks(fwd_hooks=[(models.resid_hook(2), overflow)]),
        pytest.raises(LensteerError, match=r"trace 0 \(planted-1/0\): .* not finite"),
    ):
        attribute(model, [one], vectors_for(model), positions="all", behaviors=["backtracking"])
    assert no_hook_is_left(model)


def test_sliding_windows_are_refused_by_name(tiny_checkpoint, traces):
    model = models.load_model(tiny_checkpoint("gemma3", n_layers=N_LAYERS))
    with pytest.raises(LensteerError, match="layer 0 of this model keeps its past in a DynamicSlidingWindowLayer"):
        attribute(model, traces, vectors_for(model))


def test_an_attention_that_ignores_the_mask_is_noticed(model, traces, monkeypatch):
    """What a model with its own masks would do: rows see one another."""
    run = SharedCache.run

    def blind(self, positions):
        mask_of, torch.Tensor.masked_fill_ = torch.Tensor.masked_fill_, lambda mask, *_: mask
        try:
            return run(self, positions)
        finally:
            torch.Tensor.masked_fill_ = mask_of

    monkeypatch.setattr(SharedCache, "run", blind)
    with pytest.raises(LensteerError, match="does not take a 4-D mask"):
        attribute(model, traces, vectors_for(model))


def test_the_cache_is_left_as_it_was(model, traces):
    onsets = torch.tensor([3, 11, 20])
    cache = SharedCache(model, traces[0].ids, onsets)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache._cache.layers]
    first = cache.run(onsets)
    torch.testing.assert_close(first, cache.logits, rtol=1e-4, atol=1e-4)

    def fail(resid, hook):
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"), model.hooks(fwd_hooks=[(models.resid_hook(1), fail)]):
        cache.run(onsets)
    for layer, (keys, values) in zip(cache._cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert torch.equal(cache.run(onsets), first)


def test_hooks_go_whatever_happens(model):
    def interrupted():
        with row_edits(model, [0, 1]):
            assert not no_hook_is_left(model)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert no_hook_is_left(model)


def test_gradients_are_neither_made_nor_switched(model, traces):
    found = exact_cells(
        model, traces[0].ids, torch.tensor([5]), torch.tensor([0]), torch.ones(1, 1, models.d_model(model)), [2]
    )
    assert torch.is_grad_enabled()
    assert not found.kl.requires_grad
    assert (found.n_forwards, found.n_rows) == (2, 2)


def test_noise_is_reported_and_flags_what_it_drowns(model, traces, monkeypatch):
    run, generator = SharedCache.run, torch.Generator().manual_seed(0)

    def rounded(self, positions):
        logits = run(self, positions)
        return logits + 0.001 * torch.randn(logits.shape, generator=generator)

    monkeypatch.setattr(SharedCache, "run", rounded)
    weak = attribute(model, traces, vectors_for(model), coefficient=1e-4)
    strong = attribute(model, traces, vectors_for(model), coefficient=1.0)
    assert 1e-7 < weak.noise_floor < 1e-5
    assert weak.below_noise().all()
    assert weak.to_dataframe()["below_noise"].all()
    assert not strong.below_noise().any()


def test_half_precision_stays_near_full_precision(tiny_checkpoint, traces):
    full, half = (
        attribute(model, traces, vectors_for(model)).mean
        for model in (
            models.load_model(tiny_checkpoint("qwen2", n_layers=N_LAYERS), dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
    )
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.01)


def test_means_and_intervals_by_hand():
    values = torch.tensor([[1.0], [3.0], [8.0], [5.0]])
    cells = Cells(
        trace=torch.tensor([0, 0, 4, 4]),
        span=torch.tensor([0, 1, 0, 1]),
        behavior=torch.tensor([0, 0, 0, 1]),
        onset=torch.tensor([5, 9, 5, 9]),
        values=values,
    )
    (mean, low, high), n_spans, n_traces = average(cells, 3)
    assert (n_spans, n_traces) == ((3, 1, 0), 2)
    assert mean[:2, 0].tolist() == [4.0, 5.0]  # (1 + 3 + 8) / 3: a trace counts by its spans
    assert (low[0, 0], high[0, 0]) == (2.0, 8.0)  # either trace drawn twice
    assert mean[2].isnan().all()


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for run in range(60):
        trace = torch.arange(40).repeat_interleave(3)
        effect = torch.randn(40, generator=generator)[trace] + 0.3 * torch.randn(120, generator=generator)
        zeros = torch.zeros(120, dtype=torch.long)
        (_, low, high), _, _ = average(Cells(trace, zeros, zeros, zeros, 2.0 + effect[:, None]), 1, seed=run)
        hits += bool(low[0, 0] <= 2.0 <= high[0, 0])
    assert hits >= 52  # about 0.95 · 60, were spans the units it would be about 43


def test_scores_survive_their_file(model, traces, tmp_path):
    path = tmp_path / "scores.json"
    scores = attribute(model, traces[1:], vectors_for(model), positions="own", keep_cells=True)
    scores.save(path)
    back = LayerScores.load(path)
    for name in ("mean", "low", "high"):
        assert torch.equal(getattr(back, name).nan_to_num(-1), getattr(scores, name).nan_to_num(-1))
    assert torch.equal(back.cells.values, scores.cells.values)
    assert back.to_dict() == scores.to_dict()
    assert back.cost["rows"] > back.cost["forwards"] > 0
    assert back.provenance["model"]["n_layers"] == N_LAYERS
    assert list(tmp_path.iterdir()) == [path]

    frame = scores.to_dataframe()
    assert len(frame) == len(LABELS) * N_LAYERS
    row = frame[(frame.behavior == "backtracking") & (frame.layer == 2)].iloc[0]
    assert row["mean"] == float(scores.mean[1, 2])

    whole = path.read_text()
    for damage in (whole[: len(whole) // 2], "", "[]", "{}", whole.replace('"labels"', '"names"')):
        path.write_text(damage)
        with pytest.raises(LensteerError, match="layer scores"):
            LayerScores.load(path)
    with pytest.raises(LensteerError, match="keep_cells=True"):
        attribute(model, traces, vectors_for(model)).cells_dataframe()
