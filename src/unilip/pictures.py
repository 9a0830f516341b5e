"""How close a picture is to the one it should be: PSNR, SSIM, and the distance of their features.

Goes in: pictures (H, W, 3) uint8, or features (N, D). Comes out: one number each. Both picture measures take the range
of the values to be 1.0.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

PSNR_LIMIT = 100.0  # in dB, for pictures that are equal


def measure_psnr(picture: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None) -> float:
    """Return the peak signal-to-noise ratio in dB, over the pixels WHERE (H, W) if given, at most PSNR_LIMIT."""
    error = (np.asarray(picture, dtype=np.float32) - np.asarray(truth, dtype=np.float32)) ** 2
    mean = float((error if where is None else error[where]).mean()) / 255.0**2
    return PSNR_LIMIT if mean <= 0 else min(PSNR_LIMIT, -10 * math.log10(mean))


def measure_ssim(picture: np.ndarray, truth: np.ndarray) -> float:
    """Return the structural similarity (Wang et al. 2004): 11 x 11 Gaussian of 1.5 pixels, mean over the channels."""
    steps = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-0.5 * (steps / 1.5) ** 2)
    line = line / line.sum()
    kernel = (line[:, None] * line[None, :])[None, None]
    a, b = (
        torch.from_numpy(np.asarray(image, dtype=np.float64) / 255).permute(2, 0, 1)[:, None]
        for image in (picture, truth)
    )  # C 1 H W

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values, kernel)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    both = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(similarity.mean())


def measure_features(features: torch.Tensor, truth: torch.Tensor) -> float:
    """Return 1 less the cosine of two pictures' features (N, D), mean over the N tokens: 0 is the same meaning."""
    return float(1 - F.cosine_similarity(features.float(), truth.float(), dim=-1).mean())
