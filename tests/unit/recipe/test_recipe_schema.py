from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from nybble.quant.scale_search import ScaleMethod
from nybble.recipe.load import load_recipe, shipped_recipes
from nybble.recipe.schema import Calibration, Recipe, Rtn, ScaleInit, Scheme, SignRound

# Another value for every field there is.
CHANGES: dict[type[BaseModel], dict[str, Any]] = {
    Scheme: {"bits": 8, "group_size": 64, "signed_scales": False},
    Rtn: {"name": None, "scale_init": "mse"},
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
    },
    Recipe: {
        "scheme": None,
        "algorithm": None,
        "calibration": None,
        "format": None,  # one value only, so far
        "max_shard_gb": 4.0,
    },
}


def changed_recipes() -> dict[str, Recipe]:
    found = {"rtn": Recipe(algorithm=Rtn()), "signround": Recipe(algorithm=SignRound())}
    sections = {Scheme: "scheme", SignRound: "algorithm", Calibration: "calibration"}
    for kind, changes in CHANGES.items():
        for field, value in changes.items():
            if value is None:
                continue
            key = f"{kind.__name__}.{field}"
            if kind is Recipe:
                found[key] = Recipe(**{field: value})
            elif kind is Rtn:
                found[key] = Recipe(algorithm=Rtn(**{field: value}))
            else:
                found[key] = Recipe(**{sections[kind]: kind(**{field: value})})
    return found


@pytest.mark.parametrize("kind", list(CHANGES))
def test_the_changes_above_name_every_field(kind: type[BaseModel]) -> None:
    assert set(CHANGES[kind]) == set(kind.model_fields)


def test_the_fingerprint_changes_with_any_field() -> None:
    prints = {name: recipe.fingerprint() for name, recipe in changed_recipes().items()}
    assert len(set(prints.values())) == len(prints)


def test_the_fingerprint_stays_for_good() -> None:
    # Manifests hold it: a change makes finished work of older versions look like another recipe's.
    assert (
        Recipe().fingerprint() == "2bf836d4cf89c10bbdc310d5824497824e9f9d30c9aecad40bc960a4c66a8529"
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
        (SignRound, "iters", 0),
        (SignRound, "batch_size", 0),
        (SignRound, "lr", 0.0),
        (SignRound, "lr", float("nan")),
        (SignRound, "minmax_lr", -0.1),
        (SignRound, "scale_init", "best"),
        (Rtn, "scale_init", "best"),
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
