"""`torchrun -m unilip.train RECIPE` is `torchrun -m unilip train RECIPE` (docs/training.md)."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    runpy.run_module("unilip", run_name="__main__")  # by its name: what is below the command line imports none of it
