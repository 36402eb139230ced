"""Sharded attention and its exchanges against the whole, on gloo ranks; heads and tokens that divide and that do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from helios_engine.ops.reference import merge_partials_
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.layout import TokenLayout
from helios_engine.parallel.mesh import Degrees
from tests.helpers import rank_jobs

# history, noisy, heads, head dim, batch
SIZES = [(24, 16, 8, 8, 1), (23, 9, 5, 8, 2), (5, 3, 3, 16, 1), (0, 7, 4, 8, 2), (9, 0, 4, 8, 1)]
ULYSSES = [(p, 1, 1) for p in range(1, 9)]
OTHERS = [(1, 2, 1), (1, 3, 1), (2, 2, 1), (2, 3, 1), (4, 2, 1), (3, 2, 1), (1, 8, 1), (1, 5, 1), (2, 4, 1)]


def _expected(sizes, dtype: torch.dtype) -> torch.Tensor:
    q, k, v = rank_jobs.whole_qkv(*sizes, dtype).double().unbind(2)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("noisy_only", [False, True])
@pytest.mark.parametrize("degrees", ULYSSES + OTHERS, ids=str)
def test_sharded_equals_whole(ranks, degrees, noisy_only: bool, sizes) -> None:
    results = ranks.run("attend", degrees, sizes=sizes, dtype=torch.float32, noisy_only=noisy_only)
    layout = TokenLayout.make(*sizes[:3], num_ranks=len(results), ulysses=degrees[0])
    expected = _expected(sizes, torch.float32)
    for rank, rows in enumerate(results):
        own = rank_jobs.own_rows(expected, layout, rank)
        if noisy_only:
            own = own[:, layout.history[rank] :]
        assert rows.shape == own.shape
        torch.testing.assert_close(rows.double(), own, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("degrees", [(1, 2, 1), (1, 3, 1), (2, 2, 1), (3, 2, 1), (1, 8, 1)], ids=str)
def test_gathered_ring_equals_whole(ranks, degrees, sizes) -> None:
    settings = {"sizes": sizes, "dtype": torch.float32, "noisy_only": False, "ring_method": "allgather"}
    results = ranks.run("attend", degrees, **settings)
    layout = TokenLayout.make(*sizes[:3], num_ranks=len(results), ulysses=degrees[0])
    expected = _expected(sizes, torch.float32)
    for rank, rows in enumerate(results):
        torch.testing.assert_close(rows.double(), rank_jobs.own_rows(expected, layout, rank), rtol=0, atol=2e-6)


# A ring's partial results arrive rounded to bfloat16, one rounding per partial; Ulysses adds none.
@pytest.mark.parametrize(
    ("degrees", "limit"), [((2, 1, 1), 1.05), ((4, 1, 1), 1.05), ((1, 3, 1), 1.5), ((2, 2, 1), 1.5)]
)
def test_bfloat16_error_is_near_that_of_one_rank(ranks, degrees, limit: float) -> None:
    sizes = (64, 32, 4, 16, 1)
    expected = _expected(sizes, torch.bfloat16)
    single = ranks.run("attend", (1, 1, 1), sizes=sizes, dtype=torch.bfloat16, noisy_only=False)[0]
    results = ranks.run("attend", degrees, sizes=sizes, dtype=torch.bfloat16, noisy_only=False)
    layout = TokenLayout.make(*sizes[:3], num_ranks=len(results), ulysses=degrees[0])
    error = sum(
        (rows.double() - rank_jobs.own_rows(expected, layout, rank)).square().sum() for rank, rows in enumerate(results)
    ).sqrt()
    assert error <= limit * (single.double() - expected).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("degrees", [*ULYSSES, (2, 2, 1), (3, 2, 1)], ids=str)
def test_exchanges_move_every_element_bit_for_bit(ranks, degrees, sizes, dtype: torch.dtype) -> None:
    there = ranks.run("scatter_heads", degrees, sizes=sizes, dtype=dtype)
    back = ranks.run("gather_heads", degrees, sizes=sizes, dtype=dtype)
    layout = TokenLayout.make(*sizes[:3], num_ranks=len(there), ulysses=degrees[0])
    whole = rank_jobs.whole_qkv(*sizes, dtype)
    for rank in range(len(there)):
        tokens = torch.cat([rank_jobs.own_rows(whole, layout, member) for member in layout.group(rank)], dim=1)
        assert torch.equal(there[rank], tokens[:, :, :, layout.head_slice(rank % degrees[0])])
        assert torch.equal(back[rank], rank_jobs.own_rows(whole[:, :, 0], layout, rank))


def test_a_shuffled_head_map_is_noticed(ranks) -> None:
    """The comparison above is only worth something if a wrong map fails it."""
    sizes, degrees = (24, 16, 8, 8, 1), (4, 1, 1)
    there = ranks.run("scatter_heads", degrees, sizes=sizes, dtype=torch.float32)
    layout = TokenLayout.make(*sizes[:3], num_ranks=4)
    whole = rank_jobs.whole_qkv(*sizes, torch.float32)
    tokens = torch.cat([rank_jobs.own_rows(whole, layout, rank) for rank in range(4)], dim=1)
    assert not torch.equal(there[0], tokens[:, :, :, layout.head_slice(1)])
    assert not torch.equal(there[0], whole[:, :, :, layout.head_slice(0)])


@pytest.mark.parametrize("cuts", [(0, 7), (1, 7), (3, 4), (0, 0), (7, 7)])
def test_merging_partials_is_attention_to_all_keys(cuts: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 8, generator=generator) for n in (5, 7, 7))
    attention = rank_jobs.choose_attention("auto", device=rank_jobs.CPU, dtype=torch.float32, head_dim=8)
    first, last = cuts
    pieces = [slice(0, first), slice(first, last), slice(last, 7)]
    out, lse = attention.with_lse(q, k[:, pieces[0]], v[:, pieces[0]])
    for piece in pieces[1:]:
        merge_partials_(out, lse, *attention.with_lse(q, k[:, piece], v[:, piece]))
    torch.testing.assert_close(out, attention(q, k, v), rtol=1e-5, atol=1e-6)
    scores = torch.einsum("blhk,bmhk->blhm", q, k) / 8**0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_nothing_merged_with_nothing_is_nothing() -> None:
    out, lse = torch.zeros(1, 2, 1, 4), torch.full((1, 2, 1), float("-inf"))
    merge_partials_(out, lse, out.clone(), lse.clone())
    assert torch.equal(out, torch.zeros(1, 2, 1, 4))
    assert bool(lse.isneginf().all())


@pytest.mark.parametrize(
    ("wishes", "guided", "expected"),
    [
        ((1,), True, (1, 1, 1)),
        ((4,), False, (4, 1, 1)),
        ((4,), True, (2, 1, 2)),
        ((8,), True, (4, 1, 2)),
        ((3,), True, (3, 1, 1)),
        ((4, 2, 2), True, (2, 2, 1)),
        ((8, 2, 2), True, (2, 2, 2)),
        ((4, None, 2), False, (2, 2, 1)),
        ((4, None, None, 1), True, (4, 1, 1)),
    ],
)
def test_default_degrees(wishes, guided: bool, expected) -> None:
    names = ("ulysses", "ring", "cfg")
    degrees = Degrees.choose(wishes[0], guided=guided, **dict(zip(names, wishes[1:], strict=False)))
    assert (degrees.ulysses, degrees.ring, degrees.cfg) == expected


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"ulysses": 3}, "is 3 ranks, but 4 were started"),
        ({"ulysses": 0}, "ulysses degree must be"),
        ({"cfg": 4}, "cfg degree must be 1 or 2"),
        ({"ring": -1}, "ring degree must be"),
    ],
)
def test_bad_degrees(wishes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Degrees.choose(4, guided=False, **wishes)


def test_the_first_ranks_word_reaches_all(ranks) -> None:
    assert ranks.run("word", (2, 2, 2), values=[7, 1, 2, 3, 4, 5, 6, 0]) == [7] * 8
    assert ContextParallel.single().word(3) == 3
