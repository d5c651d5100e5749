"""Projections of tokens on a direction, and their figure."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lensteer as ls
from lensteer import models
from lensteer.vectors.projections import token_projections


def test_a_planted_direction_shows_where_it_was_added(organism, random_direction):
    (trace,) = ls.generate_traces(organism, ls.load_tasks(split="dev", n=1), max_new_tokens=30)
    direction = random_direction(organism, 0)
    plain = token_projections(organism, trace, direction, 4)
    assert plain.tokens[trace.prompt_length] == trace.response[: trace.offsets[1]]
    assert len(plain.values) == len(plain.tokens) == len(trace.ids)
    with ls.SteeringPlan(direction, 4, 0.5, ls.at([3, 9])).on(organism):
        steered = token_projections(organism, trace, direction, 4)
    change = steered.values - plain.values
    torch.testing.assert_close(change[[3, 9]], torch.tensor([0.5, 0.5]), rtol=1e-4, atol=1e-4)
    change[[3, 9]] = 0
    assert float(change.abs().max()) < 1e-5
    with torch.no_grad():
        _, cache = organism.run_with_cache(torch.tensor([trace.ids]))
    unit = direction.scaled(4, "mean_norm")
    wanted = cache[models.resid_hook(4)][0] @ unit / unit.norm() ** 2
    torch.testing.assert_close(plain.values, wanted, rtol=1e-4, atol=1e-5)
    # Multiples of the mean activation's length, not of the difference's.
    twice = dataclasses.replace(direction, mean_norm=2 * direction.mean_norm)
    torch.testing.assert_close(2 * token_projections(organism, trace, twice, 4).values, plain.values)
    longer = dataclasses.replace(direction, raw=2 * direction.raw)
    torch.testing.assert_close(token_projections(organism, trace, longer, 4).values, plain.values)
    figure = ls.plots.token_projections(plain, n=20)
    assert "length of the layer's mean activation" in figure.layout.title.text
    assert len(figure.data[0].z) == 2
    begin, end = trace.prompt_length, len(trace.ids) - 1
    assert f"positions {begin} to {begin + 19} of {begin} to {end}" in figure.layout.title.text
    assert "positions" not in ls.plots.token_projections(plain).layout.title.text  # all of them
    assert list(plain.to_dataframe()) == ["token", "projection"]
    with pytest.raises(ls.LensteerError, match="start=999"):
        ls.plots.token_projections(plain, start=999)
    with pytest.raises(ls.LensteerError, match="no layer 99"):
        token_projections(organism, trace, direction, 99)
