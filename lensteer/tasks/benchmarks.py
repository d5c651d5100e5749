r"""Public benchmarks as tasks: GSM8K, ARC-Challenge, CommonsenseQA and PIQA, from files or from the hub.

This module defines which published part of each is for choosing and which for reporting. `recognize` tells by its keys
which benchmark a record is of; that also knows MATH and MMLU. Their schemas:

- GSM8K (Cobbe et al., arXiv 2110.14168; on the hub openai/gsm8k, "main"): `question`, and `answer` with the steps and
  then "#### 18".
- ARC (Clark et al., arXiv 1803.05457; allenai/ai2_arc, "ARC-Challenge"): `id`, `question`, `choices` with lists `text`
  and `label` (letters or digits), `answerKey`. In the authors' files `question` holds `stem` and a list of `choices`.
- CommonsenseQA (Talmor et al., arXiv 1811.00937; tau/commonsense_qa): the same two forms. Test answers are hidden.
- PIQA (Bisk et al., arXiv 1911.11641; ybisk/piqa): `goal`, `sol1`, `sol2`, `label` 0 or 1. The authors keep the labels
  of `x.jsonl` in `x-labels.lst`. Test answers are hidden.
- MATH (Hendrycks et al., arXiv 2103.03874) and others of its form, such as MATH-500 and AIME: `problem`, and `answer`
  or a `solution` that ends in `\boxed{18}`.
- MMLU (Hendrycks et al., arXiv 2009.03300; cais/mmlu): `question`, `choices` as texts, `answer` as a number from 0 or a
  letter. In MMLU-Pro `options` instead of `choices`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from lensteer.errors import LensteerError
from lensteer.files import read_jsonl, read_text
from lensteer.tasks.grading import GRADERS, final_answer
from lensteer.tasks.values import Task

_HIDDEN = "a hidden answer cannot be graded, take the validation part"


@dataclass(frozen=True)
class Reading:
    """The content of one record; `steps` to the answer only if the benchmark publishes them."""

    prompt: str
    answer: str
    grader: str
    steps: str = ""


def read_gsm8k(values: Mapping[str, Any], where: str) -> Reading:
    """A record of GSM8K, without its calculator annotations "<<48/2=24>>".

    Raises:
        LensteerError: a record of another form; `where` identifies it.
    """
    question = _text(values, "question", where)
    steps, mark, answer = _text(values, "answer", where).rpartition("####")
    if not mark or not answer.strip():
        raise LensteerError(f"{where}: the answer has to end in '#### 18' or similar, it is {values['answer']!r:.200}")
    return Reading(question, answer.strip().replace(",", ""), "numeric", re.sub("<<.*?>>", "", steps).strip())


def read_choice(values: Mapping[str, Any], where: str) -> Reading:
    """A record of ARC or CommonsenseQA.

    Raises:
        LensteerError: a record of another form, or with a hidden answer; `where` identifies it.
    """
    nested = values.get("question")
    inner = nested if isinstance(nested, dict) else values
    stem = _text(inner, "question" if inner is values else "stem", where)
    choices = inner.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    texts, labels = (choices.get(key) if isinstance(choices, dict) else None for key in ("text", "label"))
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise LensteerError(f"{where}: choices need a text and a label each, they are {choices!r:.200}")
    key, named = str(values.get("answerKey") or ""), [str(label) for label in labels]
    if not key:
        raise LensteerError(f"{where} has no answerKey: {_HIDDEN}")
    if named.count(key) != 1:
        raise LensteerError(f"{where}: answerKey {key!r} has to be one of the labels, which are {named}")
    return Reading(_lettered(stem, texts, where), ascii_uppercase[named.index(key)], "choice")


def read_piqa(values: Mapping[str, Any], where: str) -> Reading:
    """A record of PIQA.

    Raises:
        LensteerError: a record of another form, or with a hidden answer; `where` identifies it.
    """
    label = str(values.get("label", ""))
    goal, solutions = _text(values, "goal", where), [_text(values, key, where) for key in ("sol1", "sol2")]
    if label in ("", "None", "-1"):
        raise LensteerError(f"{where} has no label, and there is no file of labels next to it: {_HIDDEN}")
    if label not in ("0", "1"):
        raise LensteerError(f"{where}: label {label!r} is neither 0 (sol1) nor 1 (sol2)")
    return Reading(_lettered(goal, solutions, where), "AB"[int(label)], "choice")


def read_math(values: Mapping[str, Any], where: str) -> Reading:
    r"""A record of MATH: the answer, or else what the solution puts into its last `\boxed{…}`.

    Raises:
        LensteerError: a record of another form; `where` identifies it.
    """
    problem, solution = _text(values, "problem", where), str(values.get("solution") or "")
    given = values.get("answer")
    answer = (final_answer(solution) or "" if given is None else str(given)).strip()
    if not answer:
        raise LensteerError(f"{where} has no answer, and its solution has no \\boxed{{…}}: {solution[-200:]!r}")
    return Reading(problem, answer, "numeric" if GRADERS["numeric"](answer, answer) else "exact", solution)


def read_mmlu(values: Mapping[str, Any], where: str) -> Reading:
    """A record of MMLU or MMLU-Pro.

    Raises:
        LensteerError: a record of another form; `where` identifies it.
    """
    question, answer = _text(values, "question", where), values.get("answer")
    options = values.get("options") if values.get("choices") is None else values.get("choices")
    prompt = _lettered(question, options if isinstance(options, list) else [], where)
    letters = ascii_uppercase[: len(options or [])]
    if isinstance(answer, int) and 0 <= answer < len(letters):
        answer = letters[answer]
    if not isinstance(answer, str) or answer.strip() not in [*letters]:
        raise LensteerError(f"{where}: answer {answer!r} has to be a letter of {letters}, or a number from 0")
    return Reading(prompt, answer.strip(), "choice")


def _lettered(question: str, options: list[Any], where: str) -> str:
    """A question with its options on separate lines, relabeled "(A)" and so on."""
    if not 2 <= len(options) <= len(ascii_uppercase) or not all(isinstance(o, str) and o.strip() for o in options):
        raise LensteerError(f"{where}: a question needs 2 to 26 options, each a text, it has {options!r:.200}")
    lines = (f"({letter}) {option.strip()}" for letter, option in zip(ascii_uppercase, options, strict=False))
    return "\n".join([question, *lines])


def _text(values: Mapping[str, Any], key: str, where: str) -> str:
    found = values.get(key)
    if not isinstance(found, str) or not found.strip():
        raise LensteerError(f"{where}: {key!r} has to be a text, it is {found!r:.80}; the record has {sorted(values)}")
    return found.strip()


@dataclass(frozen=True)
class Format:
    """The form of a benchmark's records: its name in ids, its title and keys for messages, how it is told and read."""

    name: str
    title: str
    keys: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], str], Reading]


