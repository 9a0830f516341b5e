"""Many prompts in one go, as arrays. A picture depends on its own seed, not on its batch.

python examples/batch.py [MODEL]
"""

import sys

import numpy as np

from unilip import UniLIP

model = UniLIP.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None)
prompts = ["a red car", "a green cactus", "two blue fish"]
batch = model.generate(prompts, generator=[7, 7, 7], num_inference_steps=8, output_type="np").images
alone = model.generate(prompts[1], generator=7, num_inference_steps=8, output_type="np").images
print(batch.shape, f"largest difference between batch and alone: {np.abs(batch[1] - alone[0]).max():.1e}")
