from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from support.checkpoints import read_json, read_weights, write_json, write_weights
from support.outputs import CPU

from nybble.core.errors import CheckpointError, DataError
from nybble.engine.stream import Arithmetic
from nybble.engine.weights import ModelWeights
from nybble.eval.compare import compare
from nybble.eval.measure import (
    KldReport,
    Measured,
    Settings,
    Truth,
    measure_candidate,
    reference_of,
    report,
    truth_of_base,
    truth_of_file,
)
from nybble.eval.reference import load_reference, save_reference
from nybble.eval.statistics import statistics
from nybble.eval.texts import Text, open_tokenizer
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import Recipe, Rtn, Scheme

HOW = Arithmetic(CPU)
PLAIN = Settings(HOW, noise=False)
BOTH = replace(PLAIN, top_k=20)


def unwatched(_name: str, _done: int, _of: int) -> None:
    pass


@pytest.fixture(scope="module")
def text(text_file: Path) -> Text:
    return Text(str(text_file), windows=4, seqlen=24)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Iterator[ModelWeights]:
    with ModelWeights(tiny_base) as weights:
        yield weights


@pytest.fixture(scope="module")
def truth(base: ModelWeights, text: Text) -> Truth:
    return truth_of_base(base, text, BOTH, unwatched)


@pytest.fixture
def reference(truth: Truth, tmp_path: Path) -> Callable[[str], Path]:
    """A file of either form."""

    def save(form: str) -> Path:
        content = truth if form == "top-k" else replace(truth, top_k=None)
        save_reference(tmp_path / form, reference_of(content, HOW))
        return tmp_path / form

    return save


@pytest.fixture
def another_head(tiny_base: Path, tmp_path: Path) -> Path:
    """The base with one bit of its output head changed."""
    folder = tmp_path / "another"
    shutil.copytree(tiny_base, folder)
    weights = read_weights(folder)
    weights["lm_head.weight"].view(torch.int16)[0, 0] ^= 1
    write_weights(folder, weights)
    return folder


def figures(measured: Measured) -> str:
    """All of them, exactly; NaN equals NaN."""
    return TypeAdapter(Measured).dump_json(measured).decode()


def test_figures_are_those_of_compare(truth: Truth, tiny_base: Path, rtn_result: Path) -> None:
    measured = measure_candidate(truth, rtn_result, PLAIN, unwatched)
    expected = statistics(compare(tiny_base, rtn_result, truth.rows.token_ids, HOW))
    assert measured.full is not None
    assert repr(measured.full) == repr(expected)
    assert 0.001 < measured.full.kld.mean < 1
    assert measured.best is measured.full
    stored = sum(tensor.nbytes for tensor in read_weights(rtn_result).values())
    assert measured.weight_bytes == stored


def test_two_runs_are_equal_bit_for_bit(truth: Truth, rtn_result: Path) -> None:
    one, other = (measure_candidate(truth, rtn_result, BOTH, unwatched) for _ in range(2))
    assert figures(one) == figures(other)


def test_a_base_measured_against_itself(truth: Truth, tiny_base: Path) -> None:
    measured = measure_candidate(truth, tiny_base, BOTH, unwatched)
    assert measured.full is not None
    assert (measured.full.kld.mean, measured.full.max, measured.full.same_top.mean) == (0, 0, 1)
    assert measured.truncated is not None
    assert abs(measured.truncated.kld.mean) < 1e-7


def test_the_truncated_form_is_a_lower_bound(truth: Truth, rtn_result: Path) -> None:
    measured = measure_candidate(truth, rtn_result, BOTH, unwatched)
    assert measured.full is not None
    assert measured.truncated is not None
    assert 0 < measured.truncated.kld.mean < measured.full.kld.mean
    assert truth.top_k is not None
    assert 0.2 < truth.top_k.coverage < 1
    assert measured.truncated.base_perplexity == measured.full.base_perplexity
    assert measured.truncated.candidate_perplexity == measured.full.candidate_perplexity


