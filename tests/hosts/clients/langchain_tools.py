"""LangChain: a chat model with tools bound, invoked, streamed, in a batch; the Responses API, which also draws."""

import base64
import json
import sys
from importlib.metadata import version
from pathlib import Path

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def weather(city: str) -> str:
    """Tell the weather of a city."""
    return "sunny"


url, path = sys.argv[1:]
model = ChatOpenAI(model="unilip", base_url=url, api_key="none")
data = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
message = HumanMessage([
    {"type": "text", "text": "What is in the picture?"}, {"type": "image_url", "image_url": {"url": data}},
])  # fmt: skip
bound = model.bind_tools([weather])
answer = bound.invoke([message])
assert answer.tool_calls == []
assert "".join(chunk.content for chunk in bound.stream([message])) == answer.content
assert [one.content for one in bound.batch([[message]] * 2)] == [answer.content] * 2
other = ChatOpenAI(model="unilip", base_url=url, api_key="none", use_responses_api=True)
said = other.bind_tools([weather]).invoke([message])
painter = other.bind_tools([{"type": "image_generation"}])
wish = HumanMessage("Draw a cat")
changed = painter.invoke([wish, painter.invoke([wish]), HumanMessage("make the background blue")])
assert [part["type"] for part in changed.content] == ["image_generation_call", "text"], changed.content
print(json.dumps({"version": version("langchain-openai"), "answer": answer.content, "responses": said.text}))
