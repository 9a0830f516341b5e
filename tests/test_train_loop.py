"""The loop: all stages one after the other, resuming bit for bit, stopping safely, and what is written on the way."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import unilip.emoji.tokenizer
from unilip.errors import CheckpointError, ConfigError, UniLIPError
from unilip.files import Lock
from unilip.model import UniLIP
from unilip.pictures import normalise
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import Optim, override, plain
from unilip.train import loop as loops
from unilip.train.build import build, make_batches
from unilip.train.loop import Float32Attention, Interrupted, Loop, learning_rate, mixed_precision, train
from unilip.train.state import EMA, wholes

STAGES = ("clip", "instruct", "recon", "recon_distill", "pretrain", "sft")
QUICK = ("objective.perceptual=0", "sample_every=100", "log_every=1", "save_every=2")


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """The six tiny stages, trained one from the other; the folder of their runs."""
    runs = tmp_path_factory.mktemp("runs")
    make = unilip.emoji.tokenizer.train_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unilip.emoji.tokenizer, "train_tokenizer", lambda *a: make(*a, sentences=1000))
        for stage in STAGES:
            assert train(get_recipe(f"tiny/{stage}"), runs, progress=False) == runs / "tiny" / stage / "final"
    return runs


@pytest.fixture
def fork(stages, tmp_path) -> Path:
    """A folder of runs of one's own, where all six stages are sources, but none has been begun."""
    for stage in STAGES:
        name = "tokenizer" if stage == "clip" else "nothing"
        place = tmp_path / "source" / stage
        place.mkdir(parents=True)
        (place / "final").symlink_to(stages / "tiny" / stage / "final")
        if name == "tokenizer":
            shutil.copytree(stages / "tiny" / stage / name, tmp_path / "tiny" / stage / name)
    return tmp_path


def quick(*settings, name="tiny/recon"):
    """A recipe that starts from the sources of `fork`."""
    recipe = override(get_recipe(name), settings)
    return override(recipe, ["init=" + ",".join(text.replace("=tiny/", "=source/") for text in recipe.init)])


def recon(*settings):
    return quick(*QUICK, *settings)


def load(folder: Path, stage: str) -> UniLIP:
    return UniLIP.from_pretrained(folder / "tiny" / stage / "final")


