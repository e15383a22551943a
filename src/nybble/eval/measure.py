"""``nybble kld``: checkpoints against their base, or against a reference file made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, InstanceOf

from nybble.core.errors import CheckpointError
from nybble.data.rows import Rows, rows_of
from nybble.engine.stream import Arithmetic
from nybble.engine.weights import ModelWeights
from nybble.eval.compare import output_on
from nybble.eval.head_pass import Output
from nybble.eval.kld import Scores, score
from nybble.eval.reference import Reference, ReferenceFacts, load_reference
from nybble.eval.statistics import KldStatistics, NoiseFloor, Worst, noise_floor, statistics
from nybble.eval.texts import (
    Text,
    open_tokenizer,
    refuse_calibration_text,
    tokenizer_sha256,
    windows_of,
)
from nybble.eval.top_k import TopK, score_against_top_k, top_k

OnPass = Callable[[str, int, int], None]
"""(what is running, blocks done, of how many)."""
DEFAULT_TOP_K = 1000


@dataclass(frozen=True)
class Settings:
    """How checkpoints are measured."""

    how: Arithmetic
    top_k: int | None = None
    """Also report the truncated form, of this many tokens a position."""
    noise: bool = True
    """Also measure the base against itself."""
    allow_overlap: bool = False


@dataclass(frozen=True)
class Truth:
    """What candidates are held against: a base, or what a file holds of one."""

    name: str
    text: str
    rows: Rows
    tokenizer_sha256: str
    states: torch.Tensor | None
    """[P, D] after the final norm; None: only the most likely tokens are known."""
    head: ModelWeights | None
    """The base, for its output head; None: not at hand."""
    head_sha256: str | None
    vocab_size: int
    top_k: TopK | None
    noise: tuple[NoiseFloor, ...]

    @property
    def tokens(self) -> torch.Tensor:
        """int64 [P]: the next token at every scored position."""
        return self.rows.token_ids[:, 1:].flatten()

    def output(self, candidate: ModelWeights) -> Output:
        """Its last step. A candidate whose head is the base's own can lend it."""
        assert self.states is not None
        head = self.head
        if head is None:
            # A quantized head has no hash, and is nobody else's.
            if self.head_sha256 is None or candidate.head_sha256() != self.head_sha256:
                raise CheckpointError(
                    f"{candidate.reader.index.folder} has another output head than the base that "
                    f"{self.name} was made of: give the base's folder by --head"
                )
            head = candidate
        return Output(self.states, head.head_rows, head.vocab_size)


@dataclass(frozen=True)
class Position:
    """One of the worst positions, with its text."""

    worst: Worst
    before: str
    """The end of what the models were given."""
    token: str
    base_top: str
    candidate_top: str


@dataclass(frozen=True)
class Measured:
    """One candidate's figures."""

    checkpoint: str
    weight_bytes: int
    full: KldStatistics | None
    """Over the whole vocabulary; None: the reference holds the most likely tokens alone."""
    truncated: KldStatistics | None
    """Over the base's most likely tokens; a lower bound."""
    worst: tuple[Position, ...]
    scores: Annotated[InstanceOf[Scores], Field(exclude=True)] = field(compare=False, repr=False)
    """What ``best`` is of, at every position: for figures, not for the report's file."""

    @property
    def best(self) -> KldStatistics:
        """The full figures where there are any."""
        found = self.full or self.truncated
        assert found is not None
        return found


@dataclass(frozen=True)
class KldReport:
    """Everything ``nybble kld`` measured, and under which conditions."""

    base: str
    text: str
    windows: int
    seqlen: int
    positions: int
    windows_sha256: str
    tokenizer_sha256: str
    arithmetic: str
    noise: tuple[NoiseFloor, ...]
    top_k: int | None
    coverage: float | None
    """Mean mass of the base's ``top_k`` most likely tokens."""
    candidates: tuple[Measured, ...]
    versions: dict[str, str]
    schema: str = "nybble.kld/1"


def truth_of_base(
    weights: ModelWeights,
    text: Text,
    settings: Settings,
    on_pass: OnPass,
    candidates: Sequence[Path] = (),
) -> Truth:
    """Runs the base over the text; ``weights`` stay in use.

    Raises DataError for the text, and, before that long pass, what ``measure_candidate`` would
    raise for the candidates.
    """
    folder = weights.reader.index.folder
    rows = windows_of(text, open_tokenizer(folder))
    for candidate in candidates:
        _refuse(candidate, rows, tokenizer_sha256(folder), str(folder), settings)
        ModelWeights(candidate).reader.close()
    output = output_on(weights, rows.token_ids, settings.how, partial(on_pass, "base"))
    truth = Truth(
        name=str(folder),
        text=str(text),
        rows=rows,
        tokenizer_sha256=tokenizer_sha256(folder),
        states=output.states,
        head=weights,
        head_sha256=weights.head_sha256(),
        vocab_size=weights.vocab_size,
        top_k=None,
        noise=(),
    )
    if settings.noise:
        truth = replace(truth, noise=_noise(weights, truth, output, settings.how, on_pass))
    if settings.top_k:
        k = min(settings.top_k, output.vocab_size)
        truth = replace(truth, top_k=top_k(output, truth.tokens, k, settings.how.device))
    return truth


