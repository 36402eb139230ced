"""The operators as the engine calls them: the compiled library where it is there, plain torch (reference.py) elsewhere.

# B batch, L tokens, H heads, K head dim, D width (H * K), S segments: row 0 history, row 1 noisy

Both have one meaning, given in reference.py. HELIOS_OPS=reference leaves the library alone, HELIOS_OPS=native insists on
it, and a path that ends in .so insists on that library instead.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_engine.ops import reference
from helios_engine.ops.reference import EightBitRows
from helios_engine.trace import span

logger = logging.getLogger(__name__)

_WANTED = os.environ.get("HELIOS_OPS", "")
LIBRARY = Path(_WANTED if _WANTED.endswith(".so") else Path(__file__).parent.parent / "libhelios_ops.so")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CFG_BLOCKS = 64  # latents.h
_HEAD_PARTS = 128  # quantize_heads.h

OPERATORS = (
    "residual_gate_norm",
    "qk_rmsnorm_rope",
    "qk_rmsnorm_rope_pack",
    "rmsnorm_rows",
    "unpack_heads",
    "merge_partials",
    "patch_gather",
    "euler_step",
    "dmd_step",
    "unipc_step",
    "upsample_renoise",
    "cfg_combine",
    "channel_norm_silu",
    "upsample_nearest",
    "bias_residual",
    "quantize_rows",
    "quantize_heads",
)


def _load() -> tuple[str, str]:
    """Load the library; returns (why it is not used or nothing, why nothing may run at all or nothing)."""
    if _WANTED not in ("", "native", "reference") and not _WANTED.endswith(".so"):
        return "HELIOS_OPS is unknown", f"HELIOS_OPS must be native, reference or a library (.so), got {_WANTED!r}"
    if _WANTED == "reference":
        return "HELIOS_OPS=reference", ""
    problem = "" if LIBRARY.is_file() else "there is no such file" if _WANTED.endswith(".so") else "it was not built"
    if not problem:
        try:
            torch.ops.load_library(str(LIBRARY))
        except OSError as error:
            problem = f"it does not load ({error})"
    insists = problem and _WANTED != ""
    return problem, f"HELIOS_OPS={_WANTED}, but {LIBRARY} cannot be used: {problem}" if insists else ""


WHY_NOT, _PROBLEM = _load()
if WHY_NOT and not _PROBLEM:
    logger.warning("compiled operators are not used: %s; torch's own are", WHY_NOT)
if not WHY_NOT:
    for _name in OPERATORS:  # every operator writes into its arguments and returns nothing
        torch.library.register_fake(f"helios::{_name}", lambda *_arguments, **_named: None)
_ops = torch.ops.helios
_ON_GPU = not WHY_NOT and torch._C._dispatch_has_kernel_for_dispatch_key("helios::residual_gate_norm", "CUDA")
_GPU_GENERATIONS = (8, 9, 10, 12)  # what setup.py compiles for


@functools.cache
def _serves_gpu(index: int | None) -> bool:
    """True where the library has kernels for this GPU; said aloud where not."""
    reason = _why_not_on_gpu(index)
    if reason and not WHY_NOT:  # where there is no library at all, that has been said
        logger.warning("compiled operators are not used on the GPU: %s; torch's own are", reason)
    return not reason


def _why_not_on_gpu(index: int | None) -> str:
    if not _ON_GPU:
        return "this build has no CUDA kernels (no nvcc was found, or HELIOS_CUDA=0)"
    major, minor = torch.cuda.get_device_capability(index)
    return "" if major in _GPU_GENERATIONS else f"it has no kernels for sm_{major}{minor}"


def _run(name: str, *arguments: object, **named: object) -> None:
    """One operator, in a range of its name."""
    with span(name):
        getattr(_ops, name)(*arguments, **named)


def is_gpu(device: torch.device) -> bool:
    """True on a GPU, and on the meta device, which goes its way: what a GPU would launch can be traced without one."""
    return device.type in ("cuda", "meta")


def serves(device: torch.device) -> bool:
    """True where the compiled operators run on this device."""
    return not WHY_NOT and (device.type in ("cpu", "meta") or (device.type == "cuda" and _serves_gpu(device.index)))


def runs_native(x: Tensor) -> bool:
    """True where the compiled operators serve this tensor's device and dtype."""
    return serves(x.device) and x.dtype in _DTYPES


