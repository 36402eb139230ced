"""Finished chunks to files. A file appears whole under its name or not at all."""

from __future__ import annotations

import abc
import json
import os
import queue
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from helios_engine.model.weights import open_safetensors, save_safetensors
from helios_engine.optional import require
from helios_engine.request import ChunkTiming, VideoChunk, VideoRequest
from helios_engine.trace import span

SUFFIXES = (".mp4", ".npy", ".safetensors")
DEFAULT_ENCODER = "libx264"
_NPY_HEADER_BYTES = 128
_FAREWELL = 10.0  # seconds; a chunk is encoded in less
_LONGEST_NAME = 200  # file systems allow 255 bytes, and the temporary name is a little longer


class Writer(Protocol):
    """Takes chunks in order. Leaving the with block renames the file into place; an exception removes it."""

    def write(self, chunk: VideoChunk) -> None: ...
    def __enter__(self) -> Writer: ...
    def __exit__(self, error_type: type | None, *rest: object) -> None: ...


def check_output(path: str | Path, encoder: str = DEFAULT_ENCODER, *, height: int = 384, width: int = 640) -> None:
    """Raise ValueError if a video of this size could not be written there; called before any work starts."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"output {path} must end in {', '.join(SUFFIXES)} (video, frames, latents)")
    if path.is_dir():
        raise ValueError(f"output {path} is a folder; name a file")
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise ValueError(f"output name {path.name[:20]}... is longer than {_LONGEST_NAME} bytes")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"output {path} cannot be written: {folder} is no folder this user may write to")
    if path.suffix == ".mp4":
        _check_encoder(encoder, height, width)
    elif encoder != DEFAULT_ENCODER:
        raise ValueError(f"encoder {encoder} has no effect on {path.suffix} files; leave it out")


def _check_encoder(name: str, height: int, width: int) -> None:
    """Open the encoder for real: hardware ones are listed on machines that cannot run them."""
    av = require("av", "writing .mp4 (a .npy file does without)")
    try:
        codec = av.codec.Codec(name, "w")
    except av.codec.codec.UnknownCodecError:
        raise ValueError(f"encoder {name} is unknown to this FFmpeg; libx264 always works") from None
    formats = [pixel_format.name for pixel_format in codec.video_formats or ()]
    if codec.type != "video" or "yuv420p" not in formats:
        raise ValueError(f"encoder {name} does not make yuv420p video; libx264 always works")
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.time_base = Fraction(1, 24)
    try:
        context.open()
    except av.FFmpegError as error:
        raise ValueError(f"encoder {name} cannot run here: {error}; libx264 always works") from None


def open_writer(
    path: str | Path,
    *,
    fps: int,
    metadata: Mapping[str, object] | None = None,
    encoder: str = DEFAULT_ENCODER,
    repeatable: bool = False,
) -> Writer:
    """A writer by suffix: .mp4 (H.264), .npy (frames), .safetensors (float32 latents, held until the end).

    repeatable does without libx264's mbtree, with which small pictures now and then come out as other bytes.
    """
    path = Path(path)
    check_output(path, encoder if path.suffix == ".mp4" else DEFAULT_ENCODER)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(metadata or {}), ensure_ascii=False)
    if path.suffix == ".mp4":
        return Mp4Writer(path, fps=fps, metadata=text, encoder=encoder, repeatable=repeatable)
    if path.suffix == ".npy":
        return NpyWriter(path)
    return LatentsWriter(path, metadata=text)


def temporary_name(path: Path, process: int | None = None) -> Path:
    """Where a file lies until it is whole. The process number keeps two runs apart; the suffix stays last for writers
    that look at it."""
    return path.with_name(f".{path.stem}.{os.getpid() if process is None else process}.tmp{path.suffix}")


class _FileWriter(abc.ABC):
    """Temporary name, rename, removal: shared by all writers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = temporary_name(path)

    def write(self, chunk: VideoChunk) -> None:
        """Take in the next chunk."""
        with span("output"):
            self._append(chunk)

    def __enter__(self) -> _FileWriter:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        try:
            if error_type is None:
                self._finish()
                os.replace(self.temporary, self.path)
            else:
                self._abandon()
        finally:
            self.temporary.unlink(missing_ok=True)

    @abc.abstractmethod
    def _append(self, chunk: VideoChunk) -> None:
        """Put a chunk at the end of the temporary file."""

    @abc.abstractmethod
    def _finish(self) -> None:
        """Complete the temporary file."""

    @abc.abstractmethod
    def _abandon(self) -> None:
        """Let go of the temporary file; it is removed afterwards."""


