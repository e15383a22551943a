"""A hybrid model of twelve blocks, its MTP head and vision tower, as names alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from nybble.packing.format import Declaration
from nybble.quant.grid import IntGrid

TRUNK = "model.language_model.layers"
NUM_BLOCKS = 12
FUSED = {
    "linear_attn.in_proj_qkvz": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    "linear_attn.in_proj_ba": ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
ATTENTION = (*FUSED["self_attn.qkv_proj"], "self_attn.o_proj")
MLP = (*FUSED["mlp.gate_up_proj"], "mlp.down_proj")
GATED_DELTA = (*FUSED["linear_attn.in_proj_qkvz"], "linear_attn.out_proj")
ALWAYS_DENSE = FUSED["linear_attn.in_proj_ba"]
W4 = IntGrid(4, 128, signed_scales=True)

GridOf = Callable[[int, str], IntGrid | None]
Declare = Callable[..., Declaration]


def trunk_members(block: int) -> tuple[str, ...]:
    return (*(ATTENTION if block % 4 == 3 else GATED_DELTA), *MLP)


@pytest.fixture(scope="session")
def declare() -> Declare:
    """(grid of (block, member), grid of the MTP layer, of the head) -> a declaration."""

    def make(
        grid_of: GridOf = lambda _block, _member: W4,
        mtp: IntGrid | None = None,
        lm_head: IntGrid | None = None,
        trunk: str = TRUNK,
    ) -> Declaration:
        names: dict[str, IntGrid | None] = {}
        for block in range(NUM_BLOCKS):
            for member in trunk_members(block):
                names[f"{trunk}.{block}.{member}"] = grid_of(block, member)
            if block % 4 != 3:
                names |= {f"{trunk}.{block}.{member}": None for member in ALWAYS_DENSE}
        counted = Counter(grid for grid in names.values() if grid is not None)
        names |= {"lm_head": lm_head, "mtp.fc": None}
        names |= {f"mtp.layers.0.{member}": mtp for member in (*ATTENTION, *MLP)}
        return Declaration(
            default=counted.most_common(1)[0][0],
            grids={name: grid for name, grid in names.items() if grid is not None},
            dense=tuple(name for name, grid in names.items() if grid is None),
            fused=FUSED,
            block_lists=(trunk, "mtp.layers") if mtp else (trunk,),
            towers=("visual",),
        )

    return make
