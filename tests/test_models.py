"""The interface to TransformerLens: what is loaded, what goes in as ids, what comes out as text, and the plain twin."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from datetime import datetime
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lensteer as ls
from lensteer import models, twins
from lensteer.models.dates import DATE
from lensteer.steering import SteeringPlan

FAMILIES = ("qwen2", "llama", "qwen3", "gemma3")
BOS = {"qwen2": False, "llama": True, "qwen3": False, "gemma3": True}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return tiny_model("llama", opens_thinking=True).tokenizer


# --- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bridge_has_the_checkpoints_own_weights_and_logits(family, tiny_checkpoint, tiny_model):
    from transformers import AutoModelForCausalLM

    model = tiny_model(family)
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family)).eval()
    ids = torch.tensor([models.encode(model, "First, let me think about the problem.")])
    with torch.no_grad():
        theirs = plain(ids, output_hidden_states=True)
        ours, cache = model.run_with_cache(ids, names_filter=[models.resid_hook(0), models.resid_hook(2)])
    torch.testing.assert_close(ours, theirs.logits, atol=1e-4, rtol=0)
    for layer in (0, 2):  # layer l is the residual stream behind block l
        torch.testing.assert_close(cache[models.resid_hook(layer)], theirs.hidden_states[layer + 1], atol=1e-4, rtol=0)
    assert (models.n_layers(model), models.d_model(model)) == (4, 32)
    assert not any(p.requires_grad for p in model.parameters())
    normed = theirs.hidden_states[-1] @ plain.get_output_embeddings().weight.T
    torch.testing.assert_close(normed, theirs.logits, atol=1e-4, rtol=0)
    gain = plain.model.norm.weight.detach() + (family == "gemma3")
    assert torch.equal(models.final_norm_gain(model), gain)


def test_the_organism_is_loaded_like_any_other_folder(organism, tmp_path):
    assert models.fingerprint(organism).name == "organism"
    folder = shutil.copytree(models.ORGANISM, tmp_path / "copy")
    other = ls.load_model(folder)
    assert models.fingerprint(other).name == "copy"
    assert not models.fingerprint(organism).differences(models.fingerprint(other).to_dict())
    assert models.n_layers(organism) >= 8


def test_fingerprints_tell_models_apart(tiny_checkpoint, tiny_model):
    one = models.fingerprint(tiny_model())
    again = models.fingerprint(ls.load_model(tiny_checkpoint(), dtype=torch.bfloat16))
    assert one.differences(again.to_dict()) == []
    assert one.differences(models.fingerprint(tiny_model(seed=1)).to_dict()) == ["weights"]
    assert "template" in one.differences(models.fingerprint(tiny_model(opens_thinking=True)).to_dict())
    assert {"n_layers", "weights"} <= set(one.differences(models.fingerprint(tiny_model(n_layers=2)).to_dict()))


def broken(folder, what):
    """Spoil a checkpoint in one way."""
    if what == "no config":
        (folder / "config.json").unlink()
    elif what == "cut weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "corrupt config":
        (folder / "config.json").write_text("{")
    elif what == "unknown architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "abacus", "architectures": ["Abacus"]}))
    elif what == "corrupt tokenizer":
        (folder / "tokenizer.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    "what", ["no config", "cut weights", "corrupt config", "unknown architecture", "corrupt tokenizer"]
)
def test_a_broken_checkpoint_is_refused_by_name(what, tiny_checkpoint, tmp_path):
    folder = broken(shutil.copytree(tiny_checkpoint(), tmp_path / "spoiled"), what)
    with pytest.raises(ls.LensteerError, match="spoiled"):
        ls.load_model(folder)


def test_an_unknown_name_is_refused_by_name():
    with pytest.raises(ls.LensteerError, match="nobody/no-such-model"):
        ls.load_model("nobody/no-such-model")


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_a_layer_that_is_not_there_is_refused(layer, tiny_model):
    with pytest.raises(ls.LensteerError, match=f"no layer {layer}.*0 to 3"):
        models.check_layer(tiny_model(), layer)
    assert models.check_layer(tiny_model(), 3) == 3


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_prompt_has_its_bos_exactly_once(family, tiny_model):
    model = tiny_model(family)
    ids = models.encode(model, models.chat_text(model, "Is three right?"))
    bos = model.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert ids.count(bos) == BOS[family]
    if BOS[family]:
        assert ids[0] == bos
        # The trap: this tokenizer would put another in front.
        assert model.tokenizer(models.chat_text(model, "Is three right?")).input_ids[:2] == [bos, bos]
    assert model.tokenizer.decode(ids) == models.chat_text(model, "Is three right?")
    single = model.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [ids.count(i) for i in single] == [2, 1]


def test_a_prompt_may_be_words_or_messages_and_may_open_thinking(tiny_model, organism):
    model = tiny_model()
    said = [{"role": "user", "content": "Three?"}]
    assert models.chat_text(model, "Three?") == models.chat_text(model, said)
    assert "<think>" not in models.chat_text(model, "Three?")
    assert models.chat_text(tiny_model(opens_thinking=True), "Three?").endswith("assistant\n<think>\n")
    assert models.chat_text(organism, "Three?").endswith("assistant\n<think>\n")
    assert models.chat_text(organism, "Three?", thinking=False).endswith("assistant\n")


#: As in Llama 3.2: today's date unless one is given.
GIVEN_OR_TODAY = """
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today: " + date_string + "\n" }}
{%- for m in messages %}{{ m['content'] }}{% endfor %}"""
#: As in SmolLM3 and others: always today's, here with a number that is computed from it.
TODAY = "\n{{ 'It is ' + strftime_now('%A, %-d/%m/%Y %H:%M:%S, 100 %%') }} {{ strftime_now('%Y')|int - 1 }}"


@pytest.fixture
def clock(monkeypatch):
    """Set the time that transformers' templates see."""

    def show(when):
        class Clock:
            @staticmethod
            def now():
                return when

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)

    return show


