"""The runner: jobs of one chain each, batched, seeded and resumable. All sampling of chains uses it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensteer import models
from lensteer.arguments import checked, typed
from lensteer.errors import LensteerError
from lensteer.files import append_jsonl, digest, drop_cut_line
from lensteer.generation import Generated, generate, run_batches
from lensteer.generation.engines import Engine, Request, check_engine, check_written
from lensteer.generation.parallel import pool_on
from lensteer.progress import progress_bar
from lensteer.results import reading
from lensteer.steering import Plan, active_plans, foreign_hooks, wanted_prefill
from lensteer.tasks import Task
from lensteer.traces import Trace, load_traces

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Sampling:
    """How chains are drawn.

    Attributes:
        n_samples: chains per task. Chain (task, sample) has its own seed, independent of other chains.
        temperature: 0 is greedy (then `n_samples` must be 1).
        seed: of all chains.
        max_new_tokens: per chain.
        batch_size: chains per batch.
        thinking: whether the template opens `<think>`, if it supports both.
        top_p: nucleus sampling: draw from the likeliest tokens that together have this probability.
        prefill: text that every chain begins with.
        system: the system prompt of every question.

    Raises:
        LensteerError: an invalid number, or greedy samples that would all be the same.
    """

    n_samples: int = 1
    temperature: float = 1.0
    seed: int = 0
    max_new_tokens: int = 400
    batch_size: int = 256
    thinking: bool = True
    top_p: float = 1.0
    prefill: str = ""
    system: str = ""

    def __post_init__(self) -> None:
        typed(self)
        for name in ("n_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise LensteerError(f"{name}={getattr(self, name)}: give a positive number")
        if not 0 <= self.temperature < math.inf:
            raise LensteerError(f"temperature {self.temperature}: give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise LensteerError(f"top_p={self.top_p}: give a probability above 0, 1 for all tokens")
        if self.n_samples > 1 and not self.temperature:
            raise LensteerError(
                f"{self.n_samples} greedy samples would be the same: set temperature=1.0 or n_samples=1"
            )


@dataclass(frozen=True)
class Job:
    """One chain to generate.

    Attributes:
        task: that the prompt states.
        sample: which of the chains on the task; task and sample determine the seed.
        prompt: the prompt's text, chat template and prefill included.
        prompt_ids: its tokens.
        prefill: the end of the prompt, where it begins the answer.
        plan: the steering plan.
    """

    task: Task
    sample: int
    prompt: str
    prompt_ids: tuple[int, ...]
    prefill: str = ""
    plan: Plan | None = None


#: A job with its number.
_Numbered = tuple[int, Job]
#: Chains of an engine that are kept together, as they come.
_GROUP = 32


def run_jobs(
    model: TransformerBridge,
    jobs: Sequence[Job],
    sampling: Sampling,
    *,
    done: Mapping[int, Trace] | None = None,
    keep: Callable[[Mapping[int, Trace]], object] | None = None,
    progress: bool = False,
) -> list[Trace]:
    """Generate every job's chain; consecutive jobs share a batch.

    While a pool is on the model (`distributed.Actors`), it generates the batches.

    Args:
        model: the bridge; plans that are on apply.
        jobs: in any order; consecutive prompts of similar length need little padding.
        sampling: how chains are drawn.
        done: chains of an earlier run, by the number of the job. An interrupted batch is rerun as a whole, because
            rounding depends on batch composition; its finished chains stay as they are.
        keep: called with each finished batch's new chains, by the number of the job.
        progress: show a bar with tokens per second.
    """
    made = dict(_made(model, jobs, sampling, done=done, keep=keep, progress=progress))
    return [made[i] for i in range(len(jobs))]


def _made(
    model: TransformerBridge,
    jobs: Sequence[Job],
    sampling: Sampling,
    *,
    done: Mapping[int, Trace] | None,
    keep: Callable[[Mapping[int, Trace]], object] | None,
    progress: bool,
    name: Callable[[_Numbered], str] | None = None,
    engine: Engine | None = None,
) -> dict[int, Trace]:
    """`run_jobs` by the number of the job. With `name`, a job that a pool sets aside is left out."""
    made = dict(done or {})
    numbered = list(enumerate(jobs))
    batches = [numbered[i : i + sampling.batch_size] for i in range(0, len(jobs), sampling.batch_size)]
    elsewhere = engine is not None or pool_on(model) is not None
    with progress_bar(total=len(jobs), initial=len(made), unit="chain", show=progress) as bar:
        tokens = 0

        def advance(n: int) -> None:
            nonlocal tokens
            tokens += n
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)

        write = partial(_write, sampling=sampling, advance=None if elsewhere else advance)
        unfinished = [batch for batch in batches if any(i not in made for i, _ in batch)]
        if engine is None:
            parts = run_batches(model, write, unfinished, name=name)
        else:
            parts = _from_engine(model, engine, [each for each in numbered if each[0] not in made], sampling)
        for batch, results in parts:
            if elsewhere:
                advance(sum(len(result.ids) for result in results))
            found = zip(batch, results, strict=True)
            fresh = {i: trace_of(model, job, result) for (i, job), result in found if i not in made}
            made.update(fresh)
            if keep is not None:
                keep(fresh)
            bar.update(len(fresh))
    return made


def _write(
    model: TransformerBridge, batch: Sequence[_Numbered], sampling: Sampling, advance: Callable[[int], object] | None
) -> list[Generated]:
    jobs = [job for _, job in batch]
    return generate(
        model,
        [job.prompt_ids for job in jobs],
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seeds=[chain_seed(sampling.seed, job.task.id, job.sample) for job in jobs],
        plans=[job.plan for job in jobs],
        advance=advance,
    )


def _from_engine(
    model: TransformerBridge, engine: Engine, jobs: Sequence[_Numbered], sampling: Sampling
) -> Iterator[tuple[Sequence[_Numbered], list[Generated]]]:
    """Chains in small groups, as they come; what has come before an error is in the last one."""
    if active_plans(model) or foreign_hooks(model) or any(job.plan is not None for _, job in jobs):
        raise LensteerError(f"the engine {engine.name!r} has no hooks: chains with a plan are written without engine=")
    if not jobs:
        return
    ends = tuple(sorted(models.end_ids(model)))
    requests = []
    for _, job in jobs:
        seed = chain_seed(sampling.seed, job.task.id, job.sample)
        numbers = sampling.max_new_tokens, sampling.temperature, sampling.top_p
        requests.append(Request(job.prompt_ids, *numbers, seed, ends))
    check_engine(model, engine, requests[0])
    group: list[tuple[int, Generated]] = []

    def taken() -> tuple[Sequence[_Numbered], list[Generated]]:
        found = [jobs[i] for i, _ in group], [written for _, written in group]
        group.clear()
        return found

    failure: BaseException | None = None
    missing = set(range(len(requests)))
    try:
        for i, written in engine.write(requests):
            if i not in missing:
                raise LensteerError(f"the engine {engine.name!r} answered request {i!r}, which was not open")
            group.append((i, check_written(model, engine, requests[i], written)))
            missing.remove(i)
            if len(group) == _GROUP:
                yield taken()
        if missing:
            raise LensteerError(
                f"the engine {engine.name!r} left {len(missing)} of {len(requests)} chains out: ask again"
            )
    except BaseException as error:  # an interrupt, too: what has come is kept
        failure = error
    if group:
        yield taken()
    if failure is not None:
        raise failure


def _name(numbered: _Numbered) -> str:
    _, job = numbered
    return f"{job.task.id}/{job.sample}"


def trace_of(
    model: TransformerBridge, job: Job, result: Generated, text: tuple[str, Sequence[int]] | None = None
) -> Trace:
    """A trace from generated ids; its text and its offsets are decoded from them, unless they are known."""
    response, offsets = models.decode_offsets(model.tokenizer, result.ids) if text is None else text
    return Trace(
        job.task,
        job.prompt,
        response,
        job.prompt_ids,
        result.ids,
        tuple(offsets),
        result.finished,
        job.sample,
        prefill=job.prefill,
        marks=models.thought_marks(model),
        opened=models.opens_thought(model, job.prompt),
    )


def chain_seed(seed: int, task_id: str, sample: int) -> int:
    """The seed of one chain: independent of other chains, so that steered and unsteered chains share it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task_id}/{sample}".encode()).digest()[:8], "big")


