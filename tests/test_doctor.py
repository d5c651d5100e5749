"""The doctor's findings: facts as they are, checks that fail on planted faults, features tried, costs that scale."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

import lensteer as ls
from lensteer import doctor, models
from lensteer.cli import app
from lensteer.doctor import diagnose, example, features
from lensteer.pipeline import RunConfig

pytestmark = pytest.mark.medium  # every test examines a model


def findings(model, **options):
    found = diagnose(model, **options)
    return found, {finding.name: finding for finding in found.findings}


@pytest.fixture(scope="module")
def healthy(tiny_model):
    return findings(tiny_model("llama", opens_thinking=True))


def test_facts_are_those_of_the_model(healthy, tiny_model):
    found, named = healthy
    assert found.ok
    assert named["architecture"].value == "LlamaForCausalLM (llama)"
    assert named["shape"].value.startswith("4 layers, d_model 32,")
    n = sum(p.numel() for p in tiny_model("llama", opens_thinking=True).original_model.parameters())
    assert named["weights"].value.startswith(f"{n / 1e6:,.0f} M parameters")
    assert "512 tokens" in named["context"].value
    assert named["thought marks"].value == "<think> </think>, opened by the template"
    assert [named[name].ok for name in ("cached = full", "padded = alone", "fast path = bridge")] == [True] * 3
    assert all(finding.ok for finding in found.findings if finding.topic == "feature")
    assert len(found.to_dataframe()) == len(found.findings)
    assert str(found).splitlines()[0] == "model"


def test_the_example_is_a_trace_of_the_model(tiny_model):
    model = tiny_model("qwen2")
    trace = example(model)
    assert [span.label for span in trace.spans] == list(doctor.LABELS)
    text = "".join(trace.response[span.char_start : span.char_end] for span in trace.spans)
    assert text == trace.response
    assert list(trace.prompt_ids) == models.encode(model, trace.prompt)


def test_a_pass_that_differs_is_a_failed_check(tiny_model, monkeypatch):
    model, cached = tiny_model("qwen2"), doctor._cached
    monkeypatch.setattr(doctor, "_cached", lambda m, ids: cached(m, ids) * 1.01)
    found, named = findings(model)
    assert named["cached = full"].ok is False
    assert not found.ok


def test_weights_that_overflow_are_said_first(tiny_checkpoint):
    model = ls.load_model(tiny_checkpoint("qwen2", seed=5))
    with torch.no_grad():
        next(model.original_model.parameters()).fill_(float("inf"))
    named = {finding.name: finding for finding in doctor._checks(model)}
    assert list(named) == ["finite logits"]
    assert named["finite logits"].ok is False


def test_a_feature_that_is_refused_is_named_with_its_reason(tiny_model, monkeypatch):
    def refused(*args, **kwargs):
        raise ls.LensteerError("no such\nattention here")

    monkeypatch.setattr(doctor, "sentence_attention", refused)
    found, named = findings(tiny_model("qwen2"))
    assert named["attention between sentences"].value == "no: no such attention here"
    assert found.ok  # what a model lacks is no fault
    assert set(features(tiny_model("qwen2"))) <= set(named)


def test_a_bigger_run_costs_more(tiny_model):
    def hours(config):
        value = {f.name: f.value for f in doctor._cost(tiny_model("qwen2"), config)}["time of a full run"]
        return int(value.split()[0].replace(",", ""))

    small = RunConfig(n_test=10)
    assert hours(dataclasses.replace(small, n_test=20)) > hours(small)


@pytest.mark.medium
def test_the_command_prints_it(tiny_checkpoint):
    result = CliRunner().invoke(app, ["doctor", "--model", str(tiny_checkpoint("qwen2"))])
    assert result.exit_code == 0, result.output
    assert "+ cached = full" in result.output
    assert "time of a full run" in result.output


def test_a_tokenizer_without_a_template_is_examined_all_the_same(tiny_checkpoint):
    model = ls.load_model(tiny_checkpoint("qwen2", seed=6))
    model.tokenizer.chat_template = None
    found, named = findings(model)
    assert found.ok
    assert named["chat template"].ok is False
    assert named["behavior vectors"].ok
