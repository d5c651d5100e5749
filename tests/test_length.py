"""Texts longer than a model's positions: refused or warned about before anything is computed, never silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import lensteer as ls
from conftest import save_tokenizer
from lensteer import models
from lensteer.forward import forced_logits
from lensteer.generation import generate

LIMIT = 32


def made(kind, folder, dtype=torch.float32):
    """A random model of one kind of positions, whose limit is `LIMIT` tokens."""
    d_vocab = save_tokenizer(folder, bos=False, opens_thinking=False)
    torch.manual_seed(0)
    rope = {"dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}.get(kind)
    small = dict(vocab_size=d_vocab, hidden_size=32, num_attention_heads=4, num_hidden_layers=3)
    if kind == "learned":
        config = GPT2Config(vocab_size=d_vocab, n_positions=LIMIT, n_embd=32, n_layer=3, n_head=4)
        model = GPT2LMHeadModel(config)
    elif kind == "alibi":
        model = BloomForCausalLM(BloomConfig(vocab_size=d_vocab, hidden_size=32, n_layer=3, n_head=4))
    else:
        config = Qwen2Config(
            **small, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=LIMIT,
            initializer_range=0.3, **({"rope_parameters": rope} if rope else {}),
        )  # fmt: skip
        model = Qwen2ForCausalLM(config)
    model.to(dtype).save_pretrained(folder)
    return ls.load_model(folder, dtype=dtype)


@pytest.fixture(scope="module")
def models_by_kind(tmp_path_factory):
    kept = {}

    def get(kind):
        if kind not in kept:
            kept[kind] = made(kind, tmp_path_factory.mktemp(kind))
        return kept[kind]

    return get


def ids_of(n, seed=0):
    return torch.randint(5, 200, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("learned", dict(learned=LIMIT)),
        ("alibi", {}),
        ("rotary", dict(trained=LIMIT)),
        ("dynamic", dict(switching=LIMIT, trained=LIMIT)),
    ],
)
def test_limits_are_read_off_the_model(kind, limits, models_by_kind):
    found = models.length_limits(models_by_kind(kind))
    assert vars(found) == {"learned": None, "switching": None, "trained": None, **limits}


def test_learned_positions_end(models_by_kind):
    model = models_by_kind("learned")
    assert generate(model, [ids_of(20)], max_new_tokens=LIMIT - 20)
    with pytest.raises(ls.LensteerError, match=r"20 tokens and up to 13 new ones: .* 32 tokens; lower max_new_tokens"):
        generate(model, [ids_of(8), ids_of(20)], max_new_tokens=13)
    with pytest.raises(ls.LensteerError, match=r"40 tokens: .* learned positions for 32 tokens; shorten"):
        forced_logits(model, [ids_of(20)], [ids_of(21)])


def test_relative_positions_have_no_end(models_by_kind):
    assert generate(models_by_kind("alibi"), [ids_of(40)], max_new_tokens=2)


def test_rotary_positions_go_on_with_a_warning_once(models_by_kind):
    model = models_by_kind("rotary")
    with pytest.warns(UserWarning, match="40 tokens and up to 2 new ones: .* trained on 32 positions"):
        generate(model, [ids_of(40)], max_new_tokens=2)
    generate(model, [ids_of(40)], max_new_tokens=2)  # a warning would be an error here


def test_frequencies_that_depend_on_the_batch_are_refused_beyond_their_limit(models_by_kind):
    """Alone and beside a long row a short chain would differ by as much as its logits are large."""
    model, short, long = models_by_kind("dynamic"), ids_of(10), ids_of(60, 1)
    plain: Any = model.original_model
    alone = plain(torch.tensor([short])).logits[0]
    padded = torch.tensor([short + [0] * 50, long])
    with torch.no_grad():
        beside = plain(padded).logits[0, :10]
    assert (alone - beside).abs().max() > 0.1 * alone.abs().max()  # what would happen
    with pytest.raises(ls.LensteerError, match="beyond 32 tokens the rotary frequencies"):
        forced_logits(model, [short, long], [ids_of(2), ids_of(2)])
    with pytest.raises(ls.LensteerError, match="beyond 32 tokens the rotary frequencies"):
        generate(model, [ids_of(30)], max_new_tokens=3)
    assert generate(model, [short, ids_of(20)], max_new_tokens=12)


def test_a_single_long_text_does_not_depend_on_what_was_run_before(models_by_kind):
    model, text = models_by_kind("dynamic"), ids_of(40)
    first = forced_logits(model, [text[:30]], [text[30:]])[0]
    forced_logits(model, [ids_of(90, 2)], [ids_of(2)])  # leaves its frequencies behind
    torch.testing.assert_close(forced_logits(model, [text[:30]], [text[30:]])[0], first)


@pytest.mark.parametrize("kind", ["rotary"])
def test_an_overflow_without_a_plan_is_the_dtypes_fault(kind, tmp_path, random_direction):
    model = made(kind, tmp_path, torch.float16)
    with torch.no_grad():
        for parameter in model.original_model.model.layers[0].mlp.down_proj.parameters():
            parameter.fill_(6e4)
    with pytest.raises(ls.LensteerError, match=r"row 0 .* unsteered: torch.float16 .* load it in another dtype"):
        generate(model, [ids_of(5)], max_new_tokens=2)
    plan = ls.SteeringPlan(random_direction(model), 1, 1.0)
    with pytest.raises(ls.LensteerError, match="lower the coefficient"), plan.on(model):
        generate(model, [ids_of(5)], max_new_tokens=2)
