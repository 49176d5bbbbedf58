# The paper's fine-tuning, with the settings of its code: 9 tasks x 6 learning rates x 5 seeds = 270
# trials for each encoder (300 with retrieval).
#   torchrun --nproc_per_node=8 finetune.py --ckpt=RUN config/finetune_paper.py
# Batches of 32, 1,000 steps (one epoch for CoNLL-2003 and UNER), and the last weights are scored.
# Labels, scores, the cut of validation by row and the heads for tokens are those of the paper's code.
# The head for sequences is EuroBERT's; the paper's was not seen. Weights and optimizer state are in
# bfloat16, which loses small updates: an Adam step of 1e-5 leaves most weights unchanged. For numbers
# of your own prefer the defaults: the same grid without this file. More: docs/finetuning.md.
tasks = "all"
mode = "paper"
split = "encodeval"
param_dtype = "bfloat16"
lrs = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)
seeds = (0, 1, 2, 3, 4)
