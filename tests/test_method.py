"""The method's own networks against the libraries' (transformers, diffusers), and what it stands on: torch alone.

Float32 agrees to 1e-5, gradients too (of the size of the largest). In bfloat16 both round after every operation, in
another order; so ours may be at most 1.5 times as far from float32 as the library itself is in bfloat16.
"""

import ast
import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from method_support import ODD, apart, spread
from unilip.method.config import SOLVERS
from unilip.method.connector import Connector
from unilip.method.decoder import DCDecoder
from unilip.method.dit import DiT
from unilip.method.encoder import Encoder, VisionTower
from unilip.method.flow import make_schedule, sample
from unilip.method.mllm import MLLM
from unilip.method.qwen2 import KeyValueCache, positions, visible
from unilip.model import UniLIP
from unilip.sizes import preset

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "unilip"
sys.path.append(str(ROOT / "benchmarks"))

CONFIGS = {"tiny": preset("tiny"), "odd": ODD}


def gradients(result: Tensor, inputs: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wave = torch.linspace(-1, 1, result.numel()).view(result.shape)
    found = torch.autograd.grad((result * wave).sum(), [inputs, *weights.values()], allow_unused=True)
    return {name: g for name, g in zip(["input", *weights], found, strict=True) if g is not None}


Run = Callable[[Any, Tensor], Tensor]  # network, input -> result


def plain(net: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = net(x)
    return result


def compare(what: str, module: nn.Module, library: nn.Module, given: Tensor, ours: Run, theirs: Run) -> list[str]:
    """Say where a network and the library's, which has its weights, differ: numbers, gradients, bfloat16."""
    wrong: list[str] = []
    x, y = given.clone().requires_grad_(), given.clone().requires_grad_()
    a, b = ours(module, x), theirs(library, y)
    if not (apart(a, b) < 1e-5 * max(1.0, b.detach().abs().max()) and b.detach().std() > 1e-2):
        wrong.append(f"{what}: numbers {apart(a, b):.1e} of {b.detach().std():.1e}")
    mine, other = gradients(a, x, dict(module.named_parameters())), gradients(b, y, dict(library.named_parameters()))
    largest = max(float(g.abs().max()) for g in other.values())
    for name in sorted(other.keys() | mine.keys()):
        if name not in mine or name not in other:
            wrong.append(f"{what}: {name} has a gradient in one of the two")
        elif not apart(mine[name].flatten(), other[name].flatten()) < 1e-5 * largest:
            off = apart(mine[name].flatten(), other[name].flatten())
            wrong.append(f"{what}: gradient of {name} {off:.1e} of {largest:.1e}")
    rounded, rough = copy.deepcopy(module), copy.deepcopy(library)
    for parameter in (*rounded.parameters(), *rough.parameters()):  # not the positions that libraries keep in float32
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        found = [ours(rounded, given.bfloat16()).float(), theirs(rough, given.bfloat16()).float()]
        exact = theirs(rough.float(), given.bfloat16().float())
        off, allowed = (float((result - exact).norm() / exact.norm()) for result in found)
    if not off < 1.5 * allowed:
        wrong.append(f"{what}: bfloat16 {off:.1e}, the library's {allowed:.1e}")
    return wrong


def test_the_vision_tower_is_internvls() -> None:
    from reference import dressed, library_vision

    wrong: list[str] = []
    for name, config in CONFIGS.items():
        tower = spread(VisionTower(config.vision))
        theirs = dressed(library_vision(config.vision), tower.state_dict())
        for size in ((56, 56), (70, 70), (42, 98)):
            given = torch.randn(2, 3, *size)
            wrong += compare(
                f"{name} {size}", tower, theirs, given, plain, lambda net, x: net(x).last_hidden_state[:, 1:]
            )
    assert not wrong, "\n".join(wrong)


def test_the_projector_and_the_merging_of_patches_are_internvls() -> None:
    from transformers import InternVLConfig, InternVLModel
    from transformers.models.internvl import InternVLVisionConfig

    encoder = spread(Encoder(CONFIGS["tiny"]))
    v, t = CONFIGS["tiny"].vision, CONFIGS["tiny"].text
    theirs = InternVLModel(
        InternVLConfig(
            vision_config=InternVLVisionConfig(
                hidden_size=v.hidden_size, num_hidden_layers=v.num_layers, num_attention_heads=v.num_heads,
                intermediate_size=v.intermediate_size, image_size=(56, 56), patch_size=(14, 14), attention_bias=True,
                layer_norm_eps=v.norm_eps,
            ),
            text_config={"model_type": "qwen2", "hidden_size": t.hidden_size, "num_hidden_layers": 1, "vocab_size": 9},
            downsample_ratio=0.5, vision_feature_layer=-1, vision_feature_select_strategy="default",
        )
    ).eval()  # fmt: skip
    theirs.vision_tower.load_state_dict(encoder.vision_tower.state_dict())
    for name, i in {"layer_norm": 0, "linear_1": 1, "linear_2": 3}.items():
        getattr(theirs.multi_modal_projector, name).load_state_dict(encoder.projector[i].state_dict())
    with torch.no_grad():
        pixels = torch.randn(2, 3, 56, 56)
        expected = theirs.get_image_features(pixels).pooler_output
        assert apart(encoder(pixels), expected.reshape(2, 4, t.hidden_size)) < 1e-5


def test_the_language_model_is_qwen2_padded_on_either_side_and_with_a_cache() -> None:
    from reference import dressed, library_language

    wrong: list[str] = []
    masks = {
        "full": [[1] * 9, [1] * 9], "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
        "right": [[1] * 9, [1, 1, 1, 1, 1, 0, 0, 0, 0]],
    }  # fmt: skip
    for name, config in CONFIGS.items():
        mllm = spread(MLLM(config))
        net = mllm.language_model
        theirs = dressed(library_language(config.text), net.state_dict())
        for side, rows in masks.items():
            mask = torch.tensor(rows)
            valid = mask.bool()

            def ours(net: Any, x: Tensor, mask: Tensor = mask) -> Tensor:
                return net.lm_head(net.model(x, mask))[mask.bool()]

            def library(net: Any, x: Tensor, mask: Tensor = mask) -> Tensor:
                return net(inputs_embeds=x, attention_mask=mask, position_ids=positions(mask)).logits[mask.bool()]

            given = torch.randn(2, 9, config.text.hidden_size)
            wrong += compare(f"{name} {side}", net, theirs, given, ours, library)
            if side == "right":
                continue
            with torch.no_grad():  # piece by piece with a cache, the first of several tokens
                cache, pieces = KeyValueCache(), []
                for start, end in ((0, 4), (4, 6), (6, 7), (7, 9)):
                    pieces.append(net.model(given[:, start:end], mask[:, :end], cache))
                whole = theirs.model(inputs_embeds=given, attention_mask=mask, position_ids=positions(mask))
                off = apart(torch.cat(pieces, 1)[valid], whole.last_hidden_state[valid])
            if not off < 1e-5 * max(1.0, float(whole.last_hidden_state.abs().max())):
                wrong.append(f"{name} {side}: cached {off:.1e}")
    assert not wrong, "\n".join(wrong)


def test_the_connector_is_qwen2_looking_both_ways() -> None:
    from reference import dressed, library_language

    wrong: list[str] = []
    for name, config in CONFIGS.items():
        connector = spread(Connector(config))
        library = library_language(config.text, config.connector_layers).model
        own = {n: p for n, p in connector.state_dict().items() if not n.startswith("to_dit")}
        dressed(library, own | {"embed_tokens.weight": library.embed_tokens.weight.detach()})
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [1, 1, 0, 1, 1, 0, 0]])
        seen = visible(mask, causal=False)

        def theirs(net: Any, x: Tensor, mask: Tensor = mask, seen: Tensor = seen) -> Tensor:
            bias = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
            output = net(inputs_embeds=x, attention_mask=bias, position_ids=positions(mask), use_cache=False)
            return output.last_hidden_state[mask.bool()]

        def ours(net: Any, x: Tensor, mask: Tensor = mask) -> Tensor:
            return net.connect(x, mask)[mask.bool()]

        given = torch.randn(3, 7, config.text.hidden_size)
        wrong += compare(name, connector, library, given, ours, theirs)
        with torch.no_grad():
            changed = given.clone()
            changed[:, -1] += torch.randn(config.text.hidden_size)
            full = torch.ones_like(mask)
            moved = (connector(changed, full) - connector(given, full)).abs().amax(-1)[:, 0].min()
            if not moved > 1e-3:
                wrong.append(f"{name}: the first position does not see the last ({moved:.1e})")
    assert not wrong, "\n".join(wrong)


