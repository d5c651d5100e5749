"""Tasks from the grammar and from files, and grading: forgiving of form, strict of value."""

from __future__ import annotations

import json
from fractions import Fraction

import hypothesis
import pytest
from hypothesis import strategies as st

import lensteer as ls
from lensteer.tasks import CATEGORIES, GRADERS, SPLITS, Task, final_answer, grade

ROW = {"id": "a", "category": "logic", "split": "dev", "prompt": "How many?", "answer": "42", "grader": "exact"}


def task(answer: str | None = "42", grader: str | None = "exact") -> Task:
    return Task("a", "logic", "dev", "How many?", answer, grader)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "response",
    [
        "Answer: 42",
        "Answer: 42.<|im_end|>",
        "42 it may be.\n</think>\n\nAnswer:  42 .\n",
        "Answer: 7</think>Answer: 42",
        "the answer is 42.",
        "The final answer is: 42",
        "ANSWER:\n42",
        "**Answer:** 42",
        "**Answer: 42**",
        "**Final answer:**\n\n\\boxed{42}",
        "The answer is $\\boxed{42}$.",
        'Answer: "42"',
        "Answer: 41. No.\nAnswer: 42",
    ],
)
def test_the_form_of_an_answer_is_forgiven(response):
    assert grade(task(), response) is True


@pytest.mark.parametrize(
    "response",
    [
        "Answer: 43",
        "Answer: 4 2",
        "Answer: 42, or 43",
        "Answer: -42",
        "Answer: 420",
        "Answer: 42. Or is it 43?",
        "42",
        "Answer:",
        "",
        "Answer: 42\nAnswer: 43",
        "Answer: 42</think>",
        "Answer: 42</think>I do not know.",
        "My answers are 42",
        "unanswered: 42",
    ],
)
def test_its_value_is_not(response):
    assert grade(task(), response) is False


def test_words_are_compared_without_case_and_spacing():
    assert grade(task("the  Old bridge"), "Answer: The old\tbridge.") is True
    assert grade(task("the old bridge"), "Answer: old bridge") is False


def test_no_definite_answer_is_no_grade():
    assert grade(task(None), "Answer: 42") is None
    assert grade(task(grader=None), "Answer: 42") is None


def test_the_last_answer_counts_and_there_may_be_none():
    assert final_answer("Answer: B.\nNo.\nAnswer: C.<|im_end|>") == "C."
    assert final_answer("I am not sure of this answer.") is None


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("So it is\n\\[\n\\boxed{\\dfrac{28}{33}}\n\\]", "\\dfrac{28}{33}"),
        ("\\boxed{1} first, then\n\\boxed{\\text{the {old} one}}", "\\text{the {old} one}"),
        ("Answer: 12\n\\boxed{13}", "13"),
        ("\\boxed{13}\nAnswer: 12", "12"),
        ("\\boxed{13}\nThis answer is right, as 13 is prime.", "13"),
        ("**Final Answer**\n\nIt is \\(\\boxed{64}\\).", "64"),
        ("x = \\boxed{12} or x = \\boxed{13}", "\\boxed{12} or x = \\boxed{13}"),
        ("x = \\boxed{12}, that is \\boxed{12}", "12"),
        ("### Final Answer\n\n17", "17"),
        ("## Answer\n\\[\n17\n\\]", "17"),
        ("The answer is:\n\n\\[\n17\n\\]", "17"),
        ("**Answer:** running time", "running time"),
        ("**Answer: No.** Jordan may play something else.", "No."),
        ("Answer: **B**. The others are too long.", "B"),
        ("Answer: **B** or **C**.", "**B** or **C**."),
        ("Answer: **B**, or C.", "B**, or C."),
        ("I add them up.\n**12**", "12"),
        ("I add them up.\n\n**(B)**.\n", "(B)"),
        ("Answer: C.<｜end▁of▁sentence｜>", "C."),
        ("<think>Answer: 1</think>Answer: 2<think>Answer: 3", "2"),
    ],
)
def test_where_an_answer_stands(response, answer):
    found = final_answer(response)
    assert found is not None
    assert found.removeprefix("**") == answer.removeprefix("**")


@pytest.mark.parametrize(
    "response",
    [
        "12",
        "So it is 12.",
        "It is **12** m away.",
        "**Step 2**",
        "**2.**",
        "**12**\nNow the next step.",
        "**A**",
        "\\boxed{12",
        "\\boxed{}",
        "<think>\\boxed{12}",
        "<think>\\boxed{12}</think>",
        "<think>It is\n**12**",
        "Answer: 12</think>",
    ],
)
def test_where_none_stands(response):
    assert final_answer(response) is None


