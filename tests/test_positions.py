"""Scopes against a reading of the tokens one by one, and the promises that all of them keep."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lensteer as ls
from lensteer import models
from lensteer.annotation.splitting import split_sentences
from lensteer.models import chat
from lensteer.organism.grammar import FAMILIES, Latent, make_world, render, write_chain
from lensteer.positions import (
    STOPS,
    SURE_STOPS,
    Context,
    Mark,
    PositionScope,
    TokenTable,
    at,
    ends_sentence,
    everywhere,
    first,
    generated,
    onsets,
    prompt,
    sentence_starts,
    thinking,
)

WORD, OPENS, CLOSES, END = range(4)
IDS = torch.arange(4)
TEXTS = ("word", "<think>", "</think>", ".")
MARKS = (Mark.of("<think>", TEXTS), Mark.of("</think>", TEXTS))
TABLE = TokenTable(IDS == END, (), TEXTS, MARKS)
BASE = [everywhere, prompt, generated, thinking, sentence_starts, onsets, first(1), first(3), at([0]), at([2, 5, 40])]

scopes = st.recursive(
    st.sampled_from(BASE),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        inner.map(lambda scope: ~scope),
    ),
    max_leaves=4,
)
#: A row: its tokens, and how many of them are the prompt.
rows = st.lists(st.integers(0, 3), min_size=1, max_size=12).flatmap(
    lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids)))
)


def table_of(tokenizer) -> TokenTable:
    return chat._table(tokenizer, len(tokenizer), models.marks_of(tokenizer), "", torch.device("cpu"))


def single(ids, length) -> Context:
    return Context(torch.tensor([ids]), torch.tensor([0]), torch.tensor([length]), TABLE)


def slow(name: str, ids: list[int], length: int) -> list[bool]:
    """What each named scope means, token by token."""
    out, inside, done = [], False, False
    for p, token in enumerate(ids):
        answer = p >= length
        if answer:  # one thought, the first
            done |= inside and token == CLOSES
            inside = (inside or token == OPENS) and not done
        else:
            inside = {OPENS: True, CLOSES: False}.get(token, inside)
        out.append(
            {
                "everywhere": True,
                "prompt": not answer,
                "generated": answer,
                "thinking": inside,
                "sentence_starts": p == length or (answer and p > length and ids[p - 1] == END),
                "onsets": p == length - 1 or (answer and token == END),
                "first(1)": p == length,
                "first(3)": length <= p < length + 3,
                "at([0])": p == 0,
                "at([2, 5, 40])": p in (2, 5, 40),
            }[name]
        )
    return out


@pytest.mark.parametrize("scope", BASE, ids=lambda s: s.name)
@given(row=rows)
def test_each_scope_is_what_reading_token_by_token_gives(scope, row):
    assert scope.mask(single(*row))[0].tolist() == slow(scope.name, *row)


@given(scope=scopes, row=rows, data=st.data())
def test_a_scope_sees_no_future(scope, row, data):
    ids, length = row
    whole = scope.mask(single(ids, length))[0].tolist()
    cut = data.draw(st.integers(length, len(ids)))
    assert scope.mask(single(ids[:cut], length))[0].tolist() == whole[:cut]
    other = data.draw(st.lists(st.integers(0, 3), min_size=len(ids) - cut, max_size=len(ids) - cut))
    assert scope.mask(single(ids[:cut] + other, length))[0].tolist()[:cut] == whole[:cut]


@given(scope=scopes, batch=st.lists(rows, min_size=1, max_size=4), filler=st.integers(0, 3))
def test_padding_is_never_chosen_and_never_matters(scope, batch, filler):
    width = max(len(ids) for ids, _ in batch) + 2
    context = Context(
        torch.tensor([[filler] * (width - len(ids)) + ids for ids, _ in batch]),
        torch.tensor([width - len(ids) for ids, _ in batch]),
        torch.tensor([length for _, length in batch]),
        TABLE,
    )
    for mask, (ids, length) in zip(scope.mask(context), batch, strict=True):
        assert not mask[: width - len(ids)].any()
        assert mask[width - len(ids) :].tolist() == scope.mask(single(ids, length))[0].tolist()


@given(a=scopes, b=scopes, row=rows)
def test_scopes_compose_as_sets(a, b, row):
    context = single(*row)
    one, two = a.mask(context), b.mask(context)
    assert torch.equal((a & b).mask(context), one & two)
    assert torch.equal((a | b).mask(context), one | two)
    assert torch.equal((~a).mask(context), ~one)


def test_a_response_has_one_thought():
    # The template opened it, the model opens it again; one closing mark ends both, and what it opens later is text.
    ids = [OPENS, OPENS, WORD, CLOSES, WORD, CLOSES, OPENS, WORD]
    assert thinking.mask(single(ids, 1))[0].tolist() == [True, True, True, False, False, False, False, False]


def test_without_marks_the_response_is_the_thought():
    context = Context(torch.tensor([[0, 1, 2, 3]]), torch.tensor([0]), torch.tensor([2]), TokenTable(IDS == END))
    assert thinking.mask(context)[0].tolist() == [False, False, True, True]


PIECES = ("<", "thi", "nk", ">", "</", "think>\n", ".</", "word", "<think>\n", "[asst]", "nk>The")
SPLIT = TokenTable(
    torch.zeros(len(PIECES), dtype=torch.bool),
    (),
    PIECES,
    (Mark.of("<think>", PIECES), Mark.of("</think>", PIECES)),
    "[asst]",
)


@pytest.mark.parametrize(
    ("pieces", "length", "inside"),
    [
        # Tokens that only together are a mark; it is known at the last of them.
        ("word|<|thi|nk|>|word|</|think>\n|word", 1, "000011100"),
        ("word|<|thi|nk>The|word|.</|think>\n|word", 1, "0001110 0"),
        ("word|<think>\n|word|</|thi|nk|>|word", 1, "011111 00"),
        # Not a mark: something stands between.
        ("word|<|word|thi|nk|>|word", 1, "0000000"),
        # The user's mark, then the template's header: somebody's words.
        ("word|<think>\n|word|[asst]|word|word", 4, "000000"),
        ("word|</|think>\n|[asst]|<think>\n|word|word", 5, "0000111"),
        ("<think>\n|word|[asst]|<think>\n|</|think>\n|word", 6, "0001100"),
        # Opened by a prefill, after the header.
        ("word|[asst]|<think>\n|word|word|word", 4, "001111"),
    ],
)
def test_marks_of_several_tokens_and_of_messages(pieces, length, inside):
    ids = [PIECES.index(piece) for piece in pieces.split("|")]
    for pad in (0, 3):  # padding in front holds a piece of a mark
        context = Context(torch.tensor([[8] * pad + ids]), torch.tensor([pad]), torch.tensor([length]), SPLIT)
        found = thinking.mask(context)[0].tolist()
        assert found == [False] * pad + [c == "1" for c in inside.replace(" ", "")]
        for cut in range(1, length):  # a pass may end within the prompt
            assert len(thinking.mask(replace(context, ids=context.ids[:, : pad + cut]))[0]) == pad + cut
        for cut in range(length, len(ids)):  # what comes later does not matter
            part = replace(context, ids=context.ids[:, : pad + cut])
            assert thinking.mask(part)[0].tolist() == found[: pad + cut]


def test_names_say_what_is_chosen_and_decide_equality():
    scope = thinking & ~first(3)
    assert scope.name == "(thinking & ~first(3))"
    assert scope == thinking & ~first(3)
    assert hash(scope) == hash(thinking & ~first(3))
    assert scope != thinking | ~first(3)
    assert at([3, 1, 3]) == at([1, 3])
    assert PositionScope("prompt", lambda c: c.ids > 0) != "prompt"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: first(0), r"first\(0\)"),
        (lambda: first(-2), r"first\(-2\)"),
        (lambda: at([]), r"at\(\[\]\)"),
        (lambda: at([3, -1]), r"at\(\[-1, 3\]\)"),
    ],
)
def test_impossible_scopes_are_refused(make, words):
    with pytest.raises(ls.LensteerError, match=words):
        make()


# --- one rule about where sentences end --------------------------------------------------------------

TOKENIZERS = ("organism", "tiny", "smollm2", "qwen2.5-0.5b", pytest.param("gemma3-270m", marks=pytest.mark.medium))


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request, grammar_tokenizer, tiny_checkpoint):
    from transformers import AutoTokenizer

    if request.param == "organism":
        return grammar_tokenizer
    if request.param == "tiny":
        return AutoTokenizer.from_pretrained(tiny_checkpoint())
    folder = Path(os.environ.get("LENSTEER_REAL", "none")) / request.param
    if not folder.is_dir():
        pytest.skip(f"LENSTEER_REAL has no model {request.param!r}")
    return AutoTokenizer.from_pretrained(folder)


def ends_of(tokenizer, text: str, prompt: str = "") -> list[int]:
    """Where in a text the tokens stop that end a sentence for the scopes, as characters."""
    ids = [tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, text)]
    table = table_of(tokenizer)
    context = Context(torch.tensor([[*ids[0], *ids[1]]]), torch.tensor([0]), torch.tensor([len(ids[0])]), table)
    decoded, starts = models.decode_offsets(tokenizer, ids[1])
    assert decoded == text
    return [[*starts, len(text)][i + 1] for i in context.ends()[0, len(ids[0]) :].nonzero()[:, 0].tolist()]


@pytest.mark.medium
def test_a_character_that_ends_a_sentence_does_for_the_splitter_and_for_the_scopes(tokenizer):
    for stop in STOPS + SURE_STOPS:
        text = f"We go on{stop} Then we stop"
        assert split_sentences(text) == [(0, 9), (10, 22)]
        assert ends_of(tokenizer, text, prompt="Is it so? ") == [9]


def test_any_other_character_does_for_neither(tokenizer):
    for sign in ",;:、，；：،·-–—(»¿¡'":
        text = f"We go on{sign} Then we stop"
        assert split_sentences(text) == [(0, len(text))]
        assert ends_of(tokenizer, text) == []


@pytest.mark.parametrize(
    "sentences",
    [
        ["我们看看。", "是吗？", "是的！", "好"],
        ["他说：「走吧。」", "然后停。", "完"],
        ["यह सही है।", "क्या यह सही है?", "हाँ॥"],
        ["هل هذا صحيح؟", "نعم، هذا صحيح۔", "تم"],
        ["計算する｡", "次に進む．", "では３．１４を使う。", "終"],
        ["Wait。", "So it is！", "Then on"],
        ["Hmm…", "So it is.", "Then on"],
    ],
)
@pytest.mark.parametrize("between", ["", " ", "\n\n"], ids=["touching", "blank", "blank line"])
def test_sentences_of_other_scripts_have_their_onsets(sentences, between, tokenizer):
    if between == "" and any(s[-1] in STOPS for s in sentences):
        between = " "  # these need one
    text = between.join(sentences)
    pieces = [text[a:b] for a, b in split_sentences(text)]
    assert pieces == sentences
    ends = ends_of(tokenizer, text)
    at = 0
    for sentence in sentences[:-1]:  # its last token, which may hold the blank after it, and a quote before
        at = text.index(sentence, at) + len(sentence)
        assert any(at - sentence.endswith("」") <= end <= at + len(between) for end in ends)


def test_a_stop_of_several_tokens_ends_a_sentence_with_the_last_and_nothing_in_padding():
    none = torch.zeros(6, dtype=torch.bool)
    table = TokenTable(none, ((1, 2, 3), (4, 3)))
    rows = [[1, 2, 3, 4, 3, 1, 3, 2, 3], [0, 1, 2, 3, 3, 4, 3, 3, 3]]
    context = Context(torch.tensor(rows), torch.tensor([1, 0]), torch.tensor([0, 0]), table)
    assert context.ends().nonzero().tolist() == [[0, 4], [1, 3], [1, 6]]
    late = Context(torch.tensor(rows), torch.tensor([1, 0]), torch.tensor([4, 4]), table)
    assert late.ends().nonzero().tolist() == [[1, 6]]


def old_rule(text: str) -> bool:
    """What ended a sentence before other scripts did."""
    return (bool(text.strip()) and text.strip()[-1] in ".?!") or "\n" in text


@given(st.text(st.characters(max_codepoint=0x2000), max_size=6))
def test_english_tokens_end_sentences_as_they_always_did(text):
    if not set(text) & set(SURE_STOPS):
        assert ends_sentence(text) == old_rule(text)


def test_the_organisms_masks_are_what_they_were(grammar_tokenizer):
    table = table_of(grammar_tokenizer)
    texts = grammar_tokenizer.batch_decode([[i] for i in range(len(grammar_tokenizer))])
    assert table.ends_sentence.tolist() == [old_rule(text) for text in texts]
    rng = random.Random(0)
    for i in range(50):
        world = make_world(rng, FAMILIES[i % 2], 1 + i // 2 % 3)
        ids = grammar_tokenizer(render(write_chain(rng, world, Latent.draw(rng)), world.answer)).input_ids
        context = Context(torch.tensor([ids]), torch.tensor([0]), torch.tensor([0]), table)
        assert context.ends()[0].tolist() == [old_rule(texts[i]) for i in ids]


@pytest.mark.medium
def test_the_published_chains_masks_change_in_chinese_only(tokenizer, reference_folder):
    table = table_of(tokenizer)
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    before = torch.tensor([old_rule(text) for text in texts])
    n, changed = 0, 0
    for path in sorted(reference_folder.glob("*_annotated_chains.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            response = json.loads(line)["response"]
            ids = torch.tensor(tokenizer(response, add_special_tokens=False).input_ids)
            ends = Context(ids[None], torch.tensor([0]), torch.tensor([0]), table).ends()[0]
            n, other = n + len(ids), (ends != before[ids]).nonzero()[:, 0].tolist()
            changed += len(other)
            for p in other:
                assert set(tokenizer.decode(ids[max(0, p - 2) : p + 1])) & set("。？")
    assert n > 400_000
    assert changed <= 11
