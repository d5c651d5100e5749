"""`lensteer verify`: a planted effect is found, its absence is not, drift raises an alarm, and trouble is named."""

from __future__ import annotations

import json
import math
import random
import socket
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import lensteer as ls
from chat_server import ChatServer
from lensteer.endpoints import Answer, Asking, Client, Endpoint, ask_all, read_answers
from lensteer.export.verification import (
    AS_PROMISED,
    NOT_SHOWN,
    STRONGER,
    THERE,
    WEAKER,
    WRONG_WAY,
    Look,
    Verification,
    drift_of,
    expected_effect,
    level_of,
    look_at,
    trace_of,
    verify,
)
from lensteer.statistics import Estimate
from lensteer.steering import Evidence

TASKS = [ls.Task(f"t{i:02}", "planted", "test", f"Question {i}?") for i in range(16)]
ASKING = Asking(n_samples=1, temperature=1.0)
POLITE, PLAIN = "Thank you kindly.", "The sky is blue."


@ls.labeling("polite", "plain")
def tone(traces):
    """Each sentence of the chain is polite if it thanks."""
    found = []
    for trace in traces:
        text = trace.response[slice(*trace.thinking)] or trace.response
        found.append(
            [ls.Sentence("polite" if "Thank" in s else "plain", s.strip() + ".") for s in text.split(".")[:-1]]
        )
    return found


def says(share: float):
    """A server's answers: 24 sentences, each polite with a probability, drawn by the request's seed."""

    def say(payload):
        draw = random.Random(payload.get("seed", 0))
        return " ".join(POLITE if draw.random() < share else PLAIN for _ in range(24))

    return say


def evidence(change: float, scope: str = "everywhere", unit: str = "sentences") -> Evidence:
    none = Estimate(math.nan, math.nan, math.nan)
    return Evidence(
        model={}, label="polite", sign=1, layer=1, coefficient=2.0, coefficient_unit="difference", length=2 * 32**0.5,
        scope=scope, unit=unit, annotator="tone", n_tasks=24, n_samples=2, unsteered=Estimate(0.1, 0.08, 0.12),
        steered=Estimate(0.1 + change, 0.08 + change, 0.12 + change),
        change=Estimate(change, change - 0.03, change + 0.03), prompted=None, p=0.001, controls=(), verdict="shown",
        readable=True, text=(), accuracy=none, unsteered_accuracy=none,
    )  # fmt: skip


@pytest.fixture
def plan():
    direction = ls.Direction("polite", torch.ones(4, 32), torch.ones(4), (0, 1, 2, 3))
    return ls.SteeringPlan(direction, 1, 2.0, evidence=evidence(0.3))


def run(plan, out, steered, unsteered, **options):
    """Verify against servers with these shares of polite sentences."""
    with ChatServer(says(steered), ["m"]) as served, ChatServer(says(unsteered), ["m"]) as base:
        options = dict(asking=ASKING) | options
        return verify(plan, Endpoint(url=served.url), TASKS, tone, out, unsteered=Endpoint(url=base.url), **options)


def test_a_planted_effect_is_there_as_promised(plan, tmp_path):
    found = run(plan, tmp_path, 0.4, 0.1)
    (look,) = found.looks
    assert found.there
    assert (found.verdict, found.against_promise, found.alarm) == (THERE, AS_PROMISED, False)
    assert look.change.low < 0.3 < look.change.high
    assert look.unsteered.value == pytest.approx(0.1, abs=0.05)
    assert (look.finished, look.unsteered_finished, look.drift) == (1.0, 1.0, None)
    assert "promised: +30.0 % [+27.0, +33.0]; as promised" in str(found)
    stored = json.loads((tmp_path / "history.jsonl").read_text())
    assert Look.from_dict(stored) == look


@pytest.mark.medium
def test_no_effect_a_weaker_a_stronger_and_a_reversed_one(plan, tmp_path):
    for steered, unsteered, verdict, beside in [
        (0.1, 0.1, NOT_SHOWN, WEAKER),
        (0.2, 0.1, THERE, WEAKER),
        (0.8, 0.1, THERE, STRONGER),
        (0.1, 0.5, WRONG_WAY, WEAKER),
    ]:
        found = run(plan, tmp_path / f"{steered}-{unsteered}", steered, unsteered)
        assert (found.verdict, found.against_promise) == (verdict, beside)


