"""Which tensors an engine reads from a checkpoint's files, in its order.

All engines take every tensor of a file that they open, listed in the index or not; they differ in
which files these are. A tensor that is in two of them is loaded twice: the later file's stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from nybble.checkpoint.headers import TensorInfo
from nybble.checkpoint.index import WEIGHT_SUFFIX
from nybble.doctor.engines import Family

LONE_NAME = "model.safetensors"
"""The file of a checkpoint that is not sharded."""
MISTRAL_INDEX_NAME = "consolidated.safetensors.index.json"
"""Lists the files of Mistral's own format."""
_MISTRAL_PATTERN = "consolidated*.safetensors"
_MISTRAL_PAIR = ["consolidated.safetensors", LONE_NAME]

Headers = Mapping[str, Mapping[str, TensorInfo]]
"""Tensors by name, by file name."""
WeightMap = Mapping[str, str]
"""Of an index: tensor name -> file name."""
_Rule = Callable[[Sequence[str], WeightMap | None, WeightMap | None], list[str]]


def loaded_tensors(
    family: Family,
    names: Iterable[str],
    headers: Headers,
    weight_map: WeightMap | None,
    mistral_map: WeightMap | None = None,
) -> dict[str, TensorInfo]:
    """The tensors that an engine reads from a folder with files of these ``names``.

    ``mistral_map`` is that of MISTRAL_INDEX_NAME. Files without a header, which are broken, yield
    nothing; what an engine makes of them is not judged here.
    """
    files = _FILES[family](weight_files(names), weight_map, mistral_map)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        header = headers.get(file, {})
        # The safetensors library lists a file's names sorted, whatever their order in the header.
        tensors |= {name: header[name] for name in sorted(header)}
    if family is Family.TRANSFORMERS:  # core_model_loading.py: over all files
        tensors = {name: tensors[name] for name in sorted(tensors, key=_dotted)}
    return tensors


def weight_files(names: Iterable[str]) -> list[str]:
    """Those that the pattern ``*.safetensors`` finds: no hidden ones."""
    return [name for name in names if name.endswith(WEIGHT_SUFFIX) and not name.startswith(".")]


def _vllm_files(
    files: Sequence[str], weight_map: WeightMap | None, mistral_map: WeightMap | None
) -> list[str]:
    """Those of the index, or all without one; Mistral's own only, where there are any.

    vLLM 0.19-0.32, default_loader.py and weight_utils.py.
    """
    mistral = [name for name in files if fnmatchcase(name, _MISTRAL_PATTERN)]
    listed = _listed(mistral, mistral_map) if mistral else _listed(files, weight_map)
    return sorted(listed, key=_natural)


def _transformers_files(
    files: Sequence[str], weight_map: WeightMap | None, _mistral_map: WeightMap | None
) -> list[str]:
    """The lone file if it is there, whatever an index says; else those of the index.

    Transformers 5.23, modeling_utils.py and utils/hub.py.
    """
    if LONE_NAME in files:
        return [LONE_NAME]
    return [] if weight_map is None else sorted(_listed(files, weight_map))


def _sglang_files(
    files: Sequence[str], weight_map: WeightMap | None, _mistral_map: WeightMap | None
) -> list[str]:
    """Those of the index, or all without one; but of Mistral's pair only the lone file.

    SGLang 0.5.23, model_loader/loader.py and weight_utils.py.
    """
    if weight_map is None and sorted(files) == _MISTRAL_PAIR:
        return [LONE_NAME]
    return sorted(_listed(files, weight_map))


_FILES: Mapping[Family, _Rule] = {
    Family.VLLM: _vllm_files,
    Family.TRANSFORMERS: _transformers_files,
    Family.SGLANG: _sglang_files,
}


def _listed(files: Iterable[str], weight_map: WeightMap | None) -> list[str]:
    if weight_map is None:
        return list(files)
    listed = set(weight_map.values())
    return [name for name in files if name in listed]


# Numbers are compared as text, by length first: int() refuses those of thousands of digits.
_Number = tuple[int, str]
_NO_NUMBER = (-1, "")


def _number(digits: str) -> _Number:
    digits = digits.lstrip("0")
    return len(digits), digits


def _natural(name: str) -> list[tuple[str, _Number]]:
    """vLLM's order of files: numbers by their value."""
    parts = re.split(r"(\d+)", name)
    return [("", _number(part)) if part.isdecimal() else (part, _NO_NUMBER) for part in parts]


def _dotted(name: str) -> list[tuple[int, str, _Number]]:
    """Transformers' order of tensors: part by part, numbers first and by their value."""
    return [_dotted_part(part) for part in name.split(".")]


def _dotted_part(part: str) -> tuple[int, str, _Number]:
    if part.isdecimal():
        return 0, "", _number(part)
    text = part.rstrip("0123456789")
    digits = part[len(text) :]
    return 1, text, _number(digits) if digits else _NO_NUMBER
