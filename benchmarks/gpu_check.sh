#!/usr/bin/env bash
# Checks and timings on one CUDA machine, no network needed.
#
#   benchmarks/gpu_check.sh [PART...] OUT      parts in order of value; default: all of them
#
# Each part writes OUT/PART.json and a line in OUT/summary.md before the next one starts, ends within PART_SECONDS
# (240), and does not stop the others when it fails. WHEELS=folder installs carried wheels first (diffusers, fa3_fwd,
# ftfy, nvtx). TINY=1 runs small models, to try this script on any machine, without a GPU too.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
all=(env ops tests dit attention engine vae offload quality ranks diffusers compiled diffusers_offload sanitize)
if [ $# -eq 0 ]; then
  echo "usage: benchmarks/gpu_check.sh [PART...] OUT; parts: ${all[*]}" >&2
  exit 2
fi
out=${*: -1}
parts=("${@:1:$#-1}")
[ ${#parts[@]} -eq 0 ] && parts=("${all[@]}")
for part in "${parts[@]}"; do
  case " ${all[*]} " in
    *" $part "*) ;;
    *) echo "gpu_check.sh: unknown part $part; parts: ${all[*]}" >&2; exit 2 ;;
  esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || echo "gpu_check.sh: some wheels did not install" >&2
fi
# The compiled operators, CUDA kernels included where nvcc is; the checks run without them too.
"$python" setup.py --quiet build_ext --inplace || echo "gpu_check.sh: the operators did not build" >&2
export PYTHONPATH=$root HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=0
for part in "${parts[@]}"; do
  echo "== $part"
  timeout "${PART_SECONDS:-240}" "$python" -m benchmarks.gpu_check "$part" "$out" ${TINY:+--tiny} 2>&1 | tee "$out/$part.log" | tail -n 25
  code=${PIPESTATUS[0]}
  if [ "$code" -ne 0 ]; then
    failed=1
    echo "| $part | failed with exit code $code (124: out of time), see $part.log |" >>"$out/summary.md"
  fi
done
cat "$out/summary.md"
exit $failed
