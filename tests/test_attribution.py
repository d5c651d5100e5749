"""The exact score against brute-force patched forwards, options, refusals, intervals, recomputed cells and the file."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import lensteer.attribution.rows as rows_module
from lensteer import models, twins
from lensteer.attribution import LayerScores, attribute, efficiency
from lensteer.attribution.cells import Cells, average, sampling_error
from lensteer.behaviors import Span
from lensteer.errors import LensteerError
from lensteer.steering.plans import UNITS
from lensteer.tasks import Task
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors, Recipe
from lensteer.vectors.values import Controls
from reference import patched_forward_kl, patched_span_kl

LABELS = ("uncertainty-estimation", "backtracking")
N_LAYERS = 4
NOISE = 1e-7  # nats; the logits are fp32 whatever the scores are, and other kernels round otherwise


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for the rounding of fp32 logits, which another batch shape or kernel makes anew."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, equal_nan=True)


def trace_of(n_tokens: int, spans: list[tuple[str, int, int]], *, seed: int) -> Trace:
    """Random ids with spans at given token positions; texts and characters play no part in attribution."""
    ids = torch.randint(3, 300, (n_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Trace(
        task=Task(f"planted-{seed}", "planted", "train", "?"),
        prompt="?",
        response="x" * n_tokens,
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


def vectors_for(model, raw: torch.Tensor | None = None, labels=LABELS, n_controls: int = 0) -> BehaviorVectors:
    generator = torch.Generator().manual_seed(7)
    n, d = models.n_layers(model), models.d_model(model)
    if raw is None:
        raw = torch.randn(len(labels), n, d, generator=generator)
    controls = None
    if n_controls:
        one = torch.randn(2, n_controls, n, d, generator=generator)
        controls = Controls(one[0], one[1], torch.randn(n_controls, len(labels), n, d, generator=generator))
    return BehaviorVectors(
        raw=raw,
        mean_norm=torch.arange(1.0, n + 1),
        labels=labels,
        layers=tuple(range(n)),
        counts=dict.fromkeys(labels, 3),
        n_traces=3,
        recipe=Recipe("onset", "spans", "span"),
        provenance={"model": models.fingerprint(model).to_dict()},
        controls=controls,
    )


def no_hook_is_left(model) -> bool:
    """None at all on the bridge, none of ours on its plain twin (Hugging Face has its own)."""
    twin = twins.plain_twin(model)
    layers = [] if twin is None else [twins.twin_layer(twin, i) for i in range(models.n_layers(model))]
    behind = [hook for layer in layers for hook in layer._forward_hooks.values()]
    ours = [hook for hook in behind if hook.__module__.startswith("lensteer")]
    return not ours and all(not point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.medium
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "gemma3"])  # the last one with windows of 8 tokens
@pytest.mark.parametrize("unit", UNITS)
def test_exact_equals_brute_force(tiny_checkpoint, traces, family, unit):
    model = models.load_model(tiny_checkpoint(family, n_layers=N_LAYERS))
    vectors = vectors_for(model)
    scores = attribute(model, traces, vectors, unit=unit, coefficient=0.7, spans="all", keep_cells=True)
    frame = scores.cells_dataframe()
    assert len(frame) == (3 + 2 + 2) * len(LABELS) * N_LAYERS
    for cell in frame.itertuples():
        direction = vectors[cell.behavior].at(cell.layer)
        length = {"difference": direction.norm(), "mean_norm": vectors.mean_norm[cell.layer], "unit": 1.0}[unit]
        added = 0.7 * direction / direction.norm() * length
        slow = patched_forward_kl(model, traces[cell.trace].ids, cell.onset, cell.layer, added)
        assert cell.value == pytest.approx(slow, rel=1e-4, abs=1e-6)
        assert traces[cell.trace].spans[cell.span].onset == cell.onset
    assert frame["value"].min() > 1e-4  # what is compared is not nothing
    assert scores.noise_floor < NOISE
    assert no_hook_is_left(model)


@pytest.mark.medium
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "gemma3"])
def test_a_whole_span_equals_brute_force(tiny_checkpoint, traces, family):
    model = models.load_model(tiny_checkpoint(family, n_layers=N_LAYERS))
    vectors = vectors_for(model)
    coefficients = (0.3, -1.0)
    both = attribute(model, traces, vectors, window="span", coefficient=coefficients, spans="all", keep_cells=True)
    for scores, coefficient in zip(both, coefficients, strict=True):
        assert (scores.window, scores.coefficient) == ("span", coefficient)
        frame = scores.cells_dataframe()
        for cell in frame.iloc[:: 3 if family == "qwen2" else 7].itertuples():
            span = traces[cell.trace].spans[cell.span]
            added = coefficient * vectors[cell.behavior].scaled(cell.layer)
            slow = patched_span_kl(model, traces[cell.trace].ids, span.start - 1, span.end - 1, cell.layer, added)
            assert cell.value == pytest.approx(slow, rel=1e-4, abs=1e-6)
        assert scores.noise_floor < NOISE
    assert no_hook_is_left(model)


def test_a_span_of_one_token_is_its_onset(model, traces):
    one = dataclasses.replace(traces[1], spans=traces[1].spans[:1])
    vectors = vectors_for(model)
    onset, span = (attribute(model, [one], vectors, window=w, behaviors=["backtracking"]) for w in ("onset", "span"))
    close(onset.mean, span.mean)


def test_several_coefficients_come_from_one_filling(model, traces):
    vectors, coefficients = vectors_for(model), (1.0, 0.1, -0.5)
    together = attribute(model, traces, vectors, coefficient=list(coefficients), spans="all")
    assert isinstance(together, tuple)
    for scores, coefficient in zip(together, coefficients, strict=True):
        alone = attribute(model, traces, vectors, coefficient=coefficient, spans="all")
        close(scores.mean, alone.mean)
        assert scores.coefficient == coefficient
        assert (scores.cost["coefficients"], alone.cost["coefficients"]) == (3, 1)
    assert together[0].cost["rows"] < 3 * alone.cost["rows"]  # unedited rows are shared


def test_chunks_and_company_do_not_matter(model, traces, monkeypatch):
    vectors = vectors_for(model)
    whole = attribute(model, traces, vectors, spans="all", keep_cells=True)
    monkeypatch.setattr(rows_module, "MAX_ROWS", 3)  # splits the layers of one onset
    split = attribute(model, traces, vectors, spans="all", keep_cells=True)
    assert split.cost["forwards"] > 3 * whole.cost["forwards"]
    torch.testing.assert_close(split.cells.values, whole.cells.values, rtol=1e-4, atol=1e-6)
    monkeypatch.undo()
    alone = attribute(model, traces[1:2], vectors, spans="all", keep_cells=True)
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
        close(ours, theirs)


def test_a_vector_of_one_layer_acts_at_that_layer_only(model, traces):
    raw = torch.zeros(2, N_LAYERS, models.d_model(model))
    raw[0, 2] = torch.randn(models.d_model(model), generator=torch.Generator().manual_seed(0))
    raw[1, 0] = raw[0, 2]
    scores = attribute(model, traces, vectors_for(model, raw))
    assert (scores.mean > 1e-2).nonzero().tolist() == [[0, 2], [1, 0]]
    # A row that is not edited is the very row it is compared with.
    assert scores.mean[scores.mean <= 1e-2].abs().max() < NOISE
    assert scores.below_noise().sum() >= 6


def test_coefficient_zero_disturbs_nothing_and_strength_counts(model, traces):
    vectors = vectors_for(model)
    none = attribute(model, traces, vectors, coefficient=0.0)
    weak = attribute(model, traces, vectors, coefficient=0.1)
    strong = attribute(model, traces, vectors, coefficient=-1.0)
    assert none.mean.abs().max() < NOISE
    assert (weak.mean > 10 * none.mean).all()
    assert (strong.mean > weak.mean).all()


def test_positions_choose_the_onsets(model, traces):
    vectors = vectors_for(model)
    own, other, every = (attribute(model, traces, vectors, spans=p, keep_cells=True) for p in ("own", "other", "all"))
    assert (own.n_spans, other.n_spans, every.n_spans) == ((2, 4), (5, 3), (7, 7))
    assert own.n_traces == 3  # the trace without spans is no unit
    labels = [traces[t].spans[s].label for t, s in zip(own.cells.trace, own.cells.span, strict=True)]
    assert labels == [LABELS[b] for b in own.cells.behavior.tolist()]
    n_own, n_other = torch.tensor(own.n_spans), torch.tensor(other.n_spans)
    pooled = (own.mean * n_own[:, None] + other.mean * n_other[:, None]) / (n_own + n_other)[:, None]
    close(every.mean, pooled)


def test_behaviors_layers_and_limits(model, traces):
    vectors = vectors_for(model)
    whole = attribute(model, traces, vectors)
    part = attribute(model, traces, vectors, behaviors=["backtracking"], layers=[3, 1, 3])
    assert (part.labels, part.layers) == (("backtracking",), (3, 1))
    torch.testing.assert_close(part.mean[0], whole.mean[1, [3, 1]], rtol=1e-4, atol=1e-6)
    one = attribute(model, traces, vectors, max_spans=1, spans="all", keep_cells=True)
    assert one.n_spans == (1, 1)
    assert one.max_spans == 1
    again = attribute(model, traces, vectors, max_spans=1, spans="all", keep_cells=True)
    assert torch.equal(one.cells.onset, again.cells.onset)
    drawn = {
        tuple(attribute(model, traces, vectors, max_spans=1, spans="all", seed=s, keep_cells=True).cells.onset)
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
        (dict(method="saliency"), "unknown method 'saliency': choose one of 'exact', 'fisher'"),
        (dict(unit="norm"), "unknown unit 'norm': choose one of 'difference', 'mean_norm', 'unit'"),
        (dict(spans="mine"), "unknown spans 'mine': choose one of 'own', 'other', 'all'"),
        (dict(behaviors=["doubt"]), "unknown behavior 'doubt': choose one of 'uncertainty-estimation'"),
        (dict(behaviors=[]), r"nothing to score: behaviors=\[\]"),
        (dict(layers=[9]), "no layer 9"),
        (dict(coefficient=math.nan), "coefficient nan is not finite"),
        (dict(coefficient=-math.inf), "coefficient -inf is not finite"),
        (dict(coefficient=[1.0, math.nan]), r"coefficient \[1.0, nan\] is not finite"),
        (dict(coefficient=[]), r"coefficient \[\] is not finite"),
        (dict(max_spans=0), "max_spans=0 leaves no span"),
        (dict(window="sentence"), "unknown window 'sentence': choose one of 'onset', 'span'"),
        (dict(method="signed", window="span"), "method 'signed' is about the token before a span: window='span'"),
        (dict(method="published", window="span"), "method 'published' is about the token before a span"),
        (dict(method="fisher", samples=0), "samples=0, n_controls=0: draw at least one sample"),
        (dict(method="fisher", n_controls=-1), "samples=8, n_controls=-1"),
        (dict(method="fisher", n_controls=2), "these vectors have no controls: fit them with n_controls=2"),
        (dict(n_controls=2), "n_controls=2 of method 'exact' would each be run: use 'fisher'"),
        (dict(method="signed", exact_where_unreliable=True), "'signed' is not an estimate of the exact score"),
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
    elsewhere = models.load_model(tiny_checkpoint("qwen2", n_layers=N_LAYERS, seed=1))
    with pytest.raises(LensteerError, match="do not fit"):
        attribute(elsewhere, traces, vectors)
    some = dataclasses.replace(vectors, raw=vectors.raw[:, :2], mean_norm=vectors.mean_norm[:2], layers=(0, 1))
    with pytest.raises(LensteerError, match=r"no vectors at layer 3: these have layers \[0, 1\]"):
        attribute(model, traces, some, layers=[3])


def test_numbers_that_overflow_are_refused(model, traces):
    huge = dataclasses.replace(vectors_for(model), mean_norm=torch.tensor([1.0, 1.0, 3e38, 1.0]))
    with pytest.raises(LensteerError, match=r"coefficient 10\.0 .* 'uncertainty-estimation' at layer 2 overflow"):
        attribute(model, traces, huge, coefficient=10.0, unit="mean_norm")

    def overflow(resid, hook):
        return resid * torch.inf if resid.shape[1] == 1 + N_LAYERS else None  # only where the rows run

    one = dataclasses.replace(traces[0], spans=traces[0].spans[1:2])
    with (
        model.hooks(fwd_hooks=[(models.resid_hook(2), overflow)]),
        pytest.raises(LensteerError, match=r"trace 0 \(planted-1/0\): .* not finite"),
    ):
        attribute(model, [one], vectors_for(model), spans="all", behaviors=["backtracking"])
    assert no_hook_is_left(model)


def test_half_precision_stays_near_full_precision(tiny_checkpoint, traces):
    full, half = (
        attribute(model, traces, vectors_for(model)).mean
        for model in (
            models.load_model(tiny_checkpoint("qwen2", n_layers=N_LAYERS), dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
    )
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.01)


@pytest.mark.medium
@pytest.mark.parametrize("method", ["exact", "fisher", "fisher_jvp"])
def test_the_noise_of_half_precision_is_reported(method):
    """How large it is depends on the machine's kernels; what it drowns is planted in test_attribution_rows."""
    model = models.load_model(dtype=torch.bfloat16)
    trace = trace_of(100, [(LABELS[i % 2], at, at + 20) for i, at in enumerate(range(11, 80, 14))], seed=1)
    options: dict[str, Any] = dict(method=method, window="span", coefficient=[1e-4, 1.0], layers=[3])
    weak, strong = attribute(model, [trace], vectors_for(model), **options)
    assert 0 <= weak.noise_floor < 0.1
    assert torch.equal(weak.below_noise(), weak.mean < 10 * weak.noise_floor)
    assert not strong.below_noise().any()


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


