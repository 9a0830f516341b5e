"""Every fast way equals its plain twin of the method: numbers, gradients, and in bfloat16 as near to float32 as that.

Presets, compilation and benchmarks: `test_speed.py`. Offload, quantisation and models in strips: `test_memory.py`.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from method_support import ODD, apart, off, spread
from unilip import cli, machine
from unilip.fast import decoder as fast_decoder
from unilip.fast import products
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
                        found["selected"] = step(net, latent[rows], times, prepared[rows])
                        found["part"] = step(net, latent[1:], times, prepared[1:])
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
            plain, ours = decoder(given), [decode(decoder, given, strips) for strips in (1, 3)]
            exact = decoder.float()(given.float())
            if not all(off(mine, exact) < 1.5 * off(plain, exact) for mine in ours):
                wrong.append(
                    f"{name}: bfloat16 {[off(mine, exact) for mine in ours]}, the plain {off(plain, exact):.1e}"
                )
    assert not wrong, "\n".join(wrong)


def test_strips_hold_less_and_adapters_are_not_folded_away(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = spread(PixelDecoder(preset("tiny")).decoder)
    latent, convolve = torch.randn(1, 32, 6, 2), functional.conv2d
    sizes: list[int] = []

    def counted(*given: Any, **options: Any) -> Tensor:
        made = convolve(*given, **options)
        sizes.append(made.nbytes)
        return made

    with torch.no_grad():
        whole = decoder(latent)
        monkeypatch.setattr(functional, "conv2d", counted)
        most = []
        for strips in (1, 8):
            sizes.clear()
            assert apart(decode(decoder, latent, strips), whole) < 1e-4 * float(whole.std())
            most.append(max(sizes))
        assert most[1] < 0.3 * most[0], most  # a stage with attention, which is not cut, holds as much
        monkeypatch.setattr(fast_decoder, "PIECE", most[0] // 8)  # as large pictures are decoded without strips
        sizes.clear()
        assert apart(decode(decoder, latent), whole) < 1e-4 * float(whole.std())
        assert max(sizes) < 0.3 * most[0], (max(sizes), most)
        monkeypatch.undo()

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


# --- products ---------------------------------------------------------------------------------------------------------

LIBRARIES = (("float32", "MKL"), ("float32", "oneDNN"), ("bfloat16", "oneDNN"))


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What every product takes, in place of what would be measured; weights of any size count."""
    found: dict[str, float] = {}
    monkeypatch.setattr(products, "product_times", lambda shape, ways=(), anew=False: dict(found))
    monkeypatch.setattr(products, "SMALL", 0)
    return found


