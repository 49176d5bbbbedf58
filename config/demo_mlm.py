# The demo's baseline: MLM alone, with the budget of demo_clm.py: 500 steps of 2,048 tokens = 1.02 M
# tokens.
size = "demo"
data_dir = "data/demo"
out_dir = "runs/demo/mlm"
phases = [("mlm", 500)]
block_size, batch_rows, micro_rows = 256, 8, 8
learning_rate, warmup_steps, decay_steps = 1e-3, 30, 100
eval_interval, eval_rows, save_interval, log_interval = 100, 32, 250, 25
