"""The judge's server: connection, requests, and the cache of replies on disk.

The openai client handles connections, time limits, retries, back-off and Retry-After. This module decides which key is
sent to which server and when a failure ends a whole run, and caches each answer as soon as it arrives.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, local
from typing import Any, NoReturn

from lensteer.annotation.judge_questions import PROMPT_VERSION, Answer, Messages, clean
from lensteer.arguments import typed
from lensteer.endpoints import check_url
from lensteer.errors import LensteerError
from lensteer.files import check_text, write_atomically

OPENAI = "https://api.openai.com/v1"
URL, MODEL, KEY = "LENSTEER_JUDGE_URL", "LENSTEER_JUDGE_MODEL", "LENSTEER_JUDGE_KEY"

MIN_KEY = 8  # characters; a shorter one, such as "none", is not a secret and could be part of any text
MAX_REFUSALS = 3  # in a row, before any answer: then the cause is the server, not the question
EMPTY_PAUSE = 1.0  # seconds before a question whose answer had no text is repeated

_WRITING = Lock()  # temporary files are named by process, so the threads of one process take turns


class Stopped(Exception):
    """The whole run ends; `Client.failure` says why."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """A chat model on an OpenAI-compatible server, and the folder of its replies (extra `judge`).

    The key comes from the environment only: `LENSTEER_JUDGE_KEY`, or `OPENAI_API_KEY` if the URL is OpenAI's or that of
    `OPENAI_BASE_URL` (it is sent to no other server). A local server may need none.

    Attributes:
        model: name of the model; by default `LENSTEER_JUDGE_MODEL`.
        base_url: of the server, such as `http://localhost:8000/v1`; by default `LENSTEER_JUDGE_URL`, `OPENAI_BASE_URL`,
            or OpenAI.
        cache: folder of the replies; None is the user's cache folder.
        retries: of a request on status 408, 409, 429 or 5xx, a timeout, a lost connection, or an answer
            without text. The openai client waits between them, as long as the server's Retry-After says.
        timeout: seconds without data from the server after which a try fails.
        temperature: None leaves it to the server (some models accept no other).

    Raises:
        LensteerError: no model, an invalid URL or one that holds a secret, a number out of range, or a lone surrogate
            in a text.
    """

    model: str = ""
    base_url: str = ""
    cache: str | Path | None = None
    retries: int = 5
    timeout: float = 120.0
    temperature: float | None = 0.0

    def __post_init__(self) -> None:
        typed(self)
        url = self.base_url or os.environ.get(URL) or os.environ.get("OPENAI_BASE_URL") or OPENAI
        object.__setattr__(self, "base_url", check_url(url, KEY))
        object.__setattr__(self, "model", self.model or os.environ.get(MODEL, ""))
        if not self.model:
            raise LensteerError(f"no model for the judge at {url}: give model='...' or set {MODEL}")
        check_text(self.model, "the judge's model")
        check_text(url, "the judge's URL")
        if self.retries < 0:
            raise LensteerError(f"retries={self.retries}: give at least 0")
        if not self.timeout > 0:
            raise LensteerError(f"timeout={self.timeout}: give a positive number of seconds")

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters of every request, without model and messages."""
        return {} if self.temperature is None else {"temperature": self.temperature}

    @property
    def replies(self) -> ReplyCache:
        """The replies on disk."""
        return ReplyCache(Path(self.cache or default_folder()), self.model, self.parameters)


