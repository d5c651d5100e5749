"""The one place where a model runs on text: its input, what runs it, which plans apply, what is cached.

A text is a `Context`: token ids, the padding before each row, and where each row's prompt ends. Every caller specifies
all of it, so a plan that is on means the same in every function. `forced_logits` is the simplest caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lensteer import models, twins
from lensteer.caches import keep_rows, new_cache
from lensteer.errors import LensteerError
from lensteer.positions import Context
from lensteer.steering import Edits, Plan, Plans, active_plans, attached, foreign_hooks, tokens_seen
from lensteer.steering.cache import CachePlan, check_plan, edit_cache

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Read = Callable[[int, Float[Tensor, "batch pos d_model"]], object]
"""Called with a layer and the residual stream at its output, after all edits."""


def left_padded(
    model: TransformerBridge, rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int] | None = None
) -> Context:
    """Rows of token ids that end together.

    Args:
        model: the bridge.
        rows: token ids.
        prompt_lengths: how many of each row's ids are the prompt; None: all of them.
    """
    models.check_rows(model, rows)
    width = max(map(len, rows))
    return _context(
        model,
        [[0] * (width - len(row)) + list(row) for row in rows],
        [width - len(row) for row in rows],
        [len(row) for row in rows] if prompt_lengths is None else prompt_lengths,
    )


def right_padded(model: TransformerBridge, rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> Context:
    """Rows of token ids that begin together. In a causal model, padding after a row does not affect it."""
    models.check_rows(model, rows)
    width = max(map(len, rows))
    ids = [list(row) + [0] * (width - len(row)) for row in rows]
    return _context(model, ids, [0] * len(rows), prompt_lengths)


def _context(
    model: TransformerBridge, ids: Sequence[Sequence[int]], pad: Sequence[int], prompt_lengths: Sequence[int]
) -> Context:
    tokens, front, lengths = (torch.tensor(v, device=models.device(model)) for v in (ids, pad, prompt_lengths))
    return Context(tokens, front, lengths, models.token_table(model))


def choose_runner(
    model: TransformerBridge, plans: Sequence[Plan | None] | None, n: int, *, fast: bool = True
) -> tuple[nn.Module, list[Plan | None]]:
    """The runner of `n` rows, and each row's plan: the plain twin does not have the hooks of plans that are on.

    The plain twin (`twins.plain_twin`) runs if there is one, `fast` allows it, and no foreign hooks are on the bridge.
    """
    rows: list[Plan | None] = list(plans or [None] * n)
    twin = twins.plain_twin(model) if fast and not foreign_hooks(model) else None
    for on in reversed(active_plans(model)):  # outermost first, as the bridge's hooks fire
        seen = on if twin is not None else Plans((), on.slots)  # the bridge's own hooks edit its residuals
        rows = [seen if row is None else seen + row for row in rows]
    return (model if twin is None else twin), rows


class Forward:
    """A forward over a batch of text, with each row's plan and the plans that are on.

    Attributes:
        text: the batch; a decode loop replaces it with a longer one.
        edits: of residuals, row by row.
        cache: filled and read by each pass; None: no cache.
    """

    def __init__(
        self,
        model: TransformerBridge,
        text: Context,
        plans: Sequence[Plan | None] | None = None,
        *,
        cache: Any = None,
        fast: bool = True,
        chosen: tuple[nn.Module, Sequence[Plan | None]] | None = None,
    ) -> None:
        """Nothing is run yet.

        Args:
            model: the bridge. Plans that are on apply to all rows; foreign hooks fire, but slow it down.
            text: the batch.
            plans: one per row, None for a row without one.
            cache: a Hugging Face cache to fill.
            fast: False runs the bridge, whose hook points the caller needs.
            chosen: the result of `choose_runner`, if the caller already has it.

        Raises:
            LensteerError: a plan that does not fit the model or a prompt.
        """
        self.model, self.text, self.cache = model, text, cache
        self.runner, rows = choose_runner(model, plans, len(text.ids), fast=fast) if chosen is None else chosen
        self.edits = Edits.of(rows, model)
        self.slots = _slots(model, rows, text)
        self._seen, self._padded = text, bool(text.pad.any())

    def steered(self) -> Bool[Tensor, " batch"]:
        """Which rows a plan of their own edits."""
        found = self.edits.rows(len(self.text.ids)).to(self.text.ids.device)
        for row, *_ in self.slots:
            found[row] = True
        return found

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep some of the rows, and the same rows of a filled cache."""
        text = self.text
        self.text = replace(text, ids=text.ids[rows], pad=text.pad[rows], prompt_length=text.prompt_length[rows])
        self._padded = bool(self.text.pad.any())
        self.edits = self.edits.keep(rows)
        for layer in () if self.cache is None else self.cache.layers:
            keep_rows(layer, rows)

    @contextmanager
    def hooked(self, read: Read | None = None, layers: Iterable[int] = ()) -> Iterator[Forward]:
        """Hook the edits into the runner, and read residual streams.

        Args:
            read: called with each of `layers` in every pass.
            layers: to read.
        """
        wanted = set(layers)

        def at(layer: int, resid: Tensor) -> Tensor:
            resid = self.edits.apply(layer, resid, self._seen)
            if read is not None and layer in wanted:
                read(layer, resid)
            return resid

        with attached(self.model, self.runner, sorted({*self.edits.groups, *wanted}), at):
            yield self

    def run(
        self, begin: int = 0, end: int | None = None, *, keep: int | Int[Tensor, " kept"] = 0, stop: int | None = None
    ) -> Tensor:
        """Run the columns [begin, end) on top of the cache. The caller decides about gradients.

        Args:
            begin: first column.
            end: one past the last; None is the text's end.
            keep: number of last positions to return logits for, or their indices; 0 is all.
            stop: the last layer to run, if only hooks need the pass.

        Returns:
            Logits, `[batch, kept, d_vocab]`; after an early stop, the residual stream.
        """
        end = self.text.ids.shape[1] if end is None else end
        if (switching := models.length_limits(self.model).switching) is not None and end > switching:
            models.forget_frequencies(self.runner)
        known = end
        if end < self.text.ids.shape[1]:  # a scope may ask where the prompt ends
            known = max(end, int((self.text.pad + self.text.prompt_length).max()))
        self._seen = replace(self.text, ids=self.text.ids[:, :known], ahead=known - end)
        position = self._seen.position[:, :end]
        # A plain model makes the same mask from none where there is no padding; the bridge would look for some.
        mask = (position >= 0).long() if self._padded or self.runner is self.model else None
        return call(
            self.model,
            self.runner,
            self._seen,
            self.text.ids[:, begin:end],
            attention_mask=mask,
            position_ids=position[:, begin:].clamp(min=0),
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=keep,
            stop=stop,
        )

    def prefill(self, end: int | None = None, *, keep: int | Int[Tensor, " kept"] = 0) -> Tensor:
        """Run from the first column: through each cache slot that is edited, then the edit, then the rest.

        Args:
            end: one past the last; at least one column follows every slot.
            keep: as in `run`.
        """
        begin = 0
        for cut in sorted({column + 1 for _, column, _, _ in self.slots}):
            self.run(begin, cut, keep=1)
            begin = cut
            rows, columns, positions, plans = zip(*(s for s in self.slots if s[1] + 1 == cut), strict=True)
            edit_cache(self.model, self.cache, rows, columns, positions, plans)
        return self.run(begin, end, keep=keep)

    def whole(self, *, keep: int = 1, stop: int | None = None) -> Tensor:
        """Run the whole text in one pass, for functions that read activations. Arguments are those of `run`.

        Raises:
            LensteerError: a cache plan is on, which has to act between two passes.
        """
        if self.slots:
            raise LensteerError(
                "a cache plan edits one slot between two parts of the prompt, and this function reads whole chains in "
                "one pass: turn the plan off, or use forced_logits or generate"
            )
        return self.run(keep=keep, stop=stop)


