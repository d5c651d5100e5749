"""The only interface to TransformerLens and Hugging Face: loading, hook names, dimensions, chat prompts, token ids.

Layer `l` is 0-based and means the residual stream at the output of block `l`.
"""

from lensteer.models.chat import (
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
from lensteer.models.length import check_ids, check_rows, forget_frequencies, length_limits
from lensteer.models.loading import DTYPES, ORGANISM, load_model, out_of_memory
from lensteer.models.thought import (
    CLOSE_THINKING,
    MARKS,
    OPEN_THINKING,
    UNMARKED,
    Marks,
    header,
    marks_in,
    marks_of,
    named_marks,
    opens_thought,
    set_thought_marks,
    thought_marks,
)

__all__ = [
    "CLOSE_THINKING",
    "DTYPES",
    "MARKS",
    "OPEN_THINKING",
    "ORGANISM",
    "SITES",
    "UNMARKED",
    "Marks",
    "ModelId",
    "chat_text",
    "check_ids",
    "check_layer",
    "check_rows",
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
    "header",
    "length_limits",
    "load_model",
    "marks_in",
    "marks_of",
    "n_layers",
    "named_marks",
    "opens_thought",
    "out_of_memory",
    "resid_hook",
    "set_thought_marks",
    "thought_marks",
    "token_table",
]
