"""Makes the bundled checkpoint of a training run, measures it and writes its README.

python -m tiny_model.export --build tiny-build --out src/nybble/assets/tiny
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel

from nybble.data.rows import build_rows
from nybble.engine.load import LoadedModel, load_model
from nybble.engine.stream import Arithmetic
from nybble.eval.acceptance import measure_acceptance
from nybble.eval.compare import compare
from nybble.eval.statistics import statistics
from nybble.recipe.schema import Calibration

from .config import VISION, tiny_config
from .train import SEED

HELDOUT = Calibration(source="stdlib-heldout", rows=64, seqlen=512, layout="pack", seed=1)

_IMAGE = {
    "size": {"shortest_edge": 4096, "longest_edge": 65536},
    "patch_size": VISION["patch_size"],
    "temporal_patch_size": VISION["temporal_patch_size"],
    "merge_size": VISION["spatial_merge_size"],
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}
PROCESSOR_FILES = {
    "preprocessor_config.json": {**_IMAGE, "image_processor_type": "Qwen2VLImageProcessor"},
    "video_preprocessor_config.json": {**_IMAGE, "video_processor_type": "Qwen3VLVideoProcessor"},
}

README = """# Tiny hybrid model

A Qwen3.5-architecture checkpoint of {parameters:,} parameters for nybble's demo and tests: three
Gated DeltaNet blocks and one gated attention block, an MTP head trained jointly with the trunk, a
small vision tower (random weights, never trained) and a byte-level BPE tokenizer of {vocab:,}
entries with ChatML, thinking and tool-call tokens.

Trained by `tools/tiny_model/train.py` for {steps:,} steps ({tokens:,} tokens) on the Python
{python} standard library's sources, reference and docstrings. One file in ten is held out.

Measured by `tools/tiny_model/export.py` on held-out files ({rows} windows of {seqlen} tokens;
acceptance: {prompts} greedy continuations of {new} tokens, one draft token a step):

| | |
|---|---|
| perplexity per token | {perplexity:.2f} |
| MTP acceptance | {acceptance:.1%} ({accepted:,} of {drafts:,} drafts) |

The weights are nybble's own (Apache-2.0).
"""


def checkpoint_tensors(build: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """The trained parameters under the checkpoint's names, bfloat16, with a vision tower."""
    state = torch.load(build / "state.pt", map_location="cpu", weights_only=True)["model"]
    names = {"trunk.": "model.language_model.", "mtp.": "mtp.", "lm_head.": "lm_head."}
    tensors = {}
    for name, tensor in state.items():
        prefix = next(p for p in names if name.startswith(p))
        tensors[names[prefix] + name.removeprefix(prefix)] = tensor
    vision_config = tiny_config(tokenizer).vision_config
    assert isinstance(vision_config, Qwen3_5VisionConfig)
    torch.manual_seed(SEED)
    vision = Qwen3_5VisionModel(vision_config)
    tensors |= {f"model.visual.{name}": value for name, value in vision.state_dict().items()}
    return {name: tensor.bfloat16().contiguous() for name, tensor in sorted(tensors.items())}


def export(build: Path, out: Path) -> None:
    """Writes the whole checkpoint folder."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(build / "tokenizer")
    for file in (build / "tokenizer").iterdir():
        shutil.copyfile(file, out / file.name)
    tensors = checkpoint_tensors(build, tokenizer)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = tiny_config(tokenizer).to_diff_dict()
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id],
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name, content in PROCESSOR_FILES.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    _write_readme(build, out, tokenizer, sum(t.numel() for t in tensors.values()))


def _write_readme(
    build: Path, out: Path, tokenizer: PreTrainedTokenizerFast, parameters: int
) -> None:
    model: LoadedModel = load_model(out)
    rows = build_rows(HELDOUT, tokenizer).token_ids
    accepted = measure_acceptance(model, rows[:, :64], num_new=64)
    scores = compare(out, out, rows, Arithmetic(torch.device("cpu")))
    lines = (build / "loss.csv").read_text().splitlines()
    steps = int(lines[-1].split(",")[0]) + 1
    text = README.format(
        parameters=parameters,
        vocab=len(tokenizer),
        steps=steps,
        tokens=json.loads((build / "run.json").read_text())["tokens_per_step"] * steps,
        python=json.loads((build / "run.json").read_text())["python"],
        rows=HELDOUT.rows,
        seqlen=HELDOUT.seqlen,
        prompts=len(rows),
        new=64,
        perplexity=statistics(scores).base_perplexity,
        acceptance=accepted.rates[0],
        accepted=accepted.accepted[0],
        drafts=accepted.steps,
    )
    (out / "README.md").write_text(text)


def main() -> None:
    """Command line of the exporter."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", type=Path, default=Path("tiny-build"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(args.build, args.out)


if __name__ == "__main__":
    main()
