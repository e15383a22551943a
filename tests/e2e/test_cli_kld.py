"""``nybble kld`` as a command: tables, files, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import Outcome, refusal

Nybble = Callable[..., Outcome]


@pytest.fixture
def small(text_file: Path) -> list[str]:
    return ["--text", str(text_file), "--windows", "6", "--seqlen", "32"]


def test_two_checkpoints_side_by_side(
    nybble: Nybble, tiny_base: Path, rtn_result: Path, small: list[str], tmp_path: Path
) -> None:
    results = tmp_path / "kld.json"
    outcome = nybble("kld", tiny_base, rtn_result, tiny_base, *small, "--json", results)
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines[0].startswith("KL(base || checkpoint) in nats, 186 positions: 6 windows of 32")
    mean = next(line for line in lines if line.startswith("Mean KLD  "))
    assert mean.split()[-1] == "0.000000"
    assert float(mean.split()[-2]) > 0
    found = json.loads(results.read_text())
    assert (found["schema"], found["positions"]) == ("nybble.kld/1", 186)
    quantized, itself = found["candidates"]
    assert quantized["full"]["kld"]["mean"] > 0 == itself["full"]["kld"]["mean"]
    assert [floor["how"] for floor in found["noise"]] == ["row by row", "row by row in bfloat16"]
    # The base against itself is below its own rounding, and the table says so.
    assert "below twice this" in outcome.out


def test_a_reference_file_stands_for_the_base(
    nybble: Nybble, tiny_base: Path, rtn_result: Path, small: list[str], tmp_path: Path
) -> None:
    exact, short = tmp_path / "exact.safetensors", tmp_path / "short.safetensors"
    for file, options in ((exact, []), (short, ["--top-k", "20"])):
        made = nybble("kld", tiny_base, *small, *options, "--save-reference", file, "--no-noise")
        assert made.code == 0, made
    files = {}
    for name, base in (("base", tiny_base), ("exact", exact), ("short", short)):
        files[name] = tmp_path / f"{name}.json"
        options = [*small, "--no-noise"] if name == "base" else []
        assert nybble("kld", base, rtn_result, *options, "--json", files[name]).code == 0
    base, from_exact, from_short = (
        json.loads(file.read_text())["candidates"][0] for file in files.values()
    )
    assert from_exact["full"] == base["full"]
    assert from_short["full"] is None
    assert 0 < from_short["truncated"]["kld"]["mean"] < base["full"]["kld"]["mean"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--windows", "5000"], "asked for 5000 rows of 32 tokens"),
        (["--dtype", "float16"], "'float16' is unknown: give float32 or bfloat16"),
        (["--device", "tpu"], "'tpu' is not cpu, cuda"),
        (["--text", "no/such/file.txt"], "no/such/file.txt"),
    ],
)
def test_bad_input_is_one_line(
    nybble: Nybble, tiny_base: Path, small: list[str], options: list[str], message: str
) -> None:
    assert message in refusal(nybble("kld", tiny_base, tiny_base, *small, *options))


def test_a_file_that_is_no_reference(nybble: Nybble, tiny_base: Path) -> None:
    outcome = nybble("kld", tiny_base / "config.json", tiny_base)
    assert "is no reference of this program" in refusal(outcome)


def test_text_of_the_calibration_is_refused(
    nybble: Nybble, tiny_base: Path, text_file: Path, tmp_path: Path
) -> None:
    text = [f"source={text_file}", "layout=pack", "rows=4", "seqlen=32", "seed=0"]
    options = [x for value in text for x in ("--set", f"calibration.{value}")]
    out = tmp_path / "out"
    made = nybble("quantize", tiny_base, "-o", out, "-r", "w4a16-gptq", *options)
    assert made.code == 0, made
    same = ["--text", text_file, "--windows", "4", "--seqlen", "32", "--no-noise"]
    message = refusal(nybble("kld", tiny_base, out, *same))
    assert "4 of 4 evaluation rows were used in calibration" in message
    assert "--allow-overlap" in message
    assert nybble("kld", tiny_base, out, *same, "--allow-overlap").code == 0
