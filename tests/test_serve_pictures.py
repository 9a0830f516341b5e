"""Bytes of strangers: which pictures are taken or refused, what is written into results, which URLs are fetched."""

import base64
import contextlib
import http.server
import io
import ipaddress
import json
import random
import socket
import struct
import threading
import time
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unilip.errors import ImageError
from unilip.serve.fetch import fetch, is_public
from unilip.serve.pictures import FORMATS, decode, decode_mask, encode, from_data_url, outside_kept, probe

LIMIT = 1_000_000


def packed(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("form", "mode"),
    [("PNG", mode) for mode in ("RGB", "L", "RGBA", "P", "1", "I;16")]
    + [("JPEG", mode) for mode in ("RGB", "L", "1", "CMYK")]
    + [("WEBP", mode) for mode in ("RGB", "L", "RGBA", "P")]
    + [("GIF", mode) for mode in ("RGB", "L", "P", "1")],
)
def test_still_pictures_are_read(picture, form, mode):
    image = picture(60, 40).convert(mode) if mode != "I;16" else Image.fromarray(np.full((40, 60), 3000, np.uint16))
    data = packed(image, form)
    assert probe(data) == (form.lower(), 60, 40, len(data))
    found = decode(data, LIMIT)
    assert found.mode == "RGB" and found.size == (60, 40)


@pytest.mark.parametrize("options", [{"progressive": True}, {"quality": 1}, {"quality": 100, "subsampling": 0}])
def test_kinds_of_jpeg(picture, options):
    data = packed(picture(123, 77), "JPEG", **options)
    assert decode(data, LIMIT).size == (123, 77)
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    assert decode(packed(picture(60, 40), "JPEG", exif=exif), LIMIT).size == (40, 60)


