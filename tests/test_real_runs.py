"""Runs on models that are not the organism: written tasks, given chains, every annotator, on a random checkpoint.

The checkpoint has no behaviors of its own: chains with known labels stand in where a stage needs spans, and the
annotator is held against those labels.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from html import escape

import pytest
from typer.testing import CliRunner

import lensteer as ls
from judge_server import JudgeServer, Say, entries
from lensteer.annotation import rules
from lensteer.cli import app
from lensteer.evaluation import Evaluation
from lensteer.files import read_json
from lensteer.pipeline import Run, load_results, read_chains
from lensteer.traces import load_traces

pytestmark = pytest.mark.medium  # every test is a run

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
SMALL = ["--n-train", "4", "--n-dev", "3", "--n-test", "3", "--n-samples", "1", "--n-controls", "2"]
SMALL += ["--max-new-tokens", "24", "--train-tokens", "30", "--batch-size", "32", "--control-samples", "1"]
#: The weights are random, and so is the text: at a coefficient that changes nothing it is no worse than unsteered.
SMALL += ["--n-score-controls", "3", "--coefficients", "0.001"]


def write_chains(path, n=14, seed=0, prompts=()):
    """Annotated chains in the published format, and the label of every sentence."""
    rng, truth, lines = random.Random(seed), {}, []
    for i in range(n):
        kinds = ["initializing", *rng.choices([b for b in ls.BEHAVIORS if b != "initializing"], k=14)]
        told = []
        for kind in kinds:
            text = rng.choice(SENTENCES[kind]).format(rng.choice(["apples", "doors", "cards"]), rng.randint(2, 99))
            truth[text] = kind
            told.append((kind, text))
        thinking = " ".join(text for _, text in told)
        annotated = "\n".join(f'["{kind}"] {text} ["end-section"]' for kind, text in told)
        response = f"<think>\n{thinking}\n</think>\n\nThe answer is 3."
        row = {"response": response, "thinking": thinking, "annotated": annotated}
        if i < len(prompts):
            row["prompt"] = prompts[i]
        lines.append(json.dumps(row) + "\n")
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
    model = tiny_checkpoint("qwen2", opens_thinking=True)
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
    assert "How sentences were labeled" in page
    assert "macro-F1" in page
    kept, given = read_chains(out / "annotated.jsonl", run.model), read_chains(path, run.model)
    assert [trace.spans for trace in kept] == [trace.spans for trace in given]  # whoever else annotates
    assert found["alignment.given"] == 14
    assert "kept the labels they came with" in page
    names = Evaluation.load(out / "evaluation.json").annotators
    masked = [f"{annotator}, cue words masked", f"{annotator}, random words masked"]
    assert names == (annotator, *([] if annotator == "judge" else masked))


def test_labels_that_came_along_are_kept_and_fit_the_vectors(chains, tiny_checkpoint, tmp_path):
    """The annotator labels generated text, and only those given chains that have no label."""
    path, _ = chains
    rows = path.read_text().splitlines(keepends=True)
    bare = {**json.loads(rows[3]), "annotated": ""}
    mixed, out = tmp_path / "mixed.jsonl", tmp_path / "run"
    mixed.write_text("".join([*rows, json.dumps(bare) + "\n"]))
    options = [
        "--model",
        tiny_checkpoint("qwen2", opens_thinking=True),
        "--chains",
        mixed,
        "--annotator",
        "rules",
        *SMALL,
    ]
    call("traces", "--out", out, *options)
    for stage in ("annotate", "vectors"):
        call(stage, "--out", out)
    run = Run.open(out)
    given, kept = read_chains(mixed, run.model), load_traces(out / "annotated.jsonl")
    by_rules = ls.annotate(given, rules)
    assert [t.spans for t in kept[:14]] == [t.spans for t in given[:14]]
    assert [t.spans for t in kept[:14]] != [t.spans for t in by_rules[:14]]
    assert given[14].spans == ()
    assert kept[14].spans == by_rules[14].spans != ()
    assert run.stages["annotate"]["given"] == 14
    counts = Counter(span.label for trace in kept for span in trace.spans)
    assert run.stages["vectors"]["spans"] == {b: counts[b] for b in ls.BEHAVIORS}
    few = {b for b in ls.STEERED if counts[b] < 30}
    assert {note.split()[0] for note in run.notes if "rests on" in note} == few


def test_several_files_fit_the_runs_own_classifier(tiny_checkpoint, tmp_path):
    """Two models' chains on the same questions: judged without the model, and not on its own questions."""
    out, files = tmp_path / "run", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    asked = [task.prompt for task in ls.load_tasks("builtin", split="test", n=2)]
    for seed, file in enumerate(files):
        write_chains(file, seed=seed, prompts=asked)
    own = {
        "--temperature": "0.9", "--top-p": "0.97", "--layers": "1", "--behaviors": "backtracking,adding-knowledge",
        "--prefill": "Okay", "--seed": "3",
    }  # fmt: skip
    words = [word for pair in own.items() for word in pair]
    both = [word for file in files for word in ("--chains", file)]
    said = call("run", "--model", tiny_checkpoint("qwen2", opens_thinking=True), "--out", out, *both, *SMALL, *words)
    assert "\r" not in said[said.index("annotate ...") :]  # a log, no terminal; what loads the weights has its own bar
    assert re.search(r"100%\|.*chain", said)
    config = json.loads((out / "run.json").read_text())["config"]
    assert (config["temperature"], config["top_p"], config["layers"], config["seed"]) == (0.9, 0.97, [1], 3)
    assert (config["prefill"], config["coefficients"]) == ("Okay", [0.001])
    assert config["behaviors"] == ["backtracking", "adding-knowledge"]
    assert (config["chains"], config["annotators"]) == ([str(file) for file in files], [])
    run, results = Run.open(out), load_results(Run.open(out))
    assert run.annotators == ("classifier", "rules")
    assert (out / "classifier.safetensors").exists()
    assert len(results.traces) == 28
    assert {trace.sample for trace in results.traces} == {0, 1}
    assert dict(results.layers) == {"backtracking": 1, "adding-knowledge": 1}
    assert all(trace.prompt.endswith("Okay") for *_, trace in results.examples)
    found = json.loads((out / "summary.json").read_text())
    assert (found["annotator.name"], found["annotator.names"]) == ("classifier", '["classifier", "rules"]')
    assert found["annotator.against"] == "labels of questions that it was not fitted on, in turn"
    for name, least in (("", 0.9), ("left_out.", 0.9), ("rules.", 0.6)):
        low, f1, high = (found[f"annotator.{name}macro_f1{end}"] for end in ("_low", "", "_high"))
        assert low <= f1 <= high
        assert f1 >= least
    assert found["annotator.left_out.n_chains"] == 28  # each once
    masked = ("classifier, cue words masked", "classifier, random words masked")
    assert results.evaluation.annotators == ("classifier", "rules", *masked)
    page = (out / "report.html").read_text()
    assert "without any chain of the model it is judged on" in page
    assert "<h3>Other annotators" in page
    (note,) = [note for note in run.notes if "fitted on the questions of" in note]
    assert note.startswith("The classifier was fitted on the questions of 2 dev or held-out tasks")
    assert escape(note) in page


