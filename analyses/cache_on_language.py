"""Does one edit of the KV cache make a language model reason, and is it steadier than an edit of the residual stream?

A cache vector is the mean difference of values between prompts with solved examples and the same with bare answers,
read at the assistant's header. Three parts:

- effect: a coefficient is chosen on dev questions; on test questions the edit is compared, paired by question, with
  nothing, with words that ask for steps, with a residual edit at the same slot (once; layer chosen on dev questions, at
  the KL of the cache edit), with pairs whose sides are swapped in a random half (at the vector's length and at their
  own), with the offset token alone, and with control vectors of the same length: isotropic ones, and ones from the
  spread of the pairs' differences.
- steadiness: on dev questions, what changes with the number of pairs, shots, coefficients of values and keys, position
  and layers; and with half, twice and four times the coefficient of the cache edit and of the residual edit.
- styles: vectors of the written records' styles, and the style of the answers under each.

With `--c-test` all parts take that coefficient, whatever the dev questions say. Coefficients are in lengths of the
slot's own values (unit "norm"). An answer "reasons" by a rule on its words (`lensteer.cache_steering.reasons`). Every
part is resumed from its folder.

Example: python analyses/cache_on_language.py --model qwen2.5-coder-0.5b --records gsm8k/train.jsonl \
    --tasks gsm8k/test.jsonl --suffix "Answer with a single number and nothing else." --out qwen --json qwen.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from math import copysign
from pathlib import Path
from typing import Any

import lensteer as ls
from lensteer import models
from lensteer.cache_steering import (
    OFFSET,
    CachePlan,
    CacheVector,
    Pair,
    Record,
    contrastive_pairs,
    fit_cache_vector,
    load_records,
    pairs_digest,
    style_of,
    swapped,
)
from lensteer.cache_steering.styles import STYLES
from lensteer.calibration import calibrate_many, rollout_kl
from lensteer.contrast import Pair as Contrast
from lensteer.contrast import Text
from lensteer.evaluation import Condition, Modes, measure_modes
from lensteer.generation.jobs import Sampling
from lensteer.pipeline.cache import ASK_TO_THINK, chosen_edit, told
from lensteer.positions import PositionScope
from lensteer.vectors import BehaviorVectors

PARTS = ("effect", "steadiness", "styles")
header = PositionScope("header", lambda c: c.position == c.prompt_length[:, None] - 2)


@dataclass(frozen=True)
class Config:
    """Settings of the study.

    Attributes:
        model: a name or folder.
        tasks: file of the questions, whose dev and test splits are used.
        out: folder for vectors and answers.
        records: file of solved questions.
        parts: of `PARTS`.
        suffix: the words that end each question.
        dtype: of the model.
        n_pairs: of the vector.
        shots: solved examples per prompt.
        c_values: to choose from.
        c_test: the coefficient of all parts; None: the one chosen on dev questions.
        layers: of the residual edit, to choose from; by default five depths.
        some_pairs: other numbers of pairs.
        some_shots: other numbers of shots.
        c_keys: coefficients of the keys.
        n_prompts: to match KLs on.
        n_dev: questions.
        n_test: questions.
        n_style: questions, for the styles.
        n_controls: isotropic vectors, and as many from the pairs' spread.
        max_new_tokens: of an answer.
        batch_size: answers per batch.
        seed: for everything.
    """

    model: str
    tasks: str
    out: Path
    records: str = "builtin"
    parts: tuple[str, ...] = PARTS
    suffix: str = ""
    dtype: str = "bfloat16"
    n_pairs: int = 60
    shots: int = 3
    c_values: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    c_test: float | None = None
    layers: tuple[int, ...] = ()
    some_pairs: tuple[int, ...] = (1, 5, 20)
    some_shots: tuple[int, ...] = (1,)
    c_keys: tuple[float, ...] = (1.0, 4.0)
    n_prompts: int = 8
    n_dev: int = 40
    n_test: int = 150
    n_style: int = 40
    n_controls: int = 20
    max_new_tokens: int = 320
    batch_size: int = 64
    seed: int = 0


class Study:
    """A model, its vectors and its questions; what is slow is kept in a folder."""

    def __init__(self, config: Config) -> None:
        """Load the model and fit the vector."""
        self.config, self.folder = config, config.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = ls.load_model(config.model, dtype=config.dtype)
        self.marks = bool(models.thought_marks(self.model)[0])
        self.sampling = Sampling(1, 0.0, config.seed, config.max_new_tokens, config.batch_size, thinking=False)
        self.records = load_records(config.records)
        self.vector = self.fitted("vector", self.pairs(config.n_pairs, config.shots))

    def pairs(self, n: int, shots: int, records: Sequence[Record] = (), style: str = "stepwise") -> list[Pair]:
        """Contrastive pairs of records, by default of the study's own."""
        own = records or self.records
        return contrastive_pairs(self.model, own, n=n, shots=shots, style=style, seed=self.config.seed)

    def fitted(self, name: str, pairs: list[Pair], position: str = "last_prompt") -> CacheVector:
        """A vector, from its file if it was fitted on these pairs before."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            vector = CacheVector.load(path, self.model)
            if vector.provenance["pairs"] == pairs_digest(pairs):
                return vector
        print(f"fitting {name} on {len(pairs)} pairs", flush=True)
        fit_cache_vector(self.model, pairs, position=position, label=name, batch_size=8).save(path)
        return CacheVector.load(path, self.model)

    def residual(self) -> BehaviorVectors:
        """The mean difference of resid_post at the same token of the same pairs, at every layer."""
        path = self.folder / "residual.safetensors"
        if not path.exists():
            print("fitting the residual direction", flush=True)
            pairs = [
                Contrast(Text(p.positive, raw=True), Text(p.negative, raw=True), "steps", -2)
                for p in self.pairs(self.config.n_pairs, self.config.shots)
            ]
            ls.fit_directions(self.model, pairs, batch_size=4).save(path)
        return BehaviorVectors.load(path, self.model)

    def tasks(self, split: str, n: int) -> list[ls.Task]:
        """Questions of a split."""
        return ls.load_tasks(self.config.tasks, split=split, n=n)

    def prompts(self) -> list[list[int]]:
        """The first dev prompts, as token ids."""
        config = self.config
        texts = [f"{task.prompt} {config.suffix}".strip() for task in self.tasks("dev", config.n_prompts)]
        return [models.encode(self.model, models.chat_text(self.model, text, thinking=False)) for text in texts]

    def edit(self, vector: CacheVector, c: float, **options: Any) -> CachePlan:
        """An edit whose unit is the length of the slot's values."""
        return CachePlan(vector, c, unit="norm", **options)

    def condition(
        self, name: str, plan: Any = None, kind: str = "other", prefill: str = "", suffix: str = ""
    ) -> Condition:
        """A condition that ends its questions with the suffix."""
        return Condition(name, plan, f"{self.config.suffix} {suffix}".strip(), prefill, kind=kind)

    def measured(self, name: str, split: str, n: int, conditions: list[Condition]) -> Modes:
        """The modes of conditions, the unsteered one first; answers are kept in a file of the part's name."""
        print(f"{name}: {len(conditions)} conditions on {n} {split} questions", flush=True)
        found = measure_modes(
            self.model,
            self.tasks(split, n),
            [self.condition("unsteered", kind="unsteered"), *conditions],
            self.sampling,
            annotator=ls.rules,
            style_of=style_of,
            path=self.folder / f"{name}.jsonl",
        )
        for condition in found.conditions:
            print(f"  {told(condition, self.marks)}", flush=True)
        return found

    @cached_property
    def chosen(self) -> tuple[float, Modes]:
        """The coefficient, and the dev questions' figures."""
        tried = {c: self.condition(f"c={c:g}", self.edit(self.vector, c)) for c in self.config.c_values}
        dev = self.measured("dev", "dev", self.config.n_dev, list(tried.values()))
        best, why = chosen_edit(dev, {c: condition.name for c, condition in tried.items()}, marks=self.marks)
        print(why, flush=True)
        return best, dev

    @property
    def dose(self) -> float:
        """The coefficient of all parts."""
        return self.chosen[0] if self.config.c_test is None else self.config.c_test

    def matched(self, plan: CachePlan) -> dict[str, Any]:
        """The KL of the cache edit, and a residual edit of the same KL at each layer that is tried."""
        path = self.folder / f"matched-c{plan.c_values:g}.json"
        if not path.exists():
            budget = rollout_kl(self.model, self.prompts(), [plan], max_new_tokens=40)[0].statistic(None)
            direction, n = self.residual()["steps"], models.n_layers(self.model)
            layers = self.config.layers or tuple(round(n * share) for share in (0.2, 0.35, 0.5, 0.65, 0.8))
            plans = [ls.SteeringPlan(direction, layer, copysign(1.0, plan.c_values), header) for layer in layers]
            options: dict[str, Any] = dict(budget=budget, quantile=None, max_new_tokens=40, max_rounds=6, batch_size=64)
            found = calibrate_many(self.model, self.prompts(), plans, **options)
            rows = [
                {"layer": c.plan.layer, "coefficient": c.coefficient, "kl": c.kl, "reached": c.reached} for c in found
            ]
            path.write_text(json.dumps({"kl": budget, "residual": rows}, indent=1))
        return dict(json.loads(path.read_text()))


