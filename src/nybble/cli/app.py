"""The command line. Commands import what they need when they run, so that --help is fast."""

from __future__ import annotations

import os
import shlex
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
def check(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder, hub repository or web address.", metavar="CKPT")
    ],
    base: Annotated[
        str | None, typer.Option(help="The BF16 checkpoint it was made from, to compare with.")
    ] = None,
    engine: Annotated[str, typer.Option(help="vllm, transformers, sglang, or all.")] = "all",
    engine_version: Annotated[
        str | None, typer.Option(help="A release of that engine, like 0.32.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Devices that share each module.")] = 1,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read scales, zero points and kept tensors.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the report to this file.")
    ] = None,
) -> None:
    """Predict from headers alone whether engines load a checkpoint, its MTP head included."""
    from nybble.cli import check as command
    from nybble.doctor.engines import chosen_engines

    engines = chosen_engines(engine, engine_version)
    raise typer.Exit(command.run(checkpoint, base, engines, tp, deep, json_file))


@app.command()
def repair(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a quantized checkpoint.", metavar="CKPT")
    ],
    base: Annotated[str | None, typer.Option(help="The BF16 checkpoint it was made from.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the result; else CKPT-repaired.")
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change the checkpoint itself instead.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write what was changed to this file.")
    ] = None,
) -> None:
    """Mend what check finds: the MTP head, exclusion rules, index, side files, zero points."""
    from nybble.cli import repair as command

    folder = local_folder(checkpoint)
    with _interruptible():
        raise typer.Exit(command.run(folder, base, out, in_place, json_file))


@app.command()
def kld(
    base: Annotated[
        Path, typer.Argument(help="Folder of the BF16 base, or a reference file.", metavar="BASE")
    ],
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of checkpoints, in any format.", metavar="CKPT..."),
    ] = None,
    text: Annotated[
        str, typer.Option(help="A data set's name, hf:OWNER/NAME@COMMIT:SPLIT, or a text file.")
    ] = "wikitext-2-raw-test",
    windows: Annotated[int, typer.Option(min=1, help="How many windows of the text.")] = 64,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens in each.")] = 2048,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of the arithmetic: float32 or bfloat16.")] = "float32",
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Also the truncated form, of so many tokens.")
    ] = None,
    noise: Annotated[
        bool, typer.Option("--noise/--no-noise", help="Also measure the base against itself.")
    ] = True,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Even on windows used in calibration.")
    ] = False,
    head: Annotated[
        Path | None, typer.Option(help="With a reference file: the base, for its output head.")
    ] = None,
    save_reference: Annotated[
        Path | None,
        typer.Option(help="Write the base's predictions: truncated with --top-k, else exact."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all figures to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a figure: FILE.png or FILE.svg.")
    ] = None,
) -> None:
    """Measure exact KL divergence from the base, and perplexity, block by block."""
    from nybble.cli import kld as command
    from nybble.eval.texts import Text

    request = command.Request(
        base=local_folder(base),
        candidates=tuple(local_folder(path) for path in checkpoints or []),
        text=Text(text, windows, seqlen),
        device=device,
        dtype=dtype,
        top_k=top_k,
        noise=noise,
        allow_overlap=allow_overlap,
        head=local_folder(head) if head else None,
        save_reference=save_reference,
        json_file=json_file,
        plot=plot,
    )
    with _interruptible():
        command.run(request)


@app.command()
def accept(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(help="Folders of checkpoints, in any format.", metavar="CKPT..."),
    ],
    num_drafts: Annotated[
        int, typer.Option("--n", min=1, max=16, help="Tokens to draft in a step.")
    ] = 4,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="CLASS=SOURCE",
            help="A text class of your own instead of the bundled ones. Repeatable.",
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows of each class.")] = 8,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens in each.")] = 512,
    on_policy: Annotated[
        bool,
        typer.Option("--on-policy", help="Also on its own text, with the whole model in memory."),
    ] = False,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="With --on-policy: tokens to write for each window.")
    ] = 128,
    minimum: Annotated[
        float | None,
        typer.Option("--min", min=0, max=1, help="Exit with 1 if fewer first drafts are right."),
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Even on windows used in calibration.")
    ] = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of the arithmetic: float32 or bfloat16.")] = "float32",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all figures to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a figure: FILE.png or FILE.svg.")
    ] = None,
) -> None:
    """Measure how many drafts of the MTP head are accepted, and the speed-up to expect."""
    from nybble.cli import accept as command

    request = command.Request(
        checkpoints=tuple(local_folder(path) for path in checkpoints),
        num_drafts=num_drafts,
        texts=tuple(texts or []),
        windows=windows,
        seqlen=seqlen,
        new_tokens=new_tokens if on_policy else None,
        allow_overlap=allow_overlap,
        minimum=minimum,
        device=device,
        dtype=dtype,
        json_file=json_file,
        plot=plot,
    )
    with _interruptible():
        raise typer.Exit(command.run(request))


@app.command("eval")
def eval_tasks(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a base or quantized checkpoint.", metavar="CKPT")
    ],
    tasks: Annotated[str, typer.Option(help="Tasks and groups of lm-eval: hellaswag,gsm8k.")],
    engine: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many documents of each task.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in each request; else as the task says.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Requests at a time: 8, or vLLM's own choice.")
    ] = None,
    device: Device = "auto",
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a request and its answer together.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of further tasks; the Python in it is run.")
    ] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(help="The python of vLLM's own environment.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all figures to this file.")
    ] = None,
) -> None:
    """Score a checkpoint on lm-eval's tasks, in Transformers or vLLM."""
    from nybble.cli import eval_tasks as command
    from nybble.eval.tasks import Request

    request = Request(
        checkpoint=local_folder(checkpoint),
        tasks=tuple(dict.fromkeys(name for part in tasks.split(",") if (name := part.strip()))),
        engine=engine,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device,
        max_length=max_length,
        python=vllm_python,
    )
    with _interruptible():
        command.run(request, json_file, shlex.join(["nybble", *sys.argv[1:]]))


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