def frames_uint8(chunk: VideoChunk) -> np.ndarray:
    """A chunk's frames (F, H, W, 3) as uint8 on the host, whatever kind was asked for."""
    frames = chunk.frames.cpu().numpy() if isinstance(chunk.frames, Tensor) else chunk.frames
    return frames if frames.dtype == np.uint8 else np.rint(frames * 255.0).astype(np.uint8)


class Mp4Writer(_FileWriter):
    """H.264 in yuv420p, index at the front so that players start before the download ends."""

    def __init__(self, path: Path, *, fps: int, metadata: str, encoder: str, repeatable: bool = False) -> None:
        super().__init__(path)
        self._repeatable = repeatable
        self._fps, self._metadata, self._encoder = fps, metadata, encoder
        self._container = None
        self._stream = None

    def _append(self, chunk: VideoChunk) -> None:
        av = require("av", "writing .mp4")
        frames = frames_uint8(chunk)
        if self._container is None:
            self._open(height=frames.shape[1], width=frames.shape[2])
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self._container.mux(self._stream.encode(picture))

    def _open(self, *, height: int, width: int) -> None:
        av = require("av", "writing .mp4")
        self._container = av.open(str(self.temporary), "w", format="mp4", options={"movflags": "faststart"})
        self._container.metadata["comment"] = self._metadata
        self._stream = self._container.add_stream(self._encoder, rate=self._fps)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        if self._encoder == DEFAULT_ENCODER:
            self._stream.options = {"crf": "18"} | ({"x264-params": "mbtree=0"} if self._repeatable else {})

    def _finish(self) -> None:
        if self._container is None:
            raise ValueError(f"{self.path}: no frames were made, nothing to write")
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def _abandon(self) -> None:
        if self._container is not None:
            self._container.close()


class NpyWriter(_FileWriter):
    """Frames (F, H, W, 3) appended as they come; the header gets its length at the end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = self.temporary.open("wb")
        self._file.write(b"\0" * _NPY_HEADER_BYTES)
        self._num_frames = 0
        self._frame_shape: tuple[int, ...] = ()
        self._dtype = np.dtype(np.uint8)

    def _append(self, chunk: VideoChunk) -> None:
        frames = chunk.frames.cpu().numpy() if isinstance(chunk.frames, Tensor) else chunk.frames
        self._file.write(np.ascontiguousarray(frames).tobytes())
        self._num_frames += len(frames)
        self._frame_shape, self._dtype = frames.shape[1:], frames.dtype

    def _finish(self) -> None:
        if not self._num_frames:
            self._file.close()
            raise ValueError(f"{self.path}: no frames were made, nothing to write")
        shape = (self._num_frames, *self._frame_shape)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        prefix = np.lib.format.magic(1, 0)
        body = repr(header).encode("latin1")
        space = _NPY_HEADER_BYTES - len(prefix) - 2
        assert len(body) < space, (len(body), space)
        self._file.seek(0)
        self._file.write(prefix + space.to_bytes(2, "little") + body.ljust(space - 1) + b"\n")
        self._file.close()

    def _abandon(self) -> None:
        self._file.close()


class LatentsWriter(_FileWriter):
    """All chunks' latents as one float32 tensor "latents" (1, 16, 9 * chunks, h, w); 2 MB per chunk at 384x640."""

    def __init__(self, path: Path, *, metadata: str) -> None:
        super().__init__(path)
        self._metadata = metadata
        self._parts: list[Tensor] = []

    def _append(self, chunk: VideoChunk) -> None:
        self._parts.append(chunk.latents.float().cpu())

    def _finish(self) -> None:
        if not self._parts:
            raise ValueError(f"{self.path}: no latents were made, nothing to write")
        save_safetensors(self.temporary, {"latents": torch.cat(self._parts, dim=2)}, {"comment": self._metadata})

    def _abandon(self) -> None:
        self._parts.clear()


