"""The grammar annotator on chains whose truth is known, because the grammar wrote them."""

from __future__ import annotations

import random

import pytest

import lensteer as ls
from lensteer import models
from lensteer.annotation import annotate, annotate_report
from lensteer.behaviors import UNPARSED, Sentence
from lensteer.generation import Generated
from lensteer.generation.jobs import Job, trace_of
from lensteer.organism.conversations import END
from lensteer.organism.grammar import END_THINK, FAMILIES, THINK, Latent, make_world, render, write_chain
from lensteer.tasks import Task


class Speaker:
    """As much of a model as a trace needs: its tokenizer. No weights are needed to know the truth."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def trace(self, world, response, *, thinking=True):
        prompt = models.chat_text(self, world.prompt, thinking=thinking)
        task = Task("t", world.family, "dev", world.prompt, world.answer, "exact")
        ids = tuple(models.encode(self, response))
        return trace_of(self, Job(task, 0, prompt, tuple(models.encode(self, prompt))), Generated(ids, True))


@pytest.fixture(scope="module")
def speaker(grammar_tokenizer):
    return Speaker(grammar_tokenizer)


def written(n, seed=0):
    rng = random.Random(seed)
    for i in range(n):
        world = make_world(rng, FAMILIES[i % 2], 1 + i // 2 % 3)
        sentences = write_chain(rng, world, Latent.draw(rng))
        yield world, sentences, render(sentences, world.answer).removeprefix(THINK) + END


def check_spans(speaker, trace, sentences):
    """Each span is its sentence, in characters and in tokens, and its onset is the token that begins it."""
    assert [s.label for s in trace.spans] == [s.label for s in sentences]
    before = trace.prompt_length
    for span, sentence in zip(trace.spans, sentences, strict=True):
        assert trace.response[span.char_start : span.char_end] == sentence.text
        tokens = trace.ids[span.start : span.end]
        assert speaker.tokenizer.decode(tokens).strip() == sentence.text
        assert before <= span.start < span.end <= len(trace.ids)
        # What is decoded up to the onset ends just before the sentence, so the onset's logits predict its first word.
        said = speaker.tokenizer.decode(trace.ids[: span.onset + 1])
        assert (trace.prompt + trace.response).startswith(said)
        assert len(said) - len(trace.prompt) in (span.char_start, span.char_start - 1)
        before = span.end


@pytest.mark.medium
def test_labels_and_token_spans_are_exact(speaker):
    chains = list(written(150))
    traces, reports = annotate_report([speaker.trace(world, text) for world, _, text in chains], ls.grammar)
    for trace, report, (_, sentences, _) in zip(traces, reports, chains, strict=True):
        check_spans(speaker, trace, sentences)
        assert trace.n_unparsed == 0
        assert trace.correct is True
        assert (report.matched, report.repaired, report.dropped) == (len(sentences), (), ())
        assert trace.spans[0].onset == trace.prompt_length - 1
    assert annotate(traces, ls.grammar) == traces  # annotating again changes nothing


def test_sentences_that_do_not_parse_are_counted_and_have_no_span(speaker):
    rng = random.Random(1)
    for world, sentences, _ in written(40, 1):
        odd = ["This is the end of it.", "Wait, the B looks doubtful.", "hm.", "Maybe Q is not"]
        mixed = list(sentences)
        planted = rng.sample(odd[:3], rng.randint(1, 3))
        for text in planted:
            mixed.insert(rng.randrange(len(mixed) + 1), Sentence(UNPARSED, text))
        response = render(mixed, world.answer).removeprefix(THINK) + END
        (trace,) = annotate([speaker.trace(world, response)], ls.grammar)
        check_spans(speaker, trace, sentences)
        assert trace.n_unparsed == len(planted)

        cut = response.replace(END_THINK, " " + odd[3] + END_THINK)
        assert annotate([speaker.trace(world, cut)], ls.grammar)[0].n_unparsed == len(planted) + 1


def test_a_chain_cut_anywhere_keeps_its_whole_sentences(speaker):
    ((world, sentences, response),) = written(1, 2)
    inside = response.index(END_THINK)
    for end in range(1, inside):
        (trace,) = annotate([speaker.trace(world, response[:end])], ls.grammar)
        whole = [s for s, stop in zip(sentences, stops(response, sentences), strict=True) if stop <= end]
        check_spans(speaker, trace, whole)
        rest = response[:end][stops(response, sentences)[len(whole) - 1] if whole else 0 :]
        assert trace.n_unparsed == bool(rest.strip())


def stops(response, sentences):
    """Where each sentence ends."""
    out, cursor = [], 0
    for sentence in sentences:
        cursor = response.index(sentence.text, cursor) + len(sentence.text)
        out.append(cursor)
    return out


def test_what_is_not_thought_is_not_annotated(speaker):
    ((world, sentences, response),) = written(1, 3)
    (direct,) = annotate([speaker.trace(world, f"Answer: {world.answer}.{END}", thinking=False)], ls.grammar)
    assert direct.spans == ()
    assert direct.n_unparsed == 0
    # Opened by the model itself, and with sentences of the grammar's behind the thought.
    chosen = THINK + response.removesuffix(END) + " Maybe B is not right." + END
    (trace,) = annotate([speaker.trace(world, chosen, thinking=False)], ls.grammar)
    check_spans(speaker, trace, sentences)


def test_any_function_is_an_annotator_and_unknown_labels_are_refused_or_reported(speaker):
    ((world, sentences, response),) = written(1, 4)
    trace = speaker.trace(world, response)

    def last_two(_traces):
        return [[*(Sentence("deduction", s.text) for s in sentences[-2:]), Sentence("musing", sentences[0].text)]]

    (annotated,), (report,) = annotate_report([trace], last_two)
    check_spans(speaker, annotated, [Sentence("deduction", s.text) for s in sentences[-2:]])
    assert annotated.n_unparsed == 1
    assert [drop.label for drop in report.dropped] == ["musing"]


@pytest.mark.medium
def test_the_shipped_models_chains(organism):
    """Spans tile what was thought: every letter of it is a labeled sentence's, or is counted as unparsed."""
    traces = annotate(
        ls.generate_traces(organism, ls.load_tasks(split="dev", n=8), temperature=1.0, max_new_tokens=400), ls.grammar
    )
    for trace in traces:
        begin, end = trace.thinking
        covered = "".join(trace.response[s.char_start : s.char_end] for s in trace.spans)
        thought = "".join(trace.response[begin:end].split())
        if not trace.n_unparsed:
            assert "".join(covered.split()) == thought
    assert sum(len(t.spans) for t in traces) > 8
