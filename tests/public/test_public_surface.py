"""What scripts rely on: a change here is a change of the interface."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import typer

import nybble
from nybble.cli.app import app


def commands() -> dict[str, Any]:
    """By name; of typer's own copy of click, whose types are not public."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def options_of(command: Any) -> dict[str, list[str]]:
    return {parameter.name: sorted(parameter.opts) for parameter in command.params}


def test_the_commands() -> None:
    assert sorted(commands()) == [
        "accept",
        "check",
        "convert",
        "demo",
        "eval",
        "inspect",
        "kld",
        "log",
        "quantize",
        "recipes",
        "repair",
    ]


def test_the_options_of_quantize() -> None:
    assert options_of(commands()["quantize"]) == {
        "model": ["model"],
        "out": ["--out", "-o"],
        "recipe": ["--recipe", "-r"],
        "overrides": ["--set"],
        "device": ["--device"],
        "dry_run": ["--dry-run"],
    }


def test_the_options_of_inspect() -> None:
    assert options_of(commands()["inspect"]) == {
        "model": ["model"],
        "recipe": ["--recipe", "-r"],
        "overrides": ["--set"],
        "every_tensor": ["--tensors"],
    }


def test_the_options_of_check() -> None:
    assert options_of(commands()["check"]) == {
        "checkpoint": ["checkpoint"],
        "base": ["--base"],
        "engine": ["--engine"],
        "engine_version": ["--engine-version"],
        "tp": ["--tp"],
        "deep": ["--deep"],
        "json_file": ["--json"],
    }


def test_the_options_of_repair() -> None:
    assert options_of(commands()["repair"]) == {
        "checkpoint": ["checkpoint"],
        "base": ["--base"],
        "out": ["--out", "-o"],
        "in_place": ["--in-place"],
        "json_file": ["--json"],
    }


def test_the_options_of_kld() -> None:
    assert options_of(commands()["kld"]) == {
        "base": ["base"],
        "checkpoints": ["checkpoints"],
        "text": ["--text"],
        "windows": ["--windows"],
        "seqlen": ["--seqlen"],
        "device": ["--device"],
        "dtype": ["--dtype"],
        "top_k": ["--top-k"],
        "noise": ["--noise"],
        "allow_overlap": ["--allow-overlap"],
        "head": ["--head"],
        "save_reference": ["--save-reference"],
        "json_file": ["--json"],
        "plot": ["--plot"],
    }


def test_the_options_of_convert() -> None:
    assert options_of(commands()["convert"]) == {
        "checkpoint": ["checkpoint"],
        "out": ["--out", "-o"],
        "to": ["--format", "-f"],
    }


def test_the_options_of_log() -> None:
    assert options_of(commands()["log"]) == {"checkpoint": ["checkpoint"], "plot": ["--plot"]}


def test_the_options_of_demo_and_recipes() -> None:
    assert options_of(commands()["demo"]) == {"out": ["--out", "-o"]}
    assert options_of(commands()["recipes"]) == {}


def test_the_defaults() -> None:
    defaults = {p.name: p.default for p in commands()["quantize"].params if not p.required}
    assert defaults["recipe"] == "w4a16-autoround"
    assert defaults["device"] == "auto"
    assert defaults["dry_run"] is False


def test_the_version_is_the_installed_one() -> None:
    assert nybble.__version__ == importlib.metadata.version("nybble")


def test_the_program_is_called_nybble() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="nybble")
    assert [script.value for script in scripts] == ["nybble.cli.app:main"]
