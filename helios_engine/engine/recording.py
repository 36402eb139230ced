"""A video kept chunk by chunk in a folder, so that a run that ends early goes on where it stood.

    run.json            what was asked for; a resumed run must ask for the same
    chunk_00000.mp4     one file per chunk (or .npy, .safetensors), a closed group of pictures
    state.safetensors   the session after the last whole chunk

The state is written last and says how many chunks count. Every file appears whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from helios_engine.engine.state import SessionState
from helios_engine.output import concatenate, open_writer
from helios_engine.request import VideoChunk

_STATE, _RUN = "state.safetensors", "run.json"


class Recording:
    """A checkpoint folder. Nothing is written before begin."""

    def __init__(self, folder: str | Path, facts: Mapping[str, str], *, output: str | Path, resume: bool) -> None:
        """facts says what is asked for. Raises ValueError when the folder holds another run, or one and not resume."""
        self._suffix = Path(output).suffix
        self.folder, self._facts = Path(folder), {**facts, "output": self._suffix}
        self._check_folder()
        if Path(output).resolve().parent == self.folder.resolve():
            raise ValueError(
                f"output {output} lies in checkpoint-dir {folder}, whose files are the run's own; move one"
            )
        self.state_bytes: bytes | None = None
        run = self.folder / _RUN
        if not run.exists():
            return
        if not resume:
            raise ValueError(
                f"checkpoint-dir {folder} holds a run already; add --resume to go on, or name another folder"
            )
        self._check_same(run)
        if (self.folder / _STATE).exists():
            self.state_bytes = (self.folder / _STATE).read_bytes()
            state = SessionState.load(self.folder / _STATE)
            if missing := [part for part in self.parts(state.index) if not part.exists()]:
                raise ValueError(f"checkpoint-dir {folder} is damaged: {missing[0].name} is missing")

    def begin(self) -> None:
        """Make the folder, note what it is for, and remove what a killed run left half-written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in (".chunk_*.tmp*", f".{_STATE}.*.tmp", f".{_RUN}.*.tmp"):
            for leftover in self.folder.glob(pattern):
                leftover.unlink()
        temporary = self.folder / f".{_RUN}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(self._facts, indent=2))
        os.replace(temporary, self.folder / _RUN)

    def _check_folder(self) -> None:
        folder = next(parent for parent in (self.folder, *self.folder.absolute().parents) if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(
                f"checkpoint-dir {self.folder} cannot be written: {folder} is no folder this user may write to"
            )

    def _check_same(self, run: Path) -> None:
        try:
            kept = json.loads(run.read_text())
            names = sorted(kept.keys() | self._facts.keys())
        except (ValueError, AttributeError):
            raise ValueError(f"{run} is damaged; name another checkpoint-dir") from None
        for name in names:
            before, now = kept.get(name, "nothing"), self._facts.get(name, "nothing")
            if before != now:
                raise ValueError(
                    f"checkpoint-dir {self.folder} was made with {name} {before}, now it is {now}; a resumed run needs "
                    "the same arguments"
                )

    def parts(self, count: int) -> list[Path]:
        """The files of the first count chunks."""
        return [self.folder / f"chunk_{index:05d}{self._suffix}" for index in range(count)]


class RecordingWriter:
    """A writer (see output.py) that keeps every chunk and the state after it in a recording, and joins them at the end."""

    def __init__(
        self,
        recording: Recording,
        path: str | Path,
        *,
        state: Callable[[], SessionState],
        fps: int,
        metadata: Mapping[str, object],
        encoder: str,
    ) -> None:
        self._recording, self._path, self._state = recording, path, state
        self._fps, self._metadata, self._encoder = fps, metadata, encoder
        self._num_chunks = state().index
        recording.begin()

    def write(self, chunk: VideoChunk) -> None:
        """Keep the chunk, then the state that counts it."""
        part = self._recording.parts(chunk.index + 1)[-1]
        with open_writer(part, fps=self._fps, encoder=self._encoder, repeatable=True) as writer:
            writer.write(chunk)
        self._state().save(self._recording.folder / _STATE)
        self._num_chunks = chunk.index + 1

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is None:
            if not self._num_chunks:
                raise ValueError(f"{self._path}: no frames were made, nothing to write")
            concatenate(self._recording.parts(self._num_chunks), self._path, metadata=self._metadata)
