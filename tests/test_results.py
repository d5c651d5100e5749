"""Committed results, and what the README says about them."""

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
CONDITIONS = {row["arm"]: row for row in FIRST if "arm" in row}


def table(name):
    """Rows of the README table that follows a marker comment."""
    (text,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", README, re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows[2:]}


def percent(share):
    return f"{100 * share:.1f} %"


def summary_of(name):
    return json.loads((ROOT / "analyses" / "results" / f"{name}_summary.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "file"), [("mini_r1", "mini_r1"), ("organism_demo", "organism_demo")])
def test_the_readmes_tables_are_the_runs(name, file):
    run, rows = summary_of(file), table(name)
    assert len(rows) == run["shown.n_behaviors"] == 4
    for behavior, (down, base, up, words) in rows.items():
        for kind, cell in (("down", down), ("up", up)):
            share, verdict = run[f"effect.{behavior}.{kind}.sentences.share"], run[f"shown.{behavior}.{kind}_verdict"]
            assert cell == f"{percent(share)} ({verdict})"
        assert base == percent(run[f"effect.{behavior}.up.sentences.base"])
        assert words == percent(run[f"effect.{behavior}.words.sentences.share"])


def test_the_readmes_claims_are_the_runs_on_mini_r1():
    """Signs of all tested effects, the largest p, which effect exceeds all controls, and effects of shuffled labels."""
    run = summary_of("mini_r1")
    assert run["model.name"] == "mini-r1"
    tested = {
        (behavior, kind): f"effect.{behavior}.{kind}.sentences"
        for behavior in table("mini_r1")
        for kind in ("down", "up")
        if run[f"effect.{behavior}.{kind}.sentences.p_holm"] is not None
    }
    assert len(tested) == run["shown.n_tested"] == 7
    assert all((run[f"{path}.change"] > 0) is (kind == "up") for (_, kind), path in tested.items())
    (largest,) = re.findall(r"p ≤ (\.\d+) after Holm", README)
    assert max(run[f"{path}.p_holm"] for path in tested.values()) <= float(largest)
    pools = ("isotropic", "covariance_matched", "shuffled")
    beyond = [key for key, path in tested.items() if all(run[f"{path}.{pool}.rank"] == 1 for pool in pools)]
    said = [("adding-knowledge", "up"), ("example-testing", "down")]
    assert beyond == [*said, ("uncertainty-estimation", "up"), ("backtracking", "up")]
    assert all(run[f"{path}.shown"] is (key in beyond) for key, path in tested.items())
    assert all(
        run[f"effect.{b}.up.sentences.change"] > run[f"effect.{b}.words.sentences.change"] for b in table("mini_r1")
    )
    assert sum(run[f"random.L15.{pool}.n"] for pool in pools) == 60
    # "Most of backtracking's increase is cue words"
    blind = run["by.classifier, cue words masked.backtracking.up.events"]
    assert blind < run["effect.backtracking.up.sentences.events"] / 10
    old = summary_of("mini_r1_span_all")  # "one of the seven exceeded its controls"
    paths = [path for path in tested.values() if all(old[f"{path}.{pool}.rank"] == 1 for pool in pools)]
    assert paths == ["effect.adding-knowledge.up.sentences"]
    for behavior, new, before in (
        ("adding-knowledge", 2.7, 4.2), ("uncertainty-estimation", 4.4, 1.3), ("backtracking", 3.1, -0.35)
    ):  # fmt: skip
        z = [r[f"effect.{behavior}.up.sentences.shuffled.z"] for r in (run, old)]
        assert z == pytest.approx([new, before], abs=0.05)
    choices = (ROOT / "docs" / "choices.md").read_text(encoding="utf-8")
    assert "adding-knowledge up 2.7, uncertainty-estimation up 4.4, backtracking up 3.1 (" in choices
    assert "(the old default: 4.2, 1.3, −.35)" in choices
    assert "5 of 20 vectors of shuffled labels do more" in choices
    assert run["effect.example-testing.up.sentences.shuffled.rank"] == 6
    assert {run[f"site.{behavior}.layer"] for behavior in table("mini_r1")} == {15}
    assert (run["evaluation.n_tasks"], run["evaluation.n_samples"]) == (50, 8)


def test_the_readmes_claim_of_one_teachers_vectors_is_measured():
    found = json.loads((ROOT / "analyses" / "results" / "mini_r1_one_teacher.json").read_text(encoding="utf-8"))
    low, high = (float(x) for x in re.findall(r"had cosines of (\.\d+) to (\.\d+) with those", README)[0])
    cosines = [found[f"cosine.{behavior}.{found['alone']}.all"] for behavior in table("mini_r1")]
    assert (round(min(cosines), 2), round(max(cosines), 2)) == (low, high)
    run = summary_of("mini_r1")
    for behavior in table("mini_r1"):
        for kind in ("down", "up"):
            change = found[f"effect.{behavior}.{kind}.change"]
            assert (change > 0) is (run[f"effect.{behavior}.{kind}.sentences.change"] > 0)


def test_the_readmes_full_run_of_the_organism_is_the_committed_one():
    full = json.loads((ROOT / "lensteer" / "organism" / "full_run.json").read_text(encoding="utf-8"))
    assert full["shown.n_down"] + full["shown.n_up"] == 6
    assert full["shown.n_tested"] == 8
    assert "shows six of the eight directions" in README


def test_the_first_runs_choices_are_those_that_were_fixed():
    config = FIRST[0]["config"]
    assert (config["window"], config["negatives"], config["layer"], config["coefficient"]) == (
        "published",
        "all",
        15,
        1.5,
    )
    assert {condition["chains"] for condition in CONDITIONS.values()} == {400}
    assert len(CONDITIONS) == 13


def test_the_readmes_demo_is_as_large_as_it_says():
    demo = summary_of("organism_demo")
    said = f"{demo['evaluation.n_tasks']} held-out tasks, one chain each, {demo['evaluation.n_random']} control vectors"
    assert said in README
    assert (demo["evaluation.n_samples"], demo["config.tasks"]) == (1, "organism")


def test_the_table_of_exports_is_what_the_tests_measured():
    rows = json.loads((ROOT / "analyses" / "results" / "exports.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    shown = [line for line in page.splitlines() if re.match(r"\| .* \| (F32|F16|BF16|Q4_1) \| ", line)]
    assert len(shown) == len(rows) > 0
    for row, line in zip(rows, shown, strict=True):
        cells = (row["format"], row["model"], row["dtype"], f"{row['largest_logit_difference']:.1e}", row["positions"])
        assert line == f"| {' | '.join(cells)} |"


def modes_of(name):
    """The conditions of a committed measurement of cache edits, by name."""
    found = json.loads((ROOT / "analyses" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return {c["condition"]: c for c in found.get("effect", found)["test"]["conditions"]}


def numbers(cell):
    return [float(n) for n in re.findall(r"\d*\.?\d+", cell)]


@pytest.mark.parametrize(("name", "n_controls"), [("cache_qwen", 10), ("cache_smollm2", 5)])
def test_the_page_on_cache_edits_is_what_was_measured(name, n_controls):
    page = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")
    (text,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in text.splitlines()[2:]]
    test = modes_of(name)
    names = ["unsteered", "cache", "residual, once", "words", "offset token alone", "swapped sides"]
    names.append("swapped sides, own length")
    figures, digits = ("reasons", "accuracy", "answered", "length"), (3, 3, 2, 0)
    assert len(rows) == len(names) + 2
    for condition, cells in zip(names, rows, strict=False):
        for figure, cell, n in zip(figures, cells, digits, strict=True):
            truth = [test[condition][figure][end] for end in ("value", "low", "high")]
            found = numbers(cell)
            assert found == pytest.approx(truth[: len(found)], abs=0.51 * 10**-n), (condition, figure)
    for pool, cells in zip(("random", "spread"), rows[-2:], strict=True):
        drawn = [c for condition, c in test.items() if condition.startswith(f"{pool}-")]
        assert len(drawn) == n_controls
        for figure, cell, n in zip(figures, cells, digits, strict=True):
            values = [c[figure]["value"] for c in drawn]
            assert numbers(cell) == pytest.approx([min(values), max(values)], abs=0.51 * 10**-n), (pool, figure)


def test_the_hyperparameters_on_the_page_are_what_was_measured():
    page = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")
    path = ROOT / "analyses" / "results" / "cache_qwen_steadiness.json"
    measured = json.loads(path.read_text(encoding="utf-8"))["steadiness"]["dev"]["conditions"]
    (text,) = re.findall(r"<!-- cache_qwen_steadiness -->\n(.*?)<!-- end -->", page, re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in text.splitlines()[2:]]
    assert len(rows) == len(measured)
    for cells, condition in zip(rows, measured, strict=True):
        reasons = [condition["reasons"][end] for end in ("value", "low", "high")]
        assert numbers(cells[0]) == pytest.approx(reasons, abs=0.0051), condition["condition"]
        for cell, name, n in zip(cells[1:], ("accuracy", "repetition", "length"), (3, 2, 0), strict=True):
            assert numbers(cell) == pytest.approx([condition[name]["value"]], abs=0.51 * 10**-n), condition["condition"]


def test_styles_do_not_carry_over_on_qwen():
    path = ROOT / "analyses" / "results" / "cache_qwen_steadiness.json"
    found = json.loads(path.read_text(encoding="utf-8"))["styles"]["test"]["conditions"]
    stepwise = {c["condition"]: c["styles"]["stepwise"]["value"] for c in found}
    page = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")
    for style in ("stepwise", "strategy-first", "causal", "analogical"):
        assert re.search(rf"{style} {stepwise[style]:.2f}".replace("0.", r"\."), page), style
    assert next(c for c in found if c["condition"] == "causal")["styles"]["causal"]["value"] == 0.1


def test_on_smollm2_controls_do_as_much_as_the_edit():
    reasons = {name: c["reasons"]["value"] for name, c in modes_of("cache_smollm2").items()}
    controls = [value for name, value in reasons.items() if name.startswith(("random", "spread"))]
    assert (len(controls), sum(value <= reasons["cache"] for value in controls)) == (10, 5)
    assert reasons["swapped sides"] < reasons["cache"]
    assert round(reasons["unsteered"], 2) == 0.84


def test_the_readmes_cache_edits_are_what_was_measured():
    shares = {
        n: [round(100 * c[f]["value"]) for f in ("reasons", "accuracy")] for n, c in modes_of("cache_qwen").items()
    }
    assert [shares[name] for name in ("unsteered", "cache", "words")] == [[11, 4], [85, 17], [100, 27]]
    assert "reasons in 11 % of 150 answers and is right in 4 %; with the edit in 85 % and\n17 %" in README
    assert "in 100 % and 27 %. One of 20 control vectors does as much" in README
    assert sum(shares[n][0] >= shares["cache"][0] for n in shares if n.startswith(("random", "spread"))) == 1
    organism = modes_of("cache_organism")
    spread = [c["thinks"]["value"] for n, c in organism.items() if n.startswith("spread-")]
    assert (len(spread), max(spread)) == (20, 0.11)
    assert [organism[n]["thinks"]["value"] for n in ("unsteered", "cache")] == [0, 1]
    assert [organism[n]["accuracy"]["value"] for n in ("unsteered", "cache")] == [0.33, 0.89]
    assert "none makes more than 11 % think" in README


def test_the_served_plans_are_what_was_measured():
    found = json.loads((ROOT / "analyses" / "results" / "mini_r1_served.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    for behavior, measured in found.items():
        for name in ("evidence", "llama", "transformers"):
            change = measured[name]["change"]
            ends = [f"{100 * change[end]:+.1f}" for end in ("value", "low", "high")]
            (row,) = re.findall(rf"\| {behavior} \| [^|]*{SERVED[name]}[^|]* \| ([^|]*) \|", page)
            assert row == f"{ends[0]} % [{ends[1]}, {ends[2]}]"
    ranks = {b: [pool["rank"] for pool in m["evidence"]["controls"]] for b, m in found.items()}
    assert ranks == {"uncertainty-estimation": [1, 1, 1], "adding-knowledge": [2, 1, 5]}
    assert [m["evidence"]["verdict"] for m in found.values()] == ["shown", "moves as random vectors do"]
    assert "ranks 2 (isotropic), 1 (covariance-matched) and 5 (shuffled labels)" in page
    changes = [found["uncertainty-estimation"][name]["change"] for name in ("evidence", "llama", "transformers")]
    points = [[f"{100 * change[end]:.1f}" for end in ("value", "low", "high")] for change in changes]
    assert f"by {points[0][0]} points hooked" in README
    for value, low, high in points[1:]:
        assert f"by {value} [{low}, {high}] at" in README


SERVED = {"evidence": "hooked", "llama": "llama-cpp-python", "transformers": "transformers serve"}
