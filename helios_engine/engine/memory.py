"""What a run will need, predicted from shapes alone; no weights are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from helios_engine.config import EngineConfig
from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.engine.engine import resolve_device, resolve_dtype
from helios_engine.engine.frames import decode_bytes, frames_per_call_for
from helios_engine.engine.plan import Plan
from helios_engine.model.text import TextEncoder
from helios_engine.model.transformer import Transformer
from helios_engine.model.vae import VideoAutoencoder

# Rows of the model's width alive per token at a forward's peak: 2.14 GB for 11040 tokens of the 14 B model in bfloat16,
# counted on the meta device; float32 copies inside the element-wise operators are in it.
_LIVE_WIDTHS = 19


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on the compute device."""

    transformer: int
    text_encoder: int
    vae: int
    text_keys_values: int
    denoise_activations: int
    decode_activations: int

    @property
    def peak(self) -> int:
        """Weights and prompts stay; denoising and decoding take turns."""
        resident = self.transformer + self.text_encoder + self.vae + self.text_keys_values
        return resident + max(self.denoise_activations, self.decode_activations)


def estimate_memory(checkpoint: Checkpoint, plan: Plan, config: EngineConfig, text_tokens: int) -> MemoryEstimate:
    """Expected memory of one video under a plan."""
    model, dtype = checkpoint.model, resolve_dtype(config)
    with torch.device("meta"):
        transformer = Transformer(model, dtype)
        vae = VideoAutoencoder(checkpoint.vae).to(getattr(torch, config.vae_dtype))
    text_encoder = 0
    if checkpoint.has_text_encoder:
        text_encoder = _module_bytes(TextEncoder.on_meta(checkpoint.folder / "text_encoder").to(dtype))
    branches = 2 if plan.is_guided else 1
    tokens = plan.tokens_per_stage[-1] + plan.history_tokens
    widths = _LIVE_WIDTHS * model.dim + (branches - 1) * model.dim  # guidance keeps a second residual stream
    split = frames_per_call_for(resolve_device(config.device), vae, plan.latent_size)
    return MemoryEstimate(
        transformer=_module_bytes(transformer),
        text_encoder=text_encoder,
        vae=_module_bytes(vae),
        text_keys_values=branches * model.num_layers * text_tokens * 2 * model.dim * dtype.itemsize,
        denoise_activations=tokens * widths * dtype.itemsize,
        decode_activations=decode_bytes(vae, plan.latent_size, split),
    )


def _module_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in module.parameters())
