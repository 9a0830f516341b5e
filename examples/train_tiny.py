"""Train the stages of a model of toy size, one after the other; the result is a folder that loads like any other.

python examples/train_tiny.py [RUNS]
"""

import sys

from unilip import UniLIP
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override
from unilip.train.loop import train

STAGES = ("clip", "instruct", "recon", "recon_distill", "pretrain", "sft")
runs = sys.argv[1] if len(sys.argv) > 1 else "runs"
for stage in STAGES:
    result = train(override(get_recipe(f"tiny/{stage}"), ["steps=2", "optim.lr=1e-4"]), runs)
    print(stage, "->", result)
model = UniLIP.from_pretrained(result)
print(model.generate("a star", num_inference_steps=2).images)
