# numbers that are computed, some not quite whole
max_iters = 5000
warmup_iters = 0.07 * max_iters
lr_decay_iters = max_iters * 1.0
learning_rate = 3e-4 * 2
min_lr = learning_rate / 10
gradient_accumulation_steps = 5 * 8
eval_iters = 200 // 4
