"""The autoencoder shared by rows against the whole picture, on gloo ranks."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import rank_jobs

CONFIGS = {
    "small": {"base_dim": 8, "z_dim": 4, "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4},
    "wide decoder": {
        "base_dim": 8,
        "decoder_base_dim": 12,
        "z_dim": 4,
        "dim_mult": (1, 2, 2, 2),
        "num_res_blocks": 1,
        "latents_mean": (0.5, -0.5, 0.1, 0.0),
        "latents_std": (2.0, 1.0, 0.5, 1.5),
    },
}
# Convolutions over other shapes sum in another order; values are of order one.
TOLERANCE = 5e-5


def _whole(config: dict, size: tuple[int, int]):
    autoencoder = rank_jobs.vae(config)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config["z_dim"], 3, *size, generator=generator)
    clip = torch.rand(1, 3, 9, size[0] * 8, size[1] * 8, generator=generator) * 2 - 1
    return autoencoder.decode(latents)[0].permute(1, 2, 3, 0), autoencoder.encode(clip)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("degrees", "size", "frames_per_call"),
    [((2, 1, 1), (4, 3), None), ((3, 1, 1), (8, 4), 1), ((2, 2, 1), (6, 3), 2), ((2, 2, 2), (8, 3), None)],
    ids=str,
)
def test_rows_make_up_the_whole(ranks, name: str, degrees, size, frames_per_call) -> None:
    config = CONFIGS[name]
    frames, moments = _whole(config, size)
    results = ranks.run("vae_rows", degrees, config=config, size=size, frames_per_call=frames_per_call)
    assert frames.std() > 0.01, "a picture of nothing proves nothing"
    torch.testing.assert_close(results[0][0], frames, rtol=0, atol=TOLERANCE)
    for rank, (own, (mean, std), sent) in enumerate(results):
        assert (own is None) == (rank > 0)
        torch.testing.assert_close(mean, moments[0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(std.log(), moments[1].log(), rtol=0, atol=TOLERANCE)
        assert sent["vae"] > 0


def test_sums_left_open_as_on_a_gpu_make_up_the_whole(ranks) -> None:
    config, degrees, size = CONFIGS["wide decoder"], (2, 1, 1), (4, 3)
    frames, moments = _whole(config, size)
    results = ranks.run("vae_rows", degrees, config=config, size=size, frames_per_call=1, leaves_open=True)
    torch.testing.assert_close(results[0][0], frames, rtol=0, atol=TOLERANCE)
    for _, (mean, std), _ in results:
        torch.testing.assert_close(mean, moments[0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(std.log(), moments[1].log(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("wrong", ["with_neighbours", "with_row_below", "gather_tokens"])
def test_a_missing_neighbour_is_noticed(monkeypatch, wrong: str) -> None:
    """The comparison above is only worth something if each of the three exchanges matters."""
    from helios_engine.model.slab import Slab
    from helios_engine.parallel.context import ContextParallel

    config, size = CONFIGS["small"], (4, 3)
    frames, moments = _whole(config, size)
    monkeypatch.setattr(Slab, wrong, {"gather_tokens": _half_tokens}.get(wrong, _edges_repeated(wrong)))
    autoencoder = rank_jobs.vae(config)
    slab = Slab(ContextParallel.single(), size[0])
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config["z_dim"], 3, *size, generator=generator)
    clip = torch.rand(1, 3, 9, size[0] * 8, size[1] * 8, generator=generator) * 2 - 1
    decoded = autoencoder.decode(latents, slab=slab)[0].permute(1, 2, 3, 0)
    error = max((decoded - frames).abs().max(), (autoencoder.encode(clip, slab=slab)[0] - moments[0]).abs().max())
    assert error > 10 * TOLERANCE


def _half_tokens(self, tokens, columns):
    return tokens[:, : tokens.size(1) // 2]


def _edges_repeated(name: str):
    above = name == "with_neighbours"

    def edges(self, x):
        return torch.cat([*([x[..., :1, :]] if above else []), x, x[..., -1:, :]], dim=-2)

    return edges
