#!/usr/bin/env bash
# Validates mmkernels on a machine with a GPU: installs it, checks every kernel against its reference on the device,
# runs the tests that use the device, and measures against what one would run there instead.
#
#   scripts/validate_gpu.sh [--device cuda|cpu] PHASE...
#
#   install           build and install into $SITE, by default build/validate (the machine's own packages stay as they
#                     are), the CUDA kernels too where nvcc is
#   info              versions, GPU, which backends are there
#   check             check-clip_loss, check-siglip_loss, check-patch_embed, check-rotary_embed and
#                     check-span_attention, each a phase of its own
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
# Each phase takes 8 minutes at most, installs first where nothing is installed, and can run alone; a phase that fails
# does not stop the next, but the exit code is 1 then. Results go to $OUT, at most 8 files; by default to
# benchmarks/results/<name of the GPU>, without one to gpu-results.
# --device cpu rehearses every step without a GPU: Triton's kernels interpreted, quick sizes.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
site=${SITE:-$repo/build/validate}
python=${PYTHON:-python3}
device=cuda
limit=480 # seconds a phase
phases=()
checks=(check-clip_loss check-siglip_loss check-patch_embed check-rotary_embed check-span_attention)
benches=(bench-bfloat16 bench-float32 bench-span_attention-bfloat16 bench-span_attention-float32)
sanitizes=(sanitize-memcheck sanitize-racecheck sanitize-synccheck)
everything=(install info "${checks[@]}" "${sanitizes[@]}" test ranks "${benches[@]}" summary)

usage() {
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --device) device=${2:?--device needs cuda or cpu}; shift ;;
        --device=*) device=${1#*=} ;;
        check) phases+=("${checks[@]}") ;;
        bench) phases+=("${benches[@]}") ;;
        sanitize) phases+=("${sanitizes[@]}") ;;
        all) phases=() ;;
        install | info | test | ranks | summary) phases+=("$1") ;;
        check-* | bench-* | sanitize-*)
            [[ " ${checks[*]} ${benches[*]} ${sanitizes[*]} " == *" $1 "* ]] || usage
            phases+=("$1") ;;
        *) usage ;;
    esac
    shift
