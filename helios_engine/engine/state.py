"""A video's state as plain values: what a session needs to go on later, elsewhere, with the same numbers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from helios_engine.model.weights import open_safetensors, save_safetensors

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

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        path = Path(path)
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        header = {"format": _FORMAT, "index": str(self.index), "request": json.dumps(self.request)}
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
        try:
            settings, index = json.loads(header["request"]), int(header["index"])
            missing = [name for name in ("history", "noise", "positive") if name not in tensors]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged: its header does not hold {error}") from None
        if missing or not isinstance(settings, dict):
            raise ValueError(f"{path} is damaged: it lacks {', '.join(missing) or 'the request'}")
        if isinstance(settings.get("steps"), list):
            settings["steps"] = tuple(settings["steps"])
        return cls(settings, index, **{name: tensors.get(name) for name in _TENSORS})


def to_cpu(tensor: Tensor | None) -> Tensor | None:
    """A copy on the CPU that later work cannot change."""
    return None if tensor is None else tensor.detach().to("cpu", copy=True)
