"""Flow matching as free functions: the straight path, its velocity, the loss, the schedules, sampling with guidance.

x is a clean latent, e noise, s in [0,1] the noise level: x_s = (1-s) x + s e, velocity target e - x (paper, section
3.2). Training uses the 1000 levels of the shift-1 schedule; sampling a shifted schedule and a multistep solver.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from unilip.config import SOLVERS as SOLVERS
from unilip.errors import UniLIPError

TRAIN_TIMESTEPS = 1000


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return (1-s) clean + s noise; sigma (B,) broadcasts over (B,Z,h,w)."""
    sigma = sigma.view(-1, *[1] * (clean.dim() - 1))
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity of the straight path, noise - clean."""
    return noise - clean


def flow_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity, in float32 whatever the inputs are."""
    return (velocity.float() - velocity_target(clean.float(), noise.float())).square().mean()


@functools.cache
def train_schedule() -> tuple[Tensor, Tensor]:
    """Return the 1000 training timesteps and their sigmas, both descending (shift 1)."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=1.0)
    return scheduler.timesteps, scheduler.sigmas[:TRAIN_TIMESTEPS]


def logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` values u = sigmoid(Normal(0,1)) in (0,1), on the CPU."""
    return torch.sigmoid(torch.randn(count, generator=generator))


def train_levels(u: Tensor) -> tuple[Tensor, Tensor]:
    """Map u (B,) in [0,1) to training timesteps and sigmas (B,): the floor(1000 u)-th entry of the schedule."""
    timesteps, sigmas = train_schedule()
    index = (u.cpu() * TRAIN_TIMESTEPS).long().clamp(max=TRAIN_TIMESTEPS - 1)
    return timesteps[index].to(u.device), sigmas[index].to(u.device)


def make_scheduler(solver: str, shift: float) -> Any:
    """Build the sampler: "dpm++" (DPM-Solver++ 2M midpoint, as published), "euler" or "unipc", with a shifted schedule.

    Raises:
        UniLIPError: unknown solver.
    """
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2)
    if solver == "dpm++":
        return DPMSolverMultistepScheduler(
            num_train_timesteps=TRAIN_TIMESTEPS, algorithm_type="dpmsolver++", solver_type="midpoint",
            lower_order_final=True, final_sigmas_type="zero", **flow,
        )  # fmt: skip
    if solver == "unipc":
        return UniPCMultistepScheduler(num_train_timesteps=TRAIN_TIMESTEPS, final_sigmas_type="zero", **flow)
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=shift)
    raise UniLIPError(f"There is no solver {solver!r}; allowed: {', '.join(SOLVERS)}.")


def draw_noise(
    count: int, shape: Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    """Draw float32 noise (count, *shape) on the CPU, one picture after the other.

    A picture's noise depends on its generator's state alone, never on the batch it is drawn in: one generator serves
    the pictures in order, a list holds one for each.
    """
    if isinstance(generator, torch.Generator) or generator is None:
        generators: Sequence[torch.Generator | None] = [generator] * count
    else:
        generators = list(generator)
        if len(generators) != count:
            raise UniLIPError(
                f"{len(generators)} generators were given for {count} pictures; give one, or one for each."
            )
    return torch.stack(
        [torch.randn(*shape, generator=g, device=g.device if g is not None else "cpu").cpu() for g in generators]
    )


@dataclass(frozen=True)
class Plan:
    """A solver on a schedule of S steps, as the matrix that it is: its states are sums of noise and velocities.

    Attributes:
        timesteps: integers (S,).
        weights: (S,S+1): of the noise and of each velocity in the state after each step.
        carried: (S,S): of what was added from outside after step j, in the state after step i.
    """

    timesteps: Tensor
    weights: Tensor
    carried: Tensor

    def to(self, device: torch.device | str) -> Plan:
        """Move all three tensors."""
        return Plan(self.timesteps.to(device), self.weights.to(device), self.carried.to(device))


def make_plan(scheduler: Any, steps: int) -> Plan:
    """Read the plan off a sampler, by running it on the unit vectors in place of noise, velocities and changes.

    So the formulas stay the library's, while the loop neither waits for the device nor launches dozens of tiny kernels.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # its own choice spends the last step on almost no noise
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    else:
        scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)  # else it is looked up by timestep, which fails where two steps share one
    count = len(scheduler.timesteps)
    units = torch.eye(2 * count + 1).view(2 * count + 1, 1, -1, 1, 1)
    state, states = units[0], []
    for i, timestep in enumerate(scheduler.timesteps):
        state = scheduler.step(units[1 + i], timestep, state, return_dict=False)[0]
        states.append(state.flatten())
        state = state + units[1 + count + i]
    table = torch.stack(states)
    return Plan(scheduler.timesteps.long(), table[:, : count + 1], table[:, count + 1 :])


@lru_cache(maxsize=32)
def plan(solver: str, shift: float, steps: int) -> Plan:
    """Return the plan of a solver by name, on the CPU; the same object each time."""
    return make_plan(make_scheduler(solver, shift), steps)


def denoise(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    scheduler: Any,
    steps: int,
    guidance_scale: float,
    on_step: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
    guided: Sequence[bool] | None = None,
) -> Tensor:
    """Integrate from noise (B,Z,h,w) to clean latents.

    With `guidance_scale` > 1, `velocity` receives the batch twice (unconditional rows first) and the result is
    uncond + g (cond - uncond); otherwise once, as in the steps that `guided` marks False. `on_step(i, timestep,
    latents)` runs after each step and may return replaced latents. The solver's state is kept in float32.
    """
    planned = make_plan(scheduler, steps).to(noise.device)
    return integrate(velocity, noise, planned, guidance_scale, on_step, guided)


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    planned: Plan,
    guidance_scale: float,
    on_step: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
    guided: Sequence[bool] | None = None,
) -> Tensor:
    """Do what `denoise` says along a plan on the device; nothing in it waits for the device."""
    latents = noise.float()
    history = latents.new_empty(len(planned.timesteps) + 1, *latents.shape)  # noise, then velocities
    history[0] = latents
    changes: list[tuple[int, Tensor]] = []
    for i, timestep in enumerate(planned.timesteps):
        both = guidance_scale > 1 and (guided is None or guided[i])
        rows = torch.cat([latents, latents]) if both else latents
        prediction = velocity(rows, timestep.expand(rows.shape[0])).float()
        if both:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        history[i + 1] = prediction
        # a sum of products, not a matrix product, which may be done in fewer bits
        latents = (planned.weights[i, : i + 2].view(-1, *[1] * latents.dim()) * history[: i + 2]).sum(0)
        for j, change in changes:
            latents = latents + planned.carried[i, j] * change
        if on_step is not None:
            replaced = on_step(i, timestep, latents)
            if replaced is not None:
                replaced = replaced.to(latents)
                changes.append((i, replaced - latents))
                latents = replaced
    return latents
