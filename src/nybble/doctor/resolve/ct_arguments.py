"""``QuantizationArgs`` of compressed-tensors, without the package: what it accepts and refuses.

Source: ``quantization/quant_args.py`` of the releases that the engines pin, 0.15 (vLLM 0.19), 0.17
(vLLM 0.24 to 0.32), 0.18 (SGLang 0.5.23) and 0.20 (Transformers). All forbid unknown keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nybble.doctor.engines import Engine, Family
from nybble.doctor.resolve.outcome import EarlyEnd, not_analysed, refused

_FILE = "compressed_tensors/quant_args.py"
_KEYS = frozenset(
    {
        "num_bits",
        "type",
        "symmetric",
        "group_size",
        "strategy",
        "block_structure",
        "dynamic",
        "actorder",
        "scale_dtype",
        "zp_dtype",
        "observer",
        "observer_kwargs",
    }
)
_STRATEGIES = frozenset(
    {"tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"}
)
_GROUPED = ("group", "tensor_group")
_ORDERS = {"weight": "weight", "static": "weight", "group": "group", "dynamic": "group"}
_DTYPES = frozenset(
    {
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e8m0fnu",
    }
)


@dataclass(frozen=True)
class Arguments:
    """How weights or activations are quantized, checked and with what is inferred filled in."""

    bits: int
    type: Literal["int", "float"]
    symmetric: bool
    group_size: int | None
    strategy: str
    block: tuple[int, int] | None
    dynamic: bool | Literal["local"]
    actorder: Literal["weight", "group"] | None
    scale_dtype: str | None

    @property
    def is_static_group_or_channel(self) -> bool:
        """Whether weights have scales per group or per output, known beforehand."""
        return self.strategy in ("group", "channel") and not self.dynamic


def read_arguments(value: Any, engine: Engine) -> Arguments:
    """Raises EarlyEnd: the engine's package refuses them, or it is not known what it does."""
    if not isinstance(value, dict):
        raise _invalid(engine, "quantization arguments are no object")
    group_size = _group_size(value.get("group_size"), engine)
    unknown = next((key for key in value if key not in _KEYS), None)
    if unknown is not None:
        raise _invalid(engine, f"the key {_shown(unknown)} is unknown in quantization arguments")
    _check_rest(value, engine)
    strategy = _choice(value.get("strategy"), "strategy", _STRATEGIES, engine)
    read = Arguments(
        bits=_integer(value.get("num_bits", 8), "num_bits", engine),
        type="int" if _type(value.get("type", "int"), engine) == "int" else "float",
        symmetric=_boolean(value.get("symmetric", True), "symmetric", engine),
        group_size=group_size,
        strategy=strategy or _inferred_strategy(group_size),
        block=_block(value.get("block_structure"), engine),
        dynamic=_dynamic(value.get("dynamic", False), engine),
        actorder=_actorder(value.get("actorder"), engine),
        scale_dtype=_dtype(value.get("scale_dtype"), engine),
    )
    _check_together(read, value, engine)
    return read


def _check_together(read: Arguments, value: dict[str, Any], engine: Engine) -> None:
    """What the package checks once every field is sound by itself."""
    grouped = read.strategy in _GROUPED
    orders = (read.actorder,) if engine.is_vllm(before=(0, 24)) else ("group",)
    has_size = read.group_size is not None and read.group_size > 0
    inferred_zero = value.get("strategy") is None and read.group_size == 0
    faults = (
        (inferred_zero, "group_size 0 is neither a size nor -1"),
        (read.strategy == "token" and not read.dynamic, "strategy token needs dynamic"),
        (grouped and not has_size, f"strategy {read.strategy} needs a group_size"),
        (has_size and not grouped, "group_size needs strategy group"),
        ((read.strategy == "block") != (read.block is not None), "block needs its structure"),
        (
            read.actorder is not None and read.actorder in orders and not grouped,
            "actorder needs strategy group",
        ),
        (
            bool(read.dynamic) and not (grouped or read.strategy in ("token", "tensor")),
            f"strategy {read.strategy} cannot be dynamic",
        ),
        (
            read.dynamic == "local" and read.strategy != "tensor_group",
            "dynamic local needs strategy tensor_group",
        ),
    )
    for is_fault, message in faults:
        if is_fault:
            raise _invalid(engine, message)
    floats = (4, 6, 8) if engine.family is Family.TRANSFORMERS else (4, 8)
    if read.type == "float" and read.bits not in floats and value.get("zp_dtype") is None:
        # Raised from a validator as it is: pydantic wraps no NotImplementedError.
        raise refused(
            engine, "NotImplementedError", f"no float type has {read.bits} bits here", _FILE
        )


