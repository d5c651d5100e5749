"""Traces: what a model wrote on a task, token for token. Generating, saving, resuming. Knows nothing of annotators."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensteer import models
from lensteer.behaviors import Span
from lensteer.errors import LensteerError
from lensteer.files import append_lines, drop_cut_line, read_jsonl, write_atomically
from lensteer.generation import Generated, generate
from lensteer.progress import progress_bar
from lensteer.steering import Plan, active_plans, wanted_prefill
from lensteer.tasks import Task, grade

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Trace:
    """One chain.

    Attributes:
        task: what was asked.
        prompt: the prompt's text, chat template included.
        response: what was generated, as text, special tokens kept.
        prompt_ids: the very ids that went in.
        response_ids: the very ids that came out.
        offsets: where in `response` each response token starts.
        finished: whether the model ended by itself.
        sample: which of the samples on this task.
        spans: annotated behaviors, in order (empty before annotation).
        n_unparsed: sentences of the chain that no annotator could label; they stay in every denominator.
        prefill: the end of the prompt that was put into the model's mouth.
        run: digest of model, plans, seed and numbers that it came from; it tells a file of another run.
    """

    task: Task
    prompt: str
    response: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    offsets: tuple[int, ...]
    finished: bool
    sample: int = 0
    spans: tuple[Span, ...] = ()
    n_unparsed: int = 0
    prefill: str = ""
    run: str = ""

    @property
    def id(self) -> str:
        """Task and sample."""
        return f"{self.task.id}/{self.sample}"

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and response."""
        return self.prompt_ids + self.response_ids

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens."""
        return len(self.prompt_ids)

    @property
    def thinking(self) -> tuple[int, int]:
        """Characters of the response that are thought.

        Behind the first `<think>` (from 0 if the prompt has opened it) to `</think>` or the end; empty without either.
        """
        begin = 0
        if self.prompt.rfind(models.OPEN_THINKING) <= self.prompt.rfind(models.CLOSE_THINKING):
            found = self.response.find(models.OPEN_THINKING)
            if found < 0:
                return (0, 0)
            begin = found + len(models.OPEN_THINKING)
        end = self.response.find(models.CLOSE_THINKING, begin)
        return (begin, len(self.response) if end < 0 else end)

    @property
    def correct(self) -> bool | None:
        """Whether the answer is right; None where that isn't definite. What is only thought is no answer."""
        return grade(self.task, self.prefill + self.response[self.thinking[1] :])

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @staticmethod
    def from_dict(values: dict[str, Any], where: str = "trace") -> Trace:
        """From JSON values.

        Raises:
            LensteerError: fields are missing or of the wrong kind.
        """
        try:
            values = dict(values)
            values["task"] = Task.from_dict(values["task"], where)
            values["spans"] = tuple(Span(**span) for span in values.get("spans", ()))
            for key in ("prompt_ids", "response_ids", "offsets"):
                values[key] = tuple(int(i) for i in values[key])
            trace = Trace(**values)
        except LensteerError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LensteerError(f"{where} is no trace ({type(error).__name__}: {error})") from error
        if len(trace.offsets) != len(trace.response_ids):
            raise LensteerError(
                f"{where}: {len(trace.offsets)} offsets for {len(trace.response_ids)} tokens, give one per token"
            )
        return trace


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
    rewrite: Callable[[Task], str] | None = None,
    plans: Sequence[Plan | None] | None = None,
    path: str | Path | None = None,
    progress: bool = False,
) -> list[Trace]:
    """Let a model think about tasks.

    Args:
        model: the bridge; plans that are on apply.
        tasks: what to ask.
        n_samples: chains per task. Chain (task, sample) has a seed of its own, whatever else runs.
        temperature: 0 is greedy (then `n_samples` must be 1).
        top_p: draw from the likeliest tokens that together have so much probability.
        seed: of the whole run.
        max_new_tokens: per chain.
        batch_size: chains that run together.
        thinking: whether the template opens `<think>`, where it has that choice.
        prefill: text put behind the prompt, such as "Answer:" for a direct answer.
        rewrite: another prompt for a task (a cue, say).
        plans: one per task, None for a task that is left alone.
        path: JSONL file that each finished batch is appended to; batches already in it are not made again. (Hooks that
            are not a plan's leave no mark in it.)
        progress: show a bar with tokens per second.

    Raises:
        LensteerError: no task, an impossible number, two tasks of one id with a path, or a file of another run.
    """
    if not tasks:
        raise LensteerError("no tasks: give at least one, e.g. from load_tasks(split='dev')")
    for name, value in (
        ("n_samples", n_samples),
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise LensteerError(f"{name}={value}: give a positive number")
    if plans is not None and len(plans) != len(tasks):
        raise LensteerError(f"{len(plans)} plans for {len(tasks)} tasks: give one per task")
    if n_samples > 1 and not temperature:
        raise LensteerError(f"{n_samples} greedy samples would be the same: set temperature=1.0 or n_samples=1")
    jobs = [(index, sample) for sample in range(n_samples) for index in range(len(tasks))]
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    behind = [prefill + wanted_prefill(model, plan) for plan in plans or [None] * len(tasks)]
    prompts = [
        models.chat_text(model, rewrite(task) if rewrite else task.prompt, thinking=thinking) + text
        for task, text in zip(tasks, behind, strict=True)
    ]
    encoded = [tuple(models.encode(model, prompt)) for prompt in prompts]
    numbers = (max_new_tokens, temperature, seed if temperature else None, *(() if top_p == 1 else (top_p,)))
    own = {id(plan): _run(model, plan, *numbers) for plan in plans or [None]}
    runs = [own[id(plan)] for plan in plans or [None] * len(tasks)]
    done: dict[tuple[int, int], Trace] = {}
    store = None if path is None else Path(path)
    if store is not None:
        done = _resume(store, tasks, encoded, runs)
    with progress_bar(total=len(jobs), initial=len(done), unit="chain", show=progress) as bar:
        tokens = 0

        def advance(n: int) -> None:
            nonlocal tokens
            tokens += n
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)

        for batch in batches:
            if all(job in done for job in batch):
                continue
            # A batch that a kill cut short is made again whole: rounding depends on the company.
            results = generate(
                model,
                [encoded[i] for i, _ in batch],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seeds=[chain_seed(seed, tasks[i].id, sample) for i, sample in batch],
                plans=None if plans is None else [plans[i] for i, _ in batch],
                advance=advance,
            )
            made = []
            for (i, sample), result in zip(batch, results, strict=True):
                if (i, sample) not in done:
                    trace = trace_of(model, tasks[i], prompts[i], encoded[i], result, sample, behind[i])
                    made.append(replace(trace, run=runs[i]))
                    done[i, sample] = made[-1]
            if store is not None and made:
                append_lines(store, (trace.to_json() for trace in made))
            bar.update(len(made))
    return [done[i, sample] for i in range(len(tasks)) for sample in range(n_samples)]


