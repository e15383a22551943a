"""What a checkpoint's configuration block has to declare, from its architecture and grids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from nybble.arch.blocks import expected_shapes
from nybble.arch.spec import Architecture, InputGroup
from nybble.packing.format import LM_HEAD, Declaration
from nybble.quant.grid import IntGrid

# Engines fuse these too, though they stay dense: rules have to match both names.
_KEPT_FUSIONS: Mapping[str, tuple[str, ...]] = {
    "linear_attn.in_proj_ba": ("linear_attn.in_proj_a", "linear_attn.in_proj_b")
}


def declaration(arch: Architecture, grids: Mapping[str, IntGrid]) -> Declaration:
    """Sorts the model's Linears into those of ``grids``, by module name, and the dense rest.

    The result is in the model's own order, whatever that of ``grids``. At least one Linear of the
    decoder blocks must have a grid, and no name may be unknown to the model.
    """
    names = list(linears(arch))
    assert grids.keys() <= set(names)
    ordered = {name: grids[name] for name in names if name in grids}
    trunk = [grid for name, grid in ordered.items() if name.startswith(f"{arch.blocks_prefix}.")]
    [(default, _)] = Counter(trunk).most_common(1)
    lists = [arch.blocks_prefix]
    if arch.mtp and any(name.startswith(arch.mtp.prefix) for name in grids):
        lists.append(arch.mtp.layer_prefix.removesuffix(".0."))
    return Declaration(
        default=default,
        grids=ordered,
        dense=tuple(name for name in names if name not in grids),
        fused=_fusions(arch),
        block_lists=tuple(lists),
        towers=tuple(_towers(arch)),
    )


def linears(arch: Architecture) -> Iterator[str]:
    """Names of the Linears of the text model, its head and the MTP head in a quantized checkpoint.

    The experts of a stack count one by one; a tied output head counts as a Linear.
    """
    for name, shape in expected_shapes(arch).items():
        stacked = arch.experts.stacked_modules(name) if arch.experts else ()
        if stacked:
            yield from stacked
        elif name.endswith(".weight") and len(shape) == 2 and name != arch.embedding:
            yield name.removesuffix(".weight")
    if arch.lm_head == arch.embedding:
        yield LM_HEAD


def _fusions(arch: Architecture) -> dict[str, tuple[str, ...]]:
    groups: tuple[InputGroup, ...] = arch.input_groups
    if arch.mtp:
        groups += arch.mtp.input_groups
    fused = {**_KEPT_FUSIONS, **{group.fused: group.members for group in groups}}
    if arch.experts:
        owner = arch.experts.module
        numbers = range(arch.experts.count)
        parts = ("gate_proj", "up_proj", "down_proj")
        fused[owner] = tuple(f"{owner}.{n}.{part}" for n in numbers for part in parts)
    return fused


def _towers(arch: Architecture) -> Iterator[str]:
    """Components of names, such as ``visual``, under which a multimodal model keeps the rest."""
    for rule in arch.keep_rules:
        if rule.part == "vision":
            yield rule.pattern.removesuffix(r"\..+").rpartition(r"\.")[2]