def test_a_template_that_writes_the_date_gives_the_same_prompt_on_every_day(tiny_model, monkeypatch, clock):
    model, found = tiny_model(), {}
    for name, template in (("given", GIVEN_OR_TODAY), ("always", TODAY)):
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
        plain = []
        for when in (datetime(2025, 12, 31, 23, 59), datetime(2026, 1, 1), DATE):
            clock(when)
            found.setdefault(name, set()).add(models.chat_text(model, "Three?"))
            plain.append(model.tokenizer.apply_chat_template([{"role": "user", "content": "Three?"}], tokenize=False))
        assert len(set(plain)) == 3  # without us, each day has its own
        assert found[name] == {plain[-1]}  # what the template itself writes on that date
    assert found["given"] == {"Today: 26 Jul 2024\nThree?"}
    assert found["always"] == {"\nIt is Friday, 26/07/2024 00:00:00, 100 % 2023"}


def test_every_directive_is_written_as_python_writes_it(tiny_model, monkeypatch, clock):
    model = tiny_model()
    for letter in "aAbBcdDeFfGHIjmMpSTuUVwWxXyYzZ%":
        monkeypatch.setattr(model.tokenizer, "chat_template", f"{{{{ strftime_now('<%{letter}>%%{letter}') }}}}")
        assert models.chat_text(model, "Three?") == DATE.strftime(f"<%{letter}>%%{letter}")


def test_chains_are_resumed_on_another_day(tiny_model, monkeypatch, clock, tmp_path):
    model, tasks = tiny_model(), ls.load_tasks(n=3)
    monkeypatch.setattr(model.tokenizer, "chat_template", GIVEN_OR_TODAY)
    options: dict[str, Any] = dict(path=tmp_path / "chains.jsonl", max_new_tokens=3)
    clock(datetime(2025, 12, 31))
    ls.generate_traces(model, tasks[:2], **options)
    clock(datetime(2026, 1, 1))
    assert len(ls.generate_traces(model, tasks, **options)) == 3


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% for", "{{ messages[5].foo.bar }}"])
def test_a_chat_template_that_fails_is_named(tiny_model, monkeypatch, template):
    model = tiny_model()
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    with pytest.raises(ls.LensteerError, match=r"the chat template of 'tiny.*' fails .*give another one"):
        models.chat_text(model, "Hi")


