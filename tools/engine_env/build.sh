#!/usr/bin/env bash
# Build the environment in which tests run vLLM on CPU:  build.sh [DIRECTORY]
#
# DIRECTORY is relative to the repository root and defaults to .engine-venv. Nothing is done when
# the environment there was completed from the same inputs; otherwise it is built from scratch, so
# an interrupted build leaves nothing behind that a later one could trip over.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
env=tools/engine_env
venv=${1:-.engine-venv}
stamp=$venv/engine-env.sha256

inputs=$(find "$env" -type f -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z |
    xargs -0 sha256sum | sha256sum)
up_to_date() { [[ -f $stamp && $(<"$stamp") == "$inputs" ]]; }
if up_to_date; then
    exit 0
fi

# One build at a time. The lock lives as long as the last process started below, so this also waits
# for a pip that outlived its killed build.
exec 9<"$env/requirements.txt"
flock 9
if up_to_date; then
    exit 0
fi
if [[ -e $venv && ! -f $venv/pyvenv.cfg ]]; then
    echo "$venv exists and is not a virtual environment: not touching it" >&2
    exit 1
fi

if [[ -e $venv ]]; then
    # pyvenv.cfg goes last: a removal cut short must still leave a virtual environment to remove.
    find "$venv" -mindepth 1 -maxdepth 1 -not -name pyvenv.cfg -exec rm -rf {} +
    rm -rf "$venv"
fi
python3.11 -m venv "$venv"
pip=("$venv/bin/python" -m pip -qq --disable-pip-version-check install --no-deps)
"${pip[@]}" -r "$env/requirements.txt"
"${pip[@]}" --no-build-isolation "$env/shim"

"$venv/bin/python" - <<'PYTHON'
import torch

if torch.version.cuda is not None:
    raise SystemExit("pip installed a CUDA build of torch; point it at a CPU build of 2.13.0")
import torchvision  # through the shim
import vllm
from vllm.model_executor.models import qwen3_5, qwen3_5_mtp

print(f"vllm {vllm.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}")
PYTHON
echo "$inputs" >"$stamp"
