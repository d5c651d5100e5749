"""Operators, gates and schedules: what they do to the residual stream, and where they are refused."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lensteer as ls
import reference
from lensteer import models
from lensteer.calibration import calibrate, calibrate_many
from lensteer.evaluation import Condition
from lensteer.evaluation.controls import control_conditions
from lensteer.explorer.state import Choices, State, code_of
from lensteer.export import folder, hf, load_plan
from lensteer.export.cards import edits_table
from lensteer.export.plan_files import CONFIG
from lensteer.export.verification import expected_effect
from lensteer.generation import generate
from lensteer.positions import Context, everywhere, first, generated, sentence_starts
from lensteer.steering import OPERATORS, Edits, Gate, Plan, Schedule, SteeringPlan
from lensteer.steering.gates import Gates
from lensteer.steering.operators import clamp, project_out, rotate
from lensteer.vectors import BehaviorVectors
from lensteer.vectors.probes import fit_probe
from test_steering import alone, clean, rows_of, token_by_token

WIDTH = 32
GATES = (None, Gate(0.05), Gate(-0.1, above=False), Gate(0.3, measure="projection"))
SCHEDULES = (None, Schedule.half_life(3.0), Schedule.linear(4.0, end=-0.5))
COEFFICIENT = {"add": 0.7, "project_out": 1.0, "clamp": 1.5, "rotate": 25.0}


def context_of(model, rows, lengths):
    """A left-padded batch."""
    width = max(map(len, rows))
    ids = torch.tensor([[5] * (width - len(row)) + row for row in rows])
    pad = torch.tensor([width - len(row) for row in rows])
    return Context(ids, pad, torch.tensor(lengths), models.token_table(model))


def random_resid(context, width=WIDTH, seed=0):
    return torch.randn(*context.ids.shape, width, generator=torch.Generator().manual_seed(seed))


def every_plan(model, random_direction, scope=generated):
    """A plan for each operator, gate and schedule, along different directions; every fourth has two edits."""
    other = random_direction(model, 99).at(1)
    gates = [*GATES, Gate(0.0, direction=other)]
    plans: list[Plan] = []
    for operator in OPERATORS:
        for gate in gates:
            for schedule in SCHEDULES:
                n = len(plans)
                direction = random_direction(model, n, 2.0)
                plan = SteeringPlan(direction, 1, COEFFICIENT[operator], scope, operator, gate=gate, schedule=schedule)
                plans.append(plan + replace(plans[n // 2].edits[0], scope=everywhere) if n % 4 == 3 else plan)
    return plans


def test_a_batch_of_every_kind_of_plan_is_the_plain_loop(tiny_model, random_direction):
    model = tiny_model()
    rows, _, lengths = rows_of(model)
    plans = [*every_plan(model, random_direction), None]
    n = len(plans)
    context = context_of(model, [rows[i % 3] for i in range(n)], [lengths[i % 3] for i in range(n)])
    resid, edits = random_resid(context), Edits.of(plans, model)
    real = context.position >= 0
    expected = reference.edited(resid, plans, context, 1)
    found = edits.apply(1, resid, context)
    torch.testing.assert_close(found[real].double(), expected[real], atol=1e-5, rtol=0)
    assert torch.equal(found[-1], resid[-1])
    assert torch.equal(found[~real], resid[~real])
    torch.testing.assert_close(edits.apply(1, resid[:, -1:], context), found[:, -1:])  # a decode step
    kept = torch.tensor([n - 1, 7, 20, 7, 43])
    some = dataclasses.replace(
        context, ids=context.ids[kept], pad=context.pad[kept], prompt_length=context.prompt_length[kept]
    )
    assert torch.equal(edits.keep(kept).apply(1, resid[kept], some), found[kept])
    assert edits.rows(n).tolist() == [True] * (n - 1) + [False]
    # No positive without a change, and no change that is not announced.
    for columns in (1, context.ids.shape[1]):
        changed = (found != resid)[:, :columns].any(-1).any(-1)
        assert (edits.touched(context, columns) | ~changed).all()
    assert not edits.touched(context, context.ids.shape[1])[-1]


@pytest.mark.medium
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_cached_padded_decode_is_the_full_single_forward(operator, tiny_model, random_direction):
    model = tiny_model()
    rows, n_new, lengths = rows_of(model)
    for gate, schedule, scope in (
        (None, None, everywhere),
        (Gate(0.02), Schedule.half_life(2.0), everywhere),
        (Gate(0.1, above=False, measure="projection"), Schedule.linear(3.0, end=0.25), generated),
        (None, Schedule.half_life(1.5, end=-1.0), sentence_starts),
    ):
        plan = SteeringPlan(
            random_direction(model, 1), 1, COEFFICIENT[operator], scope, operator, gate=gate, schedule=schedule
        ) + SteeringPlan(random_direction(model, 2), 2, 0.5, generated, schedule=schedule)
        with plan.on(model):
            decoded = token_by_token(model, rows, n_new, lengths)
        for row, length, ours in zip(rows, lengths, decoded, strict=True):
            whole = alone(model, row, length, plan)
            torch.testing.assert_close(ours, whole[length - 1 :], atol=1e-5, rtol=0)
            assert (whole - alone(model, row, length)).abs().max() > 1e-3
    assert clean(model)


@pytest.mark.medium
def test_rows_of_a_batch_generate_what_they_generate_alone(tiny_model, random_direction):
    model = tiny_model("llama")
    plans: list[SteeringPlan | None] = [None]
    for number, operator in enumerate(OPERATORS):
        strong = {"add": 3.0, "project_out": 4.0, "clamp": -4.0, "rotate": 60.0}[operator]
        plan = SteeringPlan(random_direction(model, number), 2, strong, everywhere, operator)
        plans += [plan, replace(plan, gate=Gate(0.0)), replace(plan, scope=generated, schedule=Schedule.half_life(4.0))]
    prompt_ids = models.encode(model, "First, let me think. The answer")
    together = generate(model, [prompt_ids] * len(plans), max_new_tokens=8, plans=plans)
    single = [generate(model, [prompt_ids], max_new_tokens=8, plans=[plan])[0] for plan in plans]
    assert [row.ids for row in together] == [row.ids for row in single]
    assert len({row.ids for row in together}) > 6
    (forced,) = ls.forward.forced_logits(model, [prompt_ids], [together[-1].ids], plans=[plans[-1]])
    assert forced.argmax(-1).tolist() == list(together[-1].ids)


numbers = st.floats(-50, 50, allow_nan=False, width=32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e4), st.floats(-400, 400))
def test_a_rotation_keeps_the_norm_and_turns_by_the_angle(seed, size, degrees):
    generator = torch.Generator().manual_seed(seed)
    h = size * torch.randn(2, 3, 16, generator=generator, dtype=torch.float64)
    unit = torch.nn.functional.normalize(torch.randn(2, 1, 16, generator=generator, dtype=torch.float64), dim=-1)
    turned = rotate(h, unit, torch.full((2, 1, 1), degrees, dtype=torch.float64))
    torch.testing.assert_close(turned.norm(dim=-1), h.norm(dim=-1), rtol=1e-10, atol=0)
    before, after = (torch.rad2deg(torch.acos(((x * unit).sum(-1) / x.norm(dim=-1)).clamp(-1, 1))) for x in (h, turned))
    torch.testing.assert_close(after, (before - degrees).clamp(0, 180), atol=1e-4, rtol=0)
    # In the plane of h and the direction: nothing appears outside of it.
    outside = turned - (turned * unit).sum(-1, keepdim=True) * unit
    across = torch.nn.functional.normalize(h - (h * unit).sum(-1, keepdim=True) * unit, dim=-1)
    torch.testing.assert_close(outside, (outside * across).sum(-1, keepdim=True) * across, atol=1e-8 * size, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), numbers)
def test_a_clamp_reaches_its_target_and_changes_nothing_across(seed, target):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(2, 3, 16, generator=generator)
    unit = torch.nn.functional.normalize(torch.randn(2, 1, 16, generator=generator), dim=-1)
    found = clamp(h, unit, torch.full((2, 1, 1), target))
    torch.testing.assert_close((found * unit).sum(-1), torch.full((2, 3), target), atol=1e-4, rtol=1e-5)
    across = [x - (x * unit).sum(-1, keepdim=True) * unit for x in (h, found)]
    torch.testing.assert_close(*across, atol=1e-4, rtol=0)
    torch.testing.assert_close(clamp(h, unit, torch.zeros(2, 1, 1)), project_out(h, unit, torch.ones(2, 1, 1)))


def test_a_residual_along_the_direction_has_no_plane_to_turn_in():
    unit = torch.zeros(1, 1, 8)
    unit[..., 0] = 1
    h = torch.cat([3 * unit, -3 * unit, torch.zeros_like(unit)], 1).requires_grad_()
    for degrees in (-30.0, 30.0):
        turned = rotate(h, unit, torch.full((1, 1, 1), degrees))
        assert torch.equal(turned, h)
    assert torch.equal(rotate(h.bfloat16(), unit, torch.full((1, 1, 1), 10.0)), h.bfloat16())


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_what_a_plan_does_at_its_layer_is_in_its_units(operator, tiny_model, random_direction):
    """Through the model, and with a unit: a clamp's target and an angle can be read off the residual stream."""
    model, direction = tiny_model(), random_direction(tiny_model(), length=2.5)
    direction = replace(direction, mean_norm=torch.full((4,), 0.5))
    ids, point = torch.tensor([models.encode(model, "Wait, maybe that is wrong.")]), models.resid_hook(2)
    unit = direction.at(2) / direction.at(2).norm()
    plain = model.run_with_cache(ids, names_filter=point)[1][point][0]
    plan = SteeringPlan(direction, 2, 2.0 if operator != "rotate" else 20.0, operator=operator, unit="mean_norm")
    with plan.on(model):
        steered = model.run_with_cache(ids, names_filter=point)[1][point][0]
    before, after = plain @ unit, steered @ unit
    if operator == "add":
        torch.testing.assert_close(after, before + 1.0, atol=1e-5, rtol=0)
    elif operator == "project_out":
        torch.testing.assert_close(after, -before, atol=1e-5, rtol=0)
    elif operator == "clamp":
        torch.testing.assert_close(after, torch.ones_like(after), atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(steered.norm(dim=-1), plain.norm(dim=-1), rtol=1e-5, atol=0)
        angles = [torch.rad2deg(torch.acos(a / x.norm(dim=-1))) for a, x in ((before, plain), (after, steered))]
        torch.testing.assert_close(angles[0] - angles[1], torch.full_like(before, 20.0), atol=1e-2, rtol=0)


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_an_open_gate_is_no_gate_and_a_shut_one_no_plan(operator, tiny_model, random_direction):
    model = tiny_model()
    rows, n_new, lengths = rows_of(model)
    plan = SteeringPlan(random_direction(model), 1, COEFFICIENT[operator], generated, operator)

    def run(plan):
        with plan.on(model):
            return token_by_token(model, rows, n_new, lengths)

    plain, steered = token_by_token(model, rows, n_new, lengths), run(plan)
    assert torch.equal(run(replace(plan, gate=Gate(-2.0))), steered)
    assert torch.equal(run(replace(plan, gate=Gate(1e6, above=False, measure="projection"))), steered)
    assert torch.equal(run(replace(plan, gate=Gate(2.0))), plain)
    assert torch.equal(run(replace(plan, gate=Gate(-1e6, above=False, measure="projection"))), plain)
    assert torch.equal(run(replace(plan, schedule=Schedule.linear(3.0, end=1.0))), steered)
    assert torch.equal(run(replace(plan, schedule=Schedule.half_life(3.0, end=1.0))), steered)
    assert not torch.equal(steered, plain)
    assert not torch.equal(run(replace(plan, schedule=Schedule.half_life(1.0))), steered)


def test_an_angle_of_zero_changes_no_bit_and_a_clamp_to_zero_is_an_edit(tiny_model, random_direction):
    model = tiny_model()
    rows, n_new, lengths = rows_of(model)
    still = SteeringPlan(random_direction(model), 1, 0.0, everywhere, "rotate")
    gone = replace(still, operator="clamp")
    plain = token_by_token(model, rows, n_new, lengths)
    with still.on(model):
        assert torch.equal(token_by_token(model, rows, n_new, lengths), plain)
    with gone.on(model):
        clamped = token_by_token(model, rows, n_new, lengths)
    with replace(gone, operator="project_out", coefficient=1.0).on(model):
        torch.testing.assert_close(token_by_token(model, rows, n_new, lengths), clamped, atol=1e-5, rtol=0)
    assert not torch.equal(clamped, plain)
    context = context_of(model, rows, lengths)
    edits = Edits.of([still, gone, None], model)
    touched = edits.touched(context, context.ids.shape[1])
    assert edits.rows(3).tolist() == touched.tolist() == [False, True, False]


def test_half_precision_keeps_targets_and_norms_to_its_rounding(tiny_model, random_direction):
    model = tiny_model()
    rows, _, lengths = rows_of(model)
    context = context_of(model, rows, lengths)
    resid, real = random_resid(context).bfloat16(), context.position >= 0
    unit = random_direction(model).at(1) / 3.0
    for operator in ("clamp", "rotate"):
        plan = SteeringPlan(random_direction(model), 1, COEFFICIENT[operator], everywhere, operator)
        found = Edits.of([plan] * 3, model).apply(1, resid, context)
        assert found.dtype == torch.bfloat16
        if operator == "clamp":
            assert (found[real].float() @ unit - 4.5).abs().max() < 0.05
        else:
            ratio = found[real].float().norm(dim=-1) / resid[real].float().norm(dim=-1)
            assert (ratio - 1).abs().max() < 2e-3


def test_the_factor_begins_at_the_first_generated_token():
    t = torch.tensor([[-4, -1, 0, 1, 2, 5, 10]])
    assert Schedule.half_life(5.0).factor(t)[0].tolist() == pytest.approx([1, 1, 1, 2**-0.2, 2**-0.4, 0.5, 0.25])
    assert Schedule.linear(5.0).factor(t)[0].tolist() == pytest.approx([1, 1, 1, 0.8, 0.6, 0, 0])
    assert Schedule.linear(5.0, end=2.0).factor(t)[0].tolist() == pytest.approx([1, 1, 1, 1.2, 1.4, 2, 2])


def test_a_probe_is_a_gate():
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(8, generator=generator, dtype=torch.float64)
    x = torch.randn(400, 8, generator=generator, dtype=torch.float64)
    positive = (x @ planted > 1.0).double()
    probe = fit_probe(x, positive, 1 - positive)
    assert probe is not None
    odds = x @ probe.weights + probe.bias
    for least, above in ((0.0, True), (1.5, True), (-0.5, False)):
        gates = Gates.none(1, 8, torch.zeros(0))
        gates.put(0, Gate.of_probe(*probe, log_odds=least, above=above), torch.ones(8))
        found = gates.open(x[None].float())[0]
        clear = (odds - least).abs() > 1e-4
        assert torch.equal(found[clear], (odds > least)[clear] if above else (odds < least)[clear])
    assert 0.85 < float((gates.open(x[None].float())[0] == (odds < -0.5)).double().mean()) <= 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Gate(math.nan), "threshold nan: give a finite number"),
        (lambda: Gate(-math.inf), "threshold -inf"),
        (lambda: Gate(0.1, measure="angle"), r"no measure 'angle' of a gate: choose one of \['cosine', 'projection'\]"),
        (lambda: Gate(0.1, direction=torch.zeros(4)), "direction of a gate is zero"),
        (lambda: Gate(0.1, direction=torch.full((4,), torch.nan)), "zero or not finite"),
        (lambda: Gate.of_probe(torch.zeros(4), 1.0), "weights are zero"),
        (lambda: Gate.of_probe(torch.ones(4), math.nan), "threshold nan"),
        (lambda: Schedule.half_life(0.0), "a schedule over 0.0 tokens: give a positive, finite number"),
        (lambda: Schedule.linear(math.inf), "inf tokens"),
        (lambda: Schedule.linear(math.nan), "nan tokens"),
        (lambda: Schedule.linear(3.0, end=math.nan), "ends at nan"),
        (lambda: Schedule("cosine", 3.0), r"no schedule of shape 'cosine': choose one of \['half_life', 'linear'\]"),
    ],
)
def test_impossible_gates_and_schedules_are_refused_by_name(make, words):
    with pytest.raises(ls.LensteerError, match=words):
        make()


