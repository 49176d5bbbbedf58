# 1B, CLM for all 42,000 steps. It is also the trunk that two-stage runs branch from
# (--branch_from).
#   torchrun --nproc_per_node=8 train.py config/1b_clm.py
# A step is 12 rows x 8 GPUs x 12 micro-batches = 1,152 rows of 2,048 tokens = 2,359,296 tokens.
# 42,000 steps are 99.1 B tokens, at 7.52 GFLOP a token (Encoder.flops, for sequences of 12 to 2,036
# tokens). At the tokens/s of one H200 (docs/speed.md) that is 424 GPU-hours.
size = "1b"
data_dir = "data/fineweb-edu"      # 152 B tokens of sample-350BT: the command is in README.md
out_dir = "out/1b-clm-42k"      # the paper's name for this model
phases = [("clm", 42_000)]
batch_rows, micro_rows, block_size = 1152, 12, 2048
learning_rate, warmup_steps, decay_steps = 5e-4, 2_000, 2_000
milestones = [1_000, 2_000, 3_000, 5_000, 6_000, 9_000, 10_000, 11_000, 17_000, 20_000, 21_000]
milestones += [32_000, 40_000]
