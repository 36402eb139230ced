"""What a run will need, predicted from shapes alone, and what to do where it does not fit; no weights are read."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.engine.devices import resolve_device, resolve_dtype
from helios_engine.engine.frames import decode_bytes, frames_per_call_for
from helios_engine.engine.graphs import USES_BEFORE, why_not_graphs
from helios_engine.engine.plan import Plan
from helios_engine.model.reuse import Approximations
from helios_engine.model.text import TextEncoder
from helios_engine.model.transformer import LIVE_WIDTHS, Transformer
from helios_engine.model.vae import VideoAutoencoder
from helios_engine.settings import EngineConfig

# The largest video the checkpoints are made for, where no request is known yet.
_USUAL_TOKENS = 11040
_USUAL_TEXT_TOKENS = 512


_NOTHING_HELPS = "the device's memory does not suffice for this size even with --offload group; make the video smaller"


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
    keeps_apart: bool = False  # the decoder cannot have denoising's memory: both run at once, or recordings hold it

    @property
    def peak(self) -> int:
        """Encoding text, denoising and decoding take turns; what stays meanwhile depends on the offload."""
        denoising = self.transformer_slots + self.denoise_activations
        if self.offload == "none":
            resident = self.transformer + self.text_encoder + self.vae + self.text_keys_values
            work = (denoising, self.decode_activations)
            return resident + (sum(work) if self.keeps_apart else max(work))
        if self.offload == "group":
            resident = self.transformer + self.vae + self.text_keys_values
            return resident + max(self.text_encoder, denoising, self.decode_activations)
        kept = self.text_keys_values
        return max(self.text_encoder, self.transformer + kept + denoising, self.vae + kept + self.decode_activations)


def estimate_memory(
    checkpoint: Checkpoint, plan: Plan, config: EngineConfig, text_tokens: int, *, num_ranks: int = 1
) -> MemoryEstimate:
    """Expected memory of one video under a plan, on rank 0 as if it worked alone but for what ranks rule out."""
    model, dtype = checkpoint.model, resolve_dtype(config)
    with torch.device("meta"):
        transformer = Transformer(model, dtype)
        vae = VideoAutoencoder(checkpoint.vae).to(getattr(torch, config.vae_dtype))
    num_slots = 1 + config.offload_ahead
    is_group = config.offload == "group"
    keeps_text = not is_group or has_room_for_text(checkpoint, config, resolve_device(config.device))
    text_encoder = 0
    if checkpoint.has_text_encoder:
        encoder = TextEncoder.on_meta(checkpoint.folder / "text_encoder").to(dtype)
        layers = encoder.encoder.block
        whole, layer = _module_bytes(encoder), _module_bytes(layers[0])
        text_encoder = min(num_slots, len(layers)) * layer if is_group else whole
    branches = 2 if plan.is_guided else 1
    tokens = plan.tokens_per_stage[-1] + plan.history_tokens
    widths = LIVE_WIDTHS * model.dim + (branches - 1) * model.dim  # guidance keeps a second residual stream
    split = frames_per_call_for(resolve_device(config.device), vae, plan.latent_size)
    weights, block = _module_bytes(transformer), _module_bytes(transformer.blocks[0])
    refresh, _, uses_fp8 = config.approximations
    if uses_fp8:
        products = model.num_layers * (6 * model.dim**2 + 2 * model.dim * model.ffn_dim)
        weights -= products * (dtype.itemsize - 1)
    kept = branches * model.num_layers * plan.history_tokens * 2 * model.dim * dtype.itemsize if refresh > 1 else 0
    text_keys_values = branches * model.num_layers * text_tokens * 2 * model.dim * dtype.itemsize
    records = _records(config, plan, num_ranks)
    if records:
        text_keys_values *= 2  # recordings read a copy of their own
    if not keeps_text:
        text_keys_values = branches * text_tokens * model.dim * dtype.itemsize
    return MemoryEstimate(
        offload=config.offload,
        transformer=weights - model.num_layers * block if is_group else weights,
        transformer_slots=_slot_bytes(transformer, config, keeps_text=keeps_text) if is_group else 0,
        text_encoder=text_encoder,
        vae=_module_bytes(vae),
        text_keys_values=text_keys_values,
        denoise_activations=tokens * widths * dtype.itemsize + kept,
        decode_activations=decode_bytes(resolve_device(config.device), vae, plan.latent_size, split),
        keeps_apart=(config.overlap_decode and num_ranks == 1) or records,
    )


def has_room_for_text(checkpoint: Checkpoint, config: EngineConfig, device: torch.device) -> bool:
    """Whether all layers' text keys and values can stay on the device beside streamed blocks; always on the CPU."""
    if device.type != "cuda":
        return True
    model, size = checkpoint.model, resolve_dtype(config).itemsize
    with torch.device("meta"):
        transformer = Transformer(model, resolve_dtype(config))
        vae = VideoAutoencoder(checkpoint.vae).to(getattr(torch, config.vae_dtype))
    blocks = model.num_layers * _module_bytes(transformer.blocks[0])
    text = 2 * model.num_layers * _USUAL_TEXT_TOKENS * 2 * model.dim * size
    working = _USUAL_TOKENS * (LIVE_WIDTHS + 1) * model.dim * size
    slots = _slot_bytes(transformer, config, keeps_text=True)
    needed = _module_bytes(transformer) - blocks + slots + _module_bytes(vae) + text + working
    return needed < 0.9 * torch.cuda.get_device_properties(device).total_memory


