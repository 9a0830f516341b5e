"""Places of data: tar shards near and far, damaged ones, folders, lists, hub datasets; what is wrong is said."""

import contextlib
import http.server
import io
import json
import os
import pickle
import tarfile
import threading
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

from support import ShardWriter
from unilip.data.records import Record, Unreadable, clean_text, decode_picture, read_turns
from unilip.data.shards import INDEX_SUFFIX, Shards, scan
from unilip.data.sources import expand, open_source, parse_mixture
from unilip.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Indices and fetched shards go to a folder of the test."""
    monkeypatch.setenv("UNILIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encoded(image, kind="JPEG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture
def write_shards(picture):
    """Write shards with a webdataset writer: f(folder, captions=0, edits=0, each=4) -> folder."""

    def write(folder, captions=0, edits=0, each=4):
        writer = ShardWriter(folder, "part", each)
        for i in range(captions):
            writer.write(f"c{i:03d}", {"jpg": encoded(picture(60, 48, i)), "txt": f"caption {i}".encode()})
        for i in range(edits):
            pair = {
                f"{part}.jpg": encoded(picture(64, 64, 50 + 2 * i + j)) for j, part in enumerate(("input", "output"))
            }
            writer.write(f"e{i:03d}", {**pair, "txt": f"edit {i}".encode()})
        writer.close()
        return folder

    return write


def texts(source, kind="caption"):
    return [
        source.read(kind, shard, place).text.decode()
        for shard, count in enumerate(source.counts(kind))
        for place in range(count)
    ]


# --- tar shards -------------------------------------------------------------------------------------------------------


def test_samples_of_each_kind_are_found(write_shards, tmp_path):
    source = open_source(str(write_shards(tmp_path / "s", captions=5, edits=3)))
    assert source.counts("caption") == [4, 1] and source.counts("edit") == [0, 3]
    assert source.counts("image") == [4, 7] and source.counts("talk") == [0, 0] and source.faults == []
    assert texts(source) == [f"caption {i}" for i in range(5)] and texts(source, "edit") == [
        f"edit {i}" for i in range(3)
    ]
    record = source.read("edit", 1, 1)
    assert record.name.endswith("part-000001.tar/e001") and len(record.pictures) == 2
    assert decode_picture(source.read("caption", 0, 2).pictures[0]).size == (60, 48)


def test_shards_are_what_the_webdataset_library_reads(write_shards, tmp_path):
    import webdataset

    folder = write_shards(tmp_path / "s", captions=5, edits=1)
    found = list(webdataset.WebDataset([str(p) for p in sorted(folder.glob("*.tar"))], shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [f"c{i:03d}" for i in range(5)] + ["e000"]
    assert {"input.jpg", "output.jpg", "txt"} <= found[5].keys()


def test_any_tar_file_is_read_whatever_wrote_it(tmp_path, picture):
    """Long names, folders inside, upper-case endings, members in any order, other files beside."""
    long = "d" * 120 + "/" + "k" * 90
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (
            (f"{long}.txt", b"a cat"), ("x/readme.md", b"no sample"), (f"{long}.JPG", encoded(picture())),
            ("talk.png", encoded(picture(), "PNG")), ("talk.json", b'{"conversations": []}'), ("only.json", b"[]"),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_source(str(tmp_path / "a.tar"))
    assert source.read("caption", 0, 0) == Record(f"{tmp_path}/a.tar/{long}", (encoded(picture()),), b"a cat")
    assert source.counts("caption") == [1] and source.counts("talk") == [1] and source.counts("text") == [1]


def test_the_index_is_built_once_and_again_when_the_shard_changes(write_shards, tmp_path, cache, monkeypatch):
    folder = write_shards(tmp_path / "s", captions=3)
    for index in folder.glob(f"*{INDEX_SUFFIX}"):
        index.unlink()
    times = []
    import unilip.data.shards as module

    monkeypatch.setattr(module, "scan", lambda path: times.append(path) or scan(path))
    assert len(texts(open_source(str(folder)))) == 3 and len(times) == 1 and len(list(cache.glob("*"))) == 1
    assert len(texts(open_source(str(folder)))) == 3 and len(times) == 1
    write_shards(folder, captions=2)
    for index in folder.glob(f"*{INDEX_SUFFIX}"):
        index.unlink()
    os.utime(folder / "part-000000.tar", (2e9, 2e9))
    assert len(texts(open_source(str(folder)))) == 2 and len(times) > 1


def test_an_index_beside_the_shard_spares_the_scan(write_shards, tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "s", captions=3)
    monkeypatch.setattr("unilip.data.shards.scan", lambda path: pytest.fail("scanned"))
    assert len(texts(open_source(str(folder)))) == 3


def cut(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def garble(path):
    """Overwrite the header of a member in the middle."""
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[4].offset
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 512)


@pytest.mark.parametrize(
    ("harm", "samples", "word"),
    [
        (cut, 2, "end of data|cut off"),
        (garble, 2, "damaged after byte"),
        (lambda path: path.write_bytes(path.read_bytes().rstrip(b"\0") + b"\0" * 3), 3, "cut off|end of data"),
        (lambda path: path.write_bytes(b"<html>404</html>" * 80), 0, "no tar file"),
        (lambda path: path.write_bytes(b""), 0, "no tar file|cut off"),
        (lambda path: path.unlink(), 0, "cannot be opened"),
    ],
)
def test_a_damaged_shard_is_named_and_used_as_far_as_it_goes(write_shards, tmp_path, caplog, harm, samples, word):
    import re

    folder = write_shards(tmp_path / "s", captions=8)
    pattern = str(folder / "part-{000000..000001}.tar")
    for index in folder.glob(f"*{INDEX_SUFFIX}"):
        index.unlink()
    harm(folder / "part-000001.tar")
    source = open_source(pattern)
    assert [fault for fault in source.faults if "part-000001.tar" in fault and re.search(word, fault)]
    assert "part-000001.tar is damaged" in caplog.text
    assert source.counts("caption")[0] == 4 and samples - 1 <= source.counts("caption")[1] <= samples + 1
    assert texts(source)[:4] == [f"caption {i}" for i in range(4)]


def test_a_shard_that_shrinks_while_it_is_read_is_noticed(write_shards, tmp_path):
    folder = write_shards(tmp_path / "s", captions=4)
    source = open_source(str(folder))
    cut(folder / "part-000000.tar", 0.3)
    with pytest.raises((Unreadable, DataError), match=r"part-000000\.tar"):
        source.read("caption", 0, 3)


def test_nothing_but_damage_is_an_error(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"none of 1 shards holds a sample.*no tar file"):
        open_source(str(tmp_path / "a.tar"))


def test_a_source_travels_to_a_worker(write_shards, tmp_path):
    source = open_source(str(write_shards(tmp_path / "s", captions=3)))
    source.read("caption", 0, 0)
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)


def test_many_shards_keep_few_files_open(write_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("unilip.data.shards.OPEN_SHARDS", 2)
    source = open_source(str(write_shards(tmp_path / "s", captions=8, each=1)))
    assert len(texts(source)) == 8 and len(source._open) == 2


# --- remote -----------------------------------------------------------------------------------------------------------


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; counts what is asked for, and fails where told."""

    asked: ClassVar[list[str]] = []
    failing = 0

    def do_GET(self):
        type(self).asked.append(Path(self.path).name)
        if self.path.endswith(".tar") and type(self).failing > 0:
            type(self).failing -= 1
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(folder):
    Server.asked, Server.failing = [], 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def tars():
    return [name for name in Server.asked if name.endswith(".tar")]


