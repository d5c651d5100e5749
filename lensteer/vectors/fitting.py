"""From annotated traces to behavior vectors, in one pass."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from lensteer import models
from lensteer._version import __version__
from lensteer.activations import Window, stream_features, trace_key
from lensteer.arguments import checked
from lensteer.errors import LensteerError
from lensteer.files import digest
from lensteer.generation.parallel import NO_THREADS, pool_on, run_batches, shards
from lensteer.traces import Trace, label_axis
from lensteer.vectors.constructions import PAIRS, UNSUPERVISED, ContrastSums, Recipe, isotropic
from lensteer.vectors.kept import KeptFits
from lensteer.vectors.probes import check_memory
from lensteer.vectors.values import NO_SPANS, BehaviorVectors, Controls

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_LIBRARIES = ("torch", "transformers", "transformer-lens")


@checked()
def fit_vectors(
    model: TransformerBridge,
    traces: Sequence[Trace],
    *,
    window: str | Window = Recipe.window,
    negatives: str = Recipe.negatives,
    aggregation: str = Recipe.aggregation,
    construction: str = Recipe.construction,
    behaviors: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    n_controls: int = 0,
    n_bootstrap: int = 0,
    seed: int = 0,
    batch_size: int = 16,
) -> BehaviorVectors:
    """Fit one direction per behavior and layer over the spans of annotated traces, by default a difference of means.

    The defaults are those that raise the behaviors of mini-R1, a small language model, most at equal KL: ±2, ±3
    and ±5 are level and ahead of "onset", "span" and "published", and of "all" tokens as negatives (docs/choices.md).
    On the embedded organism, whose sentences have five or six tokens, "onset" is ahead.

    A behavior without spans has no vector; its count is 0. The sums take `16 · behaviors · (1 + n_controls +
    n_bootstrap) · layers · d_model` bytes: 0.5 GB for 100 replicates of a model with 28 layers of width 1536. All
    constructions but "difference" also keep the features of all spans, `4 · spans · layers · d_model` bytes, up to a
    limit of 4 GiB, and need a fit per layer for each control and replicate.

    Args:
        model: whose residual stream is read.
        traces: annotated.
        window: which positions represent a span; see `Window.parse`.
        negatives: what is subtracted; see `Recipe`.
        aggregation: what is weighted equally: each "token", "span" or "trace".
        construction: "difference" of means, "logistic", "lda", "whitened" or "pca"; see `Recipe` and `KeptFits`.
        behaviors: in the order of their axis; None for those of the spans: the default scheme, or all that
            occur if there are others.
        layers: by default all.
        site: where in each block; steering acts on resid_post; others are for analysis.
        n_controls: random vectors of each kind, from the same pass; see `Controls`.
        n_bootstrap: replicates on resampled traces, from the same pass.
        seed: of controls and replicates.
        batch_size: traces per forward.

    Raises:
        LensteerError: an unknown option, layer or label; no spans at all; activations that are not finite; features
            to keep that exceed the limit.
    """
    recipe = Recipe(str(window), negatives, aggregation, construction)
    (vectors,) = fit_recipes(
        model,
        traces,
        [recipe],
        behaviors=behaviors,
        layers=layers,
        site=site,
        n_controls=n_controls,
        n_bootstrap=n_bootstrap,
        seed=seed,
        batch_size=batch_size,
    )
    return vectors


def fit_recipes(
    model: TransformerBridge,
    traces: Sequence[Trace],
    recipes: Sequence[Recipe],
    *,
    behaviors: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    n_controls: int = 0,
    n_bootstrap: int = 0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[BehaviorVectors]:
    """Fit vectors by several recipes in the same pass: one forward per trace for all of them.

    Arguments and errors are those of `fit_vectors`. On a pool (`distributed.Actors`), each worker sums over its traces,
    and the sums are merged; a trace that fails there is set aside and not counted.
    """
    if any(recipe.negatives == PAIRS for recipe in recipes):
        raise LensteerError("negatives 'pairs' are of pairs, and traces have none: use fit_directions(model, pairs)")
    if odd := [recipe.construction for recipe in recipes if recipe.construction in UNSUPERVISED]:
        raise LensteerError(f"construction {odd[0]!r} has no behaviors: use unsupervised_directions(model, traces)")
    windows = list(dict.fromkeys(recipe.window for recipe in recipes))
    labels = label_axis(traces) if behaviors is None else behaviors
    chosen = tuple(range(models.n_layers(model)) if layers is None else layers)
    if any(recipe.construction != "difference" for recipe in recipes):  # raise before the first forward
        check_memory(sum(len(trace.spans) for trace in traces), len(chosen), models.d_model(model))
    add = partial(
        _sums,
        recipes=recipes,
        reading=dict(windows=windows, layers=chosen, site=site, batch_size=batch_size),
        summing=dict(labels=labels, n_controls=n_controls, n_bootstrap=n_bootstrap, seed=seed),
    )
    ordered = traces
    if pool_on(model) is not None:  # so that shards take equally long
        ordered = sorted((trace for trace in traces if trace.spans), key=lambda trace: -len(trace.ids))
    sums: list[ContrastSums | KeptFits] = []
    keys = []
    parts = shards(model, ordered, batch_size, dealt=True)
    for part, found in run_batches(model, add, parts, name=lambda trace: trace.id, least=NO_THREADS):
        keys += [trace_key(trace) for trace in part if trace.spans]
        if not sums:
            sums = found
            continue
        for mine, theirs in zip(sums, found, strict=True):
            mine.merge(theirs)  # type: ignore[arg-type]  # of the same recipe
    if not sums:
        raise LensteerError(NO_SPANS)
    keys.sort()
    provenance = {
        "model": models.fingerprint(model).to_dict(),
        "site": site,
        "traces": digest("\n".join(sorted(keys)).encode()),
        "seed": seed,
    }
    made = []
    for each in sums:
        made.append(vectors_of(each, chosen, {**provenance, "versions": library_versions(each.recipe)}))
    return made


def _sums(
    model: TransformerBridge,
    traces: Sequence[Trace],
    recipes: Sequence[Recipe],
    reading: dict[str, Any],
    summing: dict[str, Any],
) -> list[ContrastSums | KeptFits]:
    """Each recipe's sums over some traces."""
    options = {**summing, "n_layers": len(reading["layers"]), "d_model": models.d_model(model)}
    sums = [
        (ContrastSums if recipe.construction == "difference" else KeptFits)(
            recipe, window=reading["windows"].index(recipe.window), **options
        )
        for recipe in recipes
    ]
    for features in stream_features(model, traces, **reading):
        for each in sums:
            each.add(features)
    return sums


