"""The one training loop: build what a recipe names, step, log, show, save, resume; the result is a model folder.

Everything random in a step comes from (seed, step), so a resumed run continues bit for bit on the same CPU.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from unilip.checkpoint import open_checkpoint
from unilip.config import UniLIPConfig, preset
from unilip.connector import copy_from_llm
from unilip.errors import ConfigError, UniLIPError
from unilip.model import PARTS, UniLIP
from unilip.preprocess import Processor, normalise, to_images
from unilip.train import state as states
from unilip.train.batches import Batches, iterate, make_batches, to_device
from unilip.train.objectives import Objective, make_objective, to_unit
from unilip.train.recipe import Data, Recipe, leaves

logger = logging.getLogger(__name__)
FREE_TO_CHANGE = ("log_every", "sample_every", "save_every", "keep", "note", "data.workers")


class Interrupted(UniLIPError):
    """A signal stopped the run after its state was saved."""


# --- building --------------------------------------------------------------------------------------------------------


def locate(source: str, runs: Path) -> str:
    """Return the path of an init source: a recipe's result under `runs`, a path, or a hub id as it is."""
    result = runs / source / "final"
    return str(result) if result.exists() else source


def parse_init(recipe: Recipe) -> list[tuple[tuple[str, ...], str]]:
    """Split "encoder,mllm=pico/clip" into parts and source; "all" means every part that the source has."""
    pairs = []
    for text in recipe.init:
        names, sep, source = text.partition("=")
        parts = tuple(names.split(","))
        unknown = sorted(set(parts) - set(PARTS) - {"all", "autoencoder"})
        if not sep or unknown:
            raise ConfigError(f"init {text!r} must be PARTS=SOURCE with parts of: all, autoencoder, {', '.join(PARTS)}.")
        pairs.append((parts, source))
    return pairs


def build_model(recipe: Recipe, runs: Path, objective_parts: tuple[str, ...]) -> UniLIP:
    """Build the recipe's model: fresh where nothing is named, else loaded strictly from earlier stages or folders."""
    config = preset(recipe.model)
    if recipe.data.image_size:
        config = config.replace(image_size=recipe.data.image_size)
    loaded: dict[str, UniLIP] = {}
    processor: Processor | None = None
    for parts, source in parse_init(recipe):
        if parts == ("autoencoder",):
            continue
        path = locate(source, runs)
        if source.count("/") == 1 and path == source and not Path(path).exists() and (runs / source).exists():
            raise ConfigError(f"{recipe.name} starts from {source}, which has not finished; run `unilip train {source}` first.")
        wanted = open_checkpoint(path).parts if parts == ("all",) else parts
        other = UniLIP.from_pretrained(path, parts=wanted)
        processor = processor or other.processor
        loaded |= dict.fromkeys(wanted, other)
        if "latent_head" in wanted:
            config = config.replace(latent_mean=other.config.latent_mean, latent_factor=other.config.latent_factor)
    names = tuple(name for name in PARTS if name in objective_parts or name in loaded)
    model = UniLIP.from_config(config, recipe.seed, names)
    for name, other in loaded.items():
        getattr(model, name).load_state_dict(getattr(other, name).state_dict())
    if "connector" in names and "connector" not in loaded:
        copy_from_llm(model.connector, model.mllm)
    model.processor = processor or world_processor(recipe.data, config, runs / recipe.name / "tokenizer")
    return model


def world_processor(data: Data, config: UniLIPConfig, folder: Path) -> Processor:
    """Train (once) the tokenizer of an emoji world and open it."""
    if data.source != "emoji":
        raise ConfigError("This recipe starts from nothing that has a tokenizer; name one in init.")
    from unilip.data.tokenizer import train_tokenizer
    from unilip.data.world import World

    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(World.preset(data.world), config.text.vocab_size, folder)
    return Processor.from_folder(folder, config)


def trained_parameters(recipe: Recipe, model: UniLIP) -> dict[str, tuple[nn.Parameter, float]]:
    """Return name -> (parameter, learning-rate factor) of what trains; the longest matching prefix decides."""
    found: dict[str, tuple[nn.Parameter, float]] = {}
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        matches = [(p, f) for p, f in recipe.trains if name == p or name.startswith(p + ".")]
        if matches:
            prefix, factor = max(matches, key=lambda m: len(m[0]))
            used.update(p for p, _ in matches)
            if factor > 0:
                found[name] = (parameter, factor)
    unused = [p for p, _ in recipe.trains if p not in used]
    if unused:
        raise ConfigError(f"{recipe.name} trains {', '.join(unused)}, which names nothing in the model ({', '.join(model.parts)}).")
    return found


