"""Real clients of OpenAI's API against the server with the embedded model, each in an environment of its own."""

from pathlib import Path

import pytest

from conftest import PICTURE, install, install_node, run

pytestmark = pytest.mark.hosts
HERE = Path(__file__).parent / "clients"
CLIENTS = {
    "openai 2": ("openai_sdk.py", ("openai>=2,<3",)),
    "openai 3": ("openai_sdk.py", ()),  # the one of the tests' environment
    "LiteLLM": ("litellm_sdk.py", ("litellm",)),
    "LangChain, tools bound": ("langchain_tools.py", ("langchain-openai",)),
    "instructor, JSON mode": ("instructor_json.py", ("instructor",)),
    "OpenAI Agents SDK": ("agents_sdk.py", ("openai-agents",)),
    "openai-node": ("openai_node.mjs", ("openai",)),
    "AI SDK": ("ai_sdk.mjs", ("ai", "@ai-sdk/openai")),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_client(name, server, place):
    script, packages = CLIENTS[name]
    folder = place / name.replace(" ", "-").replace(",", "")
    if script.endswith(".mjs"):
        program = install_node(folder, packages)
        (folder / script).write_bytes((HERE / script).read_bytes())  # modules are looked up from where a script lies
        found = run([program, folder / script, f"{server}/v1", PICTURE], name, folder)
    else:
        found = run([install(folder, packages), HERE / script, f"{server}/v1", PICTURE], name, folder)
    assert found["version"] and "panda" in str(found["answer"])
