"""Attribution: at which layer does adding a behavior's vector change the next token?

`attribute` is the entry point. Separate modules define what is scored (`request`), the estimators, the rows of one
forward, the result (`scores`), its controls and its fidelity; `overlap` and `selection` serve to choose layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, overload

import torch

from lensteer import models
from lensteer.arguments import checked
from lensteer.attribution.controls import ControlTests, control_tests
from lensteer.attribution.fidelity import Fidelity, fidelity
from lensteer.attribution.measure import measure, scores_of, with_exact_cells
from lensteer.attribution.request import (
    METHODS,
    SPANS,
    WINDOWS,
    Request,
    control_vectors,
    find_cases,
    first_token_shares,
    limited,
    relative_length,
    scaled_vectors,
)
from lensteer.attribution.scores import LayerScores, efficiency
from lensteer.errors import LensteerError
from lensteer.steering.plans import UNITS
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = [
    "ControlTests",
    "Fidelity",
    "LayerScores",
    "attribute",
    "control_tests",
    "efficiency",
    "fidelity",
]


# fmt: off
@overload
def attribute(
    model: TransformerBridge, traces: Sequence[Trace], vectors: BehaviorVectors, *, method: str = ...,
    window: str = ..., spans: str | None = ..., coefficient: float = ..., unit: str | None = ...,
    samples: int = ..., n_controls: int = ..., exact_where_unreliable: bool = ...,
    behaviors: Sequence[str] | None = ..., layers: Sequence[int] | None = ..., max_spans: int | None = ...,
    keep_cells: bool = ..., seed: int = ..., memory: int = ..., progress: bool = ...,
) -> LayerScores: ...
@overload
def attribute(
    model: TransformerBridge, traces: Sequence[Trace], vectors: BehaviorVectors, *, method: str = ...,
    window: str = ..., spans: str | None = ..., coefficient: Sequence[float], unit: str | None = ...,
    samples: int = ..., n_controls: int = ..., exact_where_unreliable: bool = ...,
    behaviors: Sequence[str] | None = ..., layers: Sequence[int] | None = ..., max_spans: int | None = ...,
    keep_cells: bool = ..., seed: int = ..., memory: int = ..., progress: bool = ...,
) -> tuple[LayerScores, ...]: ...
# fmt: on
@checked()
def attribute(
    model: TransformerBridge,
    traces: Sequence[Trace],
    vectors: BehaviorVectors,
    *,
    method: str = "exact",
    window: str = "onset",
    spans: str | None = None,
    coefficient: float | Sequence[float] = 1.0,
    unit: str | None = None,
    samples: int = 8,
    n_controls: int = 0,
    exact_where_unreliable: bool = False,
    behaviors: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    max_spans: int | None = None,
    keep_cells: bool = False,
    seed: int = 0,
    memory: int = 2**30,
    progress: bool = False,
) -> LayerScores | tuple[LayerScores, ...]:
    """The effect of each behavior's vector on the next token, layer by layer, averaged over spans: K[b, l].

    With p the next-token distribution at the token before a span and u = u_{b,l} added to resid_post of layer l
    there, α times:

    - `exact`: KL(p ‖ p_{b,l}) in nats, by running the edited model. It is what Venhoff et al. (arXiv 2506.18167)
      describe; their code computes something else.
    - `fisher`: its second-order estimate, ½α² Var_p(J u) = ½α² E_{y~p}[(u·∇ log p(y))²], from `samples` drawn tokens
      per position: one backward pass serves all vectors, layers and control vectors.
    - `fisher_jvp`: the same without sampling noise, by forward-mode differentiation, at the cost of `exact`.
    - `signed`: α⟨u, ∇M_b⟩ in logits, M_b the log-odds that the next token begins a sentence of b
      (`cases.first_token_shares`). A KL measures how much the prediction changes, this in which direction.
    - `published`: |α⟨u, g⟩| as in the published code, with unit vectors and at the onsets of other behaviors. It is
      neither a KL nor an approximation of one, and is included for comparison.

    Args:
        model: The model that wrote the traces.
        traces: Annotated traces.
        vectors: u, for each behavior and layer.
        method: The estimator.
        window: "onset": u is added at the token before the span and its effect on the next token is scored.
            "span": u is added there and at all the span's tokens but the last, and the KL is summed over the
            span's tokens.
        spans: Which spans are averaged: the behavior's "own", those of "other" behaviors, or "all". By default
            "own" for a KL, "all" for `signed` and "other" for `published`.
        coefficient: α; several share one prefill of the caches and return a tuple of scores.
        unit: "difference" uses u as it is, as steering does (the default except for `published`); "mean_norm" scales it
            to the norm of the mean activation at its layer; "unit" to norm 1. Activations grow with depth, so the three
            favor different layers.
        samples: Tokens drawn per position by `fisher`.
        n_controls: Control vectors of each kind that are scored as well (methods with gradients only).
        exact_where_unreliable: Replace cells of a Fisher estimate that are unreliable because of their sampling error,
            coefficient or size (`LayerScores.unreliable`) by exact ones; the result marks them.
        behaviors: Which to score; by default all in `vectors`.
        layers: Which to score; by default all in `vectors`.
        max_spans: Score at most this many spans per behavior, drawn at random.
        keep_cells: Keep the value of every span and layer in the result.
        seed: For all draws, including the bootstrap.
        memory: Bytes that one forward's rows may take, roughly.
        progress: Show a progress bar over traces.

    Returns:
        Means with 95 % intervals from a bootstrap over traces, and the noise floor; a tuple of them, in order, if
        `coefficient` is a sequence.

    Raises:
        LensteerError: An unknown option, behavior or layer; vectors or traces of another model; no span to
            average over; fewer controls than requested; numbers that are not finite; an unsupported attention.
    """
    _check_choice("method", method, list(METHODS))
    how = METHODS[method]
    unit, spans = unit or how.coefficient_unit, spans or how.spans
    _check_choice("unit", unit, UNITS)
    _check_choice("spans", spans, SPANS)
    _check_choice("window", window, WINDOWS)
    if window not in how.windows:
        raise LensteerError(f"method {method!r} is about the token before a span: window={window!r} does not apply")
    coefficients = tuple(coefficient) if isinstance(coefficient, Sequence) else (coefficient,)
    if not coefficients or not all(map(math.isfinite, coefficients)):
        raise LensteerError(f"coefficient {coefficient} is not finite: pass a number such as 1.0, or several")
    if max_spans is not None and max_spans < 1:
        raise LensteerError(f"max_spans={max_spans} leaves no span: pass at least 1, or None for all")
    if samples < 1 or n_controls < 0:
        raise LensteerError(
            f"samples={samples}, n_controls={n_controls}: draw at least one sample, and 0 or more control vectors"
        )
    if n_controls and not how.linear:
        raise LensteerError(
            f"n_controls={n_controls} of method {method!r} would each be run: use 'fisher', where they are cheap"
        )
    if exact_where_unreliable and how.power != 2:
        raise LensteerError(
            f"method {method!r} is not an estimate of the exact score: only Fisher cells can be recomputed"
        )
    labels = vectors.labels if behaviors is None else tuple(dict.fromkeys(behaviors))
    chosen = vectors.layers if layers is None else tuple(dict.fromkeys(layers))
    if not (labels and chosen):
        raise LensteerError(
            f"nothing to score: behaviors={behaviors!r}, layers={layers!r}; name at least one of {list(vectors.labels)}"
        )
    for label in labels:
        vectors[label]  # raises
    for layer in chosen:
        models.check_layer(model, layer)
        if layer not in vectors.layers:
            raise LensteerError(f"no vectors at layer {layer}: these have layers {list(vectors.layers)}")
    vectors.check_model(model)
    scaled = scaled_vectors(vectors, labels, chosen, unit)
    finite = torch.stack([(coefficient * scaled).isfinite().all(-1) for coefficient in coefficients])
    if not finite.all():
        k, b, i = (~finite).nonzero()[0].tolist()
        raise LensteerError(
            f"coefficient {coefficients[k]} makes the vector of {labels[b]!r} at layer {chosen[i]} overflow: "
            "use a smaller one"
        )
    request = Request(
        method=method,
        window=window,
        spans=spans,
        coefficient_unit=unit,
        coefficients=coefficients,
        labels=labels,
        layers=chosen,
        scaled=scaled,
        length=relative_length(scaled, vectors, chosen),
        cases=limited(find_cases(traces, labels, spans, window), max_spans, seed),
        wanted=torch.ones(len(labels), len(chosen), dtype=torch.bool),
        controls=control_vectors(vectors, labels, chosen, unit, n_controls),
        share=first_token_shares(traces, labels, int(model.cfg.d_vocab)) if method == "signed" else None,
        samples=samples,
        max_spans=max_spans,
        seed=seed,
        memory=memory,
    )
    measured = measure(model, traces, request, progress=progress)
    request = replace(request, cases=request.cases[measured.kept])
    provenance = {"model": models.fingerprint(model).to_dict(), "vectors": dict(vectors.provenance)}
    scores = [scores_of(model, request, measured, k, provenance) for k in range(len(coefficients))]
    if exact_where_unreliable:
        scores = [with_exact_cells(model, traces, request, found, progress=progress) for found in scores]
    if not keep_cells:
        scores = [replace(found, cells=None) for found in scores]
    return tuple(scores) if isinstance(coefficient, Sequence) else scores[0]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise LensteerError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, choices))}")
