"""What `load_model` takes, what it refuses and in which words, and that it starts no process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lensteer as ls
from lensteer import models

TEXT = "First, let me think about the problem."
TOWERS = ("gemma3", "llava", "mistral3", "qwen3_5")


def hf_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def multimodal(kind: str, tiny_checkpoint, folder: Path) -> Path:
    """A random checkpoint of a vision model, with a tokenizer and no processor."""
    import transformers as hf

    shutil.copytree(tiny_checkpoint("llama"), folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = dict(vocab_size=len(tokenizer_of(folder)) + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    text = dict(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2)
    eye = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    eye |= dict(image_size=32, patch_size=16)
    if kind == "gemma3":
        seen = dict(image_token_index=sizes["vocab_size"] - 1, mm_tokens_per_image=4)
        config = hf.Gemma3Config(text_config=text, vision_config=eye | dict(model_type="siglip_vision_model"), **seen)
        model = hf.Gemma3ForConditionalGeneration(config)
    elif kind == "llava":
        config = hf.LlavaConfig(text_config=hf.LlamaConfig(**text), vision_config=hf.CLIPVisionConfig(**eye))
        model = hf.LlavaForConditionalGeneration(config)
    elif kind == "mistral3":
        config = hf.Mistral3Config(
            text_config=text | dict(model_type="mistral"), vision_config=eye | dict(model_type="pixtral")
        )
        model = hf.Mistral3ForConditionalGeneration(config)
    else:
        linear = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
        own = text | linear | dict(layer_types=["linear_attention", "full_attention"])
        eye = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=32, patch_size=4)
        model = hf.Qwen3_5ForConditionalGeneration(hf.Qwen3_5Config(text_config=own, vision_config=eye))
    model.save_pretrained(folder)
    return folder


# --- what it takes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOWERS)
def test_the_text_tower_of_a_multimodal_checkpoint_is_loaded(kind, tiny_checkpoint, tmp_path, no_process):
    from transformers import AutoModelForImageTextToText

    folder = multimodal(kind, tiny_checkpoint, tmp_path / kind)
    model = ls.load_model(folder)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), whole(input_ids=ids).logits, atol=1e-4, rtol=0)
    assert models.n_layers(model) == 2


def test_a_loaded_multimodal_model_installs_nothing(tiny_checkpoint, tmp_path, no_process):
    from transformers import Gemma3ForConditionalGeneration

    folder = multimodal("gemma3", tiny_checkpoint, tmp_path / "gemma3")
    whole = Gemma3ForConditionalGeneration.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        before = whole(input_ids=ids).logits
        model = ls.load_model(whole, tokenizer=tokenizer_of(folder))
        torch.testing.assert_close(model(ids), before, atol=1e-4, rtol=0)


def test_a_loaded_model_and_its_tokenizer_are_taken_as_they_are(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    plain, tokenizer = hf_model(folder), tokenizer_of(folder)
    tokenizer.chat_template = "mine"
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False).input_ids])
    with torch.no_grad():
        before = plain(ids).logits
        model = ls.load_model(plain, tokenizer=tokenizer)
        torch.testing.assert_close(model(ids), before, atol=1e-4, rtol=0)
    assert model.tokenizer is tokenizer
    assert tokenizer.chat_template == "mine"
    assert models.fingerprint(model).differences(models.fingerprint(ls.load_model(folder)).to_dict()) == [
        "tokenizer",
        "template",
    ]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_bridge_is_returned_as_it_is(tiny_model):
    model = tiny_model()
    assert ls.load_model(model) is model


def test_a_tokenizer_may_come_beside_the_checkpoint(tiny_checkpoint, tmp_path):
    folder = bare(tiny_checkpoint(), tmp_path / "bare")
    model = ls.load_model(folder, tokenizer=tokenizer_of(tiny_checkpoint()))
    assert models.encode(model, TEXT)


@pytest.mark.parametrize(("said", "dtype"), [(name, dtype) for name, dtype in models.DTYPES.items()])
def test_a_dtype_by_name(said, dtype, tiny_checkpoint):
    folder = tiny_checkpoint(n_layers=2)
    for given in (said, dtype):
        model = ls.load_model(folder, dtype=given)
        assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("options", [dict(device="cpu"), dict(device_map="cpu"), dict(device_map={"": "cpu"})])
def test_where_a_model_goes(options, tiny_checkpoint):
    model = ls.load_model(tiny_checkpoint(), **options)
    assert models.device(model) == torch.device("cpu")
    assert model.cfg.device == "cpu"


def save_gguf(folder: Path, to: Path) -> None:
    """A small Llama with a byte-level tokenizer, as llama.cpp's converter would write it, in float32."""
    gguf = pytest.importorskip("gguf")
    config, state = json.loads((folder / "config.json").read_text()), hf_model(folder).state_dict()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(to, "llama")
    heads, shared, width = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    vocabulary = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    special = {t["content"] for t in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocabulary["<|endoftext|>"])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    names = dict(
        input_layernorm="attn_norm",
        post_attention_layernorm="ffn_norm",
        q_proj="attn_q",
        k_proj="attn_k",
        v_proj="attn_v",
        o_proj="attn_output",
        gate_proj="ffn_gate",
        up_proj="ffn_up",
        down_proj="ffn_down",
    )
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in state.items():
        stem, parts = name.removesuffix(".weight"), name.split(".")
        of_layer = f"blk.{parts[2]}.{names[parts[-2]]}" if "layers" in parts else ends[stem]
        if parts[-2] in ("q_proj", "k_proj"):  # llama.cpp keeps the halves of a rotation side by side
            n = heads if parts[-2] == "q_proj" else shared
            tensor = tensor.reshape(n, 2, -1, width).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{of_layer}.weight", tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_logits_of_its_folder(tiny_checkpoint, tmp_path, no_process):
    folder, file = tiny_checkpoint("llama"), tmp_path / "tiny.gguf"
    save_gguf(folder, file)
    model, other = ls.load_model(file), ls.load_model(folder)
    ids = torch.tensor([models.encode(other, TEXT)])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), other(ids), atol=1e-5, rtol=0)
    assert models.fingerprint(model).name == "tiny.gguf"
    assert models.fingerprint(model).weights == models.fingerprint(other).weights


