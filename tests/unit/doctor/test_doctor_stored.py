"""How Linears are stored, told from names, types and shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.doctor_cases import info, snapshot_of, sound_headers, tiny_layout

from nybble.checkpoint.headers import TensorInfo
from nybble.doctor.findings import Part
from nybble.doctor.layout.spec import Layout, Linear
from nybble.doctor.resolve.built import DENSE, Scheme, Storage
from nybble.doctor.stored import packed_names, stored_linears

NAME = "model.layers.0.mlp.down_proj"
OUTS, INS = 256, 640
LAYOUT = Layout(
    architecture="LlamaForCausalLM",
    tensors={f"{NAME}.weight": (OUTS, INS)},
    linears={NAME: Linear(NAME, (OUTS, INS), Part.TRUNK)},
    stacks={"model.layers.0.mlp.stack": (NAME, "model.layers.0.mlp.unheard_of")},
    blocks="model.layers",
    has_mtp=False,
    is_wrapper=False,
    tied=False,
)


def schemes(**tensors: tuple[str, tuple[int, ...]]) -> tuple[Scheme, ...]:
    """How the Linear is stored whose tensors are these; '__' stands for a dot."""
    found = (
        info(f"{NAME}.{suffix.replace('__', '.')}", dtype, *shape)
        for suffix, (dtype, shape) in tensors.items()
    )
    return stored_linears(LAYOUT, {tensor.name: tensor for tensor in found})[NAME].schemes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("groups", "group_size"), [(5, 128), (1, -1), (20, 32)])
def test_gptq(bits: int, groups: int, group_size: int) -> None:
    found = schemes(
        qweight=("I32", (INS * bits // 32, OUTS)),
        scales=("F16", (groups, OUTS)),
        qzeros=("I32", (groups, OUTS * bits // 32)),
    )
    assert found == (Scheme(Storage.GPTQ, bits, group_size),)


@pytest.mark.parametrize("bits", [4, 8])
def test_awq_packs_along_the_outputs(bits: int) -> None:
    found = schemes(qweight=("I32", (INS, OUTS * bits // 32)), scales=("F16", (5, OUTS)))
    assert found == (Scheme(Storage.AWQ, bits, 128),)


@pytest.mark.parametrize("bits", [4, 8])
def test_pack_quantized(bits: int) -> None:
    packed, scale = ("I32", (OUTS, INS * bits // 32)), ("BF16", (OUTS, 5))
    scheme = Scheme(Storage.PACKED, bits, 128)
    assert schemes(weight_packed=packed, weight_scale=scale) == (scheme,)
    zeros = ("I32", (OUTS * bits // 32, 5))
    asymmetric = Scheme(Storage.PACKED, bits, 128, symmetric=False)
    found = schemes(weight_packed=packed, weight_scale=scale, weight_zero_point=zeros)
    assert found == (asymmetric,)
    assert not scheme.agrees(Scheme(Storage.PACKED, bits, 64))


@pytest.mark.parametrize(
    ("tensors", "storage"),
    [
        ({"weight": ("BF16", (OUTS, INS))}, Storage.DENSE),
        ({"weight": ("F32", (OUTS, INS))}, Storage.DENSE),
        ({"weight": ("I8", (OUTS, INS)), "weight_scale": ("F32", (OUTS, 1))}, Storage.INT8),
        ({"weight": ("F8_E4M3", (OUTS, INS)), "weight_scale": ("F32", ())}, Storage.FP8),
        ({"weight_packed": ("U8", (OUTS, INS // 2))}, Storage.FP4),
        ({"weight": ("U8", (OUTS, INS // 2)), "weight_scale": ("F8_E4M3", (1,))}, Storage.FP4),
        ({"weight": ("I8", (OUTS, INS)), "SCB": ("F32", (OUTS,))}, Storage.BNB),
        ({"weight": ("U8", (1, 1)), "weight__absmax": ("F32", (1,))}, Storage.BNB),
    ],
)
def test_other_storages(tensors: dict[str, tuple[str, tuple[int, ...]]], storage: Storage) -> None:
    assert [scheme.storage for scheme in schemes(**tensors)] == [storage]


def test_dense_beside_packed_is_two_schemes() -> None:
    found = schemes(weight=("BF16", (OUTS, INS)), qweight=("I32", (INS // 8, OUTS)))
    assert found == (Scheme(Storage.GPTQ, 4), DENSE)


def test_nothing_and_remains() -> None:
    assert schemes() == ()
    assert schemes(scales=("F16", (5, OUTS)), bias=("BF16", (OUTS,))) == ()


def test_a_stack_stands_for_its_members() -> None:
    stack = info("model.layers.0.mlp.stack", "BF16", 8, OUTS, INS)
    stored = stored_linears(LAYOUT, {stack.name: stack})
    assert stored[NAME].scheme == DENSE
    assert stored[NAME].tensors == {"weight": stack}


def test_every_linear_of_a_sound_checkpoint_has_one_scheme() -> None:
    stored = stored_linears(tiny_layout(), sound_headers("gptq"))
    assert stored.keys() == tiny_layout().linears.keys()
    found = {linear.scheme for linear in stored.values()}
    assert found == {DENSE, Scheme(Storage.GPTQ, 4, 128)}


_TENSORS = st.dictionaries(
    st.sampled_from(
        ["weight", "qweight", "weight_packed", "scales", "weight_scale", "weight.absmax", "SCB"]
    ),
    st.tuples(
        st.sampled_from(["BF16", "I32", "I8", "U8", "F8_E4M3", "BOOL"]),
        st.lists(st.sampled_from([0, 1, 2, 80, 256, 640, 2**62]), max_size=4),
    ),
)


@given(_TENSORS)
def test_no_header_breaks_it(tensors: dict[str, tuple[str, list[int]]]) -> None:
    headers: dict[str, TensorInfo] = {}
    for suffix, (dtype, shape) in tensors.items():
        headers[f"{NAME}.{suffix}"] = info(f"{NAME}.{suffix}", dtype, *shape)
    stored = stored_linears(LAYOUT, headers)[NAME]
    assert len(stored.tensors) == len(tensors)
    assert len(set(stored.schemes)) == len(stored.schemes) <= 3


def test_packed_names_are_those_with_a_tensor_of_another_type_in_any_file() -> None:
    files = {
        "a.safetensors": {
            "x.qweight": info("x.qweight", "I32", 1),
            "y.weight": info("y.weight", "BF16", 1),
        },
        "stale.safetensors": {"y.weight": info("y.weight", "F64", 1)},
    }
    assert packed_names(snapshot_of(files)) == {"x", "y"}
