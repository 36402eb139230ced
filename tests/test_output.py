"""Files: what is in them, and that they appear whole or not at all."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from helios_engine import VideoRequest
from helios_engine.output import BackgroundWriter, Video, frames_uint8, open_writer, video_metadata
from helios_engine.request import ChunkTiming, VideoChunk

av = pytest.importorskip("av")

SUFFIXES = [".mp4", ".npy", ".safetensors"]


def _chunk(index: int, kind: str = "uint8", frames: int = 33) -> VideoChunk:
    """A smooth picture that brightens over time, so that compression keeps its values."""
    ramp = np.linspace(0, 100, 64)[None, None, :, None] + np.arange(frames)[:, None, None, None] + 33 * index
    pixels = np.broadcast_to(ramp, (frames, 48, 64, 3)).round().astype(np.uint8)
    latents = torch.full((1, 16, 9, 6, 8), float(index))
    held = {"uint8": pixels, "float32": pixels.astype(np.float32) / 255, "device": torch.from_numpy(pixels.copy())}
    return VideoChunk(index, held[kind], latents, ChunkTiming(0.0, 0.0))


@pytest.mark.parametrize("kind", ["uint8", "float32", "device"])
def test_mp4(tmp_path, kind: str) -> None:
    path = tmp_path / "video.mp4"
    with open_writer(path, fps=12, metadata={"prompt": "Füchse", "seed": 3}) as writer:
        for index in range(2):
            writer.write(_chunk(index, kind))
        assert not path.exists()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 12
        assert json.loads(container.metadata["comment"]) == {"prompt": "Füchse", "seed": 3}
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    expected = np.concatenate([_chunk(index).frames for index in range(2)])
    assert frames.shape == expected.shape
    assert np.abs(frames.astype(int) - expected).mean() < 2.5
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index must come first"


@pytest.mark.parametrize("kind", ["uint8", "float32", "device"])
def test_npy(tmp_path, kind: str) -> None:
    path = tmp_path / "frames.npy"
    with open_writer(path, fps=24) as writer:
        for index in range(3):
            writer.write(_chunk(index, kind, frames=33 if index < 2 else 5))
    frames = np.load(path)
    assert frames.dtype == (np.float32 if kind == "float32" else np.uint8)
    expected = np.concatenate([_chunk(index, "uint8", frames=33 if index < 2 else 5).frames for index in range(3)])
    assert frames.shape == (71, 48, 64, 3)
    assert np.array_equal(np.rint(frames * 255) if kind == "float32" else frames, expected)


def test_safetensors(tmp_path) -> None:
    path = tmp_path / "latents.safetensors"
    with open_writer(path, fps=24, metadata={"seed": 7}) as writer:
        for index in range(3):
            writer.write(_chunk(index))
    with safe_open(path, "pt") as file:
        latents = file.get_tensor("latents")
        assert json.loads(file.metadata()["comment"]) == {"seed": 7}
    assert latents.shape == (1, 16, 27, 6, 8)
    assert latents.dtype == torch.float32
    assert [latents[0, 0, 9 * index, 0, 0].item() for index in range(3)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_new_files_have_ordinary_permissions(tmp_path, suffix: str) -> None:
    with open_writer(tmp_path / f"out{suffix}", fps=24) as writer:
        writer.write(_chunk(0))
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / f"out{suffix}").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_an_exception_leaves_nothing(tmp_path, suffix: str, chunks: int) -> None:
    path = tmp_path / f"out{suffix}"
    with pytest.raises(RuntimeError, match="midway"), open_writer(path, fps=24) as writer:
        for index in range(chunks):
            writer.write(_chunk(index))
        raise RuntimeError("midway")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_exception_keeps_the_older_file(tmp_path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    path.write_text("older")
    with pytest.raises(RuntimeError, match="midway"), open_writer(path, fps=24) as writer:
        writer.write(_chunk(0))
        raise RuntimeError("midway")
    assert path.read_text() == "older"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_written_is_an_error(tmp_path, suffix: str) -> None:
    with pytest.raises(ValueError, match="nothing to write"), open_writer(tmp_path / f"out{suffix}", fps=24):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made(tmp_path) -> None:
    path = tmp_path / "a" / "b" / "out.npy"
    with open_writer(path, fps=24) as writer:
        writer.write(_chunk(0))
    assert np.load(path).shape == (33, 48, 64, 3)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_video_saves_itself(tmp_path, suffix: str) -> None:
    chunk = _chunk(0)
    video = Video(chunk.frames, chunk.latents, 24, {"seed": 1})
    video.save(tmp_path / f"out{suffix}")
    assert (tmp_path / f"out{suffix}").stat().st_size > 500


def test_float_frames_are_rounded_to_nearest() -> None:
    chunk = VideoChunk(0, np.array([0.0, 0.4999 / 255, 0.5001 / 255, 1.0], np.float32), None, ChunkTiming(0, 0))
    assert frames_uint8(chunk).tolist() == [0, 0, 1, 255]


def test_metadata_holds_settings_and_no_tensors() -> None:
    request = VideoRequest(prompt_embeds=torch.zeros(1, 2, 4), seed=9, steps=(1, 2, 3))
    values = video_metadata(request, {"variant": "mid"})
    assert values["seed"] == 9
    assert values["steps"] == (1, 2, 3)
    assert values["variant"] == "mid"
    assert "prompt_embeds" not in values
    clip = VideoRequest(prompt="x", video=tuple(np.zeros((33, 8, 8, 3), np.uint8)))
    assert "video" not in video_metadata(clip, {})
    assert video_metadata(VideoRequest(prompt="x", image=Path("a.png")), {})["image"] == "a.png"
    json.dumps(values)


class _SlowWriter:
    """Notes what it is told; waits for leave to write, and fails at one chunk if asked to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.leave = threading.Event()
        self.fails_at, self.written, self.left_with = fails_at, [], "never"

    def write(self, chunk: VideoChunk) -> None:
        assert self.leave.wait(10)
        if chunk.index == self.fails_at:
            raise OSError("the disk is full")
        self.written.append(chunk.index)

    def __enter__(self) -> _SlowWriter:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        self.left_with = error_type


