"""How near is each operator to what a copy of as many bytes takes, and what do eager torch and torch.compile take?

    python -m benchmarks.bench_ops [--rows 2940] [--frames 1] [--repeats 20] [--compile] [--json ops.json]

Rows are 5120 wide, bfloat16; pictures are the decoder's last level, frames x 384 x 640 x 96, float32 unless named. On a GPU
the defaults are the model's own sizes, 11040 rows and 32 frames, and a time is that of 20 launches and more between two
events. Bytes are those that must be read and written once. The ceiling is a copy of a large tensor in the same run. Buffers
rotate through four times the cache, so that nothing is found there. Works on the CPU and on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from helios_engine.ops import native, reference
from helios_engine.ops.reference import EightBitRows
from helios_engine.tools.bench import hardware

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
WIDTH, HEADS, HEAD_DIM, FEED_FORWARD = 5120, 40, 128, 13824
_LAUNCHES = 20  # between two events
_BATCHES = 5
_CPU_CACHE = 64 << 20  # more than the last level's share of two cores


@dataclass(frozen=True)
class Case:
    """One operator: its call with either implementation, eager torch's own words for it, and the bytes it must move."""

    name: str
    run: Callable[[object, int], object]  # (implementation, which buffers)
    eager: Callable[[int], object] | None
    num_bytes: int
    num_buffers: int


def cache_bytes() -> int:
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size if ON_GPU else _CPU_CACHE


def buffers_for(num_bytes: int) -> int:
    """How many buffers of this size to take in turns, so that the first is out of the cache when it comes again."""
    return max(2, math.ceil(4 * cache_bytes() / num_bytes))


def seconds(work: Callable[[int], object], repeats: int, num_buffers: int) -> float:
    """Time of a call: on a GPU of at least 20 between two events, the median of five batches; on the CPU the median of all."""
    return _gpu_seconds(work, repeats, num_buffers) if ON_GPU else _cpu_seconds(work, repeats, num_buffers)