def _inferred_strategy(group_size: int | None) -> str:
    if group_size is None:
        return "tensor"
    return "group" if group_size > 0 else "channel"


def _group_size(value: Any, engine: Engine) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int | float):
        # Compared with a number before it is validated: pydantic wraps no TypeError.
        raise refused(engine, "TypeError", "group_size is no number", _FILE)
    number = _integer(value, "group_size", engine)
    if number < -1:
        raise _invalid(engine, f"group_size {number} is below -1")
    return number


def _integer(value: Any, key: str, engine: Engine) -> int:
    if isinstance(value, str):
        raise not_analysed(f"{key} is text: compressed-tensors may or may not read it as a number")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int):
        raise _invalid(engine, f"{key} is no whole number")
    return int(value)


def _boolean(value: Any, key: str, engine: Engine) -> bool:
    if isinstance(value, str):
        raise not_analysed(f"{key} is text: compressed-tensors may or may not read it as a boolean")
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise _invalid(engine, f"{key} is no boolean")


def _type(value: Any, engine: Engine) -> str:
    found = _choice(value, "type", frozenset({"int", "float"}), engine)
    if found is None:
        raise _invalid(engine, "type is null")
    return found


def _choice(value: Any, key: str, known: frozenset[str], engine: Engine) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value.lower() not in known:
        raise _invalid(engine, f"{key} {_shown(value)} is unknown")
    return value.lower()


def _block(value: Any, engine: Engine) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, str):
        raise not_analysed("block_structure is text")
    sound = isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) for n in value)
    if not sound or (engine.family is not Family.VLLM and not all(n > 0 for n in value)):
        raise _invalid(engine, "block_structure is no pair of numbers")
    return int(value[0]), int(value[1])


def _dynamic(value: Any, engine: Engine) -> bool | Literal["local"]:
    if isinstance(value, str):
        if value.lower() != "local":
            raise _invalid(engine, f"dynamic {_shown(value)} is unknown")
        return "local"
    return _boolean(value, "dynamic", engine)


def _actorder(value: Any, engine: Engine) -> Literal["weight", "group"] | None:
    if value is None or value is False:
        return None
    name = "group" if value is True else value
    order = _ORDERS.get(name.lower()) if isinstance(name, str) else None
    removed = engine.family is Family.TRANSFORMERS and order == "group"
    if order is None or removed:
        state = "is removed from" if removed else "is unknown in"
        raise _invalid(engine, f"actorder {_shown(value)} {state} compressed-tensors")
    return "group" if order == "group" else "weight"


def _dtype(value: Any, engine: Engine) -> str | None:
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else None
    if name not in _DTYPES:
        raise _invalid(engine, f"scale_dtype {_shown(value)} is no type of PyTorch's")
    return name


def _check_rest(value: dict[str, Any], engine: Engine) -> None:
    """Keys that decide nothing here, and yet must be sound."""
    _dtype(value.get("zp_dtype"), engine)
    if not isinstance(value.get("observer"), str | None):
        raise _invalid(engine, "observer is no text")
    if not isinstance(value.get("observer_kwargs", {}), dict):
        raise _invalid(engine, "observer_kwargs is no object")


def _shown(value: Any) -> str:
    return repr(value[:40]) if isinstance(value, str) else f"of type {type(value).__name__}"


def _invalid(engine: Engine, message: str) -> EarlyEnd:
    return refused(engine, "ValidationError", message, _FILE)
