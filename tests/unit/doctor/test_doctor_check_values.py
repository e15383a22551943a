"""D7, D8, D11, D17 and D19: what only the values tell, on weights kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.doctor_cases import (
    BLOCKS,
    FORMATS,
    MODEL,
    block_of,
    case_of_snapshot,
    findings,
    outcomes,
    snapshot_of,
    sound_headers,
    tiny_layout,
)

from nybble.checkpoint.headers import ITEM_BYTES, TensorInfo
from nybble.core.errors import CheckpointError
from nybble.doctor.case import Case
from nybble.doctor.checks import values
from nybble.doctor.findings import Finding, Harm, Part, Severity

O_PROJ = f"{BLOCKS}.3.self_attn.o_proj"
NORM = f"{BLOCKS}.0.input_layernorm.weight"
ONE = {"BF16": b"\x80\x3f", "F16": b"\x00\x3c", "I64": b"\0" * 8}
"""The number one, in types that scales and weights have."""


@dataclass
class Memory:
    """A source that holds one file of bytes and counts what is read at a time."""

    data: bytearray
    largest: int = 0
    label: ClassVar[str] = "memory"
    parallel: ClassVar[int] = 1
    broken: set[int] = field(default_factory=set)

    def sizes(self) -> Mapping[str, int]:
        return {MODEL: len(self.data)}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        assert name == MODEL
        if start in self.broken:
            raise CheckpointError("the connection is gone")
        found = bytes(self.data[start:stop])
        self.largest = max(self.largest, len(found))
        return found


def sound(form: str) -> Case:
    """Sound values: ones, trivial g_idx, zero points of version 1, real shapes."""
    headers: dict[str, TensorInfo] = {}
    data = bytearray()
    for name, info in sound_headers(form).items():
        start = len(data)
        data += content(name, info)
        headers[name] = replace(info, file=Path(MODEL), start=start, stop=len(data))
    snapshot = snapshot_of({MODEL: headers}, block_of(form))
    return case_of_snapshot(replace(snapshot, source=Memory(data)))


def content(name: str, info: TensorInfo) -> bytes:
    suffix = name.rpartition(".")[2]
    if suffix == "qzeros":
        return b"\x77\x77\x77\x77" * info.numel
    if suffix == "g_idx":
        return (np.arange(info.numel, dtype="<i4") // 128).tobytes()
    if suffix == "weight_shape":
        return np.array(tiny_layout().linears[name.rpartition(".")[0]].shape, "<i8").tobytes()
    return ONE.get(info.dtype, b"\0" * ITEM_BYTES[info.dtype]) * info.numel


def write(case: Case, name: str, data: bytes, at: int = 0) -> Case:
    """The case with these bytes in the place of a tensor's, in memory of its own."""
    info = case.snapshot.all_tensors()[name]
    source: Any = case.snapshot.source
    copied = bytearray(source.data)
    copied[info.start + at : info.start + at + len(data)] = data
    assert info.start + at + len(data) <= info.stop
    return replace(case, snapshot=replace(case.snapshot, source=Memory(copied)))


def found(case: Case) -> list[Finding]:
    return findings(values.CHECKS, case)


def only(case: Case) -> Finding:
    (finding,) = found(case)
    return finding


@pytest.fixture(scope="module")
def cases() -> Iterator[Mapping[str, Case]]:
    yield {form: sound(form) for form in FORMATS}


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_wrong_with_sound_values(cases: Mapping[str, Case], form: str) -> None:
    assert not found(cases[form])


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        (f"{O_PROJ}.scales", b"\x00\x7c"),
        (f"{O_PROJ}.scales", b"\x01\x7e"),
        (NORM, b"\x80\xff"),
        ("mtp.norm.weight", b"\xc0\x7f"),
        ("model.visual.merger.norm.weight", b"\x80\x7f"),
    ],
)
def test_non_finite_values_are_found_wherever_they_are(
    cases: Mapping[str, Case], name: str, bits: bytes
) -> None:
    info = cases["gptq"].snapshot.all_tensors()[name]
    finding = found(write(cases["gptq"], name, bits, at=info.nbytes - 2))[0]
    assert (finding.code, finding.severity, finding.where) == ("D19", Severity.ERROR, name)
    part = tiny_layout().part_of(name)
    assert {hit.part for hit in finding.hits} == {part}


def test_zero_scale_is_a_warning_and_a_rounded_one_a_note(cases: Mapping[str, Case]) -> None:
    scales = f"{O_PROJ}.scales"
    assert only(write(cases["gptq"], scales, b"\0\0")).severity is Severity.WARNING
    inexact, tiny = np.array([1 + 2**-10], "<f2"), np.array([2.0**-15], "<f2")
    for value in (inexact, tiny):
        finding = only(write(cases["gptq"], scales, value.tobytes()))
        assert (finding.code, finding.severity) == ("D19", Severity.NOTE)
    exact = np.array([2.0**-14, 1 + 2**-7], "<f2")
    assert not found(write(cases["gptq"], scales, exact.tobytes()))


