"""All random numbers of a video, in the reference's order, from one CPU generator per video.

Drawing on the CPU makes a seed mean the same video on every device and on every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NoiseSource:
    """One video's generator; its state is bytes, so a session can be saved and continued."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32 on the CPU."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float32)

    def uniform(self, count: int, low: float, high: float) -> Tensor:
        return torch.rand(count, generator=self._generator) * (high - low) + low

    def copy(self) -> NoiseSource:
        """Another generator that will draw the same numbers."""
        other = NoiseSource(0)
        other.restore(self.state())
        return other

    def state(self) -> Tensor:
        return self._generator.get_state()

    def restore(self, state: Tensor) -> None:
        self._generator.set_state(state)


def blend_with_noise(
    latents: Tensor, source: NoiseSource, sigma_range: tuple[float, float], *, per_frame: bool
) -> Tensor:
    """sigma * noise + (1 - sigma) * latents, sigma drawn uniformly: one per clip, or one per latent frame.

    latents [1, C, T, H, W] float32 on any device.
    """
    sigma = source.uniform(latents.size(2) if per_frame else 1, *sigma_range).view(1, 1, -1, 1, 1)
    noise = source.normal(*latents.shape)
    return sigma.to(latents.device) * noise.to(latents.device) + (1 - sigma).to(latents.device) * latents
