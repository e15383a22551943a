"""Where GPTQ spends its time: the factor, the columns one by one, the matrix products.

    .venv/bin/python benchmarks/gptq_kernel.py --shape 8192x5120 --block-size 128 --chunk 4096

Random weights, inputs of correlated channels. Prints a Markdown table, one line for each setting;
the peak is that of the process so far. Nothing is written.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nybble.quant import gptq as module
from nybble.quant.grid import IntGrid, minmax_scale, round_to_grid
from nybble.quant.metrics import correlated_output_error
from nybble.quant.moments import InputMoments


@dataclass
class Stopwatch:
    """Seconds spent in a wrapped function."""

    seconds: float = 0.0

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def running(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def second_moment(ins: int, tokens: int) -> tuple[torch.Tensor, float]:
    """That of mixed channels with powers over three decades, and the seconds it took to count."""
    moments = InputMoments(ins, torch.device("cpu"), full=True)
    mix = torch.randn(ins // 8, ins)
    power = 10 ** (torch.rand(ins) * 1.5)
    watch = Stopwatch()
    for _ in range(0, tokens, 2048):
        rows = (torch.randn(2048, ins // 8) @ mix + torch.randn(2048, ins)) * power
        with watch.running():
            moments.add(rows.bfloat16())
    return moments.second_moment(), watch.seconds


def measure(weight: torch.Tensor, moment: torch.Tensor, args: argparse.Namespace) -> None:
    outs, ins = weight.shape
    grid = IntGrid(args.bits, args.group_size, True)
    scales = minmax_scale(weight, grid)
    plain = correlated_output_error(weight, round_to_grid(weight, scales, grid), moment)
    kernels = module._round_columns, module._walk
    for block_size in args.block_size:
        factoring = Stopwatch()
        with factoring.running():
            factor = module.factorize(moment, module.GptqSettings(block_size=block_size))
        for chunk in args.chunk:
            columns, walk, whole = Stopwatch(), Stopwatch(), Stopwatch()
            module._CPU_ROWS = chunk
            module._round_columns = columns.wrapped(kernels[0])
            module._walk = walk.wrapped(kernels[1])
            with whole.running():
                result = module.gptq(weight, factor, scales, grid)
            module._round_columns, module._walk = kernels
            gain = correlated_output_error(weight, result, moment) / plain
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            cells = [
                factoring.seconds,
                columns.seconds,
                walk.seconds - columns.seconds,
                whole.seconds - walk.seconds,
                whole.seconds,
            ]
            numbers = " | ".join(f"{cell:.2f}" for cell in cells)
            print(
                f"| {outs} x {ins} | {block_size} | {chunk} | {numbers} "
                f"| {gain:.3f} | {peak:.2f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", nargs="+", default=["8192x5120", "5120x17408"])
    parser.add_argument("--block-size", nargs="+", type=int, default=[128])
    parser.add_argument("--chunk", nargs="+", type=int, default=[module._CPU_ROWS])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(
        "| out x in | block | rows | factorize s | columns s | products s | copies s ",
        end="",
    )
    print("| gptq s | error / RTN's | peak GiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape in args.shape:
        outs, ins = (int(part) for part in shape.split("x"))
        moment, seconds = second_moment(ins, args.tokens)
        weight = (torch.randn(outs, ins) * 0.02).bfloat16()
        measure(weight, moment, args)
        print(f"\n{ins} channels: {seconds:.2f} s for the moments of {args.tokens} tokens\n")


if __name__ == "__main__":
    main()