def test_remote_shards_are_fetched_when_their_turn_comes(write_shards, tmp_path):
    folder = write_shards(tmp_path / "s", captions=8)
    with serving(folder) as address:
        source = open_source(f"{address}/part-{{000000..000001}}.tar")
        assert source.counts("caption") == [4, 4] and tars() == [], "the index beside a shard is enough to know it"
        assert source.read("caption", 1, 2).text == b"caption 6" and tars() == ["part-000001.tar"]
        assert texts(source) == texts(open_source(str(folder)))
        assert sorted(tars()) == ["part-000000.tar", "part-000001.tar"], "each once"


def test_remote_shards_without_index_are_read_once_to_be_counted(write_shards, tmp_path):
    folder = write_shards(tmp_path / "s", captions=8)
    for index in folder.glob(f"*{INDEX_SUFFIX}"):
        index.unlink()
    with serving(folder) as address:
        pattern = f"{address}/part-{{000000..000001}}.tar"
        assert texts(open_source(pattern)) == [f"caption {i}" for i in range(8)] and len(tars()) == 2
        assert open_source(pattern).counts("caption") == [4, 4] and len(tars()) == 2


def test_what_comes_next_is_fetched_meanwhile_and_the_disk_is_bounded(write_shards, tmp_path, cache):
    folder = write_shards(tmp_path / "s", captions=8)
    size = (folder / "part-000000.tar").stat().st_size
    with serving(folder) as address:
        source = Shards([f"{address}/part-00000{i}.tar" for i in range(2)], "x", keep_gb=1.5 * size / 1e9)
        source.expect([1])
        source._coming[1].join()
        assert tars() == ["part-000001.tar"]
        assert source.read("caption", 1, 0).text == b"caption 4" and len(tars()) == 1
        assert source.read("caption", 0, 0).text == b"caption 0"
        assert len(list(cache.glob("*.tar"))) == 1, "the older one had to go"
        assert source.read("caption", 1, 1).text == b"caption 5", "an open one stays readable"


