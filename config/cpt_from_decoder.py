# The study's advice: start from a decoder that exists, and continue with masked language modelling.
#   python prepare_fineweb.py --source=my_texts/ --tokenizer=hf:HuggingFaceTB/SmolLM2-135M --out=data/smollm2
#   python train.py config/cpt_from_decoder.py
# 128 rows x 2,048 tokens = 262,144 tokens a step; 4,000 steps = 1.05 G tokens. Published (arXiv
# 2507.00994, section 5):
# 22,000 steps of 2.36 M tokens, of which the last 2,000 decay. 1.03 EFLOP in all (counted): an
# hour and a quarter of a GPU that
# gives 230 TFLOP/s (arithmetic, not measured).
init_from = "hf:HuggingFaceTB/SmolLM2-135M"
data_dir, out_dir = "data/smollm2", "out/smollm2-mlm"
phases = [("mlm", 4_000)]
batch_rows, micro_rows = 128, 16
warmup_steps, decay_steps = 200, 1_000
