"""Attribution: at which layer does adding a behavior's vector change what the model says next?

One function, one result; each estimator is a module of its own. Knows nothing of which layer to choose.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from lensteer import models
from lensteer.attribution.exact import exact_cells
from lensteer.attribution.scores import Cells, LayerScores, average
from lensteer.behaviors import check_behavior
from lensteer.errors import LensteerError
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["LayerScores", "attribute"]

METHODS = ("exact",)
SCALINGS = ("mean_norm", "unit")
POSITIONS = ("own", "other", "all")


def attribute(
    model: TransformerBridge,
    traces: Sequence[Trace],
    vectors: BehaviorVectors,
    *,
    method: str = "exact",
    coefficient: float = 1.0,
    scaling: str = "mean_norm",
    positions: str = "own",
    behaviors: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    max_spans: int | None = None,
    keep_cells: bool = False,
    seed: int = 0,
    memory: int = 2**30,
    progress: bool = False,
) -> LayerScores:
    """How much each behavior's vector disturbs the next token, layer by layer: K[b, l] in nats.

    `exact`: K[b, l] = mean over onsets of KL(p ‖ p_{b,l}), where p is the next-token distribution at the
    token before a span and p_{b,l} the same with `coefficient`·u_{b,l} added to resid_post of layer l at that
    one position. It is what Venhoff et al. (arXiv 2506.18167) describe; their code computes something else.
    It says how much is disturbed, not in which direction.

    Args:
        model: The model that wrote the traces.
        traces: Annotated traces.
        vectors: u, for each behavior and layer.
        method: The estimator: "exact".
        coefficient: Multiplies the scaled vector.
        scaling: "mean_norm" makes u as long as the mean activation at its layer, as steering does; "unit"
            gives it length 1. Means of activations grow with depth, so the two favor different layers.
        positions: Whose onsets are averaged: the behavior's "own", those of "other" behaviors, or "all".
        behaviors: Which to score, all that `vectors` has by default.
        layers: Which to score, all that `vectors` has by default.
        max_spans: Score at most so many spans per behavior, drawn at random.
        keep_cells: Keep the value of every span and layer in the result.
        seed: Of that draw and of the bootstrap.
        memory: Bytes that one forward's rows may take, roughly.
        progress: Show a progress bar over traces.

    Returns:
        Means in nats with 95 % intervals from a bootstrap over traces, and the noise floor.

    Raises:
        LensteerError: An unknown option, behavior or layer; vectors or traces of another model; no span to
            average over; numbers that are not finite; an attention that cannot be run this way.
    """
    _check_choice("method", method, METHODS)
    _check_choice("scaling", scaling, SCALINGS)
    _check_choice("positions", positions, POSITIONS)
    if not math.isfinite(coefficient):
        raise LensteerError(f"coefficient {coefficient} is not finite: pass a number such as 1.0")
    if max_spans is not None and max_spans < 1:
        raise LensteerError(f"max_spans={max_spans} leaves no span: pass at least 1, or None for all")
    labels = vectors.labels if behaviors is None else tuple(dict.fromkeys(behaviors))
    layers = vectors.layers if layers is None else tuple(dict.fromkeys(layers))
    if not (labels and layers):
        raise LensteerError(f"nothing to score: behaviors={behaviors!r}, layers={layers!r}; name at least one")
    for label in labels:
        check_behavior(label, vectors.labels)
    for layer in layers:
        _check_layer(model, layer, vectors)
    vectors.check_model(model)
    added = coefficient * scaled_vectors(vectors, labels, layers, scaling)

    for label, finite in zip(labels, added.isfinite().all(-1).tolist(), strict=True):
        if not all(finite):
            layer = layers[finite.index(False)]
            raise LensteerError(
                f"coefficient {coefficient} makes the vector of {label!r} at layer {layer} overflow: use a smaller one"
            )

    began = time.perf_counter()
    cases = _sampled(_cases(traces, labels, positions), len(labels), max_spans, seed)
    values = torch.empty(len(cases), len(layers), dtype=torch.float64)
    noise, forwards, rows = 0.0, 0, 0
    owner: Tensor = cases[:, 0]
    for number in tqdm(owner.unique().tolist(), desc="attribute", unit="trace", disable=not progress):
        mine = (owner == number).nonzero()[:, 0]
        vector, onset = cases[mine, 2], cases[mine, 3]
        try:
            found = exact_cells(model, traces[number].ids, onset, vector, added, layers, memory=memory)
        except LensteerError as error:
            raise LensteerError(f"trace {number} ({traces[number].id}): {error}") from error
        values[mine] = found.kl
        noise = max(noise, found.noise_floor)
        forwards, rows = forwards + found.n_forwards, rows + found.n_rows
    trace, span, behavior, onset = cases.unbind(1)
    cells = Cells(trace, span, behavior, onset, values)
    (mean, low, high), n_spans, n_traces = average(cells, len(labels), seed=seed)
    return LayerScores(
        labels=labels,
        layers=layers,
        n_layers=models.n_layers(model),
        mean=mean,
        low=low,
        high=high,
        n_spans=n_spans,
        n_traces=n_traces,
        method=method,
        coefficient=float(coefficient),
        scaling=scaling,
        positions=positions,
        noise_floor=noise,
        max_spans=max_spans,
        cost={"forwards": forwards, "rows": rows, "seconds": time.perf_counter() - began},
        provenance={"model": models.fingerprint(model).to_dict(), "vectors": dict(vectors.provenance)},
        cells=cells if keep_cells else None,
    )


def scaled_vectors(
    vectors: BehaviorVectors, labels: Sequence[str], layers: Sequence[int], scaling: str
) -> Float[Tensor, "behavior layer d_model"]:
    """The vectors as coefficient 1 adds them, under either scaling. A vector of zeros stays one."""
    rows = [vectors.labels.index(label) for label in labels]
    columns = [vectors.layers.index(layer) for layer in layers]
    raw = vectors.raw[rows][:, columns].float().cpu()
    unit = raw / raw.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return unit if scaling == "unit" else unit * vectors.mean_norm[columns].float().cpu()[:, None]


def _cases(traces: Sequence[Trace], labels: Sequence[str], positions: str) -> Tensor:
    """Every (trace, span, behavior, onset) to score."""
    cases = []
    for t, trace in enumerate(traces):
        for s, span in enumerate(trace.spans):
            if span.end > len(trace.ids):
                raise LensteerError(
                    f"trace {t} ({trace.id}) has {len(trace.ids)} tokens, but a span of {span.label!r} "
                    f"at [{span.start}, {span.end}): annotate it again"
                )
            for b, label in enumerate(labels):
                if positions == "all" or (span.label == label) == (positions == "own"):
                    cases.append((t, s, b, span.onset))
    if not cases:
        n_spans = sum(len(trace.spans) for trace in traces)
        raise LensteerError(
            f"no onset to score: {len(traces)} traces with {n_spans} spans have none for "
            f"positions={positions!r} and behaviors {', '.join(map(repr, labels))}; pass annotated traces "
            "that contain them"
        )
    return torch.tensor(cases)


def _sampled(cases: Tensor, n_behaviors: int, max_spans: int | None, seed: int) -> Tensor:
    """At most `max_spans` cases of each behavior, in their order."""
    if max_spans is None:
        return cases
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for b in range(n_behaviors):
        own = (cases[:, 2] == b).nonzero()[:, 0]
        kept.append(own[torch.randperm(len(own), generator=generator)[:max_spans]])
    return cases[torch.cat(kept).sort().values]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise LensteerError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, choices))}")


def _check_layer(model: TransformerBridge, layer: int, vectors: BehaviorVectors) -> None:
    models.check_layer(model, layer)
    if layer not in vectors.layers:
        raise LensteerError(f"no vectors at layer {layer}: these have layers {list(vectors.layers)}")
