"""What a forward and a decode take at least on this device: their own matrix products, attention and convolutions, each
alone and as fast as the libraries can, and the bytes of everything else at a copy's rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helios_engine.config import ModelConfig, SchedulerConfig
from helios_engine.engine.graphs import StepGraphs
from helios_engine.engine.recorders import Recorder
from helios_engine.engine.stage import Stage
from helios_engine.model.context import ChunkContext
from helios_engine.model.transformer import Transformer
from helios_engine.ops.attention import Attention
from helios_engine.ops.gemm import TunedGemms
from helios_engine.sampling.schedule import StageSchedule
from helios_engine.sampling.solver import make_solver
from helios_engine.tools.launches import bytes_moved

TEXT_TOKENS = 512
Timer = Callable[[Callable[[], object]], float]


def roofline_seconds(
    model: ModelConfig,
    noisy: int,
    history: int,
    attention: Attention,
    device: torch.device,
    dtype: torch.dtype,
    timed: Timer,
) -> dict[str, float]:
    """Seconds of one forward of one prompt by part; the text's keys and values are not in it, they are made once."""
    dim, ffn, rows = model.dim, model.ffn_dim, noisy + history
    products = [(rows, dim, 3 * dim), (rows, dim, dim), (noisy, dim, dim), (noisy, dim, dim), (rows, dim, ffn)]
    products.append((rows, ffn, dim))
    gemm = 0.0
    for m, k, n in products:
        x, w = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        bias = torch.randn(n, device=device, dtype=dtype)
        gemm += timed(lambda x=x, w=w, b=bias: torch.nn.functional.linear(x, w, b))
    heads, head_dim = model.num_attention_heads, model.attention_head_dim
    attending = 0.0
    for queries, keys in ((rows, rows), (noisy, TEXT_TOKENS)):
        q, k, v = (torch.randn(1, t, heads, head_dim, device=device, dtype=dtype) for t in (queries, keys, keys))
        attending += timed(lambda q=q, k=k, v=v: attention(q, k, v))
    # Read and written once: residual and norm twice, q and k, over all rows; the text's queries and residual over the noisy.
    moved = (2 * 4 * rows + 4 * rows + (2 + 4) * noisy) * dim * dtype.itemsize
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    layers = model.num_layers
    parts = {
        "gemm": layers * gemm,
        "attention": layers * attending,
        "bytes": layers * timed(lambda: target.copy_(source)),
    }
    return {**parts, "sum": sum(parts.values())}


def graph_figures(
    transformer: Transformer,
    latents: torch.Tensor,
    context: ChunkContext,
    timed: Timer,
    recorder: Recorder | None,
) -> dict[str, object]:
    """Milliseconds of a plain step and of a recorded one and whether the numbers are the same, or why there is none."""
    if recorder is None:
        return {"recorded": "no CUDA graphs here"}
    graphs = StepGraphs(transformer, recorder)
    plain, recorded = (one_step_stage(transformer, latents, context) for _ in range(2))

    def again(stage: Stage, take_step: Callable[[Stage], object]) -> None:
        stage.solver.index.zero_()
        take_step(stage)

    for _ in range(2):  # recorded and compared, then replayed
        again(plain, Stage.step)
        again(recorded, graphs)
    if graphs.why_given_up is not None:
        return {"recorded": graphs.why_given_up}
    equal = torch.equal(plain.solver.latents, recorded.solver.latents)
    return {
        "plain_step_ms": 1e3 * timed(lambda: again(plain, Stage.step)),
        "recorded_step_ms": 1e3 * timed(lambda: again(recorded, graphs)),
        "recorded_equal": equal,
    }


def tuned_figures(
    transformer: Transformer, latents: torch.Tensor, context: ChunkContext, timed: Timer, gemms: TunedGemms | None
) -> dict[str, object]:
    """Milliseconds of a forward whose products have the algorithms that are fastest here, and for how many that is not torch's."""
    if gemms is None:
        return {"tuned": "no cuBLASLt here"}
    transformer.multiply_with(gemms)
    try:
        seconds = timed(lambda: transformer(latents, 500.0, context))
    finally:
        transformer.multiply_with(None)
    others = sum(choice is not None for choice in gemms.choices.values())
    return {"tuned_forward_ms": 1e3 * seconds, "tuned_so_far": f"{others} of {len(gemms.choices)} products"}


def one_step_stage(transformer: Transformer, latents: torch.Tensor, context: ChunkContext) -> Stage:
    """A step that moves the latents by a small part of the velocity."""
    schedule = StageSchedule((500.0,), (0.5, 0.49), 0.5)
    solver = make_solver(SchedulerConfig("euler"), schedule, latents, transformer.config.patch_size)
    return Stage(transformer, solver, transformer.embed.times(schedule.timesteps), context, guidance=None)


class _DecoderWork(TorchDispatchMode):
    """Notes every convolution by its shapes, and the bytes that our own operators and the copies of past frames must move."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: Counter[tuple[object, ...]] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "convolution" in name:
            x, weight, bias = args[:3]
            settings = tuple(tuple(a) if isinstance(a, list) else a for a in args[3:])
            self.convolutions[func, _layout(x), _layout(weight), bias is not None, settings] += 1
        result = func(*args, **(kwargs or {}))
        if name.startswith(("helios.", "aten.copy_", "aten.clone", "aten.zero_")):  # past frames are copied too
            self.bytes += bytes_moved(func, args, kwargs or {}, result)
        return result


def _layout(x: torch.Tensor) -> tuple[object, ...]:
    return tuple(x.shape), x.stride(), x.dtype


def decoder_floor_seconds(decode: Callable[[], object], device: torch.device, timed: Timer) -> dict[str, float]:
    """A decode's convolutions, each shape timed alone with the fastest algorithm cuDNN finds, and its operators' bytes."""
    with _DecoderWork() as work:
        decode()
    convolving = 0.0
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for (func, x, weight, has_bias, settings), count in work.convolutions.items():
            x, weight = (
                torch.empty_strided(*layout[:2], dtype=layout[2], device=device).normal_() for layout in (x, weight)
            )
            bias = weight.new_zeros(weight.size(0)) if has_bias else None
            convolving += count * timed(lambda f=func, a=(x, weight, bias, *settings): f(*a))
    source = torch.empty(min(work.bytes // 2, 2**31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = timed(lambda: target.copy_(source)) * (work.bytes // 2) / max(1, source.nbytes)
    return {"convolutions": convolving, "bytes": copying, "sum": convolving + copying}
