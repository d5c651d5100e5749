"""Plans as folders: read back bit for bit with their evidence, refused where they are damaged or another model's."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lensteer as ls
from lensteer import models
from lensteer.errors import LensteerError
from lensteer.evaluation.margins import TextCheck, TextFigure
from lensteer.evaluation.results import ConditionSummary, ControlRank, Effect, Evaluation
from lensteer.export import additions, folder, load_plan, push_to_hub, read_plan, scope_of
from lensteer.export.plan_files import CARD, CONFIG, VECTORS
from lensteer.files import SEAL
from lensteer.positions import at, everywhere, first, generated, onsets, thinking
from lensteer.statistics import Estimate
from lensteer.steering import Evidence, Sample, SteeringPlan
from lensteer.steering.cache import CachePlan, CacheVector
from lensteer.vectors import BehaviorVectors

B = "backtracking"


def vectors_of(model, seed=0):
    """Vectors that record this model, with behaviors of different lengths and a mean norm by layer."""
    generator = torch.Generator().manual_seed(seed)
    shape = (models.n_layers(model), models.d_model(model))
    means = {name: torch.randn(shape, generator=generator) for name in (B, "adding-knowledge")}
    provenance = {"model": models.fingerprint(model).to_dict()}
    return BehaviorVectors.from_means(means, 5 * torch.randn(shape, generator=generator), provenance=provenance)


def evaluation_of(vectors, *, layer=1, coefficient=0.7, scope="everywhere", unit="difference", behavior=B):
    """An evaluation as `evaluate` returns it, with figures made up."""
    plan = SteeringPlan(vectors[behavior], layer, coefficient, unit=unit)
    pool = ControlRank("isotropic", 5, plan.length, -0.01, 0.02, 0.0, 0.01, 6.0, 1, None)
    shares: dict[str, Any] = dict(share=Estimate(0.2, 0.15, 0.25, 50), base=Estimate(0.1, 0.08, 0.12, 50))
    up = Effect(
        behavior, "up", layer, coefficient, plan.length, "sentences", "", **shares, events=60, base_events=30,
        base_event_tasks=20, change=Estimate(0.1, 0.06, 0.14, 50), p=1e-4, p_holm=4e-4, controls=(pool,),
        control_low=-0.01, control_high=0.02, p_value=0.17, wrong_way=0.1, text=True,
    )  # fmt: skip
    prompted = replace(up, kind="prompted", layer=-1, coefficient=0.0, share=Estimate(0.13, 0.1, 0.16, 50), controls=())
    text = TextCheck((TextFigure("repetition", 0.05, 0.04, 0.06, 0.14, True),))
    kind: dict[str, Any] = dict(
        behavior=behavior, pool="", layer=layer, chains=100, parsed=1.0, finished=1.0, length=80.0
    )
    rest: dict[str, Any] = dict(sentences=8.0, sentence_length=9.0, repetition=0.05, compression=0.5, nll=2.0, kl=0.1)
    conditions = (
        ConditionSummary("unsteered", "unsteered", **kind, accuracy=Estimate(0.5, 0.4, 0.6, 50), **rest),
        ConditionSummary(f"{behavior}/up", "up", **kind, accuracy=Estimate(0.4, 0.3, 0.5, 50), **rest, text=text),
    )
    return Evaluation((up, prompted), conditions, 50, 2, 5, 2, scope, unit, ("rules",), ((behavior, "down"),))


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen2")


@pytest.fixture(scope="module")
def vectors(model):
    return vectors_of(model)


def test_an_evaluation_gives_the_plan_that_it_measured(vectors, tmp_path):
    evaluation = evaluation_of(vectors, scope="(thinking & ~onsets)")
    evaluation.save(tmp_path / "evaluation.json")
    for each in (evaluation, Evaluation.load(tmp_path / "evaluation.json")):
        plan = each.plan(vectors, B)
        assert (plan.layer, plan.coefficient, plan.scope) == (1, 0.7, thinking & ~onsets)
        found = plan.measured
        assert found is not None
        assert (found.steered.value, found.unsteered.low, found.p, found.verdict) == (0.2, 0.08, 4e-4, "shown")
        assert (found.prompted.value, found.exceeds_controls, found.readable) == (0.13, True, True)
        assert found.text[0].limit == 0.14
        assert found.model == vectors.provenance["model"]
    bare = SteeringPlan(vectors[B], 1, 0.7, thinking & ~onsets)
    assert plan.identity() == bare.identity()
    assert plan == replace(bare, direction=plan.direction)


def test_evidence_is_not_that_of_a_changed_plan(vectors):
    plan = evaluation_of(vectors).plan(vectors, B)
    assert plan.measured is plan.evidence
    assert replace(plan, scope=generated).measured is plan.evidence  # another scope is said, not dropped
    assert replace(plan, coefficient=1.4).measured is None
    assert replace(plan, layer=2).measured is None
    assert replace(plan, direction=vectors["adding-knowledge"]).measured is None
    assert replace(plan, operator="project_out").measured is None


def test_a_plan_that_was_not_evaluated_is_refused(vectors, model):
    evaluation = evaluation_of(vectors)
    with pytest.raises(LensteerError, match="no coefficient left the text readable"):
        evaluation.plan(vectors, B, -1)
    with pytest.raises(LensteerError, match="sign=2"):
        evaluation.plan(vectors, B, 2)
    with pytest.raises(LensteerError, match="no effect of"):
        evaluation.plan(vectors, "adding-knowledge")
    with pytest.raises(LensteerError, match="give the vectors that were evaluated"):
        evaluation.plan(vectors_of(model, seed=1), B)


def plans(vectors):
    one, other = vectors[B], vectors["adding-knowledge"]
    return {
        "one": SteeringPlan(one, 1, 0.1 + 0.2, everywhere),
        "mean_norm": SteeringPlan(one, 2, -1.3, at([3, 5]), unit="mean_norm"),
        "unit": SteeringPlan(one, 0, 4.0, first(7), unit="unit"),
        "projection": SteeringPlan(one, 3, 1.0, thinking, "project_out"),
        "several": SteeringPlan(one, 1, 1.0) + SteeringPlan(other, 2, 2.0, generated, unit="mean_norm"),
    }


@pytest.mark.parametrize("name", ["one", "mean_norm", "unit", "projection", "several"])
def test_a_folder_reads_back_bit_for_bit(name, vectors, model, tmp_path):
    plan = plans(vectors)[name]
    path = folder(plan, tmp_path / "plan", model=model)
    again = load_plan(path, model)
    assert again.identity() == plan.identity()
    for a, b in zip(again.edits, plan.edits, strict=True):
        assert torch.equal(a.vector, b.vector)
        assert torch.equal(a.direction.at(a.layer), b.direction.at(b.layer))
        assert (a.unit, a.operator, a.scope, a.evidence) == (b.unit, b.operator, b.scope, None)
    ids = torch.tensor([[5, 9, 12, 40, 7]])
    with plan.on(model, prompt_length=2):
        expected = model(ids)
    with again.on(model, prompt_length=2):
        assert torch.equal(model(ids), expected)
    twice = folder(again, tmp_path / "again", model=model)
    assert (twice / VECTORS).read_bytes() == (path / VECTORS).read_bytes()
    assert (twice / CONFIG).read_bytes() == (path / CONFIG).read_bytes()


def test_the_vector_in_the_file_is_what_is_added(vectors, model, tmp_path):
    """For readers other than lensteer."""
    plan = SteeringPlan(vectors[B], 2, -1.3, unit="mean_norm")
    path = folder(plan, tmp_path / "plan", model=model)
    (edit,) = json.loads((path / CONFIG).read_text())["edits"]
    added = edit["coefficient"] * load_file(path / VECTORS)[edit["vector"]]
    assert torch.equal(added, -1.3 * vectors[B].scaled(2, "mean_norm"))
    assert edit["hook_point"] == "blocks.2.hook_resid_post"


def test_evidence_travels_and_the_card_says_it(vectors, tmp_path):
    plan = evaluation_of(vectors).plan(vectors, B)
    samples = (Sample("What is 2+2?", "4.", "Wait, # no.\n\n| 5 |"),)
    plan = replace(plan, evidence=replace(plan.evidence, samples=samples, sampling={"temperature": 0.8, "system": ""}))
    path = folder(plan, tmp_path / "plan", base_model="someone/tiny", license="mit")  # the evidence names the model
    assert load_plan(path).edits[0].evidence == plan.evidence
    card = (path / CARD).read_text()
    for words in (
        "base_model: someone/tiny",
        "license: mit",
        "share of sentences that are backtracking",
        "20.0 % [15.0 %, 25.0 %]",
        "10.0 % [8.0 %, 12.0 %]",
        "p = 0.0004 after Holm's correction",
        "5 control vectors (isotropic) | -1.0 % to +2.0 %: exceeded",
        "prompted baseline | 13.0 %",
        "| repetition | 0.04 | 0.05 | 0.14 | yes |",
        "right answers, steered | 40.0 % [30.0 %, 50.0 %]",
        "    Wait, # no.",
        "temperature 0.8",
        "Verdict: **shown**",
        "1 = the difference of means itself",
    ):
        assert words in card, words
    assert "system" not in card.partition("## Limits")[0]


def test_a_card_says_what_was_not_measured(vectors, model, tmp_path):
    evaluated = evaluation_of(vectors).plan(vectors, B)
    bare = SteeringPlan(vectors["adding-knowledge"], 2)

    def card(plan, name):
        return (folder(plan, tmp_path / name, model=model) / CARD).read_text()

    assert "**Not evaluated.**" in card(bare, "bare")
    assert "another layer, coefficient or vector" in card(replace(evaluated, coefficient=9.0), "changed")
    assert "Measured at the scope `everywhere`**, while this steers at `generated`" in card(
        replace(evaluated, scope=generated), "scope"
    )
    both = card(evaluated + bare, "both")
    assert "The edits together were not evaluated" in both
    assert "20.0 %" in both


def test_another_models_plan_is_refused(vectors, model, tiny_model, tmp_path):
    path = folder(SteeringPlan(vectors[B], 1), tmp_path / "plan", model=model)
    other = tiny_model("qwen2", seed=1)
    with pytest.raises(LensteerError, match=r"does not fit .*weights"):
        load_plan(path, other)
    with pytest.raises(LensteerError, match="was evaluated on"):
        folder(evaluation_of(vectors).plan(vectors, B), tmp_path / "no", model=other)
    wide = tiny_model("qwen2", d_model=64)
    with pytest.raises(LensteerError, match=r"32 wide .* 64 wide"):
        folder(SteeringPlan(vectors[B], 1), tmp_path / "no", model=wide)
    with pytest.raises(LensteerError, match="does not say which model"):
        folder(SteeringPlan(vectors[B], 1), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def edited(path, **changes):
    values = json.loads((path / CONFIG).read_text())
    del values[SEAL]
    (path / CONFIG).write_text(json.dumps(values | changes))


def test_damaged_folders_are_refused(vectors, model, tmp_path):
    plan = SteeringPlan(vectors[B], 1)
    made = [folder(plan, tmp_path / str(i), model=model) for i in range(8)]
    edited(made[0], version=3)
    edited(made[1], kind="recipe")
    edited(made[2], edits=[{"vector": "0.vector"}])
    (made[3] / VECTORS).write_bytes((made[3] / VECTORS).read_bytes()[:-4])
    (made[4] / VECTORS).unlink()
    (made[5] / CONFIG).write_text("{")
    edited(made[6], edits=[])
    narrow = {"0.vector": plan.vector[:7].clone()}
    save_file(narrow, made[7] / VECTORS)
    import hashlib

    edited(made[7], sha256=hashlib.sha256((made[7] / VECTORS).read_bytes()).hexdigest())
    expected = [
        "reads up to 2: install a newer", "is no steering plan", "the plan in .* cannot be read .*label",
        "truncated or", f"has no {VECTORS}",
        "cannot be read", "no edit", "shape .7., where",
    ]  # fmt: skip
    for path, words in zip(made, expected, strict=True):
        with pytest.raises(LensteerError, match=words):
            load_plan(path)
    with pytest.raises(LensteerError, match="or a repository as user/repo"):
        load_plan(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [CONFIG, VECTORS])
def test_a_flipped_bit_is_noticed_or_changes_nothing(name, vectors, tmp_path):
    plan = evaluation_of(vectors).plan(vectors, B)
    path, rng = folder(plan, tmp_path / "plan"), random.Random(0)
    whole, refused = (path / name).read_bytes(), 0
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (path / name).write_bytes(damaged)
        try:
            assert load_plan(path).identity() == plan.identity()
        except LensteerError:
            refused += 1
    assert refused > 70


def test_nothing_is_overwritten_or_left_half_written(vectors, model, tmp_path):
    plan = SteeringPlan(vectors[B], 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(LensteerError, match="exists and holds something"):
        folder(plan, tmp_path / "mine", model=model)
    with pytest.raises(LensteerError, match="no file"):
        folder(plan, tmp_path / "new", model=model, files=[tmp_path / "missing.gguf"])
    odd = replace(plan, scope=ls.PositionScope("mine", lambda c: c.position > 3))
    with pytest.raises(LensteerError, match="'mine'"):  # a scope without a name that can be read back
        folder(odd, tmp_path / "new", model=model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
    (tmp_path / "extra.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    path = folder(plan, tmp_path / "empty", model=model, files=[tmp_path / "extra.gguf"])
    assert (path / "extra.gguf").read_bytes() == b"GGUF"


class Hub:
    """Two repositories on no network."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def create_repo(self, repo, **options):
        self.calls.append((repo, options))

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
        import shutil

        shutil.copytree(folder_path, self.folder / repo_id)
        return f"https://hub.test/{repo_id}/commit/1?{commit_message}"

    def snapshot_download(self, name, *, revision, allow_patterns):
        if not (self.folder / name).is_dir():
            raise OSError("404")
        return str(self.folder / name)