def trace_of(
    model: TransformerBridge,
    task: Task,
    prompt: str,
    prompt_ids: tuple[int, ...],
    result: Generated,
    sample: int = 0,
    prefill: str = "",
) -> Trace:
    """A trace from what was generated, its text decoded from the very ids."""
    response, offsets = models.decode_offsets(model.tokenizer, result.ids)
    return Trace(
        task,
        prompt,
        response,
        prompt_ids,
        result.ids,
        tuple(offsets),
        result.finished,
        sample,
        prefill=prefill,
    )


def chain_seed(seed: int, task_id: str, sample: int) -> int:
    """The seed of one chain: the same whatever else runs, so that steered and unsteered arms share it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task_id}/{sample}".encode()).digest()[:8], "big")


def _run(model: TransformerBridge, plan: Plan | None, *numbers: int | float | None) -> str:
    """Digest of what a chain depends on besides its prompt: model, plans that are on, its own plan, numbers."""
    plans = [*active_plans(model), *([] if plan is None else [plan])]
    edits = [p.identity() for p in plans]
    identity = replace(models.fingerprint(model), name="", revision="")
    return hashlib.sha256(json.dumps([identity.to_dict(), edits, numbers]).encode()).hexdigest()[:16]


def _resume(
    path: Path, tasks: Sequence[Task], encoded: Sequence[tuple[int, ...]], runs: Sequence[str]
) -> dict[tuple[int, int], Trace]:
    """Chains of an earlier run; a last line that a kill cut short is dropped from the file."""
    if len({task.id for task in tasks}) < len(tasks):
        raise LensteerError(f"two tasks have the same id: {path} could not tell their chains apart")
    if not drop_cut_line(path):
        return {}
    index = {task.id: i for i, task in enumerate(tasks)}
    done: dict[tuple[int, int], Trace] = {}
    for trace in load_traces(path):
        i = index.get(trace.task.id)
        if i is None or trace.prompt_ids != encoded[i] or trace.run != runs[i]:
            raise LensteerError(f"{path} holds chains of another run (such as {trace.id}): give another path")
        done[i, trace.sample] = trace
    return done


def save_traces(traces: Iterable[Trace], path: str | Path) -> None:
    """Write traces as JSONL, all or nothing."""
    write_atomically(Path(path), "".join(trace.to_json() + "\n" for trace in traces))


def load_traces(path: str | Path) -> list[Trace]:
    """Read traces.

    Raises:
        LensteerError: no such file, an empty one, or a line that is no trace.
    """
    return [Trace.from_dict(values, f"{path}, line {number}") for number, values in read_jsonl(Path(path))]


def with_spans(trace: Trace, spans: Sequence[Span], n_unparsed: int) -> Trace:
    """The same trace, annotated."""
    return replace(trace, spans=tuple(spans), n_unparsed=n_unparsed)