def library_versions(recipe: Recipe) -> dict[str, str]:
    """Versions of the libraries that a recipe's vectors depend on; for lensteer, that of the source tree."""
    used = [*_LIBRARIES, *([] if recipe.construction in ("difference", "pca") else ["scikit-learn"])]
    return {"lensteer": __version__, **{name: _version(name) for name in used}}


@cache
def _version(library: str) -> str:
    return importlib.metadata.version(library)  # reads a file


def vectors_of(sums: ContrastSums | KeptFits, layers: Sequence[int], provenance: dict[str, object]) -> BehaviorVectors:
    """The vectors from accumulated sums or features.

    Raises:
        LensteerError: no spans, or a behavior without negatives.
    """
    if sums.n_traces == 0:
        raise LensteerError(NO_SPANS)
    present = sums.counts > 0
    raw = sums.difference()[present]
    if not (raw.isfinite().all() and raw.flatten(1).any(1).all()):
        raise LensteerError(
            f"negatives {sums.recipe.negatives!r} leave nothing to subtract: all spans are of one behavior; use 'all'"
        )
    controls = replicates = None
    if sums.n_controls:
        draws = isotropic(sums.n_controls, len(layers), raw.shape[-1], seed=sums.seed)
        shuffled = sums.shuffled()[:, present]
        controls = Controls(draws.float(), sums.covariance_matched().float(), shuffled.float())
    if sums.n_bootstrap:
        replicates = sums.replicates()[:, present].float()
        replicates = replicates[replicates.flatten(1).isfinite().all(dim=1)]
    return BehaviorVectors(
        raw=raw.float(),
        mean_norm=torch.linalg.vector_norm(sums.all_tokens(), dim=-1).float(),
        labels=tuple(label for label, there in zip(sums.labels, present.tolist(), strict=True) if there),
        layers=tuple(layers),
        counts=dict(zip(sums.labels, sums.counts.tolist(), strict=True)),
        n_traces=sums.n_traces,
        recipe=sums.recipe,
        provenance=provenance,
        controls=controls,
        replicates=replicates,
    )
