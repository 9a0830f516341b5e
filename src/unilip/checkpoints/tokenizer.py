"""Byte-level BPE tokenizer of Qwen2, read by the package `tokenizers` alone.

In:  a folder's tokenizer.json, or vocab.json and merges.txt with what was added to them. Out: text <-> ids. No code of
a checkpoint is ever run, and what a file may ask for is on a short list, so a hostile one is refused.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from unilip.errors import CheckpointError, reason
from unilip.files import content_hash, read_table

TABLE: dict[str, Any] = read_table("unilip.checkpoints", "tables.json")["tokenizer"]
TOKENIZER_FILES: tuple[str, ...] = tuple(TABLE["files"])
WORD = r"[^\W\d_]+"  # letters of any script
LARGEST_FILE = 64 * 2**20  # bytes; Qwen2's tokenizer.json has 11 MiB

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A pattern decides how long a text takes, and a bad one takes for ever: these are known to be quick.
SPLITS = (QWEN2_SPLIT, QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1))
# What small models read alike, as (pattern, what it becomes): quotation marks, spaces, and spaces before a stop.
FOLDS: tuple[tuple[str, str], ...] = tuple((pattern, content) for pattern, content in TABLE["folds"])
# What a tokenizer.json may be made of, by section; none of it lets a text grow or wait.
STEPS: dict[str, list[str]] = TABLE["steps"]


class Tokenizer:
    """Text to ids and back, by files as in `TOKENIZER_FILES`; `where` is what errors call their place.

    Raises CheckpointError: a file is missing, damaged, or asks for more than byte-level BPE.
    """

    def __init__(self, files: Mapping[str, bytes], where: str = "The tokenizer") -> None:
        self.files = dict(files)
        self._where = where
        self._data = self._json("tokenizer.json") if "tokenizer.json" in files else self._assemble()
        added = self._data.get("added_tokens") or []
        try:
            for section in STEPS:
                _check_steps(section, self._data.get(section))
            # what would change ids from call to call, cut texts or pad them is none of a tokenizer's business here
            self._data |= {"truncation": None, "padding": None, "post_processor": None}
            self._data["model"] = {**self._data["model"], "type": "BPE", "dropout": None}
            self._tokenizer = _build(self._data)
            wrong = [t["content"] for t in added if self._tokenizer.token_to_id(t["content"]) != t["id"]]
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise self._damaged(error) from error
        if wrong:
            raise CheckpointError(f"{where}: {wrong[0]!r} has two ids; copy the original tokenizer files again.")
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)  # ids by token
        names = self._settings("tokenizer_config.json"), self._settings("special_tokens_map.json")
        self.pad_id = next((self.token_id(n) for n in (_content(s.get("pad_token")) for s in names) if n), None)
        known = names[0].get("known_words") or ()
        if not isinstance(known, (list, tuple)) or not all(isinstance(word, str) for word in known):
            raise self._damaged("known_words is no list of words", "tokenizer_config.json")
        self.known = frozenset(known)
        # people's words never become these: special tokens, and anything else that looks like markup
        self._reserved = {t["content"]: t["id"] for t in added if t.get("special") or t["content"][:1] == "<"}

    def __len__(self) -> int:
        """One more than the highest id: how many rows an embedding of it needs."""
        return max(self.vocabulary.values(), default=-1) + 1

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change when any of its files does."""
        return content_hash(*(part for file in sorted(self.files.items()) for part in file))[:16]

    def token_id(self, name: str) -> int | None:
        return self.vocabulary.get(name)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Tokenize as transformers' tokenizers do, special tokens recognised; Qwen2's adds none, asked to or not."""
        return {"input_ids": self.encode(text, special=True)}

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the ids of a text; SPECIAL: `<img>` and its like mean the special tokens, as in a template."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not special and not set(self._reserved.values()).isdisjoint(ids):
            ids = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def unread(self, text: str) -> list[str]:
        """Return the words of a text, in lower case, that training never read; none where nobody knows."""
        words = dict.fromkeys(re.findall(WORD, text.lower())) if self.known else ()
        return [word for word in words if word not in self.known]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the files, byte for byte as they were read, into a folder, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer, which has never heard of the reserved tokens."""
        model = self._data["model"]
        vocabulary = {token: number for token, number in model["vocab"].items() if token not in self._reserved}
        added = [token for token in self._data["added_tokens"] if token["content"] not in self._reserved]
        try:
            return _build(self._data | {"added_tokens": added, "model": model | {"vocab": vocabulary}})
        except ValueError as error:  # a merge makes a special token out of plain text
            raise self._damaged(error) from error

    def _assemble(self) -> dict[str, Any]:
        """Make the contents of a tokenizer.json from the older files of a Qwen2 tokenizer."""
        if "vocab.json" not in self.files or "merges.txt" not in self.files:
            raise CheckpointError(f"{self._where} has no tokenizer: no tokenizer.json, nor vocab.json and merges.txt.")
        vocabulary = self._json("vocab.json")
        lines = self._text("merges.txt").replace("\r\n", "\n").split("\n")
        merges = [line for n, line in enumerate(lines) if line and not (n == 0 and line.startswith("#version"))]
        settings = self._settings("tokenizer_config.json")
        added: dict[str, dict[str, Any]] = {}
        try:
            for name, number in self._settings("added_tokens.json").items():
                added[name] = {"id": number, "content": name, "special": True}
            for number, token in (settings.get("added_tokens_decoder") or {}).items():
                added[token["content"]] = {**token, "id": int(number)}
            for name in _special_names(settings | self._settings("special_tokens_map.json")):
                if name in vocabulary:
                    added.setdefault(name, {"id": vocabulary[name], "content": name})["special"] = True
            for token in added.values():
                for flag in ("single_word", "lstrip", "rstrip", "normalized", "special"):
                    token[flag] = bool(token.get(flag, False))
            ordered = sorted(added.values(), key=lambda token: token["id"])
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise self._damaged(error) from error
        split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {
            "version": "1.0", "added_tokens": ordered, "normalizer": {"type": "NFC"}, "decoder": level,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        }  # fmt: skip

    def _text(self, name: str) -> str:
        try:
            return self.files[name].decode("utf-8-sig")
        except ValueError as error:
            raise self._damaged(error, name) from error

    def _json(self, name: str) -> dict[str, Any]:
        try:
            data = json.loads(self._text(name))
        except (ValueError, RecursionError) as error:
            raise self._damaged(error, name) from error
        if not isinstance(data, dict):
            raise self._damaged("no JSON object", name)
        return data

    def _settings(self, name: str) -> dict[str, Any]:
        return self._json(name) if name in self.files else {}

    def _damaged(self, error: BaseException | str, name: str = "its tokenizer") -> CheckpointError:
        why = error if isinstance(error, str) else reason(error, 200)
        return CheckpointError(f"{self._where}: {name} cannot be read ({why}); copy the original file again.")


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Read a folder's tokenizer files. Raises CheckpointError: none, unreadable ones, or links to files elsewhere."""
    files, own = {}, Path(folder).resolve()
    homes = [own, *(place.parent / "blobs" for place in own.parents if place.name == "snapshots")]  # of the hub's cache
    for path in (Path(folder) / name for name in TOKENIZER_FILES):
        try:
            if not path.is_file():
                continue
            if path.resolve().parent not in homes:  # what it holds would go wherever the model is saved or uploaded
                raise CheckpointError(f"{path} is a link to a file elsewhere; copy that file into the folder.")
            if path.stat().st_size > LARGEST_FILE:
                raise CheckpointError(f"{path} is larger than {LARGEST_FILE >> 20} MiB, which no tokenizer needs.")
            files[path.name] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}).") from error
    return Tokenizer(files, str(folder))


