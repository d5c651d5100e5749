"""Models on OpenAI-compatible servers: chats that are asked the same tasks, and continuations of token ids.

The openai client handles connections, time limits and retries. Each chat's answer is appended to a file as it arrives,
so that a run that was killed asks only what is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lensteer.arguments import typed
from lensteer.errors import LensteerError
from lensteer.files import append_jsonl, digest, drop_cut_line, read_jsonl
from lensteer.models import CLOSE_THINKING, OPEN_THINKING
from lensteer.results import reading, revived
from lensteer.tasks import Task

KEY = "LENSTEER_ENDPOINT_KEY"


def check_url(url: str, key: str) -> str:
    """A server's URL, without a slash at its end.

    Args:
        url: such as `http://localhost:8000/v1`.
        key: the variable of the environment that a key belongs in.

    Raises:
        LensteerError: it is none, or holds a secret (which the message does not repeat).
    """
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and not any(c <= " " for c in url)
        fine &= parts.port is None or parts.port > 0
    except ValueError as error:
        place = url.rpartition("@")[2]  # a name and password are not repeated
        raise LensteerError(f"the URL at {place!r} ({error}): give one such as http://localhost:8000/v1") from error
    if parts.username or parts.password or parts.query:
        raise LensteerError(f"the URL at {parts.hostname!r} holds a name, password or query: put a key into {key}")
    if not fine:
        raise LensteerError(f"the URL {url!r}: give a server's, such as http://localhost:8000/v1")
    return url.rstrip("/")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model on an OpenAI-compatible server (extra `judge`, the openai client).

    A key, if the server needs one, comes from the environment only: `LENSTEER_ENDPOINT_KEY`.

    Attributes:
        url: of the server, such as `http://localhost:8080/v1`.
        model: the name that it serves it by; "" is the only one that it serves.
        timeout: seconds without data after which a try fails.
        retries: of a request without connection, without an answer in time, or on status 408, 409, 429 or 5xx.
        concurrency: requests at a time.

    Raises:
        LensteerError: an invalid URL or one that holds a secret, or a number out of range.
    """

    url: str
    model: str = ""
    timeout: float = 120.0
    retries: int = 2
    concurrency: int = 4

    def __post_init__(self) -> None:
        typed(self)
        url = check_url(self.url, KEY)
        if not self.timeout > 0 or self.retries < 0 or self.concurrency < 1:
            raise LensteerError(
                f"timeout={self.timeout}, retries={self.retries}, concurrency={self.concurrency}: give a positive "
                "time, at least 0 retries and at least 1 request at a time"
            )
        object.__setattr__(self, "url", url)


@dataclass(frozen=True)
class Asking:
    """How answers are drawn.

    Attributes:
        n_samples: answers per task.
        temperature: of the sampling.
        top_p: probability that the likeliest tokens to draw from add up to. A server's own limits, such as its `top_k`,
            come on top of it.
        max_new_tokens: most tokens of an answer.
        system: the system prompt; none if empty.
        seed: of the answers' own seeds; servers without seeds draw anew.

    Raises:
        LensteerError: a number out of range.
    """

    n_samples: int = 1
    temperature: float = 0.8
    top_p: float = 1.0
    max_new_tokens: int = 400
    system: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        typed(self)
        if self.n_samples < 1 or self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise LensteerError(
                f"n_samples={self.n_samples}, max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, "
                f"top_p={self.top_p}: give at least one sample of at least one token, at a temperature of at least 0, "
                "with 0 < top_p <= 1"
            )


@dataclass(frozen=True)
class Answer:
    """One answer: its text, with the thought between marks if the server gives it apart, and whether it ended."""

    task: str
    sample: int
    text: str
    finished: bool