def _labeled(values: Mapping[str, Any]) -> bool:
    """Whether a record has options with labels: in its `choices`, or within its `question`."""
    choices = values.get("choices")
    in_list = isinstance(choices, list) and any(isinstance(choice, dict) for choice in choices)
    return in_list or isinstance(choices, dict) or isinstance(values.get("question"), dict)


def _of_commonsense(values: Mapping[str, Any]) -> bool:
    question = values.get("question")
    return _labeled(values) and "question_concept" in {*values, *(question if isinstance(question, dict) else ())}


#: In the order in which a record is compared with them.
FORMATS = (
    Format("piqa", "PIQA", "goal, sol1, sol2, label", lambda v: {"goal", "sol1", "sol2"} <= set(v), read_piqa),
    Format(
        "math",
        "MATH",
        "problem, and answer or solution",
        lambda v: "problem" in v and ("answer" in v or "solution" in v),
        read_math,
    ),
    Format("commonsense_qa", "CommonsenseQA", "question, choices, answerKey", _of_commonsense, read_choice),
    Format("arc", "ARC", "question, choices, answerKey", _labeled, read_choice),
    Format(
        "mmlu",
        "MMLU",
        "question, choices or options, answer",
        lambda v: "question" in v and ("choices" in v or "options" in v),
        read_mmlu,
    ),
    Format(
        "gsm8k",
        "GSM8K",
        "question, answer ending in '#### 18'",
        lambda v: "question" in v and "####" in str(v.get("answer")),
        read_gsm8k,
    ),
)


def recognize(values: Mapping[str, Any]) -> Format | None:
    """The benchmark that a record is of, by its keys; None if by them it is of none."""
    return next((form for form in FORMATS if form.fits(values)), None)


#: The name of a benchmark's part in file names, to its name on the hub.
PARTS = {"train": "train", "test": "test", "tests": "test"}
PARTS |= dict.fromkeys(("dev", "val", "valid", "validation"), "validation")
_SUFFIXES = (".jsonl", ".json", ".parquet")
_SHARD = re.compile(r"-\d+-of-(\d+)$")