@checked(but=("engine",))
def generate_traces(
    model: TransformerBridge,
    tasks: Sequence[Task],
    *,
    n_samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 1000,
    batch_size: int = 128,
    thinking: bool = True,
    prefill: str = "",
    system: str = "",
    rewrite: Callable[[Task], str] | None = None,
    plans: Sequence[Plan | None] | None = None,
    engine: Engine | None = None,
    path: str | Path | None = None,
    inspect: Callable[[Sequence[Trace]], object] | None = None,
    progress: bool = False,
) -> list[Trace]:
    """Generate a model's responses to tasks.

    A pool on the model (`distributed.Actors`) sets aside a task whose generation fails; its chain is left out.

    Args:
        model: the bridge; plans that are on apply.
        tasks: that the prompts state.
        n_samples: as in `Sampling`, like the numbers that follow.
        temperature: 0 is greedy.
        top_p: nucleus sampling, as in `Sampling`.
        seed: of the whole run.
        max_new_tokens: per chain.
        batch_size: chains per batch.
        thinking: whether the template opens `<think>`, if it supports both.
        prefill: the beginning of every answer, such as "Answer:" for a direct one.
        system: the system prompt of every question.
        rewrite: from a task to a changed prompt (such as one with a cue).
        plans: one per task, None for a task without one.
        engine: what writes the chains instead of the model, such as a vLLM server (`generation.Served`). It samples by
            its own generators, so the chains are other draws.
        path: JSONL file that each finished batch is appended to; batches already in it are not rerun. (It does not
            record foreign hooks.)
        inspect: called with each finished batch's new chains once they are in the file; it may raise an error to stop.
        progress: show a bar with tokens per second.

    Raises:
        LensteerError: no task, an invalid number, two tasks with the same id and a path, a file of another run, or a
            chat template that takes no system prompt; an engine that fails, has another model, or is to write steered
            chains.
    """
    if not tasks:
        raise LensteerError("no tasks: give at least one, e.g. from load_tasks(split='dev')")
    sampling = Sampling(n_samples, temperature, seed, max_new_tokens, batch_size, thinking, top_p, prefill, system)
    if plans is not None and len(plans) != len(tasks):
        raise LensteerError(f"{len(plans)} plans for {len(tasks)} tasks: give one per task")
    own = list(plans or [None] * len(tasks))
    first = []
    for task, plan in zip(tasks, own, strict=True):
        start = prefill + wanted_prefill(model, plan)
        asked = rewrite(task) if rewrite else task.prompt
        prompt = models.chat_text(model, asked, system=system, thinking=thinking) + start
        first.append(Job(task, 0, prompt, tuple(models.encode(model, prompt)), start, plan))
    jobs = [replace(job, sample=sample) for sample in range(n_samples) for job in first]
    options: dict[str, Any] = dict(path=path, inspect=inspect, progress=progress, engine=engine)
    made = _resumed(model, jobs, sampling, name=_name, **options)
    order = [sample * len(tasks) + i for i in range(len(tasks)) for sample in range(n_samples)]
    return [made[i] for i in order if i in made]


