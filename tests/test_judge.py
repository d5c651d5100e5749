"""The LLM judge against a real server on loopback that misbehaves by script."""

from __future__ import annotations

import _thread
import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lensteer as ls
from judge_server import (
    LABELS,
    JudgeServer,
    Say,
    always,
    entries,
    make_chain,
    make_chains,
    right,
    sentence_of,
    true_labels,
    truth,
)
from lensteer.annotation import judge_client
from lensteer.annotation.annotators import annotate_report, labeled_sentences
from lensteer.annotation.judge import Judge, JudgePlan, JudgeScore
from lensteer.annotation.judge_client import default_folder
from lensteer.annotation.judge_questions import (
    MAX_QUESTIONS,
    Answer,
    converse,
    instructions,
    parse_reply,
    parse_score,
    question,
)
from lensteer.annotation.published import read_published
from lensteer.behaviors import BEHAVIORS, REASONING, UNPARSED
from lensteer.errors import LensteerError
from lensteer.evaluation import Condition, run_conditions

pytest.importorskip("openai", reason="the judge's server tests need the extra 'judge'")

SECRET = "sk-a-secret-that-nobody-may-see"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("LENSTEER_JUDGE_URL", "LENSTEER_JUDGE_MODEL", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LENSTEER_JUDGE_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(judge_client, "EMPTY_PAUSE", 0.01)


@pytest.fixture
def judge_at(tmp_path):
    """A judge for a server."""

    def make(server, **options):
        defaults = dict(model="m", cache=tmp_path / "replies", timeout=5.0, retries=2, max_chunk=4)
        return Judge(base_url=server.url, **(defaults | options))

    return make


def check_truth(annotated, chains):
    for sentences, chain in zip(annotated, chains, strict=True):
        assert sentences
        for sentence in sentences:
            assert sentence.label == truth(sentence.text)
            assert sentence.text in chain.response


def kinds(report):
    return [remark.kind for remarks in report.remarks for remark in remarks]


# What is asked and found


def test_labels_come_back_on_the_very_sentences(judge_at):
    chains = make_chains(5, 11)

    def together(sentences):  # the first comes alone, the next three wait for each other
        until = time.monotonic() + 4
        while server.n > 1 and server.max_in_flight < 3 and time.monotonic() < until:
            time.sleep(0.01)
        return right(sentences)

    with JudgeServer(otherwise=together) as server:
        judge = judge_at(server, concurrency=3)
        annotated, report = judge.annotate(chains)
    check_truth(annotated, chains)
    assert [len(sentences) for sentences in annotated] == [11] * 5
    assert report.chains == tuple(chain.id for chain in chains)
    assert report.remarks == ((),) * 5
    assert (report.n_sentences, report.n_unlabeled, report.n_requests, report.n_cached) == (55, 0, 15, 0)
    assert (report.prompt_tokens, report.completion_tokens) == (1500, 150)
    assert list(report.to_dataframe().columns) == ["chain", "kind", "at", "text", "reason"]
    assert server.n == 15
    assert server.max_in_flight == 3
    assert max(len(asked) for asked in server.asked) == 4  # 11 = 3 + 4 + 4, not 4 + 4 + 3
    assert sorted(len(asked) for asked in server.asked)[0] == 3
    for payload in server.payloads:
        assert payload["temperature"] == 0
        assert payload["response_format"] == {"type": "json_object"}
        assert payload["model"] == "m"
    # As an annotator: every sentence has its span.
    traces, alignments = annotate_report(chains, judge)
    assert not any(report.dropped or report.repaired for report in alignments)
    assert [[s.label for s in t.spans] for t in traces] == [[s.label for s in sentences] for sentences in annotated]


def test_a_chain_without_thinking_costs_nothing(judge_at):
    from dataclasses import replace

    chain = replace(make_chain(["deduction"]), response="The answer is 4.", response_ids=(0,), offsets=(0,))
    with JudgeServer() as server:
        annotated, report = judge_at(server).annotate([chain])
        assert judge_at(server)([]) == []
    assert (annotated, report.n_sentences, server.n) == ([[]], 0, 0)


def test_a_question_numbers_what_is_wanted_and_shows_what_stands_before():
    sentences = [f"Line {i}\nof it." for i in range(10)]
    _, asked = question("Why?", sentences, [4, 8], context=2, complaint="[1]: 'x' is not one of the labels")
    lines = asked["content"].splitlines()
    assert [line for line in lines if line.startswith(("[", "(context)"))] == [
        "(context) Line 2 of it.",
        "(context) Line 3 of it.",
        "[1] Line 4 of it.",
        "(context) Line 6 of it.",
        "(context) Line 7 of it.",
        "[2] Line 8 of it.",
    ]
    assert "Why?" in lines
    assert "1 to 2" in lines[-1]
    assert "'x' is not one of the labels" in asked["content"]
    assert "Task" not in question("", sentences, [0], context=2)[1]["content"]
    question("\ud800", ["\udfff."], [0], context=0)[1]["content"].encode()  # can be sent


def test_the_instructions_define_every_label_with_an_example():
    told = instructions(REASONING)
    for label in BEHAVIORS:
        (line,) = [i for i, text in enumerate(told.splitlines()) if text.startswith(f"- {label}: ")]
        assert told.splitlines()[line + 1].startswith("  Example: ")
    assert "JSON" in told  # servers demand the word where they promise the format


# Replies in other forms


def edited(sentences):
    """The published format, with the text shortened and changed by the judge."""
    parts = [f'["{truth(s)}"] {s.replace(" is what happens", " happens")} ["end-section"]' for s in sentences]
    return "\n".join(parts)


@pytest.mark.parametrize(
    "form",
    [
        lambda s: f"Here you are:\n\n{right(s).text}\n\nI hope that helps.",
        lambda s: f"```json\n{right(s).text}\n```",
        lambda s: f"<think>Is it {{'n': 1}}? Maybe {entries({1: 'backtracking'})}</think>{right(s).text}",
        lambda s: json.dumps({str(n): label for n, label in true_labels(s).items()}),
        lambda s: entries({n: label.replace("-", " ").title() for n, label in true_labels(s).items()}),
        lambda s: entries({n: f" {label.replace('-', '_').upper()}. " for n, label in true_labels(s).items()}),
        lambda s: right(s).text.replace('"n": ', '"n": "').replace(', "label"', '", "label"'),
        lambda s: right(s).text.replace("]}", "," + entries(true_labels(s[:1])) + "]}"),  # the same number twice
        edited,
    ],
    ids=[
        "prose",
        "fence",
        "thoughts",
        "mapping",
        "title case",
        "underscores",
        "texts as numbers",
        "twice",
        "published",
    ],
)
def test_other_forms_are_read(judge_at, form):
    chains = [make_chain(LABELS)]
    with JudgeServer(otherwise=lambda s: Say(form(s))) as server:
        annotated, report = judge_at(server, max_chunk=6).annotate(chains)
    check_truth(annotated, chains)
    assert server.n == 1
    assert set(kinds(report)) <= {"repaired"}


def test_a_repair_says_what_it_was():
    sentences = [sentence_of(label, i) for i, label in enumerate(LABELS)]
    assert parse_reply("Well: " + entries({1: "deduction"}), sentences).repairs
    assert parse_reply(entries({1: "Example_Testing"}), sentences).respelled == {1: "Example_Testing"}
    assert parse_reply(edited(sentences), sentences).repairs == ["the published format instead of JSON"]
    assert parse_reply("I cannot do that.", sentences).faults == ["no label in it"]


@pytest.mark.medium
def test_what_a_real_judge_wrote_is_read_as_the_reader_of_its_files_does(reference_folder):
    path = reference_folder / "r1_qwen_1.5b_annotated_chains.jsonl"
    said = [json.loads(line)["annotated"] for line in path.read_text(encoding="utf-8").splitlines()]
    found, expected = [], []
    for annotated, trace in zip(said, read_published(path)[0], strict=True):
        sentences = labeled_sentences(trace)
        reply = parse_reply(annotated, [sentence.text for sentence in sentences])
        found += [reply.labels.get(n) for n in range(1, len(sentences) + 1)]
        expected += [sentence.label for sentence in sentences]
    assert len(found) > 4000
    assert sum(label is None for label in found) < 0.02 * len(found)  # the judge's tail of edited or missing text
    assert sum(a == b for a, b in zip(found, expected, strict=True)) > 0.99 * len(found)


# What is thought aloud before the verdict

SIX = [sentence_of(label, i) for i, label in enumerate(LABELS)]
TRUE = dict(enumerate(LABELS, 1))
DRAFT = dict.fromkeys(TRUE, "deduction")  # wrong for all but the second
VERDICT = entries(TRUE)
LISTED = "\n".join(f"{n}. {label}" for n, label in TRUE.items())
DRAFTED = "\n".join(f"{n}. {label}" for n, label in DRAFT.items())
MAPPED = json.dumps({str(n): label for n, label in TRUE.items()})


@pytest.mark.parametrize(
    "text",
    [
        f"<think>1: backtracking? no, it goes on. {entries(DRAFT)}</think>{VERDICT}",
        f"<think>{entries(DRAFT)}</think>\n\n```json\n{VERDICT}\n```",
        f"<thinking>{entries(DRAFT)}</thinking>\n{VERDICT}",
        f"<reasoning>\n{DRAFTED}\n</reasoning>\n{VERDICT}",
        f"[THINK]{entries(DRAFT)}[/THINK]{VERDICT}",
        f"◁think▷{entries(DRAFT)}◁/think▷{VERDICT}",
        f"<|channel|>analysis<|message|>{entries(DRAFT)}<|end|><|start|>assistant<|channel|>final<|message|>{VERDICT}",
        f"The template opened it. {entries(DRAFT)}\n</think>\n\n{VERDICT}",
        f"<think>a</think><think>{entries(DRAFT)}</think>{VERDICT}",
        f"<think>{entries(DRAFT)}</think>{LISTED}",
        f"1: backtracking? no, rather initializing. 3. deduction, hm.\n{VERDICT}",
        f"1. initializing 2. deduction ... wait, let me redo: 1. backtracking 2. initializing.\n\n{VERDICT}",
        f"First draft:\n{entries(DRAFT)}\nWait, that is too quick. Again:\n{VERDICT}",
        f"```json\n{entries(DRAFT)}\n```\nOn reflection:\n```json\n{VERDICT}\n```\nDone.",
        f"{entries(DRAFT)}\n{VERDICT}",
        f"{json.dumps({str(n): label for n, label in DRAFT.items()})}\n{MAPPED}",
        f"Draft: {entries({3: 'backtracking'})}. Final: {VERDICT}",
        f"Draft: {entries({1: 'backtracking', 2: 'backtracking'})}. Final: {VERDICT}",
        f"Sentence 4 is hard: {entries({4: 'deduction'})}, sentence 2: {entries({2: 'backtracking'})}. {VERDICT}",
        f"{DRAFTED}\n\nHmm, no.\n\n{VERDICT}",
        f"{DRAFTED}\n\nHmm, no.\n\n{LISTED}",
        f"{entries(DRAFT)}\n\nHmm, no. The final labels:\n\n{LISTED}",
        f"{LISTED}\n\nAs JSON:\n{VERDICT}",
        "**Labels**\n\n" + "\n".join(f"{n}. **{label.title()}**" for n, label in TRUE.items()),
        "\n".join(f"- [{n}]: `{label}` - it says so" for n, label in TRUE.items()),
        "| n | label |\n|---|---|\n" + "\n".join(f"| {n} | {label} |" for n, label in TRUE.items()),
        "\n".join(f"{n}: {label.replace('-', '_').upper()}" for n, label in TRUE.items()) + "\n\nThat is all.",
        "\n".join(json.dumps({"n": n, "label": label}) for n, label in TRUE.items()),
        f"{VERDICT}\n\nNote: 2 could also be backtracking, but it is not.",
        f"{VERDICT}\n\n1. deduction was my first idea.",
        f"The form is {entries({1: 'initializing', 2: 'deduction'})}, so:\n{VERDICT}",
        "So " + VERDICT.replace("}, ", "},\n  "),
    ],
)
def test_only_the_verdict_counts(text):
    reply = parse_reply(text, SIX)
    assert (reply.labels, reply.wrong) == (TRUE, {})


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (f"<think>{VERDICT}</think>", {}),  # a thought is no verdict
        (f"<think>{VERDICT}", {}),  # nor is one that never ends
        (f"<think>{VERDICT}</think>I cannot do that.", {}),
        ("<think>So</think>1: backtracking? no. 2: deduction", {}),
        (f"{DRAFTED}\n\nWait, let me redo: 1. initializing 2. backtracking", {}),  # the draft was given up
        (f"{LISTED}\n\nWait, 2 is rather backtracking.", {}),
        ("\n".join(LISTED.splitlines()[:5]), {}),  # a list lacks one
        ("1. initializing or deduction?\n" + "\n".join(LISTED.splitlines()[1:]), {}),
        # The redone verdict was cut off: the draft does not fill it up.
        (f"{entries(DRAFT)} Wait, again: {VERDICT[:150]}", {n: TRUE[n] for n in (1, 2, 3)}),
        (f"{entries(DRAFT)} Wait, again: {VERDICT[:60]}", {1: TRUE[1]}),
        (f"{entries(DRAFT)} Again: {entries({n: TRUE[n] for n in (1, 3, 4)})}", {n: TRUE[n] for n in (1, 3, 4)}),
        (f"{entries(DRAFT)} Again: {entries(TRUE | {2: 'planning'})}", {n: TRUE[n] for n in (1, 3, 4, 5, 6)}),
        # A correction contradicts its sentence alone.
        (f"{VERDICT} But then {entries({3: 'backtracking'})}.", {n: TRUE[n] for n in (1, 2, 4, 5, 6)}),
        (f"{VERDICT} But then {entries({1: 'backtracking'})}.", {n: TRUE[n] for n in (2, 3, 4, 5, 6)}),
        (f"{VERDICT} Indeed {entries({3: TRUE[3]})}.", TRUE),
    ],
)
def test_what_is_no_verdict_is_asked_again(text, read):
    assert parse_reply(text, SIX).labels == read


