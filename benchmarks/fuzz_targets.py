"""What `fuzz.py` feeds: readers, what is then done with a value that was read, and valid inputs.

What was read is used as its user would: vectors and plans steer the organism and are exported again, chains are
annotated and run, results are plotted, and a run's folder makes its report.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import lensteer as ls
from lensteer.activations import stream_features
from lensteer.annotation import SentenceClassifier, fit_classifier
from lensteer.annotation.alignment import align
from lensteer.annotation.judge_questions import parse_reply, parse_score
from lensteer.annotation.published import parse_published, read_published
from lensteer.annotation.splitting import split_sentences
from lensteer.attribution import LayerScores
from lensteer.attribution.overlap import EmbeddingOverlap
from lensteer.attribution.selection import SelectedLayers
from lensteer.evaluation import ChosenCoefficients, Evaluation
from lensteer.export.control_vectors import ControlVector, read_control_vector
from lensteer.export.plan_files import CONFIG, VECTORS, PlanFile, read_plan
from lensteer.expressions import parse_scope
from lensteer.files import SEAL, read_tensors
from lensteer.models import fingerprint
from lensteer.pipeline import ORGANISM, complete, evaluated_plan, load_results
from lensteer.pipeline.run import MANIFEST, Run
from lensteer.planner import plan_run, shape_of
from lensteer.report import render
from lensteer.results import Result, Saved
from lensteer.statistics import Estimate
from lensteer.steering import Plan
from lensteer.steering.cache import CacheVector
from lensteer.steering.evidence import ControlRange, Evidence, Sample, TextMeasure
from lensteer.tasks.grading import final_answer
from lensteer.traces import Trace, load_traces, save_traces
from lensteer.transcripts import read_transcripts
from lensteer.vectors import BehaviorVectors, Recipe
from lensteer.vectors.geometry import cosine_matrix

SIX = ["One.", "Wait, no.", "Two.", "Maybe.", "For example, 3.", "So 4."]
CHAIN = "First, 2 + 2. Wait, no: it is 5.\nMaybe it is 4. For example, 3."
#: A run of the organism that takes half a minute, and its files that a report is made of.
SMALL = replace(
    ORGANISM, n_train=48, n_dev=4, n_test=3, n_samples=1, train_tokens=100, max_new_tokens=300, batch_size=16,
    max_spans=4, coefficients=(0.2,), n_controls=2, n_score_controls=3,
)  # fmt: skip
FILES = (
    MANIFEST, "annotated.jsonl", "annotator.json", "examples.jsonl", "overlap.json", "scores.json", "controls.json",
    "layers.json", "coefficients.json", "evaluation.json", "plan.json",
)  # fmt: skip
#: Kinds of results that a run's folder has files of.
KINDS: tuple[type[Saved], ...] = (EmbeddingOverlap, LayerScores, SelectedLayers, ChosenCoefficients, Evaluation)
SUFFIX = {"vectors": ".safetensors", "gguf": ".gguf", "traces": ".jsonl", "tasks": ".jsonl", "pairs": ".jsonl"}
SUFFIX |= {"texts": ".jsonl", "published": ".jsonl"}


@dataclass(frozen=True)
class Target:
    """A reader, and inputs for it.

    Attributes:
        read: the reader of a file.
        seeds: valid inputs.
        use: what is done with a value that was read.
        every: inputs of other targets for one of this, which takes longer.
        named: whether a refusal names the file.
    """

    read: Callable[[Path], Any]
    seeds: Sequence[bytes]
    use: Callable[[Any], object] = repr
    every: int = 1
    named: bool = True


@cache
def organism() -> Any:
    """The model that what was read is used with."""
    return ls.load_model()


def text(read: Callable[[str], object], seeds: Sequence[str]) -> Target:
    """A reader of text, which bytes that are no UTF-8 become."""
    return Target(
        lambda path: read(path.read_bytes().decode("utf-8", "replace")), [*map(str.encode, seeds)], named=False
    )


def without_digest(data: bytes) -> bytes:
    """The same JSON without the digest, which would refuse most damages before the reader sees them."""
    return re.sub(rb',\s*"' + SEAL.encode() + rb'": "\w*"', b"", data)


def _align(text: str) -> object:
    chain, *parts = text.split("\n")
    sentences = [ls.Sentence(ls.BEHAVIORS[i % len(ls.BEHAVIORS)], part) for i, part in enumerate(parts)]
    return align(sentences, chain, range(len(chain)), prompt_length=3)


def _plan(name: str, folder: Path) -> Callable[[Path], object]:
    """Reads a plan's folder in which one file is the given one; its settings have the right digest of the tensors."""
    settings = json.loads(without_digest((folder / CONFIG).read_bytes()))

    def read(path: Path) -> object:
        data = path.read_bytes()
        (folder / name).write_bytes(data)
        if name == VECTORS:
            (folder / CONFIG).write_text(json.dumps({**settings, "sha256": hashlib.sha256(data).hexdigest()}))
        return read_plan(folder)

    return read


