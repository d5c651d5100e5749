"""The written task set: complete, disjoint, free of near-copies, and every definite answer checked a second time."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from fractions import Fraction
from itertools import takewhile
from pathlib import Path
from string import ascii_uppercase
from types import ModuleType

import pytest

from lensteer.tasks import CATEGORIES, Task, grade, load_tasks

SOLUTIONS = Path(__file__).parent / "solutions"
CARD = Path(__file__).parents[1] / "lensteer" / "data" / "README.md"
SIZES = {"train": 45, "dev": 5, "test": 5}
MAX_SHARED = 0.6


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return load_tasks("builtin")


def definite(tasks: list[Task]) -> list[Task]:
    return [task for task in tasks if task.grader is not None]


def solutions(category: str) -> ModuleType:
    path = SOLUTIONS / f"{category.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"solutions_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(prompt: str) -> str:
    """Letters only: two tasks that differ in case, digits or punctuation are the same."""
    return " ".join(re.findall(r"[^\W\d_]+", prompt.casefold()))


def shared(prompts: Iterable[str], size: int = 5) -> dict[tuple[int, int], float]:
    """For every pair with a word n-gram in common: how many they share, over what the one with fewer has."""
    grams = []
    where = defaultdict(list)
    for number, prompt in enumerate(prompts):
        words = re.findall(r"\w+", prompt.casefold())
        grams.append({tuple(words[i : i + size]) for i in range(len(words) - size + 1)})
        for gram in grams[-1]:
            where[gram].append(number)
    overlap = Counter(
        (first, second) for found in where.values() for i, first in enumerate(found) for second in found[i + 1 :]
    )
    return {pair: n / min(len(grams[pair[0]]), len(grams[pair[1]])) for pair, n in overlap.items()}


def options(prompt: str) -> list[str]:
    """The letters that a prompt offers, "(A)" and so on without a gap; other letters in it may be names."""
    listed = set(re.findall(r"(?<!\w)\(?([A-Z])\)", prompt))
    return list(takewhile(listed.__contains__, ascii_uppercase))


def breakage(prompt: str) -> list[str]:
    """What is wrong with a prompt as a text: LaTeX that an escape has eaten, open mathematics, stray characters."""
    found = [f"control character {c!r}" for c in prompt if not c.isprintable() and c != "\n"]
    found += [f"{sign!r} stands {prompt.count(sign)} times" for sign in ("$$", "**", "`") if prompt.count(sign) % 2]
    pairs = (("[", "]"), ("{", "}"), (r"\(", r"\)"), (r"\[", r"\]"))
    found += [
        f"{opening} without {closing}" for opening, closing in pairs if prompt.count(opening) != prompt.count(closing)
    ]
    outside = re.sub(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]", "", prompt, flags=re.DOTALL)
    found += [f"{command} outside of mathematics" for command in re.findall(r"\\[a-zA-Z]+", outside)]
    found += [f"replacement character in {prompt!r}"] if "\ufffd" in prompt else []
    found += ["blank space at an end, or twice"] if prompt != prompt.strip() or "  " in prompt else []
    return found


def test_ten_categories_of_45_5_and_5(tasks):
    counts = Counter((task.category, task.split) for task in tasks)
    assert counts == {(category, split): n for category in CATEGORIES for split, n in SIZES.items()}
    assert len(CATEGORIES) == 10


def test_every_category_stands_in_its_own_file():
    for category in CATEGORIES:
        assert {task.category for task in load_tasks("builtin", category=category)} == {category}


def test_ids_are_unique_and_begin_with_their_category(tasks):
    assert len({task.id for task in tasks}) == len(tasks)
    assert [task.id for task in tasks if not re.fullmatch(rf"{task.category}-\d{{3}}", task.id)] == []


def test_what_is_held_out_is_in_no_other_split(tasks):
    held_out = {normal(task.prompt) for task in tasks if task.split == "test"}
    seen = {normal(task.prompt) for task in tasks if task.split != "test"}
    assert held_out & seen == set()
    assert len(held_out) + len(seen) == len(tasks), "a prompt stands twice in one split"


def test_no_two_prompts_are_near_copies(tasks):
    pairs = shared(task.prompt for task in tasks)
    offenders = {(tasks[a].id, tasks[b].id): round(share, 2) for (a, b), share in pairs.items() if share > MAX_SHARED}
    assert offenders == {}


def test_near_copies_would_be_found():
    prompt = "Three boxes stand in a row. The red one is left of the blue one. Which box is in the middle?"
    copy = prompt.replace("Three", "Four").replace("Which", "What")
    pairs = shared([prompt, "Nothing of the kind is said in here, not even once.", copy])
    assert set(pairs) == {(0, 2)}
    assert pairs[0, 2] > MAX_SHARED
    assert shared([prompt, prompt])[0, 1] == 1
    assert normal("Of 12 Doors, how many?") == normal("of 13 doors how many")


def test_at_least_300_have_a_definite_answer(tasks):
    assert len(definite(tasks)) >= 300
    assert [task.id for task in tasks if (task.answer is None) != (task.grader is None)] == []


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_definite_answer_is_found_a_second_time(category):
    module = solutions(category)
    wanted = {task.id: task.answer for task in definite(load_tasks("builtin", category=category))}
    assert set(module.SOLUTIONS) | set(module.SECOND) == set(wanted)
    assert set(module.SOLUTIONS) & set(module.SECOND) == set()
    found = {name: solve() for name, solve in module.SOLUTIONS.items()}
    assert {name: answer for name, answer in found.items() if answer != wanted[name]} == {}
    assert [name for name, argument in module.SECOND.items() if len(argument.split()) < 10] == []


def test_every_answer_is_accepted_as_models_write_it(tasks):
    for task in definite(tasks):
        for response in ("Answer: {}", "<think>Hm.</think>So it is\n\\[\n\\boxed{{{}}}\n\\]", "**Answer:** {}."):
            assert grade(task, response.format(task.answer)) is True, (task.id, response)


def neighbors(task: Task, others: set[str]) -> set[str]:
    """Wrong answers that are close to the right one."""
    right = task.answer or ""
    if task.grader == "choice":
        return {letter for letter in "ABCDEFGH" if letter != right} | {f"not {right}", f"{right} or Z", "none of them"}
    if task.grader == "numeric":
        number = Fraction(right.rstrip("%").replace(",", ""))
        step = Fraction(1, 10 ** len(right.rstrip("%").partition(".")[2]))
        wrong = {number + step, number - step, number + 1, -number, number * 10, number / 10, number * 2}
        wrong |= {1 / number} if number else set()
        percent = "%" if right.endswith("%") else ""
        return {f"{n}{percent}" for n in wrong - {number}} | {f"at least {right}", f"{right} or {right}1", "unknown"}
    return {other for other in others if other.casefold() != right.casefold()} | {
        f"not {right}",
        f"{right} or nothing",
        f"{right}{right}",
        "unknown",
    }


@pytest.mark.medium
def test_wrong_neighbors_are_refused(tasks):
    texts = {task.answer for task in definite(tasks) if task.grader == "exact" and task.answer}
    for task in definite(tasks):
        wrong = neighbors(task, texts)
        assert len(wrong) > 4
        for answer in wrong:
            assert grade(task, f"Answer: {answer}") is False, (task.id, answer)


def test_prompts_are_of_a_readable_length_and_end(tasks):
    lengths = {task.id: len(task.prompt.split()) for task in tasks}
    assert {name: n for name, n in lengths.items() if not 15 <= n <= 200} == {}
    questions = {task.id: re.split(r"\(A\)", task.prompt)[0].strip() for task in tasks}  # options may come last
    assert [name for name, text in questions.items() if not re.search(r"[?.:][)\"”]?$", text)] == []


def test_prompts_are_clean_text(tasks):
    assert {task.id: found for task in tasks if (found := breakage(task.prompt))} == {}


@pytest.mark.parametrize(
    "prompt",
    [
        "What is 2 \times 3?",
        "What is \frac12?",
        "What is 2 \\times 3?",
        "What is {x?",
        "What is \\(x?",
        "What is **x?",
        "What  is x?",
        "What is x\ufffd?",
    ],
)
def test_broken_text_would_be_found(prompt):
    assert breakage(prompt)
    assert not breakage("In the set {1, 2}, what is $2 \\times 3$ (or \\(x\\)) if tea costs $3? Or is it $4.")


def test_a_choice_offers_its_answer_among_others(tasks):
    for task in definite(tasks):
        if task.grader == "choice":
            assert task.answer in options(task.prompt), task.id
            assert len(options(task.prompt)) >= 3, task.id


def test_the_letters_of_choices_are_spread(tasks):
    letters = Counter(task.answer for task in definite(tasks) if task.grader == "choice")
    assert max(letters.values()) <= 0.5 * sum(letters.values()), letters


def test_the_card_counts_what_is_there(tasks):
    card = CARD.read_text(encoding="utf-8")
    for category in CATEGORIES:
        ours = [task for task in tasks if task.category == category]
        module = solutions(category)
        graders = Counter(task.grader for task in ours)
        row = [*(graders[name] for name in ("numeric", "choice", "exact", None)), len(module.SOLUTIONS)]
        row += [len(module.SECOND)]
        assert f"| {category} | {' | '.join(map(str, row))} |" in card
