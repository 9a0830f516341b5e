"""Data as it lies around: replaced under its old name, written by other programs, half broken, named oddly, hostile."""

import io
import json
import os
import shutil
import tarfile
import time

import pytest
from PIL import Image

from unilip.data.check import check
from unilip.data.convert import convert
from unilip.data.records import Unreadable, clean_text, json_meaning, one_text, read_turns
from unilip.data.shards import INDEX_SUFFIX, Shards, index_cache
from unilip.data.sources import Weighted, open_source, parse_mixture
from unilip.errors import DataError
from unilip.files import content_hash
from unilip.train.batches import Tally


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNILIP_CACHE", str(tmp_path / "indices"))
    return tmp_path / "indices"


def jpg(colour="red", size=64) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(out, "JPEG")
    return out.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def pairs(*samples):
    return [(f"{key}.{ending}", data) for key, text in samples for ending, data in (("jpg", jpg()), ("txt", text))]


def captions(place) -> list:
    source = open_source(str(place))
    counts = source.counts("caption")
    return [source.read("caption", shard, i).text for shard, n in enumerate(counts) for i in range(n)]


# --- known by content -------------------------------------------------------------------------------------------------

LONG, SHORT = ("0", b"a red square, plain and wide"), ("1", b"blue")
SWAPPED = [("0", b"blue"), ("1", b"a red square, plain and wide")]  # the same size, other contents


@pytest.mark.parametrize("beside", [False, True], ids=["index kept", "index beside"])
def test_a_replaced_shard_of_the_same_size_and_older_time_is_read_as_it_is(tmp_path, beside):
    shard = write_tar(tmp_path / "s.tar", pairs(LONG, SHORT))
    assert captions(shard) == [LONG[1], SHORT[1]]
    if beside:
        shutil.copy(index_cache(str(shard)), f"{shard}{INDEX_SUFFIX}")
    new = write_tar(tmp_path / "new", pairs(*SWAPPED))
    assert new.stat().st_size == shard.stat().st_size
    os.utime(new, (time.time() - 3600,) * 2)
    shutil.copy2(new, shard)
    os.utime(shard, (time.time() - 3600,) * 2)
    assert captions(shard) == [b"blue", b"a red square, plain and wide"]


def test_a_shard_replaced_while_it_is_read_gives_no_foreign_bytes(tmp_path):
    shard = write_tar(tmp_path / "s.tar", pairs(LONG, SHORT))
    source = open_source(str(shard))
    source.read("caption", 0, 0)
    shard.write_bytes(write_tar(tmp_path / "new", pairs(*SWAPPED)).read_bytes())
    with pytest.raises(Unreadable, match="has changed"):
        source.read("caption", 0, 1)


