#!/usr/bin/env bash
# The paper's study in miniature, from a bare machine to its report: five shares of CLM at one budget, continued pretraining from both
# starts, masking rates, checkpoints on the way, three pretraining seeds of each.
#   bash runs/mini_study.sh                # some two hours on two CPU cores; stop it at any moment, run it again
#   bash runs/mini_study.sh --scale=gpu    # larger models on one GPU
# Every checkpoint is fine-tuned on tasks made from the same text. TASKS_DIR=FOLDER adds those of sst2, uner_en_ewt, squad
# and squad_retrieval that it holds. report.py draws the tables and figures whenever one asks, half-way, too.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/env.sh
scale=cpu jobs=0
for word in "$@"; do
  case $word in
    --scale=cpu) ;;
    --scale=gpu) scale=gpu jobs=6 ;;      # small models leave a GPU idle: several share it
    *) echo "error: what is '$word'? bash runs/mini_study.sh [--scale=cpu|--scale=gpu]" >&2; exit 2 ;;
  esac
done
use_environment requirements.txt
began=$SECONDS m=610m out=runs/mini/$scale
if [ -z "${TASKS_DIR:-}" ] && [ -d ../shared/data ]; then TASKS_DIR=../shared/data; fi
has() {   # TASK: does TASKS_DIR hold it, directly or one folder deeper?
  local folder
  if [ -z "${TASKS_DIR:-}" ]; then return 1; fi
  for folder in "$TASKS_DIR/$1" "$TASKS_DIR"/*/"$1"; do
    if [ -d "$folder" ]; then return 0; fi
  done
  return 1
}
quick=sotu_case,sotu_cloze,sotu_search      # for the larger half of the checkpoints not sotu_era and squad, which blur them all (LOG.md)
for task in sst2 uner_en_ewt squad_retrieval; do if has $task; then quick+=,$task; fi; done
if ! has sst2; then quick+=,sotu_era; fi    # a family without a task has no figure

shares=$m-mlm40-42k,$m-clm-10k-mlm40-42k,$m-clm-21k-mlm40-42k,$m-clm-32k-mlm40-42k,$m-clm-42k        # 0, 24, 50, 76, 100 % CLM
continued=$m-clm-dec42k-mlm40-64k,$m-mlm40-dec42k-mlm40-64k
rates=$m-mlm20-42k,$m-mlm50-42k
on_the_way=$(for step in 5000 10000 20000 40000; do printf ',%s' $m-clm-42k-$step $m-mlm40-42k-$step; done)
study() { "$PYTHON" study.py run --scale=$scale --seeds=42,43,44 --data_dir=data/demo --tasks_dir="${TASKS_DIR:-}" --jobs=$jobs --out_dir=$out "$@"; }

"$PYTHON" prepare_fineweb.py --source=sotu --tokenizer=train:4096 --val_fraction=0.03 --out=data/demo
study --only=$shares,$continued
study --only=$rates$on_the_way --tasks=$quick
"$PYTHON" report.py $out --to=$out/report
echo "all of it took $((SECONDS - began)) s"
