"""Do lm-evaluation-harness and inspect_ai see the answers that lensteer's own runs give, with a plan and without?

The same tasks are asked three ways, greedily, on one loaded model: by `generate_traces`, through
`lensteer.adapters.lm_eval` and through `lensteer.adapters.inspect_ai`. Texts are compared, then the answers that
`tasks.read_answer` reads in them, then what lm-eval's own GSM8K filter (the last number) makes of them.

    python analyses/benchmark_agreement.py --model SmolLM2-135M-Instruct --tasks gsm8k/test.jsonl

A harness whose package is missing is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lensteer as ls
from lensteer.steering import Plan
from lensteer.tasks import Task, read_answer

TASK = r"""
task: lensteer_tasks
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
  cache_dir: "{cache}"
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: {max_new_tokens}, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: [",", "\\$", "\\.$"]}}
filter_list:
  - name: flexible-extract
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"}}
      - {{function: take_first}}
"""


@dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
        model: A chat model's folder or name.
        tasks: Any source that `load_tasks` takes; its held-out tasks are asked.
        n: Tasks.
        pairs: What the plan's direction is fitted on; any source that `load_pairs` takes.
        layer: Of the plan; by default the middle one.
        coefficient: In multiples of the difference, at every generated token.
        max_new_tokens: Per answer.
        batch_size: Answers per batch, in all three.
        dtype: Of the weights.
    """

    model: str | None = None
    tasks: str = "organism"
    n: int = 30
    pairs: str = "politeness"
    layer: int | None = None
    coefficient: float = 2.0
    max_new_tokens: int = 128
    batch_size: int = 30
    dtype: str = "float32"


@dataclass(frozen=True)
class Asked:
    """One harness's run of one condition: texts, extracted answers and right ones among the tasks, and seconds.

    Attributes:
        harness: "lensteer", "lm-eval" or "inspect".
        condition: "unsteered" or "steered".
        n: Tasks.
        same_texts: As lensteer's own run, character for character.
        same_answers: As lensteer's own run, by `read_answer`.
        right: By `read_answer`.
        unread: Without an answer by `read_answer`.
        truncated: Answers that did not end by themselves; None if the harness does not say.
        right_by_filter: By lm-eval's own filter, the last number; None for the others.
        seconds: Of the whole run, without loading the model.
    """

    harness: str
    condition: str
    n: int
    same_texts: int
    same_answers: int
    right: int
    unread: int
    truncated: int | None
    right_by_filter: int | None
    seconds: float


#: A task's text, and whether it ended by itself if that is known.
Said = tuple[str, bool | None]


