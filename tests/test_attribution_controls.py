"""Controls: a planted direction is found where it is read, controls are fair, scrambled weights say nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import lensteer as ls
from lensteer import models
from lensteer.attribution import LayerScores, attribute, control_tests, fidelity
from lensteer.errors import LensteerError
from lensteer.steering.plans import UNITS
from test_attribution import N_LAYERS, trace_of, vectors_for

D = 32
READ_AT = 2  # the block that reads the planted direction; its input is the output of block 1


def planted_model(tiny_checkpoint):
    """A random model in which nothing writes one direction and only block `READ_AT` reads it; and that direction."""
    model = models.load_model(tiny_checkpoint("llama", n_layers=N_LAYERS))
    u = torch.randn(D, generator=torch.Generator().manual_seed(11))
    u = u / u.norm()
    inner = model.original_model

    def blind(weight, side):  # side 1: what reads the residual stream, side 0: what writes it
        weight.sub_((weight @ u)[:, None] * u if side else u[:, None] * (u @ weight))

    with torch.no_grad():
        blind(inner.model.embed_tokens.weight, 1)
        blind(inner.lm_head.weight, 1)
        for number, block in enumerate(inner.model.layers):
            attention, mlp = block.self_attn, block.mlp
            blind(next(attention.o_proj.parameters()), 0)
            blind(next(mlp.down_proj.parameters()), 0)
            if number != READ_AT:
                for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                    blind(next(reader.parameters()), 1)
    return model, u


@pytest.fixture(scope="module")
def planted(tiny_checkpoint):
    return planted_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def traces():
    spans = [("backtracking", 6, 9), ("uncertainty-estimation", 9, 14), ("backtracking", 14, 22)]
    return [trace_of(26, spans, seed=s) for s in range(4)]


@pytest.mark.parametrize("method", ["exact", "fisher", "fisher_jvp", "signed", "published"])
def test_a_planted_direction_is_found_where_it_is_read(planted, traces, method):
    model, u = planted
    raw = torch.stack([u, torch.randn(D, generator=torch.Generator().manual_seed(3))])
    vectors = vectors_for(model, raw[:, None].repeat(1, N_LAYERS, 1))
    scores = attribute(model, traces, vectors, method=method, spans="all", coefficient=0.2, unit="unit")
    planted_effect, random_effect = scores.mean.abs()
    before = planted_effect[:READ_AT]
    # Behind the block that reads it, a direction orthogonal to the stream changes its length to second order only.
    assert planted_effect[READ_AT:].max() < 0.02 * before.min()
    assert random_effect[READ_AT:].min() > 0.1 * random_effect[:READ_AT].min()


def test_a_planted_direction_stands_out_and_a_random_one_does_not(planted, traces):
    model, u = planted
    read = model.original_model.model.layers[READ_AT].mlp
    with torch.no_grad():
        for module in (read.gate_proj, read.up_proj):  # read it loudly, so that nothing else is as strong
            weight = next(module.parameters())
            weight.add_(3.0 * torch.outer(torch.randn(len(weight), generator=torch.Generator().manual_seed(5)), u))
    try:
        raw = torch.randn(2, N_LAYERS, D, generator=torch.Generator().manual_seed(9))
        raw[1] = u
        vectors = vectors_for(model, raw, n_controls=50)
        scores = attribute(model, traces, vectors, method="fisher", unit="unit", n_controls=50)
        tests = control_tests(scores)
        assert tests.kinds == ("covariance_matched", "shuffled")
        assert tests.z.shape == (2, 2, N_LAYERS)
        assert torch.allclose(tests.p[:, 1, :READ_AT], torch.tensor(1 / 51, dtype=torch.float64))
        assert torch.allclose(tests.p_max[:, 1, :READ_AT], torch.tensor(1 / 51, dtype=torch.float64))
        assert (tests.z[:, 1, :READ_AT] > 3).all()
        assert (tests.p[:, 1, READ_AT:] > 0.9).all(), "nobody reads it there: every random vector does more"
        assert tests.p_max[:, 0].min() > 0.05
        assert tests.p_any("shuffled") == pytest.approx(1 / 51)
        frame = tests.to_dataframe()
        assert len(frame) == 2 * 2 * N_LAYERS
        assert set(frame["n_controls"]) == {50}
        with pytest.raises(
            LensteerError, match="no control vectors of kind 'isotropic': choose one of 'covariance_matched'"
        ):
            tests.p_any("isotropic")
    finally:
        with torch.no_grad():
            for module in (read.gate_proj, read.up_proj):
                weight = next(module.parameters())
                weight.sub_(3.0 * torch.outer(torch.randn(len(weight), generator=torch.Generator().manual_seed(5)), u))


@pytest.mark.medium
def test_controls_are_scored_as_the_vectors_are(planted, traces):
    model, _ = planted
    vectors = vectors_for(model, n_controls=4)
    for method in ("fisher", "signed", "published"):
        for unit in UNITS:
            options: dict[str, Any] = dict(method=method, unit=unit, spans="all", coefficient=-0.5)
            scores = attribute(model, traces, vectors, n_controls=3, **options)
            shared = vectors.controls.covariance_matched[2].expand(2, -1, -1)
            for kind, raw in (("shuffled", vectors.controls.shuffled[2]), ("covariance_matched", shared)):
                if unit == "difference":  # a null is as long as the vector that it is held against
                    raw = raw * vectors.raw.norm(dim=-1, keepdim=True) / raw.norm(dim=-1, keepdim=True)
                alone = attribute(model, traces, dataclasses.replace(vectors, raw=raw.contiguous()), **options)
                noise = 1e-5 * float(alone.mean.abs().max())  # signed scores cancel, fp32 errors don't
                torch.testing.assert_close(scores.controls[kind][2], alone.mean, rtol=1e-4, atol=noise)
            assert len(scores.controls["shuffled"]) == 3
    with pytest.raises(
        LensteerError, match="controls=5, but these vectors have 4 controls: fit them with n_controls=5"
    ):
        attribute(model, traces, vectors, method="fisher", n_controls=5)
    with pytest.raises(LensteerError, match="'exact' scores without control vectors: attribute with n_controls=200"):
        control_tests(attribute(model, traces, vectors))


def grid(values: torch.Tensor, **changes) -> LayerScores:
    """Scores by hand."""
    n_layers = values.shape[1]
    labels = ls.BEHAVIORS[: len(values)]
    fields = dict(
        labels=labels, layers=tuple(range(n_layers)), n_layers=n_layers, mean=values.double(), low=values.double(),
        high=values.double(), n_spans=(9,) * len(values), n_traces=3, method="fisher", coefficient=1.0,
        coefficient_unit="mean_norm", spans="own", cost={"rows": 10, "seconds": 2.0},
    )  # fmt: skip
    return LayerScores(**{**fields, **changes})


@pytest.mark.parametrize("kind", ["covariance_matched", "shuffled"])
def test_p_values_are_uniform_for_a_vector_that_is_a_null_draw(kind):
    """Squares of Gaussians, correlated over layers and of different size; 4 × 6 cells, 39 controls, 400 repetitions."""
    generator = torch.Generator().manual_seed(0)
    size = torch.linspace(0.5, 3.0, 6)
    single, largest = [], []
    for _ in range(400):
        # With covariance-matched control vectors, one draw is held in the place of every behavior; behaviors have their
        # own.
        n_places = 1 if kind == "covariance_matched" else 4
        common = torch.randn(40, 4, 1, generator=generator)
        draws = (0.8 * common + 0.6 * torch.randn(40, 4, 6, generator=generator)).square() * size
        observed, controls = draws[0], draws[1:, :n_places].expand(-1, 4, -1)
        tests = control_tests(grid(observed, controls={kind: controls.double()}))
        single.append(tests.p[0, 1, 2])
        largest.append(tests.p_any(kind))
    for p in (torch.tensor(single), torch.tensor(largest)):
        for level in (0.05, 0.25, 0.5, 0.75):
            expected, error = level, math.sqrt(level * (1 - level) / 400)
            assert abs(float((p <= level + 1e-9).double().mean()) - expected) < 3.5 * error + 0.01


def test_null_tests_by_hand():
    controls = torch.tensor([[[1.0, 5.0]], [[2.0, 6.0]], [[3.0, 7.0]]], dtype=torch.float64)
    tests = control_tests(grid(torch.tensor([[2.5, 10.0]]), controls={"shuffled": controls}))
    assert tests.z[0, 0].tolist() == pytest.approx([0.5, 4.0])
    assert tests.p[0, 0].tolist() == pytest.approx([2 / 4, 1 / 4])
    assert tests.p_max[0, 0].tolist() == pytest.approx([2 / 4, 1 / 4])
    missing = control_tests(grid(torch.tensor([[math.nan, 10.0]]), controls={"shuffled": controls}))
    assert missing.p[0, 0, 0].isnan()
    assert missing.p_any("shuffled") == 0.25
    mixed = grid(
        torch.tensor([[99.0, 10.0]]), controls={"shuffled": controls}, estimated=torch.tensor([[2.5, 10.0]]).double()
    )
    assert torch.equal(control_tests(mixed).p, tests.p), (
        "control vectors are estimates, and so is what they are compared with"
    )


# --- fidelity -------------------------------------------------------------------------------------


def test_fidelity_by_hand():
    square = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 3.0, 2.0]]) * 1e-2
    fisher = grid(square, coefficient=0.5)
    exact = []
    for alpha in (1.0, 0.1, 2.0):
        truth = square * (alpha / 0.5) ** 2
        if alpha == 2.0:
            truth[0] *= 0.5
        if alpha >= 1.0:
            truth[1, 3] *= 1.5
        exact.append(
            grid(truth, method="exact", coefficient=alpha, cost={"rows": 90, "seconds": 30.0, "coefficients": 3})
        )
    found = fidelity(fisher, exact)
    assert found.coefficients == (0.1, 1.0, 2.0)
    torch.testing.assert_close(found.predicted[1], 4 * square.double())
    assert found.pearson[0] == pytest.approx(1.0)
    assert found.spearman[0] == pytest.approx(1.0)
    assert found.pearson[2] < found.pearson[1] < 1
    assert found.radius.tolist() == [[2.0] * 4, [math.inf, math.inf, math.inf, 1.0]]
    assert (found.top_overlap[0] == 1).all()
    assert not found.unreliable.any()
    assert (found.cost_rows, found.cost_seconds) == (3.0, 5.0)
    frame = found.to_dataframe()
    assert len(frame) == 3 * 2 * 4
    assert frame.query("coefficient == 2.0 and layer == 1 and radius == 2.0")["ratio"].iloc[0] == pytest.approx(2.0)

    signed = grid(square.flip(1), method="signed", unit="logits")
    other = fidelity(signed, exact[0])
    assert other.radius.isnan().all()
    torch.testing.assert_close(other.predicted[0], signed.mean)
    assert other.top_overlap[0].tolist() == pytest.approx([2 / 3, 2 / 3])
    noisy = dataclasses.replace(fisher, noise_floor=1.5e-3)
    assert fidelity(noisy, exact).unreliable.tolist() == [[True, False, False, False], [False, True, False, False]]
    gap = grid(torch.tensor([[1.0, 2.0, 3.0, 4.0], [math.nan] * 4]) * 1e-2, method="exact", coefficient=0.5)
    holes = fidelity(fisher, gap)
    assert holes.pearson[0] == pytest.approx(1.0)
    assert holes.radius[1].isnan().all()
    assert holes.top_overlap[0, 1].isnan()


def test_fidelity_refuses_what_cannot_be_compared():
    fisher, exact = grid(torch.ones(2, 3)), grid(torch.ones(2, 3), method="exact")
    with pytest.raises(LensteerError, match="no exact scores to compare with"):
        fidelity(fisher, [])
    with pytest.raises(LensteerError, match="scores of method 'fisher' are not a reference"):
        fidelity(fisher, fisher)
    with pytest.raises(LensteerError, match=r"scores with layers \(0, 1, 2\), exact ones with \(0, 1\)"):
        fidelity(fisher, grid(torch.ones(2, 2), method="exact"))
    with pytest.raises(LensteerError, match="scores with coefficient_unit 'mean_norm', exact ones with 'unit'"):
        fidelity(fisher, dataclasses.replace(exact, coefficient_unit="unit"))
    with pytest.raises(LensteerError, match="scores at coefficient 0 predict nothing"):
        fidelity(dataclasses.replace(fisher, coefficient=0.0), exact)


def test_fisher_stands_for_exact_on_a_random_model(planted, traces):
    model, _ = planted
    vectors = vectors_for(model)
    exact = attribute(model, traces, vectors, spans="all", coefficient=[0.01, 0.1, 3.0])
    drawn = attribute(model, traces, vectors, method="fisher_jvp", spans="all", coefficient=0.1)
    found = fidelity(drawn, exact)
    assert found.pearson[0] > 0.99
    assert found.spearman[0] > 0.95
    assert found.pearson[0] >= found.pearson[2]
    assert (found.top_overlap[0] == 1).all()
    assert (found.radius >= 0.1).all()


# --- the organism ---------------------------------------------------------------------------------


def scrambled(model, seed: int):
    """The same architecture with the entries of every weight matrix permuted: same sizes, nothing learned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                order = torch.randperm(parameter.numel(), generator=generator)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return model


@pytest.mark.slow
def test_scrambled_weights_do_not_show_the_organisms_profile(organism):
    """In the trained model vectors push towards their own behavior in middle layers; in a scrambled one, nowhere."""
    tasks = ls.load_tasks(split="train")[:8]
    traces = ls.annotate(ls.generate_traces(organism, tasks, temperature=1.0, seed=0, max_new_tokens=250), ls.grammar)

    def push(model) -> float:
        vectors = ls.fit_vectors(model, traces, window="onset")
        labels = [label for label in ls.STEERED if label in vectors.labels]
        scores = attribute(model, traces, vectors, method="signed", behaviors=labels, coefficient=0.5)
        middle = slice(len(scores.layers) // 4, -len(scores.layers) // 4)
        return float(scores.mean[:, middle].mean())

    trained = push(organism)
    assert trained > 0.02
    for seed in (0, 1):
        assert abs(push(scrambled(ls.load_model(), seed))) < 0.3 * trained
