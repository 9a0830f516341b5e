"""Draw four pictures of one prompt; the same seeds give the same pictures every time.

python examples/generate.py [MODEL]
"""

import sys

from unilip import UniLIP

model = UniLIP.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None)
seeds = range(4)
output = model.generate("three yellow stars", num_images_per_prompt=len(seeds), generator=list(seeds))
for seed, image in zip(seeds, output.images, strict=True):
    image.save(f"stars-{seed}.png")
    print(f"stars-{seed}.png")
