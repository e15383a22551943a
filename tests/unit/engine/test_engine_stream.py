from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import VOCAB
from support.dense_checkpoints import WINDOW, Dense, write_dense
from support.moe_checkpoints import Moe, write_moe

from nybble.engine.load import load_model
from nybble.engine.stream import Arithmetic, final_states
from nybble.engine.weights import ModelWeights

CPU = torch.device("cpu")
SEQLEN = 70  # longer than a chunk of transformers' Gated DeltaNet (64)


def ids(rows: int = 5, length: int = SEQLEN) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def streamed(folder: Path, token_ids: torch.Tensor, how: Arithmetic) -> torch.Tensor:
    with ModelWeights(folder) as weights:
        return final_states(weights, token_ids, how)


def check_against_resident(folder: Path, token_ids: torch.Tensor) -> None:
    expected = load_model(folder).hidden(token_ids)
    found = streamed(folder, token_ids, Arithmetic(CPU, rows_per_pass=len(token_ids)))
    assert float(expected.std()) > 0.1
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_base_streamed_is_the_base_in_memory(tiny_base: Path) -> None:
    check_against_resident(tiny_base, ids())


def test_a_quantized_checkpoint_streamed_is_itself_in_memory(rtn_result: Path) -> None:
    check_against_resident(rtn_result, ids())


@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_dense_families(name: str, tmp_path: Path) -> None:
    """Gemma 3 scales its embeddings and has sliding windows."""
    check_against_resident(write_dense(tmp_path / "base", Dense(name)), ids(2, 3 * WINDOW))


@pytest.mark.parametrize("form", ["stacks", "one by one"])
def test_experts(form: str, tmp_path: Path) -> None:
    check_against_resident(write_moe(tmp_path / "base", Moe(form=form)), ids(2))


def test_a_tied_text_only_form(make_tiny: Callable[..., Path]) -> None:
    check_against_resident(make_tiny(wrapper=False, tied=True, mtp=False), ids(2))


@pytest.mark.parametrize("rows_per_pass", [1, 2, 4, 100])
def test_how_many_rows_pass_at_once_changes_nothing_but_rounding(
    tiny_base: Path, rows_per_pass: int
) -> None:
    whole = streamed(tiny_base, ids(), Arithmetic(CPU, rows_per_pass=5))
    found = streamed(tiny_base, ids(), Arithmetic(CPU, rows_per_pass=rows_per_pass))
    assert torch.allclose(found, whole, rtol=0, atol=1e-5)


def test_the_type_is_that_of_the_arithmetic(tiny_base: Path) -> None:
    exact = streamed(tiny_base, ids(), Arithmetic(CPU))
    found = streamed(tiny_base, ids(), Arithmetic(CPU, torch.bfloat16))
    assert (exact.dtype, found.dtype) == (torch.float32, torch.bfloat16)
    error = (found - exact).square().mean().sqrt() / exact.std()
    assert 1e-3 < float(error) < 0.1


def test_two_runs_are_equal_bit_for_bit(tiny_base: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        one, other = (streamed(tiny_base, ids(), Arithmetic(CPU, dtype)) for _ in range(2))
        assert torch.equal(one, other)


def test_each_block_is_told_of_once(tiny_base: Path) -> None:
    seen = []
    with ModelWeights(tiny_base) as weights:
        final_states(
            weights, ids(3), Arithmetic(CPU, rows_per_pass=1), lambda *step: seen.append(step)
        )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_how_it_is_called() -> None:
    assert str(Arithmetic(CPU)) == "float32 on cpu"
    assert str(Arithmetic(torch.device("cuda:1"), torch.bfloat16)) == "bfloat16 on cuda"