def test_an_exact_file_scores_as_the_base_bit_for_bit(
    truth: Truth, base: ModelWeights, rtn_result: Path, reference: Callable[[str], Path]
) -> None:
    expected = measure_candidate(replace(truth, top_k=None), rtn_result, PLAIN, unwatched)
    for head in (None, base):  # the candidate's own head is the base's
        found = measure_candidate(
            truth_of_file(reference("exact"), head), rtn_result, PLAIN, unwatched
        )
        assert figures(found) == figures(expected)


def test_a_truncated_file_scores_as_the_truncated_form(
    truth: Truth, rtn_result: Path, reference: Callable[[str], Path]
) -> None:
    expected = measure_candidate(truth, rtn_result, BOTH, unwatched)
    found = measure_candidate(truth_of_file(reference("top-k"), None), rtn_result, PLAIN, unwatched)
    assert found.full is None
    assert repr(found.truncated) == repr(expected.truncated)


def test_a_file_says_what_it_was_made_of(
    truth: Truth, base: ModelWeights, reference: Callable[[str], Path]
) -> None:
    for form in ("exact", "top-k"):
        facts = load_reference(reference(form)).facts
        assert facts.base_sha256 == base.sha256()
        assert facts.head_sha256 == base.reader.sha256("lm_head.weight")
        assert facts.windows_sha256 == truth.rows.digest
        assert facts.tokenizer_sha256 == truth.tokenizer_sha256
        assert facts.arithmetic == "float32 on cpu"
        again = truth_of_file(reference(form), None)
        assert (again.text, again.rows.hashes) == (truth.text, truth.rows.hashes)


def test_a_candidate_with_another_head_needs_the_bases(
    truth: Truth, base: ModelWeights, another_head: Path, reference: Callable[[str], Path]
) -> None:
    file = reference("exact")
    with pytest.raises(CheckpointError, match=r"has another output head .*--head") as caught:
        measure_candidate(truth_of_file(file, None), another_head, PLAIN, unwatched)
    assert "\n" not in str(caught.value)
    found = measure_candidate(truth_of_file(file, base), another_head, PLAIN, unwatched)
    expected = measure_candidate(truth, another_head, PLAIN, unwatched)
    assert repr(found.full) == repr(expected.full)


def test_the_head_that_is_given_must_be_the_bases(
    another_head: Path, reference: Callable[[str], Path]
) -> None:
    with (
        ModelWeights(another_head) as wrong,
        pytest.raises(CheckpointError, match="another output head"),
    ):
        truth_of_file(reference("exact"), wrong)


def test_a_quantized_head_is_never_taken_for_the_bases(
    tiny_base: Path, text: Text, tmp_path: Path
) -> None:
    """A base may have one as well; no hash tells them apart."""
    folders = []
    for bits in (8, 4):
        recipe = Recipe(algorithm=Rtn(), scheme=Scheme(lm_head_bits=bits))
        folders.append(quantize(tiny_base, tmp_path / str(bits), recipe, "cpu").out)
    with ModelWeights(folders[0]) as base:
        truth = truth_of_base(base, text, PLAIN, unwatched)
        save_reference(tmp_path / "r", reference_of(truth, HOW))
    with pytest.raises(CheckpointError, match=r"another output head"):
        measure_candidate(truth_of_file(tmp_path / "r", None), folders[1], PLAIN, unwatched)
    with ModelWeights(folders[1]) as wrong, pytest.raises(CheckpointError, match="another output"):
        truth_of_file(tmp_path / "r", wrong)
    with ModelWeights(folders[0]) as right:
        found = measure_candidate(
            truth_of_file(tmp_path / "r", right), folders[0], PLAIN, unwatched
        )
    assert found.best.max == 0