@pytest.mark.parametrize("operator", ["clamp", "rotate"])
@pytest.mark.parametrize("coefficient", [math.nan, math.inf])
def test_an_operator_without_a_finite_coefficient_is_refused(operator, coefficient, tiny_model, random_direction):
    with pytest.raises(ls.LensteerError, match=f"coefficient {coefficient} is not finite"):
        SteeringPlan(random_direction(tiny_model()), 1, coefficient, operator=operator)
    plan = SteeringPlan(random_direction(tiny_model()), 1, 2e38, operator="clamp")  # times 3, the vector's length
    with pytest.raises(ls.LensteerError, match=r"coefficient 2e\+38 is beyond torch.float32"), plan.on(tiny_model()):
        raise AssertionError("unreachable")
    with pytest.raises(ls.LensteerError, match="the gate's direction is 5 wide"):
        replace(plan, gate=Gate(0.1, direction=torch.ones(5)))


def test_plans_from_before_gates_are_described_as_they_were(tiny_model, random_direction):
    plan = SteeringPlan(random_direction(tiny_model()), 1, 0.5, generated)
    for each in (plan, replace(plan, operator="project_out")):
        named = [1, 0.5, each.operator, "generated", each.vector.double().tolist()]
        assert each.identity() == [named]
    others = [
        replace(plan, gate=Gate(0.1)),
        replace(plan, gate=Gate(0.2)),
        replace(plan, gate=Gate(0.1, above=False)),
        replace(plan, gate=Gate(0.1, measure="projection")),
        replace(plan, gate=Gate(0.1, direction=torch.ones(WIDTH))),
        replace(plan, schedule=Schedule.half_life(3.0)),
        replace(plan, schedule=Schedule.linear(3.0)),
        replace(plan, schedule=Schedule.linear(4.0)),
        replace(plan, schedule=Schedule.linear(4.0, end=0.5)),
        replace(plan, schedule=Schedule.linear(4.0), gate=Gate(0.1)),
        replace(plan, operator="clamp"),
        replace(plan, operator="clamp", unit="unit"),
        replace(plan, operator="rotate"),
    ]
    told = [json.dumps(each.identity()) for each in (plan, *others)]
    assert len(set(told)) == len(told)
    assert replace(plan, gate=Gate(0.1)) == others[0] != others[1]
    assert hash(Gate(0.1)) == hash(Gate(0.1))


