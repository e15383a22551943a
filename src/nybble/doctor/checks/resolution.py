"""What each engine builds against what is stored: D1, D3 to D7, from one comparison.

D1  the engine refuses the declaration as a whole
D3  the MTP head's tensors: missing, or of another shape or type
D4  a module is built in another way than its Linears are stored; or cannot be built
D5  the Linears of a fused module are declared or stored differently
D6  a tensor is missing, or is left over beside those that are read
D7  a tensor has another shape or type than the module's
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from nybble.doctor.case import Case
from nybble.doctor.checks.common import clean, counted
from nybble.doctor.checks.order import is_about_order
from nybble.doctor.compare import Difference, differences
from nybble.doctor.engines import Engine
from nybble.doctor.findings import Finding, Harm, Hit, Part, Severity
from nybble.doctor.fitting import Effect, Fault, Trouble
from nybble.doctor.layout.modules import builds
from nybble.doctor.layout.spec import LM_HEAD, Module, part_of
from nybble.doctor.resolve.built import DENSE, NotAnalysed, Refusal, Scheme, Storage
from nybble.doctor.simulate import Simulation
from nybble.doctor.stored import Stored
from nybble.doctor.wording import names_of, spoken


def refused_declarations(case: Case) -> Iterator[Finding]:
    """D1: engines that raise as soon as they read the declaration."""
    groups: dict[tuple[str, str], list[tuple[Engine, Refusal]]] = {}
    for simulation in case.simulations:
        refusal = simulation.refusal
        if refusal is not None and not is_about_order(case, refusal):
            key = (refusal.exception, refusal.message)
            groups.setdefault(key, []).append((simulation.engine, refusal))
    for (exception, message), found in groups.items():
        hits = _refused((engine for engine, _ in found), Part.TRUNK, exception)
        yield Finding(
            code="D1",
            severity=Severity.ERROR,
            where="quantization_config",
            seen=clean(message),
            consequence=f"{spoken(hits)} on reading the declaration",
            fix="correct the declaration in config.json, or serve with another engine",
            evidence=found[-1][1].evidence,
            hits=hits,
            repair="rules",
        )


def refused_modules(case: Case) -> Iterator[Finding]:
    """D4, D5: modules that an engine cannot build as the declaration wants them."""
    groups: dict[tuple[Part, str, str], list[tuple[Engine, Module, Refusal]]] = {}
    for simulation in case.simulations:
        for module, built in simulation.built:
            if isinstance(built, Refusal) and not is_about_order(case, built):
                # The same reason for many modules is one finding.
                reason = built.message.replace(module.name, "")
                group = groups.setdefault((module.part, built.exception, reason), [])
                group.append((simulation.engine, module, built))
    for (part, exception, _), found in groups.items():
        _, module, refusal = found[0]
        parted = all(len(module.members) > 1 for _, module, _ in found)
        names = dict.fromkeys(linear.name for _, module, _ in found for linear in module.members)
        # The tower is built with the trunk, whether or not images are asked for.
        hit = Part.TRUNK if part is Part.VISION else part
        hits = _refused(dict.fromkeys(engine for engine, _, _ in found), hit, exception)
        yield Finding(
            code="D5" if parted else "D4",
            severity=Severity.ERROR,
            where=clean(next(iter(names))),
            seen=f"{clean(refusal.message)}: {counted(names, 'Linear')}",
            consequence=f"{spoken(hits)} on building {clean(module.name)}",
            fix="declare the same for all Linears that engines fuse into one module"
            if parted
            else "correct the declaration: the engine cannot build what it says",
            evidence=found[-1][2].evidence,
            hits=hits,
            repair="rules",
        )


def not_analysed(case: Case) -> Iterator[Finding]:
    """D4, as a note: what no rule is known for, so that nothing is predicted."""
    groups: dict[str, list[tuple[Engine, str]]] = {}
    for simulation in case.simulations:
        if case.layout is not None and not builds(case.layout, simulation.engine):
            why = "the engine has no class of its own for this architecture"
            groups.setdefault(why, []).append((simulation.engine, case.layout.architecture))
        reasons = {
            built.why: module.name
            for module, built in reversed(simulation.built)
            if isinstance(built, NotAnalysed)
        }
        for why, name in reasons.items():
            groups.setdefault(why, []).append((simulation.engine, name))
    for why, found in groups.items():
        engines = [engine for engine, _ in found]
        yield Finding(
            code="D4",
            severity=Severity.NOTE,
            where=clean(found[0][1]),
            seen=f"not analysed: {clean(why)}",
            consequence=f"nothing is predicted here for {names_of(engines)}",
            fix="load it there, and compare its answers with the base model's",
        )


def _refused(engines: Iterable[Engine], part: Part, exception: str) -> tuple[Hit, ...]:
    return tuple(Hit(engine, part, Harm.REFUSED, exception) for engine in engines)


class _Key(NamedTuple):
    """Differences that are told as one finding."""

    code: str
    part: Part
    what: tuple[str, ...]


@dataclass
class _Group:
    """The differences of one finding."""

    noun: str
    names: dict[str, None] = field(default_factory=dict)
    """Linears or tensors, as the first engine meets them."""
    said: dict[str, None] = field(default_factory=dict)
    """What is wrong with the first of them."""
    faults: set[Fault] = field(default_factory=set)
    effects: dict[tuple[Engine, Part], list[Effect]] = field(default_factory=dict)

    @property
    def counted(self) -> str:
        """'3 Linears, first mtp.fc'."""
        return counted(self.names, self.noun)

    @property
    def told(self) -> str:
        """'scales has another shape ([1, 256], not [2, 256]): 3 Linears, first mtp.fc'."""
        return f"{'; '.join(self.said)}: {self.counted}"


def compared(case: Case) -> Iterator[Finding]:
    """D3 to D7: every difference between what is built and what is stored, with its effects."""
    if case.layout is None:
        return
    groups: dict[_Key, _Group] = {}
    first: dict[tuple[Engine, Part], str] = {}
    for simulation, found in differences(case, case.layout):
        for difference in found:
            _add(groups, difference)
        first |= _first_exceptions(case, simulation, found)
    for key, group in groups.items():
        finding = _finding(case, key, group, first)
        if finding is not None:
            yield finding


CHECKS = (refused_declarations, refused_modules, not_analysed, compared)


def _add(groups: dict[_Key, _Group], difference: Difference) -> None:
    absent = difference.stored is not None and _is_absent(difference.stored)
    is_linear = difference.stored is not None and not absent
    group = groups.setdefault(_key(difference), _Group("Linear" if is_linear else "tensor"))
    group.names[f"{difference.name}.weight" if absent else difference.name] = None
    group.faults |= {trouble.fault for trouble in difference.troubles}
    if len(group.names) == 1:
        troubles = difference.troubles
        said = [_ABSENT] if absent else [_told(trouble) for trouble in troubles]
        group.said |= dict.fromkeys(said)
    place = difference.place
    effects = group.effects.setdefault((place.engine, place.part), [])
    effects += (trouble.effect for trouble in difference.troubles)


def _told(trouble: Trouble) -> str:
    what = clean(trouble.suffix) if trouble.suffix else "tensor"
    if trouble.fault is Fault.MISSING:
        return f"no {what}" if trouble.suffix else _ABSENT
    if trouble.fault is Fault.LEFT_OVER:
        return f"{what} that no module takes"
    return f"{what} of {'shape' if trouble.fault is Fault.MISFIT else 'type'} {trouble.detail}"


_ABSENT = "missing"


def _key(difference: Difference) -> _Key:
    """Which finding tells of a difference."""
    stored, built = difference.stored, difference.built
    # The output head, which the MTP head reads too, is told of once.
    part = part_of(difference.name)
    faults = {trouble.fault for trouble in difference.troubles}
    missing, left_over = Fault.MISSING in faults, Fault.LEFT_OVER in faults
    of_head = part is Part.MTP
    if stored is None or built is None or _is_absent(stored):
        fault = Fault.MISSING if missing else difference.troubles[0].fault
        code = "D3" if of_head and not left_over else "D6" if missing or left_over else "D7"
        return _Key(code, part, (fault,))
    scheme = stored.scheme
    if scheme is not None and not _agree(built, scheme, stored):
        return _Key("D5" if difference.parted else "D4", part, (str(built), str(scheme)))
    if missing or left_over:
        return _Key("D6", part, tuple(sorted(stored.tensors)))
    return _Key("D3" if of_head else "D7", part, tuple(sorted(faults)))


def _is_absent(stored: Stored) -> bool:
    return not stored.schemes and set(stored.tensors) <= {"bias"}


def _agree(built: Scheme, scheme: Scheme, stored: Stored) -> bool:
    if built.agrees(scheme):
        return True
    # One group of all inputs is the same as one scale per output.
    whole = Scheme(built.storage, built.bits, -1, built.symmetric)
    return scheme.group_size == -1 and whole.agrees(scheme) and _is_whole(built, stored)


def _is_whole(built: Scheme, stored: Stored) -> bool:
    packed = stored.tensors.get("qweight") or stored.tensors.get("weight_packed")
    if packed is None or built.group_size is None or not built.bits or len(packed.shape) != 2:
        return False
    along_rows = built.storage is Storage.PACKED
    ins = packed.shape[1 if along_rows else 0]
    return ins * (1 if built.storage is Storage.AWQ else 32 // built.bits) == built.group_size


def _first_exceptions(
    case: Case, simulation: Simulation, found: Iterable[Difference]
) -> dict[tuple[Engine, Part], str]:
    """The exception that each part meets first: building precedes loading, in file order."""
    engine = simulation.engine
    first = {
        (engine, module.part): built.exception
        for module, built in reversed(simulation.built)
        if isinstance(built, Refusal)
    }
    raised = [
        (difference.place.part, difference.tensor(trouble), trouble)
        for difference in found
        for trouble in difference.troubles
        if trouble.effect.raises is not None
    ]
    if not raised:
        return first
    loaded = case.snapshot.loaded_by(engine.family)
    positions = {name: number for number, name in enumerate(loaded)}
    raised.sort(key=lambda met: positions.get(met[1], len(positions)))
    for part, _, trouble in raised:
        first.setdefault((engine, part), trouble.effect.raises or "")
    return first


def _finding(
    case: Case, key: _Key, group: _Group, first: Mapping[tuple[Engine, Part], str]
) -> Finding | None:
    hits = tuple(
        hit
        for (engine, part), effects in group.effects.items()
        if (hit := _hit(engine, part, effects, first)) is not None
    )
    if not hits and group.faults != {Fault.OTHER_TYPE}:
        return None
    advice = _advice(case, key, group)
    return Finding(
        code=key.code,
        severity=Severity.ERROR if hits else Severity.WARNING,
        where=clean(next(iter(group.names))),
        seen=advice.seen,
        consequence=spoken(hits) or "engines convert it while they load; no tool expects it",
        fix=advice.fix,
        evidence=advice.evidence,
        hits=hits,
        repair=advice.repair,
    )


def _hit(
    engine: Engine,
    part: Part,
    effects: Iterable[Effect],
    first: Mapping[tuple[Engine, Part], str],
) -> Hit | None:
    """What an engine suffers: who stops at one tensor never computes with the others."""
    harms = {effect.harm for effect in effects}
    if Harm.REFUSED in harms:
        return Hit(engine, part, Harm.REFUSED, first[engine, part])
    harm = max(harms)
    return Hit(engine, part, harm) if harm is not Harm.NONE else None


class _Advice(NamedTuple):
    seen: str
    fix: str
    evidence: str
    repair: str | None


def _advice(case: Case, key: _Key, group: _Group) -> _Advice:
    if key.code in ("D4", "D5"):
        return _mismatched(key, group)
    if key.code == "D3":
        return _draft(case, group)
    if key.code == "D6":
        is_missing = Fault.MISSING in group.faults
        return _Advice(
            group.told,
            "copy the missing tensors from the base, or get the files again"
            if is_missing
            else "remove the tensors that no engine reads",
            "vLLM 0.19-0.32, default_loader.py" if is_missing else "vllm#53387",
            None,
        )
    return _Advice(
        group.told,
        "quantize or convert it again: the tensor does not fit config.json",
        "vLLM 0.32, parameter.py and linear.py weight_loader",
        None,
    )


def _mismatched(key: _Key, group: _Group) -> _Advice:
    built, stored = key.what
    seen = f"declared {built}, stored {stored}: {group.counted}"
    if key.code == "D5":
        return _Advice(
            f"fused Linears differ; {seen}",
            "store and declare all Linears of a fused module alike",
            "auto-round#1726; vLLM, packed_modules_mapping of each model",
            None,
        )
    if LM_HEAD in group.names:
        return _Advice(
            seen,
            "declare the output head as it is stored, or keep it dense: not all releases take it "
            "quantized",
            "auto-round#1650, auto-round#1709",
            "rules",
        )
    if key.part is not Part.MTP:
        fix = "declare what is stored, by rules that all engines match"
        return _Advice(seen, fix, "vllm#53387, llm-compressor#2752", "rules")
    if stored != str(DENSE):
        fix = "put the base's BF16 tensors in their place, and exclude .*mtp.* from quantization"
        return _Advice(seen, fix, "vllm#53387, auto-round#1755", "graft-mtp")
    fix = "exclude the MTP head from quantization by a rule that all engines match: .*mtp.*"
    return _Advice(seen, fix, "vllm#53387, vllm#41994; vLLM 0.19, qwen3_5_mtp.py", "rules")


def _draft(case: Case, group: _Group) -> _Advice:
    everywhere = case.snapshot.all_tensors()
    unlisted = [name for name in group.names if name in everywhere]
    seen = f"{group.told} of the MTP head"
    if group.faults == {Fault.MISSING} and unlisted:
        file = clean(everywhere[unlisted[0]].file.name)
        return _Advice(
            f"{seen}; {file} has them, which not every engine opens",
            "list the file in the index",
            "vLLM 0.32, default_loader.py and weight_utils.py",
            "index",
        )
    return _Advice(
        seen,
        "copy the mtp.* tensors of the BF16 base, bit for bit, and list them in the index",
        "vLLM 0.19-0.32, default_loader.py: only unquantized checkpoints are checked for what is "
        "missing; from 0.21 --model-loader-extra-config '{\"enable_weights_track\": true}' asks it",
        "graft-mtp",
    )