def check(device: torch.device | None = None) -> None:
    """Raise ValueError where HELIOS_OPS asks for what cannot be, on this device; an import is no place to say so."""
    if _PROBLEM:
        raise ValueError(_PROBLEM)
    insists = device is not None and device.type == "cuda" and _WANTED not in ("", "reference")
    if insists and (reason := _why_not_on_gpu(device.index)):
        raise ValueError(f"HELIOS_OPS={_WANTED}, but {LIBRARY} does not serve {device}: {reason}")


def describe() -> list[str]:
    """Which implementation runs on which device, for `inspect --ops`."""
    check(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None)
    if WHY_NOT:
        return [f"operators      plain torch everywhere: {WHY_NOT}"]
    gpu = "compiled CUDA" if _ON_GPU else "plain torch: this build has no CUDA kernels"
    return [f"operators      CPU: compiled; GPU: {gpu}", f"               {', '.join(OPERATORS)}"]


def gated_residual_(x_BLD: Tensor, update_BLD: Tensor, gate_SD: Tensor | None, *, num_history: int) -> None:
    """See reference.gated_residual_."""
    if not runs_native(x_BLD):
        return reference.gated_residual_(x_BLD, update_BLD, gate_SD, num_history=num_history)
    _run("residual_gate_norm", x_BLD, update_BLD, gate_SD, None, None, None, None, num_history, 0.0)
    return None


def norm_scale_shift(
    x_BLD: Tensor,
    weight_SD: Tensor,
    bias_SD: Tensor,
    *,
    num_history: int,
    eps: float,
    out: Tensor | EightBitRows | None = None,
) -> Tensor | EightBitRows:
    """See reference.norm_scale_shift."""
    if not runs_native(x_BLD):
        return reference.norm_scale_shift(x_BLD, weight_SD, bias_SD, num_history=num_history, eps=eps, out=out)
    return _normed(x_BLD, None, None, weight_SD, bias_SD, out, num_history, eps)


def residual_gate_norm_(
    x_BLD: Tensor,
    update_BLD: Tensor,
    gate_SD: Tensor | None,
    weight_SD: Tensor,
    bias_SD: Tensor,
    *,
    num_history: int,
    eps: float,
    out: Tensor | EightBitRows | None = None,
) -> Tensor | EightBitRows:
    """See reference.residual_gate_norm_: one pass instead of two, or of four in 8 bits."""
    if not runs_native(x_BLD):
        return reference.residual_gate_norm_(
            x_BLD, update_BLD, gate_SD, weight_SD, bias_SD, num_history=num_history, eps=eps, out=out
        )
    return _normed(x_BLD, update_BLD, gate_SD, weight_SD, bias_SD, out, num_history, eps)


def _normed(
    x_BLD: Tensor,
    update_BLD: Tensor | None,
    gate_SD: Tensor | None,
    weight_SD: Tensor,
    bias_SD: Tensor,
    out: Tensor | EightBitRows | None,
    num_history: int,
    eps: float,
) -> Tensor | EightBitRows:
    if out is None:
        out = x_BLD.new_empty(x_BLD.shape)
    eight_bits = isinstance(out, EightBitRows)
    places = (out.values.view(torch.uint8), out.scale) if eight_bits else (out, None)
    _run("residual_gate_norm", x_BLD, update_BLD, gate_SD, weight_SD, bias_SD, *places, num_history, eps)
    return out


def rms_norm_(x_BLD: Tensor, weight_D: Tensor, *, eps: float) -> None:
    """See reference.rms_norm_."""
    if not runs_native(x_BLD):
        return reference.rms_norm_(x_BLD, weight_D, eps=eps)
    _run("rmsnorm_rows", x_BLD, weight_D, eps)
    return None


