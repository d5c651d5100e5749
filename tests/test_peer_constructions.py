"""Other libraries' vectors at equal KL: the statistics on records by hand, and the whole on the organism."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lensteer as ls
from lensteer.evaluation import Record
from lensteer.vectors import Direction
from scripts import load

ROOT = Path(__file__).parent.parent / "analyses"
DEFAULT = "lensteer/difference"


@pytest.fixture(scope="module")
def analysis():
    return load("peer_constructions")


def record(condition: str, task: int, score: float, kl: float | None = None) -> Record:
    return Record(condition, str(task), 0, {}, {}, 1, 10, True, True, None, 10, 0.25, kl=kl, scores={"polite": score})


def by_hand(analysis):
    """Four prompts: the default moves all of them, a peer's vector half; another peer's vector is the default's."""
    moved = {"unsteered": 0, f"{DEFAULT}/0.3": 4, "repeng/pca/0.3": 2, "control/isotropic 0/0.3": 1}
    moved |= {"repeng/0": 1, "repeng/2.2": 2}
    records = [
        record(name, task, float(task < n), 0.3 if task < 2 else None) for name, n in moved.items() for task in range(4)
    ]
    cells = {f"{DEFAULT}/0.3": (5.0, True), "repeng/pca/0.3": (7.0, False), "control/isotropic 0/0.3": (9.0, True)}
    same = {DEFAULT: DEFAULT, "repeng/pca": "repeng/pca", "repeng/mean": DEFAULT}
    operators = {"repeng/0": 0.0, "repeng/2.2": 2.2}
    return analysis.rows_of(records, cells, same, operators, DEFAULT, (0.3,), lambda r: (r.scores["polite"], 1.0))


def result_of(analysis):
    estimate = ls.statistics.Estimate(0.0, 0.0, 0.0)
    cosines = {DEFAULT: 1.0, "repeng/pca": 0.1, "repeng/mean": 1.0}
    return analysis.Result("tiny", "polite", 3, 40, 4, 1, estimate, {"repeng": "1.0"}, cosines, by_hand(analysis))


def test_rows_are_what_the_records_say(analysis):
    rows = by_hand(analysis)
    assert [(r.library, r.construction, r.budget) for r in rows] == [
        ("lensteer", "difference", 0.3),
        ("repeng", "pca", 0.3),
        ("repeng", "mean", 0.3),
        ("control", "isotropic 0", 0.3),
        ("repeng", "its own, 0", None),
        ("repeng", "its own, 2.2", None),
    ]
    assert [r.change.value for r in rows] == [1.0, 0.5, 1.0, 0.25, 0.0, 0.25]  # own operators: against their own 0
    assert [r.ahead.value for r in rows[:4]] == [0.0, 0.5, 0.0, 0.75]
    assert math.isnan(rows[4].ahead.value)
    assert [r.same_as for r in rows] == ["", "", DEFAULT, "", "", ""]
    assert [r.coefficient for r in rows] == [5.0, 7.0, 5.0, 9.0, 0.0, 2.2]
    assert [r.reached for r in rows] == [True, False, True, True, True, True]
    assert all(r.kl.value == pytest.approx(0.3) and r.repetition == 0.25 for r in rows)
    assert rows[1].change.low < 0.5 < rows[1].change.high


def test_the_answer_and_the_table_say_who_is_ahead(analysis):
    result = result_of(analysis)
    values = json.loads(analysis.to_json(result))
    text, shown = analysis.answer(values)
    assert "by +100 points [+100, +100] (4 prompts × 1)" in text
    assert "best vector of repeng (mean) is +0 points [+0, +0]" in text
    assert "repeng's mean is lensteer/difference" in text
    assert "largest change of 1 control vectors is +25 points" in text
    assert not shown  # the peer has the same vector
    values["rows"] = [row for row in values["rows"] if row["construction"] != "mean"]
    values["rows"][1]["ahead_low"] = 0.1
    assert analysis.answer(values)[1]
    assert "mean (= lensteer/difference) | 0.3 |" in analysis.table(result)
    assert "pca | 0.3 (missed) |" in analysis.table(result)
    drawn = analysis.figure(result)
    assert len(drawn.data) == len(analysis.PAINT) + 2
    assert analysis.QUESTION.endswith("?")


