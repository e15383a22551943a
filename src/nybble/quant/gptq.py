"""GPTQ: columns are rounded one by one, and later columns make up for the error (2210.17323).

For inputs x with second moment H = E[x xᵀ], the expected output error of a row of weights is
``d H dᵀ``, d = w - wq. After column c is rounded, the best answer of the columns still free is
``w_j -= d_c U_cj / U_cc``, with U the upper factor of H⁻¹ = Uᵀ U. Linears that read the same
input share one factor. Groups are static: scales belong to the original order of the columns, in
whatever order these are rounded, so no index of groups has to be stored.

Knows tensors only. Legend for shapes: O out_features, I in_features, G groups, R rows of one
chunk, B columns of one block. Rows never influence each other: several weights with the same
input may be stacked, and each chunk of rows is finished before the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.core.errors import QuantizationError
from nybble.quant.grid import IntGrid, QuantizedWeight
from nybble.quant.moments import full_float32_products

_CPU_ROWS = 4096
"""Rows of one chunk on the CPU: a block's errors then stay in its cache (docs/LOG.md)."""
_SMALL_TRIANGLE = 256
"""Size from which on a triangle is inverted by plain substitution."""


@dataclass(frozen=True)
class GptqSettings:
    """How the Hessian is prepared and walked through.

    damp: share of its mean diagonal added to the diagonal, in (0, 1]. act_order: channels of high
    mean square first. block_size: columns between two updates of all the later ones.
    """

    damp: float = 0.01
    act_order: bool = True
    block_size: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.damp <= 1 or self.block_size < 1:
            raise ValueError(f"unusable GPTQ settings: {self}")


@dataclass(frozen=True)
class HessianFactor:
    """What ``gptq`` needs of the inputs' second moment."""

    upper: torch.Tensor
    """float32 [I, I]: U, upper triangular, H⁻¹ = Uᵀ U for the damped H in the order below"""
    order: torch.Tensor
    """int64 [I]: the original column at each place of the walk"""
    block_size: int
    damping: float
    """The share of the mean diagonal that was added in the end"""
    damping_increases: int
    """How often the share had to be doubled before H could be factorized"""
    dead: int
    """Channels that were zero on every calibration token"""


def factorize(second_moment_II: torch.Tensor, settings: GptqSettings) -> HessianFactor:
    """The factor of the damped second moment (float32 [I, I], symmetric; not changed).

    With J the reversal of rows, J H J = L Lᵀ (Cholesky) gives U = J L⁻¹ J: one factorization and
    one triangular inverse, never H⁻¹. Two [I, I] buffers and temporaries of half of one live
    beside the given one; one stays.
    A dead channel has a diagonal of damping alone: nothing moves into it or out of it, so it is
    rounded to nearest, and its weights are kept for inputs that calibration never saw.
    Damping is doubled until the factorization succeeds. Raises QuantizationError if a value is
    not finite, or if more damping than the mean diagonal would be needed.
    """
    if not all(bool(torch.isfinite(extreme)) for extreme in second_moment_II.aminmax()):
        raise QuantizationError(
            f"the second moment of an input of {len(second_moment_II)} channels is NaN or infinite"
        )
    diagonal = second_moment_II.diagonal()
    alive = diagonal != 0
    dead = int((~alive).sum())
    mean = float(diagonal[alive].mean()) if dead < len(diagonal) else 1.0
    order = torch.arange(len(diagonal), device=diagonal.device)
    if settings.act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    reverse = order.flip(0)
    reversed_II = second_moment_II[reverse.unsqueeze(1), reverse]
    reversed_diagonal = diagonal[reverse]
    # LAPACK's layout; any other costs a further copy.
    lower = torch.empty_like(reversed_II).mT
    info = torch.empty((), dtype=torch.int32, device=lower.device)
    damping, increases = settings.damp, 0
    while True:
        reversed_II.diagonal().copy_(reversed_diagonal + damping * mean)
        torch.linalg.cholesky_ex(reversed_II, out=(lower, info))
        if not int(info):
            break
        damping, increases = 2 * damping, increases + 1
        if damping > 1:
            raise QuantizationError(
                f"the second moment of an input of {len(lower)} channels cannot be factorized, "
                f"even with {damping / 2:g} of its mean diagonal added"
            )
    with full_float32_products():
        _invert_lower(lower)
    backwards = torch.arange(len(lower) - 1, -1, -1, device=lower.device)
    torch.index_select(lower, 0, backwards, out=reversed_II)
    upper = torch.index_select(reversed_II, 1, backwards, out=lower.mT)
    return HessianFactor(upper, order, settings.block_size, damping, increases, dead)


