"""Each prompt of a session begins as the one before it: what a server's prefix cache lives from.

Ten turns of the real Claude Code in each dialect. What reaches the upstream is rendered as Qwen's
chat templates do it, and counted with OpenAI's tokenizer; `-s` prints the new tokens of each turn.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gateways import MODELS, OGX, PYTHON, ROOT, written_config
from scripted_upstream import Json, Reply, text_of

pytestmark = pytest.mark.clients

NATIVE = "messages/scripted-claude"  # a server that speaks Messages and isn't Anthropic's


# ======== What a model reads ==================================================================


def messages_in(body: Json) -> Iterator[Json]:
    """A request of any dialect as messages of chat completions."""
    system = body.get("system") or body.get("instructions")
    if system:
        yield {"role": "system", "content": system}
    for message in body.get("messages") or body["input"]:
        if message.get("type") == "function_call":
            yield {"role": "assistant", "tool_calls": [{"function": message}]}
        elif message.get("type") == "function_call_output":
            yield {"role": "tool", "content": message["output"]}
        elif "role" in message and isinstance(message["content"], list):
            yield from messages_of_blocks(message)
        elif "role" in message:
            yield message


def messages_of_blocks(message: Json) -> Iterator[Json]:
    for block in message["content"]:
        if block["type"] == "tool_use":
            call = {"name": block["name"], "arguments": json.dumps(block["input"])}
            yield {"role": "assistant", "tool_calls": [{"function": call}]}
        elif block["type"] == "tool_result":
            yield {"role": "tool", "content": text_of(block)}
        elif "text" in block:
            yield {"role": message["role"], "content": block["text"]}


def rendered(body: Json) -> str:
    """What a model reads of a request, with the tools before all others."""
    tools = [tool.get("function") or tool for tool in body.get("tools") or ()]
    parts = ["# Tools\n", *(json.dumps(tool["name"]) + json.dumps(
        tool.get("parameters") or tool.get("input_schema")) + str(tool.get("description")) + "\n"
        for tool in tools), "\n"]
    role = ""
    for message in messages_in(body):
        parts += [f"\n<|{message['role']}|>\n"] * (message["role"] != role)
        role = message["role"]
        parts.append(text_of(message) if message.get("content") else "")
        for call in message.get("tool_calls") or ():
            function = call["function"]
            parts.append(f"<tool_call>{function['name']} {function['arguments']}</tool_call>")
    return "".join(parts)


def common(one: str, other: str) -> int:
    return len(os.path.commonprefix([one, other]))


class Counter:
    """OpenAI's tokenizer."""

    def __enter__(self) -> "Counter":
        environment = {**os.environ, "NODE_PATH": str(ROOT / ".clients/npm/node_modules")}
        self._process = subprocess.Popen(
            ["node", str(ROOT / ".ci/o200k.cjs")], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()

    def __call__(self, text: str) -> int:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        stdin.write(json.dumps(text) + "\n")
        stdin.flush()
        return int(stdout.readline())


# ======== The session =========================================================================


def call(name: str, **arguments: Any) -> Reply:
    return Reply(calls=[(name, arguments)])


class Session:
    """Turns of one session, each by a process of its own, and what they cost."""

    def __init__(self, gateway: Any, upstream: Any, model: str) -> None:
        self.gateway, self.upstream, self.model = gateway, upstream, model
        self.begun = False
        self.seen = 0  # requests that were looked at

    def words(self, *prompt: str) -> list[str]:
        port = self.gateway.url.rsplit(":", 1)[1]
        more = ["--continue"] * self.begun
        self.begun = True
        return [PYTHON, OGX, "connect", "claude", "--quiet", "--port", port, "--model", self.model,
                "--", "-p", *prompt, *more, "--allowedTools",
                "Bash,Read,Write,Edit,Agent,ToolSearch,NotebookEdit,WebFetch"]

    def turn(self, prompt: str) -> list[str]:
        """The prompts of a turn's requests."""
        done = self.gateway.run(*self.words(prompt))
        assert done.returncode == 0, done.stdout + done.stderr
        return self.prompts()

    def two_turns(self, prompts: list[str], between: Callable[[], Any]) -> list[list[str]]:
        """Two turns by one process, between which something happens."""
        process = subprocess.Popen(
            [*self.words(), "--verbose", "--input-format", "stream-json", "--output-format",
             "stream-json"], cwd=self.gateway.project, env=self.gateway.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin and process.stdout
        turns = []
        for prompt in prompts:
            message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
            process.stdin.write(json.dumps({"type": "user", "message": message}) + "\n")
            process.stdin.flush()
            while json.loads(process.stdout.readline())["type"] != "result":
                pass
            turns.append(self.prompts())
            between()
        process.communicate(timeout=60)
        return turns

    def interrupted_turn(self, prompt: str, begun: threading.Event) -> None:
        process = subprocess.Popen(
            self.words(prompt), cwd=self.gateway.project, env=self.gateway.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + 30
        while not self.upstream.seen(prompt) and time.monotonic() < give_up:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        begun.set()
        self.prompts()

    def prompts(self) -> list[str]:
        new, self.seen = self.upstream.requests[self.seen :], len(self.upstream.requests)
        return [rendered(body) for body in new]


@pytest.fixture(params=["chat", "responses", "messages"])
def dialect(request) -> str:
    return request.param


@pytest.fixture
def model(dialect) -> str:
    return {**MODELS, "messages": NATIVE}[dialect]


@pytest.fixture
def configuration(dialect, upstream, tmp_path) -> list[str]:
    if dialect == "chat":
        return []
    if dialect == "messages":
        upstream.models = [NATIVE.partition("/")[2]]
    kind = "messages" if dialect == "messages" else "openai"
    return [written_config(tmp_path, kind, upstream, dialect=dialect)]


class TestPrompts:
    def test_ten_turns(self, gateway, upstream, model):
        file = gateway.project / "notes.txt"
        file.write_text("a\nb\n" * 20)
        written = gateway.project / "written.txt"
        errand = {"description": "Find out", "prompt": "SUBTASK: say hi",
                  "subagent_type": "general-purpose", "run_in_background": False}
        waits = threading.Event()
        upstream.script = {
            "TURN-1": [Reply("Good day.")],
            "TURN-2": [Reply("I look.", reasoning="Let me see.",
                             calls=[("Bash", {"command": "echo one"})]), Reply("One.")],
            "TURN-3": [Reply(calls=[("Bash", {"command": "echo two"}),
                                    ("Bash", {"command": "echo three"})]), Reply("Both.")],
            "TURN-4": [call("Read", file_path=str(file)), call("Edit", file_path=str(file),
                       old_string="a\nb\n" * 20, new_string="a\nb\n"),
                       call("Write", file_path=str(written), content="a\nb\n"), Reply("Edited.")],
            "TURN-5": [call("Read", file_path=str(written)), Reply("It changed.")],
            "TURN-6": [call("ToolSearch", query="select:NotebookEdit,WebFetch", max_results=2),
                       Reply("Loaded.")],
            "TURN-7": [call("Agent", **errand), Reply("The agent said hi.")],
            "SUBTASK": [Reply("Hi from the agent.")],
            "TURN-8": [Reply("I go on and on." * 9, waits_for=waits)],
            "TURN-9": [Reply("Still here.")],
            "TEXT ONLY": [Reply("<summary>We said hello.</summary>")],
            "TURN-10": [Reply("After the summary.")],
        }
        session, before, new = Session(gateway, upstream, model), "", {}
        turns = {number: session.turn(f"TURN-{number}") for number in (1, 2, 3)}
        turns[4], turns[5] = session.two_turns(
            ["TURN-4", "TURN-5"], lambda: written.write_text("a\nchanged behind its back\nb\n"))
        # Which Claude Code tells in a system message, of files that it wrote.
        assert "written.txt changed on disk" in turns[5][0]
        turns.update({number: session.turn(f"TURN-{number}") for number in (6, 7)})
        session.interrupted_turn("TURN-8", waits)
        turns[9] = session.turn("TURN-9")
        session.turn("/compact")
        turns[10] = session.turn("TURN-10")
        with Counter() as tokens:
            for number, prompts in turns.items():
                new[number] = 0
                for prompt in (one for one in prompts if f"TURN-{number}" in one):
                    same = common(before, prompt)
                    # Tools are loaded in 6, and a summary replaces all before 10.
                    assert number in (6, 10) or same == len(before), (
                        number, before[same - 200 :], prompt[same - 200 : same + 200])
                    new[number] += tokens(prompt[same:])
                    before = prompt
            print(f"\n{model}: new tokens by turn {new}, {tokens(before)} in the last prompt")
        assert all(new[number] < 700 for number in (2, 3, 4, 5, 7, 9)), new

    def test_a_second_session_of_a_project(self, gateway, upstream, model):
        upstream.script = {"FIRST": [Reply("Good day.")], "SECOND": [Reply("Good evening.")]}
        (first,) = Session(gateway, upstream, model).turn("FIRST question of mine?")
        session = Session(gateway, upstream, model)
        session.seen = 1
        (second,) = session.turn("SECOND, which is another one.")
        with Counter() as tokens:
            new = tokens(second[common(first, second) :])
        print(f"\n{model}: {new} new tokens in the second session's first prompt")
        assert new < 100
