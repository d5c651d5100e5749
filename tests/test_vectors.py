"""Fitting against the slow oracle on a random checkpoint, and files that are whole, wrong, cut or of another model."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lensteer import models
from lensteer.behaviors import BEHAVIORS, STEERED
from lensteer.errors import LensteerError
from lensteer.files import read_tensors
from lensteer.steering.plans import UNITS
from lensteer.vectors import BehaviorVectors, Direction, fit_recipes, fit_vectors
from lensteer.vectors.constructions import AGGREGATIONS, NEGATIVES, Recipe
from reference import kept_activations, slow_difference, slow_mean_norm
from test_activations import WINDOWS, make_trace


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return models.load_model(tiny_checkpoint("qwen2"))


@pytest.fixture(scope="module")
def traces():
    rng = random.Random(1)
    made = [make_trace(rng, i, n_prompt=rng.choice([2, 5]), n_spans=rng.choice([2, 4, 7])) for i in range(9)]
    made.append(replace(made[0], spans=()))
    return made


@pytest.fixture(scope="module")
def vectors(model, traces):
    return fit_vectors(model, traces, n_controls=4, n_bootstrap=20, seed=3)


# --- fitting --------------------------------------------------------------------------------------


@pytest.mark.medium
def test_every_recipe_is_the_slow_oracles(model, traces):
    recipes = [Recipe(*options) for options in product(WINDOWS, NEGATIVES, AGGREGATIONS)]
    kept = [kept_activations(model, trace) for trace in traces]
    scale = float(kept[0].abs().mean())
    fitted = fit_recipes(model, traces, recipes, batch_size=4)
    for recipe, vectors in zip(recipes, fitted, strict=True):
        truth = slow_difference(kept, traces, STEERED, recipe.window, recipe.negatives, recipe.aggregation)
        error = (vectors.raw.double() - truth).abs().max()
        assert error < 1e-5 * scale, recipe
        assert truth.abs().max() > 0.01 * scale
        torch.testing.assert_close(vectors.mean_norm.double(), slow_mean_norm(kept, traces), rtol=1e-5, atol=0)
        assert vectors.recipe == recipe
    distinct = {tuple(vectors.raw.flatten()[:9].tolist()) for vectors in fitted}
    assert len(distinct) > 30  # per token and per span are one for onsets, and so on, but no more


def test_batches_and_order_change_nothing(model, traces, vectors):
    for other in (
        fit_vectors(model, traces, n_controls=4, n_bootstrap=20, seed=3, batch_size=1),
        fit_vectors(model, traces[::-1], n_controls=4, n_bootstrap=20, seed=3, batch_size=5),
    ):
        assert other.provenance["traces"] == vectors.provenance["traces"]
        for name, tensor in vectors._tensors().items():
            torch.testing.assert_close(other._tensors()[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_a_subset_of_layers(model, traces, vectors):
    some = fit_vectors(model, traces, layers=[3, 1])
    torch.testing.assert_close(some.raw, vectors.raw[:, [3, 1]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(some["backtracking"].at(1), vectors["backtracking"].at(1), rtol=1e-4, atol=1e-5)
    with pytest.raises(LensteerError, match=r"no vector at layer 2: its layers are \[3, 1\]"):
        some["backtracking"].scaled(2)


def test_what_the_vectors_say_of_themselves(model, traces, vectors):
    assert vectors.labels == STEERED == tuple(vectors)
    assert vectors.layers == (0, 1, 2, 3)
    assert vectors.n_traces == 9
    spans = [span.label for trace in traces for span in trace.spans]
    assert vectors.counts == {label: spans.count(label) for label in BEHAVIORS}
    assert vectors.provenance["model"] == models.fingerprint(model).to_dict()
    assert vectors.provenance["site"] == "resid_post"
    assert "torch" in vectors.provenance["versions"]
    frame = vectors.to_dataframe()
    assert len(frame) == 4 * 4
    row = frame[(frame.behavior == "backtracking") & (frame.layer == 2)].iloc[0]
    assert row.ratio == pytest.approx(float(vectors["backtracking"].at(2).norm() / vectors.mean_norm[2]), rel=1e-5)
    assert row.n_spans == vectors.counts["backtracking"]
    assert 3 / 32 < row.top3_energy < 1


@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_says_what_coefficient_one_adds(vectors, unit):
    direction = vectors["backtracking"]
    for layer in vectors.layers:
        scaled, raw = direction.scaled(layer, unit), direction.at(layer)
        length = {"difference": raw.norm(), "mean_norm": vectors.mean_norm[layer], "unit": 1.0}[unit]
        assert float(scaled.norm()) == pytest.approx(float(length), rel=1e-5)
        assert float(torch.cosine_similarity(scaled, raw, 0)) == pytest.approx(1, rel=1e-5)
    flat = replace(direction, raw=torch.zeros_like(direction.raw))
    with pytest.raises(LensteerError, match="'backtracking' is zero at layer 0"):
        flat.scaled(0, unit)


def test_by_default_coefficient_one_adds_the_difference_itself(vectors):
    direction = vectors["backtracking"]
    assert torch.equal(direction.scaled(2), direction.at(2))
    with pytest.raises(
        LensteerError, match=r"no unit 'norm' of a coefficient: choose one of \['difference', 'mean_norm'"
    ):
        direction.scaled(2, "norm")


def test_a_behavior_without_spans_is_left_out(model, traces):
    bare = [replace(t, spans=tuple(s for s in t.spans if s.label != "backtracking")) for t in traces]
    vectors = fit_vectors(model, bare, n_controls=2, n_bootstrap=5)
    assert vectors.labels == STEERED[:3]
    assert vectors.counts["backtracking"] == 0
    assert vectors.raw.isfinite().all()
    with pytest.raises(LensteerError, match="'backtracking' had no span in the traces: choose one of 'adding-know"):
        vectors["backtracking"]
    with pytest.raises(LensteerError, match="unknown behavior 'wandering'"):
        vectors["wandering"]


def test_replicates_without_a_behavior_are_left_out(model, traces):
    rare = [
        replace(t, spans=tuple(s for s in t.spans if i == 0 or s.label != "backtracking")) for i, t in enumerate(traces)
    ]
    while all(span.label != "backtracking" for span in rare[0].spans):
        rare[0] = replace(rare[0], spans=(replace(rare[0].spans[0], label="backtracking"), *rare[0].spans[1:]))
    vectors = fit_vectors(model, rare, n_bootstrap=200)
    assert vectors.replicates is not None
    assert 95 < len(vectors.replicates) < 155  # of 200, a share 1/e has the only such trace zero times


def test_controls_are_directions_to_steer_with(vectors):
    for kind, label in [("isotropic", None), ("covariance_matched", None), ("shuffled", "backtracking")]:
        draws = vectors.random(kind, label)
        assert [d.label for d in draws] == [f"{kind}-{i}" for i in range(4)]
        for draw in draws:
            length = float(draw.scaled(2, "mean_norm").norm())
            assert length == pytest.approx(float(vectors.mean_norm[2]), rel=1e-5)
            assert torch.equal(draw.scaled(2), draw.at(2))
    assert not torch.equal(
        vectors.random("shuffled", "backtracking")[0].at(1),
        vectors.random("shuffled", "adding-knowledge")[0].at(1),
    )
    with pytest.raises(LensteerError, match="unknown control 'gaussian': choose one of 'isotropic'"):
        vectors.random("gaussian")
    with pytest.raises(LensteerError, match="unknown behavior 'None': choose one of 'adding-knowledge'"):
        vectors.random("shuffled")
    with pytest.raises(LensteerError, match="n_controls=20"):
        replace(vectors, controls=None).random("isotropic")


def test_the_seed_decides_all_that_is_random_and_nothing_else(model, traces, vectors):
    other = fit_vectors(model, traces, n_controls=4, n_bootstrap=20, seed=4)
    assert torch.equal(other.raw, vectors.raw)
    for name in ("isotropic", "covariance_matched", "shuffled"):
        assert not torch.allclose(getattr(other.controls, name), getattr(vectors.controls, name)), name
    shared = min(len(other.replicates), len(vectors.replicates))
    assert not torch.allclose(other.replicates[:shared], vectors.replicates[:shared])


def test_nothing_to_fit(model, traces):
    with pytest.raises(LensteerError, match="annotate the traces first"):
        fit_vectors(model, [replace(t, spans=()) for t in traces])
    one = [replace(t, spans=tuple(s for s in t.spans if s.label == "backtracking")) for t in traces if t.spans]
    for negatives in ("rest", "spans", "same_trace"):
        with pytest.raises(LensteerError, match=f"negatives '{negatives}' leave nothing to subtract"):
            fit_vectors(model, one, negatives=negatives)
    with pytest.raises(LensteerError, match="unknown negatives 'none'"):
        fit_vectors(model, traces, negatives="none")


@pytest.mark.medium
def test_probes_are_fitted_in_the_same_pass_and_leave_the_difference_as_it_is(model, traces, vectors, tmp_path):
    options: dict[str, Any] = dict(n_controls=4, n_bootstrap=20, seed=3)
    recipe = Recipe("span", "rest", "token", "logistic")
    alone = fit_vectors(model, traces, window="span", negatives="rest", aggregation="token", construction="logistic")
    for recipes in ([Recipe(), recipe], [recipe, Recipe()]):
        both = {vectors.recipe.construction: vectors for vectors in fit_recipes(model, traces, recipes, **options)}
        for name, tensor in vectors._tensors().items():
            assert torch.equal(both["difference"]._tensors()[name], tensor), name
        assert both["difference"].provenance == vectors.provenance
        torch.testing.assert_close(both["logistic"].raw, alone.raw, rtol=1e-4, atol=1e-6)
    probe = both["logistic"]
    assert probe.recipe == recipe
    assert probe.controls.shuffled.shape == vectors.controls.shuffled.shape
    assert not torch.allclose(probe.controls.shuffled[0], probe.raw)
    assert "scikit-learn" in probe.provenance["versions"]
    assert "scikit-learn" not in vectors.provenance["versions"]
    cosines = torch.cosine_similarity(probe.raw, vectors.raw, dim=-1)
    assert cosines.max() < 0.999
    some = fit_vectors(model, traces, construction="logistic", layers=[3, 1], batch_size=2)
    every = fit_vectors(model, traces[::-1], construction="logistic")
    torch.testing.assert_close(some.raw, every.raw[:, [3, 1]], rtol=1e-3, atol=1e-4)
    probe.save(tmp_path / "probe.safetensors")
    loaded = BehaviorVectors.load(tmp_path / "probe.safetensors", model)
    assert loaded.recipe.construction == "logistic"
    assert loaded.provenance == probe.provenance
    assert torch.equal(loaded.raw, probe.raw)


# --- values ---------------------------------------------------------------------------------------


def test_from_means():
    means = {"deduction": torch.full((3, 2), 5.0), "backtracking": torch.tensor([[4.0, 8.0]] * 3)}
    vectors = BehaviorVectors.from_means(means, torch.tensor([[3.0, 4.0]] * 3), counts={"deduction": 7})
    assert vectors["backtracking"].at(2).tolist() == [1, 4]
    assert vectors.mean_norm.tolist() == [5, 5, 5]
    assert vectors.recipe == Recipe("published", "all", "span")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_must_be_finite(vectors, bad):
    raw = vectors.raw.clone()
    raw[1, 2, 3] = bad
    with pytest.raises(LensteerError, match="raw holds values that are not finite"):
        replace(vectors, raw=raw)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def path(vectors, tmp_path):
    vectors.save(tmp_path / "vectors.safetensors")
    return tmp_path / "vectors.safetensors"


def test_a_file_gives_back_what_was_saved(model, vectors, path):
    loaded = BehaviorVectors.load(path, model)
    for name, tensor in vectors._tensors().items():
        assert torch.equal(loaded._tensors()[name], tensor), name
    for name in ("labels", "layers", "counts", "n_traces", "recipe", "provenance"):
        assert getattr(loaded, name) == getattr(vectors, name), name
    bare = replace(vectors, controls=None, replicates=None)
    bare.save(path)
    loaded = BehaviorVectors.load(path)
    assert loaded.controls is None
    assert loaded.replicates is None


def test_a_file_from_before_there_were_constructions_is_of_differences(vectors, path):
    rewrite(path, recipe={"window": "onset±3", "negatives": "spans", "aggregation": "span"})
    assert BehaviorVectors.load(path).recipe == vectors.recipe == Recipe("onset±3", "spans", "span", "difference")


def test_vectors_of_another_model_are_refused(path, tiny_checkpoint):
    for other in (
        tiny_checkpoint("qwen2", seed=1),
        tiny_checkpoint("qwen2", n_layers=2),
        tiny_checkpoint("llama"),
    ):
        with pytest.raises(LensteerError, match=r"vectors of model .* do not fit .*weights '\w+' is not"):
            BehaviorVectors.load(path, models.load_model(other))
    nameless = replace(BehaviorVectors.load(path), provenance={})
    with pytest.raises(LensteerError, match="do not say which model"):
        nameless.check_model(models.load_model(tiny_checkpoint("qwen2")))


def test_a_cut_file_is_refused_wherever_it_is_cut(path):
    whole = path.read_bytes()
    for length in [0, 4, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(LensteerError, match=r"vectors.safetensors' is truncated"):
            BehaviorVectors.load(path)


def rewrite(path, tensors=None, **header):
    """Change parts of a file on disk, as something other than lensteer would."""
    _, old = read_tensors(path)
    metadata = {"lensteer": json.dumps({**old, **header})}
    save_file({**load_file(path), **(tensors or {})}, path, metadata)


@pytest.mark.usefixtures("without_shape_checks")
def test_wrong_contents_are_refused_by_name(path, vectors):
    intact = path.read_bytes()
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(tensors={"raw": torch.zeros(4, 3, 32)}), r"raw is float32\[4, 3, 32\]: .* \(behavior 4, layer 4"),
        (dict(tensors={"raw": torch.zeros(4, 32)}), "raw is float32"),
        (dict(tensors={"mean_norm": torch.ones(3)}), "mean_norm is float32"),
        (dict(tensors={"replicates": torch.zeros(9, 3, 4, 32)}), "replicates is float32"),
        (dict(tensors={"controls.shuffled": torch.zeros(4, 4, 32)}), "controls.shuffled is float32"),
        (dict(tensors={"controls.isotropic": torch.full((4, 4, 32), torch.inf)}), "controls.isotropic holds"),
        (dict(tensors={"controls.isotropic": torch.ones(2, 4, 32)}), r"controls.* .control 2"),
        (dict(tensors={"extra": torch.zeros(1)}), r"\['extra'\] are of no behavior vectors"),
        (dict(tensors={"raw": vectors.raw.int()}), "raw is int32"),
        (dict(tensors={"raw": vectors.raw.to(torch.float8_e4m3fn)}), "raw is float8"),
        (dict(layers=[True, 1, 2, 3]), "True is no int"),
        (dict(tensors={"raw": torch.full_like(vectors.raw, torch.nan)}), "raw holds values that are not finite"),
        (dict(labels=["backtracking"]), "raw is float32.*behavior 1"),
        (dict(format=99), "has format 99"),
        (dict(recipe={"window": "nowhere"}), "unknown window 'nowhere'"),
        (dict(recipe={"power": 2}), "unknown fields .*power"),
    ]
    for change, message in wrong:
        path.write_bytes(intact)
        rewrite(path, **change)
        with pytest.raises(LensteerError, match=message) as error:
            BehaviorVectors.load(path)
        assert str(path) in str(error.value)
    save_file({"raw": torch.zeros(1)}, path)
    with pytest.raises(LensteerError, match="holds no vectors"):
        BehaviorVectors.load(path)
    with pytest.raises(LensteerError, match="no vectors at"):
        BehaviorVectors.load(path.with_name("other.safetensors"))


def test_a_failed_write_leaves_the_old_file(vectors, path, monkeypatch):
    old = path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(LensteerError, match=r"cannot write vectors to .*no space left"):
        replace(vectors, n_traces=99).save(path)
    assert path.read_bytes() == old
    with pytest.raises(LensteerError, match="give a file to write"):
        vectors.save(path / "below-a-file.safetensors")
    assert path.read_bytes() == old


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("raw", "given"),
    [
        (torch.ones(2, 8).numpy(), "a ndarray"),
        ([[1.0] * 8] * 2, "a list"),
        (torch.ones(2, 8).long(), r"int64\[2, 8\]"),
        (torch.ones(2, 8).to(torch.complex64), r"complex64\[2, 8\]"),
        (torch.ones(2, 8).to(torch.float8_e4m3fn), r"float8_e4m3fn\[2, 8\]"),
        (torch.ones(3, 8), r"float32\[3, 8\]"),
        (torch.ones(2), r"float32\[2\]"),
    ],
)
def test_a_direction_made_by_hand_says_what_its_tensor_should_be(raw, given):
    with pytest.raises(LensteerError, match=rf"Direction\.raw is {given}: give a tensor of float .* \(layer 2"):
        Direction("own", raw, torch.ones(2), (0, 1))