def test_the_estimates_are_those_of_the_counts():
    counts: dict[str, tuple[int, ...]] = {f"t{i}": (i % 4, 6, 1, 6 + i % 2) for i in range(12)}
    look = look_at(1, "now", counts, None)
    sums = table(counts).sum(0)
    own, base = sums[0] / sums[1], sums[2] / sums[3]
    assert (look.steered.value, look.unsteered.value) == (pytest.approx(own), pytest.approx(base))
    assert look.change.value == pytest.approx(own - base)
    again = look_at(2, "later", counts, look)
    assert again.drift is not None
    assert again.drift.value == pytest.approx(0)
    assert not again.alarm
    with pytest.raises(ls.LensteerError, match="other tasks"):
        look_at(2, "later", {**counts, "new": (0, 1, 0, 1)}, look)
    with pytest.raises(ls.LensteerError, match="no sentence in the answers without the plan"):
        look_at(1, "now", dict.fromkeys(counts, (1, 2, 0, 0)), None)


def drawn(seed: int, steered: float, unsteered: float = 0.1, n: int = 24) -> dict[str, tuple[int, ...]]:
    draw = np.random.default_rng(seed)
    return {f"t{i}": (int(draw.binomial(24, steered)), 24, int(draw.binomial(24, unsteered)), 24) for i in range(n)}


def table(counts: dict[str, tuple[int, ...]]) -> np.ndarray:
    return np.array(list(counts.values()), float)


@pytest.mark.medium
def test_looking_again_and_again_raises_few_false_alarms_and_finds_a_drift():
    """Over 20 looks without drift, few of 20 monitors raise an alarm; uncorrected, a third and more would."""
    alarms = uncorrected = 0
    for monitor in range(20):
        first = table(drawn(1000 * monitor, 0.4))
        looks = [(k, table(drawn(1000 * monitor + k, 0.4))) for k in range(2, 22)]
        alarms += any(drift_of(now, first, level_of(k)).excludes(0.0) for k, now in looks)
        uncorrected += any(drift_of(now, first, 0.05).excludes(0.0) for _, now in looks)
    assert alarms <= 3
    assert uncorrected >= 6
    first = table(drawn(0, 0.4))
    assert all(drift_of(table(drawn(k, 0.15)), first, level_of(k)).excludes(0.0) for k in (2, 10, 100))
    assert 0.0499 < sum(level_of(k) for k in range(2, 10_000)) < 0.05


@pytest.mark.medium
def test_every_keeps_a_history_waits_and_stops_at_an_alarm(plan, tmp_path):
    shares, waits, said = iter([0.4, 0.4, 0.05]), [], []

    def next_look(_):
        waits.append(_)
        server.say = says(next(shares))

    with ChatServer(says(next(shares)), ["m"]) as server, ChatServer(says(0.1), ["m"]) as base:
        found = verify(
            plan, Endpoint(url=server.url), TASKS, tone, tmp_path, unsteered=Endpoint(url=base.url), asking=ASKING,
            every=3600.0, sleep=next_look, announce=said.append,
        )  # fmt: skip
    assert [look.alarm for look in found.looks] == [False, False, True]
    points = found.plot().data[0]
    assert list(points.y) == [look.change.value for look in found.looks]
    assert list(points.marker.symbol) == ["circle", "circle", "x"]
    assert found.alarm
    assert not found.there
    assert len(waits) == 2
    assert all(3590 < wait <= 3600 for wait in waits)
    assert [f"look {k}" in text for k, text in enumerate(said, 1)] == [False, True, True]
    assert "ALARM, the effect has changed" in said[-1]
    levels = [look.level for look in found.looks]
    assert levels == [0, pytest.approx(6 * 0.05 / math.pi**2), pytest.approx(6 * 0.05 / math.pi**2 / 4)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "history.jsonl", "look-0001", "look-0002", "look-0003", "verify.json",
    ]  # fmt: skip


def test_a_finished_look_is_not_repeated_and_a_killed_one_resumes(plan, tmp_path):
    with ChatServer(says(0.4), ["m"]) as served, ChatServer(says(0.1), ["m"]) as base:
        own, other = Endpoint(url=served.url, retries=0), Endpoint(url=base.url)

        def call() -> Verification:
            return verify(plan, own, TASKS, tone, tmp_path, unsteered=other, asking=ASKING)

        healthy = served.say
        served.say = lambda payload: (500, "planted") if len(served.payloads) > 6 else healthy(payload)
        with pytest.raises(ls.LensteerError, match=r"status 500 .*planted.*of 16 answers are kept"):
            call()
        kept = len(read_answers(tmp_path / "look-0001" / "steered.jsonl"))
        assert 0 < kept < 16
        with (tmp_path / "look-0001" / "steered.jsonl").open("a") as file:
            file.write('{"task": "t0')  # as a kill leaves it
        served.say, before = healthy, len(served.payloads)
        first = call()
        assert len(served.payloads) - before == 16 - kept
        assert len(base.payloads) == 16
        assert str(call()) == str(first)
        assert len(base.payloads) == 16
        assert served.max_in_flight <= 4


