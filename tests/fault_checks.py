"""What tests/test_train_faults.py runs in a process of its own, which forks those that are killed.

Usage: fault_checks.py kills RUNS TIMES | full RUNS | rejoin RUNS. The last line is what was found, as JSON.
"""

import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from parallel_checks import together
from unilip.errors import CheckpointError
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import Recipe, override
from unilip.train import loop, processes
from unilip.train.loop import train
from unilip.train.state import State, wholes


def recipe(*settings: str) -> Recipe:
    return override(get_recipe("tiny/clip"), ["log_every=1", "sample_every=1000", "save_every=1", "ema=0.9", *settings])


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint of one process."""
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found |= {f"{file.stem}.{name}": tensor for name, tensor in load_file(file).items()}
    for i, optimizer in enumerate(torch.load(checkpoint / "optimizer.pt", weights_only=True)):
        for number, state in optimizer["state"].items():
            found |= {f"optimizer.{i}.{number}.{kind}": value for kind, value in state.items()}
    return found


def kills(runs: Path, times: int) -> dict:
    """Kill a run without warning, most times while it writes a checkpoint, until that has been so often enough."""
    rng = random.Random(0)
    run = runs / "tiny" / "clip"
    killed = while_writing = 0
    last = 0
    while while_writing < times:
        child = os.fork()
        if child == 0:
            train(recipe("steps=100000"), runs, progress=False)
            os._exit(0)
        writing = killed % 6 != 5
        begun, aim = time.monotonic(), rng.uniform(0.2, 3.0)
        while True:  # at least one new checkpoint, so that the run moves on
            moved = any(int(folder.name[-8:]) > last for folder in wholes(run))
            if moved and time.monotonic() - begun > aim and (not writing or list(run.glob(".step_*.part"))):
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.004) if writing else 0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        while_writing += bool(list(run.glob(".step_*.part")))
        last = int(wholes(run)[0].name[-8:])
    child = os.fork()
    if child == 0:
        train(recipe("steps=100000"), runs, progress=False, stop_after=2)
        os._exit(0)
    os.waitpid(child, 0)
    end = int(wholes(run)[0].name[-8:])
    undisturbed = runs / "undisturbed"
    shutil.copytree(run / "tokenizer", undisturbed / "tiny" / "clip" / "tokenizer")
    train(recipe("steps=100000", "save_every=100000"), undisturbed, progress=False, stop_after=end)
    one, other = contents(wholes(run)[0]), contents(wholes(undisturbed / "tiny" / "clip")[0])
    different = sorted(name for name in {**one, **other} if name not in one or not torch.equal(one[name], other[name]))
    return {"kills": killed, "while_writing": while_writing, "steps": end, "different": different}


def full(runs: Path) -> dict:
    """Two processes whose shards cannot be written, and that go on when they can."""
    errors = runs / "errors"
    errors.mkdir()

    def work() -> None:
        train(recipe("parallel=fsdp"), runs, progress=False, stop_after=1)

    def limited() -> None:
        write = State._write_shards

        def under_limit(self, pending):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            write(self, pending)

        State._write_shards = under_limit
        try:
            train(recipe("parallel=fsdp", "log_every=1000"), runs, progress=False)
        except CheckpointError as error:
            (errors / os.environ["RANK"]).write_text(str(error))

    together(2, work)
    together(2, limited)
    left = sorted(p.name for p in (runs / "tiny" / "clip").glob("*step_*"))
    together(2, lambda: train(recipe("parallel=fsdp"), runs, progress=False))
    finished = (runs / "tiny" / "clip" / "final").exists()
    return {"errors": [file.read_text() for file in errors.iterdir()], "left": left, "finished": finished}


def rejoin(runs: Path) -> dict:
    """Processes that join again and again through one store, as torchrun's do; one of them late each time."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sums = []
    for attempt, late in enumerate((None, 0, 1)):
        children = []
        for rank in (0, 1):
            child = os.fork()
            if child == 0:
                os.environ.update(
                    RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
                    TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=str(attempt),
                )  # fmt: skip
                time.sleep(2 if rank == late else 0)
                processes.join(torch.device("cpu"))
                (runs / f"{attempt}{rank}").write_text(str(processes.anywhere(10 * attempt + rank)))
                os._exit(0)  # without a word, as what is killed
            children.append(child)
        end = time.monotonic() + 120
        while children and time.monotonic() < end:
            children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
            time.sleep(0.05)
        for child in children:
            os.kill(child, signal.SIGKILL)
        sums.append([int(file.read_text()) for file in sorted(runs.glob(f"{attempt}[01]"))])
    return {"found": sums}


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR)
    loop.logger.setLevel(logging.ERROR)
    place = Path(sys.argv[2])
    found = (
        kills(place, int(sys.argv[3]))
        if sys.argv[1] == "kills"
        else {"full": full, "rejoin": rejoin}[sys.argv[1]](place)
    )
    sys.stdout.write(json.dumps(found) + "\n")
