"""Configurations of ours, written as other programs read them.

Out: files by name, for the authors' code; for transformers, vLLM and SGLang, to which a UniLIP without its drawing half
is an InternVL; and for diffusers.
"""

import json
from dataclasses import asdict
from typing import Any

from unilip.checkpoints.hub import INDEX, template
from unilip.checkpoints.tokenizer import Tokenizer
from unilip.errors import CheckpointError
from unilip.method.config import SamplingConfig, UniLIPConfig

Json = dict[str, Any]


# what is the same for every model, by kind of config, and what theirs call our fields
FIXED: dict[str, Json] = json.loads(template("foreign.json"))


def _part(kind: str, config: Any) -> Json:
    """What a kind of config says of a part: what is the same for every model, and the part's own fields, renamed."""
    return FIXED[kind] | {theirs: getattr(config, ours) for theirs, ours in FIXED["fields"][kind].items()}


def _multimodal(config: UniLIPConfig, image_token_id: int | None) -> Json:
    """What both kinds say of the encoder, the language model and how they are joined."""
    v = config.vision
    sides = {"image_size": [v.image_size] * 2, "patch_size": [v.patch_size] * 2}
    return {
        **FIXED["multimodal"], "image_seq_length": config.num_image_tokens,
        "tie_word_embeddings": config.text.tie_embeddings, "text_config": _part("text", config.text),
        "vision_config": _part("vision", v) | sides,
        **({} if image_token_id is None else {"image_token_id": image_token_id}),
    }  # fmt: skip


def internvl_files(config: UniLIPConfig, tokenizer: Tokenizer | None) -> dict[str, Json | str]:
    """Return an InternVL folder's files but for weights and tokenizer. Raises CheckpointError: no special tokens."""
    needed = ("<IMG_CONTEXT>", "<|im_end|>", "<|endoftext|>")
    image, end, padding = (tokenizer.token_id(name) if tokenizer else None for name in needed)
    if tokenizer is None or image is None or end is None or padding is None:
        raise CheckpointError(f"The checkpoint has no tokenizer with {', '.join(needed)}; put its files beside it.")
    settings = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    kept = {key: value for key, value in settings.items() if key not in ("auto_map", "chat_template")}
    side, architectures = config.image_size, ["InternVLForConditionalGeneration"]
    return {
        "config.json": {"architectures": architectures, "model_type": "internvl", **_multimodal(config, image)},
        "generation_config.json": {"do_sample": False, "eos_token_id": end, "pad_token_id": padding},
        "preprocessor_config.json": {**FIXED["preprocessor"], "size": {"height": side, "width": side}},
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": config.num_image_tokens},
        "tokenizer_config.json": {**kept, "extra_special_tokens": FIXED["special_tokens"], "padding_side": "left"},
        "chat_template.jinja": template("chat_template.jinja"),
    }


def diffusers_files(config: UniLIPConfig) -> dict[str, Json | str]:
    """Return the files of a pipeline folder of diffusers, but for weights and tokenizer, by name."""
    return {
        INDEX: FIXED["pipeline"], "pipeline.py": template("pipeline.py.txt"),
        "model/network.py": template("network.py.txt"), "model/config.json": config.to_dict(),
        "tokenizer/words.py": template("words.py.txt"),
    }  # fmt: skip


def authors_configs(config: UniLIPConfig, image_token_id: int | None = None) -> dict[str, Json]:
    """Return the authors' config.json and the configs beside it. Raises CheckpointError: they cannot say the model."""
    t, d, c, sampling = config.text, config.dit, config.decoder, config.sampling
    means = ""
    if d.interpolation_scale is None or d.plain_blocks:
        means = "a DiT with a position embedding and SANA's blocks, and this model has dit.interpolation_scale "
        means += f"{d.interpolation_scale} and dit.plain_blocks {d.plain_blocks}"
    elif config.condition != "dual" or not config.substitute_features:
        means = "the dual condition with substituted features, and this model has condition "
        means += f"{config.condition!r}, substitute_features {config.substitute_features}"
    if means:
        raise CheckpointError(f"The authors' format always means {means}; keep it in this package's own format.")
    if config.latent_mean != 0.0 or isinstance(config.latent_factor, tuple):
        raise CheckpointError("The authors' format has one factor for all latent channels and no mean; this has more.")
    large = t.hidden_size > 1000
    hub = "OpenGVLab/InternVL3-2B" if large else "OpenGVLab/InternVL3-1B"
    main = {
        **FIXED["authors"], "connect_layer": config.connector_layers, "n_query": config.num_queries,
        "unilip_factor": config.latent_factor, "mllm_path": hub, "mllm_hf_path": f"{hub}-hf",
        "dit_path": f"Efficient-Large-Model/Sana_{'1600M' if large else '600M'}_512px_diffusers",
        "hidden_size": t.hidden_size, **_multimodal(config, image_token_id),
        # what theirs has no place for, where it is not what their files mean
        **({} if config.image_size == config.vision.image_size else {"image_size": config.image_size}),
        **({} if sampling == SamplingConfig(flow_shift=sampling.flow_shift) else {"sampling": asdict(sampling)}),
    }  # fmt: skip
    dit = _part("dit", d) | ({"few_steps": list(d.few_steps)} if d.few_steps else {})
    decoder = config.to_dict()["decoder"]
    halves = ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales")
    vae = _part("vae", c) | {f"{half}_{name}": decoder[name] for half in ("encoder", "decoder") for name in halves}
    scheduler = {**FIXED["scheduler"], "flow_shift": sampling.flow_shift}
    return {"config.json": main, "dit_config.json": dit, "vae_config.json": vae, "scheduler_config.json": scheduler}
