"""TOML files and ``--set`` overrides -> a Recipe. All checking happens here, once."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nybble.core.errors import RecipeError
from nybble.recipe.schema import Recipe

DEFAULT_RECIPE = "w4a16-autoround"


def shipped_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with nybble, sorted."""
    folder = resources.files("nybble.recipe") / "presets"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def load_recipe(name_or_file: str = DEFAULT_RECIPE, overrides: Iterable[str] = ()) -> Recipe:
    """A shipped recipe by name, or a TOML file, with ``section.key=value`` overrides applied.

    Raises RecipeError for an unknown name, unreadable TOML, an unknown key or an unusable value.
    """
    if name_or_file in shipped_recipes():
        text = (resources.files("nybble.recipe") / "presets" / f"{name_or_file}.toml").read_text()
        return recipe_from_toml(text, f"recipe {name_or_file}", overrides)
    path = Path(name_or_file)
    if path.suffix != ".toml":
        known = ", ".join(shipped_recipes())
        raise RecipeError(f"no recipe {name_or_file!r}: give a .toml file or one of {known}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read recipe {path}: {error}") from error
    return recipe_from_toml(text, str(path), overrides)


def recipe_from_toml(text: str, where: str, overrides: Iterable[str] = ()) -> Recipe:
    """Parses and checks a recipe; ``where`` names it in errors."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where} is not TOML: {error}") from error
    for override in overrides:
        _apply(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_first_problem(error)}") from error


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r} is not of the form section.key=value")
    if key.strip() == "algorithm.name":
        values["algorithm"] = {}  # another algorithm has other settings
    rival = {"calibration.source": "mix", "calibration.mix": "source"}.get(key.strip())
    if rival and isinstance(values.get("calibration"), dict):
        values["calibration"].pop(rival, None)
    *path, last = key.strip().split(".")
    table = values
    for name in path:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise RecipeError(f"override {override!r}: {name} is a value, not a section")
    table[last] = _value(raw.strip())


def _value(raw: str) -> Any:
    """A TOML value; bare words are strings, so that names need no quotes on a command line."""
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        return raw
    return parsed["value"] if len(parsed) == 1 else raw


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    # The second part of an algorithm's location is its name, which nobody wrote there.
    parts = [
        part for i, part in enumerate(problem["loc"]) if (i, problem["loc"][0]) != (1, "algorithm")
    ]
    key = ".".join(str(part) for part in parts)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {problem['input']!r})" if key else message
