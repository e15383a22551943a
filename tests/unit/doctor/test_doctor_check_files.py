"""D2 and D18: files that are broken, missing, not named or named twice, and those beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.doctor_cases import (
    FORMATS,
    MODEL,
    Headers,
    block_of,
    case_of_snapshot,
    findings,
    info,
    outcomes,
    snapshot_of,
    sound_headers,
    tiny_layout,
)

from nybble.checkpoint.index import INDEX_NAME
from nybble.doctor.case import Case
from nybble.doctor.checks import files, index, sidecars
from nybble.doctor.findings import Finding, Harm, Part, Severity
from nybble.doctor.snapshot import Problem, ProblemKind, Snapshot

TRUNK_FILE, MTP_FILE = "trunk.safetensors", "mtp.safetensors"
CHECKS = (*files.CHECKS, *index.CHECKS)
OLD, NEW = ("vllm-0.19", "vllm-0.24"), ("vllm-0.26", "vllm-0.28", "vllm-0.30")
BESIDE = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


def sharded(form: str | None = "gptq") -> Snapshot:
    """The decoder in one file, the MTP head in another, and an index of both."""
    headers = sound_headers(form or "gptq")
    parts: dict[str, Headers] = {TRUNK_FILE: {}, MTP_FILE: {}}
    for name, tensor in headers.items():
        parts[MTP_FILE if name.startswith("mtp.") else TRUNK_FILE][name] = tensor
    listed = {name: file for file, part in parts.items() for name in part}
    found = snapshot_of(parts, block_of(form) if form else None, weight_map=listed)
    objects = {INDEX_NAME: {"metadata": {"total_size": 0}, "weight_map": listed}}
    sizes = {**found.sizes, INDEX_NAME: 1}
    return replace(found, objects=objects, sizes=sizes, total_size=0)


def found(snapshot: Snapshot) -> list[Finding]:
    return findings(CHECKS, case_of_snapshot(snapshot))


def only(snapshot: Snapshot) -> Finding:
    (finding,) = found(snapshot)
    assert finding.code == "D2"
    return finding


def without_file(snapshot: Snapshot, file: str, kind: ProblemKind) -> Snapshot:
    """The snapshot of a folder in which a file has this problem."""
    headers = {name: header for name, header in snapshot.headers.items() if name != file}
    return replace(snapshot, headers=headers, problems=(Problem(kind, file, "so it is"),))


def unlisted(snapshot: Snapshot, names: set[str]) -> Snapshot:
    listed = {name: file for name, file in (snapshot.weight_map or {}).items() if name not in names}
    return replace(snapshot, weight_map=listed)


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_wrong_with_sound_files(form: str) -> None:
    assert not found(snapshot_of({MODEL: sound_headers(form)}, block_of(form)))
    assert not found(sharded(form))


def test_broken_file_that_the_index_names_stops_all_engines() -> None:
    finding = only(without_file(sharded(), TRUNK_FILE, ProblemKind.BROKEN_HEADER))
    assert finding.severity is Severity.ERROR
    assert set(outcomes(finding, Part.TRUNK).values()) == {(Harm.REFUSED, "SafetensorError")}
    assert len(finding.hits) == 7


def test_broken_file_that_nobody_reads_is_a_warning() -> None:
    snapshot = sharded()
    problem = Problem(ProblemKind.BROKEN_HEADER, "old.safetensors", "truncated")
    finding = only(replace(snapshot, problems=(problem,)))
    assert (finding.severity, finding.hits) == (Severity.WARNING, ())


def test_missing_shard_is_silent_up_to_0_25() -> None:
    finding = only(without_file(sharded(), MTP_FILE, ProblemKind.MISSING_FILE))
    trunk, mtp = outcomes(finding, Part.TRUNK), outcomes(finding, Part.MTP)
    assert {engine: mtp[engine] for engine in OLD} == dict.fromkeys(OLD, (Harm.RANDOM, None))
    assert all(trunk[engine] == (Harm.REFUSED, "FileNotFoundError") for engine in NEW)
    assert trunk["transformers-5.23"] == (Harm.REFUSED, "FileNotFoundError")
    assert trunk["sglang-0.5"] == (Harm.REFUSED, "RuntimeError")
    assert not set(OLD) & set(trunk)
    assert finding.repair == "graft-mtp"


def test_missing_shard_of_the_decoder_cannot_be_grafted() -> None:
    finding = only(without_file(sharded(), TRUNK_FILE, ProblemKind.MISSING_FILE))
    assert finding.repair is None
    assert outcomes(finding, Part.TRUNK)["vllm-0.24"] == (Harm.RANDOM, None)


def test_names_that_leave_the_folder_are_not_to_be_loaded() -> None:
    snapshot = sharded()
    listed = {**(snapshot.weight_map or {}), "x": "../../secret.safetensors"}
    problem = Problem(ProblemKind.UNSAFE_NAME, "../../secret.safetensors", "leaves the folder")
    snapshot = replace(snapshot, weight_map=listed, problems=(problem,))
    first = next(f for f in found(snapshot) if "outside" in f.seen)
    assert first.severity is Severity.ERROR
    assert "do not load" in first.fix


def test_unreadable_index_stops_who_goes_by_it() -> None:
    snapshot = replace(sharded(), weight_map=None, objects={})
    problem = Problem(ProblemKind.UNREADABLE_INDEX, INDEX_NAME, "not valid JSON")
    finding = only(replace(snapshot, problems=(problem,)))
    assert len(finding.hits) == 7
    lone = replace(snapshot, sizes={**snapshot.sizes, MODEL: 1}, problems=(problem,))
    assert "transformers-5.23" not in outcomes(only(lone), Part.TRUNK)


def test_mtp_shard_that_the_index_leaves_out_is_never_loaded() -> None:
    snapshot = sharded()
    finding = only(unlisted(snapshot, set(snapshot.headers[MTP_FILE])))
    assert finding.where == MTP_FILE
    assert finding.severity is Severity.ERROR
    assert set(outcomes(finding, Part.MTP)) == {*OLD, *NEW, "sglang-0.5"}
    assert set(outcomes(finding, Part.MTP).values()) == {(Harm.RANDOM, None)}
    assert not outcomes(finding, Part.TRUNK)
    assert finding.repair == "index"


def test_stale_packed_shard_is_a_warning() -> None:
    snapshot = sharded()
    name = "mtp.fc.qweight"
    headers = {**snapshot.headers, "old.safetensors": {name: info(name, "I32", 64, 256)}}
    finding = only(replace(snapshot, headers=headers))
    assert (finding.severity, finding.hits) == (Severity.WARNING, ())
    assert "GPTQ" in finding.consequence


@pytest.mark.parametrize(("whole", "severity"), [(True, Severity.WARNING), (False, Severity.ERROR)])
def test_lone_file_beside_an_index(whole: bool, severity: Severity) -> None:
    """Transformers reads it alone; what it lacks stays random there, and only there."""
    snapshot = sharded()
    lone = sound_headers("gptq") if whole else dict(snapshot.headers[MTP_FILE])
    headers = {**snapshot.headers, MODEL: lone}
    finding = only(replace(snapshot, headers=headers, sizes={**snapshot.sizes, MODEL: 1}))
    assert finding.severity is severity
    engines = {hit.engine.id for hit in finding.hits}
    assert engines == (set() if whole else {"transformers-5.23"})


def test_lone_file_that_the_index_names_may_leave_out_the_mtp_head() -> None:
    """Transformers does without; compressed-tensors' own savers avoid the name, others do not."""
    headers = sound_headers("gptq")
    parts: dict[str, Headers] = {MODEL: {}, MTP_FILE: {}}
    for name, tensor in headers.items():
        parts[MTP_FILE if name.startswith("mtp.") else MODEL][name] = tensor
    listed = {name: file for file, part in parts.items() for name in part}
    assert not found(snapshot_of(parts, block_of("gptq"), weight_map=listed))


