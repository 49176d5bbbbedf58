# Take a decoder that exists, and continue with masked language modelling. (arXiv 2507.00994 did so
# with decoders of its own.)
#   python prepare_fineweb.py --source=my_texts/ --tokenizer=hf:HuggingFaceTB/SmolLM2-135M --out=data/smollm2
#   python train.py config/cpt_from_decoder.py
# A step is 128 rows of 2,048 tokens = 262,144 tokens. 4,000 steps are 1.05 B tokens and 1.03 EFLOP:
# an hour and a quarter on a GPU that gives 230 TFLOP/s (arithmetic, not measured). The paper
# continued for up to 22,000 steps of 2.36 M tokens (its section 5).
init_from = "hf:HuggingFaceTB/SmolLM2-135M"
data_dir = "data/smollm2"
out_dir = "out/smollm2-mlm"
phases = [("mlm", 4_000)]
batch_rows, micro_rows = 128, 16
warmup_steps, decay_steps = 200, 1_000
