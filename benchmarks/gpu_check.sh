#!/usr/bin/env bash
# Checks and timings on one CUDA machine, no network needed, in groups that fit a command of ten minutes.
#
#   benchmarks/gpu_check.sh GROUP OUT [--minutes 9] [--rehearse]
#
#   kernels   what the device can do, every operator against a copy, forwards against their parts
#   engine    whole chunks end to end, decoding in three dtypes, attention backends
#   modes     approximations, Diffusers, several ranks on one device, offload, Diffusers' offload and compiled blocks
#   tests     compute-sanitizer over a few tests, then the whole test suite
#   multi     two GPUs and more: NCCL, a whole video against one GPU, scaling, capture on and off, a rank killed
#
# A group leaves OUT/GROUP.json, OUT/GROUP.md and OUT/GROUP_logs.tar.gz; a part that fails or runs out of time costs only itself.
# --minutes counts from this script's start, building included. WHEELS=folder installs carried wheels first (diffusers,
# fa3_fwd, nvtx, ftfy, wcwidth). --rehearse takes small models and runs on any machine, without a GPU too.
set -u
began=$(date +%s.%N)
root=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -lt 2 ]; then
  sed -n 2,17p "$0" >&2
  exit 2
fi
mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 1
group=$1
shift 2
python=$(command -v "${PYTHON:-python3}") || { echo "gpu_check.sh: no ${PYTHON:-python3}" >&2; exit 1; }
case $python in /*) ;; *) python=$PWD/$python ;; esac
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || echo "gpu_check.sh: some wheels did not install" >&2
fi
cd "$root" || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HELIOS_OPS=native
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
case " $* " in
  *" --rehearse "*) ;;
  # Nothing is timed with plain torch in the place of our kernels.
  *) export HELIOS_CUDA=1 ;;
esac
"$python" setup.py --quiet build_ext --inplace >"$out/build.log" 2>&1 || {
  tail -n 20 "$out/build.log" >&2
  echo "gpu_check.sh: the operators did not build" >&2
  exit 1
}
rm -f "$out/build.log"
# Checkpoints of the part offload are 29 GB, best kept in memory where there is as much.
if [ -z "${TMPDIR:-}" ] && [ "$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1)" -gt 40000000 ] 2>/dev/null; then
  export TMPDIR=/dev/shm
fi
exec "$python" -m benchmarks.gpu_groups "$group" "$out" --began "$began" "$@"
