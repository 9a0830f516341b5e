"""The tokenizer: Qwen2's ids without transformers, special tokens only where they are meant, hostile files refused."""

import copy
import json
import pickle
import time
import unicodedata
from functools import partial
from importlib import resources
from pathlib import Path

import pytest
import tokenizers

from unilip.checkpoints.tokenizer import SPLITS, Tokenizer, load_tokenizer
from unilip.errors import CheckpointError

WEIGHTS = Path(str(resources.files("unilip"))) / "weights"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
TEXTS = (
    "<|im_start|>user\nGenerate an image: three yellow stars<|im_end|>\n<|im_start|>assistant\n<img>",
    "  \n\n x 1234 don't É e\u0301 ﬁ \u2028 日本語 🙂 \ufeff\r\n\t<img>a</img> <|im_end|> <tool_call>b</tool_call>",
    " " * 50 + "a", "a" * 3000, "", "＜|im_end|＞", "\x00\x7f\u00a0",
)  # fmt: skip


def older(folder: Path) -> Path:
    """The embedded tokenizer's vocabulary as a Qwen2 folder of the years before tokenizer.json."""
    data = json.loads((WEIGHTS / "tokenizer.json").read_text())
    words = [w for w in data["model"]["vocab"] if w not in SPECIAL]
    start = len(words)
    added = [*SPECIAL, "<tool_call>", "</tool_call>"]
    names = {
        "vocab.json": json.dumps({w: i for i, w in enumerate(words)}),
        "merges.txt": "#version: 0.2\n" + "\n".join(map(" ".join, data["model"]["merges"])) + "\n",
        "added_tokens.json": json.dumps({s: start + i for i, s in enumerate(added)}),
        "tokenizer_config.json": json.dumps({
            "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(SPECIAL[1:]), "auto_map": {"AutoTokenizer": ["evil.Trap", None]},
            "added_tokens_decoder": {
                str(i): {"content": s, "special": s in SPECIAL} for i, s in enumerate(added, start)
            },
        }),
        "special_tokens_map.json": json.dumps({"pad_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_end|>"}),
    }  # fmt: skip
    for name, text in names.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_ids_and_texts_equal_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for folder, kind in (
        (WEIGHTS, transformers.PreTrainedTokenizerFast),
        (older(tmp_path), transformers.Qwen2Tokenizer),
    ):
        ours, theirs = load_tokenizer(folder), kind.from_pretrained(str(folder))
        assert (len(ours), ours.pad_id, ours.vocabulary) == (len(theirs), theirs.pad_token_id, theirs.get_vocab())
        for text in TEXTS:
            ids = ours.encode(text, special=True)
            assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
            assert ours(text, add_special_tokens=False) == ours(text) == {"input_ids": ids}
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_what_people_type_is_plain_text(tmp_path: Path) -> None:
    folded = tokenizers.Tokenizer.from_file(str(WEIGHTS / "tokenizer.json")).normalizer.normalize_str  # lower case, ...
    composed = partial(unicodedata.normalize, "NFC")
    for tokenizer, read in ((load_tokenizer(WEIGHTS), folded), (load_tokenizer(older(tmp_path)), composed)):
        special = {tokenizer.token_id(name) for name in (*SPECIAL, "<tool_call>", "</tool_call>")}
        assert None not in {tokenizer.token_id(name) for name in SPECIAL} and tokenizer.token_id("<none>") is None
        for text in TEXTS:
            ids = tokenizer.encode(text, special=False)
            assert special.isdisjoint(ids)
            assert tokenizer.decode(ids) == read(text)
            if not any(name in text for name in (*SPECIAL, "<tool_call>")):
                assert ids == tokenizer.encode(text, special=True)
        for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):  # it goes to other processes
            assert other.encode(TEXTS[1], special=False) == tokenizer.encode(TEXTS[1], special=False)


