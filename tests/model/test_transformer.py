"""The transformer alone against Diffusers: random configurations, with and without each history group, and at 14 B size."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from diffusers import HeliosTransformer3DModel

from helios_engine.config import ModelConfig
from helios_engine.model import rope
from helios_engine.model.block import Block, Modulation
from helios_engine.model.context import TextContext
from helios_engine.model.embed import HistoryWindow
from helios_engine.model.transformer import Transformer, init_random_
from helios_engine.ops.attention import choose_attention
from helios_engine.ops.reference import unpatchify
from helios_engine.parallel.attention import SequenceAttention
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.layout import TokenLayout
from tests.helpers import oracle

# float32 through up to three layers whose activations reach 10.
TOLERANCE = 5e-5
CPU = torch.device("cpu")


def _pair(seed: int, **changes: object) -> tuple[HeliosTransformer3DModel, Transformer]:
    config = {**oracle.random_case("mid", "t2v", seed).model, **changes}
    reference = oracle.transformer(config, 4, seed)
    ours = Transformer(ModelConfig(**config, in_channels=4, out_channels=4), torch.float32)
    slots = ours.checkpoint_slots()
    for name, tensor in reference.state_dict().items():
        slots[name].copy_(tensor)
    head_dim = config["attention_head_dim"]
    attention = choose_attention("auto", device=CPU, dtype=torch.float32, head_dim=head_dim)
    ours.connect(attention, ContextParallel.single())
    return reference, ours


def _indices(frames: tuple[int, ...], batch: int) -> torch.Tensor:
    return torch.tensor(frames).expand(batch, -1)


def _reference_output(reference, latents, timestep, text, window: HistoryWindow) -> torch.Tensor:
    batch = latents.size(0)
    groups = {"short": rope.SHORT_FRAMES, "mid": rope.MID_FRAMES, "long": rope.LONG_FRAMES}
    history = {}
    for name, frames in groups.items():
        if getattr(window, name) is not None:
            history[f"latents_history_{name}"] = getattr(window, name)
            history[f"indices_latents_history_{name}"] = _indices(frames, batch)
    return reference(
        hidden_states=latents,
        timestep=torch.full((batch,), timestep),
        encoder_hidden_states=text,
        indices_hidden_states=_indices(rope.CHUNK_FRAMES, batch),
        **history,
    ).sample


def _window(present: str, batch: int, height: int, width: int) -> HistoryWindow:
    frames = {"long": 16, "mid": 2, "short": 2}
    parts = {
        name: torch.randn(batch, 4, count, height, width) if name in present else None for name, count in frames.items()
    }
    return HistoryWindow(**parts)


@pytest.mark.parametrize("present", ["long mid short", "mid short", "long short", "short", ""])
@pytest.mark.parametrize("seed", range(4))
def test_forward_equals_diffusers(seed: int, present: str) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    reference, ours = _pair(seed)
    batch, rows, columns = draw.choice((1, 2)), draw.randint(1, 5), draw.randint(1, 5)
    latents = torch.randn(batch, 4, 9, 2 * rows, 2 * columns)
    window = _window(present, batch, 4 * rows, 4 * columns)
    texts = [torch.randn(batch, 6, 32) for _ in range(2)]
    context = ours.prepare(window, tuple(ours.encode_text(text) for text in texts))
    timestep = draw.uniform(0, 999)
    both = ours(latents, timestep, context)
    alone = ours(latents, timestep, ours.prepare(window, (ours.encode_text(texts[1]),)))[0]
    for text, rows_out in zip([*texts, texts[1]], [*both, alone], strict=True):
        expected = _reference_output(reference, latents, timestep, text, window)
        actual = unpatchify(rows_out, (9, rows, columns), (1, 2, 2))
        assert expected.std() > 0.1
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_cross_attn": False},
        {"zero_history_timestep": False},
        {"is_amplify_history": True, "history_scale_mode": "per_head"},
        {"is_amplify_history": True, "history_scale_mode": "scalar"},
        {"cross_attn_norm": False},
        {"num_layers": 1},
    ],
    ids=str,
)
def test_each_switch_equals_diffusers(changes: dict) -> None:
    torch.manual_seed(0)
    reference, ours = _pair(3, **changes)
    latents, text = torch.randn(1, 4, 9, 4, 6), torch.randn(1, 5, 32)
    window = _window("long mid short", 1, 8, 12)
    actual = ours(latents, 640.0, ours.prepare(window, (ours.encode_text(text),)))[0]
    expected = _reference_output(reference, latents, 640.0, text, window)
    torch.testing.assert_close(unpatchify(actual, (9, 2, 3), (1, 2, 2)), expected, rtol=0, atol=TOLERANCE)


def test_one_context_serves_all_stages_and_steps() -> None:
    """Cached first-block history, tables and time rows do not leak from one call into another."""
    torch.manual_seed(1)
    _, ours = _pair(2, num_layers=2, zero_history_timestep=True)
    window, text = _window("long mid short", 1, 8, 8), torch.randn(1, 5, 32)
    context = ours.prepare(window, (ours.encode_text(text),))
    calls = [(torch.randn(1, 4, 9, size, size), t) for size in (2, 4, 8) for t in (900.0, 100.0)]
    first = [ours(latents, t, context)[0] for latents, t in calls]
    again = [ours(latents, t, context)[0] for latents, t in reversed(calls)][::-1]
    fresh = []
    for latents, t in calls:
        ours.forget()
        ours._tables.clear()
        fresh.append(ours(latents, t, ours.prepare(window, (ours.encode_text(text),)))[0])
    for a, b, c in zip(first, again, fresh, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_stacked_texts_equal_single_ones() -> None:
    _, ours = _pair(1)
    texts = [ours.encode_text(torch.randn(1, 5, 32)) for _ in range(3)]
    stacked = TextContext.stack(texts)
    for layer, tensor in enumerate(stacked.keys_values):
        assert torch.equal(tensor, torch.cat([text.keys_values[layer] for text in texts]))


def test_names_and_shapes_of_the_real_model() -> None:
    with torch.device("meta"):
        reference = HeliosTransformer3DModel()
        ours = Transformer(ModelConfig(), torch.bfloat16)
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    slots = ours.checkpoint_slots()
    assert {name: tuple(slot.shape) for name, slot in slots.items()} == expected
    num_parameters = sum(parameter.numel() for parameter in ours.parameters())
    assert num_parameters == sum(parameter.numel() for parameter in reference.parameters())
    assert num_parameters == pytest.approx(14.312e9, rel=1e-3)
    kept = HeliosTransformer3DModel._keep_in_fp32_modules
    for name, slot in slots.items():
        keep = any(part in name for part in kept)
        assert slot.dtype == (torch.float32 if keep else torch.bfloat16), name


def test_random_parameters_are_all_set() -> None:
    from helios_engine.model.transformer import init_random_

    config = ModelConfig(num_attention_heads=2, attention_head_dim=12, rope_dim=(4, 4, 4), num_layers=1, ffn_dim=8)
    model = Transformer(config, torch.float32)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    init_random_(model, 0)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_block_compiles_as_one_graph() -> None:
    """torch.compile with fullgraph: no graph break in the operators or around attention."""
    config = ModelConfig(num_attention_heads=4, attention_head_dim=16, rope_dim=(8, 4, 4), num_layers=1, ffn_dim=64)
    block = Block(config, torch.float32).eval().requires_grad_(False)
    init_random_(block, 0)
    attention = choose_attention("auto", device=torch.device("cpu"), dtype=torch.float32, head_dim=16)
    sequence = SequenceAttention(ContextParallel.single(), attention)
    layout = TokenLayout.make(6, 9, 4, num_ranks=1)
    generator = torch.Generator().manual_seed(0)
    rows = Modulation(*torch.randn(8, 2, 64, generator=generator).unbind(0))
    angles = torch.randn(15, 8, generator=generator)
    rotation = torch.stack([angles.cos(), angles.sin()], dim=-1)
    text = torch.randn(1, 5, 128, generator=generator)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone()
        h = block.normed(x, rows, num_history=6)
        qkv = block.project(h, rotation, num_history=6).unflatten(-1, (3, 4, 16))
        attend = functools.partial(sequence, qkv, layout, noisy_only=False)
        h = block.attend_self_(x, rows, num_history=6, noisy_only=False, attend=attend)
        block.attend_text_(x[:, 6:], h[:, 6:], text, rows, num_history=0, attention=attention)
        return x, block.feed_forward_(x, h, rows, rows, num_history=6)

    x = torch.randn(1, 15, 64, generator=generator)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(x), run(x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
