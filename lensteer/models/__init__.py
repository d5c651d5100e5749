"""The only interface to TransformerLens and Hugging Face: loading, hook names, dimensions, chat prompts, token ids.

Layer `l` is 0-based and means the residual stream at the output of block `l`.
"""

from lensteer.models.chat import (
    CLOSE_THINKING,
    OPEN_THINKING,
    chat_text,
    decode_offsets,
    encode,
    encode_raw,
    end_ids,
    token_table,
)
from lensteer.models.facts import (
    SITES,
    ModelId,
    check_layer,
    context_length,
    d_model,
    device,
    final_norm_gain,
    fingerprint,
    n_layers,
    resid_hook,
)
from lensteer.models.length import check_length, forget_frequencies, length_limits
from lensteer.models.loading import ORGANISM, load_model, out_of_memory

__all__ = [
    "CLOSE_THINKING",
    "OPEN_THINKING",
    "ORGANISM",
    "SITES",
    "ModelId",
    "chat_text",
    "check_layer",
    "check_length",
    "context_length",
    "d_model",
    "decode_offsets",
    "device",
    "encode",
    "encode_raw",
    "end_ids",
    "final_norm_gain",
    "fingerprint",
    "forget_frequencies",
    "length_limits",
    "load_model",
    "n_layers",
    "out_of_memory",
    "resid_hook",
    "token_table",
]
