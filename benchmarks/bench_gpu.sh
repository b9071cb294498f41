#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in one go. The tables of docs/performance.md are made from what it prints.
#
#     bash benchmarks/bench_gpu.sh [FOLDER] [PYTHON]            by default out-gpu and .venv's Python
#     bash benchmarks/bench_gpu.sh FOLDER PYTHON rehearse       the same commands with tiny models, for a CPU
#
# FOLDER/log.txt keeps all that is printed, and each part has a file of its own. Where a part fails the others
# go on; it is named at the end, and the exit status is 1.
# Needs input.txt of tiny Shakespeare in data/shakespeare_char/, or a network.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out-gpu}
py=${2:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$out"
export PYTHONUNBUFFERED=1  # strike() waits for lines of a log

dataset=shakespeare_char train_sizes='' bench_sizes='' processes=gpu  # as many as there are GPUs
tests='tests/test_model.py tests/test_alibi.py tests/test_train.py tests/test_bench.py'
if [ "${3:-}" = rehearse ]; then
    sizes='--n_layer=2 --n_head=2 --n_embd=16 --block_size=32'
    train_sizes="$sizes --batch_size=4 --dataset=pydocs_char --max_iters=600 --eval_interval=100 --eval_iters=2"
    bench_sizes="$sizes --vocab_size=128 --blocks=2 --steps=1"
    dataset=pydocs_char processes=2 tests='tests/test_alibi.py'
fi
failed=()

part() {  # NAME COMMAND...: run it, keep what it prints in NAME.txt, and note whether it failed
    local name=$1 start=$SECONDS status
    shift
    echo "== $name: ${*//$'\n'/ }"
    timeout --foreground -k 60 1800 "$@" 2>&1 | tee -i "$out/$name.txt"
    status=${PIPESTATUS[0]}
    echo "== $name: exit status $status after $((SECONDS - start)) s"
    [ "$status" = 0 ] || failed+=("$name")
}

strike() {  # SIGNAL LINE STATUS COMMAND...: send the signal when a line is printed, and expect an exit status
    local signal=$1 line=$2 expected=$3 log="$out/strike-$1.txt" status
    shift 3
    "$@" > "$log" 2>&1 &
    until grep -q "$line" "$log" || ! kill -0 $! 2> /dev/null; do sleep 0.05; done
    kill -"$signal" $!
    wait $!
    status=$?
    echo "== SIG$signal after '$line': exit status $status, expected $expected"
    [ "$status" = "$expected" ] || failed+=("strike-$signal")
}

# a run that prints where it waits for the GPU: that should be at logged iterations and evaluations alone
watch_synchronizations="
import runpy, sys, torch
if torch.cuda.is_available():
    torch.cuda.set_sync_debug_mode('warn')
sys.argv = ['train.py', *sys.argv[1:]]
runpy.run_path('train.py', run_name='__main__')"

main() {
    trap 'exit 130' INT        # Ctrl-C ends all, not just a part
    part versions $py -m torch.utils.collect_env

    # GPT-2 (124M): each kind of step at several micro-batches, generation, where the time goes
    for batch in 8 16 32 64; do
        part bench-$batch $py bench.py $bench_sizes --batch_size=$batch --max_new_tokens=0
    done
    part bench-generation $py bench.py config/train_gpt2_alibi.py $bench_sizes --blocks=0 --max_new_tokens=256
    part bench-profile $py bench.py $bench_sizes --batch_size=16 --blocks=2 --max_new_tokens=0 --profile=True
    mv -f bench-trace.json "$out/"

    # the character model and its twin with ALiBi to the end: loss, wall time, samples
    part prepare $py data/$dataset/prepare.py
    for config in train_shakespeare_char train_shakespeare_char_alibi; do
        part $config $py train.py config/$config.py $train_sizes --out_dir="$out/$config"
        part $config-sample $py sample.py --out_dir="$out/$config" --num_samples=2 --max_new_tokens=300
        echo "best: $(grep '^step' "$out/$config.txt" | sort -k8 -n | head -1)"
    done
    part extrapolation $py sample_alibi_extrapolation.py "$out/train_shakespeare_char" \
        "$out/train_shakespeare_char_alibi"

    # compiled generation, replayed as a CUDA graph, writes the same text; TF32 would be too coarse for that
    sample="NVIDIA_TF32_OVERRIDE=0 $py sample.py --out_dir='$out/train_shakespeare_char_alibi' --num_samples=2"
    for compile in False True; do
        part sample-compile-$compile bash -c "$sample --max_new_tokens=300 --temperature=0 --dtype=float32 \
            --compile=$compile > '$out/text-$compile.txt'"
    done
    part same-text cmp "$out/text-False.txt" "$out/text-True.txt"

    # short runs: synchronizations, float16, all GPUs
    run="config/train_shakespeare_char.py $train_sizes"
    short="$run --max_iters=30 --eval_iters=2"
    part synchronizations $py -W always -c "$watch_synchronizations" $short --compile=False --out_dir="$out/sync"
    part float16 $py train.py $short --dtype=float16 --out_dir="$out/float16"
    part processes $py -m torch.distributed.run --standalone --nproc_per_node=$processes train.py \
        config/train_gpt2_alibi.py --dataset=$dataset --wandb_log=False $train_sizes --max_iters=20 \
        --eval_iters=2 --log_interval=1 --gradient_accumulation_steps=24 --out_dir="$out/processes"

    # killed, interrupted and resumed, in bfloat16 and compiled
    run="$py train.py $run --max_iters=600 --lr_decay_iters=600 --eval_interval=100 --eval_iters=10"
    strike KILL '^step 200' 137 $run --out_dir="$out/killed"
    strike TERM '^step 400' 0 $run --out_dir="$out/killed" --init_from=resume
    part resumed $run --out_dir="$out/killed" --init_from=resume
    part uninterrupted $run --out_dir="$out/uninterrupted"
    grep '^step 600' "$out/resumed.txt" "$out/uninterrupted.txt"

    part tests $py -m pytest -m 'not slow' -p no:cacheprovider $tests
    echo "== failed: ${failed[*]:-nothing}"
    [ ${#failed[@]} = 0 ]
}
main 2>&1 | tee -i "$out/log.txt"
