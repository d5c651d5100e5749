"""What an evaluation found: effects by behavior, side effects by arm, and how far random vectors go."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from lensteer.errors import LensteerError
from lensteer.files import write_atomically


@dataclass(frozen=True)
class Effect:
    """One arm's share of one behavior, and its change against the unsteered arm, both with 95 % intervals.

    Attributes:
        behavior: whose share.
        kind: "down", "up" (the behavior's own vector) or "words" (the prompt baseline).
        layer: steered (-1 for words).
        coefficient: signed; 0 for words.
        unit: "sentences" or "tokens", of which the share is.
        share: in this arm; `share_low` and `share_high` bound it.
        base: the unsteered share; `base_low` and `base_high` bound it.
        change: share - base, paired by task; `low` and `high` bound it.
        null_low: smallest change of the same share by a random vector, `null_high` the largest; 0 without any.
        p_value: (1 + random vectors that change it at least as far in the wanted direction) / (1 + random vectors).
        wrong_way: share of tasks that move against the wanted direction.
    """

    behavior: str
    kind: str
    layer: int
    coefficient: float
    unit: str
    share: float
    share_low: float
    share_high: float
    base: float
    base_low: float
    base_high: float
    change: float
    low: float
    high: float
    null_low: float
    null_high: float
    p_value: float
    wrong_way: float

    @property
    def shown(self) -> bool:
        """Whether the change has the wanted sign, its interval excludes 0, and no random vector does as much."""
        if self.kind == "down":
            return self.high < 0 and self.change < self.null_low
        return self.low > 0 and self.change > self.null_high


@dataclass(frozen=True)
class ArmSummary:
    """How an arm's chains fared, whatever the behavior. Means over chains; `accuracy` with its 95 % interval."""

    arm: str
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    parsed: float
    finished: float
    length: float
    sentences: float
    repetition: float


@dataclass(frozen=True)
class Evaluation:
    """Effects and side effects of steering on held-out tasks."""

    effects: tuple[Effect, ...]
    arms: tuple[ArmSummary, ...]
    nulls: dict[str, dict[str, list[float]]]
    n_tasks: int
    n_samples: int
    n_random: int
    scope: str

    def effect(self, behavior: str, kind: str, unit: str = "sentences") -> Effect:
        """One effect.

        Raises:
            LensteerError: there is none of that name.
        """
        for effect in self.effects:
            if (effect.behavior, effect.kind, effect.unit) == (behavior, kind, unit):
                return effect
        known = sorted({(e.behavior, e.kind, e.unit) for e in self.effects})
        raise LensteerError(f"no effect of {(behavior, kind, unit)}: there are {known}")

    def to_dataframe(self) -> pd.DataFrame:
        """A row per effect."""
        return pd.DataFrame([{**asdict(e), "shown": e.shown} for e in self.effects])

    def arms_dataframe(self) -> pd.DataFrame:
        """A row per arm."""
        return pd.DataFrame([asdict(a) for a in self.arms])

    def save(self, path: str | Path) -> None:
        """Write as JSON, all or nothing."""
        write_atomically(Path(path), json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(path: str | Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            LensteerError: no such file, or not such a file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            effects = tuple(Effect(**e) for e in values.pop("effects"))
            arms = tuple(ArmSummary(**a) for a in values.pop("arms"))
            return Evaluation(effects, arms, **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LensteerError(f"{str(path)!r} is no evaluation ({error}): run the evaluation again") from error
