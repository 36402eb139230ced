"""Checkpoint files -> parameters: every name and shape is checked before a byte is copied, then tensors stream in one by one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from helios_engine.config import read_json

_NAMES_SHOWN = 5


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator:
    """A safetensors file, with a ValueError naming it when it is missing, truncated or no safetensors file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component, from its index or the single file. Raises ValueError when there are none."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        weight_map = read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{indices[0]} has no weight_map")
        return [folder / name for name in sorted(set(weight_map.values()))]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors file; convert other formats to safetensors first")
    if len(files) > 1:
        raise ValueError(f"{folder} has {len(files)} .safetensors files but no index that says what belongs together")
    return files


def shapes_on_disk(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape over all files of a component; reads headers only."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118  a safetensors handle is no mapping
                if name in shapes:
                    raise ValueError(f"{path}: tensor {name} is in an earlier file too")
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def mapped_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a component by its name on disk, backed by the mapped files: pages are read when touched."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with open_safetensors(path) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)[:_NAMES_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more


def check_names(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Refuse a component whose tensors are not exactly the expected ones."""
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"missing {_listed(missing)}")
    if extra := found.keys() - expected.keys():
        problems.append(f"unexpected {_listed(extra)}")
    wrong = {
        f"{name} {list(found[name])} (expected {list(shape)})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    }
    if wrong:
        problems.append(f"wrong shape {_listed(wrong)}")
    if problems:
        raise ValueError(f"{folder} does not fit its config.json: {'; '.join(problems)}")


def check_slots(
    folder: Path, slots: Mapping[str, Tensor], *, rename: Callable[[str], str | None] = lambda name: name
) -> list[Path]:
    """The component's files, if their tensors are exactly the slots; reads headers only. Raises ValueError otherwise."""
    files = weight_files(folder)
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes_on_disk(files).items():
        slot = rename(name)
        if slot is None:
            continue
        if slot in found:
            raise ValueError(f"{folder}: tensor {name} is there under two names")
        found[slot] = shape
    check_names({name: tuple(slot.shape) for name, slot in slots.items()}, found, folder)
    return files


def load_slots(
    folder: Path,
    slots: Mapping[str, Tensor],
    *,
    rename: Callable[[str], str | None] = lambda name: name,
) -> None:
    """Fill every slot from the component's files, casting to the slot's dtype on the way.

    rename maps a name on disk to a slot's name, or to None for a tensor to leave out. Slots on the meta device are checked
    and left empty. Host memory holds one tensor at a time. Raises ValueError for missing, unexpected, doubled or wrongly
    shaped tensors before anything is copied.
    """
    files = check_slots(folder, slots, rename=rename)
    for path in files:
        with open_safetensors(path) as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118
                slot = rename(name)
                if slot is not None and not slots[slot].is_meta:
                    slots[slot].copy_(file.get_tensor(name))


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the permissions any new file gets; safetensors itself makes it private."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata))
    except SafetensorError as error:  # what a full disk or a missing folder gives
        raise OSError(f"{path} cannot be written: {error}") from None
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def transformer_name(name: str) -> str | None:
    """Slot of a tensor in a transformer folder; older files keep the output table at the top."""
    if "norm_added_q" in name:  # the reference ignores it too
        return None
    return "norm_out.scale_shift_table" if name == "scale_shift_table" else name
