"""inspect_ai on a steered model: the model provider "lensteer".

    inspect eval task.py --model lensteer/MODEL -M plan=FOLDER -M dtype=bfloat16

The provider is found by its entry point, so nothing has to be imported. In Python, `steered_model(bridge, plan)` takes
what is loaded. Requests that wait together share a batch. Messages are formatted by lensteer's own chat template
handling, so prompts have the ids of lensteer's own runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from time import sleep
from typing import TYPE_CHECKING, Any

from lensteer import models
from lensteer.adapters.requests import Drawing, Reply, Steered
from lensteer.errors import LensteerError
from lensteer.steering import Plan

try:
    from anyio import CapacityLimiter, to_thread
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessageAssistant,
        GenerateConfig,
        Model,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        modelapi,
    )
except ImportError as error:
    raise LensteerError(
        f"lensteer.adapters.inspect_ai needs the package inspect-ai ({error}): pip install 'lensteer[inspect]'"
    ) from error

if TYPE_CHECKING:
    from inspect_ai.model import ChatMessage
    from inspect_ai.tool import ToolChoice, ToolInfo
    from transformer_lens.model_bridge import TransformerBridge

#: Settings that change a reply, and that are obeyed.
OBEYED = ("max_tokens", "temperature", "top_p", "stop_seqs", "seed")
#: Settings that say how inspect asks, not what.
NEUTRAL = (
    "max_retries",
    "timeout",
    "attempt_timeout",
    "stream_idle_timeout",
    "max_connections",
    "adaptive_connections",
    "system_message",
    "max_tool_output",
    "cache_prompt",
    "cache",
    "batch",
    "fail_on_refusal",
    "reasoning_history",
)
#: Tokens of a reply if neither the task nor the command says.
MAX_TOKENS = 400
#: Seconds in which requests may join a batch.
WAIT = 0.05


@dataclass
class _Waiting:
    """A request that waits for its batch."""

    ids: list[int]
    drawing: Drawing
    reply: Future[Reply] = field(default_factory=Future)


class SteeredAPI(ModelAPI):
    """A bridge with a plan on, as inspect asks it: one chat after another, without tools."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  # inspect's own signature; it is not changed
        *,
        model: str | TransformerBridge | None = None,
        plan: str | Plan | None = None,
        dtype: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        batch_size: int = 32,
        thinking: bool = True,
    ) -> None:
        """Load what is not loaded. inspect gives the first four arguments.

        Args:
            model_name: what follows "lensteer/": a checkpoint's folder or name, if there is no `model`.
            base_url: not used.
            api_key: not used.
            config: settings of every request.
            model: a bridge, or a checkpoint's folder or name.
            plan: a plan's folder or name, as in `load_plan`; or a plan. Without one, the model is unsteered.
            dtype: of the weights; by default float32.
            device: by default TransformerLens chooses.
            revision: of a checkpoint on the hub.
            batch_size: most chats that are run together.
            thinking: passed to the chat template as `enable_thinking`.

        Raises:
            LensteerError: a model or a plan that cannot be read, a plan of another model, or a batch size below 1.
        """
        super().__init__(model_name=model_name, base_url=base_url, api_key=api_key, config=config)
        if batch_size < 1:
            raise LensteerError(f"batch_size={batch_size}: give a positive number")
        self.steered = Steered.of(
            model_name if model is None else model,
            plan,
            loading=dict(dtype=dtype, device=device, revision=revision),
            thinking=thinking,
            batch_size=batch_size,
        )
        self._waiting: list[_Waiting] = []
        self._lock = Lock()
        self._worker: ThreadPoolExecutor | None = None

    def max_tokens(self) -> int | None:
        """The limit of a reply where none is set."""
        return MAX_TOKENS

    def max_connections(self) -> int:
        """Chats that may wait at a time: a batch."""
        return self.steered.batch_size

    def connection_key(self) -> str:
        """One limit for this model."""
        return f"lensteer-{id(self.steered)}"

    def close(self) -> None:
        """End the model's thread; a later request starts another."""
        if self._worker is not None:
            self._worker.shutdown(wait=False)
            self._worker = None

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """The reply to a chat.

        Raises:
            LensteerError: tools, messages that are more than text, or settings that are not supported.
        """
        drawing = _drawing(config, tools)
        prompt = self.steered.chat(_messages(input)) + self.steered.appended
        request = _Waiting(models.encode(self.steered.model, prompt), drawing)
        with self._lock:
            self._waiting.append(request)
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, "lensteer")  # one thread runs the model
            self._worker.submit(self._run)
        # A limiter of its own: inspect limits the number of requests that wait.
        reply = await to_thread.run_sync(request.reply.result, abandon_on_cancel=True, limiter=CapacityLimiter(1))
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(content=reply.text, model=self.model_name, source="generate"),
                    stop_reason="stop" if reply.finished else "max_tokens",
                )
            ],
            usage=ModelUsage(
                input_tokens=len(request.ids),
                output_tokens=reply.n_tokens,
                total_tokens=len(request.ids) + reply.n_tokens,
            ),
        )

    def _run(self) -> None:
        """Reply to a batch of what waits. Every request calls for this, so none is left waiting."""
        if not self._waiting:
            return
        sleep(WAIT)
        with self._lock:
            batch = [r for r in self._waiting if r.drawing == self._waiting[0].drawing][: self.steered.batch_size]
            self._waiting = [r for r in self._waiting if not any(r is other for other in batch)]
        try:
            replies = self.steered.replies([request.ids for request in batch], batch[0].drawing)
        except BaseException as error:  # the waiting requests raise it
            for request in batch:
                request.reply.set_exception(error)
            return
        for request, reply in zip(batch, replies, strict=True):
            request.reply.set_result(reply)