def test_the_dit_is_sana_with_positions_any_grid_masks_and_several_latents_of_a_condition() -> None:
    from reference import dressed, library_dit

    wrong: list[str] = []
    for name, config in CONFIGS.items():
        for scale in (config.dit.interpolation_scale, 2.0, None):
            dit = spread(DiT(config.replace(dit=dataclasses.replace(config.dit, interpolation_scale=scale))))
            theirs = dressed(library_dit(dit.transformer.d), dit.transformer.state_dict())
            for size, k in (((4, 4), 1), ((2, 5), 3), ((16, 3), 1)):
                b = 3
                condition = torch.randn(b, 9, config.dit.caption_channels)
                mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [1, 1, 1, 0, 0, 0, 1, 1, 1]])
                timestep = torch.tensor([999.0, 500.0, 1.0]).repeat_interleave(k) - torch.arange(k).repeat(b)

                def ours(net: Any, x: Tensor, t: Tensor = timestep, c: Tensor = condition, m: Tensor = mask) -> Tensor:
                    return net(x, t, c, m)

                def library(
                    net: Any, x: Tensor, t: Tensor = timestep, c: Tensor = condition, m: Tensor = mask, k: int = k
                ) -> Tensor:
                    rows = c.to(x.dtype).repeat_interleave(k, 0)
                    return net(x, rows, t, encoder_attention_mask=m.repeat_interleave(k, 0)).sample

                given = torch.randn(b * k, config.dit.latent_channels, *size)
                wrong += compare(f"{name} {scale} {size}", dit.transformer, theirs, given, ours, library)
    assert not wrong, "\n".join(wrong)


