"""Files that somebody prepared: checkpoints, tokenizers, adapters and shards that lie are refused, at once."""

import io
import json
import shutil
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unilip import UniLIP
from unilip.adapters import CONFIG, WEIGHTS, read_adapter
from unilip.checkpoints.read import open_checkpoint
from unilip.checkpoints.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from unilip.checkpoints.write import convert
from unilip.data.check import check
from unilip.data.sources import open_source
from unilip.errors import UniLIPError

MOST = 200 * 2**20  # bytes of Python's own memory
SECONDS = 10.0


def refused(cases: dict[str, Callable[[], object]]) -> list[str]:
    """The cases that are taken, raise another error, or cost too much."""
    wrong = []
    for name, call in cases.items():
        begun = time.process_time()
        tracemalloc.start()
        try:
            call()
            wrong.append(f"{name}: taken")
        except UniLIPError as error:
            if len(str(error)) > 2000:
                wrong.append(f"{name}: an error of {len(str(error))} characters")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__} {error}")
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        if peak > MOST or time.process_time() - begun > SECONDS:
            wrong.append(f"{name}: {peak >> 20} MiB, {time.process_time() - begun:.1f} s")
    return wrong


def safetensors_of(header: str, data: bytes = bytes(64)) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


def entry(name: str, shape: Any, offsets: Any, dtype: str = "F32") -> str:
    return f'"{name}":{json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})}'


def test_safetensors_whose_headers_lie(tiny_folder: Path, tmp_path: Path) -> None:
    a = entry("dit.a", [4], [0, 16])
    headers = {
        "beyond the file": "{" + entry("dit.a", [10**6], [0, 4 * 10**6]) + "}",
        "overlapping": "{" + a + "," + entry("dit.b", [4], [8, 24]) + "}",
        "backwards": "{" + entry("dit.a", [4], [16, 0]) + "}",
        "huge shape": "{" + entry("dit.a", [2**62, 4], [0, 16]) + "}",
        "negative shape": "{" + entry("dit.a", [-4], [0, 16]) + "}",
        "shape of text": "{" + entry("dit.a", ["4"], [0, 16]) + "}",
        "unknown type": "{" + entry("dit.a", [4], [0, 16], "F31") + "}",
        "two of a name": "{" + a + "," + entry("dit.a", [4], [16, 32]) + "}",
        "a list": "[]", "deep": "[" * 100_000, "no header": "", "no tensors": "{}",
    }  # fmt: skip
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    whole = load_file(tiny_folder / "model.safetensors")

    def header(text: str) -> object:
        (folder / "model.safetensors").write_bytes(safetensors_of(text))
        return open_checkpoint(folder)

    assert refused({name: lambda text=text: header(text) for name, text in headers.items()}) == []
    name = next(name for name, tensor in whole.items() if tensor.dim() > 1)
    save_file(whole | {name: whole[name].flatten()}, folder / "model.safetensors")
    assert refused({"flat": lambda: open_checkpoint(folder)}) == []


