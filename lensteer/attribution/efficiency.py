"""Effect per disturbance, from signed scores and a KL. Values only."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from lensteer.attribution.scores import LayerScores
from lensteer.errors import LensteerError


def efficiency(signed: LayerScores, kl: LayerScores) -> LayerScores:
    """Effect in the wanted direction per root of the disturbance: signed / √KL, in logits per √nat.

    To first order neither numerator nor denominator depends on the coefficient's size, only on its sign. There is no
    interval: both means come from the same spans, and their error does not follow from the two intervals.

    Args:
        signed: Scores of method "signed".
        kl: Scores in nats of the same vectors at the same positions.

    Returns:
        Scores of method "efficiency"; NaN where the KL is below its noise.

    Raises:
        LensteerError: Scores of another kind, or not of the same behaviors, layers, spans, scaling or strength.
    """
    if signed.method != "signed" or kl.unit != "nats":
        raise LensteerError(
            f"efficiency needs scores of method 'signed' and scores in nats: these are {signed.method!r} and "
            f"{kl.method!r} in {kl.unit}"
        )
    for name in ("labels", "layers", "positions", "window", "scaling", "coefficient"):
        ours, theirs = getattr(signed, name), getattr(kl, name)
        if ours != theirs:
            raise LensteerError(f"signed scores with {name} {ours!r}, a KL with {theirs!r}: pass both the same")
    value = torch.where(kl.below_noise(), math.nan, signed.mean / kl.mean.sqrt())
    unknown = torch.full_like(value, math.nan)
    return replace(
        signed,
        mean=value,
        low=unknown,
        high=unknown,
        method="efficiency",
        unit="logits/√nat",
        noise_floor=None,
        cost={name: signed.cost[name] + kl.cost[name] for name in signed.cost.keys() & kl.cost.keys()},
        provenance={**signed.provenance, "kl": kl.method},
        cells=None,
        nulls={},
    )
