"""What changes while training, and how it is kept: checkpoints that are whole or absent, and averaged weights (EMA).

runs/NAME/step_00001000/{weights,ema,heads,optimizer}.* + state.json   of one process; the newest few are kept
runs/NAME/step_00001000/shards/* + state.json                          of several (torch's distributed checkpoint)
runs/NAME/final/                                                       the result, a folder that from_pretrained takes
Either kind is read by any number of processes. `state.json`, written last, has the size and CRC of every other file.
"""

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unilip.errors import CheckpointError, ConfigError
from unilip.files import crc
from unilip.recipes.record import Recipe, plain, require_same
from unilip.train import processes

logger = logging.getLogger(__name__)
SHARDS = "shards"
WRITING = (OSError, SafetensorError, RuntimeError)  # what a full disk raises, by the kind of file


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that cannot be read, or is not what was written."""

    def __init__(self, folder: Path, why: object) -> None:
        super().__init__(f"{folder} is damaged ({why}); delete it to resume from the checkpoint before or restart.")


class EMA:
    """Exponential moving average of some parameters, or none, in float32, with a short warm-up of the decay."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.count = parameters, decay, 0
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        if now := [p.detach().float() for p in self.parameters.values()]:
            torch._foreach_lerp_(list(self.average.values()), now, 1 - decay)

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Have the averages in the model inside the block; afterwards it is exactly what it was."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._put(self.average)
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


