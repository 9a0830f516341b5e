"""Other people's checkpoints <-> ours: one table of names per source, and configs that follow from what is there.

In:  tensor names and shapes of a source, its config, configs lying beside it. No tensor data passes through here.
Out: for each of our tensors the source tensor (and which part of it), for each tensor left out the reason, and a
     `UniLIPConfig`. Everything is strict: a name is used, named as dropped, or an error. `authors_*` is the way back.

A table row pairs a template of their names with ours. `{i}` is a number, `{p}` weight or bias, `{rest}` anything;
several names of ours share one tensor of theirs, stacked along its first dimension (fused query, key, value).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unilip.config import (
    DecoderConfig,
    DiTConfig,
    SamplingConfig,
    TextConfig,
    UniLIPConfig,
    VisionConfig,
    preset,
)
from unilip.connector import Connector
from unilip.decoder import LatentHead, PixelDecoder
from unilip.dit import DiT
from unilip.encoder import Encoder
from unilip.errors import CheckpointError, ConfigError
from unilip.mllm import MLLM

Shape = tuple[int, ...]
Json = Mapping[str, Any]

PART_CLASSES: dict[str, type[nn.Module]] = {
    "encoder": Encoder,
    "latent_head": LatentHead,
    "pixel_decoder": PixelDecoder,
    "mllm": MLLM,
    "connector": Connector,
    "dit": DiT,
}
QUERIES = "mllm.queries"
EMBEDDING = "mllm.language_model.model.embed_tokens.weight"
HEAD = "mllm.language_model.lm_head.weight"


# --- tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One row of a table: a template of their names and ours; no name of ours means dropped, for `reason`."""

    theirs: str
    ours: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Origin:
    """Where one of our tensors comes from: part `part` of `parts` equal pieces (first dimension) of tensor `name`."""

    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Mapped:
    """Names of a source put into ours; `dropped` gives the reason for every tensor left out."""

    origins: dict[str, Origin]
    dropped: dict[str, str]


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: what it is, its table, the parts that it holds and our tensors that it never has."""

    title: str
    rules: tuple[Rule, ...]
    parts: tuple[str, ...]
    absent: tuple[str, ...] = ()


def _pair(theirs: str, *ours: str) -> Rule:
    return Rule(theirs, ours)


def _drop(theirs: str, reason: str) -> Rule:
    return Rule(theirs, (), reason)


def _original_vit(theirs: str) -> tuple[Rule, ...]:
    """InternViT under its original names, with query, key and value fused."""
    ours, layer = "encoder.vision_tower.embeddings", "encoder.vision_tower.encoder.layer.{i}"
    return (
        _pair(f"{theirs}.embeddings.class_embedding", f"{ours}.cls_token"),
        _pair(f"{theirs}.embeddings.position_embedding", f"{ours}.position_embeddings"),
        _pair(f"{theirs}.embeddings.patch_embedding.{{p}}", f"{ours}.patch_embeddings.projection.{{p}}"),
        _pair(
            f"{theirs}.encoder.layers.{{i}}.attn.qkv.{{p}}",
            *(f"{layer}.attention.{x}_proj.{{p}}" for x in ("q", "k", "v")),
        ),
        _pair(f"{theirs}.encoder.layers.{{i}}.attn.proj.{{p}}", f"{layer}.attention.projection_layer.{{p}}"),
        _pair(f"{theirs}.encoder.layers.{{i}}.ls1", f"{layer}.lambda_1"),
        _pair(f"{theirs}.encoder.layers.{{i}}.ls2", f"{layer}.lambda_2"),
        _pair(f"{theirs}.encoder.layers.{{i}}.norm1.{{p}}", f"{layer}.layernorm_before.{{p}}"),
        _pair(f"{theirs}.encoder.layers.{{i}}.norm2.{{p}}", f"{layer}.layernorm_after.{{p}}"),
        _pair(f"{theirs}.encoder.layers.{{i}}.mlp.{{rest}}", f"{layer}.mlp.{{rest}}"),
    )


def _internvl(prefix: str) -> tuple[Rule, ...]:
    """InternVL under transformers' names, which gained a prefix and lost inner ones over its versions."""
    return (
        _drop(f"{prefix}vision_tower.embeddings.mask_token", "used by masked pre-training only"),
        _pair(f"{prefix}vision_tower.{{rest}}", "encoder.vision_tower.{rest}"),
        _pair(f"{prefix}multi_modal_projector.layer_norm.{{p}}", "encoder.projector.0.{p}"),
        _pair(f"{prefix}multi_modal_projector.linear_1.{{p}}", "encoder.projector.1.{p}"),
        _pair(f"{prefix}multi_modal_projector.linear_2.{{p}}", "encoder.projector.3.{p}"),
        _pair(f"{prefix}language_model.lm_head.weight", HEAD),
        _pair(f"{prefix}language_model.model.{{rest}}", "mllm.language_model.model.{rest}"),
        _pair(f"{prefix}language_model.{{rest}}", "mllm.language_model.model.{rest}"),
    )


