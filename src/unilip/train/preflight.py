"""Will a recipe fit, and how long will it take? Asked before a GPU hour is spent, on any computer, without weights.

In:  a recipe and hardware ("h100:8"). Out: bytes for each process by what they are for, operations and seconds a step.
A step is run on tensors that have shapes but no content, and what is alive at once is counted. Time assumes
`EFFICIENCY` of the hardware's peak.
"""

import os
import re
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from unilip.errors import ConfigError
from unilip.method.config import UniLIPConfig
from unilip.method.model import PARTS
from unilip.method.text import Tokens
from unilip.model import UniLIP
from unilip.recipes.record import FewSteps, Flow, Recipe, Reconstruct, Shrink, override
from unilip.shapes import cells
from unilip.train.adapters import target_layers
from unilip.train.build import enable_checkpointing, parse_init, recipe_config, trained_parameters
from unilip.train.objectives import make_objective, needed_parts
from unilip.train.parallel import units
from unilip.train.processes import divided

GIB = 1 << 30
EFFICIENCY = 0.35  # of the peak of dense bfloat16 (or float32) products; an assumption, not a measurement
TEXT_TOKENS = 128  # of a prompt, beside its pictures
SPARE = (0.92, GIB)  # share of the memory that fragments do not take, and what a process's context needs


@dataclass(frozen=True)
class Hardware:
    """One accelerator, or a computer without: bytes of memory, and peak operations a second by precision."""

    name: str
    memory: float
    bfloat16: float
    float32: float
    count: int = 1

    @property
    def usable(self) -> float:
        return self.memory * SPARE[0] - SPARE[1]

    def __str__(self) -> str:
        return f"{self.count} x {self.name} ({self.memory / GIB:.0f} GiB)"


# Memory in GiB, and the makers' dense peaks in 10^12 operations a second: bfloat16, float32 without TF32.
KNOWN = {
    "l4": (24, 121, 30), "rtx4090": (24, 165, 83), "a100-40": (40, 312, 19.5), "l40s": (48, 362, 92),
    "a100-80": (80, 312, 19.5), "h100": (80, 989, 67), "h200": (141, 989, 67), "b200": (180, 2250, 75),
}  # fmt: skip


def hardware(text: str) -> Hardware:
    """Read "h100", "h100:8" or "here". Raises ConfigError: nothing of that name is known."""
    found = re.fullmatch(r"([\w-]+?)(?::(\d+))?", text.lower())
    name, count = (found[1], int(found[2] or 1)) if found else ("", 0)
    if name == "here" and count:
        return here(count)
    if name not in KNOWN or not count:
        raise ConfigError(f"There is no hardware {text!r}; allowed: here, or NAME:COUNT of {', '.join(KNOWN)}.")
    memory, bfloat16, float32 = KNOWN[name]
    return Hardware(name, memory * GIB, bfloat16 * 1e12, float32 * 1e12, count)


def here(count: int = 1) -> Hardware:
    """Describe this computer: its GPUs, or its memory and how fast it multiplies."""
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        known = [k for k in KNOWN if k.split("-")[0] in about.name.lower().replace(" ", "")]
        peaks = KNOWN[known[-1]][1:] if known else (100.0, 20.0)
        return Hardware(about.name, about.total_memory, peaks[0] * 1e12, peaks[1] * 1e12, count)
    a = torch.ones(512, 512)
    begun, rounds = time.perf_counter(), 0
    while time.perf_counter() - begun < 0.2:
        a @ a
        rounds += 1
    rate = rounds * 2 * 512**3 / (time.perf_counter() - begun)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    return Hardware("this CPU", memory, rate, rate, count)


class Alive(TorchDispatchMode):
    """Counts bytes of tensors made inside and alive at once (`peak`: the most), and operations of products."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operations += operations_of(function.overloadpacket, args, kwargs or {}, result)
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for storage in (t.untyped_storage() for t in tree_iter(result) if isinstance(t, Tensor)):
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known and key not in given:
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def operations_of(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return how many additions and multiplications a call takes; those of single elements do not count."""
    from torch.utils.flop_counter import flop_registry

    if function in flop_registry:
        return int(flop_registry[function](*args, **kwargs, out_val=result))
    if "scaled_dot_product" not in (name := str(function)):
        return 0
    query, key = args[1:3] if "backward" in name else args[:2]  # backward: the gradient comes first
    products = 5 if "backward" in name else 2
    return 2 * products * query.numel() * key.shape[-2]


