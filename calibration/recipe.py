"""The intent: how each layer is to be quantized, as a list of rules in a file.

A rule names layers by a shell pattern on their module path (``blocks.*.depthwise``; ``*`` also matches dots and the
empty path) and sets some fields; a later rule overrides an earlier one, field by field. ::

    {"schema": 1, "name": "mine", "equalize": true,
     "rules": [{"pattern": "*", "observer": {"kind": "percentile", "percent": 99.99}},
               {"pattern": "conv1", "float": true}]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from .observers import Entropy, MeanSquaredError, MinMax, MovingAverage, Observer, Percentile

SCHEMA = 1

OBSERVERS: Mapping[str, type[Observer]] = {
    "min-max": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": MeanSquaredError,
}
SCHEMES = ("affine", "symmetric")


class RecipeError(ValueError):
    """A recipe that cannot be followed. ``rule`` is the offending rule's index, -1 for the recipe itself."""

    def __init__(self, message: str, rule: int = -1) -> None:
        super().__init__(message)
        self.rule = rule


_MIN_MAX = MinMax()


@dataclass(frozen=True)
class Setting:
    """What holds for one layer. ``scheme`` is that of its output: "affine" has a free zero point, "symmetric" has
    zero point 0. ``keep_float`` computes the layer in float32.
    """

    observer: Observer = _MIN_MAX
    scheme: str = "affine"
    keep_float: bool = False


@dataclass(frozen=True)
class Rule:
    """Sets the fields that are not None for every layer whose module path matches ``pattern``."""

    pattern: str
    observer: Observer | None = None
    scheme: str | None = None
    keep_float: bool | None = None


@dataclass(frozen=True)
class QuantRecipe:
    """Rules in order, and the optional stages before and after them, in the order of ``calibrate``.

    ``center`` shifts channels to the middle of a tensor's range where that can be; ``equalize`` takes
    depthwise-pointwise pairs, from the weights alone; ``equalize_groups`` takes everything that can be, residual
    streams included, from images; ``optimize_rounding`` and ``correct_bias`` adjust the int8 graph.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    center: bool = False
    equalize: bool = True
    equalize_groups: bool = False
    optimize_rounding: bool = False
    correct_bias: bool = False

    def setting(self, path: str) -> Setting:
        """What the rules say of a layer: the defaults of ``Setting``, then every matching rule in order."""
        values: dict[str, Any] = {}
        for rule in self.rules:
            if fnmatchcase(path, rule.pattern):
                values |= {f.name: getattr(rule, f.name) for f in fields(Setting) if getattr(rule, f.name) is not None}
        return Setting(**values)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of ``recipe_from_json``."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            **{stage: getattr(self, stage) for stage in STAGES},
            "rules": [_rule_to_json(rule) for rule in self.rules],
        }


_KINDS = {kind: name for name, kind in OBSERVERS.items()}


def _rule_to_json(rule: Rule) -> dict[str, Any]:
    values: dict[str, Any] = {"pattern": rule.pattern}
    if rule.observer is not None:
        values["observer"] = {"kind": _KINDS[type(rule.observer)], **asdict(rule.observer)}
    if rule.scheme is not None:
        values["scheme"] = rule.scheme
    if rule.keep_float is not None:
        values["float"] = rule.keep_float
    return values


def recipe_from_json(values: object) -> QuantRecipe:
    """A recipe from parsed JSON. Raises RecipeError that names the rule and the field."""
    if not isinstance(values, Mapping):
        raise RecipeError("a recipe is a JSON object")
    schema = values.get("schema")
    if schema != SCHEMA:
        raise RecipeError(f"recipe: this version reads schema {SCHEMA}, the file says {schema!r}")
    _refuse_unknown(values, {"schema", "name", "rules", *STAGES}, "recipe", -1)
    name, rules = values.get("name", "custom"), values.get("rules", [])
    if not isinstance(name, str) or not isinstance(rules, list):
        raise RecipeError("recipe: name is a string and rules is a list")
    stages = {stage: values[stage] for stage in STAGES if stage in values}
    for stage, value in stages.items():
        if not isinstance(value, bool):
            raise RecipeError(f"recipe: {stage} is true or false, got {value!r}")
    return QuantRecipe(name, tuple(_rule_from_json(rule, i) for i, rule in enumerate(rules)), **stages)


STAGES = tuple(f.name for f in fields(QuantRecipe) if f.type in (bool, "bool"))


def recipe_from_text(text: str) -> QuantRecipe:
    """A recipe from a JSON file's text. Raises RecipeError."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"recipe: not JSON, line {error.lineno} column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise RecipeError(f"recipe: not JSON that can be read: {error}") from error
    return recipe_from_json(values)


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str, rule: int) -> None:
    for key in values:
        if key not in known:
            raise RecipeError(f"{where}: no such field {key!r}; there are {', '.join(sorted(known))}", rule)


def _rule_from_json(values: object, index: int) -> Rule:
    where = f"recipe, rule {index}"
    if not isinstance(values, Mapping) or not isinstance(values.get("pattern"), str):
        raise RecipeError(f"{where}: a rule is an object with a pattern (a string)", index)
    where = f"{where} ({values['pattern']!r})"
    _refuse_unknown(values, {"pattern", "observer", "scheme", "float"}, where, index)
    scheme, keep_float = values.get("scheme"), values.get("float")
    if scheme is not None and scheme not in SCHEMES:
        raise RecipeError(f"{where}: scheme is one of {', '.join(SCHEMES)}, got {scheme!r}", index)
    if keep_float is not None and not isinstance(keep_float, bool):
        raise RecipeError(f"{where}: float is true or false, got {keep_float!r}", index)
    observer = None if values.get("observer") is None else _observer_from_json(values["observer"], where, index)
    return Rule(values["pattern"], observer, scheme, keep_float)


def _observer_from_json(values: object, where: str, index: int) -> Observer:
    if isinstance(values, str):
        values = {"kind": values}
    if not isinstance(values, Mapping) or values.get("kind") not in OBSERVERS:
        kind = values.get("kind") if isinstance(values, Mapping) else values
        raise RecipeError(f"{where}: observer is one of {', '.join(OBSERVERS)}, got {kind!r}", index)
    kind_type = OBSERVERS[values["kind"]]
    arguments = {key: value for key, value in values.items() if key != "kind"}
    _refuse_unknown(arguments, {f.name for f in fields(kind_type)}, f"{where}, observer {values['kind']}", index)
    for key, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"{where}, observer {values['kind']}: {key} is a number, got {value!r}", index)
    try:
        return kind_type(**arguments)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}", index) from error


def _preset(name: str, observer: Observer) -> QuantRecipe:
    return QuantRecipe(name, (Rule("*", observer),))


PRESETS: Mapping[str, QuantRecipe] = {
    # The least divergence from float in tests/benchmarks/ablation.py, and unharmed by channels of unequal size.
    "default": QuantRecipe(
        "default",
        (Rule("*", MeanSquaredError()),),
        center=True,
        equalize_groups=True,
        optimize_rounding=True,
        correct_bias=True,
    ),
    # The same without the walk over both networks that dominates its time.
    "fast": QuantRecipe("fast", (Rule("*", MeanSquaredError()),), center=True, equalize_groups=True),
    **{name: _preset(name, kind()) for name, kind in OBSERVERS.items()},
}
