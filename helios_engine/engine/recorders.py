"""What records a step and replays it: CUDA graphs, one for the whole step or one for each piece between two exchanges."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from helios_engine.parallel.context import ContextParallel

logger = logging.getLogger(__name__)
Work = Callable[[], tuple[Tensor, ...]]
_SAMPLE = 256  # elements that the start-up test exchanges with every member of a group


class Recorder(Protocol):
    """Records work on fixed buffers and replays it."""

    def has_room(self, num_bytes: int) -> bool:
        """Whether so much is likely to be left beside all that runs."""

    def warm_up(self, work: Work) -> None:
        """Do the work for real, so that what happens in first calls alone is over."""

    def record(self, work: Work) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """(replay, the outputs every replay overwrites)."""


class CudaRecorder:
    """CUDA graphs that share one memory pool: they never run at the same time."""

    def __init__(self, device: torch.device, *, between_exchanges_of: ContextParallel | None = None) -> None:
        """With a context, its exchanges stay outside: a graph for each piece between two of them."""
        self._device, self._context = device, between_exchanges_of
        with torch.cuda.device(device):
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self._broken: list[torch.cuda.CUDAGraph] = []  # kept for good: allocators may still ask what became of them

    def has_room(self, num_bytes: int) -> bool:
        free, _ = torch.cuda.mem_get_info(self._device)
        held, kept = torch.cuda.memory_allocated(self._device), torch.cuda.memory_reserved(self._device)
        # What else runs may hold as much as was ever held.
        return free + kept - held > num_bytes + torch.cuda.max_memory_allocated(self._device) - held

    def warm_up(self, work: Work) -> None:
        with torch.cuda.device(self._device):  # the one that captures, whichever the caller's is
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                work()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Work) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        with torch.cuda.device(self._device):
            stream, graphs = torch.cuda.current_stream(), []
            record = self._record_whole if self._context is None else self._record_pieces
            try:
                return record(work, graphs)
            except BaseException:
                self._broken += graphs
                self._end_allocating()
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own
                self._end_drawing()
                raise
            finally:
                torch.cuda.set_stream(stream)

    def _end_allocating(self) -> None:
        """A capture that breaks off leaves torch's allocator in its pool: capture_end raises before it is taken out."""
        index = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)  # raises where it was taken out
            torch._C._cuda_releasePool(index, self._pool)

    def _end_drawing(self) -> None:
        """A capture that breaks off leaves the default generator in capture state, and torch.randn refuses from then on:
        capture_end raises before it comes to generators. A capture that ends well takes it out again."""
        graphs: list[torch.cuda.CUDAGraph] = []
        try:
            self._record_whole(lambda: (torch.zeros(1, device=self._device),), graphs)
        except RuntimeError as error:  # the first error is the one that counts
            logger.warning("random numbers may be refused on %s from now on: %s", self._device, error)
        self._broken += graphs

    def _record_whole(
        self, work: Work, graphs: list[torch.cuda.CUDAGraph]
    ) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        graph = torch.cuda.CUDAGraph()
        graphs.append(graph)
        # Other threads (a copier, the watch) may talk to the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = work()
        return graph.replay, outputs

    def _record_pieces(
        self, work: Work, graphs: list[torch.cuda.CUDAGraph]
    ) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        torch.cuda.synchronize()  # as torch.cuda.graph does, once for all pieces
        gc.collect()
        torch.cuda.empty_cache()
        with torch.cuda.stream(self._stream):
            return record_pieces(self._context, lambda: _CudaPiece(self._pool, graphs), work, borrowed=borrowed)


