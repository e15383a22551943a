from __future__ import annotations

import copy
from typing import Any

import pytest
from support.checkpoints import Tiny, tiny_config
from support.dense_checkpoints import Dense, dense_config
from support.moe_checkpoints import EXPERTS, Moe, moe_config

from nybble.doctor.engines import ENGINES, Engine, chosen_engines
from nybble.doctor.findings import Part
from nybble.doctor.layout.modules import builds, modules
from nybble.doctor.layout.names import engine_name
from nybble.doctor.layout.registry import layout_of
from nybble.doctor.layout.spec import Kind, Layout, Module

VLLM = chosen_engines("vllm")
[V019] = chosen_engines("vllm", "0.19")
[V032] = chosen_engines("vllm", "0.32")
[TRANSFORMERS] = chosen_engines("transformers")
[SGLANG] = chosen_engines("sglang")
WRAPPER = tiny_config(Tiny(text=(("num_hidden_layers", 2), ("layer_types", None))))
WRAPPER["text_config"]["full_attention_interval"] = 2


def found(config: dict[str, Any]) -> Layout:
    layout = layout_of(config)
    assert layout is not None
    return layout


def listed(layout: Layout, engine: Engine) -> dict[str, list[str]]:
    """The names of modules, each with its members' last words; marked where they are special."""
    marks = {Kind.LINEAR: "", Kind.HEAD: " head", Kind.EXPERTS: " experts", Kind.PLAIN: " plain"}
    return {
        f"{module.part}: {module.name}{marks[module.kind]}": [
            linear.name.rpartition(".")[2] for linear in module.members
        ]
        for module in modules(layout, engine)
    }


def by_name(config: dict[str, Any], engine: Engine) -> dict[str, Module]:
    return {module.name: module for module in modules(found(config), engine)}


TOWER_OF_VLLM = {
    "vision: visual.merger.linear_fc1": ["linear_fc1"],
    "vision: visual.merger.linear_fc2": ["linear_fc2"],
    "vision: visual.blocks.0.attn.qkv": ["qkv"],
    "vision: visual.blocks.0.attn.proj": ["proj"],
    "vision: visual.blocks.0.mlp.linear_fc1": ["linear_fc1"],
    "vision: visual.blocks.0.mlp.linear_fc2": ["linear_fc2"],
}


def decoder(blocks: str) -> dict[str, list[str]]:
    return {
        f"{blocks}.0.linear_attn.in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
        f"{blocks}.0.linear_attn.in_proj_ba": ["in_proj_b", "in_proj_a"],
        f"{blocks}.0.linear_attn.out_proj": ["out_proj"],
        f"{blocks}.0.mlp.gate_up_proj": ["gate_proj", "up_proj"],
        f"{blocks}.0.mlp.down_proj": ["down_proj"],
        **attention_block(f"{blocks}.1"),
    }


def attention_block(block: str) -> dict[str, list[str]]:
    return {
        f"{block}.self_attn.qkv_proj": ["q_proj", "k_proj", "v_proj"],
        f"{block}.self_attn.o_proj": ["o_proj"],
        f"{block}.mlp.gate_up_proj": ["gate_proj", "up_proj"],
        f"{block}.mlp.down_proj": ["down_proj"],
    }


@pytest.mark.parametrize("engine", VLLM, ids=str)
def test_vllm_and_the_wrapper(engine: Engine) -> None:
    head = "head" if engine.first >= (0, 24) else "plain"
    expected = {
        **TOWER_OF_VLLM,
        **decoder("trunk: language_model.model.layers"),
        f"trunk: language_model.lm_head {head}": ["lm_head"],
        "mtp: mtp.fc": ["fc"],
        **attention_block("mtp: mtp.layers.0"),
        f"mtp: lm_head {head}": ["lm_head"],
    }
    assert list(listed(found(WRAPPER), engine).items()) == list(expected.items())


