"""The real clients against ogx.py: Claude Code, the anthropic, openai and Claude Agent SDKs.

    make test-clients       installs them (.ci/clients-install) and runs this file and its sisters

Each test has its own scripted upstream, which is as strict as OpenAI, and its own gateway before it
(gateways.py, conftest.py).
"""

import asyncio
import base64
import importlib.util
import json
import os
import re
import shlex
import socketserver
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import anthropic
import claude_agent_sdk as agent_sdk
import openai
import pydantic
import pytest
import scripted_bedrock
import scripted_responses
import signatures
from gateways import (
    CLAUDE_BIN,
    MODEL,
    OFFLINE,
    OGX,
    PYTHON,
    ROOT,
    Gateway,
    started,
    written_config,
)
from scripted_responses import PLAIN, REASONS, Response, ResponsesUpstream
from scripted_upstream import (
    KEY,
    Json,
    Reply,
    check,
    parts,
    text_of,
    tool_results,
)

sys.path.insert(0, str(ROOT))
import test_ogx as spec  # noqa: E402

pytestmark = pytest.mark.clients


def ids_and_calls(body: Json) -> tuple[list[str], list[Json]]:
    turns = [m for m in body["messages"] if m.get("tool_calls")]
    return [call["id"] for turn in turns for call in turn["tool_calls"]], turns


# What a provider refuses that OpenAI takes, in its own words ("" for a request that is right).
DEMANDS = {
    "mistral": lambda body: next((
        f"Tool call id was {one} but must be a-z, A-Z, 0-9, with a length of 9."
        for one in ids_and_calls(body)[0] if not re.fullmatch("[a-zA-Z0-9]{9}", one)), ""),
    "deepseek": lambda body: next((
        "The `reasoning_content` in the thinking mode must be passed back to the API."
        for turn in ids_and_calls(body)[1] if not turn.get("reasoning_content")), ""),
    "groq": lambda body: "property 'prompt_cache_key' is unsupported"
        if "prompt_cache_key" in body else "",
    "old": lambda body: "Unsupported parameter: 'max_completion_tokens' is not supported with this "
        "model. Use 'max_tokens' instead." if "max_completion_tokens" in body else "",
    "qwen": lambda body: "System message must be at the beginning."
        if any(m["role"] == "system" for m in body["messages"][1:]) else "",
    "template": lambda body: "After the optional system message, conversation roles must alternate"
        if any(a["role"] == "tool" and b["role"] == "user"
               for a, b in zip(body["messages"], body["messages"][1:])) else "",
    "schema": lambda body: "Invalid schema for function 'X': 'propertyNames' is not permitted."
        if "propertyNames" in json.dumps(body["tools"]) else "",
}


# ======== Claude Code =========================================================================


