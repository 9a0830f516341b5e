"""`torchrun -m unilip.train RECIPE`: a run in the processes that torchrun starts, one for each GPU (docs/training.md).

The options are those of `unilip train`. Exit codes: 0 done, 2 bad input, 130 stopped by a signal and saved.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from unilip.errors import UniLIPError
from unilip.train import processes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe that the command line names; returns the exit code."""
    found = argparse.ArgumentParser(
        prog="torchrun -m unilip.train", description="Run a training recipe in several processes, or go on with it."
    )
    found.add_argument("recipe", help="its name; `unilip train --list` shows them all")
    found.add_argument("--runs", default="runs", metavar="DIR", help="folder of all runs (runs)")
    found.add_argument("--set", action="append", default=[], dest="settings", metavar="NAME=VALUE", help="repeatable")
    found.add_argument(
        "--data", action="append", dest="settings", type="data.path={}".format, metavar="PLACE",
        help="what to learn from: --set data.path",
    )  # fmt: skip
    found.add_argument("--restart", action="store_true", help="begin anew, even where checkpoints exist")
    found.add_argument("--stop-after", type=int, metavar="N", help="save and stop after N more steps")
    found.add_argument("--device", default="auto", help="auto, cpu or cuda (auto: CUDA where there is one)")
    found.add_argument("--no-progress", action="store_false", dest="progress", help="no progress bar")
    options = vars(found.parse_args(argv))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("unilip").setLevel(logging.INFO if processes.first() else logging.ERROR)
    from unilip.recipes.catalog import get_recipe
    from unilip.recipes.record import override
    from unilip.train.loop import Interrupted, train

    try:
        recipe = override(get_recipe(options.pop("recipe")), options.pop("settings"))
        folder = train(recipe, **options)
    except Interrupted as error:
        if processes.first():
            print(error, file=sys.stderr)
        return 130
    except UniLIPError as error:  # which may be this process's alone: what it reads
        where = f" in process {processes.rank()}" if processes.world() > 1 else ""
        print(f"error{where}: {error}", file=sys.stderr)
        return 2
    if processes.first():
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
