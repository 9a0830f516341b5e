"""Watch a picture come into being: decode what the sampler holds after each step.

python examples/callback.py [MODEL]
"""

import sys

from unilip import UniLIP
from unilip.pictures import to_images

model = UniLIP.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None)


def watch(model, step, timestep, state):
    to_images(model.from_latent(state["latents"]))[0].save(f"step-{step:02d}.png")
    print(f"step-{step:02d}.png at timestep {int(timestep)}")
    # returning {"latents": ...} would replace them; raising an exception would stop


model.generate("a blue car", num_inference_steps=6, callback_on_step_end=watch)
