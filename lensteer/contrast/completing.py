"""Generates completions for both sides of pairs, and turns pairs into annotated traces, for attribution."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lensteer import models
from lensteer.annotation.alignment import align
from lensteer.annotation.splitting import split_sentences
from lensteer.arguments import checked
from lensteer.behaviors import Sentence
from lensteer.contrast.fitting import encode_text
from lensteer.contrast.pairs import Pair, Text
from lensteer.errors import LensteerError
from lensteer.generation import Engine, Generated
from lensteer.generation.jobs import Job, Sampling, resume_jobs, trace_of
from lensteer.tasks import Task
from lensteer.traces import Trace, with_spans

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SPANS = ("completion", "sentence")


@checked()
def complete_pairs(
    model: TransformerBridge,
    pairs: Sequence[Pair],
    *,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    thinking: bool = True,
    engine: Engine | None = None,
    path: str | Path | None = None,
    progress: bool = False,
) -> list[Pair]:
    """Let the model answer on each side that has no completion: for pairs of system prompts, as in persona vectors.

    Each distinct prompt is answered once. The end token is not part of an answer.

    Args:
        model: the bridge; plans that are on apply.
        pairs: such as those of a persona trait.
        max_new_tokens: per answer.
        temperature: 0 is greedy.
        top_p: as in `generate_traces`.
        seed: for all draws; each prompt has its own seed.
        batch_size: answers per batch.
        thinking: whether the template opens `<think>`, if it has that option.
        engine: what writes the answers instead of the model, as in `generate_traces`.
        path: JSONL file that each finished batch of answers is appended to; batches already in it are not generated
            again.
        progress: show a bar.

    Returns:
        The pairs with completions (kept as token ids). One with an empty answer is left out, with a warning.

    Raises:
        LensteerError: no pairs, an impossible number, a text that cannot be encoded, a file of another run, or no
            answer at all.
    """
    if not pairs or batch_size < 1:
        raise LensteerError(f"{len(pairs)} pairs, batch_size={batch_size}: give at least one of each")
    texts = [text for pair in pairs for text in (pair.positive, pair.negative) if not text.answered]
    jobs: dict[Text, Job] = {}
    for text in dict.fromkeys(texts):
        prompt, encoded = encode_text(model, text, thinking=thinking)
        name = hashlib.sha256(repr(encoded.ids).encode()).hexdigest()  # gives each prompt its own seed
        jobs[text] = Job(Task(name, "pairs", "train", text.prompt), 0, prompt, encoded.ids)
    order = sorted(jobs, key=lambda text: len(jobs[text].prompt_ids))
    sampling = Sampling(1, temperature, seed, max_new_tokens, batch_size, top_p=top_p)
    ends = models.end_ids(model)
    written: dict[Text, Text] = {}
    answers = resume_jobs(model, [jobs[text] for text in order], sampling, path=path, progress=progress, engine=engine)
    for text, trace in zip(order, answers, strict=True):
        ids = trace.response_ids
        if ids and ids[-1] in ends:
            ids = ids[:-1]
        said, _ = models.decode_offsets(model.tokenizer, ids)
        written[text] = replace(text, completion=said, completion_ids=ids)
    done = []
    for pair in pairs:
        sides = [written.get(text, text) for text in (pair.positive, pair.negative)]
        if all(side.answered for side in sides):
            done.append(replace(pair, positive=sides[0], negative=sides[1]))
    if not done:
        raise LensteerError(f"the model's answers to all {len(pairs)} pairs are empty: try another seed or prompts")
    if len(done) < len(pairs):
        warnings.warn(f"{len(pairs) - len(done)} of {len(pairs)} pairs left out: an empty answer", stacklevel=2)
    return done


@checked()
def pair_traces(
    model: TransformerBridge,
    pairs: Sequence[Pair],
    *,
    spans: str = "completion",
    negatives: bool = False,
    thinking: bool = True,
) -> list[Trace]:
    """Pairs with completions as annotated traces, to run `attribute` and later stages on a custom concept.

    A positive completion is a trace with spans of the concept's label; the onset of the first is the last prompt token.

    Args:
        model: whose tokenizer encodes the pairs.
        pairs: with completions.
        spans: one for the whole "completion", or one for every "sentence" in it.
        negatives: also make traces of the negative sides, labeled "not LABEL" (`attribute(method="signed")` needs spans
            of something else).
        thinking: as in `fit_directions`.

    Raises:
        LensteerError: no pairs, an unknown option, a pair without a completion, a text that cannot be encoded.
    """
    if spans not in SPANS:
        raise LensteerError(f"unknown spans {spans!r}: choose one of {', '.join(map(repr, SPANS))}")
    if not pairs:
        raise LensteerError("no pairs: load some with load_pairs")
    traces = []
    for number, pair in enumerate(pairs):
        sides = [(pair.positive, pair.label), (pair.negative, f"not {pair.label}")]
        for text, label in sides[: 1 + negatives]:
            if not text.answered:
                raise LensteerError(
                    f"pair {number} ({pair.label!r}) has no completion to make a trace of: give one, or let the model "
                    "write it (complete_pairs)"
                )
            try:
                traces.append(_trace(model, text, label, number, spans, thinking))
            except LensteerError as error:
                raise LensteerError(f"pair {number} ({pair.label!r}): {error}") from error
    return traces


def _trace(model: TransformerBridge, text: Text, label: str, number: int, spans: str, thinking: bool) -> Trace:
    prompt, encoded = encode_text(model, text, thinking=thinking)
    prompt_ids, ids = encoded.ids[: encoded.n_prompt], encoded.ids[encoded.n_prompt :]
    task = Task(f"{label}-{number}", label, "train", text.prompt)
    trace = trace_of(model, Job(task, 0, prompt, prompt_ids), Generated(ids, True))
    places = split_sentences(trace.response)
    if spans == "completion":
        places = [(places[0][0], places[-1][1])]
    sentences = [Sentence(label, trace.response[begin:end]) for begin, end in places]
    placed = align(sentences, trace.response, trace.offsets, prompt_length=len(prompt_ids), labels=(label,))
    return with_spans(trace, placed.spans, 0)
