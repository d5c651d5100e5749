"""lensteer: find, locate, steer and verify behavior directions in reasoning models."""

from importlib import import_module as _import_module
from typing import Any as _Any

from lensteer import models
from lensteer._version import __version__
from lensteer.annotation import Annotator, Judge, Stability, annotate, grammar, labeling, rules, stable_spans
from lensteer.attention import (
    BehaviorAttention,
    ReceiverHeads,
    SentenceAttention,
    behavior_attention,
    receiver_heads,
    sentence_attention,
)
from lensteer.attribution import ControlTests, Fidelity, LayerScores, attribute, control_tests, efficiency, fidelity
from lensteer.attribution.overlap import EmbeddingOverlap, embedding_overlap
from lensteer.attribution.selection import SelectedLayers, select_layers
from lensteer.behaviors import BEHAVIORS, STEERED, LabelScheme, Sentence, Span
from lensteer.cache_steering import CachePlan, CacheVector, contrastive_pairs, fit_cache_vector
from lensteer.calibration import Calibration, calibrate, calibrate_many
from lensteer.contrast import Pair, Text, complete_pairs, fit_directions, load_pairs, pair_traces, pair_up
from lensteer.errors import LensteerError
from lensteer.evaluation import (
    GRAMMAR_MARGINS,
    Benchmark,
    ChosenCoefficients,
    Condition,
    Evaluation,
    Margins,
    Modes,
    benchmark,
    choose_coefficients,
    evaluate,
    measure_modes,
)
from lensteer.generation.jobs import Sampling, generate_traces
from lensteer.models import load_model
from lensteer.positions import (
    PositionScope,
    at,
    everywhere,
    everywhere_but_first,
    first,
    generated,
    onsets,
    prompt,
    sentence_starts,
    thinking,
)
from lensteer.steering import Gate, Schedule, SteeringPlan
from lensteer.tasks import Task, load_tasks
from lensteer.traces import Trace, load_traces, save_traces
from lensteer.vectors import (
    BehaviorVectors,
    Direction,
    DirectionMatches,
    fit_vectors,
    match_directions,
    probe_accuracy,
    unsupervised_directions,
)
from lensteer.vectors.geometry import CosineMatrix, cosine_matrix
from lensteer.vectors.projections import TokenProjections, token_projections

__all__ = [
    "BEHAVIORS",
    "GRAMMAR_MARGINS",
    "STEERED",
    "Annotator",
    "BehaviorAttention",
    "BehaviorVectors",
    "Benchmark",
    "CachePlan",
    "CacheVector",
    "Calibration",
    "ChosenCoefficients",
    "Condition",
    "ControlTests",
    "CosineMatrix",
    "Direction",
    "DirectionMatches",
    "EmbeddingOverlap",
    "Evaluation",
    "Fidelity",
    "Gate",
    "Judge",
    "LabelScheme",
    "LayerScores",
    "LensteerError",
    "Margins",
    "Modes",
    "Pair",
    "PositionScope",
    "ReceiverHeads",
    "Sampling",
    "Schedule",
    "SelectedLayers",
    "Sentence",
    "SentenceAttention",
    "Span",
    "Stability",
    "SteeringPlan",
    "Task",
    "Text",
    "TokenProjections",
    "Trace",
    "__version__",
    "annotate",
    "at",
    "attribute",
    "behavior_attention",
    "benchmark",
    "calibrate",
    "calibrate_many",
    "choose_coefficients",
    "complete_pairs",
    "contrastive_pairs",
    "control_tests",
    "cosine_matrix",
    "efficiency",
    "embedding_overlap",
    "evaluate",
    "everywhere",
    "everywhere_but_first",
    "explore",
    "export",
    "fidelity",
    "first",
    "fit_cache_vector",
    "fit_directions",
    "fit_vectors",
    "generate_traces",
    "generated",
    "grammar",
    "labeling",
    "load_model",
    "load_pairs",
    "load_plan",
    "load_tasks",
    "load_traces",
    "match_directions",
    "measure_modes",
    "models",
    "onsets",
    "pair_traces",
    "pair_up",
    "plots",
    "probe_accuracy",
    "prompt",
    "receiver_heads",
    "rules",
    "save_traces",
    "select_layers",
    "sentence_attention",
    "sentence_starts",
    "stable_spans",
    "thinking",
    "token_projections",
    "unsupervised_directions",
]


def __getattr__(name: str) -> _Any:
    """Import these on first access: plotly is slow to import, and most sessions export nothing."""
    if name in ("export", "plots"):
        return _import_module(f"lensteer.{name}")
    if name == "load_plan":
        return _import_module("lensteer.export").load_plan
    if name == "explore":
        return _import_module("lensteer.explorer").explore
    raise AttributeError(f"module 'lensteer' has no attribute {name!r}")
