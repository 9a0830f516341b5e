"""Recipe -> model, objective, data and optimizers, checked against each other.

Parts start from what `init` names, each with the config that its weights were made for, or fresh. Nothing is loaded
loosely: a part that does not fit the others is an error that names its tensors.
"""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from unilip.checkpoints.hub import resolve
from unilip.checkpoints.infer import expected_shapes
from unilip.checkpoints.read import open_checkpoint
from unilip.checkpoints.tables import check_shapes
from unilip.checkpoints.tokenizer import load_tokenizer
from unilip.errors import ConfigError
from unilip.fewstep import add_embedder, few_config
from unilip.files import replacing
from unilip.method.config import UniLIPConfig
from unilip.method.connector import copy_from_llm
from unilip.method.dit import DiT
from unilip.method.model import PARTS
from unilip.method.qwen2 import Layers
from unilip.method.text import Processor
from unilip.model import UniLIP
from unilip.recipes.catalog import require_finished
from unilip.recipes.record import FewSteps, Optim, Recipe, Shrink, Understand
from unilip.sizes import preset, small_decoder
from unilip.train import processes
from unilip.train.adapters import add_adapter, is_adapter, reached
from unilip.train.batches import Batches, EmojiBatches
from unilip.train.cached import check_cache
from unilip.train.files import FileBatches
from unilip.train.objectives import Objective, make_objective, needed_parts
from unilip.train.parallel import stacks

BESIDE = ("autoencoder", "teacher")  # init names that are no part of the model: the objective loads them
FOLLOWS = {  # the fields of the config that belong to a part, and come with its weights
    "encoder": ("vision",),
    "latent_head": ("latent_head_blocks", "latent_mean", "latent_factor"),
    "pixel_decoder": ("decoder",),
    "mllm": ("text", "num_queries"),
    "connector": ("connector_layers", "condition", "substitute_features"),
    "dit": ("dit",),
}
Trained = dict[str, tuple[nn.Parameter, float]]


def build(recipe: Recipe, runs: Path) -> tuple[UniLIP, Objective, Batches]:
    """Build what a recipe names; what trains is marked by `requires_grad`. Batches are this process's share.

    Raises UniLIPError: a source is missing or unfinished, parts do not fit each other, or the data cannot be read.
    """
    sources = {parts[0]: locate(source, runs) for parts, source in parse_init(recipe) if parts[0] in BESIDE}
    model = build_model(recipe, runs, needed_parts(recipe.objective))
    batches = make_batches(processes.divided(recipe, processes.world()), model.config, model.processor)
    objective = make_objective(recipe, model, sources)
    model.requires_grad_(False)
    if recipe.adapter.rank:
        add_adapter(recipe, model)
    for parameter, _ in trained_parameters(recipe, model).values():
        parameter.requires_grad_(True)
    if recipe.data.cache:
        check_cache(recipe, model, objective)
    return model, objective, batches


def make_batches(recipe: Recipe, config: UniLIPConfig, processor: Processor | None) -> Batches:
    """Open a recipe's data."""
    batches = {"emoji": EmojiBatches, "files": FileBatches}[recipe.data.source](recipe, config, processor)
    if isinstance(recipe.objective, Understand) and recipe.objective.words:
        _ = batches.word_weights  # before loader workers fork: they share it
    return batches


def locate(source: str, runs: Path) -> str:
    """Return the path of an init source: a recipe's result under `runs`, "embedded", a path, or a hub id as it is."""
    if source == "embedded":
        return str(resolve(None))
    result = runs / source / "final"
    require_finished(source, runs)
    return str(result) if result.exists() else source


def adapter_base(recipe: Recipe, runs: Path, folder: Path) -> str:
    """Return what the adapter in a folder says of its model: "embedded", paths from there, or hub ids, with commas."""
    if [parts for parts, _ in parse_init(recipe)] != [("all",)]:
        return ",".join(recipe.init)
    source = parse_init(recipe)[0][1]
    found = Path(source if source == "embedded" else locate(source, runs)).expanduser()
    return os.path.relpath(found.resolve(), folder.resolve()) if found.exists() else source


