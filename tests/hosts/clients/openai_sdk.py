"""openai-python: models, chat with a picture and tools, JSON mode, drawing, editing, streams, responses."""

import base64
import io
import json
import sys
from pathlib import Path

import openai

url, path = sys.argv[1:]
client = openai.OpenAI(api_key="none", base_url=url)
picture = Path(path).read_bytes()
data = "data:image/png;base64," + base64.b64encode(picture).decode()
messages = [{"role": "user", "content": [
    {"type": "text", "text": "What is in the picture?"}, {"type": "image_url", "image_url": {"url": data}},
]}]  # fmt: skip
tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
model = client.models.list().data[0].id
chat = client.chat.completions.create(model=model, messages=messages, tools=tools, max_tokens=4096)
chunks = client.chat.completions.create(model=model, messages=messages, stream=True)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert streamed == chat.choices[0].message.content
form = {"type": "json_object"}
said = client.chat.completions.create(model=model, messages=messages, response_format=form).choices[0].message.content
assert isinstance(json.loads(said), dict)
drawn = client.images.generate(model=model, prompt="three yellow stars", n=2, extra_body={"seed": 1})
assert [base64.b64decode(one.b64_json)[:4] for one in drawn.data] == [b"\x89PNG"] * 2
source = io.BytesIO(picture)
source.name = "panda.png"
edited = client.images.edit(model=model, image=source, prompt="change the background to pink")
kinds = [e.type for e in client.images.generate(model=model, prompt="a cat", stream=True, partial_images=2)]
assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"], kinds
answer = client.responses.create(model=model, input="Draw a red car", tools=[{"type": "image_generation"}])
assert answer.output[0].type == "image_generation_call" and answer.output[0].result
more = client.responses.create(
    model=model, input="make it blue", previous_response_id=answer.id, tools=[{"type": "image_generation"}]
)
assert more.output[0].type == "image_generation_call"
print(json.dumps({"version": openai.__version__, "answer": streamed, "edited": len(edited.data), "stream": kinds[0]}))
