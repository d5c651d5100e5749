"""Plain chains from an engine: the very ids come back, another model is noticed, and what has come is kept."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lensteer as ls
from completion_server import CompletionServer
from lensteer.cli.commands import app
from lensteer.generation import Endpoint, Engine, Offline, Served, forced_logits, generate
from lensteer.generation.engines import MAX_GAP, Request, Written, check_engine
from lensteer.traces import load_traces

pytest.importorskip("openai")
CHAINS: dict[str, Any] = dict(max_new_tokens=30, batch_size=4)


@pytest.fixture(scope="module")
def tasks() -> list[ls.Task]:
    return ls.load_tasks("organism", split="train", n=6)


def engine(server: CompletionServer, **options: Any) -> Served:
    return Served(Endpoint(url=server.url, retries=0, **options))


def test_a_servers_chains_are_the_ids_that_it_sampled(organism, tasks):
    with CompletionServer(organism) as server:
        greedy = ls.generate_traces(organism, tasks, engine=engine(server), **CHAINS)
        assert [t.response_ids for t in greedy] == [
            t.response_ids for t in ls.generate_traces(organism, tasks, **CHAINS)
        ]
        drawn = ls.generate_traces(organism, tasks, n_samples=2, temperature=0.8, engine=engine(server), **CHAINS)
    own = ls.generate_traces(organism, tasks, n_samples=2, temperature=0.8, **CHAINS)
    assert [replace(t, run="") for t in drawn] == [replace(t, run="") for t in own]  # this server draws as we do
    assert {t.run for t in drawn}.isdisjoint(t.run for t in own)
    asked = server.payloads[-1]
    assert (asked["top_k"], asked["min_p"], asked["repetition_penalty"], asked["return_token_ids"]) == (0, 0, 1, True)
    assert set(asked["stop_token_ids"]) == set(ls.models.end_ids(organism))
    assert len({each["seed"] for each in server.payloads[-12:]}) == 12


def test_what_has_come_before_an_error_is_kept(organism, tasks, tmp_path):
    path = tmp_path / "t.jsonl"

    def breaks(number: int, answer: dict[str, Any]) -> Any:
        return (400, "no more") if number == 5 else answer

    with CompletionServer(organism, breaks) as server, pytest.raises(ls.LensteerError, match=r"status 400 .*no more"):
        ls.generate_traces(organism, tasks, engine=engine(server, concurrency=1), path=path, **CHAINS)
    kept = load_traces(path)
    assert 3 <= len(kept) < 6  # the first request was the check
    with CompletionServer(organism) as server:
        whole = ls.generate_traces(organism, tasks, engine=engine(server), path=path, **CHAINS)
        assert len(server.payloads) == 1 + 6 - len(kept)
        assert ls.generate_traces(organism, tasks, engine=engine(server), path=path, **CHAINS) == whole
        assert len(server.payloads) == 1 + 6 - len(kept)  # nothing is missing, so nothing is asked
    with pytest.raises(ls.LensteerError, match="plans and engine that wrote them"):
        ls.generate_traces(organism, tasks, path=path, **CHAINS)


def test_another_model_is_noticed(organism, tasks):
    other = ls.load_model()
    with torch.no_grad():
        other.original_model.model.norm.weight.mul_(0.4)

    def strange(_: int, answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["token_ids"] = [10**6]
        return answer

    asked = Request(ls.generate_traces(organism, tasks[:1], **CHAINS)[0].prompt_ids, 9, 0.8, 0.9, 7, ())
    with CompletionServer(organism) as server:
        assert check_engine(organism, engine(server), asked) < 1e-4
        with pytest.raises(ls.LensteerError, match=rf"'served m' has another model .* less than {MAX_GAP}"):
            ls.generate_traces(other, tasks, engine=engine(server), **CHAINS)
    with CompletionServer(organism, strange) as server:
        with pytest.raises(ls.LensteerError, match=r"wrote the id 1000000, and the model has 0 to \d+"):
            check_engine(organism, engine(server), asked)


def test_a_server_without_ids_or_with_other_ones_is_refused(organism, tasks):
    def without(_: int, answer: dict[str, Any]) -> dict[str, Any]:
        del answer["choices"][0]["token_ids"]
        return answer

    def begins(_: int, answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["prompt_token_ids"] = [1, *answer["choices"][0]["prompt_token_ids"]]
        return answer

    def nothing(_: int, answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "choices": []}

    def unscored(_: int, answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "choices": [answer["choices"][0] | {"logprobs": None}]}

    def put(**values: Any) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
        return lambda number, answer: {**answer, "choices": [answer["choices"][0] | (values if number > 1 else {})]}

    for change, said in (
        (without, "no token ids: .*vLLM"), (begins, "was asked to continue"), (nothing, "'/v1'"),
        (put(token_ids=[]), "wrote 0 tokens"), (put(token_ids=[1] * 31), "asked for 1 to 30"),
        (put(token_ids=[-1]), "wrote the id -1"), (put(token_ids=["a"]), "no token ids"),
        (put(finish_reason="abort"), "gave a chain up"),
        (unscored, "0 log-probabilities of"),
    ):  # fmt: skip
        with CompletionServer(organism, change) as server, pytest.raises(ls.LensteerError, match=said):
            ls.generate_traces(organism, tasks, engine=engine(server), **CHAINS)
    gone = Served(Endpoint(url=server.url, retries=0, model="m"))
    with pytest.raises(ls.LensteerError, match="no connection"):
        ls.generate_traces(organism, tasks, engine=gone, **CHAINS)


def test_steered_chains_are_refused(organism, tasks, random_direction):
    plan = ls.SteeringPlan(random_direction(organism), 1, 1.0)
    with CompletionServer(organism) as server:
        with pytest.raises(ls.LensteerError, match="no hooks"):
            ls.generate_traces(organism, tasks, plans=[plan] * 6, engine=engine(server), **CHAINS)
        with plan.on(organism), pytest.raises(ls.LensteerError, match="no hooks"):
            ls.generate_traces(organism, tasks, engine=engine(server), **CHAINS)


def test_the_command_line_has_chains_written_by_a_server(organism, tmp_path):
    def run(name: str, *words: str) -> Any:
        small = ("--small", "--n-train", "5", "--train-tokens", "80")
        return CliRunner().invoke(app, ["traces", "--out", str(tmp_path / name), *small, *words])

    with CompletionServer(organism) as server:
        server.delay = 0.2
        assert run("r", "--engine", server.url, "--in-flight", "2").exit_code == 0
        assert (len(server.payloads), server.max_in_flight) == (6, 2)
    notes = json.loads((tmp_path / "r" / "run.json").read_text())["notes"]
    assert any("The engine 'served m' wrote the chains" in note for note in notes)
    assert len(load_traces(tmp_path / "r" / "traces.jsonl")) == 5
    assert "are of --engine" in run("s", "--in-flight", "2").output
    given = run("s", "--chains", str(tmp_path / "r" / "traces.jsonl"), "--engine", server.url, "--engine-model", "m")
    assert "an engine has nothing to write" in given.output


def test_an_engine_of_ones_own_is_checked_and_interrupted(organism, tasks, tmp_path):
    class Own(Engine):
        name = "own"

        def __init__(self, *answers: int | BaseException) -> None:
            self.answers = answers

        def write(self, requests: Sequence[Request]) -> Iterator[tuple[int, Written]]:
            checking = requests[0].scored
            for i in (0,) if checking else self.answers:
                if isinstance(i, BaseException):
                    raise i
                (found,) = generate(organism, [requests[0].ids], max_new_tokens=requests[0].max_new_tokens)
                logits = forced_logits(organism, [requests[0].ids], [found.ids])[0].log_softmax(-1)
                scores = [float(row[token]) for row, token in zip(logits, found.ids, strict=True)]
                yield i, Written(found.ids, found.finished, tuple(scores) if checking else ())

    for n, (answers, error, said) in enumerate([
        ((1, 3), ls.LensteerError, "left 4 of 6 chains out"),
        ((0, 2, 2), ls.LensteerError, "answered request 2, which was not open"),
        ((4, 1, KeyboardInterrupt("stop")), KeyboardInterrupt, "stop"),
        ((5, 0, ZeroDivisionError("broken")), ZeroDivisionError, "broken"),
    ]):  # fmt: skip
        path = tmp_path / f"{n}.jsonl"
        with pytest.raises(error, match=said):
            ls.generate_traces(organism, tasks, engine=Own(*answers), path=path, **CHAINS)
        assert len(load_traces(path)) == 2


@pytest.mark.parametrize("wrong", ["http://x/v1", Endpoint(url="http://x/v1")])
@pytest.mark.usefixtures("without_shape_checks")
def test_what_is_no_engine_is_refused(organism, tasks, wrong):
    with pytest.raises(ls.LensteerError, match=r"give generation\.Served"):
        ls.generate_traces(organism, tasks, engine=wrong, **CHAINS)


def test_an_interrupt_does_not_wait_for_chains_in_flight(organism, tasks):
    with CompletionServer(organism) as server:
        requests = [Request(ls.generate_traces(organism, tasks[:1], **CHAINS)[0].prompt_ids, 5, 0.0, 1.0, 0, ())] * 4
        answers: Any = engine(server, concurrency=2).write(requests)
        next(answers)
        server.delay = 4.0
        next(answers)
        begun = time.monotonic()
        answers.close()
        assert time.monotonic() - begun < 2
        while server.in_flight:  # the server's own threads end before the process does
            time.sleep(0.1)


@pytest.mark.slow
def test_vllm_in_this_process_and_as_a_server(organism, tasks, monkeypatch):
    """With vLLM itself, where it is installed (CI has it not)."""
    vllm = pytest.importorskip("vllm", reason="vllm is not installed")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    own = [t.response_ids for t in ls.generate_traces(organism, tasks, **CHAINS)]
    options: dict[str, Any] = dict(dtype="float32", max_model_len=1024, enforce_eager=True)
    offline = Offline(vllm.LLM(str(ls.models.ORGANISM), **options))
    assert [t.response_ids for t in ls.generate_traces(organism, tasks, engine=offline, **CHAINS)] == own
    program = shutil.which("vllm")
    if program is None:
        pytest.skip("no command vllm on the path")
    flags = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--port", "PORT")
    with ls.export.started(program, "serve", str(ls.models.ORGANISM), *flags, seconds=600.0) as url:
        served = Served(Endpoint(url=url, timeout=600.0))
        assert [t.response_ids for t in ls.generate_traces(organism, tasks, engine=served, **CHAINS)] == own
