#!/usr/bin/env bash
# Nsight Systems around one chunk of a run, on all GPUs of this machine: one report per rank.
#
#   PROMPT="A red fox runs through fresh snow." launchers/profile_nsys.sh
#   MODEL=/models/Helios-Distilled GPUS=2 CHUNK=2 launchers/profile_nsys.sh --steps 1,1,1
#
# Recorded are CUDA and NVTX: our domain "helios", down to single operators and exchanges, and NCCL's own ranges. Recording
# starts with chunk $CHUNK (counted from 0; 1 by default, the first that is warm) and ends with it. Reports:
# outputs/helios.rankN.nsys-rep. Recorded forwards (CUDA graphs) would hide what is inside a step, so they are off. Flags after the script's name go to `helios-engine generate`.
set -euo pipefail
chunk=${CHUNK:-1}
mkdir -p outputs "${REPORTS:-outputs}"
# A capture range is found by its text, registered with the profiler or not.
export NSYS_NVTX_PROFILER_REGISTER_ONLY=0
exec torchrun --standalone --nproc-per-node "${GPUS:-4}" --no-python \
  nsys profile --trace cuda,nvtx,osrt --capture-range nvtx --nvtx-capture "chunk $chunk@helios" --capture-range-end stop \
  --force-overwrite true --output "${REPORTS:-outputs}/helios.rank%q{RANK}" \
  "${PYTHON:-python}" -m helios_engine.cli generate \
  --model "${MODEL:-BestWishYsh/Helios-Distilled}" \
  --prompt "${PROMPT:-A red fox runs through fresh snow at sunrise.}" \
  --num-frames $(((chunk + 1) * 33)) --no-cuda-graphs \
  --output "${OUTPUT:-outputs/profiled.mp4}" \
  "$@"
