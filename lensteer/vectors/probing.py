"""Accuracy of probes for each behavior at each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer.activations import Window, stream_features
from lensteer.arguments import checked
from lensteer.behaviors import check_behavior
from lensteer.errors import LensteerError
from lensteer.statistics import Ratio, bootstrap_interval
from lensteer.traces import Trace, label_axis
from lensteer.vectors.probes import check_memory, cross_validated
from lensteer.vectors.values import NO_SPANS

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class ProbeAccuracy:
    """Cross-validated balanced accuracy per behavior and layer: ½ (sensitivity + specificity).

    Attributes:
        labels: of the behavior axis.
        layers: of the layer axis.
        mean: 0.5 is chance; NaN for a behavior that some fold's training tasks lack.
        low: lower end of the 95 % interval, by bootstrap over tasks (the fits are not repeated).
        high: upper end.
        n_spans: spans of each behavior.
        n_tasks: number of tasks, which are held out and resampled as a whole.
        n_folds: of the cross-validation.
        window: which positions represent a span.
        provenance: model and site.
    """

    labels: tuple[str, ...]
    layers: tuple[int, ...]
    mean: Float[Tensor, "behavior layer"]
    low: Float[Tensor, "behavior layer"]
    high: Float[Tensor, "behavior layer"]
    n_spans: tuple[int, ...]
    n_tasks: int
    n_folds: int
    window: str
    provenance: dict[str, Any]

    def to_dataframe(self) -> Any:
        """One row per behavior and layer."""
        import pandas as pd

        return pd.DataFrame(
            [
                dict(
                    behavior=label,
                    layer=layer,
                    mean=float(self.mean[b, i]),
                    low=float(self.low[b, i]),
                    high=float(self.high[b, i]),
                    n_spans=self.n_spans[b],
                )
                for b, label in enumerate(self.labels)
                for i, layer in enumerate(self.layers)
            ]
        )


@checked()
def probe_accuracy(
    model: TransformerBridge,
    traces: Sequence[Trace],
    *,
    window: str | Window = "onset",
    behaviors: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    n_folds: int = 5,
    seed: int = 0,
    batch_size: int = 16,
) -> ProbeAccuracy:
    """How well logistic probes separate each behavior's spans from all others, on held-out tasks.

    The probes are those of `fit_vectors(..., construction="logistic")`. Folds are made of whole tasks, so that no
    trace, and no second chain on the same task, is in both training and test. The features of all spans stay in memory:
    `4 · spans · layers · d_model` bytes, up to a limit of 4 GiB.

    Args:
        model: whose residual stream is read.
        traces: annotated.
        window: which positions represent a span; see `Window.parse`. All but "onset" include the sentence itself, or a
            part of it.
        behaviors: spans of others are an error. None: as in `fit_vectors`.
        layers: by default all.
        site: where in each block.
        n_folds: of the cross-validation.
        seed: of the bootstrap. (The folds are not random.)
        batch_size: traces per forward.

    Raises:
        LensteerError: an unknown option, layer or label; no spans; fewer tasks than folds; features that exceed the
            limit; activations that are not finite.
    """
    chosen = tuple(range(models.n_layers(model)) if layers is None else layers)
    n_spans = sum(len(trace.spans) for trace in traces)
    if not n_spans:
        raise LensteerError(NO_SPANS)
    check_memory(n_spans, len(chosen), models.d_model(model))
    own = label_axis(traces) if behaviors is None else tuple(behaviors)
    number = {task: i for i, task in enumerate(sorted({trace.task.id for trace in traces if trace.spans}))}
    features, behavior, task = [], [], []
    for found in stream_features(model, traces, windows=[window], layers=chosen, site=site, batch_size=batch_size):
        features.append(found.spans[0].clone())  # not a view, which would keep the whole batch
        behavior += [own.index(check_behavior(label, own)) for label in found.labels]
        task += [number[traces[found.index].task.id]] * len(found.labels)
    truth, group = torch.tensor(behavior), torch.tensor(task)
    odds = cross_validated(torch.cat(features), truth, group, len(own), n_folds=n_folds)
    is_own = truth == torch.arange(len(own))[:, None]
    mean, low, high = torch.full((3, len(own), len(chosen)), torch.nan, dtype=torch.float64)
    for b, mine in enumerate(is_own):
        if odds[b].isnan().any():
            continue

        def rate(of: Tensor, called: Tensor) -> Ratio:  # per task, the share of some spans that are called positive
            hits, spans = torch.zeros(2, len(number), len(chosen), dtype=torch.float64)
            hits.index_add_(0, group, (called & of).T.double())
            spans.index_add_(0, group, of.double()[:, None].expand(-1, len(chosen)))
            return Ratio(hits.numpy(), spans.numpy())

        # Sensitivity less false positive rate: twice the balanced accuracy less 1, paired by task.
        informed = bootstrap_interval(rate(mine, odds[b] > 0), rate(~mine, odds[b] > 0), seed=seed)
        for into, value in ((mean, informed.value), (low, informed.low), (high, informed.high)):
            into[b] = (1 + torch.as_tensor(value)) / 2
    return ProbeAccuracy(
        labels=own,
        layers=chosen,
        mean=mean,
        low=low,
        high=high,
        n_spans=tuple(is_own.sum(1).tolist()),
        n_tasks=len(number),
        n_folds=n_folds,
        window=str(Window.parse(window)),
        provenance={"model": models.fingerprint(model).to_dict(), "site": site},
    )
