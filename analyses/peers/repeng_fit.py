"""repeng's own vectors and chains, by its own code: run in an environment with requirements-repeng.txt.

    PEER-ENVIRONMENT/bin/python analyses/peers/repeng_fit.py FOLDER/request.json

Writes FOLDER/repeng.safetensors and FOLDER/repeng.jsonl. Vectors: `ControlVector.train` with its default (`pca_diff`)
and with `pca_center`. Chains: its own operator, as in its README: the default vector at all layers from -5 to -17, at
every position; coefficient 1 is `set_control`'s default, 2.2 the README's, the others make a curve.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repeng import ControlModel, ControlVector, DatasetEntry
from shared import load, write_chains, write_vectors

COEFFICIENTS = (0.0, 1.0, 2.2, 4.0, 6.0)

if __name__ == "__main__":
    file = Path(sys.argv[1])
    request = json.loads(file.read_text())
    plain, tokenizer = load(request)
    pairs = [DatasetEntry(positive, negative) for positive, negative in request["pairs"]]
    made = {name: ControlVector.train(plain, tokenizer, pairs, method=name) for name in ("pca_diff", "pca_center")}
    vectors = {name: vector.directions for name, vector in made.items()}
    write_vectors(file.with_name("repeng.safetensors"), "repeng", vectors, plain, request)
    n_layers = plain.config.num_hidden_layers
    layers = [layer for layer in range(-5, -18, -1) if -layer < n_layers]
    model = ControlModel(plain, layers)

    @contextmanager
    def control(coefficient: float) -> Iterator[None]:
        """Steering on, as `set_control` does it."""
        model.set_control(made["pca_diff"], coefficient)
        yield
        model.reset()

    conditions = [(f"repeng/{c:g}", c, lambda c=c: control(c)) for c in request.get("repeng", COEFFICIENTS)]
    write_chains(file.with_name("repeng.jsonl"), request, model, conditions, tokenizer.pad_token_id)
