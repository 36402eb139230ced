"""Softmax attention on one device; the one place that picks a backend.

# B batch, L query tokens, M key tokens, H heads, K head dim
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from helios_engine.ops import native as ops
from helios_engine.trace import span

logger = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
AttendWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Dao-AILab's packages: backend -> modules that may hold flash_attn_func, the name to install, and the argument that asks
# for the log-sum-exp too. All take [B, L, H, K] and give the log-sum-exp as float32 [B, H, L].
_PACKAGES = {
    "fa2": (("flash_attn",), "flash-attn", "return_attn_probs"),
    "fa3": (("fa3_fwd_interface", "flash_attn_interface"), "fa3_fwd", "return_attn_probs"),
    "fa4": (("flash_attn.cute",), "flash-attn-4", "return_lse"),
}
_PACKAGES["fa3_fp8"] = _PACKAGES["fa3"]  # approximate, so never chosen by itself


class Attention:
    """Non-causal attention by one chosen backend: q [B, L, H, K], k and v [B, M, H, K] -> [B, L, H, K]."""

    def __init__(self, backend: str, attend: Attend, attend_with_lse: AttendWithLse) -> None:
        self.backend = backend
        self._attend, self._attend_with_lse = attend, attend_with_lse

    def __call__(self, q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
        if q_BLHK.numel() == 0:  # torch's CPU kernel divides by the number of queries
            return torch.empty_like(q_BLHK)
        with span("attention"):
            return self._attend(q_BLHK, k_BMHK, v_BMHK)

    def with_lse(self, q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the natural logarithm of each row's sum of exponentials, float32 [B, L, H].

        Without keys the result is zero and the logarithm -inf: such a partial adds nothing when merged.
        """
        if q_BLHK.numel() == 0 or k_BMHK.numel() == 0:
            lse = q_BLHK.new_full(q_BLHK.shape[:3], float("-inf"), dtype=torch.float32)
            return torch.zeros_like(q_BLHK), lse
        with span("attention"):
            return self._attend_with_lse(q_BLHK, k_BMHK, v_BMHK)


