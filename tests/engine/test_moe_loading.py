"""Other people's loaders read quantized mixtures of experts as we mean them.

vLLM has no kernel for quantized experts on the CPU, so there its own rules and loaders are put to
the test with a stand-in for the kernel (vllm_moe_runner.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import VOCAB
from support.moe_checkpoints import EXPERTS, Moe, write_moe

from nybble.engine.load import LoadedModel, load_model
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import Override, Recipe, Rtn, Scheme

Made = Callable[[str, str, str], Path]

ENGINE_PYTHON = Path(__file__).parents[2] / ".engine-venv" / "bin" / "python"
BASES = {
    "qwen3_5_moe": Moe("Qwen3_5MoeForConditionalGeneration"),
    "qwen3_next": Moe("Qwen3NextForCausalLM", form="one by one"),
}
"""As they are published: stacks in the one, experts one by one in the other."""
KEPT = {"": (), "some": (r"layers\.[02]\.mlp\.experts",), "all": (r"mlp\.experts",)}
"""Which experts a recipe keeps."""
BF16 = torch.bfloat16
each_family = pytest.mark.parametrize("family", BASES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(family, format, which experts are kept) -> a result; each is made once."""
    folder = tmp_path_factory.mktemp("moe")
    bases = {name: write_moe(folder / name, moe) for name, moe in BASES.items()}

    def make(family: str, file_format: str, kept: str = "") -> Path:
        out = folder / f"{family} {file_format} {kept}"
        if not out.exists():
            overrides = tuple(Override(match=match, keep=True) for match in KEPT[kept])
            scheme = Scheme(group_size=32, overrides=overrides)
            recipe = Recipe(algorithm=Rtn(), scheme=scheme, format=file_format)
            quantize(bases[family], out, recipe, "cpu")
        return out

    return make


def ids() -> torch.Tensor:
    return torch.randint(7, VOCAB, (4, 24), generator=torch.Generator().manual_seed(0))


def logprobs(model: LoadedModel) -> torch.Tensor:
    return model.logits(model.hidden(ids())).log_softmax(dim=-1)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root of the mean squared difference."""
    return float((one - other).square().mean().sqrt())


def run(python: Path | str, program: str, *arguments: object) -> str:
    """Standard output of a program in this folder."""
    file = Path(__file__).with_name(program)
    command = [str(python), str(file), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


# --- Transformers ---------------------------------------------------------------------------------


def check_transformers(checkpoint: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Keys match and logits are as near to exact ones as ours; returns the Linears found."""
    (folder / "ids.json").write_text(json.dumps(ids().tolist()))
    files = (folder / "ids.json", folder / "logits.safetensors")
    arguments = (checkpoint, "AutoModelForCausalLM", *files, *options)
    out = run(sys.executable, "transformers_loader.py", *arguments)
    found = json.loads(out.splitlines()[-1])
    assert found["missing_keys"] == []
    # AutoRound has no use for the indices of groups that gptq checkpoints carry for others.
    assert [name for name in found["unexpected_keys"] if not name.endswith(".g_idx")] == []
    theirs = load_file(files[1])["logits"].log_softmax(dim=-1)
    exact, ours = logprobs(load_model(checkpoint)), logprobs(load_model(checkpoint, "cpu", BF16))
    assert distance(theirs, exact) < 1.25 * distance(ours, exact)
    assert isinstance(found["linears"], dict)
    return found["linears"]


@each_family
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("file_format", ["auto_round", "gptq"])
def test_auto_round_reads_the_experts_one_by_one(
    made: Made, tmp_path: Path, family: str, file_format: str, kept: str
) -> None:
    options = ["--through", "auto-round"] if file_format == "gptq" else []
    linears = check_transformers(made(family, file_format, kept), tmp_path, *options)
    dense_blocks = {"": (), "some": (0, 2), "all": (0, 1, 2, 3)}[kept]
    for block in BASES[family].moe_blocks:
        for expert in range(EXPERTS):
            for part in ("gate", "up", "down"):
                name = f"model.layers.{block}.mlp.experts.{expert}.{part}_proj"
                assert linears[name]["packed"] == (block not in dense_blocks)


@each_family
def test_transformers_itself_reads_compressed_tensors(
    made: Made, tmp_path: Path, family: str
) -> None:
    linears = check_transformers(made(family, "compressed-tensors", ""), tmp_path)
    assert linears["model.layers.0.mlp.shared_expert.up_proj"]["packed"]


