from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nybble.pipeline.streams import Batch, Streams

CPU = torch.device("cpu")
ROWS, TOKENS, WIDTH = 11, 5, 3
LENGTHS = torch.tensor([5, 1, 3, 5, 2, 4, 1, 5, 3, 2, 4])


def streams_of(mask: torch.Tensor | None) -> Streams:
    """Row r holds r everywhere."""
    rows = torch.arange(ROWS, dtype=torch.float32)[:, None, None].expand(ROWS, TOKENS, WIDTH)
    return Streams(rows.clone(), rows.clone(), mask, CPU)


@pytest.fixture
def streams() -> Streams:
    return streams_of(None)


@pytest.fixture
def padded() -> Streams:
    return streams_of(torch.arange(TOKENS) < LENGTHS[:, None])


def base_of(streams: Streams) -> torch.Tensor:
    assert streams.base is not None
    return streams.base


def rows_of(batch: Batch) -> list[int]:
    return [int(row[0, 0]) for row in batch.hidden]


def times(factor: float, offset: float = 0) -> Callable[[Batch], torch.Tensor]:
    return lambda batch: batch.hidden * factor + offset


def test_outputs_of_all_rows_replace_their_inputs(streams: Streams) -> None:
    sizes: list[int] = []

    def block(batch: Batch) -> torch.Tensor:
        sizes.append(len(batch.hidden))
        return batch.hidden * 2 + 1

    before = base_of(streams).clone()
    streams.advance_base(block)
    assert torch.equal(base_of(streams), before * 2 + 1)
    assert torch.equal(streams.quantized, before)
    assert sum(sizes) == ROWS
    assert max(sizes) <= 8


def test_a_scan_shows_every_row_once_and_changes_nothing(padded: Streams) -> None:
    before, seen = padded.quantized.clone(), []

    def visit(batch: Batch) -> None:
        rows = rows_of(batch)
        assert batch.mask is not None
        assert batch.mask.sum(dim=1).tolist() == LENGTHS[rows].tolist()
        seen.extend(rows)

    padded.scan(visit)
    assert seen == list(range(ROWS))
    assert torch.equal(padded.quantized, before)


def test_the_quantized_streams_distance_is_the_mean_square(streams: Streams) -> None:
    offsets = torch.linspace(-1, 1, WIDTH)
    loss = streams.advance_quantized(lambda batch: batch.hidden + offsets)
    assert loss == pytest.approx(float(offsets.square().mean()), rel=1e-5)
    assert torch.allclose(streams.quantized, base_of(streams) + offsets)


def test_without_a_base_stream_there_is_no_distance() -> None:
    alone = Streams(torch.ones(3, TOKENS, WIDTH), None, None, CPU)
    assert alone.advance_quantized(times(2)) is None
    assert torch.equal(alone.quantized, torch.full((3, TOKENS, WIDTH), 2.0))


def test_padding_does_not_count_in_the_distance(padded: Streams) -> None:
    errors = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    assert padded.mask is not None
    real = torch.cat([errors[row, : LENGTHS[row]] for row in range(ROWS)])
    errors[~padded.mask] = float("nan")
    starts = iter(range(0, ROWS, 8))

    def block(batch: Batch) -> torch.Tensor:
        start = next(starts)
        return batch.hidden + errors[start : start + len(batch.hidden)]

    loss = padded.advance_quantized(block)
    assert loss == pytest.approx(float(real.square().mean()), rel=1e-5)


def test_a_batch_knows_its_real_outputs(padded: Streams, streams: Streams) -> None:
    batch, targets = padded.training_batches(4, seed=0, block=0)(0)
    rows = rows_of(batch)
    expected = torch.cat([batch.hidden[i, : LENGTHS[row]] for i, row in enumerate(rows)])
    assert torch.equal(batch.real(batch.hidden), expected)
    assert torch.equal(targets, expected)
    whole, _ = streams.training_batches(4, seed=0, block=0)(0)
    assert whole.real(whole.hidden) is whole.hidden


def test_targets_are_the_base_streams_whatever_the_padding_holds(padded: Streams) -> None:
    assert padded.mask is not None
    padded.advance_base(times(1, 1000))
    base_of(padded)[~padded.mask] = float("nan")
    inputs, targets = padded.training_batches(ROWS, seed=0, block=0)(0)
    assert torch.equal(inputs.real(inputs.hidden) + 1000, targets)
    assert len(targets) == int(LENGTHS.sum())


def test_batches_pair_quantized_inputs_with_base_targets(streams: Streams) -> None:
    streams.advance_base(times(1, 1000))
    inputs, targets = streams.training_batches(4, seed=0, block=0)(0)
    assert torch.equal(inputs.hidden + 1000, targets)
    assert inputs.hidden.shape == (4, TOKENS, WIDTH)


def test_no_row_comes_twice_before_the_next_shuffle(streams: Streams) -> None:
    batch = streams.training_batches(5, seed=0, block=0)
    for epoch in range(3):
        rows = [row for step in (0, 1) for row in rows_of(batch(2 * epoch + step)[0])]
        assert len(set(rows)) == 10
        assert set(rows) <= set(range(ROWS))


def test_each_pass_over_the_rows_is_shuffled_anew(streams: Streams) -> None:
    batch = streams.training_batches(11, seed=0, block=0)
    orders = [rows_of(batch(step)[0]) for step in range(4)]
    assert all(sorted(order) == list(range(ROWS)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_batches_depend_on_seed_block_and_step_alone(streams: Streams) -> None:
    one = streams.training_batches(4, seed=1, block=2)
    expected = [rows_of(one(step)[0]) for step in range(6)]
    torch.manual_seed(99)
    other = streams.training_batches(4, seed=1, block=2)
    assert [rows_of(other(step)[0]) for step in reversed(range(6))] == expected[::-1]
    for seed, block in ((2, 2), (1, 3)):
        changed = streams.training_batches(4, seed=seed, block=block)
        assert [rows_of(changed(step)[0]) for step in range(6)] != expected


def test_a_batch_is_never_larger_than_the_rows(streams: Streams) -> None:
    batch = streams.training_batches(64, seed=0, block=0)
    for step in range(3):
        assert sorted(rows_of(batch(step)[0])) == list(range(ROWS))
