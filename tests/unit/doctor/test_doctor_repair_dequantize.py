"""Packed weights become dense again under either convention of zero points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import MTP_SHAPES, write_tiny
from support.repairs import bytes_of, mend

from nybble.core.errors import CheckpointError
from nybble.doctor.repair.dequantize import dense_weight
from nybble.doctor.resolve.built import Scheme, Storage

GROUP = 32
LINEAR = "mtp.layers.0.mlp.down_proj"
OUTS, INS = MTP_SHAPES[f"{LINEAR}.weight"]


def in_words(fields: np.ndarray, bits: int) -> torch.Tensor:
    """Fields [rows, n] as int32 words along the rows, the first in the lowest bits; by numpy."""
    stream = (fields.astype(np.uint8)[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(stream.reshape(len(fields), -1), axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").copy())


def rounded(bits: int, symmetric: bool, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Codes [N, K], zero points and scales [N, G] of a random weight, and what they mean."""
    draw = np.random.default_rng(seed)
    weight = draw.normal(scale=0.05, size=(OUTS, INS // GROUP, GROUP))
    low, high = weight.min(-1), weight.max(-1)
    top = 2**bits - 1
    scales = np.maximum(np.abs(low), np.abs(high)) * 2 / top if symmetric else (high - low) / top
    scales = torch.from_numpy(scales).bfloat16().double().numpy()
    middle = np.full_like(scales, 2 ** (bits - 1))
    zeros = middle if symmetric else np.clip(np.rint(-low / scales), 0, top)
    codes = np.clip(np.rint(weight / scales[..., None]) + zeros[..., None], 0, top)
    meant = (codes - zeros[..., None]) * scales[..., None]
    return codes.reshape(OUTS, INS), zeros, scales, meant.reshape(OUTS, INS)


def gptq(
    bits: int, symmetric: bool, version: int, order: np.ndarray | None = None
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Tensors by suffix, and the weight they mean; ``order`` says where each input stands."""
    codes, zeros, scales, meant = rounded(bits, symmetric)
    stored = (zeros - 1) % 2**bits if version == 1 else zeros
    groups = np.arange(INS) // GROUP
    if order is not None:
        codes, meant, groups = codes[:, order], meant[:, order], groups[order]
    parts = {
        "qweight": in_words(codes, bits).T.contiguous(),
        "qzeros": in_words(stored.T, bits),
        "scales": torch.from_numpy(scales).T.half().contiguous(),
    }
    if order is not None:
        parts["g_idx"] = torch.from_numpy(groups).int()
    return parts, meant


def compressed(bits: int, symmetric: bool) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    codes, zeros, scales, meant = rounded(bits, symmetric)
    parts = {
        "weight_packed": in_words(codes, bits),
        "weight_scale": torch.from_numpy(scales).bfloat16(),
        "weight_shape": torch.tensor([OUTS, INS]),
    }
    if not symmetric:
        parts["weight_zero_point"] = in_words(zeros.T, bits).T.contiguous()
    return parts, meant


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_convention_of_zero_points_is_found_out(
    bits: int, symmetric: bool, version: int
) -> None:
    parts, meant = gptq(bits, symmetric, version)
    weight = dense_weight(parts, Scheme(Storage.GPTQ, bits, GROUP))
    assert torch.allclose(weight.double(), torch.from_numpy(meant), rtol=1e-6, atol=0)


@pytest.mark.parametrize("version", [1, 2])
def test_inputs_that_are_sorted_by_activation_keep_their_groups(version: int) -> None:
    order = np.random.default_rng(1).permutation(INS)
    parts, meant = gptq(4, False, version, order)
    weight = dense_weight(parts, Scheme(Storage.GPTQ, 4, GROUP))
    assert torch.allclose(weight.double(), torch.from_numpy(meant), rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_have_one_convention(bits: int, symmetric: bool) -> None:
    parts, meant = compressed(bits, symmetric)
    weight = dense_weight(parts, Scheme(Storage.PACKED, bits, GROUP))
    assert torch.allclose(weight.double(), torch.from_numpy(meant), rtol=1e-6, atol=0)


def packed_head(folder: Path, parts: dict[str, torch.Tensor]) -> Path:
    """A tiny checkpoint of which one Linear of the MTP head is packed."""
    write_tiny(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{LINEAR}.weight"]
    tensors |= {f"{LINEAR}.{suffix}": tensor for suffix, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("version", [1, 2])
def test_a_packed_head_is_dense_again(tmp_path: Path, version: int) -> None:
    parts, meant = gptq(4, False, version)
    folder = packed_head(tmp_path / "packed", parts)
    draft = mend(folder, "dequantize-mtp")
    assert [done.action for done in draft.done] == ["dequantize-mtp"]
    assert "only the base has the exact ones" in draft.done[0].text
    assert draft.unmended == ()
    found = draft.entries[f"{LINEAR}.weight"].read()
    assert bytes_of(found) == bytes_of(torch.from_numpy(meant).float().bfloat16())
    assert {name for name in draft.entries if name.startswith("mtp.")} == set(MTP_SHAPES)


@pytest.mark.parametrize("lost", ["scales", "qzeros"])
def test_half_a_packed_head_is_not_guessed(tmp_path: Path, lost: str) -> None:
    parts, _ = gptq(4, True, 1)
    del parts[lost]
    draft = mend(packed_head(tmp_path / "packed", parts), "dequantize-mtp")
    assert draft.done == ()
    assert LINEAR in draft.unmended[0]
    assert "--base" in draft.unmended[0]
    assert f"{LINEAR}.qweight" in draft.entries


def test_tensors_that_do_not_fit_each_other_are_not_read(tmp_path: Path) -> None:
    parts, _ = gptq(4, True, 1)
    parts["qzeros"] = parts["qzeros"][:, :-1].contiguous()
    draft = mend(packed_head(tmp_path / "packed", parts), "dequantize-mtp")
    assert draft.done == ()
    assert draft.unmended


def test_a_group_that_is_not_there_is_refused() -> None:
    parts, _ = gptq(4, True, 1, np.arange(INS))
    parts["g_idx"][0] = INS
    with pytest.raises(CheckpointError, match="names group"):
        dense_weight(parts, Scheme(Storage.GPTQ, 4, GROUP))


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_tensors_of_other_types_are_not_read(tmp_path: Path, part: str) -> None:
    parts, _ = gptq(4, True, 1, np.arange(INS))
    parts[part] = parts[part].to(torch.int16)
    draft = mend(packed_head(tmp_path / "packed", parts), "dequantize-mtp")
    assert draft.done == ()
    assert draft.unmended