def by_lensteer(model: Any, tasks: Sequence[Task], plan: Plan | None, config: Config) -> dict[str, Said]:
    """Texts by task id, without special tokens, from lensteer's own run."""
    traces = ls.generate_traces(
        model,
        tasks,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        plans=[plan] * len(tasks),
    )
    decode = model.tokenizer.decode
    return {
        t.task.id: (
            decode(list(t.response_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False),
            t.finished,
        )
        for t in traces
    }


def by_lm_eval(
    model: Any, tasks: Sequence[Task], plan: Plan | None, config: Config
) -> tuple[dict[str, Said], int, dict[str, Any]]:
    """Texts by task id, how many are right by lm-eval's filter, and the configuration that it records."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from lensteer.adapters.lm_eval import SteeredLM

    with TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "tasks.jsonl"
        data.write_text("".join(json.dumps(task.to_dict()) + "\n" for task in tasks), encoding="utf-8")
        yaml = TASK.format(data=data, cache=folder / "cache", max_new_tokens=config.max_new_tokens)
        (folder / "tasks.yaml").write_text(yaml, encoding="utf-8")
        found = lm_eval.simple_evaluate(
            model=SteeredLM(model, plan=plan, batch_size=config.batch_size),
            tasks=["lensteer_tasks"],
            task_manager=TaskManager(include_path=name, include_defaults=False),
            apply_chat_template=True,
            bootstrap_iters=0,
        )
    rows = found["samples"]["lensteer_tasks"]
    right = round(sum(row["exact_match"] for row in rows))
    return {row["doc"]["id"]: (row["resps"][0][0], None) for row in rows}, right, found["config"]


def by_inspect(model: Any, tasks: Sequence[Task], plan: Plan | None, config: Config) -> dict[str, Said]:
    """Texts by task id, from inspect."""
    import inspect_ai
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.solver import generate

    from lensteer.adapters.inspect_ai import steered_model

    samples = [Sample(input=task.prompt, target=task.answer or "", id=task.id) for task in tasks]
    with TemporaryDirectory() as name:
        (log,) = inspect_ai.eval(
            inspect_ai.Task(dataset=MemoryDataset(samples), solver=generate()),
            model=steered_model(model, plan, batch_size=config.batch_size),
            log_dir=name,
            display="none",
            max_tokens=config.max_new_tokens,
        )
        if log.status != "success":
            raise ls.LensteerError(f"inspect ended with {log.status!r}: {log.error}")
        found = {str(s.id): (s.output.completion, s.output.stop_reason == "stop") for s in log.samples}
    return found


def main(config: Config) -> list[Asked]:
    """Ask all tasks in each way, unsteered and steered."""
    model = ls.load_model(config.model, dtype=config.dtype)
    tasks = ls.load_tasks(config.tasks, split="test", n=config.n)
    directions = ls.fit_directions(model, ls.load_pairs(config.pairs))
    layer = ls.models.n_layers(model) // 2 if config.layer is None else config.layer
    plan = ls.SteeringPlan(directions[directions.labels[0]], layer, config.coefficient, ls.generated)
    rows = []
    for condition, own in (("unsteered", None), ("steered", plan)):
        first: dict[str, Said] = {}
        for harness, ask in available():
            begin = time.perf_counter()
            found = ask(model, tasks, own, config)
            seconds = time.perf_counter() - begin
            said, by_filter = (found[0], found[1]) if isinstance(found, tuple) else (found, None)
            first = first or said
            # lm-eval does not say whether an answer was cut off, so that comes from lensteer's own run.
            answers = [read_answer(t, said[t.id][0], finished=bool(first[t.id][1])) for t in tasks]
            wanted = [read_answer(t, first[t.id][0], finished=bool(first[t.id][1])) for t in tasks]
            ended = [said[t.id][1] for t in tasks]
            rows.append(
                Asked(
                    harness,
                    condition,
                    len(tasks),
                    sum(said[t.id][0] == first[t.id][0] for t in tasks),
                    sum(a == b for a, b in zip(answers, wanted, strict=True)),
                    sum(r is True for r in right(tasks, answers)),
                    answers.count(None),
                    None if None in ended else ended.count(False),
                    by_filter,
                    seconds,
                )
            )
    return rows


def right(tasks: Sequence[Task], answers: Sequence[str | None]) -> list[bool | None]:
    """Whether each answer is right."""
    from lensteer.evaluation import graded

    return graded(tasks, answers)


def available() -> list[tuple[str, Callable[..., Any]]]:
    """Lensteer's own run, and the harnesses that are installed."""
    found: list[tuple[str, Callable[..., Any]]] = [("lensteer", by_lensteer)]
    for name, package, ask in (("lm-eval", "lm_eval", by_lm_eval), ("inspect", "inspect_ai", by_inspect)):
        if importlib.util.find_spec(package) is not None:
            found.append((name, ask))
    return found


def table(rows: Sequence[Asked]) -> str:
    """As text, a line per run."""
    lines = [f"{'':10}{'':11}{'texts':>7}{'answers':>9}{'right':>7}{'unread':>8}{'cut':>5}{'filter':>8}{'s':>8}"]
    for r in rows:
        cut, own = ("-" if value is None else value for value in (r.truncated, r.right_by_filter))
        lines.append(
            f"{r.harness:10}{r.condition:11}{r.same_texts:>7}{r.same_answers:>9}{r.right:>7}{r.unread:>8}{cut:>5}"
            f"{own:>8}{r.seconds:>8.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tasks", default=Config.tasks)
    parser.add_argument("--n", type=int, default=Config.n)
    parser.add_argument("--pairs", default=Config.pairs)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--coefficient", type=float, default=Config.coefficient)
    parser.add_argument("--max-new-tokens", type=int, default=Config.max_new_tokens)
    parser.add_argument("--batch-size", type=int, default=Config.batch_size)
    parser.add_argument("--dtype", default=Config.dtype)
    parser.add_argument("--json", type=Path)
    arguments = vars(parser.parse_args())
    out = arguments.pop("json")
    results = main(Config(**arguments))
    print(table(results))
    if out is not None:
        out.write_text(json.dumps([asdict(row) for row in results], indent=1))
