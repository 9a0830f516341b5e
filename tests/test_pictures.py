"""Pictures of every kind become RGB squares; those of strangers are read with care; measures compare two of them."""

import io
import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from skimage.metrics import structural_similarity

from unilip.errors import ImageError
from unilip.pictures import (
    FITS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_SCANS,
    PSNR_LIMIT,
    fit_square,
    load_image,
    normalise,
    open_picture,
    picture_psnr,
    picture_ssim,
    ssim,
    tile,
    tile_grid,
    to_images,
    to_pixels,
    unfit_square,
)


def encoded(form: str, **options) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 20), (9, 9, 9)).save(out, form, **options)
    return out.getvalue()


def test_broken_exif_does_not_make_a_picture_broken():
    raw = PngImagePlugin.PngInfo()
    raw.add_text("Raw profile type exif", "\nexif\n 8\nzz")
    nan = b"MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\x01\x1a\0\x0b\0\0\0\x01\x7f\xc0\0\0\0\0\0\0"
    cases = {
        "no TIFF header": (encoded("PNG", exif=b"\0\x08\0\x02\x01\x12\0\x03"), (40, 20)),
        "text": (encoded("WEBP", exif=b"Exif\0\0b'Exif"), (40, 20)),
        "not hex": (encoded("PNG", pnginfo=raw), (40, 20)),
        "turned, with a resolution of NaN": (encoded("PNG", exif=nan), (20, 40)),
    }
    sizes = {name: load_image(open_picture(data)).size for name, (data, _) in cases.items()}
    assert sizes == {name: size for name, (_, size) in cases.items()}


def test_formats_that_start_programs_or_are_not_allowed_are_refused_whatever_they_are_called(tmp_path):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for name, data in (("a.jpg", script), ("b.png", b"%PDF-1.4\n"), ("c.webp", b"qoif" + bytes(10))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=rf"{name} is not an image .*PNG, JPEG"):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="allowed: PNG, JPEG"):
        open_picture(encoded("GIF"), ("PNG", "JPEG"))


def test_a_jpeg_of_thousands_of_scans_is_refused_and_a_progressive_one_is_read():
    data = encoded("JPEG", progressive=True)
    assert load_image(open_picture(data)).size == (40, 20)
    start = data.rindex(b"\xff\xda")
    scan = data[start:-2]
    with pytest.raises(ImageError, match=rf"scans; at most {MAX_SCANS}"):
        open_picture(data[:-2] + scan * 2000 + data[-2:])


def test_a_truncated_file_is_named(tmp_path):
    (tmp_path / "half.png").write_bytes(encoded("PNG")[:60])
    with pytest.raises(ImageError, match=r"half\.png"):
        load_image(tmp_path / "half.png")


def test_sixteen_bits_round_to_the_nearest_of_eight():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    nearest = np.round(values / 257).astype(np.uint8)
    for picture in (values, Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        assert np.array_equal(np.asarray(load_image(picture))[..., 0], nearest)
    with pytest.raises(ImageError, match="0 to 65535"):
        load_image(Image.fromarray(np.full((2, 2), 70000, np.int32)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_picture_that_is_no_number_is_an_error_that_names_the_part(value):
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.float16)
    pixels[1, 0, 2, 2] = value
    with pytest.raises(ImageError, match=r"autoencoder .*float16"):
        to_images(pixels, "autoencoder")


def test_psnr_and_ssim_of_pictures():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 255, (30, 24, 3), dtype=np.uint8) for _ in "ab")
    error = ((a / 255 - b / 255) ** 2).mean()
    assert picture_psnr(a, Image.fromarray(b)) == pytest.approx(-10 * np.log10(error))
    assert picture_psnr(a, a) == PSNR_LIMIT  # a number, so that means of several are numbers
    half = a.copy()
    half[:, 12:] = b[:, 12:]
    where = np.zeros((30, 24), bool)
    where[:, :12] = True
    assert picture_psnr(half, a, where) == PSNR_LIMIT > picture_psnr(half, a, ~where)
    theirs = structural_similarity(
        a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert picture_ssim(a, b) == pytest.approx(theirs, abs=1e-6)
    with pytest.raises(ImageError, match="at least 7 pixels"):
        ssim(torch.zeros(1, 3, 6, 9), torch.zeros(1, 3, 6, 9))


def pixel(image: object, x: int = 0, y: int = 0) -> tuple[int, ...]:
    """The colour of one pixel of what `load_image` makes of a picture."""
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    return loaded.getpixel((x, y))


# --- modes ------------------------------------------------------------------------------------------------------------


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert (pixel(image), pixel(image, 1)) == ((10, 20, 30), (40, 50, 60))


def test_transparency_shows_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert (pixel(image), pixel(image, 1)) == ((255, 0, 0), (255, 255, 255))
    assert pixel(Image.new("RGBA", (1, 1), (0, 0, 0, 128))) == (127, 127, 127)
    assert pixel(Image.new("LA", (1, 1), (0, 0))) == (255, 255, 255)
    assert pixel(Image.new("LA", (1, 1), (7, 255))) == (7, 7, 7)


def test_a_transparent_palette_entry_shows_white(tmp_path):
    image = Image.new("P", (1, 1))
    image.putpalette([10, 20, 30])
    image.save(tmp_path / "a.png", transparency=0)
    assert pixel(tmp_path / "a.png") == (255, 255, 255)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (32896, 128), (65535, 255)])