def resume_jobs(
    model: TransformerBridge,
    jobs: Sequence[Job],
    sampling: Sampling,
    *,
    path: str | Path | None = None,
    inspect: Callable[[Sequence[Trace]], object] | None = None,
    engine: Engine | None = None,
    progress: bool = False,
) -> list[Trace]:
    """`run_jobs`, without rerunning batches that are already in a file.

    Args:
        model: the bridge; plans that are on apply.
        jobs: as in `run_jobs`.
        sampling: how chains are drawn.
        path: JSONL file that each finished batch is appended to.
        inspect: as in `generate_traces`.
        engine: as in `generate_traces`.
        progress: show a bar.

    Raises:
        LensteerError: two tasks with the same id and a path, a file of another run, or an engine as in
            `generate_traces`.
    """
    made = _resumed(model, jobs, sampling, path=path, inspect=inspect, progress=progress, engine=engine)
    return [made[i] for i in range(len(jobs))]


def _resumed(
    model: TransformerBridge,
    jobs: Sequence[Job],
    sampling: Sampling,
    *,
    path: str | Path | None,
    inspect: Callable[[Sequence[Trace]], object] | None,
    progress: bool,
    name: Callable[[_Numbered], str] | None = None,
    engine: Engine | None = None,
) -> dict[int, Trace]:
    """`resume_jobs` by the number of the job. With `name`, a job that a pool sets aside is left out."""
    if not isinstance(engine, Engine | None):
        raise LensteerError(f"engine={engine!r}: give generation.Served(Endpoint(url=...)) or generation.Offline(llm)")
    top_p, temperature = sampling.top_p, sampling.temperature
    numbers = (sampling.max_new_tokens, temperature, sampling.seed if temperature else None)
    more = (*(() if top_p == 1 else (top_p,)), *(() if engine is None else (engine.name,)))
    runs = {id(job.plan): _run(model, job.plan, *numbers, *more) for job in jobs}
    done = {} if path is None else _resume(model, Path(path), jobs, runs)

    def named(chains: Mapping[int, Trace]) -> dict[int, Trace]:
        return {i: replace(trace, run=runs[id(jobs[i].plan)]) for i, trace in chains.items()}

    def keep(fresh: Mapping[int, Trace]) -> None:
        if path is not None and fresh:
            append_jsonl(Path(path), map(asdict, named(fresh).values()))
        if inspect is not None and fresh:
            inspect(list(fresh.values()))

    return named(_made(model, jobs, sampling, done=done, keep=keep, progress=progress, name=name, engine=engine))


