"""The one training loop: build what a recipe names, step, log, show, save, resume; the result is a model folder.

Everything random in a step comes from the seed and the numbers of its samples, so a resumed run continues bit for bit
on the same CPU.
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

from unilip.config import UniLIPConfig
from unilip.errors import ConfigError, UniLIPError
from unilip.model import UniLIP
from unilip.preprocess import normalise, to_images
from unilip.train.batches import Batches, iterate, to_device
from unilip.train.build import build, enable_checkpointing, make_optimizer, trained_parameters
from unilip.train.objectives import Objective, to_unit
from unilip.train.recipe import Optim, Recipe, changed_settings, plain
from unilip.train.state import EMA, State, newest

logger = logging.getLogger(__name__)


class Interrupted(UniLIPError):
    """A signal stopped the run after its state was saved."""


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
        restart: begin anew: earlier checkpoints and logs are deleted; an earlier result stays until the new one.
        progress: show a bar with the time left, on a terminal.
        stop_after: stop, saved, after this many steps of this call; the folder of the run is returned.

    Raises:
        UniLIPError: the recipe contradicts itself, its sources or data, or the run that it would resume; a loss that
            is not a number.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"stop_after is {stop_after}; it must be at least 1 step.")
    runs, device = Path(runs), torch.device(device)
    run = runs / recipe.name
    final = run / "final"
    if final.exists() and not restart:
        check_finished(recipe, final)
        logger.info("%s has finished already (%s); restart to train it again.", recipe.name, final)
        return final
    torch.set_flush_denormal(True)  # gradients near 1e-40 make a CPU's backward pass three to five times slower
    try:
        model, objective, batches = build(recipe, runs)
        run.mkdir(parents=True, exist_ok=True)  # only now: what cannot be built leaves no folder
        if restart:
            clear(run)
        model.to(device)
        objective.to(device)
        if recipe.gradient_checkpointing:
            enable_checkpointing(model)
        loop = Loop(recipe, run, model, objective, batches)
        start = loop.resume()
        with loop.watching(progress, start):
            loop.run(start, stop_after)
        return run if loop.step < recipe.steps else finish(recipe, run, model, loop.state.ema, batches)
    finally:
        torch.set_flush_denormal(False)


def check_finished(recipe: Recipe, final: Path) -> None:
    """Refuse to take the result of other settings for this recipe's."""
    file = final / "recipe.json"
    changed = changed_settings(recipe, json.loads(file.read_text(encoding="utf-8"))) if file.exists() else ""
    if changed:
        raise ConfigError(
            f"{final} was made with other settings: {changed}. Restart the run, or use another runs folder or name."
        )


def clear(run: Path) -> None:
    """Delete what an earlier run wrote, but for its result and its tokenizer."""
    for old in (*run.glob("step_*"), *run.glob(".*.part"), run / "tensorboard", run / "samples"):
        shutil.rmtree(old, ignore_errors=True)
    (run / "log.jsonl").unlink(missing_ok=True)


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warm-up, then cosine to `final` x lr."""
    warm = max(1, round(optim.warmup * steps))
    if step < warm:
        return optim.lr * (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, steps - warm))
    return optim.lr * (optim.final + (1 - optim.final) * 0.5 * (1 + math.cos(math.pi * progress)))


def mixed_precision(recipe: Recipe, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the recipe asks for it and the device can."""
    wanted = recipe.dtype == "bfloat16"
    if wanted and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        logger.warning("this GPU has no bfloat16; %s trains in float32", recipe.name)
        wanted = False
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


