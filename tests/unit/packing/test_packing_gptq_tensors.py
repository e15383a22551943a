from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.core.errors import CheckpointError
from nybble.packing.gptq_tensors import SUFFIXES, pack, packed_specs, unpack
from nybble.quant.grid import IntGrid, QuantizedWeight
from nybble.quant.rtn import rtn


def weight_of_rows(row: list[int], outs: int, bits: int) -> QuantizedWeight:
    """Every one of ``outs`` rows holds the same codes, under the scales 1, 2, 3..."""
    codes = torch.tensor([row] * outs, dtype=torch.int8)
    scales = torch.arange(1, outs + 1, dtype=torch.float32)[:, None]
    return QuantizedWeight(codes, scales, IntGrid(bits, -1, True))


def any_weight(outs: int, ins: int, grid: IntGrid, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    return rtn(torch.randn(outs, ins, generator=generator), grid)


# --- What real packers of the format write ---


def test_four_bits_as_known_from_other_packers() -> None:
    packed = pack("m", weight_of_rows([-8, -3, 0, 1, 7, -1, 2, -6], outs=8, bits=4))
    assert packed["m.qweight"].tolist() == [[0x2A7F9850] * 8]
    assert packed["m.qweight"][0, 0].item() == 713005136
    assert packed["m.qzeros"].tolist() == [[2004318071]]
    assert packed["m.qzeros"][0, 0].item() == 0x77777777
    assert packed["m.scales"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


def test_eight_bits_as_known_from_other_packers() -> None:
    packed = pack("m", weight_of_rows([-128, -3, 0, 127], outs=4, bits=8))
    assert packed["m.qweight"].tolist() == [[-8356608] * 4]
    assert packed["m.qzeros"].tolist() == [[2139062143]]
    assert packed["m.qzeros"][0, 0].item() == 0x7F7F7F7F


def test_two_bits() -> None:
    packed = pack("m", weight_of_rows([-2, -1, 0, 1] * 4, outs=16, bits=2))
    assert packed["m.qweight"].tolist() == [[0b11100100 * 0x01010101 - 2**32] * 16]
    assert packed["m.qzeros"].tolist() == [[0x55555555]]


def test_three_bits_run_across_words() -> None:
    packed = pack("m", weight_of_rows([0] * 10 + [3] + [0] * 21, outs=32, bits=3))
    stream = sum((4 + (3 if k == 10 else 0)) << (3 * k) for k in range(32))
    words = [(stream >> shift) & 0xFFFFFFFF for shift in (0, 32, 64)]
    assert [word & 0xFFFFFFFF for word in packed["m.qweight"][:, 0].tolist()] == words
    assert packed["m.qzeros"].shape == (1, 3)


def test_words_run_along_the_inputs_and_columns_are_outputs() -> None:
    codes = torch.zeros(8, 16, dtype=torch.int8)
    codes[3, 9] = 5  # output 3, input 9: second word, second lane
    packed = pack("m", QuantizedWeight(codes, torch.ones(8, 1), IntGrid(4, -1, True)))
    words = packed["m.qweight"]
    assert words.shape == (2, 8)
    differing = (words != words[0, 0]).nonzero().tolist()
    assert differing == [[1, 3]]
    assert (words[1, 3].item() >> 4) & 15 == 5 + 8


def test_scales_are_stored_by_group_then_output() -> None:
    scales = torch.tensor([[1.0, 2.0], [-3.0, 4.0]] * 4)
    codes = torch.zeros(8, 16, dtype=torch.int8)
    packed = pack("m", QuantizedWeight(codes, scales, IntGrid(4, 8, True)))
    assert packed["m.scales"].tolist() == [[1, -3] * 4, [2, 4] * 4]
    assert packed["m.scales"].dtype == torch.float16


# --- Round trip ---


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    signed=st.booleans(),
    out_blocks=st.integers(1, 3),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([32, 64, -1]),
    seed=st.integers(0, 1000),
)
def test_unpacking_returns_what_was_packed(
    bits: int, signed: bool, out_blocks: int, groups: int, group_size: int, seed: int
) -> None:
    ins = groups * (32 if group_size == -1 else group_size)
    grid = IntGrid(bits, group_size, signed)
    quantized = any_weight(out_blocks * 32, ins, grid, seed)
    packed = pack("a.b", quantized)
    back = unpack("a.b", packed, grid)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    assert (back.codes.dtype, back.scales.dtype) == (torch.int8, torch.float32)
    assert torch.equal(back.dequantize(), quantized.dequantize())
    specs = packed_specs("a.b", (quantized.codes.shape[0], ins), grid)
    assert [spec.name for spec in specs] == [f"a.b.{suffix}" for suffix in SUFFIXES]
    assert {spec.name: (spec.dtype, spec.shape) for spec in specs} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()
    }
    assert all(tensor.is_contiguous() for tensor in packed.values())


