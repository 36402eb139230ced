"""Layers that live in files and visit the device one after another.

A ring of slots on the device, each as large as one layer. While one layer computes, the next ones are copied into the
slots that are free. Weights come straight from memory-mapped safetensors files, so the host holds no copy of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from helios_engine.model.weights import mapped_tensors

_SMALL = 1 << 20  # bytes; tensors below it may be cast on their way
Pairs = list[tuple[Tensor, Tensor]]  # (where to, what)


class Copier(Protocol):
    """Fills slots while the device computes. A slot is loaded, made ready, used and loaded again, in that order."""

    def load(self, slot: int, pairs: Pairs) -> None:
        """Begin to copy, after everything enqueued before the slot's last used()."""

    def ready(self, slot: int) -> None:
        """What is enqueued from now on finds the slot filled."""

    def used(self, slot: int) -> None:
        """What was enqueued so far was the last to touch the slot's memory."""

    def close(self) -> None:
        """Let go of buffers and threads."""


class PlainCopier:
    """Copies when asked to; for the CPU, where nothing runs behind the caller's back."""

    def load(self, slot: int, pairs: Pairs) -> None:
        for target, source in pairs:
            target.copy_(source)

    def ready(self, slot: int) -> None:
        pass

    def used(self, slot: int) -> None:
        pass

    def close(self) -> None:
        pass


class LayerRing:
    """Equal layers that share a few slots. Parameters of a layer that is not in use are on the meta device.

    sources(i) names what each of layer i's tensors is filled from: checkpoint name below the layer -> tensor; slots_of
    gives the same names for the layer's own tensors. num_slots is at least 2: one computes, the others are filled.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        slots_of: Callable[[nn.Module], dict[str, Tensor]],
        sources: Callable[[int], Mapping[str, Tensor]],
        device: torch.device,
        copier: Copier,
        num_slots: int = 2,
    ) -> None:
        self._layers, self._slots_of, self._sources = list(layers), slots_of, sources
        self._copier = copier
        self._places = [_places(layer) for layer in self._layers]
        shapes = {name: (p.shape, p.dtype) for name, p in self._layers[0].named_parameters()}
        for index, layer in enumerate(self._layers):
            if {name: (p.shape, p.dtype) for name, p in layer.named_parameters()} != shapes:
                raise ValueError(f"layer {index} is shaped unlike layer 0, so they cannot take turns")
        self._empty = dict(self._layers[0].named_parameters())
        self._shapes, self._device = shapes, device
        self._num_slots = min(num_slots, len(self._layers))
        self._slots: list[dict[str, nn.Parameter]] = []
        self._holds: list[int | None] = []
        self._current: int | None = None

    @property
    def num_bytes(self) -> int:
        """Device memory the slots take while the ring is in use."""
        return self._num_slots * sum(shape.numel() * dtype.itemsize for shape, dtype in self._shapes.values())

    def use(self, index: int) -> None:
        """Make a layer's weights those that are computed with next; the layer used before gives its own up."""
        if index == self._current:
            return
        if not self._slots:
            self._slots, self._holds = [self._make_slot() for _ in range(self._num_slots)], [None] * self._num_slots
            for slot in range(self._num_slots):  # the memory may be what work still under way has just let go of
                self._copier.used(slot)
        self._leave()
        if index not in self._holds:
            self._begin(index, keep=())
        slot = self._holds.index(index)
        self._copier.ready(slot)
        self._bind(index, self._slots[slot])
        self._current = index
        count = len(self._layers)
        following = [(index + ahead) % count for ahead in range(1, len(self._slots))]
        for other in following:
            if other not in self._holds:
                self._begin(other, keep=(index, *following))

    def rest(self) -> None:
        """Give the slots' memory back until the next use."""
        self._leave()
        for slot, held in enumerate(self._holds):
            if held is not None:
                self._copier.ready(slot)  # nothing may still be written there
        self._slots, self._holds = [], []

    def close(self) -> None:
        """Let go of slots and copier; the ring must not be used afterwards."""
        self.rest()
        self._copier.close()

    def _leave(self) -> None:
        if self._current is not None:
            self._copier.used(self._holds.index(self._current))
            self._bind(self._current, self._empty)
            self._current = None

    def _make_slot(self) -> dict[str, nn.Parameter]:
        return {
            name: nn.Parameter(torch.empty(shape, dtype=dtype, device=self._device), requires_grad=False)
            for name, (shape, dtype) in self._shapes.items()
        }

    def _begin(self, index: int, keep: Sequence[int]) -> None:
        slot = next(slot for slot, held in enumerate(self._holds) if held is None or held not in keep)
        self._bind(index, self._slots[slot])
        targets, sources = self._slots_of(self._layers[index]), self._sources(index)
        self._bind(index, self._empty)
        self._holds[slot] = index
        self._copier.load(slot, [(target, sources[name]) for name, target in targets.items()])

    def _bind(self, index: int, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, (module, attribute) in self._places[index].items():
            module._parameters[attribute] = parameters[name]


def _places(layer: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Parameter name -> (the module that holds it, the attribute)."""
    return {
        f"{prefix}.{attribute}" if prefix else attribute: (module, attribute)
        for prefix, module in layer.named_modules()
        for attribute in module._parameters
        if module._parameters[attribute] is not None
    }


def layer_sources(
    folder: Path, prefix: str, count: int, wanted: Mapping[str, Tensor], rename: Callable[[str], str | None]
) -> list[dict[str, Tensor]]:
    """Per layer, the wanted tensors by their name below "prefix.N.", memory-mapped from a component's files.

    wanted are a layer's own tensors, whose dtypes count. Raises ValueError where a weight on disk has another one: it
    would have to be cast at every visit.
    """
    layers: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for on_disk, tensor in mapped_tensors(folder).items():
        name = rename(on_disk)
        if name is None or not name.startswith(prefix + "."):
            continue
        index, _, below = name.removeprefix(prefix + ".").partition(".")
        if below not in wanted:
            continue
        if tensor.dtype != wanted[below].dtype and tensor.nbytes >= _SMALL:
            _refuse_dtype(folder, on_disk, tensor.dtype, wanted[below].dtype)
        layers[int(index)][below] = tensor
    return layers


def _refuse_dtype(folder: Path, name: str, found: torch.dtype, wanted: torch.dtype) -> None:
    found_name, wanted_name = (str(dtype).removeprefix("torch.") for dtype in (found, wanted))
    remedy = f"use dtype {found_name}"
    if wanted == torch.bfloat16:
        remedy = "make a bfloat16 copy first: helios-engine convert SRC DST --dtype bfloat16"
    raise ValueError(
        f"{folder} holds {name} in {found_name}, but group offload streams weights as they are and computes in "
        f"{wanted_name}; {remedy}"
    )
