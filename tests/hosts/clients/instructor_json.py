"""instructor in JSON mode: an answer as an object of a class."""

import base64
import json
import sys
from importlib.metadata import version
from pathlib import Path

import instructor
import openai
from pydantic import BaseModel


class Answer(BaseModel):
    answer: str


url, path = sys.argv[1:]
client = instructor.from_openai(openai.OpenAI(api_key="none", base_url=url), mode=instructor.Mode.JSON)
data = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
messages = [{"role": "user", "content": [
    {"type": "text", "text": "What is in the picture?"}, {"type": "image_url", "image_url": {"url": data}},
]}]  # fmt: skip
found = client.chat.completions.create(model="unilip", messages=messages, response_model=Answer, max_retries=0)
plain = openai.OpenAI(api_key="none", base_url=url).chat.completions.create(model="unilip", messages=messages)
print(json.dumps({
    "version": version("instructor"), "answer": plain.choices[0].message.content, "object": found.model_dump(),
}))  # fmt: skip