def equal(one, other) -> bool:
    """Whether two nested structures of tensors are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def contents(checkpoint: Path) -> dict:
    from safetensors.torch import load_file

    found = {file.name: load_file(file) for file in checkpoint.glob("*.safetensors")}
    found["optimizer"] = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state = json.loads((checkpoint / "state.json").read_text())
    return found | {"step": state["step"], "ema_count": state.get("ema_count")}


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# --- the stages -------------------------------------------------------------------------------------------------------


def test_the_last_stage_can_do_everything(stages, picture):
    model = load(stages, "sft")
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate("a red circle", num_inference_steps=2, generator=generator, progress=False).images[0]
    edited = model.edit(picture(), "make it blue", num_inference_steps=2, generator=generator, progress=False).images[0]
    again = model.reconstruct(picture()).images[0]
    assert drawn.size == edited.size == again.size == (56, 56)
    assert isinstance(model.ask(picture(), "What is it?", max_new_tokens=4), str)


def test_what_is_frozen_stays_bit_for_bit_and_what_trains_moves(stages):
    models = {stage: load(stages, stage) for stage in STAGES}

    def same(part, one, other):
        a, b = (models[stage].get_submodule(part).state_dict() for stage in (one, other))
        return all(torch.equal(a[key], b[key]) for key in a)

    def llm(one, other):
        return same("mllm.language_model", one, other), torch.equal(
            models[one].mllm.queries, models[other].mllm.queries
        )

    assert not same("encoder", "clip", "instruct") and not llm("clip", "instruct")[0]
    assert same("encoder", "instruct", "recon"), "recon leaves the encoder as it is: the later teacher"
    for part in ("encoder", "latent_head", "pixel_decoder"):
        assert not same(part, "recon", "recon_distill")
        assert same(part, "recon_distill", "pretrain") and same(part, "pretrain", "sft")
    assert llm("instruct", "pretrain") == (True, False) == llm("pretrain", "sft"), "of the LLM only the queries train"
    for part in ("connector", "dit"):
        assert not same(part, "pretrain", "sft")


def test_results_are_model_folders_with_their_recipe(stages):
    for stage in STAGES:
        final = stages / "tiny" / stage / "final"
        assert json.loads((final / "recipe.json").read_text()) == plain(get_recipe(f"tiny/{stage}"))
        assert load(stages, stage).processor is not None
        assert not list(final.parent.glob(".*")), "nothing half written is left"


def test_latents_are_measured(stages):
    """The flow needs zero mean and unit variance in every channel; later stages inherit the numbers."""
    model = load(stages, "recon_distill")
    assert len(model.config.latent_mean) == len(model.config.latent_factor) == 32
    batches = make_batches(get_recipe("tiny/recon_distill"), model.config, model.processor)
    images = torch.cat([batches[i]["images"] for i in range(4)])
    with torch.no_grad():
        latents = model.to_latent(model.encoder(normalise(images / 255))).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(latents.mean(0), torch.zeros(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(0), torch.ones(32), atol=1e-3, rtol=0)
    for stage in ("pretrain", "sft"):
        assert load(stages, stage).config.latent_factor == model.config.latent_factor


def test_logs_and_pictures(stages):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    bound = {"bind", "bind_concept", "bind_colour", "bind_count", "bind_place"}
    bound |= {"grounding", "ground", "ground_none", "looking", "look", "look_none", "slot_word", "own_word"}
    for stage, terms, sheet in (
        ("instruct", {"contrastive", "words", "next_token", "retrieval", "token_accuracy", *bound}, None),
        (
            "recon_distill",
            {"pixel", "psnr", "perceptual", "distill", "gan", "discriminator", "lecam"},
            "reconstruction",
        ),
        ("pretrain", {"flow"}, "drawn"),
    ):
        run = stages / "tiny" / stage
        log = log_of(run)
        assert [line["step"] for line in log] == [1, 2, 3, 4]
        wanted = terms | {"loss", "grad_norm", "samples_per_second", "lr"}
        assert set(log[-1]) == wanted | {"step", "time"} and all(math.isfinite(v) for v in log[-1].values())
        events = EventAccumulator(str(run / "tensorboard")).Reload()
        assert set(events.Tags()["scalars"]) == wanted
        assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]
        assert events.Scalars("loss")[-1].value == pytest.approx(log[-1]["loss"], rel=1e-5)
        assert events.Tags()["images"] == ([sheet] if sheet else [])
        if sheet:
            assert [e.step for e in events.Images(sheet)] == [2, 4]
            assert Image.open(run / "samples" / f"{sheet}_00000004.png").size == (2 * 56, 2 * 56)
    assert "gan" not in log_of(stages / "tiny" / "recon_distill")[1], "the GAN begins at its step"


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "half"), [("clip", 2), ("recon_distill", 3), ("sft", 2)])
def test_two_halves_are_the_whole(stage, half, stages, fork):
    """Weights, averages, optimizers, discriminator: a run in two pieces is the run in one, bit for bit."""
    recipe = quick(name=f"tiny/{stage}")
    whole, run = stages / "tiny" / stage, fork / "tiny" / stage
    assert train(recipe, fork, progress=False, stop_after=half) == run and not (run / "final").exists()
    assert wholes(run)[0].name == f"step_0000000{half}"
    torch.manual_seed(99)  # whatever the process drew in between
    assert train(recipe, fork, progress=False) == run / "final"
    found, wanted = (contents(folder / "step_00000004") for folder in (run, whole))
    assert equal(found, wanted), [key for key in wanted if not equal(found[key], wanted[key])]
    assert ("ema.safetensors" in wanted) == (stage != "clip")
    if stage == "recon_distill":
        heads = wanted["heads.safetensors"]
        assert heads["adversary.means"].abs().sum() > 0
        assert [bool(optimizer["state"]) for optimizer in wanted["optimizer"]] == [True, True]
    results = [folder / "final" for folder in (run, whole)]
    assert (
        results[0].joinpath("model.safetensors").read_bytes() == results[1].joinpath("model.safetensors").read_bytes()
    )
    assert results[0].joinpath("config.json").read_text() == results[1].joinpath("config.json").read_text()
    lines, expected = log_of(run), log_of(whole)
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]


CHILD = """
    import sys, torch
    torch.set_num_threads({threads})
    from unilip.train import loop
    from unilip.recipes.record import override
    from unilip.recipes.catalog import get_recipe
    step = loop.Loop.one_step

    def slow(self, loader):
        terms = step(self, loader)
        print("step", self.step, flush=True)
        while self.step == 1 and self.signal is None:
            signal.pause()
        return terms

    import signal
    loop.Loop.one_step = slow
    recipe = override(get_recipe("tiny/sft"), {settings!r})
    try:
        loop.train(recipe, {runs!r}, progress=False)
    except loop.Interrupted as error:
        print("interrupted:", error, flush=True)
        sys.exit(130)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups here")
