"""D8: groups of inputs sorted by activation, which newer engines refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nybble.doctor.case import Case
from nybble.doctor.checks.common import clean, counted
from nybble.doctor.engines import Engine, Family
from nybble.doctor.findings import Finding, Harm, Hit, Part, Severity
from nybble.doctor.resolve.built import Refusal, Storage
from nybble.doctor.wording import spoken

_ORDERS = ("group", "dynamic")


def is_about_order(case: Case, refusal: Refusal) -> bool:
    """Whether an engine refuses a declaration because of its activation order."""
    named = "desc_act" in refusal.message or "actorder" in refusal.message
    return named and bool(_sorted_groups(case))


def activation_order(case: Case) -> Iterator[Finding]:
    """D8: the declaration sorts groups by activation."""
    rules = _sorted_groups(case)
    if not rules:
        return
    hits = [*_refusals(case), *_lost_order(case)]
    absent = _without_g_idx(case)
    lost = f"; {counted(absent, 'Linear')} without g_idx, which tells the order" if absent else ""
    yield Finding(
        code="D8",
        severity=Severity.ERROR if hits else Severity.WARNING,
        where=f"quantization_config: {clean(rules[0])}",
        seen=f"groups of inputs are sorted by activation{lost}",
        consequence=spoken(hits)
        if hits
        else "the engines asked for load it; vLLM from 0.30 stops with ValueError",
        fix="quantize again with static groups (desc_act false); if g_idx counts up by group, only "
        "the declaration has to change",
        evidence="vllm#54809, vllm#48148; vLLM 0.30 gptq_utils.py, compressed_tensors.py",
        hits=tuple(hits),
        repair="desc-act",
    )


CHECKS = (activation_order,)


def _sorted_groups(case: Case) -> list[str]:
    """The parts of the declaration that say so."""
    block = case.block or {}
    return [*_desc_act(block), *_actorder(block)]


def _desc_act(block: dict[str, Any]) -> Iterator[str]:
    if _is_true(block.get("desc_act")) and block.get("group_size") != -1:
        yield "desc_act"
    dynamic = block.get("dynamic")
    for rule, values in dynamic.items() if isinstance(dynamic, dict) else ():
        is_sorted = isinstance(values, dict) and _is_true(values.get("desc_act"))
        if is_sorted and values.get("group_size", block.get("group_size")) != -1:
            yield f"dynamic {rule!r}"


def _is_true(value: Any) -> bool:
    return value is True or (isinstance(value, int) and value == 1)


def _actorder(block: dict[str, Any]) -> Iterator[str]:
    groups = block.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        order = weights.get("actorder") if isinstance(weights, dict) else None
        # An old spelling of 'group' is true.
        if order is True or (isinstance(order, str) and order.lower() in _ORDERS):
            yield f"config_groups.{name}.weights.actorder"


def _refusals(case: Case) -> Iterator[Hit]:
    for simulation in case.simulations:
        whole = simulation.refusal
        if whole is not None and is_about_order(case, whole):
            yield Hit(simulation.engine, Part.TRUNK, Harm.REFUSED, whole.exception)
        parts = {
            module.part: built.exception
            for module, built in reversed(simulation.built)
            if isinstance(built, Refusal) and is_about_order(case, built)
        }
        for part, exception in parts.items():
            yield Hit(simulation.engine, part, Harm.REFUSED, exception)


def _without_g_idx(case: Case) -> list[str]:
    """Linears of a GPTQ checkpoint in sorted groups that lack what tells the order."""
    if next(_desc_act(case.block or {}), None) is None:
        return []
    return [
        name
        for name, stored in case.stored.items()
        if any(scheme.storage is Storage.GPTQ for scheme in stored.schemes)
        and "g_idx" not in stored.tensors
    ]


def _lost_order(case: Case) -> Iterator[Hit]:
    """Engines that load sorted groups, and find nothing that tells their order."""
    absent = _without_g_idx(case)
    if case.layout is None or not absent:
        return
    refusing = {hit.engine for hit in _refusals(case)}
    for engine in case.engines:
        if _reads_order(engine) and engine not in refusing:
            for part in dict.fromkeys(case.layout.part_of(name) for name in absent):
                if part is not Part.MTP or engine.family is not Family.TRANSFORMERS:
                    yield Hit(engine, part, Harm.RANDOM)


def _reads_order(engine: Engine) -> bool:
    return engine.family is not Family.VLLM or engine.is_vllm(before=(0, 30))
