"""Loads checkpoints in Transformers one after another, each in a process of its own.

    python transformers_batch_loader.py jobs.json results.json

jobs.json holds {"ids": token ids [rows, tokens], "checkpoints": {name: folder}}, results.json for
each name either {"error": one line} or {"missing": [...], "logits": [...]}: the keys that kept
their random start, and the logits of each row's last position; null where the model loads and then
fails.

A process each because the loaders of quantized checkpoints change transformers itself. Its model
class is AutoModelForImageTextToText, or AutoModelForCausalLM where the checkpoint is text-only.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

TIMEOUT = 120


def load(folder: str) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' account of its keys."""
    loader = transformers.AutoModelForImageTextToText
    path = Path(folder) / "config.json"
    if path.exists() and '"qwen3_5"' not in path.read_text():
        loader = transformers.AutoModelForCausalLM
    return loader.from_pretrained(
        folder, output_loading_info=True, dtype=torch.bfloat16, local_files_only=True
    )


def report(folder: str, ids: list[list[int]]) -> dict[str, Any]:
    """What the module's docstring says of one checkpoint."""
    model, info = load(folder)
    found: dict[str, Any] = {"missing": sorted(map(str, info["missing_keys"])), "logits": None}
    with torch.no_grad(), contextlib.suppress(Exception):
        found["logits"] = model(input_ids=torch.tensor(ids)).logits[:, -1].float().tolist()
    return found


def attempt(folder: str, ids: list[list[int]], result_file: Path) -> None:
    """Reports on one checkpoint, in its own process."""
    log = os.open(result_file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        result = report(folder, ids)
    except Exception as error:  # noqa: BLE001 - a process edge: whatever it is, the caller reads it
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    result_file.write_text(json.dumps(result))
    os._exit(0)


def main() -> None:
    """See the module's docstring."""
    jobs_file, results_file = map(Path, sys.argv[1:])
    jobs = json.loads(jobs_file.read_text())
    torch.set_num_threads(1)
    import transformers.models.qwen3_5.modeling_qwen3_5  # noqa: F401

    for package in ("auto_round", "auto_round.inference.convert_model", "compressed_tensors"):
        with contextlib.suppress(ImportError):  # each environment has those of some formats
            importlib.import_module(package)
    fork = multiprocessing.get_context("fork")
    results = {}
    for number, (name, folder) in enumerate(jobs["checkpoints"].items()):
        file = results_file.with_name(f"{results_file.stem}-{number}.json")
        file.unlink(missing_ok=True)
        process = fork.Process(target=attempt, args=(folder, jobs["ids"], file))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
            results[name] = {"error": f"TimeoutError: killed after {TIMEOUT} seconds"}
        elif file.exists():
            results[name] = json.loads(file.read_text())
        else:
            results[name] = {"error": f"SystemExit: exit code {process.exitcode}"}
    results_file.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
