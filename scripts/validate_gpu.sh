#!/usr/bin/env bash
# Validates mmkernels on a machine with a GPU: installs it, checks every kernel against its reference on the device,
# runs the tests that use the device, and measures against what one would run there instead.
#
#   scripts/validate_gpu.sh [--device cuda|cpu] PHASE...
#   scripts/validate_gpu.sh [--device cuda|cpu] --short [STEP...]
#
#   install           build and install into $SITE, by default build/validate (the machine's own packages stay as they
#                     are), the CUDA kernels too where nvcc is
#   info              versions, GPU, which backends are there
#   check             check-clip_loss, check-siglip_loss, check-patch_embed, check-rotary_embed, check-nearest_code,
#                     check-max_similarity and check-span_attention, each a phase of its own
#   sanitize          sanitize-memcheck, sanitize-racecheck and sanitize-synccheck, each a phase of its own: the CUDA
#                     kernels on small cases under compute-sanitizer, where that is
#   test              the tests that run on the device
#   ranks             the contrastive losses across NCCL's ranks: two of them, and a bench of 2 and 4, as far as there
#                     are GPUs; NCCL refuses two ranks on one, where a group of a single rank is compared instead
#   bench             bench-bfloat16 and bench-float32, for span attention bench-span_attention-bfloat16 and
#                     bench-span_attention-float32, each a phase of its own
#   summary           what passed and the tables, from the files the other phases left
#   all               all of them (default)
#
# Each phase takes 8 minutes at most, installs first where nothing is installed or what is there was made of other
# sources, and can run alone; a phase that fails does not stop the next, but the exit code is 1 then. Results go to
# $OUT, at most 8 files; by default to benchmarks/results/<name of the GPU>, without one to gpu-results.
# --device cpu rehearses every step without a GPU: Triton's kernels interpreted, quick sizes.
#
# --short: what matters most, in nine minutes at most, where a GPU is there for so long. Its steps, in this order:
#
#   install           for this GPU alone; what does not build is left out. Nothing, where $SITE was made of these sources
#   info              as above
#   check             the small cases of `mmkernels check` on cuda and triton, bfloat16 and float32 first
#   racecheck         a call of each CUDA op, forward and backward, under compute-sanitizer, where that is
#   wgmma             cycles of Hopper's products alone
#   losses            siglip_loss and clip_loss of 32768 pairs: milliseconds, clock, share of the tensor cores' cycles
#   attention         16384 tokens, the same, beside cuDNN's, torch's and flash-attn's kernels
#   bench             `mmkernels bench` on the cases made for a GPU, as far as the time reaches
#
# Every result is in $OUT/records.jsonl before the next is measured, and $OUT/summary.txt is written anew after every
# step, so that a machine may go at any moment: the same call goes on where the one before stopped, if its files are in
# $OUT. A row that hangs or crashes is ended after a minute or so, and only it is lost. docs/gpu.md has the budget.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
site=${SITE:-$repo/build/validate}
python=${PYTHON:-python3}
device=cuda
limit=480 # seconds a phase
short=
whole=540 # seconds of --short
build=240 # of them for the build at most, which takes about 70 on 16 cores
phases=()
checks=(check-clip_loss check-siglip_loss check-patch_embed check-rotary_embed check-nearest_code check-max_similarity
    check-span_attention)
benches=(bench-bfloat16 bench-float32 bench-span_attention-bfloat16 bench-span_attention-float32)
sanitizes=(sanitize-memcheck sanitize-racecheck sanitize-synccheck)
everything=(install info "${checks[@]}" "${sanitizes[@]}" test ranks "${benches[@]}" summary)
steps=(install info check racecheck wgmma losses attention bench)

usage() {
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
}

names=()
while (($#)); do
    case $1 in
        --device) device=${2:?--device needs cuda or cpu}; shift ;;
        --device=*) device=${1#*=} ;;
        --short) short=1 ;;
        *) names+=("$1") ;;
    esac
    shift
