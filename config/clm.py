# CLM alone at a small size: a starting point for a corpus and a budget of your own.
#   python train.py config/clm.py --size=small --data_dir=data/mine --out_dir=out/mine-clm
# 64 rows x 512 tokens = 32,768 tokens a step; 5,000 steps = 164 M tokens.
phases = [("clm", 5_000)]
size = "small"
block_size, batch_rows, micro_rows = 512, 64, 16
learning_rate, warmup_steps, decay_steps = 1e-3, 250, 500
eval_interval, save_interval = 250, 500
