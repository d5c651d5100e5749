"""Attention caches of annotated chains: which earlier sentences a sentence attends to, per head, and head ablation.

Attention is read at TransformerLens' hook points and reduced to sentences layer by layer. It shows where a head
attends, not whether that matters; `ablated` and `knocked_out` test that.
"""

from lensteer.attention.behaviors import BehaviorAttention, behavior_attention
from lensteer.attention.heads import Head, ablated, knocked_out, mean_z
from lensteer.attention.receivers import ReceiverHeads, receiver_heads
from lensteer.attention.sentences import (
    ELSEWHERE,
    SentenceAttention,
    forward_padded,
    sentence_attention,
    stream_attention,
)

__all__ = [
    "ELSEWHERE",
    "BehaviorAttention",
    "Head",
    "ReceiverHeads",
    "SentenceAttention",
    "ablated",
    "behavior_attention",
    "forward_padded",
    "knocked_out",
    "mean_z",
    "receiver_heads",
    "sentence_attention",
    "stream_attention",
]
