"""Small results made by hand, for tests of what shows results. No model, no computing; seeded where a value is free."""

from __future__ import annotations

import torch

B4 = ("adding-knowledge", "example-testing", "uncertainty-estimation", "backtracking")
NAN = float("nan")
LAYERS = {"adding-knowledge": 3, "example-testing": 4, "uncertainty-estimation": 4, "backtracking": 5}


def trace(response=None, spans=None, prompt="Doors: a to b. Reach the exit.", name="maze-0001"):
    """A chain of four sentences; one token per character, so that offsets are trivial."""
    from lensteer.behaviors import Span
    from lensteer.tasks import Task
    from lensteer.traces import Trace

    if response is None:
        sentences = [
            ("initializing", "We start at B. "),
            ("deduction", "B leads to C. "),
            ("backtracking", "Wait, C fails, back to B. "),
            ("uncertainty-estimation", "Perhaps D misleads us. "),
            ("adding-knowledge", "Recall that D leads to exit. "),
            ("example-testing", "Suppose D, we get exit. "),
        ]
        response = "".join(text for _, text in sentences) + "</think>\nAnswer: exit<|im_end|>"
        spans, at = [], 0
        for label, text in sentences:
            spans.append((label, at, at + len(text.rstrip())))
            at += len(text)
    prefix = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    n = len(prefix)
    return Trace(
        Task(name, "maze", "test", prompt, "exit", "exact"),
        prefix,
        response,
        tuple(range(n)),
        tuple(range(len(response))),
        tuple(range(len(response))),
        True,
        spans=tuple(Span(label, n + begin, n + end, begin, end) for label, begin, end in spans or ()),
    )


def layer_scores(labels=B4, n_layers=8):
    from lensteer.attribution import LayerScores

    layer = torch.arange(n_layers, dtype=torch.float64)
    mean = torch.stack([(0.3 + 0.2 * b) * torch.exp(-((layer - 3 - 0.5 * b) ** 2) / 5) for b in range(len(labels))])
    return LayerScores(
        tuple(labels),
        tuple(range(n_layers)),
        n_layers,
        mean,
        0.85 * mean,
        1.2 * mean,
        tuple(120 + b for b in range(len(labels))),
        64,
        "exact",
        1.0,
        "mean_norm",
        "own",
        noise_floor=3e-4,
        cost={"forwards": 321, "rows": 45678, "seconds": 12.5},
        provenance={},
    )


def overlap(labels=B4, n_layers=8, words=(" Wait", "</script>", "<b>")):
    from lensteer.attribution.overlap import EmbeddingOverlap, NearestTokens

    layer = torch.arange(n_layers, dtype=torch.float32)

    def side(sign: int) -> NearestTokens:
        maximum = torch.stack(
            [0.15 + 0.3 * torch.exp(-(layer if sign > 0 else layer.flip(0)) / (1 + b)) for b in range(4)]
        )
        cosines = maximum[..., None] * torch.tensor([1.0, -0.8, 0.6])
        texts = tuple(tuple(words for _ in range(n_layers)) for _ in labels)
        return NearestTokens(maximum, torch.zeros(len(labels), n_layers, 3, dtype=torch.long), cosines, texts)

    return EmbeddingOverlap(tuple(labels), tuple(range(n_layers)), side(1), side(-1))


def layers():
    from lensteer.attribution.selection import SelectedLayers

    why = {b: f"layer {n} of 8: the largest exact KL (0.3{n} nats); layer 0 left out" for b, n in LAYERS.items()}
    return SelectedLayers(LAYERS, why)


def cosines(labels=B4):
    from lensteer.vectors.geometry import CosineMatrix

    values = torch.full((len(labels), len(labels)), 0.3, dtype=torch.float64) + 0.7 * torch.eye(len(labels))
    values[0, 1] = values[1, 0] = -0.41
    values[0, 2] = values[2, 0] = torch.nan
    return CosineMatrix(tuple(labels), tuple(LAYERS[b] for b in labels), values, values - 0.1, values + 0.1)


def vectors(labels=B4, n_layers=8, width=4):
    from lensteer.vectors import BehaviorVectors, Recipe

    raw = torch.randn(len(labels), n_layers, width, generator=torch.Generator().manual_seed(0))
    counts = {label: 100 + 10 * b for b, label in enumerate(labels)}
    return BehaviorVectors(raw, torch.ones(n_layers), tuple(labels), tuple(range(n_layers)), counts, 300, Recipe())


#: Text figures of the unsteered condition, and whether a higher one is worse.
PLAIN_TEXT = {
    "nll": (1.2, True),
    "repetition": (0.031, True),
    "compression": (0.45, False),
    "sentence_length": (6.2, True),
    "finished": (0.99, False),
    "parsed": (0.981, False),
    "kl": (0.0, True),
}