def test_a_judge_that_thinks_aloud_is_read_in_one_go(judge_at):
    chains = make_chains(2, 12)

    def aloud(sentences):
        draft = "\n".join(f"{n}. deduction" for n in range(1, len(sentences) + 1))
        return Say(f"Let me see.\n{draft}\nWait, no. 1: backtracking?\n{right(sentences).text}")

    with JudgeServer(otherwise=aloud) as server:
        annotated, report = judge_at(server).annotate(chains)
    check_truth(annotated, chains)
    assert server.n == 6
    assert report.n_unlabeled == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("I'd first say 70, but the tone is harsh. Score: 35", 35),
        ('<think>Score: 70, or {"score": 60}?</think>Score: 35', 35),
        ("<think>70</think>35", 35),
        ("<think>Score: 70</think>", None),
        ("<think>Score: 70. Hmm", None),
        ('thought of 80.\n</think>\n\n{"score": 35}', 35),
        ("35/100", 35),
        ("**35/100**", 35),
        ("35 out of 100.", 35),
        ("35%", 35),
        ("I give it 35/100.", 35),
        ("**Score:** 35", 35),
        ("**Score: 35**", 35),
        ("Score: **35** / 100", 35),
        ("Final score: 35/100", 35),
        ("The score is 35.", 35),
        ("Rating: 72.5", 72.5),
        ("Score - 35", 35),
        ("\\boxed{35}", 35),
        ("Very polite on 3 counts.\n\n35", 35),
        ("Score: 70? No, too much. Score: 35", 35),
        ("Score: 70. Wait, it swears. Score: 35", 35),
        ('{"score": 70}\nWait, it swears.\n{"score": 35}', 35),
        ('```json\n{"score": 70}\n```\nOn reflection:\n```json\n{"score": 35}\n```', 35),
        ('I would say Score: 70, no: {"score": 35}', 35),
        ('{"score": "35/100"}', 35),
        ('{"score": 35, "why": {"tone": 10}}', 35),
        ('{"Score": 35}', 35),
        ('{"reason": "2 of 3 sentences are polite", "score": 35}', 35),
        ('{"score": 35} The score is 35 because of the tone.', 35),
        ("Score: 70. Score: 35.", None),
        ("Score: 70, score: 35", None),
        ('{"score": 70}\n{"score": 35}', None),
        ('{"score": 70}\nThe final score is 35.', None),
        ("70 or 35", None),
        ("35/100 or 70/100", None),
        ("Between 30/100 and 35/100.", None),
        ("Score: 30-40", None),
        ("Score: 30 to 40", None),
        ("Score: 35 or 40", None),
        ("Score: 7/10", None),
        ("Score: 7 out of 10", None),
        ("3.5 out of 5", None),
        ("35/1000", None),
        ("Score: -5", None),
        ("-5/100", None),
        ("Score: 101", None),
        ("Score: 70. Or rather, hm, Score: 350", None),
        ("Score: 72,5", None),
        ("Score: 35?", None),
        ("A score of 35 would be too low.", None),
        ("There are 3 polite words.", None),
        ('{"score": 3', None),
        ('Maybe 70. {"score": 35', None),
    ],
)
def test_only_the_final_score_counts(text, value):
    assert parse_score(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "1. " + "_" * 60_000,
        "(" * 60_000,
        "score" + " " * 60_000,
        "1. a " * 60_000,
        "7/100 " * 60_000,
        "1. deduction\n" * 5000,
        '{"n": 1, "label": "deduction"} ' * 3000,
        '{"n": 2, "label": "deduction"} or {"n": 1, "label": "deduction"} ' * 3000,
    ],
    ids=range(8),
)
def test_a_long_reply_is_read_quickly(text):
    start = time.process_time()
    parse_reply(text, SIX)
    parse_score(text)
    assert time.process_time() - start < 20  # .5 s; what is quadratic takes minutes


