#!/usr/bin/env bash
# What a user types, on a GPU: each command of README and docs/troubleshooting.md that needs one, as it stands there.
#
#   bash benchmarks/checks/gpu_commands.sh FOLDER
#
# Writes what each printed to FOLDER/NAME.txt, and one line for it here. Exit code 1 if one ended otherwise than expected.
set -u
cd "$(dirname "$0")/../.."
out=${1:?a folder for what they print} failed=0
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} COLUMNS=80 OMP_NUM_THREADS=1 XDG_CACHE_HOME=$out/cache
python=${PYTHON:-python3} tiny=examples/checkpoints/qwen3_next-tiny prompts=examples/checkpoints/prompts.txt

try() { # NAME, expected exit code, a text that it prints, the command
  local name=$1 code=$2 text=$3 found
  shift 3
  "$python" -m qwen_fastdecode "$@" >"$out/$name.txt" 2>&1
  found=$?
  if [ "$found" = "$code" ] && grep -qe "$text" "$out/$name.txt"; then
    echo "ok      $name"
  else
    echo "FAILED  $name: exit code $found, expected $code and '$text'; the last lines:"
    tail -5 "$out/$name.txt"
    failed=1
  fi
}

program=$out/program.py
cat >"$program" <<'PROGRAM'
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="bfloat16", device_map=sys.argv[2])
inputs = tokenizer("The for statement", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, min_new_tokens=64)[0]))
PROGRAM

try doctor 0 "triton" doctor
try issue 0 "</details>" doctor --issue
try run 0 "triton  *63 " run --report "$program" $tiny cuda:0
try run-triton 0 "triton  *63 " run --backend triton --report "$program" $tiny cuda:0
try run-graph 0 "cuda_graph: 1 captured" run --cuda-graph --report "$program" $tiny cuda:0
try compare 0 "Same quality" compare $tiny --prompts $prompts --dtype bfloat16 --repeat 3
try compare-float32 0 "Same text" compare $tiny --prompts $prompts --dtype fp32 --repeat 3
try tune 0 "Kept in $out/cache/qwen_fastdecode/tiles.json" tune
try tuned 0 "triton  *63 " run --report "$program" $tiny cuda:0
if [ "$("$python" -c "import torch; print(torch.cuda.device_count())")" -gt 1 ]; then
  try second 0 "triton  *63 " run --report "$program" $tiny cuda:1
  try both 0 "weights lie on several devices" run --cuda-graph --report "$program" $tiny balanced
  try tune-second 0 "Kept in" tune --device cuda:1
fi
exit $failed
