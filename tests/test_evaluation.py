"""Evaluation: conditions differ by what was done alone, figures against plain arithmetic, coefficients, refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

import synthetic
from lensteer.annotation import grammar, rules
from lensteer.behaviors import BEHAVIORS, Sentence
from lensteer.calibration import rollout_kl
from lensteer.errors import LensteerError
from lensteer.evaluation import (
    GRAMMAR_MARGINS,
    ChosenCoefficients,
    Condition,
    Counts,
    Evaluation,
    Margins,
    Record,
    ResampledShares,
    choose_coefficients,
    draw_chains,
    estimate_of,
    evaluate,
    measure,
    on_clean_chains,
    power,
    random_directions,
    run_conditions,
    summarize,
    text_check,
    text_quality,
)
from lensteer.evaluation.controls import control_conditions, match_kl
from lensteer.evaluation.margins import check_standard
from lensteer.files import read_json
from lensteer.forward import forced_logits
from lensteer.generation.jobs import Sampling, generate_traces
from lensteer.metrics import kl_divergence
from lensteer.positions import generated, thinking
from lensteer.statistics import Ratio, bootstrap_interval, holm
from lensteer.steering import SteeringPlan
from lensteer.tasks import Task, load_tasks
from lensteer.vectors import Controls, Direction

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
    record = measure(annotated(), "up", BEHAVIORS)
    assert (record.condition, record.task, record.sample) == ("up", "maze-0001", 0)
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
    assert measure(dataclasses.replace(annotated(unparsed=0), **change), "up", BEHAVIORS).parsed is parsed


# --- conditions -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks():
    return load_tasks(split="test", n=3)


@pytest.fixture(scope="module")
def conditions(organism, random_direction):
    plan = SteeringPlan(random_direction(organism), 3, 4.0, thinking)
    return [
        Condition("unsteered"),
        Condition("again"),
        Condition("steered", plan),
        Condition("prompted", suffix="Be careful."),
    ]


@pytest.fixture(scope="module")
def records(organism, tasks, conditions):
    return run_conditions(organism, tasks, conditions, SAMPLING, annotator=grammar)


def nameless(records, condition):
    return [dataclasses.replace(r, condition="") for r in records if r.condition == condition]


@pytest.mark.medium
def test_every_condition_has_every_chain_in_order(records, tasks, conditions):
    assert [(r.condition, r.task, r.sample) for r in records] == [
        (a.name, t.id, s) for a in conditions for t in tasks for s in (0, 1)
    ]


@pytest.mark.medium
def test_conditions_share_their_seeds_and_differ_by_what_was_done(records):
    assert nameless(records, "again") == nameless(records, "unsteered")
    assert nameless(records, "steered") != nameless(records, "unsteered")
    assert nameless(records, "prompted") != nameless(records, "unsteered")
    first, second = records[:2]
    assert dataclasses.replace(first, sample=1) != second


@pytest.mark.medium
def test_an_condition_is_the_same_alone_as_beside_others(organism, tasks, conditions, records):
    for condition in conditions[1:]:
        assert run_conditions(organism, tasks, [condition], SAMPLING, annotator=grammar) == [
            r for r in records if r.condition == condition.name
        ]


@pytest.mark.medium
def test_tasks_do_not_depend_on_one_another(organism, tasks, conditions, records):
    alone = run_conditions(organism, tasks[2:], conditions[:1], SAMPLING, annotator=grammar)
    assert alone == [r for r in records if r.condition == "unsteered" and r.task == tasks[2].id]


def test_words_go_behind_the_prompt_and_keep_sees_every_chain_once(organism, tasks, conditions):
    seen = []
    run_conditions(
        organism,
        tasks[:2],
        [conditions[0], conditions[3]],
        SAMPLING,
        keep=lambda condition, trace: seen.append((condition.name, trace)),
        annotator=grammar,
    )
    assert sorted((condition, t.id) for condition, t in seen) == sorted(
        (condition, f"{t.id}/{s}") for condition in ("unsteered", "prompted") for t in tasks[:2] for s in (0, 1)
    )
    for condition, trace in seen:
        asked = trace.task.prompt + (" Be careful." if condition == "prompted" else "")
        assert f"{asked}<|im_end|>" in trace.prompt


@pytest.mark.medium
def test_a_killed_run_resumes_to_the_same_file_and_records(organism, tasks, conditions, records, tmp_path, monkeypatch):
    module = importlib.import_module("lensteer.generation.jobs")
    path = tmp_path / "arms.jsonl"
    assert run_conditions(organism, tasks, conditions, SAMPLING, path=path, annotator=grammar) == records
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 1 + len(records)
    batches = []
    generate = module.generate
    monkeypatch.setattr(module, "generate", lambda *a, **k: batches.append(len(a[1])) or generate(*a, **k))
    for kept, n_batches in ((whole, 0), (whole[:-1], 1), (b"".join(lines[:9]), 4), (lines[0][:20], 5), (b"", 5)):
        batches.clear()
        path.write_bytes(kept)
        assert run_conditions(organism, tasks, conditions, SAMPLING, path=path, annotator=grammar) == records
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
        "suffix",
        "coefficient",
        "layer",
        "scope",
        "vector",
        "plan that is on",
        "model",
    ],
)
def test_a_file_of_another_experiment_is_refused(change, organism, tiny_model, random_direction, tmp_path):
    from lensteer.positions import everywhere

    path = tmp_path / "arms.jsonl"
    model, tasks, sampling = organism, load_tasks(split="test", n=2), Sampling(max_new_tokens=1)
    direction = random_direction(organism)
    direction.raw[:] = torch.arange(direction.raw.shape[-1]) % 2 * 2 - 1
    plan = SteeringPlan(direction, 3, 1.0, thinking)
    run_conditions(model, tasks, [Condition("a", plan)], sampling, path=path, annotator=grammar)
    before, condition = path.read_bytes(), Condition("a", plan)
    if change == "tasks":
        tasks = load_tasks(split="test", n=3)
    elif change == "answer":
        tasks[0] = dataclasses.replace(tasks[0], answer="else")
    elif change == "sampling":
        sampling = Sampling(max_new_tokens=1, seed=1)
    elif change == "name":
        condition = Condition("b", plan)
    elif change == "suffix":
        condition = Condition("a", plan, "Hurry.")
    elif change == "coefficient":
        condition = Condition("a", changed(plan, coefficient=0.5))
    elif change == "layer":
        condition = Condition("a", changed(plan, layer=4))
    elif change == "scope":
        condition = Condition("a", changed(plan, scope=everywhere))
    elif change == "vector":  # the opposite one, whose sum is 0 as well
        condition = Condition("a", changed(plan, direction=dataclasses.replace(direction, raw=direction.raw.flip(-1))))
    elif change == "model":
        model, condition = tiny_model("qwen2", opens_thinking=True), Condition("a")
    with plan.on(model) if change == "plan that is on" else contextlib.nullcontext():
        with pytest.raises(LensteerError, match="another experiment"):
            run_conditions(model, tasks, [condition], sampling, path=path, annotator=grammar)
    assert path.read_bytes() == before


def test_another_annotator_costs_no_generation_and_a_failing_one_loses_none(organism, tasks, tmp_path, monkeypatch):
    path, sampling = tmp_path / "arms.jsonl", Sampling(max_new_tokens=12)

    def failing(traces):
        raise RuntimeError("the judge is down")

    with pytest.raises(RuntimeError, match="judge is down"):
        run_conditions(organism, tasks, [Condition("a")], sampling, annotator=failing, path=path)
    assert len(path.read_text().splitlines()) == 1 + len(tasks)
    module = importlib.import_module("lensteer.generation.jobs")
    monkeypatch.setattr(module, "generate", lambda *a, **k: pytest.fail("generated again"))
    both = run_conditions(
        organism, tasks, [Condition("a")], sampling, annotator={"grammar": grammar, "rules": rules}, path=path
    )
    alone = run_conditions(organism, tasks, [Condition("a")], sampling, annotator=rules, path=path)
    assert [r.others["rules"].sentences for r in both] == [r.sentences for r in alone]
    assert [r.by("rules").n_sentences for r in both] == [r.n_sentences for r in alone]
    with pytest.raises(LensteerError, match="no annotator"):
        run_conditions(organism, tasks, [Condition("a")], sampling, annotator={}, path=path)


def test_an_condition_may_have_fewer_chains(organism, tasks):
    conditions = [Condition("a"), Condition("b", n_samples=1)]
    found = run_conditions(organism, tasks, conditions, Sampling(n_samples=2, max_new_tokens=4), annotator=grammar)
    assert [(r.condition, r.sample) for r in found] == [("a", s) for _ in tasks for s in (0, 1)] + [
        ("b", 0) for _ in tasks
    ]


def test_corrupt_files_are_refused_by_name(organism, tasks, tmp_path):
    path = tmp_path / "arms.jsonl"
    sampling = Sampling(max_new_tokens=1)
    run_conditions(organism, tasks, [Condition("a")], sampling, path=path, annotator=grammar)
    head, *rest = path.read_text().splitlines(keepends=True)
    for text, words in (
        ("[]\n", "not a JSON object"),
        (head + '{"condition": "a"}\n' + rest[0], "cannot be read .KeyError: 'task'"),
        (head + "not JSON\n", "line 2"),
        ("\n" + rest[0], "another experiment"),
    ):
        path.write_text(text)
        with pytest.raises(LensteerError, match=words) as error:
            run_conditions(organism, tasks, [Condition("a")], sampling, path=path, annotator=grammar)
        assert str(path) in str(error.value)


def test_impossible_experiments_are_refused(organism, tasks):
    for given, conditions, words in (
        ([], [Condition("a")], "no tasks"),
        (tasks, [Condition("a"), Condition("b"), Condition("a")], r"conditions share a name: \['a'\]"),
        ([tasks[0], tasks[0]], [Condition("a")], rf"tasks share an id: \['{tasks[0].id}'\]"),
    ):
        with pytest.raises(LensteerError, match=words):
            run_conditions(organism, given, conditions, Sampling(max_new_tokens=1), annotator=grammar)


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

LAYERS = {B: 4, "example-testing": 3}
NO_MARGINS = Margins(None, None, None, None, None, None, None)


def record(condition, task, sample=0, own=None, n=10, correct=True, **more):
    sentences = {**dict.fromkeys(BEHAVIORS, 0), **(own or {})}
    tokens = {b: 3 * count + (b == B) * (task == "t1") for b, count in sentences.items()}
    values: dict[str, Any] = dict(parsed=True, finished=True, length=40, repetition=0.25)
    values.update(more)
    return Record(condition, task, sample, sentences, tokens, n, 4 * n, correct=correct, **values)


def plan(layer=4, coefficient=1.0, length=1.0):
    raw = torch.zeros(6, 4)
    raw[:, 0] = length
    return SteeringPlan(Direction("planted", raw, torch.ones(6), tuple(range(6))), layer, coefficient)


def conditions_of(*, layer=4, behavior=B, kinds=("down", "up"), n_controls=19, pool="isotropic"):
    """The conditions of an evaluation by hand: unsteered, both ways, and random vectors at the layer."""
    conditions = [Condition("unsteered", kind="unsteered")]
    for kind in kinds:
        edit = None if kind == "prompted" else plan(layer, -1.0 if kind == "down" else 1.0)
        conditions.append(Condition(f"{behavior}/{kind}", edit, behavior=behavior, kind=kind))
    return conditions + [
        Condition(f"L{layer}/{pool}-{i}", plan(layer), kind="control", pool=pool) for i in range(n_controls)
    ]


def simulated(seed, conditions, *, up=0.0, down=0.0, n_tasks=40, n_samples=2, base=0.15, sentences=(5, 30)):
    """Chains whose tasks differ in propensity; `up` and `down` are added to it in the steered conditions."""
    rng = np.random.default_rng(seed)
    propensity = rng.uniform(0.5, 1.5, n_tasks) * base
    found = []
    for condition in conditions:
        shift = {"up": up, "down": down, "prompted": up}.get(condition.kind, 0.0)
        for task in range(n_tasks):
            for sample in range(n_samples):
                n = int(rng.integers(*sentences))
                hits = int(rng.binomial(n, np.clip(propensity[task] + shift, 0, 1)))
                found.append(record(condition.name, f"t{task:02}", sample, {B: hits}, n, bool(rng.random() < 0.7)))
    return found


def evaluated(seed, *, margins=NO_MARGINS, n_controls=19, kinds=("down", "up"), **options):
    conditions = conditions_of(n_controls=n_controls, kinds=kinds)
    return summarize(simulated(seed, conditions, **options), conditions, margins=margins)


def slow_share(rows, behavior, unit):
    own = sum((r.sentences if unit == "sentences" else r.tokens)[behavior] for r in rows)
    return own / sum(r.n_sentences if unit == "sentences" else r.n_tokens for r in rows)


def test_effects_are_those_of_plain_arithmetic():
    conditions = conditions_of(n_controls=7)
    records = simulated(1, conditions, up=0.1, down=-0.05, n_tasks=12)
    random.Random(0).shuffle(records)  # in any order
    found = summarize(records, conditions, margins=NO_MARGINS)
    by_condition = {name: [r for r in records if r.condition == name] for name in {r.condition for r in records}}
    tasks = sorted({r.task for r in records})
    assert (found.n_tasks, found.n_samples) == (12, 2)
    assert {(e.behavior, e.kind, e.unit) for e in found.effects} == {
        (B, kind, unit) for kind in ("down", "up") for unit in ("sentences", "tokens")
    }
    for effect in found.effects:
        sign = {"down": -1, "up": 1}[effect.kind]
        condition, base = by_condition[f"{B}/{effect.kind}"], by_condition["unsteered"]
        assert (effect.layer, effect.coefficient, effect.length) == (4, sign, 1.0)
        assert effect.share.value == pytest.approx(slow_share(condition, B, effect.unit))
        assert effect.base.value == pytest.approx(slow_share(base, B, effect.unit))
        assert effect.base.low < effect.base.value < effect.base.high
        assert effect.change.value == pytest.approx(effect.share.value - effect.base.value)
        if effect.unit == "sentences":
            assert effect.events == sum(r.sentences[B] for r in condition)
            assert effect.base_events == sum(r.sentences[B] for r in base)
            assert effect.base_event_tasks == len({r.task for r in base if r.sentences[B]})
        null = [slow_share(by_condition[f"L4/isotropic-{i}"], B, effect.unit) - effect.base.value for i in range(7)]
        (pool,) = effect.controls
        assert (pool.pool, pool.n, pool.length, pool.p_max) == ("isotropic", 7, 1.0, None)
        assert (pool.low, pool.high) == pytest.approx((min(null), max(null)))
        assert (pool.mean, pool.sd) == pytest.approx((np.mean(null), np.std(null, ddof=1)))
        assert pool.z == pytest.approx(sign * (effect.change.value - np.mean(null)) / np.std(null, ddof=1))
        as_far = sum(value * sign >= effect.change.value * sign for value in null)
        assert pool.rank == 1 + as_far
        assert effect.p_value == pytest.approx((1 + as_far) / 8)
        assert (effect.control_low, effect.control_high) == pytest.approx((min(null), max(null)))
        wrong = 0
        for task in tasks:
            mine = [[r for r in rows if r.task == task] for rows in (condition, base)]
            wrong += sign * (slow_share(mine[0], B, effect.unit) - slow_share(mine[1], B, effect.unit)) < 0
        assert effect.wrong_way == pytest.approx(wrong / 12)
        # Intervals: tasks drawn with replacement, both conditions together.
        rng, changes, shares = random.Random(0), [], []
        for _ in range(1500):
            drawn = rng.choices(tasks, k=12)
            rows = [[r for t in drawn for r in own if r.task == t] for own in (condition, base)]
            shares.append(slow_share(rows[0], B, effect.unit))
            changes.append(shares[-1] - slow_share(rows[1], B, effect.unit))
        spread = np.std(changes)
        assert [effect.change.low, effect.change.high] == pytest.approx(
            np.quantile(changes, [0.025, 0.975]), abs=0.25 * spread
        )
        assert [effect.share.low, effect.share.high] == pytest.approx(
            np.quantile(shares, [0.025, 0.975]), abs=0.25 * np.std(shares)
        )
    tested = [e for e in found.effects if e.unit == "sentences"]
    assert [e.p_holm for e in tested] == pytest.approx(holm([e.p for e in tested]))


def test_conditions_are_summarized_with_accuracy_by_task():
    rows = [
        record("unsteered", "t0", 0, {B: 1}, 4, True, length=10, repetition=0.0, nll=1.0),
        record("unsteered", "t0", 1, {B: 1}, 6, False, parsed=False, length=20, repetition=0.5),
        record("unsteered", "t1", 0, {B: 0}, 8, True, finished=False, nll=2.0),
        record("unsteered", "t1", 1, {B: 0}, 2, True),
        record("unsteered", "t2", 0, {B: 0}, 2, None),  # not graded: in all means but accuracy
        record("unsteered", "t2", 1, {B: 0}, 2, None),
    ]
    (condition,) = summarize(rows, [Condition("unsteered", kind="unsteered")]).conditions
    assert condition.accuracy.value == pytest.approx(3 / 4)
    assert 0.5 <= condition.accuracy.low <= 0.75 <= condition.accuracy.high <= 1
    assert (condition.parsed, condition.finished) == pytest.approx((5 / 6, 5 / 6))
    assert (condition.length, condition.sentences, condition.repetition) == pytest.approx((190 / 6, 4, 1.5 / 6))
    assert (condition.nll, condition.kl, condition.text, condition.chains, condition.pool, condition.layer) == (
        1.5,
        None,
        None,
        6,
        "",
        -1,
    )
    assert condition.sentence_length == pytest.approx(4.0)
    ungraded = [dataclasses.replace(row, correct=None) for row in rows]
    assert math.isnan(summarize(ungraded, [Condition("unsteered", kind="unsteered")]).conditions[0].accuracy.value)


def test_a_planted_effect_is_shown_and_its_size_recovered():
    found = evaluated(2, up=0.12, down=-0.08, n_tasks=100)
    for kind, planted in (("up", 0.12), ("down", -0.08)):
        effect = found.effect(B, kind)
        assert effect.verdict == found.verdict(B, kind) == "shown"
        assert effect.p_value == 1 / 20
        assert effect.controls[0].rank == 1
        assert effect.controls[0].z > 3
        assert effect.wrong_way < 0.5
        assert effect.change.low < planted < effect.change.high
        assert effect.change.high - effect.change.low < 0.08


@pytest.mark.medium
def test_a_planted_null_is_seldom_shown_and_its_p_is_uniform():
    effects = [e for seed in range(60) for e in evaluated(seed, n_tasks=20).effects if e.unit == "sentences"]
    # Of 120 tests in 60 families at .05: more than 12 families with a find happen less than once in 1000.
    assert sum(e.p_holm < 0.05 for e in effects) <= 12
    assert sum(e.shown for e in effects) <= 8
    assert 0.35 < np.mean([e.p for e in effects]) < 0.65
    assert 0.35 < np.mean([e.p_value for e in effects]) < 0.7
    assert not any(e.shown for e in effects if e.kind == "up" and e.change.value < 0)


def test_the_wrong_direction_is_named_and_not_shown():
    found = evaluated(3, up=-0.1, down=0.1)
    for kind in ("up", "down"):
        effect = found.effect(B, kind)
        assert (effect.verdict, effect.shown) == ("moves the other way", False)
        assert effect.p_value == 1.0
        assert effect.wrong_way > 0.5


def test_a_rare_behavior_cannot_be_shown_to_fall_and_says_so():
    found = evaluated(4, base=0.004, up=0.1, down=-1.0, n_tasks=20)
    down, up = found.effect(B, "down"), found.effect(B, "up")
    assert down.base_events < 12
    assert (down.verdict, up.verdict) == ("base rate too low", "shown")
    assert math.isnan(down.p_holm)
    assert up.p_holm == up.p  # it is the only one that is tested


@pytest.mark.medium
def test_a_fall_to_zero_is_found_with_the_chains_that_it_takes_and_not_with_fewer():
    """At 0.8 % of 16 sentences a chain: 100 tasks x 4 see a fall to zero in most runs, 50 x 2 in few."""
    found = {}
    for n_tasks, n_samples in ((50, 2), (100, 4)):
        options: dict[str, Any] = dict(
            base=0.008, down=-1.0, n_tasks=n_tasks, n_samples=n_samples, sentences=(10, 23), n_controls=0
        )
        verdicts = [evaluated(seed, **options).verdict(B, "down") for seed in range(20)]
        found[n_tasks] = verdicts.count("shown")
    assert found[100] >= 18
    assert found[50] <= 16
    assert found[50] < found[100]


@pytest.mark.parametrize("change", [0.0, 0.08])
def test_control_vectors_that_do_as_much_are_not_beaten(change):
    conditions = conditions_of(n_controls=4)
    records = simulated(5, conditions, up=0.08)
    if change:
        records = [r for r in records if r.condition != "L4/isotropic-2"] + [
            dataclasses.replace(r, condition="L4/isotropic-2", sentences={**r.sentences, B: r.sentences[B] + 1})
            for r in records
            if r.condition == f"{B}/up"
        ]
    effect = summarize(records, conditions, margins=NO_MARGINS).effect(B, "up")
    assert effect.verdict == ("moves as random vectors do" if change else "shown")
    assert effect.controls[0].rank == (2 if change else 1)


def test_text_that_breaks_is_not_shown():
    conditions = conditions_of(n_controls=0)
    records = [
        dataclasses.replace(r, repetition=0.8) if r.condition == f"{B}/up" else r
        for r in simulated(6, conditions, up=0.2)
    ]
    found = summarize(records, conditions, margins=Margins(nll=None, kl=None))
    assert (found.effect(B, "up").verdict, found.effect(B, "up").text) == ("text breaks", False)
    (condition,) = [a for a in found.conditions if a.condition == f"{B}/up"]
    assert "repetition 0.80" in condition.text.why


@pytest.mark.medium
def test_a_p_of_controls_needs_many_and_takes_the_largest_of_all_behaviors_and_signs():
    few, many = evaluated(7, up=0.1, n_controls=98), evaluated(7, up=0.1, n_controls=99)
    assert few.effect(B, "up").controls[0].p_max is None
    assert many.effect(B, "up").controls[0].p_max == pytest.approx(1 / 100)
    null = [evaluated(seed, n_controls=99, n_tasks=10).effect(B, "up").controls[0].p_max for seed in range(12)]
    assert min(null) > 0.01
    assert 0.2 < np.mean(null) < 0.95


def test_words_are_a_baseline_outside_the_family_of_tests():
    found = evaluated(8, up=0.2, n_controls=3, kinds=("down", "up", "prompted"))
    up, words = found.effect(B, "up"), found.effect(B, "prompted")
    assert (words.layer, words.coefficient, words.controls, words.length) == (-1, 0.0, (), 0.0)
    assert words.p_holm == words.p
    two = [found.effect(B, "down"), up]
    assert [e.p_holm for e in two] == pytest.approx(holm([e.p for e in two]))


def test_control_vectors_are_those_of_the_behaviors_layer():
    near, far = conditions_of(n_controls=3), conditions_of(layer=3, behavior="example-testing", n_controls=3)[1:]
    records = simulated(9, near, up=0.1)
    records += [
        dataclasses.replace(r, condition=r.condition.replace("L4/", "L3/"), sentences={**r.sentences, B: r.n_sentences})
        for r in records
        if r.condition.startswith("L4/")
    ]
    records += [dataclasses.replace(r, condition=f"example-testing/{k}") for k in ("up", "down") for r in records
                if r.condition == f"{B}/{k}"]  # fmt: skip
    found = summarize(records, near + far, margins=NO_MARGINS)
    assert found.effect(B, "up").control_high < 0.1
    assert found.effect("example-testing", "up").control_high == 0.0  # none of it anywhere


def test_an_condition_that_writes_no_sentence_counts_against_the_claim():
    conditions = conditions_of(n_controls=3)
    records = simulated(6, conditions, up=0.2)

    def silent(name):
        return [
            dataclasses.replace(r, sentences=dict.fromkeys(BEHAVIORS, 0), tokens=dict.fromkeys(BEHAVIORS, 0),
                                n_sentences=0, n_tokens=0) if r.condition == name else r
            for r in records
        ]  # fmt: skip

    assert summarize(records, conditions, margins=NO_MARGINS).effect(B, "up").shown
    for name in ("L4/isotropic-0", "L4/isotropic-1", "L4/isotropic-2"):
        found = summarize(silent(name), conditions, margins=NO_MARGINS).effect(B, "up")
        assert (found.p_value, found.verdict) == (2 / 4, "moves as random vectors do")
    found = summarize(silent(f"{B}/up"), conditions, margins=NO_MARGINS).effect(B, "up")
    assert (found.p_value, found.shown) == (1.0, False)


def test_other_annotators_stand_beside_the_first():
    conditions = conditions_of(n_controls=0)
    records = [
        dataclasses.replace(r, others={"blind": Counts(dict.fromkeys(BEHAVIORS, 0), r.tokens, r.n_sentences, 1)})
        for r in simulated(10, conditions, up=0.2)
    ]
    found = summarize(records, conditions, margins=NO_MARGINS)
    assert found.effect(B, "up").share.value > 0.2
    assert found.effect(B, "up", annotator="blind").share.value == 0.0
    with pytest.raises(LensteerError, match="'rules'"):
        records[0].by("rules")


# --- what counts as readable text -----------------------------------------------------------------


def text_rows(condition, n=40, **figures):
    rng = np.random.default_rng(abs(hash(condition)) % 1000)
    spread = {"nll": 0.1, "repetition": 0.05, "compression": 0.02}
    return [
        record(
            condition, f"t{i}", 0, {}, 10, **{k: v + float(rng.normal(0, spread.get(k, 0))) for k, v in figures.items()}
        )
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, ""),
        ({"nll": 1.9}, "nll"),
        ({"nll": 1.2}, ""),
        ({"repetition": 0.3}, "repetition"),
        ({"repetition": 0.12}, ""),
        ({"compression": 0.3}, "compression"),
        ({"kl": 1.4}, "kl"),
        ({"kl": 0.4}, ""),
    ],
)
def test_text_is_held_to_each_margin(change, broken):
    base = text_rows("unsteered", nll=1.0, repetition=0.1, compression=0.5)
    condition = text_rows("arm", **{"nll": 1.0, "repetition": 0.1, "compression": 0.5, "kl": 0.1, **change})
    found = text_check(condition, base, Margins())
    assert [f.name for f in found.figures if not f.ok] == ([broken] if broken else [])
    assert found.ok is not bool(broken)
    assert (found.strain > 1) is bool(broken)
    assert broken in found.why


@pytest.mark.parametrize(("sentences", "ok"), [(10, True), (8, True), (4, False), (25, False)])
def test_sentences_may_be_neither_much_longer_nor_much_shorter(sentences, ok):
    base = [record("unsteered", f"t{i}", n=10) for i in range(20)]
    condition = [dataclasses.replace(r, condition="arm", n_sentences=sentences) for r in base]
    assert text_check(condition, base, Margins(nll=None, kl=None)).ok is ok


def test_what_was_seen_too_seldom_counts_as_worse():
    few = [record("a", f"t{i}", repetition=0.1 + 0.3 * (i == 0)) for i in range(3)]
    many = [record("a", f"t{i}", repetition=0.1 + 0.3 * (i % 30 == 0)) for i in range(90)]
    for rows, ok in ((few, False), (many, True)):
        base = [dataclasses.replace(r, repetition=0.1) for r in rows]
        assert text_check(rows, base, Margins(nll=None, kl=None, repetition=0.1)).ok is ok


@pytest.mark.parametrize("bad", [{"nll": -0.1}, {"sentence_length": 0.5}, {"kl": math.nan}, {"finished": math.inf}])
def test_impossible_margins_are_refused(bad):
    with pytest.raises(LensteerError, match=next(iter(bad))):
        Margins(**bad)


# --- what a plan could see ------------------------------------------------------------------------


@pytest.mark.medium
def test_power_says_what_a_run_of_that_size_finds():
    conditions = conditions_of(n_controls=0)
    base = [r for r in simulated(11, conditions, n_tasks=300, base=0.03) if r.condition == "unsteered"]
    (plan_,) = power(base, [B], n_tasks=60, n_samples=2)
    assert plan_.base == pytest.approx(slow_share(base, B, "sentences"))
    assert plan_.events == pytest.approx(sum(r.sentences[B] for r in base) / 5)
    assert plan_.down
    assert plan_.fall < plan_.base < plan_.rise
    options: dict[str, Any] = dict(n_controls=0, n_tasks=60, base=0.03)
    seen = [evaluated(seed, up=plan_.rise - plan_.base, **options).verdict(B, "up") for seed in range(20)]
    assert seen.count("shown") >= 11  # planned for 80 %: fewer than 11 of 20 happen less than once in 1000
    (rare,) = power(base, ["example-testing"], n_tasks=60, n_samples=2)
    assert (rare.down, rare.events) == (False, 0.0)
    with pytest.raises(LensteerError, match="without a sentence"):
        power([dataclasses.replace(base[0], n_sentences=0)], [B], n_tasks=60, n_samples=2)


# --- evaluate: the conditions that it runs --------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors(organism):
    from lensteer import models

    return synthetic.vectors(n_layers=models.n_layers(organism), width=models.d_model(organism))


def test_evaluate_runs_both_signs_words_and_controls_as_long_as_the_longest_edit(organism, vectors, monkeypatch):
    module = importlib.import_module("lensteer.evaluation.effects")
    seen = []

    def fake(model, tasks, conditions, sampling, **options):
        seen.extend(conditions)
        return [
            record(condition.name, t.id, s, {B: i % 3})
            for condition in conditions
            for i, t in enumerate(tasks)
            for s in (0, 1)
        ]

    monkeypatch.setattr(module, "run_conditions", fake)
    tasks = load_tasks(split="test", n=4)
    layers = {B: 3, "example-testing": 3, "adding-knowledge": 5}
    coefficient: dict[str, Any] = {B: 0.5, "example-testing": (0.75, 0.5), "adding-knowledge": (None, 0.25)}
    options: dict[str, Any] = dict(
        prompts={B: "Go back."}, pools=["isotropic"], n_controls=2, control_samples=1, seed=1
    )
    found = evaluate(organism, tasks, vectors, layers, coefficient, annotator=grammar, **options)
    plans = {condition.name: condition.plan for condition in seen}
    assert plans["unsteered"] is None
    assert plans[f"{B}/prompted"] is None
    assert [condition.suffix for condition in seen if condition.suffix] == ["Go back."]
    for behavior, (down, up) in {
        B: (0.5, 0.5),
        "example-testing": (0.75, 0.5),
        "adding-knowledge": (None, 0.25),
    }.items():
        for kind, trial, sign in (("down", down, -1), ("up", up, 1)):
            assert (f"{behavior}/{kind}" in plans) == (trial is not None)
            if trial is not None:
                edit = plans[f"{behavior}/{kind}"]
                assert (edit.direction.label, edit.layer) == (behavior, layers[behavior])
                assert (edit.coefficient, edit.scope, edit.unit) == (sign * trial, generated, "difference")
    random_conditions = [condition for condition in seen if condition.pool]
    assert sorted(a.name for a in random_conditions) == ["L3/random-0", "L3/random-1", "L5/random-0", "L5/random-1"]
    lengths = {3: max(0.5 * float(vectors[B].at(3).norm()), 0.75 * float(vectors["example-testing"].at(3).norm()))}
    lengths[5] = 0.25 * float(vectors["adding-knowledge"].at(5).norm())
    for condition in random_conditions:
        edit = condition.plan.coefficient * condition.plan.vector
        assert float(edit.norm()) == pytest.approx(lengths[condition.plan.layer], rel=1e-5)
        assert condition.n_samples == 1
    assert (found.n_tasks, found.n_samples, found.n_controls, found.scope) == (4, 2, 2, "generated")
    assert found.verdict("adding-knowledge", "down") == "no coefficient"
    assert found.behaviors == (B, "example-testing", "adding-knowledge")


def test_a_pool_of_shuffled_labels_takes_the_behaviors_in_turn(vectors):
    draws = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 4, 8, vectors.raw.shape[-1]) + 1
    draws = draws + 10 * torch.arange(4.0).view(1, 4, 1, 1)
    controls = Controls(torch.ones(6, 8, draws.shape[-1]), torch.ones(6, 8, draws.shape[-1]), draws)
    found = random_directions(dataclasses.replace(vectors, controls=controls), 2, 6, pool="shuffled")
    assert [float(d.raw[0, 0]) for d in found] == [1, 12, 23, 34, 5, 16]
    with pytest.raises(LensteerError, match=r"7 shuffled vectors, but 6 were fitted.*n_controls=7"):
        random_directions(dataclasses.replace(vectors, controls=controls), 2, 7, pool="shuffled")
    with pytest.raises(LensteerError, match="no pool 'gaussian'"):
        random_directions(vectors, 2, 1, pool="gaussian")


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

    def refused(words, tasks=tasks, layers=None, coefficients=1.0, **options):
        with pytest.raises(LensteerError, match=words):
            evaluate(organism, tasks, vectors, layers or {B: 3}, coefficients, annotator=grammar, **options)

    refused("at least two", tasks=tasks[:1])
    refused("nonsense", layers={"nonsense": 3})
    refused("99", layers={B: 99})
    for bad in (math.nan, math.inf, -math.inf, 0.0, -0.5):
        refused(f"coefficient {bad}", coefficients=bad)
        refused(f"coefficient {bad}", coefficients={B: bad})
    refused("coefficient None", coefficients={"example-testing": 1.0})
    refused("n_controls=-1", n_controls=-1)
    refused("no unit 'miles'", unit="miles")
    refused("but 0 were fitted", pools=["shuffled"], n_controls=1)


def test_an_evaluation_is_saved_and_read_back(tmp_path):
    found = evaluated(7, n_tasks=12, n_controls=2, base=0.4, margins=Margins(nll=None, kl=None))
    found.save(tmp_path / "deep" / "evaluation.json")
    assert Evaluation.load(tmp_path / "deep" / "evaluation.json") == found
    assert list(found.to_dataframe()["shown"]) == [e.shown for e in found.effects]
    assert "isotropic.z" in found.to_dataframe()
    assert list(found.conditions_dataframe()["condition"]) == [a.condition for a in found.conditions]
    with pytest.raises(LensteerError, match="there are"):
        found.effect(B, "sideways")


@pytest.mark.parametrize(
    "data", [None, b"", b"null", b"[]", b'"text"', b"{}", b'{"effects": [{}], "conditions": []}', b"\xff"]
)
@pytest.mark.parametrize("kind", [Evaluation, ChosenCoefficients])
def test_what_cannot_be_read_is_named(kind, data, tmp_path):
    path = tmp_path / "file.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(LensteerError, match=r"file\.json"):
        kind.load(path)


# --- coefficients ----------------------------------------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch, organism, vectors):
    """Choose among coefficients when so many of 40 chains parse: `parsed[behavior][trial with its sign]`, else all."""
    module = importlib.import_module("lensteer.evaluation.coefficients")
    tasks = [Task(f"t{i}", "logic", "dev", "?") for i in range(40)]
    seen = []

    def choose(parsed, *, layers=None, base=40, **options):
        def fake(model, tasks, conditions, sampling, **more):
            seen[:] = conditions
            found = []
            for condition in conditions:
                trial = float(condition.name.partition("/")[2] or 0)
                good = parsed.get(condition.behavior, {}).get(trial, 40) if condition.plan is not None else base
                own = {B: round(5 + 2 * trial)}
                found += [record(condition.name, t.id, 0, own, parsed=i < good) for i, t in enumerate(tasks)]
            return found

        monkeypatch.setattr(module, "run_conditions", fake)
        margins = options.pop("margins", GRAMMAR_MARGINS)
        layers = layers or {B: 3, "example-testing": 4}
        return choose_coefficients(organism, tasks, vectors, layers, margins=margins, annotator=grammar, **options)

    vars(choose)["conditions"] = seen
    return choose


@pytest.mark.parametrize(
    ("parsed", "down", "up"),
    [
        ({}, 1.0, 1.0),
        ({1.0: 30}, 1.0, 0.5),
        ({-1.0: 30}, 0.5, 1.0),  # the signs have coefficients of their own
        ({0.5: 30}, 1.0, 1.0),  # a larger coefficient that parses again counts: what failed was chance
        ({1.0: 39}, 1.0, 1.0),
        ({-0.2: 0, -0.5: 0, -1.0: 0, 1.0: 0}, None, 0.5),
    ],
)
def test_the_largest_coefficient_that_leaves_text_readable_is_chosen_for_each_sign(chosen, parsed, down, up):
    found = chosen({B: parsed}, coefficients=(1.0, 0.2, 0.5, 0.2), same_length=False)
    assert found.pairs == {B: (down, up), "example-testing": (1.0, 1.0)}
    assert found.coefficients == found.up
    curve = {(d.behavior, d.coefficient): d for d in found.curve}
    assert [c for b, c in curve if b == B] == [-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0]
    assert len(chosen.conditions) == 1 + 2 * 2 * 3
    for (behavior, coefficient), trial in curve.items():
        assert trial.layer == {B: 3, "example-testing": 4}[behavior]
        assert trial.share == (round(5 + 2 * coefficient) / 10 if behavior == B else 0.0)
        assert trial.readable == (parsed.get(coefficient, 40) >= 39 if behavior == B else True)
    assert (found.margins, found.n_tasks, found.n_samples, found.coefficient_unit) == (
        GRAMMAR_MARGINS, 40, 1, "difference",
    )  # fmt: skip


def test_behaviors_at_one_layer_are_compared_at_the_same_length(chosen, vectors):
    found = chosen({}, layers={B: 3, "example-testing": 3, "adding-knowledge": 3}, coefficients=(0.5, 1.0))
    lengths = {d.behavior: d.length for d in found.curve if d.coefficient > 0 and d.behavior in found.up
               and d.coefficient == found.up[d.behavior]}  # fmt: skip
    norms = sorted(float(vectors[b].at(3).norm()) for b in lengths)
    assert list(lengths.values()) == pytest.approx([norms[1]] * 3, rel=1e-5)


def test_directions_at_one_layer_take_the_coefficient_that_most_of_them_bear(chosen):
    """Three of four bear 1.0 and one 0.5; at another layer one bears more than the other, and both take the smaller."""
    parsed = {B: {1.0: 0}, "uncertainty-estimation": {-1.0: 0}}
    layers = {B: 3, "example-testing": 3, "uncertainty-estimation": 5}
    found = chosen(parsed, layers=layers, coefficients=(0.5, 1.0))
    lengths = {(d.behavior, d.coefficient): d.length for d in found.curve}
    used = {
        (b, kind): lengths[b, sign * getattr(found, kind)[b]]
        for b in layers
        for kind, sign in (("down", -1), ("up", 1))
    }
    whole = used["example-testing", "up"]
    assert used[B, "down"] == pytest.approx(whole)
    assert used["example-testing", "down"] == pytest.approx(whole)
    assert used[B, "up"] == pytest.approx(whole / 2)
    assert used["uncertainty-estimation", "up"] == used["uncertainty-estimation", "down"]


def test_an_unsteered_condition_that_is_broken_itself_is_no_standard(chosen):
    with pytest.raises(LensteerError, match=r"25% of the unsteered chains parse"):
        chosen({}, base=10)


def test_an_unsteered_condition_without_sentences_is_named(chosen):
    silent = dict.fromkeys(BEHAVIORS, 0)
    rows = [dataclasses.replace(record("unsteered", f"t{i}", n=0), sentences=silent) for i in range(5)]
    with pytest.raises(LensteerError, match="a sentence on 0 of 5 tasks"):
        check_standard(rows, Margins())


@pytest.mark.parametrize("coefficients", [(), (0.0,), (0.3, -0.3), (math.nan,), (0.3, math.inf)])
def test_impossible_coefficients_are_refused(chosen, coefficients):
    with pytest.raises(LensteerError, match="coefficients"):
        chosen({}, coefficients=coefficients)


def test_unknown_behaviors_and_layers_are_refused(chosen):
    for layers in ({"nonsense": 3}, {B: 99}):
        with pytest.raises(LensteerError, match=r"nonsense|99"):
            chosen({}, layers=layers)


def test_coefficients_are_saved_and_read_back(chosen, tmp_path):
    found = chosen({B: {1.0: 3}}, coefficients=(0.2, 1.0))
    found.save(tmp_path / "coefficients.json")
    assert ChosenCoefficients.load(tmp_path / "coefficients.json").to_dict() == found.to_dict()  # NaN is not itself
    json.loads((tmp_path / "coefficients.json").read_text(), parse_constant=pytest.fail)
    assert len(found.to_dataframe()) == len(found.curve)


def test_coefficients_and_effects_run_on_the_organism(organism, vectors, tmp_path):
    """One thin slice without fakes: files are left for resuming, and a second call reads them and generates nothing."""
    sampling = Sampling(max_new_tokens=20)
    dev, test = load_tasks(split="dev", n=2), load_tasks(split="test", n=2)
    loose = Margins(None, None, None, None, None, None, kl=30.0)
    options: dict[str, Any] = dict(
        annotator=grammar, margins=loose, coefficients=(0.2,), sampling=sampling, path=tmp_path / "coefficients.jsonl"
    )
    coefficients = choose_coefficients(organism, dev, vectors, {B: 3}, **options)
    assert choose_coefficients(organism, dev, vectors, {B: 3}, **options).to_dict() == coefficients.to_dict()
    assert all(d.text.figures[0].name == "kl" for d in coefficients.curve if d.coefficient)
    options = dict(annotator=grammar, pools=["isotropic"], n_controls=1, sampling=sampling)
    options |= dict(path=str(tmp_path / "effects.jsonl"))
    found = evaluate(organism, test, vectors, {B: 3}, coefficients.pairs, **options)
    assert evaluate(organism, test, vectors, {B: 3}, 0.2, **options) == found or np.isnan(found.effects[0].change.value)
    assert [a.condition for a in found.conditions] == ["unsteered", f"{B}/down", f"{B}/up", "L3/random-0"]
    assert [a.nll is not None for a in found.conditions] == [True] * 4
    assert found.conditions[0].kl == 0
    assert all(a.kl > 0 for a in found.conditions[1:])
    assert not any(len(p.fwd_hooks) for p in organism.hook_dict.values())


def test_the_likelihood_of_a_text_is_that_of_one_chain_alone(organism, random_direction, tmp_path):
    """Against a forward without batch or padding; resumed from its file without the model being asked again."""
    plan_ = SteeringPlan(random_direction(organism), 3, 2.0, generated)
    chains = draw_chains(
        organism, load_tasks(split="test", n=3), [Condition("a"), Condition("b", plan_)], Sampling(max_new_tokens=30)
    )
    traces, plans = [t for _, t in chains], [None if name == "a" else plan_ for name, _ in chains]
    found = text_quality(organism, traces, plans, path=tmp_path / "quality.jsonl")
    for trace, plan_of, values in zip(traces, plans, found, strict=True):
        ids, n = torch.tensor([trace.ids]), len(trace.response_ids)
        plain = organism(ids)[0, -n - 1 : -1].double().log_softmax(-1)
        assert values["nll"] == pytest.approx(-float(plain.gather(1, ids[0, -n:, None]).mean()), rel=1e-4)
        if plan_of is None:
            assert values["kl"] == 0
        else:
            with plan_of.on(organism, prompt_length=trace.prompt_length):
                steered = organism(ids)[0, -n - 1 : -1].double().log_softmax(-1)
            kl = float((steered.exp() * (steered - plain)).sum(-1).mean())
            assert values["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)  # fp32's rounding, batched or not
    lines = (tmp_path / "quality.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert text_quality(organism, traces[::-1], plans[::-1], path=tmp_path / "quality.jsonl") == found[::-1]
    assert (tmp_path / "quality.jsonl").read_text().splitlines() == lines


# --- shares on resampled tasks -------------------------------------------------------------------


def share_records(condition, hits, totals, n_samples=1):
    counts = [dict(dict.fromkeys(BEHAVIORS, 0), backtracking=int(h)) for h in hits]
    return [
        Record(condition, f"t{i // n_samples}", i % n_samples, c, c, n, n, True, True, True, n, 0.0)
        for i, (c, n) in enumerate(zip(counts, map(int, totals), strict=True))
    ]


def test_resampled_shares_are_ratios_of_sums_and_paired_across_conditions():
    rng = np.random.default_rng(0)
    totals, hits = rng.integers(5, 30, 40), rng.integers(0, 5, 40)
    records = share_records("a", hits, totals) + share_records("b", hits + 1, totals)
    shares = ResampledShares(records, seed=3)
    found = estimate_of(shares.of("a", "backtracking"), 40)
    assert found.value == pytest.approx(hits.sum() / totals.sum())
    oracle = bootstrap_interval(Ratio(hits, totals), n=4000, seed=9)
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=0.01)
    assert found.n == 40
    # Paired: the difference of the conditions varies with the number of sentences alone, far less than either
    # condition.
    difference = shares.of("b", "backtracking") - shares.of("a", "backtracking")
    assert difference.std() < 0.5 * shares.of("a", "backtracking").std()
    with pytest.raises(LensteerError, match="'c'"):
        shares.of("c", "backtracking")
    with pytest.raises(LensteerError, match="no further annotator 'rules'"):
        shares.of("a", "backtracking", "rules")


def test_resampling_keeps_a_tasks_samples_together_and_wants_the_same_tasks_everywhere():
    doubled = ResampledShares(share_records("a", [0, 0, 4, 4], [4, 4, 4, 4], n_samples=2))
    assert set(doubled.of("a", "backtracking")) <= {0.0, 0.5, 1.0}  # two tasks, each all or nothing
    once, twice = share_records("a", [0, 4], [4, 4]), share_records("b", [0, 0, 4, 4], [4, 4, 4, 4], n_samples=2)
    mixed = ResampledShares([*once, *twice])  # not the same number of chains, but the same draws of tasks
    assert (mixed.of("a", "backtracking") == mixed.of("b", "backtracking")).all()
    with pytest.raises(LensteerError, match="2 sets of tasks"):
        ResampledShares(share_records("a", [1, 2], [3, 3]) + share_records("b", [1, 2, 3], [3, 3, 3]))


# --- controls of equal KL, forced words, clean chains, coherence -------------------------------------------------


@pytest.mark.medium
def test_controls_of_equal_kl_spend_what_the_edit_spends(organism, vectors, tmp_path):
    tasks = load_tasks(split="test", n=6)
    edit = SteeringPlan(vectors[B], 4, 1.0)
    own = [Condition("unsteered", kind="unsteered"), Condition(f"{B}/up", edit, kind="up", behavior=B)]
    options: dict[str, Any] = dict(n=2, samples=1, scope=edit.scope)
    controls = control_conditions(vectors, own, pools=("isotropic", "isotropic_kl"), **options)
    path = tmp_path / "matched.json"
    found = match_kl(organism, tasks, own, controls, path=path)
    assert [c.name for c in found] == [c.name for c in controls]
    by_pool: dict[str, list[Any]] = {
        pool: [c.plan for c in found if c.pool == pool] for pool in ("isotropic", "isotropic_kl")
    }
    assert [p.length for p in by_pool["isotropic"]] == pytest.approx([edit.length] * 2, rel=1e-5)
    rolled: dict[str, Any] = dict(max_new_tokens=60)
    spent = [each.statistic(None) for each in rollout_kl(organism, tasks, [edit, *by_pool["isotropic_kl"]], **rolled)]
    assert spent[1:] == pytest.approx([spent[0]] * 2, rel=0.15)
    assert match_kl(organism, tasks, own, controls, path=path) == found  # read back
    written = read_json(path)
    kept: dict[str, Any] = {c.name: c.plan for c in found if c.pool == "isotropic_kl"}
    assert written == {name: plan.coefficient for name, plan in kept.items()}


def test_an_unknown_pool_is_named_beside_those_that_there_are(vectors):
    with pytest.raises(LensteerError, match="isotropic_kl"):
        random_directions(vectors, 4, 1, pool="isotropic-kl")


@pytest.mark.medium
def test_forced_words_begin_every_chain_and_are_a_baseline(organism, vectors, tmp_path):
    tasks, seen = load_tasks(split="test", n=3), []
    options: dict[str, Any] = dict(annotator=grammar, sampling=SAMPLING, n_controls=0, margins=GRAMMAR_MARGINS)
    found = evaluate(
        organism, tasks, vectors, {B: 3}, forced={B: "Wait,"}, control_samples=1,
        keep=lambda condition, trace: seen.append((condition, trace)), **options,
    )  # fmt: skip
    forced = [trace for condition, trace in seen if condition.kind == "forced"]
    assert len(forced) == len(tasks)  # as many as a control vector's
    assert all(trace.prompt.endswith("Wait,") for trace in forced)
    assert not any(trace.response.startswith("Wait,") for trace in forced)
    effect = found.effect(B, "forced")
    assert effect.coefficient == 0
    assert effect.p_holm == effect.p  # not among the tests that are corrected
    assert {e.kind for e in found.side_effects} == {"down", "up", "forced"}


@pytest.mark.medium
def test_a_plan_is_measured_on_clean_chains_as_one_forward_at_a_time_would(organism, random_direction):
    traces = generate_traces(organism, load_tasks(split="test", n=3), max_new_tokens=30)
    plans = {
        "zero": SteeringPlan(random_direction(organism), 3, 0.0),
        "on": SteeringPlan(random_direction(organism), 3, 4.0),
    }
    found = on_clean_chains(organism, traces, plans)
    assert found["zero"].kl_p95.value == 0
    assert found["zero"].nll.value == 0
    kl, lost, n = [], 0.0, 0
    for trace in traces:
        (p,) = forced_logits(organism, [trace.prompt_ids], [trace.response_ids], plans=[plans["on"]])
        (q,) = forced_logits(organism, [trace.prompt_ids], [trace.response_ids])
        kl += kl_divergence(p, q).tolist()
        rows = torch.arange(len(trace.response_ids)), torch.tensor(trace.response_ids)
        lost += float((q.log_softmax(-1)[rows] - p.log_softmax(-1)[rows]).double().sum())
        n += len(trace.response_ids)
    assert found["on"].nll.value == pytest.approx(lost / n, rel=1e-3)
    assert found["on"].kl_p50.value == pytest.approx(sorted(kl)[math.ceil(0.5 * n) - 1], rel=1e-3)
    assert found["on"].kl_p95.value == pytest.approx(sorted(kl)[math.ceil(0.95 * n) - 1], rel=1e-3)
    assert found["on"].n == 3
    with pytest.raises(LensteerError, match="at least two"):
        on_clean_chains(organism, traces[:1], plans)


@pytest.mark.parametrize(("score", "ok"), [(80.0, True), (40.0, False)])
def test_text_that_a_judge_finds_incoherent_is_broken(score, ok):
    base = [record("unsteered", f"t{t}", coherence=90.0 + t % 3) for t in range(20)]
    rows = [record("up", f"t{t}", coherence=score + t % 3) for t in range(20)]
    check = text_check(rows, base, Margins())
    assert check.ok is ok
    assert ("coherence" in check.why) is not ok
    weak = [record("unsteered", f"t{t}", coherence=35.0 + t % 3) for t in range(20)]
    assert text_check(rows, weak, Margins()).ok  # no less coherent than the model itself


@pytest.mark.medium
def test_coherence_is_scored_for_as_many_chains_as_likelihoods(organism, tasks, conditions):
    asked = []

    def coherent(trace):
        asked.append(trace.id)
        return 70.0

    found = run_conditions(organism, tasks, conditions[:2], SAMPLING, annotator=grammar, quality=2, coherence=coherent)
    assert len(asked) == 4
    assert [r.coherence for r in found if r.sample == 0] == [70.0, 70.0, None] * 2