def test_packed_weights_multiply_alike(times: dict[str, float]) -> None:
    for kind, library in LIBRARIES:
        way, dtype = f"{kind} {library}", getattr(torch, kind)
        if way not in products.measure((16, 48, 80), [way]):
            continue  # not on this machine
        times.clear()
        times.update({kind: 2.0, way: 1.0, f"{way} packing": 1.0})
        for bias in (True, False):
            layer, other = nn.Linear(48, 80, bias=bias, dtype=dtype), nn.LayerNorm(48, dtype=dtype)
            tokens = torch.randn(2, 16, 48, dtype=dtype)
            with torch.no_grad():
                multiply = products.Products().multiply([layer, other], rows=32, calls=64)
                assert multiply is not products.plain
                for rows in (tokens, tokens[:1]):  # as packed, and half as many
                    close = dict(rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
                    torch.testing.assert_close(multiply(layer, rows), layer(rows), **close)
                    assert torch.equal(multiply(other, rows), other(rows))


def test_moved_columns_are_another_weight() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(24, 48, dtype=dtype)
        changed = [
            weight.roll(8, 1),
            weight.roll(8, 0),
            weight.flip(1),
            -weight,
            weight.clone().index_fill_(0, torch.tensor(3), 0),
        ]
        assert products.stamp(weight.clone()) == products.stamp(weight)
        assert products.stamp(weight) not in [products.stamp(one) for one in changed]


def test_the_way_is_the_one_that_was_measured_fastest(times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (256, 64, 64)
    cases: list[tuple[dict[str, float], int, str]] = [
        ({}, 20, ""),
        ({"float32": 10.0}, 20, ""),
        ({"float32": 10.0, "float32 MKL": 8.0, "float32 MKL packing": 5.0}, 20, "MKL"),
        ({"float32": 10.0, "float32 MKL": 8.0, "float32 MKL packing": 5.0}, 2, ""),  # packing takes longer
        ({"float32": 10.0, "float32 MKL": 9.9, "float32 MKL packing": 0.1}, 20, ""),  # hardly faster
        (
            {
                "float32": 10.0, "float32 MKL": 12.0, "float32 oneDNN": 7.0, "float32 MKL packing": 1.0,
                "float32 oneDNN packing": 1.0, "bfloat16": 1.0, "bfloat16 oneDNN": 0.5, "bfloat16 oneDNN packing": 1.0,
            },
            20, "oneDNN",
        ),
    ]  # fmt: skip
    wrong = []
    for measured, calls, library in cases:
        times.clear()
        times.update(measured)
        if products.fastest("float32", shape, calls) != library:
            wrong.append((measured, calls, library))
    assert not wrong
    assert products.fastest("bfloat16", shape, 20) == "oneDNN" and products.fastest("float16", shape, 20) == ""
    computes = {dtype: products.computes(dtype, "cpu", shape) for dtype in (torch.bfloat16, torch.float16)}
    assert computes == {torch.bfloat16: True, torch.float16: False} and products.computes(torch.float16, "cuda", shape)
    times["bfloat16"] = times["bfloat16 oneDNN"] = 6.9
    assert not products.computes(torch.bfloat16, "cpu", shape)  # hardly faster than float32 by oneDNN

    class Wrapped(nn.Linear):
        """Does something else."""

    others = [Wrapped(64, 64), nn.Conv2d(8, 8, 1), nn.Linear(64, 64).double(), nn.Linear(64, 64, device="meta")]
    assert not any(products.library_of(layer, 256, 20) for layer in others)
    layer = nn.Linear(64, 64)
    assert products.library_of(layer, 256, 20) == "oneDNN"
    for spare, packs in (
        (products.SHARE * layer.weight.nbytes, True),
        (products.SHARE * layer.weight.nbytes - 1, False),
    ):
        monkeypatch.setattr(products, "spare_memory", lambda spare=spare: spare)
        assert (products.Products().multiply([layer], 256, 20) is not products.plain) == packs
    monkeypatch.setattr(products, "SMALL", 64 * 64 + 1)
    assert products.library_of(layer, 256, 20) == ""


def test_products_are_measured_once_and_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNILIP_CACHE", str(tmp_path / "new"))
    measured: list[Any] = []
    measure = products.measure
    monkeypatch.setattr(products, "measure", lambda shape, ways: measured.append((shape, ways)) or measure(shape, ways))

    def ask(shape: products.Shape = (7, 32, 48), fresh: bool = True, **options: Any) -> dict[str, float]:
        if fresh:  # as another process
            products._known.cache_clear()
        return products.product_times(shape, ("float32", "bfloat16"), **options)

    first = ask()
    assert measured == [((8, 32, 48), ["float32", "bfloat16"])] and all(ms > 0 for ms in first.values())
    assert ask() == ask(fresh=False) == ask((8, 32, 48)) == first and len(measured) == 1
    ask((7, 32, 64))
    assert ask() == first and len(measured) == 2
    ask(anew=True)
    assert len(measured) == 3
    file = products.place()
    whole = file.read_text()
    for damaged in ("", "[1]", whole[:40], "null", '{"a": 1}', whole.replace(": 0.", ": -0.")):
        file.write_text(damaged)
        count = len(measured)
        assert ask() and len(measured) == count + 1, damaged
    monkeypatch.setattr(products, "processor", lambda: "another")
    count = len(measured)
    ask()
    assert len(measured) == count + 1 and len(json.loads(file.read_text())) == 2
    monkeypatch.setenv("UNILIP_CACHE", str(file / "no folder"))
    assert ask() and ask(fresh=False) and len(measured) == count + 2
    products._known.cache_clear()


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
        assert machine.spare_memory() == spare
    files.clear()
    assert machine.spare_memory() == 4 << 30


def test_info_tells_the_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(products, "WAYS", ("float32", "bfloat16"))  # torchao takes long to import
    assert cli.main(["info", "--machine", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["processor"] == machine.processor() and found["free_memory"] > 0
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # it computes differently, so its times are others
    assert machine.processor.__wrapped__() != found["processor"]
    assert [row["product"] for row in found["products"]] == ["attention", "widening", "narrowing"]
    assert all(set(row["milliseconds"]) == {"float32", "bfloat16"} for row in found["products"])
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert cli.main(["info", "--machine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-1] in found["processor"] and lines[-2].startswith("float32 ")
    assert cli.main(["info", "--machine", "nowhere/at/all"]) == 2


def test_denoising_packs_once_and_follows_its_weights(
    fresh_model: Callable[..., UniLIP], times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "float32 oneDNN" not in products.measure((16, 48, 80), ["float32 oneDNN"]):
        pytest.skip("torch cannot pack float32 on this machine")
    model, calls, made = fresh_model(), [], []
    multiply, of = products.Packed.times, products.Packed.of.__func__
    monkeypatch.setattr(products.Packed, "times", lambda *given: calls.append(1) or multiply(*given))
    monkeypatch.setattr(products.Packed, "of", classmethod(lambda *given: made.append(1) or of(*given)))

    def draw(model: UniLIP = model, prompts: Any = ("a red star", "a dog")) -> Tensor:
        options: dict[str, Any] = dict(num_inference_steps=3, generator=3, progress=False, output_type="latent")
        images: Tensor = model.generate(list(prompts), **options).images
        return images

    plain = draw()
    assert not calls
    times.update({"float32": 2.0, "float32 oneDNN": 1.0, "float32 oneDNN packing": 0.1})
    layers = 8 * len(model.dit.transformer.transformer_blocks)
    assert apart(draw(), plain) < 1e-5
    assert len(calls) == 3 * layers and len(made) == layers
    draw(), draw(prompts=["a dog"])
    assert len(made) == layers  # kept from picture to picture
    weight = model.dit.transformer.transformer_blocks[0].ff.conv_point.weight
    changed: dict[str, Callable[[], Any]] = {
        "in place": lambda: weight.mul_(0.5),
        "behind torch's back": lambda: weight.data.mul_(3),
        "loaded": lambda: model.load_state_dict(fresh_model(seed=1).state_dict()),
        "cast": lambda: model.to(torch.float64).to(torch.float32),
    }
    wrong = {}
    for name, change in changed.items():
        with torch.no_grad():
            change()
        made.clear()
        found = draw()
        packed = len(made)
        model.runtime.products = None  # nothing is packed
        calls.clear()
        expected = draw()
        model.runtime.products = products.Products()
        if apart(found, expected) > 1e-5 or calls or not packed:
            wrong[name] = (apart(found, expected), packed)
        draw()
    assert not wrong
    model.enable_cpu_offload("cpu")  # whose weights come and go
    calls.clear()
    draw()
    assert not calls