def test_sixteen_bits(value, expected, tmp_path):
    array = np.full((1, 1), value, np.uint16)
    Image.fromarray(array).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == pixel(array) == (expected,) * 3
    assert pixel(Image.fromarray(array.astype(np.int32))) == (expected,) * 3


@pytest.mark.parametrize(("value", "expected"), [(0.5, 128), (1.0, 255), (200.0, 200), (65535.0, 255)])
def test_float_greys(value, expected):
    assert pixel(Image.fromarray(np.full((1, 1), value, np.float32))) == (expected,) * 3


def test_one_bit_cmyk_and_other_colour_spaces():
    assert pixel(Image.new("1", (1, 1), 1)) == (255, 255, 255)
    assert pixel(Image.new("CMYK", (1, 1), (0, 255, 255, 0))) == (255, 0, 0)
    assert pixel(Image.new("HSV", (1, 1), (0, 255, 255))) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation, tmp_path):
    upright = Image.new("RGB", (4, 2), "blue")
    upright.putpixel((0, 0), (255, 0, 0))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # numbers of Image.Transpose that make the stored picture
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    loaded = load_image(tmp_path / "a.png")
    for upright in (loaded, load_image(loaded), load_image(loaded.copy())):  # what was turned is not turned again
        assert upright.size == (4, 2)
        assert upright.getpixel((0, 0)) == (255, 0, 0)


# --- arrays and tensors -----------------------------------------------------------------------------------------------


def test_arrays():
    colours = np.array([[[0, 128, 255], [1, 2, 3]]], np.uint8)  # H1 W2
    for array in (colours, colours.astype(np.int64), (colours / 255).astype(np.float32), colours / 255):
        assert load_image(array).size == (2, 1)
        assert (pixel(array), pixel(array, 1)) == ((0, 128, 255), (1, 2, 3)), array.dtype
    assert pixel(np.full((2, 2), 7, np.uint8)) == pixel(np.full((2, 2, 1), 7, np.uint8)) == (7, 7, 7)
    assert pixel(np.zeros((1, 1, 4), np.uint8)) == (255, 255, 255)
    assert pixel(np.ones((1, 1), bool)) == (255, 255, 255)
    for order in "<>":  # of the bytes
        assert pixel(np.full((1, 1), 257 * 7, f"{order}u2")) == (7, 7, 7)
        assert pixel(np.full((1, 1), 7 / 255, f"{order}f4")) == (7, 7, 7)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (2, 1), "red").save(tmp_path / "red.png")
    assert load_image("~/red.png").size == load_image(Path("~/red.png")).size == (2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8])
def test_tensors(dtype):
    values = torch.tensor([0, 255, 0]).view(3, 1, 1).expand(3, 1, 2)  # C3 H1 W2
    tensor = values.to(dtype) if dtype == torch.uint8 else (values / 255).to(dtype)
    assert load_image(tensor).size == (2, 1)
    assert pixel(tensor) == (0, 255, 0)
    assert load_image(tensor[0]).size == (2, 1)  # a grey (H,W) is not turned
    assert pixel(tensor[1:2]) == (255, 255, 255)
    with pytest.raises(ImageError, match=r"tensor must be .* not \(2, 80, 3\)"):  # the shape as it was given
        load_image(torch.zeros(2, 80, 3).to(dtype))
    assert pixel(tensor.clone().requires_grad_() if dtype.is_floating_point else tensor) == (0, 255, 0)


