"""The command line where all goes well, in processes of its own."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import Outcome, environment, refusal, run_nybble, snapshot

Nybble = Callable[..., Outcome]


def settings(text: Path, iters: int) -> list[str]:
    values = (
        f"calibration.source={text}",
        "calibration.layout=pack",
        "calibration.rows=4",
        "calibration.seqlen=32",
        f"algorithm.iters={iters}",
    )
    return [word for value in values for word in ("--set", value)]


def test_progress_is_a_plain_line_for_each_block(
    tiny_base: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = run_nybble("quantize", tiny_base, "--out", out, *settings(text_file, 3))
    assert outcome.code == 0
    lines = outcome.err.splitlines()
    assert len(lines) == 4, outcome.err
    for number, line in enumerate(lines, 1):
        assert re.fullmatch(rf"block {number}/4 done, loss [0-9.e-]+", line)
    assert outcome.out.startswith(f"{out}: ")
    assert "peak memory" in outcome.out
    assert "\x1b" not in outcome.out + outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_same_command_twice_says_that_all_is_done(
    nybble: Nybble, tiny_base: Path, tmp_path: Path
) -> None:
    command = ("quantize", tiny_base, "-o", tmp_path / "out", "-r", "w4a16-rtn")
    first = nybble(*command)
    before = snapshot(tmp_path)
    second = nybble(*command)
    assert (first.code, second.code) == (0, 0)
    assert "nothing to do" in " ".join(second.out.split())
    assert second.err == ""
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["a [red] b", "odd[/b]name", "[bold]"])
def test_brackets_in_a_path_are_no_markup(
    nybble: Nybble, tiny_base: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / name / "out"
    for _ in range(2):
        outcome = nybble("quantize", tiny_base, "-o", out, "-r", "w4a16-rtn")
        assert outcome.code == 0
        assert str(out) in outcome.out.replace("\n", "")


def test_an_interrupt_is_told_and_leaves_nothing(
    tiny_base: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = ["quantize", str(tiny_base), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "nybble", *arguments, *settings(text_file, 1_000_000)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out.partial").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert list(tmp_path.iterdir()) == []
    assert process.returncode == 130
    assert err == "nybble: interrupted; nothing was written\n"


def test_a_dry_run_prints_what_is_needed_and_writes_nothing(
    nybble: Nybble, tiny_base: Path, text_file: Path, tmp_path: Path
) -> None:
    base = snapshot(tiny_base)
    command = ("quantize", tiny_base, "-o", tmp_path / "out", "--dry-run")
    outcome = nybble(*command, *settings(text_file, 50))
    assert outcome.code == 0
    assert outcome.err == ""
    said = " ".join(outcome.out.split())
    assert "signround W4 group 128" in said
    assert "INT4, group 128" in said
    assert "MTP head: 15 tensors" in said
    assert "2.1 MB -> 1.1 MB (53% of the base)" in said
    assert (
        "memory: 2.5 MB for the largest block and its training, 131.1 kB for the calibration rows"
        in said
    )
    assert "disk: 1.1 MB" in said
    assert re.search(r"time: about \d+ (s|min)", said)
    assert list(tmp_path.iterdir()) == []
    assert snapshot(tiny_base) == base


@pytest.mark.parametrize("hub", ["refuses", "is silent"])
def test_a_data_set_of_the_hub_out_of_reach_is_told_soon(
    tiny_base: Path, tmp_path: Path, hub: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # listens, and never answers
        port = server.getsockname()[1] if hub == "is silent" else 9
        env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(tmp_path / "cache"),
            "NO_PROXY": "*",
            "no_proxy": "*",
        }
        began = time.monotonic()
        text = settings(Path("pile-10k"), 2)
        outcome = run_nybble("quantize", tiny_base, "-o", tmp_path / "out", *text, env=env)
    assert time.monotonic() - began < 25
    assert refusal(outcome).startswith("pile-10k: ")
    assert not list(tmp_path.glob("out*"))
