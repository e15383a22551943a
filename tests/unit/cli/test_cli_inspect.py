from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import read_weights
from support.commands import Outcome, refusal, snapshot

from nybble.cli.tables import console

Nybble = Callable[..., Outcome]


@pytest.fixture
def inspected(nybble: Nybble, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The lines that ``inspect`` prints, on a wide terminal."""

    def run(*arguments: str | Path) -> list[str]:
        monkeypatch.setattr(console, "width", 200)
        outcome = nybble("inspect", *arguments)
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out.splitlines()

    return run


def test_every_part_is_shown_with_its_fate(
    inspected: Callable[..., list[str]], tiny_base: Path
) -> None:
    before = snapshot(tiny_base)
    lines = inspected(tiny_base)
    assert snapshot(tiny_base) == before
    parts = {(line.split()[0], "INT4" in line) for line in lines if line and "  " in line}
    kept = {"embeddings", "lm_head", "norms", "gdn", "vision", "mtp"}
    assert {(part, False) for part in kept} <= parts
    assert {(part, True) for part in ("attention", "gdn", "mlp")} <= parts
    assert ("mtp", True) not in parts


def test_the_architecture_and_the_totals_are_shown(
    inspected: Callable[..., list[str]], tiny_base: Path
) -> None:
    lines = inspected(tiny_base)
    assert lines[0] == (
        "qwen3_5: 4 blocks (1 full, 3 linear attention), hidden 128, vocabulary 320"
    )
    assert lines[1] == "MTP head: 15 tensors, all present"
    assert lines[-1] == "2.1 MB -> 1.1 MB (53% of the base)"


def test_counts_add_up_to_all_tensors(inspected: Callable[..., list[str]], tiny_base: Path) -> None:
    lines = inspected(tiny_base)
    header = next(number for number, line in enumerate(lines) if line.startswith("part "))
    rows = [line.split() for line in lines[header + 1 : -2] if line]
    counts = [int(row[-5]) for row in rows]  # count, then two sizes with their units
    assert sum(counts) == len(read_weights(tiny_base))


def test_one_line_per_tensor_on_demand(
    inspected: Callable[..., list[str]], tiny_base: Path
) -> None:
    shown = "\n".join(inspected(tiny_base, "--tensors"))
    for name in read_weights(tiny_base):
        assert name in shown


def test_a_base_without_an_mtp_head_is_told(
    inspected: Callable[..., list[str]], make_tiny: Callable[..., Path]
) -> None:
    lines = inspected(make_tiny(mtp=False))
    assert lines[1] == "MTP head: none declared"
    assert not any(line.startswith("mtp") for line in lines)


def test_another_grid_makes_other_sizes(
    inspected: Callable[..., list[str]], tiny_base: Path
) -> None:
    eight = inspected(tiny_base, "--set", "scheme.bits=8", "--set", "scheme.group_size=-1")
    assert any("INT8, per channel" in line for line in eight)
    assert eight[-1] == "2.1 MB -> 1.4 MB (69% of the base)"


def test_heads_and_overrides_are_shown(
    inspected: Callable[..., list[str]], tiny_base: Path
) -> None:
    settings = (
        "scheme.mtp_bits=8",
        "scheme.lm_head_bits=4",
        'scheme.overrides=[{match="self_attn", keep=true}, {match="down_proj", group_size=-1}]',
    )
    lines = inspected(tiny_base, *(word for value in settings for word in ("--set", value)))
    fates = {(line.split()[0], " ".join(line.split()[1:5])) for line in lines if "  " in line}
    assert {
        ("mtp", "kept: drafts must match"),
        ("lm_head", "INT4, group 128 lm_head"),
        ("attention", "kept: as the recipe"),
    } <= fates
    assert any(line.startswith("mtp") and "INT8, group 128" in line for line in lines)
    assert any("INT4, per channel" in line and "mlp.down_proj" in line for line in lines)


def test_an_override_that_does_nothing_is_refused(nybble: Nybble, tiny_base: Path) -> None:
    override = 'scheme.overrides=[{match="nothing", keep=true}]'
    outcome = nybble("inspect", tiny_base, "--set", override)
    assert "'nothing' decides for no Linear" in refusal(outcome)


def test_nothing_is_lost_on_a_narrow_terminal(
    nybble: Nybble, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    monkeypatch.setattr(console, "width", 60)
    out = nybble("inspect", tiny_base, "--tensors").out
    assert max(len(line) for line in out.splitlines()) <= 120
    together = "".join(out.split())
    assert "".join(["kept:", "drafts", "must", "match"][:1]) in together
    assert "81.9 kB" in out
