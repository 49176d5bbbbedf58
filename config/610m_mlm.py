# 610M, MLM at 40 % for all 42,000 steps: the baseline.
#   torchrun --nproc_per_node=8 train.py config/610m_mlm.py
# A step is 12 rows x 8 GPUs x 12 micro-batches = 1,152 rows of 2,048 tokens = 2,359,296 tokens.
# 42,000 steps are 99.1 B tokens, at 3.55 GFLOP a token (Encoder.flops, for sequences of 12 to 2,036
# tokens). At the tokens/s of one H200 (docs/speed.md) that is 226 GPU-hours.
size = "610m"
data_dir = "data/fineweb-edu"      # 152 B tokens of sample-350BT: the command is in README.md
out_dir = "out/610m-mlm40-42k"      # the paper's name for this model
phases = [("mlm", 42_000)]
batch_rows, micro_rows, block_size = 1152, 12, 2048
learning_rate, warmup_steps, decay_steps = 5e-4, 2_000, 2_000
milestones = [1_000, 2_000, 5_000, 10_000, 20_000, 40_000]
