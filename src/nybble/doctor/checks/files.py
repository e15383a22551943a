"""D2: files, index and headers tell the same story, and every engine reads all of it.

vLLM and SGLang read the files that the index names, all of each, and without an index every
``*.safetensors`` of the folder (weight_utils.py, filter_duplicate_safetensors_files). Transformers
reads ``model.safetensors`` alone if there is one, index or not (modeling_utils.py,
_get_resolved_checkpoint_files).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nybble.checkpoint.index import INDEX_NAME
from nybble.doctor.case import Case, Check
from nybble.doctor.checks.common import (
    PACKED_SUFFIXES,
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
from nybble.doctor.reading import LONE_NAME, weight_files
from nybble.doctor.snapshot import Problem, ProblemKind

_PICKLES = (".bin", ".pt", ".pth")
_LOADERS = "vLLM 0.32, weight_utils.py; Transformers 5.23, modeling_utils.py"


def broken_files(case: Case) -> Iterator[Finding]:
    """Shards whose header or length is wrong, one finding each."""
    named = named_files(case)
    for problem in _problems(case, ProblemKind.BROKEN_HEADER):
        readers = [
            engine
            for engine in case.engines
            if (problem.file == LONE_NAME if reads_lone(case, engine) else problem.file in named)
        ]
        yield Finding(
            code="D2",
            severity=Severity.ERROR if readers else Severity.WARNING,
            where=clean(problem.file),
            seen=problem.message,
            consequence=(
                "engines stop with SafetensorError when they open it"
                if readers
                else "no engine loads it, but vLLM opens it when it asks which modules a GPTQ "
                "checkpoint quantizes"
            ),
            fix="download or copy this file again",
            evidence=_LOADERS,
            hits=hits(readers, [Part.TRUNK], Harm.REFUSED, "SafetensorError"),
            repair=None if readers else "index",
        )


def unreadable_index(case: Case) -> Iterator[Finding]:
    """An index that is no JSON object with a usable weight_map."""
    for problem in _problems(case, ProblemKind.UNREADABLE_INDEX):
        readers = [engine for engine in case.engines if not reads_lone(case, engine)]
        yield Finding(
            code="D2",
            severity=Severity.ERROR,
            where=clean(problem.file),
            seen=problem.message,
            consequence="engines that go by the index do not start",
            fix="rebuild the index from the shards' headers",
            evidence=_LOADERS,
            hits=hits(readers, [Part.TRUNK], Harm.REFUSED),
            repair="index",
        )


def missing_files(case: Case) -> Iterator[Finding]:
    """Files that the index names and the folder lacks."""
    files = [problem.file for problem in _problems(case, ProblemKind.MISSING_FILE)]
    if files:
        yield Finding(
            code="D2",
            severity=Severity.ERROR,
            where=clean(files[0]),
            seen=f"the index names {counted(files, 'file')}, not in the folder",
            consequence=(
                "vLLM up to 0.25 loads without its tensors, silently if the checkpoint is "
                "quantized; vLLM from 0.26 and the others do not start"
            ),
            fix="download the missing files, or graft the MTP head if they held nothing else",
            evidence=_LOADERS,
            hits=_absent_file_hits(case, files),
            repair="graft-mtp" if _hold_only_mtp(case, files) else None,
        )


def unsafe_names(case: Case) -> Iterator[Finding]:
    """Names in the index that lead out of the folder."""
    files = [problem.file for problem in _problems(case, ProblemKind.UNSAFE_NAME)]
    if files:
        yield Finding(
            code="D2",
            severity=Severity.ERROR,
            where=INDEX_NAME,
            seen=f"the index names {counted(files, 'file')}, outside of the folder",
            consequence=(
                "Transformers opens whatever lies at that path of your machine; vLLM from 0.26 "
                "and SGLang stop"
            ),
            fix="do not load it: no honest tool writes such an index; get it from its maker",
            evidence=_LOADERS,
            hits=_absent_file_hits(case, files),
        )


def unlisted_files(case: Case) -> Iterator[Finding]:
    """Safetensors files that the index does not name; the lone one is ``lone_file``'s."""
    listed = case.snapshot.weight_map
    if listed is None:
        return
    named = set(listed.values())
    owners = {_owner(name) for name in listed}
    for file, tensors in case.snapshot.headers.items():
        if file in named or file == LONE_NAME:
            continue
        unread = [
            name
            for name in tensors
            if is_expected(case, name) and name not in listed and _owner(name) not in owners
        ]
        readers = [engine for engine in case.engines if not reads_lone(case, engine)]
        consequence = "no engine loads it"
        if any(name.endswith(PACKED_SUFFIXES) for name in tensors):
            consequence += (
                ", but vLLM counts its packed tensors when it asks which modules a GPTQ "
                "checkpoint quantizes"
            )
        if unread:
            consequence = (
                f"engines never load {counted(unread, 'tensor')}: random weights, silently if "
                "the checkpoint is quantized"
            )
        yield Finding(
            code="D2",
            severity=Severity.ERROR if unread else Severity.WARNING,
            where=clean(file),
            seen=f"{len(tensors)} tensors in a file that the index does not name",
            consequence=consequence,
            fix="rebuild the index, or remove the file if it is a leftover",
            evidence="vLLM 0.32, weight_utils.py",
            hits=lost(case, unread, readers),
            repair="index",
        )


