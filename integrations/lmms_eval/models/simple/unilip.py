"""UniLIP (arXiv 2507.23278): one CLIP encoder for understanding, generation and editing; here it answers.

    python -m lmms_eval --model unilip --model_args pretrained=kanashi6/UniLIP-1B,max_tiles=12 --tasks mme

Needs the package `unilip`. A task's max_new_tokens, temperature, top_p, do_sample and until are followed; the log names
what is not. Under several processes each takes the GPU of its LOCAL_RANK.
"""

from lmms_eval.api.registry import register_model

from unilip.eval.lmms import UniLIP as Adapter


@register_model("unilip")
class UniLIP(Adapter):
    """Answers `generate_until`; likelihoods and several rounds are refused."""