def default_folder() -> Path:
    """`lensteer/judge` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lensteer" / "judge"


class ReplyCache:
    """Replies on disk, one JSON file each, by the SHA-256 of model, prompt version, parameters and messages.

    A file is written atomically when its reply arrives. Any number of processes may share a folder.
    """

    def __init__(self, folder: Path, model: str, parameters: dict[str, Any]) -> None:
        self.folder = folder
        self.identity = {"model": model, "prompt_version": PROMPT_VERSION, "parameters": parameters}

    def key(self, messages: Messages) -> str:
        """The file name, without its ending, of the reply to these messages."""
        asked = json.dumps({**self.identity, "messages": messages}, sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def get(self, messages: Messages) -> Answer | None:
        """The reply to these messages; None if there is none, or if its file is damaged."""
        try:
            record = json.loads((self.folder / f"{self.key(messages)}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            return None
        return Answer(clean(record["text"]), bool(record.get("cut")))

    def put(self, messages: Messages, answer: Answer) -> None:
        """Store a reply with its request."""
        record = {**self.identity, "messages": messages, "text": answer.text, "cut": answer.cut}
        with _WRITING:
            write_atomically(self.folder / f"{self.key(messages)}.json", json.dumps(record, indent=1))


class Client:
    """The requests of one run, from any number of threads, with their counts.

    Attributes:
        failure: why no further question is sent; empty if there was no failure.
        refusals: the reason for each question without an answer.
        n_answered: questions that the server answered.
        n_cached: questions that the cache answered.
        n_requests: requests sent, retries included.
        prompt_tokens: as reported by the server; 0 if it does not.
        completion_tokens: the same for the answers.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection, self.replies = connection, connection.replies
        self.failure = ""
        self.n_answered = self.n_cached = self.n_requests = self.prompt_tokens = self.completion_tokens = 0
        self.refusals: list[str] = []
        self._json_mode = True
        self._openai: Any = None
        self._api: Any = None
        self._counting = Lock()
        self._stopped = Event()
        self._asking: dict[str, Lock] = {}
        self._thread = local()

    def answer(self, messages: Messages) -> Answer:
        """The answer to a question: from the cache, else from the server. Identical questions are sent once.

        Raises:
            Stopped: as `ask` does, or the server has refused `MAX_REFUSALS` questions and answered none.
            LensteerError: as `ask` does.
        """
        with self._asking.setdefault(self.replies.key(messages), Lock()):
            known = self.replies.get(messages)
            if known is not None:
                with self._counting:
                    self.n_cached += 1
                return known
            answer = self.ask(messages)
            if not answer.refused:
                self.replies.put(messages, answer)
                return answer
        self.refusals.append(answer.refused)
        if len(self.refusals) >= MAX_REFUSALS and not (self.n_answered or self.n_cached):
            self.fail(answer.refused)
        return answer

    def ask(self, messages: Messages) -> Answer:
        """The server's answer to a question.

        Raises:
            Stopped: the server does not answer after all retries, or rejects the key or the model.
            LensteerError: no openai client, or no key.
        """
        self._connect()
        openai, json_mode = self._openai, self._json_mode
        retried: list[str] = []
        while not self.failure:
            tries: list[str] = []  # outcome of each try of the openai client, written by its hooks
            self._thread.tries = tries
            text, hint, fatal, repeat = "", "", True, False
            try:
                completion = self._send(messages, json_mode)
            except openai.APITimeoutError:
                trouble = f"no answer within {self.connection.timeout:g} s"
            except openai.APIConnectionError as error:
                trouble = f"no connection ({_words(error.__cause__ or error)})"
            except openai.APIStatusError as error:
                status = error.status_code
                if json_mode and status in (400, 422):
                    json_mode = False
                    continue
                trouble, hint = f"status {status} ({_words(error)})", _hint(error.response)
                fatal = status not in (400, 413, 422)  # of one question: too long, filtered, an unknown parameter
            except (openai.APIError, ValueError) as error:
                trouble, repeat = f"an answer that cannot be read ({_words(error)})", True
            else:
                self._json_mode = self._json_mode and json_mode
                text, cut = _content(completion)
                trouble, fatal, repeat = _without_text(completion), not hasattr(completion, "choices"), True
            retried += tries[:-1]
            if text:
                with self._counting:
                    self.n_answered += 1
                return Answer(_without_key(clean(text)), cut, retried=tuple(retried))
            if repeat and len(retried) < self.connection.retries:  # the openai client counts it as an answer
                retried.append(trouble)
                self._stopped.wait(EMPTY_PAUSE)
            elif fatal:
                self.fail(trouble + (f", after {len(retried)} retries" if retried else "") + hint)
            else:  # some servers answer a filtered question without text
                return Answer("", refused=trouble, retried=tuple(retried))
        raise Stopped

    def fail(self, reason: str) -> NoReturn:
        """End the run: nothing new is sent, and no thread retries.

        Raises:
            Stopped: always.
        """
        self.stop(reason)
        raise Stopped

    def stop(self, reason: str) -> None:
        """End the run as `fail` does, without raising."""
        self.failure = self.failure or reason
        self._stopped.set()

    def close(self) -> None:
        """Close the connections."""
        if self._api is not None:
            self._api.close()

    def _connect(self) -> None:
        with self._counting:
            if self._api is not None:
                return
            try:
                import openai
            except ImportError as error:
                raise LensteerError("the judge needs the openai client: pip install lensteer[judge]") from error
            url = self.connection.base_url
            hooks = {"request": [self._before_try], "response": [self._after_try]}
            self._openai = openai
            self._api = openai.OpenAI(
                base_url=url,
                api_key=_key(url) or "unused",
                max_retries=self.connection.retries,
                timeout=self.connection.timeout,
                http_client=openai.DefaultHttpxClient(event_hooks=hooks),
            )

    def _send(self, messages: Messages, json_mode: bool) -> Any:
        form = {"response_format": {"type": "json_object"}} if json_mode else {}
        completion = self._api.chat.completions.create(
            model=self.connection.model, messages=messages, **self.connection.parameters, **form
        )
        usage = getattr(completion, "usage", None)
        with self._counting:
            for name in ("prompt_tokens", "completion_tokens"):
                count = getattr(usage, name, 0)
                setattr(self, name, getattr(self, name) + (count if isinstance(count, int) else 0))
        return completion

    def _before_try(self, request: Any) -> None:
        """Called by the openai client before each try, in the thread of the request."""
        if self.failure:
            raise Stopped
        self._thread.tries.append("no connection, or no answer in time")
        with self._counting:
            self.n_requests += 1

    def _after_try(self, response: Any) -> None:
        """Called by the openai client when a try has returned a status, before the answer is read."""
        status = response.status_code
        self._thread.tries[-1] = f"status {status}" if status >= 300 else "an answer that broke off"


