"""The command line. Commands import what they need when they run, so that --help is fast."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from nybble.core.errors import CheckpointError, NybbleError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From a BF16 LLM checkpoint to a small one that is verified, with its MTP head alive.",
)

Model = Annotated[Path, typer.Argument(help="Folder of the base checkpoint.", metavar="MODEL")]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="A shipped recipe or a .toml file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one field: section.key=value. Repeatable."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")]

DEFAULT_RECIPE = "w4a16-autoround"


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result.")],
    recipe: RecipeName = DEFAULT_RECIPE,
    overrides: Overrides = None,
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan, sizes, memory and time; write nothing.")
    ] = False,
) -> None:
    """Quantize a base checkpoint, block by block; everything else is kept bit-exact."""
    from nybble.cli import quantize as command

    folder = local_folder(model)
    chosen = command.load_recipe(recipe, overrides or [])
    with _interruptible():
        if dry_run:
            command.print_estimate(folder, chosen, device)
        else:
            command.run(folder, out, chosen, device)


@app.command()
def inspect(
    model: Model,
    recipe: RecipeName = DEFAULT_RECIPE,
    overrides: Overrides = None,
    every_tensor: Annotated[
        bool, typer.Option("--tensors", help="One line per tensor instead of per kind.")
    ] = False,
) -> None:
    """Show a checkpoint's parts, and the fate each tensor would get."""
    from nybble.cli import inspect as command

    command.run(local_folder(model), recipe, overrides or [], every_tensor)


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a quantized checkpoint.", metavar="CKPT")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result.")],
    to: Annotated[
        str, typer.Option("--format", "-f", help="auto_round, gptq or compressed-tensors.")
    ],
) -> None:
    """Rewrite a quantized checkpoint in another format: same codes, same scales, no loss."""
    from nybble.cli import convert as command

    with _interruptible():
        command.run(local_folder(checkpoint), out, to)


@app.command()
def recipes() -> None:
    """List the recipes that come with nybble."""
    from nybble.recipe.load import load_recipe, shipped_recipes

    for name in shipped_recipes():
        typer.echo(f"{name:24} {load_recipe(name).summary()}")


@app.command()
def log(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a result, or its quant_log.csv.", metavar="CKPT")
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the log as a figure: FILE.png or FILE.svg.")
    ] = None,
) -> None:
    """Show how the quantized modules fared: errors, what calibration met, the worst ones."""
    from nybble.cli import log as command

    command.run(checkpoint, plot)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result.")] = Path(
        "demo-out"
    ),
) -> None:
    """Quantize the bundled tiny model and measure the result: the whole story on a CPU."""
    from nybble.cli import demo as command

    with _interruptible():
        command.run(out)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is one line: results are staged, so there is nothing to clean up."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("nybble: interrupted; nothing was written\n")
        raise typer.Exit(130) from None


def local_folder(model: Path) -> Path:
    """``model`` if it exists; raises CheckpointError, with the way on for a hub name."""
    if model.exists():
        return model
    hint = ""
    if not model.is_absolute() and len(model.parts) == 2:
        hint = f"; to fetch it from the hub: hf download {model} --local-dir {model.name}"
    raise CheckpointError(f"there is no folder {model}{hint}")


def main() -> None:
    """Entry point: bad input is one line and exit code 2, never a traceback."""
    # The libraries' own notices are not for our users; what matters to them we say ourselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except NybbleError as error:
        sys.stderr.write(f"nybble: {error}\n")
        sys.exit(2)
