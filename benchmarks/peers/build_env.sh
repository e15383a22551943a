#!/usr/bin/env bash
# Build the environment of one peer: benchmarks/peers/build_env.sh NAME
#
# NAME is a folder beside this script with a requirements.txt that pins every package. The result,
# .bench-venv/NAME, is left alone while its stamp says it was built from the same inputs.
# PYTHON chooses the interpreter (default: python3). torch must be a CPU build: where pip's
# configuration does not offer one under that pin, point pip at one (PIP_FIND_LINKS).
set -euo pipefail

if [[ $# -ne 1 || ! "$1" =~ ^[a-z0-9_]+$ ]]; then
  echo "usage: $0 NAME" >&2
  exit 2
fi
peers=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
requirements=$peers/$1/requirements.txt
venv=$(cd "$peers/../.." && pwd)/.bench-venv/$1
python=${PYTHON:-python3}
if [[ ! -f $requirements ]]; then
  echo "$requirements: no such file" >&2
  exit 2
fi

stamp=$({
  "$python" -VV
  cat "${BASH_SOURCE[0]}" "$requirements"
} | sha256sum | cut -d' ' -f1)
if [[ $(cat "$venv/.stamp" 2>/dev/null) == "$stamp" ]]; then
  exit 0
fi

rm -rf "$venv"
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
# torch first and everything without dependencies: the pins are complete (pip check says so), and
# left to itself pip adds gigabytes of CUDA to a torch that was not there before.
"${pip[@]}" install --no-deps "$(grep '^torch==' "$requirements")"
"${pip[@]}" install --no-deps --requirement "$requirements"
"${pip[@]}" check
# CUDA's libraries lie in a folder nvidia/; nvidia-ml-py, a single Python file, does not.
if compgen -G "$venv/lib/python*/site-packages/nvidia/" >/dev/null; then
  echo "CUDA packages in $venv" >&2
  exit 1
fi
echo "$stamp" >"$venv/.stamp"