def test_several_files_without_an_index() -> None:
    snapshot = replace(sharded(), weight_map=None, objects={})
    snapshot = replace(snapshot, sizes={TRUNK_FILE: 1, MTP_FILE: 1})
    finding = only(snapshot)
    assert outcomes(finding, Part.TRUNK) == {"transformers-5.23": (Harm.REFUSED, "OSError")}


def test_no_weights_at_all() -> None:
    snapshot = replace(snapshot_of({}), sizes={"config.json": 1})
    assert len(only(snapshot).hits) == 7
    pickles = replace(snapshot, sizes={"config.json": 1, "pytorch_model.bin": 9})
    assert "pickle" in only(pickles).seen


def test_pickle_beside_the_weights_is_a_note() -> None:
    snapshot = snapshot_of({MODEL: sound_headers("gptq")}, block_of("gptq"))
    finding = only(replace(snapshot, sizes={**snapshot.sizes, "training_args.bin": 9}))
    assert finding.severity is Severity.NOTE


def test_tensor_that_the_index_lists_and_no_file_holds() -> None:
    snapshot = sharded()
    listed = {**(snapshot.weight_map or {})}
    name = "mtp.norm.weight"
    headers = {**snapshot.headers, MTP_FILE: dict(snapshot.headers[MTP_FILE])}
    del headers[MTP_FILE][name]  # type: ignore[attr-defined]
    finding = only(replace(snapshot, headers=headers))
    assert finding.where == name
    assert finding.severity is Severity.ERROR
    assert set(outcomes(finding, Part.MTP).values()) == {(Harm.RANDOM, None)}
    listed["no.such.tensor"] = MTP_FILE
    assert only(replace(snapshot, weight_map=listed)).severity is Severity.WARNING