def test_unreliable_cells_are_recomputed_exactly(model, traces):
    vectors = vectors_for(model)
    options: dict[str, Any] = dict(coefficient=[0.1, 0.6], spans="all", keep_cells=True)
    plain = attribute(model, traces, vectors, method="fisher", samples=4, **options)
    mixed = attribute(model, traces, vectors, method="fisher", samples=4, exact_where_unreliable=True, **options)
    exact = attribute(model, traces, vectors, **options)
    for before, after, truth in zip(plain, mixed, exact, strict=True):
        wanted = before.unreliable()
        assert torch.equal(after.recomputed, wanted)
        assert torch.equal(after.estimated, before.mean)
        close(after.mean[wanted], truth.mean[wanted])
        assert torch.equal(after.mean[~wanted], before.mean[~wanted])
        assert (after.standard_error[wanted] == 0).all()
        assert torch.equal(after.standard_error[~wanted], before.standard_error[~wanted])
        assert not after.unreliable().any()
        assert after.cost["rows"] > before.cost["rows"] or not wanted.any()
        own = wanted[after.cells.behavior]
        close(after.cells.values[own], truth.cells.values[own])
        assert after.to_dataframe()["recomputed"].tolist() == wanted.flatten().tolist()
    assert mixed[1].recomputed.any()
    assert not all(scores.recomputed.all() for scores in mixed)


