"""Train the stages of a model of toy size, one after the other; the result is a folder that loads like any other.

python examples/train_tiny.py [RUNS]
"""

import sys

from unilip import UniLIP
from unilip.recipes.catalog import all_recipes
from unilip.recipes.record import override
from unilip.train.loop import train

runs = sys.argv[1] if len(sys.argv) > 1 else "runs"
for name, recipe in all_recipes().items():
    if name.startswith("tiny/"):
        result = train(override(recipe, ["steps=2", "optim.lr=1e-4"]), runs)
        print(name, "->", result)
model = UniLIP.from_pretrained(result)
print(model.generate("a star", num_inference_steps=2).images)
