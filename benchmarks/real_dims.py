"""One block of each kind in Qwen3.6-27B's dimensions, random weights, both algorithms.

    .venv/bin/python benchmarks/real_dims.py [--rows 4 --seqlen 256 --iters 4] [--device cuda]

Shows that the real shapes go through: memory, packing, the shapes that serving kernels ask for
under tensor parallelism, and where the time goes. Prints a table and writes it to
docs/benchmarks/real_dims_DEVICE.md. With the rows of a real run (--rows 128 --seqlen 2048
--iters 200) the time of 64 blocks is extrapolated.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

from nybble.demo import bundled_model

OUT = Path(__file__).parents[1] / "docs" / "benchmarks"
GROUP = 128
BLOCKS = {"linear_attention": 48, "full_attention": 16}
"""Of each kind in the real model."""
CONFIG: dict[str, Any] = {
    "vocab_size": 4096,  # the tokenizer's: the head plays no part here
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 2,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "layer_types": list(BLOCKS),
    "attn_output_gate": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
# Engines split these modules' outputs over tensor-parallel ranks, and the others' inputs.
COLUMN_PARALLEL = ("qkv", "in_proj_z", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@dataclass(frozen=True)
class BlockCost:
    """Seconds of one block, and the log's rows of its modules."""

    kind: str
    total: float
    modules: float | None
    """Of that, inside GPTQ (factorizing and rounding); the rest is running the block."""
    rows: list[dict[str, str]]


def write_base(folder: Path) -> None:
    """Random weights of plausible sizes, and the bundled model's tokenizer."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**CONFIG)).state_dict()
    tensors = {name: _random(name, tuple(t.shape)) for name, t in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", **CONFIG}
    (folder / "config.json").write_text(json.dumps(config))
    with bundled_model() as tiny:
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.empty(shape, dtype=torch.bfloat16).normal_()
    if name.endswith("A_log"):
        return values.abs_()
    if name.endswith("linear_attn.norm.weight"):
        return values.mul_(0.1).add_(1)
    return values.mul_(0.1 if len(shape) == 1 else shape[-1] ** -0.5)


def quantize(base: Path, out: Path, overrides: list[str], device: str) -> int:
    """Runs ``nybble quantize`` in its own process; returns its peak resident bytes."""
    command = [sys.executable, "-m", "nybble", "quantize", str(base), "-o", str(out)]
    command += ["--recipe", "tiny-demo", "--device", device]
    for override in overrides:
        command += ["--set", override]
    subprocess.run(command, check=True)
    return int(json.loads((out / "nybble.json").read_text())["cost"]["peak_rss_bytes"])


def costs(out: Path) -> list[BlockCost]:
    """What quant_log.csv says of each block."""
    with (out / "quant_log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for number, kind in enumerate(BLOCKS):
        block = [row for row in rows if row["block"] == str(number)]
        timed = [float(row["seconds"]) for row in block if row["seconds"]]
        found.append(
            BlockCost(kind, float(block[0]["block_seconds"]), sum(timed) if timed else None, block)
        )
    return found


def check_shapes(rows: list[dict[str, str]]) -> list[str]:
    """Marlin's rules on every quantized module, split over 1, 2, 4 and 8 ranks; one line each."""
    lines = []
    for row in rows:
        outs, ins = int(row["out_features"]), int(row["in_features"])
        legal = []
        for ranks in (1, 2, 4, 8):
            split_outs = any(part in row["module"] for part in COLUMN_PARALLEL)
            n, k = (outs // ranks, ins) if split_outs else (outs, ins // ranks)
            if outs % ranks == 0 and ins % ranks == 0 and n % 64 == 0 and k % GROUP == 0:
                legal.append(str(ranks))
        name = row["module"].split(".", 3)[-1]
        lines.append(f"| {name} | {outs} x {ins} | {', '.join(legal)} |")
    return lines


def check_weights(base: Path, out: Path) -> float:
    """The largest error of round to nearest in steps of the grid, by reading the packed file.

    At most half a step inside the grid and a whole one at its shorter end: anything more would be
    a packing error.
    """
    from nybble.checkpoint.reader import CheckpointReader
    from nybble.engine.weights import dense_weight
    from nybble.quant.grid import IntGrid

    name = "model.layers.0.linear_attn.out_proj.weight"
    with CheckpointReader(base) as source, CheckpointReader(out) as result:
        weight = source.read(name).float()
        scales = result.read(name.replace("weight", "scales")).T.float().abs()
        dense = dense_weight(result, name, IntGrid(4, GROUP, True))
    steps = (dense - weight).abs().view(*scales.shape, -1) / scales.unsqueeze(-1)
    return float(steps.max())


def report(name: str, found: list[BlockCost], peak: int, tokens: str) -> list[str]:
    """Table lines of one algorithm."""
    lines = []
    for cost in found:
        inside = "" if cost.modules is None else f"{cost.modules:.1f}"
        outside = "" if cost.modules is None else f"{cost.total - cost.modules:.1f}"
        lines.append(
            f"| {name} | {cost.kind} | {tokens} | {cost.total:.1f} | {inside} | {outside} "
            f"| {peak / 1e9:.2f} |"
        )
    return lines


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--iters", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    text = ["calibration.source=stdlib", "calibration.layout=pack"]
    text += [f"calibration.rows={args.rows}", f"calibration.seqlen={args.seqlen}"]
    tokens = f"{args.rows} x {args.seqlen}"
    algorithms = {
        "rtn": ["algorithm.name=rtn", *text],
        "gptq": ["algorithm.name=gptq", *text],
        f"signround, {args.iters} it": [f"algorithm.iters={args.iters}", *text],
    }
    lines, sums, shapes = [], {}, []
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        base.mkdir()
        write_base(base)
        for name, overrides in algorithms.items():
            out = Path(scratch) / "out"
            peak = quantize(base, out, overrides, args.device)
            found = costs(out)
            lines += report(name, found, peak, tokens)
            sums[name] = sum(BLOCKS[cost.kind] * cost.total for cost in found)
            shapes = [line for cost in found for line in check_shapes(cost.rows)]
            if name == "rtn":
                print(f"largest error of round to nearest: {check_weights(base, out):.3f} steps")
            subprocess.run(["rm", "-rf", str(out)], check=True)
    page = _page(args, lines, sums, shapes)
    (OUT / f"real_dims_{args.device.partition(':')[0]}.md").write_text(page)
    print(page)


def _page(
    args: argparse.Namespace, lines: list[str], sums: dict[str, float], shapes: list[str]
) -> str:
    threads = torch.get_num_threads()
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else "none"
    total = "\n".join(f"- {name}: {seconds / 60:.1f} min" for name, seconds in sums.items())
    return f"""# One block of each kind in Qwen3.6-27B's dimensions

`benchmarks/real_dims.py --rows {args.rows} --seqlen {args.seqlen} --iters {args.iters} --device
{args.device}`; random weights; {platform.machine()}, {threads} threads, GPU: {gpu}; torch
{torch.__version__}, Python {platform.python_version()}. Peak memory is the whole process's
(Python and the libraries are about 0.4 GB of it), host only.

| algorithm | block | tokens | seconds | of that GPTQ itself | running the block | peak GB |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}

Extrapolated to the real model's 48 + 16 blocks with as many rows and iterations as here (an
extrapolation: no 64-block run was made):

{total}

Tensor-parallel sizes under which every shard keeps Marlin's shapes (outputs a multiple of 64,
inputs per rank a multiple of the group of {GROUP}):

| module | out x in | legal ranks |
|---|---|---|
{chr(10).join(shapes)}
"""


if __name__ == "__main__":
    main()