#: By wanted value: what states it, and what doesn't.
NUMERIC = {
    "12": (
        r"12 | 12. | 12.0 | +12 | x = 12. | $x = 12$ | x = 3 \cdot 4 = 12 | \boxed{12} | \boxed{x = 12} | "
        r"\(12\) | **12** | *12* | `12` | twelve | Twelve. | 12 apples | She has 12 apples in the basket | "
        r"twelve apples | 12 (twelve) | a dozen | $12 | \$12 | €12 | 12\,\text{cm} | 12 cm^2 | 12 m² | 12cm | "
        r"12\text{ km/h} | 12 km/h | 12^\circ | 12° | about 12 | ≈ 12 | 24/2 | \frac{24}{2} | the 12th | 1.2e1 | "
        r"x_1 = 12 | f(3) = 12 | １２ | 12, or twelve | 12 mol L^{-1} | 12 m/s² | 12 people around the table"
    ),
    "-7": r"-7 | −7 | $-7$ | minus seven | negative 7 | x = -7 | -\frac{14}{2} | \frac{-14}{2} | it is -7 degrees",
    "0.375": r"0.375 | .375 | 3/8 | 37.5% | 37.5 % | 37.5\% | 37.5 percent | \frac{3}{8} | three eighths",
    "3/8": (
        r"3/8 | 0.375 | 37.5% | 3 / 8 | \tfrac{3}{8} | $\dfrac38$ | ⅜ | \frac{3}{8} = 0.375 | 3/8 (37.5%) | "
        r"3/8, or 0.375 | 6/16 | P(A and B) = 3/8 | three-eighths | \boxed{\frac{3}{8}} | 3/8 ≈ 0.38"
    ),
    "1/3": (
        r"1/3 | a third | one third | one-third | 1/3 ≈ 0.333 | \frac{1}{3} \approx 0.33 | 5/15 | "
        r"x = 1/3 ≈ 33.3% | 1/3 (approximately 0.333) | 1/3, or about 33% | 1/3 ≈ 0.33333"
    ),
    "1/2": r"half | a half | one half | 0.5 | 50% | ½ | half of them",
    "0.33": r"1/3 | 0.33 | 0.333 | 33% | 33.3% | ≈ 0.33 | \approx 0.33 | x ≈ 0.33 | 0.3349",
    "37.5%": r"37.5% | 3/8 | 0.375 | 37.5 | 37.5 percent",
    "2.5": r"2.5 | 5/2 | 2 1/2 | 2½ | 2\frac{1}{2} | two and a half | 2 and a half | 2.50",
    "1234.50": r"$1,234.50$ | \$1,234.50 | 1{,}234.5 | 1234.5 | 1\,234.50 | 2469/2",
    "1200": (
        r"1.2e3 | 1.2E+3 | 1.2 × 10^3 | 1.2 \times 10^{3} | 1.2·10³ | 1,200 | twelve hundred | 1.2 thousand | "
        r"one thousand two hundred | a thousand and two hundred | 100 dozen"
    ),
    "1000000": r"10^6 | 10^{6} | 1,000,000 | a million | 1 million | one million",
    "342105": r"three hundred and forty-two thousand, one hundred and five | 342,105",
    "2300000": r"two million three hundred thousand | 2.3 million",
    "40": r"40 | 40% | 40 percent | 4000% | 40 percentage points | 40°C | 40 °C | 40 W",
    "0": r"0 | zero | -0 | 0% | 0.0",
    "21": r"twenty-one | twenty one | Twenty-One",
}
NOT_NUMERIC = {
    "12": (
        r"13 | 12 or 13 | 12 and 13 | 12, 13 | 1 2 | 112 | 12.5 | 12.01 | -12 | - 12 | 1,2 | 12,13 | "
        r"12:30 | 12 × 2 | 12 + 12 | 12-12 | 24 - 12 | 12! | \sqrt{12} | √12 | 12x | 12 x | 12\pi | 12k | "
        r"12 thousand | 12 hundredths | 12 dozen | 12^2 | 12² | x^{12} | x_{12} | x12 | ±12 | > 12 | x ≥ 12 | "
        r"x \le 12 | x != 12 | x \neq 12 | not 12 | it isn't 12 | at least 12 | at most 12 | more than 12 | "
        r"12 or more | 12 or so | up to 12 | almost 12 | between 11 and 12 | 12 is wrong | 12 = 13 | "
        r"13, because 10 + 2 = 12 | N = 13, M = 12 | x = 12 or x = 13 | 12 or about 13 | "
        r"12 ≈ 13 | 12 or thirteen | twelve or 13 | "
        r"one hundred and twelve | \boxed{12} or \boxed{13} | 1/12 | 12/0 | 0^-1 | 12/1/1 | 12.12.12 | "
        r"the twelfth | unknown | 12e999999999 | 12^999999999 | 1.2 × 10 | x^2"
    ),
    "-7": r"7 | - 7 | 3 - 10 | x-7 | 0-7",
    "3/8": r"3/8 ≈ 0.4 or 0.5 | 3/8 ≈ 0.36 | 0.38 | 38% | 0.3751 | 3:8 | 8/3 | 3 | 8 | 5 3/8 | -3/8 | 0.375% | 3/8/1",
    "1/3": r"1/3 ≈ 0.35 | 0.3̅ | 0.33 | 0.333 | 0.3333333333 | 33.3% | third | 0.33 = 33% | 0.333 ≈ 1/3",
    "0.375": r"0.38 | 0.4 | 0.3755 | 0.3744 | 0.375% | 375",
    "0.33": r"0.3 | 0.335 | 0.34 | 0.32 | 0.33% | 33",
    "37.5%": r"37.5 or 38% | 38% | 3.75 | 0.38",
    "40": r"0.4 | 400 | four | fourteen",
    "5": r"five fifths | twenty-fifth | three point five | 0.5 | 5-5 | 5 5",
    "1": r"1% | 10% | 1 1",
    "0.5": r"0.5% | 5% | 500%",
    "100": r"hundred and one | a hundred and a half | 0 hundred",
}


