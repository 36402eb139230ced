"""Where a component's weights are while others work: resident, streamed layer by layer, or brought in whole when needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.engine.copier import make_copier
from helios_engine.engine.memory import has_room_for_text
from helios_engine.model.offload import Share, WeightRing, layer_sources
from helios_engine.model.text import TextEncoder
from helios_engine.model.transformer import Transformer
from helios_engine.model.vae import VideoAutoencoder
from helios_engine.model.weights import load_slots, transformer_name
from helios_engine.settings import EngineConfig


class Turns:
    """Components of which one at a time has its weights on the device.

    Each is (module, fill): fill reads the weights into parameters that have memory but no values yet.
    """

    def __init__(self, device: torch.device, components: dict[str, tuple[nn.Module, Callable[[], None]]]) -> None:
        self._device, self._components = device, components
        self.current: str | None = None

    def use(self, name: str) -> None:
        """Bring a component in and the one before out."""
        if name == self.current or name not in self._components:
            return
        if self.current is not None:
            self._components[self.current][0].to("meta")
        self.current = None
        module, fill = self._components[name]
        try:
            module.to_empty(device=self._device)
            fill()
        except BaseException:
            module.to("meta")  # half filled, it would stay for good
            raise
        self.current = name


@dataclass(frozen=True, slots=True)
class Components:
    """A checkpoint's modules; turns where one at a time has its weights on the device."""

    transformer: Transformer
    vae: VideoAutoencoder
    text_encoder: TextEncoder | None
    turns: Turns | None = None


def load_components(
    checkpoint: Checkpoint, config: EngineConfig, device: torch.device, dtype: torch.dtype, *, encodes_text: bool
) -> Components:
    """The modules as config.offload asks for them. Raises ValueError where the files' dtype cannot be streamed."""
    vae_dtype = getattr(torch, config.vae_dtype)
    encodes_text = encodes_text and checkpoint.has_text_encoder
    if config.offload == "model":
        return _in_turns(checkpoint, device, dtype, vae_dtype, encodes_text=encodes_text)
    if config.offload == "group":
        num_slots = 1 + config.offload_ahead
        transformer = _streamed_transformer(checkpoint, config, device, dtype, num_slots)
        text_encoder = None
        if encodes_text:
            text_encoder = TextEncoder.load_streamed(
                checkpoint.folder, device=device, dtype=dtype, copier=make_copier(device), num_slots=num_slots
            )
        return Components(transformer, checkpoint.load_vae(device, vae_dtype), text_encoder)
    return Components(
        transformer=checkpoint.load_transformer(device, dtype),
        vae=checkpoint.load_vae(device, vae_dtype),
        text_encoder=checkpoint.load_text_encoder(device, dtype) if encodes_text else None,
    )


def _streamed_transformer(
    checkpoint: Checkpoint, config: EngineConfig, device: torch.device, dtype: torch.dtype, num_slots: int
) -> Transformer:
    """A transformer whose blocks share a few slots on the device; everything else of it is resident."""
    folder = checkpoint.folder / "transformer"
    with torch.device("meta"):
        transformer = Transformer(checkpoint.model, dtype)
    transformer.requires_grad_(False)
    wanted = transformer.blocks[0].checkpoint_slots()
    sources = layer_sources(folder, "blocks", len(transformer.blocks), wanted, transformer_name)
    _materialise(transformer, device, apart_from=transformer.blocks)
    load_slots(folder, transformer.checkpoint_slots(), rename=transformer_name)
    shares = [
        {part: Share(block, names, block.checkpoint_slots, found) for part, names in block.parts().items()}
        for block, found in zip(transformer.blocks, sources, strict=True)
    ]
    copier = make_copier(device)
    text_ring = None
    if has_room_for_text(checkpoint, config, device):  # then no forward needs what makes its keys and values
        text_ring = WeightRing(
            [parts.pop("cross_kv") for parts in shares],
            device=device,
            copier=copier,
            num_slots=num_slots,
            first_slot=num_slots,
        )
    by_parts = config.offload_level == "leaf"
    if by_parts:
        visits = [share for parts in shares for share in parts.values()]
    else:
        visits = [_joined(list(parts.values())) for parts in shares]
    ring = WeightRing(visits, device=device, copier=copier, num_slots=num_slots)
    transformer.offload(ring, text_ring, by_parts=by_parts)
    return transformer


def _joined(shares: list[Share]) -> Share:
    """One share of all that several of one module hold."""
    names = tuple(name for share in shares for name in share.names)
    return dataclasses.replace(shares[0], names=names)


def _in_turns(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype, *, encodes_text: bool
) -> Components:
    """Modules without memory, and what fills each when its turn comes."""
    with torch.device("meta"):
        transformer = Transformer(checkpoint.model, dtype).requires_grad_(False)
    vae = checkpoint.make_vae(torch.device("meta"), vae_dtype)
    components: dict[str, tuple[nn.Module, Callable[[], None]]] = {
        "transformer": (transformer, lambda: checkpoint.fill_transformer(transformer)),
        "vae": (vae, lambda: checkpoint.fill_vae(vae)),
    }
    text_encoder = None
    if encodes_text:
        text_encoder = encoder = TextEncoder.empty(checkpoint.folder, device=device, dtype=dtype)
        components["text_encoder"] = (encoder.model, lambda: encoder.fill(checkpoint.folder / "text_encoder"))
    return Components(transformer, vae, text_encoder, Turns(device, components))


def _materialise(module: nn.Module, device: torch.device, *, apart_from: nn.Module) -> None:
    """Memory on the device for every parameter but those of one child."""
    left_out = {id(parameter) for parameter in apart_from.parameters()}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in left_out:
                empty = torch.empty_like(parameter, device=device)
                part._parameters[name] = nn.Parameter(empty, requires_grad=False)
