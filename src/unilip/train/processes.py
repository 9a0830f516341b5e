"""The processes of a run: who this one is, what it reads, and the few things that all of them agree on.

Without `torchrun` there is one process, and everything here is free. A recipe states the global batch; `divided` cuts
it for any number of processes so that a step holds the same samples, and `own_batches` says which batches a process
reads.
"""

import atexit
import contextlib
import dataclasses
import datetime
import os
import time
import uuid
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unilip.errors import ConfigError, UniLIPError
from unilip.machine import Place
from unilip.recipes.record import Recipe

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective that waits for others, a slow checkpoint among them
_groups: dict[str, Any] = {}  # "control": agreement between hosts; "checkpoint": of the thread that writes


def rank() -> int:
    """Number of this process among all, from 0."""
    return Place.of_environment().rank


def world() -> int:
    """How many processes there are, on all machines together."""
    return Place.of_environment().world


def first() -> bool:
    """Whether this is the process that logs, draws and writes what is written once."""
    return rank() == 0


def divided(recipe: Recipe, processes: int) -> Recipe:
    """Return the recipe with its step cut into batches for so many processes, all of which `accumulate` counts.

    Raises ConfigError: the samples of a step cannot be shared out equally.
    """
    samples = recipe.batch_size * recipe.accumulate
    own = samples // processes
    if samples % processes:
        raise ConfigError(
            f"A step of {recipe.name} has batch_size x accumulate = {recipe.batch_size} x {recipe.accumulate} = "
            f"{samples} samples, which {processes} processes cannot share equally; choose numbers that divide."
        )
    size = next(size for size in range(min(own, recipe.batch_size), 0, -1) if own % size == 0)
    return dataclasses.replace(recipe, batch_size=size, accumulate=samples // size)


def own_batches(start: int, end: int) -> range:
    """Indices of the batches that this process reads, from `start` (the first of a step) to `end`."""
    return range(start + rank(), end, world())


def join(device: torch.device) -> None:
    """Join the others, for the rest of the program; nothing happens where there is one process."""
    if world() > 1 and not _groups:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                stores: Any = dist  # which does not export their types
                store = stores.TCPStore(address, port, world(), is_master=False, timeout=TIMEOUT)
                fresh = stores.PrefixStore(agree(store), store)
                dist.init_process_group(backend, store=fresh, rank=rank(), world_size=world(), timeout=TIMEOUT)
            else:
                dist.init_process_group(backend, timeout=TIMEOUT)
            atexit.register(_leave)
        for name in ("control", "checkpoint"):  # threads must not share a group: the order of calls would differ
            _groups[name] = dist.new_group(backend="gloo", timeout=TIMEOUT)


def agree(store: Any) -> str:
    """Agree with the other processes on a name that no earlier attempt had.

    torchrun keeps one store over its restarts, with addresses of processes that are gone. So each process says hello
    under a name of its own, the first answers what it finds there until all have heard it, and what follows is stored
    under that name.
    Raises UniLIPError: a process does not come within the time that others are waited for.
    """
    own = uuid.uuid4().hex
    if not first():
        store.set(f"hello/{rank()}", own)
        answer = f"answer/{own}"
        store.wait([answer], TIMEOUT)
        name = store.get(answer).decode()
        store.set(f"heard/{name}/{rank()}", "1")
        return str(name)
    missing, end = set(range(1, world())), time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", own)
            if store.check([f"heard/{own}/{other}"]):
                missing.discard(other)
        if time.monotonic() > end:
            raise UniLIPError(f"Process {min(missing)} of {world()} did not come within {TIMEOUT}; see its own output.")
        time.sleep(0.02)
    return own


def _leave() -> None:
    with contextlib.suppress(Exception):  # the others may be gone
        dist.destroy_process_group()


def group(name: str) -> Any:
    """Return a gloo group of all processes: "control" or "checkpoint"; None before `join`."""
    return _groups.get(name)


def wait() -> None:
    """Wait for all processes."""
    if group("control") is not None:
        dist.barrier(group=group("control"))


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first process through the block before the others: it makes the files that they find."""
    if not first():
        wait()
    yield
    if first():
        wait()


def anywhere(flag: int) -> int:
    """Return the largest of the numbers that the processes give: a signal that one received, for instance."""
    if group("control") is None:
        return flag
    shared = torch.tensor(flag)
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=group("control"))
    return int(shared)


def told(value: Any) -> Any:
    """Return the first process's value in every process."""
    if group("control") is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group("control"))
    return box[0]


def mean_(values: Tensor) -> Tensor:
    """Replace values (on the run's device) by their mean over the several processes, without waiting for it."""
    dist.all_reduce(values)
    return values.div_(world())
