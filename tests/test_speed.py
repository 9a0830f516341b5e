"""Less work for the same picture, and how much less for nearly the same: exact paths, presets, compilation."""

import copy
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unilip import cli
from unilip.checkpoints.read import open_checkpoint
from unilip.errors import UniLIPError
from unilip.fast import loop
from unilip.fast.dit import PreparedCondition
from unilip.fast.loop import PRESETS, Compiled, Settings
from unilip.fast.solver import integrate
from unilip.method.text import Tokens
from unilip.model import UniLIP
from unilip.sampling import draw_noise

ROOT = Path(__file__).resolve().parents[1]
PARITY = ROOT / "tests" / "parity"
sys.path.append(str(ROOT / "benchmarks"))


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def draw(model: UniLIP, prompt: Any = "a red star", **settings: Any) -> Tensor:
    count = len(prompt) if isinstance(prompt, list) else 1
    settings = {"generator": seeds(*range(count)), "output_type": "latent", "progress": False, **settings}
    images: Tensor = model.generate(prompt, **settings).images
    return images


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- the reference path ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parity() -> tuple[UniLIP, Any]:
    from reference import Reference

    model = UniLIP.from_pretrained(PARITY)
    return model, Reference(model)


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_the_reference_path_meets_the_recorded_numbers(parity: tuple[UniLIP, Any], task: str) -> None:
    _, reference = parity
    record = {n.removeprefix(f"{task}."): t for n, t in load_file(PARITY / "expected.safetensors").items()}
    ids, mask = record["input_ids"].flip(0), record["attention_mask"].long().flip(0)  # unconditional row first
    features, slots = None, torch.zeros_like(mask, dtype=torch.bool)
    if task == "edit":
        with torch.no_grad():
            features = reference.encode(record["pixel_values"]).expand(2, -1, -1)
        slots = (ids == open_checkpoint(PARITY).image_token_id) & mask.bool()
    guidance = float(record["guidance"])
    latents = reference.sample(Tokens(ids, mask, slots), features, record["noise"], 20, guidance)
    assert apart(latents, record["final_latents"]) < 1e-4


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("task", ["generate", "edit"])
def test_the_exact_path_is_the_reference(
    tiny_model: UniLIP, picture: Callable[..., Any], task: str, batch: int
) -> None:
    from reference import Reference

    prompts = ["a red star", "a much longer prompt about many blue things", "no"][:batch]
    images = [picture(seed=i) for i in range(batch)] if task == "edit" else None
    grid = tiny_model.config.grid
    noise = draw_noise(batch, (tiny_model.config.dit.latent_channels, grid, grid), seeds(*range(batch)))
    expected, pixels = Reference(tiny_model).run(prompts, images, noise, 20, 4.5)
    settings: dict[str, Any] = dict(generator=seeds(*range(batch)), guidance_scale=4.5, output_type="latent")
    ours = (
        tiny_model.generate(prompts, **settings).images
        if images is None
        else tiny_model.edit(images, prompts, **settings).images
    )
    assert expected.std() > 0.1
    assert apart(ours, expected) < 1e-4
    with torch.no_grad():
        assert apart(tiny_model.from_latent(expected), pixels) < 1e-5


# --- what is computed once ------------------------------------------------------------------------------------------


def test_guidance_may_be_split_over_two_devices(fresh_model: Callable[..., UniLIP]) -> None:
    model = fresh_model()
    expected = draw(model, num_inference_steps=4)
    asked: list[int] = []
    model.split_guidance("cpu")
    twin = model.runtime.twin(model.dit)
    assert twin is not None
    for dit in (model.dit, twin):
        dit.transformer.patch_embed["proj"].register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    assert apart(draw(model, num_inference_steps=4), expected) < 1e-5
    assert asked == [1] * 8
    assert not any("twin" in name for name, _ in model.named_modules())


