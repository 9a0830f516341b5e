"""One step of the generation stages, two ways in one run: the straightforward one and ours; seconds, memory, gradients.

    python benchmarks/train.py --size 1b --fraction 6 --task generate
    python benchmarks/train.py --size 1b --fraction 6 --task generate --ours selective --straightforward recomputed
    python benchmarks/train.py --size 1b --task edit --device cuda --dtype bfloat16 --fraction 1

Straightforward: pictures are encoded in the step, and everything else is the libraries' (benchmarks/reference.py): the
frozen language model reads prompt and queries in one pass with gradients. With `--straightforward recomputed` every
layer is computed again in the backward pass, as the authors' scripts do.
Ours: what `unilip train` does from a cache of latents and features (`unilip data cache`): the prompt is read without
gradients into a key-value cache, so that the queries alone keep activations. `--ours selective` keeps results of
products and computes what lies between again (recipes: selective_checkpointing=1); recomputed is
gradient_checkpointing=1, compiled is compile=1.
Both see the same weights, prompts, latents and noise. `--fraction F` keeps one layer in F of every part, so that the
parts keep their proportions on a small machine. Memory is that of all tensors made in the forward pass that are still
there at its end, for the backward pass; with compiled layers, of those that autograd saves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from flops import counter
from reference import Reference
from torch import Tensor

from unilip import UniLIP, preset
from unilip.fast.mllm import read_in_two_passes
from unilip.method.config import UniLIPConfig
from unilip.method.flow import flow_loss, interpolate, train_levels
from unilip.method.text import Tokens
from unilip.train.build import compile_layers, enable_checkpointing
from unilip.train.preflight import Alive

PROMPT = 48  # tokens of a prompt: a caption of one or two sentences and the markers around it
TASKS = ("generate", "edit")


def reduced(config: UniLIPConfig, fraction: int) -> UniLIPConfig:
    """Keep one layer in `fraction` of each part."""

    def less(count: int) -> int:
        return max(1, round(count / fraction))

    return config.replace(
        vision=dataclasses.replace(config.vision, num_layers=less(config.vision.num_layers)),
        text=dataclasses.replace(config.text, num_layers=less(config.text.num_layers)),
        dit=dataclasses.replace(config.dit, num_layers=less(config.dit.num_layers)),
        connector_layers=less(config.connector_layers),
    )


def make_batch(
    model: UniLIP, task: str, size: int, words: int, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    """Random pictures and prompts of one task, and the noise that both ways add."""
    config = model.config
    side, tokens = config.image_size, config.grid**2
    length = words + (tokens if task == "edit" else 0)
    ids = torch.randint(0, config.text.vocab_size, (size, length), generator=generator)
    slots = torch.zeros(size, length, dtype=torch.bool)
    if task == "edit":
        slots[:, 4 : 4 + tokens] = True
    mask = torch.ones(size, length, dtype=torch.long)
    mask[0, : words // 4 if task == "generate" else 0] = 0  # prompts of different lengths
    latents = (size, config.dit.latent_channels, config.grid, config.grid)
    batch: dict[str, Any] = {
        "targets": torch.randn(size, 3, side, side, generator=generator),
        "sources": torch.randn(size, 3, side, side, generator=generator) if task == "edit" else None,
        "noise": torch.randn(latents, generator=generator),
        "levels": train_levels(torch.rand(size, generator=generator)),
    }
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    moved["levels"] = tuple(t.to(device) for t in batch["levels"])
    return moved | {"prompts": Tokens(ids, mask, slots).to(device)}


def straightforward(model: UniLIP, reference: Reference, batch: dict[str, Any]) -> Tensor:
    """Everything in the step, whole sequences with gradients."""
    with torch.no_grad():
        clean = model.to_latent(reference.encode(batch["targets"]))
        features = None if batch["sources"] is None else reference.encode(batch["sources"])
    condition, mask = reference.condition(batch["prompts"], features)
    timesteps, sigmas = batch["levels"]
    velocity = reference.transformer(
        interpolate(clean, batch["noise"], sigmas).to(condition.dtype), encoder_hidden_states=condition,
        timestep=timesteps, encoder_attention_mask=mask, return_dict=False,
    )[0]  # fmt: skip
    return flow_loss(velocity, clean, batch["noise"])


def ours(model: UniLIP, batch: dict[str, Any], clean: Tensor, features: Tensor | None) -> Tensor:
    """From ready latents and features, the prompt read once without gradients."""
    condition = model.condition(batch["prompts"], features, partial(read_in_two_passes, model.mllm))
    timesteps, sigmas = batch["levels"]
    velocity = model.dit(interpolate(clean, batch["noise"], sigmas).to(model.dtype), timesteps, *condition)
    return flow_loss(velocity, clean, batch["noise"])


def recompute_everything(reference: Reference) -> None:
    """Have the libraries compute every layer again in the backward pass."""
    for part in (reference.language, reference.connector):
        part.train().gradient_checkpointing_enable({"use_reentrant": False})
    reference.transformer.train().enable_gradient_checkpointing()


THEIRS: dict[str, Callable[[Reference], Any]] = {"kept": lambda _: None, "recomputed": recompute_everything}
OURS: dict[str, Callable[[UniLIP], Any]] = {
    "kept": lambda _: None,
    "selective": partial(enable_checkpointing, selective=True),
    "recomputed": enable_checkpointing,
    "compiled": compile_layers,
}


def kept_bytes(weights: set[int], loss: Callable[[], Tensor], compiled: bool) -> tuple[Tensor, int]:
    """Run a forward pass: the loss, and the bytes of what it made that is there at its end, for the backward pass.

    Inside compiled layers nobody sees what is made; then it is what autograd saves, each storage once, without weights.
    """
    if not compiled:
        with Alive() as alive:
            value = loss()
        return value, alive.now
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    return value, sum(kept.values())


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the two ways; alternate them, and take medians."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    model = UniLIP.from_config(reduced(preset(arguments.size), arguments.fraction)).to(device=device, dtype=dtype)
    reference = Reference(model)
    model.requires_grad_(False)
    reference.requires_grad_(False)
    model.mllm.queries.requires_grad_(True)
    for part in (model.connector, model.dit, reference.connector.layers, reference.connector.norm):
        part.requires_grad_(True)
    reference.transformer.requires_grad_(True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = {n: n.replace("dit.transformer", "transformer") for n in trained}
    of_library = dict(reference.named_parameters())
    trained_there = {n: of_library.get(names[n], p) for n, p in trained.items()}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    THEIRS[arguments.straightforward](reference)
    OURS[arguments.ours](model)
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(model, arguments.task, arguments.batch_size, arguments.prompt, device, generator)
    batch = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in batch.items()}
    with torch.no_grad():
        clean = model.to_latent(model.encoder(batch["targets"]))
        features = None if batch["sources"] is None else model.encoder(batch["sources"])
    ways: dict[str, Callable[[], Tensor]] = {
        "straightforward": lambda: straightforward(model, reference, batch),
        "ours": lambda: ours(model, batch, clean, features),
    }
    found: dict[str, Any] = {name: {"seconds": []} for name in ways}

    def forget() -> None:
        model.zero_grad(set_to_none=True)
        reference.zero_grad(set_to_none=True)

    kept: dict[str, dict[str, Tensor]] = {}
    for name, way in ways.items():  # also the warm-up
        compiled = name == "ours" and arguments.ours == "compiled"
        if compiled:
            way().backward()
            forget()
        loss, found[name]["kept_bytes"] = kept_bytes(weights, way, compiled)
        loss.backward()
        parameters = trained if name == "ours" else trained_there
        kept[name] = {n: p.grad.float().reshape(trained[n].shape) for n, p in parameters.items() if p.grad is not None}
        found[name]["loss"] = loss.item()
        forget()
    with counter() as counted:  # what is computed again counts again
        ways["straightforward"]().backward()
    found["flops"] = counted.get_total_flops()
    forget()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = clock()
            way().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
                found[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
            found[name]["seconds"].append(clock() - start)
            forget()
    a, b = kept.values()
    assert a.keys() == b.keys(), "the two ways do not train the same weights"
    # some gradients are zero but for rounding (a key's bias, say): these are measured against all of them
    least = 1e-4 * torch.stack([g.norm() for g in a.values()]).norm()
    found["gradient_difference"] = max(((a[k] - b[k]).norm() / a[k].norm().clamp(min=least)).item() for k in a)
    found["loss_difference"] = abs(found["straightforward"]["loss"] - found["ours"]["loss"])
    plain, fast = (statistics.median(found[name]["seconds"]) for name in ways)
    found["speed_ratio"] = plain / fast
    found["memory_ratio"] = found["ours"]["kept_bytes"] / found["straightforward"]["kept_bytes"]
    return found


def main() -> None:
    """Read the options, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1b", choices=("tiny", "pico", "nano", "1b", "3b"))
    parser.add_argument("--task", default="generate", choices=TASKS)
    parser.add_argument("--fraction", type=int, default=6, help="keep one layer in this many (6)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--straightforward", default="kept", choices=THEIRS, help="what it does with activations")
    parser.add_argument("--ours", default="kept", choices=OURS, help="what ours does with them")
    parser.add_argument("--prompt", type=int, default=PROMPT, help=f"tokens of a prompt ({PROMPT})")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine that others use too")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments)
    if arguments.json:
        print(json.dumps(vars(arguments) | found))
        return
    print(
        f"{arguments.size}, {arguments.task}, batch {arguments.batch_size}, {arguments.prompt} tokens, one layer in "
        f"{arguments.fraction}; straightforward {arguments.straightforward}, ours {arguments.ours}"
    )
    for name in ("straightforward", "ours"):
        seconds = statistics.median(found[name]["seconds"])
        kept_mib = found[name]["kept_bytes"] / 2**20
        print(f"{name:16} {seconds:8.3f} s  {kept_mib:9.1f} MiB kept  loss {found[name]['loss']:.6f}")
    print(
        f"{found['speed_ratio']:.2f} x as fast, {found['memory_ratio']:.2f} x the memory; largest relative difference"
    )
    print(f"of a gradient {found['gradient_difference']:.1e}, of the loss {found['loss_difference']:.1e}")


if __name__ == "__main__":
    main()
