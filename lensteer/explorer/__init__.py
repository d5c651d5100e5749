"""The notebook explorer: choose a behavior, a layer and positions on a chain, and see the effect of steering at once.

State, numbers and code are Python and work without a page; the widget needs the extra `notebook`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lensteer.annotation import Annotator
from lensteer.arguments import checked
from lensteer.attribution import LayerScores
from lensteer.cache_steering import CacheVector
from lensteer.errors import LensteerError
from lensteer.explorer.engine import Continuation, Engine, Result, continue_chain
from lensteer.explorer.state import Choices, State
from lensteer.expressions import parse_scope
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lensteer.explorer.widget import Explorer

__all__ = [
    "Choices",
    "Continuation",
    "Explorer",
    "Result",
    "State",
    "continue_chain",
    "explore",
    "parse_scope",
]


@checked()
def explore(
    model: TransformerBridge,
    vectors: BehaviorVectors,
    traces: Sequence[Trace],
    scores: LayerScores | None = None,
    layers: Mapping[str, int] | None = None,
    cache_vector: CacheVector | None = None,
    *,
    coefficients: Mapping[str, float] | None = None,
    kl_budget: float = 0.1,
    annotator: Annotator | None = None,
) -> Explorer:
    """The interactive explorer, as the last line of a notebook cell.

    The model is not modified: results are computed on copies that share its weights, in separate threads, so that other
    cells may run at the same time.

    Args:
        model: the bridge. Hooks that are on it now apply, later ones do not.
        vectors: of this model.
        traces: annotated chains to show.
        scores: drawn under the layers.
        layers: a layer for each behavior, marked there; from `select_layers`.
        cache_vector: allows editing the KV cache instead of the residual stream.
        coefficients: recommended ones in the unit "difference", marked: `choose_coefficients(...).coefficients`.
        kl_budget: nats per steered token. If the scores are KLs of what steering adds at an onset, as those of
            `attribute` are by default (unit "difference"), the coefficient that they predict to reach it is marked for
            each layer.
        annotator: for continuations; None leaves their sentences without labels.

    Raises:
        LensteerError: no widget library, no traces, vectors of another model, a plan that is on, an impossible budget.
    """
    widget = _widget()
    choices = Choices(vectors, tuple(traces), scores, layers, cache_vector, dict(coefficients or {}), kl_budget)
    if "model" in vectors.provenance:
        vectors.check_model(model)
    engine = Engine(model, choices, annotator)
    engine.chain(choices.initial().trace)  # raises for a trace of another model
    made: Explorer = widget.Explorer(engine)
    return made


def _widget() -> Any:
    try:
        from lensteer.explorer import widget
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("anywidget", "traitlets", "ipywidgets", "IPython", "psygnal"):
            raise
        raise LensteerError(
            f"the explorer needs {error.name!r}, which is not installed: pip install 'lensteer[notebook]'"
        ) from error
    return widget


def __getattr__(name: str) -> Any:
    """`Explorer` is loaded on first access: it needs the extra `notebook`."""
    if name == "Explorer":
        return _widget().Explorer
    raise AttributeError(f"module 'lensteer.explorer' has no attribute {name!r}")