class TestClaudeCode:
    def test_answers_a_question(self, gateway, upstream):
        upstream.script = {"What is 2+2?": [Reply("It is **4**.")]}
        result = gateway.ask("What is 2+2?")
        assert result["result"] == "It is **4**."
        usage = result["usage"]
        assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (234, 1000)
        assert usage["output_tokens"] == 56
        (body,) = upstream.requests
        assert body["model"] == "scripted" and body["stream"] is True
        assert body["messages"][0]["role"] in ("system", "developer")
        tools = {one["function"]["name"] for one in body["tools"]}
        assert {"Bash", "Edit", "Read", "Write"} <= tools
        assert "x-anthropic-billing-header" not in json.dumps(body)

    def test_takes_the_first_language_model_when_none_is_named(self, gateway, upstream):
        upstream.script = {"Anyone there?": [Reply("Yes, here.")]}
        done = gateway.connect("--", "-p", "Anyone there?")
        assert (done.returncode, done.stdout) == (0, "Yes, here.\n"), done.stderr
        assert upstream.requests[-1]["model"] == "scripted"

    @pytest.mark.parametrize(("name", "expected"), [
        ("haiku", "scripted-mini"), ("opus", "scripted"), (MODEL + "-mini", "scripted-mini"),
        ("claude-haiku-4-5-20251001", "scripted"), ("claude-sonnet-4-5", "scripted"),
    ])
    def test_finds_a_model_under_any_name(self, gateway, upstream, name, expected):
        upstream.script = {"Hello": [Reply("Good day.")]}
        tiers = ["--model", MODEL, "--haiku-model", MODEL + "-mini"]
        done = gateway.connect(*tiers, "--", "--model", name, "-p", "Hello")
        assert (done.returncode, done.stdout) == (0, "Good day.\n"), done.stderr
        assert upstream.requests[-1]["model"] == expected

    def test_works_in_a_shell_that_took_over_the_environment(self, gateway, upstream):
        upstream.script = {"Hello": [Reply("Good day.")]}
        port = gateway.url.rsplit(":", 1)[1]
        words = [PYTHON, OGX, "connect", "claude", "--print-env", "--port", port, "--model", MODEL]
        done = gateway.run("bash", "-c", f'eval "$({shlex.join(words)})" && claude -p Hello')
        assert (done.returncode, done.stdout) == (0, "Good day.\n"), done.stderr

    def test_runs_a_shell_command_and_shows_the_model_its_output(self, gateway, upstream):
        call = ("Bash", {"command": "echo $((6*7))-from-the-shell", "description": "Compute"})
        upstream.script = {"Run it": [Reply("On it.", calls=[call]), Reply("The shell says 42.")]}
        assert gateway.ask("Run it", "--allowedTools", "Bash")["result"] == "The shell says 42."
        *_, assistant, result = upstream.requests[-1]["messages"]
        assert assistant["content"] == "On it." and text_of(result) == "42-from-the-shell"
        assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == call[1]

    def test_writes_a_file_and_edits_it(self, gateway, upstream):
        path = gateway.project / "hello.py"
        first, final = 'print("héllo")\n', 'print("wörld \\"2\\" \U0001f600")\n'
        edit = {"file_path": str(path), "old_string": first, "new_string": final}
        upstream.script = {"Make it": [
            Reply(calls=[("Write", {"file_path": str(path), "content": first})]),
            Reply(calls=[("Edit", edit)]),
            Reply("Done."),
        ]}
        assert gateway.ask("Make it", "--permission-mode", "acceptEdits")["result"] == "Done."
        assert path.read_text(encoding="utf-8") == final
        assert len(tool_results(upstream.requests[-1])) == 2

    def test_runs_parallel_tool_calls(self, gateway, upstream):
        calls = [("Bash", {"command": f"echo {word}"}) for word in ("first", "second")]
        upstream.script = {"Both": [Reply(calls=calls), Reply("Two results.")]}
        assert gateway.ask("Both", "--allowedTools", "Bash")["result"] == "Two results."
        results = {json.loads(asked)["command"]: said
                   for asked, said in tool_results(upstream.requests[-1]).items()}
        assert results == {"echo first": "first", "echo second": "second"}
        assert len(upstream.requests[-1]["messages"][-3]["tool_calls"]) == 2

    def test_continues_the_last_conversation(self, gateway, upstream):
        upstream.script = {"I have a dog": [Reply("Nice.")], "Its name?": [Reply("No idea.")]}
        gateway.ask("I have a dog")
        assert gateway.ask("Its name?", "--continue")["result"] == "No idea."
        told = [(one["role"], text_of(one)) for one in upstream.requests[-1]["messages"]]
        spoken = [role for role, text in told if re.search("I have a dog|^Nice.$|Its name", text)]
        assert spoken == ["user", "assistant", "user"]

    def test_shows_the_model_an_image(self, gateway, upstream):
        image = gateway.project / "red.png"
        image.write_bytes(png(4, 4, b"\xff\x00\x00"))
        read = Reply(calls=[("Read", {"file_path": str(image)})])
        upstream.script = {"Look": [read, Reply("It is red.")]}
        assert gateway.ask("Look")["result"] == "It is red."
        (part,) = parts(upstream.requests[-1], "image_url")
        head, data = part["url"].split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == image.read_bytes()

    def test_shows_the_model_a_pdf(self, gateway, upstream):
        document = gateway.project / "page.pdf"
        document.write_bytes(pdf("Hello from a page"))
        read = Reply(calls=[("Read", {"file_path": str(document)})])
        upstream.script = {"Read it": [read, Reply("It greets.")]}
        assert gateway.ask("Read it")["result"] == "It greets."
        (part,) = parts(upstream.requests[-1], "file")
        head, data = part["file_data"].split(",", 1)
        assert head == "data:application/pdf;base64" and part["filename"].endswith(".pdf")
        assert base64.b64decode(data) == document.read_bytes()

    def test_sends_a_subagent(self, gateway, upstream):
        errand = {"description": "Find out", "prompt": "SUBTASK: say hi", "model": "haiku",
                  "subagent_type": "general-purpose", "run_in_background": False}
        upstream.script = {
            "Delegate": [Reply(calls=[("Agent", errand)]), Reply("My agent said hi.")],
            "SUBTASK": [Reply("Hi from the agent.")],
        }
        assert gateway.ask("Delegate", "--allowedTools", "Agent")["result"] == "My agent said hi."
        assert len(upstream.seen("SUBTASK")) == 1
        (result,) = tool_results(upstream.seen("Delegate")[-1]).values()
        assert "Hi from the agent." in result

    def test_shows_the_thinking(self, gateway, upstream):
        look = [("Bash", {"command": "echo seen"})]
        upstream.script = {"Think": [
            Reply("So I look.", reasoning="Let me ponder this.", calls=look),
            Reply("Thought through."),
        ]}
        shown = ["--output-format", "stream-json", "--verbose", "--allowedTools", "Bash"]
        done = gateway.claude("Think", *shown)
        assert done.returncode == 0, done.stdout + done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        messages = [event["message"] for event in events if event["type"] == "assistant"]
        blocks = [block for message in messages for block in message["content"]]
        assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "text"]
        assert blocks[0]["thinking"] == "Let me ponder this."
        assert events[-1]["result"] == "Thought through."

    @pytest.mark.parametrize("reasoning", ["", "Let me ponder this."])
    def test_brings_back_what_the_provider_needs_of_its_reasoning(
        self, gateway, upstream, reasoning
    ):
        """Signatures and details travel in thinking blocks, or in redacted ones."""
        details = [{"type": "reasoning.encrypted", "data": "sealed", "index": 0}]
        signature = {"google": {"thought_signature": "signed"}}
        look = [("Bash", {"command": "echo seen"}), ("Bash", {"command": "echo twice"})]
        upstream.script = {"Think": [
            Reply("So I look.", reasoning=reasoning, details=details, calls=look,
                  signature=signature),
            Reply(calls=look[:1], signature=signature), Reply("Thought through."),
        ]}
        assert gateway.ask("Think", "--allowedTools", "Bash")["result"] == "Thought through."
        first, second = ids_and_calls(upstream.requests[-1])[1]
        assert first["reasoning_details"] == details and "reasoning_details" not in second
        signed = [call.get("extra_content") for turn in (first, second)
                  for call in turn["tool_calls"]]
        assert signed == [signature, None, signature]

    def test_gives_a_structured_answer(self, gateway, upstream):
        schema = {"type": "object", "properties": {"answer": {"type": "integer"}}}
        given = Reply(calls=[("StructuredOutput", {"answer": 4})])
        upstream.script = {"Count": [given, Reply("Given.")]}
        result = gateway.ask("Count", "--json-schema", json.dumps(schema))
        assert result["structured_output"] == {"answer": 4}
        tools = [one["function"] for one in upstream.requests[0]["tools"]]
        (tool,) = [one for one in tools if one["name"] == "StructuredOutput"]
        assert tool["parameters"]["properties"] == schema["properties"]

    def test_passes_the_exit_code_on(self, gateway):
        version = gateway.connect("--model", MODEL, "--", "--version")
        assert version.returncode == 0 and "Claude Code" in version.stdout
        assert gateway.connect("--model", MODEL, "--", "--no-such-flag").returncode == 1

    def test_reports_a_refused_key_at_once(self, gateway, upstream):
        upstream.script = {"Hello": [Reply("Your key was revoked on Tuesday.", status=401)]}
        began, done = time.monotonic(), gateway.claude("Hello")
        assert done.returncode == 1
        assert "Your key was revoked on Tuesday." in done.stdout + done.stderr
        assert len(upstream.requests) <= 2 and time.monotonic() - began < 20

    def test_waits_for_a_slow_model(self, gateway, upstream):
        upstream.script = {"Hello": [Reply("At last.", silence=12)]}
        assert gateway.ask("Hello")["result"] == "At last."
        assert len(upstream.requests) == 1

    def test_asks_a_small_model_for_less(self, gateway, upstream):
        upstream.most_tokens = 16_384
        upstream.script = {"Hello": [Reply("Good day.")]}
        assert gateway.ask("Hello")["result"] == "Good day."
        limits = [body["max_completion_tokens"] for body in upstream.requests]
        assert limits[0] > limits[1] == 16_384 and len(limits) == 2

    @pytest.mark.parametrize("words", [
        "This model's maximum context length is 4097 tokens. However, your messages resulted in "
        "4294 tokens. Please reduce the length of the messages.",  # OpenAI
        "request (20020 tokens) exceeds the available context size (16384 tokens), try increasing "
        "it",  # llama.cpp
        "The input token count (2845475) exceeds the maximum number of tokens allowed (1048576).",
        "Input is too long for requested model.",  # Bedrock
        "Input length (5000) exceeds model's maximum context length (4096).",  # vLLM
    ])
    def test_compacts_and_goes_on_when_the_prompt_got_too_long(self, gateway, upstream, words):
        upstream.too_long = words
        count = [Reply(calls=[("Bash", {"command": f"echo {n}", "description": "count"})])
                 for n in range(3)]
        upstream.script = {"TEXT ONLY": [Reply("We were counting to three.")],
                           "Count": [*count, Reply("Done.")]}
        gateway.ask("Count to three", "--allowedTools", "Bash")
        assert upstream.too_long == "" and upstream.seen("TEXT ONLY")
        assert "We were counting to three." in json.dumps(upstream.requests[-1])

    def test_costs_few_requests_when_the_upstream_refuses_for_a_reason_of_its_own(
        self, gateway, upstream
    ):
        upstream.script = {"Hello": [Reply("The moon is not full.", status=400)]}
        done = gateway.claude("Hello")
        assert done.returncode == 1 and "The moon is not full." in done.stdout + done.stderr
        # The client asks six times: as it is, without two betas, and the same without ToolSearch.
        assert len(upstream.requests) <= 6

    @pytest.mark.parametrize("provider", DEMANDS)
    def test_works_with_a_provider_that_refuses_until_the_request_is_right(
        self, gateway, upstream, provider
    ):
        upstream.strict, upstream.demand = False, DEMANDS[provider]
        calls = [("Bash", {"command": f"echo {n}", "description": "count"}) for n in range(2)]
        upstream.script = {"Count": [Reply(calls=calls), Reply(calls=calls[:1]), Reply("Done.")]}
        assert gateway.ask("Count", "--allowedTools", "Bash")["result"] == "Done."
        asked = len(upstream.requests)
        assert asked <= 3 + 2, "each habit is learned once"
        upstream.script = {"Again": [Reply(calls=calls), Reply("Done.")]}
        gateway.ask("Again", "--allowedTools", "Bash")
        assert len(upstream.requests) == asked + 2, "and known from then on"

    @pytest.mark.parametrize("users", [
        {"env": {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}},
        {"env": {"CLAUDE_CODE_USE_BEDROCK": "1"}},
        {"env": {"CLAUDE_CODE_USE_VERTEX": "1", "ANTHROPIC_API_KEY": "sk-of-the-user"}},
        {"apiKeyHelper": "echo key-of-the-helper"},
        {"model": "claude-opus-4-5"},
    ])
    def test_reaches_the_gateway_whatever_the_users_settings_say(self, gateway, upstream, users):
        folder = Path(gateway.environment["HOME"], ".claude")
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps(users))
        upstream.script = {"Hello": [Reply("Here I am.")]}
        assert gateway.ask("Hello")["result"] == "Here I am."

    @pytest.fixture
    def foreign_proxy(self):
        """(URL of a server that is not ours, and what it was sent)."""
        sent = []

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                sent.append(self.rfile.readline())
                self.wfile.write(b"HTTP/1.1 403 no\r\ncontent-length: 0\r\n\r\n")

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}", sent
            server.shutdown()

    @pytest.mark.parametrize("name", [
        "project/.claude/settings.json", "project/.claude/settings.local.json",
        "home/.claude/settings.json", "home/.claude.json",
        "settings.local.json of the repository", "in UTF-16", "padded", "nested deeply",
    ])
    @pytest.mark.parametrize("kind", ["proxy", "url", "proxy in both spellings"])
    def test_no_settings_file_leads_the_conversation_elsewhere(
        self, gateway, upstream, foreign_proxy, name, kind
    ):
        url, sent = foreign_proxy
        proxies = dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"], url)
        small = dict.fromkeys(map(str.lower, proxies), url)
        tree = {"env": {
            "proxy": {"HTTP_PROXY": url, "no_proxy": "x"},
            "proxy in both spellings": {**proxies, **small, "NO_PROXY": "x", "no_proxy": "x"},
            "url": {"ANTHROPIC_BASE_URL": url},
        }[kind]}
        path, data = gateway.project.parent / name, json.dumps(tree).encode()
        if "/" not in name:
            path = gateway.project / ".claude" / "settings.local.json"
        if "repository" in name:
            subprocess.run(["git", "init", "-q", str(gateway.project)], check=True)
            (gateway.project / "below").mkdir()
            gateway.project /= "below"
        elif "UTF-16" in name:
            data = json.dumps(tree).encode("utf-16")
        elif "padded" in name:
            data = b" " * 1_500_000 + data
        elif "nested" in name:
            data = data[:-1] + b', "x": %s}' % (b"[" * 5000 + b"]" * 5000)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        upstream.script = {"Hello": [Reply("Here I am.")]}
        assert gateway.ask("Hello")["result"] == "Here I am."
        assert sent == []

    @pytest.mark.parametrize("variable", [
        "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY",
        "CLAUDE_CODE_USE_MANTLE", "CLAUDE_CODE_USE_ANTHROPIC_AWS", "CLAUDE_CODE_USE_GATEWAY",
        "CLAUDE_CODE_USE_ANTHROPIC_GOOGLE_CLOUD", "ANTHROPIC_UNIX_SOCKET", "ANTHROPIC_API_KEY",
        "ANTHROPIC_MODEL", "ANTHROPIC_CUSTOM_HEADERS", "CLAUDE_CODE_OAUTH_TOKEN",
        "CLAUDE_CODE_SUBAGENT_MODEL", "ANTHROPIC_VERTEX_PROJECT_ID", "HTTP_PROXY",
        "ANTHROPIC_BEDROCK_SESSION_TOKEN", "ANTHROPIC_SMALL_FAST_MODEL", "CLAUDECODE",
        "CLAUDE_CODE_PROVIDER_MANAGED_BY_HOST", "CLAUDE_CODE_HOST_AUTH_ENV_VAR",
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS", "CLAUDE_CODE_MAX_OUTPUT_TOKENS",
        "ANTHROPIC_DEFAULT_MODEL",
    ])
    def test_reaches_the_gateway_whatever_is_exported(self, gateway, upstream, variable):
        values = {"ANTHROPIC_UNIX_SOCKET": "/nowhere", "HTTP_PROXY": "http://127.0.0.1:9",
                  "ANTHROPIC_CUSTOM_HEADERS": "Host: evil.test"}
        gateway.environment[variable] = values.get(variable, "1")
        upstream.script = {"Hello": [Reply("Here I am.")]}
        assert gateway.ask("Hello")["result"] == "Here I am."

    @pytest.fixture
    def window(self, request, upstream):
        """The context that the upstream lists, set before the gateway reads the list."""
        upstream.context = request.param
        return request.param

    @pytest.mark.parametrize("window", [32_768, 131_072, 1_048_576], indirect=True)
    def test_knows_the_true_window(self, window, gateway, upstream):
        upstream.script = {"Hello": [Reply("Hello.")]}
        usage = gateway.ask("Hello")["modelUsage"]
        assert [one["contextWindow"] for one in usage.values()] == [window]

    @pytest.mark.parametrize(("window", "tokens", "compacts"), [
        (32_768, 14_000, False), (32_768, 17_000, True),
        (131_072, 90_000, False), (131_072, 100_000, True),
        (1_048_576, 900_000, False), (1_048_576, 1_020_000, True),
    ], indirect=["window"])
    def test_compacts_at_the_right_size(self, window, gateway, upstream, tokens, compacts):
        upstream.usage = {"prompt_tokens": tokens}
        count = [Reply(calls=[("Bash", {"command": f"echo {n}", "description": "count"})])
                 for n in range(3)]
        upstream.script = {"TEXT ONLY": [Reply("We were counting to three.")],
                           "Count": [*count, Reply("Done.")]}
        gateway.ask("Count to three", "--allowedTools", "Bash", "--max-turns", "8")
        assert bool(upstream.seen("TEXT ONLY")) is compacts

    def test_does_not_take_a_broken_answer_for_a_whole_one(self, gateway, upstream):
        gateway.environment["CLAUDE_CODE_MAX_RETRIES"] = "2"  # instead of 10, which take minutes
        upstream.script = {"Tell me": [Reply("This breaks off in the middle of it.", dies=99)]}
        done = gateway.claude("Tell me", "--output-format", "json")
        assert done.returncode == 1, done.stdout
        assert json.loads(done.stdout)["is_error"] is True

    def test_goes_on_after_an_answer_that_broke_off_once(self, gateway, upstream):
        # The client either asks for the rest of what it has or asks the whole again.
        broken = Reply("This breaks off in the middle of it, but ends well.", dies=1)
        upstream.script = {"Tell me": [broken, Reply("but ends well.")]}
        assert gateway.ask("Tell me")["result"].endswith("but ends well.")


