"""Load released weights (3 GB, fetched once), on the best device there is, and use all four abilities.

python examples/load_released.py [kanashi6/UniLIP-1B]
"""

import sys

import torch

from unilip import UniLIP

source = sys.argv[1] if len(sys.argv) > 1 else "kanashi6/UniLIP-1B"
device = "cuda" if torch.cuda.is_available() else "cpu"
model = UniLIP.from_pretrained(source, device=device, dtype=torch.bfloat16 if device == "cuda" else None)
print(model.config.name, model.dtype, "position embedding:", model.config.dit.interpolation_scale)

image = model.generate("A corgi in a spacesuit on the moon", num_inference_steps=20).images[0]
image.save("corgi.png")
model.edit(image, "Make it night")
model.reconstruct(image)
print(model.ask(image, "What is the animal wearing?", max_new_tokens=32))
