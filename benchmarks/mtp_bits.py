"""What quantizing the MTP layer costs in acceptance, calibrated and not.

    .venv/bin/python benchmarks/mtp_bits.py [--prompts 256]

One trunk (INT4 by GPTQ) for all; its MTP layer is kept, rounded to nearest, or calibrated by GPTQ
and SignRound on the quantized trunk's hidden states. Greedy continuations of held-out text by the
bundled model. Writes docs/benchmarks/mtp_bits.md.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import OUT
from transformers import AutoTokenizer

from nybble.data.rows import build_rows
from nybble.demo import bundled_model
from nybble.engine.load import LoadedModel, load_model
from nybble.eval.acceptance import measure_acceptance
from nybble.eval.kld import kl_divergence
from nybble.pipeline.quantize import quantize
from nybble.recipe.load import load_recipe
from nybble.recipe.schema import Calibration

PROMPT_TOKENS, NEW_TOKENS = 64, 64
HEADS = {
    "rounded to nearest": ["algorithm.name=rtn"],
    "rounded, scales by MSE": ["algorithm.name=rtn", "algorithm.scale_init=mse"],
    "GPTQ": ["algorithm.name=gptq"],
    "SignRound, 50 it": ["algorithm.iters=50"],
}


def made(base: Path, scratch: Path, name: str, overrides: list[str]) -> LoadedModel:
    """The bundled model by one recipe."""
    out = scratch / name.replace(" ", "-")
    quantize(base, out, load_recipe("tiny-demo", overrides), "cpu")
    return load_model(out)


@torch.no_grad()
def draft_divergence(model: LoadedModel, kept: LoadedModel, rows: torch.Tensor) -> float:
    """Mean KL of the kept head's drafts to this head's, on the same trunk and text."""
    hidden = model.hidden(rows)
    logits = (one.logits(one.drafts(hidden, rows)[0]) for one in (kept, model))
    return float(kl_divergence(*logits).mean())


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=256)
    args = parser.parse_args()
    lines = []
    with bundled_model() as base, tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tokenizer = AutoTokenizer.from_pretrained(base)
        text = Calibration(
            source="stdlib-heldout", rows=args.prompts, seqlen=128, layout="pack", seed=5
        )
        rows = build_rows(text, tokenizer).token_ids
        kept = made(base, scratch, "kept", ["algorithm.name=gptq"])
        heads = {"BF16 base": (load_model(base), None), "INT4 trunk, MTP kept": (kept, 0.0)}
        for bits in (8, 4):
            for name, overrides in HEADS.items():
                named = f"MTP layer INT{bits}, {name}"
                own = made(base, scratch, named, [*overrides, f"scheme.mtp_bits={bits}"])
                model = replace(kept, mtp=own.mtp)
                heads[named] = (model, draft_divergence(model, kept, rows))
        for name, (model, divergence) in heads.items():
            found = measure_acceptance(model, rows[:, :PROMPT_TOKENS], NEW_TOKENS)
            rate = found.rates[0]
            error = math.sqrt(rate * (1 - rate) / found.steps)
            shown = "" if divergence is None else f"{divergence:.5f}"
            lines.append(f"| {name} | {rate:.1%} +- {error:.1%} | {found.steps} | {shown} |")
            print(lines[-1], flush=True)
    (OUT / "mtp_bits.md").write_text(PAGE.format(prompts=args.prompts, lines="\n".join(lines)))


PAGE = f"""# What quantizing the MTP layer costs

`benchmarks/mtp_bits.py --prompts {{prompts}}`; bundled tiny model, held-out text, {{prompts}}
greedy continuations of {NEW_TOKENS} tokens. `mtp.fc` and the norms are kept; one trunk, INT4 by
GPTQ, for all but the first line (SignRound's head was calibrated on SignRound's trunk). The last
column is the mean KL divergence of the kept head's drafts to the quantized head's, teacher-forced
on the same text.

| head | drafts accepted | drafts | KL of drafts |
|---|---|---|---|
{{lines}}
"""


if __name__ == "__main__":
    main()
