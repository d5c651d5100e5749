"""Every architecture: what is refused by name, what is measured instead of known, and the page that says it all."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch.nn import functional

import lensteer as ls
from lensteer import models, twins
from lensteer.caches import single_token
from lensteer.generation import generate
from lensteer.rotary import rotated, turning
from scripts import ROOT, load

pytestmark = pytest.mark.medium  # makes and loads a model of each architecture

ANALYSIS = load("architectures")
NAMES = ANALYSIS.ARCHITECTURES
#: Those whose keys are turned in a way that is not known, and those with no keys to turn.
UNTURNED = ("gpt2", "gpt-j")
RECURRENT = ("qwen3-next", "qwen3.5")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made: dict[str, Any] = {}

    def make(name):
        if name not in made:
            made[name] = ANALYSIS.save_checkpoint(name, tmp_path_factory.mktemp("tiny") / name)
        return made[name]

    return make


@pytest.fixture(scope="module")
def loaded(checkpoint):
    made: dict[str, Any] = {}

    def make(name):
        if name not in made:
            made[name] = ls.load_model(checkpoint(name))
        return made[name]

    return make


@pytest.mark.slow
def test_the_page_says_what_works(tmp_path):
    rows = ANALYSIS.main(ANALYSIS.Config(out=tmp_path / "page.md"))
    assert tuple(rows) == tuple(NAMES)
    written = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert written == (tmp_path / "page.md").read_text(encoding="utf-8"), "write it anew: its first lines say how"


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_without_a_process_and_gives_the_checkpoints_logits(name, checkpoint, no_process):
    from transformers import AutoModelForCausalLM

    model = ls.load_model(checkpoint(name))
    plain = AutoModelForCausalLM.from_pretrained(checkpoint(name), attn_implementation="eager").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), plain(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_without_one_of_its_tensors_is_refused(name, checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoint(name), tmp_path / "holes")
    state = load_file(folder / "model.safetensors")
    lost = sorted(key for key in state if ".2." in key and key.endswith("weight"))[-1]  # of the third layer
    save_file({k: v for k, v in state.items() if k != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ls.LensteerError, match=r"holes' lacks (1|some) of the tensors"):
        ls.load_model(folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_final_norms_gain_is_what_the_norm_does(name, dtype, checkpoint):
    model = ls.load_model(checkpoint(name), dtype=dtype)
    norm = model.ln_final.original_component
    stored = getattr(norm, "weight", None)
    if stored is not None:  # as a trained one, not all ones or zeros
        noise = torch.randn(stored.shape, generator=torch.Generator().manual_seed(0))
        stored.data = (stored + noise).to(stored.dtype)
    gain = models.final_norm_gain(model).float()
    x = 30 * torch.randn(1, 3, models.d_model(model), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = (norm(x.to(model.original_model.dtype)) - norm(-x.to(model.original_model.dtype))).float() / 2
    plain = [functional.rms_norm(x, x.shape[-1:]) * gain, functional.layer_norm(x, x.shape[-1:]) * gain]
    near = 1e-3 if dtype == "float32" else 5e-2
    assert any(torch.allclose(out, found, atol=near, rtol=near) for found in plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fast", [True, False])
def test_a_padded_batch_over_a_cache_writes_what_each_prompt_alone_gives(name, fast, loaded, monkeypatch):
    model = loaded(name)
    if not fast:
        monkeypatch.setattr(twins, "plain_twin", lambda model: None)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [12, 13, 14], [20] * 12]  # the last is longer than a window
    found = generate(model, prompts, max_new_tokens=5)
    for prompt, row in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in row.ids:
            with torch.no_grad():
                logits = model(torch.tensor([ids]))[0, -1]
            assert float(logits.max() - logits[token]) < 1e-3
            ids.append(token)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RECURRENT])
def test_keys_are_turned_as_the_cache_has_them(name, loaded):
    model = loaded(name)
    for layer in range(models.n_layers(model)):
        assert (turning(model, layer) is None) is (name in UNTURNED)
        if name in UNTURNED:
            continue
        three, eleven = (torch.tensor([[position]]) for position in (3, 11))
        flat = rotated(model, single_token(model, 3)[layer][0], three, layer=layer, back=True)
        there = rotated(model, flat, eleven, layer=layer)
        torch.testing.assert_close(there, single_token(model, 11)[layer][0], atol=1e-4, rtol=1e-4)


def test_keys_that_cannot_be_turned_are_refused_before_anything_runs(loaded):
    model = loaded("gpt2")
    ids = [models.encode(model, models.chat_text(model, text)) for text in ("Yes", "No")]
    from lensteer.cache_steering.pairs import Pair

    vector = ls.fit_cache_vector(model, [Pair(*(model.tokenizer.decode(i) for i in ids))])
    assert not vector.keys.any()
    assert vector.values.any()
    with pytest.raises(ls.LensteerError, match=r"gpt2' turns its keys.*c_keys=0"):
        generate(model, ids, max_new_tokens=1, plans=[ls.CachePlan(vector, 1.0, 1.0)] * 2)


def test_layers_without_a_pattern_are_refused_by_name(loaded):
    from lensteer.attention import sentence_attention

    model = loaded("qwen3.5")
    with pytest.raises(ls.LensteerError, match=r"layer 0 of 'qwen3\.5' has no attention pattern.*\[1, 3\]"):
        sentence_attention(model, ANALYSIS.planted_trace(model, 0), layers=[0])


def test_a_vector_of_some_layers_edits_those(loaded):
    from lensteer.cache_steering.pairs import Pair

    model = loaded("gemma-3")
    pairs = [Pair(models.chat_text(model, "C is right"), models.chat_text(model, "no"))]
    with pytest.raises(ls.LensteerError, match=r"layers=\[1, 3\]"):
        ls.fit_cache_vector(model, pairs)
    vector = ls.fit_cache_vector(model, pairs, layers=[3, 1])
    assert vector.layers == (1, 3)
    assert [bool(vector.values[layer].any()) for layer in range(4)] == [False, True, False, True]
    assert ls.CachePlan(vector, 1.0).layers is None
    prompt = [models.encode(model, models.chat_text(model, "Is D right?"))]
    generate(model, prompt, max_new_tokens=2, plans=[ls.CachePlan(vector, 1.0)])
    with pytest.raises(ls.LensteerError, match="sliding_attention"):
        generate(model, prompt, max_new_tokens=2, plans=[ls.CachePlan(vector, 1.0, layers=(0,))])
