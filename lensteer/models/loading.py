"""Loads models as TransformerLens' own bridge, with raw Hugging Face weights; refuses what would be loaded wrong.

A checkpoint is read by transformers, wrapped by TransformerLens. Of a multimodal one only the text tower is read, where
transformers has it as a model of its own. Nothing here installs anything or starts a process.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lensteer.errors import LensteerError
from lensteer.files import read_text
from lensteer.models.thought import Marks, named_marks, set_thought_marks
from lensteer.progress import no_loading_bar, redraws

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ORGANISM = Path(__file__).parents[1] / "organism" / "weights"

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}
"""What a dtype may be called."""

#: Where a multimodal checkpoint keeps its text tower, and where the tower by itself has the same tensors.
TOWER = {r"^language_model\.": "", r"^model\.language_model\.": "model."}


def load_model(
    source: str | Path | PreTrainedModel | TransformerBridge | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    quantization_config: Any = None,
    thought: str | Marks = "auto",
    template: str | Path | None = None,
) -> TransformerBridge:
    """Load a causal language model as TransformerLens' own bridge, with raw Hugging Face weights.

    Args:
        source: A folder with a Hugging Face checkpoint, a name on the hub, or a GGUF file (extra `gguf`); a Hugging
            Face model that is loaded already, whose modules the bridge takes over; or a bridge, which is checked and
            returned as it is. None loads the embedded organism, through the same code.
        tokenizer: Instead of the checkpoint's own; needed with a loaded model.
        dtype: Of the weights and activations, as "bfloat16", "bf16" or `torch.bfloat16`; None is float32.
        device: Such as "cpu" or "cuda"; None lets TransformerLens choose.
        device_map: Of Hugging Face, such as "auto", to spread a model over devices; instead of `device`.
        revision: Of the checkpoint on the hub.
        quantization_config: Of Hugging Face, to quantize while loading; a checkpoint that is quantized needs none.
        thought: How it marks its thought: "auto" reads that from its chat template, "none" says that its whole response
            is the chain; or what opens a thought in a published model, such as "[THINK]", or both marks with a blank
            between them. See `set_thought_marks`.
        template: A file with a chat template (Jinja), instead of the tokenizer's own; a base model has none.

    Raises:
        LensteerError: No such model, or not a checkpoint; tensors that it lacks; an architecture that TransformerLens
            cannot wrap; no tokenizer; a library that the checkpoint needs and that is not installed; an unknown dtype;
            a device that is not there; too little memory; options that a loaded model cannot take; unknown marks; no
            template.
    """
    from transformer_lens.model_bridge import TransformerBridge

    marks = named_marks(thought) if isinstance(thought, str) else thought
    chat = None if template is None else _read_template(Path(template))

    def marked(bridge: TransformerBridge) -> TransformerBridge:
        if chat is not None:
            bridge.tokenizer.chat_template = chat
        if marks is not None:
            set_thought_marks(bridge, marks)
        return bridge

    given = dict(
        dtype=dtype, device=device, device_map=device_map, revision=revision, quantization_config=quantization_config
    )
    if isinstance(source, TransformerBridge):
        return marked(_checked_bridge(source, given | dict(tokenizer=tokenizer)))
    if isinstance(source, nn.Module):
        loaded = _check_loaded(source, tokenizer, given)
        return marked(_wrapped(loaded, str(loaded.config._name_or_path), tokenizer, None))
    name = str(ORGANISM if source is None else source)
    kind, where = _check_dtype(dtype), _check_device(device, device_map)
    _check_file(name)
    options: dict[str, Any] = {} if quantization_config is None else dict(quantization_config=quantization_config)
    if device_map is not None or quantization_config is not None:
        options["device_map"] = {"": where} if device_map is None else device_map
    with nullcontext() if source is not None and redraws() else no_loading_bar():  # the organism is there at once
        try:
            if Path(name).is_file():
                model, tokenizer = _read_gguf(Path(name), tokenizer, dict(dtype=kind, **options))
            else:
                model = _read(name, revision, dict(dtype=kind, **options))
            if not options and getattr(model, "hf_quantizer", None) is None:
                model.to(where)
        except Exception as error:  # whatever transformers and its quantizers raise is about this checkpoint
            raise _refusal(error, name, kind, where, revision) from error
    return marked(_wrapped(model, name, tokenizer, revision))


def _read_template(path: Path) -> str:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        text = read_text(path)
        environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        environment.parse(re.sub(r"\{%-? *(end)?generation *-?%\}", "", text))  # transformers' own tag
    except (OSError, LensteerError, TemplateSyntaxError) as error:
        raise LensteerError(f"chat template {str(path)!r}: give a file with one in Jinja ({error})") from error
    if "messages" not in text:
        raise LensteerError(f"chat template {str(path)!r} does not use 'messages': give one in Jinja, not a prompt")
    return text


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or device memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    return any(word in str(error).lower() for word in words)


def _check_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise LensteerError(f"no dtype {dtype!r} for weights and activations: choose one of {', '.join(DTYPES)}")
    return found


def _check_device(device: str | torch.device | None, device_map: Any) -> torch.device:
    """The device, or where a checkpoint goes first if a map says the rest."""
    from transformer_lens.utilities import get_device

    if device is not None and device_map is not None:
        raise LensteerError(f"device={str(device)!r} and device_map={device_map!r}: give one of them")
    if device_map is not None:
        return _check_map(device_map)
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    try:
        found = torch.device(get_device() if device is None else device)
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if out_of_memory(error):
            raise LensteerError(f"device {str(device)!r} has no memory left: free some, or take another") from error
        reason = str(error).splitlines()[0]
        raise LensteerError(f"no device {str(device)!r} here: there is {', '.join(there)} ({reason})") from error
    return found


#: Names that Hugging Face resolves by itself.
_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def _check_map(device_map: Any) -> torch.device:
    """Where a checkpoint goes first if a map says the rest; each device of the map has to be there."""
    named = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for where in named:
        if where in _MAPS and not isinstance(device_map, Mapping):
            continue
        if where == "disk":
            raise LensteerError(f"device_map={device_map!r}: weights on disk are not supported; give GPUs, or the CPU")
        try:
            _check_device(f"cuda:{where}" if isinstance(where, int) else where, None)
        except (LensteerError, TypeError) as error:
            raise LensteerError(
                f"device_map={device_map!r}: {error}; or give one of {', '.join(map(repr, _MAPS))}"
            ) from error
    return _check_device(None, None)


def _check_file(name: str) -> None:
    """Refuse what is neither a checkpoint's folder, nor a GGUF file, nor a name."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        held = sorted(file.name for file in path.glob("*.gguf"))
        raise LensteerError(
            f"{name!r} is a folder without config.json: give the folder of a Hugging Face checkpoint"
            + (f", or the GGUF file itself, such as {str(path / held[0])!r}" if held else "")
        )
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise LensteerError(
                    f"{name!r} is not a GGUF file: give a GGUF file or the folder of a Hugging Face checkpoint"
                )
        if importlib.util.find_spec("gguf") is None:
            raise LensteerError(f"{name!r} is a GGUF file, and the package gguf is not installed: it is the extra gguf")
    elif not path.exists() and (path.suffix == ".gguf" or path.is_absolute() or not name):
        raise LensteerError(f"there is no {name!r}: give a GGUF file, the folder of a checkpoint or a name on the hub")


