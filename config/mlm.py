# MLM alone at a small size: a starting point for your own corpus and budget.
#   python train.py config/mlm.py --data_dir=data/mine --out_dir=out/mine-mlm
# A step is 16 rows of 512 tokens = 8,192 tokens. 2,000 steps are 16.4 M tokens: 1.2 hours at the
# 3,900 tokens/s of two CPU cores (docs/speed.md).
phases = [("mlm", 2_000)]
size = "small"
block_size, batch_rows, micro_rows = 512, 16, 16
learning_rate, warmup_steps, decay_steps = 1e-3, 100, 200
eval_interval, save_interval = 250, 500