def _run(model: TransformerBridge, plan: Plan | None, *numbers: int | float | str | None) -> str:
    """Digest of what a chain depends on in addition to its prompt: model, all of its plans, numbers."""
    plans = [*active_plans(model), *([] if plan is None else [plan])]
    edits = [p.identity() for p in plans]
    identity = replace(models.fingerprint(model), name="", revision="")
    return digest(json.dumps([identity.to_dict(), edits, numbers]).encode())


def _resume(model: TransformerBridge, path: Path, jobs: Sequence[Job], runs: Mapping[int, str]) -> dict[int, Trace]:
    """Chains of an earlier run; an incomplete last line is dropped from the file."""
    numbers = {(job.task.id, job.sample): i for i, job in enumerate(jobs)}
    if len(numbers) < len(jobs):
        raise LensteerError(f"two tasks have the same id: {path} could not tell their chains apart")
    if not drop_cut_line(path):
        return {}
    done: dict[int, Trace] = {}
    kept = load_traces(path)
    with reading(path, "give another path"):
        models.check_ids(model, [trace.ids for trace in kept])
    for trace in kept:
        i = numbers.get((trace.task.id, trace.sample))
        if i is None or trace.prompt_ids != jobs[i].prompt_ids or trace.run != runs[id(jobs[i].plan)]:
            raise LensteerError(
                f"{path} holds chains of another run (such as {trace.id}): give another path, or the model, "
                "numbers, plans and engine that wrote them"
            )
        if i in done:
            raise LensteerError(f"{path} holds {trace.id} twice: remove one of the lines, or give another path")
        done[i] = trace
    return done
