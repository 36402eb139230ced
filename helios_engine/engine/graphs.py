"""A forward per stage shape, recorded once and replayed: the host then launches one thing instead of hundreds.

What changes from call to call lives in buffers of fixed address and is copied in before a replay: the latents and the
timestep's rows at every step, history and prompt when they are other ones than last time. The solver's step stays outside, a
single launch whose coefficients are the host's, so callbacks, cancelling and checksums between steps work as ever.

A recording is made on buffers of zeros and its first replay, on the step at hand, is held against a plain forward. Where it
cannot be made, or has other numbers, everything goes on without recordings, and that is said. Recording costs about three
forwards, so a shape has to come often before it is worth it.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from helios_engine.model.context import ChunkContext, StepRows, TextContext
from helios_engine.model.transformer import Transformer

logger = logging.getLogger(__name__)
# One GPU saves about a hundredth of a forward by a replay (estimated from its launches), so three forwards come back late;
# several ranks save more, by evener steps.
USES_BEFORE = 100
_RECORDINGS_KEPT = 24
_SHAPES_COUNTED = 256
_TOLERANCE = 0.01  # relative; libraries may round otherwise while they are recorded, a buffer not filled is far off


class Recorder(Protocol):
    """Records work on fixed buffers and replays it."""

    def warm_up(self, work: Callable[[], tuple[Tensor, ...]]) -> None:
        """Do the work for real, so that what happens in first calls alone is over."""

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """(replay, the outputs every replay overwrites)."""


class CudaRecorder:
    """CUDA graphs that share one memory pool: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def warm_up(self, work: Callable[[], tuple[Tensor, ...]]) -> None:
        with torch.cuda.device(self._device):  # the one that captures, whichever the caller's is
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                work()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        with torch.cuda.device(self._device):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # Other threads (a copier, the watch) may talk to the device meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    outputs = work()
            finally:
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own
        return graph.replay, outputs


@dataclass(slots=True)
class _Recording:
    """One recorded shape: its fixed buffers and whose history they hold."""

    latents: Tensor
    rows: StepRows
    context: ChunkContext
    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]
    texts: tuple[object, ...]  # whose buffers it reads, see ForwardGraphs._texts
    table: Tensor  # of rotations, which it reads where the transformer keeps it
    holds: weakref.ref[ChunkContext] | None = None


class _NotRecorded(Exception):
    """On no rank: all of them know, and go on without."""


class ForwardGraphs:
    """Transformer.forward for latents and contexts of shapes that come again and again; the same numbers.

    Where several ranks exchange inside a forward, their exchanges are recorded with it, and all ranks replay or none.
    """

    def __init__(self, transformer: Transformer, recorder: Recorder, *, uses_before: int = 0) -> None:
        """A shape is recorded after it has come uses_before times."""
        self._transformer, self._recorder, self._uses_before = transformer, recorder, uses_before
        self._uses: Counter[tuple[object, ...]] = Counter()
        self._recordings: dict[tuple[object, ...], _Recording] = {}  # the longest unused first
        # Keys and values of the prompts, one copy for all stages; they change least often and are the largest.
        self._texts: dict[tuple[object, ...], _Texts] = {}
        self.why_given_up: str | None = None

    @property
    def hold_memory(self) -> bool:
        """Whether there is anything to forget."""
        return bool(self._recordings or self._texts)

    def __call__(self, latents: Tensor, timestep: float, context: ChunkContext) -> tuple[Tensor, ...]:
        """One velocity per prompt. They are overwritten by the next call."""
        rows = self._transformer.step_rows(timestep)
        key = (latents.shape, latents.dtype, *_shapes(context))
        if self.why_given_up is None and key in self._recordings:
            found = self._recordings[key] = self._recordings.pop(key)  # to the end: used last
            return self._replay(found, latents, rows, context)
        expected = self._transformer.run(latents, rows, context)
        if self.why_given_up is not None or not self._comes_often(key):
            return expected
        try:
            found = self._record(latents, rows, context)
            self._compare(found, expected, latents, rows, context)
        except _NotRecorded as reason:
            self.give_up(str(reason))
        else:
            self._keep(key, found)
        return expected

    def give_up(self, reason: str) -> None:
        """Go on without recordings for good."""
        self.why_given_up = reason
        self.forget()
        logger.warning("forwards are not recorded as CUDA graphs: %s; the numbers stay the same", reason)

    def _comes_often(self, key: tuple[object, ...]) -> bool:
        if len(self._uses) == _SHAPES_COUNTED:
            self._uses.clear()
        self._uses[key] += 1
        return self._uses[key] > self._uses_before

    def _compare(
        self,
        found: _Recording,
        expected: tuple[Tensor, ...],
        latents: Tensor,
        rows: StepRows,
        context: ChunkContext,
    ) -> None:
        """Raise _NotRecorded unless a replay has a plain forward's numbers."""
        problem = ""
        try:
            outputs = self._replay(found, latents, rows, context)
            errors = [_relative_error(*pair) for pair in zip(outputs, expected, strict=True)]
            if not all(error <= _TOLERANCE for error in errors):  # NaN is no success either
                problem = f"a replay is {', '.join(f'{error:.2g}' for error in errors)} off a plain forward"
        except RuntimeError as reason:
            if self._transformer.parallel.size > 1:
                raise
            problem = _said(reason)
        self._check(not problem, problem)

    def _keep(self, key: tuple[object, ...], found: _Recording) -> None:
        if len(self._recordings) == _RECORDINGS_KEPT:
            dropped = next(iter(self._recordings))
            self._recordings.pop(dropped)
            self._uses[dropped] = 0  # it has to come often once more
        self._recordings[key] = found
        used = {recording.texts for recording in self._recordings.values()}
        self._texts = {texts: buffers for texts, buffers in self._texts.items() if texts in used}

    def _check(self, works: bool, problem: str) -> None:
        """Raise _NotRecorded on every rank when it does not work on one."""
        if not self._transformer.parallel.all_agree(works):
            raise _NotRecorded("it does not work on another rank" if works else problem)

    def _replay(self, found: _Recording, latents: Tensor, rows: StepRows, context: ChunkContext) -> tuple[Tensor, ...]:
        _fill(found, latents, rows, context)
        self._fixed_texts(context).fill(context.texts)
        found.replay()
        return found.outputs

    def forget(self) -> None:
        """Drop all recordings and their memory."""
        self._recordings.clear()
        self._texts.clear()

    def _record(self, latents: Tensor, rows: StepRows, context: ChunkContext) -> _Recording:
        problem, is_warm = "", False
        try:
            step_rows = StepRows(torch.zeros_like(rows.blocks), torch.zeros_like(rows.output))
            blank = _blank(context, self._fixed_texts(context).fixed)
            fixed = _Recording(
                *(torch.zeros_like(latents), step_rows, blank, lambda: None, ()),
                texts=_text_key(context),
                table=self._transformer.chunk_table(latents),
            )

            def work() -> tuple[Tensor, ...]:
                return self._transformer.run(fixed.latents, fixed.rows, fixed.context)

            self._recorder.warm_up(work)
            is_warm = True
            fixed.replay, fixed.outputs = self._recorder.record(work)
        except RuntimeError as error:  # torch's own, out of memory among them
            if self._transformer.parallel.size > 1 and not is_warm:
                raise  # the others wait for this rank in an exchange
            problem = _said(error)
        self._check(not problem, problem)
        return fixed

    def _fixed_texts(self, context: ChunkContext) -> _Texts:
        key = _text_key(context)
        if key not in self._texts:
            self._texts[key] = _Texts(context.texts)
        return self._texts[key]