def _invert_lower(lower_NN: torch.Tensor) -> None:
    """Inverts a lower triangular matrix in place, half by half: a third of a full solve.

    [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [-C⁻¹ B A⁻¹, C⁻¹]]
    """
    size = len(lower_NN)
    if size <= _SMALL_TRIANGLE:
        identity = torch.eye(size, dtype=lower_NN.dtype, device=lower_NN.device)
        lower_NN.copy_(torch.linalg.solve_triangular(lower_NN, identity, upper=False))
        return
    half = size // 2
    first, corner, last = lower_NN[:half, :half], lower_NN[half:, :half], lower_NN[half:, half:]
    solved = torch.linalg.solve_triangular(last, corner, upper=False)
    torch.linalg.solve_triangular(first, solved, upper=False, left=False, out=solved)
    torch.neg(solved, out=corner)
    del solved
    _invert_lower(first)
    _invert_lower(last)


def gptq(
    weight_OI: torch.Tensor, factor: HessianFactor, scales_OG: torch.Tensor, grid: IntGrid
) -> QuantizedWeight:
    """Codes of the weight under given exact scales, each error passed on to later columns.

    weight: any float dtype, in the original order of its columns, as are scales and codes. Works
    on a float32 copy of one chunk of rows at a time.
    Raises QuantizationError if a weight is not finite or becomes so.
    """
    outs, ins = weight_OI.shape
    group_of = torch.div(factor.order, ins // grid.num_groups(ins), rounding_mode="floor").tolist()
    place_of = torch.argsort(factor.order)
    codes = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    chunk = _CPU_ROWS if weight_OI.device.type == "cpu" else outs
    for start in range(0, outs, chunk):
        rows = slice(start, start + chunk)
        work_IR = weight_OI[rows].T.contiguous()[factor.order].float()
        scales_GR = scales_OG[rows].T.contiguous()
        with full_float32_products():
            codes_IR = _walk(work_IR, factor, [scales_GR[group] for group in group_of], grid)
        if not bool(torch.isfinite(work_IR).all()):
            bad = int((~torch.isfinite(weight_OI)).sum())
            raise QuantizationError(
                f"GPTQ met values that are NaN or infinite; {bad} of the {weight_OI.numel()} "
                "weights were so before"
            )
        codes[rows] = codes_IR.index_select(0, place_of).T
    return QuantizedWeight(codes, scales_OG, grid)


def _walk(
    work_IR: torch.Tensor, factor: HessianFactor, scales: list[torch.Tensor], grid: IntGrid
) -> torch.Tensor:
    """int8 codes [I, R] of transposed weights in walking order, which are overwritten.

    scales: one [R] for each column.
    """
    ins, rows = work_IR.shape
    codes_IR = torch.empty(work_IR.shape, dtype=torch.int8, device=work_IR.device)
    size = min(factor.block_size, ins)
    rounded_BR, errors_BR = work_IR.new_empty(size, rows), work_IR.new_empty(size, rows)
    for start in range(0, ins, size):
        stop = min(start + size, ins)
        count = stop - start
        # U_cj / U_cc: the share of column c's error that column j takes.
        shares = factor.upper[start:stop, start:] / factor.upper.diagonal()[start:stop, None]
        _round_columns(
            work_IR[start:stop],
            shares[:, :count],
            scales[start:stop],
            grid,
            rounded_BR[:count],
            errors_BR[:count],
        )
        codes_IR[start:stop] = rounded_BR[:count]
        work_IR[stop:].addmm_(shares[:, count:].T, errors_BR[:count], alpha=-1)
    return codes_IR


def _round_columns(
    work_BR: torch.Tensor,
    shares_BB: torch.Tensor,
    scales: list[torch.Tensor],
    grid: IntGrid,
    rounded_BR: torch.Tensor,
    errors_BR: torch.Tensor,
) -> None:
    """The sequential part: fills codes (as floats) and errors of one block's columns, one by one.

    Each column first takes its shares of all the errors before it in one product, which reads
    half of what passing every error on at once would read and write.
    """
    shares_by_column = shares_BB.T.contiguous()
    columns = zip(work_BR, scales, rounded_BR, errors_BR, strict=True)
    for c, (column, scale, rounded, error) in enumerate(columns):
        if c:
            column.addmv_(errors_BR[:c].T, shares_by_column[c, :c], alpha=-1)
        torch.div(column, scale, out=rounded)
        rounded.round_().clamp_(grid.lowest, grid.highest)
        torch.addcmul(column, rounded, scale, value=-1, out=error)
