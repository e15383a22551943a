from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.checkpoint.reader import CheckpointReader
from nybble.core.errors import CheckpointError


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    (folder / "config.json").write_text('{"model_type": "x"}')
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "embed.weight": torch.randn(8, 4, generator=generator).bfloat16(),
        "layers.0.up.weight": torch.randn(4, 4, generator=generator),
        "layers.0.empty": torch.empty(0, 3, dtype=torch.int32),
        "layers.0.scalar": torch.tensor(2.5, dtype=torch.float64),
        "layers.10.mask": torch.tensor([True, False, True]),
        "layers.10.fp8": torch.arange(5, dtype=torch.uint8).view(torch.float8_e4m3fn),
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat_one, flat_other = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        flat_one, flat_other
    )


def test_read_and_view_equal_the_reference_library(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert set(reader.index.tensors) == set(expected)
        assert reader.config == {"model_type": "x"}
        for name, tensor in expected.items():
            assert same(reader.read(name), tensor)
            assert same(reader.view(name), tensor)


def test_read_owns_its_memory_and_view_does_not(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path)
    with CheckpointReader(tmp_path) as reader:
        name = "embed.weight"
        assert reader.view(name).data_ptr() == reader.view(name).data_ptr()
        copy = reader.read(name)
        assert copy.data_ptr() != reader.view(name).data_ptr()
        copy.zero_()
        assert same(reader.view(name), tensors[name])
    assert not copy.any()


def test_raw_and_sha256(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path)
    with CheckpointReader(tmp_path) as reader:
        data = bytes(tensors["layers.0.up.weight"].view(torch.uint8).flatten().tolist())
        raw = reader.raw("layers.0.up.weight")
        assert raw.readonly
        assert raw == data
        assert reader.sha256("layers.0.up.weight") == hashlib.sha256(data).hexdigest()
        assert bytes(reader.raw("layers.0.empty")) == b""
        assert reader.sha256("layers.0.empty") == hashlib.sha256(b"").hexdigest()


def test_read_prefix(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path)
    with CheckpointReader(tmp_path) as reader:
        found = reader.read_prefix("layers.10.")
        assert set(found) == {"mask", "fp8"}
        assert same(found["mask"], tensors["layers.10.mask"])
        assert reader.read_prefix("layers.1.") == {}


def test_a_misaligned_tensor(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = torch.tensor([1.5, -2.0])
    data = b"abc" + bytes(values.view(torch.uint8).tolist())
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (tmp_path / "config.json").write_text("{}")
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(reader.read("b"), values)
        assert torch.equal(reader.view("b"), values)
        assert reader.view("b").data_ptr() % 4 == 0


def test_unknown_name(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with CheckpointReader(tmp_path) as reader:
        for method in (reader.read, reader.view, reader.raw, reader.sha256):
            message = refusal(lambda method=method: method("layers.0.up.weigth"))
            assert "no tensor 'layers.0.up.weigth'; did you mean 'layers.0.up.weight'?" in message
        assert refusal(lambda: reader.read("?")).endswith("no tensor '?'")


def test_release_keeps_views_valid(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path)
    with CheckpointReader(tmp_path) as reader:
        reader.release()
        view = reader.view("embed.weight")
        reader.release()
        assert same(view, tensors["embed.weight"])


def test_a_forgotten_view_outlives_close(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path)
    with CheckpointReader(tmp_path) as reader:
        view, raw = reader.view("embed.weight"), reader.raw("embed.weight")
    reader.close()
    assert same(view, tensors["embed.weight"])
    assert len(raw) == 64
    with pytest.raises(ValueError, match="the reader is closed"):
        reader.read("embed.weight")


def test_writing_to_a_view_does_not_reach_the_file(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path)
    with CheckpointReader(tmp_path) as reader:
        reader.view("embed.weight").zero_()
    assert same(load_file(tmp_path / "model.safetensors")["embed.weight"], tensors["embed.weight"])


def test_a_file_that_vanished(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with CheckpointReader(tmp_path) as reader:
        (tmp_path / "model.safetensors").unlink()
        message = refusal(lambda: reader.read("embed.weight"))
        assert "model.safetensors: No such file" in message


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("change", [-1, -4096, 1])
def test_a_file_that_changed_its_size(tmp_path: Path, mapped: bool, change: int) -> None:
    checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    with CheckpointReader(tmp_path) as reader:
        if mapped:
            reader.view("embed.weight")
        with path.open("r+b") as file:
            file.truncate(max(size + change, 0))
        message = refusal(lambda: reader.read("embed.weight"))
        assert f"had {size} bytes and now has {max(size + change, 0)}" in message


def test_no_config(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "config.json: No such file" in refusal(lambda: CheckpointReader(tmp_path))


RESIDENT = """
import json, sys
from pathlib import Path
from nybble.checkpoint.reader import CheckpointReader

def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024

def growth(release):
    start, most = resident(), 0
    with CheckpointReader(Path(sys.argv[1])) as reader:
        for name in reader.index.tensors:
            reader.read(name)
            if release:
                reader.release()
            most = max(most, resident() - start)
    return most

growth(True)
sys.stdout.write(json.dumps([growth(True), growth(False)]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_release_bounds_the_resident_memory(tmp_path: Path) -> None:
    count, size = 25, 8 * 2**20
    header = {
        f"t{i}": {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(count)
    }
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * size)
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-c", RESIDENT, str(tmp_path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    released, kept = json.loads(result.stdout)
    assert released < 4 * size
    assert kept > (count - 4) * size  # so the measurement does see mapped pages
