"""Plans of runs: shapes as published, rules that follow from them, and the measurement that they start from."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from lensteer import models, planner
from lensteer.cli import app
from lensteer.errors import LensteerError
from lensteer.pipeline import RunConfig
from lensteer.planner import COMPUTED, EXTRAPOLATED, MEASURED, SHAPES, Gpus, plan_run, shape_of


def sizes(n, tokens=600):
    return replace(RunConfig(), n_train=n, train_tokens=tokens, max_new_tokens=tokens)


@pytest.mark.parametrize(("name", "billions"), [("7B", 7.616), ("14B", 14.770), ("32B", 32.764), ("70B", 70.554)])
def test_shapes_have_the_published_number_of_parameters(name, billions):
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_shape_of_a_folder_is_that_of_its_model(tiny_checkpoint, tiny_model, family):
    shape, model = shape_of(str(tiny_checkpoint(family))), tiny_model(family)
    assert shape.n_layers == models.n_layers(model)
    n = sum(p.numel() for p in model.original_model.parameters())
    assert shape.parameters == pytest.approx(n, rel=5e-3)  # norms of heads are not counted


def test_the_measured_speeds_come_back():
    """At 7B on one H100. Decoding at batch 64 took 2,843 tokens/s; the plan's prefill leans high."""
    config = replace(sizes(64, 128), batch_size=64)
    seconds = plan_run(SHAPES["7B"], config, prompt=100)["traces.time"]
    assert 0.8 * 2843 < 64 * 128 / seconds < 2843
    alone = plan_run(SHAPES["7B"], replace(config, n_train=1), prompt=100)["traces.time"]
    assert 128 / alone == pytest.approx(43.7, rel=0.03)  # bound by the host
    assert 2 * planner._P * 1630 / (planner.REACHED * 989e12) == pytest.approx(0.17)
    config = replace(config, n_train=2, train_tokens=800)
    assert plan_run(SHAPES["7B"], config, prompt=15)["vectors.time"] == pytest.approx(0.17, rel=0.01)


def test_more_of_something_costs_more_of_it():
    plan = plan_run(SHAPES["14B"], sizes(500))
    double = plan_run(SHAPES["14B"], sizes(1000))
    assert double["vectors.time"] == pytest.approx(2 * plan["vectors.time"])
    assert double["attribute.time, exact"] == plan["attribute.time, exact"]  # of a sample of spans
    two = plan_run(SHAPES["14B"], sizes(500), Gpus(2))
    assert (plan["GPUs.actors"], two["GPUs.actors"]) == (1, 2)
    assert two["vectors.time"] == pytest.approx(plan["vectors.time"] / 2)
    assert two.seconds < plan.seconds
    slow = plan_run(SHAPES["14B"], sizes(500), Gpus(tflops=100.0, bandwidth=0.5))
    assert slow.seconds > 2 * plan.seconds


def test_an_actor_gets_as_many_gpus_as_its_model_takes():
    large = plan_run(SHAPES["70B"], sizes(10_000), Gpus(8))
    assert (large["GPUs.per actor"], large["GPUs.actors"], large["GPUs.rows per batch"]) == (3, 2, 200)
    tight = plan_run(SHAPES["14B"], sizes(500), Gpus(memory=48.0))
    assert 16 <= tight["GPUs.rows per batch"] < 200
    assert tight["GPUs.memory of an actor"] <= 0.9 * 48
    with pytest.raises(LensteerError, match=r"2 GPU\(s\) of 80 GB do not hold 70B, with 141 GB of weights"):
        plan_run(SHAPES["70B"], sizes(500), Gpus(2))


def test_each_number_says_what_it_rests_on():
    figures = plan_run(SHAPES["14B"], sizes(500)).figures
    assert {figure.basis for figure in figures} == {COMPUTED, EXTRAPOLATED}
    assert all(figure.basis == EXTRAPOLATED for figure in figures if figure.unit == "s")
    known = plan_run(SHAPES["7B"], sizes(500)).figures
    assert [figure.name for figure in known if figure.basis == MEASURED] == ["memory beyond weights and cache"]


def test_the_command_prints_a_plan_and_loads_nothing(no_process):
    result = CliRunner().invoke(app, ["doctor", "--plan", "70b", "--n-tasks", "10000", "--gpus", "8"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["parameters", "70,553,706,496", "computed"] in lines
    assert ["actors", "2", "computed"] in lines
    assert "No larger model was run." in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["13B"], "no shape '13B': choose one of"),
        (["7B", "--gpus", "0"], "n=0: give a positive number"),
        (["7B", "--gpu-memory", "nan"], "memory=nan: give a positive number"),
        (["7B", "--n-tasks", "0"], "0 tasks"),
    ],
)
def test_bad_input_is_said(options, message):
    result = CliRunner().invoke(app, ["doctor", "--plan", *options])
    assert result.exit_code == 1
    assert message in result.output


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(LensteerError, match=r"config\.json cannot be read .*: give a dense decoder's folder"):
        shape_of(str(tmp_path))
