"""A base's predictions on a text, in a file: candidates are scored without the base.

Two forms. ``exact`` holds the hidden states after the final norm: any figure can still be
computed, but the base's output head is needed. ``top-k`` holds each position's most likely tokens
and needs nothing else; its divergence is a lower bound (see ``top_k``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nybble.core.atomic import fsync_path
from nybble.core.errors import CheckpointError, OutputError
from nybble.data.rows import rows_of
from nybble.eval.statistics import NoiseFloor
from nybble.eval.top_k import TopK

_METADATA_KEY = "nybble"


class ReferenceFacts(BaseModel):
    """What a reference is of, and how it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["nybble.reference/1"] = "nybble.reference/1"
    base: str
    base_sha256: str
    """Of the base's tensors: ``ModelWeights.sha256``."""
    head_sha256: str | None
    """Of the output head's bytes alone; None: it is quantized."""
    vocab_size: int
    """Rows of the output head."""
    tokenizer_sha256: str
    text: str
    """Where the windows come from."""
    windows_sha256: str
    """Of the token ids: ``Rows.digest``."""
    arithmetic: str
    """Type and device of the base's pass."""
    noise: tuple[NoiseFloor, ...]
    nybble: str
    """The version that made it."""


@dataclass(frozen=True)
class Reference:
    """A file's content."""

    facts: ReferenceFacts
    windows: torch.Tensor
    """int64 [W, T]"""
    predictions: torch.Tensor | TopK
    """The states of every scored position, [P, D]; or their most likely tokens."""


def save_reference(path: Path, reference: Reference) -> None:
    """Writes the file; it appears whole or not at all. Raises OutputError if it cannot."""
    predictions = reference.predictions
    tensors = {"windows": reference.windows.int()}
    if isinstance(predictions, TopK):
        tensors |= {
            "ids": predictions.ids,
            "log_probs": predictions.log_probs,
            "tail": predictions.tail,
            "token_log_probs": predictions.token_log_probs,
        }
    else:
        tensors["states"] = predictions.contiguous()
    metadata = {_METADATA_KEY: reference.facts.model_dump_json()}
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata)
        fsync_path(partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error}") from error


def load_reference(path: Path) -> Reference:
    """Reads a file of either form. Raises CheckpointError if it is none, or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = ReferenceFacts.model_validate_json((file.metadata() or {})[_METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        windows, predictions = tensors["windows"], tensors.get("states")
        if predictions is None:
            predictions = TopK(*(tensors[name] for name in _TRUNCATED))
    except (OSError, SafetensorError, KeyError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is no reference of this program: {reason}") from error
    wrong = _wrong(facts, windows, predictions)
    if wrong:
        raise CheckpointError(f"{path} is broken: {wrong}")
    return Reference(facts=facts, windows=windows.long(), predictions=predictions)


_TRUNCATED = ("ids", "log_probs", "tail", "token_log_probs")


def _wrong(
    facts: ReferenceFacts, windows: torch.Tensor, predictions: torch.Tensor | TopK
) -> str | None:
    """What of a file's content cannot be; None: nothing."""
    if windows.dtype != torch.int32 or windows.dim() != 2 or min(windows.shape) < 1:
        return f"its windows are {windows.dtype} {list(windows.shape)}"
    count = windows.shape[0] * (windows.shape[1] - 1)
    truncated = isinstance(predictions, TopK)
    found = vars(predictions) if isinstance(predictions, TopK) else {"states": predictions}
    several = (count, *next(iter(found.values())).shape[1:2])
    for name, tensor in found.items():
        shape = (count,) if name in ("tail", "token_log_probs") else several
        if tensor.shape != shape or not tensor.numel():
            return f"its {name} are {list(tensor.shape)} for windows {list(windows.shape)}"
        if tensor.is_floating_point() == (name == "ids"):
            return f"its {name} are {tensor.dtype}"
    for ids in (windows, found["ids"]) if truncated else (windows,):
        lowest, highest = map(int, ids.aminmax())
        if lowest < 0 or highest >= facts.vocab_size:
            return f"it has token ids from {lowest} to {highest}, of {facts.vocab_size}"
    if rows_of(windows.tolist(), windows.shape[1]).digest != facts.windows_sha256:
        return "its windows are not those that it was made on"
    return None
