"""``nybble inspect``: what is in a checkpoint and what a recipe would make of it."""

from __future__ import annotations

from pathlib import Path

from nybble.arch.plan import TensorPlan
from nybble.arch.spec import Architecture
from nybble.cli.plan_table import plan_table
from nybble.cli.tables import console, human_bytes
from nybble.packing.formats import FORMATS
from nybble.pipeline.estimate import inspect_checkpoint, output_bytes
from nybble.recipe.load import load_recipe
from nybble.recipe.schema import Recipe


def run(model: Path, recipe: str, overrides: list[str], every_tensor: bool) -> None:
    """Prints the architecture, the fate of every tensor, and the sizes before and after."""
    chosen = load_recipe(recipe, overrides)
    arch, plan = inspect_checkpoint(model, chosen)
    print_architecture(arch)
    console.print(plan_table(arch, plan, FORMATS[chosen.format], every_tensor))
    print_sizes(plan, chosen)


def print_architecture(arch: Architecture) -> None:
    """One line on the architecture, one on the MTP head."""
    text = arch.text_config
    kinds = arch.layer_kinds
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    console.print(
        f"{arch.name}: {arch.num_blocks} blocks ({counts} attention), hidden {text.hidden_size}, "
        f"vocabulary {text.vocab_size}"
    )
    head = f"{len(arch.mtp.shapes)} tensors, all present" if arch.mtp else "none declared"
    console.print(f"MTP head: {head}\n")


def print_sizes(plan: TensorPlan, recipe: Recipe) -> None:
    """Totals before and after."""
    base = sum(info.nbytes for info in plan.infos.values())
    result = output_bytes(plan, recipe)
    console.print(
        f"\n{human_bytes(base)} -> {human_bytes(result)} ({result / base:.0%} of the base)"
    )
