"""What does every figure look like? Draws all of `lensteer.plots` on the organism, as PNG and as HTML with hover texts.

The data are computed on the fly, at small sizes and shared between the figures: nothing here is a finding.

Example: python analyses/gallery.py --out gallery
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cache_versus_residual
import position_ablation
from plotly import graph_objects as go
from plotly import io as pio

import lensteer as ls
from lensteer import organism, plots
from lensteer.ablation import ForcedChain, LeaveOneOut, leave_one_out
from lensteer.cache_steering import CachePlan, Pair, fit_cache_vector
from lensteer.evaluation import Condition, PositionAblation
from lensteer.export.verification import Verification, look_at
from lensteer.generation.jobs import Sampling
from lensteer.vectors import Recipe, fit_recipes

RECIPES = (Recipe("onset"), Recipe("span", "spans"), Recipe("onset", "all"), Recipe(construction="logistic"))
JUST_THE_ANSWER = cache_versus_residual.JUST_THE_ANSWER


@dataclass(frozen=True)
class Config:
    """Output folder, which figures (empty: all), whether to write PNGs, their width (700 in a notebook), and sizes."""

    out: Path
    only: tuple[str, ...] = ()
    png: bool = True
    width: int = 700
    n_train: int = 80
    n_dev: int = 20
    max_spans: int = 40
    n_draws: int = 40
    n_controls: int = 6
    seed: int = 0


class _Shared:
    """The data of the figures. Each part is computed on first use and cached."""

    def __init__(self, config: Config):
        self.config, self.model = config, ls.load_model()
        self.sampling = Sampling(1, 1.0, config.seed, 400, 256)
        self.options: dict[str, Any] = dict(
            behaviors=ls.STEERED, max_spans=config.max_spans, seed=config.seed, unit="mean_norm"
        )

    @cached_property
    def dev(self) -> list[ls.Task]:
        return ls.load_tasks(split="dev", n=self.config.n_dev)

    @cached_property
    def traces(self) -> list[ls.Trace]:
        train = ls.load_tasks(split="train", n=self.config.n_train)
        return ls.annotate(
            ls.generate_traces(self.model, train, temperature=1.0, max_new_tokens=400, batch_size=256), ls.grammar
        )

    @cached_property
    def chain(self) -> ls.Trace:
        return max(self.traces[:20], key=lambda trace: len(trace.spans))

    @cached_property
    def recipes(self) -> dict[str, ls.BehaviorVectors]:
        return {str(r): v for r, v in zip(RECIPES, fit_recipes(self.model, self.traces, RECIPES), strict=True)}

    @cached_property
    def vectors(self) -> ls.BehaviorVectors:
        n = self.config.n_draws
        return ls.fit_vectors(self.model, self.traces, window="onset", n_controls=n, n_bootstrap=n)

    @cached_property
    def exact(self) -> ls.LayerScores:
        return ls.attribute(self.model, self.traces, self.vectors, **self.options)

    @cached_property
    def beside_controls(self) -> ls.LayerScores:
        controls = self.config.n_draws
        return ls.attribute(self.model, self.traces, self.vectors, method="fisher", n_controls=controls, **self.options)

    @cached_property
    def overlap(self) -> ls.EmbeddingOverlap:
        return ls.embedding_overlap(self.model, self.vectors)

    @cached_property
    def layers(self) -> ls.SelectedLayers:
        return ls.select_layers(self.exact, self.overlap)

    @cached_property
    def looks(self) -> ls.BehaviorAttention:
        return ls.behavior_attention(self.model, self.traces[:30])

    @cached_property
    def looks_changed(self) -> ls.BehaviorAttention:
        plan = replace(self.plan(ls.onsets), coefficient=0.6)
        return ls.behavior_attention(self.model, self.traces[:30], plan=plan)

    @cached_property
    def head(self) -> tuple[int, int]:
        return self.looks.top("backtracking", "deduction", n=1)[0]

    @cached_property
    def evaluation(self) -> ls.Evaluation:
        n, words = self.config.n_controls, {b: organism.cue(b) for b in self.layers}
        options: dict[str, Any] = dict(
            annotator=ls.grammar,
            scope=ls.onsets,
            prompts=words,
            n_controls=n,
            sampling=self.sampling,
            margins=ls.GRAMMAR_MARGINS,
        )
        return ls.evaluate(self.model, self.dev, self.vectors, self.layers, 1.0, **options)

    @cached_property
    def coefficients(self) -> ls.ChosenCoefficients:
        options: dict[str, Any] = dict(
            annotator=ls.grammar, scope=ls.onsets, sampling=self.sampling, margins=ls.GRAMMAR_MARGINS
        )
        return ls.choose_coefficients(
            self.model, self.dev, self.vectors, self.layers, coefficients=(0.5, 1.0, 1.5), **options
        )

    @cached_property
    def pairs(self) -> list[Pair]:
        return cache_versus_residual.pairs_of(self.model, cache_versus_residual.Config(), 20, 2)

    @cached_property
    def cache(self) -> ls.CacheVector:
        return fit_cache_vector(self.model, self.pairs)

    @cached_property
    def forced(self) -> ForcedChain:
        return ForcedChain.of(self.model, self.chain)

    def plan(self, scope: ls.PositionScope) -> ls.SteeringPlan:
        direction, layer = self.vectors["backtracking"], self.layers["backtracking"]
        return ls.SteeringPlan(direction, layer, 0.5, scope, unit="mean_norm")

    @cached_property
    def left_out(self) -> LeaveOneOut:
        spans = enumerate(self.chain.spans)
        groups = {f"{i} {span.label}": range(span.start, span.end) for i, span in spans}
        return leave_one_out(self.model, self.forced, lambda positions: self.plan(ls.at(positions)), groups)

    @cached_property
    def modes(self) -> ls.Modes:
        conditions = [Condition("unsteered", None, JUST_THE_ANSWER, kind="unsteered")]
        conditions += [
            Condition(f"cache, c_v = {c:g}", CachePlan(self.cache, c), JUST_THE_ANSWER) for c in (0.5, 0.75, 4.0)
        ]
        conditions.append(Condition("prompted baseline", None, cache_versus_residual.ASK, kind="prompted"))
        conditions += [
            Condition(control.label, CachePlan(control, 0.75), JUST_THE_ANSWER, kind="control")
            for control in self.cache.controls(self.config.n_controls)
        ]
        return ls.measure_modes(
            self.model, self.dev, conditions, Sampling(1, 1.0, self.config.seed, 400, 256, False), annotator=ls.grammar
        )

    @cached_property
    def benchmark(self) -> ls.Benchmark:
        return ls.benchmark(self.model, self.dev, {"backtracking": self.plan(ls.onsets)}, Sampling(1, 1.0, 0, 400, 256))

    @cached_property
    def verification(self) -> Verification:
        """Three looks at the hooked model, as if it were served."""
        plan, looks = self.plan(ls.onsets), []
        for number in (1, 2, 3):
            options: dict[str, Any] = dict(temperature=1.0, max_new_tokens=400, seed=number)
            plain = ls.annotate(ls.generate_traces(self.model, self.dev, **options), ls.grammar)
            with plan.on(self.model):
                steered = ls.annotate(ls.generate_traces(self.model, self.dev, **options), ls.grammar)
            sides = [
                [(sum(s.label == "backtracking" for s in t.spans), len(t.spans) + t.n_unparsed) for t in side]
                for side in (steered, plain)
            ]
            counts = {task.id: (*own, *base) for task, own, base in zip(self.dev, *sides, strict=True)}
            looks.append(look_at(number, f"look {number}", counts, looks[0] if looks else None))
        return Verification("the hooked model", "organism", "backtracking", 1, None, tuple(looks))

    @cached_property
    def persistence(self) -> dict[str, list[tuple[float, float, float]]]:
        vector = cache_versus_residual.residual_direction(self.model, self.pairs)
        scopes = {"once": cache_versus_residual.header, "throughout": cache_versus_residual.header | ls.generated}
        plans: dict[str, CachePlan | ls.SteeringPlan] = {"cache": CachePlan(self.cache, 0.75)}
        residual = ls.SteeringPlan(vector, 3, 0.5, unit="mean_norm")
        plans |= {f"residual, {name}": replace(residual, scope=scope) for name, scope in scopes.items()}
        prompts = cache_versus_residual.prompt_ids(self.model, self.dev)
        return {
            name: cache_versus_residual.persistence(self.model, prompts, plan, self.config.seed)
            for name, plan in plans.items()
        }

    @cached_property
    def positions(self) -> PositionAblation:
        return position_ablation.main(position_ablation.Config(n_train=self.config.n_train, n_dev=8, n_prompts=2))


PAIR = ("backtracking", "deduction")

FIGURES: dict[str, Callable[[_Shared], go.Figure]] = {
    "layer_scores": lambda s: plots.layer_scores(s.exact, s.layers),
    "against_controls": lambda s: plots.against_controls(s.beside_controls, s.layers),
    "overlap": lambda s: plots.overlap(s.overlap, s.layers),
    "cosine_matrix": lambda s: plots.cosine_matrix(ls.cosine_matrix(s.vectors, s.layers, default=4)),
    "vector_geometry": lambda s: plots.vector_geometry(s.vectors),
    "vector_geometry-3d": lambda s: plots.vector_geometry(s.vectors, dimensions=3),
    "layer_angles": lambda s: plots.layer_angles(s.vectors),
    "recipe_comparison": lambda s: plots.recipe_comparison(s.recipes),
    "token_projections": lambda s: plots.token_projections(
        ls.token_projections(s.model, s.chain, s.vectors["backtracking"], s.layers["backtracking"])
    ),
    "sentence_attention": lambda s: plots.sentence_attention(ls.sentence_attention(s.model, s.chain), *s.head),
    "head_map": lambda s: plots.head_map(s.looks, PAIR, heads=[s.head]),
    "head_map-change": lambda s: plots.head_map(s.looks_changed, PAIR),
    "head_map-receivers": lambda s: plots.head_map(ls.receiver_heads(s.model, s.traces[:30])),
    "behavior_attention": lambda s: plots.behavior_attention(s.looks, *s.head),
    "behavior_attention-change": lambda s: plots.behavior_attention(s.looks_changed, 7, 3),
    "effects": lambda s: plots.effects(s.evaluation),
    "entanglement": lambda s: plots.entanglement(s.evaluation),
    "coefficients": lambda s: plots.coefficients(s.coefficients),
    "dose_response": lambda s: plots.dose_response(s.coefficients.responses),
    "modes": lambda s: plots.modes(s.modes),
    "benchmark": lambda s: plots.benchmark(s.benchmark),
    "looks": lambda s: plots.looks(s.verification),
    "kl_by_token": lambda s: plots.kl_by_token(s.persistence, cache_versus_residual.BINS),
    "forced_effect": lambda s: plots.forced_effect(s.forced.effect(s.plan(ls.onsets)), s.chain),
    "leave_one_out": lambda s: plots.leave_one_out(s.left_out),
    "position_ablation": lambda s: plots.position_ablation(s.positions),
}
"""What is drawn, by file name: the function's name, with its input after a dash where it takes several kinds."""