@settings(deadline=None, max_examples=30)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(bool))
def test_rounded_means_rounded_by_bf16_or_below_fp16s_range(value: float) -> None:
    """Against the definition: of a single, BF16 keeps the upper 16 bits."""
    info = TensorInfo("x.scales", "F32", (1,), Path(MODEL), 0, 4)
    single = np.array([value], "<f4")
    faults = set(values._faults(info, single.tobytes()))
    exact = int(single.view("<u4")[0]) % 65536 == 0 and abs(value) >= 2.0**-14
    assert (values._Fault.ROUNDED in faults) is not exact


def test_double_that_a_single_cannot_hold_is_rounded() -> None:
    info = TensorInfo("x.scales", "F64", (1,), Path(MODEL), 0, 8)
    for value, rounded in ((1.0, False), (1 + 2.0**-40, True), (1e300, True)):
        faults = set(values._faults(info, np.array([value], "<f8").tobytes()))
        assert (values._Fault.ROUNDED in faults) is rounded


@pytest.mark.parametrize("form", ["auto_round", "gptq"])
def test_zero_points_of_the_other_convention(cases: Mapping[str, Case], form: str) -> None:
    info = cases[form].snapshot.all_tensors()[f"{O_PROJ}.qzeros"]
    other = write(cases[form], info.name, b"\x88" * info.nbytes)
    finding = only(other)
    assert (finding.code, finding.repair) == ("D11", "zero-points")
    assert outcomes(finding, Part.TRUNK) == {"transformers-5.23": (Harm.WRONG, None)}
    mixed = only(write(cases[form], info.name, b"\x88\x88\x88\x88"))
    assert {hit.engine.family.value for hit in mixed.hits} == {"vllm", "sglang"}
    assert mixed.repair is None


def test_declared_version_2_wants_the_other_convention(cases: Mapping[str, Case]) -> None:
    case = cases["gptq"]
    assert case.block is not None
    second = replace(case, block={**case.block, "checkpoint_format": "gptq_v2"})
    finding = only(second)
    assert (finding.code, finding.seen.split(",")[0]) == ("D11", "25 tensors")
    assert not found(replace(case, block={**case.block, "sym": False}))


def test_order_of_inputs_that_the_declaration_hides(cases: Mapping[str, Case]) -> None:
    name = f"{O_PROJ}.g_idx"
    sorted_ = write(cases["gptq"], name, np.array([1], "<i4").tobytes())
    finding = only(sorted_)
    assert (finding.code, finding.where) == ("D8", name)
    assert "transformers-5.23" not in outcomes(finding, Part.TRUNK)
    assert outcomes(finding, Part.TRUNK)["vllm-0.19"] == (Harm.WRONG, None)
    assert sorted_.block is not None
    assert not found(replace(sorted_, block={**sorted_.block, "desc_act": True}))


def test_declared_shape_that_is_not_the_linears(cases: Mapping[str, Case]) -> None:
    name = f"{O_PROJ}.weight_shape"
    finding = only(write(cases["compressed-tensors"], name, np.array([4, 4], "<i8").tobytes()))
    assert (finding.code, finding.where) == ("D7", name)
    assert set(outcomes(finding, Part.TRUNK)) == {"transformers-5.23"}


@pytest.mark.parametrize("name", [NORM, "mtp.norm.weight"])
def test_kept_tensor_that_is_not_the_bases(cases: Mapping[str, Case], name: str) -> None:
    case = cases["gptq"]
    unquantized = {
        key: value for key, value in (case.snapshot.config or {}).items() if "quant" not in key
    }
    base = replace(case.snapshot, config=unquantized)
    assert not found(replace(case, base=base))
    finding = only(write(replace(case, base=base), name, b"\x00\x40"))
    assert (finding.code, finding.severity, finding.where) == ("D17", Severity.ERROR, name)
    assert finding.repair == ("graft-mtp" if name.startswith("mtp.") else None)


def test_norms_that_smoothing_scaled_are_a_warning(cases: Mapping[str, Case]) -> None:
    case = cases["compressed-tensors"]
    base = replace(case.snapshot, config={})
    finding = only(write(replace(case, base=base), NORM, b"\x00\x40"))
    assert (finding.severity, finding.hits) == (Severity.WARNING, ())


def test_source_that_fails_ends_the_checks_with_a_finding(cases: Mapping[str, Case]) -> None:
    case = write(cases["gptq"], NORM, b"")
    source: Any = case.snapshot.source
    source.broken.add(case.snapshot.all_tensors()[NORM].start)
    assert only(case).seen == "the connection is gone"
    cut = write(cases["gptq"], NORM, b"")
    del cut.snapshot.source.data[-2:]  # type: ignore[attr-defined]
    assert "ends within tensor" in only(cut).seen


def test_tensors_are_read_in_pieces(
    cases: Mapping[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in a late piece is found, and no more is in memory than a piece."""
    monkeypatch.setattr(values, "_CHUNK_BYTES", 96)
    case = cases["gptq"]
    info = case.snapshot.all_tensors()[f"{O_PROJ}.g_idx"]
    shuffled = write(case, info.name, b"\xff\xff\xff\xff", at=info.nbytes - 4)
    assert only(shuffled).code == "D8"
    source: Any = shuffled.snapshot.source
    assert source.largest == 96
