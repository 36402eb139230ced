"""What a decode and a forward launch on a GPU and how many bytes they move, traced on the meta device: no GPU needed.

The meta device goes a GPU's way through the model (ops.native.is_gpu) and computes nothing. Convolutions keep channels last
as cuDNN does, attention is one launch, and the compiled operators count as theirs.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helios_engine.config import LATENT_FRAMES_PER_CHUNK, ModelConfig, VaeConfig
from helios_engine.model.embed import HistoryWindow
from helios_engine.model.transformer import Transformer
from helios_engine.model.vae import VideoAutoencoder
from helios_engine.ops.attention import Attention
from helios_engine.parallel.context import ContextParallel

META = torch.device("meta")
_LARGE = 1e6  # bytes; smaller copies are not listed
_KINDS = {
    "matmul": ("mm", "addmm", "bmm", "baddbmm", "linear", "_addmm_activation", "_scaled_mm"),
    "convolution": ("convolution",),
    "copy": ("copy_", "clone", "cat", "_to_copy", "contiguous", "stack", "constant_pad_nd", "index_select"),
    "fill": ("zero_", "fill_", "zeros", "ones", "full", "new_zeros", "zeros_like", "full_like"),
}
_MAKE_NOTHING = ("empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided", "arange")
# Arguments that an operator of ours writes and does not read.
_WRITTEN = ("out", "scale", "packed", "rows", "workspace", "q_out", "k_out", "v_out", "q_scale", "k_scale", "v_scale")


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel as the trace sees it; bytes are those of the tensors it reads and writes."""

    name: str
    kind: str  # convolution, matmul, attention, operator (ours), copy, fill or elementwise
    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[str, ...]  # of the pictures among its tensors, inputs first
    num_bytes: int
    where: str = ""  # the function of the model that asks for it

    def __str__(self) -> str:
        sizes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        layouts = f", {' '.join(self.layouts)}" if self.layouts else ""
        return f"{self.name} ({sizes}{layouts}): {self.num_bytes / 1e6:.1f} MB in {self.where}"


