"""The blocks of mixtures of experts, judged by transformers' models and by routing by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from support.moe_checkpoints import (
    BLOCKS,
    EXPERTS,
    HIDDEN,
    MTP_SHAPES,
    PER_TOKEN,
    Moe,
    model_tensors,
    moe_config,
)
from support.mtp_twin import attention, normed
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from nybble.arch.blocks import BlockRunner
from nybble.arch.experts_loop import run_experts
from nybble.arch.registry import architecture_of

SEQLEN = 70  # longer than a chunk of transformers' Gated DeltaNet (64)
QWEN3_5, NEXT = "Qwen3_5MoeForConditionalGeneration", "Qwen3NextForCausalLM"
each_name = pytest.mark.parametrize("name", [QWEN3_5, NEXT])


def trunk_weights(moe: Moe) -> dict[str, torch.Tensor]:
    """The text model's float32 weights under its own names."""
    prefix = moe.prefix
    return {
        name.removeprefix(prefix): tensor.float()
        for name, tensor in model_tensors(moe).items()
        if name.startswith(prefix)
    }


@cache
def reference(name: str) -> Any:
    """transformers' text model in float32."""
    moe = Moe(name)
    values = {k: v for k, v in moe_config(moe).items() if k != "architectures"}
    loader = AutoModelForImageTextToText if "text_config" in values else AutoModelForCausalLM
    model = loader.from_config(AutoConfig.for_model(**values), experts_implementation="eager")
    trunk = model.model.language_model if "text_config" in values else model.model
    trunk.load_state_dict(trunk_weights(moe))
    return trunk.eval().float().requires_grad_(False)


@cache
def runner(name: str) -> BlockRunner:
    arch = architecture_of(moe_config(Moe(name)))
    return BlockRunner(arch, SEQLEN, torch.device("cpu"), torch.float32)


def of_block(name: str, index: int) -> dict[str, torch.Tensor]:
    prefix = f"layers.{index}."
    weights = trunk_weights(Moe(name)).items()
    return {n.removeprefix(prefix): w for n, w in weights if n.startswith(prefix)}


def some_hidden(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, SEQLEN, HIDDEN, generator=torch.Generator().manual_seed(rows))