def test_half_a_character_in_a_reply_is_no_trouble(judge_at, tmp_path):
    """JSON can spell one; its line in the cache, the label and the report stay what can be written."""
    chain = make_chain(LABELS)

    def odd(sentences):
        labels = true_labels(sentences) | {2: "\ud800deduction"}
        return Say(entries(labels) + '{"n": "\\udc00", "label": "x"}\udfff')

    with JudgeServer(odd) as server:
        annotated, report = judge_at(server, max_chunk=6).annotate([chain])
        judge_at(server, max_chunk=6).annotate([chain])
    check_truth(annotated, [chain])
    report.to_dataframe().to_csv(tmp_path / "report.csv")
    ls.save_traces(ls.annotate([chain], lambda traces: annotated), tmp_path / "traces.jsonl")
    assert "numbers that no sentence has: ?" in (tmp_path / "report.csv").read_text("utf-8")


# Replies that are wrong: asked again for what is missing, then reported


def test_a_label_that_is_none_is_asked_for_once_more(judge_at):
    chain = make_chain(LABELS)
    with JudgeServer(lambda s: Say(entries(true_labels(s) | {2: "planning", 5: ""}))) as server:
        annotated, report = judge_at(server, max_chunk=6).annotate([chain])
    check_truth(annotated, [chain])
    assert server.asked[1] == [sentence_of("deduction", 1), sentence_of("uncertainty-estimation", 4)]
    assert "[1]: 'planning' is not one of the labels" in server.payloads[1]["messages"][-1]["content"]
    assert kinds(report) == ["asked again"] * 2
    assert [remark.at for remark in report.remarks[0]] == [1, 4]


