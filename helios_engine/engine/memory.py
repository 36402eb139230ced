"""What a run will need, predicted from shapes alone, and what to do where it does not fit; no weights are read."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.engine.devices import resolve_device, resolve_dtype
from helios_engine.engine.frames import decode_bytes, frames_per_call_for
from helios_engine.engine.plan import Plan
from helios_engine.model.text import TextEncoder
from helios_engine.model.transformer import Transformer
from helios_engine.model.vae import VideoAutoencoder
from helios_engine.settings import EngineConfig

# Rows of the model's width alive per token at a forward's peak: 2.14 GB for 11040 tokens of the 14 B model in bfloat16,
# counted on the meta device; float32 copies inside the element-wise operators are in it.
_LIVE_WIDTHS = 19
# The largest video the checkpoints are made for, where no request is known yet.
_USUAL_TOKENS = 11040
_USUAL_TEXT_TOKENS = 512


class OutOfMemory(RuntimeError):
    """The device's memory does not suffice; the message names a setting that needs less."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on the compute device, each part while it is there; offload says which are there together."""

    offload: str
    transformer: int  # with group offload its resident part
    transformer_slots: int
    text_encoder: int
    vae: int
    text_keys_values: int
    denoise_activations: int
    decode_activations: int

    @property
    def peak(self) -> int:
        """Encoding text, denoising and decoding take turns; what stays meanwhile depends on the offload."""
        denoising = self.transformer_slots + self.denoise_activations
        if self.offload == "none":
            resident = self.transformer + self.text_encoder + self.vae + self.text_keys_values
            return resident + max(denoising, self.decode_activations)
        if self.offload == "group":
            resident = self.transformer + self.vae + self.text_keys_values
            return resident + max(self.text_encoder, denoising, self.decode_activations)
        kept = self.text_keys_values
        return max(self.text_encoder, self.transformer + kept + denoising, self.vae + kept + self.decode_activations)


def estimate_memory(checkpoint: Checkpoint, plan: Plan, config: EngineConfig, text_tokens: int) -> MemoryEstimate:
    """Expected memory of one video under a plan."""
    model, dtype = checkpoint.model, resolve_dtype(config)
    with torch.device("meta"):
        transformer = Transformer(model, dtype)
        vae = VideoAutoencoder(checkpoint.vae).to(getattr(torch, config.vae_dtype))
    num_slots = 1 + config.offload_ahead
    is_group = config.offload == "group"
    text_encoder = 0
    if checkpoint.has_text_encoder:
        encoder = TextEncoder.on_meta(checkpoint.folder / "text_encoder").to(dtype)
        layers = encoder.encoder.block
        whole, layer = _module_bytes(encoder), _module_bytes(layers[0])
        text_encoder = min(num_slots, len(layers)) * layer if is_group else whole
    branches = 2 if plan.is_guided else 1
    tokens = plan.tokens_per_stage[-1] + plan.history_tokens
    widths = _LIVE_WIDTHS * model.dim + (branches - 1) * model.dim  # guidance keeps a second residual stream
    split = frames_per_call_for(resolve_device(config.device), vae, plan.latent_size)
    weights, block = _module_bytes(transformer), _module_bytes(transformer.blocks[0])
    refresh, _, uses_fp8 = config.approximations
    if uses_fp8:
        products = model.num_layers * (6 * model.dim**2 + 2 * model.dim * model.ffn_dim)
        weights -= products * (dtype.itemsize - 1)
    kept = branches * model.num_layers * plan.history_tokens * 2 * model.dim * dtype.itemsize if refresh > 1 else 0
    text_keys_values = branches * model.num_layers * text_tokens * 2 * model.dim * dtype.itemsize
    if is_group and not has_room_for_text(checkpoint, config, resolve_device(config.device)):
        text_keys_values = branches * text_tokens * model.dim * dtype.itemsize
    return MemoryEstimate(
        offload=config.offload,
        transformer=weights - model.num_layers * block if is_group else weights,
        transformer_slots=min(num_slots, model.num_layers) * block if is_group else 0,
        text_encoder=text_encoder,
        vae=_module_bytes(vae),
        text_keys_values=text_keys_values,
        denoise_activations=tokens * widths * dtype.itemsize + kept,
        decode_activations=decode_bytes(vae, plan.latent_size, split),
    )


def has_room_for_text(checkpoint: Checkpoint, config: EngineConfig, device: torch.device) -> bool:
    """Whether all layers' text keys and values can stay on the device beside streamed blocks; always on the CPU."""
    if device.type != "cuda":
        return True
    model, size = checkpoint.model, resolve_dtype(config).itemsize
    with torch.device("meta"):
        transformer = Transformer(model, resolve_dtype(config))
        vae = VideoAutoencoder(checkpoint.vae).to(getattr(torch, config.vae_dtype))
    streamed = (model.num_layers - 1 - config.offload_ahead) * _module_bytes(transformer.blocks[0])
    text = 2 * model.num_layers * _USUAL_TEXT_TOKENS * 2 * model.dim * size
    working = _USUAL_TOKENS * (_LIVE_WIDTHS + 1) * model.dim * size
    needed = _module_bytes(transformer) - max(0, streamed) + _module_bytes(vae) + text + working
    return needed < 0.9 * torch.cuda.get_device_properties(device).total_memory


@contextlib.contextmanager
def advise_memory(checkpoint: Checkpoint, config: EngineConfig, plan: Plan | None = None) -> Iterator[None]:
    """Turn the device's out-of-memory error into one that says what would fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split()).split(" If reserved")[0][:200]
        raise OutOfMemory(f"{_advice(checkpoint, config, plan)} ({reason})") from None


def _advice(checkpoint: Checkpoint, config: EngineConfig, plan: Plan | None) -> str:
    """Which setting needs less, with what it would need where a plan is known."""
    changes = [
        {"offload": "group"},
        {"offload": "group", "vae_dtype": "bfloat16"},
    ]
    for change in changes:
        other = dataclasses.replace(config, **change)
        if other == config or (config.offload == "group" and "vae_dtype" not in change):
            continue
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in change.items())
        if plan is None:
            return f"the device's memory does not suffice; {flags} needs far less"
        own, less = (
            estimate_memory(checkpoint, plan, choice, _USUAL_TEXT_TOKENS).peak / 1e9 for choice in (config, other)
        )
        if less < own:
            return f"the device's memory does not suffice for about {own:.1f} GB; {flags} needs about {less:.1f} GB"
    return "the device's memory does not suffice for this size even with --offload group; make the video smaller"


def _module_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in module.parameters())