class Piece(Protocol):
    """Records what is computed between begin and end."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def replay(self) -> None: ...


class _CudaPiece:
    def __init__(self, pool: tuple[int, int], graphs: list[torch.cuda.CUDAGraph]) -> None:
        self._pool, self._graph = pool, torch.cuda.CUDAGraph()
        graphs.append(self._graph)

    def begin(self) -> None:
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # two exchanges in a row
            self._graph.capture_end()

    def replay(self) -> None:
        self._graph.replay()


class _Cuts:
    """Ends one piece and begins the next wherever ranks exchange; see parallel/exchange.py."""

    def __init__(self, make_piece: Callable[[], Piece], borrowed: Callable[[Tensor], Tensor]) -> None:
        self._make_piece, self.borrowed = make_piece, borrowed
        self.parts: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        self._begin()
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the first error says more
                self._piece.end()
            raise
        self._end()

    def between(self, work: Callable[[], None]) -> None:
        self._end()
        self.parts.append(work)
        self._begin()

    def replay(self) -> None:
        for part in self.parts:
            part()

    def _begin(self) -> None:
        self._piece = self._make_piece()
        self._piece.begin()

    def _end(self) -> None:
        self._piece.end()
        self.parts.append(self._piece.replay)


def record_pieces(
    context: ContextParallel, make_piece: Callable[[], Piece], work: Work, *, borrowed: Callable[[Tensor], Tensor]
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Record work piece by piece between the exchanges of a context; nothing is exchanged meanwhile."""
    cuts = _Cuts(make_piece, borrowed)
    context.cuts = cuts
    try:
        with cuts.recording():
            outputs = work()
    finally:
        context.cuts = None
    return cuts.replay, outputs


class _Memory:
    """A tensor's bytes for torch.as_tensor, which then keeps this object and not the tensor."""

    def __init__(self, x: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (x.nbytes,),
            "typestr": "|u1",
            "data": (x.data_ptr(), False),
            "version": 3,
        }


def borrowed(x: Tensor) -> Tensor:
    """A contiguous GPU tensor's memory without keeping it.

    While graphs are recorded into one pool, memory that is free again serves the pieces that follow; a replay runs
    them in the same order, so between two pieces an address holds what it held when they were recorded.
    """
    if not x.numel():
        return x
    return torch.as_tensor(_Memory(x), device=x.device).view(x.dtype).view(x.shape)


def choose_recorder(
    device: torch.device,
    context: ContextParallel,
    *,
    exchange: str,
    make: Callable[..., Recorder] = CudaRecorder,
) -> Recorder | None:
    """Records steps whole, with several ranks only where their exchanges can be recorded too, else in pieces; None where
    that is not possible either. Collective."""
    whole = make(device)
    if context.size == 1 or (context.exchanges == "nccl" and can_record_exchanges(context, whole, device)):
        return whole
    if exchange != "packed":
        return None
    logger.info("exchanges stay out of recorded steps, which are replayed in pieces between them")
    return make(device, between_exchanges_of=context)


def can_record_exchanges(context: ContextParallel, recorder: Recorder, device: torch.device) -> bool:
    """Whether exchanges between ranks can be part of a recording: tried once at start on small tensors, of every group.

    Collective; all ranks get the same answer. Only where recording worked on all of them is anything replayed.
    """
    sent = torch.zeros(context.size * _SAMPLE, device=device)

    def work() -> tuple[Tensor, ...]:
        return _exchanged(context, sent)

    def fill(turn: int) -> tuple[Tensor, ...]:
        sent.copy_(torch.arange(sent.numel()) + 1000 * context.rank + 7 * turn)
        return tuple(output.clone() for output in work())

    problem, replay, outputs = "", lambda: None, ()
    with context.traffic.apart():
        fill(0)  # what happens in first exchanges alone is over
        try:
            replay, outputs = recorder.record(work)
        except RuntimeError as error:
            problem = " ".join(str(error).split())[:200]
        for turn in (1, 2) if context.all_agree(not problem) else ():
            expected = fill(turn)
            for output in outputs:
                output.zero_()
            replay()
            if not all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True)):
                problem = "a replay delivered something else"
    if context.all_agree(not problem):
        return True
    logger.info("exchanges cannot be recorded: %s", problem or "it does not work on another rank")
    return False


def _exchanged(context: ContextParallel, x: Tensor) -> tuple[Tensor, ...]:
    """What arrives from exchanging a flat tensor in every way that a forward uses, group by group."""
    degrees, arrived = context.degrees, []
    for group, members in (("ulysses", degrees.ulysses), ("ring", degrees.ring)):
        if members > 1:
            counts = [x.numel() // members] * members
            own = x[: sum(counts)]
            arrived.append(
                context.all_to_all(own, send_counts=counts, receive_counts=counts, purpose="test", group=group)
            )
    if context.sequence_size > 1:
        arrived.append(context.gather_rows(x.view(1, -1, 1), [x.numel()] * context.sequence_size, "test"))
    if degrees.cfg > 1:
        arrived += context.exchange_branches(x, "test")
    return tuple(arrived)
