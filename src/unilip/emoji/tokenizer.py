"""Train the tokenizer of the embedded models: byte-level BPE with the released special tokens.

In: a world, whose sentences, in lower case and with single spaces, are the corpus. Out: a folder that `AutoTokenizer`
loads. Same world and size, same bytes.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from unilip.checkpoints.tokenizer import FOLDS, QWEN2_SPLIT, WORD
from unilip.checkpoints.tokenizer import Tokenizer as Trained
from unilip.emoji.captions import PLAN, WORDS, as_written, canonical, caption, plan
from unilip.emoji.concepts import concept
from unilip.emoji.edits import sample_edit
from unilip.emoji.knowledge import knowledge
from unilip.emoji.questions import questions
from unilip.emoji.world import TASKS, World, sample_scene
from unilip.errors import DataError
from unilip.files import generator, write_text

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
PAD, EOS = "<|endoftext|>", "<|im_end|>"
SMALL_TALK: list[str] = WORDS["small talk"]  # outside the pictures: what people also type to a demo


def corpus(world: World, n: int, seed: int = 0) -> Iterator[str]:
    """Yield N sentences over all templates: captions, questions and answers, edits, knowledge, chat turns."""
    known = knowledge(world, "train")
    names = (*world.concepts, *world.extra, *world.guests)
    for i in range(n):
        rng = generator("corpus", seed, i)
        choice = i % 8
        if choice < 2:
            yield "Generate an image: " + _caption(world, rng)
        elif choice < 4:
            scene = sample_scene(world, rng, rng.choice(TASKS), purpose="understanding")
            qa = rng.choice(questions(scene, rng, world))
            yield f"user\n{qa.question}\nassistant\n{qa.answer}\n"
        elif choice == 4:
            yield "Edit the image: " + sample_edit(world, rng, rng.choice(world.edits)).instruction
        elif choice == 5 and known:
            fact = rng.choice(known)
            yield f"user\n{fact.question}\nassistant\n{fact.answer}\n"
        elif choice == 6:
            # names as answers, plural and alone, so that all of them become few tokens, those held out too
            c = concept(rng.choice(names))
            yield f"{c.phrase} and the {c.name}, three {c.plural}"
        else:
            yield rng.choice((*SMALL_TALK, _caption(world, rng)))


def _caption(world: World, rng: random.Random) -> str:
    task = rng.choice(TASKS)
    scene = sample_scene(world, rng, task, purpose="understanding")
    form = rng.random()
    if form < 0.2:
        return canonical(scene, task, world)
    if form < 0.4:
        return f"{PLAN}{canonical(scene, task, world)}\nassistant\n{plan(scene, world)}"
    words = caption(scene, task, rng, world, where=form < 0.7)
    return as_written(words, rng) if rng.random() < 0.5 else words


def train_tokenizer(
    world: World, vocab_size: int | None = None, path: Path | None = None, sentences: int = 24_000, seed: int = 0
) -> Trained:
    """Train on WORLD's corpus, save to folder PATH if given, and return the tokenizer.

    VOCAB_SIZE counts the special tokens; by default 1536 for pico and 3072 for others. Raises DataError below 320.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    size = vocab_size if vocab_size is not None else (1536 if world.name == "pico" else 3072)
    if size < 256 + len(SPECIAL_TOKENS) + 58:
        raise DataError(f"vocab_size {size} is too small; give at least 320, for 256 bytes and the special tokens")
    tokenizer = Tokenizer(models.BPE())
    # case, quotation marks and spaces carry nothing in this world; line breaks belong to the chat template
    folds = [normalizers.Replace(Regex(pattern), content) for pattern, content in FOLDS]
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *folds])
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytelevel])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = list(corpus(world, sentences, seed))
    tokenizer.train_from_iterator(texts, trainer)
    never = {word for name in world.extra for word in name.split()}  # only in this corpus, so that they are few tokens
    read = [set(re.findall(WORD, text.lower())) for text in texts if text not in SMALL_TALK]
    known = sorted(set().union(*(words for words in read if not words & never)))
    others = [token for token in SPECIAL_TOKENS if token not in (EOS, PAD)]
    special = {"eos_token": EOS, "pad_token": PAD, "additional_special_tokens": others}
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=False) + "\n",
        "tokenizer_config.json": json.dumps({**special, **WORDS["tokenizer"], "known_words": known}, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    if path is not None:
        for name, text in files.items():
            write_text(Path(path) / name, text)
    return Trained({name: text.encode() for name, text in files.items()})
