"""Asks the real vLLM what it builds each module as, without building any.

    python vllm_resolver.py JOBS.json ANSWERS.json

Run it with the python of the environment that tools/engine_env/build.sh makes. A job holds
``format``, ``block`` (config.json's quantization_config), ``wrapper`` (vision-language class, or
text-only) and ``modules``: names as vLLM has them. Its answer is, by name, [bits, group_size], or
null for an unquantized module.
"""

# ruff: noqa: TID253 - a program of the environment that vLLM lives in

import copy
import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.inc.inc import INCConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_linear_quant_method
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
)
from vllm.model_executor.models.qwen3_5_mtp import Qwen3_5MTP

CLASSES = {
    "qkv_proj": QKVParallelLinear,
    "gate_up_proj": MergedColumnParallelLinear,
    "in_proj_qkvz": MergedColumnParallelLinear,
    "in_proj_ba": MergedColumnParallelLinear,
    "o_proj": RowParallelLinear,
    "out_proj": RowParallelLinear,
    "down_proj": RowParallelLinear,
    "lm_head": ParallelLMHead,
}
CONFIGS = {
    "auto_round": INCConfig,
    "gptq": AutoGPTQConfig,
    "compressed-tensors": CompressedTensorsConfig,
}


def layer_of(name):
    """A layer of the class vLLM uses there, without its weights."""
    kind = CLASSES.get(name.rpartition(".")[2], ColumnParallelLinear)
    layer = object.__new__(kind)
    torch.nn.Module.__init__(layer)
    return layer


def by_gptq(config, block, name):
    # The class of the MTP layer builds it dense for any such key, before this config is asked.
    hook = any(key.startswith("-:") and "mtp" in key for key in block["dynamic"])
    if name.startswith("mtp.layers.") and hook:
        return None
    method = get_linear_quant_method(config, layer_of(name), name, lambda own: own)
    if not isinstance(method, AutoGPTQConfig):
        return None
    assert method.is_sym
    return [method.weight_bits, method.group_size]


def by_inc(config, _block, name):
    found = config.config_parser.resolve(layer_of(name), name)
    assert found.sym and found.is_gptq
    return [found.bits, found.group_size] if found.quantized else None


def by_compressed_tensors(config, _block, name):
    found = config.get_scheme_dict(layer_of(name), layer_name=name)
    if found is None:
        return None
    scheme = config._get_scheme_from_parts(
        weight_quant=found["weights"],
        input_quant=found["input_activations"],
        output_quant=found["output_activations"],
        format=found["format"],
        layer_name=name,
    )
    assert type(scheme).__name__ == "CompressedTensorsWNA16"
    return [scheme.num_bits, scheme.group_size]


RESOLVERS = {
    "auto_round": by_inc,
    "gptq": by_gptq,
    "compressed-tensors": by_compressed_tensors,
}


def answer(job):
    """What vLLM makes of each module of one job."""
    target = Qwen3_5ForConditionalGeneration if job["wrapper"] else Qwen3_5ForCausalLM
    config = CONFIGS[job["format"]].from_config(copy.deepcopy(job["block"]))
    config.maybe_update_config("no such folder")
    mapper = getattr(target, "hf_to_vllm_mapper", None)
    if mapper is not None:
        config.apply_vllm_mapper(mapper.get_rename_mapper())
    config.packed_modules_mapping = target.packed_modules_mapping
    # The draft model gets the same config, names already mapped.
    draft = copy.deepcopy(config)
    draft.packed_modules_mapping = Qwen3_5MTP.packed_modules_mapping
    resolve = RESOLVERS[job["format"]]
    return {
        name: resolve(draft if name.startswith("mtp.") else config, job["block"], name)
        for name in job["modules"]
    }


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(job) for job in jobs]))
