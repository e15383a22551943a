"""What several checks share: words for many names, and the harm of what never arrives."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from nybble.checkpoint.ondisk import shown
from nybble.doctor.case import Case
from nybble.doctor.engines import Engine, Family
from nybble.doctor.findings import Harm, Hit, Part
from nybble.doctor.layout.spec import part_of
from nybble.doctor.reading import LONE_NAME, weight_files
from nybble.doctor.resolve.built import Refusal

PACKED_SUFFIXES = (".qweight", ".weight_packed", ".qzeros")
"""Of tensors that only quantized Linears have."""


def counted(names: Collection[str], noun: str) -> str:
    """'1 tensor, mtp.fc.weight', '3 tensors, first mtp.fc.weight': for what was seen."""
    first = clean(next(iter(names)))
    return f"1 {noun}, {first}" if len(names) == 1 else f"{len(names)} {noun}s, first {first}"


def clean(name: str) -> str:
    """A name from outside, quoted and cut if it is not a short printable one."""
    return name if name.isprintable() and len(name) <= 120 else shown(name)


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object that stands under a key; empty if there is none."""
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def is_same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; not, if they nest deeper than Python compares."""
    try:
        return bool(one == other)
    except RecursionError:
        return False


def is_expected(case: Case, name: str) -> bool:
    """Whether the model needs a tensor of this name, be it of a quantized Linear."""
    layout = case.layout
    if layout is None or name in layout.tensors or name in layout.stacks:
        return True
    owner, _, suffix = name.rpartition(".")
    return owner in layout.linears and suffix not in _SPARE


_SPARE = ("bias", "g_idx")
"""Tensors of a Linear that it can do without."""


def hits(
    engines: Iterable[Engine], parts: Iterable[Part], harm: Harm, raises: str | None = None
) -> tuple[Hit, ...]:
    """The same harm to each part in each engine; Transformers has no MTP head to be harmed."""
    wanted = sorted(set(parts), key=list(Part).index)
    return tuple(
        Hit(engine, part, harm, raises)
        for engine in engines
        for part in wanted
        if part is not Part.MTP or engine.family is not Family.TRANSFORMERS
    )


def lost(case: Case, names: Iterable[str], engines: Iterable[Engine]) -> tuple[Hit, ...]:
    """The parts that stay random, in silence, where tensors never reach an engine.

    vLLM asks whether all was loaded only if the checkpoint is not quantized (default_loader.py,
    0.19 to 0.32), and then not of all: the checks that compare module by module tell.
    """
    parts = {part_of(name) for name in names if is_expected(case, name)}
    unaware = [e for e in engines if e.family is not Family.VLLM or case.block is not None]
    return hits(unaware, parts, Harm.RANDOM)


def reads_lone(case: Case, engine: Engine) -> bool:
    """Whether an engine reads ``model.safetensors`` and no other file."""
    return engine.family is Family.TRANSFORMERS and LONE_NAME in case.snapshot.sizes


def named_files(case: Case) -> set[str]:
    """The files that vLLM and SGLang read, as far as they exist."""
    listed = case.snapshot.weight_map
    if listed is not None:
        return set(listed.values())
    return set(weight_files(case.snapshot.sizes))


def refusals(case: Case, exception: str | None = None) -> tuple[Hit, ...]:
    """What engines refuse, the first of each part, all or with this exception."""
    found: dict[tuple[Engine, Part], Hit] = {}
    for simulation in case.simulations:
        engine = simulation.engine
        refused = [(Part.TRUNK, simulation.refusal), *((m.part, b) for m, b in simulation.built)]
        for part, refusal in refused:
            if isinstance(refusal, Refusal) and exception in (None, refusal.exception):
                hit = Hit(engine, part, Harm.REFUSED, refusal.exception)
                found.setdefault((engine, part), hit)
    return tuple(found.values())
