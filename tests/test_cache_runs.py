"""`lensteer cache fit` and `run`, what they leave on disk, and where the report shows it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import lensteer as ls
import synthetic
from lensteer.cache_steering.organism import ENDING, JOIN, make_records
from lensteer.cli import app
from lensteer.evaluation import Condition, Modes
from lensteer.generation.jobs import Sampling
from lensteer.pipeline.cache import read_cache_run
from lensteer.report import render, summary
from synthetic import modes


def call(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.medium
def test_fit_then_run(tmp_path):
    vector, out = tmp_path / "think.safetensors", tmp_path / "out"
    told = call("cache", "fit", "--out", vector, "--n", 6, "--shots", 1)
    assert "6 pairs" in told
    sizes = ["--n-dev", 4, "--n-test", 8, "--n-controls", 1, "--c-values", "0.75,1", "--suffix", "Just the answer."]
    told = call("cache", "run", vector, "--out", out, *sizes)
    assert "dev: 3 conditions × 4 tasks" in told
    assert "  c_values=0.75: thinks" in told
    assert "cache: thinks" in told
    found = read_cache_run(out)
    assert found["test"]["cache"].thinks.value >= 0.75
    assert found["test"]["spread-0"].thinks.value <= 0.25
    assert found["vector"]["n_pairs"] == 6
    assert {condition.condition for condition in found["test"].conditions} == {
        "unsteered",
        "cache",
        "prompted baseline",
        "spread-0",
    }
    kept = json.loads((out / "cache.json").read_text())
    assert kept["why"].startswith("c_values=")
    assert [s["condition"] for s in kept["samples"]] == [
        n for n in ("unsteered", "cache", "prompted baseline") for _ in range(3)
    ]
    assert all(s["answer"] for s in kept["samples"])
    assert found["test"]["cache"].changes["thinks"].value >= 0.5 > found["test"]["cache"].p["thinks"]
    before = (out / "cache-test.jsonl").read_bytes()
    call("cache", "run", vector, "--out", out, *sizes)
    assert (out / "cache-test.jsonl").read_bytes() == before  # nothing is run twice
    assert "holds another experiment" in call("cache", "run", vector, "--out", out, *sizes, "--seed", 5, code=1)


def test_mistakes_are_one_line(tmp_path):
    for words, said in (
        (["fit", "--out", tmp_path / "v", "--style", "poetic"], "'poetic'"),
        (["fit", "--out", tmp_path / "v", "--records", tmp_path / "none.jsonl"], "none.jsonl"),
        (["run", tmp_path / "none.safetensors", "--out", tmp_path / "x"], "none.safetensors"),
        (["run", tmp_path / "none.safetensors", "--out", tmp_path / "x", "--c-values", "a,1"], "'a,1'"),
        (["fit", "--out", tmp_path / "v", "--records", "organism", "--n", 300], "300 pairs of 100 records"),
    ):
        assert said in call("cache", *words, code=1).splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(ls.LensteerError, match="run it again"):
        read_cache_run(tmp_path)


@pytest.mark.medium
def test_a_cache_plan_is_an_condition_of_an_evaluation(organism):
    pairs = ls.contrastive_pairs(organism, make_records(6), n=4, shots=1, ending=ENDING, join=JOIN)
    plan = ls.CachePlan(ls.fit_cache_vector(organism, pairs), 0.75)
    traces = ls.annotate(
        ls.generate_traces(organism, ls.load_tasks(split="train", n=12), max_new_tokens=300), ls.grammar
    )
    vectors = ls.fit_vectors(organism, traces, window="onset")
    found = ls.evaluate(
        organism,
        ls.load_tasks(split="test", n=3),
        vectors,
        {"backtracking": 4},
        0.4,
        extra=[Condition("cache", plan)],
        pools=["isotropic"],
        n_controls=1,
        margins=ls.GRAMMAR_MARGINS,
        sampling=Sampling(1, 1.0, 0, 200, 64, thinking=False),
        annotator=ls.grammar,
    )
    (cache,) = [condition for condition in found.conditions if condition.condition == "cache"]
    (unsteered,) = [condition for condition in found.conditions if condition.condition == "unsteered"]
    assert cache.length > unsteered.length
    assert (cache.pool, cache.layer, unsteered.text) == ("", -1, None)
    assert {figure.name for figure in cache.text.figures} == {"finished", "parsed"}
    assert {effect.behavior for effect in found.effects} == {"backtracking"}


def test_modes_are_saved_whole_and_name_their_conditions(tmp_path):
    modes().save(tmp_path / "m.json")
    assert Modes.load(tmp_path / "m.json") == modes()
    assert len(modes().to_dataframe()) == 4 * 5 - 1
    with pytest.raises(ls.LensteerError, match="'words'"):
        modes()["words"]
    (tmp_path / "m.json").write_text(json.dumps({"arms": 3}))
    with pytest.raises(ls.LensteerError, match="no Modes of version 1"):
        Modes.load(tmp_path / "m.json")


def test_the_report_shows_both_methods():
    results = synthetic.results(cache=synthetic.cache())
    found = summary(results)
    assert found["cache.cache.thinks.mean"] == 0.9
    assert found["cache.random.thinks.max"] == 0.25
    assert "cache.cache.accuracy.mean" not in found
    page = render(results)
    assert "One edit of the KV cache instead" in page
    assert "control vectors" in page
    assert "One edit of the KV cache" not in render(synthetic.results())


def test_figures_of_modes():
    figure = ls.plots.modes(modes())
    assert [trace.x for trace in figure.data[::2]] == [(0.2, 0.9), (0.2,), (0.2, 0.9)]
    assert [set(trace.y) for trace in figure.data[1::2]] == [{"isotropic vectors"}] * 3
    assert all(len(trace.x) == 2 for trace in figure.data[1::2] if trace.x)
    with pytest.raises(ls.LensteerError, match="'speed'"):
        ls.plots.modes(modes(), ["speed"])
    curves = {"cache": [(7.6, 7.4, 7.8), (0.1, 0.0, 0.2)]}
    figure = ls.plots.kl_by_token(curves, [(0, 1), (1, 20)])
    assert figure.data[0].x == ("0", "1 to 19")
    with pytest.raises(ls.LensteerError, match="2 points for 1 bins"):
        ls.plots.kl_by_token(curves, [(0, 1)])