def make_optimizer(recipe: Recipe, named: dict[str, tuple[nn.Parameter, float]], heads: nn.Module) -> torch.optim.AdamW:
    """AdamW with one group per (rate factor, decay or not); vectors and scales are not decayed."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    everything = [*named.values(), *((p, 1.0) for p in heads.parameters())]
    for parameter, factor in everything:
        decay = recipe.optim.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": d, "factor": f} for (f, d), p in groups.items()],
        lr=recipe.optim.lr, betas=(recipe.optim.beta1, recipe.optim.beta2),
    )  # fmt: skip


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine to `final` x lr."""
    o = recipe.optim
    warm = max(1, round(o.warmup * recipe.steps))
    if step < warm:
        return o.lr * (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, recipe.steps - warm))
    return o.lr * (o.final + (1 - o.final) * 0.5 * (1 + math.cos(math.pi * progress)))


# --- the loop --------------------------------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    runs: str | os.PathLike[str] = "runs",
    *,
    device: str | torch.device = "cpu",
    restart: bool = False,
    progress: bool = True,
    stop_after: int | None = None,
) -> Path:
    """Run a recipe to its end, resuming the newest whole checkpoint, and return the folder of the result.

    Args:
        runs: folder of all runs; this one writes to runs/NAME.
        restart: begin anew even where checkpoints exist (they are deleted only as new ones replace them).
        stop_after: stop, saved, after this many steps of this call.

    Raises:
        ConfigError: the recipe contradicts itself, its sources, or the run that it would resume.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    runs = Path(runs)
    run = runs / recipe.name
    final = run / "final"
    if final.exists() and not restart:
        logger.info("%s has finished already (%s); restart to train it again.", recipe.name, final)
        return final
    run.mkdir(parents=True, exist_ok=True)
    if restart:
        for old in run.glob("step_*"):
            shutil.rmtree(old)
    device = torch.device(device)
    torch.set_flush_denormal(True)  # gradients near 1e-40 make a CPU's backward pass three to five times slower
    model, objective, batches = prepare(recipe, runs)
    named = trained_parameters(recipe, model)
    model.requires_grad_(False)
    for parameter, _ in named.values():
        parameter.requires_grad_(True)
    model.to(device)
    for module in (objective.heads, getattr(objective, "teacher", None), objective.adversary, getattr(objective, "perceptual", None)):
        if module is not None:
            module.to(device)
    if recipe.gradient_checkpointing:
        enable_checkpointing(model)
    optimizers: list[torch.optim.Optimizer] = [make_optimizer(recipe, named, objective.heads)]
    if objective.adversary is not None:
        optimizers.append(torch.optim.AdamW(objective.adversary.parameters(), lr=recipe.optim.lr, betas=(0.5, 0.9)))
    ema = states.EMA({n: p for n, (p, _) in named.items()}, recipe.ema) if recipe.ema else None
    start = resume(recipe, run, model, objective, optimizers, ema)
    loop = Loop(recipe, run, model, objective, batches, named, optimizers, ema)
    with loop.logging(progress, start):
        loop.run(start, stop_after)
    if stop_after is not None and loop.step < recipe.steps:
        return run
    return finish(recipe, run, model, ema, batches)


def prepare(recipe: Recipe, runs: Path) -> tuple[UniLIP, Objective, Batches]:
    """Build model, objective and data of a recipe, checking them against each other."""
    from unilip.train.objectives import FlowObjective, ReconstructObjective, UnderstandObjective
    from unilip.train.recipe import Flow, Understand

    kind = recipe.objective
    needed = ReconstructObjective.parts
    needed = UnderstandObjective.parts if isinstance(kind, Understand) else needed
    needed = FlowObjective.parts if isinstance(kind, Flow) else needed
    if isinstance(kind, Flow) and kind.target == "dcae":
        needed = tuple(p for p in needed if p != "latent_head")
    model = build_model(recipe, runs, needed)
    assert model.processor is not None
    return model, make_objective(recipe, model), make_batches(recipe, model.processor)


def enable_checkpointing(model: UniLIP) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    for part in ("connector", "dit", "pixel_decoder"):
        if part in model.parts:
            getattr(model, part).gradient_checkpointing = True
    if "encoder" in model.parts:
        model.encoder.vision_tower.gradient_checkpointing_enable()
    if "mllm" in model.parts:
        model.mllm.language_model.gradient_checkpointing_enable()
    model.train()


def head_state(objective: Objective) -> dict[str, Tensor]:
    """Weights that exist only in training: heads and adversary."""
    found = {f"heads.{k}": v for k, v in objective.heads.state_dict().items()}
    if objective.adversary is not None:
        found |= {f"adversary.{k}": v for k, v in objective.adversary.state_dict().items()}
        found["means"] = getattr(objective, "_means", torch.zeros(2))
    return found


def resume(
    recipe: Recipe, run: Path, model: UniLIP, objective: Objective, optimizers: list[Any], ema: states.EMA | None
) -> int:
    """Load the newest checkpoint of the run, if any; returns the step to go on from."""
    folder = states.newest(run)
    if folder is None:
        return 0
    saved = states.read(folder)
    settings = {k: v for k, v in plain(recipe).items() if k not in FREE_TO_CHANGE}
    before = {k: v for k, v in saved["state"]["recipe"].items() if k not in FREE_TO_CHANGE}
    changed = sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k))
    if changed:
        what = ", ".join(f"{k} ({before.get(k)} -> {settings.get(k)})" for k in changed)
        raise ConfigError(f"{folder} was made with other settings: {what}. Restart the run, or use another runs folder.")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in saved["weights"].items():
            parameters[name].copy_(value)
    heads = saved["heads"]
    objective.heads.load_state_dict({k.removeprefix("heads."): v for k, v in heads.items() if k.startswith("heads.")})
    if objective.adversary is not None:
        own = {k.removeprefix("adversary."): v for k, v in heads.items() if k.startswith("adversary.")}
        objective.adversary.load_state_dict(own)
        objective._means = heads["means"]  # type: ignore[attr-defined]
    for optimizer, value in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(value)
    if ema is not None:
        ema.count = saved["state"]["ema_count"]
        for name, value in saved["ema"].items():
            ema.average[name].copy_(value)
    logger.info("resuming %s at step %d", recipe.name, saved["state"]["step"])
    return int(saved["state"]["step"])


def plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON-ready values by dotted name."""
    return json.loads(json.dumps(leaves(recipe)))


