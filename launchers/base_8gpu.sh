#!/usr/bin/env bash
# Helios-Base on eight GPUs of one machine: four compute the prompt's branch, four the negative prompt's, and each four
# share one sequence by Ulysses. The two halves meet once per step, where eight-way Ulysses would meet twice per layer, so
# this split should gain more; that is reasoned, not yet measured.
#
#   PROMPT="A red fox runs through fresh snow." launchers/base_8gpu.sh --num-frames 99
set -euo pipefail
gpus=${GPUS:-8}
exec torchrun --standalone --nproc-per-node "$gpus" -m helios_engine.cli generate \
  --cfg-degree 2 --ulysses-degree $((gpus / 2)) \
  --model "${MODEL:-BestWishYsh/Helios-Base}" \
  --prompt "${PROMPT:-A red fox runs through fresh snow at sunrise.}" \
  --negative-prompt "${NEGATIVE_PROMPT:-blurred details, worst quality, low quality}" \
  --output "${OUTPUT:-outputs/video.mp4}" \
  "$@"
