#!/usr/bin/env bash
# What needs one CUDA GPU, in one go. The table of docs/performance.md is made from what it prints.
#
#     bash benchmarks/bench_gpu.sh [FOLDER for what it prints, default out-gpu] [PYTHON, default python3]
#
# Needs input.txt of tiny Shakespeare in data/shakespeare_char/, or a network. Each part goes on where another failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out-gpu}; py=${2:-python3}
mkdir -p "$out"
export PYTHONUNBUFFERED=1  # the kills below wait for lines of a log
part() { local name=$1; shift; echo "== $name: $*"; "$@" 2>&1 | tee "$out/$name.txt" | tail -n 40; echo "== $name: exit status ${PIPESTATUS[0]}"; }

part versions $py -c "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())"
part prepare $py data/shakespeare_char/prepare.py
part tests timeout 600 $py -m pytest -m "not slow" -p no:cacheprovider tests/test_model.py tests/test_alibi.py tests/test_train.py tests/test_bench.py

# a training step of GPT-2 (124M) at several micro-batches, with FlexAttention for ALiBi, and generation
for batch in 8 16 32 64; do
    part "bench-$batch" timeout 300 $py bench.py --batch_size=$batch --max_new_tokens=0
done
part bench-generation timeout 300 $py bench.py config/train_gpt2_alibi.py --blocks=0 --max_new_tokens=256
part bench-profile timeout 300 $py bench.py --batch_size=16 --blocks=2 --max_new_tokens=0 --profile=True
mv -f bench-trace.json "$out/" 2>/dev/null

# the character model and its twin with ALiBi to the end: loss, wall time, samples
for config in train_shakespeare_char train_shakespeare_char_alibi; do
    part "$config" bash -c "time timeout 900 $py train.py config/$config.py --out_dir=$out/$config"
    part "$config-sample" timeout 120 $py sample.py --out_dir=$out/$config --num_samples=2 --max_new_tokens=300
    echo "best: $(grep '^step' "$out/$config.txt" | sort -k8 -n | head -1)"
done
# compiled generation, replayed as a CUDA graph: the same text
for compile in False True; do
    part "sample-compile-$compile" bash -c "time timeout 300 $py sample.py --out_dir=$out/train_shakespeare_char_alibi --compile=$compile \
        --dtype=float32 --temperature=0 --num_samples=2 --max_new_tokens=300 > '$out/text-$compile.txt'"
done
cmp "$out/text-False.txt" "$out/text-True.txt" && echo "compiled: the same text"
part extrapolation timeout 300 $py sample_alibi_extrapolation.py "$out/train_shakespeare_char_alibi"

# nothing in an iteration waits for the GPU but what is meant to: where it does, PyTorch warns, at most once a logged iteration
small="config/train_shakespeare_char.py --max_iters=30 --eval_interval=1000 --eval_iters=2 --log_interval=10"
part synchronizations timeout 300 $py -W always -c "import runpy, sys, torch
torch.cuda.init(); torch.cuda.set_sync_debug_mode('warn'); sys.argv = ['train.py', *sys.argv[1:]]
runpy.run_path('train.py', run_name='__main__')" $small --compile=False --out_dir="$out/sync"
part float16 timeout 300 $py train.py $small --dtype=float16 --out_dir="$out/float16"
part nccl timeout 300 $py -m torch.distributed.run --standalone --nproc_per_node=1 train.py $small --out_dir="$out/nccl"

# interrupted, killed and resumed, in bfloat16 and compiled
run="$py train.py config/train_shakespeare_char.py --max_iters=600 --lr_decay_iters=600 --eval_interval=100 --eval_iters=10"
strike() {  # SIGNAL, a line to wait for, options: start the run, and send the signal when the line is there
    local signal=$1 line=$2; shift 2
    $run --out_dir="$out/killed" "$@" >> "$out/killed.txt" 2>&1 &
    local pid=$!
    until grep -q "$line" "$out/killed.txt" || ! kill -0 $pid 2>/dev/null; do sleep 0.2; done
    kill "$signal" $pid || echo "the run had ended before it was sent $signal"
    wait $pid; echo "$signal after '$line': exit status $?"
}
: > "$out/killed.txt"
strike -KILL '^step 200'
strike -TERM '^step 400' --init_from=resume
part resumed timeout 300 $run --out_dir="$out/killed" --init_from=resume
part uninterrupted timeout 300 $run --out_dir="$out/uninterrupted"
grep -h '^step 600' "$out/resumed.txt" "$out/uninterrupted.txt"
