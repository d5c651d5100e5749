"""`lensteer cache`: fit a vector on records, choose its coefficient on dev tasks, measure on held-out tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lensteer import models, organism
from lensteer.annotation import grammar, rules
from lensteer.cache_steering import (
    CachePlan,
    CacheVector,
    Record,
    contrastive_pairs,
    fit_cache_vector,
    load_records,
    style_of,
)
from lensteer.cache_steering.organism import ENDING, JOIN, make_records
from lensteer.errors import LensteerError
from lensteer.evaluation import Condition, Modes, ModeSummary, measure_modes
from lensteer.files import read_json, write_json
from lensteer.generation.jobs import Sampling
from lensteer.pipeline.run import MANIFEST, Run, loading_options
from lensteer.results import reading, revived
from lensteer.tasks import describe_tasks, load_tasks
from lensteer.traces import Trace

ASK_TO_THINK = "Let us think step by step."
#: Answers of each condition that the result keeps.
SAMPLES = 3
RESULT = "cache.json"


@dataclass(frozen=True)
class CacheFit:
    """Settings for fitting a cache vector. `records` is "" for the model's default."""

    model: str | None = None
    records: str = ""
    style: str = "stepwise"
    against: str | None = None
    n: int = 100
    shots: int = 2
    neighbors: str = "random"
    position: int | str = "last_prompt"
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    device_map: str | None = None
    revision: str | None = None
    system: str = ""
    thought: str = "auto"
    template: str | None = None


@dataclass(frozen=True)
class CacheRun:
    """Settings for measuring a cache vector. `suffix` is appended to every question, in every condition."""

    vector: str
    model: str | None = None
    tasks: str = "organism"
    suffix: str = ""
    c_values: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    c_keys: float = 0.0
    unit: str = "norm"
    n_dev: int = 40
    n_test: int = 100
    n_controls: int = 20
    temperature: float = 1.0
    max_new_tokens: int = 400
    batch_size: int = 128
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    device_map: str | None = None
    revision: str | None = None
    system: str = ""
    thought: str = "auto"
    template: str | None = None


def cache_fit(config: CacheFit, out: str | Path, announce: Callable[[str], object] = lambda line: None) -> CacheVector:
    """Fit a cache vector and save it.

    Raises:
        LensteerError: an unknown model, kind of records, style or position, too few records, or a model whose cache
            cannot be edited.
    """
    own = (config.records or ("builtin" if config.model else "organism")) == "organism"
    records = _records(config)
    if config.n > len(records):
        raise LensteerError(
            f"{config.n} pairs of {len(records)} records: every pair asks a question of its own; ask for at most "
            f"{len(records)}, or give more records"
        )
    model = models.load_model(config.model, **loading_options(config))
    announce(f"loaded {models.fingerprint(model).name}")
    position = config.position
    if isinstance(position, str) and position.lstrip("-").isdigit():
        position = int(position)
    wording: dict[str, Any] = dict(ending=ENDING, join=JOIN) if own else {}
    pairs = contrastive_pairs(
        model,
        records,
        n=config.n,
        shots=config.shots,
        style=config.style,
        against=config.against,
        neighbors=config.neighbors,
        seed=config.seed,
        system=config.system,
        **wording,
    )
    announce(f"reading {2 * len(pairs)} prompts of {config.shots} solved examples each")
    vector = fit_cache_vector(model, pairs, position=position, label=config.style, progress=True)
    vector.save(out)
    announce(f"{len(pairs)} pairs from {len(records)} records, read at {vector.position!r}: {out}")
    return vector


def _records(config: CacheFit) -> list[Record]:
    source = config.records or ("builtin" if config.model else "organism")
    return make_records(max(100, config.shots + 1), seed=config.seed) if source == "organism" else load_records(source)


