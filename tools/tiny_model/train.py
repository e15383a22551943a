"""Trains the tiny model jointly with its MTP head; run again to resume where it stopped.

    python -m tiny_model.train --build tiny-build            (from tools/, in the project's venv)

About 50 minutes on 2 CPU cores, minutes on a GPU. Writes to the build folder: the tokenizer,
tokens.npy, state.pt (parameters and optimizers, tensors only) and loss.csv. ``export.py`` makes
the checkpoint of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5RMSNorm,
    Qwen3_5TextModel,
)

from nybble.arch.mtp_head import MtpHead
from nybble.core.cpu import flush_denormals
from nybble.data.stdlib import Split

from . import corpus
from .config import tiny_config
from .tokenizer import train_tokenizer

SEED = 20260101
SEQLEN = 512
MTP_LOSS_WEIGHT = 0.4
MUON_LR = 0.015
ADAM_LR = 0.003
WARMUP_STEPS = 50


class TinyModel(nn.Module):
    """Trunk, MTP head and lm_head, under the checkpoint's own parameter names."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        text_config = tiny_config(tokenizer).text_config
        self.trunk = Qwen3_5TextModel(text_config)
        self.mtp = MtpHead(text_config, Qwen3_5DecoderLayer, Qwen3_5RMSNorm)
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        for name, parameter in [*self.mtp.named_parameters(), *self.lm_head.named_parameters()]:
            if parameter.ndim == 2 and "norm" not in name:
                nn.init.normal_(parameter, std=text_config.initializer_range)

    def losses(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean next-token loss and mean MTP loss (token t+2 from t), in nats; tokens [rows, T]."""
        hidden = self.trunk(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        positions = torch.arange(hidden.shape[1] - 1, device=tokens.device)
        rotary = self.trunk.rotary_emb(hidden, positions.expand(3, tokens.shape[0], -1))
        next_embeds = self.trunk.embed_tokens(tokens[:, 1:-1])
        drafted = self.mtp(hidden[:, :-1], next_embeds, rotary, None)
        trunk_logits = self.lm_head(hidden).float().flatten(0, 1)
        draft_logits = self.lm_head(drafted).float().flatten(0, 1)
        trunk_loss = cross_entropy(trunk_logits, tokens[:, 1:].flatten())
        return trunk_loss, cross_entropy(draft_logits, tokens[:, 2:].flatten())


def tokens_of(split: Split, tokenizer: PreTrainedTokenizerFast, seed: int) -> np.ndarray:
    """All documents of a split in seeded order, each ended by <|endoftext|>, as one stream."""
    chats = [
        tokenizer.apply_chat_template(**chat, tokenize=False)
        for chat in corpus.conversations(split, seed)
    ]
    # A few chats to a document, so that a row holds more than one.
    chats = ["".join(chats[i : i + 4]) for i in range(0, len(chats), 4)]
    texts = [*corpus.code(split), *corpus.prose(split), *chats]
    random.Random(seed).shuffle(texts)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = [i for encoded in tokenizer(texts)["input_ids"] for i in [*encoded, end]]
    return np.array(ids, dtype=np.uint16)


def prepare(build: Path) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    """The tokenizer and the training tokens, made on the first run."""
    build.mkdir(parents=True, exist_ok=True)
    tokens_file = build / "tokens.npy"
    if tokens_file.exists():
        return AutoTokenizer.from_pretrained(build / "tokenizer"), np.load(tokens_file)
    sample = random.Random(SEED).sample(corpus.code("train"), 400) + corpus.prose("train")
    tokenizer = train_tokenizer(sample, build / "tokenizer")
    tokens = tokens_of("train", tokenizer, SEED)
    np.save(tokens_file, tokens)
    return tokenizer, tokens


def optimizers_of(model: TinyModel) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, head, norms and vectors."""
    layers = [*model.trunk.layers.named_parameters(), *model.mtp.named_parameters()]
    matrices = [p for _, p in layers if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.02, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last 40 %."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, (steps - step) / (0.4 * steps))


def batch_at(tokens: np.ndarray, step: int, rows: int) -> torch.Tensor:
    """Rows of one step: a function of the step alone, so a resumed run sees the same data."""
    per_epoch = (len(tokens) - 1) // SEQLEN
    first = step * rows
    picks = []
    for position in range(first, first + rows):
        order = np.random.default_rng([SEED, position // per_epoch]).permutation(per_epoch)
        start = int(order[position % per_epoch]) * SEQLEN
        picks.append(tokens[start : start + SEQLEN + 1].astype(np.int64))
    return torch.from_numpy(np.stack(picks))


def train(build: Path, steps: int, rows: int, device: str) -> None:
    """Trains to ``steps``, saving every 50, from the last save if there is one."""
    flush_denormals()
    torch.manual_seed(SEED)
    tokenizer, tokens = prepare(build)
    python = ".".join(platform.python_version_tuple()[:2])
    run = {"tokens_per_step": rows * SEQLEN, "python": python}
    (build / "run.json").write_text(json.dumps(run))
    model = TinyModel(tokenizer).to(device)
    optimizers = optimizers_of(model)
    start = _restore(build / "state.pt", model, optimizers, device)
    print(f"{len(tokens):,} tokens, {sum(p.numel() for p in model.parameters()):,} parameters")
    for step in range(start, steps):
        began = time.monotonic()
        for optimizer, lr in zip(optimizers, (MUON_LR, ADAM_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor(step, steps)
        batch = batch_at(tokens, step, rows).to(device)
        # On a CPU without matrix units float32 is as fast as bfloat16.
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            trunk_loss, mtp_loss = model.losses(batch)
        (trunk_loss + MTP_LOSS_WEIGHT * mtp_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(trunk_loss.item()):
            raise SystemExit(f"loss is {trunk_loss.item()} at step {step}: lower the learning rate")
        row = (step, trunk_loss.item(), mtp_loss.item(), rows * SEQLEN / (time.monotonic() - began))
        _log(build / "loss.csv", row)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            _save(build / "state.pt", step + 1, model, optimizers)


def _log(path: Path, row: tuple[int, float, float, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "trunk_loss", "mtp_loss", "tokens_per_s"])
        writer.writerow([row[0], *(f"{value:.4f}" for value in row[1:])])
    if row[0] % 10 == 0:
        step, trunk, mtp, speed = row
        print(f"step {step}  trunk {trunk:.3f}  mtp {mtp:.3f}  {speed:.0f} tok/s", flush=True)


def _save(path: Path, step: int, model: TinyModel, optimizers: list[torch.optim.Optimizer]) -> None:
    temporary = path.with_suffix(".tmp")
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"step": step, "model": model.state_dict(), "optimizers": states}, temporary)
    temporary.replace(path)


def _restore(
    path: Path, model: TinyModel, optimizers: list[torch.optim.Optimizer], device: str
) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


def main() -> None:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--build", type=Path, default=Path("tiny-build"))
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    train(args.build, args.steps, args.rows, args.device)


if __name__ == "__main__":
    main()
