"""Declarations with any JSON anywhere end in an answer, and soon."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.declarations import IN_BLOCK, TRUNK, awq, context, gptq, inc, wrapper_layout

from nybble.doctor.engines import ENGINES
from nybble.doctor.layout.modules import modules
from nybble.doctor.resolve.auto_round import AUTO_ROUND
from nybble.doctor.resolve.awq import AWQ
from nybble.doctor.resolve.built import NotAnalysed, Refusal, Scheme
from nybble.doctor.resolve.gptq import GPTQ
from nybble.doctor.resolve.method import Method
from nybble.doctor.resolve.patterns import Patterns

LAYOUT = wrapper_layout()
KEYS = (
    *("quant_method", "bits", "group_size", "sym", "packing_format", "data_type", "backend"),
    *("block_name_to_quantize", "to_quant_block_names", "extra_config", "dynamic", "desc_act"),
    *("modules_in_block_to_quantize", "modules_to_not_convert", "lm_head", "zero_point", "version"),
    *("checkpoint_format", "damp_percent", "act_bits", "quant_block_list", "static_groups"),
)
NAMES = st.sampled_from(
    (TRUNK, f"{TRUNK}.0.mlp.down_proj", "mtp", ".*", "-:.*mtp", "+:.*", "(", "(a|a)*$", "lm_head")
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 130) | st.floats() | NAMES | st.text(max_size=6)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            NAMES | st.sampled_from(["bits", "group_size", "sym"]) | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
METHODS = (
    (AUTO_ROUND, inc(block_name_to_quantize=TRUNK)),
    (GPTQ, gptq(modules_in_block_to_quantize=IN_BLOCK)),
    (AWQ, awq(modules_to_not_convert=["mtp"])),
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(METHODS),
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4),
    st.sampled_from(ENGINES),
)
def test_any_json_anywhere_has_an_answer(
    start: tuple[Method, dict[str, Any]], changes: dict[str, Any], engine: Any
) -> None:
    method, block = start
    found = context({**block, **changes}, engine, layout=LAYOUT)
    refusal = method.refusal(found)
    assert refusal is None or (refusal.exception and len(refusal.message) <= 300)
    for module in modules(LAYOUT, engine):
        built = method.resolve(found, module)
        assert isinstance(built, Scheme | Refusal | NotAnalysed)


@pytest.mark.parametrize("engine", ENGINES[-3:], ids=lambda engine: engine.id)
def test_endless_rules_have_an_end(engine: Any) -> None:
    many = {f"{TRUNK}.{n}.mlp.down_proj": {"bits": 4} for n in range(20_000)}
    blocks = (
        (AUTO_ROUND, inc(extra_config={f"(a|a.)*{n}$": {"bits": 16} for n in range(3000)})),
        (AUTO_ROUND, inc(extra_config=many, block_name_to_quantize=list(many))),
        (GPTQ, gptq(dynamic={f"-:(.|.*)*{n}!": {} for n in range(3000)})),
        (GPTQ, gptq(modules_in_block_to_quantize=[list(many)])),
        (AWQ, awq(modules_to_not_convert=list(many))),
    )
    start = perf_counter()
    for method, block in blocks:
        found = replace(context(block, engine, layout=LAYOUT), patterns=Patterns(seconds=0.2))
        for module in modules(LAYOUT, engine):
            method.resolve(found, module)
    assert perf_counter() - start < 20
