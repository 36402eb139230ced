"""A checkpoint copied in a smaller dtype: the same layout and names, fp32-kept modules kept."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from helios_engine.config import read_json
from helios_engine.engine.checkpoint import COMPONENTS, Checkpoint
from helios_engine.model.weights import open_safetensors, save_safetensors, weight_files

# Converted components, with the parts of a tensor's name that keep it in float32. The VAE stays as it is: 0.5 GB, and
# its float32 numbers are the reference. Source: HeliosTransformer3DModel._keep_in_fp32_modules.
_KEEP_FLOAT32 = {
    "transformer": ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "history_key_scale"),
    "text_encoder": (),
}


def convert_checkpoint(source: str | Path, target: Path, dtype: str, revision: str | None = None) -> int:
    """Write source to target with the transformer and text encoder in dtype; returns the bytes written.

    One shard is held in memory at a time. target appears whole or not at all. Raises ValueError when target exists or
    the source is unusable.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype must be bfloat16 or float32, got {dtype!r}")
    if target.exists():
        raise ValueError(f"{target} exists already; name a new folder")
    checkpoint = Checkpoint.open(source, revision)
    checkpoint.check()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        shutil.copy(checkpoint.folder / "model_index.json", temporary)
        for component in COMPONENTS:
            folder = checkpoint.folder / component
            if not folder.is_dir():
                continue
            if component in _KEEP_FLOAT32:
                _convert_component(folder, temporary / component, getattr(torch, dtype), _KEEP_FLOAT32[component])
            else:
                shutil.copytree(folder, temporary / component)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _convert_component(source: Path, target: Path, dtype: torch.dtype, keep: tuple[str, ...]) -> None:
    files = weight_files(source)
    target.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.suffix == ".json" and not path.name.endswith(".index.json"):
            shutil.copy(path, target)
    total = 0
    for path in files:
        with open_safetensors(path) as file:
            tensors = {
                name: _cast(file.get_tensor(name), torch.float32 if any(part in name for part in keep) else dtype)
                for name in file.keys()  # noqa: SIM118
            }
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_safetensors(target / path.name, tensors, {"format": "pt"})
    for index in source.glob("*.safetensors.index.json"):
        values = read_json(index)
        values["metadata"] = {**dict(values.get("metadata") or {}), "total_size": total}
        (target / index.name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
