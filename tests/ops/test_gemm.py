"""Algorithms of matrix products, chosen by trying: against a library that stands in for cuBLASLt and checks what it is told."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helios_engine import Engine, EngineConfig, VideoRequest
from helios_engine.engine import autotune
from helios_engine.ops import native
from helios_engine.ops.cublaslt import CublasLt, Product
from helios_engine.ops.gemm import TunedGemms

OWN, SLOW, WRONG, FAILS, FAST, FASTEST = -1, 1, 2, 3, 4, 5  # what ran last: torch, or one of the stand-in's algorithms
TIMES = {OWN: 1.0, SLOW: 1.5, FAST: 0.7, FASTEST: 0.5}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("the stand-in needs g++")
    built = tmp_path_factory.mktemp("cublaslt") / "standin.so"
    source = Path(__file__).parent.parent / "helpers" / "cublaslt_standin.cpp"
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    return built


class Scripted:
    """Runs a work once and says how long its algorithm is known to take."""

    def __init__(self, library: ctypes.CDLL, times: dict[int, float] = TIMES) -> None:
        self._library, self._times = library, times
        self.recording = False
        self.num_tried = 0

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def stream(self, device: torch.device) -> int:
        return 77

    def is_recording(self) -> bool:
        return self.recording

    def seconds(self, works: list[Callable[[], object]]) -> list[float]:
        self.num_tried += 1
        found = []
        for work in works:
            self._library.standin_last()
            work()
            found.append(self._times[self._library.standin_last()])
        return found


@pytest.fixture
def make(path):
    """(gemms, bench, what was kept) with these times and earlier choices."""
    library = ctypes.CDLL(str(path))

    def made(times: dict[int, float] = TIMES, known: dict | None = None) -> tuple[TunedGemms, Scripted, dict]:
        bench, kept = Scripted(library, times), {}
        return TunedGemms(CublasLt(str(path)), bench, known=known or {}, keep=kept.update), bench, kept

    return made


def _operands(rows: int, inner: int, columns: int, dtype: torch.dtype, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((batch, rows, inner), (columns, inner), (columns,))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def _check(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> None:
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    if gelu:
        exact = torch.nn.functional.gelu(exact, approximate="tanh")
    assert out.shape == exact.shape
    assert out.dtype == x.dtype
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(7, 24, 16), (1, 8, 8), (33, 16, 40)])
@pytest.mark.parametrize("gelu", [False, True])
def test_the_fastest_right_algorithm_computes(make, path, monkeypatch, dtype, rows, inner, columns, gelu) -> None:
    monkeypatch.setattr(native, "epilogue_is_tanh", lambda _: True)  # the stand-in's is
    gemms, bench, kept = make()
    x, weight, bias = _operands(rows, inner, columns, dtype)
    for _ in range(3):
        _check(gemms(x, weight, bias, gelu=gelu), x, weight, bias, gelu)
        assert bench._library.standin_last() == FASTEST
    assert bench.num_tried == 1, "a shape is tried once"
    ((name, (words, workspace)),) = kept.items()
    assert words[0] == FASTEST
    assert workspace > 0
    assert f"{rows}x{inner}x{columns}" in name
    _check(gemms(x, weight, -bias, gelu=gelu), x, weight, -bias, gelu)


def test_rows_and_outputs_may_be_parts(make) -> None:
    gemms, bench, _ = make()
    x, weight, bias = _operands(9, 16, 24, torch.bfloat16)
    for rows, start in ((slice(3, None), 0), (slice(None, 5), 8), (slice(2, 3), 16)):
        part = (x[:, rows], weight[start:], bias[start:])
        _check(gemms(*part), *part)
        assert bench._library.standin_last() == FASTEST
    wide = torch.cat([x, x], dim=-1)[..., :16]  # rows lie further apart than they are long
    _check(gemms(wide, weight, bias), wide, weight, bias)
    assert bench._library.standin_last() == FASTEST
    batch = _operands(4, 16, 24, torch.bfloat16, batch=2)
    _check(gemms(*batch), *batch)
    assert bench._library.standin_last() == FASTEST


@pytest.mark.parametrize("kind", ["float32", "rows of two videos", "odd address", "odd width", "nothing", "erf"])
def test_what_is_not_for_it_is_torch_s(make, kind: str) -> None:
    gemms, bench, kept = make()
    x, weight, bias = _operands(6, 16, 24, torch.float32 if kind == "float32" else torch.bfloat16, batch=2)
    if kind == "rows of two videos":
        x = x[:, 1:]
    if kind == "odd address":
        bias = torch.cat([bias, bias])[1:25]
    if kind == "odd width":
        weight, bias = weight[:9], bias[:9]
    if kind == "nothing":
        x = x[:, :0]
    _check(gemms(x, weight, bias, gelu=kind == "erf"), x, weight, bias, kind == "erf")
    assert bench._library.standin_last() == OWN
    assert not kept


@pytest.mark.parametrize("times", [{**TIMES, FAST: 0.99, FASTEST: 0.995}, {**TIMES, FAST: 3.0, FASTEST: 2.0}])
def test_torch_s_own_stays_where_nothing_gains(make, times) -> None:
    gemms, bench, kept = make(times)
    operands = _operands(7, 24, 16, torch.bfloat16)
    for _ in range(2):
        _check(gemms(*operands), *operands)
        assert bench._library.standin_last() == OWN
    assert list(kept.values()) == [None]
    assert bench.num_tried == 1


def test_earlier_choices_are_taken_untried(make) -> None:
    first, _, kept = make({**TIMES, FASTEST: 2.0})
    operands = _operands(7, 24, 16, torch.bfloat16)
    first(*operands)
    gemms, bench, again = make(known=kept)
    _check(gemms(*operands), *operands)
    assert bench._library.standin_last() == FAST
    assert bench.num_tried == 0
    assert not again


def test_a_remembered_algorithm_that_does_not_work_is_chosen_anew(make, caplog) -> None:
    operands = _operands(7, 24, 16, torch.bfloat16)
    first, _, kept = make()
    first(*operands)
    ((name, (words, workspace)),) = kept.items()
    for broken in (WRONG, FAILS):
        gemms, bench, again = make(known={name: ((broken, *words[1:]), workspace)})
        _check(gemms(*operands), *operands)
        assert bench._library.standin_last() == FASTEST
        assert "is chosen anew" in caplog.text
        assert again == kept
        caplog.clear()


def test_no_candidates_leave_it_to_torch(make, monkeypatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise RuntimeError("cublasLtMatmulAlgoGetHeuristic failed with status 15")

    monkeypatch.setattr(Product, "candidates", none)
    gemms, _, kept = make()
    operands = _operands(7, 24, 16, torch.bfloat16)
    _check(gemms(*operands), *operands)
    assert list(kept.values()) == [None]


def test_a_product_that_is_no_number_settles_nothing(make) -> None:
    gemms, bench, kept = make()
    x, weight, bias = _operands(7, 24, 16, torch.bfloat16)
    x[0, 3, 5] = float("nan")
    assert gemms(x, weight, bias)[0, 3].isnan().all()
    assert not kept
    assert not bench.num_tried


def test_no_memory_to_try_is_not_remembered(make, monkeypatch, caplog) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    gemms, bench, kept = make()
    monkeypatch.setattr(bench, "seconds", full)
    operands = _operands(7, 24, 16, torch.bfloat16)
    for _ in range(2):
        _check(gemms(*operands), *operands)
    assert not kept
    assert caplog.text.count("no memory to try") == 1
    bench._library.standin_last()
    gemms(*operands)
    assert bench._library.standin_last() == OWN


def test_nothing_is_tried_or_allocated_while_recording(make) -> None:
    gemms, bench, kept = make()
    operands = _operands(7, 24, 16, torch.bfloat16)
    bench.recording = True
    _check(gemms(*operands), *operands)
    assert bench._library.standin_last() == OWN
    bench.recording = False
    gemms(*operands)
    bench.recording = True
    gemms(*operands)
    assert bench._library.standin_last() == FASTEST
    other, bench, _ = make(known=kept)
    bench.recording = True
    _check(other(*operands), *operands)
    assert bench._library.standin_last() == OWN


def test_everything_is_given_back(make, path) -> None:
    before = ctypes.CDLL(str(path)).standin_alive()
    gemms, _, _ = make()
    for rows in (3, 4, 5):
        gemms(*_operands(rows, 16, 8, torch.bfloat16))
    gemms.close()
    gemms.close()
    assert ctypes.CDLL(str(path)).standin_alive() == before


def test_choices_are_kept_in_a_file(path, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    operands = _operands(7, 24, 16, torch.bfloat16)
    for tried in (1, 0):
        bench = Scripted(ctypes.CDLL(str(path)))
        gemms = autotune.make_gemms(torch.device("cpu"), open_library=lambda: CublasLt(str(path)), bench=bench)
        gemms(*operands)
        assert bench.num_tried == tried
        assert bench._library.standin_last() == FASTEST
    autotune.cache_file("gemms").write_text('{"broken')
    with caplog.at_level(logging.WARNING):
        gemms = autotune.make_gemms(torch.device("cpu"), open_library=lambda: CublasLt(str(path)), bench=bench)
    assert "cannot be read" in caplog.text
    _check(gemms(*operands), *operands)


def test_a_library_that_is_not_there_is_said(tmp_path, caplog) -> None:
    missing = str(tmp_path / "libcublasLt.so.13")
    assert autotune.make_gemms(torch.device("cpu"), open_library=lambda: CublasLt(missing)) is None
    assert "torch's own algorithms: cuBLASLt cannot be used" in caplog.text


def test_a_whole_video_over_it(make, toy) -> None:
    """Every large product of every block at every stage, with and without history."""
    request = VideoRequest(prompt="A fox", num_frames=66, height=64, width=64, steps=1, seed=1)
    engine = Engine.load(toy / "distilled", EngineConfig(device="cpu", dtype="bfloat16"))
    expected = engine.generate(request).latents
    gemms, bench, kept = make()
    for block in engine.transformer.blocks:
        block.gemms = gemms
    latents = engine.generate(request).latents
    assert (latents - expected).norm() <= 2e-2 * expected.norm()
    assert len(kept) >= 3 * 5, "stages have shapes of their own"
    assert bench.num_tried == len(kept)
    engine.generate(request)
    assert bench.num_tried == len(kept)


def test_asking_for_it_on_the_cpu_is_answered(toy, caplog) -> None:
    assert "computes in float32" in autotune.why_not_tuned(torch.device("cuda"), torch.float32, offload="none")
    assert autotune.why_not_tuned(torch.device("cuda"), torch.bfloat16, offload="none") is None
    Engine.load(toy / "base", EngineConfig(device="cpu", tune_gemms=True)).close()
    assert "torch's own algorithms: only CUDA devices have cuBLASLt" in caplog.text
    with pytest.raises(ValueError, match="tune_gemms chooses itself; use one of the two"):
        EngineConfig(tune_gemms=True, compile=True)
    with pytest.raises(ValueError, match="tune_gemms tries the algorithms of 16-bit products"):
        EngineConfig(tune_gemms=True, fp8=True)
