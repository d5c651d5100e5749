"""How long a text may be: learned positions end, and some rotary embeddings depend on the longest row of a batch."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lensteer.errors import LensteerError
from lensteer.models.facts import context_length, fingerprint

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Kinds of rotary embeddings whose frequencies change beyond a length: for every row of the batch at once.
_SWITCHING = ("dynamic", "longrope")

_limits: weakref.WeakKeyDictionary[nn.Module, Limits] = weakref.WeakKeyDictionary()
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Limits:
    """Tokens up to which a model's positions hold; None for no such limit.

    Attributes:
        learned: rows of a table of position embeddings. There is nothing beyond it.
        switching: where rotary frequencies begin to depend on the longest row that is run.
        trained: what rotary positions were trained for, as the configuration says.
    """

    learned: int | None = None
    switching: int | None = None
    trained: int | None = None


def length_limits(model: TransformerBridge) -> Limits:
    """The limits of a model, from its modules and its configuration."""
    if model not in _limits:
        original = model.original_model
        stated = context_length(model)
        rotary = list(_rotary(original))
        kinds = list(_rope_kinds(original.config))
        switching = [int(kind.get("original_max_position_embeddings") or stated or 0) for kind in kinds]
        _limits[model] = Limits(
            learned=None if rotary or stated is None else _learned(original, stated),
            switching=min(filter(None, switching), default=None) if rotary else None,
            trained=stated if rotary else None,
        )
    return _limits[model]


def check_ids(model: TransformerBridge, rows: Iterable[Sequence[int]]) -> None:
    """Refuse texts of another tokenizer, as far as their ids show it.

    Args:
        model: the bridge.
        rows: token ids.

    Raises:
        LensteerError: an id that the model lacks.
    """
    size = int(model.cfg.d_vocab)
    for row in rows:
        if row and not (0 <= min(row) and max(row) < size):
            odd = next(i for i in row if not 0 <= i < size)
            raise LensteerError(
                f"the token id {odd}: {fingerprint(model).name!r} has 0 to {size - 1}, so the text is of another "
                "tokenizer; use its own model"
            )


def check_rows(model: TransformerBridge, rows: Sequence[Sequence[int]], *, new: int = 0, cached: bool = False) -> None:
    """Refuse texts of which a model lacks a token or a position, or whose rows would depend on one another.

    Args:
        model: the bridge.
        rows: token ids.
        new: how many may be generated after each of them.
        cached: whether a text is run in parts, over a cache.

    Raises:
        LensteerError: an id that the model lacks; a text longer than the table of learned positions; or one beyond the
            length from which rotary frequencies depend on the batch, together with rows of another length or with a
            cache.
    """
    check_ids(model, rows)
    lengths = [len(row) for row in rows]
    limits, longest = length_limits(model), max(lengths, default=0) + new
    asked = f"{longest - new} tokens" + (f" and up to {new} new ones" if new else "")
    if limits.learned is not None and longest > limits.learned:
        raise LensteerError(
            f"{asked}: {fingerprint(model).name!r} has learned positions for {limits.learned} tokens; "
            f"{'lower max_new_tokens or ' if new else ''}shorten the text"
        )
    if limits.switching is not None and longest > limits.switching:
        if new or cached or len(set(lengths)) > 1:
            raise LensteerError(
                f"{asked}: beyond {limits.switching} tokens the rotary frequencies of {fingerprint(model).name!r} "
                "depend on the longest row of a batch and on what is cached, so no row would depend on itself alone; "
                "stay below, or set a static rope type in the model's configuration"
            )
    elif limits.trained is not None and longest > limits.trained and model not in _warned:
        _warned.add(model)
        warnings.warn(
            f"{asked}: {fingerprint(model).name!r} was trained on {limits.trained} positions; beyond them its text "
            "tends to break",
            stacklevel=3,
        )


def forget_frequencies(runner: nn.Module) -> None:
    """Let rotary frequencies that grow with the text begin anew: those of an earlier, longer text are dropped."""
    for module in _rotary(runner):
        if isinstance(longest := getattr(module, "original_max_seq_len", None), int):
            module.max_seq_len_cached = longest  # type: ignore[assignment]  # Hugging Face's own number


def _rotary(original: nn.Module) -> Iterator[nn.Module]:
    return (module for module in original.modules() if any("inv_freq" in name for name, _ in module.named_buffers()))


def _rope_kinds(config: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of rotary embeddings that switch: one mapping for all layers, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, Mapping)]
    return (kind for kind in each if kind.get("rope_type") in _SWITCHING)


def _learned(original: nn.Module, stated: int) -> int | None:
    """The rows of a position table: an embedding besides the tokens' own that is as long as the context."""
    find: Any = getattr(original, "get_input_embeddings", lambda: None)
    tokens = find()
    sizes = [m.num_embeddings for m in original.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    return stated if any(stated <= size <= stated + 2 for size in sizes) else None  # OPT keeps two rows for padding
