"""Checkpoints whose config.json declares something else than what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .breaking import (
    AUTO_ROUND,
    BLOCKS,
    COMPRESSED,
    GPTQ,
    GROUP,
    W4,
    add_rule,
    broken,
    drop_rules,
    edit_block,
    edit_config,
    edit_json,
    method_of,
)
from .good_checkpoints import FORMATS

MTP4 = tuple(f"{form}-mtp4" for form in FORMATS)
Block = dict[str, Any]


@broken("D1", *W4)
def declaration_missing(folder: Path) -> None:
    edit_config(folder, lambda config: config.pop("quantization_config"))


@broken("D1", *AUTO_ROUND)
def method_unknown(folder: Path) -> None:
    edit_block(folder, lambda block: block.update(quant_method="auto-square"))


@broken("D1", *AUTO_ROUND)
def packing_of_another_name(folder: Path) -> None:
    edit_block(folder, lambda block: block.update(packing_format="auto_round:gptq"))


@broken("D1", *AUTO_ROUND, *GPTQ)
def bits_undeclared(folder: Path) -> None:
    edit_block(folder, lambda block: block.pop("bits"))


@broken("D1", *GPTQ)
def desc_act_undeclared(folder: Path) -> None:
    edit_block(folder, lambda block: block.pop("desc_act"))


@broken("D4", *W4)
def bits_misdeclared(folder: Path) -> None:
    edit_block(folder, lambda block: _scheme(block).update({_bits(block): 8}))


@broken("D4", *W4)
def group_size_misdeclared(folder: Path) -> None:
    edit_block(folder, lambda block: _scheme(block).update(group_size=64))


@broken("D4", *W4)
def mtp_rule_missing(folder: Path) -> None:
    """The MTP head is dense, and nothing says so."""
    drop_rules(folder, "mtp")
    if method_of(folder) == "auto-round":
        edit_block(folder, lambda block: block.pop("block_name_to_quantize"))


@broken("D12", *AUTO_ROUND)
def mtp_listed_as_quantized(folder: Path) -> None:
    """What AutoRound itself declares, around an MTP head that was grafted from the base."""
    drop_rules(folder, "mtp")
    edit_block(folder, lambda block: block.update(block_name_to_quantize=[BLOCKS, "mtp.layers"]))


@broken("D14", *GPTQ)
def mtp_declared_8_bits(folder: Path) -> None:
    drop_rules(folder, "mtp")
    edit_block(folder, lambda block: block["dynamic"].update({"+:.*mtp.*": {"bits": 8}}))


@broken("D4", *MTP4)
def mtp_declared_dense(folder: Path) -> None:
    """The MTP layer is packed, and a rule says that it is dense."""

    def change(block: Block) -> None:
        if block["quant_method"] == "auto-round":
            block["block_name_to_quantize"] = BLOCKS
        elif block["quant_method"] == "gptq":
            block["dynamic"]["-:.*mtp.*"] = {}
        else:
            block["ignore"].append("re:.*mtp.*")

    edit_block(folder, change)


@broken("D4", *W4)
def quantized_declared_dense(folder: Path) -> None:
    add_rule(folder, f"{BLOCKS}.3.self_attn.o_proj")


@broken("D4", *AUTO_ROUND, *COMPRESSED)
def vision_rule_missing(folder: Path) -> None:
    drop_rules(folder, "visual")
    if method_of(folder) == "auto-round":
        edit_block(folder, lambda block: block.pop("block_name_to_quantize"))


@broken("D4", *W4)
def in_proj_rule_missing(folder: Path) -> None:
    drop_rules(folder, "in_proj")


@broken("D4", *W4)
def head_declared_quantized(folder: Path) -> None:
    def change(block: Block) -> None:
        if block["quant_method"] == "auto-round":
            same = {"bits": 4, "group_size": GROUP, "sym": True, "data_type": "int"}
            block["extra_config"]["lm_head"] = same
        elif block["quant_method"] == "gptq":
            block["lm_head"] = True
            block["modules_in_block_to_quantize"].append(["lm_head"])
            del block["dynamic"]["-:.*lm_head.*"]
        else:
            block["ignore"].remove("lm_head")
            block["config_groups"]["group_0"]["targets"].append("re:.*lm_head$")

    edit_block(folder, change)


@broken("D13", *COMPRESSED)
def bare_prefix_ignored(folder: Path) -> None:
    """Names of the towers, which match no module within."""
    drop_rules(folder, "mtp")
    drop_rules(folder, "visual")
    edit_block(folder, lambda block: block["ignore"].extend(["mtp", "model.visual"]))


@broken("D13", *AUTO_ROUND, *COMPRESSED)
def escaped_prefix(folder: Path) -> None:
    """A rule in Hugging Face's names, which vLLM cannot translate."""
    drop_rules(folder, "in_proj")
    pattern = r"^model\.language_model\.layers\.\d+\.linear_attn\.in_proj_(a|b|ba)$"

    def change(block: Block) -> None:
        if block["quant_method"] == "auto-round":
            block["extra_config"][pattern] = {"bits": 16, "data_type": "fp"}
        else:
            block["ignore"].append(f"re:{pattern}")

    edit_block(folder, change)