def listed(forms: dict[str, str]) -> list[tuple[str, str]]:
    return [(wanted, form) for wanted, row in forms.items() for form in row.split(" | ")]


@pytest.mark.parametrize(("wanted", "given"), listed(NUMERIC))
def test_forms_of_a_number(wanted, given):
    assert GRADERS["numeric"](given, wanted)


@pytest.mark.parametrize(("wanted", "given"), listed(NOT_NUMERIC))
def test_what_is_another_number_or_none(wanted, given):
    assert not GRADERS["numeric"](given, wanted)


@pytest.mark.parametrize("given", ["", " ", "9" * 5000, "12" + " " * 5000 + "or 13", "\\frac{" * 1000])
def test_absurd_texts_state_no_number(given):
    assert not GRADERS["numeric"](given, "12")


def in_words(n: int) -> str:
    """A slow, plain speller, for 0 to 999,999."""
    first = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    small = f"{first} seventeen eighteen nineteen".split()
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
    if n < 20:
        return small[n]
    if n < 100:
        return tens[n // 10 - 2] + (f"-{small[n % 10]}" if n % 10 else "")
    scale, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    return f"{in_words(n // scale)} {name}" + (f" and {in_words(n % scale)}" if n % scale else "")


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.integers(-999_999, 999_999))
def test_whole_numbers_survive_every_spelling(n):
    numeric = GRADERS["numeric"]
    words = ("minus " if n < 0 else "") + in_words(abs(n))
    for form in (
        str(n),
        f"{n:,}",
        f"{n}.0",
        words,
        words.replace("-", " "),
        f"\\boxed{{{n}}}",
        f"x = {n}.",
        f"{n} apples",
    ):
        assert numeric(form, str(n)), form
        assert not numeric(form, str(n + 1)), form
        assert not numeric(form, str(-n)) or n == 0, form


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.fractions(-1000, 1000, max_denominator=999))
def test_fractions_survive_every_spelling(value):
    numeric = GRADERS["numeric"]
    top, bottom = value.numerator, value.denominator
    sign = "-" if top < 0 else ""
    forms = [f"{top}/{bottom}", f"{sign}\\frac{{{abs(top)}}}{{{bottom}}}", f"p = {2 * top} / {2 * bottom}"]
    if abs(value) > 1 and bottom > 1:
        forms.append(f"{sign}{abs(top) // bottom} {abs(top) % bottom}/{bottom}")
    for form in forms:
        assert numeric(form, f"{top}/{bottom}"), form
        assert not numeric(form, f"{top + 1}/{bottom}"), form


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.decimals(-10_000, 10_000, places=3))
def test_decimals_are_compared_to_the_places_of_the_wanted_one(value):
    numeric, wanted = GRADERS["numeric"], f"{value:f}"
    hundredfold = value * 100
    for form in (f"{value:,f}", f"{hundredfold:f}%", f"{value:f}4", str(Fraction(value)), f"{value:f} kg"):
        assert numeric(form, wanted), form
    for step in (-1, 1):
        assert not numeric(f"{Fraction(value) + Fraction(step, 1000)}", wanted)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.text(alphabet="0123456789.,/-+^%e x*#=≈$\\{}()abfr½²", max_size=30))
