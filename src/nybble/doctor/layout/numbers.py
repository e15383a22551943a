"""The numbers of a config.json that decide a model's shapes, each checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nybble.checkpoint.ondisk import shown
from nybble.core.errors import CheckpointError

_MAX_SIZE = 2**31 - 1
_MAX_BLOCKS = 10_000


class Numbers:
    """One object of config.json, ``where`` its name there with a dot, or nothing at the top.

    A key that is missing has the value that transformers' config class gives it: ``defaults``.
    Every method raises CheckpointError, one line, for a value that cannot be used.
    """

    def __init__(
        self, values: Mapping[str, Any], defaults: Mapping[str, int | None], where: str = ""
    ) -> None:
        self.values = values
        self._defaults = defaults
        self._where = where

    def size(self, key: str, least: int = 1, most: int = _MAX_SIZE) -> int:
        """A whole number."""
        value = self.values.get(key, self._defaults.get(key))
        # type() instead of isinstance(): bool is an int for isinstance().
        if type(value) is int and least <= value <= most:
            return value
        raise self._unusable(key, value, f"a whole number of {least} to {most} is needed")

    def size_or(self, key: str, otherwise: int) -> int:
        """A whole number, ``otherwise`` if config.json or the default says null."""
        return otherwise if self._is_null(key) else self.size(key)

    def blocks(self, key: str = "num_hidden_layers") -> int:
        """How many blocks there are."""
        return self.size(key, most=_MAX_BLOCKS)

    def blocks_or_none(self, key: str) -> int:
        """How many blocks there are; 0 for null."""
        return 0 if self._is_null(key) else self.size(key, least=0, most=_MAX_BLOCKS)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; ``default`` for null."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        raise self._unusable(key, value, "true or false is needed")

    def attends_linearly(self) -> tuple[bool, ...]:
        """Of each block, whether it is a Gated DeltaNet; else it has full attention."""
        count = self.blocks()
        kinds = self.values.get("layer_types")
        if kinds is None:
            interval = self.size("full_attention_interval")
            return tuple((block + 1) % interval != 0 for block in range(count))
        known = ("linear_attention", "full_attention")
        if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
            raise self._unusable("layer_types", kinds, f"a list of {' and '.join(known)} is needed")
        if len(kinds) != count:
            raise CheckpointError(
                f"config.json has {len(kinds)} {self._where}layer_types for {count} blocks"
            )
        return tuple(kind == "linear_attention" for kind in kinds)

    def whole_numbers(self, key: str) -> frozenset[int]:
        """A list of whole numbers; empty for null."""
        value = self.values.get(key)
        if value is None:
            return frozenset()
        if isinstance(value, list) and all(type(number) is int for number in value):
            return frozenset(value)
        raise self._unusable(key, value, "a list of whole numbers is needed")

    def _is_null(self, key: str) -> bool:
        return self.values.get(key, self._defaults.get(key)) is None

    def _unusable(self, key: str, value: object, needed: str) -> CheckpointError:
        found = f"has {self._where}{key} {shown(value)}"
        if value is None:
            found = f"has no {self._where}{key}"
        return CheckpointError(f"config.json {found}: {needed}")


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """An object within config.json; None for null or if it is missing.

    Raises CheckpointError if it is anything else.
    """
    value = config.get(key)
    if value is None or isinstance(value, dict):
        return value
    raise CheckpointError(f"config.json has {key} {shown(value)}: an object is needed")
