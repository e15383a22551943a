from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nybble.checkpoint.dtypes import SAFETENSORS_DTYPES, TORCH_DTYPES
from nybble.checkpoint.headers import MAX_HEADER_BYTES, read_header
from nybble.core.errors import CheckpointError


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def craft(folder: Path, header: object, data: bytes = b"") -> Path:
    """A file of these bytes: ``header`` as JSON, or as it is if it is bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object, shape: object, *span: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(span)}


def test_reads_what_the_reference_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"w": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.ones(5, dtype=torch.int32)}
    save_file(tensors, path, metadata={"format": "pt"})
    infos = read_header(path)
    assert list(infos) == ["b", "w"]  # file order: the library puts larger items first
    assert (infos["w"].dtype, infos["w"].shape, infos["w"].file) == ("BF16", (2, 3), path)
    assert (infos["w"].nbytes, infos["w"].numel) == (12, 6)
    assert infos["b"].stop == infos["w"].start
    assert infos["w"].stop == path.stat().st_size


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    header = {"e": entry("F32", [3, 0], 4, 4), "s": entry("F32", [], 0, 4)}
    infos = read_header(craft(tmp_path, header, b"1234"))
    assert (infos["e"].nbytes, infos["e"].numel) == (0, 0)
    assert (infos["s"].nbytes, infos["s"].numel) == (4, 1)


def test_an_empty_tensor_shares_its_start_with_the_next(tmp_path: Path) -> None:
    header = {"s": entry("F32", [], 0, 4), "e": entry("F32", [0], 0, 0)}
    assert list(read_header(craft(tmp_path, header, b"1234"))) == ["e", "s"]


def test_a_file_without_tensors_is_sound(tmp_path: Path) -> None:
    assert read_header(craft(tmp_path, {"__metadata__": {"format": "pt"}})) == {}


def test_dtype_names_agree_with_the_reference_library(tmp_path: Path) -> None:
    assert {SAFETENSORS_DTYPES[dtype]: dtype for dtype in TORCH_DTYPES.values()} == TORCH_DTYPES
    for name, dtype in TORCH_DTYPES.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({"x": torch.zeros(16, dtype=torch.uint8).view(dtype)}, path)
        assert read_header(path)["x"].dtype == name


def test_missing_file(tmp_path: Path) -> None:
    message = refusal(lambda: read_header(tmp_path / "no.safetensors"))
    assert "no.safetensors: No such file" in message


def test_not_a_regular_file(tmp_path: Path) -> None:
    pipe = tmp_path / "p.safetensors"
    os.mkfifo(pipe)
    assert "not a regular file" in refusal(lambda: read_header(pipe))
    assert "not a regular file" in refusal(lambda: read_header(tmp_path))


@pytest.mark.parametrize("size", [0, 1, 7])
def test_shorter_than_the_length(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x02" * size)
    message = refusal(lambda: read_header(path))
    assert f"x.safetensors: {size} bytes is too short" in message


@pytest.mark.parametrize("length", [0, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_header_length_out_of_range(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    assert f"header length {length} is not in 1.." in refusal(lambda: read_header(path))


def test_header_beyond_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(MAX_HEADER_BYTES.to_bytes(8, "little") + b"{}")
    message = refusal(lambda: read_header(path))
    assert "truncated within the header, 99999998 of its 100000000 bytes are missing" in message


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "run 'git lfs pull'" in refusal(lambda: read_header(path))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ("{}".encode("utf-16"), "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "expected a JSON object, found []"),
        (b"3", "expected a JSON object, found 3"),
        (b'{"a": 1, "a": 2}', "the name 'a' appears twice"),
        (b'{"a": {"dtype": "U8", "dtype": "I8"}}', "the name 'dtype' appears twice"),
        (b'{"__metadata__": [1]}', "__metadata__ is not an object of strings"),
        (b'{"__metadata__": {"format": 1}}', "__metadata__ is not an object of strings"),
        (b'{"\\ud800": {}}', "the name is not valid Unicode"),
        (b'{"a\\nb": 1}', "tensor 'a\\nb': expected an object, found 1"),
        (b'{"' + b"a" * 5000 + b'": 1}', "aaa...aaa"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_broken_json(tmp_path: Path, header: bytes, words: str) -> None:
    assert words in refusal(lambda: read_header(craft(tmp_path, header)))


@pytest.mark.parametrize("dtype", ["F7", "bf16", "", None, 3, ["U8"], {"U8": 1}])
def test_unknown_dtype(tmp_path: Path, dtype: object) -> None:
    path = craft(tmp_path, {"w": entry(dtype, [1], 0, 1)}, b"1")
    assert f"x.safetensors: tensor 'w': unknown dtype {dtype!r}" in refusal(
        lambda: read_header(path)
    )


@pytest.mark.parametrize(
    "shape",
    [
        [-1],
        [1.0],
        [True],
        ["1"],
        [None],
        [[1]],
        "1",
        1,
        None,
        {"0": 1},
        [2**63],
        [2**62, 2**62],
        [0, 2**62, 4],
        [1] * 65,
        [float("nan")],
    ],
    ids=lambda value: str(value)[:24],
)
def test_absurd_shape(tmp_path: Path, shape: object) -> None:
    path = craft(tmp_path, {"w": entry("U8", shape, 0, 1)}, b"1")
    assert "tensor 'w': not a usable shape: " in refusal(lambda: read_header(path))


@pytest.mark.parametrize(
    "span",
    [[], [0], [0, 1, 2], [1, 0], [-1, 0], [0, True], [0.0, 1.0], ["0", "1"], [0, 2**64]],
    ids=str,
)
def test_absurd_byte_range(tmp_path: Path, span: list[object]) -> None:
    path = craft(tmp_path, {"w": entry("U8", [1], *span)}, b"1")
    assert "tensor 'w': not a byte range: " in refusal(lambda: read_header(path))


def test_missing_fields(tmp_path: Path) -> None:
    assert "unknown dtype None" in refusal(lambda: read_header(craft(tmp_path, {"w": {}})))


def test_claimed_sizes_are_not_allocated(tmp_path: Path) -> None:
    path = craft(tmp_path, {"w": entry("U8", [2**50], 0, 2**50)}, b"12")
    assert f"{2**50 - 2} of " in refusal(lambda: read_header(path))


def test_range_does_not_match_the_shape(tmp_path: Path) -> None:
    path = craft(tmp_path, {"w": entry("BF16", [2, 3], 0, 11)}, b"1" * 11)
    message = refusal(lambda: read_header(path))
    assert "tensor 'w': BF16 [2, 3] needs 12 bytes, its range [0, 11] holds 11" in message


def test_overlap(tmp_path: Path) -> None:
    header = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 3, 7)}
    message = refusal(lambda: read_header(craft(tmp_path, header, b"1234567")))
    assert "tensor 'b' overlaps tensor 'a' by 1 bytes" in message


def test_holes(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], 1, 2), "b": entry("U8", [1], 2, 3)}
    message = refusal(lambda: read_header(craft(tmp_path, header, b"123")))
    assert "a hole of 1 bytes between the header and tensor 'a'" in message
    header = {"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 3, 4)}
    message = refusal(lambda: read_header(craft(tmp_path, header, b"1234")))
    assert "a hole of 2 bytes between tensor 'a' and tensor 'b'" in message


def test_bytes_without_an_owner(tmp_path: Path) -> None:
    path = craft(tmp_path, {"a": entry("U8", [1], 0, 1)}, b"123")
    assert "2 bytes after tensor 'a' have no owner" in refusal(lambda: read_header(path))


def test_truncated_data(tmp_path: Path) -> None:
    path = craft(tmp_path, {"a": entry("F32", [2], 0, 8)}, b"12345")
    message = refusal(lambda: read_header(path))
    assert "truncated, 3 of " in message
    assert "download the file again" in message
