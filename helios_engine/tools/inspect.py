"""What a checkpoint is and whether its files are whole, without loading it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.model.weights import shapes_on_disk, weight_files


@dataclass
class Inspection:
    """Lines to print, and what is wrong (empty for a sound checkpoint)."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def inspect_checkpoint(path_or_id: str | Path, revision: str | None = None) -> Inspection:
    """Read configuration and file headers. Raises ValueError only when the configuration itself is unusable."""
    checkpoint = Checkpoint.open(path_or_id, revision)
    recipe, scheduler, model = checkpoint.recipe, checkpoint.scheduler, checkpoint.model
    guidance = f"guidance {recipe.guidance_scale:g}"
    if recipe.cfg_zero_star:
        guidance += " (CFG-Zero*)"
    shift = (
        f"dynamic {scheduler.time_shift_type} shift" if scheduler.use_dynamic_shifting else f"shift {scheduler.shift:g}"
    )
    found = Inspection()
    found.lines += [
        f"variant        {recipe.variant}",
        f"recipe         steps {','.join(map(str, recipe.steps))}, {guidance}"
        + (", first chunk doubled" if recipe.amplify_first_chunk else ""),
        f"scheduler      {scheduler.scheduler_type}, {scheduler.stages} stage{'s' * (scheduler.stages > 1)}, {shift}",
        f"transformer    {model.num_layers} layers, {model.num_attention_heads} heads of {model.attention_head_dim}, "
        f"feed-forward {model.ffn_dim}",
        f"sizes          height and width multiples of {recipe.size_multiple}",
        f"text encoder   {'yes' if checkpoint.has_text_encoder else 'no, requests bring prompt_embeds'}",
    ]
    for component in ("transformer", "vae", *(["text_encoder"] if checkpoint.has_text_encoder else [])):
        with contextlib.suppress(ValueError):  # problems says it
            found.lines.append(_describe_files(checkpoint.folder / component))
    found.problems = checkpoint.problems()
    return found


def _describe_files(folder: Path) -> str:
    files = weight_files(folder)
    num_tensors, size = len(shapes_on_disk(files)), sum(path.stat().st_size for path in files)
    return f"{folder.name:<14} {num_tensors} tensors in {len(files)} file{'s' * (len(files) > 1)}, {size / 1e9:.3f} GB"


def inspect_build() -> list[str]:
    """Facts of the compiled parts, or that they are missing."""
    try:
        from helios_engine import _build_info
    except ImportError:
        return ["build info     not compiled"]
    return [f"build info     {_build_info.compiler()}, CPU {_build_info.cpu_capability()}"]


def inspect_operators() -> list[str]:
    """Which implementation of the operators runs here."""
    from helios_engine.ops import native

    return native.describe()
