from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from nybble.packing.format import Declaration
from nybble.packing.rules import Rules, same
from nybble.quant.grid import IntGrid

Declare = Callable[..., Declaration]

W4, W8 = IntGrid(4, 128, True), IntGrid(8, 128, True)


def dense(declaration: Declaration) -> list[str]:
    return [rule.pattern for rule in Rules(declaration).dense]


def quantized(declaration: Declaration) -> dict[str, IntGrid | None]:
    return {rule.pattern: rule.grid for rule in Rules(declaration).quantized}


def test_one_grid_needs_rules_for_the_dense_alone(declare: Declare) -> None:
    declaration = declare()
    assert dense(declaration) == [r".*linear_attn\.in_proj_(a|b|ba)$", ".*mtp.*", ".*visual.*"]
    assert quantized(declaration) == {}


def test_dense_kinds_share_one_rule(declare: Declare) -> None:
    attention = r"self_attn\.(k_proj|o_proj|q_proj|qkv_proj|v_proj)"
    assert dense(declare(lambda _, m: None if "self_attn" in m else W4))[:-2] == [
        rf".*(linear_attn\.in_proj_(a|b|ba)|{attention})$"
    ]


def test_another_grid_is_for_the_decoder_alone(declare: Declare) -> None:
    mlp = r"mlp\.(down_proj|gate_proj|gate_up_proj|up_proj)"
    rules = quantized(declare(lambda b, m: W8 if "mlp" in m and b % 3 else W4, mtp=W4))
    assert rules == {rf".*model\.layers\.(1|2|4|5|7|8|10|11)\.{mlp}$": W8}


def test_numbers_are_left_out_where_all_blocks_of_a_kind_agree(declare: Declare) -> None:
    # Only blocks 3, 7 and 11 have attention.
    rules = quantized(declare(lambda _, m: W8 if m == "self_attn.o_proj" else W4))
    assert rules == {r".*model\.layers\.\d+\.self_attn\.o_proj$": W8}


def test_one_block_needs_no_alternatives(declare: Declare) -> None:
    rules = quantized(declare(lambda b, m: W8 if b == 1 and m == "mlp.down_proj" else W4))
    assert rules == {r".*model\.layers\.1\.mlp\.down_proj$": W8}


def test_a_rule_for_the_trunk_leaves_a_quantized_mtp_layer_alone(declare: Declare) -> None:
    patterns = dense(declare(lambda _, m: None if "self_attn" in m else W4, mtp=W4))
    name = "mtp.layers.0.self_attn.q_proj"
    assert not any(re.search(pattern, name) for pattern in patterns)
    assert r".*mtp\.fc$" in patterns
    assert any(re.fullmatch(p, "model.layers.3.self_attn.qkv_proj") for p in patterns)


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.10.mlp.{}",  # Hugging Face and SGLang
        "model.layers.10.mlp.{}",  # text-only classes
        "language_model.model.layers.10.mlp.{}",  # vLLM
    ],
)
@pytest.mark.parametrize("leaf", ["gate_proj", "up_proj", "gate_up_proj"])
def test_rules_match_the_names_of_all_engines(declare: Declare, name: str, leaf: str) -> None:
    declaration = declare(lambda b, m: W8 if b == 10 and m.startswith("mlp") else W4)
    [pattern] = quantized(declaration)
    for match in (re.search, re.match, re.fullmatch):
        assert match(pattern, name.format(leaf))
        assert not match(pattern, name.format(leaf).replace("10", "0"))
        assert not match(pattern, name.format(leaf).replace("10", "110"))
        assert not match(pattern, f"mtp.layers.10.mlp.{leaf}")


def test_experts_are_one_rule_whatever_their_number() -> None:
    experts = [f"mlp.experts.{n}.{leaf}" for n in range(16) for leaf in ("gate_proj", "down_proj")]
    grids = {f"model.layers.{b}.{e}": W8 for b in range(3) for e in experts}
    grids |= {f"model.layers.{b}.self_attn.o_proj": W4 for b in range(3)}
    declaration = Declaration(W4, grids, (), {"mlp.experts": tuple(experts)}, ("model.layers",), ())
    [pattern] = quantized(declaration)
    assert pattern == (
        r".*model\.layers\.\d+\.(mlp\.experts|mlp\.experts\.\d+\.(down_proj|gate_proj))$"
    )
    assert re.fullmatch(pattern, "language_model.model.layers.2.mlp.experts")
    assert re.fullmatch(pattern, "model.layers.2.mlp.experts.15.down_proj")


def test_grids_are_the_same_whatever_the_signs_of_scales() -> None:
    assert same(W4, IntGrid(4, 128, False))
    assert not same(W4, W8)
    assert not same(W4, IntGrid(4, 64, True))
    assert same(None, None)
    assert not same(W4, None)
