from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import MTP_SHAPES, VOCAB, Tiny, read_weights, tiny_tensors, write_weights
from support.dense_checkpoints import Dense, dense_tensors, write_dense
from support.moe_checkpoints import Moe, model_tensors, write_moe
from support.packed import dense

from nybble.arch.blocks import expected_shapes
from nybble.core.errors import CheckpointError
from nybble.engine.weights import ModelWeights
from nybble.packing.formats import FORMATS
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import Recipe, Rtn, Scheme

CPU = torch.device("cpu")
PREFIX = Tiny().prefix
SLICES = [(0, 32), (32, 320), (288, 320), (0, VOCAB), (64, 96)]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Iterator[ModelWeights]:
    with ModelWeights(tiny_base) as weights:
        yield weights


@pytest.fixture(scope="module", params=list(FORMATS))
def with_heads(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """W4, an 8-bit output head and an 8-bit MTP layer, in each format."""
    scheme = Scheme(bits=4, group_size=64, lm_head_bits=8, mtp_bits=8)
    recipe = Recipe(algorithm=Rtn(), scheme=scheme, format=request.param)
    return quantize(tiny_base, tmp_path_factory.mktemp("heads") / "r", recipe, "cpu").out


def test_every_parameter_of_a_base_is_as_stored(base: ModelWeights) -> None:
    stored = {n: t for n, t in tiny_tensors(Tiny()).items() if ".visual." not in n}
    assert set(base.shapes) == set(stored)
    assert base.shapes == expected_shapes(base.arch)
    for name, tensor in stored.items():
        found = base.parameter(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name


def test_every_parameter_of_a_result_is_what_its_codes_stand_for(with_heads: Path) -> None:
    stored, packed = read_weights(with_heads), 0
    with ModelWeights(with_heads) as weights:
        for name in weights.shapes:
            if name in stored:
                assert torch.equal(weights.parameter(name), stored[name]), name
                continue
            module = name.removesuffix(".weight")
            bits = 8 if module == "lm_head" or module.startswith("mtp.") else 4
            assert torch.equal(weights.parameter(name), dense(stored, module, bits)), name
            packed += 1
    assert packed == 3 * 6 + 7 + 7 + 1


def test_a_block_has_its_own_names(base: ModelWeights) -> None:
    stored, start = tiny_tensors(Tiny()), f"{PREFIX}layers.3."
    found = base.block(3, CPU, torch.float32)
    assert set(found) == {n.removeprefix(start) for n in stored if n.startswith(start)}
    assert all(torch.equal(t, stored[start + name].float()) for name, t in found.items())


def test_the_mtp_layer_is_the_block_after_the_last(base: ModelWeights) -> None:
    start = "mtp.layers.0."
    found = base.block(4, CPU, torch.bfloat16)
    assert set(found) == {n.removeprefix(start) for n in MTP_SHAPES if n.startswith(start)}
    assert {t.dtype for t in found.values()} == {torch.bfloat16}


def test_a_block_is_a_copy(base: ModelWeights) -> None:
    """Also in the type it is stored in, where no conversion makes one."""
    for tensor in base.block(0, CPU, torch.bfloat16).values():
        tensor.add_(1)
    stored = tiny_tensors(Tiny())
    for name, tensor in base.block(0, CPU, torch.bfloat16).items():
        assert torch.equal(tensor, stored[f"{PREFIX}layers.0.{name}"]), name


@pytest.mark.parametrize("form", ["stacks", "one by one"])
def test_experts_are_a_stack_however_they_are_stored(form: str, tmp_path: Path) -> None:
    moe = Moe(form=form, mtp="stacks" if form == "one by one" else "one by one")
    stored = model_tensors(moe)
    with ModelWeights(write_moe(tmp_path / form, moe)) as weights:
        names = [name for name in weights.shapes if ".experts." in name]
        assert len(names) == 2 * (len(moe.moe_blocks) + 1)
        for name in names:
            assert torch.equal(weights.parameter(name), stored[name]), name


def test_embeddings_are_rows_of_the_table(base: ModelWeights) -> None:
    ids = torch.tensor([[3, 0, 319], [7, 7, 1]])
    table = tiny_tensors(Tiny())[f"{PREFIX}embed_tokens.weight"]
    for dtype in (torch.float32, torch.bfloat16):
        found = base.embedded(ids, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, table[ids].to(dtype))
    assert torch.equal(base.parameter(base.arch.embedding), table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemmas_embeddings_are_scaled_in_their_own_type(tmp_path: Path, dtype: torch.dtype) -> None:
    gemma = Dense("Gemma3ForCausalLM")
    with ModelWeights(write_dense(tmp_path / "gemma", gemma)) as weights:
        found = weights.embedded(torch.arange(VOCAB), dtype)
        scale = torch.tensor(weights.arch.text_config.hidden_size**0.5).to(dtype)
    table = dense_tensors(gemma)["model.embed_tokens.weight"].to(dtype)
    assert float(scale) > 4
    assert torch.equal(found, table * scale)


@pytest.mark.parametrize("rows", SLICES)
def test_rows_of_a_dense_head(base: ModelWeights, rows: tuple[int, int]) -> None:
    expected = tiny_tensors(Tiny())["lm_head.weight"][slice(*rows)]
    assert torch.equal(base.head_rows(*rows), expected)


@pytest.mark.parametrize("rows", SLICES)
def test_rows_of_a_quantized_head(with_heads: Path, rows: tuple[int, int]) -> None:
    whole = dense(read_weights(with_heads), "lm_head", bits=8)
    with ModelWeights(with_heads) as weights:
        assert torch.equal(weights.head_rows(*rows), whole[slice(*rows)])


def test_rows_of_a_tied_head_are_the_embeddings(make_tiny: Callable[..., Path]) -> None:
    with ModelWeights(make_tiny(tied=True)) as weights:
        ids = torch.arange(32, 64)
        assert torch.equal(weights.head_rows(32, 64), weights.embedded(ids, torch.bfloat16))
        assert weights.vocab_size == VOCAB
        assert weights.head_sha256() == weights.reader.sha256(weights.arch.embedding)


def test_a_heads_hash_is_of_its_bytes(base: ModelWeights, rtn_result: Path) -> None:
    stored = tiny_tensors(Tiny())["lm_head.weight"]
    expected = hashlib.sha256(stored.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert base.head_sha256() == expected
    with ModelWeights(rtn_result) as weights:
        assert weights.head_sha256() == expected


def test_a_quantized_head_has_no_hash(with_heads: Path) -> None:
    with ModelWeights(with_heads) as weights:
        assert weights.head_sha256() is None


def test_the_hash_of_all_tensors_is_of_names_and_bytes(
    base: ModelWeights, make_tiny: Callable[..., Path]
) -> None:
    tensors = tiny_tensors(Tiny())
    text = "".join(
        f"{name} {hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest()}\n"
        for name, t in sorted(tensors.items())
    )
    assert base.sha256() == hashlib.sha256(text.encode()).hexdigest()
    with ModelWeights(make_tiny("sharded", shards=3)) as sharded:
        assert sharded.sha256() == base.sha256()
    changed = make_tiny("changed")
    tensors["mtp.norm.weight"][0] += 1
    write_weights(changed, tensors)
    with ModelWeights(changed) as other:
        assert other.sha256() != base.sha256()


def test_a_checkpoint_that_lacks_a_tensor_is_refused(make_tiny: Callable[..., Path]) -> None:
    folder, tensors = make_tiny(), tiny_tensors(Tiny())
    del tensors["mtp.fc.weight"]
    write_weights(folder, tensors)
    with pytest.raises(CheckpointError, match=r"lacks mtp\.fc\.weight"):
        ModelWeights(folder)
