"""Asking an OpenAI-compatible server until it answers or cannot: formats, waits, retries, errors in words.

Knows nothing of chains, labels or files. The key is read from the environment where a client is made, is kept by that
client only, and is cut out of everything that a server says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Coroutine
from email.utils import mktime_tz, parsedate_tz
from threading import Event, Thread
from typing import Any, NoReturn, TypeVar

from lensteer.annotation.judge_prompt import Messages
from lensteer.annotation.judge_reply import Answer
from lensteer.errors import LensteerError

OPENAI = "https://api.openai.com/v1"
URL, MODEL, KEY = "LENSTEER_JUDGE_URL", "LENSTEER_JUDGE_MODEL", "LENSTEER_JUDGE_KEY"

MAX_WAIT = 120.0  # seconds between two tries; a server that asks for more is not waited for
MIN_KEY = 8  # letters; what is shorter, such as "none", is no secret, and might be part of any text
RETRIED = (408, 409, 425, 429)  # and all from 500
REFUSED = (400, 413, 422)  # of one question: too long, filtered, or a parameter that the server does not know

T = TypeVar("T")


class Stopped(Exception):
    """The whole run ends; `Client.failure` says why."""


class Client:
    """One run's connection, with counts. To be used in one event loop.

    Attributes:
        failure: why no further question makes sense; empty while all is well.
        answered: questions with an answer.
        n_requests: requests sent, retries included.
        prompt_tokens: as the server counts them; 0 if it does not.
        completion_tokens: likewise.
    """

    def __init__(
        self, url: str, model: str, parameters: dict[str, Any], *, retries: int, timeout: float, backoff: float
    ) -> None:
        self.url, self.model, self.parameters = url, model, parameters
        self.retries, self.timeout, self.backoff = retries, timeout, backoff
        self.failure = ""
        self.answered = self.n_requests = self.prompt_tokens = self.completion_tokens = 0
        self._json_mode = True
        self._failed = asyncio.Event()
        self._api: Any = None

    async def ask(self, messages: Messages) -> Answer:
        """The answer to one question.

        Raises:
            Stopped: the server does not answer, not even after retries, or refuses the key or the model.
            LensteerError: no openai client, or no key.
        """
        openai = _openai()
        if self._api is None:
            self._api = openai.AsyncOpenAI(
                base_url=self.url, api_key=_key(self.url) or "unused", max_retries=0, timeout=self.timeout
            )
        retried: list[str] = []
        json_mode = self._json_mode
        while not self.failure:
            wait, empty = 0.0, False
            try:
                completion = await self._send(messages, json_mode)
            except (asyncio.TimeoutError, openai.APITimeoutError):
                trouble = f"no answer within {self.timeout:g} s"
            except openai.APIConnectionError as error:
                trouble = f"no connection ({_words(error.__cause__ or error)})"
            except openai.APIStatusError as error:
                status = error.status_code
                trouble = f"status {status} ({_words(error)})"
                if json_mode and status in (400, 422):
                    json_mode = False
                    continue
                if status in REFUSED:
                    return Answer("", refused=trouble, retried=tuple(retried))
                if status not in RETRIED and status < 500:
                    self.fail(trouble + _hint(status))
                wait = _retry_after(error.response.headers)
            except (openai.APIError, ValueError) as error:
                trouble = f"an answer that cannot be read ({_words(error)})"
            else:
                self._json_mode = self._json_mode and json_mode
                text, cut = _content(completion)
                if text:
                    self.answered += 1
                    return Answer(_without_key(text), cut, retried=tuple(retried))
                empty = hasattr(completion, "choices")
                trouble = _without_text(completion) if empty else "no chat completion (does the URL lack '/v1'?)"
            if wait > MAX_WAIT:
                self.fail(f"{trouble}, and it asks to wait for {wait:.0f} s")
            if len(retried) == self.retries:
                if empty:  # as some servers say that they will not answer this
                    return Answer("", refused=trouble, retried=tuple(retried))
                self.fail(f"{trouble}, after {self.retries} retries")
            grown = self.backoff * 2 ** min(len(retried), 10) * random.uniform(0.75, 1.25)
            retried.append(trouble)
            with contextlib.suppress(asyncio.TimeoutError):  # unless the run ends in the meantime
                await asyncio.wait_for(self._failed.wait(), max(wait, min(grown, MAX_WAIT)))
        raise Stopped

    async def close(self) -> None:
        """Close the connections."""
        if self._api is not None:
            await self._api.close()

    async def _send(self, messages: Messages, json_mode: bool) -> Any:
        form = {"response_format": {"type": "json_object"}} if json_mode else {}
        self.n_requests += 1
        call = self._api.chat.completions.create(model=self.model, messages=messages, **self.parameters, **form)
        completion = await asyncio.wait_for(call, self.timeout)  # the client's own limit is on each read
        usage = getattr(completion, "usage", None)
        for name in ("prompt_tokens", "completion_tokens"):
            count = getattr(usage, name, 0)
            setattr(self, name, getattr(self, name) + (count if isinstance(count, int) else 0))
        return completion

    def fail(self, reason: str) -> NoReturn:
        """End the run: nobody waits for another try.

        Raises:
            Stopped: always.
        """
        self.failure = self.failure or reason
        self._failed.set()
        raise Stopped


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, in a thread of its own if a loop runs here already, as in Jupyter.

    An interrupt cancels it, and with it all requests on their way.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main)
    loop = asyncio.new_event_loop()
    task = loop.create_task(main)

    done = Event()

    def work() -> None:
        try:
            loop.run_until_complete(asyncio.wait([task]))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()
            done.set()

    Thread(target=work, name="lensteer-judge", daemon=True).start()
    try:
        while not done.wait(0.1):  # in steps: an endless wait lets some interrupts not through
            pass
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the loop may just have closed
            loop.call_soon_threadsafe(task.cancel)
        done.wait()
        raise
    return task.result()


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise LensteerError("the judge needs the openai client: pip install lensteer[judge]") from error
    return openai


def _key(url: str) -> str:
    """The key for a server; OpenAI's own variable goes with OpenAI's own variable for the URL (or its default) only."""
    key = os.environ.get(KEY, "")
    if not key and url == (os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/"):
        key = os.environ.get("OPENAI_API_KEY", "")
    if not key and url == OPENAI:
        raise LensteerError(f"no key for {url}: set {KEY} in the environment (or {URL} to another server)")
    return key


def _without_key(text: str) -> str:
    for name in (KEY, "OPENAI_API_KEY"):
        key = os.environ.get(name, "")
        if len(key) >= MIN_KEY:
            text = text.replace(key, "[key]")
    return text


def _words(error: BaseException) -> str:
    """What an error says, in one short line, without the key."""
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    return " ".join(_without_key(str(said or error) or type(error).__name__).split())[:300]


def _without_text(completion: Any) -> str:
    """What is said of an answer without text: some servers send an error as if it were one."""
    error = getattr(completion, "error", None)
    said = f" ({' '.join(_without_key(str(error)).split())[:300]})" if error else ""
    return f"an answer without text{said}"


def _hint(status: int) -> str:
    if status in (401, 403):
        return f"; the key is read from {KEY}"
    return "; are the URL and the model right?" if status == 404 else ""


def _retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait, as a number or a date; 0 if it does not say."""
    value = headers.get("retry-after") or ""
    try:
        seconds = float(value)
    except ValueError:
        date = parsedate_tz(value)
        seconds = mktime_tz(date) - time.time() if date else 0.0
    return seconds if seconds > 0 else 0.0  # nan, too


def _content(completion: Any) -> tuple[str, bool]:
    """Text of the first choice, and whether it was cut off; no text if anything is not as it should be."""
    try:
        choice = completion.choices[0]
        text = choice.message.content
    except (AttributeError, IndexError, KeyError, TypeError):
        return "", False
    return (text if isinstance(text, str) and text.strip() else ""), choice.finish_reason == "length"
