"""``nybble inspect``: what is in a checkpoint and what a recipe would make of it."""

from __future__ import annotations

from pathlib import Path

from nybble.arch.plan import TensorPlan
from nybble.arch.spec import Architecture
from nybble.cli.tables import console, human_bytes, plan_table
from nybble.pipeline.estimate import inspect_checkpoint, output_bytes
from nybble.recipe.load import load_recipe


def run(model: Path, recipe: str, overrides: list[str], every_tensor: bool) -> None:
    """Prints the architecture, the fate of every tensor, and the sizes before and after."""
    arch, plan = inspect_checkpoint(model, load_recipe(recipe, overrides))
    print_architecture(arch)
    console.print(plan_table(arch, plan, every_tensor))
    print_sizes(plan)


def print_architecture(arch: Architecture) -> None:
    """One line on the architecture, one on the MTP head."""
    text = arch.text_config
    kinds = [kind.removesuffix("_attention") for kind in text.layer_types]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    console.print(
        f"{arch.name}: {arch.num_blocks} blocks ({counts} attention), hidden {text.hidden_size}, "
        f"vocabulary {text.vocab_size}"
    )
    head = f"{len(arch.mtp.shapes)} tensors, all present" if arch.mtp else "none declared"
    console.print(f"MTP head: {head}\n")


def print_sizes(plan: TensorPlan) -> None:
    """Totals before and after."""
    base = sum(info.nbytes for info in plan.infos.values())
    result = output_bytes(plan)
    console.print(
        f"\n{human_bytes(base)} -> {human_bytes(result)} ({result / base:.0%} of the base)"
    )