def _placed(name: str, folder: Path, read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Reads a folder in which a file is the given one."""

    def read_there(path: Path) -> object:
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
        return read(folder)

    return read_there


def _steer(plan: Plan) -> None:
    """One steered token of the organism."""
    ls.generation.forced_logits(organism(), [[1, 2, 3]], [[4, 5]], plans=[plan])


def _use_vectors(scratch: Path, vectors: BehaviorVectors) -> None:
    vectors.to_dataframe()
    vectors.plot()
    cosine_matrix(vectors, vectors.layers[0])
    vectors.save(scratch / "again.safetensors")
    for direction in vectors.values():
        for unit in ("difference", "mean_norm"):
            _steer(ls.SteeringPlan(direction, vectors.layers[-1], 1.0, unit=unit))
    vectors.check_model(organism())


def _use_plan(scratch: Path, found: PlanFile) -> None:
    shutil.rmtree(scratch / "again", ignore_errors=True)
    ls.export.folder(found.plan, scratch / "again", model=found.model)
    _steer(found.plan)
    found.check_model(organism())


def _use_control_vector(scratch: Path, found: ControlVector) -> None:
    found.check_model(organism())
    _steer(found.plan())
    ls.export.gguf(found.plan(), scratch / "again.gguf")


def _use_traces(scratch: Path, traces: Sequence[Trace]) -> None:
    for trace in traces:
        trace.thinking, trace.answer, trace.correct, trace.closed  # noqa: B018  # properties that compute
        ls.plots.chain_html(trace)
    save_traces(ls.annotate(traces, ls.rules), scratch / "again.jsonl")
    list(stream_features(organism(), traces, windows=("onset", "span")))


def _use_cache_vector(vector: CacheVector) -> None:
    vector.random(0), vector.controls(1)
    _steer(ls.CachePlan(vector, 1.0, 0.5))
    vector.check_model(organism())


def _read_result(path: Path) -> Saved:
    named = re.search(rb'"kind": "(\w+)"', path.read_bytes())
    return {each.__name__: each for each in KINDS}.get("" if named is None else named[1].decode(), Evidence).load(path)


def _use_result(result: Result) -> None:
    repr(result), result.to_dict()  # type: ignore[attr-defined]  # all kinds here are saved
    with suppress(ls.LensteerError):  # some kinds have no figure
        result.plot()


def _use_run(run: Run) -> None:
    render(load_results(run))
    evaluated_plan(run, run.config.behaviors[0])


def targets(scratch: Path, *, runs: bool = True) -> dict[str, Target]:
    """All targets; `scratch` is for files that they read. Without `runs`, those of a run's folder are left out."""
    found = _text_targets(scratch) | _vector_targets(scratch) | _chain_targets(scratch)
    return found | (_run_targets(scratch) if runs else {})


def _text_targets(scratch: Path) -> dict[str, Target]:
    replies = [
        '{"labels": [{"n": 1, "label": "deduction"}, {"n": 2, "label": "backtracking"}]}',
        "1. deduction\n2. backtracking\n3: uncertainty-estimation",
        '["deduction"] One. ["end-section"] ["backtracking"] Wait, no. ["end-section"]',
        "I think so. Score: 85/100",
    ]
    answers = [
        "So it is \\boxed{\\frac{1}{2}}.",
        "She makes $18 every day.\n#### 18",
        "The answer is (B), 1,200 apples.",
    ]
    shape = dict(num_attention_heads=4, num_hidden_layers=3, hidden_size=8, intermediate_size=16, vocab_size=99)
    pairs = [
        {"prompt": "Hi", "positive": "Hello, dear friend.", "negative": "What."},
        {"prompt": "Hm?", "positive": "Gladly.", "negative": "No."},
    ]
    return {
        "annotations": text(parse_published, [replies[2], CHAIN]),
        "alignment": text(_align, [CHAIN, f"{CHAIN}\n{CHAIN}"]),
        "sentences": text(split_sentences, [CHAIN, "a. b! $x = 1.5$ (c.) d...\n\n* e"]),
        "judge": text(lambda said: (parse_reply(said, SIX), parse_score(said)), replies),
        "scopes": text(parse_scope, ["onsets & first(8)", "~(thinking | at([1, 2]))", "sentence_starts"]),
        "answers": text(
            lambda said: [final_answer(said, g, question="How many?") for g in ("numeric", "choice", "exact")], answers
        ),
        "shapes": Target(
            _placed("config.json", scratch / "shape", lambda at: shape_of(str(at))),
            [json.dumps(shape).encode()],
            lambda found: repr(plan_run(found, ORGANISM)),
        ),
        "pairs": Target(
            ls.load_pairs,
            ["\n".join(map(json.dumps, pairs)).encode(), b"".join(json.dumps(p).encode() + b"\n" for p in pairs[:1])],
        ),
    }


def _vector_targets(scratch: Path) -> dict[str, Target]:
    model = fingerprint(organism())
    raw = torch.randn((2, 2, model.d_model), generator=torch.Generator().manual_seed(0))
    counts = {"backtracking": 3, "deduction": 4}
    vectors = BehaviorVectors(
        raw, torch.ones(2), tuple(counts), (1, 3), counts, 5, Recipe(), {"model": model.to_dict(), "site": "resid_post"}
    )
    vectors.save(scratch / "vectors.safetensors")
    tensors, header = read_tensors(scratch / "vectors.safetensors")
    plain = save(tensors, {"lensteer": json.dumps(header)})
    plan = ls.SteeringPlan(vectors["backtracking"], 1, 2.0, ls.everywhere)
    gguf = ls.export.gguf(plan, scratch / "plan.gguf").read_bytes()
    share = Estimate(0.2, 0.1, 0.3, 9, 0)
    evidence = Evidence(
        asdict(model), "backtracking", 1, 1, 2.0, "difference", plan.length, "everywhere", "sentences", "rules", 9, 1,
        share, share, share, None, 0.01, (ControlRange("isotropic", 5, -0.1, 0.1, 1),), "more", True,
        (TextMeasure("nll", 2.0, 1.9, 2.5, True),), share, share, (Sample("t-1", "a", "b"),), {"temperature": 0.8}, "0",
    )  # fmt: skip
    evidence.save(scratch / "evidence.json")
    plan = replace(plan, evidence=evidence)
    gated = replace(plan, gate=ls.Gate(0.1), schedule=ls.Schedule.half_life(8.0), scope=ls.onsets & ls.first(9))
    plans = []
    for name, each in (("plain", plan), ("gated", gated)):
        made = ls.export.folder(each, scratch / name, model=model)
        plans.append(without_digest((made / CONFIG).read_bytes()))
    heads = (model.n_layers, int(organism().cfg.n_key_value_heads), int(organism().cfg.d_head))
    origin = {"n_pairs": 3, "model": model.to_dict(), "norms": {"keys": 3.0, "values": 2.0}}
    cached = CacheVector("steps", torch.ones(heads), torch.ones(heads), "last_prompt", origin)
    cached.save(scratch / "cache.safetensors")
    tensors, facts = read_tensors(scratch / "cache.safetensors", "cache_vector", "cache vector")
    plain_cached = save(tensors, {"cache_vector": json.dumps(facts)})
    return {
        "vectors": Target(
            BehaviorVectors.load,
            [(scratch / "vectors.safetensors").read_bytes(), plain],
            partial(_use_vectors, scratch),
            every=4,
        ),
        "plan settings": Target(_plan(CONFIG, scratch / "plain"), plans, partial(_use_plan, scratch), every=4),
        "plan tensors": Target(
            _plan(VECTORS, scratch / "gated"),
            [(scratch / "gated" / VECTORS).read_bytes()],
            partial(_use_plan, scratch),
            every=4,
        ),
        "gguf": Target(read_control_vector, [gguf], partial(_use_control_vector, scratch)),
        "cache vector": Target(
            CacheVector.load,
            [(scratch / "cache.safetensors").read_bytes(), plain_cached],
            _use_cache_vector,
            every=4,
        ),
        "evidence": Target(_read_result, [without_digest((scratch / "evidence.json").read_bytes())]),
    }


def _chain_targets(scratch: Path) -> dict[str, Target]:
    task = ls.Task("t-1", "math", "dev", "How many?", "18", "numeric")
    span = ls.Span("deduction", 4, 7, 0, 12)
    ids = (1, 2, 3), (4, 5, 6, 7), (0, 4, 8, 12)
    trace = ls.Trace(task, "How many?", "Wait, it is 18.", *ids, finished=True, spans=(span,))
    save_traces([trace, replace(trace, sample=1)], scratch / "traces.jsonl")
    traces = (scratch / "traces.jsonl").read_bytes()
    texts = [{"prompt": f"{i} + 2?", "response": f"<think>\n{CHAIN} So {i}.\n</think>\n\n{i}"} for i in range(6)]
    (scratch / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    labeled = ls.annotate(read_transcripts(scratch / "texts.jsonl"), ls.rules)
    fit_classifier(labeled).save(scratch / "classifier.safetensors")
    published = [{**texts[0], "annotated": '["deduction"] First, 2 + 2. ["end-section"]'}]
    return {
        "traces": Target(load_traces, [traces, without_digest(traces)], partial(_use_traces, scratch)),
        "tasks": Target(
            lambda path: ls.load_tasks(path),
            [
                json.dumps(asdict(task)).encode() + b"\n",
                b'{"question": "2+2?", "answer": "It is 4.\\n#### 4"}\n{"question": "3?", "answer": "#### 3"}\n',
            ],
        ),
        "classifier": Target(
            SentenceClassifier.load,
            [(scratch / "classifier.safetensors").read_bytes()],
            lambda classifier: classifier(labeled[:1]),
        ),
        "texts": Target(read_transcripts, [(scratch / "texts.jsonl").read_bytes()]),
        "published": Target(read_published, [json.dumps(row).encode() for row in published]),
    }


def _run_targets(scratch: Path) -> dict[str, Target]:
    """The files of a finished run, each damaged alone: read as results, and read for the report."""
    whole = scratch / "whole"
    complete(Run.open(whole, SMALL))
    written = {name: without_digest((whole / name).read_bytes()) for name in FILES}
    results = [data for name, data in written.items() if any(kind.__name__.encode() in data[:200] for kind in KINDS)]
    found = {"results": Target(_read_result, results, _use_result, every=5)}
    for name, data in written.items():
        folder = Path(shutil.copytree(whole, scratch / f"run-{name}"))
        found[f"run {name}"] = Target(_placed(name, folder, Run.open), [data], _use_run, every=80)
    return found
