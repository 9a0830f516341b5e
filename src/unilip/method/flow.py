"""Flow matching: the straight path, its velocity, the loss, training levels; and the solvers of sampling.

x is a clean latent, e noise, s in [0,1] the noise level: x_s = (1-s) x + s e, velocity e - x (paper, section 3.2).
Training draws levels from the 1000 of the shift-1 schedule; sampling follows a shifted schedule with DPM-Solver++ 2M
(arXiv 2211.01095, as published), UniPC (arXiv 2302.04867) or Euler. All of them are sums of noise and velocities.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unilip.errors import check_choice
from unilip.method.config import SOLVERS

TRAIN_TIMESTEPS = 1000

Velocity = Callable[[Tensor, Tensor], Tensor]  # latents (B,Z,h,w), timestep () -> velocity (B,Z,h,w)
OnStep = Callable[[int, Tensor, Tensor], Tensor | None]  # step, timestep, latents -> latents in their place, or None


# --- training ---------------------------------------------------------------------------------------------------------


def interpolate(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Return (1-s) clean + s noise; levels s (B,) broadcast over (B,Z,h,w)."""
    level = level.view(-1, *[1] * (clean.dim() - 1))
    return (1 - level) * clean + level * noise


def flow_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity, in float32 whatever the inputs are."""
    return (velocity.float() - (noise.float() - clean.float())).square().mean()


def logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """Draw u = sigmoid(Normal(0,1)) in (0,1), (count,), on the CPU."""
    return torch.sigmoid(torch.randn(count, generator=generator, dtype=torch.float32))


def train_levels(u: Tensor) -> tuple[Tensor, Tensor]:
    """Map u (B,) in [0,1) to timesteps and levels (B,): entry floor(1000 u) of 1000, 999, ..., 1, and these / 1000."""
    index = (u * TRAIN_TIMESTEPS).long().clamp(max=TRAIN_TIMESTEPS - 1)
    timestep = (TRAIN_TIMESTEPS - index).float()
    return timestep, timestep / TRAIN_TIMESTEPS


# --- sampling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Where a solver stops: integer timesteps (S,) and noise levels, S + 1 numbers down to 0."""

    solver: str
    timesteps: Tensor
    levels: tuple[float, ...]


def make_schedule(solver: str, shift: float, steps: int) -> Schedule:
    """Return the schedule of "dpm++" (from 0.999), "unipc" or "euler" (from 1), down to 0 and bent by `shift`.

    Raises:
        UniLIPError: unknown solver.
    """
    check_choice("solver", solver, SOLVERS)
    last = 1 / TRAIN_TIMESTEPS
    if solver == "euler":
        plain = torch.linspace(1, 1 / steps, steps, dtype=torch.float32)
    elif solver == "unipc":
        plain = torch.tensor([1 + i * ((last - 1) / steps) for i in range(steps)], dtype=torch.float64)
    else:
        plain = torch.tensor([1 - (1 + i * ((last - 1) / steps)) for i in range(steps, 0, -1)], dtype=torch.float64)
    levels = shift * plain / (1 + (shift - 1) * plain)
    if solver == "unipc":
        levels = levels.clamp(max=1 - 1e-6)  # at 1 its log ratio would be infinite
    timesteps = (levels * TRAIN_TIMESTEPS).long()
    return Schedule(solver, timesteps, (*levels.float().tolist(), 0.0))


def guide(both: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: velocities (2B,...), the unconditional ones first -> (B,...)."""
    unconditional, conditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def sample(velocity: Velocity, noise: Tensor, schedule: Schedule, on_step: OnStep | None = None) -> Tensor:
    """Integrate from noise (B,Z,h,w) to clean latents, in float32; `on_step` runs after each step."""
    s, x = schedule.levels, noise.to(torch.promote_types(noise.dtype, torch.float32))
    cleans: list[Tensor] = []  # predictions of the clean latent, newest last
    before = x
    for i, timestep in enumerate(schedule.timesteps):
        clean = x - s[i] * velocity(x, timestep).to(x.dtype)
        if schedule.solver == "unipc" and i > 0:
            x = unipc_correct(before, [*cleans, clean], s, i)
        before, cleans = x, [*cleans[-1:], clean]
        step = {"dpm++": dpm_step, "unipc": unipc_step, "euler": euler_step}[schedule.solver]
        x = step(x, cleans, s, i)
        if on_step is not None:
            replaced = on_step(i, timestep, x)
            x = x if replaced is None else replaced.to(x)
    return x


def log_ratio(s: float) -> float:
    """Return log((1-s) / s), half the log signal-to-noise ratio; infinite at 0."""
    return math.log(1 - s) - math.log(s) if s > 0 else math.inf


def first_order(x: Tensor, clean: Tensor, s: float, to: float) -> Tensor:
    """Go from level s to level `to` as if the clean latent were as predicted."""
    return to / s * x - (1 - to) * math.expm1(log_ratio(s) - log_ratio(to)) * clean


def euler_step(x: Tensor, cleans: list[Tensor], s: Sequence[float], i: int) -> Tensor:
    """Follow the velocity from level s[i] to s[i+1]."""
    return x + (s[i + 1] - s[i]) / s[i] * (x - cleans[-1])


def dpm_step(x: Tensor, cleans: list[Tensor], s: Sequence[float], i: int) -> Tensor:
    """DPM-Solver++ 2M, midpoint: second order but at both ends."""
    clean = cleans[-1]
    if 0 < i < len(s) - 2:
        r = _ratio(s, i, i - 1)
        clean = clean + (cleans[-2] - clean) / (2 * r)
    return first_order(x, clean, s[i], s[i + 1])


def _ratio(s: Sequence[float], i: int, j: int) -> float:
    """Return (l_j - l_i) / (l_{i+1} - l_i) for the log ratios l of levels."""
    here = log_ratio(s[i])
    return (log_ratio(s[j]) - here) / (log_ratio(s[i + 1]) - here)


def unipc_step(x: Tensor, cleans: list[Tensor], s: Sequence[float], i: int) -> Tensor:
    """Predictor of UniPC (B2): second order but at both ends."""
    moved = first_order(x, cleans[-1], s[i], s[i + 1])
    if not 0 < i < len(s) - 2:
        return moved
    growth = math.expm1(log_ratio(s[i]) - log_ratio(s[i + 1]))
    return moved - (1 - s[i + 1]) * growth * 0.5 * (cleans[-2] - cleans[-1]) / _ratio(s, i, i - 1)


def unipc_correct(before: Tensor, cleans: list[Tensor], s: Sequence[float], i: int) -> Tensor:
    """Corrector of UniPC: redo the step from `before`, at s[i-1], to s[i], now that the prediction there is known."""
    last, here = cleans[-2], cleans[-1]
    moved = first_order(before, last, s[i - 1], s[i])
    step = log_ratio(s[i - 1]) - log_ratio(s[i])
    growth = math.expm1(step)
    if i == 1 or len(cleans) < 3:
        weights, changes = [0.5], [here - last]
    else:
        r = _ratio(s, i - 1, i - 2)
        phi = growth / step - 1  # moments of the exponential over the step
        b1, b2 = phi / growth, (phi / step - 0.5) * 2 / growth
        first = (b2 - b1) / (r - 1)  # solves [[1, 1], [r, 1]] w = [b1, b2]
        weights, changes = [first, b1 - first], [(cleans[-3] - last) / r, here - last]
    total = sum((w * change for w, change in zip(weights, changes, strict=True)), torch.zeros_like(last))
    return moved - (1 - s[i]) * growth * total