def test_what_makes_a_cell_unreliable():
    mean = torch.tensor([[0.001, 0.05, 0.05, 0.2]], dtype=torch.float64)
    error = torch.tensor([[0.0, 0.02, 0.005, 0.0]], dtype=torch.float64)
    nothing = torch.zeros(1, 4, dtype=torch.float64)
    common = (("backtracking",), (0, 1, 2, 3), 4, mean, nothing, nothing, (9,), 3)
    scores = LayerScores(*common, "fisher", 1.0, "mean_norm", "own", noise_floor=2e-4, standard_error=error)
    assert scores.unreliable().tolist() == [[True, True, False, True]]  # noise, sampling, fine, size
    assert scores.unreliable(relative_error=0.5, quadratic_nats=1.0).tolist() == [[True, False, False, False]]
    far = dataclasses.replace(scores, relative_length=torch.tensor([[0.1, 0.2, 0.3, 0.2]], dtype=torch.float64))
    assert far.unreliable().tolist() == [[True, True, True, True]]
    assert far.unreliable(quadratic_length=0.4).tolist() == [[True, True, False, True]]
    exact = dataclasses.replace(far, method="exact", standard_error=None)
    assert exact.unreliable().tolist() == [[True, False, False, False]]


def test_sampling_error_by_hand():
    place = torch.zeros(3, dtype=torch.long)
    behavior = torch.tensor([0, 0, 1])
    cells = Cells(place, place, behavior, place, torch.tensor([[2.0], [4.0], [1.0]]))
    variance = torch.tensor([[8.0], [4.0], [1.0]], dtype=torch.float64)
    mean = torch.tensor([[3.0], [1.0], [math.nan]], dtype=torch.float64)
    error, kappa = sampling_error(variance, mean, cells, 4)
    assert error[:2, 0].tolist() == pytest.approx([math.sqrt((8 + 4) / 4) / 2, math.sqrt(1 / 4)])
    assert kappa[:2, 0].tolist() == pytest.approx([6 / 9, 1.0])
    assert float(error[0] / mean[0]) == pytest.approx(math.sqrt(float(kappa[0]) / (4 * 2)))
    assert error[2].isnan().all()


