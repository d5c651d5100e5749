"""Do the notebooks run, and what do they show? Executes them in place and keeps their outputs, for display on GitHub.

Figures are kept as plotly's JSON and as a PNG (which needs kaleido and Chrome). A live widget is replaced by a picture:
the given one, or the one already in the notebook. Times and widget state are dropped, so that a run with the same
results leaves the file unchanged.

Example: python analyses/execute_notebooks.py notebooks/4_steering_positions.ipynb --widget explorer.png
"""

from __future__ import annotations

import argparse
import base64
import os
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from lensteer.files import write_atomically

WIDGET, PNG = "application/vnd.jupyter.widget-view+json", "image/png"


def execute(path: Path, picture: bytes | None = None) -> float:
    """Run a notebook and write the outputs to its file; returns the time in seconds."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    before = [_picture(cell) if picture is None else base64.b64encode(picture).decode() for cell in code]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}, record_timing=False)
        client.execute()
    seconds = time.perf_counter() - began
    for cell, shown in zip(code, before, strict=True):
        for output in cell.outputs:
            if WIDGET in output.get("data", {}):
                name = output.data["text/plain"].split("(")[0].split(" object at ")[0].strip("<>")
                output.data = {"text/plain": f"<{name}>", **({PNG: shown} if shown else {})}
    notebook.metadata.pop("widgets", None)
    write_atomically(path, nbformat.writes(notebook) + "\n")
    return seconds


def _picture(cell: nbformat.NotebookNode) -> str | None:
    return next((o.data[PNG] for o in cell.outputs if PNG in o.get("data", {})), None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all by default")
    parser.add_argument("--widget", type=Path, help="a picture that replaces live widgets")
    given = parser.parse_args()
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype+png"
    every = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
    for one in given.notebooks or every:
        print(f"{one.name}: {execute(one, given.widget and given.widget.read_bytes()):.0f} s", flush=True)