@pytest.mark.parametrize(
    "options", [{"lossless": True}, {"quality": 20}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}]
)
def test_kinds_of_webp(picture, options):
    assert decode(packed(picture(61, 43), "WEBP", **options), LIMIT).size == (61, 43)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_cut_off_files_are_refused(picture, form):
    data = packed(picture(60, 40), form)
    for cut in sorted({1, 4, 12, 20, 30, len(data) // 2, len(data) - 3, len(data) - 1}):
        with pytest.raises(ImageError):
            decode(data[:cut], LIMIT)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_what_follows_a_picture_is_cut_off(picture, form, monkeypatch):
    """Second pictures, gain maps, films and trailers of phones; no decoder sees them, nor an archive in disguise."""
    data = packed(picture(60, 40), form)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("a.txt", "hello")
    seen, opened, alone = [], Image.open, decode(data, LIMIT)
    monkeypatch.setattr(Image, "open", lambda file, **more: seen.append(file.getvalue()) or opened(file, **more))
    film = b"\0\0\0\x18ftypmp42" + b"\0" * 500
    for tail in (b"\0", b"\n", b"<script>", archive.getvalue(), archive.getvalue() + b"\xff\xd9", data, film):
        assert np.array_equal(decode(data + tail, LIMIT), alone)
    assert set(seen) == {data}
    with pytest.raises(ImageError):
        decode(b"GIF89a" + data, LIMIT)


def test_pictures_of_phones(picture):
    """MPO with a smaller second picture, EXIF that is broken, a picture on its side with a trailer."""
    image = picture(60, 40)
    mpo = packed(image, "MPO", save_all=True, append_images=[picture(30, 20, seed=1)])
    assert np.array_equal(decode(mpo, LIMIT), decode(packed(image, "JPEG"), LIMIT))
    for form in ("PNG", "JPEG", "WEBP"):
        broken = packed(image, form, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x12\x01\x03" * 9)
        assert decode(broken, LIMIT).size == (60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(packed(image, "JPEG", exif=exif) + b"SEFH" + b"\0" * 20 + b"SEFT", LIMIT).size == (40, 60)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_animations_are_refused(picture, form):
    data = packed(picture(60, 40), form, save_all=True, append_images=[picture(60, 40, seed=1)])
    with pytest.raises(ImageError, match=r"animated|frames"):
        decode(data, LIMIT)


@pytest.mark.parametrize("form", ["BMP", "TIFF", "ICO", "PPM", "PDF"])
def test_other_formats_are_refused(picture, form):
    with pytest.raises(ImageError, match="no PNG, JPEG, WebP or GIF"):
        decode(packed(picture(), form), LIMIT)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, body, *more):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (
        b"\x89PNG\r\n\x1a\n",
        chunk(b"IHDR", header),
        *more,
        chunk(b"IDAT", zlib.compress(body)),
        chunk(b"IEND", b""),
    )
    return b"".join(parts)


def test_bombs_are_refused_by_their_header_alone(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("a decoder was started"))
    bombs = [
        png(30_000, 30_000, b"\0"),
        png(2**31 - 1, 2**31 - 1, b"\0"),
        png(0, 5, b"\0"),
        b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\xff\x3f\0\xff\x3f\0",
        b"\xff\xd8\xff\xc0" + struct.pack(">HBHH", 17, 8, 65000, 65000) + b"\x03" + b"\x01\x11\0" * 3 + b"\xff\xd9",
    ]
    for bomb in bombs:
        with pytest.raises(ImageError, match="px"):
            decode(bomb, LIMIT)
    with pytest.raises(ImageError, match=r"40000x1 px.* at most 32768 a side"):
        decode(png(40_000, 1, b"\0"), LIMIT)


def test_compressed_text_and_profiles_do_not_unfold():
    big = zlib.compress(b"a" * 40_000_000, 9)
    for name, data in ((b"zTXt", b"k\0\0" + big), (b"iCCP", b"k\0\0" + big), (b"iTXt", b"k\0\1\0\0\0" + big)):
        data = png(8, 8, b"\0" * 72, chunk(name, data))
        with contextlib.suppress(ImageError):  # refused is as good
            assert decode(data, LIMIT).size == (8, 8)


def test_a_wrong_checksum_is_seen(picture):
    data = bytearray(packed(picture(), "PNG"))
    data[40] ^= 1
    with pytest.raises(ImageError):
        decode(bytes(data), LIMIT)


def damaged(data, number):
    draw = random.Random(number)
    found = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        place = draw.randrange(len(found))
        kind = draw.randrange(4)
        if kind == 0:
            found[place] = draw.randrange(256)
        elif kind == 1:
            del found[place : place + draw.randint(1, 16)]
        elif kind == 2:
            found[place:place] = draw.randbytes(draw.randint(1, 16))
        else:
            found[place : place + 4] = draw.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
        if not found:
            found = bytearray(b"x")
    return bytes(found)


def check_damaged(picture, numbers):
    whole = [packed(picture(32, 24), form) for form in ("PNG", "JPEG", "WEBP")]
    refused = 0
    for number in numbers:
        try:
            found = decode(damaged(whole[number % 3], number), LIMIT)
            assert found.mode == "RGB" and found.width * found.height <= LIMIT
        except ImageError as error:
            refused += 1
            assert str(error).count("\n") == 0
    assert refused > len(numbers) // 3


def test_damaged_files_raise_nothing_else(picture):
    check_damaged(picture, range(300))


@pytest.mark.slow
def test_two_thousand_damaged_files_raise_nothing_else(picture):
    check_damaged(picture, range(1000, 3000))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x20\0\0\0WEBPVP8 ", b"RIFF\x20\0\0\0WEBPVP8X"]),
    st.binary(max_size=200),
)
def test_any_bytes_raise_nothing_else(head, body):
    with pytest.raises(ImageError):
        decode(head + body, LIMIT)


def test_the_walk_through_a_large_jpeg_is_quick():
    import time

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8))
    data = packed(noise, "JPEG", quality=95)
    started = time.perf_counter()
    probe(data)
    assert time.perf_counter() - started < 0.5


def test_masks():
    mask = Image.new("RGBA", (20, 10), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (5, 0, 10, 10))
    found = decode_mask(packed(mask, "PNG"), LIMIT)
    assert found.getpixel((7, 3)) == 255 and found.getpixel((2, 3)) == 0
    with pytest.raises(ImageError, match="transparen"):
        decode_mask(packed(mask.convert("RGB"), "PNG"), LIMIT)


@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_outside_the_mask_nothing_changes(picture, fit):
    source, result = picture(90, 40, seed=1), Image.new("RGB", (56, 56), "red")
    mask = Image.new("L", source.size, 0)
    mask.paste(255, (20, 10, 50, 30))
    found = outside_kept(result, source, mask, fit)
    inside = np.asarray(mask) == 255
    assert found.size == source.size
    assert (np.asarray(found)[~inside] == np.asarray(source)[~inside]).all()
    assert (np.asarray(found)[inside] == (255, 0, 0)).all()
    assert outside_kept(result, source, mask, fit, longest=45).size == (45, 20)


@pytest.mark.parametrize("form", FORMATS)
def test_provenance_is_written_and_can_be_left_out(picture, form):
    about = {"model": "pico", "seed": 7, "prompt": "drei gelbe Sterne \N{WHITE MEDIUM STAR} é"}
    data = encode(picture(), form, about=about)
    image = Image.open(io.BytesIO(data))
    if form == "png":
        assert image.text["model"] == "pico" and image.text["seed"] == "7" and image.text["prompt"] == about["prompt"]
        assert image.text["Software"].startswith("unilip ")
    else:
        exif = image.getexif()
        assert json.loads(exif[0x010E])["seed"] == 7 and exif[0x0131].startswith("unilip ")
        assert json.loads(exif[0x010E])["prompt"] == about["prompt"]
    bare = encode(picture(), form)
    assert b"unilip" not in bare and b"pico" not in bare
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(bare))), np.asarray(image))


