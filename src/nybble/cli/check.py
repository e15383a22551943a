"""``nybble check``: what each engine will make of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

from rich.padding import Padding

from nybble.cli.tables import console, table
from nybble.core.atomic import write_bytes_atomic
from nybble.doctor.check import Report, check_checkpoint
from nybble.doctor.engines import Engine, Family
from nybble.doctor.findings import Finding, Part, Severity
from nybble.doctor.verdict import Verdict


def run(
    checkpoint: str,
    base: str | None,
    engines: tuple[Engine, ...],
    tensor_parallel: int,
    deep: bool,
    json_file: Path | None,
) -> int:
    """Prints verdicts and findings; returns the exit code: 0 clean, 1 found wanting, 2 unknown."""
    report = check_checkpoint(
        checkpoint, base=base, engines=engines, tensor_parallel=tensor_parallel, deep=deep
    )
    if json_file is not None:
        # pydantic takes longer to import than a check takes.
        from nybble.doctor.schema import report_json

        write_bytes_atomic(json_file, report_json(report).encode())
    print_report(report)
    if not report.is_clean:
        return 1
    return 0 if report.is_known else 2


def print_report(report: Report) -> None:
    """A table of verdicts, then every finding, the gravest first."""
    console.print(f"{report.checkpoint}: {report.method or 'not quantized'}\n", soft_wrap=True)
    made = table(["engine", "verdict"], [])
    for verdict in merged(report.verdicts):
        made.add_row(verdict.engine.label, verdict.sentence)
    console.print(made)
    for finding in report.findings:
        console.print()
        _print_finding(finding)
    if any(_serves_drafts(verdict) for verdict in report.verdicts):
        console.print(_SERVE.format(report.checkpoint), soft_wrap=True)
    if any(finding.repair for finding in report.findings):
        base = f" --base {report.base or 'BASE'}"
        console.print(
            f"\nto mend it: nybble repair {report.checkpoint}{base} -o OUT", soft_wrap=True
        )


def merged(verdicts: tuple[Verdict, ...]) -> list[Verdict]:
    """Verdicts of successive releases that say the same become one."""
    groups = groupby(verdicts, key=lambda verdict: (verdict.engine.family, verdict.sentence))
    found = [list(group) for _, group in groups]
    return [replace(group[0], engine=group[0].engine.joined(group[-1].engine)) for group in found]


# With weights tracked, vLLM refuses a head of which anything is missing; run with 0.32.
_SERVE = """
to serve it with its MTP head, and have vLLM 0.21 or later refuse lost weights:
vllm serve {} --no-enable-prefix-caching \\
    --speculative-config '{{"method": "mtp", "num_speculative_tokens": 1}}' \\
    --model-loader-extra-config '{{"enable_weights_track": true}}'"""


def _serves_drafts(verdict: Verdict) -> bool:
    mtp = verdict.outcomes.get(Part.MTP)
    is_sound = verdict.unknown is None and verdict.is_clean
    return is_sound and mtp is not None and verdict.engine.family is Family.VLLM


def _print_finding(finding: Finding) -> None:
    seen = finding.seen if finding.where in finding.seen else f"{finding.where}: {finding.seen}"
    console.print(f"{finding.code} {finding.severity}  {seen}")
    fix = "" if finding.severity is Severity.NOTE else f"fix: {finding.fix}"
    see = f"see: {finding.evidence}" if finding.evidence else ""
    for text in filter(None, (finding.consequence, fix, see)):
        console.print(Padding(text, (0, 0, 0, 4)))