def _key(url: str) -> str:
    """The key for a server; `OPENAI_API_KEY` is used only for the URL of `OPENAI_BASE_URL` or its default."""
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


def _short(text: str) -> str:
    return " ".join(_without_key(clean(text)).split())[:300]


def _words(error: BaseException) -> str:
    """An error's message in one short line, without the key."""
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    return _short(str(said or error) or type(error).__name__)


def _hint(response: Any) -> str:
    """What a user can do about a status; the openai client itself waits for two minutes at most."""
    if response.status_code in (401, 403):
        return f"; the key is read from {KEY}"
    if response.status_code == 404:
        return "; are the URL and the model right?"
    wait = response.headers.get("retry-after")
    return f"; it asks to wait for {wait} s" if wait else ""


def _without_text(completion: Any) -> str:
    """What is wrong with an answer without text; some servers send an error with status 200."""
    if not hasattr(completion, "choices"):
        return "no chat completion (does the URL lack '/v1'?)"
    error = getattr(completion, "error", None)
    return f"an answer without text ({_short(str(error))})" if error else "an answer without text"


def _content(completion: Any) -> tuple[str, bool]:
    """Text of the first choice, and whether it was cut off; "" if the answer does not have the expected shape."""
    try:
        choice = completion.choices[0]
        text = choice.message.content
    except (AttributeError, IndexError, KeyError, TypeError):
        return "", False
    return (text if isinstance(text, str) and text.strip() else ""), choice.finish_reason == "length"