def test_sigterm_to_the_process_group_saves_and_the_run_goes_on(stages, fork):
    """As a scheduler does it: the loop and its loader workers all get the signal, in the middle of a run."""
    recipe = quick(name="tiny/sft")
    settings = ["data.workers=1", "init=" + ",".join(recipe.init)]
    code = textwrap.dedent(CHILD).format(threads=torch.get_num_threads(), settings=settings, runs=str(fork))
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    seen = []
    for line in child.stdout:
        seen.append(line)
        if line.startswith("step 1"):
            os.killpg(child.pid, signal.SIGTERM)
    assert child.wait() == 130, "".join(seen)
    assert "SIGTERM at step 2 of 4; saved, the same command goes on from there" in seen[-1]
    run = fork / "tiny" / "sft"
    assert wholes(run)[0].name == "step_00000002"
    train(recipe, fork, progress=False)
    assert equal(contents(run / "step_00000004"), contents(stages / "tiny" / "sft" / "step_00000004"))


def test_ctrl_c_saves_at_once_and_twice_stops_at_once(fork, monkeypatch):
    step = Loop.one_step

    def interrupted(self, loader):
        terms = step(self, loader)
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return terms

    monkeypatch.setattr(Loop, "one_step", interrupted)
    before, times = signal.getsignal(signal.SIGINT), 1
    with pytest.raises(Interrupted, match="SIGINT at step 1 of 4"):
        train(recon("save_every=100"), fork, progress=False)
    assert wholes(fork / "tiny" / "recon")[0].name == "step_00000001"
    times = 2
    with pytest.raises(KeyboardInterrupt):
        train(recon("save_every=100"), fork, progress=False)
    assert wholes(fork / "tiny" / "recon")[0].name == "step_00000001"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_killed_while_it_wrote_resumes_from_the_last_whole_checkpoint(fork):
    run = train(recon(), fork, progress=False, stop_after=2)
    part = run / ".step_00000003.part"
    part.mkdir()
    (part / "weights.safetensors").write_bytes(b"half")
    (run / "step_00000003").mkdir()  # a folder without state.json is none of ours
    with (run / "log.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "loss": 1.0}\n\0\0\xff{"step": 1}\n{}\n{"step": 4, "lo')
    train(recon(), fork, progress=False)
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4], "steps that came again are logged once"
    assert not part.exists()


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(fork, file, caplog):
    run = train(recon("save_every=1"), fork, progress=False, stop_after=2)
    damaged = run / "step_00000002" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    shutil.copytree(damaged.parent, fork / "kept")
    train(recon("save_every=1"), fork, progress=False, stop_after=1)
    assert f"step_00000002 is damaged ({file}" in caplog.text and "Taking the one before" in caplog.text
    assert [line["step"] for line in log_of(run)] == [1, 2], "step 2 came again, after step 1"
    (run / "step_00000002" / "state.json").write_text("{}")
    train(recon("save_every=1"), fork, progress=False, stop_after=1)
    assert [line["step"] for line in log_of(run)] == [1, 2]
    shutil.rmtree(run / "step_00000001")
    shutil.rmtree(run / "step_00000002")
    shutil.copytree(fork / "kept", run / "step_00000002")
    with pytest.raises(
        CheckpointError, match=r"step_00000002 is damaged .*delete it to resume from the checkpoint before"
    ):
        train(recon("save_every=1"), fork, progress=False)


