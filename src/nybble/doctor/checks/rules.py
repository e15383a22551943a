"""D12 to D15: what is wrong with a declaration's rules, whether or not it shows today."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from nybble.doctor.case import Case, Check
from nybble.doctor.checks.common import clean, counted, hits, is_same, lost, refusals
from nybble.doctor.checks.rule_reading import (
    AUTO_ROUND,
    COMPRESSED_TENSORS,
    GPTQ,
    flat,
    method_name,
    rules_of,
)
from nybble.doctor.engines import Family
from nybble.doctor.findings import Finding, Harm, Hit, Part, Severity
from nybble.doctor.resolve.built import DENSE, Storage

_DECISIVE = (
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "lm_head",
    "checkpoint_format",
    "dynamic",
    "modules_in_block_to_quantize",
)
_PACK = "pack-quantized"


def entries_without_bits(case: Case) -> Iterator[Finding]:
    """D12: entries of extra_config for one Linear that do not say how many bits it has."""
    extra = (case.block or {}).get("extra_config")
    if method_name(case.block) not in AUTO_ROUND or not isinstance(extra, dict):
        return
    bare = [
        rule.entry
        for rule in rules_of(case.block)
        if not rule.is_pattern
        and isinstance(extra[rule.entry], dict)
        and "bits" not in extra[rule.entry]
    ]
    if bare:
        found = _dropped(case, frozenset(bare))
        yield Finding(
            code="D12",
            severity=Severity.ERROR if found else Severity.WARNING,
            where=f"extra_config: {clean(bare[0])}",
            seen=f"{counted(bare, 'entry')} without bits",
            consequence="vLLM takes a missing 'bits' for 16 and builds a Linear dense that no "
            "other is fused with; AutoRound takes the default",
            fix="write bits, group_size and sym into every entry",
            evidence="vLLM 0.32, inc.py; auto-round export_to_autoround/export.py",
            hits=found,
            repair="rules",
        )


def block_names(case: Case) -> Iterator[Finding]:
    """D12: blocks to quantize by names that no tensor begins with."""
    if method_name(case.block) not in AUTO_ROUND or case.block is None:
        return
    expected = case.layout.tensors if case.layout else {}
    names = sorted({*case.snapshot.all_tensors(), *expected})
    for key in ("block_name_to_quantize", "to_quant_block_names"):
        dead = [entry for entry in flat(case.block.get(key)) if not _begins(names, entry)]
        if dead:
            found = _dropped(case, None)
            yield Finding(
                code="D12",
                severity=Severity.ERROR if found else Severity.WARNING,
                where=f"{key}: {clean(dead[0])}",
                seen=f"{counted(dead, 'entry')}: no tensor's name begins so",
                consequence="engines quantize only below these names, and build the rest dense",
                fix="give the names of the lists of blocks as the tensors have them"
                + (f": {case.layout.blocks}" if case.layout else ""),
                evidence="vLLM 0.32, inc/config_parser.py",
                hits=found,
                repair="rules",
            )


def module_list(case: Case) -> Iterator[Finding]:
    """D14: GPTQ's list of modules, which Transformers takes for a list of lists."""
    listed = (case.block or {}).get("modules_in_block_to_quantize")
    if method_name(case.block) not in GPTQ or listed is None:
        return
    if isinstance(listed, list) and all(isinstance(names, list) for names in listed):
        return
    found = [
        Hit(simulation.engine, Part.TRUNK, Harm.REFUSED, simulation.refusal.exception)
        for simulation in case.simulations
        if simulation.engine.family is Family.TRANSFORMERS and simulation.refusal is not None
    ]
    yield Finding(
        code="D14",
        severity=Severity.ERROR if found else Severity.WARNING,
        where="modules_in_block_to_quantize",
        seen="it is no list of lists of names",
        consequence="Transformers stops with TypeError when it joins the lists",
        fix="put brackets around each group: [[...], [...]]",
        evidence="optimum 2.3, gptq/quantizer.py",
        hits=tuple(found),
        repair="rules",
    )


def other_declaration(case: Case) -> Iterator[Finding]:
    """D14: quantize_config.json, which GPTQModel reads, says otherwise than config.json."""
    other, block = case.snapshot.objects.get("quantize_config.json"), case.block
    if other is None or block is None or method_name(block) not in GPTQ:
        return
    differing = [
        key
        for key in _DECISIVE
        if key in other and key in block and not is_same(other[key], block[key])
    ]
    if differing:
        yield Finding(
            code="D14",
            severity=Severity.WARNING,
            where=f"quantize_config.json: {differing[0]}",
            seen=f"{counted(differing, 'value')}, not as in config.json",
            consequence="GPTQModel loads another model than the engines",
            fix="copy config.json's quantization_config into it",
            repair="rules",
        )


