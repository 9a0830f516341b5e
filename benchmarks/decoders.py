"""What a smaller pixel decoder costs beside the full one: parameters and counted operations; with --repeats also time.

    python benchmarks/decoders.py
    python benchmarks/decoders.py --sizes pico nano --repeats 3

Weights are random; operations are counted on shapes alone, time is that of the processor.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from flops import counter
from torch import nn

from unilip.fast.decoder import decode
from unilip.method.decoder import PixelDecoder
from unilip.sizes import preset, small_decoder


def main() -> None:
    """Read the options, count, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["pico", "nano", "1b"])
    parser.add_argument("--repeats", type=int, default=0, help="timed runs of each, taking turns; 0 counts alone (0)")
    options = parser.parse_args()
    print("| size | decoder | parameters | GFLOP a picture | seconds |\n|---|---|---|---|---|")
    for size in options.sizes:
        config = preset(size)
        decoders = {"full": config.decoder, "small": small_decoder(config.decoder)}
        shape, counted = (1, config.dit.latent_channels, config.grid, config.grid), dict[str, float]()
        for name, decoder in decoders.items():
            with torch.device("meta"), torch.no_grad(), counter() as flops:
                PixelDecoder(config.replace(decoder=decoder)).decoder(torch.empty(shape))
            counted[name] = flops.get_total_flops() / 1e9
        models: dict[str, nn.Module] = {}
        if options.repeats:
            models = {name: PixelDecoder(config.replace(decoder=d)).decoder for name, d in decoders.items()}
        seconds: dict[str, list[float]] = {name: [] for name in decoders}
        with torch.no_grad():
            for turn in range(options.repeats + 1):
                for name, model in models.items():
                    start = time.process_time()
                    decode(model, torch.randn(shape))  # type: ignore[arg-type]
                    seconds[name] += [time.process_time() - start] if turn else []
        for name, decoder in decoders.items():
            with torch.device("meta"):
                count = sum(p.numel() for p in PixelDecoder(config.replace(decoder=decoder)).parameters())
            taken = f"{statistics.median(seconds[name]):.3g}" if seconds[name] else ""
            print(f"| {size} | {name} | {count:,} | {counted[name]:.3g} | {taken} |")


if __name__ == "__main__":
    main()
