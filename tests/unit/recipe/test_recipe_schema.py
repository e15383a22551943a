from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from nybble.quant.scale_search import ScaleMethod
from nybble.recipe.load import load_recipe, shipped_recipes
from nybble.recipe.schema import (
    Calibration,
    Gptq,
    Override,
    Recipe,
    Rtn,
    ScaleInit,
    Scheme,
    SignRound,
    TextSource,
)

# Another value for every field there is.
CHANGES: dict[type[BaseModel], dict[str, Any]] = {
    Scheme: {
        "bits": 8,
        "group_size": 64,
        "signed_scales": False,
        "lm_head_bits": 8,
        "mtp_bits": 8,
        "overrides": (Override(match="mlp", bits=3),),
    },
    Override: {"match": "attn", "keep": None, "bits": 2, "group_size": 32},
    Rtn: {"name": None, "scale_init": "mse"},
    Gptq: {
        "name": None,
        "scale_init": "minmax",
        "act_order": False,
        "damp": 0.1,
        "true_sequential": True,
    },
    SignRound: {
        "name": None,
        "scale_init": "importance",
        "iters": 201,
        "batch_size": 4,
        "lr": 0.01,
        "minmax_lr": 0.01,
    },
    Calibration: {
        "source": "stdlib",
        "rows": 64,
        "seqlen": 1024,
        "layout": "pack",
        "seed": 43,
        "mix": (TextSource(source="stdlib"),),
        "min_tokens": 64,
    },
    Recipe: {
        "scheme": None,
        "algorithm": None,
        "calibration": None,
        "format": "gptq",
        "max_shard_gb": 4.0,
    },
}


def changed_recipes() -> dict[str, Recipe]:
    found = {"signround": Recipe()}
    found |= {kind.__name__: Recipe(algorithm=kind()) for kind in (Rtn, Gptq)}
    found["Override"] = _overridden()
    sections = {
        Scheme: "scheme",
        Rtn: "algorithm",
        Gptq: "algorithm",
        SignRound: "algorithm",
        Calibration: "calibration",
    }
    for kind, changes in CHANGES.items():
        for field, value in changes.items():
            if value is None:
                continue
            key = f"{kind.__name__}.{field}"
            if kind is Recipe:
                found[key] = Recipe(**{field: value})
            elif kind is Override:
                found[key] = _overridden(**{field: value})
            else:
                found[key] = Recipe(**{sections[kind]: kind(**{field: value})})
    found["Override.keep"] = Recipe(scheme=Scheme(overrides=(Override(match="mlp", keep=True),)))
    return found


def _overridden(**values: Any) -> Recipe:
    return Recipe(scheme=Scheme(overrides=(Override(**{"match": "mlp", "bits": 4, **values}),)))


@pytest.mark.parametrize("kind", list(CHANGES))
def test_the_changes_above_name_every_field(kind: type[BaseModel]) -> None:
    assert set(CHANGES[kind]) == set(kind.model_fields)


def test_the_fingerprint_changes_with_any_field() -> None:
    prints = {name: recipe.fingerprint() for name, recipe in changed_recipes().items()}
    assert len(set(prints.values())) == len(prints)


def test_the_fingerprint_stays_for_good() -> None:
    # Manifests hold it: a change makes finished work of older versions look like another recipe's.
    assert (
        Recipe().fingerprint() == "523c84f49900a4e507f8cbb2d3514a3d86b10ee72b6d1a617d9086e11cb1b439"
    )


def test_the_fingerprint_is_of_values_not_of_how_they_were_written() -> None:
    written = Recipe.model_validate({"max_shard_gb": 5, "scheme": {"group_size": 128, "bits": 4}})
    assert written.fingerprint() == Recipe().fingerprint()


def test_a_recipe_survives_json() -> None:
    for recipe in changed_recipes().values():
        again = Recipe.model_validate_json(recipe.model_dump_json())
        assert again == recipe
        assert type(again.algorithm) is type(recipe.algorithm)


@pytest.mark.parametrize("part", ["scheme", "algorithm", "calibration", None])
def test_recipes_are_frozen(part: str | None) -> None:
    recipe = Recipe()
    target = getattr(recipe, part) if part else recipe
    for field in type(target).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, field, getattr(target, field))
    assert hash(recipe) == hash(Recipe())


