"""Sampling with less work: presets, compiled steps, CUDA graphs, classifier-free guidance on two devices.

"quality" and everything compiled give the same pictures up to rounding; "balanced" and "fast" trade a measured part of
quality for fewer evaluations; "turbo" jumps, by weights that were trained for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unilip.errors import UniLIPError, check_choice, check_number
from unilip.fast import decoder as fast_decoder
from unilip.fast.dit import PreparedCondition, packable, step
from unilip.fast.products import Multiply, Products, plain
from unilip.fast.solver import integrate, plan
from unilip.method.config import SAMPLING_PRESETS, SOLVERS, SamplingConfig, UniLIPConfig
from unilip.method.dit import DiT
from unilip.method.flow import TRAIN_TIMESTEPS, OnStep, make_schedule
from unilip.method.model import Network

logger = logging.getLogger(__name__)

Run = Callable[[Tensor], Tensor]  # noise -> latents
Make = Callable[[PreparedCondition, Tensor], Run]  # condition, modulations -> what may run once
BUCKET = 128  # compiled steps see conditions padded to a multiple of this many tokens, so prompts share their code


PRESETS: dict[str, dict[str, Any]] = {  # what each changes of `Settings`
    "quality": {},
    "balanced": {"num_inference_steps": 10, "solver": "unipc", "flow_shift": 2.0},
    "fast": {"num_inference_steps": 6, "solver": "unipc", "flow_shift": 2.0, "guided": 0.6},
    "turbo": {"solver": "euler", "flow_shift": 2.0, "jumps": True},
}
assert tuple(PRESETS) == SAMPLING_PRESETS


@dataclass(frozen=True)
class Settings(SamplingConfig):
    """How one batch is drawn: the model's own settings, changed by a preset, changed by what the caller gives."""

    guided: float = 1.0  # guidance in the first steps alone, this share of them
    jumps: bool = False  # of few-step weights

    @classmethod
    def of(cls, config: UniLIPConfig, preset: str = "quality", **given: Any) -> Settings:
        """Combine; what is None in `given` was not given. Raises UniLIPError: unknown, out of range, no weights."""
        check_choice("sampling preset", preset, PRESETS)
        if (steps := given.get("num_inference_steps")) is not None:
            given["num_inference_steps"] = check_number("num_inference_steps", steps, 1, 1000, whole=True)
        if (guidance := given.get("guidance_scale")) is not None:
            given["guidance_scale"] = check_number("guidance_scale", guidance, 0)
        if (solver := given.get("solver")) is not None:
            check_choice("solver", solver, SOLVERS)
        values, chosen = dataclasses.asdict(config.sampling), PRESETS[preset]
        if chosen.get("jumps"):
            check_jumps(config, preset, given)
            values |= {"num_inference_steps": config.dit.few_steps[0], "guidance_scale": 1.0}
        return cls(**values | chosen | {name: value for name, value in given.items() if value is not None})

    def guided_steps(self) -> list[bool]:
        """Tell for each step whether it is guided."""
        on = self.guidance_scale > 1
        return [on and i / self.num_inference_steps < self.guided for i in range(self.num_inference_steps)]


def check_jumps(config: UniLIPConfig, preset: str, given: Mapping[str, Any]) -> None:
    """Refuse jumps of a model that was not trained for them, and settings that they have no use for."""
    known = config.dit.few_steps
    if not known:
        raise UniLIPError(
            f"The preset {preset} needs few-step weights, which this model ({config.name}) lacks; train the recipe "
            "SIZE/few on it, load an adapter of SIZE/few_lora, or choose quality, balanced or fast."
        )
    if (steps := given.get("num_inference_steps")) is not None and steps not in known:
        raise UniLIPError(
            f"num_inference_steps is {steps}; with the preset {preset} this model was trained for "
            f"{', '.join(map(str, known))} of them. Leave it out, or choose another preset."
        )
    if (guidance := given.get("guidance_scale")) is not None and guidance > 1:
        raise UniLIPError(
            f"guidance_scale is {guidance:g}; with the preset {preset} it is 1: few-step weights have learned what "
            "guidance would do, and guiding them again would overdo it. Leave it out."
        )
    if given.get("solver") not in (None, PRESETS[preset]["solver"]):
        raise UniLIPError(f"solver is {given['solver']!r}; the preset {preset} jumps without one. Leave it out.")


