#!/usr/bin/env bash
# Helios-Base on eight GPUs of one machine: four compute the prompt's branch, four the negative prompt's, and each four
# share one sequence by Ulysses. Guided models gain more from this split than from eight-way Ulysses, because the two
# halves meet once per step and not twice per layer.
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