def truth_of_file(path: Path, head: ModelWeights | None) -> Truth:
    """What a reference file holds.

    Raises CheckpointError for a file that is none, and for a ``head`` that is not of its base.
    """
    reference = load_reference(path)
    facts, predictions = reference.facts, reference.predictions
    if head is not None and not _is_base_of(facts, head):
        raise CheckpointError(
            f"{head.reader.index.folder} has another output head than the base that {path} was "
            f"made of, {facts.base}: give that one by --head"
        )
    return Truth(
        name=str(path),
        text=facts.text,
        rows=rows_of(reference.windows.tolist(), reference.windows.shape[1]),
        tokenizer_sha256=facts.tokenizer_sha256,
        states=None if isinstance(predictions, TopK) else predictions,
        head=head,
        head_sha256=facts.head_sha256,
        vocab_size=facts.vocab_size,
        top_k=predictions if isinstance(predictions, TopK) else None,
        noise=facts.noise,
    )


def _is_base_of(facts: ReferenceFacts, head: ModelWeights) -> bool:
    if facts.head_sha256 is None:
        return head.sha256() == facts.base_sha256
    return head.head_sha256() == facts.head_sha256


def reference_of(truth: Truth, how: Arithmetic) -> Reference:
    """What ``save_reference`` writes: truncated if the truth has a truncated form, else exact."""
    assert truth.head is not None
    predictions = truth.top_k or truth.states
    assert predictions is not None
    facts = ReferenceFacts(
        base=truth.name,
        base_sha256=truth.head.sha256(),
        head_sha256=truth.head_sha256,
        vocab_size=truth.vocab_size,
        tokenizer_sha256=truth.tokenizer_sha256,
        text=truth.text,
        windows_sha256=truth.rows.digest,
        arithmetic=str(how),
        noise=truth.noise,
        nybble=version("nybble"),
    )
    return Reference(facts, truth.rows.token_ids, predictions)


def measure_candidate(
    truth: Truth, candidate: Path, settings: Settings, on_pass: OnPass
) -> Measured:
    """Scores one checkpoint.

    Raises CheckpointError if it cannot be read or has another tokenizer, DataError if it was
    calibrated on the text.
    """
    _refuse(candidate, truth.rows, truth.tokenizer_sha256, truth.name, settings)
    with ModelWeights(candidate) as weights:
        if weights.vocab_size != truth.vocab_size:
            raise CheckpointError(
                f"{candidate} has an output head of {weights.vocab_size} tokens, {truth.name} of "
                f"{truth.vocab_size}: their distributions are not over the same tokens"
            )
        watch = partial(on_pass, candidate.name)
        output = output_on(weights, truth.rows.token_ids, settings.how, watch)
        common = (output, truth.tokens, len(truth.rows.token_ids), settings.how.device)
        full = truncated = None
        if truth.states is not None:
            full = score(truth.output(weights), *common)
        if truth.top_k is not None:
            truncated = score_against_top_k(truth.top_k, *common)
    scores = full or truncated
    assert scores is not None
    return Measured(
        checkpoint=str(candidate),
        weight_bytes=weights.reader.index.total_bytes,
        full=statistics(full) if full else None,
        truncated=statistics(truncated) if truncated else None,
        worst=_positions(truth, statistics(scores).worst, open_tokenizer(candidate)),
        scores=scores,
    )


def report(truth: Truth, measured: Sequence[Measured], how: Arithmetic) -> KldReport:
    """Figures and conditions together."""
    windows, seqlen = truth.rows.token_ids.shape
    return KldReport(
        base=truth.name,
        text=truth.text,
        windows=windows,
        seqlen=seqlen,
        positions=len(truth.tokens),
        windows_sha256=truth.rows.digest,
        tokenizer_sha256=truth.tokenizer_sha256,
        arithmetic=str(how),
        noise=truth.noise,
        top_k=truth.top_k.ids.shape[1] if truth.top_k else None,
        coverage=truth.top_k.coverage if truth.top_k else None,
        candidates=tuple(measured),
        versions={name: version(name) for name in ("nybble", "torch", "transformers")},
    )


def _refuse(candidate: Path, rows: Rows, tokenizer: str, base: str, settings: Settings) -> None:
    if tokenizer_sha256(candidate) != tokenizer:
        raise CheckpointError(
            f"{candidate} has another tokenizer than {base}: their distributions are not over the "
            "same tokens"
        )
    if not settings.allow_overlap:
        refuse_calibration_text(candidate, rows)


def _noise(
    weights: ModelWeights, truth: Truth, output: Output, how: Arithmetic, on_pass: OnPass
) -> tuple[NoiseFloor, ...]:
    """The base against itself: rows taken one at a time; and in the other float type as well."""
    other = torch.bfloat16 if how.dtype == torch.float32 else torch.float32
    one_by_one = replace(how, rows_per_pass=1)
    ways = {
        "row by row": one_by_one,
        f"row by row in {str(other).removeprefix('torch.')}": replace(one_by_one, dtype=other),
    }
    floors = []
    for name, way in ways.items():
        again = output_on(weights, truth.rows.token_ids, way, partial(on_pass, f"base, {name}"))
        scores = score(output, again, truth.tokens, len(truth.rows.token_ids), how.device)
        floors.append(noise_floor(name, scores))
    return tuple(floors)


_CONTEXT_TOKENS = 24


def _positions(truth: Truth, worst: Sequence[Worst], tokenizer: Any) -> tuple[Position, ...]:
    def shown(token: int) -> str:
        text = tokenizer.decode([token])
        assert isinstance(text, str)
        return text

    found = []
    for one in worst:
        given = truth.rows.token_ids[one.window, : one.position + 1]
        before = tokenizer.decode(given[-_CONTEXT_TOKENS:])
        names = (shown(token) for token in (one.token, one.base_top, one.candidate_top))
        found.append(Position(one, before, *names))
    return tuple(found)
