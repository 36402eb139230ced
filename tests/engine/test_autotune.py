"""The attention backend settled by timing, the fused GELU, compiled blocks: what of them a CPU can show."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from helios_engine import ContextParallel, Engine, EngineConfig, VideoRequest
from helios_engine.config import ModelConfig
from helios_engine.engine import autotune
from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.ops import attention, native

CPU = torch.device("cpu")
MODEL = ModelConfig(num_attention_heads=2, attention_head_dim=16, rope_dim=(4, 6, 6))
REQUEST = VideoRequest(prompt="A fox", num_frames=66, height=64, width=64, steps=1, max_sequence_length=8)


class _Backends:
    """Two stand-ins that can run: one sleeps."""

    def __init__(self, monkeypatch, slow: str) -> None:
        self.calls: list[str] = []

        def make(name: str, device: torch.device) -> attention.Attention:
            def attend(q, k, v):
                self.calls.append(name)
                time.sleep(0.002 if name == slow else 0)
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

            return attention.Attention(name, attend, attention._cpu_with_lse)

        monkeypatch.setattr(attention, "_make", make)
        monkeypatch.setattr(attention, "_refusal", lambda *_: None)
        monkeypatch.setattr(autotune, "attention_candidates", lambda **_: ["cudnn", "fa3"])
        monkeypatch.setattr(autotune, "_SELF_TOKENS", (4, 6))
        monkeypatch.setattr(autotune, "_CROSS", (4, 8))


@pytest.fixture
def home(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "helios_engine" / "attention.json"


def _settle(wanted: str = "auto") -> str:
    context = ContextParallel.single()
    return autotune.settle_attention(wanted, MODEL, context, device=CPU, dtype=torch.float32).backend


@pytest.mark.parametrize(("slow", "fast"), [("cudnn", "fa3"), ("fa3", "cudnn")])
def test_the_faster_one_is_taken_and_remembered(monkeypatch, home: Path, caplog, slow: str, fast: str) -> None:
    caplog.set_level(logging.INFO)
    backends = _Backends(monkeypatch, slow)
    assert _settle() == fast
    assert f"attention {fast}: cudnn " in caplog.text
    (entry,) = json.loads(home.read_text()).values()
    assert entry["backend"] == fast
    assert entry["seconds"][fast] < entry["seconds"][slow]
    timed = len(backends.calls)
    assert _settle() == fast
    assert len(backends.calls) == timed, "remembered, not timed again"
    assert _settle(slow) == slow, "what is asked for by name is not timed"
    assert [path.name for path in home.parent.iterdir()] == [home.name]


@pytest.mark.parametrize("content", ["not json", "[]", '{"other": 1}'])
def test_a_spoilt_memory_is_made_anew(monkeypatch, home: Path, content: str) -> None:
    home.parent.mkdir()
    home.write_text(content)
    _Backends(monkeypatch, "cudnn")
    assert _settle() == "fa3"
    assert "fa3" in home.read_text()


def test_a_home_that_cannot_be_written_is_no_reason_to_stop(monkeypatch, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    _Backends(monkeypatch, "cudnn")
    assert _settle() == "fa3"
    assert "cannot be kept" in caplog.text


def test_shapes_are_one_ranks_own() -> None:
    model = ModelConfig()
    assert autotune.real_shapes(model, ContextParallel.single())[0] == (2940, 2940, 40)
    from helios_engine.parallel.mesh import Degrees

    shared = ContextParallel(0, Degrees(ulysses=3, ring=2))
    assert autotune.real_shapes(model, shared) == [
        *((1470, 1470, 14), (2280, 2280, 14), (5520, 5520, 14)),
        (1440, 512, 40),
    ]


def test_a_state_says_which_attention_made_it(engines, tmp_path: Path, caplog) -> None:
    engine = engines("base")
    with engine.open(REQUEST) as session:
        session.next_chunk()
        state = session.state()
    assert state.attention == "sdpa"
    state.save(tmp_path / "state.safetensors")
    kept = type(state).load(tmp_path / "state.safetensors")
    assert kept.attention == "sdpa"
    engine.restore(kept).close()
    assert caplog.text == ""
    object.__setattr__(kept, "attention", "fa3")
    engine.restore(kept).close()
    assert "made with attention fa3 and goes on with sdpa" in caplog.text


def test_the_epilogue_is_asked_which_gelu_it_is() -> None:
    assert not native.epilogue_is_tanh(CPU), "torch's CPU epilogue is the erf form"
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    assert torch.equal(native.linear_gelu(x, weight, bias), expected)


def test_the_question_is_no_graph_break() -> None:
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)

    def work(x: torch.Tensor) -> torch.Tensor:
        return native.linear_gelu(x, weight, bias) * (1 if native.epilogue_is_tanh(CPU) else 2)

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), work(x))


def test_a_backend_that_fails_at_the_real_size_is_left_out(monkeypatch, home: Path, caplog) -> None:
    backends = _Backends(monkeypatch, "cudnn")
    make = attention._make

    def failing(name: str, device: torch.device) -> attention.Attention:
        chosen = make(name, device)
        if name == "fa3":
            chosen._attend = lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel image"))
        return chosen

    monkeypatch.setattr(attention, "_make", failing)
    assert _settle() == "cudnn"
    assert "fa3 left out, it fails at the real size: no kernel image" in caplog.text
    assert backends.calls


def test_compiled_blocks_have_the_same_numbers(toy, engines, monkeypatch) -> None:
    compiled = []
    real = torch.compile

    def counting(function, **settings):
        compiled.append(function.__name__)
        return real(function, **{**settings, "backend": "aot_eager"})

    monkeypatch.setattr(torch, "compile", counting)
    engine = Engine.load(toy / "distilled", EngineConfig(device="cpu", dtype="float32", compile=True))
    assert compiled == ["normed", "project", "attend_text_", "feed_forward_"] * engine.checkpoint.model.num_layers
    request = VideoRequest(prompt="A fox", num_frames=66, height=64, width=64, steps=(1, 1, 1))
    expected = engines("distilled").generate(request).latents
    assert (engine.generate(request).latents - expected).abs().max() < 1e-4


def test_float16_refuses_to_overflow(toy) -> None:
    vae = Checkpoint.open(toy / "base").load_vae(CPU, torch.float16)
    latents = torch.randn(1, 16, 2, 2, 2)
    assert vae.decode(latents).isfinite().all()
    for layer in (vae.decoder.conv_in, vae.decoder.conv_out):  # NaN at the next norm, infinities at the end
        kept = layer.weight.clone()
        layer.weight.fill_(4e4)
        with pytest.raises(OverflowError, match="use vae dtype bfloat16 or float32"):
            vae.decode(latents)
        layer.weight.copy_(kept)
    vae.encoder.conv_in.weight.fill_(4e4)
    with pytest.raises(OverflowError):
        vae.encode(torch.rand(1, 3, 1, 16, 16))
    wide = Checkpoint.open(toy / "base").load_vae(CPU, torch.float32)
    wide.decoder.conv_out.weight.fill_(4e4)
    assert wide.decode(latents).abs().max() <= 1, "float32 has the room, so it is clamped as ever"
