from __future__ import annotations

import pytest
import torch

from nybble.pipeline.streams import Streams

CPU = torch.device("cpu")
ROWS, TOKENS, WIDTH = 11, 5, 3


@pytest.fixture
def streams() -> Streams:
    """Row r holds r everywhere."""
    rows = torch.arange(ROWS, dtype=torch.float32)[:, None, None].expand(ROWS, TOKENS, WIDTH)
    return Streams.begin(rows.clone(), CPU)


def rows_of(batch: torch.Tensor) -> list[int]:
    return [int(row[0, 0]) for row in batch]


def test_both_streams_start_alike_and_apart(streams: Streams) -> None:
    assert torch.equal(streams.base, streams.quantized)
    streams.base[0] = 100
    assert float(streams.quantized[0, 0, 0]) == 0


def test_outputs_of_all_rows_replace_their_inputs(streams: Streams) -> None:
    sizes: list[int] = []

    def block(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows * 2 + 1

    before = streams.base.clone()
    streams.advance_base(block)
    assert torch.equal(streams.base, before * 2 + 1)
    assert torch.equal(streams.quantized, before)
    assert sum(sizes) == ROWS
    assert max(sizes) <= 8


def test_the_quantized_streams_distance_is_the_mean_square(streams: Streams) -> None:
    offsets = torch.linspace(-1, 1, WIDTH)
    loss = streams.advance_quantized(lambda rows: rows + offsets)
    assert loss == pytest.approx(float(offsets.square().mean()), rel=1e-5)
    assert torch.allclose(streams.quantized, streams.base + offsets)


def test_batches_pair_quantized_inputs_with_base_targets(streams: Streams) -> None:
    streams.advance_base(lambda rows: rows + 1000)
    inputs, targets = streams.training_batches(4, seed=0, block=0)(0)
    assert torch.equal(inputs + 1000, targets)
    assert inputs.shape == (4, TOKENS, WIDTH)


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
