"""D12 to D15: rules that say what stays dense, against the modules that engines build all the same.

D13 where there is a rule and an engine does not read it as it is meant, else the code of the
declaration's format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nybble.doctor.case import Case, Check
from nybble.doctor.checks.common import clean, counted, refusals
from nybble.doctor.checks.rule_reading import (
    AUTO_ROUND,
    COMPRESSED_TENSORS,
    GPTQ,
    Reading,
    Rule,
    flat,
    method_name,
    reading_of,
)
from nybble.doctor.engines import Engine, Family
from nybble.doctor.findings import Finding, Harm, Hit, Part, Severity
from nybble.doctor.fitting import place_of, troubles
from nybble.doctor.layout.spec import Kind, Module, part_of
from nybble.doctor.resolve.built import DENSE, Block, Scheme
from nybble.doctor.resolve.patterns import PatternError, UntriedPattern
from nybble.doctor.simulate import Simulation
from nybble.doctor.wording import names_of, spoken

PORTABLE = "'.*mtp.*', '.*visual.*', '.*in_proj_(a|b|ba)$'"
"""Patterns that all engines understand alike, in the formats' own spellings."""


def unwanted(case: Case, simulation: Simulation) -> list[Module]:
    """Modules that an engine builds quantized, and whose Linears are all stored dense."""
    return [
        module
        for module, built in simulation.built
        if isinstance(built, Scheme)
        and built != DENSE
        and all(case.stored[one.name].schemes == (DENSE,) for one in module.members)
    ]


def harm_of(case: Case, simulation: Simulation, modules: Iterable[Module]) -> list[Hit]:
    """What it does to load dense tensors into modules that are built quantized."""
    built = {module.name: scheme for module, scheme in simulation.built}
    engine = simulation.engine
    found: dict[Part, set[tuple[Harm, str | None]]] = {}
    for module in modules:
        scheme, linear = built[module.name], module.members[0]
        if case.layout is None or not isinstance(scheme, Scheme):
            continue
        place = place_of(
            module,
            engine,
            case.layout.architecture,
            quantized=True,
            method=method_name(case.block),
        )
        stored = case.stored[linear.name]
        weight = stored.tensors.get("weight")
        stacked = weight is not None and weight.name != f"{linear.name}.weight"
        for trouble in troubles(place, scheme, linear.shape, stored, stacked=stacked):
            effects = found.setdefault(module.part, set())
            effects.add((trouble.effect.harm, trouble.effect.raises))
    hits = []
    for part, effects in found.items():
        refused = {raises for harm, raises in effects if harm is Harm.REFUSED}
        if refused:  # which is met first depends on the order in the files
            raises = refused.pop() if len(refused) == 1 else None
            hits.append(Hit(engine, part, Harm.REFUSED, raises))
        else:
            hits.append(Hit(engine, part, max(harm for harm, _ in effects)))
    return hits


def named_modules(case: Case) -> Iterator[Finding]:
    """D12 to D15: every rule by name, and every module that should have one."""
    reading = reading_of(case)
    if reading is not None:
        yield from _unsound(case, reading)
        yield from _misread(case, reading)
        yield from _idle(reading)
        yield from _uncovered(case, reading)
        yield from _mtp_by_luck(case, reading)


CHECKS: tuple[Check, ...] = (named_modules,)


def _unsound(case: Case, reading: Reading) -> Iterator[Finding]:
    """D13: patterns that do not compile, or that take too long to try."""
    for rule in reading.rules:
        reading.meant(rule)
    for kind, said, consequence in (
        (PatternError, "does not compile", "engines skip the rule, or stop with re.error"),
        (UntriedPattern, "cannot be tried", "engines may take forever to match it"),
    ):
        broken = [rule for rule, error in reading.broken.items() if isinstance(error, kind)]
        if not broken:
            continue
        found = refusals(case, "re.error") if kind is PatternError else ()
        yield Finding(
            code="D13",
            severity=Severity.ERROR if found else Severity.WARNING,
            where=broken[0].shown,
            seen=f"{counted([rule.entry for rule in broken], 'pattern')}: {said}",
            consequence=consequence,
            fix=f"replace it by a simple one, such as {PORTABLE}",
            hits=found,
            repair="rules",
        )


