"""Batched, KV-cached generation with edits of residuals and cache slots, and teacher forcing under the same edits."""

from lensteer.forward import forced_logits
from lensteer.generation.decoding import Generated, Step, decode, generate
from lensteer.generation.parallel import run_batches

__all__ = ["Generated", "Step", "decode", "forced_logits", "generate", "run_batches"]