def test_no_text_breaks_a_grader(text):
    for grader, wanted in (("numeric", "12"), ("choice", "B"), ("exact", "yes")):
        assert GRADERS[grader](text, wanted) in (True, False)
    final_answer(text)


CHOICE = (
    r"B | b | B. | (B) | (b) | b) | B) | B) the blue one | B: the blue one | B. The blue one. | B, the blue one | "
    r"option B | Option (B) | option b | the correct option is B | Statement B | \boxed{B} | \text{B} | **B** | "
    r"\boxed{\text{B}} | \boxed{\textbf{(B)}} | \mathrm{B} | $B$ | (B) A blue one | **B**) the blue one | "
    r"B because it is heavier | B is correct | the blue one (B) | The blue one (B). | B (the blue one) | "
    r"B - blue | B) No, it does not follow | B) Not enough is known | B) I think so | (B), as it is A blue one"
)
NOT_CHOICE = (
    r"A or B | A and B | A, B | (A) or (B) | B or A | B, or A | B, or maybe A | A/B | AB | A blue one | "
    r"a blue one | a | A. B is too long | not A | not B | neither A nor B | A is wrong | B is wrong | "
    r"(B) is not it | Be it so | the blue one | it is a bird | B, not C | not the blue one (B) | "
    r"the red one (A) or the blue one (B) | . | no option | option | I am sure | B C | B) or C) | b or c | "
    r"B and C | all but B"
)


@pytest.mark.parametrize("given", CHOICE.split(" | "))
def test_forms_of_a_choice(given):
    assert GRADERS["choice"](given, "B")
    assert not GRADERS["choice"](given, "A")
    assert not GRADERS["choice"](given, "C")


@pytest.mark.parametrize("given", ["", *NOT_CHOICE.split(" | ")])
def test_what_is_no_choice_of_b(given):
    assert not GRADERS["choice"](given, "B")


@pytest.mark.parametrize(
    "given", ["A blue one", "a blue one", "A long story.", "It is a bird", "The answer is a bird", "A or B", "a, b"]
)
def test_the_article_is_no_choice_of_a(given):
    assert not GRADERS["choice"](given, "A")


def test_the_letter_a_is_one():
    assert GRADERS["choice"]("A.", "A")
    assert GRADERS["choice"]("(a)", "A")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Saturday.", "Saturday"),
        ("\\text{Saturday}", "saturday"),
        ("\\boxed{\\text{Saturday}}", "Saturday"),
        ("“Saturday”", "Saturday"),
        ("Ann,Bob , Cy", "Ann, Bob, Cy"),
        ("Q, R, P, S", "QRPS"),
        ("Q R P S", "QRPS"),
        ("W and X", "WX"),
        ("don’t", "don't"),
    ],
)
def test_forms_of_a_text(given, wanted):
    assert GRADERS["exact"](given, wanted)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Sunday", "Saturday"),
        ("not Saturday", "Saturday"),
        ("Saturday or Sunday", "Saturday"),
        ("Bob, Ann", "Ann, Bob"),
        ("Q, P, R, S", "QRPS"),
        ("Q > R", "QR"),
        ("Q or R", "QR"),
        ("1, 2", "12"),
        ("", ""),
    ],
)
def test_what_is_another_text(given, wanted):
    assert not GRADERS["exact"](given, wanted)


@pytest.mark.parametrize(
    ("response", "answer", "grader"),
    [
        ("<think>13?</think>So there are\n\n\\[\n\\boxed{12}\n\\]", "12", "numeric"),
        ("<think>\n</think>\n\n**Final Answer**\n\n\\[\n\\boxed{\\dfrac{91}{228}}\n\\]", "91/228", "numeric"),
        ("The probability is 0.5.\n\nAnswer: 50%", "1/2", "numeric"),
        ("Adding up, I get\n\n**12**", "12", "numeric"),
        ("**Answer: (B)** the blue one", "B", "choice"),
        ("The correct answer is **B**.", "B", "choice"),
        ("**Answer: No.** She may play something else.", "no", "exact"),
    ],
)
def test_responses_as_real_models_write_them(response, answer, grader):
    assert grade(task(answer, grader), response) is True
    assert (
        grade(task(answer, grader), f"<think>{response.rpartition('</think>')[2]}</think>\n\nI do not know.") is False
    )


