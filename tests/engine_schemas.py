"""JSON schemas of the files of serving engines, written from their documentation (versions in `export/engines.py`)."""

from __future__ import annotations

from typing import Any

NUMBERS = {"type": "array", "items": {"type": "number"}, "minItems": 1}
LAYERS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
WINDOW = {"type": "array", "prefixItems": [{"type": "integer", "minimum": 0}, {"type": "integer"}], "minItems": 1}
BASE64 = {"type": "string", "pattern": "^[A-Za-z0-9+/]+=*$"}
SHAPE = {"type": "array", "items": {"type": "integer", "minimum": 1}}


def closed(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


EASYSTEER = closed(
    {
        "vectors": {
            "type": "array",
            "minItems": 1,
            "items": closed(
                {
                    "data": closed(
                        {
                            "version": {"const": 1},
                            "kind": {"const": "direction"},
                            "tensors": {
                                "type": "object",
                                "minProperties": 1,
                                "patternProperties": {r"^layer\.\d+$": closed({"shape": SHAPE, "data": BASE64})},
                                "additionalProperties": False,
                            },
                            "extra": {"type": "object"},
                            "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
                        }
                    ),
                    "algorithm": {"enum": ["direct", "erase"]},
                    "apply": {
                        **closed(
                            {},
                            {
                                "prompt": {"const": "all"},
                                "generation": {"const": "all"},
                                "prompt_positions": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                                "exclude_prompt_positions": {"type": "array", "items": {"type": "integer"}},
                                "generation_window": WINDOW,
                            },
                        ),
                        "minProperties": 1,
                    },
                },
                {
                    "scale": {"type": "number"},
                    "layers": LAYERS,
                    "normalize": {"type": "boolean"},
                    "name": {"type": "string"},
                },
            ),
        }
    },
    {"conflict": {"enum": ["priority", "sequential", "error"]}},
)

VLLM_LENS = closed(
    {
        "apply_steering_vectors": {
            "type": "array",
            "items": closed(
                {
                    "activations": closed(
                        {
                            "data": BASE64,
                            "dtype": {"const": "float32"},
                            "original_dtype": {"const": "torch.float32"},
                            "shape": {**SHAPE, "minItems": 2, "maxItems": 3},
                        }
                    ),
                    "layer_indices": LAYERS,
                },
                {
                    "scale": {"type": "number"},
                    "norm_match": {"type": "boolean"},
                    "position_indices": {"anyOf": [{"type": "null"}, LAYERS]},
                },
            ),
        }
    }
)

_BY_LAYER = {"type": "object", "minProperties": 1, "additionalProperties": False}
_VECTORS = closed({"post_block": {**_BY_LAYER, "patternProperties": {r"^\d+$": NUMBERS}}})
_CLAMP = closed(
    {"vector": NUMBERS, "value": {"type": "number"}}, {"strength": {"type": "number", "minimum": 0, "maximum": 1}}
)
_CLAMPS = closed(
    {"post_block": {**_BY_LAYER, "patternProperties": {r"^\d+$": {"type": "array", "items": _CLAMP, "maxItems": 4}}}}
)
RHIZONYMPH = {
    **closed(
        {},
        {
            "vectors": _VECTORS,
            "prefill_vectors": _VECTORS,
            "decode_vectors": _VECTORS,
            "clamps": _CLAMPS,
            "prefill_clamps": _CLAMPS,
            "decode_clamps": _CLAMPS,
        },
    ),
    "minProperties": 1,
}

SVEC = {
    "type": "object",
    "required": ["model_type", "directions"],
    "properties": {
        "model_type": {"type": "string", "minLength": 1},
        "directions": {
            **_BY_LAYER,
            "patternProperties": {r"^\d+$": {"type": "array", "items": NUMBERS, "minItems": 1}},
        },
    },
}
