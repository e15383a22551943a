from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.checkpoints import TEXT_VALUES, VOCAB, Tiny, tiny_config, tiny_tensors
from torch.nn.functional import silu
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextModel

from nybble.arch.blocks import BlockRunner, expected_shapes
from nybble.arch.registry import architecture_of

SEQLEN = 70  # longer than a chunk of transformers' Gated DeltaNet (64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """The text model's float32 weights under its own names."""
    prefix = Tiny().prefix
    return {
        name.removeprefix(prefix): tensor.float()
        for name, tensor in tiny_tensors(Tiny()).items()
        if name.startswith(prefix)
    }


@pytest.fixture(scope="module")
def reference(weights: dict[str, torch.Tensor]) -> Qwen3_5TextModel:
    model = Qwen3_5TextModel(Qwen3_5TextConfig(**TEXT_VALUES)).eval().float()
    model.load_state_dict(weights)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def runner() -> BlockRunner:
    return BlockRunner(architecture_of(tiny_config(Tiny())), SEQLEN, CPU, torch.float32)


def of_block(weights: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    prefix = f"layers.{index}."
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def ids(rows: int) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, SEQLEN), generator=torch.Generator().manual_seed(rows))


def block_inputs(reference: Qwen3_5TextModel, token_ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """What each block of the reference is given, then the last one's output."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
        for layer in reference.layers
    ]
    handles.append(reference.norm.register_forward_pre_hook(lambda _n, args: seen.append(args[0])))
    try:
        reference(input_ids=token_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    yield from seen


@pytest.mark.parametrize("rows", [1, 3])
def test_all_blocks_in_a_row_equal_the_reference_model(
    runner: BlockRunner,
    weights: dict[str, torch.Tensor],
    reference: Qwen3_5TextModel,
    rows: int,
) -> None:
    token_ids = ids(rows)
    hidden = weights["embed_tokens.weight"][token_ids]
    for index in range(4):
        hidden = runner(index, of_block(weights, index), hidden)
    expected = reference(input_ids=token_ids, use_cache=False).last_hidden_state
    assert torch.allclose(reference.norm(hidden), expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 0.1


def test_every_single_block_equals_the_references(
    runner: BlockRunner, weights: dict[str, torch.Tensor], reference: Qwen3_5TextModel
) -> None:
    stages = list(block_inputs(reference, ids(2)))
    assert len(stages) == 5
    for index in range(4):
        output = runner(index, of_block(weights, index), stages[index])
        assert torch.allclose(output, stages[index + 1], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(output, stages[index], atol=0.1)


@pytest.mark.parametrize("index", [0, 3], ids=["linear attention", "full attention"])
def test_a_block_sees_no_later_token(
    runner: BlockRunner, weights: dict[str, torch.Tensor], index: int
) -> None:
    hidden = torch.randn(1, SEQLEN, 128, generator=torch.Generator().manual_seed(0))
    changed = hidden.clone()
    changed[:, 40:] += 1
    one, other = (runner(index, of_block(weights, index), h) for h in (hidden, changed))
    assert torch.allclose(one[:, :40], other[:, :40], atol=1e-5)
    assert not torch.allclose(one[:, 40:], other[:, 40:], atol=0.1)


def test_gradients_reach_the_weights(runner: BlockRunner, weights: dict[str, torch.Tensor]) -> None:
    trained = {n: w.clone().requires_grad_() for n, w in of_block(weights, 0).items()}
    hidden = torch.randn(2, SEQLEN, 128, generator=torch.Generator().manual_seed(0))
    runner(0, trained, hidden).square().mean().backward()
    for name, weight in trained.items():
        assert weight.grad is not None, name
        assert bool(weight.grad.abs().sum() > 0), name


def test_a_block_wants_all_of_its_weights(
    runner: BlockRunner, weights: dict[str, torch.Tensor]
) -> None:
    some = of_block(weights, 0)
    del some["mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"up_proj"):
        runner(0, some, torch.zeros(1, SEQLEN, 128))


def test_inputs_of_linears_are_told_while_asked_for(
    runner: BlockRunner, weights: dict[str, torch.Tensor]
) -> None:
    block = of_block(weights, 3)
    told: dict[str, torch.Tensor] = {}
    names = [f"{m}.weight" for m in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
    names += ["mlp.gate_proj.weight", "mlp.down_proj.weight"]
    hidden = torch.randn(2, SEQLEN, 128, generator=torch.Generator().manual_seed(0))

    def note(name: str, expert: int, rows: torch.Tensor, tokens: torch.Tensor | None) -> None:
        assert (expert, tokens) == (0, None)
        assert name not in told
        told[name] = rows

    with runner.inputs_of(3, names, note):
        runner(3, block, hidden)
    assert set(told) == set(names)
    variance = hidden.square().mean(dim=-1, keepdim=True)
    normed = hidden * torch.rsqrt(variance + 1e-6) * (1 + block["input_layernorm.weight"])
    for name in names[:3]:
        assert torch.allclose(told[name], normed.flatten(0, 1), atol=1e-5)
    inner = told["mlp.gate_proj.weight"]
    gate, up = (inner @ block[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    assert torch.allclose(told["mlp.down_proj.weight"], silu(gate) * up, atol=1e-5)
    told.clear()
    runner(3, block, hidden)
    assert not told


def test_a_pass_to_the_last_input_tells_the_same_and_goes_no_further(
    runner: BlockRunner, weights: dict[str, torch.Tensor]
) -> None:
    block = of_block(weights, 3)
    hidden = torch.randn(2, SEQLEN, 128, generator=torch.Generator().manual_seed(0))
    names = ["self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight"]
    whole: dict[str, torch.Tensor] = {}
    partly: dict[str, torch.Tensor] = {}
    with runner.inputs_of(3, names, lambda name, _e, rows, _t: whole.update({name: rows})):
        runner(3, block, hidden)
    block["mlp.up_proj.weight"] = torch.zeros(1)  # would fail if it were run
    runner.run_to_inputs(
        3, block, hidden, names, lambda name, _e, rows, _t: partly.update({name: rows})
    )
    assert set(whole) == set(partly) == set(names)
    assert all(torch.equal(whole[name], partly[name]) for name in names)


def test_expected_shapes_are_those_of_the_checkpoint() -> None:
    for tiny in (Tiny(), Tiny(wrapper=False), Tiny(tied=True), Tiny(mtp=False)):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in tiny_tensors(tiny).items()
            if not name.startswith("model.visual.")
        }
        assert expected_shapes(architecture_of(tiny_config(tiny))) == shapes
