"""What a recipe would make of each tensor, as a table."""

from __future__ import annotations

import re

from rich.table import Table

from nybble.arch.plan import Fate, Quantize, TensorPlan
from nybble.arch.spec import Architecture
from nybble.checkpoint.headers import TensorInfo
from nybble.cli.tables import human_bytes, table
from nybble.packing.format import Format


def plan_table(
    arch: Architecture, plan: TensorPlan, file_format: Format, every_tensor: bool
) -> Table:
    """Fates and sizes: a line per part and fate, or one per tensor."""
    rows: dict[tuple[str, str], tuple[dict[str, None], list[int]]] = {}
    made = table(["part", "fate", "tensors"], ["count", "base", "result"])
    for name, fate in plan.fates.items():
        sizes = [1, plan.infos[name].nbytes, result_bytes(plan.infos[name], fate, file_format)]
        if every_tensor:
            made.add_row(fate.part, _fate_text(fate), name, *_cells(sizes))
            continue
        names, totals = rows.setdefault((fate.part, _fate_text(fate)), ({}, [0, 0, 0]))
        names[_short(arch, name)] = None
        totals[:] = [total + size for total, size in zip(totals, sizes, strict=True)]
    for (part, text), (names, totals) in sorted(rows.items()):
        shown = ", ".join(names) if len(names) <= 4 else _abbreviated(list(names))
        made.add_row(part, text, shown, *_cells(totals))
    return made


def result_bytes(info: TensorInfo, fate: Fate, file_format: Format) -> int:
    """What a source tensor takes in the result."""
    if not isinstance(fate, Quantize):
        return info.nbytes
    shape = fate.module_shape(info)
    return sum(
        spec.nbytes
        for module in fate.modules
        for spec in file_format.packed_specs(module, shape, fate.grid)
    )


def _fate_text(fate: Fate) -> str:
    if not isinstance(fate, Quantize):
        return f"kept: {fate.reason}"
    grid = fate.grid
    group = "per channel" if grid.group_size == -1 else f"group {grid.group_size}"
    return f"INT{grid.bits}, {group}"


def _short(arch: Architecture, name: str) -> str:
    """The last words of a name that tell tensors of a part apart."""
    inner = re.sub(re.escape(arch.blocks_prefix) + r"\.\d+\.", "", name)
    inner = inner.removeprefix(arch.text_prefix).removesuffix(".weight")
    return inner.split(".", 1)[1] if inner.startswith(("linear_attn.", "self_attn.")) else inner


def _abbreviated(names: list[str]) -> str:
    roots = {name.split(".")[0] for name in names}
    return f"{roots.pop()}.*" if len(roots) == 1 else ", ".join(names[:3]) + ", ..."


def _cells(sizes: list[int]) -> list[str]:
    return [str(sizes[0]), human_bytes(sizes[1]), human_bytes(sizes[2])]
