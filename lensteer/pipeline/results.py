"""Everything that a run's report shows, read back from its folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from lensteer import organism
from lensteer.attribution import LayerScores
from lensteer.errors import LensteerError
from lensteer.evaluation import Doses, Evaluation
from lensteer.files import read_jsonl
from lensteer.geometry import cosine_matrix
from lensteer.overlap import EmbeddingOverlap
from lensteer.pipeline.caching import read_cache_run
from lensteer.pipeline.run import Run
from lensteer.report import Example, RunResults
from lensteer.selection import Site
from lensteer.traces import Trace, load_traces
from lensteer.vectors import BehaviorVectors

FULL_RUN = Path(organism.__file__).parent / "full_run.json"
"""The summary of the full run on the embedded model, committed with its weights."""


def load_results(run: Run) -> RunResults:
    """Everything that the report shows, read from a run's folder.

    Raises:
        LensteerError: an artifact is missing or cannot be read.
    """
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"))
    site = Site.load(run.path("site.json"))
    examples = tuple(
        Example(
            str(row["behavior"]),
            str(row["kind"]),
            Trace.from_dict(row["trace"], f"{run.path('examples.jsonl')}, line {number}"),
        )
        for number, row in read_jsonl(run.path("examples.jsonl"))
    )
    try:
        plan = json.loads(run.path("plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LensteerError(f"{run.path('plan.json')} cannot be read ({error}): do the stage 'select' again") from error
    reference = json.loads(FULL_RUN.read_text(encoding="utf-8")) if FULL_RUN.exists() else None
    if reference is not None and (
        reference["model.weights"] != run.model_id["weights"]
        or reference.get("evaluation.coefficient_unit") != run.config.unit
    ):
        reference = None  # another model's figures, or coefficients in another unit
    return RunResults(
        title=f"Steering {run.model_id['name']}",
        model=run.model_id,
        config=asdict(run.config),
        traces=load_traces(run.path("annotated.jsonl")),
        annotator=json.loads(run.path("annotator.json").read_text(encoding="utf-8")),
        alignment={k: run.stages["annotate"][k] for k in ("given", "matched", "repaired", "dropped", "unparsed")},
        vectors=vectors,
        overlap=EmbeddingOverlap.load(run.path("overlap.json")),
        scores=LayerScores.load(run.path("scores.json")),
        nulls=LayerScores.load(nulls) if (nulls := run.path("nulls.json")).exists() else None,
        site=site,
        cosine=cosine_matrix(vectors, site, default=site[next(iter(site))]),
        doses=Doses.load(run.path("doses.json")),
        evaluation=Evaluation.load(run.path("evaluation.json")),
        seconds={name: facts["seconds"] for name, facts in run.stages.items()},
        reference=reference,
        examples=examples,
        cache=read_cache_run(run.folder),
        plan=plan,
        notes=tuple(run.notes),
    )
