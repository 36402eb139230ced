# `make demo` and `make test` work on a fresh clone; everything they need goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
export OMP_NUM_THREADS ?= 2
PLAIN := tests/engine/test_parity.py tests/model tests/sampling tests/ops

.PHONY: demo test test-full lint format clean kernels emulated cuda-check rehearse oldest newest

# torch first and by exact version: a later `pip install` then never picks another build of it.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*/*)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, found " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) setuptools wheel pybind11 ninja
	$(PIP) --no-build-isolation -e '.[test]'
	# The cross-check of tests/parallel/test_xfuser.py; the package asks for more than its attention needs.
	$(PIP) --no-deps xfuser yunchang einops distvae
	touch $@

# Two ranks, on the CPU or on two GPUs; one where there is a single GPU.
demo: $(VENV)/.ready
	$(BIN)/helios-engine toy outputs/toy
	ranks=$$($(BIN)/python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)') && \
	$(BIN)/helios-engine generate --model outputs/toy/distilled --prompt "A red fox runs through fresh snow at sunrise." \
	    --num-frames 66 --height 128 --width 192 --seed 42 --num-gpus $$ranks --output outputs/demo.mp4

# The second run is of the same engine on plain torch, without the compiled operators.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -m 'not full'
	HELIOS_OPS=reference $(BIN)/python -m pytest -m 'not full' -k 't2v or not parity' $(PLAIN)

test-full: $(VENV)/.ready
	$(BIN)/python -m pytest
	HELIOS_OPS=reference $(BIN)/python -m pytest $(PLAIN) tests/parallel

# The kernels alone, without torch: their C++ tests, plain and under the sanitizers, once per instruction set.
kernels:
	cmake -B build/kernels -S . >/dev/null && cmake --build build/kernels --parallel 2 >/dev/null
	ctest --test-dir build/kernels --output-on-failure
	cmake -B build/sanitized -S . -DHELIOS_SANITIZE=ON >/dev/null && cmake --build build/sanitized --parallel 2 >/dev/null
	ctest --test-dir build/sanitized --output-on-failure

# The CUDA kernels as the CPU emulates them, thread by thread, through torch: the operators' own tests.
emulated: $(VENV)/.ready
	cmake -B build/emulated -S . -DHELIOS_TORCH=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])') >/dev/null
	cmake --build build/emulated --parallel 2 --target helios_emulated_ops >/dev/null
	HELIOS_OPS=build/emulated/libhelios_emulated_ops.so $(BIN)/python -m pytest tests/ops -k 'not test_attention and not test_reference and not test_gemm and not opcheck and not said_aloud and not bindings and not budgets'

# Every CUDA kernel for every architecture, with nvcc alone; no GPU needed.
cuda-check: $(VENV)/.ready
	$(PIP) --no-deps nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python csrc/check_cuda.py

# Every part of benchmarks/gpu_check.sh with small models, without a GPU; nvtx and diffusers are hidden where parts do without.
REHEARSAL := build/rehearsal
rehearse: $(VENV)/.ready
	rm -rf $(REHEARSAL)
	for name in nvtx diffusers; do mkdir -p $(REHEARSAL)/hidden/$$name && \
	    echo "raise ModuleNotFoundError(\"No module named '$$name'\")" >$(REHEARSAL)/hidden/$$name/__init__.py; done
	for group in kernels engine multi; do \
	    PYTHON=$$PWD/$(BIN)/python PYTHONPATH=$$PWD/$(REHEARSAL)/hidden \
	        benchmarks/gpu_check.sh $$group $(REHEARSAL)/out --rehearse || exit 1; done
	for group in modes tests; do \
	    PYTHON=$$PWD/$(BIN)/python benchmarks/gpu_check.sh $$group $(REHEARSAL)/out --rehearse || exit 1; done
	# The parts that need diffusers, without it: they say so.
	PYTHONPATH=$$PWD/$(REHEARSAL)/hidden $(BIN)/python -m benchmarks.gpu_check compiled $(REHEARSAL)/compiled.json --tiny
	grep -q "carry its wheel" $(REHEARSAL)/compiled.json

# The oldest and the newest torch, each in an environment of its own outside this tree; nvcc is needed.
oldest:
	tests/other_torch.sh 2.10.0
	tests/other_torch.sh 2.11.0

newest:
	tests/other_torch.sh newest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist outputs *.egg-info helios_engine/*.so .pytest_cache .ruff_cache .hypothesis
