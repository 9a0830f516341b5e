"""Every fast way equals its plain twin of the method: numbers, gradients, and in bfloat16 as near to float32 as that.

Presets, compilation and benchmarks: `test_speed.py`. Offload, quantisation and models in strips: `test_memory.py`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from method_support import ODD, apart, off, spread
from unilip.fast import decoder as fast_decoder
from unilip.fast import packing
from unilip.fast.decoder import decode
from unilip.fast.dit import prepare, step
from unilip.fast.mllm import read_in_two_passes
from unilip.fast.solver import integrate, plan
from unilip.method.config import SOLVERS
from unilip.method.decoder import PixelDecoder, ResBlock
from unilip.method.dit import Transformer
from unilip.method.flow import guide, make_schedule, sample
from unilip.method.mllm import MLLM
from unilip.model import UniLIP
from unilip.sizes import preset

CONFIGS = {"tiny": preset("tiny"), "odd": ODD}
PLAIN = preset("tiny").replace(dit=dataclasses.replace(preset("tiny").dit, plain_blocks=True))


# --- transformer ------------------------------------------------------------------------------------------------------


def test_prepared_steps_are_the_plain_transformer() -> None:
    """K latents of a condition, conditions chosen by index, of another length, of one timestep or one for each row."""
    wrong: list[str] = []
    for name, config in {**CONFIGS, "plain blocks": PLAIN}.items():
        net = spread(Transformer(config.dit))
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [1, 1, 1, 0, 0, 1, 1]])
        for size, k in (((2, 5), 1), ((3, 3), 3)):
            latent = torch.randn(3 * k, config.dit.latent_channels, *size, requires_grad=True)
            condition = torch.randn(3, 7, config.dit.caption_channels, requires_grad=True)
            for timestep in (torch.tensor([700.0]), torch.linspace(1, 999, 3 * k)):
                inputs = [latent, condition, *net.parameters()]
                expected = net(latent, timestep.expand(3 * k), condition, mask)
                found = {"step": step(net, latent, net.modulate(timestep), prepare(net, condition, mask))}
                theirs, ours = (torch.autograd.grad(x.square().sum(), inputs) for x in (expected, found["step"]))
                largest = max(float(g.abs().max()) for g in theirs)
                distances = {"gradients": max(apart(a, b) for a, b in zip(ours, theirs, strict=True)) / largest}
                wanted = dict.fromkeys(("step", "padded", "in place"), expected)
                with torch.no_grad():
                    times, prepared = net.modulate(timestep), prepare(net, condition, mask)
                    found["padded"] = step(net, latent, times, prepared.padded(12))
                    found["in place"] = step(net, latent, times, prepared)
                    if k == len(timestep) == 1:
                        rows = torch.tensor([2, 0, 2, 1])
                        found["selected"] = step(net, latent[rows], times, prepared.select(rows))
                        found["part"] = step(net, latent[1:], times, prepared.part(slice(1, None)))
                        wanted |= {"selected": expected[rows], "part": expected[1:]}
                distances |= {how: apart(found[how], wanted[how]) for how in found}
                where = f"{name} {size} x{k} at {len(timestep)} timesteps"
                wrong += [f"{where}: {how} {distance:.1e}" for how, distance in distances.items() if distance > 1e-5]
        with torch.no_grad():
            rough = spread(Transformer(config.dit)).bfloat16()
            given = latent.bfloat16(), condition.bfloat16()
            times = torch.linspace(1, 999, len(latent))
            plain = rough(given[0], times, given[1], mask)
            fast = step(rough, given[0], rough.modulate(times), prepare(rough, given[1], mask))
            rough.float()
            exact = rough(given[0].float(), times, given[1].float(), mask)
            if not off(fast, exact) < 1.5 * off(plain, exact):
                wrong.append(f"{name}: bfloat16 {off(fast, exact):.1e}, the plain {off(plain, exact):.1e}")
    assert not wrong, "\n".join(wrong)


def test_modulations_of_a_schedule_are_those_of_its_timesteps() -> None:
    net, latent = spread(Transformer(ODD.dit)), torch.randn(2, 6, 2, 3)
    condition, mask = torch.randn(2, 4, 26), torch.ones(2, 4)
    with torch.no_grad():
        whole, prepared = net.modulate(torch.tensor([999, 500, 3])), prepare(net, condition, mask)
        for i, timestep in enumerate((999, 500, 3)):
            expected = net(latent, torch.full((2,), timestep), condition, mask)
            assert apart(step(net, latent, whole[i : i + 1], prepared), expected) < 1e-5


# --- decoder ----------------------------------------------------------------------------------------------------------


def test_the_decoder_is_the_plain_one_in_any_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips, folded upsampling and work in place, float32 and bfloat16, with gradients and without."""
    configs = {name: preset(name) for name in ("tiny", "pico", "nano")} | {"odd": ODD}
    for kind in ("interpolate", "pixel_shuffle"):  # shortcuts of 4, 2 and 1 copies; the finest scale there and not
        for least in (0, 1):
            layers, widths = (least, 2, 1, 1, 1, 1), (8, 8, 16, 16, 16, 64)
            changed = dataclasses.replace(
                preset("tiny").decoder, upsample_block_type=kind, layers_per_block=layers, block_out_channels=widths
            )
            configs[f"{kind} {least}"] = preset("tiny").replace(decoder=changed)
    ran: list[str] = []
    for function in ("upsample", "residual"):
        run = getattr(fast_decoder, function)
        monkeypatch.setattr(
            fast_decoder, function, lambda *given, run=run, name=function: (ran.append(name), run(*given))[1]
        )
    wrong: list[str] = []
    for name, config in configs.items():
        decoder = spread(PixelDecoder(config).decoder)
        repeats = config.decoder.upsample_block_type == "interpolate"
        blocks = sum(isinstance(module, ResBlock) for module in decoder.modules())
        for size in ((5, 1), (1, 2)):
            latent = torch.randn(2, config.decoder.latent_channels, *size)
            with torch.no_grad():
                expected = decoder(latent)
                for strips in (1, 2, 3, 4, 5, 100):
                    ran.clear()
                    distance = apart(decode(decoder, latent, strips), expected) / float(expected.std())
                    if not distance < 1e-4 or ran.count("residual") < blocks or ("upsample" in ran) != repeats:
                        wrong.append(f"{name} {size} in {strips} strips: {distance:.1e}, {len(ran)} shorter ways")
        ran.clear()
        distance = off(decode(decoder, latent.requires_grad_(), 2), decoder(latent))
        if ran or not distance < 1e-5:  # keeps what its gradients need
            wrong.append(f"{name}: {distance:.1e} with gradients, {len(ran)} shorter ways")
        with monkeypatch.context() as exact:  # float64, sums too: in float32 a value at a ReLU's zero may change sides
            exact.setattr(Tensor, "float", Tensor.double)
            learning, same = (latent.detach().double().requires_grad_() for _ in range(2))
            made, plain = decode(decoder.double(), learning, 2), decoder(same)
            ours, theirs = torch.autograd.grad(made.sum(), learning)[0], torch.autograd.grad(plain.sum(), same)[0]
            if not off(ours, theirs) < 1e-9:
                wrong.append(f"{name}: gradients {off(ours, theirs):.1e}")
        with torch.no_grad():
            decoder.bfloat16()
            given = torch.randn(1, config.decoder.latent_channels, 3, 1).bfloat16()
            plain, whole, pieces = decoder(given), decode(decoder, given, 1), decode(decoder, given, 3)
            exact = decoder.float()(given.float())
            if ran or not torch.equal(whole, plain) or not off(pieces, exact) < 1.5 * off(plain, exact):
                wrong.append(f"{name}: bfloat16 {off(pieces, exact):.1e}, the plain {off(plain, exact):.1e}")
    assert not wrong, "\n".join(wrong)