done
for name in "${names[@]}"; do
    case ${short:+short-}$name in
        check) phases+=("${checks[@]}") ;;
        bench) phases+=("${benches[@]}") ;;
        sanitize) phases+=("${sanitizes[@]}") ;;
        all) phases=() ;;
        install | info | test | ranks | summary) phases+=("$name") ;;
        check-* | bench-* | sanitize-*)
            [[ " ${checks[*]} ${benches[*]} ${sanitizes[*]} " == *" $name "* ]] || usage
            phases+=("$name") ;;
        short-*)
            [[ " ${steps[*]} " == *" $name "* ]] || usage
            phases+=("$name") ;;
        *) usage ;;
    esac
done
[[ -z $short ]] || everything=("${steps[@]}")
[[ $device == cuda || $device == cpu ]] || { echo "--device is '$device'; accepted are cuda and cpu" >&2; exit 2; }
((${#phases[@]})) || phases=("${everything[@]}")
[[ $device == cuda ]] || { whole=1200 build=900; } # the few cores that are there then build for minutes

gpu=
[[ $device == cpu ]] || gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) || true
out=${OUT:-${gpu:+$repo/benchmarks/results/${gpu// /-}}}
out=${out:-gpu-results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/log.txt

export PYTHONPATH=$site:$repo/scripts${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 COLUMNS=160
[[ $device == cuda ]] || export TRITON_INTERPRET=1
quick=()
[[ $device == cuda ]] || quick=(--quick)

# From a folder without sources: else Python would import the repository's package, which has no compiled core.
elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
cd "$elsewhere"

bounded() { timeout --signal=TERM --kill-after=30 "$limit" "$@"; }

has_nvcc() { [[ -n ${CUDACXX:-} ]] || PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v nvcc >/dev/null; }

install() {
    PATH=$PATH:$("$python" -c 'import sys; print(sys.prefix)')/bin # cmake and ninja, where it is not activated
    has_nvcc || { echo "no nvcc here: the CUDA kernels are left out"; export MMKERNELS_CUDA=0; }
    MMKERNELS_NATIVE=${native-require} bounded "$python" -m pip install --no-build-isolation --no-deps --upgrade \
        --no-warn-script-location --target "$site" "$repo" && "$python" -m gpu.records >"$site/sources"
}

# For the one GPU that is here, or as for a H100. Triton's kernels need no build: whatever fails, they are measured.
install_for_here() {
    local capability=9.0
    if current; then echo "$site was made of these sources, for this Python"; return; fi
    if [[ $device == cuda ]]; then
        capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) || true
    fi
    MMKERNELS_CUDA_ARCHS=${capability/./}
    [[ $MMKERNELS_CUDA_ARCHS != 90 ]] || MMKERNELS_CUDA_ARCHS=90a
    export MMKERNELS_CUDA_ARCHS
    if ! native='' limit=$build install; then
        rm -rf "$site/mmkernels" "$site/sources" # what an earlier call built of other sources
        mkdir -p "$site" && cp -r "$repo/mmkernels" "$site"
        return 1
    fi
}

installed() { [[ -d $site/mmkernels ]]; }

current() { installed && [[ $(cat "$site/sources" 2>/dev/null) == "$("$python" -m gpu.records)" ]]; }

# Steps of scripts/gpu, which leave what they find in $out/records.jsonl
measure() { # [--anew] STEP...
    OMP_NUM_THREADS=1 bounded "$python" -m gpu --device "$device" --out "$out" --seconds "$((limit - 10))" "$@"
}

info() {
    bounded "$python" -m mmkernels info
    if [[ $device == cuda ]] && command -v nvidia-smi; then bounded nvidia-smi; fi
    measure --anew info
}

# Without torch's cache, whose blocks are larger than the tensors in them. What is measured is only whether a kernel errs:
# the results were judged by the phase before.
sanitize() { # TOOL
    local tool
    [[ $device == cuda ]] || { echo "needs a GPU"; return; }
    tool=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer) ||
        { echo "no compute-sanitizer here: nothing is checked by it"; return; }
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 bounded "$tool" --tool "$1" --target-processes all --error-exitcode 9 \
        --print-limit 20 "$python" -m mmkernels check --backend cuda --device cuda --quick --dtype bfloat16
}

# On a GPU that is the equivalence suite once more, from another seed, and whatever else takes a device; but for span
# attention, whose cases are many. Interpreted, it takes minutes and was the phase before. Tests of compilation need no
# GPU.
run_tests() {
    local chosen="(cuda or gpu) and not span_attention"
    [[ $device == cuda ]] || chosen="triton and not equals_reference"
    bounded "$python" -m pytest "$repo/tests" -c "$repo/pyproject.toml" --rootdir "$repo" -p no:cacheprovider \
        --ignore "$repo/tests/compile" --ignore "$repo/tests/core" -k "$chosen" --junitxml "$out/tests.xml"
}

run_ranks() {
    local gpus counts=()
    bounded "$python" -m pytest "$repo/tests/ops/test_contrastive_ranks.py" -c "$repo/pyproject.toml" --rootdir "$repo" \
        -p no:cacheprovider -k "$([[ $device == cuda ]] && echo nccl || echo one_process)" -rs
    gpus=2
    [[ $device == cpu ]] || gpus=$(nvidia-smi --list-gpus | wc -l)
    ((gpus < 2)) || counts+=(2)
    ((gpus < 4)) || counts+=(4)
    ((${#counts[@]})) || { echo "one GPU: nothing across GPUs was compared or measured"; return; }
    bounded "$python" -m mmkernels bench --device "$device" "${quick[@]}" --ranks "$(IFS=,; echo "${counts[*]}")" \
        --json "$out/ranks.json"
}

bench() { # [OP-]DTYPE
    local dtype=${1##*-} ops=(--op clip_loss --op siglip_loss --op patch_embed --op rotary_embed --op nearest_code
        --op max_similarity)
    [[ $1 == "$dtype" ]] || ops=(--op "${1%-*}")
    bounded "$python" -m mmkernels bench --device "$device" "${quick[@]}" "${ops[@]}" --dtype "$dtype" \
        --json "$out/bench-$1.json"
}

summarize() {
    { grep -h '^== ' "$log" || true; } | awk '!seen[$0]++'
    measure summary
}

phase() { # NAME
    # Else Python would find whatever mmkernels the machine has besides, and all that follows would be said of that.
    [[ $1 == install ]] || installed || { echo "nothing is installed in $site"; return 1; }
    case $1 in
        install) if [[ $short ]]; then install_for_here; else install; fi ;;
        info) info ;;
        check-*) measure --anew "$1" ;;
        sanitize-*) sanitize "${1#sanitize-}" ;;
        test) run_tests ;;
        ranks) run_ranks ;;
        bench-*) bench "${1#bench-}" ;;
        summary) summarize | tee "$out/summary.txt" ;;
        steps) measure "${measured[@]}" summary ;;
    esac
}

failed=0
run_phase() { # NAME
    local start=$SECONDS code
    echo "-- $1" | tee -a "$log"
    set +e # and on again inside; within a condition it would stay off there, and only a phase's last command count
    (set -e; phase "$1") 2>&1 | tee -a "$log"
    code=$?
    set -e
    ((code == 0)) || failed=1
    echo "== $1: $( ((code == 0)) && echo passed || echo "FAILED, code $code"), $((SECONDS - start)) s" | tee -a "$log"
}

current || [[ " ${phases[*]} " == *" install "* ]] || phases=(install "${phases[@]}")
measured=() # of --short, all but the build in one process: each would take seconds to import torch
for name in "${phases[@]}"; do
    if [[ $short && $name != install ]]; then
        measured+=("$name")
    else
        run_phase "$name"
    fi
done
if ((${#measured[@]})); then
    limit=$((whole - SECONDS)) run_phase steps
fi
exit "$failed"