def png(width: int, height: int, pixel: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return len(data).to_bytes(4, "big") + kind + data + checksum.to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    rows = zlib.compress((b"\x00" + pixel * width) * height)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def pdf(text: str) -> bytes:
    drawing = f"BT /F1 24 Tf 72 700 Td ({text}) Tj ET"
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        f"/Resources << /Font << /F1 {font} >> >> >>",
        f"<< /Length {len(drawing)} >>\nstream\n{drawing}\nendstream",
    ]
    out, table = "%PDF-1.4\n", "0000000000 65535 f \n"
    for number, content in enumerate(objects, 1):
        table += f"{len(out):010} 00000 n \n"
        out += f"{number} 0 obj\n{content}\nendobj\n"
    trailer = f"trailer\n<< /Size 5 /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    return f"{out}xref\n0 5\n{table}{trailer}".encode()


# ======== The anthropic SDK ===================================================================

WEATHER: Json = {
    "name": "weather", "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
USER = {"role": "user", "content": "Hello there"}
ASK: Json = {"model": MODEL, "max_tokens": 100, "messages": [USER]}


class City(pydantic.BaseModel):
    name: str
    people: int


@pytest.fixture
def sdk(gateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key="any", max_retries=0) as client:
        yield client


def valid(answer: Any) -> Any:
    """The answer, once its own model has found it complete and has nothing to warn about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        type(answer).model_validate(answer.model_dump(mode="json"))
    return answer


def counts(usage: Any) -> tuple[int, int, int]:
    return usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens


class TestAnthropicSdk:
    def test_creates_a_message(self, sdk, upstream):
        upstream.script = {"Hello": [Reply("Good day.")]}
        message = valid(sdk.messages.create(**ASK, system="Be kind.", stop_sequences=["END"]))
        assert [block.text for block in message.content] == ["Good day."]
        assert (message.stop_reason, message.model) == ("end_turn", MODEL)
        assert counts(message.usage) == (234, 1000, 56)
        (body,) = upstream.requests
        assert [text_of(one) for one in body["messages"]] == ["Be kind.", "Hello there"]
        assert body["stop"] == ["END"]
        assert 100 in (body.get("max_tokens"), body.get("max_completion_tokens"))

    def test_streams_a_message_piece_by_piece(self, sdk, upstream):
        arrived = threading.Event()
        upstream.script = {"Hello": [Reply("Good day to you all.", waits_for=arrived)]}
        with sdk.messages.stream(**ASK) as stream:
            texts = iter(stream.text_stream)
            began, first = time.monotonic(), next(texts)
            assert first == "Good da" and time.monotonic() - began < 5, "it was held back"
            arrived.set()
            assert first + "".join(texts) == "Good day to you all."
            message = valid(stream.get_final_message())
        assert counts(message.usage) == (234, 1000, 56) and message.stop_reason == "end_turn"

    def test_streams_thinking_and_parallel_tool_calls(self, sdk, upstream):
        calls = [("weather", {"city": "Oslo"}), ("weather", {"city": 'Bergen "west"'})]
        upstream.script = {"Hello": [Reply("I look.", reasoning="Two cities.", calls=calls)]}
        with sdk.messages.stream(**ASK, tools=[WEATHER]) as stream:
            message = valid(stream.get_final_message())
        thinking, text, *uses = message.content
        assert (thinking.thinking, text.text) == ("Two cities.", "I look.")
        assert [(use.name, use.input) for use in uses] == calls
        assert message.stop_reason == "tool_use"

    def test_loops_over_a_tool_by_hand(self, sdk, upstream):
        script = [Reply(calls=[("weather", {"city": "Oslo"})]), Reply("Rain in Oslo.")]
        upstream.script = {"Hello": script}
        first = sdk.messages.create(**ASK, tools=[WEATHER], tool_choice={"type": "any"})
        (use,) = valid(first).content
        assert (first.stop_reason, use.name) == ("tool_use", "weather")
        assert use.input == {"city": "Oslo"}
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}
        turns = [{"role": "assistant", "content": first.content},
                 {"role": "user", "content": [result]}]
        one_by_one = {"type": "auto", "disable_parallel_tool_use": True}
        last = sdk.messages.create(
            **{**ASK, "messages": [USER, *turns]}, tools=[WEATHER], tool_choice=one_by_one
        )
        assert last.content[0].text == "Rain in Oslo."
        assert upstream.requests[0]["tool_choice"] == "required"
        assert upstream.requests[1]["parallel_tool_calls"] is False
        assert list(tool_results(upstream.requests[1]).values()) == ["rain"]

    @pytest.mark.parametrize("streams", [False, True])
    def test_runs_tools_by_itself(self, sdk, upstream, streams):
        @anthropic.beta_tool
        def weather(city: str) -> str:
            """The weather in a city."""
            return f"snow in {city}"

        upstream.script = {"Hello": [Reply(calls=[("weather", {"city": "Oslo"})]), Reply("Snow.")]}
        runner = sdk.beta.messages.tool_runner(**ASK, tools=[weather], stream=streams)
        assert [block.text for block in runner.until_done().content] == ["Snow."]
        last = upstream.requests[-1]
        assert [one["role"] for one in last["messages"]] == ["user", "assistant", "tool"]
        assert list(tool_results(last).values()) == ["snow in Oslo"]

    def test_counts_tokens_without_asking_the_model(self, sdk, upstream):
        few = valid(sdk.messages.count_tokens(model=MODEL, messages=[USER])).input_tokens
        long = [{"role": "user", "content": "Hello there, how are you? " * 200}]
        many = sdk.messages.count_tokens(model=MODEL, messages=long, tools=[WEATHER]).input_tokens
        assert 1 <= few <= 50 and 600 <= many <= 4000
        assert upstream.requests == []

    def test_lists_models_whole_and_in_pages(self, sdk):
        whole = [valid(model).id for model in sdk.models.list()]
        assert [model.id for model in sdk.models.list(limit=1)] == whole
        assert {MODEL, MODEL + "-mini"} <= set(whole) and len(set(whole)) == len(whole)
        page = sdk.models.list(limit=1)
        assert page.has_more and page.first_id == page.last_id == whole[0]
        assert sdk.models.list(after_id=whole[0], limit=1).data[0].id == whole[1]
        assert sdk.models.list(before_id=whole[1], limit=1).data[0].id == whole[0]

    def test_retrieves_a_model_whose_id_holds_a_slash(self, sdk):
        model = valid(sdk.models.retrieve(MODEL))
        assert (model.id, model.type) == (MODEL, "model") and model.display_name
        with pytest.raises(anthropic.NotFoundError, match="openai/nope"):
            sdk.models.retrieve("openai/nope")

    def test_parses_structured_output(self, sdk, upstream):
        upstream.script = {"Hello": [Reply('{"name": "Oslo", "people": 700000}')]}
        message = sdk.messages.parse(**ASK, output_format=City)
        assert message.parsed_output == City(name="Oslo", people=700000)
        schema = upstream.requests[0]["response_format"]["json_schema"]["schema"]
        assert set(schema["properties"]) == {"name", "people"}

    @pytest.mark.parametrize("streams", [False, True])
    @pytest.mark.parametrize(("refused", "reply"), [
        (["response_format"],
         Reply("Let me see.", calls=[("give_answer", {"name": "Oslo", "people": 700000})])),
        (["response_format", "tool_choice"],
         Reply('Here it is:\n```json\n{"name": "Oslo", "people": 700000}\n```')),
    ])
    def test_parses_structured_output_in_every_way_it_is_asked_for(
        self, sdk, upstream, refused, reply, streams
    ):
        upstream.demand = lambda body: next(
            (f"Unsupported parameter: '{name}'" for name in refused if name in body), "")
        upstream.script = {"Hello": [reply]}
        if streams:
            with sdk.messages.stream(**ASK, output_format=City) as stream:
                message = stream.get_final_message()
        else:
            message = sdk.messages.parse(**ASK, output_format=City)
        assert message.parsed_output == City(name="Oslo", people=700000)
        assert valid(message).stop_reason == "end_turn"

    def test_is_told_when_an_answer_has_another_shape(self, sdk, upstream):
        upstream.demand = lambda body: next(
            (f"Unsupported parameter: '{name}'" for name in ("response_format", "tool_choice")
             if name in body), "")
        upstream.script = {"Hello": [Reply("Oslo, I think.")]}
        with pytest.raises(anthropic.InternalServerError, match="no JSON of the shape"):
            sdk.messages.parse(**ASK, output_format=City)

    @pytest.mark.parametrize("name", spec.TestGateway.GOLDEN)
    def test_reads_every_golden_stream(self, name):
        dialect, chunks = spec.TestGateway.GOLDEN[name]
        with spec.FakeUpstream(*[spec.sse(*chunks)] * 4) as fake, spec.serving(
            replace(spec.provider(url=fake.url), dialect=dialect)
        ) as client, anthropic.Anthropic(
            base_url=f"http://127.0.0.1:{client.port}", api_key="any", max_retries=0
        ) as sdk:
            for api in (sdk.messages, sdk.beta.messages):
                whole = valid(api.create(**ASK))
                with api.stream(**ASK) as stream:
                    streamed = valid(stream.get_final_message())
                kinds = [block.type for block in streamed.content]
                # A stream can't take back the beginning of a call that broke off; else it is told.
                kinds = ["text"] if name == "half a call" else kinds
                assert kinds == [block.type for block in whole.content]
                assert streamed.stop_reason == whole.stop_reason

    def test_tells_the_gateways_refusals_by_class(self, sdk, upstream):
        with pytest.raises(anthropic.NotFoundError, match="nope-9") as unknown:
            sdk.messages.create(**{**ASK, "model": "nope-9"})
        assert unknown.value.request_id
        assert unknown.value.body["error"]["type"] == "not_found_error"
        for messages in ([], [{"role": "robot", "content": "x"}],
                         [{"role": "user", "content": [{"type": "sound"}]}]):
            with pytest.raises(anthropic.BadRequestError, match="messages"):
                sdk.messages.create(**{**ASK, "messages": messages})
        with pytest.raises(anthropic.NotFoundError):
            sdk.messages.batches.list()
        assert upstream.requests == []

    @pytest.mark.parametrize(("status", "expected"), [
        (400, anthropic.BadRequestError), (401, anthropic.AuthenticationError),
        (403, anthropic.PermissionDeniedError), (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
    ])
    def test_tells_the_upstreams_refusals_in_its_words(self, sdk, upstream, status, expected):
        upstream.script = {"Hello": [Reply("No, said the upstream.", status=status)]}
        with pytest.raises(expected, match="No, said the upstream.") as refusal:
            sdk.messages.create(**ASK)
        assert refusal.value.status_code == status
        with pytest.raises(expected), sdk.messages.stream(**ASK) as stream:
            stream.get_final_message()

    def test_raises_when_the_upstream_dies_midway(self, sdk, upstream):
        upstream.script = {"Hello": [Reply("This breaks off in the middle.", dies=99)]}
        with pytest.raises(anthropic.APIError), sdk.messages.stream(**ASK) as stream:
            stream.get_final_message()
        with pytest.raises(anthropic.APIStatusError):
            sdk.messages.create(**ASK)

    def test_does_it_asynchronously(self, gateway, upstream):
        async def session() -> None:
            options: Json = {"base_url": gateway.url, "auth_token": "any", "max_retries": 0}
            async with anthropic.AsyncAnthropic(**options) as sdk:
                async with sdk.messages.stream(**ASK) as stream:
                    assert "".join([text async for text in stream.text_stream]) == "Good day."
                answers = await asyncio.gather(*(sdk.messages.create(**ASK) for _ in range(8)))
                assert {valid(answer).content[0].text for answer in answers} == {"Good day."}
                assert MODEL in [model.id async for model in sdk.models.list(limit=1)]
                assert (await sdk.models.retrieve(MODEL)).id == MODEL
                counted = await sdk.messages.count_tokens(model=MODEL, messages=[USER])
                assert counted.input_tokens > 0
                with pytest.raises(anthropic.NotFoundError):
                    await sdk.messages.create(**{**ASK, "model": "nope"})

        upstream.script = {"Hello": [Reply("Good day.")]}
        asyncio.run(session())
        assert len(upstream.requests) == 9


# ======== Tokens ==============================================================================


class O200k:
    """Counts requests as a server with OpenAI's o200k would: what a chat template shows of them,
    its tools as JSON, and four tokens around each message."""

    def __enter__(self) -> "O200k":
        modules = str(ROOT / ".clients/npm/node_modules")
        self._lock, pipe = threading.Lock(), subprocess.PIPE
        self._process = subprocess.Popen(
            ["node", str(ROOT / ".ci/o200k.cjs")], env={**os.environ, "NODE_PATH": modules},
            stdin=pipe, stdout=pipe, text=True, encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()

    def __call__(self, body: Json) -> int:
        texts = [json.dumps(tool, ensure_ascii=False) for tool in body.get("tools", ())]
        for message in body["messages"]:
            texts.append(text_of(message))
            texts += [json.dumps(call["function"]) for call in message.get("tool_calls") or ()]
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        with self._lock:
            stdin.write(json.dumps(texts) + "\n")
            stdin.flush()
            return int(stdout.readline()) + 4 * len(body["messages"]) + 3


@pytest.fixture
def o200k(upstream) -> Iterator[O200k]:
    with O200k() as counter:
        upstream.counter = counter
        yield counter


class TestEstimates:
    """A message starts with an estimate; after three requests it is within 5 % of the truth."""

    def test_of_claude_codes_requests(self, gateway, upstream, o200k):
        calls = [Reply(calls=[("Bash", {"command": command, "description": "Look"})])
                 for command in ("ls -la /usr/lib /usr/bin", f"cat -n {ROOT}/README.md",
                                 f"head -c 20000 {OGX}", f"cat {ROOT}/starter.json")]
        upstream.script = {"Look": [*calls, Reply("Done.")]}
        done = gateway.claude(
            "Look around", "--allowedTools", "Bash", "--output-format", "stream-json",
            "--verbose", "--include-partial-messages")
        assert done.returncode == 0, done.stdout + done.stderr
        events = [json.loads(line).get("event", {}) for line in done.stdout.splitlines()]
        starts = [event["message"]["usage"]["input_tokens"] for event in events
                  if event.get("type") == "message_start"]
        truths = [o200k(body) for body in upstream.seen("Look")]
        assert len(starts) == len(truths) == 5
        assert starts[3:] == [pytest.approx(truth, rel=0.05) for truth in truths[3:]]

    def test_of_prose_code_and_json(self, upstream, sdk, o200k):
        upstream.script = {"": [Reply("Thank you.")]}
        prose = [topics[name] for name in ("import", "naming", "debugger", "compound")]
        code = [Path(path).read_text() for path in (OGX, ROOT / "test_ogx.py", __file__)]
        schema = anthropic.types.Message.model_json_schema()
        values = [json.dumps(schema), json.dumps(schema, indent=2),
                  (ROOT / "starter.json").read_text()]
        asked = [[{"role": "user", "content": text}] for text in (*prose, *code, *values)]
        for messages in (asked[0], asked[4], asked[7]):
            sdk.messages.create(model=MODEL, max_tokens=9, messages=messages)
        for messages in asked:
            counted = sdk.messages.count_tokens(model=MODEL, messages=messages).input_tokens
            truth = o200k({"messages": messages})
            assert counted == pytest.approx(truth, rel=0.05), messages[0]["content"][:80]


# ======== The openai SDK ======================================================================


class TestOpenaiSdk:
    def test_reads_the_same_model_list(self, gateway, sdk):
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0)
        models = [valid(model) for model in client.models.list()]
        ids = {model.id for model in sdk.models.list(limit=1000)}
        assert {model.id for model in models} == ids
        assert all(model.object == "model" and model.owned_by for model in models)
        assert valid(client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("openai/nope")

    def test_finds_the_scripted_upstream_like_openai(self, upstream):
        client = openai.OpenAI(base_url=upstream.url, api_key=KEY, max_retries=0)
        ask: Json = {"model": "scripted", "messages": [USER]}
        upstream.script = {"Hello": [Reply("One.", reasoning="Hm.", calls=[("f", {"x": 1})])]}
        answer = client.chat.completions.create(**ask)
        assert answer.choices[0].message.tool_calls[0].function.arguments == '{"x": 1}'
        ask["stream_options"] = {"include_usage": True}
        with client.chat.completions.stream(**ask) as stream:
            streamed = stream.get_final_completion()
        assert streamed.choices[0].message.content == "One."
        assert streamed.choices[0].message.tool_calls[0].function.arguments == '{"x": 1}'
        assert streamed.choices[0].finish_reason == "tool_calls"
        assert streamed.usage.prompt_tokens == 1234

    def test_finds_the_scripted_upstream_as_strict_as_openai(self, upstream):
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        asks = {"role": "assistant", "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": "c1", "content": "done"}
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        user: Json = {"messages": [USER]}
        good: Json = {"messages": [USER, asks, result], "tools": [tool], "tool_choice": "auto"}
        client = openai.OpenAI(base_url=upstream.url, api_key=KEY, max_retries=0)
        client.chat.completions.create(model="scripted", **good)
        for bad in (
            {"messages": [{"role": "robot", "content": ""}]},
            {"messages": [USER, asks]},
            {"messages": [USER, asks, USER, result]},
            {"messages": [USER, asks, {**result, "content": [image]}]},
            {"messages": [USER, {"role": "assistant", "content": None}]},
            {"messages": [{**USER, "cache_control": {}}]},
            {**user, "tools": []},
            {**user, "tool_choice": "auto"},
            {**user, "tools": [{"type": "function", "function": {"name": "a.b"}}]},
            {**user, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
            {**user, "stop": list("abcde")},
            {**user, "extra_body": {"thinking": {"type": "adaptive"}}},
        ):
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="scripted", **bad)
        assert len(upstream.refusals) == 12
        upstream.refusals.clear()


# ======== Long sessions =======================================================================


def unlike_mistral(body: Json) -> str:
    """What api.mistral.ai refuses in a request that OpenAI would take, in its words."""
    known = {"model", "messages", "tools", "tool_choice", "temperature", "top_p", "max_tokens",
             "stream", "stop", "response_format", "parallel_tool_calls", "reasoning_effort"}
    for name in body:
        if name not in known:
            return json.dumps({"detail": [{"type": "extra_forbidden", "loc": ["body", name],
                                           "msg": "Extra inputs are not permitted"}]})
    roles = [message["role"] for message in body["messages"]]
    for before, after in zip(["", *roles], roles):
        if (before, after) in (("tool", "user"), ("tool", "system"), ("assistant", "system"),
                               ("user", "system"), ("user", "user")):
            return f"Unexpected role '{after}' after role '{before}'"
    return DEMANDS["mistral"](body)


def unlike_deepseek(body: Json) -> str:
    """What api.deepseek.com refuses: images, and a call without the thoughts that led to it."""
    if parts(body, "image_url"):
        return "Failed to deserialize the JSON body into the target type: messages[5]: unknown " \
               "variant `image_url`, expected `text` at line 1 column 70914"
    if "max_completion_tokens" in body or "prompt_cache_key" in body:
        return "Failed to deserialize the JSON body into the target type: unknown field"
    silent = [{k: v for k, v in message.items() if k != "reasoning_content"}
              for message in body["messages"]]
    try:
        check({**body, "messages": silent})
    except ValueError as error:
        return str(error)
    return DEMANDS["deepseek"](body)


class MistralReply(Reply):
    """Its reasoning comes as parts of the content, which is a list then."""

    def deltas(self, turn: int) -> Iterator[Json]:
        for delta in super().deltas(turn):
            thought = [{"type": "text", "text": delta.get("reasoning_content")}]
            told = {"content": [{"type": "thinking", "thinking": thought}]}
            yield told if "reasoning_content" in delta else delta


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


# ======== OpenAI's Responses ==================================================================

SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
SOURCES = ["https://a.test/1", "https://b.test/2"]
# What each event of the SDK's stream is to us. Those of tools that we never ask for are ignored, as
# are those that repeat in whole what came in pieces, or tell of progress.
EVENTS = {
    "translated": """
        error response.completed response.failed response.function_call_arguments.delta
        response.incomplete response.output_item.added response.output_item.done
        response.output_text.annotation.added response.output_text.delta
        response.reasoning_summary_part.added response.reasoning_summary_text.delta
        response.reasoning_text.delta response.refusal.delta""",
    "whole what came in pieces": """
        response.content_part.done response.function_call_arguments.done response.output_text.done
        response.reasoning_summary_part.done response.reasoning_summary_text.done
        response.reasoning_text.done response.refusal.done""",
    "progress": """
        response.content_part.added response.created response.in_progress response.queued
        response.web_search_call.completed response.web_search_call.in_progress
        response.web_search_call.searching""",
    "of what is never asked for": """
        response.audio.delta response.audio.done response.audio.transcript.delta
        response.audio.transcript.done response.code_interpreter_call.completed
        response.code_interpreter_call.in_progress response.code_interpreter_call.interpreting
        response.code_interpreter_call_code.delta response.code_interpreter_call_code.done
        response.compaction.compacting response.custom_tool_call_input.delta
        response.custom_tool_call_input.done response.file_search_call.completed
        response.file_search_call.in_progress response.file_search_call.searching
        response.image_generation_call.completed response.image_generation_call.generating
        response.image_generation_call.in_progress response.image_generation_call.partial_image
        response.mcp_call.completed response.mcp_call.failed response.mcp_call.in_progress
        response.mcp_call_arguments.delta response.mcp_call_arguments.done
        response.mcp_list_tools.completed response.mcp_list_tools.failed
        response.mcp_list_tools.in_progress response.shell_call_command.added
        response.shell_call_command.delta response.shell_call_command.done
        response.shell_call_output_content.delta response.shell_call_output_content.done""",
}


ASK_REASONS: Json = {**ASK, "model": f"openai/{REASONS}"}


class OverResponses:
    """Over an upstream whose models are to be had by Responses alone."""

    @pytest.fixture
    def upstream(self) -> Iterator[ResponsesUpstream]:
        with ResponsesUpstream() as server:
            yield server
            server.shutdown()
        assert server.refusals == [], "the gateway sent what OpenAI refuses"


class TestResponses(OverResponses):
    """With `dialect` set, so that no request goes anywhere else."""

    @pytest.fixture
    def configuration(self, upstream, tmp_path) -> Iterator[list[str]]:
        yield [written_config(tmp_path, "openai", upstream, dialect="responses")]
        assert upstream.knocks == []

    def test_claude_code_keeps_its_chain_of_thought_through_ten_turns(self, gateway, upstream):
        image = gateway.project / "red.png"
        image.write_bytes(png(4, 4, b"\xff\x00\x00"))
        steps = [[("Bash", {"command": f"echo {n}-done"})] for n in range(9)]
        steps[3] += [("Bash", {"command": "echo also"})]
        steps[5] = [("Read", {"file_path": str(image)})]
        script = [
            Response(f"Step {n}." if n % 3 else "", hidden=n % 4 == 1, calls=calls,
                     reasoning="" if n % 4 == 1 else f"Hm {n}.\n\nSo.")
            for n, calls in enumerate(steps)
        ]
        upstream.script = {"Ten": [*script, Response("All done.", reasoning="Finished.")]}
        assert gateway.ask_of(REASONS, "Ten", "--allowedTools", "Bash")["result"] == "All done."
        assert len(upstream.requests) == 10
        for turn, body in enumerate(upstream.requests):
            thoughts = [item for item in body["input"] if item.get("type") == "reasoning"]
            given = [one for one in upstream.given if one.startswith("rs_")]
            assert [one["id"] for one in thoughts] == given[:turn]
            assert body["stream"] is True and body["reasoning"]["summary"] == "auto"
        shown = [bool(one["summary"]) for one in thoughts]
        assert shown == [n % 4 != 1 for n in range(9)]
        outputs = [i["output"] for i in body["input"] if i.get("type") == "function_call_output"]
        assert outputs[:5] == ["0-done", "1-done", "2-done", "3-done", "also"]
        (picture,) = [part for part in outputs[6] if part["type"] == "input_image"]
        assert base64.b64decode(picture["image_url"].split(",", 1)[1]) == image.read_bytes()
        keys = {body["prompt_cache_key"] for body in upstream.requests}
        assert len(keys) == 1

    def test_claude_code_searches_the_web(self, gateway, upstream):
        found = Response("It rains.", reasoning="I look.", search="Oslo weather", sources=SOURCES)
        upstream.script = {
            "Perform a web search": [found],
            "How is it": [Response(calls=[("WebSearch", {"query": "Oslo weather"})], hidden=True),
                          Response("Wet.")],
        }
        asked = gateway.ask_of(REASONS, "How is it in Oslo?", "--allowedTools", "WebSearch")
        assert asked["result"] == "Wet."
        (searching,) = upstream.seen("Perform a web search")
        assert searching["tools"] == [{"type": "web_search"}]
        (output,) = [item["output"] for item in upstream.requests[-1]["input"]
                     if item.get("type") == "function_call_output"]
        assert "It rains." in output and all(url in output for url in SOURCES)
        assert [one["webSearchRequests"] for one in asked["modelUsage"].values()] == [1]

    @pytest.mark.parametrize("streams", [False, True])
    def test_the_sdk_gets_results_and_citations(self, sdk, upstream, streams):
        found = Response("It rains.", reasoning="I look.", search="Oslo weather", sources=SOURCES)
        upstream.script = {"Hello": [found], "And": [Response("Snow.")]}
        message = answer(sdk, streams, **ASK_REASONS, tools=[SEARCH])
        thinking, use, results, opening, opened, text = message.content
        assert (use.type, use.input) == ("server_tool_use", {"query": "Oslo weather"})
        assert results.tool_use_id == use.id
        assert [one.url for one in results.content] == SOURCES
        assert opening.input == {"query": SOURCES[0]} and opened.tool_use_id == opening.id
        assert [citation.url for citation in text.citations] == SOURCES[:1]
        assert message.usage.server_tool_use.web_search_requests == 1
        turns = [USER, {"role": "assistant", "content": message.content},
                 {"role": "user", "content": "And Bergen?"}]
        again = answer(sdk, streams, **{**ASK_REASONS, "messages": turns}, tools=[SEARCH])
        assert again.content[0].text == "Snow."
        sent = upstream.requests[-1]
        assert [item.get("type", item.get("role")) for item in sent["input"]] == [
            "user", "reasoning", "web_search_call", "web_search_call", "message", "user"]
        assert sent["max_tool_calls"] == 3

    def test_structured_output_parses(self, sdk, upstream):
        upstream.script = {"Hello": [Response('{"name": "Oslo", "people": 700000}', hidden=True)]}
        message = sdk.messages.parse(**ASK_REASONS, output_format=City)
        assert message.parsed_output == City(name="Oslo", people=700000)
        assert upstream.requests[0]["text"]["format"]["strict"] is True

    @pytest.mark.parametrize("streams", [False, True])
    def test_stop_sequences_end_the_text(self, sdk, upstream, streams):
        upstream.script = {"Hello": [Response("One, two, three, four.", reasoning="Count.")]}
        message = answer(sdk, streams, **ASK_REASONS, stop_sequences=["three"])
        assert message.content[-1].text == "One, two, "
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "three")

    @pytest.mark.parametrize("streams", [False, True])
    def test_without_verification_it_thinks_unseen(self, sdk, upstream, streams):
        upstream.verified = False
        upstream.script = {"Hello": [Response("Good day.", reasoning="Hm.")]}
        for _ in range(2):
            hidden, text = answer(sdk, streams, **ASK_REASONS).content
            assert (hidden.type, text.text) == ("redacted_thinking", "Good day.")
        first, *rest = [body["reasoning"] for body in upstream.requests]
        assert "summary" in first and len(rest) == 2 and all("summary" not in one for one in rest)

    @pytest.mark.parametrize("streams", [False, True])
    @pytest.mark.parametrize(("reply", "stop_reason"), [
        (Response("Half of", ends="max_output_tokens"), "max_tokens"),
        (Response("Half of", ends="content_filter"), "refusal"),
        (Response(refusal="I can't help with that."), "refusal"),
        (Response(calls=[("weather", {"city": "Oslo"})]), "tool_use"),
        (Response("Whole."), "end_turn"),
    ])
    def test_it_ends_as_it_ended(self, sdk, upstream, reply, stop_reason, streams):
        upstream.script = {"Hello": [reply]}
        message = answer(sdk, streams, **ASK_REASONS, tools=[WEATHER])
        assert message.stop_reason == stop_reason
        told = "".join(block.text for block in message.content if block.type == "text")
        assert told == reply.text + reply.refusal

    @pytest.mark.parametrize(("ends", "expected"), [
        ("failed server_error", anthropic.InternalServerError),
        ("failed rate_limit_exceeded", anthropic.RateLimitError),
        ("failed invalid_prompt", anthropic.BadRequestError),
        ("failed image_too_large", anthropic.BadRequestError),
        ("failed bio_policy", anthropic.BadRequestError),
        ("error server_error", anthropic.InternalServerError),
        ("error insufficient_quota", anthropic.RateLimitError),
        ("error rate_limit_exceeded", anthropic.RateLimitError),
    ])
    def test_a_failure_in_the_stream_is_told_by_its_class(self, sdk, upstream, ends, expected):
        upstream.script = {"Hello": [Response(ends=ends)]}
        with pytest.raises(expected, match=f"It failed: {ends.split()[1]}."):
            answer(sdk, True, **ASK_REASONS)
        upstream.script = {"Hello": [Response("A beginning", ends=ends)]}
        with pytest.raises(anthropic.APIStatusError, match="It failed"):
            answer(sdk, True, **ASK_REASONS)

    @pytest.mark.parametrize("streams", [False, True])
    def test_a_prompt_that_is_too_long_is_told_so_that_claude_code_compacts(
        self, sdk, upstream, streams
    ):
        words = "Your input exceeds the context window of this model. Please adjust your input " \
                "and try again."
        upstream.script = {"Hello": [Response(words, status=400)],
                           "Good": [Response(ends="error context_length_exceeded")]}
        evening = {**ASK_REASONS, "messages": [{"role": "user", "content": "Good evening"}]}
        for ask in (ASK_REASONS, evening) if streams else (ASK_REASONS,):
            with pytest.raises(anthropic.BadRequestError, match="prompt is too long: "):
                answer(sdk, streams, **ask)

    def test_every_kind_of_block_is_taken(self, sdk, upstream):
        data = {"type": "base64", "media_type": "image/png",
                "data": base64.b64encode(png(1, 1, b"123")).decode()}
        page = {**data, "media_type": "application/pdf",
                "data": base64.b64encode(pdf("a page")).decode()}
        documents = [{"type": "document", "source": source, "title": "a"} for source in (
            page, {"type": "text", "media_type": "text/plain", "data": "MARK-text"},
            {"type": "content", "content": [{"type": "text", "text": "MARK-content"}]})]
        found = {"type": "search_result", "source": "s", "title": "MARK-title",
                 "content": [{"type": "text", "text": "MARK-found"}]}
        use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "MARK-é"}}
        inside = [{"type": "text", "text": "MARK-result"}, {"type": "image", "source": data},
                  documents[0], {"type": "tool_reference", "tool_name": "MARK-tool"}]
        turns: list[Json] = [
            {"role": "user", "content": [{"type": "image", "source": data}, *documents, found]},
            {"role": "system", "content": "MARK-system"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "foreign", "signature": "of another"},
                {"type": "redacted_thinking", "data": "of another"},
                {"type": "text", "text": "MARK-said"},
                {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search",
                 "input": {"query": "MARK-query"}},
                {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [
                    {"type": "web_search_result", "url": "https://a.test/MARK-url", "title": "t",
                     "encrypted_content": "x"}]},
                use, {**use, "id": "toolu_2"}, {**use, "id": "toolu_3"}]},
            {"role": "system", "content": [{"type": "text", "text": "MARK-between"}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True,
                 "content": "MARK-error"},
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": inside},
                {"type": "tool_result", "tool_use_id": "toolu_9", "content": "MARK-orphan"},
                {"type": "text", "text": ""}, {"type": "text", "text": "Hello"}]},
        ]
        tools = [{"name": "no.schema at all", "input_schema": {}}, WEATHER, SEARCH,
                 {"type": "bash_20250124", "name": "bash"}]
        upstream.script = {"Hello": [Response("Taken.")]}
        taken = answer(sdk, True, **{**ASK_REASONS, "messages": turns}, tools=tools,
                       system=[{"type": "text", "text": "MARK-head"}])
        assert taken.content[0].text == "Taken."
        (body,) = upstream.requests
        sent = json.dumps(body, ensure_ascii=False)  # as the model sees it, so without escapes
        for mark in set(re.findall(r"MARK-[\wé]+", json.dumps(turns, ensure_ascii=False))):
            assert mark in sent, mark
        assert "MARK-head" in body["instructions"] and "bash" in body["instructions"]

    def test_two_messages_stay_two(self, sdk, upstream):
        upstream.script = {"Hello": [Response("I look at it first.", more="It is red.")]}
        for streams in (True, False):
            texts = [block.text for block in answer(sdk, streams, **ASK_REASONS).content]
            assert texts == ["I look at it first.", "It is red."]

    def test_a_model_that_does_not_reason_is_not_asked_to_for_long(self, sdk, upstream):
        upstream.script = {"Hello": [Response("Good day.")]}
        ask: Json = {**ASK_REASONS, "model": f"openai/{PLAIN}",
                     "thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2048}
        for _ in range(2):
            assert answer(sdk, True, **ask).content[0].text == "Good day."
        assert upstream.refusals == ["Encrypted content is not supported with this model."]
        upstream.refusals.clear()

    def test_nothing_that_it_sends_is_too_long(self, sdk, upstream):
        names = [f"{'very' * 20}_long.name-{n}" for n in range(2)]
        upstream.script = {"Hello": [Response("Good day.")]}
        tools = [{**WEATHER, "name": name} for name in names]
        uses = [{"type": "tool_use", "id": "0123456789" * 7 + str(n), "name": name, "input": {}}
                for n, name in enumerate(names)]
        results = [{"type": "tool_result", "tool_use_id": use["id"], "content": "x"}
                   for use in uses]
        turns = [USER, {"role": "assistant", "content": uses}, {"role": "user", "content": results}]
        ask: Json = {**ASK_REASONS, "messages": turns, "max_tokens": 1,
                     "metadata": {"user_id": "u" * 200}}
        answer(sdk, True, **ask, tools=tools)
        sent = upstream.requests[-1]
        assert len({item["call_id"] for item in sent["input"] if "call_id" in item}) == 2
        assert len({tool["name"] for tool in sent["tools"]}) == 2

    def test_what_was_cut_off_in_thought_is_not_sent_back_alone(self, sdk, upstream):
        upstream.script = {"Hello": [Response(reasoning="Long.", ends="max_output_tokens")],
                           "Go on": [Response("Good day.")]}
        message = answer(sdk, True, **ASK_REASONS)
        assert [block.type for block in message.content] == ["thinking"]
        turns = [USER, {"role": "assistant", "content": message.content},
                 {"role": "user", "content": "Go on"}]
        (text,) = answer(sdk, True, **{**ASK_REASONS, "messages": turns}).content
        assert text.text == "Good day."

    def test_reasoning_that_is_refused_is_left_out(self, sdk, upstream):
        upstream.script = {"Hello": [Response("Hi.", reasoning="Hm.")], "Now": [Response("Bye.")]}
        message = answer(sdk, True, **ASK_REASONS)
        upstream.given.clear()  # another organisation's key, say
        turns = [USER, {"role": "assistant", "content": message.content},
                 {"role": "user", "content": "Now?"}]
        assert answer(sdk, True, **{**ASK_REASONS, "messages": turns}).content[0].text == "Bye."
        (refusal,) = upstream.refusals
        assert "not found" in refusal
        upstream.refusals.clear()
        upstream.script = {"Hello": [Response("Hi.", reasoning="Hm.")], "Now": [Response("Bye.")]}
        message = answer(sdk, True, **ASK_REASONS)
        turns[1] = {"role": "assistant", "content": message.content}
        answer(sdk, True, **{**ASK_REASONS, "messages": turns})
        assert [item for item in upstream.requests[-1]["input"]
                if item.get("type") == "reasoning"], "one conversation's habit isn't the model's"


def answer(sdk: anthropic.Anthropic, streams: bool, **request: Any) -> Any:
    """The answer, valid for the SDK, whichever way it came."""
    if not streams:
        return valid(sdk.messages.create(**request))
    with sdk.messages.stream(**request) as stream:
        return valid(stream.get_final_message())


class TestWhichDialect(OverResponses):
    """With nothing configured: this host isn't OpenAI's, so chat comes first."""

    @pytest.mark.parametrize("moved", [
        (404, scripted_responses.MOVED),
        (404, "This is not a chat model and thus not supported in the v1/chat/completions endpoint."
              " Did you mean to use v1/completions?"),
        (400, "Function tools with reasoning_effort are not supported for gpt-6-scripted in "
              "/v1/chat/completions. To use function tools, use /v1/responses or set "
              "reasoning_effort to 'none'."),
        (400, "Function tools with reasoning_effort are not supported for gpt-6-scripted in "
              "/v1/chat/completions. Please use /v1/responses instead."),
    ])
    def test_claude_code_is_switched_once(self, gateway, upstream, moved):
        upstream.moved = moved
        calls = [("Bash", {"command": "echo found"})]
        upstream.script = {"Look": [Response(reasoning="Hm.", calls=calls), Response("Here.")]}
        for _ in range(2):
            asked = gateway.ask_of(REASONS, "Look", "--allowedTools", "Bash")
            assert asked["result"] == "Here."
        assert len(upstream.knocks) == 1 and len(upstream.requests) == 4


class TestWhatTheSdkKnows(OverResponses):
    """The openai SDK's types and the scripted upstream, compared with each other and with us."""

    def test_every_event_of_the_sdk_has_a_meaning_here(self, sdk, upstream):
        known = {what: names.split() for what, names in EVENTS.items()}
        assert sorted(sum(known.values(), [])) == sorted(scripted_responses.EVENT_TYPES)
        upstream.noise = [name for what in known if what != "translated" for name in known[what]]
        upstream.script = {"Hello": [Response("Good day.", reasoning="Hm.")]}
        thinking, text = answer(sdk, True, **ASK_REASONS).content
        assert (thinking.thinking, text.text) == ("Hm.", "Good day.")
        upstream.noise = ["response.reasoning_text.delta"]  # of open models
        thinking, text, more = answer(sdk, True, **ASK_REASONS).content
        assert more.thinking == "NOISE"

    def test_the_upstream_is_as_strict_as_openai(self, upstream):
        client = openai.OpenAI(base_url=upstream.url, api_key=KEY, max_retries=0)
        good: Json = {"model": REASONS, "store": False, "include": [scripted_responses.ENCRYPTED]}
        upstream.script = {"Hello": [Response("Hi.", reasoning="Hm.\n\nSo.", search="q",
                                              sources=SOURCES, calls=[("f", {"x": 1})])]}
        with client.responses.stream(**good, input=[USER]) as stream:
            response = stream.get_final_response()
        kinds = ["reasoning", "web_search_call", "web_search_call", "message", "function_call"]
        assert [item.type for item in response.output] == kinds
        assert client.responses.create(**good, input=[USER]).output_text == "Hi."
        thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        result = {"type": "function_call_output", "call_id": "c", "output": "x"}
        tool = {"type": "function", "name": "f", "strict": False, "parameters": {"type": "object"}}
        said = {"role": "assistant", "content": "Hi."}
        client.responses.create(**good, input=[USER, said, call, result], tools=[tool])
        mine, searched = (item.to_dict() for item in response.output[:2])
        client.responses.create(**good, input=[USER, mine, searched])
        for bad in (
            {"extra_body": {"stop": ["x"]}}, {"extra_body": {"max_tokens": 5}},
            {"store": True}, {"previous_response_id": "resp_1"}, {"include": ["reasoning.all"]},
            {"max_output_tokens": 15}, {"temperature": 0.5}, {"prompt_cache_key": "x" * 65},
            {"safety_identifier": "x" * 65}, {"tool_choice": "auto"},
            {"model": PLAIN, "include": [scripted_responses.ENCRYPTED]},
            {"model": PLAIN, "include": [], "reasoning": {"effort": "low"}},
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            {"tools": [{**tool, "name": "x" * 65}]}, {"tools": [tool, tool]},
            {"tools": [{**tool, "parameters": {}}]}, {"tools": [{**tool, "function": {}}]},
            {"tools": [{**tool, "strict": True}]},
            {"tools": [tool], "tool_choice": {"type": "function", "name": "g"}},
            {"input": [{"role": "robot", "content": "x"}]}, {"input": [{**USER, "content": []}]},
            {"input": [{**USER, "cache_control": {}}]}, {"input": [USER, call]},
            {"input": [USER, result]}, {"input": [USER, {**call, "name": "a.b"}, result]},
            {"input": [USER, {**call, "arguments": "{"}, result]}, {"input": [USER, thought, said]},
            {"input": [USER, mine]}, {"input": [USER, mine, said]},
            {"input": [USER, {**searched, "id": "ws_1"}]},
            {"input": [USER, {**mine, "id": searched["id"]}, said]},
            {"input": [USER, {**mine, "encrypted_content": "gAAA_of_another"}, said]},
            {"input": [{"role": "assistant", "content": [{"type": "input_text", "text": "x"}]}]},
            {"input": [{"role": "user", "content": [{"type": "input_image", "detail": "auto",
                                                     "image_url": "data:image/tiff;base64,AA"}]}]},
        ):
            before = len(upstream.refusals)
            with pytest.raises(openai.BadRequestError):
                client.responses.create(**{**good, "input": [USER], **bad})
            assert len(upstream.refusals) == before + 1, bad
        upstream.refusals.clear()


# ======== The Claude Agent SDK ================================================================


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


# ======== Bedrock =============================================================================

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
MANTLE, RUNTIME = scripted_bedrock.MANTLE, scripted_bedrock.RUNTIME


class Aws:
    """The user's AWS files, and the scripted Bedrock that knows their keys."""

    def __init__(self, home: Path, server: scripted_bedrock.ScriptedBedrock) -> None:
        self.folder, self.server = home / ".aws", server
        self.folder.mkdir()
        region = f"[profile work]\nregion = {scripted_bedrock.REGION}\n"
        (self.folder / "config").write_text(region)

    def hand_out(self, key_id: str, token: str) -> None:
        """Give the user temporary keys, which AWS's tools write into their file."""
        self.server.keys[key_id] = (SECRET, token)
        (self.folder / "credentials").write_text(
            f"[work]\naws_access_key_id = {key_id}\naws_secret_access_key = {SECRET}\n"
            f"aws_session_token = {token}\n"
        )


@pytest.fixture
def aws(tmp_path) -> Iterator[Aws]:
    (tmp_path / "home").mkdir()
    with scripted_bedrock.ScriptedBedrock() as server:
        files = Aws(tmp_path / "home", server)
        files.hand_out("ASIAFIRST", "first-token/+==")
        yield files
        server.shutdown()
    assert server.refusals == [], "the gateway sent what Bedrock refuses"


@pytest.fixture
def on_bedrock(aws, tmp_path, monkeypatch) -> Iterator[Gateway]:
    """A gateway whose way to AWS's hosts leads through the scripted ones; keys and region come
    from a profile."""
    url = "http://bedrock-mantle.${env.AWS_REGION}.api.aws/v1"
    line = {"provider_id": "bedrock", "provider_type": "remote::bedrock",
            "config": {"base_url": url}}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"providers": {"inference": [line]}}))
    variables = {"AWS_PROFILE": "work", "http_proxy": aws.server.url}
    with started(tmp_path, monkeypatch, variables, str(config)) as running:
        yield running
    log = (tmp_path / "gateway.log").read_text()
    assert not [secret for secret in (SECRET, "first-token", "second-token") if secret in log]


