from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nybble.core.errors import RecipeError
from nybble.packing.formats import FORMATS
from nybble.recipe.load import DEFAULT_RECIPE, load_recipe, recipe_from_toml, shipped_recipes
from nybble.recipe.schema import Gptq, Override, Recipe, Rtn, SignRound


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe_from_toml(text, "my.toml", overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- Shipped recipes and files ---


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe == load_recipe(name)
    assert recipe.scheme.bits in FORMATS[recipe.format].bits


def test_the_recipes_that_documents_name_are_shipped() -> None:
    assert {"tiny-demo", "w4a16-autoround", "w4a16-rtn"} <= set(shipped_recipes())
    assert list(shipped_recipes()) == sorted(shipped_recipes())
    assert load_recipe() == load_recipe(DEFAULT_RECIPE) == load_recipe("w4a16-autoround")


def test_the_default_recipe_is_that_of_the_published_checkpoints() -> None:
    recipe = load_recipe("w4a16-autoround")
    assert (recipe.scheme.bits, recipe.scheme.group_size) == (4, 128)
    assert isinstance(recipe.algorithm, SignRound)
    assert (recipe.algorithm.iters, recipe.algorithm.batch_size) == (200, 8)
    text = recipe.calibration
    assert (text.source, text.rows, text.seqlen, text.layout) == (
        "pile-10k", 128, 2048, "truncate",
    )  # fmt: skip


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[scheme]\nbits = 8\n[algorithm]\nname = "rtn"\n[calibration]\nsource = "caf\u00e9.txt"\n',
        encoding="utf-8",
    )
    recipe = load_recipe(str(path), ["scheme.group_size=-1"])
    assert (recipe.scheme.bits, recipe.scheme.group_size) == (8, -1)
    assert recipe.algorithm == Rtn()
    assert recipe.calibration.source == "caf\u00e9.txt"


def test_an_empty_file_is_the_default() -> None:
    assert recipe_from_toml("", "x") == Recipe()


@pytest.mark.parametrize("name", ["w4a16", "", "no/such/folder", "recipe.json"])
def test_a_name_that_does_not_exist_lists_those_that_do(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    message = str(caught.value)
    assert repr(name) in message
    assert all(known in message for known in shipped_recipes())
    assert ".toml" in message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^cannot read recipe .*none\.toml: .*No such file"):
        load_recipe(str(tmp_path / "none.toml"))


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RecipeError, match=r"folder\.toml"):
        load_recipe(str(tmp_path / "folder.toml"))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"cannot read recipe .*binary\.toml"):
        load_recipe(str(path))


def test_bad_toml_names_file_and_line() -> None:
    message = refusal("[scheme]\nbits = \n")
    assert message.startswith("my.toml is not TOML:")
    assert "line 2" in message


# --- What a recipe may not say ---


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("bits = 4", "bits"),
        ("[schema]\nbits = 4", "schema"),
        ("[scheme]\nbit = 4", "scheme.bit"),
        ('[algorithm]\nname = "rtn"\niters = 5', "algorithm.iters"),
        ("[calibration]\nsamples = 5", "calibration.samples"),
    ],
)
def test_an_unknown_key_is_named(text: str, key: str) -> None:
    assert refusal(text) == f"my.toml: unknown key {key!r}"


def test_a_bad_value_is_shown_with_its_key() -> None:
    message = refusal("[scheme]\nbits = 17")
    assert message.startswith("my.toml: scheme.bits: ")
    assert "17" in message
    message = refusal('[calibration]\nrows = "many"')
    assert message.startswith("my.toml: calibration.rows: ")
    assert "'many'" in message
    assert refusal("[scheme]\ngroup_size = 100").startswith("my.toml: scheme: group_size is 100")


def test_the_algorithm_is_told_by_its_name() -> None:
    assert recipe_from_toml('algorithm.name = "rtn"', "x").algorithm == Rtn()
    assert recipe_from_toml('algorithm.name = "signround"', "x").algorithm == SignRound()
    assert recipe_from_toml('algorithm.name = "gptq"', "x").algorithm == Gptq()
    message = refusal('algorithm.name = "awq"')
    assert "'awq'" in message
    assert "'rtn'" in message
    assert "'gptq'" in message
    assert "'signround'" in message
    assert "'name'" in refusal("[algorithm]\niters = 5")
    assert "algorithm" in refusal('algorithm = "rtn"')


# --- Other grids for some Linears ---

TWO_OVERRIDES = """
[[scheme.overrides]]
match = '\\.self_attn\\.'
keep = true
[[scheme.overrides]]
match = 'down_proj'
bits = 8
"""


