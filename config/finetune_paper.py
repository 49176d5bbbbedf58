# The paper's fine-tuning, with the settings of its code: 9 tasks x 6 learning rates x 5 seeds = 270
# trials an encoder (with retrieval 300).
#   torchrun --nproc_per_node=8 finetune.py --ckpt=RUN config/finetune_paper.py
# Batch 32, 1,000 steps (CoNLL-2003 and UNER: one epoch); the last weights are scored. The paper's
# labels, heads and scores, its cut of validation by row, and weights and optimizer state in
# bfloat16, which loses small updates: an Adam step at 1e-5 leaves most weights unchanged. For
# numbers of your own prefer the defaults: the same grid without this file.
tasks = "all"
mode, split, param_dtype = "paper", "encodeval", "bfloat16"
lrs = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)
seeds = (0, 1, 2, 3, 4)
