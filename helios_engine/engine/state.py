"""A video's state as plain values: what a session needs to go on later, elsewhere, with the same numbers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor

from helios_engine.model.weights import open_safetensors, save_safetensors
from helios_engine.request import digest

_FORMAT = "helios_engine.session/1"
_TENSORS = ("history", "anchor", "noise", "positive", "negative", "initial")


@dataclass(frozen=True, slots=True, eq=False)
class SessionState:
    """Between two chunks of one video. Tensors lie on the CPU.

    request holds the request's plain settings. history [1, C, 19, h, w] and anchor [1, C, 1, h, w] are float32 latents;
    noise the generator's state; positive and negative the text embeddings [1, T, E]; initial the start noise the user
    gave, if any.
    """

    request: dict[str, object]
    index: int
    history: Tensor
    anchor: Tensor | None
    noise: Tensor
    positive: Tensor
    negative: Tensor | None
    initial: Tensor | None
    attention: str = ""  # the backend that computed it; another one rounds otherwise

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        path = Path(path)
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        header = {
            "format": _FORMAT,
            "index": str(self.index),
            "request": json.dumps(self.request),
            "attention": self.attention,
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_safetensors(temporary, tensors, header)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> SessionState:
        """Read what save wrote. Raises ValueError for another kind of file."""
        with open_safetensors(Path(path)) as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ValueError(f"{path} is no session state of this version (format {header.get('format')!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls._from_parts(path, header, tensors)

    @classmethod
    def from_bytes(cls, data: bytes) -> SessionState:
        """What load reads, from the file's bytes: for ranks that do not see the file."""
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        return cls._from_parts("the state", header, safetensors.torch.load(data))

    def facts(self) -> dict[str, str]:
        """What must be equal on all ranks beside the request."""
        tensors = {name: digest(getattr(self, name)) for name in ("history", "noise")}
        return {"chunk index": str(self.index), **tensors}

    @classmethod
    def _from_parts(cls, path: str | Path, header: dict[str, str], tensors: dict[str, Tensor]) -> SessionState:
        try:
            settings, index = json.loads(header["request"]), int(header["index"])
            missing = [name for name in ("history", "noise", "positive") if name not in tensors]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged: its header does not hold {error}") from None
        if missing or not isinstance(settings, dict):
            raise ValueError(f"{path} is damaged: it lacks {', '.join(missing) or 'the request'}")
        if isinstance(settings.get("steps"), list):
            settings["steps"] = tuple(settings["steps"])
        named = {name: tensors.get(name) for name in _TENSORS}
        return cls(settings, index, **named, attention=header.get("attention", ""))


def to_cpu(tensor: Tensor | None) -> Tensor | None:
    """A copy on the CPU that later work cannot change."""
    return None if tensor is None else tensor.detach().to("cpu", copy=True)
