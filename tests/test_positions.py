"""Scopes against a reading of the tokens one by one, and the promises that all of them keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lensteer as ls
from lensteer.positions import (
    Context,
    PositionScope,
    TokenTable,
    at,
    everywhere,
    first,
    generated,
    onsets,
    prompt,
    sentence_starts,
    thinking,
)

WORD, OPENS, CLOSES, END = range(4)
TABLE = TokenTable(*(torch.arange(4) == token for token in (OPENS, CLOSES, END)))
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


def single(ids, length) -> Context:
    return Context(torch.tensor([ids]), torch.tensor([0]), torch.tensor([length]), TABLE)


def slow(name: str, ids: list[int], length: int) -> list[bool]:
    """What each named scope means, token by token."""
    out, inside = [], False
    for p, token in enumerate(ids):
        inside = {OPENS: True, CLOSES: False}.get(token, inside)
        answer = p >= length
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


def test_the_last_tag_decides_about_thinking():
    # The template opened it, the model opens it again; one closing tag ends both.
    ids = [OPENS, OPENS, WORD, CLOSES, WORD, CLOSES, OPENS, WORD]
    assert thinking.mask(single(ids, 1))[0].tolist() == [True, True, True, False, False, False, True, True]


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
        (
            lambda: thinking.mask(
                Context(
                    torch.tensor([[0]]), torch.tensor([0]), torch.tensor([1]), TokenTable(*[torch.zeros(4).bool()] * 3)
                )
            ),
            "no single token '<think>'",
        ),
    ],
)
def test_impossible_scopes_are_refused(make, words):
    with pytest.raises(ls.LensteerError, match=words):
        make()
