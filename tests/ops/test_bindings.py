"""The bindings keep to what the oldest torch that we claim has in its headers; make oldest compiles them for real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BINDINGS = ROOT / "csrc" / "bindings"
MACRO = re.compile(r"\b(?:[A-Z]+_)*TORCH_[A-Z0-9_]+\b")


def known_to_the_oldest() -> set[str]:
    lines = (Path(__file__).parent / "stable_macros_2.10.txt").read_text().splitlines()
    return {line for line in lines if not line.startswith("#")}


def unknown_macros(sources: dict[str, str], fallbacks: str) -> list[str]:
    """Macros of torch that the oldest release lacks and the fallbacks do not define where they are missing."""
    replaced = re.findall(r"#ifndef (\w+)\n#define \1\b", fallbacks)
    known = known_to_the_oldest() | set(replaced)
    return [
        f"{name}: {macro}"
        for name, text in sources.items()
        for macro in sorted(set(MACRO.findall(re.sub(r"//[^\n]*", "", text))) - known)
    ]


def test_every_macro_is_one_of_the_oldest_torch() -> None:
    sources = {path.name: path.read_text() for path in sorted(BINDINGS.glob("*")) if path.suffix in (".h", ".cpp")}
    assert len(sources) > 8
    check = sources["check.h"]
    assert unknown_macros(sources, check) == []
    assert "STD_TORCH_CHECK" in known_to_the_oldest()
    # The test sees what it is for: the same sources without the fallback.
    without = check.replace("#ifndef STABLE_TORCH_ERROR_CODE_CHECK\n", "")
    assert unknown_macros(sources, without) == ["check.h: STABLE_TORCH_ERROR_CODE_CHECK"]


@pytest.mark.parametrize(("value", "said"), [("2", "HELIOS_CUDA must be 0, 1 or force"), ("1", "has no CUDA")])
def test_a_build_that_cannot_have_its_cuda_kernels_is_refused(tmp_path, value: str, said: str) -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is not None and value == "1":
        pytest.skip("this torch has CUDA")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp"]
    result = subprocess.run(
        [*command, str(tmp_path / "temp")],
        cwd=ROOT,
        env={**os.environ, "HELIOS_CUDA": value},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    # Without any nvcc that is what is said.
    assert said in result.stderr or (value == "1" and "nvcc" in result.stderr), result.stderr
    assert not list(tmp_path.rglob("libhelios_ops.so"))