def read_there(model: TransformerBridge, text: Context, site: str, layers: Sequence[int], read: Read) -> None:
    """Read residual streams at a site other than the block's output; plans that are on apply.

    Args:
        model: the bridge; a plain twin has no hook points there.
        text: the batch.
        site: of `models.SITES`.
        layers: to read.
        read: called with each of them.
    """

    def at(layer: int) -> Callable[..., None]:
        def keep(resid: Tensor, hook: object) -> None:
            read(layer, resid)

        return keep

    hooks = [(models.resid_hook(layer, site), at(layer)) for layer in set(layers)]
    with model.hooks(fwd_hooks=hooks):
        Forward(model, text, fast=False).whole(stop=max(layers))


def call(
    model: TransformerBridge,
    runner: nn.Module,
    seen: Context | None,
    ids: Int[Tensor, "batch pos"],
    *,
    stop: int | None = None,
    **options: Any,
) -> Tensor:
    """Call a model. Nothing else in lensteer does, except for training, the check of a new twin, and probes.

    Args:
        model: the bridge.
        runner: the bridge, or its plain twin.
        seen: all tokens so far, cached ones included, for the plans that are on; None if there are none.
        ids: the tokens to run.
        stop: the last layer to run; the bridge does not stop at its last.
        options: of Hugging Face's forward.

    Returns:
        Logits; after an early stop, the residual stream.
    """
    if runner is not model and stop is not None:
        return twins.run_until(runner, stop, input_ids=ids, **options)
    if runner is not model:
        return torch.as_tensor(runner(input_ids=ids, **options).logits)
    last = None if stop is None or stop + 1 == models.n_layers(model) else stop + 1
    with nullcontext() if seen is None else tokens_seen(seen):
        return torch.as_tensor(model(ids, return_type="logits", stop_at_layer=last, **options))


