"""Process group and device from torchrun's environment; the only place that starts either."""

from __future__ import annotations

import datetime
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import distributed as dist

from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.mesh import Degrees
from helios_engine.parallel.watch import Watch
from helios_engine.settings import ParallelConfig

T = TypeVar("T")
_JOIN_TIMEOUT = datetime.timedelta(minutes=10)  # ranks import torch at different speeds


def world_size() -> int:
    """Ranks that torchrun started, 1 outside it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def own_device(name: str) -> str:
    """This rank's device: under torchrun "cuda" and "auto" become the local rank's GPU."""
    if world_size() == 1 or name == "cpu":
        return name
    if ":" in name:
        raise ValueError(f"several ranks take a GPU each, so device {name} cannot be meant; use --device cuda")
    if name == "auto" and not torch.cuda.is_available():
        return "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def check_gpus(num_ranks: int) -> None:
    """Raise ValueError when this machine has fewer GPUs than ranks."""
    count = torch.cuda.device_count()
    if num_ranks > count:
        raise ValueError(
            f"{num_ranks} ranks need {num_ranks} GPUs here, but this torch sees {count}; use fewer or device cpu"
        )


class Meeting:
    """The ranks torchrun started, before they have a process group: they meet at its store.

    Outside torchrun, or with one rank, it is a meeting of one and starts nothing.
    """

    def __init__(self) -> None:
        self._store: dist.Store | None = None
        self._watch: Watch | None = None

    def agreed(self, prepare: Callable[[], T], facts: Callable[[T], Mapping[str, str]]) -> T:
        """What prepare returns, when it works on every rank and the facts are equal; see Watch.agreed."""
        if world_size() == 1:
            return prepare()
        if self._watch is None:
            board = dist.PrefixStore("helios/meeting", self._join())
            self._watch = Watch(board, own_rank(), world_size(), timeout=None, on_failure=lambda: None)
        return self._watch.agreed(prepare, facts)

    def start(self, config: ParallelConfig, *, device: str, guided: bool) -> ContextParallel:
        """The ranks' context, the process group initialised: NCCL on GPUs, gloo on the CPU.

        guided says whether there are two guidance branches to share out. Raises ValueError, before any communication,
        when the degrees do not fit the number of ranks.
        """
        degrees = choose_degrees(config, world_size(), guided=guided)
        if world_size() == 1:
            return ContextParallel.single()
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            store=dist.PrefixStore("helios/group", self._join()),
            rank=own_rank(),
            world_size=world_size(),
            device_id=None if device == "cpu" else torch.device(device),
        )
        context = ContextParallel.from_process_group(degrees, rank_timeout=config.rank_timeout)
        assert context is not None, "every rank of the default group takes part"
        return context

    def _join(self) -> dist.Store:
        """The store of torchrun's environment; it stays open, since whoever hosts it holds it up for all."""
        if self._store is None:
            from torch.distributed.rendezvous import rendezvous

            where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            try:
                self._store, _, _ = next(rendezvous("env://", timeout=_JOIN_TIMEOUT))
            except (RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"rank {own_rank()} cannot meet the others at {where} (MASTER_ADDR:MASTER_PORT): {reason[:200]}; "
                    "is the port taken by another run? torchrun --master-port chooses another one"
                ) from None
        return self._store


def from_torchrun(config: ParallelConfig, *, device: str, guided: bool) -> ContextParallel:
    """Meeting().start: the ranks torchrun started, a single process outside it."""
    return Meeting().start(config, device=device, guided=guided)


def choose_degrees(config: ParallelConfig, num_ranks: int, *, guided: bool) -> Degrees:
    """The degrees for a number of ranks, those left open filled in. Raises ValueError when they do not fit."""
    return Degrees.choose(
        num_ranks, guided=guided, ulysses=config.ulysses_degree, ring=config.ring_degree, cfg=config.cfg_degree
    )


def stop() -> None:
    """Take the process group down again, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def start_ranks(num_ranks: int, arguments: Sequence[str]) -> int:
    """Run the same command line on num_ranks processes of this machine through torchrun's own launcher.

    Returns 0, or the exit code of the rank that failed first (1 when a signal ended it). Raises KeyboardInterrupt when
    this process is told to stop; the ranks have ended by then.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the ranks speak for themselves
    # Writing the end of a long video takes a while after an interrupt; ranks that hang are the watch's business.
    patience = {"shutdown_timeout": 600} if "shutdown_timeout" in LaunchConfig.__dataclass_fields__ else {}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"helios-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.1,
        **patience,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "helios_engine.cli", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException:
        raise KeyboardInterrupt from None
    return 0
