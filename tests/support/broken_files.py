"""Checkpoints whose files are broken: config.json itself, shards, the index, what lies beside."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from .breaking import (
    AUTO_ROUND,
    BLOCKS,
    INDEX,
    MODEL,
    SHARDS,
    W4,
    broken,
    drop,
    edit_index,
    edit_tensors,
    method_of,
    packed,
    replace_file,
    write_tensors,
)
from .good_checkpoints import MTP_FILE, TRUNK_FILES


@broken("D1", *AUTO_ROUND)
def config_missing(folder: Path) -> None:
    (folder / "config.json").unlink()


@broken("D1", *AUTO_ROUND)
def config_cut_off(folder: Path) -> None:
    replace_file(folder / "config.json", (folder / "config.json").read_bytes()[:700])


@broken("D1", *AUTO_ROUND)
def config_is_a_list(folder: Path) -> None:
    replace_file(folder / "config.json", b"[]")


@broken("D2", *SHARDS)
def mtp_shard_missing(folder: Path) -> None:
    (folder / MTP_FILE).unlink()


@broken("D2", *SHARDS)
def trunk_shard_missing(folder: Path) -> None:
    (folder / TRUNK_FILES[1]).unlink()


@broken("D2", *SHARDS)
def mtp_shard_not_in_the_index(folder: Path) -> None:
    def change(index: dict) -> None:
        files = index["weight_map"]
        index["weight_map"] = {name: file for name, file in files.items() if file != MTP_FILE}

    edit_index(folder, change)


@broken("D2", *SHARDS)
def stale_shard(folder: Path) -> None:
    """An earlier export's packed MTP layer lies beside, in no index."""
    mtp = load_file(folder / MTP_FILE)
    stale: dict = {}
    for name, tensor in mtp.items():
        if name.endswith("_proj.weight"):
            stale |= packed(name.removesuffix(".weight"), tensor, method_of(folder))
    write_tensors(folder / "model-00003-of-00003.safetensors", stale)


@broken("D2", *SHARDS)
def lone_file_beside_the_index(folder: Path) -> None:
    """A model.safetensors of an earlier export: of all loaders, some prefer it."""
    old = load_file(folder / TRUNK_FILES[1])
    drop(old, r"layers\.3\.mlp")
    write_tensors(folder / MODEL, old)


@broken("D2", *SHARDS)
def index_names_the_wrong_shard(folder: Path) -> None:
    name = "model.language_model.norm.weight"
    edit_index(folder, lambda index: index["weight_map"].update({name: TRUNK_FILES[1]}))


@broken("D2", *SHARDS)
def index_lists_a_ghost(folder: Path) -> None:
    ghost = f"{BLOCKS}.0.mlp.gate_proj.bias"
    edit_index(folder, lambda index: index["weight_map"].update({ghost: TRUNK_FILES[1]}))


@broken("D2", *SHARDS)
def index_leaves_the_folder(folder: Path) -> None:
    edit_index(
        folder, lambda index: index["weight_map"].update({"mtp.norm.weight": "../../etc/passwd"})
    )


@broken("D2", *SHARDS[:1])
def index_cut_off(folder: Path) -> None:
    replace_file(folder / INDEX, (folder / INDEX).read_bytes()[:-200])


@broken("D2", *SHARDS[:1], is_note=True)
def index_total_wrong(folder: Path) -> None:
    edit_index(folder, lambda index: index["metadata"].update(total_size=12345))


@broken("D2", *SHARDS)
def shard_cut_off(folder: Path) -> None:
    path = folder / TRUNK_FILES[1]
    replace_file(path, path.read_bytes()[:-5000])


@broken("D2", *SHARDS[:1])
def mtp_shard_cut_off(folder: Path) -> None:
    replace_file(folder / MTP_FILE, (folder / MTP_FILE).read_bytes()[:-5000])


@broken("D2", *AUTO_ROUND)
def header_of_noise(folder: Path) -> None:
    replace_file(folder / MODEL, b"\xff" * 7 + b"\x00" + b"{" * 500)


@broken("D2", *SHARDS[:1])
def shard_is_a_pointer(folder: Path) -> None:
    """What git leaves in the place of a file that git-lfs has not fetched."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    replace_file(folder / TRUNK_FILES[1], pointer)


@broken("D17", *W4, with_base=True)
def vision_dropped(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: drop(tensors, r"^model\.visual\."))


@broken("D18", *W4, with_base=True)
def processor_missing(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


@broken("D18", *AUTO_ROUND, with_base=True)
def video_processor_missing(folder: Path) -> None:
    (folder / "video_preprocessor_config.json").unlink()


@broken("D18", *AUTO_ROUND)
def tokenizer_missing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


@broken("D18", *AUTO_ROUND, with_base=True)
def chat_template_missing(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