def test_a_peers_file_is_checked(analysis, tmp_path):
    like = Direction("d", torch.ones(2, 4), torch.ones(2), (2, 3))
    logits = torch.arange(3.0)
    path = tmp_path / "repeng.safetensors"
    with pytest.raises(ls.LensteerError, match=r"no file .*repeng\.safetensors.*repeng_fit\.py .*--peers"):
        analysis.peer_vectors(path, 2, like, logits)
    tensors = {"pca_diff/1": torch.zeros(4), "pca_diff/2": torch.arange(4.0), "logits": logits}
    save_file(tensors, path, {"version": "0.4.0"})
    version, found = analysis.peer_vectors(path, 2, like, logits)
    assert version == "0.4.0"
    assert torch.equal(found["pca_diff"].at(2), torch.arange(4.0))
    with pytest.raises(ls.LensteerError, match="no vector at layer 3"):
        analysis.peer_vectors(path, 3, like, logits)
    with pytest.raises(ls.LensteerError, match="another model: its unsteered logits differ by up to 1"):
        analysis.peer_vectors(path, 2, like, logits + 1)
    with pytest.raises(ls.LensteerError, match="holds no logits of this model"):
        analysis.peer_vectors(path, 2, like, torch.zeros(5))
    with pytest.raises(ls.LensteerError, match=r"no file .*repeng\.jsonl.*run it again"):
        analysis.peer_records(None, tmp_path / "repeng.jsonl")


def test_pairs_end_where_a_sentence_begins_or_ends(analysis):
    text = "<think>\nA b. Wait c. D e."
    spans = tuple(
        ls.Span(label, begin + 3, end + 3, begin, end)
        for label, begin, end in (("deduction", 8, 12), ("backtracking", 13, 20), ("deduction", 21, 25))
    )
    trace = ls.Trace(
        ls.Task("a", "c", "train", "?"), "Q? ", text, (1, 2, 3), tuple(range(len(text))), tuple(range(len(text))), True
    )
    trace = dataclasses.replace(trace, spans=spans)
    (pair,) = analysis.pairs_of_chains([trace, dataclasses.replace(trace, spans=spans[:1])], "backtracking")
    assert (pair.positive.completion, pair.negative.completion) == ("<think>\nA b. ", "<think>\n")
    (pair,) = analysis.pairs_of_chains([trace], "backtracking", "end")
    assert (pair.positive.completion, pair.negative.completion) == (
        "<think>\nA b. Wait c.",
        "<think>\nA b. Wait c. D e.",
    )
    with pytest.raises(ls.LensteerError, match="no chain has both a span of 'example-testing'"):
        analysis.pairs_of_chains([trace], "example-testing")
    with pytest.raises(ls.LensteerError, match="cut 'middle'"):
        analysis.pairs_of_chains([trace], "backtracking", "middle")


@pytest.mark.medium
def test_a_peers_vectors_and_chains_are_compared_on_the_organism(analysis, organism, tmp_path):
    config = analysis.smoke(analysis.Config(tmp_path))
    at = analysis.setting_of(config)
    request = json.loads(analysis.write_request(config, at).read_text())
    assert Path(request["model"]).joinpath("config.json").is_file()
    assert len(request["pairs"]) == len(at.pairs)
    prompts, last = request["prompts"], ls.fit_directions(at.model, at.pairs, position="last", layers=[4])
    with torch.inference_mode():
        logits = at.model(torch.tensor([prompts[0]["ids"]]))[0, -1]
    mine = last["backtracking"].at(4)  # a peer that computes what lensteer does, and one that finds noise
    tensors = {"mean/4": 3 * mine, "noise/4": torch.randn(len(mine), generator=torch.Generator().manual_seed(0))}
    save_file({**tensors, "logits": logits.clone()}, tmp_path / "repeng.safetensors", {"version": "0"})
    rows = [
        dict(
            condition=f"repeng/{c:g}",
            coefficient=c,
            task=p["task"],
            sample=0,
            ids=p["ids"][:9],
            finished=True,
            kl=c,
            nll=1,
        )
        for c in (0.0, 2.0)
        for p in prompts
    ]
    (tmp_path / "repeng.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataclasses.replace(config, peers=("repeng",))
    result = analysis.main(config)
    found = {(r.library, r.construction): r for r in result.rows}
    assert found["repeng", "mean"].same_as == "lensteer/difference at last"
    assert found["repeng", "mean"].change == found["lensteer", "difference at last"].change
    assert found["repeng", "its own, 2"].kl.value == 2.0
    assert sum(r.library == "control" for r in result.rows) == 3
    assert result.cosines["repeng/mean"] == pytest.approx(result.cosines["lensteer/difference at last"])
    with pytest.raises(ls.LensteerError, match="other pairs, prompts or sampling"):
        analysis.write_request(dataclasses.replace(config, quality=1), at)
    assert analysis.main(config).rows == result.rows or math.isnan(result.rows[-1].ahead.value)  # resumed
