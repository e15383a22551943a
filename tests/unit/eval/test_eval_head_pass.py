from __future__ import annotations

import random

import pytest
import torch
from support.outputs import CPU, output_of, pieces_of

from nybble.eval.head_pass import Output, RunningSoftmax, pieces

VOCAB, POSITIONS = 37, 11
SIZES = [(8, 4), (37, 11), (64, 100), (1, 1), (36, 10)]


def logits(seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(POSITIONS, VOCAB, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("sizes", SIZES)
def test_pieces_are_every_logit_once(sizes: tuple[int, int]) -> None:
    both = logits(0), logits(1)
    found = [torch.full_like(one, torch.nan) for one in both]
    with pieces_of(*sizes):
        for piece in pieces([output_of(one) for one in both], CPU):
            for whole, part in zip(found, piece.logits, strict=True):
                here = whole[piece.positions, piece.start : piece.start + part.shape[1]]
                assert here.isnan().all()
                here.copy_(part)
    assert torch.equal(torch.stack(found), torch.stack(both))


def test_each_part_of_a_head_is_read_once() -> None:
    head, read = torch.randn(VOCAB, 5), []

    def rows(start: int, stop: int) -> torch.Tensor:
        read.append((start, stop))
        return head[start:stop]

    output = Output(torch.randn(POSITIONS, 5), rows, VOCAB)
    with pieces_of(16, 3):
        for _ in pieces([output], CPU):
            pass
    assert read == [(0, 16), (16, 32), (32, 37)]


def test_the_states_type_is_the_products() -> None:
    head = torch.randn(VOCAB, 64, generator=torch.Generator().manual_seed(0))
    states = torch.randn(POSITIONS, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    (piece,) = pieces([Output(states, lambda start, stop: head[start:stop], VOCAB)], CPU)
    (found,) = piece.logits
    assert found.dtype == torch.float32
    assert torch.equal(found, (states @ head.bfloat16().T).float())


def accumulated(values: torch.Tensor, tokens: torch.Tensor, size: int, seed: int) -> RunningSoftmax:
    softmax, starts = RunningSoftmax(tokens, CPU), list(range(0, values.shape[1], size))
    random.Random(seed).shuffle(starts)
    for start in starts:
        for rows in (slice(0, 4), slice(4, len(values))):
            softmax.add(rows, start, values[rows, start : start + size].clone())
    return softmax


@pytest.mark.parametrize("size", [1, 8, 36, 37])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 800.0])
def test_a_running_softmax_is_a_softmax(size: int, scale: float) -> None:
    values = logits(2, scale) + 1000
    tokens = torch.randint(VOCAB, (POSITIONS,), generator=torch.Generator().manual_seed(3))
    softmax = accumulated(values, tokens, size, seed=size)
    expected = values.log_softmax(dim=1)
    close = {"rtol": 0, "atol": 1e-11 * max(scale, 1000)}
    assert torch.allclose(softmax.log_normalizer, values.logsumexp(dim=1), **close)
    of_tokens = expected.gather(1, tokens[:, None]).squeeze(1)
    assert torch.allclose(softmax.token_log_probs, of_tokens, **close)
    assert softmax.top.tolist() == values.argmax(dim=1).tolist()
    assert torch.allclose(softmax.confidence, expected.exp().amax(dim=1), rtol=0, atol=1e-12)


def test_float32_pieces_are_summed_in_float64() -> None:
    """A million equal logits: float32 sums of their exponentials would be off by 1e-4."""
    values, softmax = torch.zeros(1, 1000), RunningSoftmax(torch.zeros(1, dtype=torch.int64), CPU)
    for start in range(0, 10**6, 1000):
        softmax.add(slice(0, 1), start, values.clone() - 0.1)
    expected = torch.tensor(10.0**6, dtype=torch.float64).log() + torch.tensor(-0.1).double()
    assert float(softmax.log_normalizer - expected) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("size", [5, 37])
def test_expectations_follow_the_peak(size: int) -> None:
    values, weights = logits(4), logits(5)
    softmax = RunningSoftmax(torch.zeros(POSITIONS, dtype=torch.int64), CPU)
    sums = torch.zeros(POSITIONS, dtype=torch.float64)
    for start in range(0, VOCAB, size):
        part = slice(start, start + size)
        shares, shrink = softmax.add(slice(0, POSITIONS), start, values[:, part].clone())
        sums = sums * shrink + (shares * weights[:, part]).sum(dim=1)
    expected = (values.softmax(dim=1) * weights).sum(dim=1)
    assert torch.allclose(softmax.weighted_mean(sums), expected, rtol=0, atol=1e-12)
