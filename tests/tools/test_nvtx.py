"""The ranges that launchers/profile_nsys.sh relies on, as NVTX itself delivers them to a profiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helios_engine.ops import native

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "tests" / "helpers" / "nvtx_injection.cpp"
FAST = ["--height", "64", "--width", "64", "--steps", "1", "--device", "cpu", "--quiet"]
# Plays nsys: keeps its own flags and the program's ranges, rank by rank, and runs the program.
NSYS = """#!/usr/bin/env bash
export NVTX_INJECTION64_PATH=$INJECTION HELIOS_NVTX_LOG=$LOGS/ranges.$RANK
shift
: >"$LOGS/flags.$RANK"
while [[ $1 == --* ]]; do printf '%s %s\\n' "$1" "$2" >>"$LOGS/flags.$RANK"; shift 2; done
exec "$@"
"""


@pytest.fixture(scope="module")
def injection(tmp_path_factory) -> Path:
    """The library that NVTX loads in a profiler's place."""
    pytest.importorskip("nvtx")
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("injection") / "libinjection.so"
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
    return library


def nested(path: Path) -> list[tuple[str, ...]]:
    """Every range of domain helios with those around it, outermost first. Fails where they do not nest."""
    stacks: dict[str, list[str]] = {}
    found = []
    for line in path.read_text().splitlines():
        what, domain, thread, *message = line.split(" ", 3)
        assert domain == "helios"
        stack = stacks.setdefault(thread, [])
        if what == "push":
            stack.append(message[0])
            found.append(tuple(stack))
        else:
            stack.pop()
    assert not any(stacks.values()), "every range ends"
    return found


def environment(tmp_path: Path, toy: Path, **more: str) -> dict[str, str]:
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "REPORTS": str(tmp_path)}
    own |= {"MODEL": str(toy / "distilled"), "OUTPUT": str(tmp_path / "out.npy"), "GPUS": "2", "CHUNK": "1"}
    return {**os.environ, **own, **more}


def test_a_profiler_sees_the_chunk_it_waits_for_and_what_is_in_it(toy, tmp_path, injection) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nsys").write_text(NSYS)
    (tmp_path / "bin" / "nsys").chmod(0o755)
    command = ["bash", str(ROOT / "launchers" / "profile_nsys.sh"), *FAST]
    variables = environment(tmp_path, toy, LOGS=str(tmp_path), INJECTION=str(injection))
    result = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        flags = dict(line.split(" ", 1) for line in (tmp_path / f"flags.{rank}").read_text().splitlines())
        capture, _, domain = flags["--nvtx-capture"].partition("@")
        assert (capture, domain, flags["--trace"]) == ("chunk 1", "helios", "cuda,nvtx,osrt")
        ranges = nested(tmp_path / f"ranges.{rank}")
        assert [found for found in ranges if found[-1] == capture] == [(capture,)], "once, and outermost"
        inside = [found[1:] for found in ranges if found[0] == capture and len(found) > 1]
        stages = [found for found in inside if len(found) == 1 and found[0].startswith("stage ")]
        assert stages == [("stage 0",), ("stage 1",), ("stage 2",)]
        steps = [found for found in inside if found[-1] == "step"]
        assert [found[:-1] for found in steps] == stages, "a step in each stage, and nowhere else"
        deep = {found[2:] for found in inside if found[1:2] == ("step",)}
        assert ("self_attention", "attention") in deep
        assert ("self_attention", "exchange qkv") in deep, sorted(deep)
        if not native.WHY_NOT:
            operators = {found[-1] for found in deep if found} & set(native.OPERATORS)
            assert {"residual_gate_norm", "qk_rmsnorm_rope_pack", "rmsnorm_rows", "unpack_heads"} <= operators
        assert ("vae",) in inside


@pytest.mark.skipif(shutil.which("nsys") is None, reason="no nsys here")
def test_nsight_systems_shows_them(toy, tmp_path) -> None:
    command = ["bash", str(ROOT / "launchers" / "profile_nsys.sh"), *FAST]
    result = subprocess.run(
        command, env=environment(tmp_path, toy, GPUS="1"), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    (report,) = tmp_path.glob("helios.rank0*.nsys-rep")
    stats = subprocess.run(
        ["nsys", "stats", "--report", "nvtx_pushpop_sum", str(report)], capture_output=True, text=True, check=True
    )
    for name in ("helios:stage 0", "helios:step", "helios:attention"):
        assert name in stats.stdout
