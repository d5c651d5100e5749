"""What a harness asks a model for: replies to prompts, up to a stop text, and log-probabilities of given texts.

A plan acts as in lensteer's own runs: the prompt that a harness gives is the prompt of its scope, and what is generated
or scored is the response.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer.errors import LensteerError
from lensteer.export import load_plan
from lensteer.forward import forced_logits
from lensteer.generation import decode
from lensteer.generation.jobs import chain_seed
from lensteer.models import load_model
from lensteer.steering import Plan, active_plans, wanted_prefill

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Most logits of one forward: half a gigabyte in float32.
_LOGITS = 2**27


@dataclass(frozen=True)
class Drawing:
    """How a harness wants replies drawn.

    Attributes:
        max_new_tokens: per reply.
        temperature: 0 is greedy.
        top_p: nucleus sampling, as in `Sampling`.
        stops: texts that end a reply, and are not part of it.
        seed: of sampled replies. The k-th reply to a prompt has a seed of its own, whatever else is asked.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stops: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """What the model wrote: its text without special tokens, its number of tokens, and whether it ended by itself.

    A reply that a stop text ended counts as finished.
    """

    text: str
    n_tokens: int
    finished: bool


@dataclass
class Steered:
    """A model and the plan that everything is run with.

    Attributes:
        model: the bridge. Plans that are on apply, too.
        plan: None for the unsteered model.
        thinking: passed to the chat template, as in `models.chat_text`.
        batch_size: prompts that are run together.
        asked: how often each prompt was replied to, for the seeds.
    """

    model: TransformerBridge
    plan: Plan | None = None
    thinking: bool = True
    batch_size: int = 32
    asked: Counter[str] = field(default_factory=Counter, repr=False)

    @staticmethod
    def of(
        model: str | TransformerBridge,
        plan: str | Plan | None,
        *,
        loading: Mapping[str, Any],
        thinking: bool = True,
        batch_size: int = 32,
    ) -> Steered:
        """From a checkpoint's and a plan's folder or name, or from what is loaded.

        Args:
            model: as in `load_model`, or a bridge.
            plan: as in `load_plan`, or a plan; None or "" for the unsteered model.
            loading: options of `load_model`; None is its default.
            thinking: as in the attributes.
            batch_size: as in the attributes.

        Raises:
            LensteerError: a model or a plan that cannot be read, or a plan of another model.
        """
        if isinstance(model, str):
            model = load_model(model or None, **{name: value for name, value in loading.items() if value is not None})
        if isinstance(plan, str):
            plan = load_plan(plan, model) if plan else None
        return Steered(model, plan, thinking, batch_size)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation; a last message of the assistant is the beginning of the reply."""
        begun = ""
        if messages and messages[-1]["role"] == "assistant":
            messages, begun = messages[:-1], messages[-1]["content"]
        return models.chat_text(self.model, messages, thinking=self.thinking) + begun

    @property
    def appended(self) -> str:
        """The text that a cache plan appends to a prompt before a reply; empty for others."""
        return wanted_prefill(self.model, self.plan)

    def replies(self, prompts: Sequence[Sequence[int]], drawing: Drawing) -> list[Reply]:
        """Reply to prompts, which share a batch.

        Args:
            prompts: token ids of a prompt with `appended`.
            drawing: how.

        Raises:
            LensteerError: as `generation.decode`.
        """
        model = self.model
        special = [stop for stop in drawing.stops if stop in model.tokenizer.all_special_tokens]
        end_ids = {int(model.tokenizer.convert_tokens_to_ids(stop)) for stop in special}
        stops = [stop for stop in drawing.stops if stop and stop not in special]
        window = max((len(stop.encode()) for stop in stops), default=0) + 1  # a token holds at least one byte
        made: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        with closing(
            decode(
                model,
                prompts,
                max_new_tokens=drawing.max_new_tokens,
                temperature=drawing.temperature,
                top_p=drawing.top_p,
                seeds=[self._seed(ids, drawing.seed) for ids in prompts] if drawing.temperature else None,
                plans=[self.plan] * len(prompts),
            )
        ) as steps:
            for step in steps:
                for row, token, ended in zip(*step, strict=True):
                    if done[row]:
                        continue
                    made[row].append(token)
                    done[row] = ended or token in end_ids or _cut(self._text(made[row][-window:]), stops) is not None
                if all(done):
                    break
        found = []
        for ids, finished in zip(made, done, strict=True):
            text = self._text(ids)
            at = _cut(text, stops)
            found.append(Reply(text[:at], len(ids), finished or at is not None))
        return found

    def _text(self, ids: Sequence[int]) -> str:
        text = self.model.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _seed(self, ids: Sequence[int], seed: int) -> int:
        prompt = " ".join(map(str, ids))
        self.asked[prompt] += 1
        return chain_seed(seed, prompt, self.asked[prompt] - 1)

    def log_probs(
        self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
    ) -> list[tuple[Float[Tensor, " _pos"], bool]]:
        """The log-probability of each token of given texts, and whether greedy decoding would write them.

        Args:
            prompts: token ids, at least one each.
            texts: token ids that follow them, at least one each.

        Raises:
            LensteerError: an empty prompt or text, a plan that appends to the prompt, or logits that are not finite.
        """
        if self.appended:
            raise LensteerError(
                "a cache plan at 'offset_token' appends a token to the prompt, after which a given text would not be "
                "scored as it stands: use position='last_prompt'"
            )
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) - len(texts[i]))
        found: dict[int, tuple[Tensor, bool]] = {}
        while order:
            longest = max(len(texts[i]) for i in order[: self.batch_size])
            n = max(1, min(self.batch_size, _LOGITS // (max(1, longest) * int(self.model.cfg.d_vocab))))
            batch, order = order[:n], order[n:]
            rows = forced_logits(
                self.model, [prompts[i] for i in batch], [texts[i] for i in batch], plans=[self.plan] * len(batch)
            )
            for i, logits in zip(batch, rows, strict=True):
                ids = torch.tensor(list(texts[i]), device=logits.device)
                logs = logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
                if not logs.isfinite().all():
                    raise LensteerError("log-probabilities are not finite: lower the coefficient")
                found[i] = (logs.cpu(), bool((logits.argmax(-1) == ids).all()))
        return [found[i] for i in range(len(prompts))]

    @property
    def edits_cache(self) -> bool:
        """Whether the plan, or one that is on, edits a slot of the cache."""
        return any(plan.slots for plan in [*active_plans(self.model), *([self.plan] if self.plan else [])])

    def describe(self) -> dict[str, Any]:
        """What is asked, for a harness's records: the model's identity, and the edits without their vectors."""
        edits = () if self.plan is None else self.plan.edits
        return {
            "lensteer_model": models.fingerprint(self.model).to_dict(),
            "lensteer_plan": [
                {
                    "label": edit.direction.label,
                    "layer": edit.layer,
                    "coefficient": edit.coefficient,
                    "unit": edit.unit,
                    "operator": edit.operator,
                    "scope": edit.scope.name,
                }
                for edit in edits
            ],
            "lensteer_cache_edits": 0 if self.plan is None else len(self.plan.slots),
        }


def _cut(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins; None if there is none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