def test_specs_of_a_real_shape() -> None:
    specs = packed_specs("q_proj", (1024, 512), IntGrid(4, 128, True))
    assert [(spec.name, spec.dtype, spec.shape) for spec in specs] == [
        ("q_proj.qweight", torch.int32, (64, 1024)),
        ("q_proj.qzeros", torch.int32, (4, 128)),
        ("q_proj.scales", torch.float16, (4, 1024)),
    ]


@pytest.mark.parametrize(("bits", "wrong"), [(4, 0), (4, -2004318072), (8, -2139062144), (2, 0)])
def test_other_zero_points_are_refused(bits: int, wrong: int) -> None:
    grid = IntGrid(bits, 32, True)
    packed = pack("m", any_weight(16, 64, grid))
    packed["m.qzeros"][0, 0] = wrong
    with pytest.raises(CheckpointError, match=r"^m\.qzeros holds"):
        unpack("m", packed, grid)


def test_one_wrong_zero_point_among_many_is_refused() -> None:
    grid = IntGrid(4, 32, True)
    packed = pack("m", any_weight(16, 64, grid))
    packed["m.qzeros"][-1, -1] ^= 1 << 28
    with pytest.raises(CheckpointError, match=r"m\.qzeros"):
        unpack("m", packed, grid)


@pytest.mark.parametrize("bad", [8, -9])
def test_codes_outside_the_grid_are_not_packed(bad: int) -> None:
    quantized = weight_of_rows([0, 1, 2, 3, 4, 5, 6, bad], outs=8, bits=4)
    with pytest.raises(ValueError, match="outside"):
        pack("m", quantized)


def test_three_bits_have_other_zero_points_refused() -> None:
    grid = IntGrid(3, 32, True)
    packed = pack("m", any_weight(32, 64, grid))
    packed["m.qzeros"][1, 1] ^= 1 << 31  # the middle of a value that straddles two words
    with pytest.raises(CheckpointError, match=r"^m\.qzeros holds"):
        unpack("m", packed, grid)


@pytest.mark.parametrize(("group_size", "ins"), [(32, 96), (-1, 64)])
def test_groups_in_order_may_be_spelled_out(group_size: int, ins: int) -> None:
    grid = IntGrid(4, group_size, True)
    quantized = any_weight(16, ins, grid)
    packed = pack("m", quantized)
    packed["m.g_idx"] = torch.arange(ins, dtype=torch.int32) // (
        ins if group_size == -1 else group_size
    )
    assert torch.equal(unpack("m", packed, grid).codes, quantized.codes)
    packed["m.g_idx"][0] += 1
    with pytest.raises(CheckpointError, match=r"^m\.g_idx sorts"):
        unpack("m", packed, grid)


@pytest.mark.parametrize("scale", [1.0001, 1e-9, 1e6])
def test_scales_that_the_type_cannot_hold_are_refused(scale: float) -> None:
    scales = torch.ones(8, 1)
    scales[5, 0] = scale
    quantized = QuantizedWeight(torch.zeros(8, 8, dtype=torch.int8), scales, IntGrid(4, -1, True))
    with pytest.raises(CheckpointError, match=r"^m has a scale of"):
        pack("m", quantized)
