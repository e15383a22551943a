"""One decoder block on its way through the pipeline: what is known of it, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

import torch

from nybble.arch.blocks import BlockRunner
from nybble.pipeline.streams import Batch, Streams
from nybble.quant.grid import IntGrid, QuantizedWeight
from nybble.quant.moments import InputMoments
from nybble.quant.rtn import rtn
from nybble.quant.scale_search import ScaleMethod, initial_scales

Weights = Mapping[str, torch.Tensor]
Moments = Mapping[str, list[InputMoments]]
"""By parameter: the moments of its input, one for a Linear, one per expert for a stack."""
OnStep = Callable[[int, float], None]


@dataclass(frozen=True)
class Target:
    """A parameter of a block to be quantized: a Linear's weight, or a stack of experts."""

    modules: tuple[str, ...]
    """The Linears whose rows it holds, in order and in equal shares."""
    grid: IntGrid
    part: str


@dataclass(frozen=True)
class Block:
    """One block to quantize. Names are relative to the block."""

    index: int
    weights: Weights
    """All of its parameters, on the compute device, in the base's dtype."""
    targets: Mapping[str, Target]
    inputs: tuple[tuple[str, ...], ...]
    """The targets, those that read the same input together."""

    def matrix(self, name: str) -> torch.Tensor:
        """A target as [O, I]; a stack's experts one below the other."""
        return self.weights[name].flatten(0, -2)

    def experts(self, name: str) -> list[torch.Tensor]:
        """A stack's matrices [O, I] by expert; a Linear's only one."""
        weight = self.weights[name]
        return list(weight) if weight.ndim == 3 else [weight]

    def cast(self, dtype: torch.dtype, skip: Container[str] = ()) -> dict[str, torch.Tensor]:
        """The weights in another dtype, but for those named in ``skip``."""
        return {name: w.to(dtype) for name, w in self.weights.items() if name not in skip}

    def shaped(self, name: str, matrix_OI: torch.Tensor) -> torch.Tensor:
        """The inverse of ``matrix``."""
        return matrix_OI.view(self.weights[name].shape)


@dataclass(frozen=True)
class Calibrated:
    """The calibration rows and what runs a block on them."""

    runner: BlockRunner
    streams: Streams
    dtype: torch.dtype
    """Of the arithmetic."""

    def run(self, block: Block, weights: Weights) -> Callable[[Batch], torch.Tensor]:
        """The block under ``weights`` as a function of some rows."""
        return lambda batch: self.runner(block.index, weights, batch.hidden)


@dataclass(frozen=True)
class ModuleFacts:
    """What an algorithm knows of one Linear besides its weights. None: not measured."""

    tokens: int | None = None
    """Calibration tokens that reached it."""
    output_error: float | None = None
    """Expected squared output error over the squared output."""
    rtn_output_error: float | None = None
    """The same for rounding to nearest on the same grid."""
    damping: float | None = None
    damping_increases: int | None = None
    dead_channels: int | None = None
    too_few_tokens: bool = False
    """An expert that saw too few to be calibrated well; gptq rounds it to nearest."""
    seconds: float | None = None


@dataclass(frozen=True)
class Rounded:
    """A quantized target, and facts on each of its Linears."""

    weight: QuantizedWeight
    facts: tuple[ModuleFacts, ...]


def gather_moments(
    block: Block, calibrated: Calibrated, weights: Weights, inputs: tuple[str, ...], full: bool
) -> Moments:
    """Moments of what reaches the targets ``inputs`` from the quantized stream."""
    counter = MomentCounter(block, inputs, full, calibrated.streams.device)

    def visit(batch: Batch) -> None:
        hidden = counter.watch(batch).hidden
        calibrated.runner.run_to_inputs(block.index, weights, hidden, inputs, counter.on_input)

    calibrated.streams.scan(visit)
    return counter.moments


class MomentCounter:
    """Counts the inputs of some targets, without padding, while rows run through a block."""

    def __init__(
        self, block: Block, inputs: tuple[str, ...], full: bool, device: torch.device
    ) -> None:
        self.moments = {
            name: [InputMoments(w.shape[1], device, full) for w in block.experts(name)]
            for name in inputs
        }
        self._mask: torch.Tensor | None = None

    def watch(self, batch: Batch) -> Batch:
        """Names the rows that the next inputs come from."""
        self._mask = None if batch.mask is None else batch.mask.flatten()
        return batch

    def on_input(
        self, name: str, expert: int, rows: torch.Tensor, tokens: torch.Tensor | None
    ) -> None:
        """See ``arch.blocks.OnInput``."""
        if self._mask is not None:
            rows = rows[self._mask if tokens is None else self._mask[tokens]]
        self.moments[name][expert].add(rows)


def pooled(moments: list[InputMoments]) -> torch.Tensor:
    """Mean square of the input channels over all experts, [I]."""
    together = InputMoments(moments[0].sums.shape[0], moments[0].sums.device, full=False)
    for one in moments:
        together.sums += one.sums if one.sums.ndim == 1 else one.sums.diagonal()
        together.tokens += one.tokens
    return together.mean_square()


def importances(moments: list[InputMoments]) -> list[torch.Tensor]:
    """Mean square of each expert's input channels, [I]; of all, for one that saw no token."""
    return [one.mean_square() if one.tokens else pooled(moments) for one in moments]


def start_scales(
    block: Block, name: str, method: ScaleMethod, importance: list[torch.Tensor] | None
) -> torch.Tensor:
    """Initial scales [O, G] of a target; ``importance`` is that of each expert."""
    grid = block.targets[name].grid
    if importance is None:
        return initial_scales(method, block.matrix(name), grid, None)
    parts = zip(block.experts(name), importance, strict=True)
    return torch.cat([initial_scales(method, w, grid, channels) for w, channels in parts])


def round_data_free(block: Block, method: ScaleMethod) -> dict[str, Rounded]:
    """Rounds every target to nearest without looking at any text."""
    return {
        name: Rounded(
            rtn(block.matrix(name), target.grid, method), (ModuleFacts(),) * len(target.modules)
        )
        for name, target in block.targets.items()
    }