def _misread(case: Case, reading: Reading) -> Iterator[Finding]:
    """D13: rules that mean Linears which some engine builds quantized, or does not find."""
    views = [_View.of(case, simulation) for simulation in case.simulations]
    alike: dict[tuple[tuple[Engine, ...], tuple[Hit, ...]], list[Rule]] = {}
    for rule in reading.rules:
        if rule.excludes and reading.meant(rule):
            deaf, hits = _reception(case, reading, rule, views)
            if deaf and rule not in reading.broken:
                alike.setdefault((deaf, hits), []).append(rule)
    for (deaf, hits), rules in alike.items():
        meant = sorted({name for rule in rules for name in reading.meant(rule)})
        yield Finding(
            code="D13",
            severity=Severity.ERROR if hits else Severity.WARNING,
            where=rules[0].shown,
            seen=f"{counted([rule.entry for rule in rules], 'rule')}: meant for "
            f"{counted(meant, 'Linear')}, but not read so by {names_of(deaf)}",
            consequence=spoken(hits)
            if hits
            else "without effect there; something else keeps these Linears dense, as yet",
            fix=f"write patterns that match every engine's names from the start: {PORTABLE}",
            evidence="vLLM 0.32, qwen3_vl.py, model_loader/utils.py; SGLang 0.5.23, auto_round.py",
            hits=hits,
            repair="rules",
        )


def _reception(
    case: Case, reading: Reading, rule: Rule, views: list[_View]
) -> tuple[tuple[Engine, ...], tuple[Hit, ...]]:
    """The engines on which a rule is lost, and the harm of it."""
    hits: list[Hit] = []
    deaf: list[Engine] = []
    for view in views:
        engine = view.simulation.engine
        modules = view.of_linears(reading.meant(rule))
        if _is_unread(rule, engine):
            continue
        missed = [module for module in modules if module.name in view.unwanted]
        hits += harm_of(case, view.simulation, missed)
        if missed or _is_deaf(reading, rule, engine, modules):
            deaf.append(engine)
    return tuple(deaf), tuple(hits)


def _idle(reading: Reading) -> Iterator[Finding]:
    """D13, as a note: rules that mean no Linear of this model."""
    dead = [r for r in reading.rules if not reading.meant(r) and r not in reading.broken]
    if dead:
        yield Finding(
            code="D13",
            severity=Severity.NOTE,
            where=dead[0].shown,
            seen=f"{counted([rule.entry for rule in dead], 'rule')}: no Linear of that name",
            consequence="without effect; harmless if this model has no such part",
            fix="remove it, or correct the name",
        )


def _uncovered(case: Case, reading: Reading) -> Iterator[Finding]:
    """D12, D14, D15: dense Linears that no rule keeps an engine from building quantized."""
    method = method_name(case.block)
    code = next((code for names, code in _CODES.items() if method in names), None)
    if code is None:
        return
    excluded = frozenset(reading.excluding)
    found: dict[Part, list[Hit]] = {}
    names: dict[Part, dict[str, str]] = {}
    for simulation in case.simulations:
        is_deaf = code == "D14" and simulation.engine.family is Family.TRANSFORMERS
        bare = [m for m in unwanted(case, simulation) if is_deaf or not _means(excluded, m)]
        for hit in harm_of(case, simulation, bare):
            found.setdefault(hit.part, []).append(hit)
        for module in bare:
            listed = names.setdefault(module.part, {})
            listed |= {one.name: module.name for one in module.members}
    for part, hits in found.items():
        linear, module_name = next(iter(names[part].items()))
        yield Finding(
            code=code,
            severity=Severity.ERROR,
            where=clean(linear),
            seen=f"{counted(names[part], 'Linear')}: stored dense, and no rule says so"
            + _listed_by(case.block or {}, module_name),
            consequence=spoken(hits),
            fix=_fix(hits, code),
            evidence="vllm#53387, sglang#35797, llm-compressor#2752",
            hits=tuple(hits),
            repair="rules",
        )


