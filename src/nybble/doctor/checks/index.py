"""D2: the index and the headers of the files that it names agree, tensor by tensor.

All engines load whole files, whatever the index says of single tensors (see ``files``).
"""

from __future__ import annotations

from collections.abc import Iterator

from nybble.checkpoint.index import INDEX_NAME
from nybble.doctor.case import Case, Check
from nybble.doctor.checks.common import (
    clean,
    counted,
    hits,
    is_expected,
    lost,
    named_files,
    reads_lone,
)
from nybble.doctor.engines import Family
from nybble.doctor.findings import Finding, Harm, Hit, Part, Severity


def index_against_headers(case: Case) -> Iterator[Finding]:
    """Tensors that the index and the headers of the files it names do not agree on."""
    listed, headers = case.snapshot.weight_map, case.snapshot.headers
    if listed is None:
        return
    named = set(listed.values()).intersection(headers)
    present = {name for file in named for name in headers[file]}
    absent = [n for n, file in listed.items() if file in headers and n not in present]
    if absent:
        needed = [name for name in absent if is_expected(case, name)]
        yield _index_finding(
            absent,
            "listed in the index, but no file that it names holds them",
            "engines load without them: random weights, silently if the checkpoint is quantized"
            if needed
            else "nothing needs them",
            Severity.ERROR if needed else Severity.WARNING,
            lost(case, needed, [e for e in case.engines if not reads_lone(case, e)]),
        )
    moved = [
        name
        for name, file in listed.items()
        if file in headers and name in present and name not in headers[file]
    ]
    if moved:
        yield _index_finding(
            moved,
            "listed in the index in another file than the one that holds them",
            "engines read whole files and find them; tools that go by the index do not",
        )
    unnamed = [name for file in sorted(named) for name in headers[file] if name not in listed]
    if unnamed:
        yield _index_finding(
            unnamed,
            "in files that the index names, but not listed in it",
            "engines read whole files and load them; tools that go by the index lose them",
        )


def repeated_tensors(case: Case) -> Iterator[Finding]:
    """Tensors that more than one of the files that vLLM reads holds."""
    named = named_files(case)
    owners: dict[str, str] = {}
    repeated: dict[str, str] = {}
    for file in sorted(named.intersection(case.snapshot.headers)):
        for name in case.snapshot.headers[file]:
            if name in owners:
                repeated.setdefault(name, f"{clean(owners[name])} and {clean(file)}")
            owners[name] = file
    if repeated:
        yield Finding(
            code="D2",
            severity=Severity.WARNING,
            where=clean(next(iter(repeated))),
            seen=f"{counted(repeated, 'tensor')}, in both {next(iter(repeated.values()))}",
            consequence="engines keep the one they read last, each in its own order of files",
            fix="remove the file that does not belong, then rebuild the index",
            repair="index",
        )


def total_size(case: Case) -> Iterator[Finding]:
    """The index's total_size against the headers, if every file it names could be read."""
    listed, headers = case.snapshot.weight_map, case.snapshot.headers
    if listed is None or not set(listed.values()) <= headers.keys():
        return
    found = sum(info.nbytes for file in set(listed.values()) for info in headers[file].values())
    claimed = case.snapshot.total_size
    if claimed is not None and claimed != found:
        yield Finding(
            code="D2",
            severity=Severity.NOTE,
            where=INDEX_NAME,
            seen=f"total_size is {claimed}, the tensors take {found} bytes",
            consequence="tools that plan memory by it are misled",
            fix="rebuild the index",
            repair="index",
        )


def no_metadata(case: Case) -> Iterator[Finding]:
    """An index without the object in which Transformers expects total_size."""
    index = case.snapshot.objects.get(INDEX_NAME)
    if index is None or isinstance(index.get("metadata"), dict):
        return
    raises = "TypeError" if "metadata" in index else "KeyError"
    readers = [
        engine
        for engine in case.engines
        if engine.family is Family.TRANSFORMERS and not reads_lone(case, engine)
    ]
    yield Finding(
        code="D2",
        severity=Severity.ERROR if readers else Severity.WARNING,
        where=INDEX_NAME,
        seen="no 'metadata' object",
        consequence="Transformers stops with " + raises,
        fix="rebuild the index",
        evidence="Transformers 5.23, utils/hub.py, get_checkpoint_shard_files",
        hits=hits(readers, [Part.TRUNK], Harm.REFUSED, raises),
        repair="index",
    )


def _index_finding(
    names: list[str],
    seen: str,
    consequence: str,
    severity: Severity = Severity.WARNING,
    found: tuple[Hit, ...] = (),
) -> Finding:
    return Finding(
        code="D2",
        severity=severity,
        where=clean(names[0]),
        seen=f"{counted(names, 'tensor')}: {seen}",
        consequence=consequence,
        fix="rebuild the index from the headers; download again what is missing",
        hits=found,
        repair="index",
    )


CHECKS: tuple[Check, ...] = (index_against_headers, repeated_tensors, total_size, no_metadata)
