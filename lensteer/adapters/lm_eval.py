"""lm-evaluation-harness on a steered model: `lm_eval.simple_evaluate(model=SteeredLM(model, plan=plan), ...)`.

From the command line, where importing this module registers the model "lensteer":

    python -m lensteer.adapters.lm_eval --model lensteer --model_args pretrained=M,plan=FOLDER --tasks gsm8k

Texts are tokenized as in lensteer's own runs: a prompt that the chat template made has its special tokens, any other
text gets one BOS if the tokenizer writes one. Texts are never truncated: one that is too long is refused, or run with a
warning (`models.check_rows`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lensteer import models
from lensteer.adapters.requests import Drawing, Steered
from lensteer.errors import LensteerError
from lensteer.progress import progress_bar
from lensteer.steering import Plan

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise LensteerError(
        f"lensteer.adapters.lm_eval needs the package lm-eval ({error}): pip install 'lensteer[lm-eval]'"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformer_lens.model_bridge import TransformerBridge

#: What a task's `generation_kwargs` may hold.
KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")


@register_model("lensteer")
class SteeredLM(TemplateLM):
    """A bridge with a plan on, as lm-evaluation-harness asks it.

    The context is the prompt of the plan's scope, the continuation is the response. In rolling likelihoods the prompt
    is the first token of each window, and all others are the response.
    """

    def __init__(
        self,
        pretrained: str | TransformerBridge = "",
        *,
        plan: str | Plan | None = None,
        dtype: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        thinking: bool = True,
        seed: int = 0,
    ) -> None:
        """Load what is not loaded.

        Args:
            pretrained: a checkpoint's folder or name, as in `load_model`; or a bridge.
            plan: a plan's folder or name, as in `load_plan`; or a plan. Without one, the model is unsteered.
            dtype: of the weights; by default float32.
            device: by default TransformerLens chooses.
            revision: of a checkpoint on the hub.
            batch_size: requests that are run together.
            max_batch_size: given by the harness, for "auto" sizes; not used.
            max_gen_toks: most tokens of a reply where a task sets no limit.
            thinking: passed to the chat template as `enable_thinking`.
            seed: of tasks that sample.

        Raises:
            LensteerError: a model or a plan that cannot be read, a plan of another model, or a batch size that is no
                number.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise LensteerError(f"batch_size={batch_size!r}: give a positive number; automatic sizes are not supported")
        self.steered = Steered.of(
            pretrained,
            plan,
            loading=dict(dtype=dtype, device=device, revision=revision),
            thinking=thinking,
            batch_size=int(batch_size),
        )
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self.tokenizer = self.steered.model.tokenizer
        self._templated = False

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is conditioned on: the BOS, or else the token that ends a text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Tokens per window of a rolling likelihood: the model's context, 2048 if it states none."""
        return models.context_length(self.steered.model) or 2048

    @property
    def tokenizer_name(self) -> str:
        """The identity of tokenizer and template, for the harness's request cache."""
        found = models.fingerprint(self.steered.model)
        return f"{found.tokenizer}-{found.template}-{'' if self.steered.thinking else 'no-'}thinking"

    def get_model_info(self) -> dict[str, Any]:
        """The model's identity and the plan, for the harness's results file."""
        return self.steered.describe()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; without a generation prompt its last message begins the reply."""
        self._templated = True  # the harness formats all requests of an evaluation, or none
        return self.steered.chat(chat_history)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with at most one BOS; none is added to what the chat template made."""
        bare = self._templated if add_special_tokens is None else not add_special_tokens
        return (models.encode if bare else models.encode_raw)(self.steered.model, string)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        size = 16 * self.steered.batch_size  # sorted by length together
        with progress_bar(total=len(requests), show=not disable_tqdm, unit="text") as bar:
            for begin in range(0, len(requests), size):
                some = requests[begin : begin + size]
                for (key, *_), (logs, greedy) in zip(
                    some, self.steered.log_probs([r[1] for r in some], [r[2] for r in some]), strict=True
                ):
                    found.append((float(logs.double().sum()), greedy))
                    self.cache_hook.add_partial("loglikelihood", key, found[-1])
                bar.update(len(some))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the model's context.

        Raises:
            LensteerError: a cache plan, whose slot is in a prompt, which a rolling likelihood does not have.
        """
        if self.steered.edits_cache:
            raise LensteerError(
                "a cache plan edits a slot of the prompt, and a rolling likelihood has no prompt: use a plan of the "
                "residual stream, or a task that scores continuations or generates"
            )
        found = []
        for request in progress_bar(requests, show=not disable_tqdm, unit="text"):
            (text,) = request.args
            ids = models.encode(self.steered.model, text)
            if ids[:1] == [self.prefix_token_id]:
                ids = ids[1:]  # the prefix is the text's own BOS
            windows = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            ]
            # The whole window but its first token is the response: a scope would take a longer context for a prompt.
            scored = self.steered.log_probs([c[:1] for c, _ in windows], [[*c[1:], *new] for c, new in windows])
            total = sum(
                float(logs[-len(new) :].double().sum()) for (logs, _), (_, new) in zip(scored, windows, strict=True)
            )
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies up to a stop text, or to the token that ends an answer.

        Raises:
            LensteerError: generation settings of a task that are not supported.
        """
        prompts = [self.tok_encode(request.args[0] + self.steered.appended) for request in requests]
        drawings = [_drawing(request.args[1], self.max_gen_toks, self.seed) for request in requests]
        groups: dict[Drawing, list[int]] = {}
        for i in sorted(range(len(requests)), key=lambda i: len(prompts[i])):
            groups.setdefault(drawings[i], []).append(i)
        found: dict[int, str] = {}
        with progress_bar(total=len(requests), show=not disable_tqdm, unit="reply") as bar:
            for drawing, order in groups.items():
                for begin in range(0, len(order), self.steered.batch_size):
                    batch = order[begin : begin + self.steered.batch_size]
                    for i, reply in zip(batch, self.steered.replies([prompts[i] for i in batch], drawing), strict=True):
                        found[i] = reply.text
                        self.cache_hook.add_partial("generate_until", requests[i].args, reply.text)
                    bar.update(len(batch))
        return [found[i] for i in range(len(requests))]


def _drawing(settings: Mapping[str, Any], max_gen_toks: int, seed: int) -> Drawing:
    """A task's `generation_kwargs`."""
    known: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), max_gen_toks))
    if unknown := sorted(set(known) - set(KNOWN)):
        raise LensteerError(
            f"generation_kwargs {json.dumps({name: known[name] for name in unknown}, default=str)}: lensteer's "
            f"generation takes {', '.join(KNOWN)}; change them by --gen_kwargs, or in the task"
        )
    until = known.get("until") or []
    stops: Sequence[str] = [until] if isinstance(until, str) else until
    sampled = bool(known.get("do_sample"))
    return Drawing(
        int(known["max_gen_toks"]),
        float(known.get("temperature", 1.0)) if sampled else 0.0,
        float(known.get("top_p", 1.0)) if sampled else 1.0,
        tuple(stops),
        seed,
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
