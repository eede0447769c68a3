#!/usr/bin/env bash
# Two GPUs of one host, from the repository's root: a model over both in one process, then tensor-parallel ranks (NCCL);
# correctness first, then decode ms.
#
#   bash benchmarks/ranks/gpu_tp.sh [--graph] [--out FOLDER] [--ranks N] [--limit SECONDS] [--no-speed] [--dry-run]
#
# --graph: captured steps on tensor-parallel ranks, and nothing else; some four minutes, of which times are the half.
# Ends within --limit seconds (520); what was measured by then is kept. --no-speed takes some three minutes. --dry-run runs
# the same code on the CPU (gloo) at tiny sizes. Nothing is installed; what is on PYTHONPATH is used. Exit code 1 if
# anything was wrong or cut short.
set -u
cd "$(dirname "$0")/../.."
out=benchmarks/results/$(date -u +%Y-%m-%d)-tp ranks=2 limit=520 graph= dry=() speed=() failed=()
while [ $# -gt 0 ]; do
  case $1 in
    --graph) graph=1 ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    --ranks) ranks=${2:?--ranks needs a number}; shift ;;
    --limit) limit=${2:?--limit needs seconds}; shift ;;
    --no-speed) speed=(--no-speed) ;;
    --dry-run) dry=(--dry-run); export CUDA_VISIBLE_DEVICES= ;;
    *) echo "unknown argument $1: see the head of $0" >&2; exit 2 ;;
  esac
  shift
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
python=${PYTHON:-python3}
mkdir -p "$out"
ranked=(-m torch.distributed.run --standalone --nproc-per-node "$ranks" --module)
if [ -n "$graph" ]; then
  timeout -k 10 "$limit" "$python" "${ranked[@]}" benchmarks.ranks.gpu_tp_graph --out "$out" \
    --seconds "$((limit - 50))" "${speed[@]}" "${dry[@]}" || failed+=("gpu_tp_graph ($?)")
else
  timeout -k 10 "$((limit / 3))" "$python" -m benchmarks.ranks.gpu_map --out "$out" "${dry[@]}" ||
    failed+=("gpu_map ($?)")
  left=$((limit - SECONDS))
  timeout -k 10 "$left" "$python" "${ranked[@]}" benchmarks.ranks.gpu_tp --out "$out" --seconds "$((left - 30))" \
    "${speed[@]}" "${dry[@]}" || failed+=("gpu_tp ($?)")
fi
[ -f "$out/results.md" ] && cat "$out/results.md"
[ ${#failed[@]} -eq 0 ] || { echo "FAILED: ${failed[*]}"; exit 1; }
