"""A judge's questions about many parts of chains, some at a time, each asked once. Knows nothing of labels."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence

from lensteer.annotation.judge_cache import ReplyCache
from lensteer.annotation.judge_client import Client, Stopped
from lensteer.annotation.judge_prompt import Messages
from lensteer.annotation.judge_reply import Answer, Remark, Talk

#: Refusals in a row, with no answer to anything, that end a run: it is the server then, not the question.
MAX_REFUSALS = 3


class Work:
    """One call's way through its parts, some at a time."""

    def __init__(self, cache: ReplyCache, client: Client) -> None:
        self.cache, self.client = cache, client
        self.done: dict[int, tuple[dict[int, str], list[Remark]]] = {}
        self.n_cached = 0
        self._refusals: list[str] = []
        self._asking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def all(self, talks: Sequence[Talk], concurrency: int, tick: Callable[[], object]) -> None:
        """Finish all parts, or as many as there are before `client.failure`.

        Until a first answer there is one request at a time: it shows whether key, model and format are right. After a
        failure nothing new is asked, but what is on its way is waited for and kept.
        """
        queue = iter(enumerate(talks))

        async def worker(until_answered: bool) -> None:
            for part, talk in queue:
                try:
                    self.done[part] = await self._finish(talk)
                except Stopped:
                    return
                tick()
                if self.client.failure or (until_answered and self.client.answered):
                    return

        await worker(True)
        if not self.client.failure:
            workers = [asyncio.ensure_future(worker(False)) for _ in range(concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:  # after an interrupt none of them lives on
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if self._refusals and not (self.client.answered or self.n_cached):
            self.client.failure = self.client.failure or self._refusals[-1]

    async def _finish(self, talk: Talk) -> tuple[dict[int, str], list[Remark]]:
        messages = next(talk)
        while True:
            answer = await self._answer(messages)
            try:
                messages = talk.send(answer)
            except StopIteration as end:
                return end.value

    async def _answer(self, messages: Messages) -> Answer:
        key = self.cache.key(messages)
        async with self._asking[key]:  # chains may be the same, and are then asked once
            known = self.cache.get(key)
            if known is not None:
                self.n_cached += 1
                return Answer(**known)
            answer = await self.client.ask(messages)
            if not answer.refused:
                self.cache.put(key, messages, answer.text, answer.cut)
                return answer
        self._refusals.append(answer.refused)
        if len(self._refusals) >= MAX_REFUSALS and not (self.client.answered or self.n_cached):
            self.client.fail(answer.refused)
        return answer
