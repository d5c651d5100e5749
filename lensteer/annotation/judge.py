"""A language model as judge: it is asked for the behavior of every sentence.

Sentences are numbered and labels come back by number, so the text stays the chain's own. Every sentence comes back,
with a label or as `UNPARSED`, and a report says why. Replies are kept on disk as they arrive: the same call after a
kill or an error asks only what has not been answered yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd

from lensteer.annotation.judge_cache import ReplyCache, default_folder
from lensteer.annotation.judge_client import MODEL, OPENAI, URL, Client, run
from lensteer.annotation.judge_reply import Answer, Remark, Talk, converse
from lensteer.annotation.judge_work import Work
from lensteer.behaviors import REASONING, UNPARSED, LabelScheme, Sentence
from lensteer.errors import LensteerError
from lensteer.progress import progress_bar
from lensteer.splitting import split_sentences
from lensteer.traces import Trace

_BYTES_PER_TOKEN = 4  # of English, roughly


@dataclass(frozen=True)
class JudgePlan:
    """What a call will ask.

    Attributes:
        calls: requests to come, not counting those that failures and faulty replies add.
        cached: replies that are there already.
        prompt_tokens_estimate: of the requests to come, at four bytes a token.
    """

    calls: int
    cached: int
    prompt_tokens_estimate: int


@dataclass(frozen=True)
class JudgeReport:
    """What became of a call.

    Attributes:
        chains: ids of the traces.
        remarks: for each chain, all that did not go as asked, in the order of its parts.
        n_sentences: sentences of all chains.
        n_unlabeled: those that came back as `UNPARSED`.
        n_requests: requests sent, retries included.
        n_cached: replies taken from the cache.
        prompt_tokens: of this call, as the server counts them (0 if it does not).
        completion_tokens: likewise.
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


