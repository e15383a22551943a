"""The doctor's rules for compressed-tensors, fp8 and ModelOpt against the real vLLM."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.ct_blocks import Block, built, modules
from support.ct_cases import ARGUMENTS, HOSTILE, OTHERS, RULES, SCHEMES

from nybble.doctor.resolve.built import DENSE, Built, NotAnalysed, Refusal, Scheme, Storage

ENGINE_PYTHON = Path(__file__).parents[2] / ".engine-venv" / "bin" / "python"


def described(ours: Built) -> Any:
    """Ours, in the runner's terms."""
    if isinstance(ours, Refusal):
        return "error" if ours.exception == "re.error" else ours.exception
    assert isinstance(ours, Scheme)
    if ours == DENSE:
        return "dense"
    if ours.storage is Storage.PACKED:
        return [ours.storage.value, ours.bits, ours.group_size, ours.symmetric]
    return [ours.storage.value]


def is_compared(declared: Block, name: str, ours: Built) -> bool:
    """All but what the model's class decides, before it asks the config."""
    is_fp4 = str(declared.get("quant_algo")).upper().endswith("FP4")
    return not isinstance(ours, NotAnalysed) and not (is_fp4 and name == "mtp fc")


@pytest.mark.engine
def test_vllm_builds_and_raises_what_is_predicted(tmp_path: Path) -> None:
    if not ENGINE_PYTHON.exists():
        pytest.skip("no vLLM environment: make engine-env builds it")
    cases = RULES | SCHEMES | ARGUMENTS | HOSTILE | OTHERS
    named = modules()
    jobs = [
        {"block": declared, "modules": [one.name for one in named.values()]}
        for declared in cases.values()
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    program = Path(__file__).with_name("resolver_runner_ct.py")
    done = subprocess.run(
        [str(ENGINE_PYTHON), str(program), "jobs.json", "answers.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads((tmp_path / "answers.json").read_text())
    compared = 0
    wrong = []
    for (case, declared), answer in zip(cases.items(), answers, strict=True):
        for name, ours in built(declared).items():
            if is_compared(declared, name, ours):
                theirs = answer if isinstance(answer, str) else answer[named[name].name]
                compared += 1
                if described(ours) != theirs:
                    wrong.append((case, name, described(ours), theirs))
    assert wrong == []
    assert compared > 1200
