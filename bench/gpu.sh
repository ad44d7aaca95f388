#!/usr/bin/env bash
# Everything that a GPU is needed for, in one bounded run: environment, build, layouts, conformance, sanitizer, benchmarks.
#
#   bench/gpu.sh OUTDIR [--dry-run]
#
# A part that fails or runs out of its time does not stop the next; OUTDIR/summary.txt has a line for each, and the exit
# status is that of the worst. --dry-run takes every step on small shapes without a GPU, in Triton's interpreter and the
# emulator of the CUDA kernels. OUTDIR/layouts.json is what the emulator is held to (bench/layouts.py).
# PYTHON names the interpreter, MINUTES (20) bounds the whole. The limits of the parts fit in it, so that none takes
# another's time; the benchmarks, which record row by row, come last and have what the others left.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() {
    echo "usage: bench/gpu.sh OUTDIR [--dry-run]" >&2
    exit 2
}
[ $# -ge 1 ] && [ $# -le 2 ] || usage
dry=0 dry_flag=
if [ $# -eq 2 ]; then
    [ "$2" = --dry-run ] || usage
    dry=1
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
minutes=${MINUTES:-20}
deadline=$(($(date +%s) + minutes * 60))
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
: >"$out/summary.txt"
worst=0

# part NAME SECONDS COMMAND...: runs a command for at most so long of 20 minutes, in proportion of fewer or more, or for
# the rest of them, its output in OUTDIR/NAME.log. A dry run, on whatever machine, is bounded as a whole alone.
part() {
    local name=$1 limit=$2 left began status verdict
    shift 2
    began=$(date +%s)
    left=$((deadline - began))
    if [ "$dry" = 1 ] || [ "$limit" = rest ]; then limit=$left; else limit=$((limit * minutes / 20)); fi
    if [ "$left" -lt 5 ]; then
        verdict="not run: $minutes minutes are over"
        worst=1
    else
        timeout -k 5 "$((left < limit ? left : limit))" "$@" >"$out/$name.log" 2>&1
        status=$?
        case $status in
            0) verdict=ok ;;
            77) verdict="skipped: $(tail -n 1 "$out/$name.log")" ;;
            124 | 137) verdict="out of time" worst=1 ;;
            *) verdict="failed ($status): $(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | cut -c1-160)" worst=1 ;;
        esac
    fi
    printf '%-12s %4ds  %s\n' "$name" "$(($(date +%s) - began))" "$verdict" | tee -a "$out/summary.txt"
}

skip() {
    echo "$1"
    exit 77
}

environment() {
    nvidia-smi || rocm-smi || echo "no GPU tool"
    nvcc --version || echo "no nvcc"
    "$python" -m torch.utils.collect_env || true
    "$python" -m pip list 2>/dev/null | grep -iE '^(torch|triton|flash|liger|flashinfer|nvidia|transformers)' || true
}

build() {
    [ "$dry" = 0 ] || skip "dry run: what is built is used"
    # Without nvcc there is no CUDA module to test; where it is, its failure is one.
    LONGROPE_KERNELS_CUDA=$(command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] && echo 1 || echo auto) \
        "$python" setup.py build_ext --inplace
}

conformance() {
    "$python" -m pytest -p no:cacheprovider -q tests/test_gpu.py tests/test_gpu_cuda.py
}

sanitize() {
    local tool=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
    tool=$(command -v compute-sanitizer || echo "$tool")
    if [ "$dry" = 1 ]; then
        [ "$1" = memcheck ] || skip "dry run: the same steps as memcheck"
        "$python" -m bench.gpu --smoke
        return
    fi
    [ -x "$tool" ] || skip "compute-sanitizer is not installed"
    "$tool" --tool "$1" --error-exitcode 1 --target-processes all "$python" -m bench.gpu --smoke
}

# Functions run in a shell of their own under `timeout`, which takes commands alone.
export python dry
export -f environment build conformance sanitize skip
shell() { part "$1" "$2" bash -c "${*:3}"; }

flags=(--out "$out")
if [ "$dry" = 1 ]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1 LONGROPE_KERNELS_DRY_RUN=1
    flags+=(--dry-run)
    dry_flag=--dry-run
fi
shell environment 30 environment
shell build 270 build
part layouts 60 "$python" -m bench.layouts "$out/layouts.json" ${dry_flag:+"$dry_flag"}
shell conformance 240 conformance
shell memcheck 100 sanitize memcheck
shell synccheck 60 sanitize synccheck
shell racecheck 60 sanitize racecheck
# A work that began may take a minute yet; what no time is left for is in the record as such.
left=$((deadline - $(date +%s)))
part benchmark rest "$python" -m bench.gpu "${flags[@]}" --minutes "$((left > 120 ? left / 60 - 1 : 1))"
exit "$worst"
