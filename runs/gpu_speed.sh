#!/usr/bin/env bash
# The training step of one of the paper's sizes on a GPU, in parts of under nine minutes: rows for README's table, a profile.
#
#     bash runs/gpu_speed.sh 210m                  # ours beside the peers -> bench/results/
#     bash runs/gpu_speed.sh 210m parts            # ours with one feature switched off at a time
#     bash runs/gpu_speed.sh 210m memory           # the largest micro-batch, with and without activation checkpointing
#     bash runs/gpu_speed.sh 210m steady           # are a thousand steps as fast at the end as at the start? does memory grow?
#     NANOGPT=../nanoGPT bash runs/gpu_speed.sh 1b peers some/folder       # with a clone of karpathy/nanoGPT, to another folder
#
# PYTHON (default: .venv's, else python3) needs PyTorch with CUDA, Triton, the small packages, and transformers for EuroBERT; no network.
# More words are handed to bench.py, so `bash runs/gpu_speed.sh tiny peers /tmp/x --device=cpu --rows=2 --vocab_size=512` tries the script.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
size=${1:?which size: 210m, 610m or 1b?} what=${2:-peers} to=${3:-bench/results}
shift $(($# < 3 ? $# : 3))
device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu")')
mkdir -p "$to"
rows=$to/$device.jsonl limit=$((SECONDS + 530)) failed=0
step="--size=$size --vocab_size=128256 --block_size=2048 --rows=12 --nanogpt=${NANOGPT:-} --to=$rows"

part() {      # COMMAND...: within what is left of the nine minutes
  timeout --preserve-status -s TERM -k 20 $((limit > SECONDS ? limit - SECONDS : 1)) "$PYTHON" bench.py "$@" 2>&1 | tr '\r' '\n' | grep -v "it/s\]\|s/it\]\|?it"
  [ "${PIPESTATUS[0]}" = 0 ] || failed=1
}

case $what in
  peers)
    part train $step --contestants=ours,ours-clm,eurobert,nanogpt "$@"
    part profile $step --to="$to/profile.$device.$size.txt" "$@" > /dev/null
    part train $step --contestants=ours,eurobert-eager "$@" ;;
  parts)
    part train $step --contestants=ours,ours-kernel,ours-head,ours-padded,ours-eager,ours-loss "$@" ;;
  memory)
    part memory $step "$@" ;;
  steady)
    part steady $step "$@" ;;
  *) echo "error: '$what': expected peers, parts, memory or steady" >&2; exit 2 ;;
esac
exit $failed
