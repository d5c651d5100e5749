"""A run's chains (generated, given or from pairs), its annotators, and the annotators' accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from lensteer import models
from lensteer.annotation import (
    Annotator,
    Judge,
    JudgePlan,
    JudgeScore,
    SentenceClassifier,
    agreement,
    annotate,
    fit_classifier,
    grammar,
    left_out_source,
    masking,
    read_published,
    rules,
)
from lensteer.contrast import Pair, complete_pairs, load_pairs, with_system
from lensteer.errors import LensteerError
from lensteer.files import read_jsonl, write_jsonl
from lensteer.pipeline.own import is_own, load_own
from lensteer.pipeline.run import Run
from lensteer.report import Example
from lensteer.results import reading, revived
from lensteer.traces import Trace, load_traces
from lensteer.transcripts import is_transcript, read_transcripts

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

CUES_MASKED, RANDOM_MASKED = "cue words masked", "random words masked"
CLASSIFIER, EXAMPLES = "classifier.safetensors", "examples.jsonl"
COHERENCE = (
    "How coherent is the response as a text: grammatical, understandable and free of meaningless repetition, whether "
    "or not it is right? A response that was cut off at the end can be fully coherent."
)


def read_chains(path: str | Path | Sequence[str | Path], model: TransformerBridge | None = None) -> list[Trace]:
    """Chains from files of traces, of the published annotation format or of plain text, with any labels in them.

    Chains on the same task in several files become that task's samples, in the order of the files.

    Args:
        path: one or several JSONL files; a line with "annotated" is in the published format, one without token ids a
            plain text (`read_transcripts`).
        model: with the tokenizer for published chains; without one each character is a token.

    Raises:
        LensteerError: a file of another kind, traces of another model's tokenizer, or chains without a token.
    """
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    found, seen = [], Counter[str]()
    for each in paths:
        for trace in _read(each, model):
            found.append(replace(trace, sample=seen[trace.task.id]) if len(paths) > 1 else trace)
            seen[trace.task.id] += 1
    if empty := [trace.id for trace in found if not trace.response_ids]:
        raise LensteerError(f"{len(empty)} chain(s) without a token, such as {empty[0]!r}: leave them out")
    return found


def _read(path: str | Path, model: TransformerBridge | None) -> list[Trace]:
    _, first = read_jsonl(Path(path))[0]
    if "annotated" in first:
        tokenizer, marks = (None, None) if model is None else (model.tokenizer, models.thought_marks(model))
        return read_published(path, tokenizer, marks=marks)[0]
    if is_transcript(first):
        return read_transcripts(path, model)
    traces = load_traces(path)
    if model is not None:
        with reading(path):
            models.check_ids(model, [trace.ids for trace in traces])
    return traces


def read_examples(run: Run) -> list[Example]:
    """The chains on held-out tasks that a run kept to be shown.

    Raises:
        LensteerError: a missing file, or a line that is no example.
    """
    path, found = run.path(EXAMPLES), []
    for number, row in read_jsonl(path):
        with reading(f"{path}, line {number}"):
            trace = Trace.from_dict(row["trace"])
            found.append(Example(revived(str, row["behavior"]), revived(str, row["kind"]), trace))
    return found


def pairs_of(run: Run) -> tuple[list[Pair], list[Pair]]:
    """The run's contrastive pairs with completions on both sides, and the pairs that its vectors are fitted on.

    The model writes missing completions once. Pairs with their own position, such as repeng's, are fitted as given.

    Raises:
        LensteerError: pairs that cannot be read or encoded, or no answer at all.
    """
    c = run.config
    assert c.pairs is not None
    given = with_system(load_pairs(c.pairs, c.pair_format), c.system)
    if all(text.answered for pair in given for text in (pair.positive, pair.negative)):
        if run.engine is not None:
            raise LensteerError(f"all pairs of {c.pairs!r} have answers: an engine has nothing to write; leave it out")
        return given, given
    path = run.path("pairs.jsonl")
    if not path.exists():
        written = complete_pairs(
            run.model,
            given,
            max_new_tokens=c.train_tokens,
            temperature=c.temperature,
            top_p=c.top_p,
            seed=c.seed,
            batch_size=c.batch_size,
            engine=run.engine,
            path=run.path("answers.jsonl"),
            progress=run.progress,
        )
        write_jsonl(path, map(asdict, written))
        if run.engine is not None:
            run.note(f"The engine {run.engine.name!r} wrote the answers of pairs.")
    with reading(path, "remove it, and the model answers again"):
        completed: list[Pair] = [revived(Pair, values) for _, values in read_jsonl(path)]
    return completed, given if all(pair.position is not None for pair in given) else completed


def annotators_of(run: Run) -> dict[str, Annotator]:
    """The run's annotators by name, ready to be called. A judge reports its number of calls beforehand."""
    return {name: _annotator(run, name) for name in run.annotators}


def with_masks(annotators: Mapping[str, Annotator]) -> dict[str, Annotator]:
    """The annotators, and the first one with cue words masked and with the same number of random words masked.

    The cue words are those of English reasoning, so a grammar's chains and the user's own labels are not masked. A
    judge is not masked, to save calls.
    """
    first, annotator = next(iter(annotators.items()), ("", None))
    if annotator is None or annotator is grammar or is_own(first) or isinstance(annotator, Judge):
        return dict(annotators)
    blind = {f"{first}, {CUES_MASKED}": masking(annotator)}
    return {**annotators, **blind, f"{first}, {RANDOM_MASKED}": masking(annotator, control=True)}


