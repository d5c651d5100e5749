"""The stages of a run and their artifacts on disk. A stage that is done is not redone; one that was cut off goes on.

A run is a folder: `run.json` (what was asked, of which model, which stages are done), one artifact per stage, and
`summary.json` with `report.html`. Knows nothing of command lines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensteer import models, organism
from lensteer._version import __version__
from lensteer.annotation import annotate_report
from lensteer.attribution import LayerScores, attribute
from lensteer.behaviors import STEERED
from lensteer.errors import LensteerError
from lensteer.evaluation import Doses, Sampling, choose_coefficients, evaluate
from lensteer.files import write_atomically
from lensteer.overlap import EmbeddingOverlap, embedding_overlap
from lensteer.positions import PositionScope, everywhere, generated, onsets, sentence_starts, thinking
from lensteer.selection import Site, select_layers
from lensteer.tasks import Task, load_tasks
from lensteer.traces import generate_traces, load_traces, save_traces
from lensteer.vectors import BehaviorVectors, fit_vectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SCOPES: dict[str, PositionScope] = {s.name: s for s in (everywhere, generated, thinking, onsets, sentence_starts)}
FULL_RUN = Path(organism.__file__).parent / "full_run.json"
MANIFEST = "run.json"


@dataclass(frozen=True)
class RunConfig:
    """What a run does. The defaults are the full run on the embedded organism."""

    model: str | None = None
    tasks: str = "organism"
    n_train: int = 300
    n_dev: int = 100
    n_test: int = 200
    n_samples: int = 2
    temperature: float = 1.0
    max_new_tokens: int = 400
    batch_size: int = 256
    window: str = "onset"
    negatives: str = "spans"
    scope: str = "thinking"
    max_spans: int = 200
    doses: tuple[float, ...] = (0.15, 0.3, 0.5, 0.75, 1.0, 1.5)
    min_parsed: float = 0.95
    n_random: int = 20
    seed: int = 0


DEMO = RunConfig(n_train=150, n_dev=24, n_test=50, max_spans=100, doses=(0.3, 0.5, 0.75, 1.0))


@dataclass
class Run:
    """A run's folder, open."""

    folder: Path
    config: RunConfig
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    model_id: dict[str, Any] = field(default_factory=dict)
    progress: bool = False

    @staticmethod
    def open(folder: str | Path, config: RunConfig | None = None, *, progress: bool = False) -> Run:
        """Open a run's folder, or begin one.

        Args:
            folder: of the run.
            config: what to do; None goes on with what the folder says.
            progress: show bars.

        Raises:
            LensteerError: the folder holds another run or something else, or nothing while no config is given.
        """
        folder = Path(folder)
        manifest = folder / MANIFEST
        if not manifest.exists():
            if config is None:
                raise LensteerError(f"{str(folder)!r} holds no run: begin one with `lensteer run`")
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise LensteerError(
                    f"{str(folder)!r} is no run of lensteer: give a new or an empty folder"
                )
            if config.scope not in SCOPES:
                raise LensteerError(f"no scope {config.scope!r}: choose one of {sorted(SCOPES)}")
            run = Run(folder, config, progress=progress)
            run._write()
            return run
        try:
            values = json.loads(manifest.read_text(encoding="utf-8"))
            stored = RunConfig(**{**values["config"], "doses": tuple(values["config"]["doses"])})
            run = Run(folder, stored, values["stages"], values["model"], progress)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise LensteerError(f"{manifest} cannot be read ({error}): give another folder") from error
        if config is not None and config != stored:
            other = {k: v for k, v in asdict(stored).items() if asdict(config)[k] != v}
            raise LensteerError(
                f"{str(folder)!r} holds another run, with {other}: give another folder, or the same options"
            )
        return run

    def _write(self) -> None:
        values = {
            "lensteer": __version__,
            "config": asdict(self.config),
            "model": self.model_id,
            "stages": self.stages,
        }
        write_atomically(self.folder / MANIFEST, json.dumps(values, indent=1))

    @cached_property
    def model(self) -> TransformerBridge:
        """The run's model, checked against the one the run began with."""
        model = models.load_model(self.config.model)
        found = models.fingerprint(model)
        if not self.model_id:
            self.model_id = found.to_dict()
            self._write()
        elif found.differences(self.model_id):
            raise LensteerError(
                f"{str(self.folder)!r} was begun with model {self.model_id['name']!r}; {found.name!r} differs from it in "
                f"{found.differences(self.model_id)}: give that model or another folder"
            )
        return model

    def tasks(self, split: str) -> list[Task]:
        """The run's tasks of a split."""
        n = {"train": self.config.n_train, "dev": self.config.n_dev, "test": self.config.n_test}[split]
        return load_tasks(self.config.tasks, split=split, n=n)

    def sampling(self, n_samples: int) -> Sampling:
        """How the run draws chains."""
        c = self.config
        return Sampling(n_samples, c.temperature, c.seed, c.max_new_tokens, c.batch_size)

    def path(self, name: str) -> Path:
        """Of an artifact."""
        return self.folder / name

    def stage(self, name: str) -> None:
        """Do one stage, unless it is done.

        Raises:
            LensteerError: no such stage, or the one before it is not done.
        """
        if name not in STAGES:
            raise LensteerError(f"no stage {name!r}: the stages are {list(STAGES)}")
        if name in self.stages:
            return
        before = list(STAGES)[: list(STAGES).index(name)]
        missing = [stage for stage in before if stage not in self.stages]
        if missing:
            raise LensteerError(
                f"stage {name!r} needs {missing} in {str(self.folder)!r}: do them first, or `lensteer run`"
            )
        begun = time.perf_counter()
        facts = STAGES[name](self)
        self.stages[name] = {"seconds": round(time.perf_counter() - begun, 2), **facts}
        self._write()

    def complete(self, announce: Callable[[str], object] | None = None) -> Path:
        """Do all stages that are not done; returns the report's path."""
        for name in STAGES:
            if announce is not None:
                announce(f"{name}: {'done already' if name in self.stages else '...'}")
            self.stage(name)
        return self.path("report.html")


