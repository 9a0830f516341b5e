"""Pictures: read, made square and shaped back, cut into tiles, turned into tensors and back, compared.

In:  files, bytes, Pillow pictures, arrays (H,W[,C]) and tensors ([C,]H,W) of any mode, size and orientation. Out:
upright 8-bit RGB pictures; pixels (M,3,H,W) normalised by ImageNet's mean and standard deviation; PSNR and SSIM.
"""

import base64
import io
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from unilip.errors import ImageError, check_choice
from unilip.files import png_bytes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # of Pillow's: none that starts another program
MAX_PIXELS = 100_000_000
MAX_SIDE = 32_768
SCAN = b"\xff\xda"  # begins a scan of a JPEG
MAX_SCANS = 100  # of a JPEG: each is decoded over the whole picture, and a progressive one needs about ten
PSNR_LIMIT = 100.0  # dB, for pictures that are equal: so means of dB stay numbers

ImageLike = Image.Image | np.ndarray | Tensor | str | os.PathLike[str] | bytes | io.IOBase
Fit = Literal["resize", "crop", "pad"]
FITS = ("resize", "crop", "pad")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def open_picture(source: bytes | str | os.PathLike[str], formats: Sequence[str] = FORMATS) -> Image.Image:
    """Open an encoded picture, without decoding it yet. The one place where Pillow meets foreign bytes.

    Raises ImageError: no such file, another format than those allowed, too large, or a JPEG of more than 100 scans.
    """
    name = "The image" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        image = Image.open(io.BytesIO(data), formats=tuple(formats))
    except FileNotFoundError as error:
        raise ImageError(f"There is no image file {name}; check the path.") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ImageError(f"{name} is not an image file to be read ({error.strerror}); give one, or several.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large to decode ({error}); scale it down first.") from error
    except Exception as error:  # what the readers of formats raise for foreign or broken bytes
        allowed = ", ".join(formats)
        raise ImageError(f"{name} is not an image that can be read (allowed: {allowed}), or it is damaged.") from error
    check_size(*image.size, name)
    if image.format in ("JPEG", "MPO") and (scans := data.count(SCAN, max(0, data.find(SCAN)))) > MAX_SCANS:
        raise ImageError(f"{name} is a JPEG of {scans} scans; at most {MAX_SCANS} are decoded. Save it anew.")
    return image


def load_image(image: ImageLike) -> Image.Image:
    """Return an upright 8-bit RGB picture of a path, a file's bytes, Pillow image, array (H,W[,C]) or tensor ([C,]H,W).

    Arrays and tensors hold floats in [0,1] or integers in 0..255 (uint16: 0..65535). Palettes, transparency (over
    white), 16-bit and CMYK are converted; EXIF rotation is applied.
    Raises ImageError: unreadable, truncated, empty, out of range, of a format not allowed, or over 100 million pixels.
    """
    name = "The image"
    if isinstance(image, Tensor):
        values = image.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        if values.dim() == 3 and len(values) not in (1, 3, 4):
            raise ImageError(f"An image tensor must be (H,W) or (1, 3 or 4,H,W), not {tuple(values.shape)}.")
        image = _array_to_image((values.movedim(0, -1) if values.dim() == 3 else values).numpy())
    elif isinstance(image, np.ndarray):
        image = _array_to_image(image)
    elif isinstance(image, (str, os.PathLike)):
        name = str(image)
        if re.match("https?:/", name):
            raise ImageError(f"{name} is an address; download it, and give the file.")
        image = open_picture(os.path.expanduser(image))
    elif isinstance(image, (bytes, io.IOBase)):  # what a file holds, or one that is open
        held = image if isinstance(image, bytes) else image.read()
        image = open_picture(bytes(held)) if isinstance(held, (bytes, bytearray)) else image
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise ImageError(f"Expected a path, a file's bytes, a Pillow image, an array or a tensor, not {kind}.")
    check_size(*image.size, name)
    try:
        return _to_rgb(upright(image))
    except ImageError:
        raise
    except Exception as error:  # whatever the decoder of a format raises for a broken file
        raise ImageError(f"{name} cannot be decoded ({error}); it may be cut off. Give a whole PNG or JPEG.") from error


def each(value: Any) -> list[Any]:
    """Take one picture or several as a list: a list, a batch (B,3,H,W) or (B,H,W,3), what has `images`, are several."""
    value = getattr(value, "images", value)
    batch = isinstance(value, (Tensor, np.ndarray)) and value.ndim == 4
    return list(value) if batch or isinstance(value, (list, tuple)) else [value]