class BackgroundWriter:
    """Another writer's work on a thread of its own, so that the next chunk is made meanwhile.

    At most two chunks wait: write blocks while there are as many. What goes wrong on the thread is raised by the next write
    or on leaving; the file then is removed as ever.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._waiting: queue.Queue[VideoChunk | None] = queue.Queue(maxsize=2)
        self._error: Exception | None = None
        self._is_over = False  # what still waits is not written any more
        self._thread = threading.Thread(target=self._run, name="helios-writer", daemon=True)

    def write(self, chunk: VideoChunk) -> None:
        """Hand over the next chunk."""
        if self._error is not None:
            raise self._error
        self._waiting.put(chunk)

    def __enter__(self) -> BackgroundWriter:
        self._writer.__enter__()
        self._thread.start()
        return self

    def __exit__(self, error_type: type | None, *rest: object) -> None:
        try:
            self._is_over = error_type is not None
            self._waiting.put(None)
            self._thread.join()
        except BaseException as error:  # stopped by hand while the last chunks were written
            self._is_over = True
            try:
                self._thread.join(timeout=_FAREWELL)
            finally:
                self._writer.__exit__(type(error), error, error.__traceback__)
            raise
        if error_type is None and self._error is not None:
            self._writer.__exit__(type(self._error), self._error, self._error.__traceback__)
            raise self._error
        self._writer.__exit__(error_type, *rest)

    def _run(self) -> None:
        while (chunk := self._waiting.get()) is not None:
            if self._is_over or self._error is not None:
                continue
            try:
                self._writer.write(chunk)
            except Exception as error:
                self._error = error


def concatenate(parts: Sequence[Path], path: str | Path, *, metadata: Mapping[str, object] | None = None) -> None:
    """Join files of one kind, written one after the other by open_writer, into one; nothing is encoded again."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    join = {".mp4": _join_mp4, ".npy": _join_npy, ".safetensors": _join_latents}[path.suffix]
    try:
        join(parts, temporary, json.dumps(dict(metadata or {}), ensure_ascii=False))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _join_mp4(parts: Sequence[Path], target: Path, metadata: str) -> None:
    """Copy packets. Each part was an encoder's whole run, so it starts with a key frame and refers to no other part."""
    av = require("av", "writing .mp4")
    with av.open(str(target), "w", format="mp4", options={"movflags": "faststart"}) as output:
        output.metadata["comment"] = metadata
        stream, start = None, 0
        for part in parts:
            with av.open(str(part)) as source:
                template = source.streams.video[0]
                if stream is None:
                    stream = output.add_stream_from_template(template)
                end = start
                for packet in source.demux(template):
                    if packet.dts is None:  # the empty packet that ends a stream
                        continue
                    end = max(end, start + packet.pts + packet.duration)
                    packet.pts, packet.dts = packet.pts + start, packet.dts + start
                    packet.stream = stream
                    output.mux(packet)
                start = end


def _join_npy(parts: Sequence[Path], target: Path, metadata: str) -> None:
    lengths = [len(np.load(part, mmap_mode="r")) for part in parts]
    first = np.load(parts[0], mmap_mode="r")
    shape = (sum(lengths), *first.shape[1:])
    whole = np.lib.format.open_memmap(target, mode="w+", dtype=first.dtype, shape=shape)
    start = 0
    for part, length in zip(parts, lengths, strict=True):  # one open at a time: there may be thousands
        whole[start : start + length] = np.load(part, mmap_mode="r")
        start += length
    whole.flush()


def _join_latents(parts: Sequence[Path], target: Path, metadata: str) -> None:
    latents = []
    for part in parts:
        with open_safetensors(part) as file:
            latents.append(file.get_tensor("latents"))
    save_safetensors(target, {"latents": torch.cat(latents, dim=2)}, {"comment": metadata})


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """A whole video: frames (F, H, W, 3), None on ranks other than 0, and latents (1, 16, 9 * chunks, h, w) float32."""

    frames: np.ndarray | Tensor | None
    latents: Tensor
    fps: int
    metadata: dict[str, object]

    def save(self, path: str | Path, encoder: str = DEFAULT_ENCODER) -> None:
        """Write .mp4, .npy or .safetensors, by suffix."""
        with open_writer(path, fps=self.fps, metadata=self.metadata, encoder=encoder) as writer:
            writer.write(VideoChunk(0, self.frames, self.latents, ChunkTiming(0.0, 0.0)))


def collect(chunks: Iterable[VideoChunk], request: VideoRequest, facts: Mapping[str, object]) -> Video:
    """All chunks of a stream as one Video."""
    parts = list(chunks)
    frames = [chunk.frames for chunk in parts]
    joined = None
    if frames[0] is not None:
        joined = torch.cat(frames) if isinstance(frames[0], Tensor) else np.concatenate(frames)
    latents = torch.cat([chunk.latents for chunk in parts], dim=2)
    return Video(joined, latents, request.fps, video_metadata(request, facts))


def video_metadata(request: VideoRequest, facts: Mapping[str, object]) -> dict[str, object]:
    """What a file says of itself: the request's plain settings and the run's facts."""
    settings = {name: value for name, value in request.settings().items() if value is not None and name != "frames"}
    for name in ("image", "video"):
        source = getattr(request, name)
        if isinstance(source, str | Path):
            settings[name] = str(source)
    return {**settings, **facts}
