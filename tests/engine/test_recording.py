"""Runs that end early and go on: bit-equal with a run that did not, and nothing taken for whole that is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from helios_engine.cli import main
from helios_engine.engine.engine import Engine

SMALL = ["--prompt", "A red fox", "--height", "64", "--width", "64", "--device", "cpu", "--steps", "1,1,1", "--quiet"]


class Stopped(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def stop_at(monkeypatch):
    """Make the run end while it computes the chunk of this index."""
    advance = Engine.advance

    def arrange(index: int | None) -> None:
        def stopping(self, sessions):
            if sessions[0].index == index:
                raise Stopped
            return advance(self, sessions)

        monkeypatch.setattr(Engine, "advance", stopping)

    return arrange


def _generate(toy: Path, output: Path, folder: Path | None, *more: str, frames: int = 99) -> int:
    flags = ["--model", str(toy / "distilled"), "--num-frames", str(frames), "--output", str(output), *SMALL]
    return main(["generate", *flags, *([] if folder is None else ["--checkpoint-dir", str(folder)]), *more])


def _decoded(path: Path) -> list:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


@pytest.mark.parametrize("suffix", [".mp4", ".npy", ".safetensors"])
def test_a_resumed_run_equals_an_uninterrupted_one(toy, tmp_path, stop_at, suffix: str) -> None:
    whole, resumed = tmp_path / f"whole{suffix}", tmp_path / f"resumed{suffix}"
    assert _generate(toy, whole, tmp_path / "a") == 0
    for index in (0, 2):  # before anything is kept, and in the middle
        stop_at(index)
        with pytest.raises(Stopped):
            _generate(toy, resumed, tmp_path / "b", *(["--resume"] if index else []))
        assert not resumed.exists()
    stop_at(None)
    assert _generate(toy, resumed, tmp_path / "b", "--resume") == 0
    assert resumed.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.rglob(".*"))


def test_joined_frames_are_those_of_a_plain_run(toy, tmp_path) -> None:
    av = pytest.importorskip("av")
    assert _generate(toy, tmp_path / "plain.npy", None, frames=80) == 0
    assert _generate(toy, tmp_path / "joined.npy", tmp_path / "a", frames=80) == 0
    plain = np.load(tmp_path / "plain.npy")
    assert np.array_equal(plain, np.load(tmp_path / "joined.npy"))
    assert _generate(toy, tmp_path / "joined.mp4", tmp_path / "b", frames=80) == 0
    with av.open(str(tmp_path / "joined.mp4")) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.dts is not None]
        assert [packet.dts for packet in packets] == sorted({packet.dts for packet in packets})
        keys = sorted(float(packet.pts * stream.time_base) * 24 for packet in packets if packet.is_keyframe)
        assert np.allclose(keys[:1] + [key for key in keys if round(key) in (33, 66)], [0, 33, 66])
    with av.open(str(tmp_path / "joined.mp4")) as container:
        assert container.metadata["comment"].startswith("{")
    frames = _decoded(tmp_path / "joined.mp4")
    times = [float(frame.pts * frame.time_base) * 24 for frame in frames]
    assert np.allclose(times, np.arange(80), atol=1e-3)
    parts = [frame for part in sorted((tmp_path / "b").glob("*.mp4")) for frame in _decoded(part)]
    assert len(parts) == 80
    assert all(np.array_equal(a.to_ndarray(), b.to_ndarray()) for a, b in zip(frames, parts, strict=True))


def test_a_finished_run_only_joins_again(toy, tmp_path, stop_at) -> None:
    assert _generate(toy, tmp_path / "a.npy", tmp_path / "kept", frames=33) == 0
    stop_at(0)
    assert _generate(toy, tmp_path / "b.npy", tmp_path / "kept", "--resume", frames=33) == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_what_does_not_fit_is_refused(toy, tmp_path, capsys) -> None:
    folder = tmp_path / "kept"
    assert _generate(toy, tmp_path / "a.npy", folder, frames=33) == 0
    capsys.readouterr()

    def says(*more: str) -> str:
        assert _generate(toy, tmp_path / "b.npy", folder, *more, frames=33) == 2
        assert not (tmp_path / "b.npy").exists()
        return capsys.readouterr().err

    assert "holds a run already; add --resume" in says()
    assert "was made with seed 42, now it is 7" in says("--resume", "--seed", "7")
    assert "was made with vae_dtype float32, now it is bfloat16" in says("--resume", "--vae-dtype", "bfloat16")
    (folder / "chunk_00000.npy").unlink()
    assert "is damaged: chunk_00000.npy is missing" in says("--resume")
    (folder / "state.safetensors").write_bytes(b"not a state")
    assert "state.safetensors" in says("--resume")
    (folder / "run.json").write_text("[1]")
    assert "is damaged" in says("--resume")
    assert main(["generate", "--model", str(toy / "base"), "--prompt", "x", "--resume"]) == 2
    assert "resume needs checkpoint-dir" in capsys.readouterr().err


def test_leftovers_of_a_killed_run_go(toy, tmp_path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / ".chunk_00003.1234.tmp.npy").write_text("half")
    assert _generate(toy, tmp_path / "a.npy", folder, frames=33) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["chunk_00000.npy", "run.json", "state.safetensors"]
    assert json.loads((folder / "run.json").read_text())["prompt"] == "'A red fox'"
