"""OpenAI's Agents SDK with its default, the Responses API: a tool at hand, a picture, a stream; draws and changes."""

import asyncio
import base64
import json
import sys
from importlib.metadata import version
from pathlib import Path

from agents import Agent, ImageGenerationTool, Runner, function_tool, set_default_openai_client, set_tracing_disabled
from openai import AsyncOpenAI


@function_tool
def weather(city: str) -> str:
    """Tell the weather of a city."""
    return "sunny"


async def main() -> None:
    url, path = sys.argv[1:]
    set_default_openai_client(AsyncOpenAI(api_key="none", base_url=url))
    set_tracing_disabled(True)
    data = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
    agent = Agent(name="eyes", instructions="Be brief.", model="unilip", tools=[weather])
    content = [{"type": "input_text", "text": "What is in the picture?"}, {"type": "input_image", "image_url": data}]
    message = [{"role": "user", "content": content}]
    whole = await Runner.run(agent, message)
    streamed = Runner.run_streamed(agent, message)
    async for _ in streamed.stream_events():
        pass
    assert streamed.final_output == whole.final_output
    painter = Agent(name="hand", model="unilip", tools=[ImageGenerationTool({"type": "image_generation"})])
    drawn = await Runner.run(painter, "Draw a cat", max_turns=1)
    wish = [*drawn.to_input_list(), {"role": "user", "content": "make the background blue"}]
    changed = await Runner.run(painter, wish, max_turns=1)
    assert [one.raw_item.type for one in changed.new_items] == ["image_generation_call", "message"]
    print(json.dumps({"version": version("openai-agents"), "answer": whole.final_output}))


asyncio.run(main())
