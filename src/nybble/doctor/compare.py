"""A checkpoint's tensors against what each engine has built: every difference, and what it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from nybble.checkpoint.headers import TensorInfo
from nybble.doctor.case import Case
from nybble.doctor.engines import Engine, Family
from nybble.doctor.findings import Part
from nybble.doctor.fitting import (
    IGNORED_SUFFIXES,
    WRONG,
    Fault,
    Place,
    Trouble,
    left_over,
    misfit_elsewhere,
    missing_elsewhere,
    place_of,
    troubles,
)
from nybble.doctor.layout.spec import LM_HEAD, Kind, Layout, Linear, Module
from nybble.doctor.resolve.built import Scheme
from nybble.doctor.resolve.methods import method_of
from nybble.doctor.simulate import Simulation
from nybble.doctor.stored import FLOATS, Stored, stored_linears


@dataclass(frozen=True)
class Difference:
    """One tensor, or Linear, that is not what an engine's module expects."""

    place: Place
    name: str
    """The Linear, or the tensor that is no Linear's."""
    built: Scheme | None
    """None: it is no Linear."""
    stored: Stored | None
    troubles: tuple[Trouble, ...]
    parted: bool = False
    """Whether the Linears fused with it are stored in another way than it."""

    def tensor(self, trouble: Trouble) -> str:
        """The name of the tensor that a trouble is about."""
        return f"{self.name}.{trouble.suffix}" if trouble.suffix else self.name


class _Shape(NamedTuple):
    """All that decides how a Linear fits: equal for the Linears of many blocks."""

    shape: tuple[int, int]
    stacked: bool
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class _Files:
    """A checkpoint as it is in the files that one engine opens."""

    loaded: Mapping[str, TensorInfo]
    stored: Mapping[str, Stored]
    shapes: Mapping[str, int]
    """Of each Linear the number of its kind of _Shape: experts are many, and all alike."""
    unknown: tuple[str, ...]
    """Tensors that the layout does not know."""


def differences(case: Case, layout: Layout) -> Iterator[tuple[Simulation, list[Difference]]]:
    """Every difference in each engine: module by module, then those outside of all Linears."""
    quantized = is_quantized(case)
    whole = case.snapshot.all_tensors()
    known: dict[Family | None, _Files] = {}
    for simulation in case.simulations:
        family = simulation.engine.family
        loaded = case.snapshot.loaded_by(family)
        key = None if loaded == whole else family
        if key not in known:
            stored = case.stored if key is None else stored_linears(layout, loaded)
            known[key] = _files(layout, loaded, stored)
        found = list(_of_linears(case, layout, simulation, known[key]))
        parts = {module.part for module, _ in simulation.built}
        found += [
            difference
            for difference in _elsewhere(layout, simulation.engine, known[key], quantized=quantized)
            if difference.place.part in parts
        ]
        yield simulation, found


def is_quantized(case: Case) -> bool:
    """Whether engines take the checkpoint for a quantized one."""
    return case.block is not None and method_of(case.block) is not None


def _files(
    layout: Layout, loaded: Mapping[str, TensorInfo], stored: Mapping[str, Stored]
) -> _Files:
    numbers: dict[_Shape, int] = {}
    shapes = {
        name: numbers.setdefault(_shape(linear, stored[name]), len(numbers))
        for name, linear in layout.linears.items()
    }
    return _Files(
        loaded, stored, shapes, tuple(name for name in loaded if _is_unknown(layout, name))
    )


def _of_linears(
    case: Case, layout: Layout, simulation: Simulation, files: _Files
) -> Iterator[Difference]:
    engine = simulation.engine
    declared = (case.block or {}).get("quant_method")
    method = declared if isinstance(declared, str) else ""
    quantized = is_quantized(case)
    known: dict[tuple[Place, Scheme], dict[int, tuple[Trouble, ...]]] = {}
    for module, built in simulation.built:
        if not isinstance(built, Scheme) or _is_given(module, engine):
            continue
        place = place_of(module, engine, layout.architecture, quantized=quantized, method=method)
        found = known.setdefault((place, built), {})
        for linear in module.members:
            number = files.shapes[linear.name]
            if number not in found:
                found[number] = _troubles(place, built, linear, files.stored[linear.name])
            if found[number]:
                yield Difference(
                    place,
                    linear.name,
                    built,
                    files.stored[linear.name],
                    found[number],
                    _is_parted(module, files.stored),
                )


