"""vllm_batch_runner.py for old releases of vLLM: their loading is real, their drafts one step deep.

    python vllm_old_runner.py jobs.json results.json

Run it with the python of an environment that tools/old_engine_env/build.sh makes. Before 0.28 or so
vLLM's CPU build has no Gated DeltaNet for speculation: prompts can be read and tokens drafted, but
no draft be verified. So a result holds
    outputs     the first token after each prompt
    drafts      the token that the MTP head drafts to follow it
    unloaded    parameters of the MTP head that the checkpoint did not fill
    vllm_version
The kernel for prompts is replaced by transformers' plain one, because it needs AMX.
"""

from itertools import pairwise

import vllm_batch_runner
import vllm_runner


def plain_delta_rule(query, key, value, g, beta, initial_state, **options):
    """Gated delta rule over packed sequences; arguments and results as those of vLLM's kernel."""
    import torch
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

    repeats = value.shape[2] // query.shape[2]
    query, key = (states.repeat_interleave(repeats, dim=2) for states in (query, key))
    bounds = options["cu_seqlens"].tolist()
    outputs, states = [], []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        part = slice(start, stop)
        output, state = torch_recurrent_gated_delta_rule(
            query[:, part],
            key[:, part],
            value[:, part],
            g[:, part],
            beta[:, part],
            initial_state=initial_state[number : number + 1].float(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=options["use_qk_l2norm_in_kernel"],
        )
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def record_loading(unloaded: list[str]) -> None:
    """Has the MTP model say which of its parameters no tensor was loaded into."""
    from vllm.model_executor.models.qwen3_5_mtp import Qwen3_5MTP

    load = Qwen3_5MTP.load_weights

    def load_and_record(model, weights):
        loaded = load(model, weights)
        # The scales of the KV cache are no part of a checkpoint.
        names = {name for name, _ in model.named_parameters() if ".attn." not in name}
        unloaded.extend(sorted(names - set(loaded)))
        return loaded

    Qwen3_5MTP.load_weights = load_and_record


def record_drafts(drafts: list[int]) -> None:
    """Has the drafter remember the first token that it drafts for each prompt."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    propose = SpecDecodeBaseProposer.propose

    def propose_and_record(*args, **options):
        tokens = propose(*args, **options)
        drafts.extend(tokens[:, 0].tolist())
        return tokens

    SpecDecodeBaseProposer.propose = propose_and_record


def run(job: dict) -> dict:
    """Loads the model with its MTP head, reads the prompts, and collects what a result holds."""
    import vllm
    from vllm import _custom_ops

    unloaded: list[str] = []
    drafts: list[int] = []
    if hasattr(_custom_ops, "chunk_gated_delta_rule_cpu"):
        _custom_ops.chunk_gated_delta_rule_cpu = plain_delta_rule
    record_loading(unloaded)
    record_drafts(drafts)
    result = vllm_runner.run({**job, "max_tokens": 1})
    return {
        "outputs": result["outputs"],
        "drafts": drafts[-len(result["outputs"]) :],
        "unloaded": unloaded,
        "vllm_version": vllm.__version__,
    }


if __name__ == "__main__":
    vllm_batch_runner.run_job = run
    vllm_batch_runner.main()
