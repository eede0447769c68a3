#!/usr/bin/env bash
# What a user types, on a GPU: each command of README and docs/troubleshooting.md that needs one, as it stands there.
#
#   bash benchmarks/checks/gpu_commands.sh FOLDER
#
# Writes what each printed to FOLDER/NAME.txt, and one line for it here. Some seven minutes: two comparisons compile, and
# `tune`, the last, measures every tile. Exit code 1 if one ended otherwise than expected, or took more than four minutes.
set -u
cd "$(dirname "$0")/../.."
mkdir -p "${1:?a folder for what they print}"
out=$(realpath "$1") scratch=$(mktemp -d) failed=0
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} COLUMNS=80 OMP_NUM_THREADS=1 XDG_CACHE_HOME=$scratch/cache
python=${PYTHON:-python3} prompts=examples/checkpoints/prompts.txt
tiny=examples/checkpoints/qwen3_next-tiny real=$scratch/real-heads program=$scratch/program.py

try() { # NAME, expected exit code, texts that it prints, --, the command
  local name=$1 code=$2 texts=() found missing=() start=$SECONDS
  shift 2
  while [ "$1" != -- ]; do
    texts+=("$1")
    shift
  done
  shift
  timeout 240 "$@" >"$out/$name.txt" 2>&1
  found=$?
  for text in "${texts[@]}"; do
    grep -qe "$text" "$out/$name.txt" || missing+=("'$text'")
  done
  if [ "$found" = "$code" ] && [ ${#missing[@]} -eq 0 ]; then
    echo "ok      $name ($((SECONDS - start)) s)"
  else
    echo "FAILED  $name: exit code $found, expected $code; without ${missing[*]:-nothing}; the last lines:"
    tail -5 "$out/$name.txt"
    failed=1
  fi
}

cat >"$program" <<'PROGRAM'
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="bfloat16", device_map=sys.argv[2])
inputs = tokenizer("The for statement", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, min_new_tokens=64)[0]))
PROGRAM

fast='triton  *63 ' captured='cuda_graph: 1 captured' bf16='Same \(text\|quality\)'
qwen=("$python" -m qwen_fastdecode)
gpu=(--prompts "$prompts" --device cuda --repeat 3)
try doctor 0 triton 'All well' -- "${qwen[@]}" doctor
try issue 0 '</details>' -- "${qwen[@]}" doctor --issue
try run 0 "$fast" -- "${qwen[@]}" run --report "$program" $tiny cuda:0
try run-graph 0 "$fast" "$captured" -- "${qwen[@]}" run --cuda-graph --report "$program" $tiny cuda:0
try batch 0 'triton  *127 ' "$captured" -- "$python" examples/batch.py $tiny $prompts
try real-heads 0 -- "$python" examples/real_heads.py "$real"
for model in tiny real; do
  try compare-$model 0 "$bf16" 'cuda_graph=True' 'Transformers compiled' -- \
    "${qwen[@]}" compare "${!model}" "${gpu[@]}" --dtype bfloat16
  try compare-$model-float32 0 'Same text' 'cuda_graph=True' -- \
    "${qwen[@]}" compare "${!model}" "${gpu[@]}" --dtype float32 --beside cuda-graph
done
gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" -gt 1 ]; then
  try second 0 "$fast" -- "${qwen[@]}" run --report "$program" $tiny cuda:1
  try both 0 "$fast" 'weights lie on several devices' -- \
    "${qwen[@]}" run --cuda-graph --report "$program" $tiny balanced
fi
kept="Kept in $XDG_CACHE_HOME/qwen_fastdecode/tiles.json"
try tune 0 "$kept" -- "${qwen[@]}" tune
try tuned 0 "$fast" -- "${qwen[@]}" run --report "$program" $tiny cuda:0
[ "$gpus" -lt 2 ] || try tune-second 0 "$kept" -- "${qwen[@]}" tune --device cuda:1
exit $failed
