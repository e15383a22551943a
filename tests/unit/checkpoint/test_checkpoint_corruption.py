"""No damage to a file makes the reader do anything but work or raise CheckpointError."""

from __future__ import annotations

import contextlib
import tempfile
from functools import cache
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from nybble.checkpoint.reader import CheckpointReader
from nybble.core.errors import CheckpointError

HEADER_STOP = 312


@cache
def valid_file() -> bytes:
    tensors = {
        "embed.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
        "layers.0.weight": torch.ones(3, 2, dtype=torch.bfloat16),
        "layers.0.empty": torch.ones(0, 2, dtype=torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.int64),
    }
    data = save(tensors, metadata={"format": "pt"})
    assert 8 + int.from_bytes(data[:8], "little") == HEADER_STOP
    return data


def read_all(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(data)
        with CheckpointReader(folder) as reader:
            for tensor in reader.index.tensors:
                assert torch.equal(reader.read(tensor).view(-1), reader.view(tensor).view(-1))


def only_checkpoint_errors(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        read_all(data)


def test_the_undamaged_file_is_read() -> None:
    read_all(valid_file())


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, HEADER_STOP - 1), st.integers(0, 255)), min_size=1, max_size=8
    )
)
def test_flipped_bytes(flips: list[tuple[int, int]]) -> None:
    data = bytearray(valid_file())
    for place, value in flips:
        data[place] = value
    only_checkpoint_errors(bytes(data))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_replaced_json_characters(data: st.DataObject) -> None:
    # Bytes that keep the JSON readable reach the checks behind the parser.
    damaged = bytearray(valid_file())
    for place in data.draw(st.lists(st.integers(8, HEADER_STOP - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.sampled_from(b'0123456789-.e,:[]{}" aF_tn'))
    only_checkpoint_errors(bytes(damaged))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, HEADER_STOP + 150))
def test_truncation(size: int) -> None:
    only_checkpoint_errors(valid_file()[:size])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_header(header: bytes) -> None:
    only_checkpoint_errors(len(header).to_bytes(8, "little") + header)
