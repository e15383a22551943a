from __future__ import annotations

import pickle
import re

import pytest

from nybble.core import errors
from nybble.core.errors import NybbleError

STANDARD = {
    "RecipeError": ValueError,
    "CheckpointError": ValueError,
    "UnsupportedArchitecture": ValueError,
    "PlanError": ValueError,
    "DataError": ValueError,
    "QuantizationError": ArithmeticError,
    "OutputError": OSError,
    "EvaluationError": RuntimeError,
}
KINDS = [getattr(errors, name) for name in STANDARD]


def test_these_are_all_errors_there_are() -> None:
    assert set(NybbleError.__subclasses__()) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_one_of_ours_and_a_standard_one(kind: type[NybbleError]) -> None:
    for caught_as in (NybbleError, STANDARD[kind.__name__]):
        with pytest.raises(caught_as, match=r"^seen here$"):
            raise kind("seen here")


@pytest.mark.parametrize("kind", KINDS)
def test_each_survives_pickling(kind: type[NybbleError]) -> None:
    again = pickle.loads(pickle.dumps(kind("seen: x, where: y")))
    assert type(again) is kind
    assert str(again) == "seen: x, where: y"


def test_the_tree_in_the_documentation_is_the_real_one() -> None:
    drawn = dict(re.findall(r"\+-- (\w+) +\((\w+)\)", errors.__doc__ or ""))
    assert drawn == {name: standard.__name__ for name, standard in STANDARD.items()}
