"""Finds the architecture file for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nybble.arch import dense, gemma3, qwen3_5, qwen3_next
from nybble.arch.blocks import expected_shapes
from nybble.arch.spec import Architecture, Config
from nybble.checkpoint.index import CheckpointIndex
from nybble.core.errors import CheckpointError, NybbleError, UnsupportedArchitecture

_BUILDERS: dict[str, Callable[[Config], Architecture]] = {
    **dict.fromkeys(qwen3_5.FAMILIES, qwen3_5.architecture),
    "Qwen3NextForCausalLM": qwen3_next.architecture,
    **dict.fromkeys(dense.FAMILIES, dense.architecture),
    "Gemma3ForConditionalGeneration": gemma3.architecture,
    "Gemma3ForCausalLM": gemma3.architecture,
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


def architecture_in(config: Config, index: CheckpointIndex) -> Architecture:
    """As ``architecture_of``; where config.json is silent on an MTP head, what is stored decides.

    A head of which some tensors are stored is not dropped: the rest will be missed.
    """
    arch = architecture_of(config)
    head = arch.mtp
    if head is None or head.declared or any(n.startswith(head.prefix) for n in index.tensors):
        return arch
    return replace(arch, mtp=None)


def refuse_other_names(arch: Architecture, index: CheckpointIndex) -> None:
    """Raises CheckpointError if the text model is stored under names that are not read here.

    config.json does not tell: for one and the same model, transformers 4 stored
    ``language_model.model.*`` and transformers 5 calls it ``model.language_model.*``. Its modules
    and a quantization_config go by the latter, so a checkpoint is read under these alone.
    """
    if any(name.startswith(arch.text_prefix) for name in index.tensors):
        return
    ending = ".embed_tokens.weight"
    stored = next((name for name in index.tensors if name.endswith(ending)), None)
    if stored is not None:
        raise CheckpointError(
            f"{index.folder} stores its text model as {stored.removesuffix(ending)}.*, not as "
            f"{arch.text_prefix}*: load it with transformers and save it anew with "
            "save_pretrained(folder, save_original_format=False)"
        )