@dataclass(frozen=True)
class Solved:
    """A task, and the steps to its answer if the benchmark has them ("" otherwise)."""

    task: Task
    steps: str = ""


@dataclass(frozen=True)
class Row:
    """A record as read: its location (for messages), its part if known, and its number there."""

    where: str
    part: str | None
    number: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class _Form:
    """A benchmark's location, the published parts of our splits ("dev": the first that exists), and its schema."""

    hub: str
    config: str | None
    read: Callable[[Mapping[str, Any], str], Reading]
    dev: tuple[str, ...]
    test: str
    revision: str | None = None

    def parts(self, split: str) -> tuple[str, ...]:
        return self.dev if split == "dev" else (self.test,)


_FORMS = {
    "gsm8k": _Form("openai/gsm8k", "main", read_gsm8k, ("train",), "test"),
    "arc_challenge": _Form("allenai/ai2_arc", "ARC-Challenge", read_choice, ("validation", "train"), "test"),
    "commonsense_qa": _Form("tau/commonsense_qa", None, read_choice, ("train",), "validation"),
    # The main branch is a script, which `datasets` 4 and later does not run; this is the hub's converted branch.
    "piqa": _Form("ybisk/piqa", None, read_piqa, ("train",), "validation", "refs/convert/parquet"),
}


def load_benchmark(
    name: str, source: str | Path | None = None, *, split: str = "test", n: int | None = None, seed: int = 0
) -> list[Task]:
    """Tasks of a public benchmark.

    "test" is the published test part; for CommonsenseQA and PIQA, whose test answers are not published, it is the
    validation part, as is usual. "dev" is the published validation part if that is not "test", else the training part.
    In a single file (or a folder with one of these parts) a fixed fifth of the questions is "dev" and the rest is
    "test", whatever its name. So "dev" and "test" of one source never overlap, for any `n` or `seed`.

    A prompt is the question and its options, on separate lines as "(A) ..."; it does not request a format.

    Args:
        name: "gsm8k", "arc_challenge", "commonsense_qa" or "piqa".
        source: a file (.jsonl or .json with one record a line, .parquet), or a folder of files whose names say "train",
            "dev" or "test"; None for the hub, through the `datasets` library.
        split: "dev" for choosing, "test" for reporting.
        n: maximum number, drawn at random (the first 50 of 100 are the draw of 50); None for all, in their order.
        seed: of the draw.

    Raises:
        LensteerError: no such benchmark, split or file; a corrupt record; a hidden answer; no access to the hub.
    """
    if n is not None and n < 1:
        raise LensteerError(f"n={n}: ask for at least one task")
    tasks = [solved.task for solved in solved_tasks(name, source, split=split)]
    return tasks if n is None else random.Random(f"{name}-{seed}").sample(tasks, len(tasks))[:n]


def solved_tasks(name: str, source: str | Path | None = None, *, split: str = "test") -> list[Solved]:
    """All tasks of a split, as in `load_benchmark`, with the steps to their answers.

    Raises:
        LensteerError: as `load_benchmark`.
    """
    if name not in _FORMS:
        raise LensteerError(f"no benchmark {name!r}: choose one of {list(_FORMS)}")
    if split not in ("dev", "test"):
        raise LensteerError(f"no split {split!r} of a benchmark: choose 'dev' or 'test'")
    form = _FORMS[name]
    if source is None:
        return solved_rows(name, form.read, split, _from_hub(form, form.parts(split)[0]))
    files = _files(Path(source), {*form.dev, form.test})
    if len(files) == 1:
        [(part, paths)] = files.items()
        return _share(solved_rows(name, form.read, split, _from_files(paths, part)), split, str(source))
    part = next((part for part in form.parts(split) if part in files), None)
    if part is None:
        raise LensteerError(
            f"{str(source)!r} has no file for {split!r} of {name}: that is its {' or '.join(form.parts(split))} part, "
            f"and there is {' and '.join(map(str, files))}"
        )
    return solved_rows(name, form.read, split, _from_files(files[part], part))


