"""NVTX ranges: which there are, that they nest, and the switch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from helios_engine import Engine, EngineConfig, VideoRequest, trace
from helios_engine.ops import native
from helios_engine.output import open_writer

REQUEST = VideoRequest(prompt="A fox", num_frames=33, height=64, width=64, steps=1, max_sequence_length=8)


class _Recorder:
    """Stands in for an NVTX domain."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.depth = 0

    def get_event_attributes(self, message: str) -> str:
        return message

    def push_range(self, message: str) -> None:
        self.events.append("  " * self.depth + message)
        self.depth += 1

    def pop_range(self) -> None:
        self.depth -= 1


@pytest.fixture
def recorder(monkeypatch):
    recorder = _Recorder()
    trace._range.cache_clear()
    monkeypatch.setattr(trace, "_domain", lambda: recorder)
    yield recorder
    trace._range.cache_clear()


def test_ranges_cover_a_run_and_nest(recorder: _Recorder, toy, tmp_path) -> None:
    engine = Engine.load(toy / "distilled", EngineConfig(device="cpu"))
    with open_writer(tmp_path / "out.npy", fps=24) as writer:
        for chunk in engine.stream(REQUEST):
            writer.write(chunk)
    assert recorder.depth == 0
    block = ["      self_attention", "      cross_attention", "      feed_forward"] * engine.checkpoint.model.num_layers
    step = ["    step", *block]
    stages = [line for stage in range(3) for line in [f"  stage {stage}", *step * 2]]
    fine = {*native.OPERATORS, "attention"}
    coarse = [line for line in recorder.events if line.strip() not in fine]
    assert coarse == ["load", "text_encode", "chunk 0", *stages, "  vae", "output"]
    assert recorder.events.count("        attention") == 2 * engine.checkpoint.model.num_layers * 6


@pytest.mark.skipif(bool(native.WHY_NOT), reason=f"no compiled operators: {native.WHY_NOT}")
def test_operators_have_ranges_of_their_names(recorder: _Recorder) -> None:
    x = torch.randn(1, 2, 8)
    native.rms_norm_(x, torch.ones(8), eps=1e-6)
    native.merge_partials_(x[None], torch.zeros(1, 1, 2), x[None].clone(), torch.zeros(1, 1, 2))
    assert recorder.events == ["rmsnorm_rows", "merge_partials"]


def test_names_of_chunks_come_to_an_end(recorder: _Recorder) -> None:
    for index in (0, 63, 64, 1000):
        with trace.chunk_span(index):
            pass
    assert recorder.events == ["chunk 0", "chunk 63", "chunk", "chunk"]


def test_ranges_close_on_errors(recorder: _Recorder) -> None:
    with pytest.raises(RuntimeError), trace.span("chunk"), trace.span("stage"):
        raise RuntimeError
    assert recorder.depth == 0


def test_the_real_package_works() -> None:
    trace._range.cache_clear()
    with trace.span("chunk") as entered:
        assert entered is None
    assert isinstance(trace.span("chunk"), trace._Range)


def test_without_the_package_there_are_no_ranges(monkeypatch, caplog) -> None:
    trace._range.cache_clear()
    trace._domain.cache_clear()
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with caplog.at_level("INFO"):
        for name in ("chunk", "stage", "chunk"):
            with trace.span(name) as entered:
                assert entered is None
    assert [record.levelname for record in caplog.records if "pip install nvtx" in record.message] == ["INFO"]
    trace._range.cache_clear()
    trace._domain.cache_clear()


def test_one_switch_turns_them_off() -> None:
    code = "import sys; from helios_engine import trace; s = trace.span('x'); print(type(s).__name__, 'nvtx' in sys.modules)"
    for value, expected in (("0", "nullcontext False"), ("1", "_Range True")):
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"HELIOS_NVTX": value, "PATH": ""},
        )
        assert result.stdout.strip() == expected
