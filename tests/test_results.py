"""Committed results, and what the README says of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIRST = json.loads((ROOT / "analyses" / "results" / "mini_r1_first_run.json").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
EFFECTS = {
    (row["behavior"], row["kind"]): row
    for row in FIRST
    if row.get("unit") == "sentences" and row["annotator"] == "classifier"
}
ARMS = {row["arm"]: row for row in FIRST if "arm" in row}


def table(name):
    """Rows of the README's table after a marked comment."""
    (text,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", README, re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows[2:]}


def percent(share):
    return f"{100 * share:.1f} %"


@pytest.mark.parametrize("behavior", ["adding-knowledge", "example-testing", "uncertainty-estimation", "backtracking"])
def test_the_readmes_table_is_the_first_runs(behavior):
    down, base, up, words, text = table("mini_r1_first_run")[behavior]
    low, high = EFFECTS[behavior, "down"], EFFECTS[behavior, "up"]
    assert base == percent(high["base"])
    assert up == percent(high["share"])
    assert words == percent(EFFECTS[behavior, "words"]["share"])
    assert down == ("base rate too low" if low["verdict"] == "base rate too low" else percent(low["share"]))
    broken = ARMS[f"{behavior}/up"]["text"] != "within the margins"
    assert text == ("worse when added" if broken else "as unsteered")


def test_the_readmes_claims_are_the_first_runs():
    """Every rise, every fall that can be tested, the largest p, and what is left without cue words."""
    tested = [row for (_, kind), row in EFFECTS.items() if kind != "words" and row["p_holm"] is not None]
    assert len(tested) == 7
    assert all((row["change"] > 0) is (row["kind"] == "up") for row in tested)
    (largest,) = re.findall(r"p ≤ (\.\d+) after Holm", README)
    assert max(row["p_holm"] for row in tested) <= float(largest)
    blind = next(
        row
        for row in FIRST
        if (row.get("behavior"), row.get("kind")) == ("backtracking", "up")
        and row["annotator"].endswith("cue words masked")
    )
    assert blind["events"] < EFFECTS["backtracking", "up"]["events"] / 10
    assert "nearly all in its cue words" in README


def test_the_first_runs_choices_are_those_that_were_fixed():
    config = FIRST[0]["config"]
    assert (config["window"], config["negatives"], config["layer"], config["coefficient"]) == (
        "published",
        "all",
        15,
        1.5,
    )
    assert {arm["chains"] for arm in ARMS.values()} == {400}
    assert len(ARMS) == 13


def test_the_readmes_demo_is_the_demos():
    demo = json.loads((ROOT / "analyses" / "results" / "organism_demo_summary.json").read_text(encoding="utf-8"))
    rows = table("organism_demo")
    assert len(rows) == demo["shown.n_behaviors"] == 4
    for behavior, (down, base, up, words) in rows.items():
        for kind, cell in (("down", down), ("up", up)):
            share, verdict = demo[f"effect.{behavior}.{kind}.sentences.share"], demo[f"shown.{behavior}.{kind}_verdict"]
            assert cell == f"{percent(share)} ({verdict})"
        assert base == percent(demo[f"effect.{behavior}.up.sentences.base"])
        assert words == percent(demo[f"effect.{behavior}.words.sentences.share"])
    said = f"{demo['evaluation.n_tasks']} held-out tasks, one chain each, {demo['evaluation.n_random']} control vectors"
    assert said in README
    assert (demo["evaluation.n_samples"], demo["config.tasks"]) == (1, "organism")