def test_a_little_overshoot_is_clipped():
    assert pixel(np.array([[-0.1, 1.1]])) == (0, 0, 0)
    assert pixel(np.array([[-0.1, 1.1]]), 1) == (255, 255, 255)


@pytest.mark.parametrize(
    "array",
    [
        np.full((2, 2, 3), np.nan),
        np.array([[0.5, np.inf]]),
        np.full((2, 2, 3), 200.0),  # 0..255 as floats would have turned white
        np.array([[-1.0, 1.0]]),  # normalised
        np.array([[300]]),
        np.array([[-1]]),
        np.zeros((2, 2, 2)),
        np.zeros((1, 2, 2, 3)),
        np.zeros(3),
        np.zeros((0, 4, 3)),
        np.zeros((2, 2), complex),
        np.array([["a"]]),
        torch.full((3, 2, 2), float("nan")),
        torch.zeros(1, 3, 2, 2),
        torch.zeros(3, 0, 2),
        torch.tensor(1.0),
    ],
    ids=lambda a: f"{type(a).__name__}-{a.dtype}-{tuple(a.shape)}",
)
def test_impossible_arrays_are_refused(array):
    with pytest.raises(ImageError, match=r"array"):
        load_image(array)


@pytest.mark.parametrize("thing", [None, 3, {}, ["a.png"]], ids=repr)
def test_other_things_are_refused(thing):
    with pytest.raises(ImageError, match=type(thing).__name__):
        load_image(thing)


def test_bytes_that_are_no_picture_are_refused():
    with pytest.raises(ImageError, match="not an image that can be read"):
        load_image(b"png")


# --- files ------------------------------------------------------------------------------------------------------------


def header_only_png(width: int, height: int) -> bytes:
    """The first bytes of a PNG of any size: enough to read how large it claims to be."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (50_000, 1), (1, 50_000), (11_000, 11_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_gigantic_pictures_are_refused_before_decoding(width, height, tmp_path):
    (tmp_path / "a.png").write_bytes(header_only_png(width, height))
    with pytest.raises(ImageError, match=r"[Ss]cale it down first"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_files(format, picture, tmp_path):
    buffer = io.BytesIO()
    picture(40, 30).save(buffer, format)
    data, path = buffer.getvalue(), tmp_path / "a.img"
    path.write_bytes(data)
    assert {load_image(given).size for given in (path, str(path), data, io.BytesIO(data))} == {(40, 30)}
    for kept in (0, 4, len(data) // 2, int(len(data) * 0.9)):
        path.write_bytes(data[:kept])
        with pytest.raises(ImageError, match=r"truncated|not an image"):
            load_image(path)


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    for path, words in (
        (tmp_path / "a.png", "not an image"),
        (tmp_path / "b.png", "no image file"),
        (tmp_path, "not an"),
        ("https://example.com/a.png", "https://example.com/a.png is an address; download it"),
        (b"hello", "not an image"),
        (io.StringIO("hello"), "not StringIO"),
    ):
        with pytest.raises(ImageError, match=words):
            load_image(path)
    for path in ("x" * 5000, "\0"):
        with pytest.raises(ImageError):
            load_image(path)


# --- squares ----------------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (1, 5000), (5000, 1), (56, 56), (57, 56), (80, 41), (41, 80), (300, 10), (640, 480)]


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_fits_and_comes_back(size, fit, picture):
    source = picture(*size)
    square = fit_square(source, 56, fit)
    assert square.size == (56, 56)
    back = unfit_square(square, size, fit)
    if fit == "crop":
        assert back.size == (56, 56)
    else:
        wanted = tuple(max(1, side * 56 / max(size)) for side in size)
        assert max(back.size) == 56
        assert max(abs(a - b) for a, b in zip(back.size, wanted, strict=True)) <= 0.5


@pytest.mark.parametrize("size", [(80, 40), (40, 80), (80, 41), (41, 80), (75, 33)], ids=str)
def test_pad_and_its_undoing_meet_at_the_pixel(size):
    square = fit_square(Image.new("RGB", size, "red"), 56, "pad")
    array = np.asarray(square)
    border = (array == 255).all(-1)
    assert border.any()
    assert set(map(tuple, array[~border])) == {(255, 0, 0)}
    back = np.asarray(unfit_square(square, size, "pad"))
    assert (back == (255, 0, 0)).all()
    assert back.shape[0] * back.shape[1] == (~border).sum()


def test_crop_keeps_the_centre_and_resize_keeps_all():
    image = Image.new("RGB", (120, 40), "red")
    image.paste((0, 0, 255), (40, 0, 80, 40))
    cropped = fit_square(image, 28, "crop")
    assert {cropped.getpixel((x, 14)) for x in range(2, 26)} == {(0, 0, 255)}
    stretched = fit_square(image, 28, "resize")
    assert stretched.getpixel((2, 14)) == (255, 0, 0)
    assert stretched.getpixel((14, 14)) == (0, 0, 255)


def test_resize_and_its_undoing_keep_a_smooth_picture(picture):
    source = picture(56, 28)
    back = unfit_square(fit_square(source, 56, "resize"), source.size, "resize")
    assert np.abs(np.asarray(back, float) - np.asarray(source, float)).mean() < 2


def test_a_square_of_the_right_size_is_left_alone(picture):
    image = picture(56, 56)
    assert np.array_equal(np.asarray(fit_square(image, 56)), np.asarray(image))


def test_an_unknown_fit_is_refused(picture):
    with pytest.raises(ImageError, match=r"squeeze.*resize, crop, pad"):
        fit_square(picture(), 56, "squeeze")


def test_normalising_and_back(picture):
    images = [picture(28, 28, seed) for seed in range(3)]
    pixels = to_pixels(images)
    assert pixels.shape == (3, 3, 28, 28)
    assert pixels.dtype == torch.float32
    expected = (np.asarray(images[1])[5, 7] / 255 - IMAGENET_MEAN) / IMAGENET_STD
    assert pixels[1, :, 5, 7].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    unit = torch.stack([torch.from_numpy(np.array(image)).movedim(-1, 0) / 255 for image in images])
    assert torch.allclose(normalise(unit), pixels, atol=1e-6)
    for before, after in zip(images, to_images(unit), strict=True):
        assert np.array_equal(np.asarray(before), np.asarray(after))


def test_pixels_out_of_range_become_black_or_white():
    array = np.asarray(to_images(torch.tensor([-1.0, 2.0, 0.5]).view(1, 3, 1, 1))[0])
    assert array.tolist() == [[[0, 255, 128]]]


# --- tiles ------------------------------------------------------------------------------------------------------------


def internvl_grid(width: int, height: int, size: int, most: int) -> tuple[int, int]:
    """Columns and rows by transformers' own rule for InternVL."""
    module = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    rows_columns = module.get_optimal_tiled_canvas((height, width), (size, size), 1, most)
    return tuple(rows_columns)


