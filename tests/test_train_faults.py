"""What goes wrong in long runs: losses that are no numbers, full disks, kills at any moment, processes that die."""

import json
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import unilip.emoji.tokenizer
from unilip import cli
from unilip.errors import CheckpointError, UniLIPError
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override
from unilip.train.loop import Health, Loop, train
from unilip.train.objectives import ReconstructObjective, UnderstandObjective
from unilip.train.state import wholes

HERE = Path(__file__).parent


def recipe(*settings, name="tiny/clip"):
    quick = ("log_every=1", "sample_every=100", "save_every=1", "keep=9")
    return override(get_recipe(name), [*quick, *settings])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder of runs with a tokenizer, which takes longest to make."""
    runs = tmp_path_factory.mktemp("faults")
    make = unilip.emoji.tokenizer.train_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unilip.emoji.tokenizer, "train_tokenizer", lambda *a: make(*a, sentences=300))
        train(recipe("steps=1"), runs, progress=False)
    return runs / "tiny" / "clip" / "tokenizer"


@pytest.fixture
def runs(tokenizer, tmp_path) -> Path:
    shutil.copytree(tokenizer, tmp_path / "tiny" / "clip" / "tokenizer")
    return tmp_path


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def break_losses(monkeypatch, steps, objective=UnderstandObjective):
    """Multiply the losses of these steps (from 1) by NaN, so that every gradient is one too."""
    loss = objective.loss

    def broken(self, batch, step):
        total, terms = loss(self, batch, step)
        return (total * math.nan if step + 1 in steps else total), terms

    monkeypatch.setattr(objective, "loss", broken)


# --- losses that are no numbers ---------------------------------------------------------------------------------------


def test_a_step_that_is_no_number_is_skipped_and_counted(runs, monkeypatch):
    break_losses(monkeypatch, {2, 4})
    run = train(recipe("steps=5", "ema=0.9", "skip_limit=2"), runs, progress=False).parent
    lines = log_of(run)
    assert [line.get("skipped") for line in lines] == [None, 1, 1, 2, 2]
    assert [line["loss"] is None for line in lines] == [False, True, False, True, False], "null: NaN is not JSON"
    weights = [load_file(run / f"step_{step:08d}" / "weights.safetensors") for step in range(1, 6)]
    for one, two, same in zip(weights[:-1], weights[1:], (True, False, True, False), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one) == same
    optimizer = torch.load(run / "step_00000005" / "optimizer.pt", weights_only=True)[0]
    assert {float(state["step"]) for state in optimizer["state"].values()} == {3.0}
    assert all(bool(state["exp_avg"].isfinite().all()) for state in optimizer["state"].values())
    assert all(bool(t.isfinite().all()) for t in load_file(run / "final" / "model.safetensors").values())


def test_too_many_in_a_row_stop_the_run_with_the_batch(runs, monkeypatch):
    break_losses(monkeypatch, {2, 3, 4, 5})
    settings = ("steps=9", "skip_limit=3", "batch_size=2", "accumulate=2")
    with pytest.raises(UniLIPError, match=r"not a finite number at step 4 of tiny/clip, the last of 3 in a row"):
        train(recipe(*settings), runs, progress=False)
    run = runs / "tiny" / "clip"
    batches = torch.load(run / "skipped_00000004.pt", weights_only=True)
    assert len(batches) == 2 and batches[0]["images"].shape == (2, 3, 56, 56)
    assert set(batches[0]["captions"]) >= {"input_ids", "attention_mask"}
    state = json.loads((wholes(run)[0] / "state.json").read_text())
    assert wholes(run)[0].name == "step_00000003" and (state["skipped"], state["skipped_in_a_row"]) == (2, 2)
    with pytest.raises(UniLIPError, match=r"at step 4"):  # the count goes on from the checkpoint
        train(recipe(*settings), runs, progress=False)
    break_losses(monkeypatch, ())
    monkeypatch.undo()
    train(recipe(*settings, "skip_limit=3"), runs, progress=False)
    assert log_of(run)[-1]["skipped"] == 2


def test_the_second_player_keeps_its_means(runs, monkeypatch):
    """A drawn picture of NaN must not stay in the discriminator's running means."""
    settings = ("objective.gan=0.1", "objective.gan_start=0", "objective.perceptual=0", "init=", "steps=3")
    real = ReconstructObjective.reconstruct
    calls = []

    def broken(self, normalised, *more):
        *others, pixels = real(self, normalised, *more)
        calls.append(1)
        return *others, pixels * math.nan if len(calls) == 2 else pixels

    monkeypatch.setattr(ReconstructObjective, "reconstruct", broken)
    run = train(recipe(*settings, name="tiny/recon"), runs, progress=False).parent
    heads = [load_file(run / f"step_{step:08d}" / "heads.safetensors") for step in (1, 2, 3)]
    assert all(bool(t.isfinite().all()) for kept in heads for t in kept.values())
    assert torch.equal(heads[0]["adversary.means"], heads[1]["adversary.means"])
    assert not torch.equal(heads[1]["adversary.means"], heads[2]["adversary.means"])


