#!/usr/bin/env bash
# One machine, four GPUs, one video: all GPUs share every step.
#
#   PROMPT="A red fox runs through fresh snow." launchers/one_machine.sh
#   MODEL=/models/Helios-Distilled GPUS=2 launchers/one_machine.sh --num-frames 264 --seed 7
#
# Flags after the script's name go to `helios-engine generate`. Distilled has no guidance, so the default is Ulysses over
# all GPUs; add --ring-degree to split it.
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${GPUS:-4}" -m helios_engine.cli generate \
  --model "${MODEL:-BestWishYsh/Helios-Distilled}" \
  --prompt "${PROMPT:-A red fox runs through fresh snow at sunrise.}" \
  --output "${OUTPUT:-outputs/video.mp4}" \
  "$@"
