"""Questions: pictures, histories, batches, streams and sampling; the cache changes no answer."""

import numpy as np
import pytest
import torch

from unilip import ImageOutput
from unilip.errors import ImageError, PromptError, UniLIPError
from unilip.method.mllm import next_token
from unilip.method.text import Message
from unilip.pictures import to_pixels

QUESTIONS = ["What colour is the car?", "How many birds?", "Describe the image. Are there two dogs and one cat in it?"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def prompt(tiny_model, monkeypatch):
    """The text and the pictures (M,3,S,S) that the model reads for a call: f(*arguments of ask) -> texts, pixels."""

    def read(*arguments, **options):
        texts, pixels = [], []
        tokenize = tiny_model.processor.tokenize

        def spy(given):
            texts[:] = given
            return tokenize(given)

        monkeypatch.setattr(tiny_model.processor, "tokenize", spy)
        hook = tiny_model.encoder.register_forward_pre_hook(lambda module, inputs: pixels.append(inputs[0]))
        tiny_model.ask(*arguments, max_new_tokens=1, **options)
        hook.remove()
        return texts, pixels[0] if pixels else None

    return read


def same_as(pixels, images) -> bool:
    return torch.equal(pixels, to_pixels(images))


# --- what the model reads ---------------------------------------------------------------------------------------------


def test_a_question_about_a_picture(prompt, tiny_model, picture):
    texts, pixels = prompt(picture(), "  What? ")
    assert texts == [tiny_model.processor.chat_text([Message("user", "What?", (1,))])]
    assert same_as(pixels, [picture()])


def test_a_question_about_nothing(prompt, tiny_model):
    for nothing in (None, []):
        texts, pixels = prompt(nothing, "What?")
        assert texts == [tiny_model.processor.chat_text([Message("user", "What?")])]
        assert pixels is None


def test_a_question_about_several_pictures(prompt, tiny_model, picture):
    several = [picture(), picture(seed=1), picture(seed=2)]
    texts, pixels = prompt(several, "Which?")
    assert texts == [tiny_model.processor.chat_text([Message("user", "Which?", (1, 1, 1))])]
    assert same_as(pixels, several)


def test_a_history_with_pictures(prompt, tiny_model, picture):
    history = [
        {"role": "user", "content": "What?", "images": [picture(seed=1), picture(seed=2)]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And this?", "images": picture(seed=3)},
        {"role": "assistant", "content": "A dog."},
    ]
    turns = [Message("user", "What?", (1, 1)), Message("assistant", "A cat."), Message("user", "And this?", (1,))]
    turns += [Message("assistant", "A dog."), Message("user", "Why?", (1,))]
    texts, pixels = prompt(picture(), "Why?", history=history)
    assert texts == [tiny_model.processor.chat_text(turns)]
    assert same_as(pixels, [picture(seed=s) for s in (1, 2, 3, 0)])
    texts, pixels = prompt([picture(seed=4), None], ["Why?", "How?"], history=history)
    turns[-1:] = [Message("user", "How?")]
    assert texts[1] == tiny_model.processor.chat_text(turns)
    assert same_as(pixels, [picture(seed=s) for s in (1, 2, 3, 4, 1, 2, 3)])


def test_a_list_of_questions(prompt, tiny_model, picture):
    texts, pixels = prompt([[picture(), picture(seed=1)], None, picture(seed=2)], QUESTIONS)
    counts = [(1, 1), (), (1,)]
    turns = [[Message("user", q, n)] for q, n in zip(QUESTIONS, counts, strict=True)]
    assert texts == [tiny_model.processor.chat_text(turn) for turn in turns]
    assert same_as(pixels, [picture(seed=s) for s in (0, 1, 2)])
    texts, pixels = prompt(picture(), QUESTIONS[:2])
    assert same_as(pixels, [picture(), picture()])
    images = [picture(seed=s) for s in range(3)]
    for several in (images, ImageOutput(images), np.stack(images)):  # one for each question, whatever holds them
        texts, pixels = prompt(several, QUESTIONS)
        assert texts == [tiny_model.processor.chat_text([Message("user", q, (1,))]) for q in QUESTIONS]
        assert same_as(pixels, images)
        assert same_as(prompt(several[:1], QUESTIONS[:2])[1], images[:1] * 2)


def test_tiles_of_a_picture_share_one_image_slot(prompt, tiny_model, picture):
    wide = picture(224, 112)
    texts, pixels = prompt([wide, picture()], "What?", max_tiles=4)
    assert texts == [tiny_model.processor.chat_text([Message("user", "What?", (3, 1))])]
    assert pixels.shape[0] == 4  # two tiles, the thumbnail, and the small picture
    assert same_as(pixels[2:3], [wide.resize((56, 56), 3)])
    assert prompt(wide, "What?")[1].shape[0] == 1


def test_pictures_and_history_change_the_answer(tiny_model, picture):
    tokens = []

    def first(*arguments, **options):
        hook = tiny_model.mllm.language_model.model.register_forward_hook(
            lambda module, inputs, output: tokens.append(output[:, -1])
        )
        tiny_model.ask(*arguments, max_new_tokens=1, **options)
        hook.remove()
        return tokens[-1]

    plain = first(picture(), "What?")
    history = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
    for other in (
        first(picture(seed=1), "What?"),
        first(None, "What?"),
        first(picture(), "Where?"),
        first(picture(), "What?", history=history),
        first([picture(), picture()], "What?"),
    ):
        assert (plain - other).abs().max() > 1e-3


# --- answers ----------------------------------------------------------------------------------------------------------


def embedded(model, questions, images):
    """Embeddings and tokens of a batch of questions about one picture each."""
    texts = [model.processor.chat_text([Message("user", q, (1,))]) for q in questions]
    tokens = model.processor.tokenize(texts)
    return model.mllm.embed(tokens.input_ids, tokens.image_slots, model.encoder(to_pixels(images))), tokens


def test_the_cache_changes_no_answer(tiny_model, picture):
    model = tiny_model
    embeddings, tokens = embedded(model, QUESTIONS, [picture(seed=i) for i in range(3)])
    cached = list(model.mllm.answer(embeddings, tokens.attention_mask, end_id=-1, max_new_tokens=12))
    mask = tokens.attention_mask
    for ids in cached:
        logits = model.mllm.logits(model.mllm(embeddings, mask)[:, -1])
        best = logits.max(-1).values
        chosen = logits.gather(-1, ids[:, None])[:, 0]
        assert (best - chosen).max() < 1e-4  # the same token, or one that is as good
        embeddings = torch.cat([embeddings, model.mllm.embed(ids)[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
    assert len({tuple(ids.tolist()) for ids in cached}) > 1


def test_a_batch_of_questions_is_its_questions_one_by_one(tiny_model, picture):
    images = [picture(), None, [picture(seed=1), picture(seed=2)]]
    together = tiny_model.ask(images, QUESTIONS, max_new_tokens=10)
    assert together == [tiny_model.ask(i, q, max_new_tokens=10) for i, q in zip(images, QUESTIONS, strict=True)]
    assert len(set(together)) > 1
    assert tiny_model.ask(picture(), QUESTIONS[:1], max_new_tokens=10) == [
        tiny_model.ask(picture(), QUESTIONS[0], max_new_tokens=10)
    ]


def test_a_row_that_has_ended_stays_so_and_disturbs_no_other(tiny_model, picture):
    model = tiny_model
    embeddings, tokens = embedded(model, QUESTIONS[:2], [picture(seed=i) for i in range(2)])

    def answer(end_id):
        columns = model.mllm.answer(embeddings, tokens.attention_mask, end_id=end_id, max_new_tokens=12)
        return torch.stack(list(columns), 1).tolist()

    free = answer(-1)
    end = next(t for t in free[0] if t not in free[1])  # a token that only the first answer contains
    stop = free[0].index(end)
    first, second = answer(end)
    assert first == free[0][:stop] + [end] * (12 - stop)
    assert second == free[1]
    both = model.mllm.answer(embeddings[:1], tokens.attention_mask[:1], end_id=end, max_new_tokens=12)
    assert len(list(both)) == stop + 1  # nothing is computed once all have ended


def test_max_new_tokens(tiny_model):
    for count in (1, 2, 7):
        calls = []
        hook = tiny_model.mllm.language_model.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        tiny_model.ask(None, "What?", max_new_tokens=count)
        hook.remove()
        assert 1 <= len(calls) <= count
        given = torch.randn(1, 3, 64), torch.ones(1, 3).long()
        assert len(list(tiny_model.mllm.answer(*given, end_id=-1, max_new_tokens=count))) == count


def say(model, monkeypatch, *ids_of_rows):
    """Let the model answer with given ids."""
    columns = list(torch.tensor(ids_of_rows).T)
    monkeypatch.setattr(model.mllm, "answer", lambda *arguments, **options: iter(columns))


@pytest.mark.parametrize(
    "text",
    [
        " A cat.",
        "héllo wörld",
        "日本語 🙂 ok",
        "  spaces  inside \n",
        "\n\nlines\n",
        "",
        "the sign \ufffd itself",
        "don't .",
    ],
    ids=repr,
)
def test_streamed_pieces_join_to_the_answer(text, tiny_model, monkeypatch):
    ids = tiny_model.processor.ids(text) + [tiny_model.processor.end_id] * 2
    say(tiny_model, monkeypatch, ids)
    plain = tiny_model.ask(None, "What?")
    pieces = list(tiny_model.ask(None, "What?", stream=True))
    assert "".join(pieces) == plain == text.strip()
    assert all(pieces)
    assert len(pieces) <= len(ids)
    half = [piece for piece in pieces if "\ufffd" in piece]
    assert len(half) == ("\ufffd" in text)  # never half a character


def test_a_stream_cut_inside_a_character_still_joins_to_the_answer(tiny_model, monkeypatch):
    ids = tiny_model.processor.ids("ok 🙂")[:-2]
    say(tiny_model, monkeypatch, ids)
    plain = tiny_model.ask(None, "What?")
    assert plain.startswith("ok")
    assert plain.endswith("\ufffd")
    assert "".join(tiny_model.ask(None, "What?", stream=True)) == plain


def test_a_stream_of_the_model_itself(tiny_model, picture):
    options = dict(max_new_tokens=20, temperature=3.0)
    plain = tiny_model.ask(picture(), "What?", generator=torch.Generator().manual_seed(3), **options)
    pieces = tiny_model.ask(picture(), "What?", generator=torch.Generator().manual_seed(3), stream=True, **options)
    assert iter(pieces) is pieces
    assert "".join(pieces) == plain
    with torch.enable_grad():
        next(tiny_model.ask(picture(), "What?", stream=True, **options))
        assert torch.is_grad_enabled()  # between two pieces the caller's own settings hold


def test_sampling(tiny_model, picture):
    def ask(**options):
        return tiny_model.ask(picture(), "What?", max_new_tokens=20, **options)

    def sampled(seed, **options):
        return ask(generator=torch.Generator().manual_seed(seed), **options)

    greedy = ask()
    assert greedy == ask() == sampled(5)  # greedy draws nothing
    assert sampled(0, temperature=5.0) == sampled(0, temperature=5.0)
    assert sampled(0, temperature=5.0) != greedy
    assert sampled(0, temperature=5.0) != sampled(1, temperature=5.0)
    assert sampled(0, temperature=5.0, top_p=1e-6) == greedy  # only the best token is left
    assert sampled(0, temperature=1e-30) == greedy


def test_choosing_a_token(generator):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    assert next_token(logits, 0, 1.0, None).tolist() == [0, 3]

    def counts(temperature, top_p):
        chosen = next_token(logits.repeat(5000, 1), temperature, top_p, generator).view(-1, 2)
        return torch.stack([torch.bincount(c, minlength=4) for c in chosen.T]) / 5000

    assert torch.allclose(counts(1.0, 1.0), logits.exp(), atol=0.03)
    expected = torch.tensor([[0.625, 0.375, 0, 0], [0, 0, 0.375, 0.625]])
    assert torch.allclose(counts(1.0, 0.7), expected, atol=0.03)  # 0.5 is short of 0.7, so the next one stays
    assert torch.allclose(counts(1.0, 0.4), expected.round(), atol=1e-6)
    assert torch.allclose(counts(0.5, 1.0), (logits * 2).softmax(-1), atol=0.03)
    assert torch.allclose(counts(1e-40, 1.0), expected.round(), atol=1e-6)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"history": [{"role": "system", "content": "a"}]}, "system.*user, assistant"),
        ({"history": [{"role": "user", "content": ""}]}, "message is empty"),
        ({"history": [{"role": "user", "content": "<|im_start|>"}]}, "reserves"),
        ({"history": [{"role": "user"}]}, "history"),
        ({"history": ["Hello"]}, "history"),
    ],
    ids=str,
)
def test_impossible_options(options, words, tiny_model):
    with pytest.raises(UniLIPError, match=words):
        tiny_model.ask(None, "What?", **options)


@pytest.mark.parametrize(
    "question",
    ["", " ", "<|im_end|>", "<IMG_CONTEXT>", ["What?", ""], None, [None], "0" * 600],
    ids=lambda q: str(q)[:20],
)
def test_impossible_questions(question, tiny_model):
    with pytest.raises(PromptError):
        tiny_model.ask(None, question)


def test_impossible_pictures_and_lists(tiny_model, picture):
    for image in ("missing.png", 3, [picture(), "missing.png"]):
        with pytest.raises(ImageError):
            tiny_model.ask(image, "What?")
    with pytest.raises(UniLIPError, match="2 images and 3 questions"):
        tiny_model.ask([picture(), picture()], QUESTIONS)
    with pytest.raises(UniLIPError, match="one question at a time"):
        tiny_model.ask(picture(), QUESTIONS, stream=True)
    with pytest.raises(PromptError, match="tokens"):
        tiny_model.ask([picture()] * 100, "What?")
    assert tiny_model.ask(picture(), []) == tiny_model.ask([], []) == []
