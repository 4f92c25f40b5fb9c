"""`xceptile recipe`: prints a preset, to begin one's own with, or the file's schema."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import print_json


def recipe(
    name: Annotated[str, typer.Argument(help="A preset's name, or a recipe file, which is checked.")] = "default",
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipe files.")] = False,
) -> None:
    """Print a quantization recipe as JSON: what each layer's range is chosen by, and which stages run."""
    from ...calibration.recipe_schema import recipe_schema
    from .compile import recipe_named

    print_json(recipe_schema() if schema else recipe_named(name).to_json())