def test_a_replaced_remote_shard_is_fetched_anew(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    for samples, wanted in ((pairs(LONG, SHORT), [LONG[1], SHORT[1]]), (pairs(*SWAPPED), [b"blue", LONG[1]])):
        system.pipe("/bucket/a.tar", write_tar(tmp_path / "a.tar", samples).read_bytes())
        assert captions("memory://bucket/a.tar") == wanted
    system.rm("/bucket/a.tar")  # the server is gone: what was fetched last is used
    assert captions("memory://bucket/a.tar") == [b"blue", LONG[1]]


def test_a_replaced_file_of_a_streamed_folder_is_read_anew(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for text in ("one", "two"):
        rows = {"image": [{"bytes": jpg(), "path": None}] * 2, "caption": [text, f"{text} more"]}
        kind = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        (tmp_path / "d").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=kind).to_parquet(tmp_path / "d" / "train.parquet")
        assert captions(f"hf:{tmp_path / 'd'}") == [text.encode(), f"{text} more".encode()]


def test_hostile_and_damaged_indices_are_made_anew(tmp_path):
    shard = write_tar(tmp_path / "s.tar", pairs(LONG, SHORT))
    assert captions(shard) == [LONG[1], SHORT[1]]
    own = index_cache(str(shard))
    head, samples = (json.loads(line) for line in own.read_text().splitlines())
    rows = (["0", {"image": [10**30, 5, 0]}], ["0", {"image": [512, 10**14, 0]}], ["0", []], ["0", 1], ["0"], 0)
    others = [{**samples, "caption": [row] * 2} for row in rows]
    odd = [
        ({**head, "counts": {**head["counts"], "caption": 10**12}}, samples),
        ({**head, "counts": {**head["counts"], "caption": -1}}, samples),
        ({**head, "counts": {**head["counts"], "other": "1"}}, samples),
        ({**head, "counts": []}, samples),
        ({**head, "ignored": {"txt": "many"}}, samples),
        ({**head, "probes": [[10**30, 10**30, 0]]}, samples),
        ({**head, "probes": [[512, 10**14, 0]]}, samples),
        ({**head, "size": 10**30}, samples),
        (head, {**samples, "caption": [["0", {"image": [10**30, 5, 0]}]]}),
        (head, {**samples, "caption": []}),
        *(({**head, "content": content_hash(other)}, other) for other in others),
        (head, []),
        ([1], samples),
        ({"format": 1}, samples),
    ]
    for changed in odd:
        own.write_text("\n".join(map(json.dumps, changed)) + "\n")
        assert captions(shard) == [LONG[1], SHORT[1]], changed
    for text in ("", "{", "[" * 10_000, "null\nnull\n"):
        own.write_text(text)
        assert captions(shard) == [LONG[1], SHORT[1]], text[:9]


def test_hostile_shards_are_damaged_or_their_samples_named(tmp_path):
    out = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(out, "JPEG", progressive=True)
    whole = out.getvalue()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    bombs = {
        "a.json": (b"[" * 200_000, "conversation not JSON"),
        "b.json": (b"9" * 100_000, "conversation not JSON"),
        "c.jpg": (whole[:-2] + scan * 3000 + whole[-2:], "picture unreadable"),
        "d.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "picture unreadable"),
        "e.caption.npz": (b"junk", "caption missing"),
    }
    for name, (data, reason) in bombs.items():
        stem = name.split(".")[0]
        rest = [(f"{stem}.txt", b"x")] if name.endswith("jpg") else [(f"{stem}.jpg", jpg())]
        members = [*pairs(("0", b"good")), (name, data), *rest]
        report, _ = check(open_source(str(write_tar(tmp_path / "s.tar", members))))
        assert set(report.skipped) == {reason} and not report.damaged, name
    good = write_tar(tmp_path / "s.tar", pairs(("0", b"good"), ("1", b"more"))).read_bytes()
    second = 512 + -(-len(jpg()) // 512) * 512
    for size in (b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0"):  # more than there is, less than nothing
        head = bytearray(good[second : second + 512])
        head[124:136], head[148:156] = size, b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        (tmp_path / "s.tar").write_bytes(good[:second] + bytes(head) + good[second + 512 :])
        report, _ = check(open_source(str(tmp_path / "s.tar")))
        assert len(report.damaged) == 1 and not report.skipped
    for junk in (b"", bytes(20480), os.urandom(20000), b"<!DOCTYPE html>" * 100):
        (tmp_path / "s.tar").write_bytes(junk)
        with pytest.raises(DataError, match="none of 1 shards holds a sample"):
            open_source(str(tmp_path / "s.tar"))


def test_a_signature_changes_with_the_data_and_not_with_its_place(tmp_path):
    def folder(name):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.jpg").write_bytes(jpg(size=60 + i))
            (tmp_path / name / f"{i}.txt").write_text(f"text {i}")
        rows = [{"image": f"{i}.jpg", "caption": "x"} for i in range(3)]
        (tmp_path / name / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
        write_tar(tmp_path / name / "tars" / "s.tar", pairs(LONG, SHORT))
        return [tmp_path / name, tmp_path / name / "list.jsonl", tmp_path / name / "tars"]

    changes = {
        "removed": lambda d: (d / "1.jpg").unlink(),
        "replaced": lambda d: (d / "1.jpg").write_bytes(jpg("blue", 61)),
        "renamed": lambda d: (d / "1.jpg").rename(d / "9.jpg"),
    }
    first = [open_source(str(place)).signature() for place in folder("a")]
    assert [open_source(str(place)).signature() for place in folder("b")] == first
    for what, change in changes.items():
        places = folder(what)
        change(tmp_path / what)
        assert open_source(str(places[0])).signature() != first[0], what
        assert open_source(str(places[1])).signature() != first[1], what
    write_tar(tmp_path / "b" / "tars" / "s.tar", pairs(*SWAPPED))
    assert open_source(str(tmp_path / "b" / "tars")).signature() != first[2]


def test_another_beginning_of_a_long_text_is_another_text(tmp_path, monkeypatch):
    monkeypatch.setenv("UNILIP_CACHE", str(tmp_path / "indices"))
    rest, found = "a square on a white background, " * 4, []
    for word in ("red", "tan"):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        (tmp_path / "pairs" / "0.jpg").write_bytes(jpg())
        (tmp_path / "pairs" / "0.txt").write_text(f"{word} {rest}")
        write_tar(tmp_path / "tars" / "s.tar", pairs(("0", f"{word} {rest}".encode())))
        sources = [open_source(str(tmp_path / place)) for place in ("pairs", "tars")]
        found.append([source.signature() for source in sources])
    assert [old == new for old, new in zip(*found, strict=True)] == [False, False]
    assert all(source.read("caption", 0, 0).text.startswith(b"tan") for source in sources)


def test_pictures_at_the_end_of_a_list_count_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr("unilip.data.folders.MARKED", 12)
    rows = [{"source": f"{i}.jpg", "target": f"{i}.jpg", "instruction": "x"} for i in range(64)]
    for i in range(64):
        (tmp_path / f"{i}.jpg").write_bytes(jpg(size=60))
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = open_source(str(tmp_path / "list.jsonl")).signature()
    for i in range(32, 64):
        (tmp_path / f"{i}.jpg").write_bytes(jpg("blue", 61))
    source = open_source(str(tmp_path / "list.jsonl"))
    assert source.signature() != before and 2 <= len(source._pictures) <= 5


# --- nothing left out without a word ----------------------------------------------------------------------------------


def test_concatenated_archives_are_read_one_after_the_other(tmp_path):
    a = write_tar(tmp_path / "a" / "a.tar", pairs(("0", b"a0"), ("1", b"a1"))).read_bytes()
    b = write_tar(tmp_path / "b" / "b.tar", pairs(("0", b"b0"), ("5", b"b5"))).read_bytes()
    (tmp_path / "ab.tar").write_bytes(a + b + a)
    assert captions(tmp_path / "ab.tar") == [b"a0", b"a1", b"b0", b"b5", b"a0", b"a1"], "equal keys, too"
    for rest in (b"something else" * 100, b[:1536] + bytes(512) + b[2048:], b[: len(b) // 2]):
        (tmp_path / "ab.tar").write_bytes(a + rest)
        report, _ = check(open_source(str(tmp_path / "ab.tar")))
        assert report.counts["caption"] >= 2 and len(report.damaged) == 1, report.lines()


def test_names_with_dots_are_names_and_what_is_not_read_is_told(tmp_path):
    members = [
        *pairs(("x1", b"one"), ("v1.5_x3", b"two"), ("x1.b.c", b"three")), ("p.q.input.png", jpg()),
        ("p.q.output.png", jpg()), ("p.q.txt", b"edit"), ("x1.seg.png", jpg()), ("x1.cls", b"7"), ("readme", b"hello"),
    ]  # fmt: skip
    report, _ = check(open_source(str(write_tar(tmp_path / "s.tar", members))))
    assert report.counts == {"image": 5, "caption": 3, "edit": 1, "talk": 0, "text": 0} and not report.bad
    assert sorted(captions(tmp_path / "s.tar")) == [b"one", b"three", b"two"]
    told = "\n".join(report.lines())
    assert "seg.png (1)" in told and "cls (1)" in told and "none (1)" in told


def test_pictures_without_text_are_no_captions_and_one_that_misses_its_own_is_a_fault(tmp_path):
    (tmp_path / "f").mkdir()
    for i in range(4):
        (tmp_path / "f" / f"{i}.jpg").write_bytes(jpg())
    write_tar(tmp_path / "tars" / "s.tar", [(f"{i}.jpg", jpg()) for i in range(4)])
    for place in (tmp_path / "f", tmp_path / "tars" / "s.tar"):
        report, _ = check(open_source(str(place)))
        assert report.counts["image"] == report.read == 4 and not report.counts["caption"] and not report.bad
        assert "no picture has a text" in "\n".join(report.lines())
    (tmp_path / "f" / "0.txt").write_text("a square")
    report, _ = check(open_source(str(tmp_path / "f")))
    assert report.skipped == {"caption missing": 3} and report.bad == 3


def test_other_programs_litter_and_lists_are_no_samples(tmp_path):
    fork = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(80)
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / name).write_bytes(jpg())
        (tmp_path / f"{name[0]}.txt").write_text("a square")
        for place in (f"._{name}", f"__MACOSX/._{name}", f"@eaDir/{name}/{name}"):
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place).write_bytes(fork)
    report, _ = check(open_source(str(tmp_path)))
    assert report.counts["image"] == 2 and not report.bad and not report.damaged
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.jpg", "text": "a square"}')
    assert "metadata.jsonl" in check(open_source(str(tmp_path)))[0].damaged[0]


@pytest.mark.parametrize("kind", ["shard", "folder"])
def test_metadata_beside_a_picture_are_no_conversation_and_their_caption_serves(tmp_path, kind):
    about = {"url": "http://x.org/y.jpg", "caption": "of the metadata", "status": "success"}
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    members = [
        ("0.jpg", jpg()), ("0.json", json.dumps(about).encode()), ("0.txt", b"of the text"),
        ("1.jpg", jpg()), ("1.json", b"\xef\xbb\xbf" + json.dumps(about).encode()),
        ("2.jpg", jpg()), ("2.json", json.dumps({"conversations": turns}).encode()),
        ("3.jpg", jpg()), ("3.txt", b"three"), ("3.json", b'{"width": 5}'),
        ("4.jpg", jpg()), ("4.json", b"{half"),
    ]  # fmt: skip
    place = write_tar(tmp_path / "s.tar", members) if kind == "shard" else tmp_path / "f"
    for name, data in members if kind == "folder" else ():
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(data)
    assert captions(place) == [b"of the text", "of the metadata", b"three"]
    report, _ = check(open_source(str(place)))
    assert report.counts["talk"] == 2 and report.skipped == {"conversation not JSON": 1}, report.lines()
    assert any("metadata" in note or "json" in note for note in report.notes)


def test_endings_in_capitals_pipes_and_what_nothing_reads(tmp_path):
    (tmp_path / "A.JPG").write_bytes(jpg())
    (tmp_path / "A.TXT").write_text("a")
    (tmp_path / "b.Jpeg").write_bytes(jpg())
    (tmp_path / "b.txt").write_text("b")
    for name in ("c.txt", "photo.heic", "note.md", "tags.json"):
        (tmp_path / name).write_text("{}")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    assert captions(tmp_path) == [b"a", b"b"]
    report, _ = check(open_source(str(tmp_path)))
    assert report.counts["image"] == 2 and not report.bad
    told = "\n".join(report.lines())
    for words in ("txt without a picture (1)", ".heic (1)", ".md (1)", "json without a conversation or a caption (1)"):
        assert words in told
    members = [
        *pairs(("0", b"zero")),
        ("1.txt", b"alone"),
        ("2.gif", b"x"),
        ("._0.jpg", b"x"),
        ("__MACOSX/3.jpg", b"x"),
    ]
    report, _ = check(open_source(str(write_tar(tmp_path / "tars" / "s.tar", members))))
    assert report.counts["image"] == 1 and not report.bad
    assert "txt without a picture (1)" in report.notes[0] and "gif (1)" in report.notes[0]


def test_shards_of_one_name_members_apart_capitals_and_doubles(tmp_path):
    a = write_tar(tmp_path / "a" / "0.tar", pairs(("0", b"from a")))
    b = write_tar(tmp_path / "b" / "0.tar", pairs(("0", b"from b"), ("1", b"more")))
    assert captions(a) == [b"from a"] and captions(b) == [b"from b", b"more"] and captions(a) == [b"from a"]
    apart = [("0.jpg", jpg()), ("1.jpg", jpg()), ("0.txt", b"zero"), ("1.txt", b"one")]
    capitals = [("A.JPG", jpg()), ("A.TXT", b"x"), ("B.JPEG", jpg()), ("B.txt", b"y")]
    twice = [("0.jpg", jpg()), ("0.txt", b"old"), ("0.txt", b"new")]
    found = [captions(write_tar(tmp_path / f"{i}.tar", m)) for i, m in enumerate((apart, capitals, twice))]
    assert found == [[b"zero", b"one"], [b"x", b"y"], [b"new"]]


# --- texts ------------------------------------------------------------------------------------------------------------


def test_captions_that_are_no_text_are_named_and_one_of_several_is_taken(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpg())
    found = {}
    for caption in (["first", "second"], [], [7], 7, {"en": "a man"}, True, None, "plain"):
        (tmp_path / "l.jsonl").write_text(json.dumps({"image": "0.jpg", "caption": caption}))
        report, _ = check(open_source(str(tmp_path / "l.jsonl")))
        found[str(caption)] = next(iter(report.skipped), "read")
    assert found == {
        "['first', 'second']": "read", "[]": "caption missing", "[7]": "caption no text", "7": "caption no text",
        "{'en': 'a man'}": "caption no text", "True": "caption no text", "None": "caption missing", "plain": "read",
    }  # fmt: skip
    (tmp_path / "l.jsonl").write_text(json.dumps({"image": "0.jpg", "caption": ["a", "b"]}))
    record = open_source(str(tmp_path / "l.jsonl")).read("caption", 0, 0)
    assert [one_text(record, i).text for i in range(3)] == ["a", "b", "a"]


def test_several_captions_of_a_streamed_set_are_texts_not_json(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    kind = datasets.Features({"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string"))})
    rows = {"image": [{"bytes": jpg(), "path": None}], "caption": [["one", "two"]]}
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict(rows, features=kind).to_parquet(tmp_path / "d" / "train.parquet")
    assert captions(f"hf:{tmp_path / 'd'}") == [["one", "two"]]


def test_images_and_messages_of_trl_are_streamed(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    words, picture = datasets.Value("string"), {"bytes": jpg(), "path": None}
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Why?"}]
    contents = {"parts": ([{"type": words, "text": words}], parts, parts[1:]), "words": (words, "<image>Why?", "Why?")}
    for name, (kind, asked, said) in contents.items():
        features = {"images": datasets.Sequence(datasets.Image()), "messages": [{"role": words, "content": kind}]}
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows = {"images": [[picture], [picture] * 2], "messages": [turns] * 2}
        (tmp_path / name).mkdir()
        kept = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        kept.to_parquet(tmp_path / name / "train.parquet")
        source = open_source(f"hf:{tmp_path / name}")
        assert read_turns(source.read("talk", 0, 0).conversation) == (("Why?", "Why?"),)
        report, _ = check(source)
        assert report.counts["talk"] == 2 and set(report.skipped) == {"picture unreadable"}, "two pictures are not read"
    rows = {"image": [picture]}
    (tmp_path / "alone").mkdir()
    kept = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    kept.to_parquet(tmp_path / "alone" / "train.parquet")
    report, _ = check(open_source(f"hf:{tmp_path / 'alone'}"))
    assert (report.counts["image"], report.counts["caption"], report.bad) == (1, 0, 0)


def test_marks_of_byte_order_are_no_text(tmp_path):
    assert clean_text(b"\xef\xbb\xbfa red square\r\n", "caption") == "a red square"
    assert clean_text("a \ufeffsquare", "caption") == "a square"
    for nothing in (b"\xef\xbb\xbf", "\u200b", "\ufeff \u200b", b" \r\n"):
        with pytest.raises(Unreadable, match="caption empty"):
            clean_text(nothing, "caption")
    (tmp_path / "0.jpg").write_bytes(jpg())
    row = json.dumps({"image": "0.jpg", "caption": "two\u2028lines"}, ensure_ascii=False).encode()
    (tmp_path / "l.jsonl").write_bytes(b"\xef\xbb\xbf" + row + b"\r\n" + row + b"\r\n\xef\xbb\xbf")
    assert captions(tmp_path / "l.jsonl") == ["two\u2028lines"] * 2
    assert json_meaning(b'\xef\xbb\xbf{"caption": "x"}') == "about"
    assert read_turns(b'\xef\xbb\xbf[{"from":"human","value":"a"},{"from":"gpt","value":"b"}]') == (("a", "b"),)


def test_lists_of_llava_and_trl(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpg())
    turns = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "So."}]
    llava = [{"id": "a", "image": "0.jpg", "conversations": turns}, {"id": "b", "conversations": turns}, {"id": "c"}]
    (tmp_path / "llava.json").write_text(json.dumps(llava))
    parts = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    trl = [
        {
            "images": ["0.jpg"],
            "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "So."}],
        },
        {"images": ["0.jpg"] * 2, "messages": [{"role": "user", "content": parts}]},
    ]
    (tmp_path / "trl.jsonl").write_text("\n".join(map(json.dumps, trl)))
    for name, counts in (("llava.json", (1, 1)), ("trl.jsonl", (1, 0))):
        source = open_source(str(tmp_path / name))
        assert (source.counts("talk")[0], source.counts("text")[0]) == counts and len(source.faults) == 1
        for kind in ("talk", "text")[: 1 + counts[1]]:
            assert read_turns(source.read(kind, 0, 0).conversation) == (("Why?", "So."),)
    for said in (None, 5, ["web"], {"set": "web"}, "web"):  # of where a picture is from, not of an edit
        (tmp_path / "said.jsonl").write_text(json.dumps({"image": "0.jpg", "caption": "a cat", "source": said}))
        source = open_source(str(tmp_path / "said.jsonl"))
        assert captions(tmp_path / "said.jsonl") == ["a cat"] and not source.faults and source.signature()
    row = {"image": None, "source": "0.jpg", "target": "0.jpg", "instruction": "no", "messages": None}
    (tmp_path / "null.jsonl").write_text(json.dumps(row))  # as tables write what a row has not
    source = open_source(str(tmp_path / "null.jsonl"))
    assert [len(source.read(kind, 0, 0).pictures) for kind in ("image", "edit")] == [1, 2]
    turns = [{"from": None, "role": who, "value": None, "content": "So."} for who in ("user", "assistant")]
    assert read_turns({"conversations": None, "messages": turns}) == (("So.", "So."),)
    assert json_meaning(b'{"messages": null, "caption": null, "text": "a cat"}') == "about"
    for bad in ("{}", "[", '[{"x": 1}]', "[1]"):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(DataError, match=r"bad\.json"):
            open_source(str(tmp_path / "bad.json"))


def test_lists_of_published_edits_are_read_and_texts_under_their_names_are_no_pictures(tmp_path):
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / name).write_bytes(jpg("blue" if name == "1.jpg" else "red"))
    turns = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "So."}]
    talk = {"conversations": turns, "input": "0.jpg", "output": "1.jpg", "instruction": "no"}
    rows = {
        "edit": [
            {"input": "0.jpg", "output": ["1.JPG"], "prompt": "redden"},
            {"input_image": ["0.jpg"], "output_image": "1.jpg", "input_prompt": "redden"},
            {"source": "of the web", "input": "0.jpg", "target_image": "1.jpg", "edit_instruction": "redden"},
        ],
        "caption": [
            {"input_prompt": "a red square", "output_image": "0.jpg"},
            {"image": "0.jpg", "caption": "a square", "input": "0.jpg", "output": "1.jpg", "prompt": "no"},
        ],
        "talk": [{**talk, "image": "0.jpg"}],
        "text": [talk],
        "": [
            {"instruction": "Say so.", "input": "", "output": "So."},  # questions and answers in words
            {"instruction": "Name it.", "input": "0.jpg", "output": "A square."},
            {"prompt": "a cat", "input": "a dog", "output": "0.jpg"},
            {"target": "1.jpg", "instruction": "an edit without its source"},
            {"input_image": None, "output_image": "1.jpg", "input_prompt": "an edit without its source"},
            {"image": ["0.jpg", "1.jpg"], "conversations": turns},  # a talk about two pictures
            {"images": ["0.jpg", "1.jpg"], "prompt": "Which is red?"},
            {"image": ["0.jpg", "1.jpg"], "caption": "two squares"},
        ],
    }
    for kind, samples in rows.items():
        for row in samples:
            for file, text in (("l.json", json.dumps([row, {"conversations": turns}])), ("l.jsonl", json.dumps(row))):
                (tmp_path / file).write_text(text + "\n" + json.dumps({"conversations": turns}) * (file == "l.jsonl"))
                source = open_source(str(tmp_path / file))
                counts = {k: source.counts(k)[0] - (k == "text") for k in ("caption", "edit", "talk", "text")}
                assert {k for k, count in counts.items() if count} == ({kind} if kind else set()), (row, counts)
                assert bool(source.faults) == (not kind), row
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows["edit"][1:] + rows["caption"])))
    source = open_source(str(tmp_path / "l.jsonl"))
    for i in range(2):
        record = source.read("edit", 0, i)
        assert (record.pictures, record.text) == ((jpg("red"), jpg("blue")), "redden")
    assert captions(tmp_path / "l.jsonl") == ["a red square", "a square"]
    before = source.signature()
    (tmp_path / "1.jpg").write_bytes(jpg("green", 60))
    assert open_source(str(tmp_path / "l.jsonl")).signature() != before, "pictures under these names count"


