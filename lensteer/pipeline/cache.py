"""`lensteer cache`: fit a vector on records, choose its coefficient on dev tasks, measure on held-out tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from lensteer.files import read_text, write_atomically
from lensteer.generation.jobs import Sampling
from lensteer.pipeline.run import MANIFEST, Run, loading_options
from lensteer.tasks import describe_tasks, load_tasks

ASK_TO_THINK = "Let us think step by step."
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
    c_values: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    c_keys: float = 0.0
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
        LensteerError: an unknown model, kind of records, style or position, or too few records.
    """
    model = models.load_model(config.model, **loading_options(config))
    position = config.position
    if isinstance(position, str) and position.lstrip("-").isdigit():
        position = int(position)
    own = (config.records or ("builtin" if config.model else "organism")) == "organism"
    records = _records(config)
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
    vector = fit_cache_vector(model, pairs, position=position, label=config.style)
    vector.save(out)
    announce(f"{len(pairs)} pairs from {len(records)} records, read at {vector.position!r}: {out}")
    return vector


def _records(config: CacheFit) -> list[Record]:
    source = config.records or ("builtin" if config.model else "organism")
    return make_records(max(100, config.shots + 1), seed=config.seed) if source == "organism" else load_records(source)


def cache_run(config: CacheRun, out: str | Path, announce: Callable[[str], object] = lambda line: None) -> Modes:
    """Choose the coefficient on dev tasks, measure on held-out ones, and write `cache.json` into a folder.

    The coefficient is the one with the most right answers on dev tasks if answers can be graded, else the one with the
    most answers that think and end; ties go to the smallest.

    Raises:
        LensteerError: no such vector, another model's, or a folder that holds another experiment.
    """
    folder = Path(out)
    run = Run.open(folder) if (folder / MANIFEST).exists() else None
    model = run.model if run else models.load_model(config.model, **loading_options(config))
    vector = CacheVector.load(config.vector, model)
    own = config.tasks == "organism"
    if (said := describe_tasks(config.tasks)) is not None:
        announce(f"tasks: {said}")
    sampling = Sampling(
        1,
        config.temperature,
        config.seed,
        config.max_new_tokens,
        config.batch_size,
        thinking=False,
        system=config.system,
    )

    def measured(split: str, conditions: list[Condition], n: int) -> Modes:
        return measure_modes(
            model,
            load_tasks(config.tasks, split=split, n=n),
            conditions,
            sampling,
            style_of=organism.style_of if own else style_of,
            annotator=grammar if own else rules,
            seed=config.seed,
            path=folder / f"cache-{split}.jsonl",
            progress=True,
        )

    def edit(found: CacheVector, coefficient: float) -> CachePlan:
        return CachePlan(found, coefficient, config.c_keys if coefficient else 0.0)

    suffix = config.suffix
    ladder = sorted(set(config.c_values))
    tried = [Condition(f"c_values={c:g}", edit(vector, c), suffix) for c in ladder]
    dev = measured("dev", [Condition("unsteered", None, suffix, kind="unsteered"), *tried], config.n_dev)
    best = max(ladder, key=lambda c: (_worth(dev[f"c_values={c:g}"]), -c))
    conditions = [
        Condition("unsteered", None, suffix, kind="unsteered"),
        Condition("cache", edit(vector, best), suffix),
    ]
    if conditions[1].plan is not None and conditions[1].plan.prefill:
        conditions.append(Condition("offset token alone", None, suffix, conditions[1].plan.prefill))
    conditions.append(Condition("prompted baseline", None, f"{suffix} {ASK_TO_THINK}".strip(), kind="prompted"))
    conditions += [
        Condition(f"random-{i}", edit(vector.random(config.seed + i), best), suffix, kind="control")
        for i in range(config.n_controls)
    ]
    test = measured("test", conditions, config.n_test)
    values = {
        "config": asdict(config),
        "vector": {"label": vector.label, "position": vector.position, **vector.provenance},
        "c_values": best,
        "dev": dev.to_dict(),
        "test": test.to_dict(),
    }
    write_atomically(folder / RESULT, json.dumps(values, indent=1))
    for condition in (a for a in test.conditions if a.kind != "control"):
        right = "" if condition.accuracy is None else f", right {condition.accuracy.value:.1%}"
        announce(
            f"{condition.condition}: thinks {condition.thinks.value:.1%}{right}, {condition.length.value:.0f} tokens"
        )
    announce(f"c_values={best:g}: {(folder / RESULT).resolve()}")
    return test


def _worth(condition: ModeSummary) -> float:
    return (
        condition.accuracy.value
        if condition.accuracy is not None
        else condition.thinks.value * condition.finished.value
    )


def read_cache_run(folder: Path) -> dict[str, Any] | None:
    """The result of a `cache run` in a folder, or None.

    Raises:
        LensteerError: the file holds something else.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        values: dict[str, Any] = json.loads(read_text(path))
        return {"c_values": values["c_values"], "vector": values["vector"], "test": Modes.from_dict(values["test"])}
    except (ValueError, KeyError, TypeError) as error:
        raise LensteerError(f"{path} holds no cache run ({error}): run it again") from error
