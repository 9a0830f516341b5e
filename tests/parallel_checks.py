"""What tests/test_train_parallel.py runs in processes of its own: the same recipes alone, and shared by two.

Usage: parallel_checks.py RUNS CHECK. One process imports everything and forks the others, as imports cost most.
"""

import contextlib
import faulthandler
import functools
import json
import logging
import os
import shutil
import socket
import sys
from pathlib import Path

import torch

import unilip.emoji.tokenizer
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import Recipe, override
from unilip.train import loop
from unilip.train.loop import train

CRASHED = 70  # a process was ended by a signal: the libraries' own code crashed, which no exception tells
QUICK = ("batch_size=4", "steps=3", "log_every=1", "sample_every=100", "save_every=100", "ema=0.9")
FLOW = (*QUICK, "init=encoder,mllm=start/clip", "data.edit_share=0.5", "name=x/sft")
RECON = (
    *QUICK, "init=encoder=start/clip", "trains=encoder:0.1,latent_head,pixel_decoder", "name=x/recon",
    "objective.gan_start=1",
)  # fmt: skip


def recipe(name: str, *settings: str) -> Recipe:
    return override(get_recipe(name), settings)


def flow(*settings: str) -> Recipe:
    """Generation and edits from an encoder and LLM, with a fresh latent head."""
    return recipe("tiny/sft", *FLOW, *settings)


def recon(*settings: str) -> Recipe:
    """The tokenizer with all its losses, the second player among them."""
    return recipe("tiny/recon_distill", *RECON, *settings)


def together(processes: int, work, *arguments) -> None:
    """Run a function in so many processes that know each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )  # fmt: skip
            code = 1
            try:
                work(*arguments)
                code = 0
            except BaseException as error:
                sys.stdout.write(f"rank {rank}: {type(error).__name__}: {error}\n")
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if min(codes) < 0:
        sys.exit(CRASHED)
    assert codes == [0] * processes, codes


def start(runs: Path) -> None:
    """Make what every recipe here begins with: an encoder and a language model with their tokenizer."""
    make = unilip.emoji.tokenizer.train_tokenizer
    unilip.emoji.tokenizer.train_tokenizer = lambda *a: make(*a, sentences=300)
    train(recipe("tiny/clip", "steps=1", "sample_every=9", "name=start/clip"), runs, progress=False)


def run(folder: Path, base: Path, recipes: list[Recipe], stops: int | None = None) -> None:
    """Train the recipes in a folder of runs of their own."""
    (folder / "start").mkdir(parents=True, exist_ok=True)
    if not (folder / "start" / "clip").exists():
        with contextlib.suppress(FileExistsError):  # made by another process
            (folder / "start" / "clip").symlink_to(base / "start" / "clip")
    for one in recipes:
        train(one, folder, progress=False, stop_after=stops)


def fast(runs: Path) -> None:
    """The flow stage alone, by DDP and FSDP2; resumed by other numbers of processes."""
    together(1, start, runs)
    every = flow("save_every=1", "keep=3")
    jumps = recipe("tiny/few", *FLOW, "name=x/few", "batch_size=4")
    together(1, run, runs / "one", runs, [every, jumps])
    for mode in ("ddp", "fsdp"):
        together(2, run, runs / mode, runs, [override(one, [f"parallel={mode}"]) for one in (every, jumps)])
    back(runs / "fsdp", runs / "two_one", 1)
    together(1, run, runs / "two_one", runs, [every])
    back(runs / "one", runs / "one_two", 2)
    together(2, run, runs / "one_two", runs, [override(every, ["parallel=fsdp"])])


def back(old: Path, new: Path, step: int) -> None:
    """Copy a finished run as it was after a step."""
    shutil.copytree(old, new, symlinks=True)
    shutil.rmtree(new / "x/sft/final")
    for folder in (new / "x/sft").glob("step_*"):
        if folder.name > f"step_{step:08d}":
            shutil.rmtree(folder)


def full(runs: Path) -> None:
    """Tokenizer stage with GAN, accumulation, more processes than batches, precisions."""
    together(1, start, runs)
    accumulate = ["batch_size=2", "accumulate=4", "name=x/accumulated"]
    common = [recon(), flow(*accumulate), recon(*accumulate, "name=x/recon_accumulated")]
    together(1, run, runs / "one", runs, common)
    for mode in ("ddp", "fsdp"):
        shared = [override(one, [f"parallel={mode}"]) for one in common]
        together(2, run, runs / mode, runs, shared)
        together(4, run, runs / f"{mode}4", runs, shared)
    for mode in ("ddp", "fsdp"):
        low = flow("reduce_dtype=bfloat16", "name=x/reduced", f"parallel={mode}")
        mixed = flow("dtype=bfloat16", "name=x/mixed", f"parallel={mode}")
        halved = flow("weights_dtype=bfloat16", "dtype=bfloat16", "name=x/halved", f"parallel={mode}")
        together(2, run, runs / mode, runs, [low, mixed, halved])
    together(1, run, runs / "one", runs, [flow("dtype=bfloat16", "name=x/mixed")])
    for first, second in (("ddp", "fsdp"), ("fsdp", "ddp")):
        folder = runs / f"{first}_{second}"
        together(2, run, folder, runs, [recon(f"parallel={first}")], 2)
        together(4, run, folder, runs, [recon(f"parallel={second}")])


def compiled(runs: Path) -> None:
    """Shards and recomputation with compiled layers; traced as always, but not turned into machine code."""
    together(1, start, runs)
    together(1, run, runs / "one", runs, [flow()])
    together(2, run, runs / "selective", runs, [flow("parallel=fsdp", "selective_checkpointing=1")])
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    together(2, run, runs / "fsdp", runs, [flow("parallel=fsdp", "compile=1", "gradient_checkpointing=1")])
    together(2, run, runs / "ddp", runs, [flow("compile=1")])


if __name__ == "__main__":
    faulthandler.enable()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR)
    loop.logger.setLevel(logging.ERROR)
    place = Path(sys.argv[1])
    shutil.rmtree(place, ignore_errors=True)
    {"fast": fast, "full": full, "compiled": compiled}[sys.argv[2]](place)
    sys.stdout.write(json.dumps("done") + "\n")