def text_check(margins, used=0.6):
    """Every figure that the margins ask for, its interval's worse end at a share of the way to the limit."""
    from lensteer.evaluation import TextCheck, TextFigure

    figures = []
    for name, (base, rise) in PLAIN_TEXT.items():
        margin = getattr(margins, name)
        if margin is not None:
            room = base * (margin - 1) if name == "sentence_length" else margin if rise else -margin
            figures.append(
                TextFigure(name, base + 0.5 * used * room, base, base + used * room, base + room, used <= 1.0)
            )
    return TextCheck(tuple(figures))


def coefficients(margins=None, without=()):
    """Coefficients of every direction but those of `without`, such as ("backtracking", "up")."""
    from lensteer.evaluation import GRAMMAR_MARGINS, ChosenCoefficients, CoefficientTrial

    margins = margins or GRAMMAR_MARGINS

    def trial(behavior, layer, coefficient):
        broken = (behavior, "up" if coefficient > 0 else "down") in without
        text = text_check(margins, 1.5 if broken else 0.5 * abs(coefficient)) if coefficient else None
        return CoefficientTrial(
            behavior, layer, coefficient, abs(coefficient) * (2.0 + layer), 0.12 + 0.05 * coefficient, text
        )

    steps = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
    curve = [trial(b, layer, c) for b, layer in LAYERS.items() for c in steps]
    chosen = {
        kind: {b: 1.5 if b == "backtracking" else 1.0 for b in LAYERS if (b, kind) not in without}
        for kind in ("down", "up")
    }
    return ChosenCoefficients(chosen["down"], chosen["up"], tuple(curve), margins, "difference", 40, 1)


#: Behavior → unsteered share; kind → change, p, p after Holm's correction, rank among control vectors.
STORY = {
    "adding-knowledge": (0.004, {"down": (-0.001, 0.9, NAN, 4), "up": (0.013, 0.001, 0.006, 2)}),
    "example-testing": (0.123, {"down": (-0.06, 0.0004, 0.002, 1), "up": (0.01, 0.4, 0.8, 9)}),
    "uncertainty-estimation": (0.123, {"down": (-0.005, 0.6, 0.8, 9), "up": (0.13, 0.0002, 0.001, 1)}),
    "backtracking": (0.123, {"down": (-0.08, 0.0002, 0.001, 1), "up": (0.171, 0.0001, 0.0007, 1)}),
}
#: The same directions, and nothing is found in any.
NOTHING = {b: (base, dict.fromkeys(kinds, (0.001, 0.7, 1.0, 9))) for b, (base, kinds) in STORY.items()}
BROKEN = "example-testing/up"  # the condition whose text is worse


def evaluation(words=True, n_controls=20, story=STORY, margins=None, without=(), others=()):
    """Backtracking moves both ways, uncertainty only up, example-testing only down, adding-knowledge neither.

    Adding-knowledge is too rare for a fall, and rises as it does under a control vector.

    Args:
        words: whether there is a prompted baseline.
        n_controls: control vectors per pool.
        story: `STORY` or `NOTHING`.
        margins: of the text; by default the grammar's.
        without: directions without a coefficient.
        others: names of annotators beside the first.
    """
    from lensteer.evaluation import GRAMMAR_MARGINS, POOLS, ConditionSummary, ControlRank, Effect, Evaluation
    from lensteer.statistics import Estimate

    margins = margins or GRAMMAR_MARGINS
    found, conditions = [], ["unsteered"]

    def controls(kind, change, rank):
        sign = -1 if kind == "down" else 1
        return tuple(
            ControlRank(
                pool=pool,
                n=n_controls,
                length=9.0,
                low=-0.021 + 0.001 * i,
                high=0.017 + 0.001 * i,
                mean=sign * 0.001,
                sd=0.01,
                z=(sign * change - sign * 0.001) / 0.01,
                rank=rank if i == 1 else 1,
                p_max=None,
            )
            for i, pool in enumerate(POOLS if n_controls and kind != "prompted" else ())
        )

    def effect(behavior, kind, base, change, p, p_holm, rank, unit, annotator):
        rare = base < 0.01
        return Effect(
            behavior=behavior,
            kind=kind,
            layer=-1 if kind == "prompted" else LAYERS[behavior],
            coefficient={"down": -1.5, "up": 1.5, "prompted": 0.0}[kind],
            length=0.0 if kind == "prompted" else 1.5 * (2.0 + LAYERS[behavior]),
            unit=unit,
            annotator=annotator,
            share=Estimate(base + change, base + change - 0.02, base + change + 0.025),
            base=Estimate(base, base - 0.015, base + 0.016),
            events=round(2450 * (base + change)),
            base_events=9 if rare else 301,
            base_event_tasks=7 if rare else 48,
            change=Estimate(change, change - 0.018, change + 0.019),
            p=p,
            p_holm=p_holm,
            controls=controls(kind, change, rank),
            control_low=-0.021 if n_controls and kind != "prompted" else 0.0,
            control_high=0.019 if n_controls and kind != "prompted" else 0.0,
            p_value=rank / (1 + 3 * n_controls),
            wrong_way=0.1,
            text=f"{behavior}/{kind}" != BROKEN,
        )

    views = [("sentences", "", 1.0), ("tokens", "", 1.1), *(("sentences", other, 0.7) for other in others)]
    for behavior, (base, kinds) in story.items():
        for kind, row in {**kinds, **({"prompted": (0.2, 0.0001, 0.0001, 1)} if words else {})}.items():
            if (behavior, kind) in without:
                continue
            conditions.append(f"{behavior}/{kind}")
            change, p, p_holm, rank = row
            found += [
                effect(behavior, kind, base * factor, change * factor, p, p_holm, rank, unit, annotator)
                for unit, annotator, factor in views
            ]
    drawn = [(layer, pool, i) for layer in (3, 4, 5) for pool in POOLS for i in range(n_controls)]
    rows = [(name, "", -1) for name in conditions]
    rows += [(f"L{layer}/{pool}-{i}", pool, layer) for layer, pool, i in drawn]

    def text(name):
        return None if name == "unsteered" else text_check(margins, 1.4 if name == BROKEN else 0.6)

    summaries = tuple(
        ConditionSummary(
            condition=name,
            kind="control" if pool else name.rpartition("/")[2],
            behavior="" if pool else name.rpartition("/")[0],
            pool=pool,
            layer=layer,
            chains=50 if pool else 100,
            accuracy=Estimate(0.81 - 0.002 * i, 0.75, 0.87),
            parsed=0.981,
            finished=0.99,
            length=151.25 + i,
            sentences=24.5,
            sentence_length=6.2,
            repetition=0.031,
            compression=0.45,
            nll=None if margins.nll is None else 1.21,
            kl=None if margins.nll is None else 0.05,
            text=text(name),
        )
        for i, (name, pool, layer) in enumerate(rows)
    )
    names = ("rules", *others) if others else ("",)
    return Evaluation(tuple(found), summaries, 50, 2, n_controls, 1, "onsets", "difference", names, tuple(without))