def test_health_by_hand():
    health = Health(torch.device("cpu"), 2)
    for step, whole in enumerate([True, False, True, False, False, False], 1):
        health.note(step, torch.tensor(whole), [step])
        assert health.broken(now=False) == ((step, [step]) if step >= 5 else None)
    assert int(health.total) == 4 and int(health.row) == 3


# --- full disks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [40_000, 400_000])
def test_a_file_that_cannot_grow_is_a_clear_error_and_the_last_checkpoint_stays(runs, limit):
    """The kernel refuses to write on, as on a full disk: in the first file, or in a later one."""
    run = train(recipe(), runs, progress=False, stop_after=1)
    before = {file.name: file.read_bytes() for file in (run / "step_00000001").iterdir()}
    largest = max(map(len, before.values()))
    assert limit < largest
    hidden = (run / "log.jsonl", run / "tensorboard")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for path in hidden:  # which would otherwise be the first to be refused
        path.unlink() if path.is_file() else shutil.rmtree(path)
    from unilip.train.state import State

    save = State.save

    def limited(self, *arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            return save(self, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "save", limited)
        with pytest.raises(CheckpointError, match=r"step_00000002 cannot be written .*last whole checkpoint is kept"):
            train(recipe(), runs, progress=False)
    assert [p.name for p in run.glob("*step_*")] == ["step_00000001"]
    assert {file.name: file.read_bytes() for file in (run / "step_00000001").iterdir()} == before
    assert train(recipe(), runs, progress=False).name == "final", "with room again it goes on"


@pytest.mark.parametrize("what", ["log", "show"])
def test_a_disk_that_is_full_for_anything_else_is_a_clear_error(runs, monkeypatch, what):
    """The log, or a sheet of pictures; /dev/full refuses as a full disk does."""

    def write(self, *_):
        with open("/dev/full", "w") as file:
            file.write("no room")

    settings = ("steps=2", "sample_every=2")
    train(recipe(*settings), runs, progress=False, stop_after=1)
    monkeypatch.setattr(Loop, what, write)
    with pytest.raises(UniLIPError, match=r"clip cannot be written .*No space left.*last whole checkpoint is kept"):
        train(recipe(*settings), runs, progress=False)
    monkeypatch.undo()
    assert train(recipe(*settings), runs, progress=False).name == "final", "with room again it goes on"


def test_a_damaged_note_of_a_finished_run_is_told(tokenizer, tmp_path):
    final = shutil.copytree(tokenizer.parent / "final", tmp_path / "tiny" / "clip" / "final")
    (final / "recipe.json").write_text("{")
    with pytest.raises(UniLIPError, match=r"recipe\.json cannot be read"):
        train(recipe("steps=1"), tmp_path, progress=False)


@pytest.mark.parametrize("world", [1, 2])
def test_every_process_says_what_stopped_it(world, monkeypatch, capsys):
    """What one of them alone could not read must not be lost."""
    monkeypatch.setenv("RANK", str(world - 1))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    logger = logging.getLogger("unilip")
    before = logger.level
    try:
        assert cli.main(["train", "tiny/clip", "--set", "steps=none"]) == 2
    finally:
        logger.setLevel(before)
    assert capsys.readouterr().err.startswith(f"unilip: error{' in process 1' if world == 2 else ''}: steps='none'")


# --- what a step must not do ------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Notes operations for whose result the program has to wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"):
            self.found.append(f"{name} in {''.join(traceback.format_stack(limit=6)[:-1])}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["tiny/sft", "tiny/recon_distill"])
def test_a_step_never_waits_for_the_device(tokenizer, tmp_path, monkeypatch, name):
    """No `.item()` between the batch and the update, in any way that it can be written."""
    step, found = Loop.one_step, []

    def watched(self, loader):
        batches = [next(loader) for _ in range(self.own_batches)]
        self.objective.loss(batches[0], self.step)  # the libraries look at some things once
        with Waits() as waits:
            terms = step(self, iter(batches))
        found.append(waits.found)
        return terms

    monkeypatch.setattr(Loop, "one_step", watched)
    shutil.copytree(tokenizer, tmp_path / name / "tokenizer")
    settings = ("init=", "steps=2", "data.edit_share=1") if name == "tiny/sft" else ("init=", "steps=2")
    train(recipe(*settings, "batch_size=2", "sample_every=9", "save_every=9", name=name), tmp_path, progress=False)
    assert found == [[], []], found


# --- kills ------------------------------------------------------------------------------------------------------------


def fault_checks(*words: str, timeout: float = 3600) -> dict:
    """Run a check of fault_checks.py; returns what it found."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "fault_checks.py"), *words], capture_output=True, text=True, env=environment,
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_in_the_middle_of_24_writes_the_run_is_bit_for_bit_the_same(runs):
    found = fault_checks("kills", str(runs), "24")
    assert found["kills"] > found["while_writing"] == 24, found
    assert found["different"] == []


@pytest.mark.slow
def test_two_processes_on_a_full_disk(runs):
    found = fault_checks("full", str(runs))
    assert all("cannot be written" in text for text in found["errors"]) and len(found["errors"]) == 2
    assert found["left"] == ["step_00000001"] and found["finished"]


def torchrun(runs: Path, *options: str, settings=()) -> subprocess.Popen:
    """Start two processes of tiny/clip by torchrun."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options,
        "-m", "unilip.train", "tiny/clip", "--runs", str(runs), "--device", "cpu", "--no-progress",
    ]  # fmt: skip
    for setting in ("sample_every=1000", "log_every=1", "save_every=2", "batch_size=4", *settings):
        command += ["--set", setting]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def workers(launcher: subprocess.Popen) -> list[int]:
    """The processes that torchrun started."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def reach(launcher: subprocess.Popen, run: Path, step: int) -> None:
    """Wait until the log has a step."""
    while not (run / "log.jsonl").exists() or len((run / "log.jsonl").read_text().splitlines()) < step:
        assert launcher.poll() is None, launcher.stdout.read()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_within_a_minute(runs):
    launcher = torchrun(runs, "--max-restarts", "0", settings=("steps=100000",))
    reach(launcher, runs / "tiny" / "clip", 3)
    first, second = workers(launcher)
    os.kill(second, signal.SIGKILL)
    begun = time.monotonic()
    output = launcher.communicate(timeout=120)[0]
    assert time.monotonic() - begun < 60 and launcher.returncode != 0, output
    assert not Path(f"/proc/{first}").exists()


def test_who_starts_again_does_not_wait_for_the_dead(tmp_path):
    """torchrun keeps one store over its restarts, with the addresses of the attempt before."""
    assert fault_checks("rejoin", str(tmp_path))["found"] == [[1, 1], [11, 11], [21, 21]]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_torchrun_restarts_from_the_checkpoint(runs, mode):
    settings = ("steps=12", f"parallel={mode}")
    run = runs / "tiny" / "clip"
    shutil.copytree(runs / "tiny", runs / "undisturbed" / "tiny")
    whole = torchrun(runs / "undisturbed", settings=settings)
    assert whole.wait(600) == 0, whole.stdout.read()
    launcher = torchrun(runs, "--max-restarts", "2", settings=settings)
    reach(launcher, run, 5)
    os.kill(workers(launcher)[0], signal.SIGKILL)
    output = launcher.communicate(timeout=600)[0]
    assert launcher.returncode == 0, output
    assert "resuming tiny/clip at step" in output
    lines, expected = log_of(run), log_of(runs / "undisturbed" / "tiny" / "clip")
    assert [(line["step"], line["loss"]) for line in lines] == [(line["step"], line["loss"]) for line in expected]


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_in_all_processes(runs):
    launcher = torchrun(runs, settings=("steps=100000", "save_every=100000"))
    reach(launcher, runs / "tiny" / "clip", 3)
    launcher.send_signal(signal.SIGTERM)
    output = launcher.communicate(timeout=120)[0]
    saved = wholes(runs / "tiny" / "clip")[0]
    assert saved is not None and "saved, the same command goes on from there" in output, output
