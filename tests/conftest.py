from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before transformers is imported: its notices would end up between the lines of our own.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))  # for the modules in support/

import torch
from support.checkpoints import Tiny, random_text, write_json, write_tiny
from support.commands import Outcome

from nybble.cli.app import main
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import Calibration, Recipe, Rtn, SignRound

ROWS, SEQLEN = 8, 32


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests of real engines come first: several processes share out whole files, and
    those take longest."""
    engines = {item.path for item in items if item.get_closest_marker("engine")}
    items.sort(key=lambda item: item.path not in engines)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in the vision-language form; not to be changed."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def make_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Makes a tiny checkpoint of one's own: ``make_tiny("name", seed=3)``."""

    def make(name: str = "base", **values: object) -> Path:
        return write_tiny(tmp_path / name, Tiny(**values))

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text, about 6000 tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(random_text(2000, seed=1), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def jsonl_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of text as conversations and plain documents, one a line."""
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    lines = [f'{{"text": {_quoted(random_text(60, seed=n))}}}' for n in range(10)]
    lines += [
        f'{{"messages": [{{"role": "user", "content": {_quoted(random_text(40, seed=n))}}}]}}'
        for n in range(10, 20)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _quoted(text: str) -> str:
    return '"' + text.replace("\n", "\\n") + '"'


@pytest.fixture(scope="session")
def calibration(text_file: Path) -> Calibration:
    return Calibration(source=str(text_file), rows=ROWS, seqlen=SEQLEN, layout="pack")


@pytest.fixture(scope="session")
def signround_recipe(calibration: Calibration) -> Recipe:
    return Recipe(algorithm=SignRound(iters=12, batch_size=4), calibration=calibration)


@pytest.fixture(scope="session")
def rtn_recipe() -> Recipe:
    return Recipe(algorithm=Rtn())


@pytest.fixture(scope="session")
def importance_recipe(calibration: Calibration) -> Recipe:
    return Recipe(algorithm=Rtn(scale_init="importance"), calibration=calibration)


@pytest.fixture(scope="session")
def signround_result(
    tiny_base: Path, signround_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny checkpoint quantized by SignRound; not to be changed."""
    return quantize(tiny_base, tmp_path_factory.mktemp("out") / "r", signround_recipe, "cpu").out


@pytest.fixture(scope="session")
def rtn_result(
    tiny_base: Path, rtn_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny checkpoint rounded to nearest; not to be changed."""
    return quantize(tiny_base, tmp_path_factory.mktemp("out") / "r", rtn_recipe, "cpu").out


@pytest.fixture(scope="session")
def importance_result(
    tiny_base: Path, importance_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny checkpoint rounded on scales that were searched with text; not to be changed."""
    return quantize(tiny_base, tmp_path_factory.mktemp("out") / "r", importance_recipe, "cpu").out


@pytest.fixture
def nybble(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """The program's entry point in this process: quicker than a new interpreter for each case."""
    # The entry point sets these for the process, which here goes on.
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["nybble", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        assert isinstance(code, int)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Changes values of a folder's config.json; None takes a key away."""

    def edit(folder: Path, section: str | None = None, **values: object) -> None:
        from support.checkpoints import read_json

        config = read_json(folder / "config.json")
        where = config[section] if section else config
        for key, value in values.items():
            if value is None:
                del where[key]
            else:
                where[key] = value
        write_json(folder / "config.json", config)

    return edit


@pytest.fixture(autouse=True)
def keep_denormals() -> None:
    """Undoes nybble's own setting: it holds for the process, Python's floats included."""
    torch.set_flush_denormal(False)
