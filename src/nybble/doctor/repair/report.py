"""What ``nybble repair`` did, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nybble.doctor.findings import Finding
from nybble.doctor.repair.draft import Done, Draft, Patient
from nybble.doctor.repair.write import left_out

SCHEMA = "nybble.repair/1"

_FINDING_KEYS = ("code", "severity", "where", "seen", "consequence", "fix", "repair")


@dataclass(frozen=True)
class ConfigChange:
    """One value of config.json."""

    key: str
    """Dotted."""
    before: Any
    """None: it was not there, or null."""
    after: Any


@dataclass(frozen=True)
class Changes:
    """In what a result differs from the checkpoint."""

    tensors_dropped: tuple[str, ...] = ()
    tensors_added: tuple[str, ...] = ()
    tensors_replaced: tuple[str, ...] = ()
    """Those with other bytes than before."""
    config: tuple[ConfigChange, ...] = ()
    files_written: tuple[str, ...] = ()
    """Besides weights, index and config.json."""
    files_left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class RepairReport:
    """What was changed, and what is left."""

    checkpoint: str
    out: str | None
    """None: nothing was written, as nothing had to be mended or could be."""
    done: tuple[Done, ...]
    changes: Changes
    unmended: tuple[str, ...]
    """What could not be mended and why, one line each."""
    remaining: tuple[Finding, ...]
    """What check still has to say against the result, or against what stays as it is."""
    is_clean: bool
    """As check has it."""


def changes(patient: Patient, draft: Draft, folder: Path) -> Changes:
    """Compares a draft with the checkpoint in ``folder``."""
    before, after = patient.snapshot.all_tensors(), draft.entries
    return Changes(
        tensors_dropped=tuple(sorted(before.keys() - after.keys())),
        tensors_added=tuple(sorted(after.keys() - before.keys())),
        tensors_replaced=tuple(
            sorted(name for name in before.keys() & after.keys() if after[name].origin is None)
        ),
        config=tuple(_differences("", patient.snapshot.config or {}, draft.config)),
        files_written=tuple(sorted(draft.files)),
        files_left_out=tuple(left_out(folder, draft)),
    )


def repair_json(report: RepairReport) -> str:
    """The report, two spaces of indent, one trailing line break."""
    remaining = [{key: getattr(f, key) for key in _FINDING_KEYS} for f in report.remaining]
    value = {
        "schema": SCHEMA,
        "checkpoint": report.checkpoint,
        "out": report.out,
        "clean": report.is_clean,
        "done": [asdict(done) for done in report.done],
        "changes": asdict(report.changes),
        "unmended": list(report.unmended),
        "remaining": remaining,
    }
    return json.dumps(value, indent=2) + "\n"


def _differences(
    prefix: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[ConfigChange]:
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(f"{prefix}{key}.", old, new)
        elif old != new or (key in before) != (key in after):
            yield ConfigChange(f"{prefix}{key}", old, new)