def _records(config: EngineConfig, plan: Plan, num_ranks: int) -> bool:
    """Whether steps are recorded in the course of a video: by default once a stage has come often."""
    later = 2**31 if plan.num_chunks is None else plan.num_chunks - 1
    steps = zip(plan.first_schedules, plan.schedules, strict=True)
    if not config.cuda_graphs and max(f.num_steps + later * s.num_steps for f, s in steps) <= USES_BEFORE:
        return False
    refresh, block_cache, _ = config.approximations
    reason = why_not_graphs(
        resolve_device(config.device),
        num_ranks=num_ranks,
        wanted=config.cuda_graphs,
        offload=config.offload,
        approximates=Approximations(refresh, block_cache).any,
        compiles=config.compile,
    )
    return reason is None


def _slot_bytes(transformer: Transformer, config: EngineConfig, *, keeps_text: bool) -> int:
    """Device memory of the slots that blocks, or their parts, take turns in."""
    block = transformer.blocks[0]
    sizes = dict(block.named_parameters())
    parts = [
        sum(sizes[name].nbytes for name in names)
        for part, names in block.parts().items()
        if not (keeps_text and part == "cross_kv")
    ]
    is_leaf = config.offload_level == "leaf"
    visits = len(transformer.blocks) * (len(parts) if is_leaf else 1)
    return min(1 + config.offload_ahead, visits) * (max(parts) if is_leaf else sum(parts))


@contextlib.contextmanager
def advise_memory(
    checkpoint: Checkpoint, config: EngineConfig, plan: Plan | None = None, *, num_ranks: int = 1
) -> Iterator[None]:
    """Turn the device's out-of-memory error into one that says what would fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split()).split(" If reserved")[0][:200]
        raise OutOfMemory(f"{_advice(checkpoint, config, plan, num_ranks)} ({reason})") from None


def _advice(checkpoint: Checkpoint, config: EngineConfig, plan: Plan | None, num_ranks: int) -> str:
    """Which setting needs less, the mildest one that fits the device, with what it would need where a plan is known."""
    changes: list[dict[str, object]] = [{"offload": "group"}, {"offload": "group", "vae_dtype": "bfloat16"}]
    if config.offload == "group":
        changes = changes[1:]
    if plan is None:
        new = (c for c in changes if any(getattr(config, name) != value for name, value in c.items()))
        flags = next((_flags(config, change) for change in new), None)
        return f"the device's memory does not suffice; {flags} needs far less" if flags else _NOTHING_HELPS
    changes = [
        {"overlap_decode": False},
        {"cuda_graphs": False},
        *changes,
    ]  # cheap, but no help while weights are loaded

    def needs(settings: EngineConfig) -> float:
        return estimate_memory(checkpoint, plan, settings, _USUAL_TEXT_TOKENS, num_ranks=num_ranks).peak / 1e9

    own = needs(config)
    found = [(needs(_changed(config, change)), _flags(config, change)) for change in changes]
    found = [(less, flags) for less, flags in found if less < own]
    if not found:
        return _NOTHING_HELPS
    less, flags = next((pair for pair in found if pair[0] < _device_gb(config)), min(found))
    return f"the device's memory does not suffice for about {own:.1f} GB; {flags} needs about {less:.1f} GB"


def _changed(config: EngineConfig, change: dict[str, object]) -> EngineConfig:
    """With some settings changed; what cannot go with offload (8-bit products, compile by leaves) is left out."""
    if "offload" in change:
        change = {**change, "fp8": False, "overlap_decode": False, "cuda_graphs": False}
    return dataclasses.replace(config, **change)


def _device_gb(config: EngineConfig) -> float:
    device = resolve_device(config.device)
    return torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else math.inf


def _flags(config: EngineConfig, change: dict[str, object]) -> str:
    if "offload" in change and config.approximations[2]:
        change = {**change, "fp8": False}
    return " ".join(_flag(*setting) for setting in change.items())


def _flag(name: str, value: object) -> str:
    option = name.replace("_", "-")
    return f"--no-{option}" if value is False else f"--{option} {value}"


def _module_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in module.parameters())
