"""D1 and D16: what config.json says of the weights, and of the model they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nybble.checkpoint.index import CONFIG_NAME
from nybble.checkpoint.ondisk import shown
from nybble.doctor.case import Case, Check
from nybble.doctor.checks.common import PACKED_SUFFIXES, counted, hits, is_same, lost, section
from nybble.doctor.engines import Engine, Family
from nybble.doctor.findings import Finding, Harm, Hit, Part, Severity
from nybble.doctor.layout.modules import is_tied
from nybble.doctor.layout.names import has_tower, is_qwen3_5
from nybble.doctor.layout.spec import Layout
from nybble.doctor.resolve.methods import declared_block
from nybble.doctor.snapshot import ProblemKind
from nybble.doctor.wording import names_of

_BLOCK = "quantization_config"
_HEAD = "lm_head"
_ELSEWHERE = ("quantize_config.json", "hf_quant_config.json", "quant_config.json")
_BF16_FAMILIES = ("Qwen3_5", "Qwen3Next", "Gemma3")
"""Starts of architectures whose published weights are all BF16."""

_OF_SAVING = frozenset(
    {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", _BLOCK}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "_attn_implementation", "architectures"}
    | {"initializer_range", "attention_dropout", "max_position_embeddings", "auto_map"}
)
"""Keys that say nothing of how the weights are used, or that people tune."""
_DROPPABLE = ("layer_types", "mtp_num_hidden_layers", "vision_config", "text_config")
"""Keys without which an engine computes something else, or leaves a part out."""


def unusable(case: Case) -> Iterator[Finding]:
    """D1: config.json is missing, no JSON, or holds numbers that no model has."""
    problem = next(
        (p for p in case.snapshot.problems if p.kind is ProblemKind.UNREADABLE_CONFIG), None
    )
    if case.snapshot.config is not None and case.layout_problem is None:
        return
    if case.snapshot.config is not None:
        seen = case.layout_problem or ""
    else:
        seen = problem.message if problem else "it is missing"
    yield Finding(
        code="D1",
        severity=Severity.ERROR,
        where=CONFIG_NAME,
        seen=seen,
        consequence="no engine can build the model",
        fix="copy config.json from the base and add the quantization_config",
        hits=hits(case.engines, [Part.TRUNK], Harm.REFUSED),
    )


def undeclared(case: Case) -> Iterator[Finding]:
    """D1: packed tensors, but nothing in config.json says so."""
    config = case.snapshot.config
    if config is None or case.block is not None:
        return
    if all(_finds_one(case, engine) for engine in case.engines):
        return
    if config.get(_BLOCK) is not None:
        yield _declaration(
            f"{_BLOCK} is no object but {shown(config[_BLOCK])}",
            "engines stop when they read it",
            hits(case.engines, [Part.TRUNK], Harm.REFUSED),
        )
        return
    packed = [
        name
        for tensors in case.snapshot.headers.values()
        for name in tensors
        if name.endswith(PACKED_SUFFIXES)
    ]
    if not packed:
        return
    places = [name for name in _ELSEWHERE if name in case.snapshot.sizes]
    places += [f"{CONFIG_NAME}: {key}" for key in _nested_blocks(config)]
    yield _declaration(
        f"{counted(packed, 'packed tensor')}, but no {_BLOCK}"
        + (f"; only {' and '.join(places)}" if places else ""),
        "engines build these Linears dense: they stop, or compute with random weights",
        (),
        repair="rules",
    )


def no_method(case: Case) -> Iterator[Finding]:
    """D1: a declaration that names no method, where no engine's rules could say so."""
    block = case.block
    if block is None or isinstance(block.get("quant_method"), str) or case.simulations:
        return
    if "producer" in block or "quantization" in block:  # ModelOpt's older form has no such key
        return
    yield _declaration(
        f"quant_method is {shown(block.get('quant_method'))}",
        "engines cannot tell how the weights are packed, and stop",
        hits(case.engines, [Part.TRUNK], Harm.REFUSED),
        repair="rules",
    )