def test_the_copy_for_guidance_and_a_copied_model_have_the_weights_of_the_moment(
    fresh_model: Callable[..., UniLIP],
) -> None:
    def written(model: UniLIP) -> UniLIP:
        for parameter in model.dit.parameters():  # as averages of weights are written
            parameter.data.mul_(1.1)
        return model

    changes: dict[str, Callable[[UniLIP], UniLIP]] = {
        "data": written, "state": lambda m: written(m) and m.load_state_dict(m.state_dict()) and m,
        "type": lambda m: m.to(torch.bfloat16), "part": lambda m: m.dit.to(torch.bfloat16) and m,
    }  # fmt: skip
    for name, change in changes.items():
        split, expected = fresh_model(), draw(change(fresh_model()))
        before = draw(split.split_guidance("cpu"))
        assert apart(draw(change(split)), expected) < 1e-2 * apart(before, expected), name
    compiled = fresh_model().compile(backend="eager", bucket=64)
    before = draw(compiled)
    copied = written(copy.deepcopy(compiled))
    assert torch.equal(draw(compiled), before)
    assert apart(draw(copied), draw(written(fresh_model()))) < 1e-5 < apart(draw(copied), before)


class Waiting(TorchDispatchMode):
    """Counts what makes a program wait for its device: values and sizes that Python asks for."""

    NAMES = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in self.NAMES or masked:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ask", [lambda t: t.sum().item(), lambda t: bool(t[0] > 0), lambda t: t[t > 0], float])
def test_waiting_is_noticed(ask: Callable[[Tensor], Any]) -> None:
    with Waiting() as waiting:
        ask(torch.ones(1))
    assert waiting.found


