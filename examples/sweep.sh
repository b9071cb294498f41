#!/bin/bash
# Three learning rates, two seeds each, then the table. From the repository's root:
#
#     bash examples/sweep.sh
#     bash examples/sweep.sh --max_iters=600 --lr_decay_iters=600
#
# Each run has a folder of its own: a second run in the same folder would move the first one, with
# its checkpoints, to previous/, and a table could not show both.
#
# The rate is Muon's. With --optimizer=muon the matrices of the blocks learn at muon_learning_rate,
# and only embeddings, norms and biases at learning_rate. Without Muon, sweep learning_rate.
set -e
for rate in 0.005 0.025 0.125; do
    for seed in 1 2; do
        python train.py config/train_shakespeare_char_fast.py --out_dir=out-$rate-$seed \
            --muon_learning_rate=$rate --seed=$seed "$@"
    done
done
python plot.py out-0.005-[12] out-0.025-[12] out-0.125-[12] --file=rates.png
