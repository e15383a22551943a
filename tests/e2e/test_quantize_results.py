"""What a run leaves behind, whichever algorithm made it."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import (
    MTP_SHAPES,
    SIDECARS,
    VOCAB,
    Tiny,
    quantized_modules,
    read_json,
    read_weights,
    tiny_tokenizer,
)
from support.packed import codes_and_scales

from nybble.engine.load import load_model
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import Calibration, Recipe, Rtn, Scheme, SignRound

MODULES = quantized_modules(Tiny().prefix)
ALGORITHMS = ["signround_result", "rtn_result", "importance_result"]
Make = Callable[..., Path]


@pytest.fixture(params=ALGORITHMS)
def result(request: pytest.FixtureRequest) -> Path:
    folder = request.getfixturevalue(request.param)
    assert isinstance(folder, Path)
    return folder


def data_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_kept_tensor_equals_the_bases(tiny_base: Path, result: Path) -> None:
    base, stored = read_weights(tiny_base), read_weights(result)
    kept = {name for name in base if name.removesuffix(".weight") not in MODULES}
    assert set(MTP_SHAPES) < kept
    assert any(name.startswith("model.visual.") for name in kept)
    for name in kept:
        assert base[name].dtype == stored[name].dtype, name
        assert base[name].shape == stored[name].shape, name
        assert data_of(base[name]) == data_of(stored[name]), name


def test_nothing_but_kept_and_packed_tensors_is_stored(tiny_base: Path, result: Path) -> None:
    kept = {n for n in read_weights(tiny_base) if n.removesuffix(".weight") not in MODULES}
    packed = {f"{module}.{s}" for module in MODULES for s in ("qweight", "qzeros", "scales")}
    assert set(read_weights(result)) == kept | packed


def test_weights_lie_within_a_step_of_the_bases(tiny_base: Path, result: Path) -> None:
    """Half a step of the grid; SignRound may move the rounding point by another half."""
    base, stored = read_weights(tiny_base), read_weights(result)
    algorithm = read_json(result / "nybble.json")["recipe"]["algorithm"]["name"]
    reach = 1.0 if algorithm == "signround" else 0.5
    for module in MODULES:
        codes, scales = codes_and_scales(stored, module)
        steps = base[f"{module}.weight"].double().numpy() / scales
        inside = (codes > -8) & (codes < 7)
        assert np.abs(steps - codes)[inside].max() <= reach + 1e-6, module
        assert (steps[codes == -8] <= -8 + reach + 1e-6).all(), module
        assert (steps[codes == 7] >= 7 - reach - 1e-6).all(), module
        assert inside.mean() > 0.8, module
        assert np.sqrt(np.square(steps - codes).mean()) < 0.6, module


def test_scales_are_exact_in_both_half_precisions(result: Path) -> None:
    for name, tensor in read_weights(result).items():
        if name.endswith(".scales"):
            assert tensor.dtype == torch.float16
            assert torch.equal(tensor.float(), tensor.bfloat16().float()), name
            assert bool((tensor != 0).all()), name


def test_rounding_to_nearest_takes_the_nearest_code(tiny_base: Path, rtn_result: Path) -> None:
    base, stored = read_weights(tiny_base), read_weights(rtn_result)
    for module in MODULES:
        codes, scales = codes_and_scales(stored, module)
        nearest = np.round(base[f"{module}.weight"].double().numpy() / scales).clip(-8, 7)
        # In float32 a quotient may fall on the other side of a tie.
        assert (nearest == codes).mean() > 0.999, module


def test_the_result_loads_and_computes(tiny_base: Path, result: Path) -> None:
    ids = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    base, quantized = load_model(tiny_base), load_model(result)
    one, other = base.hidden(ids), quantized.hidden(ids)
    similarity = torch.nn.functional.cosine_similarity(one, other, dim=-1)
    assert float(similarity.mean()) > 0.75
    assert quantized.mtp is not None
    assert bool(torch.isfinite(quantized.drafts(other, ids)[0]).all())


def test_config_is_the_bases_and_one_key_more(tiny_base: Path, result: Path) -> None:
    base, config = read_json(tiny_base / "config.json"), read_json(result / "config.json")
    quantization = config.pop("quantization_config")
    assert config == base
    assert list(config) == list(base)
    assert quantization["bits"] == 4
    assert quantization["group_size"] == 128
    assert quantization["sym"] is True
    assert quantization["block_name_to_quantize"] == "model.language_model.layers"


def test_sidecars_are_copied_byte_for_byte(tiny_base: Path, result: Path) -> None:
    names = {*SIDECARS, "tokenizer.json", "tokenizer_config.json"}
    for name in names:
        assert (result / name).read_bytes() == (tiny_base / name).read_bytes(), name
    own = {"config.json", "model.safetensors", "nybble.json", "quant_log.csv"}
    assert {path.name for path in result.iterdir()} == names | own


def test_the_manifest_hashes_every_tensor(tiny_base: Path, result: Path) -> None:
    manifest, stored = read_json(result / "nybble.json"), read_weights(result)
    assert set(manifest["tensors"]) == set(stored)
    for name, record in manifest["tensors"].items():
        assert record["sha256"] == hashlib.sha256(data_of(stored[name])).hexdigest(), name
        is_packed = name.endswith((".qweight", ".qzeros", ".scales"))
        assert record["fate"] == ("quantized" if is_packed else "kept")
    base = read_weights(tiny_base)
    assert manifest["base"]["quantized_tensors_sha256"] == {
        f"{module}.weight": hashlib.sha256(data_of(base[f"{module}.weight"])).hexdigest()
        for module in MODULES
    }


def test_the_manifest_says_how_the_result_was_made(result: Path) -> None:
    manifest = read_json(result / "nybble.json")
    assert manifest["schema"] == 1
    assert manifest["nybble"] == importlib.metadata.version("nybble")
    assert manifest["base"]["name"] == "base"
    assert manifest["environment"]["torch"] == torch.__version__
    assert manifest["environment"]["device"] == "cpu"
    assert manifest["cost"]["seconds"] > 0
    assert manifest["cost"]["peak_rss_bytes"] > 50_000_000
    assert manifest["recipe"]["scheme"]["bits"] == 4


@pytest.mark.parametrize("name", ["signround_result", "importance_result"])
def test_the_manifest_hashes_every_calibration_row(
    request: pytest.FixtureRequest, name: str
) -> None:
    calibration = read_json(request.getfixturevalue(name) / "nybble.json")["calibration"]
    assert calibration["shape"] == [8, 32]
    assert len(set(calibration["row_sha256"])) == 8
    assert all(len(digest) == 64 for digest in calibration["row_sha256"])
    joined = "".join(calibration["row_sha256"]).encode()
    assert calibration["digest"] == hashlib.sha256(joined).hexdigest()


def test_rounding_needs_no_text(rtn_result: Path) -> None:
    assert read_json(rtn_result / "nybble.json")["calibration"] is None


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "quant_log.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_log_has_a_row_of_finite_numbers_for_each_module(result: Path) -> None:
    rows, base = log_of(result), Tiny()
    assert {row["module"] for row in rows} == quantized_modules(base.prefix)
    assert len(rows) == len(MODULES)
    text = {"module", "part", "algorithm"}
    for row in rows:
        assert row["block"] == row["module"].split(".")[3]
        numbers = [value for key, value in row.items() if key not in text and value != ""]
        assert all(math.isfinite(float(number)) for number in numbers), row
        assert 12 < float(row["sqnr_db"]) < 35, row
    assert [int(row["block"]) for row in rows] == sorted(int(row["block"]) for row in rows)


def test_the_log_tells_what_each_algorithm_measured(
    signround_result: Path, importance_result: Path, rtn_result: Path
) -> None:
    always = {
        "module",
        "block",
        "part",
        "out_features",
        "in_features",
        "bits",
        "group_size",
        "algorithm",
        "sqnr_db",
        "too_few_tokens",
        "block_seconds",
    }
    measured = {"tokens", "output_error"}
    trained = measured | {"block_loss_start", "block_loss", "best_iter"}
    for folder, columns in (
        (signround_result, trained),
        (importance_result, measured),
        (rtn_result, set()),
    ):
        for row in log_of(folder):
            assert {key for key in row if row[key] != ""} == always | columns
            assert row["tokens"] in ("", "256")
            assert row["too_few_tokens"] == "0"


def test_the_log_agrees_with_the_weights(tiny_base: Path, result: Path) -> None:
    base, stored = read_weights(tiny_base), read_weights(result)
    for row in log_of(result):
        weight = base[f"{row['module']}.weight"].double().numpy()
        codes, scales = codes_and_scales(stored, row["module"])
        noise = np.square(weight - codes * scales).sum()
        ratio = 10 * math.log10(np.square(weight).sum() / noise)
        assert float(row["sqnr_db"]) == pytest.approx(ratio, abs=1e-3)
        assert [int(row["out_features"]), int(row["in_features"])] == list(weight.shape)


def test_block_losses_are_plausible(signround_result: Path) -> None:
    losses: dict[str, tuple[float, float]] = {
        row["block"]: (float(row["block_loss_start"]), float(row["block_loss"]))
        for row in log_of(signround_result)
    }
    assert len(losses) == 4
    for start, end in losses.values():
        assert 0 < end <= 1.5 * start
    first_start, first_end = losses["0"]
    assert first_end < first_start


def test_output_errors_are_weighed_by_the_bases_own_inputs(
    tiny_base: Path, signround_result: Path, calibration: Calibration
) -> None:
    base, stored = load_model(tiny_base), read_weights(signround_result)
    sums: dict[str, torch.Tensor] = {}

    def note(module: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            sums[module] = args[0].double().flatten(0, -2).square().mean(dim=0)

        return hook

    for module in MODULES:
        linear = base.trunk.get_submodule(module.removeprefix(Tiny().prefix))
        linear.register_forward_pre_hook(note(module))
    base.hidden(first_rows(calibration))
    weights = read_weights(tiny_base)
    for row in log_of(signround_result):
        module = row["module"]
        weight = weights[f"{module}.weight"].double()
        codes, scales = codes_and_scales(stored, module)
        error = (weight - torch.from_numpy(codes * scales)).square() @ sums[module]
        expected = float(error.sum() / (weight.square() @ sums[module]).sum())
        assert float(row["output_error"]) == pytest.approx(expected, rel=1e-3), module


def first_rows(calibration: Calibration) -> torch.Tensor:
    """The calibration rows: one document, so its tokens in their order, packed."""
    text = Path(calibration.source).read_text(encoding="utf-8")
    size = calibration.rows * calibration.seqlen
    return torch.tensor(tiny_tokenizer()(text)["input_ids"][:size]).view(-1, calibration.seqlen)


def final_error(base: Path, quantized: Path, ids: torch.Tensor) -> float:
    one, other = (load_model(folder).hidden(ids) for folder in (base, quantized))
    return float((one - other).square().mean())


def test_signround_beats_rounding_on_its_calibration_rows(
    tiny_base: Path, rtn_result: Path, calibration: Calibration, tmp_path: Path
) -> None:
    recipe = Recipe(algorithm=SignRound(iters=40, batch_size=8), calibration=calibration)
    trained = quantize(tiny_base, tmp_path / "trained", recipe, "cpu").out
    ids = first_rows(calibration)
    assert final_error(tiny_base, trained, ids) < 0.9 * final_error(tiny_base, rtn_result, ids)


@pytest.mark.parametrize(
    "values",
    [
        {"wrapper": False},
        {"wrapper": False, "shards": 3},
        {"tied": True},
        {"mtp": False},
        {"float32_a_log": True},
    ],
    ids=str,
)
def test_other_forms_of_checkpoints_work(
    make_tiny: Make, signround_recipe: Recipe, tmp_path: Path, values: dict[str, object]
) -> None:
    base = make_tiny(**values)
    out = quantize(base, tmp_path / "out", signround_recipe, "cpu").out
    weights, stored = read_weights(base), read_weights(out)
    modules = quantized_modules(Tiny(**values).prefix)
    for name, tensor in weights.items():
        if name.removesuffix(".weight") not in modules:
            assert data_of(tensor) == data_of(stored[name]), name
    model = load_model(out)
    assert (model.mtp is None) == (values == {"mtp": False})
    assert read_json(out / "config.json")["quantization_config"]["block_name_to_quantize"] == (
        f"{Tiny(**values).prefix}layers"
    )


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(group_size=32),
        Scheme(group_size=-1),
        Scheme(bits=8),
        Scheme(bits=2, group_size=32),
        Scheme(signed_scales=False),
    ],
    ids=str,
)
def test_other_grids_work(
    tiny_base: Path, calibration: Calibration, tmp_path: Path, scheme: Scheme
) -> None:
    recipe = Recipe(
        scheme=scheme, algorithm=SignRound(iters=2, batch_size=4), calibration=calibration
    )
    out = quantize(tiny_base, tmp_path / "out", recipe, "cpu").out
    base, stored, state = read_weights(tiny_base), read_weights(out), load_model(out).trunk
    for module in MODULES:
        codes, scales = codes_and_scales(stored, module, scheme.bits)
        dense = torch.from_numpy(codes * scales).float()
        loaded = state.state_dict()[module.removeprefix(Tiny().prefix) + ".weight"]
        assert torch.equal(loaded, dense), module
        error = (dense - base[f"{module}.weight"].float()).abs().max()
        assert float(error) <= 2 * np.abs(scales).max(), module
        if not scheme.signed_scales:
            assert (scales > 0).all()


def test_conversations_and_documents_calibrate(
    tiny_base: Path, jsonl_file: Path, tmp_path: Path
) -> None:
    text = Calibration(source=str(jsonl_file), rows=6, seqlen=24, layout="truncate")
    recipe = Recipe(algorithm=Rtn(scale_init="importance"), calibration=text)
    out = quantize(tiny_base, tmp_path / "out", recipe, "cpu").out
    assert read_json(out / "nybble.json")["calibration"]["shape"] == [6, 24]
