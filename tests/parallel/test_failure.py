"""Ranks that die, hang, raise or were told different things: a clear end on all of them, in time, and no file left."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from helios_engine.cli import main

TIMEOUT = 6
SMALL = ["--prompt", "A red fox", "--height", "64", "--width", "64", "--device", "cpu", "--quiet"]
# A rank of its own making: the argument says which rank raises, and at which step.
RAISING = """
import sys
from helios_engine import ContextParallel, Engine, EngineConfig, VideoRequest
context = ContextParallel.from_torchrun(device="cpu", rank_timeout=float(sys.argv[2]))
engine = Engine.load(sys.argv[1], EngineConfig(device="cpu"), context)
steps = []
def on_step(*_):
    steps.append(1)
    if context.rank == 1 and len(steps) == 2:
        raise ArithmeticError("the sum is wrong")
try:
    for _ in engine.stream(VideoRequest(prompt="A red fox", height=64, width=64, steps=9, num_frames=None), on_step):
        pass
except Exception as error:
    print(type(error).__name__, error, engine.context.is_broken, flush=True)
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(rank: int, size: int, port: int, *command: str) -> subprocess.Popen:
    """One rank with torchrun's environment, without torchrun: nobody else tells the ranks that one is gone."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    environment |= {name: str(value) for name, value in place.items()}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _ends(processes: list[subprocess.Popen], seconds: float = 150) -> list[tuple[int, str]]:
    """(exit code, what was said) of every process; none may outlive the time, which is long for a busy machine."""
    deadline = time.monotonic() + seconds
    try:
        said = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, (out + err).strip()) for process, (out, err) in zip(processes, said, strict=True)]


def _command(model: Path, output: Path, *more: str) -> list[str]:
    flags = ["--model", str(model), "--output", str(output), "--rank-timeout", str(TIMEOUT), *SMALL, *more]
    return ["-m", "helios_engine.cli", "generate", *flags]


def _wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} in {folder}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("victim", "how"),
    [pytest.param(1, signal.SIGKILL, marks=pytest.mark.full), (0, signal.SIGKILL), (1, signal.SIGSTOP)],
)
def test_a_lost_rank_ends_the_others(toy, tmp_path, victim: int, how: signal.Signals) -> None:
    port = _free_port()
    command = _command(toy / "base", tmp_path / "out.npy", "--num-frames", "endless", "--steps", "3")
    ranks = [_start(rank, 3, port, *command) for rank in range(3)]
    _wait_for(tmp_path, ".out.*.tmp.npy")
    time.sleep(0.3)  # into a chunk
    ranks[victim].send_signal(how)
    killed_at = time.monotonic()
    others = [rank for rank in range(3) if rank != victim]
    try:
        ends = _ends([ranks[rank] for rank in others])
    finally:
        ranks[victim].kill()
    assert time.monotonic() - killed_at < 3 * TIMEOUT
    assert [code for code, _ in ends] == [1, 1]
    lost_store = "the launcher that held the run's store has gone"
    spoken = " ".join(text for _, text in ends)
    assert f"rank {victim}" in spoken
    assert "has shown no sign of life" in spoken or (victim == 0 and (lost_store in spoken or "Connection" in spoken))
    assert list(tmp_path.iterdir()) == [], "neither a video nor half of one"


def test_a_raising_rank_tells_the_others_why(toy) -> None:
    port = _free_port()
    ranks = [_start(rank, 3, port, "-c", RAISING, str(toy / "base"), str(TIMEOUT)) for rank in range(3)]
    ends = _ends(ranks)
    assert ends[1] == (0, "ArithmeticError the sum is wrong True")
    for code, text in (ends[0], ends[2]):
        assert (
            text
            == "RankFailure rank 1 failed with ArithmeticError: the sum is wrong; the other ranks have stopped True"
        )
        assert code == 0


@pytest.mark.parametrize(
    ("of_rank_1", "message"),
    [
        (["--seed", "8"], "rank 1 has seed 8 where rank 0 has 7; all ranks need the same arguments"),
        (["--seed", "x"], "rank 1: argument --seed: invalid int value: 'x'; see helios-engine generate --help"),
    ],
)
def test_different_arguments_are_refused_on_all_ranks(toy, tmp_path, of_rank_1, message: str) -> None:
    port = _free_port()
    command = _command(toy / "base", tmp_path / "out.npy", "--num-frames", "33")
    ranks = [_start(0, 2, port, *command, "--seed", "7"), _start(1, 2, port, *command, *of_rank_1)]
    assert _ends(ranks) == [(2, f"helios-engine: error: {message}"), (2, "")]


def test_a_port_in_use_is_named(toy, tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ((code, text),) = _ends([_start(0, 2, port, *_command(toy / "base", tmp_path / "out.npy"))])
    assert code == 2
    assert text.startswith("helios-engine: error: rank 0 cannot meet the others at 127.0.0.1:")
    assert "port taken" in text
    assert len(text.splitlines()) == 1


def test_a_polite_stop_ends_all_ranks(toy, tmp_path) -> None:
    command = [*_command(toy / "base", tmp_path / "out.npy", "--num-frames", "330", "--steps", "9"), "--num-gpus", "2"]
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    _wait_for(tmp_path, ".out.*.tmp.npy")
    process.send_signal(signal.SIGTERM)
    ((code, text),) = _ends([process])
    assert code == 130
    assert set(text.splitlines()) == {"helios-engine: error: stopped"}
    assert list(tmp_path.iterdir()) == []


def test_more_ranks_than_gpus_are_refused(toy, tmp_path, monkeypatch, capsys) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    flags = ["--model", str(toy / "base"), "--prompt", "x", "--output", str(tmp_path / "a.mp4"), "--num-gpus", "2"]
    assert main(["generate", *flags, "--height", "64", "--width", "64"]) == 2
    assert "2 ranks need 2 GPUs here, but this torch sees 1" in capsys.readouterr().err


def test_a_killed_run_is_resumed(toy, tmp_path, ranks) -> None:
    kept, steps = tmp_path / "kept", ["--num-frames", "99", "--steps", "1,1,1"]

    def command(name: str, *more: str) -> list[str]:
        return _command(toy / "distilled", tmp_path / f"{name}.npy", *steps, "--checkpoint-dir", *more)

    def run_two(*more: str) -> subprocess.Popen:
        started = [sys.executable, *command("two", str(kept), "--num-gpus", "2", *more)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    broken = run_two()
    _wait_for(kept, "chunk_00000.npy")
    children = psutil.Process(broken.pid).children(recursive=True)
    next(child for child in children if child.environ().get("RANK") == "1").kill()
    ((code, _),) = _ends([broken])
    assert code == 1
    assert not (tmp_path / "two.npy").exists()
    shutil.copytree(kept, tmp_path / "for one")
    again = run_two("--resume")
    assert main(command("one", str(tmp_path / "for one"), "--resume")[2:]) == 0
    ((code, said),) = _ends([again])
    assert code == 0, said
    request = {"prompt": "A red fox", "height": 64, "width": 64, "steps": (1, 1, 1), "num_frames": 99}
    whole = ranks.run("generate", (2, 1, 1), folder=str(toy / "distilled"), arguments=request)[0][1]
    two, one = (np.load(tmp_path / f"{name}.npy") for name in ("two", "one"))
    assert np.array_equal(two, whole), "bit-equal on as many ranks"
    assert np.abs(one.astype(int) - whole).max() <= 1, "within rounding on another number"


@pytest.mark.parametrize(
    ("leaving", "cause"),
    [
        ("context.close(); sys.exit()", "rank 1 has ended while this rank still needed it"),
        ("session.close(); time.sleep(9)", "rank 1 failed with RuntimeError: closed its video before rank 0 did"),
    ],
)
def test_a_rank_that_leaves_alone_is_named(toy, leaving: str, cause: str) -> None:
    script = f"""
import sys, time
from helios_engine import ContextParallel, Engine, EngineConfig, RankFailure, VideoRequest
context = ContextParallel.from_torchrun(device="cpu", rank_timeout={TIMEOUT})
engine = Engine.load(sys.argv[1], EngineConfig(device="cpu"), context)
session = engine.open(VideoRequest(prompt="A red fox", height=64, width=64, steps=2, num_frames=None))
session.next_chunk()
if context.rank == 1:
    {leaving}
try:
    while session.next_chunk():
        pass
except RankFailure as error:
    print(error, flush=True)
"""
    port = _free_port()
    ranks = [_start(rank, 2, port, "-c", script, str(toy / "base")) for rank in range(2)]
    try:
        (_, text), *_ = _ends(ranks[:1], 40)
    finally:
        ranks[1].kill()
    assert text.splitlines()[0] == f"{cause}; the other ranks have stopped"
