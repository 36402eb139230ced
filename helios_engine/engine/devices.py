"""What a setting's device and dtype mean on this machine."""

from __future__ import annotations

import torch

from helios_engine.settings import EngineConfig


def resolve_device(name: str) -> torch.device:
    """The torch device of a setting. Raises ValueError for a CUDA device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"device {name} is not there: this torch sees {count} CUDA devices; use cpu or another one"
            )
    return device


def resolve_dtype(config: EngineConfig) -> torch.dtype:
    """The transformer's dtype: bfloat16 on a GPU and float32 on the CPU unless the user says otherwise."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if resolve_device(config.device).type == "cuda" else torch.float32