class TestBedrock:
    def test_signatures_are_botocores_today_too(self):
        spec = importlib.util.spec_from_file_location("ogx_under_test", OGX)
        ogx = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = ogx
        spec.loader.exec_module(ogx)
        assert len(signatures.CASES) >= 12
        for words, method, short, more, body, token in signatures.CASES:
            url, headers, scope = signatures.request_of(short, more)
            now = time.time()
            expected = signatures.signature(method, url, headers, body, token, scope, now)
            keys = (signatures.KEY_ID, signatures.SECRET, token)
            made = ogx.aws_signature(method, url, headers, body, keys, scope, now)
            assert made["authorization"] == expected, words

    def test_the_tests_without_botocore_know_its_signatures(self):
        assert signatures.table() in (ROOT / "test_ogx.py").read_text(encoding="utf-8")

    @pytest.mark.parametrize(("model", "where"), [
        (scripted_bedrock.CLAUDE[MANTLE], f"{MANTLE}/anthropic/v1/messages"),
        (scripted_bedrock.CLAUDE[RUNTIME], f"{RUNTIME}/anthropic/v1/messages"),
        (scripted_bedrock.OPEN[MANTLE], f"{MANTLE}/v1/chat/completions"),
        (scripted_bedrock.OPEN[RUNTIME], f"{RUNTIME}/openai/v1/chat/completions"),
    ])
    def test_claude_code_loops_over_tools(self, on_bedrock, aws, model, where):
        calls = [("Bash", {"command": f"echo {n}-from-the-shell"}) for n in range(3)]
        aws.server.script = {"Run them": [
            Reply("On it.", reasoning="Three of them.", calls=[call]) for call in calls
        ] + [Reply("All three ran.")]}
        done = on_bedrock.connect("--model", f"bedrock/{model}", "--", "-p", "Run them",
                                  "--allowedTools", "Bash", "--output-format", "json")
        assert done.returncode == 0, done.stdout + done.stderr
        result = json.loads(done.stdout)
        assert result["result"] == "All three ran." and result["num_turns"] == 4
        loop = aws.server.seen("Run them")
        assert len(loop) == 4 and {body["model"] for body in loop} == {model}
        assert "2-from-the-shell" in json.dumps(loop[-1]["messages"])
        assert aws.server.refused == []
        assert aws.server.asked.count(f"POST {where}") >= 4
        assert result["usage"]["cache_read_input_tokens"] == 4000
        if "anthropic" in model:
            assert all("cache_control" in json.dumps(body["system"]) for body in loop)
            thoughts = [b for m in loop[-1]["messages"] if m["role"] == "assistant"
                        for b in m["content"] if b["type"] == "thinking"]
            assert {b["signature"] for b in thoughts} == {"c2lnbmVk"}
            assert all(aws.server.betas)

    def test_models_and_profiles_are_listed(self, on_bedrock, aws):
        with anthropic.Anthropic(base_url=on_bedrock.url, api_key="any") as sdk:
            ids = {model.id for model in sdk.models.list() if not model.id.startswith("claude-")}
        claude, others = scripted_bedrock.CLAUDE.values(), scripted_bedrock.OPEN.values()
        assert ids == {f"bedrock/{name}" for name in (*claude, *others)}
        control = scripted_bedrock.CONTROL
        assert aws.server.asked == [f"GET {MANTLE}/v1/models", f"GET {control}/inference-profiles",
                                    f"GET {control}/foundation-models"]

    def test_tokens_are_counted_there(self, on_bedrock, aws):
        with anthropic.Anthropic(base_url=on_bedrock.url, api_key="any") as sdk:
            model = f"bedrock/{scripted_bedrock.CLAUDE[MANTLE]}"
            counted = sdk.messages.count_tokens(model=model, messages=[USER])
        assert counted.input_tokens == 4321

    def test_a_long_running_gateway_survives_new_keys(self, on_bedrock, aws):
        aws.server.script = {"Hello": [Reply("Good day.")]}
        ask = {**ASK, "model": f"bedrock/{scripted_bedrock.CLAUDE[RUNTIME]}"}
        with anthropic.Anthropic(base_url=on_bedrock.url, api_key="any", max_retries=0) as sdk:
            assert sdk.messages.create(**ask).content[0].text == "Good day."
            aws.server.expired.add("first-token/+==")
            with pytest.raises(anthropic.AuthenticationError, match="request is expired"):
                sdk.messages.create(**ask)
            aws.hand_out("ASIASECOND", "second-token/+==")
            assert sdk.messages.create(**ask).content[0].text == "Good day."

    @pytest.mark.parametrize("name", [
        scripted_bedrock.CLAUDE[MANTLE], scripted_bedrock.OPEN[MANTLE],
    ])
    def test_refusals_have_the_right_class_and_awss_words(self, on_bedrock, aws, name):
        ask = {**ASK, "model": f"bedrock/{name}"}
        busy = "Too many requests, please wait before trying again."
        aws.server.script = {"Hello": [Reply(busy, status=429)]}
        with anthropic.Anthropic(base_url=on_bedrock.url, api_key="any", max_retries=0) as sdk:
            with pytest.raises(anthropic.RateLimitError, match=busy):
                sdk.messages.create(**ask)
            aws.server.clock = 600
            with pytest.raises(anthropic.AuthenticationError, match="Signature expired.*the clock"):
                sdk.messages.create(**ask)
            aws.server.clock = 0
            aws.server.keys["ASIAFIRST"] = ("another-secret", "first-token/+==")
            with pytest.raises(anthropic.AuthenticationError, match="we calculated") as wrong:
                sdk.messages.create(**ask)
        assert "first-token" not in str(wrong.value) and SECRET not in str(wrong.value)
