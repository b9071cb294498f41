#!/usr/bin/env bash
# What needs a CUDA GPU, the most important part first, in BUDGET seconds (570), none of them longer
# than its cap. Makes FOLDER/report.md.
#
#     bash benchmarks/bench_gpu.sh [FOLDER] [PYTHON]        by default out-gpu and .venv's Python
#     bash benchmarks/bench_gpu.sh FOLDER PYTHON rehearse   the same with tiny models, for a CPU
#
# Where a part fails the others go on; it is named at the end, as is what no longer fitted.
# FOLDER/NAME.txt has all that a part prints. Needs tiny Shakespeare
# (data/shakespeare_char/input.txt, or a network).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out-gpu} budget=${BUDGET:-570} failed=() skipped=()
py=${2:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$out"
export PYTHONUNBUFFERED=1  # strike() waits for lines of a log

long=--block_size=4096      # beside GPT-2's 1024
dataset=shakespeare_char device=cuda train_sizes='' bench_sizes='' generate_sizes=''
processes=gpu              # as many as there are GPUs
slack=1                    # times each cap
if [ "${3:-}" = rehearse ]; then
    sizes='--n_layer=2 --n_head=2 --n_embd=16 --block_size=32 --device=cpu --compile=False'
    train_sizes="$sizes --batch_size=4 --dataset=pydocs_char --max_iters=600 --eval_interval=100"
    bench_sizes="$sizes --vocab_size=128 --blocks=2 --steps=1"
    long=--block_size=64
    dataset=pydocs_char device='cpu quick' generate_sizes=small processes=2
    slack=100              # a busy CPU fails no rehearsal
fi

part() {  # NAME CAP LINES COMMAND...: run it for CAP seconds at most, and report its last lines
    local name=$1 cap=$(($2 * slack)) lines=$3 start=$SECONDS status
    shift 3
    [ $SECONDS -lt "$budget" ] || { skipped+=("$name"); return; }
    echo "== $name: ${*//$'\n'/ }"
    [ $((budget - SECONDS)) -ge "$cap" ] || cap=$((budget - SECONDS))
    timeout --foreground -k 30 "$cap" "$@" 2>&1 | tee -i "$out/$name.txt"
    status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || failed+=("$name")
    { printf '\n**%s** (exit status %s, %s s)\n\n' "$name" "$status" $((SECONDS - start))
      tail -n "$lines" "$out/$name.txt" | sed 's/^/    /'; } >> "$out/report.md"
}

# SIGNAL LINE STATUS COMMAND...: send the signal when a line is printed, and expect an exit status
strike() {
    local signal=$1 line=$2 expected=$3 log="$out/strike-$1.txt"
    shift 3
    "$@" > "$log" 2>&1 &
    until grep -q "$line" "$log" || ! kill -0 $! 2> /dev/null; do sleep 0.05; done
    kill -"$signal" $!
    wait $!
    if [ $? != "$expected" ]; then
        echo "SIG$signal after '$line': not exit status $expected"
        return 1
    fi
}

# SIGKILL, SIGTERM, and on to the end: the same loss as a run that was left alone
kill_and_resume() {
    local run="$py train.py config/train_shakespeare_char.py $train_sizes --compile=False
        --max_iters=600 --lr_decay_iters=600 --eval_interval=100 --eval_iters=10"
    strike KILL '^step 200' 137 $run --out_dir="$out/killed" &&
        strike TERM '^step 400' 0 $run --out_dir="$out/killed" --init_from=resume &&
        $run --out_dir="$out/killed" --init_from=resume | grep '^step 600' &&
        $run --out_dir="$out/whole" | grep '^step 600'
}

export -f strike kill_and_resume
export py out train_sizes

main() {
    trap 'exit 130' INT        # Ctrl-C ends all, not just a part
    machine=$($py -c "import runtime; print(runtime.set_up('${device% *}'))")
    echo "$(date +%F), $machine" > "$out/report.md"
    [ -e data/$dataset/train.bin ] || $py data/$dataset/prepare.py
    part check_gpu 150 200 $py benchmarks/check_gpu.py $device
    part train_shakespeare_char 240 3 \
        $py train.py config/train_shakespeare_char.py $train_sizes --out_dir="$out/char"
    part bench 120 12 $py bench.py $bench_sizes --batch_size=32
    part bench_4096 90 12 $py bench.py $bench_sizes --batch_size=8 $long
    part kill_and_resume 120 2 bash -c kill_and_resume
    part generation 120 24 $py benchmarks/bench_generate.py $generate_sizes
    part profile 60 11 $py bench.py $bench_sizes --batch_size=32 --blocks=0 --profile=True
    part float16 60 2 $py train.py config/train_shakespeare_char_alibi.py $train_sizes \
        --max_iters=30 --eval_iters=2 --dtype=float16 --out_dir="$out/float16"
    part processes 120 2 $py -m torch.distributed.run --standalone --nproc_per_node=$processes \
        train.py config/train_gpt2_alibi.py --dataset=$dataset --wandb_log=False $train_sizes \
        --max_iters=20 --eval_iters=2 --gradient_accumulation_steps=24 --shard_optimizer=True \
        --out_dir="$out/processes"
    echo "== failed: ${failed[*]:-nothing}; no time for: ${skipped[*]:-nothing}" |
        tee -a "$out/report.md"
    [ ${#failed[@]} = 0 ]
}
main "$@"
