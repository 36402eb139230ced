"""What only a CUDA device can show. Skipped elsewhere; gpu_check.sh runs it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helios_engine import Engine, EngineConfig, VideoRequest
from helios_engine.engine.autotune import make_gemms
from helios_engine.engine.chunk import ChunkWork
from helios_engine.engine.recorders import borrowed
from helios_engine.ops import fp8, native
from helios_engine.ops.attention import choose_attention
from tests.helpers import oracle

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# float32 with TF32 off, other summation orders than the CPU's.
TOLERANCE = 1e-4


@pytest.fixture
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.usefixtures("_no_tf32")
@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v"])
@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_float32_on_the_gpu_equals_diffusers_on_the_cpu(variant: str, task: str, tmp_path) -> None:
    case = oracle.random_case(variant, task, 1)
    pipe = oracle.pipeline(case)
    expected = oracle.run(pipe, case)
    engine = Engine.load(oracle.save(pipe, tmp_path / "checkpoint"), EngineConfig(device="cuda", dtype="float32"))
    video = engine.generate(VideoRequest(**oracle.request_arguments(case)))
    assert (video.latents.cpu() - expected.latents).abs().max() <= TOLERANCE
    assert abs(video.frames - expected.frames).max() <= TOLERANCE


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_bf16_error_on_the_gpu_is_no_larger_than_diffusers(variant: str, tmp_path) -> None:
    case = replace(oracle.random_case(variant, "t2v", 2), num_chunks=1, dynamic_shifting=True)
    case = replace(case, model={**case.model, "is_amplify_history": False}, guidance_scale=1.0)
    case = replace(case, scheduler="dmd" if variant == "distilled" else "unipc")
    folder = oracle.save(oracle.pipeline(case), tmp_path / "checkpoint")
    pipe_class = type(oracle.pipeline(case))
    exact_pipe = pipe_class.from_pretrained(folder)
    pipe = pipe_class.from_pretrained(folder, torch_dtype=torch.bfloat16, vae=oracle_vae(folder)).to("cuda")
    engine = Engine.load(folder, EngineConfig(device="cuda", dtype="bfloat16"))
    ratios = []
    for seed in range(8):
        seeded = replace(case, seed=seed)
        exact = oracle.run(exact_pipe, seeded).latents
        theirs = (oracle.run(pipe, seeded).latents.cpu() - exact).norm()
        ours = (engine.generate(VideoRequest(**oracle.request_arguments(seeded))).latents.cpu() - exact).norm()
        ratios.append((ours / theirs).item())
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) <= 1.1, ratios
    assert max(ratios) <= 1.5, ratios


def oracle_vae(folder):
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)


@pytest.mark.parametrize("backend", ["auto", "fa3", "cudnn", "flash", "sdpa"])
@pytest.mark.parametrize(("queries", "keys"), [(2940, 2940), (540, 512), (1, 7)])
def test_attention_backends_agree_with_float64(backend: str, queries: int, keys: int) -> None:
    device = torch.device("cuda")
    try:
        attention = choose_attention(backend, device=device, dtype=torch.bfloat16, head_dim=128)
    except ValueError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 4, 128, generator=generator).bfloat16().cuda() for n in (queries, keys, keys))
    scores = torch.einsum("blhk,bmhk->bhlm", q.double(), k.double()) / math.sqrt(128)
    expected = torch.einsum("bhlm,bmhk->blhk", scores.softmax(-1), v.double())
    error = (attention(q, k, v).double() - expected).norm() / expected.norm()
    assert error < 5e-3


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_the_loop_never_waits_for_the_device(variant: str, recorded: bool, toy, monkeypatch) -> None:
    engine = Engine.load(toy / variant, EngineConfig(device="cuda", cuda_graphs=recorded))
    request = VideoRequest(prompt="A fox", num_frames=66, height=64, width=64, steps=2, max_sequence_length=8)
    session = engine.open(request)
    session.next_chunk()
    finish, finished = ChunkWork.finish, []

    def strict(work: ChunkWork) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            finished.append(finish(work))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return finished[-1]

    monkeypatch.setattr(ChunkWork, "finish", strict)
    assert session.next_chunk().index == 1
    assert len(finished) == 1


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_recorded_and_overlapped_videos_are_the_same(variant: str, toy) -> None:
    request = VideoRequest(prompt="A fox", num_frames=99, height=64, width=64, steps=2, max_sequence_length=8)
    results = {}
    for graphs in (False, True):
        for overlap in (False, True):
            config = EngineConfig(device="cuda", cuda_graphs=graphs, overlap_decode=overlap)
            engine = Engine.load(toy / variant, config)
            results[graphs, overlap] = engine.generate(request)
            if graphs:
                assert engine.maker.graphs.why_given_up is None
            engine.close()
    plain = results[False, False]
    for video in results.values():
        assert (video.latents - plain.latents).abs().max() <= 1e-2 * plain.latents.abs().max()
        assert np.abs(video.frames.astype(int) - plain.frames).mean() < 1.0
    for graphs in (False, True):
        assert torch.equal(results[graphs, True].latents, results[graphs, False].latents)


def test_a_recording_that_fails_leaves_nothing_behind(toy, monkeypatch) -> None:
    """Waiting for the device is not allowed while recording, so the recording breaks off."""
    request = VideoRequest(prompt="A fox", num_frames=66, height=64, width=64, steps=2, max_sequence_length=8)
    expected = Engine.load(toy / "distilled", EngineConfig(device="cuda", cuda_graphs=False)).generate(request)
    engine = Engine.load(toy / "distilled", EngineConfig(device="cuda", cuda_graphs=True))
    run = engine.transformer.run

    def waits(*arguments: object) -> tuple[torch.Tensor, ...]:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return run(*arguments)

    monkeypatch.setattr(engine.transformer, "run", waits)
    stream = torch.cuda.current_stream()
    video = engine.generate(request)
    assert engine.maker.graphs.why_given_up is not None
    assert torch.equal(video.latents, expected.latents)
    assert torch.cuda.current_stream() == stream
    # The allocator is out of the recording's pool again: what another stream used is free once that stream is done.
    used, other = torch.empty(2**24, device="cuda"), torch.cuda.Stream()
    used.record_stream(other)
    held = torch.cuda.memory_allocated()
    del used
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")
    assert torch.cuda.memory_allocated() < held


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(2940, 5120, 5120), (540, 5120, 13824), (367, 13824, 5120)])
def test_tuned_products_agree_with_float64(
    rows: int, inner: int, columns: int, gelu: bool, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gemms = make_gemms(torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (
        torch.randn(count, inner, generator=generator, device="cuda").bfloat16()[None] for count in (rows, columns)
    )
    weight, bias = weight[0], torch.randn(columns, generator=generator, device="cuda").bfloat16()
    out = gemms(x, weight, bias, gelu=gelu)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    exact = torch.nn.functional.gelu(exact, approximate="tanh") if gelu else exact
    assert (out.double() - exact).norm() <= 2.5e-3 * exact.norm()
    assert torch.equal(gemms(x, weight, bias, gelu=gelu), out)
    assert len(gemms.choices) == int(not gelu or native.epilogue_is_tanh(x.device))
    gemms.close()


def test_tuned_and_recorded_videos_are_the_same(toy, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    request = VideoRequest(prompt="A fox", num_frames=66, height=64, width=64, steps=2, max_sequence_length=8)
    results = []
    for graphs in (False, True):
        engine = Engine.load(toy / "distilled", EngineConfig(device="cuda", tune_gemms=True, cuda_graphs=graphs))
        results.append(engine.generate(request).latents)
        assert engine._gemms.choices
        assert not graphs or engine.maker.graphs.why_given_up is None
        engine.close()
    assert (results[0] - results[1]).abs().max() <= 1e-2 * results[0].abs().max()


@pytest.mark.parametrize("width", [64, 80])
def test_8_bit_products_at_any_size(toy, width: int) -> None:
    """At 64 x 80 the history's rows are no multiple of four, so scales of the rows behind them start at odd addresses."""
    if reason := fp8.refusal(torch.device("cuda"), torch.bfloat16):
        pytest.skip(reason)
    request = VideoRequest(prompt="A fox", num_frames=66, height=64, width=width, steps=2, max_sequence_length=8)
    exact, rounded = (
        Engine.load(toy / "base", EngineConfig(device="cuda", fp8=on)).generate(request).latents for on in (False, True)
    )
    assert (exact - rounded).norm() <= 0.3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_borrowed_memory_is_not_kept(dtype: torch.dtype) -> None:
    before = torch.cuda.memory_allocated()
    x = torch.arange(2**20, device="cuda").to(dtype).view(4, -1)
    same = borrowed(x)
    x.fill_(3)
    assert same.dtype == dtype
    assert same.shape == x.shape
    assert bool((same == 3).all())
    del x
    assert torch.cuda.memory_allocated() <= before + 2**10


def test_frames_arrive_on_the_host_and_stay_on_the_device(toy) -> None:
    engine = Engine.load(toy / "distilled", EngineConfig(device="cuda"))
    common = {"prompt": "A fox", "num_frames": 33, "height": 64, "width": 64}
    host = engine.generate(VideoRequest(**common)).frames
    device = engine.generate(VideoRequest(**common, frames="device")).frames
    assert device.is_cuda
    assert (device.cpu().numpy() == host).all()
