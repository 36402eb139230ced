"""Stand-ins for CUDA graphs: whatever was not copied into the fixed buffers shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helios_engine.engine.recorders import record_pieces
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.mesh import Traffic

Work = Callable[[], tuple[Tensor, ...]]


class Rerun:
    """A replay is the recorded work once more, its results put where the first ones are."""

    def __init__(self, traffic: Traffic | None = None) -> None:
        """Work that is done once more would be counted in the traffic once more."""
        self.num_recordings = 0
        self.num_replays = 0
        self._traffic = traffic or Traffic()

    def has_room(self, num_bytes: int) -> bool:
        return True

    def warm_up(self, work: Work) -> None:
        work()

    def record(self, work: Work) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        self.num_recordings += 1
        outputs = tuple(torch.full_like(output, float("nan")) for output in work())

        def replay() -> None:
            self.num_replays += 1
            with self._traffic.apart():
                again = work()
            for output, result in zip(outputs, again, strict=True):
                output.copy_(result)

        return replay, outputs


class Unfaithful(Rerun):
    """Recordings that cannot be made, or whose replays miss what was copied in."""

    def __init__(self, kind: str, traffic: Traffic | None = None) -> None:
        super().__init__(traffic)
        self._kind = kind

    def warm_up(self, work: Work) -> None:
        if self._kind == "has no room":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        super().warm_up(work)

    def record(self, work: Work) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        first = [output.clone() for output in work()]
        if self._kind == "refuses":
            raise RuntimeError("operation not permitted when stream is capturing")
        outputs = tuple(output.clone() for output in first)

        def replay() -> None:
            with self._traffic.apart():
                again = first if self._kind == "is stale" else work()
            for place, (output, result) in enumerate(zip(outputs, again, strict=True)):
                spoils = self._kind == "is another" or (self._kind == "misses the last" and place == len(outputs) - 1)
                output.copy_(result * float("nan") if spoils else result)

        return replay, outputs


class Tape(TorchDispatchMode):
    """What a CUDA graph is to a GPU: every operation with the very tensors it was called with, and nothing of the program
    around them. A number read back to the host is refused."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = str(func), kwargs or {}
        if "_local_scalar_dense" in name:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = func(*args, **kwargs)
        sources = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        fresh = [isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in sources for x in tree_leaves(results)]
        is_view = bool(tree_leaves(results)) and not any(fresh) and not func._schema.is_mutable
        if "empty" not in name and not is_view:
            self._operations.append(lambda: self._again(func, args, kwargs, results, fresh))
        return results

    def _again(self, func, args, kwargs, results, fresh: list[bool]) -> None:
        for kept, result, is_fresh in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), fresh, strict=True):
            if is_fresh:
                kept.copy_(result)

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)

    def replay(self) -> None:
        for operation in self._operations:
            operation()


class TapeRecorder(Rerun):
    """Replays operations and not the program, in pieces between the exchanges of a context where there is one."""

    def __init__(self, context: ContextParallel | None = None) -> None:
        super().__init__()
        self._context = context or ContextParallel.single()
        self.num_pieces = 0

    def record(self, work: Work) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        self.num_recordings += 1

        def piece() -> Tape:
            self.num_pieces += 1
            return Tape()

        play, outputs = record_pieces(self._context, piece, work, borrowed=lambda x: x)

        def replay() -> None:
            self.num_replays += 1
            play()

        return replay, outputs
