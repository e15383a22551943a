"""What each engine makes of a declaration, module by module."""

from __future__ import annotations

import pytest
from support.doctor_cases import (
    FORMATS,
    MODEL,
    block_of,
    is_quantized,
    snapshot_of,
    sound_headers,
    tiny_layout,
)

from nybble.doctor.engines import ENGINES, Engine, Family
from nybble.doctor.findings import Part
from nybble.doctor.layout.modules import modules
from nybble.doctor.layout.spec import Kind
from nybble.doctor.resolve.built import DENSE, Scheme
from nybble.doctor.resolve.patterns import Patterns
from nybble.doctor.simulate import Simulation, simulate


def simulated(form: str, block: object, engine: Engine) -> Simulation:
    snapshot = snapshot_of({MODEL: sound_headers(form)}, block)
    return simulate(
        snapshot, tiny_layout(), block if isinstance(block, dict) else None, engine, Patterns()
    )


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.id)
@pytest.mark.parametrize("form", FORMATS)
def test_a_sound_declaration_builds_what_is_stored(form: str, engine: Engine) -> None:
    simulation = simulated(form, block_of(form), engine)
    assert simulation.refusal is None
    for module, built in simulation.built:
        assert isinstance(built, Scheme), module
        for linear in module.members:
            assert (built != DENSE) == is_quantized(linear.name), module


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.id)
def test_without_a_block_everything_is_dense_and_in_building_order(engine: Engine) -> None:
    simulation = simulated("gptq", None, engine)
    assert [module for module, _ in simulation.built] == list(modules(tiny_layout(), engine))
    assert {built for _, built in simulation.built} == {DENSE}
    has_head = any(module.part is Part.MTP for module, _ in simulation.built)
    assert has_head == (engine.family is not Family.TRANSFORMERS)


def test_plain_modules_are_dense_whatever_the_declaration_says() -> None:
    block = block_of("auto_round")
    del block["extra_config"], block["block_name_to_quantize"]
    engine = next(engine for engine in ENGINES if engine.family is Family.SGLANG)
    simulation = simulated("auto_round", block, engine)
    plain = {module.name: built for module, built in simulation.built if module.kind is Kind.PLAIN}
    assert plain["mtp.fc"] == DENSE
    assert set(plain.values()) == {DENSE}
    others = [built for module, built in simulation.built if module.name.startswith("mtp.layers")]
    assert DENSE not in others


def test_a_refused_declaration_builds_nothing() -> None:
    block = block_of("gptq")
    del block["bits"]
    simulation = simulated("gptq", block, ENGINES[4])
    assert simulation.refusal is not None
    assert simulation.built == ()