def test_strips_hold_less_and_adapters_are_not_folded_away() -> None:
    decoder = spread(PixelDecoder(preset("tiny")).decoder)
    latent, heights = torch.randn(1, 32, 6, 2), []
    decoder.norm_out.register_forward_hook(lambda _, inputs, out: heights.append(out.shape[2]))
    with torch.no_grad():
        whole = decoder(latent.double().float()).clone()
        heights.clear()
        decode(decoder.bfloat16(), latent.bfloat16(), 3)  # in float32 the norm is not called, but computed in place
        assert len(heights) == 3 and max(heights) < whole.shape[2]
        decoder.float()

        class Doubled(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

            def forward(self, x: Tensor) -> Tensor:
                return 2 * self.inner(x)

        layer: Any = decoder.up_blocks[0][0]
        layer.conv = Doubled(layer.conv)
        for strips in (1, 3):
            assert apart(decode(decoder, latent, strips), decoder(latent)) < 1e-4 * float(whole.std())


# --- language model ---------------------------------------------------------------------------------------------------


def test_reading_in_two_passes_is_reading_at_once() -> None:
    """Numbers, and gradients of the queries, also where layers are recomputed in the backward pass."""
    wrong: list[str] = []

    def around(layer: nn.Module, *inputs: Any) -> Any:
        return checkpoint(layer, *inputs, use_reentrant=False) if torch.is_grad_enabled() else layer(*inputs)

    for name, config in CONFIGS.items():
        mllm = spread(MLLM(config))
        mllm.language_model.requires_grad_(False)
        for side, rows in {"left": [[0, 0, 1, 1, 1], [1] * 5], "right": [[1, 1, 0, 0, 0], [1] * 5]}.items():
            mask, x = torch.tensor(rows), torch.randn(2, 5, config.text.hidden_size)
            found: list[tuple[Tensor, Tensor]] = []
            for read, recompute in ((None, False), (read_in_two_passes, False), (read_in_two_passes, True)):
                mllm.language_model.model.layers.around = around if recompute else None
                hidden, whole = mllm.read_with_queries(x, mask) if read is None else read(mllm, x, mask)
                valid = hidden[whole.bool()]
                weights = torch.linspace(-1, 1, valid.numel()).view(valid.shape)
                found.append((valid, torch.autograd.grad((valid * weights).sum(), mllm.queries)[0]))
            for how, (hidden, gradient) in zip(("two passes", "recomputed"), found[1:], strict=True):
                for what, a, b in (("numbers", hidden, found[0][0]), ("gradients", gradient, found[0][1])):
                    if not apart(a, b) < 1e-5 * max(1.0, float(b.detach().abs().max())):
                        wrong.append(f"{name} {side} {how}: {what} {apart(a, b):.1e}")
        mllm.language_model.model.layers.around = None
        mllm.language_model.requires_grad_(True)  # whatever learns before the queries needs the whole
        hidden, _ = read_in_two_passes(mllm, x, mask)
        first = torch.autograd.grad(hidden[:, 0].sum(), mllm.language_model.model.layers[0].mlp.up_proj.weight)[0]
        if not float(first.abs().max()) > 0:
            wrong.append(f"{name}: a language model that learns got no gradient from the prompt")
    assert not wrong, "\n".join(wrong)


# --- solver -----------------------------------------------------------------------------------------------------------


def test_a_plan_is_its_solver_with_guidance_and_replaced_latents() -> None:
    noise, low, wrong = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2), []

    def single(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.sin(3 * x) + timestep.view(-1, *[1] * (x.dim() - 1)) / 1000

    def both(x: Tensor, timestep: Tensor) -> Tensor:
        values = single(x, timestep)
        return values if len(x) == 2 else values + torch.cat([low, torch.zeros_like(low)])

    def replace(i: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
        return latents.flip(-1).double() + 0.5 if i in (0, 1, 4, 5) else None

    for solver in SOLVERS:
        for steps in (1, 2, 3, 7, 20):
            for on_step in (None, replace):
                for guidance, guided in ((1.0, None), (2.5, None), (2.5, [i < steps / 2 for i in range(steps)])):
                    schedule, count = make_schedule(solver, 3.0, steps), [0]

                    def velocity(x: Tensor, t: Tensor, guidance=guidance, guided=guided, count=count) -> Tensor:
                        i, count[0] = count[0], count[0] + 1
                        if guidance > 1 and (guided is None or guided[i]):
                            return guide(both(torch.cat([x, x]), t.expand(4)), guidance)
                        return single(x, t.expand(2))

                    expected = sample(velocity, noise, schedule, on_step)
                    found = integrate(both, noise, plan(solver, 3.0, steps), guidance, on_step, guided)
                    assert torch.equal(plan(solver, 3.0, steps).timesteps, schedule.timesteps)
                    if not apart(found, expected) < 1e-5 * max(1.0, float(expected.abs().max())):
                        wrong.append(f"{solver} {steps} {guidance} {guided} {on_step}: {apart(found, expected):.1e}")
    assert not wrong, "\n".join(wrong)


# --- packed weights ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if not packing.can_pack(nn.Linear(8, 8, dtype=request.param)):
        pytest.skip(f"torch cannot pack {request.param} on this machine")
    found: torch.dtype = request.param
    return found


def test_packed_weights_multiply_alike(dtype: torch.dtype) -> None:
    for bias in (True, False):
        layer, other = nn.Linear(48, 80, bias=bias, dtype=dtype), nn.LayerNorm(48, dtype=dtype)
        tokens = torch.randn(2, 16, 48, dtype=dtype)
        with torch.no_grad():
            multiply = packing.pack([layer, other], rows=32, calls=64)
            assert multiply is not packing.plain
            for rows in (tokens, tokens[:1]):  # as packed, and half as many
                close = dict(rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
                torch.testing.assert_close(multiply(layer, rows), layer(rows), **close)
                assert torch.equal(multiply(other, rows), other(rows))


def test_what_is_not_a_plain_product_or_too_much_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(nn.Linear):
        """Does something else."""

    others = [Wrapped(8, 8), nn.Conv2d(8, 8, 1), nn.Linear(8, 8).double(), nn.Linear(8, 8, device="meta")]
    assert not any(packing.can_pack(layer) for layer in [*others, nn.LayerNorm(8)])
    layer = nn.Linear(64, 64)
    if not packing.can_pack(layer):
        pytest.skip("torch cannot pack float32 on this machine")
    assert packing.pack([layer], rows=1, calls=packing.ENOUGH - 1) is packing.plain  # too few to be worth it
    needed = packing.SHARE * 64 * 64 * 4
    for spare, packs in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(packing, "spare_memory", lambda spare=spare: spare)
        assert (packing.pack([layer], packing.ENOUGH, 1) is not packing.plain) == packs


def test_spare_memory_is_that_of_the_machine_or_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n", "/sys/fs/cgroup/memory.current": "1000\n"}

    def read(path: Path) -> str:
        if str(path) in files:
            return files[str(path)]
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read)
    for limit, spare in ((None, 8000 * 1024), ("max\n", 8000 * 1024), ("5000\n", 4000)):
        if limit is not None:
            files["/sys/fs/cgroup/memory.max"] = limit
        assert packing.spare_memory() == spare
    files.clear()
    assert packing.spare_memory() == 4 << 30


def test_denoising_multiplies_by_packed_weights(
    fresh_model: Callable[..., UniLIP], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model, calls = fresh_model().to(dtype), []
    times = packing.Packed.times
    monkeypatch.setattr(packing.Packed, "times", lambda *given: calls.append(1) or times(*given))

    def draw() -> Tensor:
        options: dict[str, Any] = dict(num_inference_steps=3, generator=3, progress=False, output_type="latent")
        images: Tensor = model.generate(["a red star", "a dog"], **options).images
        return images

    monkeypatch.setattr(packing, "ENOUGH", 10**9)
    plain = draw()
    assert not calls
    monkeypatch.setattr(packing, "ENOUGH", 1)
    assert apart(draw(), plain) < (0.05 if dtype == torch.bfloat16 else 1e-5)
    assert len(calls) == 3 * 8 * len(model.dit.transformer.transformer_blocks)
    calls.clear()
    model.enable_cpu_offload("cpu")  # whose weights come and go
    draw()
    assert not calls
