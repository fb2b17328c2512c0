"""The Claude Agent SDK against ogx.py: as the README says, and in long sessions."""

import asyncio
import json
import re
import sys
from typing import Any

import claude_agent_sdk as agent_sdk
import pytest
from gateways import CLAUDE_BIN, MODEL, OFFLINE, ROOT, Gateway, png, written_config
from scripted_upstream import Json, Reply, parts, tool_results
from scripted_vendors import MistralReply, ids_and_calls, unlike_deepseek, unlike_mistral

pytestmark = pytest.mark.clients


class TestAgentSdk:
    def test_runs_as_the_readme_says(self, gateway, upstream):
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        (code,) = [block for block in re.findall(r"(?s)```python\n(.*?)```", readme)
                   if "claude_agent_sdk" in block]
        code = code.replace("http://localhost:8321", gateway.url)
        upstream.script = {"parse CSV": [Reply("import csv")]}
        done = gateway.run(sys.executable, "-c", code.replace("openai/gpt-5.4", MODEL))
        assert done.returncode == 0 and "import csv" in done.stdout, done.stderr

    def test_answers_a_query(self, gateway, upstream):
        upstream.script = {"Hello": [Reply("Good day.")]}
        result = last_message(gateway, "Hello")
        assert (result.result, result.is_error) == ("Good day.", False)
        assert upstream.requests[-1]["model"] == "scripted"

    def test_uses_a_tool(self, gateway, upstream):
        call = ("Bash", {"command": "echo from-the-agent"})
        upstream.script = {"Hello": [Reply(calls=[call]), Reply("I ran it.")]}
        assert last_message(gateway, "Hello", allowed_tools=["Bash"]).result == "I ran it."
        assert list(tool_results(upstream.requests[-1]).values()) == ["from-the-agent"]


def last_message(gateway: Gateway, prompt: str, **more: Any) -> Any:
    environment = {"ANTHROPIC_BASE_URL": gateway.url, "ANTHROPIC_AUTH_TOKEN": "any", **OFFLINE}
    options = agent_sdk.ClaudeAgentOptions(
        model=MODEL, env=environment, cwd=gateway.project, **more
    )

    async def messages() -> list[Any]:
        return [message async for message in agent_sdk.query(prompt=prompt, options=options)]

    return asyncio.run(asyncio.wait_for(messages(), 90))[-1]


class TestTwentyTurns:
    """One Claude Code process, four prompts, twenty answers with tools, thinking and images."""

    @pytest.fixture(params=["openai", "mistral", "deepseek"])
    def provider(self, request) -> str:
        return str(request.param)

    @pytest.fixture
    def configuration(self, provider, upstream, tmp_path) -> list[str]:
        upstream.strict = provider != "deepseek"  # which has a check of its own
        upstream.demand = {"openai": upstream.demand, "mistral": unlike_mistral,
                           "deepseek": unlike_deepseek}[provider]
        return [written_config(tmp_path, provider, upstream)]

    def test_nothing_is_lost_and_nothing_refused_twice(self, gateway, upstream, provider):
        image, page = gateway.project / "red.png", gateway.project / "page.py"
        image.write_bytes(png(4, 4, b"\xff\x00\x00"))
        speak = MistralReply if provider == "mistral" else Reply

        def echo(word: str) -> tuple[str, Json]:
            return "Bash", {"command": f"echo {word}", "description": "say it"}

        def round_of(n: int, look: list[tuple[str, Json]]) -> list[Reply]:
            thought = f"Thought {n} <b>of it</b>.\n"
            return [
                speak(f"Begin {n}.", reasoning=thought, calls=[echo(f"{n}a"), echo(f"{n}b")]),
                speak(reasoning=thought, calls=look), speak(f"Then {n}.", calls=[echo(f"{n}c")]),
                speak(calls=[("Bash", {"command": f"echo {n}d >&2; exit 3"})]),
                speak(f"Round {n} is over.", reasoning=thought),
            ]

        edit = {"file_path": str(page), "old_string": "é", "new_string": "\U0001f600"}
        looks = [[("Write", {"file_path": str(page), "content": "print('é')\n"})],
                 [("Read", {"file_path": str(image)}), echo("beside")], [("Edit", edit)],
                 [("Read", {"file_path": str(image)})]]
        upstream.script = {f"Go {n}": round_of(n, look) for n, look in enumerate(looks)}
        prompts = [f"Go {n}, please." for n in range(4)]
        messages = session(gateway, f"{provider}/scripted", prompts)
        results = [one.result for one in messages if isinstance(one, agent_sdk.ResultMessage)]
        assert results == [f"Round {n} is over." for n in range(4)]
        blocks = [block for one in messages if isinstance(one, agent_sdk.AssistantMessage)
                  for block in one.content]
        thoughts = [b.thinking for b in blocks if isinstance(b, agent_sdk.ThinkingBlock)]
        assert thoughts == [f"Thought {n // 3} <b>of it</b>.\n" for n in range(12)]
        assert page.read_text(encoding="utf-8") == "print('\U0001f600')\n"
        refused = len(upstream.requests) - 20
        assert refused == {"openai": 0, "mistral": 1, "deepseek": 1}[provider]
        last = json.dumps(upstream.requests[-1], ensure_ascii=False)
        told = [f"{n}{word}" for n in range(4) for word in "abcd"]
        for words in (*told, *prompts, *(f"Begin {n}." for n in range(4)), "beside"):
            assert words in last, words
        calls, _ = ids_and_calls(upstream.requests[-1])
        assert len(calls) == len(set(calls)) == 21
        pictures = parts(upstream.requests[-1], "image_url")
        assert len(pictures) == (0 if provider == "deepseek" else 2)
        assert last.count("image/png") == 2, "what can't be shown is told"
        if provider == "deepseek":
            echoed = [turn["reasoning_content"] for turn in upstream.requests[-1]["messages"]
                      if turn["role"] == "assistant"]
            assert [text for text in echoed if text.strip()] == thoughts[:11]


def session(gateway: Gateway, model: str, prompts: list[str]) -> list[Any]:
    """All messages of one Claude Code process that is given the prompts one after the other."""
    environment = {"ANTHROPIC_BASE_URL": gateway.url, "ANTHROPIC_AUTH_TOKEN": "any", **OFFLINE}
    options = agent_sdk.ClaudeAgentOptions(
        model=model, env=environment, cwd=gateway.project, cli_path=CLAUDE_BIN / "claude",
        permission_mode="acceptEdits", allowed_tools=["Bash"],
    )

    async def messages() -> list[Any]:
        told: list[Any] = []
        async with agent_sdk.ClaudeSDKClient(options) as client:
            for prompt in prompts:
                await client.query(prompt)
                told += [message async for message in client.receive_response()]
        return told

    return asyncio.run(asyncio.wait_for(messages(), 90))