def test_a_classifier_that_knows_none_of_the_questions_gives_no_note(chains, tiny_checkpoint, tmp_path):
    out = tmp_path / "run"
    call(
        "traces", "--model", tiny_checkpoint("qwen2", opens_thinking=True), "--out", out, "--chains", chains[0], *SMALL
    )
    call("annotate", "--out", out)
    assert Run.open(out).notes == []
    facts = read_json(out / "annotator.json")
    assert not any(name.startswith("left_out") for name in facts)  # one file has no other


def test_no_classifier_is_fitted_on_chains_without_labels(chains, tiny_checkpoint, tmp_path):
    bare = without_labels(chains[0], tmp_path / "bare.jsonl")
    words = [
        "traces",
        "--model",
        tiny_checkpoint("qwen2", opens_thinking=True),
        "--out",
        tmp_path / "run",
        "--chains",
        bare,
        *SMALL,
    ]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 1
    assert "came without labels" in result.output
    assert "--annotator rules" in result.output


def without_labels(path, to):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    to.write_text("".join(json.dumps({**row, "annotated": ""}) + "\n" for row in rows))
    return to


def test_without_labels_the_report_says_that_nothing_is_known(chains, tiny_checkpoint, tmp_path):
    out, bare = tmp_path / "run", without_labels(chains[0], tmp_path / "bare.jsonl")
    options = ["--chains", bare, "--annotator", "rules"]
    call("traces", "--model", tiny_checkpoint("llama"), "--tasks", "builtin", "--out", out, *options, *SMALL)
    call("annotate", "--out", out)
    facts = read_json(out / "annotator.json")
    assert facts == {"name": "rules", "names": ["rules"], "against": None}
    annotated = read_chains(out / "annotated.jsonl")
    assert len(annotated) == 14
    assert all(trace.spans for trace in annotated)
    assert Run.open(out).stages["annotate"]["given"] == 0


def test_an_annotator_that_finds_nothing_stops_the_run(tiny_checkpoint, tmp_path):
    out, own = tmp_path / "run", tmp_path / "own.py"
    own.write_text("def nothing(traces):\n    return [[] for _ in traces]\n")
    options = ["--annotator", f"{own}:nothing", *SMALL]
    call("traces", "--model", tiny_checkpoint("llama"), "--tasks", "builtin", "--out", out, *options)
    result = CliRunner().invoke(app, ["annotate", "--out", str(out)])
    assert result.exit_code == 1
    assert f"annotator '{own}:nothing' found no sentence in 4 chains" in result.output
    assert list(Run.open(out).stages) == ["traces"]


def test_chains_that_never_open_a_thought_stop_the_run(tiny_checkpoint, tmp_path):
    words = ["traces", "--model", tiny_checkpoint("llama"), "--tasks", "builtin", "--out", tmp_path / "run", *SMALL]
    result = CliRunner().invoke(app, [*map(str, words), "--thought", "<think>"])
    assert result.exit_code == 1
    assert "has a thought, which '<think>' would open" in result.output
    assert "--thought none" in result.output


def test_what_does_not_fit_is_one_line(chains, tiny_checkpoint, tmp_path):
    path, _ = chains
    model, out = tiny_checkpoint("qwen2", opens_thinking=True), tmp_path / "run"
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
