"""What a user writes by hand: numbers of numpy and lists are taken, other types are refused by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

import lensteer as ls
from lensteer.arguments import checked, typed
from lensteer.pipeline import ORGANISM, RunConfig
from lensteer.vectors import Direction

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # those would raise their own errors first


@dataclass(frozen=True)
class Own:
    number: int
    share: float
    flag: bool = False
    names: tuple[str, ...] = ()
    pair: tuple[int, str] = (1, "a")
    side: Literal["left", "right"] = "left"
    maybe: int | None = None
    counts: dict[str, int] | None = None

    def __post_init__(self) -> None:
        typed(self)


def test_what_is_nearly_right_is_converted():
    kind: Any = Own
    made = kind(np.int64(3), np.float32(0.5), np.bool_(True), ["a", "b"], [2, "b"], "right", torch.tensor(7))
    assert made == Own(3, 0.5, True, ("a", "b"), (2, "b"), "right", 7)
    kinds = [type(value) for value in (made.number, made.share, made.flag, made.names, made.maybe)]
    assert kinds == [int, float, bool, tuple, int]
    whole = Own(3, 2)
    assert type(whole.share) is int  # as written, so that digests of experiments stay


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(number="3"), r"Own\(number='3'\): give int \(it is a str\)"),
        (dict(number=3.0), r"Own\(number=3\.0\): give int"),
        (dict(number=True), r"Own\(number=True\): give int \(it is a bool\)"),
        (dict(share="0.5"), r"Own\(share='0\.5'\): give float"),
        (dict(share=10**400), r"give float \(int too large"),
        (dict(flag=1), r"Own\(flag=1\): give bool"),
        (dict(names="ab"), r"Own\(names='ab'\): give tuple\[str, \.\.\.\] \(it is a str\)"),
        (dict(names=(1,)), r"give tuple\[str, \.\.\.\] \(it is a int\)"),
        (dict(pair=(1,)), r"give tuple\[int, str\]"),
        (dict(side="up"), r"give 'left' or 'right'"),
        (dict(maybe="x"), r"give int \| None \(it is a str\)"),
        (dict(counts=[1]), r"give dict\[str, int\] \| None"),
        (dict(counts={"a": 1.5}), r"give dict\[str, int\] \| None \(it is a float\)"),
    ],
)
def test_other_types_are_refused_by_name(fields, message):
    with pytest.raises(ls.LensteerError, match=message):
        Own(**{"number": 1, "share": 0.5, **fields})


def test_arguments_are_checked_and_converted():
    @checked(but=("own",))
    def take(first: int, names: tuple[str, ...] = (), *more: int, own: int = 0, **rest: int) -> tuple[Any, ...]:
        return first, names, more, own, rest

    values: Any = np.int32(2), ["a"]
    assert take(*values, 3, own=4, x=5) == (2, ("a",), (3,), 4, {"x": 5})
    wrong: Any = "2"
    with pytest.raises(ls.LensteerError, match=r"take\(first='2'\): give int"):
        take(wrong)
    assert take(1, own=wrong)[3] == "2"  # which the function checks itself
    assert take.__name__ == "take"


DIRECTION = Direction("own", torch.ones(8, 128), torch.ones(8), tuple(range(8)))
TASK = ls.Task("1", "a", "test", "How many?")


#: The same without types: what is wrong here is wrong on purpose.
LS: Any = ls
Config: Any = RunConfig
changed: Any = replace


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LS.SteeringPlan(DIRECTION, True), r"SteeringPlan\(layer=True\): give int"),
        (lambda: LS.SteeringPlan(DIRECTION, 1, "1.0"), r"coefficient='1\.0'\): give float"),
        (lambda: LS.SteeringPlan(DIRECTION, 1, scope="generated"), r"give PositionScope \(such as ls\.onsets\)"),
        (lambda: LS.SteeringPlan({"own": DIRECTION}, 1), r"give Steerable \(such as vectors\['backtracking'\]\)"),
        (lambda: LS.SteeringPlan(DIRECTION, 1, gate=0.2), r"gate=0\.2\): give Gate \| None"),
        (lambda: LS.Gate("0.1"), r"Gate\(threshold='0\.1'\): give float"),
        (lambda: LS.Schedule.half_life("8"), r"Schedule\(tokens='8'\): give float"),
        (lambda: LS.Task(1, "a", "test", "x"), r"Task\(id=1\): give str"),
        (lambda: LS.Span("x", "5", 6, 0, 1), r"Span\(start='5'\): give int"),
        (lambda: LS.first(2.5), r"first\(n=2\.5\): give int"),
        (lambda: LS.save_traces(["x"], "f.jsonl"), r"save_traces\(traces=\['x'\]\): give Iterable\[Trace"),
        (lambda: LS.at([1.5]), r"at\(positions=\[1\.5\]\): give Iterable\[int\]"),
        (lambda: LS.annotate([], "rules"), r"annotate\(annotator='rules'\)"),
        (lambda: LS.Sampling(max_new_tokens=3.0), r"Sampling\(max_new_tokens=3\.0\): give int"),
        (lambda: changed(ORGANISM, coefficients=0.5), r"RunConfig\(coefficients=0\.5\): give tuple\[float, \.\.\.\]"),
        (lambda: Config(behaviors="backtracking"), r"RunConfig\(behaviors='backtracking'\): give tuple\[str"),
        (lambda: Config(seed=-1), r"seed=-1: give a number from 0"),
        (lambda: Config(train_tokens=0), r"train_tokens=0: give a number from 1 to 1,000,000"),
        (lambda: Config(max_new_tokens=10**11), r"max_new_tokens=100000000000: give a number from 1"),
        (lambda: Config(score_coefficient=float("nan")), r"score_coefficient=nan: give a finite number"),
        (lambda: Config(behaviors=("backtracking",) * 2), r"behaviors \[.*\]: give each once"),
    ],
)
def test_values_of_the_package_say_what_they_take(make, message):
    with pytest.raises(ls.LensteerError, match=message):
        make()


def test_a_model_is_asked_with_the_right_types(organism, tmp_path):
    wrong: Any = ["Hi"]
    with pytest.raises(ls.LensteerError, match=r"generate_traces\(tasks=\['Hi'\]\): give Sequence\[Task"):
        ls.generate_traces(organism, wrong)
    tokens: Any = "3"
    with pytest.raises(ls.LensteerError, match=r"generate_traces\(max_new_tokens='3'\): give int"):
        ls.generate_traces(organism, [TASK], max_new_tokens=tokens)
    with pytest.raises(ls.LensteerError, match="is a folder: give a file"):
        ls.generate_traces(organism, [TASK], max_new_tokens=3, path=tmp_path)
    plan = LS.SteeringPlan(DIRECTION, np.int64(3), np.float32(0.5))  # as of an argmax
    path = tmp_path / "chains.jsonl"
    (made,) = ls.generate_traces(organism, [TASK], max_new_tokens=3, plans=[plan], path=path)
    assert ls.load_traces(path) == [made]
    path.write_text(path.read_text() * 2)
    with pytest.raises(ls.LensteerError, match=r"holds 1/0 twice"):
        ls.generate_traces(organism, [TASK], max_new_tokens=3, plans=[plan], path=path)
