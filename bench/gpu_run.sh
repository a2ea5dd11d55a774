#!/usr/bin/env bash
# Everything that a GPU has to tell, in at most 8 minutes: tests, every DiNAT layer against float64, compute-sanitizer,
# times against the peers. Leaves JSON and logs in a folder and prints a table last. Needs torch, triton, numpy and
# einops; nothing of ours has to be installed.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() {
    echo "usage: bench/gpu_run.sh [--out DIR] [--dry-run]"
    echo "  --out DIR   where results go (default: bench/results/<device>)"
    echo "  --dry-run   try the script itself on the CPU, with tiny layers"
}

out="" dry=()
while [ $# -gt 0 ]; do
    case $1 in
    --out)
        [ $# -ge 2 ] || { echo "gpu_run.sh: --out needs a folder" >&2; exit 2; }
        out=$2
        shift
        ;;
    --dry-run) dry=(--dry-run) ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu_run.sh: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done

python=${PYTHON:-python3}
if ! "$python" -c "import torch, triton"; then
    echo "gpu_run.sh: $python needs torch and triton; PYTHON=... chooses another" >&2
    exit 2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ ${#dry[@]} -gt 0 ]; then
    export TRITON_INTERPRET=1
else
    unset TRITON_INTERPRET
fi
default=$("$python" -m dinat_triton.bench.gpu where "${dry[@]}") || exit 2
out=${out:-$default}
mkdir -p "$out" || exit 2
names=() states=() failed=0

# part NAME SECONDS COMMAND...: runs one part into its own log; what fails is counted, and the rest goes on.
part() {
    local name=$1 seconds=$2 start=$SECONDS code=0 state=ok
    shift 2
    echo "== $name (at most $seconds s)"
    timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1 || code=$?
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then state="out of time"; elif [ $code -ne 0 ]; then state="FAILED ($code)"; fi
    if [ $code -ne 0 ]; then
        failed=$((failed + 1))
        tail -n 25 "$out/$name.log"
    fi
    names+=("$name") states+=("$state, $((SECONDS - start)) s")
}

bench=("$python" -m dinat_triton.bench.gpu)
if [ ${#dry[@]} -gt 0 ]; then
    part tests 60 "$python" -m pytest -q -m gpu --collect-only tests/gpu
else
    workers=()
    if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 6); fi
    part tests 100 "$python" -m pytest -q -m gpu "${workers[@]}" tests/gpu
fi
part check 80 "${bench[@]}" check --out "$out" --budget 65 "${dry[@]}"
for tool in memcheck racecheck; do
    if [ ${#dry[@]} -gt 0 ]; then
        part "$tool" 60 "${bench[@]}" small --out "$out" "${dry[@]}"
    elif command -v compute-sanitizer >/dev/null; then
        # Without the cache every tensor is an allocation of its own, whose ends the sanitizer watches.
        part "$tool" 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 1 "${bench[@]}" small --out "$out"
    else
        names+=("$tool") states+=("skipped: no compute-sanitizer here")
    fi
done
part time 160 "${bench[@]}" time --out "$out" --budget 135 "${dry[@]}"

echo
timeout 20 "${bench[@]}" report --out "$out" "${dry[@]}" | tee "$out/table.txt" || failed=$((failed + 1))
echo
for i in "${!names[@]}"; do
    printf '%-10s %s\n' "${names[$i]}" "${states[$i]}"
done | tee -a "$out/table.txt"
echo "Results in $out"
[ $failed -eq 0 ]
