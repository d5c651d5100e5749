"""What a plan does to each token of a given response.

KL_t     = KL(p_steered(. | x_<t) || p_unsteered(. | x_<t))
change_t = log p_steered(x_t | x_<t) - log p_unsteered(x_t | x_<t)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lensteer.errors import LensteerError
from lensteer.results import Result


@dataclass(frozen=True, eq=False, repr=False)
class ForcedEffect(Result):
    """What a plan does to each token of a given response.

    Attributes:
        prompt_length: absolute position of the response's first token.
        kl: KL(steered || unsteered) of the distributions that each token stands for, in nats.
        change: log-probability of the token itself, steered less unsteered, in nats.
    """

    prompt_length: int
    kl: Float[Tensor, " pos"]
    change: Float[Tensor, " pos"]

    @property
    def total(self) -> float:
        """The KLs of all tokens, summed."""
        return float(self.kl.sum())

    def change_at(self, positions: Sequence[int]) -> float:
        """The changes of log-probability of the tokens at absolute positions, summed.

        Raises:
            LensteerError: a position outside the response.
        """
        end = self.prompt_length + len(self.change)
        if outside := [p for p in positions if not self.prompt_length <= p < end]:
            raise LensteerError(
                f"no response token at positions {outside}: they run from {self.prompt_length} to {end - 1}"
            )
        return float(self.change[[p - self.prompt_length for p in positions]].sum())

    def to_dataframe(self) -> Any:
        """A row per token of the response."""
        import pandas as pd

        positions = range(self.prompt_length, self.prompt_length + len(self.kl))
        return pd.DataFrame({"position": positions, "kl": self.kl.numpy(), "change": self.change.numpy()})