def test_transformers_reads_compressed_tensors_with_kept_stacks(made: Made, tmp_path: Path) -> None:
    check_transformers(made("qwen3_5_moe", "compressed-tensors", "some"), tmp_path)


# --- vLLM -----------------------------------------------------------------------------------------


def run_vllm(checkpoint: Path, folder: Path, runner: str) -> dict[str, Any]:
    if not ENGINE_PYTHON.exists():
        pytest.skip("no vLLM environment: make engine-env builds it")
    job = {
        "model": str(checkpoint),
        "prompts_token_ids": ids().tolist(),
        "max_tokens": 8,
        "mtp": 1,
        "max_model_len": 128,
        "ignore_eos": True,
        "logprobs": -1,
    }
    (folder / "job.json").write_text(json.dumps(job))
    run(ENGINE_PYTHON, runner, folder / "job.json", folder / "result.json")
    result = json.loads((folder / "result.json").read_text())
    assert isinstance(result, dict)
    return result


def check_vllm(checkpoint: Path, result: dict[str, Any], experts: dict[int, str]) -> None:
    """``experts``: by block, vLLM's method for its experts."""
    modules = result["modules"]
    for block, method in experts.items():
        [found] = [n for n in modules if f".layers.{block}.mlp.experts" in n and "draft" not in n]
        assert modules[found]["quant_method"] == method
        for gate in ("mlp.gate", "mlp.shared_expert_gate"):
            [name] = [n for n in modules if n.endswith(f"{block}.{gate}") and "draft" not in n]
            assert modules[name]["kernel"] is None
        fused = f".{block}.mlp.shared_expert.gate_up_proj"
        [shared] = [n for n in modules if n.endswith(fused) and "draft" not in n]
        assert modules[shared]["kernel"] is not None
    drafts = [module for name, module in modules.items() if name.startswith("draft:")]
    assert all(module["kernel"] is None for module in drafts)
    assert any(module["quant_method"] == "UnquantizedFusedMoEMethod" for module in drafts)
    assert result["drafts"] > 0
    exact, ours = logprobs(load_model(checkpoint)), logprobs(load_model(checkpoint, "cpu", BF16))
    theirs = torch.tensor(
        [
            [[at[str(token)] for token in range(VOCAB)] for at in row[1:]]
            for row in result["prompt_logprobs"]
        ]
    )
    # Other kernels round otherwise, and where two experts are nearly equal the other may win.
    assert distance(theirs, exact[:, :-1]) < 2 * distance(ours[:, :-1], exact[:, :-1])


METHODS = {
    "auto_round": "AutoGPTQMoEMethod",
    "gptq": "AutoGPTQMoEMethod",
    "compressed-tensors": "CompressedTensorsWNA16MoEMethod",
}
DENSE = "UnquantizedFusedMoEMethod"


@pytest.mark.engine
@each_family
@pytest.mark.parametrize("file_format", METHODS)
def test_vllm_loads_quantized_experts(
    made: Made, tmp_path: Path, family: str, file_format: str
) -> None:
    checkpoint = made(family, file_format, "")
    result = run_vllm(checkpoint, tmp_path, "vllm_moe_runner.py")
    expected = dict.fromkeys(BASES[family].moe_blocks, METHODS[file_format])
    check_vllm(checkpoint, result, expected)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("family", "file_format"),
    [("qwen3_5_moe", "auto_round"), ("qwen3_5_moe", "compressed-tensors"), ("qwen3_next", "gptq")],
)
def test_vllm_loads_experts_of_which_some_are_kept(
    made: Made, tmp_path: Path, family: str, file_format: str
) -> None:
    checkpoint = made(family, file_format, "some")
    result = run_vllm(checkpoint, tmp_path, "vllm_moe_runner.py")
    blocks = BASES[family].moe_blocks
    expected = {b: DENSE if b in (0, 2) else METHODS[file_format] for b in blocks}
    check_vllm(checkpoint, result, expected)


@pytest.mark.engine
@each_family
def test_vllm_as_it_is_runs_a_mixture_whose_experts_are_kept(
    made: Made, tmp_path: Path, family: str
) -> None:
    checkpoint = made(family, "auto_round", "all")
    result = run_vllm(checkpoint, tmp_path, "vllm_runner.py")
    check_vllm(checkpoint, result, dict.fromkeys(BASES[family].moe_blocks, DENSE))
