"""llama-cpp-python's OpenAI-compatible server with a control vector: `python llama_server.py MODEL PORT [VECTOR.gguf]`.

llama.cpp's own server takes `--control-vector FILE`; this one has no such option, so the vector is set on the context
of each model that it loads, as `common_init_from_params` does.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np


def main(model: str, port: int, vector: str | None) -> None:
    import llama_cpp
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    patched: Any = nullcontext()
    if vector is not None:
        from llama_runs import control_vector_rows

        given = control_vector_rows(Path(vector))

        class Steered(llama_cpp.Llama):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                rows = np.zeros((llama_cpp.llama_model_n_layer(self._model.model) - 1, given.shape[1]), np.float32)
                rows[: len(given)] = given
                pointer = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
                code = llama_cpp.llama_set_adapter_cvec(
                    self._ctx.ctx, pointer, rows.size, rows.shape[1], 1, len(rows) + 1
                )
                assert code == 0, code

        patched = mock.patch.object(llama_cpp, "Llama", Steered)
    settings = ModelSettings(
        model=model, model_alias=Path(model).stem, n_ctx=1024, n_threads=1, n_threads_batch=1, n_gpu_layers=0,
        verbose=False,
    )  # fmt: skip
    with patched:
        app = create_app(server_settings=ServerSettings(port=port), model_settings=[settings])
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
