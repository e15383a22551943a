"""``nybble check`` and ``nybble repair`` as commands: what they print, and their exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.broken_checkpoints import Corpus
from support.commands import Outcome, refusal, run_nybble, run_python

from nybble.demo import bundled_model

Nybble = Callable[..., Outcome]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    with bundled_model() as base:
        return Corpus(base, tmp_path_factory.mktemp("corpus"))


def test_a_sound_checkpoint(nybble: Nybble, corpus: Corpus) -> None:
    outcome = nybble("check", corpus.good("auto_round-w4"), "--engine", "vllm")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].endswith("auto_round-w4: auto-round")
    # All releases say the same, so they share a line.
    assert re.fullmatch(r"vLLM 0\.19-0\.32 +loads; MTP works; vision works *", lines[3])
    assert "repair" not in outcome.out
    assert f"vllm serve {corpus.good('auto_round-w4')} " in outcome.out.replace("\n", " ")
    assert '"enable_weights_track": true' in outcome.out


def test_a_broken_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    broken = corpus.broken("mtp-rule-missing-compressed-tensors-w4")
    report = tmp_path / "report.json"
    outcome = run_nybble("check", broken, "--json", report, env={"COLUMNS": "120"})
    assert (outcome.code, outcome.err) == (1, "")
    assert "0 % of drafts accepted, in silence (D4" in outcome.out
    assert "with MTP on it does not start: ValueError (D4" in outcome.out
    assert re.search(r"^D4 error  declared INT4 group 128", outcome.out, re.MULTILINE)
    assert "vllm#53387" in outcome.out
    assert "vllm serve" not in outcome.out
    assert f"to mend it: nybble repair {broken} --base BASE -o OUT" in outcome.out
    found = json.loads(report.read_text())
    assert (found["schema"], found["clean"]) == ("nybble.check/1", False)
    assert found["verdicts"][0]["parts"]["mtp"]["harm"] == "random"


def test_one_release_is_asked(nybble: Nybble, corpus: Corpus) -> None:
    broken = corpus.broken("activation-order-gptq-w4")
    old = nybble("check", broken, "--engine", "vllm", "--engine-version", "0.28")
    new = nybble("check", broken, "--engine", "vllm", "--engine-version", "0.32")
    assert "loads; MTP works" in old.out
    assert "does not load: ValueError (D8)" in new.out
    assert new.code == 1


def test_more_devices_than_groups(nybble: Nybble, corpus: Corpus) -> None:
    outcome = nybble("check", corpus.good("auto_round-w4"), "--engine", "vllm", "--tp", "4")
    assert outcome.code == 1
    assert "D10 error" in outcome.out


def test_an_unknown_architecture_is_not_called_sound(nybble: Nybble, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    outcome = nybble("check", tmp_path)
    assert outcome.code in (1, 2)
    assert "not analysed: its architecture is not one that nybble knows" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all"], "nowhere/at/all"),
        ([".", "--engine", "ollama"], "'ollama' is unknown"),
        ([".", "--engine-version", "0.32"], "needs --engine"),
        (["{tmp}"], "no checkpoint, neither config.json nor a"),
        (["{good}", "--base", "{tmp}"], "no checkpoint"),
        (["{good}", "--json", "{tmp}/a/b.json"], "cannot write"),
    ],
)
def test_bad_input_is_one_line(
    nybble: Nybble, corpus: Corpus, tmp_path: Path, arguments: list[str], message: str
) -> None:
    good = str(corpus.good("auto_round-w4"))
    filled = [one.format(tmp=tmp_path, good=good) for one in arguments]
    assert message in refusal(nybble("check", *filled))


def test_a_check_of_headers_imports_neither_torch_nor_numpy(corpus: Corpus) -> None:
    good = str(corpus.good("auto_round-w4"))
    program = (
        "import sys\n"
        "from nybble.doctor.check import check_checkpoint\n"
        f"check_checkpoint({good!r})\n"
        "print({'torch', 'transformers', 'numpy', 'huggingface_hub'}.intersection(sys.modules))\n"
    )
    outcome = run_python(["-c", program])
    assert (outcome.code, outcome.out) == (0, "set()\n"), outcome.err


def test_repair_and_check_again(nybble: Nybble, corpus: Corpus, tmp_path: Path) -> None:
    broken, out = corpus.broken("mtp-dropped-gptq-w4"), tmp_path / "out"
    mended = nybble("repair", broken, "--base", corpus.good("base"), "--out", out)
    assert mended.code == 0, mended
    assert "mtp" in mended.out
    assert nybble("check", out, "--base", corpus.good("base"), "--deep").code == 0


def test_repair_goes_beside_the_checkpoint_unless_told(nybble: Nybble, corpus: Corpus) -> None:
    broken = corpus.broken("mtp-rule-missing-gptq-w4")
    assert nybble("repair", broken).code == 0
    beside = broken.with_name(f"{broken.name}-repaired")
    assert nybble("check", beside).code == 0
    assert f"{beside} exists already" in refusal(nybble("repair", broken))


def test_what_cannot_be_mended_is_said(nybble: Nybble, corpus: Corpus) -> None:
    outcome = nybble("repair", corpus.broken("mtp-dropped-gptq-w4"))
    assert outcome.code == 1
    assert "or give the base with --base" in outcome.out
    assert "nothing was written" in outcome.out
