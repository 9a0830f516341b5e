"""Bytes of strangers -> pictures, and pictures -> bytes with a note of where they came from. Nothing touches the disk.

In:  PNG, JPEG or WebP bytes. Their structure is walked and their size read before any decoder sees them: a file that is
     too large, animated, truncated, or that goes on after its picture (so that it may be another kind of file as well)
     is refused.
Out: upright RGB pictures; PNG, JPEG or WebP bytes whose metadata name model and seed.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import struct
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin

from unilip import __version__
from unilip.errors import ImageError
from unilip.pictures import MAX_SIDE, load_image, unfit_square

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_JPEG_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_JPEG_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode a whole PNG, JPEG or WebP of one frame into an upright RGB picture.

    Raises:
        ImageError: another format, too many pixels, more than one frame, truncated, or bytes after the end.
    """
    kind, image = _open(data, max_pixels)
    try:
        return load_image(image)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"The {kind.upper()} cannot be decoded; send a whole PNG, JPEG or WebP.") from error


def decode_mask(data: bytes, max_pixels: int) -> Image.Image:
    """Decode a mask into "L": 255 where the picture may change. Transparent means change, as OpenAI has it.

    Raises:
        ImageError: as `decode`, or the mask has no transparency.
    """
    _, image = _open(data, max_pixels)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
            raise ImageError("The mask has no transparency; make it transparent where the picture may change.")
        alpha = image.convert("RGBA").getchannel("A")
    except ImageError:
        raise
    except Exception as error:
        raise ImageError("The mask cannot be decoded; send a whole PNG with transparency.") from error
    return alpha.point([255 - value for value in range(256)])


def _open(data: bytes, max_pixels: int) -> tuple[str, Image.Image]:
    kind, width, height = probe(data)
    if width < 1 or height < 1:
        raise ImageError(f"The image is {width}x{height} px; both sides must be at least 1.")
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"The image is {width}x{height} px; at most {max_pixels} pixels are read. Scale it down first."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=(kind.upper(),))
    except Exception as error:
        raise ImageError(f"The {kind.upper()} cannot be read; it may be damaged. Send a whole file.") from error
    if image.size != (width, height):
        raise ImageError("The image gives two different sizes for itself; save it anew.")
    if getattr(image, "n_frames", 1) != 1:
        raise ImageError("The image has several frames; send a single still picture.")
    return kind, image


def probe(data: bytes) -> tuple[str, int, int]:
    """Walk the structure of a file: return its format, width and height in pixels.

    Raises:
        ImageError: it is no PNG, JPEG or WebP, is animated, ends early, or does not end with its picture.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kind, walk = "png", _walk_png
    elif data.startswith(b"\xff\xd8\xff"):
        kind, walk = "jpeg", _walk_jpeg
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind, walk = "webp", _walk_webp
    else:
        raise ImageError("The data is no PNG, JPEG or WebP; send one of these.")
    try:
        width, height, end = walk(data)
    except (struct.error, IndexError) as error:
        raise ImageError(f"The {kind.upper()} ends too early; it was cut off. Send the whole file.") from error
    if end > len(data):
        raise ImageError(f"The {kind.upper()} ends too early; it was cut off. Send the whole file.")
    if end < len(data):
        raise ImageError(f"The {kind.upper()} is followed by {len(data) - end} other bytes; send the picture alone.")
    return kind, width, height


def _walk_png(data: bytes) -> tuple[int, int, int]:
    """Return width, height and the end of a PNG; every chunk's checksum is compared."""
    place, size = 8, (0, 0)
    while True:
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            raise IndexError
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


def _walk_jpeg(data: bytes) -> tuple[int, int, int]:
    """Return width, height and the end of a JPEG."""
    place, size = 2, (0, 0)
    while True:
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
            if marker == 0xDA:  # the compressed picture: on to the next marker that is not part of it
                while data[place : place + 1] != b"\xff" or data[place + 1] == 0 or data[place + 1] in _JPEG_ALONE:
                    place = data.find(b"\xff", place + 1)
                    if place < 0:
                        raise IndexError


def _walk_webp(data: bytes) -> tuple[int, int, int]:
    """Return width, height and the end of a WebP."""
    (length,) = struct.unpack_from("<I", data, 4)
    end = 8 + length + length % 2
    name = data[12:16]
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
    """Return the bytes of a data: URL in base64.

    Raises:
        ImageError: it is not one.
    """
    head, comma, body = url.partition(",")
    if not comma or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise ImageError("A data URL must look like data:image/png;base64,...; send the picture that way.")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("The data URL holds no valid base64; encode the picture again.") from error


def encode(image: Image.Image, form: str = "png", quality: int = 95, about: Mapping[str, Any] | None = None) -> bytes:
    """Encode a picture as "png", "jpeg" or "webp" (`quality` 0 to 100 for the latter two).

    `about` (model, seed, ...) is written into the metadata, beside the names of this program and of IPTC's source type
    for pictures made by a model; None writes nothing.
    """
    out = io.BytesIO()
    note = None if about is None else {**about, "digital_source_type": _SOURCE_TYPE}
    software = f"unilip {__version__}"
    if form == "png":
        info = PngImagePlugin.PngInfo()
        for key, value in ({} if note is None else {"Software": software, **note}).items():
            text = str(value)
            info.add_text(key, text) if text.isascii() else info.add_itxt(key, text)
        image.save(out, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        if note is not None:
            exif[0x0131] = software
            exif[0x010E] = json.dumps(note, ensure_ascii=True)  # ImageDescription
        image.save(out, form.upper(), quality=quality, exif=exif)
    return out.getvalue()


def outside_kept(
    result: Image.Image, source: Image.Image, mask: Image.Image, fit: Any, longest: int = 2048
) -> Image.Image:
    """Return the source with the model's square `result` put where the mask ("L", 255 is inside) allows it.

    The picture has the source's size, but no side above `longest`; outside the mask its pixels are the source's.
    """
    scale = min(1.0, longest / max(source.size))
    if scale < 1:
        size = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
        source, mask = source.resize(size, Image.Resampling.BICUBIC), mask.resize(size, Image.Resampling.NEAREST)
    shaped = unfit_square(result, source.size, fit)
    return Image.composite(shaped.resize(source.size, Image.Resampling.BICUBIC), source, mask)