def test_a_label_that_stays_none_leaves_its_sentence_unparsed(judge_at):
    def stubborn(sentences):
        return Say(entries({n: "planning" if "line 1 " in sentences[n - 1] else truth(sentences[n - 1])
                            for n in range(1, len(sentences) + 1)}))  # fmt: skip

    with JudgeServer(otherwise=stubborn) as server:
        annotated, report = judge_at(server, max_chunk=6).annotate([make_chain(LABELS)])
    assert [s.label for s in annotated[0]] == [LABELS[0], UNPARSED, *LABELS[2:]]
    assert server.n == 2
    assert report.n_unlabeled == 1
    assert kinds(report) == ["asked again", "unlabeled"]
    remark = report.remarks[0][-1]
    assert (remark.at, remark.text, remark.reason) == (
        1,
        sentence_of("deduction", 1),
        "'planning' is not one of the labels",
    )
    assert report.to_dataframe()["at"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("first", "asked_again"),
    [
        (lambda s: Say(entries({n: truth(s[n - 1]) for n in (1, 3, 4, 6)})), [1, 4]),  # missing
        (lambda s: Say(right(s).text.replace("]}", ", " + entries({2: "backtracking"}) + "]}")), [1]),  # contradictory
        (lambda s: Say(right(s).text[:-60], finish="length"), [4, 5]),  # cut: complete entries are kept
        (lambda s: Say("I would rather not."), [0, 1, 2, 3, 4, 5]),
        (lambda s: Say(entries({n + 90: truth(t) for n, t in enumerate(s)})), [0, 1, 2, 3, 4, 5]),  # out of range
    ],
    ids=["missing", "contradictory", "cut", "no JSON", "out of range"],
)
def test_only_what_is_missing_is_asked_for_again(judge_at, first, asked_again):
    chain = make_chain(LABELS)
    with JudgeServer(first) as server:
        annotated, report = judge_at(server, max_chunk=6).annotate([chain])
    check_truth(annotated, [chain])
    assert server.asked[1:] == [[sentence_of(LABELS[i], i) for i in asked_again]]
    assert [r.at for r in report.remarks[0] if r.kind == "asked again"] == asked_again
    assert report.n_unlabeled == 0


def test_numbers_out_of_range_and_cuts_are_reported(judge_at):
    with JudgeServer(lambda s: Say(entries(true_labels(s) | {77: "deduction"}), finish="length")) as server:
        _, report = judge_at(server, max_chunk=6).annotate([make_chain(LABELS)])
    assert server.n == 1
    assert [(r.kind, r.reason) for r in report.remarks[0]] == [
        ("malformed", "numbers that no sentence has: 77"),
        ("malformed", "the reply was cut off"),
    ]


def test_a_server_that_always_cuts_is_asked_for_as_long_as_it_gets_on(judge_at):
    chain = make_chain([*LABELS, *LABELS])
    with JudgeServer(otherwise=lambda s: Say(entries(true_labels(s[:4])), finish="length")) as server:
        annotated, _ = judge_at(server, max_chunk=12).annotate([chain])
    check_truth(annotated, [chain])
    assert [len(asked) for asked in server.asked] == [12, 8, 4]


def test_a_server_that_only_chats_leaves_all_unparsed_and_reports_it(judge_at):
    with JudgeServer(otherwise=always(Say("What a fine chain!"))) as server:
        annotated, report = judge_at(server).annotate(make_chains(1, 8))
    assert [s.label for s in annotated[0]] == [UNPARSED] * 8
    assert server.n == 4
    assert kinds(report).count("unlabeled") == report.n_unlabeled == 8
    assert kinds(report).count("malformed") == 4


