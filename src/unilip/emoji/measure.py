"""Measure the art once, for what a world has to avoid: the result is ``measured.json`` beside this file.

Goes in: an atlas. Comes out: by style and concept, the plain backgrounds on which the drawing would hardly show
("clashes"), and the palette colour that the drawing already has ("natural").
"""

from __future__ import annotations

import colorsys
import json
from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image, ImageFilter

from unilip.emoji.art import BACKGROUNDS, PALETTE, STYLES, Atlas, dominant
from unilip.emoji.concepts import concepts

Measured = dict[str, dict[str, dict[str, list[str]]]]


@cache
def measured() -> Measured:
    """Return the stored measurements: ["clashes" or "natural"][style][concept] -> names."""
    text = files("unilip.emoji").joinpath("measured.json").read_text(encoding="utf-8")
    found: Measured = json.loads(text)
    return found


def measure(atlas: Atlas, size: int = 80) -> Measured:
    """Measure all sprites of ATLAS at SIZE pixels."""
    plain = {b.name: _to_lab(np.array(b.top)) for b in BACKGROUNDS.values() if b.kind == "plain"}
    hues = {
        name: 360 * colorsys.rgb_to_hsv(*(c / 255 for c in rgb))[0] for name, rgb in PALETTE.items() if name != "black"
    }
    found: Measured = {"clashes": {style: {} for style in STYLES}, "natural": {style: {} for style in STYLES}}
    for name, c in concepts().items():
        for style in STYLES if c.codepoint else ():
            sprite = atlas.sprite(name, style, size)
            hidden = [background for background, lab in plain.items() if _hides(sprite, lab)]
            if hidden:
                found["clashes"][style][name] = hidden
            tone = dominant(sprite)
            if tone is not None:
                near = [n for n, hue in hues.items() if abs((hue - tone.hue + 180) % 360 - 180) < 25]
                found["natural"][style][name] = near
    return found


def _hides(sprite: Image.Image, background: np.ndarray) -> bool:
    """Whether most of the outline, or of the whole drawing, is within 20 CIELAB units of BACKGROUND."""
    pixels = np.asarray(sprite)
    inside = np.pad(pixels[..., 3] > 128, 4)
    shrunk = Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(7))
    visible = inside[4:-4, 4:-4]
    outline = visible & (np.asarray(shrunk)[4:-4, 4:-4] == 0)
    close = np.linalg.norm(_to_lab(pixels[..., :3]) - background, axis=-1) < 20
    return bool(close[outline].mean() > 0.45 or close[visible].mean() > 0.6)


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 -> CIELAB (D65), shape (..., 3)."""
    c = np.asarray(rgb, dtype=float) / 255
    linear = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