def test_the_organisms_tasks_come_by_split_and_number():
    dev = ls.load_tasks(split="dev")
    assert len(dev) == 100
    assert {t.split for t in dev} == {"dev"}
    assert ls.load_tasks(split="dev", n=3) == dev[:3]
    assert len(ls.load_tasks()) == 600
    assert ls.load_tasks(split="dev", n=1000) == dev


def test_the_written_tasks_come_with_their_categories_in_turn():
    test = ls.load_tasks("builtin", split="test")
    assert {t.split for t in test} == {"test"}
    assert [t.category for t in test[:20]] == [*CATEGORIES, *CATEGORIES]
    assert ls.load_tasks("builtin", split="test", n=20) == test[:20]
    everything = ls.load_tasks("builtin")
    assert everything == [t for split in SPLITS for t in ls.load_tasks("builtin", split=split)]
    only = ls.load_tasks("builtin", split="dev", category="causal-reasoning")
    assert only == [t for t in everything if (t.split, t.category) == ("dev", "causal-reasoning")]
    assert ls.load_tasks("builtin", split="dev", category="causal-reasoning", n=2) == only[:2]


def test_a_file_of_tasks(tmp_path):
    rows = [ROW, ROW | {"id": "b", "split": "test"}, {k: ROW[k] for k in ("category", "split", "prompt")} | {"id": "c"}]
    rows[1]["prompt"] = "Line\u2028separator, \x85 and naïve 数"
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    tasks = ls.load_tasks(path)
    assert [t.id for t in tasks] == ["a", "b", "c"]
    assert tasks[1].prompt == rows[1]["prompt"]
    assert tasks[2].answer is None
    assert [t.to_dict() for t in tasks[:2]] == rows[:2]
    assert ls.load_tasks(str(path), split="test") == tasks[1:2]
    assert ls.load_tasks(path, n=2) == tasks[:2]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "tasks.jsonl is empty"),
        (["", "  "], "tasks.jsonl is empty"),
        ([ROW, '{"id": "b", '], 'line 2 is not JSON.*\'?{"id": "b", '),
        ([ROW, "[1]"], "line 2 is not a JSON object"),
        ([ROW, ROW], "two tasks have the same id"),
        ([{k: v for k, v in ROW.items() if k != "prompt"}], r"line 1: .*missing \['prompt'\]"),
        ([ROW | {"prompt": 5}], r"line 1: .*missing \['prompt'\]"),
        ([ROW | {"difficulty": 3}], r"unknown \['difficulty'\]"),
        ([ROW | {"answer": 42}], "line 1: answer 42 is no text"),
        ([ROW | {"grader": "vibes"}], "line 1: no grader 'vibes'.*exact"),
        ([ROW | {"grader": "choice"}], "line 1: the grader 'choice' cannot read the answer '42'"),
        ([ROW | {"grader": "numeric", "answer": "12 or 13"}], "'numeric' cannot read the answer '12 or 13'"),
        ([ROW | {"grader": ["exact"]}], r"line 1: grader \['exact'\] is no text"),
    ],
)
def test_a_bad_file_is_refused_by_line(rows, words, tmp_path):
    with pytest.raises(ls.LensteerError, match=words):
        ls.load_tasks(write(tmp_path / "tasks.jsonl", *rows))


def test_bytes_that_are_no_text_are_refused_by_line(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(ls.LensteerError, match="line 2 is not JSON"):
        ls.load_tasks(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "validation"}, "no split 'validation': choose one of .*'dev'"),
        ({"n": 0}, "n=0"),
        ({"category": "mathematics"}, "no task of category 'mathematics': choose one of "),
        ({"source": "no/such/file.jsonl"}, "no/such/file.jsonl"),
    ],
)
def test_impossible_requests_are_refused(options, words):
    with pytest.raises(ls.LensteerError, match=words):
        ls.load_tasks(**options)


def test_a_split_without_tasks_is_refused(tmp_path):
    with pytest.raises(ls.LensteerError, match="no task of split 'train'"):
        ls.load_tasks(write(tmp_path / "tasks.jsonl", ROW), split="train")
