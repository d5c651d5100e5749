"""The aligner against chains whose true offsets are known, and against published annotations."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensteer.annotation import alignment as aligner
from lensteer.annotation.alignment import align
from lensteer.annotation.published import read_published
from lensteer.behaviors import BEHAVIORS, Sentence, Span
from lensteer.errors import LensteerError

PROMPT = 7

# --- a chain, what an annotator makes of it, and the truth ----------------------------------------

SHORT = [
    "Wait.",
    "Hmm.",
    "Okay.",
    "Let me check.",
    "Let me try again.",
    "No.",
    "So x is 4.",
    "Wait, that's wrong.",
]
OPENINGS = [
    *(
        "So",
        "Now",
        "Then",
        "But",
        "Maybe",
        "Perhaps",
        "Let me see:",
        "I think",
        "For example,",
        "Recall that",
    ),
    *("Wait,", 'Since "it" can\'t fail,', "Because of this,", "From node"),
]
WORDS = """
the a of node edge path leads goes reaches from to seven four nine sum total number product of dead end goal
start first second value table row that which is not was would could should check again compute gives equals
\\(x^2\\) n+1 = 12 37 405 because—if it's true, however, rule: 'left' right triangle probability suits naïve
""".split()


def compose(rng: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """A response and the true character range of each of its sentences."""
    text, ranges = "<think>" + rng.choice(["", "\n"]), []
    memory: list[str] = []
    for _ in range(rng.randint(15, 60)):
        kind = rng.random()
        if kind < 0.15:
            sentence = rng.choice(SHORT)
        elif kind < 0.22 and memory:
            sentence = rng.choice(memory)  # a long sentence again, word for word
        else:
            words = [rng.choice(WORDS) for _ in range(rng.randint(4, 25))]
            sentence = f"{rng.choice(OPENINGS)} {' '.join(words)}{rng.choice('..?!')}"
            memory.append(sentence)
        ranges.append((len(text), len(text) + len(sentence)))
        text += sentence + rng.choice([" ", " ", " ", "\n", "\n\n", "  "])
    return text.rstrip() + rng.choice(["", "</think>", "\n</think>\n\nThe answer is 4.<|im_end|>"]), ranges


def typo(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 1 + len(text) // 40)):
        i = rng.randrange(len(text))
        kind, letter = rng.randrange(4), rng.choice("abcdefgh.,")
        text = {
            0: text[:i] + letter + text[i + 1 :],
            1: text[:i] + letter + text[i:],
            2: text[:i] + text[i + 1 :],
            3: text[:i] + text[i : i + 2][::-1] + text[i + 2 :],
        }[kind]
    return text


def drop_words(text: str, rng: random.Random) -> str:
    words = text.split()
    for _ in range(1 + len(words) // 12):
        del words[rng.randrange(1, len(words) - 1)]
    return " ".join(words)


EDITS = {
    "whitespace": lambda text, rng: "\n " + text.replace(" ", rng.choice(["  ", "\n", " \t"])) + " ",
    "case": lambda text, rng: rng.choice([text.lower(), text.upper(), text[0].swapcase() + text[1:]]),
    "quotes": lambda text, rng: text.replace("'", "’").replace('"', "“").replace("—", "-"),
    "latex": lambda text, rng: text.replace("\\(", "$").replace("\\)", "$"),
    "typo": typo,
    "words": drop_words,
}


def misquote(
    response: str, ranges: list[tuple[int, int]], rng: random.Random
) -> list[tuple[Sentence, tuple[int, int], str]]:
    """What an unfaithful annotator returns: (sentence, true range, what was done to it)."""
    out = []
    for start, end in ranges[: len(ranges) - rng.choice([0, 0, 0, 3, 8])]:  # the tail may be missing
        text, label, draw = response[start:end], rng.choice(BEHAVIORS), rng.random()
        if draw < 0.05:
            continue  # left out
        if draw < 0.12 and text.count(" ") > 5:  # split at a blank
            cut = rng.choice([m.start() for m in re.finditer(" ", text)][2:-2])
            out.append((Sentence(label, text[:cut]), (start, start + cut), "split"))
            out.append((Sentence(label, text[cut:]), (start + cut + 1, end), "split"))
        elif draw < 0.45:
            kind = rng.choice(list(EDITS))
            if kind in ("typo", "words") and text.count(" ") < 4:
                kind = "case"
            out.append((Sentence(label, EDITS[kind](text, rng)), (start, end), kind))
        else:
            out.append((Sentence(label, text), (start, end), "as is"))
    i = 1
    while i < len(out):
        if rng.random() < 0.03 and out[i - 1][2] == out[i][2] == "as is":
            first, second = out[i - 1], out[i]
            out[i - 1 : i + 1] = [(*second[:2], "swapped"), (*first[:2], "swapped")]
            i += 1
        i += 1
    return out


def tokenize(response: str, rng: random.Random) -> list[int]:
    """Offsets as a byte-level BPE cuts: blanks lead words, some tokens are bytes of one character."""
    offsets = []
    for match in re.finditer(r" ?\w{1,6}| ?[^\w\s]+\n?|\s+", response):
        n_bytes = 3 if rng.random() < 0.02 else 1
        offsets += [match.start()] * n_bytes
    return offsets


def true_tokens(response: str, offsets: list[int], start: int, end: int) -> list[int]:
    """Slow and obvious: tokens with a character of [start, end) among theirs."""
    hit = []
    for i, begin in enumerate(offsets):
        stop = min([o for o in offsets if o > begin], default=len(response))
        if any(start <= c < end for c in range(begin, stop)):
            hit.append(PROMPT + i)
    return hit


def check_invariants(sentences, response, offsets, alignment) -> None:
    spans, report = alignment.spans, alignment.report
    assert report.matched + len(report.repaired) + len(report.dropped) == len(sentences)
    assert len(spans) == report.matched + len(report.repaired)
    listed = [r.index for r in report.repaired] + [d.index for d in report.dropped]
    assert len(set(listed)) == len(listed)
    for drop in report.dropped:
        assert (drop.label, drop.text) == (sentences[drop.index].label, sentences[drop.index].text.strip())
        assert drop.reason
    gone = {d.index for d in report.dropped}
    assert sorted(alignment.sentences) == [i for i in range(len(sentences)) if i not in gone]
    in_order = [i for i in alignment.sentences if i not in report.moved]
    assert in_order == sorted(in_order)
    assert set(report.moved) <= set(alignment.sentences)
    repaired = {r.index: r for r in report.repaired}
    char_end, end = 0, PROMPT
    for i, span in zip(alignment.sentences, spans, strict=True):
        assert span.label == sentences[i].label
        assert char_end <= span.char_start < span.char_end <= len(response)
        assert end <= span.start < span.end <= PROMPT + len(offsets)
        found = response[span.char_start : span.char_end]
        assert found == found.strip()
        if i in repaired:
            assert (repaired[i].text, repaired[i].found) == (sentences[i].text.strip(), found)
            assert found != repaired[i].text
            assert 0.75 <= repaired[i].similarity <= 1
        else:
            assert found == sentences[i].text.strip()
        char_end, end = span.char_end, span.end


# --- planted edits --------------------------------------------------------------------------------


@pytest.mark.medium
def test_planted_edits_are_undone():
    right, total, wrong, n_swapped, n_lost = Counter(), Counter(), [], 0, 0
    for seed in range(150):
        rng = random.Random(seed)
        response, ranges = compose(rng)
        quoted = misquote(response, ranges, rng)
        sentences = [sentence for sentence, _, _ in quoted]
        offsets = tokenize(response, rng)
        alignment = align(sentences, response, offsets, prompt_length=PROMPT, labels=BEHAVIORS)
        check_invariants(sentences, response, offsets, alignment)
        spans = dict(zip(alignment.sentences, alignment.spans, strict=True))
        for i, (sentence, truth, kind) in enumerate(quoted):
            span = spans.get(i)
            if kind == "swapped":  # dropped where nothing says which occurrence it is, and never put elsewhere
                n_swapped += 1
                n_lost += span is None
                if span is None:
                    continue
            total[kind] += 1
            if span and (span.char_start, span.char_end) == truth:
                right[kind] += 1
                if seed < 5:
                    assert list(range(span.start, span.end)) == true_tokens(response, offsets, *truth)
            else:
                found = span and response[span.char_start : span.char_end]
                wrong.append((seed, i, kind, sentence.text, response[slice(*truth)], found))
    shares = {kind: right[kind] / total[kind] for kind in sorted(total)}
    assert sum(total.values()) > 5000
    assert sum(right.values()) / sum(total.values()) >= 0.995, (shares, wrong[:20])
    assert min(shares.values()) >= 0.95, (shares, wrong[:20])
    assert n_swapped >= 80
    assert n_lost <= n_swapped / 20


def test_each_edit_alone_is_mended_and_reported():
    text = '<think>First I add 3 and 4. Wait, that isn\'t the "right" table — let me look at it again. It is 12.'
    truth = 'Wait, that isn\'t the "right" table — let me look at it again.'
    for edited, similarity in [
        ('Wait,  that isn\'t the "right" table\n— let me look at it again.', 1),
        ('wait, that isn\'t the "right" table — Let me look at it again.', 1),
        ("Wait, that isn’t the “right” table - let me look at it again.", 1),
        ('Wait, that isn\'t the "rihgt" table — let me look at it agian.', 0.9),
        ("Wait, that isn't the table — let me look at it again.", 0.8),
        ('Vait, that isn\'t the "right" table — let me look at it again', 0.9),
    ]:
        alignment = placed(text, "First I add 3 and 4.", edited, "It is 12.")
        (repair,) = alignment.report.repaired
        assert (repair.index, repair.text, repair.found) == (1, edited, truth)
        assert similarity <= repair.similarity <= 1
        assert alignment.report.matched == 2
        assert alignment.report.placed == 1


# --- order, repeats, loss -------------------------------------------------------------------------


def placed(response: str, *texts: str, labels=BEHAVIORS):
    """Align with one token a character, all sentences labeled as deduction."""
    sentences = [Sentence("deduction", text) for text in texts]
    alignment = align(sentences, response, range(len(response)), prompt_length=PROMPT, labels=labels)
    check_invariants(sentences, response, range(len(response)), alignment)
    return alignment


def starts(alignment) -> list[int]:
    return [span.char_start for span in alignment.spans]


def test_repeats_go_to_successive_occurrences():
    assert starts(placed("Wait. No. Wait. No. Wait.", "Wait.", "No.", "Wait.", "No.", "Wait.")) == [
        0,
        6,
        10,
        16,
        20,
    ]


def test_a_repeat_is_placed_beside_its_neighbors():
    response = "Wait. The sum is 12. Wait. The product is 35. Wait. So it ends."
    assert starts(placed(response, "The product is 35.", "Wait.", "So it ends.")) == [27, 46, 52]
    assert starts(placed(response, "Wait.", "The product is 35.")) == [21, 27]


def test_a_chance_occurrence_far_ahead_does_not_carry_the_rest_away():
    response = "I add 3 and 4. Hold on a moment. That makes 7. Then I double it. Wait. So it is 14."
    alignment = placed(response, "I add 3 and 4.", "Wait.", "That makes 7.", "Then I double it.", "So it is 14.")
    assert starts(alignment) == [0, 33, 47, 71]
    (drop,) = alignment.report.dropped
    assert drop.index == 1
    assert drop.reason == (
        "no match at or after character 14 that keeps the order; "
        "the words at character 65 are out of order or another sentence's"
    )


def test_an_edited_sentence_is_found_before_a_chance_occurrence():
    response = "I add 3 and 4. Wait! That makes seven in all. Then I double it. Wait. So it is 14."
    alignment = placed(response, "I add 3 and 4.", "That makes sevn in all.", "Then I dobule it.", "So it is 14.")
    assert starts(alignment) == [0, 21, 46, 70]


def test_swapped_neighbors_are_both_placed_and_reported():
    response = "Node 3 leads to node 9. Perhaps that is a dead end. I go on."
    alignment = placed(response, "Perhaps that is a dead end.", "Node 3 leads to node 9.", "I go on.")
    assert starts(alignment) == [0, 24, 52]
    assert alignment.sentences == (1, 0, 2)
    assert alignment.report.moved == (1,)
    assert not alignment.report.dropped
    short = placed("Wait. No. I go on.", "No.", "Wait.", "I go on.")
    assert starts(short) == [0, 6, 10]
    assert len(short.report.moved) == 1


def test_a_moved_sentence_is_not_taken_for_a_lookalike():
    response = "I try the edge from 3 to 5. The sum of it all is twelve and no more. I try the edge from 3 to 7."
    alignment = placed(response, "I try the edge from 3 to 7.", "The sum of it all is twelve and no more.")
    assert starts(alignment) == [28, 69]
    assert alignment.sentences == (1, 0)
    assert alignment.report.moved == (0,)


def test_what_is_said_twice_is_placed_once_and_the_rest_is_reported():
    response = "I try the edge from 3 to 5. The sum is twelve and no more. I go on to the very end of it."
    parts = ["I try the edge from 3 to 5.", "The sum is twelve and no more.", "I go on to the very end of it."]
    for i, part in enumerate(parts):
        for at in range(4):
            alignment = placed(response, *parts[:at], part, *parts[at:])
            assert starts(alignment) == [0, 28, 59]
            (drop,) = alignment.report.dropped
            assert drop.text == parts[i]
            assert "another sentence's" in drop.reason
    lookalike = placed(response, parts[0], parts[0], parts[2])  # not the edge that the annotator left out
    assert starts(lookalike) == [0, 59]


def test_a_moved_and_edited_sentence_is_found():
    response = "I try the edge from node 3 to node 5 first. The sum of it all is twelve and no more. So I go on."
    alignment = placed(
        response, "The sum of it all is twelve and no more.", "I try an edge from node 3 to node 5 first."
    )
    assert starts(alignment) == [0, 44]
    assert alignment.report.moved
    assert len(alignment.report.repaired) == 1


def out_of_order(response: str, ranges: list[tuple[int, int]], rng: random.Random) -> list[Sentence]:
    """What a judge returns that moves a block of one to five sentences, or says it twice."""
    order = [response[a:b] for a, b in ranges]
    begin = rng.randrange(len(order) - 6)
    block = order[begin : begin + rng.randint(1, 5)]
    if rng.random() < 0.5:  # moved
        order = order[:begin] + order[begin + len(block) :]
    to = rng.randrange(len(order))
    order[to:to] = block
    return [Sentence("deduction", text) for text in order]


@pytest.mark.medium
def test_a_judge_that_repeats_and_moves_loses_nothing_that_is_there():
    """Blocks moved or said twice: every part keeps its place, up to short ones that stand anywhere."""
    n_parts, n_lost = 0, 0
    for seed in range(60):
        rng = random.Random(seed)
        response, ranges = compose(rng)
        sentences = out_of_order(response, ranges, rng)
        alignment = align(sentences, response, range(len(response)), prompt_length=PROMPT)
        check_invariants(sentences, response, range(len(response)), alignment)
        found = {(s.char_start, s.char_end) for s in alignment.spans}
        missing = [(a, b) not in found for a, b in ranges]
        n_parts, n_lost = n_parts + len(missing), n_lost + sum(missing)
        assert not any(all(missing[i : i + 3]) for i in range(len(missing) - 2)), seed
    assert n_parts > 1500
    assert n_lost <= 0.005 * n_parts, (n_lost, n_parts)


@pytest.mark.medium
def test_no_published_chain_loses_three_sections_in_a_row_to_such_a_judge(reference_folder):
    """Its real sections, as they stand in the response, moved or said twice."""
    n_chains, n_parts, n_lost = 0, 0, 0
    for path in sorted(reference_folder.glob("*_annotated_chains.jsonl")):
        for number, trace in enumerate(read_published(path)[0]):
            ranges = [(span.char_start, span.char_end) for span in trace.spans]
            if len(ranges) < 7:
                continue
            sentences = out_of_order(trace.response, ranges, random.Random(f"{path.name} {number}"))
            alignment = align(sentences, trace.response, range(len(trace.response)), prompt_length=PROMPT)
            found = {(s.char_start, s.char_end) for s in alignment.spans}
            missing = [place not in found for place in ranges]
            n_chains, n_parts, n_lost = n_chains + 1, n_parts + len(missing), n_lost + sum(missing)
            assert not any(all(missing[i : i + 3]) for i in range(len(missing) - 2)), (path.name, trace.id)
    assert n_chains > 350
    assert n_parts > 11_000
    assert n_lost <= 0.005 * n_parts, (n_lost, n_parts)


@pytest.mark.medium
def test_no_published_chain_loses_sections_whose_text_is_there(reference_folder):
    for path in sorted(reference_folder.glob("*_annotated_chains.jsonl")):
        traces, report = read_published(path)
        assert report.placed >= 0.999
        for trace, of_chain in zip(traces, report.alignments, strict=True):
            for drop in of_chain.dropped:  # another section has its words
                words = r"\s*".join(map(re.escape, drop.text.split()))
                for found in re.finditer(words, trace.response, re.IGNORECASE):
                    assert any(s.char_start < found.end() and found.start() < s.char_end for s in trace.spans)


def test_parts_of_a_sentence_and_missing_parts():
    response = "Maybe, since 3 is odd, it works. Let me test 5. It fails. I turn back. It ends here."
    alignment = placed(response, "Maybe,", "since 3 is odd,", "it works.", "I turn back.")
    assert starts(alignment) == [0, 7, 23, 58]
    assert alignment.report.matched == 4


def test_words_are_preferred_to_their_occurrence_inside_others():
    assert starts(placed("Nobody knows. Nothing helps. No way.", "No")) == [29]


def test_what_has_no_place_is_dropped_with_its_reason():
    response = "One and one is two. Two and two is four."
    sentences = [
        Sentence("end-section", "One and one is two."),
        Sentence("deduction", "One and one is two."),
        Sentence("deduction", " \n"),
        Sentence("deduction", "The moon is made of cheese, they say."),
        Sentence("backtracking", "Two and two is four."),
    ]
    alignment = align(sentences, response, range(len(response)), prompt_length=PROMPT, labels=BEHAVIORS)
    check_invariants(sentences, response, range(len(response)), alignment)
    reasons = {d.index: d.reason for d in alignment.report.dropped}
    assert reasons.keys() == {0, 2, 3}
    assert reasons[0] == f"label 'end-section' not in {', '.join(BEHAVIORS)}"
    assert reasons[2] == "empty text"
    assert reasons[3] == "no match at or after character 19 that keeps the order"
    assert alignment.report.placed == 2 / 5
    assert placed(response).report.placed == 1
    assert len(placed(response, "One and one is two.", labels=("backtracking",)).spans) == 0


# --- tokens ---------------------------------------------------------------------------------------


def test_a_token_belongs_if_it_shares_a_character():
    response = "So 12.\n Wait, no."
    offsets = [0, 2, 5, 7, 12, 13, 16]  # "So" " 12" ".\n" " Wait" "," " no" "."
    sentences = [Sentence("deduction", "So 12."), Sentence("backtracking", "Wait, no.")]
    first, second = align(sentences, response, offsets, prompt_length=PROMPT, labels=BEHAVIORS).spans
    assert first == Span("deduction", PROMPT, PROMPT + 3, 0, 6)
    assert second == Span("backtracking", PROMPT + 3, PROMPT + 7, 8, 17)
    assert second.onset == PROMPT + 2  # ".\n": its logits predict " Wait"


def test_bytes_of_one_character_stay_together():
    response = "So. ≠ no. ≠"
    offsets = [0, 2, 3, 4, 4, 4, 5, 8, 9, 10, 10, 10]  # " " and three bytes of "≠", twice
    sentences = [Sentence("deduction", "≠ no."), Sentence("deduction", "≠")]
    spans = align(sentences, response, offsets, prompt_length=PROMPT, labels=BEHAVIORS).spans
    assert [(s.start - PROMPT, s.end - PROMPT) for s in spans] == [(3, 8), (9, 12)]


def test_a_shared_token_belongs_to_the_first_span():
    response = "It is so.But no.A"
    offsets = [0, 2, 5, 8, 12, 15]  # "It" " is" " so" ".But" " no" ".A"
    sentences = [Sentence("deduction", text) for text in ("It is so.", "But no.", "A")]
    alignment = align(sentences, response, offsets, prompt_length=PROMPT, labels=BEHAVIORS)
    check_invariants(sentences, response, offsets, alignment)
    assert [(s.start - PROMPT, s.end - PROMPT) for s in alignment.spans] == [(0, 4), (4, 6)]
    (drop,) = alignment.report.dropped
    assert drop.reason == "characters 16 to 17 have no token that is not the span's before"


@pytest.mark.parametrize("offsets", [[0, 3, 2], [0, 9], [-1, 2]])
def test_offsets_that_cannot_be_are_refused(offsets):
    with pytest.raises(LensteerError, match="offsets go from"):
        align([], "So it is", offsets, prompt_length=0)


def test_a_negative_prompt_is_refused():
    with pytest.raises(LensteerError, match="prompt_length=-1"):
        align([], "", [], prompt_length=-1)


# --- any text -------------------------------------------------------------------------------------

texts = st.text(st.sampled_from("abAB.,’'ßİ \n≠"), max_size=60)
labels = st.sampled_from([*BEHAVIORS, "summarizing"])


def draw_offsets(data, response: str) -> list[int]:
    cuts = data.draw(st.lists(st.integers(0, max(len(response) - 1, 0)), max_size=40))
    return sorted([0, *cuts]) if response else []


@pytest.mark.medium
@settings(max_examples=300, deadline=None)
@given(data=st.data(), response=texts)
def test_any_annotation_is_accounted_for(data, response):
    sentences = data.draw(st.lists(st.builds(Sentence, labels, texts), max_size=8))
    offsets = draw_offsets(data, response)
    alignment = align(sentences, response, offsets, prompt_length=PROMPT, labels=BEHAVIORS)
    check_invariants(sentences, response, offsets, alignment)
    for span in alignment.spans:
        true = true_tokens(response, offsets, span.char_start, span.char_end)
        assert span.end == true[-1] + 1
        assert span.start >= true[0]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), parts=st.lists(texts.filter(str.strip), min_size=1, max_size=8))
def test_an_unedited_partition_is_placed_whole(data, parts):
    kept = data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)))
    response = " ".join(parts)
    sentences = [Sentence("deduction", part) for part, keep in zip(parts, kept, strict=True) if keep]
    alignment = align(sentences, response, range(len(response)), prompt_length=PROMPT, labels=BEHAVIORS)
    check_invariants(sentences, response, range(len(response)), alignment)
    assert not alignment.report.dropped
    if all(kept):
        assert not alignment.report.repaired
        ends = [len(" ".join(parts[: i + 1])) for i in range(len(parts))]
        true = [(e - len(p.lstrip()), e - len(p) + len(p.rstrip())) for e, p in zip(ends, parts, strict=True)]
        assert [(s.char_start, s.char_end) for s in alignment.spans] == true


# --- size, and the real thing ---------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("edit", ["none", "one", "every tenth", "the second half is missing", "every other is missing"])
@pytest.mark.parametrize("unit", [["Wait."], ["Wait, let me check that again."], ["Wait.", "No.", "Wait.", "Hmm, so."]])
def test_sentences_that_recur_are_placed_at_a_few_places_each(unit, edit, monkeypatch):
    """The places that are weighed are counted: all for every sentence would be the square of their number."""
    n, weighed = 1000, []
    chain = aligner._chain

    def counted(options, size):
        weighed.append(sum(len(own.start) for own in options))
        return chain(options, size)

    monkeypatch.setattr(aligner, "_chain", counted)
    parts = [unit[i % len(unit)] for i in range(n)]
    response = " ".join(parts)
    said = list(parts)
    for i in {"one": [500], "every tenth": range(0, n, 10)}.get(edit, []):
        said[i] = said[i].replace("W", "V").replace("No", "Nö")
    said = {"the second half is missing": said[: n // 2], "every other is missing": said[::2]}.get(edit, said)
    sentences = [Sentence("deduction", text) for text in said]
    before = time.process_time()
    found = align(sentences, response, range(len(response)), prompt_length=PROMPT)
    assert time.process_time() - before < 20  # it took minutes
    assert len(found.spans) >= 0.9 * len(said)
    if "missing" not in edit:
        assert sum(weighed) <= (20 if edit == "none" else 250) * n
    if edit == "none":
        ends = [*accumulate(len(part) + 1 for part in parts)]
        assert [(s.char_start, s.char_end) for s in found.spans] == [
            (end - 1 - len(part), end - 1) for end, part in zip(ends, parts, strict=True)
        ]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_places_that_are_left_out_are_in_no_best_chain(data):
    """Against the dynamic program over all places."""
    words = st.sampled_from(["a.", "b.", "ab.", "a b.", "aa."])
    response = " ".join(data.draw(st.lists(words, min_size=9, max_size=60)))
    said = data.draw(st.lists(words, max_size=40))
    page = aligner._Page(*aligner._letters(response), response)
    options = [aligner._Options.of(aligner._unedited(page, aligner._letters(text)[0], text)) for text in said]
    size = len(page.letters)
    assert aligner._best_chain(options, size) == aligner._chain(options, size)[0]


def test_rising_places_are_weighed_at_once_as_one_by_one(monkeypatch):
    rng = random.Random(0)
    for _ in range(100):
        size, options = 60, []
        for _ in range(rng.randint(1, 12)):
            starts = sorted(rng.sample(range(50), rng.randint(0, 20)))
            length = rng.randint(1, 5)
            options.append(
                aligner._Options.of(
                    aligner._Place(s, s + length, length + rng.choice([0, 0.5, 1]), 1.0) for s in starts
                )
            )
        together = aligner._chain(options, size)
        with monkeypatch.context() as patch:
            patch.setattr(aligner, "_NEAR", 10**6)
            assert aligner._chain(options, size) == together


def test_a_long_chain_is_not_quadratic():
    rng = random.Random(0)
    response, ranges = "", []
    while len(ranges) < 300:
        part, more = compose(rng)
        ranges += [(a + len(response), b + len(response)) for a, b in more]
        response += part + "\n"
    sentences = [sentence for sentence, _, _ in misquote(response, ranges[:300], rng)]
    start = time.process_time()
    alignment = align(sentences, response[: ranges[299][1]], [0], prompt_length=PROMPT, labels=BEHAVIORS)
    assert time.process_time() - start < 10  # .1 s; what is quadratic takes minutes
    assert len(alignment.spans) == 1  # the one token belongs to the first span
    assert len(alignment.report.dropped) == len(sentences) - 1


def test_published_annotations_are_placed(reference_folder):
    n_exact = n_placed = n_sentences = 0
    for line in (reference_folder / "r1_qwen_1.5b_annotated_chains.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        response = row["response"]
        parts = re.findall(r'\["(\S+?)"\](.*?)\["end-section"\]', row["annotated"], re.DOTALL)
        sentences = [Sentence(label, text) for label, text in parts if label in BEHAVIORS and text.strip()]
        alignment = align(sentences, response, range(len(response)), prompt_length=PROMPT, labels=BEHAVIORS)
        check_invariants(sentences, response, range(len(response)), alignment)
        n_sentences += len(sentences)
        n_exact += sum(sentence.text.strip() in response for sentence in sentences)
        n_placed += len(alignment.spans)
    assert n_sentences == 2739
    assert round(n_exact / n_sentences, 3) == 0.980  # what exact search finds, as published
    assert n_placed / n_sentences >= 0.998
