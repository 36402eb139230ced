"""Approximations: off they change nothing, on they do what their name says, and each is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu_modes
from helios_engine import Engine, EngineConfig, VideoRequest
from helios_engine.cli import main
from helios_engine.model.block import Block
from helios_engine.model.reuse import Approximations, Middle, Reuse
from helios_engine.ops import fp8
from helios_engine.ops import native as ops
from helios_engine.settings import describe_approximations

REQUEST = VideoRequest(prompt="A red fox", num_frames=66, height=64, width=64, steps=4, seed=3)


def _load(toy: Path, variant: str = "base", **settings: object) -> Engine:
    return Engine.load(toy / variant, EngineConfig(device="cpu", dtype="float32", **settings))


def psnr(actual: Tensor, exact: Tensor) -> float:
    """Decibels, the peak being the exact values' range."""
    return gpu_modes.psnr(actual, exact, (exact.max() - exact.min()).item())


def _rows_per_block(monkeypatch) -> list[int]:
    rows: list[int] = []
    plain = Block.feed_forward_

    def counting(self, x_BLD, *args, **named):
        rows.append(x_BLD.size(1))
        return plain(self, x_BLD, *args, **named)

    monkeypatch.setattr(Block, "feed_forward_", counting)
    return rows


@pytest.mark.parametrize("variant", ["base", "distilled"])
def test_history_goes_through_in_every_second_step(toy, engines, monkeypatch, variant: str) -> None:
    request = (
        REQUEST if variant == "base" else VideoRequest(**{**REQUEST.settings(), "prompt": "A fox", "steps": (2, 2, 2)})
    )
    exact = engines(variant).generate(request).latents
    engine = _load(toy, variant, history_refresh=2)
    rows = _rows_per_block(monkeypatch)
    approximate = engine.generate(request).latents
    assert 20 < psnr(approximate, exact) < 100, "near, and not the same"
    layers = engine.checkpoint.model.num_layers
    if variant == "distilled":
        second = rows[-6 * layers :]  # the last chunk: three stages of two steps
        for stage in range(3):
            full, noisy = (second[(2 * stage + step) * layers :][:layers] for step in (0, 1))
            assert set(noisy) == {full[-1]}, "noisy rows alone, as in a full step's last block"
            assert min(full[:-1]) > full[-1]
    assert torch.equal(engine.generate(request).latents, approximate), "nothing is left from one video to the next"


def test_a_refresh_in_every_step_is_exact(toy, engines) -> None:
    reference = engines("base").generate(REQUEST).latents
    transformer = engines("base").transformer
    plain = transformer.run
    calls = []

    def with_memory(latents, time, context, reuse=None):
        calls.append(1)
        kept = Reuse(Approximations(history_refresh=2), len(context.texts), len(transformer.blocks))
        return plain(latents, time, context, kept)  # its first step is a full one

    transformer.run = with_memory
    try:
        assert (engines("base").generate(REQUEST).latents - reference).abs().max() < 1e-5
    finally:
        del transformer.run
    assert calls


def test_unchanged_history_rows_make_reuse_exact(toy, engines) -> None:
    """With the same latents and timestep twice the kept keys and values are the ones that would be computed."""
    engine = engines("base")
    with engine.open(REQUEST) as session:
        session.next_chunk()
        job = engine.maker._begin([session], [session.point]).job
        latents = torch.randn(1, 16, 9, 8, 8)
        for settings in (Approximations(history_refresh=2), Approximations(block_cache=0.5)):
            reuse = Reuse(settings, len(job.context.texts), len(engine.transformer.blocks))
            first = engine.transformer(latents, 500.0, job.context, reuse)
            again = engine.transformer(latents, 500.0, job.context, reuse)
            for one, other in zip(first, again, strict=True):
                assert (one - other).abs().max() < 1e-5
            assert reuse.step == 2
        assert reuse.num_skipped == 2 * (reuse.middles[0].end - reuse.middles[0].begin), (
            "both prompts skipped their middle"
        )


@pytest.mark.parametrize("threshold", [0.02, 0.9])
def test_the_block_cache_skips_what_changes_little(toy, engines, monkeypatch, threshold: float) -> None:
    exact = engines("base").generate(REQUEST).latents
    engine = _load(toy, block_cache=threshold)
    plain_rows = len(_count(monkeypatch, engines("base")))
    rows = len(_count(monkeypatch, engine))
    assert rows <= plain_rows
    video = engine.generate(REQUEST).latents
    if threshold > 0.5:
        assert rows < plain_rows
        assert 15 < psnr(video, exact) < 100
    assert torch.equal(engine.generate(REQUEST).latents, video), "nothing is left from one video to the next"


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.9])
def test_both_reuses_together(toy, engines, threshold: float) -> None:
    """A refreshing step may leave its middle out; what those blocks had kept before then serves on."""
    request = VideoRequest(prompt="A red fox", num_frames=33, height=64, width=64, steps=9, seed=3)
    exact = engines("base").generate(request).latents
    engine = _load(toy, history_refresh=2, block_cache=threshold)
    assert 15 < psnr(engine.generate(request).latents, exact) < 100


def _count(monkeypatch, engine: Engine) -> list[int]:
    with monkeypatch.context() as patch:
        rows = _rows_per_block(patch)
        engine.generate(REQUEST)
    return rows