def test_a_missing_chat_template_is_named(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "speechless")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    model = ls.load_model(folder)
    model.tokenizer.chat_template = None
    with pytest.raises(ls.LensteerError, match="'speechless' has no chat template"):
        models.chat_text(model, "Three?")


def test_end_ids_are_the_tokenizers_and_the_generation_configs(tiny_model, monkeypatch):
    model = tiny_model("llama")
    own = model.tokenizer.eos_token_id
    assert models.end_ids(model) == {own}
    monkeypatch.setattr(model.original_model.generation_config, "eos_token_id", [7, own])
    assert models.end_ids(model) == {7, own}


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_the_token_table_says_what_each_token_does(family, tiny_model, monkeypatch):
    model = tiny_model(family)
    monkeypatch.setitem(vars(model.tokenizer), "thought_marks", None)  # the model is shared
    assert models.token_table(model).thought is None  # its template knows no marks
    models.set_thought_marks(model, "<think>")
    table = models.token_table(model)
    ids = models.encode(model, "<think>I am. So</think>\nThe")
    texts = [model.tokenizer.decode([i]) for i in ids]
    opens, closes = table.thought
    assert [texts[i] for i in opens.whole[ids].nonzero()[:, 0]] == ["<think>"]
    assert [texts[i] for i in closes.whole[ids].nonzero()[:, 0]] == ["</think>"]
    assert [texts[i] for i in table.ends_sentence[ids].nonzero()[:, 0]] == [".", "\n"]
    assert len(opens.whole) == len(table.texts) == model.cfg.d_vocab
    assert table is models.token_table(model)


# --- text from ids -------------------------------------------------------------------------------


def check_offsets(tokenizer, ids):
    text, starts = models.decode_offsets(tokenizer, ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert len(starts) == len(ids)
    assert starts == sorted(starts)
    assert not starts or (starts[0] == 0 and starts[-1] <= len(text))
    pieces = [text[begin:end] for begin, end in zip(starts, [*starts[1:], len(text)][: len(ids)], strict=True)]
    assert "".join(pieces) == text
    return text, starts, pieces


def test_characters_of_several_tokens_share_their_start(tokenizer):
    text = "Wait, 🤔 maybe é or 数 is\n\nright.<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    decoded, starts, pieces = check_offsets(tokenizer, ids)
    assert decoded == text
    emoji = text.index("🤔")
    assert starts.count(emoji) in (3, 4)
    assert pieces[-1] == "<|im_end|>"
    expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    for token, piece, (begin, _) in zip(ids, pieces, expected, strict=True):
        if piece and "�" not in tokenizer.decode([token]):
            assert text.startswith(piece, begin)


def test_text_behind_a_broken_character_starts_where_it_stands(tokenizer):
    broken_bytes = tokenizer("🤔", add_special_tokens=False).input_ids[:2]
    after = tokenizer(" maybe right", add_special_tokens=False).input_ids
    text, starts, _ = check_offsets(tokenizer, [*broken_bytes, *after])
    assert starts[len(broken_bytes)] == text.index(" maybe")
    # The same for a token that is a replacement character of its own right.
    literal = tokenizer("�", add_special_tokens=False).input_ids
    text, starts, _ = check_offsets(tokenizer, [*after, *literal, *after])
    assert starts[len(after) + len(literal)] == text.rindex(" maybe")


def test_a_long_run_of_broken_characters_takes_no_longer_than_text(tokenizer):
    """A model that is steered too far writes them."""
    broken = tokenizer("🤔", add_special_tokens=False).input_ids[:1]
    after = tokenizer(" maybe right", add_special_tokens=False).input_ids
    start = time.process_time()
    text, starts, _ = check_offsets(tokenizer, [*broken * 8000, *after])
    assert time.process_time() - start < 5  # 0.3 s; it was 12 s
    assert starts[8000] == text.index(" maybe") == 8000
    assert max(b - a for a, b in itertools.pairwise(starts)) <= 16  # they don't all begin at the first


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_offsets_of_any_ids_rebuild_the_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    _, _, pieces = check_offsets(tokenizer, ids)
    # A token whose own text is whole stands exactly where the offsets say.
    for token, piece in zip(ids, pieces, strict=True):
        alone = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "�" not in alone:
            assert piece.startswith(alone)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
def test_offsets_of_any_text(tokenizer, text):
    assert check_offsets(tokenizer, tokenizer(text, add_special_tokens=False).input_ids)[0] == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 9), max_size=12), strips=st.booleans())
