# A first look, for a small encoder and any tasks, in minutes on two CPU cores: one learning rate, two
# seeds, 40 steps of 16 examples.
#   python finetune.py --ckpt=runs/demo/clm_then_mlm config/finetune_quick.py
# To compare encoders, leave this file out: each encoder has a best learning rate of its own.
lrs = (1e-3,)
seeds = (0, 1)
steps = 40
batch = 16