# Servers that fail


@pytest.mark.medium
@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (Say(status=500), "status 500"),
        (Say(status=503, body=b"<html>busy</html>"), "status 503"),
        (Say(status=429), "status 429"),
        (Say(delay=9.0), "no answer in time"),
        (Say("{", half=True), "an answer that broke off"),
        (Say(body=b'{"choices": []}'), "an answer without text"),
        (Say(""), "an answer without text"),
        (Say(body=b'{"choices": [{"message": null}]}'), "an answer without text"),
        (Say(body=b'{"choices": "none"}'), "an answer without text"),
        (Say(body=b'{"choices": ['), "an answer that cannot be read"),
        (Say(body=b"<html>hello</html>", headers={"Content-Type": "text/html"}), "does the URL lack '/v1'"),
        (Say(body=b'{"error": {"message": "busy upstream"}}'), "busy upstream"),
    ],
    ids=lambda value: None if isinstance(value, Say) else value[:24],
)
def test_trouble_that_passes_is_retried_and_reported(judge_at, trouble, words):
    chain = make_chain(LABELS)
    with JudgeServer(always(trouble), always(trouble)) as server:
        judge = judge_at(server, max_chunk=6, timeout=0.8 if trouble.delay else 5.0)
        annotated, report = judge.annotate([chain])
    check_truth(annotated, [chain])
    assert (server.n, report.n_requests) == (3, 3)
    assert kinds(report) == ["retried"] * 2
    assert words in report.remarks[0][0].reason


def test_a_server_may_ask_for_a_wait(judge_at):
    busy = always(Say(status=429, headers={"Retry-After": "0.6"}))
    with JudgeServer(always(Say(status=500)), busy) as server:
        judge_at(server, max_chunk=6)([make_chain(LABELS)])
    short, long = (b - a for a, b in zip(server.times, server.times[1:], strict=False))
    assert short < 0.6 <= long


def test_a_server_that_asks_for_too_long_a_wait_ends_the_run(judge_at):
    with JudgeServer(otherwise=always(Say(status=429, headers={"Retry-After": "3600"}))) as server:
        with pytest.raises(LensteerError, match=r"status 429 .*asks to wait for 3600 s"):
            judge_at(server)(make_chains(2))
    assert server.n == 1


def test_an_outage_says_where_it_stopped_and_the_same_call_goes_on(judge_at, tmp_path):
    chains = make_chains(4, 8)
    down = threading.Event()

    def until_down(sentences):
        return Say(status=500) if down.is_set() or server.n > 3 else right(sentences)

    with JudgeServer(otherwise=until_down) as server:
        judge = judge_at(server, concurrency=1)
        with pytest.raises(LensteerError) as caught:
            judge(chains)
        message = str(caught.value)
        for part in (server.url, "'m'", "status 500", "after 2 retries", "3 of 8 parts", str(tmp_path), "resumes"):
            assert part in message
        assert server.n == 3 + 3
        assert judge.plan(chains).calls == 5
    with JudgeServer() as server:
        annotated, report = judge_at(server).annotate(chains)
    check_truth(annotated, chains)
    assert (server.n, report.n_cached) == (5, 3)


def test_after_a_failure_nothing_new_is_asked_but_what_is_on_its_way_is_kept(judge_at):
    chains = make_chains(6, 8)

    def one_fails(sentences):
        if server.n == 1:
            return right(sentences)
        return Say(status=404) if "line 0 " in sentences[0] else Say(right(sentences).text, delay=0.5)

    with JudgeServer(otherwise=one_fails) as server:
        judge = judge_at(server, concurrency=4)
        with pytest.raises(LensteerError, match="status 404"):
            judge(chains)
        assert server.n <= 5
        assert judge.plan(chains).cached >= 2  # the first, and those that were on their way


@pytest.mark.parametrize(("status", "hint"), [(401, "LENSTEER_JUDGE_KEY"), (403, "LENSTEER_JUDGE_KEY"), (404, "model")])
def test_a_refused_key_or_model_ends_the_run_at_once(judge_at, status, hint):
    with JudgeServer(otherwise=always(Say(status=status))) as server:
        with pytest.raises(LensteerError, match=rf"status {status} \(planted trouble\).*{hint}.*0 of 8 parts"):
            judge_at(server)(make_chains(4, 8))
    assert server.n == 1


def test_a_server_that_is_not_there(judge_at):
    with JudgeServer() as server:
        judge = judge_at(server, retries=1)
    with pytest.raises(LensteerError, match=r"no connection .* after 1 retries"):
        judge(make_chains(1))


def test_a_server_without_json_mode_is_asked_without(judge_at):
    def plain_only(sentences):
        return Say(status=400) if "response_format" in server.payloads[-1] else right(sentences)

    chains = make_chains(3, 8)
    with JudgeServer(otherwise=plain_only) as server:
        annotated, report = judge_at(server, concurrency=1).annotate(chains)
    check_truth(annotated, chains)
    assert server.n == 6 + 1  # found out once
    assert report.remarks == ((),) * 3


def test_a_question_that_the_server_refuses_is_reported_and_asked_anew_the_next_time(judge_at):
    def filters(sentences):
        return Say("content filter", status=400) if "line 2 " in sentences[0] else right(sentences)

    chain = make_chain(LABELS)
    with JudgeServer(otherwise=filters) as server:
        annotated, report = judge_at(server, max_chunk=2).annotate([chain])
    assert [s.label for s in annotated[0]] == [*LABELS[:2], UNPARSED, UNPARSED, *LABELS[4:]]
    assert [(r.kind, r.at, r.reason) for r in report.remarks[0]] == [
        ("unlabeled", 2, "status 400 (content filter)"),
        ("unlabeled", 3, "status 400 (content filter)"),
    ]
    with JudgeServer() as server:
        check_truth(judge_at(server, max_chunk=2)([chain]), [chain])
    assert server.n == 1


