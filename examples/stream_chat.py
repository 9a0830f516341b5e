"""A conversation about a picture, printed as the answers come.

python examples/stream_chat.py [MODEL]
"""

import sys

from unilip import UniLIP
from unilip.demo import FOLDER, examples

model = UniLIP.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None)
picture = FOLDER / examples()["pictures"][0]["file"]
history = []
for question in ("What is this?", "What color is the background?"):
    image = None if history else picture  # shown once, remembered by the history
    print(f"> {question}")
    answer = ""
    for piece in model.ask(image, question, history=history, max_new_tokens=24, stream=True):
        print(piece, end="", flush=True)
        answer += piece
    print()
    history += [
        {"role": "user", "content": question, "images": [] if image is None else [image]},
        {"role": "assistant", "content": answer or "?"},
    ]
