"""Several GPUs of one machine, for gpu_check.py: the same video as on one, scaling, capture on and off, a rank that is killed.

Ranks are started by torchrun as users start them; each part runs a few of them one after the other. On a CPU (--tiny) ranks
are gloo processes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from helios_engine.engine.devices import resolve_device
from helios_engine.parallel import launch
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.watch import RankFailure

TOLERANCE = 1e-3  # float32, four layers, of latents about one in size; other shapes sum in another order
_RANK_TIMEOUT = 20.0
_EXIT_NOTICED = 17  # of a rank that was told of another one's end


def num_devices(tiny: bool) -> int:
    return 2 if tiny and not torch.cuda.is_available() else torch.cuda.device_count()


def counts(tiny: bool) -> list[int]:
    """1, 2, 4 and all, as far as there are so many."""
    return sorted({count for count in (1, 2, 4, num_devices(tiny)) if count <= num_devices(tiny)})


def run_ranks(count: int, tiny: bool, *flags: str) -> dict[str, object]:
    """What rank 0 of so many wrote. Raises RuntimeError where it wrote nothing.

    Ranks are started with torchrun's environment but without its agent, which ends all of them when one dies.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.gpu_multi", str(file), *flags, *(["--tiny"] if tiny else [])]
        common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        common |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]
        codes = [rank.wait() for rank in ranks]
        if not file.exists():
            raise RuntimeError(f"{count} ranks, {' '.join(flags)}: exit codes {codes}")
        return {**json.loads(file.read_text()), "exit_codes": codes}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def left_out(tiny: bool) -> dict[str, object] | None:
    if num_devices(tiny) < 2:
        return {"left out": f"{num_devices(tiny)} GPU, two are needed"}
    return None


def part_multi_equal(scale) -> dict[str, object]:
    """A whole video in float32 on two and on all GPUs against one: largest difference of latents and of frames in [0, 1]."""
    tiny = scale.is_tiny
    if reason := left_out(tiny):
        return reason
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, object] = {}
        expected = None
        for count in counts(tiny):
            path = Path(folder) / f"{count}.pt"
            run_ranks(count, tiny, "--float32", "--layers", "4", "--chunks", "2", "--video", str(path))
            video = torch.load(path)
            expected = video if expected is None else expected  # one rank's
            for name, own, one in zip(("latents", "frames"), video, expected, strict=True):
                difference = result[f"difference_of_{name}_{count}"] = (own - one).abs().max().item()
                if not difference <= TOLERANCE:
                    result["failed"] = f"{name} of {count} ranks are {difference:.2g} off one's, at most {TOLERANCE}"
    return {**result, "largest_latent": expected[0].abs().max().item()}


def part_multi_scaling(scale) -> dict[str, object]:
    """Seconds per chunk on 1, 2, 4 and all GPUs, and how much of the ideal that is."""
    tiny = scale.is_tiny
    if reason := left_out(tiny):
        return reason
    result: dict[str, object] = {}
    for count in counts(tiny):
        try:
            own = result[str(count)] = run_ranks(count, tiny, "--chunks", "4")
        except RuntimeError as error:  # the other counts are worth having
            result["failed"] = str(error)
            continue
        if "1" in result:
            result[f"efficiency_{count}"] = result["1"]["denoise_s"] / (count * own["denoise_s"])
    return result


def part_multi_capture(scale) -> dict[str, object]:
    """All GPUs with steps as CUDA graphs and without: seconds and whether the numbers are the same."""
    tiny = scale.is_tiny
    if reason := left_out(tiny):
        return reason
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        latents = []
        for name, flags in (("plain", ()), ("graphs", ("--graphs",))):
            path = Path(folder) / f"{name}.pt"
            result[name] = run_ranks(num_devices(tiny), tiny, "--chunks", "4", "--video", str(path), *flags)
            latents.append(torch.load(path))
        result["equal"] = all(torch.equal(*pair) for pair in zip(*latents, strict=True))
        if not result["equal"]:
            result["failed"] = "captured steps gave other numbers"
        elif not result["graphs"]["captured"] and torch.cuda.is_available():
            result["failed"] = f"nothing was captured: {result['graphs']['gave_up']}"
    return result


def part_multi_loss(scale) -> dict[str, object]:
    """A rank is killed in its second chunk: seconds until rank 0 knows, and what it says."""
    tiny = scale.is_tiny
    if reason := left_out(tiny):
        return reason
    found = run_ranks(num_devices(tiny), tiny, "--chunks", "3", "--kill")
    survivors = set(found["exit_codes"][:-1])
    if "said" not in found or survivors != {_EXIT_NOTICED}:
        found["failed"] = "a rank was not told of the other one's end"
    return found


PARTS: dict[str, Callable[[object], dict[str, object]]] = {
    name.removeprefix("part_"): function for name, function in list(globals().items()) if name.startswith("part_")
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--video", type=Path, help="where rank 0 keeps latents and frames")
    options = parser.parse_args()
    context = ContextParallel.from_torchrun(rank_timeout=_RANK_TIMEOUT)
    try:
        with torch.no_grad():
            found, video = generate(options, context)
    except RankFailure:
        os._exit(_EXIT_NOTICED)  # a normal exit would wait for exchanges with a rank that is gone
    if context.is_first:
        if options.video is not None:
            torch.save(video, options.video)
        options.file.write_text(json.dumps(found))
    context.close()
    launch.stop()
    return 0


def generate(
    options: argparse.Namespace, context: ContextParallel
) -> tuple[dict[str, object], tuple[torch.Tensor, torch.Tensor] | None]:
    """A video on these ranks: seconds per chunk, and on rank 0 its latents and frames."""
    from benchmarks.gpu_check import FULL, TINY, make_engine, make_request

    scale = TINY if options.tiny else FULL
    if options.layers is not None:
        scale = replace(scale, model=replace(scale.model, num_layers=options.layers))
    dtype = torch.float32 if options.float32 else torch.bfloat16
    device = resolve_device(launch.own_device("auto"))
    engine = make_engine(scale, device=device, dtype=dtype, context=context, cuda_graphs=options.graphs)
    arrivals, chunks, killed_at = [time.perf_counter()], [], None
    try:
        request = replace(make_request(scale, chunks=options.chunks), frames="float32")
        for chunk in engine.stream(request):
            arrivals.append(time.perf_counter())
            chunks.append(chunk)
            if options.kill and len(chunks) == 1:
                killed_at = time.perf_counter()
                if context.rank == context.size - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
    except RankFailure as failure:
        if not (options.kill and context.is_first):
            raise
        found = {"seconds": time.perf_counter() - killed_at, "said": str(failure)}
        options.file.write_text(json.dumps(found))
        raise
    graphs = engine.maker.graphs
    captured = graphs is not None and graphs.hold_memory
    gave_up = graphs.why_given_up if graphs is not None else "CUDA graphs are off"
    engine.close()
    found = {
        "ranks": context.describe(),
        "exchanges": context.exchanges,
        "first_chunk_s": arrivals[1] - arrivals[0],
        "chunk_s": (arrivals[-1] - arrivals[1]) / max(1, len(chunks) - 1),
        "denoise_s": chunks[-1].timing.denoise_seconds,
        "attention": engine.transformer.attention.backend,
        "captured": captured,
        "gave_up": gave_up,
    }
    if not context.is_first:
        return found, None
    frames = torch.cat([torch.as_tensor(chunk.frames) for chunk in chunks])
    return found, (torch.cat([chunk.latents.cpu() for chunk in chunks], dim=2), frames)


if __name__ == "__main__":
    sys.exit(main())