def test_weights_that_are_no_numbers_or_too_large_for_a_type_are_named(
    tiny_folder: Path, tmp_path: Path, fresh_model: Callable[..., UniLIP]
) -> None:
    """In every part and type, in a safetensors file and in one of torch, loaded, loaded when needed, converted, saved.

    The very first, some or all of the values; also those that an own type holds, but not the one they are loaded in.
    """
    whole, folder, wrong = load_file(tiny_folder / "model.safetensors"), tmp_path / "m", []
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    names = {name.partition(".")[0]: name for name in whole}
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    values = (float("nan"), float("inf"), float("-inf"), 1e5)

    def low() -> UniLIP:
        return UniLIP.from_pretrained(folder, low_memory=True)

    for number, (part, name) in enumerate(names.items()):
        dtype, value = kinds[number % 4], values[number % 3]
        spoiled = {key: tensor.to(dtype, copy=True) for key, tensor in whole.items()}
        spoiled[name].view(-1)[slice(None) if number == 4 else -1 if number % 2 else 0] = value
        for file in ("model.safetensors", "pytorch_model.bin"):
            save_file(spoiled, folder / file) if file.startswith("model") else torch.save(spoiled, folder / file)
            calls: dict[str, Callable[[], Any]] = {
                "load": lambda: UniLIP.from_pretrained(folder),
                "as stored": lambda: UniLIP.from_pretrained(folder, dtype="auto"),
                "its part": lambda part=part: UniLIP.from_pretrained(folder, parts=[part]),
                "when needed": lambda part=part: low().using(part).__enter__(),
                "convert": lambda: convert(folder, tmp_path / "converted"),
                "authors": lambda: convert(folder, tmp_path / "converted", "authors"),
            }  # fmt: skip
            others = [other for other in names if other != part]
            assert UniLIP.from_pretrained(folder, parts=others).parts
            for what, call in calls.items():
                try:
                    call()
                    wrong.append(f"{name} {file} {what}: taken")
                except UniLIPError as error:
                    if name.rpartition(".")[2] not in str(error) or "NaN or infinite" not in str(error):
                        wrong.append(f"{name} {file} {what}: {error}")
            assert not (tmp_path / "converted").exists()
            (folder / file).unlink()
        model = fresh_model()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = values[number % 4]
        large = values[number % 4] == 1e5
        for stored in (torch.float16,) if large else (None, torch.float16):
            with pytest.raises(UniLIPError, match=f"{name} holds NaN or infinite"):
                model.save_pretrained(tmp_path / "saved", dtype=stored)
            assert not (tmp_path / "saved").exists(), "nothing is written"
        if large:
            model.save_pretrained(folder)
            assert UniLIP.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16
            with pytest.raises(UniLIPError, match=f"{name} holds NaN or infinite values in torch.float16"):
                UniLIP.from_pretrained(folder, dtype="float16")
            (folder / "model.safetensors").unlink()
    assert wrong == [] and len(names) == 6


def test_indices_that_name_what_is_not_theirs(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = list(load_file(tmp_path / "outside.safetensors"))
    index = folder / "model.safetensors.index.json"
    files = {
        "outside": "../outside.safetensors", "absolute": str(tmp_path / "outside.safetensors"), "itself": index.name,
        "missing": "model-00001-of-00002.safetensors", "up": "..", "nothing": "", "zero": "a\0b", "number": 5,
    }  # fmt: skip

    def open_with(table: Any) -> object:
        index.write_text(json.dumps({"weight_map": table}))
        return open_checkpoint(folder)

    cases = {name: lambda file=file: open_with(dict.fromkeys(names, file)) for name, file in files.items()}
    tables: tuple[Any, ...] = (None, [], "x", {})
    assert refused(cases | {repr(table): lambda table=table: open_with(table) for table in tables}) == []


def test_a_tokenizer_that_is_a_link_out_of_its_folder_takes_nothing_along(tiny_folder: Path, tmp_path: Path) -> None:
    """What a tokenizer file holds is saved and uploaded with the model: none may be another file of its user."""
    secret = tmp_path / "home" / "key"
    secret.parent.mkdir()
    secret.write_text("a private key")
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    cases: dict[str, Callable[[], object]] = {}
    for name in TOKENIZER_FILES:
        for how, target in (("straight", secret), ("up", Path("../home/key")), ("by a link", tmp_path / "link")):

            def convert_with(name: str = name, how: str = how, target: Path = target) -> object:
                link = folder / name
                content = link.read_bytes() if link.exists() else None
                link.unlink(missing_ok=True)
                link.symlink_to(target)
                if how == "by a link" and not target.is_symlink():
                    target.symlink_to(secret)
                try:
                    return convert(folder, tmp_path / "out")
                finally:
                    link.unlink()
                    if content is not None:
                        link.write_bytes(content)

            cases[f"{name} {how}"] = convert_with
    assert refused(cases) == [] and not (tmp_path / "out").exists()
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    for place in (blobs, snapshot):
        place.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):  # as the hub's cache has it, and a folder that is a link itself
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "alias").symlink_to(snapshot)
    (snapshot / "inner").mkdir()
    (snapshot / "inner" / "tokenizer.json").symlink_to((snapshot / "tokenizer.json").resolve())
    assert load_tokenizer(snapshot / "inner").vocabulary
    (folder / "merges.txt").symlink_to("tokenizer.json")
    for place in (snapshot, tmp_path / "alias", folder):
        assert open_checkpoint(place).tokenizer is not None


