"""From a declaration to the fewest rules that every engine resolves the same way.

A rule is a regular expression over a Linear's whole name, beginning with ``.*``: it has to match
Hugging Face's names (``model.language_model.layers.3.self_attn.q_proj``, without
``language_model`` in text-only classes) and vLLM's, which also fuse Linears
(``language_model.model.layers.3.self_attn.qkv_proj``), under search, match and fullmatch alike.
No rule begins with a literal prefix, because vLLM renames those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from nybble.core.errors import CheckpointError
from nybble.packing.format import LM_HEAD, Declaration
from nybble.quant.grid import IntGrid

_ANY_NUMBER = r"\d+"


@dataclass(frozen=True)
class Rule:
    """What the Linears whose names match are built as; grid None: dense."""

    pattern: str
    grid: IntGrid | None


@dataclass(frozen=True)
class Unit:
    """What engines build as one module in each block of a list: one Linear, or several fused."""

    block_list: str
    names: frozenset[str]
    """Of the fused module and its members, relative to the block, as regular expressions."""
    members: tuple[str, ...]
    """Names of the Linears themselves, relative to the block."""
    grids: Mapping[int, IntGrid | None]
    """By block number, of the blocks that have it."""

    def blocks_on(self, grid: IntGrid | None) -> tuple[int, ...]:
        """The blocks in which it has this grid."""
        return tuple(sorted(block for block, found in self.grids.items() if same(found, grid)))


def same(one: IntGrid | None, other: IntGrid | None) -> bool:
    """Whether two grids are the same to a format: which sign scales take is not declared."""
    if one is None or other is None:
        return one is other
    return (one.bits, one.group_size) == (other.bits, other.group_size)


class Rules:
    """A declaration, sorted into units and rules.

    Raises CheckpointError for Linears that engines fuse but that differ in their grids.
    """

    def __init__(self, declaration: Declaration) -> None:
        self.declaration = declaration
        self.units = _units(declaration)

    @cached_property
    def dense(self) -> list[Rule]:
        """Rules for all that is dense but the output head: blocks, the MTP head, towers."""
        rules = [rule for rule in self._block_rules if rule.grid is None]
        rules += [Rule(pattern, None) for pattern in self._dense_outside()]
        return rules + [Rule(rf".*{tower}.*", None) for tower in self.declaration.towers]

    @cached_property
    def quantized(self) -> list[Rule]:
        """Rules for the Linears of blocks on other grids than the default."""
        return [rule for rule in self._block_rules if rule.grid is not None]

    @property
    def lm_head(self) -> IntGrid | None:
        """The output head's grid."""
        return self.declaration.grids.get(LM_HEAD)

    @cached_property
    def _block_rules(self) -> list[Rule]:
        sorted_units: dict[tuple[str, IntGrid | None, tuple[int, ...]], list[Unit]] = {}
        for unit in self.units:
            for grid in _distinct(unit.grids.values()):
                if not same(grid, self.declaration.default):
                    blocks = unit.blocks_on(grid)
                    where = () if len(blocks) == len(unit.grids) else blocks
                    sorted_units.setdefault((unit.block_list, grid, where), []).append(unit)
        return [
            Rule(self._pattern(block_list, grid, where, units), grid)
            for (block_list, grid, where), units in sorted_units.items()
        ]

    def _pattern(
        self, block_list: str, grid: IntGrid | None, where: tuple[int, ...], units: list[Unit]
    ) -> str:
        names = _alternatives(name for unit in units for name in unit.names)
        anywhere = rf".*{names}$"
        if grid is None and not where and not self._catches_quantized(anywhere):
            return anywhere
        number = _either([str(block) for block in where]) if where else _ANY_NUMBER
        return rf".*{_list_pattern(block_list)}\.{number}\.{names}$"

    def _catches_quantized(self, pattern: str) -> bool:
        return any(re.match(pattern, name) for name in self.declaration.grids)

    def _dense_outside(self) -> list[str]:
        """Patterns for dense Linears outside the lists of blocks, but not for the output head."""
        heads: dict[str, list[str]] = {}
        for name in self.declaration.dense:
            if name != LM_HEAD and _place(name, self.declaration.block_lists) is None:
                top, _, rest = name.partition(".")
                heads.setdefault(top, []).append(rest)
        patterns = []
        for top, names in heads.items():
            if any(name.startswith(f"{top}.") for name in self.declaration.grids):
                patterns.append(rf".*{top}\.{_alternatives(map(re.escape, names))}$")
            else:
                patterns.append(f".*{top}.*")
        return patterns


