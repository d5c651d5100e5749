"""A user's own labels, schemes and measures, through every stage; the six published behaviors are one scheme."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from typer.testing import CliRunner

import lensteer as ls
from lensteer import models
from lensteer.annotation import annotate_report, masking, unlabeled
from lensteer.annotation.judge_questions import instructions, parse_reply
from lensteer.annotation.splitting import split_sentences
from lensteer.behaviors import BEHAVIORS, REASONING, Sentence, axis_of, in_order
from lensteer.cli import app
from lensteer.evaluation import summarize
from test_evaluation import conditions_of, simulated

SCHEME = ls.LabelScheme(("planning", "other"), ("says what to do next.", "anything else."), ("planning",))


def planner(traces):
    """Every second sentence is planning."""
    found = []
    for trace in traces:
        text = trace.response[slice(*trace.thinking)]
        pieces = [text[a:b] for a, b in split_sentences(text)]
        found.append([Sentence("planning" if i % 2 else "other", piece) for i, piece in enumerate(pieces)])
    return found


declared = ls.labeling("planning", "other")(lambda traces: planner(traces))


@pytest.fixture(scope="module")
def chains(organism):
    tasks = ls.load_tasks(split="train", n=4)
    return ls.annotate(ls.generate_traces(organism, tasks, temperature=1.0, max_new_tokens=120), planner)


@pytest.fixture(scope="module")
def vectors(organism, chains):
    return ls.fit_vectors(organism, chains, window="span", negatives="all", n_controls=3)


# --- labels ---------------------------------------------------------------------------------------


def test_any_label_becomes_a_span(chains):
    assert {span.label for trace in chains for span in trace.spans} == {"planning", "other"}
    assert not any(trace.n_unparsed for trace in chains)


def test_own_labels_have_vectors_scores_attention_fractions_and_a_color(organism, chains, vectors):
    assert vectors.labels == ("other", "planning")
    assert set(vectors.counts) == {"other", "planning"}
    scores = ls.attribute(organism, chains, vectors, max_spans=4)
    assert set(scores.labels) == {"planning", "other"}
    layers = ls.select_layers(scores)
    assert set(layers) == {"planning", "other"}
    assert ls.behavior_attention(organism, chains).labels == ("other", "planning")
    assert ls.receiver_heads(organism, chains).labels == ("other", "planning")
    fractions = ls.metrics.behavior_fractions(chains[0].spans, len(chains[0].spans), len(chains[0].ids))
    assert fractions["planning"].sentences + fractions["other"].sentences == pytest.approx(1)
    assert ls.plots.color("planning") == ls.plots.color("planning") != ls.plots.color("other")
    assert "planning" in ls.plots.chain_html(chains[0])
    assert "planning" in str(vectors.plot(dimensions=2).to_dict())


def test_the_axis_is_the_default_scheme_where_that_has_every_label():
    assert axis_of(["backtracking"]) == BEHAVIORS
    assert axis_of(["planning", "backtracking"]) == ("backtracking", "planning")
    assert in_order(["b", "a", "deduction", "a"]) == ("deduction", "a", "b")


def test_an_annotator_is_held_to_what_it_declares(chains):
    wrong = ls.labeling("other")(lambda traces: planner(traces))
    with pytest.raises(ls.LensteerError, match=r"returned \['planning'\].*declares \['other'\]"):
        ls.annotate(chains, wrong)
    with pytest.raises(ls.LensteerError, match="0 lists of sentences for 4 traces"):
        ls.annotate(chains, lambda traces: [])
    assert ls.annotation.labels_of(masking(declared)) == ("planning", "other")
    assert ls.annotation.labels_of(planner) is None
    assert ls.annotation.labels_of(ls.rules) == BEHAVIORS


def test_sentences_without_labels_stay_in_the_denominator(chains):
    (trace,), (report,) = annotate_report(chains[:1], unlabeled)
    assert trace.spans == ()
    assert trace.n_unparsed == len(chains[0].spans)
    assert report.placed == 1


@pytest.mark.parametrize(
    ("labels", "descriptions", "steered", "words"),
    [
        ((), (), (), "without labels"),
        (("a", "a"), ("x", "y"), (), "'a' twice"),
        (("a", " "), ("x", "y"), (), "cannot be a label"),
        (("a", "unparsed"), ("x", "y"), (), "'unparsed' cannot be a label"),
        (("a", "b"), ("x",), (), "1 descriptions"),
        (("a",), (" ",), (), "give one line for each"),
        (("a",), ("x",), ("b",), "unknown behavior 'b'"),
    ],
)
def test_an_impossible_scheme_is_refused(labels, descriptions, steered, words):
    with pytest.raises(ls.LensteerError, match=words):
        ls.LabelScheme(labels, descriptions, steered)


def test_a_judge_is_told_the_schemes_labels_and_no_others():
    told = instructions(SCHEME)
    assert "- planning: says what to do next." in told
    assert "backtracking" not in told
    assert "JSON" in told
    assert ls.Judge(model="m", base_url="http://localhost:1/v1", scheme=SCHEME).labels == ("planning", "other")
    reply = '{"labels": [{"n": 1, "label": "Planning"}, {"n": 2, "label": "deduction"}]}'
    read = parse_reply(reply, ["Let me plan.", "So."], SCHEME.labels)
    assert read.labels == {1: "planning"}
    assert "is not one of the labels" in read.wrong[2]
    published = parse_reply('["planning"] Let me plan. ["end-section"]', ["Let me plan.", "So."], SCHEME.labels)
    assert published.labels == {1: "planning"}
    assert instructions(REASONING).count("- backtracking: ") == 1


def test_an_answer_without_a_thought_is_counted_but_does_not_think(organism):
    from lensteer.evaluation import measure

    tasks = ls.load_tasks(split="dev", n=1)
    options: dict[str, Any] = dict(max_new_tokens=12)
    answers = ls.generate_traces(organism, tasks, thinking=False, prefill="Answer:", **options)
    (answer,), thoughts = ls.annotate(answers, unlabeled), ls.generate_traces(organism, tasks, **options)
    assert answer.n_unparsed
    record, thought = measure(answer, "a", ()), measure(thoughts[0], "a", ())
    assert (record.thinks, thought.thinks) == (False, True)
    assert 0 < record.n_tokens <= len(answer.response_ids)
    assert thought.n_tokens > 0


def test_one_measure_for_several_behaviors_scores_a_chain_once(organism, chains):
    from lensteer.evaluation import run_conditions

    seen = []

    def counting(trace):
        seen.append(trace.id)
        return len(seen)

    measures = {"planning": counting, "other": counting, "calls": exclaims}
    (record,) = run_conditions(
        organism, ls.load_tasks(split="dev", n=1), [ls.Condition("a")], ls.Sampling(max_new_tokens=4), measures=measures
    )
    assert len(seen) == 2  # a made-up chain first
    assert record.scores["planning"] == record.scores["other"] == 2


# --- evaluation -----------------------------------------------------------------------------------


def test_an_own_label_is_evaluated(organism, vectors):
    options: dict[str, Any] = dict(n_controls=2, control_samples=1, sampling=ls.Sampling(1, 1.0, 0, 40), quality=0)
    options |= dict(margins=ls.Margins(nll=None, kl=None))
    tasks = ls.load_tasks(split="test", n=3)
    found = ls.evaluate(organism, tasks, vectors, {"planning": 3}, 0.5, annotator=declared, **options)
    effect = found.effect("planning", "up")
    assert (effect.unit, effect.behavior) == ("sentences", "planning")
    assert 0.3 < effect.base.value < 0.6  # every second sentence
    assert {pool.n for pool in effect.controls} == {2}
    with pytest.raises(ls.LensteerError, match=r"'rules' never labels \['planning'\].*'backtracking'"):
        ls.evaluate(organism, tasks, vectors, {"planning": 3}, 0.5, annotator=ls.rules, **options)
    with pytest.raises(ls.LensteerError, match=r"never labels \['planning'\]"):
        ls.choose_coefficients(organism, tasks, vectors, {"planning": 3}, annotator=ls.rules)


@pytest.mark.medium
def test_a_name_makes_no_control():
    """A condition of the user's own counts as no control vector, whatever it is called."""
    conditions = conditions_of(n_controls=19)
    own = [
        ls.Condition("L4/random-99", conditions[-1].plan),
        ls.Condition("random-1"),
        ls.Condition("L4/isotropic-77", conditions[-1].plan),
    ]
    records = simulated(3, conditions, up=0.2)
    more = [r for condition in own for r in simulated(3, [condition], up=0.0)]
    alone, beside = summarize(records, conditions), summarize([*records, *more], [*conditions, *own])
    assert repr(alone.effects) == repr(beside.effects)  # NaN where a fall is not tested
    assert [a.kind for a in beside.conditions[-3:]] == ["other"] * 3
    with pytest.raises(ls.LensteerError, match="'null': choose one of"):
        ls.Condition("x", kind="null")