def test_another_tokenizer_is_refused(truth: Truth, rtn_result: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(rtn_result, folder)
    tokenizer = read_json(folder / "tokenizer.json")
    tokenizer["model"]["merges"].pop()
    write_json(folder / "tokenizer.json", tokenizer)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        measure_candidate(truth, folder, PLAIN, unwatched)


def test_another_vocabulary_is_refused(
    truth: Truth, tiny_base: Path, make_tiny: Callable[..., Path]
) -> None:
    for vocabulary in (310, 330):
        other = make_tiny(str(vocabulary), text=(("vocab_size", vocabulary),))
        with pytest.raises(CheckpointError, match=rf"{vocabulary}.*320|320.*{vocabulary}"):
            measure_candidate(truth, other, PLAIN, unwatched)
        with pytest.raises(CheckpointError, match=rf"{vocabulary}.*320|320.*{vocabulary}"):
            compare(tiny_base, other, truth.rows.token_ids, HOW)


def test_text_used_in_calibration_is_refused_unless_allowed(
    base: ModelWeights, text_file: Path, signround_result: Path
) -> None:
    hashes = read_json(signround_result / "nybble.json")["calibration"]["row_sha256"]
    seen = truth_of_base(base, Text(str(text_file), 4, 32), PLAIN, unwatched)
    assert set(seen.rows.hashes) <= set(hashes)
    with pytest.raises(DataError, match=r"4 of 4 .* used in calibration .*--allow-overlap"):
        measure_candidate(seen, signround_result, PLAIN, unwatched)
    allowed = replace(PLAIN, allow_overlap=True)
    assert measure_candidate(seen, signround_result, allowed, unwatched).best.positions == 4 * 31


def test_the_noise_floor_is_far_below_a_quantized_models_divergence(
    base: ModelWeights, text: Text, rtn_result: Path
) -> None:
    truth = truth_of_base(base, text, Settings(HOW), unwatched)
    by_rows, by_type = truth.noise
    assert abs(by_rows.mean) < 1e-7
    assert 1e-6 < by_type.mean < 1e-2
    assert by_type.how == "row by row in bfloat16"
    full = measure_candidate(truth, rtn_result, PLAIN, unwatched).full
    assert full is not None
    assert full.kld.mean > 10 * by_type.mean
    opposite = Arithmetic(CPU, torch.bfloat16)
    there = truth_of_base(base, text, Settings(opposite), unwatched).noise[1]
    assert there.how == "row by row in float32"
    assert there.mean == pytest.approx(by_type.mean, rel=0.3)


def test_passes_are_named(base: ModelWeights, text: Text, rtn_result: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    truth = truth_of_base(base, text, Settings(HOW), lambda *step: seen.append(step))
    measure_candidate(truth, rtn_result, PLAIN, lambda *step: seen.append(step))
    names = ["base", "base, row by row", "base, row by row in bfloat16", rtn_result.name]
    assert seen == [(name, block, 4) for name in names for block in (1, 2, 3, 4)]


def test_the_worst_positions_have_their_text(
    truth: Truth, base: ModelWeights, rtn_result: Path
) -> None:
    tokenizer = open_tokenizer(base.reader.index.folder)
    first = measure_candidate(truth, rtn_result, PLAIN, unwatched).worst[0]
    window = truth.rows.token_ids[first.worst.window].tolist()
    position = first.worst.position
    assert tokenizer.decode(window[: position + 1]).endswith(first.before)
    assert first.token == tokenizer.decode([window[position + 1]])
    assert first.base_top == tokenizer.decode([first.worst.base_top])
    assert first.candidate_top == tokenizer.decode([first.worst.candidate_top])


def test_a_report_is_plain_json(truth: Truth, rtn_result: Path) -> None:
    measured = [measure_candidate(truth, rtn_result, BOTH, unwatched)]
    made = report(truth, measured, HOW)
    found = json.loads(TypeAdapter(KldReport).dump_json(made))
    assert found["schema"] == "nybble.kld/1"
    assert (found["windows"], found["seqlen"], found["positions"]) == (4, 24, 4 * 23)
    assert found["top_k"] == 20
    assert found["coverage"] == pytest.approx(truth.top_k.coverage if truth.top_k else None)
    assert found["windows_sha256"] == truth.rows.digest
    assert found["candidates"][0]["full"]["kld"]["mean"] == made.candidates[0].best.kld.mean
