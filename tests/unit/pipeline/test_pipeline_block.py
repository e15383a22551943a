from __future__ import annotations

import pytest
import torch

from nybble.pipeline.block import (
    Block,
    MomentCounter,
    Target,
    importances,
    pooled,
    round_data_free,
    start_scales,
)
from nybble.pipeline.streams import Batch
from nybble.quant.grid import IntGrid
from nybble.quant.moments import InputMoments
from nybble.quant.rtn import rtn
from nybble.quant.scale_search import initial_scales

CPU = torch.device("cpu")
GRID = IntGrid(4, 32, True)
EXPERTS, OUTS, INS, TOKENS = 3, 32, 64, 7
LENGTHS = (7, 2, 5)
GATE = "mlp.gate_proj.weight"
STACK = "mlp.experts.gate_up_proj"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def block() -> Block:
    """One Linear, and a stack of three experts of two Linears each."""
    return Block(
        index=0,
        weights={GATE: draw(OUTS, INS).bfloat16(), STACK: draw(EXPERTS, 2 * OUTS, INS, seed=1)},
        targets={
            GATE: Target(("mlp.gate_proj",), GRID, "mlp"),
            STACK: Target(tuple(f"e.{n}" for n in range(2 * EXPERTS)), GRID, "experts"),
        },
        inputs=((GATE,), (STACK,)),
    )


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]


def moment_of(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.T.double() @ tokens.double() / len(tokens)


def test_a_matrix_and_its_shape_are_inverse(block: Block) -> None:
    assert block.matrix(GATE).shape == (OUTS, INS)
    matrix = block.matrix(STACK)
    assert matrix.shape == (EXPERTS * 2 * OUTS, INS)
    assert torch.equal(block.shaped(STACK, matrix), block.weights[STACK])
    assert torch.equal(torch.cat(block.experts(STACK)), matrix)
    assert [w.shape for w in block.experts(GATE)] == [(OUTS, INS)]


def test_a_cast_leaves_out_what_it_is_told(block: Block) -> None:
    cast = block.cast(torch.float64, skip={STACK})
    assert set(cast) == {GATE}
    assert cast[GATE].dtype == torch.float64


@pytest.mark.parametrize("full", [True, False])
def test_padding_does_not_count_in_the_moments_of_a_linear(
    block: Block, mask: torch.Tensor, full: bool
) -> None:
    """Counted over two batches; what stands in the padding would spoil any sum."""
    inputs = draw(len(LENGTHS), TOKENS, INS)
    real = torch.cat([row[:length] for row, length in zip(inputs, LENGTHS, strict=True)])
    inputs[~mask] = float("nan")
    counter = MomentCounter(block, (GATE,), full, CPU)
    for rows in (slice(0, 2), slice(2, 3)):
        batch = Batch(inputs[rows], mask[rows])
        assert counter.watch(batch) is batch
        counter.on_input(GATE, 0, inputs[rows].flatten(0, 1), None)
    (found,) = counter.moments[GATE]
    assert found.tokens == sum(LENGTHS)
    assert torch.allclose(found.mean_square().double(), moment_of(real).diagonal(), rtol=1e-5)
    if full:
        assert torch.allclose(found.second_moment().double(), moment_of(real), atol=1e-5)


def test_padding_does_not_count_in_the_moments_of_an_expert(
    block: Block, mask: torch.Tensor
) -> None:
    inputs = draw(len(LENGTHS) * TOKENS, INS)
    inputs[~mask.flatten()] = float("nan")
    chosen = {0: torch.tensor([0, 3, 8, 9, 14, 20]), 2: torch.tensor([9, 10, 13, 19])}
    counter = MomentCounter(block, (STACK,), True, CPU)
    counter.watch(Batch(inputs, mask))
    for expert, tokens in chosen.items():
        counter.on_input(STACK, expert, inputs[tokens], tokens)
    first, unseen, padded = counter.moments[STACK]
    assert (first.tokens, unseen.tokens, padded.tokens) == (4, 0, 0)
    expected = moment_of(inputs[[0, 3, 8, 14]])
    assert torch.allclose(first.second_moment().double(), expected, atol=1e-5)


def test_without_padding_every_token_counts(block: Block) -> None:
    inputs = draw(2, TOKENS, INS)
    counter = MomentCounter(block, (GATE,), False, CPU)
    counter.watch(Batch(inputs, None))
    counter.on_input(GATE, 0, inputs.flatten(0, 1), None)
    assert counter.moments[GATE][0].tokens == 2 * TOKENS


@pytest.mark.parametrize("full", [True, False])
def test_an_expert_without_tokens_is_weighed_like_all_together(full: bool) -> None:
    parts = (draw(5, INS), draw(0, INS), 3 * draw(2, INS, seed=2))
    moments = [InputMoments(INS, CPU, full) for _ in parts]
    for one, part in zip(moments, parts, strict=True):
        one.add(part)
    together = torch.cat(parts).square().mean(dim=0)
    assert torch.allclose(pooled(moments), together, rtol=1e-5)
    found = importances(moments)
    assert torch.allclose(found[0], parts[0].square().mean(dim=0), rtol=1e-5)
    assert torch.allclose(found[1], together, rtol=1e-5)
    assert torch.allclose(found[2], parts[2].square().mean(dim=0), rtol=1e-5)


def test_each_expert_starts_with_scales_of_its_own_inputs(block: Block) -> None:
    importance = [draw(INS, seed=n).square() for n in range(EXPERTS)]
    scales = start_scales(block, STACK, "importance", importance)
    assert scales.shape == (EXPERTS * 2 * OUTS, INS // 32)
    for expert, part in enumerate(scales.chunk(EXPERTS)):
        alone = initial_scales("importance", block.weights[STACK][expert], GRID, importance[expert])
        assert torch.equal(part, alone)


def test_rounding_without_text_is_the_same_for_stacks_and_single_linears(block: Block) -> None:
    rounded = round_data_free(block, "minmax")
    for name in (GATE, STACK):
        nearest = rtn(block.matrix(name), GRID)
        assert torch.equal(rounded[name].weight.codes, nearest.codes)
        assert torch.equal(rounded[name].weight.scales, nearest.scales)
    assert len(rounded[GATE].facts) == 1
    assert len(rounded[STACK].facts) == 2 * EXPERTS
