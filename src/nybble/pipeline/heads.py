"""What follows the last block: the output head, and the way into the MTP layer."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from nybble.arch.blocks import mtp_fusion
from nybble.arch.spec import Architecture
from nybble.pipeline.algorithms import diagonal_facts, gptq_group
from nybble.pipeline.block import (
    Block,
    Calibrated,
    Rounded,
    importances,
    round_data_free,
    start_scales,
)
from nybble.pipeline.quant_log import BlockLog
from nybble.pipeline.streams import Batch, Streams
from nybble.quant.grid import round_to_grid
from nybble.quant.moments import InputMoments
from nybble.recipe.schema import Gptq, Recipe


def quantize_head(
    head: Block, recipe: Recipe, calibrated: Calibrated | None, norm_D: torch.Tensor
) -> tuple[Rounded, BlockLog]:
    """The only target of ``head``, by GPTQ if that is the recipe's algorithm, else to nearest.

    SignRound has no block here whose output could be a target; 8 bits leave it little to learn.
    The calibration rows must be past the last block; ``norm_D`` is the final norm's weight.
    """
    began = time.monotonic()
    algorithm = recipe.algorithm
    [(name, target)] = head.targets.items()
    weight = head.matrix(name)
    if calibrated is None:
        rounded = round_data_free(head, algorithm.scale_init)[name]
        return rounded, BlockLog(time.monotonic() - began)
    is_gptq = isinstance(algorithm, Gptq)
    moments = InputMoments(weight.shape[1], calibrated.streams.device, full=is_gptq)
    norm = norm_D.to(calibrated.dtype)

    def count(batch: Batch) -> None:
        normed = calibrated.runner.final_norm(norm, batch.hidden)
        moments.add(batch.real(normed).flatten(0, -2))

    calibrated.streams.scan(count)
    if isinstance(algorithm, Gptq):
        rounded = gptq_group(head, (name,), algorithm, [moments])[name]
    else:
        scales = start_scales(head, name, algorithm.scale_init, importances([moments]))
        nearest = round_to_grid(weight, scales, target.grid)
        rounded = diagonal_facts(head, name, nearest, [moments])
    return rounded, BlockLog(time.monotonic() - began)


@torch.no_grad()
def enter_mtp_layer(
    arch: Architecture,
    calibrated: Calibrated,
    head: Mapping[str, torch.Tensor],
    norm_D: torch.Tensor,
    next_embeds: torch.Tensor,
) -> Calibrated:
    """Turns the streams behind the last block into inputs of the MTP head's decoder layer.

    head: the MTP head's tensors outside that layer, by full name. next_embeds: [R, T-1, D] in the
    compute dtype, of each row's tokens but the first. Position t of a row becomes the fusion of
    hidden state t and token t+1, as it is served; the last position has no next token and falls
    away.
    """
    streams, dtype = calibrated.streams, calibrated.dtype
    device, norm = streams.device, norm_D.to(dtype)
    fuse = mtp_fusion(arch, {name: tensor.to(device, dtype) for name, tensor in head.items()})
    for stream in (streams.quantized, streams.base):
        for row in range(len(streams.quantized) if stream is not None else 0):
            assert stream is not None
            hidden = stream[row : row + 1, :-1].to(device)
            normed = calibrated.runner.final_norm(norm, hidden)
            embeds = next_embeds[row : row + 1].to(device)
            stream[row : row + 1, :-1] = fuse(normed, embeds).cpu()
    fused = Streams(
        quantized=streams.quantized[:, :-1],
        base=None if streams.base is None else streams.base[:, :-1],
        mask=None if streams.mask is None else streams.mask[:, 1:],
        device=device,
    )
    return Calibrated(calibrated.runner, fused, dtype)