def parse_init(recipe: Recipe) -> list[tuple[tuple[str, ...], str]]:
    """Split "encoder,mllm=pico/clip" into parts and source; "all" means every part that the source has."""
    pairs = []
    for text in recipe.init:
        names, sep, source = text.replace("{seed}", str(recipe.seed)).partition("=")
        parts = tuple(names.split(","))
        known = set(PARTS) if len(parts) > 1 else {*PARTS, *BESIDE, "all", "queries"}
        if not sep or not source or not set(parts) <= known:
            raise ConfigError(
                f"init {text!r} must be PART,PART=SOURCE with parts of {', '.join(PARTS)}, or one of all, "
                f"queries, {', '.join(BESIDE)} = SOURCE."
            )
        pairs.append((parts, source))
    return pairs


def build_model(recipe: Recipe, runs: Path, needed: Iterable[str]) -> UniLIP:
    """Build the recipe's model: parts that are needed or named in `init`; later sources win over earlier ones."""
    config = recipe_config(recipe)
    asked, changes, learned_joint = dict(recipe.config), dict[str, Any](), recipe.data.joint > 0
    loaded: dict[str, nn.Module] = {}
    tokenizer: Any = None
    queries: torch.Tensor | None = None
    for parts, source in parse_init(recipe):
        if parts[0] in BESIDE:
            continue
        opened = open_checkpoint(locate(source, runs))
        opened.require_plain("training needs plain weights")
        if parts == ("queries",):  # the learned queries alone
            queries = UniLIP.from_pretrained(opened.path, parts=("mllm",)).mllm.queries.detach()
            continue
        wanted = opened.parts if parts == ("all",) else parts
        other = UniLIP.from_pretrained(opened.path, parts=wanted)
        for part in wanted:
            loaded[part] = getattr(other, part)
            changes |= {name: getattr(other.config, name) for name in FOLLOWS[part]}
        learned_joint = learned_joint or ("dit" in wanted and other.config.sampling.joint)
        fresh_queries = "mllm.queries" in opened.absent or "num_queries" in asked  # new where `config` counts them
        if fresh_queries and "mllm" in wanted:
            old, generator = other.mllm.queries, torch.Generator().manual_seed(recipe.seed)
            drawn = torch.randn(1, config.num_queries, old.shape[-1], generator=generator)
            other.mllm.queries = nn.Parameter(drawn.to(old.dtype) * 0.02)  # small, and different from each other
            changes.pop("num_queries")
        if other.processor is not None and (tokenizer is None or "mllm" in wanted):
            tokenizer = other.processor.tokenizer
    config = config.replace(**(changes | asked))
    if learned_joint:
        config = config.replace(sampling=dataclasses.replace(config.sampling, joint=True))
    if isinstance(recipe.objective, Shrink):
        if not (full := [source for parts, source in parse_init(recipe) if parts == ("teacher",)]):
            raise ConfigError("A smaller decoder needs init teacher=SOURCE, the model with the full one.")
        theirs = open_checkpoint(locate(full[-1], runs)).config
        config = config.replace(dit=theirs.dit, decoder=small_decoder(theirs.decoder))
    if isinstance(recipe.objective, FewSteps):
        if "dit" in loaded and not config.dit.few_steps:
            add_embedder(cast(DiT, loaded["dit"]))
        config = few_config(config, recipe.objective.counts, guided=not recipe.objective.path)
    names = tuple(name for name in PARTS if name in loaded or name in needed)
    fresh = UniLIP.from_config(config, recipe.seed, [name for name in names if name not in loaded])
    model = UniLIP(config, parts=())
    model.parts = names
    for name in names:
        model.add_module(name, loaded[name] if name in loaded else getattr(fresh, name))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.text.tie_embeddings:
        shapes.pop("mllm.language_model.lm_head.weight", None)
    check_shapes(shapes, expected_shapes(config, names), f"{recipe.name}, put together from {', '.join(recipe.init)}:")
    if queries is not None:
        if "mllm" not in names or model.mllm.queries.shape != queries.shape:
            raise ConfigError(f"{recipe.name} has no place for queries of the shape {tuple(queries.shape)} in its LLM.")
        with torch.no_grad():
            model.mllm.queries.copy_(queries)
    if "connector" in names and "connector" not in loaded:
        copy_from_llm(model.connector, model.mllm)
    if tokenizer is not None:
        model.processor = Processor(tokenizer, config)
    elif recipe.data.source == "emoji":
        model.processor = world_processor(recipe.data.world, config, runs / recipe.folder / "tokenizer")
    return model.eval()