def lone_file(case: Case) -> Iterator[Finding]:
    """A model.safetensors beside an index: Transformers reads it alone, vLLM what is named."""
    listed = case.snapshot.weight_map
    if listed is None or LONE_NAME not in case.snapshot.sizes:
        return
    inside = case.snapshot.headers.get(LONE_NAME, {})
    unread = [name for name in listed if name not in inside]
    found = lost(case, unread, [e for e in case.engines if e.family is Family.TRANSFORMERS])
    is_named = LONE_NAME in listed.values()
    if is_named and not found:
        return
    yield Finding(
        code="D2",
        severity=Severity.ERROR if found else Severity.WARNING,
        where=LONE_NAME,
        seen=(
            f"a {LONE_NAME} that the index "
            + ("names among others" if is_named else "does not name")
            + f"; {len(unread)} of the index's tensors are not in it"
        ),
        consequence=(
            "Transformers reads this file alone, vLLM and SGLang those that the index names"
            + (": Transformers leaves the other tensors random" if found else "")
        ),
        fix=f"keep one of the two; name the file otherwise if the index needs {LONE_NAME}",
        evidence="Transformers 5.23, modeling_utils.py, _get_resolved_checkpoint_files",
        hits=found,
        repair="index",
    )


def no_index(case: Case) -> Iterator[Finding]:
    """Weights that Transformers does not find, as no index names them."""
    snapshot = case.snapshot
    if snapshot.weight_map is not None or INDEX_NAME in snapshot.sizes:
        return
    files = weight_files(snapshot.sizes)
    if files == [LONE_NAME] or not files:
        return
    engines = [engine for engine in case.engines if engine.family is Family.TRANSFORMERS]
    inside = snapshot.headers.get(LONE_NAME, {})
    outside = [name for name in _all_names(case) if name not in inside]
    if LONE_NAME in files:
        found = lost(case, outside, engines)
        consequence = f"Transformers reads {LONE_NAME} alone, vLLM and SGLang every file"
    else:
        found = hits(engines, [Part.TRUNK], Harm.REFUSED, "OSError")
        consequence = f"Transformers finds no weights: it wants {LONE_NAME} or an index"
    yield Finding(
        code="D2",
        severity=Severity.ERROR if found else Severity.WARNING,
        where=clean(next(name for name in files if name != LONE_NAME)),
        seen=f"{len(files)} safetensors files and no {INDEX_NAME}",
        consequence=consequence,
        fix="write an index of all files",
        evidence="Transformers 5.23, modeling_utils.py, _get_resolved_checkpoint_files",
        hits=found,
        repair="index",
    )


def no_weights(case: Case) -> Iterator[Finding]:
    """A folder without safetensors files; pickles beside them are only worth a note."""
    sizes = case.snapshot.sizes
    pickles = [name for name in sizes if name.endswith(_PICKLES)]
    if weight_files(sizes) or case.snapshot.weight_map:
        if pickles:
            yield Finding(
                code="D2",
                severity=Severity.NOTE,
                where=clean(pickles[0]),
                seen=f"{counted(pickles, 'pickle file')} beside the safetensors files",
                consequence="engines read the safetensors files; a pickle can run code",
                fix="remove it if it holds the same weights",
            )
        return
    yield Finding(
        code="D2",
        severity=Severity.ERROR,
        where=clean(pickles[0]) if pickles else "*.safetensors",
        seen=f"only {counted(pickles, 'pickle file')}" if pickles else "no weights at all",
        consequence=(
            "engines load pickles, which can run code; nothing of them is checked here"
            if pickles
            else "no engine finds weights to load"
        ),
        fix="convert the weights to safetensors" if pickles else "download the weights",
        hits=() if pickles else hits(case.engines, [Part.TRUNK], Harm.REFUSED),
    )


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _problems(case: Case, kind: ProblemKind) -> list[Problem]:
    return [problem for problem in case.snapshot.problems if problem.kind is kind]


def _absent_file_hits(case: Case, files: Iterable[str]) -> tuple[Hit, ...]:
    """For files that the index names and that are not there; before 0.26 vLLM did not ask."""
    found: list[Hit] = []
    names = _listed_in(case, files)
    for engine in case.engines:
        if engine.is_vllm(before=(0, 26)):
            found += lost(case, names, [engine])
        elif not reads_lone(case, engine):
            raises = "RuntimeError" if engine.family is Family.SGLANG else "FileNotFoundError"
            found += hits([engine], [Part.TRUNK], Harm.REFUSED, raises)
    return tuple(found)


def _listed_in(case: Case, files: Iterable[str]) -> list[str]:
    wanted = set(files)
    return [name for name, file in (case.snapshot.weight_map or {}).items() if file in wanted]


def _hold_only_mtp(case: Case, files: Iterable[str]) -> bool:
    return all(name.startswith("mtp.") for name in _listed_in(case, files))


def _all_names(case: Case) -> Iterator[str]:
    for tensors in case.snapshot.headers.values():
        yield from tensors


CHECKS: tuple[Check, ...] = (
    broken_files,
    unreadable_index,
    missing_files,
    unsafe_names,
    unlisted_files,
    lone_file,
    no_index,
    no_weights,
)
