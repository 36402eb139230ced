"""The reference for gpu_check.py: Diffusers' pipeline with random weights of the same shapes, timed chunk by chunk."""

from __future__ import annotations

import itertools
import statistics
import time
from unittest import mock

import torch

from helios_engine import VideoRequest
from helios_engine.config import ModelConfig, VaeConfig
from helios_engine.model.transformer import init_random_
from helios_engine.request import FRAMES_PER_CHUNK
from helios_engine.tools.toy import init_vae_

_DTYPE = torch.bfloat16


def chunk_figures(arrivals: list[float]) -> dict[str, float]:
    """Seconds from the start (the first of the times) to the first chunk, and from chunk to chunk, as a median."""
    seconds = [after - before for before, after in itertools.pairwise(arrivals)]
    steady = statistics.median(seconds[1:])
    return {"first_chunk_s": seconds[0], "chunk_s": steady, "frames_per_second": FRAMES_PER_CHUNK / steady}


def make_pipe(model: ModelConfig, vae_config: VaeConfig, device: torch.device):
    """The Distilled pipeline without a text encoder, its weights made on the device."""
    from diffusers import AutoencoderKLWan, HeliosDMDScheduler, HeliosPyramidPipeline, HeliosTransformer3DModel

    config = {name: getattr(model, name) for name in model.__slots__}
    with torch.device("meta"):
        transformer = HeliosTransformer3DModel(**config).to(_DTYPE)
    for name, module in transformer.named_modules():
        if any(name.endswith(part) for part in ("time_embedder", "norm1", "norm2", "norm3")):
            module.float()
    transformer = transformer.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in transformer.named_parameters():
        if "scale_shift_table" in name:
            parameter.data = parameter.data.float()
    # Tables that the constructor computed on the meta device.
    rope = transformer.rope
    for axis, dim in zip("tyx", model.rope_dim, strict=True):
        setattr(rope, f"freqs_base_{axis}", rope._get_freqs_base(dim).to(device))
    init_random_(transformer, 0)
    vae = AutoencoderKLWan(base_dim=vae_config.base_dim).to(device).eval()
    init_vae_(vae, 0)
    scheduler = HeliosDMDScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    pipe = HeliosPyramidPipeline(None, None, vae, scheduler, transformer, is_distilled=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def offloaded(pipe, level: str, device: torch.device):
    """The pipeline with its transformer's weights on the host and Diffusers' group offload, prefetching where it can."""
    from diffusers.hooks import apply_group_offloading

    pipe.transformer.to("cpu")
    apply_group_offloading(
        pipe.transformer,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type=f"{level}_level",
        num_blocks_per_group=1 if level == "block" else None,
        use_stream=device.type == "cuda",
    )
    return pipe


def time_diffusers(pipe, requests: dict[str, VideoRequest]) -> dict[str, object]:
    """Seconds between the ends of consecutive chunks of each request, taken at each decode's end; the first one is run once
    before, to warm up."""
    from tests.helpers.oracle import mended

    decode, device = pipe.vae.decode, pipe.vae.device
    marks: list[float] = []

    def marking_decode(*args: object, **kwargs: object):
        output = decode(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return output

    result: dict[str, object] = {}
    first = next(iter(requests.values()))
    for name, request in (("", first), *requests.items()):
        marks.clear()
        with mended(), mock.patch.object(pipe.vae, "decode", marking_decode), torch.no_grad():
            start = time.perf_counter()
            pipe(
                prompt_embeds=request.prompt_embeds.to(device, _DTYPE),
                height=request.height,
                width=request.width,
                num_frames=request.num_frames if name else FRAMES_PER_CHUNK,
                guidance_scale=1.0,
                pyramid_num_inference_steps_list=list(request.steps),
                is_amplify_first_chunk=True,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            )
        if name:
            result[name] = chunk_figures([start, *marks])
    return result
