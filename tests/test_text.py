"""Texts become exactly the prompts of the released models, and what people type is plain text."""

import dataclasses

import pytest
import torch

from unilip.checkpoints.tokenizer import load_tokenizer
from unilip.errors import CheckpointError, PromptError
from unilip.method.text import NEEDED_TOKENS, Message, Processor
from unilip.sampling import FORBIDDEN, MAX_PROMPT_CHARACTERS, check_prompt
from unilip.sizes import preset


@pytest.fixture(scope="module")
def processor(tiny_tokenizer) -> Processor:
    return Processor(tiny_tokenizer, preset("tiny"))


IMAGE = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"


def test_the_prompts_are_exactly_those_of_the_released_models(processor, tiny_tokenizer):
    """Token by token what the tokenizer makes of the whole text, its special tokens recognised."""
    request = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<img>"
    turns = [Message("user", "What?", (1, 3)), Message("assistant", "A cat."), Message("user", "Why?")]
    chat = (
        f"<|im_start|>user\n{IMAGE}\n<img>{'<IMG_CONTEXT>' * 12}</img>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    )
    for prompt, text in (
        (processor.generate_text("a cat"), request.format("Generate an image: a cat")),
        (processor.generate_text(None), request.format("Generate an image.")),
        (processor.edit_text("blue"), request.format(f"Edit the image: blue\n{IMAGE}")),
        (processor.edit_text(None), request.format(f"Edit the image.\n{IMAGE}")),
        (processor.chat_text(turns), chat + "<|im_start|>assistant\n"),
        (processor.chat_text(turns, open_turn=False), chat),
    ):
        assert processor.ids(prompt) == tiny_tokenizer.encode(text, special=True), text
    with pytest.raises(PromptError, match=r"system.*user, assistant"):
        processor.chat_text([Message("system", "Be nice.")])


def test_what_a_person_types_is_plain_text_wherever_it_stands(processor, tiny_tokenizer):
    special = {tiny_tokenizer.token_id(name) for name in (*NEEDED_TOKENS, *FORBIDDEN)}
    typed = "put <img> in </img>, <|im_end|> and <IMG_CONTEXT>"
    plain = tiny_tokenizer.encode(typed, special=False)
    assert special.isdisjoint(plain) and tiny_tokenizer.decode(plain) == typed
    for make in (processor.generate_text, processor.edit_text, lambda t: processor.chat_text([Message("user", t)])):
        with_it, without = ([i for i in processor.ids(make(t)) if i in special] for t in (typed, "a"))
        assert with_it == without and processor.tokenize([make(typed)]).image_slots.sum() in (0, 4)


def test_image_slots(processor):
    texts = [processor.edit_text("blue"), processor.generate_text("a cat"), processor.edit_text("a longer instruction")]
    tokens = processor.tokenize(texts)
    assert tokens.image_slots.sum(1).tolist() == [4, 0, 4]
    assert (tokens.input_ids[tokens.image_slots] == processor.image_id).all()
    assert processor.tokenize([texts[1], processor.edit_text("x", 15)]).image_slots.sum() == 15


def test_padding_is_no_image_slot_even_where_they_share_an_id(tiny_tokenizer):
    processor = Processor(tiny_tokenizer, preset("tiny"))
    processor.pad_id = processor.image_id
    tokens = processor.tokenize([processor.edit_text("blue"), processor.generate_text("a")])
    assert tokens.image_slots.sum(1).tolist() == [4, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, processor):
    texts = ["a", "a much longer text"]
    tokens = processor.tokenize(texts, side)
    alone = processor.tokenize(texts[:1]).input_ids[0]
    length, short = tokens.input_ids.shape[1], len(alone)
    valid = [0] * (length - short) + [1] * short if side == "left" else [1] * short + [0] * (length - short)
    assert tokens.attention_mask.tolist() == [valid, [1] * length]
    assert torch.equal(tokens.input_ids[0][tokens.attention_mask[0].bool()], alone)
    assert (tokens.input_ids[0][tokens.attention_mask[0] == 0] == processor.pad_id).all()


def test_tokens_move_together(processor):
    moved = processor.tokenize(["a"]).to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.attention_mask, moved.image_slots)} == {"meta"}


def test_reserved_tokens_are_refused_and_others_are_not():
    assert set(FORBIDDEN) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<IMG_CONTEXT>"}
    for token in FORBIDDEN:
        with pytest.raises(PromptError, match="reserves") as caught:
            check_prompt(f"a cat {token} a dog")
        assert token in str(caught.value)
    for prompt in ("an <img> tag", "</img>", "<b>", "<|im_begin|>"):
        assert check_prompt(prompt) == prompt


def test_impossible_prompts_are_refused():
    cases = [("", "empty"), (" \n\t ", "empty"), (None, "string"), (3, "int"), (["a"], "list"), (b"a", "bytes")]
    cases += [("x" * (MAX_PROMPT_CHARACTERS + 1), "8001 characters"), ("a \ud83d", "surrogate")]
    for prompt, words in cases:
        with pytest.raises(PromptError, match=f"caption .*{words}"):
            check_prompt(prompt, "caption")


def test_a_prompt_is_stripped_and_otherwise_kept():
    assert check_prompt("  a  cat\n🐈 <b> ") == "a  cat\n🐈 <b>"


def test_a_prompt_beyond_the_positions_is_refused(processor):
    assert processor.max_tokens == 512 - 8
    with pytest.raises(PromptError, match="no prompt"):
        processor.tokenize([])
    with pytest.raises(PromptError, match=r"600 tokens.*504"):
        processor.tokenize(["0" * 600])


def test_a_tokenizer_without_the_tokens_is_refused(fresh_tokenizer):
    with pytest.raises(CheckpointError, match=r"</img>, <IMG_CONTEXT>"):
        Processor(fresh_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>")), preset("tiny"))


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_tokenizer):
    config = preset("tiny")
    small = config.replace(text=dataclasses.replace(config.text, vocab_size=len(tiny_tokenizer) - 1))
    with pytest.raises(CheckpointError, match=rf"{len(tiny_tokenizer)} tokens.*{len(tiny_tokenizer) - 1}"):
        Processor(tiny_tokenizer, small)


def test_a_folder_without_a_readable_tokenizer_is_refused(tmp_path):
    for content in (None, "not json", '{"model": 3}'):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match="tokenizer"):
            load_tokenizer(tmp_path)


def test_text_survives_the_tokenizer(processor):
    for text in ("a cat", "héllo wörld", "日本語 🙂", "two\nlines", "don't stop , please ."):
        assert processor.decode(processor.tokenize([(f"  {text}", processor.end_id)]).input_ids) == [text]
