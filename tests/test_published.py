"""The reader of the published format on planted files, a round trip, and the published chains themselves."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


# --- tokens ---------------------------------------------------------------------------------------

OPENERS = {
    "emoji": "🤔",
    "flag": "🇫🇷",
    "skin tone": "👍🏽",
    "family": "👩\u200d👩\u200d👧\u200d👦",
    "heart": "❤\ufe0f",
    "keycap": "1\ufe0f\u20e3",
    "Chinese": "嗯，",
    "rare Chinese": "𠮷",
    "Japanese": "うーん、",
    "Korean": "잠깐,",
    "Hindi": "रुको",
    "Thai": "เดี๋ยว",
    "Arabic": "انتظر،",
    "combining": "E\u0301h,",
    "accent first": "\u0301So",
    "composed": "É,",
    "math": "𝑥",
    "quote": "“Wait”",
    "replacement": "\ufffd",
    "special token": "<|im_end|>",
}
BETWEEN = (" ", "  ", "\n", "\n\n", "\t", " \n ", "\u00a0", "\u3000")


@pytest.fixture(
    scope="module",
    params=[
        *("organism", "bytes", "bytes with a BOS", "llama-like"),
        *(
            pytest.param(name, marks=pytest.mark.medium)
            for name in ("smollm2", "mini-r1", "qwen2.5-0.5b", "gemma3-270m")
        ),
    ],
)
def any_tokenizer(request, tiny_checkpoint):
    if request.param == "organism":
        return request.getfixturevalue("grammar_tokenizer")
    if request.param == "llama-like":
        return llama_like()
    if request.param.startswith("bytes"):
        return AutoTokenizer.from_pretrained(tiny_checkpoint("llama" if "BOS" in request.param else "qwen2"))
    folder = Path(os.environ.get("LENSTEER_REAL", "none")) / request.param
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"LENSTEER_REAL has no tokenizer {request.param!r}")
    return AutoTokenizer.from_pretrained(folder)


def llama_like(*normalizer):
    """It puts a blank in front, spells what it lacks in bytes, and drops the first blank when it decodes."""
    names = ["<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), "So", "▁So", "S", "o", "i", "s", "x", "2", "."]
    merges = [("S", "o"), ("▁", "So")]
    core = Tokenizer(BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence([*normalizer, *marks])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def bytes_of(tokenizer, token: int) -> bytes:
    """What a token spells."""
    name = tokenizer.convert_ids_to_tokens(token)
    if token in tokenizer.added_tokens_decoder:
        return name.encode()
    if re.fullmatch("<0x[0-9A-F]{2}>", name):
        return bytes([int(name[3:5], 16)])
    if "ByteLevel" in type(tokenizer.backend_tokenizer.decoder).__name__:
        # GPT-2's table: bytes that print stand for themselves, the others follow from 256 on.
        printed = [b for b in range(256) if chr(b).isprintable() and chr(b) not in " \xad" and not 127 <= b < 161]
        table = {chr(b): b for b in printed}
        table |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printed)}
        return bytes(table[c] for c in name)
    return name.replace("▁", " ").encode()


def owners(tokenizer, ids, text: str) -> list[tuple[int, int]]:
    """For each character of what the tokenizer encoded, the first and the last token with a byte of it."""
    spelled = [bytes_of(tokenizer, token) for token in ids]
    owner = [n for n, some in enumerate(spelled) for _ in some]
    lead = b"".join(spelled).removesuffix(text.encode())
    assert lead in (b"", b" ")
    assert len(owner) == len(lead + text.encode())
    ends = [len(lead) + len(text[: at + 1].encode()) for at in range(len(text))]
    return [(owner[end - len(char.encode())], owner[end - 1]) for char, end in zip(text, ends, strict=True)]


def chain_of(*sentences: str, between: str = " ") -> dict[str, str]:
    annotated = "".join(f'["deduction"]{sentence}["end-section"]' for sentence in sentences)
    return {"response": "<think>" + between.join(sentences) + "</think>2", "annotated": annotated}


@pytest.mark.parametrize("opener", OPENERS.values(), ids=OPENERS.keys())
def test_no_sentence_loses_a_token(opener, any_tokenizer, tmp_path):
    """Whatever character it opens with, after whatever blank, and with whatever tokenizer."""
    sentences = (f"{opener} so x is 2.", "So.", f"{opener}.", f"{opener} so.")
    rows = [chain_of(*sentences, between=between) for between in BETWEEN]
    traces, report = read_published(write(tmp_path / "chains.jsonl", *rows), any_tokenizer)
    assert report.n_matched == len(sentences) * len(rows)
    composes = "NFC" in repr(any_tokenizer.backend_tokenizer.normalizer)
    for read in traces:

        def encoded(text):
            return unicodedata.normalize("NFC", text) if composes else text

        held = owners(any_tokenizer, read.response_ids, encoded(read.response))
        for span in read.spans:
            first, last = (len(encoded(read.response[:at])) for at in (span.char_start, span.char_end))
            assert span.start == read.prompt_length + held[first][0]
            assert span.end == read.prompt_length + held[last - 1][1] + 1


def test_a_text_that_the_tokenizer_changes_keeps_the_files_characters(tmp_path):
    """The ids of such a tokenizer decode to the composed form, which is shorter."""
    row = chain_of("E\u0301h, so x is 2.", "E\u0301 so.", "So.")
    path = write(tmp_path / "chains.jsonl", row)
    tokenizer = llama_like(normalizers.NFC())
    (read,), report = read_published(path, tokenizer)
    assert read.response == row["response"] != tokenizer.decode(read.response_ids)
    assert report.n_matched == 3
    assert list(read.offsets) == sorted(read.offsets)
    assert [tokenizer.decode(read.ids[s.start : s.end]).strip() for s in read.spans] == [
        *("Éh, so x is 2.", "É so.", "So.")
    ]

    class Slow:
        """It has no offsets."""

        def __call__(self, text, return_offsets_mapping=False, **options):
            if return_offsets_mapping:
                raise NotImplementedError
            return tokenizer(text, **options)

        decode = tokenizer.decode

    words = r"published-000: .* another text from character 7 on \('Éh, .* give a fast tokenizer"
    with pytest.raises(LensteerError, match=words):
        read_published(path, Slow())
    same = write(tmp_path / "same.jsonl", chain_of("So x is 2.", "So."))
    assert read_published(same, Slow())[0][0].spans == read_published(same, tokenizer)[0][0].spans


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


@pytest.mark.medium
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


@pytest.mark.medium
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
