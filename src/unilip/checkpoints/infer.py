"""What a checkpoint should hold, and the configuration of one that does not say it.

In:  a configuration of ours -> names and shapes of all its tensors. Or names and shapes of another kind, its own
config.json, and the JSON files beside it -> a `UniLIPConfig`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from unilip.checkpoints.foreign import FIXED
from unilip.checkpoints.tables import EMBEDDING, HEAD, KINDS, QUERIES, Shape, Shapes, listed
from unilip.errors import CheckpointError, ConfigError
from unilip.fast.offload import Unmade
from unilip.method.config import DecoderConfig, DiTConfig, SamplingConfig, TextConfig, UniLIPConfig, VisionConfig
from unilip.method.model import PARTS
from unilip.sizes import preset

Json = Mapping[str, Any]

LARGEST = 2**24  # of any number in a configuration
LARGEST_GRID = 1024  # latent cells along a side


def expected_shapes(config: UniLIPConfig, parts: Sequence[str]) -> dict[str, Shape]:
    """Return names and shapes of every tensor that a checkpoint of this config must hold (tied ones once)."""
    with Unmade():
        states = {part: PARTS[part](config).state_dict() for part in parts}
    shapes = {f"{part}.{name}": tuple(tensor.shape) for part, held in states.items() for name, tensor in held.items()}
    if config.text.tie_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def check_sizes(config: UniLIPConfig, parts: Sequence[str], tensors: int) -> None:
    """Refuse, before anything is built, more layers than tensors, or a number beyond all, by CheckpointError."""
    blocks = sum(config.decoder.layers_per_block) + sum(map(len, config.decoder.qkv_multiscales))
    layers = {
        "encoder": config.vision.num_layers, "latent_head": config.latent_head_blocks, "pixel_decoder": blocks,
        "mllm": config.text.num_layers, "connector": config.connector_layers, "dit": config.dit.num_layers,
    }  # fmt: skip
    count = sum(layers[part] for part in parts)
    if count > tensors:
        raise CheckpointError(f"Its configuration has {count} layers, and its weights {tensors} tensors in all.")
    largest = max(_numbers(dataclasses.asdict(config)))
    if largest > LARGEST or config.dit.sample_size > LARGEST_GRID:
        raise CheckpointError(f"Its configuration has the number {max(largest, config.dit.sample_size)}: too large.")


def _numbers(value: Any) -> list[float]:
    if isinstance(value, (dict, list, tuple)):
        values = value.values() if isinstance(value, dict) else value
        return [number for inner in values for number in _numbers(inner)]
    return [value] if isinstance(value, (int, float)) else []


_SANA_NAME = re.compile(r"sana.*?_(600M|1600M)(?:_(\d+)px)?", re.IGNORECASE)


def infer_config(kind: str, data: Json, shapes: Shapes, beside: Mapping[str, Json], name: str = "") -> UniLIPConfig:
    """Work out our config of another KIND of checkpoint, NAME being what to call a model of no released size.

    In: data: its own config.json, or {}. shapes: its tensors under *our* names. beside: JSON files lying beside it, by
    file name (dit_config.json, vae_config.json, scheduler_config.json).
    Raises CheckpointError: the shapes leave something open; says which file to put there.
    """
    try:  # there and back checks the type of every field
        return UniLIPConfig.from_dict(_infer(kind, data, shapes, beside, name).to_dict())
    except KeyError as error:
        raise CheckpointError(f"The checkpoint lacks {error.args[0]}, which its config follows from.") from error
    except (ConfigError, TypeError, AttributeError, ValueError, ArithmeticError, IndexError) as error:
        raise CheckpointError(f"The checkpoint's configuration makes no sense: {error}") from error


def _infer(kind: str, data: Json, shapes: Shapes, beside: Mapping[str, Json], name: str) -> UniLIPConfig:
    parts = KINDS[kind].parts
    changes: dict[str, Any] = {}
    base = UniLIPConfig()
    released: str | None = None
    if "encoder" in parts:
        width = shapes["encoder.projector.3.weight"][0]
        released = next((size for size in ("1b", "3b") if preset(size).text.hidden_size == width), None)
        base = preset(released) if released else base
        changes["vision"] = _vision(data.get("vision_config", {}), shapes)
        changes["image_size"] = changes["vision"].image_size
    if "mllm" in parts:
        changes["text"] = _text(data, shapes)
        changes["connector_layers"] = min(base.connector_layers, changes["text"].num_layers)
    elif "encoder" in parts and not released:
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
    vae = data if kind == "dcae" else beside.get("vae_config.json", {})
    if "pixel_decoder" in parts:
        changes["decoder"] = _decoder(vae, shapes)
        changes["dit"] = dataclasses.replace(base.dit, latent_channels=changes["decoder"].latent_channels)
    if "dit" in parts:
        changes["dit"] = _dit(kind, data, shapes, beside)
        if "decoder" not in changes:
            changes["decoder"] = dataclasses.replace(base.decoder, latent_channels=changes["dit"].latent_channels)
        if "encoder" not in parts:
            changes["image_size"] = changes["dit"].sample_size * 28
    if kind == "authors" and "unilip_factor" not in data:
        raise CheckpointError("Its config.json has no unilip_factor (10.6 in the 1B release, 9.5 in 3B); add it.")
    factor: Any = data.get("unilip_factor", base.latent_factor)
    if kind in ("authors-stage1", "dcae"):
        factor = vae.get("scaling_factor", 1.0 if kind == "dcae" else 0.41407)
    changes["latent_factor"] = float(factor)
    if "scheduler_config.json" in beside:
        changes["sampling"] = _sampling(beside["scheduler_config.json"])
    if kind == "authors":  # what is ours alone, if it came from here
        changes |= {name: data[name] for name in ("image_size", "sampling") if name in data}
    return base.replace(**changes, name=released or name or kind)


def _count(shapes: Shapes, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _ours(kind: str, data: Json) -> dict[str, Any]:
    """What another kind of config says of a part, under our names."""
    return {ours: data[theirs] for theirs, ours in FIXED["fields"][kind].items() if theirs in data}


def _vision(data: Json, shapes: Shapes) -> VisionConfig:
    if data.get("norm_type", "layer_norm") != "layer_norm" or data.get("use_qk_norm", False):
        raise CheckpointError("Its vision encoder has other norms than InternViT-300M; use InternVL3-1B or 2B.")
    root = "encoder.vision_tower"
    _, positions, width = shapes[f"{root}.embeddings.position_embeddings"]
    patch = shapes[f"{root}.embeddings.patch_embeddings.projection.weight"][-1]
    given = _ours("vision", data)
    if given.get("num_heads", 16 if width == 1024 else None) is None:
        raise CheckpointError(
            f"The number of heads of a vision encoder {width} wide does not follow from its tensors; put the "
            "config.json of its model beside it."
        )
    return VisionConfig(**given | {
        "hidden_size": width, "num_layers": _count(shapes, f"{root}.encoder.layer."), "patch_size": patch,
        "intermediate_size": shapes[f"{root}.encoder.layer.0.mlp.fc1.weight"][0],
        "image_size": isqrt(positions - 1) * patch,
    })  # fmt: skip


def _text(data: Json, shapes: Shapes) -> TextConfig:
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
    return TextConfig(**_ours("text", text) | {
        "vocab_size": vocabulary, "hidden_size": width, "num_layers": _count(shapes, f"{layer}."),
        "intermediate_size": shapes[f"{layer}.0.mlp.gate_proj.weight"][0], "tie_embeddings": HEAD not in shapes,
        "rope_theta": float(text.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
    })  # fmt: skip


def _decoder(data: Json, shapes: Shapes) -> DecoderConfig:
    """Everything about the decoder follows from its shapes; its config only says whether it is of the known make."""
    known = {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "decoder_conv_act_fn": "relu"}
    for field, value in known.items():
        given = data.get(field, value)
        if {*([given] if isinstance(given, str) else given)} != {value}:
            raise CheckpointError(f"The DC-AE config has {field} {given!r}; only {value!r} is supported.")
    root = "pixel_decoder.decoder"
    conv_in = shapes[f"{root}.conv_in.weight"]
    channels, layers, types = [0] * 6, [0] * 6, ["ResBlock"] * 6
    scales: list[tuple[int, ...]] = [()] * 6
    head_dim, pixel_shuffle = data.get("attention_head_dim", 32), False
    for level in range(5, -1, -1):
        prefix = f"{root}.up_blocks.{level}."
        first = int(level < 5)  # every other scale opens with its upsampling convolution
        layers[level] = max(0, _count(shapes, prefix) - first)
        block = f"{prefix}{first}."
        if layers[level] == 0:
            continue
        if f"{block}attn.to_q.weight" in shapes:
            types[level] = "EfficientViTBlock"
            channels[level] = shapes[f"{block}attn.to_out.weight"][0]
            convolutions = range(_count(shapes, f"{block}attn.to_qkv_multiscale."))
            names = [f"{block}attn.to_qkv_multiscale.{n}" for n in convolutions]
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
        finest = data.get("decoder_block_out_channels", channels[1])
        channels[0] = int(finest[0] if isinstance(finest, (list, tuple)) else finest)
    return DecoderConfig(
        block_out_channels=tuple(channels), layers_per_block=tuple(layers), block_types=tuple(types),
        qkv_multiscales=tuple(scales), attention_head_dim=head_dim, latent_channels=conv_in[1],
        upsample_block_type="pixel_shuffle" if pixel_shuffle else "interpolate",
    )  # fmt: skip


def _dit(kind: str, data: Json, shapes: Shapes, beside: Mapping[str, Json]) -> DiTConfig:
    root = "dit.transformer"
    width = shapes[f"{root}.scale_shift_table"][1]
    shaped: dict[str, Any] = dict(
        num_layers=_count(shapes, f"{root}.transformer_blocks."),
        caption_channels=shapes[f"{root}.caption_projection.linear_1.weight"][1],
        mlp_ratio=shapes[f"{root}.transformer_blocks.0.ff.conv_inverted.weight"][0] / (2 * width),
        latent_channels=shapes[f"{root}.patch_embed.proj.weight"][1],
        plain_blocks=f"{root}.transformer_blocks.0.ff.conv_depth.weight" not in shapes,
    )
    given: Json | None = data if kind == "sana" else beside.get("dit_config.json")
    if given is not None:
        own, names = _ours("dit", given), FIXED["fields"]["dit"]
        needed = ("num_heads", "head_dim", "num_cross_heads", "cross_head_dim", "sample_size")
        if lacking := [theirs for theirs, ours in names.items() if ours in needed and own.get(ours) is None]:
            raise CheckpointError(f"The SANA config lacks {listed(lacking)}; use that of SANA's transformer folder.")
        if given.get("guidance_embeds") or given.get("qk_norm") or given.get("patch_size", 1) != 1:
            raise CheckpointError("Its diffusion transformer is a later SANA: guidance embedding, norms or patches.")
        config = DiTConfig(
            interpolation_scale=own.get("interpolation_scale"), few_steps=tuple(given.get("few_steps", ())),
            **{name: own[name] for name in needed}, **shaped,
        )  # fmt: skip
    else:
        match = _SANA_NAME.search(str(data.get("dit_path", "")))
        known = preset("1b" if match[1].upper() == "600M" else "3b").dit if match else None
        if match is None or known is None or (known.hidden_size, known.num_layers) != (width, shaped["num_layers"]):
            raise CheckpointError(
                f"The heads of a diffusion transformer {width} wide with {shaped['num_layers']} layers do not follow "
                f"from its tensors, and dit_path {data.get('dit_path')!r} names no known SANA of that size. Put the "
                "config.json of SANA's transformer folder beside the checkpoint, under the name dit_config.json."
            )
        config = dataclasses.replace(known, sample_size=int(match[2] or 512) // 32, interpolation_scale=None, **shaped)
    if kind != "sana" and config.interpolation_scale is None:
        # The authors' library read None as this number, so every weight of theirs was trained with the embedding.
        config = dataclasses.replace(config, interpolation_scale=float(max(config.sample_size // 64, 1)))
    return config


def _sampling(data: Json) -> SamplingConfig:
    known = {"DPMSolverMultistepScheduler": "dpm++", "FlowMatchEulerDiscreteScheduler": "euler"}
    solver = known.get(str(data.get("_class_name", next(iter(known)))))
    off = "euler_at_final thresholding use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_lu_lambdas"
    names = ("_class_name", "num_train_timesteps")  # which say nothing of the way
    dpm = {k: v for k, v in FIXED["scheduler"].items() if k not in names} | dict.fromkeys(off.split(), False)
    wrong = [f"{k} {data[k]!r}" for k, v in dpm.items() if solver == "dpm++" and k in data and data[k] != v]
    if solver is None or wrong:
        what = listed(wrong) or data.get("_class_name")
        raise CheckpointError(f"The sampler in scheduler_config.json is not known ({what}); remove the file.")
    return SamplingConfig(flow_shift=float(data.get("flow_shift", data.get("shift", 3.0))), solver=solver)