def test_quality_changes_the_size(picture):
    assert len(encode(picture(), "jpeg", 10)) < len(encode(picture(), "jpeg", 95))


def test_data_urls(picture):
    data = packed(picture(), "PNG")
    assert from_data_url("data:image/png;base64," + base64.b64encode(data).decode()) == data
    for bad in (
        "",
        "data:",
        "data:image/png,abc",
        "data:text/html;base64,AAAA",
        "data:image/png;base64,@@",
        "http://a/b.png",
    ):
        with pytest.raises(ImageError):
            from_data_url(bad)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False), ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False),
        ("198.18.0.1", False),
        ("240.0.0.1", False), ("::1", False), ("::", False), ("fe80::1", False), ("fd00::1", False), ("ff02::1", False),
        ("::ffff:127.0.0.1", False), ("::ffff:8.8.8.8", False), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False), ("::7f00:1", False), ("64:ff9b:1::1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address, public):
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.fixture
def site(picture):
    body = packed(picture(), "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            places = {
                "/hop": "/a.png",
                "/loop": "/loop",
                "/inside": "http://inside.example/",
                "/file": "file:///etc/passwd",
            }
            self.server.hosts.append(self.headers["Host"])
            self.send_response(302 if self.path in places else 404 if self.path == "/none" else 200)
            if self.path in places:
                self.send_header("Location", places[self.path])
            self.end_headers()
            if self.path == "/a.png":
                self.wfile.write(body)
            elif self.path == "/big":
                self.wfile.write(b"x" * 300_000)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hosts = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, body
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("how", ["name", "silence", "head", "body", "handshake"])
def test_fetching_ends_in_its_time_whatever_is_slow(how):
    """Each piece comes soon, the whole never."""
    pieces = {"silence": [], "handshake": [b"\x16\x03\x03\x3f\xff"], "name": []}.get(how, [b"HTTP/1.1 200 OK\r\n"])
    if how == "body":
        pieces = [b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n"]
    stop = threading.Event()

    def drip():
        with contextlib.suppress(OSError):
            peer, _ = listening.accept()
            with peer:
                for piece in pieces:
                    peer.sendall(piece)
                while not stop.wait(0.1):
                    peer.sendall(b"" if how == "silence" else b"x")

    def resolver(host, port):
        stop.wait(20 if how == "name" else 0)
        return ["127.0.0.1"]

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        scheme, started = "https" if how == "handshake" else "http", time.monotonic()
        try:
            with pytest.raises(ImageError, match="URL"):
                fetch(
                    f"{scheme}://slow.example/", 10**6, seconds=0.7, resolver=resolver,
                    allowed=lambda a: True, ports=dict.fromkeys(("http", "https"), listening.getsockname()[1]),
                )  # fmt: skip
            assert time.monotonic() - started < 5
        finally:
            stop.set()
    thread.join(5)


def test_fetching(site):
    server, body = site
    asked = []

    def resolver(host, port):
        asked.append(host)
        return ["10.0.0.1"] if host == "inside.example" else ["127.0.0.1"]

    def get(path, limit=100_000, allowed=lambda a: a.is_loopback):
        ports = {"http": server.server_port, "https": 443}
        return fetch(f"http://pictures.example{path}", limit, resolver=resolver, allowed=allowed, ports=ports)

    assert get("/a.png") == body and asked == ["pictures.example"]  # one question: no second answer can change it
    assert server.hosts[-1].startswith("pictures.example")
    assert get("/hop") == body
    for path, reason in (
        ("/loop", "redirects"), ("/inside", "not public"), ("/file", "http"), ("/big", "more than"), ("/none", "404"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=reason):
            get(path)
    seen = len(server.hosts)
    with pytest.raises(ImageError, match="not public"):
        get("/a.png", allowed=is_public)
    assert len(server.hosts) == seen, "it was contacted all the same"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a/b", "file:///etc/passwd", "http://", "http://user:pass@a.example/", "http://a.example:22/", "http://[::1",
        "gopher://a", "//a.example/b", "http://a.example/\r\nX: y", "http://a.example:99999/", "http://127.0.0.1/",
        "http://[::1]/", "http://2130706433/", "http://0x7f.1/", "http://localhost/",
    ],
)  # fmt: skip
def test_forbidden_urls(url, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("it connected"))
    with pytest.raises(ImageError):
        fetch(url, 1000)