def modes():
    """Of a cache edit that makes the model think, beside two random ones."""
    from lensteer.evaluation import Modes, ModeSummary
    from lensteer.statistics import Estimate

    def condition(name, mean):
        share = Estimate(mean, mean - 0.1, mean + 0.1)
        return ModeSummary(
            condition=name,
            kind="control" if name.startswith("random") else "other",
            thinks=share,
            accuracy=None if name == "cache" else share,
            parsed=share,
            finished=share,
            length=Estimate(100 * mean, 90 * mean, 110 * mean),
            styles={},
        )

    return Modes(
        (
            condition("unsteered", 0.2),
            condition("cache", 0.9),
            condition("random-0", 0.21),
            condition("random-1", 0.25),
        ),
        40,
        1,
    )


def cache():
    """The results of a one-shot cache edit."""
    return {
        "c_values": 0.75,
        "vector": {"label": "stepwise", "position": "last_prompt", "n_pairs": 80},
        "test": modes(),
    }


def controls():
    """Scores by layer beside those of 49 control vectors of both kinds."""
    from dataclasses import replace

    draws = 0.3 * torch.rand(49, len(B4), 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return replace(layer_scores(), method="fisher", controls={"shuffled": draws, "covariance_matched": draws.flip(0)})


def results(**changes):
    """All of it, as one run."""
    from lensteer.report import Example, RunResults

    values = dict(
        title="lensteer demo",
        model={
            "name": "organism", "revision": "", "n_layers": 8, "d_model": 192,
            "weights": "0123456789abcdef", "tokenizer": "00ff", "template": "aa11",
        },
        config={"seed": 0, "n_train": 300, "tasks": "organism", "coefficients": [0.15, 0.3]},
        traces=[trace(), trace(name="maze-0002")],
        annotator={
            "name": "rules", "against": "the labels that the chains came with", "n_sentences": 1234, "n_chains": 50,
            "macro_f1": 0.45, "macro_f1_low": 0.42, "macro_f1_high": 0.48, "kappa": 0.4, "kappa_low": 0.36,
            "kappa_high": 0.44, "f1.backtracking": 0.61, "f1.backtracking_low": 0.55, "f1.backtracking_high": 0.66,
            "names": ["rules", "judge"], "judge.macro_f1": 0.6, "judge.kappa": 0.5,
        },
        alignment={"given": 0, "matched": 4321, "repaired": 2, "dropped": 1, "unparsed": 7},
        vectors=vectors(),
        overlap=overlap(),
        scores=layer_scores(),
        layers=layers(),
        cosine=cosines(),
        coefficients=coefficients(),
        evaluation=evaluation(),
        seconds={"traces": 40.25, "evaluate": 122.5},
        reference=None,
        examples=(
            Example("", "unsteered", trace()),
            Example("backtracking", "down", trace()),
            Example("backtracking", "up", trace()),
        ),
        plan={
            "chains": {"coefficients": 760, "own": 1300, "controls": 9000}, "tokens_per_chain": 151.2, "minutes": 3.5,
            "power": [{"behavior": "adding-knowledge", "base": 0.004, "events": 9.5, "fall": None, "down": False}],
        },
        notes=("adding-knowledge: about 9 sentences on 7 tasks are expected unsteered.",),
    )  # fmt: skip
    return RunResults(**{**values, **changes})
