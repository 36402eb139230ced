"""The import rules of docs/design.md: each layer knows only what lies below it, and importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "helios_engine"

# Layer -> layers it may import from. Modules at the top of the package are layers of their own.
ALLOWED = {
    "config": set(),
    "settings": set(),
    "trace": set(),
    "optional": set(),
    "ops": {"config", "trace"},
    "parallel": {"config", "settings", "ops", "trace"},
    "model": {"config", "ops", "parallel", "trace", "optional"},
    "sampling": {"config", "ops"},
    "request": {"config"},
    "output": {"request", "model", "trace", "optional"},
    "engine": {
        "config",
        "settings",
        "ops",
        "parallel",
        "model",
        "sampling",
        "request",
        "output",
        "trace",
        "optional",
        "__init__",
    },
    "tools": {
        "config",
        "settings",
        "ops",
        "parallel",
        "model",
        "sampling",
        "request",
        "output",
        "engine",
        "trace",
        "optional",
        "__init__",
    },
    "cli": {"settings", "parallel", "request", "output", "engine", "tools"},
    "__init__": {"settings", "parallel", "request", "output", "engine"},
}
# Loaded where they are used, never by `import helios_engine`.
LAZY = ("av", "ftfy", "PIL", "transformers", "huggingface_hub", "tqdm", "yaml", "nvtx", "diffusers", "pybind11")


def _layer(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def _imports(path: Path) -> set[str]:
    """Layers of this package that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "helios_engine" and len(parts) > 1:
                is_module = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()
                found.add(parts[1] if is_module or parts[1] == "_build_info" else "__init__")
    return found - {"_build_info"}


def test_each_layer_imports_only_what_lies_below() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(extra))}"
        for path in files
        if (extra := _imports(path) - ALLOWED[_layer(path)] - {_layer(path)})
    ]
    assert not wrong, wrong


def test_cuda_is_named_only_where_devices_are_handled() -> None:
    allowed = {"ops", "engine", "tools"}
    launch = PACKAGE / "parallel" / "launch.py"
    wrong = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "torch.cuda" in path.read_text() and _layer(path) not in allowed and path != launch
    ]
    assert not wrong, wrong


def test_import_is_light() -> None:
    # What torch brings along by itself (tqdm in some releases) is not ours to answer for.
    code = "import sys, torch, numpy, safetensors; before = set(sys.modules); import helios_engine; "
    code += f"print([name for name in {LAZY!r} if name in sys.modules and name not in before])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_project_speaks_of_itself_alone() -> None:
    root = PACKAGE.parent
    words = ("/" + "work/", "is" + "sue " + "2", "/" + "tmp/")
    files = [*PACKAGE.rglob("*.py"), *(root / "csrc").rglob("*.cpp"), root / "README.md", *(root / "docs").glob("*.md")]
    wrong = [f"{path.name}: {word}" for path in files if path.is_file() for word in words if word in path.read_text()]
    assert not wrong, wrong
