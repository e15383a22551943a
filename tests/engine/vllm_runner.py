"""Run one vLLM generation on CPU, as a JSON job file says, and write a JSON result file.

    python vllm_runner.py job.json result.json

Run it with the python of the environment that tools/engine_env/build.sh makes.

A job holds
    model               directory of the checkpoint
    prompts_token_ids   list of prompts, each a list of token ids; all run as one batch
    max_tokens, max_model_len, ignore_eos
    mtp                 number of tokens the MTP head drafts per step; 0 runs without it
    logprobs            optional: how many prompt logprobs per position, -1 for the whole vocabulary
    dtype               optional, bfloat16 unless given
    mamba_ssm_cache_dtype   optional; releases before 0.28 need to be told "float32" on the CPU
A result holds
    outputs             greedy token ids, one list per prompt
    modules             {name: {class, quant_method, kernel}} as vLLM built them; the draft model's
                        names start with "draft:"
    drafts, draft_tokens, accepted, accepted_per_pos
                        vLLM's own counters; all zero or empty without MTP
    seconds             {load, generate}; load includes importing vLLM
    vllm_version
    prompt_logprobs     if asked for: per prompt, per position, {token id: logprob}; empty at the
                        first position, which nothing predicts
Any failure makes the result {"error": one line} and the exit status 1.
"""

import json
import os
import sys
import time
from pathlib import Path

# All of these are read while vLLM, torch or OpenMP load, so they are set before that.
os.environ.update(
    # Engine and model live in this process: the module tree can be read.
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    # With torch's own OpenMP and two threads, one speculative step takes most of a second; with
    # one thread, milliseconds. One thread also makes sums independent of the number of cores.
    OMP_NUM_THREADS="1",
    # On a machine with AMX, vLLM would otherwise quantize activations to 8 bits for W4 layers.
    VLLM_CPU_INT4_W4A8="0",
    # vLLM remembers model classes it has inspected; what it remembers belongs to this environment.
    VLLM_CACHE_ROOT=str(Path(sys.prefix) / "vllm-cache"),
    # Prompt logprobs would otherwise start a C++ compiler for one small function.
    TORCHDYNAMO_DISABLE="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

KV_CACHE_BYTES = 256 << 20  # touched in full while loading, so it costs that much memory
COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}
ACCEPTED_PER_POS = "vllm:spec_decode_num_accepted_tokens_per_pos"


def kernel_of(module) -> str | None:
    """Class name of the mixed-precision kernel that serves a module, if one does.

    Where it hangs depends on the checkpoint format: on the quantization method (GPTQ), on the
    module's scheme (compressed-tensors), or on a method inside the method's scheme (AutoRound).
    """
    from vllm.model_executor.kernels.linear import MPLinearKernel

    method = getattr(module, "quant_method", None)
    scheme = getattr(method, "scheme", None) or getattr(module, "scheme", None)
    for holder in (method, scheme, getattr(scheme, "linear_method", None)):
        kernel = getattr(holder, "kernel", None)
        if isinstance(kernel, MPLinearKernel):
            return type(kernel).__name__
    return None


def describe(model, prefix: str) -> dict[str, dict[str, str | None]]:
    """Every module that holds parameters of its own, by name."""
    described = {}
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        method = getattr(module, "quant_method", None)
        described[prefix + name] = {
            "class": type(module).__name__,
            "quant_method": None if method is None else type(method).__name__,
            "kernel": kernel_of(module),
        }
    return described


def describe_worker(worker) -> dict[str, dict[str, str | None]]:
    """The trunk's modules and, with speculation on, the draft model's."""
    runner = worker.model_runner
    described = describe(runner.model, "")
    if hasattr(runner, "drafter"):
        described |= describe(runner.drafter.model, "draft:")
    return described


def counters(llm) -> dict:
    """vLLM's speculation counters; zero or empty without MTP."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    per_pos = metrics.get(ACCEPTED_PER_POS)
    return {
        **{key: metrics[name].value if name in metrics else 0 for key, name in COUNTERS.items()},
        "accepted_per_pos": [] if per_pos is None else list(per_pos.values),
    }


def disable_amx() -> None:
    """Makes vLLM run the same kernels on all machines; call it before importing vLLM.

    Its W4 kernel uses AMX tiles where the CPU has them without asking the kernel for leave first,
    and dies of an illegal instruction.
    """
    import torch

    torch.cpu._is_amx_tile_supported = lambda: False


def run(job: dict) -> dict:
    """Load the model, generate greedily, and collect what the result file reports."""
    started = time.monotonic()
    disable_amx()
    import vllm

    options = {key: job[key] for key in ["mamba_ssm_cache_dtype"] if key in job}
    if job["mtp"]:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": job["mtp"]}
    logprobs = job.get("logprobs")
    if logprobs is not None:
        options["max_logprobs"] = logprobs
    llm = vllm.LLM(
        model=job["model"],
        dtype=job.get("dtype", "bfloat16"),
        max_model_len=job["max_model_len"],
        max_num_seqs=len(job["prompts_token_ids"]),
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        # Token ids in, token ids out: no tokenizer, no vision tower, no compilation.
        skip_tokenizer_init=True,
        language_model_only=True,
        enforce_eager=True,
        # With it on, speculation on a hybrid model needs a Triton kernel, and there is no Triton.
        enable_prefix_caching=False,
        disable_log_stats=False,  # the speculation counters are part of the statistics
        **options,
    )
    loaded = time.monotonic()
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in job["prompts_token_ids"]],
        vllm.SamplingParams(
            temperature=0,
            max_tokens=job["max_tokens"],
            ignore_eos=job["ignore_eos"],
            prompt_logprobs=logprobs,
            detokenize=False,
        ),
        use_tqdm=False,
    )
    finished = time.monotonic()

    result = {
        "outputs": [list(output.outputs[0].token_ids) for output in outputs],
        "modules": llm.collective_rpc(describe_worker)[0],
        **counters(llm),
        "seconds": {
            "load": round(loaded - started, 2),
            "generate": round(finished - loaded, 2),
        },
        "vllm_version": vllm.__version__,
    }
    if logprobs is not None:
        result["prompt_logprobs"] = [
            [
                {str(token): entry.logprob for token, entry in (at or {}).items()}
                for at in output.prompt_logprobs
            ]
            for output in outputs
        ]
    return result


def one_line(error: BaseException) -> str:
    """The error at the root of a chain of deliberate re-raises, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main() -> int:
    job_file, result_file = map(Path, sys.argv[1:])
    try:
        result = run(json.loads(job_file.read_text()))
    except Exception as error:  # noqa: BLE001 - a process edge: whatever it is, the caller reads it
        result = {"error": one_line(error)}
    result_file.write_text(json.dumps(result) + "\n")
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main())
