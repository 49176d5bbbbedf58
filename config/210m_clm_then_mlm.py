# 210M, CLM for 10,000 steps, then MLM at 40 % for 32,000. The paper trained two stages at 610M, where
# this recipe scored highest of its 42,000-step models, and at 1B, but not at 210M.
#   torchrun --nproc_per_node=8 train.py config/210m_clm_then_mlm.py
# A step is 12 rows x 8 GPUs x 12 micro-batches = 1,152 rows of 2,048 tokens = 2,359,296 tokens.
# 42,000 steps are 99.1 B tokens, at 1.11 GFLOP a token (Encoder.flops, for sequences of 12 to 2,036
# tokens). At the tokens/s of one H200 (docs/speed.md) that is 74 GPU-hours.
size = "210m"
data_dir = "data/fineweb-edu"      # 152 B tokens of sample-350BT: the command is in README.md
out_dir = "out/210m-clm-10k-mlm40-42k"      # a name in the paper's grammar
phases = [("clm", 10_000), ("mlm", 32_000)]
batch_rows, micro_rows, block_size = 1152, 12, 2048
learning_rate, warmup_steps, decay_steps = 5e-4, 2_000, 2_000
milestones = [20_000, 40_000]
