"""Named ranges for profilers: in Nsight's NVTX domain "helios", and in torch's own profiler while one runs.

HELIOS_NVTX=0 leaves NVTX out altogether, and so does a missing nvtx package. Without a profiler attached a range costs about
half a microsecond; the package is imported at the first range.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from contextlib import AbstractContextManager

import torch

logger = logging.getLogger(__name__)

ENABLED = os.environ.get("HELIOS_NVTX", "1") != "0"
_NOTHING = contextlib.nullcontext()
_CHUNKS_NAMED = 64  # an endless video must not make names without end


@functools.cache
def _domain():
    """NVTX's domain "helios", or None where the package is missing, which is said once."""
    try:
        import nvtx
    except ImportError as error:
        logger.info("no NVTX ranges: %s; pip install nvtx", error)
        return None
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
def _range(name: str) -> AbstractContextManager[None]:
    return _NOTHING if _domain() is None else _Range(name)


def span(name: str) -> AbstractContextManager[None]:
    """A range around a piece of work. Names come from a small fixed set, so they are made once and kept."""
    if torch.compiler.is_compiling():
        return _NOTHING
    if torch.autograd.profiler._is_profiler_enabled:  # torch's own flag for exactly this question
        return torch.profiler.record_function(f"helios: {name}")
    return _range(name) if ENABLED else _NOTHING


def chunk_span(index: int) -> AbstractContextManager[None]:
    """The range of one chunk, by its number, so that a profiler can wait for it."""
    return span(f"chunk {index}" if index < _CHUNKS_NAMED else "chunk")
