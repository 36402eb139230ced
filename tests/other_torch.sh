#!/usr/bin/env bash
# The package on another torch than the pinned one: built with its CUDA kernels and tested on the CPU, in an environment of
# its own (about 5 GB) that is kept for the next time.
#
#   tests/other_torch.sh VERSION        2.10.0, 2.11.0, ... or newest
#
# Environments lie in $HELIOS_ENVS (~/.cache/helios_engine by default). nvcc is needed, a GPU is not; where nvcc is of another
# major release than the torch's CUDA, the kernels are built all the same (HELIOS_CUDA=force) and only their CPU side runs.
set -euo pipefail
version=${1:?usage: tests/other_torch.sh VERSION}
root=$(cd "$(dirname "$0")/.." && pwd)
home=${HELIOS_ENVS:-${XDG_CACHE_HOME:-$HOME/.cache}/helios_engine}/torch-$version
mkdir -p "$home"
[ -x "$home/env/bin/python" ] || "${PYTHON:-python3}" -m venv "$home/env"
python=$home/env/bin/python
pip=("$python" -m pip --disable-pip-version-check install --quiet)
if [ "$version" = newest ]; then "${pip[@]}" --upgrade torch; else "${pip[@]}" "torch==$version"; fi
# torch asks for a setuptools of its own choice.
grep -vE '^(torch|setuptools)==' "$root/constraints.txt" >"$home/constraints.txt"
echo "torch==$("$python" -c 'import torch; print(torch.__version__.partition("+")[0])')" >>"$home/constraints.txt"
"${pip[@]}" -c "$home/constraints.txt" setuptools wheel pybind11 ninja
# The tree as it stands, so that the build does not touch this one's.
rm -rf "$home/source" && mkdir "$home/source"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null --files-from - -cf -) | tar -xf - -C "$home/source"
cd "$home/source"
HELIOS_CUDA=force "${pip[@]}" -c "$home/constraints.txt" --no-build-isolation -e '.[test]'
export HELIOS_OPS=native OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
"$python" - <<'END'
import torch
from helios_engine.ops import native

assert native._ON_GPU, "the operators were built without their CUDA kernels"
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}: the operators load, CUDA kernels included")
END
"$python" -m pytest -p no:cacheprovider -m 'not full' tests/ops tests/engine
