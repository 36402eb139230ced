"""The command line as it is where some packages are missing: python -m tests.helpers.without PACKAGE,... COMMAND...

tqdm is hidden from this package alone: transformers does not load without it.
"""

from __future__ import annotations

import builtins
import sys
from importlib.machinery import ModuleSpec, PathFinder

_find_on_path = PathFinder.find_spec


def hide(packages: set[str]) -> None:
    """Make packages unknown to imports and to importlib.util.find_spec."""
    shared = packages & {"tqdm"}
    hidden = packages - shared

    def find_spec(fullname: str, path=None, target=None) -> ModuleSpec | None:
        return None if fullname.partition(".")[0] in hidden else _find_on_path(fullname, path, target)

    PathFinder.find_spec = staticmethod(find_spec)
    plain = builtins.__import__

    def refuse(name, globals=None, locals=None, fromlist=(), level=0):
        if name.partition(".")[0] in shared and (globals or {}).get("__name__", "").startswith("helios_engine"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return plain(name, globals, locals, fromlist, level)

    builtins.__import__ = refuse


def main() -> int:
    hide(set(sys.argv[1].split(",")))
    from helios_engine.cli import main as run

    return run(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
