"""Compile every CUDA source with nvcc alone, for every architecture, and hold the kernels to their resources.

    python csrc/check_cuda.py [--jobs 2]

No GPU and no CUDA build of torch are needed. Fails where a kernel spills or uses local memory (ptxas), and where a hot
kernel has too few accesses of 16 bytes or issues more instructions than budgets.py allows (disassembly, if cuobjdump and
nvdisasm are there: their names as packages are nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm). Budgets hold for the nvcc
they were set with; another one's table is printed only. The CUDA side of the bindings is compiled too, not linked.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import budgets

ROOT = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-fmad=false"]  # as setup.py
ARCHITECTURES = ("80", "90", "100", "120")
# Kernels that move whole rows: their name's start, and the least number of 16-byte loads and stores to global memory.
HOT = {
    "residual_gate_norm_registers": (2, 2),
    "qk_rmsnorm_rope_registers": (2, 2),
    "rmsnorm_rows_registers": (2, 2),
    "norm_lines": (6, 3),
    "add_lines": (2, 1),
    "upsample_lines": (1, 4),
    "quantize_registers": (5, 0),
    "unpackI5uint4": (1, 1),
    "merge_rows": (2, 2),
}
BUDGETED, PINNED_NVCC = "90", "release 13.0"


@dataclass
class Findings:
    """What one source for one architecture shows."""

    problems: list[str] = field(default_factory=list)
    hot: set[str] = field(default_factory=set)
    functions: dict[str, str] = field(default_factory=dict)  # mangled name -> disassembly, where budgets are held
    registers: dict[str, int] = field(default_factory=dict)


def run(command: list[str]) -> str:
    """What a command printed; SystemExit where it fails."""
    # cuobjdump calls nvdisasm, which its own wheel puts beside it.
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}{os.pathsep}{Path(command[0]).parent}"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def check_build(source: Path, architecture: str, cubin: Path, found: Findings) -> None:
    """Compile one source for one architecture and note what ptxas says of it."""
    printed = run(
        ["nvcc", *FLAGS, f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", "-o", str(cubin), str(source)]
    )
    found.registers = budgets.registers_of(printed)
    kernel = ""
    for line in printed.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            kernel = match[1]
        match = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if match and any(int(number) for number in match.groups()):
            found.problems.append(f"{source.name} sm_{architecture} {kernel}: {line.strip()}")


def check_code(cubin: Path, label: str, cuobjdump: str, found: Findings) -> None:
    """Note what the disassembly says."""
    for function in run([cuobjdump, "-sass", str(cubin)]).split("Function : ")[1:]:
        name, code = function.split("\n", 1)
        found.functions[name.strip()] = code
        if re.search(r"\b(LDL|STL)\b", code):
            found.problems.append(f"{label} {name}: uses local memory")
        for hot, (loads, stores) in HOT.items():
            if hot not in name:
                continue
            found.hot.add(hot)
            wide = len(re.findall(r"\bLDG\.E(\.\w+)*\.128", code)), len(re.findall(r"\bSTG\.E(\.\w+)*\.128", code))
            if wide[0] < loads or wide[1] < stores:
                found.problems.append(
                    f"{label} {name}: {wide[0]} wide loads and {wide[1]} wide stores, not {loads} and {stores}"
                )


def check(source: Path, architecture: str, folder: Path, cuobjdump: str | None) -> Findings:
    """What one source shows on one architecture."""
    cubin, found = folder / f"{source.stem}_{architecture}.cubin", Findings()
    check_build(source, architecture, cubin, found)
    if cuobjdump:
        check_code(cubin, f"{source.name} sm_{architecture}", cuobjdump, found)
    if architecture != BUDGETED:
        found.functions = {}
    return found


def check_budgets(results: list[Findings]) -> list[str]:
    """Print the table of instructions; what is above its budget, where this nvcc is the one budgets were set with."""
    functions = {name: code for found in results for name, code in found.functions.items()}
    registers = {name: count for found in results if found.functions for name, count in found.registers.items()}
    lines, above = budgets.report(functions, registers)
    print("\n".join(lines))
    if PINNED_NVCC in run(["nvcc", "--version"]):
        return above
    print("\n".join(f"another nvcc than {PINNED_NVCC}, so only reported: {line}" for line in above))
    return []


def check_bindings() -> None:
    """The bindings as a CUDA build has them: macros on, against the stable headers of this torch."""
    import torch

    include = Path(torch.__file__).parent / "include"
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    for source in sorted((ROOT / "bindings").glob("*.cpp")):
        if source.name != "build_info.cpp":
            flags = ["-std=c++17", "-fsyntax-only", "-DHELIOS_CUDA", "-DUSE_CUDA"]
            flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{include}"]
            run([compiler, *flags, str(source)])


def find_cuobjdump() -> str | None:
    """On PATH, or in the wheel nvidia-cuda-cuobjdump."""
    found = shutil.which("cuobjdump")
    wheels = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/**/bin/cuobjdump"))
    return found or (str(wheels[0]) if wheels else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("check_cuda: nvcc is not on PATH")
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print(
            "check_cuda: no cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm): the disassembly is not read"
        )
    sources = sorted((ROOT / "kernels").glob("*_cuda.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(check, source, architecture, Path(folder), cuobjdump)
            for source in sources
            for architecture in ARCHITECTURES
        ]
        results = [job.result() for job in jobs]
        problems = [problem for found in results for problem in found.problems]
        seen = {hot for found in results for hot in found.hot}
        if cuobjdump is not None:
            problems += [f"no kernel is named {hot}: mend the list of hot kernels" for hot in HOT if hot not in seen]
            problems += check_budgets(results)
        last = ARCHITECTURES[-1]
        for source in sources:
            target = f"arch=compute_{last},code=compute_{last}"
            run(["nvcc", *FLAGS, "-gencode", target, "-ptx", "-o", f"{folder}/{source.stem}.ptx", str(source)])
    check_bindings()
    if problems:
        sys.exit("\n".join(problems))
    print(f"check_cuda: {len(sources)} sources, sm_{', sm_'.join(ARCHITECTURES)} and PTX: no spills, no local memory")


if __name__ == "__main__":
    main()
