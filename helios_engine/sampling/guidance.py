"""Classifier-free guidance. Source: arXiv 2207.12598 and CFG-Zero* (arXiv 2503.18886)."""

from __future__ import annotations

from torch import Tensor

from helios_engine.ops import native as ops


def combine(positive: Tensor, negative: Tensor, *, scale: float, zero_star: bool) -> Tensor:
    """The guided velocity; with zero_star the negative one is first projected onto the positive one, per sample."""
    return ops.cfg_combine(positive.contiguous(), negative.contiguous(), scale=scale, zero_star=zero_star)
