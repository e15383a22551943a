"""The doctor's rules for compressed-tensors in Transformers against the package itself."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import apply_quantization_config
from support.ct_blocks import INT4, TRANSFORMERS, Block, block, built, group, module
from support.ct_cases import ARGUMENTS, HOSTILE, RULES, SCHEMES
from torch import nn
from transformers import CompressedTensorsConfig

from nybble.doctor.resolve.built import DENSE, Built, NotAnalysed, Refusal, Scheme, Storage

NAMES = (
    "model.language_model.layers.0.linear_attn.in_proj_a",
    "model.language_model.layers.3.self_attn.q_proj",
    "model.language_model.layers.3.self_attn.o_proj",
    "model.language_model.layers.3.mlp.gate_proj",
    "model.visual.blocks.0.attn.qkv",
    "lm_head",
)
MORE = {
    "not compressed": block() | {"quantization_status": "frozen"},
    "no status": {key: value for key, value in block().items() if key != "quantization_status"},
    "odd status": block() | {"quantization_status": "packed"},
    "class ignored": block(ignore=("Linear",)),
    "base class": block(group(None, "Module"), ignore=()),
    "odd format": block(group(format="packed")),
    "mixed group": block(group(format="mixed-precision")),
    "own format": block(group(format="naive-quantized", input_activations=None)),
    "unknown key": block(group(unknown=1)),
    "channels of activations": block(group(input_activations=INT4 | {"strategy": "channel"})),
    "order of activations": block(group(input_activations=INT4 | {"actorder": "weight"})),
    "no weights": block(group() | {"weights": None}),
    "cache of no object": block() | {"kv_cache_scheme": 8},
    "patterns by the alphabet": block(
        group(INT4, "re:.*self_attn.*"), group(INT4 | {"num_bits": 8}, "re:.*proj")
    ),
}
CASES = RULES | SCHEMES | ARGUMENTS | HOSTILE | MORE


def model() -> nn.Module:
    """Linears under the names that Transformers gives them."""
    root = nn.Module()
    for name in NAMES:
        parent, _, last = name.rpartition(".")
        owner = root
        for part in parent.split(".") if parent else ():
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, nn.Linear(256, 128, bias=False, dtype=torch.bfloat16))
    return root


def theirs(declared: Block) -> str | dict[str, Any]:
    """What the package makes of each Linear, or the name of what it raises."""
    found = model()
    try:
        config = CompressedTensorsConfig.from_dict(copy.deepcopy(declared))
        compressor = ModelCompressor.from_compression_config(config)
        apply_quantization_config(found, compressor.quantization_config, show_progress=False)
        if config.is_quantization_compressed:
            compressor.compress_model(found)
    except Exception as error:  # noqa: BLE001 whatever it is: it is the answer
        return type(error).__name__
    return {name: _stored(found.get_submodule(name)) for name in NAMES}


def _stored(linear: nn.Module) -> list[Any] | str:
    tensors = dict(linear.named_parameters()) | dict(linear.named_buffers())
    if "weight_packed" in tensors:
        packed = tensors["weight_packed"]
        if packed.dtype == torch.uint8:
            return ["fp4"]
        groups = tensors["weight_scale"].shape[1]
        bits = packed.shape[1] * 32 // 256
        symmetric = "weight_zero_point" not in tensors
        return ["pack-quantized", bits, -1 if groups == 1 else 256 // groups, symmetric]
    kinds = {torch.int8: "int-quantized", torch.float8_e4m3fn: "fp8"}
    kind = kinds.get(tensors["weight"].dtype)
    return "dense" if kind is None else [kind]


def ours(answer: Built) -> Any:
    """Ours, in the same terms."""
    if isinstance(answer, Refusal):
        return "error" if answer.exception == "re.error" else answer.exception
    assert isinstance(answer, Scheme)
    if answer == DENSE:
        return "dense"
    if answer.storage is Storage.PACKED:
        return [answer.storage.value, answer.bits, answer.group_size, answer.symmetric]
    return [answer.storage.value]


@pytest.mark.parametrize("case", CASES)
def test_transformers_builds_and_raises_what_is_predicted(case: str) -> None:
    predicted = built(CASES[case], TRANSFORMERS, **{name: module(name) for name in NAMES})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = theirs(CASES[case])
    known = {name: one for name, one in predicted.items() if not isinstance(one, NotAnalysed)}
    if isinstance(actual, str):
        # One module is enough to raise it for all.
        refusals = {ours(one) for one in known.values() if isinstance(one, Refusal)}
        assert refusals == {actual} or len(known) < len(predicted)
    else:
        assert {name: ours(one) for name, one in known.items()} == {
            name: actual[name] for name in known
        }


def test_little_is_left_unanalysed() -> None:
    named = {"o": module(NAMES[2])}
    answers = [built(declared, TRANSFORMERS, **named)["o"] for declared in CASES.values()]
    assert sum(isinstance(answer, NotAnalysed) for answer in answers) <= 4
