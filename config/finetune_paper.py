# The paper's fine-tuning, as its code has it: 9 tasks x 6 learning rates x 5 seeds = 270 trials an encoder (with retrieval 300).
#   torchrun --nproc_per_node=8 finetune.py --ckpt=RUN config/finetune_paper.py
# Batch 32, 1,000 steps (CoNLL-2003 and UNER: one epoch), the last weights are scored. Its labels, heads and scores, its row-wise
# cut of validation, and weights and moments in bfloat16, which lose small updates: a full-size Adam step at 1e-5 leaves most of
# N(0, 0.02) weights as they are. For numbers of your own prefer the defaults: the same grid without this file.
tasks = "all"
mode, split, param_dtype = "paper", "encodeval", "bfloat16"
lrs = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)
seeds = (0, 1, 2, 3, 4)
