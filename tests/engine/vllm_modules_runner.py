"""What vLLM asks a quantization config about while it builds a checkpoint's model.

    python vllm_modules_runner.py checkpoint result.json

The checkpoint's weights are dense, its quantization_config is AutoRound's. A result is a list of
[class, name], in vLLM's order: every module that was built with the config, first those of the
model, then those of its MTP head if it has one. A last entry ["error", …] says what came after.
"""

import json
import sys
from pathlib import Path

import vllm_runner  # first: it sets what vLLM and torch read when they are imported


def main() -> int:
    checkpoint, result_file = sys.argv[1:]
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    asked: list[list[str]] = []
    vllm_runner.disable_amx()
    import vllm
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization.inc import INCConfig
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    decide = INCConfig.get_quant_method
    classes = (LinearBase, ParallelLMHead, RoutedExperts)

    def note(quant_config, layer, prefix):
        found = next((kind.__name__ for kind in classes if isinstance(layer, kind)), None)
        if found:
            asked.append([found, prefix])
        return decide(quant_config, layer, prefix)

    INCConfig.get_quant_method = note
    mtp = {"method": "mtp", "num_speculative_tokens": 1}
    has_mtp = config["architectures"][0].startswith(("Qwen3_5", "Qwen3Next"))
    try:
        vllm.LLM(
            model=checkpoint,
            dtype="bfloat16",
            max_model_len=128,
            max_num_seqs=2,
            kv_cache_memory_bytes=vllm_runner.KV_CACHE_BYTES,
            enforce_eager=True,
            enable_prefix_caching=False,
            skip_mm_profiling=True,
            **({"speculative_config": mtp} if has_mtp else {}),
        )
    except Exception as error:  # noqa: BLE001 - what was built before is what is asked for
        asked.append(["error", vllm_runner.one_line(error)])
    Path(result_file).write_text(json.dumps(asked) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
