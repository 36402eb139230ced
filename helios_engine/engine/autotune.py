"""The attention backend and the products' algorithms, settled by timing and remembered per device."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from helios_engine.config import ModelConfig
from helios_engine.ops.attention import Attention, attention_candidates, choose_attention, time_attention
from helios_engine.ops.cublaslt import CublasLt
from helios_engine.ops.gemm import Bench, CudaBench, Known, TunedGemms
from helios_engine.parallel.context import ContextParallel
from helios_engine.settings import EngineConfig

logger = logging.getLogger(__name__)

# Queries and keys of a forward at 384x640: the pyramid's three stages over all tokens, and the noisy rows over the text.
_SELF_TOKENS = (2940, 4560, 11040)
_CROSS = (8640, 512)


def settle_attention(
    wanted: str, model: ModelConfig, context: ContextParallel, *, device: torch.device, dtype: torch.dtype
) -> Attention:
    """The backend asked for, or under "auto" the fastest here: rank 0 times the candidates, all ranks take its choice.

    The choice is kept in a file per machine (cache_file), so only the first run on a device pays for it. Collective when
    several ranks have more than one candidate; all must have the same ones.
    """
    head_dim = model.attention_head_dim
    names = attention_candidates(device=device, dtype=dtype, head_dim=head_dim)
    if wanted != "auto" or len(names) == 1:
        return choose_attention(wanted, device=device, dtype=dtype, head_dim=head_dim)
    choice = None
    if context.is_first:
        shapes = real_shapes(model, context)
        with_lse = context.degrees.ring > 1
        choice = _remembered_or_timed(
            names, shapes, device=device, dtype=dtype, head_dim=head_dim, with_lse=with_lse
        ).encode()
    name = context.share_bytes(choice).decode()
    return choose_attention(name, device=device, dtype=dtype, head_dim=head_dim)


def real_shapes(model: ModelConfig, context: ContextParallel) -> list[tuple[int, int, int]]:
    """(queries, keys, heads) of one rank's attention calls at the usual size."""
    degrees = context.degrees
    heads = -(-model.num_attention_heads // degrees.ulysses)
    shapes = [(-(-tokens // degrees.ring), -(-tokens // degrees.ring), heads) for tokens in _SELF_TOKENS]
    return [*shapes, (-(-_CROSS[0] // context.sequence_size), _CROSS[1], model.num_attention_heads)]


def cache_file(name: str = "attention") -> Path:
    """Where choices are remembered: below XDG_CACHE_HOME, by default ~/.cache, for users without a home the working folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "helios_engine" / f"{name}.json"


def why_not_tuned(device: torch.device, dtype: torch.dtype, *, offload: str) -> str | None:
    """Why the algorithms of matrix products are not tried with these settings, or None."""
    if device.type != "cuda":
        return f"only CUDA devices have cuBLASLt, this is {device}"
    if dtype == torch.float32:
        return "only products in 16 bits are tried, the model computes in float32"
    if offload != "none":
        return f"with offload {offload} the weights' way to the device decides"
    return None


def settle_gemms(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> TunedGemms | None:
    """What multiplies in torch's place, where that is asked for and can be; said aloud where it cannot."""
    if not config.tune_gemms:
        return None
    reason = why_not_tuned(device, dtype, offload=config.offload)
    if reason is not None:
        logger.warning("matrix products keep torch's own algorithms: %s", reason)
        return None
    return make_gemms(device)


def make_gemms(
    device: torch.device, *, open_library: Callable[[], CublasLt] | None = None, bench: Bench | None = None
) -> TunedGemms | None:
    """Products tuned on this device, with what earlier runs found; None, said aloud, where cuBLASLt cannot be used.

    Every rank has a file entry of its own shapes, and reads what others wrote before it.
    """
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            library = open_library() if open_library else CublasLt(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    except (OSError, RuntimeError, AttributeError) as error:
        logger.warning("matrix products keep torch's own algorithms: cuBLASLt cannot be used: %s", error)
        return None
    path, key = cache_file("gemms"), f"{_device_name(device)} | {torch.__version__} | cuBLASLt {library.version}"
    known = {}
    for name, choice in _dict(_read(path).get(key)).items():
        if choice is None:
            known[name] = None
        elif isinstance(choice, dict) and len(choice.get("algorithm", ())) == 8:
            known[name] = (tuple(choice["algorithm"]), int(choice["workspace"]))

    def keep(choices: Known) -> None:
        kept = {
            name: None if choice is None else {"algorithm": choice[0], "workspace": choice[1]}
            for name, choice in choices.items()
        }
        others = _read(path)
        _write(path, {**others, key: {**_dict(others.get(key)), **kept}})

    return TunedGemms(library, bench or CudaBench(), known=known, keep=keep)


def _dict(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _remembered_or_timed(
    names: Sequence[str],
    shapes: Sequence[tuple[int, int, int]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    with_lse: bool,
) -> str:
    facts = (_device_name(device), torch.__version__, str(dtype), head_dim, *names, *shapes, "lse" * with_lse)
    key = " | ".join(map(str, facts))
    path = cache_file()
    known = _read(path)
    found = known.get(key)
    if isinstance(found, dict) and found.get("backend") in names:
        logger.info("attention %s, as timed on this device before (%s)", found["backend"], path)
        return found["backend"]
    times = time_attention(names, shapes, device=device, dtype=dtype, head_dim=head_dim, with_lse=with_lse)
    best = min(times, key=times.__getitem__)
    said = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items())
    logger.info("attention %s: %s for one call of each shape", best, said)
    _write(path, {**known, key: {"backend": best, "seconds": times}})
    return best


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _read(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read and is written anew: %s", path, error)
        return {}
    return values if isinstance(values, dict) else {}


def _write(path: Path, values: dict[str, object]) -> None:
    """A home that cannot be written to costs the next run its timing, no more."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("the choice cannot be kept in %s: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