def qk_rms_norm_rope_(
    qkv_BLE: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    rotation_LK2: Tensor,
    *,
    eps: float,
    history_scale_H: Tensor | None = None,
    num_history: int = 0,
    first_query: int = 0,
) -> None:
    """See reference.qk_rms_norm_rope_."""
    settings = {"num_history": num_history, "first_query": first_query, "eps": eps}
    if not runs_native(qkv_BLE):
        return reference.qk_rms_norm_rope_(
            qkv_BLE, q_weight_D, k_weight_D, rotation_LK2, history_scale_H=history_scale_H, **settings
        )
    scale = None if history_scale_H is None else history_scale_H.contiguous()
    _run("qk_rmsnorm_rope", qkv_BLE, q_weight_D, k_weight_D, rotation_LK2, scale, **settings)
    return None


def qk_rms_norm_rope_pack(
    qkv_BLE: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    rotation_LK2: Tensor,
    heads: Sequence[int],
    *,
    eps: float,
    history_scale_H: Tensor | None = None,
    num_history: int = 0,
    first_query: int = 0,
) -> Tensor:
    """See reference.qk_rms_norm_rope_pack: saves the exchange's own packing pass."""
    settings = {"num_history": num_history, "first_query": first_query, "eps": eps}
    if not runs_native(qkv_BLE):
        return reference.qk_rms_norm_rope_pack(
            qkv_BLE, q_weight_D, k_weight_D, rotation_LK2, heads, history_scale_H=history_scale_H, **settings
        )
    packed = qkv_BLE.new_empty(qkv_BLE.numel())
    scale = None if history_scale_H is None else history_scale_H.contiguous()
    _run("qk_rmsnorm_rope_pack", qkv_BLE, q_weight_D, k_weight_D, rotation_LK2, scale, packed, list(heads), **settings)
    return packed


def quantize_rows(x_BLD: Tensor, *, gelu: bool = False) -> EightBitRows:
    """See reference.quantize_rows: one pass over memory instead of a dozen."""
    if not runs_native(x_BLD):
        return reference.quantize_rows(x_BLD, gelu=gelu)
    out = EightBitRows.empty_like(x_BLD)
    _run("quantize_rows", x_BLD, out.values.view(torch.uint8), out.scale, gelu)
    return out


