"""Decoding beside the next chunk's denoising, on lanes that take their time, and the order of calls on a stand-in stream."""

from __future__ import annotations

import contextlib
import logging
import types

import numpy as np
import pytest
import torch

from helios_engine import Engine, EngineConfig, SessionState, VideoRequest
from helios_engine.engine.lane import CudaLane, Decoding, Frames, PlainLane, why_not_overlapped

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class SlowLane(PlainLane):
    """Frames are there when they are waited for, and not done before so many questions."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def begin(self, decode) -> Decoding:
        start = self.mark()
        frames: Frames = decode()
        shown = [torch.full_like(part, 7) for part in frames]
        left = iter(range(self.patience))

        def wait() -> None:
            for target, part in zip(shown, frames, strict=True):
                target.copy_(part)

        return Decoding(shown, start, self.mark(), is_done=lambda: next(left, None) is None, wait=wait)


@pytest.fixture
def overlapped(engines):
    """An engine of a variant whose lane is slow, while the test runs."""
    used: list[tuple[Engine, object]] = []

    def get(variant: str, patience: int) -> Engine:
        engine = engines(variant)
        used.append((engine, engine.maker.lane))
        engine.maker.lane, engine.maker.overlaps = SlowLane(patience), True
        return engine

    yield get
    for engine, lane in used:
        engine.maker.lane, engine.maker.overlaps = lane, False


def _request(**changes: object) -> VideoRequest:
    usual = {"prompt": "A red fox", "num_frames": 99, "seed": 5, "height": 64, "width": 64, "max_sequence_length": 16}
    return VideoRequest(**{**usual, **changes})


STEPS = {"base": 3, "mid": (1, 2, 1), "distilled": (2, 1, 1)}


@pytest.mark.parametrize("patience", [0, 2, 1000])
@pytest.mark.parametrize("variant", STEPS)
def test_overlapped_videos_are_the_same(engines, overlapped, variant: str, patience: int) -> None:
    request = _request(steps=STEPS[variant], num_frames=80)
    expected = engines(variant).generate(request)
    chunks = list(overlapped(variant, patience).stream(request))
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), expected.frames)
    assert torch.equal(torch.cat([chunk.latents for chunk in chunks], dim=2), expected.latents)


@pytest.mark.parametrize("patience", [0, 2, 1000])
def test_steps_are_taken_while_decoding_and_no_more(overlapped, patience: int) -> None:
    seen: list[tuple[int, int]] = []
    session = overlapped("distilled", patience).open(_request(steps=(1, 1, 1)), lambda *s: seen.append(s[:2]))
    later = session.plan.steps_in_chunk(1)
    steps_of_first = session.plan.steps_in_chunk(0)
    for index in range(3):
        assert session.next_chunk().index == index
        done = steps_of_first + index * later
        assert len(seen) == done + (min(patience, later) if index < 2 else 0), f"after chunk {index}"
    assert session.next_chunk() is None


def test_state_between_chunks_knows_nothing_of_what_is_ahead(engines, overlapped, tmp_path) -> None:
    request = _request(steps=1, image=np.full((64, 64, 3), 90, np.uint8), skip_first_chunk=True)
    expected = engines("mid").generate(request)
    session = overlapped("mid", 2).open(request)
    kept = [session.next_chunk()]
    session.state().save(tmp_path / "state.safetensors")
    kept += iter(session.next_chunk, None)
    again = [kept[0], *overlapped("mid", 1).stream(SessionState.load(tmp_path / "state.safetensors"))]
    for chunks in (kept, again):
        assert torch.equal(torch.cat([c.latents for c in chunks], dim=2), expected.latents)
        assert np.array_equal(np.concatenate([c.frames for c in chunks]), expected.frames)


def test_an_error_ahead_is_its_own_chunks(engines, overlapped) -> None:
    request = _request(steps=1, num_frames=99)
    expected = engines("mid").generate(request)
    count = 0

    def fail_once(stage: int, step: int, latents: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == session.plan.steps_in_chunk(0) + 2:
            raise KeyError("from the callback")

    session = overlapped("mid", 1000).open(request, fail_once)
    chunks = [session.next_chunk()]
    with pytest.raises(KeyError, match="from the callback"):
        session.next_chunk()
    chunks += iter(session.next_chunk, None)
    assert torch.equal(torch.cat([c.latents for c in chunks], dim=2), expected.latents)


def test_cancelling_ahead_keeps_the_chunk_that_was_ready(overlapped) -> None:
    count = 0

    def cancel(stage: int, step: int, latents: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == session.plan.steps_in_chunk(0) + 1:
            session.cancel()

    session = overlapped("distilled", 1000).open(_request(steps=(1, 1, 1)), cancel)
    assert session.next_chunk().index == 0
    assert session.next_chunk() is None
    assert count == session.plan.steps_in_chunk(0) + 1
    assert session.ahead is None


def test_a_failed_decoding_moves_nothing(engines, overlapped, monkeypatch) -> None:
    request = _request(steps=1)
    expected = engines("mid").generate(request)
    engine = overlapped("mid", 1)
    session = engine.open(request)
    chunks = [session.next_chunk()]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(engine.maker.lane, "begin", lambda decode: (_ for _ in ()).throw(RuntimeError("broken")))
        session.next_chunk()
    assert session.index == 1
    chunks += iter(session.next_chunk, None)
    assert torch.equal(torch.cat([c.latents for c in chunks], dim=2), expected.latents)


def test_batches_and_interleaved_sessions(engines, overlapped) -> None:
    requests = [_request(steps=1, seed=seed) for seed in (1, 2)]
    expected = [list(chunks) for chunks in zip(*engines("distilled").stream_batch(requests), strict=True)]
    engine = overlapped("distilled", 2)
    found = [list(chunks) for chunks in zip(*engine.stream_batch(requests), strict=True)]
    for videos in zip(expected, found, strict=True):
        for before, after in zip(*videos, strict=True):
            assert torch.equal(before.latents, after.latents)
            assert np.array_equal(before.frames, after.frames)
    alone = [engines("distilled").generate(request) for request in requests]
    first, second = (engine.open(request) for request in requests)
    chunks = [(first.next_chunk(), second.next_chunk()) for _ in range(3)]
    for video, parts in zip(alone, zip(*chunks, strict=True), strict=True):
        assert torch.equal(torch.cat([part.latents for part in parts], dim=2), video.latents)


def test_the_host_enqueues_one_step_ahead_at_most(engines, monkeypatch) -> None:
    """A recorded step is one launch: without a pace a whole chunk would be enqueued before a cancel is heard."""
    engine, log = engines("base"), []

    class Noted(PlainLane):
        def mark(self) -> float:
            log.append("mark")
            return len([entry for entry in log if entry == "mark"])

        def wait_for(self, mark: float) -> None:
            log.append(f"wait for {mark}")

    monkeypatch.setattr(engine.maker, "lane", Noted())
    session = engine.open(_request(num_frames=33, steps=4))
    session.next_chunk()
    # The first mark is the chunk's start, the last three its end and the decoding's.
    waits = [entry for number in (2, 3, 4) for entry in ("mark", f"wait for {number}")]
    assert log == ["mark", "mark", *waits, *["mark"] * 3]


class StandIn:
    """torch.cuda's streams and events; every call is noted with the stream it meant."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.now = "caller"

    def Stream(self, device: torch.device) -> object:
        return types.SimpleNamespace(
            name="own", wait_stream=lambda other: self.calls.append(f"own waits for {other.name}")
        )

    def Event(self, *, enable_timing: bool) -> object:
        assert enable_timing
        return types.SimpleNamespace(
            record=lambda stream: self.calls.append(f"mark on {stream.name}"),
            query=lambda: True,
            synchronize=lambda: self.calls.append("host waits"),
            elapsed_time=lambda end: 250.0,
        )

    @contextlib.contextmanager
    def stream(self, stream):
        self.now = stream.name
        yield
        self.now = "caller"

    def current_stream(self, device: torch.device) -> object:
        return types.SimpleNamespace(name=self.now)


