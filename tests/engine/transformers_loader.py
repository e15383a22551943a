"""Loads a checkpoint in Transformers, by the loader of its format, and records what came out.

    python transformers_loader.py CHECKPOINT AUTO_CLASS IDS.json LOGITS.safetensors
        [--through auto-round]

A program of its own because the loaders change transformers for the whole process, and each wants
its own environment: auto_round and compressed-tensors checkpoints need auto-round and
compressed-tensors, gptq ones optimum and gptqmodel (tools/loader_env). ``--through auto-round``
has AutoRound's loader read a gptq checkpoint, without those two.

Prints one JSON object: missing and unexpected keys, and for every trunk Linear its class and how
its weight is held when loaded, before any forward pass: {"class": ..., "packed": bool}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

CODES = ("qweight", "weight_packed")


def load(folder: str, auto_class: str, through: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """The model and transformers' account of its keys."""
    options: dict[str, Any] = {}
    if through == "auto-round":
        options["quantization_config"] = transformers.AutoRoundConfig()
    loader = getattr(transformers, auto_class)
    model, info = loader.from_pretrained(
        folder, output_loading_info=True, dtype=torch.bfloat16, local_files_only=True, **options
    )
    return model, info


def linears(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Class of every trunk Linear by name, and whether it holds packed codes."""
    return {
        name: {
            "class": type(module).__name__,
            "packed": any(hasattr(module, codes) for codes in CODES),
        }
        for name, module in model.named_modules()
        if name.endswith("_proj") or ".in_proj_" in name
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("auto_class")
    parser.add_argument("ids", type=Path)
    parser.add_argument("logits", type=Path)
    parser.add_argument("--through", choices=["auto-round"])
    args = parser.parse_args()
    model, info = load(args.checkpoint, args.auto_class, args.through)
    found = linears(model)
    ids = torch.tensor(json.loads(args.ids.read_text()))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    save_file({"logits": logits.float().contiguous()}, args.logits)
    keys = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys")}
    print(json.dumps({**keys, "linears": found}))


if __name__ == "__main__":
    main()
