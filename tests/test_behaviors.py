"""The labels, and spans that cannot be wrong by construction."""

from dataclasses import FrozenInstanceError

import pytest

from lensteer.behaviors import BEHAVIORS, STEERED, UNPARSED, Sentence, Span, check_behavior
from lensteer.errors import LensteerError


def test_labels_are_the_published_ones_in_their_order():
    assert BEHAVIORS == (
        "initializing",
        "deduction",
        "adding-knowledge",
        "example-testing",
        "uncertainty-estimation",
        "backtracking",
    )
    assert STEERED == ("adding-knowledge", "example-testing", "uncertainty-estimation", "backtracking")
    assert UNPARSED not in BEHAVIORS


def test_onset_is_the_token_that_predicts_the_first_of_the_span():
    ids = [7, 7, 7, 11, 12, 13, 7]
    span = Span("backtracking", start=3, end=6, char_start=0, char_end=9)
    assert ids[span.start : span.end] == [11, 12, 13]
    assert span.onset == 2
    assert ids[span.onset + 1] == ids[span.start]


def test_values_are_frozen_and_compare_by_content():
    span = Span("deduction", 1, 2, 0, 1)
    assert span == Span("deduction", 1, 2, 0, 1)
    assert len({span, Span("deduction", 1, 2, 0, 1)}) == 1
    with pytest.raises(FrozenInstanceError):
        span.start = 5  # type: ignore[misc]  # frozen: that is the test
    with pytest.raises(FrozenInstanceError):
        Sentence("deduction", "So.").text = "Hence."  # type: ignore[misc]  # frozen: that is the test


@pytest.mark.parametrize(
    ("start", "end", "char_start", "char_end", "repeated"),
    [
        (0, 2, 0, 5, r"tokens \[0, 2\)"),  # nothing before it, and an onset of -1 would index the last token
        (4, 4, 0, 5, r"tokens \[4, 4\)"),
        (4, 3, 0, 5, r"tokens \[4, 3\)"),
        (1, 2, -1, 5, r"characters \[-1, 5\)"),
        (1, 2, 5, 5, r"characters \[5, 5\)"),
    ],
)
def test_impossible_spans_are_refused_with_their_own_numbers(start, end, char_start, char_end, repeated):
    with pytest.raises(LensteerError, match=repeated):
        Span("backtracking", start, end, char_start, char_end)


def test_unknown_behavior_is_refused_with_the_names_that_would_be_right():
    assert all(check_behavior(label, BEHAVIORS) == label for label in BEHAVIORS)
    with pytest.raises(LensteerError, match=r"'summarizing'.*'initializing'.*'backtracking'"):
        check_behavior("summarizing", BEHAVIORS)
    with pytest.raises(LensteerError, match="choose one of 'adding-knowledge'"):
        check_behavior("deduction", STEERED)


def test_the_exception_for_users_is_a_value_error():
    assert issubclass(LensteerError, ValueError)
