"""Which Linears may be quantized, and the grid a recipe's scheme gives each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from nybble.arch.spec import Architecture, InputGroup
from nybble.core.errors import RecipeError
from nybble.quant.grid import IntGrid
from nybble.recipe.schema import Override, Scheme


@dataclass(frozen=True)
class LinearGroup:
    """Parameters that engines fuse into one module, so that they share a grid or none has one."""

    parameters: tuple[str, ...]
    """Full names, e.g. ``model.layers.0.mlp.gate_proj.weight``."""
    modules: tuple[str, ...]
    """The Linears in them: one each, or many of a stack of experts."""
    block: int
    part: str

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The parameters, those that read the same input together."""
        is_stack = not self.parameters[0].endswith(".weight")
        return tuple((name,) for name in self.parameters) if is_stack else (self.parameters,)


def linear_groups(arch: Architecture, parameters: Collection[str]) -> Iterator[LinearGroup]:
    """Every group of the decoder blocks, the MTP layer last; ``parameters`` are those there are."""
    for block in range(arch.num_blocks):
        prefix = arch.block_prefix(block)
        for group in arch.input_groups:
            if f"{prefix}{group.members[0]}.weight" in parameters:
                yield _group(prefix, group, block)
        if arch.experts and f"{prefix}{arch.experts.module}.down_proj" in parameters:
            owner = f"{prefix}{arch.experts.module}"
            stacks = (f"{owner}.gate_up_proj", f"{owner}.down_proj")
            modules = tuple(m for stack in stacks for m in arch.experts.stacked_modules(stack))
            yield LinearGroup(stacks, modules, block, "experts")
    if arch.mtp:
        for group in arch.mtp.input_groups:
            found = _group(arch.mtp.layer_prefix, group, arch.num_blocks)
            yield replace(found, part="mtp")


def _group(prefix: str, group: InputGroup, block: int) -> LinearGroup:
    modules = tuple(f"{prefix}{member}" for member in group.members)
    return LinearGroup(tuple(f"{m}.weight" for m in modules), modules, block, group.part)


def resolve_grids(
    groups: Collection[LinearGroup], arch: Architecture, scheme: Scheme
) -> dict[str, IntGrid | None]:
    """The grid of every parameter of ``groups``; None: it is kept.

    Raises RecipeError if an override matches nothing or parts a group, or if they keep everything.
    """
    unused = dict.fromkeys(scheme.overrides)
    grids: dict[str, IntGrid | None] = {}
    for group in groups:
        if group.block == arch.num_blocks:
            grid = _grid(scheme, scheme.mtp_bits, None) if scheme.mtp_bits else None
        else:
            winners = {module: _override(module, scheme) for module in group.modules}
            _refuse_parted(winners)
            override = winners[group.modules[0]]
            if override is not None:
                unused.pop(override, None)
            grid = None if override and override.keep else _grid(scheme, scheme.bits, override)
        grids |= dict.fromkeys(group.parameters, grid)
    if unused:
        raise RecipeError(
            f"scheme.overrides: {next(iter(unused)).match!r} decides for no Linear of this model's "
            "blocks: mend or remove it (the MTP head has scheme.mtp_bits, the output head "
            "scheme.lm_head_bits)"
        )
    trunk = (name for group in groups if group.block < arch.num_blocks for name in group.parameters)
    if all(grids[name] is None for name in trunk):
        raise RecipeError(
            "scheme.overrides keeps every Linear of this model's blocks: leave some to quantize"
        )
    return grids


def lm_head_grid(scheme: Scheme) -> IntGrid | None:
    """The output head's grid; None: it is kept."""
    return _grid(scheme, scheme.lm_head_bits, None) if scheme.lm_head_bits else None


def _override(module: str, scheme: Scheme) -> Override | None:
    return next((o for o in scheme.overrides if re.search(o.match, module)), None)


def _grid(scheme: Scheme, bits: int, override: Override | None) -> IntGrid:
    group_size = scheme.group_size
    if override is not None:
        bits = bits if override.bits is None else override.bits
        group_size = group_size if override.group_size is None else override.group_size
    return IntGrid(bits, group_size, scheme.signed_scales)


def _refuse_parted(winners: dict[str, Override | None]) -> None:
    """Engines run a fused group as one module: one method, one grid."""
    (first, chosen), *others = winners.items()
    for module, other in others:
        if other != chosen:
            culprit, caught, missed = (
                (chosen, first, module) if chosen is not None else (other, module, first)
            )
            assert culprit is not None
            raise RecipeError(
                f"scheme.overrides: {culprit.match!r} decides for {caught} but not for {missed}; "
                "engines fuse the two into one module, so one rule must match both"
            )
