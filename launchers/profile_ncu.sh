#!/usr/bin/env bash
# Nsight Compute on one of our operators, on one GPU, at the sizes of the real model.
#
#   launchers/profile_ncu.sh qk_rmsnorm_rope          # names: benchmarks/bench_ops.py's table
#   LAUNCHES=5 REPORT=outputs/norm launchers/profile_ncu.sh residual_gate_norm
#
# Counted are the kernels launched inside the operator's NVTX range, after two launches that warm up; clocks are left alone, so
# that the figures are those of a run. Opens with ncu-ui, or as text: ncu --import REPORT.ncu-rep.
set -euo pipefail
operator=${1:?usage: launchers/profile_ncu.sh OPERATOR}
report=${REPORT:-outputs/$operator}
mkdir -p "$(dirname "$report")"
exec ncu --nvtx --nvtx-include "helios@$operator/" --launch-skip 2 --launch-count "${LAUNCHES:-3}" \
  --set full --clock-control none --force-overwrite --export "$report" \
  "${PYTHON:-python}" -m benchmarks.bench_ops --only "$operator" --repeats "${LAUNCHES:-3}"
