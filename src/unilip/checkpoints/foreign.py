"""Configurations of ours, written as other programs read them.

In:  a `UniLIPConfig`, and the id of the image token or the tokenizer. Out: files by name, for the authors' code, and
     for transformers, vLLM and SGLang, to which a UniLIP without its drawing half is an InternVL; and for diffusers.
"""

from __future__ import annotations

import json
from typing import Any

from unilip.checkpoints.hub import INDEX
from unilip.checkpoints.tokenizer import Tokenizer
from unilip.errors import CheckpointError
from unilip.method.config import TextConfig, UniLIPConfig, VisionConfig
from unilip.pictures import IMAGENET_MEAN, IMAGENET_STD

Json = dict[str, Any]
DPM: Json = {  # the sampler of the released models, in the words of diffusers
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
}
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for item in message['content'] %}{% if item['type'] == 'image' %}<IMG_CONTEXT>
{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


# Of a pipeline folder: diffusers runs these files when it is told to trust them. They hold no network of their own.
PIPELINE = '''"""UniLIP as a pipeline of diffusers; network and computation are those of the package unilip."""

from diffusers import DiffusionPipeline

try:
    from unilip.method.text import Processor
    from unilip.pipeline import UniLIPPipeline
except ImportError as error:
    raise ImportError(f"This pipeline runs on the package unilip, which is not here ({error}).") from error


class UniLIPDiffusionPipeline(UniLIPPipeline, DiffusionPipeline):
    """Called like any other pipeline; a prompt draws, a prompt and a picture edit."""

    config, components = DiffusionPipeline.config, DiffusionPipeline.components

    def __init__(self, model, tokenizer):
        DiffusionPipeline.__init__(self)
        self.register_modules(model=model, tokenizer=tokenizer)
        model.processor = Processor(tokenizer, model.config)
        UniLIPPipeline.__init__(self, model)

    @classmethod
    def from_pretrained(cls, *values, **named):
        return DiffusionPipeline.from_pretrained.__func__(cls, *values, **named)
'''
MODEL = """from unilip import UniLIP


class Model(UniLIP):
    @classmethod
    def from_pretrained(cls, folder, torch_dtype=None, dtype=None, **_):
        return super().from_pretrained(folder, dtype=dtype or torch_dtype)
"""
TOKENIZER = """from unilip.checkpoints import tokenizer


class Tokenizer(tokenizer.Tokenizer):
    @classmethod
    def from_pretrained(cls, folder, **_):
        return cls(tokenizer.load_tokenizer(folder).files)
"""


def _text(t: TextConfig) -> Json:
    return {
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
    }


def _vision(v: VisionConfig) -> Json:
    return {
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
    }


def _multimodal(config: UniLIPConfig, image_token_id: int | None) -> Json:
    """What both kinds say of the encoder, the language model and how they are joined."""
    return {
        "downsample_ratio": 0.5,
        "image_seq_length": config.num_image_tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.text.tie_embeddings,
        "text_config": _text(config.text),
        "vision_config": _vision(config.vision),
        **({} if image_token_id is None else {"image_token_id": image_token_id}),
    }


def internvl_files(config: UniLIPConfig, tokenizer: Tokenizer | None) -> dict[str, Json | str]:
    """Return the files of an InternVL folder, but for its weights and what its tokenizer keeps, by name.

    Raises:
        CheckpointError: there is no tokenizer with the special tokens.
    """
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    needed = ("<IMG_CONTEXT>", "<|im_end|>", "<|endoftext|>")
    image, end, padding = (tokenizer.token_id(name) if tokenizer else None for name in needed)
    if tokenizer is None or image is None or end is None or padding is None:
        raise CheckpointError(f"The checkpoint has no tokenizer with {', '.join(needed)}; put its files beside it.")
    settings = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    kept = {key: value for key, value in settings.items() if key not in ("auto_map", "chat_template")}
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": config.num_image_tokens}
    return {
        "config.json": {
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": "internvl",
            **_multimodal(config, image),
        },
        "generation_config.json": {"do_sample": False, "eos_token_id": end, "pad_token_id": padding},
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            "crop_to_patches": False,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD,
            "min_patches": 1,
            "max_patches": 12,
            "resample": 3,
            "size": {"height": config.image_size, "width": config.image_size},
        },
        "processor_config.json": processor,
        "tokenizer_config.json": {
            **kept,
            "extra_special_tokens": {**names, "video_token": "<video>"},
            "padding_side": "left",
        },
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def diffusers_files(config: UniLIPConfig) -> dict[str, Json | str]:
    """Return the files of a pipeline folder of diffusers, but for weights and tokenizer, by name."""
    index = {
        "_class_name": ["pipeline", "UniLIPDiffusionPipeline"],
        "_diffusers_version": "0.36.0",
        "model": ["network", "Model"],
        "tokenizer": ["words", "Tokenizer"],
    }
    return {
        INDEX: index,
        "pipeline.py": PIPELINE,
        "model/network.py": MODEL,
        "model/config.json": config.to_dict(),
        "tokenizer/words.py": TOKENIZER,
    }


def authors_configs(config: UniLIPConfig, image_token_id: int | None = None) -> dict[str, Json]:
    """Return config.json and the configs beside it, by file name, of the authors' format.

    Raises:
        CheckpointError: the model has something that their format cannot say.
    """
    t, d, c = config.text, config.dit, config.decoder
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
    main = {
        "architectures": ["UniLIP_InternVLForCausalLM"],
        "model_type": "unilip_internvl",
        "connect_layer": config.connector_layers,
        "n_query": config.num_queries,
        "unilip_factor": config.latent_factor,
        "mllm_path": hub,
        "mllm_hf_path": f"{hub}-hf",
        "vae_path": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
        "dit_path": f"Efficient-Large-Model/Sana_{'1600M' if large else '600M'}_512px_diffusers",
        "hidden_size": t.hidden_size,
        **_multimodal(config, image_token_id),
    }
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
        **({"few_steps": list(d.few_steps)} if d.few_steps else {}),
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
        "flow_shift": config.sampling.flow_shift,
        **DPM,
    }
    return {"config.json": main, "dit_config.json": dit, "vae_config.json": vae, "scheduler_config.json": scheduler}
