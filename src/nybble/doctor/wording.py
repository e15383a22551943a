"""Sentences about engines: what they do, said once for all releases that do the same."""

from __future__ import annotations

from collections.abc import Iterable

from nybble.doctor.engines import ENGINES, Engine, Family
from nybble.doctor.findings import Harm, Hit, Part


def names_of(engines: Iterable[Engine]) -> str:
    """'vLLM 0.19-0.25 and SGLang 0.5': neighbouring releases of one engine as one span."""
    wanted = set(engines)
    spans: list[list[Engine]] = []
    previous: Engine | None = None
    for engine in ENGINES:
        if engine in wanted:
            follows = previous in wanted and previous and previous.family is engine.family
            spans.append([*spans.pop(), engine] if follows else [engine])
        previous = engine
    labels = [Engine(span[0].family, span[0].first, span[-1].last).label for span in spans]
    return " and ".join(filter(None, (", ".join(labels[:-1]), *labels[-1:])))


def spoken(hits: Iterable[Hit]) -> str:
    """What the engines do, one clause for all that do the same: 'vLLM 0.26-0.32 stops with ...'."""
    groups: dict[tuple[str, str, str], list[Engine]] = {}
    for hit in hits:
        groups.setdefault(_clause(hit), []).append(hit.engine)
    return "; ".join(_said(*clause, engines) for clause, engines in groups.items())


def _said(before: str, verb: str, after: str, engines: list[Engine]) -> str:
    names = names_of(engines)
    return f"{before}{names} {verb if ' and ' in names else f'{verb}s'} {after}"


def _clause(hit: Hit) -> tuple[str, str, str]:
    """What stands before the engines' names, the verb of several, and the rest."""
    if hit.harm is Harm.REFUSED:
        return _WHEN[hit.part], "stop", f"with {hit.raises or 'an error'}"
    if hit.engine.family is Family.TRANSFORMERS and hit.harm is Harm.RANDOM:
        return "", "warn", "of missing keys, which get random weights"
    verb, after = _DOES[hit.part, hit.harm]
    return "", verb, after


_WHEN = {Part.TRUNK: "", Part.MTP: "with MTP on, ", Part.VISION: "with vision on, "}
_DOES = {
    (Part.TRUNK, Harm.NONE): ("load", "it"),
    (Part.TRUNK, Harm.ABSENT): ("load", "the rest"),
    (Part.TRUNK, Harm.WRONG): ("compute", "wrong numbers, without a word"),
    (Part.TRUNK, Harm.RANDOM): ("compute", "with random weights, without a word: garbage text"),
    (Part.MTP, Harm.NONE): ("load", "it"),
    (Part.MTP, Harm.ABSENT): ("serve", "without MTP"),
    (Part.MTP, Harm.WRONG): ("draft", "with wrong numbers, without a word: few drafts accepted"),
    (Part.MTP, Harm.RANDOM): (
        "draft",
        "with random weights, without a word: 0 % of drafts accepted",
    ),
    (Part.VISION, Harm.NONE): ("load", "it"),
    (Part.VISION, Harm.ABSENT): ("serve", "without images"),
    (Part.VISION, Harm.WRONG): ("read", "images with wrong numbers, without a word"),
    (Part.VISION, Harm.RANDOM): ("read", "images with random weights, without a word"),
}
