"""Finds the architecture file for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from nybble.arch import qwen3_5
from nybble.arch.blocks import expected_shapes
from nybble.arch.spec import Architecture, Config
from nybble.core.errors import CheckpointError, NybbleError, UnsupportedArchitecture

_BUILDERS: dict[str, Callable[[Config], Architecture]] = {
    "Qwen3_5ForConditionalGeneration": qwen3_5.architecture,
    "Qwen3_5ForCausalLM": qwen3_5.architecture,
}


def architecture_of(config: Config) -> Architecture:
    """The architecture of a checkpoint's config.json.

    Raises UnsupportedArchitecture, naming what is supported, and CheckpointError for a config
    whose values cannot be used.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in _BUILDERS:
        raise UnsupportedArchitecture(
            f"config.json has architectures {names!r}; supported: {', '.join(_BUILDERS)}"
        )
    try:
        architecture = _BUILDERS[name](config)
        expected_shapes(architecture)
    except NybbleError:
        raise
    except Exception as error:  # foreign values: transformers raises anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"config.json does not describe a {name}: {reason}") from error
    return architecture
