"""What happens when an engine copies the stored tensors into the modules it has built.

Every module is compared with its Linears' tensors: one may be missing, left over, of another shape
or of another type. What each of these does depends on the engine's loader:

- vLLM before 0.26 and SGLang loop over the tensors and skip a name that is no parameter, or raise
  KeyError, by model (qwen3_5.py, qwen3_5_mtp.py, qwen3_vl.py, llama.py ``load_weights``).
- vLLM from 0.26 hands them down the tree of modules: a name without a parameter is a ValueError,
  within a fused module or the experts an AttributeError (models/utils.py ``AutoWeightsLoader``,
  linear.py and routed_experts.py ``load_weights``; vllm#53387).
- No release of vLLM notices what is missing from a quantized checkpoint (default_loader.py
  ``track_weights_loading``); on an unquantized one from 0.21 it exempts all Linears and embeddings.
- Transformers warns of what is missing, and raises for shapes (utils/loading_report.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from nybble.checkpoint.headers import TensorInfo
from nybble.doctor.engines import Engine, Family
from nybble.doctor.findings import Harm, Part
from nybble.doctor.layout.spec import LM_HEAD, Kind, Module
from nybble.doctor.parameters import CONVERTED, Parameter, known_suffixes, parameters
from nybble.doctor.resolve.built import DENSE, Scheme, Storage
from nybble.doctor.stored import FLOATS, Stored


class Fault(StrEnum):
    """How a parameter and the stored tensors differ."""

    MISSING = "is missing"
    LEFT_OVER = "has no place"
    MISFIT = "has another shape"
    OTHER_TYPE = "has another type"


@dataclass(frozen=True)
class Effect:
    """What a difference does."""

    harm: Harm
    raises: str | None = None


@dataclass(frozen=True)
class Trouble:
    """One difference, of one tensor."""

    fault: Fault
    suffix: str
    effect: Effect
    detail: str = ""
    """'[20, 128], not [40, 128]'."""


@dataclass(frozen=True)
class Place:
    """What decides how an engine loads into a module."""

    engine: Engine
    architecture: str
    part: Part
    kind: Kind
    fused: bool
    """Whether the engine's class for it loads several tensors into one."""
    rows: bool
    """Whether it is split along its inputs on several devices."""
    quantized: bool
    """Whether the checkpoint counts as quantized."""
    method: str
    """The declared ``quant_method``; '' without one."""


SILENT = Effect(Harm.NONE)
RANDOM = Effect(Harm.RANDOM)
WRONG = Effect(Harm.WRONG)

IGNORED_SUFFIXES = (".bias", ".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point")
"""Tensors without a parameter that no loader minds (vLLM 0.32, base_config.py)."""

_FUSED = frozenset({"qkv_proj", "gate_up_proj", "in_proj_qkvz", "in_proj_ba", "qkv"})
_BY_ROWS = frozenset({"o_proj", "out_proj", "down_proj", "proj", "linear_fc2"})


def place_of(
    module: Module, engine: Engine, architecture: str, *, quantized: bool, method: str
) -> Place:
    """The place of a module in an engine."""
    leaf = module.name.rpartition(".")[2]
    fuses = engine.family is not Family.TRANSFORMERS
    return Place(
        engine=engine,
        architecture=architecture,
        part=module.part,
        # Some releases never quantize the output head; it loads like one all the same.
        kind=Kind.HEAD if module.members[0].name == LM_HEAD else module.kind,
        fused=fuses and (len(module.members) > 1 or leaf in _FUSED),
        rows=splits_inputs(leaf),
        quantized=quantized,
        method=method,
    )


def splits_inputs(name: str) -> bool:
    """Whether engines split a module, or Linear, along its inputs over several devices."""
    return name.rpartition(".")[2] in _BY_ROWS