def test_through_the_hub_and_back(vectors, model, tmp_path, monkeypatch):
    import huggingface_hub

    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    plan = SteeringPlan(vectors[B], 1, 0.3)
    path = folder(plan, tmp_path / "plan", model=model)
    address = push_to_hub(path, "someone/vector", private=True)
    assert address.startswith("https://hub.test/someone/vector")
    assert B in address
    assert hub.calls == [("someone/vector", {"private": True, "exist_ok": True})]
    monkeypatch.chdir(tmp_path)
    assert ls.load_plan("someone/vector", model).identity() == plan.identity()
    with pytest.raises(LensteerError, match="cannot be read from the hub"):
        load_plan("someone/else")
    with pytest.raises(LensteerError, match="give one as user/repo"):
        push_to_hub(path, "vector")
    (path / VECTORS).write_bytes(b"")
    with pytest.raises(LensteerError, match="truncated"):
        push_to_hub(path, "someone/broken")
    assert len(hub.calls) == 1


def test_read_plan_names_the_model(vectors, model, tmp_path):
    found = read_plan(folder(SteeringPlan(vectors[B], 1), tmp_path / "plan", model=model))
    assert found.model == models.fingerprint(model)


def test_what_a_plan_adds_by_layer(vectors):
    one, other = vectors[B], vectors["adding-knowledge"]
    plan = SteeringPlan(one, 2, 2.0) + SteeringPlan(other, 2, -1.0, unit="unit") + SteeringPlan(one, 0, 0.5)
    found = additions(plan, "a file", [everywhere])
    assert list(found) == [0, 2]
    expected = 2.0 * one.at(2) - other.at(2) / other.at(2).norm()
    torch.testing.assert_close(found[2], expected)
    assert found[0].dtype == torch.float32


