"""The one training loop: build what a recipe names, step, log, show, save, resume; the result is a model folder.

Out: runs/NAME with its log, sheets and checkpoints, and final/, the model. Everything random in a step comes from the
seed and the numbers of its samples, so a resumed run continues bit for bit on the same CPU. Under `torchrun` every
process runs this loop; the first one logs, draws and writes the result.
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from unilip.errors import ConfigError, ImageError, UniLIPError
from unilip.files import Lock, content_hash, png_bytes, remove, write_bytes, write_text
from unilip.machine import choose_device
from unilip.method.config import UniLIPConfig
from unilip.model import UniLIP
from unilip.pictures import normalise, to_images
from unilip.recipes.record import CHECK, RESTARTED, Optim, Recipe, finished, plain
from unilip.train import build as building
from unilip.train import parallel, processes
from unilip.train.adapters import save_adapter
from unilip.train.batches import Batches, iterate, to_device
from unilip.train.objectives import Objective, to_unit
from unilip.train.state import EMA, DamagedCheckpoint, State, wholes

logger = logging.getLogger(__name__)
CHECKED = 50  # steps that a check is the mean of
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what writing to a full disk, or over a quota, says


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

    In a process that `torchrun` started this is one of several that share the run; each must call it.
    In: runs: folder of all runs; this one writes to runs/NAME. restart: begin anew: earlier checkpoints and logs are
    deleted. progress: show a bar, on a terminal. stop_after: stop, saved, after so many steps; the run's folder is
    returned.
    Raises UniLIPError: the recipe contradicts itself, its sources, its data or the run to resume, or losses are no
    numbers, `skip_limit` in a row; Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"stop_after is {stop_after}; it must be at least 1 step.")
    runs, device = Path(runs).expanduser(), torch.device(choose_device(str(device)))
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):  # what torchrun starts once more goes on
        restart = False
    processes.join(device)
    if not restart and (result := processes.told(finished(recipe, runs))):
        logger.info("%s has finished already (%s); restart to train it again.", recipe.name, result)
        return Path(result)
    torch.set_flush_denormal(True)  # gradients near 1e-40 make a CPU's backward pass three to five times slower
    try:
        return run_recipe(recipe, runs, device, restart, progress, stop_after)
    except OSError as error:  # in the log, a sheet or the result; checkpoints say it themselves
        if error.errno not in FULL:
            raise
        raise UniLIPError(
            f"{runs / recipe.folder} cannot be written ({error}); the last whole checkpoint is kept. Make room and "
            "give the same command again."
        ) from error
    except RuntimeError as error:  # torch's, wherever the loop was when the worker died
        if "DataLoader worker" not in str(error):
            raise
        raise UniLIPError(
            f"{str(error).strip()} Something outside killed it, mostly for want of memory; lower data.workers or "
            "batch_size and give the same command again: the last checkpoint is kept."
        ) from error
    finally:
        torch.set_flush_denormal(False)


def run_recipe(
    recipe: Recipe, runs: Path, device: torch.device, restart: bool, progress: bool, stop_after: int | None
) -> Path:
    """Build and run what has not finished; see `train`."""
    run = runs / recipe.folder
    with contextlib.ExitStack() as held:
        with processes.first_goes_first():
            model, objective, batches = building.build(recipe, runs)
            run.mkdir(parents=True, exist_ok=True)  # only now: what cannot be built leaves no folder
            if processes.first():
                busy = f"Another training is working in {run}; wait for it, or use another --runs folder or name."
                held.enter_context(Lock(run / ".lock", busy))
            if restart and processes.first():  # what an earlier run wrote, but for its result and its tokenizer
                names = ("step_*", "damaged_step_*", ".*.part", "tensorboard", "samples", "log.jsonl", "skipped_*.pt")
                (run / RESTARTED).touch()
                for old in [old for name in names for old in run.glob(name)]:
                    remove(old)
        model.to(device)
        objective.to(device)
        if recipe.gradient_checkpointing or recipe.selective_checkpointing:
            building.enable_checkpointing(model, recipe.selective_checkpointing)
        if recipe.compile:
            building.compile_layers(model, getattr(objective, "teacher", None))
        loop = Loop(recipe, run, model, objective, batches)
        start = loop.resume()
        with loop.watching(progress and processes.first(), start):
            loop.run(start, stop_after)
        if loop.step < recipe.steps:
            return run
        with loop.state.ema.acting():
            return loop.finish()


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


class Float32Attention(TorchFunctionMode):
    """Attention in float32 inside of autocast on a CPU, whose bfloat16 backward is six times slower; not recomputed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)

        def wide(value: Any) -> Any:
            return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

        with torch.autocast("cpu", enabled=False):
            return func(*map(wide, args), **{name: wide(value) for name, value in kwargs.items()})


