from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import VOCAB
from support.dense_checkpoints import (
    CONFIGS,
    WINDOW,
    Dense,
    dense_config,
    dense_tensors,
    stored_by_transformers_4,
    write_dense,
    write_weights,
)
from transformers import AutoModelForCausalLM

from nybble.arch.blocks import BlockRunner, expected_shapes
from nybble.arch.plan import Keep, Quantize, TensorPlan, plan_tensors
from nybble.arch.registry import architecture_of, refuse_other_names
from nybble.arch.spec import Architecture
from nybble.checkpoint.index import open_index
from nybble.core.errors import CheckpointError, NybbleError, PlanError, UnsupportedArchitecture
from nybble.engine.load import load_model
from nybble.recipe.schema import Scheme

NAMES = list(CONFIGS)
SEQLEN = 3 * WINDOW
CPU = torch.device("cpu")
LINEARS = {
    *(f"self_attn.{kind}_proj" for kind in "qkvo"),
    *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
}
BIASED_LLAMA = Dense("LlamaForCausalLM", (("attention_bias", True), ("mlp_bias", True)))
VARIANTS = {
    **{name: Dense(name) for name in NAMES},
    "Llama with biases": BIASED_LLAMA,
    "Qwen2 tied": Dense("Qwen2ForCausalLM", (("tie_word_embeddings", True),)),
    "Gemma3 untied": Dense("Gemma3ForCausalLM", (("tie_word_embeddings", False),)),
    "Gemma3 wrapper untied": Dense(
        "Gemma3ForConditionalGeneration", (("tie_word_embeddings", False),)
    ),
}
each_variant = pytest.mark.parametrize("dense", VARIANTS.values(), ids=VARIANTS)
each_name = pytest.mark.parametrize("name", NAMES)


def ids() -> torch.Tensor:
    return torch.randint(7, VOCAB, (2, SEQLEN), generator=torch.Generator().manual_seed(0))