def test_what_a_format_cannot_hold_is_refused_by_name(vectors):
    one = vectors[B]
    with pytest.raises(LensteerError, match="a file cannot express the scope 'onsets': it has 'everywhere', 'at'"):
        additions(SteeringPlan(one, 1, scope=onsets), "a file", [everywhere, "at"])
    assert scope_of(SteeringPlan(one, 1, scope=at([4])), "a file", ["at"]) == at([4])
    with pytest.raises(LensteerError, match="'everywhere', 'generated': export each"):
        additions(SteeringPlan(one, 1) + SteeringPlan(one, 1, scope=generated), "a file", [everywhere, generated])
    with pytest.raises(LensteerError, match="layer 0: its first is layer 1"):
        additions(SteeringPlan(one, 0), "a file", [everywhere], min_layer=1)
    with pytest.raises(LensteerError, match="project_out"):
        additions(SteeringPlan(one, 1, operator="project_out"), "a file", [everywhere])
    cached = CachePlan(CacheVector("think", torch.ones(2, 2, 4), torch.ones(2, 2, 4), "last_prompt"))
    with pytest.raises(LensteerError, match=r"export a CachePlan by ls\.export\.cache"):
        additions(cached, "a file", [everywhere])


def test_evidence_saves_what_is_not_a_number(vectors, tmp_path):
    evidence = evaluation_of(vectors).plan(vectors, B).evidence
    odd = replace(evidence, p=math.nan, accuracy=Estimate(math.nan, math.nan, math.nan, 0))
    odd.save(tmp_path / "evidence.json")
    again = Evidence.load(tmp_path / "evidence.json")
    assert math.isnan(again.p)
    assert math.isnan(again.accuracy.low)


@pytest.mark.medium
def test_importing_lensteer_does_not_import_the_exports():
    import subprocess

    code = "import sys, lensteer; sys.exit('lensteer.export' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
