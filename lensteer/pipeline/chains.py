"""A run's chains and its annotator: generated or brought along, labeled by whom, and how far that can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from lensteer.annotation import (
    Annotator,
    Judge,
    JudgePlan,
    SentenceClassifier,
    agreement,
    fit_classifier,
    grammar,
    read_published,
    rules,
)
from lensteer.errors import LensteerError
from lensteer.files import read_jsonl
from lensteer.pipeline.run import Run
from lensteer.traces import Trace, load_traces

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def read_chains(path: str | Path, model: TransformerBridge | None = None) -> list[Trace]:
    """Chains from a file of traces or of the published annotation format, with the labels that they came with.

    Args:
        path: JSONL; a line with "annotated" is of the published format.
        model: whose tokenizer encodes published chains; without one each character is a token.

    Raises:
        LensteerError: a file of another kind, or traces of another model's tokenizer.
    """
    _, first = read_jsonl(Path(path))[0]
    if "annotated" in first:
        return read_published(path, None if model is None else model.tokenizer)[0]
    traces = load_traces(path)
    size = max((max(trace.ids) for trace in traces), default=0)
    if model is not None and size >= int(model.cfg.d_vocab):
        raise LensteerError(f"{path} holds the id {size}: its chains are of another tokenizer than this model's")
    return traces


def annotator_of(run: Run) -> Annotator:
    """The run's annotator, ready to be called. A judge says how much it will ask before it asks."""
    if run.annotator == "classifier":
        path = str(run.config.classifier)
        needs_model = SentenceClassifier.load(path).layer is not None
        return SentenceClassifier.load(path, run.model if needs_model else None)
    if run.annotator == "judge":
        return Judge(cache=run.path("judge"), announce=_announce if run.progress else None, progress=run.progress)
    return grammar if run.annotator == "grammar" else rules


def _announce(plan: JudgePlan) -> None:
    tqdm.write(f"judge: {plan.calls} calls, about {plan.prompt_tokens_estimate} tokens; {plan.cached} replies cached")


def trust(run: Run, given: Sequence[Trace], annotated: Sequence[Trace]) -> dict[str, Any]:
    """Flat figures on how good the annotator is: against the labels that the chains came with, or as it was fitted."""
    found: dict[str, Any] = {"name": run.annotator, "against": None}
    if any(trace.spans for trace in given):
        return found | {"against": "the labels that the chains came with", **agreement(given, annotated).figures()}
    if run.annotator == "classifier":
        facts = SentenceClassifier.load(str(run.config.classifier)).provenance
        return found | {"against": "annotated chains that it was not trained on, in turn", **_figures(facts)}
    return found


def _figures(facts: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {"n_chains": facts["n_chains"], "n_sentences": sum(facts["n_spans"].values())}
    for name, values in facts["cross_validated"]["sentences"].items():
        flat |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
    return flat


def fit_annotator(
    chains: str | Path,
    out: str | Path,
    *,
    abstain: float = 0.0,
    model: TransformerBridge | None = None,
    layer: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a classifier on annotated chains and save it; returns its figures on chains held out in turn.

    Raises:
        LensteerError: no annotated chains there, too few of them, or an impossible option.
    """
    traces = [trace for trace in read_chains(chains, model) if trace.spans]
    if not traces:
        raise LensteerError(f"{str(chains)!r} holds no annotated chain: there is nothing to learn from")
    classifier = fit_classifier(traces, model=model, layer=layer, abstain=abstain, seed=seed)
    classifier.save(out)
    return _figures(classifier.provenance)