@pytest.mark.slow  # the module of the other implementation takes seconds to import
@pytest.mark.parametrize("most", [1, 2, 4, 6, 12])
def test_the_grid_is_internvls(most):
    for width, height in itertools.product((10, 100, 448, 500, 640, 700, 1000, 1345, 2000), repeat=2):
        assert tile_grid(width, height, 448, most) == internvl_grid(width, height, 448, most), (width, height)


@pytest.mark.parametrize(
    ("size", "most", "grid"),
    [
        ((448, 448), 12, (1, 1)),  # fills less than half of 2x2
        ((700, 700), 12, (2, 2)),
        ((2000, 2000), 12, (3, 3)),
        ((900, 450), 12, (2, 1)),
        ((450, 900), 12, (1, 2)),
        ((450, 9000), 6, (1, 6)),
        ((5000, 5000), 1, (1, 1)),
        ((1000, 700), 12, (3, 2)),
        ((700, 1000), 12, (2, 3)),
        ((720, 1000), 2, (1, 2)),  # differences of ratios, not of their logarithms
        ((1345, 1000), 12, (4, 3)),
        ((640, 448), 6, (3, 2)),
        ((500, 1000), 12, (1, 2)),
        ((1000, 2000), 12, (2, 4)),
    ],
)
def test_the_grid_by_example(size, most, grid):
    assert tile_grid(*size, 448, most) == grid


def test_tiles_are_in_reading_order_with_the_whole_at_the_end():
    image = Image.new("RGB", (56, 28))
    for x, colour in enumerate(((255, 0, 0), (0, 0, 255))):
        image.paste(colour, (28 * x, 0, 28 * x + 28, 28))
    tiles = tile(image, 28, 4)
    assert [t.size for t in tiles] == [(28, 28)] * 3
    assert tiles[0].getcolors() == [(784, (255, 0, 0))]
    assert tiles[1].getcolors() == [(784, (0, 0, 255))]
    assert len(tiles[2].getcolors()) > 1
    assert len(tile(image, 28, 1)) == 1
