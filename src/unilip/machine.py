"""The machine: its processor and memory, which of a run's processes this is, on which device it computes, and Ray."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

from unilip.errors import ConfigError, UniLIPError, install

PERFORMANCES = ("exact", "auto", "speed", "memory")  # what may count for who runs a model
CONTROLS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
TRAITS = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU part", "Features")  # of /proc/cpuinfo


class Place(NamedTuple):
    """Which of how many processes this is, and which on its own machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> Place:
        """Read RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them. Raises UniLIPError: no such place."""
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        local = os.environ.get("LOCAL_RANK", "0")
        if not (rank.isdecimal() and world.isdecimal() and local.isdecimal() and int(rank) < int(world)):
            raise UniLIPError(
                f"RANK is {rank!r}, WORLD_SIZE {world!r} and LOCAL_RANK {local!r}; they are numbers, and RANK counts "
                "from 0 and must be less than WORLD_SIZE. Start with torchrun, or unset all of them."
            )
        return cls(int(rank), int(world), int(local))


@functools.cache
def processor() -> str:
    """Name the kind of processor, so that two that compute differently have different names."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in reversed(lines)}  # of the first of several
    limits = (os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"))
    traits = "; ".join((*(found.get(key, "") for key in TRAITS), *filter(None, limits)))
    name = found.get("model name") or platform.machine()
    return f"{name} ({hashlib.blake2b(traits.encode(), digest_size=4).hexdigest()})"


def spare_memory() -> int:
    """Return how many bytes of memory are free, as Linux and its control groups tell; elsewhere a guess of 4 GiB."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30
    group = Path("/sys/fs/cgroup")
    for limit, used in CONTROLS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            free = min(free, int((group / limit).read_text()) - int((group / used).read_text()))
    return free


def choose_device(device: Any = "auto") -> str:
    """Return a device that is there; "auto": CUDA, Apple's GPU or the CPU. Raises UniLIPError: there is none such."""
    import torch

    name = str(device) if isinstance(device, (str, torch.device)) else ""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if gpus else "mps" if mps else "cpu"
    try:
        is_known = torch.device(name).type in ("cpu", "cuda", "mps")
    except RuntimeError:
        is_known = False
    if not is_known:
        raise UniLIPError(f"There is no device {device!r}; allowed: auto, cpu, cuda, cuda:N, mps.")
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= gpus:
        have = f"has {gpus} CUDA device{'s' if gpus > 1 else ''}, numbered from 0" if gpus else "offers no CUDA device"
        raise UniLIPError(f"device {name}: PyTorch {have} here; use cpu, or auto.")
    if name == "mps" and not mps:
        raise UniLIPError("device mps: PyTorch offers no Apple GPU here; use cpu, or auto.")
    place = Place.of_environment()
    return f"cuda:{place.local % gpus}" if name == "cuda" and place.world > 1 else name


def start_ray(**options: Any) -> None:
    """Join the Ray cluster of RAY_ADDRESS, or start one, unless that is done. Raises ConfigError: Ray is missing."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"The package ray is missing ({error}); {install('ray')}.") from error
    if not ray.is_initialized():
        options |= {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(address=os.environ.get("RAY_ADDRESS") or "local", **options)
