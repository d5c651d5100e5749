"""A plain Hugging Face model on a bridge's own parameters, for hot loops."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lensteer import models

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_Twin = tuple[tuple[int, ...], nn.Module | None]
_twins: weakref.WeakKeyDictionary[nn.Module, dict[int, _Twin]] = weakref.WeakKeyDictionary()
_resumes: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_building = threading.Lock()


def plain_twin(model: TransformerBridge) -> nn.Module | None:
    """A plain Hugging Face model on the same parameters, for hot loops: its attention is the fused kernel.

    None if no such model reproduces the bridge's logits to 1e-4 of their scale (checked once, on a few tokens), if its
    layers are not laid out as Llama's, or if TransformerLens has processed the weights. Each thread has its own twin,
    with its own hooks.
    """
    if getattr(model, "compatibility_mode", False):
        return None
    storages = _storages(model.original_model)
    with _building:
        own, thread = _twins.setdefault(model, {}), threading.get_ident()
        if thread not in own or own[thread][0] != storages:  # the model may have been moved, cast or given new weights
            own[thread] = (storages, _built(model))
        return own[thread][1]


def _storages(model: nn.Module) -> tuple[int, ...]:
    """Where the parameters lie: `parameters()` without names, which take most of its time."""
    found, seen, todo = [], {id(model)}, [model]
    while todo:
        module = todo.pop()
        found += [tensor.data_ptr() for tensor in module._parameters.values() if tensor is not None]
        for part in module._modules.values():
            if part is not None and id(part) not in seen:
                seen.add(id(part))
                todo.append(part)
    return tuple(found)


def twin_layer(twin: nn.Module, layer: int) -> nn.Module:
    """The module of a plain twin whose output is the residual stream at the output of a block."""
    return _blocks(twin)[layer]


def _blocks(twin: Any) -> nn.ModuleList:
    blocks: nn.ModuleList = twin.model.layers  # Hugging Face's layout
    return blocks


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Hugging Face's fused attention, but a single new token reads its shared keys and values without copying them.

    Query heads that share a key head are laid out as that head's queries: for a single position the result is the same.
    Repeating keys and values for every head, as the stock function does with a mask, took most of a decode step's time
    on a CPU.
    """
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, length, width = query.shape
    shared = key.shape[1]
    plain = not any(options.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    if length > 1 or heads == shared or not plain or (attention_mask is not None and attention_mask.shape[1] > 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.reshape(batch, shared, heads // shared, width)
    found = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=options.get("scaling"))
    return found.reshape(batch, heads, 1, width).transpose(1, 2).contiguous(), None


def _attention() -> str:
    """Register `grouped_attention` with Hugging Face; return its name there."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register("lensteer_sdpa", grouped_attention)
    AttentionMaskInterface.register("lensteer_sdpa", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return "lensteer_sdpa"


class _Stopped(Exception):
    """Carries what the last block to run has returned."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def run_until(twin: nn.Module, layer: int, **inputs: Any) -> Tensor:
    """The residual stream at the output of a block, with hooked edits; nothing after that block runs.

    Args:
        twin: a plain twin.
        layer: the last block to run.
        inputs: of the twin's forward.
    """

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        raise _Stopped(output)

    handle = twin_layer(twin, layer).register_forward_hook(stop)  # after all that are on it already
    try:
        twin(**inputs)
    except _Stopped as stopped:
        output = stopped.output
    finally:
        handle.remove()
    return torch.as_tensor(output[0] if isinstance(output, tuple) else output)


@contextmanager
def block_outputs(twin: nn.Module) -> Iterator[list[Any]]:
    """Collect what each block returns, in order; edits that are hooked already are included, later ones are not."""
    found: list[Any] = []
    handles = [
        block.register_forward_hook(lambda _module, _inputs, output: found.append(output)) for block in _blocks(twin)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resumed(twin: nn.Module, outputs: Sequence[Any], layer: int, columns: slice, rows: int) -> Iterator[None]:
    """Start at a block: those below do not run, and return what they returned before.

    Args:
        twin: a plain twin that `resumes`.
        outputs: from `block_outputs`, of a batch of one.
        layer: the first block that runs.
        columns: of the outputs, those that are run now.
        rows: in the batch.
    """

    def again(kept: Any) -> Callable[..., Any]:
        resid, *rest = kept if isinstance(kept, tuple) else (kept,)
        there = resid[:, columns].expand(rows, -1, -1)
        given = (there, *rest) if isinstance(kept, tuple) else there
        return lambda *_args, **_options: given

    with _replaced(twin, [again(kept) for kept in outputs[:layer]]):
        yield


@contextmanager
def _replaced(twin: nn.Module, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """The first blocks' forwards are others; hooks at their outputs fire."""
    blocks = list(_blocks(twin))[: len(forwards)]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)  # what remains is the class's own


def head(twin: Any, resid: Tensor) -> Tensor:
    """The logits for residual streams at the output of the last block, `[batch, pos, d_model]`: no block runs.

    Args:
        twin: a plain twin that `resumes`, with no edit hooked.
        resid: all columns' logits are computed.
    """
    ids = torch.zeros(resid.shape[:2], dtype=torch.long, device=resid.device)
    with _replaced(twin, [lambda *_args, **_options: resid] * len(_blocks(twin))):
        return torch.as_tensor(twin(input_ids=ids, use_cache=False).logits)


def resumes(twin: nn.Module, new_cache: Callable[[], Any]) -> bool:
    """Whether a twin that starts at a block continues the pass that it was started from: checked once, on few tokens.

    It does not if later blocks read more of earlier ones than the residual stream, such as their keys and values.

    Args:
        twin: the plain twin.
        new_cache: makes an empty cache.
    """
    if twin not in _resumes:
        _resumes[twin] = _continues(twin, new_cache)
    return _resumes[twin]


def _continues(twin: Any, new_cache: Callable[[], Any]) -> bool:
    n_layers = len(_blocks(twin))
    try:
        ids = torch.arange(min(8, twin.config.get_text_config().vocab_size), device=twin.device)[None]
        with torch.inference_mode():
            with block_outputs(twin) as outputs:
                whole = twin(input_ids=ids, past_key_values=new_cache(), use_cache=True).logits
            for layer in {1, n_layers - 1} - {0}:
                with resumed(twin, outputs, layer, slice(None), 1):
                    again = twin(input_ids=ids, past_key_values=new_cache(), use_cache=True).logits
                if not torch.equal(whole, again):
                    return False
            last = outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]
            if not torch.equal(whole, head(twin, last)):
                return False
    except Exception:  # it only makes things faster
        return False
    return len(outputs) == n_layers


@contextmanager
def unhooked(model: TransformerBridge) -> Iterator[None]:
    """Remove all hooks and pre-forward hooks for now: a plan may be on when a twin is first needed."""
    modules = [*model.hook_dict.values(), model.original_model]
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    saved = [(module, kind, dict(getattr(module, kind))) for module in modules for kind in kinds]
    try:
        for module, kind, _ in saved:
            getattr(module, kind).clear()
        yield
    finally:
        for module, kind, hooks in saved:
            getattr(module, kind).update(hooks)


def _built(model: TransformerBridge) -> nn.Module | None:
    """A twin, or None for whatever reason there can be none, such as attention without a fused kernel (Gemma 2)."""
    try:
        return _build_twin(model)
    except Exception:  # it only makes things faster
        return None


def _build_twin(model: TransformerBridge) -> nn.Module | None:
    original = model.original_model
    if not hasattr(getattr(original, "model", None), "rotary_emb"):
        return None
    state = {k.replace("._original_component", ""): v for k, v in original.state_dict().items()}
    config = original.config
    with torch.device("meta"):
        twin = type(original)._from_config(config, attn_implementation=_attention(), dtype=original.dtype)
    twin.load_state_dict({k: v for k, v in state.items() if k in twin.state_dict()}, strict=False, assign=True)
    twin.tie_weights()
    rotary = type(twin.model.rotary_emb)
    twin.model.rotary_emb = rotary(config=config).to(models.device(model))
    if any(p.is_meta for p in [*twin.parameters(), *twin.buffers()]):
        return None
    twin.eval()
    ids = torch.arange(min(8, int(model.cfg.d_vocab)), device=models.device(model))[None]
    with torch.inference_mode(), unhooked(model):
        theirs = twin(input_ids=ids).logits  # raises where the kernel does not fit
        if original.dtype != torch.float32:
            return twin
        ours = model(ids)
    scale = float(ours.abs().nan_to_num().max())
    return twin if torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * scale) else None
