"""The rule that tells whether an answer reasons, and the choice of a cache edit by it."""

from __future__ import annotations

import pytest

import lensteer as ls
from lensteer.cache_steering import reasons, steps_of
from lensteer.evaluation import Modes, ModeSummary
from lensteer.pipeline.cache import chosen_edit, told
from lensteer.statistics import Estimate

REASONED = [
    "She sells 16 - 3 = 13 eggs. So she makes 13 * 2 = 26 dollars.\n#### 26",
    "To find the total, we need to follow these steps:\n\n1. Calculate the price.\n2. Add the tax.",
    "First, half of 12 is 6. Then 6 more makes 12 again. The answer is 12.",
    "\\[ 20 \\times 3 = 60 \\]\nTherefore, there are 60 of them.",
    "```python\nprice = 3 * 4\ntotal = price + 2\nprint(total)\n```",
    "If the first is red, the second is blue. Since the second is not blue, the first is not red.",
]
PLAIN = [
    "12",
    "The answer is 12.",
    "**12**<|im_end|>",
    "#### 12\n#### 12",
    "3 * 4 = 12",
    "The company pays its employees well.",
    "She makes 3 * 4 = 12 dollars. She makes 3 * 4 = 12 dollars. She makes 3 * 4 = 12 dollars.",
    "",
]


@pytest.mark.parametrize("text", REASONED)
def test_steps_are_reasoning(text):
    assert reasons(text)
    assert reasons(f"<think>\n{text}\n</think>")


@pytest.mark.parametrize("text", PLAIN)
def test_bare_answers_single_sums_and_loops_are_not(text):
    assert not reasons(text)
    assert len(steps_of(text)) < 2


def summary(name, right, reasoned, *, repetition=0.1, ends=1.0, kind="other"):
    def share(value):
        return Estimate(value, value, value)

    return ModeSummary(
        condition=name,
        kind=kind,
        thinks=share(0.0),
        accuracy=None if right is None else share(right),
        parsed=share(1.0),
        finished=share(ends),
        length=share(100.0),
        styles={},
        reasons=share(reasoned),
        repetition=share(repetition),
        changes={} if kind == "unsteered" else {"repetition": share(repetition - 0.1), "finished": share(ends - 1.0)},
    )


def modes(*others):
    return Modes((summary("unsteered", 0.1, 0.0, kind="unsteered"), *others), 40, 1)


def choice(*others, marks=False):
    return chosen_edit(modes(*others), {float(o.condition): o.condition for o in others}, marks=marks)


def test_the_edit_with_most_right_answers_is_chosen_and_ties_are_said():
    assert choice(summary("1", 0.2, 0.1), summary("2", 0.3, 0.1))[0] == 2
    best, why = choice(summary("1", 0.3, 0.5), summary("2", 0.3, 0.9), summary("4", 0.3, 0.9))
    assert best == 2
    assert "as 4 (the smallest is taken)" in why
    assert "1 with as many, but fewer that reason" in why
    assert choice(summary("-1", None, 0.5), summary("-4", None, 0.9))[0] == -4  # nothing to grade: those that reason


def test_a_dose_that_breaks_the_text_is_left_out():
    best, why = choice(summary("1", 0.2, 0.1), summary("8", 0.9, 0.9, repetition=0.4))
    assert (best, "broken text: 8" in why) == (1, True)
    with pytest.raises(ls.LensteerError, match=r"every coefficient breaks the text .*2: finished 0.40 for 1.00"):
        choice(summary("2", 0.9, 0.9, ends=0.4))


def test_a_condition_in_one_line():
    said = told(summary("8", 0.9, 0.85, repetition=0.4), marks=False)
    assert said == "8: reasons 85.0%, right 90.0%, 100 tokens, BROKEN TEXT: repetition 0.40 for 0.10"
    assert told(summary("8", None, 0.85)).startswith("8: thinks 0.0%, 100 tokens")
