"""D3, beyond what the comparison in ``resolution`` finds: the MTP head as a whole."""

from __future__ import annotations

from collections.abc import Iterator

from nybble.doctor.case import Case
from nybble.doctor.checks.common import clean, counted, hits
from nybble.doctor.engines import Family
from nybble.doctor.findings import Finding, Harm, Part, Severity
from nybble.doctor.layout.spec import part_of
from nybble.doctor.resolve.built import DENSE


def uncalled_head(case: Case) -> Iterator[Finding]:
    """D3: the files hold an MTP head that config.json does not call for."""
    if case.layout is None or case.layout.has_mtp:
        return
    names = [name for name in case.snapshot.all_tensors() if part_of(name) is Part.MTP]
    if names:
        engines = [engine for engine in case.engines if engine.family is not Family.TRANSFORMERS]
        yield Finding(
            code="D3",
            severity=Severity.WARNING,
            where=names[0],
            seen=f"config.json calls for no MTP head, the files hold {counted(names, 'tensor')}",
            consequence="no engine drafts with it: there is no speculative decoding",
            fix="set mtp_num_hidden_layers in config.json (in text_config, if there is one) to the "
            "number of layers under mtp.layers",
            evidence="vLLM 0.32, config/speculative.py",
            hits=hits(engines, [Part.MTP], Harm.ABSENT),
        )


def quantized_head(case: Case) -> Iterator[Finding]:
    """D3: the MTP head is quantized, on purpose or by a tool that does not say so.

    That is no mistake for the layer's Linears; SGLang builds ``mtp.fc`` as an ordinary Linear
    (0.5.23, qwen3_5_mtp.py).
    """
    names = [
        name
        for name, stored in case.stored.items()
        if part_of(name) is Part.MTP and any(scheme != DENSE for scheme in stored.schemes)
    ]
    if names:
        joint = "mtp.fc" in names
        yield Finding(
            code="D3",
            severity=Severity.WARNING if joint else Severity.NOTE,
            where=names[0],
            seen=f"the MTP head is stored quantized: {counted(names, 'Linear')}",
            consequence="SGLang has no quantized mtp.fc, other engines only if it is declared"
            if joint
            else "where it loads, fewer drafts may be accepted than with a BF16 head",
            fix="put the base's BF16 tensors in their place, and exclude .*mtp.* from quantization"
            if joint
            else "compare its acceptance with that of the base's BF16 head",
            evidence="auto-round#1755, auto-round#1731" if joint else "auto-round#1755",
            repair="graft-mtp" if joint else None,
        )


def recast_head(case: Case) -> Iterator[Finding]:
    """D3: the MTP head is in F16, where the rest of the model is in BF16."""
    kept = [
        (part_of(name) is Part.MTP, name, info.dtype)
        for name, info in case.snapshot.all_tensors().items()
        if case.layout is not None and name in case.layout.tensors
    ]
    names = [name for in_head, name, dtype in kept if in_head and dtype == "F16"]
    if names and any(dtype == "BF16" for in_head, _, dtype in kept if not in_head):
        yield Finding(
            code="D3",
            severity=Severity.WARNING,
            where=clean(names[0]),
            seen=f"the MTP head is in F16, the rest in BF16: {counted(names, 'tensor')}",
            consequence="engines convert it while they load; what F16 could not hold is lost",
            fix="copy the mtp.* tensors of the BF16 base, bit for bit",
            evidence="vLLM 0.32, models/utils.py",
            repair="graft-mtp",
        )


CHECKS = (uncalled_head, quantized_head, recast_head)
