"""Small checkpoints in the Diffusers layout: seeded random weights, the real architectures, every folder.

They generate moving textures, not pictures; they exist so that a fresh machine can run the whole engine in seconds.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from helios_engine.config import VARIANTS, ModelConfig, VaeConfig, read_json
from helios_engine.model.transformer import Transformer, init_random_
from helios_engine.model.vae import VideoAutoencoder
from helios_engine.model.weights import save_safetensors
from helios_engine.optional import require

# The tokenizer's words, taken from prompts people write for video models; letters and bytes cover the rest.
_CORPUS = """
A red fox runs through fresh snow at sunrise, its breath visible in the cold air. The camera follows slowly from behind.
A woman in a long blue coat walks along a rainy street at night, neon signs reflected on the wet ground.
Close up of a cup of coffee on a wooden table, steam rising, soft morning light through the window, shallow depth of field.
An old fisherman repairs a net on the beach while waves roll in, golden hour, cinematic, highly detailed, realistic.
A small robot plays the piano in a dark room, dust floating in a beam of light, slow motion, wide shot.
A cat and a dog bake a cake together in a kitchen, the cat measures flour and the dog stirs the batter.
Aerial view of a mountain lake surrounded by trees in autumn, mist above the water, birds flying over the forest.
Two children build a sand castle near the sea, laughing, bright sun, clear sky, gentle wind, handheld camera.
A train crosses a long bridge over a green valley, clouds moving fast, time lapse, ultra wide angle.
Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, worst quality, low quality.
"""


def _model_config() -> ModelConfig:
    return ModelConfig(
        num_attention_heads=4,
        attention_head_dim=32,
        rope_dim=(12, 10, 10),
        num_layers=4,
        ffn_dim=384,
        text_dim=64,
        freq_dim=64,
    )


_MARK = "_helios_engine_toy"  # in model_index.json: this folder may be written over
_VAE_BASE_DIM = 8
_TEXT = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_PIPELINES: dict[str, dict[str, object]] = {
    "base": {"_class_name": "HeliosPipeline"},
    "mid": {"_class_name": "HeliosPyramidPipeline", "is_cfg_zero_star": True, "is_distilled": False},
    "distilled": {"_class_name": "HeliosPyramidPipeline", "is_cfg_zero_star": False, "is_distilled": True},
}
_SCHEDULERS: dict[str, dict[str, object]] = {
    "base": {
        "_class_name": "HeliosScheduler",
        "stages": 1,
        "stage_range": [0, 1],
        "scheduler_type": "unipc",
        "use_dynamic_shifting": True,
        "time_shift_type": "exponential",
    },
    "mid": {
        "_class_name": "HeliosScheduler",
        "stages": 3,
        "scheduler_type": "unipc",
        "use_dynamic_shifting": True,
        "time_shift_type": "exponential",
    },
    "distilled": {
        "_class_name": "HeliosDMDScheduler",
        "stages": 3,
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",
    },
}


def write_toy_checkpoints(folder: Path, seed: int = 0) -> list[Path]:
    """Write folder/base, folder/mid and folder/distilled; returns their paths.

    Older toys are replaced whole. Raises ValueError, having changed nothing, when one of the names is taken by
    something else.
    """
    for variant in VARIANTS:
        _refuse_to_replace(folder / variant)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for variant in VARIANTS:
        target = folder / variant
        temporary = folder / f".{variant}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            _write_checkpoint(temporary, variant, seed)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        paths.append(target)
    return paths


def _refuse_to_replace(target: Path) -> None:
    if not target.exists():
        return
    index = target / "model_index.json"
    if not index.is_file() or _MARK not in read_json(index):
        raise ValueError(f"{target} exists and is no toy checkpoint; name another folder")


def _write_checkpoint(folder: Path, variant: str, seed: int) -> None:
    index = {
        **_PIPELINES[variant],
        _MARK: True,
        "transformer": ["diffusers", "HeliosTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "scheduler": ["diffusers", _SCHEDULERS[variant]["_class_name"]],
    }
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULERS[variant])
    config = _model_config()
    transformer = Transformer(config, torch.float32)
    init_random_(transformer, seed + VARIANTS.index(variant))
    _write_component(
        folder / "transformer", "HeliosTransformer3DModel", _as_json(config), transformer.checkpoint_slots()
    )
    vae_config = VaeConfig(base_dim=_VAE_BASE_DIM)
    vae = VideoAutoencoder(vae_config)
    init_vae_(vae, seed)
    _write_component(folder / "vae", "AutoencoderKLWan", _as_json(vae_config), vae.checkpoint_slots())
    _write_tokenizer(folder / "tokenizer")
    _write_text_encoder(folder / "text_encoder", seed)


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _as_json(config: ModelConfig | VaeConfig) -> dict[str, object]:
    values = {name: getattr(config, name) for name in config.__slots__}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _write_component(folder: Path, class_name: str, config: dict[str, object], tensors: dict[str, Tensor]) -> None:
    _write_json(folder / "config.json", {"_class_name": class_name, **config})
    path = folder / "diffusion_pytorch_model.safetensors"
    save_safetensors(path, {name: tensor.detach().clone() for name, tensor in tensors.items()}, {"format": "pt"})


def init_vae_(vae: nn.Module, seed: int) -> None:
    """Random weights with which most decoded pixels stay inside [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(1.0)
        elif parameter.ndim > 1:
            fan_in = math.prod(parameter.shape[1:])
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
        else:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    vae.decoder.conv_out.weight.data.mul_(0.4)  # keeps most pixels inside [-1, 1]


def _vocabulary() -> list[tuple[str, float]]:
    """Unigram pieces with log probabilities: words by frequency, then every printable letter as a last resort."""
    words = Counter("▁" + word.strip(".,") for word in _CORPUS.split())
    words.update("▁" + word.strip(".,").lower() for word in _CORPUS.split())
    total = sum(words.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(word, math.log(count / total)) for word, count in sorted(words.items(), key=lambda x: (-x[1], x[0]))]
    pieces += [(chr(code), -12.0) for code in range(33, 127)]
    return pieces


def _write_tokenizer(folder: Path) -> None:
    transformers = require("transformers", "writing a text encoder")

    transformers.T5Tokenizer(vocab=_vocabulary(), extra_ids=0).save_pretrained(folder)


def _write_text_encoder(folder: Path, seed: int) -> None:
    transformers = require("transformers", "writing a text encoder")

    config = transformers.UMT5Config(vocab_size=len(_vocabulary()), **_TEXT)
    model = transformers.UMT5EncoderModel(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            scale = 1.0 if name.startswith("shared") else parameter.shape[-1] ** -0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "encoder.embed_tokens.weight"}
    _write_json(folder / "config.json", {"architectures": ["UMT5EncoderModel"], **config.to_diff_dict()})
    save_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
