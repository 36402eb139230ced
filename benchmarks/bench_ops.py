"""How near is each operator to what a copy of as many bytes takes, and what do eager torch and torch.compile take?

    python -m benchmarks.bench_ops [--rows 2940] [--repeats 20] [--compile] [--json ops.json]

Rows are 5120 wide, bfloat16 (the autoencoder's operators: 96 channels, float32). Bytes are those that must be read and written
once. The ceiling is a copy of a large tensor in the same run. Buffers rotate, so that what was written last is not still in
the cache. Works on the CPU and on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from helios_engine.ops import native, reference
from helios_engine.tools.bench import hardware

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, HEADS, HEAD_DIM = 5120, 40, 128
BUFFERS = 3


@dataclass(frozen=True)
class Case:
    """One operator: its call with either implementation, eager torch's own words for it, and the bytes it must move."""

    name: str
    run: Callable[[object, int], object]  # (implementation, which buffers)
    eager: Callable[[int], object] | None
    num_bytes: int


def seconds(work: Callable[[int], object], repeats: int) -> float:
    """Median time of a call, after two that are not counted."""
    times = []
    for index in range(repeats + 2):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work(index % BUFFERS)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def copy_rate(num_bytes: int, repeats: int) -> float:
    """Bytes per second, read and written, of a plain copy."""
    sources = [torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE).fill_(i) for i in range(BUFFERS)]
    target = torch.empty_like(sources[0])
    return 2 * num_bytes / seconds(lambda i: target.copy_(sources[i]), repeats)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def row_cases(rows: int) -> list[Case]:
    """What a block does to its rows."""
    xs, ys, outs = ([random(1, rows, WIDTH) for _ in range(BUFFERS)] for _ in range(3))
    qkvs = [random(1, rows, 3 * WIDTH) for _ in range(BUFFERS)]
    gate, weight, bias = (torch.randn(2, WIDTH, device=DEVICE) for _ in range(3))
    norm, rotation = random(WIDTH), torch.randn(rows, HEAD_DIM // 2, 2, device=DEVICE)
    settings = {"num_history": rows // 3, "eps": 1e-6}
    size = xs[0].nbytes

    def eager_norm(i: int) -> Tensor:
        x = (xs[i].float() + ys[i].float() * gate[1]).bfloat16()
        normed = torch.nn.functional.layer_norm(x.float(), (WIDTH,), eps=1e-6)
        return (normed * weight[1] + bias[1]).bfloat16()

    def eager_rope(i: int) -> Tensor:
        q, k, _ = qkvs[i].chunk(3, dim=-1)
        cos, sin = rotation.unbind(-1)
        out = []
        for x in (q, k):
            even, odd = torch.nn.functional.rms_norm(x, (WIDTH,), norm, 1e-6).unflatten(-1, (HEADS, -1, 2)).unbind(-1)
            turned = [even * cos[:, None] - odd * sin[:, None], even * sin[:, None] + odd * cos[:, None]]
            out.append(torch.stack(turned, dim=-1).flatten(-3).bfloat16())
        return torch.cat(out, dim=-1)

    return [
        Case(
            "residual_gate_norm",
            lambda ops, i: ops.residual_gate_norm_(xs[i], ys[i], gate, weight, bias, out=outs[i], **settings),
            eager_norm,
            4 * size,
        ),
        Case(
            "norm alone",
            lambda ops, i: ops.norm_scale_shift(xs[i], weight, bias, out=outs[i], **settings),
            None,
            2 * size,
        ),
        Case(
            "qk_rmsnorm_rope",
            lambda ops, i: ops.qk_rms_norm_rope_(qkvs[i], norm, norm, rotation, eps=1e-6),
            eager_rope,
            4 * size + rotation.nbytes,
        ),
        Case("rmsnorm_rows", lambda ops, i: ops.rms_norm_(xs[i], norm, eps=1e-6), None, 2 * size),
        Case("quantize_rows", lambda ops, i: ops.quantize_rows(xs[i]), None, 3 * size // 2),
    ]


def other_cases(rows: int) -> list[Case]:
    """Packing, merging, patches and pictures."""
    heads = (10,) * 4
    received = [random(rows * WIDTH) for _ in range(BUFFERS)]
    parts = [random(1, rows, HEADS, HEAD_DIM, dtype=torch.float32) for _ in range(BUFFERS)]
    partial, lse = random(1, rows, HEADS, HEAD_DIM), torch.randn(1, rows, HEADS, device=DEVICE)
    pictures = [random(1, 5, 48, 80, 96, dtype=torch.float32).permute(0, 4, 1, 2, 3) for _ in range(BUFFERS)]
    gamma = random(96, dtype=torch.float32)
    latents = [random(1, 16, 19, 48, 80, dtype=torch.float32) for _ in range(BUFFERS)]

    def eager_norm(i: int) -> Tensor:
        x = torch.nn.functional.normalize(pictures[i], dim=1) * 96**0.5 * gamma.view(-1, 1, 1, 1)
        return torch.nn.functional.silu(x)

    return [
        Case(
            "unpack_heads",
            lambda ops, i: ops.unpack_heads(received[i], (1, rows, HEADS, HEAD_DIM), heads),
            None,
            2 * received[0].nbytes,
        ),
        Case(
            "merge_partials",
            lambda ops, i: ops.merge_partials_(parts[i], lse.clone(), partial, lse),
            None,
            2 * parts[0].nbytes + partial.nbytes,
        ),
        Case(
            "patch_gather",
            lambda ops, i: ops.patch_rows(latents[i], (1, 2, 2), dtype=torch.bfloat16),
            None,
            latents[0].nbytes * 3 // 2,
        ),
        Case(
            "channel_norm_silu",
            lambda ops, i: ops.channel_norm_silu(pictures[i], gamma),
            eager_norm,
            2 * pictures[0].nbytes,
        ),
        Case("upsample_nearest", lambda ops, i: ops.upsample_nearest(pictures[i]), None, 5 * pictures[0].nbytes),
    ]


@torch.no_grad()
def run_one(name: str, rows: int, repeats: int) -> None:
    """For a profiler: calls of one operator, two of them to warm up."""
    case = next((case for case in row_cases(rows) + other_cases(rows) if case.name == name), None)
    if case is None:
        names = ", ".join(case.name for case in row_cases(8) + other_cases(8))
        raise SystemExit(f"bench_ops: no operator {name} is measured; there are {names}")
    print(f"{name}: {1e3 * seconds(lambda i: case.run(native, i), repeats):.2f} ms, {case.num_bytes / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2940)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the eager words too")
    parser.add_argument("--only", metavar="OPERATOR", help="run our implementation of one operator and nothing else")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if native.WHY_NOT:
        raise SystemExit(f"bench_ops: no compiled operators: {native.WHY_NOT}")
    if options.only is not None:
        run_one(options.only, options.rows, options.repeats)
        return
    ceiling = copy_rate(options.rows * WIDTH * 4, options.repeats)
    found: dict[str, dict[str, float]] = {}
    print(f"copy {ceiling / 1e9:.1f} GB/s, {hardware(DEVICE)}, {options.rows} rows of {WIDTH}\n")
    print(
        "| operator | MB | ms | GB/s | of copy | reference ms | eager ms | torch.compile ms |\n|---|---|---|---|---|---|---|---|"
    )
    with torch.no_grad():
        for case in row_cases(options.rows) + other_cases(options.rows):
            ours = seconds(lambda i, c=case: c.run(native, i), options.repeats)
            plain = seconds(lambda i, c=case: c.run(reference, i), max(3, options.repeats // 4))
            figures = {"ms": 1e3 * ours, "of_copy": case.num_bytes / ours / ceiling, "reference_ms": 1e3 * plain}
            if case.eager is not None:
                figures["eager_ms"] = 1e3 * seconds(case.eager, max(3, options.repeats // 4))
                if options.compile:
                    compiled = torch.compile(case.eager)
                    figures["compiled_ms"] = 1e3 * seconds(compiled, options.repeats)
            found[case.name] = {**figures, "bytes": case.num_bytes}
            cells = [
                f"{figures[name]:.2f}" if name in figures else ""
                for name in ("reference_ms", "eager_ms", "compiled_ms")
            ]
            rate = case.num_bytes / ours / 1e9
            print(
                f"| {case.name} | {case.num_bytes / 1e6:.1f} | {1e3 * ours:.2f} | {rate:.1f} | {figures['of_copy']:.0%} | "
                + " | ".join(cells)
                + " |"
            )
    if options.json:
        result = {"copy_bytes_per_second": ceiling, **hardware(DEVICE), "rows": options.rows, "operators": found}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