class _Texts:
    """Prompts of one shape in buffers of fixed address."""

    def __init__(self, texts: tuple[TextContext, ...]) -> None:
        self.fixed = tuple(TextContext(tuple(map(torch.zeros_like, text.keys_values))) for text in texts)
        self._holds: tuple[weakref.ref[Tensor], ...] = ()

    def fill(self, texts: tuple[TextContext, ...]) -> None:
        """Copy other prompts in; the ones that are there already are left alone."""
        wanted = [layer for text in texts for layer in text.keys_values]
        if len(self._holds) == len(wanted) and all(
            kept() is layer for kept, layer in zip(self._holds, wanted, strict=True)
        ):
            return
        for fixed, layer in zip((layer for text in self.fixed for layer in text.keys_values), wanted, strict=True):
            fixed.copy_(layer)
        self._holds = tuple(weakref.ref(layer) for layer in wanted)


def _fill(found: _Recording, latents: Tensor, rows: StepRows, context: ChunkContext) -> None:
    found.latents.copy_(latents)
    found.rows.blocks.copy_(rows.blocks)
    found.rows.output.copy_(rows.output)
    if found.holds is None or found.holds() is not context:
        for fixed, current in zip(_history(found.context), _history(context), strict=True):
            fixed.copy_(current)
        found.holds = weakref.ref(context)


def _history(context: ChunkContext) -> list[Tensor]:
    parts = (context.history_BlD, context.history_rotation, context.first_qkv)
    return [part for part in parts if part is not None]


def _shapes(context: ChunkContext) -> tuple[object, ...]:
    present = tuple(getattr(context, field.name) is None for field in fields(context))
    shapes = tuple(part.shape for part in _history(context))
    return (context.total_history, present, shapes, _text_key(context))


def _text_key(context: ChunkContext) -> tuple[object, ...]:
    return tuple(text.keys_values[0].shape for text in context.texts)


def _blank(context: ChunkContext, texts: tuple[TextContext, ...]) -> ChunkContext:
    parts = (context.history_BlD, context.history_rotation, context.first_qkv)
    return ChunkContext(
        context.total_history, *(None if part is None else torch.zeros_like(part) for part in parts), texts
    )


def _said(error: RuntimeError) -> str:
    return f"it fails ({' '.join(str(error).split())[:200]})"


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.float() - expected.float()).norm()
    return (difference / expected.float().norm().clamp_min(1e-12)).item()


def why_not_graphs(
    device: torch.device, *, exchanges: str, wanted: bool | None, offload: str, approximates: bool, compiles: bool
) -> str | None:
    """Why forwards are not recorded with these settings, or None.

    exchanges is what ranks talk through inside a forward, "" where there is one rank; wanted what the user asked for.
    """
    if wanted is False:
        return "they are switched off"
    if device.type != "cuda":
        return f"only CUDA devices record graphs, this is {device}"
    if exchanges not in ("", "nccl"):
        return f"exchanges through {exchanges} pass through the host"
    if exchanges and not wanted:
        return "with exchanges between ranks they are recorded only when that is asked for"
    if offload != "none":
        return f"with offload {offload} weights change their place"
    if approximates:
        return "an approximation decides on the host what is computed"
    if compiles:
        return "compile has its own way"
    return None
