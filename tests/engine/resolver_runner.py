"""Asks the real vLLM, without building a model, what it would build modules as.

    python resolver_runner.py JOB.json RESULT.json

JOB: [{"model": {"module": "qwen3_5", "class": ...}, "draft": {...}, "modules": [{"name", "kind",
"mtp", "shape"}], "metadata": {tensor: safetensors dtype}, "blocks": [declaration]}]. The
declaration goes through vLLM's own config class, mapper and ``get_quant_method``, on layers that
have a class and no weights, as on a CUDA device. RESULT: for each block {"refusal": exception or
null, "built": {module: "dense" | [storage, bits, group size, symmetric] | {"raises": exception}}}.
"""

# ruff: noqa: TID253 this program is run by vLLM's own Python
from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    auto_awq,
    auto_gptq,
    get_quantization_config,
    moe_wna16,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

CLASSES = {"linear": LinearBase, "head": ParallelLMHead, "experts": RoutedExperts}
UNQUANTIZED = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
WIDTH = 3 * 4096
"""Of experts: any group size divides it."""


def config_of(
    block: dict[str, Any], metadata: dict[str, dict[str, str]], model: Any
) -> QuantizationConfig:
    """The declaration as vLLM holds it once the model's class has renamed what it names."""
    name = block["quant_method"].lower()
    for override in ("auto_gptq", "auto_awq", "inc"):
        found = get_quantization_config(override).override_quantization_method(block, None)
        if found is not None:
            name = found
            break
    config = get_quantization_config(name).from_config(copy.deepcopy(block))
    scan = mock.Mock(return_value=metadata)
    with (
        mock.patch.object(auto_gptq, "get_safetensors_params_metadata", scan),
        mock.patch.object(auto_awq, "get_safetensors_params_metadata", scan),
    ):
        config.maybe_update_config("folder")
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        config.apply_vllm_mapper(mapper.get_rename_mapper())
    return config


def layer_of(module: dict[str, Any]) -> torch.nn.Module:
    """A layer of the right class, with what kernels ask of its shape."""
    kind = CLASSES[module["kind"]]
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    outputs, inputs = module["shape"]
    layer.output_size_per_partition = layer.output_size = outputs
    layer.input_size_per_partition = layer.input_size = inputs
    layer.moe_config = mock.MagicMock(hidden_dim=WIDTH)
    layer.moe_config.intermediate_size_per_partition_unpadded = WIDTH
    return layer


def built(config: QuantizationConfig, module: dict[str, Any]) -> Any:
    """What the engine builds a module as."""
    try:
        method = config.get_quant_method(layer_of(module), module["name"])
    except Exception as error:  # noqa: BLE001
        return {"raises": type(error).__name__, "message": str(error)}
    if method is None or isinstance(method, UNQUANTIZED):
        return "dense"
    method = getattr(method, "scheme", method)  # INC wraps it twice
    method = getattr(method, "linear_method", method)
    inner = method.quant_config
    if isinstance(inner, moe_wna16.MoeWNA16Config):
        return [inner.linear_quant_method, inner.weight_bits, inner.group_size, not inner.has_zp]
    if isinstance(inner, auto_awq.AutoAWQConfig):
        return ["awq", inner.weight_bits, inner.group_size, not inner.zero_point]
    return ["gptq", inner.weight_bits, inner.group_size, inner.is_sym]


def answer(job: dict[str, Any], block: dict[str, Any], model: Any, draft: Any) -> dict[str, Any]:
    """One declaration's result."""
    metadata = {name: {"dtype": dtype} for name, dtype in job["metadata"].items()}
    try:
        config = config_of(block, metadata, model)
    except Exception as error:  # noqa: BLE001
        return {"refusal": type(error).__name__, "message": str(error), "built": {}}
    found = {}
    for is_draft, owner in ((False, model), (True, draft)):
        config.packed_modules_mapping = owner.packed_modules_mapping
        for module in job["modules"]:
            if module["mtp"] is is_draft:
                found[module["name"] + ("|mtp" if is_draft else "")] = built(config, module)
    return {"refusal": None, "built": found}


def classes_of(job: dict[str, Any]) -> list[Any]:
    """The model's class and the draft's."""
    return [
        getattr(
            importlib.import_module(f"vllm.model_executor.models.{job[key]['module']}"),
            job[key]["class"],
        )
        for key in ("model", "draft")
    ]


def main() -> None:
    """See the module's docstring."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    # Much is decided while modules are imported: that by the real device.
    get_quantization_config("inc")
    classes = [classes_of(job) for job in jobs]
    kind = type(current_platform)
    backend = mock.Mock(return_value=(None, None))
    with (
        mock.patch.object(kind, "is_cpu", lambda *_: False),
        mock.patch.object(kind, "is_cuda", lambda *_: True),
        mock.patch.object(kind, "get_device_capability", lambda *_, **__: DeviceCapability(9, 0)),
        mock.patch.object(auto_gptq, "select_wna16_moe_backend", backend),
        mock.patch.object(auto_awq, "select_wna16_moe_backend", backend),
        mock.patch.object(moe_wna16, "select_wna16_moe_backend", backend),
        mock.patch.object(UnquantizedFusedMoEMethod, "__init__", lambda *_: None),
    ):
        results = [
            [answer(job, block, *owners) for block in job["blocks"]]
            for job, owners in zip(jobs, classes, strict=True)
        ]
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
