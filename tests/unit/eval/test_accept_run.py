from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import VOCAB

from nybble.core.errors import CheckpointError, DataError
from nybble.data.rows import rows_of
from nybble.engine.load import load_model
from nybble.engine.stream import Arithmetic
from nybble.engine.weights import ModelWeights
from nybble.eval.accept import (
    PROMPT_TOKENS,
    Measured,
    Settings,
    measure,
    refuse_unmeasurable,
    report,
)
from nybble.eval.acceptance import AcceptanceResult, measure_acceptance
from nybble.eval.classes import ClassText, ClassTexts
from nybble.eval.drafts import acceptance, score_drafts

CPU = Arithmetic(torch.device("cpu"))
DRAFTS = 2


def class_text(name: str, rows: int, seqlen: int, seed: int) -> ClassText:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, seqlen), generator=generator)
    return ClassText(name, f"{name}.txt", rows_of(ids.tolist(), seqlen))


TEXTS = (class_text("a", 3, 24, 1), class_text("b", 2, 24, 2), class_text("c", 2, 16, 3))
Steps = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def run(tiny_base: Path) -> tuple[Measured, Steps]:
    steps: Steps = []
    settings = Settings(CPU, DRAFTS, new_tokens=6)
    found = measure(tiny_base, TEXTS, settings, lambda *step: steps.append(step))
    return found, steps


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_each_class_is_as_if_it_were_alone(
    run: tuple[Measured, Steps], tiny_base: Path, text: ClassText
) -> None:
    with ModelWeights(tiny_base) as weights:
        alone = score_drafts(weights, text.rows.token_ids, CPU, DRAFTS)
    figures = run[0].classes[text.name]
    greedy, sampled = acceptance(alone.greedy), acceptance(alone.sampled)
    assert figures.greedy.rates == greedy.rates
    assert figures.sampled.rates == pytest.approx(sampled.rates, rel=1e-4)
    assert figures.sampled.standard_errors == pytest.approx(sampled.standard_errors, rel=1e-3)
    assert figures.sampled.tokens_per_step == pytest.approx(1 + sum(sampled.rates), rel=1e-4)


def test_over_all_given_text_classes_weigh_the_same(run: tuple[Measured, Steps]) -> None:
    found, _ = run
    ways = [figures.sampled for figures in found.classes.values()]
    for draft in range(DRAFTS):
        mean = sum(way.rates[draft] for way in ways) / 3
        error = math.sqrt(sum(way.standard_errors[draft] ** 2 for way in ways)) / 3
        assert found.overall.sampled.rates[draft] == pytest.approx(mean)
        assert found.overall.sampled.standard_errors[draft] == pytest.approx(error)
    assert found.overall.sampled.tokens_per_step == pytest.approx(
        1 + sum(found.overall.sampled.rates)
    )


def test_its_own_text_continues_the_windows(run: tuple[Measured, Steps], tiny_base: Path) -> None:
    model = load_model(tiny_base)
    alone = [
        measure_acceptance(model, text.rows.token_ids[:, :PROMPT_TOKENS], 6, DRAFTS)
        for text in TEXTS
    ]
    found, _ = run
    for text, one in zip(TEXTS, alone, strict=True):
        counted = found.classes[text.name].on_policy
        assert counted is not None
        assert (counted.steps, counted.accepted) == (one.steps, one.accepted)
        assert (counted.rates, counted.tokens_per_step) == (one.rates, one.tokens_per_step)


