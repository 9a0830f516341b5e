"""Pictures from strangers, pictures that are no numbers, and the measures that compare two of them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from skimage.metrics import structural_similarity

from unilip.errors import ImageError
from unilip.pictures import MAX_SCANS, PSNR_LIMIT, load_image, open_picture, picture_psnr, picture_ssim, ssim, to_images


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