def cache_run(config: CacheRun, out: str | Path, announce: Callable[[str], object] = lambda line: None) -> Modes:
    """Choose the coefficient on dev tasks, measure on held-out ones, and write `cache.json` into a folder.

    The coefficient is chosen by `chosen_edit`. Conditions on the held-out tasks: unsteered, the edit, what it appends
    to the prompt alone (if anything), the words `ASK_TO_THINK` instead, and control vectors of the same length
    (`CacheVector.controls`). All answers are in `cache-dev.jsonl` and `cache-test.jsonl`, a few in `cache.json`.

    Raises:
        LensteerError: no such vector, another model's, a model whose cache cannot be edited, a folder that holds
            another experiment, or coefficients that all break the text.
    """
    folder = Path(out)
    run = Run.open(folder) if (folder / MANIFEST).exists() else None
    vector = CacheVector.load(config.vector)
    vector.scale("values", config.unit)
    controls = vector.controls(config.n_controls, config.seed)
    ladder = sorted(set(config.c_values))
    if not ladder or 0.0 in ladder:
        raise LensteerError(f"coefficients {ladder}: give one or more to choose from, none of them 0")
    model = run.model if run else models.load_model(config.model, **loading_options(config))
    vector.check_model(model)
    own = config.tasks == "organism"
    if (said := describe_tasks(config.tasks)) is not None:
        announce(f"tasks: {said}")
    marks = bool(models.thought_marks(model)[0])
    sampling = Sampling(
        1,
        config.temperature,
        config.seed,
        config.max_new_tokens,
        config.batch_size,
        thinking=False,
        system=config.system,
    )
    samples: list[dict[str, str]] = []

    def show(condition: Condition, trace: Trace) -> None:
        if condition.kind != "control" and sum(s["condition"] == condition.name for s in samples) < SAMPLES:
            samples.append({"condition": condition.name, "question": trace.task.prompt, "answer": trace.response})

    def measured(split: str, conditions: list[Condition], n: int) -> Modes:
        tasks = load_tasks(config.tasks, split=split, n=n)
        announce(f"{split}: {len(conditions)} conditions × {len(tasks)} tasks, at most {config.max_new_tokens} tokens")
        return measure_modes(
            model,
            tasks,
            conditions,
            sampling,
            style_of=organism.style_of if own else style_of,
            annotator=grammar if own else rules,
            seed=config.seed,
            path=folder / f"cache-{split}.jsonl",
            progress=True,
            keep=show if split == "test" else None,
        )

    def edit(found: CacheVector, coefficient: float) -> CachePlan:
        return CachePlan(found, coefficient, config.c_keys, unit=config.unit)

    suffix = config.suffix
    tried = {c: Condition(f"c_values={c:g}", edit(vector, c), suffix) for c in ladder}
    dev = measured("dev", [Condition("unsteered", None, suffix, kind="unsteered"), *tried.values()], config.n_dev)
    for summary in dev.conditions:
        announce(f"  {told(summary, marks)}")
    best, why = chosen_edit(dev, {c: condition.name for c, condition in tried.items()}, marks=marks)
    announce(why)
    conditions = [
        Condition("unsteered", None, suffix, kind="unsteered"),
        Condition("cache", edit(vector, best), suffix),
    ]
    if conditions[1].plan is not None and conditions[1].plan.prefill:
        conditions.append(Condition("offset token alone", None, suffix, conditions[1].plan.prefill))
    conditions.append(Condition("prompted baseline", None, f"{suffix} {ASK_TO_THINK}".strip(), kind="prompted"))
    conditions += [Condition(control.label, edit(control, best), suffix, kind="control") for control in controls]
    test = measured("test", conditions, config.n_test)
    values = {
        "config": asdict(config),
        "vector": {"label": vector.label, "position": vector.position, **vector.provenance},
        "c_values": best,
        "why": why,
        "dev": dev.to_dict(),
        "test": test.to_dict(),
        "samples": samples,
    }
    write_json(folder / RESULT, values)
    for condition in (a for a in test.conditions if a.kind != "control"):
        announce(told(condition, marks))
    if controls:
        announce(ranked(test, marks))
    announce(f"c_values={best:g}: {(folder / RESULT).resolve()}")
    return test


