"""Classifier-free guidance. Source: arXiv 2207.12598 and CFG-Zero* (arXiv 2503.18886)."""

from __future__ import annotations

from torch import Tensor


def combine(positive: Tensor, negative: Tensor, *, scale: float, zero_star: bool) -> Tensor:
    """The guided velocity; with zero_star the negative one is first projected onto the positive one, per sample."""
    if zero_star:
        negative = negative * projection(positive, negative).to(negative.dtype)
    return negative + scale * (positive - negative)


def projection(positive: Tensor, negative: Tensor) -> Tensor:
    """<positive, negative> / |negative|^2 per sample, float32, shaped to broadcast over the sample."""
    positive_flat, negative_flat = positive.float().flatten(1), negative.float().flatten(1)
    dot = (positive_flat * negative_flat).sum(dim=1)
    squared_norm = negative_flat.square().sum(dim=1) + 1e-8
    return (dot / squared_norm).view(-1, *[1] * (positive.ndim - 1))
