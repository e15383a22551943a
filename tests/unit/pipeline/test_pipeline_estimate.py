from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import Tiny, read_weights
from support.commands import snapshot

from nybble.core.errors import CheckpointError
from nybble.pipeline.estimate import estimate, inspect_checkpoint
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import Calibration, Gptq, Override, Recipe, Rtn, Scheme, SignRound


def total(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in read_weights(folder).values())


def test_sizes_are_those_of_the_real_result(
    tiny_base: Path, signround_recipe: Recipe, signround_result: Path
) -> None:
    before = snapshot(tiny_base)
    needs = estimate(tiny_base, signround_recipe, "cpu")
    assert needs.base_bytes == total(tiny_base)
    assert needs.output_bytes == total(signround_result)
    assert needs.stream_bytes == 2 * 8 * 32 * 128 * 4
    assert snapshot(tiny_base) == before


def test_a_trained_block_needs_more_than_its_weights(
    tiny_base: Path, signround_recipe: Recipe, rtn_recipe: Recipe
) -> None:
    weights = read_weights(tiny_base)
    largest = max(
        sum(t.nbytes for n, t in weights.items() if n.startswith(f"{Tiny().prefix}layers.{block}."))
        for block in range(4)
    )
    trained, rounded = (
        estimate(tiny_base, recipe, "cpu") for recipe in (signround_recipe, rtn_recipe)
    )
    assert trained.block_bytes > 4 * largest
    assert largest < rounded.block_bytes < trained.block_bytes
    assert rounded.stream_bytes == 0


def test_time_grows_with_the_iterations(tiny_base: Path, signround_recipe: Recipe) -> None:
    algorithm = signround_recipe.algorithm.model_copy(update={"iters": 5000})
    longer = signround_recipe.model_copy(update={"algorithm": algorithm})
    few, many = (estimate(tiny_base, r, "cpu").seconds for r in (signround_recipe, longer))
    assert few >= 0
    assert many > 10 * few


def test_nothing_of_the_weights_is_read_to_inspect(tiny_base: Path, rtn_recipe: Recipe) -> None:
    arch, plan = inspect_checkpoint(tiny_base, rtn_recipe)
    assert arch.name == "qwen3_5"
    assert set(plan.fates) == set(read_weights(tiny_base))


def test_a_quantized_checkpoint_is_no_base(rtn_result: Path, rtn_recipe: Recipe) -> None:
    with pytest.raises(CheckpointError, match="quantized already"):
        inspect_checkpoint(rtn_result, rtn_recipe)


def test_smaller_groups_make_a_larger_result(tiny_base: Path, rtn_recipe: Recipe) -> None:
    finer = rtn_recipe.model_copy(update={"scheme": Scheme(group_size=32)})
    sizes = [estimate(tiny_base, recipe, "cpu").output_bytes for recipe in (rtn_recipe, finer)]
    assert sizes[0] < sizes[1]


def test_sizes_are_those_of_the_format(tiny_base: Path, tmp_path: Path) -> None:
    scheme = Scheme(bits=3, mtp_bits=8, lm_head_bits=4)
    recipe = Recipe(scheme=scheme, algorithm=Rtn(), format="compressed-tensors")
    out = quantize(tiny_base, tmp_path / "out", recipe, "cpu").out
    assert estimate(tiny_base, recipe, "cpu").output_bytes == total(out)


@pytest.mark.parametrize("algorithm", [Rtn(), Gptq(), SignRound(iters=2, batch_size=2)], ids=str)
def test_blocks_that_are_kept_need_a_pass_alone(
    tiny_base: Path, calibration: Calibration, algorithm: Rtn | Gptq | SignRound
) -> None:
    keep = Override(match=r"layers\.[012]\.", keep=True)
    some, whole = (
        estimate(
            tiny_base,
            Recipe(scheme=scheme, algorithm=algorithm, calibration=calibration),
            "cpu",
        )
        for scheme in (Scheme(overrides=(keep,)), Scheme())
    )
    assert 0 < some.block_bytes <= whole.block_bytes
    assert some.output_bytes > whole.output_bytes
    assert some.seconds >= 0


def test_gptq_holds_one_stream_and_the_moments_of_a_block(
    tiny_base: Path, calibration: Calibration
) -> None:
    needs = estimate(tiny_base, Recipe(algorithm=Gptq(), calibration=calibration), "cpu")
    assert needs.stream_bytes == 8 * 32 * 128 * 4
    assert needs.block_bytes > 4 * (128**2 + 4 * 256**2)
