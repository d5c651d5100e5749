"""A language model as judge: it labels every sentence of a chain, or scores a chain as a whole.

Sentences are numbered and labels are returned by number, so the text is never edited. Every sentence is returned, with
a label or as `UNPARSED`, and a report gives the reason. Replies are cached on disk as they arrive: after a kill or an
error, the same call sends only the requests that have no reply yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import pandas as pd

from lensteer.annotation.judge_client import Client, Connection, Stopped
from lensteer.annotation.judge_questions import Remark, Talk, converse, parse_score, score_question
from lensteer.annotation.splitting import split_sentences
from lensteer.behaviors import REASONING, UNPARSED, LabelScheme, Sentence
from lensteer.errors import LensteerError
from lensteer.files import check_text
from lensteer.progress import progress_bar
from lensteer.traces import Trace

_BYTES_PER_TOKEN = 4  # of English, roughly


@dataclass(frozen=True)
class JudgePlan:
    """The requests that a call will send.

    Attributes:
        calls: requests to come, not counting those that failures and faulty replies add.
        cached: replies that are in the cache already.
        prompt_tokens_estimate: of the requests to come, at four bytes a token.
    """

    calls: int
    cached: int
    prompt_tokens_estimate: int


@dataclass(frozen=True)
class JudgeReport:
    """The requests and replies of a call.

    Attributes:
        chains: ids of the traces.
        remarks: for each chain, every irregularity, in the order of its parts.
        n_sentences: sentences of all chains.
        n_unlabeled: those that came back as `UNPARSED`.
        n_requests: requests sent, retries included.
        n_cached: replies taken from the cache.
        prompt_tokens: of this call, as reported by the server (0 if it does not).
        completion_tokens: the same for the replies.
    """

    chains: tuple[str, ...]
    remarks: tuple[tuple[Remark, ...], ...]
    n_sentences: int
    n_unlabeled: int
    n_requests: int
    n_cached: int
    prompt_tokens: int
    completion_tokens: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row for every remark."""
        rows = [
            (chain, remark.kind, remark.at, remark.text, remark.reason)
            for chain, remarks in zip(self.chains, self.remarks, strict=True)
            for remark in remarks
        ]
        frame = pd.DataFrame(rows, columns=["chain", "kind", "at", "text", "reason"])
        return frame.astype({"at": "Int64"})


