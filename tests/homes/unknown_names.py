# a fork with switches of its own, and one misspelt name
out_dir = 'out-fork'
n_layer = 2
n_heads = 2
n_kv_head = 1
use_flash = True
vocab_size = 65
mlp_ratio = 4.0
