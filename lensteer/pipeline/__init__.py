"""A run on disk: its folder (`run`), chains and annotators (`chains`), stages (`stages`), cache vectors (`cache`).

The user's own functions are loaded in `own`; the plans that a run evaluated, in `plans`.
"""

from lensteer.pipeline.cache import CacheFit, CacheRun, cache_fit, cache_run
from lensteer.pipeline.chains import annotators_of, fit_annotator, read_chains, with_masks
from lensteer.pipeline.plans import evaluated_plan
from lensteer.pipeline.run import ANNOTATORS, DEMO, DEMO_REAL, MANIFEST, ORGANISM, SCOPES, Run, RunConfig
from lensteer.pipeline.stages import STAGES, complete, load_results, render_report, run_stage

__all__ = [
    "ANNOTATORS",
    "DEMO",
    "DEMO_REAL",
    "MANIFEST",
    "ORGANISM",
    "SCOPES",
    "STAGES",
    "CacheFit",
    "CacheRun",
    "Run",
    "RunConfig",
    "annotators_of",
    "cache_fit",
    "cache_run",
    "complete",
    "evaluated_plan",
    "fit_annotator",
    "load_results",
    "read_chains",
    "render_report",
    "run_stage",
    "with_masks",
]
