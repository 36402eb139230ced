"""Packages that may be missing: every command works without them or says in one line what to install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Hidden one by one and all together.
OPTIONAL = (
    "nvtx",
    "av",
    "ftfy",
    "tqdm",
    "xfuser",
    "diffusers",
    "accelerate",
    "flash_attn",
    "fa3_fwd_interface",
    "flash_attn_interface",
)
SMALL = ["--height", "64", "--width", "64", "--num-frames", "33", "--steps", "1", "--device", "cpu"]
EFFECT = {
    "nvtx": "no NVTX ranges: No module named 'nvtx'; pip install nvtx",
    "ftfy": "characters broken by a wrong encoding stay as they are: No module named 'ftfy'; pip install ftfy",
    "tqdm": "no progress bar: No module named 'tqdm'; pip install tqdm",
}


def run(hidden: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.helpers.without", ",".join(hidden), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def generate(hidden: tuple[str, ...], toy: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    model = ["--model", str(toy / "distilled"), "--prompt", "a fox", "--output", str(output)]
    return run(hidden, "generate", *model, *SMALL, *more)


def assert_refused(result: subprocess.CompletedProcess[str], *texts: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    for text in texts:
        assert text in result.stderr


@pytest.fixture(scope="module")
def expected(toy, tmp_path_factory) -> np.ndarray:
    path = tmp_path_factory.mktemp("expected") / "all.npy"
    assert generate(("nothing",), toy, path).returncode == 0
    return np.load(path)


def _hidden() -> list:
    """All together, and nvtx, which every command asks for; the others one by one in the long run of tests."""
    alone = [pytest.param((name,), marks=[] if name == "nvtx" else pytest.mark.full) for name in OPTIONAL]
    return [*alone, OPTIONAL]


@pytest.mark.parametrize("hidden", _hidden(), ids="+".join)
def test_a_video_comes_without_them(toy, tmp_path, expected, hidden: tuple[str, ...]) -> None:
    result = generate(hidden, toy, tmp_path / "out.npy", "--verbose")
    assert result.returncode == 0, result.stderr
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected)
    for name, said in EFFECT.items():
        assert (said in result.stderr) == (name in hidden), result.stderr


def test_what_cannot_be_done_without_them_is_said_before_any_work(toy, tmp_path) -> None:
    assert_refused(generate(OPTIONAL, toy, tmp_path / "out.mp4"), "writing .mp4", "needs av", "pip install av", ".npy")
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"")
    refused = generate(OPTIONAL, toy, tmp_path / "out.npy", "--video", str(clip))
    assert_refused(refused, "reading videos needs av", "pip install av")
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    refused = generate(("PIL",), toy, tmp_path / "out.npy", "--image", str(tmp_path / "one.png"))
    assert_refused(refused, "pictures needs pillow", "pip install pillow")
    refused = generate(("transformers",), toy, tmp_path / "out.npy")
    assert_refused(refused, "encoding prompts needs transformers", "pip install transformers")
    assert not list(tmp_path.glob("out*"))


def test_an_exchange_that_is_not_installed_is_refused_on_all_ranks(toy, tmp_path) -> None:
    """Ranks are processes of their own, so the package is hidden by a folder in front of the path."""
    (tmp_path / "xfuser").mkdir()
    (tmp_path / "xfuser" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'xfuser'\")\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "helios_engine.cli",
        "generate",
        "--model",
        str(toy / "distilled"),
        "--prompt",
        "x",
    ]
    command += ["--output", str(tmp_path / "out.npy"), *SMALL, "--num-gpus", "2", "--exchange", "xfuser", "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode != 0
    assert "exchange xfuser cannot run: the package does not import" in result.stderr
    assert "pip install --no-deps xfuser" in result.stderr
    assert not (tmp_path / "out.npy").exists()


def test_the_other_commands_work_without_them(toy, tmp_path) -> None:
    model = str(toy / "distilled")
    assert "distilled" in run(OPTIONAL, "inspect", model).stdout
    assert "operators" in run(OPTIONAL, "inspect", "--ops").stdout
    assert run(OPTIONAL, "convert", model, str(tmp_path / "converted")).returncode == 0
    assert run(OPTIONAL, "toy", str(tmp_path / "toy")).returncode == 0
    benched = run(
        OPTIONAL, "bench", "--model", model, *SMALL[:4], "--num-frames", "66", "--steps", "1", "--repeats", "1"
    )
    assert json.loads(benched.stdout)["chunk_s"] > 0
