"""LiteLLM: chat with a picture, a stream, drawing, responses."""

import base64
import json
import sys
from importlib.metadata import version
from pathlib import Path

import litellm

url, path = sys.argv[1:]
common = {"api_base": url, "api_key": "none"}
data = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
messages = [{"role": "user", "content": [
    {"type": "text", "text": "What is in the picture?"}, {"type": "image_url", "image_url": {"url": data}},
]}]  # fmt: skip
whole = litellm.completion(model="openai/unilip", messages=messages, **common).choices[0].message.content
chunks = litellm.completion(model="openai/unilip", messages=messages, stream=True, **common)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
drawn = litellm.image_generation(model="openai/unilip", prompt="three yellow stars", **common)
assert base64.b64decode(drawn.data[0].b64_json)[:4] == b"\x89PNG"
said = litellm.responses(model="openai/unilip", input="What animal says moo?", **common)
print(json.dumps({"version": version("litellm"), "answer": whole, "responses": said.output[0].content[0].text}))
