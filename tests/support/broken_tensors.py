"""Checkpoints whose tensors are missing, are of another kind, or hold other values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from . import packed as unpacking
from .breaking import (
    AUTO_ROUND,
    BLOCKS,
    COMPRESSED,
    GPTQ,
    W4,
    Tensors,
    add_rule,
    broken,
    drop,
    edit_block,
    edit_config,
    edit_tensors,
    method_of,
    pack_words,
    packed,
    replace_file,
)

O_PROJ = f"{BLOCKS}.3.self_attn.o_proj"
DOWN = f"{BLOCKS}.0.mlp.down_proj"
CODES, SCALES = r"\.(qweight|weight_packed)$", r"\.(scales|weight_scale)$"


@broken("D3", *W4)
def mtp_dropped(folder: Path) -> None:
    """What save_pretrained makes of every checkpoint."""
    edit_tensors(folder, lambda tensors: drop(tensors, r"^mtp\."))


@broken("D3", *W4)
def mtp_fc_missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: drop(tensors, r"^mtp\.fc\."))


@broken("D3", *W4)
def mtp_norm_missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: drop(tensors, r"^mtp\.pre_fc_norm_hidden\."))


@broken("D3", "base")
def mtp_fc_missing_from_the_base(folder: Path) -> None:
    mtp_fc_missing(folder)


@broken("D3", *AUTO_ROUND)
def mtp_under_another_name(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("mtp.")]:
            tensors[f"model.language_model.{name}"] = tensors.pop(name)

    edit_tensors(folder, change)


@broken("D3", *AUTO_ROUND)
def mtp_fc_transposed(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"].T

    edit_tensors(folder, change)


@broken("D3", *AUTO_ROUND)
def mtp_in_float16(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: _cast(tensors, "mtp.", torch.float16))


@broken("D3", *W4)
def mtp_fc_packed(folder: Path) -> None:
    _pack(folder, r"^mtp\.fc$")


@broken("D4", *W4)
def mtp_layer_packed(folder: Path) -> None:
    """Rounded to nearest by a tool that took it for one more block, and declares it dense."""
    _pack(folder, r"^mtp\.layers\..*_proj$")


@broken("D4", *W4)
def dense_declared_quantized(folder: Path) -> None:
    _unpack(folder, O_PROJ)


@broken("D4", *W4)
def fused_dense_declared_quantized(folder: Path) -> None:
    _unpack(folder, f"{BLOCKS}.0.mlp.gate_proj", f"{BLOCKS}.0.mlp.up_proj")


@broken("D5", *W4)
def fused_group_split(folder: Path) -> None:
    """Of q, k and v, which engines build as one, q alone is dense."""
    name = f"{BLOCKS}.3.self_attn.q_proj"
    _unpack(folder, name)
    add_rule(folder, name)


@broken("D5", *W4)
def fused_group_of_two_widths(folder: Path) -> None:
    """up_proj has 8 bits and gate_proj 4, in one fused module."""
    name = f"{BLOCKS}.0.mlp.up_proj"
    _unpack(folder, name)
    _pack(folder, rf"^{name}$", bits=8)

    def change(block: dict[str, Any]) -> None:
        if block["quant_method"] == "auto-round":
            entry = {"bits": 8, "group_size": 128, "sym": True, "data_type": "int"}
            block["extra_config"][name] = entry
        elif block["quant_method"] == "gptq":
            block["dynamic"][r"+:.*layers\.0\.mlp\.up_proj$"] = {"bits": 8}
        else:
            group = json.loads(json.dumps(block["config_groups"]["group_0"]))
            group["weights"]["num_bits"] = 8
            group["targets"] = [name]
            block["config_groups"] = {"group_1": group, **block["config_groups"]}

    edit_block(folder, change)


@broken("D6", *W4)
def scales_missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: drop(tensors, O_PROJ + SCALES))


@broken("D6", *W4)
def codes_missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: drop(tensors, O_PROJ + CODES))


@broken("D6", *AUTO_ROUND, *GPTQ)
def zeros_missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: drop(tensors, rf"{O_PROJ}\.qzeros$"))


@broken("D6", *COMPRESSED)
def shape_missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: drop(tensors, rf"{O_PROJ}\.weight_shape$"))


@broken("D6", *W4)
def weight_left_beside_codes(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{O_PROJ}.weight"] = unpacking.dense(tensors, O_PROJ).bfloat16()

    edit_tensors(folder, change)


@broken("D6", *W4)
def norm_missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: drop(tensors, r"layers\.2\.input_layernorm\.weight$"))


@broken("D6", "base")
def norm_missing_from_the_base(folder: Path) -> None:
    norm_missing(folder)


@broken("D7", *W4)
def codes_transposed(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        name = _one(tensors, DOWN, CODES)
        tensors[name] = tensors[name].T

    edit_tensors(folder, change)


@broken("D7", *W4)
def scales_of_three_groups(folder: Path) -> None:
    """Of five: no group size has as many."""

    def change(tensors: Tensors) -> None:
        name = _one(tensors, DOWN, SCALES)
        scales = tensors[name]
        tensors[name] = scales[:3] if name.endswith(".scales") else scales[:, :3]

    edit_tensors(folder, change)


@broken("D7", *W4)
def codes_as_int64(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        name = _one(tensors, O_PROJ, CODES)
        tensors[name] = tensors[name].long()

    edit_tensors(folder, change)


@broken("D7", *COMPRESSED, deep=True)
def weight_shape_of_another(folder: Path) -> None:
    shape = torch.tensor([256, 256])
    edit_tensors(folder, lambda tensors: tensors.update({f"{O_PROJ}.weight_shape": shape}))


@broken("D7", "base")
def head_of_fewer_tokens(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-64]

    edit_tensors(folder, change)


@broken("D8", *GPTQ)
def activation_order(folder: Path) -> None:
    """Groups of inputs that are alike in their activations, not neighbours."""
    _regroup(folder)
    edit_block(folder, lambda block: block.update(desc_act=True))


@broken("D8", *GPTQ, deep=True)
def activation_order_undeclared(folder: Path) -> None:
    _regroup(folder)


@broken("D9", *COMPRESSED)
def in_proj_ba_packed(folder: Path) -> None:
    """96 outputs on the 27B, six here: no kernel's tile."""
    _pack(folder, r"\.in_proj_(a|b)$")
    edit_block(folder, lambda block: block["ignore"].remove(_rule(block, "in_proj")))


