"""Contrastive pairs: the same solved examples with and without their steps, before the same question.

The solved questions (`Record`) come from the written set of the package, from a file, or from a public benchmark.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lensteer import models
from lensteer.arguments import checked, typed
from lensteer.errors import LensteerError
from lensteer.files import check_text, read_jsonl
from lensteer.tasks.benchmarks import read_gsm8k, solved_tasks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

NEIGHBORS = ("random", "tfidf", "embedding")


@dataclass(frozen=True)
class Record:
    """A solved question.

    Attributes:
        question: What is asked.
        steps: The reasoning, in one wording per style.
        answer: The answer, without the words around it.

    Raises:
        LensteerError: A lone surrogate in a text.
    """

    question: str
    steps: Mapping[str, str] = field(hash=False)
    answer: str

    def __post_init__(self) -> None:
        typed(self)
        for text in (self.question, self.answer, *self.steps, *self.steps.values()):
            check_text(text, "a record")


@dataclass(frozen=True)
class Pair:
    """Two prompts, including special tokens, that differ in their solved examples.

    Raises:
        LensteerError: A lone surrogate in one.
    """

    positive: str
    negative: str

    def __post_init__(self) -> None:
        typed(self)
        check_text(self.positive, "a pair's positive side")
        check_text(self.negative, "a pair's negative side")


@checked()
def contrastive_pairs(
    model: TransformerBridge,
    records: Sequence[Record],
    *,
    n: int = 100,
    shots: int = 5,
    style: str = "stepwise",
    against: str | None = None,
    ending: str = "The answer is {answer}.",
    join: str = " ",
    neighbors: str = "random",
    thinking: bool = False,
    system: str = "",
    seed: int = 0,
) -> list[Pair]:
    """Few-shot prompts with steps, paired with the same without steps or with steps of another style.

    A pair asks the same question after the same examples in the same order; a positive example's reply is its steps
    and its answer, a negative one's its answer alone. The reply to the question itself is in neither. The chat template
    is applied once to all messages.

    Args:
        model: Whose chat template and, for `neighbors="embedding"`, whose embedding is used.
        records: Solved questions; each pair takes one as its question and others as its examples.
        n: How many pairs; if there are fewer records, questions repeat with other examples.
        shots: Examples per prompt.
        style: Which wording of the steps.
        against: None for no steps at all, or another style: then the pair differs in the style alone.
        ending: The answer's wording.
        join: Separator between steps and ending.
        neighbors: Examples at random, or those nearest to the question by TF-IDF of its words or by the mean of the
            model's token embeddings.
        thinking: Whether the template opens `<think>`.
        system: The system prompt of both sides.
        seed: For all draws.

    Raises:
        LensteerError: Fewer records than a prompt needs, an impossible number, an unknown style or kind of neighbors,
            two sides that the chat template makes the same, or a template that takes no system prompt.
    """
    if n < 1 or shots < 1:
        raise LensteerError(f"n={n}, shots={shots}: ask for at least one pair and one example")
    if len(records) < shots + 1:
        raise LensteerError(f"{len(records)} records: {shots} shots and a question need at least {shots + 1}")
    if neighbors not in NEIGHBORS:
        raise LensteerError(f"no neighbors {neighbors!r}: choose one of {list(NEIGHBORS)}")
    for name in filter(None, (style, against)):
        lacking = next((r for r in records if name not in r.steps), None)
        if lacking is not None:
            raise LensteerError(
                f"no style {name!r} in the record {lacking.question[:60]!r}: it has {sorted(lacking.steps)}"
            )
    rng = random.Random(f"pairs-{seed}")
    near = None if neighbors == "random" else _nearest(model, records, neighbors)
    order: list[int] = []
    while len(order) < n:
        order += rng.sample(range(len(records)), len(records))
    pairs = []
    for target in order[:n]:
        if near is None:
            chosen = rng.sample([i for i in range(len(records)) if i != target], shots)
        else:
            chosen = near[target][:shots][::-1]  # the nearest is last, next to the question
        replies = [[_reply(records[i], side, ending, join) for i in chosen] for side in (style, against)]
        sides = [_prompt(model, records, chosen, target, wordings, system, thinking) for wordings in replies]
        if sides[0] == sides[1]:
            raise LensteerError(
                f"both sides of the pair that asks {records[target].question[:60]!r} are the same text: the chat "
                "template drops what the examples differ in (some drop earlier thoughts), or their steps are the same; "
                "give other records, or another template"
            )
        pairs.append(Pair(*sides))
    return pairs


def swapped(pairs: Sequence[Pair], *, seed: int = 0) -> list[Pair]:
    """A control: the same pairs with the two sides swapped in a random half of them."""
    flip = set(random.Random(f"swapped-{seed}").sample(range(len(pairs)), len(pairs) // 2))
    return [Pair(p.negative, p.positive) if i in flip else p for i, p in enumerate(pairs)]


def _reply(record: Record, style: str | None, ending: str, join: str) -> str:
    answer = ending.format(answer=record.answer)
    return answer if style is None else record.steps[style] + join + answer


def _prompt(
    model: TransformerBridge,
    records: Sequence[Record],
    examples: Sequence[int],
    target: int,
    replies: Sequence[str],
    system: str,
    thinking: bool,
) -> str:
    messages = []
    for i, reply in zip(examples, replies, strict=True):
        messages.append({"role": "user", "content": records[i].question})
        messages.append({"role": "assistant", "content": reply})
    messages.append({"role": "user", "content": records[target].question})
    return models.chat_text(model, messages, system=system, thinking=thinking)


def _nearest(model: TransformerBridge, records: Sequence[Record], kind: str) -> list[list[int]]:
    """For each record the others, nearest question first."""
    questions = [r.question for r in records]
    if kind == "tfidf":
        from sklearn.feature_extraction.text import TfidfVectorizer

        table = TfidfVectorizer().fit_transform(questions).toarray()
    else:
        embedding = model.W_E.detach()
        means = [embedding[models.encode(model, q)].float().mean(0) for q in questions]
        table = np.stack([m.cpu().numpy() for m in means])
        table = table - table.mean(0)
        table = table / np.linalg.norm(table, axis=1, keepdims=True).clip(1e-12)
    similarity = table @ table.T
    np.fill_diagonal(similarity, -np.inf)
    return [[int(j) for j in np.argsort(-row, kind="stable")[:-1]] for row in similarity]


_WRITTEN = Path(__file__).parent.parent / "data" / "records.jsonl"


def load_records(source: str | Path = "builtin") -> list[Record]:
    """Solved questions, in the order of their file.

    Args:
        source: "builtin" for the written set (100 questions, each solved in every style of `STYLES`), or a JSONL file
            with `question, steps, answer` on every line: steps a text, which counts as "stepwise", or a mapping from
            style to text; or GSM8K's own file, whose answers hold the steps. Other fields, such as an id, are ignored.

    Raises:
        LensteerError: no such file, an empty one, a line that is not a record, or a record without steps.
    """
    path = _WRITTEN if source == "builtin" else Path(source)
    return [_record(values, f"{path}, line {number}") for number, values in read_jsonl(path)]


def _record(values: Mapping[str, Any], where: str) -> Record:
    for name in ("question", "answer"):
        if not _is_text(values.get(name)):
            raise LensteerError(f"{where}: {name!r} is {values.get(name)!r}, give it as a text that is not empty")
    if "steps" not in values and "####" in values["answer"]:
        found = read_gsm8k(values, where)
        if not found.steps:
            raise LensteerError(f"{where} has no steps before its '####': a pair's sides would be the same")
        values = {"question": found.prompt, "steps": found.steps, "answer": found.answer}
    steps = values.get("steps")
    if isinstance(steps, str):
        steps = {"stepwise": steps}
    if not isinstance(steps, dict) or not steps or not all(map(_is_text, [*steps, *steps.values()])):
        raise LensteerError(f"{where}: 'steps' is {steps!r}, give a text, or a mapping from style to text")
    return Record(values["question"], steps, values["answer"])


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def benchmark_records(name: str, source: str | Path | None = None) -> list[Record]:
    """The solved questions of a benchmark's "dev" split, their published steps as style "stepwise".

    None of them is a "test" task. A record's question is its task's prompt: if a coefficient is chosen on dev tasks,
    leave those out of the pairs, `[r for r in records if r.question not in {t.prompt for t in tasks}]`.

    Args:
        name: "gsm8k", the one benchmark that publishes steps; its calculator annotations "<<...>>" are left out.
        source: as `load_benchmark` takes it.

    Raises:
        LensteerError: a record without steps, or what `load_benchmark` raises.
    """
    records = []
    for solved in solved_tasks(name, source, split="dev"):
        if not solved.steps or solved.task.answer is None:
            raise LensteerError(f"{solved.task.id} comes without steps: of the benchmarks, only 'gsm8k' publishes them")
        records.append(Record(solved.task.prompt, {"stepwise": solved.steps}, solved.task.answer))
    return records