@dataclass(frozen=True)
class Step:
    """What a step of some batch size needs: the model's sizes, and per batch the bytes alive and the operations."""

    trained: int  # parameters
    frozen: int
    largest_unit: int  # parameters that FSDP2 gathers together, the largest such group
    outside_units: int  # parameters in no such group: gathered for the whole step
    activations: tuple[float, float]  # bytes: constant, and for each sample
    operations: float  # of a sample, forward and backward


def batch_of(recipe: Recipe, config: UniLIPConfig, size: int, edits: bool) -> dict[str, Any]:
    """Make a batch of the shapes that a recipe's data have."""
    width, height = max(recipe.data.sizes or ((config.image_size, config.image_size),), key=cells)  # the largest
    images = torch.zeros(size, 3, height, width, dtype=torch.uint8)
    if isinstance(recipe.objective, Reconstruct):
        return {"images": images}
    length = TEXT_TOKENS + cells((width, height)) * edits
    slots = torch.zeros(size, length, dtype=torch.bool)
    tokens = Tokens(torch.zeros(size, length, dtype=torch.long), torch.ones(size, length, dtype=torch.long), slots)
    batch: dict[str, Any] = {"targets": images, "prompts": tokens, "seeds": list(range(size))}
    if isinstance(recipe.objective, FewSteps):
        batch["blanks"] = tokens if edits else Tokens(*(t[:1] for t in vars(tokens).values()))
    return batch | ({"sources": images} if edits else {})


def simplified(recipe: Recipe) -> Recipe:
    """Replace what needs files by what is about as large: other teachers and latents; contrast is left out."""
    objective = recipe.objective
    if isinstance(objective, Shrink):
        raise ConfigError(f"{recipe.name} needs less than the tokenizer's other stages; a preflight is for those.")
    if isinstance(objective, Reconstruct):
        objective = replace(objective, perceptual_source="teacher", gan_start=0, contrastive=0.0)
    elif isinstance(objective, Flow):
        objective = replace(objective, target="unilip")
    else:
        raise ConfigError(
            f"{recipe.name} learns from text whose length decides its memory; a preflight is for flow and tokenizer "
            "stages."
        )
    return replace(recipe, objective=objective)