def _gpu_seconds(work: Callable[[int], object], repeats: int, num_buffers: int) -> float:
    launches, times = max(_LAUNCHES, repeats), []
    for batch in range(_BATCHES + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for index in range(launches):
            work(index % num_buffers)
        end.record()
        end.synchronize()
        if batch:  # the first one warms up
            times.append(start.elapsed_time(end) / 1e3 / launches)
    return statistics.median(times)


def _cpu_seconds(work: Callable[[int], object], repeats: int, num_buffers: int) -> float:
    times = []
    for index in range(repeats + 2):
        start = time.perf_counter()
        work(index % num_buffers)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def copy_rate(num_bytes: int, repeats: int) -> float:
    """Bytes per second, read and written, of a plain copy."""
    count = buffers_for(num_bytes)
    sources = [torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE).fill_(i) for i in range(count)]
    targets = [torch.zeros_like(source) for source in sources]  # memory that is really there
    return 2 * num_bytes / seconds(lambda i: targets[i].copy_(sources[i]), repeats, count)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers of one small block over and over: generating gigabytes would take longer than measuring."""
    count = math.prod(shape)
    block = torch.randn(min(count, 1 << 20), device=DEVICE).to(dtype)
    return block.repeat(math.ceil(count / block.numel()))[:count].view(shape)


def _clear(*buffers: list[Tensor]) -> None:
    """Give the memory of cases that are done to the next ones."""
    for some in buffers:
        some.clear()


def row_cases(rows: int) -> Iterator[Case]:
    """What a block does to its rows; buffers of one case are gone when the next is asked for."""
    count = buffers_for(rows * WIDTH * 2)
    xs, ys, outs = ([random(1, rows, WIDTH) for _ in range(count)] for _ in range(3))
    gate, weight, bias = (torch.randn(2, WIDTH, device=DEVICE) for _ in range(3))
    norm, rotation = random(WIDTH), torch.randn(rows, HEAD_DIM // 2, 2, device=DEVICE)
    settings = {"num_history": rows // 3, "eps": 1e-6}
    size = xs[0].nbytes
    eight = EightBitRows.empty_like(xs[0])

    def eager_norm(i: int) -> Tensor:
        x = (xs[i].float() + ys[i].float() * gate[1]).bfloat16()
        normed = torch.nn.functional.layer_norm(x.float(), (WIDTH,), eps=1e-6)
        return (normed * weight[1] + bias[1]).bfloat16()

    def residual_norm(ops, i: int, out: Tensor | EightBitRows) -> None:
        ops.residual_gate_norm_(xs[i], ys[i], gate, weight, bias, out=out, **settings)

    yield Case("residual_gate_norm", lambda ops, i: residual_norm(ops, i, outs[i]), eager_norm, 4 * size, count)
    yield Case("residual_gate_norm to e4m3", lambda ops, i: residual_norm(ops, i, eight), None, 7 * size // 2, count)
    yield Case(
        "norm alone",
        lambda ops, i: ops.norm_scale_shift(xs[i], weight, bias, out=outs[i], **settings),
        None,
        2 * size,
        count,
    )
    yield Case("rmsnorm_rows", lambda ops, i: ops.rms_norm_(xs[i], norm, eps=1e-6), None, 2 * size, count)
    yield Case("quantize_rows", lambda ops, i: ops.quantize_rows(xs[i]), None, 3 * size // 2, count)
    _clear(xs, ys, outs)
    qkvs = [random(1, rows, 3 * WIDTH) for _ in range(buffers_for(3 * size))]

    def eager_rope(i: int) -> Tensor:
        q, k, _ = qkvs[i].chunk(3, dim=-1)
        cos, sin = rotation.unbind(-1)
        out = []
        for x in (q, k):
            even, odd = torch.nn.functional.rms_norm(x, (WIDTH,), norm, 1e-6).unflatten(-1, (HEADS, -1, 2)).unbind(-1)
            turned = [even * cos[:, None] - odd * sin[:, None], even * sin[:, None] + odd * cos[:, None]]
            out.append(torch.stack(turned, dim=-1).flatten(-3).bfloat16())
        return torch.cat(out, dim=-1)

    yield Case(
        "qk_rmsnorm_rope",
        lambda ops, i: ops.qk_rms_norm_rope_(qkvs[i], norm, norm, rotation, eps=1e-6),
        eager_rope,
        4 * size + rotation.nbytes,
        len(qkvs),
    )
    yield Case(
        "qk_rmsnorm_rope_pack",
        lambda ops, i: ops.qk_rms_norm_rope_pack(qkvs[i], norm, norm, rotation, (10,) * 4, eps=1e-6),
        None,
        6 * size + rotation.nbytes,
        len(qkvs),
    )
    yield Case(
        "quantize_heads",
        lambda ops, i: ops.quantize_heads(*qkvs[i].view(1, rows, 3, HEADS, HEAD_DIM).unbind(2)),
        None,
        3 * 5 * size // 2,  # read twice, written once in 8 bits
        len(qkvs),
    )
    _clear(qkvs)
    hidden = [random(1, rows, FEED_FORWARD) for _ in range(buffers_for(rows * FEED_FORWARD * 2))]
    yield Case(
        "quantize_rows of GELU",
        lambda ops, i: ops.quantize_rows(hidden[i], gelu=True),
        None,
        3 * hidden[0].nbytes // 2,
        len(hidden),
    )


def other_cases(rows: int) -> Iterator[Case]:
    """Packing, merging and patches."""
    heads, size = (10,) * 4, rows * WIDTH * 2
    received = [random(rows * WIDTH) for _ in range(buffers_for(size))]
    yield Case(
        "unpack_heads",
        lambda ops, i: ops.unpack_heads(received[i], (1, rows, HEADS, HEAD_DIM), heads),
        None,
        2 * size,
        len(received),
    )
    _clear(received)
    parts = [random(1, rows, HEADS, HEAD_DIM, dtype=torch.float32) for _ in range(buffers_for(2 * size))]
    partial, lse = random(1, rows, HEADS, HEAD_DIM), torch.randn(1, rows, HEADS, device=DEVICE)
    kept = lse.clone()
    yield Case(
        "merge_partials",
        lambda ops, i: ops.merge_partials_(parts[i], kept, partial, lse),
        None,
        2 * parts[0].nbytes + partial.nbytes,
        len(parts),
    )
    _clear(parts)
    shape = (1, 16, 19, 48, 80)
    latents = [random(*shape, dtype=torch.float32) for _ in range(buffers_for(math.prod(shape) * 4))]
    yield Case(
        "patch_gather",
        lambda ops, i: ops.patch_rows(latents[i], (1, 2, 2), dtype=torch.bfloat16),
        None,
        latents[0].nbytes * 3 // 2,
        len(latents),
    )


def picture_cases(frames: int) -> Iterator[Case]:
    """What stands between the decoder's convolutions, at its last level."""
    for dtype, name in ((torch.float32, ""), (torch.bfloat16, " bf16")):
        shape = (1, frames, 384, 640, 96)
        count = buffers_for(math.prod(shape) * dtype.itemsize)
        pictures, others = (
            [random(*shape, dtype=dtype).permute(0, 4, 1, 2, 3) for _ in range(count)] for _ in range(2)
        )
        out, gamma, bias = torch.empty_like(pictures[0]), random(96, dtype=dtype), random(96, dtype=dtype)
        size = out.nbytes

        def eager_norm(i: int, pictures: list[Tensor] = pictures, gamma: Tensor = gamma) -> Tensor:
            x = torch.nn.functional.normalize(pictures[i], dim=1) * 96**0.5 * gamma.view(-1, 1, 1, 1)
            return torch.nn.functional.silu(x)

        def norm(ops, i: int, *, out=out, pictures=pictures, gamma=gamma, **more: Tensor) -> Tensor:
            return ops.channel_norm_silu(pictures[i], gamma, out=out, **more)

        yield Case(f"channel_norm_silu{name}", norm, eager_norm, 2 * size, count)
        yield Case(
            f"channel_norm_silu{name} + bias",
            lambda ops, i, norm=norm, bias=bias: norm(ops, i, bias=bias),
            None,
            2 * size,
            count,
        )
        yield Case(
            f"channel_norm_silu{name} + bias + residual",
            lambda ops, i, norm=norm, bias=bias, others=others: norm(ops, i, bias=bias, residual=others[i]),
            None,
            4 * size,
            count,
        )
        yield Case(
            f"bias_residual{name}",
            lambda ops, i, pictures=pictures, bias=bias, others=others: ops.bias_residual(pictures[i], bias, others[i]),
            None,
            3 * size,
            count,
        )
        _clear(pictures, others)
        # Half the rows and columns of twice the channels come before this level.
        larger = torch.zeros(1, frames, 384, 640, 192, dtype=dtype, device=DEVICE).permute(0, 4, 1, 2, 3)
        smaller = [random(1, frames, 192, 320, 192, dtype=dtype).permute(0, 4, 1, 2, 3) for _ in range(2 * count)]
        yield Case(
            f"upsample_nearest{name}",
            lambda ops, i, smaller=smaller, larger=larger: ops.upsample_nearest(smaller[i], out=larger),
            None,
            5 * smaller[0].nbytes,
            2 * count,
        )


