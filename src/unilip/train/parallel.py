"""One model in several processes: each holds all of it (DDP), or a part of every layer (FSDP2).

Out: a module whose call runs a function of theirs with gradients kept in step. The model itself is not edited: what
trains keeps its names, its parameters become sharded tensors.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from unilip.method.qwen2 import Layers
from unilip.model import UniLIP
from unilip.recipes.record import FewSteps, Flow, Recipe, Reconstruct
from unilip.train import processes


class Whole(nn.Module):
    """Everything that a step uses, as one module, because what shares a model over processes wraps a module's call."""

    def __init__(self, model: UniLIP, heads: nn.ModuleDict) -> None:
        super().__init__()
        self.model, self.heads = model, heads

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def share(whole: Whole, recipe: Recipe) -> nn.Module:
    """Share the model as the recipe says; one process gets it back as it is."""
    if processes.world() == 1:
        return whole
    if recipe.parallel == "fsdp":
        return shard(whole, recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the argument has another name in later versions
        module = DistributedDataParallel(
            whole, broadcast_buffers=False, gradient_as_bucket_view=True,
            find_unused_parameters=some_are_unused(whole.model, recipe),
        )  # fmt: skip
    if recipe.reduce_dtype == "bfloat16":
        # by another name than torch's own, which it keeps for NCCL; gloo can do it, too
        module.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return module


def some_are_unused(model: UniLIP, recipe: Recipe) -> bool:
    """Whether weights that train get no gradient in a step: the queries, for instance, while answers are learned."""
    used: tuple[str, ...] = ()
    if isinstance(recipe.objective, Flow):
        if recipe.objective.lesson_steps or recipe.objective.repa:  # before the transformer, and after its likeness
            return True
        used = ("mllm.queries", "connector.", "dit.")
    elif isinstance(recipe.objective, Reconstruct):
        used = ("encoder.", "latent_head.", "pixel_decoder.")
    return not all(name.startswith(used) for name, p in model.named_parameters() if p.requires_grad)


def shard(whole: Whole, recipe: Recipe) -> nn.Module:
    """Shard every parameter over the processes (FSDP2): float32 masters, layers gathered in the run's precision."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = whole.model.device.type
    rough = recipe.dtype == "bfloat16" and not isinstance(recipe.objective, FewSteps)  # who takes small differences
    weights, gradients = torch.bfloat16 if rough else None, getattr(torch, recipe.reduce_dtype)
    policy = MixedPrecisionPolicy(weights, gradients, cast_forward_inputs=False)  # autocast does
    settings: dict[str, Any] = dict(mesh=init_device_mesh(device, (processes.world(),)), mp_policy=policy)
    for modules in units(whole.model):
        fully_shard(modules, **settings)
    # Sharded again after the forward pass, so that outside of a step every parameter is this process's own part.
    fully_shard(whole, reshard_after_forward=True, **settings)
    return whole


def stacks(model: UniLIP, parts: Iterable[str] = ("encoder", "mllm", "connector", "dit")) -> Iterator[Layers]:
    """Yield the lists of layers that are called one after the other, of the parts that there are."""
    for name in parts:
        if name in model.parts:
            yield from (module for module in model.get_submodule(name).modules() if isinstance(module, Layers))


def units(model: UniLIP) -> Iterator[list[nn.Module]]:
    """Yield what is gathered together: a layer, or the pixel decoder."""
    yield from ([layer] for layers in stacks(model) for layer in layers)
    if "pixel_decoder" in model.parts:
        yield [model.pixel_decoder.decoder]


def sharded(module: nn.Module) -> bool:
    """Whether the processes hold parts, so that all of them must take part in every call."""
    return processes.world() > 1 and not isinstance(module, DistributedDataParallel)


def accumulating(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Keep gradients at home until the last batch of a step; sharded ones are summed at once, to hold only a part."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else contextlib.nullcontext()


def average_adversary(adversary: nn.Module) -> None:
    """Average the second player's gradients and running means, which no module keeps in step."""
    found = [t.grad if isinstance(t, nn.Parameter) else t for t in adversary.state_dict(keep_vars=True).values()]
    tensors = [t for t in found if t is not None]
    if processes.world() > 1:
        flat = processes.mean_(torch.cat([t.detach().flatten().float() for t in tensors]))
        for tensor, value in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(value.view_as(tensor))


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; all processes must ask. Others come back as they are."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