class Loop:
    """Runs steps; knows when to log, show and save."""

    def __init__(self, recipe: Recipe, run: Path, model: UniLIP, objective: Objective, batches: Batches) -> None:
        self.recipe, self.run_folder = recipe, run
        self.model, self.objective, self.batches = model, objective, batches
        named = trained_parameters(recipe, model)
        heads = [(p, 1.0) for p in objective.heads.parameters()]
        optimizers = [make_optimizer(recipe.optim, [*named.values(), *heads])]
        self.starts = [0]  # the step at which each optimizer's schedule begins
        if objective.adversary is not None:
            optimizers.append(make_optimizer(recipe.optim, [(p, 1.0) for p in objective.adversary.parameters()]))
            self.starts.append(objective.adversary_start)
        parameters = {name: parameter for name, (parameter, _) in named.items()}
        self.state = State(
            parameters,
            {"heads": objective.heads, "adversary": objective.adversary},
            optimizers,
            EMA(parameters, recipe.ema) if recipe.ema else None,
        )
        self.mixed = mixed_precision(recipe, model.device)
        self.broken = torch.full((), math.inf, device=model.device)  # the first step whose loss is not a number
        self.step = 0
        self.signal: int | None = None
        self.writer: Any = None
        self.bar: Any = None

    def resume(self) -> int:
        """Load the newest checkpoint of the run, if any; returns the step to go on from."""
        folder = newest(self.run_folder)
        step = 0 if folder is None else self.state.restore(folder, self.recipe)
        if folder is not None:
            logger.info("resuming %s at step %d", self.recipe.name, step)
        log = self.run_folder / "log.jsonl"
        if log.exists():  # a killed run logged steps that come again now
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        return step

    @contextlib.contextmanager
    def watching(self, progress: bool, start: int) -> Iterator[None]:
        """Open TensorBoard and the bar; note SIGINT and SIGTERM while inside, for the loop to save first."""
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.run_folder / "tensorboard"), purge_step=start + 1)
        except ImportError:
            logger.warning("tensorboard is not installed; scalars go to log.jsonl only")

        def note(number: int, frame: Any) -> None:
            if self.signal is not None:  # asked for twice
                raise KeyboardInterrupt
            self.signal = number

        old: dict[signal.Signals, Any] = {}
        with contextlib.suppress(ValueError):  # not in the main thread: signals stay with their owner
            for number in (signal.SIGINT, signal.SIGTERM):
                old[number] = signal.signal(number, note)
        hidden = None if progress else True  # None: shown on a terminal
        self.bar = tqdm(total=self.recipe.steps, initial=start, desc=self.recipe.name, disable=hidden)
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
            self.bar.close()
            if self.writer is not None:
                self.writer.close()

    def run(self, start: int, stop_after: int | None) -> None:
        """Train from step `start` to the recipe's end, or `stop_after` steps further."""
        recipe = self.recipe
        self.step = start
        end = recipe.steps if stop_after is None else min(recipe.steps, start + stop_after)
        seconds, since = 0.0, start  # of training alone, since the last line of the log
        with contextlib.closing(iterate(self.batches, start * recipe.accumulate)) as loader:
            while self.step < end:
                begun = time.perf_counter()
                terms = self.one_step(loader)
                self.step += 1
                stopping = self.signal is not None
                saving = self.step % recipe.save_every == 0 or self.step == end or stopping
                logging_now = self.step % recipe.log_every == 0 or self.step == end
                if saving or logging_now:
                    self.check()
                seconds += time.perf_counter() - begun
                self.bar.update()
                if logging_now:
                    samples = (self.step - since) * recipe.batch_size * recipe.accumulate
                    self.log(terms, samples / max(1e-9, seconds))
                    seconds, since = 0.0, self.step
                if saving:
                    self.state.save(self.run_folder, self.step, recipe)
                if stopping:
                    name = signal.Signals(self.signal or 0).name
                    raise Interrupted(
                        f"{name} at step {self.step} of {recipe.steps}; saved, the same command goes on from there."
                    )
                if self.step % recipe.sample_every == 0:
                    self.show()

    def one_step(self, loader: Iterator[dict[str, Any]]) -> dict[str, Tensor]:
        """Accumulate, clip, update; the adversary likewise where there is one. Returns the means of the terms."""
        recipe, device = self.recipe, self.model.device
        found: dict[str, list[Tensor]] = {}
        for _ in range(recipe.accumulate):
            batch = to_device(next(loader), device)
            with self.mixed:
                loss, terms = self.objective.loss(batch, self.step)
            (loss / recipe.accumulate).backward()
            second = self.objective.adversary_loss()
            if second is not None:
                (second[0] / recipe.accumulate).backward()
                terms = terms | second[1]
            for name, value in {"loss": loss, **terms}.items():
                found.setdefault(name, []).append(value.detach())
        norms = []
        for optimizer, first in zip(self.state.optimizers, self.starts, strict=True):
            rate = learning_rate(recipe.optim, max(0, self.step - first), max(1, recipe.steps - first))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norms.append(nn.utils.clip_grad_norm_(parameters, recipe.optim.grad_clip))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.state.ema is not None:
            self.state.ema.update()
        means = {name: torch.stack(values).mean() for name, values in found.items()}
        whole = (means["loss"] + sum(norms)).isfinite()
        self.broken = torch.where(whole, self.broken, self.broken.clamp(max=self.step + 1))
        return means | {"grad_norm": norms[0]}

    def check(self) -> None:
        """Stop on a loss or gradient that was not a number; asked before anything is kept, not in every step."""
        first = float(self.broken)
        if first < math.inf:
            raise UniLIPError(
                f"The loss or its gradient is not a finite number at step {int(first)} of {self.recipe.name}; lower "
                "optim.lr or look at the data. The last checkpoint is from before."
            )

    def log(self, terms: dict[str, Tensor], rate: float) -> None:
        """Write scalars to log.jsonl, TensorBoard and the bar."""
        values = {name: float(value) for name, value in terms.items()}
        values |= {"samples_per_second": rate, "lr": self.state.optimizers[0].param_groups[0]["lr"]}
        with (self.run_folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, "time": round(time.time(), 1), **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.step)
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k not in ("lr", "grad_norm")})

    def show(self) -> None:
        """Write picture grids of a fixed batch, drawn with the averaged weights."""
        ema = self.state.ema
        if ema is not None:
            ema.swap()
        try:
            pictures = self.objective.samples(to_device(self.batches[0], self.model.device))
        finally:
            if ema is not None:
                ema.swap()
        for name, rows in pictures.items():
            sheet = rows.float().cpu().permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # R n 3 S S -> 3 RS nS
            if self.writer is not None:
                self.writer.add_image(name, sheet, self.step)
            folder = self.run_folder / "samples"
            folder.mkdir(exist_ok=True)
            to_images(sheet[None])[0].save(folder / f"{name}_{self.step:08d}.png")


