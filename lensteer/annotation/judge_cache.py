"""The judge's replies on disk, one JSON file each, found again by what was asked. Knows of no server."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from threading import Lock
from typing import Any

from lensteer.annotation.judge_prompt import PROMPT_VERSION, Messages
from lensteer.files import write_atomically

_WRITING = Lock()  # processes have temporary files of their own, threads of one process do not


def default_folder() -> Path:
    """`lensteer/judge` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lensteer" / "judge"


class ReplyCache:
    """Replies by the SHA-256 of model, prompt version, parameters and messages.

    A file is written whole as soon as its reply is there. Any number of processes may share a folder.
    """

    def __init__(self, folder: Path, model: str, parameters: dict[str, Any]) -> None:
        self.folder = folder
        self.identity = {"model": model, "prompt_version": PROMPT_VERSION, "parameters": parameters}

    def key(self, messages: Messages) -> str:
        """What the reply to these messages is filed under."""
        asked = json.dumps({**self.identity, "messages": messages}, sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """`text` and `cut` of a reply, if it is there; a file that is damaged is not."""
        try:
            record = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            return None
        return {"text": record["text"], "cut": bool(record.get("cut"))}

    def put(self, key: str, messages: Messages, text: str, cut: bool) -> None:
        """File a reply, with what was asked."""
        record = {**self.identity, "messages": messages, "text": text, "cut": cut}
        with _WRITING:
            write_atomically(self.folder / f"{key}.json", json.dumps(record, indent=1))