def kinds(plan):
    """A plan with each thing that only some formats can hold."""
    return {
        "the operator 'clamp'": replace(plan, operator="clamp"),
        "the operator 'rotate'": replace(plan, operator="rotate", coefficient=20.0),
        "a gate": replace(plan, gate=Gate(0.1)),
        "a schedule": replace(plan, schedule=Schedule.half_life(8.0)),
        "a gate and a schedule": replace(
            plan, operator="project_out", gate=Gate(0.1), schedule=Schedule.half_life(8.0)
        ),
        "the operator 'clamp' and a gate": replace(plan, operator="clamp", gate=Gate(0.1)) + plan,
    }


@pytest.mark.parametrize(
    ("export", "name"),
    [
        ("gguf", "v.gguf"),
        ("easysteer", "v.json"),
        ("vllm_lens", "v.json"),
        ("rhizonymph", "v.json"),
        ("svec", "v.svec"),
        ("lm_eval", "v"),
        ("checkpoint", "v"),
    ],
)
def test_a_format_that_cannot_hold_them_says_so(export, name, tiny_model, random_direction, tmp_path):
    model = tiny_model("llama")
    for words, plan in kinds(SteeringPlan(random_direction(model), 2)).items():
        for extra in ({}, {"orthogonalize": True}) if export == "checkpoint" else ({},):
            with pytest.raises(ls.LensteerError, match=f"cannot express {words}, which .* layer 2 .*ls.export.hf"):
                getattr(ls.export, export)(plan, tmp_path / name, model=model, **extra)
    assert not list(tmp_path.iterdir())


