"""Linear layers with the fastest algorithm for their shape, found by trying when a shape first comes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from helios_engine.ops import native
from helios_engine.ops.cublaslt import ALIGNMENT, Algorithm, CublasLt, Product, Shape

logger = logging.getLogger(__name__)
_CANDIDATES = 8
_WORKSPACE = 32 * 2**20  # bytes, as torch has on Hopper
_GAIN = 0.98  # of torch's own time: less is noise
_TOLERANCE = 1e-2  # relative; a wrong algorithm is far off, another order of sums is not
_DTYPES = (torch.bfloat16, torch.float16)
Known = Mapping[str, tuple[tuple[int, ...], int] | None]


class Bench(Protocol):
    """Where products run and how long they take there."""

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Inside, this device is the current one."""

    def stream(self, device: torch.device) -> int:
        """Address of the current stream."""

    def is_recording(self) -> bool:
        """Whether what is enqueued is recorded and not done, so that nothing can be tried."""

    def seconds(self, works: list[Callable[[], object]]) -> list[float]:
        """Time that each of several works takes, measured in turns."""


class CudaBench:
    """The current stream and events on it."""

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        is_current = torch.cuda.current_device() == device.index
        return contextlib.nullcontext() if is_current else torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def is_recording(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def seconds(self, works: list[Callable[[], object]]) -> list[float]:
        best = [float("inf")] * len(works)
        for _ in range(4):  # the first round warms up; rounds share what the clock does meanwhile
            for place, work in enumerate(works):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(3):
                    work()
                end.record()
                end.synchronize()
                best[place] = min(best[place], start.elapsed_time(end) / 3e3)
        return best


class TunedGemms:
    """x weight^T + bias. A shape that comes for the first time is tried with the algorithms cuBLASLt names for it, each held
    against torch's numbers and time; torch's own stays where none is faster. Choices are remembered by the caller.
    """

    def __init__(self, library: CublasLt, bench: Bench, *, known: Known, keep: Callable[[Known], None]) -> None:
        """known are the choices of an earlier run, by shape; keep is handed all choices after a new one."""
        self._library, self._bench, self._keep = library, bench, keep
        self._known = dict(known)
        self._products: dict[Shape, tuple[Product, Algorithm] | None] = {}
        self._workspaces: dict[tuple[torch.device, int], Tensor] = {}

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False, out: Tensor | None = None
    ) -> Tensor:
        """[..., columns] for x [..., inner], through tanh-GELU where that is wanted; as ops.linear_gelu rounds.

        out takes the result without GELU.
        """
        if out is not None and not (out.is_contiguous() and out.data_ptr() % ALIGNMENT == 0):
            return native.linear(x, weight, bias, out=out)
        shape = _shape_of(x, weight, bias, gelu)
        if shape is None:
            return _own(x, weight, bias, gelu, out)
        with self._bench.on(x.device):
            if shape not in self._products:
                if self._bench.is_recording():
                    return _own(x, weight, bias, gelu, out)
                self._products[shape] = self._chosen(shape, x, weight, bias)
            found = self._products[shape]
            if found is None or not self._has_workspace(found[1], x):
                return _own(x, weight, bias, gelu, out)
            return self._run(*found, shape, x, weight, bias, out)

    @property
    def choices(self) -> Known:
        """Shape -> (an algorithm's words, its workspace), or None for torch's own."""
        return self._known

    def close(self) -> None:
        """Let go of the library, which waits for the device; it can be closed again."""
        found = [found[0] for found in self._products.values() if found is not None]
        self._products.clear()
        self._workspaces.clear()
        for part in (*found, self._library):
            try:
                part.close()
            except RuntimeError as error:  # after an error of the device everything fails; the first one is known
                logger.warning("cuBLASLt could not be closed: %s", error)

    def _run(
        self,
        product: Product,
        algorithm: Algorithm,
        shape: Shape,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        if out is None:
            out = x.new_empty(*x.shape[:-1], shape.columns)
        stream, workspace = self._bench.stream(x.device), (0, 0)
        if algorithm.workspace:
            workspace = (self._workspaces[x.device, stream].data_ptr(), _WORKSPACE)
        operands = (weight.data_ptr(), x.data_ptr(), bias.data_ptr(), out.data_ptr())
        product.run(*operands, algorithm.words, workspace, stream)
        return out

    def _has_workspace(self, algorithm: Algorithm, x: Tensor) -> bool:
        """Make it where it is missing; products on different streams may run at the same time, so each has its own."""
        place = (x.device, self._bench.stream(x.device))
        if algorithm.workspace and place not in self._workspaces:
            if self._bench.is_recording():
                return False  # its memory would be the recording's
            self._workspaces[place] = x.new_empty(_WORKSPACE, dtype=torch.uint8)
        return True

    def _chosen(self, shape: Shape, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Product, Algorithm] | None:
        product, best = Product(self._library, shape), None
        try:
            best = self._settled(product, shape, x, weight, bias)
        except torch.OutOfMemoryError:
            logger.warning("%s: there is no memory to try algorithms; torch's own stays for now", _name(shape))
        if best is None:
            product.close()
            return None
        return product, best

    def _settled(self, product: Product, shape: Shape, x: Tensor, weight: Tensor, bias: Tensor) -> Algorithm | None:
        """As an earlier run found, if that still works, else by trying; None for torch's own."""
        name = _name(shape)
        choice = self._known.get(name)
        if choice is None and name in self._known:
            return None
        if not torch.isfinite(_own(x, weight, bias, shape.gelu).sum(dtype=torch.float32)):
            return None  # nothing can be compared; another process may try again
        if choice is not None:
            if self._is_right(Algorithm(*choice), product, shape, x, weight, bias):
                return Algorithm(*choice)
            logger.warning("%s: the algorithm kept from an earlier run does not work and is chosen anew", name)
        best = self._tried(product, shape, x, weight, bias)
        self._known[name] = None if best is None else (best.words, best.workspace)
        self._keep(self._known)
        return best

    def _is_right(
        self, algorithm: Algorithm, product: Product, shape: Shape, x: Tensor, weight: Tensor, bias: Tensor
    ) -> bool:
        """Whether it runs and has torch's numbers."""
        self._has_workspace(algorithm, x)
        try:
            out = self._run(product, algorithm, shape, x, weight, bias)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as reason:
            logger.debug("%s: a candidate does not run: %s", _name(shape), reason)
            return False
        return _relative_error(out, _own(x, weight, bias, shape.gelu)) <= _TOLERANCE  # NaN is none

    def _tried(self, product: Product, shape: Shape, x: Tensor, weight: Tensor, bias: Tensor) -> Algorithm | None:
        try:
            candidates = product.candidates(bias.data_ptr(), count=_CANDIDATES, workspace=_WORKSPACE)
        except RuntimeError as reason:  # also where it knows none
            logger.info("%s: cuBLASLt names no algorithm: %s", _name(shape), reason)
            candidates = []
        right = [a for a in candidates if self._is_right(a, product, shape, x, weight, bias)]
        works = [lambda a=a: self._run(product, a, shape, x, weight, bias) for a in right]
        own, *times = self._bench.seconds([lambda: _own(x, weight, bias, shape.gelu), *works])
        best = min(zip(times, right, strict=True), key=lambda pair: pair[0], default=None)
        if best is None or best[0] > _GAIN * own:
            logger.info("%s: torch's own algorithm, %.3f ms", _name(shape), 1e3 * own)
            return None
        logger.info("%s: %.3f ms, torch's own algorithm takes %.3f", _name(shape), 1e3 * best[0], 1e3 * own)
        return best[1]


def _own(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, out: Tensor | None = None) -> Tensor:
    return native.linear_gelu(x, weight, bias) if gelu else native.linear(x, weight, bias, out=out)


def _shape_of(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Shape | None:
    """None for what is torch's alone: other dtypes, rows that are not evenly spaced, odd addresses, nothing at all."""
    if x.dtype not in _DTYPES or not x.numel() or not weight.is_contiguous() or x.stride(-1) != 1:
        return None
    rows = x.numel() // x.size(-1)
    stride = x.size(-1) if x.is_contiguous() else x.stride(-2)
    if not x.is_contiguous() and rows != x.size(-2):  # several videos, each a part of its rows
        return None
    odd = [t for t in (x, weight, bias) if t.data_ptr() % ALIGNMENT]
    if odd or stride * x.element_size() % ALIGNMENT or weight.size(0) * x.element_size() % ALIGNMENT:
        return None
    if gelu and not native.epilogue_is_tanh(x.device):
        return None  # bias and GELU are two steps there, and another's epilogue would not do
    return Shape(rows, x.size(-1), weight.size(0), stride, x.dtype, gelu)


def _name(shape: Shape) -> str:
    gelu = " gelu" if shape.gelu else ""
    return f"{shape.rows}x{shape.inner}x{shape.columns} every {shape.stride} {str(shape.dtype)[6:]}{gelu}"


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of the whole, some rows at a time: in float32 the largest products would take gigabytes."""
    difference = expected.new_zeros((), dtype=torch.float64)
    size = torch.zeros_like(difference)
    for ours, theirs in zip(actual.flatten(0, -2).split(512), expected.flatten(0, -2).split(512), strict=True):
        difference += (ours.float() - theirs.float()).square().sum()
        size += theirs.float().square().sum()
    return (difference / size.clamp_min(1e-24)).sqrt().item()