class Loop:
    """Runs steps; knows when to log, show and save."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        model: UniLIP,
        objective: Objective,
        batches: Batches,
        named: dict[str, tuple[nn.Parameter, float]],
        optimizers: list[torch.optim.Optimizer],
        ema: states.EMA | None,
    ) -> None:
        self.recipe, self.run_folder, self.model, self.objective = recipe, run, model, objective
        self.batches, self.named, self.optimizers, self.ema = batches, named, optimizers, ema
        self.step = 0
        self.signal: int | None = None
        self.writer: Any = None
        self.bar: Any = None

    @contextlib.contextmanager
    def logging(self, progress: bool, start: int) -> Iterator[None]:
        """Open the log file, TensorBoard and the bar; catch SIGINT and SIGTERM while inside."""
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.run_folder / "tensorboard"), purge_step=start)
        except ImportError:
            logger.warning("tensorboard is not installed; scalars go to log.jsonl only")
        old = {}

        def note(number: int, frame: Any) -> None:
            self.signal = number

        with contextlib.suppress(ValueError):  # not in the main thread: signals stay with their owner
            old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=self.recipe.steps, initial=start, desc=self.recipe.name, disable=None if progress else True)
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)
            self.bar.close()
            if self.writer is not None:
                self.writer.close()

    def run(self, start: int, stop_after: int | None) -> None:
        """Train from step `start` to the recipe's end, or `stop_after` steps further."""
        recipe = self.recipe
        self.step = start
        end = recipe.steps if stop_after is None else min(recipe.steps, start + stop_after)
        loader = iterate(self.batches, start * recipe.accumulate)
        clock, since = time.perf_counter(), start
        while self.step < end:
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
            terms = self.one_step(loader, generator)
            self.step += 1
            self.bar.update()
            if self.step % recipe.log_every == 0 or self.step == end:
                now = time.perf_counter()
                rate = (self.step - since) * recipe.batch_size * recipe.accumulate / max(1e-9, now - clock)
                clock, since = now, self.step
                self.log(terms, rate)
            if self.step % recipe.sample_every == 0:
                self.show()
            stopping = self.signal is not None
            if self.step % recipe.save_every == 0 or self.step == end or stopping:
                self.save()
            if stopping:
                name = signal.Signals(self.signal or 0).name
                raise Interrupted(f"{name} at step {self.step} of {recipe.steps}; saved, the same command goes on from there.")

    def one_step(self, loader: Iterator[dict[str, Any]], generator: torch.Generator) -> dict[str, Tensor]:
        """Accumulate, clip, update; then the adversary's own step where there is one."""
        recipe, device = self.recipe, self.model.device
        rate = learning_rate(recipe, self.step)
        for group in self.optimizers[0].param_groups:
            group["lr"] = rate * group["factor"]
        mixed = torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.dtype == "bfloat16")
        terms: dict[str, Tensor] = {}
        for _ in range(recipe.accumulate):
            batch = to_device(next(loader), device)
            with mixed:
                loss, terms = self.objective.loss(batch, self.step, generator)
            (loss / recipe.accumulate).backward()
            second = self.objective.adversary_loss()
            if second is not None:
                (second[0] / recipe.accumulate).backward()
                terms = terms | second[1]
        parameters = [p for group in self.optimizers[0].param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, recipe.optim.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        return {"loss": loss.detach(), "grad_norm": norm, **{k: v.detach() for k, v in terms.items()}}

    def log(self, terms: dict[str, Tensor], rate: float) -> None:
        """Write scalars; stop on a loss that is not a number."""
        values = {k: float(v) for k, v in terms.items()}
        if not math.isfinite(values["loss"]):
            raise UniLIPError(f"The loss is {values['loss']} at step {self.step}; lower optim.lr or look at the data.")
        values |= {"samples_per_second": rate, "lr": self.optimizers[0].param_groups[0]["lr"]}
        with (self.run_folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, "time": round(time.time(), 1), **values}) + "\n")
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(key, value, self.step)
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k not in ("lr", "grad_norm")})

    def show(self) -> None:
        """Write picture grids of a fixed batch, drawn with the averaged weights."""
        if self.ema is not None:
            self.ema.swap()
        try:
            batch = to_device(self.batches[0], self.model.device)
            pictures = self.objective.samples(batch, torch.Generator().manual_seed(0))
        finally:
            if self.ema is not None:
                self.ema.swap()
        for name, images in pictures.items():
            grid = images.float().cpu()
            rows = grid.reshape(-1, min(8, len(grid)), *grid.shape[1:])
            sheet = rows.permute(2, 0, 3, 1, 4).reshape(3, rows.shape[0] * grid.shape[2], -1)
            if self.writer is not None:
                self.writer.add_image(name, sheet, self.step)
            folder = self.run_folder / "samples"
            folder.mkdir(exist_ok=True)
            to_images(sheet[None])[0].save(folder / f"{name}_{self.step:08d}.png")

    def save(self) -> None:
        """Write a checkpoint of everything that changes."""
        weights = {name: parameter for name, (parameter, _) in self.named.items()}
        state = {"recipe": plain(self.recipe)}
        states.write(
            self.run_folder, self.step, weights, self.ema, head_state(self.objective), self.optimizers, state, self.recipe.keep
        )


