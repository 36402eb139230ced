#!/usr/bin/env bash
#SBATCH --job-name=helios
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=00:30:00
# Several machines under Slurm: one torchrun agent per node, which starts one rank per GPU.
#
#   sbatch --export=ALL,PROMPT="A red fox runs through fresh snow." launchers/slurm.sh
#
# Ulysses stays inside a machine, where links are fast; the ring or the guidance branches go between machines. Two
# machines of eight: --cfg-degree 2 for guided models (one branch per machine), else --ring-degree 2.
# The model folder and the output must lie where every node sees them; rank 0 alone writes.
set -euo pipefail
nodes=${SLURM_NNODES:?start this with sbatch}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
exec srun torchrun \
  --nnodes "$nodes" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "${hosts[0]}:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m helios_engine.cli generate \
  --ring-degree "${RING:-$nodes}" \
  --model "${MODEL:-BestWishYsh/Helios-Distilled}" \
  --prompt "${PROMPT:-A red fox runs through fresh snow at sunrise.}" \
  --output "${OUTPUT:-outputs/video.mp4}" \
  "$@"
