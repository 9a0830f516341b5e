"""A solver on a schedule as the matrix that it is: its states are sums of noise and velocities.

A `Plan` is read off `method.flow.sample` on unit vectors; `integrate` follows it with no tiny kernels and no waiting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from unilip.method.flow import OnStep, guide, make_schedule, sample


@dataclass(frozen=True)
class Plan:
    """A schedule and its coefficients."""

    timesteps: Tensor  # integers (S,)
    weights: Tensor  # (S,S+1), of the noise and of each velocity in the state after each step
    carried: Tensor  # (S,S), of what was added from outside after step j, in the state after step i


@lru_cache(maxsize=32)
def plan(solver: str, shift: float, steps: int, device: torch.device | str = "cpu") -> Plan:
    """Return the plan of a solver by name; the same object each time."""
    schedule = make_schedule(solver, shift, steps)
    units = torch.eye(2 * steps + 1, dtype=torch.float64).view(2 * steps + 1, 1, -1, 1, 1)
    states: list[Tensor] = []

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        return units[1 + len(states)]

    def on_step(i: int, timestep: Tensor, state: Tensor) -> Tensor:
        states.append(state.flatten())
        return state + units[1 + steps + i]

    sample(velocity, units[0], schedule, on_step)
    table = torch.stack(states).float().to(device)
    return Plan(schedule.timesteps.to(device), table[:, : steps + 1], table[:, steps + 1 :])


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    planned: Plan,
    guidance_scale: float,
    on_step: OnStep | None = None,
    guided: Sequence[bool] | None = None,
) -> Tensor:
    """Go from noise (B,Z,h,w) to clean latents, in float32; `on_step` may return replaced latents.

    With `guidance_scale` > 1, `velocity` gets the batch twice, unconditional rows first, in the steps `guided` marks.
    """
    latents = noise.float()
    history = latents.new_empty(len(planned.timesteps) + 1, *latents.shape)  # noise, then velocities
    history[0] = latents
    changes: list[tuple[int, Tensor]] = []
    for i, timestep in enumerate(planned.timesteps):
        both = guidance_scale > 1 and (guided is None or guided[i])
        rows = torch.cat([latents, latents]) if both else latents
        prediction = velocity(rows, timestep.expand(len(rows))).float()
        history[i + 1] = guide(prediction, guidance_scale) if both else prediction
        # a sum of products, not a matrix product, which may be done in fewer bits
        latents = (planned.weights[i, : i + 2].view(-1, *[1] * latents.dim()) * history[: i + 2]).sum(0)
        for j, change in changes:
            latents = latents + planned.carried[i, j] * change
        replaced = None if on_step is None else on_step(i, timestep, latents)
        if replaced is not None:
            replaced = replaced.to(latents)
            changes.append((i, replaced - latents))
            latents = replaced
    return latents