def choose_attention(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention:
    """The backend called name, or under "auto" the first of attention_candidates.

    Raises ValueError when a backend that was asked for cannot run, saying why.
    """
    if name == "auto":
        return _make(attention_candidates(device=device, dtype=dtype, head_dim=head_dim)[0], device)
    if reason := _refusal(name, device, dtype, head_dim):
        raise ValueError(f"attention backend {name} cannot run: {reason}; use auto or another one")
    return _make(name, device)


def attention_candidates(*, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Exact backends that can run here and may be the fastest, the likeliest first; never empty.

    On a GPU FlashAttention-3 (Hopper, bfloat16, package installed), then torch's attention with cuDNN before flash (cuDNN
    is 1.7 to 2.3 times faster on Hopper than torch's own default order, transformers issue 48163); elsewhere torch's own.
    FlashAttention-2 and -4 run when asked for, and so does FlashAttention-3 in 8 bits, which is approximate.
    """
    found = []
    for candidate in ("fa3", "cudnn", "flash") if device.type == "cuda" else ():
        reason = _refusal(candidate, device, dtype, head_dim)
        if reason is None:
            found.append(candidate)
        else:
            logger.info("attention: %s left out, %s", candidate, reason)
    return found or ["sdpa"]


def time_attention(
    names: Sequence[str],
    shapes: Sequence[tuple[int, int, int]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    with_lse: bool = False,
    repeats: int = 5,
) -> dict[str, float]:
    """Seconds that one call of every shape (queries, keys, heads) takes together, by backend: the median of some.

    with_lse times the call a ring makes. A backend that fails at one of the shapes is left out; RuntimeError when all do.
    """
    totals = {}
    for name in names:
        attention = _make(name, device)
        attend = attention.with_lse if with_lse else attention
        try:
            totals[name] = sum(_median_seconds(attend, shape, device, dtype, head_dim, repeats) for shape in shapes)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as in a trial
            logger.warning("attention: %s left out, it fails at the real size: %s", name, _said(error))
    if not totals:
        raise RuntimeError(f"none of the attention backends {', '.join(names)} runs at the real size")
    return totals


def _median_seconds(
    attend: Callable[..., object],
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    repeats: int,
) -> float:
    queries, keys, heads = shape
    q, k, v = (torch.randn(1, n, heads, head_dim, device=device, dtype=dtype) for n in (queries, keys, keys))
    attend(q, k, v)
    seconds = []
    for _ in range(repeats):
        _drain(device)
        start = time.perf_counter()
        attend(q, k, v)
        _drain(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _refusal(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot run, or None."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs a 16-bit dtype, this is {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"it needs a head size that is a multiple of 8 up to 256, this is {head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if name in _PACKAGES:
        try:
            _import_flash_attention(name)
        except Exception as error:  # a package built for another torch or CUDA raises what it likes
            return f"FlashAttention-{name[2]} cannot be imported ({_said(error)}); pip install {_PACKAGES[name][1]}"
    if name in ("fa3", "fa3_fp8") and (capability[0] != 9 or dtype != torch.bfloat16):
        return f"it needs bfloat16 on a Hopper GPU (sm_90), this is {dtype} on sm_{capability[0]}{capability[1]}"
    if name == "fa4" and capability[0] < 9:
        return f"it needs sm_90 or newer, this is sm_{capability[0]}{capability[1]}"
    if capability[0] < 8:
        return f"it needs sm_80 or newer, this is sm_{capability[0]}{capability[1]}"
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    return _failure(name, device, dtype, head_dim)


def _failure(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What a small call of the backend says, or None when it runs."""
    # Outside of the trial: where a device makes no tensors, no backend is to blame.
    q, k = (torch.randn(1, tokens, 2, head_dim, dtype=dtype, device=device) for tokens in (64, 128))
    try:
        _make(name, device)(q, k, k)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and packages raise of all types; each is a reason to take another backend
        return f"a trial call failed: {_said(error)}"
    return None


def _said(error: Exception) -> str:
    """An error as part of one line; its type too where that says more than RuntimeError."""
    kind = "" if type(error) in (RuntimeError, ImportError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())[:300]}"


def _make(name: str, device: torch.device) -> Attention:
    if name in _PACKAGES:
        return Attention(name, *_flash_attention(name))
    if name == "cudnn":
        return Attention(name, _sdpa_with([SDPBackend.CUDNN_ATTENTION]), _cudnn_with_lse)
    if name == "flash":
        return Attention(name, _sdpa_with([SDPBackend.FLASH_ATTENTION]), _cuda_with_lse)
    return Attention(name, _sdpa, _cpu_with_lse if device.type == "cpu" else _cuda_with_lse)


def _sdpa(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BMHK, v_BMHK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _sdpa_with(backends: list[SDPBackend]) -> Attend:
    def attend(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
        with sdpa_kernel(backends, set_priority=True):
            return _sdpa(q_BLHK, k_BMHK, v_BMHK)

    return attend


def _cpu_with_lse(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BMHK, v_BMHK))
    out, lse_BHL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out.transpose(1, 2), lse_BHL.transpose(1, 2)


def _cuda_with_lse(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> tuple[Tensor, Tensor]:
    """torch's kernels that give the logarithm: flash for 16-bit numbers, the memory-efficient one for float32."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BMHK, v_BMHK))
    if q.dtype == torch.float32:
        out, lse_BHL = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    else:
        out, lse_BHL = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    # The efficient kernel pads its rows to a multiple of 32.
    return out.transpose(1, 2), lse_BHL[..., : q.size(2)].transpose(1, 2)


def _cudnn_with_lse(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> tuple[Tensor, Tensor]:
    """cuDNN's kernel, whose logarithm torch asks for in training alone."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BMHK, v_BMHK))
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, compute_log_sumexp=True)[:2]
    # [B, H, L, 1] or [B, H, L], by release.
    return out.transpose(1, 2), lse.view(lse.shape[:3]).transpose(1, 2)


def _import_flash_attention(name: str) -> Callable[..., object]:
    """flash_attn_func of the first of a backend's modules that is there and loads."""
    modules = [module for module in _PACKAGES[name][0] if _is_installed(module)]
    if not modules:
        raise ImportError("no package is installed")
    return importlib.import_module(modules[0]).flash_attn_func


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def _in_eight_bits(
    flash_attn_func: Callable[..., object], q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor, **more: object
) -> object:
    """FlashAttention-3 on e4m3 operands with a scale per head; its result is bfloat16."""
    (q, k, v), (q_scale, k_scale, v_scale) = ops.quantize_heads(q_BLHK, k_BMHK, v_BMHK)
    return flash_attn_func(q, k, v, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale, **more)


def _flash_attention(name: str) -> tuple[Attend, AttendWithLse]:
    flash_attn_func = _import_flash_attention(name)
    if name == "fa3_fp8":
        flash_attn_func = functools.partial(_in_eight_bits, flash_attn_func)
    ask_for_lse = {_PACKAGES[name][2]: True}

    def attend(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
        out = flash_attn_func(q_BLHK, k_BMHK, v_BMHK, causal=False)
        return out[0] if isinstance(out, tuple) else out  # some releases return (out, lse)

    def attend_with_lse(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> tuple[Tensor, Tensor]:
        out, lse_BHL = flash_attn_func(q_BLHK, k_BMHK, v_BMHK, causal=False, **ask_for_lse)[:2]
        return out, lse_BHL.transpose(1, 2)

    return attend, attend_with_lse