def test_a_damaged_checkpoint_takes_no_place_among_those_that_are_kept(fork):
    keep = recon("save_every=1", "keep=1")
    run = train(recon("save_every=1", "keep=9"), fork, progress=False, stop_after=3)
    file = run / "step_00000003" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    train(keep, fork, progress=False, stop_after=1)
    assert sorted(p.name for p in run.glob("*step_*")) == ["damaged_step_00000003", "step_00000003"]
    train(keep, fork, progress=False)
    assert sorted(p.name for p in run.glob("step_*")) == ["step_00000004"]


def test_two_runs_in_one_folder_are_one_too_many(fork):
    run = train(recon("save_every=1"), fork, progress=False, stop_after=1)
    before = contents(run / "step_00000001")
    lock = Lock(run / ".lock", "")
    for more in ({}, {"restart": True}):
        with pytest.raises(UniLIPError, match="Another training is working in"):
            train(recon("save_every=1"), fork, progress=False, **more)
    assert contents(run / "step_00000001").keys() == before.keys(), "nothing was deleted"
    lock.release()
    train(recon("save_every=1"), fork, progress=False, stop_after=1)


def test_other_frozen_weights_between_two_runs_are_refused(fork):
    train(recon("save_every=1"), fork, progress=False, stop_after=1)
    source = fork / recon().init[0].partition("=")[2] / "final"
    kept = source.resolve()
    source.unlink()
    shutil.copytree(kept, source)
    file = next(source.glob("model*.safetensors"))
    weights = load_file(file)
    save_file(
        {name: w + 0.5 if name.startswith("encoder") else w for name, w in weights.items()}, file, {"format": "pt"}
    )
    with pytest.raises(ConfigError, match="does not train are others than when"):
        train(recon("save_every=1"), fork, progress=False)


def test_another_teacher_between_two_runs_is_refused(fork, fresh_model):
    recipe = quick(*QUICK, "save_every=1", "objective.gan=0", name="tiny/recon_distill")
    recipe = override(recipe, [f"init={','.join(recipe.init)},teacher={fork / 'teacher'}"])
    fresh_model(seed=5).save_pretrained(fork / "teacher")
    train(recipe, fork, progress=False, stop_after=1)
    train(recipe, fork, progress=False, stop_after=1)
    shutil.rmtree(fork / "teacher")
    fresh_model(seed=6).save_pretrained(fork / "teacher")
    with pytest.raises(ConfigError, match="does not train are others than when"):
        train(recipe, fork, progress=False)


def test_other_data_between_two_runs_are_noticed(fork, tmp_path, picture, caplog):
    place = tmp_path / "mine"
    place.mkdir()
    for i in range(4):
        picture(60, 60, i).save(place / f"{i}.png")
    recipe = recon("data.source=files", f"data.path={place}", "save_every=1")
    train(recipe, fork, progress=False, stop_after=1)
    train(recipe, fork, progress=False, stop_after=1)
    assert "were added, removed or replaced" not in caplog.text
    picture(60, 60, 9).save(place / "3.png")
    train(recipe, fork, progress=False, stop_after=1)
    assert "were added, removed or replaced" in caplog.text


def test_other_art_between_two_runs_is_noticed(fork, monkeypatch, caplog):
    train(recon("save_every=1"), fork, progress=False, stop_after=1)
    monkeypatch.setattr("unilip.emoji.art.Atlas.fingerprint", "another")
    train(recon("save_every=1"), fork, progress=False, stop_after=1)
    assert "were added, removed or replaced" in caplog.text


def test_a_single_wrong_bit_is_found(fork):
    run = train(recon("save_every=1"), fork, progress=False, stop_after=1)
    file = run / "step_00000001" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"step_00000001 is damaged \(weights.safetensors is not what was written"
    ):
        train(recon("save_every=1"), fork, progress=False)


def test_a_checkpoint_of_another_model_is_refused(fork):
    from safetensors.torch import load_file, save_file

    run = train(recon(), fork, progress=False, stop_after=2)
    file = run / "step_00000002" / "weights.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != name} | {"more": torch.zeros(1)}, file)
    about = file.with_name("state.json")
    about.write_text(json.dumps({k: v for k, v in json.loads(about.read_text()).items() if k != "files"}))
    with pytest.raises(CheckpointError, match=f"does not fit the model: weights.{name}, weights.more"):
        train(recon(), fork, progress=False)