def test_prompts_are_the_starts_of_windows_some_at_a_time(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = class_text("long", rows=10, seqlen=PROMPT_TOKENS + 8, seed=4)
    seen: list[torch.Tensor] = []

    def counted(_model: object, prompts: torch.Tensor, *_: int) -> AcceptanceResult:
        seen.append(prompts)
        return AcceptanceResult(steps=len(prompts), accepted=(2, 1))

    monkeypatch.setattr("nybble.eval.accept.measure_acceptance", counted)
    found = measure(tiny_base, [text], Settings(CPU, DRAFTS, new_tokens=6), lambda *_: None)
    assert [len(prompts) for prompts in seen] == [8, 2]
    assert torch.equal(torch.cat(seen), text.rows.token_ids[:, :PROMPT_TOKENS])
    assert found.overall.on_policy is not None
    assert (found.overall.on_policy.steps, found.overall.on_policy.accepted) == (10, (4, 2))


def test_over_all_its_own_text_steps_weigh_the_same(run: tuple[Measured, Steps]) -> None:
    found, _ = run
    classes = [figures.on_policy for figures in found.classes.values() if figures.on_policy]
    overall = found.overall.on_policy
    assert overall is not None
    assert overall.steps == sum(one.steps for one in classes)
    assert overall.accepted[0] == sum(one.accepted[0] for one in classes)
    assert overall.rates[0] == overall.accepted[0] / overall.steps


def test_gate_and_speed_up_are_of_its_own_text_where_there_is_some(
    run: tuple[Measured, Steps], tiny_base: Path
) -> None:
    found, _ = run
    assert found.overall.on_policy is not None
    assert found.overall.headline is found.overall.on_policy
    assert found.first_draft == found.overall.on_policy.rates[0]
    given = measure(tiny_base, TEXTS[:1], Settings(CPU, DRAFTS), lambda *_: None)
    assert given.overall.on_policy is None
    assert given.first_draft == given.overall.greedy.rates[0]
    cost = given.speed_up.draft_cost
    rates = given.overall.greedy.rates
    assert given.speed_up.expected == pytest.approx(
        ((1 + rates[0]) / (1 + cost), (1 + sum(rates)) / (1 + 2 * cost))
    )


def test_windows_of_one_length_pass_the_model_together(run: tuple[Measured, Steps]) -> None:
    _, steps = run
    given = [(done, of) for what, done, of in steps if what.endswith("given text")]
    assert given == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2  # two lengths
    assert [(d, of) for what, d, of in steps if what.endswith("own text")] == [
        (1, 3),
        (2, 3),
        (3, 3),
    ]


def test_the_report_says_what_was_measured(run: tuple[Measured, Steps]) -> None:
    made = report(ClassTexts(TEXTS, ("d is left out",)), "00ff", Settings(CPU, DRAFTS), [run[0]])
    assert [(t.name, t.windows, t.seqlen, t.positions) for t in made.texts] == [
        ("a", 3, 24, 66),
        ("b", 2, 24, 44),
        ("c", 2, 16, 28),
    ]
    assert made.texts[0].windows_sha256 == TEXTS[0].rows.digest
    assert (made.num_drafts, made.new_tokens, made.prompt_tokens) == (2, None, None)
    assert made.arithmetic == "float32 on cpu"
    assert made.notes == ("d is left out",)
    assert made.schema == "nybble.accept/1"


def test_a_checkpoint_without_a_head_is_refused(
    tiny_base: Path, make_tiny: Callable[..., Path]
) -> None:
    bare = make_tiny(mtp=False)
    with pytest.raises(CheckpointError, match="has no MTP head"):
        refuse_unmeasurable([tiny_base, bare], TEXTS, Settings(CPU))


def test_another_tokenizer_is_refused(tiny_base: Path, make_tiny: Callable[..., Path]) -> None:
    other = make_tiny("other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        refuse_unmeasurable([tiny_base, other], TEXTS, Settings(CPU))


def test_text_of_the_calibration_is_refused_unless_allowed(make_tiny: Callable[..., Path]) -> None:
    folder = make_tiny()
    seen = {"calibration": {"row_sha256": [TEXTS[1].rows.hashes[1]]}}
    (folder / "nybble.json").write_text(json.dumps(seen))
    with pytest.raises(DataError, match="used in calibration"):
        refuse_unmeasurable([folder], TEXTS, Settings(CPU))
    refuse_unmeasurable([folder], TEXTS, Settings(CPU, allow_overlap=True))


def test_room_is_asked_for_on_policy_alone(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.eval.room.available_bytes", lambda _: 0)
    refuse_unmeasurable([tiny_base], TEXTS, Settings(CPU))
    with pytest.raises(CheckpointError, match="does not fit"):
        refuse_unmeasurable([tiny_base], TEXTS, Settings(CPU, new_tokens=6))
