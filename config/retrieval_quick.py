# A first look in a minute on two CPU cores, for a small encoder: one learning rate, two seeds, and
# 40 steps of 16 pairs.
#   python eval_ir.py --ckpt=runs/demo/clm_then_mlm config/retrieval_quick.py
# One learning rate does not compare encoders, because each has its own best one. For that leave
# this file out.
lrs = (1e-3,)
seeds = (0, 1)
steps = 40
batch = 16
