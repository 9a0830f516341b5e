"""Use the model like a diffusers pipeline: draw, look at every step, then edit the result.

python examples/pipeline.py [MODEL]
"""

import sys

import torch

from unilip.pipeline import UniLIPPipeline

pipe = UniLIPPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None).to("cpu", torch.float32)


def report(pipe, step, timestep, tensors):
    print(f"step {step}: noise level {timestep:.0f}, spread of the latents {tensors['latents'].std():.2f}")


generator = torch.Generator().manual_seed(0)  # or the number 0
stars = pipe("three yellow stars", num_inference_steps=6, generator=generator, callback_on_step_end=report).images[0]
stars.save("pipeline-stars.png")
pipe("change the background to pink", image=stars, num_inference_steps=6).images[0].save("pipeline-pink.png")