def test_a_folder_holds_them_and_older_plans_stay_in_the_older_schema(tiny_model, random_direction, tmp_path):
    model = tiny_model()
    plan = SteeringPlan(random_direction(model), 2, 0.5, first(3))
    every = {**kinds(plan), "own": replace(plan, gate=Gate(0.2, False, torch.arange(1.0, WIDTH + 1), "projection"))}
    for number, (words, each) in enumerate(every.items()):
        where = folder(each, tmp_path / str(number), model=model)
        assert load_plan(where, model).identity() == each.identity()
        version = json.loads((where / CONFIG).read_text())["version"]
        assert version == (1 if words.startswith("the operator") and "gate" not in words else 2)
    assert json.loads((folder(plan, tmp_path / "old", model=model) / CONFIG).read_text())["version"] == 1
    values = json.loads((tmp_path / "2" / CONFIG).read_text())
    values["edits"][0]["gate"]["threshold"] = None
    del values["lensteer_digest"]
    (tmp_path / "2" / CONFIG).write_text(json.dumps(values))
    with pytest.raises(ls.LensteerError, match=r"the plan in .*threshold nan"):
        load_plan(tmp_path / "2")


@pytest.mark.medium
@pytest.mark.parametrize("scope", [everywhere, generated], ids=lambda s: s.name)
def test_the_script_for_transformers_does_the_same(scope, tiny_model, random_direction, tmp_path):
    model = tiny_model("llama")
    plan = SteeringPlan(random_direction(model), 2, 1.5, scope)
    for number, each in enumerate(kinds(plan).values()):
        done = hf(each, tmp_path / str(number), model=model)
        assert done.difference <= done.tolerance < done.effect
    card = (tmp_path / "5" / "README.md").read_text()
    assert "| clamp | 1.5 | the projection becomes coefficient × 3 | none |" in card
    assert "where the cosine with the direction is above 0.1" in card
    assert "Not evaluated" in card


