"""The plan's promises, for any counts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from helios_engine.parallel.layout import TokenLayout, shares, starts

COUNTS = st.one_of(st.integers(0, 40), st.sampled_from([240, 540, 2160, 2400, 8640]))


@settings(max_examples=300, deadline=None)
@given(history=COUNTS, noisy=COUNTS, heads=st.integers(1, 48), ranks=st.integers(1, 16), data=st.data())
def test_every_token_and_head_has_one_owner_and_shares_are_even(history, noisy, heads, ranks, data) -> None:
    ulysses = data.draw(st.sampled_from([u for u in range(1, ranks + 1) if ranks % u == 0]))
    layout = TokenLayout.make(history, noisy, heads, num_ranks=ranks, ulysses=ulysses)
    every = range(ranks)
    assert [t for r in every for t in range(history)[layout.history_slice(r)]] == list(range(history))
    assert [t for r in every for t in range(noisy)[layout.noisy_slice(r)]] == list(range(noisy))
    assert [h for m in range(ulysses) for h in range(heads)[layout.head_slice(m)]] == list(range(heads))
    for counts in (layout.history, layout.noisy, layout.heads, [layout.tokens(r) for r in every]):
        assert min(counts) >= 0
        assert max(counts) - min(counts) <= 1
    groups = [tuple(layout.group(rank)) for rank in every]
    assert all(rank in group and len(group) == ulysses for rank, group in zip(every, groups, strict=True))
    assert sorted(set(groups)) == [tuple(range(first, first + ulysses)) for first in range(0, ranks, ulysses)]


def test_real_counts() -> None:
    layout = TokenLayout.make(2400, 540, 40, num_ranks=8)
    assert set(layout.history) == {300}
    assert sorted(set(layout.noisy)) == [67, 68]
    assert layout.heads == (5,) * 8
    assert TokenLayout.make(2400, 540, 40, num_ranks=7).heads == (6, 6, 6, 6, 6, 5, 5)


def test_shares_and_starts() -> None:
    assert shares(7, 3) == (3, 2, 2)
    assert starts((3, 2, 2)) == (0, 3, 5)
    assert shares(2, 4) == (1, 1, 0, 0)