def main(config: Config) -> list[Path]:
    """Draw and write; returns the files."""
    unknown = set(config.only) - FIGURES.keys()
    if unknown:
        raise ls.LensteerError(f"no figures {sorted(unknown)}: choose among {list(FIGURES)}")
    config.out.mkdir(parents=True, exist_ok=True)
    shared = _Shared(config)
    figures = {name: FIGURES[name](shared) for name in config.only or FIGURES}
    written = [config.out / f"{name}.html" for name in figures]
    for figure, path in zip(figures.values(), written, strict=True):
        figure.write_html(path, include_plotlyjs="directory")
    if config.png:
        heights, files = [f.layout.height for f in figures.values()], [path.with_suffix(".png") for path in written]
        pio.write_images(list(figures.values()), files, width=config.width, height=heights, scale=2)  # in one browser
        written += files
    if not config.only:
        chain = config.out / "chain_html.html"
        chain.write_text(f"<!doctype html><meta charset=utf-8>{plots.chain_html(shared.chain)}", encoding="utf-8")
        written.append(chain)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gallery"))
    parser.add_argument("--only", nargs="*", default=(), metavar="NAME", help="all by default")
    parser.add_argument("--no-png", dest="png", action="store_false", help="PNG needs kaleido and Chrome")
    parser.add_argument("--width", type=int, default=700)
    given = parser.parse_args()
    print(*main(Config(**{**vars(given), "only": tuple(given.only)})), sep="\n")
