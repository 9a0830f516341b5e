"""Less work for the same picture, and how much less for nearly the same: exact paths, presets, compilation."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unilip import cli, packing
from unilip.checkpoints.read import open_checkpoint
from unilip.errors import UniLIPError
from unilip.fast.dit import PreparedCondition, stack
from unilip.fast.loop import PRESETS, Compiled, Shortcut, fingerprint, shortcut
from unilip.fast.solver import integrate
from unilip.method.config import SOLVERS
from unilip.method.flow import denoise, make_scheduler
from unilip.method.text import Tokens
from unilip.model import UniLIP

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
    model, reference = parity
    record = {n.removeprefix(f"{task}."): t for n, t in load_file(PARITY / "expected.safetensors").items()}
    ids, mask = record["input_ids"].flip(0), record["attention_mask"].long().flip(0)  # unconditional row first
    features, slots = None, torch.zeros_like(mask, dtype=torch.bool)
    if task == "edit":
        with torch.no_grad():
            features = model.encoder(record["pixel_values"]).expand(2, -1, -1)
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

    from unilip.sampling import draw_noise

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


def test_modulations_of_a_schedule_are_those_of_its_timesteps(tiny_model: UniLIP) -> None:
    dit, prompt = tiny_model.dit, torch.randn(2, 5, tiny_model.config.dit.caption_channels)
    latent, steps = torch.randn(2, tiny_model.config.dit.latent_channels, 2, 2), torch.tensor([999, 500, 3])
    with torch.no_grad():
        prepared = dit.prepare(prompt, torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))
        whole = dit.modulate(steps)
        for i, timestep in enumerate(steps):
            expected = dit(latent, timestep.expand(2), prepared)
            assert apart(dit.step(latent, whole[i : i + 1], prepared), expected) < 1e-6


def test_conditions_of_different_lengths_stack(tiny_model: UniLIP) -> None:
    dit, width = tiny_model.dit, tiny_model.config.dit.caption_channels
    short, long = torch.randn(1, 3, width), torch.randn(1, 6, width)
    latent = torch.randn(2, tiny_model.config.dit.latent_channels, 2, 2)
    with torch.no_grad():
        one, other = (dit.prepare(c, torch.ones(c.shape[:2])) for c in (short, long))
        modulation = dit.modulate(torch.tensor([700]))
        both = dit.step(latent, modulation, stack([one, other]))
        alone = [dit.step(latent[i : i + 1], modulation, c) for i, c in enumerate((one, other))]
    assert apart(both, torch.cat(alone)) < 1e-5


def test_the_unconditional_condition_follows_the_weights(fresh_model: Callable[..., UniLIP]) -> None:
    model = fresh_model()
    before = draw(model, num_inference_steps=2)
    kept = model._unconditional
    assert kept is not None
    draw(model, "another prompt", num_inference_steps=2)
    assert model._unconditional is kept
    draw(model, num_inference_steps=2, negative_prompt="blue")
    assert model._unconditional is not kept
    draw(model, num_inference_steps=2)
    with torch.no_grad():
        model.mllm.queries.add_(1.0)  # as a step of training does
    changed = draw(model, num_inference_steps=2)
    model._unconditional = None
    assert torch.equal(changed, draw(model, num_inference_steps=2))
    assert apart(before, changed) > 1e-3


def test_a_fingerprint_tells_casts_and_adapters() -> None:
    layer = torch.nn.Linear(2, 2)
    first = fingerprint([layer])
    assert first == fingerprint([layer]) and first is not None
    assert fingerprint([layer.to(torch.bfloat16)]) != first
    layer._active_adapter = ["a"]  # type: ignore[assignment]
    switched = fingerprint([layer])
    layer._active_adapter = ["b"]  # type: ignore[assignment]
    assert fingerprint([layer]) != switched
    with torch.inference_mode():
        unknown = torch.nn.Linear(2, 2)
    assert fingerprint([unknown]) is None


def test_guidance_may_be_split_over_two_devices(fresh_model: Callable[..., UniLIP]) -> None:
    model = fresh_model()
    expected = draw(model, num_inference_steps=4)
    asked: list[int] = []
    model.split_guidance("cpu")
    for dit in (model.dit, model._twin[0]):
        dit.transformer.patch_embed.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    assert apart(draw(model, num_inference_steps=4), expected) < 1e-5
    assert asked == [1] * 8
    assert not any("twin" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_plan_does_what_the_library_does(solver: str, steps: int) -> None:
    """Also where latents are replaced on the way: the library is given the same ones."""

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.sin(3 * x) + timestep.view(-1, 1, 1, 1) / 1000

    def replace(i: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
        return latents.flip(-1) + 0.5 if i in (1, 4) else None

    noise = torch.randn(2, 3, 2, 2)
    scheduler = make_scheduler(solver, 3.0)
    ours = denoise(velocity, noise, scheduler, steps, 1.0, replace)
    library = make_scheduler(solver, 3.0)
    if solver == "euler":
        library.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    else:
        library.set_timesteps(steps)
    library.set_begin_index(0)
    state = noise
    for i, timestep in enumerate(library.timesteps):
        state = library.step(velocity(state, timestep.long().expand(2)), timestep, state, return_dict=False)[0]
        state = state if (other := replace(i, timestep, state)) is None else other
    assert apart(ours, state) < 1e-5


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


@pytest.mark.parametrize("task", ["generate", "edit"])
@pytest.mark.parametrize("preset", [*PRESETS, "reuse"])
def test_nothing_in_the_loop_waits_for_the_device(
    tiny_model: UniLIP, picture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, task: str, preset: str
) -> None:
    monkeypatch.setitem(PRESETS, "reuse", Shortcut(steps=6, reuse=0.3, guided=(0.0, 0.5)))
    waiting = Waiting()

    def watched(*inputs: Any) -> Tensor:
        with waiting:
            return integrate(*inputs)

    monkeypatch.setattr("unilip.model.integrate", watched)
    settings: dict[str, Any] = dict(preset=preset, output_type="latent", progress=False)
    if task == "generate":
        tiny_model.generate("a red star", **settings)
    else:
        tiny_model.edit(picture(), "make it blue", **settings)
    assert waiting.calls > 100 and waiting.found == []


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
    monkeypatch.setattr("unilip.model.integrate", watched)
    assert draw(model).isfinite().all()


def test_what_does_not_change_is_computed_once(tiny_model: UniLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_model, "_unconditional", None)
    net, language = tiny_model.dit.transformer, tiny_model.mllm.language_model
    watched = {
        "captions": net.caption_projection, "keys": net.transformer_blocks[0].attn2.to_k, "timesteps": net.time_embed,
        "language model": language.model, "head": language.lm_head, "connector": tiny_model.connector,
    }  # fmt: skip
    counts = dict.fromkeys(watched, 0)
    kept: list[bool] = []

    def count(name: str, output: Any) -> None:
        counts[name] += 1
        if name == "language model":
            kept.append(output.hidden_states is not None or output.past_key_values is not None)

    hooks = [m.register_forward_hook(lambda _, i, out, name=name: count(name, out)) for name, m in watched.items()]
    once = {"captions": 1, "keys": 1, "timesteps": 1, "language model": 1, "head": 0, "connector": 1}
    draw(tiny_model, num_images_per_prompt=3, generator=seeds(0, 1, 2))  # the unconditional prompt once, besides
    assert counts == {name: 2 * n if name != "timesteps" else n for name, n in once.items()}
    counts.update(dict.fromkeys(counts, 0))
    draw(tiny_model, "a blue star")
    assert counts == once and not any(kept)
    for hook in hooks:
        hook.remove()


# --- packed weights -------------------------------------------------------------------------------------------------


def packs(dtype: torch.dtype) -> bool:
    return packing.can_pack(nn.Linear(8, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [nn.Linear, lambda *sizes, **more: nn.Conv2d(*sizes, 1, **more)])
def test_packed_weights_multiply_alike(make: Callable[..., nn.Module], bias: bool, dtype: torch.dtype) -> None:
    if not packs(dtype):
        pytest.skip(f"torch cannot pack {dtype} on this machine")
    torch.manual_seed(0)
    layer, tokens = make(48, 80, bias=bias, dtype=dtype), torch.randn(2, 16, 48, dtype=dtype)
    names = set(layer.state_dict())
    with torch.no_grad():
        plain = [packing.product(layer, rows) for rows in (tokens, tokens[:1])]
        with packing.packing([layer], rows=32, calls=64):
            assert layer.packed is not None and set(layer.state_dict()) == names
            packed = [packing.product(layer, rows) for rows in (tokens, tokens[:1])]  # as packed, and half as many
    assert not hasattr(layer, "packed")
    for ours, expected in zip(packed, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_benchmarks_count_packed_products(dtype: torch.dtype) -> None:
    from flops import counter

    if not packs(dtype):
        pytest.skip(f"torch cannot pack {dtype} on this machine")
    layer, tokens = nn.Linear(48, 80, dtype=dtype), torch.randn(2, 16, 48, dtype=dtype)
    with torch.no_grad(), packing.packing([layer], rows=32, calls=64), counter() as counted:
        packing.product(layer, tokens)
    assert counted.get_total_flops() == 2 * 32 * 48 * 80


def test_what_is_not_a_plain_product_is_not_packed() -> None:
    class Wrapped(nn.Linear):
        """Does something else."""

    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    others = [Wrapped(8, 8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, groups=2), nn.Linear(8, 8).double(), hooked]
    others += [nn.Linear(8, 8, device="meta"), nn.LayerNorm(8)]
    assert not any(packing.can_pack(layer) for layer in others)
    layer = nn.Linear(8, 8)
    with packing.packing([layer, *others], rows=1, calls=packing.ENOUGH - 1):
        assert not hasattr(layer, "packed")  # too few to be worth it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_denoising_multiplies_by_packed_weights(
    fresh_model: Callable[..., UniLIP], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    if not packs(dtype):
        pytest.skip(f"torch cannot pack {dtype} on this machine")
    model, calls = fresh_model().to(dtype), []
    times = packing.Packed.times
    monkeypatch.setattr(packing.Packed, "times", lambda *given: calls.append(1) or times(*given))
    monkeypatch.setattr(packing, "ENOUGH", 10**9)
    plain = draw(model, ["a red star", "a dog"], num_inference_steps=3)
    assert not calls
    monkeypatch.setattr(packing, "ENOUGH", 1)
    packed = draw(model, ["a red star", "a dog"], num_inference_steps=3)
    blocks = len(model.dit.transformer.transformer_blocks)
    assert len(calls) == 3 * 8 * blocks
    assert apart(packed, plain) < (0.05 if dtype == torch.bfloat16 else 1e-5)

    def stop(*_: Any) -> None:
        assert any(hasattr(layer, "packed") for layer in model.dit.modules())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(model, num_inference_steps=3, callback_on_step_end=stop)
    assert not any(hasattr(layer, "packed") for layer in model.modules())


def test_weights_are_not_packed_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(64, 64)
    if not packing.can_pack(layer):
        pytest.skip("torch cannot pack float32 on this machine")
    bytes_of = 64 * 64 * 4
    for spare, expected in ((4 * bytes_of, True), (4 * bytes_of - 1, False)):
        monkeypatch.setattr(packing, "spare_memory", lambda spare=spare: spare)
        with packing.packing([layer], rows=packing.ENOUGH, calls=1):
            assert hasattr(layer, "packed") == expected


def test_spare_memory_is_that_of_the_machine_or_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n", "/sys/fs/cgroup/memory.current": "1000\n"}

    def read(path: Path) -> str:
        if str(path) in files:
            return files[str(path)]
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read)
    assert packing.spare_memory() == 8000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert packing.spare_memory() == 8000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "5000\n"
    assert packing.spare_memory() == 4000
    files.clear()
    assert packing.spare_memory() == 4 << 30


def test_low_memory_packs_nothing(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "ENOUGH", 1)
    monkeypatch.setattr(packing.Packed, "of", lambda *_: pytest.fail("packed"))
    draw(UniLIP.from_pretrained(tiny_folder, low_memory=True), num_inference_steps=2)


# --- presets --------------------------------------------------------------------------------------------------------


def evaluations(model: UniLIP, **settings: Any) -> int:
    rows: list[int] = []
    hook = model.dit.transformer.patch_embed.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    draw(model, **settings)
    hook.remove()
    return sum(rows)


def test_presets_evaluate_less_and_stay_near(tiny_model: UniLIP) -> None:
    exact = draw(tiny_model)
    counts = [evaluations(tiny_model, preset=name) for name in PRESETS]
    assert counts[0] == 40 and counts == sorted(counts, reverse=True) and counts[1] <= 24 and counts[2] <= 14
    assert apart(draw(tiny_model, preset="quality"), exact) == 0
    for name, far in (("balanced", 0.1), ("fast", 0.2)):  # fast is unguided at the end, which tells on random weights
        assert 0 < relative(draw(tiny_model, preset=name), exact) < far
    assert evaluations(tiny_model, preset="fast", num_inference_steps=3) == 5  # what is given counts more


def test_a_preset_draws_the_same_in_any_batch(tiny_model: UniLIP) -> None:
    for name in PRESETS:
        both = draw(tiny_model, ["a red star", "two long green trains"], preset=name)
        assert apart(both[:1], draw(tiny_model, preset=name)) < 1e-5


def test_an_unknown_preset_lists_the_known_ones(tiny_model: UniLIP) -> None:
    with pytest.raises(UniLIPError, match=r"'turbo'.*quality, balanced, fast"):
        draw(tiny_model, preset="turbo")


def test_guidance_in_an_interval_and_reuse_of_blocks(tiny_model: UniLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = draw(tiny_model, num_inference_steps=10)
    monkeypatch.setitem(PRESETS, "interval", Shortcut(guided=(0.2, 0.6)))
    assert evaluations(tiny_model, preset="interval", num_inference_steps=10) == 14  # 4 steps of 10 are guided
    assert relative(draw(tiny_model, preset="interval", num_inference_steps=10), exact) > 1e-3
    last = tiny_model.dit.transformer.transformer_blocks[-1]
    ran: list[int] = []
    hook = last.register_forward_hook(lambda *_: ran.append(1))
    monkeypatch.setitem(PRESETS, "reuse", Shortcut(reuse=0.3, guided=(0.0, 0.5)))
    near = draw(tiny_model, preset="reuse", num_inference_steps=10)
    hook.remove()
    assert len(ran) == 6  # steps 3, 5, 7 and 9 run the first block alone
    monkeypatch.setitem(PRESETS, "half", Shortcut(guided=(0.0, 0.5)))
    assert 0 < relative(near, draw(tiny_model, preset="half", num_inference_steps=10)) < 0.1


def test_no_two_steps_in_a_row_reuse() -> None:
    assert Shortcut(reuse=0.0).reused_steps(6) == {1, 3, 5}
    assert Shortcut(reuse=0.5).reused_steps(6) == {3, 5}
    assert Shortcut().reused_steps(6) == frozenset()
    assert shortcut("quality") == Shortcut()


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
    weight = model.pixel_decoder.decoder.conv_out.weight
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


def test_a_loop_that_can_be_recorded_is_recorded_once_for_a_shape(
    tiny_model: UniLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recording itself needs CUDA; here a stand-in shows when it is made, with what, and when it is replayed."""
    from unilip import acceleration

    made: list[tuple[int, ...]] = []

    class Recorded:
        def __init__(self, make: Any, noise: Tensor, condition: PreparedCondition) -> None:
            made.append(tuple(noise.shape))
            self.make, self.condition = make, condition.clone()

        def __call__(self, noise: Tensor, condition: PreparedCondition) -> Tensor:
            self.condition.copy_(condition)
            return self.make(self.condition)(noise)

    class OnCuda(Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

    monkeypatch.setattr(acceleration, "RecordedLoop", Recorded)
    loops = Compiled(tiny_model.dit, torch.nn.Identity(), 64, backend="eager")
    condition = PreparedCondition(((torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2)),), torch.ones(1, 1, 1, 4))

    def make(c: PreparedCondition) -> Callable[[Tensor], Tensor]:
        return lambda noise: noise * c.mask.sum()

    for value in (1.0, 2.0):
        noise = torch.full((1, 2), value).as_subclass(OnCuda)
        assert float(loops.loop(("a",), (0,), make, noise, condition).sum()) == 8 * value
    assert made == [(1, 2)]
    loops.loop(("b",), (0,), make, noise, condition)
    loops.loop(("b",), (1,), make, noise, condition)
    assert len(made) == 3  # the weights have changed

    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(acceleration, "RecordedLoop", fail)
    assert float(loops.loop(("c",), (0,), make, noise, condition).sum()) == 16.0  # runs all the same