@pytest.mark.parametrize("overlaps", [False, True])
def test_order_of_calls_on_streams(overlaps: bool) -> None:
    api = StandIn()
    lane = CudaLane(CUDA, overlaps=overlaps, api=api)
    frames = types.SimpleNamespace(device=CUDA, record_stream=lambda s: api.calls.append(f"frames known to {s.name}"))

    def decode() -> list[object]:
        api.calls.append(f"decode on {api.now}")
        return [frames, None]

    decoding = lane.begin(decode)
    decoding.wait()
    on_own = [
        "own waits for caller",
        "mark on own",
        "decode on own",
        "mark on own",
        "frames known to caller",
        "host waits",
    ]
    in_line = ["mark on caller", "decode on caller", "mark on caller", "host waits"]
    assert api.calls == (on_own if overlaps else in_line)
    assert lane.seconds(decoding.start, decoding.end) == 0.25


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"device": CPU}, "cpu does one thing at a time"),
        ({"num_ranks": 2}, "several ranks decode together"),
        ({"offload": "model"}, "with offload model decoder and transformer share the memory"),
        ({"vae_dtype": "float16"}, "a float16 decoder waits"),
    ],
)
def test_where_nothing_overlaps_is_said(settings: dict, reason: str | None) -> None:
    usual = {"device": CUDA, "num_ranks": 1, "offload": "none", "vae_dtype": "float32"}
    chosen = {**usual, **settings}
    found = why_not_overlapped(chosen.pop("device"), **chosen)
    assert found is None if reason is None else reason in found


def test_asking_for_overlap_on_the_cpu_is_answered(toy, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        engine = Engine.load(toy / "base", EngineConfig(device="cpu", overlap_decode=True))
    assert not engine.maker.overlaps
    assert "decoded between the others' denoising, not beside it: cpu does one thing at a time" in caplog.text
