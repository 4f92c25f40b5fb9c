"""The recipe file's JSON Schema (draft 2020-12), for editors and other programs.

Made from what ``recipe`` itself goes by, so the two cannot part. ``recipe_from_json`` does not need it: its errors name
the rule. `xceptile recipe --schema` prints it.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .observers import MovingAverage, Percentile
from .recipe import OBSERVERS, SCHEMA, SCHEMES, STAGES

_LIMITS: dict[tuple[type, str], dict[str, Any]] = {
    (Percentile, "percent"): {"exclusiveMinimum": 50, "maximum": 100},
    (MovingAverage, "weight"): {"exclusiveMinimum": 0, "maximum": 1},
}


def _observer(name: str, kind: type) -> dict[str, Any]:
    numbers = {f.name: {"type": "number", **_LIMITS.get((kind, f.name), {})} for f in fields(kind)}
    return {
        "type": "object",
        "properties": {"kind": {"const": name}, **numbers},
        "required": ["kind"],
        "additionalProperties": False,
    }


def recipe_schema() -> dict[str, Any]:
    """The schema as plain JSON values."""
    observer = {
        "description": "How a range is chosen from the values seen: a name alone, or with its parameters.",
        "oneOf": [{"enum": list(OBSERVERS)}, *(_observer(name, kind) for name, kind in OBSERVERS.items())],
    }
    rule = {
        "type": "object",
        "description": "Sets fields for the layers whose module path matches; a later rule wins, field by field.",
        "properties": {
            "pattern": {"type": "string", "description": "A shell pattern; * also matches dots and the empty path."},
            "observer": {"anyOf": [observer, {"type": "null"}]},
            "scheme": {"enum": [*SCHEMES, None]},
            "float": {"type": ["boolean", "null"], "description": "Compute the layer in float32."},
        },
        "required": ["pattern"],
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Xceptile's quantization recipe",
        "type": "object",
        "properties": {
            "schema": {"const": SCHEMA},
            "name": {"type": "string"},
            **{stage: {"type": "boolean"} for stage in STAGES},
            "rules": {"type": "array", "items": rule},
        },
        "required": ["schema"],
        "additionalProperties": False,
    }