def test_changed_settings_are_refused_and_restart_begins_anew(fork):
    run = train(recon(), fork, progress=False, stop_after=2)
    changed = recon("optim.lr=5e-4", "batch_size=1")
    with pytest.raises(ConfigError, match=r"batch_size \(2 -> 1\), optim.lr \(0.0001 -> 0.0005\)\. Restart the run"):
        train(changed, fork, progress=False)
    free = recon("keep=1", "save_every=1", "note=other")
    train(free, fork, progress=False)
    assert [p.name for p in run.glob("step_*")] == ["step_00000004"], "only as many as `keep` says stay"
    assert train(recon(), fork, progress=False) == run / "final", "finished: nothing to do"
    with pytest.raises(ConfigError, match="final was made with other settings: batch_size"):
        train(changed, fork, progress=False)
    (run / "samples").mkdir()
    (run / "samples" / "old.png").touch()
    old = (run / "final" / "recipe.json").read_text()
    assert train(changed, fork, progress=False, restart=True, stop_after=1) == run
    assert [line["step"] for line in log_of(run)] == [1] and not (run / "samples").exists()
    assert (run / "final" / "recipe.json").read_text() == old, "the old result stays until there is a new one"
    (run / "final" / "model.safetensors").unlink()
    assert train(changed, fork, progress=False, stop_after=1) == run, "it goes on, whatever result lies there"
    assert train(changed, fork, progress=False) == train(changed, fork, progress=False) == run / "final"
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4]
    assert json.loads((run / "final" / "recipe.json").read_text()) == plain(changed)
    assert UniLIP.from_pretrained(run / "final")


def test_a_run_that_was_stopped_at_its_last_step_only_finishes(fork, monkeypatch):
    train(recon(), fork, progress=False)
    shutil.rmtree(fork / "tiny" / "recon" / "final")
    monkeypatch.setattr(Loop, "one_step", None)
    assert train(recon(), fork, progress=False).exists()
    with pytest.raises(ConfigError, match="at least 1 step"):
        train(recon(), fork, progress=False, stop_after=0)