@pytest.mark.gpu
def test_a_recorded_loop_draws_what_the_plain_one_does(fresh_model: Callable[..., UniLIP]) -> None:
    model = fresh_model().to("cuda")
    expected = [draw(model, prompt) for prompt in ("a red star", "a blue star")]
    model.compile()
    for prompt, latents in zip(("a red star", "a blue star"), expected, strict=True):
        assert apart(draw(model, prompt), latents) < 1e-3
    assert model._compiled is not None and len(model._compiled.loops) == 1
    assert all(loop is not None for loop in model._compiled.loops.values())


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
        fast.steps,
        fast.solver,
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


@pytest.mark.slow
def test_the_speed_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    import speed

    words = [
        "speed.py",
        "--sizes",
        "tiny",
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "a"),
        "--plot",
        str(tmp_path / "b.png"),
    ]
    monkeypatch.setattr(sys, "argv", words)
    speed.main()
    found = json.loads((tmp_path / "a").read_text())["results"]
    assert {row["task"] for row in found} == {"generate", "edit"}
    assert all(row["paths"]["exact"]["largest_difference"] < 1e-4 for row in found)
    assert (tmp_path / "b.png").stat().st_size > 1000
    assert "| tiny | edit | 1 | fast |" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_the_step_benchmark_runs(
    task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    import train

    def measured(*more: str) -> Any:
        words = ["train.py", "--size", "tiny", "--fraction", "1", "--task", task, "--repeats", "1", "--json", *more]
        monkeypatch.setattr(sys, "argv", words)
        train.main()
        return json.loads(capsys.readouterr().out)

    kept, selective = measured(), measured("--ours", "selective", "--straightforward", "recomputed", "--prompt", "64")
    for found in (kept, selective):
        assert found["gradient_difference"] < 1e-4 and found["loss_difference"] < 1e-5
    assert kept["ours"]["kept_bytes"] < kept["straightforward"]["kept_bytes"]
    assert selective["ours"]["kept_bytes"] < kept["ours"]["kept_bytes"]
    assert selective["straightforward"]["kept_bytes"] < kept["straightforward"]["kept_bytes"]
    assert (kept["prompt"], selective["prompt"]) == (48, 64)


def test_the_comparison_of_shortcuts_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    import shortcuts

    from unilip.emoji.art import Atlas
    from unilip.emoji.world import World

    art, ways = Atlas.synthetic(World.pico()), {name: shortcuts.WAYS[name] for name in list(shortcuts.WAYS)[-3:]}
    monkeypatch.setattr(shortcuts.Atlas, "load", lambda: art)
    monkeypatch.setattr(shortcuts, "WAYS", ways)
    monkeypatch.setitem(PRESETS, "measured", Shortcut())  # so that it is gone afterwards
    monkeypatch.setattr(sys, "argv", ["shortcuts.py", "--count", "2", "--json", str(tmp_path / "a.json")])
    shortcuts.main()
    rows = {row["way"]: row for row in json.loads((tmp_path / "a.json").read_text())}
    assert [rows[f"preset {name}"]["evaluations"] for name in ("quality", "balanced", "fast")] == [40, 20, 10]
    assert rows["preset quality"]["generate"] == rows["preset quality"]["edit"] == 80
    assert rows["guidance in the first 80 % of 20 steps"]["evaluations"] == 36
    assert all(10 < row[task] < 79 for way, row in rows.items() if way in ways for task in ("generate", "edit"))
    assert "| preset fast | 10 |" in capsys.readouterr().out