def recipe_config(recipe: Recipe) -> UniLIPConfig:
    """Return a preset's config, changed as the recipe says. Raises ConfigError: no such field, or no such value."""
    config = preset(recipe.model)
    known = {name: type(value) for name, value in vars(config).items() if isinstance(value, (int, str))}
    for name, value in recipe.config:
        if type(value) is not known.get(name):
            raise ConfigError(
                f"config changes {name} to {value!r}; allowed: "
                f"{', '.join(f'{field} ({kind.__name__})' for field, kind in known.items())}."
            )
    config = config.replace(**dict(recipe.config))
    if recipe.data.image_size:
        config = config.replace(image_size=recipe.data.image_size)
    few = recipe.objective if isinstance(recipe.objective, FewSteps) else None
    return few_config(config, few.counts, guided=not few.path) if few else config


def world_processor(world: str, config: UniLIPConfig, folder: Path) -> Processor:
    """Train (once) the tokenizer of an emoji world and open it."""
    from unilip.emoji.tokenizer import train_tokenizer
    from unilip.emoji.world import World

    folder = folder / f"{world}-{config.text.vocab_size}"  # a run that was begun anew may be of another world
    try:
        if not folder.exists():
            with replacing(folder) as temporary:
                train_tokenizer(World.preset(world), config.text.vocab_size, temporary)
    except OSError:
        if not folder.exists():  # else another training made it meanwhile, the same
            raise
    return Processor(load_tokenizer(folder), config)


def trained_parameters(recipe: Recipe, model: UniLIP) -> Trained:
    """Return name -> (parameter, learning-rate factor) of what trains, or its adapter; the longest prefix decides."""
    found: Trained = {}
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        prefixes, factor = reached(recipe, name)
        used.update(prefixes)
        if factor > 0 and (not recipe.adapter.rank or is_adapter(name)):
            found[name] = (parameter, factor)
    if unused := [prefix for prefix, _ in recipe.trains if prefix not in used]:
        raise ConfigError(f"{recipe.name} trains {', '.join(unused)}, which names nothing in {', '.join(model.parts)}.")
    return found


def make_optimizer(optim: Optim, parameters: Sequence[tuple[nn.Parameter, float]]) -> torch.optim.AdamW:
    """Fused AdamW, a group per (rate factor, decay); vectors are not decayed."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, factor in parameters:
        decay = optim.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    settings = [{"params": p, "weight_decay": d, "factor": f} for (f, d), p in groups.items()]
    return torch.optim.AdamW(settings, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)


PRODUCTS = (
    "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)  # fmt: skip


def keep_products(_: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    """Keep what is dear to compute, and recompute what lies between: sums, norms, gates, depthwise convolutions."""
    dear = operation.overloadpacket in {getattr(torch.ops.aten, name) for name in PRODUCTS}
    if operation.overloadpacket is torch.ops.aten.convolution and arguments[8] > 1:  # groups: each channel by itself
        dear = False
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def enable_checkpointing(model: UniLIP, selective: bool = False) -> None:
    """Recompute activations in the backward pass, layer by layer; SELECTIVE keeps matrix products and convolutions."""
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no layer draws random numbers
    if selective:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)

    def around(layer: nn.Module, *inputs: Any) -> torch.Tensor:
        return checkpoint(layer, *inputs, **how) if torch.is_grad_enabled() else layer(*inputs)

    frozen = "mllm" in model.parts and not any(p.requires_grad for p in model.mllm.language_model.parameters())
    for layers in stacks(model, [name for name in model.parts if name != "mllm" or selective or not frozen]):
        layers.around = around


def compile_layers(model: UniLIP, teacher: object = None) -> None:
    """Compile each layer by itself, once for all layers of a kind; names of weights stay as they are."""
    # A layer is too small to be split for DDP, and what does that has returned gradients that are no numbers.
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = 64  # each shape of picture, each length of path: beyond, it runs uncompiled
    for layers in [*stacks(model), *(teacher.modules() if isinstance(teacher, nn.Module) else ())]:
        if isinstance(layers, Layers):
            for layer in layers:
                layer.compile()