def _traces(run: Run) -> dict[str, Any]:
    c = run.config
    traces = generate_traces(
        run.model,
        run.tasks("train"),
        temperature=c.temperature,
        seed=c.seed,
        max_new_tokens=c.max_new_tokens,
        batch_size=c.batch_size,
        path=run.path("traces.jsonl"),
        progress=run.progress,
    )
    return {"chains": len(traces), "tokens": sum(len(t.response_ids) for t in traces)}


def _annotate(run: Run) -> dict[str, Any]:
    annotated, reports = annotate_report(load_traces(run.path("traces.jsonl")))
    save_traces(annotated, run.path("annotated.jsonl"))
    return {
        "matched": sum(r.matched for r in reports),
        "repaired": sum(len(r.repaired) for r in reports),
        "dropped": sum(len(r.dropped) for r in reports),
        "unparsed": sum(t.n_unparsed for t in annotated),
    }


def _vectors(run: Run) -> dict[str, Any]:
    c = run.config
    traces = load_traces(run.path("annotated.jsonl"))
    vectors = fit_vectors(run.model, traces, window=c.window, negatives=c.negatives, seed=c.seed)
    vectors.save(run.path("vectors.safetensors"))
    return {"spans": dict(vectors.counts)}


def _attribute(run: Run) -> dict[str, Any]:
    c = run.config
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    scores = attribute(
        run.model,
        load_traces(run.path("annotated.jsonl")),
        vectors,
        behaviors=[b for b in STEERED if b in vectors.labels],
        max_spans=c.max_spans,
        seed=c.seed,
        progress=run.progress,
    )
    scores.save(run.path("scores.json"))
    embedding_overlap(run.model, vectors).save(run.path("overlap.json"))
    return {"method": scores.method}


def _select(run: Run) -> dict[str, Any]:
    c = run.config
    site = select_layers(LayerScores.load(run.path("scores.json")), EmbeddingOverlap.load(run.path("overlap.json")))
    site.save(run.path("site.json"))
    doses = choose_coefficients(
        run.model,
        run.tasks("dev"),
        BehaviorVectors.load(run.path("vectors.safetensors"), run.model),
        site,
        doses=c.doses,
        min_parsed=c.min_parsed,
        scope=SCOPES[c.scope],
        sampling=run.sampling(1),
        path=run.path("doses.jsonl"),
        progress=run.progress,
    )
    doses.save(run.path("doses.json"))
    return {"layers": dict(site), "coefficients": doses.coefficients}


def _evaluate(run: Run) -> dict[str, Any]:
    c = run.config
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    site, doses = Site.load(run.path("site.json")), Doses.load(run.path("doses.json"))
    evaluation = evaluate(
        run.model,
        run.tasks("test"),
        vectors,
        site,
        doses.coefficients,
        scope=SCOPES[c.scope],
        words={b: organism.cue(b) for b in site},
        n_random=c.n_random,
        sampling=run.sampling(c.n_samples),
        seed=c.seed,
        path=run.path("evaluation.jsonl"),
        progress=run.progress,
    )
    evaluation.save(run.path("evaluation.json"))
    chains = len(evaluation.arms) * evaluation.n_tasks * evaluation.n_samples
    return {"chains": chains, "shown": [f"{e.behavior}/{e.kind}" for e in evaluation.effects if e.shown]}


def _report(run: Run) -> dict[str, Any]:
    from lensteer.report import render, summary

    results = load_results(run)
    write_atomically(run.path("summary.json"), json.dumps(summary(results), indent=1))
    write_atomically(run.path("report.html"), render(results))
    return {}


STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "traces": _traces,
    "annotate": _annotate,
    "vectors": _vectors,
    "attribute": _attribute,
    "select": _select,
    "evaluate": _evaluate,
    "report": _report,
}