def test_a_fetch_is_tried_again_and_then_counted(write_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("unilip.files.time.sleep", lambda seconds: None)
    folder = write_shards(tmp_path / "s", captions=4)
    with serving(folder) as address:
        source = open_source(f"{address}/part-000000.tar")
        Server.failing = 2
        assert source.read("caption", 0, 0).text == b"caption 0" and len(tars()) == 3
    source = Shards([f"{address}/part-000000.tar"], "x", keep_gb=0)
    Path(next(Path(os.environ["UNILIP_CACHE"]).glob("*.tar"))).unlink()
    with pytest.raises(Unreadable, match="shard unreachable"):
        source.read("caption", 0, 0)


def test_what_could_not_be_fetched_ahead_or_is_gone_again_is_fetched_when_it_is_read(write_shards, tmp_path, cache):
    folder = write_shards(tmp_path / "s", captions=8)
    with serving(folder) as address:
        source = open_source(f"{address}/part-{{000000..000001}}.tar")
        Server.failing = 3
        for shard in range(2):
            source.expect([shard])
            source._coming[shard].join()
        assert tars() == ["part-000000.tar"] * 3 + ["part-000001.tar"] and len(list(cache.glob("*.tar"))) == 1
        next(cache.glob("*.tar")).unlink()  # as another process does that needs the room
        assert texts(source) == [f"caption {i}" for i in range(8)] and len(tars()) == 6


# --- names ------------------------------------------------------------------------------------------------------------


def test_mixtures_are_split_outside_braces():
    found = parse_mixture("a/{0,1}.tar:2.5, b ,https://x.org/y/{00..03}.tar,c:0")
    assert [(p.location, p.weight) for p in found] == [
        ("a/{0,1}.tar", 2.5), ("b", 1.0), ("https://x.org/y/{00..03}.tar", 1.0), ("c", 0.0),
    ]  # fmt: skip
    with pytest.raises(DataError, match="names no place"):
        parse_mixture(" , ")


def test_patterns_are_written_out(tmp_path):
    for name in ("a0.tar", "a1.tar", "b.tar"):
        (tmp_path / name).touch()
    assert [Path(p).name for p in expand(f"{tmp_path}/a*.tar")] == ["a0.tar", "a1.tar"]
    assert [Path(p).name for p in expand(f"{tmp_path}/a{{0..2}}.tar")] == ["a0.tar", "a1.tar", "a2.tar"]
    assert expand("s3://bucket/{08..10}.tar") == [f"s3://bucket/{i}.tar" for i in ("08", "09", "10")]
    for wrong in (f"{tmp_path}/c*.tar", f"{tmp_path}/none.tar"):
        with pytest.raises(DataError, match="no shard"):
            expand(wrong)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.jsonl", "empty"])
def test_places_with_nothing_are_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"is not a folder|cannot be read|holds no pictures"):
        open_source(str(tmp_path / name))


# --- lists ------------------------------------------------------------------------------------------------------------

TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


@pytest.fixture
def lines(tmp_path, picture):
    picture(seed=1).save(tmp_path / "a.png")
    picture(seed=2).save(tmp_path / "b.png")
    rows = [
        {"image": "a.png", "caption": "a cat"},
        {"source": "a.png", "instruction": "redden it", "target": "b.png", "id": 7},
        {"image": "b.png", "conversations": TALK, "caption": "both"},
        {"conversations": TALK},
        {"image": "gone.png", "caption": "no picture"},
    ]
    text = "\n".join(json.dumps(row) for row in rows[:3]) + "\n\nnot json\n[1]\n" + "\n".join(map(json.dumps, rows[3:]))
    (tmp_path / "mine.jsonl").write_text(text)
    return tmp_path / "mine.jsonl"


def test_a_list_of_samples(lines, caplog):
    source = open_source(str(lines))
    counts = {kind: source.counts(kind) for kind in ("image", "caption", "edit", "talk", "text")}
    assert counts == {"image": [4], "caption": [3], "edit": [1], "talk": [1], "text": [1]}
    assert source.read("caption", 0, 1).text == "both" and source.read("edit", 0, 0).text == "redden it"
    assert len(source.read("edit", 0, 0).pictures) == 2
    assert read_turns(source.read("talk", 0, 0).conversation) == (("What is it?", "A cat."),)
    assert read_turns(source.read("text", 0, 0).conversation) == (("What is it?", "A cat."),)
    with pytest.raises(Unreadable, match=r"picture missing.*gone\.png"):
        source.read("caption", 0, 2)
    assert [fault.split(", ")[1][:6] for fault in source.faults] == ["line 5", "line 6"] and "line 5" in caplog.text