class _OneLaunchAttention(TorchFunctionMode):
    """torch's attention, which would come apart on the meta device, as one launch."""

    def __init__(self, found: list[Launch]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return attention(self._found, *args[:3])
        return func(*args, **(kwargs or {}))


class _Tracer(TorchDispatchMode):
    def __init__(self, found: list[Launch]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name == "convolution":
            result = _as_cudnn_lays_it_out(args, result)
        if func.is_view or name in _MAKE_NOTHING or name == "detach":
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in tensors) and not all(tensor.numel() == 0 for tensor in tensors):
            unique = list({id(tensor): tensor for tensor in tensors}.values())
            self._found.append(
                Launch(
                    name,
                    _kind_of(name, func.namespace),
                    tuple(tuple(tensor.shape) for tensor in unique),
                    tuple(_layout(tensor) for tensor in unique if tensor.ndim >= 4),
                    bytes_moved(func, args, kwargs, result),
                    _function_of_the_model(),
                )
            )
        return result


def _function_of_the_model() -> str:
    """The innermost function of helios_engine's model, sampling or parallel code that is under way."""
    frame = sys._getframe()
    while frame is not None:
        if re.search(r"helios_engine/(model|sampling|parallel)/", frame.f_code.co_filename):
            return frame.f_code.co_qualname
        frame = frame.f_back
    return ""


def attention(found: list[Launch], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of any layout as one launch: note it, return something of q's shape."""
    out = torch.empty_like(q)
    shapes = tuple(tuple(x.shape) for x in (q, k, v))
    found.append(Launch("attention", "attention", shapes, (), sum(x.nbytes for x in (q, k, v, out))))
    return out


def trace(work: Callable[[], object]) -> list[Launch]:
    """What work launches, in order."""
    found: list[Launch] = []
    with torch.no_grad(), _OneLaunchAttention(found), _Tracer(found):
        work()
    return found


def _as_cudnn_lays_it_out(args: tuple, result: Tensor) -> Tensor:
    """Channels last where the input or the weight is (cudnn_conv_suggest_memory_format in torch's ConvUtils.h)."""
    last = torch.channels_last_3d if result.ndim == 5 else torch.channels_last
    if any(x.is_contiguous(memory_format=last) and not x.is_contiguous() for x in args[:2]):
        return torch.empty_like(result, memory_format=last)
    return result


def _layout(x: Tensor) -> str:
    """channels-last, contiguous or strided; where both hold, channels-last."""
    last = x.stride(1) == 1 or x.size(1) == 1
    return "channels-last" if last else "contiguous" if x.is_contiguous() else "strided"


def _kind_of(name: str, namespace: str) -> str:
    if namespace == "helios":
        return "operator"
    return next((kind for kind, names in _KINDS.items() if name in names), "elementwise")


def bytes_moved(func, args: tuple, kwargs: dict, result: object) -> int:
    """Every tensor argument once, one that is changed in place twice, results that are new once."""
    name = func._schema.name.partition("::")[2]
    total, known = 0.0, set()
    given = {arg.name: value for arg, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    for argument in func._schema.arguments:
        for tensor in tree_leaves(given.get(argument.name)):
            if isinstance(tensor, Tensor):
                known.add(id(tensor))
                is_changed = argument.alias_info is not None and argument.alias_info.is_write
                total += tensor.nbytes * _times_moved(name, argument.name, given, is_changed=is_changed)
    return round(total + sum(x.nbytes for x in tree_leaves(result) if isinstance(x, Tensor) and id(x) not in known))


def _times_moved(name: str, argument: str, given: dict[str, object], *, is_changed: bool) -> float:
    """How often an operator's argument crosses memory: read, written, or both."""
    if name == "qk_rmsnorm_rope" and argument == "qkv":
        return 2 * 2 / 3  # v stays where it is
    if name == "channel_norm_silu" and argument == "x":
        return 1 if given.get("residual") is None else 2
    if name == "residual_gate_norm" and argument == "x":
        return 1 if given.get("y") is None else 2
    if name == "quantize_heads" and argument in ("q", "k", "v"):
        return 2  # for the largest, then to round
    if name == "merge_partials" and argument == "out":
        return 2
    only_written = name in ("copy_", "zero_", "fill_") or argument in _WRITTEN
    return 2 if is_changed and not only_written else 1


def trace_decode(
    config: VaeConfig, latent_size: tuple[int, int], *, dtype: torch.dtype, frames_per_call: int
) -> list[Launch]:
    """The decode of one chunk at latents of latent_size (rows, columns)."""
    with META:
        vae = VideoAutoencoder(config).to(dtype).requires_grad_(False).channels_last_()
        vae.statistics = vae.statistics.float()
        latents = torch.empty(1, config.z_dim, LATENT_FRAMES_PER_CHUNK, *latent_size)
    return trace(lambda: vae.decode(latents, frames_per_call=frames_per_call))


def trace_forward(
    config: ModelConfig, latent_size: tuple[int, int], stage_size: tuple[int, int], *, dtype: torch.dtype
) -> list[Launch]:
    """One forward at stage_size with the whole history at latent_size, on one rank; what a chunk makes once left out."""
    with META, torch.no_grad():
        transformer = Transformer(config, dtype).requires_grad_(False)
        attention = Attention("traced", F.scaled_dot_product_attention, lambda *_: (None, None))
        transformer.connect(attention, ContextParallel.single())
        parts = [torch.empty(1, config.in_channels, frames, *latent_size) for frames in (16, 2, 2)]
        text = transformer.encode_text(torch.empty(1, 512, config.text_dim))
        context = transformer.prepare(HistoryWindow(*parts), (text,))
        latents = torch.empty(1, config.in_channels, LATENT_FRAMES_PER_CHUNK, *stage_size, dtype=dtype)
        context = transformer.with_room(context, latents)
        time = transformer.embed.time(500.0)
        trace(lambda: transformer.run(latents, time, context))  # what a shape makes once
        return trace(lambda: transformer.run(latents, time, context))


def summary(found: list[Launch]) -> dict[str, object]:
    """Launches and gigabytes by kind, and every copy of more than 1 MB."""
    gigabytes: Counter[str] = Counter()
    for launch in found:
        gigabytes[launch.kind] += launch.num_bytes / 1e9
    copies = Counter(
        f"{launch}: {_REASONS.get(launch.where, 'no reason known')}"
        for launch in found
        if launch.kind == "copy" and launch.num_bytes > _LARGE
    )
    return {
        "launches": len(found),
        "launches_by_kind": dict(Counter(launch.kind for launch in found)),
        "gigabytes": {kind: round(amount, 2) for kind, amount in gigabytes.items()},
        "gigabytes_beside_convolutions": round(math.fsum(gigabytes.values()) - gigabytes["convolution"], 1),
        "copies": [f"{count} x {copy}" for copy, count in copies.items()],
    }


_REASONS = {
    "FrameCache.keep": "the newest frames, kept for a causal convolution's next call",
    "CausalConv3d._with_past": "past frames in front of a causal convolution's input",
    "VideoAutoencoder.decode": "the latents, brought to channels last once",
    "Embedder.noisy": "the history's tokens, which the blocks change in place",
    "Transformer._step_rows": "the norms' rows of this timestep, history and noisy",
    "Transformer._middle_rows": "the norms' rows of this timestep, history and noisy",
    "Transformer.run": "the rotations of history and noisy tokens, one table",
}


def launches_per_block(found: list[Launch], num_layers: int) -> float:
    """Launches inside the blocks of a forward, for each of them."""
    return sum(launch.kind == "attention" or launch.where.startswith("Block.") for launch in found) / num_layers


def trace_checkpoint(
    model: ModelConfig,
    vae: VaeConfig,
    stage_sizes: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    frames_per_call: int = 8,
) -> dict[str, object]:
    """What `bench --trace` prints: a forward of each stage on one rank, and the decode of one chunk."""
    forwards = {}
    for size in stage_sizes:
        found = trace_forward(model, stage_sizes[-1], size, dtype=dtype)
        forwards["x".join(map(str, size))] = {
            "launches_per_block": launches_per_block(found, model.num_layers),
            **summary(found),
        }
    decode = summary(trace_decode(vae, stage_sizes[-1], dtype=vae_dtype, frames_per_call=frames_per_call))
    return {
        "traced": "on the meta device, as one GPU would run it; bytes of the tensors read and written, caches not counted",
        "dtype": str(dtype).removeprefix("torch."),
        "forward": forwards,
        "decode": {"dtype": str(vae_dtype).removeprefix("torch."), "frames_per_call": frames_per_call, **decode},
    }
