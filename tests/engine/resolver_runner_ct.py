"""Asks the real vLLM what it builds each module as, or what it raises, without building any.

    python resolver_runner_ct.py JOBS.json ANSWERS.json

Run it with the python of the environment that tools/engine_env/build.sh makes. A job holds
``block`` (config.json's quantization_config) and ``modules``: names as vLLM has them, by kind. Its
answer is the name of the exception that the declaration raises, or, by name of module, the name of
the exception that it raises, 'dense', or what is built.
"""

# ruff: noqa: TID253 - a program of the environment that vLLM lives in

import copy
import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import torch
import vllm.config.vllm as vllm_config
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration
from vllm.model_executor.models.qwen3_5_mtp import Qwen3_5MTP

CLASSES = {
    "qkv_proj": QKVParallelLinear,
    "qkv": QKVParallelLinear,
    "gate_up_proj": MergedColumnParallelLinear,
    "in_proj_qkvz": MergedColumnParallelLinear,
    "in_proj_ba": MergedColumnParallelLinear,
    "o_proj": RowParallelLinear,
    "out_proj": RowParallelLinear,
    "down_proj": RowParallelLinear,
    "proj": RowParallelLinear,
    "linear_fc2": RowParallelLinear,
    "lm_head": ParallelLMHead,
    "experts": RoutedExperts,
}
PACKED = ("CompressedTensorsWNA16", "CompressedTensorsWNA8Int", "CompressedTensorsWNA4Int")
STORAGES = {
    "CompressedTensorsW8A8Int8": "int-quantized",
    "CompressedTensorsW4A8Int": "int-quantized",
    "CompressedTensorsW8A8Fp8": "fp8",
    "CompressedTensorsW8A16Fp8": "fp8",
    "CompressedTensorsW8A8Mxfp8": "fp8",
    "CompressedTensorsW4A4Fp4": "fp4",
    "CompressedTensorsW4A4Mxfp4": "fp4",
    "CompressedTensorsW4A8Mxfp4": "fp4",
    "FP8": "fp8",
    "FP8_PB_WO": "fp8",
    "MXFP8": "fp8",
    "NVFP4": "fp4",
    "W4A16_NVFP4": "fp4",
}


EXPERTS = {
    "CompressedTensorsWNA16MoEMethod": "pack-quantized",
    "CompressedTensorsW8A8Fp8MoEMethod": "fp8",
    "CompressedTensorsW8A8Mxfp8MoEMethod": "fp8",
    "CompressedTensorsW8A8Int8MoEMethod": "int-quantized",
    "CompressedTensorsW4A4Nvfp4MoEMethod": "fp4",
    "CompressedTensorsW4A4Mxfp4MoEMethod": "fp4",
    "Fp8MoEMethod": "fp8",
    "ModelOptFp8MoEMethod": "fp8",
    "ModelOptNvFp4FusedMoE": "fp4",
}
MODULES = (
    *(
        f"compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_{one}"
        for one in ("wna16", "w8a8_fp8", "w8a8_mxfp8", "w8a8_int8", "w4a4_nvfp4", "w4a4_mxfp4")
    ),
    *(
        f"compressed_tensors.schemes.compressed_tensors_{one}"
        for one in ("w4a4_nvfp4", "w4a4_mxfp4", "w4a8_mxfp4", "w8a8_mxfp8")
    ),
    "fp8",
    "modelopt",
)


def accept(self, *arguments, **named):
    """Keeps what a method is made with; which kernel serves it depends on the machine."""
    self.made_with = (*arguments, *named.values())


def drop_kernels():
    """Lets methods be made without a device that could serve them."""
    UnquantizedFusedMoEMethod.__init__ = accept
    for name in MODULES:
        module = importlib.import_module(f"vllm.model_executor.layers.quantization.{name}")
        for kind in vars(module).values():
            is_own = isinstance(kind, type) and kind.__module__ == module.__name__
            if is_own and (kind.__name__ in EXPERTS or ".schemes." in kind.__module__):
                kind.__init__ = accept


def layer_of(name):
    """A layer of the class vLLM uses there, without its weights."""
    layer = object.__new__(CLASSES.get(name.rpartition(".")[2], ColumnParallelLinear))
    torch.nn.Module.__init__(layer)
    layer.moe_config = None
    for part in ("gate", "up", "down"):
        setattr(layer, f"ckpt_{part}_proj_name", f"{part}_proj")
    return layer


def described(config, layer, method):
    """What is built, by the tensors that it reads."""
    if method is None or type(method).__name__.startswith("Unquantized"):
        return "dense"
    if type(method).__name__ in EXPERTS:
        weights = method.made_with[0]
        is_packed = EXPERTS[type(method).__name__] == "pack-quantized"
        rest = [weights.num_bits, weights.group_size or -1, weights.symmetric] if is_packed else []
        return [EXPERTS[type(method).__name__], *rest]
    if type(method).__name__ == "CompressedTensorsEmbeddingWNA16Int":
        return ["pack-quantized", method.num_bits, method.group_size, True]
    scheme = getattr(layer, "scheme", None)
    name = type(scheme).__name__
    if name in PACKED:
        return ["pack-quantized", scheme.num_bits, scheme.group_size, scheme.symmetric]
    if name == "CompressedTensorsWNA8O8Int":
        return [scheme.quant_format]
    if name in STORAGES:
        return [STORAGES[name]]
    if type(method).__name__ == "Fp8LinearMethod":
        return ["fp8"]
    if config.get_name().startswith("modelopt"):
        return [STORAGES[config.quant_method]]
    return type(method).__name__


def built(config, name):
    layer = layer_of(name)
    try:
        return described(config, layer, config.get_quant_method(layer, name))
    except Exception as error:  # noqa: BLE001 whatever it is: it is the answer
        return type(error).__name__


def config_of(block):
    """The config of the class that vLLM takes for a block, with names mapped for Qwen3.5."""
    name = block["quant_method"]
    for one in ("modelopt", "modelopt_fp4", "modelopt_mxfp8"):
        override = get_quantization_config(one).override_quantization_method(block, None)
        name = override or name
    config = get_quantization_config(name).from_config(copy.deepcopy(block))
    mapper = Qwen3_5ForConditionalGeneration.hf_to_vllm_mapper
    config.apply_vllm_mapper(mapper.get_rename_mapper())
    config.packed_modules_mapping = Qwen3_5ForConditionalGeneration.packed_modules_mapping
    return config


def answer(job):
    """What vLLM makes of one job."""
    try:
        config = config_of(job["block"])
    except Exception as error:  # noqa: BLE001 whatever it is: it is the answer
        return type(error).__name__
    # The draft model gets the same config, names already mapped.
    draft = copy.deepcopy(config)
    draft.packed_modules_mapping = Qwen3_5MTP.packed_modules_mapping
    return {
        name: built(draft if name.startswith("mtp.") else config, name) for name in job["modules"]
    }


if __name__ == "__main__":
    # Some methods ask for the model's type before they have built anything.
    drop_kernels()
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.bfloat16)
    vllm_config._current_vllm_config = config
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(job) for job in jobs]))
