"""What a checkpoint fixes: its own JSON and the recipe of its variant. A user's settings are in settings.py."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LATENT_FRAMES_PER_CHUNK = 9
HISTORY_SIZES = (16, 2, 1)  # long, mid and newest frames; the anchor comes on top
NUM_HISTORY_FRAMES = sum(HISTORY_SIZES)

# Wan 2.1's latent statistics, the reference's defaults when a VAE's JSON leaves them out.
WAN_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

VARIANTS = ("base", "mid", "distilled")


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file. Raises ValueError naming the file when it is missing, unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; a checkpoint in the Diffusers layout has this file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def _from_json(cls: type, values: Mapping[str, object], source: str):
    """Build a config dataclass from a checkpoint's JSON, refusing keys whose meaning we do not implement.

    Keys that start with an underscore are the writer's bookkeeping. An unknown key whose value switches nothing on
    (null, false, empty) is harmless, so older and newer exports of the same model load.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    arguments: dict[str, object] = {}
    for name, value in values.items():
        if name in known:
            arguments[name] = tuple(value) if isinstance(value, list) else value
        elif not name.startswith("_") and value not in (None, False, "", [], {}):
            raise ValueError(f"{source}: unknown setting {name}={value!r}; this engine does not implement it")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _check_types(config: object) -> None:
    """Refuse values of another type than the field's; JSON knows numbers, strings, booleans and lists of them."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        options = typing.get_args(hint) if is_union else (hint,)
        if not any(_has_type(value, option) for option in options):
            raise ValueError(f"{name} must be {_described(hint)}, got {value!r}")


def _has_type(value: object, hint: type) -> bool:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        fits = (len(inner) == 2 and inner[1] is Ellipsis) or (isinstance(value, tuple) and len(value) == len(inner))
        return isinstance(value, tuple) and fits and all(_has_type(item, inner[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, hint)


def _described(hint: object) -> str:
    return str(getattr(hint, "__name__", hint)) if typing.get_origin(hint) is None else str(hint)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive_int(name: str, value: object) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    _require(is_whole and value > 0, f"{name} must be a positive whole number, got {value!r}")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The transformer's shape, from transformer/config.json. Source: Diffusers HeliosTransformer3DModel."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = 1e-6
    added_kv_proj_dim: int | None = None
    rope_dim: tuple[int, int, int] = (44, 42, 42)
    rope_theta: float = 10000.0
    guidance_cross_attn: bool = True
    zero_history_timestep: bool = True
    has_multi_term_memory_patch: bool = True
    is_amplify_history: bool = False
    history_scale_mode: str = "per_head"

    def __post_init__(self) -> None:
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)
        _check_types(self)
        for name in ("num_attention_heads", "attention_head_dim", "in_channels", "text_dim", "freq_dim", "ffn_dim"):
            _positive_int(name, getattr(self, name))
        _positive_int("num_layers", self.num_layers)
        _require(
            self.in_channels == self.out_channels, "in_channels and out_channels must agree: latents are continued"
        )
        _require(self.patch_size == (1, 2, 2), f"patch_size must be (1, 2, 2), got {self.patch_size}")
        _require(
            len(self.rope_dim) == 3
            and all(dim > 0 and dim % 2 == 0 for dim in self.rope_dim)
            and sum(self.rope_dim) == self.attention_head_dim,
            f"rope_dim must be three even numbers that add up to attention_head_dim {self.attention_head_dim}, "
            f"got {self.rope_dim}",
        )
        _require(self.freq_dim % 2 == 0, f"freq_dim must be even, got {self.freq_dim}")
        _require(self.added_kv_proj_dim is None, "added_kv_proj_dim is not part of any Helios inference model")
        _require(
            self.has_multi_term_memory_patch, "has_multi_term_memory_patch=false: such a model cannot continue video"
        )
        _require(
            self.history_scale_mode in ("scalar", "per_head"),
            f"history_scale_mode must be scalar or per_head, got {self.history_scale_mode!r}",
        )

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, path: Path) -> ModelConfig:
        return _from_json(cls, read_json(path), str(path))


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """The video autoencoder's shape, from vae/config.json. Source: Diffusers AutoencoderKLWan (Wan 2.1)."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN_LATENTS_STD
    is_residual: bool = False
    decoder_base_dim: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("base_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels"):
            _positive_int(f"vae {name}", getattr(self, name))
        _require(
            bool(self.dim_mult) and min(self.dim_mult) > 0, f"dim_mult must be positive numbers, got {self.dim_mult}"
        )
        base = self.decoder_base_dim or self.base_dim
        _require(base > 0 and base % 2 == 0, f"the decoder's base dimension must be even, got {base}")
        _require(not self.is_residual and self.patch_size is None, "Helios uses the Wan 2.1 VAE; this one is Wan 2.2")
        _require(not self.attn_scales, "attn_scales is not part of the Wan 2.1 VAE")
        _require(
            len(self.temperal_downsample) == len(self.dim_mult) - 1,
            f"temperal_downsample {self.temperal_downsample} must have one entry fewer than dim_mult {self.dim_mult}",
        )
        factors = (2 ** sum(self.temperal_downsample), 2 ** len(self.temperal_downsample))
        stated = (self.scale_factor_temporal, self.scale_factor_spatial)
        _require(
            factors == stated == (4, 8),
            f"the VAE must compress 4x in time and 8x in space; its layers make {factors[0]}x and {factors[1]}x, its "
            f"scale factors say {stated[0]}x and {stated[1]}x",
        )
        for name in ("latents_mean", "latents_std"):
            _require(
                len(getattr(self, name)) == self.z_dim,
                f"vae {name} must have z_dim = {self.z_dim} values, got {len(getattr(self, name))}",
            )

    @classmethod
    def from_json(cls, path: Path) -> VaeConfig:
        return _from_json(cls, read_json(path), str(path))


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Noise schedule and solver, from scheduler/scheduler_config.json. Source: Diffusers HeliosScheduler, HeliosDMDScheduler."""

    scheduler_type: str = "unipc"
    num_train_timesteps: int = 1000
    shift: float = 1.0
    stages: int = 3
    stage_range: tuple[float, ...] = (0, 1 / 3, 2 / 3, 1)
    gamma: float = 1 / 3
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    solver_order: int = 2
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    predict_x0: bool = True
    prediction_type: str = "flow_prediction"
    use_flow_sigmas: bool = True
    thresholding: bool = False
    solver_p: None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _positive_int("stages", self.stages)
        _require(self.num_train_timesteps > 1, f"num_train_timesteps must be above 1, got {self.num_train_timesteps}")
        # Above 1/3 the block noise's covariance has a negative eigenvalue.
        _require(0 < self.gamma <= 1 / 3 + 1e-6, f"gamma must lie in (0, 1/3], got {self.gamma}")
        _require(self.shift > 0, f"shift must be positive, got {self.shift}")
        _require(
            self.max_image_seq_len > self.base_image_seq_len,
            f"max_image_seq_len {self.max_image_seq_len} must exceed base_image_seq_len {self.base_image_seq_len}",
        )
        _require(
            list(self.stage_range) == sorted(set(self.stage_range))
            and self.stage_range[0] >= 0
            and self.stage_range[-1] <= 1,
            f"stage_range must rise from 0 to 1, got {self.stage_range}",
        )
        _require(
            self.scheduler_type in ("unipc", "euler", "dmd"),
            f"scheduler_type must be unipc, euler or dmd, got {self.scheduler_type!r}",
        )
        _require(
            self.time_shift_type in ("exponential", "linear"),
            f"time_shift_type must be exponential or linear, got {self.time_shift_type!r}",
        )
        _require(
            len(self.stage_range) == self.stages + 1,
            f"stage_range {self.stage_range} must have stages + 1 = {self.stages + 1} values",
        )
        if self.solver_type in ("midpoint", "heun", "logrho"):  # the reference maps these to bh2
            object.__setattr__(self, "solver_type", "bh2")
        _require(self.solver_type in ("bh1", "bh2"), f"solver_type must be bh1 or bh2, got {self.solver_type!r}")
        _positive_int("solver_order", self.solver_order)
        _require(
            self.prediction_type == "flow_prediction"
            and self.predict_x0
            and self.use_flow_sigmas
            and not self.thresholding
            and self.solver_p is None,
            "Helios is a flow model solved for x0: prediction_type flow_prediction, predict_x0 and use_flow_sigmas true, "
            "no thresholding and no solver_p",
        )
        _require(
            not (self.use_dynamic_shifting and self.shift != 1.0),
            f"use_dynamic_shifting excludes a fixed shift, got shift={self.shift}",
        )

    @classmethod
    def from_json(cls, path: Path) -> SchedulerConfig:
        values = read_json(path)
        class_name = values.get("_class_name")
        if class_name == "HeliosDMDScheduler":
            values = {"time_shift_type": "linear", **values, "scheduler_type": "dmd"}
        elif class_name != "HeliosScheduler":
            raise ValueError(f"{path}: _class_name must be HeliosScheduler or HeliosDMDScheduler, got {class_name!r}")
        return _from_json(cls, values, str(path))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a variant samples. Steps and guidance are in no checkpoint file: they are the official scripts' settings."""

    variant: str
    steps: tuple[int, ...]  # one entry per pyramid stage
    guidance_scale: float
    cfg_zero_star: bool = False
    zero_init: bool = False
    zero_steps: int = 1
    amplify_first_chunk: bool = False
    integer_timesteps: bool = True  # the pyramid pipeline truncates the timestep it shows the model

    @property
    def num_stages(self) -> int:
        return len(self.steps)

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this: 8 (VAE) x 2 (patch), doubled per pyramid stage above the first."""
        return 16 * 2 ** (self.num_stages - 1)

    @classmethod
    def for_checkpoint(cls, model_index: Mapping[str, object], scheduler: SchedulerConfig, source: str) -> Recipe:
        """The variant's recipe, told apart by model_index.json and the scheduler."""
        class_name = model_index.get("_class_name")
        if class_name == "HeliosPipeline":
            _require(
                scheduler.stages == 1 and scheduler.scheduler_type != "dmd",
                f"{source}: HeliosPipeline needs a single-stage unipc or euler scheduler, found "
                f"{scheduler.scheduler_type} with {scheduler.stages} stages",
            )
            return cls("base", steps=(50,), guidance_scale=5.0, integer_timesteps=False)
        _require(
            class_name == "HeliosPyramidPipeline",
            f"{source}: _class_name must be HeliosPipeline or HeliosPyramidPipeline, got {class_name!r}",
        )
        _require(scheduler.stages > 1, f"{source}: HeliosPyramidPipeline needs a scheduler with more than one stage")
        is_dmd = scheduler.scheduler_type == "dmd"
        zero_star = bool(model_index.get("is_cfg_zero_star", False))
        if is_dmd or model_index.get("is_distilled"):
            _require(
                is_dmd, f"{source}: a distilled checkpoint needs HeliosDMDScheduler, not {scheduler.scheduler_type}"
            )
            return cls(
                "distilled",
                steps=(2,) * scheduler.stages,
                guidance_scale=1.0,
                cfg_zero_star=zero_star,
                zero_init=zero_star,
                amplify_first_chunk=True,
            )
        return cls(
            "mid", steps=(20,) * scheduler.stages, guidance_scale=5.0, cfg_zero_star=zero_star, zero_init=zero_star
        )