@pytest.mark.parametrize("bits", [-4, 0, 1, 9, 16])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValidationError):
        Scheme(bits=bits)


@pytest.mark.parametrize("group_size", [-128, -2, 0, 1, 16, 31, 33, 48, 100])
def test_group_sizes_that_no_kernel_knows(group_size: int) -> None:
    with pytest.raises(ValidationError, match=f"group_size is {group_size}: give -1 or a multiple"):
        Scheme(group_size=group_size)


@pytest.mark.parametrize("group_size", [-1, 32, 64, 96, 128])
def test_group_sizes(group_size: int) -> None:
    assert Scheme(group_size=group_size).group_size == group_size


@pytest.mark.parametrize(
    ("kind", "field", "bad"),
    [
        (SignRound, "iters", -1),
        (SignRound, "batch_size", 0),
        (SignRound, "lr", 0.0),
        (SignRound, "lr", float("nan")),
        (SignRound, "minmax_lr", -0.1),
        (SignRound, "scale_init", "best"),
        (Rtn, "scale_init", "best"),
        (Gptq, "damp", 0.0),
        (Gptq, "damp", 1.0),
        (Gptq, "damp", float("nan")),
        (Gptq, "act_order", 1),
        (Scheme, "mtp_bits", 3),
        (Scheme, "lm_head_bits", 2),
        (Calibration, "rows", 0),
        (Calibration, "seqlen", 7),
        (Calibration, "layout", "shuffle"),
        (Recipe, "max_shard_gb", 0),
        (Recipe, "format", "gguf"),
    ],
)
def test_values_out_of_range(kind: type[BaseModel], field: str, bad: object) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**{field: bad})
    assert [problem["loc"] for problem in caught.value.errors()] == [(field,)]


def test_every_initial_scale_of_a_recipe_is_one_the_quantizer_knows() -> None:
    assert get_args(ScaleInit) == get_args(ScaleMethod)


def test_summaries_are_one_line_that_says_what_matters() -> None:
    for name in shipped_recipes():
        assert "\n" not in load_recipe(name).summary()
    assert (
        load_recipe("w4a16-autoround").summary() == "signround W4 group 128, auto_round, "
        "200 iterations x 8 rows, 128 x 2048 tokens of pile-10k"
    )
    assert load_recipe("w4a16-rtn").summary() == "rtn W4 group 128, auto_round"
    per_channel = Recipe(scheme=Scheme(bits=8, group_size=-1), algorithm=Rtn(scale_init="mse"))
    assert per_channel.summary() == "rtn W8 per channel, auto_round"
    weighted = Recipe(algorithm=Rtn(scale_init="importance"))
    assert weighted.summary() == "rtn W4 group 128, auto_round, 128 x 2048 tokens of pile-10k"
    everything = Scheme(
        lm_head_bits=8,
        mtp_bits=4,
        overrides=(
            Override(match="attn", keep=True),
            Override(match="down", bits=8, group_size=32),
        ),
    )
    assert Recipe(scheme=everything, algorithm=Gptq(), format="gptq").summary() == (
        "gptq W4 group 128, gptq, lm_head W8, MTP W4, attn kept, down W8 group 32, "
        "128 x 2048 tokens of pile-10k"
    )


@pytest.mark.parametrize(
    ("algorithm", "trains", "needs_text"),
    [
        (SignRound(), True, True),
        (SignRound(iters=0), False, False),
        (SignRound(iters=0, scale_init="importance"), False, True),
        (Rtn(), False, False),
        (Rtn(scale_init="mse"), False, False),
        (Rtn(scale_init="importance"), False, True),
        (Gptq(), False, True),
        (Gptq(scale_init="minmax"), False, True),
    ],
)
def test_what_an_algorithm_needs(
    algorithm: SignRound | Rtn | Gptq, trains: bool, needs_text: bool
) -> None:
    recipe = Recipe(algorithm=algorithm)
    assert (recipe.trains, recipe.needs_text) == (trains, needs_text)
