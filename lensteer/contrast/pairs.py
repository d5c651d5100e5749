"""Contrastive pairs: two texts that differ in a concept, from files and lists of several formats.

plain: objects with `positive` and `negative`, each a prompt, or an object with `prompt`, `completion`, `system`, `raw`.
    Keys that both sides share may be given next to them; with a shared `prompt`, strings are completions. `label` (or
    `concept`) names the concept. Read in the mean over the completions, or at the last prompt token if there are none.
caa: `question`, `answer_matching_behavior` and `answer_not_matching_behavior`, "(A)" and "(B)", as in Rimsky et al.
    (arXiv 2312.06681, github.com/nrimsky/CAA) and Anthropic's model-written evaluations. Read at the answer's letter.
persona: one object with `instruction`, a list of system prompts `pos` and `neg`, and `questions`; as in Chen et al.
    (arXiv 2507.21509, github.com/safety-research/persona_vectors). Read at the last prompt token, or, as they do, in
    the mean over the answers once the model has written them (`complete_pairs`). Their code also begins each system
    prompt with "You are a(n) … assistant."; nothing is prepended here.
repeng: a list of `DatasetEntry(positive, negative)` (github.com/vgel/repeng), or the same in JSON: texts that already
    contain their template. Read at the last token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lensteer.arguments import checked, typed
from lensteer.errors import LensteerError
from lensteer.files import check_text, parse_json, read_jsonl, read_text

#: The concept's default name.
LABEL = "contrast"


@dataclass(frozen=True)
class Text:
    """One side of a pair.

    Attributes:
        prompt: what the user says, for the model's chat template; or, if `raw`, the text as it is.
        completion: the answer; its tokens follow the prompt's and are encoded separately.
        system: the system prompt.
        raw: whether `prompt` already holds its template and special tokens, or is for a model without a template.
        completion_ids: the completion's tokens if a model generated it; they are used instead of encoding it again.

    Raises:
        LensteerError: an empty prompt, a raw one with a system prompt, or a lone surrogate in a text.
    """

    prompt: str
    completion: str = ""
    system: str = ""
    raw: bool = False
    completion_ids: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        typed(self)
        for name in ("prompt", "completion", "system"):
            check_text(getattr(self, name), name)
        if not self.prompt.strip():
            raise LensteerError(
                f"an empty prompt (completion {self.completion[:60]!r}): give a text, because an answer is read "
                "after one"
            )
        if self.raw and self.system:
            raise LensteerError(
                f"a raw text with the system prompt {self.system[:60]!r}: write it into the text, or leave out raw=True"
            )

    @property
    def answered(self) -> bool:
        """Whether there is a completion."""
        return bool(self.completion.strip())


@dataclass(frozen=True)
class Pair:
    """Two texts that differ in a concept.

    Attributes:
        positive: the side that shows it.
        negative: the side that does not, or shows its opposite.
        label: the concept's name.
        position: where this kind of pair is read (see `Position.parse`); None: in the mean over the completions, or at
            the last prompt token if there are none.

    Raises:
        LensteerError: two sides that are the same, a blank name, or one with a lone surrogate.
    """

    positive: Text
    negative: Text
    label: str = LABEL
    position: str | int | None = None

    def __post_init__(self) -> None:
        typed(self)
        check_text(self.label, "the label of a pair")
        if not self.label.strip():
            raise LensteerError(f"label {self.label!r}: give the concept a name, such as 'politeness'")
        if self.positive == self.negative:
            said = self.positive.completion or self.positive.prompt
            raise LensteerError(
                f"both sides of a pair of {self.label!r} are the same, {said[:60]!r}: give two that differ"
            )


def with_system(pairs: Sequence[Pair], system: str) -> list[Pair]:
    """The pairs with a system prompt for each text that has none. Raw texts, which hold theirs, stay as they are."""

    def filled(text: Text) -> Text:
        return text if text.raw or text.system else replace(text, system=system)

    return [replace(pair, positive=filled(pair.positive), negative=filled(pair.negative)) for pair in pairs]


@checked()
def pair_up(
    positive: Sequence[Text | str],
    negative: Sequence[Text | str],
    *,
    label: str = LABEL,
    raw: bool = False,
    position: str | int | None = None,
) -> list[Pair]:
    """Pairs from two lists, each side's texts in the same order.

    Args:
        positive: texts, or strings, which are prompts.
        negative: the same number.
        label: the concept's name.
        raw: whether strings are taken as they are, without the chat template.
        position: where to read; see `Pair`.

    Raises:
        LensteerError: unequal numbers, an empty side, or a pair whose sides are the same (names it).
    """
    if len(positive) != len(negative):
        raise LensteerError(
            f"{len(positive)} positive and {len(negative)} negative texts: a pair has one of each, in the same order"
        )
    if not positive:
        raise LensteerError("no pairs: both lists are empty")
    pairs = []
    for number, sides in enumerate(zip(positive, negative, strict=True)):
        try:
            own, other = (Text(side, raw=raw) if isinstance(side, str) else side for side in sides)
            pairs.append(Pair(own, other, label, position))
        except LensteerError as error:
            raise LensteerError(f"pair {number}: {error}") from error
    return pairs


_WRITTEN = {"politeness": Path(__file__).parent.parent / "data" / "politeness.jsonl"}
#: File names that do not identify the concept; the folder's name is used instead.
_NAMELESS = ("generate_dataset", "test_dataset_ab", "test_dataset_open_ended", "pairs", "dataset")
_SIDE = ("prompt", "completion", "system", "raw")
_CAA = ("question", "answer_matching_behavior", "answer_not_matching_behavior")


@checked()
def load_pairs(
    source: str | Path | Sequence[Any],
    format: str | None = None,
    *,
    label: str | None = None,
    raw: bool | None = None,
) -> list[Pair]:
    """Pairs from a file or a list, in its order.

    Formats: "plain" JSONL, CAA's A/B questions ("caa"), a persona trait ("persona"), a list as repeng's ("repeng"); the
    module's docstring says what each holds. Every kind may be JSON, or JSONL with one object per line.

    Args:
        source: a file; a list of objects or mappings with `positive` and `negative`; or "politeness", 40 written pairs
            of a polite and a curt answer to the same request.
        format: one of `FORMATS`; by default detected from the first entry.
        label: the concept's name if an entry has none; by default the file's name, or its folder's if the file's is
            generic.
        raw: whether prompts already contain their template; by default only repeng's do.

    Raises:
        LensteerError: no such file, an empty one, one of no known format or encoding, an entry that lacks a key or
            holds an empty or two equal sides or a lone surrogate (names the line).
    """
    if format is not None and format not in FORMATS:
        raise LensteerError(f"unknown format {format!r}: choose one of {', '.join(map(repr, FORMATS))}")
    if isinstance(source, (str, Path)):
        path = _WRITTEN.get(str(source), Path(source))
        kind, entries = _entries(path)
        name = path.parent.name if path.stem in _NAMELESS else path.stem
    else:
        kind, entries, name = "list", [(f"entry {i}", entry) for i, entry in enumerate(source)], LABEL
    if not entries:
        where = f"{source} is" if isinstance(source, (str, Path)) else "the list is"
        raise LensteerError(f"no pairs: {where} empty")
    read = FORMATS[format or _recognized(*entries[0], kind)]
    pairs: list[Pair] = []
    for where, entry in entries:
        try:
            pairs += read(entry, label or name, raw)
        except LensteerError as error:
            raise LensteerError(f"{where}: {error}") from error
    return pairs


def _entries(path: Path) -> tuple[str, list[tuple[str, Any]]]:
    """Whether a file is "lines", a "list" or one "object", and its entries, each with its name in errors."""
    if not path.is_file():
        raise LensteerError(
            f"no file {str(path)!r}: give a file of pairs, or one of the written sets {', '.join(map(repr, _WRITTEN))}"
        )
    content = read_text(path)
    try:
        whole = parse_json(content, path)
    except LensteerError:
        raise
    except ValueError:  # JSONL, or unreadable, which the reader of lines reports
        return "lines", [(f"{path}, line {number}", values) for number, values in read_jsonl(path)]
    if isinstance(whole, list):
        return "list", [(f"{path}, entry {i}", entry) for i, entry in enumerate(whole)]
    return "object", [(str(path) if "\n" in content.strip() else f"{path}, line 1", whole)]


def _recognized(where: str, entry: Any, kind: str) -> str:
    """The format of a first entry."""
    keys = _keys(entry)
    if {"instruction", "questions"} & keys and kind == "object":
        return "persona"
    if {"question", *_CAA[1:]} & keys:
        return "caa"
    if not isinstance(entry, Mapping) and keys == {"positive", "negative"}:
        return "repeng"
    if {"positive", "negative"} & keys:
        texts = keys == {"positive", "negative"} and all(isinstance(value, str) for value in entry.values())
        return "repeng" if texts and kind == "list" else "plain"
    raise LensteerError(
        f"{where} has no known format (it has {sorted(keys) or repr(entry)[:60]}): a pair has 'positive' and "
        f"'negative' (plain, repeng) or {', '.join(map(repr, _CAA))} (caa), a persona trait has 'instruction' and "
        "'questions'"
    )


def _keys(entry: Any) -> set[str]:
    if isinstance(entry, Mapping):
        return {str(key) for key in entry}
    return {name for name in ("positive", "negative") if hasattr(entry, name)}


def _value(entry: Any, key: str) -> Any:
    value = entry.get(key) if isinstance(entry, Mapping) else getattr(entry, key, None)
    if value is None:
        raise LensteerError(f"lacks {key!r} (it has {sorted(_keys(entry))})")
    return value


def _words(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise LensteerError(f"{key!r} is {value!r}: give a text that is not empty")
    return value


def _plain(entry: Any, label: str, raw: bool | None) -> Iterator[Pair]:
    if not isinstance(entry, Mapping):
        raise LensteerError(f"{entry!r} is not an object with 'positive' and 'negative'")
    if unknown := _keys(entry) - {*_SIDE, "positive", "negative", "label", "concept", "id"}:
        raise LensteerError(f"unknown keys {sorted(unknown)}: a pair has 'positive', 'negative', 'label' and {_SIDE}")
    shared = {key: entry[key] for key in _SIDE if key in entry}
    positive, negative = (_side(_value(entry, side), side, shared, raw) for side in ("positive", "negative"))
    named = entry.get("label", entry.get("concept"))
    yield Pair(positive, negative, label if named is None else _words(named, "label"))


def _side(value: Any, side: str, shared: Mapping[str, Any], raw: bool | None) -> Text:
    if not isinstance(value, Mapping):
        value = {"completion" if "prompt" in shared else "prompt": _words(value, side)}
    if unknown := set(value) - set(_SIDE):
        raise LensteerError(f"{side!r} has unknown keys {sorted(unknown)}: give {_SIDE}")
    fields = {"raw": bool(raw), **shared, **value}
    if "prompt" not in fields:
        raise LensteerError(f"{side!r} lacks 'prompt' (it has {sorted(value)})")
    if not isinstance(fields["raw"], bool):
        raise LensteerError(f"{side}.raw is {fields['raw']!r}: give true or false")
    completion, system = (
        _words(fields[key], f"{side}.{key}") if fields.get(key) else "" for key in ("completion", "system")
    )
    return Text(_words(fields["prompt"], f"{side}.prompt"), completion, system, fields["raw"])


def _caa(entry: Any, label: str, raw: bool | None) -> Iterator[Pair]:
    question, own, other = (_words(_value(entry, key), key) for key in _CAA)
    if not raw:  # a chat template has the space or line break before an answer
        own, other = own.strip(), other.strip()
    yield Pair(Text(question, own, raw=bool(raw)), Text(question, other, raw=bool(raw)), label, "letter")


def _persona(entry: Any, label: str, raw: bool | None) -> Iterator[Pair]:
    instructions, questions = _value(entry, "instruction"), _value(entry, "questions")
    for key, value in (("instruction", instructions), ("questions", questions)):
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise LensteerError(f"{key!r} is {str(value)[:60]!r}: give a list that is not empty")
    if raw:
        raise LensteerError("raw texts have no system prompts, which a persona trait consists of: leave out raw=True")
    for question in questions:
        asked = _words(question, "questions")
        for i, instruction in enumerate(instructions):
            own, other = (_words(_value(instruction, key), f"instruction {i}, {key}") for key in ("pos", "neg"))
            yield Pair(Text(asked, system=own), Text(asked, system=other), label)


def _repeng(entry: Any, label: str, raw: bool | None) -> Iterator[Pair]:
    own, other = (_words(_value(entry, side), side) for side in ("positive", "negative"))
    yield Pair(Text(own, raw=raw is not False), Text(other, raw=raw is not False), label, "last")


#: Readers by format: an entry, the label if it has none, and whether its texts are raw.
FORMATS: dict[str, Callable[[Any, str, bool | None], Iterator[Pair]]] = {
    "plain": _plain,
    "caa": _caa,
    "persona": _persona,
    "repeng": _repeng,
}