def test_a_full_disk_keeps_the_last_checkpoint(fork, monkeypatch):
    run = train(recon(), fork, progress=False, stop_after=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*last whole checkpoint is kept"):
        train(recon(), fork, progress=False)
    assert wholes(run)[0].name == "step_00000002" and not list(run.glob(".step_*"))


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stepped(monkeypatch):
    """What the optimizers saw: for each step of each, group rates and the norm of all gradients."""
    seen = []
    step = torch.optim.AdamW.step

    def record(self, *args):
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm().item() if grads else 0.0
        seen.append((self, [g["lr"] for g in self.param_groups], norm))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    return seen


def test_gradients_are_clipped_together(fork, stepped):
    train(recon("optim.grad_clip=0.001", "steps=2"), fork, progress=False)
    assert [norm for *_, norm in stepped] == [pytest.approx(0.001, rel=1e-3)] * 2
    assert all(line["grad_norm"] > 0.01 for line in log_of(fork / "tiny" / "recon")), (
        "the norm before clipping is logged"
    )


def test_rates_follow_the_schedule_times_the_factor(fork, stepped):
    settings = ("trains=encoder:0.1,latent_head,pixel_decoder", "optim.lr=0.001", "optim.weight_decay=0", "ema=0")
    gan = ("objective.gan=0.1", "objective.gan_start=2", "measure_latents=false")
    before = {k: v.clone() for k, v in UniLIP.from_pretrained(fork / "source/recon/final").state_dict().items()}
    train(quick(*QUICK, *settings, *gan, "save_every=1", name="tiny/recon_distill"), fork, progress=False, stop_after=1)
    train(quick(*QUICK, *settings, *gan, name="tiny/recon_distill"), fork, progress=False)
    main, second = stepped[0::2], stepped[1::2]
    optim = Optim(lr=0.001)
    for i, (_, rates, _) in enumerate(main):
        rate = learning_rate(optim, i, 4)
        assert sorted(set(rates)) == pytest.approx([0.1 * rate, rate])
    assert [norm > 0 for *_, norm in second] == [False, False, True, True]
    assert [rates[0] for _, rates, _ in second[2:]] == pytest.approx([learning_rate(optim, i, 2) for i in range(2)])
    from safetensors.torch import load_file

    # Adam's first step moves every weight by its rate (0.001): the factor is real
    run = fork / "tiny" / "recon_distill"
    assert (run / "step_00000004").exists()
    shutil.rmtree(run)
    train(quick(*QUICK, *settings, *gan, name="tiny/recon_distill"), fork, progress=False, stop_after=1)
    after = load_file(run / "step_00000001" / "weights.safetensors")
    moved = {k: (after[k] - before[k]).abs().max().item() for k in after}
    assert max(v for k, v in moved.items() if k.startswith("encoder")) == pytest.approx(1e-4, rel=0.02)
    assert max(v for k, v in moved.items() if k.startswith("latent_head")) == pytest.approx(1e-3, rel=0.02)


def test_the_schedule():
    optim = Optim(lr=2.0, warmup=0.1, final=0.25)
    rates = [learning_rate(optim, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(2 * (0.25 + 0.75 / 2)) and max(rates) == 2.0
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[99] == pytest.approx(0.5, rel=0.01) and learning_rate(optim, 100, 100) == 0.5
    assert learning_rate(Optim(lr=3.0, warmup=0.0), 0, 1) == 3.0


def test_accumulated_steps_are_the_larger_batch(fork):
    """Two batches of two or one of four: the same samples and noises, so the same loss and gradient."""
    logs = []
    for settings in (("batch_size=4",), ("batch_size=2", "accumulate=2")):
        recipe = quick(*settings, "steps=3", "sample_every=100", f"name=tiny/{len(logs)}", name="tiny/sft")
        train(recipe, fork, progress=False)
        logs.append(log_of(fork / recipe.name))
    for one, two in zip(*logs, strict=True):
        assert set(one) == set(two), "the steps have the same tasks"
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], abs=1e-6)


def test_low_precision_and_recomputation_in_a_run(fork):
    exact = log_of(train(recon("name=tiny/a"), fork, progress=False).parent)
    saving = log_of(train(recon("name=tiny/b", "gradient_checkpointing=1"), fork, progress=False).parent)
    low = train(recon("name=tiny/c", "dtype=bfloat16"), fork, progress=False)
    assert [x["loss"] for x in exact] == pytest.approx([x["loss"] for x in saving], abs=1e-6)
    losses = [x["loss"] for x in log_of(low.parent)]
    assert losses == pytest.approx([x["loss"] for x in exact], rel=0.05) and losses != [x["loss"] for x in exact]
    assert UniLIP.from_pretrained(low, dtype="auto").dtype == torch.float32, "weights stay float32"


class Attentions(TorchDispatchMode):
    """Notes in which types attention and products ran."""

    def __init__(self):
        super().__init__()
        self.attention, self.products, self.backward = set(), set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func) or "fused_attention" in str(func):
            self.attention.add(args[0].dtype)
            self.backward += "backward" in str(func)
        elif func is torch.ops.aten.mm.default:
            self.products.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("saving", ["", "gradient_checkpointing=1", "selective_checkpointing=1"])
def test_a_cpu_attends_in_float32_whatever_the_dtype(fork, saving):
    settings = ("steps=2", "sample_every=100", "dtype=bfloat16", "name=tiny/low", *filter(None, [saving]))
    with Attentions() as ran:
        train(quick(*settings, name="tiny/sft"), fork, progress=False)
    assert torch.bfloat16 in ran.products and ran.backward > 0
    assert ran.attention == {torch.bfloat16 if saving else torch.float32}, "except where layers run again"


def test_attention_is_left_alone_outside_of_autocast():
    query = torch.randn(1, 2, 3, 4, dtype=torch.bfloat16)
    with Float32Attention():
        assert torch.nn.functional.scaled_dot_product_attention(query, query, query).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            mask = torch.zeros(3, 3, dtype=torch.bfloat16)
            out = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    assert out.dtype == torch.float32


def test_bfloat16_only_where_the_gpu_has_it(monkeypatch):
    recipe = recon("dtype=bfloat16")
    made = []
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: made.append((kind, options["enabled"])))
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able: able)
        mixed_precision(recipe, torch.device("cuda"))
    assert made == [("cuda", True), ("cuda", False)]