def cpu_attention(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Attention that a CPU trains fast: in float32, or as plain products and softmax, which a compiler joins."""
    if device.type != "cpu" or recipe.gradient_checkpointing or recipe.selective_checkpointing:
        return contextlib.nullcontext()
    return sdpa_kernel(SDPBackend.MATH) if recipe.compile else Float32Attention()


class Health:
    """Counts steps skipped as not finite; looked at a step later, so that no GPU waits; on a CPU at once."""

    def __init__(self, device: torch.device, limit: int) -> None:
        self.limit = limit
        self.total = torch.zeros((), dtype=torch.long, device=device)
        self.row = torch.zeros((), dtype=torch.long, device=device)
        self._seen: deque[tuple[int, Tensor, Any, list[Any]]] = deque()

    def note(self, step: int, whole: Tensor, batches: list[Any]) -> None:
        """Take down whether a step was whole (a flag on the device), and the batches that it read."""
        self.total += ~whole
        self.row = torch.where(whole, 0, self.row + 1)
        event, row = None, self.row
        if row.device.type == "cuda":
            row = torch.empty((), dtype=row.dtype, pin_memory=True).copy_(row, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._seen.append((step, row, event, batches))

    def broken(self, now: bool) -> tuple[int, list[Any]] | None:
        """Return step and batches of the step that made the row too long; `now` waits for the very last."""
        waiting = 1 if self.row.device.type == "cuda" and not now else 0  # the last, which may not be there yet
        while len(self._seen) > waiting:
            step, row, event, batches = self._seen.popleft()
            if event is not None:
                event.synchronize()
            if int(row) >= self.limit:
                return step, batches
        return None


class Loop:
    """Runs steps; knows when to log, show and save."""

    def __init__(self, recipe: Recipe, run: Path, model: UniLIP, objective: Objective, batches: Batches) -> None:
        self.recipe, self.run_folder = recipe, run
        self.model, self.objective, self.batches = model, objective, batches
        self.own_batches = batches.recipe.accumulate // processes.world()  # of a step, in this process
        if recipe.weights_dtype == "bfloat16":  # and so the optimizer's averages of them
            for parameter, _ in building.trained_parameters(recipe, model).values():
                parameter.data = parameter.data.bfloat16()
        frozen = frozen_signature(model, objective)
        self.whole = parallel.share(parallel.Whole(model, objective.heads), recipe)
        named = building.trained_parameters(recipe, model)
        players = [[*named.values(), *((p, 1.0) for p in objective.heads.parameters())]]
        beside = nn.ModuleDict({"heads": objective.heads})
        self.starts = [0]  # the step at which each optimizer's schedule begins
        if objective.adversary is not None:
            beside["adversary"] = objective.adversary
            players.append([(p, 1.0) for p in objective.adversary.parameters()])
            self.starts.append(objective.adversary_start)
        parameters = {name: parameter for name, (parameter, _) in named.items()}
        optimizers = [building.make_optimizer(recipe.optim, player) for player in players]
        self.state = State(parameters, beside, optimizers, EMA(parameters if recipe.ema else {}, recipe.ema))
        self.state.counters = {"skipped": 0, "skipped_in_a_row": 0, "failed": 0}
        self.state.data, self.state.frozen = batches.signature, frozen
        self.mixed = mixed_precision(recipe, model.device)
        self.health = Health(model.device, recipe.skip_limit)
        self.step = 0
        self.recent: dict[str, deque[Tensor]] = {}  # the last values of terms that are checked
        self.signal: int | None = None
        self.writer: Any = None
        self.bar: Any = None

    def resume(self) -> int:
        """Load the newest usable checkpoint, if any; returns the step to go on from. Raises DamagedCheckpoint."""
        step, folders = 0, processes.told(wholes(self.run_folder))
        for i, folder in enumerate(folders):
            try:
                step = self.state.restore(folder, self.recipe)
            except DamagedCheckpoint as error:
                if i + 1 == len(folders):
                    raise
                logger.warning("%s Taking the one before.", error)
                continue
            logger.info("resuming %s at step %d", self.recipe.name, step)
            for damaged in folders[:i] if processes.first() else ():
                aside = damaged.with_name(f"damaged_{damaged.name}")  # where it takes no place among those kept
                remove(aside)
                with contextlib.suppress(OSError):
                    os.replace(damaged, aside)
            break
        self.health.total.fill_(self.state.counters["skipped"])
        self.health.row.fill_(self.state.counters["skipped_in_a_row"])
        log = self.run_folder / "log.jsonl"
        if processes.first() and log.exists():  # a killed run logged steps that come again now
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_text(log, "".join(line for line in lines if step_of(line) <= step))
        return step

    @contextlib.contextmanager
    def watching(self, progress: bool, start: int) -> Iterator[None]:
        """Open TensorBoard and the bar; note SIGINT and SIGTERM while inside, for the loop to save first."""
        try:
            if processes.first():
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
        with contextlib.closing(iterate(self.batches, start * self.batches.recipe.accumulate)) as loader:
            while self.step < end:
                begun = time.perf_counter()
                terms = self.one_step(loader)
                self.step += 1
                stop_signal = processes.anywhere(self.signal or 0)
                saving = self.step % recipe.save_every == 0 or self.step == end or stop_signal > 0
                logging_now = self.step % recipe.log_every == 0 or self.step == end
                self.check(saving or logging_now)
                seconds += time.perf_counter() - begun
                self.bar.update()
                if logging_now and processes.first():
                    self.log(terms, (self.step - since) * recipe.batch_size * recipe.accumulate / max(1e-9, seconds))
                if logging_now:
                    seconds, since = 0.0, self.step
                if saving:
                    self.save()
                self.judge(terms)
                if stop_signal:
                    self.state.settle()
                    raise Interrupted(
                        f"{signal.Signals(stop_signal).name} at step {self.step} of {recipe.steps}; saved, the same "
                        "command goes on from there."
                    )
                if self.step % recipe.sample_every == 0:
                    self.show()
        self.state.settle()

    def one_step(self, loader: Iterator[dict[str, Any]]) -> dict[str, Tensor]:
        """Accumulate, clip, update, the adversary too; returns the means. A step not finite anywhere is none."""
        recipe, device = self.recipe, self.model.device
        adversary = self.objective.adversary
        buffers = [] if adversary is None else list(adversary.buffers())
        buffers_before = [buffer.clone() for buffer in buffers]
        found: dict[str, list[Tensor]] = {}
        batches = []
        for number in range(self.own_batches):
            batches.append(next(loader))
            batch = to_device(batches[-1], device)
            if self.objective.looks_ahead:
                with self.state.ema.acting(), torch.no_grad(), self.mixed, cpu_attention(recipe, device):
                    batch |= self.whole(self.objective.ahead, batch, self.step)
            with parallel.accumulating(self.whole, last=number + 1 == self.own_batches):
                with self.mixed, cpu_attention(recipe, device):
                    loss, terms = self.whole(self.objective.loss, batch, self.step)
                (loss / self.own_batches).backward()
            if (second := self.objective.adversary_loss()) is not None:
                (second[0] / self.own_batches).backward()
                terms = terms | second[1]
            for name, value in {"loss": loss, **terms}.items():
                found.setdefault(name, []).append(value.detach())
        if adversary is not None:
            parallel.average_adversary(adversary)
        norms = []
        for optimizer in self.state.optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norms.append(parallel.whole_tensor(nn.utils.clip_grad_norm_(parameters, recipe.optim.grad_clip)))
        means = {name: torch.stack(values).mean() for name, values in found.items()}
        if processes.world() > 1:
            together = processes.mean_(torch.stack([value.float() for value in means.values()]))
            means = dict(zip(means, together.unbind(), strict=True))
        whole = (means["loss"] + sum(norms)).isfinite()
        for optimizer, first in zip(self.state.optimizers, self.starts, strict=True):
            rate = learning_rate(recipe.optim, max(0, self.step - first), max(1, recipe.steps - first))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            optimizer.found_inf = (~whole).float()  # type: ignore[attr-defined]  # fused AdamW then changes nothing
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(buffers, buffers_before, strict=True):
            buffer.copy_(torch.where(whole, buffer, before))
        self.state.ema.update()
        self.health.note(self.step + 1, whole, batches)
        return means | {"grad_norm": norms[0]}

    def check(self, now: bool) -> None:
        """Stop after too many skipped steps in a row; the batches of the last one are kept for inspection."""
        if (broken := self.health.broken(now)) is None:
            return
        step, batches = broken
        suffix = f"_rank{processes.rank()}" if processes.world() > 1 else ""
        file = self.run_folder / f"skipped_{step:08d}{suffix}.pt"
        with contextlib.suppress(OSError, RuntimeError):  # a full disk: the reason to stop is the one below
            plain_ones = [{k: vars(v) if is_dataclass(v) else v for k, v in batch.items()} for batch in batches]
            torch.save(plain_ones, file)  # which any program can load
        self.state.settle()
        raise UniLIPError(
            f"The loss or its gradient is not a finite number at step {step} of {self.recipe.name}, the last of "
            f"{self.recipe.skip_limit} in a row that were skipped; lower optim.lr or look at the data: the batches are "
            f"in {file}. The weights are from before."
        )

    def judge(self, terms: dict[str, Tensor]) -> None:
        """Remember the terms that the recipe's checks name, and stop where one is not what it must be by now."""
        for check in self.recipe.checks:
            name, sign, bound, at = re.fullmatch(CHECK, check).groups()  # type: ignore[union-attr]  # the recipe saw to it
            recent = self.recent.setdefault(name, deque(maxlen=CHECKED))
            if name in terms:
                recent.append(terms[name])
            if self.step != int(at or self.recipe.steps):
                continue
            if not recent:
                logger.warning("%s is not looked at: there was no %s; the terms are %s", check, name, ", ".join(terms))
                continue
            mean = float(torch.stack(list(recent)).mean())
            if not (mean >= float(bound) if sign == ">=" else mean <= float(bound)):
                self.save(failed=self.step)
                raise UniLIPError(
                    f"{self.recipe.name} stops at step {self.step}: {name} is {mean:.3g} over its last {len(recent)} "
                    f"steps, and must be {sign} {bound}. Look for what is wrong, or train longer; with --set checks= "
                    "the run goes on from here as it is."
                )

    def save(self, failed: int = 0) -> None:
        counters = {"skipped": int(self.health.total), "skipped_in_a_row": int(self.health.row)}
        self.state.counters = {**counters, "failed": failed}
        self.state.save(self.run_folder, self.step, self.recipe)

    def log(self, terms: dict[str, Tensor], rate: float) -> None:
        values = {name: float(value) for name, value in terms.items()}
        if skipped := int(self.health.total):
            values["skipped"] = skipped
        values |= {"samples_per_second": rate, "lr": self.state.optimizers[0].param_groups[0]["lr"]}
        with (self.run_folder / "log.jsonl").open("a") as file:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps({"step": self.step, "time": round(time.time(), 1), **finite}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.step)
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k not in ("lr", "grad_norm")})

    def show(self) -> None:
        """Write picture grids of a fixed batch, drawn with the averaged weights."""
        if not (processes.first() or parallel.sharded(self.whole)):
            return
        with self.state.ema.acting():
            pictures = self.together(self.objective.samples, to_device(self.batches[0], self.model.device))
        if not processes.first():
            return
        for name, rows in pictures.items():
            sheet = rows.float().cpu().permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # R n 3 S S -> 3 RS nS
            if self.writer is not None:
                self.writer.add_image(name, sheet, self.step)
            file = self.run_folder / "samples" / f"{name}_{self.step:08d}.png"
            try:
                write_bytes(file, png_bytes(to_images(sheet[None], name)[0]))
            except ImageError as error:
                logger.warning("no sheet of step %d: %s", self.step, error)

    @torch.no_grad()
    def together(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that uses the model outside of a step; where it is sharded all processes take part."""
        return self.whole(function, *arguments) if parallel.sharded(self.whole) else function(*arguments)

    def finish(self) -> Path:
        """Write the result as a model folder: weights as they are, latent statistics, recipe; or the adapter's."""
        recipe, model, run = self.recipe, self.model, self.run_folder
        final = run / "final"
        model.eval()
        if recipe.measure_latents:
            model.config = self.together(measure_latents, model, self.batches)
        temporary = run / ".final.part"
        if processes.first():
            remove(temporary)
        if recipe.adapter.rank:
            save_adapter(model, temporary, building.adapter_base(recipe, run.parents[recipe.folder.count("/")], final))
        elif parallel.sharded(self.whole):
            model = gathered(model)
        if processes.first():
            if not recipe.adapter.rank:
                model.save_pretrained(temporary)
            (temporary / "recipe.json").write_text(json.dumps(plain(recipe), indent=1), encoding="utf-8")
            remove(final)
            os.replace(temporary, final)
            remove(run / RESTARTED)
        processes.wait()
        return final


def step_of(line: str) -> float:
    """Return the step of a line of the log; infinity where it was cut off, or a power cut left something else."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("}\n") else math.inf
    except (ValueError, LookupError, TypeError):
        return math.inf


@torch.no_grad()
def frozen_signature(model: UniLIP, objective: Objective) -> str:
    """Return a hash of the weights that do not train, a teacher's too: names, shapes, and some values of each."""
    beside = {name: one for name, one in vars(objective).items() if isinstance(one, nn.Module) and one is not model}
    named = [*model.named_parameters(), *(pair for one in beside.items() for pair in one[1].named_parameters(one[0]))]
    frozen = [(name, w, max(1, w.numel() // 64)) for name, w in named if not w.requires_grad]
    some = [w.detach().flatten()[::step].float().cpu().numpy().tobytes().hex() for _, w, step in frozen]
    return content_hash([(name, list(w.shape), text) for (name, w, _), text in zip(frozen, some, strict=True)])


def gathered(model: UniLIP) -> UniLIP:
    """Return a model of whole tensors on the CPU, in the first process; an empty one in the others, which help."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with torch.device("meta"):
        copy = UniLIP(model.config, model.processor, parts=model.parts)
    if processes.first():
        copy.load_state_dict(tensors, assign=True)
    return copy


@torch.no_grad()
def measure_latents(model: UniLIP, batches: Batches, pictures: int = 1024) -> UniLIPConfig:
    """Return the config with mean and 1/standard deviation of each latent channel over some training pictures."""
    model.config = model.config.replace(latent_mean=0.0, latent_factor=1.0)
    found = []
    for i in range(min(len(batches), math.ceil(pictures / batches.size))):
        pixels = normalise(to_unit(batches[i]["images"].to(model.device)))
        found.append(model.to_latent(model.encoder(pixels), pixels.shape[-2] // 28).movedim(1, -1).flatten(0, -2).cpu())
    latents = torch.cat(found)
    mean, std = latents.mean(0), latents.std(0).clamp(min=1e-6)
    return model.config.replace(
        latent_mean=tuple(round(float(v), 6) for v in mean), latent_factor=tuple(round(float(1 / v), 6) for v in std)
    )
