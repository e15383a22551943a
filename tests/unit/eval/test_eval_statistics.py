from __future__ import annotations

import math

import pytest
import torch
from support.outputs import scored

from nybble.eval.kld import Scores
from nybble.eval.statistics import Worst, noise_floor, statistics


def scores_of(kld: list[float], windows: int = 1, **others: list[float] | list[int]) -> Scores:
    """Scores with these divergences; everything else is as plain as can be, if not given."""
    count = len(kld)
    given = {
        "tokens": [0] * count,
        "base_top": [0] * count,
        "candidate_top": [0] * count,
        "base_log_probs": [0.0] * count,
        "candidate_log_probs": [0.0] * count,
        "base_confidence": [0.5] * count,
        **others,
    }
    tensors = {
        name: torch.tensor(values, dtype=torch.float64 if values[0].__class__ is float else None)
        for name, values in given.items()
    }
    return Scores(kld=torch.tensor(kld, dtype=torch.float64), num_windows=windows, **tensors)


def test_one_window_has_no_standard_error() -> None:
    found = statistics(scores_of([1.0, 2.0, 6.0]))
    assert (found.kld.mean, found.positions, found.windows) == (3.0, 3, 1)
    assert math.isnan(found.kld.standard_error)
    assert math.isnan(found.same_top.standard_error)
    assert math.isnan(found.log_perplexity_ratio.standard_error)


def test_the_standard_error_is_of_the_windows() -> None:
    """Means 1 and 3: standard deviation sqrt(2), over sqrt(2) windows."""
    found = statistics(scores_of([0.0, 2.0, 3.0, 3.0], windows=2))
    assert (found.kld.mean, found.kld.standard_error) == (2.0, pytest.approx(1.0, abs=1e-15))


def test_equal_windows_leave_no_error() -> None:
    assert statistics(scores_of([1.0, 5.0] * 3, windows=3)).kld.standard_error == 0


def test_quantiles_lie_between_positions() -> None:
    order = torch.randperm(101, generator=torch.Generator().manual_seed(0)).double()
    found = statistics(scores_of(order.tolist()))
    expected = {"median": 50, "p90": 90, "p95": 95, "p99": 99, "p99_9": 99.9}
    assert found.quantiles == pytest.approx(expected, abs=1e-9)
    assert found.max == 100


def test_agreement_is_of_the_likeliest_tokens() -> None:
    found = statistics(scores_of([0.0] * 4, base_top=[3, 1, 2, 0], candidate_top=[3, 1, 0, 0]))
    assert found.same_top.mean == 0.75


def test_changes_of_probability_and_perplexities() -> None:
    logs = {"base": [0.5, 0.25], "candidate": [0.25, 0.5]}
    given = {f"{name}_log_probs": [math.log(p) for p in ps] for name, ps in logs.items()}
    found = statistics(scores_of([0.0, 0.0], **given))
    assert found.mean_delta_p == pytest.approx(0, abs=1e-15)
    assert found.rms_delta_p == pytest.approx(0.25)
    assert found.base_perplexity == pytest.approx(8**0.5)
    assert found.log_perplexity_ratio.mean == pytest.approx(0, abs=1e-15)
    worse = statistics(scores_of([0.0], base_log_probs=[-1.0], candidate_log_probs=[-1.5]))
    assert worse.log_perplexity_ratio.mean == pytest.approx(0.5)
    assert worse.candidate_perplexity / worse.base_perplexity == pytest.approx(math.exp(0.5))


def test_buckets_hold_their_lower_edge_and_the_last_one_certainty() -> None:
    confidence = [0.0, 0.25, 0.49, 0.5, 0.75, 0.95, 1.0, 0.94]
    found = statistics(
        scores_of([1.0, 2, 4, 8, 16, 32, 64, 128], base_confidence=confidence, base_top=[1] * 8)
    ).buckets
    assert [(b.low, b.high) for b in found] == [
        (0, 0.25),
        (0.25, 0.5),
        (0.5, 0.75),
        (0.75, 0.95),
        (0.95, 1),
    ]
    assert [b.positions for b in found] == [1, 2, 1, 2, 2]
    assert [b.mean_kld for b in found] == [1, 3, 8, 72, 48]
    assert {b.same_top for b in found} == {0}


def test_an_empty_bucket_has_no_mean() -> None:
    first = statistics(scores_of([1.0])).buckets[0]
    assert first.positions == 0
    assert math.isnan(first.mean_kld)
    assert math.isnan(first.same_top)


def test_the_worst_positions_are_found_in_their_windows() -> None:
    kld = [0.0] * 30
    kld[7], kld[29] = 3.0, 9.0
    marks = list(range(30))
    found = statistics(
        scores_of(kld, windows=3, tokens=marks, base_top=marks[::-1], candidate_top=marks)
    ).worst
    assert len(found) == 20
    assert found[0] == Worst(window=2, position=9, kld=9.0, token=29, base_top=0, candidate_top=29)
    assert (found[1].window, found[1].position, found[1].kld) == (0, 7, 3.0)
    assert {one.kld for one in found[2:]} == {0}


def test_there_are_no_more_worst_positions_than_positions() -> None:
    assert len(statistics(scores_of([0.1, 0.2])).worst) == 2


def test_the_noise_floor() -> None:
    kld = [float(value) for value in range(101)]
    floor = noise_floor(
        "row by row", scores_of(kld, base_top=[1] * 101, candidate_top=[1] * 100 + [0])
    )
    assert floor.how == "row by row"
    assert (floor.mean, floor.median) == (50, 50)
    assert floor.p99 == pytest.approx(99)
    assert floor.same_top == pytest.approx(100 / 101)


def test_the_floors_median_is_the_figures_median() -> None:
    """Also of an even number of positions: both are compared with each other."""
    scores = scores_of([0.0, 1.0])
    assert noise_floor("row by row", scores).median == statistics(scores).quantiles["median"]


@pytest.mark.parametrize("size", [2, 7, 64])
def test_perplexity_of_a_uniform_model_is_its_vocabulary(size: int) -> None:
    logits = torch.full((12, size), -3.0)
    found = statistics(scored(logits, logits, [1] * 12, windows=3))
    assert found.base_perplexity == pytest.approx(size, rel=1e-12)
    assert found.candidate_perplexity == pytest.approx(size, rel=1e-12)
    assert (found.kld.mean, found.quantiles["p99"], found.max) == (0, 0, 0)