@pytest.mark.parametrize("change", ["moved", "left out", "twice"])
def test_index_that_disagrees_with_headers_in_ways_engines_forgive(change: str) -> None:
    snapshot = sharded()
    listed, name = dict(snapshot.weight_map or {}), "mtp.norm.weight"
    headers = {file: dict(header) for file, header in snapshot.headers.items()}
    if change == "moved":
        listed[name] = TRUNK_FILE
    elif change == "left out":
        del listed[name]
    else:
        headers[TRUNK_FILE][name] = headers[MTP_FILE][name]
    finding = only(replace(snapshot, headers=headers, weight_map=listed))
    assert (finding.where, finding.severity) == (name, Severity.WARNING)
    assert finding.repair == "index"


def test_total_size_is_a_note_and_missing_metadata_an_error() -> None:
    assert only(replace(sharded(), total_size=5)).severity is Severity.NOTE
    listed = sharded().weight_map
    bare = replace(sharded(), objects={INDEX_NAME: {"weight_map": listed}})
    finding = only(bare)
    assert outcomes(finding, Part.TRUNK) == {"transformers-5.23": (Harm.REFUSED, "KeyError")}
    null = replace(sharded(), objects={INDEX_NAME: {"metadata": None}})
    assert finding.hits[0].raises != only(null).hits[0].raises == "TypeError"


def test_unquantized_checkpoints_are_left_to_the_comparison() -> None:
    """vLLM asks what of those was loaded; which release notices what, another check knows."""
    snapshot = unlisted(sharded(None), set(sharded(None).headers[MTP_FILE]))
    assert set(outcomes(only(snapshot), Part.MTP)) == {"sglang-0.5"}


def beside(case_files: tuple[str, ...], **changes: Any) -> Case:
    snapshot = snapshot_of({MODEL: sound_headers("gptq")}, block_of("gptq"))
    sizes = {**snapshot.sizes, **dict.fromkeys(case_files, 1)}
    case = case_of_snapshot(replace(snapshot, sizes=sizes))
    return replace(case, **changes)


def test_nothing_is_missing_beside_a_whole_checkpoint() -> None:
    assert not findings(sidecars.CHECKS, beside(BESIDE))
    new = ("tokenizer.json", "processor_config.json")
    assert not findings(sidecars.CHECKS, beside(new))


def test_missing_processor_hits_vision_alone() -> None:
    (finding,) = findings(sidecars.CHECKS, beside(BESIDE[:2]))
    assert (finding.code, finding.severity) == ("D18", Severity.ERROR)
    assert {hit.part for hit in finding.hits} == {Part.VISION}
    assert finding.repair == "sidecars"
    assert tiny_layout().is_wrapper


def test_missing_tokenizer_is_a_warning() -> None:
    (finding,) = findings(sidecars.CHECKS, beside(BESIDE[2:]))
    assert (finding.severity, finding.where) == (Severity.WARNING, "tokenizer.json")


def test_with_a_base_whatever_it_has_is_wanted() -> None:
    more = (*BESIDE, "generation_config.json", "chat_template.jinja")
    base = beside((*more, "video_preprocessor_config.json")).snapshot
    got = findings(sidecars.CHECKS, beside(BESIDE, base=base))
    assert {finding.where for finding in got} == {
        "generation_config.json",
        "chat_template.jinja",
        "video_preprocessor_config.json",
    }
    # A template may be in the tokenizer's settings, as older exporters have it.
    case = beside(BESIDE, base=base)
    inside = replace(case.snapshot, objects={"tokenizer_config.json": {"chat_template": "{{ x }}"}})
    got = findings(sidecars.CHECKS, replace(case, snapshot=inside))
    assert "chat_template.jinja" not in {finding.where for finding in got}


def test_unreadable_side_file() -> None:
    case = beside(BESIDE)
    problem = Problem(ProblemKind.UNREADABLE_JSON, "tokenizer_config.json", "not valid JSON")
    (finding,) = findings(
        sidecars.CHECKS, replace(case, snapshot=replace(case.snapshot, problems=(problem,)))
    )
    assert finding.where == "tokenizer_config.json"
