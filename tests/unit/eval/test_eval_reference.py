from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.outputs import CPU, output_of

from nybble.core.errors import CheckpointError, OutputError
from nybble.data.rows import rows_of
from nybble.eval.reference import Reference, ReferenceFacts, load_reference, save_reference
from nybble.eval.statistics import NoiseFloor
from nybble.eval.top_k import TopK, top_k

WINDOWS = torch.arange(12).view(3, 4)
POSITIONS = 9
FACTS = ReferenceFacts(
    base="base",
    base_sha256="a" * 64,
    head_sha256="c" * 64,
    vocab_size=30,
    tokenizer_sha256="b" * 64,
    text="3 windows",
    windows_sha256=rows_of(WINDOWS.tolist(), 4).digest,
    arithmetic="float32 on cpu",
    noise=(NoiseFloor("row by row", 1e-9, 1e-10, 1e-8, 1.0),),
    nybble="0",
)


def exact(dtype: torch.dtype = torch.bfloat16) -> Reference:
    states = torch.randn(POSITIONS, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Reference(FACTS, WINDOWS, states)


def truncated() -> Reference:
    logits = torch.randn(POSITIONS, 30, generator=torch.Generator().manual_seed(0))
    return Reference(FACTS, WINDOWS, top_k(output_of(logits), WINDOWS[:, 1:].flatten(), 3, CPU))


MAKE: dict[str, Callable[[], Reference]] = {"exact": exact, "top-k": truncated}
each_form = pytest.mark.parametrize("form", MAKE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exact_one_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    made = exact(dtype)
    save_reference(tmp_path / "r", made)
    found = load_reference(tmp_path / "r")
    assert found.facts == FACTS
    assert found.windows.dtype == torch.int64
    assert torch.equal(found.windows, WINDOWS)
    assert isinstance(found.predictions, torch.Tensor)
    assert found.predictions.dtype == dtype
    assert torch.equal(found.predictions, made.predictions)


def test_a_truncated_one_comes_back_bit_for_bit(tmp_path: Path) -> None:
    made = truncated()
    save_reference(tmp_path / "r", made)
    found = load_reference(tmp_path / "r").predictions
    assert isinstance(found, TopK)
    for name, tensor in vars(made.predictions).items():
        again = getattr(found, name)
        assert again.dtype == tensor.dtype
        assert torch.equal(again, tensor), name


def test_states_may_be_a_part_of_a_larger_tensor(tmp_path: Path) -> None:
    """As they are: every window's last position is cut off."""
    whole = torch.randn(3, 4, 8)
    save_reference(
        tmp_path / "r", Reference(FACTS, WINDOWS, whole.transpose(0, 1)[:3].flatten(0, 1))
    )
    assert load_reference(tmp_path / "r").predictions.shape == (9, 8)


@each_form
def test_nothing_else_is_left_in_the_folder(tmp_path: Path, form: str) -> None:
    save_reference(tmp_path / "r", MAKE[form]())
    save_reference(tmp_path / "r", MAKE[form]())
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*/none/r: ") as caught:
        save_reference(tmp_path / "none" / "r", exact())
    assert "\n" not in str(caught.value)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_reference(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "text": b"some notes\nof mine\n",
    "a huge header": (2**60).to_bytes(8, "little") + b"{}",
    "no header": (2).to_bytes(8, "little") + b"[]",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r").write_bytes(content)
    assert "is no reference" in refused(tmp_path / "r")


def test_another_programs_tensors_are_refused(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}, {"nybble": "{}"}, {"nybble": "x"}, {"nybble": "[[[["}):
        save_file({"windows": WINDOWS, "states": torch.zeros(9, 2)}, tmp_path / "r", metadata)
        assert "is no reference" in refused(tmp_path / "r")


@each_form
def test_a_file_cut_short_is_refused(tmp_path: Path, form: str) -> None:
    save_reference(tmp_path / "r", MAKE[form]())
    whole = (tmp_path / "r").read_bytes()
    for length in (7, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "r").write_bytes(whole[:length])
        refused(tmp_path / "r")


def changed(path: Path, form: str, **tensors: torch.Tensor | None) -> Path:
    """A reference with some tensors put in, exchanged, or taken out."""
    save_reference(path, MAKE[form]())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    merged = {**load_file(path), **tensors}
    save_file({name: t for name, t in merged.items() if t is not None}, path, metadata)
    return path


Tensors = dict[str, torch.Tensor | None]
BROKEN: dict[str, tuple[str, Tensors]] = {
    "no windows": ("exact", {"windows": None}),
    "no states": ("exact", {"states": None}),
    "no ids": ("top-k", {"ids": None}),
    "no log-probabilities": ("top-k", {"log_probs": None}),
    "no tail": ("top-k", {"tail": None}),
    "no text's own": ("top-k", {"token_log_probs": None}),
    "a state too few": ("exact", {"states": torch.zeros(8, 2)}),
    "states in three dimensions": ("exact", {"states": torch.zeros(3, 3, 2)}),
    "states of integers": ("exact", {"states": torch.zeros(9, 2, dtype=torch.int32)}),
    "windows in one dimension": ("exact", {"windows": torch.zeros(12, dtype=torch.int32)}),
    "windows of floats": ("exact", {"windows": WINDOWS.float()}),
    "other windows": ("exact", {"windows": WINDOWS.int() + 1}),
    "windows of one token": (
        "exact",
        {"windows": torch.zeros(3, 1, dtype=torch.int32), "states": torch.zeros(0, 2)},
    ),
    "no window": (
        "exact",
        {"windows": torch.zeros(0, 4, dtype=torch.int32), "states": torch.zeros(0, 2)},
    ),
    "an id too few": ("top-k", {"ids": torch.zeros(8, 3, dtype=torch.int32)}),
    "ids of floats": ("top-k", {"ids": torch.zeros(9, 3)}),
    "ids past the vocabulary": ("top-k", {"ids": torch.full((9, 3), 30, dtype=torch.int32)}),
    "negative ids": ("top-k", {"ids": -torch.ones(9, 3, dtype=torch.int32)}),
    "no most likely token": (
        "top-k",
        {"ids": torch.zeros(9, 0, dtype=torch.int32), "log_probs": torch.zeros(9, 0)},
    ),
    "fewer log-probabilities than ids": ("top-k", {"log_probs": torch.zeros(9, 2)}),
    "log-probabilities of integers": ("top-k", {"log_probs": torch.zeros(9, 3).int()}),
    "a tail too few": ("top-k", {"tail": torch.zeros(8).double()}),
    "a text's own too few": ("top-k", {"token_log_probs": torch.zeros(8).double()}),
}


@pytest.mark.parametrize(("form", "tensors"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, form: str, tensors: Tensors) -> None:
    refused(changed(tmp_path / "r", form, **tensors))
