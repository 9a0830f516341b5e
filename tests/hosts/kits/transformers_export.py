"""transformers with its own processor on an export: the answers about pictures of any size are ours."""

import json
import sys
from importlib.metadata import version

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from unilip import UniLIP
from unilip.checkpoints.write import convert

path, place = sys.argv[1:]
folder, ours = convert(None, f"{place}/answers", to="transformers"), UniLIP.from_pretrained()
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
answers, differing = [], []
for size in ((112, 112), (640, 480), (50, 200)):
    picture = Image.open(path).convert("RGB").resize(size)
    for question in ("What is in the picture?", "What color is the background?"):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        given = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        with torch.inference_mode():
            made = model.generate(**given, max_new_tokens=32)[0, given["input_ids"].shape[1] :]
        answers.append(processor.decode(made, skip_special_tokens=True).strip())
        if answers[-1] != ours.ask(picture, question, max_new_tokens=32):
            differing.append((size, question, answers[-1]))
print(json.dumps({"version": version("transformers"), "answer": answers, "differing": differing}))
