"""Weights that live in files and visit the device one after another, by blocks or by single layers.

A ring of slots on the device, each as large as the largest share. While one share is computed with, the next ones are
copied into the slots that are free. Weights come straight from memory-mapped safetensors files, so the host holds no copy
of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from helios_engine.model.weights import mapped_tensors

logger = logging.getLogger(__name__)
_SMALL = 1 << 20  # bytes; tensors below it may be cast on their way
_ALIGNMENT = 256
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


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """Parameters of a module that come to the device together.

    targets() gives the module's tensors by checkpoint name, as they lie when it is called; sources what each is filled from.
    """

    module: nn.Module
    names: tuple[str, ...]
    targets: Callable[[], Mapping[str, Tensor]]
    sources: Mapping[str, Tensor]


class WeightRing:
    """Shares that take turns in a few slots of device memory, in the order they are used in.

    Parameters of a share that is not in use are on the meta device. num_slots is at least 2: one is computed with, the
    others are filled. first_slot keeps rings that have one copier apart.
    """

    def __init__(
        self, shares: Sequence[Share], *, device: torch.device, copier: Copier, num_slots: int = 2, first_slot: int = 0
    ) -> None:
        self._shares, self._device, self._copier = list(shares), device, copier
        self._first_slot = first_slot
        self._holders = [_holders(share) for share in self._shares]
        self._empty = [{n: m._parameters[a] for n, (m, a) in holders.items()} for holders in self._holders]
        self._slot_bytes = max(_packed_bytes(parameters.values()) for parameters in self._empty)
        self._num_slots = min(num_slots, len(self._shares))
        self._slots: list[Tensor] = []
        self._holds: list[int | None] = []
        self._current: int | None = None

    @property
    def num_bytes(self) -> int:
        """Device memory the slots take while the ring is in use."""
        return self._num_slots * self._slot_bytes

    def use(self, index: int) -> None:
        """Make a share's weights those that are computed with next; the share used before gives its own up."""
        if index == self._current:
            return
        if not self._slots:
            self._slots = [
                torch.empty(self._slot_bytes, dtype=torch.uint8, device=self._device) for _ in range(self._num_slots)
            ]
            self._holds = [None] * self._num_slots
            for slot in range(self._num_slots):  # the memory may be what work still under way has just let go of
                self._copier.used(self._first_slot + slot)
        self._leave()
        if index not in self._holds:
            self._begin(index, keep=())
        slot = self._holds.index(index)
        self._copier.ready(self._first_slot + slot)
        self._bind(index, self._laid_out(index, slot))
        self._current = index
        count = len(self._shares)
        following = [(index + ahead) % count for ahead in range(1, len(self._slots))]
        for other in following:
            if other not in self._holds:
                self._begin(other, keep=(index, *following))

    def rest(self) -> None:
        """Give the slots' memory back until the next use."""
        try:
            self._leave()
            for slot, held in enumerate(self._holds):
                if held is not None:
                    self._copier.ready(self._first_slot + slot)  # nothing may still be written there
        finally:
            self._slots, self._holds, self._current = [], [], None

    def close(self) -> None:
        """Let go of slots and copier, after a failed copy too; the ring must not be used afterwards."""
        try:
            self.rest()
        except RuntimeError as error:  # whoever needed these weights was told
            logger.info("closing after a failed copy: %s", error)
        finally:
            self._copier.close()

    def _leave(self) -> None:
        if self._current is not None:
            self._copier.used(self._first_slot + self._holds.index(self._current))
            self._bind(self._current, self._empty[self._current])
            self._current = None

    def _begin(self, index: int, keep: Sequence[int]) -> None:
        slot = next(slot for slot, held in enumerate(self._holds) if held is None or held not in keep)
        share, memory = self._shares[index], self._slots[slot]
        self._bind(index, self._laid_out(index, slot))
        here = memory.untyped_storage().data_ptr()  # the module's other tensors may be there by other shares
        pairs = [
            (target, share.sources[name])
            for name, target in share.targets().items()
            if not target.is_meta and target.untyped_storage().data_ptr() == here
        ]
        self._bind(index, self._empty[index])
        self._holds[slot] = index
        self._copier.load(self._first_slot + slot, pairs)

    def _laid_out(self, index: int, slot: int) -> dict[str, nn.Parameter]:
        """A share's parameters one behind the other in a slot."""
        found, start = {}, 0
        for name, empty in self._empty[index].items():
            part = self._slots[slot][start : start + empty.nbytes].view(empty.dtype).view(empty.shape)
            found[name] = nn.Parameter(part, requires_grad=False)
            start += _packed_bytes([empty])
        return found

    def _bind(self, index: int, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, (module, attribute) in self._holders[index].items():
            module._parameters[attribute] = parameters[name]


def _holders(share: Share) -> dict[str, tuple[nn.Module, str]]:
    """Parameter name -> (the module that holds it, the attribute)."""
    found = {}
    for name in share.names:
        prefix, _, attribute = name.rpartition(".")
        found[name] = (share.module.get_submodule(prefix), attribute)
    return found


def _packed_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of parameters one behind the other, each on a boundary that vector loads can use."""
    return sum(-(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT for parameter in parameters)


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
