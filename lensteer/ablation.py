"""Which steered positions matter: plans with one group of positions left out, under teacher forcing.

KL_t     = KL(p_steered(. | x_<t) || p_unsteered(. | x_<t))
change_t = log p_steered(x_t | x_<t) - log p_unsteered(x_t | x_<t)

Each plan is actually run, and the unsteered pass is reused. The importance of a group is the effect that is lost
without it. Importances do not add up: two redundant groups are both unimportant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lensteer import models, twins
from lensteer.caches import new_cache, recurrent_layers
from lensteer.errors import LensteerError
from lensteer.forward import Forward, choose_runner
from lensteer.positions import Context
from lensteer.results import Result
from lensteer.steering import Plan, Plans, active_plans, foreign_hooks
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False, repr=False)
class ForcedEffect(Result):
    """The effect of a plan on each token of a given response.

    Attributes:
        prompt_length: absolute position of the response's first token.
        kl: KL(steered || unsteered) of the distributions that predict each token, in nats.
        change: log-probability of the token itself, steered less unsteered, in nats.
    """

    prompt_length: int
    kl: Float[Tensor, " pos"]
    change: Float[Tensor, " pos"]

    @property
    def total(self) -> float:
        """The KLs of all tokens, summed."""
        return float(self.kl.sum())

    def change_at(self, positions: Sequence[int]) -> float:
        """The changes of log-probability of the tokens at absolute positions, summed.

        Raises:
            LensteerError: a position outside the response.
        """
        end = self.prompt_length + len(self.change)
        if outside := [p for p in positions if not self.prompt_length <= p < end]:
            raise LensteerError(
                f"no response token at positions {outside}: they run from {self.prompt_length} to {end - 1}"
            )
        return float(self.change[[p - self.prompt_length for p in positions]].sum())

    def to_dataframe(self) -> Any:
        """A row per token of the response."""
        import pandas as pd

        positions = range(self.prompt_length, self.prompt_length + len(self.kl))
        return pd.DataFrame({"position": positions, "kl": self.kl.numpy(), "change": self.change.numpy()})


#: Maximum number of plans per forward: each has its own mask, so larger batches cost more than they save.
MAX_ROWS = 8
#: Maximum number of tokens per forward: enough for full speed, few enough to interrupt quickly.
MAX_TOKENS = 4096
#: Maximum number of logits that are kept, or made by one forward of a runner without `twins.head` (1 GiB in fp32).
MAX_LOGITS = 2**28
#: Number of logits that are made at once from the residual stream: enough to read the head's weights rarely.
HEADS = {"cpu": 2**23}
MAX_HEAD = 2**26
#: Number of logits that are compared at once: on a CPU few, which stay in a core's own cache in double precision.
CHUNKS = {"cpu": 2**17}
MAX_CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class _Logits:
    """The logits of a pass: kept, or made again from the residual stream at the last block's output.

    Attributes:
        kept: all of them, or the residual stream.
        twin: makes logits of the residual stream; None: they are kept.
    """

    kept: Float[Tensor, "batch pos width"]
    twin: nn.Module | None = None

    def at(self, part: slice) -> Float[Tensor, "batch pos d_vocab"]:
        """Those at some of the positions."""
        found = self.kept[:, part]
        return found if self.twin is None else twins.head(self.twin, found)


@dataclass(frozen=True, eq=False)
class _Unsteered:
    """The pass that others are compared with, and the plans it ran under.

    Attributes:
        runner: what ran it.
        plans: that were on.
        cache: keys and values of all layers.
        logits: for each token of the response, of a batch of one.
        log_norm: of the logits: log Σ exp.
        outputs: of every block before its edit, if another pass can start from them; or else empty.
    """

    runner: nn.Module
    plans: list[Plans]
    cache: DynamicCache
    logits: _Logits
    log_norm: Float[Tensor, " pos"]
    outputs: Sequence[Any]


class ForcedChain:
    """A chain with its unsteered pass cached: a plan only recomputes what follows the first token and block it changes.

    The numbers are those of `generation.forced_logits`, steered against unsteered. Plans and hooks that are on apply to
    both sides. In-place changes of weights are not detected.
    """

    def __init__(self, model: TransformerBridge, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> None:
        """Nothing is run yet.

        Args:
            model: the bridge.
            prompt_ids: token ids.
            response_ids: token ids.

        Raises:
            LensteerError: either is empty.
        """
        if not len(prompt_ids) or not len(response_ids):
            raise LensteerError(
                f"{len(prompt_ids)} prompt and {len(response_ids)} response tokens: give at least one of each"
            )
        models.check_rows(model, [[*prompt_ids, *response_ids]], cached=True)
        self.model, self.prompt_length = model, len(prompt_ids)
        self.ids = torch.tensor([[*prompt_ids, *response_ids]], device=models.device(model))
        self._kept: _Unsteered | None = None

    @staticmethod
    def of(model: TransformerBridge, trace: Trace, prefill: str = "") -> ForcedChain:
        """The chain of a trace; `prefill`, such as a cache plan's offset token, is added to its prompt if missing."""
        there = trace.prefill.endswith(prefill)
        prompt = trace.prompt_ids if there else models.encode(model, trace.prompt + prefill)
        return ForcedChain(model, prompt, trace.response_ids)

    @property
    def rows(self) -> int:
        """Number of plans per forward."""
        length = self.ids.shape[1]
        return max(1, min(MAX_ROWS, MAX_TOKENS // length, MAX_LOGITS // self._n_logits))

    @property
    def _n_logits(self) -> int:
        return (self.ids.shape[1] - self.prompt_length) * int(self.model.cfg.d_vocab)

    def context(self, n_rows: int = 1) -> Context:
        """The whole chain as scopes see it."""
        zeros = self.ids.new_zeros(n_rows)
        return Context(self.ids.expand(n_rows, -1), zeros, zeros + self.prompt_length, models.token_table(self.model))

    def first_changed(self, plan: Plan | None) -> int:
        """The first position whose residual a plan may change; the chain's length if it changes nothing."""
        if plan is None:
            return self.ids.shape[1]
        if plan.slots:
            return 0
        chosen = [edit.scope.mask(self.context())[0].nonzero() for edit in plan.edits if edit.coefficient]
        return min((int(found[0]) for found in chosen if len(found)), default=self.ids.shape[1])

    def effect(self, plan: Plan | None, *, check: Callable[[], object] | None = None) -> ForcedEffect:
        """The effect of one plan; see `effects`."""
        return self.effects([plan], check=check)[0]

    @torch.inference_mode()
    def effects(self, plans: Sequence[Plan | None], *, check: Callable[[], object] | None = None) -> list[ForcedEffect]:
        """The effect of each plan, `rows` plans per forward; None changes nothing.

        Args:
            plans: any number.
            check: called often during the steered passes; an exception in it ends them. The unsteered pass is kept.

        Raises:
            LensteerError: a plan that does not fit the model or the prompt, or logits that are not finite.
        """
        runner, rows = choose_runner(self.model, plans, len(plans))
        base = self._unsteered(runner)
        firsts = [self.first_changed(plan) for plan in plans]
        found: list[ForcedEffect] = []
        for start in range(0, len(plans), self.rows):
            end = start + self.rows
            found += self._measured(base, rows[start:end], firsts[start:end], check or (lambda: None))
        return found

    def _measured(
        self, base: _Unsteered, rows: Sequence[Plan | None], firsts: Sequence[int], check: Callable[[], object]
    ) -> list[ForcedEffect]:
        whole = any(plan.slots for plan in base.plans) or bool(recurrent_layers(self.model))  # a state cannot be cut
        begin, n = 0 if whole else min(firsts), len(base.log_norm)
        offset = max(begin + 1 - self.prompt_length, 0)  # the logits at one position are for the next token
        skips = [max(first + 1 - self.prompt_length, 0) for first in firsts]
        kl, change = torch.zeros(2, len(rows), n, dtype=torch.float64)  # exactly 0 before the first edit
        if offset < n:
            cache = _beginning(base.cache, begin, len(rows)) if begin else new_cache(self.model)
            logits = self._run(base.runner, rows, begin, cache, () if whole else base.outputs, check)
            targets = self.ids[0, self.prompt_length :]
            for part in self._parts(offset, n, len(rows)):
                check()
                ours, theirs = logits.at(slice(part.start - offset, part.stop - offset)), base.logits.at(part)[0]
                for i, skip in enumerate(skips):
                    for at in _pieces(max(part.start, skip), part.stop, _step(theirs)):
                        own = slice(at.start - part.start, at.stop - part.start)
                        found = _compared(ours[i, own], theirs[own], base.log_norm[at], targets[at])
                        kl[i, at], change[i, at] = found
        if not kl.isfinite().all():
            raise LensteerError("the steered logits are not finite: lower the coefficient")
        return [ForcedEffect(self.prompt_length, *both) for both in zip(kl, change, strict=True)]

    def _parts(self, begin: int, end: int, n_rows: int) -> Iterator[slice]:
        """The response's tokens from `begin` to `end`, in parts whose logits are made at once."""
        most = HEADS.get(self.ids.device.type, MAX_HEAD)
        return _pieces(begin, end, max(1, most // (n_rows * int(self.model.cfg.d_vocab))))

    def _resumes(self, runner: nn.Module) -> bool:
        """Whether another pass can start from a block's output, and logits be made of the last one's."""
        return runner is not self.model and twins.resumes(runner, lambda: new_cache(self.model))

    def _unsteered(self, runner: nn.Module) -> _Unsteered:
        on, kept = active_plans(self.model), self._kept
        same = kept is not None and kept.runner is runner and [*map(id, kept.plans)] == [*map(id, on)]
        if kept is None or not same or foreign_hooks(self.model):
            cache = new_cache(self.model)
            found: AbstractContextManager[Sequence[Any]] = nullcontext(())
            if self._resumes(runner):
                found = twins.block_outputs(runner)
            with found as outputs:
                logits = self._run(runner, choose_runner(self.model, None, 1)[1], 0, cache)
            log_norm, n = [], self.ids.shape[1] - self.prompt_length
            kept_logits: Tensor | None = None
            for part in self._parts(0, n, 1):
                made = logits.at(part)
                if not made.isfinite().all():
                    raise LensteerError("the model's own logits are not finite: load it in another dtype")
                log_norm += [piece.double().logsumexp(-1) for piece in made[0].split(_step(made[0]))]
                if logits.twin is not None and self._n_logits <= MAX_LOGITS:
                    kept_logits = made.new_empty(1, n, made.shape[-1]) if kept_logits is None else kept_logits
                    kept_logits[:, part] = made
            logits = logits if kept_logits is None else _Logits(kept_logits)
            self._kept = kept = _Unsteered(runner, on, cache, logits, torch.cat(log_norm), outputs)
        return kept

    def _run(
        self,
        runner: nn.Module,
        rows: Sequence[Plan | None],
        begin: int,
        cache: DynamicCache,
        outputs: Sequence[Any] = (),
        check: Callable[[], object] = lambda: None,
    ) -> _Logits:
        """Logits for the response's tokens, or for those after `begin`, over a cache of the tokens before.

        With the outputs of the unsteered pass, it starts after the first block whose output is edited: edits of plans
        that are on are in the later outputs.
        """
        width, length = self.ids.shape[1] - 1, self.prompt_length  # the last token predicts nothing
        forward = Forward(self.model, self.context(len(rows)), cache=cache, chosen=(runner, rows))
        first = min(forward.edits.groups, default=-1)
        again = bool(outputs) and not forward.slots  # an edit of the cache acts between two passes
        start = twins.resumed(runner, outputs, first + 1, slice(begin, width), len(rows)) if again else nullcontext()
        keep, last = min(width - begin, width + 1 - length), models.n_layers(self.model) - 1
        if not self._resumes(runner):
            with forward.hooked():
                run = forward.run(begin, width, keep=keep) if begin else forward.prefill(width, keep=keep)
            return _Logits(run)
        found: list[Tensor] = []

        def read(layer: int, resid: Tensor) -> None:
            check()
            if layer == last:
                found[:] = [resid[:, -keep:]]

        with forward.hooked(read, range(last + 1)), start:
            none = self.ids.new_zeros(0)
            forward.run(begin, width, keep=none) if begin else forward.prefill(width, keep=none)
        return _Logits(found[0], runner)


def _pieces(begin: int, end: int, step: int) -> Iterator[slice]:
    """[begin, end) in slices of at most `step`."""
    for at in range(begin, end, step):
        yield slice(at, min(at + step, end))


def _step(logits: Float[Tensor, "pos d_vocab"]) -> int:
    """The number of rows that are compared at once."""
    return max(1, CHUNKS.get(logits.device.type, MAX_CHUNK) // logits.shape[-1])


def _compared(
    p: Float[Tensor, "pos d_vocab"],
    q: Float[Tensor, "pos d_vocab"],
    log_norm: Float[Tensor, " pos"],
    targets: Int[Tensor, " pos"],
) -> tuple[Float[Tensor, " pos"], Float[Tensor, " pos"]]:
    """KL(p‖q) = E_p[z_p − z_q] − log Z_p + log Z_q of logits z, as `kl_divergence`, and the change of the targets.

    With log Z_q known, it takes one exponential per logit. In fp64, because nearby distributions cancel.
    """
    z = p.double()
    apart = z - q
    there = apart.gather(-1, targets[:, None])[:, 0]
    most = z.amax(-1, keepdim=True)
    weight = (z - most).exp_()
    norm = weight.sum(-1)
    moved = most[:, 0] + norm.log() - log_norm  # log Z_p − log Z_q
    kl = torch.linalg.vecdot(weight, apart) / norm - moved
    return kl.clamp_min(0.0).cpu(), (there - moved).cpu()


def _beginning(cache: DynamicCache, length: int, n_rows: int) -> DynamicCache:
    """A cache of the first positions, for several rows; appending to it leaves the original unchanged."""
    made = DynamicCache()
    made.layers = []
    for stored in cache.layers:
        layer = DynamicLayer()
        layer.lazy_initialization(stored.keys, stored.values)
        layer.keys, layer.values = (t[..., :length, :].expand(n_rows, -1, -1, -1) for t in (stored.keys, stored.values))
        made.layers.append(layer)
    return made


def forced_effect(model: TransformerBridge, trace: Trace, plan: Plan) -> ForcedEffect:
    """A plan's effect on each token of a trace's response; a cache plan's offset token is appended to both prompts.

    Raises:
        LensteerError: a plan that does not fit the model or the prompt, or logits that are not finite.
    """
    return ForcedChain.of(model, trace, plan.prefill).effect(plan)


@dataclass(frozen=True)
class LeaveOneOut(Result):
    """How much of a plan's effect on a chain is due to each group of positions.

    Attributes:
        names: of the groups.
        groups: their absolute positions.
        full: the effect of the whole plan, in nats.
        without: the effect of the plan without each group.
        measure: "kl", the KLs of all tokens summed, or "log_prob", the summed changes of the target tokens.
        targets: the positions of the target tokens; empty for "kl".
    """

    names: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    full: float
    without: tuple[float, ...]
    measure: str
    targets: tuple[int, ...] = ()

    @property
    def importance(self) -> tuple[float, ...]:
        """For each group, the full effect less the effect without it."""
        return tuple(self.full - without for without in self.without)

    def to_dataframe(self) -> Any:
        """A row per group, in the order given."""
        import pandas as pd

        table = {"group": self.names, "first": [g[0] for g in self.groups], "n_positions": [*map(len, self.groups)]}
        return pd.DataFrame({**table, "without": self.without, "importance": self.importance, "measure": self.measure})


def leave_one_out(
    model: TransformerBridge,
    trace: Trace | ForcedChain,
    plan_of: Callable[[tuple[int, ...]], Plan],
    groups: Mapping[str, Sequence[int]],
    *,
    targets: Sequence[int] | None = None,
    advance: Callable[[int], object] | None = None,
) -> LeaveOneOut:
    """Leave each group of positions out of a plan in turn, and measure the remaining effect.

    Args:
        model: the bridge.
        trace: the chain; the unsteered pass of a `ForcedChain` is reused.
        plan_of: the plan at given absolute positions, such as
            `lambda positions: SteeringPlan(direction, layer=4, scope=at(positions))`.
        groups: name -> absolute positions, such as those of one sentence; the whole plan steers all of them.
        targets: positions of the tokens whose changes of log-probability, summed, are the effect; by default the
            effect is the total KL of all tokens.
        advance: called after each step with the number of groups measured.

    Raises:
        LensteerError: no group, an empty one, a position or target outside the chain.
    """
    chain = trace if isinstance(trace, ForcedChain) else ForcedChain.of(model, trace)
    sets = {name: tuple(sorted(set(positions))) for name, positions in groups.items()}
    everything = tuple(sorted({p for positions in sets.values() for p in positions}))
    if not sets or not all(sets.values()):
        raise LensteerError(f"groups {dict(groups)}: give at least one, and at least one position in each")
    if everything[0] < 0 or everything[-1] >= chain.ids.shape[1]:
        raise LensteerError(
            f"positions {everything[0]} to {everything[-1]}: this chain has positions 0 to {chain.ids.shape[1] - 1}"
        )

    def measured(effect: ForcedEffect) -> float:
        return effect.total if targets is None else effect.change_at(targets)

    full = measured(chain.effect(plan_of(everything)))
    # A position changes only the tokens after it, so leaving out a group after the last target changes nothing.
    last = max(targets) if targets else chain.ids.shape[1]
    without = dict.fromkeys(sets, full)
    plans: dict[str, Plan | None] = {}
    for name, positions in sets.items():
        if positions[0] < last:
            left = tuple(p for p in everything if p not in set(positions))
            plans[name] = plan_of(left) if left else None
    if advance is not None and len(plans) < len(sets):
        advance(len(sets) - len(plans))
    names = list(plans)
    for start in range(0, len(names), chain.rows):
        batch = names[start : start + chain.rows]
        without |= zip(batch, map(measured, chain.effects([plans[name] for name in batch])), strict=True)
        if advance is not None:
            advance(len(batch))
    measure = "kl" if targets is None else "log_prob"
    return LeaveOneOut(
        tuple(sets),
        tuple(sets.values()),
        full,
        tuple(without.values()),
        measure,
        tuple(() if targets is None else targets),
    )
