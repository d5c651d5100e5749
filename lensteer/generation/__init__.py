"""Batched, KV-cached generation with edits of residuals and cache slots, and teacher forcing under the same edits."""

from lensteer.endpoints import Endpoint
from lensteer.forward import forced_logits
from lensteer.generation.decoding import Generated, Step, decode, generate
from lensteer.generation.engines import Engine, Offline, Served
from lensteer.generation.parallel import run_batches

__all__ = [
    "Endpoint",
    "Engine",
    "Generated",
    "Offline",
    "Served",
    "Step",
    "decode",
    "forced_logits",
    "generate",
    "run_batches",
]
