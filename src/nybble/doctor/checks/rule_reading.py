"""The rules of a declaration that pick modules by name, and what they mean.

A rule means the Linears whose checkpoint names it is found in, or is a part of. Whether an engine
understands it so is another matter: engines rename, fuse and match in ways of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from nybble.doctor.case import Case
from nybble.doctor.checks.common import clean
from nybble.doctor.engines import Engine, Family
from nybble.doctor.layout.names import built_name, engine_name
from nybble.doctor.layout.spec import Layout, Module
from nybble.doctor.resolve.built import Block
from nybble.doctor.resolve.patterns import PatternError, Patterns, UntriedPattern

AUTO_ROUND = frozenset({"auto-round", "auto_round", "intel/auto-round", "inc"})
GPTQ = frozenset({"gptq", "gptq_marlin", "auto_gptq"})
COMPRESSED_TENSORS = frozenset({"compressed-tensors", "compressed_tensors"})
_SPECIAL = frozenset("*+?^$()[]{}|\\")
"""What makes a key of ``extra_config`` a pattern (vLLM 0.32, inc/config_parser.py)."""
_MAX_NAMES = 100
"""Rules by name that are no Linear's: more are not looked into, so that time stays bounded."""


@dataclass(frozen=True)
class Rule:
    """One entry of a declaration that picks modules by name."""

    where: str
    """The key it stands under."""
    entry: str
    """As it is written there."""
    text: str
    """The name or pattern itself."""
    is_pattern: bool
    excludes: bool
    """Whether it says that they are dense."""

    @property
    def shown(self) -> str:
        """For a finding's ``where``."""
        return f"{self.where}: {clean(self.entry)}"


def method_name(block: Block | None) -> str:
    """The declared ``quant_method``, in small letters; '' if there is none."""
    name = (block or {}).get("quant_method")
    return name.lower() if isinstance(name, str) else ""


def rules_of(block: Block | None) -> list[Rule]:
    """Its rules by name; none for methods that have other ways."""
    block, method = block or {}, method_name(block)
    if method in AUTO_ROUND:
        return [
            Rule("extra_config", key, key, not _SPECIAL.isdisjoint(key), _is_dense(entry))
            for key, entry in _items(block.get("extra_config"))
        ]
    if method in GPTQ:
        return [
            Rule("dynamic", key, key.removeprefix("-:").removeprefix("+:"), True, key[:2] == "-:")
            for key, _ in _items(block.get("dynamic"))
        ]
    if method in COMPRESSED_TENSORS:
        ignored = block.get("ignore")
        entries = ignored if isinstance(ignored, list) else []
        return [
            Rule("ignore", entry, entry.removeprefix("re:"), entry.startswith("re:"), True)
            for entry in entries
            if isinstance(entry, str)
        ]
    return []


@dataclass
class Reading:
    """A declaration's rules tried on a checkpoint's names, none twice."""

    layout: Layout
    rules: list[Rule]
    patterns: Patterns = field(default_factory=Patterns)
    broken: dict[Rule, ValueError] = field(default_factory=dict)
    """Those that do not compile or take too long; they mean nothing."""
    _meant: dict[Rule, frozenset[str]] = field(default_factory=dict)

    @cached_property
    def _dotted(self) -> dict[str, str]:
        return {name: f".{name}." for name in self.layout.linears}

    @cached_property
    def excluding(self) -> dict[str, list[Rule]]:
        """Linear -> the rules that say it is dense."""
        found: dict[str, list[Rule]] = {}
        for rule in self.rules:
            for name in self.meant(rule) if rule.excludes else ():
                found.setdefault(name, []).append(rule)
        return found

    def meant(self, rule: Rule) -> frozenset[str]:
        """The Linears that a rule means."""
        if rule not in self._meant:
            self._meant[rule] = frozenset(self._found(rule))
        return self._meant[rule]

    def _found(self, rule: Rule) -> Iterator[str]:
        linears = self.layout.linears
        if not rule.is_pattern:
            if rule.text in linears:
                yield rule.text
            else:
                part = f".{rule.text}."
                yield from (name for name in linears if part in self._dotted[name])
            return
        try:
            # An anchor is for one engine's names; without it the rule shows what is meant.
            found = [n for n in linears if self.patterns.search(rule.text.lstrip("^"), n)]
            self.patterns.is_sound(rule.text)
            if can_run_away(rule.text):
                raise UntriedPattern("it can backtrack without end")
        except (PatternError, UntriedPattern) as error:
            self.broken[rule] = error
        else:
            yield from found

    def reaches(self, rule: Rule, engine: Engine, module: Module) -> bool:
        """Whether an engine finds the rule to match a module, or a part of it."""
        names = [module.name]
        method = rule.where
        text = rule.text
        if method != "dynamic" and not (method == "extra_config" and _is_sglang(engine)):
            names += [built_name(self.layout, engine, one.name) for one in module.members]
        if method == "extra_config" or (method == "ignore" and not rule.is_pattern):
            text = engine_name(self.layout, engine, text)
        if not rule.is_pattern:
            return text in names
        tried = self.patterns.match
        if method == "extra_config":
            tried = self.patterns.fullmatch if _is_sglang(engine) else self.patterns.search
        try:
            return any(tried(text, name) for name in names)
        except (PatternError, UntriedPattern) as error:
            self.broken[rule] = error
            return True


def reading_of(case: Case) -> Reading | None:
    """The case's rules; None without a layout."""
    if case.layout is None:
        return None
    rules = rules_of(case.block)
    named = [rule for rule in rules if not rule.is_pattern and rule.text not in case.layout.linears]
    skipped = set(named[_MAX_NAMES:])
    return Reading(case.layout, [rule for rule in rules if rule not in skipped])


def can_run_away(pattern: str) -> bool:
    """Whether a repeated group holds nothing but repeats, as in '(a+)+': Python's own ``re``,
    which Transformers uses, then tries every way to part a text before it gives up.
    """
    text = _CLASS.sub("x", _ESCAPED.sub("x", pattern))
    for _ in range(_MAX_DEPTH):
        group = _GROUP.search(text)
        if group is None:
            return False
        repeats = any(_REPEATS.fullmatch(one) for one in group["body"].split("|"))
        if repeats and group["times"]:
            return True
        text = f"{text[: group.start()]}x{'+' if repeats else group['times']}{text[group.end() :]}"
    return True


_ESCAPED = re.compile(r"\\.", re.DOTALL)
_CLASS = re.compile(r"\[\^?\]?[^\]]*\]")
_GROUP = re.compile(r"\((?:\?[:=!]|\?P?<[^>()]*>)?(?P<body>[^()]*)\)(?P<times>(?:[+*]|\{\d*,\})?)")
_REPEATS = re.compile(r"(?:[^+*?{}][+*]\??)+")
_MAX_DEPTH = 100


def flat(value: object) -> Iterator[str]:
    """The names in a list, a list of lists or a text with commas."""
    if isinstance(value, str):
        yield from filter(None, value.split(","))
    for one in value if isinstance(value, list) else ():
        yield from (name for name in (one if isinstance(one, list) else [one]) if _is_name(name))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_dense(entry: object) -> bool:
    """Whether an entry of ``extra_config`` leaves its Linears dense."""
    bits = entry.get("bits", 0) if isinstance(entry, dict) else 0
    return isinstance(bits, int) and bits >= 16


def _items(value: object) -> list[tuple[str, object]]:
    return list(value.items()) if isinstance(value, dict) else []


def _is_sglang(engine: Engine) -> bool:
    return engine.family is Family.SGLANG
