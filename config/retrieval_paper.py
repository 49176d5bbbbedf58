# The paper's retrieval, with the settings of its code: 6 learning rates x 5 seeds = 30 trainings for
# each encoder, on MS MARCO's pairs. After each, the judged documents of MS MARCO, NQ and MLDR are
# searched.
#   torchrun --nproc_per_node=8 eval_ir.py --ckpt=RUN config/retrieval_paper.py --out_dir=RUN/paper
# 1,000 steps of 32 pairs. All other documents of a batch are negatives. Weights and optimizer state
# are in bfloat16, which loses small updates (see finetune_paper.py). For numbers of your own prefer
# the defaults: the same grid without this file.
# Where this may differ from its code: we search, as we train, with a closing token and 2,028 tokens. Its
# evaluator very likely encodes without that token, with <|begin_of_text|> first, up to 2,048 tokens:
# --paper_encoding=true. Nobody has seen which of the two gave the published scores.
tasks = "all"
mode = "paper"
param_dtype = "bfloat16"
lrs = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)
seeds = (0, 1, 2, 3, 4)
