"""Several ranks on one device, for gpu_check.py: are the numbers those of one rank, and what does one rank's share cost?

NCCL refuses two ranks on one GPU, so real ranks talk over gloo through host memory and are not timed. The share of a P-rank
forward is timed alone, with every exchange replaced by a copy of as many bytes on the device; packing runs as it would.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from helios_engine.config import LATENT_FRAMES_PER_CHUNK, ModelConfig
from helios_engine.model.context import ChunkContext
from helios_engine.model.embed import HistoryWindow
from helios_engine.model.transformer import Transformer, init_random_
from helios_engine.ops.attention import choose_attention
from helios_engine.parallel.context import ContextParallel, Pending
from helios_engine.parallel.mesh import Degrees

TOLERANCE = 1e-3  # float32, two layers; matrix products of other shapes sum in another order
SCHEMES = {2: Degrees(2), 4: Degrees(2, 2)}
SHARES = (2, 4, 8)


class Loopback(ContextParallel):
    """Rank 0 of P Ulysses ranks, alone: what would arrive is a copy of as much of what it sends, or of itself."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__(0, Degrees(num_ranks))

    def start_all_to_all(
        self, send: Tensor, *, send_counts: list[int], receive_counts: list[int], purpose: str, group: str
    ) -> Pending:
        received = _repeated(send, sum(receive_counts))
        return _Arrived(received)

    def gather_rows(self, rows_BnC: Tensor, counts: Sequence[int], purpose: str, *, group: str = "sequence") -> Tensor:
        batch, _, width = rows_BnC.shape
        return _repeated(rows_BnC.reshape(-1), batch * sum(counts) * width).view(batch, -1, width)


class _Arrived:
    """A collective that is over."""

    def __init__(self, received: Tensor) -> None:
        self._received = received

    def wait(self) -> Tensor:
        return self._received


def _repeated(source: Tensor, count: int) -> Tensor:
    received = source.new_empty(count)
    for start in range(0, count, source.numel()):
        part = received[start : start + source.numel()]
        part.copy_(source[: part.numel()])
    return received


def share_times(
    transformer: Transformer,
    stage_sizes: Sequence[tuple[int, int]],
    prepare: Callable[[], ChunkContext],
    time_call: Callable[[Callable[[], object]], float],
) -> dict[str, object]:
    """Milliseconds of rank 0's share of one forward, by stage and number of ranks; the transformer is reconnected."""
    result: dict[str, object] = {"includes_packing": True}
    weight = transformer.project_out.weight
    attention, single = transformer.attention, transformer.parallel
    for num_ranks in SHARES:
        transformer.connect(attention, Loopback(num_ranks))
        context = prepare()
        for size in stage_sizes:
            shape = (1, transformer.config.in_channels, LATENT_FRAMES_PER_CHUNK, *size)
            latents = torch.randn(shape, device=weight.device, dtype=weight.dtype)
            tokens = LATENT_FRAMES_PER_CHUNK * (size[0] // 2) * (size[1] // 2)
            seconds = time_call(lambda x=latents, c=context: transformer(x, 500.0, c))
            result[f"share_ms_{tokens}+{context.total_history}_p{num_ranks}"] = 1e3 * seconds
    transformer.connect(attention, single)
    return result


def sharded_against_one(config: ModelConfig, size: tuple[int, int], device: torch.device) -> dict[str, float]:
    """Largest difference of a two-layer float32 forward on 2 and 4 processes of one device from one process.

    Raises RuntimeError above the tolerance.
    """
    small = replace(config, num_layers=2)
    expected = _forward(ContextParallel.single(), small, size, device)
    result = {"largest_value": expected.abs().max().item()}
    for num_ranks, degrees in SCHEMES.items():
        with tempfile.TemporaryDirectory() as folder:
            spawn = multiprocessing.get_context("spawn")
            arguments = (degrees, small, size, str(device), folder)
            ranks = [spawn.Process(target=_rank, args=(rank, *arguments)) for rank in range(num_ranks)]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join()
            if any(rank.exitcode for rank in ranks):
                raise RuntimeError(f"{degrees.describe()}: exit codes {[rank.exitcode for rank in ranks]}")
            difference = max(
                (torch.load(Path(folder) / f"{rank}.pt") - expected).abs().max().item() for rank in range(num_ranks)
            )
        result[f"difference_{num_ranks}_ranks"] = difference
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{degrees.describe()} differs from one rank by {difference}, more than {TOLERANCE}")
    return result


def _rank(rank: int, degrees: Degrees, config: ModelConfig, size: tuple[int, int], device: str, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", degrees.num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=degrees.num_ranks)
    context = ContextParallel.from_process_group(degrees, rank_timeout=None)
    result = _forward(context, config, size, torch.device(device))
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@torch.no_grad()
def _forward(parallel: ContextParallel, config: ModelConfig, size: tuple[int, int], device: torch.device) -> Tensor:
    """The velocity rows of a random model at a quarter of the size, on the CPU."""
    with torch.device("meta"):
        transformer = Transformer(config, torch.float32)
    transformer.to_empty(device=device)
    init_random_(transformer, 0)
    attention = choose_attention("auto", device=device, dtype=torch.float32, head_dim=config.attention_head_dim)
    transformer.connect(attention, parallel)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    frames = {"long": 16, "mid": 2, "short": 2}
    window = HistoryWindow(**{name: normal(1, 16, count, *size) for name, count in frames.items()})
    text = transformer.encode_text(normal(1, 32, config.text_dim))
    latents = normal(1, 16, LATENT_FRAMES_PER_CHUNK, size[0] // 4, size[1] // 4)
    return transformer(latents, 700.0, transformer.prepare(window, (text,)))[0].cpu()
