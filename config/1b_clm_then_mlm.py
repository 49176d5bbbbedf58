# 1B, CLM for 10k steps, then MLM at 40 % for 32k: the paper's best kind of encoder.
#   torchrun --nproc_per_node=8 train.py config/1b_clm_then_mlm.py
# 12 rows x 8 GPUs x 12 micro-steps = 1,152 rows x 2,048 tokens = 2,359,296 tokens a step; x
# 42,000 = 99.1 B tokens.
# 7.13 GFLOP a token (model.flops, sequences of 12 to 2,036 tokens): about 496 GPU-hours on an
# H100 at 40 % MFU. Not measured.
size = "1b"
# the paper's name for this model
data_dir, out_dir = "data/fineweb-edu", "out/1b-clm-10k-mlm40-42k"
phases = [("clm", 10_000), ("mlm", 32_000)]
batch_rows, micro_rows, block_size = 1152, 12, 2048
learning_rate, warmup_steps, decay_steps = 5e-4, 2_000, 2_000
milestones = [20_000, 40_000]