def troubles(
    place: Place, built: Scheme, shape: tuple[int, int], stored: Stored, *, stacked: bool
) -> tuple[Trouble, ...]:
    """All differences between a Linear [N, K] as built and as stored, in no order.

    ``stacked``: it is an expert held in a stack, whose shape is not the Linear's.
    """
    transformers = place.engine.family is Family.TRANSFORMERS
    expected = parameters(
        built,
        shape,
        reads_all=transformers,
        reads_g_idx=transformers and place.method == "gptq",
    )
    if expected is None:
        return tuple(_unmodelled(place, built, stored))
    return tuple(_compared(place, expected, stored.tensors, stacked=stacked))


def missing_elsewhere(engine: Engine, name: str, *, quantized: bool) -> Effect:
    """What it does that a tensor which is no Linear's weight is missing.

    ``quantized``: whether the checkpoint counts as quantized, or vLLM's check exempts the tensor.
    """
    if engine.family is Family.VLLM and not quantized and not name.endswith(_EXEMPT):
        return Effect(Harm.REFUSED, "ValueError")
    # Norms are created as ones, or zeros that stand for ones, not as whatever was in memory.
    return WRONG if "norm" in name or name.endswith(".dt_bias") else RANDOM


def misfit_elsewhere(engine: Engine, name: str) -> Effect:
    """What it does that a tensor which is no Linear's weight has another shape."""
    if engine.family is Family.TRANSFORMERS or name.endswith(_SHARDED):
        return Effect(Harm.REFUSED, "RuntimeError")
    return Effect(Harm.REFUSED, "AssertionError")


def left_over(place: Place, *, stacked: bool = False) -> Effect:
    """What it does that a tensor has no parameter to go to."""
    raises = _vllm(place) if place.engine.family is Family.VLLM else _sglang(place, stacked=stacked)
    return SILENT if raises is None else Effect(Harm.REFUSED, raises)


_SHARDED = (".A_log", ".dt_bias", ".conv1d.weight")
_EXEMPT = (".conv1d.weight", ".embed_tokens.weight")
"""Of modules that vLLM builds with a ``quant_method``, whose parameters its check exempts."""


def _compared(
    place: Place,
    expected: Mapping[str, Parameter],
    tensors: Mapping[str, TensorInfo],
    *,
    stacked: bool,
) -> Iterator[Trouble]:
    for suffix, parameter in expected.items():
        info = tensors.get(suffix)
        if info is None:
            if parameter.needed:
                yield Trouble(Fault.MISSING, suffix, RANDOM)
            continue
        if info.dtype not in parameter.dtypes:
            is_lossless = info.dtype in CONVERTED and not parameter.dtypes & FLOATS
            effect = SILENT if is_lossless else WRONG
            yield Trouble(Fault.OTHER_TYPE, suffix, effect, info.dtype)
        # An engine that does not read the tensor still has to copy it.
        fits = stacked or parameter.shape is None or info.shape == parameter.shape
        if not fits and not _is_dropped(place, suffix):
            effect = _misfit(place, parameter, info.shape)
            detail = f"{list(info.shape)}, not {list(parameter.shape or ())}"
            yield Trouble(Fault.MISFIT, suffix, effect, detail)
    for suffix in tensors:
        if suffix not in expected and not _is_ignored(suffix, place):
            effect = left_over(place, stacked=stacked)
            yield Trouble(Fault.LEFT_OVER, suffix, effect)


def _unmodelled(place: Place, built: Scheme, stored: Stored) -> Iterator[Trouble]:
    if any(scheme.storage is built.storage for scheme in stored.schemes):
        return
    if built.storage is Storage.BNB and DENSE in stored.schemes:
        return  # what is not quantized yet, bitsandbytes quantizes while it loads
    yield Trouble(Fault.MISSING, f"{built.storage} weights", RANDOM)
    known = known_suffixes(built.storage)
    for suffix, info in stored.tensors.items():
        if suffix not in known and not _is_ignored(suffix, place):
            yield Trouble(Fault.LEFT_OVER, suffix, left_over(place))
        elif suffix == "weight" and info.dtype in FLOATS:
            yield Trouble(Fault.OTHER_TYPE, suffix, WRONG, info.dtype)