def effect(study: Study) -> dict[str, Any]:
    """The edit against every other condition, on test questions."""
    config = study.config
    best, (_, dev) = study.dose, study.chosen
    cache = study.edit(study.vector, best)
    matched = study.matched(cache)
    direction = study.residual()["steps"]
    print(f"KL per token {matched['kl']:.3f}; residual edits {matched['residual']}", flush=True)
    sites = [row for row in matched["residual"] if row["coefficient"] and row["kl"] > 0]
    plans = {r["layer"]: ls.SteeringPlan(direction, r["layer"], r["coefficient"], header) for r in sites}
    tried = {layer: study.condition(f"residual L{layer}", plan) for layer, plan in plans.items()}
    layers = study.measured(f"residual-c{best:g}", "dev", config.n_dev, list(tried.values()))
    if best > 0:
        layer, why = chosen_edit(
            layers, {float(layer): condition.name for layer, condition in tried.items()}, marks=study.marks
        )
        print(why.replace("c_values", "layer"), flush=True)
    else:  # an edit against reasoning: the layer at which fewest answers reason
        layer = min(tried, key=lambda at: layers[tried[at].name].reasons.value)
        print(f"layer={layer}: fewest answers reason", flush=True)
    mixed = study.fitted("swapped", swapped(study.pairs(config.n_pairs, config.shots), seed=config.seed))
    own_length = CachePlan(mixed, best * study.vector.scale("values", "norm"))
    test = study.measured(
        f"test-c{best:g}",
        "test",
        config.n_test,
        [
            study.condition("cache", cache),
            study.condition("residual, once", plans[int(layer)]),
            study.condition("words", kind="prompted", suffix=ASK_TO_THINK),
            study.condition("offset token alone", prefill=OFFSET),
            study.condition("swapped sides", study.edit(mixed, best)),
            study.condition("swapped sides, own length", own_length),
            *(study.condition(vector.label, study.edit(vector, best), "control")
              for i, spread in enumerate(study.vector.controls(config.n_controls))
              for vector in (study.vector.random(i), spread)),
        ],
    )  # fmt: skip
    facts = {"c_values": best, "layer": int(layer), "length": float(study.vector.values.norm()), **matched}
    facts["norms"] = study.vector.provenance["norms"]
    return {**facts, "dev": dev.to_dict(), "residual_dev": layers.to_dict(), "test": test.to_dict()}