def exclaims(trace):
    return float(trace.response.count("!"))


@pytest.mark.medium
def test_a_measure_of_ones_own_is_what_is_tested(organism, vectors):
    tasks = ls.load_tasks(split="test", n=3)
    options: dict[str, Any] = dict(n_controls=2, control_samples=1, sampling=ls.Sampling(1, 1.0, 0, 40), quality=0)
    options |= dict(margins=ls.Margins(nll=None, kl=None))

    def length(trace):
        return len(trace.response)

    found = ls.evaluate(organism, tasks, vectors, {"planning": 3}, 0.5, measure=length, **options)
    assert found.unit == "score"
    effect = found.effect("planning", "up")
    assert effect.unit == "score"
    assert effect.base.value > 10
    assert effect.measurable
    assert len(found.effects) == 2
    both = ls.evaluate(
        organism, tasks, vectors, {"planning": 3}, 0.5, measure={"planning": length}, annotator=declared, **options
    )
    assert {e.unit for e in both.effects} == {"score", "sentences", "tokens"}
    assert both.effect("planning", "up") == effect
    assert "mean score" in found.plot().layout.yaxis.title.text


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (lambda trace: math.nan, "gives nan"),
        (lambda trace: None, "gives None"),
        (lambda trace: "high", "gives 'high'"),
        ({"other": exclaims}, r"measures of \['other'\] for the behaviors \['planning'\]"),
    ],
)
def test_a_measure_that_says_nothing_is_refused_before_anything_is_generated(
    measure, words, organism, vectors, monkeypatch
):
    monkeypatch.setattr("lensteer.generation.jobs.generate", lambda *a, **k: pytest.fail("generated"))
    with pytest.raises(ls.LensteerError, match=words):
        ls.evaluate(
            organism, ls.load_tasks(split="test", n=2), vectors, {"planning": 3}, 0.5, measure=measure, n_controls=2
        )


