"""cuBLASLt through its C interface: one product with its candidate algorithms. torch takes the first candidate unseen.

Source: the cuBLAS library's documentation, chapter cuBLASLt; numbers of enumerators as in its header.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
_FLOAT, _COMPUTE_32F = 0, 68
_OP_N, _OP_T = 0, 1
_DESC_TRANS_A, _DESC_TRANS_B, _DESC_EPILOGUE, _DESC_BIAS = 3, 4, 7, 8
_EPILOGUE_BIAS, _EPILOGUE_GELU_BIAS = 4, 36
_PREFERENCE_WORKSPACE, _PREFERENCE_REDUCTIONS, _PREFERENCE_ALIGNMENTS = 1, 3, (5, 6, 7, 8)
# Sums of parts only in the accumulator's precision: rounding parts to 16 bits first would be another result.
_REDUCTION_COMPUTE_TYPE = 2
ALIGNMENT = 16  # bytes that every pointer is aligned to


class _HeuristicResult(ctypes.Structure):
    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What cuBLASLt calls an algorithm with all its settings; of use to the version of the library that named it."""

    words: tuple[int, ...]  # eight of 64 bits
    workspace: int  # bytes it needs


@dataclass(frozen=True, slots=True)
class Shape:
    """out [rows, columns] = x [rows, inner] weight [columns, inner]^T + bias, through tanh-GELU or not."""

    rows: int
    inner: int
    columns: int
    stride: int  # elements from one row of x to the next
    dtype: torch.dtype
    gelu: bool


class CublasLt:
    """The library on the current device."""

    def __init__(self, name: str) -> None:
        """Raises OSError where there is no such library, RuntimeError where it cannot be used."""
        self._library = ctypes.CDLL(name)
        self._library.cublasLtGetVersion.restype = ctypes.c_size_t
        self._handle = ctypes.c_void_p()
        self.call("cublasLtCreate", ctypes.byref(self._handle))

    @property
    def version(self) -> int:
        return self._library.cublasLtGetVersion()

    @property
    def handle(self) -> ctypes.c_void_p:
        return self._handle

    def call(self, name: str, *arguments: object) -> None:
        """One function; RuntimeError when it does not succeed."""
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with status {status}")

    def close(self) -> None:
        """Let go of it; it can be closed again."""
        if self._handle:
            self.call("cublasLtDestroy", self._handle)
            self._handle = ctypes.c_void_p()


class Product:
    """A product of one shape; its operands come with every call."""

    def __init__(self, library: CublasLt, shape: Shape) -> None:
        self._library = library
        number = _TYPES[shape.dtype]
        self._description = self._made("cublasLtMatmulDescCreate", ctypes.c_int(_COMPUTE_32F), ctypes.c_int(_FLOAT))
        # Columns first, as the library sees memory: out^T [columns, rows] = weight x^T.
        self._describe(_DESC_TRANS_A, ctypes.c_int32(_OP_T))
        self._describe(_DESC_TRANS_B, ctypes.c_int32(_OP_N))
        self._describe(_DESC_EPILOGUE, ctypes.c_uint32(_EPILOGUE_GELU_BIAS if shape.gelu else _EPILOGUE_BIAS))
        self._weight = self._layout(number, shape.inner, shape.columns, shape.inner)
        self._x = self._layout(number, shape.inner, shape.rows, shape.stride)
        self._out = self._layout(number, shape.columns, shape.rows, shape.columns)
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)

    def candidates(self, bias: int, *, count: int, workspace: int) -> list[Algorithm]:
        """At most count algorithms that need no more than workspace bytes, the likeliest first; bias is an address."""
        preference = self._made("cublasLtMatmulPreferenceCreate")
        settings = [(_PREFERENCE_WORKSPACE, ctypes.c_uint64(workspace))]
        settings.append((_PREFERENCE_REDUCTIONS, ctypes.c_uint32(_REDUCTION_COMPUTE_TYPE)))
        settings += [(attribute, ctypes.c_uint32(ALIGNMENT)) for attribute in _PREFERENCE_ALIGNMENTS]
        results, found = (_HeuristicResult * count)(), ctypes.c_int(0)
        try:
            for attribute, value in settings:
                self._set("cublasLtMatmulPreferenceSetAttribute", preference, attribute, value)
            self._describe(_DESC_BIAS, ctypes.c_void_p(bias))
            self._library.call(
                "cublasLtMatmulAlgoGetHeuristic",
                *(self._library.handle, self._description, self._weight, self._x, self._out, self._out, preference),
                *(ctypes.c_int(count), results, ctypes.byref(found)),
            )
        finally:
            self._library.call("cublasLtMatmulPreferenceDestroy", preference)
        usable = [result for result in results[: found.value] if result.state == 0]
        return [Algorithm(tuple(result.algorithm), result.workspace) for result in usable]

    def run(
        self, weight: int, x: int, bias: int, out: int, words: Sequence[int], workspace: tuple[int, int], stream: int
    ) -> None:
        """Enqueue the product on a stream; all operands are addresses, workspace is (address, bytes)."""
        self._describe(_DESC_BIAS, ctypes.c_void_p(bias))
        self._library.call(
            "cublasLtMatmul",
            *(self._library.handle, self._description, ctypes.byref(self._one)),
            *(ctypes.c_void_p(weight), self._weight, ctypes.c_void_p(x), self._x, ctypes.byref(self._zero)),
            *(ctypes.c_void_p(out), self._out, ctypes.c_void_p(out), self._out, (ctypes.c_uint64 * 8)(*words)),
            *(ctypes.c_void_p(workspace[0]), ctypes.c_size_t(workspace[1]), ctypes.c_void_p(stream)),
        )

    def close(self) -> None:
        """Let go of what describes the product."""
        self._library.call("cublasLtMatmulDescDestroy", self._description)
        for layout in (self._weight, self._x, self._out):
            self._library.call("cublasLtMatrixLayoutDestroy", layout)

    def _layout(self, number: int, rows: int, columns: int, stride: int) -> ctypes.c_void_p:
        sizes = (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride))
        return self._made("cublasLtMatrixLayoutCreate", ctypes.c_int(number), *sizes)

    def _made(self, name: str, *arguments: object) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._library.call(name, ctypes.byref(made), *arguments)
        return made

    def _describe(self, attribute: int, value: object) -> None:
        self._set("cublasLtMatmulDescSetAttribute", self._description, attribute, value)

    def _set(self, name: str, target: ctypes.c_void_p, attribute: int, value: object) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._library.call(name, target, ctypes.c_int(attribute), ctypes.byref(value), size)