@dataclass(frozen=True)
class Judge:
    """An annotator that asks a chat model on any OpenAI-compatible server (extra `judge`).

    The key comes from the environment only: `LENSTEER_JUDGE_KEY`, or `OPENAI_API_KEY` where the URL is OpenAI's or that
    of `OPENAI_BASE_URL` (it is sent to no other server). A server on your own machine may need none.

    Attributes:
        model: name of the model; else `LENSTEER_JUDGE_MODEL`.
        base_url: of the server, such as `http://localhost:8000/v1`; else `LENSTEER_JUDGE_URL`, `OPENAI_BASE_URL`, or
            OpenAI.
        cache: folder of the replies; None is the user's cache folder.
        concurrency: requests at a time.
        retries: further tries of a request on 408, 409, 425, 429, 5xx, a timeout, a lost connection or an empty answer.
        timeout: seconds for one try.
        backoff: seconds before the first retry; each further wait is twice as long. A server's Retry-After counts if it
            is longer.
        max_chunk: sentences per request; longer chains are asked in parts.
        context: sentences before a part that the judge sees, too.
        scheme: the labels that it chooses from, with a line on each.
        temperature: None leaves it to the server (some models accept no other).
        announce: called with the plan before the first request; an exception that it raises ends the call.
        progress: show a bar.

    Raises:
        LensteerError: no model, a URL that is none or that holds a secret, or an impossible number.
    """

    model: str = ""
    base_url: str = ""
    cache: str | Path | None = None
    concurrency: int = 8
    retries: int = 5
    timeout: float = 120.0
    backoff: float = 1.0
    max_chunk: int = 60
    context: int = 5
    scheme: LabelScheme = REASONING
    temperature: float | None = 0.0
    announce: Callable[[JudgePlan], None] | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        url = self.base_url or os.environ.get(URL) or os.environ.get("OPENAI_BASE_URL") or OPENAI
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise LensteerError(f"the judge's URL at {parts.hostname!r} holds a name, password or query: leave it out")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LensteerError(f"base_url={url!r}: give the judge's URL, such as http://localhost:8000/v1")
        object.__setattr__(self, "base_url", url.rstrip("/"))
        object.__setattr__(self, "model", self.model or os.environ.get(MODEL, ""))
        if not self.model:
            raise LensteerError(f"no model for the judge at {url}: give model='...' or set {MODEL}")
        for name, least in (("concurrency", 1), ("max_chunk", 1), ("retries", 0), ("context", 0), ("backoff", 0)):
            if getattr(self, name) < least:
                raise LensteerError(f"{name}={getattr(self, name)}: give at least {least}")
        if not self.timeout > 0:
            raise LensteerError(f"timeout={self.timeout}: give a positive number of seconds")

    @property
    def labels(self) -> tuple[str, ...]:
        """That it can give."""
        return self.scheme.labels

    def __call__(self, traces: Sequence[Trace]) -> list[list[Sentence]]:
        """Every sentence of each trace's thinking, in order; an `Annotator`. Raises as `annotate` does."""
        return self.annotate(traces)[0]

    def plan(self, traces: Sequence[Trace]) -> JudgePlan:
        """What a call with these traces would ask now. Sends nothing."""
        cache = self._cache()
        keys: set[str] = set()
        calls = size = 0
        for _, talk in self._talks(traces, _texts(traces)):
            messages = next(talk, None)
            while messages is not None:
                key = cache.key(messages)
                known = cache.get(key)
                if key not in keys and known is None:
                    calls += 1
                    size += sum(len(message["content"].encode()) for message in messages)
                keys.add(key)
                if known is None:
                    break
                try:
                    messages = talk.send(Answer(**known))
                except StopIteration:
                    break
        return JudgePlan(calls, len(keys) - calls, -(-size // _BYTES_PER_TOKEN))

    def annotate(self, traces: Sequence[Trace]) -> tuple[list[list[Sentence]], JudgeReport]:
        """The sentences of each trace's thinking with their behaviors, and what did not go as asked.

        Raises:
            LensteerError: no openai client, no key, a server that refuses key or model, or that does not answer after
                all retries. What has been answered by then is kept.
        """
        if self.announce is not None:
            self.announce(self.plan(traces))
        return run(self._annotate(traces))

    async def _annotate(self, traces: Sequence[Trace]) -> tuple[list[list[Sentence]], JudgeReport]:
        texts = _texts(traces)
        talks = list(self._talks(traces, texts))
        work = Work(
            self._cache(),
            Client(
                self.base_url,
                self.model,
                self._parameters(),
                retries=self.retries,
                timeout=self.timeout,
                backoff=self.backoff,
            ),
        )
        with progress_bar(total=len(talks), desc="judge", show=self.progress) as bar:
            try:
                await work.all([talk for _, talk in talks], self.concurrency, lambda: bar.update())
            finally:
                await work.client.close()
        if work.client.failure:
            raise LensteerError(
                f"the judge {self.model!r} at {self.base_url}: {work.client.failure}. {len(work.done)} of {len(talks)} "
                f"parts are done and kept in {work.cache.folder}: the same call goes on from there"
            )
        labels: list[dict[int, str]] = [{} for _ in traces]
        remarks: list[list[Remark]] = [[] for _ in traces]
        for part, (chain, _) in enumerate(talks):
            labels[chain].update(work.done[part][0])
            remarks[chain] += work.done[part][1]
        annotated = [
            [Sentence(chosen[i], text) for i, text in enumerate(chain)]
            for chosen, chain in zip(labels, texts, strict=True)
        ]
        report = JudgeReport(
            chains=tuple(trace.id for trace in traces),
            remarks=tuple(map(tuple, remarks)),
            n_sentences=sum(map(len, annotated)),
            n_unlabeled=sum(sentence.label == UNPARSED for chain in annotated for sentence in chain),
            n_requests=work.client.n_requests,
            n_cached=work.n_cached,
            prompt_tokens=work.client.prompt_tokens,
            completion_tokens=work.client.completion_tokens,
        )
        return annotated, report

    def _parameters(self) -> dict[str, float]:
        return {} if self.temperature is None else {"temperature": self.temperature}

    def _cache(self) -> ReplyCache:
        return ReplyCache(Path(self.cache or default_folder()), self.model, self._parameters())

    def _talks(self, traces: Sequence[Trace], texts: Sequence[list[str]]) -> Iterator[tuple[int, Talk]]:
        """The parts of all chains, each with its chain's index; parts of one chain are of about one size."""
        for chain, (trace, sentences) in enumerate(zip(traces, texts, strict=True)):
            n_parts = -(-len(sentences) // self.max_chunk)
            for part in range(n_parts):
                first, last = (len(sentences) * p // n_parts for p in (part, part + 1))
                yield (
                    chain,
                    converse(
                        trace.task.prompt, sentences, range(first, last), context=self.context, scheme=self.scheme
                    ),
                )


def _texts(traces: Sequence[Trace]) -> list[list[str]]:
    thoughts = [trace.response[slice(*trace.thinking)] for trace in traces]
    return [[thought[start:end] for start, end in split_sentences(thought)] for thought in thoughts]