def common_refusals(declaration: Declaration, bits: tuple[int, ...], name: str) -> list[str]:
    """What no format, or not the one called ``name`` that holds ``bits``, can declare."""
    reasons = []
    for module, grid in declaration.grids.items():
        if grid.bits not in bits:
            held = ", ".join(map(str, bits))
            reasons.append(f"{name} holds {held} bits, not {grid.bits} ({module})")
            break
    reasons += [
        f"{module} is quantized, which engines build dense: keep it"
        for module in declaration.grids
        if module != LM_HEAD and _place(module, declaration.block_lists) is None
    ]
    try:
        Rules(declaration)
    except CheckpointError as error:
        reasons.append(str(error))
    return reasons


def refuse(reasons: list[str]) -> None:
    """Raises CheckpointError with the first reason, if there is any."""
    if reasons:
        raise CheckpointError(reasons[0])


def _units(declaration: Declaration) -> list[Unit]:
    fused_by_member = {
        member: fused for fused, members in declaration.fused.items() for member in members
    }
    found: dict[tuple[str, str], dict[int, dict[str, IntGrid | None]]] = {}
    linears = [*declaration.grids.items(), *((name, None) for name in declaration.dense)]
    for name, grid in linears:
        place = _place(name, declaration.block_lists)
        if place is not None:
            block_list, block, member = place
            unit = (block_list, fused_by_member.get(member, member))
            found.setdefault(unit, {}).setdefault(block, {})[member] = grid
    return [
        Unit(
            block_list=block_list,
            names=frozenset(_template(name) for name in {fused, *_members(blocks)}),
            members=_members(blocks),
            grids={n: _one_grid(f"{block_list}.{n}", fused, m) for n, m in blocks.items()},
        )
        for (block_list, fused), blocks in found.items()
    ]


def _members(blocks: Mapping[int, Mapping[str, IntGrid | None]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(member for members in blocks.values() for member in members))


def _one_grid(block: str, fused: str, members: Mapping[str, IntGrid | None]) -> IntGrid | None:
    (first, grid), *others = members.items()
    for other, its_grid in others:
        if not same(grid, its_grid):
            raise CheckpointError(
                f"{block}.{first} and .{other} differ in their grids, but engines fuse them into "
                f"{fused}: give them the same"
            )
    return grid


def _place(name: str, block_lists: Iterable[str]) -> tuple[str, int, str] | None:
    """List of blocks, block number and the rest of a Linear's name; None outside of all lists."""
    for block_list in block_lists:
        match = re.fullmatch(re.escape(block_list) + r"\.(\d+)\.(.+)", name)
        if match:
            return block_list, int(match[1]), match[2]
    return None


def _distinct(grids: Iterable[IntGrid | None]) -> list[IntGrid | None]:
    distinct: list[IntGrid | None] = []
    for grid in grids:
        if not any(same(grid, other) for other in distinct):
            distinct.append(grid)
    return distinct


def _template(name: str) -> str:
    """A name as a regular expression in which numbers, of experts, stand for any number."""
    parts = name.split(".")
    return r"\.".join(_ANY_NUMBER if part.isdigit() else re.escape(part) for part in parts)


def _list_pattern(block_list: str) -> str:
    # In each engine's names of the decoder, ``model`` or ``language_model`` precedes ``layers``;
    # in those of the MTP head, ``mtp`` does.
    owner, _, layers = block_list.rpartition(".")
    return rf"{owner.rpartition('.')[2].rpartition('_')[2]}\.{layers}"


def _alternatives(names: Iterable[str]) -> str:
    """One regular expression for several, those of one parent under a common beginning."""
    leaves: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        parent, dot, leaf = name.rpartition(r"\.")
        leaves.setdefault(parent + dot, []).append(leaf)
    return _either([parent + _either_leaf(found) for parent, found in leaves.items()])


def _either_leaf(leaves: list[str]) -> str:
    start = _common_start(leaves)
    if len(leaves) == 1 or not start:
        return _either(leaves)
    return start + _either([leaf.removeprefix(start) for leaf in leaves])


def _common_start(leaves: list[str]) -> str:
    """The whole words, such as ``in_proj_``, that all leaves begin with."""
    first, last = min(leaves), max(leaves)
    equal = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    return first[: first.rfind("_", 0, equal) + 1]


def _either(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"({'|'.join(options)})"
