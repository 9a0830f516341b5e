"""What a run writes: checkpoints that are whole or absent, and the averaged weights (EMA).

runs/NAME/step_00001000/{weights,ema,heads,optimizer}.* + state.json   while training, the newest few are kept
runs/NAME/final/                                                       the result, a folder that from_pretrained takes
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unilip.errors import CheckpointError


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


def step_folder(run: Path, step: int) -> Path:
    """Name of a step's checkpoint."""
    return run / f"step_{step:08d}"


def newest(run: Path) -> Path | None:
    """The latest whole checkpoint of a run, if there is one."""
    found = sorted(p for p in run.glob("step_*") if (p / "state.json").exists())
    return found[-1] if found else None


def write(
    run: Path,
    step: int,
    weights: dict[str, Tensor],
    ema: EMA | None,
    heads: dict[str, Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint under a temporary name, rename it, and drop all but the newest `keep`."""
    target = step_folder(run, step)
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, temporary / "weights.safetensors")
        if ema is not None:
            save_file({k: v.cpu() for k, v in ema.average.items()}, temporary / "ema.safetensors")
            state = state | {"ema_count": ema.count}
        if heads:
            save_file({k: v.detach().cpu().contiguous() for k, v in heads.items()}, temporary / "heads.safetensors")
        torch.save([o.state_dict() for o in optimizers], temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps(state | {"step": step}, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{target} cannot be written ({error}); the last whole checkpoint is kept.") from error
    for old in sorted(run.glob("step_*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def read(folder: Path) -> dict[str, Any]:
    """Read a checkpoint back: weights, ema, heads, optimizers and the state's JSON."""
    try:
        return {
            "weights": load_file(folder / "weights.safetensors"),
            "ema": load_file(folder / "ema.safetensors") if (folder / "ema.safetensors").exists() else None,
            "heads": load_file(folder / "heads.safetensors") if (folder / "heads.safetensors").exists() else {},
            "optimizers": torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True),
            "state": json.loads((folder / "state.json").read_text()),
        }
    except Exception as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint ({error}); delete it to resume from the one before.") from error