def check_size(width: int, height: int, name: str = "The image") -> None:
    """Refuse empty and gigantic pictures before they are decoded."""
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height} px; both sides must be at least 1.")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name} is {width}x{height} px; at most {MAX_SIDE} px a side and {MAX_PIXELS // 1_000_000} million in "
            "all are read. Scale it down first."
        )


def upright(image: Image.Image) -> Image.Image:
    """Decode a picture and turn it as its EXIF says; broken EXIF does not make the picture so."""
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # of struct, of XML, of text that is no number
        turn = None
    if turn is not None:
        image = image.transpose(turn)  # which copies what the picture says of itself: loaded again, it stays upright
        image.info = {name: said for name, said in image.info.items() if name == "transparency"}
    return image


def _array_to_image(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise ImageError(f"An image array must be (H,W), (H,W,3) or (H,W,4), not {array.shape}.")
    if array.dtype.newbyteorder("=") == np.uint16:
        low = array // 257  # 0..65535 to 0..255, in two bytes a value
        return Image.fromarray((low + (array - low * 257 > 128)).astype(np.uint8))
    if array.dtype.kind in "iu":
        if array.min() < 0 or array.max() > 255:
            raise ImageError(f"The image array holds integers from {array.min()} to {array.max()}; allowed: 0 to 255.")
        return Image.fromarray(array.astype(np.uint8))
    if array.dtype.kind not in "fb":
        raise ImageError(f"The image array holds {array.dtype}; give uint8, or floats in [0,1].")
    least, most = float(array.min()), float(array.max())
    if not np.isfinite([least, most]).all():
        raise ImageError("The image array holds NaN or infinite values; give uint8, or floats in [0,1].")
    if least < -0.5 or most > 1.5:  # a little overshoot, as resizing makes it, is clipped
        raise ImageError(f"The image array holds values from {least:g} to {most:g}; give uint8, or floats in [0,1].")
    return Image.fromarray((np.clip(array, 0, 1) * 255).round().astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 and 32 bit greys; Pillow's own conversion clips them
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError(f"The image holds greys from {grey.min()} to {grey.max()}; allowed: 0 to 65535.")
        image = _array_to_image(grey.astype(np.uint16))
    elif image.mode == "F":
        grey = np.asarray(image)
        top = 65535 if grey.max() > 255 else 255 if grey.max() > 1.5 else 1
        image = _array_to_image(grey / np.float32(top))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit_square(image: Image.Image, size: int, fit: Fit = "resize") -> Image.Image:
    """Make an RGB picture `size` x `size`; see `fit_picture`."""
    return fit_picture(image, (size, size), fit)


def fit_picture(image: Image.Image, size: tuple[int, int], fit: Fit = "resize") -> Image.Image:
    """Give an RGB picture a size (width, height): "resize" stretches, "crop" keeps the centre, "pad" adds white."""
    check_choice("way to fit an image called", fit, FITS, ImageError)
    if fit == "crop":
        return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    if fit == "pad":
        left, top, right, bottom = _inner_box(image.size, size)
        framed = Image.new("RGB", size, "white")
        framed.paste(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
        return framed
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _inner_box(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the centred box (left, top, right, bottom) of a picture of `size` scaled to fit into a frame."""
    share, whole = min(((f, s) for f, s in zip(frame, size, strict=True)), key=lambda pair: pair[0] / pair[1])
    width, height = (max(1, round(length * share / whole)) for length in size)
    left, top = (frame[0] - width) // 2, (frame[1] - height) // 2
    return left, top, left + width, top + height


def unfit_square(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """Undo `fit_picture` at the aspect ratio of `size`, not enlarging: "resize" stretches back, "pad" cuts borders."""
    if fit == "crop" or size[0] * image.height == size[1] * image.width:
        return image
    left, top, right, bottom = _inner_box(size, image.size)
    if fit == "pad":
        return image.crop((left, top, right, bottom))
    return image.resize((right - left, bottom - top), Image.Resampling.BICUBIC)


def tile_grid(width: int, height: int, size: int, max_tiles: int) -> tuple[int, int]:
    """Choose the columns and rows (at most `max_tiles` in all) nearest to the picture's ratio, the largest filled."""
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)]
    best, nearest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        filled = width * height > 0.5 * size**2 * columns * rows
        if distance < nearest or (distance == nearest and filled):
            best, nearest = (columns, rows), distance
    return best


def tile(image: Image.Image, size: int, max_tiles: int) -> list[Image.Image]:
    """Cut an RGB picture into up to `max_tiles` squares of `size` px and a thumbnail, as InternVL; one is plain."""
    columns, rows = tile_grid(image.width, image.height, size, max_tiles)
    if columns * rows == 1:
        return [fit_square(image, size)]
    whole = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
    tiles = [whole.crop((left, top, left + size, top + size)) for left, top in corners]
    return [*tiles, fit_square(image, size)]


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Normalise equally sized RGB pictures: -> (M,3,H,W) float32."""
    array = np.stack([np.asarray(image, dtype=np.uint8) for image in images])  # M H W 3
    return normalise(torch.from_numpy(array).movedim(-1, 1).float() / 255)


def normalise(pixels: Tensor) -> Tensor:
    """Map (...,3,H,W) from [0,1] to ImageNet-normalised values."""
    mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def to_images(pixels: Tensor, maker: str = "pixel decoder") -> list[Image.Image]:
    """Turn (M,3,H,W), clipped to [0,1], into Pillow pictures. Raises ImageError, naming `maker`: NaN or infinity."""
    values = pixels.detach().float()
    if not values.isfinite().all():
        kind = str(pixels.dtype).removeprefix("torch.")
        raise ImageError(
            f"The {maker} made a picture of NaN or infinite values, in {kind}. Load the model in another precision "
            "(dtype float32 or bfloat16), or look at its weights."
        )
    array = values.clamp(0, 1).mul(255).round().byte().movedim(1, -1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (B,) in dB of pictures (B,3,H,W) in [0,1], at most PSNR_LIMIT."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return (-10 * torch.log10(error.clamp_min(1e-30))).clamp_max(PSNR_LIMIT)


def picture_psnr(a: Image.Image | np.ndarray, b: Image.Image | np.ndarray, where: np.ndarray | None = None) -> float:
    """Return the PSNR in dB of two 8-bit pictures, over the pixels `where` (H,W) if given, at most PSNR_LIMIT."""
    x, y = (torch.from_numpy(np.array(picture if where is None else np.asarray(picture)[where])) for picture in (a, b))
    return float(psnr(x[None].double() / 255, y[None].double() / 255)[0])


def ssim(a: Tensor, b: Tensor, data_range: float = 1.0, gaussian: bool = False) -> Tensor:
    """Return the structural similarity (B,) of pictures (B,3,H,W) in [0,1], mean over channels and the inside.

    A uniform 7 x 7 window with sample covariance, as scikit-image's default; or with `gaussian` the 11 x 11 one of Wang
    et al. 2004 (sigma 1.5). The paper's numbers have a `data_range` of 2.0. Raises ImageError: a side is shorter.
    """
    places = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    line = torch.exp(-0.5 * (places / 1.5) ** 2) if gaussian else torch.ones_like(places[:7])
    line, side = line / line.sum(), len(line)
    if min(a.shape[-2:]) < side:
        raise ImageError(f"SSIM needs pictures of at least {side} pixels a side, not {tuple(a.shape[-2:])}.")

    def mean(values: Tensor) -> Tensor:
        rows = F.conv2d(values.flatten(0, 1)[:, None], line.view(1, 1, side, 1))
        return F.conv2d(rows, line.view(1, 1, 1, side))[:, 0].unflatten(0, values.shape[:2])

    a, b = a.double(), b.double()
    share = 1.0 if gaussian else side**2 / (side**2 - 1)
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = share * (mean(a * a) - mean_a**2), share * (mean(b * b) - mean_b**2)
    both = share * (mean(a * b) - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    value = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return value.flatten(1).mean(1)


def picture_ssim(a: Image.Image | np.ndarray, b: Image.Image | np.ndarray) -> float:
    """Return the SSIM of two 8-bit RGB pictures with the Gaussian window."""
    x, y = (torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double() / 255 for picture in (a, b))
    return float(ssim(x, y, gaussian=True)[0])


def as_html(images: Sequence[Image.Image]) -> str:
    """Pictures as HTML that holds them, for a notebook."""
    shown = (base64.b64encode(png_bytes(image)).decode() for image in images)
    return "\n".join(f'<img src="data:image/png;base64,{one}">' for one in shown)


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