def _annotator(run: Run, name: str) -> Annotator:
    if name == "classifier":
        path = str(run.config.classifier or run.path(CLASSIFIER))
        needs_model = SentenceClassifier.load(path).layer is not None
        return SentenceClassifier.load(path, run.model if needs_model else None)
    if is_own(name):
        return load_own(name)
    if name == "judge":
        return Judge(cache=run.path("judge"), announce=_announce if run.progress else None, progress=run.progress)
    return grammar if name == "grammar" else rules


def coherence_of(run: Run) -> JudgeScore | None:
    """The judge of how coherent a text is, if the run asks for one; its replies are kept in the run's folder."""
    return JudgeScore(COHERENCE, cache=run.path("judge")) if run.config.coherence else None


def _announce(plan: JudgePlan) -> None:
    tqdm.write(f"judge: {plan.calls} calls, about {plan.prompt_tokens_estimate} tokens; {plan.cached} replies cached")


def fit_own_classifier(run: Run, given: Sequence[Trace]) -> None:
    """Fit the run's classifier on its chains' labels, if it has none.

    Raises:
        LensteerError: the chains have no labels.
    """
    if "classifier" not in run.annotators or run.config.classifier or run.path(CLASSIFIER).exists():
        return
    if not any(trace.spans for trace in given):
        raise LensteerError(
            f"{list(run.config.chains)} came without labels, so that no classifier can be fitted on them: give "
            "--annotator rules, or --classifier with the file that `lensteer annotate fit` wrote"
        )
    fit_classifier(given, seed=run.config.seed).save(run.path(CLASSIFIER))


def trust(run: Run, given: Sequence[Trace]) -> dict[str, Any]:
    """Flat figures on the annotators' accuracy: compared with the chains' own labels, or from when they were fitted.

    A classifier that was fitted on these labels is evaluated on questions held out in turn, and, if there are several
    files of chains, also on files held out in turn.
    """
    found: dict[str, Any] = {"name": next(iter(run.annotators), None), "names": list(run.annotators), "against": None}
    # Labels of pairs are of whole texts, so they cannot evaluate an annotator of sentences.
    labeled = [] if run.config.pairs else [trace for trace in given if trace.spans]
    files = [i for i, n in enumerate(run.stages["traces"].get("files", ())) for _ in range(n)]
    sources = [file for file, trace in zip(files, given, strict=True) if trace.spans] if files else []
    for name in run.annotators:
        prefix = "" if name == run.annotators[0] else f"{name}."
        figures: dict[str, Any] = {}
        if name == "classifier" and run.config.classifier is None:
            facts = SentenceClassifier.load(run.path(CLASSIFIER)).provenance
            figures = {"against": "labels of questions that it was not fitted on, in turn", **_figures(facts)}
            if len(set(sources)) > 1:
                out = left_out_source(labeled, sources, seed=run.config.seed)
                figures |= {f"left_out.{key}": value for key, value in out.figures().items()}
        elif labeled:
            figures = {
                "against": "the labels that the chains came with",
                **agreement(labeled, annotate(labeled, _annotator(run, name))).figures(),
            }
        elif name == "classifier":
            facts = SentenceClassifier.load(str(run.config.classifier)).provenance
            figures = {"against": "annotated chains that it was not fitted on, in turn", **_figures(facts)}
        found |= {prefix + key: value for key, value in figures.items()}
    return found


def judged_on_its_questions(run: Run, given: Sequence[Trace]) -> list[str]:
    """Dev and held-out tasks whose question is in the labeled chains that the classifier was fitted on."""
    if "classifier" not in run.annotators or run.config.classifier is not None:
        return []
    asked = {_plain(trace.task.prompt) for trace in given if trace.spans and trace.task.prompt}
    return [
        task.id
        for split in ("dev", "test")
        for task in run.tasks(split)
        if any(_plain(task.prompt) in question for question in asked)
    ]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _figures(facts: dict[str, Any]) -> dict[str, Any]:
    with reading("what the classifier's file says of its training", "fit it again"):
        spans = revived(dict[str, int], facts["n_spans"])
        flat: dict[str, Any] = {"n_chains": revived(int, facts["n_chains"]), "n_sentences": sum(spans.values())}
        for name, values in facts["cross_validated"]["sentences"].items():
            flat |= zip((name, f"{name}_low", f"{name}_high"), revived(tuple[float, float, float], values), strict=True)
    return flat


def fit_annotator(
    chains: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    abstain: float = 0.0,
    model: TransformerBridge | None = None,
    layer: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a classifier on annotated chains and save it; return its figures on chains held out in turn.

    Raises:
        LensteerError: no or too few annotated chains, or an invalid option.
    """
    traces = [trace for trace in read_chains(chains, model) if trace.spans]
    if not traces:
        raise LensteerError(f"{str(chains)!r} holds no annotated chain: there is nothing to learn from")
    classifier = fit_classifier(traces, model=model, layer=layer, abstain=abstain, seed=seed)
    classifier.save(out)
    return _figures(classifier.provenance)
