"""Runs real llama.cpp, through llama-cpp-python, with and without a control vector. Needs the package llama_cpp."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

F32 = 0  # GGML_TYPE_F32, for the cache's keys and values


def control_vector_rows(path: Path) -> np.ndarray:
    """What llama.cpp's own loader makes of a file: row N - 1 is `direction.N`, rows without one are zero.

    The loader (`common_control_vector_load_one` in common/common.cpp) is not in the library that llama-cpp-python
    wraps, so its rules are repeated here: one width, F32, 1-D, N of at least 1, or the whole file is refused.
    """
    import gguf

    rows: dict[int, np.ndarray] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        word, _, number = tensor.name.partition(".")
        assert word == "direction", tensor.name
        assert int(number) > 0, "invalid (zero) direction tensor layer index"
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32, "invalid (non-F32) direction tensor type"
        assert len(tensor.shape) == 1, "invalid (non-1D) direction tensor shape"
        rows[int(number)] = np.array(tensor.data)
    (width,) = {len(row) for row in rows.values()}
    found = np.zeros((max(rows), width), np.float32)
    for layer, row in rows.items():
        found[layer - 1] = row
    return found


class Llama:
    """A GGUF model in llama.cpp on one thread, with its cache in float32."""

    def __init__(self, path: Path, n_ctx: int = 256) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._model = llama_cpp.Llama(
            str(path), n_ctx=n_ctx, n_batch=n_ctx, n_threads=1, n_threads_batch=1, logits_all=True, type_k=F32,
            type_v=F32, n_gpu_layers=0, verbose=False,
        )  # fmt: skip
        self.n_layers = llama_cpp.llama_model_n_layer(self._model._model.model)

    def steer(self, rows: np.ndarray | None) -> None:
        """Set the rows of a control vector, from block 1 on, or clear it; raises if llama.cpp refuses.

        llama.cpp keeps the rows of an earlier vector that a shorter one does not reach, so all rows are given.
        """
        set_vector = self._library.llama_set_adapter_cvec
        if rows is None:
            code = set_vector(self._model._ctx.ctx, None, 0, 0, 0, 0)
        else:
            data = np.zeros((self.n_layers - 1, rows.shape[1]), np.float32)
            data[: len(rows)] = rows[: len(data)]
            pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            code = set_vector(self._model._ctx.ctx, pointer, data.size, data.shape[1], 1, self.n_layers)
        if code:
            raise ValueError(f"llama_set_adapter_cvec: {code}")

    def logits(self, ids: list[int], rows: np.ndarray | None = None) -> np.ndarray:
        """Logits at every position, `[pos, d_vocab]`."""
        self.steer(rows)
        self._model.reset()
        self._model.eval(ids)
        return self._model.scores[: len(ids)].copy()

    def ids(self, text: str) -> list[int]:
        return self._model.tokenize(text.encode(), add_bos=False, special=True)

    def close(self) -> None:
        self._model.close()