class Client:
    """The connection to one endpoint, until `close`."""

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            import openai
        except ImportError as error:
            raise LensteerError("an endpoint needs the openai client: pip install 'lensteer[judge]'") from error
        self.endpoint, self._openai = endpoint, openai
        self._api = openai.OpenAI(
            base_url=endpoint.url,
            api_key=os.environ.get(KEY) or "unused",
            max_retries=endpoint.retries,
            timeout=endpoint.timeout,
        )
        self._seeds = True

    def served(self) -> list[str]:
        """Names of the models that the server lists; empty if it lists none, or cannot and the model is named.

        Raises:
            LensteerError: no connection, or no answer in time.
        """
        try:
            return [str(model.id) for model in self._api.models.list()]
        except self._openai.APIStatusError as error:
            if error.status_code == 404 or (error.status_code >= 500 and self.endpoint.model):
                return []
            raise self._refusal(error) from error
        except (self._openai.APIError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise self._refusal(error) from error

    def ask(self, model: str, task: Task, sample: int, asking: Asking, purpose: str) -> Answer:
        """One answer.

        Raises:
            LensteerError: no connection, no answer in time, a status that says no, or an answer of another form.
        """
        system = [{"role": "system", "content": asking.system}] if asking.system else []
        options: dict[str, Any] = dict(
            model=model,
            messages=[*system, {"role": "user", "content": task.prompt}],
            temperature=asking.temperature,
            top_p=asking.top_p,
            max_tokens=asking.max_new_tokens,
        )
        seed = int(digest(f"{asking.seed}|{purpose}|{task.id}|{sample}".encode())[:7], 16)
        try:
            try:
                found = self._api.chat.completions.create(**options, **({"seed": seed} if self._seeds else {}))
            except self._openai.APIStatusError as error:
                if not self._seeds or error.status_code not in (400, 422):
                    raise
                found = self._api.chat.completions.create(**options)
                self._seeds = False  # this server takes none
            choice = found.choices[0]
            said = choice.message.content
            thought = getattr(choice.message, "reasoning_content", None) or getattr(choice.message, "reasoning", None)
            ended = choice.finish_reason == "stop"
        except (self._openai.APIError, ValueError) as error:
            raise self._refusal(error) from error
        except (AttributeError, IndexError, TypeError) as error:
            raise LensteerError(
                f"{self.endpoint.url} answered with no chat completion (does the URL lack '/v1'?): {str(found)[:200]}"
            ) from error
        text = str(said or "")
        if isinstance(thought, str) and thought:
            text = f"{OPEN_THINKING}\n{thought.strip()}\n{CLOSE_THINKING}\n\n{text}"
        return Answer(task.id, sample, text.encode(errors="replace").decode(), ended)

    def complete(self, model: str, ids: Sequence[int], **options: Any) -> Any:
        """The server's continuation of token ids: a choice of its `/v1/completions`.

        Args:
            model: the name that it serves it by.
            ids: of the whole prompt.
            options: of the request.

        Raises:
            LensteerError: no connection, no answer in time, a status that says no, or an answer without a choice.
        """
        try:
            return self._api.completions.create(model=model, prompt=list(ids), **options).choices[0]
        except (self._openai.APIError, ValueError) as error:
            raise self._refusal(error) from error
        except (AttributeError, IndexError, KeyError, TypeError, RecursionError) as error:
            raise LensteerError(
                f"{self.endpoint.url} answered with no completion (does the URL lack '/v1'?)"
            ) from error

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    def _refusal(self, error: Exception) -> LensteerError:
        """What to tell the user."""
        url, openai = self.endpoint.url, self._openai
        tries = f", after {self.endpoint.retries + 1} tries" if self.endpoint.retries else ""
        if isinstance(error, openai.APITimeoutError):
            return LensteerError(
                f"no answer of {url} within {self.endpoint.timeout:g} s{tries}: give it more time (--timeout), fewer "
                "requests at a time (--concurrency) or fewer tokens"
            )
        if isinstance(error, openai.APIConnectionError):
            return LensteerError(f"no connection to {url}{tries}: is the server up? ({error.__cause__ or error})")
        if isinstance(error, openai.APIStatusError):
            hints = {401: f"; the key is read from {KEY}", 403: f"; the key is read from {KEY}"}
            hints[404] = "; are the URL and the served model's name right?"
            return LensteerError(
                f"{url} answered with status {error.status_code}{tries if error.status_code >= 429 else ''} "
                f"({str(error)[:300]}){hints.get(error.status_code, '')}"
            )
        return LensteerError(f"{url} gave an answer that cannot be read ({type(error).__name__}: {str(error)[:300]})")


def served_model(client: Client, of: str = "") -> str:
    """The name of the model to ask for.

    Args:
        client: of the endpoint.
        of: the name of the model that it should be; if the endpoint names none, the served name has to contain it.

    Raises:
        LensteerError: the server does not serve the named model, serves several and none is named, or one of another
            name. A folder of this machine may be named without being listed: `transformers serve` loads what it is
            asked for.
    """
    there, asked = client.served(), client.endpoint.model
    url = client.endpoint.url
    if asked:
        if there and asked not in there and not Path(asked).is_dir():
            raise LensteerError(f"{url} does not serve {asked!r}: it serves {there}")
        return asked
    if len(there) != 1:
        raise LensteerError(
            f"{url} serves {there or 'no model that it lists'}: name one (--served-model; --engine-model of a "
            "run), unless the URL lacks '/v1'"
        )
    if of and _plain(of) not in _plain(there[0]):
        raise LensteerError(
            f"{url} serves {there[0]!r}, and the plan is of {of!r}: if that is the model, say --served-model {there[0]}"
        )
    return there[0]


def _plain(name: str) -> str:
    """A name without what varies between servers: letters and digits of its last part."""
    return "".join(c for c in name.rpartition("/")[2].lower() if c.isalnum())


def read_answers(path: Path) -> list[Answer]:
    """Recorded answers, from a file that `ask_all` wrote.

    Raises:
        LensteerError: no such file, or a line of another form.
    """
    found = []
    for number, row in read_jsonl(path):
        with reading(f"{path}, line {number}", "ask again"):
            found.append(revived(Answer, row))
    return found


def ask_all(
    client: Client,
    model: str,
    tasks: Sequence[Task],
    asking: Asking,
    path: Path,
    purpose: str,
    step: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """All answers to the tasks, those of an earlier call included, in the order of tasks and samples.

    Args:
        client: of the endpoint.
        model: the name that it serves the model by.
        tasks: to ask.
        asking: how answers are drawn.
        path: the answers' file; each is appended as it arrives.
        purpose: what the answers are for, so that two uses have different seeds.
        step: called with the number of answers so far, and of all.

    Raises:
        LensteerError: as `Client.ask` does; it says how many answers are kept.
    """
    known = {(a.task, a.sample): a for a in (read_answers(path) if drop_cut_line(path) else [])}
    wanted = [(task, sample) for task in tasks for sample in range(asking.n_samples)]
    missing = [(task, sample) for task, sample in wanted if (task.id, sample) not in known]
    pool = ThreadPoolExecutor(client.endpoint.concurrency)
    try:
        running = [pool.submit(client.ask, model, task, sample, asking, purpose) for task, sample in missing]
        for done in as_completed(running):
            answer = done.result()
            append_jsonl(path, [asdict(answer)])
            known[answer.task, answer.sample] = answer
            if step is not None:
                step(len(known), len(wanted))
    except LensteerError as error:
        raise LensteerError(
            f"{error}; {len(known)} of {len(wanted)} answers are kept in {path}, and the same command asks the others"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [known[task.id, sample] for task, sample in wanted]
