"""vllm_runner.py with a stand-in for the kernel of quantized experts, which vLLM lacks on the CPU.

    python vllm_moe_runner.py job.json result.json

vLLM decides by its own rules which experts are quantized, makes its own parameters for them and
fills these with its own loaders. Here they are then de-quantized, by the layout of its kernels, and
run by its kernel for dense experts.
"""

import sys

import vllm_runner  # first: it sets what vLLM and torch read when they are imported


def dequantized(words, scales, bits: int):
    """Dense weights [E, N, K] of words int32 [E, N, K * bits / 32] and scales [E, N, G]."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts & 2**bits - 1).flatten(-2) - 2 ** (bits - 1)
    grouped = codes.unflatten(-1, (scales.shape[-1], -1)) * scales.float().unsqueeze(-1)
    return grouped.flatten(-2).to(scales.dtype)


def stand_in() -> None:
    """Replaces the choice of a kernel, and what is done with the weights once they are loaded."""
    import torch
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization import auto_gptq
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as compressed,
    )
    from vllm.model_executor.layers.quantization.inc.schemes import inc_wna16_scheme as inc

    def chosen(*_args, **_options):
        return WNA16MoEBackend.MARLIN, None

    def finish(method, layer, w13, w2) -> None:
        dense = UnquantizedFusedMoEMethod(layer.moe_config)
        for name, weight in (("w13_weight", w13), ("w2_weight", w2)):
            layer.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
        dense.process_weights_after_loading(layer)
        method.moe_kernel = dense.moe_kernel
        method.apply, method.apply_monolithic = dense.apply, dense.apply_monolithic

    def finish_gptq(method, layer) -> None:
        parts = []
        for stack in ("w13", "w2"):
            words = getattr(layer, f"{stack}_qweight").transpose(1, 2).contiguous()
            scales = getattr(layer, f"{stack}_scales").transpose(1, 2).contiguous()
            parts.append(dequantized(words, scales, method.quant_config.weight_bits))
        finish(method, layer, *parts)

    def finish_compressed(method, layer) -> None:
        parts = []
        for stack in ("w13", "w2"):
            words, scales = (getattr(layer, f"{stack}_weight_{x}") for x in ("packed", "scale"))
            parts.append(dequantized(words, scales, method.num_bits))
        finish(method, layer, *parts)

    for module in (auto_gptq, compressed):
        module.select_wna16_moe_backend = chosen
    auto_gptq.AutoGPTQMoEMethod.process_weights_after_loading = finish_gptq
    method = compressed.CompressedTensorsWNA16MoEMethod
    method.process_weights_after_loading = finish_compressed
    # On the CPU it would build these experts dense.
    inc.INCWna16Scheme.get_moe_method = lambda _self, _config, layer, _prefix, layer_config: (
        inc._resolve_gptq_moe(layer, layer_config)
    )


if __name__ == "__main__":
    run = vllm_runner.run

    def run_with_stand_in(job: dict) -> dict:
        """Patches vLLM where it is imported."""
        stand_in()
        return run(job)

    vllm_runner.run = run_with_stand_in
    sys.exit(vllm_runner.main())