def _is_ignored(suffix: str, place: Place) -> bool:
    return f".{suffix}".endswith(IGNORED_SUFFIXES) or _is_dropped(place, suffix)


def _is_dropped(place: Place, suffix: str) -> bool:
    """vLLM throws away every ``g_idx`` of a quantized checkpoint from 0.30 on."""
    return suffix == "g_idx" and place.quantized and place.engine.is_vllm(since=(0, 30))


def _misfit(place: Place, parameter: Parameter, found: tuple[int, ...]) -> Effect:
    """Loaders cut their share out of a tensor before they compare: too much of it passes."""
    family = place.engine.family
    if family is Family.TRANSFORMERS:
        return Effect(Harm.REFUSED, "RuntimeError")
    wanted = parameter.shape
    if parameter.axes is None or wanted is None or len(found) != len(wanted):
        return Effect(Harm.REFUSED, "AssertionError")
    if place.kind is Kind.HEAD:
        return Effect(Harm.REFUSED, "AssertionError")
    if place.kind is Kind.EXPERTS:
        return Effect(Harm.REFUSED, "RuntimeError")
    cut = parameter.axes[1 if place.rows else 0]
    if found[cut] < wanted[cut]:
        pads = family is Family.SGLANG and place.rows
        return WRONG if pads else Effect(Harm.REFUSED, "RuntimeError")
    others_fit = all(found[axis] == wanted[axis] for axis in range(len(wanted)) if axis != cut)
    return WRONG if others_fit else Effect(Harm.REFUSED, "AssertionError")


def _vllm(place: Place) -> str | None:
    if place.engine.is_vllm(since=(0, 26)):
        in_part = place.kind is Kind.EXPERTS or place.fused
        return "AttributeError" if in_part else "ValueError"
    # The head is no child of what the models load by hand.
    if place.kind is Kind.HEAD:
        return "ValueError"
    if place.part is Part.VISION or place.kind is Kind.EXPERTS:
        return "KeyError"
    return _by_hand(place, _VLLM_BY_HAND)


def _sglang(place: Place, *, stacked: bool) -> str | None:
    if place.engine.family is not Family.SGLANG or place.kind is Kind.HEAD:
        return None
    if place.kind is Kind.EXPERTS and place.architecture.startswith("Qwen3_5"):
        return "KeyError" if stacked is (place.part is Part.MTP) else None
    return _by_hand(place, _SGLANG_BY_HAND)


class _Raises(StrEnum):
    """For which names that are no parameter a model's own loop raises KeyError."""

    ALL = "all"
    FUSED = "those of fused modules"
    MTP = "those of the MTP head"

    def holds(self, place: Place) -> bool:
        return (
            self is _Raises.ALL
            or (self is _Raises.FUSED and place.fused)
            or (self is _Raises.MTP and place.part is Part.MTP)
        )


# By how the architecture's name starts; a model that is not listed skips such names.
_VLLM_BY_HAND = {
    "Qwen3Next": _Raises.MTP,
    "Llama": _Raises.ALL,
    "Mistral": _Raises.ALL,
    "Gemma3": _Raises.ALL,
    "Qwen2": _Raises.FUSED,
    "Qwen3For": _Raises.FUSED,
}
_SGLANG_BY_HAND = {
    "Qwen3Next": _Raises.ALL,
    "Gemma3": _Raises.ALL,
    "Qwen3For": _Raises.FUSED,
}


def _by_hand(place: Place, rules: Mapping[str, _Raises]) -> str | None:
    found = (rule for start, rule in rules.items() if place.architecture.startswith(start))
    rule = next(found, None)
    return "KeyError" if rule is not None and rule.holds(place) else None
