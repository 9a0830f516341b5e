"""Change pictures as told, several at once; the sources keep their shape.

python examples/edit.py [MODEL]
"""

import sys

from unilip import UniLIP
from unilip.demo import FOLDER, examples

model = UniLIP.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None)
edits = examples()["edits"]  # or your own: paths, Pillow images, arrays or tensors
sources, instructions = [FOLDER / edit["source"] for edit in edits], [edit["instruction"] for edit in edits]
output = model.edit(sources, instructions, keep_aspect=True)
for source, instruction, image in zip(sources, instructions, output.images, strict=True):
    image.save(f"edited-{source.name}")
    print(f"{instruction}: edited-{source.name}")