def told(condition: ModeSummary, marks: bool = True) -> str:
    """A condition in one line, such as "cache: reasons 93.3% (+91.0, p = .0001), right 12.0%, 230 tokens"."""

    def share(name: str, word: str) -> str:
        value, change = getattr(condition, name), condition.changes.get(name)
        if value is None:
            return ""
        against = f" ({100 * change.value:+.1f}, p = {condition.p[name]:.2g})" if change is not None else ""
        return f"{word} {value.value:.1%}{against}"

    parts = [
        share("thinks", "thinks") if marks else share("reasons", "reasons"),
        share("accuracy", "right"),
        share("answered", "an answer in"),
        f"{condition.length.value:.0f} tokens",
        f"BROKEN TEXT: {condition.broken}" if condition.broken else "",
    ]
    return f"{condition.condition}: {', '.join(filter(None, parts))}"


def ranked(test: Modes, marks: bool = True) -> str:
    """Where the edit stands among its controls, such as "20 control vectors: reasons 0.0% to 13.3% (the edit 100.0%)".

    Args:
        test: with conditions "cache" and controls.
        marks: whether the model marks its thinking.
    """
    controls = [c for c in test.conditions if c.kind == "control"]
    parts = []
    for name, word in (("thinks", "thinks") if marks else ("reasons", "reasons"), ("accuracy", "right")):
        own = getattr(test["cache"], name)
        if own is not None:
            values = [getattr(c, name).value for c in controls]
            more = sum(value >= own.value for value in values)
            parts.append(
                f"{word} {min(values):.1%} to {max(values):.1%} (the edit {own.value:.1%}, "
                f"{f'{more} of them as much or more' if more else 'more than any of them'})"
            )
    kind = "from the pairs' spread" if controls[0].condition.startswith("spread") else "isotropic"
    return f"{len(controls)} control vectors ({kind}) of the same length: {', '.join(parts)}"


def chosen_edit(dev: Modes, tried: Mapping[float, str], *, marks: bool = True) -> tuple[float, str]:
    """Which coefficient to take, and why, in a sentence.

    The one with the most right answers on dev tasks if they have answers, and of those that tie the one with most
    answers that reason; without answers, the one with most answers that reason and end. Thinking between marks counts
    as reasoning where the model has such marks. Coefficients whose text is broken (`ModeSummary.broken`) are left out.
    If several are still level, the smallest is taken.

    Args:
        dev: with an unsteered condition.
        tried: the names of the conditions, by coefficient.
        marks: whether the model marks its thinking.

    Raises:
        LensteerError: every coefficient breaks the text.
    """
    readable = {c: dev[name] for c, name in tried.items() if not dev[name].broken}
    if not readable:
        reasons = "; ".join(f"{c:g}: {dev[name].broken}" for c, name in tried.items())
        raise LensteerError(f"every coefficient breaks the text on dev tasks ({reasons}): give smaller ones")

    def worth(summary: ModeSummary) -> tuple[float, ...]:
        thought = summary.thinks if marks or summary.reasons is None else summary.reasons
        if summary.accuracy is not None:
            return (summary.accuracy.value, thought.value)
        return (thought.value * summary.finished.value,)

    most = max(map(worth, readable.values()))
    level = sorted((c for c, summary in readable.items() if worth(summary) == most), key=abs)
    rule = "right answers" if len(most) > 1 else "answers that reason and end"
    right = f"{most[0]:.1%} {rule} on {dev.n_tasks} dev tasks"
    ties = f", as {', '.join(f'{c:g}' for c in level[1:])} (the smallest is taken)" if len(level) > 1 else ""
    same = [c for c, s in readable.items() if c not in level and worth(s)[0] == most[0]]
    second = f"; {', '.join(f'{c:g}' for c in same)} with as many, but fewer that reason" if same else ""
    broken = sorted(set(tried) - set(readable))
    left = f"; broken text: {', '.join(f'{c:g}' for c in broken)}" if broken else ""
    return level[0], f"c_values={level[0]:g}: {right}{ties}{second}{left}"


def read_cache_run(folder: Path) -> dict[str, Any] | None:
    """The result of a `cache run` in a folder, or None.

    Raises:
        LensteerError: the file holds something else.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    values = read_json(path)
    with reading(path, "run it again"):
        return {
            "c_values": revived(float, values["c_values"]),
            "unit": values["config"].get("unit", "difference"),
            "vector": revived(dict[str, Any], values["vector"]),
            "test": Modes.from_dict(values["test"]),
        }
