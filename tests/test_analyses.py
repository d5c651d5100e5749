"""Every analysis runs on the organism at a small size and returns results of the right shape; benchmarks run, too."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lensteer as ls
from lensteer.pipeline import DEMO, STAGES, Run, run_stage
from scripts import load

pytestmark = pytest.mark.medium  # every test is an analysis

ROOT = Path(__file__).resolve().parent.parent


def test_windows_and_negatives_ranks_every_recipe_on_the_same_chains(tmp_path):
    analysis = load("windows_and_negatives")
    config = analysis.Config(n_train=24, n_dev=4, layers=(4,), resume=tmp_path / "records.jsonl")
    rows = analysis.main(config)
    assert [r.recipe for r in rows] == [str(r) for r in analysis.RECIPES]
    assert f"{rows[0].ahead:.0f}" == "0 [0, 0]"  # of itself
    for row in rows:
        assert row.effect.low <= row.effect.value <= row.effect.high
        assert row.cells == 4
        assert row.by_layer[4] == pytest.approx(row.effect.value)
    assert analysis.main(config) == rows  # from the records, not from new chains
    assert json.loads(json.dumps([dataclasses.asdict(r) for r in rows]))[0]["right_way"] == rows[0].right_way
    assert analysis.table(rows).count("\n") == 1 + len(rows)


def test_rows_are_what_the_records_say():
    analysis = load("windows_and_negatives")
    shares = {"unsteered": 2, "down": 1, "up": 5}
    records = []
    for condition, kind in [("unsteered", "unsteered")] + [
        (f"{recipe}/0/{b}/{kind}", kind) for recipe in analysis.RECIPES for b in ls.STEERED for kind in ("down", "up")
    ]:
        for task in range(3):
            counts = dict.fromkeys(ls.BEHAVIORS, shares[kind])
            records.append(
                analysis.Record(condition, str(task), 0, counts, counts, 20, 60, kind != "up", True, True, 80, 0.0)
            )
    rows = analysis.rows(records, (0,))
    assert all((r.effect.value, r.effect.low, r.effect.high) == pytest.approx((0.2, 0.2, 0.2)) for r in rows)
    assert all((r.right_way, r.cells, r.parsed) == (4, 4, 0.5) for r in rows)


def test_operators_are_compared_at_one_budget_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    analysis = load("operator_ablation")
    monkeypatch.setattr(ls, "STEERED", ("backtracking", "uncertainty-estimation"))
    config = analysis.smoke(analysis.Config(folder=tmp_path))
    result = analysis.main(config)
    assert [(r.edit, r.behavior, r.sign) for r in result.rows[:2]] == [
        ("add", "backtracking", 1),
        ("project_out", "backtracking", 1),
    ]
    assert len(result.rows) == len(analysis.EDITS) * 2 * 2
    for row in result.rows:
        assert row.change.value == pytest.approx(row.share.value - row.base.value)
        assert row.reached == (abs(row.kl.value / config.budget - 1) <= config.tolerance)
    assert f"{result.means[0].gain:.0f}" == "0 [0, 0]"  # of adding itself
    monkeypatch.setattr(analysis, "calibrate_many", None)  # the coefficients are read back
    assert analysis.main(config) == result
    with pytest.raises(ls.LensteerError, match="other settings"):
        analysis.main(dataclasses.replace(config, budget=0.2))
    assert json.loads(analysis.to_json(result))["rows"][0]["kl_low"] == result.rows[0].kl.low
    assert analysis.table(result).count("\n") == len(result.means) + len(result.rows) + 4
    assert "less adding" in analysis.answer(json.loads(analysis.to_json(result)))[0]
    assert len(analysis.figure(result).data) == 4


def test_the_effect_of_an_operator_is_what_the_records_say():
    analysis = load("operator_ablation")
    hits = {"unsteered": 4, "add/backtracking/up": 6, "add/backtracking/down": 3}
    hits |= {"rotate/backtracking/up": 9, "rotate/backtracking/down": 0, "clamp/backtracking/up": 20}
    records = [
        analysis.Record(name, str(task), 0, {"backtracking": n}, {}, 20, 60, True, name != "unsteered", True, 80, 0.0)
        for name, n in hits.items()
        for task in range(3)
    ]
    kl = ls.statistics.Estimate(0.1, 0.1, 0.1)
    cells = {name: (1.0, kl, not name.startswith("clamp")) for name in hits if name != "unsteered"}
    rows = analysis.rows_of(records, cells)
    assert [r.change.value for r in rows] == pytest.approx([0.1, -0.05, 0.25, -0.2, 0.8])
    assert all(r.finished.value == 1 for r in rows)
    means = {mean.edit: mean for mean in analysis.means_of(records, rows)}
    assert set(means) == {"add", "rotate"}  # a clamp that misses the budget is not compared
    assert (means["rotate"].cells, means["rotate"].effect.low, means["rotate"].gain.high) == pytest.approx(
        (2, 0.225, 0.15)
    )


def test_the_card_measures_a_checkpoint_and_says_so_beside_it(tmp_path):
    analysis = load("organism_card")
    folder = tmp_path / "weights"
    shutil.copytree(ls.models.ORGANISM, folder)
    card = analysis.main(analysis.Config(str(folder), n=6))
    analysis.write_card(folder, card)
    text = (folder / "README.md").read_text()
    for label, figure, _ in analysis.rows(card):
        assert f"| {label} | {figure} |" in text
    assert "--seed 0" in text


def test_fidelity_holds_every_method_against_the_exact_scores():
    analysis = load("attribution_fidelity")
    rows = analysis.main(analysis.Config(n_train=12, max_spans=10, coefficients=(0.05, 1.0), samples=2))
    assert [(r.method, r.coefficient) for r in rows] == [(m, c) for m in analysis.METHODS for c in (0.05, 1.0)]
    jvp = rows[0]
    assert jvp.pearson > 0.95  # the noise-free second order, at a small coefficient
    assert all(abs(ratio - 1) < 0.2 for ratio in jvp.ratio.values())
    assert not next(r for r in rows if r.method == "published").ratio  # it predicts no KL
    assert analysis.table(rows).count("\n") == 1 + len(rows)


def test_layer_attribution_takes_a_model_or_a_run(tmp_path):
    from lensteer.pipeline import ORGANISM, Run, run_stage

    analysis = load("layer_attribution")
    alone = analysis.main(analysis.Config(n_train=16, max_spans=8, n_controls=9))
    assert alone.tests.n == 9
    assert set(alone.layers) == set(ls.STEERED)
    assert analysis.table(alone).count("\n") == 1 + 2 * len(ls.STEERED)
    run = Run.open(tmp_path / "run", dataclasses.replace(ORGANISM, n_train=16, n_dev=2, n_test=2))
    for stage in ("traces", "annotate"):
        run_stage(run, stage)
    of_run = analysis.main(analysis.Config(run=tmp_path / "run", max_spans=8, n_controls=9))
    assert of_run.scores.n_traces <= 16


def test_which_score_measures_steering_at_every_layer_and_ranks_the_scores(tmp_path, monkeypatch):
    analysis = load("which_score_predicts_steering")
    monkeypatch.setattr(ls, "STEERED", ("uncertainty-estimation",))
    config = analysis.Config(n_train=24, n_dev=3, n_prompts=2, max_spans=10, folder=tmp_path)
    rows = analysis.main(config)
    assert {r.score for r in rows} >= {"exact", "fisher", "signed", "efficiency", "published", "probe accuracy"}
    assert all(r.spearman.low <= r.spearman.high and r.regret.value >= 0 for r in rows)
    assert next(r for r in rows if r.score == "exact").ahead.high == 0


def test_a_score_equal_to_the_effect_is_never_regretted():
    analysis = load("which_score_predicts_steering")
    effect = np.random.default_rng(0).normal(size=(201, 4, 8))
    scores = {"exact": -effect[0], "oracle": effect[0]}
    worst, best = analysis.rows([analysis.Measured("m", effect, scores)])
    assert best.spearman.value == pytest.approx(1)
    assert worst.spearman.value == pytest.approx(-1)
    assert best.regret.value == 0 < worst.regret.value
    assert best.ahead.value == pytest.approx(worst.regret.value)
    both = analysis.rows([analysis.Measured(name, effect, scores) for name in "ab"])
    assert [r.organism for r in both] == ["a", "a", "b", "b", "all", "all"]


def test_the_attribution_benchmark_names_its_ratios(monkeypatch):
    benchmark = load("attribution", "benchmarks")
    for name, value in dict(N_LAYERS=2, WIDTH=48, VOCABULARY=800, N_SCORE_CONTROLS=3).items():
        monkeypatch.setattr(benchmark, name, value)
    found = benchmark.main(benchmark.Config(n_traces=1, rounds=1, sampled_cells=2, samples=2))
    for name in ("fisher", "fisher_400_nulls", "exact"):
        assert found[f"{name}_vs_published"] == pytest.approx(found["seconds.published"] / found[f"seconds.{name}"])
    assert found["exact_vs_brute_force"] > 1
    assert found["fisher_peak_vs_forward"] >= 0


def test_the_cache_benchmark_names_its_ratios(monkeypatch):
    benchmark = load("cache_steering", "benchmarks")
    for name, value in dict(N_LAYERS=2, WIDTH=48, VOCABULARY=800).items():
        monkeypatch.setattr(benchmark, name, value)
    found = benchmark.main(benchmark.Config(rounds=2, new_tokens=4, slow_tokens=2, prompt=20, batches=(1, 3)))
    for name in ("cache_vs_unsteered_batch1", "cache_vs_unsteered_batch3", "hook_vs_unsteered_batch3"):
        assert 0 < found[f"{name}.low"] <= found[name] <= found[f"{name}.high"]
    assert found["hooks_during_decode.cache"] == 0
    assert found["hooks_during_decode.hook"] == 1


@pytest.mark.medium
def test_both_benchmarks_run_on_a_checkpoint(monkeypatch):
    folder = str(ls.models.ORGANISM)
    attribution, cache = load("attribution", "benchmarks"), load("cache_steering", "benchmarks")
    monkeypatch.setattr(attribution, "N_SCORE_CONTROLS", 3)
    config = attribution.Config(model=folder, n_traces=1, rounds=1, sampled_cells=1, samples=1)
    found = attribution.main(config)
    assert found["model"] == ls.models.ORGANISM.name
    assert found["exact_vs_brute_force"] > 1
    with pytest.raises(ls.LensteerError, match="leave --model out"):
        attribution.main(attribution.Config(model=folder, real=True))
    found = cache.main(cache.Config(model=folder, rounds=2, new_tokens=40, slow_tokens=2, prompt=20, batches=(2,)))
    assert found["hooks_during_decode.cache"] == 0
    assert found["seconds.unsteered_batch2"] > 0


@pytest.mark.medium
def test_the_explorers_benchmark_measures_both_ways_alike(monkeypatch):
    pytest.importorskip("anywidget")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    explorer = load("explorer", "benchmarks")
    found = explorer.main(explorer.Config(tokens=80, prompt=20, rounds=1))
    assert found["largest_difference"] < 1e-3
    assert (found["model"], found["middle"]) == ("organism", 4)
    assert all(value > 0 for name, value in found.items() if name.startswith("seconds."))
    rows = explorer.table(found).splitlines()
    assert [row.split()[:2] for row in rows[2:]] == [
        ["first,", "all"],
        ["middle,", "all"],
        ["middle,", "half"],
        ["last,", "all"],
    ]
    assert f"{found['seconds.effect.middle_half']:.3f}" in rows[4]


@pytest.mark.medium
def test_the_memory_benchmark_finds_what_is_kept(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    memory = load("memory", "benchmarks")
    found = memory.main(memory.Config(counts=(4, 8, 12), n_tasks=4, batch_size=4, max_new_tokens=80))
    assert found["model"] == "organism"
    for way in ("features", "vectors", "generate"):
        assert set(found[f"mib.{way}"]) == {"4", "8", "12"}
        assert way in memory.table(found)
    assert memory.slope({100: 50.0, 500: 10.0, 1000: 20.0, 2000: 40.0}) == pytest.approx(20.0)
    kept = []

    def leaking():
        for n in range(1, 41):
            kept.append(bytearray(b"x" * 2**20))
            yield n

    assert memory.slope(memory.readings(leaking(), (10, 20, 40))) == pytest.approx(1000, rel=0.1)  # positive control


def test_the_decoding_benchmark_names_its_ratios(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = load("decoding", "benchmarks")
    base = __import__("cache_steering")
    for name, value in dict(N_LAYERS=2, WIDTH=48, VOCABULARY=800).items():
        monkeypatch.setattr(base, name, value)
    found = benchmark.main(benchmark.Config(rounds=2, rows=6, batches=2, prompt=20, new_tokens=4))
    for name in ("shared_prefill", "batches_at_once", "grouped_attention"):
        assert 0 < found[f"{name}.low"] <= found[name] <= found[f"{name}.high"]


def test_the_benchmark_of_large_models_runs_in_miniature(tmp_path):
    benchmark, out = load("large_models", "benchmarks"), tmp_path / "found.json"
    found = benchmark.main(benchmark.Config(str(ls.models.ORGANISM), tiny=True, out=out))
    assert found["failed"] == {}
    assert set(found["seconds"]) == set(benchmark.STEPS)
    for rows in found["generate"]["batches"].values():
        assert [row["same_start"] for row in rows.values()] == [1.0] * 3
        assert rows["hugging_face"]["speed"] == 1
    assert all("same tokens: True" in said for said in found["device_map"].values())
    assert found["doctor"]["ok"]
    assert found["attribute"]["exact"]["cost"]["rows"] > found["attribute"]["fisher"]["cost"]["rows"]
    assert json.loads(out.read_text())["seconds"] == found["seconds"]


def test_a_cache_edit_is_compared_with_the_residual_stream():
    analysis = load("cache_versus_residual")
    config = analysis.Config(
        n_pairs=4, shots=1, c_values=(0.75,), c_keys=(0.0,), some_pairs=(), n_prompts=2, n_dev=3, n_test=4, n_controls=1
    )
    found = analysis.main(config)
    assert found.test["cache"].thinks.value >= 0.5 > found.test["unsteered"].thinks.value
    assert set(found.persistence) == {"cache", "residual, once", "residual, throughout"}
    assert "KL by token" in analysis.table(found)


@pytest.mark.filterwarnings("ignore:.*was trained on 512 positions")
def test_a_cache_edit_is_compared_with_everything_on_language(tiny_checkpoint, tmp_path):
    analysis = load("cache_on_language")
    rows = [
        {"question": f"{i} apples and {i} more?", "answer": f"{i} + {i} = {2 * i}. So there are {2 * i}.\n#### {2 * i}"}
        for i in range(1, 31)
    ]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = str(tmp_path / "gsm8k.jsonl")
    sizes = dict(n_pairs=4, shots=1, n_prompts=2, n_dev=3, n_test=3, n_style=2, n_controls=2, max_new_tokens=8)
    some = dict(c_values=(0.01, 0.02), some_pairs=(2,), some_shots=(1,), c_keys=(0.01,), layers=(1, 2))
    config = analysis.Config(str(tiny_checkpoint()), file, tmp_path / "out", file, dtype="float32", **sizes, **some)
    found = analysis.main(config)
    test = analysis.Modes.from_dict(found["effect"]["test"])
    names = [condition.condition for condition in test.conditions]
    assert names[:3] == ["unsteered", "cache", "residual, once"]
    assert names[3:7] == ["words", "offset token alone", "swapped sides", "swapped sides, own length"]
    assert names[7:] == ["random-0", "spread-0", "random-1", "spread-1"]
    assert set(test["cache"].p) == set(test["cache"].changes) >= {"reasons", "accuracy", "answered", "length"}
    assert len(found["steadiness"]["dev"]["conditions"]) == 1 + 8 + 2 + 1 + 3 + 2 + 1
    assert len(found["styles"]["test"]["conditions"]) == 6
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert json.dumps(analysis.main(config)) == json.dumps(found)  # resumed
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_styles_are_carried_over():
    analysis = load("style_transfer")
    found = analysis.main(analysis.Config(n_pairs=6, shots=1, c_values=(1.0,), n_dev=2, n_test=4))
    assert found.modes["stepwise vector"].styles["stepwise"].value >= 0.5
    assert "if-then prompted" in analysis.table(found)


@pytest.mark.parametrize(("name", "kind"), [("seed1", "qwen2"), ("llama", "llama")])
def test_the_sibling_organisms_are_small_and_reason(name, kind):
    folder = Path(__file__).parent.parent / "analyses" / "organisms" / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5 * 2**20
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    model = ls.load_model(folder)
    traces = ls.annotate(ls.generate_traces(model, ls.load_tasks(split="dev", n=12), max_new_tokens=400), ls.grammar)
    assert sum(trace.finished and not trace.n_unparsed for trace in traces) >= 8
    assert sum(bool(trace.correct) for trace in traces) >= 6


def test_own_behaviors_are_two_runs_with_reports(tiny_checkpoint, tmp_path):
    analysis = load("own_behaviors")
    sizes = dict(n_train=6, n_dev=3, n_test=3, n_samples=1, n_controls=1, max_new_tokens=24, coefficients=(0.001,))
    found = analysis.main(analysis.Config(str(tiny_checkpoint()), tmp_path, runs=("contrast",), **sizes))
    assert found["contrast"].unit == "score"
    assert "contrast: politeness up" in analysis.table(found)
    assert (tmp_path / "contrast" / "report.html").exists()
    says = ["You should try it. It is blue.", "Make sure that your hands are clean."]
    traces = [
        ls.Trace(ls.Task("a", "c", "test", "?"), "?", t, (1,), tuple(t.encode()), tuple(range(len(t))), True)
        for t in says
    ]
    labels = [[sentence.label for sentence in sentences] for sentences in analysis.advice(traces)]
    assert labels == [["advice", "other"], ["advice"]]


def test_politeness_goes_from_pairs_to_a_measured_effect(tiny_checkpoint):
    analysis = load("politeness")
    config = analysis.Config(
        str(tiny_checkpoint()), n_controls=2, n_requests=3, n_samples=2, max_spans=4, max_new_tokens=4
    )
    found = analysis.main(config)
    assert {(e.kind, e.unit) for e in found.effects} == {("down", "score"), ("up", "score")}
    assert all(0 <= e.share.low <= e.share.value <= e.share.high <= 1 and 0 <= e.layer < 4 for e in found.effects)
    assert all([pool.n for pool in e.controls] == [2, 2] for e in found.effects)
    assert analysis.table(found).count("layer") == 2
    pairs = ls.load_pairs("politeness")  # the rule tells the two sides of the written pairs apart
    assert all(analysis.COURTESY.search(pair.positive.completion) for pair in pairs)
    assert not any(analysis.COURTESY.search(pair.negative.completion) for pair in pairs)
    assert not {pair.positive.prompt for pair in pairs} & set(analysis.REQUESTS)


def test_geometry_and_attention_of_two_models_beside_published_means(tiny_checkpoint, tmp_path):
    from safetensors.torch import save_file

    analysis = load("geometry_on_language")
    said = {
        "initializing": "Okay, so the question is about {} red apples and what they cost.",
        "deduction": "So the number of apples must be {} and the rest are green ones.",
        "adding-knowledge": "I remember that apples come in boxes of {} in most large shops.",
        "example-testing": "For example, let me try {} apples and count the boxes again.",
        "uncertainty-estimation": "Hmm, maybe it is not {} apples, I am not so sure of that.",
        "backtracking": "Wait, no, it can not be {} apples, let me start all over again.",
    }
    rows = []
    for i in range(6):
        order = [*said, "deduction", "deduction", "backtracking", "deduction"]
        parts = [(label, said[label].format(10 * i + n // 3)) for n, label in enumerate(order)]
        rows.append(
            {
                "response": "<think>\n" + " ".join(text for _, text in parts),
                "annotated": "".join(f'["{label}"]{text}["end-section"]' for label, text in parts),
            }
        )
    (tmp_path / "chains.jsonl").write_text("\n".join(map(json.dumps, rows)))
    means = {name: torch.randn(28, 8) for name in (*ls.BEHAVIORS, "overall")}
    counts = {"counts": json.dumps(dict.fromkeys(ls.BEHAVIORS, 3))}
    save_file(means, tmp_path / "r1_qwen_1.5b_mean_activations.safetensors", counts)
    models = (str(tiny_checkpoint()), str(tiny_checkpoint(seed=1)))
    sizes = dict(layer=2, n_bootstrap=6, n_controls=2, n_overlap=2, n_heads=2, halves=True)
    found = analysis.main(analysis.Config(*models, tmp_path / "out", tmp_path, ("chains.jsonl",), **sizes))
    f = found.figures
    assert f["chains"] == 6
    assert -1 <= f["rank_correlation.mini_r1.published-all.middle"] <= 1
    assert f["cosine.all.deduction.backtracking.mini_r1.low"] <= f["cosine.all.deduction.backtracking.mini_r1.high"]
    assert len(f["norm.backtracking.mini_r1"]) == 4
    assert len(f["norm.backtracking.r1_1.5b"]) == 28
    assert f["attention.pairs.before.backtracking"] == 6  # the other one of each chain follows no deduction
    assert f["attention.share.before.difference.low"] <= f["attention.share.before.difference.high"]
    assert [f["attention.heads.shared.0.head"] != f["attention.heads.shared.1.head"]] == [True]
    assert len(analysis.draw(found, 2).data) > 20
    assert json.loads(json.dumps(f)).keys() == f.keys()


def test_places_of_pairs_and_words_they_share():
    analysis = load("geometry_on_language")
    text = "The quotient is 42 now. We add the two sides here. Wait, is 42 the quotient? It all fits very well."
    starts, labels = [0, 24, 52, 77], ["deduction", "deduction", "backtracking", "deduction"]
    ends = [*starts[1:], len(text)]
    spans = [ls.Span(b, 1 + s, e, s, e - 1) for b, s, e in zip(labels, starts, ends, strict=True)]
    ids = tuple(range(len(text)))
    trace = ls.Trace(ls.Task("a", "c", "test", "?"), "?", text, (1,), ids, ids, True, spans=tuple(spans))
    found = analysis.pairs_of(trace, 10)
    kinds = {
        (int(i), int(j)): (analysis.ASKERS[g // 3], analysis.KINDS[g % 3], bool(c % 2))
        for i, j, g, c in zip(found.later, found.earlier, found.group.tolist(), found.cell.tolist(), strict=True)
    }
    assert kinds[2, 1] == ("backtracking", "before", False)
    assert kinds[2, 0] == ("backtracking", "shared", True)
    assert kinds[3, 0] == ("deduction", "unshared", False)
    assert (3, 2) not in kinds  # no deduction
    assert [found.owner[i].item() for i in found.first] == [0, 1, 2, 3]


SCRIPTS = sorted(path.name for folder in ("analyses", "benchmarks") for path in (ROOT / folder).glob("*.py"))
#: Options that say where results go: the script takes them out before it makes its `Config`.
OUTPUTS = {"request", "json", "figure", "generate", "analyze", "probes", "smoke", "tiny"}


def options_of(tree: ast.Module) -> set[str]:
    """What the options of a script's parser are called in code, if they are written out."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            named = [keyword.value for keyword in node.keywords if keyword.arg == "dest"] or node.args[-1:]
            found |= {str(n.value).lstrip("-").replace("-", "_") for n in named if isinstance(n, ast.Constant)}
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple) and "add_argument" in ast.unparse(node):
            found |= {str(n.value) for n in node.iter.elts if isinstance(n, ast.Constant)}  # one line for many options
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_are_fields_of_the_scripts_config(script):
    path = next(path for folder in ("analyses", "benchmarks") if (path := ROOT / folder / script).exists())
    tree = ast.parse(path.read_text(encoding="utf-8"))
    made = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Config"]
    if not any(keyword.arg is None for call in made for keyword in call.keywords):
        pytest.skip("makes no Config(**options)")
    (config,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"]
    fields = {n.target.id for n in config.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert options_of(tree) - OUTPUTS <= fields


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> str:
    """A file of the organism's chains with the grammar's labels."""
    model = ls.load_model()
    tasks = ls.load_tasks(split="train", n=40)
    traces = ls.annotate(ls.generate_traces(model, tasks, temperature=1.0, max_new_tokens=300), ls.grammar)
    path = tmp_path_factory.mktemp("annotated") / "chains.jsonl"
    ls.traces.save_traces(traces, path)
    return str(path)


def test_choices_are_compared_at_one_kl_and_scores_with_effects(annotated, tmp_path, monkeypatch):
    analysis = load("choices_on_language")
    monkeypatch.setattr(analysis, "ALPHAS", (0.5, 1.0))
    config = dataclasses.replace(
        analysis.tiny(analysis.Config(str(ls.models.ORGANISM), (annotated,), tasks="organism")),
        dtype="float32",
        layer=4,
        layers=(3, 5),
        n_tasks=4,
        max_new_tokens=60,
        sweep=2,
    )
    analysis.generate(config, tmp_path)
    pieces = json.loads((tmp_path / "pieces.json").read_text())
    assert {"vectors", "target", "choices-1 generated", "windows-1 generated", "layers-1 generated"} <= set(pieces)
    analysis.generate(config, tmp_path)
    assert json.loads((tmp_path / "pieces.json").read_text()) == pieces  # nothing is done twice
    rows, means, scores = analysis.analyze(config, tmp_path)
    assert [r.question for r in rows] == ["choices"] * 4 + ["windows"] * 4 + ["layers"] * 8
    assert all(r.change.low <= r.change.value <= r.change.high for r in rows)
    assert [m.recipe for m in means] == ["span-all", "onset±1-spans"]
    for mean in means:
        four = [
            r.change.value
            for r in rows
            if (r.question, r.recipe) in {("choices", mean.recipe), ("windows", mean.recipe)}
        ]
        assert mean.change.value == pytest.approx(np.mean(four))
    named = {s.score: s for s in scores}
    assert {"exact at 1", "fisher", "signed", "published", "middle layer", "norm ratio"} <= set(named)
    assert all(s.regret.value >= 0 and set(s.picks.values()) <= {3, 5} for s in scores)
    assert named["middle layer"].ahead.value == 0
    analysis.save(rows, means, scores, config, tmp_path)
    assert analysis.table(rows, means, scores).count("\n") > len(rows)


def test_which_chains_compares_subsets_labels_and_models(annotated, tmp_path):
    analysis = load("which_chains")
    organism = str(ls.models.ORGANISM)
    config = analysis.Config(
        organism,
        organism,
        (annotated,),
        tmp_path,
        tasks="organism",
        dtype="float32",
        layer=4,
        length=60.0,
        sizes=(20,),
        n_relabeled=20,
        n_base=20,
        n_own=6,
        own_tokens=100,
        n_tasks=3,
        n_samples=1,
        max_new_tokens=60,
        n_bootstrap=10,
    )
    rows = analysis.main(config)
    assert {r.steered for r in rows} == {"model", "base"}
    of = {(r.steered, r.chains, r.behavior): r for r in rows}
    for b in ls.STEERED:
        every, some = of["model", analysis.ALL, b], of["model", "20 chains", b]
        assert every.cosine == pytest.approx(1)
        assert every.n_chains == 40
        assert some.n_chains == 20
        assert some.low <= some.cosine + 0.1
        assert some.n_spans < every.n_spans
        # The base is the same model here: vectors of the same chains are the same, and so are their effects.
        assert of["model", analysis.BASE, b].cosine == pytest.approx(some.cosine, abs=1e-5)
        assert of["base", analysis.ALL, b].change == every.change
    assert analysis.main(config) == rows  # from its files
    assert analysis.table(rows).count("\n") == 1 + len(rows)
    assert len(analysis.figure(rows).data) == 8


def test_where_a_sentence_of_the_organism_is_decided():
    analysis = load("where_decided")
    early, found = analysis.main(analysis.Config(layer=5, length=60.0, n_text=24, n_forced=4, max_tokens=120))
    by_tokens = {row.tokens: row.f1.value for row in early}
    assert by_tokens[1] < by_tokens[5]
    assert by_tokens[0] > 0.95
    assert len(found) == len(analysis.RECIPES) * len(analysis.SCOPES) * len(analysis.PLACES)
    first, *_, later = (g.specific.value for g in found[: len(analysis.PLACES)])
    assert first > abs(later)  # onset vectors on onsets
    assert analysis.table(early, found).count("\n") == 4 + len(early) + len(found)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run's folder on the organism, finished but for its report."""
    folder = tmp_path_factory.mktemp("small") / "run"
    sizes: dict[str, Any] = dict(
        n_train=24, n_dev=6, n_test=6, n_controls=1, n_score_controls=1, score_chains=4, max_spans=5
    )
    behaviors = ("backtracking", "uncertainty-estimation")
    config = dataclasses.replace(DEMO, **sizes, layers=(4,), coefficients=(0.3,), behaviors=behaviors)
    run = Run.open(folder, config)
    for stage in list(STAGES)[:-1]:
        run_stage(run, stage)
    return folder


def test_responses_to_coefficients_and_what_else_moves(small_run):
    analysis = load("dose_response")
    sys.modules["dose_response"] = analysis  # as when run from its folder
    config = analysis.Config(small_run, coefficients=(0.3, 0.6), n_dev=4)
    rows = analysis.main(config)
    assert len(rows) == 2 * 3  # behaviors; own, isotropic and shuffled
    for row in rows:
        assert [p.coefficient for p in row.curve.points] == [-0.6, -0.3, 0.0, 0.3, 0.6]
    assert analysis.table(rows).count("\n") == len(rows)
    assert (
        "odd parts lie wholly" in analysis.answer(json.loads(json.dumps([dataclasses.asdict(row) for row in rows])))[0]
    )
    own = [row.curve for row in rows if row.vector == analysis.OWN]
    assert len(ls.plots.dose_response(own).data) == 2 * len(own)
    between = load("entanglement")
    found = between.main(between.Config(config, coefficient=0.6))
    assert len(found.cells) == 6 * 2
    mine = {(c.steered, c.vector, c.counted): c for c in found.cells}
    for row in rows:
        at = {p.coefficient: p.share.value for p in row.curve.points}
        cell = mine[row.curve.behavior, row.vector, row.curve.behavior]
        assert cell.effect.value == pytest.approx((at[0.6] - at[-0.6]) / 2)  # the same chains
    assert mine["backtracking", "own", "backtracking"].cosine == pytest.approx(1.0)
    assert between.draw(found).data
    assert between.table(found).count("\n") == len(found.cells)
    assert "Spearman" in between.answer(json.loads(json.dumps(dataclasses.asdict(found))))[0]


def test_length_and_right_answers_are_read_from_a_run(small_run, tmp_path):
    analysis = load("length_control")
    rows = analysis.main(analysis.Config(small_run))
    evaluation = ls.Evaluation.load(small_run / "evaluation.json")
    base, *_ = evaluation.conditions
    for row in rows:
        condition = next(c for c in evaluation.conditions if c.condition == f"{row.behavior}/{row.kind}")
        assert row.length.value == pytest.approx(condition.length - base.length)
        assert row.unsteered_length == pytest.approx(base.length)
    assert len(analysis.draw(rows).data) == len(rows)
    assert analysis.table(rows).count("\n") == len(rows)
    cut = dataclasses.replace(
        evaluation, conditions=tuple(dataclasses.replace(c, finished=0.1) for c in evaluation.conditions)
    )
    cut.save(tmp_path / "evaluation.json")
    with pytest.raises(ls.LensteerError, match="10% of the unsteered chains end"):
        analysis.main(analysis.Config(tmp_path))


def test_constructions_are_compared_at_one_kl(tmp_path, monkeypatch):
    analysis = load("construction_ablation")
    sizes = dict(n_train=16, n_tasks=3, n_prompts=2, kl_tokens=20, max_rounds=2, n_draws=2, n_directions=4)
    config = analysis.Config(**sizes, n_controls=4, max_new_tokens=40, folder=tmp_path)
    found = analysis.main(config)
    means = {row.construction: row for row in found.rows if row.behavior == analysis.MEAN}
    assert set(means) == set(analysis.CONSTRUCTIONS)
    assert means["difference"].ahead.value == 0
    assert means["difference"].cosine == pytest.approx(1)
    for row in found.rows:
        assert row.effect.low <= row.effect.value <= row.effect.high
        assert row.plans == 2 or row.behavior == analysis.MEAN  # down and up
    assert set(found.matches) == set(analysis.UNSUPERVISED)
    assert {row.label for row in found.stability.rows} <= set(ls.STEERED)
    monkeypatch.setattr("lensteer.generation.jobs.generate", None)
    assert analysis.main(config).rows == found.rows  # from its files
    assert analysis.table(found).count("\n") > len(means)
    assert len(analysis.figure(found).data) == 5
    values = json.loads(analysis.to_json(found, config))
    assert len(values["rows"]) == len(found.rows)
    assert "Better than they" in analysis.answer(values)[0]


def test_harnesses_are_asked_the_tasks_that_lensteer_asks():
    """Without their packages, lensteer's own run is left."""
    analysis = load("benchmark_agreement")
    rows = analysis.main(analysis.Config(n=3, max_new_tokens=20))
    assert {row.condition for row in rows} == {"unsteered", "steered"}
    assert len(rows) == 2 * len(analysis.available())
    for row in rows:
        assert row.same_texts == row.same_answers == row.n == 3
        assert row.right + row.unread <= 3
    assert analysis.table(rows).count("\n") == len(rows)
