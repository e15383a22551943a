"""Sound checkpoints of the bundled model, in every form that nybble and others write."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from nybble.pipeline.quantize import quantize
from nybble.recipe.load import load_recipe

from .checkpoints import read_json, write_json

FORMATS = ("auto_round", "gptq", "compressed-tensors")
MTP_FILE = "mtp.safetensors"
TRUNK_FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class Good:
    """How a sound checkpoint is made; without a format: the BF16 base itself."""

    format: str | None = None
    overrides: tuple[str, ...] = ()
    """Of the recipe."""
    shards: bool = False
    """Two files for the trunk and one for the MTP head, with an index."""
    exact_names: bool = False
    """Rules as AutoRound writes them: one for each dense Linear, by its full name."""
    runs_on_cpu: bool = True
    """vLLM has no CPU kernel for 8 bits."""
    not_for: tuple[str, ...] = ()
    """Rule sets that it is not sound for."""


GOOD: dict[str, Good] = {
    "base": Good(),
    **{f"{form}-w4": Good(form) for form in FORMATS},
    **{f"{form}-mtp4": Good(form, ("scheme.mtp_bits=4",)) for form in FORMATS},
    **{f"{form}-shards": Good(form, shards=True) for form in FORMATS},
    "auto_round-names": Good("auto_round", exact_names=True, not_for=("sglang-0.5",)),
    "compressed-tensors-head4": Good(
        "compressed-tensors", ("scheme.lm_head_bits=4",), not_for=("vllm-0.19",)
    ),
    "auto_round-w8": Good("auto_round", ("scheme.bits=8",), runs_on_cpu=False),
}


def write_good(base: Path, folder: Path, name: str) -> Path:
    """The sound checkpoint of this name in a new folder; returns it."""
    good = GOOD[name]
    if good.format is None:
        shutil.copytree(base, folder)
        return folder
    recipe = load_recipe("w4a16-rtn", [f"format={good.format}", *good.overrides])
    quantize(base, folder, recipe, "cpu")
    if good.shards:
        _split(folder)
    if good.exact_names:
        _name_each(folder)
    return folder


def _split(folder: Path) -> None:
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    files = {name: _file_of(name) for name in tensors}
    for file in (*TRUNK_FILES, MTP_FILE):
        part = {name: tensors[name] for name in tensors if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    write_json(folder / "model.safetensors.index.json", index)


def _file_of(name: str) -> str:
    if name.startswith("mtp."):
        return MTP_FILE
    return TRUNK_FILES[".layers." in name]


def _name_each(folder: Path) -> None:
    config = read_json(folder / "config.json")
    names = load_file(folder / "model.safetensors")
    dense = {"bits": 16, "data_type": "fp", "group_size": 128, "sym": True}
    config["quantization_config"]["extra_config"] = {
        name.removesuffix(".weight"): dense
        for name in sorted(names)
        if name.endswith((".in_proj_a.weight", ".in_proj_b.weight", "mtp.fc.weight"))
    }
    write_json(folder / "config.json", config)
