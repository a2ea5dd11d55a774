#!/usr/bin/env bash
# Everything that a GPU has to tell, in at most 8 minutes: tests, every DiNAT layer against float64, compute-sanitizer,
# tuning, times against the peers with the tuned table, whole models, first calls, overhead. Leaves JSON, one log and a
# table in a folder and prints the table last. Needs torch, triton, numpy and einops; the models also a recent timm.
# Nothing of ours has to be installed.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() {
    echo "usage: bench/gpu_run.sh [--out DIR] [--dry-run]"
    echo "  --out DIR   where results go (default: bench/results/<device>)"
    echo "  --dry-run   try the script itself on the CPU, with tiny layers"
    echo "exit codes: 0 every part passed, 1 a part failed, 2 wrong use or no GPU"
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
gpu=("$python" -m dinat_triton.bench.gpu)
command=("$python" -m dinat_triton.cli)
default=$("${gpu[@]}" where "${dry[@]}") || exit 2
out=${out:-$default}
mkdir -p "$out" && : >"$out/log.txt" || exit 2
names=() states=() failed=0

# part NAME SECONDS COMMAND...: runs one part into the log; what fails is counted, and the rest goes on.
part() {
    local name=$1 seconds=$2 start=$SECONDS code=0 state=ok from
    shift 2
    # The interpreter on a CPU is in no hurry.
    if [ ${#dry[@]} -gt 0 ]; then seconds=200; fi
    echo "== $name (at most $seconds s)" | tee -a "$out/log.txt"
    from=$(wc -l <"$out/log.txt")
    timeout --kill-after=5 "$seconds" "$@" >>"$out/log.txt" 2>&1 || code=$?
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then state="out of time"; elif [ $code -ne 0 ]; then state="FAILED ($code)"; fi
    if [ $code -ne 0 ]; then
        failed=$((failed + 1))
        tail -n "+$((from + 1))" "$out/log.txt" | tail -n 25
    fi
    names+=("$name") states+=("$state, $((SECONDS - start)) s")
}

skip() {
    names+=("$1") states+=("skipped: $2")
}

if [ ${#dry[@]} -gt 0 ]; then
    part tests 75 "$python" -m pytest -q -m gpu --collect-only tests/gpu
else
    workers=()
    if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 6); fi
    part tests 75 "$python" -m pytest -q -m gpu "${workers[@]}" tests/gpu
fi
part check 45 "${gpu[@]}" check --out "$out" --budget 37 "${dry[@]}"
for tool in memcheck racecheck; do
    if [ ${#dry[@]} -gt 0 ]; then
        part "$tool" 25 "${gpu[@]}" small --out "$out" "${dry[@]}"
    elif command -v compute-sanitizer >/dev/null; then
        # Without the cache every tensor is an allocation of its own, whose ends the sanitizer watches.
        part "$tool" 25 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 1 "${gpu[@]}" small --out "$out"
    else
        skip "$tool" "no compute-sanitizer here"
    fi
done

# The interpreter is for the kernels' own parts: it cannot be tuned, and would make whole models take minutes.
compiled=(env -u TRITON_INTERPRET)
if [ ${#dry[@]} -gt 0 ]; then
    where=(--device cpu)
    tune=(--layers dinat_mini@224:7x7* --budget 4 --dry-run)
    models=(--models dinat_mini --passes inference --no-memory --seconds 0.2)
    layers=(--layers dinat_mini@224:7x7*)
else
    where=(--device cuda)
    tune=(--layers dinat_mini@224 dinat_large@224 --budget 45 --export "$out/tuned.json")
    models=(--models swinv2_tiny_window8_256 convnext_tiny dinat_mini dinat_tiny --seconds 0.5 --graph
        --compile swin_tiny_patch4_window7_224 dinat_tiny --budget 60)
    layers=(--layers dinat_mini@224)
fi
part tune 58 "${compiled[@]}" "${command[@]}" tune "${where[@]}" "${tune[@]}"
part time 88 "${gpu[@]}" time --out "$out" --budget 68 "${dry[@]}"
if reason=$("$python" -c "from dinat_triton.bench.models import check_timm; check_timm()" 2>&1); then
    part models 93 "${compiled[@]}" "${command[@]}" bench models "${where[@]}" "${models[@]}" --out "$out/models.json"
else
    skip models "${reason##*Error: }"
fi
part first-call 25 "${compiled[@]}" "${command[@]}" bench first-call "${where[@]}" "${layers[@]}" --jobs 4 \
    --out "$out/first_call.json"
part overhead 16 "${compiled[@]}" "${command[@]}" bench overhead "${where[@]}" --seconds 0.1 --out "$out/overhead.json"

echo
timeout 18 "${gpu[@]}" report --out "$out" "${dry[@]}" | tee "$out/table.txt" || failed=$((failed + 1))
echo
for i in "${!names[@]}"; do
    printf '%-10s %s\n' "${names[$i]}" "${states[$i]}"
done | tee -a "$out/table.txt"
echo "Results in $out"
[ $failed -eq 0 ]
