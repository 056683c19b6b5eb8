#!/usr/bin/env bash
# Everything that only a GPU can tell, in the order of its worth. Has never run on a GPU.
#
#   bash bench/gpu.sh prepare            # where there is a network: wheels into build/gpu (the library, diffusers)
#   bash bench/gpu.sh STAGE...           # on the GPU machine, from the repository's root, build/gpu carried along
#   bash bench/gpu.sh --dry-run STAGE... # on a CPU, small shapes: runs every script once
#
# The GPU machine needs Python 3.12 with torch >= 2.10 (CUDA 13) and Triton, no network, no compiler. Stages, each within
# LIMIT seconds in all; one that fails or is stopped leaves what it has written, and the next one runs:
#   check     facts of the machine; every op against its reference; the engine against eager
#   sdxl      SDXL 1024, 30 steps, 1 picture: graphs, eager, diffusers eager
#   sd15      SD 1.5 512, 50 steps, 1 picture: the same
#   attention every kernel of ours against every one of torch's, and the table that follows from it
#   ops       every op's time, against torch's way and the measured roofline
#   profile   one step of both networks by kernel and by op
#   sdxl-batches  throughput in larger batches, in fp8, too
#   sd15-batches  the same of SD 1.5
#   sd15-compiled torch.compile (max-autotune) against ours
#   sdxl-compiled the same of SDXL (autotuning takes minutes)
#   memcheck  compute-sanitizer over the CUDA kernels
#   racecheck the same, for races in shared memory
#   all       all of them; more than one command's time
# Results: bench/results/h200, one JSON a stage and case, with commit and versions, and a log a stage; where OUT names a
# folder, all of it is packed into $OUT/results.tar.gz after every stage.
set -u
cd "$(dirname "$0")/.." || exit 1
LIMIT=${LIMIT:-540}
PYTHON=${PYTHON:-python3}
WHEELS=build/gpu
SITE=${TMPDIR:-/tmp}/ldmfast-site
RESULTS=bench/results/h200
STAGES="check attention sdxl sd15 ops profile sdxl-batches sd15-batches sd15-compiled sdxl-compiled memcheck racecheck"
SANITIZED="group_norm_silu group_norm_silu_fp8 lincomb attention"
DRY=

prepare() {
    rm -rf "$WHEELS"
    "$PYTHON" tools/build_wheels.py --cuda 13.0 --python 3.12 --out "$WHEELS" || exit 1
    "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d "$WHEELS" \
        diffusers==0.42.1 importlib_metadata || exit 1
    git describe --always --dirty=-changed > "$WHEELS/commit"
    du -sh "$WHEELS"
}

# The carried packages go before the machine's own; the checkout must not hide the wheel's library, so that only its
# tests and benchmarks are used.
install() {
    [ -n "$DRY" ] && return
    if [ ! -e "$SITE/ldmfast/libldmfast_cuda.so" ]; then
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" "$WHEELS"/*.whl || exit 1
    fi
    export PYTHONPATH="$SITE"
    LDMFAST_COMMIT=$(cat "$WHEELS/commit")
    export LDMFAST_COMMIT
}

needs_gpu() {  # what a dry run leaves out
    [ -z "$DRY" ] || echo "== needs a GPU, not in a dry run: $*"
}

run() {  # name, command...: bounded by this stage's part of LIMIT, logged, never fatal
    local name=$1 status
    shift
    echo "== $name: $*"
    PYTHONUNBUFFERED=1 timeout --kill-after=20 "$((LIMIT / ${PARTS:-1}))" "$@" > "$RESULTS/$name.log" 2>&1
    status=$?
    tail -n 30 "$RESULTS/$name.log"
    echo "== $name: exit status $status after ${SECONDS}s"
    [ "$status" = 0 ] || FAILED="$FAILED $name"
}

bench() {  # name, script, arguments...
    local name=$1 script=$2
    shift 2
    run "$name" "$PYTHON" "bench/$script.py" "$@" --out "$RESULTS"
}

