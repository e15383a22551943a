"""``nybble eval``: scores on lm-eval's tasks."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter

from nybble.cli.tables import console, human_seconds, table
from nybble.core.atomic import write_bytes_atomic
from nybble.eval.tasks import EvalReport, Request, Score, evaluate


def run(request: Request, json_file: Path | None, command: str) -> None:
    """Evaluates, prints a table, and writes what was asked for."""
    found = evaluate(request, command)
    print_report(found)
    if json_file is not None:
        content = TypeAdapter(EvalReport).dump_json(found, indent=2) + b"\n"
        write_bytes_atomic(json_file, content)


def print_report(found: EvalReport) -> None:
    """Conditions, and one line per figure."""
    versions = found.versions
    console.print(
        f"{found.checkpoint} in {found.engine} {versions[found.engine]}, "
        f"by lm-eval {versions['lm_eval']}"
        + (f", the first {found.limit} documents of each task" if found.limit else "")
        + f"; {human_seconds(found.seconds)}\n",
        soft_wrap=True,
    )
    made = table(["task", "metric", "better"], ["value", "+-", "documents", "few-shot"])
    for score in found.scores:
        made.add_row(f"{score.task} {score.task_version or ''}", *_words(score), *_figures(score))
    console.print(made)


def _words(score: Score) -> list[str]:
    """Its name, with what was made of the answers; and which way is better."""
    return [
        score.metric if score.filter == "none" else f"{score.metric}, {score.filter}",
        {True: "higher", False: "lower", None: ""}[score.higher_is_better],
    ]


def _figures(score: Score) -> list[str]:
    return [
        "not finite" if score.value is None else f"{score.value:.4f}",
        "" if score.standard_error is None else f"{score.standard_error:.4f}",
        "" if score.documents is None else f"{score.documents:,}",
        "" if score.fewshot is None else str(score.fewshot),
    ]
