"""The command line as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from safetensors import safe_open

from helios_engine.cli import main
from helios_engine.engine.session import VideoSession
from tests.helpers import oracle

av = pytest.importorskip("av")

FAST = ["--prompt", "A red fox", "--height", "64", "--width", "64", "--device", "cpu"]


def _frames(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_generate_writes_a_video(toy, tmp_path, capsys, variant: str) -> None:
    steps = "2" if variant == "base" else "1,1,1"
    path = tmp_path / "clip.mp4"
    code = main(
        [
            "generate",
            "--model",
            str(toy / variant),
            "--num-frames",
            "40",
            "--steps",
            steps,
            "--output",
            str(path),
            *FAST,
        ]
    )
    captured = capsys.readouterr()
    assert code == 0
    assert captured.out == f"{path}\n"
    assert "chunk 2/2" in captured.err
    assert "frames/s" in captured.err
    frames = _frames(path)
    assert frames.shape == (40, 64, 64, 3)
    assert frames.std() > 5


def test_same_numbers_as_python(toy, tmp_path, engines) -> None:
    from helios_engine import VideoRequest

    common = ["--model", str(toy / "distilled"), "--num-frames", "33", "--seed", "3", "--quiet", *FAST]
    for suffix in (".npy", ".safetensors"):
        assert main(["generate", *common, "--output", str(tmp_path / f"out{suffix}")]) == 0
    request = VideoRequest(prompt="A red fox", num_frames=33, seed=3, height=64, width=64)
    video = engines("distilled").generate(request)
    assert np.array_equal(np.load(tmp_path / "out.npy"), video.frames)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.get_tensor("latents").equal(video.latents)
        facts = json.loads(file.metadata()["comment"])
    assert (facts["seed"], facts["variant"], facts["prompt"]) == (3, "distilled", "A red fox")


def test_image_and_video_inputs_change_the_result(toy, tmp_path) -> None:
    common = ["generate", "--model", str(toy / "distilled"), "--num-frames", "33", "--quiet", *FAST]
    oracle.random_image(0, 80, 120).save(tmp_path / "image.png")
    assert main([*common, "--output", str(tmp_path / "plain.mp4")]) == 0
    assert main([*common, "--output", str(tmp_path / "image.npy"), "--image", str(tmp_path / "image.png")]) == 0
    assert main([*common, "--output", str(tmp_path / "video.npy"), "--video", str(tmp_path / "plain.mp4")]) == 0
    plain, image, video = _frames(tmp_path / "plain.mp4"), *(np.load(tmp_path / f"{n}.npy") for n in ("image", "video"))
    assert np.abs(plain.astype(int) - image).mean() > 1
    assert np.abs(video.astype(int) - image).mean() > 1


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("base", ["base", "steps 50, guidance 5, unipc", "100 in the first chunk, 100 in each", "8640 noisy + 2400"]),
        ("mid", ["guidance 5 (CFG-Zero*)", "116 in the first chunk, 116 in each", "540 noisy + 2400", "2160 noisy"]),
        ("distilled", ["guidance 1, dmd", "12 in the first chunk, 6 in each", "8640 noisy + 2400 history"]),
    ],
)
def test_dry_run_tells_and_computes_nothing(toy, tmp_path, capsys, variant: str, expected: list[str]) -> None:
    path = tmp_path / "out.mp4"
    with mock.patch("helios_engine.engine.engine.Engine.load", side_effect=AssertionError("loaded")):
        code = main(["generate", "--model", str(toy / variant), "--prompt", "x", "--dry-run", "--output", str(path)])
    printed = capsys.readouterr().out
    assert code == 0
    for text in [*expected, "132 frames (4 chunks of 33), 384x640", "memory      about"]:
        assert text in printed
    assert not path.exists()


def test_dry_run_refuses_what_a_run_would(toy, capsys) -> None:
    flags = ["--prompt", "x", "--image", "nowhere.png", "--dry-run"]
    assert main(["generate", "--model", str(toy / "base"), *flags]) == 2
    assert "nowhere.png does not exist" in capsys.readouterr().err


def test_stopping_an_endless_video_keeps_it(toy, tmp_path, monkeypatch) -> None:
    original = VideoSession.next_chunk

    def interrupted(session: VideoSession):
        if session.index == 2:
            raise KeyboardInterrupt
        return original(session)

    monkeypatch.setattr(VideoSession, "next_chunk", interrupted)
    common = ["generate", "--model", str(toy / "distilled"), "--quiet", *FAST]
    assert main([*common, "--num-frames", "endless", "--output", str(tmp_path / "out.mp4")]) == 0
    assert len(_frames(tmp_path / "out.mp4")) == 66
    assert main([*common, "--num-frames", "132", "--output", str(tmp_path / "cut.mp4")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_inspect(toy, capsys) -> None:
    assert main(["inspect", str(toy / "mid")]) == 0
    printed = capsys.readouterr().out
    for text in ("variant        mid", "20,20,20", "129 tensors in 1 file", "text encoder   yes", "build info"):
        assert text in printed


def test_inspect_lists_every_problem(toy, tmp_path, capsys) -> None:
    import shutil

    shutil.copytree(toy / "mid", tmp_path / "broken")
    values = json.loads((tmp_path / "broken" / "transformer" / "config.json").read_text())
    (tmp_path / "broken" / "transformer" / "config.json").write_text(json.dumps({**values, "num_layers": 5}))
    (tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"junk")
    assert main(["inspect", str(tmp_path / "broken")]) == 2
    captured = capsys.readouterr()
    assert "missing blocks.4." in captured.err
    assert "vae/diffusion_pytorch_model.safetensors is truncated" in captured.err


def test_bench_prints_json(toy, capsys) -> None:
    flags = ["--height", "64", "--width", "64", "--num-frames", "66", "--repeats", "1", "--device", "cpu"]
    assert main(["bench", "--model", str(toy / "distilled"), *flags]) == 0
    values = json.loads(capsys.readouterr().out)
    assert list(values["forward_ms"]) == ["9+40", "36+40", "144+40"]
    assert values["frames_per_second"] > 0
    assert main(["bench", "--model", str(toy / "distilled"), "--num-frames", "33"]) == 2
    assert main(["bench", "--model", str(toy / "distilled"), "--repeats", "0"]) == 2


@pytest.mark.parametrize("command", ["generate", "convert", "inspect", "toy", "bench"])
def test_help(command: str, capsys) -> None:
    assert main([command, "--help"]) == 0
    assert "usage: helios-engine" in capsys.readouterr().out


def test_every_flag_comes_from_a_field(capsys) -> None:
    import dataclasses

    from helios_engine import EngineConfig, VideoRequest

    main(["generate", "--help"])
    printed = capsys.readouterr().out
    for cls in (EngineConfig, VideoRequest):
        for field in dataclasses.fields(cls):
            if "help" in field.metadata:
                assert f"--{field.name.replace('_', '-')}" in printed


def test_as_a_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "helios_engine.cli", "inspect", "nowhere"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert (
        result.stderr == "helios-engine: error: model nowhere is no folder here and no hub id of the form owner/name\n"
    )


def test_a_polite_kill_leaves_nothing_behind(toy, tmp_path) -> None:
    import signal
    import time

    flags = ["--num-frames", "33000", "--quiet", "--output", str(tmp_path / "out.mp4"), *FAST]
    command = [sys.executable, "-m", "helios_engine.cli", "generate", "--model", str(toy / "distilled"), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(tmp_path.iterdir()), "the temporary file is there while the video is made"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "helios-engine: error: stopped\n"
    assert list(tmp_path.iterdir()) == []
