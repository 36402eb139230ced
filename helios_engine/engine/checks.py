"""What must hold before anything large is read, and between requests, states and ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from helios_engine.config import NUM_HISTORY_FRAMES, ModelConfig
from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.engine.devices import resolve_device, resolve_dtype
from helios_engine.engine.plan import Plan
from helios_engine.engine.state import SessionState
from helios_engine.ops import fp8, native
from helios_engine.ops.attention import attention_candidates, choose_attention
from helios_engine.parallel.attention import check_exchange
from helios_engine.parallel.context import ContextParallel
from helios_engine.request import VideoRequest
from helios_engine.settings import EngineConfig


def checked_checkpoint(
    path_or_id: str | Path, config: EngineConfig, context: ContextParallel
) -> tuple[Checkpoint, str]:
    """The checkpoint and the attention backend, files and settings checked before anything large is read."""
    device, dtype = resolve_device(config.device), resolve_dtype(config)
    native.check(device)
    checkpoint = Checkpoint.open(path_or_id, config.revision)
    model = checkpoint.model
    attention = choose_attention(
        config.attention_backend, device=device, dtype=dtype, head_dim=model.attention_head_dim
    )
    check_exchange(
        config.exchange,
        context,
        num_heads=model.num_attention_heads,
        backend=attention.backend,
        ring_method=config.ring_method,
    )
    check_approximations(config, model, context, device, dtype)
    checkpoint.check()
    return checkpoint, attention.backend


def load_facts(checkpoint: Checkpoint, backend: str, config: EngineConfig) -> dict[str, str]:
    """What must be equal on all ranks; where the files lie and which GPU it is need not be."""
    device = resolve_device(config.device)
    can_run = attention_candidates(
        device=device, dtype=resolve_dtype(config), head_dim=checkpoint.model.attention_head_dim
    )
    kind = {"device": device.type, "attention": backend, "attention backends that run": ", ".join(can_run)}
    settings = {f.name: repr(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name != "device"}
    parts = {name: repr(getattr(checkpoint, name)) for name in ("model", "vae", "scheduler", "recipe")}
    return {**kind, **settings, **parts}


def check_approximations(
    config: EngineConfig, model: ModelConfig, context: ContextParallel, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise ValueError where an approximation that was asked for cannot run here."""
    refresh, _, uses_fp8 = config.approximations
    if refresh > 1 and context.sequence_size > 1:
        raise ValueError(
            f"history_refresh {refresh} keeps keys and values of the whole history on each rank, but {context.describe()} "
            "share them out; use history_refresh 1, or cfg degree 2 alone"
        )
    if uses_fp8 and (reason := fp8.refusal(device, dtype, (model.dim, model.ffn_dim))):
        raise ValueError(f"fp8 cannot run: {reason}; leave it out")


def check_state(state: SessionState, plan: Plan, *, channels: int) -> None:
    """Refuse a state that this model or its own request cannot have made."""
    shapes = {
        "history": (1, channels, NUM_HISTORY_FRAMES, *plan.latent_size),
        "anchor": (1, channels, 1, *plan.latent_size),
    }
    for name, shape in shapes.items():
        tensor = getattr(state, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"the state's {name} {tuple(tensor.shape)} does not fit this model's {shape}")
    if state.index < 0 or (plan.num_chunks is not None and state.index > plan.num_chunks):
        raise ValueError(f"the state's chunk index {state.index} lies outside its video of {plan.num_chunks} chunks")
    if (state.negative is None) == plan.is_guided:
        raise ValueError("the state's negative prompt and its guidance_scale do not belong together")


def check_same_latents(context: ContextParallel, stage: int, step: int, latents: Tensor) -> None:
    """Raise RuntimeError on every rank when not all hold the same latents, bit for bit."""
    bits = latents.detach().float().contiguous().view(torch.int32).flatten().long()
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    sums = context.gather_numbers([int(bits.sum()), int((bits * places).sum())])
    if others := [rank for rank, own in enumerate(sums) if own != sums[0]]:
        raise RuntimeError(f"after stage {stage}, step {step} the latents of ranks {others} differ from rank 0's")


def check_same_shape(requests: Sequence[VideoRequest], plans: Sequence[Plan]) -> None:
    for request, plan in zip(requests, plans, strict=True):
        if plan != plans[0]:
            raise ValueError(
                "stream_batch needs requests of one shape: size, num_frames, trim, steps, guidance and first-chunk "
                "settings must agree; use one stream each for different ones"
            )
        if (request.latents is None) != (requests[0].latents is None):
            raise ValueError("stream_batch needs latents for all requests or for none")
        lengths = [_text_lengths(r, plan.is_guided) for r in (requests[0], request)]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"stream_batch needs prompts of one text length; (prompt, negative prompt) have {lengths[0]} and "
                f"{lengths[1]} tokens"
            )


def _text_lengths(request: VideoRequest, is_guided: bool) -> tuple[int, ...]:
    embeds = (request.prompt_embeds, request.negative_prompt_embeds)
    lengths = tuple(request.max_sequence_length if e is None else e.size(1) for e in embeds)
    return lengths if is_guided else lengths[:1]
