"""Backend choice and the calls made; what needs a GPU is checked by signature here and for real by gpu_check.sh."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from helios_engine.ops import attention

CPU = torch.device("cpu")


def _qkv(queries: int = 5, keys: int = 7):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, 3, 16, generator=generator) for n in (queries, keys, keys))


def test_auto_on_the_cpu_is_exact_softmax_attention() -> None:
    chosen = attention.choose_attention("auto", device=CPU, dtype=torch.float32, head_dim=16)
    q, k, v = _qkv()
    scores = torch.einsum("blhk,bmhk->bhlm", q.double(), k.double()) / 4
    expected = torch.einsum("bhlm,bmhk->blhk", scores.softmax(-1), v.double())
    torch.testing.assert_close(chosen(q, k, v).double(), expected, rtol=1e-5, atol=1e-6)
    assert chosen.backend == "sdpa"


def test_no_queries_give_an_empty_result() -> None:
    chosen = attention.choose_attention("sdpa", device=CPU, dtype=torch.float32, head_dim=16)
    q, k, v = _qkv(queries=0)
    assert chosen(q, k, v).shape == (2, 0, 3, 16)


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4", "cudnn", "flash", "fa3_fp8"])
def test_a_named_backend_that_cannot_run_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"attention backend {name} cannot run: it needs a CUDA device"):
        attention.choose_attention(name, device=CPU, dtype=torch.bfloat16, head_dim=128)


def _pretend_gpu(monkeypatch, capability: tuple[int, int], modules: tuple[str, ...]) -> None:
    monkeypatch.setattr(attention, "_failure", lambda *_: None)  # the trial call needs a real GPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name if name in modules else None)
    for name in modules:
        module = types.ModuleType(name)
        module.flash_attn_func = _flash_attention(name)
        monkeypatch.setitem(sys.modules, name, module)


# What each package's function takes and gives: (argument that asks for the log-sum-exp, what is returned without it).
SIGNATURES = {
    "flash_attn": ("return_attn_probs", "out"),  # flash-attn 2.8: (out, softmax_lse, S_dmask) when asked
    "fa3_fwd_interface": ("return_attn_probs", "out"),
    "flash_attn_interface": ("return_attn_probs", "pair"),  # early FlashAttention-3
    "flash_attn.cute": ("return_lse", "pair"),  # flash-attn-4 4.0.0b36: (out, lse or None)
}


def _flash_attention(module: str):
    argument, plain = SIGNATURES[module]

    def flash_attn_func(q, k, v, *, causal, **more):
        assert causal is False
        assert more in ({}, {argument: True})
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        out = out.transpose(1, 2)
        if more:
            return (out, lse, None) if module == "flash_attn" else (out, lse)
        return out if plain == "out" else (out, None)

    return flash_attn_func


@pytest.mark.parametrize(
    ("capability", "modules", "dtype", "head_dim", "expected"),
    [
        ((9, 0), ("fa3_fwd_interface",), torch.bfloat16, 128, "fa3"),
        ((9, 0), ("flash_attn_interface",), torch.bfloat16, 128, "fa3"),
        ((9, 0), (), torch.bfloat16, 128, "cudnn"),
        ((10, 0), ("fa3_fwd_interface",), torch.bfloat16, 128, "cudnn"),
        ((8, 0), (), torch.float16, 64, "cudnn"),
        ((7, 5), (), torch.float16, 64, "sdpa"),
        ((9, 0), ("fa3_fwd_interface",), torch.float32, 128, "sdpa"),
        ((9, 0), ("fa3_fwd_interface",), torch.bfloat16, 20, "sdpa"),
    ],
)
def test_auto_on_a_gpu(monkeypatch, capability, modules, dtype, head_dim, expected) -> None:
    _pretend_gpu(monkeypatch, capability, modules)
    chosen = attention.choose_attention("auto", device=torch.device("cuda"), dtype=dtype, head_dim=head_dim)
    assert chosen.backend == expected


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("fa2", "flash_attn"),
        ("fa3", "fa3_fwd_interface"),
        ("fa3", "flash_attn_interface"),
        ("fa4", "flash_attn.cute"),
    ],
)
def test_flash_attention_is_called_as_it_wants(monkeypatch, name: str, module: str) -> None:
    _pretend_gpu(monkeypatch, (9, 0), (module,))
    chosen = attention.choose_attention(name, device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=16)
    assert chosen.backend == name
    q, k, v = _qkv()
    plain = attention.choose_attention("sdpa", device=CPU, dtype=torch.float32, head_dim=16)
    torch.testing.assert_close(chosen(q, k, v), plain(q, k, v), rtol=1e-6, atol=1e-6)
    for ours, expected in zip(chosen.with_lse(q, k, v), plain.with_lse(q, k, v), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_flash_attention_4_needs_a_newer_gpu(monkeypatch) -> None:
    _pretend_gpu(monkeypatch, (8, 0), ("flash_attn.cute",))
    with pytest.raises(ValueError, match="sm_90 or newer, this is sm_80"):
        attention.choose_attention("fa4", device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=128)


@pytest.mark.parametrize(
    ("name", "package"), [("fa2", "flash-attn"), ("fa3", "fa3_fwd"), ("fa3_fp8", "fa3_fwd"), ("fa4", "flash-attn-4")]
)
def test_refusal_names_the_missing_package(monkeypatch, name: str, package: str) -> None:
    _pretend_gpu(monkeypatch, (9, 0), ())
    with pytest.raises(ValueError, match=f"pip install {package}"):
        attention.choose_attention(name, device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=128)


@pytest.mark.parametrize(
    "error", [ImportError("undefined symbol"), OSError("undefined symbol"), RuntimeError("undefined symbol")]
)
def test_a_package_that_does_not_load_is_left_out(monkeypatch, error: Exception) -> None:
    _pretend_gpu(monkeypatch, (9, 0), ("fa3_fwd_interface",))

    def broken(name: str):
        raise error

    monkeypatch.setattr(attention.importlib, "import_module", broken)
    gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128}
    assert attention.choose_attention("auto", **gpu).backend == "cudnn"
    with pytest.raises(ValueError, match="cannot be imported .*undefined symbol."):
        attention.choose_attention("fa3", **gpu)


def test_a_backend_whose_trial_call_fails_is_left_out(monkeypatch) -> None:
    _pretend_gpu(monkeypatch, (9, 0), ())
    monkeypatch.setattr(attention, "_failure", lambda name, *_: "a trial call failed: no" if name == "cudnn" else None)
    gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128}
    assert attention.choose_attention("auto", **gpu).backend == "flash"
    with pytest.raises(ValueError, match="trial call failed"):
        attention.choose_attention("cudnn", **gpu)


def _trials(monkeypatch, call) -> None:
    """A GPU whose backends' trial calls do this; tensors are made on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device=None, **named: randn(*size, **named))
    monkeypatch.setattr(attention, "_make", lambda name, device: lambda *_: call(name))


