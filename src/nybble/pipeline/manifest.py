"""nybble.json: what was made, from what, how, and the hash of every tensor."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from nybble.checkpoint.reader import CheckpointReader
from nybble.core.atomic import write_bytes_atomic
from nybble.data.rows import Rows
from nybble.recipe.schema import Recipe

SCHEMA_VERSION = 1
_END_BYTES = 4096


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the result."""

    fate: str
    """``kept`` or ``quantized``"""
    sha256: str


@dataclass(frozen=True)
class Cost:
    """What the run took."""

    seconds: float
    peak_rss_bytes: int


def job_fingerprint(recipe: Recipe, base: CheckpointReader, rows: Rows | None) -> str:
    """SHA-256 that names one job: recipe, base and calibration rows.

    Of the base, config.json, the headers and both ends of every tensor are read: enough to tell
    two checkpoints apart without reading 54 GB.
    """
    digest = hashlib.sha256(recipe.fingerprint().encode())
    digest.update(json.dumps(base.config, sort_keys=True).encode())
    for name, info in base.index.tensors.items():
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode(errors="surrogatepass"))
        data = base.raw(name)
        digest.update(data[:_END_BYTES])
        digest.update(data[-_END_BYTES:])
    base.release()
    digest.update((rows.digest if rows else "no calibration").encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class RunFacts:
    """What the manifest says of one run."""

    job: str
    base: str
    base_sha256: Mapping[str, str]
    """Of each weight that was quantized, before it was."""
    recipe: Recipe
    rows: Rows | None
    device: str
    compute_dtype: str
    tensors: Mapping[str, TensorRecord]
    cost: Cost


def write_manifest(path: Path, facts: RunFacts) -> None:
    """Writes nybble.json; raises OutputError if the folder cannot be written."""
    rows, calibration = facts.rows, None
    if rows is not None:
        shape = tuple(rows.token_ids.shape)
        calibration = {"shape": shape, "digest": rows.digest, "row_sha256": rows.hashes}
    manifest = {
        "schema": SCHEMA_VERSION,
        "job": facts.job,
        "nybble": version("nybble"),
        "base": {"name": facts.base, "quantized_tensors_sha256": dict(facts.base_sha256)},
        "recipe": facts.recipe.model_dump(),
        "calibration": calibration,
        "environment": {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "device": facts.device,
            "compute_dtype": facts.compute_dtype,
            "threads": torch.get_num_threads(),
        },
        "cost": asdict(facts.cost),
        "tensors": {name: asdict(record) for name, record in sorted(facts.tensors.items())},
    }
    write_bytes_atomic(path, (json.dumps(manifest, indent=1) + "\n").encode())


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a process takes that over from the one that started it.
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
