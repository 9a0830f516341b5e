"""Sampling with less work: presets, reuse of blocks over steps, compiled steps, CUDA graphs, guidance on two devices.

In:  a DiT, the prepared condition of a batch, the timesteps of a schedule.
Out: the velocity that `flow.integrate` asks for, step by step. The preset "quality" and everything compiled give the
     same pictures up to rounding; "balanced" and "fast" trade a measured part of quality for fewer evaluations.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unilip.config import SAMPLING_PRESETS
from unilip.dit import DiT, PreparedCondition
from unilip.errors import UniLIPError

logger = logging.getLogger(__name__)

Step = Callable[[Tensor, Tensor, PreparedCondition], Tensor]
BUCKET = 128  # compiled steps see conditions of a multiple of this many tokens


@dataclass(frozen=True)
class Shortcut:
    """What a preset changes about sampling; what is None stays as the model or the caller has it.

    Attributes:
        steps, solver, shift: of the sampler.
        guided: first and last share of the steps, 0 to 1, between which guidance is on.
        reuse: from this share of the steps on, every second step runs only the first block and adds what the others
            added in the step before; 1 never does. Which steps these are depends on nothing but their number, so a
            picture does not depend on the batch it is drawn in.
    """

    steps: int | None = None
    solver: str | None = None
    shift: float | None = None
    guided: tuple[float, float] = (0.0, 1.0)
    reuse: float = 1.0

    def guided_steps(self, steps: int) -> list[bool]:
        """Tell for each step whether it is guided."""
        return [self.guided[0] <= i / steps < self.guided[1] for i in range(steps)]

    def reused_steps(self, steps: int) -> frozenset[int]:
        """Return the steps that reuse the one before; never the first, nor two in a row."""
        first = max(1, round(self.reuse * steps))
        return frozenset(range(first, steps, 2))


PRESETS: dict[str, Shortcut] = {
    "quality": Shortcut(),
    "balanced": Shortcut(steps=10, solver="unipc", shift=2.0),
    "fast": Shortcut(steps=6, solver="unipc", shift=2.0, guided=(0.0, 0.6)),
}
assert tuple(PRESETS) == SAMPLING_PRESETS


def shortcut(name: str) -> Shortcut:
    """Return a preset by name.

    Raises:
        UniLIPError: there is none.
    """
    if name not in PRESETS:
        raise UniLIPError(f"There is no sampling preset {name!r}; allowed: {', '.join(PRESETS)}.")
    return PRESETS[name]


class Velocity:
    """The velocity of one batch, called step after step with its latents, twice over where a step is guided.

    `condition` has a row for each of `count` pictures, and as many unconditional rows before them where there is
    guidance. `twin` is a copy of the DiT on another device that takes the unconditional rows.
    """

    def __init__(
        self,
        dit: DiT,
        condition: PreparedCondition,
        modulations: Tensor,
        count: int,
        reuse: frozenset[int] = frozenset(),
        step: Step | None = None,
        twin: DiT | None = None,
    ) -> None:
        self.dit, self.modulations, self.reuse = dit, modulations, reuse
        self.step = self._call if step is None else step
        guided = len(condition.mask) > count
        self.both = condition
        self.own = condition.part(slice(count, None)) if guided else condition
        self.twin = twin if guided else None
        if self.twin is not None:
            where = next(self.twin.parameters()).device
            self.theirs = condition.part(slice(0, count)).to(where)
            self.their_modulations = modulations.to(where)
        self.added: Tensor | None = None
        self.i = 0

    def __call__(self, rows: Tensor, timestep: Tensor) -> Tensor:
        """Return the velocity (R,Z,h,w) of latents (R,Z,h,w) in the next step; which one it is, is counted."""
        i, self.i = self.i, self.i + 1
        modulation = self.modulations[i : i + 1]
        rows = rows.to(modulation.dtype)
        guided = len(rows) > len(self.own.mask)
        if self.reuse:
            return self._reusing(i, rows, modulation, self.both if guided else self.own)
        if guided and self.twin is not None:
            unconditional, conditional = rows.chunk(2)  # both devices work at once: nothing here waits for either
            there = self.twin.step(
                unconditional.to(self.their_modulations.device), self.their_modulations[i : i + 1], self.theirs
            )
            here = self.step(conditional, modulation, self.own)
            return torch.cat([there.to(here.device), here])
        return self.step(rows, modulation, self.both if guided else self.own)

    def _call(self, latent: Tensor, modulation: Tensor, condition: PreparedCondition) -> Tensor:
        velocity: Tensor = self.dit(latent, None, condition, modulation)
        return velocity

    def _reusing(self, i: int, rows: Tensor, modulation: Tensor, condition: PreparedCondition) -> Tensor:
        """First-block caching: where a step is to reuse, add what the later blocks added in the step before."""
        size, last = rows.shape[-2:], len(condition.keys_values)
        first = self.dit.first_block(rows, modulation, condition)
        if i in self.reuse and self.added is not None and len(self.added) >= len(first):
            hidden = first + self.added[-len(first) :]  # the conditional rows come last
        else:
            hidden = self.dit.run_blocks(first, modulation, condition, 1, last, size)
            self.added = hidden - first
        return self.dit.finish(hidden, modulation, size)


# --- compiled -------------------------------------------------------------------------------------------------------


class Compiled:
    """Compiled step and decoder of a model, and on CUDA a recorded graph of the whole loop for each shape.

    Conditions grow to a multiple of `bucket` tokens by positions that nobody attends to, so that prompts of different
    lengths share their code: a picture size and a number of pictures at once are compiled once.
    """

    def __init__(self, dit: DiT, decode: Callable[[Tensor], Tensor], bucket: int, **options: Any) -> None:
        if bucket < 1:
            raise UniLIPError(f"bucket is {bucket}; it must be at least 1.")
        self.bucket = bucket
        self.told: set[tuple[Any, ...]] = set()
        step = torch.compile(dit.step, fullgraph=True, dynamic=False, **options)
        decoder = torch.compile(decode, dynamic=False, **options)

        def told_step(latent: Tensor, modulation: Tensor, condition: PreparedCondition) -> Tensor:
            rows, _, height, width = latent.shape
            what = "%d rows of %dx%d cells under conditions of %d tokens"
            with self.telling("the step of the transformer for " + what, rows, height, width, condition.mask.shape[-1]):
                velocity: Tensor = step(latent, modulation, condition)
                return velocity

        def told_decode(latent: Tensor) -> Tensor:
            with self.telling("the decoder for %d pictures of %dx%d cells", len(latent), *latent.shape[-2:]):
                pixels: Tensor = decoder(latent)
                return pixels

        self.step: Step = told_step
        self.decode: Callable[[Tensor], Tensor] = told_decode
        self.loops: dict[tuple[Any, ...], RecordedLoop | None] = {}
        self.weights: tuple[Any, ...] | None = None

    @contextlib.contextmanager
    def telling(self, what: str, *sizes: int) -> Iterator[None]:
        """Say what is compiled and, when the block is done, how long that took; only the first time for a shape."""
        first = (what, *sizes) not in self.told
        start = time.perf_counter()
        if first:
            self.told.add((what, *sizes))
            logger.info("compiling " + what + "; later pictures of this shape need not wait", *sizes)
        yield
        if first:
            logger.info("compiled in %.1f s", time.perf_counter() - start)

    def fit(self, condition: PreparedCondition) -> PreparedCondition:
        """Return a condition grown to a multiple of the bucket."""
        return condition.padded(-(-condition.mask.shape[-1] // self.bucket) * self.bucket)

    def loop(
        self,
        key: tuple[Any, ...],
        weights: tuple[Any, ...] | None,
        make: Callable[[PreparedCondition], Callable[[Tensor], Tensor]],
        noise: Tensor,
        condition: PreparedCondition,
    ) -> Tensor:
        """Run a loop from noise (B,Z,h,w), as a recorded graph on CUDA, else directly.

        `make(condition)` returns a function that may run once: noise -> latents. `key` names everything else that the
        loop depends on; recordings are thrown away when `weights`, a fingerprint, changes.
        """
        if noise.device.type != "cuda":
            return make(condition)(noise)
        if weights != self.weights:
            self.loops.clear()
            self.weights = weights
        key = (*key, tuple(noise.shape), noise.device, tuple(condition.mask.shape))
        if key not in self.loops:
            logger.info("recording the denoising loop for %d pictures; this happens once for a shape", len(noise))
            try:
                self.loops[key] = RecordedLoop(make, noise, condition)
            except RuntimeError as error:  # an operation that cannot be recorded: the loop still runs, step by step
                logger.warning("the loop could not be recorded (%s); it runs step by step", str(error).splitlines()[0])
                self.loops[key] = None
        recorded = self.loops[key]
        return make(condition)(noise) if recorded is None else recorded(noise, condition)


class RecordedLoop:
    """A whole denoising loop as one CUDA graph: one launch for all steps, on tensors of its own."""

    def __init__(
        self,
        make: Callable[[PreparedCondition], Callable[[Tensor], Tensor]],
        noise: Tensor,
        condition: PreparedCondition,
        warm_up: int = 2,
    ) -> None:
        self.noise, self.condition = noise.clone(), condition.clone()
        side = torch.cuda.Stream(noise.device)
        side.wait_stream(torch.cuda.current_stream(noise.device))
        with torch.cuda.stream(side):
            for _ in range(warm_up):  # compiles, and lets the libraries choose and reserve what they need
                make(self.condition)(self.noise)
        torch.cuda.current_stream(noise.device).wait_stream(side)
        run = make(self.condition)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.latents = run(self.noise)

    def __call__(self, noise: Tensor, condition: PreparedCondition) -> Tensor:
        """Copy the inputs in, replay, and copy the latents out."""
        self.noise.copy_(noise)
        self.condition.copy_(condition)
        self.graph.replay()
        return self.latents.clone()


def fingerprint(modules: Sequence[nn.Module]) -> tuple[Any, ...] | None:
    """Return what changes when the weights of modules do: a step of training, a cast, a move, an adapter.

    None where it cannot be told (weights made in inference mode keep no count of their changes).
    """
    found: list[Any] = []
    try:
        for root in modules:
            for module in root.modules():
                found += [(id(p), p._version, p.device, p.dtype) for p in module._parameters.values() if p is not None]
                if hasattr(module, "_active_adapter"):  # of peft: switched and scaled without a change of the weights
                    adapter = (module._active_adapter, getattr(module, "_disable_adapters", None))
                    found.append((str(adapter), str(getattr(module, "scaling", None))))
    except RuntimeError:
        return None
    return tuple(found)
