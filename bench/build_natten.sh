#!/usr/bin/env bash
# NATTEN's wheel for the comparison on a Hopper GPU, trimmed to head dim 32 in 2-D; builds without a GPU.
# A full build for one GPU compiles almost 3000 kernels; this one compiles the 34 that the benchmark can call: float16
# and bfloat16, no causal masks, cutlass-fna, hopper-fna and the FMHA that NATTEN itself turns to where the kernel is as
# large as the map. Anything else ends in an error from NATTEN.
set -euo pipefail

natten=0.21.7 torch=2.11 cuda=13.0

usage() {
    echo "usage: bench/build_natten.sh [--out DIR]"
    echo "  --out DIR   where the wheel goes (default: the current folder)"
    echo "Needs uv, g++ and 8 GB in \$TMPDIR. The wheel fits torch $torch and one Python version, which PYTHON=3.12"
    echo "or a path chooses. JOBS=2 chooses how many compilers run at once, each with up to 6 GB of memory."
}

fail() {
    echo "build_natten.sh: $1" >&2
    exit 2
}

out=.
while [ $# -gt 0 ]; do
    case $1 in
    --out)
        [ $# -ge 2 ] && [ -n "$2" ] || fail "--out needs a folder"
        out=$2
        shift
        ;;
    -h | --help) usage; exit 0 ;;
    *) echo "build_natten.sh: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
for tool in uv g++; do command -v "$tool" >/dev/null || fail "needs $tool"; done
mkdir -p "$out" && out=$(cd "$out" && pwd) || fail "cannot write to $out"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv --quiet --seed --python "${PYTHON:-3.12}" venv
export PATH=$work/venv/bin:$PATH
uv pip install --quiet --python venv/bin/python "torch==$torch.*" numpy cmake ninja packaging setuptools wheel \
    "nvidia-nvvm==$cuda.*" nvidia-cuda-{nvcc,crt,cccl,runtime}"==$cuda.*"
pip download --quiet --no-binary natten --no-deps --no-build-isolation "natten==$natten"
mkdir src && tar -xzf natten-*.tar.gz -C src --strip-components 1

# Fewer kernels. What NATTEN cannot leave out itself, its reference, becomes the stub that it has for such builds.
sed -i -E \
    -e 's/^( *SUPPORTED_ARCHS = ).*/\1[80]/' \
    -e 's/^( *(NA_RANKS|NA_DIMS) = ).*/\1[2]/' \
    -e 's/^( *HEAD_DIMS = ).*/\1[32]/' \
    -e 's/^( *2: \[)(\[0, 0\]|\(False, False\)), .*/\1\2],/' \
    -e '/^        NATTEN_Float,$/d' \
    -e '/^ +\([0-9]+, [0-9]+, (64|128|2\*\*16)\),/d' src/scripts/autogen_{fna,fmha,hopper_*}.py
# One file per kind: each of Hopper's takes minutes before its first kernel.
sed -i -E -e '/^        "reference": \("/d' -e 's/^( +"[a-z-]*(fna|fmha)[a-z-]*": )[0-9]+,/\11,/' src/setup.py
sed -i '1i #undef NATTEN_WITH_CUTLASS' src/csrc/src/reference_*.cu
sed -i '/^project(/a set(CMAKE_SKIP_RPATH ON)' src/csrc/CMakeLists.txt
sed -i -E "s/^(__version__ = .*)\"/\1+sm90.hd32\"/" src/src/natten/version.py

# The wheels' CUDA has no name for the linker and another folder for libraries than CMake looks in.
toolkit=$(echo "$work"/venv/lib/python*/site-packages/nvidia/cu13)
ln -sfn lib "$toolkit/lib64" && ln -sf libcudart.so.13 "$toolkit/lib/libcudart.so"
export CUDACXX=$toolkit/bin/nvcc CUDA_HOME=$toolkit CUDA_PATH=$toolkit CMAKE_GENERATOR=Ninja
export NATTEN_CUDA_ARCH=9.0 NATTEN_N_WORKERS=${JOBS:-2}
pip wheel --no-deps --no-build-isolation --wheel-dir dist ./src
uv pip install --quiet --python venv/bin/python --no-deps dist/natten-*.whl
python -c "import natten; assert natten.HAS_LIBNATTEN, 'the library does not load'"
cp dist/natten-*.whl "$out"
ls -l "$out"/natten-*.whl