def test_a_list_called_json_is_known_by_its_content_and_lines_are_lines(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpg())
    rows = [json.dumps({"image": "0.jpg", "caption": text}) for text in ("one", "two")]
    (tmp_path / "lines.json").write_text("\n\n" + "\n".join(rows))
    (tmp_path / "list.json").write_text("\ufeff\n[" + ",\n".join(rows) + "]")
    for name in ("lines.json", "list.json"):
        assert captions(tmp_path / name) == ["one", "two"]
    (tmp_path / "list.jsonl").write_text(f"[{', '.join(rows)}]")  # nothing is guessed of what its name denies
    with pytest.raises(DataError, match=r"list\.jsonl, line 1"):
        open_source(str(tmp_path / "list.jsonl"))
    for text in (json.dumps({"a": {"image": "0.jpg"}}, indent=1), "\n".join([*rows, "{half"])):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(DataError, match=r"other\.json is no JSON list"):
            open_source(str(tmp_path / "other.json"))


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_with_commas_colons_and_brackets_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("pairs, 2024", "ratio 16:9", "set [v2]", "uni é☃", "a,b,c", "data.tar.d", "{x}", "n:3")
    for name in names:
        write_tar(tmp_path / name / f"{name}.tar", pairs(("0", name.encode())))
        assert parse_mixture(name) == [Weighted(name)]
        assert captions(name) == [name.encode()] and captions(f"{name}/{name}.tar") == [name.encode()]
    assert parse_mixture("pairs, 2024:2,ratio 16:9,a,b,c:0.5") == [
        Weighted("pairs, 2024", 2), Weighted("ratio 16:9"), Weighted("a,b,c", 0.5),
    ]  # fmt: skip
    assert parse_mixture("new:2, other") == [Weighted("new", 2), Weighted("other")]
    assert parse_mixture("s/{0..3}.tar:2,{a,b}.tar") == [Weighted("s/{0..3}.tar", 2), Weighted("{a,b}.tar")]
    for nothing in ("", " , ", ","):
        with pytest.raises(DataError, match="names no place"):
            parse_mixture(nothing)
    (tmp_path / "l.jsonl").write_text(json.dumps({"image": "a\0b.jpg", "caption": "x"}))
    assert check(open_source("l.jsonl"))[0].skipped == {"picture unreadable": 1}


