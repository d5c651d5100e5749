"""A run on a user's own contrast, label or measure, to the report; what cannot be used is refused before a forward."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lensteer as ls
from lensteer.annotation import labels_of
from lensteer.cli import app
from lensteer.contrast import load_pairs
from lensteer.evaluation import ChosenCoefficients, Evaluation, choose_coefficients, power
from lensteer.evaluation.conditions import Record
from lensteer.pipeline import STAGES, Run, RunConfig, complete, load_results, run_stage
from lensteer.pipeline.chains import pairs_of
from lensteer.pipeline.own import load_own
from lensteer.report import render, summary
from lensteer.traces import load_traces

ANALYSES = Path(__file__).resolve().parent.parent / "analyses"
OWN = '''
import math
from dataclasses import dataclass

import lensteer as ls
from lensteer.annotation.splitting import split_sentences


@dataclass
class Halves:
    """Every second sentence is of the kind "even"."""

    labels: tuple = ("even", "odd")

    def __call__(self, traces):
        return [
            [ls.Sentence(self.labels[i % 2], t.response[a:b]) for i, (a, b) in enumerate(split_sentences(t.response))]
            for t in traces
        ]


halves = Halves()


def undeclared(traces):
    return halves(traces)


def length(trace):
    return len(trace.response) / 100


def nan(trace):
    return math.nan


def nothing(trace):
    len(trace.response)


def fails(trace):
    return trace.no_such_thing


def no_lists(traces):
    return None


number = 3
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the user's own functions, tasks and pairs."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(OWN)
    tasks = [
        dict(id=f"{split}-{i}", category="own", split=split, prompt=f"Tell me about {split} {i}.")
        for split, n in (("train", 8), ("dev", 3), ("test", 3))
        for i in range(n)
    ]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    (folder / "later.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks if task["split"] != "train"))
    pairs = [
        dict(prompt=f"Ask {i}.", positive=f"Please {i}. Thanks.", negative=f"No {i}.", label="polite") for i in range(4)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    persona = dict(
        instruction=[dict(pos="Be kind.", neg="Be rude.")], questions=["Who are you?", "Where is it?", "What is it?"]
    )
    (folder / "kindness.json").write_text(json.dumps(persona))
    return folder


def config_of(place, checkpoint, **changes):
    small = RunConfig(
        model=str(checkpoint),
        tasks=str(place / "tasks.jsonl"),
        layers=(1,),
        n_train=8,
        n_dev=3,
        n_test=3,
        n_samples=1,
        control_samples=1,
        n_controls=2,
        n_score_controls=2,
        max_spans=4,
        score_chains=4,
        train_tokens=40,
        max_new_tokens=16,
        batch_size=16,
        quality=2,
        coefficients=(0.001,),
        temperature=1.0,
    )
    return replace(small, **changes)


def contrast(place, checkpoint, **changes):
    own = dict(pairs=str(place / "pairs.jsonl"), measure=f"{place / 'own.py'}:length", tasks=str(place / "later.jsonl"))
    return config_of(place, checkpoint, **own | changes)


#: What a report says of labeled sentences, chains and reasoning, none of which pairs and a measure have.
ABOUT_SENTENCES = (
    *("share of sentences", "of share", "share changes", "Every sentence", "base rate", "None"),
    *("prompted baseline", "no annotated sentence", "reasoning", "percentage points", "shuffled labels"),
    *("in the chains", "How sentences were labeled", "Cosine similarity"),
)


def words_of(page):
    """What a reader reads: without script, style, figures and settings."""
    body = re.sub(r"(?s)<(script|style|details|title)\b.*?</\1>", " ", page)
    return " ".join(re.sub(r"<[^>]*>", " ", body).replace("&nbsp;", " ").split())


# --- from end to end ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contrasted(place, tiny_checkpoint, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("run") / "contrast", []
    complete(Run.open(folder, contrast(place, tiny_checkpoint())), said.append)
    return folder, said


@pytest.mark.medium
def test_pairs_and_a_measure_go_through_every_stage(contrasted):
    folder, said = contrasted
    run = Run.open(folder)
    assert set(run.stages) == set(STAGES)
    assert run.config.behaviors == ("polite",)
    assert run.annotators == ()
    traces = load_traces(folder / "annotated.jsonl")
    assert [[span.label for span in trace.spans] for trace in traces] == [["polite"]] * 4
    vectors = ls.BehaviorVectors.load(folder / "vectors.safetensors")
    assert (vectors.labels, vectors.counts, str(vectors.recipe.window)) == (("polite",), {"polite": 4}, "answer")
    assert vectors.controls is not None
    coefficients, found = (
        ChosenCoefficients.load(folder / "coefficients.json"),
        Evaluation.load(folder / "evaluation.json"),
    )
    assert coefficients.unit == found.unit == "score"
    assert {(e.kind, e.unit) for e in found.effects} == {("down", "score"), ("up", "score")}
    assert all({pool.n for pool in e.controls} == {2} and len(e.controls) == 3 for e in found.effects)
    base = [d.share for d in coefficients.curve if d.text is None]
    assert base == [pytest.approx(sum(_lengths(folder / "coefficients.jsonl", "unsteered")) / 3)]
    assert all(
        condition.nll is not None and condition.text is not None for condition in found.conditions if condition.behavior
    )  # text is checked
    assert any("mean score is" in line and "rise to" in line for line in said)
    assert any("rests on 4 pairs only" in note for note in run.notes)


def _lengths(path, condition):
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [len(row["response"]) / 100 for row in rows if row["condition"] == condition]


@pytest.mark.medium
def test_the_report_of_a_measure_assumes_no_sentences(contrasted):
    folder, _ = contrasted
    results = load_results(Run.open(folder))
    found, page = summary(results), render(results)
    for kind in ("down", "up"):
        effect = results.evaluation.effect("polite", kind)
        assert found[f"effect.polite.{kind}.score.share"] == effect.share.value
        assert found[f"shown.polite.{kind}_verdict"] == effect.verdict
        assert f'title="effect.polite.{kind}.score.change"' in page
        assert f'title="effect.polite.{kind}.score.shuffled.rank"' in page
        assert f'title="effect.polite.{kind}.score.share"' in page
    assert found["shown.n_tested"] == 2
    assert not [name for name in found if ".sentences." in name and name.startswith("effect.")]
    words = words_of(page)
    for wrong in ABOUT_SENTENCES:
        assert wrong not in words, wrong
    for right in ("contrastive pairs", "mean score", "units of the score", "shuffled sides", "own.py:length"):
        assert right in words, right
    assert "mean score" in results.coefficients.plot().layout.yaxis.title.text
    assert str(escape(results.examples[0].trace.response[:10])) in page


@pytest.mark.medium
def test_an_own_label_goes_through_every_stage(place, tiny_checkpoint, tmp_path):
    """On the command line; the label is the object's own, and the model writes the chains."""
    config = config_of(place, tiny_checkpoint())
    numbers = {
        n: getattr(config, n) for n in ("n_train", "n_dev", "n_test", "n_samples", "n_controls", "n_score_controls")
    }
    numbers |= dict(
        control_samples=1, train_tokens=60, max_new_tokens=40, batch_size=16, layers=1, coefficients="0.001"
    )
    args = ["run", "--out", str(tmp_path / "run"), "--model", config.model, "--tasks", config.tasks]
    args += ["--behaviors", "even", "--annotator", f"{place / 'own.py'}:halves"]
    args += [word for name, value in numbers.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, "".join(__import__("traceback").format_exception(result.exception))
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["annotator.name"] == f"{place / 'own.py'}:halves"
    assert found["traces.spans.even"] > 0
    assert 0 < found["effect.even.up.sentences.base"] <= 1
    assert "shown.even.up" in found
    assert "annotators.1" not in found  # cue words of reasoning are not masked
    words = words_of((tmp_path / "run" / "report.html").read_text())
    assert "own.py:halves" in words
    assert "its reasoning behaviors" not in words


@pytest.mark.medium
def test_a_measure_beside_an_annotator_and_chains_that_came_with_labels(place, tiny_checkpoint, tmp_path):
    checkpoint, own = tiny_checkpoint(), str(place / "own.py")
    model = ls.load_model(checkpoint)
    chains = ls.generate_traces(
        model, ls.load_tasks(place / "tasks.jsonl", split="train"), temperature=1.0, max_new_tokens=60
    )
    ls.save_traces(ls.annotate(chains, load_own(f"{own}:halves")), tmp_path / "chains.jsonl")
    shared = dict(chains=(str(tmp_path / "chains.jsonl"),), behaviors=("even",), measure=f"{own}:length")
    both = Run.open(tmp_path / "both", config_of(place, checkpoint, annotators=(f"{own}:halves",), **shared))
    complete(both)
    found = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert "effect.even.up.score.change" in found
    assert "effect.even.up.sentences.change" in found
    assert any("All sentences are even, so they are contrasted with all tokens" in note for note in both.notes)
    assert found["vectors.negatives"] == "all"
    assert "of share" in words_of((tmp_path / "both" / "report.html").read_text())
    alone = Run.open(tmp_path / "alone", config_of(place, checkpoint, **shared))
    for stage in ("traces", "annotate"):
        run_stage(alone, stage)
    assert alone.annotators == ()
    ls.save_traces(chains, tmp_path / "bare.jsonl")
    bare = replace(alone.config, chains=(str(tmp_path / "bare.jsonl"),))
    run = Run.open(tmp_path / "bare", bare)
    run_stage(run, "traces")
    with pytest.raises(ls.LensteerError, match=r"8 of the 8 chains.*without labels.*--annotator"):
        run_stage(run, "annotate")


# --- completions, resuming ------------------------------------------------------------------------


@pytest.mark.medium
def test_the_model_writes_missing_completions_once(place, tiny_checkpoint, tmp_path, monkeypatch):
    config = contrast(place, tiny_checkpoint(), pairs=str(place / "kindness.json"))
    run = Run.open(tmp_path / "run", config)
    assert run.config.behaviors == ("kindness",)
    run_stage(run, "traces")
    traces = load_traces(tmp_path / "run" / "traces.jsonl")
    assert [len(trace.spans) for trace in traces] == [1] * len(traces)
    again, fitted = pairs_of(Run.open(tmp_path / "run"))
    assert again == fitted
    assert [trace.response_ids for trace in traces] == [pair.positive.completion_ids for pair in again]
    (tmp_path / "run" / "pairs.jsonl").unlink()  # killed in between: the answers are there
    monkeypatch.setattr("lensteer.generation.jobs.generate", lambda *a, **k: pytest.fail("generated"))
    assert pairs_of(run)[0] == again


def test_pairs_that_say_where_they_are_read_are_fitted_as_they_came(place, tiny_checkpoint, tmp_path):
    texts = [dict(positive=f"I am glad {i}", negative=f"I am sad {i}") for i in range(2)]
    (tmp_path / "mood.json").write_text(json.dumps(texts))
    run = Run.open(
        tmp_path / "run", contrast(place, tiny_checkpoint(), pairs=str(tmp_path / "mood.json"), train_tokens=4)
    )
    completed, fitted = pairs_of(run)
    assert all(pair.positive.completion_ids for pair in completed)
    assert fitted == load_pairs(tmp_path / "mood.json")


@pytest.mark.medium
def test_a_run_goes_on_only_with_the_same_functions_and_pairs(contrasted, place, tmp_path, tiny_checkpoint):
    folder, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(place, mine)
    config = contrast(mine, tiny_checkpoint())
    run = Run.open(folder, config)
    run_stage(run, "traces")
    Run.open(folder, config)
    assert set(json.loads((folder / "run.json").read_text())["files"]) == {
        str(mine / "own.py"),
        str(mine / "pairs.jsonl"),
    }
    for name in ("own.py", "pairs.jsonl"):
        before = (mine / name).read_text()
        (mine / name).write_text(before + "\n")
        for again in (config, None):
            with pytest.raises(ls.LensteerError, match=rf"{re.escape(name)}.*has changed since"):
                Run.open(folder, again)
        (mine / name).write_text(before)
    with pytest.raises(ls.LensteerError, match=r"holds another run, with .*measure"):
        Run.open(folder, replace(config, measure=f"{mine / 'own.py'}:undeclared"))
    (mine / "own.py").unlink()
    assert Run.open(folder).stages  # what is there can still be read
    assert "files" in json.loads((contrasted[0] / "run.json").read_text())


# --- refused before the first forward -------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pairs": "none.jsonl"}, "no file 'none.jsonl'"),
        ({"pairs": "one-sided"}, r"line 1: lacks 'negative'"),
        ({"pairs": "identical"}, "both sides of a pair of .* are the same, 'Yes.'"),
        ({"pair_format": "caa"}, "line 1: lacks 'question'"),
        ({"pair_format": "xml"}, "unknown format 'xml'"),
        ({"chains": ("own.py",)}, r"pairs .* and chains .*give one"),
        ({"measure": None}, "without a measure: give --measure FILE.py:NAME"),
        ({"behaviors": ("rude",)}, r"behaviors \['rude'\] are not in the pairs .* \['polite'\]"),
        ({"pairs": None, "pair_format": "plain", "tasks": "tasks.jsonl"}, "'plain' without pairs: give --pairs"),
        ({"measure": "length"}, "'length' names no function: write FILE.py:NAME"),
        ({"measure": "own.py"}, "own.py' names no function"),
        ({"measure": "none.py:length"}, "no file 'none.py'"),
        ({"measure": "own.py:width"}, r"has no 'width': it has \[.*'length'"),
        ({"measure": "own.py:number"}, "is 3: give a function"),
        ({"measure": "own.py:Halves"}, "Halves'>: give a function"),
        ({"measure": "own.py:nan"}, "measure 'nan' gives nan"),
        ({"measure": "own.py:nothing"}, "measure 'nothing' gives None"),
        ({"measure": "own.py:fails"}, "fails on a made-up chain .AttributeError.*a number for a trace"),
        ({"measure": "broken.py:length"}, r"broken.py' cannot be run .NameError"),
        ({"measure": None, "annotators": ("own.py:halves",)}, r"never labels \['polite'\]: it declares \['even'"),
        ({"annotators": ("own.py:no_lists",)}, "fails on a made-up chain .TypeError.*list of Sentences for each trace"),
        ({"annotators": ("oracle",)}, "no annotator 'oracle'.*FILE.py:NAME"),
        ({"tasks": "train-only"}, "no task of split 'dev'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_before_the_first_forward(change, words, place, tmp_path, monkeypatch):
    monkeypatch.setattr("lensteer.models.load_model", lambda *a, **k: pytest.fail("loaded a model"))
    (tmp_path / "broken.py").write_text("undefined\n")
    (tmp_path / "one-sided").write_text(json.dumps(dict(prompt="A?", positive="Yes.")))
    (tmp_path / "identical").write_text(json.dumps(dict(prompt="A?", positive="Yes.", negative="Yes.")))
    (tmp_path / "train-only").write_text(json.dumps(dict(id="a", category="c", split="train", prompt="?")))
    for name in ("own.py", "tasks.jsonl"):
        shutil.copy(place / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ls.LensteerError, match=words):
        Run.open(tmp_path / "run", contrast(place, "some/model", **change))
    assert not (tmp_path / "run").exists()


def test_a_function_is_loaded_once_for_a_content(place):
    assert load_own(f"{place / 'own.py'}:length") is load_own(f"{place / 'own.py'}:length")
    assert labels_of(load_own(f"{place / 'own.py'}:halves")) == ("even", "odd")


# --- coefficients and power by a measure ----------------------------------------------------------


@pytest.mark.medium
def test_coefficients_need_an_annotator_or_a_measure(place, tiny_model):
    model = tiny_model()
    vectors = ls.fit_directions(model, load_pairs(place / "pairs.jsonl"))
    tasks = ls.load_tasks(place / "tasks.jsonl", split="dev")
    with pytest.raises(ls.LensteerError, match="no annotator: give at least one"):
        choose_coefficients(model, tasks, vectors, {"polite": 1})
    with pytest.raises(ls.LensteerError, match="gives nan"):
        choose_coefficients(model, tasks, vectors, {"polite": 1}, measure=lambda trace: math.nan)


def test_power_of_a_share_of_chains_is_that_of_independent_sentences():
    """A measure of zeros and ones on chains, and one sentence a chain with or without the label, say the same."""

    def record(i, hit):
        counts = {"b": hit}
        return Record("a", str(i), 0, counts, counts, 1, 1, True, True, None, 5, 0.0, scores={"b": float(hit)})

    scored = [record(i, int(i % 4 == 0)) for i in range(400)]
    counted = [replace(r, scores={}) for r in scored]
    (one,), (other,) = (power(rows, ["b"], n_tasks=50, n_samples=8) for rows in (scored, counted))
    assert one.base == other.base == 0.25
    assert one.rise == pytest.approx(other.rise, rel=0.05)  # the other variance grows with the share
    assert one.down


# --- real models ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_politeness_is_a_run_on_smollm2(real_model, tmp_path):
    """Small, to see that a real effect comes out at the end: figures are in analyses/LOG.md."""
    real_model("smollm2")  # skips where there is none
    folder = Path(os.environ["LENSTEER_REAL"]) / "smollm2"
    config = RunConfig(
        model=str(folder), tasks=str(ANALYSES / "requests.jsonl"), pairs="politeness",
        measure=f"{ANALYSES / 'politeness.py'}:courtesy", layers=(19,), n_dev=4, n_test=12, n_samples=2, n_controls=1,
        control_samples=1, n_score_controls=0, max_spans=4, score_chains=2, coefficients=(1.5,), max_new_tokens=32,
        temperature=0.7,
    )  # fmt: skip
    complete(Run.open(tmp_path / "run", config))
    found = Evaluation.load(tmp_path / "run" / "evaluation.json")
    assert found.unit == "score"
    assert found.effect("politeness", "up").change.value > 0