@modelapi(name="lensteer")
def provider() -> type[ModelAPI]:
    """The provider: `--model lensteer/MODEL`."""
    return SteeredAPI


def steered_model(
    model: str | TransformerBridge,
    plan: str | Plan | None = None,
    *,
    config: GenerateConfig | None = None,
    batch_size: int = 32,
    thinking: bool = True,
) -> Model:
    """A model for `inspect_ai.eval(task, model=...)` from what is loaded. The log holds its identity and the edits.

    Args:
        model: a bridge, or a checkpoint's folder or name.
        plan: a plan, or its folder; None for the unsteered model.
        config: settings of every request.
        batch_size: as in `SteeredAPI`.
        thinking: as in `SteeredAPI`.

    Raises:
        LensteerError: as `SteeredAPI`.
    """
    config = config or GenerateConfig()
    name = model if isinstance(model, str) else models.fingerprint(model).name
    # inspect's decorator makes of `provider` a function that returns the model.
    api: Any = provider(name, config=config, model=model, plan=plan, batch_size=batch_size, thinking=thinking)
    return Model(api, config, api.steered.describe())


def _messages(given: Sequence[ChatMessage]) -> list[Mapping[str, str]]:
    found: list[Mapping[str, str]] = []
    for message in given:
        kinds = [] if isinstance(message.content, str) else [part.type for part in message.content]
        if message.role == "tool" or set(kinds) - {"text", "reasoning"}:
            raise LensteerError(f"a {message.role} message of {kinds or 'text'}: only text is taken")
        found.append({"role": message.role, "content": message.text})
    return found


def _drawing(config: GenerateConfig, tools: Sequence[ToolInfo]) -> Drawing:
    """The settings of a request.

    A temperature that is not given is 0: greedy, as `lensteer benchmark` is.
    """
    if tools:
        raise LensteerError(f"{len(tools)} tools: a steered model is asked without tools")
    given = {name: value for name, value in config.model_dump(exclude_none=True).items() if value is not False}
    if unknown := sorted(set(given) - set(OBEYED) - set(NEUTRAL)):
        settings = {name: given[name] for name in unknown}
        raise LensteerError(f"settings {settings}: lensteer's generation takes {', '.join(OBEYED)}")
    return Drawing(
        config.max_tokens or MAX_TOKENS,
        config.temperature or 0.0,
        1.0 if config.top_p is None else config.top_p,
        tuple(config.stop_seqs or ()),
        config.seed or 0,
    )