def test_how_long_an_addition_is_does_not_depend_on_the_scaling_named(model, traces):
    vectors = vectors_for(model)
    own, norm, unit = (attribute(model, traces[1:2], vectors, coefficient=-0.5, unit=s) for s in UNITS)
    lengths = 0.5 * vectors.raw.norm(dim=-1), 0.5 * vectors.mean_norm.expand(2, -1), torch.full((2, N_LAYERS), 0.5)
    for scores, length in zip((own, norm, unit), lengths, strict=True):
        expected = (length / vectors.mean_norm).double()
        torch.testing.assert_close(scores.relative_length, expected, rtol=1e-5, atol=0)  # vectors are fp32


def test_the_default_scaling_is_what_steering_adds(model, traces):
    vectors = vectors_for(model)
    assert attribute(model, traces, vectors).coefficient_unit == "difference"
    assert attribute(model, traces, vectors, method="signed").coefficient_unit == "difference"
    assert attribute(model, traces, vectors, method="published").coefficient_unit == "unit"
    scaled = dataclasses.replace(vectors, raw=2 * vectors.raw)
    for unit in UNITS:  # only the difference itself carries its length
        one, two = (attribute(model, traces, v, method="fisher_jvp", unit=unit).mean for v in (vectors, scaled))
        torch.testing.assert_close(
            two / one, torch.full_like(one, 4.0 if unit == "difference" else 1.0), rtol=1e-3, atol=0
        )


