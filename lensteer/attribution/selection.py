"""Selects one layer per behavior from scores and overlaps, with the reason as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from lensteer.arguments import checked
from lensteer.attribution import LayerScores, control_tests
from lensteer.attribution.overlap import EmbeddingOverlap
from lensteer.behaviors import STEERED, check_behavior
from lensteer.errors import LensteerError
from lensteer.results import Saved

#: The share of the model's last layers that is left out by default, rounded up. Mean activations grow with
#: depth, so vectors of the same length score highest where hardly any layer is left to use them.
DROP_TRAILING = 0.125
#: A layer is not selected by scores of fewer spans than this, ...
MIN_SPANS = 10
#: ... nor if the intervals of more than this share of the model's layers overlap with the best one's, ...
OVERLAPPING = 1 / 3
#: ... nor if this share of the control vectors of some kind scores as much there.
CONTROL_LEVEL = 0.05


@dataclass(frozen=True, eq=False, repr=False)
class SelectedLayers(Saved, Mapping[str, int]):
    """The chosen layer of each behavior: `layers["backtracking"]` is a layer.

    Attributes:
        layers: Behavior → layer; read-only.
        why: Behavior → the reason for that layer, as text; read-only.
    """

    layers: Mapping[str, int]
    why: Mapping[str, str]

    def __post_init__(self) -> None:
        if set(self.layers) != set(self.why):
            raise LensteerError(f"layers for {sorted(self.layers)}, but reasons for {sorted(self.why)}")
        # Deeply frozen: a result must not change after a plan was made from it.
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(self, "why", MappingProxyType(dict(self.why)))

    def __getitem__(self, label: str) -> int:
        return self.layers[check_behavior(label, tuple(self.layers))]

    def __contains__(self, label: object) -> bool:
        return label in self.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@checked()
def select_layers(
    scores: LayerScores,
    overlap: EmbeddingOverlap | None = None,
    *,
    behaviors: Sequence[str] | None = None,
    drop_leading: bool | int = True,
    drop_trailing: float | int = DROP_TRAILING,
    factor: float = 1.2,
    controls: LayerScores | None = None,
) -> SelectedLayers:
    """For each behavior the layer with the largest mean score, first and last layers left out; or the middle layer.

    The middle layer is chosen, and `why` says so, if the scores cannot distinguish layers: if they rest on few spans or
    are close to their noise floor, if the intervals of more than a third of the layers overlap with the best one's, or
    if control vectors score as much there.

    Use `exact` scores at a small coefficient: at large ones every layer of mini-R1 saturates. On three organisms
    (two seeds of Qwen2's architecture, one of Llama's) they correlate best with the effect of steering at a layer at
    equal KL (Spearman .74 over layers, 95 % interval .61 to .76), and over all three the choice of every other score
    was worse, with an interval that excludes 0; the published score's was about the worst
    (`analyses/which_score_predicts_steering.py`, 2026-11-21 in `analyses/LOG.md`). On mini-R1, a small language model,
    they and Fisher scores correlate best with it, too (Spearman .58, 95 % interval .32 to .62, ten layers), but no
    score's choice is better than the middle layer beyond chance, nor is a sweep of ten chains per layer: steering works
    from two fifths of the depth on (`docs/choices.md`).

    Args:
        scores: Scores by behavior and layer.
        overlap: Overlap of the same vectors; without it no leading layer is left out by rule.
        behaviors: Which to choose for; by default the steered ones that were scored, or else all scored ones.
        drop_leading: True leaves out those of `overlap.leading_layers(factor)`, False none, a number that many layers.
        drop_trailing: How many of the model's last layers to leave out: a whole number of layers, or a
            fraction below 1 of all of them, rounded up.
        factor: The overlap of a leading layer exceeds this many times the median over layers.
        controls: Scores of the same vectors with those of control vectors, if there are any.

    Returns:
        The layers, each with a sentence on the reason.

    Raises:
        LensteerError: A behavior without scores, an overlap of other layers, or no layer left.
    """
    if behaviors is None:
        behaviors = [b for b in STEERED if b in scores.labels] or scores.labels
    n_last = _trailing(drop_trailing, scores.n_layers)
    last = [layer for layer in scores.layers if layer >= scores.n_layers - n_last]
    layers, why = {}, {}
    first: Sequence[int]
    for label in dict.fromkeys(behaviors):
        if not isinstance(drop_leading, bool):
            first, reason = range(drop_leading), "left out by request"
        elif not drop_leading:
            first, reason = range(0), ""
        elif overlap is None:
            first, reason = range(0), "no overlap was given, so no leading layer was left out"
        else:
            first, reason = _leading(scores, overlap, label, factor)
        layers[label], best = _best(scores, label, first, last, controls)
        skipped = [layer for layer in scores.layers if layer in first]
        words = [
            best,
            f"{layer_names(skipped)} {reason}" if skipped else reason if drop_leading is True else "",
        ]
        if last:
            words.append(f"{layer_names(last)} left out, because too few layers follow to use the vector")
        why[label] = "; ".join(filter(None, words))
    return SelectedLayers(layers, why)


def _leading(scores: LayerScores, overlap: EmbeddingOverlap, label: str, factor: float) -> tuple[Sequence[int], str]:
    """The leading layers that mostly encode the current token, and the figures that show it."""
    check_behavior(label, overlap.labels)
    if not set(scores.layers) <= set(overlap.layers):
        raise LensteerError(
            f"overlap at layers {list(overlap.layers)}, scores at {list(scores.layers)}: "
            "pass the overlap of the vectors that were scored"
        )
    row = overlap.embedding.maximum[overlap.labels.index(label)].double()
    first = overlap.layers[: overlap.leading_layers(factor)[label]]
    rule = f"{factor:g} times the median over layers ({float(row.quantile(0.5)):.2f})"
    cosines = ", ".join(f"{value:.2f}" for value in row[: len(first)].tolist())
    if not first:
        return (
            first,
            f"no leading layer left out: its overlap with the embedding ({row[0]:.2f}) is below {rule}",
        )
    return first, f"left out, because the overlap with the embedding ({cosines}) exceeds {rule}"


def _trailing(drop: float | int, n_layers: int) -> int:
    """How many last layers to leave out."""
    if drop < 0 or (isinstance(drop, float) and drop >= 1) or drop >= n_layers:
        raise LensteerError(
            f"drop_trailing={drop} of {n_layers} layers: pass a number of layers below that, or a fraction below 1"
        )
    return math.ceil(drop * n_layers) if isinstance(drop, float) else drop


def _best(
    scores: LayerScores, label: str, first: Sequence[int], last: Sequence[int], controls: LayerScores | None
) -> tuple[int, str]:
    """The layer with the largest mean among those that remain, or the middle one, and the reason."""
    b = scores.row(label)
    kept = [i for i, layer in enumerate(scores.layers) if layer not in first and layer not in last]
    if not kept:
        raise LensteerError(
            f"no layer is left for {label!r} of {layer_names(scores.layers)}: {layer_names(first)} left out "
            f"at the front, {layer_names(last)} at the end; lower drop_leading or drop_trailing"
        )
    mean, low, high = (values[b].tolist() for values in (scores.mean, scores.low, scores.high))
    if any(math.isnan(mean[i]) for i in kept):
        raise LensteerError(
            f"{label!r} has no scores ({scores.n_spans[b]} spans): attribute it on traces that contain it"
        )
    best = max(kept, key=lambda i: mean[i])
    interval = "no interval" if math.isnan(low[best]) else f"95 % interval {low[best]:.2g} to {high[best]:.2g}"
    words = (
        f"layer {scores.layers[best]} of {scores.n_layers}: the largest {scores.name} "
        f"({mean[best]:.2g} {scores.unit}, {interval}, {scores.n_spans[b]} spans) "
        f"among {layer_names([scores.layers[i] for i in kept])}"
    )
    rivals = [scores.layers[i] for i in kept if i != best and high[i] >= low[best]]
    if len(rivals) == 1:
        words += f"; the interval of {layer_names(rivals)} overlaps with it"
    elif rivals:
        words += f"; the intervals of {layer_names(rivals)} overlap with it"
    doubts = _doubts(scores, label, scores.layers[best], len(rivals), controls)
    if not doubts:
        return scores.layers[best], words
    middle = min((scores.layers[i] for i in kept), key=lambda layer: abs(layer - scores.n_layers // 2))
    return middle, f"layer {middle} of {scores.n_layers}, the middle one, because {' and '.join(doubts)}; {words}"


def _doubts(scores: LayerScores, label: str, layer: int, n_rivals: int, controls: LayerScores | None) -> list[str]:
    """Why the scores cannot distinguish layers, as text; empty if they can."""
    n, doubts = scores.n_spans[scores.row(label)], []
    if n < MIN_SPANS:
        doubts.append(f"{n} spans are too few to tell layers apart")
    if bool(scores.below_noise()[scores.row(label), scores.layers.index(layer)]):
        doubts.append(f"the scores are under ten times their noise floor ({scores.noise_floor:.2g} {scores.unit})")
    if 1 + n_rivals > OVERLAPPING * scores.n_layers:
        doubts.append(f"the intervals of {1 + n_rivals} layers overlap, so that the scores cannot tell them apart")
    if controls is not None and label in controls.labels and layer in controls.layers:
        tests = control_tests(controls)
        enough = 1 / (1 + tests.n) <= CONTROL_LEVEL
        cell = tests.labels.index(label), tests.layers.index(layer)
        for k, kind in enumerate(tests.kinds):
            if enough and float(tests.p[k][cell]) > CONTROL_LEVEL:
                doubts.append(
                    f"{float(tests.p[k][cell]):.0%} of the {kind.replace('_', '-')} control vectors score as much at "
                    f"layer {layer}"
                )
    return doubts


def layer_names(layers: Sequence[int]) -> str:
    """Layers as text: "layer 3", "layers 1 to 6", "layers 1, 4 and 5"."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers[:-1]))} and {layers[-1]}" if layers else "no layers"
