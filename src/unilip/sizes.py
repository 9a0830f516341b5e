"""The sizes of UniLIP by name: tiny (tests), pico and nano (trained by this package), 1b and 3b (the released ones).

`sizes.json` says how each differs from the released 1b, whose numbers are the defaults of the config's classes.
"""

import dataclasses
from typing import Any

from unilip.errors import ConfigError, check_choice
from unilip.files import read_table
from unilip.method.config import DecoderConfig, UniLIPConfig

PRESETS: dict[str, dict[str, Any]] = read_table("unilip", "sizes.json")


def small_decoder(full: DecoderConfig) -> DecoderConfig:
    """Return a decoder of half the widths, with one block where the full one has any: about a tenth of the work."""
    widths = tuple(max(1, width // 2) for width in full.block_out_channels[:-1])
    end = max(full.block_out_channels[-1] // 2, full.latent_channels)
    layers = tuple(min(count, 1) for count in full.layers_per_block)
    return dataclasses.replace(full, block_out_channels=(*widths, end), layers_per_block=layers)


def preset(name: str) -> UniLIPConfig:
    """Return the named preset: tiny (tests), pico and nano (embedded models), 1b and 3b (the released sizes)."""
    check_choice("preset", name, PRESETS, ConfigError)
    return UniLIPConfig.from_dict({"name": name, **PRESETS[name]})
