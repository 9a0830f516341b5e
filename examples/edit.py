"""Change pictures as told, several at once; the sources keep their shape.

python examples/edit.py [MODEL]
"""

import sys

from unilip import UniLIP
from unilip.demo import examples

model = UniLIP.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None)
edits = examples().edits  # or your own: paths, Pillow images, arrays or tensors
output = model.edit([edit.source for edit in edits], [edit.instruction for edit in edits], keep_aspect=True)
for edit, image in zip(edits, output.images, strict=True):
    image.save(f"edited-{edit.source.name}")
    print(f"{edit.instruction}: edited-{edit.source.name}")