_ROTARY = _drop("{rest}.rotary_emb.inv_freq", "a constant that is computed from the config")

_AUTHORS_BODY = (
    _ROTARY,
    _pair("model.latent_queries", QUERIES),
    *_original_vit("model.vision_tower"),
    _pair("model.multi_modal_projector.{rest}", "encoder.projector.{rest}"),
    _pair("model.language_model.{rest}", "mllm.language_model.model.{rest}"),
    _pair("lm_head.weight", HEAD),
    _pair("model.llm_connector.layers.{rest}", "connector.layers.{rest}"),
    _pair("model.llm_connector.norm.{rest}", "connector.norm.{rest}"),
    _pair("model.projector.{p}", "connector.to_dit.{p}"),
    _pair("model.dit.{rest}", "dit.transformer.{rest}"),
)

KINDS: dict[str, Kind] = {
    "unilip": Kind(
        "UniLIP, this package's own format",
        tuple(_pair(f"{part}.{{rest}}", f"{part}.{{rest}}") for part in PART_CLASSES),
        tuple(PART_CLASSES),
    ),
    "authors": Kind(
        "UniLIP as released by its authors (unilip_internvl)",
        (
            *_AUTHORS_BODY,
            _pair("model.vae_decoder.decoder.{rest}", "pixel_decoder.decoder.{rest}"),
            _pair("model.vae_decoder.down_blocks.{i}.mlp.{rest}", "latent_head.blocks.{i}.mlp.{rest}"),
            _pair("model.vae_decoder.down_mlp.{rest}", "latent_head.out.{rest}"),
        ),
        tuple(PART_CLASSES),
    ),
    "authors-stage1": Kind(
        "UniLIP after the authors' first generation stage (unilip_vae_internvl)",
        (
            *_AUTHORS_BODY,
            _pair("model.dcae.decoder.{rest}", "pixel_decoder.decoder.{rest}"),
            _drop("model.dcae.encoder.{rest}", "the DC-AE encoder: training targets only, no part of UniLIP"),
        ),
        ("encoder", "pixel_decoder", "mllm", "connector", "dit"),
    ),
    "tokenizer": Kind(
        "UniLIP tokenizer (*_unilip.pth)",
        (
            *_original_vit("encoder"),
            _pair("mlp1.{rest}", "encoder.projector.{rest}"),
            _pair("down_blocks.{i}.mlp.{rest}", "latent_head.blocks.{i}.mlp.{rest}"),
            _pair("down_mlp.{rest}", "latent_head.out.{rest}"),
            _pair("decoder.{rest}", "pixel_decoder.decoder.{rest}"),
            _drop("regressor.{rest}", "a training head that the authors' own loader deletes too"),
        ),
        ("encoder", "latent_head", "pixel_decoder"),
    ),
    "internvl": Kind(
        "InternVL3 in transformers' format (OpenGVLab/InternVL3-*-hf)",
        (_ROTARY, *_internvl(""), *_internvl("model."), _pair("lm_head.weight", HEAD)),
        ("encoder", "mllm"),
        (QUERIES,),
    ),
    "dcae": Kind(
        "DC-AE in diffusers' format (AutoencoderDC)",
        (
            _pair("decoder.{rest}", "pixel_decoder.decoder.{rest}"),
            _drop("encoder.{rest}", "the DC-AE encoder: training targets only, no part of UniLIP"),
        ),
        ("pixel_decoder",),
    ),
    "sana": Kind(
        "SANA in diffusers' format (SanaTransformer2DModel)",
        (_pair("{rest}", "dit.transformer.{rest}"),),
        ("dit",),
    ),
}

