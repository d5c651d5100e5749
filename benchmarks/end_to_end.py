"""`lensteer run`, stage by stage, compared with the pattern of the published scripts, on the same model and tasks.

The published scripts run one chain at a time: each is generated, run again with all layers' residuals kept, and run
once per label and span of another label for its scores; then every held-out task is generated once unsteered and twice
per behavior, with a hook at every position. Here that is plain Hugging Face code with fused attention and a cache, on
lensteer's prompts and chains; a sample of the scores is timed and scaled up. Annotating costs both the same and is left
out.

`lensteer run` does more in its stages: coefficients on dev tasks, control vectors, a prompted baseline. So the last
stage is compared per chain, too. The model is the organism, whose grammar annotates both sides' chains.

Example: python benchmarks/end_to_end.py --cpu-time --json end-to-end.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import sides
import torch
from attribution import published_seconds
from peer_worker import window_sums
from sides import timed

import lensteer as ls
from lensteer.activations import Window
from lensteer.pipeline import DEMO, STAGES, Run, run_stage
from lensteer.traces import load_traces


@dataclass(frozen=True)
class Config:
    """Tasks of each split, sizes, threads, sampled scores of the published pattern, and the clock."""

    n_tasks: int = 50
    n_dev: int = 20
    n_test: int = 20
    n_controls: int = 2
    max_new_tokens: int = 300
    score_chains: int = 60
    threads: int = 1
    sampled_scores: int = 40
    cpu_time: bool = False


def published(config: Config, run: Run, folder: Path) -> dict[str, Callable[[], float]]:
    """The published pattern of each stage, on the run's own prompts and chains."""
    plain = sides.plain_model(folder, run.config.dtype)
    plain.generation_config.eos_token_id = sorted(ls.models.end_ids(run.model))
    traces = [trace for trace in load_traces(run.folder / "annotated.jsonl") if trace.spans]
    vectors = ls.BehaviorVectors.load(run.folder / "vectors.safetensors")
    drawn = dict(do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, max_new_tokens=run.config.max_new_tokens)

    def write(ids: tuple[int, ...]) -> None:
        each = torch.tensor([ids])
        plain.generate(each, attention_mask=torch.ones_like(each), **drawn)

    def generate() -> None:
        for trace in load_traces(run.folder / "traces.jsonl"):
            write(trace.prompt_ids)

    def collect() -> None:
        for trace in traces:
            found = plain(torch.tensor([trace.ids]), output_hidden_states=True).hidden_states
            windows = [Window.parse("published").bounds(span, len(trace.ids)) for span in trace.spans if span.start > 1]
            window_sums([layer[0] for layer in found[1:]], windows)

    def steer() -> None:
        tasks = run.tasks("test")
        texts = [ls.models.chat_text(run.model, task.prompt) for task in tasks]
        prompts = [tuple(ls.models.encode(run.model, text)) for text in texts]
        layer = max(vectors.layers) // 2
        for added in [None, *(sign * vectors[label].scaled(layer) for label in vectors.labels[:4] for sign in (-1, 1))]:
            handles = []
            if added is not None:
                block = plain.model.layers[layer]
                handles.append(block.register_forward_hook(lambda _m, _i, out, added=added: out + 0.3 * added))
            for ids in prompts:
                write(ids)
            for handle in handles:
                handle.remove()

    now = time.process_time if config.cpu_time else time.perf_counter
    scored = min(config.sampled_scores, sum(len(trace.spans) for trace in traces))
    return {
        "traces": timed(generate, config.cpu_time),
        "vectors": timed(collect, config.cpu_time),
        "attribute": lambda: published_seconds(run.model, traces, vectors, scored, now),
        "evaluate": timed(steer, config.cpu_time),
    }


def main(config: Config) -> dict[str, Any]:
    """Seconds of each stage on both sides, and of one chain of the last."""
    torch.set_num_threads(config.threads)
    sizes = dict(n_train=config.n_tasks, n_dev=config.n_dev, n_test=config.n_test, n_controls=config.n_controls)
    sizes |= dict(max_new_tokens=config.max_new_tokens, train_tokens=config.max_new_tokens)
    ours, theirs = {}, {}
    with tempfile.TemporaryDirectory() as made:
        run = Run.open(Path(made) / "run", replace(DEMO, **sizes, score_chains=config.score_chains))  # type: ignore[arg-type]  # numbers
        for stage in STAGES:
            ours[stage] = timed(partial(run_stage, run, stage), config.cpu_time)()
        for stage, side in published(config, run, Path(ls.models.ORGANISM)).items():
            theirs[stage] = side()
    per_chain = ours["evaluate"] / run.stages["evaluate"]["chains"], theirs["evaluate"] / (config.n_test * 9)
    return {
        "model": "organism",
        "threads": config.threads,
        "clock": "CPU time" if config.cpu_time else "wall",
        "tasks": config.n_tasks,
        "seconds.lensteer": ours,
        "seconds.published": theirs,
        "seconds_per_chain.evaluate": {"lensteer": per_chain[0], "published": per_chain[1]},
        "ratio": {stage: theirs[stage] / ours[stage] for stage in theirs},
        "ratio_per_chain.evaluate": per_chain[1] / per_chain[0],
    }


def smoke(config: Config) -> Config:
    """The size of a test."""
    sizes: dict[str, Any] = dict(n_tasks=12, n_dev=4, n_test=2, n_controls=1)
    return replace(config, **sizes, score_chains=2, sampled_scores=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in (
        "n_tasks",
        "n_dev",
        "n_test",
        "n_controls",
        "max_new_tokens",
        "score_chains",
        "threads",
        "sampled_scores",
    ):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Config, option))
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    out, small = given.pop("json"), given.pop("smoke")
    config = Config(**given)
    found = main(smoke(config) if small else config)
    print(json.dumps(found, indent=1))
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")