def test_cards_state_what_is_edited(tiny_model, random_direction):
    plan = SteeringPlan(random_direction(tiny_model()), 1, 0.5, generated)
    assert "| add | 0.5 | 1 = the difference of means itself | 1.5 | `generated` |" in edits_table(plan)
    assert "degrees towards the direction | none |" in edits_table(replace(plan, operator="rotate"))
    scheduled = edits_table(replace(plan, schedule=Schedule.half_life(50.0)))
    assert "| varies | `generated`, halved every 50 generated tokens, from 1 to 0 times the coefficient |" in scheduled


def test_length_evidence_and_controls_are_of_what_is_added_everywhere(tiny_model, random_direction):
    plan = SteeringPlan(random_direction(tiny_model()), 1, 0.5, generated)
    assert plan.length == pytest.approx(1.5)
    raw = torch.ones(1, 4, WIDTH)
    vectors = BehaviorVectors.from_means({"random 0": raw[0], "other": -raw[0]}, torch.ones(4, WIDTH))
    for each in kinds(plan).values():
        edit = each.edits[0]
        assert math.isnan(edit.length)
        assert edit.measured is None
        own = [Condition("random 0/up", edit, kind="up", behavior="random 0")]
        with pytest.raises(ls.LensteerError, match="'random 0/up' does not add one vector"):
            control_conditions(vectors, own, pools=("isotropic",), n=2, samples=1, scope=generated)
    signs = {("clamp", 1.0): 1, ("clamp", 0.0): -1, ("clamp", -1.0): -1, ("rotate", 9.0): 1, ("rotate", -9.0): -1}
    for (operator, coefficient), sign in signs.items():
        changed = replace(plan, operator=operator, coefficient=coefficient)
        assert expected_effect(changed) == ("random 0", sign, None)