def test_the_middle_follows_its_threshold() -> None:
    def ask(middle: Middle, start: Tensor, after_first: Tensor) -> tuple[bool, Tensor]:
        middle.enter(start, 0)
        x = after_first.clone()
        if middle.skips(x, 0, lambda word: word):
            return True, x
        x += 5.0  # what the middle blocks would do
        middle.leave(x)
        return False, x

    middle, start = Middle(0.1, 16), torch.zeros(1, 4, 8)
    assert (middle.begin, middle.end) == (2, 14)
    assert not ask(middle, start, start + 1.0)[0], "the first time everything is computed"
    skipped, x = ask(middle, start, start + 1.05)
    assert skipped
    assert torch.allclose(x, torch.tensor(6.05))
    assert not ask(middle, start, start + 1.3)[0], "too different"
    assert ask(middle, start, start + 1.31)[0], "compared with the last full one"
    assert not Middle(0.0, 16).is_on
    assert not Middle(0.5, 2).is_on, "no middle to leave out"


def test_fp8_products_are_as_near_as_three_bits_can_be() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    x = torch.randn(2, 7, 64) * torch.logspace(-3, 3, 7)[:, None]  # a scale per row takes any size
    layer = fp8.Fp8Linear(linear)
    exact = linear(x)
    error = (layer(x) - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 0.06
    assert error.min() > 1e-4
    room = torch.zeros(2, 9, 48)
    assert torch.equal(layer(x, room[:, 2:]), layer(x))
    assert torch.equal(room[:, 2:], layer(x))
    assert (ops.quantize_rows(torch.tensor([[[3.0, -1.5]]])).values.float() == torch.tensor([448.0, -224.0])).all()


def test_fp8_products_of_some_rows_are_those_of_all() -> None:
    layer = fp8.Fp8Linear(torch.nn.Linear(32, 48, dtype=torch.bfloat16))
    x = torch.randn(1, 9, 32).bfloat16()
    whole, rows = layer(x), ops.quantize_rows(x)
    for part in (slice(0, 4), slice(3, 9), slice(5, 5)):  # scales of row 3 on start at twelve bytes
        assert torch.equal(layer(rows[:, part]), whole[:, part])
        room = torch.zeros_like(whole)
        layer(rows[:, part], room[:, part])
        assert torch.equal(room[:, part], whole[:, part])


def test_fp8_in_the_engine(toy, engines) -> None:
    exact = engines("distilled").generate(VideoRequest(prompt="x", num_frames=33, height=64, width=64, seed=1)).latents
    engine = _load(toy, "distilled", fp8=True)
    assert engine.transformer.blocks[0].qkv.weight_FD.dtype == torch.float8_e4m3fn
    video = engine.generate(VideoRequest(prompt="x", num_frames=33, height=64, width=64, seed=1))
    assert 20 < psnr(video.latents, exact) < 60
    assert video.metadata["approximations"] == "fp8 products"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "none"),
        ({"quality": "high"}, "history refresh every 2 steps"),
        ({"quality": "fast"}, "history refresh every 2 steps, block cache 0.1, fp8 products"),
        ({"quality": "fast", "fp8": False, "history_refresh": 1}, "block cache 0.1"),
        ({"block_cache": 0.25}, "block cache 0.25"),
    ],
)
def test_what_is_on_is_said(settings: dict, said: str) -> None:
    assert describe_approximations(EngineConfig(**settings)) == said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"history_refresh": 0}, "history_refresh must be a whole number from 1"),
        ({"history_refresh": True}, "history_refresh must be"),
        ({"block_cache": 1.0}, "block_cache must be from 0"),
        ({"fp8": "yes"}, "fp8 must be true or false"),
        ({"quality": "best"}, "quality must be one of exact, high, fast"),
        ({"fp8": True, "offload": "group"}, "fp8 weights are made when a checkpoint is loaded"),
        ({"quality": "fast", "compile": True}, "use one of the two"),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)


def test_shared_history_cannot_be_kept(ranks, toy) -> None:
    found = ranks.run("refuse_loading", (2, 1, 1), folder=str(toy / "base"), settings={"history_refresh": 2})
    assert all("history_refresh 2 keeps keys and values of the whole history on each rank" in text for text in found)


@pytest.mark.parametrize("degrees", [(2, 1, 1), (1, 1, 2)], ids=str)
def test_the_block_cache_decides_alike_on_all_ranks(ranks, toy, engines, degrees) -> None:
    arguments = {"prompt": "A red fox", "num_frames": 33, "height": 64, "width": 64, "steps": 4, "seed": 3}
    settings = {"block_cache": 0.9}
    found = ranks.run("generate", degrees, folder=str(toy / "base"), arguments=arguments, settings=settings)
    assert torch.equal(found[0][0], found[1][0])
    exact = engines("base").generate(VideoRequest(**arguments)).latents
    assert 15 < psnr(found[0][0], exact) < 100


def test_the_command_line_knows_them(toy, tmp_path, capsys) -> None:
    flags = [
        "generate",
        "--model",
        str(toy / "base"),
        "--prompt",
        "x",
        "--output",
        str(tmp_path / "a.npy"),
        "--dry-run",
    ]
    assert main([*flags, "--quality", "fast", "--height", "64", "--width", "64", "--device", "cpu"]) == 0
    assert "history refresh every 2 steps, block cache 0.1, fp8 products" in capsys.readouterr().out
