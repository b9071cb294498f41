# names that nanoGPT's train.py has imported when it runs a config
wandb_run_name = 'gpt2-' + time.strftime('%Y')
out_dir = os.path.join('out', 'fork')
dtype = 'bfloat16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 'float32'
learning_rate = np.float64(1e-3) * math.sqrt(0.25)
batch_size = np.int64(8)