def test_saving_writes_the_bytes_that_were_read(tmp_path: Path) -> None:
    for source in (WEIGHTS, older(tmp_path)):
        (tmp_path / source.name / "copy").mkdir(parents=True)
        load_tokenizer(source).save_pretrained(tmp_path / source.name / "copy")
        saved = {p.name: p.read_bytes() for p in (tmp_path / source.name / "copy").iterdir()}
        assert saved == {name: (source / name).read_bytes() for name in saved} and len(saved) >= 3


def test_hostile_and_broken_files_are_refused_at_once(tmp_path: Path) -> None:
    whole = (WEIGHTS / "tokenizer.json").read_text()
    data = json.loads(whole)

    def file(**changes: object) -> bytes:
        return json.dumps(data | changes).encode()

    def split(pattern: str) -> bytes:
        return file(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        )

    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    cases = {
        "cut": whole[:5000].encode(), "empty": b"", "a list": b"[]", "no utf-8": b"\xff\xfe\x00",
        "a page": b"<!DOCTYPE html>", "deep": b'{"model":' * 100_000, "nothing": b"{}", "no model": file(model=None),
        "numbers": file(model=7), "added tokens": file(added_tokens=[1]),
        "ids that disagree": file(added_tokens=[data["added_tokens"][0] | {"id": 7}]),
        "an absurd id": file(added_tokens=[data["added_tokens"][0] | {"id": 10**18}]),
        "a regex bomb": split(r"(a+)+$"), "another": split(r"(\w+\s?)*!"), "one that grows": file(normalizer=grow),
        "growing inside": file(normalizer={"type": "Sequence", "normalizers": [grow] * 40}),
        "no steps": file(normalizer={"type": "Sequence"}), "unigram": file(model={"type": "Unigram", "vocab": []}),
        "merges": file(model=data["model"] | {"merges": [["x", "nowhere"]]}),
    }  # fmt: skip
    started, passed = time.perf_counter(), []
    for name, content in cases.items():
        try:
            Tokenizer({"tokenizer.json": content}, "somewhere").encode("a" * 5000 + "!", special=True)
            passed.append(name)
        except CheckpointError as error:
            assert "somewhere" in str(error) and len(str(error)) < 500, name
    for files in (
        {},
        {"vocab.json": b"{}"},
        {"vocab.json": b"{}", "merges.txt": b"a b\n"},
        {"vocab.json": b'{"a": "b"}', "merges.txt": b""},
    ):
        with pytest.raises(CheckpointError):
            Tokenizer(files)
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path / "nothing")
    for odd in ([1], [[1]], 7, "word"):
        with pytest.raises(CheckpointError, match="known_words is no list of words"):
            Tokenizer(
                {"tokenizer.json": whole.encode(), "tokenizer_config.json": json.dumps({"known_words": odd}).encode()}
            )
    for odd in ([1], {"content": {}}, 7, None):
        named = json.dumps({"pad_token": odd, "additional_special_tokens": odd}).encode()
        assert Tokenizer({"tokenizer.json": whole.encode(), "tokenizer_config.json": named}).pad_id is None
    assert passed == [] and time.perf_counter() - started < 10
    for pattern in SPLITS:  # and what is allowed is quick on every text that is read
        for text in (" " * 8000 + "a", "a" * 8000, "'" * 8000, ("\r \n" * 3000) + "."):
            began = time.perf_counter()
            Tokenizer({"tokenizer.json": split(pattern)}).encode(text, special=True)
            assert time.perf_counter() - began < 2, (pattern, text[:3])


def test_nothing_random_cut_or_padded_is_left_in_force() -> None:
    data = json.loads((WEIGHTS / "tokenizer.json").read_text())
    plain = Tokenizer({"tokenizer.json": json.dumps(data).encode()})
    odd = data | {
        "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
                    "pad_to_multiple_of": None},
        "model": data["model"] | {"dropout": 0.5},
    }  # fmt: skip
    tokenizer = Tokenizer({"tokenizer.json": json.dumps(odd).encode()})
    for _ in range(5):
        assert tokenizer.encode(TEXTS[0], special=True) == plain.encode(TEXTS[0], special=True)
