"""Softmax attention on one device; the one place that picks a backend.

# B batch, L query tokens, M key tokens, H heads, K head dim
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_FA3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")
_SDPA_PREFERENCE = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Attention:
    """Non-causal attention by one chosen backend: q [B, L, H, K], k and v [B, M, H, K] -> [B, L, H, K]."""

    def __init__(self, backend: str, attend: Attend) -> None:
        self.backend = backend
        self._attend = attend

    def __call__(self, q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
        if q_BLHK.numel() == 0:  # torch's CPU kernel divides by the number of queries
            return torch.empty_like(q_BLHK)
        return self._attend(q_BLHK, k_BMHK, v_BMHK)


def choose_attention(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention:
    """The backend called name, or under "auto" the fastest exact one that can run here.

    On a GPU the order is FlashAttention-3 (Hopper, bfloat16, package installed), then torch's attention with cuDNN
    preferred over flash (cuDNN is 1.7 to 2.3 times faster on Hopper than torch's own default order, transformers issue
    48163), on the CPU torch's. Raises ValueError when an asked-for backend cannot run, saying why.
    """
    reasons = {
        candidate: _refusal(candidate, device, dtype, head_dim) for candidate in ("fa3", "cudnn", "flash", "sdpa")
    }
    if name != "auto":
        if reasons[name]:
            raise ValueError(f"attention backend {name} cannot run: {reasons[name]}; use auto or another one")
        return Attention(name, _make(name, strict=True))
    if device.type == "cuda":
        for candidate in ("fa3", "cudnn", "flash"):
            if not reasons[candidate]:
                return Attention(candidate, _make(candidate, strict=False))
            logger.info("attention: %s left out, %s", candidate, reasons[candidate])
    return Attention("sdpa", _make("sdpa", strict=False))


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
    if name == "fa3":
        if not any(importlib.util.find_spec(module) for module in _FA3_MODULES):
            return "no FlashAttention-3 package is installed (pip install fa3_fwd)"
        if capability[0] != 9 or dtype != torch.bfloat16:
            return f"it needs bfloat16 on a Hopper GPU (sm_90), this is {dtype} on sm_{capability[0]}{capability[1]}"
    elif capability[0] < 8:
        return f"it needs sm_80 or newer, this is sm_{capability[0]}{capability[1]}"
    elif name == "cudnn" and not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    return None


def _make(name: str, *, strict: bool) -> Attend:
    if name == "fa3":
        return _flash_attention_3()
    if name == "cudnn":
        return _sdpa_with([SDPBackend.CUDNN_ATTENTION] if strict else _SDPA_PREFERENCE)
    if name == "flash":
        return _sdpa_with([SDPBackend.FLASH_ATTENTION])
    return _sdpa


def _sdpa(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BMHK, v_BMHK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _sdpa_with(backends: list[SDPBackend]) -> Attend:
    def attend(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
        with sdpa_kernel(backends, set_priority=True):
            return _sdpa(q_BLHK, k_BMHK, v_BMHK)

    return attend


def _flash_attention_3() -> Attend:
    module_name = next(name for name in _FA3_MODULES if importlib.util.find_spec(name))
    flash_attn_func = importlib.import_module(module_name).flash_attn_func

    def attend(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
        out = flash_attn_func(q_BLHK, k_BMHK, v_BMHK, causal=False)
        return out[0] if isinstance(out, tuple) else out  # older releases return (out, lse)

    return attend
