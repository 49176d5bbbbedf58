size = "demo"
out_dir = "runs/demo/mlm"
phases = [("mlm", 600)]
block_size, batch_rows, micro_rows = 512, 16, 16
learning_rate, warmup_steps, decay_steps = 1e-3, 30, 120
eval_interval, eval_rows, save_interval = 50, 64, 100
