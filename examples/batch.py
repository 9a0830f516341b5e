"""Many prompts in one go, as arrays. A picture depends on its own generator, not on its batch.

python examples/batch.py [MODEL]
"""

import sys

import numpy as np
import torch

from unilip import UniLIP

model = UniLIP.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None)
prompts = ["a red car", "a green cactus", "two blue fish"]


def generators(count):
    return [torch.Generator().manual_seed(7) for _ in range(count)]


batch = model.generate(prompts, generator=generators(3), num_inference_steps=8, output_type="np").images
alone = model.generate(prompts[1], generator=generators(1), num_inference_steps=8, output_type="np").images
print(batch.shape, f"largest difference between batch and alone: {np.abs(batch[1] - alone[0]).max():.1e}")