@broken("D11", *AUTO_ROUND, *GPTQ, deep=True)
def zeros_of_version_2(folder: Path) -> None:
    """Zero points as they are, where version 1 stores them less one."""

    def change(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(".qzeros"):
                tensors[name] = torch.full_like(tensors[name], 0x88888888 - 2**32)

    edit_tensors(folder, change)


@broken("D16", *W4)
def cast_to_float16(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: _cast(tensors, "", torch.float16))
    edit_config(folder, lambda config: config.update(dtype="float16"))
    edit_config(folder, lambda config: config["text_config"].update(dtype="float16"))


@broken("D16", *W4)
def text_only(folder: Path) -> None:
    """AutoModelForCausalLM, saved; then the MTP head grafted."""

    def rename(tensors: Tensors) -> None:
        drop(tensors, r"^model\.visual\.")
        for name in [name for name in tensors if name.startswith(f"{BLOCKS[:-7]}.")]:
            tensors[name.replace("language_model.", "", 1)] = tensors.pop(name)

    edit_tensors(folder, rename)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    block = json.loads(json.dumps(config["quantization_config"]).replace("language_model.", ""))
    text = {"architectures": ["Qwen3_5ForCausalLM"], **config["text_config"]}
    replace_file(path, json.dumps({**text, "quantization_config": block}, indent=2).encode())


@broken("D16", *W4)
def head_dropped_as_if_tied(folder: Path) -> None:
    """text_config, which nobody asked, still says that it is not."""
    edit_tensors(folder, lambda tensors: drop(tensors, r"^lm_head\.weight$"))
    edit_config(folder, lambda config: config.update(tie_word_embeddings=True))


@broken("D6", *W4)
def head_missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: drop(tensors, r"^lm_head\.weight$"))


@broken("D17", *AUTO_ROUND, with_base=True, is_note=True)
def kept_tensors_recast(folder: Path) -> None:
    """Harmless to load; no longer what the base holds."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("A_log")]:
            tensors[name] = tensors[name].float()

    edit_tensors(folder, change)


@broken("D17", *AUTO_ROUND, with_base=True, deep=True)
def kept_tensor_altered(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.visual.pos_embed.weight"] += 0.5

    edit_tensors(folder, change)


@broken("D19", *W4, deep=True)
def scales_not_finite(folder: Path) -> None:
    _set_scales(folder, torch.nan)


@broken("D19", *AUTO_ROUND, deep=True)
def scales_zero(folder: Path) -> None:
    _set_scales(folder, 0.0)


@broken("D19", *AUTO_ROUND, deep=True)
def weights_not_finite(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.language_model.norm.weight"][3] = torch.inf

    edit_tensors(folder, change)


def _one(tensors: Tensors, module: str, suffix: str) -> str:
    endings = suffix.removeprefix(r"\.(").removesuffix(")$").split("|")
    return next(f"{module}.{end}" for end in endings if f"{module}.{end}" in tensors)


def _rule(block: dict[str, Any], word: str) -> str:
    return next(rule for rule in block["ignore"] if word in rule)


def _pack(folder: Path, pattern: str, bits: int = 4) -> None:
    """Packs the dense Linears whose names the pattern is found in."""
    method = method_of(folder)

    def change(tensors: Tensors) -> None:
        names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
        found = [name for name in names if re.search(pattern, name)]
        assert found, pattern
        for name in found:
            tensors.update(packed(name, tensors.pop(f"{name}.weight"), method, bits))

    edit_tensors(folder, change)


def _unpack(folder: Path, *modules: str) -> None:
    """De-quantizes Linears."""

    def change(tensors: Tensors) -> None:
        for module in modules:
            weight = unpacking.dense(tensors, module).bfloat16()
            drop(tensors, rf"^{module}\.")
            tensors[f"{module}.weight"] = weight

    edit_tensors(folder, change)


def _cast(tensors: Tensors, prefix: str, dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if name.startswith(prefix) and tensor.dtype is torch.bfloat16:
            tensors[name] = tensor.to(dtype)


def _regroup(folder: Path) -> None:
    """Rounds every packed Linear anew in groups of inputs from all over the row."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            module = name.removesuffix(".g_idx")
            weight = unpacking.dense(tensors, module)
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
            sorted_by_group = packed(module, weight[:, order], "gptq")
            codes, _ = unpacking.codes_and_scales(sorted_by_group, module)
            place = torch.argsort(order)
            words = pack_words(codes[:, place] + 8, 4).T
            tensors.update(sorted_by_group)
            tensors[f"{module}.qweight"] = words
            tensors[name] = sorted_by_group[name][place]

    edit_tensors(folder, change)


def _set_scales(folder: Path, value: float) -> None:
    def change(tensors: Tensors) -> None:
        tensors[_one(tensors, O_PROJ, SCALES)].view(-1)[:7] = value

    edit_tensors(folder, change)
