from __future__ import annotations

import math
from collections.abc import Callable

from nybble.report.quant_log import ModuleLog
from nybble.report.summary import (
    SectionSummary,
    block_seconds,
    error_measure,
    headline,
    summarize,
    worst_modules,
)

MakeRow = Callable[..., ModuleLog]


def test_a_section_in_numbers(make_row: MakeRow) -> None:
    rows = [
        make_row(module="a", output_error=0.001, sqnr_db=20.0, dead_channels=2, seconds=1.0),
        make_row(module="b", output_error=0.003, sqnr_db=17.0, damping_increases=3, bits=8),
        make_row(module="c", output_error=0.006, sqnr_db=math.inf, dead_channels=5),
    ]
    assert summarize(rows) == [
        SectionSummary(
            section="mlp",
            modules=3,
            bits=(4, 8),
            median_error=0.003,
            worst_error=0.006,
            error_ratio=0.375,
            median_sqnr_db=20.0,
            worst_sqnr_db=17.0,
            too_few_tokens=None,
            damping_increases=3,
            dead_channels=7,
            seconds=2.0,
        )
    ]


def test_what_was_not_measured_is_left_open(make_row: MakeRow) -> None:
    row = make_row(
        output_error=None,
        rtn_output_error=None,
        damping_increases=None,
        dead_channels=None,
        seconds=None,
    )
    (summary,) = summarize([row])
    assert summary.median_error is summary.worst_error is summary.error_ratio is None
    assert summary.damping_increases is summary.dead_channels is summary.seconds is None


def test_the_ratio_is_over_modules_that_have_one(make_row: MakeRow) -> None:
    rows = [
        make_row(module="a", output_error=0.9, rtn_output_error=None),
        make_row(module="b", output_error=0.002, rtn_output_error=0.004),
    ]
    (summary,) = summarize(rows)
    assert summary.error_ratio == 0.5
    assert summary.worst_error == 0.9


def test_only_experts_can_have_too_few_tokens(make_row: MakeRow) -> None:
    rows = [
        make_row(module="m.0.mlp.experts.0.up_proj", part="experts", too_few_tokens=True),
        make_row(module="m.0.mlp.experts.1.up_proj", part="experts"),
        make_row(module="m.0.mlp.shared_expert.up_proj"),
    ]
    assert [(s.section, s.too_few_tokens) for s in summarize(rows)] == [
        ("mlp", None),
        ("experts", 1),
    ]


def test_sections_are_in_the_order_of_a_model(make_row: MakeRow) -> None:
    rows = [
        make_row(module="lm_head", part="lm_head"),
        make_row(module="mtp.layers.0.mlp.up_proj", part="mtp"),
        make_row(module="x", part="vision"),
        make_row(module="y", part="audio"),
        make_row(module="a", part="attention"),
        make_row(module="m", part="mlp"),
        make_row(module="g", part="gdn"),
    ]
    found = [summary.section for summary in summarize(rows)]
    assert found == ["gdn", "attention", "mlp", "mtp", "lm_head", "audio", "vision"]


def test_the_worst_come_first(make_row: MakeRow) -> None:
    errors = {"a": 0.001, "b": 0.004, "c": 0.004, "d": 0.002}
    rows = [make_row(module=name, output_error=value) for name, value in errors.items()]
    unmeasured = make_row(module="e", output_error=None, sqnr_db=1.0)
    assert [row.module for row in worst_modules([unmeasured, *rows], 3)] == ["b", "c", "d"]


def test_without_errors_the_worst_is_the_noisiest(make_row: MakeRow) -> None:
    ratios = {"a": 20.0, "b": 12.0, "c": math.inf}
    rows = [make_row(module=n, output_error=None, sqnr_db=v) for n, v in ratios.items()]
    assert [row.module for row in worst_modules(rows, 10)] == ["b", "a", "c"]


def test_a_blocks_time_counts_once(make_row: MakeRow) -> None:
    rows = [
        make_row(module="a", block=0, block_seconds=2.0),
        make_row(module="b", block=0, block_seconds=2.0),
        make_row(module="c", block=1, block_seconds=0.5),
    ]
    assert block_seconds(rows) == 2.5


def test_the_headline_has_all_algorithms_and_bits(make_row: MakeRow) -> None:
    assert headline([make_row()]) == "gptq, INT4"
    mixed = [make_row(bits=8), make_row(algorithm="rtn"), make_row(bits=4)]
    assert headline(mixed) == "gptq + rtn, INT4 + INT8"


def test_the_measure_follows_the_algorithm(make_row: MakeRow) -> None:
    gptq, signround = make_row(), make_row(algorithm="signround")
    unmeasured = make_row(algorithm="rtn", output_error=None)
    assert error_measure([gptq, unmeasured]) == "by the inputs' second moments"
    assert error_measure([signround]) == "as if inputs were uncorrelated"
    assert error_measure([gptq, signround]).startswith("gptq: by the inputs' second moments; else")
