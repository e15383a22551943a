"""``nybble repair``: what check finds is mended, in a new folder or in place."""

from __future__ import annotations

from pathlib import Path

from nybble.checkpoint.staging import refuse_used, replaced_folder, staged_folder
from nybble.core.errors import OutputError, RecipeError
from nybble.doctor.check import check_checkpoint
from nybble.doctor.findings import Finding, Severity
from nybble.doctor.repair.draft import Draft, Patient
from nybble.doctor.repair.plan import is_whole, mended
from nybble.doctor.repair.report import Changes, RepairReport, changes
from nybble.doctor.repair.write import write_draft
from nybble.doctor.snapshot import take_snapshot
from nybble.doctor.source import LocalSource, open_source

_Examined = tuple[tuple[Finding, ...], bool]


def repair(
    checkpoint: Path, out: Path | None = None, base: str | None = None, in_place: bool = False
) -> RepairReport:
    """Mends the checkpoint in a folder; ``out`` is ``checkpoint``-repaired if not given.

    ``base`` is the BF16 checkpoint it was made from: a folder, or on the hub; only what is needed
    of it is read. The result appears whole or not at all, and nothing is written if nothing can be
    mended. Raises RecipeError for ``out`` with ``in_place``, CheckpointError for a checkpoint or
    base that cannot be read or do not belong together, UnsupportedArchitecture for an unknown
    model, OutputError if the result cannot be written.
    """
    if in_place and out is not None:
        raise RecipeError("--out and --in-place: give one of them")
    target = checkpoint if in_place else out or checkpoint.with_name(f"{checkpoint.name}-repaired")
    if not in_place:
        _refuse_target(checkpoint, target)
    examined = _examined(checkpoint, base)
    original = take_snapshot(open_source(base)) if base is not None else None
    patient = Patient(take_snapshot(LocalSource(checkpoint)), original)
    draft = mended(patient, {finding.repair for finding in _worth(examined[0]) if finding.repair})
    if not draft.done or not is_whole(draft):
        return _report(checkpoint, None, draft, Changes(), examined)
    changed = changes(patient, draft, checkpoint)
    with replaced_folder(target) if in_place else staged_folder(target) as staging:
        write_draft(draft, patient.snapshot, checkpoint, staging, in_place)
        examined = _examined(staging, base)
    return _report(checkpoint, target, draft, changed, examined)


def _refuse_target(checkpoint: Path, target: Path) -> None:
    refuse_used(target)
    if target.resolve().is_relative_to(checkpoint.resolve()):
        raise OutputError(f"{target} lies within the checkpoint: give another output folder")


def _examined(folder: Path, base: str | None) -> _Examined:
    """What check has to say with all values read, and whether that is nothing bad.

    The base is compared by its headers alone: it may be far away.
    """
    deep = check_checkpoint(str(folder), deep=True)
    if base is None:
        return deep.findings, deep.is_clean
    compared = check_checkpoint(str(folder), base=base)
    findings = dict.fromkeys((*compared.findings, *deep.findings))
    return tuple(findings), deep.is_clean and compared.is_clean


def _worth(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """Those that something should be done about."""
    return tuple(finding for finding in findings if finding.severity is not Severity.NOTE)


def _report(
    checkpoint: Path, out: Path | None, draft: Draft, changed: Changes, examined: _Examined
) -> RepairReport:
    findings, is_clean = examined
    return RepairReport(
        checkpoint=str(checkpoint),
        out=None if out is None else str(out),
        done=() if out is None else draft.done,
        changes=changed,
        unmended=draft.unmended,
        remaining=_worth(findings),
        is_clean=is_clean,
    )
