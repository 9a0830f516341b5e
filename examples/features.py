"""Use the tokenizer in a project of your own: features of pictures, latents between two of them, pictures again.

python examples/features.py [MODEL]
"""

import sys

import torch

from unilip import UniLIP
from unilip.demo import FOLDER, examples

tokenizer = ("encoder", "latent_head", "pixel_decoder")  # no language model, no diffusion transformer
model = UniLIP.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None, parts=tokenizer)
features = model.encode([FOLDER / picture["file"] for picture in examples()["pictures"][:2]])  # (2,N,D)
with torch.no_grad():
    first, second = model.to_latent(features)  # (Z,h,w) each
for i, share in enumerate((0.0, 0.5, 1.0)):
    model.decode(torch.lerp(first, second, share)[None])[0].save(f"between-{i}.png")
print(f"features {tuple(features.shape)}, latents {tuple(first.shape)}, between-0.png to between-2.png")