def test_tokenizers_that_are_bombs() -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    bombs = {
        "deep": b"[" * 10**6, "number": b'{"model":' + b"9" * 10**6 + b"}", "text": b"\xff" * 100, "list": b"[1]",
        "merges of strangers": json.dumps({"model": model | {"merges": ["c d"] * 10**5}}).encode(),
        "merges of nothing": json.dumps({"model": model | {"merges": [["a"]] * 10**5}}).encode(),
        "ids": json.dumps({"model": model | {"vocab": {"a": -1}}}).encode(),
        "deep steps": (b'{"normalizer":' + b'{"type":"Sequence","normalizers":[' * 10**4 + b"]}" * 10**4 + b"}"),
    }  # fmt: skip
    assert refused({name: lambda d=data: Tokenizer({"tokenizer.json": d}) for name, data in bombs.items()}) == []


def test_adapters_that_lie(tmp_path: Path) -> None:
    layer = "base_model.model.dit.x"
    good = {f"{layer}.lora_A.weight": torch.zeros(2, 4), f"{layer}.lora_B.weight": torch.zeros(4, 2)}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}

    def read(change: dict[str, Any], tensors: dict[str, torch.Tensor]) -> object:
        (tmp_path / CONFIG).write_text(json.dumps(settings | change))
        save_file(tensors, tmp_path / WEIGHTS)
        return read_adapter(tmp_path)

    read({}, good)
    changes: tuple[dict[str, Any], ...] = (
        {"r": 0}, {"r": -1}, {"r": 10**9}, {"r": "2"}, {"r": None}, {"r": True}, {"r": 3}, {"lora_alpha": float("nan")},
        {"lora_alpha": 1e300}, {"peft_type": "../x"}, {"rank_pattern": [1]}, {"rank_pattern": {"(a+)+$": 2}},
        {"rank_pattern": {"x": {}}}, {"use_dora": True}, {"layer_replication": [[0, 9]]},
    )  # fmt: skip
    nan = good | {f"{layer}.lora_A.weight": torch.full((2, 4), float("nan"))}
    other = {f"{layer}.../../weight": torch.zeros(1)}
    cases = {str(change): lambda change=change: read(change, good) for change in changes}
    cases |= {"nan": lambda: read({}, nan), "name": lambda: read({}, good | other), "empty": lambda: read({}, {})}
    cases |= {"half": lambda: read({}, dict(list(good.items())[:1]))}
    assert refused(cases) == []


def test_shards_with_members_that_are_no_files_write_nothing_and_name_what_they_leave(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    folder = tmp_path / "data"
    folder.mkdir()
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    with tarfile.open(folder / "s.tar", "w") as tar:
        for name in ("good", "../../up", "/absolute"):
            for ending, data in (("png", out.getvalue()), ("txt", b"a star")):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        for number, kind in enumerate(kinds):
            member = tarfile.TarInfo(f"link{number}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    report, _ = check(open_source(str(folder / "s.tar")))
    assert report.counts["caption"] == 3 and report.bad == 0, "links and devices are no samples"
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] == []
    huge = tarfile.TarInfo("big.png")
    huge.size = 8 * 2**40
    (folder / "s.tar").write_bytes(huge.tobuf(tarfile.GNU_FORMAT))
    assert refused({"huge": lambda: open_source(str(folder / "s.tar"))}) == []


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNILIP_CACHE", str(tmp_path_factory.mktemp("cache")))
