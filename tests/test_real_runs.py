"""Runs on models that are not the organism: written tasks, given chains, every annotator, on a random checkpoint.

The checkpoint has no behaviors of its own: chains with known labels stand in where a stage needs spans, and the
annotator is held against those labels.
"""

from __future__ import annotations

import json
import random

import pytest
from typer.testing import CliRunner

import lensteer as ls
from judge_server import JudgeServer, Say, entries
from lensteer.cli import app
from lensteer.pipeline import Run, read_chains

SENTENCES = {
    "initializing": ["Okay, so I need to find how many {0} there are."],
    "deduction": ["So the number of {0} is {1}.", "That gives {1} {0} in all.", "Adding them makes {1}."],
    "adding-knowledge": ["I remember that {0} come in groups of {1}.", "I recall that {0} weigh {1} grams."],
    "example-testing": ["For example, let's try {1} {0} and see.", "Let me test this with {1} {0}."],
    "uncertainty-estimation": ["I'm not sure about the {1} {0}.", "Hmm, maybe I am confused about {0}."],
    "backtracking": [
        "Wait, no, that is wrong, let me go back to the {0}.",
        "Wait, let me try another approach to {0}.",
    ],
}
SMALL = ["--n-train", "4", "--n-dev", "3", "--n-test", "3", "--n-samples", "1", "--n-random", "2"]
SMALL += ["--max-new-tokens", "12", "--batch-size", "32"]


def write_chains(path, n=14, seed=0):
    """Annotated chains in the published format, and the label of every sentence."""
    rng, truth, lines = random.Random(seed), {}, []
    for _ in range(n):
        kinds = ["initializing", *rng.choices([b for b in ls.BEHAVIORS if b != "initializing"], k=14)]
        told = []
        for kind in kinds:
            text = rng.choice(SENTENCES[kind]).format(rng.choice(["apples", "doors", "cards"]), rng.randint(2, 99))
            truth[text] = kind
            told.append((kind, text))
        thinking = " ".join(text for _, text in told)
        annotated = "\n".join(f'["{kind}"] {text} ["end-section"]' for kind, text in told)
        response = f"<think>\n{thinking}\n</think>\n\nThe answer is 3."
        lines.append(json.dumps({"response": response, "thinking": thinking, "annotated": annotated}) + "\n")
    path.write_text("".join(lines))
    return truth


def call(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    path = tmp_path_factory.mktemp("chains") / "annotated.jsonl"
    return path, write_chains(path)


@pytest.mark.parametrize("annotator", ["rules", "classifier", "judge"])
def test_a_run_on_written_tasks_works_through_every_stage(annotator, chains, tiny_checkpoint, tmp_path, monkeypatch):
    path, truth = chains
    model = tiny_checkpoint("qwen2")
    options = ["--annotator", annotator]
    if annotator == "classifier":
        told = call("annotate", "fit", "--chains", path, "--out", tmp_path / "c.safetensors")
        assert "macro_f1" in told
        options += ["--classifier", tmp_path / "c.safetensors"]

    def reply(sentences):
        return Say(entries({n: truth.get(s, "deduction") for n, s in enumerate(sentences, 1)}))

    with JudgeServer(otherwise=reply) as server:
        monkeypatch.setenv("LENSTEER_JUDGE_URL", server.url)
        monkeypatch.setenv("LENSTEER_JUDGE_MODEL", "planted")
        out = tmp_path / "run"
        call("run", "--model", model, "--tasks", "builtin", "--chains", path, "--out", out, *options, *SMALL)
        asked = len(server.payloads)
    assert (asked > 0) == (annotator == "judge")
    run = Run.open(out)
    assert list(run.stages) == ["traces", "annotate", "vectors", "attribute", "select", "evaluate", "report"]
    found = json.loads((out / "summary.json").read_text())
    assert found["annotator.name"] == annotator
    assert found["annotator.against"] == "the labels that the chains came with"
    assert found["annotator.n_chains"] == 14
    least = {"rules": 0.6, "classifier": 0.9, "judge": 0.99}[annotator]
    assert found["annotator.macro_f1"] >= least
    assert found["annotator.macro_f1_low"] <= found["annotator.macro_f1"] <= found["annotator.macro_f1_high"]
    page = (out / "report.html").read_text()
    assert "Who says which behavior a sentence is" in page
    assert "While you think" in str(ls.evaluation.WORDS)
    assert "macro-F1" in page
    traces = read_chains(out / "annotated.jsonl", run.model)
    assert {span.label for trace in traces for span in trace.spans} == set(ls.BEHAVIORS)


def test_without_labels_the_report_says_that_nothing_is_known(tiny_checkpoint, tmp_path):
    out = tmp_path / "run"
    call("traces", "--model", tiny_checkpoint("llama"), "--tasks", "builtin", "--out", out, *SMALL)
    call("annotate", "--out", out)
    facts = json.loads((out / "annotator.json").read_text())
    assert facts == {"name": "rules", "against": None}
    assert len(read_chains(out / "annotated.jsonl")) == 4


def test_what_does_not_fit_is_one_line(chains, tiny_checkpoint, tmp_path):
    path, _ = chains
    model, out = tiny_checkpoint("qwen2"), tmp_path / "run"
    for options, words in (
        (["--annotator", "oracle"], "'oracle'"),
        (["--annotator", "classifier"], "annotate fit"),
        (["--annotator", "rules", "--classifier", path], "annotate fit"),
        (["--chains", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--dtype", "int8"], "'int8'"),
    ):
        words_of = ["run", "--model", model, "--tasks", "builtin", "--out", out, *options]
        result = CliRunner().invoke(app, [str(word) for word in words_of])
        assert result.exit_code == 1
        assert words in result.output
        assert result.output.count("\n") == 1
    assert not out.exists()
