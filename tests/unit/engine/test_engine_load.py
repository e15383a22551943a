from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    MTP_SHAPES,
    VOCAB,
    Tiny,
    quantized_modules,
    read_json,
    read_weights,
    tiny_tensors,
    write_json,
    write_weights,
)
from support.packed import dense
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
)

from nybble.core.errors import CheckpointError
from nybble.engine.generate import generate_greedy
from nybble.engine.load import load_model

Make = Callable[..., Path]


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def reference(tiny_base: Path) -> Qwen3_5ForConditionalGeneration:
    model = Qwen3_5ForConditionalGeneration.from_pretrained(tiny_base, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def test_logits_of_the_base_equal_transformers(
    tiny_base: Path, reference: Qwen3_5ForConditionalGeneration
) -> None:
    model = load_model(tiny_base)
    token_ids = ids(2, 70)
    with torch.no_grad():
        expected = reference(input_ids=token_ids).logits
    logits = model.logits(model.hidden(token_ids))
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.1


def test_logits_of_the_text_only_form_equal_transformers(make_tiny: Make) -> None:
    folder = make_tiny(wrapper=False, shards=3)
    reference = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_ids = ids(1, 20)
    with torch.no_grad():
        expected = reference(input_ids=token_ids).logits
    model = load_model(folder)
    assert torch.allclose(model.logits(model.hidden(token_ids)), expected, rtol=1e-4, atol=1e-4)


def test_greedy_text_equals_transformers(
    tiny_base: Path, reference: Qwen3_5ForConditionalGeneration
) -> None:
    prompts = ids(3, 11, seed=5)
    expected = reference.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=20,
        pad_token_id=0,
    )
    tokens = generate_greedy(load_model(tiny_base), prompts, num_new=20)
    assert tokens.tolist() == expected.tolist()
    assert tokens.shape == (3, 31)


def test_greedy_text_equals_one_pass_without_a_cache(tiny_base: Path) -> None:
    model = load_model(tiny_base)
    tokens = generate_greedy(model, ids(2, 8, seed=6), num_new=12)
    repeated = model.logits(model.hidden(tokens)).argmax(dim=-1)
    assert tokens[:, 8:].tolist() == repeated[:, 7:-1].tolist()


def test_greedy_text_ends_once_every_row_has_stopped(tiny_base: Path) -> None:
    model, prompts = load_model(tiny_base), ids(2, 8, seed=6)
    free = generate_greedy(model, prompts, num_new=20)
    first, second = free[0, 8:].tolist(), free[1, 8:].tolist()
    stops = frozenset({first[2], second[5]})
    ends = [next(i for i, token in enumerate(row) if token in stops) for row in (first, second)]
    stopped = generate_greedy(model, prompts, num_new=20, stop_ids=stops)
    assert stopped.shape[1] == 8 + max(ends) + 1
    assert stopped.tolist() == free[:, : stopped.shape[1]].tolist()


def test_a_tied_head_is_the_embedding(make_tiny: Make) -> None:
    model = load_model(make_tiny(tied=True))
    assert model.lm_head is not None
    assert torch.equal(model.lm_head, model.trunk.embed_tokens.weight)


def test_a_base_without_an_mtp_head_loads_without_one(make_tiny: Make) -> None:
    assert load_model(make_tiny(mtp=False)).mtp is None


def test_the_dtype_is_as_asked_for(tiny_base: Path) -> None:
    model = load_model(tiny_base, dtype=torch.bfloat16)
    assert {p.dtype for p in model.trunk.parameters()} == {torch.bfloat16}
    assert model.lm_head.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.trunk.parameters())


def test_a_quantized_checkpoint_holds_what_its_codes_stand_for(rtn_result: Path) -> None:
    model, stored = load_model(rtn_result), read_weights(rtn_result)
    state = model.trunk.state_dict()
    for module in quantized_modules(Tiny().prefix):
        name = module.removeprefix(Tiny().prefix) + ".weight"
        assert torch.equal(state[name], dense(stored, module)), module


def test_a_quantized_checkpoint_keeps_the_rest(rtn_result: Path) -> None:
    model, base = load_model(rtn_result), tiny_tensors(Tiny())
    assert torch.equal(model.lm_head, base["lm_head.weight"].float())
    assert model.mtp is not None
    found = {f"mtp.{name}": tensor for name, tensor in model.mtp.state_dict().items()}
    assert set(found) == set(MTP_SHAPES)
    assert all(torch.equal(found[name], base[name].float()) for name in MTP_SHAPES)


def test_a_quantized_checkpoint_computes_with_its_dense_twin(
    rtn_result: Path, reference: Qwen3_5ForConditionalGeneration, make_tiny: Make
) -> None:
    twin, stored = make_tiny("twin"), read_weights(rtn_result)
    weights = tiny_tensors(Tiny())
    for module in quantized_modules(Tiny().prefix):
        weights[f"{module}.weight"] = dense(stored, module)
    write_weights(twin, weights)
    token_ids = ids(1, 30)
    one, other = (m.logits(m.hidden(token_ids)) for m in (load_model(rtn_result), load_model(twin)))
    assert torch.equal(one, other)
    with torch.no_grad():
        assert not torch.allclose(one, reference(input_ids=token_ids).logits, atol=1e-2)


def test_zero_points_of_another_convention_are_refused(rtn_result: Path, tmp_path: Path) -> None:
    weights = read_weights(rtn_result)
    name = f"{Tiny().prefix}layers.0.mlp.up_proj.qzeros"
    weights[name] = weights[name] + 1
    write_weights(tmp_path, weights)
    write_json(tmp_path / "config.json", read_json(rtn_result / "config.json"))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.qzeros"):
        load_model(tmp_path)