def test_chunks_are_written_in_order_behind_the_callers_back() -> None:
    slow = _SlowWriter()
    with BackgroundWriter(slow) as writer:
        for index in range(3):  # one is being written, two wait
            writer.write(_chunk(index))
        assert slow.written == []
        slow.leave.set()
        for index in range(3, 6):
            writer.write(_chunk(index))
    assert slow.written == list(range(6))
    assert slow.left_with is None
    assert not any(thread.name == "helios-writer" for thread in threading.enumerate())


def test_no_more_than_two_chunks_wait() -> None:
    slow, handed_over = _SlowWriter(), []
    with BackgroundWriter(slow) as writer:

        def hand_over() -> None:
            for index in range(5):
                writer.write(_chunk(index))
                handed_over.append(index)

        caller = threading.Thread(target=hand_over)
        caller.start()
        caller.join(timeout=0.5)
        assert caller.is_alive()
        assert len(handed_over) == 3
        slow.leave.set()
        caller.join(timeout=10)
    assert slow.written == list(range(5))


@pytest.mark.parametrize("at_the_end", [False, True])
def test_what_fails_on_the_writers_thread_is_raised(at_the_end: bool) -> None:
    slow = _SlowWriter(fails_at=1)
    slow.leave.set()
    with pytest.raises(OSError, match="the disk is full"), BackgroundWriter(slow) as writer:
        for index in range(2 if at_the_end else 50):
            writer.write(_chunk(index))
    assert slow.written == [0]
    assert slow.left_with is OSError


def test_an_error_of_the_caller_drops_what_waits() -> None:
    slow = _SlowWriter()
    threading.Timer(0.2, slow.leave.set).start()
    with pytest.raises(RuntimeError, match="midway"), BackgroundWriter(slow) as writer:
        for index in range(3):
            writer.write(_chunk(index))
        raise RuntimeError("midway")
    assert slow.written in ([], [0]), "only what was under way"
    assert slow.left_with is RuntimeError


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_written_behind_the_callers_back_are_the_same(tmp_path, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in ("plain", "background")]
    for path, wrap in zip(paths, (lambda writer: writer, BackgroundWriter), strict=True):
        with wrap(open_writer(path, fps=24, repeatable=True)) as writer:
            for index in range(4):
                writer.write(_chunk(index))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with pytest.raises(RuntimeError), BackgroundWriter(open_writer(tmp_path / f"gone{suffix}", fps=24)) as writer:
        writer.write(_chunk(0))
        raise RuntimeError
    assert not list(tmp_path.glob("*gone*"))
    assert not list(tmp_path.glob(".*gone*"))
