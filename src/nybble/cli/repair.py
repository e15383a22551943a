"""``nybble repair``: mends what check finds, and says what was changed."""

from __future__ import annotations

from pathlib import Path

from nybble.cli.tables import console, table
from nybble.core.atomic import write_bytes_atomic
from nybble.doctor.repair.report import Changes, RepairReport, repair_json
from nybble.doctor.repair.run import repair

_NAMED = 3
_VALUE_CHARACTERS = 60


def run(
    checkpoint: Path,
    base: str | Path | None,
    out: Path | None,
    in_place: bool,
    json_file: Path | None,
) -> int:
    """Repairs and prints the report; the exit code: 0 check is content, 1 something remains."""
    report = repair(checkpoint, out, None if base is None else str(base), in_place)
    if json_file is not None:
        write_bytes_atomic(json_file, repair_json(report).encode())
    print_report(report)
    return 0 if report.is_clean else 1


def print_report(report: RepairReport) -> None:
    """What was done, what changed by it, and what is left to do."""
    if report.out is not None:
        made = table(["mended", "what"], [])
        for done in report.done:
            made.add_row(done.action, done.text)
        console.print(made)
        _print_changes(report.changes)
    for text in report.unmended:
        console.print(f"not mended: {text}", soft_wrap=True)
    for finding in report.remaining:
        console.print(
            f"left: {finding.code} {finding.severity}  {finding.where}: {finding.seen}",
            soft_wrap=True,
        )
    console.print(_conclusion(report), soft_wrap=True)


def _print_changes(changes: Changes) -> None:
    made = table(["changed", "how"], [])
    lists = {
        "tensors dropped": changes.tensors_dropped,
        "tensors added": changes.tensors_added,
        "tensors replaced": changes.tensors_replaced,
        "files written": changes.files_written,
        "files left out": changes.files_left_out,
    }
    for label, names in lists.items():
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            made.add_row(label, f"{len(names)}: {', '.join(names[:_NAMED])}{more}")
    for change in changes.config:
        made.add_row(change.key, f"{_shown(change.before)} -> {_shown(change.after)}")
    console.print()
    console.print(made)
    console.print()


def _shown(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= _VALUE_CHARACTERS else f"{text[:_VALUE_CHARACTERS]}..."


def _conclusion(report: RepairReport) -> str:
    if report.out is None:
        rest = "nothing to mend" if report.is_clean else "nothing was written"
        return f"{report.checkpoint}: {rest}"
    rest = "check is content" if report.is_clean else "mended in part"
    return f"{report.out}: {rest}"