done
[[ $device == cuda || $device == cpu ]] || { echo "--device is '$device'; accepted are cuda and cpu" >&2; exit 2; }
((${#phases[@]})) || phases=("${everything[@]}")

gpu=
[[ $device == cpu ]] || gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) || true
out=${OUT:-${gpu:+$repo/benchmarks/results/${gpu// /-}}}
out=${out:-gpu-results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/log.txt

export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 COLUMNS=160
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
    has_nvcc || { echo "no nvcc here: the CUDA kernels are left out"; export MMKERNELS_CUDA=0; }
    MMKERNELS_NATIVE=require bounded "$python" -m pip install --no-build-isolation --no-deps --upgrade \
        --no-warn-script-location --target "$site" "$repo"
}

installed() { [[ -d $site/mmkernels ]]; }

info() {
    bounded "$python" -m mmkernels info
    if [[ $device == cuda ]] && command -v nvidia-smi; then bounded nvidia-smi; fi
    bounded "$python" - "$device" <<'PY'
import sys
import torch
from mmkernels import backends

if sys.argv[1] == "cuda":
    assert torch.cuda.is_available(), "torch sees no GPU"
    x = torch.randn(512, 512, device="cuda")
    assert torch.isfinite(x @ x).all(), "a matrix product on the GPU fails"
    built = "left out" not in (backends.missing("cuda") or "")  # by the phase before, which said so
    assert not built or backends.missing("cuda") is None, backends.missing("cuda")
assert backends.missing("triton") is None, backends.missing("triton")
PY
}

# The dtypes side by side, and each in several processes: most of the time goes into compiling kernels, on one core each.
check() { # OP
    local dtype part parts seed process failed=0 running=()
    parts=$(($(nproc) / 3))
    ((parts > 0)) || parts=1
    ((parts <= 4)) || parts=4
    seed=$((RANDOM * 32768 + RANDOM))
    for dtype in float32 bfloat16 float16; do
        for ((part = 0; part < parts; part++)); do
            check_part "$1" "$dtype" "$seed" "$part" "$parts" >"$elsewhere/$1-$dtype-$part.txt" 2>&1 &
            running+=($!)
        done
    done
    for process in "${running[@]}"; do wait "$process" || failed=1; done
    cat "$elsewhere/$1"-*.txt
    "$python" - "$1" "$out/check.json" "$elsewhere/$1"-*.json <<'PY'
import json
import sys
from pathlib import Path

op, file, parts = sys.argv[1], Path(sys.argv[2]), [json.loads(Path(path).read_text()) for path in sys.argv[3:]]
earlier = json.loads(file.read_text())["outcomes"] if file.exists() else []
outcomes = [outcome for outcome in earlier if outcome["phase"] != op]
outcomes += [outcome | {"phase": op} for part in parts for outcome in part["outcomes"]]
file.write_text(json.dumps(parts[0] | {"outcomes": outcomes}, indent=1) + "\n")
PY
    return "$failed"
}

# `mmkernels check --op OP --dtype DTYPE`, of whose cases this takes every PARTS-th
check_part() { # OP DTYPE SEED PART PARTS
    OMP_NUM_THREADS=1 bounded "$python" - "$device" "$((${#quick[@]}))" "$@" "$elsewhere/$1-$2-$4.json" <<'PY'
import signal
import sys
from rich.console import Console
from mmkernels.bench.machine import environment
from mmkernels.check.report import print_report, write_json
from mmkernels.check.session import Request, places, run

device, quick, op, dtype, seed, part, parts, file = sys.argv[1:]


class Part(Request):
    def cases(self, place):
        return super().cases(place)[int(part) :: int(parts)]


signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is known by then is told
request = Part(op=op, dtype=dtype, device=device, seed=int(seed), quick=quick != "0")
found = places(request)
records = run(request, found, lambda *_: None)
print_report(Console(width=160), records, found, int(seed))
write_json(file, records, found, environment())
sys.exit(any(record["failures"] for record in records))
PY
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
    local dtype=${1##*-} ops=(--op clip_loss --op siglip_loss --op patch_embed --op rotary_embed)
    [[ $1 == "$dtype" ]] || ops=(--op "${1%-*}")
    bounded "$python" -m mmkernels bench --device "$device" "${quick[@]}" "${ops[@]}" --dtype "$dtype" \
        --json "$out/bench-$1.json"
}

summarize() {
    { grep -h '^== ' "$log" || true; } | awk '!seen[$0]++'
    bounded "$python" - "$out" <<'PY'
import json
import sys
from pathlib import Path

from mmkernels.bench.report import print_report
from mmkernels.bench.runner import Report
from rich.console import Console

console = Console(width=160)
checks = Path(sys.argv[1]) / "check.json"
every = json.loads(checks.read_text())["outcomes"] if checks.exists() else []
for phase in dict.fromkeys(outcome["phase"] for outcome in every):
    outcomes = [outcome for outcome in every if outcome["phase"] == phase]
    failed = [outcome for outcome in outcomes if outcome["failures"]]
    served = [outcome for outcome in outcomes if not outcome["unsupported"]]
    console.print(f"{phase}: {len(served) - len(failed)} of {len(served)} passed, {len(outcomes) - len(served)} not served")
    for outcome in failed:
        console.print(f"  {outcome['reproduce']}: {outcome['failures'][0]}", markup=False, soft_wrap=True)
for path in sorted(Path(sys.argv[1]).glob("bench-*.json")):
    content = json.loads(path.read_text())
    env = content["env"]
    console.print(f"{path.stem}: {env['gpu'] or env['cpu']}, torch {env['torch']}, triton {env['triton']}")
    print_report(console, Report(env, content["peaks"], content["results"], env["unmeasured"]))
PY
}

phase() { # NAME
    # Else Python would find whatever mmkernels the machine has besides, and all that follows would be said of that.
    [[ $1 == install ]] || installed || { echo "nothing is installed in $site"; return 1; }
    case $1 in
        install) install ;;
        info) info ;;
        check-*) check "${1#check-}" ;;
        sanitize-*) sanitize "${1#sanitize-}" ;;
        test) run_tests ;;
        ranks) run_ranks ;;
        bench-*) bench "${1#bench-}" ;;
        summary) summarize | tee "$out/summary.txt" ;;
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

installed || [[ " ${phases[*]} " == *" install "* ]] || phases=(install "${phases[@]}")
for name in "${phases[@]}"; do
    run_phase "$name"
done
exit "$failed"
