"""The parts of gpu_check.sh: one function each, which returns figures.

    python -m benchmarks.gpu_check PART FILE.json [--tiny]

Weights are random, of the real shapes, made on the device: speed does not depend on their values as long as nothing
overflows. --tiny takes small models and sizes, and stand-ins for what only a GPU has, so that every line can be tried
anywhere. gpu_groups.py runs parts in groups.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import gpu_multi
from benchmarks.gpu_diffusers import chunk_figures, make_pipe, offloaded, time_diffusers
from benchmarks.gpu_groups import write
from benchmarks.gpu_modes import offload_figures, quality_figures, stream_arrivals
from benchmarks.gpu_ranks import sharded_against_one, share_times
from benchmarks.gpu_roofline import decoder_floor_seconds, graph_figures, roofline_seconds, tuned_figures
from helios_engine import Engine, EngineConfig, VideoRequest
from helios_engine.config import LATENT_FRAMES_PER_CHUNK, ModelConfig, Recipe, SchedulerConfig, VaeConfig
from helios_engine.engine.autotune import make_gemms
from helios_engine.engine.checkpoint import Checkpoint, make_transformer
from helios_engine.engine.frames import frames_per_call_for
from helios_engine.engine.history import History, stacked_window
from helios_engine.engine.recorders import CudaRecorder, Recorder
from helios_engine.engine.session import VideoSession
from helios_engine.model.transformer import init_random_
from helios_engine.model.vae import VideoAutoencoder
from helios_engine.ops import native
from helios_engine.ops.attention import choose_attention
from helios_engine.ops.gemm import TunedGemms
from helios_engine.parallel.context import ContextParallel
from helios_engine.request import FRAMES_PER_CHUNK
from helios_engine.tools.bench import hardware, time_seconds
from helios_engine.tools.toy import init_vae_

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
STEPS = {"2,2,2": (2, 2, 2), "1,1,1": (1, 1, 1)}


@dataclass(frozen=True)
class Scale:
    """The 14 B model at 384x640, or a miniature."""

    model: ModelConfig
    vae: VaeConfig
    height: int
    width: int
    gemm: int
    copy_bytes: int
    repeats: int
    chunks: int  # of a video whose time is taken
    is_tiny: bool = False


FULL = Scale(ModelConfig(), VaeConfig(), 384, 640, 8192, 2**31, 10, 5)
TINY = Scale(
    ModelConfig(
        num_attention_heads=4, attention_head_dim=32, rope_dim=(12, 10, 10), num_layers=2, ffn_dim=256, text_dim=64
    ),
    VaeConfig(base_dim=8),
    height=64,
    width=64,
    gemm=256,
    copy_bytes=2**22,
    repeats=2,
    chunks=3,
    is_tiny=True,
)


def make_engine(
    scale: Scale,
    *,
    vae_dtype: str = "float32",
    dtype: torch.dtype = DTYPE,
    device: torch.device = DEVICE,
    context: ContextParallel | None = None,
    **settings: object,
) -> Engine:
    """A Distilled engine with random weights on the device and no text encoder."""
    scheduler = SchedulerConfig("dmd", use_dynamic_shifting=True, time_shift_type="linear")
    index = {"_class_name": "HeliosPyramidPipeline", "is_distilled": True}
    recipe = Recipe.for_checkpoint(index, scheduler, "random")
    checkpoint = Checkpoint("random weights", Path(), scale.model, scale.vae, scheduler, recipe, has_text_encoder=False)
    transformer = make_transformer(scale.model, device, dtype)
    init_random_(transformer, 0)
    vae = VideoAutoencoder(scale.vae)
    init_vae_(vae, 0)
    vae = vae.to(device, getattr(torch, vae_dtype)).requires_grad_(False).channels_last_()
    vae.statistics = vae.statistics.float()
    config = EngineConfig(device=str(device), dtype=str(dtype).removeprefix("torch."), vae_dtype=vae_dtype, **settings)
    return Engine(checkpoint, transformer=transformer, vae=vae, text_encoder=None, config=config, context=context)


def make_request(scale: Scale, steps: str = "2,2,2", chunks: int = 4) -> VideoRequest:
    embeds = torch.randn(1, 512, scale.model.text_dim, generator=torch.Generator().manual_seed(0))
    frames = FRAMES_PER_CHUNK * chunks
    return VideoRequest(
        prompt_embeds=embeds, num_frames=frames, height=scale.height, width=scale.width, steps=STEPS[steps]
    )


def part_env(scale: Scale) -> dict[str, object]:
    """Versions, and what this device can do at best: a large copy and large matrix products, sustained."""
    a = torch.randn(scale.copy_bytes // 4, device=DEVICE)
    b = torch.empty_like(a)
    copy = time_seconds(lambda: b.copy_(a), DEVICE, 5 * scale.repeats)
    rates = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        x, w = (torch.randn(scale.gemm, scale.gemm, device=DEVICE, dtype=dtype) for _ in range(2))
        seconds = time_seconds(lambda x=x, w=w: x @ w, DEVICE, 10 * scale.repeats)
        rates[f"gemm_{name}_tflops"] = 2 * scale.gemm**3 / seconds / 1e12
    return {
        "copy_tb_per_s": 2 * a.nbytes / copy / 1e12,
        **rates,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "os": platform.platform(),
    }


def part_tests(scale: Scale) -> dict[str, object]:
    """The test suite on this machine, tests marked gpu included."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not full", "-rs", "--maxfail=20"]
    command += ["tests/ops/test_reference.py", "tests/engine/test_gpu.py"] if scale.is_tiny else ["tests"]
    if DEVICE.type == "cuda" and importlib.util.find_spec("xdist") is not None:
        command += ["-n", "8"]
    code, outcome = streamed(command)
    if code:
        raise SystemExit(code)
    return {"outcome": outcome}