def reference(folder: Path) -> Any:
    """transformers' own model in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def arch_of(dense: Dense) -> Architecture:
    return architecture_of(dense_config(dense))


def plan_of(folder: Path, dense: Dense) -> TensorPlan:
    return plan_tensors(arch_of(dense), open_index(folder), Scheme())


@each_variant
def test_logits_equal_those_of_transformers(tmp_path: Path, dense: Dense) -> None:
    folder = write_dense(tmp_path / "base", dense)
    model = load_model(folder)
    logits = model.logits(model.hidden(ids()))
    expected = reference(folder)(input_ids=ids()).logits
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 0.1


@each_variant
def test_blocks_in_a_row_equal_transformers_hidden_states(tmp_path: Path, dense: Dense) -> None:
    folder = write_dense(tmp_path / "base", dense)
    arch, model = arch_of(dense), reference(folder)
    weights = {name: tensor.float() for name, tensor in dense_tensors(dense).items()}
    runner = BlockRunner(arch, SEQLEN, CPU, torch.float32)
    # The last of transformers' hidden states is the one after the final norm.
    *stages, last = model(input_ids=ids(), output_hidden_states=True).hidden_states
    hidden = weights[arch.embedding][ids()] * torch.tensor(arch.embedding_scale)
    for index in range(arch.num_blocks):
        assert torch.allclose(hidden, stages[index], rtol=1e-5, atol=1e-5), index
        prefix = arch.block_prefix(index)
        block = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        hidden = runner(index, block, hidden)
        assert not torch.allclose(hidden, stages[index], atol=0.1)
    hidden = runner.final_norm(weights[arch.final_norm], hidden)
    assert torch.allclose(hidden, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"])
def test_in_bfloat16_the_embedding_scale_is_rounded_first(tmp_path: Path, name: str) -> None:
    folder = write_dense(tmp_path / "base", Dense(name))
    arch = arch_of(Dense(name))
    model = load_model(folder, dtype=torch.bfloat16)
    table = model.trunk.embed_tokens.weight
    scale = torch.tensor(arch.embedding_scale, dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = theirs.get_input_embeddings()(ids())
    assert torch.equal(table[ids()] * scale, expected)
    assert torch.equal(model.trunk.embed_tokens(ids()), expected)
    assert float(scale) != arch.embedding_scale


@each_variant
def test_every_tensor_has_a_fate(tmp_path: Path, dense: Dense) -> None:
    folder = write_dense(tmp_path / "base", dense)
    arch, plan = arch_of(dense), plan_of(folder, dense)
    assert set(plan.fates) == set(dense_tensors(dense))
    expected = {f"{arch.block_prefix(block)}{linear}" for block in range(3) for linear in LINEARS}
    quantized = {m for f in plan.fates.values() if isinstance(f, Quantize) for m in f.modules}
    assert quantized == expected
    for name, fate in plan.kept():
        outside = "vision_tower" in name or "multi_modal_projector" in name
        assert (fate.part == "vision") == outside, name
        assert (fate.part == "biases") == (name.endswith(".bias") and not outside), name


def test_parts_and_reasons_of_what_is_kept(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "base", Dense("Qwen2ForCausalLM"))
    kept = dict(plan_of(folder, Dense("Qwen2ForCausalLM")).kept())
    assert kept["model.layers.2.self_attn.k_proj.bias"] == Keep("biases", "a vector")
    assert kept["model.layers.0.input_layernorm.weight"] == Keep("norms", "a vector")
    assert kept["model.norm.weight"] == Keep("norms", "a vector")
    assert kept["model.embed_tokens.weight"] == Keep("embeddings", "a lookup table")
    assert kept["lm_head.weight"] == Keep("lm_head", "sensitive")
    assert len(kept) == 3 * 5 + 3


@each_variant
def test_expected_shapes_are_the_stored_ones(dense: Dense) -> None:
    stored = {name: tuple(t.shape) for name, t in dense_tensors(dense).items()}
    stored = {n: s for n, s in stored.items() if "vision_tower" not in n and "projector" not in n}
    assert expected_shapes(arch_of(dense)) == stored


def test_a_head_stored_beside_a_tied_embedding_is_kept(tmp_path: Path) -> None:
    dense = Dense("Qwen2ForCausalLM", (("tie_word_embeddings", True),), stores_tied_head=True)
    folder = write_dense(tmp_path / "base", dense)
    assert plan_of(folder, dense).fates["lm_head.weight"] == Keep("lm_head", "sensitive")
    assert arch_of(dense).lm_head == "model.embed_tokens.weight"
    assert torch.equal(load_model(folder).lm_head, dense_tensors(dense)["lm_head.weight"].float())


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("LlamaForCausalLM", "model.layers.0.self_attn.q_proj.bias"),
        ("LlamaForCausalLM", "model.layers.0.self_attn.q_norm.weight"),
        ("MistralForCausalLM", "model.layers.1.mlp.up_proj.bias"),
        ("Qwen2ForCausalLM", "model.layers.1.self_attn.o_proj.bias"),
        ("Gemma3ForCausalLM", "model.vision_tower.embeddings.patch_embedding.bias"),
    ],
)
def test_a_tensor_that_the_family_does_not_have_is_refused(
    tmp_path: Path, name: str, extra: str
) -> None:
    folder = write_dense(tmp_path / "base", Dense(name))
    write_weights(folder, dense_tensors(Dense(name)) | {extra: torch.zeros(64).bfloat16()})
    with pytest.raises(PlanError, match=f"{re.escape(extra)}.*no rule knows it"):
        plan_of(folder, Dense(name))


@each_name
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    folder = write_dense(tmp_path / "base", Dense(name))
    tensors = dense_tensors(Dense(name))
    lost = next(n for n in tensors if n.endswith("layers.1.post_attention_layernorm.weight"))
    del tensors[lost]
    write_weights(folder, tensors)
    with pytest.raises(PlanError, match=re.escape(lost)):
        plan_of(folder, Dense(name))


KINDS = {
    "LlamaForCausalLM": ("full", "full", "full"),
    "MistralForCausalLM": ("sliding", "sliding", "sliding"),
    "Qwen2ForCausalLM": ("full", "full", "full"),
    "Qwen3ForCausalLM": ("full", "sliding", "sliding"),
    "Gemma3ForCausalLM": ("sliding", "sliding", "full"),
    "Gemma3ForConditionalGeneration": ("sliding", "sliding", "full"),
}


@each_name
def test_kinds_of_attention(name: str) -> None:
    assert arch_of(Dense(name)).layer_kinds == KINDS[name]


def test_a_mistral_without_a_window_attends_to_everything() -> None:
    dense = Dense("MistralForCausalLM", (("sliding_window", None),))
    assert arch_of(dense).layer_kinds == ("full", "full", "full")


@each_name
def test_reading_a_config_does_not_change_it(name: str) -> None:
    config = dense_config(Dense(name))
    before = copy.deepcopy(config)
    architecture_of(config)
    assert config == before


@each_name
def test_engines_fuse_what_reads_the_same_input(name: str) -> None:
    groups = {group.fused: group.members for group in arch_of(Dense(name)).input_groups}
    assert groups["self_attn.qkv_proj"] == tuple(f"self_attn.{kind}_proj" for kind in "qkv")
    assert groups["mlp.gate_up_proj"] == ("mlp.gate_proj", "mlp.up_proj")
    assert groups["mlp.down_proj"] == ("mlp.down_proj",)
    assert {member for members in groups.values() for member in members} == LINEARS


def refused(dense: Dense, kind: type[NybbleError]) -> str:
    with pytest.raises(kind) as caught:
        arch_of(dense)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("LlamaForCausalLM", "layer_types", ["full_attention"] * 3),
        ("MistralForCausalLM", "layer_types", ["sliding_attention"] * 3),
        ("Gemma3ForCausalLM", "final_logit_softcapping", 30.0),
        ("Gemma3ForCausalLM", "use_bidirectional_attention", True),
    ],
)
def test_what_would_compute_otherwise_is_not_supported(name: str, key: str, value: object) -> None:
    message = refused(Dense(name, ((key, value),)), UnsupportedArchitecture)
    assert key in message


@each_name
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "128"),
        ("hidden_size", 0),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 0),
        ("vocab_size", -1),
        ("rope_scaling", {"rope_type": "nonsense"}),
    ],
)
def test_a_broken_value_makes_one_line(name: str, key: str, value: object) -> None:
    assert "config.json" in refused(Dense(name, ((key, value),)), CheckpointError)


@pytest.mark.parametrize("section", [None, "text_config"])
def test_a_head_tied_in_one_place_alone_is_refused(section: str | None) -> None:
    config = dense_config(Dense("Gemma3ForConditionalGeneration"))
    (config[section] if section else config)["tie_word_embeddings"] = False
    with pytest.raises(CheckpointError, match="say the same in both"):
        architecture_of(config)


def test_the_hubs_names_of_a_vision_language_gemma_are_refused(tmp_path: Path) -> None:
    dense = Dense("Gemma3ForConditionalGeneration")
    folder = write_dense(tmp_path / "base", dense)
    refuse_other_names(arch_of(dense), open_index(folder))
    write_weights(folder, stored_by_transformers_4(dense_tensors(dense)))
    with pytest.raises(CheckpointError, match=r"as language_model\.model\.\*, not as") as caught:
        refuse_other_names(arch_of(dense), open_index(folder))
    assert "save_original_format=False" in str(caught.value)


def test_the_advised_conversion_makes_the_names_that_are_read(tmp_path: Path) -> None:
    dense = Dense("Gemma3ForConditionalGeneration")
    folder = write_dense(tmp_path / "base", dense)
    write_weights(folder, stored_by_transformers_4(dense_tensors(dense)))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again", save_original_format=False)
    plan = plan_of(tmp_path / "again", dense)
    assert set(plan.fates) == set(dense_tensors(dense))
