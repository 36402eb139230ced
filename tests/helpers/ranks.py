"""One pool of gloo ranks per test run. Jobs are functions of tests/helpers/rank_jobs.py; ranks never import Diffusers."""

from __future__ import annotations

import multiprocessing
import socket
import time
import traceback
from multiprocessing import connection
from multiprocessing.connection import Connection

POOL_SIZE = 8
_TIMEOUT = 60
_GRACE = 3  # seconds the others get once one rank has failed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, port: int, pipe: Connection) -> None:
    import datetime
    import os

    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from torch import distributed as dist

    from tests.helpers import rank_jobs

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # new_empty comes filled with NaN: what is not written shows
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=POOL_SIZE,
        timeout=datetime.timedelta(seconds=_TIMEOUT),
    )
    while (job := pipe.recv()) is not None:
        name, degrees, arguments = job
        try:
            with torch.no_grad():
                context = rank_jobs.context(degrees)
                result = None if context is None else getattr(rank_jobs, name)(context, **arguments)
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class RankPool:
    """Eight processes; a job runs on the first P of them. A failed job costs the pool; the next one gets a new pool."""

    def __init__(self) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def run(self, name: str, degrees: tuple[int, int, int], **arguments: object) -> list:
        """Results of a job on ulysses x ring x cfg ranks, in rank order. Raises RuntimeError with the ranks' tracebacks."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((name, degrees, arguments))
        replies: dict[int, tuple[bool, object]] = {}
        deadline = time.monotonic() + _TIMEOUT
        while len(replies) < POOL_SIZE and (left := deadline - time.monotonic()) > 0:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in replies}
            for pipe in connection.wait(list(waiting), left):
                replies[waiting[pipe]] = pipe.recv()
                if not replies[waiting[pipe]][0]:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        failed = [f"rank {rank}: {text}" for rank, (fine, text) in sorted(replies.items()) if not fine]
        silent = [f"rank {rank} is silent" for rank in range(POOL_SIZE) if rank not in replies]
        if failed or silent:
            self.kill()
            raise RuntimeError("\n".join(failed[:2] or silent))
        return [replies[rank][1] for rank in range(degrees[0] * degrees[1] * degrees[2])]

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        port = _free_port()
        for rank in range(POOL_SIZE):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
        self.kill()