def test_a_server_that_has_no_words_for_one_question_leaves_it_unparsed(judge_at):
    def silent(sentences):
        return Say(body=b'{"choices": []}') if "line 2 " in sentences[0] else right(sentences)

    with JudgeServer(otherwise=silent) as server:
        annotated, report = judge_at(server, max_chunk=2, retries=1).annotate([make_chain(LABELS)])
    assert [s.label for s in annotated[0]] == [*LABELS[:2], UNPARSED, UNPARSED, *LABELS[4:]]
    assert kinds(report) == ["retried", "unlabeled", "unlabeled"]
    assert report.remarks[0][1].reason == "an answer without text"


@pytest.mark.parametrize("n_chains", [1, 20])
def test_a_server_that_refuses_everything_ends_the_run(judge_at, n_chains):
    with JudgeServer(otherwise=always(Say("no temperature here", status=400))) as server:
        with pytest.raises(LensteerError, match="no temperature here"):
            judge_at(server, max_chunk=40)(make_chains(n_chains))
    assert server.n == 2 * min(n_chains, 3)  # with and without the format


def test_temperature_may_be_left_to_the_server(judge_at):
    with JudgeServer() as server:
        judge_at(server, temperature=None)(make_chains(1))
    assert "temperature" not in server.payloads[0]


# Costs: told beforehand, never paid twice


