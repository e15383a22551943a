"""Runs vllm_runner's jobs one after another, each in a process of its own, importing vLLM once.

    python vllm_batch_runner.py jobs.json results.json

jobs.json holds an object of vllm_runner's jobs, results.json its results under the same names. Each
job runs in a fork of this process, so that a crash, a hang or memory that was never returned stays
the job's own: then its result is {"error": one line}, as for any failure. The first job should be
one that works: what it imports, this process imports for all that follow. What a job prints goes to
a .log file beside results.json. Results lack ``modules``: releases of vLLM differ in where their
kernels are.
"""

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

import vllm_runner  # first: it sets what vLLM and torch read when they are imported

TIMEOUT = 120
run_job = vllm_runner.run


def attempt(job: dict, result_file: Path) -> None:
    """Runs one job, in its own process."""
    log = os.open(result_file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        result = run_job(job)
    except Exception as error:  # noqa: BLE001 - a process edge: whatever it is, the caller reads it
        result = {"error": vllm_runner.one_line(error)}
    result["imported"] = list(sys.modules)
    result_file.write_text(json.dumps(result) + "\n")
    os._exit(0)  # nothing here is worth an orderly end, which takes vLLM seconds


def outcome(job: dict, result_file: Path) -> dict:
    """The job's result, or what became of its process."""
    result_file.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(job, result_file))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        return {"error": f"TimeoutError: killed after {TIMEOUT} seconds"}
    if not result_file.exists():
        return {"error": f"SystemExit: the process died with exit code {process.exitcode}"}
    return json.loads(result_file.read_text())


def import_all(names: list[str]) -> None:
    """Imports what a job needed, so that the forks to come start in two seconds, not twenty."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or each job's collections would look through all of it again


def main() -> None:
    """See the module's docstring."""
    jobs_file, results_file = map(Path, sys.argv[1:])
    vllm_runner.disable_amx()
    import vllm.entrypoints.llm
    import vllm.v1.worker.cpu_worker  # noqa: F401

    vllm_runner.KV_CACHE_BYTES = 64 << 20
    vllm_runner.describe_worker = lambda _worker: {}
    results = {}
    for number, (name, job) in enumerate(json.loads(jobs_file.read_text()).items()):
        results[name] = outcome(job, results_file.with_name(f"{results_file.stem}-{number}.json"))
        import_all(results[name].pop("imported", []))
    results_file.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
