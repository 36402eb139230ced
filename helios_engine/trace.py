"""Named ranges for Nsight, in the NVTX domain "helios". HELIOS_NVTX=0 leaves them out altogether.

Without a profiler attached a range costs about half a microsecond; the nvtx package is imported at the first range.
"""

from __future__ import annotations

import contextlib
import functools
import os
from contextlib import AbstractContextManager

import torch

ENABLED = os.environ.get("HELIOS_NVTX", "1") != "0"
_NOTHING = contextlib.nullcontext()


@functools.cache
def _domain():
    import nvtx

    return nvtx.get_domain("helios")


class _Range:
    """Push on enter, pop on exit; reusable and safe to nest."""

    __slots__ = ("_attributes", "_domain")

    def __init__(self, name: str) -> None:
        self._domain = _domain()
        self._attributes = self._domain.get_event_attributes(message=name)

    def __enter__(self) -> None:
        self._domain.push_range(self._attributes)

    def __exit__(self, *_: object) -> None:
        self._domain.pop_range()


@functools.cache
def _range(name: str) -> _Range:
    return _Range(name)


def span(name: str) -> AbstractContextManager[None]:
    """A range around a piece of work. Names come from a small fixed set, so they are made once and kept."""
    if not ENABLED or torch.compiler.is_compiling():
        return _NOTHING
    return _range(name)
