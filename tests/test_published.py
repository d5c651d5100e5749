"""The reader of the published format on planted files, a round trip, and the published chains themselves."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensteer.annotation import labeled_sentences, parse_published, read_published, write_published
from lensteer.annotation.annotators import label_intervals
from lensteer.behaviors import BEHAVIORS, Sentence, Span
from lensteer.errors import LensteerError
from lensteer.tasks import Task
from lensteer.traces import Trace
from test_analyses import load

CHAINS = "r1_qwen_1.5b_annotated_chains.jsonl"

RESPONSE = "<think>First, I look. So x is 2. Wait, no.\n\nMaybe 3.</think>It is 3."


def trace(response: str, *spans: tuple[str, str], prompt: str = "") -> Trace:
    """One token a character; every span is given by its label and text, found after the one before."""
    found, at = [], 0
    for label, text in spans:
        start = response.index(text, at)
        at = start + len(text)
        found.append(Span(label, 1 + start, 1 + at, start, at))
    n = len(response)
    return Trace(Task("t", "c", "dev", ""), prompt, response, (0,), (0,) * n, tuple(range(n)), True, spans=tuple(found))


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- the format -----------------------------------------------------------------------------------


def kinds(annotated: str) -> tuple[list[tuple[str, str]], list[str]]:
    sentences, problems = parse_published(annotated)
    for problem in problems:
        assert annotated[problem.at :].startswith(problem.text) or problem.kind == "text in no section"
        assert problem.text in annotated[problem.at :]
    return [(s.label, s.text) for s in sentences], [p.kind for p in problems]


def test_sections_are_read():
    annotated = '["deduction"] So x is 2.["end-section"]\n["backtracking"]Wait,\n no. ["end-section"] '
    assert kinds(annotated) == ([("deduction", "So x is 2."), ("backtracking", "Wait,\n no.")], [])


@pytest.mark.parametrize(
    ("annotated", "read", "problems"),
    [
        ('["summarizing"] So. ["end-section"]', [], ["stray label"]),
        ('["deduction"] ["end-section"]', [], ["no text"]),
        ('[deduction] So. ["end-section"]', [("deduction", "So.")], ["label without quotes"]),
        ('[2. deduction] So. ["end-section"]', [("deduction", "So.")], ["label without quotes"]),
        ('["deduction"] So.', [("deduction", "So.")], ["section without an end"]),
        ('["deduction"] So. ["end-section"]["end-section"]', [("deduction", "So.")], ["end without a label"]),
        ('It is so. ["end-section"]', [], ["text in no section", "end without a label"]),
        ('["deduction"] So. ["end-section"] And', [("deduction", "So.")], ["text in no section"]),
        ('["deduction"] f[0] or [x] ["end-section"]', [("deduction", "f[0] or [x]")], []),
        (
            '["deduction"] So. ["backtracking"] No. ["end-section"]',
            [("deduction", "So."), ("backtracking", "No.")],
            ["section without an end"],
        ),
    ],
)
def test_what_is_not_as_the_format_has_it_is_mended_or_named(annotated, read, problems):
    assert kinds(annotated) == (read, problems)


marks = st.sampled_from(['["deduction"]', '["end-section"]', "[backtracking]", '["x"]', "So. ", "[", '"]', " ", "\n"])


@settings(max_examples=200, deadline=None)
@given(st.lists(marks, max_size=15).map("".join))
def test_every_letter_is_read_or_named(annotated):
    """Letters of what was read, with the marks of sections, are all letters but those of problems."""
    sentences, problems = parse_published(annotated)
    said = "".join(s.text for s in sentences) + "".join(p.text for p in problems)
    assert said.count("So.") == annotated.count("So.")
    assert all(s.label in BEHAVIORS and s.text == s.text.strip() != "" for s in sentences)


# --- files ----------------------------------------------------------------------------------------


def test_the_questions_are_kept_where_the_file_has_them(tmp_path):
    """A run needs them to say whether a classifier was fitted on the questions that it judges."""
    annotated = '["deduction"] So x is 2. ["end-section"]'
    rows = [{"response": RESPONSE, "annotated": annotated, "prompt": "What is x?"}]
    rows.append({"response": RESPONSE, "annotated": annotated})
    traces, _ = read_published(write(tmp_path / "chains.jsonl", *rows))
    assert [t.task.prompt for t in traces] == ["What is x?", ""]
    assert [t.task.id for t in traces] == ["published-000", "published-001"]
    assert [t.prompt for t in traces] == ["", ""]  # as the model saw it is not known
    assert [t.prompt_length for t in traces] == [1, 1]


def test_a_file_becomes_traces(tmp_path):
    annotated = (
        '["initializing"] First, I look. ["end-section"]["deduction"] So x was 2. ["end-section"]'
        '["summarizing"] Wait, no. ["end-section"]["backtracking"] The moon is cheese, they say. ["end-section"]'
    )
    path = write(tmp_path / "chains.jsonl", {"response": RESPONSE, "annotated": annotated})
    (read,), report = read_published(path)
    assert (read.id, read.prompt, read.prompt_ids, read.finished) == ("published-000/0", "", (0,), True)
    assert [(s.label, RESPONSE[s.char_start : s.char_end]) for s in read.spans] == [
        ("initializing", "First, I look."),
        ("deduction", "So x is 2."),
    ]
    assert all(s.start == s.char_start + 1 and s.end == s.char_end + 1 for s in read.spans)
    assert read.n_unparsed == 2
    assert (report.n_sections, report.n_matched, report.n_repaired, report.n_dropped) == (3, 1, 1, 1)
    assert report.placed == pytest.approx(2 / 3)
    frame = report.to_dataframe()
    assert list(frame.kind) == ["repaired", "dropped", "stray label"]
    assert list(frame.found[:1]) == ["So x is 2."]
    assert annotated[frame["at"][2] :].startswith('["summarizing"]')


def test_a_response_whose_thinking_the_prompt_opened_is_all_thought(tmp_path):
    row = {"response": "So x is 2.</think>2", "annotated": '["deduction"] So x is 2. ["end-section"]'}
    (read,), _ = read_published(write(tmp_path / "chains.jsonl", row))
    assert read.response[slice(*read.thinking)] == "So x is 2."
    assert [s.label for s in labeled_sentences(read)] == ["deduction"]


def test_a_tokenizer_gives_its_own_tokens(tmp_path, grammar_tokenizer):
    response = "<think>Wait, B fails, back to C. So D is the answer.</think>Answer: D"
    annotated = (
        '["backtracking"] Wait, B fails, back to C. ["end-section"]["deduction"]So D is the answer.["end-section"]'
    )
    path = write(tmp_path / "chains.jsonl", {"response": response, "annotated": annotated})
    (read,), _ = read_published(path, grammar_tokenizer)
    assert len(read.response_ids) == len(read.offsets) < len(response)
    for span in read.spans:
        said = grammar_tokenizer.decode(read.ids[span.start : span.end])
        assert said.strip() == response[span.char_start : span.char_end]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(LensteerError, match=r"line 1 has \['response'\]: give the texts 'response' and 'annotated'"):
        read_published(write(tmp_path / "chains.jsonl", {"response": "So."}))
    with pytest.raises(LensteerError, match="no file"):
        read_published(tmp_path / "none.jsonl")


def test_what_is_written_is_read_again(tmp_path):
    spans = [("initializing", "First, I look."), ("deduction", "So x is 2."), ("backtracking", "Wait, no.\n\nMaybe 3.")]
    truth = trace(RESPONSE, *spans)
    annotated = write_published(truth)
    assert parse_published(annotated) == ([Sentence(*span) for span in spans], [])
    (read,), report = read_published(write(tmp_path / "c.jsonl", {"response": RESPONSE, "annotated": annotated}))
    assert read.spans == truth.spans
    assert report.n_matched == 3
    with pytest.raises(LensteerError, match="which the format uses"):
        write_published(trace('<think>So ["end-section"] it is.', ("deduction", 'So ["end-section"] it is.')))


# --- sentences ------------------------------------------------------------------------------------


def labels(*spans: tuple[str, str], response: str = RESPONSE) -> list[str | None]:
    return [s.label for s in labeled_sentences(trace(response, *spans))]


def test_sentences_are_those_of_the_thinking():
    found = labeled_sentences(trace(RESPONSE))
    assert [s.text for s in found] == ["First, I look.", "So x is 2.", "Wait, no.", "Maybe 3."]
    assert all(RESPONSE[s.start : s.end] == s.text for s in found)
    assert labeled_sentences(trace("It is 3.")) == []


def test_a_span_over_several_sentences_labels_each():
    assert labels(("deduction", "First, I look. So x is 2."), ("backtracking", "Wait, no.")) == [
        *("deduction", "deduction", "backtracking", None)
    ]


def test_two_labels_in_a_sentence_go_to_the_larger_and_a_little_is_none():
    response = "<think>Wait, so it is. abcd efgh."
    assert labels(("backtracking", "Wait,"), ("deduction", "so it is."), response=response)[0] == "deduction"
    assert labels(("deduction", "Wait, so"), ("backtracking", "it is."), response=response)[0] == "deduction"
    assert labels(("deduction", "abcd"), response=response) == [None, None]  # 4 of 9 letters
    assert labels(("deduction", "abcd e"), response=response) == [None, "deduction"]
    assert labels(("deduction", "ab"), ("backtracking", "cd"), ("deduction", "e"), response=response)[1] == "deduction"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_labels_against_counting_letters(data):
    text = data.draw(st.text(st.sampled_from("ab "), min_size=1, max_size=40))
    cuts = st.lists(st.integers(0, len(text)), max_size=8, unique=True).map(sorted)
    places, intervals = (list(pairwise(data.draw(cuts))) for _ in range(2))
    names = data.draw(st.lists(st.sampled_from([*BEHAVIORS[:3], None]), min_size=len(places), max_size=len(places)))
    spans = [Span(name, 1 + a, 1 + b, a, b) for name, (a, b) in zip(names, places, strict=True) if name]
    for (start, end), label in zip(intervals, label_intervals(text, intervals, spans), strict=True):
        letters = [i for i in range(start, end) if text[i] != " "]
        by = {
            b: sum(s.label == b and s.char_start <= i < s.char_end for i in letters for s in spans) for b in BEHAVIORS
        }
        if label is None:
            assert 2 * sum(by.values()) < len(letters) or not any(by.values())
        else:
            assert 2 * sum(by.values()) >= len(letters)
            assert by[label] == max(by.values())


# --- the published chains -------------------------------------------------------------------------


def test_the_published_chains_are_placed(reference_folder):
    traces, report = read_published(reference_folder / CHAINS)
    assert len(traces) == 100
    frame = report.to_dataframe()
    assert set(frame.kind) == {"repaired", "dropped", "label without quotes"}
    unquoted = set(frame.chain[frame.kind == "label without quotes"])
    counted = [
        (a.matched + len(a.repaired) + len(a.dropped), len(a.dropped))
        for chain, a in zip(report.chains, report.alignments, strict=True)
        if chain not in unquoted
    ]
    assert len(unquoted) == 18  # chains of which the published parser reads no section
    n_sections, n_dropped = map(sum, zip(*counted, strict=True))
    assert n_sections == 2739  # what it does read
    assert n_dropped == 3
    assert (report.n_sections, report.n_dropped) == (3107, 3)
    for read in traces:
        assert all(a.char_end <= b.char_start and a.end <= b.start for a, b in pairwise(read.spans))
    # The annotator cut where sentences end.
    ends = [{s.end for s in labeled_sentences(read)} for read in traces]
    hits = [
        s.char_end in own
        for read, own in zip(traces, ends, strict=True)
        for s in read.spans
        if s.char_end <= read.thinking[1]
    ]
    assert sum(hits) / len(hits) > 0.99


@pytest.mark.medium
def test_the_published_figures_follow_from_the_published_data(reference_folder):
    analysis = load("published_r1_qwen")
    result = analysis.main(analysis.Config(reference_folder))
    rows = {(row.figure, row.of): row for row in result.rows}
    for row in result.rows:  # 0.305 was published as 0.31; shares are of other chains, or of fewer
        if row.expected is not None and not row.figure.startswith("share"):
            assert row.found == pytest.approx(row.expected, abs=0.56 * 10**-row.digits), row
    for label in BEHAVIORS:
        assert abs(rows["share of sections, %", label].found - rows["share of sections, %", label].expected) < 3
    assert sum(row.found for row in result.rows if row.figure == "share of sentences, %") == pytest.approx(100)
    assert result.find("chains", "published parser") == 82
    assert analysis.table(result).count("\n") == 1 + len(result.rows)
