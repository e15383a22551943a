"""Quantize one checkpoint by GPTQ with llm-compressor, the peer nybble is compared with.

Standalone: run by the interpreter of llm-compressor's own environment, never imported by nybble.

    .bench-venv/llm_compressor/bin/python run.py JOB.json RESULT.json

JOB: ``model`` (checkpoint folder), ``out`` (folder to create), ``rows`` (JSON lines, each a list
of token ids, all of one length), ``bits``, ``group_size``, ``actorder`` ("static" or null),
``damp`` (share of the Hessian's mean diagonal), ``batch_size`` (rows per forward pass),
``threads``. Optional ``dtype``: what the model runs in, "auto" (if not given: the checkpoint's own,
which is the published default) or "float32".

Everything else is left at llm-compressor's published default: blocks of 128 columns, plain min-max
scales, layer by layer with the error of quantized layers passed on. Symmetric weights of every
Linear but lm_head, the vision tower, the MTP head and Gated DeltaNet's in_proj_a and in_proj_b.
``out`` is a compressed-tensors checkpoint under the names of the base, with its MTP tensors, which
llm-compressor copies.

What would be a silent change of the job is an error here: a module that was only rounded because
its Hessian could not be factorized, and calibration on other rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

IGNORED = ["lm_head", r"re:.*in_proj_(a|b)$", "re:.*visual.*", "re:.*mtp.*"]


def read_rows(path: Path) -> list[list[int]]:
    """The job's token rows; ValueError if they differ in length."""
    rows: list[list[int]] = [json.loads(line) for line in path.read_text().splitlines()]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"{path}: rows of one length wanted")
    return rows


def row_digest(row: Any) -> str:
    """Digest of a row's ids as little-endian int64."""
    import numpy

    return hashlib.sha256(numpy.asarray(row, dtype="<i8").tobytes()).hexdigest()


def batches(rows: list[list[int]], batch_size: int, seen: set[str]) -> Any:
    """A data loader of the rows, in order; puts the digest of each row it hands out in ``seen``.

    A loader of our own: llm-compressor's own one picks, shuffles and cuts rows.
    """
    import torch
    from torch.utils.data import DataLoader

    def collate(batch: list[list[int]]) -> dict[str, torch.Tensor]:
        seen.update(row_digest(row) for row in batch)
        token_ids = torch.tensor(batch)
        return {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}

    # DataLoader only asks for a length and items.
    return DataLoader(rows, batch_size=batch_size, shuffle=False, collate_fn=collate)


class ModuleLog:
    """What happened inside llm-compressor's calls that quantize modules."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.quantized = 0
        self.only_rounded: list[str] = []

    def attach(self) -> None:
        """Have GPTQModifier report to this object for the rest of the process."""
        from llmcompressor.modifiers.gptq import GPTQModifier

        compress = GPTQModifier.compress_module_list

        def recording(modifier: Any, modules: list[Any]) -> None:
            began = time.perf_counter()
            compress(modifier, modules)
            self.seconds += time.perf_counter() - began
            self.quantized += len(modules)
            self.only_rounded = list(modifier._rtn_fallback_module_names)

        GPTQModifier.compress_module_list = recording


def peak_rss() -> int:
    """Peak resident bytes of this process.

    Not ru_maxrss: a child takes that over from the process that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def modifier_for(job: dict[str, Any]) -> Any:
    """llm-compressor's GPTQ with the job's settings."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    per_channel = job["group_size"] == -1
    weights = {
        "num_bits": job["bits"],
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else job["group_size"],
    }
    return GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=IGNORED,
        actorder=job["actorder"],
        dampening_frac=job["damp"],
    )


def result_of(log: ModuleLog, job: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """What the caller reads."""
    import torch

    return {
        **seconds,
        # Factorization of the Hessians and rounding, without the passes that feed them.
        "seconds_quantizing": log.seconds,
        "peak_rss_bytes": peak_rss(),
        "quantized": log.quantized,
        "threads": torch.get_num_threads(),
        "rows": sorted(map(row_digest, read_rows(Path(job["rows"])))),
        "out": job["out"],
        "format": "compressed-tensors",
        "versions": {
            "python": sys.version.split()[0],
            **{
                name: version(name)
                for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")
            },
        },
    }


def quantize(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Do the job, with ``work`` for the files until they are complete; return the result."""
    import torch

    torch.set_num_threads(job["threads"])
    from llmcompressor import oneshot
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    out = Path(job["out"])
    if out.exists():
        raise FileExistsError(out)
    log = ModuleLog()
    log.attach()
    seen: set[str] = set()
    rows = read_rows(Path(job["rows"]))

    clock = time.perf_counter()
    # Not AutoModelForCausalLM: it renames the trunk's tensors.
    model = AutoModelForImageTextToText.from_pretrained(
        job["model"], dtype=job.get("dtype", "auto")
    )
    loaded = time.perf_counter()
    oneshot(
        model=model,
        # Given, or llm-compressor makes one for images and videos, which needs torchvision.
        processor=AutoTokenizer.from_pretrained(job["model"]),
        dataset=batches(rows, job["batch_size"], seen),
        recipe=modifier_for(job),
    )
    quantized = time.perf_counter()
    model.save_pretrained(work / "saved", save_compressed=True)
    saved = time.perf_counter()

    if log.only_rounded:
        raise RuntimeError(f"rounded only, no GPTQ: {', '.join(log.only_rounded)}")
    if seen != set(map(row_digest, rows)):
        raise RuntimeError("llm-compressor calibrated on other rows than the job's")
    shutil.move(work / "saved", out)
    seconds = {
        "seconds_total": saved - clock,
        "seconds_load": loaded - clock,
        "seconds_oneshot": quantized - loaded,
        "seconds_save": saved - quantized,
    }
    return result_of(log, job, seconds)


def main() -> None:
    """Read the job, set the environment libraries read on import, run, write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("result", type=Path)
    args = parser.parse_args()
    job = json.loads(args.job.read_text())
    out = Path(job["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".llm-compressor-", dir=out.parent.resolve()) as work:
        threads = str(job["threads"])
        os.environ |= {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # Offline, and with a cache of its own, so that no run depends on one before it.
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": f"{work}/hf",
            # Switching its log off breaks its progress lines, and with them the run (0.14.0.1).
            "LLM_COMPRESSOR_LOG_LEVEL": "WARNING",
        }
        result = quantize(job, Path(work))
    args.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