def quantize_heads(
    q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """See reference.quantize_heads: 5 bytes of traffic an element in 16 bits instead of about 9."""
    operands = (q_BLHK, k_BMHK, v_BMHK)
    if not (runs_native(q_BLHK) and all(x.stride(3) == 1 and x.stride(2) == x.size(3) for x in operands)):
        return reference.quantize_heads(*operands)
    values = tuple(x.new_empty(x.shape, dtype=torch.float8_e4m3fn) for x in operands)
    scales = tuple(x.new_empty(x.size(0), x.size(2), dtype=torch.float32) for x in operands)
    workspace = scales[0].new_empty(3 * scales[0].numel() * _HEAD_PARTS)
    _run("quantize_heads", *operands, *(x.view(torch.uint8) for x in values), *scales, workspace)
    return values, scales


def unpack_heads(received: Tensor, shape: tuple[int, int, int, int], heads: Sequence[int]) -> Tensor:
    """See reference.unpack_heads."""
    if not runs_native(received):
        return reference.unpack_heads(received, shape, heads)
    out = received.new_empty(shape)
    _run("unpack_heads", received, out, list(heads))
    return out


def linear(x_BLD: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x weight^T + bias, [B, L, D] -> [B, L, F]; out may be some rows of a larger tensor."""
    if out is None:
        return F.linear(x_BLD, weight, bias)
    if x_BLD.size(0) == 1:
        torch.addmm(bias, x_BLD[0], weight.t(), out=out[0])
        return out
    return out.copy_(F.linear(x_BLD, weight, bias))


def linear_gelu(x_BLD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See reference.linear_gelu. On a GPU bias and tanh-GELU go into the product's epilogue: one rounding less."""
    sixteen_bits = x_BLD.dtype in (torch.bfloat16, torch.float16)
    if is_gpu(x_BLD.device) and sixteen_bits and epilogue_is_tanh(x_BLD.device):
        rows = torch._addmm_activation(bias, x_BLD.reshape(-1, x_BLD.size(-1)), weight.t(), use_gelu=True)
        return rows.view(*x_BLD.shape[:-1], -1)
    return reference.linear_gelu(x_BLD, weight, bias)


@torch.compiler.assume_constant_result
def epilogue_is_tanh(device: torch.device) -> bool:
    """Whether torch's fused product and GELU is the tanh one on this device and pays: asked of the device, once.

    On the CPU it is the erf one; on sm_120 it is slower than two kernels (SGLang issue 34350).
    """
    return _ask_for_tanh(device)


@functools.cache
def _ask_for_tanh(device: torch.device) -> bool:
    if device.type == "meta":
        return True
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 12:
        return False
    x = torch.linspace(-4, 4, 64, device=device).view(8, 8)
    eye, nothing = torch.eye(8, device=device), torch.zeros(8, device=device)
    fused = torch._addmm_activation(nothing, x, eye, use_gelu=True).double()
    distances = {form: (fused - F.gelu(x.double(), approximate=form)).abs().max().item() for form in ("tanh", "none")}
    logger.info("the fused product's GELU is %s", " and ".join(f"{d:.1e} from {f}" for f, d in distances.items()))
    # The two forms differ by 5e-4; TF32 rounds these inputs by up to 2e-3, and then nothing can be said.
    return distances["tanh"] < 2e-4 < distances["none"]


def merge_partials_(out_BLHK: Tensor, lse_BLH: Tensor, other_BLHK: Tensor, other_lse_BLH: Tensor) -> None:
    """See reference.merge_partials_."""
    if not (runs_native(other_BLHK) and out_BLHK.is_contiguous() and lse_BLH.is_contiguous()):
        return reference.merge_partials_(out_BLHK, lse_BLH, other_BLHK, other_lse_BLH)
    _run("merge_partials", out_BLHK, lse_BLH, other_BLHK.contiguous(), other_lse_BLH.contiguous())
    return None


def patch_rows(
    latents_BCTHW: Tensor,
    kernel: tuple[int, int, int],
    *,
    dtype: torch.dtype | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """See reference.patch_rows."""
    dtype = latents_BCTHW.dtype if dtype is None else dtype
    if not (runs_native(latents_BCTHW) and dtype in _DTYPES):
        return reference.patch_rows(latents_BCTHW, kernel, dtype=dtype, rows=rows)
    tokens, length = 1, latents_BCTHW.size(1)
    for size, part in zip(latents_BCTHW.shape[2:], kernel, strict=True):
        tokens, length = tokens * -(-size // part), length * part
    first, last, _ = rows.indices(tokens)
    out = latents_BCTHW.new_empty(latents_BCTHW.size(0), max(0, last - first), length, dtype=dtype)
    _run("patch_gather", latents_BCTHW, out, list(kernel), first)
    return out


def euler_step_(
    latents: Tensor, rows_BND: Tensor, coefficients_S1: Tensor, index: Tensor, patch: tuple[int, int, int]
) -> None:
    """See reference.euler_step_."""
    if not _steps_native(latents, rows_BND):
        return reference.euler_step_(latents, rows_BND, coefficients_S1, index, patch)
    _run("euler_step", latents, rows_BND, coefficients_S1, index, list(patch))
    return None


def dmd_step_(
    latents: Tensor,
    rows_BND: Tensor,
    start: Tensor,
    coefficients_S2: Tensor,
    index: Tensor,
    patch: tuple[int, int, int],
) -> None:
    """See reference.dmd_step_."""
    if not (_steps_native(latents, rows_BND) and start.is_contiguous() and start.dtype == latents.dtype):
        return reference.dmd_step_(latents, rows_BND, start, coefficients_S2, index, patch)
    _run("dmd_step", latents, rows_BND, start, coefficients_S2, index, list(patch))
    return None


def unipc_step_(
    latents: Tensor,
    rows_BND: Tensor,
    history_KBCTHW: Tensor,
    base: Tensor,
    coefficients: Tensor,
    index: Tensor,
    patch: tuple[int, int, int],
) -> None:
    """See reference.unipc_step_."""
    if not _steps_native(latents, rows_BND):
        return reference.unipc_step_(latents, rows_BND, history_KBCTHW, base, coefficients, index, patch)
    _run("unipc_step", latents, rows_BND, history_KBCTHW, base, coefficients, index, list(patch))
    return None


def _steps_native(latents: Tensor, rows_BND: Tensor) -> bool:
    return (
        runs_native(rows_BND)
        and latents.is_contiguous()
        and rows_BND.is_contiguous()
        and latents.dtype in (torch.float32, rows_BND.dtype)
    )


def upsample_renoise(
    x_BCTHW: Tensor, draws_N4: Tensor, factor: Tensor, *, alpha: float, beta: float, dtype: torch.dtype
) -> Tensor:
    """See reference.upsample_renoise."""
    wide = dtype == torch.float32
    native = runs_native(x_BCTHW) and x_BCTHW.is_contiguous() and dtype in (torch.float32, torch.bfloat16)
    if not (native and x_BCTHW.dtype in (torch.float32, dtype)):
        return reference.upsample_renoise(x_BCTHW, draws_N4, factor, alpha=alpha, beta=beta, dtype=dtype)
    out = x_BCTHW.new_empty(*x_BCTHW.shape[:3], 2 * x_BCTHW.size(3), 2 * x_BCTHW.size(4))
    _run("upsample_renoise", x_BCTHW, draws_N4.contiguous(), factor.contiguous(), out, alpha, beta, wide)
    return out


def cfg_combine(positive: Tensor, negative: Tensor, *, scale: float, zero_star: bool) -> Tensor:
    """See reference.cfg_combine."""
    if not (runs_native(positive) and positive.is_contiguous() and negative.is_contiguous()):
        return reference.cfg_combine(positive, negative, scale=scale, zero_star=zero_star)
    out = torch.empty_like(positive)
    workspace = None
    if zero_star:
        workspace = positive.new_empty(positive.size(0), _CFG_BLOCKS, 2, dtype=torch.float64)
    _run("cfg_combine", positive, negative, out, workspace, scale)
    return out


def channel_norm_silu(
    x_BCTHW: Tensor,
    gamma: Tensor,
    *,
    silu: bool = True,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See reference.channel_norm_silu: one pass instead of one for each of sum, norm and SiLU."""
    if not _serves_pictures(x_BCTHW, residual, out):
        return reference.channel_norm_silu(x_BCTHW, gamma, silu=silu, bias=bias, residual=residual, out=out)
    if out is None:
        out = torch.empty_like(x_BCTHW)
    _run("channel_norm_silu", x_BCTHW, gamma.reshape(-1), bias, residual, out, silu)
    return out


def upsample_nearest(
    x_BCTHW: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See reference.upsample_nearest."""
    if not _serves_pictures(x_BCTHW, residual, out):
        return reference.upsample_nearest(x_BCTHW, bias=bias, residual=residual, out=out)
    if out is None:
        batch, channels, frames, height, width = x_BCTHW.shape
        out = x_BCTHW.new_empty(batch, frames, 2 * height, 2 * width, channels).permute(0, 4, 1, 2, 3)
    _run("upsample_nearest", x_BCTHW, bias, residual, out)
    return out


def bias_residual(
    x_BCTHW: Tensor, bias: Tensor | None, residual: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """See reference.bias_residual."""
    if not _serves_pictures(x_BCTHW, residual, out):
        return reference.bias_residual(x_BCTHW, bias, residual, out=out)
    out = x_BCTHW if out is None else out
    _run("bias_residual", x_BCTHW, bias, residual, out)
    return out


def _serves_pictures(x_BCTHW: Tensor, *others: Tensor | None) -> bool:
    pictures = (x_BCTHW, *(other for other in others if other is not None))
    return runs_native(x_BCTHW) and all(map(_is_channels_last, pictures))


def _is_channels_last(x_BCTHW: Tensor) -> bool:
    return x_BCTHW.stride(1) == 1 or x_BCTHW.size(1) == 1
