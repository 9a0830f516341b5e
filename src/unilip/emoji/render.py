"""Scene -> RGB picture of world.size, width and height, and the boolean masks (H, W) of which pixels belong to what."""

from functools import lru_cache

import numpy as np
from PIL import Image

from unilip.emoji.art import BACKGROUNDS, HORIZON, Atlas
from unilip.emoji.world import Obj, Scene, World
from unilip.errors import DataError, check_choice
from unilip.shapes import Size


def render(scene: Scene, atlas: Atlas, world: World) -> Image.Image:
    """Draw SCENE; returns a new RGB picture of world.size."""
    image = _background(scene.background, world.size).copy()
    for obj in scene.objects:
        sprite = atlas.sprite(obj.concept, obj.style, obj.size, obj.colour, obj.tone)
        image.paste(sprite, (obj.x, obj.y), sprite)
    return image


@lru_cache(maxsize=128)
def _background(name: str, size: Size) -> Image.Image:
    check_choice("background", name, BACKGROUNDS, DataError)
    pixels = np.repeat(np.round(background_rows(name, size[1]))[:, None], size[0], axis=1).astype(np.uint8)  # (H, W, 3)
    return Image.fromarray(pixels)


def background_rows(name: str, height: int) -> np.ndarray:
    """Return the colour of each row of a background: (H, 3) in 0..255, without rounding."""
    found = BACKGROUNDS[name]
    rows = (np.arange(height) + 0.5) / height
    share = {"plain": rows * 0, "gradient": rows, "horizon": (rows > HORIZON).astype(float)}[found.kind]
    top, bottom = np.array(found.top, float), np.array(found.bottom, float)
    return top + share[:, None] * (bottom - top)


def object_mask(obj: Obj, atlas: Atlas, world: World, above: int = 0) -> np.ndarray:
    """Return where OBJ covers the background, by an alpha ABOVE so much of 255: boolean (H, W)."""
    mask = np.zeros(world.size[::-1], dtype=bool)
    alpha = np.asarray(atlas.sprite(obj.concept, obj.style, obj.size, obj.colour, obj.tone).getchannel("A"))
    mask[obj.y : obj.y + obj.size, obj.x : obj.x + obj.size] = alpha > above
    return mask


def change_mask(source: Scene, target: Scene, atlas: Atlas, world: World) -> np.ndarray:
    """Return where an edit from SOURCE to TARGET may change pixels: boolean (H, W)."""
    mask = np.full(world.size[::-1], source.background != target.background)
    for obj in set(source.objects) & set(target.objects):
        mask &= ~object_mask(obj, atlas, world, 254)
    for obj in set(source.objects) ^ set(target.objects):
        mask |= object_mask(obj, atlas, world)
    return mask
