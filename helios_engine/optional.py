"""Packages that some tasks need and others do without."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, purpose: str, package: str | None = None) -> ModuleType:
    """The module, imported. Raises ValueError that says what it is needed for and what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module
        raise ValueError(f"{purpose} needs {package} ({error}); pip install {package}") from None
