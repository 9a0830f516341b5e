"""Width and height of a picture: what is allowed, what is rounded, what keeps the shape of a source.

In:  sides in pixels, or a text such as "448x336". Out: `Size`, width and height, multiples of 28 px.
"""

import logging
import math
import re
from collections.abc import Sequence

from unilip.errors import ConfigError, check_number
from unilip.method.config import TOKEN_PIXELS

logger = logging.getLogger(__name__)

Size = tuple[int, int]  # width, height in pixels
MAX_DRAWN = 4480 * 4480  # pixels of a picture that is drawn
MAX_DRAWN_SIDE = 8960


def drawn(width: object, height: object) -> Size:
    """Return the size nearest to the one asked for, as `nearest` does; a warning says so where they differ."""
    w, h = nearest(width, height)
    if (w, h) != (width, height):
        logger.warning("%sx%s is rounded to %dx%d: sides are multiples of %d", width, height, w, h, TOKEN_PIXELS)
    return w, h


def nearest(width: object, height: object) -> Size:
    """Return the nearest size that can be drawn. Raises ConfigError: no whole numbers, or out of range."""
    asked = _side("width", width), _side("height", height)
    w, h = ((side + TOKEN_PIXELS // 2) // TOKEN_PIXELS * TOKEN_PIXELS for side in asked)
    if w * h > MAX_DRAWN:
        raise ConfigError(f"{asked[0]}x{asked[1]} are {w * h} pixels; at most {MAX_DRAWN} are drawn (4480x4480).")
    return w, h


def _side(name: str, value: object) -> int:
    return check_number(name, value, TOKEN_PIXELS, MAX_DRAWN_SIDE, whole=True, kind=ConfigError)


def like(source: Size, pixels: int) -> Size:
    """Return the size of at most so many pixels that keeps the shape of a source (width, height) best.

    A twofold error of the ratio of the sides weighs as much as a quarter of the pixels used.
    """
    cells, ratio = pixels // TOKEN_PIXELS**2, source[0] / source[1]
    best, least = (1, 1), math.inf
    for rows in range(1, min(cells, MAX_DRAWN_SIDE // TOKEN_PIXELS) + 1):
        most, near = min(cells // rows, MAX_DRAWN_SIDE // TOKEN_PIXELS), int(rows * ratio)
        for columns in {max(1, min(most, near)), min(most, near + 1)}:
            cost = abs(math.log(columns / rows / ratio)) + 0.5 * math.log(cells / (rows * columns))
            if cost < least:
                best, least = (columns, rows), cost
    return best[0] * TOKEN_PIXELS, best[1] * TOKEN_PIXELS


def targets(
    sources: Sequence[Size],
    side: int,
    *,
    width: object = None,
    height: object = None,
    image_size: object = None,
    max_pixels: object = None,
) -> list[Size]:
    """Return the sizes at which sources (width, height) are read and drawn again by a model of squares of `side` px.

    Without a wish each keeps its shape, at `side` squared or `max_pixels`; of one side that is given the other follows;
    `image_size` is both. Raises ConfigError: a value out of range, or a size beside another or `max_pixels`.
    """
    if image_size is not None:
        if width is not None or height is not None:
            raise ConfigError("Give either image_size, for a square, or height and width.")
        width = height = _side("image_size", image_size)
        if height % TOKEN_PIXELS:
            raise ConfigError(f"image_size is {height}; take a multiple of 28 (for example {nearest(height, 28)[0]}).")
    if width is None and height is None:
        most = side**2
        if max_pixels is not None:
            most = check_number("max_pixels", max_pixels, TOKEN_PIXELS**2, MAX_DRAWN, whole=True, kind=ConfigError)
        known = {source: like(source, most) for source in set(sources)}
        return [known[source] for source in sources]
    if max_pixels is not None:
        raise ConfigError("Give either a size or max_pixels: a size needs no limit.")
    if width is None or height is None:
        side = _side("width or height", height if width is None else width)
        if width is None:
            return [drawn(max(TOKEN_PIXELS, round(side * w / h)), side) for w, h in sources]
        return [drawn(side, max(TOKEN_PIXELS, round(side * h / w))) for w, h in sources]
    return [drawn(width, height)] * len(sources)


def parse(text: str) -> Size:
    """Read "448x336", or "448" for a square: width and height as they are written. Raises ConfigError: another form."""
    found = re.fullmatch(r"([0-9]{1,6})(?:[xX×]([0-9]{1,6}))?", text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is no size; write 448x336 (width x height), or 448 for a square.")
    return int(found[1]), int(found[2] or found[1])


def grouped(sizes: Sequence[Size]) -> dict[Size, list[int]]:
    """Return which places of a list have each size, in order of first appearance."""
    groups: dict[Size, list[int]] = {}
    for place, size in enumerate(sizes):
        groups.setdefault(size, []).append(place)
    return groups


def cells(size: Size) -> int:
    """Return how many image tokens, N, a picture has."""
    return size[0] * size[1] // TOKEN_PIXELS**2
