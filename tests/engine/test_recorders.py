"""CUDA graphs' recorder against a stand-in of torch's API that keeps the state a failed capture leaves behind."""

from __future__ import annotations

import contextlib
import logging
import types

import pytest
import torch

from helios_engine.engine.recorders import CudaRecorder


class FakeCuda:
    """A device whose default generator is in capture state from a capture's beginning to its good end, as in torch."""

    def __init__(self, monkeypatch) -> None:
        self.is_drawing_for_graph = False
        self.breaks = 0  # captures that fail from now on
        self.current: object = "usual stream"
        self.captures = 0
        fake = self

        class Graph:
            def replay(self) -> None:
                pass

        @contextlib.contextmanager
        def capture(graph, *, pool, stream, capture_error_mode):
            fake.captures += 1
            fake.is_drawing_for_graph = True
            fake.current = stream
            yield
            if fake.breaks:
                fake.breaks -= 1
                raise RuntimeError("operation not permitted when stream is capturing")  # before it comes to generators
            fake.is_drawing_for_graph = False

        api = {
            "device": lambda device: contextlib.nullcontext(),
            "graph_pool_handle": lambda: (0, 1),
            "Stream": lambda device: types.SimpleNamespace(name="capturing stream"),
            "CUDAGraph": Graph,
            "graph": capture,
            "current_stream": lambda: fake.current,
            "current_device": lambda: 0,
            "set_stream": lambda stream: setattr(fake, "current", stream),
        }
        for name, value in api.items():
            monkeypatch.setattr(torch.cuda, name, value)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))


def test_a_capture_that_breaks_off_leaves_random_numbers_usable(monkeypatch) -> None:
    fake = FakeCuda(monkeypatch)
    recorder = CudaRecorder(torch.device("cuda", 0))
    fake.breaks = 1
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(lambda: ())
    assert not fake.is_drawing_for_graph, "torch.randn would refuse"
    assert fake.current == "usual stream"
    assert fake.captures == 2
    _, outputs = recorder.record(lambda: (torch.ones(1),))
    assert outputs[0].item() == 1


def test_where_that_fails_too_it_is_said(monkeypatch, caplog) -> None:
    fake = FakeCuda(monkeypatch)
    fake.breaks = 2
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="not permitted"):
        CudaRecorder(torch.device("cuda", 0)).record(lambda: ())
    assert "random numbers may be refused on cuda:0" in caplog.text
    assert fake.current == "usual stream"
