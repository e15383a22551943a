from __future__ import annotations

import pytest
import torch

from nybble.core.errors import RecipeError
from nybble.engine.device import compute_dtype, resolve_device


def test_the_cpu_computes_in_float32_and_others_in_bfloat16() -> None:
    assert compute_dtype(resolve_device("cpu")) == torch.float32
    assert compute_dtype(torch.device("cuda")) == torch.bfloat16


def test_auto_is_what_there_is() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["", "gpu", "cpu:x", "fpga", "xla", "meta", "hpu"])
def test_a_device_that_is_not_there_is_refused_in_a_short_line(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_device(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.parametrize("name", ["cuda", "cuda:7"])
def test_cuda_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(RecipeError, match=name):
        resolve_device(name)
