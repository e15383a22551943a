"""Linears that are served only under conditions, and the shapes that kernels take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.doctor_cases import (
    BLOCKS,
    FORMATS,
    block_of,
    case_of,
    dense_headers,
    findings,
    outcomes,
    pack,
    sound_headers,
)

from nybble.doctor.checks import tensors
from nybble.doctor.engines import ENGINES, Family
from nybble.doctor.findings import Harm, Part, Severity
from nybble.doctor.layout.spec import Kind, Linear, Module
from nybble.doctor.resolve.built import Scheme, Storage
from nybble.doctor.simulate import Simulation

VLLM = [engine.id for engine in ENGINES if engine.family is Family.VLLM]


def test_nothing_to_say_of_the_base() -> None:
    assert findings(tensors.CHECKS, case_of(dense_headers(), tensor_parallel=8)) == []


@pytest.mark.parametrize("form", FORMATS)
def test_largest_degree_of_parallelism_is_a_note(form: str) -> None:
    (note,) = findings(tensors.CHECKS, case_of(sound_headers(form), block_of(form)))
    assert (note.code, note.severity, note.hits) == ("D10", Severity.NOTE, ())
    # The attention's 384 inputs are three groups of 128.
    assert "vLLM 0.19-0.32: one at most" in note.consequence


def test_degree_differs_by_release() -> None:
    block = block_of("gptq")
    block["group_size"] = 32
    headers = sound_headers("gptq")
    for name in [n.removesuffix(".qweight") for n in headers if n.endswith(".qweight")]:
        pack(headers, name, "gptq", group=32)
    (note,) = findings(tensors.CHECKS, case_of(headers, block))
    # 192 inputs each are six groups of 32, but no multiple of the older releases' tiles.
    assert "vLLM 0.19-0.23: one at most" in note.consequence
    assert "vLLM 0.24-0.32: 4 at most" in note.consequence


def test_groups_that_straddle_devices() -> None:
    case = case_of(sound_headers("gptq"), block_of("gptq"), tensor_parallel=2)
    error = findings(tensors.CHECKS, case)[0]
    assert (error.code, error.severity) == ("D10", Severity.ERROR)
    assert "groups of 128 do not fit 192 inputs" in error.seen
    told = outcomes(error, Part.TRUNK)
    assert told == dict.fromkeys(VLLM, (Harm.REFUSED, "ValueError"))


def test_groups_that_do_not_divide_the_inputs() -> None:
    linear = Linear(f"{BLOCKS}.0.mlp.down_proj", (256, 192), Part.TRUNK)
    module = Module(linear.name, (linear,), Kind.LINEAR, Part.TRUNK)
    built = ((module, Scheme(Storage.GPTQ, 4, 128, True)),)
    case = case_of(dense_headers())
    alone = replace(case, simulations=(Simulation(ENGINES[4], None, built),))
    (error,) = findings(tensors.CHECKS, alone)
    assert (error.code, error.severity, error.where) == ("D7", Severity.ERROR, linear.name)
    assert "groups of 128 do not fit 192 inputs" in error.seen


@pytest.mark.parametrize(
    ("name", "severity"),
    [
        (f"{BLOCKS}.0.linear_attn.in_proj_a", Severity.WARNING),
        ("model.visual.blocks.0.mlp.linear_fc1", Severity.WARNING),
        ("lm_head", Severity.NOTE),
    ],
)
def test_linears_better_kept_dense(name: str, severity: Severity) -> None:
    headers = sound_headers("auto_round")
    pack(headers, name, "auto_round", group=-1)
    by_code = {
        f.code: f for f in findings(tensors.CHECKS, case_of(headers, block_of("auto_round")))
    }
    assert (by_code["D9"].severity, by_code["D9"].where) == (severity, name)


def test_quantized_gates_have_no_kernel_before_tiles_were_padded() -> None:
    block = block_of("compressed-tensors")
    block["ignore"] = [rule for rule in block["ignore"] if "in_proj" not in rule]
    headers = sound_headers("compressed-tensors")
    for number in range(3):
        for leaf in ("a", "b"):
            pack(headers, f"{BLOCKS}.{number}.linear_attn.in_proj_{leaf}", "compressed-tensors")
    found = findings(tensors.CHECKS, case_of(headers, block))
    assert [(f.code, f.severity) for f in found[:2]] == [
        ("D9", Severity.WARNING),
        ("D10", Severity.ERROR),
    ]
    assert outcomes(found[1], Part.TRUNK) == {"vllm-0.19": (Harm.REFUSED, "ValueError")}
