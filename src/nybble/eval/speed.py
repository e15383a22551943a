"""What drafting is worth: tokens a step against the bytes that a step reads.

Decoding one sequence is bound by reading weights, so time is counted in bytes read. A step of n
drafts reads the trunk once, to check all of them, and n times what a draft takes: the MTP layer
and the output head. Caches and states are not counted. Of routed experts a token's own are; a
trunk that checks several tokens reads more of them, so there the speed-up is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nybble.arch.spec import Architecture
from nybble.checkpoint.headers import TensorInfo
from nybble.engine.weights import ModelWeights


@dataclass(frozen=True)
class SpeedUp:
    """Over decoding without drafts."""

    draft_cost: float
    """Bytes read to make one draft, over those of one pass through the trunk."""
    expected: tuple[float, ...]
    """Entry n - 1: with n drafts a step."""
    best_drafts: int
    """How many drafts a step are fastest; 0: none at all."""


def speed_up(rates: Sequence[float], cost: float) -> SpeedUp:
    """Of a head whose first 1, 2, ... drafts are all accepted at these rates."""
    expected = [
        (1 + sum(rates[:drafts])) / (1 + drafts * cost) for drafts in range(1, len(rates) + 1)
    ]
    by_drafts = [1.0, *expected]
    return SpeedUp(cost, tuple(expected), by_drafts.index(max(by_drafts)))


def draft_cost(weights: ModelWeights) -> float:
    """``SpeedUp.draft_cost`` of a checkpoint with an MTP head, from what it stores."""
    arch, index = weights.arch, weights.reader.index
    assert arch.mtp is not None
    output_head = arch.lm_head.removesuffix("weight")
    head, blocks, mtp = (
        _read_per_token(arch, index.with_prefix(prefix))
        for prefix in (output_head, f"{arch.blocks_prefix}.", arch.mtp.prefix)
    )
    return (mtp + head) / (blocks + head)


def _read_per_token(arch: Architecture, tensors: Iterable[TensorInfo]) -> float:
    if arch.experts is None:
        return sum(info.nbytes for info in tensors)
    share = arch.text_config.num_experts_per_tok / arch.experts.count
    routed = f".{arch.experts.module}."
    return sum(info.nbytes * (share if routed in info.name else 1) for info in tensors)
