"""Attention through the xfuser package (xDiT): its process groups and its USP, as a cross-check and a baseline.

# B batch, l this rank's tokens, H all heads, K head dim
Written against xfuser 0.7.0, whose functional path (model_executor.layers.usp.USP) works; its long-context attention class
does not import with any yunchang on PyPI. Even shares only, three packed tensors as one exchange, and one for the output.
"""

from __future__ import annotations

import importlib
import os
import types

from torch import Tensor
from torch import distributed as dist

from helios_engine.ops.attention import Attention
from helios_engine.parallel.attention import SequenceAttention
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.layout import TokenLayout

# Our backend -> xfuser's AttentionBackendType. Its SDPA gives no log-sum-exp, so a ring cannot use it.
_BACKENDS = {
    "fa2": "FLASH",
    "fa3": "FLASH_3",
    "fa4": "FLASH_4",
    "cudnn": "CUDNN",
    "flash": "SDPA_FLASH",
    "sdpa": "SDPA",
}
_WITHOUT_LSE = ("sdpa", "fa4")
_INSTALL = "pip install --no-deps xfuser==0.7.0 yunchang==0.6.4 einops distvae==0.1.0"


def check(context: ContextParallel, *, num_heads: int, backend: str) -> None:
    """Raise ValueError where xfuser cannot serve these ranks, heads and this local attention."""
    degrees = context.degrees
    reason = None
    if context.size == 1:
        reason = "there is one rank, nothing to exchange"
    elif context.size != dist.get_world_size():
        reason = f"its groups span all {dist.get_world_size()} ranks of the process group, this context {context.size}"
    elif backend not in _BACKENDS:
        reason = f"it has no attention like {backend}"
    elif num_heads % degrees.ulysses:
        reason = f"it splits heads evenly, and {num_heads} heads do not divide by ulysses degree {degrees.ulysses}"
    elif degrees.ring > 1 and backend in _WITHOUT_LSE:
        reason = f"its ring needs a log-sum-exp, which its attention {_BACKENDS[backend]} does not give"
    else:
        try:
            _import("xfuser.model_executor.layers.usp")
        # Without a GPU the package raises NotImplementedError on import, and other things further down.
        except (ImportError, NotImplementedError, AttributeError, AssertionError, RuntimeError) as error:
            reason = f"the package does not import ({type(error).__name__}: {error}); it needs a GPU and {_INSTALL}"
    if reason is not None:
        raise ValueError(f"exchange xfuser cannot run: {reason}; use exchange packed")


class XfuserAttention(SequenceAttention):
    """xfuser's USP behind the interface of SequenceAttention. Making one is collective."""

    def __init__(self, context: ContextParallel, attention: Attention) -> None:
        super().__init__(context, attention)
        self._usp = _import("xfuser.model_executor.layers.usp").USP
        kinds = _import("xfuser.core.distributed.attention_backend").AttentionBackendType
        self._backend = kinds[_BACKENDS[attention.backend]]
        _make_groups(context)

    def check_tokens(self, num_tokens: int) -> None:
        if num_tokens % self._context.sequence_size:
            raise ValueError(
                f"exchange xfuser shares tokens evenly, and {num_tokens} tokens do not divide by "
                f"{self._context.sequence_size} ranks; use exchange packed or another size"
            )

    def heads_to_pack(self, layout: TokenLayout) -> tuple[int, ...] | None:
        return None

    def __call__(self, qkv_Bl3HK: Tensor, layout: TokenLayout, *, noisy_only: bool) -> Tensor:
        skipped = layout.history[self._context.sequence_rank] if noisy_only else 0
        q, k, v = (part.transpose(1, 2).contiguous() for part in qkv_Bl3HK.unbind(2))
        q[:, :, :skipped] = 0  # never written by the caller
        self._count(q)
        out_BHlK = self._usp(q, k, v, backend=self._backend, combine_qkv_a2a=True)
        return out_BHlK.transpose(1, 2)[:, skipped:]

    def _count(self, part: Tensor) -> None:
        ulysses, ring = self._context.degrees.ulysses, self._context.degrees.ring
        traffic = self._context.traffic
        if ulysses > 1:
            traffic.count("qkv", 3 * part.nbytes * (ulysses - 1) // ulysses)
            traffic.count("out", part.nbytes * (ulysses - 1) // ulysses)
        if ring > 1:
            traffic.count("ring", 2 * part.nbytes * (ring - 1))


def _make_groups(context: ContextParallel) -> None:
    """xfuser's process groups over our ranks, in the same mesh, and the little of its runtime state that USP reads."""
    distributed = _import("xfuser.core.distributed")
    if not distributed.model_parallel_is_initialized():
        backend, degrees = dist.get_backend(), context.degrees
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        distributed.init_distributed_environment(
            rank=dist.get_rank(), world_size=context.size, local_rank=local_rank, backend=backend
        )
        distributed.initialize_model_parallel(
            classifier_free_guidance_degree=degrees.cfg,
            sequence_parallel_degree=context.sequence_size,
            ulysses_degree=degrees.ulysses,
            ring_degree=degrees.ring,
            backend=backend,
        )
    state = _import("xfuser.core.distributed.runtime_state")
    if state._RUNTIME is None:
        runtime = types.SimpleNamespace(use_spargeattn_head_balance=False)
        state._RUNTIME = types.SimpleNamespace(fp8_comms=None, runtime_config=runtime)


def _import(name: str) -> types.ModuleType:
    return importlib.import_module(name)
