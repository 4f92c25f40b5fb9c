"""Recipes: rules in order, JSON there and back, and errors that name the rule."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from xceptile.calibration.observers import Entropy, MeanSquaredError, MinMax, MovingAverage, Percentile
from xceptile.calibration.recipe import (
    PRESETS,
    QuantRecipe,
    RecipeError,
    Rule,
    Setting,
    recipe_from_json,
    recipe_from_text,
)
from xceptile.calibration.recipe_schema import recipe_schema


def test_a_later_rule_wins_field_by_field():
    recipe = QuantRecipe(
        "mine",
        (
            Rule("*", observer=Percentile(99.9), scheme="symmetric"),
            Rule("blocks.*", observer=Entropy()),
            Rule("blocks.3.*", keep_float=True),
            Rule("blocks.3.sepconvs.1.*", keep_float=False, scheme="affine"),
        ),
    )
    assert recipe.setting("conv1") == Setting(Percentile(99.9), "symmetric", False)
    assert recipe.setting("blocks.0.sepconvs.0.depthwise") == Setting(Entropy(), "symmetric", False)
    assert recipe.setting("blocks.3.sepconvs.0.depthwise") == Setting(Entropy(), "symmetric", True)
    assert recipe.setting("blocks.3.sepconvs.1.depthwise") == Setting(Entropy(), "affine", False)


def test_defaults_hold_where_no_rule_matches_and_a_star_matches_the_empty_path():
    assert QuantRecipe("none").setting("anything") == Setting()
    assert QuantRecipe("all", (Rule("*", keep_float=True),)).setting("") == Setting(keep_float=True)


@pytest.mark.parametrize(
    "recipe",
    [
        *PRESETS.values(),
        QuantRecipe(
            "all kinds",
            (
                Rule("a", MinMax(), "affine", False),
                Rule("b", MovingAverage(0.25)),
                Rule("c", Percentile(99.5), "symmetric"),
                Rule("d", Entropy(), None, True),
                Rule("e", MeanSquaredError()),
                Rule("f"),
            ),
            equalize=False,
        ),
    ],
    ids=lambda recipe: recipe.name,
)
def test_json_there_and_back(recipe):
    assert recipe_from_text(json.dumps(recipe.to_json())) == recipe


def test_presets_bear_their_names():
    assert all(name == recipe.name for name, recipe in PRESETS.items())
    assert "default" in PRESETS


def test_an_observer_may_be_given_by_its_name_alone():
    recipe = recipe_from_json({"schema": 1, "rules": [{"pattern": "*", "observer": "percentile"}]})
    assert recipe.setting("x").observer == Percentile()


RULE_ERRORS = [
    ({"observer": "mse"}, "rule 1: a rule is an object with a pattern"),
    ("conv1", "rule 1: a rule is an object with a pattern"),
    ({"pattern": "a", "observer": "average"}, r"rule 1 \('a'\): observer is one of min-max, .*, got 'average'"),
    ({"pattern": "a", "observer": {"kind": "mse", "percent": 9}}, "rule 1 .*observer mse: no such field 'percent'"),
    ({"pattern": "a", "observer": {"kind": "percentile", "percent": "9"}}, "rule 1 .*percent is a number, got '9'"),
    ({"pattern": "a", "observer": {"kind": "percentile", "percent": 5}}, r"rule 1 .*must be in \(50, 100\], got 5"),
    ({"pattern": "a", "scheme": "log"}, "rule 1 .*scheme is one of affine, symmetric, got 'log'"),
    ({"pattern": "a", "float": "yes"}, "rule 1 .*float is true or false, got 'yes'"),
    ({"pattern": "a", "bits": 4}, "rule 1 .*no such field 'bits'; there are float, observer, pattern, scheme"),
]


@pytest.mark.parametrize(("rule", "message"), RULE_ERRORS)
def test_an_error_names_the_rule(rule, message):
    with pytest.raises(RecipeError, match=message) as error:
        recipe_from_json({"schema": 1, "rules": [{"pattern": "*"}, rule]})
    assert error.value.rule == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a recipe is a JSON object"),
        ("{", "not JSON, line 1"),
        ("{}", "reads schema 1, the file says None"),
        ('{"schema": 2}', "reads schema 1, the file says 2"),
        ('{"schema": 1, "rulez": []}', "no such field 'rulez'"),
        ('{"schema": 1, "rules": {}}', "rules is a list"),
        ('{"schema": 1, "equalize": 1}', "equalize is true or false"),
    ],
)
def test_an_error_of_the_recipe_itself(text, message):
    with pytest.raises(RecipeError, match=message) as error:
        recipe_from_text(text)
    assert error.value.rule == -1


def valid(values: object) -> bool:
    return Draft202012Validator(recipe_schema()).is_valid(values)


def test_the_schema_is_one_and_takes_what_is_taken():
    Draft202012Validator.check_schema(recipe_schema())
    assert all(valid(recipe.to_json()) for recipe in PRESETS.values())
    assert valid({"schema": 1, "rules": [{"pattern": "*", "observer": "mse", "scheme": None, "float": True}]})


@pytest.mark.parametrize("rule", [rule for rule, _ in RULE_ERRORS])
def test_the_schema_refuses_what_is_refused(rule):
    assert not valid({"schema": 1, "rules": [{"pattern": "*"}, rule]})


@pytest.mark.parametrize("values", [[], {}, {"schema": 2}, {"schema": 1, "rulez": []}, {"schema": 1, "center": 1}])
def test_the_schema_refuses_what_is_refused_of_the_whole(values):
    assert not valid(values)
    with pytest.raises(RecipeError):
        recipe_from_json(values)
