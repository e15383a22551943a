from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import HIDDEN, MTP_SHAPES, VOCAB, Tiny, tiny_config, tiny_tensors
from support.mtp_twin import slow_mtp_head
from torch import nn

from nybble.arch.registry import architecture_of
from nybble.engine.load import load_model

ROWS, TOKENS = 2, 9


@pytest.fixture(scope="module")
def mtp_tensors() -> dict[str, torch.Tensor]:
    return {n: t.float() for n, t in tiny_tensors(Tiny()).items() if n in MTP_SHAPES}


@pytest.fixture(scope="module")
def head(mtp_tensors: dict[str, torch.Tensor]) -> nn.Module:
    spec = architecture_of(tiny_config(Tiny())).mtp
    assert spec is not None
    module = spec.build().eval().float()
    module.load_state_dict({n.removeprefix("mtp."): t for n, t in mtp_tensors.items()})
    return module


def rotary_of(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [1, T, 16] by the formula: a quarter of 64 dimensions, theta 10000."""
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    both = torch.cat([angles, angles], dim=-1)[None]
    return both.cos().float(), both.sin().float()


def test_the_modules_parameters_are_the_checkpoints(head: nn.Module) -> None:
    found = {f"mtp.{name}": tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    assert found == MTP_SHAPES


def test_the_head_agrees_with_a_slow_twin(
    head: nn.Module, mtp_tensors: dict[str, torch.Tensor]
) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, TOKENS, HIDDEN, generator=generator)
    embeds = 0.5 * torch.randn(ROWS, TOKENS, HIDDEN, generator=generator)
    with torch.no_grad():
        output = head(hidden, embeds, rotary_of(TOKENS), None)
    for row in range(ROWS):
        expected = slow_mtp_head(mtp_tensors, hidden[row], embeds[row])
        assert torch.allclose(output[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_drafts_combine_a_position_with_its_next_token(
    tiny_base: Path, mtp_tensors: dict[str, torch.Tensor]
) -> None:
    model = load_model(tiny_base)
    ids = torch.randint(VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(4))
    hidden = model.hidden(ids)
    drafted = model.drafts(hidden, ids)[0]
    assert drafted.shape == (ROWS, TOKENS - 1, HIDDEN)
    embeds = tiny_tensors(Tiny())[model.arch.embedding].float()
    for row in range(ROWS):
        expected = slow_mtp_head(mtp_tensors, hidden[row, :-1], embeds[ids[row, 1:]])
        assert torch.allclose(drafted[row].double(), expected, rtol=1e-4, atol=1e-5)