_PLACEHOLDERS = {"i": r"\d+", "p": "weight|bias", "rest": ".+"}


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    text = "".join(f"(?P<{s}>{_PLACEHOLDERS[s]})" if n % 2 else re.escape(s) for n, s in enumerate(pieces))
    return re.compile(text)


def map_names(kind: str, names: Iterable[str]) -> Mapped:
    """Put the names of a source into ours.

    Raises:
        CheckpointError: a name that the table does not know, or two names for one tensor.
    """
    rules = KINDS[kind].rules
    origins: dict[str, Origin] = {}
    dropped: dict[str, str] = {}
    unknown = []
    for name in names:
        for rule in rules:
            match = _pattern(rule.theirs).fullmatch(name)
            if match is None:
                continue
            if not rule.ours:
                dropped[name] = rule.reason
            for part, template in enumerate(rule.ours):
                ours = template.format(**match.groupdict())
                if ours in origins:
                    raise CheckpointError(f"The checkpoint holds {ours} twice: as {origins[ours].name} and as {name}.")
                origins[ours] = Origin(name, part, len(rule.ours))
            break
        else:
            unknown.append(name)
    if unknown:
        what = _several(unknown, "tensor")
        raise CheckpointError(f"{what} not known in a checkpoint of kind {kind!r} ({KINDS[kind].title}).")
    return Mapped(origins, dropped)