@pytest.mark.parametrize(
    "error", [RuntimeError("no engine"), TypeError("bad operand"), AssertionError("head"), KeyError(3)]
)
def test_whatever_a_trial_raises_is_a_reason(monkeypatch, error: Exception) -> None:
    def call(name: str) -> None:
        if name == "cudnn":
            raise error

    _trials(monkeypatch, call)
    gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128}
    assert attention.attention_candidates(**gpu) == ["flash"]
    said = "" if isinstance(error, RuntimeError) else type(error).__name__
    with pytest.raises(ValueError, match=f"attention backend cudnn cannot run: a trial call failed: {said}"):
        attention.choose_attention("cudnn", **gpu)


def test_what_is_no_backends_fault_is_no_reason(monkeypatch) -> None:
    """A generator that refuses, or a full card, must not turn auto into the slowest backend without a word."""
    gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128}

    def full(name: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    _trials(monkeypatch, full)
    with pytest.raises(torch.OutOfMemoryError):
        attention.attention_candidates(**gpu)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    monkeypatch.setattr(torch, "randn", refuse)
    with pytest.raises(RuntimeError, match="Offset increment"):
        attention.attention_candidates(**gpu)


@pytest.mark.parametrize("trailing", [(), (1,)], ids=["BHL", "BHL1"])
def test_cudnn_gives_its_own_log_sum_exp(monkeypatch, trailing: tuple[int, ...]) -> None:
    """A ring asks cuDNN and not torch's flash; the call is one that this torch's schema takes."""
    q, k, v = _qkv()
    exact = attention.choose_attention("sdpa", device=CPU, dtype=torch.float32, head_dim=16)
    schema = torch.ops.aten._scaled_dot_product_cudnn_attention.default._schema

    def kernel(query, key, value, attn_bias, *, compute_log_sumexp):
        bound = {argument.name for argument in schema.arguments}
        assert {"query", "key", "value", "attn_bias", "compute_log_sumexp"} <= bound
        assert attn_bias is None
        assert compute_log_sumexp
        out, lse = exact.with_lse(*(x.transpose(1, 2) for x in (query, key, value)))
        lse_BHL = lse.transpose(1, 2).contiguous()
        return out.transpose(1, 2), lse_BHL.view(*lse_BHL.shape, *trailing), None, None

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", kernel)
    chosen = attention._make("cudnn", torch.device("cuda"))
    for actual, expected in zip(chosen.with_lse(q, k, v), exact.with_lse(q, k, v), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_attention_in_eight_bits(monkeypatch, scale: float) -> None:
    """The stand-in undoes the scales as FlashAttention-3 does, and computes exactly."""
    _pretend_gpu(monkeypatch, (9, 0), ("fa3_fwd_interface",))
    exact = sys.modules["fa3_fwd_interface"].flash_attn_func

    def flash_attn_func(q, k, v, *, causal, q_descale, k_descale, v_descale, **more):
        operands = []
        for x, descale in ((q, q_descale), (k, k_descale), (v, v_descale)):
            assert x.dtype == torch.float8_e4m3fn
            assert descale.shape == (x.size(0), x.size(2))
            assert descale.dtype == torch.float32
            assert (x.float().abs().amax(dim=(1, 3)) >= 416).all(), "every head uses the range"
            operands.append(x.float() * descale[:, None, :, None])
        return exact(*operands, causal=causal, **more)

    monkeypatch.setattr(sys.modules["fa3_fwd_interface"], "flash_attn_func", flash_attn_func)
    gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 16}
    chosen = attention.choose_attention("fa3_fp8", **gpu)
    assert "fa3_fp8" not in attention.attention_candidates(**gpu)
    q, k, v = (x.bfloat16() for x in _qkv())
    v = v * torch.logspace(0, 3, v.size(2))[:, None].bfloat16() * scale  # heads of different sizes
    expected = attention.choose_attention("sdpa", **gpu)(*(x.float() for x in (q, k, v)))
    for out in (chosen(q, k, v), chosen.with_lse(q, k, v)[0]):
        error = (out.float() - expected).norm(dim=(1, 3)) / expected.norm(dim=(1, 3))
        assert error.max() < 0.1
        assert error.min() > 1e-4
