"""Small results made by hand, for tests of what shows results. No model, no computing; seeded where a value is free."""

from __future__ import annotations

import torch

B4 = ("adding-knowledge", "example-testing", "uncertainty-estimation", "backtracking")
SITE = {"adding-knowledge": 3, "example-testing": 4, "uncertainty-estimation": 4, "backtracking": 5}


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
    from lensteer.overlap import EmbeddingOverlap, NearestTokens

    layer = torch.arange(n_layers, dtype=torch.float32)

    def side(sign: int) -> NearestTokens:
        maximum = torch.stack(
            [0.15 + 0.3 * torch.exp(-(layer if sign > 0 else layer.flip(0)) / (1 + b)) for b in range(4)]
        )
        cosines = maximum[..., None] * torch.tensor([1.0, -0.8, 0.6])
        texts = tuple(tuple(words for _ in range(n_layers)) for _ in labels)
        return NearestTokens(maximum, torch.zeros(len(labels), n_layers, 3, dtype=torch.long), cosines, texts)

    return EmbeddingOverlap(tuple(labels), tuple(range(n_layers)), side(1), side(-1))


def site():
    from lensteer.selection import Site

    why = {b: f"layer {n} of 8: the largest exact KL (0.3{n} nats); layer 0 left out" for b, n in SITE.items()}
    return Site(SITE, why)


def cosines(labels=B4):
    from lensteer.geometry import CosineMatrix

    values = torch.full((len(labels), len(labels)), 0.3, dtype=torch.float64) + 0.7 * torch.eye(len(labels))
    values[0, 1] = values[1, 0] = -0.41
    values[0, 2] = values[2, 0] = torch.nan
    return CosineMatrix(tuple(labels), tuple(SITE[b] for b in labels), values, values - 0.1, values + 0.1)


def vectors(labels=B4, n_layers=8, width=4):
    from lensteer.directions import Recipe
    from lensteer.vectors import BehaviorVectors

    raw = torch.randn(len(labels), n_layers, width, generator=torch.Generator().manual_seed(0))
    counts = {label: 100 + 10 * b for b, label in enumerate(labels)}
    return BehaviorVectors(raw, torch.ones(n_layers), tuple(labels), tuple(range(n_layers)), counts, 300, Recipe())


def doses():
    from lensteer.evaluation import Dose, Doses

    curve = [
        Dose(b, layer, c, 1 - 0.03 * c * c * (1 + 0.2 * layer), 0.12 + 0.05 * c)
        for b, layer in SITE.items()
        for c in (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
    ]
    return Doses({b: 1.0 if b == "backtracking" else 0.5 for b in SITE}, tuple(curve), 0.95, 40)


def evaluation(words=True, n_random=20):
    """Backtracking moves both ways, uncertainty only up, example-testing only down, adding-knowledge neither."""
    from lensteer.evaluation import ArmSummary, Effect, Evaluation

    moves = {
        "adding-knowledge": (-0.005, 0.01),
        "example-testing": (-0.06, 0.01),
        "uncertainty-estimation": (-0.005, 0.13),
        "backtracking": (-0.08, 0.171),
    }
    found = []
    for behavior, (down, up) in moves.items():
        for kind, change in (("down", down), ("up", up), ("words", 0.2)):
            for unit, factor in (("sentences", 1.0), ("tokens", 1.1)):
                change_, base = change * factor, 0.123 * factor
                coefficient = {"down": -0.5, "up": 0.5, "words": 0.0}[kind]
                if kind == "words" and not words:
                    continue
                found.append(
                    Effect(
                        behavior=behavior,
                        kind=kind,
                        layer=-1 if kind == "words" else SITE[behavior],
                        coefficient=coefficient,
                        unit=unit,
                        share=base + change_,
                        share_low=base + change_ - 0.02,
                        share_high=base + change_ + 0.025,
                        base=base,
                        base_low=base - 0.015,
                        base_high=base + 0.016,
                        change=change_,
                        low=change_ - 0.018,
                        high=change_ + 0.019,
                        null_low=-0.021,
                        null_high=0.017,
                        p_value=1 / 21 if abs(change) > 0.02 else 9 / 21,
                        wrong_way=0.1,
                    )
                )
    arms = ["unsteered", *(f"{b}/{k}" for b in moves for k in (("down", "up", "words") if words else ("down", "up")))]
    arms += [f"L{layer}/random-{i}" for layer in (3, 4, 5) for i in range(n_random)]
    summaries = tuple(
        ArmSummary(name, 0.81 - 0.002 * i, 0.75, 0.87, 0.981, 0.99, 151.25 + i, 24.5, 0.031)
        for i, name in enumerate(arms)
    )
    return Evaluation(tuple(found), summaries, {"sentences": {}, "tokens": {}}, 50, 2, n_random, "thinking")


def results(**changes):
    """All of it, as one run."""
    from lensteer.report import RunResults

    values = dict(
        title="lensteer demo",
        model={
            "name": "organism", "revision": "", "n_layers": 8, "d_model": 192,
            "weights": "0123456789abcdef", "tokenizer": "00ff", "template": "aa11",
        },
        config={"seed": 0, "n_train": 300, "tasks": "organism", "doses": [0.15, 0.3]},
        traces=[trace(), trace(name="maze-0002")],
        annotator={
            "name": "rules", "against": "the labels that the chains came with", "n_sentences": 1234, "n_chains": 50,
            "macro_f1": 0.45, "macro_f1_low": 0.42, "macro_f1_high": 0.48, "kappa": 0.4, "kappa_low": 0.36,
            "kappa_high": 0.44, "f1.backtracking": 0.61, "f1.backtracking_low": 0.55, "f1.backtracking_high": 0.66,
        },
        alignment={"matched": 4321, "repaired": 2, "dropped": 1, "unparsed": 7},
        vectors=vectors(),
        overlap=overlap(),
        scores=layer_scores(),
        site=site(),
        cosine=cosines(),
        doses=doses(),
        evaluation=evaluation(),
        seconds={"traces": 40.25, "evaluate": 122.5},
        reference=None,
        example=trace(),
        steered={"backtracking/down": trace(), "backtracking/up": trace()},
    )  # fmt: skip
    return RunResults(**{**values, **changes})
