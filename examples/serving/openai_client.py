"""Draw, edit and ask with the official `openai` client, against a server started by `unilip serve`.

python examples/serving/openai_client.py [URL [KEY]]
"""

import base64
import sys
from pathlib import Path

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key=sys.argv[2] if len(sys.argv) > 2 else "none")
model = client.models.list().data[0].id

drawn = client.images.generate(model=model, prompt="three yellow stars", extra_body={"seed": 7})
stars = base64.b64decode(drawn.data[0].b64_json)
Path("client-stars.png").write_bytes(stars)

edited = client.images.edit(model=model, image=("stars.png", stars), prompt="change the background to pink")
Path("client-pink.png").write_bytes(base64.b64decode(edited.data[0].b64_json))

picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{edited.data[0].b64_json}"}}
question = [picture, {"type": "text", "text": "What color is the background?"}]
for piece in client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], stream=True):
    print(piece.choices[0].delta.content or "" if piece.choices else "", end="", flush=True)
print()
