"""A run on disk: its folder and manifest (`run`), its stages (`stages`), and reading it back (`results`)."""

from lensteer.pipeline.results import load_results
from lensteer.pipeline.run import DEMO, SCOPES, Run, RunConfig
from lensteer.pipeline.stages import STAGES, complete, run_stage

__all__ = ["DEMO", "SCOPES", "STAGES", "Run", "RunConfig", "complete", "load_results", "run_stage"]