@pytest.mark.medium
def test_calibration_takes_every_operator_and_keeps_gates(tiny_model, random_direction):
    model = tiny_model()
    prompts = [models.encode(model, text) for text in ("So", "Take three. Next", "I am")]
    direction = random_direction(model)
    options: dict[str, Any] = dict(budget=0.02, quantile=None, max_new_tokens=6, max_rounds=6, tolerance=0.2)
    found = calibrate(model, prompts, direction, 1, operator="rotate", scope=generated, **options)
    assert found.reached
    assert found.path[0].coefficient == 5.0  # degrees
    gated = SteeringPlan(direction, 1, 1.0, generated, gate=Gate(0.0), schedule=Schedule.half_life(4.0))
    (many,) = calibrate_many(model, prompts, [gated], **options)
    assert (many.plan.gate, many.plan.schedule) == (gated.gate, gated.schedule)
    assert many.reached


def test_the_explorer_offers_what_needs_no_further_number(organism, random_direction):
    state = State("backtracking", 3, operator="clamp", coefficient=0.5)
    assert "operator='clamp', unit='difference'" in code_of(state, "ls.onsets")
    vectors = BehaviorVectors.from_means(
        {"backtracking": torch.randn(8, 128), "other": torch.randn(8, 128)}, torch.randn(8, 128)
    )
    (trace,) = ls.generate_traces(organism, ls.load_tasks(split="dev", n=1), max_new_tokens=4)
    choices = Choices(vectors, [trace])
    plan = choices.plan(choices.check(state))
    assert isinstance(plan, SteeringPlan)
    assert (plan.operator, plan.unit) == ("clamp", "difference")
    with pytest.raises(
        ls.LensteerError, match=r"no operator 'rotate': choose one of \['add', 'project_out', 'clamp'\]"
    ):
        choices.check(replace(state, operator="rotate"))