@dataclass(frozen=True, kw_only=True)
class Judge(Connection):
    """An annotator that queries a chat model on any OpenAI-compatible server (extra `judge`).

    Model, server, key, reply cache, retries and time limit are those of `Connection`.

    Attributes:
        concurrency: concurrent requests.
        max_chunk: sentences per request; longer chains are sent in parts.
        context: sentences before a part that the judge is also shown.
        scheme: the labels to choose from, with a description of each.
        announce: called with the plan before the first request; an exception that it raises ends the call.
        progress: show a bar.

    Raises:
        LensteerError: as `Connection` does.
    """

    concurrency: int = 8
    max_chunk: int = 60
    context: int = 5
    scheme: LabelScheme = REASONING
    announce: Callable[[JudgePlan], None] | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("concurrency", 1), ("max_chunk", 1), ("context", 0)):
            if getattr(self, name) < least:
                raise LensteerError(f"{name}={getattr(self, name)}: give at least {least}")

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that it can give."""
        return self.scheme.labels

    def __call__(self, traces: Sequence[Trace]) -> list[list[Sentence]]:
        """Every sentence of each trace's thinking, in order; an `Annotator`. Raises as `annotate` does."""
        return self.annotate(traces)[0]

    def plan(self, traces: Sequence[Trace]) -> JudgePlan:
        """The requests that a call with these traces would send now. Sends nothing."""
        replies = self.replies
        keys: set[str] = set()
        calls = size = 0
        for _, talk in self._talks(traces, _texts(traces)):
            messages = next(talk, None)
            while messages is not None:
                key, known = replies.key(messages), replies.get(messages)
                if key not in keys and known is None:
                    calls += 1
                    size += sum(len(message["content"].encode()) for message in messages)
                keys.add(key)
                if known is None:
                    break
                try:
                    messages = talk.send(known)
                except StopIteration:
                    break
        return JudgePlan(calls, len(keys) - calls, -(-size // _BYTES_PER_TOKEN))

    def annotate(self, traces: Sequence[Trace]) -> tuple[list[list[Sentence]], JudgeReport]:
        """The sentences of each trace's thinking with their labels, and a report of all irregularities.

        Requests run in threads, so it works inside a notebook's event loop, too. An interrupt takes effect at once;
        replies to requests in flight are still cached.

        Raises:
            LensteerError: no openai client, no key, a server that rejects key or model, or that does not answer after
                all retries. Replies up to then are cached.
        """
        if self.announce is not None:
            self.announce(self.plan(traces))
        texts = _texts(traces)
        talks = list(self._talks(traces, texts))
        client = Client(self)
        done = self._finish(client, [talk for _, talk in talks])
        if client.failure:
            raise LensteerError(
                f"the judge {self.model!r} at {self.base_url}: {client.failure}. {len(done)} of {len(talks)} parts are "
                f"done and kept in {self.replies.folder}: the same call resumes from there"
            )
        labels: list[dict[int, str]] = [{} for _ in traces]
        remarks: list[list[Remark]] = [[] for _ in traces]
        for part, (chain, _) in enumerate(talks):
            labels[chain].update(done[part][0])
            remarks[chain] += done[part][1]
        annotated = [
            [Sentence(chosen[i], text) for i, text in enumerate(chain)]
            for chosen, chain in zip(labels, texts, strict=True)
        ]
        report = JudgeReport(
            chains=tuple(trace.id for trace in traces),
            remarks=tuple(map(tuple, remarks)),
            n_sentences=sum(map(len, annotated)),
            n_unlabeled=sum(sentence.label == UNPARSED for chain in annotated for sentence in chain),
            n_requests=client.n_requests,
            n_cached=client.n_cached,
            prompt_tokens=client.prompt_tokens,
            completion_tokens=client.completion_tokens,
        )
        return annotated, report

    def _finish(self, client: Client, talks: Sequence[Talk]) -> dict[int, tuple[dict[int, str], list[Remark]]]:
        """Finish all parts concurrently, or those that finish before `client.failure`.

        Until the first answer, requests are sent one at a time, to check key, model and format. After a failure nothing
        new is sent, but requests in flight are awaited and their replies cached.
        """
        done: dict[int, tuple[dict[int, str], list[Remark]]] = {}

        def finish(part: int, talk: Talk) -> None:
            try:
                messages = next(talk)
                while not client.failure:
                    messages = talk.send(client.answer(messages))
            except StopIteration as end:
                done[part] = end.value
            except Stopped:
                pass

        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="lensteer-judge")
        try:
            with progress_bar(total=len(talks), desc="judge", show=self.progress) as bar:

                def wait_for(jobs: set[Future[None]]) -> None:
                    while jobs:
                        over, jobs = wait(jobs, timeout=0.2)  # in steps: some platforms hold an interrupt until then
                        for job in over:
                            job.result()
                        bar.update(len(over))

                queue = iter(enumerate(talks))
                for part, talk in queue:
                    wait_for({pool.submit(finish, part, talk)})
                    if client.failure or client.n_answered:
                        break
                wait_for({pool.submit(finish, part, talk) for part, talk in queue})
        except BaseException:
            client.stop("interrupted")
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
        client.close()
        if client.refusals and not (client.n_answered or client.n_cached):
            client.stop(client.refusals[-1])
        return done

    def _talks(self, traces: Sequence[Trace], texts: Sequence[list[str]]) -> Iterator[tuple[int, Talk]]:
        """The parts of all chains, each with its chain's index; the parts of one chain have about the same size."""
        for chain, (trace, sentences) in enumerate(zip(traces, texts, strict=True)):
            n_parts = -(-len(sentences) // self.max_chunk)
            for part in range(n_parts):
                first, last = (len(sentences) * p // n_parts for p in (part, part + 1))
                wanted = range(first, last)
                yield chain, converse(trace.task.prompt, sentences, wanted, context=self.context, scheme=self.scheme)


@dataclass(frozen=True)
class JudgeScore(Connection):
    """A measure of a chain: a judge's answer to a question about it, from 0 (not at all) to 100 (as much as possible).

        polite = JudgeScore("How polite is the answer?", model="gpt-4o-mini")
        ls.evaluate(model, tasks, vectors, layers, measure=polite)

    The judge gets the task and the whole response, thinking included. Model, server, key, reply cache, retries and time
    limit are those of `Connection`.

    Attributes:
        question: about the response; its answer is a degree.

    Raises:
        LensteerError: no question, one with a lone surrogate, or as `Connection` does.
    """

    question: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text(self.question, "question")
        if not self.question.strip():
            raise LensteerError("question='': ask something about the response, such as 'How polite is the answer?'")

    def __call__(self, trace: Trace) -> float:
        """The score of a chain, from 0 to 100. A reply without one is requested once more.

        Raises:
            LensteerError: no score in either reply, or as `Judge.annotate` does.
        """
        client = Client(self)
        where = f"the judge {self.model!r} at {self.base_url}"
        asked, complaint, score = [], "", None
        try:
            for _ in range(2):
                messages = score_question(self.question, trace, complaint=complaint)
                answer = client.replies.get(messages) or client.ask(messages)
                if answer.refused:
                    raise LensteerError(f"{where} gave no score for chain {trace.id!r}: {answer.refused}")
                asked.append((messages, answer))
                score = parse_score(answer.text)
                if score is not None:
                    break
                complaint = 'it was not {"score": n} with a number n from 0 to 100'
        except Stopped as end:
            raise LensteerError(f"{where}: {client.failure}") from end
        finally:
            client.close()
        if score is None:
            raise LensteerError(
                f"{where} gave no score from 0 to 100 for chain {trace.id!r}, but {answer.text[:80]!r}: ask a question "
                "whose answer is a degree, or another model"
            )
        for messages, answer in asked:  # only now: without a score, the next call sends the request again
            if client.replies.get(messages) is None:
                client.replies.put(messages, answer)
        return score


def _texts(traces: Sequence[Trace]) -> list[list[str]]:
    thoughts = [trace.response[slice(*trace.thinking)] for trace in traces]
    return [[thought[start:end] for start, end in split_sentences(thought)] for thought in thoughts]