@each_name
def test_all_blocks_in_a_row_equal_the_reference_model(name: str) -> None:
    model = reference(name)
    token_ids = torch.randint(300, (2, SEQLEN), generator=torch.Generator().manual_seed(1))
    hidden = model.embed_tokens(token_ids)
    for index in range(BLOCKS):
        hidden = runner(name)(index, of_block(name, index), hidden)
    expected = model(input_ids=token_ids, use_cache=False).last_hidden_state
    assert torch.allclose(model.norm(hidden), expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 0.1


@each_name
def test_gradients_reach_the_experts_that_were_chosen(name: str) -> None:
    trained = {n: w.clone().requires_grad_() for n, w in of_block(name, 0).items()}
    runner(name)(0, trained, some_hidden()).square().mean().backward()
    for part, weight in trained.items():
        assert weight.grad is not None, part
        by_expert = weight.grad.flatten(1) if weight.ndim == 3 else weight.grad.flatten()[None]
        assert bool((by_expert.abs().sum(dim=1) > 0).all()), part


@each_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_loop_equals_transformers_own(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(9, HIDDEN, generator=generator).to(dtype)
    # Nobody chooses expert 2.
    chosen = torch.tensor([[0, 1], [1, 0], [3, 0], [3, 1], [0, 3], [1, 3], [0, 1], [3, 0], [1, 3]])
    shares = torch.rand(9, PER_TOKEN, generator=generator).to(dtype)
    experts = copy.deepcopy(reference(name).layers[0].mlp.experts).to(dtype).requires_grad_()
    found, expected = [], []
    for run, results in ((run_experts, found), (type(experts).forward, expected)):
        experts.zero_grad()
        results.append(run(experts, hidden, chosen, shares))
        results[0].float().square().sum().backward()
        results += [experts.gate_up_proj.grad, experts.down_proj.grad]
    assert experts.config._experts_implementation == "eager"
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):  # sums over tokens in two orders
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    assert not bool(found[1][2].any())
    assert bool(found[1][[0, 1, 3]].flatten(1).any(dim=1).all())


def chosen_by_hand(block: Mapping[str, torch.Tensor], mlp_inputs: torch.Tensor) -> list[list[int]]:
    """By expert, the numbers of the tokens whose two likeliest experts it is one of."""
    chosen: list[list[int]] = [[] for _ in range(EXPERTS)]
    for number, token in enumerate(mlp_inputs):
        logits = [float(row @ token) for row in block["mlp.gate.weight"]]
        for expert in sorted(range(EXPERTS), key=lambda e: -logits[e])[:PER_TOKEN]:
            chosen[expert].append(number)
    return chosen


@each_name
def test_inputs_of_experts_are_those_routed_to_them_by_hand(name: str) -> None:
    block, layer, hidden = of_block(name, 0), reference(name).layers[0], some_hidden()
    seen: list[torch.Tensor] = []
    hook = layer.mlp.register_forward_pre_hook(lambda _mlp, args: seen.append(args[0]))
    runner(name)(0, block, hidden)  # the runner's own modules have no such hook
    assert not seen
    rotary = reference(name).rotary_emb(hidden, torch.arange(SEQLEN)[None])
    layer(hidden, position_embeddings=rotary, attention_mask=None)
    hook.remove()
    mlp_inputs = seen[0].flatten(0, 1)
    told: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def note(part: str, expert: int, rows: torch.Tensor, tokens: torch.Tensor | None) -> None:
        assert tokens is not None
        assert (part, expert) not in told
        told[part, expert] = rows, tokens

    stacks = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    with runner(name).inputs_of(0, stacks, note):
        runner(name)(0, block, hidden)
    for expert, numbers in enumerate(chosen_by_hand(block, mlp_inputs)):
        assert 0 < len(numbers) < len(mlp_inputs)
        inputs = mlp_inputs[numbers]
        gate, up = (inputs @ half.T for half in block[stacks[0]][expert].chunk(2))
        for part, expected in zip(stacks, (inputs, silu(gate) * up), strict=True):
            rows, tokens = told[part, expert]
            assert tokens.tolist() == numbers
            assert torch.allclose(rows, expected, rtol=1e-4, atol=1e-5)


# --- the MTP head ---------------------------------------------------------------------------------


def slow_moe(layer: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The routed experts and the shared one on one token [D], in float64."""
    probabilities = (layer["mlp.gate.weight"] @ x).softmax(dim=0)
    best = sorted(range(EXPERTS), key=lambda e: -float(probabilities[e]))[:PER_TOKEN]
    total = sum(float(probabilities[e]) for e in best)
    result = torch.zeros_like(x)
    for expert in best:
        gate, up = layer["mlp.experts.gate_up_proj"][expert].chunk(2)
        inner = silu(gate @ x) * (up @ x)
        share = float(probabilities[expert]) / total
        result += share * (layer["mlp.experts.down_proj"][expert] @ inner)
    shared = {n: layer[f"mlp.shared_expert.{n}_proj.weight"] for n in ("gate", "up", "down")}
    inner = silu(shared["gate"] @ x) * (shared["up"] @ x)
    opened = torch.sigmoid(layer["mlp.shared_expert_gate.weight"] @ x)
    return result + opened * (shared["down"] @ inner)


def slow_head(
    tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor, next_embeds: torch.Tensor
) -> torch.Tensor:
    """The whole head on one row [T, D], one position at a time."""
    w = {name.removeprefix("mtp."): tensor.double() for name, tensor in tensors.items()}
    layer = {n.removeprefix("layers.0."): t for n, t in w.items() if n.startswith("layers.0.")}
    norms = w["pre_fc_norm_embedding.weight"], w["pre_fc_norm_hidden.weight"]
    inputs = [
        w["fc.weight"] @ torch.cat([normed(e.double(), norms[0]), normed(h.double(), norms[1])])
        for e, h in zip(next_embeds, hidden, strict=True)
    ]
    mixed = attention(layer, [normed(x, layer["input_layernorm.weight"]) for x in inputs])
    outputs = []
    for x, attended in zip(inputs, mixed, strict=True):
        middle = x + attended
        ready = normed(middle, layer["post_attention_layernorm.weight"])
        outputs.append(normed(middle + slow_moe(layer, ready), w["norm.weight"]))
    return torch.stack(outputs)


@each_name
def test_the_head_agrees_with_a_slow_twin(name: str) -> None:
    moe, length = Moe(name), 9
    arch = architecture_of(moe_config(moe))
    assert arch.mtp is not None
    assert arch.mtp.shapes == MTP_SHAPES
    tensors = {n: t.float() for n, t in model_tensors(moe).items() if n in MTP_SHAPES}
    head = arch.mtp.build().eval().float()
    head.load_state_dict({n.removeprefix("mtp."): t for n, t in tensors.items()})
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, length, HIDDEN, generator=generator)
    embeds = 0.5 * torch.randn(2, length, HIDDEN, generator=generator)
    rotary = reference(name).rotary_emb(hidden, torch.arange(length)[None])
    with torch.no_grad():
        output = head(hidden, embeds, rotary, None)
    for row in range(2):
        expected = slow_head(tensors, hidden[row], embeds[row])
        assert torch.allclose(output[row].double(), expected, rtol=1e-4, atol=1e-5)
