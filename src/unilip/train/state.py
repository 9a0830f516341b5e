"""What changes while training, and how it is kept: checkpoints that are whole or absent, and averaged weights (EMA).

runs/NAME/step_00001000/{weights,ema,heads,optimizer}.* + state.json   while training, the newest few are kept
runs/NAME/final/                                                       the result, a folder that from_pretrained takes
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unilip.errors import CheckpointError, ConfigError
from unilip.train.recipe import Recipe, changed_settings, plain


class EMA:
    """Exponential moving average of some parameters, in float32, with a short warm-up of the decay."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.parameters = parameters
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current values."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(
            list(self.average.values()), [p.detach().float() for p in self.parameters.values()], 1 - decay
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the model's values; a second call undoes the first."""
        for name, parameter in self.parameters.items():
            current = parameter.detach().float().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(current)


class State:
    """Everything that changes: trained weights by name, training-only modules, optimizers, averages."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        heads: Mapping[str, nn.Module | None],
        optimizers: Iterable[torch.optim.Optimizer],
        ema: EMA | None,
    ) -> None:
        self.parameters = parameters
        self.heads = nn.ModuleDict({name: module for name, module in heads.items() if module is not None})
        self.optimizers = list(optimizers)
        self.ema = ema

    def save(self, run: Path, step: int, recipe: Recipe) -> Path:
        """Write a checkpoint under a temporary name, rename it, and drop all but the newest `recipe.keep`."""
        target = step_folder(run, step)
        temporary = target.with_name(f".{target.name}.part")
        for left in run.glob(".step_*.part"):  # of a run that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        about: dict[str, Any] = {"recipe": plain(recipe), "step": step}
        try:
            temporary.mkdir(parents=True)
            _save_tensors(self.parameters, temporary / "weights.safetensors")
            _save_tensors(self.heads.state_dict(), temporary / "heads.safetensors")
            if self.ema is not None:
                about["ema_count"] = self.ema.count
                _save_tensors(self.ema.average, temporary / "ema.safetensors")
            torch.save([o.state_dict() for o in self.optimizers], temporary / "optimizer.pt")
            (temporary / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"{target} cannot be written ({error}); the last whole checkpoint is kept."
            ) from error
        for old in sorted(run.glob("step_*"))[: -recipe.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    @torch.no_grad()
    def restore(self, folder: Path, recipe: Recipe) -> int:
        """Take everything back from a checkpoint of the same recipe, exactly; returns its step.

        Raises:
            ConfigError: the recipe has other settings now.
            CheckpointError: the folder is damaged, or holds other tensors.
        """
        saved = _read(folder)
        changed = changed_settings(recipe, saved["state"]["recipe"])
        if changed:
            raise ConfigError(
                f"{folder} was made with other settings: {changed}. Restart the run, or use another runs folder."
            )
        pairs = [("weights", self.parameters), ("heads", self.heads.state_dict())]
        if self.ema is not None:
            pairs.append(("ema", self.ema.average))
            self.ema.count = saved["state"]["ema_count"]
        for kind, own in pairs:
            theirs = saved[kind]
            strange = sorted(
                name for name in {**own, **theirs} if name not in own or name not in theirs
                or own[name].shape != theirs[name].shape
            )  # fmt: skip
            if strange:
                raise CheckpointError(f"{folder}/{kind}.safetensors does not fit the model: {', '.join(strange[:4])}.")
            for name, tensor in own.items():
                tensor.copy_(theirs[name])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return int(saved["state"]["step"])


def step_folder(run: Path, step: int) -> Path:
    """Name of a step's checkpoint."""
    return run / f"step_{step:08d}"


def newest(run: Path) -> Path | None:
    """The latest whole checkpoint of a run, if there is one."""
    found = sorted(p for p in run.glob("step_*") if (p / "state.json").exists())
    return found[-1] if found else None


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    if tensors:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)


def _load_tensors(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.exists() else {}


def _read(folder: Path) -> dict[str, Any]:
    """Read a checkpoint back: weights, ema, heads, optimizers and the state's JSON."""
    try:
        return {
            **{kind: _load_tensors(folder / f"{kind}.safetensors") for kind in ("weights", "ema", "heads")},
            "optimizers": torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True),
            "state": json.loads((folder / "state.json").read_text(encoding="utf-8")),
        }
    except Exception as error:  # each of three formats has its own errors
        raise CheckpointError(
            f"{folder} is damaged ({error}); delete it to resume from the checkpoint before, or restart the run."
        ) from error