def test_the_plan_comes_first_and_the_cache_makes_the_second_call_free(judge_at):
    chains = make_chains(3, 8)
    plans = []
    with JudgeServer() as server:
        judge = judge_at(server, announce=lambda plan: plans.append((plan, server.n)))
        first = judge(chains)
        second, report = judge.annotate(chains)
        assert server.n == 6
        size = sum(len(m["content"]) for payload in server.payloads for m in payload["messages"])
        assert plans == [(JudgePlan(6, 0, -(-size // 4)), 0), (JudgePlan(0, 6, 0), 6)]
        assert second == first
        assert (report.n_requests, report.n_cached) == (0, 6)
        # Another model, and a file that is damaged, are asked; an unwilling user is not charged.
        files = sorted(Path(judge.cache).iterdir())
        files[0].write_text("{")
        files[1].write_text('{"text": 3}')
        assert judge.plan(chains).calls == 2
        assert judge(chains) == first
        assert server.n == 8
        judge_at(server, model="other")(chains)
        assert server.n == 14

        def refuse(plan):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            judge_at(server, model="third", announce=refuse)(chains)
        assert server.n == 14


def test_the_plan_follows_faulty_replies_to_the_next_question(judge_at):
    chain = make_chain(LABELS)
    with JudgeServer(lambda s: Say(entries(true_labels(s[:4])))) as server:
        judge = judge_at(server, max_chunk=6)
        judge([chain])
        assert judge.plan([chain]) == JudgePlan(0, 2, 0)
        assert judge([chain]) == judge([chain])
    assert server.n == 2


def test_equal_chains_are_asked_once(judge_at):
    chains = [make_chain(LABELS)] * 5
    with JudgeServer(otherwise=lambda s: Say(right(s).text, delay=0.05)) as server:
        judge = judge_at(server, max_chunk=6, progress=True)
        assert judge.plan(chains).calls == 1
        check_truth(judge(chains), chains)
    assert server.n == 1


CHILD = """
import sys
from judge_server import make_chains, truth
from lensteer.annotation.judge import Judge
url, cache = sys.argv[1:]
judge = Judge(model="m", base_url=url, cache=cache, max_chunk=4, concurrency=2)
chains = make_chains(15, 8)
assert "openai" not in sys.modules  # only when it is used
print("ready", flush=True)
sys.stdin.readline()
annotated = judge(chains)
assert all(s.label == truth(s.text) for sentences in annotated for s in sentences)
print("right", flush=True)
"""


@pytest.mark.medium
def test_a_killed_run_resumes_and_two_processes_share_a_cache(judge_at, tmp_path):
    chains = make_chains(15, 8)
    cache = tmp_path / "replies"

    def kills_the_child(sentences):
        if server.n > 20:
            child.kill()
        return Say(right(sentences).text, delay=0.05)

    with JudgeServer(otherwise=kills_the_child) as server:
        command = [sys.executable, "-c", CHILD, server.url, str(cache)]
        options: dict[str, Any] = dict(
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
        )
        with subprocess.Popen(command, **options) as child:
            try:
                assert child.stdout.readline() == "ready\n"
                child.stdin.write("go\n")
                child.stdin.flush()
                while server.n < 10:
                    assert child.poll() is None
                    time.sleep(0.01)
                kept = {json.loads(file.read_text())["messages"][-1]["content"] for file in cache.glob("*.json")}
                before = server.n
                judge = judge_at(server, concurrency=2)
                check_truth(judge(chains), chains)  # beside the child at first, and beyond its end
                assert child.wait(10) < 0
            finally:
                child.kill()
        again = [payload["messages"][-1]["content"] for payload in server.payloads[before:]]
        assert 7 <= len(kept) <= before  # written as soon as they were there
        assert kept.isdisjoint(again)
        assert len(again) <= 2 * (30 - len(kept))
        files = [json.loads(file.read_text()) for file in cache.glob("*.json")]
        assert len(files) == 30
        assert all(map(truth_of, files))
        total = server.n
        check_truth(judge(chains), chains)
        assert server.n == total


def truth_of(record):
    """Whether a cached reply is the right one for its question."""
    lines = record["messages"][-1]["content"].splitlines()
    sentences = [line.partition("] ")[2] for line in lines if line.startswith("[")]
    return record["text"] == right(sentences).text


# Scores of a whole chain


def score(say):
    return JudgeServer(otherwise=always(Say(say)))


def test_a_score_is_asked_once_with_task_and_response(tmp_path):
    chain = make_chain(LABELS, "b")
    with score('{"score": 72.5}') as server:
        polite = JudgeScore("How polite is it?", model="m", base_url=server.url, cache=tmp_path)
        assert polite(chain) == polite(chain) == 72.5
        (payload,) = server.payloads
        assert JudgeScore("How long is it?", model="m", base_url=server.url, cache=tmp_path)(chain) == 72.5
        assert server.n == 2
    system, user = (message["content"] for message in payload["messages"])
    assert "0" in system
    assert "100" in system
    assert "JSON" in system
    for part in ("How polite is it?", "What is b?", chain.response):
        assert part in user
    assert payload["response_format"] == {"type": "json_object"}
    assert server.keys[0] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"score": 0}', 0),
        ('```json\n{"score": 100}\n```', 100),
        ('<think>{"score": 1}?</think> I give {"score": "40"}.', 40),
        ('Between {"score": 20} and {"score": 30}, so {"score": 25}', 25),
        (" 85. ", 85),
        ('{"score": 101}', None),
        ('{"score": -1}', None),
        ('{"score": NaN}', None),
        ('{"score": true}', None),
        ('{"score": null}', None),
        ('{"score": "high"}', None),
        ('{"rating": 3}', None),
        ("", None),
    ],
)
def test_a_score_is_read(text, value):
    assert parse_score(text) == value


@settings(deadline=None)
@given(
    text=st.one_of(
        st.text(), st.lists(st.sampled_from([*'{}":,.-', '"score"', "1", "1e9", "٣", "</think>"])).map("".join)
    )
)
def test_any_score_is_read_or_not(text):
    found = parse_score(text)
    assert found is None or 0 <= found <= 100


def test_a_reply_without_a_score_is_asked_for_once_more(tmp_path):
    with JudgeServer(always(Say("Very polite!")), otherwise=always(Say('{"score": 90}'))) as server:
        polite = JudgeScore("How polite is it?", model="m", base_url=server.url, cache=tmp_path)
        assert polite(make_chain(LABELS)) == 90
        assert "An earlier answer could not be used" in server.payloads[1]["messages"][1]["content"]
        assert polite(make_chain(LABELS)) == 90
        assert server.n == 2
    with score("As polite as can be, which is to say: very") as server:
        polite = JudgeScore("How rude is it?", model="m", base_url=server.url, cache=tmp_path)
        for n in (2, 4):  # nothing of it is kept
            with pytest.raises(LensteerError, match=r"no score from 0 to 100 for chain 'a/0', but 'As polite as can"):
                polite(make_chain(LABELS))
            assert server.n == n


@pytest.mark.parametrize(
    ("say", "words"),
    [
        (Say(status=401), "status 401"),
        (Say("too long", status=413), r"no score for chain 'a/0': status 413 \(too long\)"),
        (Say(status=500), "status 500 .* after 1 retries"),
        (Say(""), "an answer without text"),
    ],
)
def test_a_score_that_cannot_be_had_is_an_error(say, words, tmp_path):
    with JudgeServer(otherwise=always(say)) as server:
        polite = JudgeScore("How polite is it?", model="m", base_url=server.url, cache=tmp_path, retries=1)
        with pytest.raises(LensteerError, match=words):
            polite(make_chain(LABELS))
    with pytest.raises(LensteerError, match="question=''"):
        JudgeScore(" ", model="m")


def test_a_score_is_a_measure_of_an_experiment(organism, tmp_path):
    tasks = ls.load_tasks(split="test", n=2)
    with score('{"score": 60}') as server:
        polite = JudgeScore("How polite is it?", model="m", base_url=server.url, cache=tmp_path)
        conditions = [Condition("as it is", kind="unsteered")]
        records = run_conditions(
            organism, tasks, conditions, ls.Sampling(max_new_tokens=20), measures={"polite": polite}
        )
    assert [record.scores for record in records] == [{"polite": 60.0}] * 2
    assert server.n == 1 + 2  # once on a made-up chain, before anything is generated


# Where it runs


def test_it_runs_where_a_loop_runs_already(judge_at):
    chains = make_chains(2, 8)

    async def cell():
        return judge(chains)

    with JudgeServer() as server:
        judge = judge_at(server)
        check_truth(asyncio.run(cell()), chains)
        with JudgeServer(otherwise=always(Say(status=401))) as closed:
            judge = judge_at(closed, model="other")
            with pytest.raises(LensteerError, match="status 401"):
                asyncio.run(cell())


def test_an_interrupt_in_a_running_loop_comes_through_and_nothing_more_is_asked(judge_at):
    async def cell():
        judge_at(server, concurrency=2, timeout=60.0)(make_chains(10, 8))

    with JudgeServer(right, otherwise=lambda s: Say(right(s).text, delay=30.0)) as server:
        loop = asyncio.new_event_loop()  # as a notebook's: an interrupt comes through
        timer = threading.Timer(0.6, _thread.interrupt_main)
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(cell())
        timer.join()
        loop.close()
        assert time.monotonic() - started < 10
    # The server is gone, and with it what was under way.
    for thread in threading.enumerate():
        if thread.name.startswith("lensteer-judge"):
            thread.join(10)
            assert not thread.is_alive()
    assert server.n <= 3


def test_without_openai_the_error_names_the_extra_and_cached_replies_still_serve(judge_at, monkeypatch):
    chains = make_chains(1)
    with JudgeServer() as server:
        found = judge_at(server)(chains)
        monkeypatch.setitem(sys.modules, "openai", None)
        assert judge_at(server)(chains) == found
        with pytest.raises(LensteerError, match=r"pip install lensteer\[judge\]"):
            judge_at(server)(make_chains(2))


# The key, and what else is set up


def test_the_key_is_seen_by_the_server_only(judge_at, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    echo = Say(f"your key {SECRET} is bad", status=401)
    with JudgeServer(lambda s: Say(right(s).text + SECRET), otherwise=always(echo)) as server:
        judge = judge_at(server)
        with pytest.raises(LensteerError, match=r"your key \[key\] is bad") as caught:
            judge(make_chains(2))
    assert set(server.keys) == {f"Bearer {SECRET}"}
    shown = "".join(traceback.format_exception(caught.value))
    files = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert files
    for text in (repr(judge), str(caught.value), shown, caplog.text, files, json.dumps(server.payloads)):
        assert SECRET not in text


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://other.test/v1/")
    monkeypatch.setenv("LENSTEER_JUDGE_MODEL", "a-model")
    assert (Judge().base_url, Judge().model) == ("http://other.test/v1", "a-model")
    monkeypatch.setenv("LENSTEER_JUDGE_URL", "http://judge.test/v1")
    assert Judge().base_url == "http://judge.test/v1"
    assert Judge(model="b", base_url="http://mine.test").model == "b"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/lensteer/judge")
    monkeypatch.delenv("LENSTEER_JUDGE_MODEL")
    with pytest.raises(LensteerError, match="LENSTEER_JUDGE_MODEL"):
        Judge()


def test_openai_s_key_goes_to_openai_s_url_only(judge_at, monkeypatch):
    monkeypatch.delenv("LENSTEER_JUDGE_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-for-openai")
    with JudgeServer() as server:
        judge_at(server)(make_chains(1, 4))
        monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
        judge_at(server)(make_chains(2, 4))
    assert server.keys == ["Bearer unused", "Bearer sk-for-openai"]


def test_openai_itself_needs_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv("LENSTEER_JUDGE_KEY")
    with pytest.raises(LensteerError, match=r"no key for https://api\.openai\.com/v1: set LENSTEER_JUDGE_KEY"):
        Judge(model="m", cache=tmp_path)(make_chains(1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(base_url="localhost:8000"), "the URL 'localhost:8000'"),
        (dict(base_url="http://me:hidden@judge.test/v1"), "'judge.test' holds a name"),
        (dict(base_url="http://judge.test/v1?key=hidden"), "'judge.test' holds a name, password or query"),
        (dict(base_url="http://me:hidden@judge.test:99999/v1"), "the URL at 'judge.test:99999/v1' (Port out of range"),
        (dict(base_url="http://judge.test:0"), "the URL 'http://judge.test:0'"),
        (dict(base_url="http://judge.test/a b"), "the URL 'http://judge.test/a b'"),
        (dict(concurrency=0), "concurrency=0"),
        (dict(max_chunk=0), "max_chunk=0"),
        (dict(retries=-1), "retries=-1"),
        (dict(temperature=None, base_url="ftp://judge.test"), "the URL 'ftp://judge.test'"),
        (dict(context=-1), "context=-1"),
        (dict(timeout=0.0), "timeout=0.0"),
    ],
)
def test_impossible_settings(options, words):
    with pytest.raises(LensteerError) as caught:
        Judge(model="m", **options)
    assert words in str(caught.value)
    assert "hidden" not in str(caught.value)


# Any text at all


SENTENCES = [sentence_of(label, i) for i, label in enumerate(LABELS)]
SCRAPS = st.sampled_from(
    [
        *'{}[]",:²-',
        '"n"',
        '"label"',
        "1",
        "2",
        "99",
        "null",
        "\\",
        "```",
        "</think>",
        "deduction",
        SENTENCES[0],
        '["deduction"]',
        '["end-section"]',
        "[backtracking]",
        entries({1: "x", 2: "deduction"}),
    ]
)
REPLIES = st.one_of(st.text(), st.lists(SCRAPS).map("".join), st.lists(SCRAPS).map(" ".join))


@settings(deadline=None)
@given(text=REPLIES)
@example(text='{"n": ' + "[" * 100_000 + "}")
@example(text='{"n": ' + "9" * 5000 + ', "label": "deduction"}')
@example(text="{" * 50_000)
@example(text='{"n": true, "label": {"n": 1}}')
@example(text='{"n": NaN, "label": "deduction"}')
@example(text='{"\\ud800": "deduction", "n": 1, "label": "\\ud800"}')
def test_any_reply_is_read(text):
    reply = parse_reply(text, SENTENCES)
    assert set(reply.labels.values()) <= set(BEHAVIORS)
    assert set(reply.labels) | set(reply.wrong) | set(reply.respelled) <= set(range(1, 7))
    assert not set(reply.labels) & set(reply.wrong)


@settings(deadline=None)
@given(
    labels=st.dictionaries(st.integers(-3, 9), st.sampled_from([*BEHAVIORS, "other", ""])),
    before=st.text(st.characters(exclude_characters="{}")),
    behind=st.text(st.characters(exclude_characters="{}")),
)
def test_what_a_reply_says_is_what_is_read(labels, before, behind):
    if "</think>" in behind:
        return
    reply = parse_reply(before + entries(labels) + behind, SENTENCES)
    if labels:
        assert reply.labels == {n: label for n, label in labels.items() if 1 <= n <= 6 and label in BEHAVIORS}
        assert set(reply.wrong) == {n for n, label in labels.items() if 1 <= n <= 6 and label not in BEHAVIORS}


def finish(talk, replies):
    next(talk)
    for reply in replies:
        try:
            talk.send(Answer(reply))
        except StopIteration as end:
            return end.value
    raise AssertionError("it asks for more")


@settings(deadline=None)
@given(replies=st.lists(REPLIES, min_size=MAX_QUESTIONS, max_size=MAX_QUESTIONS))
def test_every_sentence_comes_back_whatever_is_said(replies):
    labels, remarks = finish(converse("", SENTENCES, range(1, 5), context=2), replies)
    assert list(labels) == [1, 2, 3, 4]
    assert set(labels.values()) <= {*BEHAVIORS, UNPARSED}
    unlabeled = [remark.at for remark in remarks if remark.kind == "unlabeled"]
    assert unlabeled == [i for i, label in labels.items() if label == UNPARSED]
