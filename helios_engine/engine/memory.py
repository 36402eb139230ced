"""What a run will need, predicted from shapes alone; no weights are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from helios_engine.config import EngineConfig, read_json
from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.engine.engine import resolve_device, resolve_dtype
from helios_engine.engine.frames import decode_bytes, frames_per_call_for
from helios_engine.engine.plan import Plan
from helios_engine.model.transformer import Transformer
from helios_engine.model.vae import VideoAutoencoder


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
    branches = 2 if plan.is_guided else 1
    tokens = plan.tokens_per_stage[-1] + plan.history_tokens
    # Alive at once in a block: the residual stream, a normed copy, fused q k v (or the feed-forward's hidden rows), and
    # the attention output; guidance keeps a second residual stream.
    widths = (2 + branches) * model.dim + max(4 * model.dim, model.ffn_dim)
    split = frames_per_call_for(resolve_device(config.device), vae, plan.latent_size)
    return MemoryEstimate(
        transformer=_module_bytes(transformer),
        text_encoder=_text_encoder_bytes(checkpoint, dtype),
        vae=_module_bytes(vae),
        text_keys_values=branches * model.num_layers * text_tokens * 2 * model.dim * dtype.itemsize,
        denoise_activations=tokens * widths * dtype.itemsize,
        decode_activations=decode_bytes(vae, plan.latent_size, split),
    )


def _module_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in module.parameters())


def _text_encoder_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """From the encoder's JSON: embedding, and per layer attention, gated feed-forward, norms and position biases."""
    if not checkpoint.has_text_encoder:
        return 0
    config = read_json(checkpoint.folder / "text_encoder" / "config.json")
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    biases = config.get("relative_attention_num_buckets", 32) * config["num_heads"]
    layer = 4 * width * inner + 3 * width * config["d_ff"] + 2 * width + biases
    return (config["vocab_size"] * width + config["num_layers"] * layer + width) * dtype.itemsize
