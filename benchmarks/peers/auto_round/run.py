"""Quantize one checkpoint with auto-round, the peer nybble is compared with.

Standalone: run by the interpreter of auto-round's own environment, never imported by nybble.

    .bench-venv/auto_round/bin/python benchmarks/peers/auto_round/run.py JOB.json RESULT.json

JOB: ``model`` (checkpoint folder), ``out`` (folder to create), ``bits``, ``group_size``, ``sym``,
``iters`` (0: plain round-to-nearest, no data), ``seed``, ``threads``; with ``iters`` also
``dataset`` (JSON lines of {"text": ...}), ``nsamples``, ``seqlen``, ``batch_size``. Optional
``compile``: false (if not given), true, or null for auto-round's own choice, which is true from
ten iterations on. But on a CPU (torch 2.13.0) the compiled no-grad pass of a linear-attention
block under autocast gives NaN; auto-round then keeps plain rounding and says so only in a loss in
its log. A job that ends so is an error here.

Everything else not in the job is left at auto-round's published default. The model is quantized
as text only: auto-round takes a config with a vision part down a path that wants an image
processor. So names in ``out`` begin with ``model.layers.``, not ``model.language_model.layers.``,
and there are no vision or MTP tensors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

FORMAT = "auto_round:auto_gptq"
TEXT_PREFIX = "model.language_model."
DROPPED = ("model.visual.", "mtp.")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
TUNING_LINE = re.compile(r"quantization tuning time ([\d.e+-]+)")
BLOCK_LINE = re.compile(
    r"quantized (\d+)/(\d+) layers in the block"
    r"(?:, loss iter 0: (\S+) -> iter (\d+): (\S+))?"
)


class LogRecorder(logging.Handler):
    """Keeps what auto-round only tells its log: losses per block and its own tuning time."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.blocks: list[dict[str, Any]] = []
        self.seconds_tuning: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if found := TUNING_LINE.search(message):
            self.seconds_tuning = float(found[1])
        elif found := BLOCK_LINE.search(message):
            block = {"quantized": int(found[1]), "linears": int(found[2]), "at": record.created}
            if found[3]:
                block |= {
                    "loss_first": float(found[3]),
                    "loss_best": float(found[5]),
                    "best_iter": int(found[4]),
                }
            self.blocks.append(block)


def text_only_copy(source: Path, target: Path) -> Path:
    """Write ``source``'s language model to ``target`` as a checkpoint of its own; return it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((source / "config.json").read_text())
    if "text_config" not in config:
        return source
    text = config["text_config"]
    text["architectures"] = ["Qwen3_5ForCausalLM"]
    for key in ("tie_word_embeddings", "dtype"):
        if key in config:
            text.setdefault(key, config[key])
    for key in [key for key in text if key.startswith("mtp_")]:
        del text[key]
    target.mkdir()
    (target / "config.json").write_text(json.dumps(text, indent=2))
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target / name)

    weight_map: dict[str, str] = {}
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            names = file.keys()  # no mapping: `in file` would fail
            kept = {
                name.replace(TEXT_PREFIX, "model.", 1): file.get_tensor(name)
                for name in names
                if not name.startswith(DROPPED)
            }
        if kept:
            save_file(kept, target / shard.name, {"format": "pt"})
            weight_map |= dict.fromkeys(kept, shard.name)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def row_digests(rows: Any) -> list[str]:
    """Sorted digests of token rows (each the row's ids as little-endian int64)."""
    import numpy

    encoded = (numpy.asarray(row, dtype="<i8").tobytes() for row in rows)
    return sorted(hashlib.sha256(row).hexdigest() for row in encoded)


def write_dataset(job: dict[str, Any], model: Path, target: Path) -> list[str]:
    """Copy the job's first ``nsamples`` texts to ``target``; return the digests of their rows.

    A copy, because auto-round drops blanks from the path, gives ``,`` and ``:`` in it a meaning,
    and with more texts than samples picks some at random.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = [line for line in Path(job["dataset"]).read_text().splitlines() if line.strip()]
    texts = [json.loads(line)["text"] for line in lines[: job["nsamples"]]]
    if len(texts) < job["nsamples"]:
        raise ValueError(f"{len(texts)} texts, {job['nsamples']} wanted")
    # auto-round strips the end of every text before it tokenizes it.
    rows = [
        tokenizer(text.rstrip(), truncation=True, max_length=job["seqlen"])["input_ids"]
        for text in texts
    ]
    short = [i for i, row in enumerate(rows) if len(row) < job["seqlen"]]
    if short:
        raise ValueError(f"texts {short} are shorter than {job['seqlen']} tokens")
    target.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return row_digests(rows)


def record_rows(seen: list[Any]) -> None:
    """Have auto-round's data loader also append each row it hands out to ``seen``.

    When its data cannot be read, auto-round goes on with another data set; the caller compares
    ``seen`` with the rows it asked for.
    """
    from auto_round import calib_dataset

    get_dataloader = calib_dataset.get_dataloader

    def recording(*args: Any, **kwargs: Any) -> list[Any]:
        batches = [batch for batch in get_dataloader(*args, **kwargs) if batch is not None]
        for batch in batches:
            seen.extend(batch["input_ids"].numpy())
        return batches

    calib_dataset.get_dataloader = recording


def peak_rss() -> int:
    """Peak resident bytes of this process.

    Not ru_maxrss: a child takes that over from the process that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def packed_modules(folder: Path) -> list[str]:
    """Names of the modules a checkpoint stores quantized."""
    from safetensors import safe_open

    packed: list[str] = []
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            names = file.keys()
        packed += [name[: -len(".qweight")] for name in names if name.endswith(".qweight")]
    return sorted(packed)


def rounder_for(job: dict[str, Any], model: Path, options: dict[str, Any]) -> Any:
    """auto-round's entry object, with the job's settings."""
    from auto_round import AutoRound

    return AutoRound(
        str(model),
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["sym"],
        iters=job["iters"],
        seed=job["seed"],
        device_map="cpu",
        enable_torch_compile=job.get("compile", False),
        **options,
    )


def result_of(
    rounder: Any, log: LogRecorder, rows: list[str], out: Path, seconds: dict[str, float]
) -> dict[str, Any]:
    """What the caller reads."""
    import torch

    context = rounder.model_context
    return {
        **seconds,
        # auto-round's own figure: all blocks (reference outputs, tuning, packing), no load or save.
        "seconds_tuning": log.seconds_tuning,
        "peak_rss_bytes": peak_rss(),
        "compile": bool(rounder.enable_torch_compile),
        "compile_block": bool(rounder.alg_composer.block_forward.enable_torch_compile),
        "amp": bool(context.amp),
        "amp_dtype": str(context.amp_dtype).removeprefix("torch."),
        "model_dtype": str(context.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        # Losses are mean squared errors over their batch's count of valid tokens.
        "blocks": log.blocks,
        "rows": rows,
        "out": str(out),
        "format": FORMAT,
        "prefix": "model.layers.",
        "packed": packed_modules(out),
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("auto-round", "torch", "transformers", "numpy")},
        },
    }


