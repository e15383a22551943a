"""``nybble accept``: how many of its drafts each checkpoint accepts, and what that is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from nybble.core.errors import CheckpointError
from nybble.engine.load import load_model
from nybble.engine.stream import Arithmetic
from nybble.engine.weights import ModelWeights
from nybble.eval.acceptance import AcceptanceResult, measure_acceptance
from nybble.eval.classes import ClassText, ClassTexts
from nybble.eval.drafts import Acceptance, acceptance, score_drafts
from nybble.eval.room import refuse_too_large
from nybble.eval.speed import SpeedUp, draft_cost, speed_up
from nybble.eval.texts import refuse_calibration_text, tokenizer_sha256

OnStep = Callable[[str, int, int], None]
"""(what is running, steps of it done, of how many)."""
PROMPT_TOKENS = 128
"""Of each window, to be continued on policy."""
RANDOM_HEAD = 0.05
"""Rates of the first draft below this are no better than chance on repetitive text."""


@dataclass(frozen=True)
class Settings:
    """How checkpoints are measured."""

    how: Arithmetic
    num_drafts: int = 4
    new_tokens: int | None = None
    """Also on text that the checkpoint writes itself, so many tokens a prompt."""
    allow_overlap: bool = False


@dataclass(frozen=True)
class Figures:
    """One way of accepting drafts; entries are per draft, first to last."""

    rates: tuple[float, ...]
    """Share of steps whose drafts up to this one are all accepted."""
    standard_errors: tuple[float, ...]
    tokens_per_step: float
    """Mean accepted length, the trunk's own token included."""


@dataclass(frozen=True)
class Counted:
    """Greedy decoding of the checkpoint's own text, counted as an engine does."""

    steps: int
    accepted: tuple[int, ...]
    rates: tuple[float, ...]
    tokens_per_step: float


@dataclass(frozen=True)
class ClassFigures:
    """What was found on one class, or over all of them."""

    greedy: Figures
    """Given text; a draft must be the trunk's most likely token."""
    sampled: Figures
    """Given text; temperature 1, by the sum of min(p, q)."""
    on_policy: Counted | None

    @property
    def headline(self) -> Figures | Counted:
        """The greedy figures, of the checkpoint's own text where it was written."""
        return self.on_policy or self.greedy


@dataclass(frozen=True)
class Measured:
    """One checkpoint's figures."""

    checkpoint: str
    weight_bytes: int
    classes: dict[str, ClassFigures]
    overall: ClassFigures
    """On given text each class weighs the same; on its own each step does."""
    speed_up: SpeedUp
    """Of the headline figures."""

    @property
    def first_draft(self) -> float:
        """The rate that a gate looks at."""
        return self.overall.headline.rates[0]


@dataclass(frozen=True)
class TextFacts:
    """What a class was measured on."""

    name: str
    source: str
    windows: int
    seqlen: int
    positions: int
    windows_sha256: str


@dataclass(frozen=True)
class AcceptReport:
    """Everything ``nybble accept`` measured, and under which conditions."""

    num_drafts: int
    texts: tuple[TextFacts, ...]
    notes: tuple[str, ...]
    tokenizer_sha256: str
    arithmetic: str
    prompt_tokens: int | None
    """On policy; None: not measured."""
    new_tokens: int | None
    checkpoints: tuple[Measured, ...]
    versions: dict[str, str]
    schema: str = "nybble.accept/1"


def refuse_unmeasurable(
    checkpoints: Sequence[Path], texts: Sequence[ClassText], settings: Settings
) -> None:
    """Raises before any work: CheckpointError for a checkpoint that cannot be read, has no MTP
    head, another tokenizer than the first or, on policy, no room in memory; DataError for one
    that was calibrated on a text."""
    first = checkpoints[0]
    for folder in checkpoints:
        if tokenizer_sha256(folder) != tokenizer_sha256(first):
            raise CheckpointError(
                f"{folder} has another tokenizer than {first}: their tokens are not comparable"
            )
        if not settings.allow_overlap:
            for text in texts:
                refuse_calibration_text(folder, text.rows)
        with ModelWeights(folder) as weights:
            if weights.arch.mtp is None:
                raise CheckpointError(f"{folder} has no MTP head: there is nothing to accept")
            if settings.new_tokens is not None:
                longest = PROMPT_TOKENS + settings.new_tokens
                refuse_too_large(weights, settings.how, settings.how.rows_per_pass * longest)