def _share(solved: list[Solved], split: str, source: str) -> list[Solved]:
    """One split's share of a file: a question's side depends on the hash of its text, not on its place."""
    prompts = sorted({s.task.prompt for s in solved}, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if len(prompts) < 2:
        raise LensteerError(f"{source!r} has one question: 'dev' and 'test' need at least one each")
    dev = set(prompts[: max(1, len(prompts) // 5)])
    return [s for s in solved if (s.task.prompt in dev) == (split == "dev")]


def solved_rows(
    name: str, read_record: Callable[[Mapping[str, Any], str], Reading], split: str, rows: Iterable[Row]
) -> list[Solved]:
    """The tasks of records, all in one split. `name` begins their ids and is their category.

    Raises:
        LensteerError: a corrupt record, or two with one id.
    """
    found: dict[str, tuple[str, Solved]] = {}
    for row in rows:
        read = read_record(row.values, row.where)
        own = row.values.get("id")
        key = str(own) if own not in (None, "") else "-".join(filter(None, (row.part, f"{row.number:05d}")))
        values = dict(id=f"{name}-{key}", category=name, split=split)
        values |= dict(prompt=read.prompt, answer=read.answer, grader=read.grader)
        task = Task.from_dict(values, row.where)
        if task.id in found:
            raise LensteerError(f"{row.where} has the id {own!r} of {found[task.id][0]}: give every record its own")
        found[task.id] = (row.where, Solved(task, read.steps))
    return [solved for _, solved in found.values()]


def _files(source: Path, known: set[str]) -> dict[str | None, list[Path]]:
    """The files of each part; in a folder, only parts that splits are taken from."""
    if source.is_file():
        return {_part(source): [source]}
    if not source.is_dir():
        raise LensteerError(f"no file or folder {str(source)!r}: give one, or None for the hub")
    there = sorted(p for p in source.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    files: dict[str | None, list[Path]] = {}
    for path in there:
        part = _part(path)
        if part in known and "socratic" not in path.stem:  # GSM8K's variant of the same questions
            files.setdefault(part, []).append(path)
    if not files:
        raise LensteerError(
            f"{str(source)!r} holds {[p.name for p in there] or f'no {list(_SUFFIXES)}'}: give a file, or a folder of "
            f"files whose names say {' or '.join(sorted(known))}"
        )
    for part, paths in files.items():
        shards = [_SHARD.search(path.stem) for path in paths]
        if any((int(shard[1]) if shard else 1) != len(paths) for shard in shards):
            names = [path.name for path in paths]
            raise LensteerError(f"{str(source)!r} has as {part} part {names}: let there be one file, or all its shards")
    return files


def _part(path: Path) -> str | None:
    return next((PARTS[word] for word in re.findall("[a-z]+", path.stem.lower()) if word in PARTS), None)


def read_rows(path: Path) -> list[Row]:
    """The records of a file, .parquet or with one a line.

    Raises:
        LensteerError: no such file, or one that cannot be read.
    """
    return _from_files([path], _part(path))


def _from_files(paths: list[Path], part: str | None) -> list[Row]:
    rows = [row for path in paths for row in (_parquet(path) if path.suffix == ".parquet" else _jsonl(path))]
    return [Row(where, part, number, values) for number, (where, values) in enumerate(rows, 1)]


def _jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = [(f"{path}, line {number}", values) for number, values in read_jsonl(path)]
    beside = path.with_name(f"{path.stem}-labels.lst")
    if not beside.is_file():
        return rows
    labels = read_text(beside).split()
    if len(labels) != len(rows):
        raise LensteerError(f"{beside} has {len(labels)} labels for the {len(rows)} records of {path}: give one each")
    return [(where, {"label": label, **values}) for (where, values), label in zip(rows, labels, strict=True)]


def _parquet(path: Path) -> list[tuple[str, dict[str, Any]]]:
    import pandas as pd

    try:
        records = json.loads(pd.read_parquet(path).to_json(orient="records"))  # arrays within become lists
    except ImportError as error:
        raise LensteerError(f"{path}: parquet needs pyarrow: pip install pyarrow, or give a JSONL file") from error
    except (OSError, ValueError) as error:
        raise LensteerError(f"{path} is no parquet file that pandas can read ({error})") from error
    if not records:
        raise LensteerError(f"{path} is empty: give a file with at least one record")
    return [(f"{path}, row {number}", values) for number, values in enumerate(records, 1)]


def _from_hub(form: _Form, part: str) -> list[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise LensteerError(f"{form.hub} is on the hub: pip install datasets, or give a file as `source`") from error
    try:
        records = [dict(record) for record in load_dataset(form.hub, form.config, split=part, revision=form.revision)]
    except (OSError, RuntimeError, ValueError) as error:
        raise LensteerError(
            f"cannot load the {part} part of {form.hub} from the hub ({type(error).__name__}: {error}): "
            "give a file or folder as `source`"
        ) from error
    return [Row(f"{form.hub}, {part} row {i}", part, i, values) for i, values in enumerate(records, 1)]
