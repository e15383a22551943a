"""Our tensors are, bit for bit, those of the packers that other projects ship."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.packing import compressed_tensors, gptq_tensors
from nybble.quant.grid import IntGrid, QuantizedWeight

OUTS, INS, GROUP_SIZE = 64, 160, 32
WIDTHS = (2, 3, 4, 8)

# In a process of its own: importing auto_round changes transformers for the whole process.
AUTO_ROUND = """
import sys
import torch
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from safetensors.torch import load_file, save_file

given, packed = load_file(sys.argv[1]), {}
for bits in (2, 3, 4, 8):
    codes, scales = given[f"{bits}.codes"], given[f"{bits}.scales"]
    outs, ins = codes.shape
    group_size = ins // scales.shape[1]
    linear = torch.nn.Linear(ins, outs, bias=False)
    linear.weight.data = codes.float() * scales.repeat_interleave(group_size, dim=1)
    layer = QuantLinear(bits, group_size, ins, outs, bias=False)
    layer.pack(linear, scales, torch.full_like(scales, 2 ** (bits - 1)), device="cpu")
    for name in ("qweight", "qzeros", "scales"):
        packed[f"{bits}.{name}"] = getattr(layer, name).contiguous()
save_file(packed, sys.argv[2])
"""
COMPRESSED_TENSORS = """
import sys
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

given = load_file(sys.argv[1])
packed = {bits: pack_to_int32(given[f"{bits}.codes"], int(bits)) for bits in "2348"}
save_file({bits: words.contiguous() for bits, words in packed.items()}, sys.argv[2])
"""


def weight(bits: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (OUTS, INS), generator=generator).to(torch.int8)
    scales = 2.0 ** torch.randint(-9, 0, (OUTS, INS // GROUP_SIZE), generator=generator)
    signs = torch.randint(0, 2, scales.shape, generator=generator) * 2 - 1
    return QuantizedWeight(codes, scales * signs, IntGrid(bits, GROUP_SIZE, True))


def run(program: str, folder: Path) -> dict[str, torch.Tensor]:
    given = {f"{bits}.codes": weight(bits).codes for bits in WIDTHS}
    given |= {f"{bits}.scales": weight(bits).scales for bits in WIDTHS}
    save_file(given, folder / "given.safetensors")
    command = [sys.executable, "-c", program, "given.safetensors", "packed.safetensors"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder / "packed.safetensors")


@pytest.fixture(scope="module")
def auto_rounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run(AUTO_ROUND, tmp_path_factory.mktemp("auto_round"))


@pytest.fixture(scope="module")
def compressed_tensors_own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run(COMPRESSED_TENSORS, tmp_path_factory.mktemp("compressed_tensors"))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", gptq_tensors.SUFFIXES)
def test_gptq_tensors_are_auto_rounds(
    auto_rounds: dict[str, torch.Tensor], bits: int, name: str
) -> None:
    ours = gptq_tensors.pack("m", weight(bits))[f"m.{name}"]
    theirs = auto_rounds[f"{bits}.{name}"]
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_those_of_compressed_tensors(
    compressed_tensors_own: dict[str, torch.Tensor], bits: int
) -> None:
    ours = compressed_tensors.pack("m", weight(bits))["m.weight_packed"]
    assert torch.equal(ours, compressed_tensors_own[str(bits)])