def test_efficiency_is_effect_per_root_of_disturbance(model, traces):
    vectors = vectors_for(model)
    options: dict[str, Any] = dict(spans="all", coefficient=0.5)
    signed = attribute(model, traces, vectors, method="signed", **options)
    kl = attribute(model, traces, vectors, method="fisher_jvp", **options)
    found = efficiency(signed, kl)
    torch.testing.assert_close(found.mean, signed.mean / kl.mean.sqrt())
    assert (found.method, found.unit) == ("efficiency", "logits/√nat")
    weak = [attribute(model, traces, vectors, method=m, spans="all", coefficient=0.1) for m in ("signed", "fisher_jvp")]
    close(efficiency(*weak).mean, found.mean)
    with pytest.raises(
        LensteerError, match="needs scores of method 'signed' and scores in nats: these are 'fisher_jvp'"
    ):
        efficiency(kl, signed)
    with pytest.raises(LensteerError, match=r"signed scores with coefficient 0.5, a KL with 0.1"):
        efficiency(signed, weak[1])


def test_scores_survive_their_file(model, traces, tmp_path):
    path = tmp_path / "scores.json"
    scores = attribute(model, traces[1:], vectors_for(model), spans="own", keep_cells=True)
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
        with pytest.raises(LensteerError, match="LayerScores"):
            LayerScores.load(path)
    rich = attribute(
        model, traces[1:], vectors_for(model, n_controls=5), method="fisher", n_controls=3, exact_where_unreliable=True
    )
    rich.save(path)
    again = LayerScores.load(path)
    assert again.to_dict() == rich.to_dict()
    assert torch.equal(again.recomputed, rich.recomputed)
    assert again.controls["shuffled"].shape == (3, len(LABELS), N_LAYERS)
    for name in ("standard_error", "kappa", "estimated", "relative_length"):
        assert torch.equal(getattr(again, name).nan_to_num(-1), getattr(rich, name).nan_to_num(-1))
    assert (again.samples, again.unit, again.window) == (8, "nats", "onset")
    short = scores.to_dict()
    del short["relative_length"]
    assert LayerScores.from_dict(short).relative_length is None  # a default may be missing
    with pytest.raises(LensteerError, match="of version 1: its 'kind' and 'version' are"):
        LayerScores.from_dict({**short, "version": 2})

    with pytest.raises(LensteerError, match="keep_cells=True"):
        attribute(model, traces, vectors_for(model)).cells_dataframe()
