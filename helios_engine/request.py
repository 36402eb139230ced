"""What a user asks for one video, and what comes back. Checked here as far as no model is needed."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from helios_engine.config import LATENT_FRAMES_PER_CHUNK

if TYPE_CHECKING:
    import PIL.Image

    Picture = str | Path | PIL.Image.Image | np.ndarray | Tensor
    Clip = str | Path | Sequence[PIL.Image.Image | np.ndarray] | np.ndarray | Tensor

FRAMES_PER_CHUNK = (LATENT_FRAMES_PER_CHUNK - 1) * 4 + 1
FRAME_KINDS = ("uint8", "float32", "device")
_MAX_FRAMES = 10**9
_MAX_NUMBER = 1e300
_SHOWN_CHARACTERS = 80
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_SOURCES = (
    *("prompt_embeds", "negative_prompt_embeds", "image", "video"),
    *("latents", "image_latents", "fake_image_latents", "video_latents"),
)


def _help(text: str, **extra: object) -> dict[str, object]:
    return {"help": text, **extra}


@dataclass(frozen=True, slots=True, eq=False)
class VideoRequest:
    """One video. Unset settings (None) come from the checkpoint variant's recipe.

    prompt_embeds, negative_prompt_embeds: (1, T, text width). latents: (1, 16, 9 * chunks, h, w) initial noise at the
    full latent size h = height / 8, w = width / 8; none is drawn then. image_latents and fake_image_latents:
    (1, 16, 1, h, w), the encoded image and the last latent frame of the image held still for 33 frames. video_latents:
    (1, 16, 9 * pieces, h, w), with image_latents as the anchor if given, else their first frame. Latents are normalised.
    image: path, PIL image, array (H, W, 3) or tensor (3, H, W). video: path, list of such images, array (F, H, W, 3) or
    tensor (F, 3, H, W). Arrays and tensors hold floats in [0, 1] or uint8.

    Raises ValueError for any value that no checkpoint could serve.
    """

    prompt: str | None = field(default=None, metadata=_help("what the video shows"))
    prompt_embeds: Tensor | None = None
    negative_prompt: str | None = field(
        default=None, metadata=_help("what it must not show; only with a guidance scale above 1")
    )
    negative_prompt_embeds: Tensor | None = None
    image: Picture | None = field(default=None, metadata=_help("picture file to continue from (image to video)"))
    video: Clip | None = field(
        default=None, metadata=_help("video file to continue, at least 33 frames (video to video)")
    )
    latents: Tensor | None = None
    image_latents: Tensor | None = None
    fake_image_latents: Tensor | None = None
    video_latents: Tensor | None = None
    num_frames: int | None = field(
        default=132,
        metadata=_help("length in frames; made in chunks of 33 and cut to this; 'endless' streams until stopped"),
    )
    trim: bool = field(
        default=True, metadata=_help("cut the last chunk to num_frames; --no-trim keeps the whole chunk")
    )
    height: int = field(default=384, metadata=_help("pixels, a multiple of 64 (Base: 16)"))
    width: int = field(default=640, metadata=_help("pixels, a multiple of 64 (Base: 16)"))
    fps: int = field(default=24, metadata=_help("frames per second written into the file"))
    seed: int = field(default=42, metadata=_help("same seed, same video, on any device"))
    steps: int | tuple[int, ...] | None = field(
        default=None, metadata=_help("solver steps: one number, or one per pyramid stage such as 2,2,2")
    )
    guidance_scale: float | None = field(
        default=None, metadata=_help("how strongly the prompt is followed; 1 turns guidance off")
    )
    max_sequence_length: int = field(default=512, metadata=_help("text tokens the prompt is cut or padded to"))
    image_noise_sigma_min: float = field(default=0.111, metadata=_help("least noise on the anchor image"))
    image_noise_sigma_max: float = field(default=0.135, metadata=_help("most noise on the anchor image"))
    video_noise_sigma_min: float = field(default=0.111, metadata=_help("least noise on the history given"))
    video_noise_sigma_max: float = field(default=0.135, metadata=_help("most noise on the history given"))
    amplify_first_chunk: bool | None = field(
        default=None, metadata=_help("twice the steps in the first chunk (Distilled only)")
    )
    skip_first_chunk: bool = field(
        default=False, metadata=_help("anchor the video on the second chunk's first frame instead of the first's")
    )
    zero_init: bool | None = field(
        default=None, metadata=_help("hold the first steps still under CFG-Zero* (Mid's recipe)")
    )
    zero_steps: int | None = field(
        default=None, metadata=_help("zero_init holds this many steps and one more, counted as the reference does")
    )
    frames: str = field(
        default="uint8",
        metadata=_help(
            "uint8 (numpy), float32 (numpy, 0 to 1) or device (uint8 tensor left there)", choices=FRAME_KINDS
        ),
    )

    def __post_init__(self) -> None:
        self._check_prompts()
        self._check_sources()
        self._check_numbers()
        self._check_steps()
        self._check_sigmas()
        for name in ("trim", "skip_first_chunk"):
            _check_bool(name, getattr(self, name))
        for name in ("amplify_first_chunk", "zero_init"):
            if getattr(self, name) is not None:
                _check_bool(name, getattr(self, name))
        if not isinstance(self.frames, str) or self.frames not in FRAME_KINDS:
            raise ValueError(f"frames must be one of {', '.join(FRAME_KINDS)}, got {_shown(self.frames)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> VideoRequest:
        """A request from parsed JSON or YAML; an unknown name is a ValueError."""
        if not isinstance(values, Mapping):
            raise ValueError(f"a request must be a mapping of field names to values, got {type(values).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(str(name) for name in values if name not in known):
            raise ValueError(f"unknown request field {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)

    def settings(self) -> dict[str, object]:
        """The fields that are plain values: everything but embeddings, latents, pictures and clips."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _SOURCES}

    def facts(self) -> dict[str, str]:
        """Every field as short text, prompts in full, files and arrays by a digest: equal for requests that ask the same."""
        facts = {name: repr(value) for name, value in self.settings().items()}
        return facts | {name: digest(value) for name in _SOURCES if (value := getattr(self, name)) is not None}

    def without_sources(self) -> VideoRequest:
        """The same without pictures, clips and latents, for keeping once they are used up."""
        return dataclasses.replace(self, **dict.fromkeys(_SOURCES[2:]))

    @property
    def num_chunks(self) -> int | None:
        return None if self.num_frames is None else -(-self.num_frames // FRAMES_PER_CHUNK)

    def _check_prompts(self) -> None:
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be text, got {type(value).__name__}; one request is one video")
            if value is not None and not _is_unicode(value):
                raise ValueError(f"{name} holds bytes that are no UTF-8 text")
            if value is not None and getattr(self, f"{name}_embeds") is not None:
                raise ValueError(f"give {name} or {name}_embeds, not both")
        if self.prompt is None and self.prompt_embeds is None:
            raise ValueError("prompt is missing; give prompt or prompt_embeds")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            value = getattr(self, name)
            if value is not None:
                _check_tensor(name, value, "(1, T, text width)", ndim=3)
                if value.size(1) == 0:
                    raise ValueError(f"{name} must hold at least one token, got shape {tuple(value.shape)}")

    def _check_sources(self) -> None:
        for name in ("latents", "image_latents", "fake_image_latents", "video_latents"):
            value = getattr(self, name)
            if value is not None:
                _check_tensor(name, value, "(1, C, T, h, w)", ndim=5)
        if self.image is not None and (self.image_latents is not None or self.fake_image_latents is not None):
            raise ValueError("give image, or image_latents with fake_image_latents, not both")
        if self.video is not None and self.video_latents is not None:
            raise ValueError("give video or video_latents, not both")
        is_image = self.image is not None or self.fake_image_latents is not None
        is_video = self.video is not None or self.video_latents is not None
        if is_image and is_video:
            raise ValueError("give an image or a video to continue from, not both")
        if self.video is not None and self.image_latents is not None:
            raise ValueError("image_latents is the anchor of video_latents; a video brings its own")
        if not is_video and (self.image_latents is None) != (self.fake_image_latents is None):
            raise ValueError(
                "image_latents and fake_image_latents belong together: the encoded image, and the last latent frame of "
                "the image held still for 33 frames"
            )

    def _check_numbers(self) -> None:
        bounds = {"height": (8, 16384), "width": (8, 16384), "fps": (1, 1000), "max_sequence_length": (1, 65536)}
        for name, (low, high) in bounds.items():
            self._set_int(name, low, high)
        self._set_int("seed", 0, 2**63 - 1)
        if self.num_frames is not None:
            self._set_int("num_frames", 1, _MAX_FRAMES)
            if self.skip_first_chunk is True and self.num_frames <= FRAMES_PER_CHUNK:
                raise ValueError(
                    f"skip_first_chunk anchors on the second chunk, but num_frames {self.num_frames} has only one"
                )
        if self.zero_steps is not None:
            self._set_int("zero_steps", 0, 1000)
        if self.guidance_scale is not None:
            object.__setattr__(self, "guidance_scale", _number("guidance_scale", self.guidance_scale))
            if not 0.0 <= self.guidance_scale <= 1000.0:
                raise ValueError(f"guidance_scale must be between 0 and 1000, got {self.guidance_scale}")

    def _set_int(self, name: str, low: int, high: int) -> None:
        object.__setattr__(self, name, _integer(name, getattr(self, name), low, high))

    def _check_steps(self) -> None:
        if self.steps is None:
            return
        if isinstance(self.steps, Sequence) and not isinstance(self.steps, str):
            steps = tuple(_integer("steps", value, 1, 1000) for value in self.steps)
            if not steps:
                raise ValueError("steps must not be empty; give one number, or one per pyramid stage")
            object.__setattr__(self, "steps", steps)
        else:
            object.__setattr__(self, "steps", _integer("steps", self.steps, 1, 1000))

    def _check_sigmas(self) -> None:
        for kind in ("image", "video"):
            low_name, high_name = f"{kind}_noise_sigma_min", f"{kind}_noise_sigma_max"
            for name in (low_name, high_name):
                object.__setattr__(self, name, _number(name, getattr(self, name)))
            low, high = getattr(self, low_name), getattr(self, high_name)
            if not 0.0 <= low <= high <= 1.0:
                raise ValueError(f"{low_name} and {high_name} must satisfy 0 <= min <= max <= 1, got {low} and {high}")


def digest(value: object) -> str:
    """A short name for what a picture, clip, file or tensor holds."""
    digest = hashlib.sha256()
    parts = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for part in parts:
        if isinstance(part, str | Path):
            digest.update(Path(part).read_bytes())
        elif isinstance(part, Tensor):
            digest.update(repr((part.dtype, part.shape)).encode())
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            pixels = np.asarray(part)
            digest.update(repr((str(pixels.dtype), pixels.shape)).encode())
            digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()[:16]


def _shown(value: object) -> str:
    """A value as one short line, whatever was passed."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _integer(name: str, value: object, low: int, high: int) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {_shown(value)}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {number}")
    return number


def _is_unicode(text: str) -> bool:
    """False for the stand-ins Python puts where a command line's bytes were no text."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _number(name: str, value: object) -> float:
    is_number = isinstance(value, int | float | np.number) and not isinstance(
        value, bool | complex | np.complexfloating
    )
    if not is_number or abs(value) > _MAX_NUMBER or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {_shown(value)}")
    return float(value)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {_shown(value)}")


def _check_tensor(name: str, value: object, shape: str, *, ndim: int) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch tensor of shape {shape}, got {type(value).__name__}")
    if value.ndim != ndim or value.size(0) != 1:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}; one request is one video")
    if value.dtype not in _FLOATS or value.layout != torch.strided or value.is_meta:
        raise ValueError(
            f"{name} must hold floating point numbers of 16 to 64 bits in a dense tensor, got {value.dtype} "
            f"{value.layout} on {value.device}"
        )
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds NaN or infinite numbers")


@dataclass(frozen=True, slots=True)
class ChunkTiming:
    """Seconds the device spent on one chunk; where decoding overlaps, steps that were taken ahead are not in it."""

    denoise_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class VideoChunk:
    """33 frames (the last chunk may be cut).

    frames: (F, H, W, 3), of the kind the request asked for; None on ranks other than 0. latents: (1, 16, 9, h, w)
    float32, normalised, as Diffusers' output_type="latent".
    """

    index: int
    frames: np.ndarray | Tensor | None
    latents: Tensor
    timing: ChunkTiming
