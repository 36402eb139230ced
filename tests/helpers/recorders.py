"""Stand-ins for CUDA graphs: whatever was not copied into the fixed buffers shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Work = Callable[[], tuple[Tensor, ...]]


class Rerun:
    """A replay is the recorded work once more, its results put where the first ones are."""

    def __init__(self) -> None:
        self.num_recordings = 0
        self.num_replays = 0

    def warm_up(self, work: Work) -> None:
        work()

    def record(self, work: Work) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        self.num_recordings += 1
        outputs = tuple(torch.full_like(output, float("nan")) for output in work())

        def replay() -> None:
            self.num_replays += 1
            for output, again in zip(outputs, work(), strict=True):
                output.copy_(again)

        return replay, outputs


class Unfaithful(Rerun):
    """Recordings that cannot be made, or whose replays miss what was copied in."""

    def __init__(self, kind: str) -> None:
        super().__init__()
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
            again = first if self._kind == "is stale" else work()
            for place, (output, result) in enumerate(zip(outputs, again, strict=True)):
                spoils = self._kind == "is another" or (self._kind == "misses the last" and place == len(outputs) - 1)
                output.copy_(result * float("nan") if spoils else result)

        return replay, outputs