def all_cases(options: argparse.Namespace) -> Iterator[Case]:
    yield from row_cases(options.rows)
    yield from other_cases(options.rows)
    yield from picture_cases(options.frames)


@torch.no_grad()
def run_one(options: argparse.Namespace) -> None:
    """For a profiler: calls of one operator, two of them to warm up."""
    names = []
    for case in all_cases(options):
        names.append(case.name)
        if case.name == options.only:
            took = seconds(lambda i, case=case: case.run(native, i), options.repeats, case.num_buffers)
            print(f"{case.name}: {1e3 * took:.2f} ms, {case.num_bytes / 1e6:.1f} MB")
            return
    raise SystemExit(f"bench_ops: no operator {options.only} is measured; there are {', '.join(names)}")


def measure(case: Case, options: argparse.Namespace, ceiling: float) -> dict[str, float]:
    """Milliseconds of ours, of plain torch and, where there are words for it, of eager and compiled torch."""
    few = max(3, options.repeats // 4)
    ours = seconds(lambda i: case.run(native, i), options.repeats, case.num_buffers)
    figures = {"ms": 1e3 * ours, "of_copy": case.num_bytes / ours / ceiling, "bytes": case.num_bytes}
    if not options.ours_only:
        figures["reference_ms"] = 1e3 * seconds(lambda i: case.run(reference, i), few, case.num_buffers)
        if case.eager is not None:
            figures["eager_ms"] = 1e3 * seconds(case.eager, few, case.num_buffers)
            if options.compile:
                compiled = torch.compile(case.eager)
                figures["compiled_ms"] = 1e3 * seconds(compiled, options.repeats, case.num_buffers)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=11040 if ON_GPU else 2940)
    parser.add_argument("--frames", type=int, default=32 if ON_GPU else 1, help="of the pictures")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the eager words too")
    parser.add_argument("--ours-only", action="store_true", help="time nothing but the compiled operators")
    parser.add_argument("--only", metavar="OPERATOR", help="run our implementation of one operator and nothing else")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if native.WHY_NOT:
        raise SystemExit(f"bench_ops: no compiled operators: {native.WHY_NOT}")
    if options.only is not None:
        run_one(options)
        return
    ceiling = copy_rate(options.rows * WIDTH * 4, options.repeats)
    found: dict[str, dict[str, float]] = {}
    print(
        f"copy {ceiling / 1e9:.1f} GB/s, {hardware(DEVICE)}, {options.rows} rows of {WIDTH}, {options.frames} frames\n\n"
        "| operator | MB | ms | GB/s | of copy | reference ms | eager ms | torch.compile ms |\n|---|---|---|---|---|---|---|---|"
    )
    with torch.no_grad():
        for case in all_cases(options):
            figures = found[case.name] = measure(case, options, ceiling)
            columns = ("reference_ms", "eager_ms", "compiled_ms")
            cells = [f"{figures[name]:.2f}" if name in figures else "" for name in columns]
            rate = case.num_bytes / figures["ms"] / 1e6
            print(
                f"| {case.name} | {case.num_bytes / 1e6:.1f} | {figures['ms']:.2f} | {rate:.1f} | "
                f"{figures['of_copy']:.0%} | {' | '.join(cells)} |",
                flush=True,
            )
    if options.json:
        sizes = {"rows": options.rows, "frames": options.frames}
        result = {"copy_bytes_per_second": ceiling, **hardware(DEVICE), **sizes, "operators": found}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
