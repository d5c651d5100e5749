"""What an edit does to the residual stream h: functions of h, of a vector and of a coefficient, row by row.

With v the plan's vector, û = v / ‖v‖, c its coefficient, and ‖v‖ of the plan's unit:

    add          h <- h + c v
    project_out  h <- h - c <h, û> û            c = 1 removes the direction (Arditi et al. 2024, arXiv 2406.11717)
    clamp        h <- h + (c ‖v‖ - <h, û>) û    the projection becomes c ‖v‖; c = 0 removes the direction
    rotate       h <- ‖h‖ (cos φ' û + sin φ' ê)  φ' = φ - c, within [0°, 180°]

Here φ is the angle between h and û, and ê the unit vector of h's part across û: the rotation is in the plane of h and
û, by c degrees towards û (away from it for a negative c), and ends at û (or at -û). It keeps the norm of h. An h along
û or against it has no such plane, and stays as it is. Vu and Nguyen 2025 (arXiv 2510.26243) rotate within a plane that
is the same for all h. A clamp is what feature steering does to one feature of a sparse autoencoder (Templeton et al.
2024, "Scaling Monosemanticity").

Vectors and coefficients have a row for each of h, or one for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

Operator = Callable[
    [Float[Tensor, "batch pos d_model"], Float[Tensor, "_ 1 d_model"], Float[Tensor, "_ _ 1"]],
    Float[Tensor, "batch pos d_model"],
]

#: Share of its norm below which h has no part across û but rounding.
NO_PLANE = 1e-6


def add(
    resid: Float[Tensor, "batch pos d_model"],
    vector: Float[Tensor, "_ 1 d_model"],
    coefficient: Float[Tensor, "_ _ 1"],
) -> Float[Tensor, "batch pos d_model"]:
    """Return h + c v."""
    return resid + coefficient * vector


def project_out(
    resid: Float[Tensor, "batch pos d_model"],
    vector: Float[Tensor, "_ 1 d_model"],
    coefficient: Float[Tensor, "_ _ 1"],
) -> Float[Tensor, "batch pos d_model"]:
    """Return h - c <h, û> û; `vector` is û."""
    return resid - coefficient * (resid * vector).sum(-1, keepdim=True) * vector


def clamp(
    resid: Float[Tensor, "batch pos d_model"],
    vector: Float[Tensor, "_ 1 d_model"],
    coefficient: Float[Tensor, "_ _ 1"],
) -> Float[Tensor, "batch pos d_model"]:
    """Return h + (t - <h, û>) û; `vector` is û, and `coefficient` the target t = c ‖v‖."""
    h = resid.to(vector.dtype)
    return (h + (coefficient - (h * vector).sum(-1, keepdim=True)) * vector).to(resid.dtype)


def rotate(
    resid: Float[Tensor, "batch pos d_model"],
    vector: Float[Tensor, "_ 1 d_model"],
    coefficient: Float[Tensor, "_ _ 1"],
) -> Float[Tensor, "batch pos d_model"]:
    """Return ‖h‖ (cos φ' û + sin φ' ê); `vector` is û, and `coefficient` in degrees. 0 degrees change no bit."""
    h = resid.to(vector.dtype)
    along = (h * vector).sum(-1, keepdim=True)
    across = h - along * vector
    # Once more: near û, rounding leaves a part along û that is not small beside the rest.
    across = across - (across * vector).sum(-1, keepdim=True) * vector
    length, aside = h.norm(dim=-1, keepdim=True), across.norm(dim=-1, keepdim=True)
    angle = (torch.atan2(aside, along) - torch.deg2rad(coefficient)).clamp(0, torch.pi)
    turned = length * (angle.cos() * vector + angle.sin() * across / aside.clamp_min(torch.finfo(aside.dtype).tiny))
    return torch.where((aside > NO_PLANE * length) & (coefficient != 0), turned.to(resid.dtype), resid)


OPERATORS: Mapping[str, Operator] = {"add": add, "project_out": project_out, "clamp": clamp, "rotate": rotate}
"""By name, as `SteeringPlan.operator`."""

IN_UNITS = ("add", "clamp")
"""Operators whose coefficient is in multiples of the plan's unit. That of "rotate" is in degrees."""
