"""Steered checkpoints: plain transformers compute what the hooked model does, or nothing is written."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import lensteer as ls
from exports_table import record
from lensteer import models
from lensteer.errors import LensteerError
from lensteer.export import checkpoint, hf, load_plan
from lensteer.export import checkpoints as module
from lensteer.export.checkpoints import TOLERANCE, sites_up_to
from lensteer.export.weights import INDEX
from lensteer.positions import generated
from lensteer.statistics import Estimate
from lensteer.steering import Evidence, SteeringPlan
from lensteer.vectors import Direction

FORM = "steered checkpoint"
REAL = {
    "smollm2": "SmolLM2-135M (Llama)",
    "mini-r1": "mini-R1 (Llama)",
    "qwen2.5-0.5b": "Qwen2.5-Coder-0.5B (Qwen2)",
    "gemma3-270m": "Gemma-3-270m",
}
IDS = torch.tensor([[5, 40, 9, 77, 12, 130, 8, 61]])


def plain(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def largest(folder, model, plan, ids=IDS):
    """The largest difference of a logit between the export, loaded as anyone would, and the hooked model."""
    with torch.no_grad():
        found = plain(folder, dtype=torch.float32)(input_ids=ids).logits
        with plan.on(model):
            return float((found - model(ids)).abs().max())


def made(family, tmp_path, seed=0, **changes):
    """A random checkpoint of a family that conftest lacks, loaded."""
    import transformers as hf

    from conftest import save_tokenizer

    d_vocab = save_tokenizer(tmp_path, bos=False, opens_thinking=False)
    kind: dict[str, Any] = {
        "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, dict(n_embd=32, n_layer=3, n_head=4, n_positions=128)),
        "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, {}),
        "mistral": (hf.MistralForCausalLM, hf.MistralConfig, dict(sliding_window=None, num_key_value_heads=2)),
        "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, dict(num_key_value_heads=2, head_dim=8)),
        "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, dict(num_key_value_heads=2, head_dim=8)),
        "granite": (hf.GraniteForCausalLM, hf.GraniteConfig, dict(residual_multiplier=0.5, num_key_value_heads=2)),
        "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, dict(num_key_value_heads=2)),
        "olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config, dict(num_key_value_heads=2)),
    }
    cls, config, own = kind[family]
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    shared: dict[str, Any] = dict(
        vocab_size=d_vocab, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0
    )
    options = shared | ({} if family == "gpt2" else sizes) | own | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config(**options, bos_token_id=0, eos_token_id=2))
        for name, tensor in model.named_parameters():  # biases start as zeros, norms as ones
            if name.endswith("bias"):
                torch.nn.init.normal_(tensor, std=0.2)
    model.save_pretrained(tmp_path)
    return ls.load_model(tmp_path)


LESS = [pytest.param(name, marks=pytest.mark.medium) for name in ("qwen3", "gemma3")]


@pytest.mark.parametrize("family", ["llama", "qwen2", *LESS])
def test_several_vectors_and_layers_at_once(family, tiny_model, random_direction, tmp_path):
    model = tiny_model(family)
    one, other = random_direction(model), random_direction(model, seed=1, length=1.0)
    plan = SteeringPlan(one, 1, 0.7) + SteeringPlan(other, 1, -2.0) + SteeringPlan(other, 3, 1.5)
    done = checkpoint(plan, tmp_path / "export", model=model)
    assert done.difference <= done.tolerance == TOLERANCE
    assert done.effect > 100 * TOLERANCE
    assert done.conclusive
    assert largest(done.path, model, plan) < TOLERANCE
    assert done.layers == (1, 3)
    assert load_plan(done.path / "plan", model).identity() == plan.identity()
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    assert done.architecture == architecture.get(family, "Gemma3ForCausalLM")
    config = json.loads((done.path / "config.json").read_text())
    assert config["num_hidden_layers"] == {"qwen3": 6, "gemma3": 6}.get(family, 4)
    assert "_name_or_path" not in config
    card = (done.path / "README.md").read_text()
    assert "**The edits together were not evaluated.**" in card
    assert "steers every position" in card


def test_a_neighboring_layer_differs(tiny_model, random_direction, tmp_path):
    """The check sees an export that is one layer off."""
    model = tiny_model("llama")
    plan = SteeringPlan(random_direction(model), 1)
    done = checkpoint(plan, tmp_path / "export", model=model)
    for layer in (0, 2):
        assert largest(done.path, model, replace(plan, layer=layer)) > 100 * TOLERANCE


@pytest.mark.medium
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mistral", "gemma", "gemma2", "granite"])
def test_other_architectures(family, random_direction, tmp_path):
    model = made(family, tmp_path / "model")
    plan = SteeringPlan(random_direction(model), 1, 0.7)
    done = checkpoint(plan, tmp_path / "export", model=model)
    assert largest(done.path, model, plan) < TOLERANCE
    assert done.effect > 100 * TOLERANCE


@pytest.mark.medium
def test_architectures_that_cannot_are_named(random_direction, tmp_path):
    model = made("olmo2", tmp_path / "olmo2")
    with pytest.raises(LensteerError, match=r"'olmo2' cannot hold a constant vector: its MLPs have no bias"):
        checkpoint(SteeringPlan(random_direction(model), 1), tmp_path / "no", model=model)
    windows = dict(use_sliding_window=True, sliding_window=8, layer_types=["full_attention", "sliding_attention"] * 2)
    model = made("qwen2", tmp_path / "qwen2", num_hidden_layers=4, **windows)
    with pytest.raises(LensteerError, match="attends to a sliding window"):
        checkpoint(SteeringPlan(random_direction(model), 1), tmp_path / "no", model=model)
    assert not (tmp_path / "no").exists()


@pytest.mark.medium
def test_shards_are_small_and_complete(tiny_model, random_direction, tmp_path):
    model = tiny_model("qwen2")
    plan = SteeringPlan(random_direction(model), 2)
    done = checkpoint(plan, tmp_path / "export", model=model, max_shard=30_000)
    index = json.loads((done.path / INDEX).read_text())
    names = sorted(path.name for path in done.path.glob("*.safetensors"))
    assert len(names) > 3
    assert sorted(set(index["weight_map"].values())) == names
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert largest(done.path, model, plan) < TOLERANCE


@pytest.mark.medium
def test_weights_are_streamed_from_the_checkpoint(tiny_model, tiny_checkpoint, random_direction, tmp_path, monkeypatch):
    """The loaded model's copy is not used where the files have them, and is where they are gone."""
    import shutil

    model = tiny_model("llama")
    plan = SteeringPlan(random_direction(model), 2)
    monkeypatch.setattr(model.original_model, "state_dict", None)
    done = checkpoint(plan, tmp_path / "export", model=model)
    monkeypatch.undo()
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "moved")
    moved = ls.load_model(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved")
    again = checkpoint(plan, tmp_path / "again", model=moved)
    assert (again.path / "model.safetensors").read_bytes() == (done.path / "model.safetensors").read_bytes()


@pytest.mark.medium
def test_bfloat16_is_rounded_and_says_so(tiny_model, random_direction, tmp_path):
    model = tiny_model("llama")
    done = checkpoint(SteeringPlan(random_direction(model), 2), tmp_path / "export", model=model, dtype="bf16")
    assert done.dtype == "bfloat16"
    assert plain(done.path).dtype == torch.bfloat16
    assert TOLERANCE < done.difference < done.tolerance < done.effect
    config = json.loads((done.path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize("family", ["qwen2", pytest.param("llama", marks=pytest.mark.medium), LESS[0]])
def test_a_projection_is_one_at_every_site_up_to_its_layer(family, tiny_model, random_direction, tmp_path):
    model = tiny_model(family)
    plan = SteeringPlan(random_direction(model), 2, operator="project_out")
    with pytest.raises(LensteerError, match=r"layer 2 alone: give orthogonalize=True"):
        checkpoint(plan, tmp_path / "export", model=model)
    done = checkpoint(plan, tmp_path / "export", model=model, orthogonalize=True)
    unit = plan.vector

    def project(resid, hook):
        return resid - (resid @ unit)[..., None] * unit

    sites = [f"blocks.{layer}.hook_resid_{site}" for layer in range(3) for site in ("pre", "mid", "post")]
    assert sites_up_to(model, 2) == sites
    export = plain(done.path)
    with torch.no_grad():
        found = export(input_ids=IDS, output_hidden_states=True)
        with model.hooks(fwd_hooks=[(name, project) for name in sites]):
            expected = model(IDS)
        assert float((found.logits - expected).abs().max()) < TOLERANCE
        for resid in found.hidden_states[:4]:  # the embedding and the outputs of layers 0 to 2
            assert float((resid @ unit).abs().max()) < 1e-5
        with plan.on(model):  # the plan itself does less
            assert float((found.logits - model(IDS)).abs().max()) > 100 * TOLERANCE
    config = json.loads((done.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "**More than the plan was written**" in (done.path / "README.md").read_text()


@pytest.mark.medium
def test_projections_that_weights_cannot_hold(tiny_model, random_direction, tmp_path):
    model = tiny_model("gemma3")
    plan = SteeringPlan(random_direction(model), 2, operator="project_out")
    refused = [
        (plan, "a norm or experts are"),
        (replace(plan, coefficient=0.5), r"coefficient 0\.5"),
        (plan + replace(plan, layer=1), r"this plan has 2 edit"),
        (replace(plan, operator="add"), "leave it out"),
    ]
    for each, words in refused:
        with pytest.raises(LensteerError, match=words):
            checkpoint(each, tmp_path / "no", model=model, orthogonalize=True)
    assert not list(tmp_path.iterdir())


def evidence(plan, model, scope):
    nothing = Estimate(0.0, 0.0, 0.0, 10)
    return Evidence(
        models.fingerprint(model).to_dict(), plan.direction.label, 1, plan.layer, plan.coefficient, plan.unit,
        plan.length, scope, "sentences", "rules", 10, 1, nothing, nothing, nothing, None, 0.5, (), "not shown", True,
        (), nothing, nothing,
    )  # fmt: skip


@pytest.mark.medium
def test_a_plan_of_another_scope_needs_evidence_at_all_positions(tiny_model, random_direction, tmp_path):
    model = tiny_model("llama")
    plan = SteeringPlan(random_direction(model), 1, scope=generated)
    for each in (plan, replace(plan, evidence=evidence(plan, model, "generated"))):
        with pytest.raises(LensteerError, match="cannot express the scope 'generated': it has 'everywhere'"):
            checkpoint(each, tmp_path / "export", model=model)
    shown = replace(plan, evidence=evidence(plan, model, "everywhere"))
    done = checkpoint(shown, tmp_path / "export", model=model)
    assert largest(done.path, model, replace(plan, scope=ls.everywhere)) < TOLERANCE
    assert "at the scope `everywhere`" in (done.path / "README.md").read_text()
    with pytest.raises(LensteerError, match="'generated'"):
        checkpoint(replace(shown, coefficient=2.0), tmp_path / "other", model=model)


def test_an_export_that_is_off_is_not_written(tiny_model, random_direction, tmp_path, monkeypatch):
    model = tiny_model("llama")
    plan = SteeringPlan(random_direction(model), 1)
    right = module.added

    def off(config, weights, vectors):
        return right(config, weights, {layer + 1: vector for layer, vector in vectors.items()})

    monkeypatch.setattr(module, "added", off)
    (tmp_path / "export").mkdir()
    with pytest.raises(LensteerError, match="logits differ from the hooked model's"):
        checkpoint(plan, tmp_path / "export", model=model)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert not list((tmp_path / "export").iterdir())


def test_nothing_is_overwritten(tiny_model, random_direction, tmp_path):
    model = tiny_model("llama")
    (tmp_path / "notes.txt").write_text("keep")
    plan = SteeringPlan(random_direction(model), 1)
    with pytest.raises(LensteerError, match="exists and holds something"):
        checkpoint(plan, tmp_path, model=model)
    with pytest.raises(LensteerError, match="no dtype 'int8'"):
        checkpoint(plan, tmp_path / "no", model=model, dtype="int8")
    with pytest.raises(LensteerError, match="64 wide"):
        checkpoint(SteeringPlan(random_direction(tiny_model("llama", d_model=64)), 1), tmp_path / "no", model=model)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.medium
def test_the_organism(organism, random_direction, tmp_path):
    plan = SteeringPlan(random_direction(organism), 3)
    done = checkpoint(plan, tmp_path / "export", model=organism)
    assert done.difference < TOLERANCE
    ids = torch.tensor([models.encode(organism, models.chat_text(organism, "Is there a way out?"))])
    assert largest(done.path, organism, plan, ids) < TOLERANCE
    record(FORM, "organism (Qwen2)", "F32", done.difference, "everywhere")


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models(name, real_model, tmp_path):
    """In float32, by plain transformers with their own attention; and in the checkpoint's bfloat16."""
    model = real_model(name)
    shape = (models.n_layers(model), models.d_model(model))
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer, ids = shape[0] // 2, torch.tensor([models.encode(model, "Wait, let me check that again. 17 + 25 = 42")])
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, names_filter=models.resid_hook(layer))
    norm = cache[models.resid_hook(layer)][0, 1:].norm(dim=-1).mean()
    raw = 0.3 * norm * raw / raw.norm(dim=-1, keepdim=True)
    plan = SteeringPlan(Direction("random", raw, torch.full(shape[:1], float(norm)), tuple(range(shape[0]))), layer)
    done = checkpoint(plan, tmp_path / "export", model=model, dtype="float32")
    assert largest(done.path, model, plan, ids) < max(TOLERANCE, 1e-5 * done.effect)  # of all logits, in float32
    assert done.difference < TOLERANCE
    assert done.effect > 1
    rounded = checkpoint(plan, tmp_path / "rounded", model=model)
    assert rounded.dtype == "bfloat16"
    assert rounded.difference < 0.02 * rounded.effect
    record(FORM, REAL[name], "F32", done.difference, "everywhere")
    record(FORM, REAL[name], "BF16", rounded.difference, "everywhere")
    script = hf(plan, tmp_path / "script", model=model)
    assert script.difference <= script.tolerance < script.effect
    record("script for plain transformers", REAL[name], "F32", script.difference, "everywhere, generated")