def _read(name: str, revision: str | None, options: dict[str, Any]) -> PreTrainedModel:
    """A checkpoint in Hugging Face's format, of a folder or of the hub; of a multimodal one the text tower."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(name, revision=revision)
    text, auto = config.get_text_config(decoder=True), AutoModelForCausalLM
    if getattr(config, "is_encoder_decoder", False):
        raise LensteerError(
            f"{name!r} is a {config.model_type!r}, an encoder with a decoder: give a causal language model"
        )
    if text is not config and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        for key in ("quantization_config", "tie_word_embeddings"):  # what the whole says of them holds for its part
            if getattr(config, key, None) is not None:
                setattr(text, key, getattr(config, key))
        config, options = text, options | dict(key_mapping=TOWER)
    elif text is not config:
        auto = AutoModelForImageTextToText
    _check_quantizer(name, config)
    options |= dict(config=config, revision=revision, attn_implementation="eager", output_loading_info=True)
    model, said = auto.from_pretrained(name, **options)
    _check_complete(name, said)
    model.config.architectures = [type(model).__name__]
    return model


def _check_quantizer(name: str, config: Any) -> None:
    """Refuse a quantization that transformers does not know: it would be skipped with a warning."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    found = getattr(config, "quantization_config", None)
    if not isinstance(found, dict) or found.get("load_in_8bit") or found.get("load_in_4bit"):  # bitsandbytes
        return
    method = found.get("quant_method")
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise LensteerError(
            f"{name!r} is quantized by {method!r}, which transformers does not read: choose a checkpoint of one of "
            f"{', '.join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))}, or one that is not quantized"
        )