def test_overrides_of_the_scheme_keep_their_order() -> None:
    scheme = recipe_from_toml(TWO_OVERRIDES, "x").scheme
    assert scheme.overrides == (
        Override(match=r"\.self_attn\.", keep=True),
        Override(match="down_proj", bits=8),
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("match = '('\nkeep = true", "'(' is no regular expression"),
        ("match = 'x'", "either keep = true, or bits or group_size"),
        ("match = 'x'\nkeep = true\nbits = 4", "either keep = true, or bits or group_size"),
        ("match = 'x'\ngroup_size = 48", "group_size is 48"),
        ("match = 'x'\nbits = 5", "scheme.overrides.0.bits"),
        ("keep = true", "scheme.overrides.0.match"),
        ("match = 'x'\nkept = true", "scheme.overrides.0.kept"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused(values: str, told: str) -> None:
    assert told in refusal(f"[[scheme.overrides]]\n{values}")


# --- Overrides ---


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("scheme.bits=8", "scheme", "bits", 8),
        ("scheme.group_size=-1", "scheme", "group_size", -1),
        ("scheme.signed_scales=false", "scheme", "signed_scales", False),
        (" scheme.bits = 8 ", "scheme", "bits", 8),
        ("calibration.source=stdlib", "calibration", "source", "stdlib"),
        ("calibration.source='stdlib'", "calibration", "source", "stdlib"),
        ('calibration.source="stdlib"', "calibration", "source", "stdlib"),
        ("calibration.source=/data/my text.txt", "calibration", "source", "/data/my text.txt"),
        ("calibration.source=a=b.txt", "calibration", "source", "a=b.txt"),
        ("calibration.source=''", "calibration", "source", ""),
        ("calibration.seqlen=2_048", "calibration", "seqlen", 2048),
        ("algorithm.lr=5e-3", "algorithm", "lr", 0.005),
        ("algorithm.iters=1", "algorithm", "iters", 1),
    ],
)
def test_an_override(override: str, section: str, field: str, value: object) -> None:
    recipe = load_recipe("w4a16-autoround", [override])
    found = getattr(getattr(recipe, section), field)
    assert found == value
    assert type(found) is type(value)
    changed = getattr(recipe, section).model_copy(
        update={field: getattr(getattr(load_recipe(), section), field)}
    )
    assert recipe.model_copy(update={section: changed}) == load_recipe()


def test_an_override_without_a_section() -> None:
    assert load_recipe("w4a16-rtn", ["max_shard_gb=0.5"]).max_shard_gb == 0.5


def test_an_override_may_make_its_section() -> None:
    assert recipe_from_toml("", "x", ["scheme.bits=2"]).scheme.bits == 2


def test_overrides_apply_in_order() -> None:
    recipe = load_recipe(
        "w4a16-rtn", ["scheme.bits=2", "algorithm.scale_init=mse", "scheme.bits=8"]
    )
    assert recipe.scheme.bits == 8
    assert recipe.algorithm == Rtn(scale_init="mse")


def test_an_override_may_replace_a_section() -> None:
    recipe = load_recipe("w4a16-autoround", ['algorithm={name="rtn"}'])
    assert recipe.algorithm == Rtn()


@pytest.mark.parametrize("override", ["scheme.bits", "", "=4", "scheme.bits:8"])
def test_overrides_of_another_form(override: str) -> None:
    assert refusal("", override) == f"override {override!r} is not of the form section.key=value"


def test_an_override_below_a_value() -> None:
    message = refusal("[scheme]\nbits = 4", "scheme.bits.low=1")
    assert message == "override 'scheme.bits.low=1': bits is a value, not a section"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("scheme.bit=8", "unknown key 'scheme.bit'"),
        ("nonsense=1", "unknown key 'nonsense'"),
        ("scheme.bits=many", "scheme.bits"),
        ("scheme.bits=", "scheme.bits"),
        ("scheme.bits=4.5", "scheme.bits"),
        ("calibration.source=true", "calibration.source"),
        ("calibration.source=12", "calibration.source"),
        ("scheme=4", "scheme"),
    ],
)
def test_overrides_are_checked_like_a_file(override: str, said: str) -> None:
    assert refusal("", override).startswith(f"my.toml: {said}")


def test_fingerprints_agree_between_processes() -> None:
    code = "from nybble.recipe.load import load_recipe; print(load_recipe().fingerprint())"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == load_recipe().fingerprint()


def test_another_algorithm_drops_the_first_ones_settings() -> None:
    recipe = load_recipe("w4a16-autoround", ["algorithm.name=rtn"])
    assert recipe.algorithm == Rtn()


@pytest.mark.parametrize(
    "override",
    [
        "scheme.bits=5",
        "algorithm.lr=inf",
        "max_shard_gb=inf",
        "calibration.rows=true",
        'calibration.rows="4"',
        "scheme.bits=8\nx = 1",
    ],
)
def test_a_value_that_would_fail_later_is_refused_now(override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe("w4a16-autoround", [override])