# --- how much may be broken -------------------------------------------------------------------------------------------


def test_half_of_a_small_set_is_too_much(tmp_path):
    bad = [Unreadable("picture unreadable", "x"), None]
    small = Tally(0.01, samples=20)
    with pytest.raises(DataError, match="cannot be read"):
        for _ in range(10):
            small.add(bad)
    large = Tally(0.01, samples=10**6)
    for _ in range(10):
        large.add(bad)


def test_a_conversion_does_not_go_on_with_another_ones_shards(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / name / "s.tar", pairs(("0", name.encode()), ("1", b"x")))
    convert("blip3o-60k", str(tmp_path / "a"), tmp_path / "out", shard_size=1)
    (tmp_path / "out" / "blip3o-60k-000001.tar").unlink()
    convert("blip3o-60k", str(tmp_path / "a"), tmp_path / "out", shard_size=1)
    for source, more, words in (("b", {"shard_size": 1}, "content"), ("a", {"shard_size": 2}, "shard_size")):
        with pytest.raises(DataError, match=f"another conversion: .*{words}"):
            convert("blip3o-60k", str(tmp_path / source), tmp_path / "out", **more)
    assert len(Shards([str(p) for p in sorted((tmp_path / "out").glob("*.tar"))], "out").counts("caption")) == 2


def test_a_sample_may_be_of_any_format_that_is_opened():
    from unilip.data.records import decode_picture
    from unilip.pictures import FORMATS

    unread = []
    for form in FORMATS:
        file = io.BytesIO()
        Image.new("RGB", (20, 30), "red").save(file, form)
        found = decode_picture(file.getvalue())
        if (found.mode, found.size) != ("RGB", (20, 30)) or found.getpixel((5, 5))[0] < 200:
            unread.append(form)
    assert not unread