@broken("D13", *W4)
def expression_does_not_compile(folder: Path) -> None:
    _add_expression(folder, r".*mlp\.(gate_proj$")


@broken("D13", *W4)
def expression_never_ends(folder: Path) -> None:
    _add_expression(folder, r".*(([a-z_.]+)+)+!$")


@broken("D12", *AUTO_ROUND)
def entry_without_bits(folder: Path) -> None:
    """An entry that differs in nothing but where it leaves out the bits."""
    entry = {"group_size": GROUP, "sym": True}
    name = f"{BLOCKS}.3.self_attn.o_proj"
    edit_block(folder, lambda block: block["extra_config"].update({name: entry}))


@broken("D12", *AUTO_ROUND)
def block_list_of_the_text_model(folder: Path) -> None:
    edit_block(folder, lambda block: block.update(block_name_to_quantize="model.layers"))


@broken("D14", *GPTQ)
def module_list_hits_the_tower(folder: Path) -> None:
    """'mlp' is found in the names of the vision tower's modules too."""
    drop_rules(folder, "visual")
    edit_block(folder, lambda block: block["modules_in_block_to_quantize"].append(["mlp"]))


@broken("D14", *GPTQ)
def module_list_missing(folder: Path) -> None:
    edit_block(folder, lambda block: block.pop("modules_in_block_to_quantize"))


@broken("D14", *GPTQ)
def module_list_is_flat(folder: Path) -> None:
    def change(block: Block) -> None:
        groups = block["modules_in_block_to_quantize"]
        block["modules_in_block_to_quantize"] = [name for group in groups for name in group]

    edit_block(folder, change)


@broken("D14", *GPTQ)
def two_declarations(folder: Path) -> None:
    edit_json(folder / "quantize_config.json", lambda block: block.update(bits=8))


@broken("D8", *COMPRESSED)
def group_order_declared(folder: Path) -> None:
    edit_block(folder, lambda block: _scheme(block).update(actorder="group"))


@broken("D15", *COMPRESSED)
def status_frozen(folder: Path) -> None:
    edit_block(folder, lambda block: block.update(quantization_status="frozen"))


@broken("D15", *COMPRESSED)
def format_of_activations(folder: Path) -> None:
    """'int-quantized' is for INT8 weights and activations; nothing reads packed words by it."""

    def change(block: Block) -> None:
        block["format"] = block["config_groups"]["group_0"]["format"] = "int-quantized"

    edit_block(folder, change)


@broken("D15", *COMPRESSED)
def key_unknown(folder: Path) -> None:
    edit_block(folder, lambda block: _scheme(block).update(rounding="nearest"))


@broken("D16", *W4)
def head_tied_at_one_level(folder: Path) -> None:
    """The output head is stored, and text_config says that it is the embedding."""
    edit_config(folder, lambda config: config["text_config"].update(tie_word_embeddings=True))


@broken("D16", *AUTO_ROUND, with_base=True)
def layer_types_of_another_model(folder: Path) -> None:
    types = ["linear_attention"] * 2 + ["full_attention"] * 2
    edit_config(folder, lambda config: config["text_config"].update(layer_types=types))


@broken("D16", *AUTO_ROUND, with_base=True)
def vision_config_missing(folder: Path) -> None:
    edit_config(folder, lambda config: config.pop("vision_config"))


@broken("D3", *W4)
def mtp_head_undeclared(folder: Path) -> None:
    edit_config(folder, lambda config: config["text_config"].pop("mtp_num_hidden_layers"))


@broken("D10", *W4, tensor_parallel=2)
def groups_straddle_devices(_folder: Path) -> None:
    """A sound checkpoint: 640 inputs on two devices are two and a half groups on each."""


def _scheme(block: Block) -> Block:
    """Where a block holds bits and group size."""
    groups = block.get("config_groups")
    return block if groups is None else groups["group_0"]["weights"]


def _bits(block: Block) -> str:
    return "bits" if "bits" in block else "num_bits"


def _add_expression(folder: Path, pattern: str) -> None:
    def change(block: Block) -> None:
        if block["quant_method"] == "auto-round":
            block["extra_config"][pattern] = {"bits": 16, "data_type": "fp"}
        elif block["quant_method"] == "gptq":
            block["dynamic"][f"-:{pattern}"] = {}
        else:
            block["ignore"].append(f"re:{pattern}")

    edit_block(folder, change)
