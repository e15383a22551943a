"""From findings to a verdict per engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nybble.doctor.case import Case
from nybble.doctor.engines import Engine, Family
from nybble.doctor.findings import Finding, Harm, Hit, Part, worst
from nybble.doctor.layout.modules import builds
from nybble.doctor.resolve.built import NotAnalysed


@dataclass(frozen=True)
class Outcome:
    """What becomes of one part."""

    harm: Harm
    raises: str | None = None
    codes: tuple[str, ...] = ()
    """Of the findings that say so."""


@dataclass(frozen=True)
class Verdict:
    """What one engine makes of the checkpoint."""

    engine: Engine
    outcomes: Mapping[Part, Outcome]
    """Of every part that the config calls for and the engine uses."""
    unknown: str | None = None
    """Why nothing certain can be said; None: all rules are known."""

    @property
    def loads(self) -> bool:
        """Whether the engine starts, asked for neither images nor drafts."""
        return self.outcomes[Part.TRUNK].harm is not Harm.REFUSED

    @property
    def is_clean(self) -> bool:
        """Whether every part works, as far as the rules are known."""
        return all(outcome.harm <= Harm.ABSENT for outcome in self.outcomes.values())

    @property
    def sentence(self) -> str:
        """'loads; MTP: random, 0 % of drafts accepted, in silence (D3)'."""
        said = [
            f"{_PHRASES[part, outcome.harm]}{_raised(outcome)}{_cited(outcome)}"
            for part, outcome in self.outcomes.items()
            # Who cannot load the trunk meets nothing else.
            if part is Part.TRUNK or self.loads
        ]
        if self.unknown is not None:
            said = [text for text in said if text not in _FINE] + [f"not analysed: {self.unknown}"]
        return "; ".join(said)


_PHRASES = {
    (Part.TRUNK, Harm.NONE): "loads",
    (Part.TRUNK, Harm.ABSENT): "loads in part",
    (Part.TRUNK, Harm.REFUSED): "does not load",
    (Part.TRUNK, Harm.WRONG): "loads, but computes wrong numbers, in silence",
    (Part.TRUNK, Harm.RANDOM): "loads, but some weights are random: garbage, in silence",
    (Part.MTP, Harm.NONE): "MTP works",
    (Part.MTP, Harm.ABSENT): "no MTP",
    (Part.MTP, Harm.REFUSED): "with MTP on it does not start",
    (Part.MTP, Harm.WRONG): "MTP: wrong numbers, few drafts accepted, in silence",
    (Part.MTP, Harm.RANDOM): "MTP: random weights, 0 % of drafts accepted, in silence",
    (Part.VISION, Harm.NONE): "vision works",
    (Part.VISION, Harm.ABSENT): "no vision",
    (Part.VISION, Harm.REFUSED): "with vision on it does not start",
    (Part.VISION, Harm.WRONG): "vision: wrong numbers, in silence",
    (Part.VISION, Harm.RANDOM): "vision: random weights, in silence",
}
_FINE = frozenset(text for (_, harm), text in _PHRASES.items() if harm is Harm.NONE)


def verdicts(case: Case, findings: Iterable[Finding]) -> tuple[Verdict, ...]:
    """One verdict for each of the case's engines."""
    found = tuple(findings)
    return tuple(
        Verdict(
            engine,
            {part: _outcome(engine, part, found) for part in _parts(case, engine)},
            _unknown(case, engine),
        )
        for engine in case.engines
    )


def _parts(case: Case, engine: Engine) -> list[Part]:
    parts = [Part.TRUNK]
    if case.layout is not None:
        # Transformers has no speculative decoding with this head: it drops the tensors.
        if case.layout.has_mtp and engine.family is not Family.TRANSFORMERS:
            parts.append(Part.MTP)
        if case.layout.is_wrapper:
            parts.append(Part.VISION)
    return parts


def _outcome(engine: Engine, part: Part, findings: tuple[Finding, ...]) -> Outcome:
    hits = [
        (finding.code, hit)
        for finding in findings
        for hit in finding.hits
        if hit.engine == engine and hit.part is part
    ]
    gravest: Hit | None = worst(_met_first(hit for _, hit in hits))
    if gravest is None or gravest.harm is Harm.NONE:
        return Outcome(Harm.NONE)
    codes = dict.fromkeys(code for code, hit in hits if hit.harm is gravest.harm)
    return Outcome(gravest.harm, gravest.raises, tuple(codes))


def _met_first(hits: Iterable[Hit]) -> list[Hit]:
    """An engine that refuses a part never gets to compute with it."""
    found = list(hits)
    return [hit for hit in found if hit.harm is Harm.REFUSED] or found


def _unknown(case: Case, engine: Engine) -> str | None:
    if case.layout is None:
        return "its architecture is not one that nybble knows"
    if not builds(case.layout, engine):
        return "it has no class of its own for this architecture"
    simulation = next(made for made in case.simulations if made.engine == engine)
    reasons = [built.why for _, built in simulation.built if isinstance(built, NotAnalysed)]
    return reasons[0] if reasons else None


def _raised(outcome: Outcome) -> str:
    return f": {outcome.raises}" if outcome.raises else ""


def _cited(outcome: Outcome) -> str:
    return f" ({', '.join(outcome.codes)})" if outcome.codes else ""
