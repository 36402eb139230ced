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

from benchmarks.gpu_roofline import one_step_stage
from helios_engine.config import LATENT_FRAMES_PER_CHUNK, ModelConfig
from helios_engine.engine.graphs import StepGraphs
from helios_engine.engine.recorders import CudaRecorder
from helios_engine.engine.stage import Stage
from helios_engine.model.context import ChunkContext
from helios_engine.model.embed import HistoryWindow
from helios_engine.model.transformer import Transformer, init_random_
from helios_engine.ops.attention import choose_attention
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.mesh import Degrees

TOLERANCE = 1e-3  # float32, two layers; matrix products of other shapes sum in another order
SCHEMES = {2: Degrees(2), 4: Degrees(2, 2)}
SHARES = (2, 4, 8)


class Loopback(ContextParallel):
    """Rank 0 of P Ulysses ranks, alone: what would arrive is a copy of as much of what it sends, or of itself."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__(0, Degrees(num_ranks))

    def all_to_all(
        self, send: Tensor, *, send_counts: list[int], receive_counts: list[int], purpose: str, group: str = "ulysses"
    ) -> Tensor:
        return _repeated(send, sum(receive_counts))

    def gather_rows(self, rows_BnC: Tensor, counts: Sequence[int], purpose: str, *, group: str = "sequence") -> Tensor:
        batch, _, width = rows_BnC.shape
        return _repeated(rows_BnC.reshape(-1), batch * sum(counts) * width).view(batch, -1, width)


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
    """Largest difference of a two-layer float32 forward on 2 and 4 processes of one device from one process, and on a GPU of
    steps replayed in pieces from plain ones.

    Raises RuntimeError above the tolerance.
    """
    small = replace(config, num_layers=2)
    expected = _velocity(*_prepared(ContextParallel.single(), small, size, device))
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
            kept = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(num_ranks)]
        differences = {"difference": max((own["velocity"] - expected).abs().max().item() for own in kept)}
        differences |= {"replayed_difference": max(own["replayed"] for own in kept)} if "replayed" in kept[0] else {}
        for name, difference in differences.items():
            result[f"{name}_{num_ranks}_ranks"] = difference
            if not difference <= TOLERANCE:
                raise RuntimeError(f"{degrees.describe()}: {name} {difference} is more than {TOLERANCE}")
    return result


def _rank(rank: int, degrees: Degrees, config: ModelConfig, size: tuple[int, int], device: str, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", degrees.num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=degrees.num_ranks)
    context = ContextParallel.from_process_group(degrees, rank_timeout=None)
    prepared = _prepared(context, config, size, torch.device(device))
    result: dict[str, object] = {"velocity": _velocity(*prepared)}
    if prepared[1].is_cuda:
        result["replayed"] = _replayed_difference(*prepared)
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@torch.no_grad()
def _velocity(transformer: Transformer, latents: Tensor, context: ChunkContext) -> Tensor:
    return transformer(latents, 700.0, context)[0].cpu()


@torch.no_grad()
def _replayed_difference(transformer: Transformer, latents: Tensor, context: ChunkContext) -> float:
    """Largest difference of latents after steps replayed in pieces between the exchanges from those after plain steps."""
    parallel = transformer.parallel
    graphs = StepGraphs(transformer, CudaRecorder(latents.device, between_exchanges_of=parallel))
    plain, replayed = (one_step_stage(transformer, latents, context) for _ in range(2))
    for _ in range(3):  # recorded, compared and then replayed twice, each from where the last one ended
        for stage, take_step in ((plain, Stage.step), (replayed, graphs)):
            stage.solver.index.zero_()
            take_step(stage)
    if graphs.why_given_up is not None:
        raise RuntimeError(f"{parallel.describe()}: steps cannot be replayed in pieces: {graphs.why_given_up}")
    return (plain.solver.latents - replayed.solver.latents).abs().max().item()


@torch.no_grad()
def _prepared(
    parallel: ContextParallel, config: ModelConfig, size: tuple[int, int], device: torch.device
) -> tuple[Transformer, Tensor, ChunkContext]:
    """A random model with latents at a quarter of the size and their context, the same on every rank."""
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
    return transformer, latents, transformer.prepare(window, (text,))