# --- what it refuses -----------------------------------------------------------------------------


def bare(folder: Path, to: Path) -> Path:
    """A checkpoint without its tokenizer."""
    return shutil.copytree(folder, to, ignore=shutil.ignore_patterns("token*", "special*", "chat*"))


def without(folder: Path, to: Path, *names: str) -> Path:
    """A checkpoint without some of its tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    state = {k: v for k, v in load_file(to / "model.safetensors").items() if k not in names}
    save_file(state, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_missing_tensor_is_refused_by_name(name, tiny_checkpoint, tmp_path):
    with pytest.raises(ls.LensteerError, match=f"'.*holes' lacks 1 of the tensors.*{name}.*random"):
        ls.load_model(without(tiny_checkpoint("llama"), tmp_path / "holes", name))


def test_a_tensor_of_another_shape_is_refused(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(intermediate_size=48)))
    with pytest.raises(ls.LensteerError, match="wide"):
        ls.load_model(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao", "abacus"])
def test_a_quantizer_that_is_not_there_is_refused_by_name(method, tiny_checkpoint, tmp_path, no_process):
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    extra: dict[str, Any] = dict(bits=4) if method in ("gptq", "awq") else dict(quant_type="int8_weight_only")
    extra = dict(load_in_4bit=True) if method == "bitsandbytes" else extra if method != "compressed-tensors" else {}
    config["quantization_config"] = dict(quant_method=method, **extra)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ls.LensteerError, match=r"small'.*(not installed|does not read)"):
        ls.load_model(folder)


def test_a_quantizer_of_ones_own_that_is_not_installed(tiny_checkpoint):
    from transformers import BitsAndBytesConfig

    with pytest.raises(ls.LensteerError, match="not installed"):
        ls.load_model(tiny_checkpoint(), quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@pytest.mark.parametrize("device", ["cuda:77", "gpu", "meta", "cpu:banana"])
def test_a_device_that_is_not_there_is_refused_by_name(device, tiny_checkpoint):
    with pytest.raises(ls.LensteerError, match=f"no device '{device}' here: there is cpu"):
        ls.load_model(tiny_checkpoint(), device=device)


@pytest.mark.parametrize("dtype", ["int4", "float", "", torch.int8])
def test_an_unknown_dtype_is_refused_by_name(dtype, tiny_checkpoint):
    with pytest.raises(ls.LensteerError, match=f"no dtype {dtype!r}.*float32.*bfloat16"):
        ls.load_model(tiny_checkpoint(), dtype=dtype)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(device="cpu", device_map="auto"), "give one of them"),
        (dict(device_map="everywhere"), "device_map='everywhere': no device 'everywhere' here: there is cpu"),
        (dict(device_map={"": "cuda:9"}), "device_map=.*no device 'cuda:9' here"),
        (dict(device_map={"": 9}), "device_map=.*no device 'cuda:9' here"),
        (dict(device_map={"": "disk"}), "weights on disk are not supported"),
        (dict(device_map={"": 3.5}), "device_map"),
        (dict(tokenizer="words"), "tokenizer='words'"),
    ],
)
def test_options_that_cannot_be(options, said, tiny_checkpoint):
    with pytest.raises(ls.LensteerError, match=said):
        ls.load_model(tiny_checkpoint(), **options)


def test_too_little_memory_says_what_would_fit(tiny_checkpoint, monkeypatch):
    from transformers import AutoModelForCausalLM

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    folder = tiny_checkpoint()
    n = sum(p.numel() for p in hf_model(folder).parameters())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    sizes = rf"{n:,} parameters take {4 * n / 1e9:.2f} GB in float32 and {2 * n / 1e9:.2f} GB in bfloat16"
    with pytest.raises(ls.LensteerError, match=f"out of memory.*{sizes}.*free are"):
        ls.load_model(folder)


def test_a_missing_tokenizer_is_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(ls.LensteerError, match=r"bare' has no tokenizer.*tokenizer="):
        ls.load_model(bare(tiny_checkpoint(), tmp_path / "bare"))
    with pytest.raises(ls.LensteerError, match="without its tokenizer"):
        ls.load_model(hf_model(tiny_checkpoint()))


def test_what_is_no_checkpoint_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("words")
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    for given, said in [
        (tmp_path / "words.txt", "is not a GGUF file"),
        (tmp_path, "or the GGUF file itself.*some.gguf"),
        (tmp_path / "none.gguf", "there is no .*none.gguf"),
        (tmp_path / "nothing", "there is no .*nothing"),
        (tmp_path / "some.gguf", "cannot load model .*some.gguf"),  # cut off
    ]:
        with pytest.raises(ls.LensteerError, match=said):
            ls.load_model(given)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ls.LensteerError, match="extra gguf"):
        ls.load_model(tmp_path / "some.gguf")


def test_an_encoder_with_a_decoder_is_refused(tiny_checkpoint, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "t5", ignore=shutil.ignore_patterns("*.safetensors"))
    T5ForConditionalGeneration(T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1)).save_pretrained(
        folder
    )
    with pytest.raises(ls.LensteerError, match=r"t5' is a 't5'.*causal"):
        ls.load_model(folder)


def test_loaded_models_that_cannot_be_wrapped(tiny_checkpoint, tiny_model):
    from transformers import AutoModel, AutoModelForCausalLM

    folder = tiny_checkpoint()
    tokenizer = tokenizer_of(folder)
    config = hf_model(folder).config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (AutoModel.from_pretrained(folder), dict(tokenizer=tokenizer), "not a causal language model"),
        (torch.nn.Linear(2, 2), dict(tokenizer=tokenizer), "not a causal language model"),
        (hf_model(folder), dict(tokenizer=tokenizer, dtype="bf16"), "leave out dtype"),
        (empty, dict(tokenizer=tokenizer), "meta device"),
        (tiny_model().original_model, dict(tokenizer=tokenizer), "part of a bridge already"),
        (tiny_model(), dict(device="cpu", revision="main"), "leave out device, revision"),
    ]
    for given, options, said in cases:
        with pytest.raises(ls.LensteerError, match=said):
            ls.load_model(given, **options)


def test_a_bridge_in_training_mode_is_refused(tiny_checkpoint):
    model = ls.load_model(tiny_checkpoint())
    model.train()
    with pytest.raises(ls.LensteerError, match="training mode"):
        ls.load_model(model)


# --- a real file ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_gguf_file_gives_the_logits_of_its_folder(real_model):
    """LENSTEER_GGUF names the file that the folder "smollm2" was made from."""
    file = os.environ.get("LENSTEER_GGUF")
    if not file:
        pytest.skip("LENSTEER_GGUF is not set: it names the GGUF file that the folder smollm2 was made from")
    real_model("smollm2")
    folder = Path(os.environ["LENSTEER_REAL"]) / "smollm2"
    model, other = ls.load_model(file, dtype="bf16"), ls.load_model(folder, dtype="bf16")
    ids = models.encode(other, models.chat_text(other, TEXT))
    assert models.encode(model, models.chat_text(model, TEXT)) == ids
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([ids])), other(torch.tensor([ids])))
    assert models.fingerprint(model).differences(models.fingerprint(other).to_dict()) == []