def quantize(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Do the job, with ``work`` for temporary files; return the result."""
    import torch

    torch.set_num_threads(job["threads"])
    from auto_round.logger import logger
    from torch._dynamo.utils import calculate_time_spent

    out = Path(job["out"])
    if out.exists():
        raise FileExistsError(out)
    model = text_only_copy(Path(job["model"]).resolve(), work / "text")
    rows: list[Any] = []
    options: dict[str, Any] = {}
    if job["iters"]:
        dataset = work / "calibration.jsonl"
        wanted = write_dataset(job, model, dataset)
        record_rows(rows)
        options = {"dataset": str(dataset)}
        options |= {key: job[key] for key in ("nsamples", "seqlen", "batch_size")}
    else:
        # Plain rounding, by the same code as tuned models (not "model free", on files).
        options = {"disable_opt_rtn": True, "disable_model_free": True}
    log = LogRecorder()
    logger.addHandler(log)

    started, clock = time.time(), time.perf_counter()
    rounder = rounder_for(job, model, options)
    seconds_load = time.perf_counter() - clock
    _, folder = rounder.quantize_and_save(str(work / "saved"), format=FORMAT)
    seconds_total = time.perf_counter() - clock

    consumed = row_digests(rows)
    if job["iters"] and consumed != wanted:
        raise RuntimeError("auto-round calibrated on other rows than the job's")
    untuned = [i for i, b in enumerate(log.blocks) if not math.isfinite(b.get("loss_first", 0.0))]
    if untuned:
        raise RuntimeError(f"no loss in blocks {untuned}: auto-round only rounded them (compile?)")
    shutil.move(folder if isinstance(folder, str) else folder[0], out)
    for block in log.blocks:
        block["at"] = round(block["at"] - started, 3)
    seconds = {
        "seconds_total": seconds_total,
        "seconds_load": seconds_load,
        # Part of the tuning, and nothing where the compiler's cache held the code already.
        "seconds_compile": calculate_time_spent()["total_wall_time"],
    }
    return result_of(rounder, log, consumed, out, seconds)


def main() -> None:
    """Read the job, set the environment libraries read on import, run, write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("result", type=Path)
    args = parser.parse_args()
    job = json.loads(args.job.read_text())
    out = Path(job["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".auto-round-", dir=out.parent.resolve()) as work:
        threads = str(job["threads"])
        os.environ |= {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TORCHINDUCTOR_COMPILE_THREADS": threads,
            # Offline, and with caches of its own, so that no run depends on one before it.
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": f"{work}/hf",
            "TORCHINDUCTOR_CACHE_DIR": f"{work}/inductor",
            "AR_WORK_SPACE": f"{work}/auto_round",
            # MTP is not tuned by either side; left on, it would be rounded here and copied there.
            "AR_DISABLE_COPY_MTP_WEIGHTS": "1",
        }
        result = quantize(job, Path(work))
    args.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
