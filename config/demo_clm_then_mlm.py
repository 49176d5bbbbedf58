# What the demo is about: 200 steps of CLM, taken from demo_clm.py's run, and then 300 of MLM. That is
# the same 1.02 M tokens as the other two runs.
# The paper finds 25 to 50 % of CLM better than none at the same budget (arXiv 2507.00994, section 4).
size = "demo"
data_dir = "data/demo"
out_dir = "runs/demo/clm_then_mlm"
branch_from = "runs/demo/clm/step_0000200"
phases = [("clm", 200), ("mlm", 300)]
block_size, batch_rows, micro_rows = 256, 8, 8
learning_rate, warmup_steps, decay_steps = 1e-3, 30, 100
eval_interval, eval_rows, save_interval, log_interval = 100, 32, 250, 25
