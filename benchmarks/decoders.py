"""What a smaller pixel decoder costs beside the full one: parameters and processor time, on random weights.

python benchmarks/decoders.py --sizes pico 1b --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from unilip.fast.decoder import decode
from unilip.model import UniLIP
from unilip.sizes import preset, small_decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["pico"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print("| size | decoder | parameters | seconds of processor | ratio |\n|---|---|---|---|---|")
    for size in options.sizes:
        config = preset(size)
        latent = torch.randn(1, config.dit.latent_channels, config.grid, config.grid)
        seconds: dict[str, list[float]] = {}
        models = {}
        for name, decoder in (("full", config.decoder), ("small", small_decoder(config.decoder))):
            models[name] = UniLIP.from_config(config.replace(decoder=decoder), parts=("pixel_decoder",)).pixel_decoder
        with torch.no_grad():
            for turn in range(options.repeats + 1):
                for name, model in models.items():
                    start = time.process_time()
                    decode(model.decoder, latent)
                    if turn:
                        seconds.setdefault(name, []).append(time.process_time() - start)
        middle = {name: statistics.median(found) for name, found in seconds.items()}
        for name, model in models.items():
            count = sum(p.numel() for p in model.parameters())
            print(f"| {size} | {name} | {count:,} | {middle[name]:.3g} | {middle['full'] / middle[name]:.1f} |")


if __name__ == "__main__":
    main()
