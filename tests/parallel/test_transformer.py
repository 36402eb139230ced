"""The transformer on many ranks against one: every scheme, every history group, uneven everything; and what it sends."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from helios_engine.model.block import Block
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.layout import TokenLayout
from tests.helpers import rank_jobs

# float32, two layers, outputs of order one.
TOLERANCE = 1e-5
CONFIG = {
    "num_attention_heads": 5,
    "attention_head_dim": 12,
    "rope_dim": (4, 4, 4),
    "num_layers": 3,
    "ffn_dim": 40,
    "text_dim": 16,
    "freq_dim": 16,
    "is_amplify_history": True,
}
GROUPS = [("long", "mid", "short"), ("mid", "short"), ("long", "short"), ("short",), ()]
SIZE = (1, 6, 10)  # batch, latent rows and columns: 135 noisy tokens
DEGREES = [*[(p, 1, 1) for p in range(2, 9)], (1, 2, 1), (1, 3, 1), (2, 2, 1), (3, 2, 1), (2, 4, 1)]
GUIDED = [(1, 1, 2), (2, 1, 2), (3, 1, 2), (2, 2, 2), (1, 2, 2), (4, 1, 2)]


def _single(groups: tuple[str, ...], *, guided: bool = False, size=SIZE, **changes: object) -> list[torch.Tensor]:
    config = {**CONFIG, **changes}
    arguments = {"config": config, "size": size, "groups": groups, "guided": guided}
    return rank_jobs.forward(ContextParallel.single(), **arguments)[0]


def _assert_same(results: list, expected: list[torch.Tensor]) -> None:
    for velocities, _, _ in results:
        assert len(velocities) == len(expected)
        for actual, wanted in zip(velocities, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("groups", GROUPS, ids=lambda groups: "+".join(groups) or "none")
@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_many_ranks_equal_one(ranks, degrees, groups: tuple[str, ...]) -> None:
    expected = _single(groups)
    assert expected[0].std() > 0.1
    _assert_same(ranks.run("forward", degrees, config=CONFIG, size=SIZE, groups=groups, guided=False), expected)


@pytest.mark.parametrize("degrees", [*GUIDED, (2, 1, 1), (1, 2, 1)], ids=str)
def test_guidance_branches_on_two_halves(ranks, degrees) -> None:
    expected = _single(GROUPS[0], guided=True)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    _assert_same(ranks.run("forward", degrees, config=CONFIG, size=SIZE, groups=GROUPS[0], guided=True), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_cross_attn": False},
        {"zero_history_timestep": False},
        {"num_layers": 1},
        {"num_attention_heads": 2},  # fewer heads than ranks: some have none
    ],
    ids=str,
)
@pytest.mark.parametrize("degrees", [(3, 1, 1), (2, 2, 1)], ids=str)
def test_switches(ranks, degrees, changes: dict) -> None:
    expected = _single(GROUPS[0], **changes)
    config = {**CONFIG, **changes}
    _assert_same(ranks.run("forward", degrees, config=config, size=SIZE, groups=GROUPS[0], guided=False), expected)


def test_fewer_tokens_than_ranks_and_a_batch(ranks) -> None:
    size = (2, 2, 2)  # nine noisy tokens, history of four frames' worth
    expected = _single(("short",), size=size)
    _assert_same(ranks.run("forward", (8, 1, 1), config=CONFIG, size=size, groups=("short",), guided=False), expected)


@pytest.mark.parametrize("mutation", ["no history scale", "swapped rows"])
def test_a_wrong_model_would_be_noticed(mutation: str) -> None:
    """The tolerance above separates right from wrong by far."""
    expected = _single(GROUPS[0])
    if mutation == "no history scale":
        with mock.patch.object(Block, "history_scale", return_value=None):
            wrong = _single(GROUPS[0])
    else:
        original = rank_jobs.model_inputs

        def swapped(*arguments: object):
            latents, window, texts = original(*arguments)
            return latents, type(window)(window.long, window.mid, window.short.flip(2)), texts

        with mock.patch.object(rank_jobs, "model_inputs", swapped):
            wrong = _single(GROUPS[0])
    assert (wrong[0] - expected[0]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ulysses_sends_exactly_the_plan(ranks, num_ranks: int) -> None:
    """4 X (P - 1) / P^2 per layer, the last layer less, one gather; two collectives a layer."""
    config = {**CONFIG, "num_attention_heads": 4}
    size = (1, 8, 16)
    results = ranks.run("forward", (num_ranks, 1, 1), config=config, size=size, groups=("short",), guided=False)
    history, noisy, dim, layers = 2 * 8 * 16, 9 * 4 * 8, 48, 3
    total = (history + noisy) * dim * 4  # X: one float32 activation of the whole sequence
    noisy_bytes = noisy * dim * 4
    away = (num_ranks - 1) / num_ranks**2
    layout = TokenLayout.make(history, noisy, 4, num_ranks=num_ranks)
    assert len(set(layout.history)) == len(set(layout.noisy)) == 1
    for _, sent, calls in results:
        assert sent["qkv"] == ((layers - 1) * 3 * total + 2 * total + noisy_bytes) * away
        assert sent["out"] == ((layers - 1) * total + noisy_bytes) * away
        assert sent["gather"] == noisy // num_ranks * 64 * 4 * (num_ranks - 1)
        assert calls == {"qkv": layers, "out": layers, "gather": 1}