def test_a_folder_has_conversations_too(tmp_path, picture):
    for name in "ab":
        picture().save(tmp_path / f"{name}.png")
    (tmp_path / "a.json").write_text(json.dumps({"conversations": TALK}))
    (tmp_path / "b.txt").write_text("a caption")
    (tmp_path / "c.json").write_text(json.dumps(TALK))
    source = open_source(str(tmp_path))
    assert [source.counts(kind) for kind in ("image", "caption", "talk", "text")] == [[2], [1], [1], [1]]
    assert read_turns(source.read("text", 0, 0).conversation) == read_turns(source.read("talk", 0, 0).conversation)


# --- texts and conversations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason", "left_out"),
    [
        (None, "caption missing", False),
        (b"\xff\xfe\x00", "caption not UTF-8", False),
        (" \n", "caption empty", False),
        ("an <IMG_CONTEXT>", "caption refused", False),
        ("x" * 101, "caption over 100 characters", True),
    ],
)
def test_texts_that_cannot_be_used_say_why(text, reason, left_out):
    with pytest.raises(Unreadable) as caught:
        clean_text(text, "caption", 100)
    assert (caught.value.reason, caught.value.left_out) == (reason, left_out)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.reason) == (str(caught.value), reason)


def test_characters_are_counted_not_bytes():
    assert clean_text(("é" * 100).encode(), "caption", 100) == "é" * 100


@pytest.mark.parametrize(
    "conversation",
    [
        TALK,
        {"conversations": TALK},
        json.dumps({"id": 3, "conversations": TALK}).encode(),
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "What is it?"},
         {"role": "assistant", "content": "A cat."}],
    ],
)  # fmt: skip
def test_conversations_of_both_manners(conversation):
    assert read_turns(conversation) == (("What is it?", "A cat."),)


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (b"{", "conversation not JSON"),
        (None, "conversation malformed"),
        ([], "conversation malformed"),
        (TALK[:1], "conversation malformed"),
        (TALK[::-1], "conversation malformed"),
        ([{"from": "bot", "value": "x"}], "conversation malformed"),
        ([{"from": "human", "value": "<image>"}, TALK[1]], "conversation empty"),
    ],
)
def test_conversations_that_cannot_be_used_say_why(conversation, reason):
    with pytest.raises(Unreadable) as caught:
        read_turns(conversation)
    assert caught.value.reason == reason


# --- hub datasets -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path, picture):
    """A folder of two Parquet files as the hub has them, read through the datasets library."""
    import datasets

    place = tmp_path / "hub" / "data"
    place.mkdir(parents=True)
    features = datasets.Features({"picture": datasets.Image(), "prompt": datasets.Value("string")})
    for part in range(2):
        rows = {
            "picture": [picture(seed=3 * part + i) for i in range(3)],
            "prompt": [f"row {3 * part + i}" for i in range(3)],
        }
        rows["prompt"][1] = None if part else rows["prompt"][1]
        data = datasets.Dataset.from_dict(rows, features=features)
        data.to_parquet(place / f"train-{part:05d}-of-00002.parquet")
    return tmp_path / "hub"


def test_a_hub_dataset_is_streamed_shard_by_shard(dataset, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    source = open_source(f"hf:{dataset}?split=train&image=picture&caption=prompt")
    assert source.counts("caption") == source.counts("image") == [3, 3] and not list(cache.glob("*.tar"))
    assert source.read("caption", 1, 2).text == b"row 5" and len(list(cache.glob("*.tar"))) == 1
    assert decode_picture(source.read("caption", 1, 0).pictures[0]).size == (56, 56)
    assert texts(source) == ["row 0", "row 1", "row 2", "row 3", "", "row 5"], "a gap keeps its place"
    with pytest.raises(DataError, match="its columns are: picture, prompt"):
        open_source(f"hf:{dataset}")
    with pytest.raises(DataError, match="no column pic"):
        open_source(f"hf:{dataset}?image=pic&caption=prompt")
    for query in ("captions=prompt", "captions"):
        with pytest.raises(DataError, match="sets captions; allowed"):
            open_source(f"hf:{dataset}?{query}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source("hf:~/hub?image=picture&caption=prompt").counts("caption") == [3, 3]
    with pytest.raises(DataError, match="cannot be opened by the datasets library"):
        open_source(f"hf:{dataset}?split=test&image=picture&caption=prompt")
