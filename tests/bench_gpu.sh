#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in one go: about 25 minutes. The table of docs/performance.md is made from what it prints.
#
#     bash tests/bench_gpu.sh [FOLDER for what it prints, default out-gpu] [PYTHON, default python3]
#
# Needs input.txt of tiny Shakespeare in data/shakespeare_char/, or a network. Each part goes on where another failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out-gpu}; py=${2:-python3}
mkdir -p "$out"
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
    grep '^step' "$out/$config.txt" | sort -t, -k2 | awk '{print $0}' | sort -k8 -n | head -1
done
part extrapolation timeout 300 $py sample_alibi_extrapolation.py "$out/train_shakespeare_char_alibi"

# interrupted, killed and resumed, in bfloat16 and compiled
run="$py train.py config/train_shakespeare_char.py --max_iters=600 --lr_decay_iters=600 --eval_interval=100 --eval_iters=10"
$run --out_dir="$out/killed" > "$out/killed.txt" 2>&1 &
pid=$!
until grep -q '^step 200' "$out/killed.txt" || ! kill -0 $pid 2>/dev/null; do sleep 0.2; done
kill -9 $pid; wait $pid 2>/dev/null
$run --out_dir="$out/killed" --init_from=resume >> "$out/killed.txt" 2>&1 &
pid=$!
until grep -q '^step 400' "$out/killed.txt" || ! kill -0 $pid 2>/dev/null; do sleep 0.2; done
kill -TERM $pid; wait $pid; echo "after SIGTERM: exit status $?"
part resumed timeout 300 $run --out_dir="$out/killed" --init_from=resume
part uninterrupted timeout 300 $run --out_dir="$out/uninterrupted"
grep -h '^step 600' "$out/resumed.txt" "$out/uninterrupted.txt"
