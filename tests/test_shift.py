"""Effects under a shift: thirds and kinds of hand-made chains, and the whole analysis on a small run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lensteer as ls
from lensteer.behaviors import Span
from lensteer.evaluation import MEAN, Record, ResampledShares
from lensteer.pipeline import DEMO, STAGES, Run, run_stage
from scripts import load

ROOT = Path(__file__).resolve().parent.parent
B = "backtracking"


@pytest.fixture(scope="module")
def analysis():
    return load("shift")


def record(condition: str, task: int, hits: int, n: int = 10) -> Record:
    return Record(condition, f"t{task}", 0, {B: hits}, {B: hits}, n, n, True, True, None, 50, 0.1)


def task(name: str, category: str, prompt: str = "?") -> ls.Task:
    return ls.Task(name, category, "dev", prompt)


def test_kinds_are_shared_categories_or_whether_there_is_a_digit(analysis):
    both = [task("a", "route"), task("b", "machine")]
    assert analysis.kinds_of(both, [task("c", "machine"), task("d", "route")])["c"] == "machine"
    asked = [task("a", "published", "What is 2 + 2?"), task("b", "published", "Why is the sky blue?")]
    found = analysis.kinds_of(asked, [task("c", "logic", "Three men"), task("d", "math", "7 men")])
    assert found == {"a": "with numbers", "b": "without numbers", "c": "without numbers", "d": "with numbers"}


def test_thirds_count_the_first_and_last_sentences(analysis):
    spans = [Span(b, i + 1, i + 2, i, i + 1) for i, b in enumerate([B, B, "deduction", "deduction", B, "deduction", B])]
    ids = (1,) * 9
    trace = ls.Trace(task("t0", "x"), "", "some text", (), ids, tuple(range(9)), True, spans=tuple(spans))
    first, last = analysis.thirds_of(record("kind/unsteered", 0, 4, 7), trace)
    assert (first.condition, first.n_sentences, first.sentences) == ("kind/unsteered/first", 2, {B: 2})
    assert (last.condition, last.n_sentences, last.sentences) == ("kind/unsteered/last", 2, {"deduction": 1, B: 1})
    none, _ = analysis.thirds_of(record("c", 0, 1, 2), dataclasses.replace(trace, spans=trace.spans[:2]))
    assert (none.n_sentences, none.sentences) == (0, {})


def planted(analysis: Any) -> ResampledShares:
    """Unsteered .2; own .4 up, .1 down; same kind .4, other kind .3 up; no effect late; half of it with a text."""
    kinds = {f"t{i}": ("even", "odd")[i % 2] for i in range(6)}
    records = []
    for i in range(6):
        for name, up, down in (("own", 4, 1), ("shuffled", 2, 2), ("even", 4 - i % 2, 1), ("odd", 3 + i % 2, 1)):
            records += [record(f"kind/{B}/{name}/+1", i, up), record(f"kind/{B}/{name}/-1", i, down)]
        records.append(record("kind/unsteered", i, 2))
        for third, up, down in (("first", 4, 1), ("last", 2, 2)):
            records += [record(f"place/{B}/own/+1/{third}", i, up), record(f"place/{B}/own/-1/{third}", i, down)]
            records.append(record(f"place/unsteered/{third}", i, 2))
        records += [record("tool output/unsteered", i, 3), record(f"tool output/{B}/own/+1", i, 4)]
        records += [record(f"tool output/{B}/own/-1", i, 2), record(f"counter-prompt/{B}/unsteered", i, 1)]
        records.append(record(f"counter-prompt/{B}/own/+1", i, 2))
    return ResampledShares(records + analysis.by_kind(records, kinds), n=50)


def test_planted_effects_are_recovered(analysis):
    rows = analysis.rows_of(planted(analysis), [B], (1, -1), 6, {B: 0.5})
    found = {row.part: row for row in rows if row.behavior == B}
    expected = {
        "kind": (0.15, 0.10, 0.0, 0.0),
        "place": (0.15, 0.0, 0.0, 0.0),
        "tool output": (0.15, 0.10, 0.0, 0.1),
        "counter-prompt": (0.2, 0.1, 0.0, -0.1),
    }
    for part, values in expected.items():
        row = found[part]
        assert [x.value for x in (row.plain, row.shifted, row.control, row.base)] == pytest.approx(values)
        assert row.difference.value == pytest.approx(values[1] - values[0])
        assert row.beyond.value == pytest.approx(values[1])
    assert {row.part for row in rows if row.behavior == MEAN} == set(analysis.PARTS)
    text = analysis.texts_of(planted(analysis), [B], 6)[0]
    assert (text.finished.value, text.finished_change.value) == (1.0, 0.0)
    result = analysis.Result("a model", {"even": 3, "odd": 3}, {}, 5, 6, (1, -1), rows, (text,))
    sentence, shown = analysis.answer(json.loads(analysis.to_json(result)))
    assert shown
    assert "+10.0 [+10.0, +10.0]" in sentence
    only_down = analysis.rows_of(planted(analysis), [B], (-1,), 6, {})
    assert "counter-prompt" not in {row.part for row in only_down}


@pytest.mark.medium
def test_shifts_on_a_small_run(analysis, tmp_path):
    sizes: dict[str, Any] = dict(
        n_train=24, n_dev=6, n_test=2, n_controls=1, n_score_controls=1, score_chains=4, max_spans=5, quality=2
    )
    small = dataclasses.replace(DEMO, **sizes, layers=(4,), coefficients=(0.3,), behaviors=(B, "adding-knowledge"))
    run = Run.open(tmp_path / "run", small)
    for stage in list(STAGES)[: list(STAGES).index("select") + 1]:
        run_stage(run, stage)
    config = analysis.Config(run.folder, n_chains=8, n_dev=4, max_new_tokens=60)
    found = analysis.main(config)
    assert found.kinds == {"route": 2, "machine": 2}
    assert len(found.rows) == 4 * 3
    assert all(n > 0 for counts in found.sentences.values() for n in counts.values())
    for row in found.rows:
        assert np.isfinite(row.difference.value)
        assert (row.cosine is not None) == (row.part == "kind" and row.behavior != MEAN)
    assert analysis.main(config) == found  # from the kept chains
    assert len(analysis.figure(found).data) == 3 * len(found.rows)
    assert analysis.table(found).count("\n") == 1 + len(found.rows) + len(found.texts)
    with pytest.raises(ls.LensteerError, match="of two kinds"):
        analysis.kind_vectors(run, dict.fromkeys([t.id for t in run.tasks("train")], "one"), {B: 4}, config)
