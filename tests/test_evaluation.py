"""Evaluation: arms that differ by what was done alone, figures against plain arithmetic, doses, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch

import synthetic
from lensteer.annotation import grammar, rules
from lensteer.behaviors import BEHAVIORS, Sentence
from lensteer.errors import LensteerError
from lensteer.evaluation import (
    Arm,
    Doses,
    Effect,
    Evaluation,
    Record,
    ResampledShares,
    Sampling,
    choose_coefficients,
    evaluate,
    interval_of,
    measure,
    random_directions,
    run_arms,
    summarize,
)
from lensteer.positions import onsets, thinking
from lensteer.statistics import Ratio, bootstrap_interval
from lensteer.steering import SteeringPlan
from lensteer.tasks import Task, load_tasks

B = "backtracking"
SAMPLING = Sampling(n_samples=2, seed=3, max_new_tokens=40, batch_size=5)


# --- what is kept of a chain ----------------------------------------------------------------------


def annotated(unparsed=1):
    from lensteer.annotation import annotate

    response = "Wait, no. Blah blah. So B.\n</think>\nAnswer: exit<|im_end|>"
    trace = dataclasses.replace(
        synthetic.trace(response),
        response_ids=(7,) * len(response),
    )
    labels = [B, "unparsed" if unparsed else "deduction", "deduction"]
    texts = ["Wait, no.", "Blah blah.", "So B."]
    (found,) = annotate([trace], lambda _: [[Sentence(*pair) for pair in zip(labels, texts, strict=True)]])
    return found


def test_what_is_measured_of_a_chain():
    record = measure(annotated(), "up")
    assert (record.arm, record.task, record.sample) == ("up", "maze-0001", 0)
    assert record.n_sentences == 3  # with the one that could not be read
    assert record.sentences == {**dict.fromkeys(BEHAVIORS, 0), B: 1, "deduction": 1}
    assert record.tokens == {**dict.fromkeys(BEHAVIORS, 0), B: 9, "deduction": 5}  # a token a character here
    assert record.n_tokens == len("Wait, no. Blah blah. So B.\n")
    assert (record.finished, record.correct, record.length) == (True, True, len(annotated().response))
    assert record.repetition > 0.9


@pytest.mark.parametrize(
    ("change", "parsed"),
    [
        ({}, True),
        ({"finished": False}, False),
        ({"n_unparsed": 1}, False),
        ({"spans": ()}, False),
        ({"response": annotated().response.replace("</think>", "________")}, False),
    ],
)
def test_what_counts_as_parsed(change, parsed):
    assert measure(dataclasses.replace(annotated(unparsed=0), **change), "up").parsed is parsed


# --- arms -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks():
    return load_tasks(split="test", n=3)


@pytest.fixture(scope="module")
def arms(organism, random_direction):
    plan = SteeringPlan(random_direction(organism), 3, 4.0, thinking)
    return [Arm("unsteered"), Arm("again"), Arm("steered", plan), Arm("words", words="Be careful.")]


@pytest.fixture(scope="module")
def records(organism, tasks, arms):
    return run_arms(organism, tasks, arms, SAMPLING)


def nameless(records, arm):
    return [dataclasses.replace(r, arm="") for r in records if r.arm == arm]


def test_every_arm_has_every_chain_in_order(records, tasks, arms):
    assert [(r.arm, r.task, r.sample) for r in records] == [
        (a.name, t.id, s) for a in arms for t in tasks for s in (0, 1)
    ]


def test_arms_share_their_seeds_and_differ_by_what_was_done(records):
    assert nameless(records, "again") == nameless(records, "unsteered")
    assert nameless(records, "steered") != nameless(records, "unsteered")
    assert nameless(records, "words") != nameless(records, "unsteered")
    first, second = records[:2]
    assert dataclasses.replace(first, sample=1) != second


def test_an_arm_is_the_same_alone_as_beside_others(organism, tasks, arms, records):
    for arm in arms[1:]:
        assert run_arms(organism, tasks, [arm], SAMPLING) == [r for r in records if r.arm == arm.name]


def test_tasks_do_not_depend_on_one_another(organism, tasks, arms, records):
    alone = run_arms(organism, tasks[2:], arms[:1], SAMPLING)
    assert alone == [r for r in records if r.arm == "unsteered" and r.task == tasks[2].id]


def test_words_go_behind_the_prompt_and_keep_sees_every_chain_once(organism, tasks, arms):
    seen = []
    run_arms(organism, tasks[:2], [arms[0], arms[3]], SAMPLING, keep=lambda arm, trace: seen.append((arm, trace)))
    assert sorted((arm, t.id) for arm, t in seen) == sorted(
        (arm, f"{t.id}/{s}") for arm in ("unsteered", "words") for t in tasks[:2] for s in (0, 1)
    )
    for arm, trace in seen:
        asked = trace.task.prompt + (" Be careful." if arm == "words" else "")
        assert f"{asked}<|im_end|>" in trace.prompt


def test_a_killed_run_resumes_to_the_same_file_and_records(organism, tasks, arms, records, tmp_path, monkeypatch):
    module = importlib.import_module("lensteer.evaluation.arms")
    path = tmp_path / "arms.jsonl"
    assert run_arms(organism, tasks, arms, SAMPLING, path=path) == records
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 1 + len(records)
    batches = []
    generate = module.generate
    monkeypatch.setattr(module, "generate", lambda *a, **k: batches.append(len(a[1])) or generate(*a, **k))
    for kept, n_batches in ((whole, 0), (whole[:-1], 1), (b"".join(lines[:9]), 4), (lines[0][:20], 5), (b"", 5)):
        batches.clear()
        path.write_bytes(kept)
        assert run_arms(organism, tasks, arms, SAMPLING, path=path) == records
        assert path.read_bytes() == whole
        assert len(batches) == n_batches
        assert batches == [5, 5, 5, 5, 4][5 - n_batches :]  # a batch is made whole or not at all


def changed(plan, **change):
    return dataclasses.replace(plan, **change)


@pytest.mark.parametrize(
    "change",
    [
        "tasks",
        "answer",
        "sampling",
        "name",
        "words",
        "coefficient",
        "layer",
        "scope",
        "vector",
        "plan that is on",
        "model",
        "annotator",
    ],
)
def test_a_file_of_another_experiment_is_refused(change, organism, tiny_model, random_direction, tmp_path):
    from lensteer.positions import everywhere

    path = tmp_path / "arms.jsonl"
    model, tasks, sampling = organism, load_tasks(split="test", n=2), Sampling(max_new_tokens=1)
    direction = random_direction(organism)
    direction.raw[:] = torch.arange(direction.raw.shape[-1]) % 2 * 2 - 1
    plan = SteeringPlan(direction, 3, 1.0, thinking)
    run_arms(model, tasks, [Arm("a", plan)], sampling, path=path)
    before, arm = path.read_bytes(), Arm("a", plan)
    if change == "tasks":
        tasks = load_tasks(split="test", n=3)
    elif change == "answer":
        tasks[0] = dataclasses.replace(tasks[0], answer="else")
    elif change == "sampling":
        sampling = Sampling(max_new_tokens=1, seed=1)
    elif change == "name":
        arm = Arm("b", plan)
    elif change == "words":
        arm = Arm("a", plan, "Hurry.")
    elif change == "coefficient":
        arm = Arm("a", changed(plan, coefficient=0.5))
    elif change == "layer":
        arm = Arm("a", changed(plan, layer=4))
    elif change == "scope":
        arm = Arm("a", changed(plan, scope=everywhere))
    elif change == "vector":  # the opposite one, whose sum is 0 as well
        arm = Arm("a", changed(plan, direction=dataclasses.replace(direction, raw=direction.raw.flip(-1))))
    elif change == "model":
        model, arm = tiny_model("qwen2", opens_thinking=True), Arm("a")
    with plan.on(model) if change == "plan that is on" else contextlib.nullcontext():
        annotator = partial(rules) if change == "annotator" else grammar
        with pytest.raises(LensteerError, match="another experiment"):
            run_arms(model, tasks, [arm], sampling, annotator=annotator, path=path)
    assert path.read_bytes() == before


def test_corrupt_files_are_refused_by_name(organism, tasks, tmp_path):
    path = tmp_path / "arms.jsonl"
    sampling = Sampling(max_new_tokens=1)
    run_arms(organism, tasks, [Arm("a")], sampling, path=path)
    head, *rest = path.read_text().splitlines(keepends=True)
    for text, words in (
        ("[]\n", "not a JSON object"),
        (head + '{"arm": "a"}\n' + rest[0], "no record"),
        (head + "not JSON\n", "line 2"),
        ("\n" + rest[0], "another experiment"),
    ):
        path.write_text(text)
        with pytest.raises(LensteerError, match=words) as error:
            run_arms(organism, tasks, [Arm("a")], sampling, path=path)
        assert str(path) in str(error.value)


def test_impossible_experiments_are_refused(organism, tasks):
    for given, arms, words in (
        ([], [Arm("a")], "no tasks"),
        (tasks, [Arm("a"), Arm("b"), Arm("a")], r"arms share a name: \['a'\]"),
        ([tasks[0], tasks[0]], [Arm("a")], rf"tasks share an id: \['{tasks[0].id}'\]"),
    ):
        with pytest.raises(LensteerError, match=words):
            run_arms(organism, given, arms, Sampling(max_new_tokens=1))


@pytest.mark.parametrize(
    "options",
    [
        {"n_samples": 0},
        {"batch_size": 0},
        {"max_new_tokens": -1},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"n_samples": 2, "temperature": 0.0},
    ],
)
def test_impossible_sampling_is_refused(options):
    with pytest.raises(LensteerError, match=str(next(iter(options.values())))):
        Sampling(**options)


# --- figures against plain arithmetic -------------------------------------------------------------

SITE = {B: 4, "example-testing": 3}


def record(arm, task, sample=0, own=None, n=10, correct=True, **more):
    sentences = {**dict.fromkeys(BEHAVIORS, 0), **(own or {})}
    tokens = {b: 3 * count + (b == B) * (task == "t1") for b, count in sentences.items()}
    values = dict(parsed=True, finished=True, length=40, repetition=0.25)
    values.update(more)
    return Record(arm, task, sample, sentences, tokens, n, 4 * n, correct=correct, **values)


def simulated(seed, *, up=0.0, down=0.0, n_tasks=40, n_random=19, n_samples=2, base=0.15):
    """Chains whose tasks differ in propensity; `up` and `down` are added to it in the steered arms."""
    rng = np.random.default_rng(seed)
    propensity = rng.uniform(0.5, 1.5, n_tasks) * base
    shifts = {"unsteered": 0.0, f"{B}/down": down, f"{B}/up": up}
    shifts |= {f"L4/random-{i}": 0.0 for i in range(n_random)}
    found = []
    for arm, shift in shifts.items():
        for task in range(n_tasks):
            for sample in range(n_samples):
                n = int(rng.integers(5, 30))
                hits = int(rng.binomial(n, np.clip(propensity[task] + shift, 0, 1)))
                found.append(record(arm, f"t{task:02}", sample, {B: hits}, n, bool(rng.random() < 0.7)))
    return found


def slow_share(rows, behavior, unit):
    own = sum((r.sentences if unit == "sentences" else r.tokens)[behavior] for r in rows)
    return own / sum(r.n_sentences if unit == "sentences" else r.n_tokens for r in rows)


def test_effects_are_those_of_plain_arithmetic():
    records = simulated(1, up=0.1, down=-0.05, n_tasks=12, n_random=7)
    random.Random(0).shuffle(records)  # in any order
    found = summarize(records, {B: 4}, {B: 0.5}, 2, "thinking")
    by_arm = {name: [r for r in records if r.arm == name] for name in {r.arm for r in records}}
    tasks = sorted({r.task for r in records})
    assert (found.n_tasks, found.n_samples, found.n_random, found.scope) == (12, 2, 7, "thinking")
    assert {(e.behavior, e.kind, e.unit) for e in found.effects} == {
        (B, kind, unit) for kind in ("down", "up") for unit in ("sentences", "tokens")
    }
    for effect in found.effects:
        sign = {"down": -1, "up": 1}[effect.kind]
        arm, base = by_arm[f"{B}/{effect.kind}"], by_arm["unsteered"]
        assert (effect.layer, effect.coefficient) == (4, 0.5 * sign)
        assert effect.share == pytest.approx(slow_share(arm, B, effect.unit))
        assert effect.base == pytest.approx(slow_share(base, B, effect.unit))
        assert effect.base_low < effect.base < effect.base_high
        assert effect.change == pytest.approx(effect.share - effect.base)
        null = [slow_share(by_arm[f"L4/random-{i}"], B, effect.unit) - effect.base for i in range(7)]
        assert sorted(found.nulls[effect.unit][f"4/{B}"]) == pytest.approx(sorted(null))
        assert (effect.null_low, effect.null_high) == pytest.approx((min(null), max(null)))
        as_far = sum(value * sign >= effect.change * sign for value in null)
        assert effect.p_value == pytest.approx((1 + as_far) / 8)
        wrong = 0
        for task in tasks:
            mine = [[r for r in rows if r.task == task] for rows in (arm, base)]
            wrong += sign * (slow_share(mine[0], B, effect.unit) - slow_share(mine[1], B, effect.unit)) < 0
        assert effect.wrong_way == pytest.approx(wrong / 12)
        # Intervals: tasks drawn with replacement, both arms together.
        rng, changes, shares = random.Random(0), [], []
        for _ in range(1500):
            drawn = rng.choices(tasks, k=12)
            rows = [[r for t in drawn for r in own if r.task == t] for own in (arm, base)]
            shares.append(slow_share(rows[0], B, effect.unit))
            changes.append(shares[-1] - slow_share(rows[1], B, effect.unit))
        spread = np.std(changes)
        assert [effect.low, effect.high] == pytest.approx(np.quantile(changes, [0.025, 0.975]), abs=0.25 * spread)
        assert [effect.share_low, effect.share_high] == pytest.approx(
            np.quantile(shares, [0.025, 0.975]), abs=0.25 * np.std(shares)
        )


def test_arms_are_summarized_with_accuracy_by_task():
    rows = [
        record("unsteered", "t0", 0, {B: 1}, 4, True, length=10, repetition=0.0),
        record("unsteered", "t0", 1, {B: 1}, 6, False, parsed=False, length=20, repetition=0.5),
        record("unsteered", "t1", 0, {B: 0}, 8, True, finished=False),
        record("unsteered", "t1", 1, {B: 0}, 2, True),
        record("unsteered", "t2", 0, {B: 0}, 2, None),  # not graded: in all means but accuracy
        record("unsteered", "t2", 1, {B: 0}, 2, None),
    ]
    (arm,) = summarize(rows, {B: 4}, {B: 1.0}, 2, "thinking").arms
    assert arm.accuracy == pytest.approx(3 / 4)
    assert 0.5 <= arm.accuracy_low <= 0.75 <= arm.accuracy_high <= 1
    assert (arm.parsed, arm.finished) == pytest.approx((5 / 6, 5 / 6))
    assert (arm.length, arm.sentences, arm.repetition) == pytest.approx((190 / 6, 4, 1.5 / 6))
    ungraded = [dataclasses.replace(row, correct=None) for row in rows]
    assert math.isnan(summarize(ungraded, {B: 4}, {B: 1.0}, 2, "thinking").arms[0].accuracy)


def test_a_planted_effect_is_shown_and_its_size_recovered():
    found = summarize(simulated(2, up=0.12, down=-0.08, n_tasks=100), {B: 4}, {B: 1.0}, 2, "thinking")
    for kind, planted in (("up", 0.12), ("down", -0.08)):
        for unit in ("sentences", "tokens"):
            effect = found.effect(B, kind, unit)
            assert effect.shown
            assert effect.p_value == 1 / 20
            assert effect.wrong_way < 0.5
        effect = found.effect(B, kind)
        assert effect.low < planted < effect.high
        assert effect.high - effect.low < 0.08


def test_a_planted_null_is_seldom_shown_and_its_p_is_uniform():
    """Under the null each of 20 vectors is the farthest one time in 20, and the interval must also exclude 0."""
    effects = [
        effect
        for seed in range(40)
        for effect in summarize(simulated(seed, n_tasks=20), {B: 4}, {B: 1.0}, 2, "thinking").effects
        if effect.unit == "sentences"
    ]
    assert sum(e.shown for e in effects) <= 10
    assert sum(e.p_value <= 0.05 for e in effects) <= 10
    assert 0.35 < np.mean([e.p_value for e in effects]) < 0.7
    assert sum(e.low <= 0 <= e.high for e in effects) >= 66  # of 80, at 95 %
    assert not any(e.shown for e in effects if e.kind == "up" and e.change < 0)


def test_the_wrong_direction_is_not_shown():
    found = summarize(simulated(3, up=-0.1, down=0.1), {B: 4}, {B: 1.0}, 2, "thinking")
    for kind in ("up", "down"):
        effect = found.effect(B, kind)
        assert not effect.shown
        assert effect.p_value == 1.0
        assert effect.wrong_way > 0.5


def effect(kind="up", change=0.1, low=0.05, high=0.15, null_low=-0.02, null_high=0.02):
    values = dict(layer=4, coefficient=1.0, unit="sentences", share=0.2, share_low=0.1, share_high=0.3)
    values |= dict(base=0.1, base_low=0.05, base_high=0.15)
    return Effect(B, kind, **values, change=change, low=low, high=high, null_low=null_low, null_high=null_high,
                  p_value=0.05, wrong_way=0.0)  # fmt: skip


@pytest.mark.parametrize("kind", ["up", "words", "down"])
def test_what_shown_means(kind):
    def shown(change, low, high, null_low=-0.02, null_high=0.02):
        if kind == "down":  # the mirror image
            change, low, high, null_low, null_high = -change, -high, -low, -null_high, -null_low
        return effect(kind, change, low, high, null_low, null_high).shown

    assert shown(0.1, 0.05, 0.15)
    assert not shown(0.1, 0.0, 0.15)  # the interval touches 0
    assert not shown(0.1, -0.01, 0.15)
    assert not shown(0.1, 0.05, 0.15, null_high=0.1)  # a random vector does as much
    assert not shown(0.1, 0.05, 0.15, null_high=0.11)
    assert shown(0.1, 0.05, 0.15, null_low=-0.5)  # the other way does not matter
    assert not shown(-0.1, -0.15, -0.05)  # the wrong way
    assert shown(0.1, 0.05, 0.15, null_low=0.0, null_high=0.0)  # no random vectors: the interval alone speaks
    for bad in range(3):
        values = [0.1, 0.05, 0.15]
        values[bad] = math.nan
        assert not shown(*values) or (bad == 2)  # the far end alone says nothing
    assert not shown(0.1, 0.05, 0.15, null_low=math.nan, null_high=math.nan)


def test_no_random_vectors_and_words():
    records = simulated(4, up=0.2, n_random=0)
    records += [dataclasses.replace(r, arm=f"{B}/words") for r in records if r.arm == f"{B}/up"]
    found = summarize(records, {B: 4}, {B: 1.0}, 2, "thinking")
    up, words = found.effect(B, "up"), found.effect(B, "words")
    assert (up.null_low, up.null_high, up.p_value, found.n_random) == (0.0, 0.0, 1.0, 0)
    assert up.shown
    assert (words.layer, words.coefficient) == (-1, 0.0)
    assert (words.change, words.low, words.high, words.shown) == (up.change, up.low, up.high, True)


def test_random_vectors_are_those_of_the_behaviors_layer():
    records = simulated(5, up=0.1, n_random=3)
    far = [dataclasses.replace(r, arm=r.arm.replace("L4/", "L3/"), n_sentences=max(r.sentences[B], 1))
           for r in records if r.arm.startswith("L4/")]  # fmt: skip
    records += [dataclasses.replace(r, arm=f"example-testing/{r.arm[-2:]}") for r in records if r.arm == f"{B}/up"]
    found = summarize(records + far, SITE, dict.fromkeys(SITE, 1.0), 2, "thinking")
    assert found.effect(B, "up").null_high < 0.1
    assert found.effect("example-testing", "up").null_high == 0.0  # none of it anywhere
    assert set(found.nulls["sentences"]) == {f"4/{B}", "3/example-testing"}
    same = summarize(records + far, {B: 3}, {B: 1.0}, 2, "thinking")
    assert same.effect(B, "up").null_high > 0.5
    assert not same.effect(B, "up").shown


def test_an_arm_that_writes_no_sentence_counts_against_the_claim():
    records = simulated(6, up=0.2, n_random=3)

    def silent(arm):
        return [
            dataclasses.replace(r, sentences=dict.fromkeys(BEHAVIORS, 0), tokens=dict.fromkeys(BEHAVIORS, 0),
                                n_sentences=0, n_tokens=0) if r.arm == arm else r
            for r in records
        ]  # fmt: skip

    assert summarize(records, {B: 4}, {B: 1.0}, 2, "thinking").effect(B, "up").shown
    for arm in ("L4/random-0", "L4/random-1", "L4/random-2"):
        found = summarize(silent(arm), {B: 4}, {B: 1.0}, 2, "thinking").effect(B, "up")
        assert (found.p_value, found.shown) == (2 / 4, False)
    found = summarize(silent(f"{B}/up"), {B: 4}, {B: 1.0}, 2, "thinking").effect(B, "up")
    assert (found.p_value, found.shown) == (1.0, False)


# --- evaluate: the arms that it runs --------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors(organism):
    from lensteer import models

    return synthetic.vectors(n_layers=models.n_layers(organism), width=models.d_model(organism))


def test_evaluate_runs_both_signs_words_and_random_vectors_of_the_longest_edit(organism, vectors, monkeypatch):
    module = importlib.import_module("lensteer.evaluation.effects")
    seen = []

    def fake(model, tasks, arms, sampling, **options):
        seen.extend(arms)
        return [record(arm.name, t.id, s, {B: i % 3}) for arm in arms for i, t in enumerate(tasks) for s in (0, 1)]

    monkeypatch.setattr(module, "run_arms", fake)
    tasks = load_tasks(split="test", n=4)
    site = {B: 3, "example-testing": 3, "adding-knowledge": 5}
    strength = {B: 0.5, "example-testing": 0.75, "adding-knowledge": 0.25, "uncertainty-estimation": math.nan}
    found = evaluate(organism, tasks, vectors, site, strength, words={B: "Go back."}, n_random=2, seed=1)
    plans = {arm.name: arm.plan for arm in seen}
    assert plans["unsteered"] is None
    assert plans[f"{B}/words"] is None
    assert [arm.words for arm in seen if arm.words] == ["Go back."]
    for behavior, layer in site.items():
        for kind, sign in (("down", -1), ("up", 1)):
            plan = plans[f"{behavior}/{kind}"]
            assert (plan.direction.label, plan.layer, plan.coefficient) == (behavior, layer, sign * strength[behavior])
            assert plan.scope == onsets
    random_arms = {name: plan for name, plan in plans.items() if "random" in name}
    assert sorted(random_arms) == ["L3/random-0", "L3/random-1", "L5/random-0", "L5/random-1"]
    for name, plan in random_arms.items():
        longest = 0.75 if name.startswith("L3") else 0.25
        edit = plan.coefficient * plan.vector
        assert float(edit.norm()) == pytest.approx(longest * float(vectors.mean_norm[plan.layer]), rel=1e-5)
    assert len(seen) == 1 + 2 * 3 + 1 + 4
    assert (found.n_tasks, found.n_samples, found.n_random) == (4, 2, 2)


def test_random_directions_are_seeded_and_unlike(vectors):
    first, again, other = (random_directions(vectors, 4, 8, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(a.raw, b.raw) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.raw, b.raw) for a, b in zip(first, other, strict=True))
    units = torch.cat([d.raw / d.raw.norm() for d in first])
    assert float((units @ units.T - torch.eye(8)).abs().max()) < 0.6
    assert random_directions(vectors, 4, 0) == []
    for layer, n in ((99, 1), (4, -1)):
        with pytest.raises(LensteerError, match=f"{n} random vectors at layer {layer}"):
            random_directions(vectors, layer, n)


def test_evaluate_refuses_what_cannot_be(organism, vectors):
    tasks = load_tasks(split="test", n=2)

    def refused(words, tasks=tasks, site=None, coefficients=1.0, **options):
        with pytest.raises(LensteerError, match=words):
            evaluate(organism, tasks, vectors, site or {B: 3}, coefficients, **options)

    refused("at least two", tasks=tasks[:1])
    refused("nonsense", site={"nonsense": 3})
    refused("99", site={B: 99})
    for bad in (math.nan, math.inf, -math.inf, 0.0, -0.5):
        refused(f"coefficient {bad}", coefficients=bad)
        refused(f"coefficient {bad}", coefficients={B: bad})
    refused("coefficient None", coefficients={"example-testing": 1.0})
    refused("-1 random", n_random=-1)


def test_an_evaluation_is_saved_and_read_back(tmp_path):
    found = summarize(simulated(7, n_tasks=5, n_random=2), {B: 4}, {B: 1.0}, 2, "thinking")
    found.save(tmp_path / "deep" / "evaluation.json")
    assert Evaluation.load(tmp_path / "deep" / "evaluation.json") == found
    assert list(found.to_dataframe()["shown"]) == [e.shown for e in found.effects]
    assert list(found.arms_dataframe()["arm"]) == [a.arm for a in found.arms]
    with pytest.raises(LensteerError, match="there are"):
        found.effect(B, "sideways")


@pytest.mark.parametrize(
    "data", [None, b"", b"null", b"[]", b'"text"', b"{}", b'{"effects": [{}], "arms": []}', b"\xff"]
)
@pytest.mark.parametrize("kind", [Evaluation, Doses])
def test_what_cannot_be_read_is_named(kind, data, tmp_path):
    path = tmp_path / "file.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(LensteerError, match=r"file\.json"):
        kind.load(path)


# --- doses ----------------------------------------------------------------------------------------


@pytest.fixture
def dosed(monkeypatch, organism, vectors):
    """Choose among doses when so many of ten chains parse: `parsed[behavior][signed coefficient]`, else all."""
    module = importlib.import_module("lensteer.evaluation.doses")
    tasks = [Task(f"t{i}", "logic", "dev", "?") for i in range(10)]
    names = []

    def choose(parsed, *, site=None, **options):
        def fake(model, tasks, arms, sampling, **more):
            names[:] = [arm.name for arm in arms]
            found = []
            for arm in arms:
                behavior = "" if arm.plan is None else arm.plan.direction.label
                strength = 0.0 if arm.plan is None else arm.plan.coefficient
                good = parsed.get(behavior, {}).get(strength, 10)
                own = {B: round(5 + 4 * strength)}
                found += [record(arm.name, t.id, 0, own, parsed=i < good) for i, t in enumerate(tasks)]
            return found

        monkeypatch.setattr(module, "run_arms", fake)
        return choose_coefficients(organism, tasks, vectors, site or {B: 3, "example-testing": 4}, **options)

    choose.names = names
    return choose


@pytest.mark.parametrize(
    ("parsed", "chosen"),
    [
        ({}, 1.0),
        ({1.0: 6}, 0.5),
        ({-1.0: 6}, 0.5),  # either way
        ({0.5: 6}, 1.0),  # a larger dose that parses again counts: what failed was chance
        ({0.5: 8, 1.0: 8}, 1.0),  # below by less than a standard error
        ({-0.5: 0, 1.0: 0}, 0.2),
    ],
)
def test_the_largest_dose_that_leaves_chains_readable_is_chosen(dosed, parsed, chosen):
    found = dosed({B: parsed}, doses=(1.0, 0.2, 0.5, 0.2), min_parsed=0.9)
    assert found.coefficients == {B: chosen, "example-testing": 1.0}
    curve = {(d.behavior, d.coefficient): d for d in found.curve}
    assert [c for b, c in curve if b == B] == [-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0]
    assert len(dosed.names) == 1 + 2 * 2 * 3
    for (behavior, coefficient), dose in curve.items():
        assert dose.layer == {B: 3, "example-testing": 4}[behavior]
        assert dose.parsed == (parsed.get(coefficient, 10) / 10 if behavior == B else 1.0)
        assert dose.share == (round(5 + 4 * coefficient) / 10 if behavior == B else 0.0)
    assert (found.min_parsed, found.n_tasks) == (0.9, 10)


def test_doses_that_are_all_too_much_are_an_error_with_its_name(dosed):
    with pytest.raises(LensteerError, match=r"0.2.*along 'example-testing'.*90%"):
        dosed({"example-testing": {-0.2: 6, 1.0: 5}}, doses=(0.2, 1.0), min_parsed=0.9)


@pytest.mark.parametrize("doses", [(), (0.0,), (0.3, -0.3), (math.nan,), (0.3, math.inf)])
def test_impossible_doses_are_refused(dosed, doses):
    with pytest.raises(LensteerError, match="doses"):
        dosed({}, doses=doses)


@pytest.mark.parametrize("share", [-0.1, 1.1, 95.0, math.nan])
def test_an_impossible_share_is_refused(dosed, share):
    with pytest.raises(LensteerError, match="min_parsed"):
        dosed({}, min_parsed=share)


def test_unknown_behaviors_and_layers_are_refused(dosed):
    for site in ({"nonsense": 3}, {B: 99}):
        with pytest.raises(LensteerError, match=r"nonsense|99"):
            dosed({}, site=site)


def test_doses_are_saved_and_read_back(dosed, tmp_path):
    found = dosed({B: {1.0: 3}}, doses=(0.2, 1.0))
    found.save(tmp_path / "doses.json")
    assert Doses.load(tmp_path / "doses.json") == found
    json.loads((tmp_path / "doses.json").read_text(), parse_constant=pytest.fail)
    assert len(found.to_dataframe()) == len(found.curve)


def test_doses_and_effects_run_on_the_organism(organism, vectors, tmp_path):
    """One thin slice without fakes: files are left for resuming, and a second call reads them and generates nothing."""
    sampling = Sampling(max_new_tokens=20)
    dev, test = load_tasks(split="dev", n=2), load_tasks(split="test", n=2)
    options = dict(min_parsed=0.0, doses=(0.2,), sampling=sampling, path=tmp_path / "doses.jsonl")
    doses = choose_coefficients(organism, dev, vectors, {B: 3}, **options)
    assert choose_coefficients(organism, dev, vectors, {B: 3}, **options) == doses
    options = dict(n_random=1, sampling=sampling, path=str(tmp_path / "effects.jsonl"))
    found = evaluate(organism, test, vectors, {B: 3}, doses.coefficients, **options)
    assert evaluate(organism, test, vectors, {B: 3}, 0.2, **options) == found or np.isnan(found.effects[0].change)
    assert [a.arm for a in found.arms] == ["unsteered", f"{B}/down", f"{B}/up", "L3/random-0"]
    assert not any(len(p.fwd_hooks) for p in organism.hook_dict.values())


# --- shares on resampled tasks -------------------------------------------------------------------


def share_records(arm, hits, totals, n_samples=1):
    counts = [dict(dict.fromkeys(BEHAVIORS, 0), backtracking=int(h)) for h in hits]
    return [
        Record(arm, f"t{i // n_samples}", i % n_samples, c, c, n, n, True, True, True, n, 0.0)
        for i, (c, n) in enumerate(zip(counts, map(int, totals), strict=True))
    ]


def test_resampled_shares_are_ratios_of_sums_and_paired_across_arms():
    rng = np.random.default_rng(0)
    totals, hits = rng.integers(5, 30, 40), rng.integers(0, 5, 40)
    records = share_records("a", hits, totals) + share_records("b", hits + 1, totals)
    shares = ResampledShares(records, seed=3)
    found = interval_of(shares.of("a", "backtracking"))
    assert found[0] == pytest.approx(hits.sum() / totals.sum())
    oracle = bootstrap_interval(Ratio(hits, totals), n=4000, seed=9)
    assert found[1:] == pytest.approx((float(oracle.low), float(oracle.high)), abs=0.01)
    # Paired: the difference of the arms varies with the number of sentences alone, far less than either arm.
    difference = shares.of("b", "backtracking") - shares.of("a", "backtracking")
    assert difference.std() < 0.5 * shares.of("a", "backtracking").std()
    with pytest.raises(LensteerError, match="'c'"):
        shares.of("c", "backtracking")


def test_resampling_keeps_a_tasks_samples_together_and_wants_the_same_tasks_everywhere():
    doubled = ResampledShares(share_records("a", [0, 0, 4, 4], [4, 4, 4, 4], n_samples=2))
    assert set(doubled.of("a", "backtracking")) <= {0.0, 0.5, 1.0}  # two tasks, each all or nothing
    with pytest.raises(LensteerError, match="2 lists of tasks"):
        ResampledShares(share_records("a", [1, 2], [3, 3]) + share_records("b", [1, 2, 3], [3, 3, 3]))
