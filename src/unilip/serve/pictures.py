"""Bytes of strangers -> pictures, and pictures -> bytes with a note of where they came from. Nothing touches the disk.

The structure of PNG, JPEG, WebP or GIF is walked and its size read before any decoder sees it: what is too large,
animated or truncated is refused. What follows the picture (a phone's second picture, a gain map, a film) is cut off.
"""

import base64
import binascii
import io
import json
import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps

from unilip import __version__
from unilip.errors import ImageError
from unilip.files import png_bytes
from unilip.pictures import MAX_SIDE, load_image, open_picture, unfit_square, upright

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_JPEG_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_JPEG_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_END = re.compile(rb"\xff[^\x00\x01\xd0-\xd7]")  # of a scan: the next marker that is not part of it
MAX_PIECES = 20_000  # chunks, segments or blocks of a file
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an upright RGB picture. Raises ImageError: no whole PNG, JPEG, WebP or GIF of one frame, or too large."""
    return load_image(_open(data, max_pixels))


def decode_mask(data: bytes, max_pixels: int) -> Image.Image:
    """Decode a mask into "L": 255, where it was transparent, may change. Raises ImageError: as `decode`, or opaque."""
    image = _open(data, max_pixels)
    try:
        image = upright(image)
        if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
            raise ImageError("The mask has no transparency; make it transparent where the picture may change.")
        return ImageOps.invert(image.convert("RGBA").getchannel("A"))
    except ImageError:
        raise
    except Exception as error:
        raise ImageError("The mask cannot be decoded; send a whole PNG with transparency.") from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    kind, width, height, end = probe(data)
    if width < 1 or height < 1:
        raise ImageError(f"The image is {width}x{height} px; both sides must be at least 1.")
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        left = f"{max_pixels} pixels are left of what a request may send, at most {MAX_SIDE} a side"
        raise ImageError(f"The image is {width}x{height} px; {left}. Scale it down.")
    image = open_picture(data[:end], (kind.upper(),))
    if image.size != (width, height):
        raise ImageError("The image gives two different sizes for itself; save it anew.")
    if kind != "jpeg" and getattr(image, "n_frames", 1) != 1:  # of a JPEG, the first is what there is
        raise ImageError("The image has several frames; send a single still picture.")
    return image


def probe(data: bytes) -> tuple[str, int, int, int]:
    """Walk the structure of a file: return its format, width and height in pixels, and where its picture ends.

    Raises ImageError: it is no PNG, JPEG, WebP or GIF, is animated, has too many pieces, or ends early.
    """
    walks = (
        (b"\x89PNG\r\n\x1a\n", "png", _walk_png), (b"\xff\xd8\xff", "jpeg", _walk_jpeg), (b"GIF8", "gif", _walk_gif),
        (b"RIFF", "webp", _walk_webp),
    )  # fmt: skip
    kind, walk = next(((kind, walk) for start, kind, walk in walks if data.startswith(start)), ("", None))
    if walk is None:
        raise ImageError("The data is no PNG, JPEG, WebP or GIF; send one of these.")
    try:
        width, height, end = walk(data)
        if end > len(data):
            raise IndexError
    except (struct.error, IndexError) as error:
        raise ImageError(f"The {kind.upper()} ends too early; it was cut off. Send the whole file.") from error
    return kind, width, height, end


def _walk_png(data: bytes) -> tuple[int, int, int]:
    place, size = 8, (0, 0)
    for _ in range(MAX_PIECES):
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if zlib.crc32(memoryview(data)[place + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise ImageError("The PNG is damaged: a checksum does not fit. Save it anew.")
        if place == 8:
            if name != b"IHDR" or length != 13:
                raise ImageError("The PNG does not begin with its header; save it anew.")
            size = struct.unpack_from(">II", data, place + 8)
        if name in (b"acTL", b"fcTL", b"fdAT"):
            raise ImageError("The PNG is animated; send a single still picture.")
        if name == b"IEND":
            return *size, end
        place = end
    raise ImageError(f"The PNG has more than {MAX_PIECES} chunks; save it anew.")


def _walk_jpeg(data: bytes) -> tuple[int, int, int]:
    place, size = 2, (0, 0)
    for _ in range(MAX_PIECES):
        if data[place] != 0xFF:
            raise ImageError("The JPEG is damaged between two segments; save it anew.")
        marker = data[place + 1]
        if marker == 0xFF:  # filling
            place += 1
        elif marker == 0xD9:
            return *size, place + 2
        elif marker in _JPEG_ALONE:
            place += 2
        else:
            (length,) = struct.unpack_from(">H", data, place + 2)
            if length < 2:
                raise ImageError("The JPEG is damaged: a segment has no length. Save it anew.")
            if marker in _JPEG_FRAME:
                height, width = struct.unpack_from(">HH", data, place + 5)
                if size not in ((0, 0), (width, height)):
                    raise ImageError("The JPEG gives two different sizes for itself; save it anew.")
                size = (width, height)
            place += 2 + length
            if marker == 0xDA:  # the compressed picture follows
                found = _JPEG_END.search(data, place)
                place = found.start() if found else len(data)  # at which there is nothing
    raise ImageError(f"The JPEG has more than {MAX_PIECES} segments; save it anew.")


def _walk_gif(data: bytes) -> tuple[int, int, int]:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    place, frames = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), 0
    for _ in range(MAX_PIECES):
        kind = data[place]
        if kind == 0x3B:
            return width, height, place + 1
        if kind == 0x2C:
            frames += 1
            flags = data[place + 9]
            place += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        elif kind == 0x21:
            place += 2
        else:
            raise ImageError("The GIF is damaged between two blocks; save it anew.")
        if frames > 1:
            raise ImageError("The GIF is animated; send a single still picture.")
        while data[place]:
            place += 1 + data[place]
        place += 1
    raise ImageError(f"The GIF has more than {MAX_PIECES} blocks; save it anew.")


def _walk_webp(data: bytes) -> tuple[int, int, int]:
    (length,) = struct.unpack_from("<I", data, 4)
    end = 8 + length + length % 2
    name = data[12:16] if data[8:12] == b"WEBP" else b""
    if name == b"VP8X":
        if data[20] & 0x02:
            raise ImageError("The WebP is animated; send a single still picture.")
        width, height = (1 + int.from_bytes(data[i : i + 3], "little") for i in (24, 27))
    elif name == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif name == b"VP8 ":
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", data, 26))
    else:
        raise ImageError("The WebP does not begin with a picture; save it anew.")
    return width, height, end


def from_data_url(url: str) -> bytes:
    """Return the bytes of a data: URL in base64. Raises ImageError: it is not one."""
    head, comma, body = url.partition(",")
    if not comma or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise ImageError("A data URL must look like data:image/png;base64,...; send the picture that way.")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("The data URL holds no valid base64; encode the picture again.") from error


def encode(image: Image.Image, form: str = "png", quality: int = 95, about: Mapping[str, Any] | None = None) -> bytes:
    """Encode a picture as "png", "jpeg" or "webp" (`quality` 0 to 100 for the latter two).

    `about` (model, seed, ...) is written into the metadata, beside this program's name and IPTC's source type.
    """
    software, note = f"unilip {__version__}", {**(about or {}), "digital_source_type": _SOURCE_TYPE}
    if form == "png":
        notes = {} if about is None else {"Software": software, **note}
        return png_bytes(image, {key: str(value) for key, value in notes.items()})
    out, exif = io.BytesIO(), Image.Exif()
    if about is not None:
        exif[0x0131] = software
        exif[0x010E] = json.dumps(note, ensure_ascii=True)  # ImageDescription
    image.save(out, form.upper(), quality=quality, exif=exif)
    return out.getvalue()


def outside_kept(
    result: Image.Image, source: Image.Image, mask: Image.Image, fit: Any, longest: int = 2048
) -> Image.Image:
    """Return the source, no side above `longest`, with the model's `result` where the mask ("L", 255) allows it."""
    scale = min(1.0, longest / max(source.size))
    if scale < 1:
        size = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
        source, mask = source.resize(size, Image.Resampling.BICUBIC), mask.resize(size, Image.Resampling.NEAREST)
    shaped = unfit_square(result, source.size, fit)
    return Image.composite(shaped.resize(source.size, Image.Resampling.BICUBIC), source, mask)