def _read_gguf(
    path: Path, tokenizer: PreTrainedTokenizerBase | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GGUF file, dequantized, with the tokenizer that it holds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if tokenizer.bos_token is not None and hasattr(tokenizer, "add_bos_token"):
            tokenizer.add_bos_token = True  # as TransformerLens has those of folders, whatever the file says
    options |= dict(gguf_file=path.name, attn_implementation="eager", output_loading_info=True)
    model, said = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    _check_complete(str(path), said)
    if hasattr(model.config, "quantization_config"):  # the weights are plain numbers now
        del model.config.quantization_config
    model.config.architectures, model.config._name_or_path = [type(model).__name__], str(path)
    return model, tokenizer


def _check_complete(name: str, said: Mapping[str, Any]) -> None:
    """Refuse a checkpoint without all of the model's tensors: transformers draws the others at random."""
    missing = sorted([*said.get("missing_keys", ()), *(str(key[0]) for key in said.get("mismatched_keys", ()))])
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise LensteerError(
            f"{name!r} lacks {len(missing)} of the tensors that its config.json asks for ({shown}): they would be "
            "random; give a complete checkpoint"
        )


def _check_loaded(model: nn.Module, tokenizer: object, given: Mapping[str, Any]) -> PreTrainedModel:
    """The loaded model itself, if it can be wrapped as it is."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    from transformers import PreTrainedModel

    name = type(model).__name__
    options = [key for key, value in given.items() if value is not None]
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise LensteerError(
            f"{name!r} is not a causal language model of transformers: load it by AutoModelForCausalLM, or give its "
            "folder or name"
        )
    if options:
        raise LensteerError(f"{name!r} is loaded already: leave out {', '.join(options)}, or give its folder or name")
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise LensteerError(f"this {name!r} is part of a bridge already: give that bridge, or load the model again")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise LensteerError(f"{name!r} has parameters on the meta device, without numbers: load its weights")
    if tokenizer is None:
        raise LensteerError(f"{name!r} comes without its tokenizer: load_model(model, tokenizer=...)")
    return model


def _checked_bridge(model: TransformerBridge, given: Mapping[str, Any]) -> TransformerBridge:
    options = [key for key, value in given.items() if value is not None]
    if options:
        raise LensteerError(f"a bridge is returned as it is: leave out {', '.join(options)}")
    if model.tokenizer is None:
        raise LensteerError("this bridge has no tokenizer: set model.tokenizer")
    if model.original_model.training:
        raise LensteerError("this bridge is in training mode, where dropout is on: call model.eval()")
    return model


def _wrapped(
    model: PreTrainedModel, name: str, tokenizer: PreTrainedTokenizerBase | None, revision: str | None
) -> TransformerBridge:
    """The bridge around a model, frozen."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise LensteerError(f"tokenizer={tokenizer!r} is none: give AutoTokenizer.from_pretrained(...)")
    if tokenizer is None:
        tokenizer = _read_tokenizer(name, revision)
    dtype = next(model.parameters()).dtype
    try:
        with _no_installs(), _kept(tokenizer):
            bridge = TransformerBridge.boot_transformers(name, dtype=dtype, hf_model=model, tokenizer=tokenizer)
    except Exception as error:  # whatever else TransformerLens raises is about this architecture
        if "device_map" in str(error):
            raise LensteerError(
                f"the device map of {name!r} mixes a GPU with the CPU or the disk, which TransformerLens does not run: "
                "give one of GPUs alone, load it in bfloat16 or quantized, or take the CPU "
                f"({type(error).__name__}: {str(error)[:300]})"
            ) from error
        raise LensteerError(
            f"TransformerLens cannot wrap {name!r}, a {type(model).__name__}: take a model of an architecture that it "
            f"has ({type(error).__name__}: {str(error)[:300]})"
        ) from error
    bridge.eval()
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    return bridge


def _read_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, which puts its BOS in front where it can, as TransformerLens has it."""
    from transformer_lens.utilities.hf_utils import autotokenizer_with_special_token_compat
    from transformers import AutoTokenizer

    try:
        try:
            found = autotokenizer_with_special_token_compat(
                name, auto_tokenizer=AutoTokenizer, add_bos_token=True, revision=revision
            )
        except ValueError:  # some have no such option
            found = AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # whatever transformers raises is about this tokenizer
        raise LensteerError(
            f"{name!r} has no tokenizer that transformers can read: put its files there, or pass tokenizer=... "
            f"({type(error).__name__}: {str(error)[:300]})"
        ) from error
    if len(found) < 2 or not found("a", add_special_tokens=False).input_ids:
        raise LensteerError(f"{name!r} has no tokenizer: put its files there, or pass tokenizer=...")
    return found


def _refusal(
    error: Exception, name: str, dtype: torch.dtype, device: torch.device, revision: str | None
) -> LensteerError:
    """What to tell the user about an error of a loader."""
    if isinstance(error, LensteerError):
        return error
    said = f"({type(error).__name__}: {str(error)[:500]})"
    if out_of_memory(error):
        return LensteerError(
            f"out of memory while loading model {name!r} in {str(dtype)[6:]} on {device}: {_memory(name, revision)}; "
            f"load it in bfloat16 (2 bytes a parameter), on another device, or take a smaller model {said}"
        )
    if isinstance(error, ImportError):
        return LensteerError(f"model {name!r} needs a library that is not installed: install it yourself {said}")
    if "conversion of the weights" in str(error):  # experts that are stored one by one do not come together
        return LensteerError(
            f"{name!r} lacks some of the tensors that its config.json asks for, or they do not fit together: give a "
            f"complete checkpoint {said}"
        )
    return LensteerError(
        f"cannot load model {name!r}: give a folder with a Hugging Face checkpoint, a GGUF file, a name on the hub, or "
        f"nothing for the embedded organism {said}"
    )


def _memory(name: str, revision: str | None) -> str:
    """How much memory a model's weights need, and how much there is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            gguf = dict(gguf_file=Path(name).name) if Path(name).is_file() else {}
            source = str(Path(name).parent) if gguf else name
            config = AutoConfig.from_pretrained(source, revision=revision, **gguf)
            n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception:  # it is only for a better message
        return "its weights do not fit"
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    free += [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    there = ", ".join(f"{size / 1e9:.2f} GB" for size in free)
    return (
        f"its {n:,} parameters take {4 * n / 1e9:.2f} GB in float32 and {2 * n / 1e9:.2f} GB in bfloat16 or float16; "
        f"free are {there} (machine, then each GPU)"
    )


@contextmanager
def _no_installs() -> Iterator[None]:
    """TransformerLens installs torchvision by itself where a multimodal model's processor asks for it: not here."""
    from transformer_lens.model_bridge.sources.transformers import helpers

    install = helpers._ensure_torchvision
    helpers._ensure_torchvision = lambda: False
    try:
        yield
    finally:
        helpers._ensure_torchvision = install


@contextmanager
def _kept(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Without `add_bos_token` TransformerLens reads a tokenizer anew from where it came: not one that was given."""
    before = dict(tokenizer.init_kwargs)
    tokenizer.init_kwargs |= dict(add_bos_token=True, name_or_path=before.get("name_or_path", ""))
    try:
        yield
    finally:
        tokenizer.init_kwargs = before
