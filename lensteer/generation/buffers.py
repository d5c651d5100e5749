"""A cache layer for decoding."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class Buffered(DynamicLayer):
    """A cache layer that writes into spare room, where the stock one copies all it has for every new token."""

    keys: Tensor
    values: Tensor
    room: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all of them."""
        old = self.keys.shape[-2] if self.is_initialized else 0
        new = old + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = self._allocate(key_states, new + 64), self._allocate(value_states, new + 64)
        elif new > self.room[0].shape[-2]:
            length = new + new // 2
            bigger = self._allocate(key_states, length), self._allocate(value_states, length)
            for target, source in zip(bigger, (self.keys, self.values), strict=True):
                target[..., :old, :] = source
            self.room = bigger
        for buffer, states in zip(self.room, (key_states, value_states), strict=True):
            buffer[..., old:new, :] = states
        self.keys, self.values = (buffer[..., :new, :] for buffer in self.room)
        return self.keys, self.values

    @staticmethod
    def _allocate(like: Tensor, length: int) -> Tensor:
        return like.new_empty((*like.shape[:-2], length, like.shape[-1]))

    def keep(self, rows: Tensor) -> None:
        """Keep some of the batch's rows."""
        length = self.keys.shape[-2]
        self.room = self.room[0][rows], self.room[1][rows]
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.room)
