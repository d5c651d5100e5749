"""A run: what is asked of which model, in which folder, and what of it is done. Knows nothing of what a stage does."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from lensteer import models
from lensteer._version import __version__
from lensteer.directions import Recipe
from lensteer.errors import LensteerError
from lensteer.evaluation import Sampling
from lensteer.files import write_atomically
from lensteer.positions import PositionScope, everywhere, generated, onsets, sentence_starts, thinking
from lensteer.tasks import SPLITS, Task, load_tasks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SCOPES: dict[str, PositionScope] = {s.name: s for s in (everywhere, generated, thinking, onsets, sentence_starts)}
MANIFEST = "run.json"
ANNOTATORS = ("grammar", "rules", "classifier", "judge")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RunConfig:
    """What a run does. The defaults are the full run on the embedded organism.

    `chains` names a file of chains that are used instead of generating any: traces, or the published annotation format,
    whose labels the annotator is then held against. `n_nulls` control vectors of two kinds stand
    beside the scores by layer (0: none). `annotator` is one of `ANNOTATORS`; None is the grammar for the
    organism's tasks and the rules for all others. `classifier` is the file that `lensteer annotate fit` wrote.
    """

    model: str | None = None
    dtype: str = "float32"
    device: str | None = None
    tasks: str = "organism"
    chains: str | None = None
    annotator: str | None = None
    classifier: str | None = None
    n_train: int = 300
    n_dev: int = 100
    n_test: int = 200
    n_samples: int = 2
    temperature: float = 1.0
    max_new_tokens: int = 600
    batch_size: int = 256
    window: str = "onset"
    negatives: str = "spans"
    scope: str = "onsets"
    max_spans: int = 200
    doses: tuple[float, ...] = (0.15, 0.3, 0.45, 0.6, 0.8)
    min_parsed: float = 0.95
    n_random: int = 20
    n_nulls: int = 100
    seed: int = 0


DEMO = RunConfig(n_train=150, n_dev=30, n_test=50, n_samples=1, max_spans=100, doses=(0.15, 0.3, 0.45, 0.6))


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
        """Open a run's folder, or begin one. A new one is written to only once its model is loaded.

        Args:
            folder: of the run.
            config: what to do; None goes on with what the folder says.
            progress: show bars.

        Raises:
            LensteerError: the folder holds another run or something else, or nothing while no config is given; or a
                config that some stage would refuse.
        """
        folder = Path(folder)
        manifest = folder / MANIFEST
        if not manifest.exists():
            if config is None:
                raise LensteerError(f"{str(folder)!r} holds no run: begin one with `lensteer run`")
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise LensteerError(f"{str(folder)!r} is no run of lensteer: give a new or an empty folder")
            run = Run(folder, config, progress=progress)
            run.check()
            return run
        try:
            values = json.loads(manifest.read_text(encoding="utf-8"))
            stored = RunConfig(**{**values["config"], "doses": tuple(values["config"]["doses"])})
            run = Run(folder, stored, dict(values["stages"]), dict(values["model"]), progress)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LensteerError(f"{manifest} cannot be read ({error}): give another folder") from error
        if config is not None and config != stored:
            other = {k: v for k, v in asdict(stored).items() if asdict(config)[k] != v}
            raise LensteerError(
                f"{str(folder)!r} holds another run, with {other}: give another folder, or the same options"
            )
        return run

    @property
    def annotator(self) -> str:
        """The annotator's name: as asked for, or the one that fits the tasks."""
        return self.config.annotator or ("grammar" if self.config.tasks == "organism" else "rules")

    def check(self) -> None:
        """Refuse now what a stage would refuse only after hours.

        Raises:
            LensteerError: an unknown scope, window or kind of negatives, an impossible number, tasks that lack a split.
        """
        if self.config.scope not in SCOPES:
            raise LensteerError(f"no scope {self.config.scope!r}: choose one of {sorted(SCOPES)}")
        if self.annotator not in ANNOTATORS:
            raise LensteerError(f"no annotator {self.annotator!r}: choose one of {list(ANNOTATORS)}")
        if (self.annotator == "classifier") != (self.config.classifier is not None):
            raise LensteerError(
                f"annotator {self.annotator!r} with classifier={self.config.classifier!r}: 'classifier' needs the file "
                "that `lensteer annotate fit` wrote, and no other annotator takes one"
            )
        for path in filter(None, (self.config.chains, self.config.classifier)):
            if not Path(path).exists():
                raise LensteerError(f"no file {path!r}: give one that exists")
        if self.config.dtype not in DTYPES:
            raise LensteerError(f"no dtype {self.config.dtype!r}: choose one of {list(DTYPES)}")
        Recipe(self.config.window, self.config.negatives)
        self.sampling(self.config.n_samples)
        for split in SPLITS:
            self.tasks(split)

    def write(self) -> None:
        """Write the manifest."""
        values = {
            "lensteer": __version__,
            "config": asdict(self.config),
            "model": self.model_id,
            "stages": self.stages,
        }
        write_atomically(self.folder / MANIFEST, json.dumps(values, indent=1))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else on this machine works on the folder meanwhile.

        Raises:
            LensteerError: somebody does.
        """
        place = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]
        user = os.getuid() if hasattr(os, "getuid") else "user"  # each has locks of their own in a shared folder
        lock = FileLock(Path(tempfile.gettempdir()) / f"lensteer-{user}-{place}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise LensteerError(f"another process is at work on {str(self.folder)!r}: let it finish first") from error
        try:
            yield
        finally:
            lock.release()

    @cached_property
    def model(self) -> TransformerBridge:
        """The run's model, checked against the one the run began with."""
        model = models.load_model(self.config.model, dtype=getattr(torch, self.config.dtype), device=self.config.device)
        found = models.fingerprint(model)
        if not self.model_id:
            self.model_id = found.to_dict()
            self.write()
        elif found.differences(self.model_id):
            raise LensteerError(
                f"{str(self.folder)!r} was begun with model {self.model_id['name']!r}; {found.name!r} differs from "
                f"it in {found.differences(self.model_id)}: give that model or another folder"
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
