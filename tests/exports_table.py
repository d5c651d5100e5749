"""The table of exports: what was measured of each format, written by the tests that measure it.

Set LENSTEER_RECORD=1 to write it to `analyses/results/exports.json`; without it, the tests only check.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from filelock import FileLock

TABLE = Path(__file__).resolve().parent.parent / "analyses" / "results" / "exports.json"


def record(
    format: str, model: str, dtype: str, largest_difference: float, positions: str, cosine: float | None = None
) -> None:
    """Replace the row of a format, a model and a dtype of weights.

    Args:
        format: as in the docs.
        model: with its architecture.
        dtype: of the weights that were served.
        largest_difference: of logits, between the served and the hooked model.
        positions: that the format can express.
        cosine: of steered less unsteered logits, the least over texts and layers.
    """
    if not os.environ.get("LENSTEER_RECORD"):
        return
    from lensteer.files import write_atomically

    row = {
        "format": format,
        "model": model,
        "dtype": dtype,
        "largest_logit_difference": float(f"{largest_difference:.3g}"),
        "positions": positions,
        "least_cosine": None if cosine is None else round(cosine, 5),
    }
    key = ("format", "model", "dtype")
    with FileLock(TABLE.with_suffix(".lock")):
        rows = json.loads(TABLE.read_text()) if TABLE.exists() else []
        rows = [other for other in rows if any(other[name] != row[name] for name in key)] + [row]
        rows.sort(key=lambda other: [other[name] for name in key])
        write_atomically(TABLE, json.dumps(rows, indent=1) + "\n")
    TABLE.with_suffix(".lock").unlink(missing_ok=True)
