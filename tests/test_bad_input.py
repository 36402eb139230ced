"""Bad input: one clear ValueError through Python, one line and exit code 2 on the command line, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helios_engine import Engine, EngineConfig, VideoRequest
from helios_engine.cli import main

SIZE = {"height": 64, "width": 64}
EMBEDS = torch.zeros(1, 4, 64)

# id: (variant, request fields, the same as flags or None where flags cannot say it, part of the message)
REQUESTS = {
    "no prompt": ("base", {}, [], "prompt is missing"),
    "prompt and embeds": ("base", {"prompt": "x", "prompt_embeds": EMBEDS}, None, "prompt or prompt_embeds, not both"),
    "prompt list": ("base", {"prompt": ["a", "b"]}, None, "one request is one video"),
    "height not a multiple": ("mid", {"prompt": "x", "height": 100, "width": 64}, ["--prompt", "x", "--height", "100"], "multiples of 64"),
    "width not a multiple": ("base", {"prompt": "x", "height": 64, "width": 72}, ["--prompt", "x", "--width", "72"], "multiples of 16"),
    "multiple of 32 only": ("distilled", {"prompt": "x", "height": 96, "width": 64}, ["--prompt", "x", "--height", "96"], "try 128x64"),
    "height zero": ("base", {"prompt": "x", "height": 0}, ["--prompt", "x", "--height", "0"], "height must be between"),
    "height negative": ("base", {"prompt": "x", "height": -64}, ["--prompt", "x", "--height", "-64"], "height must be between"),
    "height text": ("base", {"prompt": "x", "height": "big"}, ["--prompt", "x", "--height", "big"], "height"),
    "height fraction": ("base", {"prompt": "x", "height": 64.5}, ["--prompt", "x", "--height", "64.5"], "height"),
    "no frames": ("base", {"prompt": "x", "num_frames": 0}, ["--prompt", "x", "--num-frames", "0"], "num_frames must be between"),
    "frames text": ("base", {"prompt": "x", "num_frames": "many"}, ["--prompt", "x", "--num-frames", "many"], "frames"),
    "fps zero": ("base", {"prompt": "x", "fps": 0}, ["--prompt", "x", "--fps", "0"], "fps must be between"),
    "seed negative": ("base", {"prompt": "x", "seed": -1}, ["--prompt", "x", "--seed", "-1"], "seed must be between"),
    "seed too large": ("base", {"prompt": "x", "seed": 2**70}, ["--prompt", "x", "--seed", str(2**70)], "seed must be between"),
    "steps zero": ("base", {"prompt": "x", "steps": 0}, ["--prompt", "x", "--steps", "0"], "steps must be between"),
    "steps empty": ("base", {"prompt": "x", "steps": ()}, ["--prompt", "x", "--steps", ""], "steps"),
    "steps not numbers": ("mid", {"prompt": "x", "steps": ("a", 1, 1)}, ["--prompt", "x", "--steps", "a,1,1"], "steps"),
    "too few stages": ("mid", {"prompt": "x", "steps": (2, 2)}, ["--prompt", "x", "--steps", "2,2"], "one number or 3"),
    "stages for base": ("base", {"prompt": "x", "steps": (2, 2, 2)}, ["--prompt", "x", "--steps", "2,2,2"], "one number or 1"),
    "guidance nan": ("base", {"prompt": "x", "guidance_scale": float("nan")}, ["--prompt", "x", "--guidance-scale", "nan"], "guidance_scale must be a finite"),
    "guidance negative": ("base", {"prompt": "x", "guidance_scale": -1.0}, ["--prompt", "x", "--guidance-scale", "-1"], "guidance_scale must be between"),
    "guidance text": ("base", {"prompt": "x", "guidance_scale": "much"}, ["--prompt", "x", "--guidance-scale", "much"], "guidance"),
    "negative without guidance": ("distilled", {"prompt": "x", "negative_prompt": "y"}, ["--prompt", "x", "--negative-prompt", "y"], "no effect at guidance_scale 1"),
    "amplify on base": ("base", {"prompt": "x", "amplify_first_chunk": True}, ["--prompt", "x", "--amplify-first-chunk"], "amplify_first_chunk has no effect"),
    "amplify on mid": ("mid", {"prompt": "x", "amplify_first_chunk": True}, ["--prompt", "x", "--amplify-first-chunk"], "amplify_first_chunk has no effect"),
    "zero init on base": ("base", {"prompt": "x", "zero_init": True}, ["--prompt", "x", "--zero-init"], "zero_init needs CFG-Zero"),
    "zero steps alone": ("mid", {"prompt": "x", "zero_init": False, "zero_steps": 2}, ["--prompt", "x", "--no-zero-init", "--zero-steps", "2"], "zero_steps has no effect"),
    "text length zero": ("base", {"prompt": "x", "max_sequence_length": 0}, ["--prompt", "x", "--max-sequence-length", "0"], "max_sequence_length must be between"),
    "sigma order": ("base", {"prompt": "x", "image_noise_sigma_min": 0.5}, ["--prompt", "x", "--image-noise-sigma-min", "0.5"], "0 <= min <= max <= 1"),
    "sigma above one": ("base", {"prompt": "x", "video_noise_sigma_max": 1.5}, ["--prompt", "x", "--video-noise-sigma-max", "1.5"], "0 <= min <= max <= 1"),
    "frames kind": ("base", {"prompt": "x", "frames": "png"}, ["--prompt", "x", "--frames", "png"], "frames"),
    "trim not a bool": ("base", {"prompt": "x", "trim": "yes"}, None, "trim must be true or false"),
    "embeds nan": ("base", {"prompt_embeds": torch.full((1, 4, 64), float("nan"))}, None, "NaN or infinite"),
    "embeds batch": ("base", {"prompt_embeds": torch.zeros(2, 4, 64)}, None, "one request is one video"),
    "embeds flat": ("base", {"prompt_embeds": torch.zeros(4, 64)}, None, "must have shape (1, T, text width)"),
    "embeds width": ("distilled", {"prompt_embeds": torch.zeros(1, 4, 65)}, None, "must be 64 wide"),
    "embeds empty": ("distilled", {"prompt_embeds": torch.zeros(1, 0, 64)}, None, "at least one token"),
    "embeds integer": ("distilled", {"prompt_embeds": torch.zeros(1, 4, 64, dtype=torch.int64)}, None, "floating point"),
    "embeds list": ("distilled", {"prompt_embeds": [[0.0]]}, None, "must be a torch tensor"),
    "image and video": ("base", {"prompt": "x", "image": "a.png", "video": "b.mp4"}, ["--prompt", "x", "--image", "a.png", "--video", "b.mp4"], "not both"),
    "image missing": ("base", {"prompt": "x", "image": "nowhere.png"}, ["--prompt", "x", "--image", "nowhere.png"], "nowhere.png does not exist"),
    "video missing": ("base", {"prompt": "x", "video": "nowhere.mp4"}, ["--prompt", "x", "--video", "nowhere.mp4"], "nowhere.mp4 does not exist"),
    "image unreadable": ("base", {"prompt": "x", "image": "text.png"}, ["--prompt", "x", "--image", "text.png"], "text.png cannot be read"),
    "image truncated": ("base", {"prompt": "x", "image": "half.png"}, ["--prompt", "x", "--image", "half.png"], "half.png cannot be read"),
    "image is a folder": ("base", {"prompt": "x", "image": "."}, ["--prompt", "x", "--image", "."], "cannot be read"),
    "video unreadable": ("base", {"prompt": "x", "video": "text.png"}, ["--prompt", "x", "--video", "text.png"], "text.png cannot be read"),
    "video is a picture": ("base", {"prompt": "x", "video": "whole.png"}, ["--prompt", "x", "--video", "whole.png"], "at least 33 frames"),
    "short video": ("base", {"prompt": "x", "video": np.zeros((32, 64, 64, 3), np.uint8)}, None, "at least 33 frames to continue from, got 32"),
    "image array shape": ("base", {"prompt": "x", "image": np.zeros((64, 64), np.uint8)}, None, "shape (H, W, 3)"),
    "image out of range": ("base", {"prompt": "x", "image": np.full((64, 64, 3), 255.0)}, None, "must lie in [0, 1]"),
    "image wrong type": ("base", {"prompt": "x", "image": 17}, None, "must be a path, PIL image"),
    "image nan": ("base", {"prompt": "x", "image": np.full((64, 64, 3), np.nan)}, None, "must lie in [0, 1]"),
    "video empty": ("base", {"prompt": "x", "video": []}, None, "at least 33 frames to continue from, got 0"),
    "video of paths": ("base", {"prompt": "x", "video": ["a.png"] * 40}, None, "must be PIL images, arrays or tensors, got str"),
    "video wrong type": ("base", {"prompt": "x", "video": 17}, None, "video must be a path"),
    "image of objects": ("base", {"prompt": "x", "image": np.full((64, 64, 3), None)}, None, "uint8 or floating point"),
    "prompt bytes": ("base", {"prompt": "a\udcff"}, ["--prompt", "a\udcff"], "no UTF-8 text"),
    "guidance huge": ("base", {"prompt": "x", "guidance_scale": 10**400}, None, "guidance_scale must be a finite number"),
    "embeds meta": ("distilled", {"prompt_embeds": torch.zeros(1, 4, 64, device="meta")}, None, "in a dense tensor"),
    "embeds sparse": ("distilled", {"prompt_embeds": torch.zeros(1, 4, 64).to_sparse()}, None, "in a dense tensor"),
    "zero init unguided": ("mid", {"prompt": "x", "guidance_scale": 1.0, "zero_init": True}, ["--prompt", "x", "--guidance-scale", "1", "--zero-init"], "no effect without guidance"),
    "skip with one chunk": ("base", {"prompt": "x", "num_frames": 33, "skip_first_chunk": True}, ["--prompt", "x", "--num-frames", "33", "--skip-first-chunk"], "has only one"),
    "image latents alone": ("base", {"prompt": "x", "image_latents": torch.zeros(1, 16, 1, 8, 8)}, None, "belong together"),
    "latents shape": ("base", {"prompt": "x", "latents": torch.zeros(1, 16, 9, 8, 8)}, None, "latents must have shape (1, 16, 36, 8, 8)"),
    "latents endless": ("base", {"prompt": "x", "num_frames": None, "latents": torch.zeros(1, 16, 9, 8, 8)}, None, "endless"),
    "latents infinite": ("base", {"prompt": "x", "latents": torch.full((1, 16, 36, 8, 8), float("inf"))}, None, "NaN or infinite"),
    "video latents frames": ("base", {"prompt": "x", "video_latents": torch.zeros(1, 16, 10, 8, 8)}, None, "multiple of 9 latent frames"),
    "video and its latents": ("base", {"prompt": "x", "video": "a.mp4", "video_latents": torch.zeros(1, 16, 9, 8, 8)}, None, "not both"),
}  # fmt: skip


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with input files that are not what they seem."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    return tmp_path


def _assert_one_line(capsys: pytest.CaptureFixture, folder: Path, before: set[Path]) -> str:
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1, errors
    assert errors.startswith("helios-engine: error: ")
    assert "Traceback" not in errors
    assert set(folder.rglob("*")) == before
    return errors


def test_there_are_enough_cases() -> None:
    assert len(REQUESTS) + len(CHECKPOINTS) >= 40


@pytest.mark.parametrize("name", REQUESTS)
def test_bad_request(name: str, engines, toy: Path, inputs: Path, capsys: pytest.CaptureFixture) -> None:
    variant, fields, flags, message = REQUESTS[name]
    if isinstance(fields.get("video"), str):
        pytest.importorskip("av")
    engine = engines(variant)
    with pytest.raises(ValueError, match=".") as caught:
        engine.open(VideoRequest(**{**SIZE, **fields}))
    assert message in str(caught.value)
    if flags is not None:
        before = set(inputs.rglob("*"))
        size = [part for name in SIZE if f"--{name}" not in flags for part in (f"--{name}", str(SIZE[name]))]
        code = main(["generate", "--model", str(toy / variant), "--output", "out.npy", "--quiet", *size, *flags])
        assert code == 2
        line = _assert_one_line(capsys, inputs, before)
        assert message in line or "argument --" in line


def _edit_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


def _edit_weights(path: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _shard_without_file(folder: Path) -> None:
    file = "transformer/diffusion_pytorch_model.safetensors"
    index = {"metadata": {}, "weight_map": {"proj_out.weight": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    (folder / f"{file}.index.json").write_text(json.dumps(index))


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"

# id: (what is done to a copy of the distilled toy checkpoint, parts of the message)
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no model_index": (lambda f: (f / "model_index.json").unlink(), ("model_index.json is missing",)),
    "index no json": (lambda f: (f / "model_index.json").write_text("{"), ("model_index.json cannot be read as JSON",)),
    "other pipeline": (lambda f: _edit_json(f / "model_index.json", _class_name="WanPipeline"), ("HeliosPyramidPipeline", "WanPipeline")),
    "null vae": (lambda f: _edit_json(f / "model_index.json", vae=[None, None]), ("vae is null",)),
    "null tokenizer": (lambda f: _edit_json(f / "model_index.json", tokenizer=[None, None]), ("go together",)),
    "other vae": (lambda f: _edit_json(f / "model_index.json", vae=["diffusers", "AutoencoderKL"]), ("vae must be AutoencoderKLWan",)),
    "no transformer config": (lambda f: (f / "transformer" / "config.json").unlink(), ("transformer/config.json is missing",)),
    "unknown setting": (lambda f: _edit_json(f / "transformer" / "config.json", restrict_self_attn=True), ("unknown setting restrict_self_attn=True",)),
    "rope does not fit": (lambda f: _edit_json(f / "transformer" / "config.json", rope_dim=[4, 4, 4]), ("rope_dim", "attention_head_dim 32")),
    "more layers": (lambda f: _edit_json(f / "transformer" / "config.json", num_layers=5), ("missing blocks.4.", "and")),
    "fewer layers": (lambda f: _edit_json(f / "transformer" / "config.json", num_layers=3), ("unexpected blocks.3.",)),
    "other width": (lambda f: _edit_json(f / "transformer" / "config.json", ffn_dim=400), ("wrong shape", "expected [400")),
    "missing key": (lambda f: _edit_weights(f / WEIGHTS, lambda t: t.pop("proj_out.bias")), ("missing proj_out.bias",)),
    "extra key": (lambda f: _edit_weights(f / WEIGHTS, lambda t: t.update({"gan_heads.0": torch.zeros(1)})), ("unexpected gan_heads.0",)),
    "wrong shape": (lambda f: _edit_weights(f / VAE, lambda t: t.update({"quant_conv.bias": torch.zeros(3)})), ("quant_conv.bias [3] (expected [32])",)),
    "truncated transformer": (lambda f: _truncate(f / WEIGHTS), ("diffusion_pytorch_model.safetensors is truncated",)),
    "truncated text encoder": (lambda f: _truncate(f / "text_encoder" / "model.safetensors"), ("text_encoder/model.safetensors is truncated",)),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ("has no .safetensors file",)),
    "missing shard": (_shard_without_file, ("00002-of-00002.safetensors is missing",)),
    "other scheduler": (lambda f: _edit_json(f / "scheduler" / "scheduler_config.json", _class_name="UniPCMultistepScheduler"), ("HeliosScheduler or HeliosDMDScheduler",)),
    "wrong solver": (lambda f: _edit_json(f / "scheduler" / "scheduler_config.json", _class_name="HeliosScheduler"), ("needs HeliosDMDScheduler",)),
    "single stage": (lambda f: _edit_json(f / "scheduler" / "scheduler_config.json", stages=1, stage_range=[0, 1]), ("more than one stage",)),
    "text config empty": (lambda f: (f / "text_encoder" / "config.json").write_text("{}"), ("text_encoder/config.json lacks vocab_size",)),
    "text config type": (lambda f: _edit_json(f / "text_encoder" / "config.json", d_model="x"), ("describes no UMT5 encoder",)),
    "text tensor missing": (lambda f: _edit_weights(f / "text_encoder" / "model.safetensors", lambda t: t.pop("encoder.final_layer_norm.weight")), ("missing encoder.final_layer_norm.weight",)),
    "tokenizer corrupt": (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"), ("tokenizer cannot be loaded",)),
    "train steps zero": (lambda f: _edit_json(f / "scheduler" / "scheduler_config.json", num_train_timesteps=0), ("scheduler_config.json: num_train_timesteps must be above 1",)),
    "gamma too large": (lambda f: _edit_json(f / "scheduler" / "scheduler_config.json", gamma=3.0), ("gamma must lie in",)),
    "shift no number": (lambda f: _edit_json(f / "scheduler" / "scheduler_config.json", base_shift="x"), ("base_shift must be float, got 'x'",)),
    "stages out of order": (lambda f: _edit_json(f / "scheduler" / "scheduler_config.json", stage_range=[1, 0.5, 0.2, 0]), ("stage_range must rise",)),
    "blocks no number": (lambda f: _edit_json(f / "vae" / "config.json", num_res_blocks="x"), ("vae/config.json: num_res_blocks must be int",)),
    "wan 2.2 vae": (lambda f: _edit_json(f / "vae" / "config.json", is_residual=True), ("Wan 2.1 VAE",)),
    "statistics": (lambda f: _edit_json(f / "vae" / "config.json", latents_mean=[0.0]), ("latents_mean must have z_dim = 16",)),
    "channels differ": (lambda f: _edit_json(f / "transformer" / "config.json", in_channels=8, out_channels=8), ("16 latent channels, the transformer 8",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoint(name: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    damage, messages = CHECKPOINTS[name]
    folder = tmp_path / "checkpoint"
    shutil.copytree(toy / "distilled", folder)
    damage(folder)
    with pytest.raises(ValueError, match=".") as caught:
        Engine.load(folder, EngineConfig(device="cpu"))
    for message in messages:
        assert message in str(caught.value)
    before = set(tmp_path.rglob("*"))
    flags = ["--prompt", "x", "--output", str(tmp_path / "out.npy"), "--quiet", "--device", "cpu"]
    assert main(["generate", "--model", str(folder), *flags]) == 2
    assert messages[0] in _assert_one_line(capsys, tmp_path, before)


ENGINE_SETTINGS = {
    "dtype": ({"dtype": "int8"}, ["--dtype", "int8"], "dtype"),
    "vae dtype": ({"vae_dtype": "fp8"}, ["--vae-dtype", "fp8"], "vae"),
    "device": ({"device": "tpu"}, ["--device", "tpu"], "device must be auto, cpu, cuda"),
    "device number": ({"device": "cuda:x"}, ["--device", "cuda:x"], "cuda:N with a number"),
    "device auto number": ({"device": "auto:0"}, ["--device", "auto:0"], "device must be"),
    "device endless": ({"device": "cuda:" + "9" * 20}, ["--device", "cuda:" + "9" * 20], "device must be"),
    "revision of a folder": ({"revision": "main"}, ["--revision", "main"], "has no effect on the local folder"),
    "device absent": ({"device": "cuda:99"}, ["--device", "cuda:99"], "cuda:99 is not there"),
    "backend": ({"attention_backend": "sage"}, ["--attention-backend", "sage"], "attention"),
    "offload level": ({"offload_level": "leaf"}, ["--offload-level", "leaf"], "leaf is a way of offload group, but offload is none"),
    "leaf and compile": ({"offload": "group", "offload_level": "leaf", "compile": True}, ["--offload", "group", "--offload-level", "leaf", "--compile"], "use one of the two"),
    "backend on cpu": ({"attention_backend": "fa3", "device": "cpu"}, ["--attention-backend", "fa3", "--device", "cpu"], "fa3 cannot run"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENGINE_SETTINGS)
def test_bad_engine_setting(name: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fields, flags, message = ENGINE_SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        Engine.load(toy / "base", EngineConfig(**fields))
    arguments = ["generate", "--model", str(toy / "base"), "--prompt", "x", "--output", str(tmp_path / "out.npy")]
    assert main([*arguments, *flags]) == 2
    assert message in _assert_one_line(capsys, tmp_path, set())


OUTPUTS = {
    "suffix": ("out.avi", [], "must end in .mp4, .npy, .safetensors"),
    "no suffix": ("out", [], "must end in"),
    "a folder": ("folder.mp4", [], "is a folder"),
    "below a file": ("file/out.mp4", [], "no folder this user may write to"),
    "encoder": ("out.mp4", ["--encoder", "h266"], "encoder h266 is unknown"),
    "encoder of sound": ("out.mp4", ["--encoder", "aac"], "does not make yuv420p video"),
    "encoder of pictures": ("out.mp4", ["--encoder", "png"], "does not make yuv420p video"),
    "encoder without hardware": ("out.mp4", ["--encoder", "h264_nvenc"], "cannot run here"),
    "encoder unused": ("out.npy", ["--encoder", "h264_nvenc"], "has no effect on .npy"),
    "long name": ("x" * 230 + ".mp4", [], "is longer than"),
    "endless latents": ("out.safetensors", ["--num-frames", "endless"], "cannot be held"),
}


RANKS = {
    "no ranks": (["--num-gpus", "0"], "num-gpus must be at least 1"),
    "degrees do not fit": (["--num-gpus", "4", "--ulysses-degree", "3"], "is 3 ranks, but 4 were started"),
    "degrees without ranks": (["--ring-degree", "2"], "is 2 ranks, but 1 were started"),
    "degree zero": (["--num-gpus", "2", "--ulysses-degree", "0"], "ulysses degree must be"),
    "three branches": (["--num-gpus", "3", "--cfg-degree", "3"], "cfg degree must be 1 or 2"),
    "branches without guidance": (["--num-gpus", "2", "--cfg-degree", "2"], "needs a guidance scale above 1"),
}


@pytest.mark.parametrize("name", RANKS)
def test_bad_ranks(name: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    from helios_engine.parallel import launch

    monkeypatch.setattr(launch, "start_ranks", lambda *_: pytest.fail("ranks were started"))
    flags, message = RANKS[name]
    arguments = ["generate", "--model", str(toy / "distilled"), "--prompt", "x", "--output", str(tmp_path / "out.npy")]
    assert main([*arguments, *flags]) == 2
    assert message in _assert_one_line(capsys, tmp_path, set())


@pytest.mark.parametrize("name", OUTPUTS)
def test_bad_output(name: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("av")
    if name == "encoder without hardware" and torch.cuda.is_available():
        pytest.skip("this machine has the hardware")
    target, flags, message = OUTPUTS[name]
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    before = set(tmp_path.rglob("*"))
    arguments = ["generate", "--model", str(toy / "base"), "--prompt", "x", "--output", str(tmp_path / target), *flags]
    assert main(arguments) == 2
    assert message in _assert_one_line(capsys, tmp_path, before)


def test_no_such_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, message in (("nowhere", "no folder here and no hub id"), ("a/b/c", "no folder here and no hub id")):
        with pytest.raises(ValueError, match=message):
            Engine.load(name)
        assert main(["inspect", name]) == 2
        assert message in _assert_one_line(capsys, tmp_path, set())


def test_the_hub_out_of_reach_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", "nobody/nothing"]) == 2
    assert "cannot be fetched from the hub" in _assert_one_line(capsys, tmp_path, set())


def test_unknown_flag_and_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in (["generate", "--modle", "x"], ["frobnicate"], [], ["convert", "x"]):
        assert main(arguments) == 2
        _assert_one_line(capsys, tmp_path, set())


def test_null_text_encoder_needs_embeddings(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(toy / "base", folder, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    _edit_json(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    engine = Engine.load(folder, EngineConfig(device="cpu", dtype="float32"))
    with pytest.raises(ValueError, match="prompt needs a text encoder"):
        engine.open(VideoRequest(prompt="x", **SIZE))
    with pytest.raises(ValueError, match="needs negative_prompt_embeds"):
        engine.open(VideoRequest(prompt_embeds=EMBEDS, **SIZE))
    video = engine.generate(VideoRequest(prompt_embeds=EMBEDS, guidance_scale=1.0, steps=1, num_frames=1, **SIZE))
    assert video.frames.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("name", ["text config empty", "text tensor missing", "tokenizer corrupt", "missing key"])
def test_inspect_and_convert_refuse_what_generate_refuses(name: str, toy: Path, tmp_path: Path, capsys) -> None:
    damage, messages = CHECKPOINTS[name]
    shutil.copytree(toy / "distilled", tmp_path / "checkpoint")
    damage(tmp_path / "checkpoint")
    before = set(tmp_path.rglob("*"))
    for arguments in (["inspect"], ["convert"]):
        target = [str(tmp_path / "copy")] if arguments == ["convert"] else []
        assert main([*arguments, str(tmp_path / "checkpoint"), *target]) == 2
        assert messages[0] in _assert_one_line(capsys, tmp_path, before)


def test_everything_is_checked_before_anything_large_is_read(toy: Path, tmp_path: Path, monkeypatch) -> None:
    from helios_engine.engine.checkpoint import Checkpoint

    shutil.copytree(toy / "distilled", tmp_path / "checkpoint")
    _truncate(tmp_path / "checkpoint" / "text_encoder" / "model.safetensors")
    monkeypatch.setattr(Checkpoint, "load_transformer", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="text_encoder/model.safetensors is truncated"):
        Engine.load(tmp_path / "checkpoint", EngineConfig(device="cpu"))


def test_odd_calls(engines) -> None:
    with pytest.raises(ValueError, match="must be a VideoRequest, got dict"):
        engines("base").open({"prompt": "x"})
    with pytest.raises(ValueError, match="a list of at least one"):
        engines("base").stream_batch(VideoRequest(prompt="x"))
    with pytest.raises(ValueError, match="must be a mapping"):
        VideoRequest.from_dict(None)
    with pytest.raises(ValueError, match="no folder here"):
        Engine.load("~nosuchuser/x/y")


def test_a_full_disk_is_one_line(toy: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    from safetensors import SafetensorError

    from helios_engine.model import weights

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    assert main(["convert", str(toy / "base"), str(tmp_path / "copy")]) == 1
    assert "No space left on device" in _assert_one_line(capsys, tmp_path, set())


BATCHES = {
    "sizes": ({"height": 128}, "one shape"),
    "lengths": ({"num_frames": 34}, "one shape"),
    "steps": ({"steps": 3}, "one shape"),
    "text lengths": ({"max_sequence_length": 9}, "one text length"),
    "latents": ({"latents": torch.zeros(1, 16, 9, 8, 8)}, "latents for all requests or for none"),
    "negative lengths": ({"negative_prompt_embeds": torch.zeros(1, 7, 64)}, "one text length"),
    "unreadable image": ({"image": "nowhere.png"}, "nowhere.png does not exist"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_bad_batch(name: str, engines) -> None:
    changes, message = BATCHES[name]
    common = {"prompt": "x", "num_frames": 33, "steps": 2, **SIZE}
    with pytest.raises(ValueError, match=message):
        engines("base").stream_batch([VideoRequest(**common), VideoRequest(**{**common, **changes})])


def test_an_empty_batch_is_refused(engines) -> None:
    with pytest.raises(ValueError, match="a list of at least one request"):
        engines("base").stream_batch([])


def test_endless_cannot_be_collected(engines) -> None:
    with pytest.raises(ValueError, match="use stream"):
        engines("distilled").generate(VideoRequest(prompt="x", num_frames=None, **SIZE))
