"""From pairs to vectors, in one pass: each distinct text is run once, and kept until its last pair is complete.

A pair is read at a named position. The tokens of each position are found here, with all offsets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lensteer import models
from lensteer.activations import TraceFeatures, stream_means
from lensteer.arguments import checked
from lensteer.contrast.pairs import Pair, Text, load_pairs
from lensteer.errors import LensteerError
from lensteer.files import digest
from lensteer.vectors import BehaviorVectors, Controls
from lensteer.vectors.components import PairComponents
from lensteer.vectors.constructions import PAIRS, ContrastSums, Recipe, isotropic
from lensteer.vectors.fitting import library_versions
from lensteer.vectors.kept import KeptFits
from lensteer.vectors.probes import check_memory

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

POSITIONS = ("last_prompt", "prompt", "answer", "letter", "last")
_TOKEN = "token:"


@dataclass(frozen=True)
class Encoded:
    """A text as token ids: the first `n_prompt` are the prompt, with its template; the others the completion."""

    ids: tuple[int, ...]
    n_prompt: int


@dataclass(frozen=True)
class Position:
    """Which tokens of a text are read: their mean activation is the text's.

    Attributes:
        kind: a name of `POSITIONS`, "index" or "token".
        index: of kind "index": of all tokens, negative from the end.
        text: of kind "token": the words whose token is read.
    """

    kind: str
    index: int = 0
    text: str = ""

    @classmethod
    def parse(cls, spec: str | int | Position) -> Position:
        """Read a position's name.

        Args:
            spec: "last_prompt", the last token of the prompt (with a chat template the one whose logits predict the
                answer's first token); "prompt", the mean over the prompt without its first token; "answer", the mean
                over the completion; "letter", the completion's last token with a letter or digit in it, such as the A
                of "(A)" (where CAA reads); "last", the text's last token (where repeng reads); an index of all tokens,
                negative from the end, as a number or a string; or "token:WORDS", the last token of the last occurrence
                of these words.

        Raises:
            LensteerError: any other name, or index 0: the first token has no context.
        """
        if isinstance(spec, Position):
            return spec
        if isinstance(spec, int) or re.fullmatch(r"[-+]?\d+", spec):
            if int(spec) == 0:
                raise LensteerError("position 0 is an attention sink, the same in every text: read a later token")
            return cls("index", index=int(spec))
        if spec.startswith(_TOKEN) and spec != _TOKEN:
            return cls("token", text=spec.removeprefix(_TOKEN))
        if spec not in POSITIONS:
            raise LensteerError(
                f"unknown position {spec!r}: choose one of {', '.join(map(repr, POSITIONS))}, an index, or "
                "'token:WORDS' for the token that WORDS end with"
            )
        return cls(spec)

    def __str__(self) -> str:
        return {"index": str(self.index), "token": f"{_TOKEN}{self.text}"}.get(self.kind, self.kind)

    def bounds(self, model: TransformerBridge, text: Encoded) -> tuple[int, int]:
        """The tokens as a half-open range of absolute positions; never position 0.

        Raises:
            LensteerError: the text has no such token.
        """
        n = len(text.ids)
        if self.kind in ("answer", "letter") and n == text.n_prompt:
            raise LensteerError(
                f"no completion to read {str(self)!r} in: give one, let the model write it (complete_pairs), or read "
                "'last_prompt'"
            )
        if self.kind == "answer":
            begin, end = text.n_prompt, n
        elif self.kind == "prompt":
            begin, end = 1, text.n_prompt
        else:
            begin = self._token(model, text)
            end = begin + 1
        if not 1 <= begin < end <= n:
            raise LensteerError(f"position {str(self)!r} is outside the {n} tokens, or the first of them")
        return begin, end

    def _token(self, model: TransformerBridge, text: Encoded) -> int:
        if self.kind == "last_prompt":
            return text.n_prompt - 1
        if self.kind == "last":
            return len(text.ids) - 1
        if self.kind == "index":
            return self.index + len(text.ids) if self.index < 0 else self.index
        begin = text.n_prompt if self.kind == "letter" else 0
        said, starts = models.decode_offsets(model.tokenizer, text.ids[begin:])
        if self.kind == "letter":
            at = max((i for i, sign in enumerate(said) if sign.isalnum()), default=-1)
        else:
            found = said.rfind(self.text)
            at = -1 if found < 0 else found + len(self.text) - 1
        if at < 0:
            what = "letter or digit" if self.kind == "letter" else repr(self.text)
            raise LensteerError(f"no {what} in {said[-120:]!r} to read at")
        return begin + max(i for i, start in enumerate(starts) if start <= at)


def encode_text(model: TransformerBridge, text: Text, *, thinking: bool = True) -> tuple[str, Encoded]:
    """The prompt as a string, and the whole text as tokens.

    Args:
        model: whose chat template is used, unless the text is raw.
        text: one side of a pair.
        thinking: given to the template as `enable_thinking`.

    Raises:
        LensteerError: no chat template, one that takes no system prompt, a prompt with special tokens that would get a
            template around it, or more tokens than the model's context.
    """
    if text.raw:
        prompt, ids = text.prompt, models.encode_raw(model, text.prompt)
    else:
        special = [token for token in model.tokenizer.all_special_tokens if token in text.prompt]
        if special:
            raise LensteerError(
                f"the prompt {text.prompt[:60]!r} holds {special[0]!r}, so it has its template already: pass raw=True"
            )
        if not model.tokenizer.chat_template:
            raise LensteerError(
                f"the tokenizer of {models.fingerprint(model).name!r} has no chat template: pass raw=True to use "
                "texts as they are"
            )
        prompt = models.chat_text(model, text.prompt, system=text.system, thinking=thinking)
        ids = models.encode(model, prompt)
    answer = text.completion_ids or models.encode(model, text.completion)
    n, longest = len(ids) + len(answer), models.context_length(model)
    if longest is not None and n > longest:
        raise LensteerError(f"{n} tokens, but the model's context has {longest}: shorten {text.prompt[:60]!r}")
    return prompt, Encoded((*ids, *answer), len(ids))


_SIDES = ("positive", "negative")
#: Of two sides: mean of the positive ones less mean of the others, with equal weight for each pair.
_SPANS = Recipe("onset", "rest", "span")


@dataclass(frozen=True)
class _Read:
    """A text's tokens, the range that is read, and the range for `mean_norm`."""

    ids: tuple[int, ...]
    at: tuple[int, int]
    every: tuple[int, int]
    n_prompt: int


@checked()
def fit_directions(
    model: TransformerBridge,
    pairs: Sequence[Any],
    *,
    position: str | int | Position | None = None,
    construction: str = "difference",
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    n_controls: int = 0,
    n_bootstrap: int = 0,
    seed: int = 0,
    batch_size: int = 16,
    thinking: bool = True,
) -> BehaviorVectors:
    """Fit one direction per concept and layer from pairs of texts that differ in it.

    With xᵢ⁺ and xᵢ⁻ the mean activations of pair i's sides over the tokens of `position`, and dᵢ = xᵢ⁺ − xᵢ⁻:

    - `difference`: d̄, as in CAA (Rimsky et al., arXiv 2312.06681) and persona vectors (arXiv 2507.21509).
    - `pca`: n̂ ⟨n̂, d̄⟩, n̂ the direction of the largest Σ ⟨n̂, dᵢ⟩² (Zou et al., arXiv 2310.01405; see
      `directions.components`).
    - `logistic`: n̂ ⟨n̂, d̄⟩, n̂ the normal of a penalized logistic regression that tells the two sides apart (see
      `directions.probes`).

    So the lengths are comparable with d̄'s, and coefficient 1 adds the difference between the sides. Controls,
    replicates and `mean_norm` are those of `fit_vectors`, with pairs in place of traces: `shuffled` swaps the sides of
    each pair at random, `covariance_matched` has the covariance of both sides of all pairs.

    Args:
        model: whose residual stream is read.
        pairs: from `load_pairs` or `pair_up`, of one concept or several; or any list that `load_pairs` takes.
        position: where to read; see `Position.parse`. By default the position in the pairs, or else the mean over the
            completions ("answer"), or the "last_prompt" token if there are none.
        construction: "difference", "pca" or "logistic". The latter two keep the features of all pairs,
            `8 · pairs · layers · d_model` bytes, up to a limit of 4 GiB.
        layers: by default all.
        site: where in each block; steering edits resid_post, so others are for analysis.
        n_controls: random vectors of each kind, from the same pass; see `Controls`.
        n_bootstrap: replicates on resampled pairs, from the same pass.
        seed: for controls and replicates.
        batch_size: texts per forward.
        thinking: whether the template opens `<think>`, if it has that option.

    Returns:
        A vector per concept, in the order of first occurrence; `counts` are their numbers of pairs.

    Raises:
        LensteerError: before the first forward: no pairs, an unknown option or layer, a text without the position that
            is read or longer than the context, a template that cannot take a system prompt, a pair whose sides are the
            same up to where they are read. Later: activations that are not finite.
    """
    chosen = tuple(range(models.n_layers(model)) if layers is None else layers)
    for layer in chosen:
        models.check_layer(model, layer)
    models.resid_hook(0, site)  # raises
    pairs = [*pairs] if all(isinstance(pair, Pair) for pair in pairs) and pairs else load_pairs(list(pairs))
    where = chosen_position(pairs, position)
    recipe = Recipe(str(where), PAIRS, "span", construction)
    if not chosen or batch_size < 1 or n_controls < 0 or n_bootstrap < 0:
        raise LensteerError(
            f"layers={layers!r}, batch_size={batch_size}, n_controls={n_controls}, n_bootstrap={n_bootstrap}: give at "
            "least one layer and text per batch, and no negative number"
        )
    if construction != "difference":
        check_memory(2 * len(pairs), len(chosen), models.d_model(model))
    read = [_read(model, number, pair, where, thinking) for number, pair in enumerate(pairs)]
    keys = _keys(pairs, read)

    labels = tuple(dict.fromkeys(pair.label for pair in pairs))
    size = len(chosen), models.d_model(model)
    sums = {label: _accumulator(construction, *size, n_controls, n_bootstrap, seed) for label in labels}
    pooled = ContrastSums(_SPANS, _SIDES, *size, n_controls=n_controls, seed=seed)
    for features in _stream(model, read, keys, chosen, site, batch_size):
        sums[pairs[features.index].label].add(features)
        pooled.add(features)

    controls = replicates = None
    if n_controls:
        shuffled = torch.stack([each.shuffled()[:, 0] for each in sums.values()], dim=1)
        draws = isotropic(n_controls, *size, seed=seed)
        controls = Controls(draws.float(), pooled.covariance_matched().float(), shuffled.float())
    if n_bootstrap:
        replicates = torch.stack([each.replicates()[:, 0] for each in sums.values()], dim=1).float()
        replicates = replicates[replicates.flatten(1).isfinite().all(dim=1)]
    return BehaviorVectors(
        raw=torch.stack([each.difference()[0] for each in sums.values()]).float(),
        mean_norm=pooled.all_tokens().norm(dim=-1).float(),
        labels=labels,
        layers=chosen,
        counts=dict(Counter(pair.label for pair in pairs)),
        n_traces=len(pairs),
        recipe=recipe,
        provenance={
            "model": models.fingerprint(model).to_dict(),
            "site": site,
            "pairs": digest("\n".join(sorted(keys)).encode()),
            "seed": seed,
            "versions": library_versions(recipe),
        },
        controls=controls,
        replicates=replicates,
    )


def chosen_position(pairs: Sequence[Pair], position: str | int | Position | None = None) -> Position:
    """The position at which pairs are read by default.

    Raises:
        LensteerError: an unknown position, or pairs with different positions.
    """
    if position is not None:
        return Position.parse(position)
    wanted: dict[str, int] = {}
    for number, pair in enumerate(pairs):
        own = pair.position
        if own is None:
            answers = [pair.positive.answered, pair.negative.answered]
            if any(answers) != all(answers):
                raise LensteerError(
                    f"pair {number} ({pair.label!r}) has a completion on one side only: give both one, or pass "
                    "a position, such as position='last'"
                )
            own = "answer" if all(answers) else "last_prompt"
        wanted.setdefault(str(Position.parse(own)), number)
    if len(wanted) > 1:
        (first, i), (second, j), *_ = wanted.items()
        raise LensteerError(
            f"pair {i} is read at {first!r} and pair {j} at {second!r}: fit them apart, or pass position={second!r}"
        )
    return Position.parse(next(iter(wanted)))


def _read(model: TransformerBridge, number: int, pair: Pair, position: Position, thinking: bool) -> tuple[_Read, _Read]:
    """Both sides as tokens and ranges, checked."""
    found = []
    for side, text in zip(_SIDES, (pair.positive, pair.negative), strict=True):
        try:
            _, encoded = encode_text(model, text, thinking=thinking)
            found.append(_Read(encoded.ids, position.bounds(model, encoded), _every(encoded), encoded.n_prompt))
        except LensteerError as error:
            raise LensteerError(f"pair {number} ({pair.label!r}), {side} side: {error}") from error
    one, other = found
    if one.at == other.at and one.ids[: one.at[1]] == other.ids[: other.at[1]]:
        raise LensteerError(
            f"pair {number} ({pair.label!r}): both sides are the same tokens up to where they are read, "
            f"{str(position)!r}, so nothing differs there: read a later position, such as 'answer' or 'last'"
        )
    return one, other


def _every(text: Encoded) -> tuple[int, int]:
    """The range that `mean_norm` averages: the completion, or the prompt without its first token."""
    if len(text.ids) > text.n_prompt:
        return text.n_prompt, len(text.ids)
    return min(1, text.n_prompt - 1), text.n_prompt


def _keys(pairs: Sequence[Pair], read: Sequence[tuple[_Read, _Read]]) -> list[str]:
    """Names of pairs that do not depend on their order; duplicates are numbered."""
    seen: Counter[str] = Counter()
    keys = []
    for pair, sides in zip(pairs, read, strict=True):
        name = f"{pair.label}|{digest(repr(sides).encode())}"
        keys.append(f"{name}|{seen[name]}")
        seen[name] += 1
    return keys


def _accumulator(
    construction: str, n_layers: int, d_model: int, n_controls: int, n_bootstrap: int, seed: int
) -> ContrastSums | KeptFits | PairComponents:
    if construction == "pca":
        return PairComponents(n_layers, d_model, n_controls=n_controls, n_bootstrap=n_bootstrap, seed=seed)
    return (KeptFits if construction == "logistic" else ContrastSums)(
        Recipe("onset", "rest", "span", construction),
        _SIDES,
        n_layers,
        d_model,
        n_controls=n_controls,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )


def _stream(
    model: TransformerBridge,
    read: Sequence[tuple[_Read, _Read]],
    keys: Sequence[str],
    layers: tuple[int, ...],
    site: str,
    batch_size: int,
) -> Iterator[TraceFeatures]:
    """Each pair as a trace of two spans, as soon as both of its texts have been run."""
    texts = list(dict.fromkeys(side for sides in read for side in sides))
    users: dict[_Read, list[int]] = {text: [] for text in texts}
    for number, sides in enumerate(read):
        for side in sides:
            users[side].append(number)
    left = {text: len(numbers) for text, numbers in users.items()}
    kept: dict[_Read, Tensor] = {}

    def name(i: int) -> str:
        number = users[texts[i]][0]
        return f"pair {number} ({_SIDES[read[number].index(texts[i])]} side)"

    for i, rows in stream_means(
        model,
        [text.ids for text in texts],
        [text.n_prompt for text in texts],
        [(text.at, text.every) for text in texts],
        layers=layers,
        site=site,
        batch_size=batch_size,
        name=name,
    ):
        kept[texts[i]] = rows.clone()
        for number in users[texts[i]]:
            sides = read[number]
            if not all(side in kept for side in sides):
                continue
            both = torch.stack([kept[side] for side in sides])  # side, row, layer, d_model
            yield TraceFeatures(
                index=number,
                key=keys[number],
                labels=_SIDES,
                layers=layers,
                spans=both[None, :, 0],
                lengths=torch.tensor([[side.at[1] - side.at[0] for side in sides]]),
                tokens=both[:, 1].mean(0),
                n_tokens=sum(side.every[1] - side.every[0] for side in sides),
            )
            for side in sides:
                left[side] -= 1
                if not left[side]:
                    del kept[side]
