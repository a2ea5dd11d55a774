#!/usr/bin/env bash
# Everything that a GPU has to tell, in at most 8 minutes: tests, every DiNAT layer against float64 among them,
# compute-sanitizer, tuning, times against the peers with the tuned table, layers of a video model, whole models,
# overhead. Leaves JSON, one log and a table in a folder and prints the table last. Needs torch, triton, timm and
# pytest; nothing of ours has to be installed.
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
if ! "$python" -c "import torch, triton, timm, pytest"; then
    echo "gpu_run.sh: $python needs torch, triton, timm and pytest; PYTHON=... chooses another" >&2
    exit 2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ ${#dry[@]} -gt 0 ]; then
    export TRITON_INTERPRET=1
else
    unset TRITON_INTERPRET
fi
command=("$python" -m dinat_triton.cli)
if [ ${#dry[@]} -eq 0 ] && ! "$python" -c "import torch; assert torch.cuda.is_available()" 2>/dev/null; then
    echo "gpu_run.sh: torch sees no GPU; --dry-run tries everything on the CPU" >&2
    exit 2
fi
kind=$([ ${#dry[@]} -gt 0 ] && echo cpu || echo cuda)
folder="import torch; from dinat_triton.bench import harness; print(harness.results_folder(torch.device('$kind')))"
if [ -z "$out" ]; then out=$("$python" -c "$folder") || exit 2; fi
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
    timeout --kill-after=10 "$seconds" "$@" >>"$out/log.txt" 2>&1 || code=$?
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

# The interpreter is for nothing but the kernels: it would make whole models take minutes.
compiled=(env -u TRITON_INTERPRET) pytest=("$python" -m pytest -q -p no:cacheprovider -m gpu) workers=()
if [ ${#dry[@]} -gt 0 ]; then
    pytest+=(--collect-only)
    tune=(--layers dinat_mini@224:7x7* --budget 4 --dry-run)
    layers=(--layers dinat_mini@224:7x7* --peers sdpa swin --seconds 0.01)
    video=(--layers ltx@small:9x16x24* --peers --seconds 0.01)
    models=(--models dinat_mini --passes inference --no-memory --seconds 0.2)
    overhead=(--layers dinat_mini@224:14x14-d2 --seconds 0.01)
else
    if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 12); fi
    tune=(--layers dinat_mini@224 --budget 70 --out "$out/tuned.json" --force)
    layers=(--layers dinat_mini@224 --batch 128 --budget 75)
    video=(--layers ltx@decoder --batch 1 --peers)
    models=(--models swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 convnext_tiny dinat_mini dinat_tiny
        --seconds 0.5 --graph --compile swin_tiny_patch4_window7_224 dinat_tiny --budget 60)
    overhead=(--seconds 0.1)
fi
where=(--device "$kind")

part tests 75 "${pytest[@]}" "${workers[@]}" tests/gpu
for tool in memcheck racecheck; do
    # Without the cache every tensor is an allocation of its own, whose ends the sanitizer watches.
    sanitized=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1)
    if [ ${#dry[@]} -gt 0 ]; then
        sanitized=()
    elif ! command -v compute-sanitizer >/dev/null; then
        skip "$tool" "no compute-sanitizer here"
        continue
    fi
    part "$tool" 20 "${sanitized[@]}" "${pytest[@]}" tests/gpu -k test_every_kernel_once
done
part tune 80 "${compiled[@]}" "${command[@]}" tune "${where[@]}" "${tune[@]}"
part layers 105 "${compiled[@]}" "${command[@]}" bench layers "${where[@]}" "${layers[@]}" --backward \
    --out "$out/layers.json" --force
part video 28 "${compiled[@]}" "${command[@]}" bench layers "${where[@]}" "${video[@]}" --backward \
    --out "$out/video.json" --force
part models 90 "${compiled[@]}" "${command[@]}" bench models "${where[@]}" "${models[@]}" --out "$out/models.json" --force
part overhead 20 "${compiled[@]}" "${command[@]}" bench overhead "${overhead[@]}" --out "$out/overhead.json" --force

echo
found=()
for name in layers video models overhead; do
    if [ -f "$out/$name.json" ]; then found+=("$out/$name.json"); fi
done
timeout 18 "${command[@]}" bench report "${found[@]}" | tee "$out/table.txt" || failed=$((failed + 1))
echo
echo
for i in "${!names[@]}"; do
    printf '%-10s %s\n' "${names[$i]}" "${states[$i]}"
done | tee -a "$out/table.txt"
echo "Results in $out"
[ $failed -eq 0 ]
