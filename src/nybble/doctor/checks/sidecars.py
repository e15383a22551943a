"""D18: the files beside the weights that engines need to serve text and images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nybble.doctor.case import Case, Check
from nybble.doctor.checks.common import clean, counted, hits
from nybble.doctor.findings import Finding, Harm, Hit, Part, Severity
from nybble.doctor.layout.names import has_tower
from nybble.doctor.snapshot import ProblemKind, Snapshot


@dataclass(frozen=True)
class _Need:
    """One thing that some file has to provide."""

    what: str
    choices: tuple[frozenset[str], ...]
    """Sets of files each of which provides it."""
    without: str


_IMAGES = _Need(
    "the image processor's settings",
    (frozenset({"preprocessor_config.json"}), frozenset({"processor_config.json"})),
    "vLLM, SGLang and AutoProcessor stop with OSError unless images are switched off",
)
_TOKENIZER = _Need(
    "the tokenizer",
    (
        frozenset({"tokenizer.json"}),
        frozenset({"tokenizer.model"}),
        frozenset({"vocab.json", "merges.txt"}),
        frozenset({"tekken.json"}),
        frozenset({"qwen.tiktoken"}),
    ),
    "engines do not start unless they are given a tokenizer from elsewhere",
)
_OF_BASE = (
    _Need(
        "the video processor's settings",
        (frozenset({"video_preprocessor_config.json"}), frozenset({"processor_config.json"})),
        "videos are prepared with other settings than the base's",
    ),
    _Need(
        "the tokenizer's settings",
        (frozenset({"tokenizer_config.json"}),),
        "special tokens may be read as text",
    ),
    _Need(
        "the sampling defaults",
        (frozenset({"generation_config.json"}),),
        "engines sample with their own defaults, and may not stop at the end of a turn",
    ),
)


def processor(case: Case) -> Iterator[Finding]:
    """Image settings, for a model that the config says sees images."""
    if case.layout is not None and has_tower(case.layout) and not _has(case.snapshot, _IMAGES):
        found = hits(case.engines, [Part.VISION], Harm.REFUSED, "OSError")
        yield _finding(_IMAGES, Severity.ERROR, "Transformers 5.23, AutoProcessor", found)


def text_files(case: Case) -> Iterator[Finding]:
    """Tokenizer and chat template, and with a base whatever else it has."""
    if not _has(case.snapshot, _TOKENIZER):
        yield _finding(_TOKENIZER, Severity.WARNING)
    if case.base is None:
        return
    for need in _OF_BASE:
        if _has(case.base, need) and not _has(case.snapshot, need):
            yield _finding(need, Severity.WARNING)
    if _has_template(case.base) and not _has_template(case.snapshot):
        template = _Need(
            "the chat template",
            (frozenset({"chat_template.jinja"}),),
            "chat requests fail, or get a template of another model",
        )
        yield _finding(template, Severity.WARNING)


def unreadable(case: Case) -> Iterator[Finding]:
    """Other JSON files that are none."""
    files = [p for p in case.snapshot.problems if p.kind is ProblemKind.UNREADABLE_JSON]
    if files:
        yield Finding(
            code="D18",
            severity=Severity.WARNING,
            where=clean(files[0].file),
            seen=f"{counted([p.file for p in files], 'file')}: {files[0].message}",
            consequence="whatever reads it stops: tokenizer, processor or quantization tools",
            fix="download or copy it again",
            repair="sidecars",
        )


def _has(snapshot: Snapshot, need: _Need) -> bool:
    return any(choice <= snapshot.sizes.keys() for choice in need.choices)


def _has_template(snapshot: Snapshot) -> bool:
    if not snapshot.sizes.keys().isdisjoint({"chat_template.jinja", "chat_template.json"}):
        return True
    return bool(snapshot.objects.get("tokenizer_config.json", {}).get("chat_template"))


def _finding(
    need: _Need, severity: Severity, evidence: str = "", found: tuple[Hit, ...] = ()
) -> Finding:
    return Finding(
        code="D18",
        severity=severity,
        where=min(need.choices[0]),
        seen=f"no file provides {need.what}",
        consequence=need.without,
        fix="copy it from the base",
        evidence=evidence,
        hits=found,
        repair="sidecars",
    )


CHECKS: tuple[Check, ...] = (processor, text_files, unreadable)