def finish(recipe: Recipe, run: Path, model: UniLIP, ema: EMA | None, batches: Batches) -> Path:
    """Write the result: averaged weights, latent statistics where asked for, and the recipe, as a model folder."""
    if ema is not None:
        ema.swap()
    model.eval()
    if recipe.measure_latents:
        model.config = measure_latents(model, batches)
    temporary = run / ".final.part"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    (temporary / "recipe.json").write_text(json.dumps(plain(recipe), indent=1), encoding="utf-8")
    final = run / "final"
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    return final


@torch.no_grad()
def measure_latents(model: UniLIP, batches: Batches, pictures: int = 1024) -> UniLIPConfig:
    """Return the config with per-channel mean and 1/standard deviation of the latents of some training pictures.

    The flow needs latents of zero mean and unit variance per channel.
    """
    model.config = model.config.replace(latent_mean=0.0, latent_factor=1.0)
    found = []
    for i in range(min(len(batches), math.ceil(pictures / batches.size))):
        pixels = normalise(to_unit(batches[i]["images"].to(model.device)))
        found.append(model.to_latent(model.encoder(pixels)).movedim(1, -1).flatten(0, -2).cpu())
    latents = torch.cat(found)
    mean, std = latents.mean(0), latents.std(0).clamp(min=1e-6)
    return model.config.replace(
        latent_mean=tuple(round(float(v), 6) for v in mean), latent_factor=tuple(round(float(1 / v), 6) for v in std)
    )
