from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from support.commands import Outcome, run_python
from typer.testing import CliRunner

from nybble.cli.app import app
from nybble.recipe.load import shipped_recipes

Nybble = Callable[..., Outcome]
COMMANDS = [
    "quantize",
    "inspect",
    "check",
    "repair",
    "kld",
    "accept",
    "eval",
    "convert",
    "log",
    "recipes",
    "demo",
]

HELP_OF_ALL = f"""
import sys
from nybble.cli.app import main
for command in ([], *([name] for name in {COMMANDS})):
    sys.argv = ["nybble", *command, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
for heavy in ("torch", "transformers", "numpy", "safetensors", "huggingface_hub"):
    assert heavy not in sys.modules, heavy
"""


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    began = time.monotonic()
    outcome = run_python(["-c", HELP_OF_ALL])
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert outcome.out.count("Usage: ") == 1 + len(COMMANDS)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert command in result.output
    listed = CliRunner().invoke(app, ["--help"])
    assert command in listed.output


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["quantize"], ["quantize", "m", "--nonsense"], ["inspect"]]
)
def test_a_wrong_call_points_to_the_help(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--help" in result.output


def test_recipes_are_listed_one_a_line(nybble: Nybble) -> None:
    outcome = nybble("recipes")
    lines = outcome.out.splitlines()
    assert (outcome.code, outcome.err) == (0, "")
    told = {line.split()[0]: line for line in lines}
    assert list(told) == list(shipped_recipes())
    assert "200 iterations" in told["w4a16-autoround"]
    assert "tokens" not in told["w4a16-rtn"]
    assert "compressed-tensors" in told["w4a16-gptq"]
