"""The explorer without a page: its state, what is computed and sent for it, and what stays unmodified."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lensteer as ls
import synthetic
from lensteer import positions, twins
from lensteer.behaviors import BEHAVIORS, Span
from lensteer.cache_steering import CachePlan, CacheVector
from lensteer.calibration import starting_coefficient
from lensteer.explorer import Choices, State, continue_chain, explore, parse_scope
from lensteer.explorer.background import Stopped, Worker, private_copy
from lensteer.explorer.chain import SELECTIONS, Chain
from lensteer.explorer.payloads import condition_payload, numbers, options_payload
from lensteer.explorer.state import code_of
from lensteer.expressions import NAMES, as_code, inverted
from lensteer.forward import forced_logits
from lensteer.metrics import kl_divergence
from lensteer.positions import Context, Mark, TokenTable
from lensteer.steering import SteeringPlan, foreign_hooks

PACKAGE = Path(ls.__file__).parent / "explorer"
HOSTILE = '<script>alert(1)</script> </think> <img src=x onerror="alert(1)"> &amp; '


@pytest.fixture(scope="module")
def traces(organism):
    return ls.annotate(ls.generate_traces(organism, ls.load_tasks(split="train", n=8), temperature=1.0), ls.grammar)


@pytest.fixture(scope="module")
def vectors(organism, traces):
    return ls.fit_vectors(organism, traces, window="onset")


@pytest.fixture
def explorer(organism, vectors, traces):
    pytest.importorskip("anywidget")
    made = explore(organism, vectors, traces)
    yield made
    made.close()


command_ids = itertools.count(1)


def sends(explorer, **command):
    """What a page does."""
    explorer.set_state({"commands": [{"client": "page", "id": next(command_ids), **command}]})


# Expressions

PIECES = ("<think>", "</think>", ".", "a", "b", "c", "d", "e")
CONTEXT = Context(
    torch.tensor([[3, 0, 4, 2, 5, 2, 1, 6, 2, 7]]),
    torch.tensor([0]),
    torch.tensor([3]),
    TokenTable(torch.arange(8) == 2, (), PIECES, (Mark.of("<think>", PIECES), Mark.of("</think>", PIECES))),
)
atoms = st.sampled_from([*NAMES, "first(2)", "first( 30 )", "at([0])", "at([9, 4,4])", "at([25])"])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        inner.map(lambda a: f"~({a})"),
        inner.map(lambda a: f" ~ {a}"),
        st.tuples(inner, st.sampled_from(["&", " | "]), inner).map(lambda t: f"{t[0]}{t[1]}({t[2]})"),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(expressions)
def test_an_expression_is_what_python_makes_of_it(text):
    expected = eval(text, vars(positions)).mask(CONTEXT)
    assert torch.equal(parse_scope(text).mask(CONTEXT), expected)
    assert torch.equal(eval(as_code(text), {"ls": ls}).mask(CONTEXT), expected)
    other = inverted(text)
    found = parse_scope(other).mask(CONTEXT) if other else torch.zeros_like(expected)
    assert torch.equal(found, ~expected)


NONSENSE = [
    *(
        "__import__('os').system('true')",
        "everywhere.choose",
        "thinking and prompt",
        "thinkin",
        "first(True)",
        "first()",
    ),
    *("first(n=2)", "first(1, 2)", "at(5)", "at([1.0])", "at([*a])", "at([x for x in y])", "at([99999999999])", "3"),
    *("-onsets", "lambda: 0", "(onsets", "onsets)", "\0", "onsets; prompt", "onsets\nprompt", "first(0)", "at([])", ""),
    *("(" * 5000 + "onsets" + ")" * 5000, "(" * 150 + "onsets" + ")" * 150 + "]", "~" * 300 + "onsets", "x" * 200_000),
    *("not " * 5000 + "onsets", "|".join(["onsets"] * 200), "at([" + "1," * 60000 + "])", "at([" + "9" * 5000 + "])"),
]


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
def test_nothing_else_is_an_expression(text):
    with pytest.raises(ls.LensteerError) as caught:
        parse_scope(text)
    assert len(str(caught.value)) < 400


# Chains, states, plans


def test_a_chain_is_cut_into_pieces_without_gaps(organism, traces):
    for trace in (traces[0], replace(traces[0], spans=())):
        chain = Chain.of(organism, trace)
        assert "".join(chain.texts) == trace.prompt + trace.response
        assert len(chain) == len(trace.ids)
        assert [p for piece in chain.pieces for p in range(piece.start, piece.end)] == list(range(len(chain)))
        assert chain.texts[chain.tags[-1]] == "</think>"
        assert any(piece.start == chain.tags[-1] for piece in chain.pieces)
    labeled = [piece for piece in Chain.of(organism, traces[0]).pieces if piece.label in BEHAVIORS]
    assert [(p.start, p.end, p.label) for p in labeled] == [(s.start, s.end, s.label) for s in traces[0].spans]


def test_buttons_choose_what_they_say(organism, traces):
    trace = next(t for t in traces if any(s.label == "backtracking" for s in t.spans))
    chain, n = Chain.of(organism, trace), len(trace.ids)
    span = next(s for s in trace.spans if s.label == "backtracking")

    def chosen(what, before="at([1, 2])", cursor=0):
        return set(chain.positions(chain.select(what, before, "backtracking", cursor)))

    assert chosen("all") == set(range(n))
    assert chosen("none") == set()
    assert chosen("invert") == set(range(n)) - {1, 2}
    assert chosen("invert", "") == set(range(n))
    assert chosen("sentence", cursor=span.end - 1) == {1, 2, *range(span.start, span.end)}
    assert chosen("sentence", f"at({[1, *range(span.start, span.end)]})", span.start) == {1}
    assert chosen("behavior") == {p for s in trace.spans if s.label == "backtracking" for p in range(s.start, s.end)}
    assert chosen("thinking") == set(chain.positions("thinking"))
    assert chosen("sentence_starts") == set(chain.positions("sentence_starts"))
    assert chosen("onsets") == set(chain.positions("onsets"))
    assert chain.expression(chain.positions("thinking"), "thinking") == "thinking"
    assert chain.expression([3, 1, 3]) == "at([1, 3])"
    assert chain.expression([]) == ""
    for bad in (dict(what="word"), dict(what="sentence", cursor=n)):
        with pytest.raises(ls.LensteerError):
            chosen(**bad)
    with pytest.raises(ls.LensteerError, match="no sentence of 'x'"):
        chain.select("behavior", "", "x", 0)
    with pytest.raises(ls.LensteerError, match=f"0 to {n - 1}"):
        chain.expression([n])


def test_groups_are_positions_or_sentences(organism, traces):
    chain = Chain.of(organism, traces[0])
    assert chain.groups([5, 3]) == {"3": (3,), "5": (5,)}
    many = chain.groups(range(len(chain)))
    assert [p for group in many.values() for p in group] == list(range(len(chain)))
    assert len(many) == len(chain.pieces)
    assert chain.groups([]) == {}


def test_what_a_page_may_send_is_checked(vectors, traces):
    choices = Choices(vectors, traces, coefficients={"backtracking": 0.75})
    state = choices.initial()
    assert (state.behavior, state.coefficient) == ("backtracking", 0.75)
    assert choices.check(state.changed({"layer": 2, "temperature": 1, "cut": None})).temperature == 1.0
    assert replace(state, cut=500).changed({"trace": 1}).cut is None
    for values, words in (
        ({"layer": 8}, "no layer 8"),
        ({"layer": 1.5}, "layer=1.5"),
        ({"layer": True}, "layer=True"),
        ({"layers": 1}, "no field 'layers'"),
        ({"behavior": "joy"}, "unknown behavior 'joy'"),
        ({"trace": 8}, "trace=8"),
        ({"trace": -1}, "trace=-1"),
        ({"coefficient": float("nan")}, "not finite"),
        ({"coefficient": None}, "coefficient=None"),
        ({"operator": "multiply"}, "no operator 'multiply'"),
        ({"channel": "cache"}, "needs a cache vector"),
        ({"measure": "joy"}, "no measure 'joy'"),
        ({"cut": 1}, "cut=1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"expression": "joy"}, "'joy'"),
    ):
        with pytest.raises(ls.LensteerError, match=re.escape(words)):
            choices.check(state.changed(values))
    with pytest.raises(ls.LensteerError, match="no traces"):
        Choices(vectors, [])
    with pytest.raises(ls.LensteerError, match="kl_budget=0"):
        Choices(vectors, traces, kl_budget=0.0)


def test_a_kl_budget_is_marked_where_the_scores_tell(organism, vectors, traces):
    scores = ls.attribute(organism, traces, vectors, behaviors=["backtracking"], layers=[2, 4], max_spans=8)
    choices = Choices(vectors, traces, scores, kl_budget=0.2)
    assert choices.budget_coefficient("backtracking", 4) == starting_coefficient(scores, "backtracking", 4, 0.2)
    assert choices.budget_coefficient("backtracking", 3) is None
    assert choices.budget_coefficient("adding-knowledge", 4) is None
    assert Choices(vectors, traces).budget_coefficient("backtracking", 4) is None
    budgets = options_payload(choices)["budgets"]["backtracking"]
    assert [i for i, value in enumerate(budgets) if value] == [2, 4]


def test_first_layer_is_the_selected_or_best_scored_one():
    scores, vectors, trace = synthetic.layer_scores(), synthetic.vectors(), synthetic.trace()
    assert Choices(vectors, [trace], scores, synthetic.layers()).initial().layer == 5
    assert Choices(vectors, [trace], scores).initial().layer == int(scores.mean[scores.row("backtracking")].argmax())
    assert Choices(vectors, [trace]).initial().layer == 4


def test_plans_are_what_is_chosen(vectors, traces):
    choices = Choices(vectors, traces)
    state = State("backtracking", 3, coefficient=-0.5, operator="project_out", expression="thinking & ~onsets")
    plan = choices.plan(state)
    expected = SteeringPlan(vectors["backtracking"], 3, -0.5, ls.thinking & ~ls.onsets, "project_out")
    assert plan.identity() == expected.identity()
    chosen = choices.plan(state, [4, 2])
    assert isinstance(chosen, SteeringPlan)
    assert chosen.scope == ls.at([2, 4])
    assert choices.plan(replace(state, expression=" ")) is None
    assert "nothing is steered" in code_of(replace(state, expression=""), "")


def test_a_coefficient_is_of_the_difference_of_means_and_says_so(vectors, traces):
    choices = Choices(vectors, traces)
    state = choices.initial()
    plan = choices.plan(state)
    assert isinstance(plan, SteeringPlan)
    assert (state.coefficient, plan.unit) == (1.0, "difference")
    assert torch.equal(plan.vector, vectors["backtracking"].at(state.layer))
    assert "coefficient=1.0, scope=ls.onsets, unit='difference')" in code_of(state, "ls.onsets")
    assert "unit" not in code_of(replace(state, operator="project_out"), "ls.onsets")
    assert options_payload(choices)["unit"] == "1 = the difference of means itself"


# Continuations


@pytest.mark.medium
def test_from_the_prompt_it_is_what_generation_makes(organism, vectors):
    tasks = ls.load_tasks(split="dev", n=2)
    plan = SteeringPlan(vectors["backtracking"], 4, 0.6, ls.onsets)
    for temperature in (0.0, 1.0):
        options: dict[str, Any] = dict(max_new_tokens=50, temperature=temperature, seed=3)
        plain, steered = (ls.generate_traces(organism, tasks, plans=p, **options) for p in (None, [plan] * 2))
        for task in range(2):
            found = continue_chain(organism, plain[task], plan, annotator=ls.grammar, **options)
            assert found.unsteered.response_ids == plain[task].response_ids
            assert found.steered.response_ids == steered[task].response_ids
            assert found.steered.spans == ls.annotate([steered[task]], ls.grammar)[0].spans


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_from_the_middle_each_token_is_the_one_that_teacher_forcing_expects(tiny_model, random_direction, family):
    model = tiny_model(family)
    task = ls.Task("a", "b", "dev", "How many?")
    (trace,) = ls.generate_traces(model, [task], max_new_tokens=12)
    plan = SteeringPlan(
        random_direction(model, length=30.0), 1, 1.0, ls.first(7)
    )  # counts from the prompt, not from the cut
    cut = trace.prompt_length + 4
    found = continue_chain(model, trace, plan, cut=cut, max_new_tokens=8, annotator=lambda traces: [[] for _ in traces])
    for condition, its in ((found.unsteered, None), (found.steered, plan)):
        assert condition.response_ids[:4] == trace.response_ids[:4]
        assert len(condition.response_ids) == 12 or condition.finished
        logits = forced_logits(model, [trace.prompt_ids], [condition.response_ids], plans=[its])[0][4:]
        top = logits.topk(2).values
        clear = top[:, 0] - top[:, 1] > 1e-3
        assert clear.sum() >= 4
        assert torch.equal(logits.argmax(-1)[clear], torch.tensor(condition.response_ids[4:])[clear])
    assert found.steered.response_ids != found.unsteered.response_ids


def random_cache_vector(model, position="last_prompt"):
    config = model.original_model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    generator = torch.Generator().manual_seed(0)
    keys, values = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    return CacheVector("random", keys, values, position)


def test_a_cache_plan_puts_its_offset_behind_both_prompts(tiny_model):
    model = tiny_model("llama")
    task, plan = ls.Task("a", "b", "dev", "How many?"), CachePlan(random_cache_vector(model, "offset_token"), 3.0)
    (plain,) = ls.generate_traces(model, [task], max_new_tokens=6)
    (steered,) = ls.generate_traces(model, [task], max_new_tokens=6, plans=[plan])
    (offset,) = ls.generate_traces(model, [task], max_new_tokens=6, prefill="\n")
    found = continue_chain(model, plain, plan, max_new_tokens=6)
    assert found.steered.response_ids == steered.response_ids
    assert found.unsteered.response_ids == offset.response_ids
    assert (found.steered.prompt, found.steered.prefill) == (steered.prompt, "\n")
    again = continue_chain(model, steered, plan, max_new_tokens=6)
    assert again.steered.prompt == steered.prompt


def test_a_continuation_can_be_ended_and_refuses_what_it_cannot(organism, traces, vectors):
    trace, plan = next(t for t in traces if t.finished), SteeringPlan(vectors["backtracking"], 4, 0.5)

    def enough(made):
        if len(made[1]) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        continue_chain(organism, trace, plan, advance=enough)
    assert not foreign_hooks(organism)
    for options, words in (
        (dict(cut=3), "cut=3"),
        (dict(cut=len(trace.ids)), f"to {len(trace.ids) - 1}"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-1.0), "temperature=-1"),
    ):
        with pytest.raises(ls.LensteerError, match=words):
            continue_chain(organism, trace, plan, **options)


# In the background


def test_a_private_copy_shares_weights_and_nothing_else(organism, vectors):
    ids, copied = torch.arange(5, 25)[None], private_copy(organism)
    assert [p.data_ptr() for p in copied.parameters()] == [p.data_ptr() for p in organism.parameters()]
    assert torch.equal(copied(ids), organism(ids))
    before = organism(ids)
    plan = SteeringPlan(vectors["backtracking"], 3, 1.0)
    with plan.on(copied):
        assert torch.equal(organism(ids), before)
        assert not torch.allclose(copied(ids), before, atol=1e-2)
        assert not foreign_hooks(organism)
    assert twins.plain_twin(copied) is not twins.plain_twin(organism)
    with plan.on(organism), pytest.raises(ls.LensteerError, match="plan is on"):
        private_copy(organism)


def test_a_worker_does_the_last_of_its_jobs_and_survives_them():
    failed, done, hold = [], [], threading.Event()
    worker = Worker(failed.append)

    def endless(check):
        hold.set()
        while True:
            check()
            time.sleep(0.001)

    worker.submit(endless)
    assert hold.wait(5)
    assert not worker.wait(0.01)
    worker.submit(lambda check: done.append("never"))
    worker.submit(lambda check: done.append("last"))
    assert worker.wait(5.0)
    assert done == ["last"]

    def divides(check):
        1 / 0  # noqa: B018  # raises

    worker.submit(divides)
    assert worker.wait(5.0)
    assert [type(error) for error in failed] == [ZeroDivisionError]
    worker.submit(endless)
    worker.stop()
    assert worker.wait(5.0)
    worker.submit(lambda check: done.append("again"))
    assert worker.wait(5.0)
    assert (done, len(failed)) == (["last", "again"], 1)
    worker.close()
    worker.submit(lambda check: done.append("after"))
    assert worker.wait(5.0)
    assert done[-1] == "after"
    thread = worker._thread
    worker.close()
    thread.join(5.0)
    assert not thread.is_alive()


@pytest.mark.medium
def test_the_unsteered_pass_of_a_chain_is_run_once(organism, vectors, traces):
    """Whatever thread the system makes in between: jobs of a worker share one, to which a plain twin belongs."""
    pytest.importorskip("anywidget")
    explorer = explore(organism, vectors, traces[:1])
    kept = []
    for layer in (1, 2, 3):
        explorer.state = replace(explorer.state, layer=layer)
        explorer.wait(60.0)
        kept.append(explorer._engine._forced[1]._kept)
        held = threading.Event()
        threads = [threading.Thread(target=held.wait, args=(60.0,)) for _ in range(3)]
        for thread in threads:
            thread.start()  # one of them has the number of a thread that has ended
        explorer.state = replace(explorer.state, coefficient=explorer.state.coefficient + 0.1)
        explorer.wait(60.0)
        kept.append(explorer._engine._forced[1]._kept)
        held.set()
    assert kept[0] is not None
    assert all(other is kept[0] for other in kept)
    explorer.close()


@pytest.mark.medium
def test_cells_and_the_explorer_do_not_disturb_each_other(organism, explorer, vectors):
    tasks = ls.load_tasks(split="dev", n=4)
    plan = SteeringPlan(vectors["example-testing"], 3, -0.6)
    options: dict[str, Any] = dict(plans=[plan] * 4, max_new_tokens=60)
    alone = ls.generate_traces(organism, tasks, **options)
    wanted = continue_chain(organism, explorer._engine.choices.traces[0], explorer.plan, max_new_tokens=150)
    explorer.state = replace(explorer.state, max_new_tokens=150)
    explorer.run_continuation()
    beside = ls.generate_traces(organism, tasks, **options)
    explorer.wait(60.0)
    assert [t.response_ids for t in beside] == [t.response_ids for t in alone]
    assert explorer.result.continuation.steered.response_ids == wanted.steered.response_ids
    assert explorer.result.continuation.unsteered.response_ids == wanted.unsteered.response_ids


# The widget


def library_numbers(model, trace, plan):
    steered, base = (forced_logits(model, [trace.prompt_ids], [trace.response_ids], plans=p)[0] for p in ([plan], None))
    ids = torch.tensor(trace.response_ids)[:, None]
    now, then = (x.double().log_softmax(-1).gather(-1, ids)[:, 0] for x in (steered, base))
    return kl_divergence(steered, base), now - then


def test_what_is_shown_is_what_the_library_says(organism, explorer, traces, vectors):
    for changes in ({}, {"trace": 2, "layer": 2}, {"expression": "at([110, 140])", "coefficient": -1.0}):
        explorer.state = replace(explorer.state, **changes)
        effect = explorer.wait(60.0).result.effect
        trace = traces[explorer.state.trace]
        kl, change = library_numbers(organism, trace, explorer.plan)
        torch.testing.assert_close(effect.kl, kl, rtol=0, atol=1e-4)
        torch.testing.assert_close(effect.change, change, rtol=0, atol=1e-4)
        assert effect.total > 1e-3
        assert explorer.effect["kl"] == numbers(effect.kl)
        assert explorer.effect["steering"] == explorer.settings["steering"]
    wanted = ls.token_projections(organism, trace, vectors["backtracking"], 2).values
    torch.testing.assert_close(torch.tensor(explorer.projection), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.medium
def test_a_page_steers_it(explorer):
    sends(explorer, name="set", values={"layer": 2, "coefficient": 1})
    assert (explorer.state.layer, explorer.state.coefficient) == (2, 1.0)
    sends(explorer, name="choose", positions=[120, 121])
    assert explorer.positions == (120, 121)
    assert explorer.plan.scope == ls.at([120, 121])
    for what in SELECTIONS:
        sends(explorer, name="select", what=what, cursor=120)
        assert explorer.status["error"] is None
    sends(explorer, name="expression", values={"expression": "thinking"})
    assert tuple(explorer.settings["positions"]) == explorer.positions
    sends(explorer, name="set", values={"max_new_tokens": 5, "cut": 130})
    sends(explorer, name="continue")
    explorer.wait(60.0)
    assert explorer.result.continuation.cut == 130
    assert [condition["tokens"] for condition in explorer.continuation["sides"]] == [5, 5]
    sends(explorer, name="select", what="behavior", cursor=0)
    sends(explorer, name="rank")
    explorer.wait(60.0)
    assert explorer.result.ranking.groups
    assert explorer.status == {"error": None, "slow": "", "done": len(explorer.result.ranking.names)} | {
        "of": len(explorer.result.ranking.names)
    }
    importance = [abs(group["importance"]) for group in explorer.ranking["groups"]]
    assert importance == sorted(importance, reverse=True)
    for name in ("options", "settings", "chain", "projection", "effect", "continuation", "ranking", "status", "ack"):
        json.dumps(getattr(explorer, name), allow_nan=False)


def test_commands_are_obeyed_once_and_in_order(explorer):
    first = {"client": "a", "id": 1, "name": "select", "what": "invert", "cursor": 0}
    second = {"client": "a", "id": 2, "name": "select", "what": "invert", "cursor": 0}
    third = {"client": "b", "id": 1, "name": "set", "values": {"layer": 1}}
    before = explorer.state.expression
    explorer.set_state({"commands": [first]})
    explorer.set_state({"commands": [first, second]})
    assert explorer.state.expression == before
    explorer.set_state({"commands": [second, third]})
    assert explorer.state.layer == 1
    assert explorer.ack == {"a": 2, "b": 1}


def test_nothing_that_a_page_sends_raises(explorer):
    before = explorer.state
    for command, where in (
        (dict(name="expression", values={"expression": "joy("}), "expression"),
        (dict(name="set", values={"layer": 99}), "set"),
        (dict(name="set", values=7), "set"),
        (dict(name="set"), "set"),
        (dict(name="choose", positions=[10**6]), "choose"),
        (dict(name="choose", spans="all"), "choose"),
        (dict(name="select", what="joy", cursor=0), "select"),
        (dict(name="joy"), "joy"),
        (dict(), "page"),
    ):
        sends(explorer, **command)
        assert explorer.status["error"]["where"] == where
        assert explorer.status["error"]["message"]
    explorer.set_state({"commands": ["joy", None]})
    assert explorer.status["error"]["where"] == "page"
    assert explorer.state == before
    assert explorer.error is not None
    sends(explorer, name="set", values={"layer": 1})
    sends(explorer, name="select", what="none", cursor=0)
    sends(explorer, name="rank")
    assert "nothing to leave out" in explorer.status["error"]["message"]
    with pytest.raises(ls.LensteerError, match="no layer 99"):
        explorer.state = replace(explorer.state, layer=99)


@pytest.mark.medium
def test_what_goes_wrong_in_a_thread_is_shown(organism, vectors, traces):
    pytest.importorskip("anywidget")

    def broken(traces):
        raise RuntimeError("no judge today")

    explorer = explore(organism, vectors, traces, annotator=broken)
    explorer.state = replace(explorer.state, max_new_tokens=3)
    explorer.run_continuation()
    explorer.wait(60.0)
    assert explorer.status["error"] == {"where": "slow", "message": "RuntimeError: no judge today"}
    assert explorer.status["slow"] == ""
    explorer.state = replace(explorer.state, coefficient=3e38)
    explorer.wait(60.0)
    assert "not finite" in explorer.status["error"]["message"]
    assert explorer.effect == {}
    assert explorer.result.effect is None
    explorer.state = replace(explorer.state, coefficient=0.5)
    assert explorer.wait(60.0).result.effect is not None
    assert explorer.status["error"] is None


@pytest.mark.medium
def test_results_of_other_settings_are_not_the_results(explorer):
    explorer.state = replace(explorer.state, max_new_tokens=4)
    explorer.run_continuation()
    explorer.wait(60.0)
    explorer.choose([100, 101])
    assert explorer.result.continuation is None
    assert explorer.continuation["note"] == "of earlier settings"
    explorer.run_ranking()
    explorer.wait(60.0)
    explorer.state = replace(explorer.state, cut=None, seed=9)
    assert explorer.result.ranking is not None
    explorer.state = replace(explorer.state, measure="log_prob")
    assert explorer.result.ranking is None
    assert explorer.ranking["stale"]
    explorer.state = replace(explorer.state, trace=1)
    assert (explorer.continuation, explorer.ranking) == ({}, {})


def test_it_can_be_stopped(explorer):
    explorer.state = replace(explorer.state, max_new_tokens=4000, temperature=3.0)
    explorer.run_continuation()
    assert explorer.status["slow"] == "continuing"
    with pytest.raises(ls.LensteerError, match="still at work"):
        explorer.wait(0.05)
    sends(explorer, name="stop")
    explorer.wait(60.0)
    assert explorer.result.continuation is None
    assert explorer.status["slow"] == ""
    assert explorer.continuation.get("note", "stopped") == "stopped"


@pytest.mark.medium
def test_the_code_repeats_it(organism, explorer, vectors, traces):
    given = {"model": organism, "vectors": vectors, "traces": traces}
    explorer.state = replace(explorer.state, trace=1, layer=3, max_new_tokens=6, temperature=1.0, seed=4)
    explorer.wait(60.0).run_continuation()
    explorer.wait(60.0).run_ranking()
    explorer.wait(60.0)
    result, namespace = explorer.result, dict(given)
    exec(explorer.to_code(), namespace)
    assert explorer.settings["code"] == explorer.to_code()
    assert namespace["plan"].identity() == explorer.plan.identity()
    assert namespace["effect"].total == pytest.approx(result.effect.total, rel=1e-4, abs=1e-5)
    assert namespace["continuation"].steered == result.continuation.steered
    assert namespace["ranking"].names == result.ranking.names
    assert namespace["ranking"].importance == pytest.approx(result.ranking.importance, rel=1e-4, abs=1e-4)
    begin = traces[1].prompt_length
    scope = f"at([{begin}, {begin + 1}, {begin + 9}])"
    options: dict[str, Any] = dict(
        operator="project_out", expression=scope, measure="log_prob", behavior=traces[1].spans[-1].label
    )
    explorer.state = replace(explorer.state, **options)
    explorer.run_ranking()
    explorer.wait(60.0)
    exec(explorer.to_code(), namespace)
    assert namespace["ranking"].importance == pytest.approx(explorer.result.ranking.importance, rel=1e-4, abs=1e-4)
    assert namespace["ranking"].targets == explorer.result.ranking.targets != ()
    explorer.select("none")
    exec(explorer.to_code(), dict(given))
    assert explorer.plan is None
    assert explorer.wait(60.0).result.effect.total == 0


@pytest.mark.medium
def test_a_cache_vector_is_another_channel(organism, vectors, traces):
    pytest.importorskip("anywidget")
    for position in ("last_prompt", "offset_token"):
        vector = random_cache_vector(organism, position)
        explorer = explore(organism, vectors, traces, cache_vector=vector)
        explorer.state = replace(explorer.state, channel="cache", c_values=2.0, max_new_tokens=4)
        assert explorer.plan == CachePlan(vector, 2.0)
        explorer.run_continuation()
        result = explorer.wait(60.0).result
        namespace = dict(model=organism, vectors=vectors, traces=traces, cache_vector=vector)
        exec(explorer.to_code(), namespace)
        assert result.effect.total == pytest.approx(namespace["effect"].total, rel=1e-4, abs=1e-5)
        assert result.effect.total > 0.01
        assert namespace["continuation"].steered == result.continuation.steered
        for condition, made in zip(
            explorer.continuation["sides"], (result.continuation.unsteered, result.continuation.steered), strict=True
        ):
            assert "".join(text for _, text in condition["pieces"]) == made.response
            assert condition["tokens"] == len(made.response_ids) <= 4
        with pytest.raises(ls.LensteerError, match="nothing to leave out"):
            explorer.run_ranking()
        explorer.close()
    with pytest.raises(ls.LensteerError, match="fit it on this model"):
        explore(organism, vectors, traces, cache_vector=replace(vector, values=vector.values[:2], keys=vector.keys[:2]))


def test_what_has_not_changed_is_not_sent(explorer):
    explorer.wait(60.0)
    sent = []
    explorer.observe(lambda change: sent.append(change["name"]), [name for name in explorer.keys if name[0] != "_"])
    sends(explorer, name="set", values={"layer": explorer.state.layer})
    sends(explorer, name="choose", positions=list(explorer.positions))
    explorer.wait(60.0)
    assert set(sent) == {"commands", "ack"}
    sent.clear()
    sends(explorer, name="set", values={"seed": 5})
    explorer.wait(60.0)
    assert sorted(sent) == ["ack", "commands", "settings"]
    sent.clear()
    sends(explorer, name="set", values={"coefficient": 0.75})
    explorer.wait(60.0)
    assert sorted(sent) == ["ack", "commands", "effect", "settings"]


def test_text_goes_as_text(organism, vectors, traces):
    pytest.importorskip("anywidget")
    trace = traces[0]
    response = HOSTILE + trace.response[len(HOSTILE) :]
    span = Span("backtracking", trace.prompt_length + 1, trace.prompt_length + 4, 8, 30)
    explorer = explore(organism, vectors, [replace(trace, response=response, spans=(span,))])
    shown = "".join(explorer.chain["texts"])
    assert shown == trace.prompt + response
    part = condition_payload(replace(trace, response=response, spans=(span,)), 0, running=False)
    assert "".join(text for _, text in part["pieces"]) == response
    assert ["backtracking", response[8:30]] in part["pieces"]
    begun = replace(trace, response="half a�", response_ids=(1, 2, 3), offsets=(0, 5, 6), spans=())
    cut = condition_payload(begun, 0, running=True)
    assert cut["pieces"] == [["", "half a"]]
    explorer.close()


def test_the_page_writes_no_markup_and_calls_nobody():
    script, style = (PACKAGE / name for name in ("widget.js", "widget.css"))
    code = script.read_text(encoding="utf-8")
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "import("):
        assert forbidden not in code
    assert set(re.findall(r"https?://[^\s\"'`]+", code + style.read_text(encoding="utf-8"))) == {
        "http://www.w3.org/2000/svg"
    }
    assert "@import" not in style.read_text(encoding="utf-8")
    head, _, body = code.partition("*/")
    named = set(re.findall(r'(?:test: "|data-testid": "ls-)([\w-]+)"', body))
    named |= set(re.findall(r'(?:select|field|button)\("([\w-]+)",', body)) | {"unsteered", "steered"}
    missing = [name for name in named if f"ls-{name}" not in head]
    assert len(named) > 30
    assert missing == []
    for what in SELECTIONS:
        assert re.search(rf"[ -]{what}\b", head)


def test_without_the_extra_it_says_what_to_install(organism, vectors, traces, monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "lensteer.explorer.widget", raising=False)
    monkeypatch.delattr("lensteer.explorer.widget", raising=False)
    with pytest.raises(ls.LensteerError, match=re.escape("pip install 'lensteer[notebook]'")):
        explore(organism, vectors, traces)


@pytest.mark.medium
def test_bad_arguments_are_refused(organism, vectors, traces, tiny_model):
    pytest.importorskip("anywidget")
    for options, words in (
        (dict(traces=[]), "no traces"),
        (dict(traces=[replace(traces[0], response_ids=(), offsets=(), spans=())]), "no response"),
        (dict(traces=[replace(traces[0], prompt_ids=(10**6,), spans=())]), "token id 1000000"),
        (dict(model=tiny_model("qwen2")), "do not fit"),
    ):
        with pytest.raises(ls.LensteerError, match=words):
            explore(**{"model": organism, "vectors": vectors, "traces": traces, **options})


@pytest.mark.medium
def test_importing_the_explorer_imports_no_widgets():
    probe = "import sys, lensteer.explorer; print([m for m in ('anywidget', 'plotly') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
