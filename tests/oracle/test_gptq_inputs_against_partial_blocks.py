"""What GPTQ is told of each input, against transformers' own layer under partly rounded weights.

The twin runs every calibration row alone, cut to its real tokens, so that there is no padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.checkpoints import HIDDEN, TEXT_VALUES
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5TextModel

from nybble.arch.blocks import BlockRunner
from nybble.checkpoint.reader import CheckpointReader
from nybble.pipeline import algorithms
from nybble.pipeline.algorithms import quantize_block
from nybble.pipeline.assemble import load_block
from nybble.pipeline.block import Block, Calibrated, Rounded
from nybble.pipeline.quantize import planned
from nybble.pipeline.streams import Streams
from nybble.quant.moments import InputMoments
from nybble.recipe.schema import Calibration, Gptq, Recipe

CPU = torch.device("cpu")
SEQLEN = 40
LENGTHS = (40, 9, 33, 40, 1, 27, 40, 40, 18, 25)
MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
STAGES = {
    0: (("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), ("linear_attn.out_proj",), *MLP),
    3: (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        *MLP,
    ),
}


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randn(len(LENGTHS), SEQLEN, HIDDEN, generator=torch.Generator().manual_seed(1))


def quantized(
    base: Path, index: int, algorithm: Gptq, rows: torch.Tensor
) -> tuple[Block, dict[str, Rounded], Streams]:
    """The real thing: one block by GPTQ on padded rows."""
    recipe = Recipe(algorithm=algorithm, calibration=Calibration(source="unused.txt"))
    mask = torch.arange(SEQLEN) < torch.tensor(LENGTHS)[:, None]
    streams = Streams(rows.clone(), None, mask, CPU)
    with CheckpointReader(base) as reader:
        arch, plan = planned(reader, recipe)
        block = load_block(reader, arch, plan, index, CPU)
        calibrated = Calibrated(
            BlockRunner(arch, SEQLEN, CPU, torch.float32), streams, torch.float32
        )
        rounded, _ = quantize_block(block, recipe, calibrated, lambda *_: None)
    return block, rounded, streams


def slow_moment(
    index: int, weights: Mapping[str, torch.Tensor], module: str, rows: torch.Tensor
) -> torch.Tensor:
    """Mean of x xᵀ over the real tokens that reach a Linear, float64."""
    layer, seen = layer_of(index, weights), []
    handle = layer.get_submodule(module).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0][0].double())
    )
    for row, length in zip(rows, LENGTHS, strict=True):
        run(layer, row[:length])
    handle.remove()
    tokens = torch.cat(seen)
    assert len(tokens) == sum(LENGTHS)
    return sum(torch.outer(x, x) for x in tokens) / len(tokens)


def layer_of(index: int, weights: Mapping[str, torch.Tensor]) -> Qwen3_5DecoderLayer:
    layer = Qwen3_5DecoderLayer(Qwen3_5TextConfig(**TEXT_VALUES), index).eval().float()
    layer.load_state_dict({name: w.float() for name, w in weights.items()})
    return layer.requires_grad_(False)


def run(layer: Qwen3_5DecoderLayer, row: torch.Tensor) -> torch.Tensor:
    rotary = Qwen3_5TextModel(Qwen3_5TextConfig(**TEXT_VALUES)).rotary_emb
    positions = torch.arange(len(row)).expand(3, 1, -1)
    mask = None
    if hasattr(layer, "self_attn"):
        mask = torch.full((1, 1, len(row), len(row)), float("-inf")).triu(1)
    output = layer(row[None], position_embeddings=rotary(row[None], positions), attention_mask=mask)
    assert isinstance(output, torch.Tensor)
    return output[0]


def relative_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("index", STAGES, ids=["linear attention", "full attention"])
@pytest.mark.parametrize("sequential", [False, True], ids=["one pass", "sequential"])
def test_each_input_is_what_the_block_computes_so_far(
    tiny_base: Path,
    rows: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    index: int,
    sequential: bool,
) -> None:
    told: dict[tuple[str, ...], torch.Tensor] = {}
    real = algorithms.gptq_group

    def spy(
        block: Block, names: tuple[str, ...], algorithm: Gptq, moments: list[InputMoments]
    ) -> dict[str, Rounded]:
        (only,) = moments
        assert only.tokens == sum(LENGTHS)
        told[names] = only.second_moment()
        return real(block, names, algorithm, moments)

    monkeypatch.setattr(algorithms, "gptq_group", spy)
    block, rounded, streams = quantized(tiny_base, index, Gptq(true_sequential=sequential), rows)
    assert list(told) == [tuple(f"{m}.weight" for m in stage) for stage in STAGES[index]]

    original = dict(block.weights)
    partly = dict(original)
    for stage in STAGES[index]:
        names = tuple(f"{module}.weight" for module in stage)
        expected = slow_moment(index, partly if sequential else original, stage[-1], rows)
        assert relative_distance(told[names], expected) < 1e-5, stage
        if stage is not STAGES[index][0]:
            other = slow_moment(index, original if sequential else partly, stage[-1], rows)
            assert relative_distance(told[names], other) > 1e-3, stage
        partly |= {name: rounded[name].weight.dequantize() for name in names}

    layer = layer_of(index, partly)
    for row, length, output in zip(rows, LENGTHS, streams.quantized, strict=True):
        assert torch.allclose(output[:length], run(layer, row[:length]), rtol=1e-4, atol=1e-4)
