"""Cue rules: sentences planted for each behavior and near misses, order, coverage, placing, and the published judge."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import time
from pathlib import Path

import pytest

from lensteer.annotation import annotate_report
from lensteer.annotation.rules import CUES, rules
from lensteer.annotation.splitting import split_sentences
from lensteer.behaviors import BEHAVIORS
from lensteer.errors import LensteerError
from lensteer.tasks import Task
from lensteer.traces import Trace

ANALYSIS = Path(__file__).resolve().parent.parent / "analyses" / "cue_rules.py"

#: The first eight sentences of a chain, so that what follows is no beginning any more.
OPENING = (
    "Okay, so I need to find the length of the fence.\n\n" + "\n\n".join(["The garden has four sides."] * 8) + "\n\n"
)


def trace_of(thinking: str, behind: str = "</think>\n\nThe answer is 7. Wait, no.", prompt: str = "<think>\n") -> Trace:
    response = thinking + behind
    offsets = tuple(range(len(response)))
    return Trace(Task("t", "test", "dev", ""), prompt, response, (0,), (0,) * len(response), offsets, True)


def labels_of(thinking: str) -> list[str]:
    return [sentence.label for sentence in rules([trace_of(thinking)])[0]]


PLANTED = {
    "deduction": (
        "Therefore, the fence is 40 meters long.",
        "So if each side is longer, the area grows.",
        "That leaves two sides.",
    ),
    "adding-knowledge": (
        "I remember that the angles of a triangle add up to 180 degrees.",
        "I've read that copper expands when heated.",
        "A polygon with five sides is called a pentagon.",
        "Rectangular plots are usually cheaper to fence.",
    ),
    "example-testing": (
        "For example, take a square garden.",
        "Suppose the short side is five.",
        "Let's test this with a smaller garden.",
        "- For 8: (2, 6), (3, 5), (4, 4)",
        "12 × 7 = 84",
    ),
    "uncertainty-estimation": (
        "I'm not entirely sure about that.",
        "But I’m not sure whether gates count.",
        "This isn't clear to me.",
        "Hmm, I think I'm overcomplicating this.",
        "Let me double-check the sum.",
        "But does the gate count, too?",
    ),
    "backtracking": (
        "Wait, no, the gate was left out.",
        "Hold on, the sides are not equal.",
        "Let me try a different approach.",
        "Let's go back to the first equation.",
    ),
}


@pytest.mark.parametrize(("label", "sentence"), [(b, s) for b, said in PLANTED.items() for s in said])
def test_planted_sentences_get_their_label(label, sentence):
    assert labels_of(OPENING + sentence)[-1] == label


@pytest.mark.parametrize(
    ("sentence", "label"),
    [
        ("The guests wait at the gate.", "deduction"),
        ("The surety is paid back by another bank.", "deduction"),
        ("Exampleton has a wall of its own.", "deduction"),
        ("The called-off sale, too, costs 12 coins.", "adding-knowledge"),  # it only reads words
        ("They lost 5 coins.", "deduction"),
        ("It takes 40 minutes.", "deduction"),
        ("Okay, let me break it down step by step.", "deduction"),  # such words open a chain only at its beginning
        ("The trap is stucco.", "deduction"),
        ("So, the other way is shorter.", "deduction"),
    ],
)
def test_near_misses(sentence, label):
    assert labels_of(OPENING + sentence)[-1] == label


def test_a_chain_begins_with_initializing_and_its_words_count_only_there():
    assert labels_of("Chains are long.") == ["initializing"]
    said = "The garden has four sides.\n\nHmm, let me break it down step by step."
    assert labels_of("Okay.\n\n" + said)[1:] == ["deduction", "initializing"]
    assert "initializing" not in labels_of(OPENING + said)[1:]


@pytest.mark.parametrize("first", ["The user asks for a proof.", "We need to find n.", "Alright, let me see."])
def test_other_models_ways_to_begin(first):
    assert labels_of(f"{first} The problem is interesting, and I need to figure this out.") == ["initializing"] * 2


def test_an_example_goes_on_in_its_paragraph_until_a_conclusion():
    example = "For example, take a square garden. Its sides are 3 meters long. Therefore the fence is short."
    assert labels_of(OPENING + example)[-3:] == ["example-testing", "example-testing", "deduction"]
    broken = example.replace(". Its", ".\n\nIts")
    assert labels_of(OPENING + broken)[-3:] == ["example-testing", "deduction", "deduction"]


def test_sentences_are_those_of_the_thinking_in_order():
    rng = random.Random(0)
    said = [sentence for sentences in PLANTED.values() for sentence in sentences]
    traces = []
    for _ in range(20):
        chosen = rng.choices(said, k=30)  # many are repeated
        traces.append(trace_of("".join(s + rng.choice((" ", "\n", "\n\n")) for s in chosen)))
    found = rules(traces)
    for trace, sentences in zip(traces, found, strict=True):
        thinking = trace.response[slice(*trace.thinking)]
        assert [s.text for s in sentences] == [thinking[a:b] for a, b in split_sentences(thinking)]
        assert {s.label for s in sentences} <= set(BEHAVIORS)
    assert found == [rules([trace])[0] for trace in traces]  # no chain depends on another
    annotated, reports = annotate_report(traces, rules)
    assert all(report.placed == 1 and not report.repaired for report in reports)
    for trace, sentences in zip(annotated, found, strict=True):
        placed = [(span.label, trace.response[span.char_start : span.char_end]) for span in trace.spans]
        assert placed == [(s.label, s.text) for s in sentences]
        assert trace.n_unparsed == 0


def test_no_thinking_no_sentences():
    assert rules([]) == []
    assert rules([trace_of(""), trace_of("Just an answer.", "", prompt="")]) == [[], []]


def test_every_cue_is_for_a_behavior_and_quick_on_monsters():
    assert {cue.label for cue in CUES} == set(BEHAVIORS)
    assert all(cue.weight > 0 for cue in CUES)
    began = time.process_time()
    for part in ("1 ", "1,2+", "so, ", "wait ", "- ", "an a ", "1", "where figure "):
        assert len(rules([trace_of(part * 4000)])[0]) >= 1
    assert time.process_time() - began < 5


def load_analysis():
    spec = importlib.util.spec_from_file_location("analyses_cue_rules", ANALYSIS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_analysis_compares_with_the_judge_on_both_parts(tmp_path):
    analysis = load_analysis()
    right = [("initializing", "Okay, so I need to fence a garden."), ("backtracking", "Wait, no, it is a field.")]
    wrong = [("initializing", "Okay, so I need to fence a garden."), ("deduction", "Wait, no, it is a field.")]
    lines = []
    for sections in [right] * 3 + [wrong] * 2:
        text = "\n\n".join(said for _, said in sections)
        annotated = "\n".join(f'["{label}"] {said} ["end-section"]' for label, said in sections)
        lines.append(json.dumps({"response": f"<think>{text}\n\nLeft out.</think>", "annotated": annotated}))
    (tmp_path / analysis.CHAINS).write_text("\n".join(lines))
    result = analysis.main(analysis.Config(tmp_path, n_tuned=3, n_boot=50))
    assert (result.tuned.macro_f1.value, result.tuned.kappa.value) == (1, 1)
    assert (result.held_out.macro_f1.value, result.held_out.accuracy.value) == (0.5, 0.5)
    assert result.held_out.n_sentences == 4  # what the judge left out does not count, but is told
    assert result.covered == pytest.approx((2 / 3, 2 / 3))
    assert "held out: 4 sentences of 2 chains, 66.7% of all" in analysis.table(result)
    with pytest.raises(LensteerError, match="n_tuned=5: give 1 to 4"):
        analysis.main(analysis.Config(tmp_path, n_tuned=5))


@pytest.mark.medium
def test_the_judge_on_chains_that_the_rules_were_not_tuned_on(reference_folder):
    analysis = load_analysis()
    result = analysis.main(analysis.Config(reference_folder, n_boot=0))
    assert result.held_out.n_chains == 50
    assert result.held_out.macro_f1.value >= 0.45  # measured: 0.468
    assert result.held_out.kappa.value >= 0.28  # 0.299
    assert min(result.covered) > 0.98
