"""The modules that the doctor expects of vLLM are those that the real one builds, name by name."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import Tiny, read_json, write_json, write_tiny
from support.moe_checkpoints import Moe, write_moe

from nybble.doctor.engines import chosen_engines
from nybble.doctor.layout.modules import modules
from nybble.doctor.layout.registry import layout_of
from nybble.doctor.layout.spec import Kind

pytestmark = pytest.mark.engine

ENGINE_PYTHON = Path(__file__).parents[2] / ".engine-venv" / "bin" / "python"
[VLLM] = chosen_engines("vllm", "0.32")
CLASSES = {
    Kind.LINEAR: "LinearBase",
    Kind.HEAD: "ParallelLMHead",
    Kind.EXPERTS: "RoutedExperts",
}
ALL_DENSE: dict[str, Any] = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "extra_config": {".*": {"bits": 16, "data_type": "fp"}},
}


def write_checkpoint(name: str, folder: Path) -> Path:
    if name == "Qwen3_5ForConditionalGeneration":
        return write_tiny(folder, Tiny())
    return write_moe(folder, Moe(name, form="one by one"))


@pytest.mark.parametrize(
    "name",
    ["Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForCausalLM", "Qwen3NextForCausalLM"],
)
def test_vllm_builds_these_modules_in_this_order(tmp_path: Path, name: str) -> None:
    if not ENGINE_PYTHON.exists():
        pytest.skip("no vLLM environment: make engine-env builds it")
    folder = write_checkpoint(name, tmp_path / "model")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "quantization_config": ALL_DENSE})
    result = tmp_path / "result.json"
    program = Path(__file__).with_name("vllm_modules_runner.py")
    command = [str(ENGINE_PYTHON), str(program), str(folder), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    layout = layout_of(config)
    assert layout is not None
    expected = [m for m in modules(layout, VLLM) if m.kind is not Kind.PLAIN]
    assert json.loads(result.read_text()) == [[CLASSES[m.kind], m.name] for m in expected]
