from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import Tiny, read_json, read_weights, write_json, write_weights

from nybble.arch.plan import TensorPlan
from nybble.checkpoint.reader import CheckpointReader
from nybble.core.errors import CheckpointError
from nybble.pipeline.quantize import planned
from nybble.pipeline.verify import verify_result
from nybble.recipe.schema import Recipe

Tensors = dict[str, torch.Tensor]
PREFIX = Tiny().prefix


@pytest.fixture
def base(tiny_base: Path, rtn_recipe: Recipe) -> Iterator[tuple[CheckpointReader, TensorPlan]]:
    with CheckpointReader(tiny_base) as reader:
        yield reader, planned(reader, rtn_recipe)[1]


@pytest.fixture
def copied(rtn_result: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rtn_result, tmp_path / "copy"))


def doctor(folder: Path, change: Callable[[Tensors], object]) -> None:
    weights = read_weights(folder)
    change(weights)
    write_weights(folder, weights)


def refused(folder: Path, base: tuple[CheckpointReader, TensorPlan]) -> str:
    with pytest.raises(CheckpointError) as caught:
        verify_result(folder, *base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("result", ["signround_result", "rtn_result", "importance_result"])
def test_a_sound_result_passes(
    base: tuple[CheckpointReader, TensorPlan], request: pytest.FixtureRequest, result: str
) -> None:
    verify_result(request.getfixturevalue(result), *base)


@pytest.mark.parametrize(
    "name",
    [
        "mtp.fc.weight",
        "mtp.layers.0.mlp.down_proj.weight",
        "model.visual.blocks.0.attn.qkv.weight",
        "lm_head.weight",
        f"{PREFIX}embed_tokens.weight",
        f"{PREFIX}layers.2.linear_attn.A_log",
        f"{PREFIX}layers.3.self_attn.q_norm.weight",
    ],
)
@pytest.mark.parametrize("place", [0, -1], ids=["first byte", "last byte"])
def test_one_flipped_bit_of_a_kept_tensor_is_found(
    base: tuple[CheckpointReader, TensorPlan], copied: Path, name: str, place: int
) -> None:
    def flip(tensors: Tensors) -> None:
        tensors[name].view(-1).view(torch.uint8)[place] ^= 1

    doctor(copied, flip)
    assert name in refused(copied, base)


@pytest.mark.parametrize(
    "name",
    [
        "mtp.norm.weight",
        "model.visual.blocks.0.attn.qkv.weight",
        "lm_head.weight",
        f"{PREFIX}layers.0.linear_attn.conv1d.weight",
        f"{PREFIX}layers.0.mlp.up_proj.scales",
    ],
)
def test_a_removed_tensor_is_found(
    base: tuple[CheckpointReader, TensorPlan], copied: Path, name: str
) -> None:
    doctor(copied, lambda tensors: tensors.pop(name))
    assert name in refused(copied, base)


@pytest.mark.parametrize("name", ["mtp.fc.weight", "model.visual.pos_embed.weight"])
def test_another_type_of_a_kept_tensor_is_found(
    base: tuple[CheckpointReader, TensorPlan], copied: Path, name: str
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].view(torch.float16)

    doctor(copied, change)
    assert name in refused(copied, base)


def test_a_weight_left_dense_against_the_plan_is_found(
    base: tuple[CheckpointReader, TensorPlan], copied: Path, tiny_base: Path
) -> None:
    module = f"{PREFIX}layers.1.mlp.up_proj"

    def change(tensors: Tensors) -> None:
        for suffix in ("qweight", "qzeros", "scales"):
            del tensors[f"{module}.{suffix}"]
        tensors[f"{module}.weight"] = read_weights(tiny_base)[f"{module}.weight"]

    doctor(copied, change)
    config = read_json(copied / "config.json")
    config["quantization_config"]["extra_config"][module] = {"bits": 16, "data_type": "fp"}
    write_json(copied / "config.json", config)
    assert f"{module}.weight is stored otherwise than planned" in refused(copied, base)


def test_a_head_that_the_config_disowns_is_found(
    base: tuple[CheckpointReader, TensorPlan], copied: Path
) -> None:
    """Without mtp_num_hidden_layers engines would not load it; the tensors alone do not help."""
    config = read_json(copied / "config.json")
    config["text_config"]["mtp_num_hidden_layers"] = 0
    write_json(copied / "config.json", config)
    assert "mtp" in refused(copied, base)
