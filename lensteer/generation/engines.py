"""Plain chains from a serving engine: prompts go out as token ids, and the very ids that it sampled come back.

An engine such as vLLM keeps hundreds of chains in flight, but has no hooks. So it writes chains without a plan, those
that vectors are fitted on. It samples with its own generators: its chains are other draws than those of `generate`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch

from lensteer.endpoints import Client, Endpoint, served_model
from lensteer.errors import LensteerError
from lensteer.forward import forced_logits
from lensteer.generation.decoding import Generated

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Tokens that are compared with the loaded model's, and nats by which their log-probabilities may differ on average.
CHECKED, MAX_GAP = 24, 0.25
#: Requests that an engine in this process gets at once: what a kill loses.
AT_ONCE = 512


@dataclass(frozen=True)
class Request:
    """A chain to write.

    Attributes:
        ids: of the whole prompt.
        max_new_tokens: most new tokens.
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        seed: of this chain; not all engines have seeds.
        ends: ids that end it, besides those that the engine knows itself.
        scored: also return the log-probability of each new token, before temperature and nucleus.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    ends: tuple[int, ...]
    scored: bool = False

    @property
    def sampling(self) -> dict[str, Any]:
        """What both of vLLM's interfaces call the same. Defaults of the checkpoint, such as a `top_k`, are put out."""
        common = dict(max_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p)
        return common | dict(
            seed=self.seed % 2**63, stop_token_ids=list(self.ends), top_k=0, min_p=0.0, repetition_penalty=1.0
        )


@dataclass(frozen=True)
class Written(Generated):
    """A chain's new ids, and the log-probability of each, if they were asked for."""

    scores: tuple[float, ...] = ()


class Engine(ABC):
    """What writes plain chains; a class of your own may, too."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of engine and model: chains of another name are those of another run."""

    @abstractmethod
    def write(self, requests: Sequence[Request]) -> Iterator[tuple[int, Written]]:
        """Each chain with the number of its request, in the order in which they come."""


@dataclass(frozen=True)
class Served(Engine):
    """An OpenAI-compatible server that takes and returns token ids: vLLM 0.10.2 or later (`return_token_ids`).

        engine = Served(Endpoint(url="http://localhost:8000/v1", concurrency=64, timeout=3600))
        traces = ls.generate_traces(model, tasks, temperature=0.6, engine=engine)

    Attributes:
        endpoint: the server; `concurrency` chains are in flight at a time, and each has `timeout` seconds.
    """

    endpoint: Endpoint

    @cached_property
    def model(self) -> str:
        """The name that the server has for its model.

        Raises:
            LensteerError: as `served_model` does.
        """
        with closing(Client(self.endpoint)) as client:
            return served_model(client)

    @property
    def name(self) -> str:
        """Of the served model; not the server's address, which may change."""
        return f"served {self.model}"

    def write(self, requests: Sequence[Request]) -> Iterator[tuple[int, Written]]:
        """As `Engine.write`. After an error no request is sent, and the chains in flight are still returned.

        Raises:
            LensteerError: no connection, a status that says no, an answer without token ids, or one to other ids.
        """
        todo, done, stop = deque(enumerate(requests)), SimpleQueue[tuple[int, Written | Exception]](), Event()

        def work() -> None:
            while todo and not stop.is_set():
                try:
                    i, request = todo.popleft()
                except IndexError:  # another thread was faster
                    return
                try:
                    done.put((i, self._one(client, request)))
                except Exception as error:
                    done.put((i, error))

        failure: Exception | None = None
        with closing(Client(self.endpoint)) as client:
            # Daemons: an interrupt does not wait for chains in flight.
            threads = [Thread(target=work, daemon=True) for _ in range(min(self.endpoint.concurrency, len(requests)))]
            for thread in threads:
                thread.start()
            try:
                while True:
                    running = any(thread.is_alive() for thread in threads)
                    try:
                        i, found = done.get(timeout=0.1)
                    except Empty:
                        if running:
                            continue
                        break
                    if isinstance(found, Written):
                        yield i, found
                    else:
                        failure = failure or found
                        stop.set()
            finally:
                stop.set()
        if failure is not None:
            raise failure

    def _one(self, client: Client, request: Request) -> Written:
        own = dict(request.sampling)
        common = {key: own.pop(key) for key in ("max_tokens", "temperature", "top_p", "seed")}
        options = dict(logprobs=0) if request.scored else {}
        choice = client.complete(
            self.model, request.ids, **common, **options, extra_body={"return_token_ids": True, **own}
        )
        found = [getattr(choice, name, None) for name in ("prompt_token_ids", "token_ids")]
        given, ids = ([*each] if isinstance(each, list) else [None] for each in found)
        if not all(type(i) is int for i in (*given, *ids)):
            raise LensteerError(
                f"{self.endpoint.url} returns no token ids: chains need a server that knows return_token_ids, such as "
                "vLLM from 0.10.2 on"
            )
        if given != list(request.ids):
            raise LensteerError(
                f"{self.endpoint.url} continued {given[:8]}…, and was asked to continue {request.ids[:8]}…"
            )
        scores = getattr(choice.logprobs, "token_logprobs", None) if request.scored else ()
        if not isinstance(scores, list) or not all(isinstance(score, float | int) for score in scores):
            scores = ()
        return Written(tuple(map(int, ids)), _ended(choice.finish_reason, self.name), tuple(map(float, scores)))