def _mtp_by_luck(case: Case, reading: Reading) -> Iterator[Finding]:
    """D14: a dense MTP head under GPTQ that no rule keeps dense, or that a rule is about."""
    if method_name(case.block) not in GPTQ or not _mtp_is_dense(case):
        return
    mtp = [rule for rule in reading.rules if any(map(_is_mtp, reading.meant(rule)))]
    adding = [rule.shown for rule in mtp if not rule.excludes]
    found = [hit for simulation in case.simulations for hit in _mtp_harm(case, simulation)]
    if adding and (found or len(adding) == len(mtp)):
        seen = "a rule quantizes the MTP head, which is stored dense"
        yield _mtp_finding(adding[0], seen, tuple(found))
    elif not mtp and not found:
        seen = "no rule says that the MTP head, which is stored dense, is so"
        yield _mtp_finding("dynamic", seen, ())


_CODES = {AUTO_ROUND: "D12", GPTQ: "D14", COMPRESSED_TENSORS: "D15"}


@dataclass(frozen=True)
class _View:
    """A simulation, by Linear."""

    simulation: Simulation
    by_linear: dict[str, Module]
    unwanted: frozenset[str]
    """Names of modules that are built quantized and stored dense."""

    @classmethod
    def of(cls, case: Case, simulation: Simulation) -> _View:
        by_linear = {one.name: module for module, _ in simulation.built for one in module.members}
        names = frozenset(module.name for module in unwanted(case, simulation))
        return cls(simulation, by_linear, names)

    def of_linears(self, names: frozenset[str]) -> list[Module]:
        """The modules with any of these members, each once, as they are built."""
        if len(names) == 1:
            return [self.by_linear[name] for name in names if name in self.by_linear]
        return [module for module, _ in self.simulation.built if _means(names, module)]


def _is_deaf(reading: Reading, rule: Rule, engine: Engine, modules: list[Module]) -> bool:
    """Whether an engine finds a rule to match none of the modules that it means, and no other
    rule does: pairs such as 'visual.*' and 'model.visual.*' make up for each other."""
    found = [module for module in modules if module.kind in (Kind.LINEAR, Kind.EXPERTS)]
    if not found or any(reading.reaches(rule, engine, module) for module in found):
        return False
    others = {
        other for linear in found[0].members for other in reading.excluding.get(linear.name, ())
    }
    return not any(reading.reaches(other, engine, found[0]) for other in others - {rule})


def _is_unread(rule: Rule, engine: Engine) -> bool:
    """Transformers reads GPTQ's list of modules, and no ``dynamic`` (optimum 2.3)."""
    return rule.where == "dynamic" and engine.family is Family.TRANSFORMERS


def _means(names: frozenset[str], module: Module) -> bool:
    return any(linear.name in names for linear in module.members)


def _fix(hits: list[Hit], code: str) -> str:
    if code == "D14" and all(hit.engine.family is Family.TRANSFORMERS for hit in hits):
        return "list what is quantized in modules_in_block_to_quantize: all that Transformers reads"
    return f"add the rules that every engine understands: {PORTABLE}"


def _listed_by(block: Block, module: str) -> str:
    """The entry of GPTQ's list, or AutoRound's, that picks a module by a part of its name."""
    for key in ("modules_in_block_to_quantize", "block_name_to_quantize", "to_quant_block_names"):
        for entry in flat(block.get(key)):
            picks = entry in module if key.startswith("modules") else module.startswith(entry)
            if picks:
                return f"; {clean(entry)!r} in {key} picks {clean(module)}"
    return ""


def _mtp_is_dense(case: Case) -> bool:
    mtp = [stored for name, stored in case.stored.items() if _is_mtp(name)]
    return bool(mtp) and all(stored.schemes == (DENSE,) for stored in mtp)


def _is_mtp(linear: str) -> bool:
    return part_of(linear) is Part.MTP


def _mtp_harm(case: Case, simulation: Simulation) -> list[Hit]:
    modules = [one for one in unwanted(case, simulation) if one.part is Part.MTP]
    return harm_of(case, simulation, modules)


def _mtp_finding(where: str, seen: str, found: tuple[Hit, ...]) -> Finding:
    return Finding(
        code="D14",
        severity=Severity.ERROR if found else Severity.WARNING,
        where=where,
        seen=seen,
        consequence="engines that know no other rule build it quantized: random weights, 0 % of "
        "drafts accepted, or an error",
        fix="add '-:.*mtp.*': {} to dynamic",
        evidence="vllm#48816",
        hits=found,
        repair="rules",
    )