def meta(case: Case) -> Iterator[Finding]:
    """D14, as a note: a key that AutoRound's loader refuses."""
    if method_name(case.block) in GPTQ and "meta" in (case.block or {}):
        yield Finding(
            code="D14",
            severity=Severity.NOTE,
            where="quantization_config: meta",
            seen="GPTQModel's notes on how it was made",
            consequence="Transformers cannot load it by AutoRound instead of GPTQModel",
            fix="remove the key if you want that",
            evidence="Transformers 5.23, quantization_config.py, AutoRoundConfig",
        )


def status(case: Case) -> Iterator[Finding]:
    """D15: a status with which Transformers builds nothing packed."""
    block = case.block or {}
    if (
        method_name(block) not in COMPRESSED_TENSORS
        or block.get("quantization_status") == "compressed"
    ):
        return
    transformers = [e for e in case.engines if e.family is Family.TRANSFORMERS]
    packed = _packed(case)
    found = lost(case, packed, transformers)
    if packed:
        yield Finding(
            code="D15",
            severity=Severity.ERROR if found else Severity.WARNING,
            where="quantization_status",
            seen=f"it is {clean(str(block.get('quantization_status'))[:60])}, "
            f"with {counted(packed, 'packed tensor')}",
            consequence="Transformers builds them dense, finds no weights and leaves them random",
            fix="set it to compressed",
            evidence="Transformers 5.23, quantizer_compressed_tensors.py",
            hits=found,
            repair="rules",
        )


def formats(case: Case) -> Iterator[Finding]:
    """D15: packed words under another format's name."""
    block = case.block or {}
    if method_name(block) not in COMPRESSED_TENSORS or not _packed(case):
        return
    groups = block.get("config_groups")
    sections = {"config": block}
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if isinstance(group, dict):
            sections[f"config_groups.{name}"] = group
    named = [f"{key}.format" for key, one in sections.items() if one.get("format", _PACK) != _PACK]
    if not any("format" in one for one in sections.values()):
        named = ["format"]
    if named:
        found = refusals(case)
        yield Finding(
            code="D15",
            severity=Severity.ERROR if found else Severity.WARNING,
            where=clean(named[0]),
            seen=f"{counted(named, 'format')}: not {_PACK}, as the weights are",
            consequence="vLLM serves packed integers by that name alone, whatever their bits",
            fix=f"set it to {_PACK}, at the top level and in each group",
            evidence="vLLM 0.32, compressed_tensors.py",
            hits=found,
            repair="rules",
        )


def invalid(case: Case) -> Iterator[Finding]:
    """D15: keys and values that some release of compressed-tensors forbids."""
    if method_name(case.block) not in COMPRESSED_TENSORS:
        return
    messages: dict[str, list[Hit]] = {}
    for simulation in case.simulations:
        refusal = simulation.refusal
        if refusal is not None and refusal.exception == "ValidationError":
            hit = Hit(simulation.engine, Part.TRUNK, Harm.REFUSED, refusal.exception)
            messages.setdefault(refusal.message, []).append(hit)
    for message, found in messages.items():
        yield Finding(
            code="D15",
            severity=Severity.ERROR,
            where="quantization_config: config_groups",
            seen=clean(message),
            consequence="the compressed-tensors that these engines bring along forbids it",
            fix="write only num_bits, type, symmetric, strategy, group_size and dynamic",
            evidence="compressed-tensors 0.15 to 0.20, quant_args.py",
            hits=tuple(found),
            repair="rules",
        )


CHECKS: tuple[Check, ...] = (
    entries_without_bits,
    block_names,
    module_list,
    other_declaration,
    meta,
    status,
    formats,
    invalid,
)


def _dropped(case: Case, names: frozenset[str] | None) -> tuple[Hit, ...]:
    """What it does that engines build these Linears, or any, dense, which are stored packed."""
    found: list[Hit] = []
    for simulation in case.simulations:
        parts = {
            module.part
            for module, built in simulation.built
            if built == DENSE
            and any(
                _is_packed(case, one.name) and (names is None or one.name in names)
                for one in module.members
            )
        }
        engine = simulation.engine
        harm = Harm.REFUSED if engine.is_vllm(since=(0, 26)) else Harm.RANDOM
        found += hits([engine], parts, harm)
    return tuple(found)


def _is_packed(case: Case, linear: str) -> bool:
    scheme = case.stored[linear].scheme
    return scheme is not None and scheme.storage is not Storage.DENSE


def _packed(case: Case) -> list[str]:
    return [name for name in case.snapshot.all_tensors() if name.endswith(".weight_packed")]


def _begins(names: list[str], start: str) -> bool:
    """Whether any of the sorted names begins so."""
    place = bisect_left(names, start)
    return place < len(names) and names[place].startswith(start)