def steadiness(study: Study) -> dict[str, Any]:
    """What the hyperparameters change, on dev questions."""
    config, vector = study.config, study.vector
    best = study.dose
    n = models.n_layers(study.model)
    thirds = {"first": range(n // 3), "middle": range(n // 3, 2 * n // 3), "last": range(2 * n // 3, n)}
    conditions = [study.condition(f"x{x:g} cache", study.edit(vector, x * best)) for x in (0.5, 1.0, 2.0, 4.0)]
    row = max(study.matched(study.edit(vector, best))["residual"], key=lambda row: (row["reached"], row["kl"]))
    plan = partial(ls.SteeringPlan, study.residual()["steps"], row["layer"], scope=header)
    conditions += [
        study.condition(f"x{x:g} residual L{row['layer']}", plan(x * row["coefficient"])) for x in (0.5, 1.0, 2.0, 4.0)
    ]
    for pairs, shots in [(m, config.shots) for m in config.some_pairs] + [(20, s) for s in config.some_shots]:
        other = study.fitted(f"{pairs}-pairs-{shots}-shots", study.pairs(pairs, shots))
        conditions.append(study.condition(f"{pairs} pairs, {shots} shots", study.edit(other, best)))
    conditions += [study.condition(f"c_keys={c:g}", study.edit(vector, best, c_keys=c)) for c in config.c_keys]
    conditions += [study.condition(f"{name} third of the layers", study.edit(vector, best, layers=tuple(layers)))
             for name, layers in thirds.items()]  # fmt: skip
    conditions += [study.condition(f"slot {slot}", study.edit(vector, best, position=slot)) for slot in (-3, -5)]
    read = study.fitted("offset", study.pairs(20, config.shots), "offset_token")
    conditions.append(study.condition("read and edited at the offset token", study.edit(read, best)))
    return {"c_values": best, "dev": study.measured(f"steadiness-c{best:g}", "dev", config.n_dev, conditions).to_dict()}


def styles(study: Study) -> dict[str, Any]:
    """The written records' styles: does a vector carry its own style over?"""
    config = study.config
    best = study.dose
    records = load_records("builtin")
    conditions = []
    for style in STYLES:
        pairs = study.pairs(30, config.shots, records=records, style=style)
        conditions.append(study.condition(style, study.edit(study.fitted(f"style-{style}", pairs), best)))
    return {"c_values": best, "test": study.measured(f"styles-c{best:g}", "test", config.n_style, conditions).to_dict()}


def main(config: Config) -> dict[str, Any]:
    """The parts, in their order."""
    study = Study(config)
    run = {"effect": effect, "steadiness": steadiness, "styles": styles}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    return {"config": settings, **{part: run[part](study) for part in PARTS if part in config.parts}}


def draw(found: dict[str, Any], path: Path) -> None:
    """The test questions' figure."""
    test = Modes.from_dict(found["effect"]["test"])
    figure = ls.plots.modes(test, ["reasons", "accuracy", "answered", "repetition"])
    about = (
        f"{Path(found['config']['model']).name}, {test.n_tasks} questions, coefficient {found['effect']['c_values']:g}"
    )
    figure.update_layout(title=f"One edit of the KV cache<br><sup>{about}; gray: control vectors of its length</sup>")
    figure.write_image(path, width=1100, height=420)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tasks"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("records", "suffix", "dtype"):
        parser.add_argument(f"--{name}", default=getattr(Config, name))
    sizes = "n_pairs shots n_prompts n_dev n_test n_style n_controls max_new_tokens batch_size seed".split()
    for name in sizes:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Config, name))
    parser.add_argument("--c-values", type=float, nargs="+", default=Config.c_values)
    parser.add_argument("--c-test", type=float, help="coefficient of all parts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    given = vars(parser.parse_args())
    out, image = given.pop("json"), given.pop("figure")
    given |= {name: tuple(given[name]) for name in ("c_values", "parts")}
    found = main(Config(**given))
    if out:
        out.write_text(json.dumps(found, indent=1))
    if image:
        draw(found, image)
