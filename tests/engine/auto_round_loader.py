"""Loads a checkpoint in Transformers through AutoRound's own loader and records what came out.

    python auto_round_loader.py CHECKPOINT AUTO_CLASS IDS.json LOGITS.safetensors

A program of its own because importing auto_round changes transformers for the whole process.
Prints one JSON object: missing and unexpected keys, class of every trunk Linear.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file


def main() -> None:
    """See the module's docstring."""
    folder, auto_class, ids_file, logits_file = sys.argv[1:]
    loader = getattr(transformers, auto_class)
    model, info = loader.from_pretrained(
        folder, output_loading_info=True, dtype=torch.bfloat16, local_files_only=True
    )
    ids = torch.tensor(json.loads(Path(ids_file).read_text()))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    save_file({"logits": logits.float().contiguous()}, logits_file)
    linears = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name.endswith("_proj") or ".in_proj_" in name
    }
    keys = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys")}
    print(json.dumps({**keys, "linears": linears}))


if __name__ == "__main__":
    main()