def test_the_average_by_hand():
    parameter = torch.nn.Parameter(torch.zeros(2))
    ema = EMA({"w": parameter}, 0.5)
    expected = 0.0
    for count in range(1, 12):
        parameter.data.fill_(float(count))
        ema.update()
        decay = min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * count
    torch.testing.assert_close(ema.average["w"], torch.full((2,), expected))
    with ema.acting():
        torch.testing.assert_close(parameter.detach(), torch.full((2,), expected))
    assert parameter.tolist() == [11, 11] and ema.average["w"][0].item() == pytest.approx(expected)
    half = EMA({"w": torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))}, 0.9)
    assert half.average["w"].dtype == torch.float32


def test_results_and_samples_are_of_the_averaged_weights(stages):
    run = stages / "tiny" / "recon_distill"
    kept = contents(run / "step_00000004")
    final = load(stages, "recon_distill").state_dict()
    for name, average in kept["ema.safetensors"].items():
        assert torch.equal(final[name], average)
    assert any(not torch.equal(final[name], value) for name, value in kept["weights.safetensors"].items())


def test_sampling_changes_nothing(fork, stages):
    """With pictures drawn in every step, or never, the run is the same."""
    recipe = quick("sample_every=1", name="tiny/pretrain")
    train(recipe, fork, progress=False)
    paths = [folder / "tiny" / "pretrain" / "step_00000004" for folder in (fork, stages)]
    assert equal(contents(paths[0]), contents(paths[1]))


def test_the_bar_shows_the_time_left(fork, monkeypatch):
    shown = io.StringIO()
    hidden = []

    def bar(**options):
        hidden.append(options.pop("disable"))
        return tqdm(**options, disable=False, file=shown, mininterval=0, ncols=200)

    monkeypatch.setattr(loops, "tqdm", bar)
    train(recon("steps=3"), fork, stop_after=2)
    text = shown.getvalue()
    assert hidden == [None] and "tiny/recon" in text and "2/3" in text and "loss=" in text
    assert any("<00:" in part for part in text.split("\r")), "elapsed<left"
    train(recon("steps=3"), fork, progress=False)
    assert hidden == [None, True]


def test_without_tensorboard_the_log_is_enough(fork, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(recon("steps=1"), fork, progress=False)
    assert len(log_of(fork / "tiny" / "recon")) == 1 and "tensorboard is not installed" in caplog.text


def test_a_folder_of_pictures_continues_a_trained_model(fork):
    """Fine-tuning: the parts of a result, the captions of a folder."""
    place = fork / "pictures"
    place.mkdir()
    for i in range(2):
        Image.new("RGB", (60, 60), (40 * i, 90, 10)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"picture {i}")
    recipe = quick("data.source=files", f"data.path={place}", "data.edit_share=0", name="tiny/sft")
    model, objective, batches = build(recipe, fork)
    loss, terms = objective.loss(batches[0], 0)
    assert set(terms) == {"flow"} and loss.isfinite() and model.processor.image_size == 56


def test_a_check_of_nothing_is_told(fork, caplog):
    train(recon("checks=retreival >= 0.9 @ 1", "save_every=1"), fork, progress=False, stop_after=1)
    assert "retreival >= 0.9 @ 1 is not looked at: there was no retreival; the terms are loss, pixel" in caplog.text


def test_a_stage_that_goes_wrong_stops_and_can_be_made_to_go_on(tmp_path):
    with pytest.raises(ConfigError, match=r'checks has .retrieval > 2.; write "TERM >= NUMBER"'):
        quick("checks=retrieval > 2", name="tiny/clip")
    wrong = quick("checks=local_place <= 1.5 @ 2, retrieval >= 0, words <= 0.1 @ 3", name="tiny/clip")
    with pytest.raises(UniLIPError, match=r"tiny/clip stops at step 3: words is [\d.]+ over its last 3 steps"):
        train(wrong, tmp_path, progress=False)
    assert not (tmp_path / "tiny/clip/final").exists() and wholes(tmp_path / "tiny/clip")[0].name == "step_00000003"
    with pytest.raises(UniLIPError, match=r"stopped at step 3 because of its checks"):
        train(wrong, tmp_path, progress=False)
    assert train(override(wrong, ["checks="]), tmp_path, progress=False).name == "final"
