"""A run: its settings, its model, its folder, and the stages that are done."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from lensteer import models
from lensteer._version import __version__
from lensteer.annotation import Judge, SentenceClassifier, check_labels
from lensteer.arguments import typed
from lensteer.behaviors import BEHAVIORS, STEERED, check_behavior
from lensteer.contrast import load_pairs
from lensteer.distributed import ActorOptions, Actors
from lensteer.errors import LensteerError
from lensteer.evaluation import GRAMMAR_MARGINS, Margins
from lensteer.evaluation.conditions import Measure
from lensteer.files import digest, read_json, write_json
from lensteer.generation import Engine
from lensteer.generation.jobs import Sampling
from lensteer.generation.parallel import Pool
from lensteer.pipeline.own import digest_of, file_of, is_own, load_own, try_annotator, try_measure
from lensteer.positions import (
    PositionScope,
    everywhere,
    everywhere_but_first,
    generated,
    onsets,
    sentence_starts,
    thinking,
)
from lensteer.results import reading, revived
from lensteer.steering.plans import check_unit
from lensteer.tasks import SPLITS, Task, load_tasks
from lensteer.transcripts import has_labels
from lensteer.vectors import Recipe

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SCOPES: dict[str, PositionScope] = {
    s.name: s for s in (everywhere, everywhere_but_first, generated, thinking, onsets, sentence_starts)
}
MANIFEST = "run.json"
ANNOTATORS = ("grammar", "rules", "classifier", "judge")


#: Counts of a run: the least of each, and the most of all.
_LEAST = dict(
    n_train=0, n_dev=2, n_test=2, n_samples=1, dev_samples=1, control_samples=1, train_tokens=1, max_new_tokens=1,
    batch_size=1, max_spans=1, score_chains=1, quality=0, n_controls=0, n_score_controls=0,
)  # fmt: skip
MOST = 10**6


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run. The defaults are for a language model; `ORGANISM` and `DEMO` are for the organism.

    Where defaults were compared with others, it was on mini-R1, a SmolLM2-135M that thinks like R1: docs/choices.md has
    the figures for `layers`, `n_train`, `window`, `negatives`, `scope` and `score_coefficient`, and
    `analyses/unit_of_coefficients.py` those for `unit`. The rest were not compared: sizes are what a run of an hour
    or two on two cores allows, and `coefficients` are around those that full runs chose there (1 to 2).

    Attributes:
        model: a checkpoint; None is the embedded organism.
        dtype: of weights and activations.
        device: where it runs.
        device_map: of Hugging Face, such as "auto", to spread it over devices; instead of `device`.
        revision: of a checkpoint on the hub.
        tasks: "builtin", "organism", or a file of tasks or of a benchmark, as `load_tasks` takes it.
        chains: files of chains to use instead of generating any: traces, or the published annotation format. Their
            labels are kept, and the vectors are fitted on them.
        pairs: a file of contrastive pairs, or the name of a written set, to fit the vectors on instead of on chains;
            `behaviors` are then by default the concepts that the pairs name. See `load_pairs`.
        pair_format: of that file; None: detected from the first entry.
        annotators: for generated text: of `ANNOTATORS`, or FILE.py:NAME for your own; the first one is tested. () is
            the default: the grammar for the organism's tasks; none with a measure and pairs or chains; with chains or
            labels or `classifier`, the classifier, then the rules if they cover the behaviors; else the rules.
        measure: FILE.py:NAME of a function from a trace to a number, higher for more of the behavior; if given, its
            mean is tested.
        classifier: the file that `lensteer annotate fit` wrote; without it "classifier" is fitted on the chains.
        behaviors: that are steered.
        layers: one for all behaviors, or one for each; () selects them by scores, or else the middle layer, which no
            score was ahead of beyond chance.
        n_train: tasks that chains are generated on. 25 annotated chains did as much as 100; a rare behavior takes more.
        n_dev: tasks that coefficients are chosen on.
        n_test: held-out tasks.
        n_samples: chains per held-out task and steered condition.
        dev_samples: chains per dev task and coefficient.
        control_samples: chains per held-out task and control vector.
        temperature: of all sampling.
        top_p: of all sampling: the smallest set of tokens with at least this probability.
        thought: how the model marks its thought, as in `load_model`.
        template: a file with its chat template, instead of the tokenizer's own.
        prefill: text that every chain begins with.
        system: the system prompt of every question that is put to the model, in every condition; pairs that have a
            system prompt keep theirs.
        train_tokens: maximum per training chain.
        max_new_tokens: maximum per chain of dev and held-out tasks.
        batch_size: chains per batch.
        window: positions that represent a span. "onset±3" against "spans" raised the four behaviors most at equal KL,
            twice as much as "span" against "all".
        negatives: what a behavior is contrasted with.
        scope: positions that are steered. At equal KL "onsets" do somewhat more, but need 3 to 4 times the coefficient,
            and the text of one behavior broke; "everywhere" is ahead by .004 [-.000, .009].
        unit: what coefficient 1 means; see `SteeringPlan`.
        max_spans: sentences per behavior for scores by layer.
        score_chains: chains that these sentences are taken from.
        score_coefficient: of the scores: small, because at large ones every layer saturates. Ranks from .1 to 2 predict
            effects about as well (Spearman .53 to .58).
        coefficients: coefficients to try, with both signs.
        margins: limits for the text of a condition, "text" or "grammar".
        quality: number of chains per condition whose likelihood is measured; half as many per coefficient.
        n_controls: control vectors per pool and layer.
        kl_controls: also as many of each pool that spend the edit's KL instead of having its length: twice the chains.
        coherence: have a judge score the coherence of `quality` chains per condition, from 0 to 100.
        n_score_controls: control vectors of each of two kinds for the scores by layer; 0 for none.
        seed: of all randomness.

    Raises:
        LensteerError: a setting of another type, an unknown name, or a number that no run could have.
    """

    model: str | None = None
    dtype: str = "float32"
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    tasks: str = "builtin"
    chains: tuple[str, ...] = ()
    pairs: str | None = None
    pair_format: str | None = None
    annotators: tuple[str, ...] = ()
    measure: str | None = None
    classifier: str | None = None
    behaviors: tuple[str, ...] = STEERED
    layers: tuple[int, ...] = ()
    n_train: int = 300
    n_dev: int = 50
    n_test: int = 50
    n_samples: int = 8
    dev_samples: int = 1
    control_samples: int = 2
    temperature: float = 0.8
    top_p: float = 1.0
    thought: str = "auto"
    template: str | None = None
    prefill: str = ""
    system: str = ""
    train_tokens: int = 600
    max_new_tokens: int = 140
    batch_size: int = 200
    window: str = Recipe.window
    negatives: str = Recipe.negatives
    scope: str = "generated"
    unit: str = "difference"
    max_spans: int = 100
    score_chains: int = 24
    score_coefficient: float = 0.5
    coefficients: tuple[float, ...] = (0.75, 1.0, 1.5, 2.0)
    margins: str = "text"
    quality: int = 50
    n_controls: int = 20
    kl_controls: bool = False
    coherence: bool = False
    n_score_controls: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        typed(self)
        if self.scope not in SCOPES:
            raise LensteerError(f"no scope {self.scope!r}: choose one of {sorted(SCOPES)}")
        if self.dtype not in models.DTYPES:
            raise LensteerError(f"no dtype {self.dtype!r}: choose one of {list(models.DTYPES)}")
        if self.margins not in ("text", "grammar"):
            raise LensteerError(f"no margins {self.margins!r}: choose 'text', or 'grammar' for the organism's chains")
        for name in ("annotators", "behaviors"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise LensteerError(f"{name} {list(getattr(self, name))}: give each once")
        if not self.behaviors or len(self.layers) not in (0, 1, len(self.behaviors)):
            raise LensteerError(
                f"layers {list(self.layers)} for behaviors {list(self.behaviors)}: give at least one behavior, and one "
                "layer for all or one for each"
            )
        if not self.coefficients or any(not 0 < trial < math.inf for trial in self.coefficients):
            raise LensteerError(
                f"coefficients {list(self.coefficients)}: give positive, finite coefficients; both signs are tried"
            )
        for name, least in _LEAST.items():
            if not least <= getattr(self, name) <= MOST:
                raise LensteerError(f"{name}={getattr(self, name)}: give a number from {least} to {MOST:,}")
        if not 0 <= self.seed < 2**63:
            raise LensteerError(f"seed={self.seed}: give a number from 0 to {2**63 - 1}")
        if not (math.isfinite(self.score_coefficient) and self.score_coefficient):
            raise LensteerError(f"score_coefficient={self.score_coefficient}: give a finite number that is not 0")
        models.named_marks(self.thought)
        check_unit(self.unit)
        Recipe(self.window, self.negatives)
        Sampling(self.n_samples, self.temperature, top_p=self.top_p)


#: The organism has sentences of five or six tokens. Steering every token breaks them, so only the tokens that begin one
#: are steered, along vectors that are read there (`analyses/LOG.md`, 2026-11-21 and 2026-11-26).
ORGANISM = RunConfig(
    tasks="organism",
    window="onset",
    negatives="spans",
    scope="onsets",
    margins="grammar",
    temperature=1.0,
    n_dev=100,
    n_test=100,
    n_samples=4,
    control_samples=1,
    train_tokens=600,
    max_new_tokens=600,
    max_spans=200,
    score_chains=300,
    score_coefficient=1.0,
    coefficients=(0.25, 0.5, 1.0, 1.5),
    n_score_controls=100,
    batch_size=256,
)
DEMO = replace(
    ORGANISM,
    n_train=150,
    n_dev=60,
    n_test=50,
    n_samples=1,
    max_spans=100,
    score_chains=60,
    coefficients=(0.3, 0.6, 1.0),
    n_controls=5,
)


#: The demo on a language model: two behaviors, with enough chains to detect a rise, but too few for a fall of a rare
#: one.
DEMO_REAL = replace(
    RunConfig(),
    dtype="bfloat16",
    behaviors=("adding-knowledge", "uncertainty-estimation"),
    n_train=40,
    train_tokens=300,
    n_dev=20,
    n_samples=2,
    control_samples=1,
    quality=30,
    n_controls=5,
    n_score_controls=0,
    score_chains=10,
    max_spans=20,
    coefficients=(0.75, 1.0, 1.5),
    max_new_tokens=100,
)


def loading_options(config: Any) -> dict[str, Any]:
    """The arguments of `load_model` that a config holds."""
    names = ("dtype", "device", "device_map", "revision", "thought", "template")
    return {name: getattr(config, name) for name in names}


@dataclass
class Run:
    """A run's folder, open.

    Attributes:
        folder: of the run.
        config: its settings.
        stages: facts on those that are done.
        model_id: the identity of the model.
        notes: warnings for the report.
        files: digests of the user's own files, so that a changed one is noticed.
        progress: show bars.
        announce: called with lines on what is done.
        pool: what runs the model's batches, if not this process; see `on_actors`.
        engine: what writes the chains that vectors are fitted on, if not the model.
    """

    folder: Path
    config: RunConfig
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    model_id: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    progress: bool = False
    announce: Callable[[str], object] = field(default=lambda line: None, repr=False, compare=False)
    pool: Pool | None = field(default=None, repr=False, compare=False)
    engine: Engine | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def open(folder: str | Path, config: RunConfig | None = None, *, progress: bool = False) -> Run:
        """Open a run's folder, or begin one. A new folder is written to only after its model is loaded.

        Args:
            folder: of the run.
            config: settings; None continues with those in the folder.
            progress: show bars.

        Raises:
            LensteerError: the folder holds another run or something else, or is empty and no config is given; a config
                that some stage would reject; or a changed file of pairs or user functions.
        """
        folder = Path(folder)
        if config is not None and config.pairs is not None and config.behaviors == STEERED:
            config = replace(config, behaviors=_pair_labels(config))
        manifest = folder / MANIFEST
        if not manifest.exists():
            if config is None:
                raise LensteerError(f"{str(folder)!r} holds no run: begin one with `lensteer run`")
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise LensteerError(f"{str(folder)!r} is no run of lensteer: give a new or an empty folder")
            run = Run(folder, config, progress=progress)
            run.check()
            run.files = {str(path): digest_of(path) for path in run.own_files}
            return run
        values = read_json(manifest)
        with reading(manifest, "give another folder"):
            found = dict(values["config"])
        if "unit" not in found and "coefficients" in found:
            raise LensteerError(
                f"{str(folder)!r} was begun by lensteer {values.get('lensteer')}, whose coefficients were "
                "multiples of the mean activation's length: begin a new run"
            )
        with reading(manifest, "give another folder"):
            stored: RunConfig = revived(RunConfig, found)
            stages = revived(dict[str, dict[str, Any]], values["stages"])
            model_id, notes = revived(dict[str, Any], values["model"]), revived(tuple[str, ...], values["notes"])
            run = Run(folder, stored, stages, model_id, list(notes))
            if model_id:
                revived(models.ModelId, model_id)
            if odd := [name for name in stored.annotators if name not in ANNOTATORS and not is_own(name)]:
                raise ValueError(f"no annotator {odd[0]!r}")
            run.files, run.progress = revived(dict[str, str], values.get("files", {})), progress
        if config is not None and config != stored:
            other = {k: v for k, v in asdict(stored).items() if asdict(config)[k] != v}
            raise LensteerError(
                f"{str(folder)!r} holds another run, with {other}: give another folder, or the same options"
            )
        for path, known in run.files.items():
            if Path(path).is_file() and digest_of(path) != known:
                raise LensteerError(
                    f"{path!r} has changed since {str(folder)!r} was begun: give another folder, or the file as it was"
                )
        return run

    @property
    def annotators(self) -> tuple[str, ...]:
        """Names of the annotators: as configured, or the default for the tasks."""
        if self.config.annotators:
            return self.config.annotators
        if self.config.tasks == "organism":
            return ("grammar",)
        if self.config.measure and (self.config.pairs or self.config.chains):
            return ()
        if self.config.classifier or self._labeled:
            return ("classifier", "rules") if set(self.config.behaviors) <= set(BEHAVIORS) else ("classifier",)
        return ("rules",)

    @cached_property
    def _labeled(self) -> bool:
        """Whether the given chains have labels; once the run has its copy, the files may be gone."""
        copy = self.path("traces.jsonl")
        return any(map(has_labels, [copy] if self.config.chains and copy.exists() else self.config.chains))

    @property
    def own_files(self) -> list[Path]:
        """Files of the user's functions, pairs and chat template.

        Raises:
            LensteerError: no such file.
        """
        c = self.config
        named = [name for name in (*c.annotators, c.measure) if name is not None and is_own(name)]
        given = [Path(path) for path in (c.pairs, c.template) if path is not None and Path(path).is_file()]
        return [*given, *map(file_of, named)]

    @cached_property
    def measure(self) -> Measure | None:
        """The user's measure, if there is one.

        Raises:
            LensteerError: it cannot be loaded.
        """
        return None if self.config.measure is None else load_own(self.config.measure)

    @property
    def margins(self) -> Margins:
        """Limits for the text of a condition."""
        return GRAMMAR_MARGINS if self.config.margins == "grammar" else Margins()

    def note(self, text: str) -> None:
        """Keep a warning for the report."""
        if text not in self.notes:
            self.notes.append(text)

    def check(self) -> None:
        """Check everything up front that a stage would reject only after hours.

        Raises:
            LensteerError: an unknown annotator, a missing file, tasks that lack a split, or pairs or user functions
                that cannot be used.
        """
        c = self.config
        self._check_pairs()
        for name in self.annotators:
            if name not in ANNOTATORS and not is_own(name):
                raise LensteerError(
                    f"no annotator {name!r}: choose from {list(ANNOTATORS)}, or write FILE.py:NAME for your own"
                )
        if "classifier" in self.annotators and not c.classifier and not c.chains:
            raise LensteerError(
                "annotator 'classifier' without chains to fit it on: give --chains with labels, or --classifier with "
                "the file that `lensteer annotate fit` wrote"
            )
        if c.classifier is not None and "classifier" not in self.annotators:
            raise LensteerError(
                f"annotators {list(self.annotators)} with classifier={c.classifier!r}: only 'classifier' takes the "
                "file that `lensteer annotate fit` wrote"
            )
        if "judge" in self.annotators or c.coherence:
            Judge()  # raises where its settings lack something
        for path in filter(None, (*c.chains, c.classifier)):
            if not Path(path).is_file():
                raise LensteerError(f"no file {path!r}: give one that exists")
        if c.classifier is not None:
            SentenceClassifier.load(c.classifier)
        if {"grammar", "rules"}.intersection(self.annotators) and not (c.measure and (c.pairs or c.chains)):
            for label in c.behaviors:
                check_behavior(label, BEHAVIORS)
        for split in SPLITS[1:] if c.pairs else SPLITS:
            self.tasks(split)
        self._check_own()

    def _check_pairs(self) -> None:
        """Check pairs, options that go with them, and how their effect is measured."""
        c = self.config
        if c.pairs is not None:
            if c.chains:
                raise LensteerError(
                    f"pairs {c.pairs!r} and chains {list(c.chains)}: vectors are fitted on one or the other, give one"
                )
            if not c.measure and not c.annotators:
                raise LensteerError(
                    f"pairs {c.pairs!r} without a measure: give --measure FILE.py:NAME, a function that scores what "
                    "the model writes, or an --annotator with these labels"
                )
            labels = list(_pair_labels(c))
            if odd := [label for label in c.behaviors if label not in labels]:
                raise LensteerError(f"behaviors {odd} are not in the pairs {c.pairs!r}, which have {labels}")
        elif c.pair_format is not None:
            raise LensteerError(f"pair_format={c.pair_format!r} without pairs: give --pairs, too")

    def _check_own(self) -> None:
        """Test each of the user's functions on a made-up chain."""
        c, task = self.config, self.tasks("test")[0]
        for name in filter(is_own, self.annotators):
            if c.measure is None:
                check_labels(load_own(name), c.behaviors)
            try_annotator(name, task)
        if c.measure is not None:
            try_measure(c.measure, task)

    def write(self) -> None:
        """Write the manifest."""
        values = {
            "lensteer": __version__,
            "config": asdict(self.config),
            "model": self.model_id,
            "stages": self.stages,
            "notes": self.notes,
            **({"files": self.files} if self.files else {}),
        }
        write_json(self.folder / MANIFEST, values)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other processes on this machine; remove what a kill left of an unfinished write.

        Raises:
            LensteerError: another process holds the lock.
        """
        place = digest(str(self.folder.resolve()).encode())
        user = os.getuid() if hasattr(os, "getuid") else "user"  # each user has separate locks in a shared folder
        lock = FileLock(Path(tempfile.gettempdir()) / f"lensteer-{user}-{place}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise LensteerError(f"another process is at work on {str(self.folder)!r}: let it finish first") from error
        try:
            for left in self.folder.glob("*.[0-9]*.tmp"):  # of `write_atomically`
                left.unlink()
            yield
        finally:
            lock.release()

    @cached_property
    def model(self) -> TransformerBridge:
        """The run's model, checked against the one the run began with, and for whether it takes the system prompt."""
        options = loading_options(self.config)
        if self.pool is not None:  # here it serves for its tokenizer and its embeddings: GPUs are for the pool
            options |= dict(device="cpu", device_map=None)
        model = models.load_model(self.config.model, **options)
        if self.config.system:  # before anything is written
            models.chat_text(model, self.tasks("test")[0].prompt, system=self.config.system)
        for layer in self.config.layers:
            models.check_layer(model, layer)
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
        """The run's tasks of a split.

        Raises:
            LensteerError: there are fewer than requested.
        """
        n = {"train": self.config.n_train, "dev": self.config.n_dev, "test": self.config.n_test}[split]
        found = load_tasks(self.config.tasks, split=split, n=n)
        if len(found) < n and not (split == "train" and self.config.chains):
            raise LensteerError(
                f"{n} tasks of split {split!r} of {self.config.tasks!r}, which has {len(found)}: ask for --n-{split} "
                f"{len(found)}, or give more tasks"
            )
        return found

    @contextmanager
    def on_actors(self, options: ActorOptions) -> Iterator[None]:
        """Run batches of the model on Ray actors inside the `with`: chains, sums of activations, scores by layer.

        Raises:
            LensteerError: as `distributed.Actors`.
        """
        c = self.config
        actors = Actors(c.model, loading_options(c), options, self.announce)
        self.pool = actors
        try:
            with actors, actors.serving(self.model):  # connect before a new run's folder is written
                yield
        finally:
            self.pool = None

    def sampling(self, n_samples: int) -> Sampling:
        """The run's sampling settings."""
        c = self.config
        return Sampling(
            n_samples,
            c.temperature,
            c.seed,
            c.max_new_tokens,
            c.batch_size,
            top_p=c.top_p,
            prefill=c.prefill,
            system=c.system,
        )

    def path(self, name: str) -> Path:
        """Path of an artifact."""
        return self.folder / name


def _pair_labels(config: RunConfig) -> tuple[str, ...]:
    """The concepts that the run's pairs name, in their order."""
    assert config.pairs is not None
    return tuple(dict.fromkeys(pair.label for pair in load_pairs(config.pairs, config.pair_format)))
