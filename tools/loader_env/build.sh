#!/usr/bin/env bash
# Build the environment in which tests load gptq checkpoints in Transformers:  build.sh [DIRECTORY]
#
# DIRECTORY is relative to the repository root and defaults to .loader-venv. It is left alone while
# its stamp says it was built from the same inputs. Needs a C compiler, and the headers of PCRE2,
# for a package that only comes as source: as root on Debian they are installed where they lack.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
requirements=tools/loader_env/requirements.txt
venv=${1:-.loader-venv}
stamp=$venv/loader-env.sha256

inputs=$({
    python3.11 -VV
    cat "${BASH_SOURCE[0]}" "$requirements"
} | sha256sum)
up_to_date() { [[ -f $stamp && $(<"$stamp") == "$inputs" ]]; }
if up_to_date; then
    exit 0
fi
# One build at a time.
exec 9<"$requirements"
flock 9
if up_to_date; then
    exit 0
fi
if [[ -e $venv && ! -f $venv/pyvenv.cfg ]]; then
    echo "$venv exists and is not a virtual environment: not touching it" >&2
    exit 1
fi

if ! echo '#include <pcre2.h>' | cc -DPCRE2_CODE_UNIT_WIDTH=8 -fsyntax-only -x c - 2>/dev/null; then
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        echo "no C compiler, or no pcre2.h (Debian: apt-get install libpcre2-dev)" >&2
        exit 1
    fi
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends libpcre2-dev >/dev/null
fi

rm -rf "$venv"
python3.11 -m venv "$venv"
pip=("$venv/bin/python" -m pip -q --disable-pip-version-check)
# What the others are built with, and torch, go first.
"${pip[@]}" install --no-deps $(grep -E '^(setuptools|torch)==' "$requirements")
# The pins are complete, as pip check says; left to itself pip would look for newer ones.
"${pip[@]}" install --no-deps --no-build-isolation -r "$requirements"
"${pip[@]}" check
"$venv/bin/python" - <<'PYTHON'
import torch

if torch.version.cuda is not None:
    raise SystemExit("pip installed a CUDA build of torch; point it at a CPU build of 2.13.0")
PYTHON
echo "$inputs" >"$stamp"
