"""Scores a checkpoint against its base and prints what that cost, as JSON.

python measure_cost.py memory|time BASE CANDIDATE WINDOWS SEQLEN
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nybble.engine.load import load_model
from nybble.engine.stream import Arithmetic
from nybble.eval.compare import compare
from nybble.pipeline.manifest import peak_rss_bytes

HOW = Arithmetic(torch.device("cpu"))


def memory(base: Path, candidate: Path, windows: torch.Tensor) -> dict[str, Any]:
    scores = compare(base, candidate, windows, HOW)
    return {
        "peak_rss_bytes": peak_rss_bytes(),
        "positions": len(scores.kld),
        "kld": float(scores.kld.mean()),
    }


def forward(base: Path, candidate: Path, windows: torch.Tensor) -> float:
    """Seconds of the processor for the logits of both, as many rows at a time as ``compare``."""
    models = [load_model(folder) for folder in (base, candidate)]
    began = time.process_time()
    for model in models:
        for rows in windows.split(HOW.rows_per_pass):
            for hidden in model.hidden(rows):
                model.logits(hidden)
    return time.process_time() - began


def times(base: Path, candidate: Path, windows: torch.Tensor) -> dict[str, Any]:
    """The least of two tries each, the first of which warms up."""
    tries = []
    for _ in range(2):
        alone = forward(base, candidate, windows)
        began = time.process_time()
        compare(base, candidate, windows, HOW)
        tries.append((alone, time.process_time() - began))
    alone, compared = map(min, zip(*tries, strict=True))
    return {"forward_seconds": alone, "compare_seconds": compared}


def main() -> None:
    what, base, candidate, windows, seqlen = sys.argv[1:]
    # Ids that the tokenizer does not matter for: the models are random as well.
    shape = (int(windows), int(seqlen))
    ids = torch.randint(8192, shape, generator=torch.Generator().manual_seed(0))
    measured = {"memory": memory, "time": times}[what](Path(base), Path(candidate), ids)
    sys.stdout.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