def text_only(case: Case) -> Iterator[Finding]:
    """D16: the text-only form, whose MTP head vLLM did not know before 0.28."""
    layout = case.layout
    if layout is None or has_tower(layout) or not layout.has_mtp:
        return
    if not is_qwen3_5(layout):
        return
    older = [engine for engine in case.engines if engine.is_vllm(before=(0, 28))]
    yield Finding(
        code="D16",
        severity=Severity.ERROR if older else Severity.NOTE,
        where=f"{CONFIG_NAME}: architectures",
        seen=f"{layout.architecture}, the text-only form, with an MTP head",
        consequence=(
            "vLLM before 0.28 knows neither this class nor its MTP head: with MTP on it stops "
            "with NotImplementedError"
        ),
        fix="keep the vision-language config of the base, or serve it with vLLM 0.28 or later",
        evidence="vLLM 0.19 to 0.28, config/speculative.py and models/registry.py",
        hits=hits(older, [Part.MTP], Harm.REFUSED, "NotImplementedError"),
    )


def data_type(case: Case) -> Iterator[Finding]:
    """D16: weights that were BF16, to be computed in FP16."""
    config = case.snapshot.config
    if config is None:
        return
    declared = _dtype(config)
    original = _dtype(case.base.config) if case.base and case.base.config else None
    if declared is None:
        consequence = "vLLM goes by the tensors' types, SGLang computes in float16"
    elif declared == "float16" and original != "float16" and _was_bf16(case, original):
        consequence = "FP16 ends at 65504: activations of a BF16 model may overflow to NaN"
    elif original is not None and declared != original:
        consequence = f"engines compute in {declared}, the base in {original}"
    else:
        return
    yield Finding(
        code="D16",
        severity=Severity.WARNING,
        where=f"{CONFIG_NAME}: dtype",
        seen="no dtype" if declared is None else f"dtype {shown(declared)}",
        consequence=consequence,
        fix="set dtype to bfloat16, at the top level and in text_config",
        evidence="vLLM 0.32, model_arch_config_convertor.py; auto-round export_to_autogptq",
        repair="dtype",
    )


def tied_head(case: Case) -> Iterator[Finding]:
    """D16: the two levels of a wrapper's config disagree about the output head (vllm#51063)."""
    config, layout = case.snapshot.config, case.layout
    if config is None or layout is None or not layout.ties_disagree:
        return
    stored = any(name.startswith(f"{_HEAD}.") for name in case.snapshot.all_tensors())
    tied = [engine for engine in case.engines if is_tied(layout, engine)]
    if stored:
        deaf = [engine for engine in tied if not _asks_the_weights(engine, layout)]
        found = hits(deaf, [Part.TRUNK], Harm.WRONG)
        consequence = f"{names_of(deaf)}: the embedding is the output head, the stored one unread"
    else:
        untied = [engine for engine in case.engines if engine not in tied]
        found = lost(case, [f"{_HEAD}.weight"], untied)
        consequence = f"{names_of(untied)}: an output head for which no weights are stored"
    if not found:
        consequence = "engines go by one level or the other: this one is read right by luck"
    levels = (config, section(config, "text_config"))
    top, inside = (shown(level.get("tie_word_embeddings")) for level in levels)
    yield Finding(
        code="D16",
        severity=Severity.ERROR if found else Severity.WARNING,
        where=f"{CONFIG_NAME}: tie_word_embeddings",
        seen=(
            f"{top} at the top level, {inside} in text_config; {_HEAD} is "
            + ("stored" if stored else "not stored")
        ),
        consequence=consequence,
        fix=f"set both to {'false' if stored else 'true'}",
        evidence="vllm#51063",
        hits=found,
    )