def test_nothing_in_the_loop_waits_for_the_device(
    tiny_model: UniLIP, picture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = Waiting()

    def watched(*inputs: Any) -> Tensor:
        with waiting:
            return integrate(*inputs)

    monkeypatch.setattr(loop, "integrate", watched)
    for preset in ("quality", "balanced", "fast"):
        waiting.calls = 0
        tiny_model.generate("a red star", preset=preset, output_type="latent", progress=False)
        assert waiting.calls > 100, preset
        tiny_model.edit(picture(), "make it blue", preset=preset, output_type="latent", progress=False)
        assert waiting.found == [], preset


@pytest.mark.gpu
def test_nothing_in_the_loop_waits_for_a_gpu(
    fresh_model: Callable[..., UniLIP], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh_model().to("cuda")

    def watched(*inputs: Any) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return integrate(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    draw(model)
    monkeypatch.setattr(loop, "integrate", watched)
    assert draw(model).isfinite().all()


def test_what_does_not_change_is_computed_once(tiny_model: UniLIP) -> None:
    net, language = tiny_model.dit.transformer, tiny_model.mllm.language_model
    watched = {
        "captions": net.caption_projection["linear_1"], "keys": net.transformer_blocks[0].attn2.to_k,
        "timesteps": net.time_embed["linear"], "language model": language.model, "head": language.lm_head,
        "connector": tiny_model.connector,
    }  # fmt: skip
    counts = dict.fromkeys(watched, 0)

    def count(name: str) -> None:
        counts[name] += 1

    hooks = [m.register_forward_hook(lambda *_, name=name: count(name)) for name, m in watched.items()]
    draw(tiny_model, num_images_per_prompt=3, generator=seeds(0, 1, 2))
    for hook in hooks:
        hook.remove()
    assert counts == {name: int(name != "head") for name in watched}


# --- presets --------------------------------------------------------------------------------------------------------


def evaluations(model: UniLIP, **settings: Any) -> int:
    rows: list[int] = []
    first = model.dit.transformer.patch_embed["proj"]
    hook = first.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    draw(model, **settings)
    hook.remove()
    return sum(rows)


def test_presets_evaluate_less_and_stay_near(tiny_model: UniLIP) -> None:
    exact = draw(tiny_model)
    counts = [evaluations(tiny_model, preset=name) for name in ("quality", "balanced", "fast")]
    assert counts[0] == 40 and counts == sorted(counts, reverse=True) and counts[1] <= 24 and counts[2] <= 14
    assert apart(draw(tiny_model, preset="quality"), exact) == 0
    for name, far in (("balanced", 0.1), ("fast", 0.2)):  # fast is unguided at the end, which tells on random weights
        assert 0 < relative(draw(tiny_model, preset=name), exact) < far
    assert evaluations(tiny_model, preset="fast", num_inference_steps=3) == 5  # what is given counts more


def test_a_preset_draws_the_same_in_any_batch(tiny_model: UniLIP) -> None:
    for name in ("quality", "balanced", "fast"):
        both = draw(tiny_model, ["a red star", "two long green trains"], preset=name)
        assert apart(both[:1], draw(tiny_model, preset=name)) < 1e-5


def test_an_unknown_preset_lists_the_known_ones(tiny_model: UniLIP) -> None:
    with pytest.raises(UniLIPError, match=r"'warp'.*quality, balanced, fast, turbo"):
        draw(tiny_model, preset="warp")


def test_guidance_in_the_first_steps_alone(tiny_model: UniLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = draw(tiny_model, num_inference_steps=10)
    monkeypatch.setitem(PRESETS, "early", {"guided": 0.4})
    assert evaluations(tiny_model, preset="early", num_inference_steps=10) == 14  # 4 steps of 10 are guided
    assert relative(draw(tiny_model, preset="early", num_inference_steps=10), exact) > 1e-3
    assert Settings(guided=0.4).guided_steps() == [True] * 8 + [False] * 12
    assert Settings(guidance_scale=1.0).guided_steps() == [False] * 20


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(fresh_model: Callable[..., UniLIP]) -> tuple[UniLIP, list[int]]:
    """A model compiled by a backend that counts and changes nothing."""
    torch._dynamo.reset()
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        made.append(len(graph.graph.nodes))
        return graph.forward

    return fresh_model().compile(backend=backend, bucket=64), made


def test_prompts_of_any_length_share_their_code(
    compiled: tuple[UniLIP, list[int]], tiny_model: UniLIP, picture: Callable[..., Any]
) -> None:
    model, made = compiled
    assert apart(draw(model), draw(tiny_model)) < 1e-5
    assert len(made) == 1  # the step, once for all twenty
    longer = "a longer prompt"
    assert apart(draw(model, longer), draw(tiny_model, longer)) < 1e-5
    draw(model, "no", negative_prompt="a different text to move away from", num_inference_steps=7)
    assert len(made) == 1
    model.generate("a red star", num_inference_steps=2, progress=False)
    assert len(made) == 2  # the decoder
    model.generate("a blue star", num_inference_steps=2, progress=False)
    model.edit(picture(), "make it blue", num_inference_steps=2, progress=False)
    assert len(made) == 2
    draw(model, ["a red star", "a blue star"])
    assert len(made) == 3  # another number of pictures


def test_compiling_says_what_it_does_once_for_a_shape(
    compiled: tuple[UniLIP, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = compiled
    caplog.set_level("INFO", "unilip")
    for prompt in ("a red star", "a longer prompt"):
        model.generate(prompt, num_inference_steps=2, progress=False)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(";")[0] for line in said if line.startswith("compiling")] == [
        "compiling the step of the transformer for 2 rows of 2x2 cells under conditions of 64 tokens",
        "compiling the decoder for 1 pictures of 2x2 cells",
    ]
    assert sum(line.startswith("compiled in ") for line in said) == 2


def test_the_decoder_turns_channels_last_on_cuda(
    fresh_model: Callable[..., UniLIP], tiny_model: UniLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is a pretence; the layout is not."""
    model, latent = fresh_model(), torch.randn(1, 32, 2, 2)
    weight: Any = model.pixel_decoder.decoder.conv_out.weight
    monkeypatch.setattr(UniLIP, "device", torch.device("cuda"))
    model.compile(backend="eager")
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    with torch.no_grad():
        assert apart(model.pixel_decoder(latent), tiny_model.pixel_decoder(latent)) < 1e-5


def test_a_compiled_model_takes_callbacks_and_presets(compiled: tuple[UniLIP, list[int]], tiny_model: UniLIP) -> None:
    model, _ = compiled
    seen: list[int] = []
    draw(model, num_inference_steps=3, callback_on_step_end=lambda m, i, t, values: seen.append(i))
    assert seen == [0, 1, 2]
    assert apart(draw(model, preset="fast"), draw(tiny_model, preset="fast")) < 1e-5


def test_a_loop_that_can_be_recorded_is_recorded_once_for_a_shape_and_its_weights(
    fresh_model: Callable[..., UniLIP], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recording itself needs CUDA; here a stand-in shows when it is made, with what, and when it is replayed."""
    made: list[tuple[int, ...]] = []

    class Recorded:
        def __init__(self, make: Any, noise: Tensor, condition: PreparedCondition, modulations: Tensor) -> None:
            made.append(tuple(noise.shape))
            self.make, self.condition, self.modulations = make, condition.map(Tensor.clone), modulations

        def __call__(self, noise: Tensor, condition: PreparedCondition, modulations: Tensor) -> Tensor:
            self.condition.copy_(condition)
            return self.make(self.condition, self.modulations)(noise)

    monkeypatch.setattr(loop, "RecordedLoop", Recorded)
    model = fresh_model()
    loops = Compiled(model, 64, backend="eager")
    condition = PreparedCondition(((torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2)),), torch.ones(1, 1, 1, 4))
    modulations = torch.ones(1, 8, 4)

    def make(c: PreparedCondition, times: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda noise: noise * c.mask.sum() * times.mean()

    def run(value: float = 1.0, **settings: Any) -> float:
        given = Settings(**settings)
        return float(loops.recorded(given, make, torch.full((1, 2), value), condition, modulations).sum())

    assert [run(1.0), run(2.0)] == [8.0, 16.0] and made == [(1, 2)]
    run(num_inference_steps=3)
    assert len(made) == 2  # other settings
    with torch.no_grad():
        model.dit.transformer.proj_out.weight.add_(1)  # in place: a graph sees the values
    run()
    assert len(made) == 2
    model.dit.transformer.proj_out.weight = nn.Parameter(torch.zeros_like(model.dit.transformer.proj_out.weight))
    run()
    assert len(made) == 3 and len(loops.loops) == 1  # elsewhere: recorded anew, and the old ones are gone
    loops.forget()
    run()
    assert len(made) == 4

    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(loop, "RecordedLoop", fail)
    assert run(num_inference_steps=5) == 8.0  # runs all the same


def test_what_a_graph_reads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph reads memory: were a tensor that its loop alone knows freed, it would read whatever comes there next."""
    monkeypatch.setattr(torch, "cuda", MagicMock())
    condition = PreparedCondition(((torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2)),), torch.ones(1, 1, 1, 4))
    weights = torch.ones(2)
    kept = weakref.ref(weights)

    def recorded(weights: Tensor) -> loop.RecordedLoop:
        return loop.RecordedLoop(lambda rows, times: lambda noise: noise * weights.sum(), weights, condition, weights)

    found = recorded(weights)
    del weights
    assert kept() is not None and torch.equal(found.latents, torch.full((2,), 2.0))


@pytest.mark.gpu
def test_a_recorded_loop_draws_what_the_plain_one_does(fresh_model: Callable[..., UniLIP]) -> None:
    model = fresh_model().to("cuda")
    expected = [draw(model, prompt) for prompt in ("a red star", "a blue star")]
    model.compile()
    for prompt, latents in zip(("a red star", "a blue star"), expected, strict=True):
        assert apart(draw(model, prompt), latents) < 1e-3
    recorded = model.runtime.compiled
    assert recorded is not None and len(recorded.loops) == 1 and None not in recorded.loops.values()


def test_the_bucket_must_be_positive(fresh_model: Callable[..., UniLIP]) -> None:
    with pytest.raises(UniLIPError, match="bucket is 0"):
        fresh_model().compile(bucket=0)


# --- from the command line ------------------------------------------------------------------------------------------


def test_presets_on_the_command_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    common = ["a star", "--model", str(tiny_folder), "--json", "--output", str(tmp_path)]
    assert cli.main(["generate", *common, "--preset", "fast"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    fast = PRESETS["fast"]
    assert (settings["preset"], settings["num_inference_steps"], settings["solver"]) == (
        "fast",
        fast["num_inference_steps"],
        fast["solver"],
    )
    assert cli.main(["generate", *common, "--preset", "fast", "--steps", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["num_inference_steps"] == 2
    assert cli.main(["generate", *common, "--compile", "--low-memory"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_compile_on_the_command_line(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(UniLIP, "compile", lambda self: called.append(True) or self)
    common = ["a star", "--model", str(tiny_folder), "--steps", "1", "--output", str(tmp_path)]
    assert cli.main(["generate", *common]) == 0 and not called
    assert cli.main(["generate", *common, "--compile"]) == 0 and called
