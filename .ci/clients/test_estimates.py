"""Estimated numbers of tokens, compared with the counts of OpenAI's tokenizer (.ci/o200k.cjs)."""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import anthropic
import pytest
from gateways import MODEL, OGX, ROOT
from scripted_upstream import Json, Reply, text_of

pytestmark = pytest.mark.clients


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