def _build(data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Build the tokenizer of a tokenizer.json's contents; a ValueError says what is wrong with them."""
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(data))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare exceptions, and panics are not even those
        raise ValueError(str(error)) from error


def _check_steps(section: str, step: Any) -> None:
    """Say with a ValueError which step of a section, or inside of one, is not on the list."""
    allowed, left = STEPS[section], [] if step is None else [step]
    while left:
        one = left.pop()
        kind = one.get("type", allowed[0] if section == "model" else None)
        if kind not in allowed:
            raise ValueError(f"{section} {kind!r} is not supported; known are {', '.join(allowed)}")
        if kind == "Sequence":
            left += one.get("normalizers") or one.get("pretokenizers") or one["decoders"]
        pattern = one.get("pattern", {}).get("Regex") if kind in ("Split", "Replace") else None
        if kind == "Replace" and (pattern, one.get("content")) not in FOLDS:
            raise ValueError(f"its normalizer replaces {str(pattern)[:60]!r}, which is no known pattern")
        if kind != "Replace" and pattern is not None and pattern not in SPLITS:
            raise ValueError(f"its pre-tokenizer splits by {str(pattern)[:60]!r}, which is not one of Qwen2's patterns")


def _content(token: Any) -> str | None:
    """Return the text of a token that a config writes as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _special_names(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        if key.endswith("_token"):
            yield from filter(None, [_content(value)])
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            yield from filter(None, map(_content, value.values() if isinstance(value, dict) else value))