@pytest.mark.medium
def test_recorded_answers_without_the_plan(plan, tmp_path):
    run(plan, tmp_path / "first", 0.4, 0.1)
    recorded = tmp_path / "first" / "look-0001" / "unsteered.jsonl"
    with ChatServer(says(0.4), ["m"]) as served:
        found = verify(plan, Endpoint(url=served.url), TASKS, tone, tmp_path / "a", unsteered=recorded, asking=ASKING)
        assert found.there
        more = [*TASKS, ls.Task("new", "planted", "test", "New?")]
        with pytest.raises(ls.LensteerError, match=r"has no answer to \['new'\]"):
            verify(plan, Endpoint(url=served.url), more, tone, tmp_path / "b", unsteered=recorded, asking=ASKING)
        with pytest.raises(ls.LensteerError, match="no file"):
            verify(plan, Endpoint(url=served.url), TASKS, tone, tmp_path / "c", unsteered="no.jsonl", asking=ASKING)


def test_a_folder_of_another_verification_is_refused(plan, tmp_path):
    run(plan, tmp_path, 0.4, 0.1)
    with pytest.raises(ls.LensteerError, match="holds looks with another endpoint"):
        run(plan, tmp_path, 0.4, 0.1)


def test_a_server_that_is_down_slow_or_another_model(plan, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with ChatServer(says(0.1), ["m"]) as base:
        other = Endpoint(url=base.url)

        def fails(endpoint: Endpoint, said: str, **options) -> None:
            options = dict(asking=ASKING) | options
            with pytest.raises(ls.LensteerError, match=said):
                verify(plan, endpoint, TASKS, tone, tmp_path / said[:9], unsteered=other, **options)

        fails(Endpoint(url=down, retries=0), f"no connection to {down}: is the server up")
        fails(Endpoint(url=down, retries=1, timeout=5.0), "after 2 tries")
        with ChatServer(says(0.4), ["m"], delay=1.0) as slow:
            fails(Endpoint(url=slow.url, timeout=0.1, retries=0), "within 0.1 s: give it more time")
        with ChatServer(says(0.4), ["llama-70b"]) as foreign:
            fails(Endpoint(url=foreign.url), "serves 'llama-70b', and the plan is of 'mini-r1'", model="mini-r1")
            fails(Endpoint(url=foreign.url, model="mini-r1"), r"does not serve 'mini-r1': it serves \['llama-70b'\]")
        with ChatServer(says(0.4), ["a", "b"]) as two:
            fails(Endpoint(url=two.url), r"serves \['a', 'b'\]: name one")
        with ChatServer(says(0.4)) as silent:
            fails(Endpoint(url=silent.url), "serves no model that it lists: name one")
        with ChatServer(lambda payload: (401, "who are you"), ["m"]) as locked:
            fails(Endpoint(url=locked.url), "status 401 .*LENSTEER_ENDPOINT_KEY")
        with ChatServer(lambda payload: POLITE, ["m"]) as greedy:
            fails(Endpoint(url=greedy.url), "gave the same answer to all 2 samples", asking=Asking(n_samples=2))
        with ChatServer(lambda payload: "", ["m"]) as empty:
            fails(Endpoint(url=empty.url), "no sentence in the answers at the endpoint")
    assert list(tmp_path.rglob("history.jsonl")) == []


def test_wrong_arguments(plan, tmp_path):
    def fails(said: str, own=plan, tasks=TASKS, url="http://127.0.0.1:1/v1", annotator=tone, **options) -> None:
        with pytest.raises(ls.LensteerError, match=said):
            verify(own, Endpoint(url=url), tasks, annotator, tmp_path, unsteered="x.jsonl", **options)

    other = ls.SteeringPlan(ls.Direction("rude", torch.ones(4, 32), torch.ones(4), (0, 1, 2, 3)), 1)
    fails("give at least two", tasks=TASKS[:1])
    fails("at least one look", looks=0)
    fails("positive time", every=-1.0)
    fails(r"steers along \['polite', 'rude'\]: say which", own=plan + other)
    fails("does not steer along 'calm'", behavior="calm")
    fails("adds and takes away 'polite'", own=plan + replace(plan, coefficient=-1.0))
    fails(r"never labels \['rude'\]", own=other)
    for url, said in [
        ("localhost:80", "the URL 'localhost:80'"),
        ("http://a:b@host/v1", "holds a name, password"),
    ]:
        with pytest.raises(ls.LensteerError, match=said):
            Endpoint(url=url)
    with pytest.raises(ls.LensteerError, match="concurrency=0"):
        Endpoint(url="http://x/v1", concurrency=0)
    with pytest.raises(ls.LensteerError, match="n_samples=0"):
        Asking(n_samples=0)
    with pytest.raises(ls.LensteerError, match=r"top_p=1\.5"):
        Asking(top_p=1.5)
    assert list(tmp_path.iterdir()) == []


def test_what_is_promised_is_what_was_measured_at_this_scope(plan):
    assert expected_effect(plan) == ("polite", 1, plan.evidence.change)
    assert expected_effect(replace(plan, evidence=evidence(0.3, scope="onsets"))) == ("polite", 1, None)
    assert expected_effect(replace(plan, evidence=evidence(0.3, unit="score"))) == ("polite", 1, None)
    assert expected_effect(replace(plan, coefficient=-2.0)) == ("polite", -1, None)
    assert expected_effect(replace(plan, operator="project_out")) == ("polite", -1, None)
    unknown = Verification("u", "m", "polite", 1, None, (look_at(1, "", drawn(0, 0.4), None),))
    assert unknown.against_promise == ""
    assert "was not evaluated" in str(unknown)


def test_thoughts_are_found_wherever_the_server_puts_them(tmp_path):
    task = TASKS[0]
    for text, thought, chain in [
        ("<think>\nA. B.\n</think>\n\nC.", "auto", "\nA. B.\n"),
        ("A. B.\n</think>\n\nC.", "auto", "A. B.\n"),  # the template opened it
        ("A. B.", "auto", "A. B."),
        ("A. B.", "<think>", "A. B."),
        ("[a] A. [/a] B.", "[a] [/a]", " A. "),
        ("<think>A.</think>B.", "none", "<think>A.</think>B."),
    ]:
        trace = trace_of(Answer("t00", 0, text, True), task, thought)
        assert trace.response[slice(*trace.thinking)] == chain
    with ChatServer(lambda payload: "C.", ["m"], reasoning="A. B.") as server:
        client = Client(Endpoint(url=server.url))
        (answer,) = ask_all(client, "m", [task], Asking(), tmp_path / "answers.jsonl", "x")
        client.close()
    assert answer.text == "<think>\nA. B.\n</think>\n\nC."


def test_a_server_without_seeds_is_asked_without(plan, tmp_path):
    healthy = says(0.4)

    def say(payload):
        return (422, "unexpected keys: seed") if "seed" in payload else healthy(payload)

    with ChatServer(say, ["m"]) as server:
        client = Client(Endpoint(url=server.url, concurrency=1))
        found = ask_all(client, "m", TASKS[:3], Asking(system="Be brief."), tmp_path / "answers.jsonl", "x")
        client.close()
    assert len(found) == 3
    assert ["seed" in payload for payload in server.payloads] == [True, False, False, False]
    assert server.payloads[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert server.payloads[-1]["top_p"] == 1.0


@pytest.mark.medium
def test_the_command_line(plan, tiny_model, tmp_path):
    from lensteer.cli import app

    model = tiny_model("llama")
    folder = ls.export.folder(replace(plan, evidence=None), tmp_path / "plan", model=model)
    own = tmp_path / "own.py"
    own.write_text(
        "from lensteer import Sentence\n\ndef tone(traces):\n"
        "    return [[Sentence('polite' if 'Thank' in s else 'plain', s.strip() + '.') "
        "for s in t.response.split('.')[:-1]] for t in traces]\n"
    )
    name = ls.export.read_plan(folder).model.name
    with ChatServer(says(0.4), [name]) as served, ChatServer(says(0.1), [name]) as base:
        command = [
            "verify", "--endpoint", served.url, "--plan", str(folder), "--unsteered", base.url, "--out",
            str(tmp_path / "out"), "--n-tasks", "12", "--n", "2", "--annotator", f"{own}:tone",
        ]  # fmt: skip
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert "the effect is there" in done.output
        assert "it was not evaluated" in done.output
        served.say = says(0.1)
        gone = CliRunner().invoke(app, [*command, "--every", "1s", "--looks", "2"])
        assert gone.exit_code == 1, gone.output
        assert "look 2" in gone.output
        wrong = CliRunner().invoke(app, [*command, "--every", "soon"])
        assert wrong.exit_code == 1
        assert "error: 'soon' is no time" in wrong.output


def test_a_server_is_started_waited_for_and_ended():
    with ls.export.started(sys.executable, "-m", "http.server", "PORT", "--bind", "127.0.0.1") as url:
        port = int(url.split(":")[2].split("/")[0])
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("vllm", "serve"), "'vllm serve': write PORT"),
        (("no-such-server", "PORT"), "'no-such-server' cannot be started"),
        ((sys.executable, "-c", "raise SystemExit('no model PORT')"), r"ended with status 1: no model \d+"),
        ((sys.executable, "-c", "import time; time.sleep(60)", "PORT"), "does not answer at .* after 0.1 seconds"),
    ],
)
def test_a_server_that_does_not_come_up(command, said):
    seconds = 0.1 if "sleep" in str(command) else 20.0
    with pytest.raises(ls.LensteerError, match=said), ls.export.started(*command, seconds=seconds):
        pytest.fail("it came up")
