"""Contact sheets. In: small pictures, captions. Out: one page of them, for looking at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
    images: Sequence[Image.Image | np.ndarray], columns: int = 8, captions: Sequence[str] | None = None, gap: int = 6
) -> Image.Image:
    """Lay IMAGES (PIL or uint8 HWC) out in rows of COLUMNS, each over its caption; returns an RGB picture."""
    if not images:
        raise ValueError("contact_sheet was given no images; give at least one")
    pictures = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    font = ImageFont.load_default(10)
    texts = [textwrap.wrap(text, max(8, width // 5)) for text in captions or ()]
    band = 12 * max((len(lines) for lines in texts), default=0)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + band + gap) + gap), (238, 238, 238))
    pen = ImageDraw.Draw(page)
    for index, picture in enumerate(pictures):
        x = gap + index % columns * (width + gap)
        y = gap + index // columns * (height + band + gap)
        page.paste(picture, (x, y), picture if picture.mode == "RGBA" else None)
        for line, text in enumerate(texts[index] if index < len(texts) else ()):
            pen.text((x, y + height + 12 * line), text, fill=(20, 20, 20), font=font)
    return page