def _shape(linear: Linear, stored: Stored) -> _Shape:
    return _Shape(
        linear.shape,
        _is_stacked(linear, stored),
        tuple([(suffix, info.dtype, info.shape) for suffix, info in stored.tensors.items()]),
    )


def _is_stacked(linear: Linear, stored: Stored) -> bool:
    weight = stored.tensors.get("weight")
    return weight is not None and weight.name != f"{linear.name}.weight"


def _troubles(place: Place, built: Scheme, linear: Linear, stored: Stored) -> tuple[Trouble, ...]:
    stacked = _is_stacked(linear, stored)
    found = troubles(place, built, linear.shape, stored, stacked=stacked)
    if place.kind is Kind.HEAD and place.part is Part.MTP:
        # The draft reads its own copy of the output head, then shares the decoder's.
        return tuple(trouble for trouble in found if trouble.effect.raises is not None)
    return found


def _is_given(module: Module, engine: Engine) -> bool:
    """SGLang's draft never reads an output head: it is given the decoder's."""
    is_head = module.members[0].name == LM_HEAD
    return engine.family is Family.SGLANG and is_head and module.part is Part.MTP


def _is_parted(module: Module, stored: Mapping[str, Stored]) -> bool:
    if module.kind is Kind.EXPERTS:
        return False
    return len({stored[linear.name].schemes for linear in module.members}) > 1


def _elsewhere(
    layout: Layout, engine: Engine, files: _Files, *, quantized: bool
) -> Iterator[Difference]:
    """Differences of tensors that no Linear's comparison covers."""
    for name, shape in layout.tensors.items():
        info = files.loaded.get(name)
        if name.removesuffix(".weight") in layout.linears:
            continue
        if info is None and name in layout.stacks:
            continue
        exempt = name.removesuffix(".bias") in layout.linears
        trouble = _trouble(engine, name, shape, info, quantized=quantized or exempt)
        if trouble is not None:
            place = _place(layout, engine, name, quantized=quantized)
            yield Difference(place, name, None, None, (trouble,))
    for name in files.unknown:
        place = _place(layout, engine, name, quantized=quantized)
        trouble = Trouble(Fault.LEFT_OVER, "", left_over(place))
        yield Difference(place, name, None, None, (trouble,))


def _trouble(
    engine: Engine,
    name: str,
    shape: tuple[int, ...],
    info: TensorInfo | None,
    *,
    quantized: bool,
) -> Trouble | None:
    if info is None:
        return Trouble(Fault.MISSING, "", missing_elsewhere(engine, name, quantized=quantized))
    if info.shape != shape:
        detail = f"{list(info.shape)}, not {list(shape)}"
        return Trouble(Fault.MISFIT, "", misfit_elsewhere(engine, name), detail)
    if info.dtype not in FLOATS:
        return Trouble(Fault.OTHER_TYPE, "", WRONG, info.dtype)
    return None


def _is_unknown(layout: Layout, name: str) -> bool:
    if name in layout.tensors or name in layout.stacks or name.endswith(IGNORED_SUFFIXES):
        return False
    owner = name.rpartition(".")[0]
    if owner in layout.linears or name.rpartition(".weight.")[0] in layout.linears:
        return False
    # All engines drop an MTP head that config.json does not call for, and buffers of positions.
    is_spare = name.startswith("mtp.") and not layout.has_mtp
    return not (is_spare or name.endswith(_BUFFERS))


_BUFFERS = (".inv_freq", ".cos_cached", ".sin_cached", ".position_ids")


def _place(layout: Layout, engine: Engine, name: str, *, quantized: bool) -> Place:
    return Place(
        engine=engine,
        architecture=layout.architecture,
        part=layout.part_of(name),
        kind=Kind.LINEAR,
        fused=False,
        rows=False,
        quantized=quantized,
        method="",
    )