def test_without_annotator_and_measure_nothing_is_evaluated(organism, vectors):
    with pytest.raises(ls.LensteerError, match="no annotator: give one"):
        ls.evaluate(organism, ls.load_tasks(split="test", n=2), vectors, {"planning": 3}, 0.5)


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.medium
def test_a_run_on_chains_with_labels_of_their_own(tiny_checkpoint, tmp_path):
    """Fit, attribute, select, steer, evaluate, report: with a classifier that is fitted on the chains' own labels."""
    folder, rng = tiny_checkpoint("qwen2", opens_thinking=True), random.Random(0)
    model, traces = ls.load_model(folder), []
    words = {"planning": ["First I will sort them.", "Next I plan to add."], "other": ["It is 7.", "That makes 12."]}
    for i in range(14):
        prompt = models.chat_text(model, f"Question {i}?")
        kinds = rng.choices(["planning", "other"], k=12)
        response = " ".join(rng.choice(words[kind]) for kind in kinds)
        ids = tuple(models.encode(model, response))
        response, offsets = models.decode_offsets(model.tokenizer, ids)
        task = ls.Task(f"own-{i:02}", "own", "train", f"Question {i}?")
        trace = ls.Trace(task, prompt, response, tuple(models.encode(model, prompt)), ids, tuple(offsets), True)

        def told(traces):
            found = [[t.response[a:b] for a, b in split_sentences(t.response)] for t in traces]
            known = {text: kind for kind, texts in words.items() for text in texts}
            return [[Sentence(known[piece.strip()], piece) for piece in pieces] for pieces in found]

        traces += ls.annotate([trace], told)
    ls.save_traces(traces, tmp_path / "own.jsonl")
    small = (
        "--n-dev 3 --n-test 3 --n-samples 1 --n-controls 2 --max-new-tokens 16 --control-samples 1 --n-score-controls 0"
    )
    args = (
        f"run --model {folder} --out {tmp_path / 'run'} --chains {tmp_path / 'own.jsonl'} --behaviors planning {small}"
    )
    result = CliRunner().invoke(app, [*args.split(), "--coefficients", "0.001", "--layers", "1"])
    assert result.exit_code == 0, "".join(__import__("traceback").format_exception(result.exception))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["traces.spans.planning"] > 20
    assert summary["annotator.name"] == "classifier"
    assert "effect.planning.up.sentences.change" in summary
    page = (tmp_path / "run" / "report.html").read_text()
    assert "planning" in page
    assert "backtracking" not in page.split("</style>")[1].split("<details>")[0]
    refused = CliRunner().invoke(
        app, [*args.split()[:3], "--out", str(tmp_path / "b"), *args.split()[5:], "--annotator", "rules"]
    )
    assert refused.exit_code == 1
    assert "unknown behavior 'planning'" in refused.output


# --- results behave -------------------------------------------------------------------------------


def test_vectors_are_a_mapping_with_a_short_repr(vectors):
    assert list(vectors) == ["other", "planning"]
    assert len(vectors) == 2
    assert "planning" in vectors
    assert "backtracking" not in vectors
    assert {label: direction.label for label, direction in vectors.items()} == {
        "other": "other",
        "planning": "planning",
    }
    assert vectors == vectors  # not Mapping's comparison, which would compare tensors
    assert len({vectors, vectors}) == 1
    assert "Tensor[2, " in repr(vectors)
    assert len(repr(vectors)) < 1500
