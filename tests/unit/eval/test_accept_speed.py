from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.checkpoints import MTP_SHAPES, read_weights
from support.moe_checkpoints import EXPERTS, PER_TOKEN, Form, Moe, moe_tensors, write_moe

from nybble.engine.weights import ModelWeights
from nybble.eval.speed import draft_cost, speed_up


def nbytes(tensors: Mapping[str, torch.Tensor], *parts: str) -> int:
    return sum(tensor.nbytes for name, tensor in tensors.items() if any(p in name for p in parts))


def cost_of(folder: Path) -> float:
    with ModelWeights(folder) as weights:
        return draft_cost(weights)


def test_the_expected_speed_up() -> None:
    found = speed_up([0.8, 0.6, 0.2], 0.1)
    assert found.draft_cost == 0.1
    assert found.expected == pytest.approx((1.8 / 1.1, 2.4 / 1.2, 2.6 / 1.3))
    assert found.best_drafts == 2  # of two that are equally fast, the one with fewer drafts


def test_a_head_may_not_be_worth_its_cost() -> None:
    found = speed_up([0.1, 0.05], 0.2)
    assert max(found.expected) < 1
    assert found.best_drafts == 0


def test_drafts_that_cost_nothing_are_worth_their_tokens() -> None:
    found = speed_up([1.0, 1.0, 1.0, 0.5], 0.0)
    assert found.expected == (2.0, 3.0, 4.0, 4.5)
    assert found.best_drafts == 4


def test_the_cost_is_of_stored_bytes(tiny_base: Path) -> None:
    tensors = read_weights(tiny_base)
    mtp = sum(2 * torch.Size(shape).numel() for shape in MTP_SHAPES.values())
    head = tensors["lm_head.weight"].nbytes
    blocks = nbytes(tensors, "language_model.layers.")
    assert cost_of(tiny_base) == pytest.approx((mtp + head) / (blocks + head))


def test_a_quantized_trunk_makes_drafts_dearer(tiny_base: Path, rtn_result: Path) -> None:
    tensors = read_weights(rtn_result)
    head = nbytes(tensors, "lm_head.")
    mtp, blocks = nbytes(tensors, "mtp."), nbytes(tensors, "language_model.layers.")
    assert cost_of(rtn_result) == pytest.approx((mtp + head) / (blocks + head))
    assert cost_of(rtn_result) > 1.5 * cost_of(tiny_base)


@pytest.mark.parametrize("form", ["stacks", "one by one"])
def test_of_experts_a_token_reads_its_own(form: Form, tmp_path: Path) -> None:
    moe = Moe(form=form, mtp=form)
    tensors = moe_tensors(moe)
    head = nbytes(tensors, "lm_head.")

    def per_token(part: str) -> float:
        inside = {name: tensor for name, tensor in tensors.items() if part in name}
        routed = nbytes(inside, ".mlp.experts.")
        return nbytes(inside, "") - routed * (1 - PER_TOKEN / EXPERTS)

    expected = (per_token("mtp.") + head) / (per_token("language_model.layers.") + head)
    assert cost_of(write_moe(tmp_path / "moe", moe)) == pytest.approx(expected)