def denoise(
    dit: DiT,
    condition: PreparedCondition,
    noise: Tensor,
    settings: Settings,
    *,
    compiled: Compiled | None = None,
    twin: DiT | None = None,
    products: Products | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw latents (R,Z,h,w) from noise; under guidance R unconditional rows come first, or go to `twin`, a copy."""
    planned = plan(settings.solver, settings.flow_shift, settings.num_inference_steps, noise.device)
    guided = settings.guided_steps()
    net, count = dit.transformer, len(noise)
    if settings.jumps:
        levels = make_schedule(settings.solver, settings.flow_shift, settings.num_inference_steps).levels
        times = torch.tensor(levels, device=noise.device) * TRAIN_TIMESTEPS
        modulations = net.modulate(times[:-1], times[1:])
    else:
        modulations = net.modulate(planned.timesteps)
    multiply: Multiply = plain
    if products is not None and compiled is None:
        calls = sum(now or not any(guided) for now in guided)
        multiply = products.multiply(packable(net), len(condition.mask) * noise[0, 0].numel(), calls)

    one = functools.partial(step, net, multiply=multiply) if compiled is None else compiled.step

    def make(rows: PreparedCondition, times: Tensor) -> Run:
        """Return a loop that may run once: which step it is in is counted."""
        both = len(rows.mask) > count
        own = rows[count:] if both else rows
        there = times.device if twin is None else next(twin.parameters()).device
        steps = zip(times.split(1), times.to(there).split(1), strict=True)
        if both and twin is not None:
            theirs = rows[:count].map(lambda tensor: tensor.to(there))

        def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
            modulation, their_modulation = next(steps)
            latents = latents.to(modulation.dtype)
            if len(latents) == len(own.mask):
                return one(latents, modulation, own)
            if twin is None:
                return one(latents, modulation, rows)
            unconditional, conditional = latents.chunk(2)  # both devices work at once: nothing here waits for either
            first = step(twin.transformer, unconditional.to(there), their_modulation, theirs)
            here = one(conditional, modulation, own)
            return torch.cat([first.to(here.device), here])

        return lambda start: integrate(velocity, start, planned, settings.guidance_scale, on_step, guided)

    if compiled is not None:
        condition = condition.padded(-(-condition.mask.shape[-1] // compiled.bucket) * compiled.bucket)
        if noise.device.type == "cuda" and on_step is None and twin is None:
            return compiled.recorded(settings, make, noise, condition, modulations)
    return make(condition, modulations)(noise)


class Compiled:
    """Compiled step and decoder of a network, and on CUDA a recorded graph of the whole loop for each shape."""

    def __init__(self, network: Network, bucket: int = BUCKET, **options: Any) -> None:
        self.bucket, self.network = bucket, network
        self.told: set[tuple[Any, ...]] = set()
        self.loops: dict[tuple[Any, ...], RecordedLoop | None] = {}
        self._step = torch.compile(step, fullgraph=True, dynamic=False, **options)
        self._decode = torch.compile(fast_decoder.decode, dynamic=False, **options)

    def step(self, latent: Tensor, modulation: Tensor, condition: PreparedCondition) -> Tensor:
        what = "the step of the transformer for %d rows of %dx%d cells under conditions of %d tokens"
        with self.telling(what, len(latent), *latent.shape[-2:], condition.mask.shape[-1]):
            return self._step(self.network.dit.transformer, latent, modulation, condition)

    def decode(self, latent: Tensor) -> Tensor:
        with self.telling("the decoder for %d pictures of %dx%d cells", len(latent), *latent.shape[-2:]):
            return self._decode(self.network.pixel_decoder.decoder, latent)

    @contextlib.contextmanager
    def telling(self, what: str, *sizes: int) -> Iterator[None]:
        """Say what is compiled and, when the block is done, how long that took; only the first time for a shape."""
        first, start = (what, *sizes) not in self.told, time.perf_counter()
        if first:
            self.told.add((what, *sizes))
            logger.info("compiling " + what + "; later pictures of this shape need not wait", *sizes)
        yield
        if first:
            logger.info("compiled in %.1f s", time.perf_counter() - start)

    def recorded(
        self, settings: Settings, make: Make, noise: Tensor, condition: PreparedCondition, modulations: Tensor
    ) -> Tensor:
        """Run a loop as a graph: it sees values written into weights; weights elsewhere, or `forget`, throw it away."""
        where = tuple(p.data_ptr() for p in self.network.dit.transformer.parameters())
        key = (settings, tuple(noise.shape), noise.device, tuple(condition.mask.shape), where)
        if key not in self.loops:
            self.loops = {known: loop for known, loop in self.loops.items() if known[-1] == where}
            logger.info("recording the denoising loop for %d pictures; this happens once for a shape", len(noise))
            try:
                self.loops[key] = RecordedLoop(make, noise, condition, modulations)
            except RuntimeError as error:  # an operation that cannot be recorded: the loop still runs, step by step
                logger.warning("the loop could not be recorded (%s); it runs step by step", str(error).splitlines()[0])
                self.loops[key] = None
        loop = self.loops[key]
        return make(condition, modulations)(noise) if loop is None else loop(noise, condition, modulations)

    def forget(self) -> None:
        self.loops.clear()


class RecordedLoop:
    """A whole denoising loop as one CUDA graph: one launch for all steps, on tensors of its own."""

    def __init__(self, make: Make, noise: Tensor, condition: PreparedCondition, modulations: Tensor) -> None:
        self.noise, self.condition, self.modulations = noise.clone(), condition.map(Tensor.clone), modulations.clone()
        side = torch.cuda.Stream(noise.device)
        side.wait_stream(torch.cuda.current_stream(noise.device))
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, and lets the libraries choose and reserve what they need
                make(self.condition, self.modulations)(self.noise)
        torch.cuda.current_stream(noise.device).wait_stream(side)
        self.run = make(self.condition, self.modulations)  # kept, with whatever else the graph reads
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.latents = self.run(self.noise)

    def __call__(self, noise: Tensor, condition: PreparedCondition, modulations: Tensor) -> Tensor:
        """Copy the inputs in, replay, and copy the latents out."""
        self.noise.copy_(noise)
        self.condition.copy_(condition)
        self.modulations.copy_(modulations)
        self.graph.replay()
        return self.latents.clone()