def _context(engine: Engine, session: VideoSession):
    history = History.empty(engine.checkpoint.model.in_channels, *session.plan.latent_size, engine.device)
    newest = torch.randn(1, engine.checkpoint.model.in_channels, 19, *session.plan.latent_size, device=DEVICE)
    history = history.after(newest)
    return engine.transformer.prepare(stacked_window([history]), session.texts)


def part_ops(scale: Scale) -> dict[str, object]:
    """The compiled operators on this device: their tests, and GB/s of each against a copy."""
    environment = {**os.environ, "HELIOS_OPS": "native"}
    few = ["-k", "test_norms_write or test_channel"] if scale.is_tiny else []
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "tests/ops", *few]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ops.json"
        sizes = ["--rows", "64", "--frames", "1", "--repeats", "1"] if scale.is_tiny else []
        # Figures first: they are what is wanted most.
        bench = [sys.executable, "-m", "benchmarks.bench_ops", *sizes, "--json", str(path)]
        subprocess.run(bench, check=True, env=environment)
        figures = json.loads(path.read_text())
    rates = {name: values["of_copy"] for name, values in figures["operators"].items()}
    code, outcome = streamed(tests, environment)
    failed = {"failed": f"tests: exit code {code}"} if code else {}
    return {"outcome": outcome, "copy": figures["copy_bytes_per_second"], **rates, **failed}


def streamed(command: list[str], environment: dict[str, str] | None = None) -> tuple[int, str]:
    """(exit code, last line) of a command whose lines are printed as they come: what is done when the time is up is seen."""
    last = ""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as running:
        for line in running.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return running.returncode, last


_SANITIZED = (
    "test_channel_norm or test_upsample or test_residual_gate_norm or test_heads_are or test_rows_of or test_qk"
)


