"""Runs the parts of gpu_check.py in groups that fit a given time; see gpu_check.sh.

    python -m benchmarks.gpu_groups GROUP OUT [--minutes 9] [--rehearse]

A group leaves OUT/GROUP.json, OUT/GROUP.md and OUT/GROUP_logs.tar.gz, the first two written anew after every part. Parts are in
order of value; one that fails or runs out of time costs only itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

GROUPS = {
    "kernels": ("env", "ops", "dit"),
    "engine": ("engine", "vae", "attention"),
    "modes": ("quality", "diffusers", "ranks", "offload", "diffusers_offload", "compiled"),
    "tests": ("sanitize", "tests"),
    "multi": ("multi_equal", "multi_scaling", "multi_capture", "multi_loss"),
}
_LEAST = 20.0  # seconds that a part must have to be begun
_KEPT_FOR_OTHERS = 30.0  # seconds for each part that is still to come
_CLOSING = 10.0  # seconds for the archive
_AT_MOST = {"sanitize": 150.0}  # seconds of parts that would take whatever there is
_REHEARSAL_MINUTES = 60.0


def command_of(part: str, file: Path, *, tiny: bool) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_check", part, str(file), *(["--tiny"] if tiny else [])]


def run_part(part: str, folder: Path, seconds: float, *, tiny: bool) -> dict[str, object]:
    """One part in a process group of its own, ended when its time is up; its figures or what went wrong."""
    file, log = folder / f"{part}.json", folder / f"{part}.log"
    command = command_of(part, file, tiny=tiny)
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    took = {"part_s": round(time.monotonic() - began, 1)}
    figures = json.loads(file.read_text()) if file.exists() else {}  # written whole or not at all
    last = log.read_text(errors="replace").strip().splitlines()[-3:]
    if code is None:
        return {**figures, **took, "failed": f"out of time after {seconds:.0f} s", "last_lines": last}
    if code:
        return {**figures, **took, "failed": f"exit code {code}", "last_lines": last}
    return {**figures, **took}


def _end(process: subprocess.Popen) -> None:
    """What is left of the part's processes, ranks of its own among them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_group(name: str, out: Path, *, deadline: float, tiny: bool) -> bool:
    """Every part that there is time for; deadline is time.time's. True where none failed, and none is left out of a rehearsal."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        for place, part in enumerate(GROUPS[name]):
            left = deadline - _CLOSING - time.time()
            others = len(GROUPS[name]) - place - 1
            if left < _LEAST:
                results[part] = {"left out": f"out of time, {left:.0f} s are left"}
            else:
                print(f"== {part}", flush=True)
                seconds = min(max(_LEAST, left - _KEPT_FOR_OTHERS * others), _AT_MOST.get(part, left))
                results[part] = run_part(part, folder, seconds, tiny=tiny)
                print(row(part, results[part]), flush=True)
            write(out / f"{name}.json", json.dumps(results, indent=2) + "\n")
            write(out / f"{name}.md", table(name, results))
        with tarfile.open(out / f"{name}_logs.tar.gz", "w:gz") as archive:
            for log in sorted(folder.glob("*.log")):
                archive.add(log, log.name)
    bad = ("failed", "left out") if tiny else ("failed",)
    return not any(key in figures for figures in results.values() for key in bad)


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    os.replace(temporary, path)


def table(name: str, results: dict[str, dict[str, object]]) -> str:
    """A Markdown table, a row per part."""
    device = next((figures["device"] for figures in results.values() if "device" in figures), "unknown device")
    torch = next((figures["torch"] for figures in results.values() if "torch" in figures), "unknown torch")
    lines = [f"# {name}: {device}, torch {torch}", "", "| part | figures |", "|---|---|"]
    return "\n".join([*lines, *(row(part, figures) for part, figures in results.items())]) + "\n"


def row(part: str, figures: dict[str, object]) -> str:
    common = ("part", "device", "torch", "python", "threads", "tiny")
    own = {key: value for key, value in figures.items() if key not in common}
    return f"| {part} | {'; '.join(_flat(own)).replace('|', '/')} |"


def _flat(values: dict[str, object], prefix: str = "") -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{name} ")
        else:
            lines.append(f"{prefix}{name} {value:.4g}" if isinstance(value, float) else f"{prefix}{name} {value}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, help="for the whole group (default: 9, of a rehearsal 60)")
    parser.add_argument(
        "--began", type=float, default=time.time(), help="when the time began to run, seconds since 1970"
    )
    parser.add_argument("--rehearse", action="store_true", help="small models, without a GPU too")
    options = parser.parse_args()
    minutes = options.minutes or (_REHEARSAL_MINUTES if options.rehearse else 9.0)
    deadline = options.began + 60 * minutes
    sys.exit(0 if run_group(options.group, options.out, deadline=deadline, tiny=options.rehearse) else 1)


if __name__ == "__main__":
    main()