def unmap_names(kind: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the way back: each of their names with the names of ours that are stacked in it.

    Raises:
        CheckpointError: a tensor of ours has no place there, or one of several to be stacked is missing.
    """
    rules = [rule for rule in KINDS[kind].rules if rule.ours]
    found: dict[str, list[str | None]] = {}
    for name in names:
        for rule in rules:
            places = ((part, _pattern(template).fullmatch(name)) for part, template in enumerate(rule.ours))
            part, match = next(((part, match) for part, match in places if match), (0, None))
            if match is None:
                continue
            theirs = rule.theirs.format(**match.groupdict())
            found.setdefault(theirs, [None] * len(rule.ours))[part] = name
            break
        else:
            raise CheckpointError(f"{name} has no place in a checkpoint of kind {kind!r} ({KINDS[kind].title}).")
    for theirs, group in found.items():
        if None in group:
            there = _list([n for n in group if n])
            raise CheckpointError(f"{theirs} needs {len(group)} tensors, of which only {there} exist.")
    return {theirs: tuple(n for n in group if n is not None) for theirs, group in found.items()}


# --- strictness -----------------------------------------------------------------------------------------------------


class Unmade(TorchFunctionMode):
    """Modules built within it have names and shapes, but no weights: these are on the meta device, and not drawn.

    What is small and computed, such as positions, stays real: torch has no quick way to pretend to compute.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass everything on but the reservation and the initialisation of weights."""
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **{**kwargs, "device": "meta"})
        name = getattr(func, "__name__", "")
        if name.endswith("_") and name in vars(nn.init):
            return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return func(*args, **kwargs)


def expected_shapes(config: UniLIPConfig, parts: Sequence[str]) -> dict[str, Shape]:
    """Return names and shapes of every tensor that a checkpoint of this config must hold (tied ones once)."""
    shapes: dict[str, Shape] = {}
    with Unmade():
        for part in parts:
            state = PART_CLASSES[part](config).state_dict()
            shapes |= {f"{part}.{name}": tuple(value.shape) for name, value in state.items()}
    if config.text.tie_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def check_shapes(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str, absent: Sequence[str] = ()
) -> None:
    """Compare names and shapes in both directions; `absent` may be missing.

    Raises:
        CheckpointError: missing or unexpected tensors, or other shapes; names the first few and how many.
    """
    missing = [name for name in expected if name not in found and name not in absent]
    unexpected = [name for name in found if name not in expected]
    differing = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = []
    if missing:
        problems.append(f"{_several(missing, 'tensor')} missing")
    if unexpected:
        problems.append(f"{_several(unexpected, 'tensor')} unexpected")
    if differing:
        problems.append(f"{_several(differing, 'tensor')} of another shape")
    if problems:
        raise CheckpointError(f"{where} does not fit its config: {'; '.join(problems)}.")


def _list(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _several(names: Sequence[str], noun: str) -> str:
    one = len(names) == 1
    return f"{len(names)} {noun}{'' if one else 's'} ({_list(names)}) {'is' if one else 'are'}"


# --- configs: theirs -> ours ----------------------------------------------------------------------------------------

_SANA_SIZES = {"600M": DiTConfig(), "1600M": preset("3b").dit}
_SANA_NAME = re.compile(r"sana.*?_(600M|1600M)(?:_(\d+)px)?", re.IGNORECASE)


def infer_config(
    kind: str, data: Json, shapes: Mapping[str, Shape], beside: Mapping[str, Json], name: str = ""
) -> UniLIPConfig:
    """Work out our config of another kind of checkpoint.

    Args:
        kind: one of `KINDS` but "unilip".
        data: its own config.json; empty where there is none.
        shapes: its tensors under *our* names.
        beside: JSON files lying beside it, by file name (dit_config.json, vae_config.json, scheduler_config.json).
        name: what to call the model when it is not one of the released sizes.

    Raises:
        CheckpointError: the shapes leave something open; says which file to put there.
    """
    try:
        return _infer(kind, data, shapes, beside, name)
    except KeyError as error:
        raise CheckpointError(f"The checkpoint lacks {error.args[0]}, which its config follows from.") from error
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"The checkpoint's configuration makes no sense: {error}") from error


def _infer(kind: str, data: Json, shapes: Mapping[str, Shape], beside: Mapping[str, Json], name: str) -> UniLIPConfig:
    parts = KINDS[kind].parts
    changes: dict[str, Any] = {}
    base = UniLIPConfig()
    if "encoder" in parts:
        width = shapes["encoder.projector.3.weight"][0]
        base = next((preset(n) for n in ("1b", "3b") if preset(n).text.hidden_size == width), base)
        changes["vision"] = _vision(data.get("vision_config", {}), shapes)
        changes["image_size"] = changes["vision"].image_size
    if "mllm" in parts:
        text = _text(data, shapes)
        changes["text"] = text
        changes["connector_layers"] = min(base.connector_layers, text.num_layers)
    elif "encoder" in parts and base.text.hidden_size != width:
        raise CheckpointError(
            f"The tokenizer's width {width} is not a released one (896, 1536); put the config.json of its model, in "
            "this package's own format, beside it."
        )
    if QUERIES in shapes:
        changes["num_queries"] = shapes[QUERIES][1]
    if "connector" in parts:
        changes["connector_layers"] = _count(shapes, "connector.layers.")
    if "latent_head" in parts:
        changes["latent_head_blocks"] = _count(shapes, "latent_head.blocks.")
    if "pixel_decoder" in parts:
        changes["decoder"] = _decoder(data if kind == "dcae" else beside.get("vae_config.json", {}), shapes)
        base = base.replace(dit=replace(base.dit, latent_channels=changes["decoder"].latent_channels))
    if "dit" in parts:
        changes["dit"] = _dit(kind, data, shapes, beside)
        if "decoder" not in changes:
            changes["decoder"] = replace(base.decoder, latent_channels=changes["dit"].latent_channels)
        if "encoder" not in parts:
            changes["image_size"] = changes["dit"].sample_size * 28
    elif "decoder" in changes:
        changes["dit"] = base.dit
    changes["latent_factor"] = _factor(kind, data, beside, base)
    if "scheduler_config.json" in beside:
        changes["sampling"] = _sampling(beside["scheduler_config.json"])
    config = base.replace(**changes)
    for size in ("1b", "3b"):
        if "encoder" in parts and config.text.hidden_size == preset(size).text.hidden_size:
            name = size
    return config.replace(name=name or kind)


def _count(shapes: Mapping[str, Shape], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _vision(data: Json, shapes: Mapping[str, Shape]) -> VisionConfig:
    if data.get("norm_type", "layer_norm") != "layer_norm" or data.get("use_qk_norm", False):
        raise CheckpointError("Its vision encoder has other norms than InternViT-300M; use InternVL3-1B or 2B.")
    root = "encoder.vision_tower"
    _, positions, width = shapes[f"{root}.embeddings.position_embeddings"]
    patch = shapes[f"{root}.embeddings.patch_embeddings.projection.weight"][-1]
    heads = data.get("num_attention_heads", 16 if width == 1024 else None)
    if heads is None:
        raise CheckpointError(
            f"The number of heads of a vision encoder {width} wide does not follow from its tensors; put the "
            "config.json of its model beside it."
        )
    return VisionConfig(
        hidden_size=width,
        num_layers=_count(shapes, f"{root}.encoder.layer."),
        num_heads=heads,
        intermediate_size=shapes[f"{root}.encoder.layer.0.mlp.fc1.weight"][0],
        image_size=isqrt(positions - 1) * patch,
        patch_size=patch,
        layer_scale_init=data.get("layer_scale_init_value", 0.1),
        norm_eps=data.get("layer_norm_eps", 1e-6),
    )


def _text(data: Json, shapes: Mapping[str, Shape]) -> TextConfig:
    text: Json = data.get("text_config", {})
    if text.get("model_type", "qwen2") != "qwen2":
        raise CheckpointError(f"Its language model is {text['model_type']!r}, not Qwen2; use InternVL3-1B or 2B.")
    layer = "mllm.language_model.model.layers"
    for needed in ("num_attention_heads", "num_key_value_heads"):
        if needed not in text:
            raise CheckpointError(f"Its config.json has no text_config.{needed}; copy the original config.json there.")
    rope: Json = text.get("rope_parameters") or text.get("rope_scaling") or {}
    # "dynamic" changes nothing up to max_position_embeddings, and no longer sequence is ever read here
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "dynamic"):
        raise CheckpointError(f"Its position embedding {rope.get('rope_type', rope.get('type'))!r} is not supported.")
    vocabulary, width = shapes[EMBEDDING]
    return TextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=_count(shapes, f"{layer}."),
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        intermediate_size=shapes[f"{layer}.0.mlp.gate_proj.weight"][0],
        rope_theta=float(text.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        max_positions=text.get("max_position_embeddings", 32768),
        norm_eps=text.get("rms_norm_eps", 1e-6),
        tie_embeddings=HEAD not in shapes,
    )


def _decoder(data: Json, shapes: Mapping[str, Shape]) -> DecoderConfig:
    """Everything about the decoder follows from its shapes; its config only says whether it is of the known make."""
    known = {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "decoder_conv_act_fn": "relu"}
    for field, value in known.items():
        given = data.get(field, value)
        if {given} != {value} if isinstance(given, str) else set(given) != {value}:
            raise CheckpointError(f"The DC-AE config has {field} {given!r}; only {value!r} is supported.")
    root = "pixel_decoder.decoder"
    conv_in = shapes[f"{root}.conv_in.weight"]
    channels: list[int] = [0] * 6
    layers: list[int] = [0] * 6
    types = ["ResBlock"] * 6
    scales: list[tuple[int, ...]] = [()] * 6
    head_dim = data.get("attention_head_dim", 32)
    pixel_shuffle = False
    for level in range(5, -1, -1):
        prefix = f"{root}.up_blocks.{level}."
        first = 0 if level == 5 else 1  # every other scale opens with its upsampling convolution
        layers[level] = max(0, _count(shapes, prefix) - first)
        block = f"{prefix}{first}."
        if layers[level] == 0:
            continue
        if f"{block}attn.to_q.weight" in shapes:
            types[level] = "EfficientViTBlock"
            channels[level] = shapes[f"{block}attn.to_out.weight"][0]
            convolutions = _count(shapes, f"{block}attn.to_qkv_multiscale.")
            names = [f"{block}attn.to_qkv_multiscale.{n}" for n in range(convolutions)]
            scales[level] = tuple(shapes[f"{n}.proj_in.weight"][-1] for n in names)
            head_dim = shapes[f"{names[0]}.proj_out.weight"][1] if names else head_dim
        else:
            channels[level] = shapes[f"{block}conv1.weight"][0]
        if first:
            pixel_shuffle = shapes[f"{prefix}0.conv.weight"][0] == 4 * channels[level]
    if 0 in layers[1:]:
        raise CheckpointError("The DC-AE decoder has an empty scale other than the finest, which is not supported.")
    if not layers[0]:
        pixel_shuffle = shapes[f"{root}.conv_out.conv.weight"][0] == 12
        channels[0] = _side(data.get("decoder_block_out_channels", [channels[1]]))
    return DecoderConfig(
        block_out_channels=tuple(channels),
        layers_per_block=tuple(layers),
        block_types=tuple(types),
        qkv_multiscales=tuple(scales),
        attention_head_dim=head_dim,
        latent_channels=conv_in[1],
        upsample_block_type="pixel_shuffle" if pixel_shuffle else "interpolate",
    )


def _dit(kind: str, data: Json, shapes: Mapping[str, Shape], beside: Mapping[str, Json]) -> DiTConfig:
    root = "dit.transformer"
    width = shapes[f"{root}.scale_shift_table"][1]
    shaped: dict[str, Any] = dict(
        num_layers=_count(shapes, f"{root}.transformer_blocks."),
        caption_channels=shapes[f"{root}.caption_projection.linear_1.weight"][1],
        mlp_ratio=shapes[f"{root}.transformer_blocks.0.ff.conv_inverted.weight"][0] / (2 * width),
        latent_channels=shapes[f"{root}.patch_embed.proj.weight"][1],
    )
    given: Json | None = data if kind == "sana" else beside.get("dit_config.json")
    if given is not None:
        heads = (
            "num_attention_heads", "attention_head_dim", "num_cross_attention_heads", "cross_attention_head_dim",
            "sample_size",
        )  # fmt: skip
        lacking = [field for field in heads if given.get(field) is None]
        if lacking:
            raise CheckpointError(f"The SANA config lacks {_list(lacking)}; use that of SANA's transformer folder.")
        if given.get("guidance_embeds") or given.get("qk_norm") or given.get("patch_size", 1) != 1:
            raise CheckpointError(
                "Its diffusion transformer is a later SANA, with guidance embedding, norms or patches."
            )
        config = DiTConfig(
            num_heads=given["num_attention_heads"],
            head_dim=given["attention_head_dim"],
            num_cross_heads=given["num_cross_attention_heads"],
            cross_head_dim=given["cross_attention_head_dim"],
            sample_size=given["sample_size"],
            interpolation_scale=given.get("interpolation_scale"),
            **shaped,
        )
    else:
        match = _SANA_NAME.search(str(data.get("dit_path", "")))
        known = _SANA_SIZES[match[1].upper()] if match else None
        if match is None or known is None or (known.hidden_size, known.num_layers) != (width, shaped["num_layers"]):
            raise CheckpointError(
                f"The heads of a diffusion transformer {width} wide with {shaped['num_layers']} layers do not follow "
                f"from its tensors, and dit_path {data.get('dit_path')!r} names no known SANA of that size. Put the "
                "config.json of SANA's transformer folder beside the checkpoint, under the name dit_config.json."
            )
        config = replace(known, sample_size=int(match[2] or 512) // 32, interpolation_scale=None, **shaped)
    if kind != "sana" and config.interpolation_scale is None:
        # The authors' library read None as this number, so every weight of theirs was trained with the embedding.
        config = replace(config, interpolation_scale=float(max(config.sample_size // 64, 1)))
    return config


def _factor(kind: str, data: Json, beside: Mapping[str, Json], base: UniLIPConfig) -> float:
    if kind == "authors":
        if "unilip_factor" not in data:
            raise CheckpointError("Its config.json has no unilip_factor (10.6 in the 1B release, 9.5 in 3B); add it.")
        return float(data["unilip_factor"])
    if kind == "authors-stage1":
        return float(beside.get("vae_config.json", {}).get("scaling_factor", 0.41407))
    if kind == "dcae":
        return float(data.get("scaling_factor", 1.0))
    return float(data.get("unilip_factor", base.latent_factor))


def _sampling(data: Json) -> SamplingConfig:
    solver = {"DPMSolverMultistepScheduler": "dpm++", "FlowMatchEulerDiscreteScheduler": "euler"}.get(
        str(data.get("_class_name", "DPMSolverMultistepScheduler"))
    )
    dpm = {
        "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "final_sigmas_type": "zero",
        "lower_order_final": True, "euler_at_final": False, "thresholding": False, "use_karras_sigmas": False,
        "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
    }  # fmt: skip
    wrong = [f"{k} {data[k]!r}" for k, v in dpm.items() if solver == "dpm++" and k in data and data[k] != v]
    if solver is None or wrong:
        what = _list(wrong) or data.get("_class_name")
        raise CheckpointError(f"The sampler in scheduler_config.json is not known ({what}); remove the file.")
    return SamplingConfig(flow_shift=float(data.get("flow_shift", data.get("shift", 3.0))), solver=solver)


# --- configs: ours -> theirs ----------------------------------------------------------------------------------------


def authors_configs(config: UniLIPConfig, image_token_id: int | None = None) -> dict[str, dict[str, Any]]:
    """Return config.json and the configs beside it, by file name, of the authors' format.

    Raises:
        CheckpointError: the model has something that their format cannot say.
    """
    v, t, d, c = config.vision, config.text, config.dit, config.decoder
    if d.interpolation_scale is None:
        raise CheckpointError(
            "The authors' format always means a DiT with a position embedding, and this model has none "
            "(dit.interpolation_scale is None); keep it in this package's own format."
        )
    if config.condition != "dual" or not config.substitute_features:
        raise CheckpointError(
            f"The authors' format always means the dual condition with substituted features, and this model has "
            f"condition {config.condition!r}, substitute_features {config.substitute_features}; keep it in this "
            "package's own format."
        )
    if config.latent_mean != 0.0 or isinstance(config.latent_factor, tuple):
        raise CheckpointError(
            "The authors' format has one factor for all latent channels and no mean; this model more."
        )
    large = t.hidden_size > 1000
    hub = "OpenGVLab/InternVL3-2B" if large else "OpenGVLab/InternVL3-1B"
    main: dict[str, Any] = {
        "architectures": ["UniLIP_InternVLForCausalLM"],
        "model_type": "unilip_internvl",
        "connect_layer": config.connector_layers,
        "n_query": config.num_queries,
        "unilip_factor": config.latent_factor,
        "mllm_path": hub,
        "mllm_hf_path": f"{hub}-hf",
        "vae_path": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
        "dit_path": f"Efficient-Large-Model/Sana_{'1600M' if large else '600M'}_512px_diffusers",
        "downsample_ratio": 0.5,
        "hidden_size": t.hidden_size,
        "image_seq_length": config.num_image_tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": t.tie_embeddings,
        "text_config": {
            "model_type": "qwen2",
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": t.hidden_size,
            "intermediate_size": t.intermediate_size,
            "max_position_embeddings": t.max_positions,
            "num_attention_heads": t.num_heads,
            "num_hidden_layers": t.num_layers,
            "num_key_value_heads": t.num_kv_heads,
            "rms_norm_eps": t.norm_eps,
            "rope_scaling": None,
            "rope_theta": t.rope_theta,
            "tie_word_embeddings": t.tie_embeddings,
            "use_sliding_window": False,
            "vocab_size": t.vocab_size,
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "attention_bias": True,
            "hidden_act": "gelu",
            "hidden_size": v.hidden_size,
            "image_size": [v.image_size, v.image_size],
            "intermediate_size": v.intermediate_size,
            "layer_norm_eps": v.norm_eps,
            "layer_scale_init_value": v.layer_scale_init,
            "norm_type": "layer_norm",
            "num_attention_heads": v.num_heads,
            "num_channels": 3,
            "num_hidden_layers": v.num_layers,
            "patch_size": [v.patch_size, v.patch_size],
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": False,
        },
    }
    if image_token_id is not None:
        main["image_token_id"] = image_token_id
    dit = {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": d.latent_channels,
        "out_channels": d.latent_channels,
        "num_attention_heads": d.num_heads,
        "attention_head_dim": d.head_dim,
        "num_layers": d.num_layers,
        "num_cross_attention_heads": d.num_cross_heads,
        "cross_attention_head_dim": d.cross_head_dim,
        "cross_attention_dim": d.hidden_size,
        "caption_channels": d.caption_channels,
        "mlp_ratio": d.mlp_ratio,
        "sample_size": d.sample_size,
        "patch_size": 1,
        "interpolation_scale": d.interpolation_scale,
    }
    halves = {
        "block_types": list(c.block_types),
        "block_out_channels": list(c.block_out_channels),
        "layers_per_block": list(c.layers_per_block),
        "qkv_multiscales": [list(scales) for scales in c.qkv_multiscales],
    }
    vae = {
        "_class_name": "AutoencoderDC",
        "in_channels": 3,
        "latent_channels": c.latent_channels,
        "attention_head_dim": c.attention_head_dim,
        **{f"{half}_{field}": value for half in ("encoder", "decoder") for field, value in halves.items()},
        "upsample_block_type": c.upsample_block_type,
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.41407,
    }
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": 1000,
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": config.sampling.flow_shift,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
    }
    return {"config.json": main, "dit_config.json": dit, "vae_config.json": vae, "scheduler_config.json": scheduler}
