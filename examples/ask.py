"""Ask about a picture, about several at once, and without any.

python examples/ask.py [MODEL]
"""

import sys

from unilip import UniLIP
from unilip.demo import FOLDER, examples

model = UniLIP.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None)
panda, donuts = (FOLDER / picture["file"] for picture in examples()["pictures"][:2])
print(model.ask(panda, "What is this?", max_new_tokens=16))
print(model.ask([panda, donuts], ["What is this?", "How many donuts are there?"], max_new_tokens=16))
print(model.ask(None, "Which animal says meow?", max_new_tokens=16))
