from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from nybble.report.quant_log import ModuleLog

ROW = ModuleLog(
    module="model.layers.0.mlp.up_proj",
    block=0,
    part="mlp",
    bits=4,
    algorithm="gptq",
    tokens=4096,
    rtn_output_error=0.008,
    output_error=0.002,
    sqnr_db=18.0,
    damping_increases=0,
    dead_channels=0,
    too_few_tokens=False,
    seconds=0.5,
    block_seconds=3.0,
)


@pytest.fixture
def make_row() -> Callable[..., ModuleLog]:
    """A sound row with some fields changed."""

    def make(**changes: object) -> ModuleLog:
        return dataclasses.replace(ROW, **changes)

    return make
