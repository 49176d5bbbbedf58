# The demo's trunk: CLM on the State of the Union addresses, minutes on two CPU cores
# (bash runs/demo.sh).
# A step is 8 rows of 256 tokens = 2,048 tokens. 500 steps are 1.02 M tokens, of 2.8 M in the corpus.
size = "demo"
data_dir = "data/demo"
out_dir = "runs/demo/clm"
phases = [("clm", 500)]
milestones = [200]          # demo_clm_then_mlm.py branches here
block_size, batch_rows, micro_rows = 256, 8, 8
learning_rate, warmup_steps, decay_steps = 1e-3, 30, 100
eval_interval, eval_rows, save_interval, log_interval = 100, 32, 250, 25