def _slots(
    model: TransformerBridge, plans: Sequence[Plan | None], text: Context
) -> list[tuple[int, int, int, CachePlan]]:
    """The cache edits of a batch: row, column with padding, position without, and the plan."""
    if not any(plan is not None and plan.slots for plan in plans):
        return []
    found, checked = [], set()
    for row, (plan, pad, length) in enumerate(zip(plans, text.pad.tolist(), text.prompt_length.tolist(), strict=True)):
        for slot in () if plan is None else plan.slots:
            assert isinstance(slot, CachePlan)
            if id(slot) not in checked:
                check_plan(model, slot)
                checked.add(id(slot))
            position = slot.slot(length)
            found.append((row, pad + position, position, slot))
    return found


@torch.inference_mode()
def forced_logits(
    model: TransformerBridge,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    plans: Sequence[Plan | None] | None = None,
) -> list[Float[Tensor, "_pos d_vocab"]]:
    """Logits that predict each token of given responses, from one forward over all rows.

    Entry `[row][t]` predicts `responses[row][t]`: with the plans of a generation, it is what that token was sampled
    from, up to rounding. Prompts end together, so that logits are computed for the responses only.

    Args:
        model: the bridge. Plans that are on apply to all rows.
        prompts: token ids.
        responses: token ids, at least one each.
        plans: one per row, None for a row without one.

    Raises:
        LensteerError: an empty prompt or response, or a list whose length differs from the prompts'.
    """
    for name, given in (("responses", responses), ("plans", plans)):
        if given is not None and len(given) != len(prompts):
            raise LensteerError(f"{len(given)} {name} for {len(prompts)} prompts: give one per prompt")
    if not all(map(len, [*prompts, *responses])):
        raise LensteerError("an empty prompt or response: give at least one token id of each per row")
    if not prompts:
        return []
    start, keep = max(map(len, prompts)), max(map(len, responses))
    ids = [[0] * (start - len(p)) + [*p, *r] + [0] * (keep - len(r)) for p, r in zip(prompts, responses, strict=True)]
    models.check_rows(model, [[*p, *r[:-1]] for p, r in zip(prompts, responses, strict=True)])
    text = left_padded(model, prompts)
    whole = torch.tensor(ids, device=text.ids.device)[:, :-1]  # the last token predicts nothing
    forward = Forward(model, replace(text, ids=whole), plans)
    if forward.slots:
        forward.cache = new_cache(model)
    with forward.hooked():
        logits = forward.prefill(keep=keep)
    return [row[: len(r)] for row, r in zip(logits, responses, strict=True)]
