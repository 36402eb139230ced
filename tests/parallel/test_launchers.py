"""The scripts users copy, run for real on the CPU; Slurm's commands are played by stand-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.ranks import _free_port

LAUNCHERS = Path(__file__).parent.parent.parent / "launchers"
FAST = ["--height", "64", "--width", "64", "--num-frames", "33", "--device", "cpu", "--quiet"]


def _environment(tmp_path: Path, model: Path, **more: str) -> dict[str, str]:
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "MODEL": str(model),
        "OUTPUT": str(tmp_path / "out.npy"),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def _expected(engines, variant: str, **changes: object) -> np.ndarray:
    from helios_engine import VideoRequest

    prompt = "A red fox runs through fresh snow at sunrise."
    request = VideoRequest(prompt=prompt, height=64, width=64, num_frames=33, **changes)
    return engines(variant).generate(request).frames.astype(int)


def _run(script: str, tmp_path: Path, environment: dict[str, str], *flags: str) -> np.ndarray:
    command = ["bash", str(LAUNCHERS / script), *FAST, *flags]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out.npy'}\n", "rank 0 alone speaks"
    return np.load(tmp_path / "out.npy").astype(int)


def test_one_machine(toy, engines, tmp_path) -> None:
    frames = _run("one_machine.sh", tmp_path, _environment(tmp_path, toy / "distilled", GPUS="2"))
    assert np.abs(frames - _expected(engines, "distilled")).max() <= 1


@pytest.mark.full
def test_base_on_two_halves(toy, engines, tmp_path) -> None:
    frames = _run("base_8gpu.sh", tmp_path, _environment(tmp_path, toy / "base", GPUS="4"), "--steps", "2")
    negative = "blurred details, worst quality, low quality"
    assert np.abs(frames - _expected(engines, "base", steps=2, negative_prompt=negative)).max() <= 1


def test_two_agents_under_slurm(toy, engines, tmp_path) -> None:
    """srun starts an agent per node; here both nodes are this machine and meet on a loopback port."""
    (tmp_path / "bin").mkdir()
    script = (LAUNCHERS / "slurm.sh").read_text().replace("29500", str(_free_port()))
    stand_ins = {
        "scontrol": "echo 127.0.0.1; echo 127.0.0.2",
        "srun": 'export MASTER_ADDR=127.0.0.1; "$@" & first=$!; "$@" & second=$!; wait $first && wait $second',
    }
    for name, body in stand_ins.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    copy = tmp_path / "slurm.sh"
    copy.write_text(script)
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1"}
    frames = _run(str(copy), tmp_path, _environment(tmp_path, toy / "distilled", **slurm))
    assert np.abs(frames - _expected(engines, "distilled")).max() <= 1


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCHERS.glob("*.sh")))
def test_scripts_are_sound(script: str) -> None:
    path = LAUNCHERS / script
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert os.access(path, os.X_OK)
    assert len(path.read_text().splitlines()) < 40
