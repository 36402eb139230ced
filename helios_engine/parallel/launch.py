"""Process group and device from torchrun's environment; the only place that starts either."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch
from torch import distributed as dist

from helios_engine.config import ParallelConfig
from helios_engine.parallel.context import ContextParallel, Degrees


def world_size() -> int:
    """Ranks that torchrun started, 1 outside it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """True for the process that talks to the user."""
    return os.environ.get("RANK", "0") == "0"


def own_device(name: str) -> str:
    """This rank's device: under torchrun "cuda" and "auto" become the local rank's GPU."""
    if world_size() == 1 or name == "cpu" or ":" in name:
        return name
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


def from_torchrun(config: ParallelConfig, *, device: str, guided: bool) -> ContextParallel:
    """The ranks torchrun started, their process group initialised: NCCL on GPUs, gloo on the CPU.

    Outside torchrun this is a single process and starts nothing. guided says whether there are two guidance branches
    to share out. Raises ValueError, before any communication, when the degrees do not fit the number of ranks.
    """
    num_ranks = world_size()
    degrees = choose_degrees(config, num_ranks, guided=guided)
    if num_ranks == 1:
        return ContextParallel.single()
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, device_id=None if device == "cpu" else torch.device(device))
    context = ContextParallel.from_process_group(degrees)
    assert context is not None, "every rank of the default group takes part"
    return context


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
    """Run the same command line on num_ranks processes of this machine through torchrun; returns its exit code."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks)), **os.environ}
    return subprocess.run([*launcher, "-m", "helios_engine.cli", *arguments], env=environment, check=False).returncode
