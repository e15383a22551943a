"""The real vLLM serves the INT4 checkpoint, and its MTP head is alive."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.arch.plan import plan_tensors
from nybble.arch.registry import architecture_of
from nybble.checkpoint.reader import CheckpointReader
from nybble.core.errors import CheckpointError, PlanError
from nybble.engine.load import load_model
from nybble.eval.acceptance import measure_acceptance
from nybble.packing.formats import FORMATS
from nybble.recipe.schema import Scheme

RunVllm = Callable[[Path, int], dict[str, Any]]
InFormat = Callable[[Path, str], Path]

pytestmark = pytest.mark.engine

FUSED = re.compile(
    r".*(self_attn\.(qkv_proj|o_proj)|linear_attn\.(in_proj_qkvz|out_proj)"
    r"|mlp\.(gate_up_proj|down_proj))$"
)


def acceptance(result: dict[str, Any], position: int = 0) -> float:
    rate = result["accepted_per_pos"][position] / result["drafts"]
    assert isinstance(rate, float)
    return rate


def equal_rows(one: dict[str, Any], other: dict[str, Any]) -> int:
    pairs = zip(one["outputs"], other["outputs"], strict=True)
    return sum(mine == theirs for mine, theirs in pairs)


@pytest.mark.parametrize("format_name", list(FORMATS))
def test_trunk_runs_on_an_int4_kernel_and_the_head_is_dense(
    tiny_int4: Path, in_format: InFormat, run_vllm: RunVllm, format_name: str
) -> None:
    modules = run_vllm(in_format(tiny_int4, format_name), 1)["modules"]
    trunk = {n: m for n, m in modules.items() if FUSED.match(n) and not n.startswith("draft:")}
    assert len(trunk) == 16  # 4 in each of the 4 blocks
    assert all(module["kernel"] for module in trunk.values()), trunk
    dense = [n for n in modules if "in_proj_ba" in n or "lm_head" in n]
    dense += [n for n in modules if n.startswith("draft:") and FUSED.match(n)]
    dense.append("draft:model.fc")
    assert len(dense) >= 3 + 4 + 1
    assert all(modules[name]["kernel"] is None for name in dense)


def test_acceptance_is_that_of_the_base(tiny: Path, tiny_int4: Path, run_vllm: RunVllm) -> None:
    base, int4 = run_vllm(tiny, 1), run_vllm(tiny_int4, 1)
    assert base["drafts"] > 500
    assert acceptance(int4) > 0.4
    assert abs(acceptance(int4) - acceptance(base)) < 0.03


@pytest.mark.parametrize("format_name", ["gptq", "compressed-tensors"])
def test_every_format_is_the_same_model(
    tiny_int4: Path, in_format: InFormat, run_vllm: RunVllm, format_name: str
) -> None:
    one, other = run_vllm(tiny_int4, 1), run_vllm(in_format(tiny_int4, format_name), 1)
    assert one["outputs"] == other["outputs"]
    assert one["accepted_per_pos"] == other["accepted_per_pos"]


@pytest.mark.parametrize("format_name", list(FORMATS))
def test_a_quantized_mtp_layer_is_built_so_and_drafts_as_well(
    tiny: Path, tiny_gptq_mtp4: Path, in_format: InFormat, run_vllm: RunVllm, format_name: str
) -> None:
    result = run_vllm(in_format(tiny_gptq_mtp4, format_name), 1)
    layer = {n: m for n, m in result["modules"].items() if n.startswith("draft:model.layers.0.")}
    fused = [module for name, module in layer.items() if FUSED.match(name)]
    assert len(fused) == 4
    assert all(module["kernel"] for module in fused)
    assert result["modules"]["draft:model.fc"]["kernel"] is None
    assert abs(acceptance(result) - acceptance(run_vllm(tiny, 1))) < 0.03


def test_our_acceptance_is_vllms(
    tiny_int4: Path, heldout_prompts: torch.Tensor, run_vllm: RunVllm
) -> None:
    theirs = run_vllm(tiny_int4, 1)
    num_new = len(theirs["outputs"][0])
    ours = measure_acceptance(load_model(tiny_int4), heldout_prompts, num_new)
    assert abs(ours.rates[0] - acceptance(theirs)) < 0.03
    assert abs(ours.steps - theirs["drafts"]) < 0.05 * theirs["drafts"]


def test_the_number_of_drafts_does_not_change_the_text(tiny_int4: Path, run_vllm: RunVllm) -> None:
    one, two = run_vllm(tiny_int4, 1), run_vllm(tiny_int4, 2)
    assert equal_rows(one, two) >= 0.95 * len(one["outputs"])


def test_text_without_mtp_parts_only_at_near_ties(
    tiny_int4: Path, heldout_prompts: torch.Tensor, run_vllm: RunVllm
) -> None:
    # vLLM runs Gated DeltaNet by other CPU kernels once speculation is on (the convolution is
    # rounded to bfloat16 elsewhere), with any checkpoint: the BF16 base parts as well. Where two
    # tokens are almost equally likely the other one may win, and the texts part for good; so
    # every parting must be at such a place.
    plain, drafted = run_vllm(tiny_int4, 0), run_vllm(tiny_int4, 1)
    model = load_model(tiny_int4)
    for row, prompt in enumerate(heldout_prompts.tolist()):
        one, other = plain["outputs"][row], drafted["outputs"][row]
        if one == other:
            continue
        parting = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        logits = model.logits(model.hidden(torch.tensor([prompt + one[:parting]])))[0, -1]
        assert abs(logits[one[parting]] - logits[other[parting]]) < 0.25
    assert equal_rows(plain, drafted) >= 0.8 * len(plain["outputs"])


def test_second_draft_token_is_accepted_too(tiny_int4: Path, run_vllm: RunVllm) -> None:
    result = run_vllm(tiny_int4, 2)
    assert len(result["accepted_per_pos"]) == 2
    assert acceptance(result, 0) > 0.4
    assert 0.1 < acceptance(result, 1) < acceptance(result, 0)


def without_tensor(checkpoint: Path, name: str, target: Path) -> Path:
    """A copy of a single-file checkpoint that lacks one tensor."""
    shutil.copytree(checkpoint, target)
    tensors = load_file(target / "model.safetensors")
    del tensors[name]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_lost_mtp_tensor_is_silent_in_vllm_and_an_error_here(
    tiny: Path, tiny_int4: Path, tmp_path: Path, run_vllm: RunVllm
) -> None:
    broken = without_tensor(tiny_int4, "mtp.fc.weight", tmp_path / "int4")
    assert acceptance(run_vllm(broken, 1)) < 0.05  # vLLM says nothing and drafts noise
    with pytest.raises(CheckpointError, match=r"lacks mtp\.fc\.weight"):
        load_model(broken)
    base = without_tensor(tiny, "mtp.fc.weight", tmp_path / "base")
    with CheckpointReader(base) as reader, pytest.raises(PlanError, match=r"lacks mtp\.fc\.weight"):
        plan_tensors(architecture_of(reader.config), reader.index, Scheme())


def test_a_head_declared_quantized_is_an_error_here(tiny_int4: Path, tmp_path: Path) -> None:
    broken = tmp_path / "declared"
    shutil.copytree(tiny_int4, broken)
    config = json.loads((broken / "config.json").read_text())
    del config["quantization_config"]["block_name_to_quantize"]
    del config["quantization_config"]["extra_config"][".*mtp.*"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mtp\..* is stored dense but .* declares it 4-bit"):
        load_model(broken)
