"""How each engine calls what a checkpoint calls otherwise.

vLLM renames by literal prefix, and renames the names in a quantization config in the same way
(models/utils.py ``WeightsMapper``, model_loader/utils.py ``configure_quant_config``). The prefixes
are the same in 0.19.1, 0.21, 0.23, 0.24, 0.26, 0.28, 0.30 and 0.32.
"""

from __future__ import annotations

from nybble.doctor.engines import Engine, Family
from nybble.doctor.layout.spec import Layout

Renames = tuple[tuple[str, str], ...]
"""Prefixes and what stands in their place, applied one after the other."""

_TEXT: Renames = (("model.language_model.", "model."),)
_VLLM_QWEN: Renames = (
    ("model.visual.", "visual."),
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
)
_VLLM_GEMMA: Renames = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
# Where SigLIP's own parts lie since transformers 5, vLLM and SGLang still have a level more.
_SIGLIP: Renames = (("vision_tower.", "vision_tower.vision_model."),)


def engine_name(layout: Layout, engine: Engine, name: str) -> str:
    """What an engine makes of a name, or pattern, that stands in a quantization config.

    Only a literal prefix is renamed, so a pattern that begins otherwise stays as it is; which
    entries of a config are handed to this at all, each method decides. Transformers renames
    nothing, SGLang 0.5.23 nothing for these models (``hf_to_sglang_mapper`` is None).
    """
    if engine.family is not Family.VLLM:
        return name
    return _renamed(_vllm(layout), name)


def built_name(layout: Layout, engine: Engine, name: str) -> str:
    """What an engine calls a Linear, or what holds it, before it fuses anything."""
    # The dot makes a prefix of a whole name: 'lm_head'.
    return _renamed(_built(layout, engine), f"{name}.").removesuffix(".")


def has_tower(layout: Layout) -> bool:
    """Whether the architecture is a vision-language one, whatever its config.json looks like."""
    return layout.architecture.endswith("ForConditionalGeneration")


def is_gemma(layout: Layout) -> bool:
    """Whether it is Gemma 3."""
    return layout.architecture.startswith("Gemma3")


def is_qwen3_5(layout: Layout) -> bool:
    """Whether it is of the Qwen3.5 family, mixture of experts or not."""
    return layout.architecture.startswith("Qwen3_5")


def is_qwen3_next(layout: Layout) -> bool:
    """Whether it is Qwen3-Next."""
    return layout.architecture.startswith("Qwen3Next")


def _vllm(layout: Layout) -> Renames:
    if has_tower(layout):
        return _VLLM_GEMMA if is_gemma(layout) else _VLLM_QWEN
    # Of the text-only classes this one alone has a mapper, since 0.28, when it was added.
    return _TEXT if is_qwen3_5(layout) else ()


def _built(layout: Layout, engine: Engine) -> Renames:
    if not has_tower(layout):
        is_sglangs_next = engine.family is Family.SGLANG and is_qwen3_next(layout)
        # SGLang builds this head's layer as if it were a model of its own (qwen3_next_mtp.py).
        return (("mtp.layers.", "model.layers."),) if is_sglangs_next else _TEXT
    if engine.family is Family.TRANSFORMERS:
        return ()
    if is_gemma(layout):
        return _VLLM_GEMMA + _SIGLIP
    return _VLLM_QWEN if engine.family is Family.VLLM else ()


def _renamed(renames: Renames, name: str) -> str:
    for prefix, new in renames:
        if name.startswith(prefix):
            name = new + name.removeprefix(prefix)
    return name