def finish(recipe: Recipe, run: Path, model: UniLIP, ema: states.EMA | None, batches: Batches) -> Path:
    """Write the result: averaged weights, latent statistics where asked for, and the recipe, as a model folder."""
    if ema is not None:
        ema.swap()
    model.eval()
    if recipe.measure_latents:
        model.config = measure_latents(model, batches)
    temporary = run / ".final.part"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    (temporary / "recipe.json").write_text(json.dumps(plain(recipe), indent=1))
    final = run / "final"
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    return final


@torch.no_grad()
def measure_latents(model: UniLIP, batches: Batches, count: int = 64) -> UniLIPConfig:
    """Return the config with per-channel mean and 1/standard deviation of the latents of some training pictures.

    The flow needs latents of zero mean and unit variance per channel.
    """
    plain_config = model.config.replace(latent_mean=0.0, latent_factor=1.0)
    model.config = plain_config
    found = []
    for i in range(min(count, len(batches))):
        pixels = normalise(to_unit(batches[i]["images"].to(model.device)))
        found.append(model.to_latent(model.encoder(pixels)).float().movedim(1, -1).flatten(0, -2).cpu())
    latents = torch.cat(found)
    mean, std = latents.mean(0), latents.std(0)
    return plain_config.replace(
        latent_mean=tuple(round(float(v), 6) for v in mean), latent_factor=tuple(round(float(1 / v), 6) for v in std)
    )

