"""What AutoRound's declaration makes each engine build."""

from __future__ import annotations

from typing import Any

import pytest
from support.declarations import (
    BF16,
    NEWEST,
    PORTABLE_EXTRA,
    SGLANG,
    TRANSFORMERS,
    TRUNK,
    VLLM,
    builds,
    context,
    inc,
    summary,
)

from nybble.doctor.engines import ENGINES, Engine
from nybble.doctor.resolve.auto_round import AUTO_ROUND
from nybble.doctor.resolve.built import DENSE, NotAnalysed, Refusal, Scheme, Storage

INT4 = Scheme(Storage.GPTQ, 4, 128, True)
OLDEST, MIDDLE = VLLM[0, 19], VLLM[0, 24]
QKVZ = "language_model.model.layers.0.linear_attn.in_proj_qkvz"
DOWN = "language_model.model.layers.0.mlp.down_proj"
GATE_UP = "language_model.model.layers.0.mlp.gate_up_proj"


@pytest.mark.parametrize(
    ("block", "trunk", "vision", "fc", "layers"),
    [
        (inc(block_name_to_quantize=TRUNK), "Q", "bf16", "bf16", "bf16"),
        (inc(to_quant_block_names=TRUNK), "Q", "bf16", "bf16", "bf16"),
        (inc(to_quant_block_names=[TRUNK]), "Q", "bf16", "bf16", "bf16"),
        (inc(extra_config={".*mtp.*": BF16, ".*visual.*": BF16}), "Q", "bf16", "bf16", "bf16"),
        (inc(), "Q", "Q", "Q", "Q"),
        (
            inc(block_name_to_quantize=[TRUNK, "mtp.layers"], extra_config={"mtp.fc": BF16}),
            *("Q", "bf16", "bf16", "Q"),
        ),
        (inc(block_name_to_quantize="model.layers"), "bf16", "bf16", "bf16", "bf16"),
    ],
)
@pytest.mark.parametrize("engine", VLLM.values(), ids=lambda engine: engine.id)
def test_the_parts_that_vllm_quantizes(
    engine: Engine, block: dict[str, Any], trunk: str, vision: str, fc: str, layers: str
) -> None:
    parts = summary(AUTO_ROUND, context(block, engine))
    found = [parts[part] for part in ("trunk", "vision", "mtp.fc", "mtp.layers")]
    assert found == [trunk, vision, fc, layers]
    assert parts["head"] == "bf16"


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.id)
def test_the_portable_rules_hold_everywhere(engine: Engine) -> None:
    block = inc(block_name_to_quantize=TRUNK, extra_config=PORTABLE_EXTRA)
    parts = summary(AUTO_ROUND, context(block, engine))
    assert parts.pop("trunk") == "Q"
    assert set(parts.values()) == {"bf16"}


@pytest.mark.parametrize(
    ("engine", "expected"), [(OLDEST, INT4), (MIDDLE, DENSE), (NEWEST, DENSE), (SGLANG, INT4)]
)
def test_exact_keys_of_qkv_and_z_count_since_024(engine: Engine, expected: Scheme) -> None:
    exact = {f"{TRUNK}.0.linear_attn.in_proj_{part}": BF16 for part in ("qkv", "z")}
    found = builds(AUTO_ROUND, context(inc(extra_config=exact), engine))
    name = QKVZ if engine is not SGLANG else f"{TRUNK}.0.linear_attn.in_proj_qkvz"
    assert found[name] == expected


def test_a_pattern_for_qkv_and_z_counts_everywhere() -> None:
    block = inc(extra_config={".*in_proj_(qkv|z).*": BF16})
    assert all(
        found == DENSE
        for engine in ENGINES
        for name, found in builds(AUTO_ROUND, context(block, engine)).items()
        if "in_proj_qkv" in name or "in_proj_z" in name
    )


def test_sglang_does_not_split_fused_names() -> None:
    exact = {f"{TRUNK}.{n}.linear_attn.in_proj_{part}": BF16 for part in "ab" for n in range(4)}
    block = inc(block_name_to_quantize=TRUNK, extra_config=exact)
    assert summary(AUTO_ROUND, context(block, SGLANG))["ba"] == "Q"
    assert summary(AUTO_ROUND, context(block, NEWEST))["ba"] == "bf16"


def test_an_exact_key_without_bits_is_dense_in_vllm_only() -> None:
    block = inc(extra_config={f"{TRUNK}.0.mlp.down_proj": {"group_size": 32}})
    assert builds(AUTO_ROUND, context(block))[DOWN] == DENSE
    in_transformers = builds(AUTO_ROUND, context(block, TRANSFORMERS))
    assert in_transformers[f"{TRUNK}.0.mlp.down_proj"] == Scheme(Storage.GPTQ, 4, 32, True)


