"""steering-vectors' own vectors and chains, by its own code: in an environment with requirements-steering-vectors.txt.

    PEER-ENVIRONMENT/bin/python analyses/peers/steering_vectors_fit.py FOLDER/request.json

Writes FOLDER/steering-vectors.safetensors and FOLDER/steering-vectors.jsonl. Vectors: `train_steering_vector` with its
default aggregator (mean) and the two others. Chains: its own operator with its defaults: the mean vector at all layers
at once, at every position; multiplier 1 is `apply`'s default, the others make a curve.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import steering_vectors as sv
from shared import load, write_chains, write_vectors

MULTIPLIERS = (0.0, 0.05, 0.075, 0.1, 1.0)

if __name__ == "__main__":
    file = Path(sys.argv[1])
    request = json.loads(file.read_text())
    model, tokenizer = load(request)
    pairs = [(positive, negative) for positive, negative in request["pairs"]]
    ways = {"mean": sv.mean_aggregator, "pca": sv.pca_aggregator, "logistic": sv.logistic_aggregator}
    # The two halves of `train_steering_vector`, so that the texts are run once.
    activations = sv.extract_activations(model, tokenizer, pairs)
    vectors = {name: sv.aggregate_activations(*activations, aggregator=way()) for name, way in ways.items()}
    write_vectors(file.with_name("steering-vectors.safetensors"), "steering-vectors", vectors, model, request)
    default = sv.SteeringVector(vectors["mean"])
    multipliers = request.get("steering-vectors", MULTIPLIERS)
    conditions = [(f"steering-vectors/{c:g}", c, lambda c=c: default.apply(model, multiplier=c)) for c in multipliers]
    write_chains(file.with_name("steering-vectors.jsonl"), request, model, conditions, tokenizer.pad_token_id)
