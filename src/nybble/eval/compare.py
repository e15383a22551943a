"""Two checkpoints on the same text, with a block of one of them in memory at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from nybble.engine.stream import Arithmetic, OnBlock, final_states, silent
from nybble.engine.weights import ModelWeights
from nybble.eval.head_pass import Output
from nybble.eval.kld import Scores, score


def compare(
    base: Path,
    candidate: Path,
    windows: torch.Tensor,
    how: Arithmetic,
    on_block: OnBlock = silent,
) -> Scores:
    """Scores a checkpoint against its base on windows, int64 [W, T]: T - 1 positions each.

    Raises CheckpointError if either cannot be read, or if their vocabularies differ.
    """
    with ModelWeights(base) as its_base, ModelWeights(candidate) as weights:
        reference = output_on(its_base, windows, how, on_block)
        output = output_on(weights, windows, how, on_block)
        return score(reference, output, windows[:, 1:].flatten(), len(windows), how.device)


def output_on(
    weights: ModelWeights, windows: torch.Tensor, how: Arithmetic, on_block: OnBlock = silent
) -> Output:
    """A model's last step at every position of the windows that has a next token."""
    states = final_states(weights, windows, how, on_block)[:, :-1].flatten(0, 1)
    return Output(states, weights.head_rows, weights.vocab_size)