def test_parts_of_one_module_that_differ_are_refused() -> None:
    block = inc(extra_config={f"{TRUNK}.0.mlp.gate_proj": BF16})
    for engine in VLLM.values():
        refused = builds(AUTO_ROUND, context(block, engine))[GATE_UP]
        assert isinstance(refused, Refusal)
        assert refused.exception == "ValueError"
        assert "consistent" in refused.message
        assert engine.label in refused.evidence


def test_a_key_that_ends_a_name_counts_since_028() -> None:
    block = inc(extra_config={"mlp.down_proj": {"bits": 8}})
    by_release = [builds(AUTO_ROUND, context(block, engine))[DOWN] for engine in VLLM.values()]
    assert by_release == [INT4] * 3 + [Scheme(Storage.GPTQ, 8, 128, True)] * 2


def test_an_escaped_prefix_is_not_renamed() -> None:
    block = inc(extra_config={r"model\.language_model\.layers.*": BF16, "(": BF16})
    assert builds(AUTO_ROUND, context(block))[DOWN] == INT4
    assert builds(AUTO_ROUND, context(block, SGLANG))[f"{TRUNK}.0.mlp.down_proj"] == DENSE


def test_the_hook_for_mtp_layers_heeds_any_method() -> None:
    block = inc(dynamic={"-:.*mtp.*": {}})
    by_release = [summary(AUTO_ROUND, context(block, engine)) for engine in VLLM.values()]
    assert [parts["mtp.layers"] for parts in by_release] == ["Q", "Q", "Q", "bf16", "bf16"]
    assert {parts["mtp.fc"] for parts in by_release} == {"Q"}


@pytest.mark.parametrize(
    ("block", "refused"),
    [
        (inc(bits=None), "ValueError ValueError None ValueError"),
        (inc(group_size=None), "ValueError ValueError None ValueError"),
        (inc(sym=None), "ValueError None None ValueError"),
        (inc(bits=5), "ValueError None None ValueError"),
        (inc(bits=1), "ValueError ValueError ValueError ValueError"),
        (inc(packing_format="auto_round:gptq"), "ValueError ValueError None ValueError"),
        (inc(packing_format="auto_round:exllamav2"), "ValueError ValueError None ValueError"),
        (
            inc(packing_format="auto_round:llm_compressor"),
            "ValueError AssertionError None ValueError",
        ),
        (inc(data_type="nonsense"), "ValueError ValueError None ValueError"),
        (inc(desc_act=True), "None None NotImplementedError None"),
        (inc(extra_config=[1]), "AttributeError AttributeError AttributeError AttributeError"),
        (inc(quant_method="auto_round"), "ValueError ValueError None ValueError"),
        (inc(quant_method="inc"), "None None None ValueError"),
        (inc(block_name_to_quantize=[["a"]]), "AttributeError AttributeError None AttributeError"),
    ],
)
def test_declarations_that_are_refused(block: dict[str, Any], refused: str) -> None:
    found = [
        AUTO_ROUND.refusal(context(block, engine))
        for engine in (OLDEST, NEWEST, TRANSFORMERS, SGLANG)
    ]
    assert [str(one and one.exception) for one in found] == refused.split()


def test_a_spelling_that_transformers_does_not_know_is_loaded_dense() -> None:
    parts = summary(AUTO_ROUND, context(inc(quant_method="auto_round"), TRANSFORMERS))
    assert set(parts.values()) == {"bf16"}


def test_transformers_quantizes_the_blocks_it_finds() -> None:
    """Without names: every list of blocks, the tower's too; what 32 does not divide stays."""
    found = builds(AUTO_ROUND, context(inc(group_size=32), TRANSFORMERS))
    assert found["model.visual.blocks.0.attn.qkv"] == Scheme(Storage.GPTQ, 4, 32, True)
    assert found["model.visual.merger.linear_fc1"] == DENSE
    assert found[f"{TRUNK}.0.linear_attn.in_proj_a"] == DENSE
    assert found["lm_head"] == DENSE


def test_transformers_takes_an_exact_key_outside_the_blocks() -> None:
    block = inc(block_name_to_quantize=TRUNK, extra_config={"lm_head": {"bits": 8}})
    found = builds(AUTO_ROUND, context(block, TRANSFORMERS))
    assert found["lm_head"] == Scheme(Storage.GPTQ, 8, 128, True)


def test_what_is_not_known_is_said() -> None:
    blocks = [inc(data_type="mx_fp"), inc(data_type="fp", bits=8)]
    for block in blocks:
        assert AUTO_ROUND.refusal(context(block)) is None
        assert {type(one) for one in builds(AUTO_ROUND, context(block)).values()} >= {NotAnalysed}
