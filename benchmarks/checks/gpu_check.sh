#!/usr/bin/env bash
# The proof on a GPU, from the repository's root: correctness, compute-sanitizer, tiles, speed; then one table.
#
#   bash benchmarks/checks/gpu_check.sh [--out FOLDER] [--limit SECONDS] [--sides NAMES] [--dry-run] [SECTION...]
#
# Sections: correctness speed sanitize tiles (all of them by default, in this order), and by name only
#   dense experts   whole models: the float32 tokens of the sides that do not compile, then their speed
#   dense-compiled experts-compiled    of the sides that compile: half a minute or more for each, at each batch
#                   Rows that the folder holds are not measured again: name the section again where it was cut short.
#                   --sides eager,patched: these alone
#   host            what the host spends in one step of a patched and of an unpatched layer
#   norms           the norm of a captured step beside upstream's: bits, microseconds
#   graph           what is true of cuda_graph=True beside its speed
#   ways            CUDA graphs by hand, reduce-overhead, bitsandbytes
# All end within --limit seconds (540); a section that is cut short keeps the rows it has. --dry-run runs the same code
# on a CPU at tiny sizes, in Triton's interpreter. Nothing is installed; what is on PYTHONPATH is used.
# Exit code 1 if any section found something wrong or was cut short; the others still run.
set -u
cd "$(dirname "$0")/../.."
out=benchmarks/results/$(date -u +%Y-%m-%d) limit=540 dry=() sides= sections=()
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=${2:?--out needs a folder}; shift ;;
    --limit) limit=${2:?--limit needs seconds}; shift ;;
    --sides) sides=${2:?--sides needs names}; shift ;;
    --dry-run) dry=(--dry-run); export TRITON_INTERPRET=1 ;;
    dense | experts | dense-compiled | experts-compiled) sections+=("tokens-$1" "generate-$1") ;;
    correctness | sanitize | tiles | speed | host | norms | graph | ways) sections+=("$1") ;;
    *) echo "unknown argument $1: see the head of $0" >&2; exit 2 ;;
  esac
  shift
done
[ ${#sections[@]} -gt 0 ] || sections=(correctness speed sanitize tiles)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export PATH=$PATH:/usr/local/cuda/bin # where CUDA keeps compute-sanitizer
python=${PYTHON:-python3} failed=()
declare -A module=(
  [correctness]=checks.gpu_correctness [sanitize]=checks.gpu_sanitize [tiles]=op.gpu_tiles [speed]=op.gpu_speed
  [host]=op.gpu_host [norms]=op.gpu_norms [graph]=models.gpu_graph [ways]=models.gpu_ways
  [tokens]=models.gpu_tokens [generate]=models.gpu_generate
)
declare -A of_model=([eager]=eager,fla,patched,cuda_graph [compiled]=compiled,patched_compiled)
mkdir -p "$out"
for section in "${sections[@]}"; do
  start=$SECONDS
  echo "== $section"
  left=$((limit - SECONDS > 1 ? limit - SECONDS : 1))
  IFS=- read -r kind of compiled <<<"$section" # tokens-dense-compiled, say
  model=()
  [ -z "$of" ] || model=(--model "$of" --sides "${sides:-${of_model[${compiled:-eager}]}}")
  timeout -k 5 "$left" "$python" -m "benchmarks.${module[$kind]}" --out "$out" "${model[@]}" "${dry[@]}" ||
    failed+=("$section ($?)")
  echo "== $section took $((SECONDS - start)) s"
done
"$python" -m benchmarks.checks.gpu_report --out "$out" || failed+=(report)
[ ${#failed[@]} -eq 0 ] || { echo "FAILED: ${failed[*]}"; exit 1; }