@dataclass(frozen=True)
class Offline(Engine):
    """vLLM in this process: `Offline(vllm.LLM("folder"))`.

    Attributes:
        llm: the `vllm.LLM`.
    """

    llm: Any

    @property
    def name(self) -> str:
        """Of the loaded model."""
        return f"vllm {self.llm.llm_engine.model_config.model}"

    def write(self, requests: Sequence[Request]) -> Iterator[tuple[int, Written]]:
        """As `Engine.write`; groups of `AT_ONCE`, each when all of it is done.

        Raises:
            LensteerError: vLLM refuses a request.
        """
        from vllm import SamplingParams

        for begin in range(0, len(requests), AT_ONCE):
            part = requests[begin : begin + AT_ONCE]
            scored = [dict(logprobs=0) if request.scored else {} for request in part]
            try:
                settings = [SamplingParams(**r.sampling, **more) for r, more in zip(part, scored, strict=True)]
                prompts = [{"prompt_token_ids": list(request.ids)} for request in part]
                found = self.llm.generate(prompts, settings, use_tqdm=False)
            except ValueError as error:
                raise LensteerError(f"vLLM refuses a chain: {error}") from error
            for i, each in enumerate(found):
                said = each.outputs[0]
                ids = tuple(said.token_ids)
                scores = [row[token].logprob for row, token in zip(said.logprobs or (), ids, strict=False)]
                yield begin + i, Written(ids, _ended(said.finish_reason, self.name), tuple(scores))


def _ended(reason: Any, name: str) -> bool:
    if reason not in ("stop", "length"):
        raise LensteerError(f"the engine {name!r} gave a chain up (finish_reason {reason!r}): ask again")
    return bool(reason == "stop")


def check_written(model: TransformerBridge, engine: Engine, request: Request, written: Written) -> Written:
    """A chain itself, if it can be what an engine with this model's vocabulary was asked for.

    Raises:
        LensteerError: no id, more than were asked for, or one that the model lacks.
    """
    size, ids = int(model.cfg.d_vocab), written.ids
    if not 0 < len(ids) <= request.max_new_tokens:
        raise LensteerError(
            f"the engine {engine.name!r} wrote {len(ids)} tokens, and was asked for 1 to {request.max_new_tokens}"
        )
    if odd := [i for i in ids if not 0 <= i < size]:
        raise LensteerError(f"the engine {engine.name!r} wrote the id {odd[0]!r}, and the model has 0 to {size - 1}")
    return written


def check_engine(model: TransformerBridge, engine: Engine, request: Request) -> float:
    """Whether an engine has the loaded model: their log-probabilities of a few tokens that it writes are compared.

    Args:
        model: the bridge.
        engine: to check.
        request: whose prompt is continued, greedily.

    Returns:
        Mean absolute difference, in nats per token: the rounding of two dtypes or of a quantization.

    Raises:
        LensteerError: as `check_written` does, no log-probabilities, or a difference above `MAX_GAP`.
    """
    asked = replace(request, max_new_tokens=CHECKED, temperature=0.0, top_p=1.0, scored=True)
    ((_, written),) = engine.write([asked])
    check_written(model, engine, asked, written)
    if len(written.scores) != len(written.ids):
        raise LensteerError(
            f"the engine {engine.name!r} gave {len(written.scores)} log-probabilities of {len(written.ids)} tokens: "
            "whether it has the loaded model cannot be checked"
        )
    logits = forced_logits(model, [request.ids], [written.ids])[0].float()
    ours = logits.log_softmax(-1).gather(-1, torch.tensor(written.ids, device=logits.device)[:, None])[:, 0].cpu()
    gap = float((ours - torch.tensor(written.scores)).abs().mean())
    if not math.isfinite(gap):
        raise LensteerError(f"the engine {engine.name!r} gave log-probabilities that are no numbers: {written.scores}")
    if not gap <= MAX_GAP:
        raise LensteerError(
            f"the engine {engine.name!r} has another model than the one that is loaded: its log-probabilities of "
            f"{len(written.ids)} tokens differ by {gap:.2f} nats per token, and rounding makes less than {MAX_GAP}: "
            "give both the same checkpoint"
        )
    return gap