class Pending:
    """A checkpoint on its way from a temporary name to its own."""

    finishing: threading.Thread  # where several processes write

    def __init__(self, run: Path, step: int, keep: int, about: dict[str, Any]) -> None:
        self.run, self.keep, self.about = run, keep, about
        self.target = run / f"step_{step:08d}"
        self.temporary = self.target.with_name(f".{self.target.name}.part")
        self.error: str | None = None

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Note an error of writing, and leave nothing behind."""
        try:
            yield
        except WRITING as error:
            self.fail(error)

    def finish(self, future: Any) -> None:
        """Wait for the files of all processes, and make them a checkpoint."""
        try:
            future.result()
        except BaseException as error:  # CheckpointException of all processes' errors is no Exception
            self.fail(error)
        if processes.first():
            self.commit()

    def commit(self) -> None:
        """Describe the files, rename the folder, and drop the oldest."""
        if self.error is not None:
            return
        with self.writing():
            files = [file for file in sorted(self.temporary.rglob("*")) if file.is_file()]
            self.about["files"] = {str(file.relative_to(self.temporary)): crc(file) for file in files}
            (self.temporary / "state.json").write_text(json.dumps(self.about, indent=1), encoding="utf-8")
            shutil.rmtree(self.target, ignore_errors=True)
            os.replace(self.temporary, self.target)
            newest_ones = [folder for folder in wholes(self.run) if folder <= self.target][: self.keep]
            for old in self.run.glob("step_*"):
                if old < self.target and old not in newest_ones:
                    shutil.rmtree(old, ignore_errors=True)

    def fail(self, error: BaseException) -> None:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        telling = [line for line in lines if "Error" in line or "error" in line]
        self.error = (telling or lines)[-1].strip()
        if processes.first():
            shutil.rmtree(self.temporary, ignore_errors=True)

    def check(self) -> None:
        if self.error is not None:
            raise CheckpointError(
                f"{self.target} cannot be written ({self.error}); the last whole checkpoint is kept. Make room and "
                "give the same command again."
            )


class State:
    """Everything that changes: trained weights by name, training-only modules, optimizers, averages, `counters`."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], heads: nn.ModuleDict, optimizers: list[torch.optim.AdamW], ema: EMA
    ) -> None:
        self.parameters, self.heads, self.optimizers, self.ema = parameters, heads, optimizers, ema
        self.counters: dict[str, int] = {}
        self.data = self.frozen = ""  # signatures of the data that the run reads, and of the weights that do not train
        self._pending: Pending | None = None

    def save(self, run: Path, step: int, recipe: Recipe) -> None:
        """Write a checkpoint under a temporary name, rename it, and drop all but the newest `recipe.keep`.

        Several processes write in the background until `settle`. Raises CheckpointError: it cannot be; others stay.
        """
        self.settle()
        about = {"recipe": plain(recipe), "step": step, "data": self.data, "frozen": self.frozen, **self.counters}
        pending = Pending(run, step, recipe.keep, about | ({"ema_count": self.ema.count} if self.ema.average else {}))
        if processes.first():
            with pending.writing():
                for left in run.glob(".step_*.part"):  # of runs that were killed while they wrote
                    shutil.rmtree(left, ignore_errors=True)
                pending.temporary.mkdir(parents=True)
        if processes.world() > 1:
            self._write_shards(pending)
            self._pending = pending
        else:
            with pending.writing():
                for name, tensors in self._named().items():
                    if tensors:
                        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                        save_file(stored, pending.temporary / f"{name}.safetensors")
                torch.save([o.state_dict() for o in self.optimizers], pending.temporary / "optimizer.pt")
            pending.commit()
            pending.check()

    def settle(self) -> None:
        """Wait for the checkpoint being written; all processes must ask. Raises CheckpointError: it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.finishing.join()
            pending.error = processes.told(pending.error)
            pending.check()

    def _named(self) -> dict[str, Mapping[str, Tensor]]:
        return {"weights": self.parameters, "heads": self.heads.state_dict(), "ema": self.ema.average}

    def _write_shards(self, pending: Pending) -> None:
        """Begin to write what each process holds, from a copy of it."""
        from torch.distributed.checkpoint.state_dict_saver import async_save

        pending.error = processes.told(pending.error)  # the folder could not be made
        pending.check()
        tensors = {name: t.detach().clone() if t.device.type == "cpu" else t for name, t in self._flat().items()}
        where, together = pending.temporary / SHARDS, processes.group("checkpoint")
        future = async_save(tensors, checkpoint_id=where, process_group=together)
        pending.finishing = threading.Thread(target=pending.finish, args=(future,))
        pending.finishing.start()

    def _flat(self) -> dict[str, Tensor]:
        """Every tensor by a name that does not depend on the number of processes."""
        found: dict[str, Tensor] = {}
        for group, tensors in self._named().items():
            found |= {f"{group}.{name}": tensor.detach() for name, tensor in tensors.items()}
        for i, (name, parameter) in self._optimized():
            state = self.optimizers[i].state.get(parameter, {})
            found |= {f"optimizer.{i}.{name}.{kind}": torch.as_tensor(value) for kind, value in state.items()}
        return found

    def _optimized(self) -> Iterator[tuple[int, tuple[str, nn.Parameter]]]:
        """Yield (number of the optimizer, (name, parameter)) of all that is optimized."""
        named = {id(p): name for name, p in self.parameters.items()}
        named |= {id(p): f"heads.{name}" for name, p in self.heads.named_parameters()}
        for i, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                yield from ((i, (named[id(p)], p)) for p in group["params"])

    @torch.no_grad()
    def restore(self, folder: Path, recipe: Recipe) -> int:
        """Take everything back from a checkpoint of the same recipe, exactly; returns its step.

        Raises ConfigError: other settings; DamagedCheckpoint: not what was written; CheckpointError: other tensors.
        """
        about = inspect(folder)
        require_same(recipe, about["recipe"], folder)
        if about.get("failed") and about["recipe"].get("checks") == list(recipe.checks):
            raise ConfigError(
                f"{recipe.name} stopped at step {about['failed']} because of its checks ({', '.join(recipe.checks)}). "
                "Look for what is wrong and restart the run; with --set checks= it goes on from there as it is."
            )
        if self.frozen and about.get("frozen", self.frozen) != self.frozen:
            raise ConfigError(
                f"The weights that {recipe.name} does not train are others than when {folder} was made; "
                f"init ({', '.join(recipe.init)}) has changed. Put it back, or restart the run."
            )
        if self.data and about.get("data", self.data) != self.data and processes.first():
            logger.warning(
                "The data of %s are not those that %s was made with: samples were added, removed or replaced. Those "
                "of this epoch may come twice or not at all; restart the run to learn from all of them alike.",
                recipe.name, folder,
            )  # fmt: skip
        self._take_back(folder)
        self.ema.count = about.get("ema_count", 0)
        self.counters = {name: int(about.get(name, 0)) for name in self.counters}
        return int(about["step"])

    def _take_back(self, folder: Path) -> None:
        """Read the tensors of either kind of checkpoint into this run's own."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata
        from torch.distributed.checkpoint.state_dict_loader import load
        from torch.distributed.tensor import DTensor, distribute_tensor

        reader = FileSystemReader(folder / SHARDS) if (folder / SHARDS).exists() else None
        whole = self._read(folder) if reader is None else {}
        stored = {name: (tensor.shape, tensor.dtype) for name, tensor in whole.items()}
        for name, entry in reader.read_metadata().state_dict_metadata.items() if reader else ():
            if isinstance(entry, TensorStorageMetadata):
                stored[name] = entry.size, entry.properties.dtype
        for i, (name, parameter) in self._optimized():  # an optimizer's averages begin with its first step
            prefix = f"optimizer.{i}.{name}."
            kinds = {key.removeprefix(prefix): about for key, about in stored.items() if key.startswith(prefix)}
            if kinds := {kind: about for kind, about in kinds.items() if "." not in kind}:
                self.optimizers[i].state[parameter] = {
                    kind: torch.zeros_like(parameter, dtype=dtype)
                    if shape == parameter.shape
                    else torch.zeros(shape, dtype=dtype, device=parameter.device)
                    for kind, (shape, dtype) in kinds.items()
                }
        own = self._flat()
        fits = {name: own[name].shape == shape for name, (shape, _) in stored.items() if name in own}
        if strange := sorted(name for name in {**own, **stored} if not fits.get(name)):
            raise CheckpointError(
                f"{folder} does not fit the model: {', '.join(strange[:4])}. It is of another model, or an earlier "
                "version wrote it; go on with what made it, or restart the run."
            )
        if reader:
            alone, together = processes.world() == 1, processes.group("checkpoint")
            load(own, storage_reader=reader, no_dist=alone, process_group=together)
        for name, tensor in whole.items():
            to = own[name]
            if isinstance(to, DTensor):  # of which this process holds a part
                tensor = distribute_tensor(tensor.to(to.device), to.device_mesh, to.placements, src_data_rank=None)
            to.copy_(tensor)

    def _read(self, folder: Path) -> dict[str, Tensor]:
        """Read the files of one process, under the names of `_flat`."""
        try:
            found: dict[str, Tensor] = {}
            for file in folder.glob("*.safetensors"):
                found |= {f"{file.stem}.{name}": tensor for name, tensor in load_file(file).items()}
            for i, saved in enumerate(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)):
                names = [name for number, (name, _) in self._optimized() if number == i]
                for place, values in saved["state"].items():
                    found |= {f"optimizer.{i}.{names[place]}.{kind}": value for kind, value in values.items()}
            return found
        except Exception as error:  # each of three formats has its own errors
            raise DamagedCheckpoint(folder, error) from error


def wholes(run: Path) -> list[Path]:
    """Return the whole checkpoints of a run, the latest first."""
    return sorted((p for p in run.glob("step_*") if (p / "state.json").exists()), reverse=True)


def inspect(folder: Path) -> dict[str, Any]:
    """Return what `state.json` says, once the files are what was written. Raises DamagedCheckpoint: one is not."""
    complaint, about = "", {}
    if processes.first():
        try:
            about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            _ = about["recipe"], about["step"]
            for name, written in about.get("files", {}).items():
                found = crc(folder / name) if (folder / name).exists() else [-1, 0]
                if found != list(written):
                    complaint = f"{name} is " + ("missing" if found[0] < 0 else "not what was written")
                    break
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            complaint = f"state.json: {error}"
    complaint, about = processes.told((complaint, about))
    if complaint:
        raise DamagedCheckpoint(folder, complaint)
    return dict(about)
