from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import Outcome, refusal

Nybble = Callable[..., Outcome]


@pytest.fixture
def few(text_file: Path) -> tuple[str, ...]:
    """Little text of one class, two drafts."""
    return ("--text", f"words={text_file}", "--windows", "2", "--seqlen", "24", "--n", "2")


def table(outcome: Outcome) -> dict[str, list[str]]:
    """Cells by the label of their line."""
    lines = [line.split("  ") for line in outcome.out.splitlines()]
    parts = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {cells[0]: cells[1:] for cells in parts if len(cells) > 1}


def test_checkpoints_stand_side_by_side(
    nybble: Nybble,
    few: tuple[str, ...],
    tiny_base: Path,
    rtn_result: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = nybble("accept", tiny_base, rtn_result, *few, "--on-policy", "--new-tokens", 4)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("MTP drafts, 2 a step; float32 on cpu\n")
    assert "words: 2 windows of 24 tokens of " in outcome.out
    lines = table(outcome)
    assert lines["all classes"] == [tiny_base.name, rtn_result.name]
    for way in ("greedy", "sampled", "on policy"):
        assert all(len(lines[f"{way}, draft {draft}"]) == 2 for draft in (1, 2))
        assert all(1 <= float(cell) <= 3 for cell in lines[f"{way}, tokens per step"])
        assert len(lines[f"words, {way}"]) == 2
    assert "+-" in lines["sampled, draft 1"][0]
    assert lines["speed-up, 2 a step"][0].endswith("x")
    printed = outcome.out.splitlines()
    assert max(len(line) for line in printed if "words.txt" not in line and "/" not in line) <= 80
    assert "on given text: done" in outcome.err


def test_json_holds_figures_and_conditions(
    nybble: Nybble, few: tuple[str, ...], tiny_base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "found.json"
    outcome = nybble("accept", tiny_base, *few, "--json", file)
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["schema"] == "nybble.accept/1"
    assert found["new_tokens"] is None
    (text,) = found["texts"]
    assert (text["name"], text["windows"], text["seqlen"], text["positions"]) == (
        "words",
        2,
        24,
        44,
    )
    (one,) = found["checkpoints"]
    figures = one["classes"]["words"]
    assert one["checkpoint"] == str(tiny_base)
    assert one["overall"] == figures
    assert figures["on_policy"] is None
    for way in ("greedy", "sampled"):
        assert len(figures[way]["rates"]) == len(figures[way]["standard_errors"]) == 2
        assert figures[way]["tokens_per_step"] == pytest.approx(1 + sum(figures[way]["rates"]))
    assert len(one["speed_up"]["expected"]) == 2
    assert set(found["versions"]) == {"nybble", "torch", "transformers"}


def test_two_runs_write_the_same(
    nybble: Nybble, few: tuple[str, ...], tiny_base: Path, tmp_path: Path
) -> None:
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        assert nybble("accept", tiny_base, *few, "--json", file).code == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_gate(nybble: Nybble, few: tuple[str, ...], tiny_base: Path, rtn_result: Path) -> None:
    passed = nybble("accept", tiny_base, *few, "--min", 0)
    assert (passed.code, "fails" in passed.out) == (0, False)
    failed = nybble("accept", tiny_base, rtn_result, *few, "--min", 0.6)
    assert failed.code == 1
    lines = [line for line in failed.out.splitlines() if " fails: " in line]
    assert [line.split()[0] for line in lines] == [str(tiny_base), str(rtn_result)]
    assert all("less than the 60.0% of --min" in line for line in lines)


def test_a_head_that_looks_random_is_pointed_out(
    nybble: Nybble, few: tuple[str, ...], tiny_base: Path
) -> None:
    outcome = nybble("accept", tiny_base, *few)  # its weights are random
    assert outcome.code == 0
    assert f"its head looks random; run: nybble check {tiny_base}" in outcome.out


def test_without_a_head_there_is_nothing_to_accept(
    nybble: Nybble, few: tuple[str, ...], make_tiny: Callable[..., Path]
) -> None:
    outcome = nybble("accept", make_tiny(mtp=False), *few)
    assert "has no MTP head" in refusal(outcome)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--text", "words.txt"), "is not CLASS=SOURCE"),
        (("--text", "=words.txt"), "is not CLASS=SOURCE"),
        (("--text", "a=b.txt", "--text", "a=b.txt"), "twice"),
        (("--text", "a=nothing"), "unknown source 'nothing'"),
        (("--dtype", "float16"), "dtype 'float16' is unknown"),
        (("--device", "tpu"), "device 'tpu'"),
        (("--on-policy", "--new-tokens", "4"), "leaves no room for 4 drafts"),
    ],
)
def test_bad_options_are_one_line(
    nybble: Nybble, tiny_base: Path, wrong: tuple[str, ...], said: str
) -> None:
    assert said in refusal(nybble("accept", tiny_base, *wrong))


def test_more_drafts_than_a_window_has_room_for(
    nybble: Nybble, tiny_base: Path, text_file: Path
) -> None:
    outcome = nybble("accept", tiny_base, "--text", f"a={text_file}", "--seqlen", 8, "--n", 7)
    assert "windows of 8 tokens leave no room for 7 drafts" in refusal(outcome)
