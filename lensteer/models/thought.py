"""How a model marks its thought: which marks, where they come from, and whether a prompt leaves a thought open."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lensteer.errors import LensteerError
from lensteer.positions import in_message, squeezed

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

OPEN_THINKING, CLOSE_THINKING = "<think>", "</think>"

Marks = tuple[str, str]
"""The texts that open and close a thought; `UNMARKED` for a model whose whole response is its chain."""
UNMARKED: Marks = ("", "")
#: Marks of published models, by what opens them.
MARKS: dict[str, Marks] = {
    opens: (opens, closes)
    for opens, closes in (
        (OPEN_THINKING, CLOSE_THINKING),  # DeepSeek-R1, Qwen3, QwQ, SmolLM3, Phi-4-reasoning, ...
        ("[THINK]", "[/THINK]"),  # Magistral
        ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
        ("<seed:think>", "</seed:think>"),  # Seed-OSS
        ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
        ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
        ("◁think▷", "◁/think▷"),  # Kimi
        ("<reasoning>", "</reasoning>"),
        ("<thinking>", "</thinking>"),
        ("<thought>", "</thought>"),  # EXAONE Deep
        ("<reason>", "</reason>"),
    )
}
_QUESTION = "QUESTION"


def named_marks(name: str) -> Marks | None:
    """Marks from a name: None for "auto", `UNMARKED` for "none", known ones by what opens them, or "OPEN CLOSE".

    Raises:
        LensteerError: neither a known name nor two marks.
    """
    if name == "auto":
        return None
    if name == "none":
        return UNMARKED
    if name in MARKS:
        return MARKS[name]
    both = name.split()
    if len(both) != 2 or both[0] == both[1]:
        raise LensteerError(
            f"thought marks {name!r}: give 'auto', 'none', one of {list(MARKS)}, or two different ones with a blank "
            "between them, such as '<plan> </plan>'"
        )
    return both[0], both[1]


def set_thought_marks(model: TransformerBridge, marks: str | Marks) -> None:
    """Say how a model marks its thought, instead of reading it from its template.

    Args:
        model: the bridge; the marks are kept with its tokenizer.
        marks: a name, as in `named_marks`, or both marks.

    Raises:
        LensteerError: marks that cannot be told apart, or an unknown name.
    """
    found = named_marks(marks) if isinstance(marks, str) else marks
    if found not in (None, UNMARKED) and (len(found) != 2 or not all(found) or found[0] == found[1]):
        raise LensteerError(f"thought marks {marks!r}: give two different texts, or 'none'")
    vars(model.tokenizer)["thought_marks"] = found


def thought_marks(model: TransformerBridge) -> Marks:
    """How a model marks its thought: as set, else the known marks in its chat template.

    A template without any belongs to a model whose whole response is its chain, `UNMARKED`. Without a template, the
    vocabulary decides.
    """
    given = vars(model.tokenizer).get("thought_marks")
    return marks_of(model.tokenizer) if given is None else given


def marks_of(tokenizer: Any) -> Marks:
    """The known marks in a tokenizer's chat template, or, without one, those that are tokens of its vocabulary."""
    if template := getattr(tokenizer, "chat_template", None):
        return marks_in(str(template))
    lacking = (None, tokenizer.unk_token_id)
    return next((both for both in MARKS.values() if tokenizer.convert_tokens_to_ids(both[0]) not in lacking), UNMARKED)


def marks_in(text: str) -> Marks:
    """The first of the known marks that a text holds, opening or closing; `UNMARKED` if it holds none."""
    return next((marks for marks in MARKS.values() if marks[0] in text or marks[1] in text), UNMARKED)


def header(model: TransformerBridge) -> str:
    """What the chat template writes between the last message and the response, up to a mark, without white space.

    Marks before it are somebody's words: a user may ask about `<think>`. Empty if the template writes nothing there.
    """
    template = model.tokenizer.chat_template
    return _header(model.tokenizer, str(template), thought_marks(model)) if template else ""


@lru_cache(maxsize=32)
def _header(tokenizer: Any, template: str, marks: Marks) -> str:
    from jinja2 import TemplateError

    message = [{"role": "user", "content": _QUESTION}]
    try:
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        return ""
    after = text.rpartition(_QUESTION)[2]
    places = [at for at in map(after.find, filter(None, marks)) if at >= 0]
    return squeezed(after[: min(places, default=len(after))])


def opens_thought(model: TransformerBridge, prompt: str) -> bool:
    """Whether a prompt leaves a thought open: the last mark opens one, and stands after the last message."""
    opens, closes = thought_marks(model)
    if not opens:
        return False
    at = prompt.rfind(opens)
    return at > prompt.rfind(closes) and not in_message(prompt[at:], header(model))