def test_sglang_and_the_wrapper() -> None:
    tower = {
        name.replace("visual", "model.visual") + " plain": members
        for name, members in TOWER_OF_VLLM.items()
    }
    expected = {
        **tower,
        **decoder("trunk: model.language_model.layers"),
        "trunk: lm_head head": ["lm_head"],
        "mtp: mtp.fc plain": ["fc"],
        **attention_block("mtp: mtp.layers.0"),
        "mtp: lm_head head": ["lm_head"],
    }
    assert listed(found(WRAPPER), SGLANG) == expected


def test_transformers_fuses_nothing_and_knows_no_mtp_head() -> None:
    layout = found(WRAPPER)
    expected = [name for name in layout.linears if not name.startswith("mtp.")]
    built = modules(layout, TRANSFORMERS)
    assert [module.name for module in built] == expected
    assert [module.members for module in built] == [(layout.linears[n],) for n in expected]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_text_only_qwen3_5_is_new_in_vllm_0_28(engine: Engine) -> None:
    text = {k: v for k, v in WRAPPER["text_config"].items() if k != "architectures"}
    layout = found({"architectures": ["Qwen3_5ForCausalLM"], **text})
    is_old = engine in VLLM and engine.first < (0, 28)
    assert builds(layout, engine) is not is_old
    names = listed(layout, engine)
    if is_old:
        assert names == {}
    elif engine is not TRANSFORMERS:
        assert list(decoder("trunk: model.layers")) == list(names)[:9]
        assert [name for name in names if "lm_head" in name] == [
            "trunk: lm_head head",
            "mtp: lm_head head",
        ]


def test_a_text_only_class_reads_the_wrappers_names() -> None:
    layout = found({**WRAPPER, "architectures": ["Qwen3_5ForCausalLM"]})
    assert list(listed(layout, V032))[:9] == list(decoder("trunk: model.layers"))
    assert modules(layout, TRANSFORMERS)[0].name == "model.layers.0.linear_attn.in_proj_qkv"


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_mixture_of_experts(engine: Engine) -> None:
    names = by_name(moe_config(Moe()), engine)
    mlp = "model.language_model.layers.0.mlp"
    if engine in VLLM:
        mlp = "language_model.model.layers.0.mlp"
    experts = names[f"{mlp}.experts"]
    assert experts.kind is Kind.EXPERTS
    assert [linear.name for linear in experts.members] == [
        f"model.language_model.layers.0.mlp.experts.{expert}.{part}_proj"
        for expert in range(EXPERTS)
        for part in ("gate", "up", "down")
    ]
    assert names[f"{mlp}.gate"].kind is Kind.PLAIN
    gate = names[f"{mlp}.shared_expert_gate"].kind
    assert gate is (Kind.LINEAR if engine is TRANSFORMERS else Kind.PLAIN)
    fused = f"{mlp}.shared_expert.gate_up_proj"
    assert (fused in names) is (engine is not TRANSFORMERS)
    assert ("mtp.layers.0.mlp.experts" in names) is (engine is not TRANSFORMERS)


def test_qwen3_next() -> None:
    config = moe_config(Moe("Qwen3NextForCausalLM"))
    vllm = modules(found(config), V032)
    assert [(m.name, m.part) for m in vllm if m.members[0].name == "lm_head"] == [
        ("lm_head", Part.TRUNK),
        ("lm_head", Part.MTP),
    ]
    assert {m.kind for m in vllm if m.name == "lm_head"} == {Kind.PLAIN}
    names = [m.name for m in vllm]
    assert "model.layers.0.linear_attn.in_proj_qkvz" in names
    assert "model.layers.1.mlp.gate_up_proj" in names  # its MLP is dense
    assert "mtp.layers.0.mlp.experts" in names
    sglang = [m for m in modules(found(config), SGLANG) if m.part is Part.MTP]
    assert sglang[0].name == "mtp.fc"
    assert sglang[0].kind is Kind.PLAIN
    assert sglang[1].name == "model.layers.0.self_attn.qkv_proj"
    assert sglang[-1].name == "model.shared_head.head"