def test_the_decoder_is_dc_aes() -> None:
    from reference import dressed, library_decoder

    odd = ODD.decoder
    cases = {"tiny": preset("tiny").decoder, "pico": preset("pico").decoder}
    for kind in ("interpolate", "pixel_shuffle"):
        cases[f"odd {kind}"] = dataclasses.replace(odd, upsample_block_type=kind)
        cases[f"whole {kind}"] = dataclasses.replace(odd, upsample_block_type=kind, layers_per_block=(1,) * 6)
    wrong: list[str] = []
    for name, config in cases.items():
        decoder = spread(DCDecoder(config))
        theirs = dressed(library_decoder(config), decoder.state_dict())
        for size in ((1, 1), (3, 2)):
            given = torch.randn(2, config.latent_channels, *size)
            wrong += compare(f"{name} {size}", decoder, theirs, given, plain, plain)
    assert not wrong, "\n".join(wrong)


def library_scheduler(solver: str, shift: float, steps: int) -> Any:
    """The sampler of diffusers that the released models, or their users, take; at its first step."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    if solver == "euler":
        scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    else:
        kind = DPMSolverMultistepScheduler if solver == "dpm++" else UniPCMultistepScheduler
        flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        scheduler = kind(num_train_timesteps=1000, solver_order=2, **flow)
        scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)  # else it is looked up by timestep, which fails where two steps share one
    return scheduler


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_is_diffusers_step_by_step(solver: str) -> None:
    noise, wrong = torch.randn(2, 3, 2, 2), []

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.sin(x) + timestep / 1000

    for steps in (1, 2, 3, 5, 20, 50):
        for shift in (0.5, 1.0, 2.0, 3.0, 7.5):
            scheduler, states = library_scheduler(solver, shift, steps), []
            schedule = make_schedule(solver, shift, steps)
            sample(velocity, noise, schedule, lambda i, t, x, states=states: states.append((int(t), x)))
            x, worst = noise, 0.0
            for (ours, state), timestep in zip(states, scheduler.timesteps, strict=True):
                x = scheduler.step(velocity(x, timestep.long()), timestep, x, return_dict=False)[0]
                worst = max(worst, apart(state, x))
                if ours != int(timestep):
                    wrong.append(f"{steps} steps, shift {shift}: timestep {ours} for {int(timestep)}")
            if not worst < 1e-5 * max(1.0, float(x.abs().max())):
                wrong.append(f"{steps} steps, shift {shift}: {worst:.1e}")
    assert not wrong, "\n".join(wrong)


# --- what it stands on ------------------------------------------------------------------------------------------------


def imported(path: Path) -> list[tuple[str, str]]:
    """The modules and names that a file imports, wherever in it: (module, name or "")."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def test_the_method_is_short_and_imports_torch_alone() -> None:
    files = sorted((SOURCE / "method").glob("*.py"))
    allowed = {*sys.stdlib_module_names, "torch"}
    wrong = [
        f"{path.name}: {module}"
        for path in files
        for module, _ in imported(path)
        if module.split(".")[0] not in allowed and not module.startswith(("unilip.method.", "unilip.errors"))
    ]
    assert wrong == [] and len(files) > 9
    assert sum(len(path.read_text().splitlines()) for path in files) <= 1600


def test_no_private_name_of_a_library_is_imported() -> None:
    """Private: an underscore in it, or deep in a library's modules of single models."""
    wrong = [
        f"{path.relative_to(SOURCE)}: {module} {name}"
        for path in SOURCE.rglob("*.py")
        for module, name in imported(path)
        if module.split(".")[0] in ("transformers", "diffusers")
        and (any(part.startswith("_") for part in [*module.split("."), name]) or module.count(".") > 1)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_default_dtype_changes_nothing(tiny_folder: Path, picture: Callable[..., Any]) -> None:
    def everything() -> list[Any]:
        fresh, model = UniLIP.from_config(preset("tiny"), seed=3), UniLIP.from_pretrained(tiny_folder)
        found: list[Any] = [*fresh.state_dict().values()]
        options: dict[str, Any] = dict(num_inference_steps=3, generator=3, progress=False, output_type="latent")
        for solver in SOLVERS:
            found.append(model.generate(["a star", "a longer prompt"], solver=solver, **options).images)
        found.append(model.edit(picture(40, 30), "blue", **options).images)
        found.append(model.decode(found[-1], output_type="pt").images)
        found.append(model.reconstruct(picture(), output_type="pt").images)
        found.append(model.ask(picture(), "What?", max_new_tokens=5, temperature=1.0, generator=3))
        return found

    expected = everything()
    torch.set_default_dtype(torch.float64)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    same = [
        a == b if isinstance(a, str) else a.dtype == b.dtype == torch.float32 and torch.equal(a, b)
        for a, b in zip(found, expected, strict=True)
    ]
    assert all(same), [i for i, equal in enumerate(same) if not equal]