def measure(recipe: Recipe) -> Step:
    """Run a recipe's step on tensors without content, at two batch sizes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    recipe = simplified(recipe)
    config = recipe_config(recipe)
    wanted = {*needed_parts(recipe.objective), *(prefix.split(".")[0] for prefix, _ in recipe.trains)}
    for parts, _ in parse_init(recipe):
        wanted |= set(PARTS) if parts == ("all",) else set(parts)
    peaks, operations = [], []
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = UniLIP(config, parts=[part for part in PARTS if part in wanted])
        objective = make_objective(recipe, model, {})
        model.requires_grad_(False)
        if recipe.adapter.rank:  # the weights beside which it stands need the same activations
            named = [model.get_parameter(f"{layer}.weight") for layer in target_layers(recipe, model)]
        else:
            named = [parameter for parameter, _ in trained_parameters(recipe, model).values()]
        for parameter in named:
            parameter.requires_grad_(True)
        if recipe.gradient_checkpointing or recipe.selective_checkpointing:
            enable_checkpointing(model, recipe.selective_checkpointing)
        for size in (1, 2):
            batch = batch_of(recipe, config, size, edits=recipe.data.edit_share > 0)
            with Alive() as alive:
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                    loss, _ = objective.loss(batch, 0)
                loss.backward()
            peaks.append(alive.peak)
            operations.append(alive.operations / size)
            model.zero_grad(set_to_none=True)
            objective.heads.zero_grad(set_to_none=True)
        groups = [sum(map(_count, modules)) for modules in units(model)]
        everything, own = _count(model), sum(p.numel() for p in named)
        moved = own + _count(objective.heads)
    trained, frozen = moved, everything - own
    if recipe.adapter.rank:
        rank, dora = recipe.adapter.rank, recipe.adapter.dora
        trained = sum(rank * (w.shape[0] + w.shape[1]) + w.shape[0] * dora for w in named)  # beside weights (out, in)
        frozen = everything
    rise = float(peaks[1] - peaks[0])
    constant = max(0.0, peaks[0] - rise - moved * 4)  # gradients, alive at the end, count by themselves
    return Step(trained, frozen, max(groups, default=0), everything - sum(groups), (constant, rise), operations[-1])


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Estimate:
    """Bytes in each process by purpose, and seconds of a step and of the run."""

    recipe: Recipe
    hardware: Hardware
    memory: dict[str, float]
    operations: float
    seconds: float

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.hardware.usable

    @property
    def hours(self) -> float:
        return self.seconds * self.recipe.steps / 3600

    def lines(self) -> Iterator[str]:
        for name, value in self.memory.items():
            yield f"{name:12} {value / GIB:8.2f} GiB"
        yield f"{'in all':12} {self.total / GIB:8.2f} GiB of {self.hardware.usable / GIB:.1f} usable in {self.hardware}"
        yield (
            f"about {self.operations / 1e12:.3g} x 10^12 operations and {self.seconds:.3g} s a step, "
            f"{self.hours:.3g} h for {self.recipe.steps:,} steps, at {EFFICIENCY:.0%} of the hardware's peak"
        )


def estimate(recipe: Recipe, machine: Hardware, step: Step | None = None) -> Estimate:
    """Estimate a run; `step` is what `measure` found for the recipe, where it is known already.

    Raises ConfigError: the processes cannot share a step equally, or the recipe is of a kind that cannot be estimated.
    """
    own = divided(recipe, machine.count)
    step = step or measure(recipe)
    kept = 4 if recipe.weights_dtype == "float32" else 2
    shares = machine.count if recipe.parallel == "fsdp" else 1
    memory = {
        "weights": (step.frozen * 4 + step.trained * kept) / shares,
        "gradients": step.trained * kept / shares,
        "optimizer": 2 * step.trained * kept / shares,
        "averages": step.trained * 4 / shares if recipe.ema else 0.0,
        "activations": step.activations[0] + step.activations[1] * own.batch_size,
    }
    if shares > 1:
        compute = 2 if recipe.dtype == "bfloat16" else 4
        memory["gathered"] = (2 * step.largest_unit + step.outside_units) * compute
    operations = step.operations * recipe.batch_size * recipe.accumulate
    rate = machine.bfloat16 if recipe.dtype == "bfloat16" else machine.float32
    return Estimate(recipe, machine, memory, operations, operations / machine.count / rate / EFFICIENCY)


def remedies(recipe: Recipe, machine: Hardware, step: Step) -> Iterator[tuple[str, Estimate]]:
    """Yield (what to do, its estimate) of changes with which the run would fit; the global batch stays the same."""
    bases = {"": step}  # from what costs least time to what costs least memory
    if not (recipe.gradient_checkpointing or recipe.selective_checkpointing or recipe.compile):
        bases["selective_checkpointing=1"] = measure(override(recipe, ["selective_checkpointing=1"]))
    if not recipe.gradient_checkpointing:
        least = f"{'selective_checkpointing=0 ' * recipe.selective_checkpointing}gradient_checkpointing=1"
        bases[least] = measure(override(recipe, least.split()))
    changes = [(words, words) for words in bases if words]
    for words in bases:
        size, accumulate = recipe.batch_size, recipe.accumulate
        while size % 2 == 0:
            size, accumulate = size // 2, accumulate * 2
            changes.append((f"batch_size={size} accumulate={accumulate} {words}", words))
    seen: set[str] = set()
    for text, base in changes:
        found = estimate(override(recipe, text.split()), machine, bases[base])
        if found.fits and base not in seen:
            seen.add(base)
            yield _options(text), found
    if recipe.parallel == "ddp":
        for count in (2, 4, 8, 16, 32):
            if count < machine.count or (recipe.batch_size * recipe.accumulate) % count:
                continue
            words, smallest = f"parallel=fsdp {[*bases][-1]}", [*bases.values()][-1]
            found = estimate(override(recipe, words.split()), replace(machine, count=count), smallest)
            if found.fits:
                yield f"{_options(words)} on {count} of them", found
                break
    for name, (size, *_) in sorted(KNOWN.items(), key=lambda item: item[1][0]):
        larger = hardware(f"{name}:{machine.count}")
        if size * GIB > machine.memory and (found := estimate(recipe, larger, step)).fits:
            yield f"as it is, on {larger}", found
            break


def _options(words: str) -> str:
    return " ".join(f"--set {word}" for word in words.split())


def preflight(recipe: Recipe, machine: Hardware) -> Estimate:
    """Estimate a run, and refuse one that cannot fit. Raises ConfigError: it cannot; the message says what would."""
    step = measure(recipe)
    found = estimate(recipe, machine, step)
    if not found.fits:
        help_ = "; or ".join(text for text, _ in remedies(recipe, machine, step))
        raise ConfigError(
            f"{recipe.name} needs about {found.total / GIB:.1f} GiB in each process, but {machine} offers "
            f"{max(0.0, machine.usable) / GIB:.1f}. It would fit with: {help_ or 'nothing that is known here'}."
        )
    return found
