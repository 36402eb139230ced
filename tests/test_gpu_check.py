"""The groups of benchmarks/gpu_check.sh, so that a GPU's time is not spent on their mistakes.

`make rehearse` goes through every part with small models; here parts are stand-ins, and what is tested is what a group does
with them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check, gpu_groups

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "good": "write({'device': 'a GPU', 'torch': '2', 'rate': 0.5, 'nested': {'ms': 2.0}}); print('all well')",
    "failing": "print('the reason'); sys.exit(3)",
    "endless": "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "open(folder + '/child', 'w').write(str(child.pid)); time.sleep(600)",
    "half": "write({'failed': True, 'device': 'a GPU'}); sys.exit(1)",
}


@pytest.fixture
def stand_ins(monkeypatch, tmp_path) -> Path:
    """Groups of parts that do what SCRIPTS says; the folder where they leave marks."""

    def command_of(part: str, file: Path, *, tiny: bool) -> list[str]:
        begin = f"import json, subprocess, sys, time; folder = {str(tmp_path)!r}; "
        begin += f"write = lambda x: open({str(file)!r}, 'w').write(json.dumps(x)); "
        return [sys.executable, "-c", begin + SCRIPTS[part]]

    monkeypatch.setattr(gpu_groups, "command_of", command_of)
    monkeypatch.setattr(gpu_groups, "_LEAST", 1.0)
    monkeypatch.setattr(gpu_groups, "_KEPT_FOR_OTHERS", 4.0)
    monkeypatch.setattr(gpu_groups, "_CLOSING", 0.0)
    return tmp_path


def _run(monkeypatch, out: Path, *parts: str, seconds: float) -> tuple[bool, dict[str, dict]]:
    monkeypatch.setattr(gpu_groups, "GROUPS", {"some": parts})
    fine = gpu_groups.run_group("some", out, deadline=time.time() + seconds, tiny=True)
    return fine, json.loads((out / "some.json").read_text())


def _is_alive(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_every_part_is_in_one_group() -> None:
    parts = [part for group in gpu_groups.GROUPS.values() for part in group]
    assert sorted(parts) == sorted(gpu_check.PARTS)


def test_a_part_that_fails_costs_only_itself(monkeypatch, stand_ins, tmp_path) -> None:
    fine, results = _run(monkeypatch, tmp_path / "out", "failing", "half", "good", seconds=30)
    assert not fine
    assert results["failing"]["failed"] == "exit code 3"
    assert results["failing"]["last_lines"] == ["the reason"]
    assert results["half"]["failed"] == "exit code 1"
    assert results["good"]["nested"] == {"ms": 2.0}
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["some.json", "some.md", "some_logs.tar.gz"]
    with tarfile.open(tmp_path / "out" / "some_logs.tar.gz") as archive:
        assert archive.getnames() == ["failing.log", "good.log", "half.log"]
    text = (tmp_path / "out" / "some.md").read_text()
    assert "# some: a GPU, torch 2" in text
    assert "rate 0.5; nested ms 2" in text


def test_a_part_out_of_time_is_ended_with_what_it_started(monkeypatch, stand_ins, tmp_path) -> None:
    fine, results = _run(monkeypatch, tmp_path / "out", "endless", "good", seconds=6)
    assert not fine
    assert results["endless"]["failed"].startswith("out of time after")
    assert results["good"]["rate"] == 0.5, "the next part had the time kept for it"
    child = int((stand_ins / "child").read_text())
    deadline = time.time() + 5
    while _is_alive(child) and time.time() < deadline:
        time.sleep(0.05)
    assert not _is_alive(child)


def test_what_there_is_no_time_for_is_left_out(monkeypatch, stand_ins, tmp_path) -> None:
    fine, results = _run(monkeypatch, tmp_path / "out", "good", "failing", seconds=0.5)
    assert not fine, "a rehearsal has to go through everything"
    assert gpu_groups.run_group("some", tmp_path / "out", deadline=time.time(), tiny=False), "a GPU's time may run out"
    assert all("out of time" in figures["left out"] for figures in results.values())


def test_a_part_without_its_package_says_so(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for part in ("diffusers", "diffusers_offload", "compiled"):
        assert "carry its wheel" in gpu_check.PARTS[part](gpu_check.TINY)["left out"]


def test_recorded_steps_are_timed_beside_plain_ones() -> None:
    stages = [figures for figures in gpu_check.part_dit(gpu_check.TINY).values() if isinstance(figures, dict)]
    assert any("recorded_step_ms" in figures for figures in stages)
    for figures in stages:
        assert figures.get("recorded_equal", True) is True


def test_the_script_explains_itself() -> None:
    script = ROOT / "benchmarks" / "gpu_check.sh"
    result = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert result.returncode == 2
    for group in gpu_groups.GROUPS:
        assert f"#   {group} " in result.stderr
    text = script.read_text()
    assert "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}" in text, "wheels installed with --target stay found"
    assert "HELIOS_CUDA=1" in text
    assert "HELIOS_OPS=native" in text