def test_offsets_of_a_sentencepiece_like_tokenizer(ids, strips):
    """Its decoder makes blanks of marks, drops the first one, and spells what it lacks in bytes."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = ["▁", "▁The", "▁next", "step", ".", "<0xF0>", "<0x9F>", "<0xA4>", "<0x94>", "\n"]
    core = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], byte_fallback=True))
    strip = [decoders.Strip(" ", 1, 0)] if strips else []
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    text, _, pieces = check_offsets(tokenizer, ids)
    words = {1: "The", 2: "next", 3: "step", 4: "."}
    for token, piece in zip(ids, pieces, strict=True):
        if token in words and "�" not in text:
            assert piece.strip() == words[token]


# --- the plain twin ------------------------------------------------------------------------------


def test_a_twin_is_found_where_it_is_first_asked_for_under_a_plan(tiny_checkpoint, random_direction):
    """The check against the bridge must not see what the plan adds; its hooks are there again afterwards."""
    model = models.load_model(tiny_checkpoint("qwen3"))
    ids = torch.arange(8)[None]
    with SteeringPlan(random_direction(model), 1, 4.0).on(model):
        before = model(ids)
        assert twins.plain_twin(model) is not None
        assert torch.equal(model(ids), before)
    assert not torch.allclose(model(ids), before, atol=1e-2)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_the_twin_shares_storage_and_gives_the_bridges_logits(family, tiny_model):
    model = tiny_model(family)
    twin = twins.plain_twin(model)
    assert twin is not None
    ours = {k.replace("._original_component", ""): v for k, v in model.original_model.state_dict().items()}
    theirs = twin.state_dict()
    assert all(theirs[name].data_ptr() == ours[name].data_ptr() for name in theirs)
    ids = torch.tensor([models.encode(model, "First, let me think about the problem. Wait,")] * 2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        a = model(ids, attention_mask=mask, position_ids=position)
        b = twin(input_ids=ids, attention_mask=mask, position_ids=position).logits
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], atol=1e-4, rtol=1e-4)


def test_the_twin_follows_the_models_weights(tiny_checkpoint):
    model = ls.load_model(tiny_checkpoint())
    ids = torch.tensor([[5, 6, 7, 8]])
    before = twins.plain_twin(model)
    assert twins.plain_twin(model) is before
    weight = model.original_model.get_parameter("model.norm._original_component.weight")
    with torch.no_grad():
        weight.mul_(2)  # in place: the very same numbers
        torch.testing.assert_close(before(input_ids=ids).logits, model(ids), atol=1e-3, rtol=0)
        weight.data = weight.data / 4  # other storage
        after = twins.plain_twin(model)
        torch.testing.assert_close(after(input_ids=ids).logits, model(ids), atol=1e-3, rtol=0)
    assert after is not before


def test_there_is_no_twin_where_it_would_lie(tiny_checkpoint, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = ls.load_model(tiny_checkpoint(n_layers=2))
    assert twins.plain_twin(model) is not None
    model.enable_compatibility_mode()
    assert twins.plain_twin(model) is None

    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "gpt2")
    (folder / "model.safetensors").unlink()
    size = len(model.tokenizer)
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=64)).save_pretrained(folder)
    other = ls.load_model(folder)  # another layout: it generates through the bridge
    assert twins.plain_twin(other) is None
    (result,) = ls.generation.generate(other, [[5, 6, 7]], max_new_tokens=4)
    assert 1 <= len(result.ids) <= 4


def test_the_embedded_model_loads_without_a_bar(capfd):
    from transformers.utils import logging

    models.load_model()
    assert "Loading weights" not in "".join(capfd.readouterr())
    assert logging.is_progress_bar_enabled()
