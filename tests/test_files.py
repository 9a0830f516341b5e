"""Files are there whole or not at all, are read as people write them, and are known by what is in them."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from unilip.errors import UniLIPError
from unilip.files import (
    Lock,
    content_hash,
    file_hash,
    mark,
    read_json,
    read_lines,
    read_text,
    replacing,
    retried,
    stamp,
    write_bytes,
    write_json,
    write_lines,
)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    for name in ("a.txt", "n" * 255):
        write_bytes(tmp_path / "new" / name, b"old")
        with pytest.raises(RuntimeError), replacing(tmp_path / "new" / name) as part:
            part.write_bytes(b"half")
            raise RuntimeError
        assert (tmp_path / "new" / name).read_bytes() == b"old"
        write_bytes(tmp_path / "new" / name, b"new")
        assert (tmp_path / "new" / name).read_bytes() == b"new"
    assert len(list((tmp_path / "new").iterdir())) == 2, "nothing else is left"


def test_what_killed_processes_left_goes_with_the_next_write(tmp_path):
    code = "import os, sys; from pathlib import Path; from unilip.files import replacing\n"
    code += "with replacing(Path(sys.argv[1])) as part: part.mkdir(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    with replacing(tmp_path / "a") as part:
        part.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_new_file_has_the_mode_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_text_is_read_with_and_without_a_mark_and_split_at_line_ends_alone(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": "x\xe2\x80\xa8y"}\r\n\r\n{"a": "z\x0b"}'.replace(b"\x0b", b"\\u000b"))
    assert read_lines(file) == [{"a": "x\u2028y"}, {"a": "z\x0b"}]
    write_lines(file, [{"a": "\u2028"}, {"b": 1}])
    assert read_lines(file) == [{"a": "\u2028"}, {"b": 1}]
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(file) == {"a": 1} and read_text(file) == '{"a": 1}'


def test_what_cannot_be_read_is_named(tmp_path):
    cases = {
        "missing": (None, r"There is no table .*missing"),
        "utf16": ("a".encode("utf-16"), r"utf16 cannot be read .*UTF-8"),
        "half": (b'{"a": ', r"half.* (cannot be read|is not JSON)"),
        "deep": (b"[" * 100_000, r"deep.* (cannot be read|is not JSON)"),
    }
    for name, (data, words) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        for read in (read_json, read_lines):
            with pytest.raises(UniLIPError, match=words):
                read(tmp_path / name, "table")
    (tmp_path / "list").write_bytes(b"[1]\n")
    with pytest.raises(UniLIPError, match="line 1 is not a JSON object"):
        read_lines(tmp_path / "list")


def test_content_is_told_apart_whatever_name_size_and_time_say(tmp_path):
    first, second = tmp_path / "a" / "x", tmp_path / "b" / "x"
    for path, data in ((first, b"1234"), (second, b"5678")):
        write_bytes(path, data)
        os.utime(path, (1, 1))
    for kind in (file_hash, mark, stamp):
        assert kind(first) != kind(second), kind.__name__
    before = stamp(first)
    time.sleep(0.02)
    shutil.copy2(second, first)
    assert stamp(first) != before and file_hash(first) == file_hash(second)
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1}) != content_hash({"a": 2, "b": 1})
    assert content_hash("ab", "c") != content_hash("a", "bc")


def test_a_call_is_tried_again_and_its_last_error_told():
    tries = []

    def fails(times):
        tries.append(times)
        if len(tries) < times:
            raise OSError(f"attempt {len(tries)}")
        return "done"

    assert retried(lambda: fails(3), wait=0) == "done" and len(tries) == 3
    tries.clear()
    with pytest.raises(OSError, match="attempt 3"):
        retried(lambda: fails(9), wait=0)


def test_a_lock_is_held_once_and_not_by_children(tmp_path):
    lock = Lock(tmp_path / "lock", "busy")
    with pytest.raises(UniLIPError, match="busy"):
        Lock(tmp_path / "lock", "busy")
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        lock.release()
        Lock(tmp_path / "lock", "busy").release()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
