"""Overlap of vectors with single tokens: their cosines with the rows of the embedding and of the unembedding.

A vector of an early layer may only encode the current token, and one of a late layer the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer import models
from lensteer.arguments import checked
from lensteer.behaviors import check_behavior
from lensteer.errors import LensteerError
from lensteer.results import Result, Saved
from lensteer.vectors import BehaviorVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Side = Literal["embedding", "unembedding"]
SIDES: tuple[Side, ...] = ("embedding", "unembedding")

#: Cosines in memory at once: the vocabulary is processed in chunks of this many divided by the number of vectors.
MAX_COSINES = 2**24


@dataclass(frozen=True, eq=False, repr=False)
class NearestTokens(Result):
    """The tokens with the largest absolute cosine to each vector.

    Attributes:
        maximum: Largest cosine over the vocabulary (signed: a vector *against* a token has a low one).
        ids: Tokens of the k largest absolute cosines, the largest first.
        cosines: Their cosines, with signs.
        texts: The tokens decoded, `[behavior][layer][k]`.

    Raises:
        LensteerError: Texts of another shape than the ids.
    """

    maximum: Float[Tensor, "behavior layer"]
    ids: Int[Tensor, "behavior layer k"]
    cosines: Float[Tensor, "behavior layer k"]
    texts: tuple[tuple[tuple[str, ...], ...], ...]

    def __post_init__(self) -> None:
        shapes = {(len(self.texts), len(row), len(cell)) for row in self.texts for cell in row}
        if self.ids.numel() and shapes != {tuple(self.ids.shape)}:
            raise LensteerError(f"texts of the shapes {sorted(shapes)} for ids of {list(self.ids.shape)}: one for each")


@dataclass(frozen=True, eq=False, repr=False)
class EmbeddingOverlap(Saved):
    """The overlap of behavior vectors with single tokens.

    Attributes:
        labels: The behaviors, in the order of the first axis.
        layers: The layers, in the order of the second axis.
        embedding: With the rows of the embedding: the token that was read.
        unembedding: With the directions that raise single logits: the next token.
    """

    labels: tuple[str, ...]
    layers: tuple[int, ...]
    embedding: NearestTokens
    unembedding: NearestTokens

    def nearest(self, label: str, layer: int, side: Side = "embedding") -> list[tuple[str, float]]:
        """The nearest tokens of one vector with their cosines.

        Raises:
            LensteerError: An unknown behavior, layer or side.
        """
        if side not in SIDES:
            raise LensteerError(f"unknown side {side!r}: choose one of {', '.join(map(repr, SIDES))}")
        if layer not in self.layers:
            raise LensteerError(f"no overlap at layer {layer}: there is one at {list(self.layers)}")
        b, i = self.labels.index(check_behavior(label, self.labels)), self.layers.index(layer)
        tokens = getattr(self, side)
        return list(zip(tokens.texts[b][i], tokens.cosines[b, i].tolist(), strict=True))

    def leading_layers(self, factor: float = 1.2) -> dict[str, int]:
        """How many leading layers still mostly encode the current token, for each behavior.

        Those whose largest cosine with the embedding exceeds `factor` times the median over layers; the rule
        reproduces the layers that Venhoff et al. (arXiv 2506.18167) excluded by inspection.

        Raises:
            LensteerError: `factor` is not above 0.
        """
        if not factor > 0:
            raise LensteerError(f"factor {factor} must be above 0: 1.2 leaves out layers 20 % above the median")
        return {
            label: leading_above(row, factor)
            for label, row in zip(self.labels, self.embedding.maximum.tolist(), strict=True)
        }

    def to_dataframe(self) -> Any:
        """One row per behavior and layer: both overlaps and their nearest tokens."""
        import pandas as pd

        def words(label: str, layer: int, side: Side) -> str:
            return " ".join(f"{text!r} ({cosine:+.2f})" for text, cosine in self.nearest(label, layer, side))

        return pd.DataFrame(
            [
                {
                    "behavior": label,
                    "layer": layer,
                    "embedding": float(self.embedding.maximum[b, i]),
                    "unembedding": float(self.unembedding.maximum[b, i]),
                    "embedding_tokens": words(label, layer, "embedding"),
                    "unembedding_tokens": words(label, layer, "unembedding"),
                }
                for b, label in enumerate(self.labels)
                for i, layer in enumerate(self.layers)
            ]
        )


def leading_above(values: Sequence[float], factor: float) -> int:
    """How many of the first `values` exceed `factor` times their median, up to the first that does not."""
    limit = factor * float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
    return next((i for i, value in enumerate(values) if not value > limit), len(values))


@checked()
def embedding_overlap(model: TransformerBridge, vectors: BehaviorVectors, k: int = 5) -> EmbeddingOverlap:
    """Largest cosines of each vector with embedding and unembedding rows, and the k nearest tokens.

    max_i cos(u_{b,l}, E_i), and the same with W_U[:, i] ⊙ g, where g is the gain of the final norm: on raw
    weights that product is the direction of the residual stream that raises the logit of token i.

    Args:
        model: The model of the vectors.
        vectors: The vectors; their length does not matter. One of zeros has cosine 0 with everything.
        k: How many tokens to name.

    Raises:
        LensteerError: Vectors of another model, or a `k` beyond the vocabulary.
    """
    vectors.check_model(model)
    embedding, gain = model.W_E, models.final_norm_gain(model)
    if not 1 <= k <= len(embedding):
        raise LensteerError(f"k={k} nearest tokens: choose 1 to {len(embedding)}")
    return EmbeddingOverlap(
        labels=vectors.labels,
        layers=vectors.layers,
        embedding=_nearest(model, vectors.raw, embedding, torch.ones_like(gain), k),
        unembedding=_nearest(model, vectors.raw, model.W_U.T, gain, k),
    )


def _nearest(
    model: TransformerBridge,
    raw: Float[Tensor, "behavior layer d_model"],
    rows: Float[Tensor, "d_vocab d_model"],
    gain: Float[Tensor, " d_model"],
    k: int,
) -> NearestTokens:
    """Search the vocabulary chunk by chunk, so that vocabulary × vectors never exists at once."""
    units = torch.nn.functional.normalize(raw.flatten(0, 1).to(rows.device, torch.float32), dim=-1)
    maximum = torch.full((len(units),), -torch.inf, device=rows.device)
    ids = torch.zeros(len(units), 0, dtype=torch.long, device=rows.device)
    cosines = torch.zeros(len(units), 0, device=rows.device)
    step = max(1, MAX_COSINES // len(units))
    for start in range(0, len(rows), step):
        chunk = torch.nn.functional.normalize(rows[start : start + step].detach().float() * gain.float(), dim=-1)
        found = units @ chunk.T
        maximum = torch.maximum(maximum, found.max(-1).values)
        numbers = torch.arange(start, start + len(chunk), device=rows.device).expand(len(units), -1)
        # The best so far are merged with the chunk's.
        cosines, ids = torch.cat([cosines, found], -1), torch.cat([ids, numbers], -1)
        best = cosines.abs().topk(min(k, cosines.shape[-1]), dim=-1).indices
        cosines, ids = cosines.gather(-1, best), ids.gather(-1, best)
    shape = raw.shape[:2]
    decoded = {i: model.tokenizer.decode([i]) for i in ids.unique().tolist()}
    texts = tuple(
        tuple(tuple(decoded[i] for i in tokens) for tokens in layers) for layers in ids.view(*shape, k).tolist()
    )
    return NearestTokens(maximum.view(shape).cpu(), ids.view(*shape, k).cpu(), cosines.view(*shape, k).cpu(), texts)