def against_base(case: Case) -> Iterator[Finding]:
    """D16: values that decide what is computed, and differ from the base's."""
    config = case.snapshot.config
    original = case.base.config if case.base else None
    if config is None or original is None:
        return
    if "text_config" in original and "text_config" not in config:
        original = section(original, "text_config")
        if case.layout is not None and not has_tower(case.layout):
            yield _differs(
                ["architectures"],
                "the base sees images, this is its text-only form",
                "images are refused, and the MTP head works in vLLM from 0.28 only",
                Severity.WARNING,
            )
    changed = list(_differences(config, original))
    for part in (Part.TRUNK, Part.VISION):
        keys = [key for key in changed if key.startswith("vision_config") == (part is Part.VISION)]
        if keys:
            yield _differs(
                keys,
                f"{counted(keys, 'value')}, not as in the base",
                "engines compute something else than with the base's config",
                Severity.ERROR,
                hits(case.engines, [part], Harm.WRONG),
            )


def _differences(
    config: Mapping[str, Any], original: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Dotted keys; two levels deep, below which values are compared whole."""
    for key, value in original.items():
        if key in _OF_SAVING:
            continue
        if key not in config:
            if key in _DROPPABLE:
                yield f"{prefix}{key}"
        elif not prefix and isinstance(value, dict) and isinstance(config[key], dict):
            yield from _differences(config[key], value, f"{key}.")
        elif not is_same(value, config[key]):
            yield f"{prefix}{key}"


def _differs(
    keys: list[str], seen: str, consequence: str, severity: Severity, found: tuple[Hit, ...] = ()
) -> Finding:
    return Finding(
        code="D16",
        severity=severity,
        where=f"{CONFIG_NAME}: {keys[0]}",
        seen=seen,
        consequence=consequence,
        fix="copy config.json from the base and add the quantization_config",
        hits=found,
    )


def _asks_the_weights(engine: Engine, layout: Layout) -> bool:
    """Whether a stored output head counts for more than tie_word_embeddings.

    Transformers 5.23, modeling_utils.py ``tie_weights``; vLLM 0.30, config/model.py
    ``maybe_untie_word_embeddings``, but only if the top level says that it is tied.
    """
    return engine.family is Family.TRANSFORMERS or (engine.is_vllm(since=(0, 30)) and layout.tied)


def _finds_one(case: Case, engine: Engine) -> bool:
    """Whether the engine looks for a declaration where there is one."""
    snapshot = case.snapshot
    return declared_block(engine.family, snapshot.config or {}, snapshot.objects) is not None


def _declaration(
    seen: str, consequence: str, found: tuple[Hit, ...], repair: str | None = None
) -> Finding:
    return Finding(
        code="D1",
        severity=Severity.ERROR,
        where=f"{CONFIG_NAME}: {_BLOCK}",
        seen=seen,
        consequence=consequence,
        fix=f"write a {_BLOCK} into {CONFIG_NAME}: engines look for it there alone",
        evidence="vLLM 0.32, config/model.py, _verify_quantization",
        hits=found,
        repair=repair,
    )


def _nested_blocks(config: Mapping[str, Any]) -> list[str]:
    found = [key for key in ("compression_config",) if key in config]
    if _BLOCK in section(config, "text_config"):
        found.append(f"text_config.{_BLOCK}")
    return found


def _dtype(config: Mapping[str, Any]) -> str | None:
    """What vLLM takes for 'auto': the top level's, else the text model's."""
    for level in (config, section(config, "text_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(level.get(key), str):
                return str(level[key]).removeprefix("torch.")
    return None


def _was_bf16(case: Case, original: str | None) -> bool:
    """Whether anything says that the weights were made for BF16."""
    if original == "bfloat16":
        return True
    if case.layout is not None and case.layout.architecture.startswith(_BF16_FAMILIES):
        return True
    return any(i.dtype == "BF16" for t in case.snapshot.headers.values() for i in t.values())


CHECKS: tuple[Check, ...] = (
    unusable,
    undeclared,
    no_method,
    text_only,
    data_type,
    tied_head,
    against_base,
)
