"""Whatever headers say, the comparison ends, and each finding is fit to be printed."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.doctor_cases import (
    FORMATS,
    MODEL,
    block_of,
    case_of_snapshot,
    findings,
    put,
    snapshot_of,
    sound_headers,
)

from nybble.doctor.checks import resolution
from nybble.doctor.engines import ENGINES
from nybble.doctor.findings import Harm, Severity


def _shapes() -> Iterator[tuple[int, ...]]:
    yield from ((), (0,), (1,), (256,), (2**62, 2), (2048, 256), (1, 2, 3, 4))


_CHANGES = st.lists(
    st.tuples(
        st.sampled_from(sorted(sound_headers("gptq"))),
        st.sampled_from(["drop", "qweight", "weight", "extra.name", "weight_packed", "bias"]),
        st.sampled_from(["I32", "I64", "U8", "F8_E4M3", "BF16", "BOOL"]),
        st.sampled_from(list(_shapes())),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_CHANGES, st.sampled_from(FORMATS))
def test_no_header_breaks_it(
    changes: list[tuple[str, str, str, tuple[int, ...]]], form: str
) -> None:
    headers = sound_headers("gptq")
    for name, what, dtype, shape in changes:
        owner = name.rpartition(".")[0]
        if what == "drop":
            headers.pop(name, None)
        else:
            put(headers, f"{owner}.{what}", dtype, *shape)
    case = case_of_snapshot(snapshot_of({MODEL: headers}, block_of(form)))
    for finding in findings(resolution.CHECKS, case):
        told = (finding.where, finding.seen, finding.consequence, finding.fix, finding.evidence)
        assert all("\n" not in text for text in told)
        assert finding.seen and finding.consequence and finding.fix
        harms = {hit.harm for hit in finding.hits}
        assert (finding.severity is Severity.ERROR) == (bool(harms) and max(harms) > Harm.ABSENT)
        assert {hit.engine for hit in finding.hits} <= set(ENGINES)