def measure(
    folder: Path, texts: Sequence[ClassText], settings: Settings, on_step: OnStep
) -> Measured:
    """Figures of one checkpoint. Raises CheckpointError if it cannot be read or has no MTP head."""
    with ModelWeights(folder) as weights:
        given = _on_given_text(weights, texts, settings, on_step)
        cost = draft_cost(weights)
        weight_bytes = weights.reader.index.total_bytes
    written: dict[str, AcceptanceResult] = {}
    if settings.new_tokens is not None:
        written = _on_its_own_text(folder, texts, settings, settings.new_tokens, on_step)
    classes = {
        text.name: _class_figures([given[text.name]], [written[text.name]] if written else [])
        for text in texts
    }
    overall = _class_figures(list(given.values()), list(written.values()))
    worth = speed_up(overall.headline.rates, cost)
    return Measured(str(folder), weight_bytes, classes, overall, worth)


def report(
    found: ClassTexts, tokenizer: str, settings: Settings, measured: Sequence[Measured]
) -> AcceptReport:
    """Figures and conditions together; ``tokenizer`` is its hash."""
    is_on_policy = settings.new_tokens is not None
    return AcceptReport(
        num_drafts=settings.num_drafts,
        texts=tuple(_facts(text, settings.num_drafts) for text in found.texts),
        notes=found.notes,
        tokenizer_sha256=tokenizer,
        arithmetic=str(settings.how),
        prompt_tokens=PROMPT_TOKENS if is_on_policy else None,
        new_tokens=settings.new_tokens,
        checkpoints=tuple(measured),
        versions={name: version(name) for name in ("nybble", "torch", "transformers")},
    )


def _on_given_text(
    weights: ModelWeights, texts: Sequence[ClassText], settings: Settings, on_step: OnStep
) -> dict[str, tuple[Acceptance, Acceptance]]:
    """(greedy, sampled) of each class; windows of one length pass the model together."""
    what = f"{weights.reader.index.folder.name} on given text"
    by_length: dict[int, list[ClassText]] = {}
    for text in texts:
        by_length.setdefault(text.rows.token_ids.shape[1], []).append(text)
    found = {}
    for group in by_length.values():
        windows = torch.cat([text.rows.token_ids for text in group])
        scores = score_drafts(
            weights,
            windows,
            settings.how,
            settings.num_drafts,
            lambda done, of: on_step(what, done, of),
        )
        counts = [len(text.rows.token_ids) for text in group]
        parts = (scores.greedy.split(counts), scores.sampled.split(counts))
        for text, greedy, sampled in zip(group, *parts, strict=True):
            found[text.name] = (acceptance(greedy), acceptance(sampled))
    return found


def _on_its_own_text(
    folder: Path, texts: Sequence[ClassText], settings: Settings, new_tokens: int, on_step: OnStep
) -> dict[str, AcceptanceResult]:
    how = settings.how
    model = load_model(folder, str(how.device), how.dtype)
    found = {}
    for number, text in enumerate(texts, start=1):
        prompts = text.rows.token_ids[:, :PROMPT_TOKENS].to(how.device)
        found[text.name] = _pooled(
            [
                measure_acceptance(model, some, new_tokens, settings.num_drafts)
                for some in prompts.split(how.rows_per_pass)
            ]
        )
        on_step(f"{folder.name} on its own text", number, len(texts))
    return found


def _class_figures(
    given: Sequence[tuple[Acceptance, Acceptance]], written: Sequence[AcceptanceResult]
) -> ClassFigures:
    """Of one class or several; ``written`` is empty if no text was."""
    return ClassFigures(
        greedy=_mean([greedy for greedy, _ in given]),
        sampled=_mean([sampled for _, sampled in given]),
        on_policy=_counted(written) if written else None,
    )


def _mean(classes: Sequence[Acceptance]) -> Figures:
    """Over classes that weigh the same; their errors are independent."""
    count = len(classes)
    rates = zip(*(one.rates for one in classes), strict=True)
    errors = zip(*(one.standard_errors for one in classes), strict=True)
    mean = Acceptance(
        tuple(sum(column) / count for column in rates),
        tuple(math.hypot(*column) / count for column in errors),
    )
    return Figures(mean.rates, mean.standard_errors, mean.tokens_per_step)


def _counted(results: Sequence[AcceptanceResult]) -> Counted:
    pooled = _pooled(results)
    return Counted(pooled.steps, pooled.accepted, pooled.rates, pooled.tokens_per_step)


def _pooled(results: Sequence[AcceptanceResult]) -> AcceptanceResult:
    accepted = zip(*(result.accepted for result in results), strict=True)
    return AcceptanceResult(sum(result.steps for result in results), tuple(map(sum, accepted)))


def _facts(text: ClassText, num_drafts: int) -> TextFacts:
    windows, seqlen = text.rows.token_ids.shape
    return TextFacts(
        name=text.name,
        source=text.source,
        windows=windows,
        seqlen=seqlen,
        positions=windows * (seqlen - num_drafts),
        windows_sha256=text.rows.digest,
    )