stage() {
    local large=sdxl small=sd15 steps=30 more=50 rounds=5 device=cuda many=("4" "8" "16")
    local check=() ops=() few=() command op PARTS=1
    if [ -n "$DRY" ]; then
        large=small small=small steps=2 more=3 rounds=1 device=cpu many=(2)
        few=(--case vae_tiny)
        check=(--op lincomb upsample2x) ops=(--op lincomb --case sd15_dpmpp)
    fi
    case $1 in
        check)
            needs_gpu "the kernels of every op (here: lincomb and upsample2x of the CPU), CUDA graphs (here: the stand-in)"
            run facts "$PYTHON" -P -c 'import ldmfast, sys; print(sys.version, ldmfast.__file__, ldmfast.info(), sep="\n")'
            bench check gpu_check --device $device "${check[@]}" ;;
        attention)
            needs_gpu "every backend of attention (here: Triton's interpreter, and torch's plain one)"
            [ -z "$DRY" ] || export TRITON_INTERPRET=1
            bench attention gpu_attention --device $device "${few[@]}"
            unset TRITON_INTERPRET ;;
        sdxl)
            needs_gpu "SDXL at 1024 (here: a small network), CUDA graphs, fp8 on tensor cores"
            bench sdxl gpu_e2e --device $device --model $large --steps $steps --rounds $rounds \
                  --arms ours "ours fp8" "ours eager" eager ;;
        sd15)
            needs_gpu "SD 1.5 at 512 (here: a small network), CUDA graphs"
            bench sd15 gpu_e2e --device $device --model $small --steps $more --rounds $rounds \
                  --arms ours "ours eager" eager ;;
        ops)
            needs_gpu "Triton's and CUDA's kernels (here: one case of lincomb on the CPU)"
            bench ops ops --device $device --dtype bfloat16 float16 "${ops[@]}" ;;
        profile)
            needs_gpu "times of single kernels by CUDA events"
            PARTS=2
            bench profile-large step_profile --device $device --model $large
            bench profile-small step_profile --device $device --model $small ;;
        sdxl-batches)
            needs_gpu "batches of 4, 8 and 16 (here: 2)"
            bench sdxl-batches gpu_e2e --device $device --model $large --steps 20 --rounds 2 --batch "${many[@]}" \
                --arms ours "ours fp8" "ours fp8 attention" eager ;;
        sd15-batches)
            needs_gpu "batches of 4, 8 and 16 (here: 2)"
            bench sd15-batches gpu_e2e --device $device --model $small --steps 20 --rounds 2 --batch "${many[@]}" ;;
        sd15-compiled)
            needs_gpu "max-autotune (here: torch.compile's eager backend)"
            bench sd15-compiled gpu_e2e --device $device --model $small --steps $more --rounds $rounds \
                --arms ours compiled ;;
        sdxl-compiled)
            needs_gpu "max-autotune (here: torch.compile's eager backend)"
            bench sdxl-compiled gpu_e2e --device $device --model $large --steps $steps --rounds $rounds \
                --arms ours compiled ;;
        memcheck|racecheck)
            needs_gpu "compute-sanitizer and the CUDA kernels (here: the checks alone)"
            PARTS=$(wc -w <<< "$SANITIZED")
            for op in $SANITIZED; do
                command=("$PYTHON" bench/gpu_check.py --parts ops --op "$op" --dtype bfloat16 --device "$device"
                         --out "$RESULTS/$1-$op")
                [ -n "$DRY" ] || command=(compute-sanitizer --tool "$1" --error-exitcode 3 "${command[@]}")
                run "$1-$op" "${command[@]}"
            done ;;
        *) echo "unknown stage $1: prepare, all, $STAGES" && exit 2 ;;
    esac
}

export TORCHINDUCTOR_CACHE_DIR="${TMPDIR:-/tmp}/inductor"  # a second try of torch.compile goes on from here
FAILED=
[ "${1:-}" = --dry-run ] && DRY=1 && shift
[ $# -gt 0 ] || { sed -n '2,/^set -u/p' "$0" | sed '$d'; exit 2; }
[ "$1" = prepare ] && { prepare; exit; }
[ "$1" = all ] && { read -ra words <<< "$STAGES"; set -- "${words[@]}"; }
[ -n "$DRY" ] && RESULTS=${OUT:-build/dry-run}
mkdir -p "$RESULTS"
install
for name; do
    stage "$name"
    [ -z "${OUT:-}" ] || [ -n "$DRY" ] || tar czf "$OUT/results.tar.gz" -C "$RESULTS" .
done
[ -z "$FAILED" ] || { echo "failed or stopped:$FAILED"; exit 1; }
