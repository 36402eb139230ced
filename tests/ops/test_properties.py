"""What must hold of the compiled operators for any shape: drawn cases, no expected numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helios_engine.ops import native, reference

pytestmark = pytest.mark.skipif(bool(native.WHY_NOT), reason=f"no compiled operators: {native.WHY_NOT}")
ON_GPU = native._ON_GPU and torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
EPS = 1e-6

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
widths = st.one_of(st.integers(1, 80), st.sampled_from([96, 128, 384, 1000, 5120]))
drawn = settings(max_examples=30, deadline=None, derandomize=True)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


@st.composite
def norm_cases(draw: st.DrawFn) -> dict:
    batch, rows, width = draw(st.integers(1, 3)), draw(st.integers(0, 9)), draw(widths)
    dtype = draw(dtypes)
    return {
        "x": rand(batch, rows, width, dtype=dtype, seed=draw(st.integers(0, 99))),
        "margins": (draw(st.sampled_from([0, 1, 8])), draw(st.integers(0, 9))),
        "update": rand(batch, rows, width, dtype=dtype, seed=1),
        "rows": [rand(2, width, seed=seed) for seed in (2, 3, 4)],
        "num_history": draw(st.integers(0, rows)),
        "order": torch.tensor(draw(st.permutations(range(rows))), dtype=torch.long),
        "cut": draw(st.integers(0, rows)),
    }


def laid_out(x: Tensor, margins: tuple[int, int]) -> Tensor:
    """The same rows as a part of wider ones, at an address that may be odd; NaN lies between them."""
    before, after = margins
    wide = x.new_full((*x.shape[:2], before + x.size(-1) + after), float("nan"))
    part = wide[..., before : before + x.size(-1)]
    part.copy_(x)
    return part


def chained(case: dict, x: Tensor, update: Tensor, rows: list[Tensor], num_history: int) -> tuple[Tensor, Tensor]:
    x = laid_out(x, case["margins"])
    out = native.residual_gate_norm_(x, update, *rows, num_history=num_history, eps=EPS)
    return x, out


@drawn
@given(norm_cases())
def test_rows_of_a_segment_are_independent(case: dict) -> None:
    x, update, rows, num_history = case["x"], case["update"], case["rows"], case["num_history"]
    whole = chained(case, x, update, rows, num_history)
    in_history = case["order"] < num_history
    order = torch.cat([case["order"][in_history], case["order"][~in_history]]).to(DEVICE)  # within each segment
    moved = chained(case, x[:, order], update[:, order], rows, num_history)
    assert all(torch.equal(a, b[:, order]) for a, b in zip(moved, whole, strict=True))
    cut = case["cut"]
    first = chained(case, x[:, :cut], update[:, :cut], rows, min(cut, num_history))
    second = chained(case, x[:, cut:], update[:, cut:], rows, max(0, num_history - cut))
    for parts in zip(first, second, whole, strict=True):
        assert torch.equal(torch.cat(parts[:2], dim=1), parts[2]), "a shard computes the numbers of the whole"


@drawn
@given(norm_cases())
def test_a_closed_gate_is_the_norm_alone(case: dict) -> None:
    x, rows, num_history = case["x"], case["rows"], case["num_history"]
    same, out = chained(case, x, case["update"], [torch.zeros_like(rows[0]), *rows[1:]], num_history)
    assert torch.equal(same, x)
    alone = native.norm_scale_shift(laid_out(x, case["margins"]), *rows[1:], num_history=num_history, eps=EPS)
    assert torch.equal(out, alone)
    plain = native.norm_scale_shift(
        x, torch.ones_like(rows[1]), torch.zeros_like(rows[2]), num_history=num_history, eps=EPS
    ).double()
    if x.numel() and x.size(-1) >= 32:
        assert plain.mean(-1).abs().max() < 2e-2
        assert (plain.var(-1, unbiased=False) - 1).abs().max() < 2e-2


@drawn
@given(norm_cases(), st.integers(-6, 6))
def test_rmsnorm_knows_no_scale(case: dict, power: int) -> None:
    x, weight = case["x"], rand(case["x"].size(-1), dtype=case["x"].dtype, seed=5)
    plain, scaled = laid_out(x, case["margins"]), laid_out(x * 2.0**power, case["margins"])
    if x.dtype == torch.float16 and (scaled.abs() < 2**-14).logical_and(x != 0).any():
        return  # below its normal range float16 itself rounds
    native.rms_norm_(plain, weight, eps=0.0)
    native.rms_norm_(scaled, weight, eps=0.0)
    assert torch.equal(plain, scaled) or bool(plain.isnan().any()), "powers of two change no digit"


@drawn
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 7), dtypes, st.floats(-3, 3), st.integers(0, 7))
def test_rotations_keep_lengths_and_see_distances_only(
    heads: int, pairs: int, rows: int, dtype: torch.dtype, shift: float, cut: int
) -> None:
    width = heads * 2 * pairs
    qkv = rand(2, rows, 3 * width, dtype=dtype)
    weights = [torch.ones(width, dtype=dtype, device=DEVICE)] * 2
    places = torch.arange(rows, device=DEVICE).double()[:, None]
    frequencies = torch.linspace(1.0, 0.01, pairs, device=DEVICE).double()

    def turned(offset: float, rows_from: int = 0, rows_to: int = rows) -> Tensor:
        angles = (places + offset) * frequencies
        rotation = torch.stack([angles.cos(), angles.sin()], dim=-1).float()[rows_from:rows_to].contiguous()
        part = qkv[:, rows_from:rows_to].clone()
        native.qk_rms_norm_rope_(part, *weights, rotation, eps=EPS)
        return part

    here, there = turned(0.0), turned(shift)
    still = qkv.clone()
    native.rms_norm_(still[..., :width], weights[0], eps=EPS)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    shape = (2, rows, heads, 2 * pairs)
    lengths = [part[..., :width].reshape(shape).double().norm(dim=-1) for part in (still, here)]
    torch.testing.assert_close(*lengths, rtol=tolerance, atol=tolerance)
    products = []
    for part in (here, there):
        q, k = (part[..., i * width : (i + 1) * width].reshape(shape).double() for i in (0, 1))
        products.append(torch.einsum("blhk,bmhk->bhlm", q, k))
    torch.testing.assert_close(*products, rtol=tolerance, atol=tolerance * 2 * pairs)
    cut = min(cut, rows)
    assert torch.equal(torch.cat([turned(0.0, 0, cut), turned(0.0, cut, rows)], dim=1), here)


@drawn
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.data())
def test_partial_attention_merges_in_any_order(num_queries: int, num_keys: int, dim: int, data: st.DataObject) -> None:
    q, k, v = (rand(count, dim, seed=seed) for seed, count in enumerate((num_queries, num_keys, num_keys)))
    cuts = sorted(data.draw(st.lists(st.integers(0, num_keys), max_size=4)))  # some parts may have no key at all
    edges = [0, *cuts, num_keys]
    scores = q @ k.T / math.sqrt(dim)

    def merged(parts: list[tuple[int, int]]) -> Tensor:
        out = torch.zeros(1, num_queries, 1, dim, device=DEVICE)
        lse = torch.full((1, num_queries, 1), float("-inf"), device=DEVICE)
        for low, high in parts:
            own = scores[:, low:high]
            part = (own.softmax(-1) @ v[low:high])[None, :, None]
            native.merge_partials_(out, lse, part, own.logsumexp(-1)[None, :, None])
        torch.testing.assert_close(lse[0, :, 0], scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
        return out[0, :, 0]

    parts = list(itertools.pairwise(edges))
    whole = scores.double().softmax(-1) @ v.double()
    for order in (parts, parts[::-1], data.draw(st.permutations(parts))):
        torch.testing.assert_close(merged(order).double(), whole, rtol=2e-5, atol=2e-5)


@drawn
@given(st.integers(1, 2), st.integers(1, 9), st.tuples(*[st.integers(1, 3)] * 3), st.tuples(*[st.integers(1, 4)] * 3))
def test_unpatchify_undoes_patchify(batch: int, channels: int, patch: tuple, counts: tuple) -> None:
    size = [part * count for part, count in zip(patch, counts, strict=True)]
    x = rand(batch, channels, *size)
    rows = native.patch_rows(x, patch)
    outputs = rows.unflatten(-1, (channels, -1)).transpose(-1, -2).flatten(-2).contiguous()  # channels come last there
    back, delta = torch.zeros_like(x), torch.ones(1, 1, dtype=torch.float64)
    native.euler_step_(back, outputs, delta, torch.tensor([0]), patch)
    assert torch.equal(back, x)


@drawn
@given(st.integers(1, 3), st.integers(1, 3000), dtypes, st.floats(1.5, 9.0))
def test_guidance_between_equal_branches_changes_nothing(
    batch: int, count: int, dtype: torch.dtype, scale: float
) -> None:
    x = 1 + rand(batch, 1, count, dtype=dtype).abs()
    for zero_star in (True, False):
        combined = native.cfg_combine(x, x.clone(), scale=scale, zero_star=zero_star)
        torch.testing.assert_close(combined, x, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=0)
        assert torch.equal(combined, native.cfg_combine(x, x.clone(), scale=scale, zero_star=zero_star)), "repeatable"


@drawn
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 6))
def test_block_noise_has_the_factor_s_covariance(planes: int, height: int, width: int) -> None:
    x = rand(1, planes, 1, height, width)
    factor = rand(4, 4, seed=9).tril()
    count = x.numel()
    for place in range(4):  # a unit draw brings out one column of the factor, everywhere
        draws = torch.eye(4, device=DEVICE)[place].expand(count, 4).contiguous()
        noise = native.upsample_renoise(x, draws, factor, alpha=0.0, beta=1.0, dtype=torch.float32)
        blocks = noise.reshape(planes, height, 2, width, 2).permute(0, 1, 3, 2, 4).reshape(-1, 4)
        assert torch.equal(blocks, factor[:, place].expand(count, 4))
    kept = native.upsample_renoise(x, draws, factor, alpha=1.0, beta=0.0, dtype=torch.float32)
    assert torch.equal(kept, reference.upsample_nearest(x))


@drawn
@given(st.integers(1, 70), st.integers(1, 4), st.integers(1, 4), dtypes, st.integers(-3, 3))
def test_pixels_of_the_autoencoder_are_independent(
    channels: int, height: int, width: int, dtype: torch.dtype, power: int
) -> None:
    x = rand(1, 2, height, width, channels, dtype=dtype).permute(0, 4, 1, 2, 3)
    gamma = rand(channels, dtype=dtype, seed=1)
    out = native.channel_norm_silu(x, gamma)
    assert torch.equal(native.channel_norm_silu(x.flip(3), gamma).flip(3), out)
    if dtype != torch.float16:
        assert torch.equal(native.channel_norm_silu(x * 2.0**power, gamma), out), "the direction alone counts"
    doubled = native.upsample_nearest(x)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert torch.equal(doubled[:, :, :, dy::2, dx::2], x)
    same = x.clone(memory_format=torch.preserve_format)
    native.bias_residual(same, torch.zeros_like(gamma), torch.zeros_like(same))
    assert torch.equal(same, x)


def test_rows_may_lie_more_than_two_billion_elements_apart() -> None:
    stride = 2**30 + 64
    buffer = torch.empty(2 * stride + 192, dtype=torch.bfloat16, device=DEVICE)  # only the pages used become real
    x = buffer.as_strided((1, 3, 192), (0, stride, 1))
    x.copy_(rand(1, 3, 192, dtype=torch.bfloat16))
    rows, update = [rand(2, 192, seed=seed) for seed in (1, 2, 3)], rand(1, 3, 192, dtype=torch.bfloat16, seed=4)
    expected, expected_out = chained({"margins": (0, 0)}, x, update, rows, 1)
    out = native.residual_gate_norm_(x, update, *rows, num_history=1, eps=EPS)
    assert torch.equal(x, expected)
    assert torch.equal(out, expected_out)
    angles = rand(3, 8, seed=5)
    rotation = torch.stack([angles.cos(), angles.sin()], dim=-1)
    weight = rand(64, dtype=torch.bfloat16, seed=6)
    dense = x.clone().contiguous()
    for part in (x, dense):
        native.qk_rms_norm_rope_(part, weight, weight, rotation, eps=EPS)
    assert torch.equal(x, dense)
