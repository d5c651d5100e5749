"""Estimators from gradients and tangents: Fisher against its expectation, signed and published against autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from lensteer import models
from lensteer.attribution import attribute
from lensteer.attribution.gradients import (
    behavior_odds,
    chain_gradients,
    published_cotangents,
    sampled_scores,
    stratified_uniforms,
)
from lensteer.attribution.request import first_token_shares
from lensteer.attribution.rows import SharedCache
from lensteer.errors import LensteerError
from reference import full_forward_gradients
from test_attribution import LABELS, N_LAYERS, close, no_hook_is_left, trace_of, vectors_for

FAMILIES = ["qwen2", "llama", "qwen3", "gemma3"]
METHODS = ["exact", "fisher", "fisher_jvp", "signed", "published"]


@pytest.fixture(scope="module")
def traces():
    return [
        trace_of(30, [("deduction", 6, 9), ("backtracking", 9, 14), ("uncertainty-estimation", 14, 20)], seed=1),
        trace_of(24, [("uncertainty-estimation", 5, 9), ("backtracking", 20, 24)], seed=3),
    ]


# --- the machinery --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_chain_gradients_are_those_of_a_full_forward(tiny_model, traces, family):
    """With the past held fixed: rows of a chain act on one another, the cache before them is a constant."""
    model, ids = tiny_model(family), traces[0].ids
    begin, end = torch.tensor([8, 20, 13]), torch.tensor([13, 21, 19])
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, len(ids), int(model.cfg.d_vocab), generator=generator)
    cache = SharedCache(model, ids, torch.tensor([20]))
    layers = [3, 0, 2]
    found = chain_gradients(cache, begin, end, layers, lambda logits, at: weight[:, at], samples=2)
    for c, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        for m in range(2):
            slow = full_forward_gradients(
                model, ids, lambda logits, m=m, a=first, b=last: (weight[m, a:b] * logits[a:b]).sum()
            )
            torch.testing.assert_close(found[m, c], slow[layers, first:last].sum(1), rtol=1e-3, atol=1e-4)


def test_chunks_do_not_matter_to_gradients(tiny_model, traces, monkeypatch):
    import lensteer.attribution.rows as rows_module

    model, vectors = tiny_model("qwen2"), vectors_for(tiny_model("qwen2"))
    options: dict[str, Any] = dict(method="fisher", window="span", spans="all", keep_cells=True)
    whole = attribute(model, traces, vectors, **options)
    monkeypatch.setattr(rows_module, "MAX_ROWS", 2)
    split = attribute(model, traces, vectors, **options)
    assert split.cost["forwards"] > whole.cost["forwards"]
    torch.testing.assert_close(split.cells.values, whole.cells.values, rtol=1e-3, atol=1e-6)
    monkeypatch.undo()
    few = attribute(model, traces, vectors, **{**options, "behaviors": ["backtracking"], "spans": "own"})
    chosen = torch.tensor(
        [
            traces[t].spans[s].label == "backtracking" == LABELS[b]
            for t, s, b in zip(whole.cells.trace, whole.cells.span, whole.cells.behavior, strict=True)
        ]
    )
    torch.testing.assert_close(few.cells.values, whole.cells.values[chosen], rtol=1e-3, atol=1e-6)


def test_drawn_tokens_follow_the_distribution():
    n, samples = 400, 50
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf]).expand(n, 5)
    uniforms = stratified_uniforms(n, samples, torch.Generator().manual_seed(0))
    assert torch.equal((uniforms * samples).floor().sort(1).values[7], torch.arange(50.0, dtype=torch.float64))
    cotangents = sampled_scores(uniforms)(logits, torch.arange(n))
    p = logits[0].softmax(-1)
    shares = (cotangents + p).mean((0, 1))
    torch.testing.assert_close(shares, p, atol=4 * 0.5 / math.sqrt(n * samples), rtol=0)
    assert ((cotangents + p).sum(-1) - 1).abs().max() < 1e-5  # one token each
    first, second = (cotangents[:, row].argmax(-1) for row in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.medium
@pytest.mark.parametrize("method", METHODS)
def test_parameters_stay_out_of_it_and_no_hook_is_left(tiny_checkpoint, traces, monkeypatch, method):
    model = models.load_model(tiny_checkpoint("qwen2", n_layers=N_LAYERS))
    vectors = vectors_for(model)

    def untouched():
        parameters = list(model.parameters())
        clean = all(p.grad is None and not p.requires_grad for p in parameters)
        return clean and no_hook_is_left(model) and torch.is_grad_enabled()

    scores = attribute(model, traces, vectors, method=method)
    assert untouched()
    assert not scores.mean.requires_grad
    run, calls = SharedCache.run, []

    def interrupted(self, rows):
        calls.append(run(self, rows))
        raise KeyError("interrupted")

    monkeypatch.setattr(SharedCache, "run", interrupted)
    with pytest.raises(KeyError):
        attribute(model, traces, vectors, method=method)
    assert calls
    assert untouched()
    monkeypatch.undo()
    for parameter in model.parameters():  # as TransformerLens itself loads a model
        parameter.requires_grad_(True)
    again = attribute(model, traces, vectors, method=method)
    close(again.mean, scores.mean)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# --- Fisher ---------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("window", ["onset", "span"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_expects_what_the_tangents_give(tiny_model, traces, family, window):
    model = tiny_model(family)
    options: dict[str, Any] = dict(window=window, spans="all", coefficient=0.3)
    drawn = attribute(model, traces, vectors_for(model), method="fisher", samples=128, **options)
    truth = attribute(model, traces, vectors_for(model), method="fisher_jvp", **options)
    assert (drawn.standard_error > 0).all()
    assert (drawn.standard_error < 0.2 * truth.mean).all()
    assert ((drawn.mean - truth.mean).abs() < 4.5 * drawn.standard_error).all()
    assert truth.standard_error is None
    assert (drawn.samples, truth.samples) == (128, None)


@pytest.mark.medium
def test_the_standard_error_is_what_seeds_do(tiny_model, traces):
    model = tiny_model("qwen2")
    vectors = vectors_for(model)
    runs = [attribute(model, traces, vectors, method="fisher", spans="all", seed=s) for s in range(24)]
    scatter = torch.stack([scores.mean for scores in runs]).std(0)
    stated = torch.stack([scores.standard_error for scores in runs]).mean(0)
    ratio = scatter / stated
    assert 0.3 < ratio.mean() < 1.15  # draws are spread out over p, so the stated error is an upper bound
    relative = runs[0].standard_error / runs[0].mean
    n = torch.tensor(runs[0].n_spans)[:, None]
    torch.testing.assert_close(relative, (runs[0].kappa / (8 * n)).sqrt())
    one = attribute(model, traces, vectors, method="fisher", samples=1)
    assert one.standard_error.isnan().all()


@pytest.mark.medium
@pytest.mark.parametrize("window", ["onset", "span"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tangents_give_the_second_order_of_the_exact_kl(tiny_checkpoint, traces, family, window):
    model = models.load_model(tiny_checkpoint(family, n_layers=N_LAYERS), dtype=torch.float64)
    alpha = 3e-3
    options: dict[str, Any] = dict(window=window, spans="all", coefficient=alpha, keep_cells=True)
    second = attribute(model, traces, vectors_for(model), method="fisher_jvp", **options)
    exact = [
        attribute(model, traces, vectors_for(model), **{**options, "coefficient": sign * alpha}).cells.values
        for sign in (1, -1)
    ]
    numerical = (exact[0] + exact[1]) / 2  # the odd orders cancel
    torch.testing.assert_close(second.cells.values, numerical, rtol=2e-2, atol=1e-8)
    assert second.mean.min() > 1e-8


@pytest.mark.medium
def test_fisher_of_a_model_whose_upper_blocks_are_zeroed(tiny_checkpoint, traces):
    """Then logits are a norm and a matrix: J u = W·g⊙(u − h⟨h, u⟩/(d·ms))/√ms, at every layer from there on."""
    model = models.load_model(tiny_checkpoint("qwen2", n_layers=N_LAYERS))
    with torch.no_grad():
        for layer in (2, 3):
            block = model.original_model.model.layers[layer]
            for module in (block.self_attn.o_proj, block.mlp.down_proj):
                for parameter in module.parameters():
                    parameter.zero_()
    vectors = vectors_for(model)
    options: dict[str, Any] = dict(behaviors=["backtracking"], unit="unit", keep_cells=True)
    found = attribute(model, traces, vectors, method="fisher_jvp", **options)
    drawn = attribute(model, traces, vectors, method="fisher", samples=2048, **options)
    norm = model.original_model.model.norm
    eps = float(model.original_model.config.rms_norm_eps)
    for case, (t, onset) in enumerate(zip(found.cells.trace.tolist(), found.cells.onset.tolist(), strict=True)):
        _, kept = model.run_with_cache(torch.tensor([traces[t].ids]))
        h = kept["blocks.1.hook_resid_post"][0, onset].double()
        ms = h.square().mean() + eps
        p = model(torch.tensor([traces[t].ids]))[0, onset].double().softmax(-1)
        for layer in (1, 2, 3):
            u = vectors["backtracking"].at(layer).double()
            u = u / u.norm()
            tangent = norm.weight.double() * (u - h * (h @ u) / (len(h) * ms)) / ms.sqrt()
            ju = model.W_U.double().T @ tangent
            closed = 0.5 * float(p @ ju.square() - (p @ ju) ** 2)
            assert float(found.cells.values[case, layer]) == pytest.approx(closed, rel=1e-4)
    assert ((drawn.mean - found.mean).abs() < 4.5 * drawn.standard_error).all()


# --- signed ---------------------------------------------------------------------------------------


def test_shares_of_first_tokens_by_hand(traces):
    share = first_token_shares(traces, LABELS, 300)
    counts = {label: [t.ids[s.start] for t in traces for s in t.spans if s.label == label] for label in LABELS}
    every = [t.ids[s.start] for t in traces for s in t.spans]
    assert len(every) == 5
    for b, label in enumerate(LABELS):
        base = len(counts[label]) / 5
        for token in {*every, 299}:
            expected = (counts[label].count(token) + base) / (every.count(token) + 1)
            assert float(share[b, token]) == pytest.approx(expected)
        unseen = next(token for token in range(300) if token not in every)
        assert float(share[b, unseen]) == pytest.approx(base)


def test_signed_refuses_what_it_cannot_estimate(tiny_model):
    model = tiny_model("qwen2")
    one = [trace_of(20, [("backtracking", 6, 9), ("backtracking", 9, 14)], seed=1)]
    with pytest.raises(LensteerError, match="every span of these traces is of 'backtracking'"):
        attribute(model, one, vectors_for(model), method="signed", behaviors=["backtracking"])
    with pytest.raises(LensteerError, match="no span of these traces is of 'uncertainty-estimation'"):
        attribute(model, one, vectors_for(model), method="signed")


@pytest.mark.parametrize("family", FAMILIES)
def test_signed_is_the_derivative_of_the_log_odds(tiny_model, traces, family):
    model = tiny_model(family)
    vectors = vectors_for(model)
    scores = attribute(model, traces, vectors, method="signed", coefficient=-0.5, keep_cells=True)
    assert (scores.spans, scores.unit, scores.coefficient_unit) == ("all", "logits", "difference")
    assert scores.n_spans == (5, 5)
    share = first_token_shares(traces, LABELS, int(model.cfg.d_vocab)).float()
    values = {}
    for t, trace in enumerate(traces):
        for span in trace.spans:
            for b in range(2):

                def odds(logits, span=span, b=b):
                    q = (logits[span.onset].softmax(-1) * share[b]).sum()
                    return q.log() - (1 - q).log()

                values[t, span.onset, b] = full_forward_gradients(model, trace.ids, odds)[:, span.onset]
    for case in range(len(scores.cells.trace)):
        b = int(scores.cells.behavior[case])
        gradient = values[int(scores.cells.trace[case]), int(scores.cells.onset[case]), b]
        for layer in range(N_LAYERS):
            slow = -0.5 * float(gradient[layer] @ vectors[LABELS[b]].scaled(layer))
            assert float(scores.cells.values[case, layer]) == pytest.approx(slow, rel=1e-3, abs=1e-5)
    assert (scores.mean < 0).any()
    assert (scores.mean > 0).any()


def test_signed_foretells_a_small_step(tiny_checkpoint, traces):
    model = models.load_model(tiny_checkpoint("qwen2", n_layers=N_LAYERS), dtype=torch.float64)
    vectors = vectors_for(model)
    scores = attribute(model, traces[:1], vectors, method="signed", behaviors=["backtracking"], keep_cells=True)
    share = first_token_shares(traces[:1], LABELS, int(model.cfg.d_vocab))
    onset, layer, step = 8, 1, 1e-3
    added = step * vectors["backtracking"].scaled(layer).double()
    tokens = torch.tensor([traces[0].ids])

    def odds(sign):
        def add(resid, hook):
            return resid.index_add(1, torch.tensor([onset]), sign * added[None, None])

        logits = model.run_with_hooks(tokens, fwd_hooks=[(models.resid_hook(layer), add)])
        return float(behavior_odds(logits[0, onset][None], share)[0, 1])

    case = (scores.cells.onset == onset).nonzero()[0, 0]
    slope = (odds(1) - odds(-1)) / (2 * step)
    assert float(scores.cells.values[case, layer]) == pytest.approx(slope, rel=1e-2)


# --- published ------------------------------------------------------------------------------------


def published_loss(z: torch.Tensor, *, log_target: bool) -> torch.Tensor:
    log_p = z.log_softmax(-1)
    return functional.kl_div(log_p, log_p.detach(), reduction="sum", log_target=log_target) / z.shape[-1]


def test_published_is_the_gradient_of_the_code_and_no_kl():
    z = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    loss = published_loss(z, log_target=False)
    assert loss.isnan(), "its target, read as probabilities, is negative"
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(gradient, published_cotangents(z.detach(), torch.arange(3))[0])
    log_p = z.detach().log_softmax(-1)
    formula = (log_p.exp() * log_p.sum(-1, keepdim=True) - log_p) / 50
    torch.testing.assert_close(gradient, formula)
    assert gradient.abs().min() > 1e-6


def test_with_the_flag_set_the_published_score_would_be_zero():
    """The first order of KL(p‖p) is 0 for every direction: `log_target=True` is no fix."""
    z = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    loss = published_loss(z, log_target=True)
    assert loss.detach() == 0.0
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("family", FAMILIES)
def test_published_scores_are_those_of_the_code(tiny_model, traces, family):
    model = tiny_model(family)
    vectors = vectors_for(model)
    scores = attribute(model, traces, vectors, method="published", keep_cells=True)
    assert (scores.spans, scores.coefficient_unit, scores.unit) == ("other", "unit", "arbitrary")
    assert scores.n_spans == (3, 3)
    for case in range(len(scores.cells.trace)):
        t, onset, b = (int(getattr(scores.cells, name)[case]) for name in ("trace", "onset", "behavior"))
        assert traces[t].spans[int(scores.cells.span[case])].label != LABELS[b]
        gradient = full_forward_gradients(
            model, traces[t].ids, lambda logits, at=onset: published_loss(logits[at], log_target=False)
        )
        for layer in range(N_LAYERS):
            u = vectors[LABELS[b]].at(layer)
            slow = abs(float(gradient[layer, onset] @ (u / u.norm())))
            assert float(scores.cells.values[case, layer]) == pytest.approx(slow, rel=1e-3, abs=1e-6)


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("method", ["fisher", "fisher_jvp", "signed", "published"])
def test_half_precision_stays_near_full_precision(tiny_checkpoint, traces, method):
    full, half = (
        attribute(model, traces, vectors_for(model), method=method, samples=512)
        for model in (
            models.load_model(tiny_checkpoint("qwen2", n_layers=N_LAYERS), dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
    )
    scale = full.mean.abs().max()
    assert ((half.mean - full.mean).abs() < 0.15 * full.mean.abs() + 0.05 * scale).all()
