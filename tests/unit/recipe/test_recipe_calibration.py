from __future__ import annotations

import pytest
from pydantic import ValidationError

from nybble.core.errors import RecipeError
from nybble.recipe.load import recipe_from_toml
from nybble.recipe.schema import Calibration, Recipe, TextSource

MIX = """
[calibration]
rows = 512
layout = "pad"
[[calibration.mix]]
source = "ultrachat_200k"
weight = 3
[[calibration.mix]]
source = "wikitext-2-raw"
layout = "pack"
"""
PARTS = (
    TextSource(source="ultrachat_200k", weight=3.0),
    TextSource(source="wikitext-2-raw", layout="pack"),
)


def calibration(text: str, *overrides: str) -> Calibration:
    return recipe_from_toml(text, "my.toml", overrides).calibration


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe_from_toml(text, "my.toml", overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- One source, or several ---


def test_one_source_is_the_common_case() -> None:
    one = calibration('[calibration]\nsource = "a.txt"\nlayout = "pack"')
    assert (one.source, one.mix) == ("a.txt", ())
    assert one.sources == (TextSource(source="a.txt", weight=1.0, layout="pack"),)
    assert Calibration().source == "pile-10k"
    assert calibration("[calibration]\nmix = []").source == "pile-10k"


def test_a_mix() -> None:
    mix = calibration(MIX)
    assert mix.source is None
    assert mix.mix == PARTS
    assert mix.sources == (
        TextSource(source="ultrachat_200k", weight=3.0, layout="pad"),
        TextSource(source="wikitext-2-raw", weight=1.0, layout="pack"),
    )
    assert hash(mix) == hash(calibration(MIX))


def test_a_mix_survives_json() -> None:
    recipe = recipe_from_toml(MIX, "x")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_the_fingerprint_changes_with_any_part_of_a_mix() -> None:
    changed = [
        MIX.replace("weight = 3", "weight = 2"),
        MIX.replace('layout = "pack"', 'layout = "truncate"'),
        MIX.replace("wikitext-2-raw", "pile-10k"),
        MIX.replace('layout = "pad"\n', ""),
        MIX.replace('layout = "pad"', 'layout = "pad"\nmin_tokens = 33'),
    ]
    prints = {recipe_from_toml(text, "x").fingerprint() for text in [MIX, *changed]}
    assert len(prints) == 6


# --- Overrides ---


def test_a_mix_may_be_given_as_an_override() -> None:
    override = 'calibration.mix=[{source="a.txt"},{source="b.jsonl",weight=0.5,layout="pad"}]'
    assert calibration("", override).mix == (
        TextSource(source="a.txt"),
        TextSource(source="b.jsonl", weight=0.5, layout="pad"),
    )


def test_a_source_instead_of_a_mix() -> None:
    one = calibration(MIX, "calibration.mix=[]", "calibration.source=a.txt")
    assert (one.source, one.mix, one.rows) == ("a.txt", (), 512)


# --- What is refused ---


def test_a_source_and_a_mix_exclude_each_other() -> None:
    assert refusal(MIX.replace("rows = 512", 'source = "a.txt"')) == (
        "my.toml: calibration.source: there is also a mix of ultrachat_200k, wikitext-2-raw: "
        "give one of the two (calibration.mix=[] takes the mix out) (got 'a.txt')"
    )


def test_every_source_of_a_mix_needs_a_row() -> None:
    assert refusal(MIX, "calibration.rows=1") == (
        "my.toml: calibration.rows: the mix has 2 sources: give each at least one row (got 1)"
    )
    assert calibration(MIX, "calibration.rows=2").rows == 2
    parts = ",".join(['{source="a.txt"}'] * 129)
    assert "the mix has 129 sources" in refusal(f"[calibration]\nmix = [{parts}]")


def test_no_source_at_all() -> None:
    with pytest.raises(ValidationError, match="give a source or a mix"):
        Calibration(source=None)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("weight = 3", "weight = 0", "calibration.mix.0.weight"),
        ("weight = 3", "weight = -1", "calibration.mix.0.weight"),
        ("weight = 3", "weight = inf", "calibration.mix.0.weight"),
        ("weight = 3", 'weight = "3"', "calibration.mix.0.weight"),
        ("weight = 3", "weight = true", "calibration.mix.0.weight"),
        ('source = "ultrachat_200k"', "", "calibration.mix.0.source"),
        ('layout = "pack"', 'layout = "sorted"', "calibration.mix.1.layout"),
        ('layout = "pack"', "rows = 5", "unknown key 'calibration.mix.1.rows'"),
        ("rows = 512", "min_tokens = 0", "calibration.min_tokens"),
    ],
)
def test_a_bad_value_is_named_with_its_place(old: str, new: str, key: str) -> None:
    assert refusal(MIX.replace(old, new)).startswith(f"my.toml: {key}")


def test_a_mix_that_is_no_list_of_sources() -> None:
    assert refusal("", "calibration.mix=a.txt").startswith("my.toml: calibration.mix")
    assert refusal("", 'calibration.mix=["a.txt"]').startswith("my.toml: calibration.mix.0")


# --- Summaries ---


def test_summaries() -> None:
    assert Calibration().summary() == "128 x 2048 tokens of pile-10k"
    assert Calibration(mix=(PARTS[1],), rows=9).summary() == "9 x 2048 tokens of wikitext-2-raw"
    packed = Calibration(mix=PARTS, rows=512, layout="truncate")
    assert packed.summary() == "512 x 2048 tokens of ultrachat_200k (3) + wikitext-2-raw (1)"
    padded = calibration(MIX.replace("weight = 3", "weight = 0.5"))
    assert padded.summary() == (
        "512 x up to 2048 tokens of ultrachat_200k (0.5) + wikitext-2-raw (1)"
    )
