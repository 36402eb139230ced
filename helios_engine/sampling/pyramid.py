"""Moving latents between the resolutions of the pyramid.

# B batch, C channels, T latent frames, H W latent rows and columns
Source: pyramid flow (arXiv 2410.05954) as in Diffusers HeliosPyramidPipeline.
"""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_engine.ops import native as ops

logger = logging.getLogger(__name__)


def _per_frame(latents_BCTHW: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    batch, channels, frames = latents_BCTHW.shape[:3]
    flat = latents_BCTHW.transpose(1, 2).flatten(0, 1)
    resized = F.interpolate(flat, size=size, mode=mode)
    return resized.view(batch, frames, channels, *size).transpose(1, 2)


def shrink_noise(noise_BCTHW: Tensor, num_stages: int) -> Tensor:
    """Full-resolution noise brought to the first stage's size; doubling after each halving keeps its variance at one."""
    for _ in range(num_stages - 1):
        height, width = noise_BCTHW.shape[-2:]
        noise_BCTHW = _per_frame(noise_BCTHW, (height // 2, width // 2), "bilinear") * 2
    return noise_BCTHW


def block_noise_factor(gamma: float) -> Tensor:
    """Cholesky factor L [4, 4] of the re-noise covariance of a 2x2 block, float32 on the CPU.

    The matrix is singular for gamma = 1/3 and its jitter of 1e-8 is below float32 resolution, so the last pivot is
    rounding noise and belongs to this machine's LAPACK: parity needs it computed here and not shipped as a constant.
    Some builds (seen: torch 2.13 on an AMD EPYC) find the matrix indefinite and refuse, where the reference stops with
    an error; there the factor comes from float64, which does resolve the jitter.
    """
    covariance = _covariance(gamma, torch.float32)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        logger.info("float32 Cholesky of the block noise covariance failed here; using float64")
        factor = torch.linalg.cholesky(_covariance(gamma, torch.float64)).float()
    return factor


def _covariance(gamma: float, dtype: torch.dtype) -> Tensor:
    identity = torch.eye(4, dtype=dtype)
    return identity * (1 + gamma) - torch.ones(4, 4, dtype=dtype) * gamma + identity * 1e-8


def renoise_weights(ori_start_sigma: float, gamma: float) -> tuple[float, float]:
    """(alpha, beta) that weigh the enlarged latents and the block noise when a stage is entered."""
    signal = 1 - ori_start_sigma
    alpha = 1 / (math.sqrt(1 + 1 / gamma) * (1 - signal) + signal)
    return alpha, alpha * (1 - signal) / math.sqrt(gamma)


def enlarge(
    latents_BCTHW: Tensor, draws_N4: Tensor, factor: Tensor, *, alpha: float, beta: float, dtype: torch.dtype
) -> Tensor:
    """Twice the resolution by repeating pixels, with block noise mixed in against the visible blocks.

    draws are standard normal, four to a latent in (B, C, T, H, W) order; factor is block_noise_factor's; the noise is
    rounded to dtype.
    """
    return ops.upsample_renoise(latents_BCTHW.contiguous(), draws_N4, factor, alpha=alpha, beta=beta, dtype=dtype)
