"""Bad input is one line and exit code 2, and nothing is left on the disk."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import read_json, read_weights, write_json, write_weights
from support.commands import Outcome, refusal, run_nybble, run_python, snapshot

Nybble = Callable[..., Outcome]
Make = Callable[..., Path]
ROUND = ("--recipe", "w4a16-rtn")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output of which no trace may be left."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


@pytest.fixture
def refused(nybble: Nybble, out: Path) -> Callable[..., str]:
    """Runs ``quantize``, checks that it refuses and leaves nothing, returns what it says."""

    def run(model: Path, *options: str | Path) -> str:
        outcome = nybble("quantize", model, "--out", out, *options)
        lines = outcome.err.splitlines(keepends=True)
        progress = [line for line in lines if line.startswith("block ")]
        message = refusal(Outcome(outcome.code, outcome.out, "".join(lines[len(progress) :])))
        assert outcome.out == ""
        assert list(out.parent.iterdir()) == []
        return message

    return run


@pytest.fixture(scope="session")
def text(text_file: Path) -> tuple[str, ...]:
    values = {"source": text_file, "layout": "pack", "rows": 4, "seqlen": 32}
    options = [f"calibration.{key}={value}" for key, value in values.items()]
    return tuple(x for o in (*options, "algorithm.iters=2") for x in ("--set", o))


def doctored(base: Path, name: str, value: float, place: int = 5) -> Path:
    weights = read_weights(base)
    weights[name].view(-1)[place] = value
    write_weights(base, weights)
    return base


def test_a_missing_folder(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert str(tmp_path / "nothing") in refused(tmp_path / "nothing", *ROUND)


def test_a_name_on_the_hub_instead_of_a_folder(refused: Callable[..., str]) -> None:
    assert "hf download Qwen/Qwen3.5-27B" in refused(Path("Qwen/Qwen3.5-27B"), *ROUND)


def test_a_file_instead_of_a_folder(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "model").write_text("")
    assert str(tmp_path / "model") in refused(tmp_path / "model", *ROUND)


def test_an_empty_folder(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "model").mkdir()
    assert "no weights" in refused(tmp_path / "model", *ROUND)


def test_a_missing_config(make_tiny: Make, refused: Callable[..., str]) -> None:
    base = make_tiny()
    (base / "config.json").unlink()
    assert "config.json" in refused(base, *ROUND)


def test_a_broken_config(make_tiny: Make, refused: Callable[..., str]) -> None:
    base = make_tiny()
    (base / "config.json").write_text('{"architectures": [')
    assert "not valid JSON" in refused(base, *ROUND)


def test_a_missing_shard(make_tiny: Make, refused: Callable[..., str]) -> None:
    base = make_tiny(shards=3)
    (base / "model-00002-of-00003.safetensors").unlink()
    message = refused(base, *ROUND)
    assert "1 of 3 shards" in message
    assert "model-00002-of-00003.safetensors" in message


def test_a_file_cut_within_its_header(make_tiny: Make, refused: Callable[..., str]) -> None:
    base = make_tiny()
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "truncated within the header" in refused(base, *ROUND)


def test_a_file_cut_within_its_data(make_tiny: Make, refused: Callable[..., str]) -> None:
    base = make_tiny()
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "1000 of" in refused(base, *ROUND)


def test_a_pickle(tiny_base: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(read_weights(tiny_base), base / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(base, *ROUND)


def test_another_architecture(make_tiny: Make, refused: Callable[..., str]) -> None:
    base = make_tiny()
    config = read_json(base / "config.json")
    write_json(base / "config.json", {**config, "architectures": ["GPT2LMHeadModel"]})
    message = refused(base, *ROUND)
    assert "GPT2LMHeadModel" in message
    assert "Qwen3_5ForConditionalGeneration" in message


def test_a_config_that_does_not_fit_the_weights(
    make_tiny: Make, refused: Callable[..., str]
) -> None:
    base = make_tiny()
    config = read_json(base / "config.json")
    config["text_config"]["intermediate_size"] = 512
    write_json(base / "config.json", config)
    assert "mlp" in refused(base, *ROUND)


def test_a_quantized_checkpoint(rtn_result: Path, refused: Callable[..., str]) -> None:
    assert "quantized already" in refused(rtn_result, *ROUND)


def test_a_missing_mtp_head(make_tiny: Make, refused: Callable[..., str]) -> None:
    base = make_tiny()
    weights = read_weights(base)
    write_weights(base, {n: t for n, t in weights.items() if not n.startswith("mtp.")})
    assert "mtp.fc.weight" in refused(base, *ROUND)


def test_an_unknown_tensor(make_tiny: Make, refused: Callable[..., str]) -> None:
    base = make_tiny()
    write_weights(base, {**read_weights(base), "model.audio.weight": torch.zeros(2)})
    assert "model.audio.weight" in refused(base, *ROUND)


QUANTIZED = "model.language_model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("recipe", "value"),
    [
        ("rounded", float("nan")),
        ("rounded", float("inf")),
        ("rounded", float("-inf")),
        ("trained", float("nan")),
        ("trained", float("inf")),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        QUANTIZED,
        "mtp.fc.weight",
        "lm_head.weight",
        "model.visual.pos_embed.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.1.input_layernorm.weight",
    ],
)
def test_a_value_that_is_not_finite(
    make_tiny: Make,
    refused: Callable[..., str],
    text: tuple[str, ...],
    name: str,
    value: float,
    recipe: str,
) -> None:
    message = refused(doctored(make_tiny(), name, value), *(ROUND if recipe == "rounded" else text))
    assert name in message
    assert "1 NaN or infinite" in message


@pytest.mark.parametrize("layout", ["pack", "truncate"])
def test_a_text_that_is_too_short(
    tiny_base: Path,
    refused: Callable[..., str],
    text: tuple[str, ...],
    tmp_path: Path,
    layout: str,
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the head and the state of a block\n" * 5, encoding="utf-8")
    values = (f"source={short}", f"layout={layout}", "seqlen=400", "rows=1")
    message = refused(tiny_base, *text, *(w for v in values for w in ("--set", f"calibration.{v}")))
    assert "400 tokens" in message
    assert "longer text" in message


def test_rows_that_are_longer_than_the_model_knows(
    tiny_base: Path, refused: Callable[..., str], text: tuple[str, ...]
) -> None:
    message = refused(tiny_base, *text, "--set", "calibration.seqlen=513")
    assert "513" in message
    assert "512" in message


def test_a_text_without_enough_rows(
    tiny_base: Path, refused: Callable[..., str], text: tuple[str, ...]
) -> None:
    assert "9999 rows" in refused(tiny_base, *text, "--set", "calibration.rows=9999")


def test_a_missing_text(
    tiny_base: Path, refused: Callable[..., str], text: tuple[str, ...]
) -> None:
    assert "nothing.txt" in refused(tiny_base, *text, "--set", "calibration.source=nothing.txt")


@pytest.mark.parametrize("recipe", ["nonsense", "nothing.toml", "", "folder/w4a16-rtn"])
def test_an_unknown_recipe(tiny_base: Path, refused: Callable[..., str], recipe: str) -> None:
    assert "recipe" in refused(tiny_base, "--recipe", recipe)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("scheme.bit=4", "scheme.bit"),
        ("nonsense.key=4", "nonsense"),
        ("scheme.bits", "section.key=value"),
        ("scheme.bits=four", "scheme.bits"),
        ("scheme.bits=9", "scheme.bits"),
        ("scheme.bits=5", "bits"),
        ("scheme.mtp_bits=3", "mtp_bits"),
        ("scheme.lm_head_bits=2", "lm_head_bits"),
        ("scheme.group_size=0", "group_size"),
        ("scheme.group_size=48", "group_size"),
        ("scheme.group_size=256", "group size"),
        ("algorithm.name=magic", "algorithm"),
        ("algorithm.iters=-1", "iters"),
        ("algorithm.lr=-1", "lr"),
        ("calibration.rows=0", "rows"),
        ("calibration.layout=shuffle", "layout"),
        ("calibration.seed=10000000000000000000000", "seed"),
        ("format=gguf", "format"),
        ("max_shard_gb=0", "max_shard_gb"),
        ("max_shard_gb=inf", "max_shard_gb"),
        ("max_shard_gb=1e-12", "shard"),
    ],
)
def test_a_setting_that_makes_no_sense(
    tiny_base: Path, refused: Callable[..., str], text: tuple[str, ...], override: str, told: str
) -> None:
    assert told in refused(tiny_base, *text, "--set", override)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_device_that_is_not_there(tiny_base: Path, refused: Callable[..., str]) -> None:
    assert "'cuda'" in refused(tiny_base, *ROUND, "--device", "cuda")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", '{"model": '),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
    ],
)
def test_a_broken_tokenizer(
    make_tiny: Make,
    refused: Callable[..., str],
    text: tuple[str, ...],
    file: str,
    content: str,
) -> None:
    base = make_tiny()
    (base / file).write_text(content)
    assert "no usable tokenizer" in refused(base, *text)


def test_a_missing_tokenizer(
    make_tiny: Make, refused: Callable[..., str], text: tuple[str, ...]
) -> None:
    base = make_tiny()
    for file in base.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(base, *text)


def test_a_tokenizer_of_another_model(
    make_tiny: Make, refused: Callable[..., str], text: tuple[str, ...]
) -> None:
    base = make_tiny(text=(("vocab_size", 200),))
    message = refused(base, *text)
    assert "tokenizer" in message
    assert "200" in message


def test_an_output_of_another_recipe(nybble: Nybble, tiny_base: Path, rtn_result: Path) -> None:
    before = snapshot(rtn_result)
    outcome = nybble(
        "quantize", tiny_base, "-o", rtn_result, *ROUND, "--set", "algorithm.scale_init=mse"
    )
    assert "another recipe" in refusal(outcome)
    assert snapshot(rtn_result) == before


def test_an_output_that_is_a_file(nybble: Nybble, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    before = snapshot(tmp_path)
    refusal(nybble("quantize", tiny_base, "-o", tmp_path / "out", *ROUND))
    refusal(nybble("quantize", tiny_base, "-o", tmp_path / "out" / "deeper", *ROUND))
    assert snapshot(tmp_path) == before


def test_an_output_with_too_long_a_name(nybble: Nybble, tiny_base: Path, tmp_path: Path) -> None:
    refusal(nybble("quantize", tiny_base, "-o", tmp_path / ("x" * 300), *ROUND))
    assert list(tmp_path.iterdir()) == []


def test_inspect_refuses_in_one_line_too(nybble: Nybble, tmp_path: Path, tiny_base: Path) -> None:
    assert "nothing" in refusal(nybble("inspect", tmp_path / "nothing"))
    assert "no recipe" in refusal(nybble("inspect", tiny_base, "--recipe", "nonsense"))
    assert "scheme.bit" in refusal(nybble("inspect", tiny_base, "--set", "scheme.bit=4"))


def test_a_dry_run_refuses_in_one_line_too(
    nybble: Nybble, tiny_base: Path, out: Path, text: tuple[str, ...]
) -> None:
    refusal(nybble("quantize", tiny_base.parent, "-o", out, "--dry-run", *ROUND))
    outcome = nybble("quantize", tiny_base, "-o", out, "--dry-run", *text, "--device", "nonsense")
    assert "nonsense" in refusal(outcome)


# From here on in processes of their own: what only they can show.


def test_the_real_program_refuses_before_any_work(tmp_path: Path) -> None:
    outcome = run_nybble("quantize", tmp_path / "nothing", "-o", tmp_path / "out")
    assert "nothing" in refusal(outcome)
    assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_real_program_refuses_in_the_midst_of_work(make_tiny: Make, tmp_path: Path) -> None:
    base = doctored(make_tiny(), QUANTIZED, float("nan"))
    outcome = run_nybble("quantize", base, "-o", tmp_path / "out", *ROUND)
    *progress, last = outcome.err.splitlines(keepends=True)
    assert all(line.startswith("block ") for line in progress)
    assert QUANTIZED in refusal(Outcome(outcome.code, outcome.out, last))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


WITHOUT_PRIVILEGES = """
import ctypes, sys
if sys.platform == "linux":  # root may write anywhere unless it gives that up
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0
from nybble.cli.app import main
main()
"""


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read-only", "closed"])
def test_an_output_in_a_folder_that_cannot_be_written(
    tiny_base: Path, tmp_path: Path, mode: int
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=mode)
    arguments = ["quantize", str(tiny_base), "-o", str(folder / "out"), *ROUND]
    outcome = run_python(["-c", WITHOUT_PRIVILEGES, *arguments])
    folder.chmod(0o755)
    assert str(folder / "out") in refusal(outcome)
    assert list(folder.iterdir()) == []


LITTLE_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
from nybble.cli.app import main
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits files by a Linux rule")
def test_a_disk_that_takes_no_more(tiny_base: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(tiny_base), "-o", str(tmp_path / "out"), *ROUND]
    assert "cannot write" in refusal(run_python(["-c", LITTLE_DISK, *arguments]))
    assert list(tmp_path.iterdir()) == []
