from __future__ import annotations

from pathlib import Path

import pytest

from nybble.pipeline.events import Step
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import Algorithm, Calibration, Gptq, Recipe, Rtn, Scheme, SignRound


def test_the_share_done_runs_from_the_first_step_to_one() -> None:
    assert Step(0, 4, 1, 10, None).share_done == pytest.approx(0.025)
    assert Step(1, 4, 10, 10, None).share_done == pytest.approx(0.5)
    assert Step(3, 4, 10, 10, 0.1).share_done == 1


def test_training_tells_every_step_in_order(
    tiny_base: Path, signround_recipe: Recipe, tmp_path: Path
) -> None:
    events: list[Step] = []
    quantize(tiny_base, tmp_path / "out", signround_recipe, "cpu", events.append)
    shares = [event.share_done for event in events]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert all(event.loss is not None and event.loss > 0 for event in events)
    for block in range(4):
        steps = {event.step for event in events if event.block == block}
        assert steps == set(range(1, 13))


@pytest.mark.parametrize("algorithm", [Rtn(), Gptq(), SignRound(iters=0)], ids=str)
def test_the_mtp_layer_counts_as_a_block(
    tiny_base: Path, calibration: Calibration, tmp_path: Path, algorithm: Algorithm
) -> None:
    events: list[Step] = []
    scheme = Scheme(mtp_bits=8, lm_head_bits=8)
    recipe = Recipe(scheme=scheme, algorithm=algorithm, calibration=calibration)
    quantize(tiny_base, tmp_path / "out", recipe, "cpu", events.append)
    assert [(event.block, event.num_blocks) for event in events] == [(n, 5) for n in range(5)]
    assert events[-1].share_done == 1


def test_rounding_tells_every_block(tiny_base: Path, rtn_recipe: Recipe, tmp_path: Path) -> None:
    events: list[Step] = []
    quantize(tiny_base, tmp_path / "out", rtn_recipe, "cpu", events.append)
    assert [(event.block, event.share_done) for event in events] == [
        (0, 0.25),
        (1, 0.5),
        (2, 0.75),
        (3, 1.0),
    ]
