"""The real vLLM builds from our blocks exactly what they were made from."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.packing.format import Declaration
from nybble.packing.formats import FORMATS
from nybble.quant.grid import IntGrid

Declare = Callable[..., Declaration]
GridOf = Callable[[int, str], IntGrid | None]

ENGINE_PYTHON = Path(__file__).parents[3] / ".engine-venv" / "bin" / "python"
W4, W8, W8_ROWS = IntGrid(4, 128, True), IntGrid(8, 128, True), IntGrid(8, -1, True)

CASES: dict[str, dict[str, Any]] = {
    "all alike": {},
    "rows of 8 bits": {"grid_of": lambda *_: W8_ROWS},
    "attention dense": {"grid_of": lambda _, m: None if "self_attn" in m else W4},
    "recurrence dense": {"grid_of": lambda _, m: None if "linear_attn" in m else W4},
    "8 bits by kind": {"grid_of": lambda _, m: W4 if "mlp" in m else W8},
    "8 bits by number": {"grid_of": lambda b, _: W8 if b in (0, 11) else W4},
    "blocks dense": {"grid_of": lambda b, _: None if b in (0, 10, 11) else W4},
    "three kinds": {
        "grid_of": lambda b, m: None if b == 2 and "in_proj" in m else W8 if "down" in m else W4
    },
    "MTP layer": {"mtp": W4},
    "MTP layer at 8 bits": {"mtp": W8},
    "MTP layer with more than the trunk": {
        "grid_of": lambda _, m: None if "self_attn" in m else W4,
        "mtp": W4,
    },
    "MTP layer, blocks dense": {"grid_of": lambda b, _: None if b == 0 else W4, "mtp": W8},
    "head": {"lm_head": W8},
    "head and MTP layer": {"lm_head": W4, "mtp": W8},
}
TRUNKS = {"model.language_model.layers": "language_model.model.layers", "model.layers": ""}


def engine_name(name: str, declaration: Declaration, trunk: str) -> str:
    """A Linear's module in vLLM: fused, and renamed in the vision-language class."""
    for fused, members in declaration.fused.items():
        for member in members:
            if name.endswith(f".{member}"):
                name = name.removesuffix(member) + fused
    if TRUNKS[trunk]:
        name = name.replace(trunk, TRUNKS[trunk])
        name = "language_model.lm_head" if name == "lm_head" else name
    return name


def jobs_of(declare: Declare, name: str, trunk: str) -> list[dict[str, Any]]:
    """What to ask the resolver, with ``grids``: what it should answer for each module."""
    jobs = []
    for case, arguments in CASES.items():
        declaration = declare(trunk=trunk, **arguments)
        grids = {
            engine_name(linear, declaration, trunk): declaration.grids.get(linear)
            for linear in (*declaration.grids, *declaration.dense)
        }
        grids |= {"visual.blocks.0.attn.qkv": None, "visual.merger.linear_fc1": None}
        jobs.append(
            {
                "case": f"{case}, {name}, {trunk}",
                "format": name,
                "wrapper": bool(TRUNKS[trunk]),
                "block": FORMATS[name].quantization_config(declaration),
                "modules": list(grids),
                "grids": {m: [g.bits, g.group_size] if g else None for m, g in grids.items()},
            }
        )
    return jobs


@pytest.mark.engine
def test_vllm_builds_what_was_declared(declare: Declare, tmp_path: Path) -> None:
    if not ENGINE_PYTHON.exists():
        pytest.skip("no vLLM environment: make engine-env builds it")
    jobs = [job for name in FORMATS for trunk in TRUNKS for job in jobs_of(declare, name, trunk)]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    program = Path(__file__).with_name("vllm_resolver.py")
    command = [str(ENGINE_PYTHON), str(program), "jobs.json", "answers.json"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(answers) == len(CASES) * len(FORMATS) * len(TRUNKS)
    for job, answer in zip(jobs, answers, strict=True):
        assert len(answer) == 57 + 4 + 2 + 2  # trunk, MTP layer, its fusion and the head, tower
        assert answer == job["grids"], job["case"]