@pytest.mark.parametrize(
    ("top", "inside", "heads"),
    [
        (False, False, {V019, V032, TRANSFORMERS, SGLANG}),
        (True, True, set()),
        (True, False, {V019, V032}),
        (False, True, {TRANSFORMERS, SGLANG}),
    ],
)
def test_engines_ask_either_level_for_ties(top: bool, inside: bool, heads: set[Engine]) -> None:
    config = copy.deepcopy(WRAPPER) | {"tie_word_embeddings": top}
    config["text_config"]["tie_word_embeddings"] = inside
    for engine in (V019, V032, TRANSFORMERS, SGLANG):
        names = [m.members[0].name for m in modules(found(config), engine)]
        copies = 1 if engine is TRANSFORMERS else 2  # one in the MTP head
        assert names.count("lm_head") == (copies if engine in heads else 0)


@pytest.mark.parametrize("top", [True, False])
def test_for_gemma_engines_ask_the_other_level(top: bool) -> None:
    config = dense_config(Dense("Gemma3ForConditionalGeneration"))
    config["text_config"]["tie_word_embeddings"] = not top
    config["tie_word_embeddings"] = top
    heads = {engine for engine in ENGINES for m in modules(found(config), engine) if is_head(m)}
    assert heads == ({SGLANG} if top else {*VLLM, TRANSFORMERS})


def is_head(module: Module) -> bool:
    return module.kind is Kind.HEAD


def test_dense_models() -> None:
    layout = found(dense_config(Dense("LlamaForCausalLM", (("num_hidden_layers", 1),))))
    expected = {**attention_block("trunk: model.layers.0"), "trunk: lm_head head": ["lm_head"]}
    assert listed(layout, V019) == listed(layout, V032) == listed(layout, SGLANG) == expected


def test_gemma_and_its_tower() -> None:
    config = dense_config(Dense("Gemma3ForConditionalGeneration"))
    config["vision_config"] |= {"hidden_size": 64, "intermediate_size": 96}
    for engine in (V019, V032, SGLANG):
        names = by_name(config, engine)
        layer = "vision_tower.vision_model.encoder.layers.0"
        assert len(names[f"{layer}.self_attn.qkv_proj"].members) == 3
        is_plain = names[f"{layer}.mlp.fc1"].kind is Kind.PLAIN
        assert is_plain is (engine is not SGLANG)  # 96 is no multiple of 64
        assert "language_model.model.layers.2.mlp.gate_up_proj" in names
        assert "language_model.lm_head" not in names  # tied
    config["vision_config"]["intermediate_size"] = 128
    assert by_name(config, V032)[f"{layer}.mlp.fc2"].kind is Kind.LINEAR


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("model.language_model.layers", "language_model.model.layers"),
        ("model.language_model.", "language_model.model."),
        ("model.language_model", "model.language_model"),
        ("model.visual.blocks", "visual.blocks"),
        ("lm_head", "lm_head"),
        ("lm_head.", "language_model.lm_head."),
        ("mtp.fc", "mtp.fc"),
        (r"re:^model\.language_model\.", r"re:^model\.language_model\."),
        (".*model.visual.*", ".*model.visual.*"),
        ("", ""),
    ],
)
def test_vllm_renames_literal_prefixes_alone(name: str, renamed: str) -> None:
    layout = found(WRAPPER)
    for engine in VLLM:
        assert engine_name(layout, engine, name) == renamed
    assert engine_name(layout, TRANSFORMERS, name) == engine_name(layout, SGLANG, name) == name


def test_names_of_other_models() -> None:
    gemma = found(dense_config(Dense("Gemma3ForConditionalGeneration")))
    tower = "model.vision_tower.vision_model.encoder"
    assert engine_name(gemma, V032, tower) == "vision_tower.vision_model.encoder"
    text = found({**WRAPPER, "architectures": ["Qwen3_5ForCausalLM"]})
    assert engine_name(text, V032, "model.language_model.layers.1") == "model.layers.1"
    llama = found(dense_config(Dense("LlamaForCausalLM")))
    assert engine_name(llama, V032, "model.language_model.x") == "model.language_model.x"