def part_sanitize(scale: Scale) -> dict[str, object]:
    """A few of the operators' tests under compute-sanitizer: memory, races and synchronisation."""
    tool = shutil.which("compute-sanitizer")
    result: dict[str, object] = {}
    if tool is None and not scale.is_tiny:
        return {"left out": "no compute-sanitizer on PATH"}
    # Behind torch's caching allocator a read past a tensor's end is still inside the allocator's block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck", "synccheck"):
        command = ["env", f"CHECK={check}"] if tool is None else [tool, "--tool", check, "--error-exitcode", "9"]
        command += [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        # Small cases only: the tools slow a kernel down a hundredfold.
        command += ["-k", f"({_SANITIZED}) and {'cuda' if DEVICE.type == 'cuda' else 'cpu'} and bfloat16 and not 13824"]
        tests = ["tests/ops/test_native.py", "tests/ops/test_quantize.py"]
        run = subprocess.run([*command, *tests], capture_output=True, text=True, env=environment)
        print(check, run.stdout[-1500:], run.stderr[-500:])
        if run.returncode:
            raise SystemExit(f"{check}: exit code {run.returncode}")
        result[check] = run.stdout.strip().splitlines()[-1]
    return result


def _recorder() -> Recorder:
    """CUDA graphs, or a stand-in that does recorded work once more."""
    if DEVICE.type == "cuda":
        return CudaRecorder(DEVICE)
    from tests.helpers.recorders import Rerun

    return Rerun()


def _gemms() -> TunedGemms | None:
    return make_gemms(DEVICE) if DEVICE.type == "cuda" else None


def part_dit(scale: Scale) -> dict[str, object]:
    """Milliseconds per forward at the three stages, plain, recorded and with tuned products, over what its parts take alone."""
    engine = make_engine(scale)
    session = engine.open(make_request(scale))
    context = _context(engine, session)
    attention, history, gemms = engine.transformer.attention, session.plan.history_tokens, _gemms()
    result: dict[str, object] = {}
    for size, tokens in zip(session.plan.stage_sizes, session.plan.tokens_per_stage, strict=True):
        latents = torch.randn(1, scale.model.in_channels, LATENT_FRAMES_PER_CHUNK, *size, device=DEVICE).to(DTYPE)

        def timed(work: Callable[[], object]) -> float:
            return time_seconds(work, DEVICE, scale.repeats)

        plain = timed(lambda x=latents: engine.transformer(x, 500.0, context))
        recorded = graph_figures(engine.transformer, latents, context, timed, _recorder())
        tuned = tuned_figures(engine.transformer, latents, context, timed, gemms)
        least = roofline_seconds(scale.model, tokens, history, attention, DEVICE, DTYPE, timed)
        stage = {"forward_ms": 1e3 * plain, **{f"least_{name}_ms": 1e3 * value for name, value in least.items()}}
        stage |= {"of_roofline": least["sum"] / plain, **recorded, **tuned}
        if "recorded_step_ms" in recorded:
            stage["recorded_of_roofline"] = 1e3 * least["sum"] / recorded["recorded_step_ms"]
        if "tuned_forward_ms" in tuned:
            stage["tuned_of_roofline"] = 1e3 * least["sum"] / tuned["tuned_forward_ms"]
        result[f"{tokens}+{history}"] = stage
    return {**result, "attention": attention.backend, **_peak()}


def part_ranks(scale: Scale) -> dict[str, object]:
    """Processes sharing this device against one of them, and what one rank's share of a forward takes by itself."""
    size = (scale.height // 8, scale.width // 8)
    result: dict[str, object] = dict(sharded_against_one(scale.model, size, DEVICE))
    engine = make_engine(scale)
    session = engine.open(make_request(scale))
    shares = share_times(
        engine.transformer,
        session.plan.stage_sizes,
        lambda: _context(engine, session),
        lambda work: time_seconds(work, DEVICE, scale.repeats),
    )
    return {**result, **shares, "attention": engine.transformer.attention.backend, **_peak()}


def part_attention(scale: Scale) -> dict[str, object]:
    """Every backend that runs here at the three self-attention shapes and the cross-attention, in TFLOP/s."""
    heads, head_dim = scale.model.num_attention_heads, scale.model.attention_head_dim
    full = 9 * (scale.height // 16) * (scale.width // 16)
    shapes = {"self_full": (full + 2400, full + 2400), "self_half": (full // 4 + 2400,) * 2}
    shapes |= {"self_quarter": (full // 16 + 2400,) * 2, "cross_full": (full, 512)}
    result: dict[str, object] = {}
    for name in ("fa3", "fa4", "fa2", "cudnn", "flash", "sdpa"):
        try:
            attention = choose_attention(name, device=DEVICE, dtype=DTYPE, head_dim=head_dim)
        except ValueError as error:
            result[name] = str(error)
            continue
        rates = {}
        for shape, (queries, keys) in shapes.items():
            q = torch.randn(1, queries, heads, head_dim, device=DEVICE, dtype=DTYPE)
            k, v = (torch.randn(1, keys, heads, head_dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
            seconds = time_seconds(lambda q=q, k=k, v=v, run=attention: run(q, k, v), DEVICE, scale.repeats)
            rates[shape] = 4 * queries * keys * heads * head_dim / seconds / 1e12
        result[name] = rates
    return result


def part_vae(scale: Scale) -> dict[str, object]:
    """Decode of one chunk in three dtypes and two splits, TF32 as torch's defaults have it; with algorithms cuDNN has timed
    (tuned), and over its floor."""
    size = (scale.height // 8, scale.width // 8)
    latents = torch.randn(1, scale.vae.z_dim, LATENT_FRAMES_PER_CHUNK, *size, device=DEVICE)
    if scale.is_tiny:
        latents = latents[:, :, :3, :4, :4]  # float16 takes seconds on a CPU
    result = {}
    for dtype in ("float32", "bfloat16", "float16"):
        vae = VideoAutoencoder(scale.vae)
        init_vae_(vae, 0)
        if dtype == "float16":  # residuals add up over the blocks; half the weights keep them far from 65504
            for name, parameter in vae.named_parameters():
                if name.endswith(("conv2.weight", "resample.1.weight")):
                    parameter.data.mul_(0.5)
        vae = vae.to(DEVICE, getattr(torch, dtype)).requires_grad_(False).channels_last_()
        vae.statistics = vae.statistics.float()
        splits = sorted({1, frames_per_call_for(DEVICE, vae, size)})

        def decode(s: int = splits[-1], v: VideoAutoencoder = vae) -> torch.Tensor:
            return v.decode(latents, frames_per_call=s)

        try:
            decode()
        except OverflowError as error:  # float16, should random weights go past its range after all
            result[dtype] = str(error)
            continue
        for split in splits:
            seconds = time_seconds(lambda s=split, run=decode: run(s), DEVICE, scale.repeats)
            result[f"decode_ms_{dtype}_{split}_per_call"] = 1e3 * seconds
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            result[f"decode_ms_{dtype}_tuned"] = 1e3 * time_seconds(decode, DEVICE, scale.repeats)
        floor = decoder_floor_seconds(decode, DEVICE, lambda work: time_seconds(work, DEVICE, scale.repeats))
        result[f"floor_ms_{dtype}"] = {part: 1e3 * own for part, own in floor.items()}
        result[f"decode_over_floor_{dtype}"] = seconds / floor["sum"]
        del vae
    return {**result, **_peak()}


def part_engine(scale: Scale) -> dict[str, object]:
    """Whole chunks, 2,2,2 and 1,1,1, end to end but for text encoding and file writing; in line, then with what overlaps."""
    usual = make_engine(scale)
    modules = {"transformer": usual.transformer, "vae": usual.vae, "text_encoder": None}
    result: dict[str, object] = {"attention": usual.transformer.attention.backend}
    expected: dict[str, torch.Tensor] = {}
    for mode in ((), ("overlap_decode",), ("cuda_graphs",), ("cuda_graphs", "overlap_decode")):
        chosen = {name: name in mode for name in ("overlap_decode", "cuda_graphs")}
        config = dataclasses.replace(usual.config, **chosen)
        engine = Engine(usual.checkpoint, config=config, **modules)
        next(iter(engine.stream(make_request(scale, chunks=1))))
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        own: dict[str, object] = {}
        for steps in STEPS:
            arrivals, chunks = stream_arrivals(engine, make_request(scale, steps, chunks=scale.chunks))
            latents = torch.cat([chunk.latents for chunk in chunks])
            assert torch.isfinite(latents).all()
            same = torch.equal(latents, expected.setdefault(steps, latents))
            own[steps] = {
                **chunk_figures(arrivals),
                "denoise_s": chunks[-1].timing.denoise_seconds,
                "decode_s": chunks[-1].timing.decode_seconds,
                **({"equal_to_in_line": same} if mode else {}),
            }
        given_up = engine.maker.graphs.why_given_up if engine.maker.graphs is not None else None
        result["+".join(mode) or "in_line"] = {**own, **_peak(), **({"gave_up": given_up} if given_up else {})}
        engine.close()
    return result


def part_offload(scale: Scale) -> dict[str, object]:
    """Weights resident, streamed and taking turns: seconds, peak memory against what was predicted, host memory."""
    return offload_figures(lambda: make_engine(scale), make_request(scale, "1,1,1", chunks=2), DEVICE)


def part_quality(scale: Scale) -> dict[str, object]:
    """Every approximation against exact: PSNR of latents and frames, and how much faster denoising is."""
    request = make_request(scale, "2,2,2", chunks=2)
    return quality_figures(lambda **settings: make_engine(scale, **settings), request)


def _needs_diffusers(part: Callable[[Scale], dict[str, object]]) -> Callable[[Scale], dict[str, object]]:
    """A part that is left out, and says so, where the reference is not installed."""

    @functools.wraps(part)
    def run(scale: Scale) -> dict[str, object]:
        try:
            import diffusers  # noqa: F401
        except ImportError as error:
            return {"left out": f"{error}; carry its wheel (WHEELS=folder)"}
        return part(scale)

    return run


@_needs_diffusers
def part_diffusers(scale: Scale) -> dict[str, object]:
    """The reference, eager, on the same shapes."""
    requests = {steps: make_request(scale, steps, chunks=3) for steps in STEPS}
    return {**time_diffusers(make_pipe(scale.model, scale.vae, DEVICE), requests), **_peak()}


@_needs_diffusers
def part_compiled(scale: Scale) -> dict[str, object]:
    """The reference with its blocks under torch.compile."""
    pipe = make_pipe(scale.model, scale.vae, DEVICE)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return {**time_diffusers(pipe, {steps: make_request(scale, steps, chunks=3) for steps in STEPS}), **_peak()}


@_needs_diffusers
def part_diffusers_offload(scale: Scale) -> dict[str, object]:
    """The reference with its group offload, for the part offload to be held against."""
    result: dict[str, object] = {}
    for level in ("block", "leaf"):
        pipe = offloaded(make_pipe(scale.model, scale.vae, DEVICE), level, DEVICE)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        figures = time_diffusers(pipe, {"1,1,1": make_request(scale, "1,1,1", chunks=2)})
        result[level] = {**figures["1,1,1"], **_peak()}
        del pipe
        gc.collect()
    return result


def _peak() -> dict[str, object]:
    if DEVICE.type != "cuda":
        return {}
    return {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}


PARTS: dict[str, Callable[[Scale], dict[str, object]]] = {
    name.removeprefix("part_"): function for name, function in list(globals().items()) if name.startswith("part_")
}
PARTS |= gpu_multi.PARTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    scale = TINY if options.tiny else FULL
    if DEVICE.type != "cuda" and not options.tiny:
        raise SystemExit("gpu_check: this torch sees no GPU; --tiny tries the script without one")
    native.check(DEVICE)
    with torch.no_grad():
        figures = PARTS[options.part](scale)
    size = f"{scale.height}x{scale.width}"
    result = {"part": options.part, **hardware(DEVICE), "size": size, "tiny": options.tiny, **figures}
    write(options.file, json.dumps(result, indent=2) + "\n")
    if figures.get("failed"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
