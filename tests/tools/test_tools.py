"""Toy checkpoints, conversion and hub downloads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from helios_engine import Engine, EngineConfig, VideoRequest
from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.tools.convert import convert_checkpoint
from helios_engine.tools.toy import write_toy_checkpoints
from tests.helpers import oracle

COMPONENTS = {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"}
TINY = {"prompt": "A red fox", "num_frames": 33, "height": 64, "width": 64, "max_sequence_length": 16}


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_diffusers_loads_the_toy_and_agrees(toy: Path, engines, variant: str) -> None:
    folder = toy / variant
    assert {path.name for path in folder.iterdir()} == COMPONENTS | {"model_index.json"}
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    steps = (2,) if variant == "base" else (1, 1, 1)
    guidance = 1.0 if variant == "distilled" else 3.0
    case = replace(
        oracle.random_case(variant, "t2v", 0), steps=steps, height=64, width=64, num_chunks=1, guidance_scale=guidance
    )
    expected = oracle.run(pipe, case)
    actual = engines(variant).generate(VideoRequest(**oracle.request_arguments(case)))
    assert (actual.latents - expected.latents).abs().max() <= 1e-4
    assert abs(actual.frames - expected.frames).max() <= 1e-4


def test_toy_is_small_and_the_same_every_time(toy: Path, tmp_path: Path) -> None:
    write_toy_checkpoints(tmp_path)
    for path in toy.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(toy)).read_bytes(), path
    for variant in ("base", "mid", "distilled"):
        assert sum(path.stat().st_size for path in (toy / variant).rglob("*")) < 15e6


def test_toy_replaces_an_older_one(tmp_path: Path) -> None:
    write_toy_checkpoints(tmp_path)
    (tmp_path / "base" / "left_over").touch()
    write_toy_checkpoints(tmp_path)
    assert not (tmp_path / "base" / "left_over").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "mid", "distilled"}


@pytest.mark.parametrize("content", ["weights.bin", "model_index.json"])
def test_toy_never_replaces_anything_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "mid").mkdir()
    (tmp_path / "mid" / content).write_text('{"_class_name": "HeliosPyramidPipeline"}')
    with pytest.raises(ValueError, match="is no toy checkpoint"):
        write_toy_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["mid", content]


def test_convert_halves_and_keeps_numbers(toy: Path, tmp_path: Path) -> None:
    source, target = toy / "mid", tmp_path / "bf16"
    convert_checkpoint(source, target, "bfloat16")
    before = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    after = load_file(target / "transformer" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        kept = any(part in name for part in ("time_embedder", "scale_shift_table", "norm2"))
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(tensor, before[name].to(tensor.dtype))
    config = EngineConfig(device="cpu", dtype="bfloat16")
    videos = [Engine.load(folder, config).generate(VideoRequest(**TINY, steps=1)) for folder in (source, target)]
    assert torch.equal(videos[0].latents, videos[1].latents)


def test_convert_refuses_to_overwrite_and_leaves_nothing_behind(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        convert_checkpoint(toy / "mid", tmp_path / "there", "bfloat16")
    with (
        mock.patch("helios_engine.tools.convert.save_safetensors", side_effect=OSError("disk full")),
        pytest.raises(OSError, match="disk full"),
    ):
        convert_checkpoint(toy / "mid", tmp_path / "new", "bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def _shard(folder: Path) -> None:
    """Split the transformer's file in three, as hub checkpoints are."""
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    weight_map = {}
    for index in range(3):
        file = f"diffusion_pytorch_model-{index + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[index::3]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, path.with_name(file))
    index_file = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    index_file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def test_sharded_checkpoints_load_and_convert(toy: Path, tmp_path: Path, engines) -> None:
    import shutil

    folder = tmp_path / "sharded"
    shutil.copytree(toy / "distilled", folder)
    _shard(folder)
    request = VideoRequest(**TINY)
    expected = engines("distilled").generate(request).latents
    engine = Engine.load(folder, EngineConfig(device="cpu", dtype="float32"))
    assert torch.equal(engine.generate(request).latents, expected)
    convert_checkpoint(folder, tmp_path / "bf16", "bfloat16")
    index = json.loads((tmp_path / "bf16/transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "bf16" / "transformer").glob("*.safetensors"))
    assert len(files) == 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())


def test_an_older_output_table_name_loads(toy: Path, tmp_path: Path, engines) -> None:
    import shutil

    folder = tmp_path / "older"
    shutil.copytree(toy / "distilled", folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["scale_shift_table"] = tensors.pop("norm_out.scale_shift_table")
    tensors["blocks.0.attn1.norm_added_q.weight"] = torch.zeros(3)  # the reference ignores it too
    save_file(tensors, path)
    request = VideoRequest(**TINY)
    engine = Engine.load(folder, EngineConfig(device="cpu", dtype="float32"))
    assert torch.equal(engine.generate(request).latents, engines("distilled").generate(request).latents)
    convert_checkpoint(folder, tmp_path / "bf16", "bfloat16")
    Checkpoint.open(tmp_path / "bf16").check()


def test_network_errors_of_the_hub_are_value_errors() -> None:
    from huggingface_hub.errors import HfHubHTTPError

    transport_error = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
    with (
        mock.patch("huggingface_hub.snapshot_download", side_effect=transport_error("proxy says no")),
        pytest.raises(ValueError, match="cannot be fetched from the hub: proxy says no"),
    ):
        Checkpoint.open("owner/name")


def test_a_hub_id_fetches_the_inference_folders_alone(toy: Path) -> None:
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(toy / "mid")) as download:
        checkpoint = Checkpoint.open("BestWishYsh/Helios-Mid", revision="abc")
    assert checkpoint.recipe.variant == "mid"
    (name,), options = download.call_args
    assert (name, options["revision"]) == ("BestWishYsh/Helios-Mid", "abc")
    patterns = set(options["allow_patterns"])
    assert patterns == {"model_index.json", *(f"{component}/*" for component in COMPONENTS)}
