"""The specification of ogx.py: one class per section of the file, in the same order.

    make test ARGS=test_ogx.py::TestServer     the tests of one section
    make test ARGS="-k pipelin"                those whose names hold a word

Upstreams are real loopback sockets (FakeUpstream), gateways are real servers on free ports.

    helpers         request(), user(), delta() and more build values; refused(), check_grammar()
                    judge them; FakeUpstream, gateway_over(), serving() and Client are both sides
    TestTheFile     what holds of the whole: imports, sections, names of tests, the README, make
    TestErrors      and so on, by the index of ogx.py
    TestGateway     one reply path, native, errors, redaction, remedies, retries, chains, places,
                    calls as text, disconnects, counting, models, sessions, discovery, bedrock,
                    bounds
    TestServer      routes, connection, framing, guard, limits, disconnects, TLS, stopping, loop,
                    log
"""

from __future__ import annotations

import ast
import base64
import builtins
import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import gzip
import http.client
import io
import importlib.util
import json
import logging
import os
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
import tracemalloc
import traceback
import types
import urllib.request
import weakref
import zlib
from pathlib import Path

import pytest

import ogx

HERE = Path(__file__).resolve().parent
SOURCE = (HERE / "ogx.py").read_text(encoding="utf-8")
MAX_BYTES = 409_950
SECTIONS = re.findall(r"^# ======== (.+?) =+$", SOURCE, re.M)
IO_LINE = "Above this line nothing does I/O"


# ---- helpers --------------------------------------------------------------------------------


def refused(callable_, *args, **kwargs) -> ogx.OgxError:
    """The OgxError that a call must raise."""
    with pytest.raises(ogx.OgxError) as caught:
        callable_(*args, **kwargs)
    return caught.value


SPELT = {"\r\n": " CRLF ", "\r": " CR ", "\n": " LF ", "\t": " TAB ", "\0": " NUL ", "\\": "/"}


def name_of(value):
    """A value in a few words of printable ASCII, its control characters spelt out."""
    if isinstance(value, dict):
        value = [word for pair in value.items() for word in pair] or "{}"
    if isinstance(value, (list, tuple)):
        value = " ".join(map(name_of, value)) or "[]"
    value = getattr(value, "__name__", value)
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    text = text if len(text) < 400 else text[:300] + text[-100:]
    text = re.sub("\r\n|[^ -[\\]-~]", lambda m: SPELT.get(m[0]) or f"U+{ord(m[0]):04X} ", text)
    words = [word.strip(":,;") for word in re.findall(r"[^\s\"'{}()\[\]]+", text)]
    name = " ".join(filter(None, words)) or text.strip() or "empty"
    return name if len(name) < 50 else name[:28].rstrip() + " .. " + name[-18:].lstrip()


def cases(names, rows):
    """Parametrize a test by rows, each named by the words in it."""
    rows = list(rows)
    several = not isinstance(names, str) or "," in names
    values = [getattr(row, "values", row) if isinstance(row, tuple) else row for row in rows]
    ids = ["-".join(map(name_of, row)) if several else name_of(row) for row in values]
    return pytest.mark.parametrize(names, rows, ids=[name[:90] for name in ids])


def repository_file(name):
    """The path of another file of the repository; a test that lacks it is skipped, and says so."""
    path = HERE / name
    if not path.exists():
        pytest.skip(f"{name} of the repository is not beside test_ogx.py")
    return path


def provider(kind="openai", url="http://127.0.0.1:9/v1", name=None, key="sk-secret-1234"):
    return ogx.Provider(name or kind, ogx.PROVIDER_KINDS[kind], url, key)


def model(kind="openai", upstream_id="gpt-x", **fields):
    owner = provider(kind)
    return ogx.Model(f"{owner.id}/{upstream_id}", owner, upstream_id, **fields)


def request(*messages, **fields):
    """A Messages request; a plain string is a user's message."""
    turns = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
    base = {"model": "openai/gpt-x", "max_tokens": 100, "messages": turns or [user("hi")]}
    return {**base, **fields}


def user(*content):
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def assistant(*content):
    return {"role": "assistant", "content": content[0] if len(content) == 1 else list(content)}


def text(words):
    return {"type": "text", "text": words}


def call(call_id, name="Bash", **arguments):
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def result(call_id, content="ok", **fields):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **fields}


def image(data="aW1n", media_type="image/png"):
    source = {"type": "base64", "media_type": media_type, "data": data}
    return {"type": "image", "source": source}


def pdf(data="JVBERi0=", **fields):
    source = {"type": "base64", "media_type": "application/pdf", "data": data}
    return {"type": "document", "source": source, **fields}


def tool(name="Bash", **schema):
    return {"name": name, "description": "d", "input_schema": {"type": "object", **schema}}


def delta(finish=None, usage=None, **fields):
    """A chunk of a chat completion."""
    chunk = {"id": "c", "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}
    return {**chunk, "usage": usage} if usage else chunk


def fragment(index=0, call_id=None, name=None, arguments=None):
    """A piece of a tool call, with only the fields that are given."""
    function = {k: v for k, v in (("name", name), ("arguments", arguments)) if v is not None}
    piece = {"index": index, "id": call_id, "type": "function", "function": function}
    return {k: v for k, v in piece.items() if v is not None}


LATER = "Mon, 01 Jan 2090 00:00:00 GMT"
USAGE = {"prompt_tokens": 50, "completion_tokens": 7,
         "prompt_tokens_details": {"cached_tokens": 20}}  # fmt: skip


def sse(*chunks, done=True):
    """Chunks as the bytes of a stream."""
    data = b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks)
    return data + (b"data: [DONE]\n\n" if done else b"")


def said(words="Hello.", finish="stop"):
    """A whole, simple stream."""
    return sse(delta(role="assistant", content=""), delta(content=words), delta(finish, USAGE))


def translated(*chunks, body=None, used_ids=(), stops=(), by=ogx.ChatTranslator, by_model=None):
    """The events that chunks become, checked against Anthropic's grammar."""
    writer = ogx.MessageWriter(ogx.new_message("msg_1", "m", 5), used_ids, stops)
    translator = by(writer, body or request(), by_model or model())
    for chunk in chunks:
        translator.feed(json.dumps(chunk).encode())
    translator.end()
    events = writer.take()
    check_grammar(events)
    return events


def folded(*chunks, **options):
    return ogx.message_from_events(translated(*chunks, **options))


def check_grammar(events):
    """Anthropic's stream grammar: one start, blocks one after the other, one end."""
    kinds = [e["type"] for e in events]
    assert kinds[0] == "message_start" and kinds.count("message_start") == 1, kinds
    assert kinds[-2:] == ["message_delta", "message_stop"], kinds
    is_open, index = False, -1
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == index + 1, events
            is_open, index = True, index + 1
        else:
            assert is_open and event["index"] == index, events
            is_open = event["type"] != "content_block_stop"
    assert not is_open


# What Anthropic's OpenAPI of November 2026 requires, of the beta API where that asks for more; but
# for the citations of a text without any: Anthropic leaves them out, and where they are null the
# AI SDK (@ai-sdk/anthropic) refuses the whole answer.
REQUIRED = {
    "message": "id type role content model stop_reason stop_sequence stop_details usage container "
               "context_management",
    "usage": "cache_creation cache_creation_input_tokens cache_read_input_tokens inference_geo "
             "input_tokens iterations output_tokens server_tool_use service_tier speed",
    "delta usage": "cache_creation_input_tokens cache_read_input_tokens input_tokens iterations "
                   "output_tokens server_tool_use",
    "message_start": "message type", "content_block_start": "content_block index type",
    "content_block_delta": "delta index type", "content_block_stop": "index type",
    "message_delta": "context_management delta type usage", "message_stop": "type",
    "delta": "container stop_details stop_reason stop_sequence",
    "text": "text type", "thinking": "signature thinking type",
    "redacted_thinking": "data type", "tool_use": "caller id input name type",
    "server_tool_use": "caller id input name type",
    "web_search_tool_result": "caller content tool_use_id type",
    "web_search_result": "encrypted_content page_age title type url",
    "web_search_result_location": "cited_text encrypted_index title type url",
    "text_delta": "text type", "thinking_delta": "thinking type",
    "input_json_delta": "partial_json type", "signature_delta": "signature type",
    "citations_delta": "citation type",
}  # fmt: skip


def check_required(node, kind):
    """Every field is there that Anthropic's OpenAPI requires of an event or a message."""
    assert set(REQUIRED[kind].split()) <= set(node), (kind, node)
    if kind == "message":
        check_required(node["usage"], "usage")
        for block in node["content"]:
            check_required(block, block["type"])
    elif kind == "message_start":
        check_required(node["message"], "message")
    elif kind == "content_block_start":
        check_required(node["content_block"], node["content_block"]["type"])
    elif kind == "content_block_delta":
        check_required(node["delta"], node["delta"]["type"])
    elif kind == "message_delta":
        check_required(node["delta"], "delta")
        check_required(node["usage"], "delta usage")
    elif kind == "citations_delta":
        check_required(node["citation"], node["citation"]["type"])
    elif kind == "web_search_tool_result":
        for found in node["content"]:
            check_required(found, found["type"])


def openai_refusal(body):
    """What OpenAI refuses in a chat completion request, in a few words; "" for what it takes."""
    known = {"model", "messages", "tools", "tool_choice", "parallel_tool_calls", "stream",
             "stream_options", "stop", "temperature", "top_p", "max_tokens",
             "max_completion_tokens", "reasoning_effort", "response_format", "prompt_cache_key"}
    if set(body) - known:
        return f"unknown parameters: {set(body) - known}"
    if {"max_tokens", "max_completion_tokens"} <= set(body):
        return "two limits"
    if "stream_options" in body and not body.get("stream"):
        return "stream_options without stream"
    if len(body.get("stop") or ()) > 4 or len(body.get("prompt_cache_key") or "") > 64:
        return "too much"
    tools = [t["function"] for t in body.get("tools") or ()]
    names = [function["name"] for function in tools]
    if "tools" in body and not 1 <= len(tools) <= 128 or len(set(names)) < len(names):
        return "tools: none, too many or one twice"
    if {"tool_choice", "parallel_tool_calls"} & set(body) and not tools:
        return "a choice without tools"
    choice = body.get("tool_choice", "auto")
    if choice not in ("auto", "none", "required") and choice["function"]["name"] not in names:
        return "a choice of no tool"
    for function in tools:
        schema = function["parameters"]
        unions = {"oneOf", "anyOf", "allOf", "enum", "not"} & set(schema)
        if schema["type"] != "object" or unions or not isinstance(schema["properties"], dict):
            return "a schema's root"
    waiting = []
    for message in body["messages"]:
        role, content, calls = message["role"], message["content"], message.get("tool_calls")
        if role == "tool":
            if message["tool_call_id"] not in waiting or not isinstance(content, str):
                return "a tool message out of its place"
            waiting.remove(message["tool_call_id"])
            continue
        if waiting:
            return "a call without its result"
        if set(message) - {"role", "content", "tool_calls"} or (calls and role != "assistant"):
            return "fields of a message"
        for made in calls or ():
            names.append(made["function"]["name"])
            if not isinstance(json.loads(made["function"]["arguments"]), dict):
                return "arguments"
        waiting = [made["id"] for made in calls or ()]
        if len(set(waiting)) < len(waiting) or any(not 1 <= len(i) <= 40 for i in waiting):
            return "ids of calls"
        if not content and not (calls and content is None):
            return "an empty message"
        for part in content if isinstance(content, list) else ():
            if role != "user" or part["type"] not in ("text", "image_url", "file"):
                return "a part"
            if part["type"] == "text" and not part["text"]:
                return "an empty part"
            url = part["image_url"]["url"] if part["type"] == "image_url" else ""
            if url and not re.match("https?://|data:image/(png|jpeg|gif|webp);base64,.", url):
                return "an image's URL"
    if waiting:
        return "a call without its result"
    if not all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", name) for name in names):
        return "a tool's name"
    return ""


def read_events(data):
    """The events in the bytes of an SSE body."""
    items = ogx.SseReader().feed(data)
    return [json.loads(item) for item in items]


class FakeUpstream:
    """A provider on a real loopback socket: answers from a queue, remembers what it saw.

    An answer is bytes (a stream), a dict (JSON), (status, dict or bytes[, headers]) or a function
    of the connection, which then writes what it likes. Every GET lists `models`, or is answered
    by them when they are (status, body), unless a word of its path is in `lists`. An empty
    request to /messages is answered as a server does that has a Messages API, or has none.

    Extend it by what a test of this file needs of a server. What real clients have to meet belongs
    to .ci/clients/scripted_upstream.py, and what is measured to .ci/bench_upstream.py.
    """

    def __init__(self, *answers, models=("gpt-x",), native=False):
        self.answers, self.models, self.native = list(answers), models, native
        self.seen, self.raw, self.heads, self.gets, self.lists = [], [], [], [], {}
        self.connections = 0
        self.client_left = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        # shutdown() wakes the accepting thread, close() alone would not
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, connection.makefile("rb") as reader, contextlib.suppress(OSError):
            while True:
                line = reader.readline().decode()
                if not line:
                    return
                head = dict(
                    h.decode().strip().lower().split(": ", 1)
                    for h in iter(reader.readline, b"\r\n")
                )
                body = reader.read(int(head.get("content-length", 0)))
                if line.startswith("GET"):
                    status, listing = 200, {"data": [{"id": m} for m in self.models]}
                    if isinstance(self.models[0], int):
                        status, listing = self.models
                    self.gets.append((line.split()[1], head))
                    for word in self.lists:
                        if word in line:
                            status, listing = self.lists[word]
                    if not isinstance(listing, bytes):
                        listing = json.dumps(listing).encode()
                    send(connection, status, listing, "application/json")
                    continue
                if body == b"{}" and line.split()[1].endswith("/messages"):
                    send(connection, 400 if self.native else 404, b"{}", "application/json")
                    continue
                self.heads.append((line.split()[1], head))
                self.raw.append(body)
                self.seen.append(json.loads(body))
                answer = self.answers.pop(0) if self.answers else said()
                if callable(answer):
                    answer(self, connection)
                    return
                self._answer(connection, answer)

    @staticmethod
    def _answer(connection, answer):
        status, headers = 200, ""
        if isinstance(answer, tuple):
            status, answer, *rest = answer
            headers = "".join(f"{k}: {v}\r\n" for k, v in (rest[0] if rest else {}).items())
        if isinstance(answer, bytes):
            kind = "text/event-stream" if status == 200 else "text/html"
        else:
            answer, kind = json.dumps(answer).encode(), "application/json"
        send(connection, status, answer, kind, headers)


def send(connection, status, body, content_type, headers=""):
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\n{headers}"
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)


ENDLESS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def begin_stream(connection):
    connection.sendall(CHUNKED)


def send_chunk(connection, data):
    connection.sendall(b"%x\r\n%b\r\n" % (len(data), data))


def await_end(fake, connection):
    """Wait for the other side to end the connection: by a reset where it had unread bytes."""
    connection.settimeout(10)
    try:
        rest = connection.recv(1)
    except ConnectionResetError:
        rest = b""
    if rest == b"":
        fake.client_left.set()


def read_until(source, mark, times=1):
    """What a socket, or an answer of http.client, brings until a mark was there so many times."""
    data, read = b"", getattr(source, "recv", None) or source.read1
    while data.count(mark) < times:
        piece = read(65536)
        assert piece, data[-300:]
        data += piece
    return data


class Client:
    """A keep-alive HTTP client of a gateway."""

    def __init__(self, server):
        self.port = server.server_port
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def ask(self, method, path, body=None, **headers):
        """(status, headers, body): a dict as JSON both ways, else bytes."""
        fields = {k.replace("_", "-"): v for k, v in headers.items()}
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        if body is not None:
            fields.setdefault("content-type", "application/json")
        self.connection.request(method, path, body, fields)
        answer = self.connection.getresponse()
        data = answer.read()
        if "json" in answer.headers.get("content-type", "") and data:
            data = json.loads(data)
        return answer.status, answer.headers, data

    def post(self, body, path="/v1/messages", **headers):
        return self.ask("POST", path, body, **headers)

    def get(self, path, **headers):
        return self.ask("GET", path, **headers)

    def begin(self, body):
        """The answer to a Messages request once its headers are there, to be read in pieces."""
        headers = {"content-type": "application/json"}
        self.connection.request("POST", "/v1/messages", json.dumps(body), headers)
        return self.connection.getresponse()

    @contextlib.contextmanager
    def sending(self, body, path="/v1/messages"):
        """A connection that a request was sent on; left at the end, whatever came."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            sock.sendall(head.encode() + data)
            yield sock

    def raw(self, data, shut=False):
        """Everything a server answers to raw bytes until it closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            sock.sendall(data)
            if shut:
                sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(65536), b""))


def native_stream(words="Hello.", usage=ogx.Usage(5, 2)):  # noqa: B008
    """A whole stream of a server that speaks Messages."""
    writer = ogx.MessageWriter(ogx.new_message("msg_native", "their/name", 5))
    writer.text(words)
    writer.finish("end_turn", None, usage)
    return b"".join(map(ogx.sse_bytes, writer.take()))


def native_message(words="Hello."):
    return ogx.message_from_events(read_events(native_stream(words)))


def config(*providers, aliases=(), tiers=None, **options):
    fields = {"retries": 0, **options}
    return ogx.Config("127.0.0.1", 0, providers, tuple(aliases), tiers or {}, **fields)


@contextlib.contextmanager
def serving(*providers, tick=ogx.TICK, discover=True, store=None, **options):
    """A client of a running gateway over the given providers."""
    gateway = ogx.Gateway(config(*providers, **options), tick=tick, store=store)
    gateway.backoff = 0.001
    server = ogx.Server(gateway, "127.0.0.1", 0)
    server.start(poll=0.01)
    if discover:
        gateway.start()
        assert gateway.discovery.done.wait(10)
    client = Client(server)
    client.gateway, client.server = gateway, server
    try:
        yield client
    finally:
        client.connection.close()
        server.stop(drain=5)


@contextlib.contextmanager
def gateway_over(*answers, kind="openai", models=("gpt-x",), native=False, **options):
    """(client, upstream): a running gateway over one fake provider."""
    with FakeUpstream(*answers, models=models, native=native) as upstream, serving(
        provider(kind, upstream.url), **options
    ) as client:
        yield client, upstream


def ask_for_token(server, token):
    server.guard = dataclasses.replace(server.guard, token=token.encode())


@contextlib.contextmanager
def translating(function):
    """Have requests for chat translated by function(usual translation, request, model)."""
    usual = ogx.DIALECTS["chat"]
    ogx.DIALECTS["chat"] = dataclasses.replace(
        usual, request=lambda *arguments: function(usual.request, *arguments))
    try:
        yield
    finally:
        ogx.DIALECTS["chat"] = usual


# Of this thread alone: others are still at work, those of the test before among them.
cpu_time = getattr(time, "thread_time", time.process_time)


def cpu(work, *args):
    began = cpu_time()
    work(*args)
    return cpu_time() - began


def check_linear(work, make, size):
    """Four times the input takes about four times the work, where squares would take sixteen; a
    busy machine gets another try."""
    for _ in range(3):
        small = min(cpu(work, make(size)) for _ in range(5))
        large = min(cpu(work, make(4 * size)) for _ in range(3))
        if large < 9 * small + 0.005:
            return
    raise AssertionError((small, large))


def until(holds, seconds=10):
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def trap_waits(monkeypatch):
    """A list of what waits from now on in a thread named "loop", which must not. Thread.start waits
    for the new thread's first step, no longer."""
    caught = []

    def trap(owner, name):
        usual = getattr(owner, name)

        def trapped(*args, **named):
            if threading.current_thread().name == "loop":
                stack = traceback.extract_stack()[:-1]
                if not any(f.name == "start" and "threading" in f.filename for f in stack):
                    caught.append(f"{name} from {stack[-1].name}")
            return usual(*args, **named)

        monkeypatch.setattr(owner, name, trapped)

    for owner, names in (
        (builtins, ["open"]), (time, ["sleep"]), (threading.Condition, ["wait"]),
        (socket.socket, ["connect"]), (socket, ["getaddrinfo", "create_connection"]),
        (subprocess.Popen, ["__init__"]), (sqlite3, ["connect"]), (os, ["open", "replace"]),
        (urllib.request, ["getproxies", "proxy_bypass"]), (threading.Thread, ["join"]),
    ):  # fmt: skip
        for name in names:
            trap(owner, name)
    return caught


@pytest.fixture(autouse=True)
def the_loop_never_blocks(request, monkeypatch):
    if getattr(request.cls, "__name__", "") not in ("TestGateway", "TestServer"):
        yield
        return
    caught = trap_waits(monkeypatch)
    yield
    assert caught == []


# ---- the file itself ------------------------------------------------------------------------


class TestTheFile:
    def test_imports_the_standard_library_alone(self):
        tree = ast.parse(SOURCE)
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        for name in {name.split(".")[0] for name in names}:
            origin = importlib.util.find_spec(name).origin or "built-in"
            stdlib = origin.startswith(sysconfig.get_path("stdlib"))
            assert (stdlib or origin in ("built-in", "frozen")) and "-packages" not in origin, name

    def test_index_banners_and_test_classes_agree(self):
        index = re.findall(r"^    ([A-Z][A-Za-z]+(?: [a-z]+)?)  +\S", ogx.__doc__, re.M)
        sections = [s for s in SECTIONS if s != IO_LINE]
        assert index == sections
        classes = [n.name for n in ast.parse(Path(__file__).read_text()).body
                   if isinstance(n, ast.ClassDef) and n.name.startswith("Test")]  # fmt: skip
        expected = ["Test" + "".join(w[0].upper() + w[1:] for w in s.split()) for s in sections]
        assert [c for c in classes if c in expected] == expected

    @pytest.mark.parametrize("name", ["TestGateway", "TestServer"])
    def test_the_map_of_this_file_is_true(self, name):
        told = re.search(rf"    {name} +((?:.+\n)(?: {{20}}.+\n)*)", __doc__)[1]
        code = Path(__file__).read_text("utf-8").split(f"\nclass {name}:")[1].split("\nclass ")[0]
        assert re.findall(r"(?m)^    # -- (.+)$", code) == re.split(r",\s+", told.strip())

    def test_these_tests_need_no_file_but_ogx_py(self, tmp_path):
        for path in (HERE / "ogx.py", Path(__file__)):
            shutil.copy(path, tmp_path)
        program = [sys.executable, "-B", "-c", "import test_ogx"]
        assert subprocess.run(program, cwd=tmp_path, capture_output=True).stderr == b""
        elsewhere = {ast.unparse(node) for node in ast.walk(ast.parse(Path(__file__).read_text()))
                     if isinstance(node, ast.BinOp) and ast.unparse(node).startswith("HERE /")}
        assert elsewhere == {"HERE / 'ogx.py'", "HERE / name"}  # the rest by repository_file()

    def test_every_case_has_a_name(self, request):
        """Of printable ASCII, 120 characters at most, and not a number's: use cases(), or ids."""
        for item in request.session.items:
            call = getattr(item, "callspec", None)
            if call and item.module is sys.modules[__name__]:
                assert re.fullmatch(r"[ -[\]-~]{1,120}", call.id), item.nodeid[:300]
                numbered = [f"{name}{number}" for name, number in call.indices.items()
                            if not isinstance(call.params[name], str)]  # fmt: skip
                assert not set(numbered) & set(call.id.split("-")), item.nodeid

    def test_sections_refer_only_upward(self):
        tree = ast.parse(SOURCE)
        banners = [i for i, line in enumerate(SOURCE.split("\n"), 1) if line.startswith("# ====")]

        def section_of(line):
            return sum(banner <= line for banner in banners)

        homes = {}
        for node in tree.body:
            names = [getattr(node, "name", None)]
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names += [n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)]
            homes.update({name: section_of(node.lineno) for name in names if name})
        downward = {
            (node.id, node.lineno)
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and homes.get(node.id, 0) > section_of(node.lineno)
        }
        assert downward == set()

    def test_nothing_above_the_line_does_io(self):
        above = SOURCE[SOURCE.index("# ======== Values") : SOURCE.index(IO_LINE)]
        tree = ast.parse(above)
        used = {n.value.id for n in ast.walk(tree)
                if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}  # fmt: skip
        assert not used & {"os", "socket", "ssl", "select", "shutil", "signal", "sys", "time"}
        assert not {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} & {"open", "print"}

    def test_the_top_level_holds_five_files(self):
        repository_file(".git")
        done = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"git lists no files: {done.stderr.strip()[:100]}")
        names = {path.split("/")[0] for path in done.stdout.split("\n") if path}
        assert {name for name in names if not name.startswith(".")} == {
            "Makefile", "README.md", "ogx.py", "starter.json", "test_ogx.py"}

    def test_the_file_keeps_its_measure(self):
        """Bytes, since lines could only get longer; and those may not, either."""
        lines = [line for line in SOURCE.splitlines() if line.strip()]
        assert len(SOURCE.encode()) <= MAX_BYTES
        assert max(map(len, lines)) <= 100 and sum(map(len, lines)) / len(lines) <= 57.5
        long = {node.name: node.end_lineno - node.lineno for node in ast.walk(ast.parse(SOURCE))
                if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 40}
        assert long == {}

    def test_no_state_belongs_to_the_module(self):
        tree = ast.parse(SOURCE)
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
        targets = [target for node in tree.body for target in (
            node.targets if isinstance(node, ast.Assign) else
            [node.target] if isinstance(node, ast.AnnAssign) else [])]  # fmt: skip
        names = {name.id for target in targets for name in ast.walk(target)
                 if isinstance(name, ast.Name)}  # fmt: skip
        assert {name for name in names if name.islower()} == {"__version__", "log"}

    def test_no_provider_is_named_below_its_section(self):
        start = SOURCE.index("# ======== Config")
        code = "\n".join(
            ast.unparse(node) for node in strip_docstrings(ast.parse(SOURCE[start:])).body
        )
        named = {k for k in ogx.PROVIDER_KINDS if re.search(rf"['\"]{re.escape(k)}['\"]", code)}
        assert named <= set(ogx.DIALECTS)  # a kind may be called by what it speaks

    def test_importing_has_no_effect(self):
        script = "import sys, logging, threading; before = set(sys.modules); import ogx; " \
                 "assert not logging.getLogger().handlers and not ogx.log.handlers; " \
                 "assert threading.active_count() == 1"  # fmt: skip
        done = subprocess.run([sys.executable, "-B", "-c", script], cwd=HERE, capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    def test_python_3_7_can_read_the_whole_file(self):
        assert self.newer_than_3_7(SOURCE) == []
        for newer in ("if (a := 1):\n    pass", "def f(a, /):\n    pass",
                      "with (\n    open('a') as a,\n):\n    pass"):  # fmt: skip
            assert self.newer_than_3_7(newer)
        assert self.newer_than_3_7("def f(a, *, b):\n    with open(a) as c, b: pass") == []

    @staticmethod
    def newer_than_3_7(source):
        """What 3.7 can't parse: what is found in the tree is no error for every later Python."""
        try:
            tree = ast.parse(source, feature_version=(3, 7))
        except SyntaxError as error:
            return [str(error)]
        found = [ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.NamedExpr)
                 or (isinstance(node, ast.arguments) and node.posonlyargs)]  # fmt: skip
        return found + re.findall(r"(?m)^ *with \($", source)

    def test_an_older_python_is_told_before_it_meets_what_it_lacks(self):
        tree = ast.parse(SOURCE)
        check = next(n for n in tree.body if isinstance(n, ast.If))
        before = [n for n in tree.body[: tree.body.index(check)] if not isinstance(n, ast.Expr)]
        assert {type(node) for node in before} == {ast.ImportFrom, ast.Import}
        froms = [node for node in before if isinstance(node, ast.ImportFrom)]
        assert [node.module for node in froms] == ["__future__"]
        line = SOURCE.split("\n")[froms[0].lineno - 1]
        assert "Python 3.9" in line  # which Python 3.6 prints with its error

    @pytest.mark.parametrize("version", ["3.6", "3.7", "3.8"])
    def test_an_older_python_says_which_one_is_needed(self, version):
        kept = map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python3"))
        found = next(kept, None) or shutil.which(f"python{version}")
        if not found or subprocess.run([found, "--version"], capture_output=True).returncode:
            pytest.skip(f"there is no Python {version} here")
        done = subprocess.run([found, "-B", str(HERE / "ogx.py"), "run"], capture_output=True)
        told = done.stderr.decode()
        assert done.returncode == 1 and done.stdout == b"" and "Python 3.9 or newer" in told
        if version != "3.6":  # which stops at the first line
            assert re.fullmatch(rf"ogx.py needs Python 3.9 or newer; this is {version}[.\d]+\s*",
                                told)  # fmt: skip

    def test_main_returns_an_int(self, capsys):
        assert ogx.main(["run", "/no/such/file.json"]) == 1
        assert ogx.main(["--no-such-flag"]) == 2
        assert ogx.main(["--version"]) == 0
        assert "Traceback" not in "".join(capsys.readouterr())

    def test_a_copy_under_another_name_works(self, tmp_path):
        copy = tmp_path / "vendored gateway.py"
        copy.write_text(SOURCE, encoding="utf-8")
        done = subprocess.run([sys.executable, str(copy), "--version"], capture_output=True,
                              text=True, cwd="/")  # fmt: skip
        assert (done.returncode, done.stdout.strip()) == (0, f"ogx.py {ogx.__version__}")

    def test_mutations_break_no_reader(self):
        """A few hundred inputs of `make fuzz`, always the same."""
        fuzz = ci_module("fuzz")
        for target in fuzz.TARGETS:
            for number in range(60):
                target(fuzz.random.Random(f"{target.__name__} {number}"))

    def test_every_expression_is_linear(self):
        """Over text of any length no expression may take the square of it; those that would get
        text that was cut, and have to be quick for that much of it."""
        module = ci_module("expressions")
        found, worst = module.expressions(), module.worst_input
        assert len(found) > 100
        slow = [(pattern, worst(method, pattern, most)) for method, pattern, most in found]
        assert not [row for row in slow if row[1]]

    @pytest.mark.parametrize("pattern", [
        r"(?m)^([a-z]+):[ \t]*([^\x01]*)\r?$", "(?s)^[^{]*|[^}]*$", "<title[^>]*>(.*?)</title>",
        "qwen3(?!.*(instruct|coder))", rb'\s*([:,"])\s*', "(/messages)?/*$"],
        ids=["field", "around", "title", "ahead", "separator", "path"])  # fmt: skip
    def test_what_is_not_linear_is_found(self, pattern):
        # A quick machine needs a longer text, a busy one another try.
        worst = ci_module("expressions").worst_input
        assert any(worst("sub", pattern, 0, size=size) for size in (6000, 9000, 12_000, 16_000))

    def test_make_alone_tells_what_there_is(self):
        makefile = repository_file("Makefile").read_text()
        phony = re.findall(r"(?m)^\.PHONY: (.+)", makefile)
        targets = {*" ".join(phony).split()} - {"help"}
        assert {*re.findall(r"(?m)^make (\S+)  ", make())} == targets

    @pytest.mark.parametrize(("args", "command"), [
        ("", "test_ogx.py"), ("-x -k one", "test_ogx.py -x -k one"),
        ("test_ogx.py::TestX::test_y -x", "test_ogx.py::TestX::test_y -x")])  # fmt: skip
    def test_make_takes_what_to_test(self, args, command):
        assert make("-n", "test", f"ARGS={args}").split() == [".ci/pytest", "python3",
                                                              *command.split()]  # fmt: skip

    def pages(self):
        """The README and the pages behind it, by name."""
        return {path: repository_file(path).read_text("utf-8") for path in (
            "README.md", *(f".docs/{name}.md" for name in (
                "CHANGES", "architecture", "configuration", "connect", "operation", "providers",
                "requests", "speed")))}  # fmt: skip

    def page(self, path):
        """A file that must be there, if this is a repository."""
        repository_file("README.md")
        return Path(os.path.dirname(__file__), path).read_text("utf-8")

    def test_the_readme_is_short(self):
        assert len(self.pages()["README.md"].split()) <= 1600

    def test_every_link_leads_somewhere(self):
        for name, text in self.pages().items():
            for target, part in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
                path = os.path.join(os.path.dirname(name), target) if target else name
                page = self.page(path)
                headings = {re.sub("[^a-z0-9 -]", "", one.lower()).replace(" ", "-")
                            for one in re.findall("(?m)^#+ (.+)$", page)}  # fmt: skip
                assert not part or part[1:] in headings, (name, target, part)

    def test_troubleshooting_quotes_what_is_printed(self):
        table = self.pages()["README.md"].partition("| it says | do |")[2].partition("\n\n")[0]
        said = re.findall(r"(?m)^\| `(.+?)` \|", table)
        printed = re.sub(r'"\s*f?"', "", SOURCE)
        assert len(said) >= 10
        for words in said:
            for part in re.split(r"OPENAI\w+|HTTPS\w+|8321|127\.0\.0\.1|\.\.\.", words):
                assert part in printed, words

    def test_the_picture_shows_the_sections(self):
        """`make docs` draws it; sizes may be a little old."""
        shown = re.findall(r'class="name"[^>]*>([^<]+)<',
                           repository_file(".docs/architecture.svg").read_text("utf-8"))
        banners = re.findall(r"(?m)^# ======== (.+?) =+$", SOURCE)
        assert shown == [name for name in banners if not name.startswith("Above")]

    def test_what_the_architecture_names_is_there(self):
        page = self.pages()[".docs/architecture.md"]
        for name in re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)`", page):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", SOURCE), name

    def test_every_command_in_the_readme_parses(self):
        lines = re.findall(r"^\s*python3? ogx\.py (.+)$", "\n".join(self.pages().values()), re.M)
        assert len(lines) >= 8
        for line in lines:
            words = shlex.split(line, comments=True)
            own = words[: words.index("--")] if "--" in words else words
            own = [w for w in own if w != "&"]
            if own[-1] not in ("--help", "-h"):
                given, rest = ogx.argument_parser().parse_known_args(own)
                assert not rest or own[0] == "connect" and not any(
                    ogx.mistyped_flag(word, given.parser) for word in rest)


def make(*args):
    """What make prints; also in a test that make runs, which hands its own arguments down."""
    repository_file("Makefile")
    if not shutil.which("make"):
        pytest.skip("there is no make here")
    environ = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "PYTHON", "ARGS")}
    return subprocess.run(["make", "-s", *args], cwd=HERE, env=environ, capture_output=True,
                          text=True, check=True).stdout  # fmt: skip


def ci_module(name):
    """A program of .ci as a module, for what it shares with these tests: fuzz.py its readers, and
    expressions.py every regular expression of ogx.py."""
    path = repository_file(f".ci/{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        spec.loader.exec_module(module)
    return module


def strip_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(
            node
        ):
            node.body[0] = ast.Pass()
    return tree


# ---- one class per section ------------------------------------------------------------------


class TestValues:
    @pytest.mark.parametrize("page", [
        lambda n: b"<html>" + b"<script>" * n, lambda n: b"<html>" + b"<title>" * n,
        lambda n: b"<html>" + b"<" * n, lambda n: b"<html><title>" + b"a " * n, lambda n: b" " * n,
        lambda n: b"x" * n], ids=["script", "title", "open", "words", "space", "letters"])
    def test_odd_pages_are_told_at_once(self, page):
        assert len(ogx.beginning(page(100_000))) <= 520
        assert min(cpu(ogx.beginning, page(500_000)) for _ in range(3)) < 0.5  # once half a minute

    @pytest.mark.parametrize("size", range(5, 40))
    def test_no_part_of_a_key_is_left_by_a_cut(self, size):
        key = "sk-proj-abc_DEF.123/+=~"
        shown = ogx.cut(f"key: {key} is wrong", size)
        assert key in shown or "sk-" not in shown
        assert ogx.cut("\u4f60\u597d" * 20, size).startswith("\u4f60\u597d" * (size // 2))

    @pytest.mark.parametrize(
        ("make", "fits"),
        [
            (lambda n: b'{"a":[' + b"[]," * n + b"1]}", False),
            (lambda n: b'{"a":"' + b"[]," * n + b'"}', True),
            (lambda n: b'{"a":"' + rb"\"," * n + b'"}', True),
            (lambda n: b"[" + b"1," * 2 * n + b"1]", False),
            (lambda n: b'{"a":"' + b"[]," * n, True),  # broken, as the parser says then
            (lambda n: b"[" * 3 * n, False),
        ],
        ids=["lists", "text", "escapes", "numbers", "open", "depth"],
    )
    def test_json_of_too_many_elements_is_not_read(self, make, fits):
        data = make(600_000)
        assert ogx.has_too_many_elements(data) is not fits
        assert ogx.has_too_many_elements(data.decode()) is not fits
        error = None if make(1).endswith(b"}") and fits else refused(ogx.parsed_json, data)
        assert error is None or error.status == (400 if fits else 413)

    def test_elements_are_counted_in_little_memory(self):
        """A group in the expression for strings kept 100 bytes for each character."""
        data = b'["' + b"a," * 1_000_001 + b'"]'
        tracemalloc.start()
        assert not ogx.has_too_many_elements(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 * len(data)

    @cases(
        ("given", "sent"),
        [
            (r'{"a":"x\ud83d"}', r'{"a":"x\ufffd"}'), (r'["\ude00"]', r'["\ufffd"]'),
            (r'["\ud83d\ud83d\ude00\ude00"]', r'["\ufffd\ud83d\ude00\ufffd"]'),
            (r'["\ud83d \ude00"]', r'["\ufffd \ufffd"]'), (r'{"\udfff":1}', r'{"\ufffd":1}'),
            (r'["\\\\\ud83d"]', r'["\\\\\ufffd"]'),
            (r'["\uD83D \uDe00 \uD83D\uDE00"]', r'["\ufffd \ufffd \uD83D\uDE00"]'),
            (r'["\\\ud83d\\ude00"]', r'["\\\ufffd\\ude00"]'),
            # what are pairs, or words about them
            (r'["\ud83d\ude00"]', None), (r'["\\ud83d"]', None),
            (r'["\\ud83d\\ude00 \\\\udfff"]', None), (r'["\u0d83 ud83d \ud7ff\ue000"]', None),
        ],
    )  # fmt: skip
    def test_half_of_a_pair_is_a_replacement_character(self, given, sent):
        made = ogx.without_halves(given.encode())
        assert made == (sent or given).encode()
        json.dumps(json.loads(made), ensure_ascii=False).encode()  # whole characters alone

    def test_half_pairs_are_replaced_in_linear_time(self):
        def seconds(text):
            begun = cpu_time()
            ogx.without_halves(text)
            return cpu_time() - begun

        for piece in (rb"\ud83d", rb"\\", rb"\\ud83d", rb"\ud83d\ude00", rb"\ud83d\\\\"):
            small, large = (min(seconds(b'"' + piece * n + b'"') for _ in range(3))
                            for n in (20_000, 160_000))  # fmt: skip
            assert large < 40 * max(small, 0.001)


class TestErrors:
    @cases(
        ("body", "words", "code"),
        [
            (b'{"error":{"message":"m","type":"t","code":"c"}}', "m", "c"),  # OpenAI
            (b'{"error":{"message":"m","type":"t","code":null}}', "m", "t"),
            (b'{"error":"Unauthorized"}', "Unauthorized", ""),  # vLLM
            (b'{"Message":"m","__type":"x#ThrottlingException"}', "m", "x#ThrottlingException"),
            (b'{"object":"error","message":"m","type":"x","code":"3280"}', "m", "3280"),  # Mistral
            (b'[{"error":{"code":400,"message":"m","status":"S"}}]', "m", "400"),  # Gemini
            (b'{"detail":"Not Found"}', "Not Found", ""),  # FastAPI
            (b'{"type":"error","error":{"type":"t","message":"m"}}', "m", "t"),  # Anthropic
            (b'{"detail":[{"loc":["body"],"msg":"x"}]}', '[{"loc": ["body"], "msg": "x"}]', ""),
            (b"404 page not found", "404 page not found", ""),  # Ollama
            (b"", "Bad Gateway", ""),
            (b"\xff\xfe", "\ufffd\ufffd", ""),
            (b'"just words"', "just words", ""),
        ],
    )
    def test_words_of_an_error_body_in_every_shape(self, body, words, code):
        refusal = ogx.refusal_from_body(502, body)
        assert (refusal.message, refusal.code) == (words, code)

    WRAPPED = (  # id, body, message, code, param
        ("a router", {"error": {"message": "Provider returned error", "code": 400, "metadata": {
            "raw": json.dumps({"error": {"message": "too long", "type": "t", "param": "p"}}),
            "provider_name": "Azure"}}}, "Azure: too long", "t", "p"),
        ("a router of text", {"error": {"message": "Provider returned error", "code": 502,
         "metadata": {"raw": "overheated", "provider_name": "X"}}}, "X: overheated", "502", ""),
        ("a router that knows nothing", {"error": {"message": "Provider returned error",
         "code": 429, "metadata": {"raw": None}}}, "Provider returned error", "429", ""),
        ("routers in a row", {"error": {"message": "upstream error", "metadata": {
            "raw": json.dumps({"error": {"message": "Provider returned error", "metadata": {
                "raw": json.dumps({"detail": "no such tool"}), "provider_name": "B"}}}),
            "provider_name": "A"}}}, "A: B: no such tool", "", ""),
        ("pydantic's list in a message", {"object": "error", "type": "invalid", "message": {
            "detail": [{"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"],
                        "msg": "Extra inputs"}]}},
         '[{"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"], '
         '"msg": "Extra inputs"}]', "extra_forbidden", "max_completion_tokens"),
        ("JSON in a message", {"message": '{"code": 7, "msg": "bad image"}'}, "bad image", "7", ""),
        ("an envelope", {"code": 500, "msg": "404 NOT_FOUND", "success": False},
         "404 NOT_FOUND", "500", ""),
        ("MiniMax", {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "no money"}},
         "no money", "1008", ""),
        ("vLLM's engine", {"choices": None, "error_type": "BadRequestError",
                           "error_message": "out of memory"}, "out of memory", "BadRequestError",
         ""),
        ("OAuth", {"error": "invalid_token", "error_description": "expired"}, "expired", "", ""),
        ("Baidu", {"error_code": 336003, "error_msg": "too many"}, "too many", "336003", ""),
        ("Java", {"errorCode": "E1", "errorMessage": "broken"}, "broken", "E1", ""),
        ("Cloudflare", {"success": False, "errors": [{"code": 7003, "message": "no route"}]},
         "no route", "7003", ""),
        ("SageMaker", {"ErrorCode": "MODEL", "OriginalMessage": "CUDA", "Message": "failed"},
         "CUDA", "MODEL", ""),
        ("Tencent", {"Response": {"Error": {"Code": "AuthFailure", "Message": "wrong key"}}},
         "wrong key", "AuthFailure", ""),
        ("a problem of RFC 9457", {"type": "about:blank", "title": "T", "status": 400,
                                   "detail": "no such field"}, "no such field", "about:blank", ""),
        ("Spring", {"status": 404, "error": "Not Found", "message": "no path"}, "no path", "404",
         ""),
        ("Google's details", {"error": {"code": 400, "message": "API key not valid", "details": [
            {"@type": "x", "reason": "API_KEY_INVALID"}]}}, "API key not valid", "400", ""),
        ("an inner error without words", {"error": {"code": "a", "message": "filtered",
         "innererror": {"code": "b"}}}, "filtered", "a", ""),
        ("words that quote JSON", {"error": {"message": 'Not a schema: {"message": "hi"}'}},
         'Not a schema: {"message": "hi"}', "", ""),
        ("words that quote a schema", {"message": 'bad: {"type": "object", "properties": {}}'},
         'bad: {"type": "object", "properties": {}}', "", ""),
        ("words with brackets", {"message": "[Errno 111] {refused}"}, "[Errno 111] {refused}", "",
         ""),
    )  # fmt: skip

    @pytest.mark.parametrize(
        ("body", "words", "code", "param"), [w[1:] for w in WRAPPED], ids=[w[0] for w in WRAPPED]
    )
    def test_the_innermost_reason_is_told(self, body, words, code, param):
        refusal = ogx.refusal_from_body(400, json.dumps(body).encode())
        assert (refusal.message, refusal.code, refusal.param) == (words, code, param)
        assert refusal.status == 400

    @pytest.mark.parametrize(
        ("status", "body", "told"),
        [
            (200, {"error": {"message": "m", "code": 503}}, 503),
            (200, {"error": {"message": "m", "code": "x", "status_code": 413}}, 413),
            (200, {"message": "m", "status": 404}, 404),
            (200, {"error": {"type": "overloaded_error", "message": "m"}}, 529),
            (200, {"error": {"type": "authentication_error", "message": "m"}}, 401),
            (200, {"error": {"type": "BadRequestError", "message": "m"}}, 400),
            (200, {"error": {"code": "insufficient_quota", "message": "m"}}, 429),
            (200, {"error": {"code": 1008, "message": "m"}}, 500),
            (200, {"detail": "m"}, 500),
            (502, {"error": {"message": "wrapped", "code": 400}}, 400),
            (500, {"error": {"message": "m", "code": 500}}, 500),
            (500, {"error": {"message": "m", "code": "1234"}}, 500),
            (503, {"error": {"message": "m", "type": "invalid_request_error"}}, 503),
            (429, {"error": {"message": "m", "code": 400}}, 429),
        ],
        ids=str,
    )
    def test_the_status_is_what_the_error_tells_where_http_doesnt(self, status, body, told):
        assert ogx.refusal_from_body(status, json.dumps(body).encode()).status == told

    def test_any_json_is_read_within_bounds(self):
        deep = {"error": {"message": "outer"}}
        for _ in range(50):
            deep = {"error": {"message": json.dumps(deep) if len(str(deep)) < 2000 else deep}}
        nested = b'{"error":' * 900 + b'"x"' + b"}" * 900
        lists = b'{"detail":[{"loc":' + b"[" * 900 + b"]" * 900 + b',"msg":"x"}]}'
        bodies = [json.dumps(deep).encode(), nested, b"[" * 900 + b"]" * 900, lists,
                  b"[" * 50_000, b'{"error":[[],{}]}', b"[[]]", b'{"error":{"message":{}}}',
                  b'{"message":5,"code":[1],"param":{"a":1},"loc":5}',
                  b'{"detail":[{"loc":[],"msg":""}]}', b'{"error":true,"metadata":[null]}',
                  b'{"error":{"metadata":{"provider_name":["x"],"raw":"m"}}}',
                  json.dumps({"error": {"message": "m" * 90_000, "code": "c" * 500}}).encode()]
        for depth in (500, *range(900, 1000)):  # around Python's limit, too
            for name in ("code", "param", "message", "provider_name", "loc", "errors"):
                odd = b'[{"loc":["x"],"msg":"m","%b":%b}]' % (name.encode(), b"[" * depth
                                                              + b"]" * depth)
                bodies += [odd, b'{"error":{"message":"m","detail":%b}}' % odd]
        for body in bodies:
            refusal = ogx.refusal_from_body(200, body)
            assert 0 < len(refusal.message) <= 2003 and len(refusal.code) <= 203
            assert 400 <= ogx.upstream_error(refusal, "o", {}).status <= 599
            assert len(refusal.param) <= 503

    @pytest.mark.parametrize("shape", [
        '{"error":{"message":"%s"}}', "%s", "<html><title>%s</title>",
        '{"error":{"message":"m","code":"%s"}}'], ids=str)
    def test_redaction_holds_wherever_words_are_cut(self, shape):
        key = "sk-secret-0123456789"
        for before in (*range(180, 205), *range(280, 305), *range(480, 505), *range(1970, 2005)):
            body = (shape % ("w " * (before // 2) + " " * (before % 2) + key + " x")).encode()
            refusal = ogx.refusal_from_body(400, body)
            error = ogx.upstream_error(refusal, "o", {}).hide([key])
            assert "sk-" not in error.message and "0123" not in error.message

    @pytest.mark.parametrize(
        ("answer", "failed"),
        [
            ({"error": {"message": "m"}}, True), ({"error": "m", "choices": []}, True),
            ({"choices": None, "msg": "m"}, True), ({"success": False, "msg": "m"}, True),
            ({"detail": "Not Found"}, True), ({"object": "error", "message": "m"}, True),
            ({"choices": [], "error": None}, False), ({"choices": None, "usage": {}}, False),
            ({"choices": [{"delta": {"content": '{"error": "x"}'}}], "success": True}, False),
            ({"choices": [], "message": "ok", "code": 0}, False),
            ({"content": [text('{"error": "x"}')], "error": None}, False),
            ({"type": "ping"}, False), ({"base_resp": {"status_code": 0, "status_msg": ""}}, False),
            ({"type": "message_start", "message": {"content": [], "role": "a"}}, False),
        ],
        ids=str,
    )  # fmt: skip
    def test_an_error_with_http_200_is_told_from_an_answer(self, answer, failed):
        assert ogx.is_failure(answer) is failed

    def test_an_html_page_becomes_its_title(self):
        page = b"<!DOCTYPE html><html><head><title>502 Bad\nGateway</title></head><body>x</body>"
        assert ogx.refusal_from_body(502, page).message == "an HTML page: 502 Bad Gateway"

    @pytest.mark.parametrize(
        ("status", "error_type"),
        [(400, "invalid_request_error"), (401, "authentication_error"), (402, "billing_error"),
         (403, "permission_error"), (404, "not_found_error"), (413, "request_too_large"),
         (422, "invalid_request_error"), (429, "rate_limit_error"), (500, "api_error"),
         (502, "api_error"), (504, "timeout_error"), (529, "overloaded_error")],
    )  # fmt: skip
    def test_each_status_has_anthropics_type(self, status, error_type):
        body = ogx.OgxError(status, "m").body("req_1")
        assert body == {
            "type": "error", "error": {"type": error_type, "message": "m"}, "request_id": "req_1",
        }  # fmt: skip

    def test_an_upstreams_words_and_status_stay_and_its_origin_is_told(self):
        error = ogx.upstream_error(ogx.Refusal(429, "slow down"), "groq, model x",
                                   {"retry-after": "7", "x-ratelimit-limit": "1"})  # fmt: skip
        assert (error.status, error.message) == (429, "slow down (from groq, model x)")
        assert error.headers == {"retry-after": "7"}

    def test_what_cannot_get_better_tells_the_client_not_to_retry(self):
        for refusal in (ogx.Refusal(401, "m"), ogx.Refusal(429, "m", "insufficient_quota")):
            error = ogx.upstream_error(refusal, "o", {})
            assert error.headers == {"x-should-retry": "false"}
        assert error.type == "billing_error"

    @pytest.mark.parametrize("status", [400, 402, 403, 429, 500])
    @pytest.mark.parametrize("words", [
        "insufficient balance (1008)",  # MiniMax
        "Insufficient balance or no resource package. Please recharge.",  # Z.ai
        "Your credit balance is too low to access the Anthropic API.",
        "Your account is suspended due to insufficient balance, please check your billing details",
        "Insufficient credits. Add more using https://openrouter.ai/settings/credits",
        "Sorry, your account balance is insufficient", "The account is in arrears",
        "Your team has used all available credits", "Not enough funds, please top up your account",
        "You are out of credits",
    ])  # fmt: skip
    def test_an_empty_account_is_told_so_whatever_the_status(self, words, status):
        error = ogx.upstream_error(ogx.Refusal(status, words), "o", {})
        assert (error.status, error.type) == (status, "billing_error")
        assert error.headers == {"x-should-retry": "false"}

    @pytest.mark.parametrize("words", [
        "insufficient permissions", "Insufficient permissions to see the account's balance",
        "insufficient capacity, please try again later", "top_p must be below 1",
        "insufficient system resource", "the load balancer is not enough awake",
        "Rate limit reached: Limit 30000, Used 29000, Requested 2000",
        "I can't parse 'You are out of credits, please recharge your account'",
    ])  # fmt: skip
    def test_what_only_sounds_like_an_empty_account_may_be_tried_again(self, words):
        error = ogx.upstream_error(ogx.Refusal(429, words), "o", {})
        assert (error.type, error.headers) == ("rate_limit_error", {})

    @pytest.mark.parametrize(("said", "words"), [
        ("Invalid value: 'please fix this long text' in 'stop'", "Invalid value: '' in 'stop' "),
        ("'max_tokens' isn't the model's limit", "'max_tokens' isn't the model's limit "),
        ('{"error": {"message": "the prompt is too long"}}',
         '{"error": {"message": "the prompt is too long"}} '),
        ('{\\"msg\\": \\"it is too long\\"}', '{\\"msg\\": \\"it is too long\\"} '),
        ('{"msg": "bad", "input": "my words are many and', '{"msg": "bad", "input": \'\' '),
    ], ids=["text", "names", "JSON", "JSON in JSON", "cut off"])  # fmt: skip
    def test_words_leave_out_what_a_refusal_quotes(self, said, words):
        assert ogx.Refusal(400, said).words.rstrip() == words.rstrip()

    def test_a_key_that_an_upstream_quotes_is_redacted(self):
        error = ogx.OgxError(401, "Incorrect API key provided: sk-secret-1234.")
        assert error.hide(["sk-secret-1234"]).message == "Incorrect API key provided: ***."

    @cases(
        ("words", "status", "error_type"),
        [  # AWS has 403 for both
            ("The security token included in the request is expired", 401, "authentication_error"),
            ("Signature expired: 20260101T000000Z is now earlier than 20260101T001000Z "
             "(20260101T001500Z - 5 min.)", 401, "authentication_error"),
            ("Signature not yet current: 20260101T001000Z is still later than 20260101T000500Z",
             401, "authentication_error"),
            ("The request signature we calculated does not match the signature you provided.",
             401, "authentication_error"),
            ("Authentication failed: Please make sure your API Key is valid.", 401,
             "authentication_error"),
            ("User: arn:aws:iam::1:user/x is not authorized to perform: bedrock:InvokeModel", 403,
             "permission_error"),
        ],
    )  # fmt: skip
    def test_wrong_credentials_are_told_from_missing_permission(self, words, status, error_type):
        error = ogx.upstream_error(ogx.Refusal(403, words), "bedrock, model x", {})
        assert (error.status, error.type) == (status, error_type)
        assert error.message == f"{words} (from bedrock, model x)"
        assert error.headers == {"x-should-retry": "false"}


    def test_an_errors_words_hold_no_control_character(self):
        body = ogx.OgxError(400, "a\x1b]0;b\x07\n\u202ec", quote="\ud800").body("r")
        assert body["error"]["message"] == "a?]0;b?\n?c?"

    FLAG, SCHEMA, TEMPLATE = "server with that flag", "a plainer schema", "another --chat-template"
    MINJA = ("Value is not callable: null at row 49, column 79:\n {%- set content = (m_content"
             ".split('</think>')|last).lstrip('\\n') %}\n ^\n at row 49, column 81")

    @cases("words, advice", [
        # llama.cpp, then older builds of it, then LM Studio, Ollama, transformers and vLLM
        ("tools param requires --jinja flag", FLAG),
        ("tool_choice param requires --jinja flag", FLAG),
        ("this custom template is not supported, try using --jinja", FLAG),
        ("Failed to initialize samplers: failed to parse grammar", SCHEMA),
        ("JSON schema conversion failed:\nUnrecognized schema: {}", SCHEMA),
        ("Jinja Exception: Only user and assistant roles are supported!", TEMPLATE),
        ("Conversation roles are odd at row 4, column 9: {{ raise_exception('x') }}", TEMPLATE),
        (MINJA, TEMPLATE),
        ("Error rendering prompt with jinja template: \"Unknown test: sequence\".\n\nThis is "
         "usually an issue with the model's prompt template.", TEMPLATE),
        ("Failed to parse Jinja template: Unexpected character: $", TEMPLATE),
        ("jinja2.exceptions.TemplateError: No user query found in messages.", TEMPLATE),
        ("Chat template error: 'dict object' has no attribute 'name'", TEMPLATE),
        ("Invalid grammar request: xgrammar could not compile it", SCHEMA),
    ])
    def test_what_a_500_says_for_good_is_a_400_with_what_helps(self, words, advice):
        body = json.dumps({"error": {"code": 500, "message": words, "type": "server_error"}})
        error = ogx.upstream_error(ogx.refusal_from_body(500, body.encode()), "p, model m", {})
        assert (error.status, error.type) == (400, "invalid_request_error")
        assert error.message.startswith(f"{words} (from p, model m); ") and advice in error.message
        assert error.headers["x-should-retry"] == "false"

    @cases("status, words", [
        (500, "Internal server error"), (500, "model runner has unexpectedly stopped"),
        (500, "The grammar backend timed out, try again"), (500, "chat template is loading"),
        (500, "out of memory while compiling the grammar"), (500, "requires a retry -- sorry"),
        (500, "The email's schema is unknown"), (500, "got exception: slot unavailable"),
        (500, "could not decode '{\"text\": \"fix the grammar of my chat template\"}' now"),
        (503, "Loading model"), (502, "tools param requires --jinja flag"),
        (429, "grammar quota"), (529, "jinja workers overloaded")])
    def test_what_may_pass_keeps_its_status(self, status, words):
        error = ogx.upstream_error(ogx.Refusal(status, words), "p", {})
        assert (error.status, error.message) == (status, f"{words} (from p)")

    def test_a_failure_told_in_a_stream_may_be_for_good_too(self):
        body = b'{"error": {"message": "Error rendering prompt with jinja template: x"}}'
        assert ogx.upstream_error(ogx.refusal_from_body(200, body), "p", {}).status == 400


class TestChecks:
    @pytest.mark.parametrize(
        ("body", "status", "words"),
        [(b"", 400, "the request has no body; expected a JSON object"),
         (b"{", 400, "the request's body is not JSON: Expecting property name"),
         (b'"\xff"', 400, "the request's body is not UTF-8"),
         (b"[NaN]", 400, "NaN is no number of JSON"), (b"1e999", 400, "1e999 is no number"),
         (b"[" * 1_000_001, 413, "has more than 1,000,000 elements")],
        ids=["nothing", "open", "bytes", "NaN", "infinite", "elements"],
    )  # fmt: skip
    def test_a_body_that_is_no_json_says_why(self, body, status, words):
        error = refused(ogx.parsed_json, body)
        assert error.status == status and words in error.message

    def test_a_byte_order_mark_is_no_part_of_a_body(self):
        assert ogx.parsed_json(b'\xef\xbb\xbf{"a": 1.5}') == {"a": 1.5}

    def test_a_wrong_value_is_shown_unless_it_may_hold_a_key(self):
        for value, shown in ((5, "5"), ("x" * 99, '"' + "x" * 79), ([], "[]"),
                             (["k"], "something else"), ({"a": "k"}, "something else")):
            assert ogx.wrong_value("f: a", "b", value).message == f"f: a: expected b, got {shown}"
        assert ogx.wrong_value("f: p.api_key", "b", 5).message.endswith("got something else")

    @pytest.mark.parametrize(
        ("node", "types", "required", "words"),
        [
            ({"a": "x"}, {"a": str}, True, None), ({"a": None}, {"a": str}, False, None),
            ({}, {"a": str}, False, None), ({"a": 1}, {"a": (int, float)}, True, None),
            ({"a": "x"}, {"a": ("x", "y")}, True, None),
            ({}, {"a": str}, True, "n.a: field required"),
            ({"a": None}, {"a": str}, True, "n.a: field required"),
            ({"a": True}, {"a": int}, True, "n.a: expected a whole number, got true or false"),
            ({"a": "z"}, {"a": ("x", "y")}, False, 'n.a: expected one of x, y, got "z"'),
            (["a"], {"a": str}, True, "n: expected an object, got a list"),
        ],
        ids=str,
    )  # fmt: skip
    def test_fields_are_of_a_type_or_among_words(self, node, types, required, words):
        if words is None:
            ogx.expect(node, "n", types, required)
        else:
            assert refused(ogx.expect, node, "n", types, required).message == words

    @cases("value", [-1, 65536, "", "x", " 80", 80.0, None, True])
    def test_what_is_no_port_is_told(self, value):
        error = refused(ogx.port_number, value, "p")
        assert error.message == f"p: expected a port from 0 to 65535, got {json.dumps(value)}"
        assert [ogx.port_number(port, "p") for port in (0, "0", 65535, "8321")] == [
            0, 0, 65535, 8321]  # fmt: skip

    @cases("url", [
        "", "h", "h:1", "ftp://h", "http://", "http://h:0", "http://h:65536", "http://h:x",
        "http://[::1", "http://a b", "http://h/\u00e9", "http://h\n", "http://h/?a", "http://h#a"])
    def test_what_is_no_url_of_a_server_has_no_parts(self, url):
        assert ogx.url_parts(url) is None

    def test_a_url_may_have_a_user_a_port_and_a_path(self):
        parts = ogx.url_parts("https://me:pw@[::1]:8000/v1/")
        assert (parts.username, parts.hostname, parts.port, parts.path) == (
            "me", "::1", 8000, "/v1/")  # fmt: skip


class TestProviders:
    @cases("host, local", [
        ("127.0.0.1:8080", True), ("192.168.1.5:11434", True), ("169.254.1.1", True),
        ("[::1]:8080", True), ("gpu-box:8000", True), ("gpu.local:1", True),
        ("api.openai.com", False), ("8.8.8.8", False), ("[2001:4860:4860::8888]", False),
        ("notlocal.example", False), ("10.0.0.1.example.com", False)])
    def test_a_local_server_is_told_by_its_host(self, host, local):
        assert provider("vllm", f"http://{host}").is_local is local

    def test_rows_are_complete(self):
        for kind in ogx.PROVIDER_KINDS.values():
            variables = kind.url_vars if kind.enabled_by == "url" else kind.key_vars
            assert set(kind.dialects) <= set(ogx.DIALECTS), kind.name
            assert variables or (not kind.base_url and not kind.key_vars)
            assert bool(kind.local_port) == all(kind.identity)

    @pytest.mark.parametrize(
        ("variable", "value", "provider_id", "base_url"),
        [
            ("OPENAI_API_KEY", "sk-1", "openai", "https://api.openai.com/v1"),
            ("VLLM_URL", "http://localhost:8000/v1", "vllm", "http://localhost:8000/v1"),
            ("VLLM_URL", "http://localhost:8000", "vllm", "http://localhost:8000/v1"),
            ("VLLM_URL", "gpu-box:8000", "vllm", "http://gpu-box:8000/v1"),
            ("OLLAMA_URL", "http://localhost:11434/", "ollama", "http://localhost:11434/v1"),
            ("FIREWORKS_API_KEY", "k", "fireworks", "https://api.fireworks.ai/inference/v1"),
            ("TOGETHER_API_KEY", "k", "together", "https://api.together.ai/v1"),
            ("GROQ_API_KEY", "k", "groq", "https://api.groq.com/openai/v1"),
            *((variable, "k", "bedrock", "https://bedrock-mantle..api.aws/v1") for variable in (
                "AWS_BEARER_TOKEN_BEDROCK", "AWS_BEDROCK_BEARER_TOKEN", "AWS_ACCESS_KEY_ID",
                "AWS_PROFILE")),  # the region is missing, which is told when it is needed
            ("GEMINI_API_KEY", "k", "gemini",
             "https://generativelanguage.googleapis.com/v1beta/openai"),
            ("GEMINI_ACCESS_TOKEN", "k", "gemini",
             "https://generativelanguage.googleapis.com/v1beta/openai"),
            ("MISTRAL_API_KEY", "k", "mistral", "https://api.mistral.ai/v1"),
            ("DEEPSEEK_API_KEY", "k", "deepseek", "https://api.deepseek.com"),
            ("OPENROUTER_API_KEY", "k", "openrouter", "https://openrouter.ai/api/v1"),
            ("ANTHROPIC_API_KEY", "k", "anthropic", "https://api.anthropic.com/v1"),
            ("MOONSHOT_API_KEY", "k", "moonshot", "https://api.moonshot.ai/v1"),
            ("CEREBRAS_API_KEY", "k", "cerebras", "https://api.cerebras.ai/v1"),
            ("XAI_API_KEY", "k", "xai", "https://api.x.ai/v1"),
            ("NVIDIA_API_KEY", "k", "nvidia", "https://integrate.api.nvidia.com/v1"),
            ("SAMBANOVA_API_KEY", "k", "sambanova", "https://api.sambanova.ai/v1"),
            ("ZAI_API_KEY", "k", "zai", "https://api.z.ai/api/paas/v4"),
            ("MINIMAX_API_KEY", "k", "minimax", "https://api.minimax.io/v1"),
            ("LM_STUDIO_URL", "localhost:1234", "lm-studio", "http://localhost:1234/v1"),
            ("LLAMA_CPP_URL", "http://h:8080", "llama-cpp", "http://h:8080/v1"),
            ("SGLANG_URL", "http://h:30000", "sglang", "http://h:30000/v1"),
            ("AZURE_OPENAI_ENDPOINT", "https://me.openai.azure.com", "azure",
             "https://me.openai.azure.com/openai/v1"),
            ("AZURE_API_BASE", "https://me.openai.azure.com/openai/v1/", "azure",
             "https://me.openai.azure.com/openai/v1"),
        ],
    )  # fmt: skip
    def test_a_variable_the_user_has_switches_its_provider_on(
        self, variable, value, provider_id, base_url
    ):
        built = ogx.config_from_json(ogx.starter_config(), "starter", {variable: value})
        assert [(p.id, p.base_url) for p in built.providers] == [(provider_id, base_url)]

    @pytest.mark.parametrize(
        ("variable", "value", "base_url"),
        [
            ("GROQ_BASE_URL", "https://api.groq.com", "https://api.groq.com/openai/v1"),
            ("GROQ_BASE_URL", "https://eu.test/openai/v1/", "https://eu.test/openai/v1"),
            ("AWS_REGION", "eu-west-1", "https://bedrock-mantle.eu-west-1.api.aws/v1"),
            ("AWS_DEFAULT_REGION", "eu-west-1", "https://bedrock-mantle.eu-west-1.api.aws/v1"),
        ],
    )  # fmt: skip
    def test_vendors_own_variables_change_the_url(self, variable, value, base_url):
        environ = {variable: value, "GROQ_API_KEY": "k", "AWS_BEARER_TOKEN_BEDROCK": "k"}
        built = ogx.config_from_json(ogx.starter_config(), "starter", environ)
        assert base_url in [p.base_url for p in built.providers]

    def test_awss_variables_which_have_other_uses_make_no_first_provider(self):
        environ = {"AWS_PROFILE": "work", "GEMINI_API_KEY": "k", "XAI_API_KEY": "k"}
        built = ogx.config_from_json(ogx.starter_config(), "starter", environ)
        assert [p.id for p in built.providers] == ["gemini", "xai", "bedrock"]

    def test_anthropic_base_url_is_never_an_upstream(self):
        environ = {"ANTHROPIC_API_KEY": "k", "ANTHROPIC_BASE_URL": "http://localhost:8321"}
        (built,) = ogx.config_from_json(ogx.starter_config(), "starter", environ).providers
        assert built.base_url == "https://api.anthropic.com/v1"

    @pytest.mark.parametrize(
        ("kind", "base_url", "url"),
        [  # where each native server has its Messages API
            ("vllm", "http://h:8000/v1", "http://h:8000/v1/messages"),
            ("ollama", "http://h:11434/v1", "http://h:11434/v1/messages"),
            ("anthropic", "", "https://api.anthropic.com/v1/messages"),
            ("fireworks", "", "https://api.fireworks.ai/inference/v1/messages"),
            ("openrouter", "", "https://openrouter.ai/api/v1/messages"),
            ("deepseek", "", "https://api.deepseek.com/anthropic/v1/messages"),
            ("moonshot", "", "https://api.moonshot.ai/anthropic/v1/messages"),
            ("zai", "", "https://api.z.ai/api/anthropic/v1/messages"),
            ("minimax", "", "https://api.minimax.io/anthropic/v1/messages"),
        ],
    )  # fmt: skip
    def test_where_the_messages_api_is(self, kind, base_url, url):
        row = ogx.PROVIDER_KINDS[kind]
        owner = ogx.Provider("x", row, base_url or row.base_url)
        assert owner.url(ogx.request_path("messages", row)) == url

    @pytest.mark.parametrize(
        ("upstream_id", "url"),
        [
            ("anthropic.claude-opus-5", "https://bedrock-mantle.eu-west-1.api.aws/v1"),
            ("openai.gpt-oss-120b", "https://bedrock-mantle.eu-west-1.api.aws/v1"),
            ("zai.glm-4.7", "https://bedrock-mantle.eu-west-1.api.aws/v1"),
            *((upstream_id, "https://bedrock-runtime.eu-west-1.amazonaws.com/openai/v1")
              for upstream_id in (
                  "us.anthropic.claude-opus-5", "eu.anthropic.claude-opus-5",
                  "global.anthropic.claude-opus-5", "us-gov.anthropic.claude-opus-5",
                  "anthropic.claude-3-haiku-20240307-v1:0", "openai.gpt-oss-120b-1:0",
                  "arn:aws:bedrock:us-east-1:1:application-inference-profile/abc")),
            ("~/inference-profiles?x=1", "https://bedrock.eu-west-1.amazonaws.com"),
        ],
    )  # fmt: skip
    def test_bedrock_has_three_servers(self, upstream_id, url):
        owner = provider("bedrock", "https://bedrock-mantle.eu-west-1.api.aws/v1")
        assert owner.for_id_or_path(upstream_id).base_url == url
        moved = owner.for_id_or_path(upstream_id)
        assert dataclasses.replace(moved, base_url=owner.base_url) == owner

    def test_a_server_of_the_users_own_has_all_models(self):
        owner = provider("bedrock", "http://gateway.test/v1")
        assert owner.for_id_or_path("us.anthropic.claude-opus-5") == owner

    def test_any_other_server_by_its_url(self):
        for kind, dialects in (("openai-compatible", ("chat",)), ("messages", ("messages",))):
            entry = {"provider_id": "mine", "provider_type": f"remote::{kind}",
                     "config": {"base_url": "http://h:1"}}  # fmt: skip
            tree = {"providers": {"inference": [entry]}}
            (built,) = ogx.config_from_json(tree, "f", {}).providers
            assert (built.base_url, built.kind.dialects) == ("http://h:1/v1", dialects)

    def test_a_key_is_never_shown(self):
        assert "sk-secret" not in repr(provider())


class TestConfig:
    def build(self, environ=None, **tree):
        return ogx.config_from_json(tree, "my.json", environ or {})

    def test_starter_json_holds_the_built_in_default(self):
        on_disk = json.loads(repository_file("starter.json").read_text("utf-8"))
        assert on_disk == ogx.starter_config()

    def test_the_starter_without_variables_has_no_provider(self):
        built = ogx.config_from_json(ogx.starter_config(), "starter", {})
        assert (built.providers, built.host, built.port) == ((), "127.0.0.1", 8321)
        assert len(built.aliases) == 3

    @cases(
        ("template", "environ", "value"),
        [
            ("${env.A:=d}", {}, "d"),
            ("${env.A:=d}", {"A": ""}, "d"),
            ("${env.A:=d}", {"A": "x"}, "x"),
            ("${env.A:=}", {}, ""),
            ("${env.A:+v}", {}, ""),
            ("${env.A:+v}", {"A": "x"}, "v"),
            ("a-${env.A}-b", {"A": "x"}, "a-x-b"),
            ("${env.A|B:=d}", {"B": "y"}, "y"),
            ("${env.A:=x${env.B:=d}}", {}, "xd"),
            ("${env.A:=http://h:1/v1}", {}, "http://h:1/v1"),
        ],
    )
    def test_environment_references(self, template, environ, value):
        assert ogx.expanded({"k": [template]}, environ, "f") == {"k": [value]}

    def test_a_reference_without_default_must_be_set(self):
        assert refused(ogx.expanded, {"k": ["${env.NOPE}"]}, {}, "f").message == (
            "f: k[0]: the environment variable NOPE is not set"
        )

    @pytest.mark.parametrize("settings", [
        {"api_key": ["sk-secret"]}, {"api_key": {"a": "sk-secret"}}, {"api_key": 123456789},
        {"headers": {"x": ["sk-secret"]}}, {"headers": ["sk-secret"]}, {"api_key": "sk-secret x"},
        {"base_url": ["http://u:sk-secret@h"]}, {"key_header": ["sk-secret"]}], ids=str)
    def test_no_mistake_shows_a_key(self, settings):
        entry = {"provider_id": "a", "provider_type": "remote::openai", "config": settings}
        tree = {"providers": {"inference": [entry]}}
        told = refused(ogx.config_from_json, tree, "my.json", {}).message
        assert "secret" not in told and "123456" not in told
        assert told.startswith("my.json: providers.inference[0].config.")

    @cases(
        ("tree", "words"),
        [
            ([], "my.json: expected an object, got []"),
            ({"provider": {}}, "my.json: provider: unknown key, expected version"),
            ({"providers": []}, "my.json: providers: expected an object, got []"),
            ({"providers": {"inference": {}}},
             "my.json: providers.inference: expected a list, got {}"),
            ({"providers": {"inference": [{"provider_id": 5}]}},
             "my.json: providers.inference[0].provider_id: expected a string, got 5"),
            ({"providers": {"inference": [{"provider_id": "a", "provider_type": "remote::x"}]}},
             "my.json: providers.inference[0].provider_type: expected one of remote::"),
            ({"providers": {"inference": [{"provider_id": "a", "provider_type": "remote::vllm"}]}},
             "my.json: providers.inference[0].config.base_url: expected a URL like"),
            ({"providers": {"inference": [{"provider_id": "a", "provider_type": "remote::openai",
                                           "config": {"base_url": "ftp://x"}}]}},
             'config.base_url: expected a URL like http://localhost:8000/v1, got "ftp://x"'),
            ({"providers": {"inference": [{"provider_id": "a", "provider_type": "remote::openai",
                                           "config": {"api_key": "a\nb"}}]}},
             "config.api_key: expected a key of printable ASCII"),
            ({"registered_resources": {"models": [{"model_id": "m", "provider_id": "nope"}]}},
             "models[0].provider_id: expected a configured provider (all), got \"nope\""),
            ({"registered_resources": {"models": [{"model_id": "m", "model_type": "embedding"}]}},
             'models[0].model_type: expected "llm"'),
            ({"providers": {"inference": [{"provider_id": "a", "provider_type": "remote::openai",
                                           "config": {"dialect": "latin"}}]}},
             'dialect: expected "auto", "messages", "chat" or "responses", got "latin"'),
            ({"providers": {"inference": [{"provider_id": "a", "provider_type": "remote::openai",
                                           "config": {"verify": "maybe"}}]}},
             "config.verify: expected true or false"),
            ({"server": {"port": 70000}},
             "my.json: server.port: expected a port from 0 to 65535, got 70000"),
            ({"server": {"retries": -1}}, "server.retries: expected a number from 0 to 999999 ("),
            ({"server": {"max_body": 33554432}}, "(run --help tells its unit), got 33554432"),
            ({"server": {"discover_local": 3}}, "server.discover_local: expected true or false"),
            ({"server": {"host_names": ["gpu"]}}, "server.host_names: expected a string, got"),
        ],
    )  # fmt: skip
    def test_a_mistake_names_the_file_the_path_and_what_was_expected(self, tree, words):
        error = refused(ogx.config_from_json, tree, "my.json", {})
        assert words in error.message

    def provider(self, environ=None, kind="openai-compatible", **settings):
        """The provider of a file with these settings."""
        settings = {"base_url": "http://h:1/v1", **settings}
        entry = {"provider_id": "p", "provider_type": f"remote::{kind}", "config": settings}
        return self.build(environ, providers={"inference": [entry]}).providers[0]

    def started(self, **environ):
        """The only provider that variables switch on."""
        (built,) = ogx.config_from_json(ogx.starter_config(), "starter", environ).providers
        return built

    @cases("key", ["k-1\r", "k-1\r\n", "\n k-1\t", ' "k-1"\n', "'k-1'"])
    def test_what_files_and_shells_leave_around_a_key_is_no_part_of_it(self, key):
        assert self.provider(api_key=key).api_key == "k-1"
        assert self.started(OPENAI_API_KEY=key).api_key == "k-1"

    @cases("key", ["k 1", "k\n1", "k\u20111", "k\x001", "\u201ck-1\u201d"])
    def test_what_stands_inside_a_key_is_a_mistake_of_its_variable(self, key):
        error = refused(self.started, OPENAI_API_KEY=key)
        assert error.message == "OPENAI_API_KEY: expected a key of printable ASCII without spaces"

    @cases(
        "url", ["http://h:1/v1 ", '"http://h:1/v1"', " 'http://h:1'\r\n", "h:1", "h:1/v1/"]
    )
    def test_what_is_around_a_url_is_no_part_of_it(self, url):
        assert self.provider(base_url=url).base_url == "http://h:1/v1"
        assert self.started(OPENAI_API_KEY="k", OPENAI_BASE_URL=url).base_url == "http://h:1/v1"

    @pytest.mark.parametrize(
        "url", ["ftp://h", "api.test/v1", "http://a b/v1", "http://h:99999", "http://", "http://[x"]
    )
    def test_a_wrong_url_is_told_with_its_variable(self, url):
        error = refused(self.started, OPENAI_API_KEY="k", OPENAI_BASE_URL=url)
        assert error.message == ("OPENAI_BASE_URL: expected a URL like http://localhost:8000/v1, "
                                 f"got {json.dumps(url)}")  # fmt: skip

    @cases(
        ("settings", "environ", "place"),
        [
            ({"base_url": "${env.HERE|THERE}"}, {"THERE": "ftp://h"}, "THERE"),
            ({"base_url": "https://${env.REGION:=eu}.test"}, {"REGION": "a b"}, "REGION"),
            ({"verify": "${env.CHECK:=true}"}, {"CHECK": "maybe"}, "CHECK"),
            ({"dialect": "${env.SPEAK}"}, {"SPEAK": "latin"}, "SPEAK"),
            ({"headers": {"x-a": "${env.A}"}}, {"A": "a\u00e9"}, "A"),
            # Near misses: nothing of these came from a variable.
            ({"base_url": "ftp://h"}, {"B": "ftp://h"},
             "my.json: providers.inference[0].config.base_url"),
            ({"dialect": "${env.SPEAK:=latin}"}, {},
             "my.json: providers.inference[0].config.dialect"),
            ({"verify": "${env.CHECK:+maybe}"}, {"CHECK": "1"},
             "my.json: providers.inference[0].config.verify"),
        ],
    )  # fmt: skip
    def test_a_wrong_value_is_told_where_the_user_wrote_it(self, settings, environ, place):
        error = refused(self.provider, environ, **settings)
        assert error.message.startswith(f"{place}: expected ")

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("https://me.openai.azure.com/openai/v1?api-version=2024&code=s3cret",
             "https://me.openai.azure.com/openai/v1"),
            ("https://h/v1?key=s3cret", "https://h/v1"),
            ("https://portal.test/#/resource/s3cret", "https://portal.test/"),
            ("http://me:s3cret@h/v1?x=1", "***@h/v1"),
        ],
    )  # fmt: skip
    def test_a_portals_url_is_told_what_is_wrong_with_it(self, url, shown):
        error = refused(self.started, OPENAI_API_KEY="k", OPENAI_BASE_URL=url)
        assert error.message == ("OPENAI_BASE_URL: expected a URL that ends before ? and #, "
                                 f"got {json.dumps(shown)}")  # fmt: skip

    @cases(
        ("user", "sent", "secrets"),
        [
            ("me:sesame-open", "me:sesame-open", {"sesame-open"}),
            ("me:p%40ss%2Fword", "me:p@ss/word", {"p%40ss%2Fword", "p@ss/word"}),
            ("token-alone", "token-alone:", set()),
            (":password", ":password", {"password"}),
        ],
    )
    def test_a_user_in_the_url_is_sent_as_basic_and_never_shown(self, user, sent, secrets):
        built = self.started(LLAMA_CPP_URL=f"http://{user}@h:8080")
        basic = base64.b64encode(sent.encode()).decode()
        assert built.base_url == "http://h:8080/v1"
        assert built.headers["authorization"] == f"Basic {basic}"
        assert {*secrets, basic} <= set(ogx.Upstream().secrets(built))
        assert not [s for s in (*secrets, basic) if s in repr(built) + built.pool_key]

    def test_a_user_goes_before_a_key_of_the_same_header(self):
        assert self.provider(base_url="h:1", api_key="k").headers["authorization"] == "Bearer k"
        built = self.provider(base_url="me:pw@h:1", api_key="k")
        assert built.headers["authorization"] == "Basic bWU6cHc="
        built = self.provider(base_url="me:pw@h:1", api_key="k", key_header="X-Key")
        assert built.headers["authorization"] == "Basic bWU6cHc=" and built.headers["x-key"] == "k"

    @cases(
        "url", ["ftp://me:s3cret@h", "http://me:s3#cret@h", "http://me:s3/cret@h", "me:s3cret@h",
                "http://me:s3cret@h:x/v1", "http://me:s3cr\u00e9t@h", "http://me:s3 cret@h"]
    )  # fmt: skip
    @pytest.mark.needs_threads
    def test_a_password_in_a_wrong_url_is_not_quoted(self, url, capsys, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        assert ogx.main(["run"]) == 1
        told = capsys.readouterr().err
        assert told.startswith("OPENAI_BASE_URL: expected a URL ") and "s3" not in told

    def test_headers_of_the_users_own_go_with_every_request(self):
        headers = {"Ocp-Apim-Subscription-Key": "${env.SUB}\r\n", "User-Agent": "Agent/1",
                   "X-None": "${env.NONE:=}"}  # fmt: skip
        built = self.provider({"SUB": "tenant-12345"}, api_key="k", headers=headers)
        assert built.headers == {
            "user-agent": "Agent/1", "accept": "application/json, text/event-stream",
            "accept-encoding": "identity", "authorization": "Bearer k",
            "ocp-apim-subscription-key": "tenant-12345",
        }  # fmt: skip
        assert "tenant-12345" in ogx.Upstream().secrets(built)
        assert "tenant-12345" not in repr(built)
        told = ogx.OgxError(401, "no tenant-12345").hide(ogx.Upstream().secrets(built))
        assert told.message == "no ***"

    @cases(
        ("kind", "settings", "sent"),
        [
            ("openai", {}, {"authorization": "Bearer k"}),
            ("azure", {}, {"api-key": "k"}),
            ("messages", {}, {"authorization": "Bearer k", "x-api-key": "k"}),
            ("openai", {"key_header": "X-Api-Key"}, {"x-api-key": "k"}),
            ("messages", {"key_header": "Authorization"}, {"authorization": "k"}),
            ("messages", {"key_header": "${env.NO:=}"},
             {"authorization": "Bearer k", "x-api-key": "k"}),
            ("openai", {"headers": {"Authorization": "Token t"}}, {"authorization": "Token t"}),
        ],
    )  # fmt: skip
    def test_the_header_that_carries_the_key(self, kind, settings, sent):
        headers = self.provider(kind=kind, api_key="k", **settings).headers
        names = ("authorization", "api-key", "x-api-key")
        assert {name: headers[name] for name in names if name in headers} == sent
        without = self.provider(kind=kind, **{**settings, "headers": {}}).headers
        assert not set(without) & set(names)

    @cases(
        ("settings", "place"),
        [
            ({"headers": {"x y": "a"}}, "headers.x y"),
            ({"headers": {"x": "a\r\nhost: b"}}, "headers.x"),
            ({"headers": {"x\n": "a"}}, "headers.x?"),
            ({"headers": {"x:": "a"}}, "headers.x:"),
            ({"headers": {"": "a"}}, "headers."),
            ({"headers": {"x": "\u20ac"}}, "headers.x"),
            ({"headers": {"Content-Length": "0"}}, "headers.Content-Length"),
            ({"headers": {"transfer-encoding": "chunked"}}, "headers.transfer-encoding"),
            ({"headers": {"Host": "h"}}, "headers.Host"),
            ({"key_header": "x key", "api_key": "s3cret"}, "key_header"),
            ({"key_header": "Connection", "api_key": "s3cret"}, "key_header"),
        ],
    )
    def test_a_header_that_cannot_be_is_refused_with_its_place(self, settings, place):
        error = refused(self.provider, **settings)
        assert error.message == (
            f"my.json: providers.inference[0].config.{place}: expected a header of printable "
            "ASCII that doesn't frame the request"
        )

    @pytest.mark.parametrize("name", ["hostname", "x-host", "connection-id", "contents"])
    def test_headers_that_only_look_like_framing_are_sent(self, name):
        assert self.provider(headers={name: "a"}).headers[name] == "a"

    def test_headers_are_an_object_of_strings(self):
        assert "headers: expected an object" in refused(self.provider, headers=["a"]).message
        error = refused(self.provider, headers={"x": 5})
        assert "headers.x: expected a string, got 5" in error.message

    def test_a_key_is_not_quoted_by_the_complaint_about_it(self):
        entry = {"provider_id": "a", "provider_type": "remote::openai",
                 "config": {"api_key": "sk-secret 1"}}  # fmt: skip
        error = refused(self.build, providers={"inference": [entry]})
        assert "sk-secret" not in error.message

    @cases("provider_id", ["", None, "${env.UNSET:+mine}"])
    def test_an_entry_without_an_id_is_off_whatever_it_holds(self, provider_id):
        entry = {"provider_id": provider_id, "provider_type": "remote::odd",
                 "config": {"verify": "maybe"}}  # fmt: skip
        assert self.build(providers={"inference": [entry]}).providers == ()

    @cases("entry", [{"model_id": ""}, {"model_id": " a"}, {"model_id": "a\n"},
                     {"model_id": "a" * 257}, {}])  # fmt: skip
    def test_a_models_id_that_nobody_can_ask_for_is_a_mistake(self, entry):
        error = refused(self.build, registered_resources={"models": [entry]})
        assert error.message.startswith(
            "my.json: registered_resources.models[0].model_id: expected 1 to 256 characters")

    def test_other_parts_of_an_ogx_file_are_passed_over(self):
        built = self.build(providers={"safety": [5]}, registered_resources={"shields": "x"},
                           version="2", distro_name=None)  # fmt: skip
        assert (built.providers, built.aliases) == ((), ())

    def test_two_servers_of_one_kind(self):
        entries = [{"provider_id": f"gpu{i}", "provider_type": "remote::vllm",
                    "config": {"base_url": f"http://gpu{i}:8000/v1"}} for i in (1, 2)]  # fmt: skip
        built = self.build(providers={"inference": entries})
        assert [p.id for p in built.providers] == ["gpu1", "gpu2"]
        error = refused(self.build, providers={"inference": [entries[0], entries[0]]})
        assert "two providers have the provider_id 'gpu1'" in error.message

    def test_thinking_is_shown_unless_it_is_switched_off(self):
        assert self.build().show_thinking is True
        assert self.build(server={"show_thinking": "false"}).show_thinking is False

    def test_failed_requests_are_retried_as_the_readme_promises(self):
        built = self.build()
        assert (built.retries, built.retry_seconds) == (3, 5)
        assert built == ogx.Config("127.0.0.1", 8321, (), (), built.tiers)
        built = self.build(server={"retries": 0, "retry_seconds": 0.5})
        assert (built.retries, built.retry_seconds) == (0, 0.5)

    def test_ogx_port_goes_before_the_config(self):
        assert self.build({"OGX_PORT": "9000"}, server={"port": 9001}).port == 9000
        assert self.build({"OGX_PORT": ""}, server={"port": "9001"}).port == 9001
        error = refused(self.build, {"OGX_PORT": "x"})
        assert error.message == 'OGX_PORT: expected a port from 0 to 65535, got "x"'

    def test_host_names_are_compared_in_lower_case(self):
        built = self.build(server={"host_names": "GPU.lan, proxy.lan"})
        assert built.host_names == ("gpu.lan", "proxy.lan")

    def test_every_limit_has_a_key_and_a_variable_that_goes_before_it(self):
        for name, default in dataclasses.asdict(ogx.Limits()).items():
            built = self.build(server={name: 7})
            assert built.limits == dataclasses.replace(ogx.Limits(), **{name: 7})
            built = self.build({f"OGX_{name.upper()}": "0.5"}, server={name: 7})
            assert built.limits == dataclasses.replace(ogx.Limits(), **{name: 0.5})
            assert self.build({f"OGX_{name.upper()}": ""}).limits == ogx.Limits()
            assert default > 0
        built = self.build({"T": "4"}, server={"idle_timeout": "${env.T:=5}"})
        assert built.limits.idle_timeout == 4
        error = refused(self.build, {"OGX_IDLE_TIMEOUT": "soon"})
        assert error.message == (
            "environment: OGX_IDLE_TIMEOUT: expected a number from 0 to 999999 "
            '(run --help tells its unit), got "soon"'
        )

    @cases("mark", [b"", b"\xef\xbb\xbf"])
    def test_a_file_may_begin_with_a_byte_order_mark(self, tmp_path, mark):
        file = tmp_path / "my.json"
        file.write_bytes(mark + b'{"server": {"port": 9000}}')
        assert ogx.config_from_name(str(file), {}).port == 9000

    @pytest.mark.needs_threads
    def test_a_file_that_cannot_be_read_or_parsed_is_named(self, tmp_path, capsys):
        broken = tmp_path / "broken.json"
        broken.write_text('{"providers": ')
        assert ogx.main(["run", str(broken)]) == 1
        assert ogx.main(["run", "missing.json"]) == 1
        first, second = capsys.readouterr().err.strip().split("\n")
        assert first.startswith(f"{broken}: not JSON: Expecting value: line 1")
        assert second == (
            "missing.json: No such file or directory; expected 'starter' or a JSON file"
        )

    def most_parallel(self, value, **environ):
        entry = {"provider_id": "p", "provider_type": "remote::vllm",
                 "config": {"base_url": "h:1", "max_parallel": value}}
        tree = {"providers": {"inference": [entry]}}
        (built,) = ogx.config_from_json(tree, "f.json", environ).providers
        return built.max_parallel

    def test_how_many_requests_may_run_at_once(self):
        given = [None, 1, 16, "2", "${env.MOST:=}", "${env.MOST:=7}"]
        assert [self.most_parallel(value or None) for value in given[:4]] == [0, 1, 16, 2]
        assert [self.most_parallel(given[5]), self.most_parallel(given[5], MOST="3")] == [7, 3]
        for wrong in (-1, "many", [1], True):
            error = refused(self.most_parallel, wrong)
            assert "inference[0].config.max_parallel: expected a number" in error.message


class TestRegistry:
    def registry(self, *aliases, tiers=None, lists=None):
        lists = {"openai": ["gpt-x", "gpt-y"], "vllm": ["Qwen/Q3"]} if lists is None else lists
        owners = [provider("openai"), provider("vllm")]
        registry = ogx.Registry(config(*owners, aliases=aliases, tiers=tiers))
        for owner in owners:
            payload = {"data": [{"id": i} for i in lists.get(owner.id, ())]}
            registry.learn(owner.id, ogx.models_from_list(owner, payload), "")
        return registry

    @pytest.mark.parametrize(
        ("asked", "provider_id", "upstream_id"),
        [
            ("openai/gpt-y", "openai", "gpt-y"),
            ("vllm/Qwen/Q3", "vllm", "Qwen/Q3"),
            ("openai/not-listed", "openai", "not-listed"),
            ("Qwen/Q3", "vllm", "Qwen/Q3"),  # a bare upstream id that only one provider has
            ("openai/gpt-y[1m]", "openai", "gpt-y"),
            ("claude-haiku-4-5-20251001", "openai", "gpt-x"),
            ("claude-opus-9", "openai", "gpt-x"),
            ("claude-sonnet-4-5[1m]", "openai", "gpt-x"),
            ("claude-instant", "openai", "gpt-x"),
        ],
    )
    def test_ids_resolve(self, asked, provider_id, upstream_id):
        found = self.registry().resolve(asked)
        assert (found.id, found.provider.id, found.upstream_id) == (
            asked, provider_id, upstream_id,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("asked", "upstream_id"),
        [
            ("claude-haiku-4-5-20251001", "claude-haiku-4-5-20251001"),  # listed by that very id
            ("claude-haiku-9", "claude-haiku-4-5-20251001"),  # the family's first
            ("claude-sonnet-4-5[1m]", "claude-sonnet-5-5"),
            ("claude-opus-4-1", "claude-opus-5-5"),
            ("claude-fable-5-2", "claude-opus-5-5"),  # a family that isn't there: the first LLM
        ],
    )
    def test_where_claude_itself_is_listed_families_are_its_own(self, asked, upstream_id):
        owner = provider("anthropic")
        registry = ogx.Registry(config(owner, aliases=[ogx.Alias(asked, "all", "auto")]))
        ids = ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-4-5-20251001")
        registry.learn("anthropic", ogx.models_from_list(owner, [{"id": i} for i in ids]), "")
        assert registry.resolve(asked).upstream_id == upstream_id

    @pytest.mark.parametrize(
        "asked",
        ["anthropic/claude-3-haiku", "us.anthropic.claude-haiku-4-5-20251001-v1:0",
         "claude-haiku-4-5@20251001", "vertex_ai/claude-haiku-4-5@20251001[1m]",
         "bedrock/eu.anthropic.claude-haiku-4-5", "anthropic:claude-haiku-4-5",
         "openrouter/anthropic/claude-haiku-4.5",
         "arn:aws:bedrock:eu-west-1:1:inference-profile/eu.anthropic.claude-haiku-4-5-v1:0"],
    )  # fmt: skip
    def test_a_claude_id_with_its_vendor_before_it_belongs_to_its_tier(self, asked):
        registry = self.registry(tiers={"haiku": "openai/gpt-y"})
        found = registry.resolve(asked)
        assert (found.id, found.listed_id) == (asked, "openai/gpt-y")

    def test_a_vendor_that_is_a_provider_or_a_listed_id_goes_before_the_tier(self):
        owner = provider("anthropic")
        registry = ogx.Registry(config(owner, tiers={"haiku": "anthropic/claude-x"}))
        found = registry.resolve("anthropic/claude-haiku-4-5")
        assert (found.provider.id, found.upstream_id) == ("anthropic", "claude-haiku-4-5")
        registry = self.registry(lists={"vllm": ["anthropic/claude-haiku-4.5"]},
                                 tiers={"haiku": "openai/gpt-y"})  # fmt: skip
        assert registry.resolve("anthropic/claude-haiku-4.5").listed_id == (
            "vllm/anthropic/claude-haiku-4.5"
        )
        assert registry.resolve("vllm/claude-haiku-9").listed_id == "vllm/claude-haiku-9"

    @pytest.mark.parametrize("asked", ["not-claude-haiku", "a/b-claude-3", "a/claudette", "a/opus"])
    def test_an_id_that_only_mentions_claude_is_not_found(self, asked):
        assert refused(self.registry().resolve, asked).status == 404

    def test_a_vendors_claude_id_says_why_there_is_no_model(self):
        error = refused(self.registry(lists={}).resolve, "anthropic/claude-haiku-4-5")
        assert error.message == "no model to serve 'claude-haiku-4-5' (no provider lists a model)"

    def test_families_are_found_behind_a_prefix(self):
        owner = provider("bedrock", "https://bedrock-mantle.us-east-1.api.aws/v1")
        registry = ogx.Registry(config(owner))
        ids = ("openai.gpt-oss", "anthropic.claude-opus-5", "us.anthropic.claude-haiku-4-5-v1:0")
        registry.learn("bedrock", ogx.models_from_list(owner, [{"id": i} for i in ids]), "")
        assert registry.resolve("claude-opus-4-1").upstream_id == "anthropic.claude-opus-5"
        found = registry.resolve("claude-haiku-9")
        assert found.upstream_id == "us.anthropic.claude-haiku-4-5-v1:0"
        assert found.provider.base_url.startswith("https://bedrock-runtime.us-east-1")

    def test_a_model_that_is_not_listed_has_its_server_too(self):
        owner = provider("bedrock", "https://bedrock-mantle.us-east-1.api.aws/v1")
        found = ogx.Registry(config(owner)).resolve("bedrock/jp.anthropic.claude-opus-5")
        assert found.provider.url("~") == "https://bedrock-runtime.us-east-1.amazonaws.com"

    def test_a_tier_may_be_a_claude_model_that_is_listed(self):
        registry = self.registry(lists={"openai": ["gpt-x"], "vllm": ["claude-sonnet-4-5"]},
                                 tiers={"opus": "claude-sonnet-4-5[1m]"})  # fmt: skip
        assert registry.resolve("claude-opus-9").upstream_id == "claude-sonnet-4-5"

    def test_a_tier_that_no_provider_serves_is_named(self):
        error = refused(self.registry(tiers={"opus": "gone/x"}).resolve, "claude-opus-9")
        assert error.message == (
            "ANTHROPIC_DEFAULT_OPUS_MODEL names 'gone/x', which no provider here serves"
        )

    def test_a_fixed_target_may_have_auto_in_its_name(self):
        registry = self.registry(ogx.Alias("mine", "vllm", "autocoder:7b"))
        assert registry.resolve("mine").upstream_id == "autocoder:7b"

    def test_an_alias_of_several_targets_has_those_that_are_served(self):
        best = ogx.Alias("best", "all", "openai/gpt-y", ("openai/gpt-y", "gone/x", "Qwen/Q3"))
        registry = self.registry(best, ogx.Alias("lost", "all", "gone/x", ("gone/x",)))
        for asked in ("best", "best[1m]"):
            found = [(model.id, model.listed_id) for model in registry.chain(asked)]
            assert found == [(asked, "openai/gpt-y"), (asked, "vllm/Qwen/Q3")]
        error = refused(registry.chain, "lost")
        assert error.message == "no provider serves a target of model 'lost'"

    def test_an_unknown_id_is_not_found_and_a_near_one_is_suggested(self):
        error = refused(self.registry().resolve, "openai-gpt-y")
        assert error.status == 404
        assert "model 'openai-gpt-y' not found. Did you mean 'openai/gpt-y'?" in error.message

    def test_a_variable_chooses_a_tier(self):
        registry = self.registry(tiers={"haiku": "vllm/Qwen/Q3"})
        assert registry.resolve("claude-3-5-haiku-latest").upstream_id == "Qwen/Q3"
        assert registry.resolve("claude-opus-4").upstream_id == "gpt-x"

    def test_a_tier_that_names_a_tier_does_not_go_in_circles(self):
        registry = self.registry(tiers={"haiku": "claude-haiku-4-5-20251001"})
        assert registry.resolve("claude-haiku-4-5-20251001").upstream_id == "gpt-x"

    def test_a_registered_target_goes_before_the_tier_and_auto_after_it(self):
        fixed = ogx.Alias("claude-haiku-9", "openai", "gpt-y")
        auto = ogx.Alias("claude-haiku-8", "all", "auto")
        registry = self.registry(fixed, auto, tiers={"haiku": "vllm/Qwen/Q3"})
        assert registry.resolve("claude-haiku-9").upstream_id == "gpt-y"
        assert registry.resolve("claude-haiku-8").upstream_id == "Qwen/Q3"

    def test_all_means_the_next_provider_when_the_first_has_no_model(self):
        auto = ogx.Alias("mine", "all", "auto")
        registry = self.registry(auto, lists={"vllm": ["Qwen/Q3"]})
        assert registry.resolve("mine").upstream_id == "Qwen/Q3"

    def test_without_any_model_an_alias_says_why(self):
        registry = self.registry(lists={})
        registry.learn("vllm", None, "connection refused")
        error = refused(registry.resolve, "claude-haiku-4-5")
        assert error.message == (
            "no model to serve 'claude-haiku-4-5' (vllm: connection refused)"
        )

    def test_what_is_learned_replaces_tables_and_alters_none(self):
        registry = self.registry()

        def tables():
            return {name: value for name, value in vars(registry).items() if name != "_lock"}

        before = tables()
        copy_before = copy.deepcopy(before)
        registry.learn("vllm", uncounted_url="http://x/tokenize")
        assert registry.uncounted_urls == {("vllm", "http://x/tokenize")}
        registry.learn("openai", [], "its list holds no LLM", native=True)
        registry.learn("vllm", native=False)
        assert before == copy_before
        assert (registry.lists["openai"], registry.problems) == (
            [], {"openai": "its list holds no LLM"})
        assert registry.native == {"openai": True, "vllm": False} and not registry.uncounted_urls
        registry.learn("openai", problem="")
        assert (registry.lists["openai"], registry.problems) == ([], {})

    @cases(
        ("payload", "ids"),
        [
            ({"object": "list", "data": [{"id": "a"}, {"id": "b"}, {"id": "a"}]}, ["a", "b"]),
            ([{"id": "a", "type": "chat"}, {"id": "b", "type": "embedding"}], ["a"]),  # Together
            ({"data": [{"id": "models/gemini-3"}]}, ["gemini-3"]),
            ({"inferenceProfileSummaries": [{"inferenceProfileId": "us.anthropic.claude-5"},
              {"inferenceProfileId": "us.cohere.embed-v4:0"}]}, ["us.anthropic.claude-5"]),
            ({"modelSummaries": [{"modelId": "openai.gpt-oss-120b-1:0"}]},
             ["openai.gpt-oss-120b-1:0"]),
            ({"models": [{"name": "a:8b", "capabilities": ["completion"]}]}, ["a:8b"]),
            ({"data": [{"id": "a", "capabilities": {"completion_chat": True}},
                       {"id": "b", "capabilities": {"completion_chat": False}}]}, ["a"]),
            ({"data": [{"id": "a", "architecture": {"output_modalities": ["text"]}},
                       {"id": "b", "architecture": {"output_modalities": ["image"]}}]}, ["a"]),
            ({"data": [{"id": "text-embedding-3-large"}, {"id": "whisper-1"}, {"id": "gpt-x"},
                       {"id": "bge-reranker"}, {"id": "dall-e-3"}, {"id": "omni-moderation"},
                       {"id": "gpt-4o-audio-preview"}, {"id": "mistral-ocr-latest"}]}, ["gpt-x"]),
            ([{"id": "a", "type": "llm", "capabilities": ["tool_use"]},
              {"id": "b", "type": "vlm"}, {"id": "c", "type": "embeddings"}], ["a", "b"]),
            ([{"id": "a\x1b[2J"}, {"id": "\ud800"}, {"id": "ok"}], ["ok"]),
            ({"data": ["a", None, {"id": 5}, {}]}, []),
            ({}, []), ([], []), ("x", []), (None, []),
        ],
    )  # fmt: skip
    def test_only_llms_are_listed_from_every_shape(self, payload, ids):
        assert [m.upstream_id for m in ogx.models_from_list(provider(), payload)] == ids

    # Real ids of providers' lists (November 2026).
    LLMS = """gpt-4o gpt-4.1-mini gpt-5.4 gpt-5.6-terra gpt-6-astra o3 o4-mini chatgpt-4o-latest
        gpt-oss-120b openai/gpt-oss-20b llama-3.3-70b-versatile meta-llama/Llama-4-Scout-17B
        qwen/qwen3-32b Qwen/Qwen3-8B Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8 moonshotai/Kimi-K2
        deepseek-v4-pro deepseek-flash deepseek-ai/DeepSeek-R1 mistral-large-latest codestral-2508
        devstral-medium magistral-medium-latest gemini-3-pro gemini-2.5-flash claude-opus-5-5
        claude-haiku-4-5-20251001 accounts/fireworks/models/glm-4p6 grok-4 grok-code-fast-1
        nvidia/llama-3.3-nemotron-super-49b-v1 amazon.nova-2-lite-v1:0 google/gemma-3-27b-it
        microsoft/phi-4 z-ai/glm-4.6 MiniMax-M2 inkling-1 llama3.3:70b qwen3:8b"""
    OTHERS = """text-embedding-3-large text-embedding-ada-002 nomic-embed-text:latest bge-m3
        BAAI/bge-reranker-v2-m3 rerank-english-v3.0 whisper-1 whisper-large-v3-turbo
        gpt-4o-transcribe tts-1 gpt-4o-mini-tts playai-tts canopylabs/orpheus-v1-english
        gpt-4o-audio-preview gpt-realtime dall-e-3 gpt-image-1 imagen-4.0-generate-001
        black-forest-labs/FLUX.1-schnell stable-diffusion-3.5 sora-2 veo-3.0-generate-001
        omni-moderation-latest meta-llama/Llama-Guard-4-12B mistral-ocr-latest
        mistral-moderation-latest gemini-embedding-001 lyria-3-clip-preview nova-canvas-v1
        all-minilm:33m intfloat/e5-large-v2 jina-embeddings-v3 voyage-3-large davinci-002
        babbage-002 o3-deep-research gpt-4o-search-preview computer-use-preview
        gemini-2.5-flash-image"""

    def test_names_tell_where_no_field_does(self):
        names = (self.LLMS + " " + self.OTHERS).split()
        entries = [{"id": upstream_id, "object": "model"} for upstream_id in names]
        found = [m.upstream_id for m in ogx.models_from_list(provider(), {"data": entries})]
        assert sorted(found) == sorted(self.LLMS.split())

    def test_the_newest_model_is_first_and_those_called_pro_are_last(self):
        entries = [{"id": "gpt-4-0613", "created": 1}, {"id": "gpt-9-pro", "created": 9},
                   {"id": "gpt-8", "created": 8}, {"id": "provider-x", "created": 7}]  # fmt: skip
        found = [m.upstream_id for m in ogx.models_from_list(provider(), entries)]
        assert found == ["gpt-8", "provider-x", "gpt-4-0613", "gpt-9-pro"]

    @pytest.mark.parametrize("created", [1_700_000_000_000_000_000, -1, "x", None, True])
    def test_an_odd_date_is_no_date(self, created):
        (found,) = ogx.models_from_list(provider(), [{"id": "a", "created": created}])
        assert ogx.model_entry(found)["created_at"] in ("1970-01-01T00:00:00Z",
                                                        "1970-01-01T00:00:01Z")  # fmt: skip

    @cases(
        ("entry", "context", "output"),
        [
            ({"max_model_len": 40960}, 40960, None),  # vLLM
            ({"context_window": 131072, "max_completion_tokens": 8192}, 131072, 8192),  # Groq
            ({"context_length": 9, "top_provider": {"max_completion_tokens": 5}}, 9, 5),
            ({"meta": {"n_ctx": 16384, "n_ctx_train": 40960}}, 16384, None),  # llama.cpp
            ({"status": {"args": ["llama-server", "--ctx-size", "8192", "-t", "1"]}}, 8192, None),
            ({"status": {"args": ["x", "-c", "4096"]}, "meta": {"n_ctx": 2048}}, 2048, None),
            ({"status": {"args": ["--ctx-size=512"]}}, 512, None),
            ({"status": {"args": ["--ctx-size", "-1", "--cache", "9", 7, None]}}, None, None),
            ({"status": "loaded"}, None, None), ({"status": {"args": {"-c": 5}}}, None, None),
            ({"max_input_tokens": 200000, "max_tokens": 64000}, 200000, 64000),  # Anthropic
            ({"context_length": 131072, "max_output_length": 8192}, 131072, 8192),  # Cerebras
            ({"max_context_length": 32768}, 32768, None),  # Mistral
            ({"loaded_context_length": 8192, "max_context_length": 32768}, 8192, None),  # LM Studio
            ({"context_length": "9"}, None, None),
        ],
    )
    def test_limits_are_kept_where_told(self, entry, context, output):
        (found,) = ogx.models_from_list(provider(), [{"id": "a", **entry}])
        assert (found.context, found.max_output) == (context, output)

    def test_models_in_memory_come_first(self):
        entries = [{"id": name, "created": n, "status": {"value": value}} for n, (name, value) in
                   enumerate([("a", "unloaded"), ("b-pro", "loaded"), ("c", "loading"), ("d", 5)])]
        listed = ogx.models_from_list(provider("llama-cpp"), {"data": entries})
        assert [found.upstream_id for found in listed] == ["b-pro", "d", "c", "a"]

    @cases("props, slots", [
        ({"total_slots": 1}, 1), ({"total_slots": 4}, 0), ({}, 0), ({"total_slots": "1"}, 0),
        ({"total_slots": None}, 0), ({"total_slots": [1]}, 0), ({"total_slots": 0}, 0),
        ([], 0), (None, 0), ("total_slots", 0)])
    def test_one_slot_is_told_by_props(self, props, slots):
        assert ogx.slots_from_props(props) == slots


class TestRequests:
    # -- the checks

    @cases(
        ("body", "words"),
        [
            ([], "the request body: expected a JSON object, got a list"),
            ({}, "model: field required"),
            ({"model": 5}, "model: expected a string, got a whole number"),
            ({"model": ""}, "model: expected 1 to 256 characters"),
            ({"model": " "}, "model: expected 1 to 256 characters"),
            ({"model": "m" * 257}, "model: expected 1 to 256 characters"),
            ({"model": "m"}, "messages: field required"),
            ({"model": "m", "messages": {}}, "messages: expected a list, got an object"),
            ({"model": "m", "messages": [user("x")]}, "max_tokens: field required"),
            (request(max_tokens="9"), "max_tokens: expected a whole number, got a string"),
            (request(max_tokens=True), "max_tokens: expected a whole number, got true or false"),
            (request(max_tokens=0), "max_tokens: expected at least 1, got 0"),
            (request(messages=[]), "messages: expected at least one message"),
            (request(messages=["x"]), "messages.0: expected an object, got a string"),
            (request({"role": "tool", "content": ""}),
             'messages.0.role: expected one of user, assistant, system, got "tool"'),
            (request({"role": "user"}), "messages.0.content: field required"),
            (request(user(5)),
             "messages.0.content: expected a string or a list of content blocks, got a whole"),
            (request(user(["x"])), "messages.0.content.0: expected a content block, got a string"),
            (request(user([{"type": 5}])),
             "messages.0.content.0.type: expected the type of a content block, got 5"),
            (request(user([{"type": "text"}])), "messages.0.content.0.text: field required"),
            (request(user([{"type": "tool_result"}])),
             "messages.0.content.0.tool_use_id: field required"),
            (request(user([result("a", [{"type": "text", "text": 5}])])),
             "messages.0.content.0.content.0.text: expected a string, got a whole number"),
            (request(user([{"type": "image", "source": {"type": "x"}}])),
             "messages.0.content.0.source.type: expected one of base64, url"),
            (request(assistant([{"type": "tool_use", "id": "a", "name": "b"}])),
             "messages.0.content.0.input: field required"),
            (request(system=5), "system: expected a string or a list of content blocks"),
            (request(stream="yes"), "stream: expected true or false, got a string"),
            (request(tools={}), "tools: expected a list, got an object"),
            (request(tools=[{"input_schema": {}}]), "tools.0.name: field required"),
            (request(tools=[{"type": "x_2030", "input_schema": {}}]), "tools.0.name: field req"),
            (request(tools=[{"type": 5, "name": "a"}]), "tools.0.type: expected a string"),
            (request(tool_choice={"type": "maybe"}), "tool_choice.type: expected one of auto"),
            (request(tool_choice={"type": "tool"}), "tool_choice.name: field required"),
            (request(stop_sequences=[""]), "stop_sequences.0: expected a string that isn't empty"),
            (request(temperature="hot"), "temperature: expected a number, got a string"),
            (request(output_config={"effort": 5}), "output_config.effort: expected a string"),
            (request(user([{"type": "search_result", "content": "x"}])),
             "messages.0.content.0.content: expected a list, got a string"),
            (request(user([{"type": "image", "source": {"type": []}}])),
             "messages.0.content.0.source.type: expected one of"),
        ],
    )  # fmt: skip
    def test_a_wrong_field_is_named_in_one_sentence(self, body, words):
        error = refused(ogx.check_request, body)
        assert (error.status, error.type) == (400, "invalid_request_error")
        assert words in error.message and "\n" not in error.message

    def test_unknown_fields_and_nulls_are_accepted(self):
        ogx.check_request(request(context_management={"edits": []}, betas=["x"], tools=None,
                                  system=None, stop_sequences=None, output_config=None,
                                  metadata={"user_id": "x" * 500}, brand_new=1))  # fmt: skip

    def test_an_id_may_have_256_characters(self):
        ogx.check_request(request(model="m" * 256))

    @cases("rest", [{}, {"output_config": None}, {"output_config": {}},
                                      {"output_config": {"effort": "low"}}])  # fmt: skip
    def test_the_older_output_format_is_that_of_output_config(self, rest):
        wanted = {"type": "json_schema", "schema": {"type": "object"}}
        body = checked(request(output_format=wanted, **rest))
        assert body["output_config"] == {**(rest.get("output_config") or {}), "format": wanted}
        assert ogx.chat_request(body, model())["response_format"]["json_schema"]
        sent = ogx.messages_request(body, model("anthropic"))
        assert "output_format" not in sent and sent["output_config"]["format"] == wanted

    def test_the_newer_one_goes_before_the_older(self):
        new, old = ({"type": "json_schema", "schema": {"title": t}} for t in ("new", "old"))
        body = checked(request(output_format=old, output_config={"format": new}))
        assert body["output_config"]["format"] == new
        for nothing in ({}, {"output_format": None}):
            assert "output_config" not in checked(request(**nothing))

    @pytest.mark.parametrize("fields", [
        {"messages": [user("a"), {"role": "system", "output_config": {"effort": "low"}}]},
        {"output_format": {"type": "json_schema", "schema": {}}, "output_config": None},
    ], ids=["settings", "format"])  # fmt: skip
    def test_a_check_changes_nothing(self, fields):
        body = request(**fields)
        given = json.dumps(body)
        ogx.check_request(body)
        assert json.dumps(body) == given

    @cases(
        ("output_format", "words"),
        [("json", "output_format: expected an object, got a string"),
         ({"type": "json_schema"}, "output_config.format.schema: field required")],
    )  # fmt: skip
    def test_a_wrong_output_format_is_told(self, output_format, words):
        error = refused(ogx.check_request, request(output_format=output_format))
        assert words in error.message

    def test_counting_needs_no_max_tokens(self):
        ogx.check_request({"model": "m", "messages": [user("x")], "tools": []}, counting=True)

    @cases(
        ("fields", "words"),
        [
            ({"messages": [user("a"), user([{"type": "hologram"}])]},
             'messages.1.content.0.type: "hologram" is not a known type of content block'),
            ({"output_config": {"effort": "huge"}}, "output_config.effort: expected one of low"),
            ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type: expected"),
        ],
    )  # fmt: skip
    def test_what_is_new_is_refused_only_where_it_must_be_translated(self, fields, words):
        ogx.check_request(request(**fields))
        assert words in refused(ogx.refuse_untranslatable, request(**fields)).message

    def test_threads_are_refused_as_the_sdks_recovery_expects(self):
        error = refused(ogx.refuse_untranslatable, request(thread={"type": "create"}))
        assert error.status == 400
        assert error.body("r")["error"]["details"] == {
            "error_code": "thread_unsupported_request", "unsupported": ["thread"],
        }  # fmt: skip

    def test_safeguards_are_refused_by_name_and_never_judged(self):
        body = request(safeguards=[{"type": "dangerous_tool_use"}])
        assert "safeguards" in refused(ogx.refuse_untranslatable, body).message

    @pytest.mark.parametrize("name", ["mcp_servers", "container"])
    def test_what_only_anthropics_servers_run_is_refused_by_name(self, name):
        body = request(**{name: [{"type": "url"}]})
        error = refused(ogx.refuse_untranslatable, body)
        assert (error.status, error.message) == (
            400, f"{name}: not supported by translated models"
        )  # fmt: skip
        ogx.refuse_untranslatable(body, native=True)  # another gateway may have it
        for nothing in (None, []):
            ogx.refuse_untranslatable(request(**{name: nothing}))

    CLEARED = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}  # Claude Code's own

    @cases(
        ("fields", "sent", "told"),
        [
            ({"inference_geo": "eu", "banana": 1}, {}, "inference_geo, banana"),
            ({"top_k": 5}, {}, "top_k"),
            ({"top_k": 5}, {"top_k": 5}, ""),
            ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, {},
             "context_management"),
            ({"service_tier": "auto", "cache_control": {"type": "ephemeral"}, "a\x1b[2J\n": 1}, {},
             "service_tier, cache_control, a?[2J?"),
            ({f"x{n}" + "y" * 99: n for n in range(50)}, {},
             ", ".join(f"x{n}" + "y" * 38 for n in range(10))),
            # Near misses: taken, or of no consequence.
            ({"context_management": CLEARED, "betas": ["a"]}, {}, ""),
            ({"container": None, "banana": None}, {}, ""),
            ({"temperature": 1, "top_p": 1, "stream": True, "thinking": {"type": "adaptive"},
              "metadata": {"user_id": "u"}, "tools": [], "tool_choice": {"type": "auto"},
              "stop_sequences": ["x"], "system": "s", "output_config": {}, "output_format": {}},
             {}, ""),
        ],
    )  # fmt: skip
    def test_what_a_translated_request_leaves_out_is_named(self, fields, sent, told):
        assert ogx.dropped_names(request(**fields), sent, False) == told

    def test_what_claude_code_always_sends_is_named_on_demand(self):
        body = request(context_management=self.CLEARED, betas=["a"], banana=1)
        assert ogx.dropped_names(body, {}, True) == "context_management, betas, banana"

    def test_no_request_of_claude_codes_is_told_to_lose_anything(self):
        body = request(metadata={"user_id": "{}"}, thinking={"type": "adaptive"}, stream=True,
                       context_management=self.CLEARED, output_config={"effort": "high"},
                       system=[text("s")], tools=[tool()])  # fmt: skip
        assert ogx.dropped_names(body, ogx.chat_request(body, model()), False) == ""

    @cases(
        ("block", "words"),
        [
            (image(media_type="image/bmp"),
             "image.source.base64.media_type: expected one of image/jpeg, image/png, image/gif, "
             "image/webp"),
            (result("a", [text("x"), image(media_type="image/tiff")]),
             "image.source.base64.media_type: expected one of image/jpeg"),
            ({**pdf(), "source": {"type": "base64", "media_type": "text/rtf", "data": ""}},
             "document.source.base64.media_type: expected one of application/pdf"),
            (image("A" * (5 * 1024 * 1024 + 4)),
             "image.source.base64: image exceeds 5 MB maximum: 5242884 bytes > 5242880 bytes"),
        ],
    )  # fmt: skip
    def test_media_that_anthropic_does_not_take_are_refused_in_its_words(self, block, words):
        for translate in (chat, responses):
            error = refused(translate, request(user([block])))
            assert (error.status, error.message[: len(words)]) == (400, words)

    def test_media_that_an_upstream_cannot_see_are_told_whatever_they_are(self):
        rtf = {**pdf(), "source": {"type": "base64", "media_type": "text/rtf", "data": ""}}
        assert "text/rtf, 1 kB" in chat(request(user([rtf])), "vllm")["messages"][0]["content"]

    @cases(("stops", "fits"), [
        (["a" * 4000], True), (["a" * 4001], False), (["ab"] * 2001, False)])
    def test_stop_sequences_are_bounded(self, stops, fits):
        body = request(stop_sequences=stops)
        if fits:
            ogx.check_request(body)
        else:
            assert "at most 4000 characters" in refused(ogx.check_request, body).message

    @cases(("model_id", "fits"), [
        ("x" * 256, True), ("\u4f60" * 256, True), ("x" * 257, False), ("a\x1b[2J", False),
        ("a\nb", False), ("a\u202eb", False), ("a\udc9bb", False)])  # fmt: skip
    def test_a_models_id_is_short_and_without_controls(self, model_id, fits):
        if fits:
            ogx.check_request(request(model=model_id))
        else:
            error = refused(ogx.check_request, request(model=model_id))
            assert error.status == 400 and error.message.startswith("model: expected 1 to 256")


class TestHistory:
    REMINDER = text("<system-reminder>CLAUDE.md</system-reminder>")
    SYSTEM = {"role": "system", "content": "# Environment"}

    @staticmethod
    def words(messages, system_anywhere=False):
        turns = ogx.turns_from_messages(messages, system_anywhere)
        return [(turn.role, list(map(ogx.block_text, turn.blocks))) for turn in turns]

    @cases(
        ("first", "before", "after"),
        [
            (user("go"), [], ["go"]),
            (user(REMINDER, text("go"), image()), [REMINDER["text"]],
             ["go", "[An image was here: image/png, 1 kB]"]),
            (user(REMINDER, REMINDER), [REMINDER["text"]] * 2, []),
            (user(text("go"), REMINDER), [], ["go", REMINDER["text"]]),
            (user(""), [], []),
        ],
    )  # fmt: skip
    def test_the_first_system_message_stands_before_the_words(self, first, before, after):
        marked = "<system-reminder>\n# Environment\n</system-reminder>"
        assert self.words([first, self.SYSTEM]) == [("user", [*before, marked, *after])]
        assert self.words([first, self.SYSTEM], True) == [
            turn for turn in (("user", before), ("system", ["# Environment"]), ("user", after))
            if turn[1]]

    def test_other_system_messages_stay_where_they_are(self):
        late = {"role": "system", "content": "late"}
        cleared = {**self.SYSTEM, "clear_at": "next_user_message"}
        assert self.words([user("go"), self.SYSTEM, late], True)[:2] == [
            ("system", ["# Environment", "late"]), ("user", ["go"])]
        assert self.words([user("a"), user("b"), late], True) == [
            ("user", ["a", "b"]), ("system", ["late"])]
        assert self.words([user("a"), cleared], True)[-1] == ("system", ["# Environment"])
        assert self.words([user("a"), cleared, user("b")], True) == [("user", ["a", "b"])]
        assert self.words([self.SYSTEM, user("a")], True)[0] == ("system", ["# Environment"])

    def test_what_follows_one_that_goes_later_stays_where_it_was(self):
        cleared = {"role": "system", "content": "once", "clear_at": "next_user_message"}
        history = [user("a"), cleared, self.SYSTEM]
        for late in ([], [assistant("b"), user("c")]):
            words = self.words([*history, *late])[0][1]
            assert words[0] == "a" and "# Environment" in words[-1]

    def test_images_of_documents_before_a_system_message_stand_there_once(self):
        holder = {"type": "document", "source": {"type": "content", "content": [image()]}}
        (turn,) = ogx.turns_from_messages([user([text("go"), holder]), self.SYSTEM], False)
        assert [block["type"] for block in turn.blocks] == ["text", "text", "document", "image"]

    @staticmethod
    def said(dice, number):
        """What one turn of a conversation adds, with the blocks that Claude Code sends."""
        reminder = text(f"<system-reminder>{number}</system-reminder>")
        asked = [*[reminder] * dice.randrange(2), text(f"words {number}")]
        turn = [user(asked) if dice.randrange(3) else user(f"words {number}")]
        turn += [{"role": "system", "content": dice.choice([f"note {number}", [text("note")]])}
                 for _ in range(dice.randrange(3))]
        for step in range(dice.randrange(4)):
            ids = [f"{number}-{step}-{n}" for n in range(dice.randrange(1, 4))]
            turn += [assistant(text("I look."), *map(call, ids)), user(list(map(result, ids)))]
            turn += [{"role": "system", "content": "changed"}] * dice.randrange(2)
        return [*turn, assistant(f"answer {number}")]

    @pytest.mark.parametrize("dialect", ["chat", "responses", "messages"])
    @pytest.mark.parametrize("kind", ["openai", "vllm", "mistral", "messages"])
    def test_each_turns_request_extends_the_one_before(self, kind, dialect):
        dice = random.Random(7)
        for _ in range(40):
            history, before = [], ""
            for number in range(6):
                turn = self.said(dice, number)
                body = ogx.DIALECTS[dialect].request(request(*history, *turn[:-1]), model(kind))
                messages = body.get("messages") or body["input"]
                # Roles of the same kind are merged, so compare what a template makes of them.
                shown = "".join(re.findall(r'"(?:text|content|output|arguments|name)": "(.*?)"',
                                           json.dumps(messages)))
                assert shown.startswith(before)
                history, before = history + turn, shown

    def test_tools_that_were_loaded_later_stand_last_in_their_order(self):
        tools = [{**tool(name), **({"defer_loading": True} if name in "cadz" else {})}
                 for name in "abczde"]
        loaded = [user("go"), assistant([call("1")]), user([result("1", [
            {"type": "tool_reference", "tool_name": "d"},
            {"type": "tool_reference", "tool_name": "a"}])]), assistant("x"), user(
            {"type": "tool_reference", "tool_name": "z"}, {"type": "tool_reference",
                                                           "tool_name": "d"})]
        body = request(*loaded, tools=tools)
        assert [t["name"] for t in ogx.tools_in_order(body)] == [*"be", *"daz", "c"]
        for dialect, kind in (("chat", "vllm"), ("responses", "openai"), ("messages", "vllm")):
            sent = ogx.DIALECTS[dialect].request(body, model(kind))["tools"]
            assert [(t.get("function") or t)["name"] for t in sent] == [*"bedazc"]
        own = ogx.messages_request(body, model("anthropic"))  # which knows what it loaded
        assert own["tools"] == tools
        assert ogx.tools_in_order(request(*loaded, tools=tools[1:3])) == tools[1:3]

    @cases("name", [["a"], {"a": 1}, None, 7, True])
    def test_odd_names_of_loaded_tools_change_nothing(self, name):
        tools = [{**tool("a"), "defer_loading": True}, tool("b"), {**tool("c"), "defer_loading": 1}]
        body = request(user([{"type": "tool_reference", "tool_name": name}]), tools=tools)
        assert [t["name"] for t in ogx.tools_in_order(ogx.checked_json(
            json.dumps(body).encode()))] == [*"bac"]

    def test_the_billing_header_is_no_part_of_the_system_prompt(self):
        blocks = [text("x-anthropic-billing-header: cc_version=1;"), text("You are"), text("a bot")]
        assert ogx.system_text({"system": blocks}) == "You are\n\na bot"
        assert ogx.system_text({"system": "plain"}) == "plain"
        assert ogx.system_text({}) == ""

    @cases(
        ("messages", "turns"),
        [
            ([user("a"), user("b")], [("user", ["a", "b"])]),
            ([assistant(call("1"), call("2")), user(result("2"), result("1"), text("t"))],
             [("assistant", ["1", "2"]), ("results", ["1", "2"]), ("user", ["t"])]),
            ([assistant(call("1")), {"role": "system", "content": "s"}, user([result("1")])],
             [("assistant", ["1"]), ("results", ["1"]), ("system", ["s"])]),
            ([assistant(call("1"), call("2")), user([result("1")]), assistant("x"), user("y")],
             [("assistant", ["1", "2"]), ("results", ["1", "2"]), ("assistant", ["x"]),
              ("user", ["y"])]),
            ([assistant([call("1")]), assistant("x"), user([result("1")])],
             [("assistant", ["1", "x"]), ("results", ["1"])]),
            ([assistant([call("1")])], [("assistant", ["1"]), ("results", ["1"])]),
            ([user(""), user(text(""), text("a"))], [("user", ["a"])]),
            ([user("a"), assistant(""), user("b")], [("user", ["a", "b"])]),
        ],
    )  # fmt: skip
    def test_every_tool_call_is_answered_directly_after_it(self, messages, turns):
        def name(block):
            return block.get("text") or block.get("id") or block.get("tool_use_id")

        messages = [m if not isinstance(m["content"], dict) else {**m, "content": [m["content"]]}
                    for m in messages]  # fmt: skip
        made = ogx.turns_from_messages(messages)
        assert [(t.role, [name(b) for b in t.blocks]) for t in made] == turns

    def test_a_result_without_its_call_becomes_text(self):
        gone = result("gone", [text("the output"), image()], is_error=True)
        (turn,) = ogx.turns_from_messages([user([gone])])
        told = text("[Result of tool call gone]\n[The tool reported an error]")
        assert (turn.role, turn.blocks) == ("user", [told, text("the output"), image()])

    def test_what_answers_no_call_stays_in_its_place(self):
        (turn,) = ogx.turns_from_messages([user(text("a"), result("gone", "b"), text("c"))])
        words = [block["text"] for block in turn.blocks]
        assert words == ["a", "[Result of tool call gone]", "b", "c"]

    def test_a_second_result_of_one_call_is_not_lost(self):
        turns = [assistant([call("a")]), user(result("a", "one"), result("a", "two"))]
        *_, last = ogx.turns_from_messages(turns)
        assert last.blocks == [text("[Result of tool call a]"), text("two")]

    def test_an_assistants_message_at_the_end_is_gone_on_with(self):
        turns = ogx.turns_from_messages([user("Pi?"), assistant("It is 3.")])
        assert [t.role for t in turns] == ["user", "assistant", "user"]
        assert "Go on from the very end" in turns[-1].blocks[0]["text"]
        only_thoughts = [user("a"), assistant([{"type": "thinking", "thinking": "hm"}])]
        assert [t.role for t in ogx.turns_from_messages(only_thoughts)] == ["user", "assistant"]

    def test_a_system_message_may_be_for_one_turn_and_may_hold_settings_alone(self):
        once = {"role": "system", "content": "once", "clear_at": "next_user_message"}
        settings = {"role": "system", "output_config": {"effort": "low"}}
        body = checked(request(user("a"), once, assistant("b"), user("c"), once, settings))
        turns = ogx.turns_from_messages(body["messages"])
        assert [t.role for t in turns] == ["user", "assistant", "user", "system"]

    def test_a_missing_result_is_made_up_in_words(self):
        made = ogx.turns_from_messages([assistant([call("1")]), user("go on")])
        assert made[1].blocks[0]["content"].startswith("[No result: ")

    # Every block type of Anthropic's OpenAPI and SDK: a block in a request, and what of it a chat
    # model reads ("" for nothing; None: it has a form of its own there, with tests of its own).
    BLOCKS = (
        ({"type": "text", "text": "words"}, "words"),
        (image(), None), (pdf(), None), (call("a"), None), (result("a"), None),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "[An image was here: f]"),
        ({"type": "document", "source": {"type": "text", "data": "BODY"}, "title": "T"},
         '<document title="T">\nBODY\n</document>'),
        ({"type": "document", "source": {"type": "content", "content": [text("BODY")]},
          "context": "C"}, '<document title="document">\nC\nBODY\n</document>'),
        ({"type": "document", "source": {"type": "url", "url": "https://x/y.pdf"}},
         "[The document 'document' could not be passed on to this model: https://x/y.pdf]"),
        ({"type": "search_result", "title": "T", "source": "S", "content": [text("B")]},
         "[Search result: T <S>]\nB"),
        ({"type": "thinking", "thinking": "hm", "signature": "s"}, ""),
        ({"type": "redacted_thinking", "data": "x"}, ""),
        ({"type": "fallback", "to": {"model": "m"}}, ""),
        ({"type": "mcp_tool_listing", "mcp_server_name": "s", "tools": []}, ""),
        ({"type": "tool_reference", "tool_name": "mcp__x"}, "[The tool mcp__x is now available.]"),
        ({"type": "tool_addition", "tool": {"type": "tool_reference", "name": "X"}},
         "[The tool X is now available.]"),
        ({"type": "tool_addition", "tool": {"type": "tool_definition", "definition": tool("Y")}},
         f"[The tool {json.dumps(tool('Y'))} is not available.]"),
        ({"type": "tool_removal", "tool": {"type": "tool_reference", "name": "X"}},
         "[The tool X is no longer available.]"),
        ({"type": "compaction", "content": "What was said.", "encrypted_content": "E"},
         "What was said."),
        ({"type": "compaction", "content": None}, "[The summary of what was said is missing.]"),
        ({"type": "container_upload", "file_id": "f"},
         '[container_upload] {"file_id": "f"}'),
        ({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"q": "é"}},
         '[server_tool_use] {"name": "web_search", "input": {"q": "é"}}'),
        ({"type": "web_search_tool_result", "tool_use_id": "s", "content": [
            {"type": "web_search_result", "url": "u", "title": "T", "encrypted_content": "E"}]},
         '[web_search_tool_result] {"tool_use_id": "s", "content": '
         '[{"type": "web_search_result", "url": "u", "title": "T"}]}'),
        ({"type": "mcp_tool_use", "id": "m", "name": "n", "server_name": "s", "input": {}},
         '[mcp_tool_use] {"name": "n", "server_name": "s", "input": {}}'),
        *(({"type": kind, "tool_use_id": "i", "content": "C"},
           f'[{kind}] {{"tool_use_id": "i", "content": "C"}}') for kind in (
            "web_fetch_tool_result", "code_execution_tool_result", "mcp_tool_result",
            "bash_code_execution_tool_result", "text_editor_code_execution_tool_result",
            "tool_search_tool_result", "advisor_tool_result")),
    )  # fmt: skip

    @cases(("block", "words"), BLOCKS)
    def test_what_a_chat_model_reads_of_each_block(self, block, words):
        body = request(user("Hi."), user([block, text("So?")]))
        ogx.check_request(body)
        ogx.refuse_untranslatable(body)
        if words is None:
            return
        sent = chat(body)["messages"]
        assert sent[-1]["content"] == "\n\n".join(filter(None, ("Hi.", words, "So?")))
        (item,) = responses(body)["input"]
        said = [part["text"] for part in item["content"]]
        assert list(filter(None, said)) == list(filter(None, ("Hi.", words, "So?")))

    def test_every_block_type_is_in_that_table(self):
        assert {block["type"] for block, _ in self.BLOCKS} == ogx.BLOCK_TYPES

    def test_a_documents_images_follow_it(self):
        inner = [text("see"), image("AAAA"), text(""), image("BBBB")]
        paper = {"type": "document", "source": {"type": "content", "content": inner}}
        body = request(user([paper, text("what?")]), assistant([call("a")]),
                       user([result("a", [paper])]))  # fmt: skip
        for sent in (json.dumps(chat(body)), json.dumps(responses(body))):
            assert [sent.count(f"base64,{data}") for data in ("AAAA", "BBBB")] == [2, 2]
            assert sent.count("see") == 2
        assert ogx.blocks_of([pdf(), text("a")]) == [pdf(), text("a")]
        deep = {"type": "document", "source": {"type": "content", "content": [paper]}}
        odd = pdf()
        odd["source"]["content"] = 5
        assert ogx.blocks_of([deep, odd]) == [deep, odd]
        words = {"type": "document", "source": {"type": "content", "content": "words"}}
        assert ogx.blocks_of([words]) == [words]
        kind = dataclasses.replace(ogx.PROVIDER_KINDS["vllm"], images=False, native_gaps=())
        assert ogx.unsupported_features(body, kind) == {"image"}

    @pytest.mark.parametrize("make", [
        lambda n: [user(*[text("a")] * n)], lambda n: [user("a")] * n,
        lambda n: [user("a"), {"role": "system", "content": "b"}] * (n // 2),
        lambda n: [user(*(result(f"t{i}") for i in range(n)))],
        lambda n: [assistant(*(call(f"t{i}") for i in range(n)))] * 2,
    ], ids=["blocks", "messages", "systems", "results", "calls"])  # fmt: skip
    @pytest.mark.parametrize("kind", ["openai", "groq", "mistral"])
    def test_the_work_grows_with_the_request_alone(self, kind, make):
        check_linear(lambda messages: ogx.chat_messages(
            request(*messages), model(kind)), make, 2000)  # fmt: skip


# Texts with their tokens in OpenAI's o200k_base, as .ci/o200k.cjs counts them.
O200K = {
    "prose": (125, """\
The gateway keeps a connection to each provider open for as long as it is useful. When an
answer breaks off in the middle, the client is told so in words it understands, and nothing is
sent twice: whoever pays for tokens doesn't want to pay for the same ones again. A request that
was refused may be sent once more, if the refusal said what was wrong with it. Most people never
notice any of this. They ask a question, the model thinks about it for a while, and then it
answers; what happened between the two programs is of interest only to those who maintain them.
"""),
    "python": (178, """\
class Turns:
    \"\"\"The messages of a conversation, oldest first.\"\"\"

    def __init__(self, limit: int = 200) -> None:
        self._turns: list[dict[str, Any]] = []
        self._limit = limit

    def add(self, role: str, text: str) -> None:
        if self._turns and self._turns[-1]["role"] == role:
            self._turns[-1]["content"] += f"\\n\\n{text}"
            return
        self._turns.append({"role": role, "content": text})
        del self._turns[: -self._limit]

    def last(self, role: str) -> Optional[str]:
        for turn in reversed(self._turns):
            if turn["role"] == role:
                return turn["content"]
        return None
"""),
    "json": (172, """\
{
  "name": "weather-service",
  "version": "2.14.0",
  "private": true,
  "dependencies": {
    "express": "^4.19.2",
    "redis-client": "~1.5.11"
  },
  "stations": [
    {"id": 10412, "city": "Lisbon", "latitude": 38.7223, "longitude": -9.1393, "active": true},
    {"id": 10977, "city": "Oslo", "latitude": 59.9139, "longitude": 10.7522, "active": false}
  ],
  "settings": {"refreshSeconds": 900, "timeZone": "Europe/Lisbon", "units": ["celsius", "km/h"]}
}
"""),
    "listing": (176, """\
total 88
drwxr-xr-x  6 root root  4096 Nov 22 20:31 .
-rw-r--r--  1 root root   412 Sep  3 08:15 .editorconfig
-rw-r--r--  1 root root  1279 Nov 20 11:02 Makefile
-rw-r--r--  1 root root  9882 Nov 21 17:44 README.md
drwxr-xr-x 14 root root  4096 Nov 22 19:58 node_modules
-rwxr-xr-x  1 root root   933 Oct 30 23:07 run-tests.sh
drwxr-xr-x  3 root root  4096 Nov 12 06:50 src
"""),
    "numbered": (115, """\
     1\tpackage main
     2\t
     3\timport (
     4\t\t"fmt"
     5\t\t"os"
     6\t)
     7\t
     8\tfunc main() {
     9\t\tif len(os.Args) < 2 {
    10\t\t\tfmt.Fprintln(os.Stderr, "usage: greet NAME")
    11\t\t\tos.Exit(2)
    12\t\t}
    13\t\tfmt.Printf("Hello, %s!\\n", os.Args[1])
    14\t}
"""),
    "markdown": (131, """\
## Install

1. Clone the repository and run `make install`; it needs **Python 3.9** or newer.
2. Set `OPENAI_API_KEY` (or `VLLM_URL=http://localhost:8000`), then start `server.py run`.

| option      | default     | meaning                                  |
|-------------|-------------|------------------------------------------|
| `--port`    | 8321        | where it listens                         |
| `--verbose` | off         | also log what the upstream said          |

See [the manual](https://example.com/docs/manual.html#options) for *all* of them.
"""),
}  # fmt: skip
O200K_OTHERS = {
    "de": (32, "Wir sind heute im Park spazieren gegangen, das Wetter war sehr schön. Die "
           "Kinder spielten auf der Wiese, und am Abend haben wir zusammen gekocht."),
    "fr": (35, "Nous nous sommes promenés dans le parc aujourd'hui, il faisait très beau. Les "
           "enfants jouaient sur la pelouse, et le soir nous avons cuisiné ensemble."),
    "ru": (34, "Сегодня мы гуляли в парке, погода была очень хорошая. Дети "
           "играли на лужайке, а вечером мы вместе готовили ужин."),
    "zh": (28, "今天我们去公园散步，天气非常好。孩"
           "子们在草地上玩耍，晚上我们一起做饭。"),
    "ja": (36, "今日は公園を散歩しました。天気がとても良かったです"
           "。子供たちは芝生で遊び、夜はみんなで料理をしました。"),
    "ar": (30, "ذهبنا اليوم للتنزه في الحديقة وكان الطقس جميلا جدا. "
           "لعب الأطفال على العشب وفي المساء طبخنا معا."),
    "hi": (30, "आज हम पार्क में टहलने गए, मौसम बहुत अच्छा था। बच्चे घास "
           "पर खेल रहे थे और शाम को हमने साथ में खाना बनाया।"),
}  # fmt: skip


class TestTokens:
    def test_all_kinds_of_text_are_counted_as_o200k_does(self):
        counted = {name: ogx.TokenCounter().text(words) for name, (_, words) in O200K.items()}
        for name, (tokens, _) in O200K.items():
            assert counted[name] == pytest.approx(tokens, rel=0.2), name  # they are short
        whole = sum(tokens for tokens, _ in O200K.values())
        assert sum(counted.values()) == pytest.approx(whole, rel=0.05)

    @pytest.mark.parametrize(("tokens", "words"), O200K_OTHERS.values(), ids=list(O200K_OTHERS))
    def test_other_languages_are_counted_nearly(self, tokens, words):
        assert ogx.TokenCounter().text(words) == pytest.approx(tokens, rel=0.35)

    def test_system_tools_calls_and_results_count(self):
        tokens, words = O200K["prose"]
        small, _ = ogx.TokenCounter().prompt(request())
        for body in (request(system=words), request(tools=[tool(description=words)]),
                     request(system=[text(words)]), request(words),
                     request(assistant([call("a", command=words)])),
                     request(user([result("a", words)])),
                     request(user([result("a", [text(words)])])),
                     request(user([{"type": "document", "source": {"type": "text", "data": words,
                                    "media_type": "text/plain"}}]))):  # fmt: skip
            said, attached = ogx.TokenCounter().prompt(body)
            assert 0.85 * tokens < said - small < 1.15 * tokens + 40 and attached == 0

    def test_what_no_template_shows_does_not_count(self):
        count = ogx.TokenCounter().prompt
        bare = count(request(assistant(text("a"), call("a")), user([result("a")])))
        much = "x9" * 5000
        thought = {"type": "thinking", "thinking": much, "signature": much}
        full = count(request(
            assistant(thought, {**text("a"), "cache_control": {"type": much}}, call("a" + much)),
            user([result("a")])))  # fmt: skip
        assert full == bare

    @cases("data", ["", "A", "\xe9"])
    def test_an_image_counts_as_the_largest_at_anthropic(self, data):
        assert ogx.TokenCounter().prompt(request(user([image(data)])))[1] == 1600

    def test_other_attachments_count_by_their_size_or_alike(self):
        by_url = {"source": {"type": "url", "url": "https://x.example/a"}}
        for block, tokens in ((pdf("A" * 80_000), 1500), ({"type": "image", **by_url}, 1600),
                              ({"type": "document", **by_url}, 1600)):  # fmt: skip
            assert ogx.TokenCounter().prompt(request(user([block])))[1] == tokens

    def test_what_was_counted_is_known_again_but_not_for_ever(self):
        counter, body = ogx.TokenCounter(), request("hello", tools=[tool(description="in Größe")])
        first = counter.prompt(body)
        assert counter.prompt(body) == first
        assert len(counter._tokens) == 3  # the empty system prompt, too
        for number in range(11_000):
            counter.text(f"text {number}")
        assert len(counter._tokens) <= 10_000

    def test_a_counter_keeps_no_texts(self):
        counter = ogx.TokenCounter()
        counter.prompt(request("hello " * 1000))
        assert {type(value) for pair in counter._tokens.items() for value in pair} == {int, float}


class TestCalls:
    OSLO = '{"city": "Oslo", "days": 3}'
    CALL = '{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}'
    TOOLS = {name: {"name": name, "input_schema": {"properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "deep": {"type": "boolean"}}}}
        for name in ("weather", "Bash")}  # fmt: skip
    FORMS = {
        "Hermes": f"<tool_call>\n{CALL}\n</tool_call>",
        "Hermes, not closed": f"<tool_call>{CALL}",
        "Qwen3-Coder": "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
                       "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "Qwen3-Coder, alone": "<function=weather><parameter=city>Oslo</parameter>"
                              "<parameter=days>3</parameter></function>",
        "Llama 3.1, function": f"<function=weather>{OSLO}</function>",
        "Claude": '<function_calls>\n<invoke name="weather">\n<parameter name="city">Oslo'
                  '</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n'
                  "</function_calls>",
        "Mistral": f"[TOOL_CALLS] [{CALL}]",
        "Mistral, newer": f"[TOOL_CALLS]weather[ARGS]{OSLO}",
        "Llama 3.1": "<|python_tag|>" + CALL.replace("arguments", "parameters") + "<|eom_id|>",
        "DeepSeek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
                    f"```json\n{OSLO}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "DeepSeek V3.1": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{OSLO}"
                         "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "GLM": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
               "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        "DeepSeek, without the outer mark":
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{OSLO}\n```"
            "<｜tool▁call▁end｜>",
        "Phi": f"<|tool_call|>[{CALL}]<|/tool_call|>",
        "Granite": f"<|tool_call|>[{CALL}]",
        "Gemma 4": '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>',
        "bare": CALL,
        "bare, Llama 3.2": CALL.replace("arguments", "parameters"),
        "bare, OpenAI": '{"type": "function", "function": ' + CALL + "}",
        "arguments as text": '{"name": "weather", "arguments": ' + json.dumps(OSLO) + "}",
        "fenced": f"```json\n{CALL}\n```",
        "a list": f"[{CALL}]",
        "Llama 4": "[weather(city='Oslo', days=3)]",
        "Gemma": "```tool_code\nweather(city='Oslo', days=3)\n```",
    }
    REPAIRED = {
        "comma": '<tool_call>{"name": "weather", "arguments": {"city": "Oslo", "days": 3,},}'
                 "</tool_call>",
        "a fence": f"<tool_call>\n```json\n{CALL}\n```\n</tool_call>",
        "a fence around arguments": f"<function=weather>\n```\n{OSLO}\n```\n</function>",
        "a fence around a list": f"[TOOL_CALLS]```json\n[{CALL}]\n```",
        "closers": '{"name": "weather", "arguments": {"city": "Oslo", "days": 3',
        "closers before a tag": '<tool_call>{"name": "weather", "arguments": {"city": "Oslo", '
                                '"days": 3}</tool_call>',
        "closers in a fence": '```json\n{"name": "weather", "arguments": {"city": "Oslo", "days": '
                              "3}\n```",
    }

    def read(self, text, step=0, whole=True, holder=None):
        """What is handed on, and the calls, where the text comes in pieces."""
        holder = holder or ogx.CallHolder(self.TOOLS)
        step = step or len(text) or 1
        handed = "".join(holder.feed(text[at : at + step]) for at in range(0, len(text), step))
        calls, rest = holder.end(whole)
        return handed + rest, calls

    @cases("form", [*FORMS, *REPAIRED])
    def test_each_form_is_read_wherever_it_is_cut(self, form):
        text, expected = {**self.FORMS, **self.REPAIRED}[form], ("weather", json.loads(self.OSLO))
        for step in (0, 1, 2, 3, 5, 7):
            holder = ogx.CallHolder(self.TOOLS)
            assert self.read(text, step, holder=holder) == ("", [expected])
            assert holder.repaired == (form in self.REPAIRED)
        for cut in range(len(text)):
            holder = ogx.CallHolder(self.TOOLS)
            assert holder.feed(text[:cut]) + holder.feed(text[cut:]) == ""
            assert holder.end(True) == ([expected], "")

    @cases("form", [form for form in FORMS if form.split(",")[0] not in (
        "bare", "fenced", "a list", "Llama 4", "Gemma", "arguments as text")])
    def test_marked_calls_may_follow_words_and_each_other(self, form):
        for step in (0, 1, 4):
            words, calls = self.read(f"I look `here`.\n{self.FORMS[form]}", step)
            assert (words, len(calls)) == ("I look `here`.\n", 1)
            if "not closed" not in form:
                assert len(self.read(self.FORMS[form] * 2, step)[1]) == 2

    @cases("form", [*FORMS, *REPAIRED])
    def test_words_behind_a_call_make_it_text(self, form):
        text = {**self.FORMS, **self.REPAIRED}[form] + "\n\nThat is how it is done, you see."
        for step in (0, 1, 6):
            assert self.read(text, step) == (text, [])

    @cases("form", [*FORMS, *REPAIRED])
    def test_a_call_that_was_cut_or_of_no_known_tool_is_text(self, form):
        text = {**self.FORMS, **self.REPAIRED}[form]
        assert self.read(text, 3, whole=False) == (text, [])
        other = text.replace("weather", "launch_rocket")
        assert self.read(other, 3) == (other, [])

    def test_a_raw_line_break_in_a_string_is_put_right(self):
        text = '<tool_call>{"name": "Bash", "arguments": {"city": "a\n\tb, ]",},}</tool_call>'
        for step in (0, 1):
            holder = ogx.CallHolder(self.TOOLS)
            assert self.read(text, step, holder=holder) == ("", [("Bash", {"city": "a\n\tb, ]"})])
            assert holder.repaired

    def test_gemmas_quotes_hold_anything(self):
        value = 'a, b: "c" {d: e}\n\\ <tool_call|>'
        text = f'<|tool_call>call:weather{{city:<|"|>{value}<|"|>,days:[1,{{x:<|"|><|"|>}}]}}'
        assert self.read(text, 1) == ("", [("weather", {"city": value, "days": [1, {"x": ""}]})])

    @cases("form", [form for form in FORMS if "arg" not in form])
    def test_a_name_may_be_as_long_as_the_server_takes(self, form):
        name = "mcp__" + "a" * 59
        holder = ogx.CallHolder({name: {**self.TOOLS["weather"], "name": name}})
        text = self.FORMS[form].replace("weather", name)
        assert self.read(text, 1, holder=holder) == ("", [(name, json.loads(self.OSLO))])

    @cases("given", ["city={'a'}", "city=b'a'", "city=1j", "city=...", "**{'city': 'a'}", "'Oslo'",
                     "city={1, 2}", "city={(1, 2): 3}", "city=x", "city=9" + "9" * 5000])
    def test_an_argument_that_is_no_json_makes_it_text(self, given):
        text = f"[weather({given})]"
        assert self.read(text) == self.read(text, 1) == (text, [])

    @pytest.mark.needs_threads
    def test_python_that_a_model_writes_warns_nobody(self):
        text = "[weather(city='grep \\d', days=1if 1else 2), weather(city='\\d')]"
        code = f"import ogx; ogx.main(['--version']); ogx.CallReader({text!r}, {{}}).calls()"
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True,
                              timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")

    @cases("text", ["[weather(days=1e999)]", '{"name": "weather", "arguments": {"days": 1e999}}',
                    '<tool_call>{"name": "weather", "arguments": {"days": NaN,}}</tool_call>'])
    def test_a_number_that_json_lacks_is_none(self, text):
        assert self.read(text, 1) == ("", [("weather", {"days": None})])

    @pytest.mark.parametrize("quote", [
        "`{}`", "```\n{}\n```", "```xml\n{}", "Look: ``{}``", "Run ```a``` and `{}`",
    ], ids=["in back-ticks", "in a fence", "in an open fence", "in two back-ticks", "after code"])
    @cases("form", ["Hermes", "Qwen3-Coder", "Claude", "Mistral", "Llama 3.1"])
    def test_a_call_among_code_is_text(self, form, quote):
        text = "So it looks: " + quote.format(self.FORMS[form])
        for step in (0, 1, 5):
            assert self.read(text, step) == (text, [])

    def texts(self):
        """200 texts about tools that are no calls."""
        yield from (f"{before}{mark}{after}" for mark in ogx.CALL_MARKS
                    for before in ("", "The mark ", "a\n\n") for after in (
                        "", " begins a call.", "\nso it is", "{", "[1, 2]", '{"a": 1}', " weather"))
        yield from (json.dumps(value) for value in (
            {"name": "Bob", "age": 5}, {"name": "weather"}, {"name": "weather", "arguments": 5},
            {"arguments": {}}, {"name": 5, "arguments": {}}, [], [{}], {}, {"type": "function"},
            {"name": "weather", "arguments": [1]}, [{"name": "weather", "arguments": {}}, 1],
            {"weather": {"city": "Oslo"}}, {"function": {"name": "x"}}, "weather", 5, None))
        yield from ("weather", "weather()x", "[weather]", "weather('Oslo')", "Bash (n=1)", "<", "[",
                    "{", "`", "```", "```python\nprint(1)\n```", "a < b and c[d] `e", "<tool", "[T",
                    "{{name}}", "<html><invoke></html>", "<function=weather", "x = {'a': [1]}",
                    "[1] a footnote", "<|im_start|>",
                    "weather(city='Oslo')", "Bash()",
                    "I use <tool_call> for tools, as <function=weather> and [TOOL_CALLS] do.",
                    "<|tool_call> is Gemma's", '<|tool_call>call:weather{city:<|"|>Os',
                    "<|tool_call>call:launch{}<tool_call|>", "<|tool_call|>[]<|/tool_call|>",
                    "~~~\n<tool_call>" + self.CALL + "</tool_call>\n~~~",
                    "print(weather(city=f()))", "\n\n", "  x  ",
                    "weather(city=open('x'))", "[weather(city='a'), launch()]",
                    "Use the tool weather for that.", '{"name": "weather", "arguments": {"a": "b',
                    '{"name": "weather", "arguments": {a: 1}}', "<parameter=a>1</parameter>")

    def test_texts_about_tools_are_handed_on_byte_for_byte(self):
        texts = list(self.texts())
        assert len({*texts}) >= 200
        for text in texts:
            for step in (0, 1, 3):
                assert self.read(text, step) == (text, [])

    def test_ordinary_text_is_not_held_back(self):
        holder = ogx.CallHolder(self.TOOLS)
        for text in ("Hello", " a < b", " x[5] = {'a': 1}", " <b>bold</b>", " `code`", " and [so]"):
            assert holder.feed(text) == text
        assert holder.feed(" <tool") == " " and holder.feed("box> is open") == "<toolbox> is open"
        for text in ("```python\nprint('hello')\n", '{"name": "Bob", "age": 5, ', "[see(this)] "):
            text += "and much more of it " * 5
            assert ogx.CallHolder(self.TOOLS).feed(text) == text
        assert holder.feed(" to put things") and holder.ignores("{so}") and not holder.ignores("<")
        assert not ogx.CallHolder(self.TOOLS).ignores("{")

    @cases("mark", ["<tool_call>", "[TOOL_CALLS]", "<|tool_call>", "<function", "<｜tool▁call"])
    def test_words_about_a_mark_are_held_back_no_further_than_a_name_reaches(self, mark):
        holder = ogx.CallHolder(self.TOOLS)
        words = f"A call begins with {mark} there, " + "and so it goes on. " * 20
        handed = "".join(map(holder.feed, words))
        assert len(words) - len(handed) < 15 and words.startswith(handed)

    def test_what_follows_thinking_streams_whatever_was_held_before_it(self):
        holder = ogx.CallHolder(self.TOOLS)
        assert holder.feed("<function=Bash>" + "x" * 300) == ""
        assert holder.end(whole=False)[1]
        assert holder.feed("So it is.") == "So it is."

    def test_what_is_held_has_a_bound(self):
        holder = ogx.CallHolder(self.TOOLS)
        text = '<tool_call>{"name": "Bash", "arguments": {"command": "' + "x" * ogx.MOST_HELD
        assert "".join(holder.feed(text[at : at + 999]) for at in range(0, len(text), 999))
        text = "So: <tool_call>[" * ogx.MOST_HELD
        for step in (len(text), 9_999):
            holder = ogx.CallHolder(self.TOOLS)
            handed = "".join(holder.feed(text[at : at + step]) for at in range(0, len(text), step))
            assert text.startswith(handed) and len(text) - len(handed) <= ogx.MOST_HELD

    @cases("unit", ["<", "[", "{", "`", "<tool_call>", "<function=Bash>", '{"name": "', "```",
                    '[TOOL_CALLS]{"name": "Bash", "arguments": {', "<tool_call>[[", '"a": "\\"',
                    "<arg_key>a</arg_key>", "<parameter=a>", '{"name":"Bash","arguments":{}}\n'])
    def test_hostile_text_costs_no_more_than_its_length(self, unit):
        def read(text):
            return self.read(text, 50), self.read(text)

        check_linear(read, lambda n: unit * (n // len(unit)), 10_000)

    @cases(("text", "schema", "value"), [
        ("5", {"type": "integer"}, 5), ("5", {}, "5"), ("5", {"type": "string"}, "5"),
        ("True", {"type": "boolean"}, True), ("[1]", {"type": "array"}, [1]),
        ("so", {"type": "integer"}, "so"), ("\na\nb\n", {}, "a\nb"),
        ("5", {"type": ["string", "null"]}, "5"), ("", {"type": "object"}, "")])
    def test_a_value_without_quotes_has_its_schemas_type(self, text, schema, value):
        assert ogx.typed_value(text, schema) == value


class TestEvents:
    def writer(self, used_ids=()):
        return ogx.MessageWriter(ogx.new_message("msg_1", "m", 5), used_ids)

    def finished(self, writer, reason="end_turn"):
        writer.finish(reason, None, ogx.Usage(1, 2))
        events = writer.take()
        check_grammar(events)
        return ogx.message_from_events(events)

    def test_a_message_holds_every_field_that_anthropic_requires(self):
        message = self.finished(self.writer())
        assert {"id", "type", "role", "content", "model", "stop_reason", "stop_sequence",
                "stop_details", "usage", "container"} <= set(message)  # fmt: skip
        assert {"cache_creation", "cache_creation_input_tokens", "cache_read_input_tokens",
                "inference_geo", "input_tokens", "output_tokens", "server_tool_use",
                "service_tier"} <= set(message["usage"])  # fmt: skip

    def test_blocks_are_opened_and_closed_in_one_place(self):
        (writer,) = (node for node in ast.parse(SOURCE).body
                     if getattr(node, "name", "") == "MessageWriter")  # fmt: skip
        inside = {
            method.name: {str(word) for node in ast.walk(method) if node is not method
                          for word in vars(node).values()}
            for method in writer.body if isinstance(method, ast.FunctionDef)
        }  # fmt: skip

        def users(*words):
            """The methods that name one of these: methods, constants, types of events."""
            return {name for name, found in inside.items() if found & {*words}}

        assert users("content_block_start") == {"_open"}
        assert users("content_block_stop") == {"_close"}
        assert users("content_block_delta", "DELTA_EVENT") == {"_delta", "append_escaped_delta"}
        assert users("_open") == users("_close") == {"_advance"}
        assert users("_delta") == {"_advance", "_close", "citation"}

    def test_a_change_of_kind_closes_one_block_and_opens_the_next(self):
        writer = self.writer()
        for words in ("a", "b"):
            writer.thinking(words)
        writer.text("c")
        writer.thinking("d")
        message = self.finished(writer)
        assert [(b["type"], b.get("text") or b.get("thinking")) for b in message["content"]] == [
            ("thinking", "ab"), ("text", "c"), ("thinking", "d"),
        ]  # fmt: skip

    def test_interleaved_tool_calls_are_written_one_after_the_other(self):
        writer = self.writer()
        writer.tool(0, "a", "A", '{"x":')
        writer.tool(1, "b", "B", '{"y":')
        writer.text("meanwhile")
        writer.tool(0, "", "", "1}")
        writer.tool(1, "", "", "2}")
        message = self.finished(writer)
        assert [b.get("input") or b["text"] for b in message["content"]] == [
            {"x": 1}, {"y": 2}, "meanwhile",
        ]  # fmt: skip
        assert message["stop_reason"] == "tool_use"

    def test_each_signature_ends_its_thinking(self):
        writer = self.writer()
        for words in ("a", "b"):
            writer.thinking(words)
            writer.signature(words.upper())
        blocks = self.finished(writer)["content"]
        assert [(b["thinking"], b["signature"]) for b in blocks] == [("a", "A"), ("b", "B")]

    def test_thinking_is_hidden_where_no_one_wants_to_see_it(self):
        writer = ogx.MessageWriter(ogx.new_message("m", "m", 1), hides_thinking=True)
        writer.thinking("secret")
        writer.signature("kept")
        writer.text("ok")
        kinds = [b["type"] for b in self.finished(writer)["content"]]
        assert kinds == ["redacted_thinking", "text"]

    def test_an_error_leaves_no_block_open_but_a_call(self):
        for begin in (lambda w: w.text("a"), lambda w: w.whole({"type": "redacted_thinking"})):
            writer = self.writer()
            begin(writer)
            writer.end_text()
            assert writer.take()[-1]["type"] == "content_block_stop"
        writer.tool(0, "a", "A", "{")
        writer.end_text()
        assert writer.take()[-1]["type"] == "content_block_delta"

    def test_a_stop_is_tool_use_only_where_a_tool_was_called(self):
        writer = self.writer()
        writer.text("ok")
        assert self.finished(writer, "tool_use")["stop_reason"] == "end_turn"

    def test_input_is_written_by_deltas_alone_since_claude_code_reads_no_other(self):
        writer = self.writer()
        writer.tool(0, "a", "A", '{"x": 1}')
        writer.finish("tool_use", None, ogx.Usage())
        _, start, piece_, *_ = writer.take()
        assert start["content_block"]["input"] == {}
        assert piece_["delta"] == {"type": "input_json_delta", "partial_json": '{"x": 1}'}

    def test_a_whole_call_is_closed_when_the_next_begins(self):
        writer = self.writer()
        writer.tool(0, "a", "A", "{}")
        writer.take()
        writer.tool(1, "b", "B", "")
        assert [e["type"] for e in writer.take()] == ["content_block_stop", "content_block_start"]

    def test_a_tool_block_opens_only_when_its_name_is_known(self):
        writer = self.writer()
        writer.tool(0, "a", "", '{"x"')
        assert writer.take() == []
        writer.tool(0, "", "A", ":1}")
        (block,) = self.finished(writer)["content"]
        assert (block["name"], block["input"]) == ("A", {"x": 1})

    def test_a_call_that_never_gets_a_name_is_an_error(self):
        writer = self.writer()
        writer.tool(0, "a", "", "{}")
        error = refused(writer.finish, "tool_use", None, ogx.Usage())
        assert error.message == "the upstream sent a tool call without a name"

    def test_no_input_is_an_empty_object(self):
        writer = self.writer()
        writer.tool(0, "a", "A", "")
        assert self.finished(writer)["content"][0]["input"] == {}

    @cases(
        ("pieces", "shown", "stopped"),
        [
            (["abc</bl", "ock>def"], "abc", "</block>"), (["abc</bl", "aah"], "abc</blaah", None),
            (["xENDy</block>"], "x", "END"), (["</block", ">"], "", "</block>"),
            (["ab", "EN"], "abEN", None), (["aE", "E", "ND"], "aE", "END"),
        ],
    )  # fmt: skip
    def test_stop_sequences_are_looked_for_by_us_too(self, pieces, shown, stopped):
        writer = ogx.MessageWriter(ogx.new_message("m", "m", 1), (), ("</block>", "END"))
        for piece in pieces:
            writer.text(piece)
        assert writer.stopped == stopped
        content = self.finished(writer)["content"]
        assert "".join(block["text"] for block in content) == shown

    @pytest.mark.parametrize("told", ['{"x": "unfin', '{"x": 1}}', "{x: 1}"])
    def test_input_that_breaks_off_ends_as_max_tokens_and_half_a_call_is_words(self, told):
        writer = self.writer()
        writer.text("Look:")
        writer.tool(0, "a", "A", told)
        message = self.finished(writer, "tool_use")
        assert message["stop_reason"] == "max_tokens"
        assert message["content"] == [text("Look:"), text(f"[A call of A that broke off: {told}]")]

    @cases("call_id", ["", "call_0", "same"])
    def test_an_id_that_the_conversation_has_is_replaced(self, call_id):
        writer = self.writer(["call_0"])
        writer.tool(0, "same", "A", "{}")
        writer.tool(1, call_id, "B", "{}")
        ids = [b["id"] for b in self.finished(writer)["content"]]
        assert ids[0] == "same" and re.fullmatch("toolu_[0-9a-f]{24}", ids[1])

    def test_ids_keep_to_anthropics_alphabet(self):
        writer = self.writer()
        writer.tool(0, "fc_9:8.7/x", "A", "{}")
        assert self.finished(writer)["content"][0]["id"] == "fc_9_8_7_x"

    def test_an_event_is_one_line_of_ascii_json(self):
        data = ogx.sse_bytes({"type": "t", "text": "é\n\u2028\ud800"})
        assert data == b'event: t\ndata: {"type":"t","text":"\\u00e9\\n\\u2028\\ud800"}\n\n'

    @pytest.mark.parametrize("name", ["text", "thinking", "partial_json", "signature"])
    def test_the_quick_way_for_deltas_writes_the_same_bytes(self, name):
        for words in ("plain", 'q"\\\n\u2028é漢😀\ud800\x00', ""):
            kind = {"partial_json": "input_json_delta"}.get(name, f"{name}_delta")
            event = {"type": "content_block_delta", "index": 12,
                     "delta": {"type": kind, name: words}}  # fmt: skip
            data = json.dumps(event, separators=(",", ":")).encode()
            assert ogx.sse_bytes(event) == b"event: content_block_delta\ndata: " + data + b"\n\n"

    SPELLINGS = (
        b"data: one\n\ndata: two\n\n",
        b"data: one\r\n\r\ndata: two\r\n\r\n",
        b"data: one\r\rdata: two\r\r",
        b"data:one\n\n\n\ndata:two\n\n",
        b": comment\nevent: x\nid: 1\ndata: one\n\nretry: 5\n\ndata: two\n\n",
        b"data: one\r\n\ndata: two\r\n\r",
    )

    @cases("stream", SPELLINGS)
    def test_events_cut_anywhere(self, stream):
        for cut in range(len(stream) + 1):
            reader = ogx.SseReader()
            items = reader.feed(stream[:cut]) + reader.feed(stream[cut:]) + reader.end()
            assert items == [b"one", b"two"], cut
        reader = ogx.SseReader()
        assert [i for byte in stream for i in reader.feed(bytes([byte]))] == [b"one", b"two"]

    @cases("stream", SPELLINGS)
    def test_a_complete_event_is_never_held_back(self, stream):
        assert ogx.SseReader().feed(stream) == [b"one", b"two"]

    def test_several_data_lines_are_one_event(self):
        assert ogx.SseReader().feed(b"data: a\ndata:\ndata: b\n\n") == [b"a\n\nb"]

    def test_the_end_of_a_stream_completes_its_last_event(self):
        reader = ogx.SseReader()
        assert reader.feed(b"data: last") == [] and reader.end() == [b"last"]

    def test_an_event_without_end_is_bounded(self, monkeypatch):
        monkeypatch.setattr(ogx, "MAX_EVENT", 1000)
        reader = ogx.SseReader()
        assert reader.feed(b"data: " + b"x" * 900) == []
        assert refused(reader.feed, b"x" * 200).status == 502


def checked(body):
    return ogx.checked_json(json.dumps(body).encode())


def chat(body, kind="openai", **fields):
    return ogx.chat_request(checked(body), model(kind, **fields))


class TestChat:
    # -- the request

    def test_a_small_request(self):
        body = chat(request("hi", system="be brief", temperature=0.5, top_p=0.9, top_k=5,
                            stop_sequences=["a"], metadata={"user_id": "u"}))  # fmt: skip
        assert body == {
            "model": "gpt-x",
            "messages": [{"role": "system", "content": "be brief"},
                         {"role": "user", "content": "hi"}],
            "max_completion_tokens": 100,
            "temperature": 0.5, "top_p": 0.9, "stop": ["a"],
            "prompt_cache_key": ogx.conversation_key(request(metadata={"user_id": "u"})),
        }  # fmt: skip

    def test_four_stop_sequences_are_sent_and_no_fifth(self):
        assert chat(request(stop_sequences=[*"abcde"]))["stop"] == [*"abcd"]

    @cases(
        ("user_id", "key"),
        [
            ('{"device_id":"d","session_id":"s-1"}', "s-1"),  # Claude Code
            (json.dumps({"device_id": "d" * 64, "session_id": "s" * 65}), "too long"),
            ("x" * 500, "23f24cc7c2a75fbb8b0c1b1c5d2e7c11"),
            ('{"session_id":5}', ""), (None, ""), ("", ""),
        ],
    )  # fmt: skip
    def test_a_conversation_keeps_to_one_cache(self, user_id, key):
        made = ogx.conversation_key(request(metadata={"user_id": user_id}))
        assert len(made) <= 64 and bool(made) == bool(user_id)
        assert made == key or len(made) == 32
        body = request(metadata={"user_id": user_id})
        for there in (chat(body), responses(body)):
            assert there.get("prompt_cache_key", "") == made
            assert not {"user", "safety_identifier", "metadata"} & set(there)
        assert "prompt_cache_key" not in chat(request(metadata={"user_id": "u"}), "vllm")

    def test_rows_differ_where_providers_do(self):
        body = chat(request("hi", top_k=5), "vllm")
        assert (body["max_tokens"], body["top_k"]) == (100, 5)
        assert "max_completion_tokens" not in body

    def test_a_stream_asks_for_usage(self):
        body = chat(request(stream=True))
        assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})

    def test_the_smallest_limit_is_raised_only_where_that_is_demanded(self):
        assert chat(request(max_tokens=1))["max_completion_tokens"] == 1
        assert responses(request(max_tokens=1))["max_output_tokens"] == 16

    def test_what_only_anthropic_knows_is_not_sent_elsewhere(self):
        body = chat(request(
            user([{**text("x"), "cache_control": {"type": "ephemeral"}}]),
            tools=[{**tool(), "defer_loading": True, "cache_control": {}, "strict": False}],
            context_management={"edits": []}, thinking={"type": "adaptive"}, betas=["b"],
            service_tier="auto", metadata={"user_id": "u"}), "vllm")  # fmt: skip
        assert set(body) == {"model", "messages", "max_tokens", "tools"}
        assert set(body["tools"][0]["function"]) == {"name", "description", "parameters"}
        assert body["messages"] == [{"role": "user", "content": "x"}]

    def test_fireworks_is_streamed_above_its_limit(self):
        assert "stream" not in chat(request(max_tokens=4096), "fireworks")
        assert chat(request(max_tokens=4097), "fireworks")["stream"] is True

    def test_a_known_output_limit_is_kept(self):
        assert chat(request(max_tokens=32000), max_output=16384)["max_completion_tokens"] == 16384

    MESSAGES = (
        ("text parts become one string",
         [user(text("a"), text("b"))], [{"role": "user", "content": "a\n\nb"}]),
        ("an image by value and by URL",
         [user(text("a"), image(), {"type": "image", "source": {"type": "url", "url": "http://i"}})],
         [{"role": "user", "content": [
             {"type": "text", "text": "a"},
             {"type": "image_url", "image_url": {"url": "data:image/png;base64,aW1n"}},
             {"type": "image_url", "image_url": {"url": "http://i"}}]}]),
        ("a PDF",
         [user(pdf(title="My paper"), text("a"))],
         [{"role": "user", "content": [
             {"type": "file", "file": {"filename": "My paper.pdf",
                                       "file_data": "data:application/pdf;base64,JVBERi0="}},
             {"type": "text", "text": "a"}]}]),
        ("a tool call and its result",
         [user("go"), assistant(text("ok"), call("c1", command="ls")), user([result("c1", "out")])],
         [{"role": "user", "content": "go"},
          {"role": "assistant", "content": "ok", "tool_calls": [
              {"id": "c1", "type": "function",
               "function": {"name": "Bash", "arguments": '{"command": "ls"}'}}]},
          {"role": "tool", "tool_call_id": "c1", "content": "out"}]),
        ("a call without text has null content",
         [assistant([call("c1")]), user([result("c1", None)])],
         [{"role": "assistant", "content": None, "tool_calls": [
             {"id": "c1", "type": "function", "function": {"name": "Bash", "arguments": "{}"}}]},
          {"role": "tool", "tool_call_id": "c1", "content": "(no output)"}]),
        ("an error result says so",
         [assistant([call("c1")]), user([result("c1", "boom", is_error=True)])],
         [{"role": "assistant", "content": None, "tool_calls": [
             {"id": "c1", "type": "function", "function": {"name": "Bash", "arguments": "{}"}}]},
          {"role": "tool", "tool_call_id": "c1",
           "content": "[The tool reported an error]\n\nboom"}]),
        ("thinking in the history stays with its model",
         [assistant({"type": "thinking", "thinking": "hm", "signature": ""}, text("a")), user("b")],
         [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]),
        ("a turn of thinking alone is left out, and its neighbours join",
         [user("a"), assistant([{"type": "thinking", "thinking": "hm"}]), user("b")],
         [{"role": "user", "content": "a\n\nb"}]),
        ("a system message in mid-conversation keeps its place",
         [user("a"), assistant("b"), user("c"), {"role": "system", "content": "s"}, assistant("d"),
          user("e")],
         [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
          {"role": "user", "content": "c"}, {"role": "system", "content": "s"},
          {"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}]),
        ("one directly after the first message goes before that one's words",
         [user(text("<system-reminder>x</system-reminder>"), text("a")),
          {"role": "system", "content": "s"}, assistant("b"), user("c")],
         [{"role": "user", "content": "<system-reminder>x</system-reminder>"},
          {"role": "system", "content": "s"}, {"role": "user", "content": "a"},
          {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]),
    )  # fmt: skip

    @pytest.mark.parametrize(("messages", "expected"), [m[1:] for m in MESSAGES],
                             ids=[m[0] for m in MESSAGES])  # fmt: skip
    def test_messages(self, messages, expected):
        assert chat(request(*messages))["messages"] == expected

    def test_where_templates_are_strict_a_system_message_becomes_marked_user_text(self):
        turns = [user("a"), {"role": "system", "content": [text("s")]}, assistant("b"), user("c")]
        assert chat(request(*turns), "vllm")["messages"] == [
            {"role": "user", "content": "<system-reminder>\ns\n</system-reminder>\n\na"},
            {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
        ]

    def test_where_roles_must_alternate_text_after_results_goes_into_the_last_one(self):
        turns = [user("go"), assistant([call("a")]), user(result("a", "out"), text("and?"))]
        kind = dataclasses.replace(ogx.PROVIDER_KINDS["vllm"], user_after_tool=False)
        owner = dataclasses.replace(provider("vllm"), kind=kind)
        asked = ogx.Model("m", owner, "m")
        messages = ogx.chat_messages(request(*turns), asked)
        assert [m["role"] for m in messages] == ["user", "assistant", "tool"]
        assert messages[-1]["content"] == "out\n\nand?"

    def test_there_an_image_from_a_result_follows_a_word_of_the_model(self):
        turns = [user("go"), assistant([call("a")]), user([result("a", [image()])])]
        messages = ogx.chat_messages(request(*turns), model("mistral"))
        assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant", "user"]
        assert messages[3]["content"] and messages[4]["content"][1]["type"] == "image_url"

    def test_the_model_sees_its_calls_as_it_wrote_them_without_escapes(self):
        turns = [user("go"), assistant([call("a", command="echo é \U0001f600 \ud800")])]
        message = chat(request(*turns))["messages"][1]
        words = '{"command": "echo é \U0001f600 \ud800"}'
        assert message["tool_calls"][0]["function"]["arguments"] == words
        assert responses(request(*turns))["input"][1]["arguments"] == words

    def test_images_of_tool_results_follow_all_tool_messages(self):
        turns = [assistant(call("c1"), call("c2")),
                 user(result("c1", [text("see"), image()]), result("c2", [pdf()]), text("and?"))]
        tool_1, tool_2, after = chat(request(*turns))["messages"][1:]
        assert tool_1["content"] == "see\n[image 1 from tool call c1] follows in the next user " \
                                    "message."  # fmt: skip
        assert tool_2["role"] == "tool" and "[document 2 from tool call c2]" in tool_2["content"]
        assert [p["type"] for p in after["content"]] == [
            "text", "image_url", "text", "file", "text"
        ]
        assert after["content"][-1]["text"] == "and?"

    def test_a_pdf_that_the_upstream_cannot_take_is_told_as_text(self):
        (message,) = chat(request(user(pdf(title="P"), text("a"))), "vllm")["messages"]
        assert message["content"].startswith("[The document 'P' could not be passed on")

    def test_reasoning_goes_back_to_those_who_demand_it(self):
        turns = [assistant({"type": "thinking", "thinking": "hm"}, call("c1")),
                 user([result("c1")]), assistant("x"), user("y")]  # fmt: skip
        messages = chat(request(*turns), "deepseek")["messages"]
        assert [m.get("reasoning_content") for m in messages] == ["hm", None, " ", None]

    DETAILS = (
        {"type": "reasoning.text", "text": "h", "format": "f", "index": 0},
        {"type": "reasoning.text", "text": "m", "signature": None, "index": 0},
        {"type": "reasoning.text", "signature": "sig", "index": 0},
        {"type": "reasoning.encrypted", "data": "enc", "id": "rs", "index": 1},
    )

    @cases("words", [(None, None), ("h", "m")])
    def test_reasoning_details_come_back_whole_on_the_next_turn(self, words):
        chunks = [delta(reasoning_details=[detail], reasoning=shown)
                  for detail, shown in zip(self.DETAILS, (*words, None, None))]  # fmt: skip
        piece = fragment(0, "c1", "Bash", "{}")
        openrouter = model("openrouter", "vendor/m")
        message = folded(*chunks, delta(tool_calls=[piece]), delta("tool_calls"),
                         by_model=openrouter)  # fmt: skip
        thinking, use = message["content"]
        assert (thinking["type"], thinking["thinking"], use["type"]) == (
            "thinking", "hm", "tool_use"
        )
        turns = [user("a"), {"role": "assistant", "content": message["content"]},
                 user([result("c1")])]  # fmt: skip
        sent = chat(request(*turns), "openrouter", upstream_id="vendor/m")["messages"][1]
        assert sent["reasoning_details"] == [
            {"type": "reasoning.text", "text": "hm", "format": "f", "signature": "sig",
             "index": 0}, self.DETAILS[3],
        ]  # fmt: skip
        for kind, upstream_id in (("openrouter", "other/m"), ("groq", "vendor/m")):
            others = chat(request(*turns), kind, upstream_id=upstream_id)["messages"][1]
            assert set(others) == {"role", "content", "tool_calls"}

    def test_reasoning_details_after_the_text_are_kept_too(self):
        encrypted = self.DETAILS[3]
        message = folded(delta(content="ok"), delta("stop", reasoning_details=[encrypted]))
        assert [b["type"] for b in message["content"]] == ["text", "redacted_thinking"]
        assert json.loads(message["content"][1]["data"])["reasoning_details"] == [encrypted]

    def test_geminis_signature_comes_back_on_the_call_it_was_on(self):
        extra = {"google": {"thought_signature": "sig"}}
        chunk = delta(tool_calls=[{**fragment(0, "a", "A", "{}"), "extra_content": extra},
                                  fragment(1, "b", "B", "{}")])  # fmt: skip
        gemini = model("gemini")
        message = folded(chunk, delta("tool_calls"), by_model=gemini)
        assert [b["type"] for b in message["content"]] == [
            "redacted_thinking", "tool_use", "tool_use"
        ]
        body = request({"role": "assistant", "content": message["content"]},
                       user(result("a"), result("b")))  # fmt: skip
        skip = dict(ogx.SKIP_SIGNATURE)["extra_content"]
        for kind, upstream_id, expected in (("gemini", "gpt-x", extra), ("gemini", "other", skip),
                                            ("vllm", "gpt-x", None)):  # fmt: skip
            first, second = chat(body, kind, upstream_id=upstream_id)["messages"][0]["tool_calls"]
            assert first.get("extra_content") == expected and "extra_content" not in second

    def test_a_signature_that_is_repeated_is_one(self):
        signed = {"extra_content": {"google": {"thought_signature": "sig"}}}
        message = folded(*(delta(tool_calls=[{**fragment(0, "a", "A", part), **signed}])
                           for part in ('{"x"', ":1}")), delta("tool_calls"))  # fmt: skip
        assert [b["type"] for b in message["content"]] == ["redacted_thinking", "tool_use"]

    def test_reasoning_that_a_provider_refused_to_take_back_is_not_sent_again(self):
        kept = ogx.encode_signature("chat", "openrouter/gpt-x", {"reasoning_details": [{}]})
        turns = [assistant({"type": "redacted_thinking", "data": kept}, text("a")), user("b")]
        taught = ogx.model_with_overrides(model("openrouter"), [
            ogx.Lesson("override", "own_reasoning", False)])  # fmt: skip
        for found, fields in ((model("openrouter"), {"reasoning_details"}), (taught, set())):
            sent, _ = ogx.chat_request(request(*turns), found)["messages"]
            assert set(sent) - {"role", "content"} == fields

    def test_a_signature_waits_until_the_call_before_it_is_whole(self):
        signed = {**fragment(1, "b", "B", "{}"), "extra_content": {"google": {}}}
        message = folded(delta(tool_calls=[fragment(0, "a", "A", '{"x"'), signed]),
                         delta(tool_calls=[fragment(0, arguments=":1}")]), delta("tool_calls"))
        assert [b["type"] for b in message["content"]] == [
            "tool_use", "redacted_thinking", "tool_use"
        ]
        assert message["content"][0]["input"] == {"x": 1}

    def test_nine_character_ids_where_they_are_demanded(self):
        turns = [assistant(call("toolu_1"), call("abcDEF123")),
                 user(result("toolu_1"), result("abcDEF123"))]  # fmt: skip
        one, *answers = chat(request(*turns), "mistral")["messages"]
        ids = [c["id"] for c in one["tool_calls"]]
        assert ids == [m["tool_call_id"] for m in answers] and ids[1] == "abcDEF123"
        assert re.fullmatch("[a-zA-Z0-9]{9}", ids[0])

    @pytest.mark.parametrize("kind", ["openai", "azure"])
    def test_longer_ids_are_hashed_where_they_are_bounded(self, kind):
        ids = ["c" * 40, "c" * 41, "c" * 42, "c" * 41 + "\u00e9", "toolu_01", "a.b:0"]
        turns = [assistant(*map(call, ids)), user(*map(result, ids))]
        one, *answers = chat(request(*turns), kind)["messages"]
        there = [made["id"] for made in one["tool_calls"]]
        assert there == [answer["tool_call_id"] for answer in answers]
        assert len(set(there)) == len(ids) and all(len(one) <= 40 for one in there)
        assert [one for one in there if one in ids] == ["c" * 40, "toolu_01", "a.b:0"]
        items = responses(request(*turns), tool_ids=ogx.PROVIDER_KINDS[kind].tool_ids)["input"]
        assert [item["call_id"] for item in items] == there + there
        own, *_ = chat(request(*turns), "vllm")["messages"]  # whoever made an id knows it
        assert [made["id"] for made in own["tool_calls"]] == ids

    def test_where_no_tool_can_be_named_only_that_one_is_sent(self):
        body = chat(request(tools=[tool("A"), tool("B")],
                            tool_choice={"type": "tool", "name": "B"}), "mistral")  # fmt: skip
        assert body["tool_choice"] == "required"
        assert [t["function"]["name"] for t in body["tools"]] == ["B"]

    def test_gemini_gets_the_signature_that_stands_for_none(self):
        turns = [assistant([call("a")]), user([result("a")])]
        (made,) = chat(request(*turns), "gemini")["messages"][0]["tool_calls"]
        assert made["extra_content"] == {
            "google": {"thought_signature": "skip_thought_signature_validator"}
        }

    def test_tools(self):
        schema = {"$schema": "s", "properties": {"a": {"type": "string"}}, "required": ["a"]}
        body = chat(request(tools=[{"name": "A", "description": "d", "input_schema": schema},
                                   {"type": "custom", "name": "B", "input_schema": {}}]))
        assert [t["function"] for t in body["tools"]] == [
            {"name": "A", "description": "d",
             "parameters": {"type": "object", "properties": {"a": {"type": "string"}},
                            "required": ["a"]}},
            {"name": "B", "parameters": {"type": "object", "properties": {}}},
        ]  # fmt: skip

    UNION = {
        "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False,
        "$defs": {"C": {"type": "object", "properties": {"c": {}}, "required": ["c", "b"]}},
        "anyOf": [{"properties": {"b": {"type": "string"}}, "required": ["b"]},
                  {"$ref": "#/$defs/C"}],
        "allOf": [{"properties": {"a": {"type": "integer"}}}],
    }  # fmt: skip

    @pytest.mark.parametrize("kind", ["openai", "azure", "gemini"])
    def test_where_a_root_may_not_be_a_union_it_allows_all_that_its_branches_do(self, kind):
        (made,) = chat(request(tools=[tool(**self.UNION)]), kind)["tools"]
        parameters = made["function"]["parameters"]
        assert parameters == {
            "type": "object",
            "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                           "b": {"type": "string"}, "c": {}},
            "required": ["a"],
        }  # fmt: skip
        lost = {name: self.UNION[name] for name in ("anyOf", "allOf")}
        assert made["function"]["description"].endswith(json.dumps(lost))

    def test_elsewhere_unions_stay(self):
        (made,) = chat(request(tools=[tool(**self.UNION)]), "vllm")["tools"]
        assert made["function"]["parameters"] == {"type": "object", **self.UNION}
        assert made["function"]["description"] == "d"

    def test_keywords_that_a_row_names_are_left_out_and_properties_of_that_name_stay(self):
        schema = {"properties": {"format": {"type": "string", "format": "date", "minLength": 1},
                                 "n": {"$schema": "x", "exclusiveMinimum": 0}},
                  "propertyNames": {}}  # fmt: skip
        for kind, kept in (("gemini", {"format": {"type": "string", "minLength": 1}, "n": {}}),
                           ("vllm", schema["properties"])):  # fmt: skip
            (made,) = chat(request(tools=[tool(**schema)]), kind)["tools"]
            assert made["function"]["parameters"]["properties"] == kept

    NAMED = ("pattern", "format", "title", "default", "$schema", "minLength", "enum", "const")

    @pytest.mark.parametrize("holder", ["properties", "patternProperties", "$defs", "definitions",
                                        "dependentSchemas"])  # fmt: skip
    def test_what_properties_are_called_is_no_keyword(self, holder):
        inner = {name: {"type": "string", "pattern": "^a"} for name in self.NAMED}
        schema = {holder: inner, "required": [*self.NAMED]}
        made = ogx.without_keywords(schema, self.NAMED, lost := [])
        assert made == {holder: {name: {"type": "string"} for name in self.NAMED},
                        "required": [*self.NAMED]}  # fmt: skip
        assert lost == [(f"input.{name}", "pattern", "^a") for name in self.NAMED]

    @pytest.mark.parametrize("keyword", ["enum", "const", "default", "examples", "input"])
    def test_what_stands_in_values_is_no_keyword(self, keyword):
        schema = {"properties": {"a": {keyword: [{"pattern": "x", "format": {"title": 1}}]}}}
        made = ogx.without_keywords(schema, ["pattern", "format", "title"], lost := [])
        assert made == schema and lost == []

    def taught(self, kind="openai-compatible", **row):
        return dataclasses.replace(ogx.PROVIDER_KINDS[kind], **row)

    def test_what_a_schema_loses_stands_in_the_description_where_it_is_short(self):
        schema = {"title": "T", "$schema": "x", "minProperties": 1, "properties": {
            "to": {"type": "string", "pattern": "^\\d", "maxLength": 9},
            "in": {"type": "array", "items": {"format": "uri"}},
            "long": {"pattern": "x" * 300}, "n": {"default": 5, "additionalProperties": False}}}
        gone = ("$schema", "additionalProperties", "default", "format", "minProperties", "pattern",
                "title")  # fmt: skip
        given = tool(**schema)
        made = ogx.plainer_tool(given, self.taught(refused_keywords=gone))
        assert made["description"].split("\n") == [
            "d", "input has minProperties 1", 'input.to has pattern "^\\\\d"',
            'input.in has format "uri"', "input.n has default 5",
        ]  # fmt: skip
        assert made["input_schema"]["properties"] == {
            "to": {"type": "string", "maxLength": 9}, "in": {"type": "array", "items": {}},
            "long": {}, "n": {},
        }  # fmt: skip
        assert given == tool(**schema)  # the client's own is as it was
        many = {f"p{n}": {"pattern": "^a"} for n in range(1000)}
        made = ogx.plainer_tool(tool(properties=many), self.taught(refused_keywords=gone))
        assert 100 < len(made["description"]) <= 1 + ogx.MAX_RULES

    def test_a_description_is_cut_and_what_the_schema_loses_still_stands_there(self):
        row = self.taught(max_description=100, refused_keywords=("pattern",))
        given = {**tool(properties={"a": {"pattern": "^a"}}), "description": "x" * 500}
        words = ogx.plainer_tool(given, row)["description"]
        assert len(words) == 100 and words.endswith('xx\ninput.a has pattern "^a"')
        assert ogx.plainer_tool({**tool(), "description": "short"}, row)["description"] == "short"
        bare = {"name": "B", "input_schema": {}}
        assert ogx.plainer_tool(bare, row) == bare

    @pytest.mark.parametrize(
        ("given", "made"),
        [
            pytest.param({"type": ["string", "null"]}, {"type": "string"}, id="list"),
            pytest.param({"type": ["null", "integer", "string"]}, {"type": "integer"}, id="null"),
            pytest.param({"type": "array"}, {"type": "array", "items": {"type": "string"}},
                         id="items"),
            pytest.param({"type": "array", "items": {}},
                         {"type": "array", "items": {"type": "string"}}, id="empty-items"),
            pytest.param({"type": ["array", "null"], "items": [{"type": ["number", "null"]}, {}]},
                         {"type": "array", "items": {"type": "number"}}, id="tuple"),
            pytest.param({"type": "string", "anyOf": [{"enum": ["a"]}, {"type": "integer"}]},
                         {"anyOf": [{"type": "string", "enum": ["a"]}, {"type": "integer"}]},
                         id="beside"),
            pytest.param({"oneOf": [{"type": "string"}, {"type": "number"}], "description": "d"},
                         {"anyOf": [{"type": "string"}, {"type": "number"}], "description": "d"},
                         id="oneOf"),
            pytest.param({"anyOf": [{"type": "null"}, {"type": "string"}], "description": "d"},
                         {"type": "string", "description": "d"}, id="optional"),
            pytest.param({"allOf": [{"$ref": "#/$defs/S"}], "description": "d"},
                         {"type": "string", "enum": ["x"], "description": "d"}, id="allOf"),
            pytest.param({"properties": {"o": {"type": "string"}}, "oneOf": [
                             {"properties": {"q": {"$ref": "#/$defs/S"}}}, {"required": ["o"]}]},
                         {"type": "object", "properties": {
                             "o": {"type": "string"}, "q": {"type": "string", "enum": ["x"]}}},
                         id="objects"),
            pytest.param({"$ref": "#/$defs/S", "description": "d"},
                         {"type": "string", "enum": ["x"], "description": "d"}, id="ref"),
            pytest.param({"type": "array", "items": {"$ref": "#/properties/other"}},
                         {"type": "array", "items": {"type": "boolean"}}, id="path"),
            pytest.param({"$ref": "#/$defs/Tree"},
                         {"type": "object", "properties": {
                             "$defs": {"type": "string"},
                             "left": {"type": "object", "description": "l"},
                             "kids": {"type": "array", "items": {"type": "object"}}}},
                         id="recursive"),
            pytest.param({"$ref": "#/$defs/Gone"}, {"type": "object"}, id="dangling"),
            pytest.param({"$ref": "https://example.com/x"}, {"type": "object"}, id="foreign"),
            pytest.param({}, {}, id="anything"),
            pytest.param({"type": "object", "additionalProperties": {"$ref": "#/$defs/S"}},
                         {"type": "object", "additionalProperties": {
                             "type": "string", "enum": ["x"]}}, id="map"),
            pytest.param({"enum": [{"$ref": "#/$defs/S"}]}, {"enum": [{"$ref": "#/$defs/S"}]},
                         id="values"),
            *(pytest.param({"type": 5, "anyOf": odd, "items": odd, "properties": odd, "$ref": odd},
                           None, id=f"odd-{odd}") for odd in ("x", 5, None, True, [None], [[]])),
        ],
    )  # fmt: skip
    def test_the_normal_form_of_a_schema(self, given, made):
        defs = {"S": {"type": ["string", "null"], "enum": ["x"]},
                "Tree": {"type": "object", "properties": {
                    "$defs": {"type": "string"},  # so called
                    "left": {"$ref": "#/$defs/Tree", "description": "l"},
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}}}}  # fmt: skip
        root = {"$defs": defs, "type": "object", "required": ["given"],
                "properties": {"given": given, "other": {"type": "boolean"}}}  # fmt: skip
        before = copy.deepcopy(root)
        plain = ogx.plain_schema(root)
        assert root == before and {*plain} == {"type", "required", "properties"}
        assert made is None or plain["properties"]["given"] == made
        assert ogx.plain_schema(plain) == plain

    def test_what_branches_say_of_one_property_is_no_deeper_for_more_of_them(self):
        """Providers allow few levels, and Python's own JSON a thousand."""
        kinds = [{"const": number} for number in range(2000)]
        plain = ogx.plain_schema({"oneOf": [{"properties": {"kind": kind}} for kind in kinds]})
        assert plain["properties"] == {"kind": {"anyOf": kinds}}

    def test_what_branches_agree_on_is_no_union(self):
        one, other = {"type": "string"}, {"type": "integer"}
        plain = ogx.plain_schema({"properties": {"a": one, "b": one}, "anyOf": [
            {"properties": {"a": one}}, {"properties": {"a": one, "b": other, "c": other}}]})
        assert plain["properties"] == {"a": one, "b": {"anyOf": [one, other]}, "c": other}

    def test_a_root_that_is_a_reference_or_a_union_becomes_one_object(self):
        branch = {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]}
        root = {"$ref": "#/definitions/Both", "definitions": {
            "One": branch, "Both": {"oneOf": [{"$ref": "#/definitions/One"}, {"type": "null"}]}}}
        merged = {"type": "object", "properties": {"b": {"type": "string"}}}
        assert ogx.plain_schema(root) == merged
        row = self.taught(refused_keywords=("$ref",))
        made = ogx.plainer_tool({"name": "T", "input_schema": {"anyOf": [branch]}}, row)
        assert made["input_schema"] == merged
        assert made["description"].endswith(json.dumps({"anyOf": [branch]}))

    def test_references_that_multiply_are_inlined_while_there_is_room(self):
        """Each definition names the next one ten times: ten to the power of thirty."""
        defs = {f"D{n}": {"type": "object", "description": "x" * 50, "properties": {
            f"p{k}": {"$ref": f"#/$defs/D{n + 1}"} for k in range(10)}} for n in range(30)}
        for root in ({"$ref": "#/$defs/D0", "$defs": defs},
                     {"properties": {str(k): {"$ref": "#"} for k in range(300)}},
                     {"anyOf": [{"$ref": "#/$defs/D0"}] * 100, "$defs": defs}):  # fmt: skip
            size = len(json.dumps(ogx.plain_schema(root)))
            assert size < 5 * (ogx.MAX_INLINED + len(json.dumps(root)))

    @pytest.mark.parametrize("make", [
        lambda n: {"properties": {f"p{k}": {"type": ["string", "null"], "pattern": "a" * 50}
                                  for k in range(n)}},
        lambda n: {"anyOf": [{"properties": {f"p{k}": {"$ref": "#/$defs/A"}}} for k in range(n)],
                   "$defs": {"A": {"type": "array"}}},
        lambda n: {"properties": {"a": {"description": "d" * 100, "anyOf": [
            {"enum": [str(k)]} for k in range(n)], "type": "string"}}},
    ], ids=["wide", "union", "beside"])  # fmt: skip
    def test_what_a_schema_takes_is_linear_in_its_size(self, make):
        row = self.taught(refused_keywords=("pattern", "$ref"))
        bodies, spent = [tool(**make(n)) for n in (1000, 8000)], [[], []]
        for place, body in enumerate(bodies * 3):
            begun = cpu_time()
            ogx.plainer_tool(body, row)
            spent[place % 2].append(cpu_time() - begun)
        assert min(spent[1]) < 24 * min(spent[0])

    @pytest.mark.parametrize("kind", ["openai", "groq"])
    def test_more_tools_than_the_upstream_takes_are_left_out_and_told(self, kind):
        tools = [tool(f"t{number}") for number in range(130)]
        body = chat(request(tools=tools, tool_choice={"type": "tool", "name": "t129"}), kind)
        assert [t["function"]["name"] for t in body["tools"]] == [f"t{n}" for n in range(128)]
        assert "not available through this gateway: t128, t129." in body["messages"][0]["content"]
        assert "tool_choice" not in body
        assert len(chat(request(tools=tools), "vllm")["tools"]) == 130

    @cases(
        ("choice", "fields"),
        [
            ({"type": "auto"}, {"tool_choice": "auto"}),
            ({"type": "any"}, {"tool_choice": "required"}),
            ({"type": "none"}, {"tool_choice": "none"}),
            ({"type": "tool", "name": "Bash"},
             {"tool_choice": {"type": "function", "function": {"name": "Bash"}}}),
            ({"type": "tool", "name": "web_search"}, {}),
            ({"type": "auto", "disable_parallel_tool_use": True},
             {"tool_choice": "auto", "parallel_tool_calls": False}),
            (None, {}),
        ],
    )  # fmt: skip
    def test_tool_choice(self, choice, fields):
        body = chat(request(tools=[tool()], tool_choice=choice))
        assert {k: v for k, v in body.items() if k in ("tool_choice", "parallel_tool_calls")} == (
            fields
        )

    def test_without_tools_there_is_no_choice(self):
        body = chat(request(tools=[], tool_choice={"type": "auto"}))
        assert "tools" not in body and "tool_choice" not in body

    def test_a_tool_of_anthropics_servers_is_told_to_the_model(self):
        tools = [{"type": "web_search_20250305", "name": "web_search"}, {"type": "mcp_toolset"}]
        body = chat(request(tools=tools))
        assert "tools" not in body
        told = body["messages"][0]["content"]
        assert "not available through this gateway: web_search, mcp_toolset." in told

    def test_the_placeholder_for_deferred_tools_is_dropped_in_silence(self):
        tools = [{**tool("DeferredToolPlaceholder"), "defer_loading": True},
                 {**tool("Found"), "defer_loading": True}]  # fmt: skip
        body = chat(request(tools=tools))
        assert [t["function"]["name"] for t in body["tools"]] == ["Found"]
        assert body["messages"][0]["role"] == "user"

    def test_odd_tool_names_are_mapped_both_ways_without_collision(self):
        names = ["x" * 80 + "1", "x" * 80 + "2", "a.b", "a b", "plain"]
        body = request(assistant([call("c1", names[0])]), user([result("c1")]),
                       tools=[tool(n) for n in names])  # fmt: skip
        sent = chat(body)
        there = [t["function"]["name"] for t in sent["tools"]]
        assert len(set(there)) == 5 and all(re.fullmatch("[A-Za-z0-9_-]{1,64}", n) for n in there)
        assert sent["messages"][0]["tool_calls"][0]["function"]["name"] == there[0]
        piece = fragment(0, "c2", there[1], "{}")
        message = folded(delta(tool_calls=[piece]), delta("tool_calls"), body=body)
        assert message["content"][0]["name"] == names[1]

    @cases(
        ("upstream_id", "fields", "effort"),
        [
            ("gpt-5.4", {"output_config": {"effort": "low"}}, "low"),
            ("gpt-5.4", {"output_config": {"effort": "max"}}, "max"),
            ("o3", {"thinking": {"type": "enabled", "budget_tokens": 2048}}, "low"),
            ("o3", {"thinking": {"type": "enabled", "budget_tokens": 8192}}, "medium"),
            ("o3", {"thinking": {"type": "enabled", "budget_tokens": 31999}}, "high"),
            ("o3", {"thinking": {"type": "adaptive"}}, None),
            ("o3", {"thinking": {"type": "between_tools"}}, None),
            ("o3", {"thinking": {"type": "disabled"}}, "none"),
            ("o3", {"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}}, "none"),
            ("o3", {"output_config": {"effort": "low"}, "messages": [
                {"role": "system", "output_config": {"effort": "high"}}, user("x"),
                {"role": "system", "content": "s"}]}, "high"),
            ("gpt-4o", {"thinking": {"type": "enabled", "budget_tokens": 2048}}, None),
            ("gpt-4o", {"output_config": {"effort": "high"}}, None),
            ("openai/gpt-oss-120b", {"output_config": {"effort": "xhigh"}}, "xhigh"),
            ("Qwen/Qwen3-8B", {"output_config": {"effort": "low"}}, "low"),
            ("Qwen/Qwen3-Coder-30B", {"output_config": {"effort": "low"}}, None),
        ],
    )
    def test_effort_only_where_the_model_reasons(self, upstream_id, fields, effort):
        body = chat(request(**fields), upstream_id=upstream_id)
        assert body.get("reasoning_effort") == effort

    @cases(
        ("schema", "strict"),
        [
            ({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"],
              "additionalProperties": False}, True),
            ({"type": "object", "properties": {"a": {"type": "string"}},
              "additionalProperties": False}, False),
            ({"type": "object", "properties": {"a": {"type": "object"}}, "required": ["a"],
              "additionalProperties": False}, False),
        ],
    )  # fmt: skip
    def test_a_structured_answer(self, schema, strict):
        body = chat(request(output_config={"format": {"type": "json_schema", "schema": schema}}))
        assert body["response_format"] == {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": strict},
        }

    @pytest.mark.parametrize("kind", ["groq", "fireworks"])  # from vendors' pages, not seen live
    def test_where_an_answers_schema_cannot_stand_beside_tools_it_is_asked_in_words(self, kind):
        schema = {"type": "object", "properties": {"marker": {}}}
        fields = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
        body = chat(request(tools=[tool()], **fields), kind)
        assert "response_format" not in body
        assert json.dumps(schema) in body["messages"][0]["content"]
        assert "response_format" in chat(request(**fields), kind)

    CITY = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}

    def shaped(self, schema=None, **fields):
        answer_format = {"type": "json_schema", "schema": schema or self.CITY}
        return request(output_config={"format": answer_format}, **fields)

    def asking(self, way):
        """A model whose row says how it is asked for JSON."""
        kind = dataclasses.replace(ogx.PROVIDER_KINDS["vllm"], answer_by=way)
        return ogx.Model("m", dataclasses.replace(provider("vllm"), kind=kind), "m")

    def test_a_tool_that_must_be_called_is_the_next_best_way_to_json(self):
        body = ogx.chat_request(self.shaped(), self.asking("tool"))
        (made,) = body["tools"]
        assert made["function"]["parameters"] == self.CITY and "response_format" not in body
        assert body["tool_choice"]["function"]["name"] == made["function"]["name"]

    @cases(
        ("way", "fields"),
        [("words", {}), ("tool", {"tools": [tool()]}),
         ("tool", {"schema": {"type": "array", "items": {}}})],
    )  # fmt: skip
    def test_words_are_the_last(self, way, fields):
        body = ogx.chat_request(self.shaped(**fields), self.asking(way))
        assert "Your last answer must be JSON alone" in body["messages"][0]["content"]
        assert "response_format" not in body and "tool_choice" not in body

    @cases(
        "words",
        ['{"name": "Rome"}', '\n```json\n{"name": "Rome"}\n```', 'Sure:\n{"name": "Rome"}\nDone.',
         '<think>{</think>{"name": "Rome"}'],
    )  # fmt: skip
    def test_of_an_answer_in_words_the_json_alone_is_told(self, words):
        message = folded(delta(content=words[:9]), delta(content=words[9:]), delta("stop"),
                         body=self.shaped(), by_model=self.asking("words"))  # fmt: skip
        assert message["content"][-1]["text"] == '{"name": "Rome"}'

    def test_the_input_of_the_forced_tool_is_the_answer(self):
        name = ogx.ANSWER_TOOL
        message = folded(delta(content="Let me see."),
                         delta(tool_calls=[fragment(0, "a", name, '{"name"')]),
                         delta(tool_calls=[fragment(0, arguments=': "Rome"}')]),
                         delta("tool_calls"), body=self.shaped(),
                         by_model=self.asking("tool"))  # fmt: skip
        assert [b["text"] for b in message["content"]] == ['{"name": "Rome"}']
        assert message["stop_reason"] == "end_turn"

    @cases("words", ["Rome.", '{"town": "Rome"}', '["name"]', ""])
    def test_an_answer_of_another_shape_is_an_error(self, words):
        error = refused(translated, delta(content=words), delta("stop"), body=self.shaped(),
                        by_model=self.asking("words"))  # fmt: skip
        assert (error.status, error.message) == (
            502, "vllm, model m answered with no JSON of the shape that was asked for"
        )
        assert error.quote == " but: " + words  # which the client is told, and the log isn't

    @cases("last", [delta("length"), delta("content_filter"),
                                      delta("stop", refusal="No.")])  # fmt: skip
    def test_what_was_cut_off_or_refused_is_told_as_it_is(self, last):
        message = folded(delta(content='{"nam'), last, body=self.shaped(),
                         by_model=self.asking("words"))  # fmt: skip
        assert '{"nam' in json.dumps(message["content"]).replace("\\", "")
        assert message["stop_reason"] in ("max_tokens", "refusal")

    def test_beside_tools_an_answer_in_words_may_first_call_one(self):
        piece = fragment(0, "a", "Bash", "{}")
        message = folded(delta(content="Looking.", tool_calls=[piece]), delta("tool_calls"),
                         body=self.shaped(tools=[tool()]), by_model=self.asking("words"))
        assert sorted(b["type"] for b in message["content"]) == ["text", "tool_use"]

    # -- any request

    class Histories:
        """Random requests that Anthropic takes; `markers` are the strings planted in them."""

        def __init__(self, seed):
            self.random, self.markers, self.calls = random.Random(seed), [], []
            self.used = 0

        def marker(self):
            self.markers.append(f"MARK{len(self.markers):04d}")
            return self.markers[-1]

        def chance(self, share):
            return self.random.random() < share

        def blocks(self, most, *makers):
            return [self.random.choice(makers)() for _ in range(self.random.randint(0, most))]

        def words(self):
            return text("" if self.chance(0.1) else f"say {self.marker()}")

        def picture(self):
            return image(self.marker(), self.random.choice(ogx.MEDIA_TYPES["image"]))

        def paper(self):
            sources = ({"type": "base64", "media_type": "application/pdf", "data": self.marker()},
                       {"type": "text", "media_type": "text/plain", "data": self.marker()},
                       {"type": "url", "url": f"http://h/{self.marker()}"},
                       {"type": "content", "content": [self.words()]})
            kept = self.random.choice(sources)
            self.markers = [m for m in self.markers if m in json.dumps(kept)
                            or not any(m in json.dumps(source) for source in sources)]
            return {"type": "document", "source": kept, "title": self.marker()}

        def odd(self):
            return self.random.choice((
                lambda: {"type": "search_result", "title": self.marker(), "source": "s",
                         "content": [text(self.marker())]},
                lambda: {"type": "tool_reference", "tool_name": self.marker()},
                lambda: {"type": "compaction", "content": self.marker()},
                lambda: {"type": "web_search_tool_result", "tool_use_id": "s",
                         "content": [{"type": "web_search_result", "title": self.marker()}]},
                lambda: {"type": "mcp_tool_use", "id": "m", "name": self.marker(), "input": {}},
                lambda: {"type": "container_upload", "file_id": self.marker()},
                lambda: {"type": "tool_removal", "tool": {"name": self.marker()}}))()

        def thought(self):
            return self.random.choice((
                {"type": "thinking", "thinking": "hm", "signature": "foreign"},
                {"type": "redacted_thinking", "data": "foreign"}))

        def use(self):
            self.used += 1
            names = ("Bash", "mcp__a.b", "x" * 100, "odd name é")
            made = call(f"toolu_{self.used}", self.random.choice(names), value=self.marker())
            self.calls.append(made["id"])
            return made

        def answer(self, call_id):
            content = self.random.choice((
                self.marker, lambda: None,
                lambda: self.blocks(3, self.words, self.picture, self.paper, self.odd)))()
            return result(call_id, content, is_error=self.chance(0.2))

        def message(self):
            kind = self.random.choice(("user", "user", "assistant", "assistant", "system"))
            if kind == "assistant":
                return {"role": kind, "content": self.blocks(4, self.words, self.use, self.thought)}
            if kind == "system":
                return {"role": kind, "content": [text(self.marker())]}
            ids = self.calls if self.chance(0.8) else ["orphan"]
            answers = [self.answer(i) for i in ids if self.chance(0.8)]
            self.calls = []
            self.random.shuffle(answers)
            rest = self.blocks(3, self.words, self.picture, self.paper, self.odd)
            mixed = [*rest, *answers] if self.chance(0.2) else [*answers, *rest]
            return {"role": kind, "content": mixed or self.marker()}

        def tool(self):
            self.used += 1
            schema = self.random.choice((
                lambda: {"type": "object", "properties": {self.marker(): {"type": "string"}}},
                lambda: {"anyOf": [{"properties": {self.marker(): {}}}], "$schema": "x"},
                lambda: {}))()
            return {"name": f"tool {self.used}", "description": self.marker(),
                    "input_schema": schema}

        def request(self):
            messages = [user(f"begin {self.marker()}")]
            messages += [self.message() for _ in range(self.random.randint(0, 9))]
            fields = {"system": [text(self.marker())], "stream": self.chance(0.5),
                      "tools": [self.tool() for _ in range(self.random.randint(0, 4))],
                      "metadata": {"user_id": "u" * 500}}
            if self.chance(0.3):
                fields["tool_choice"] = {"type": self.random.choice(("auto", "any", "none"))}
            return request(*messages, **fields)

    @pytest.mark.parametrize("seed", range(10))
    def test_whatever_is_asked_arrives_whole_and_as_strictly_as_openai_wants_it(self, seed):
        """Of 300 random histories every planted string arrives, in chat and in Responses."""
        for number in range(30):
            histories = self.Histories(100 * seed + number)
            body = histories.request()
            sent = chat(body)
            assert openai_refusal(sent) == "", body
            for made in (json.dumps(sent), json.dumps(responses(body))):
                assert [m for m in histories.markers if m not in made] == [], body
            for kind in ("mistral", "vllm"):
                sent = chat({**body, "tools": [], "tool_choice": None}, kind)  # they take unions
                assert openai_refusal(sent) == "", body
                assert all(m["role"] != "system" for m in sent["messages"][1:])
                assert not any(a["role"] == b["role"] == "user" for a, b in
                               zip(sent["messages"], sent["messages"][1:]))  # fmt: skip
                ids = [c["id"] for m in sent["messages"] for c in m.get("tool_calls") or ()]
                assert kind == "vllm" or all(re.fullmatch("[a-zA-Z0-9]{9}", i) for i in ids)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda b: b.update(store=True), "unknown parameters: {'store'}"),
            (lambda b: b.update(max_tokens=5), "two limits"),
            (lambda b: b.update(stream_options={}), "stream_options without stream"),
            (lambda b: b.update(stop=["a"] * 5), "too much"),
            (lambda b: b.update(prompt_cache_key="k" * 65), "too much"),
            (lambda b: b.update(tools=[]), "tools: none, too many or one twice"),
            (lambda b: b.update(tools=b["tools"] * 2), "tools: none, too many or one twice"),
            (lambda b: b.pop("tools"), "a choice without tools"),
            (lambda b: b["tool_choice"]["function"].update(name="x"), "a choice of no tool"),
            (lambda b: b["tools"][0]["function"]["parameters"].update(anyOf=[]), "a schema's root"),
            (lambda b: b["tools"][0]["function"].update(name="a.b"), "a choice of no tool"),
            (lambda b: b["messages"].insert(2, {"role": "user", "content": "x"}),
             "a call without its result"),
            (lambda b: b["messages"].pop(2), "a call without its result"),
            (lambda b: b["messages"].__delitem__(slice(2, None)), "a call without its result"),
            (lambda b: b["messages"].pop(1), "a tool message out of its place"),
            (lambda b: b["messages"][2].update(content=[]), "a tool message out of its place"),
            (lambda b: b["messages"][1].update(reasoning_content="x"), "fields of a message"),
            (lambda b: b["messages"][1]["tool_calls"][0].update(id="i" * 41), "ids of calls"),
            (lambda b: b["messages"][1]["tool_calls"][0]["function"].update(arguments="[]"),
             "arguments"),
            (lambda b: b["messages"][1]["tool_calls"][0]["function"].update(name="a b"),
             "a tool's name"),
            (lambda b: b["messages"][0].update(content=""), "an empty message"),
            (lambda b: b["messages"][0].update(content=[{"type": "document"}]), "a part"),
            (lambda b: b["messages"][0].update(content=[text("")]), "an empty part"),
            (lambda b: b["messages"][3]["content"][1]["image_url"].update(url="data:x"),
             "an image's URL"),
        ],
    )  # fmt: skip
    def test_that_measure_can_fail(self, change, words):
        turns = [user("go"), assistant([call("a")]), user(result("a", [image()]), text("and?"))]
        body = chat(request(*turns, tools=[tool("Bash")],
                            tool_choice={"type": "tool", "name": "Bash"}))  # fmt: skip
        assert openai_refusal(body) == ""
        change(body)
        assert openai_refusal(body) == words

    # -- the answer

    def test_text_and_usage(self):
        message = folded(delta(role="assistant", content=""), delta(content="Hel"),
                         delta(content="lo"), delta("stop"),
                         {"choices": [], "usage": USAGE})  # fmt: skip
        assert message["content"] == [text("Hello")]
        assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
        usage = message["usage"]
        assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) \
            == (30, 20, 7)  # fmt: skip

    @pytest.mark.parametrize("mark", ["think", "thinking", "thought"])
    def test_thinking_left_in_the_text_is_thinking_wherever_it_is_cut(self, mark):
        words = f"\n<{mark}>\nhm <b> </ so</{mark}>\n\nThe <think> answer"
        for cut in range(len(words) + 1):
            message = folded(delta(content=words[:cut]), delta(content=words[cut:]), delta("stop"))
            assert [b.get("thinking") or b["text"] for b in message["content"]] == [
                "hm <b> </ so", "The <think> answer"
            ], cut

    @pytest.mark.parametrize("words", ["<thin", "< think>x", "<table>", " a<think>b</think>", "<"])
    def test_other_text_stays_text(self, words):
        message = folded(*(delta(content=c) for c in words), delta("stop"))
        assert [b["text"] for b in message["content"]] == [words]

    def test_thinking_that_never_ends_is_thinking(self):
        message = folded(delta(content="<think>hm</thi"), delta("length"))
        assert [b["thinking"] for b in message["content"]] == ["hm</thi"]

    def test_a_search_that_no_one_can_make_is_told_to_the_user(self):
        body = request(tools=[{"type": "web_search_20250305", "name": "web_search"}])
        message = folded(delta(content="I think"), delta("stop"), body=body)
        assert message["content"][0]["text"] == (
            "[web_search is not available with this model; what follows is from its own memory.]"
            "\n\nI think"
        )

    def test_usage_inside_the_choice_is_read_where_the_chunk_has_none(self):
        last = delta("stop", content="x")
        last["choices"][0]["usage"] = USAGE  # Moonshot
        assert folded(last)["usage"]["output_tokens"] == 7
        last["choices"][0]["usage"] = {**USAGE, "completion_tokens": 1}
        assert folded({**last, "usage": USAGE})["usage"]["output_tokens"] == 7
        last["choices"][0]["usage"] = None
        assert folded({**last, "usage": USAGE})["usage"]["output_tokens"] == 7

    def test_usage_that_is_not_told_is_estimated(self):
        usage = folded(delta(content="Hel"), delta(content="lo"), delta("stop"))["usage"]
        assert (usage["input_tokens"], usage["output_tokens"]) == (5, 3)

    @cases(
        ("usage", "counts"),
        [
            ({"prompt_tokens": 9, "completion_tokens": 3}, (9, 3, 0, 0)),
            ({"prompt_tokens": 9, "completion_tokens": 3,
              "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2}},
             (3, 3, 4, 2)),  # OpenAI
            ({"prompt_tokens": 9, "completion_tokens": 3, "prompt_cache_hit_tokens": 4},
             (5, 3, 4, 0)),  # DeepSeek
            ({"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 20},
             (9, 11, 0, 0)),  # xAI
            ({"prompt_tokens": None, "completion_tokens": None}, (0, 0, 0, 0)),
        ],
    )  # fmt: skip
    def test_usage_of_every_provider(self, usage, counts):
        made = ogx.usage_from_openai(usage)
        assert (made.input, made.output, made.cache_read, made.cache_written) == counts

    def test_groqs_usage_comes_in_a_field_of_its_own(self):
        chunk = {**delta("stop", content="x"), "x_groq": {"usage": USAGE}}
        assert folded(chunk)["usage"]["output_tokens"] == 7

    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
    def test_reasoning_is_thinking(self, name):
        message = folded(delta(**{name: "h"}), delta(**{name: "m"}), delta(content="ok"),
                         delta("stop"))  # fmt: skip
        signature = message["content"][0].pop("signature")
        assert message["content"][0] == {"type": "thinking", "thinking": "hm"}
        assert signature.startswith(ogx.SIGNATURE_MARK)
        assert message["content"][1]["text"] == "ok"

    def test_a_completion_that_was_not_streamed(self):
        choice = {"finish_reason": "tool_calls", "message": {
            "role": "assistant", "content": "Look.", "reasoning_content": "hm",
            "tool_calls": [{"id": "a", "type": "function",
                            "function": {"name": "Bash", "arguments": '{"x":1}'}}]}}  # fmt: skip
        message = folded({"choices": [choice], "usage": USAGE})
        assert [b["type"] for b in message["content"]] == ["thinking", "text", "tool_use"]
        assert message["content"][2]["input"] == {"x": 1}
        assert message["usage"]["output_tokens"] == 7

    CALLS = (
        ("in pieces", [[fragment(0, "a", "A", "")], [fragment(0, arguments='{"x":')],
                       [fragment(0, arguments="1}")]], [("a", "A", {"x": 1})]),
        ("parallel", [[fragment(0, "a", "A", '{"x":1}')], [fragment(1, "b", "B", '{"y":2}')]],
         [("a", "A", {"x": 1}), ("b", "B", {"y": 2})]),
        ("parallel in one chunk without index",
         [[fragment(None, "a", "A", '{"x":1}'), fragment(None, "b", "B", '{"y":2}')]],
         [("a", "A", {"x": 1}), ("b", "B", {"y": 2})]),
        ("interleaved", [[fragment(0, "a", "A", '{"x"'), fragment(1, "b", "B", '{"y"')],
                         [fragment(1, arguments=":2}"), fragment(0, arguments=":1}")]],
         [("a", "A", {"x": 1}), ("b", "B", {"y": 2})]),
        ("every index 0", [[fragment(0, "a", "A", '{"x":1}')], [fragment(0, "b", "B", '{"y":2}')]],
         [("a", "A", {"x": 1}), ("b", "B", {"y": 2})]),
        ("id and name repeated with each piece",
         [[fragment(0, "a", "A", '{"x"')], [fragment(0, "a", "A", ":1}")]],
         [("a", "A", {"x": 1})]),
        ("no ids, every index 0, the same tool twice",
         [[fragment(0, None, "A", '{"x":1}')], [fragment(0, None, "A", '{"x":2}')]],
         [(None, "A", {"x": 1}), (None, "A", {"x": 2})]),
        ("no ids, no index", [[fragment(None, None, "A", '{"x"'), fragment(None, arguments=":1}")],
                              [fragment(None, None, "B", "{}")]],
         [(None, "A", {"x": 1}), (None, "B", {})]),
        ("arguments as an object", [[{"index": 0, "id": "a",
                                      "function": {"name": "A", "arguments": {"x": 1}}}]],
         [("a", "A", {"x": 1})]),
        ("no arguments at all", [[fragment(0, "a", "A")]], [("a", "A", {})]),
        ("all of the arguments so far in each piece",
         [[fragment(0, "a", "A", '{"x"')], [fragment(0, "a", "A", '{"x":')],
          [fragment(0, "a", "A", '{"x":[1,1]}')], [fragment(0, "a", "A", '{"x":[1,1]}')]],
         [("a", "A", {"x": [1, 1]})]),
        ("the whole once more at the end",
         [[fragment(0, "a", "A", '{"x"')], [fragment(0, arguments=":1}")],
          [fragment(0, arguments='{"x":1}')]], [("a", "A", {"x": 1})]),
        ("a piece that looks like one before it",
         [[fragment(0, "a", "A", '{"x":"')], [fragment(0, arguments="aa")],
          [fragment(0, arguments="aa")], [fragment(0, arguments='"}')]],
         [("a", "A", {"x": "aaaa"})]),
        ("an empty object before the arguments",
         [[fragment(0, "a", "A", "{}")], [fragment(0, arguments='{"x":')],
          [fragment(0, arguments="1}")]], [("a", "A", {"x": 1})]),
        ("an empty object before all of them", [[fragment(0, "a", "A", "{}")],
         [fragment(0, "a", "A", '{"x":{}}')]], [("a", "A", {"x": {}})]),
        ("an empty object as the arguments, twice, and nothing",
         [[fragment(0, "a", "A", "{}")], [fragment(0, arguments="{}")],
          [fragment(0, arguments="")]], [("a", "A", {})]),
        ("empty objects as the arguments of two calls",
         [[fragment(0, None, "A", "{}")], [fragment(0, None, "A", "{}")]],
         [(None, "A", {}), (None, "A", {})]),
        ("an empty object in two pieces", [[fragment(0, "a", "A", "{")],
                                           [fragment(0, arguments="}")]], [("a", "A", {})]),
        ("an empty object inside", [[fragment(0, "a", "A", '{"x":')], [fragment(0, arguments="{}")],
                                    [fragment(0, arguments="}")]], [("a", "A", {"x": {}})]),
        ("id in a later piece", [[fragment(0, None, "A", "")], [fragment(0, "a", None, "{}")]],
         [(None, "A", {})]),
    )  # fmt: skip

    @pytest.mark.parametrize(("pieces", "calls"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
    def test_tool_calls(self, pieces, calls):
        message = folded(*(delta(tool_calls=p) for p in pieces), delta("tool_calls"))
        made = [(b["id"], b["name"], b["input"]) for b in message["content"]]
        assert [c[1:] for c in made] == [c[1:] for c in calls]
        for (call_id, *_), (expected, *_) in zip(made, calls):
            assert call_id == expected or (expected is None and call_id.startswith("toolu_"))
        assert message["stop_reason"] == "tool_use"

    def test_calls_without_ids_are_told_apart_however_many_there_are(self):
        chunks = [delta(tool_calls=[fragment(0, None, "A", f'{{"n":{n}}}')]) for n in range(50)]
        message = folded(*chunks, delta("tool_calls"))
        assert [block["input"]["n"] for block in message["content"]] == [*range(50)]

    NAMES = (
        ("two pieces", [[fragment(0, "a", "get_", "")], [fragment(0, None, "weather", "")],
                        [fragment(0, arguments='{"x":1}')]], ["get_weather"]),
        ("three, with the arguments", [[fragment(0, "a", "g")], [fragment(0, None, "et_wea")],
                                       [fragment(0, None, "ther", '{"x":1}')]], ["get_weather"]),
        ("with the id again", [[fragment(0, "a", "get_")], [fragment(0, "a", "weather")],
                               [fragment(0, "a", None, '{"x":1}')]], ["get_weather"]),
        ("without ids and indices", [[fragment(None, None, "get_"), fragment(None, None, "weather"),
                                      fragment(None, None, None, '{"x":1}')]], ["get_weather"]),
        ("the whole with each piece", [[fragment(0, "a", "get_weather", "")],
         [fragment(0, "a", "get_weather", '{"x"')], [fragment(0, "a", "get_weather", ":1}")]],
         ["get_weather"]),
        ("another's beginning is a name too", [[fragment(0, "a", "get", "")],
         [fragment(0, "a", "get", '{"x":1}')]], ["get"]),
        ("no tool's, with each piece", [[fragment(0, "a", "other", "")],
                                        [fragment(0, "a", "other", '{"x":1}')]], ["other"]),
        ("only half, with arguments", [[fragment(0, "a", "get_we", '{"x":1}')]], ["get_we"]),
        ("two calls without ids", [[fragment(0, None, "get", "")],
                                   [fragment(1, None, "get_weather", '{"x":1}')]],
         ["get", "get_weather"]),
    )  # fmt: skip

    @pytest.mark.parametrize(("pieces", "names"), [n[1:] for n in NAMES], ids=[n[0] for n in NAMES])
    def test_a_name_may_come_in_pieces(self, pieces, names):
        body = request(tools=[tool("get_weather"), tool("get")])
        chunks = [delta(tool_calls=p) for p in pieces]
        made = folded(*chunks, delta("tool_calls"), body=body)["content"]
        assert [block["name"] for block in made] == names
        assert made[-1]["input"] == {"x": 1}

    @pytest.mark.parametrize(
        ("given", "name"),
        [
            ("Bash", "Bash"), ("functions.Bash", "Bash"), ("Bash<|channel|>commentary", "Bash"),
            ("<|channel|>commentary to=functions.Bash <|constrain|>json", "Bash"),
            ("<tool_call>Bash", "Bash"), ("assistant<|channel|>Bash", "Bash"),
            ("Else<|call|>", "Else"), ("Else", "Else"), ("odd.name", "odd.name"),
        ],
    )  # fmt: skip
    def test_control_tokens_of_chat_templates_are_no_part_of_a_tools_name(self, given, name):
        body = request(tools=[tool("Bash")])
        piece = fragment(0, "a", given, "{}")
        message = folded(delta(tool_calls=[piece]), delta("stop"), body=body)
        assert message["content"][0]["name"] == name

    def test_a_name_of_control_tokens_alone_is_none(self):
        piece = fragment(0, "a", "<|channel|>", "{}")
        error = refused(translated, delta(tool_calls=[piece]), delta("tool_calls"))
        assert error.message == "the upstream sent a tool call without a name"

    ENDS = {
        "end_turn": "stop STOP eos eos_token end_turn stop_sequence complete completed done "
                    "tool_calls function_call tool_use brand_new",
        "max_tokens": "length max_tokens MAX_TOKENS max_output_tokens max_length token_limit",
        "model_context_window_exceeded": "model_length model_context_window_exceeded "
                                         "context_length context_length_exceeded",
        "refusal": "content_filter content_filtered sensitive SAFETY RECITATION PROHIBITED_CONTENT "
                   "BLOCKLIST SPII IMAGE_SAFETY guardrail_intervened refusal",
        "error": "error abort aborted cancelled canceled network_error malformed_function_call "
                 "insufficient_system_resource UNEXPECTED_TOOL_CALL malformed_tool_use timeout "
                 "server_error incomplete connection_lost tool_use_failed",
    }  # fmt: skip

    @pytest.mark.parametrize(
        ("finish", "reason"), [(f, reason) for reason, told in ENDS.items() for f in told.split()]
    )
    def test_stop_reasons(self, finish, reason):
        if reason == "error":
            error = refused(translated, delta(content="x"), delta(finish))
            assert error.status == 502 and error.refusal
            assert error.message == f"the answer broke off: {finish} (from openai, model gpt-x)"
        else:
            assert folded(delta(content="x"), delta(finish))["stop_reason"] == reason

    @pytest.mark.parametrize("finish", ["function_call_filter: MALFORMED_FUNCTION_CALL",
                                        "function_call_filter: TOO_MANY", ["x"], "OTHER", 7],
                             ids=str)  # fmt: skip
    def test_an_end_that_nobody_knows_is_an_error_where_there_is_no_answer(self, finish):
        for before in ([], [delta(reasoning="hm")], [delta(role="assistant", content="")]):
            assert refused(translated, *before, delta(finish)).status == 502
        if "call" not in str(finish):
            piece = fragment(0, "a", "A", "{}")
            assert folded(delta(finish, tool_calls=[piece]))["stop_reason"] == "tool_use"

    def test_a_whole_completion_that_broke_off_is_an_error_too(self):
        choice = {"message": {"content": "Half"}, "finish_reason": "error"}
        assert refused(translated, {"choices": [choice]}).status == 502
        choice["error"] = {"message": "JSON error injected into stream", "code": 503}  # OpenRouter
        error = refused(translated, {"choices": [choice]})
        assert error.status == 503 and error.message.startswith("JSON error injected")

    def test_an_unknown_end_of_an_answer_by_a_schema_is_an_end(self):
        fields = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
        lesson = ogx.Lesson("override", "answer_by", "words")
        owner = ogx.model_with_overrides(model("vllm"), [lesson])
        made = folded(delta(content='{"a": 1}'), delta("brand_new"), by_model=owner,
                      body=request(output_config=fields))  # fmt: skip
        assert (made["content"], made["stop_reason"]) == ([text('{"a": 1}')], "end_turn")

    def test_a_stop_is_tool_use_whenever_a_tool_was_called(self):
        piece = fragment(0, "a", "A", "{}")
        assert folded(delta("stop", tool_calls=[piece]))["stop_reason"] == "tool_use"
        assert folded(delta("length", tool_calls=[piece]))["stop_reason"] == "max_tokens"

    def test_the_sequence_that_stopped_is_reported_where_told(self):
        chunk = delta("stop", content="x")
        chunk["choices"][0]["stop_reason"] = "END"  # vLLM
        message = folded(chunk, body=request(stop_sequences=["END"]))
        assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")

    def test_llama_cpp_is_asked_to_tell_the_stop_sequence(self):
        told = {"stop": ["END"], "verbose": True, "response_fields": ["stopping_word"]}
        body = chat(request(stop_sequences=["END"]), kind="llama-cpp")
        assert body == {**chat(request(), kind="llama-cpp"), **told}
        for kind in ("openai", "vllm", "ollama", "groq"):
            assert "verbose" not in chat(request(stop_sequences=["END"]), kind=kind)

    @cases("verbose, sequence", [
        ({"stopping_word": "END"}, "END"), ({"stopping_word": ""}, None), ({}, None),
        ({"stopping_word": "<|im_end|>"}, None), (None, None), ("END", None),
        ({"stopping_word": ["END"]}, None), ({"stopping_word": None}, None)])
    @pytest.mark.parametrize("whole", [True, False], ids=["whole", "streamed"])
    def test_the_stop_sequence_that_llama_cpp_tells(self, verbose, sequence, whole):
        words, end = delta(content="1 2 "), {**delta("stop"), "__verbose": verbose}
        if whole:
            message = {"role": "assistant", "content": "1 2 "}
            end["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
        message = folded(*([] if whole else [words]), end, body=request(stop_sequences=["END"]))
        reason = "stop_sequence" if sequence else "end_turn"
        assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)
        assert message["content"] == [text("1 2 ")]

    def test_a_stop_sequence_that_the_upstream_ignores_ends_the_answer(self):
        body = request(stop_sequences=["a", "b", "c", "d", "END"])
        message = folded(delta(content="x EN"), delta(content="D y"), body=body, stops=["END"])
        assert message["content"][0]["text"] == "x "
        assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")

    def test_a_refusal_is_shown_and_told(self):
        message = folded(delta(refusal="I can't."), delta("stop"))
        assert (message["content"][0]["text"], message["stop_reason"]) == ("I can't.", "refusal")

    def test_content_in_parts(self):
        parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                 {"type": "text", "text": "ok"}]  # Mistral's magistral
        message = folded(delta(content=parts), delta("stop"))
        assert [b.get("thinking") or b["text"] for b in message["content"]] == ["hm", "ok"]

    def test_an_empty_answer_has_no_blocks(self):
        assert folded(delta(role="assistant", content=""), delta("stop"))["content"] == []

    def test_a_stream_that_just_ends_is_an_error(self):
        error = refused(translated, delta(content="x"))
        assert error.status == 502
        assert error.message == "openai, model gpt-x ended the answer before it was complete"

    @pytest.mark.parametrize(
        ("data", "status", "words"),
        [
            (b'{"error":{"message":"busy","code":429}}', 429, "busy"),  # OpenRouter
            (b'{"error":{"message":"slow","type":"rate_limit_exceeded"}}', 429, "slow"),
            (b'{"error":{"message":"bad call","code":"tool_use_failed","status_code":400}}', 400,
             "bad call"),  # Groq
            (b'{"error":"odd"}', 500, "odd"),
            (b"<oops", 502, "openai, model gpt-x sent no JSON but <oops"),
            (b"[1]", 502, "sent what has no known shape: [1]"),
            (b'{"choices":[5]}', 502, 'no known shape: {"choices":[5]}'),
            (b'{"choices":[{"delta":{"tool_calls":["x"]}}]}', 502, "no known shape"),
            (b'{"choices":[{"delta":{"reasoning_details":7}}]}', 502, "no known shape"),
        ],
    )
    def test_errors_inside_a_stream(self, data, status, words):
        writer = ogx.MessageWriter(ogx.new_message("m", "m", 1))
        error = refused(ogx.ChatTranslator(writer, request(), model()).feed, data)
        assert error.status == status and words in error.message + error.quote

    # -- chunks that needn't be parsed

    def written(self, chunks, learns=True):
        """The bytes that the data of chunks comes to, and how many of them were parsed."""
        writer = ogx.MessageWriter(ogx.new_message("msg_1", "m", 5))
        translator = ogx.ChatTranslator(writer, request(stream=True), model())
        translator._template.tries *= learns
        parsed = []
        read = translator._read
        translator._read = lambda chunk, data: (parsed.append(data), read(chunk, data))
        for chunk in chunks:
            translator.feed(chunk)
        translator.end()
        return b"".join(map(ogx.sse_bytes, writer.take())), translator.usage, len(parsed)

    def test_usual_chunks_come_to_the_same_bytes_without_being_parsed(self):
        words = ["a", " b", 'say "hi"\n', "back\\slash\t", "stop", "assistant", "c", "0", "\u20ac"]
        for ascii_only in (True, False):
            chunks = [json.dumps(c, ensure_ascii=ascii_only).encode() for c in (
                delta(role="assistant", content=""), *(delta(content=w) for w in words * 20),
                *(delta(reasoning_content=w) for w in words * 20), delta("stop", USAGE))]
            quick, parsed = self.written(chunks), self.written(chunks, learns=False)
            assert quick[:2] == parsed[:2] and parsed[2] == len(chunks)
            assert quick[2] < (20 if ascii_only else 100)

    def test_noise_and_the_clock_do_not_keep_chunks_from_being_usual(self):
        chunks = [json.dumps({**delta(content=f"w{i} "), "created": i // 50,
                              "obfuscation": "x" * (i % 7)}).encode() for i in range(200)]
        chunks.append(json.dumps(delta("stop")).encode())
        assert self.written(chunks)[2] < 10
        assert self.written(chunks)[:2] == self.written(chunks, learns=False)[:2]

    def test_what_never_repeats_is_not_learned_for_long(self):
        chunks = [json.dumps({**delta(content="w"), "n": i}).encode() for i in range(50)]
        writer = ogx.MessageWriter(ogx.new_message("msg_1", "m", 5))
        translator = ogx.ChatTranslator(writer, request(stream=True), model())
        for chunk in chunks:
            translator.feed(chunk)
        assert translator._template.tries == 0

    def test_usual_chunks_among_all_others_come_to_the_same_bytes(self):
        """Seeded streams of everything a chunk can be, in any order."""
        source = random.Random(4)
        kinds = (
            lambda i: delta(content=source.choice(["x", "<think>", "</think>", "y z", "é", "\n"])),
            lambda i: delta(content="plain"), lambda i: delta(content="plain"),
            lambda i: delta(reasoning_content="hm"), lambda i: delta(refusal="no"),
            lambda i: delta(reasoning_details=[{"type": "t", "text": "hm", "index": 0}]),
            lambda i: delta(reasoning="hm", reasoning_details=[{"type": "t", "data": "d"}]),
            lambda i: {**delta(content="plain"), "usage": {"prompt_tokens": i}},
            lambda i: delta(tool_calls=[fragment(i, f"call_{i}", "f", "{}")]),
            lambda i: delta(content="plain", tool_calls=[fragment(i, f"call_{i}", "f", "{}")]),
            lambda i: {"choices": []},
            lambda i: delta("stop", content="plain"))  # fmt: skip
        for _ in range(300):
            chunks = [json.dumps(source.choice(kinds)(i)).encode() for i in range(30)]
            chunks.append(json.dumps(delta("stop")).encode())
            quick = self.written(chunks)
            assert quick[:2] == self.written(chunks, learns=False)[:2]


    @pytest.mark.parametrize("make", [
        lambda n: [[fragment(0, "a", "Bash", '{"x":"')], *[[fragment(0, arguments="abcd")]] * n],
        lambda n: [[fragment(i, f"c{i}", "Bash", '{"x":"')] for i in (0, 1)] + [
            [fragment(i % 2, arguments="abcd}")] for i in range(n)],
        lambda n: [[fragment(i, f"c{i}", "Bash", "{}")] for i in range(n)],
        lambda n: [[fragment(i, f"c{i}", "Bash", "{")] for i in range(n)],
        lambda n: [[fragment(None, f"c{i}", "Bash", "{}")] for i in range(n)],
    ], ids=["pieces", "in turns", "calls", "open calls", "no index"])  # fmt: skip
    def test_the_work_grows_with_the_calls_alone(self, make):
        def read(chunks):
            writer = ogx.MessageWriter(ogx.new_message("m", "m", 1))
            translator = ogx.ChatTranslator(writer, request(), model())
            for chunk in chunks:
                translator.feed(chunk)
            assert ogx.sse_bytes(writer.take()[-1])

        check_linear(read, lambda n: [
            json.dumps(delta(tool_calls=calls)).encode() for calls in make(n)], 2500)  # fmt: skip

    @cases("begins", ["", "<think>", "<", "x"])
    @cases("piece", ["\n   ", " ", "<", "</thin", "word "])
    def test_the_work_grows_with_the_text_alone(self, begins, piece):
        def read(pieces):
            tags = ogx.ThinkTagParser()
            found = [piece for words in (begins, *pieces, "x") for piece in tags.feed(words)]
            return found + tags.end()

        check_linear(read, lambda n: [piece] * n, 4000)
        words = "".join(words for _, words in read([piece] * 50))
        assert "".join(words.split()) == "".join(
            f"{begins}{piece * 50}x".removeprefix("<think>").split())

    @pytest.mark.parametrize("stop", ["ab", "a" * 999 + "b"], ids=["short", "long"])
    def test_stop_sequences_are_found_in_a_time_that_grows_with_the_text(self, stop):
        def read(pieces):
            writer = ogx.MessageWriter(ogx.new_message("m", "m", 1), stops=[stop])
            for piece in pieces:
                writer.text(piece)
            assert writer.stopped is None

        check_linear(read, lambda n: ["a"] * n, 4000)
        check_linear(read, lambda n: ["a" * 10 * n], 4000)

    def test_an_answer_is_folded_in_a_time_that_grows_with_it(self):
        def events(n):
            writer = ogx.MessageWriter(ogx.new_message("m", "m", 1))
            for _ in range(n):
                writer.text("abcd" * 20)
            writer.tool("a", "a", "Bash", "{")
            for _ in range(n):
                writer.tool("a", "", "", " " * 80)
            writer.tool("a", "", "", "}")
            writer.finish("end_turn", None, ogx.Usage())
            return writer.take()

        check_linear(ogx.message_from_events, events, 4000)

    @cases("told", [float("inf"), 1e999, -1, 1.5, "7", None, True, [], 10**20,
                                      1 << 53, {}])  # fmt: skip
    def test_numbers_that_are_no_counts_are_left_out(self, told):
        usage = {"prompt_tokens": told, "completion_tokens": told,
                 "prompt_tokens_details": {"cached_tokens": told}}  # fmt: skip
        message = folded(delta(content="a"), delta("stop", usage))
        assert message["usage"]["output_tokens"] in (0, 2) and json.dumps(message, allow_nan=False)
        assert message["usage"]["cache_read_input_tokens"] == 0

    def test_whole_numbers_are_counts_however_they_are_written(self):
        usage = ogx.usage_from_openai({"prompt_tokens": 10.0, "completion_tokens": (1 << 53) - 1})
        assert (usage.input, usage.output) == (10, (1 << 53) - 1)


class TestMessages:
    def raw(self, body, **options):
        return json.dumps(body, **options).encode()

    @cases("options", [{}, {"indent": 1}, {"separators": (",", ":")}])
    def test_the_clients_own_bytes_go_on_with_another_models_id(self, options):
        body = request(user([text('say "model": "x"')]), new_field={"model": "y"})
        raw = self.raw(body, **options)
        sent = ogx.with_model_id(raw, body, ogx.messages_request(body, model("vllm", 'q"8')))
        assert sent == raw.replace(b"openai/gpt-x", b'q\\"8', 1)

    @pytest.mark.parametrize(
        "raw",
        [
            b'{"max_tokens": 1, "model": "m", "messages": []}',
            b'{"model": "x", "messages": [], "model": "m"}',
            b'{"model": "m", "messages": [{}], "max_tokens": 1, "messages": []}',
            b'{"model": "m","system":"x","messages":[],"max_tokens":1,"system":"y"}',
            b'[{"model": "m"}]',
        ],
    )
    def test_where_the_id_is_not_plainly_first_the_body_is_written_anew(self, raw):
        body = {"model": "m", "messages": [], "max_tokens": 1}
        assert ogx.with_model_id(raw, body, {**body, "model": "n"}) is None

    def test_words_about_fields_and_roles_are_no_field_that_comes_twice(self):
        body = request(user([text('say "messages": [] and "system": "x"')]),
                       {"role": "system", "content": "be brief"}, system="s", tools=[tool()])
        raw = self.raw(body)
        assert ogx.with_model_id(raw, body, {**body, "model": "n"})

    def test_a_changed_request_is_written_anew(self):
        body = request(system=[text("x-anthropic-billing-header: a"), text("b")])
        sent = ogx.messages_request(body, model("vllm"))
        assert sent["system"] == [text("b")]
        assert ogx.with_model_id(self.raw(body), body, sent) is None

    def test_tools_are_plainer_where_a_refusal_taught_so(self):
        search = {"type": "web_search_20250305", "name": "web_search", "description": "x" * 99}
        given = {**tool(properties={"a": {"type": "string", "format": "uri"}}), "strict": True}
        body = request(tools=[given, search, {"name": "N", "input_schema": {}}])
        lessons = [ogx.Lesson("override", "refused_keywords", ("format", "$ref")),
                   ogx.Lesson("override", "max_description", 27)]  # fmt: skip
        sent = ogx.messages_request(body, ogx.model_with_overrides(model("anthropic"), lessons))
        assert sent["tools"] == [
            {"name": "Bash", "description": 'd\ninput.a has format "uri"', "strict": True,
             "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}}},
            search, {"name": "N", "input_schema": {"type": "object", "properties": {}}},
        ]  # fmt: skip
        assert ogx.messages_request(body, model("anthropic"))["tools"] is body["tools"]

    def test_anthropic_keeps_the_billing_header(self):
        body = request(system=[text("x-anthropic-billing-header: a"), text("b")])
        assert ogx.messages_request(body, model("anthropic"))["system"] == body["system"]

    @pytest.mark.parametrize("kind", ["anthropic", "bedrock"])
    def test_claude_gets_no_thinking_of_others(self, kind):
        theirs = {"type": "thinking", "thinking": "t", "signature": "EqQB"}
        blocks = [{"type": "thinking", "thinking": "t", "signature": ""}, theirs, text("a")]
        body = request(user("q"), assistant(*blocks), user("r"))
        sent = ogx.messages_request(body, model(kind, "anthropic.claude-x"))
        assert sent["messages"][1]["content"] == [theirs, text("a")]

    def test_what_is_claude_codes_own_is_left_out(self):
        tools = [tool("DeferredToolPlaceholder"), tool("A")]
        sent = ogx.messages_request(request(tools=tools), model("vllm"))
        assert [t["name"] for t in sent["tools"]] == ["A"]
        assert ogx.unsupported_features(request(tools=tools), ogx.PROVIDER_KINDS["vllm"]) == set()
        assert len(ogx.messages_request(request(tools=tools), model("anthropic"))["tools"]) == 2

    def test_for_a_blind_model_images_are_words_and_auto_translates(self):
        kind = dataclasses.replace(ogx.PROVIDER_KINDS["vllm"], images=False)
        owner = dataclasses.replace(provider("vllm"), kind=kind)
        body = request(user([image(), result("a", [image()])]))
        assert ogx.unsupported_features(body, kind) == {"image"}
        sent = ogx.messages_request(body, ogx.Model("m", owner, "m"))["messages"]
        assert json.dumps(sent).count("An image was here: image/png") == 2

    def test_words_for_an_image_are_one_with_the_texts_around_them(self):
        kind = dataclasses.replace(ogx.PROVIDER_KINDS["zai"], images=False)
        owner = dataclasses.replace(provider("zai"), kind=kind)
        body = request(user([result("a", [text("b"), image(), text("c")])]))
        (block,) = ogx.messages_request(body, ogx.Model("m", owner, "m"))["messages"][0]["content"]
        assert block["content"] == [text("b\n[An image was here: image/png, 1 kB]\nc")]

    SYSTEM = ({"role": "system", "content": "notes.txt changed"},
              {"role": "system", "content": [text("a"), text("b")]})  # fmt: skip

    @staticmethod
    def reminder(words):
        return text(f"<system-reminder>\n{words}\n</system-reminder>")

    def sent(self, *messages, kind="vllm"):
        return ogx.messages_request(request(*messages), model(kind))["messages"]

    @pytest.mark.parametrize("kind", ["vllm", "ollama", "zai", "messages", "bedrock"])
    def test_system_messages_are_marked_text_of_the_user_elsewhere(self, kind):
        first, second = self.SYSTEM
        sent = self.sent(user("go"), first, assistant([call("1")]), second, user([result("1")]),
                         kind=kind)  # fmt: skip
        assert sent == [
            user([self.reminder("notes.txt changed"), text("go")]),
            assistant([call("1")]), user([result("1"), self.reminder("a\n\nb")]),
        ]  # fmt: skip

    @cases(
        ("block", "takers"),
        [
            ({"type": "thinking", "thinking": "hm", "signature": '{"ogx":"chat","by":"a/b"}'}, []),
            ({"type": "redacted_thinking", "data": '{"ogx":"chat","by":"a/b"}'}, []),
            ({"type": "redacted_thinking", "data": "Anthropic's"}, ["anthropic", "bedrock"]),
            ({"type": "thinking", "thinking": "hm", "signature": "somebody's"},
             ["anthropic", "bedrock", "vllm", "messages"]),
            ({"type": "thinking", "thinking": "hm", "signature": ""}, ["vllm", "messages"]),
            ({"type": "thinking", "thinking": "hm"}, ["vllm", "messages"]),
        ],
    )  # fmt: skip
    def test_thoughts_that_an_upstream_refuses_are_left_out(self, block, takers):
        history = [user("a"), assistant([block, text("b")]), user("c")]
        ids = {"anthropic": "x", "bedrock": "anthropic.claude-x", "vllm": "qwen", "messages": "y"}
        for kind, name in ids.items():
            sent = ogx.messages_request(request(*history), model(kind, name))["messages"]
            assert (block in sent[1]["content"]) == (kind in takers)

    @cases(("name", "kept"), [("anthropic/claude-x", True), ("Claude-X", True), ("qwen/x", False)])
    def test_behind_others_claude_still_gets_what_only_it_can_read(self, name, kept):
        thoughts = [{"type": "redacted_thinking", "data": "Anthropic's"}]
        history = request(user("a"), assistant([*thoughts, text("b")]), user("c"))
        for kind in ("openrouter", "messages"):
            sent = ogx.messages_request(history, model(kind, name))["messages"]
            assert sent[1]["content"] == [*thoughts * kept, text("b")]

    @pytest.mark.parametrize("kind", ["vllm", "messages", "anthropic"])
    def test_a_message_of_foreign_thoughts_alone_is_left_out(self, kind):
        thought = {"type": "thinking", "thinking": "hm", "signature": '{"ogx":"chat","by":"a/b"}'}
        sent = self.sent(user("a"), assistant([thought]), user("b"), assistant([]), kind=kind)
        assert sent == [user("a"), user("b"), assistant([])]  # what the client left empty stays

    def test_cache_breakpoints_of_system_messages_stay(self):
        mark = {"cache_control": {"type": "ephemeral"}}
        for blocks in ([text("a"), {**text("b"), **mark}], [{**text("a"), **mark}, text("b")]):
            said = {"role": "system", "content": blocks}
            sent = self.sent(user("go"), assistant("x"), user("on"), said, kind="openrouter")
            assert sent[-1]["content"][-1] == {**self.reminder("a\n\nb"), **mark}
            late = self.sent(user("go"), said, assistant("x"), user("on"), kind="openrouter")
            assert late[0]["content"][0] == {**self.reminder("a\n\nb"), **mark}
            chat_body = chat(request(user("go"), said), "vllm")
            assert "cache_control" not in json.dumps(chat_body["messages"])

    def test_the_next_turn_begins_as_the_last_one_ended(self):
        history, before = [], []
        for n in range(4):
            history += [user([result(str(n - 1))]) if n else user("go"),
                        {"role": "system", "content": f"{n} tokens left"}]  # fmt: skip
            sent = self.sent(*history)
            assert sent[: len(before)] == before and sent[-1]["role"] == "user"
            before = sent
            history += [assistant([call(str(n))])]

    def test_a_system_message_that_was_for_one_turn_is_left_out_after_it(self):
        note = {"role": "system", "content": "now", "clear_at": "next_user_message"}
        assert self.sent(user("a"), note)[0]["content"][-1] == self.reminder("now")
        sent = self.sent(user("a"), note, assistant("b"), user("c"))
        assert "system-reminder" not in json.dumps(sent)

    @cases(
        ("content", "told"),
        [
            ([text("one"), text("two")], [text("one\ntwo")]),
            ([text("a"), text("b"), image(), text("c"), {**text("d"), "cache_control": {"x": 1}}],
             [text("a\nb"), image(), {**text("c\nd"), "cache_control": {"x": 1}}]),
            ([text(""), text("a")], [text("\na")]),
            # Near misses
            ([text("a")], [text("a")]), ([text("a"), image(), text("b")],) * 2,
            ("words", "words"), (None, None), ([], []), ([image(), image()],) * 2,
        ],
    )  # fmt: skip
    def test_texts_of_a_result_that_stand_together_are_one_elsewhere(self, content, told):
        messages = [assistant([call("1")]), user([result("1", content), text("x"), text("y")])]
        assert self.sent(*messages)[1] == user([result("1", told), text("x"), text("y")])
        assert self.sent(*messages, kind="anthropic") == messages

    def test_many_texts_are_joined_in_a_moment(self):
        many = [text("a")] * 100_000
        seconds = min(self.seconds_to_join(many) for _ in range(3))
        assert seconds < 40 * min(self.seconds_to_join(many[:10_000]) for _ in range(3))

    def seconds_to_join(self, texts):
        body, began = request(user([result("1", texts)])), cpu_time()
        ogx.messages_request(body, model("vllm"))
        return cpu_time() - began

    def test_anthropic_gets_system_messages_where_they_stand(self):
        messages = [user("go"), *self.SYSTEM]
        assert self.sent(*messages, kind="anthropic") == messages

    def test_what_needs_no_change_keeps_the_clients_bytes(self):
        body = request(user("a"), assistant([call("1")]), user([result("1", [text("b")])]))
        raw = json.dumps(body).encode()
        sent = ogx.with_model_id(raw, body, ogx.messages_request(body, model("vllm")))
        assert sent == raw.replace(b"openai/gpt-x", b"gpt-x", 1)

    @cases(
        ("kind", "fields", "lost"),
        [
            ("vllm", {"messages": [user([pdf()])]}, {"document"}),
            ("vllm", {"messages": [user([result("a", [pdf()])])]}, {"document"}),
            ("vllm", {"messages": [user([image()])], "tools": [tool()]}, set()),
            ("vllm", {"tools": [{"type": "web_search_20250305", "name": "w"}]}, {"server_tool"}),
            ("vllm", {"messages": [assistant([{"type": "mcp_tool_use"}])]}, {"server_tool"}),
            ("ollama", {"tool_choice": {"type": "any"}}, {"tool_choice"}),
            ("ollama", {"tool_choice": {"type": "auto"}}, set()),
            ("ollama", {"messages": [user([{"type": "image", "source": {"type": "url",
                                                                        "url": "u"}}])]},
             {"url_image"}),
            ("ollama", {"messages": [user([result("a", "x", is_error=True)])]}, {"is_error"}),
            ("ollama", {"output_config": {"format": {"type": "json_schema"}}}, {"output_format"}),
            ("anthropic", {"messages": [user(result("a"), pdf())]}, set()),
        ],
    )  # fmt: skip
    def test_what_a_server_would_lose_is_known(self, kind, fields, lost):
        assert ogx.unsupported_features(request(**fields), ogx.PROVIDER_KINDS[kind]) == lost

    STREAM = (
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","model":"up/x",'
        b'"usage":{"input_tokens":9}}}\n\nevent: ping\ndata: {"type":"ping"}\n\n'
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
        b'{"type":"text_delta","text":"\\nevent: message_stop \\"model\\":\\"x\\""}}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":'
        b'{"input_tokens":9,"output_tokens":7}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )

    def test_a_native_stream_passes_but_for_the_models_id(self):
        for cut in range(len(self.STREAM) + 1):
            stream = ogx.NativeStream('a\\1"b')
            seen = stream.feed(self.STREAM[:cut]) + stream.feed(self.STREAM[cut:])
            assert seen == self.STREAM.replace(b"up/x", b'a\\\\1\\"b', 1), cut
            assert stream.ended and (stream.usage.input, stream.usage.output) == (9, 7)

    def test_a_native_stream_is_done_only_at_its_last_event(self):
        stream = ogx.NativeStream("m")
        for index in range(len(self.STREAM) - 1):
            stream.feed(self.STREAM[index : index + 1])
            assert not stream.ended
        stream.feed(self.STREAM[-1:])
        assert stream.ended

    def test_half_an_event_waits_so_that_a_ping_can_stand_after_any(self):
        stream = ogx.NativeStream("m")
        at = self.STREAM.index(b"content_block_delta") + 40
        seen = stream.feed(self.STREAM[:at])
        assert seen.endswith(b"\n\n") and stream.end() == b"" and not stream.ended

    def test_a_last_event_without_its_blank_line_is_an_end(self):
        stream = ogx.NativeStream("m")
        seen = stream.feed(self.STREAM[:-1])
        assert (seen + stream.end()).endswith(b'"message_stop"}\n\n\n') and stream.ended

    def test_an_event_without_end_is_bounded(self):
        stream = ogx.NativeStream("m")
        assert refused(stream.feed, b"x" * (ogx.MAX_EVENT + 1)).status == 502

    @pytest.mark.parametrize("told", [
        b'data: {"error": {"message": "m"}}\n\ndata: [DONE]\n\n',
        b'data:{"error":"m"}\n\n', b'event: error\ndata: {"error": {"message": "m"}}\n\n',
        b'data: {"object": "error", "message": "m"}\n\n', b'data: {"error": {"message": "m"}}',
    ], ids=["unnamed", "a text", "named", "vLLM's old one", "without blank line"])  # fmt: skip
    def test_an_error_in_another_shape_ends_a_native_stream(self, told):
        start = self.STREAM[: self.STREAM.index(b"event: message_delta")]
        for cut in range(len(told) + 1):
            stream = ogx.NativeStream("m")
            seen = stream.feed(start + told[:cut])
            seen += (b"" if stream.ended else stream.feed(told[cut:])) + stream.end()
            assert seen == start.replace(b"up/x", b"m")
            assert ogx.refusal_from_body(200, stream.error).message == "m"

    @pytest.mark.parametrize("told", [
        b'event: x\ndata: {"content_block":{"input":{"error":"x"}},"index":1}\n\n',
        b'event: x\ndata: {"error":null,"type":"content_block_delta"}\n\n',
        b'event: x\ndata: {"type":"x","delta":{"text":"\\ndata: {\\"error\\":"}}\n\n',
        b'event: x\ndata: {"error_count":{"a":1}}\n\n',
    ], ids=["in an input", "null", "in a text", "another name"])  # fmt: skip
    def test_events_that_only_speak_of_errors_pass(self, told):
        stream = ogx.NativeStream("m")
        assert stream.feed(told) == told and not stream.ended and not stream.error

    def test_an_error_event_is_an_end_too(self):
        ping = b'event: ping\ndata: {"type":"ping"}\n\n'
        error = b'{"type":"error","error":{"type":"x","message":"y"}}'
        stream = ogx.NativeStream("m")
        assert stream.feed(ping + b"event: error\ndata: " + error + b"\n\n" + ping) == ping
        assert stream.ended and stream.error == error

    @cases("end", ["\n\n", "\r\n\r\n", "\r\r"])
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 1400])
    def test_a_long_event_in_packets_is_handed_on_whole(self, end, size):
        event = f"event: x{end[: len(end) // 2]}data: {{\"a\": \"{'word ' * 300}\"}}{end}".encode()
        stream, told = ogx.NativeStream("m"), []
        data = event * 3
        for at in range(0, len(data), size):
            told.append(stream.feed(data[at : at + size]))
        assert b"".join(told) == data
        assert all(piece.endswith(end.encode()) for piece in told if piece)

    def test_the_work_grows_with_a_native_stream_alone(self):
        def read(packets):
            stream = ogx.NativeStream("m")
            for packet in packets:
                stream.feed(packet)

        check_linear(read, lambda n: [b"data: {"] + [b"x" * 1400] * n, 1000)
        for words in (b'"type":', b"error ", b'"message_stop",', b"event: ", b"\n", b"\r",
                      b'"model":"', b'"model":"\\a'):  # fmt: skip
            check_linear(read, lambda n: [b"message_start" + words * n + b"\n\n"], 20_000)  # noqa: B023

    @cases(("data", "last"), [
        (b'event: message_stop\ndata: {"type":"message_stop"}\n\n', True),
        (b'data: {"type": "message_stop"}\n\n', True),
        (b'data: {"a":1,"type":"message_stop"}', True),
        (b'data: {"text":"\\"type\\":\\"message_stop\\""}\n\n', False),
        (b'data: {"text":"event: message_stop"}\n\n', False),
        (b'data: {"a":"message_stop","type":"ping"}\n\n', False),
        (b'event: error\r\ndata: {}\r\n\r\n', True), (b'data: {"type":"error","error":{}}', True),
        (b'event: errors\n\n', False), (b'data: {"text":"error"}\n\n', False),
        (b'data: {"a":"message_stop","b":"message_stop","type":"message_stop"}', True),
    ])  # fmt: skip
    def test_what_ends_a_native_stream(self, data, last):
        assert bool(ogx.last_event(data)) is last


def responses(body, **row):
    kind = dataclasses.replace(ogx.PROVIDER_KINDS["openai"], **row)
    owner = dataclasses.replace(provider(), kind=kind)
    found = ogx.Model("openai/gpt-5.5", owner, "gpt-5.5")
    return ogx.finished_responses(ogx.responses_request(checked(body), found))


def added(index, **item):
    return {"type": "response.output_item.added", "output_index": index, "item": item}


def ended(index, **item):
    return {"type": "response.output_item.done", "output_index": index, "item": item}


def piece(kind, index, words, **fields):
    return {"type": f"response.{kind}.delta", "output_index": index, "delta": words, **fields}


def completed(kind="completed", **fields):
    usage = {"input_tokens": 50, "output_tokens": 7, "input_tokens_details": {"cached_tokens": 20}}
    return {"type": f"response.{kind}", "response": {"usage": usage, **fields}}


class TestResponses:
    # -- the request

    def test_a_small_request(self):
        body = responses(request("hi", system="be brief", stream=True, max_tokens=5,
                                 metadata={"user_id": '{"session_id":"s-1"}'}))  # fmt: skip
        assert body == {
            "model": "gpt-5.5",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
            "instructions": "be brief", "max_output_tokens": 16, "store": False, "stream": True,
            "include": ["reasoning.encrypted_content"], "prompt_cache_key": "s-1",
            "reasoning": {"summary": "auto", "effort": "medium"},
        }  # fmt: skip

    def test_without_verification_there_are_no_summaries(self):
        assert responses(request(), summaries=False)["reasoning"] == {"effort": "medium"}

    def test_the_history_as_items(self):
        kept = '{"ogx":"responses","by":"openai","id":"rs_1","encrypted_content":"enc"}'
        turns = [
            user(image(), pdf(title="P")),
            assistant({"type": "thinking", "thinking": "hm", "signature": kept},
                      {"type": "redacted_thinking", "data": kept.replace("rs_1", "rs_2")},
                      {"type": "thinking", "thinking": "x", "signature": "of another"},
                      {"type": "redacted_thinking", "data": kept.replace("openai", "azure")},
                      text("ok"), call("c1", command="ls")),
            user(result("c1", [text("see"), image()], is_error=True), text("and?")),
            {"role": "system", "content": "s"},
        ]  # fmt: skip
        items = responses(request(*turns))["input"]
        assert items[0]["content"] == [
            {"type": "input_image", "image_url": "data:image/png;base64,aW1n", "detail": "auto"},
            {"type": "input_file", "filename": "P.pdf",
             "file_data": "data:application/pdf;base64,JVBERi0="},
        ]  # fmt: skip
        assert items[1:] == [
            {"type": "reasoning", "id": "rs_1", "encrypted_content": "enc",
             "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "reasoning", "id": "rs_2", "encrypted_content": "enc", "summary": []},
            {"type": "message", "role": "assistant", "status": "completed", "id": "msg_3",
             "content": [{"type": "output_text", "text": "ok", "annotations": []}]},
            {"type": "function_call", "call_id": "c1", "name": "Bash",
             "arguments": '{"command": "ls"}'},
            {"type": "function_call_output", "call_id": "c1", "output": [
                {"type": "input_text", "text": "[The tool reported an error]"},
                {"type": "input_text", "text": "see"},
                {"type": "input_image", "image_url": "data:image/png;base64,aW1n",
                 "detail": "auto"}]},
            {"role": "user", "content": [{"type": "input_text", "text": "and?"}]},
            {"role": "developer", "content": [{"type": "input_text", "text": "s"}]},
        ]  # fmt: skip

    def test_reasoning_that_led_to_nothing_stays_here(self):
        kept = '{"ogx":"responses","by":"openai","id":"rs_1","encrypted_content":"enc"}'
        thought = {"type": "thinking", "thinking": "hm", "signature": kept}
        items = responses(request(user("a"), assistant(text("b"), thought), user("c")))["input"]
        assert [item["role"] for item in items] == ["user", "assistant", "user"]

    def test_a_search_goes_back_as_what_it_was(self):
        use = {"type": "server_tool_use", "id": "srvtoolu_ws_1", "name": "web_search",
               "input": {"query": "q"}}  # fmt: skip
        found = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_ws_1", "content": []}
        turns = [user("a"), assistant(use, found, text("b")), user("c")]
        searched = {"type": "web_search_call", "id": "ws_1", "status": "completed",
                    "action": {"type": "search", "query": "q"}}  # fmt: skip
        found, said = responses(request(*turns))["input"][1:-1]
        assert found == searched and said["content"][0]["text"] == "b"
        (alone,) = responses(request(*turns), own_reasoning=False)["input"][1:-1]
        assert alone["content"] == said["content"]
        foreign = json.loads(json.dumps(turns).replace("srvtoolu_ws_1", "srvtoolu_0"))
        told = responses(request(*foreign))["input"][1:-1]
        assert [item["role"] for item in told] == ["assistant"] * 3

    def test_a_server_with_a_template_gets_no_system_message_later(self):
        turns = [user("a"), {"role": "system", "content": "s"}, assistant("b"), user("c")]
        items = responses(request(*turns), system_anywhere=False)["input"]
        assert [item["role"] for item in items] == ["user", "assistant", "user"]
        assert items[0]["content"][0]["text"] == "<system-reminder>\ns\n</system-reminder>"

    def test_tools_are_flat_and_not_strict(self):
        tools = [tool("A", properties={"x": {}}), {"type": "web_search_20250305", "name":
                 "web_search", "allowed_domains": ["a.test"], "max_uses": 3,
                 "user_location": {"type": "approximate", "city": "Oslo"}}]  # fmt: skip
        body = responses(request(tools=tools, tool_choice={"type": "tool", "name": "A"}))
        assert body["tools"] == [
            {"type": "function", "strict": False, "name": "A", "description": "d",
             "parameters": {"type": "object", "properties": {"x": {}}}},
            {"type": "web_search", "filters": {"allowed_domains": ["a.test"]},
             "user_location": {"type": "approximate", "city": "Oslo"}},
        ]  # fmt: skip
        assert body["max_tool_calls"] == 3
        assert body["include"] == ["reasoning.encrypted_content", "web_search_call.action.sources"]
        assert body["tool_choice"] == {"type": "function", "name": "A"}
        assert "instructions" not in body

    @cases(
        ("choice", "with_another", "sent"),
        [({"type": "any"}, False, "required"), ({"type": "none"}, False, "none"),
         (None, False, "auto"),
         ({"type": "tool", "name": "web_search"}, True, "required"),
         ({"type": "tool", "name": "A"}, True, {"type": "function", "name": "A"}),
         ({"type": "tool", "name": "gone"}, True, None)],
    )  # fmt: skip
    def test_a_search_can_be_demanded(self, choice, with_another, sent):
        tools = [{"type": "web_search_20250305", "name": "web_search"}]
        tools += [tool("A")] if with_another else []
        body = responses(request(tools=tools, tool_choice=choice))
        assert body.get("tool_choice") == sent

    def test_a_structured_answer(self):
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
        body = responses(request(output_config={"format": {"type": "json_schema",
                                                           "schema": schema}}))  # fmt: skip
        assert body["text"]["format"] == {"type": "json_schema", "name": "answer",
                                          "schema": schema, "strict": True}  # fmt: skip

    # -- the answer

    def folded(self, *events, **options):
        made = translated(*events, by=ogx.ResponsesTranslator, **options)
        return ogx.message_from_events(made)

    REASONING = {"type": "reasoning", "id": "rs_1", "encrypted_content": "enc", "summary": []}

    def test_text_thinking_and_usage(self):
        message = self.folded(
            {"type": "response.created", "response": {}}, added(0, type="reasoning", id="rs_1"),
            piece("reasoning_summary_text", 0, "h"), piece("reasoning_summary_text", 0, "m"),
            {"type": "response.reasoning_summary_part.added", "summary_index": 1},
            piece("reasoning_summary_text", 0, "so"), ended(0, **self.REASONING),
            added(1, type="message"), piece("output_text", 1, "Hel"), piece("output_text", 1, "lo"),
            ended(1, type="message", content=[{"type": "output_text", "text": "Hello"}]),
            completed(),
        )  # fmt: skip
        thinking, words = message["content"]
        assert (thinking["thinking"], words["text"]) == ("hm\n\nso", "Hello")
        assert json.loads(thinking["signature"]) == {
            "ogx": "responses", "by": "openai", "id": "rs_1", "encrypted_content": "enc"
        }
        usage = message["usage"]
        assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) \
            == (30, 20, 7)  # fmt: skip
        assert message["stop_reason"] == "end_turn"

    def test_reasoning_comes_back_on_the_next_turn(self):
        message = self.folded(added(0, type="reasoning"), ended(0, **self.REASONING),
                              added(1, type="function_call", call_id="c", name="Bash"),
                              piece("function_call_arguments", 1, "{}"), completed())  # fmt: skip
        assert [b["type"] for b in message["content"]] == ["redacted_thinking", "tool_use"]
        turns = [user("a"), {"role": "assistant", "content": message["content"]},
                 user([result("c")])]  # fmt: skip
        assert responses(request(*turns))["input"][1] == self.REASONING

    def test_tool_calls(self):
        message = self.folded(
            added(0, type="function_call", call_id="a", name="A", arguments=""),
            piece("function_call_arguments", 0, '{"x":'), piece("function_call_arguments", 0, "1}"),
            ended(0, type="function_call", call_id="a", name="A", arguments='{"x":1}'),
            added(1, type="function_call", call_id="b", name="B", arguments=""),
            ended(1, type="function_call", call_id="b", name="B", arguments='{"y":2}'),
            completed(),
        )  # fmt: skip
        assert [(b["id"], b["name"], b["input"]) for b in message["content"]] == [
            ("a", "A", {"x": 1}), ("b", "B", {"y": 2}),
        ]  # fmt: skip
        assert message["stop_reason"] == "tool_use"

    def test_a_whole_response(self):
        message = self.folded({"object": "response", "status": "completed", "output": [
            {**self.REASONING, "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "message", "content": [{"type": "output_text", "text": "ok"}]},
            {"type": "function_call", "call_id": "a", "name": "A", "arguments": '{"x":1}'},
        ], "usage": {"input_tokens": 5, "output_tokens": 6}})  # fmt: skip
        assert [b["type"] for b in message["content"]] == ["thinking", "text", "tool_use"]
        assert message["usage"]["output_tokens"] == 6

    @cases(
        ("events", "reason"),
        [
            ([completed("incomplete", incomplete_details={"reason": "max_output_tokens"})],
             "max_tokens"),
            ([completed("incomplete", incomplete_details={"reason": "content_filter"})], "refusal"),
            ([piece("refusal", 0, "No."), completed()], "refusal"),
        ],
    )  # fmt: skip
    def test_stop_reasons(self, events, reason):
        assert self.folded(*events)["stop_reason"] == reason

    def test_stop_sequences_are_enforced_by_us(self):
        message = self.folded(piece("output_text", 0, "a EN"), piece("output_text", 0, "D b"),
                              stops=["END"])  # fmt: skip
        assert (message["content"][0]["text"], message["stop_sequence"]) == ("a ", "END")

    def test_a_stop_sequence_ends_a_whole_response_at_its_end(self):
        items = [{"type": "message", "content": [{"type": "output_text", "text": "a END b"}]},
                 {"type": "function_call", "call_id": "c", "name": "Bash", "arguments": "{}"}]
        message = self.folded({"object": "response", "status": "completed", "output": items,
                               "usage": {"input_tokens": 5, "output_tokens": 6}}, stops=["END"])
        assert [block["type"] for block in message["content"]] == ["text", "tool_use"]
        assert (message["content"][0]["text"], message["usage"]["output_tokens"]) == ("a ", 6)

    def test_a_stop_sequence_is_not_looked_for_across_messages(self):
        parts = piece("output_text", 0, "a EN"), piece("output_text", 1, "D b")
        message = self.folded(parts[0], ended(0, type="message"), parts[1], completed(),
                              stops=["END"])  # fmt: skip
        assert [block["text"] for block in message["content"]] == ["a EN", "D b"]

    @pytest.mark.needs_threads
    def test_what_was_held_is_the_clients_when_the_answer_fails(self):
        answer = sse(piece("output_text", 0, "a EN"), {"type": "error", "message": "x"}, done=False)
        with FakeUpstream(answer) as upstream, serving(
            dataclasses.replace(provider("groq", upstream.url), dialect="responses")
        ) as client:
            asked = request(model="groq/gpt-x", stream=True, stop_sequences=["END"])
            events = read_events(client.post(asked)[2])
        told = [e["delta"]["text"] for e in events if e["type"] == "content_block_delta"]
        assert "".join(told) == "a EN" and events[-1]["type"] == "error"

    @pytest.mark.needs_threads
    def test_what_was_held_of_an_answer_that_never_began_is_asked_for_again(self):
        broken = sse(piece("output_text", 0, "EN"), {"type": "error", "message": "x"}, done=False)
        whole = sse(piece("output_text", 0, "Hi."), completed(), done=False)
        with FakeUpstream(broken, whole) as upstream, serving(
            dataclasses.replace(provider("groq", upstream.url), dialect="responses"), retries=1
        ) as client:
            asked = request(model="groq/gpt-x", stream=True, stop_sequences=["END"])
            events = read_events(client.post(asked)[2])
        assert ogx.message_from_events(events)["content"][0]["text"] == "Hi."

    def test_web_search_with_results_and_citations(self):
        action = {"type": "search", "query": "q", "sources": [{"url": "http://a", "title": "A"}]}
        opened = {"type": "open_page", "url": "http://a"}
        note = {"type": "url_citation", "url": "http://a", "title": "A"}
        message = self.folded(
            added(0, type="web_search_call", id="ws-1"),
            ended(0, type="web_search_call", id="ws-1", action=action),
            ended(1, type="web_search_call", id="ws-2", action=opened),
            piece("output_text", 2, "found"),
            {"type": "response.output_text.annotation.added", "annotation": note}, completed(),
        )  # fmt: skip
        use, found, opening, page, words = message["content"]
        assert (use["type"], use["input"]) == ("server_tool_use", {"query": "q"})
        assert found["tool_use_id"] == use["id"] and found["content"][0]["url"] == "http://a"
        assert opening["input"] == {"query": "http://a"} and page["tool_use_id"] == opening["id"]
        assert message["usage"]["server_tool_use"]["web_search_requests"] == 1
        assert words["citations"][0]["type"] == "web_search_result_location"

    @cases(
        ("event", "status", "words"),
        [
            ({"type": "error", "code": "rate_limit_exceeded", "message": "slow"}, 429, "slow"),
            ({"type": "error", "code": "server_is_overloaded", "message": "full"}, 529, "full"),
            ({"type": "error", "code": "image_too_large", "message": "large"}, 400, "large"),
            ({"type": "error", "code": "bio_policy", "message": "no"}, 400, "no"),
            ({"type": "error", "code": "vector_store_timeout", "message": "late"}, 500, "late"),
            ({"type": "response.failed", "response": {"error": {"code": "server_error",
                                                                "message": "oops"}}}, 500, "oops"),
            ({"error": {"message": "bad"}}, 500, "bad"), ([], 502, "no known shape: []"),
            ({"type": "response.output_text.delta"}, 502, "no known shape"),
        ],
    )  # fmt: skip
    def test_errors_inside_a_stream(self, event, status, words):
        error = refused(self.folded, event)
        assert error.status == status and words in error.message + error.quote

    @pytest.mark.parametrize(
        ("kind", "response", "reason"),
        [
            ("completed", {"status": "completed"}, "end_turn"), ("completed", {}, "end_turn"),
            ("incomplete", {"incomplete_details": {"reason": "max_tokens"}}, "max_tokens"),
            ("incomplete", {"incomplete_details": {"reason": "model_context_window_exceeded"}},
             "model_context_window_exceeded"),
            ("incomplete", {"incomplete_details": {"reason": "safety"}}, "refusal"),
            ("incomplete", {"status": "incomplete"}, "error"),
            ("incomplete", {"incomplete_details": {"reason": "server_error"}}, "error"),
        ],
        ids=str,
    )  # fmt: skip
    def test_ends_are_read_by_their_words(self, kind, response, reason):
        events = piece("output_text", 0, "x"), completed(kind, **response)
        if reason == "error":
            assert refused(self.folded, *events).status == 502
        else:
            assert self.folded(*events)["stop_reason"] == reason

    def test_whole_errors_and_titles_that_are_not_told(self):
        for error in ({"code": 500, "msg": "gone", "success": False}, {"detail": "gone"}):
            assert refused(self.folded, error).message.startswith("gone (from")
        failed = {"object": "response", "status": "failed", "error": {
            "code": "rate_limit_exceeded", "message": "slow"}}  # fmt: skip
        assert refused(self.folded, failed).status == 429
        note = {"type": "url_citation", "url": "http://a", "title": None}
        made = self.folded(piece("output_text", 0, "found"), {
            "type": "response.output_text.annotation.added", "annotation": note}, completed())
        assert made["content"][0]["citations"][0]["title"] == "http://a"  # AI SDK: no null

    def test_a_stream_that_just_ends_is_an_error(self):
        error = refused(self.folded, piece("output_text", 0, "x"))
        assert "before it was complete" in error.message

    # -- which dialect

    @pytest.mark.parametrize(
        ("kind", "url", "spoken"),
        [
            ("openai", "https://api.openai.com/v1", True),
            ("openai", "http://127.0.0.1:8000/v1", False),
            ("azure", "https://me.openai.azure.com/openai/v1", True),
            ("groq", "https://api.groq.com/openai/v1", False),
        ],
    )
    def test_who_is_spoken_to_in_responses(self, kind, url, spoken):
        assert ogx.speaks_responses(provider(kind, url)) is spoken

    @pytest.mark.needs_threads
    def test_a_model_that_demands_it_is_switched_once_and_for_all(self):
        refusal = (400, {"error": {"message": TestRemedies.CASES[16][0]}})
        answer = sse(piece("output_text", 0, "Hi."), completed(), done=False)
        with gateway_over(refusal, answer, answer) as (client, upstream):
            for _ in range(2):
                assert client.post(request(stream=True))[0] == 200
        assert [path for path, _ in upstream.heads] == [
            "/v1/chat/completions", "/v1/responses", "/v1/responses"
        ]

    @pytest.mark.parametrize(("status", "words"), [
        (400, "The requested model 'gpt-x' is not supported with the Responses API."),
        (404, "This model is not supported in v1/responses."), (404, "404 page not found"),
    ])  # fmt: skip
    @pytest.mark.needs_threads
    def test_a_model_that_lacks_it_is_switched_the_other_way(self, monkeypatch, status, words):
        kind = dataclasses.replace(ogx.PROVIDER_KINDS["azure"], responses_hosts=("127.0.0.1",))
        monkeypatch.setitem(ogx.PROVIDER_KINDS, "azure", kind)
        refusal = (status, {"error": {"message": words}})
        with gateway_over(refusal, said(), said(), kind="azure") as (client, upstream):
            for _ in range(2):
                assert client.post(request(model="azure/gpt-x", stream=True))[0] == 200
        assert [path for path, _ in upstream.heads] == [
            "/v1/responses", "/v1/chat/completions", "/v1/chat/completions"
        ]
        assert all(head["api-key"] == "sk-secret-1234" for _, head in upstream.heads)

    @pytest.mark.needs_threads
    def test_the_user_can_force_it(self):
        answer = {"object": "response", "status": "completed", "output": []}
        with FakeUpstream(answer) as upstream, serving(
            dataclasses.replace(provider("groq", upstream.url), dialect="responses")
        ) as client:
            assert client.post(request(model="groq/gpt-x"))[0] == 200
        assert upstream.heads[0][0] == "/v1/responses"

    @pytest.mark.needs_threads
    def test_the_user_can_force_chat_too(self):
        kind = dataclasses.replace(ogx.PROVIDER_KINDS["openai"], responses_hosts=("127.0.0.1",))
        with FakeUpstream(said()) as upstream, serving(
            dataclasses.replace(provider("openai", upstream.url), kind=kind, dialect="chat")
        ) as client:
            assert client.post(request(stream=True))[0] == 200
        assert upstream.heads[0][0] == "/v1/chat/completions"


class TestDialects:
    def test_each_dialect_a_row_names_exists(self):
        kinds = [*ogx.PROVIDER_KINDS.values(), ogx.DEMO_KIND]
        named = {name for kind in kinds for name in kind.dialects}
        assert named | {"responses"} == set(ogx.DIALECTS)

    @pytest.mark.parametrize("name", list(ogx.DIALECTS))
    def test_a_request_is_finished_in_a_copy(self, name):
        body = {"max_tokens": 500, "reasoning_effort": "low", "thinking": {"budget_tokens": 900}}
        before = copy.deepcopy(body)
        finished = ogx.DIALECTS[name].finished(body)
        assert body == before and (finished is body or finished != body)

    @pytest.mark.needs_threads
    def test_the_demo_model_answers_honestly(self):
        with serving(ogx.DEMO_PROVIDER) as client:
            body = request("hi", "there", model="demo/echo", tools=[tool()])
            _, _, message = client.post(body)
        words = message["content"][0]["text"]
        assert re.match(
            r"This is ogx.py's built-in demo model; I received 2 messages, 1 tools, "
            r"about \d+ tokens\. Set OPENAI_API_KEY, VLLM_URL or OLLAMA_URL ", words
        )  # fmt: skip
        assert message["stop_reason"] == "end_turn" and message["usage"]["output_tokens"] > 10


def said_so(dice):
    """A refusal about lengths in words of a small grammar, for 32000 tokens of output; its kind,
    the limit and the prompt's tokens."""
    kind = dice.choice(["overflow", "room", "output", ""])
    limit = dice.randrange(2100, 31_000) if kind == "output" else dice.randrange(34_000, 400_000)
    prompt = dice.randrange(2100, limit) + (limit if kind == "overflow" else 0)
    window = dice.choice(["maximum context length", "context window", "context size",
                          "model's context limit", "max_model_len of the context"])  # fmt: skip
    subject = dice.choice(["prompt", "input", "messages", "conversation", "input prompt"])
    verb = dice.choice(["exceeds", "is longer than", "is greater than", "is too long for",
                        "is larger than", "is more than"])  # fmt: skip
    p, n = (f"{k:,}" if dice.random() < 0.3 else str(k) for k in (prompt, limit))
    words = {
        "overflow": [f"The {subject} ({p} tokens) {verb} the {window} of {n} tokens",
                     f"This model's {window} is {n} tokens. However, your {subject} has {p} tokens",
                     f"{subject}: {p} tokens > {n} maximum", f"{subject} of {p} {verb} limit {n}"],
        "room": [f"The {subject} ({p} tokens) and max_tokens (32000) {verb} the {window} of {n}",
                 f"The {window} is {n}, but {prompt + 32000} tokens were requested: {p} in the "
                 f"{subject}, 32000 for the completion",
                 f"{subject} {p} + output 32000 {verb} the {window} ({n})"],
        "output": [f"max_tokens must be at most {n}", f"max_tokens: 32000 > {n}",
                   f"max_tokens is 32000, but the maximum is {n}",
                   f"The model supports up to {n} output tokens"],
        "": [f"image of {p} bytes {verb} the limit of {n} bytes", "upstream went away",
             f"rate limit of {n} tokens per minute was exceeded: {p}",
             f"tools: {p} characters of description, limit {n}", "model not found"],
    }[kind]  # fmt: skip
    words = dice.choice(words)
    words = dice.choice(["{}", "{}. Please try again.", "Error: {}", "BadRequestError: {}.",
                         "upstream said: {{'error': {{'message': \"{}\"}}}}"]).format(words)
    found = (limit, prompt if kind != "output" else 0) if kind else (0, 0)
    return ogx.Refusal(dice.choice([400, 413, 422, 500]), words), kind, *found


class TestRemedies:
    LIMIT = {"max_tokens": 32000, "model": "m"}
    CASES = (  # the upstream's words (facts: vLLM's, Bedrock's and OpenAI's seen live), the lesson
        ("max_tokens is too large: 32000. This model supports at most 16384 completion tokens, "
         "whereas you provided 32000.", LIMIT, "clamp max_tokens to 16384"),
        ("max_tokens=64000 cannot be greater than max_model_len=40960. Please request fewer "
         "output tokens.", {"max_tokens": 64000}, "clamp max_tokens to 40960"),
        ("The maximum tokens you requested exceeds the model limit of 8192. Try again with a "
         "maximum tokens value that is lower than 8192.", LIMIT, "clamp max_tokens to 8192"),
        ("max_tokens for `llama-3.1-8b-instant` must be less than or equal to 8000", LIMIT,
         "clamp max_tokens to 8000"),
        ("`max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens` is "
         "less than the `context_window` for this model", LIMIT, "clamp max_tokens to 8192"),
        ("max_tokens: 100000 > 64000, which is the maximum allowed number of output tokens for X",
         {"max_tokens": 100000}, "clamp max_tokens to 64000"),
        ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", LIMIT,
         "clamp max_tokens to 8192"),
        ("expected a value <= 12288, but got 32000 instead", LIMIT, "clamp max_tokens to 12288"),
        ("Unsupported parameter: 'max_tokens' is not supported with this model. Use "
         "'max_completion_tokens' instead.", LIMIT, "rename max_tokens to max_completion_tokens"),
        ("This model's maximum context length is 131072 tokens. However, you requested 131134 "
         "tokens (122942 in the messages, 8192 in the completion).", {"max_tokens": 8192},
         "clamp max_tokens to 8130"),
        ("'max_tokens' or 'max_completion_tokens' is too large: 64000. This model's maximum "
         "context length is 64001 tokens and your request has 24235 input tokens "
         "(64000 > 64001 - 24235).", {"max_completion_tokens": 64000},
         "clamp max_completion_tokens to 39766"),
        ("`inputs` tokens + `max_new_tokens` must be <= 131073. Given: 130000 `inputs` tokens and "
         "4000 `max_new_tokens`", {"max_tokens": 4000}, "clamp max_tokens to 1073"),
        ("Unsupported value: 'temperature' does not support 0.2 with this model. Only the default "
         "(1) value is supported.", {"temperature": 0.2}, "drop temperature"),
        ("Unsupported parameter: 'stop' is not supported with this model.", {"stop": ["x"]},
         "drop stop"),
        ('"m" does not support thinking', {"reasoning_effort": "high"}, "drop reasoning_effort"),
        ("property 'stream_options' is unsupported, did you mean 'stop'?",
         {"stream_options": {}, "stop": ["x"]}, "drop stream_options"),
        ("Function tools with reasoning_effort are not supported for gpt-5.6-terra in "
         "/v1/chat/completions. To use function tools, use /v1/responses or set reasoning_effort "
         "to 'none'.", {"reasoning_effort": "high"}, "override responses to True"),
        ("Function tools with reasoning_effort are not supported for gpt-5.6-terra in "
         "/v1/chat/completions. To use function tools, use /v1/responses or set reasoning_effort "
         "to 'none'.", {}, "override responses to True"),
        ("This model is only supported in v1/responses and not in v1/chat/completions.", {},
         "override responses to True"),
        ("This is not a chat model and thus not supported in the v1/chat/completions endpoint. Did "
         "you mean to use v1/completions?", {}, "override responses to True"),
        ("The requested model 'x' is not supported with the Responses API.", {"input": []},
         "override responses to False"),
        ("Not Found", {"input": []}, "None"),  # with a 404: below
        ("Your organization must be verified to generate reasoning summaries.", {},
         "override summaries to False"),
        ("Unsupported parameter: 'reasoning.effort' is not supported with this model.",
         {"reasoning_effort": "high"}, "drop reasoning_effort"),
        ("Unsupported value: 'reasoning_effort' does not support 'max' with this model. Supported "
         "values are: 'low', 'medium', and 'high'.", {"reasoning_effort": "max"},
         "cap_effort reasoning_effort to high"),
        ("Unsupported value: 'reasoning_effort' does not support 'low' with this model. Supported "
         "values are: 'medium', 'high', and 'xhigh'.", {"reasoning_effort": "low"},
         "raise_effort reasoning_effort to medium"),
        ("Unsupported value: 'none' is not supported with the 'gpt-5' model for 'reasoning_effort'."
         " Supported values are: 'minimal', 'low', 'medium', and 'high'.",
         {"reasoning_effort": "none"}, "raise_effort reasoning_effort to minimal"),
        ("reasoning_effort 'none' is not supported", {"reasoning_effort": "none"},
         "raise_effort reasoning_effort to low"),
        ("`reasoning_effort` must be one of `none` or `default`", {"reasoning_effort": "high"},
         "drop reasoning_effort"),  # Groq's Qwen
        ("reasoning_effort 'xhigh' is not supported", {"reasoning_effort": "xhigh"},
         "cap_effort reasoning_effort to high"),
        ("Unsupported parameter: 'reasoning_effort' is not supported with this model.",
         {"reasoning_effort": "high"}, "drop reasoning_effort"),
        ("Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16, but "
         "got 1 instead.", {"max_tokens": 1}, "raise max_tokens to 16"),
        ("Invalid 'tools': array too long. Expected an array with maximum length 128, but got an "
         "array with length 150 instead.", {"tools": [1] * 150}, "override max_tools to 128"),
        ("Invalid schema for function 'X': 'propertyNames' is not permitted.",
         {"tools": [{"function": {"parameters": {"propertyNames": {}}}}]},
         "override refused_keywords to ('propertyNames',)"),
        ('{"detail":[{"type":"extra_forbidden","loc":["body","stream_options"],"msg":"Extra inputs '
         'are not permitted"}]}', {"stream_options": {}}, "drop stream_options"),  # Mistral
        ("temperature: expected a value <= 2, but got 3", LIMIT, "None"),
        ("the number of images exceeds the model limit of 20", LIMIT, "None"),
        ("This model supports at most 0 completion tokens", LIMIT, "None"),
        ("Unknown failure, please stop sending", {"stop": ["x"]}, "None"),
        ("property 'prompt_cache_key' is unsupported", {"prompt_cache_key": "k"},
         "drop prompt_cache_key"),  # Groq
        ("Unknown parameter: 'tools[0].strict'.", {"tools": [{"strict": False}]},
         "strip_keyword tools to strict"),
        ("messages: something else entirely", LIMIT, "None"),
    )  # fmt: skip

    @cases(("words", "body", "lesson"), CASES)
    def test_what_a_refusal_teaches(self, words, body, lesson):
        made = ogx.lesson_from_refusal(ogx.Refusal(400, words), body, model("openrouter"))
        assert str(made) == lesson

    @cases(
        ("words", "row", "status"),
        [
            ("Tool call id was call_1 but must be a-z, A-Z, 0-9, with a length of 9.",
             "tool_ids to [a-zA-Z0-9]{9}", 400),
            ("Tool call id was call_1 but must be a-z, A-Z, 0-9, with a length of 9.",
             "tool_ids to [a-zA-Z0-9]{9}", 500),  # local servers with mistral-common
            ("The `reasoning_content` in the thinking mode must be passed back to the API.",
             "reasoning_echo to reasoning_content", 400),  # DeepSeek
            ("System message must be at the beginning.", "system_anywhere to False", 400),
            ("Unexpected role 'system' after role 'tool'", "system_anywhere to False", 400),
            ("Unexpected role 'user' after role 'tool'", "user_after_tool to False", 400),
            ("Failed to deserialize the JSON body into the target type: messages[0]: unknown "
             "variant `image_url`, expected `text` at line 1 column 9", "images to False", 400),
            ("m does not support image input", "images to False", 400),
            ("No endpoints found that support image input", "images to False", 404),  # OpenRouter
            ("At most 0 image(s) may be provided in one prompt.", "images to False", 400),  # vLLM
            ("scripted is not a multimodal model", "images to False", 400),  # vLLM 0.32
            ("This model doesn't have vision capabilities.", "images to False", 400),
            ("qwen3 is a text-only model; remove image parts.", "images to False", 422),
            ("The loaded model has no vision support", "images to False", 400),
            ("Multimodal input is not supported by this model", "images to False", 400),
            ("Thought signature is not valid", "own_reasoning to False", 400),  # Gemini
            ("Unrecognized key: 'reasoning_details'", "own_reasoning to False", 400),
            ("Function call is missing a thought_signature in functionCall parts.",
             "tool_call_extra to (('extra_content', ", 400),  # Gemini
            ("model `google.gemma-4-31b` isn't supported on this route",
             "openai_root to ~/openai/v1", 400),  # Bedrock
            ("The model 'openai.gpt-5.5' does not support the '/v1/chat/completions' API.",
             "responses to True", 400),  # Bedrock
            ("The model 'x' does not support the '/v1/responses' API.", "responses to False", 400),
        ],
    )  # fmt: skip
    def test_words_put_the_row_right_whatever_it_was_configured_as(self, words, row, status):
        found = model("openai")
        lesson = ogx.lesson_from_refusal(ogx.Refusal(status, words), {}, found)
        assert str(lesson).startswith(f"override {row}")
        taught = ogx.model_with_overrides(found, [lesson])
        assert ogx.lesson_from_refusal(ogx.Refusal(status, words), {}, taught) is None
        assert found.provider.kind is ogx.PROVIDER_KINDS["openai"]

    @cases("words", [
        "image exceeds 5 MB maximum", "could not process image", "text-only output is not ready",
        "the model does not support images larger than 4096 pixels", "image format not supported",
        "multimodal router is overloaded", "You have no visions", "a language model is required"])
    def test_other_words_about_images_teach_nothing(self, words):
        assert ogx.lesson_from_refusal(ogx.Refusal(400, words), {}, model("vllm")) is None

    @pytest.mark.parametrize("where", ["messages[9].tool_calls[0].id", "input[95].call_id",
                                       "messages[2].tool_call_id"])  # fmt: skip
    def test_who_passes_requests_on_to_openai_bounds_ids_too(self, where):
        words = f"Invalid '{where}': string too long. Expected a string with maximum length 40, " \
                "but got a string with length 51 instead."  # fmt: skip
        lesson = ogx.lesson_from_refusal(ogx.Refusal(400, words), {}, model("openrouter"))
        assert str(lesson) == "override tool_ids to .{1,40}"

    # -- refused tools

    MAIL = {"type": "object", "$schema": "s", "properties": {
        "to": {"type": "string", "pattern": "^(?!\\.)[\\w.]+@\\p{L}+$", "minLength": 1},
        "when": {"type": "string", "format": "date-time", "exclusiveMinimum": 0},
        "ids": {"type": "array", "additionalProperties": False}}}  # fmt: skip

    def tools_body(self, dialect="chat", taught=None):
        given = request(tools=[tool("Mail", **self.MAIL), tool("Other")])
        return ogx.DIALECTS[dialect].request(given, taught or model("vllm"))

    def steps(self, words, body_of, status=400):
        """What is learned while the same words come again and again."""
        found, known, refusal = model("vllm"), [], ogx.Refusal(status, words)
        while len(known) < 9:
            taught = ogx.model_with_overrides(found, known)
            lesson = ogx.lesson_from_refusal(refusal, body_of(taught), taught, known)
            if lesson is None:
                break
            known.append(lesson)
        return [(lesson.field, lesson.value) for lesson in known]

    def test_few_keywords_are_kept_whatever_a_client_calls_them(self):
        schema = {f"x{n}": "same" for n in range(5000)}
        body = ogx.messages_request(request(tools=[tool("Odd", **schema)]), model("vllm"))
        refusal = ogx.Refusal(400, "Invalid schema for function 'Odd': 'same'")
        lesson = ogx.lesson_from_refusal(refusal, body, model("vllm"))
        assert 0 < len(lesson.value) <= 20

    def test_what_a_new_tool_brings_is_left_out_where_all_rules_are(self):
        lesson = ogx.Lesson("override", "refused_keywords", ("*",))
        taught = ogx.model_with_overrides(model("vllm"), [lesson])
        new = tool("New", properties={"a": {"type": "number", "multipleOf": 2, "x-new": [1]}})
        (sent,) = ogx.chat_request(request(tools=[new]), taught)["tools"]
        assert sent["function"]["parameters"]["properties"] == {"a": {"type": "number"}}

    NAMING = (
        ("Invalid schema for function 'Mail': '^(?!\\.)[\\w.]+@\\p{L}+$' is not a 'regex'.",
         ["pattern"]),
        ("Invalid schema for function `Mail`: `date-time` can't be used here", ["format"]),
        ("* GenerateContentRequest.tools[0].function_declarations[0].parameters.properties[when]"
         ".format: only 'enum' and 'date-time' are supported for STRING type", ["format"]),
        ("Invalid JSON payload received. Unknown name \"exclusiveMinimum\" at 'tools[0].function_"
         "declarations[0].parameters.properties[1].value': Cannot find field.\nInvalid JSON "
         "payload received. Unknown name \"pattern\" at 'tools[0]'",
         ["exclusiveMinimum", "pattern"]),
        ("Proto field additional_properties is unknown in function_declarations",
         ["additionalProperties"]),  # Gemini's other spelling
        ("tools.0.custom.input_schema.properties.to.minLength: not permitted", ["minLength"]),
        ("The provided JSON schema contains features not supported by xgrammar: pattern",
         ["pattern"]),
        ("Grammar error: Unimplemented keys: [\"pattern\"]", ["pattern"]),
        ("regex parse error:\n    ^(?!x)a\\p{L}+$\n     ^^^\nerror: look-around, including "
         "look-ahead and look-behind, is not supported", ["pattern"]),  # seen live: llguidance
        ("Format date-time is not supported by Outlines' grammar", ["format"]),
        ("invalid JSON schema for tool Mail, tools[0].function.parameters: `minLength` unsupported",
         ["minLength"]),  # Groq
    )  # fmt: skip

    @pytest.mark.parametrize("dialect", ["chat", "responses", "messages"])
    @cases(("words", "named"), NAMING)
    def test_a_refused_schema_first_loses_what_the_words_name(self, words, named, dialect):
        refusal = ogx.Refusal(400, words)
        lesson = ogx.lesson_from_refusal(refusal, self.tools_body(dialect), model("vllm"))
        assert (lesson.field, lesson.value, lesson.keep) == (
            "refused_keywords", tuple(named), True)  # fmt: skip

    VAGUE = (
        ("Failed to initialize samplers: failed to parse grammar", 400),  # llama-server
        ('Engine protocol predict request returned 400: {"error":{"code":400,"message":"Failed to '
         'initialize samplers: failed to parse grammar","type":"invalid_request_error"}}', 500),
        ("Failed to convert JSON schema to GBNF: unrecognized schema", 500),
        # Seen live, behind vLLM's "Grammar error: ": llguidance's, then those of outlines_core.
        ("Grammar error: Pointer '/$defs/gone' does not exist", 400),
        ("Grammar error: Unimplemented keys: [\"contains\"]", 400),
        ("Invalid reference path: $defs", 500),
        ('Unsupported JSON Schema structure {"not":{}} \nMake sure it is valid to the JSON Schema '
         "specification and check if it's supported by Outlines.", 400),
        ("EngineCore: Failed to compile grammar: state limit exceeded", 500),
        ("Tool Mail function has invalid 'parameters' schema", 400),  # SGLang
        ("tools.0.custom.input_schema: JSON schema is invalid. It must match JSON Schema draft "
         "2020-12 (https://json-schema.org/draft/2020-12). Learn more about tool use at "
         "https://docs.claude.com/en/docs/tool-use.", 400),  # Anthropic, Bedrock
        ("The value at toolConfig.tools.0.toolSpec.inputSchema.json.type must be one of the "
         "following: object.", 400),  # Bedrock
        ("Invalid request: tools.function.parameters is not a valid moonshot flavored json schema, "
         "details: <At path 'properties.ids': when using anyOf, type should be defined in anyOf "
         "items instead of the parent schema>", 400),  # Moonshot
        ("Unable to submit request because `Mail` functionDeclaration `parameters.ids` schema "
         "didn't specify the schema type field. Ensure all schema type fields are set.", 400),
        ("Invalid schema for function 'Mail': In context=('properties', 'ids'), array schema "
         "missing items.", 400),  # OpenAI, Azure
        ("Invalid tool definition", 422), ("Invalid function declarations: recursion", 422),
        ('[{"type":"dict_type","loc":["body","tools",0,"function","parameters"],"msg":"x"}]', 422),
        ("incorrect tools for this model; check parameters", 404),
    )  # fmt: skip

    @pytest.mark.parametrize("dialect", ["chat", "responses", "messages"])
    @cases(("words", "status"), VAGUE)
    def test_then_all_that_constrains_then_its_odd_forms_and_no_more(self, words, status, dialect):
        body_of = functools.partial(self.tools_body, dialect)
        assert self.steps(words, body_of, status) == [
            ("refused_keywords", ("*",)), ("refused_keywords", ("*", "$ref"))]  # fmt: skip

    def test_the_three_steps_are_taken_once_each(self):
        body_of = functools.partial(self.tools_body, "chat")
        words = "Invalid schema for function 'Mail': 'format' is not permitted, nor minLength."
        first, second = ("format", "minLength"), ("format", "minLength", "*")
        assert [value for _, value in self.steps(words, body_of)] == [
            first, second, (*second, "$ref")]  # fmt: skip
        last = ogx.Lesson("override", "refused_keywords", (*second, "$ref"))
        sent, _ = body_of(ogx.model_with_overrides(model("vllm"), [last]))["tools"]
        assert sent["function"]["parameters"]["properties"] == {
            "to": {"type": "string"}, "when": {"type": "string"},
            "ids": {"type": "array", "items": {"type": "string"}},
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("words", "most"),
        [
            ("Invalid 'tools[0].function.description': string too long. Expected a string with "
             "maximum length 1024, but got a string with length 3000 instead.", 1024),  # OpenAI
            ("tools.0.function.description: String should have at most 2048 characters", 2048),
            ("Function description length 3000 exceeds the limit of 1000", 1000),
            ("description of tool Mail is longer than 512 characters", 512),
            ("The tool's description is too long", 1024),
            ("tools: a description may have 700 characters at most, this one has 3000", 700),
            ("a tool's description has 3000 characters; at most 700 are taken", 700),
        ],
        ids=["openai", "pydantic", "limit", "than", "no-number", "number-first", "number-last"],
    )  # fmt: skip
    def test_a_description_that_is_too_long_is_cut_to_what_is_told(self, words, most):
        def body_of(taught):
            given = {**tool("Mail", properties={"a": {}}), "description": "x" * 3000}
            return ogx.chat_request(request(tools=[given]), taught)

        first = ogx.Lesson("override", "max_description", most)
        steps = self.steps(words, body_of)
        assert steps == [(first.field, most), ("refused_keywords", ("$ref",))]
        taught = ogx.model_with_overrides(model("vllm"), [first])
        assert len(body_of(taught)["tools"][0]["function"]["description"]) == most

    NO_SCHEMA = (
        "the model's tool call failed validation: parameters do not match the schema",
        "Failed to call a function. Please adjust your prompt. See 'failed_generation'.",
        "The model generated a function that is not in the schema",
        "No tool output found for function call call_123.",
        "An assistant message with 'tool_calls' must be followed by tool messages",
        "tool_use ids were found without tool_result blocks; see the schema",
        "tool_choice is not supported by this model's grammar",
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
        "No endpoints found that support tool use. Check your parameters.",
        '"m" does not support tools', "This model does not support function calling",
        "Tools are not supported by this model", "Missing required arguments: tools",
        "API key not valid; see the parameters", "Your quota for function schemas is used up",
        "Rate limit reached: too many tools",
        "The functions take 60000 tokens, which is more than the model has",
        "This model's maximum context length is 128000 tokens. However, your messages resulted in "
        "130000 tokens (125000 in the messages, 5000 in the functions).",
        "Invalid image in a tool's result: the schema of its file is unknown",
        "Invalid prompt: 'change the JSON schema of the tool' was flagged as a violation",
        "messages.3.content: 'the schema of my tool' is no text",
        "'please rewrite the grammar of this tool' in messages[3] breaks our policy",
        "content: the tool's schema may not be talked about", "something else entirely",
    )  # fmt: skip

    @pytest.mark.parametrize("dialect", ["chat", "responses", "messages"])
    @cases("words", NO_SCHEMA)
    def test_other_words_with_tools_in_them_leave_schemas_alone(self, words, dialect):
        for status in (400, 422, 500):
            lesson = ogx.lesson_from_refusal(
                ogx.Refusal(status, words), self.tools_body(dialect), model("vllm"))  # fmt: skip
            assert lesson is None

    @pytest.mark.parametrize(
        ("status", "words"),
        [(401, "the schema of function X"), (429, "Invalid schema for function 'X'"),
         (500, "FUNCTION_INVOCATION_FAILED"), (500, "the tool server is down")],
        ids=["key", "rate", "function", "server"],
    )  # fmt: skip
    def test_failures_that_only_mention_a_tool_leave_schemas_alone(self, status, words):
        refusal = ogx.Refusal(status, words)
        assert ogx.lesson_from_refusal(refusal, self.tools_body(), model("vllm")) is None

    @cases("tools", [None, [], [{}], [{"type": "web_search"}], [{"function": 5}]])
    def test_without_schemas_there_is_nothing_to_make_plainer(self, tools):
        refusal = ogx.Refusal(400, "Invalid schema for function 'X'")
        assert ogx.lesson_from_refusal(refusal, {"tools": tools}, model("vllm")) is None

    def test_what_changes_the_answer_is_left_out_only_once(self):
        refusal = ogx.Refusal(400, "Unsupported parameter: 'tool_choice'")
        lesson = ogx.lesson_from_refusal(refusal, {"tool_choice": "x"}, model())
        assert (str(lesson), lesson.keep) == ("drop tool_choice", False)

    def test_a_refused_union_at_the_root_is_merged_from_then_on(self):
        words = "Invalid schema for function 'X': schema must have type 'object' and not have " \
                "'oneOf'/'anyOf'/'allOf'/'enum'/'not' at the top level."  # fmt: skip
        lesson = ogx.lesson_from_refusal(ogx.Refusal(400, words), {"tools": []}, model("xai"))
        assert str(lesson) == "override root_unions to False"

    def test_json_is_asked_for_in_three_ways(self):
        """By response_format, by a tool that must be called, in words: each refusal is one step."""
        shaped, found, lessons, ways = TestChat().shaped(), model("vllm"), [], []
        for words in ("This response_format type is unavailable now",  # DeepSeek
                      "This model does not support this tool_choice", ""):  # fmt: skip
            body = ogx.chat_request(shaped, ogx.model_with_overrides(found, lessons))
            ways.append({"response_format", "tools", "messages"} & set(body))
            lessons.append(ogx.lesson_from_refusal(ogx.Refusal(400, words), body, found, lessons))
        assert ways == [{"response_format", "messages"}, {"tools", "messages"}, {"messages"}]
        assert [str(k) for k in lessons] == [
            "override answer_by to tool", "override answer_by to words", "None"
        ]

    @pytest.mark.parametrize("words", [
        "The encrypted content gAAA...ng== could not be verified.",
        "Item with id 'rs_1' not found. Items are not persisted when `store` is set to false.",
        "Item with id 'ws_1' not found.",
        "Item 'rs_1' of type 'reasoning' was provided without its required following item.",
    ])  # fmt: skip
    def test_refused_reasoning_is_left_out_of_this_conversation(self, words):
        lesson = ogx.lesson_from_refusal(ogx.Refusal(400, words), {"input": []}, model())
        assert (lesson.field, lesson.value, lesson.keep) == ("own_reasoning", False, False)

    def test_what_only_reasoning_models_encrypt_is_not_asked_of_others(self):
        words = "Encrypted content is not supported with this model."
        refusal = ogx.Refusal(400, words, param="include")
        lesson = ogx.lesson_from_refusal(refusal, {"include": ["x"]}, model())
        assert str(lesson) == "drop include" and lesson.keep

    def test_tools_that_are_few_enough_are_not_fewer_the_next_time(self):
        refusal = ogx.Refusal(400, "tools: expected at most 128 items")
        assert ogx.lesson_from_refusal(refusal, {"tools": [{}] * 128}, model("vllm")) is None

    def test_one_schema_that_is_refused_says_nothing_of_others(self):
        words = "Invalid schema for response_format 'answer': 'minLength' is not permitted."
        body = {"response_format": {}}
        lesson = ogx.lesson_from_refusal(ogx.Refusal(400, words), body, model("vllm"))
        assert (str(lesson), lesson.keep) == ("override answer_by to tool", False)

    def test_nothing_is_set_and_dropped_in_turns(self):
        known = [ogx.Lesson("set", "reasoning_effort", "none")]
        body = {"reasoning_effort": "none"}
        for words in ("Unsupported parameter: 'reasoning_effort'",
                      "reasoning_effort 'none' is not supported"):  # fmt: skip
            refusal = ogx.Refusal(400, words)
            assert ogx.lesson_from_refusal(refusal, body, model(), known) is None
            assert ogx.lesson_from_refusal(refusal, body, model()) is not None

    def test_where_there_is_no_responses_api_chat_without_reasoning_is_the_next_best(self):
        known = [ogx.Lesson("override", "responses", True)]
        gone = ogx.Refusal(404, "404 page not found")
        lesson = ogx.lesson_from_refusal(gone, {"input": []}, model(), known)
        assert str(lesson) == "override responses to False"
        words = self.CASES[16][0]
        lesson = ogx.lesson_from_refusal(ogx.Refusal(400, words), {}, model(), [lesson])
        assert str(lesson) == "set reasoning_effort to none"

    def test_reasoning_that_was_echoed_and_refused_is_left_out(self):
        words = "'messages.2' : property 'reasoning_content' is unsupported"  # Groq
        lesson = ogx.lesson_from_refusal(ogx.Refusal(400, words), {}, model("deepseek"))
        assert (lesson.field, lesson.value) == ("reasoning_echo", "")

    @cases(
        ("lesson", "before", "after"),
        [
            (("clamp", "n", 5), {"n": 9}, {"n": 5}), (("clamp", "n", 5), {"n": 3}, {"n": 3}),
            (("raise", "n", 16), {"n": 1}, {"n": 16}), (("raise", "n", 16), {}, {}),
            (("cap_effort", "e", "high"), {"e": "max"}, {"e": "high"}),
            (("cap_effort", "e", "high"), {"e": "low"}, {"e": "low"}),
            (("raise_effort", "e", "low"), {"e": "none"}, {"e": "low"}),
            (("raise_effort", "e", "low"), {"e": "max"}, {"e": "max"}),
            (("drop", "a"), {"a": 1, "b": 2}, {"b": 2}), (("set", "a", 1), {}, {"a": 1}),
            (("rename", "a", "b"), {"a": 1}, {"b": 1}),
            (("strip_keyword", "t", "format"),
             {"t": [{"properties": {"format": {"type": "string", "format": "date"}}}]},
             {"t": [{"properties": {"format": {"type": "string"}}}]}),
        ],
    )  # fmt: skip
    def test_what_a_lesson_does(self, lesson, before, after):
        assert ogx.with_lessons(before, [ogx.Lesson(*lesson)]) == after

    def test_the_parameter_named_beside_the_words_counts(self):
        refusal = ogx.Refusal(400, "Unsupported value.", "unsupported_value", "top_p")
        made = ogx.lesson_from_refusal(refusal, {"top_p": 1, "stop": ["x"]}, model())
        assert str(made) == "drop top_p"

    def test_a_lesson_that_changes_nothing_is_none(self):
        refusal = ogx.Refusal(400, "Unsupported parameter: 'stop' is not supported")
        assert ogx.lesson_from_refusal(refusal, {"model": "m"}, model()) is None

    def test_only_refusals_of_the_request_teach(self):
        words = "This model supports at most 5 completion tokens"
        assert ogx.lesson_from_refusal(ogx.Refusal(500, words), self.LIMIT, model()) is None

    def test_room_left_is_no_lesson_for_the_next_request(self):
        words = self.CASES[9][0]
        lesson = ogx.lesson_from_refusal(ogx.Refusal(400, words), {"max_tokens": 8192}, model())
        assert lesson.keep is False

    # The words, the prompt and the limit that they tell. Further wordings, each of another server.
    TOO_LONG = (
        ("Trying to keep the first 14563 tokens when context the overflows. However, the model is "
         "loaded with context length of only 4096 tokens, which is not enough. Try to load the "
         "model with a larger context length, or provide a shorter input", 14563, 4096),
        ("the input length exceeds the context length", 0, 0),  # Ollama
        ("Prompt too long: 40123 tokens exceeds max context window of 32768 tokens", 40123, 32768),
        ("Total tokens of image and text exceed max message tokens. Request id: 0217", 0, 0),
        ("You passed 131073 input tokens and requested 0 output tokens. However, the model's "
         "context length is only 131072 tokens, resulting in a maximum input length of 131072 "
         "tokens. (parameter=input_tokens, value=131073)", 131073, 131072),
        ("This model's maximum context length is 128000 tokens. However, your messages resulted in "
         "150000 tokens (140000 in the messages, 10000 in the functions).", 140000, 128000),
        ("invalid params, context window exceeds limit (2013)", 0, 0),  # MiniMax's code
        ("Your request exceeded model token limit: 262144 (requested: 291351)", 291351, 262144),
        ("Prompt exceeds max length", 0, 0),  # Z.ai
        ("<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 98304]",
         0, 98304),
        ("Input validation error: `inputs` must have less than 4095 tokens. Given: 5000", 5000,
         4095),
        ("`inputs` tokens + `max_new_tokens` must be <= 131073. Given: 150000 `inputs` tokens and "
         "4000 `max_new_tokens`", 150000, 131073),
        ("too many tokens: total number of tokens in the prompt cannot exceed 4081 - received "
         "5000.", 5000, 4081),  # Cohere
        ("Prompt contains 45000 tokens and 0 draft tokens, too large for model with 32768 maximum "
         "context length", 45000, 32768),
        ("Requested tokens (45000) exceed context window of 32768", 45000, 32768),
        ("length of prompt_tokens (40000) must be less than max_seq_len (32768).", 40000, 32768),
        ("The decoder prompt (length 45000) is longer than the maximum model length of 32768. Make "
         "sure that `max_model_len` is no smaller.", 45000, 32768),
        ("Input token length 45,000 exceeds the limit of 32,768 tokens", 45000, 32768),
        ("tokens in request more than max tokens allowed", 0, 0),
        ("prompt token count of 140000 exceeds the limit of 128000", 140000, 128000),
        ("The conversation is too long for this model", 0, 0),
        ("Your prompt exceeds the context window by 2500 tokens", 0, 0),
        ("litellm.BadRequestError: {'error': {'message': \"This model's maximum context length is "
         "32768 tokens. However, your messages resulted in 40123 tokens.\"}}", 40123, 32768),
    )  # fmt: skip
    FITS = (  # the words, the prompt, the limit
        ("This model's maximum context length is 32768 tokens. However, you requested 32769 tokens "
         "(769 in the messages, 32000 in the completion).", 769, 32768),
        ("Requested token count exceeds the model's maximum context length of 32768 tokens. You "
         "requested a total of 52000 tokens: 20000 tokens from the input messages and 32000 tokens "
         "for the completion. Please reduce the number of tokens.", 20000, 32768),  # SGLang
        ("This endpoint's maximum context length is 131072 tokens. However, you requested about "
         "140000 tokens (108000 of text input, 32000 in the output).", 108000, 131072),
        ("input length and `max_tokens` exceed context limit: 179759 + 32000 > 200000, decrease "
         "input length", 179759, 200000),  # Anthropic
        ("The sum of prompt tokens (20000) and max_tokens (32000) exceeds the model limit of "
         "32768.", 20000, 32768),
        ("prompt (20,000 tokens) plus completion (32,000 tokens) is larger than the context of "
         "32,768 tokens", 20000, 32768),
        ("max_tokens (32000) + prompt tokens (20000) must not exceed context size 40960", 20000,
         40960),
    )  # fmt: skip
    OTHER_LIMITS = (
        "messages.0.content.1.image.source.base64: image exceeds 5 MB maximum: 6291456 bytes > "
        "5242880 bytes",
        "At least one of the image dimensions exceed max allowed size: 8000 pixels",
        "At most 5 image(s) may be provided in one prompt.",
        "Rate limit exceeded: 30000 input tokens per minute, you used 32500",
        "Too many tokens per day, please wait before trying again.",
        "You exceeded your token quota: limit 100000, used 120000",
        "Your account has exceeded its monthly token limit of 1000000",
        "Concurrent request limit exceeded", "Request Entity Too Large",
        "Invalid 'tools': array too long. Expected an array with maximum length 128, but got an "
        "array with length 1500 instead.",
        "Invalid 'messages[9].tool_calls[0].id': string too long. Expected a string with maximum "
        "length 40, but got a string with length 51 instead.",
        "Invalid 'tools[0].function.description': string too long. Expected a string with maximum "
        "length 1024, but got a string with length 2800 instead.",
        "context deadline exceeded", "context_management.edits.0: more than one is too many",
        "Invalid value: 'please fix: the prompt is too long: 5000 tokens > 4000 maximum'",
        '[{"loc": ["body"], "msg": "Field required", "input": {"content": "my prompt exceeds the '
        'context window of 4096 tokens"}}]',
        "temperature: Input should be less than or equal to 2",
        "thinking.budget_tokens: Input should be greater than or equal to 1024",
        "`max_tokens` must be greater than `thinking.budget_tokens`",
        "model's input must be text only", "metadata.user_id: String should have at most 256 chars",
        "Invalid schema for function 'x': In context=('properties', 'ids'), array missing items.",
    )  # fmt: skip

    @cases(("words", "prompt", "limit"), TOO_LONG)
    @pytest.mark.parametrize("status", [400, 413, 422, 500])
    def test_a_prompt_that_is_too_long_is_known_by_any_words(self, words, prompt, limit, status):
        refusal = ogx.Refusal(status, words)
        body = {"max_tokens": 4000 if "new_tokens" in words else 32000}
        assert ogx.lesson_from_refusal(refusal, body, model("vllm")) is None
        told = ogx.overflow_error(refusal, 10, None, body["max_tokens"]).message
        shown = f"{prompt} tokens > {limit} maximum" if prompt else words
        assert told == f"prompt is too long: {shown}"

    @pytest.mark.parametrize(("estimate", "window", "told"), [
        (777, 500, "777 tokens > 500 maximum"), (777, 900, "Prompt exceeds max length"),
        (777, None, "Prompt exceeds max length"),
    ], ids=["above", "below", "unknown"])  # fmt: skip
    def test_numbers_of_ours_are_told_only_where_they_show_it(self, estimate, window, told):
        error = ogx.overflow_error(ogx.Refusal(400, "Prompt exceeds max length"), estimate, window)
        assert error.message == f"prompt is too long: {told}"

    @cases(("words", "prompt", "limit"), FITS)
    def test_a_prompt_that_fits_gets_what_is_left_for_its_answer(self, words, prompt, limit):
        refusal, body = ogx.Refusal(400, words), {"max_tokens": 32000}
        lesson = ogx.lesson_from_refusal(refusal, body, model("vllm"))
        assert (str(lesson), lesson.keep) == (f"clamp max_tokens to {limit - prompt}", False)
        assert ogx.lesson_from_refusal(refusal, {"max_tokens": 31000}, model(), [lesson]) is None
        assert ogx.overflow_error(refusal, 99999, 500, 32000) is None

    def test_a_prompt_of_which_only_a_part_was_counted_gets_half_of_what_is_left(self):
        words = "This model's maximum context length is 40960 tokens. However, you requested " \
                "32000 output tokens and your prompt contains at least 8961 input tokens, for a " \
                "total of at least 40961 tokens."  # fmt: skip
        body = {"max_tokens": 32000}
        lesson = ogx.lesson_from_refusal(ogx.Refusal(400, words), body, model("vllm"))
        assert (lesson.value, lesson.keep) == (15999, False)

    def test_a_prompt_that_leaves_no_room_is_told_in_anthropics_words_for_that(self):
        words = "input length and `max_tokens` exceed context limit: 199759 + 8192 > 200000"
        refusal, body = ogx.Refusal(400, words), {"max_tokens": 8192}
        assert ogx.lesson_from_refusal(refusal, body, model("vllm")) is None
        assert ogx.overflow_error(refusal, 10, None, 8192).message == words
        words = "The sum of prompt tokens (32700) and max_tokens (8192) exceeds the limit of 32768."
        assert ogx.overflow_error(ogx.Refusal(400, words), 10, None, 8192).message == (
            "input length and `max_tokens` exceed context limit: 32700 + 8192 > 32768")

    @pytest.mark.parametrize(("words", "asked", "most"), [
        ("it has a maxOutputTokens value of 100000 but the supported range is from 1 (inclusive) "
         "to 65536 (inclusive).", 100000, 65536),  # Vertex
        ("<400> InternalError.Algo.InvalidParameter: Range of max_tokens should be [1, 8192]",
         32000, 8192),
        ("max_tokens: Input should be less than or equal to 8192", 32000, 8192),
        ("Value for max_completion_tokens (32000) exceeds the maximum of 16,384", 32000, 16384),
        ("This model only supports 8192 output tokens", 32000, 8192),
        ("too many tokens: max tokens must be less than or equal to 4000 - received 32000.",
         32000, 4000),  # Cohere
    ], ids=["Vertex", "DashScope", "pydantic", "commas", "only", "Cohere"])  # fmt: skip
    def test_an_answers_limit_is_known_by_any_words(self, words, asked, most):
        refusal, body = ogx.Refusal(400, words), {"max_tokens": asked}
        lesson = ogx.lesson_from_refusal(refusal, body, model("vllm"))
        assert (str(lesson), lesson.keep) == (f"clamp max_tokens to {most}", True)
        assert ogx.overflow_error(refusal, 99999, 500, asked) is None

    @cases("words", OTHER_LIMITS)
    @pytest.mark.parametrize("status", [400, 422, 500])
    def test_other_limits_are_neither_a_prompts_nor_an_answers(self, words, status):
        refusal = ogx.Refusal(status, words)
        assert ogx.told_lengths(refusal, 32000)[0] == ""
        assert ogx.overflow_error(refusal, 99999, 500, 32000) is None

    @pytest.mark.parametrize("words", [
        "You requested up to 32000 tokens, but can only afford 27342.",  # OpenRouter
        "Insufficient credits: with max_tokens of 32000 you can afford at most 27342",
        "Lower max_tokens: your balance covers only 27,342 of 32,000 output tokens",
    ], ids=["OpenRouter", "at most", "only"])  # fmt: skip
    def test_what_an_account_can_afford_is_asked_for_this_once(self, words):
        refusal, body = ogx.Refusal(402, words), {"max_tokens": 32000}
        lesson = ogx.lesson_from_refusal(refusal, body, model("openrouter"))
        assert (str(lesson), lesson.keep) == ("clamp max_tokens to 27342", False)

    @pytest.mark.parametrize("words", ["You can only afford 25 tokens of 32000", "Pay first",
                                       "Prompt tokens limit exceeded: 12000 > 8000"])  # fmt: skip
    def test_an_account_that_can_afford_no_answer_is_empty(self, words):
        refusal, body = ogx.Refusal(402, words), {"max_tokens": 32000, "stop": ["x"]}
        assert ogx.lesson_from_refusal(refusal, body, model("openrouter")) is None
        assert ogx.overflow_error(refusal, 99999, 500, 32000) is None

    def test_a_small_prompt_is_no_overflow_of_its_sum_with_the_answer(self):
        """vLLM counts up to the first token too many: 32768 - 32000 + 1."""
        words = "This model's maximum context length is 32768 tokens. However, you requested " \
                "32000 output tokens and your prompt contains at least 769 input tokens, for a " \
                "total of at least 32769 tokens. (parameter=input_tokens, value=769)"  # fmt: skip
        refusal = ogx.Refusal(400, words)
        lesson = ogx.lesson_from_refusal(refusal, {"max_tokens": 32000}, model("vllm"))
        assert (str(lesson), lesson.keep) == ("clamp max_tokens to 15999", False)
        assert ogx.overflow_error(refusal, 10, None, 32000) is None

    @pytest.mark.parametrize("code", ["context_length_exceeded", ""], ids=["Groq", "no code"])
    def test_a_code_tells_what_is_too_long_where_the_words_do_not(self, code):
        words = "Please reduce the length of the messages or completion."
        told = ogx.overflow_error(ogx.Refusal(400, words, code), 10, None, 32000)
        assert (told and told.message) == (f"prompt is too long: {words}" if code else None)

    def test_of_two_numbers_that_both_stand_as_limits_the_lower_one_is_it(self):
        inner = '{"error": "input exceeds model context: 36111 tokens, limit 32768"}'
        body = {"error": {"message": "Upstream said no", "metadata": {"raw": inner}}}
        refusal = ogx.refusal_from_body(400, json.dumps(body).encode())
        assert ogx.lesson_from_refusal(refusal, {"max_tokens": 8192}, model("messages")) is None
        told = ogx.overflow_error(refusal, 10, None, 8192).message
        assert told == "prompt is too long: 36111 tokens > 32768 maximum"

    @pytest.mark.parametrize("words", [
        "a function's description may have 1000 characters at most, this one has 2012",
        "tools.0.description: 2012 characters, but 1,000 is the maximum length",
        "tools.0.description exceeds the limit of 1000 characters: it has 2012",
    ], ids=["at most", "is the maximum", "limit of"])  # fmt: skip
    def test_a_descriptions_limit_may_stand_before_or_behind_its_word(self, words):
        body = {"tools": [{"type": "function", "function": {
            "name": "f", "description": "d" * 2012, "parameters": {"type": "object"}}}]}
        made = ogx.lesson_from_refusal(ogx.Refusal(400, words), body, model("vllm"))
        assert str(made) == "override max_description to 1000"
        assert ogx.lesson_from_refusal(ogx.Refusal(402, words), body, model("vllm")) is None

    def test_a_verdict_follows_from_subject_verb_and_numbers_however_they_are_said(self):
        """Refusals of a small grammar, always the same."""
        dice, seen = random.Random(7), set()
        for _ in range(600):
            refusal, *told = said_so(dice)
            assert list(ogx.told_lengths(refusal, 32000)) == told, refusal
            seen.add(told[0])
        assert seen == {"overflow", "room", "output", ""}

    @cases("unit", [
        "context ", "exceed", "a_", "a.a.", "'a b c ", "1,111,", "max ", "message': '", "tokens.\n",
        "use ", "stop parameter: ", "tools.0.custom", "prompt max exceed only 12345 ", "<", "beta ",
        "one of ", "insufficient ", "balance ", "stream ", "only ", "reasoning ", "must ", "[0]",
        "image ", "use a.a", "\\'",
    ])  # fmt: skip
    def test_no_words_are_looked_through_for_long(self, unit):
        """2,500 characters by all patterns: some milliseconds. Twice as many take no fourfold."""
        body = {"max_tokens": 32000, "reasoning_effort": "high", "stop": ["x"], "thinking":
                {"type": "adaptive"}, "anthropic-beta": "a-1"}  # fmt: skip

        def spent(size):
            words = (unit * size)[:size]
            start = cpu_time()
            for _ in range(3):
                refusal = ogx.Refusal(400, words)
                ogx.lesson_from_refusal(refusal, body, model("vllm"))
                ogx.overflow_error(refusal, 5, 5, 32000)
                ogx.upstream_error(refusal, "o", {})
            return cpu_time() - start

        ogx.lesson_from_refusal(ogx.Refusal(400, unit), body, model("vllm"))
        short, long = (min(spent(size) for _ in range(4)) for size in (5_000, 20_000))
        assert long < 10 * short + 0.01

    EFFORTS = (  # the words, the effort that was asked for, the lesson
        ("Unexpected reasoning effort high. Supported types are xhigh (default), medium, and low.",
         "high", "cap_effort {} to medium"),  # Qwen's template
        ("Jinja Exception: reasoning effort must be one of: low, medium", "high",
         "cap_effort {} to medium"),
        ("reasoning_effort must be either 'low' or 'high', got 'medium'", "medium",
         "cap_effort {} to low"),
        ("effort: Input should be 'medium', 'high' or 'xhigh'", "low", "raise_effort {} to medium"),
        ("Reasoning mode high is unknown. Valid values: off, on", "high", "drop {}"),
        ("Invalid effort. Allowed: low|medium", "xhigh", "cap_effort {} to medium"),
        ("this model only supports reasoning effort max", "high", "raise_effort {} to max"),
        ("reasoning effort cannot be chosen for this model", "high", "drop {}"),
        ("Setting a reasoning effort is not supported here.", "medium", "drop {}"),
    )

    @cases(("words", "asked", "lesson"), EFFORTS)
    @pytest.mark.parametrize("status", [400, 500])
    @pytest.mark.parametrize("native", [False, True], ids=["chat", "native"])
    def test_an_effort_that_is_taken_is_asked_for(self, words, asked, lesson, status, native):
        name = "output_config.effort" if native else "reasoning_effort"
        body = {"output_config": {"effort": asked}} if native else {name: asked}
        made = ogx.lesson_from_refusal(ogx.Refusal(status, words), body, model("vllm"))
        assert str(made) == lesson.format(name) and made.keep
        done = ogx.with_lessons(body, [made])
        told = made.value and {"output_config": {"effort": made.value}}
        assert done == ((told or {"output_config": {}}) if native else made.value and
                        {name: made.value} or {})  # fmt: skip

    @pytest.mark.parametrize("words", [
        "out of memory while reasoning", "The model made an effort, but failed",
        "reasoning_content must be a string", "temperature must be one of 0, 1",
    ])  # fmt: skip
    def test_other_failures_say_nothing_of_the_effort(self, words):
        body = {"reasoning_effort": "high"}
        assert ogx.lesson_from_refusal(ogx.Refusal(500, words), body, model("vllm")) is None

    @pytest.mark.parametrize(("words", "name"), [
        ("Model grok-4.6 does not support parameter stop.", "stop"),  # xAI
        ("Argument not supported on this model: stop", "stop"),  # xAI, before
        ("The stop parameter is not supported with this model", "stop"),
        ("Unrecognized request argument supplied: store", "store"),
        ("`temperature` is deprecated for this model.", "temperature"),  # Anthropic
        ("temperature is not supported", "temperature"), ("Unknown field: metadata", "metadata"),
        ("context_management: Extra inputs are not permitted", "context_management"),
        ("thinking: Extra inputs are not permitted", "thinking"),
        ("Unsupported parameter: top_k. Use top_p instead.", "top_k"),
        ("This server does not know top_k, stop, store", "top_k"),
        ("'temperature' cannot be chosen for this model", "temperature"),
        ("`temperature` and `top_p` cannot both be specified for this model.", "temperature"),
    ])  # fmt: skip
    def test_a_field_is_known_where_the_words_name_it(self, words, name):
        body = dict.fromkeys(("stop", "top_p", "temperature", "store", "metadata", "top_k",
                              "context_management", "thinking"), 1)  # fmt: skip
        made = ogx.lesson_from_refusal(ogx.Refusal(400, words), body, model("vllm"))
        assert str(made) == f"drop {name}"

    @pytest.mark.parametrize("words", [
        "This is not supported. Use `temperature` and `top_p` to control it.",
        "property 'seed' is unsupported, did you mean 'stop'?", "unknown cause, store it later",
        "Unsupported parameter: 'seed'. Please use stop and top_p.",
    ])  # fmt: skip
    def test_advice_is_never_dropped(self, words):
        body = dict.fromkeys(("stop", "top_p", "temperature", "store"), 1)
        assert ogx.lesson_from_refusal(ogx.Refusal(400, words), body, model("vllm")) is None

    def test_a_refused_output_limit_gets_its_other_name_or_none(self):
        words = ("Unsupported parameter: max_output_tokens",
                 "Extra inputs are not permitted: max_completion_tokens")  # fmt: skip
        lesson = ogx.lesson_from_refusal(ogx.Refusal(400, words[0]), {"max_output_tokens": 9},
                                         model("openai"))  # fmt: skip
        assert str(lesson) == "drop max_output_tokens"
        found = model("openai-compatible")
        lessons, body = [], {"max_completion_tokens": 9}
        for said in (words[1], "Unknown parameter: max_tokens", "Unknown parameter: max_tokens"):
            body = ogx.with_lessons(body, lessons[-1:])
            lessons.append(ogx.lesson_from_refusal(ogx.Refusal(400, said), body, found, lessons))
            if lessons[-1] is None:
                break
        assert [str(k) for k in lessons] == [
            "rename max_completion_tokens to max_tokens", "drop max_tokens", "None"]

    BETA = "claude-code-20250219,interleaved-thinking-2025-05-14,effort-2025-11-24,context-1m-2025"

    @pytest.mark.parametrize(("words", "left_out"), [
        ("invalid beta flag", "effort-2025-11-24,context-1m-2025"),  # Bedrock
        ("Unexpected value(s) `effort-2025-11-24` for the `anthropic-beta` header.",
         "effort-2025-11-24"),
        ("The beta context-1m-2025 is not supported", "context-1m-2025"),
        ("anthropic-beta: 'effort-2025-11-24' is unknown here", "effort-2025-11-24"),
        ("anthropic-beta: unknown values effort-2025-11-24 and context-1m-2025",
         "effort-2025-11-24,context-1m-2025"),
        ("anthropic-beta: the server does not know context-1m-2025", "context-1m-2025"),
    ])  # fmt: skip
    def test_betas_that_are_refused_are_left_out(self, words, left_out):
        body = {"anthropic-beta": self.BETA, "output_config": {"effort": "high"}}
        made = ogx.lesson_from_refusal(ogx.Refusal(400, words), body, model("messages"))
        assert str(made) == f"unlist anthropic-beta to {left_out}" and made.keep
        kept = [b for b in self.BETA.split(",") if b not in left_out.split(",")]
        assert ogx.with_lessons(body, [made])["anthropic-beta"] == ",".join(kept)

    def test_betas_that_are_refused_one_at_a_time_are_refused_twice(self):
        body = {"anthropic-beta": f"{self.BETA},a-2025-01-01,b-2025-02-02"}
        lessons = []
        for beta in ("effort-2025-11-24", "a-2025-01-01"):
            words = f"anthropic-beta: '{beta}' is unknown here"
            made = ogx.lesson_from_refusal(ogx.Refusal(400, words), body, model("messages"),
                                           lessons)  # fmt: skip
            lessons.append(made)
            body = ogx.with_lessons(body, [made])
        assert body == {"anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14"}
        refusal = ogx.Refusal(400, "gpt-x-2025-08-06: temperature is not supported")
        made = ogx.lesson_from_refusal(refusal, {**body, "temperature": 1}, model(), lessons)
        assert str(made) == "drop temperature"

    @pytest.mark.parametrize("words", ["unknown alphabet", "the beta is over", "beta: not found",
                                       "this model does not know the alphabet",
                                       "This feature requires the beta header x"])  # fmt: skip
    def test_other_words_leave_the_betas_alone(self, words):
        body = {"anthropic-beta": self.BETA}
        assert ogx.lesson_from_refusal(ogx.Refusal(400, words), body, model("messages")) is None

    @cases(("words", "asked", "other"), [
        ("thinking: Input tag 'adaptive' found using 'type' does not match any of the expected "
         "tags: 'disabled', 'enabled'", "adaptive", "enabled"),
        ("thinking.type: Input should be 'enabled' or 'disabled'", "adaptive", "enabled"),
        ("adaptive thinking is not supported on this model", "adaptive", "enabled"),
        ('"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive" '
         'and "output_config.effort" to control thinking behavior.', "enabled", "adaptive"),
        ("thinking type enabled is deprecated, use adaptive", "enabled", "adaptive"),
    ])  # fmt: skip
    def test_a_thinking_mode_that_is_refused_becomes_the_other(self, words, asked, other):
        body = {"thinking": {"type": asked, "budget_tokens": 9}, "max_tokens": 9000,
                "anthropic-beta": "", "output_config": {"effort": "high"}}  # fmt: skip
        lesson = ogx.lesson_from_refusal(ogx.Refusal(400, words), body, model("messages"))
        assert str(lesson) == f"retype thinking to {other}"
        sent = ogx.finished_messages(ogx.with_lessons(body, [lesson]))["thinking"]
        budget = {"budget_tokens": 4500} if other == "enabled" else {}
        assert sent == {"type": other, **budget}
        off = {"thinking": {"type": "disabled"}}
        assert ogx.with_lessons(off, [lesson]) == off

    @pytest.mark.parametrize("words", [
        "thinking.budget_tokens: Input should be less than max_tokens when thinking is enabled",
        "thinking may not be enabled when tool_choice forces tool use", "please use adaptive",
    ])  # fmt: skip
    def test_other_refusals_of_thinking_keep_its_mode(self, words):
        body = {"thinking": {"type": "enabled", "budget_tokens": 9}, "anthropic-beta": ""}
        assert ogx.lesson_from_refusal(ogx.Refusal(400, words), body, model("messages")) is None

    @cases(("words", "told"), [
        ("thinking_token_budget is set but reasoning_config is not configured. Please set "
         "--reasoning-parser and/or --reasoning-config to use thinking_token_budget.",
         "drop thinking"),  # vLLM 0.32
        ("thinking budgets are not supported by this server", "drop thinking"),
        ("Unsupported parameter: thinking.budget_tokens", "drop thinking"),
        ("thinking.budget_tokens: Input should be greater than or equal to 1024", "None"),
        ("the budget of your account is not configured", "None"),
    ])  # fmt: skip
    def test_a_thinking_budget_that_is_not_taken_is_left_out(self, words, told):
        body = {"thinking": {"type": "enabled", "budget_tokens": 2048}, "max_tokens": 9000}
        assert str(ogx.lesson_from_refusal(ogx.Refusal(400, words), body, model("vllm"))) == told

    @pytest.mark.parametrize(("path", "lesson"), [
        ("tools.0.custom.eager_input_streaming", "strip_keyword tools to eager_input_streaming"),
        ("thinking.adaptive.display", "strip_keyword thinking to display"),
        ("messages.0.content.2.text.cache_control.ttl", "strip_keyword messages to ttl"),
        ("output_config.effort", "strip_keyword output_config to effort"),
    ])  # fmt: skip
    def test_a_path_of_what_is_not_permitted_is_left_out_wherever_it_occurs(self, path, lesson):
        body = {"tools": [{"eager_input_streaming": True}], "thinking": {"display": "omitted"},
                "messages": [{"cache_control": {"ttl": "1h"}}], "output_config": {"effort": "low"}}
        words = f"{path}: Extra inputs are not permitted"
        made = ogx.lesson_from_refusal(ogx.Refusal(400, words), body, model("messages"))
        assert str(made) == lesson

    def test_a_calls_arguments_are_no_fields(self):
        call_with = {"type": "tool_use", "input": {"ttl": 5, "a": [{"ttl": 6}]}, "ttl": 7}
        lesson = ogx.Lesson("strip_keyword", "messages", "ttl")
        done = ogx.with_lessons({"messages": [call_with]}, [lesson])
        assert done == {"messages": [{"type": "tool_use", "input": call_with["input"]}]}

    @pytest.mark.parametrize("words", [
        "This model only support stream mode, please enable the stream parameter to access it.",
        "parameter.enable_thinking must be set to false for non-streaming calls",  # DashScope
        "Stream must be set to true", "Requests with max_tokens > 4096 must have stream=true",
        "Streaming is required for operations that may take longer than 10 minutes",
        "The model is only available in streaming mode",
    ])  # fmt: skip
    def test_models_that_only_stream_are_asked_so(self, words):
        body, found = {"max_tokens": 9000}, model("openai-compatible")
        lesson = ogx.lesson_from_refusal(ogx.Refusal(400, words), body, found)
        taught = ogx.model_with_overrides(found, [lesson])
        for make in (ogx.chat_request, ogx.responses_request):
            assert make(request(), taught)["stream"] is True
        assert "stream" not in ogx.chat_request(request(), found)

    @pytest.mark.parametrize("words", ["the upstream is down", "Streaming is not supported",
                                       "mainstream tools only"])  # fmt: skip
    def test_other_words_about_streams_teach_nothing(self, words):
        assert ogx.lesson_from_refusal(ogx.Refusal(400, words), {}, model()) is None

    @cases(
        ("words", "told"),
        [
            ("This model's maximum context length is 4097 tokens. However, your messages resulted "
             "in 4294 tokens. Please reduce the length of the messages.", (4294, 4097)),
            ("This model's maximum context length is 40960 tokens. However, your prompt contains "
             "at least 50000 input tokens, which exceeds this limit even without any output "
             "tokens. Please reduce the length of the input prompt.", (50000, 40960)),
            ("Input length (5000) exceeds model's maximum context length (4096).", (5000, 4096)),
            ("Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in "
             "289650 tokens. Please reduce the length of the messages.", (289650, 272000)),
            ("The input token count (2845475) exceeds the maximum number of tokens allowed "
             "(1048576).", (2845475, 1048576)),
            ("request (20020 tokens) exceeds the available context size (16384 tokens), try "
             "increasing it", (20020, 16384)),
            ("Current length is 9000 while limit is 8192", (9000, 8192)),
            ("This model's maximum prompt length is 131072 but the request contains 141107 "
             "tokens.", (141107, 131072)),
            ("Request too large for model `x` in organization `o` service tier `on_demand` on "
             "tokens per minute (TPM): Limit 6000, Requested 12000", (12000, 6000)),  # Groq, 413
            ("Your input exceeds the context window of this model.", (777, 500)),
            ("Input is too long for requested model.", (777, 500)),
        ],
    )  # fmt: skip
    def test_a_prompt_too_long_is_told_in_words_that_make_the_client_compact(self, words, told):
        error = ogx.overflow_error(ogx.Refusal(400, words), 777, 500)
        assert (error.status, error.type) == (400, "invalid_request_error")
        assert error.message == f"prompt is too long: {told[0]} tokens > {told[1]} maximum"

    def test_other_refusals_are_no_overflow(self):
        assert ogx.overflow_error(ogx.Refusal(400, "bad request"), 1, None) is None
        assert ogx.overflow_error(ogx.Refusal(429, "context_length_exceeded"), 1, None) is None


@contextlib.contextmanager
def logging_to(*args):
    """A logger of its own that writes as ogx.py's log does; to stderr, where no path is given."""
    handler = ogx.LogHandler(*args)
    logger = logging.Logger("alone")
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        handler.flush()


# What terminals obey, and what turns text around: of each kind some, and the ends of each range.
CONTROLS = "\x00\x07\x08\x09\x0b\x0d\x1b\x1f\x7f\x80\x9b\x9f\u2028\u2029\u202a\u202e\u2066\u2069" \
           "\ud800\udfff"  # fmt: skip


class TestHTTP:
    READERS = {
        "sized": (lambda: ogx.SizedBody(11), b"hello worldREST", (b"hello world", True, b"REST")),
        "sized, cut off": (lambda: ogx.SizedBody(11), b"hello", (b"hello", False, b"")),
        "none": (lambda: ogx.SizedBody(0), b"REST", (b"", True, b"REST")),
        "endless": (ogx.EndlessBody, b"hello world", (b"hello world", False, b"")),
        "chunked": (ogx.ChunkedBody, b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\na: b\r\n\r\nREST",
                    (b"hello world", True, b"REST")),
        "chunked with line feeds": (ogx.ChunkedBody, b"5\nhello\n 6 \n world\n0\n\nREST",
                                    (b"hello world", True, b"REST")),
        "chunked, cut off": (ogx.ChunkedBody, b"5\r\nhello\r\n6\r\n wor",
                             (b"hello wor", False, b"")),
    }  # fmt: skip

    @pytest.mark.parametrize("reader", READERS)
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
    def test_bodies_are_the_same_however_they_are_cut(self, reader, size):
        make, data, expected = self.READERS[reader]
        body, payload, rest = make(), b"", b""
        for at in range(0, len(data), size):
            if body.done:
                rest += data[at : at + size]
                continue
            payload += body.feed(data[at : at + size])
        assert (payload, body.done, body.rest + rest) == expected
        if body.done or make is ogx.EndlessBody:
            body.end()
            assert body.done
        else:
            assert refused(body.end).status == 502

    @cases(
        ("data", "words"),
        [(b"zz\r\n", "isn't hexadecimal"), (b"2\r\nhello\r\n", "longer than it said"),
         (b"-1\r\n", "isn't hexadecimal"), (b"0" * 70_000, "a line is too long"),
         (b"0\r\n" + b"a: b\r\n" * 20_000, "too many trailers")],
    )  # fmt: skip
    def test_broken_chunks_are_refused(self, data, words):
        error = refused(ogx.ChunkedBody().feed, data)
        assert error.status == 400 and words in error.message

    @cases(
        ("status", "headers", "kind"),
        [
            (200, {"content-length": "5"}, ogx.SizedBody),
            (200, {"content-length": "5, 5"}, ogx.SizedBody),  # some servers send it twice
            (200, {"transfer-encoding": "gzip, chunked", "content-length": "5"}, ogx.ChunkedBody),
            (200, {}, ogx.EndlessBody), (204, {}, ogx.SizedBody), (304, {}, ogx.SizedBody),
        ],
    )  # fmt: skip
    def test_the_framing_of_an_answer(self, status, headers, kind):
        assert type(ogx.answer_body(status, headers)) is kind

    @cases(
        ("headers", "status"),
        [
            ({"transfer-encoding": "chunked", "content-length": "5"}, 400),
            ({"transfer-encoding": "gzip, chunked"}, 400), ({"content-length": "5, 5"}, 400),
            ({"content-length": "+5"}, 400), ({"content-length": ""}, 400),
            ({"content-length": "101"}, 413),
        ],
    )  # fmt: skip
    def test_smuggling_and_large_requests_are_refused_by_their_framing(self, headers, status):
        assert refused(ogx.request_body, headers, 100).status == status

    @cases(
        ("line", "headers", "closes"),
        [
            ("1.1", "", False), ("1.1", "connection: close", True), ("1.0", "", True),
            ("1.1", "Connection: x, Close", True), ("1.0", "connection: Keep-Alive", False),
            ("1.0", "connection: keep-alive\r\ntransfer-encoding: chunked", True),
            ("1.1", "connection: closed", False),
        ],
    )  # fmt: skip
    def test_who_keeps_a_connection_alive(self, line, headers, closes):
        head = f"GET /a?b HTTP/{line}\r\nhost: x\r\n{headers}\r".replace("\r\n\r", "\r")
        parsed = ogx.request_head(head.encode())
        assert (parsed.method, parsed.target, parsed.closes()) == ("GET", "/a?b", closes)

    @pytest.mark.parametrize("piece", [1, 3, 1000])
    @cases(
        ("data", "items"),
        [
            (b"\n\n" + sse({"a": 1}, done=False), [b'{"a": 1}']),
            (b" \n {\n\n\"a\": 1}", [b" \n {\n\n\"a\": 1}"]), (b"<html>", [b"<html>"]),
            (b"data: x\n\ndata: y", [b"x", b"y"]), (b"", []), (b" \n", []),
        ],
    )  # fmt: skip
    def test_answers_are_events_or_one_body_whatever_they_call_themselves(self, piece, data, items):
        reader, read = ogx.AnswerReader(), []
        for at in range(0, len(data), piece):
            read += reader.feed(data[at : at + piece])
        assert read + reader.end() == items


class TestLoop:
    """With toy tasks: what a Wait, OTHERS_FIRST and MAY_BLOCK mean, and who runs what."""

    @pytest.fixture
    def loop(self):
        loop = ogx.Loop()
        thread = threading.Thread(target=loop.run, name="loop")
        thread.start()
        yield loop
        loop.close()
        thread.join(10)
        assert not thread.is_alive()

    @pytest.fixture
    def pair(self):
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            yield here, there

    def run(self, loop, *tasks):
        """Run tasks to their end; what each returned."""
        results, ended = [None] * len(tasks), threading.Semaphore(0)

        def kept(place, steps):
            results[place] = yield from steps

        for place, steps in enumerate(tasks):
            loop.start(kept(place, steps), ended.release)
        for _ in tasks:
            assert ended.acquire(timeout=10)
        return results

    def test_a_wait_ends_with_a_ready_socket_or_when_it_is_late(self, loop, pair):
        def task():
            late = yield ogx.Wait(((pair[0], ogx.READ),), time.monotonic() + 0.01)
            pair[1].send(b"x")
            ready = yield ogx.Wait(((pair[0], ogx.READ),))
            assert pair[0].recv(9) == b"x"
            writable = yield ogx.Wait(((pair[0], ogx.WRITE), (pair[1], ogx.READ)))
            return late, ready, writable

        assert self.run(loop, task()) == [(None, pair[0], pair[0])]
        assert ogx.drive(task()) == (None, pair[0], pair[0])

    def test_a_sleep_lets_others_go_on(self, loop):
        def quick():
            yield ogx.OTHERS_FIRST
            order.append("quick")

        def slow():
            yield from ogx.sleep(0.02)
            order.append("slow")

        order = []
        self.run(loop, slow(), quick())
        assert order == ["quick", "slow"]

    def test_who_goes_on_and_on_gives_way_after_its_time_slice(self, loop):
        def greedy(name):
            while len(set(order)) < 2:
                order.append(name)
                yield ogx.OTHERS_FIRST

        order = []
        self.run(loop, greedy("a"), greedy("b"))
        assert set(order) == {"a", "b"}

    def test_what_may_block_gets_a_thread_and_holds_up_no_one(self, loop):
        def blocking():
            threads.append(threading.current_thread().name)
            yield ogx.MAY_BLOCK
            threads.append(threading.current_thread().name)
            assert go_on.wait(10)
            yield ogx.MAY_BLOCK
            yield ogx.Wait(until=0.0)
            threads.append(threading.current_thread().name)

        def other():
            yield ogx.OTHERS_FIRST
            go_on.set()

        threads, go_on = [], threading.Event()
        self.run(loop, blocking(), other())
        assert threads[::2] == ["loop", "loop"] and threads[1] != "loop"

    @pytest.mark.parametrize("seconds", [1e7, 1e12, float("inf")])
    def test_there_is_no_wait_too_long(self, loop, pair, seconds):
        def patient():
            return (yield ogx.Wait(((pair[0], ogx.READ),), time.monotonic() + seconds))

        def other():
            yield ogx.Wait(until=time.monotonic() + 0.02)
            pair[1].send(b"x")

        assert self.run(loop, patient(), other()) == [pair[0], None]
        assert ogx.drive(patient()) is pair[0]

    def test_queued_tasks_run_after_the_others_that_were_woken(self, loop, pair):
        def reader(name, sock, queued):
            yield ogx.Wait(((sock, ogx.READ),), queued=queued)
            order.append(name)

        def both_at_once():
            yield ogx.Wait(until=time.monotonic() + 0.02)  # until both wait
            other.send(b"x")
            pair[1].send(b"x")

        order, (mine, other) = [], socket.socketpair()
        with mine, other:
            self.run(loop, reader("queued", pair[0], True), reader("first", mine, False),
                     both_at_once())  # fmt: skip
        assert order == ["first", "queued"]

    def test_only_its_owner_steps_a_task(self, loop):
        task = ogx.Task(iter(()), lambda: None)
        task.owner = threading.current_thread()
        with pytest.raises(AssertionError, match="only its owner"):
            loop._stepped(task, loop)

    def test_an_interruption_reaches_tasks_wherever_they_are(self, loop, pair):
        def waiting():
            begun.release()
            try:
                yield ogx.Wait(((pair[0], ogx.READ),))
            except ogx.OgxError as error:
                return error.status

        def in_a_thread():
            yield ogx.MAY_BLOCK
            begun.release()
            assert interrupted.wait(10)
            try:
                yield ogx.OTHERS_FIRST
                yield ogx.Wait()
            except ogx.OgxError as error:
                return threading.current_thread().name, error.status

        begun, interrupted = threading.Semaphore(0), threading.Event()

        def interrupt():
            assert begun.acquire(timeout=10) and begun.acquire(timeout=10)
            loop.interrupt(lambda: ogx.OgxError(503, "stopping"))
            interrupted.set()

        threading.Thread(target=interrupt).start()
        assert self.run(loop, waiting(), in_a_thread()) == [503, ("loop", 503)]

    def test_a_failing_task_ends_alone(self, loop, pair, caplog):
        def failing():
            yield ogx.OTHERS_FIRST
            raise KeyError("oh")

        def waiting():
            yield ogx.Wait(((pair[0], ogx.READ),))
            return "fine"

        def twice():  # the socket is watched for another task
            yield ogx.Wait(until=time.monotonic() + 0.01)
            yield ogx.Wait(((pair[0], ogx.READ),))
            return "never"

        def last():
            yield ogx.Wait(until=time.monotonic() + 0.05)
            pair[1].send(b"x")

        results = self.run(loop, failing(), waiting(), twice(), last())
        assert results == [None, "fine", None, None]
        assert "KeyError: 'oh'" in caplog.text and "a connection is lost" in caplog.text

    @pytest.mark.parametrize("when", ["begun", "not begun", "after the end"])
    def test_a_loop_that_closes_ends_its_tasks_once(self, when):
        def waiting():
            try:
                begun.set()
                yield ogx.Wait()
            finally:
                ends.append("steps")

        loop, ends, begun = ogx.Loop(), [], threading.Event()
        thread = threading.Thread(target=loop.run)
        if when == "begun":
            thread.start()
            loop.start(waiting(), lambda: ends.append("end"))
            assert begun.wait(10)
            loop.close()
        else:
            if when == "not begun":
                loop.start(waiting(), lambda: ends.append("end"))
            loop.close()
            thread.start()
        thread.join(10)
        if when == "after the end":
            loop.start(waiting(), lambda: ends.append("end"))
        assert ends == (["steps"] if when == "begun" else []) + ["end"]

    def test_more_sockets_than_select_takes_cost_the_newest_alone(self, monkeypatch, pair):
        class Full(selectors.DefaultSelector):
            def select(self, timeout=None):
                if len(self.get_map()) > 2:  # with the loop's own
                    raise ValueError("too many file descriptors in select()")
                return super().select(timeout)

        def waiting(sock):
            yield ogx.Wait(((sock, ogx.READ),))
            return "fine"

        monkeypatch.setattr(selectors, "DefaultSelector", Full)
        loop = ogx.Loop()
        thread = threading.Thread(target=loop.run)
        thread.start()
        oldest, ended = waiting(pair[0]), threading.Event()
        loop.start(oldest, ended.set)
        assert self.run(loop, waiting(pair[1])) == [None]
        assert not ended.is_set()
        loop.close()
        thread.join(10)

    def test_where_no_thread_is_left_the_task_is_told(self, loop, monkeypatch):
        def none(thread):
            raise RuntimeError("can't start new thread")

        def task():
            monkeypatch.setattr(threading.Thread, "start", none)
            try:
                yield ogx.MAY_BLOCK
            except ogx.OgxError as error:
                return error.status

        assert self.run(loop, task()) == [529]

    def test_what_waits_in_the_loops_thread_is_caught(self, loop, monkeypatch):
        def waiting():
            time.sleep(0)
            threading.Event().wait(0)
            yield ogx.MAY_BLOCK
            time.sleep(0)

        caught = trap_waits(monkeypatch)
        self.run(loop, waiting())
        assert caught == ["sleep from waiting", "wait from wait"]

    def test_only_the_loop_knows_selectors(self):
        loop = SOURCE[SOURCE.index("# ======== Loop") : SOURCE.index("# ======== Log")]
        names = re.compile(r"\bselectors\.\w+")
        assert len(names.findall(loop)) == len(names.findall(SOURCE)) > 0

    def test_the_loop_knows_no_http(self):
        loop = SOURCE[SOURCE.index("# ======== Loop") : SOURCE.index("# ======== Log")]
        tree = ast.parse(loop)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {"Handler", "Exchange", "Reply", "Server", "Gateway", "Upstream"}


class TestLog:
    def test_what_no_file_can_hold_is_logged_in_other_letters(self, tmp_path, capsys):
        path = tmp_path / "log"
        with logging_to(str(path)) as logger:
            logger.info("model '\ud800', \xe9")
        assert path.read_text("utf-8").endswith(" model '?', \xe9\n")
        assert capsys.readouterr().err == ""

    @cases("control", CONTROLS)
    def test_no_control_character_is_logged_or_said(self, control, tmp_path, capsys):
        path = tmp_path / "log"
        with logging_to(str(path)) as logger:
            logger.warning("%s failed: %s", f"a{control}b", ValueError(f"c{control}d"))
            try:
                raise ValueError(f"e{control}f")
            except ValueError:
                logger.exception("odd")
        ogx.say(f"a{control}b", "c")
        ogx.say(f"a{control}b", to="stderr")
        written = path.read_text("utf-8") + "".join(capsys.readouterr())
        assert control not in written and "\na?b\nc\na?b\n" in written
        assert "ValueError: e" in written

    def test_letters_of_all_scripts_are_logged_and_said(self, tmp_path, capsys):
        words = "\xe9 \xa0 \u0627\u0644 \u4f60 \U0001f600 \u200d \u200f \xad"
        with logging_to(str(tmp_path / "log")) as logger:
            logger.info("%s", words)
        ogx.say(words)
        assert words in (tmp_path / "log").read_text("utf-8")
        assert words in capsys.readouterr().out

    @cases("words", ["one\n2026-01-01 00:00:00,000 req_1 GET / 200", "a\r\nb\n"])
    def test_no_words_make_a_line_of_their_own(self, words, tmp_path):
        with logging_to(str(tmp_path / "log")) as logger:
            logger.info("error: %s", words)
            try:
                raise ValueError(words)
            except ValueError:
                logger.exception("odd")
        lines = (tmp_path / "log").read_text("utf-8").splitlines()
        stamped = [line for line in lines if re.match(r"\d{4}-\d\d-\d\d ", line)]
        assert len(stamped) == 2 and all(line.startswith("  ") for line in lines[2:])

    @cases("letter", ["a", "\xe9", "\u4f60"])
    def test_lines_are_bounded(self, letter, tmp_path):
        with logging_to(str(tmp_path / "log")) as logger:
            logger.info("%s", letter * 100_000)
        line = (tmp_path / "log").read_bytes().rstrip(b"\n")
        assert ogx.LOG_LINE - 4 < len(line) <= ogx.LOG_LINE and line.decode().endswith(letter)

    @pytest.mark.parametrize("size", [10, 3000, 100_000])
    @pytest.mark.parametrize("kind", ["pipe", "terminal", "socket"])
    def test_a_stalled_reader_of_the_log_blocks_no_one(self, size, kind, monkeypatch):
        """A terminal has room for less than a line when it says that it can be written."""
        reader, writer = {"pipe": os.pipe, "terminal": os.openpty, "socket": lambda: [
            s.detach() for s in socket.socketpair()]}[kind]()  # fmt: skip
        monkeypatch.setattr(sys, "stderr", open(writer, "w"))  # noqa: SIM115
        handler = ogx.LogHandler()
        record = logging.makeLogRecord({"msg": "x" * size, "levelno": logging.INFO})
        for _ in range(5_000_000):
            handler.emit(record)
            if handler._lost > 20 * ogx.LOG_QUEUE:  # in a row: nothing is taken any more
                break
        lost, told = handler._lost, b""
        while b"\n" not in told or b"lines found no reader" not in told:
            told = told[-100:] + os.read(reader, 65536)
            if handler._lines.empty():
                handler.emit(logging.makeLogRecord({"msg": "again", "levelno": logging.INFO}))
        os.close(reader)
        assert lost > ogx.LOG_QUEUE

    def test_a_file_that_cant_be_written_is_told_once(self, capsys):
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full here")
        with logging_to("/dev/full") as logger:
            logger.info("one")
            logger.info("two")
        assert re.fullmatch("--log-file /dev/full: .*No space.*\n", capsys.readouterr().err)

    def test_nothing_else_writes_to_a_terminal(self):
        """All that is printed or logged goes through say() and the log's handler."""
        tree = ast.parse(SOURCE)
        owners = {id(node): function.name for function in ast.walk(tree)
                  if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
        for node in ast.walk(tree):
            words = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if words == "print":
                assert owners[id(node)] == "say", node.lineno
            assert not re.match(r"sys\.(stdout|stderr|__std\w+)\.", words), node.lineno
            assert words not in ("os.write", "logging.StreamHandler", "logging.FileHandler")
            if words == "logging.basicConfig":
                assert owners[id(node)] == "start_log", node.lineno
            if words.startswith("log."):
                handler = ast.unparse(node.args[0]) if words == "log.addHandler" else ""
                assert handler == "logging.NullHandler()" or words.split(".")[1] in (
                    "debug", "info", "warning", "exception", "log", "isEnabledFor")  # fmt: skip


class TestStore:
    def store(self, tmp_path, **facts):
        """A store in a file, with registrations."""
        store = ogx.Store(str(tmp_path / "state.sqlite"))
        for key, number in facts.items():
            assert store.put("alias", key, {"x": number}) == ""
        return store

    def edited(self, path, script):
        """Do with a state file what other programs do."""
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.executescript(script)

    def test_values_survive_in_a_file_of_the_users_alone(self, tmp_path):
        path = str(tmp_path / "deep" / "state.sqlite")
        store = ogx.Store(path)
        store.put("alias", "b", {"x": 1})
        store.put("alias", "a", {"x": 2})
        store.put("alias", "a", {"x": 3})
        store.put("other", "c", [])
        store.put("alias", "b", None)  # not closed: a killed process doesn't close either
        assert ogx.Store(path).all("alias") == {"a": {"x": 3}}
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700

    def test_the_table_is_what_it_always_was(self, tmp_path):
        store = self.store(tmp_path, a=1)
        with contextlib.closing(sqlite3.connect(store.path)) as database:
            columns = database.execute("PRAGMA table_info(facts)").fetchall()
            assert [column[1:3] for column in columns] == [
                ("kind", "TEXT"), ("key", "TEXT"), ("value", "TEXT"), ("at", "REAL")]
            ((*fact, at),) = database.execute("SELECT * FROM facts").fetchall()
        assert fact == ["alias", "a", '{"x": 1}'] and abs(at - time.time()) < 1000

    OLD = """
        CREATE TABLE facts (kind TEXT, key TEXT, value TEXT, at REAL, PRIMARY KEY (kind, key));
        INSERT INTO facts VALUES ('alias', 'fast', '{"model_id": "fast", "provider_id": "openai",
            "provider_model_id": "b", "targets": []}', 1.5);
        INSERT INTO facts VALUES ('ratio', 'openai/gpt-x', '{"ratio": 1.25}', 2);
        INSERT INTO facts VALUES ('lessons', 'openai/gpt-x', '[
            {"action": "clamp", "field": "max_tokens", "value": 5, "keep": true, "dialect": "chat",
             "at": 9e9},
            {"action": "drop", "field": "stop", "value": null, "keep": true, "dialect": "chat",
             "at": 9e9}]', 3)"""  # as versions before this one wrote

    def test_a_file_of_an_earlier_version_is_read_added_to_and_forgotten(self, tmp_path):
        path = str(tmp_path / "state.sqlite")
        self.edited(path, self.OLD)
        store = ogx.Store(path)
        assert store.all("alias")["fast"]["provider_model_id"] == "b"
        lessons = ogx.Lessons(store)
        assert [str(k) for k in lessons.of(model())] == ["clamp max_tokens to 5", "drop stop"]
        lessons.add(model(), [ogx.Lesson("clamp", "max_tokens", 4, dialect="chat")])
        for known in (lessons, ogx.Lessons(ogx.Store(path))):
            assert sorted(map(str, known.of(model()))) == ["clamp max_tokens to 4", "drop stop"]
        assert lessons.forget("openai/gpt-x") and ogx.Store(path).all("lessons") == {}

    @pytest.mark.parametrize("runs", [False, True], ids=["at the start", "while it runs"])
    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(b"SQLite format 3\0" + b"\xff" * 5000, id="odd header"),
            pytest.param(None, id="a page"),
        ],
    )
    def test_a_corrupt_file_is_set_aside_with_a_message(self, tmp_path, caplog, content, runs):
        facts, path = {f"k{n}": {"x": n} for n in range(200)}, tmp_path / "state.sqlite"
        store = self.store(tmp_path, first=0)
        self.edited(path, """WITH RECURSIVE n(x) AS (SELECT 0 UNION SELECT x + 1 FROM n LIMIT 200)
            REPLACE INTO facts SELECT 'alias', 'k' || x, '{"x": ' || x || '}', x FROM n""")
        store.put("alias", "first", None)
        data = bytearray(path.read_bytes())
        data[8192:12288] = b"\xff" * 4096
        content = content or bytes(data)
        path.write_bytes(content)
        store = store if runs else ogx.Store(str(path))
        store.put("alias", "a", {})
        rows_are_whole = runs or content == bytes(data)  # it is a page of the index
        expected = {**(facts if rows_are_whole else {}), "a": {}}
        assert ogx.Store(str(path)).all("alias") == store.all("alias") == expected
        (aside,) = tmp_path.glob("state.sqlite.corrupt-*")
        assert aside.read_bytes() == content and str(aside) in caplog.text

    @pytest.mark.parametrize("content", [b"garbage" * 1000, bytes(8192), b"xy"], ids=len)
    def test_a_file_in_use_that_is_no_database_any_more_is_set_aside(self, tmp_path, content):
        store = self.store(tmp_path, a=1)
        (tmp_path / "state.sqlite").write_bytes(content)
        store.sync()
        assert ogx.Store(store.path).all("alias") == {"a": {"x": 1}}
        assert len(list(tmp_path.glob("state.sqlite.corrupt-*"))) == 1

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(b"Buy milk.\n", id="short"),
            pytest.param(b"this is no database" * 100, id="long"),
            pytest.param("CREATE TABLE a (url TEXT); INSERT INTO a VALUES ('u')", id="table"),
            pytest.param("CREATE TABLE facts (a TEXT); INSERT INTO facts VALUES ('u')", id="facts"),
            pytest.param("CREATE TABLE facts (kind, key, value, at, more)", id="wider"),
            pytest.param("CREATE VIEW facts AS SELECT 1 kind, 2 key, 3 value, 4 at", id="view"),
        ],
    )
    def test_another_programs_file_is_left_alone(self, tmp_path, caplog, content):
        path = tmp_path / "state.sqlite"
        path.write_bytes(content) if isinstance(content, bytes) else self.edited(path, content)
        before = path.read_bytes()
        store = ogx.Store(str(path))
        assert str(path) in store.put("alias", "a", {}) == store.problem
        store.sync()
        store.close()
        assert store.all("alias") == {"a": {}} and caplog.text.count("can't use") == 1
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["state.sqlite"]

    @pytest.mark.parametrize("value", ["no json", "5", "[" * 5000, "9" * 5000, '"x"', "null"],
                             ids=["words", "number", "deep", "long", "text", "null"])  # fmt: skip
    def test_rows_of_other_shapes_are_passed_over(self, tmp_path, value):
        store = self.store(tmp_path, z=1)
        odd = f"""INSERT INTO facts VALUES ('alias', 'a', '{value}', 1), ('alias', 'b', NULL, 1),
            ('alias', NULL, '{{}}', 1), ('alias', x'61', '{{}}', 1), (NULL, NULL, NULL, NULL),
            ('alias', 'c', x'ff00', 'x'),
            (5, 6, 7, 8), ('alias', CAST(x'ff' AS TEXT), '{{}}', 1)"""
        self.edited(store.path, odd)
        store = ogx.Store(store.path)
        assert store.all("alias") == {"\ufffd": {}, "z": {"x": 1}}
        assert store.put("alias", "y", {}) == ""

    def test_a_read_only_file_is_read_and_what_is_new_is_told_to_be_lost(self):
        code = """if True:
            import os, sqlite3, sys, ogx
            os.chmod(sys.argv[1], 0o444)
            os.chmod(os.path.dirname(sys.argv[1]), 0o555)
            os.geteuid() or os.setuid(65534)  # root may write everywhere
            store = ogx.Store(sys.argv[1])
            print(store.all("alias"), store.put("alias", "b", {}), list(store.all("alias")))"""
        with tempfile.TemporaryDirectory() as folder:
            program = [sys.executable, "-c", code, self.store(Path(folder), a=1).path]
            done = subprocess.run(program, capture_output=True, text=True, cwd=HERE)
            os.chmod(folder, 0o700)
        assert done.stdout.startswith("{'a': {'x': 1}} can't use "), done.stderr
        assert "readonly" in done.stdout and done.stdout.endswith("['a', 'b']\n")

    @pytest.mark.parametrize("odd", ["folder", "pipe", "below a file", "null"])
    def test_where_the_file_cannot_be_used_things_are_kept_in_memory(self, tmp_path, caplog, odd):
        path = str(tmp_path / "state.sqlite")
        if odd == "folder":
            os.mkdir(path)
        elif odd == "pipe":
            os.mkfifo(path)
        elif odd == "null":
            path = "/dev/null"
        else:
            (tmp_path / "file").write_text("")
            path = str(tmp_path / "file" / "state.sqlite")
        store = ogx.Store(path)
        assert f"can't use {path} as state file" in store.put("alias", "a", {})
        assert store.all("alias") == {"a": {}} and caplog.text.count("can't use") == 1
        store.sync()
        store.close()
        assert caplog.text.count("can't use") == 1

    def test_without_a_file_that_is_told_and_what_was_forgotten_takes_no_room(self):
        store = ogx.Store()
        assert "there is no state file" in store.put("alias", "a", {"x": 1})
        assert store.all("alias") == {"a": {"x": 1}}
        store.put("alias", "a", None)
        assert store._unsaved == store._saved == {}

    @contextlib.contextmanager
    def locked(self, path, how="EXCLUSIVE"):
        """Another process holds the file."""
        code = f"""if True:
            import sqlite3, sys
            database = sqlite3.connect(sys.argv[1], isolation_level=None)
            database.execute("BEGIN {how}")
            print("locked", flush=True)
            sys.stdin.read()"""
        with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as process:  # fmt: skip
            process.stdout.readline()
            yield
            process.stdin.close()

    @pytest.fixture
    def impatient(self, monkeypatch):
        """sqlite waits for no lock."""
        connect = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0}))

    @pytest.mark.parametrize("how", ["EXCLUSIVE", "IMMEDIATE"])
    def test_what_a_lock_keeps_out_is_written_later(self, impatient, tmp_path, caplog, how):
        store = self.store(tmp_path, a=1, gone=2)
        with self.locked(store.path, how):
            told = store.put("alias", "b", {"x": 2})
            assert "(database is locked): what it lacks is lost" in told
            with pytest.MonkeyPatch.context() as patch:  # one waits for all
                patch.setattr(store, "_write_and_read", lambda: pytest.fail("tried at once"))
                assert store.put("alias", "gone", None) == told
            store.sync()
            assert store.all("alias") == {"a": {"x": 1}, "b": {"x": 2}}
        assert caplog.text.count(told) == 1
        store.sync()
        assert store.problem == "" and "is used again" in caplog.text
        assert ogx.Store(store.path).all("alias") == {"a": {"x": 1}, "b": {"x": 2}}

    def test_what_was_locked_out_is_written_at_the_end(self, impatient, tmp_path):
        store = self.store(tmp_path, a=1)
        with self.locked(store.path):
            store.put("alias", "b", {"x": 2})
        store.close()
        assert ogx.Store(store.path).all("alias") == {"a": {"x": 1}, "b": {"x": 2}}

    def test_a_file_that_is_locked_at_the_start_is_read_later(self, impatient, tmp_path):
        path = self.store(tmp_path, a=1).path
        with self.locked(path):
            store = ogx.Store(path)
            assert store.all("alias") == {} and store.put("alias", "b", {"x": 2})
        store.sync()
        assert ogx.Store(path).all("alias") == store.all("alias") == {"a": {"x": 1}, "b": {"x": 2}}

    def test_a_full_disk_is_told_and_nothing_is_lost(self, tmp_path, monkeypatch):
        store, connect = self.store(tmp_path, a=1), sqlite3.connect
        full = ["PRAGMA max_page_count=3"]

        def connected(*values, **named):
            database = connect(*values, **named)
            full and database.execute(*full)
            return database

        monkeypatch.setattr(sqlite3, "connect", connected)
        assert "database or disk is full" in store.put("alias", "b", {"long": "x" * 100_000})
        assert list(store.all("alias")) == ["a", "b"]
        full.clear()
        store.sync()
        assert store.problem == "" and list(ogx.Store(store.path).all("alias")) == ["a", "b"]

    def test_a_python_without_sqlite_keeps_things_in_memory(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "sqlite3", None)
        store = ogx.Store(str(tmp_path / "state.sqlite"))
        assert "sqlite3" in store.put("alias", "a", {}) and store.all("alias") == {"a": {}}

    def changed_file(self, path, how, backup):
        """What may happen to a file while a server runs."""
        if how == "removed":
            os.remove(path)
        elif how == "its folder removed":
            shutil.rmtree(os.path.dirname(path))
        elif how == "emptied":
            open(path, "w").close()
        elif how == "dropped":
            self.edited(path, "DROP TABLE facts; VACUUM")
        elif how == "an older copy":
            os.replace(backup, path)
        elif how == "an older copy in its place":
            shutil.copyfile(backup, path)
        else:  # another server was quicker
            os.remove(path)
            ogx.Store(path).put("alias", "theirs", {"x": 9})

    @pytest.mark.parametrize("how", ["removed", "its folder removed", "emptied", "dropped",
                                     "an older copy", "an older copy in its place", "another"])
    @pytest.mark.parametrize("put", [True, False], ids=["put", "sync"])  # fmt: skip
    def test_what_happens_to_the_file_loses_nothing(self, tmp_path, how, put):
        (tmp_path / "folder").mkdir()
        store, backup = self.store(tmp_path / "folder", a=1), str(tmp_path / "copy")
        shutil.copy(store.path, backup)
        store.put("alias", "b", {"x": 2})
        self.changed_file(store.path, how, backup)
        expected = {"a": {"x": 1}, "b": {"x": 2}, **({"c": {}} if put else {})}
        expected.update({"theirs": {"x": 9}} if how == "another" else {})
        assert store.put("alias", "c", {}) == "" if put else store.sync() is None
        for known in (store, ogx.Store(store.path)):
            assert known.all("alias") == expected
        assert os.stat(store.path).st_mode & 0o777 == 0o600

    def test_a_file_that_is_removed_stays_away_where_nothing_is_known(self, tmp_path):
        store = self.store(tmp_path, a=1)
        store.put("alias", "a", None)
        os.remove(store.path)
        store.sync()
        assert os.listdir(tmp_path) == []

    def test_two_stores_see_each_others_changes(self, tmp_path):
        one, two = self.store(tmp_path, a=1), self.store(tmp_path, b=2)
        one.sync()
        assert one.all("alias") == two.all("alias") == {"a": {"x": 1}, "b": {"x": 2}}
        one.put("alias", "a", None)
        two.put("alias", "b", {"x": 3})
        one.sync()
        assert one.all("alias") == two.all("alias") == {"b": {"x": 3}}

    def test_all_of_many_at_once_are_kept(self, tmp_path):
        stores = [ogx.Store(str(tmp_path / "state.sqlite")) for _ in range(2)]

        def fill(thread):
            for number in range(30):
                stores[thread % 2].put("alias", f"{thread} {number}", {})

        threads = [threading.Thread(target=fill, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for store in stores:
            store.close()  # writes what was told not to be written yet
        assert len(ogx.Store(stores[0].path).all("alias")) == 300

    def test_half_characters_in_a_key_stop_no_writing(self, tmp_path):
        store = self.store(tmp_path, a=1)
        assert store.put("lessons", "openai/\ud800", []) == ""
        store.put("lessons", "openai/\ud800", None)
        assert ogx.Store(store.path).all("lessons") == store.all("lessons") == {}

    def test_there_is_no_file_before_there_is_something_to_keep(self, tmp_path):
        path = tmp_path / "state.sqlite"
        store = ogx.Store(str(path))
        store.sync()
        assert store.all("alias") == {} and not path.exists()
        store.put("alias", "a", {})
        assert path.exists()

    def test_where_the_file_is_by_default(self, monkeypatch):
        assert ogx.state_path(None, {"XDG_STATE_HOME": "/x"}) == "/x/ogx/state.sqlite"
        assert ogx.state_path(None, {}).endswith("/.local/state/ogx/state.sqlite")
        assert ogx.state_path(None, {"OGX_STATE": "/y"}) == "/y"
        assert ogx.state_path("/z", {"OGX_STATE": "/y"}) == "/z"
        monkeypatch.setenv("HOME", "/home/me")
        assert ogx.state_path("~/z", {}) == ogx.state_path(None, {"OGX_STATE": "~/z"})
        assert ogx.state_path("~/z", {}) == "/home/me/z"

    def test_without_a_home_there_is_no_state_file(self, monkeypatch, caplog):
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where none is known
        assert ogx.state_path(None, {}) == ogx.state_path("~/x", {}) == ""
        assert ogx.state_path(None, {"XDG_STATE_HOME": "/x"}) == "/x/ogx/state.sqlite"
        assert caplog.text.count("there is no state file") == 2

    def test_lessons_are_kept_by_model(self):
        lessons = ogx.Lessons(ogx.Store())
        clamp = ogx.Lesson("clamp", "max_tokens", 5)
        lessons.add(model(), [clamp, clamp, ogx.Lesson("drop", "stop", keep=False)])
        (kept,) = lessons.of(model())
        assert str(kept) == str(clamp) and kept.at > 0
        assert lessons.of(model(upstream_id="other")) == ()

    def test_a_newer_lesson_about_the_same_takes_the_place_of_the_older(self):
        lessons = ogx.Lessons(ogx.Store())
        for value in (5, 4):
            lessons.add(model(), [ogx.Lesson("clamp", "max_tokens", value)])
        for keywords in (("format",), ("format", "pattern")):
            lessons.add(model(), [ogx.Lesson("override", "refused_keywords", keywords)])
        for name in ("strict", "x"):
            lessons.add(model(), [ogx.Lesson("strip_keyword", "tools", name)])
        kept = [lesson.value for lesson in lessons.of(model())]
        assert kept == [4, ("format", "pattern"), "strict", "x"]

    def test_lessons_survive_and_expire(self, tmp_path, monkeypatch):
        path = str(tmp_path / "state.sqlite")
        gemini = ogx.lesson_from_refusal(ogx.Refusal(400, "no thought_signature"), {}, model())
        words = ogx.Lesson("override", "refused_keywords", ("format", "$ref"))
        ogx.Lessons(ogx.Store(path)).add(model(), [gemini, words])
        lessons = ogx.Lessons(ogx.Store(path))
        kept = [lesson.value for lesson in lessons.of(model())]
        assert kept == [gemini.value, ("format", "$ref")]
        later = time.time() + 31 * 86400
        monkeypatch.setattr(ogx.time, "time", lambda: later)
        assert lessons.of(model()) == ()

    def test_lessons_of_two_servers_add_up(self, tmp_path):
        path = str(tmp_path / "state.sqlite")
        one, two = (ogx.Lessons(ogx.Store(path)) for _ in range(2))
        one.add(model(), [ogx.Lesson("drop", "stop")])
        two.add(model(), [ogx.Lesson("drop", "top_p")])
        one._store.sync()
        one.load()
        for lessons in (one, ogx.Lessons(ogx.Store(path))):
            assert [str(lesson) for lesson in lessons.of(model())] == ["drop stop", "drop top_p"]
        assert one.forget("openai/gpt-x")
        two._store.sync()
        two.load()
        assert two.of(model()) == () and not two.forget("openai/gpt-x")

    @pytest.mark.parametrize("path", ["", "state.sqlite", "file/state.sqlite"],
                             ids=["memory", "file", "no disk"])  # fmt: skip
    def test_made_up_ids_grow_nothing_without_bound(self, tmp_path, monkeypatch, path):
        count, most = (60, 20) if path == "state.sqlite" else (10_000, 100)
        monkeypatch.setattr(ogx, "MOST_LEARNED", most)
        (tmp_path / "file").write_text("")
        store = ogx.Store(path and str(tmp_path / path))
        lessons, ratios = ogx.Lessons(store), ogx.Ratios()
        for number in range(count):
            made_up = model(upstream_id=f"made-up-{number}")
            ratios.learn(made_up, (1000.0, 0), ogx.Usage(1200))
            lessons.add(made_up, [ogx.Lesson("drop", "stop"), ogx.Lesson("drop", "top_p")])
            store.put("alias", f"a{number}", {})
            store.put("alias", f"a{number}", None)
        for holder in (store, lessons, ratios):
            sizes = {name: len(value) for name, value in vars(holder).items()
                     if hasattr(value, "__len__") and not isinstance(value, str)}  # fmt: skip
            assert sizes and max(sizes.values()) <= 2 * most, sizes
        assert lessons.of(made_up) and ratios.estimate(made_up, (1000.0, 0)) == 1200
        assert len(ogx.Store(store.path).all("lessons")) == (40 if count == 60 else 0)

    @pytest.mark.parametrize(
        "kept",
        [{}, [5], [{"action": "drop"}], [{"action": "fly", "field": "a", "value": 1}],
         [{"action": "drop", "field": "a", "value": None, "brand_new": 1}],
         [{"action": "drop", "field": "a", "value": None, "at": "x"}],
         [{"action": "override", "field": 5, "value": None, "at": 2e12}],
         [{"action": "override", "field": "of_another_version", "value": True, "at": 2e12}]],
        ids=str,
    )  # fmt: skip
    def test_lessons_of_another_version_are_passed_over(self, kept):
        store = ogx.Store()
        store.put("lessons", "openai/gpt-x", kept)
        assert ogx.Lessons(store).of(model()) == ()

    @pytest.mark.parametrize("lesson", [
        {"action": "row", "field": "responses", "value": True},
        {"action": "limit", "field": "reasoning_effort", "value": "high"},
        {"action": "lift", "field": "reasoning_effort", "value": "low"},
        {"action": "unschema", "field": "tools", "value": "strict"},
        {"action": "again", "field": "messages", "value": None},
    ], ids=lambda lesson: lesson["action"])  # fmt: skip
    def test_lessons_whose_action_has_another_name_now_are_learned_anew(self, tmp_path, lesson):
        store = ogx.Store(str(tmp_path / "state.sqlite"))
        store.put("lessons", "openai/gpt-x", [{**lesson, "keep": True, "dialect": "", "at": 9e9}])
        lessons = ogx.Lessons(store)
        assert lessons.of(model()) == ()
        lessons.add(model(), [ogx.Lesson("override", "responses", True)])
        for known in (lessons, ogx.Lessons(ogx.Store(store.path))):
            assert [str(k) for k in known.of(model())] == ["override responses to True"]
        assert lessons.forget("openai/gpt-x") and ogx.Store(store.path).all("lessons") == {}

    def test_the_ratio_is_the_median_of_the_last_answers(self):
        ratios, prompt = ogx.Ratios(), (1000.0, 0)
        assert ratios.estimate(model(), (1000.0, 50)) == 1050
        for told in (1200, 3000, 1210):
            ratios.learn(model(), prompt, ogx.Usage(told))
        assert ratios.estimate(model(), (1000.0, 50)) == 1260
        assert ratios.estimate(model(upstream_id="other"), prompt) == 1000
        for _ in range(9):
            ratios.learn(model(), prompt, ogx.Usage(100, 7, cache_read=600, cache_written=200))
        assert ratios.estimate(model(), prompt) == 900

    @cases(
        ("prompt", "usage"),
        [
            ((1000.0, 0), None),  # nothing told
            ((1000.0, 0), ogx.Usage(0)),
            ((1000.0, 0), ogx.Usage(30)),  # the uncached ones alone
            ((1000.0, 0), ogx.Usage(9_000_000)),
            ((1000.0, 1600), ogx.Usage(2000)),  # with an image
            ((9.0, 0), ogx.Usage(30)),  # mostly what the template adds
        ],
    )
    def test_what_would_spoil_the_ratio_is_passed_over(self, prompt, usage):
        ratios = ogx.Ratios()
        ratios.learn(model(), prompt, usage)
        assert ratios.estimate(model(), (1000.0, 0)) == 1000


# For localhost and 127.0.0.1, signed by itself, good until 2126.
LOCALHOST_PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg6J0sSlQNb3ekMm3g
QKpDYBE/bLw80B3wuc7Ju06xdA+hRANCAARPm5IakoYDGCine9Y//5A/aQ0oruI7
masXm11t6avx4H/IFGiciVnciyPQlvoQOtcSaErJK8wSBg1USJKVL7Bb
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUewup9NCGA0DrgMU0StkoSaZhevQwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMjE4NDQwM1oYDzIxMjYxMDI5
MTg0NDAzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARPm5IakoYDGCine9Y//5A/aQ0oruI7masXm11t6avx4H/IFGiciVnc
iyPQlvoQOtcSaErJK8wSBg1USJKVL7Bbo28wbTAdBgNVHQ4EFgQUZmtk9yvu5uti
FzHHbnfFSI4cIugwHwYDVR0jBBgwFoAUZmtk9yvu5utiFzHHbnfFSI4cIugwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgLCtmnP0jOC7VCCsKCJjkcJSuSGy2rbytwp5aiQz7YZwCIAZB
Gm4tK1ielNhErNKc7zYEntNmsx5T/oVbRICuZJhZ
-----END CERTIFICATE-----
"""


SIGNATURES = (
    ("a list", "GET", "M/v1/models",
     {}, b'', "",
     "8a1bbbe06c7466f07d22e9d439ca3a3facf18c5f07ff82284edcbb81b6fa4535"),
    ("an empty path", "GET", "M",
     {}, b'', "",
     "030b1f36b6bf5501274d036576e2ad51446992c79beea2437f24f6ec2fa9ef60"),
    ("a message", "POST", "M/anthropic/v1/messages",
     {'content-type': 'application/json'}, b'{"model":"x"}', "",
     "3754cdaaa5bdd37dfa41df5d9da9dfd8863f510e9d748300af90390ef47e110c"),
    ("a session token", "POST", "M/anthropic/v1/messages",
     {'content-type': 'application/json'}, b'{}', "IQoJb3JpZ2lu+/Z2lu==",
     "101f100d6b6c1ed0f1489b30c4ad42ca9d9f36a85c173cd5b0effbd84cf88078"),
    ("an empty body", "POST", "R/openai/v1/chat/completions",
     {'content-type': 'application/json'}, b'', "token",
     "38a99092f9b7730e8af888bf544b1912d2409fc44aae2647934315adf0eaf321"),
    ("a colon", "POST", "R/model/us.anthropic.claude-v1:0/invoke",
     {'content-type': 'application/json'}, b'{}', "",
     "acbabd40b0dbaa5def9b352bd07398433255326a4c8318b9b035f47b097a922d"),
    ("an encoded colon", "POST", "R/model/us.anthropic.claude-v1%3A0/invoke",
     {'content-type': 'application/json'}, b'{}', "",
     "05aa9a0cafb1887d18427c6b4c9233e376ae385c1525f8a4c710c5df01c0735b"),
    ("an ARN", "POST", "R/model/arn%3Aaws%3Abedrock%3A%3A1%3Aprofile%2Fabc/invoke",
     {}, b'', "",
     "f4d19659ed7187e133d398198b2beb44eefc47766305c6c159779363138d40a7"),
    ("marks", "GET", "R/a~b-c_d.e/f(g)+h,i@j!k*l'm$n&o;p=q",
     {}, b'', "",
     "76f2b1e78c9c33e1580284f3fda6d0fbb9414938f1d2bafdc5f3226e25bb4bb5"),
    ("unicode in the path", "GET", "R/model/caf%C3%A9-%F0%9F%98%80",
     {}, b'', "",
     "9cd1988ed105f741568f75baaf5eeceb4b018d32903d887a36c182534d096c5b"),
    ("unicode in the body", "POST", "R/model",
     {'content-type': 'application/json'}, b'{"a":"caf\xc3\xa9 \xf0\x9f\x98\x80"}', "",
     "cd2a98aa383b737878c1a25416819053f3cb3089ef540e2c83d57874ec9616ee"),
    ("a query", "GET", "R/inference-profiles?type=SYSTEM_DEFINED&maxResults=1000",
     {}, b'', "t",
     "219437d9bb3ac8b66d3283b38a2d5d7d8cdad4d399c6aff3679f34097c0bec7f"),
    ("an encoded query", "GET", "R/l?nextToken=a%2Fb%2B%3D&b=%C3%A9%20z",
     {}, b'', "",
     "36a66f98bb28f232d281020aee0e86dab831a8e736ae0baca3b7177c4d422069"),
    ("a query's order", "GET", "R/l?a=1&a-b=2&a=0&B=3&a.b=4&a%20=5",
     {}, b'', "",
     "acad059ce297e09d7890c2e4d494fa58a184d4a94b7e919176b3c878a51219a2"),
    ("no value", "GET", "R/l?flag&b=&a",
     {}, b'', "",
     "c4f6e53c396a05667d6418899665a455f6183de63f9b3eceba202d7a2fe6a64e"),
    ("repeated spaces", "POST", "R/l",
     {'X-Amz-B': '  two   words \t here ', 'content-type': 'application/json'}, b'{}', "",
     "858117e1024616d4cf711b7679f6c56262657e6588bd66e2a7cc38809e103bfd"),
    ("a port", "POST", "L/v1/chat/completions",
     {'content-type': 'application/json'}, b'{}', "t",
     "9fe7256c5a84c27f98db8fb0b2926e6f9098bc5163b26149ec9549fe1bd6f804"),
)  # fmt: skip

AWS_NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE",
             "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_BEARER_TOKEN_BEDROCK")  # fmt: skip
AWS_KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SESSION_TOKEN": "session-token-1234",
            "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"}  # fmt: skip


@pytest.fixture
def aws(tmp_path, monkeypatch):
    """A function that writes AWS's files, of which there are none at first, nor variables."""
    for name in (*AWS_NAMES, "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))

    def write(credentials="", config=""):
        (tmp_path / "credentials").write_text(credentials, encoding="utf-8")
        (tmp_path / "config").write_text(config, encoding="utf-8")

    return write


def process_printing(tmp_path, **told):
    """A credential_process that prints JSON and counts how often it ran."""
    script = tmp_path / "process.py"
    lines = f"open({str(tmp_path / 'ran')!r}, 'a').write('x')", f"print({json.dumps(told)!r})"
    script.write_text("\n".join(lines))
    return f"credential_process = {shlex.quote(sys.executable)} {shlex.quote(str(script))}"


class TestSigning:
    @pytest.mark.parametrize(
        ("words", "method", "short", "headers", "body", "token", "signature"), SIGNATURES,
        ids=[row[0] for row in SIGNATURES],
    )  # fmt: skip
    def test_signatures_are_botocores(self, words, method, short, headers, body, token, signature):
        host, scope = {
            "R": ("https://bedrock-runtime.us-east-1.amazonaws.com", "us-east-1/bedrock"),
            "M": ("https://bedrock-mantle.eu-west-1.api.aws", "eu-west-1/bedrock-mantle"),
            "L": ("http://127.0.0.1:8080", "us-east-1/bedrock")}[short[0]]  # fmt: skip
        headers = {"host": host.split("/")[2], **headers}
        keys = AWS_KEYS["AWS_ACCESS_KEY_ID"], AWS_KEYS["AWS_SECRET_ACCESS_KEY"], token
        made = ogx.aws_signature(method, host + short[1:], headers, body, keys, scope,
                                 1_790_000_000)  # fmt: skip
        assert made.pop("x-amz-security-token", "") == token
        assert made.pop("x-amz-date") == "20260921T141320Z"
        names = ";".join(sorted({k.lower() for k in headers} | {"x-amz-date"}
                                | ({"x-amz-security-token"} if token else set())))  # fmt: skip
        assert made == {"authorization": f"AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20260921/{scope}"
                        f"/aws4_request, SignedHeaders={names}, Signature={signature}"}  # fmt: skip

    def keys(self, environ):
        return ogx.Signer().keys(environ)

    def test_variables_go_before_a_profile(self, aws):
        aws("[default]\naws_access_key_id = other\naws_secret_access_key = secret\n")
        found = self.keys({**os.environ, **AWS_KEYS})
        assert (found[0], found[2]) == ("AKIDEXAMPLE", "session-token-1234")
        assert self.keys({**os.environ, **AWS_KEYS, "AWS_SESSION_TOKEN": " t\n"})[2] == "t"
        found = self.keys({**os.environ, "AWS_ACCESS_KEY_ID": "half"})
        assert (found[0], found[2]) == ("other", "")

    @pytest.mark.parametrize(
        ("profile", "key_id", "token"),
        [("", "a", ""), ("default", "a", ""), ("work", "b", "t"), ("plain", "c", "")],
    )
    def test_a_profile_of_either_file(self, aws, profile, key_id, token):
        aws("[default]\naws_access_key_id=a\naws_secret_access_key=s\n"
            "[work]\naws_access_key_id = b\naws_secret_access_key = %s=\naws_session_token = t\n",
            "[default]\naws_access_key_id=z\naws_secret_access_key=s\naws_session_token=old\n"
            "[profile plain]\naws_access_key_id=c\naws_secret_access_key=s\n"
            "s3 =\n  max_concurrent_requests = 20\n")  # fmt: skip
        found = self.keys({**os.environ, "AWS_PROFILE": profile})
        assert (found[0], found[2]) == (key_id, token)

    def test_without_credentials_it_says_what_to_set(self, aws):
        aws("[other]\naws_access_key_id=a\n", "[profile sso]\nsso_session = corp\n")
        for profile in ("", "sso", "missing"):
            error = refused(self.keys, {**os.environ, "AWS_PROFILE": profile})
            assert error.status == 401 and error.message.startswith("Unable to locate credentials")
            assert "single sign-on and roles" in error.message

    def test_a_file_that_cannot_be_read_is_named_and_never_quoted(self, aws, tmp_path):
        aws("aws_secret_access_key = top-secret-key\n")
        error = refused(self.keys, os.environ)
        assert error.status == 401 and str(tmp_path / "credentials") in error.message
        assert "top-secret-key" not in error.message

    @cases(
        ("environ", "region"),
        [({}, "eu-west-3"), ({"AWS_PROFILE": "work"}, "ap-south-1"),
         ({"AWS_PROFILE": "none"}, ""), ({"AWS_REGION": "us-west-2"}, "us-west-2"),
         ({"AWS_DEFAULT_REGION": "us-west-2"}, "us-west-2")],
    )  # fmt: skip
    def test_the_profiles_region_counts_where_no_variable_does(self, aws, environ, region):
        aws(config="[default]\nregion = eu-west-3\n[profile work]\nregion=ap-south-1\n")
        assert ogx.with_aws_region({**os.environ, **environ}).get("AWS_REGION", "") == region

    def test_a_broken_file_is_no_reason_not_to_start(self, aws):
        aws(config="region = eu-west-3\n")
        assert ogx.with_aws_region(os.environ) is os.environ

    def signer(self, now=1_790_000_000.0):
        """A signer, and the list whose last item its clock shows."""
        times = [now]
        return ogx.Signer(lambda: times[-1]), times

    def key_id(self, signer):
        headers = signer.headers(ogx.PROVIDER_KINDS["bedrock"].signed, "GET",
                                 "https://bedrock-mantle.eu-west-1.api.aws/v1/models", None)
        return re.search("Credential=([^/]+)/", headers["authorization"]).group(1)

    def test_a_file_that_was_written_anew_is_read_again(self, aws):
        signer, _ = self.signer()
        for key_id in ("first", "second-one"):
            aws(f"[default]\naws_access_key_id={key_id}\naws_secret_access_key=s-{key_id}\n")
            assert self.key_id(signer) == key_id
        assert {"s-first", "s-second-one"} <= signer.secrets

    def test_a_process_is_asked_again_only_when_its_credentials_expire(self, aws, tmp_path):
        aws(config="[default]\n" + process_printing(
            tmp_path, AccessKeyId="made", SecretAccessKey="s", SessionToken="t",
            Expiration="2026-09-21T14:20:00Z"))  # fmt: skip
        signer, times = self.signer()
        for moment, runs in ((times[0], 1), (times[0] + 300, 1), (times[0] + 350, 2)):
            times.append(moment)
            assert self.key_id(signer) == "made"
            assert len((tmp_path / "ran").read_text()) == runs

    @pytest.mark.parametrize(
        ("command", "words"),
        [("no-such-program-1", "FileNotFoundError"), ("true", "JSONDecodeError"),
         ("echo '{\"Version\": 1}'", "KeyError"), ("echo []", "AttributeError"),
         ("sh -c 'echo top-secret; echo log in again >&2; exit 3'", "log in again")],
    )  # fmt: skip
    def test_a_process_that_fails_says_why_and_no_secret(self, aws, command, words):
        aws(config=f"[default]\ncredential_process = {command}\n")
        error = refused(self.keys, os.environ)
        assert error.status == 401 and error.message.endswith(f"failed: {words}")

    def program(self, tmp_path, code):
        """The command of a Python program that notes each of its runs by its pid."""
        script = tmp_path / "program.py"
        noted = f"import os, subprocess, sys, time; print(os.getpid(), file=open({str(tmp_path)!r}"
        script.write_text(f"{noted} + '/pids', 'a'))\n{textwrap.dedent(code)}")
        return f"{shlex.quote(sys.executable)} {shlex.quote(str(script))}"

    def pids(self, tmp_path):
        noted = tmp_path / "pids"
        return list(map(int, noted.read_text().split())) if noted.exists() else []

    def gone(self, pid):
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
                return file.read().split()[2] == "Z"
        except FileNotFoundError:
            return True

    HANGS = """
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, file=open(os.path.dirname(sys.argv[0]) + "/pids", "a"))
        time.sleep(600)"""

    def test_all_who_wait_have_one_time_limit_and_what_hangs_is_killed(
        self, aws, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(ogx, "PROCESS_SECONDS", 0.5)
        aws(config=f"[default]\ncredential_process = {self.program(tmp_path, self.HANGS)}\n")
        signer, told = ogx.Signer(), []
        threads = [threading.Thread(target=lambda: told.append(refused(signer.keys, os.environ)))
                   for _ in range(5)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(told) == 5 and len({id(error) for error in told}) == 5
        assert {error.message[-39:] for error in told} == {
            ": it took too long, or printed too much"}
        assert len(self.pids(tmp_path)) <= 2  # a program and its child, not five of them
        until(lambda: all(map(self.gone, self.pids(tmp_path))))

    def test_a_failure_is_told_for_some_seconds_and_then_asked_for_anew(self, aws, tmp_path):
        aws(config=f"[default]\ncredential_process = {self.program(tmp_path, 'sys.exit(3)')}\n")
        signer, times = self.signer()
        for later, runs in ((0, 1), (4, 1), (6, 2)):
            times.append(times[0] + later)
            assert "failed: " in refused(signer.keys, os.environ).message
            assert len(self.pids(tmp_path)) == runs

    @pytest.mark.parametrize("stream", ["stdout", "stderr"])
    def test_output_without_end_is_not_kept(self, aws, tmp_path, monkeypatch, stream):
        monkeypatch.setattr(ogx, "PROCESS_SECONDS", 30.0 if stream == "stdout" else 0.5)
        code = f"while True: sys.{stream}.write('x' * 1000)"
        aws(config=f"[default]\ncredential_process = {self.program(tmp_path, code)}\n")
        error = refused(self.keys, os.environ)
        assert error.message.endswith("it took too long, or printed too much")
        until(lambda: all(map(self.gone, self.pids(tmp_path))))

    def test_many_words_on_stderr_are_no_failure(self, aws, tmp_path):
        code = "sys.stderr.write('debug ' * 200_000); print('{\"AccessKeyId\": \"a\", " \
               "\"SecretAccessKey\": \"s\"}')"
        aws(config=f"[default]\ncredential_process = {self.program(tmp_path, code)}\n")
        assert self.keys(os.environ) == ["a", "s", ""]

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            ("SecretAccessKey=abc/def", "***"),
            ("got {'SecretAccessKey': 'abc/def', 'x': 1}", "got {'*** 'x': 1}"),
            ('{"SessionToken":"abc"}', '{"Session***'),
            ("AWS_SECRET_ACCESS_KEY = abc", "AWS_***"),
            ("password: hunter2 was refused", "*** was refused"),
            ("sent wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY today", "sent *** today"),
            ("The SSO session has expired; the token is old", None),
            ("botocore.exceptions.UnauthorizedSSOTokenError (run aws sso login)", None),
            ("no profile in /home/someone/.aws/config", None),
        ],
        ids=lambda words: str(words)[:40],
    )
    def test_secrets_in_the_words_of_a_process_are_redacted(self, aws, tmp_path, words, told):
        code = f"sys.exit({words!r})"
        aws(config=f"[default]\ncredential_process = {self.program(tmp_path, code)}\n")
        message = refused(self.keys, os.environ).message
        assert message.partition(" failed: ")[2] == (words if told is None else told)

    def test_redaction_takes_linear_time(self):
        for word in ("key", "secret ", "x", "token=", "a b", "password" + "'" * 29):
            costs = []
            for size in (16_384, 65_536):
                text = (word * size)[:size]
                runs = []
                for _ in range(3):
                    start = cpu_time()
                    re.sub(ogx.SECRET, "***", text)
                    runs.append(cpu_time() - start)
                costs.append(min(runs))
            assert costs[1] < 12 * costs[0] + 0.01, word

    def test_closing_ends_a_process_that_runs(self, aws, tmp_path):
        aws(config=f"[default]\ncredential_process = {self.program(tmp_path, self.HANGS)}\n")
        signer, told = ogx.Signer(), []
        waiting = threading.Thread(target=lambda: told.append(refused(signer.keys, os.environ)))
        waiting.start()
        until(lambda: len(self.pids(tmp_path)) == 2)
        signer.close()
        until(lambda: all(map(self.gone, self.pids(tmp_path))))
        waiting.join(10)
        assert told and not waiting.is_alive()

    @pytest.mark.parametrize(
        ("url", "scope"),
        [
            ("https://bedrock-mantle.eu-west-1.api.aws/v1", "eu-west-1/bedrock-mantle"),
            ("https://bedrock-runtime.us-gov-west-1.amazonaws.com/openai/v1",
             "us-gov-west-1/bedrock"),
            ("https://bedrock-runtime-fips.us-east-1.amazonaws.com/x", "us-east-1/bedrock"),
            ("https://bedrock.us-east-1.amazonaws.com/inference-profiles", "us-east-1/bedrock"),
            ("https://vpce-1-a.bedrock-runtime.us-east-1.vpce.amazonaws.com", "us-east-1/bedrock"),
            ("https://gateway.test/bedrock.x.y/v1", None),
            ("https://bedrock.internal.corp.test/v1", None),  # signs for no one else
        ],
    )  # fmt: skip
    def test_the_url_tells_region_and_service(self, aws, monkeypatch, url, scope):
        for name, value in AWS_KEYS.items():
            monkeypatch.setenv(name, value)
        made = self.signer()[0].headers(ogx.PROVIDER_KINDS["bedrock"].signed, "GET", url, None)
        assert (f"/{scope}/aws4_request," in made["authorization"]) if scope else made == {}


class TestUpstream:
    def open(self, upstream, url, body=None, **fields):
        data = json.dumps(body or {}).encode()
        return self.sent(upstream, provider(url=url, **fields), "/chat/completions", data)

    def sent(self, upstream, owner, path="/x", data=b"{}"):
        """The reply to a request, once its head is there."""
        reply = ogx.drive(upstream.send(owner, "POST", path, data))
        ogx.drive(reply.head())
        return reply

    def read_all(self, reply):
        whole = b""
        while (piece := reply.read()) != b"":
            if isinstance(piece, bytes):
                whole += piece
            elif isinstance(piece, ogx.Wait):
                ogx.ready_socket(piece)
        return whole

    def test_a_key_goes_as_bearer_and_a_body_as_json(self):
        with FakeUpstream({"a": 1}) as fake:
            reply = self.open(ogx.Upstream(), fake.url, {"é": 1})
            assert json.loads(self.read_all(reply)) == {"a": 1}
        path, head = fake.heads[0]
        assert path == "/v1/chat/completions"
        assert head["authorization"] == "bearer sk-secret-1234"
        assert head["content-type"] == "application/json"
        assert fake.seen == [{"é": 1}]

    def test_pooled_connections_are_reused(self):
        upstream = ogx.Upstream()
        with FakeUpstream({"a": 1}, {"a": 2}, said()) as fake:
            for _ in range(3):
                reply = self.open(upstream, fake.url)
                self.read_all(reply)
                reply.release()
        assert fake.connections == 1

    def test_a_closed_pool_takes_no_connection_back(self):
        upstream = ogx.Upstream()
        with FakeUpstream({"a": 1}) as fake:
            reply = self.open(upstream, fake.url)
            sock = reply._connection.socket
            self.read_all(reply)
            upstream.close()
            reply.release()
        assert sock.fileno() == -1

    def test_a_connection_with_an_unread_answer_is_not_pooled(self):
        upstream = ogx.Upstream()
        with FakeUpstream(said("x" * 200_000), {"a": 2}) as fake:
            self.open(upstream, fake.url).release()
            self.open(upstream, fake.url).release()
        assert fake.connections == 2

    @pytest.mark.parametrize("when", ["before", "at the next request"])
    def test_a_request_on_a_stale_pooled_connection_is_sent_again(self, when):
        def answer_and_close(fake, connection):
            send(connection, 200, b"{}", "application/json")
            if when != "before":
                connection.recv(65536)  # the next request comes, and is never answered

        upstream = ogx.Upstream()
        with FakeUpstream(answer_and_close, {"a": 2}) as fake:
            reply = self.open(upstream, fake.url)
            assert self.read_all(reply) == b"{}"
            reply.release()
            if when == "before":
                time.sleep(0.05)
            assert json.loads(self.read_all(self.open(upstream, fake.url))) == {"a": 2}
        assert fake.connections == 2

    @pytest.mark.parametrize("began", ["by taking its time", "by an interim head"])
    def test_a_pooled_connection_that_began_to_answer_was_not_stale(self, began):
        def answer_once(fake, connection):
            send(connection, 200, b"{}", "application/json")
            connection.recv(65536)
            if began == "by taking its time":
                time.sleep(1.05)
            else:
                connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")

        upstream = ogx.Upstream()
        with FakeUpstream(answer_once, {"a": 2}) as fake:
            reply = self.open(upstream, fake.url)
            assert self.read_all(reply) == b"{}"
            reply.release()
            error = refused(self.open, upstream, fake.url)
            assert error.message.endswith("it closed the connection")
            assert fake.connections == 1

    def test_what_was_sent_is_let_go_and_no_room_is_waited_for(self):
        taken, asked = threading.Event(), threading.Event()

        def answer(fake, connection):
            taken.set()
            asked.wait(10)
            send(connection, 200, b"{}", "application/json")

        upstream, data = ogx.Upstream(), json.dumps("x" * 20_000_000).encode()
        with FakeUpstream(answer) as fake:
            reply = ogx.drive(upstream.send(provider(url=fake.url), "POST", "/x", data))
            head = reply.head()
            wait = next(head)
            assert wait.sockets[0][1] == ogx.READ | ogx.WRITE
            while not taken.wait(0.001):
                wait = next(head)
            assert wait.sockets[0][1] == ogx.READ
            assert reply._unsent.obj == b""  # even an empty view holds all of its bytes
            asked.set()
            ogx.drive(head)
            assert self.read_all(reply) == b"{}"
            reply.release()

    def test_an_answer_that_stalls_has_less_time_than_one_that_begins(self):
        def answer(fake, connection):
            time.sleep(0.05)  # the head is waited for
            begin_stream(connection)
            await_end(fake, connection)

        upstream = ogx.Upstream(ogx.Limits(first_byte_timeout=5, idle_timeout=0.1))
        with FakeUpstream(answer) as fake:
            reply = self.open(upstream, fake.url)
            error = refused(self.read_all, reply)
            reply.release()
        assert re.fullmatch(r"openai sent nothing for 0\.[12]\d* s", error.message)

    def test_a_fresh_connection_that_dies_is_an_error(self):
        with FakeUpstream(lambda fake, connection: None) as fake:
            error = refused(self.sent, ogx.Upstream(), provider(url=fake.url))
        assert error.status == 502
        assert error.message.startswith(f"lost the connection to openai at {fake.url}: ")

    BODIES = (
        (b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\na: b\r\n\r\n"),
        (b"content-length: 11\r\n\r\nhello world"),
        (b"connection: close\r\n\r\nhello world"),
        (b"content-encoding: gzip\r\nconnection: close\r\n\r\n" + gzip.compress(b"hello world")),
    )

    @cases("rest", BODIES)
    def test_bodies_of_every_framing_cut_anywhere(self, rest):
        data = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n" + rest
        for cut in range(0, len(data), 7):
            def answer(fake, connection, cut=cut):
                connection.sendall(data[:cut])
                time.sleep(0.001)
                connection.sendall(data[cut:])

            with FakeUpstream(answer) as fake:
                assert self.read_all(self.open(ogx.Upstream(), fake.url)) == b"hello world"

    @cases(
        ("answer", "words"),
        [
            (b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\nhello", "in the middle of its answer"),
            (CHUNKED + b"5\r\nhel", "in the middle"),
            (CHUNKED + b"zz\r\nhel", "isn't hexadecimal"),
            (CHUNKED + b"2\r\nhello\r\n", "longer than it"),
            (b"SSH-2.0-OpenSSH_9\r\n\r\n", "doesn't answer in HTTP"),
            (b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n", "malformed headers"),
            (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000, "headers that are too large"),
            (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\nplain", "broken gzip"),
        ],
    )  # fmt: skip
    def test_broken_answers_are_one_clear_error(self, answer, words):
        def write(fake, connection):
            connection.sendall(answer)

        with FakeUpstream(write) as fake:
            error = refused(lambda: self.read_all(self.open(ogx.Upstream(), fake.url)))
        assert error.status == 502 and words in error.message

    def test_silence_is_told_from_data(self):
        def answer(fake, connection):
            begin_stream(connection)
            fake.client_left.wait(5)

        with FakeUpstream(answer) as fake:
            reply = self.open(ogx.Upstream(), fake.url)
            assert isinstance(reply.read(), ogx.Wait)
            fake.client_left.set()

    def test_a_host_name_that_is_none_is_an_error_like_others(self):
        error = refused(self.sent, ogx.Upstream(), provider(url="http://foo..bar:80/v1"))
        assert error.status == 502 and "can't reach openai" in error.message

    def test_a_refused_connection_says_what_to_look_at(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}/v1"
        error = refused(self.sent, ogx.Upstream(), provider(url=url))
        assert (error.status, error.message) == (
            502, f"can't reach openai at {url}: connection refused; "
                 "is the server running there?",
        )  # fmt: skip

    def test_https_to_a_server_without_tls_says_so(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=lambda: listener.accept()[0].sendall(b"HTTP/1.1 400 X\r\n"),
                             daemon=True).start()  # fmt: skip
            url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
            error = refused(self.sent, ogx.Upstream(), provider(url=url))
        assert error.status == 502 and "is the URL's https right?" in error.message

    @pytest.fixture
    def tls_url(self, tmp_path):
        """An HTTPS server with a certificate that no public authority signed, and that file."""
        path = tmp_path / "localhost.pem"
        path.write_text(LOCALHOST_PEM)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)

        def serve():
            while True:
                try:
                    plain, _ = listener.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError), context.wrap_socket(
                    plain, server_side=True
                ) as connection:
                    connection.recv(65536)
                    send(connection, 200, b'{"tls": true}', "application/json")

        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=serve, daemon=True).start()
            yield f"https://127.0.0.1:{listener.getsockname()[1]}/v1", str(path)
            listener.shutdown(socket.SHUT_RDWR)

    def test_silence_is_noticed_behind_tls_too(self, tmp_path):
        path = tmp_path / "localhost.pem"
        path.write_text(LOCALHOST_PEM)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        held = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def serve():
                plain, _ = listener.accept()
                held.append(context.wrap_socket(plain, server_side=True))  # sends session tickets

            threading.Thread(target=serve, daemon=True).start()
            url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
            owner = dataclasses.replace(provider(url=url), verify=False)
            upstream = ogx.Upstream(ogx.Limits(first_byte_timeout=0.05))
            reply = ogx.drive(upstream.send(owner, "GET", "/"))
            error = refused(lambda: ogx.drive(reply.head()))
            assert (error.status, error.message[:19]) == (504, "openai sent nothing")
            held[0].close()

    def test_a_dribbling_head_keeps_to_the_deadline(self):
        def answer(fake, connection):
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 400)
            while not fake.client_left.wait(0.01):
                connection.sendall(b"x")

        with FakeUpstream(answer) as fake:
            began = time.monotonic()
            error = refused(ogx.Upstream().ask, provider(url=fake.url), "/x", 0.1, b"{}")
            assert error.status == 504 and time.monotonic() - began < 2
            fake.client_left.set()

    def test_a_connection_with_surplus_bytes_is_not_pooled(self):
        def twice(fake, connection):
            answers = (b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
                       for body in (said("One."), said("Stray.")))  # fmt: skip
            connection.sendall(b"".join(answers))
            fake.client_left.wait(5)

        with gateway_over(twice, said("Two.")) as (client, upstream):
            for words in ("One.", "Two."):
                assert client.post(request())[2]["content"][0]["text"] == words
            upstream.client_left.set()

    def test_an_early_head_ends_no_upload(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def serve():
                connection, _ = listener.accept()
                connection.recv(1000)
                begin_stream(connection)
                seen.wait(10)  # meanwhile the buffers between us are full
                left = 20_000_000 - 1000
                while left > 0:
                    left -= len(connection.recv(1 << 20))
                send_chunk(connection, b"read")
                connection.sendall(b"0\r\n\r\n")

            seen = threading.Event()
            threading.Thread(target=serve, daemon=True).start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            upstream = ogx.Upstream(ogx.Limits(idle_timeout=5))
            reply = self.sent(upstream, provider(url=url), data=b"x" * 20_000_000)
            seen.set()
            assert self.read_all(reply) == b"read"

    def test_an_early_refusal_ends_the_upload(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def serve():
                connection, _ = listener.accept()
                connection.recv(1000)
                send(connection, 413, b'{"error": "too large"}', "application/json")
                done.wait(20)  # and neither reads on nor closes

            done = threading.Event()
            threading.Thread(target=serve, daemon=True).start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            upstream = ogx.Upstream()
            reply = self.sent(upstream, provider(url=url), data=b"x" * 20_000_000)
            assert reply.status == 413
            assert self.read_all(reply) == b'{"error": "too large"}'
            reply.release()
            assert not any(upstream._idle.values()), "half a request went out on it"
            done.set()

    def test_bodies_that_bring_nothing_are_bounded(self):
        trailers = ogx.ChunkedBody()
        trailers.feed(b"0\r\n")
        words = "too many trailers"
        assert words in refused(trailers.feed, b"a: b\r\n" * 20_000).message
        bomb = gzip.compress(b"\n" * 50_000_000)
        packed = flood(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\n", bomb, 1)
        with FakeUpstream(packed) as fake:
            error = refused(lambda: self.read_all(self.open(ogx.Upstream(), fake.url)))
        assert "unpacks to too much" in error.message

    def test_an_answer_before_the_whole_request_was_read_arrives(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def serve():
                connection, _ = listener.accept()
                connection.recv(1000)
                send(connection, 413, b"{}", "application/json", "connection: close\r\n")
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

            threading.Thread(target=serve, daemon=True).start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            reply = self.sent(ogx.Upstream(), provider(url=url), data=b"x" * 5_000_000)
            assert reply.status == 413

    def test_certificates_are_verified(self, tls_url, monkeypatch):
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        error = refused(self.sent, ogx.Upstream(), provider(url=tls_url[0]))
        assert error.status == 502
        assert "TLS certificate was not accepted (self" in error.message

    @pytest.mark.parametrize("way", ["ca_file", "SSL_CERT_FILE", "verify"])
    def test_a_private_authority_can_be_named_and_verification_switched_off(
        self, tls_url, monkeypatch, way
    ):
        url, ca_file = tls_url
        fields = {"ca_file": {"ca_file": ca_file}, "verify": {"verify": False}}.get(way, {})
        if way == "SSL_CERT_FILE":
            monkeypatch.setenv(way, ca_file)
        owner = dataclasses.replace(provider(url=url), **fields)
        assert ogx.Upstream().json(owner, "/models", 5) == {"tls": True}

    def test_https_goes_through_a_proxys_tunnel(self, tls_url, monkeypatch):
        asked = []

        def serve():
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as reader:
                asked.extend(iter(reader.readline, b"\r\n"))
                port = int(tls_url[0].split(":")[2].split("/")[0])
                with socket.create_connection(("127.0.0.1", port)) as server:
                    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    for source, target in ((connection, server), (server, connection)):
                        threading.Thread(target=pump, args=(source, target), daemon=True).start()
                    done.wait(5)

        def pump(source, target):
            with contextlib.suppress(OSError):
                for data in iter(lambda: source.recv(65536), b""):
                    target.sendall(data)

        done = threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=serve, daemon=True).start()
            proxy = f"http://me:pass@127.0.0.1:{listener.getsockname()[1]}"
            monkeypatch.setenv("https_proxy", proxy)
            monkeypatch.delenv("no_proxy", raising=False)
            owner = provider(url="https://models.test/v1")
            owner = dataclasses.replace(owner, verify=False)
            assert ogx.Upstream().json(owner, "/models", 5) == {"tls": True}
            done.set()
        assert asked[0].startswith(b"CONNECT models.test:443 ")
        assert b"Proxy-Authorization: Basic bWU6cGFzcw==\r\n" in asked

    def test_a_ca_file_that_cannot_be_read_is_named(self, tls_url):
        owner = dataclasses.replace(provider(url=tls_url[0]), ca_file="/no/such.pem")
        error = refused(self.sent, ogx.Upstream(), owner)
        assert "can't read its ca_file /no/such.pem" in error.message

    @pytest.mark.parametrize("scheme", ["http", "https"])
    @pytest.mark.parametrize("name", ["{}_proxy", "{}_PROXY"])
    def test_a_dead_proxy_is_named_and_its_password_is_not(self, monkeypatch, scheme, name):
        with socket.create_server(("127.0.0.1", 0)) as free:
            dead = f"127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv(name.format(scheme if "p" in name[2:] else scheme.upper()),
                           f"http://me:s3cret@{dead}")  # fmt: skip
        url = f"{scheme}://models.test/v1"
        error = refused(self.sent, ogx.Upstream(), provider(url=url))
        assert (error.status, error.message) == (
            502, f"can't reach openai at {url} through {scheme.upper()}_PROXY, {dead}: "
                 "connection refused; is the server running there?",
        )  # fmt: skip

    @pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks5h://h:1", "SOCKS4://h"])
    @pytest.mark.parametrize("scheme", ["http", "https"])
    def test_socks_is_said_not_to_be_spoken(self, monkeypatch, scheme, proxy):
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv(f"{scheme}_proxy", proxy)
        owner = provider(url=f"{scheme}://models.test/v1")
        error = refused(self.sent, ogx.Upstream(), owner)
        assert (error.status, error.message) == (
            502, f"{scheme.upper()}_PROXY names a SOCKS proxy; ogx.py speaks to HTTP proxies alone"
        )  # fmt: skip
        assert error.headers == {"x-should-retry": "false"}  # it gets no better by itself

    @cases("proxy", ["http://socks5.test:1", "socks.test:1080", ""])
    def test_a_proxy_that_only_sounds_like_socks_is_used(self, monkeypatch, proxy):
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("http_proxy", proxy)
        found = ogx.proxy_of("http", "models.test")
        assert (found.scheme if found else None) == ("http" if proxy else None)

    def test_loopback_never_goes_through_a_proxy(self, monkeypatch):
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.delenv("no_proxy", raising=False)
        assert ogx.proxy_of("http", "127.0.0.1") is ogx.proxy_of("http", "localhost") is None
        assert ogx.proxy_of("http", "example.com").netloc == "127.0.0.1:9"
        monkeypatch.setenv("no_proxy", "example.com")
        assert ogx.proxy_of("http", "example.com") is None

    def test_the_system_is_asked_for_a_proxy_once_a_connection_and_never_by_the_loop(
        self, monkeypatch
    ):
        threads = []

        def noted(scheme, host, proxy_of=ogx.proxy_of):
            threads.append(threading.current_thread().name)
            return proxy_of(scheme, host)

        monkeypatch.setattr(ogx, "proxy_of", noted)
        monkeypatch.delenv("no_proxy", raising=False)
        with FakeUpstream(*[said("Hi.")] * 3) as proxy:
            monkeypatch.setenv("http_proxy", proxy.url[:-3])
            with serving(provider(url="http://models.test:81/v1")) as client:
                for _ in range(3):
                    assert client.post(request())[0] == 200
                assert client.post(request(), "/v1/messages/count_tokens")[0] == 200
        assert "loop" not in threads and len(threads) == 1  # of the list, which all went on with

    def test_after_a_failure_the_system_is_asked_for_proxies_again(self, monkeypatch):
        monkeypatch.delenv("no_proxy", raising=False)
        upstream = ogx.Upstream()
        with socket.create_server(("127.0.0.1", 0)) as closed:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed.getsockname()[1]}")
        owner = provider(url="http://models.test:81/v1")
        assert refused(upstream.ask, owner, "/a", 5.0).status == 502
        with FakeUpstream() as proxy:
            monkeypatch.setenv("http_proxy", proxy.url[:-3])
            assert upstream.ask(owner, "/models", 5.0)[0].status == 200
        upstream.close()

    def test_plain_http_goes_through_a_proxy_by_its_whole_url(self, monkeypatch):
        with FakeUpstream({"a": 1}) as proxy:
            address = proxy.url[len("http://") : -len("/v1")]
            monkeypatch.setenv("http_proxy", f"http://me:pa%40ss@{address}")
            monkeypatch.delenv("no_proxy", raising=False)
            reply = self.open(ogx.Upstream(), "http://models.test:81/v1")
            assert reply.status == 200
        path, head = proxy.heads[0]
        assert path == "http://models.test:81/v1/chat/completions"
        assert head["proxy-authorization"] == "basic bwu6cgfac3m=" and head["host"] == (
            "models.test:81"
        )

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]",
                                      "LOCALHOST", "a.localhost"])  # fmt: skip
    def test_loopback_by_its_spelling(self, host):
        assert ogx.is_loopback(host)

    @cases("host", ["128.0.0.1", "localhost.evil.com", "::2", "evil", ""])
    def test_other_hosts_are_not(self, host):
        assert not ogx.is_loopback(host)

    def test_headers(self):
        assert ogx.headers_from_bytes(b"A-b:  c \r\nX:1\nx: 2") == {"a-b": "c", "x": "1, 2"}
        for bad in (b" folded: x", b"no colon", b"a b: c", b"a: \x00", b": x", b"a\t: b"):
            assert refused(ogx.headers_from_bytes, bad).status == 400


class TestDiscovery:
    def test_a_model_that_appears_later_is_listed_without_a_restart(self):
        with gateway_over(models=["a"], discover=False) as (client, upstream):
            client.gateway.discovery.refresh = 0.02
            client.gateway.start()
            assert len(client.get("/v1/models")[2]["data"]) == 1
            upstream.models = ["a", "b"]
            until(lambda: len(client.get("/v1/models")[2]["data"]) == 2)

    def test_a_request_asks_a_provider_that_had_a_problem_first(self):
        loading = {"error": {"message": "Loading model", "type": "unavailable_error"}}
        with gateway_over(models=(503, loading), kind="vllm") as (client, upstream):
            status, headers, told = client.post(request(model="claude-sonnet-4-5"))
            assert (status, headers["retry-after"]) == (503, "5")
            assert "vllm: Loading model" in told["error"]["message"]
            assert client.get("/v1/models")[2]["problems"]["vllm"].startswith("Loading model")
            upstream.models = ["m"]
            until(lambda: client.post(request(model="claude-sonnet-4-5"))[0] == 200)
            assert client.get("/v1/models")[2]["problems"] == {}

    def test_it_is_asked_at_most_once_a_second(self):
        with gateway_over(models=(503, {}), kind="vllm") as (client, upstream):
            asked, began = len(upstream.gets), time.monotonic()
            for _ in range(10):
                assert client.post(request(model="claude-opus-4-5"))[0] == 503
                client.get("/v1/models")
            assert 1 <= len(upstream.gets) - asked <= 1 + time.monotonic() - began

    def test_a_list_that_hangs_holds_up_no_other_providers_requests(self):
        with FakeUpstream() as good, socket.create_server(("127.0.0.1", 0)) as hanging:
            url = f"http://127.0.0.1:{hanging.getsockname()[1]}/v1"
            with serving(provider("openai", good.url), discover=False) as client:
                gateway = client.gateway
                gateway.registry.providers["vllm"] = provider("vllm", url)
                gateway.registry.learn("openai", [ogx.Model(
                    "openai/gpt-x", provider("openai", good.url), "gpt-x")])
                gateway.registry.learn("vllm", problem="it hangs", passes=True)
                gateway.discovery.done.set()
                gateway.discovery.ask_again = lambda: pytest.fail("nobody has to wait for it")
                for name in ("claude-opus-4-5", "openai/gpt-x", "gpt-x"):
                    assert client.post(request(model=name))[0] == 200

    @cases(("answer", "status"), [
        ((503, {"error": "Loading model"}), 503), ((429, {}), 503), ((500, {}), 503),
        ((401, {"error": "Invalid API Key"}), 404), ((404, {"detail": "Not Found"}), 404),
        (["bge-m3"], 404)])
    def test_what_may_pass_is_503(self, answer, status):
        with gateway_over(models=answer, kind="vllm") as (client, _):
            for name in ("claude-opus-4-5", "some-id"):
                assert client.post(request(model=name))[0] == status

    def test_who_is_down_makes_no_id_of_others_wait(self):
        with FakeUpstream() as good, FakeUpstream(models=(503, {})) as down, serving(
            provider("openai", good.url), provider("vllm", down.url)
        ) as client:
            assert client.post(request(model="no-such-id"))[0] == 404
            assert client.post(request(model="claude-opus-4-5"))[0] == 200

    def test_a_chat_template_without_tools_is_told(self):
        with FakeUpstream() as upstream:
            upstream.lists = {"/props": (200, {"total_slots": 4, "chat_template_caps": {
                "supports_tools": False}})}  # llama.cpp b10434 with SmolLM2
            with serving(provider("llama-cpp", upstream.url)) as client:
                (entry,) = client.get("/v1/models")[2]["data"]
                assert not client.gateway.registry.resolve("llama-cpp/gpt-x").tools
        assert "its chat template has no tools" in entry["custom_metadata"]["warning"]

    @cases("props", [None, [], {"chat_template_caps": None}, {"chat_template_caps": {}},
                     {"chat_template_caps": {"supports_tools": True}}, {"role": "router"}])
    def test_other_props_say_nothing_of_tools(self, props):
        assert ogx.model_with_props(model("llama-cpp"), props).tools

    @cases(("kind", "context", "words"), [
        ("llama-cpp", 8192, "restart it with llama-server -c 65536"),
        ("vllm", 16384, "restart it with --max-model-len 65536"),
        ("vllm", 65536, ""), ("openai", 8192, ""), ("vllm", None, "")])
    def test_a_small_window_is_told_with_the_flag_that_helps(self, kind, context, words):
        found = ogx.with_small_context(model(kind, context=context))
        assert words in found.warning and bool(found.warning) == bool(words)

    def test_a_small_loaded_context_is_told_with_what_fixes_it(self):
        found = ogx.Model("ollama/m:8b", provider("ollama"), "m:8b")
        loaded = {"models": [{"name": "m:8b", "context_length": 4096}]}
        small = ogx.with_small_context(ogx.with_loaded_context(found, loaded))
        assert (small.context, small.warning) == (
            4096, "a context of 4,096 tokens is too small for Claude Code; restart it with "
                  "OLLAMA_CONTEXT_LENGTH=64000 ollama serve",
        )  # fmt: skip
        assert ogx.model_entry(small)["custom_metadata"]["warning"] == small.warning
        loaded["models"][0]["context_length"] = 65536
        assert ogx.with_loaded_context(found, loaded).warning == ""
        for odd in (None, [], {"models": 5}, {"models": [5]}, {"models": []}):
            assert ogx.with_loaded_context(found, odd) == found

    def test_a_dead_provider_costs_nothing_but_its_own_line(self):
        with FakeUpstream(models=["m"]) as alive, socket.create_server(("127.0.0.1", 0)) as free:
            dead = provider("vllm", f"http://127.0.0.1:{free.getsockname()[1]}/v1")
            free.close()
            with serving(dead, provider("openai", alive.url)) as client:
                assert [e["id"] for e in client.get("/v1/models")[2]["data"]] == ["openai/m"]
                assert "connection refused" in client.gateway.registry.problems["vllm"]
                assert client.post(request(model="claude-haiku-4-5"))[0] == 200
                status, _, body = client.post(request(model="vllm/m"))
        assert status == 502 and "can't reach vllm" in body["error"]["message"]

    @cases(
        ("answer", "problem"),
        [
            ((401, {"error": {"message": "Incorrect key sk-secret-1234"}}),
             "Incorrect key *** (from {url}/models, HTTP 401); check GROQ_API_KEY where ogx.py "
             "runs"),
            ((404, {"detail": "Not Found"}), "Not Found (from {url}/models, HTTP 404)"),
            ((200, "<html>"), "its list holds no LLM"),
            ((200, {"data": [{"id": "bge-m3"}]}), "its list holds no LLM"),
            ((200, {"data": {"a": 1}}), "its list holds no LLM"),
            (["é/ü:1 (x)", "a/b/c:d", "a/b/c:d"], ""),
            ([f"model-{i}" for i in range(5000)], ""),
        ],
    )  # fmt: skip
    def test_any_list_gives_the_right_line_and_never_takes_others_down(self, answer, problem):
        with FakeUpstream(models=answer) as odd, FakeUpstream() as good, serving(
            provider("groq", odd.url), provider("openai", good.url)
        ) as client:
            told = client.gateway.registry.problems.get("groq", "")
            assert told == problem.format(url=odd.url)
            ids = [e["id"] for e in client.get("/v1/models")[2]["data"]]
            assert ids[-1] == "openai/gpt-x" and len(set(ids)) == len(ids)
            assert client.post(request(model=ids[0]))[0] == 200

    def discovered(self, answers, owner=None):
        """The models of a provider whose lists answer as told: by path a body, or an error."""
        owner, upstream = owner or provider(), ogx.Upstream()
        asked, registry = [], ogx.Registry(config(owner))

        def answer(_, path, timeout):
            asked.append(path)
            if isinstance(answers[path], Exception):
                raise answers[path]
            return answers[path]

        upstream.json = answer
        models = ogx.Discovery(config(owner), registry, upstream)._models_of(owner)
        return [model.upstream_id for model in models], asked

    def test_a_paginated_list_is_read_to_its_end(self):
        pages = {"/models": {"data": [{"id": "a"}], "has_more": True, "last_id": "a/b"},
                 "/models?after_id=a%2Fb": {"data": [{"id": "c"}], "has_more": False}}  # fmt: skip
        assert self.discovered(pages) == (["a", "c"], list(pages))

    def test_pages_without_end_are_read_no_further(self):
        page = {"data": [{"id": "a"}], "has_more": True, "last_id": "a"}
        pages = {"/models?limit=1000": page, "/models?limit=1000&after_id=a": page}
        ids, asked = self.discovered(pages, provider("anthropic"))
        assert set(ids) == {"a"} and len(asked) == ogx.MAX_PAGES

    def test_a_server_without_its_own_list_is_asked_for_the_usual_one(self):
        answers = {"~/api/v0/models": ogx.OgxError(404, "gone"), "/models": {"data": [{"id": "a"}]}}
        assert self.discovered(answers, provider("lm-studio"))[0] == ["a"]
        answers["~/api/v0/models"] = ogx.OgxError(500, "broken")
        assert refused(self.discovered, answers, provider("lm-studio")).message == "broken"
        missing = {"/models": ogx.OgxError(404, "gone")}
        assert refused(self.discovered, missing).message == "gone"

    def test_what_is_loaded_is_welcome_but_not_needed(self):
        answers = {"~/api/tags": {"models": [{"name": "m:8b"}]}, "~/api/ps": ogx.OgxError(500, "x")}
        assert self.discovered(answers, provider("ollama"))[0] == ["m:8b"]

    def test_one_of_several_lists_is_enough(self):
        kind = ogx.PROVIDER_KINDS["bedrock"]
        (one, _), (other, _) = kind.more_lists
        gone = ogx.OgxError(403, "not for you")
        answers = {"/models": gone, one: {"data": [{"id": "us.anthropic.x"}]}, other: gone}
        assert self.discovered(answers, provider("bedrock"))[0] == ["us.anthropic.x"]
        answers[one] = gone
        assert refused(self.discovered, answers, provider("bedrock")).message == "not for you"

    def test_a_list_that_no_one_foresaw_is_a_line_and_takes_no_other_down(self, caplog):
        def breaks(owner):
            raise ZeroDivisionError("x")

        with gateway_over(discover=False) as (client, _):
            client.gateway.discovery._models_of = breaks
            client.gateway.start()
            assert client.gateway.discovery.done.wait(10)
            problems = client.gateway.registry.problems
        assert problems == {"openai": "its model list could not be read"}
        assert "ZeroDivisionError" in caplog.text

    @cases(
        ("status", "native"),
        [(400, True), (422, True), (404, False), (501, False), (401, None), (200, None)],
    )
    def test_a_server_is_asked_once_whether_it_has_messages(self, status, native):
        owner, upstream = provider("vllm"), ogx.Upstream()
        asked, registry = [], ogx.Registry(config(owner))
        registry.learn("vllm", uncounted_url="http://x/tokenize")

        def answer(_, path, timeout, body):
            asked.append((path, body))
            return types.SimpleNamespace(status=status), b""

        upstream.ask, upstream.json = answer, lambda *_: {"data": [{"id": "a"}]}
        discovery = ogx.Discovery(config(owner), registry, upstream)
        discovery._ask(owner)
        discovery._ask(owner)
        assert registry.native.get("vllm") is native
        assert asked == [("/messages", b"{}")] * (2 if native is None else 1)
        assert bool(registry.uncounted_urls) == (native is None)  # another server may count

    def test_local_servers_are_known_by_what_they_say(self):
        def kind(name, identity, port):
            return ogx.ProviderKind(name, local_port=port, identity=identity)

        with FakeUpstream() as fake:
            port = int(fake.url.split(":")[2].split("/")[0])
            kinds = [kind("right", ("/", '"id":"gpt-x"'), port),
                     kind("wrong", ("/", "Ollama is running"), port), kind("gone", ("/", "x"), 9)]
            found = ogx.local_providers(ogx.Upstream(), kinds, 2.0)
        assert [(p.id, p.base_url, p.api_key) for p in found] == [
            ("right", f"http://127.0.0.1:{port}/v1", "")
        ]

    @cases("props, given, most", [
        ((200, {"total_slots": 1}), 0, 1), ((200, {"total_slots": 1}), 3, 3),
        ((200, {"total_slots": 4}), 0, 0), ((200, {"total_slots": 4}), 2, 2),
        ((404, {"error": "no such path"}), 0, 0), ((404, {}), 2, 2), ((503, b"{"), 0, 0),
        ((200, b"<html>"), 0, 0), ((200, [1]), 0, 0)])
    def test_a_server_with_one_slot_gets_a_request_at_a_time(self, props, given, most):
        with FakeUpstream() as upstream:
            upstream.lists["/props"] = props
            owner = provider("llama-cpp", upstream.url)
            with serving(dataclasses.replace(owner, max_parallel=given)) as client:
                registry = client.gateway.registry
                told = given or registry.slots.get("llama-cpp", 0)
                assert [m.id for m in registry.models()] == ["llama-cpp/gpt-x"]
        assert told == most
        assert [path for path, _ in upstream.gets].count("/props") == 1

    def test_only_rows_that_have_it_are_asked_for_props(self):
        with gateway_over() as (_, upstream):
            assert [path for path, _ in upstream.gets] == ["/v1/models"]


class TestGateway:
    # -- one reply path

    def test_an_answer_that_is_not_streamed(self):
        answer = {"choices": [{"finish_reason": "stop", "message": {"content": "Hi."}}],
                  "usage": USAGE}  # fmt: skip
        with gateway_over(answer) as (client, upstream):
            status, headers, message = client.post(request())
        assert status == 200 and headers["content-type"] == "application/json"
        assert message["content"] == [text("Hi.")]
        assert message["model"] == "openai/gpt-x" and message["role"] == "assistant"
        assert re.fullmatch("msg_[0-9a-f]{24}", message["id"])
        assert message["id"][4:] == headers["request-id"][4:]  # so the log's line is found by it
        assert upstream.seen[0]["model"] == "gpt-x" and "stream" not in upstream.seen[0]

    @cases(("shows", "kinds"), [(True, ["thinking", "text"]), (False, ["text"])])
    @pytest.mark.parametrize("display", ["omitted", "summarized"])
    def test_thinking_is_shown_unless_the_config_and_the_client_agree(self, shows, kinds, display):
        kinds = kinds if display == "omitted" else ["thinking", "text"]
        answer = sse(delta(reasoning="hm"), delta("stop", content="ok"))
        with gateway_over(answer) as (client, _):
            client.gateway.config = dataclasses.replace(client.gateway.config, show_thinking=shows)
            thinking = {"type": "adaptive", "display": display}
            _, _, message = client.post(request(thinking=thinking))
        assert [block["type"] for block in message["content"]] == kinds

    @cases("thinking", [{"type": "enabled", "budget_tokens": 5000},
                                          {"type": "adaptive"}, {"type": "disabled"}])
    @pytest.mark.parametrize("upstream_id", ["gpt-x", "o3"])
    def test_thinking_asked_of_a_model_that_does_not_reason_is_no_error(
        self, thinking, upstream_id
    ):
        def answer(upstream, connection):
            asked = "reasoning_effort" in upstream.seen[-1]
            words = {"error": {"message": '"m" does not support thinking'}}
            upstream._answer(connection, (400, words) if asked else said())

        with gateway_over(answer, answer, models=(upstream_id,)) as (client, _):
            body = request(thinking=thinking, output_config={"effort": "max"},
                           model=f"openai/{upstream_id}")  # fmt: skip
            status, _, message = client.post(body)
        assert status == 200, message

    @pytest.mark.parametrize("stream", [False, True])
    def test_json_is_asked_for_until_the_model_takes_it_and_never_made_up(self, stream):
        refusals = [(400, {"error": {"message": f"'{name}' is not supported"}})
                    for name in ("response_format", "tool_choice")]  # fmt: skip
        schema = {"type": "object", "required": ["name"]}
        body = request(output_config={"format": {"type": "json_schema", "schema": schema}},
                       stream=stream)  # fmt: skip
        fenced, prose = said('```json\n{"name": 1}\n```'), said("I am not sure.")
        with gateway_over(*refusals, fenced, prose) as (client, upstream):
            _, _, data = client.post(body)
            status, _, error = client.post(body)
        message = ogx.message_from_events(read_events(data)) if stream else data
        assert message["content"][0]["text"] == '{"name": 1}'
        assert status == 502 and "answered with no JSON" in error["error"]["message"]
        assert [{"response_format", "tools"} & set(seen) for seen in upstream.seen] == [
            {"response_format"}, {"tools"}, set(), set()
        ]

    SEARCH = {"type": "search", "query": "q", "sources": [{"url": "http://a", "title": "A"}]}

    GOLDEN = {  # name -> (dialect, chunks or events)
        "text": ("chat", [delta(content="Hel"), delta(content="lo"), delta("stop", USAGE)]),
        "nothing": ("chat", [delta("stop")]),
        "thinking in a field": ("chat", [delta(reasoning="hm"), delta("stop", content="ok")]),
        "thinking in the text": ("chat", [delta(content="<think>hm</th"),
                                          delta("length", content="ink>ok")]),
        "signed thinking": ("chat", [
            delta(reasoning_details=[{"type": "reasoning.text", "text": "hm", "index": 0}]),
            delta(content="ok"), delta(reasoning_details=[{"type": "reasoning.encrypted"}]),
            delta("stop")]),
        "a signed call": ("chat", [delta("tool_calls", tool_calls=[
            {**fragment(0, "a", "A", "{}"), "extra_content": {"google": {}}}])]),
        "a refusal": ("chat", [delta("stop", refusal="No.")]),
        **{f"calls {name}": ("chat", [*(delta(tool_calls=p) for p in pieces), delta("stop")])
           for name, pieces, _ in TestChat.CALLS},
        "half a call": ("chat", [delta("length", tool_calls=[fragment(0, "a", "A", '{"x"')])]),
        "a response": ("responses", [
            added(0, type="reasoning"), piece("reasoning_summary_text", 0, "hm"),
            ended(0, **TestResponses.REASONING), added(1, type="reasoning"),
            ended(1, **TestResponses.REASONING), added(2, type="function_call", call_id="c",
                                                       name="A"),
            piece("function_call_arguments", 2, "{}"), completed()]),
        "a response with a search": ("responses", [
            ended(0, type="web_search_call", id="ws", action=SEARCH),
            piece("output_text", 1, "found"),
            {"type": "response.output_text.annotation.added",
             "annotation": {"type": "url_citation", "url": "http://a", "title": "A"}},
            completed()]),
    }  # fmt: skip

    @pytest.mark.parametrize("name", GOLDEN)
    def test_streamed_or_not_it_is_the_same_message_with_all_that_anthropic_requires(self, name):
        dialect, chunks = self.GOLDEN[name]
        with FakeUpstream(sse(*chunks), sse(*chunks)) as upstream, serving(
            dataclasses.replace(provider(url=upstream.url), dialect=dialect)
        ) as client:
            _, _, data = client.post(request(stream=True))
            _, _, whole = client.post(request())
        events = read_events(data)
        check_grammar(events)
        for event in events:
            check_required(event, event["type"])
        check_required(whole, "message")
        folded_message = ogx.message_from_events(events)
        for block in whole["content"] + folded_message["content"]:
            block["id"] = re.sub("^toolu_[0-9a-f]{24}$", "made up", block.get("id", ""))
        assert {**folded_message, "id": ""} == {**whole, "id": ""}

    def test_these_are_all_the_blocks_that_a_user_gets_to_see(self):
        seen = set()
        for dialect, chunks in self.GOLDEN.values():
            by = {"chat": ogx.ChatTranslator, "responses": ogx.ResponsesTranslator}[dialect]
            seen |= {block["type"] for block in folded(*chunks, by=by)["content"]}
        assert seen == {"text", "thinking", "redacted_thinking", "tool_use", "server_tool_use",
                        "web_search_tool_result"}  # fmt: skip

    def test_a_streamed_answer_folds_to_the_same_message(self):
        answer = {"choices": [{"finish_reason": "stop", "message": {"content": "Hello."}}],
                  "usage": USAGE}  # fmt: skip
        with gateway_over(answer, said()) as (client, _):
            whole = client.post(request())[2]
            streamed = ogx.message_from_events(read_events(client.post(request(stream=True))[2]))
        assert {**whole, "id": 0} == {**streamed, "id": 0}

    @pytest.mark.parametrize(
        ("content_type", "streamed"),
        [("text/event-stream", True), ("text/event-stream; charset=utf-8", True), ("", True),
         ("application/octet-stream", True), ("application/json", False), ("", False),
         ("text/plain", False)],
    )  # fmt: skip
    def test_an_upstream_may_answer_either_way(self, content_type, streamed):
        whole = {"choices": [{"finish_reason": "stop", "message": {"content": "Hello."}}]}
        body = said() if streamed else json.dumps(whole).encode()

        def answer(fake, connection):
            send(connection, 200, body, content_type)

        with gateway_over(answer) as (client, _):
            assert client.post(request())[2]["content"][0]["text"] == "Hello."

    def test_each_event_is_flushed_when_its_chunk_arrives(self):
        gates = [threading.Event() for _ in range(4)]

        def answer(fake, connection):
            begin_stream(connection)
            for number, gate in enumerate(gates):
                assert gate.wait(5)
                send_chunk(connection, sse(delta(content=f"<{number}>"), done=False))
            send_chunk(connection, sse(delta("stop")))
            connection.sendall(b"0\r\n\r\n")

        with gateway_over(answer) as (client, _):
            gates[0].set()
            stream, seen = client.begin(request(stream=True)), b""
            for number, gate in enumerate(gates):
                gate.set()
                seen += read_until(stream, f"<{number}>".encode())
                assert f"<{number + 1}>".encode() not in seen
            seen += stream.read()
        check_grammar(read_events(seen))

    def test_every_split_of_a_stream_gives_the_same_events(self):
        stream = sse(delta(role="assistant", content=""), delta(reasoning="hm"),
                     delta(content="é\n\"漢"), delta(tool_calls=[fragment(0, "a", "A", '{"x')]),
                     delta(tool_calls=[fragment(0, arguments='":1}')]), delta("tool_calls"),
                     {"choices": [], "usage": USAGE})  # fmt: skip
        expected = None
        for cut in range(len(stream) + 1):
            reader = ogx.SseReader()
            items = reader.feed(stream[:cut]) + reader.feed(stream[cut:])
            chunks = [json.loads(i) for i in items if i != b"[DONE]"]
            expected = expected or translated(*chunks)
            assert translated(*chunks) == expected

    def test_silence_is_bridged_by_comments_and_pings(self):
        def answer(fake, connection):
            begin.wait(10)
            begin_stream(connection)
            send_chunk(connection, sse(delta(content="a"), done=False))
            finish.wait(10)
            send_chunk(connection, sse(delta("stop")))

        begin, finish = threading.Event(), threading.Event()
        with gateway_over(answer, tick=0.01) as (client, _):
            stream = client.begin(request(stream=True))
            before = read_until(stream, ogx.SIGN_OF_LIFE, 2)
            begin.set()
            after = read_until(stream, b"event: ping", 2)
            finish.set()
            after += stream.read()
        assert stream.status == 200 and b"event:" not in before
        check_grammar([e for e in read_events(before + after) if e["type"] != "ping"])

    def test_keep_alive_comments_of_an_upstream_reach_the_client(self):
        def answer(fake, connection):
            begin_stream(connection)
            while not seen.wait(0.005):
                send_chunk(connection, b": PROCESSING\n\n")
            send_chunk(connection, sse(delta(content="a"), delta("stop")))

        seen = threading.Event()
        with gateway_over(answer, tick=0.02) as (client, _):
            stream = client.begin(request(stream=True))
            read_until(stream, ogx.SIGN_OF_LIFE, 2)
            seen.set()
            assert b"event: message_stop" in stream.read()

    def test_empty_lines_before_an_answer_are_no_answer(self):
        whole = {"choices": [{"finish_reason": "stop", "message": {"content": "Hi."}}]}

        def answer(fake, connection):  # DeepSeek keeps connections alive so
            begin_stream(connection)
            for data in (b"\n", b"\n\n", b"\n" + json.dumps(whole).encode()):
                send_chunk(connection, data)
                time.sleep(0.01)
            connection.sendall(b"0\r\n\r\n")

        with gateway_over(answer) as (client, _):
            assert client.post(request())[2]["content"][0]["text"] == "Hi."

    def test_a_finish_reason_without_done_is_fine(self):
        answer = sse(delta(content="a"), delta("stop"), done=False)
        with gateway_over(answer) as (client, _):
            assert client.post(request())[2]["stop_reason"] == "end_turn"

    def test_the_last_event_ends_the_answer_on_a_keep_alive_connection(self):
        done = threading.Event()

        def answer(fake, connection):
            begin_stream(connection)
            send_chunk(connection, said())
            done.wait(20)  # the connection stays open

        with gateway_over(answer) as (client, _):
            _, _, data = client.post(request(stream=True))
            done.set()
        check_grammar(read_events(data))

    def test_the_classifier_of_auto_mode_gets_its_verdict(self):
        """Claude Code's local check: not streamed, with a stop sequence, by a model that may think
        first and an upstream that may not look for the sequence."""
        words = "<think>Is it safe?</think><block>no</block> since it only lists files."
        body = request("Check", max_tokens=2112, stop_sequences=["</block>"])
        with gateway_over(sse(*(delta(content=w) for w in re.findall(".{1,3}", words)))) as (
            client, upstream
        ):  # fmt: skip
            _, _, message = client.post(body)
        assert message["content"][-1]["text"] == "<block>no"
        assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "</block>")
        assert upstream.seen[0]["stop"] == ["</block>"]

    @cases(
        "fields",
        [
            {"output_config": {"format": {"type": "json_schema", "schema": {
                "type": "object", "additionalProperties": False, "required": 5}}}},
            {"output_config": {"format": {"type": "json_schema", "schema": {
                "type": "object", "additionalProperties": False, "required": [{}]}}}},
            {"messages": [assistant([call("a", source={"type": "base64", "data": 5})])]},
            {"metadata": {"user_id": "\ud800"}},
            {"messages": [assistant([{"type": "thinking", "thinking": "x", "signature": 5}])]},
            {"messages": [assistant([{"type": "redacted_thinking",
                                      "data": '{"ogx":"responses"}'}])]},
            {"messages": [assistant([call("\ud800")])]},
            {"messages": [assistant([{"type": "redacted_thinking", "data": json.dumps({
                "ogx": "chat", "by": "openai/gpt-x", "reasoning_details": 5, "extra_content": 5},
                separators=(",", ":"))}, call("a")]), user("x")]},
            {"tools": [tool(anyOf=5, allOf=[5], oneOf=[{"properties": 5}], enum=[[]])]},
            {"tools": [tool(properties=[], required={}, anyOf=[{"$ref": 5}], **{"$defs": 5})]},
            {"messages": [user([{"type": "tool_addition", "tool": 5}, {"type": "tool_removal"},
                                {"type": "compaction", "content": {}}])]},
            {"messages": [user([result("a", [{"type": "web_search_tool_result",
                                              "content": [{}]}])])]},
            {"messages": [{"role": "system", "content": [], "output_config": {"effort": []}},
                          user("x")]},
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("kind", ["openai", "mistral"])
    def test_odd_requests_are_served_or_refused_and_never_a_500(self, fields, kind, caplog):
        body = {**request(model=f"{kind}/gpt-x"), **fields}
        with gateway_over(kind=kind) as (client, _):
            assert client.post(json.dumps(body).encode())[0] in (200, 400)
            ogx.responses_request(body, model("openai", "gpt-5.5"))
        assert "Traceback" not in caplog.text

    @cases(
        "answer",
        [
            sse({"choices": [{"delta": {}, "finish_reason": ["stop"]}]}),
            sse({"error": {"message": "m", "status_code": 99999}}),
            sse({"object": "error", "message": "vLLM's old words"}),
            sse(delta(reasoning_details=5)), sse(delta(reasoning_details=[5])),
            sse(delta(reasoning_details=[{"text": 5}])),
            sse(delta("stop", reasoning_details=[{"index": []}])),
            sse(delta(tool_calls=[{"function": {"name": 5}}])),
            sse(delta(tool_calls=[{"function": {"name": "A", "arguments": 5}}])),
            (400, {"error": {"message": "supports at most " + "9" * 5000 + " completion tokens"}}),
        ],
    )
    def test_odd_answers_never_break_the_gateway(self, answer, caplog):
        with gateway_over(answer) as (client, _):
            assert client.post(request())[0] in (200, 400, 500, 502)
            assert client.post(request("next"))[0] == 200
        assert "Traceback" not in caplog.text

    def test_half_surrogate_pairs_go_nowhere(self):
        raw = json.dumps(request(user([text("a\ud83d b\ude00 \U0001f600")]), model="vllm/gpt-x",
                                 tools=[tool("A", properties={"k\udc00": {}})])).encode()
        with self.native(native_message()) as (client, upstream):
            assert client.post(raw)[0] == 200
        with gateway_over() as (client, chat_upstream):
            assert client.post(raw.replace(b"vllm/", b"openai/"))[0] == 200
        for seen in (upstream.raw[0], chat_upstream.raw[0]):
            assert b"a\\ufffd b\\ufffd \\ud83d\\ude00" in seen and b"k\\ufffd" in seen
            json.loads(seen)

    def test_the_header_that_tells_who_served_is_bounded(self):
        with gateway_over() as (client, _):
            headers = client.post(request(model="openai/" + "x" * 249))[1]
            status, _, answer = client.post(request(model="openai/" + "x" * 250))
        assert len(headers["x-ogx-served"]) == 256
        assert status == 400 and "model: expected 1 to 256 characters" in json.dumps(answer)

    @pytest.mark.parametrize("level", ["INFO", "DEBUG"])
    def test_the_log_names_what_a_translated_request_left_out(self, caplog, level):
        usual = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
        body = request(banana=1, top_k=5, context_management=usual)
        with gateway_over() as (client, _), caplog.at_level(level):
            assert client.post(body)[0] == client.post({**body, "stream": True})[0] == 200
            until(lambda: caplog.text.count("total") == 2)
        named = "banana, top_k" + ", context_management" * (level == "DEBUG")
        assert caplog.text.count(f"dropped: {named}\n") == 2

    def test_the_log_names_nothing_where_all_is_handed_on(self, caplog):
        with self.native(native_message()) as (client, _), caplog.at_level("DEBUG"):
            assert client.post(request(model="vllm/gpt-x", banana=1, top_k=5))[0] == 200
            until(lambda: "total" in caplog.text)
        assert "dropped" not in caplog.text

    def test_requests_are_encoded_alike_whether_their_tools_are_remembered(self):
        encoder = ogx.Encoder()
        for n in range(40):
            tools = [tool(f"t{n % 20}", a={"type": "string"})]
            body = {"model": "m", "tools": tools, "x": "\u00e9"}
            for _ in range(2):
                assert json.loads(encoder.bytes_of(body)) == body
        assert len(encoder._tools) <= 16
        assert encoder.bytes_of({"a": 1, "tools": []}) == b'{"a":1,"tools":[]}'
        half = encoder.bytes_of({"a": "\ud83d", "tools": [{"name": "\ude00"}]})
        assert half == rb'{"a":"\ufffd","tools":[{"name":"\ufffd"}]}'

    # -- native

    def native(self, *answers, kind="vllm", **options):
        return gateway_over(*answers, kind=kind, native=True, **options)

    def test_bytes_pass_both_ways_where_the_upstream_speaks_messages(self):
        body = {"model": "vllm/gpt-x", "max_tokens": 9, "messages": [user("hi")], "stream": True,
                "brand_new": {"a": [1, 2]}}  # fmt: skip
        raw = json.dumps(body, indent=1).encode()
        with self.native(native_stream()) as (client, upstream):
            headers = {"anthropic_beta": "b-2030", "authorization": "Bearer client-secret"}
            _, _, data = client.post(raw, anthropic_version="2030-01-01", **headers)
        assert upstream.raw[0] == raw.replace(b"vllm/gpt-x", b"gpt-x")
        path, head = upstream.heads[0]
        assert path == "/v1/messages" and head["authorization"] == "bearer sk-secret-1234"
        assert (head["anthropic-beta"], head["anthropic-version"]) == ("b-2030", "2030-01-01")
        assert data == native_stream().replace(b"their/name", b"vllm/gpt-x")

    def test_a_message_passes_with_the_name_that_was_asked_for(self):
        with self.native(native_message()) as (client, upstream):
            message = client.post(request(model="claude-haiku-4-5"))[2]
        assert message == {**native_message(), "model": "claude-haiku-4-5"}
        assert upstream.seen[0]["model"] == "gpt-x"

    def test_anthropic_itself_is_asked_with_its_own_header(self):
        with self.native(native_message(), kind="anthropic") as (client, upstream):
            assert client.post(request(model="anthropic/gpt-x"))[0] == 200
        head = upstream.heads[0][1]
        assert head["x-api-key"] == "sk-secret-1234" and "authorization" not in head
        assert head["anthropic-version"] == "2023-06-01"

    def test_anthropic_itself_gets_every_beta_and_cache_breakpoint(self):
        cached = {"type": "text", "text": "s", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
        raw = json.dumps({"model": "anthropic/claude-x", "max_tokens": 9, "system": [cached],
                          "messages": [user([cached])], "stream": True, "speed": "fast",
                          "context_management": {"edits": []}}).encode()  # fmt: skip
        usage = b'"cache_read_input_tokens": 4321'
        stream = native_stream().replace(b'"cache_read_input_tokens":0', usage)
        with self.native(stream, kind="anthropic") as (client, upstream):
            _, _, data = client.post(raw, anthropic_beta="a-2030,b-2031", anthropic_version="2031")
        assert upstream.raw[0] == raw.replace(b"anthropic/claude-x", b"claude-x")
        head = upstream.heads[0][1]
        assert (head["anthropic-beta"], head["anthropic-version"]) == ("a-2030,b-2031", "2031")
        assert data == stream.replace(b"their/name", b"anthropic/claude-x") and usage in data

    def test_azure_is_asked_with_its_own_header(self):
        with gateway_over(kind="azure") as (client, upstream):
            assert client.post(request(model="azure/my-deployment"))[0] == 200
        head = upstream.heads[0][1]
        assert head["api-key"] == "sk-secret-1234" and "authorization" not in head
        assert upstream.seen[0]["model"] == "my-deployment"

    def test_azures_own_variables_lead_to_its_responses(self, monkeypatch):
        answer = sse(piece("output_text", 0, "Hi."), completed(), done=False)
        environ = {"AZURE_OPENAI_ENDPOINT": "http://me.openai.azure.com/",
                   "AZURE_OPENAI_API_KEY": "azure-key-1234"}  # fmt: skip
        (azure,) = ogx.config_from_json(ogx.starter_config(), "starter", environ).providers
        with FakeUpstream(answer) as upstream:
            monkeypatch.setenv("http_proxy", upstream.url[:-3])
            monkeypatch.delenv("no_proxy", raising=False)
            with serving(azure) as client:
                message = client.post(request(model="azure/my-deployment"))[2]
        assert message["content"][0]["text"] == "Hi."
        path, head = upstream.heads[0]
        assert path == "http://me.openai.azure.com/openai/v1/responses"
        assert head["api-key"] == "azure-key-1234" and "authorization" not in head
        assert upstream.seen[0]["model"] == "my-deployment"
        assert upstream.gets[0][0] == "http://me.openai.azure.com/openai/v1/models"

    def test_a_server_without_messages_is_translated(self):
        with gateway_over(said(), kind="vllm") as (client, upstream):
            assert client.post(request(model="vllm/gpt-x"))[2]["content"][0]["text"] == "Hello."
        assert upstream.heads[0][0] == "/v1/chat/completions"

    def test_a_server_that_lost_its_messages_api_is_translated(self):
        gone = (404, {"detail": "Not Found"})
        with self.native(gone, said()) as (client, upstream):
            assert client.post(request(model="vllm/gpt-x"))[0] == 200
        assert [p for p, _ in upstream.heads] == ["/v1/messages", "/v1/chat/completions"]

    @pytest.mark.parametrize("forced", ["chat", "messages"])
    def test_the_user_can_force_a_dialect(self, forced):
        answer = {"chat": said(), "messages": native_message()}[forced]
        with FakeUpstream(answer, native=forced == "chat") as upstream, serving(
            dataclasses.replace(provider("vllm", upstream.url), dialect=forced)
        ) as client:
            assert client.post(request(model="vllm/gpt-x"))[0] == 200
        assert upstream.heads[0][0] == {"chat": "/v1/chat/completions",
                                        "messages": "/v1/messages"}[forced]  # fmt: skip

    def test_a_request_that_would_lose_something_is_translated(self):
        with self.native(said(), native_message()) as (client, upstream):
            client.post(request(user([pdf(title="P")]), model="vllm/gpt-x"))
            client.post(request(model="vllm/gpt-x"))
        assert [path for path, _ in upstream.heads] == ["/v1/chat/completions", "/v1/messages"]
        assert "The document 'P' could not be passed on" in upstream.raw[0].decode()

    def test_the_older_output_format_arrives_by_its_newer_name(self):
        wanted = {"type": "json_schema", "schema": {"type": "object"}}
        with self.native(native_message()) as (client, upstream):
            assert client.post(request(model="vllm/gpt-x", output_format=wanted))[0] == 200
        assert upstream.seen[0]["output_config"] == {"format": wanted}
        assert "output_format" not in upstream.seen[0]

    def test_what_nothing_taught_goes_natively_byte_for_byte(self):
        with self.native(native_message()) as (client, upstream):
            body = json.dumps(request(model="vllm/gpt-x", output_config={"effort": "high"}))
            client.post(body.encode(), anthropic_beta="a-1")
        assert upstream.raw == [body.replace("vllm/gpt-x", "gpt-x").encode()]
        assert upstream.heads[0][1]["anthropic-beta"] == "a-1"

    def test_mcp_servers_are_another_gateways_to_refuse(self):
        with self.native(native_message(), kind="messages") as (client, upstream):
            body = request(model="messages/gpt-x", mcp_servers=[{"type": "url", "url": "u"}])
            assert client.post(body)[0] == 200
            assert upstream.seen[0]["mcp_servers"] == body["mcp_servers"]

    def test_threads_are_refused_natively_too_but_for_anthropic(self):
        with self.native() as (client, upstream):
            body = request(model="vllm/gpt-x", thread={"type": "continue"})
            assert client.post(body)[0] == 400 and upstream.seen == []
        with self.native(native_message(), kind="anthropic") as (client, _):
            assert client.post({**body, "model": "anthropic/gpt-x"})[0] == 200

    def test_anthropic_judges_what_is_new_itself(self):
        with self.native(native_message(), kind="anthropic") as (client, upstream):
            body = request(user([{"type": "hologram"}]), model="anthropic/gpt-x")
            assert client.post(body)[0] == 200
            assert upstream.seen[0]["messages"] == body["messages"]

    def test_thinking_that_no_one_signed_comes_back_harmlessly(self):
        chunks = [delta(reasoning="hm"), delta("stop", content="ok")]
        with gateway_over(sse(*chunks)) as (client, _):
            content = client.post(request())[2]["content"]
        signed = [block["signature"] for block in content if block["type"] == "thinking"]
        assert len(signed) == 1 and signed[0]
        body = request(user("a"), assistant(*content), user("b"))
        assert openai_refusal(chat(body)) == ""
        assert chat(body, "deepseek")["messages"][1]["reasoning_content"] == "hm"
        assert [item.get("type") for item in responses(body)["input"]] == [None, "message", None]
        sent = ogx.messages_request(body, model("anthropic"))["messages"][1]["content"]
        assert sent == [text("ok")]
        sent = ogx.messages_request(body, model("vllm"))["messages"]
        assert sent == [user("a"), assistant([text("ok")]), user("b")]

    def test_thinking_that_anthropic_did_not_sign_is_left_out(self):
        ours = {"type": "thinking", "thinking": "x", "signature": '{"ogx":"responses"}'}
        theirs = {"type": "thinking", "thinking": "y", "signature": "c2ln"}
        unsigned = {"type": "thinking", "thinking": "z", "signature": ""}
        body = request(user("a"), assistant(ours, theirs, unsigned, text("b")), user("c"))
        sent = ogx.messages_request(body, model("anthropic"))["messages"]
        assert sent[1]["content"] == [theirs, text("b")] and sent[0] is body["messages"][0]
        sent = ogx.messages_request(body, model("vllm"))["messages"]
        assert sent[1]["content"] == [theirs, unsigned, text("b")]
        assert sent[0] is body["messages"][0] and sent[2] is body["messages"][2]

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_model_that_only_streams_serves_who_does_not(self, stream):
        refusal = (400, {"error": {"message": "This model only support stream mode."}})
        with gateway_over(refusal, said("Hi."), said("Hi.")) as (client, upstream):
            for _ in range(2):
                status, _, message = client.post(request())
                assert (status, message["content"][0]["text"]) == (200, "Hi.")
        assert [seen.get("stream_options") for seen in upstream.seen] == [
            None, {"include_usage": True}, {"include_usage": True}]

    def test_a_native_answer_without_content_is_no_message(self):
        with self.native({"id": "x"}) as (client, _):
            status, _, body = client.post(request(model="vllm/gpt-x"))
        assert status == 502 and "sent no message but" in body["error"]["message"]

    def test_a_truncated_native_stream_ends_in_an_error_event(self):
        with self.native(native_stream()[:-40]) as (client, _):
            data = client.post(request(model="vllm/gpt-x", stream=True))[2]
        events = read_events(data)
        assert events[-1]["type"] == "error" and events[-2]["type"] != "message_stop"

    @cases(("words", "dialect"), [
        ("<think>\nLet me see.</think>Good day.", "chat"), ("\n<thinking>Hm", "chat"),
        ("<thought>Hm", "chat"), ("I <think> so.", "messages"), ("<thinker>", "messages"),
        ("<think about it", "messages"), ("Good day.", "messages")])
    def test_a_server_that_shows_its_thinking_as_text_is_translated_from_then_on(
        self, words, dialect, caplog
    ):
        caplog.set_level("INFO", "ogx")
        with self.native(native_stream(words), said("x")) as (client, _):
            client.post(request(model="vllm/gpt-x", stream=True))
            caplog.clear()
            client.post(request(model="vllm/gpt-x"))
        assert f"vllm/gpt-x by {dialect}" in caplog.text

    def test_go_writes_such_a_tag_by_escapes(self):
        answer = native_stream("<think>Hm").replace(b"<", b"\\u003c").replace(b">", b"\\u003e")
        with self.native(answer, said("x")) as (client, upstream):
            client.post(request(model="vllm/gpt-x", stream=True))
            client.post(request(model="vllm/gpt-x"))
        assert [p for p, _ in upstream.heads] == ["/v1/messages", "/v1/chat/completions"]

    def test_a_vendor_that_quotes_such_a_tag_keeps_its_messages(self):
        answers = [native_stream("<thinking>Hm"), native_message()]
        with self.native(*answers, kind="openrouter") as (client, upstream):
            client.post(request(model="openrouter/gpt-x", stream=True))
            client.post(request(model="openrouter/gpt-x"))
        assert {path for path, _ in upstream.heads} == {"/v1/messages"}

    # -- errors

    @pytest.mark.parametrize("stream", [True, False])
    @cases(
        ("answer", "status", "words"),
        [
            ((429, {"error": {"message": "slow"}}), 429, "slow (from openai, model gpt-x)"),
            ((500, {"error": {"message": "oops"}}), 500, "oops (from openai, model gpt-x)"),
            ((503, b"<html><title>Down</title></html>"), 503, "an HTML page: Down (from openai"),
            ((404, {"error": {"message": "no model"}}), 404, "no model (from openai"),
            ((301, b""), 502, "Moved Permanently (from openai"),
            ((200, b"<html><title>Log in</title></html>"), 502, "but an HTML page: Log in"),
            ({"error": {"message": "busy", "code": 503}}, 503, "busy (from openai"),
            (sse({"error": {"message": "busy", "code": 503}}), 503, "busy (from openai"),
            (sse(done=False), 502, "ended the answer before it was complete"),
            (sse(), 502, "ended the answer before it was complete"),
        ],
    )  # fmt: skip
    def test_an_upstreams_failure_before_the_first_event_is_an_http_status(
        self, stream, answer, status, words
    ):
        with gateway_over(answer) as (client, _):
            got, headers, body = client.post(request(stream=stream))
            assert got == status and body["type"] == "error"
            assert words in body["error"]["message"]
            assert body["request_id"] == headers["request-id"]
            assert client.get("/v1/health")[0] == 200

    def test_an_error_after_the_headers_is_an_event(self):
        def answer(fake, connection):
            begun.wait(10)
            send(connection, 429, b'{"error":{"message":"slow down"}}', "application/json")

        begun = threading.Event()
        with gateway_over(answer, tick=0.01) as (client, _):
            stream = client.begin(request(stream=True))
            begun.set()
            (event,) = read_events(stream.read())
        assert stream.status == 200 and event["type"] == "error"
        assert event["error"] == {"type": "rate_limit_error",
                                  "message": "slow down (from openai, model gpt-x)"}  # fmt: skip
        assert event["request_id"] == stream.headers["request-id"]

    def test_text_before_an_error_in_one_packet_still_arrives(self):
        answer = sse(delta(content="kept"), {"error": {"message": "busy"}}, done=False)
        with gateway_over(answer) as (client, _):
            data = client.post(request(stream=True))[2]
        assert b'"text":"kept"' in data and b'"message":"busy' in data

    def test_a_truncated_stream_never_looks_complete(self):
        def answer(fake, connection):
            begin_stream(connection)
            send_chunk(connection, sse(delta(content="a"), done=False))

        with gateway_over(answer) as (client, _):
            status, _, data = client.post(request(stream=True))
        events = read_events(data)
        # The open text is closed: Claude Code then keeps it and goes on from there.
        assert status == 200 and [e["type"] for e in events] == [
            "message_start", "content_block_start", "content_block_delta", "content_block_stop",
            "error",
        ]  # fmt: skip
        assert "in the middle of its answer" in events[-1]["error"]["message"]

    @cases("sent", [b"", b"HTTP/1.1 200 OK\r\n", CHUNKED, CHUNKED + b"5\r\nd"])
    def test_a_connection_reset_is_an_error_wherever_it_comes(self, sent):
        def answer(fake, connection):
            connection.sendall(sent)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        with gateway_over(answer, answer) as (client, _):  # the first connection was used before
            status, _, told = client.post(request(stream=True))
        assert status == 502 and told["error"]["type"] == "api_error"

    @pytest.mark.parametrize("begun", [False, True])
    def test_a_stalled_upstream_is_bridged_by_pings_and_times_out(self, begun):
        def answer(fake, connection):
            if begun:
                begin_stream(connection)
                send_chunk(connection, sse(delta(content="a"), done=False))
            await_end(fake, connection)

        limits = ogx.Limits(first_byte_timeout=0.2, idle_timeout=0.2)
        with gateway_over(answer, answer, tick=0.01, limits=limits) as (client, upstream):
            data = client.post(request(stream=True))[2]
            assert upstream.client_left.wait(2)
            if not begun:
                status, _, told = client.post(request())
                assert (status, told["error"]["type"]) == (504, "timeout_error")
        *_, last = read_events(data)
        assert last["error"]["type"] == "timeout_error"
        assert "openai sent nothing for 0.2" in last["error"]["message"]
        assert data.count(ogx.PING if begun else ogx.SIGN_OF_LIFE) >= 2

    def test_a_black_hole_is_a_connect_timeout(self):
        with socket.create_server(("127.0.0.1", 0)) as hole:  # it takes no part in the handshake
            url = f"https://127.0.0.1:{hole.getsockname()[1]}/v1"
            limits = ogx.Limits(connect_timeout=0.1)
            owner = provider(url=url)
            with serving(owner, discover=False, limits=limits) as client:
                client.gateway.registry.learn("openai", [ogx.Model("openai/gpt-x", owner, "x")], "")
                status, _, told = client.post(request())
        assert (status, told["error"]["type"]) == (504, "timeout_error")
        assert "connecting took too long" in told["error"]["message"]

    def test_a_stalled_upload_times_out(self):
        with self.stalled(limits=ogx.Limits(idle_timeout=0.2)) as (client, _, closed):
            status, _, told = client.post(request("x" * 20_000_000, stream=True))
            assert closed(2)
        assert (status, told["error"]["type"]) == (504, "timeout_error")
        assert told["error"]["message"].startswith("openai stopped reading the request")

    def test_a_refused_key_names_the_variable_and_stops_retries(self):
        refusal = (401, {"error": {"message": "Incorrect API key provided: sk-secret-1234."}})
        with gateway_over(refusal) as (client, _):
            status, headers, body = client.post(request())
        assert (status, headers["x-should-retry"]) == (401, "false")
        assert body["error"]["message"] == (
            "Incorrect API key provided: ***. (from openai, model gpt-x); "
            "check OPENAI_API_KEY where ogx.py runs"
        )

    def test_retry_after_is_passed_on(self):
        refusal = (429, {"error": {"message": "slow"}}, {"retry-after": "12"})
        with gateway_over(refusal) as (client, _):
            assert client.post(request())[1]["retry-after"] == "12"

    def test_a_prompt_too_long_is_anthropics_error(self):
        refusal = (400, {"error": {"code": 400, "type": "exceed_context_size_error", "message":
                         "request (20020 tokens) exceeds the available context size (16384 "
                         "tokens), try increasing it"}})  # llama.cpp, seen live
        with gateway_over(refusal) as (client, _):
            status, _, body = client.post(request())
        assert status == 400
        assert body["error"]["message"] == "prompt is too long: 20020 tokens > 16384 maximum"

    def test_a_prompt_too_long_is_told_so_inside_a_stream_too(self):
        error = {"message": "This model's maximum context length is 4097 tokens. However, your "
                            "messages resulted in 4294 tokens.", "code": 400}  # fmt: skip
        with gateway_over(sse({"error": error})) as (client, _):
            status, _, body = client.post(request(stream=True))
        assert status == 400
        assert body["error"]["message"] == "prompt is too long: 4294 tokens > 4097 maximum"

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_native_answer_that_is_an_error_is_an_http_status(self, stream):
        error = {"type": "error", "error": {"type": "overloaded_error",
                                            "message": "busy sk-secret-1234"}}  # fmt: skip
        answer = ogx.sse_bytes(error) if stream else error
        with self.native(answer, answer) as (client, _):
            status, _, body = client.post(request(model="vllm/gpt-x", stream=stream))
        assert status == 529 and body["error"]["message"].startswith("busy ***")

    @cases(("told", "shown", "status"), [
        ("BadRequestError", "invalid_request_error", 400), ("", "permission_error", 403),
        (7, "overloaded_error", 529),
        ("invalid_request_error", "invalid_request_error", 400)])
    def test_a_native_refusal_has_a_type_of_anthropics(self, told, shown, status):
        words = {"type": "error", "error": {"type": told, "message": "so it is"}}
        with self.native(*[(status, words)] * 5) as (client, _):
            answer = client.post(request(model="vllm/gpt-x"))[2]
        assert answer["error"] == {"type": shown, "message": "so it is"}
        assert answer["request_id"].startswith("req_")
        with self.native(*[(status, {**words, "request_id": "theirs"})] * 5) as (client, _):
            assert client.post(request(model="vllm/gpt-x"))[2]["request_id"] == "theirs"

    def test_an_image_that_a_native_server_cannot_take_becomes_words(self):
        refusal = (400, {"error": {"message": "m is not a multimodal model", "code": 400,
                                   "type": "BadRequestError", "param": None}})  # vLLM 0.32
        body = request(user(image(), text("what is it?")), model="vllm/gpt-x")
        with self.native(refusal, said(), said()) as (client, upstream):
            assert [client.post(body)[0], client.post(body)[0]] == [200, 200]
        paths = [path for path, _ in upstream.heads]
        assert paths == ["/v1/messages", *["/v1/chat/completions"] * 2]
        assert all("An image was here" in json.dumps(sent) for sent in upstream.seen[1:])

    def test_an_image_becomes_words_where_the_dialect_is_fixed_too(self):
        refusal = (400, {"error": {"message": "m is not a multimodal model"}})
        body = request(user(image(), text("what is it?")), model="vllm/gpt-x")
        with FakeUpstream(refusal, native_message(), native=True) as upstream, serving(
                dataclasses.replace(provider("vllm", upstream.url), dialect="messages")) as client:
            assert client.post(body)[0] == 200
        assert "An image was here" in json.dumps(upstream.seen[1]["messages"])

    ODD_ERRORS = ({"error": {"message": "engine died", "code": 503}}, {"error": "engine died"},
                  {"object": "error", "message": "engine died", "code": 500},
                  {"detail": "engine died"}, {"success": False, "msg": "engine died"})  # fmt: skip

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("error", ODD_ERRORS, ids=str)
    def test_an_error_in_the_place_of_a_native_answer_is_an_http_status(self, error, stream):
        answers = [error, sse(error)] if stream else [error]  # a server may not stream its errors
        for answer in answers:
            with self.native(answer) as (client, _):
                status, _, body = client.post(request(model="vllm/gpt-x", stream=stream))
            assert status in (500, 503) and body["type"] == "error"
            assert body["error"]["message"] == "engine died (from vllm/gpt-x)"

    @pytest.mark.parametrize("error", ODD_ERRORS[:3], ids=str)
    def test_a_later_error_in_a_native_stream_is_an_event_of_anthropics(self, error):
        start = native_stream()[: native_stream().index(b"event: content_block_stop")]
        with self.native(start + sse(error)) as (client, _):
            data = client.post(request(model="vllm/gpt-x", stream=True))[2]
        assert data.startswith(start[:50]) and b"[DONE]" not in data
        event = read_events(data)[-1]
        assert event["type"] == "error"
        assert event["error"]["message"] == "engine died (from vllm/gpt-x)"

    def test_a_native_refusal_passes_as_it_is_unless_the_reason_stands_within(self):
        theirs = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"},
                  "request_id": "theirs"}
        wrapped = {"type": "error", "error": {"type": "invalid_request_error", "metadata": {
            "raw": "too hot", "provider_name": "X"}, "message": "Provider returned error"}}
        with self.native((400, theirs), (400, wrapped)) as (client, _):
            assert client.post(request(model="vllm/gpt-x"))[2] == theirs
            body = client.post(request("next", model="vllm/gpt-x"))[2]
        assert body["error"]["message"] == "X: too hot (from vllm, model gpt-x)"

    def test_an_error_in_anthropics_shape_passes_as_it_is(self):
        theirs = {"type": "error", "error": {"type": "rate_limit_error", "message": "slow",
                                             "extra": 1}, "request_id": "req_theirs"}  # fmt: skip
        refusal = (429, theirs, {"retry-after": "3", "anthropic-ratelimit-requests-limit": "5"})
        with self.native(refusal) as (client, _):
            status, headers, body = client.post(request(model="vllm/gpt-x"))
        assert (status, body, headers["retry-after"]) == (429, theirs, "3")
        assert not [h for h in headers if "ratelimit" in h]

    @cases(
        ("answer", "status", "words"),
        [
            ((401, {"error": "Unauthorized"}), 401, "Unauthorized (from vllm, model gpt-x); check"),
            ((500, {"error": {"code": 500, "message": "oops"}}), 500, "oops (from vllm"),
            ((400, {"type": "error", "error": {"type": "invalid_request_error", "message":
              "This model's maximum context length is 40960 tokens. However, your prompt contains "
              "at least 50000 input tokens, which exceeds this limit."}}), 400,
             "prompt is too long: 50000 tokens > 40960 maximum"),
            (b"<html><title>Hi</title></html>", 502, "sent no message but an HTML page: Hi"),
        ],
    )  # fmt: skip
    def test_other_errors_are_rebuilt(self, answer, status, words):
        with self.native(answer) as (client, _):
            got, _, body = client.post(request(model="vllm/gpt-x"))
        assert got == status and words in body["error"]["message"]

    def test_a_passed_error_keeps_its_status(self):
        theirs = {"type": "error", "error": {
            "type": "permission_error", "message": "OAuth authentication is not allowed."},
            "request_id": "theirs"}
        with self.native((403, theirs), kind="anthropic") as (client, _):
            status, _, body = client.post(request(model="anthropic/gpt-x"))
        assert (status, body) == (403, theirs)

    # -- redaction

    def test_a_key_in_a_later_error_event_is_redacted(self):
        error = {"type": "error", "error": {"type": "api_error", "message": "sk-secret-1234"}}
        start = native_stream()[: native_stream().index(b"event: content_block_stop")]
        with self.native(start + ogx.sse_bytes(error)) as (client, _):
            data = client.post(request(model="vllm/gpt-x", stream=True))[2]
        assert b'"message":"*** (from vllm' in data and b"sk-secret" not in data

    def test_a_key_in_a_passed_error_is_redacted(self):
        theirs = {"type": "error", "error": {"type": "x", "message": "bad sk-secret-1234"}}
        with self.native((403, theirs)) as (client, _):
            assert client.post(request(model="vllm/gpt-x"))[2]["error"]["message"] == "bad ***"

    @pytest.mark.parametrize(("words", "told"), [
        (r"bad sk\u002dsecret-1234", "bad ***"),
        (r"bad sk-secret\/1234", "bad ***"),
        (r"bad \u001b]0;x\u0007\u202e", "bad ?]0;x?? (from vllm"),
    ], ids=["escaped key", "escaped slash", "controls"])  # fmt: skip
    def test_no_escape_in_a_passed_error_evades_redaction(self, words, told):
        theirs = b'{"type":"error","error":{"type":"x","message":"%b"}}' % words.encode()
        refusal = ogx.refusal_from_body(400, theirs)
        error = ogx.refused_error(refusal, model("vllm"), {}, theirs)
        error.hide(["sk-secret-1234", "sk-secret/1234"])
        body = json.loads(error.raw or ogx.json_bytes(error.body("req_1")))
        assert body["error"]["message"].startswith(told)

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_password_that_an_upstream_quotes_is_redacted(self, stream):
        environ = {"LLAMA_CPP_URL": "http://me:p%40ss%2Fword@127.0.0.1:1"}
        (built,) = ogx.config_from_json(ogx.starter_config(), "starter", environ).providers
        basic = built.headers["authorization"].split()[1]
        words = f"wrong: p@ss/word, p%40ss%2Fword, {basic}"
        with FakeUpstream((401, {"error": {"message": words}})) as upstream, serving(
            dataclasses.replace(built, base_url=upstream.url)
        ) as client:
            body = client.post(request(model="llama-cpp/m", stream=stream))[2]
            assert upstream.heads[0][1]["authorization"] == f"basic {basic.lower()}"
        assert "wrong: ***, ***, ***" in body["error"]["message"]

    def test_a_models_own_words_are_not_redacted(self):
        stream = native_stream("say sk-secret-1234")
        with self.native(stream) as (client, _):
            data = client.post(request(model="vllm/gpt-x", stream=True))[2]
        assert data == stream.replace(b"their/name", b"vllm/gpt-x")

    # -- remedies

    def test_a_refusal_teaches_and_the_next_request_is_right_the_first_time(self):
        words = "max_tokens is too large: 32000. This model supports at most 16384 completion " \
                "tokens, whereas you provided 32000."  # fmt: skip
        refusal = (400, {"error": {"message": words, "param": "max_tokens"}})
        with gateway_over(refusal) as (client, upstream):
            for _ in range(2):
                assert client.post(request(max_tokens=32000))[0] == 200
        limits = [body["max_completion_tokens"] for body in upstream.seen]
        assert limits == [32000, 16384, 16384]

    @pytest.mark.parametrize("field", ["thread", "safeguards", "mcp_servers", "container"])
    def test_what_is_refused_by_us_is_served_without_it(self, field):
        with gateway_over() as (client, _):
            assert client.post(request(**{field: [{"type": "x"}]}))[0] == 400
            assert client.post(request())[0] == 200

    def test_lessons_end_after_five_requests(self):
        fields = ("temperature", "top_p", "stop", "tool_choice", "parallel_tool_calls")
        refusals = [(400, {"error": {"message": f"Unsupported parameter: '{name}'"}})
                    for name in fields]  # fmt: skip
        body = request(temperature=1, top_p=1, stop_sequences=["x"], tools=[tool()],
                       tool_choice={"type": "any", "disable_parallel_tool_use": True})  # fmt: skip
        with gateway_over(*refusals) as (client, upstream):
            status, _, answer = client.post(body)
        assert (status, len(upstream.seen)) == (400, 5)
        assert "'parallel_tool_calls'" in answer["error"]["message"]

    def test_what_was_learned_is_shown_survives_and_can_be_forgotten(self, tmp_path):
        path = str(tmp_path / "state.sqlite")
        refusal = (400, {"error": {"message": "Unsupported parameter: 'top_p'"}})
        body = request(top_p=0.5)
        with gateway_over(refusal, store=ogx.Store(path)) as (client, upstream):
            client.post(body)
            assert len(upstream.seen) == 2
        with gateway_over(store=ogx.Store(path)) as (client, upstream):
            client.post(body)
            assert len(upstream.seen) == 1 and "top_p" not in upstream.seen[0]
            metadata = client.get("/v1/models/openai/gpt-x")[2]["custom_metadata"]
            assert metadata["learned"] == ["drop top_p"]
            assert client.ask("DELETE", "/v1/models/openai/gpt-x")[0] == 200
            assert client.ask("DELETE", "/v1/models/openai/gpt-x")[0] == 404
            client.post(body)
            assert upstream.seen[1]["top_p"] == 0.5

    def test_an_error_as_the_first_stream_event_teaches_too(self):
        refusal = sse({"error": {"message": "Unsupported parameter: 'top_p'", "code": 400}})
        with gateway_over(refusal, said()) as (client, upstream):
            assert client.post(request(top_p=0.5, stream=True))[0] == 200
        assert ["top_p" in body for body in upstream.seen] == [True, False]

    @cases("first", [delta(role="assistant", content=""), {"choices": []}])
    def test_an_error_after_an_empty_first_chunk_can_still_be_remedied(self, first):
        refusal = sse(first, {"error": {"message": "Unsupported parameter: 'top_p'", "code": 400}})
        with gateway_over(refusal, said()) as (client, upstream):
            assert client.post(request(top_p=0.5, stream=True))[0] == 200
        assert len(upstream.seen) == 2

    def test_a_refusal_with_http_200_teaches_too(self):
        refusal = {"error": {"message": "Unsupported parameter: 'top_p'", "code": 400}}
        for stream, answer in ((False, refusal), (True, refusal), (True, sse(refusal))):
            good = native_stream() if stream else native_message()
            with self.native(answer, good) as (client, upstream):
                body = request(model="vllm/gpt-x", top_p=0.5, stream=stream)
                assert client.post(body)[0] == 200
            assert "top_p" not in upstream.seen[1]
            with gateway_over(answer, said()) as (client, upstream):
                assert client.post(request(top_p=0.5, stream=stream))[0] == 200
            assert "top_p" not in upstream.seen[1]

    NODE = {"type": "object", "properties": {"id": {"format": "uuid"}}}

    TREE = tool("Tree", properties={
        "kids": {"type": "array", "items": {"$ref": "#/$defs/Node"}}, "id": {"pattern": "^\\d+$"},
    }, **{"$defs": {"Node": NODE}})  # fmt: skip

    @pytest.mark.parametrize("dialect", ["chat", "responses", "messages"])
    def test_a_refused_schema_ends_no_session(self, dialect):
        """Three refusals in other words each, then the tools are as plain as can be; the next
        request is right the first time."""
        refusals = [(400, {"error": {"message": "Invalid schema for function 'Tree': '^\\d+$' is "
                                                "not a 'regex'.", "param": "tools[0]"}}),
                    (500, {"error": {"message": "failed to parse grammar", "type": "x"}}),
                    (400, [{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message":
                        'Unknown name "$ref" at \'tools[0].function_declarations[0]\''}}])]
        body = request(tools=[self.TREE], model="vllm/gpt-x")
        finished = {"chat": said(), "messages": native_message(),
                    "responses": {"object": "response", "status": "completed", "output": []}}
        with FakeUpstream(*refusals, *[finished[dialect]] * 2,
                          native=dialect == "messages") as upstream:  # fmt: skip
            owner = dataclasses.replace(provider("vllm", upstream.url), dialect=dialect)
            with serving(owner) as client:
                for _ in range(2):
                    assert client.post(body)[0] == 200
                (found,) = client.gateway.registry.chain("vllm/gpt-x")
                learned = [str(lesson) for lesson in client.gateway.lessons.of(found)]
        schemas = [(t := seen["tools"][0]).get("parameters") or t.get("input_schema")
                   or t["function"]["parameters"] for seen in upstream.seen]  # fmt: skip
        texts = list(map(json.dumps, schemas))
        assert [[word in sent for word in ("pattern", "format", "$ref")] for sent in texts] == [
            [True, True, True], [False, True, True], [False, False, True], [False] * 3, [False] * 3]
        node = {"type": "object", "properties": {"id": {}}}
        assert schemas[-1]["properties"]["kids"] == {"type": "array", "items": node}
        assert learned == ["override refused_keywords to ('pattern', '*', '$ref')"]

    def test_tools_that_are_always_refused_cost_four_requests_and_teach_nothing(self):
        refusal = (400, {"error": {"message": "Invalid schema for function 'Tree': bad format"}})
        with gateway_over(*[refusal] * 5, kind="vllm") as (client, upstream):
            status, _, told = client.post(request(tools=[self.TREE], model="vllm/gpt-x"))
            assert (status, len(upstream.seen)) == (400, 4)
            assert told["error"]["message"].startswith("Invalid schema for function 'Tree'")
            client.post(request("next", tools=[self.TREE], model="vllm/gpt-x"))
        assert "pattern" in json.dumps(upstream.seen[4]["tools"])

    def test_a_lesson_that_did_not_help_is_not_kept(self):
        refusal = (400, {"error": {"message": "Unsupported parameter: 'top_p'"}})
        other = (400, {"error": {"message": "the moon is not full"}})
        with gateway_over(refusal, other) as (client, upstream):
            assert client.post(request(top_p=0.5))[0] == 400
            client.post(request("next", top_p=0.5))
        assert upstream.seen[2]["top_p"] == 0.5

    def test_a_lesson_that_changes_nothing_is_neither_tried_nor_kept(self):
        """A request without images is told that images aren't taken, then what is really wrong."""
        images = (400, {"error": {"message": "This model does not support images."}})
        field = (400, {"error": {"message": "Unsupported parameter: 'top_p'"}})
        with gateway_over(images, images, field) as (client, upstream):
            assert client.post(request())[0] == 400 and len(upstream.seen) == 1
            assert client.post(request("b", top_p=0.5))[0] == 400 and len(upstream.seen) == 2
            assert client.post(request("c", top_p=0.5))[0] == 200 and len(upstream.seen) == 4
            learned = client.get("/v1/models/openai/gpt-x")[2]["custom_metadata"]["learned"]
            assert learned == ["drop top_p"]
            client.post(request(user([text("see"), image()])))
        assert "image_url" in json.dumps(upstream.seen[-1])

    def test_a_lesson_that_changes_nothing_makes_room_for_the_next(self):
        words = "This model does not support images. Unsupported parameter: 'top_p'"
        with gateway_over((400, {"error": {"message": words}})) as (client, upstream):
            assert client.post(request(top_p=0.5))[0] == 200
        assert [seen.get("top_p") for seen in upstream.seen] == [0.5, None]

    def test_what_chat_taught_is_not_done_to_messages(self):
        refusal = (400, {"error": {"message": "Unsupported parameter: 'max_tokens'. Use "
                                              "'max_completion_tokens' instead."}})
        with self.native(refusal, said(), native_message()) as (client, upstream):
            client.post(request(user([pdf()]), model="vllm/gpt-x"))  # goes by chat
            assert client.post(request(model="vllm/gpt-x"))[0] == 200
        assert [("max_tokens" in body) for body in upstream.seen] == [True, False, True]

    def test_a_lowered_limit_lowers_the_thinking_budget(self):
        body = {"max_tokens": 2000, "thinking": {"type": "enabled", "budget_tokens": 5000}}
        assert ogx.finished_messages(body)["thinking"]["budget_tokens"] == 1999
        assert "thinking" not in ogx.finished_messages({**body, "max_tokens": 500})
        assert ogx.finished_messages({**body, "max_tokens": 9000})["thinking"] is body["thinking"]

    def test_a_native_refusal_teaches_too(self):
        refusal = (400, {"type": "error", "error": {"type": "invalid_request_error", "message":
                   "max_tokens: 100 > 64, which is the maximum allowed number of output tokens"}})
        with self.native(refusal, native_message()) as (client, upstream):
            assert client.post(request(model="vllm/gpt-x"))[0] == 200
        assert [body["max_tokens"] for body in upstream.seen] == [100, 64]

    def asked_natively(self, refusal, *bodies, **headers):
        """The requests that reach an upstream which refuses the first."""
        words = (400, {"type": "error", "error": {"type": "invalid_request_error",
                                                  "message": refusal}})  # fmt: skip
        with self.native(words, *[native_message()] * len(bodies)) as (client, upstream):
            for body in bodies:
                assert client.post({**body, "model": "vllm/gpt-x"}, **headers)[0] == 200
            assert len(upstream.seen) == len(bodies) + 1
            return upstream

    def test_a_refused_beta_is_left_out_from_then_on_and_that_is_kept(self, tmp_path):
        betas = "claude-code-20250219,effort-2025-11-24"
        upstream = self.asked_natively("invalid beta flag", request(), request("x"),
                                       anthropic_beta=betas)  # fmt: skip
        sent = [head.get("anthropic-beta") for _, head in upstream.heads]
        assert sent == [betas, "claude-code-20250219", "claude-code-20250219"]
        upstream = self.asked_natively("Unexpected value(s) `a-1` for the anthropic-beta header",
                                       request(), anthropic_beta="a-1")  # fmt: skip
        assert [head.get("anthropic-beta") for _, head in upstream.heads] == ["a-1", None]
        path = str(tmp_path / "state.sqlite")
        lesson = ogx.Lesson("unlist", "anthropic-beta", "a-1", dialect="messages")
        ogx.Lessons(ogx.Store(path)).add(model(), [lesson, dataclasses.replace(lesson, value="b")])
        assert [k.value for k in ogx.Lessons(ogx.Store(path)).of(model())] == ["a-1", "b"]

    def test_a_tools_unknown_field_is_left_out_from_then_on(self):
        tools = [{**tool(), "eager_input_streaming": True}]
        words = "tools.0.custom.eager_input_streaming: Extra inputs are not permitted"
        upstream = self.asked_natively(words, request(tools=tools), request("x", tools=tools))
        told = ["eager_input_streaming" in body["tools"][0] for body in upstream.seen]
        assert told == [True, False, False]

    def test_thinking_gets_a_budget_where_it_must_have_one(self):
        words = "thinking.type: Input should be 'disabled' or 'enabled'"
        body = request(thinking={"type": "adaptive"}, max_tokens=8000)
        upstream = self.asked_natively(words, body, {**body, "max_tokens": 6000})
        assert [seen["thinking"].get("budget_tokens") for seen in upstream.seen] == [
            None, 4000, 3000]

    def test_an_effort_that_a_template_refuses_is_lowered_natively(self):
        words = "Unexpected reasoning effort high. Supported types are xhigh, medium, and low."
        body = request(output_config={"effort": "high"})
        upstream = self.asked_natively(words, body, body)
        assert [seen["output_config"]["effort"] for seen in upstream.seen] == [
            "high", "medium", "medium"]

    def test_a_refusal_is_remembered_with_the_betas_it_was_for(self):
        theirs = {"type": "error", "error": {"type": "invalid_request_error", "message": "beta"}}
        with self.native((400, theirs), native_message(), kind="anthropic") as (client, _):
            body = request(model="anthropic/gpt-x")
            assert client.post(body, anthropic_beta="good,bad")[0] == 400
            assert client.post(body, anthropic_beta="good")[0] == 200

    def test_a_prompt_that_fits_is_served_and_the_next_request_asks_for_all(self):
        words = TestRemedies.FITS[1][0]
        with gateway_over((400, {"error": {"message": words}})) as (client, upstream):
            for turn in ("a", "b"):
                assert client.post(request(turn, max_tokens=32000))[0] == 200
        limits = [body["max_completion_tokens"] for body in upstream.seen]
        assert limits == [32000, 12768, 32000]

    def test_a_prompt_that_fits_is_never_told_as_too_long(self):
        words = TestRemedies.FITS[1][0]
        refusal = (400, {"error": {"message": words}})
        with gateway_over(refusal, refusal, refusal) as (client, upstream):
            status, _, told = client.post(request(max_tokens=32000))
        assert (status, len(upstream.seen)) == (400, 2)
        assert told["error"]["message"].startswith(words)

    # -- retries

    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
    @pytest.mark.parametrize("stream", [True, False])
    def test_a_transient_failure_is_retried(self, status, stream):
        failure = (status, {"error": {"message": "busy"}})
        with gateway_over(failure, failure, said(), retries=3) as (client, upstream):
            assert client.post(request(stream=stream))[0] == 200
        assert len(upstream.seen) == 3

    def test_connections_that_break_before_a_byte_are_retried(self):
        with gateway_over(lambda *_: None, said(), retries=3) as (client, _):
            assert client.post(request())[0] == 200

    @cases(
        ("answer", "requests"),
        [
            ((503, {"error": {"message": "busy"}}), 4),  # three retries
            ((503, {"error": {"message": "busy"}}, {"retry-after": "0.001"}), 4),
            ((503, {"error": {"message": "busy"}}, {"retry-after": "9"}), 1),  # for the client
            ((503, {"error": {"message": "busy"}}, {"retry-after": "sk-a-key"}), 4),
            ((503, {"error": {"message": "busy"}}, {"retry-after": LATER}), 1),
            ((429, {"error": {"message": "m", "code": "insufficient_quota"}}), 1),
            ((401, {"error": {"message": "bad key"}}), 1),
            ((403, {"error": {"message": "no"}}), 1),
            ((404, {"error": {"message": "no"}}), 1),
            ((400, {"error": {"message": "no"}}), 1),
        ],
    )  # fmt: skip
    def test_how_often_each_failure_is_retried(self, answer, requests):
        with gateway_over(*[answer] * 9, retries=3) as (client, upstream):
            status, headers, body = client.post(request())
        assert (status, len(upstream.seen)) == (answer[0], requests)
        told = (answer[2] if len(answer) > 2 else {}).get("retry-after")
        assert headers.get("retry-after") == (None if told == "sk-a-key" else told)

    def test_remedies_and_retries_together_are_five_requests_at_most(self):
        answers = [(503, {"error": {"message": "busy"}}),
                   (400, {"error": {"message": "Unsupported parameter: 'top_p'"}})]  # fmt: skip
        answers += [(503, {"error": {"message": "busy"}})] * 9
        with gateway_over(*answers, retries=9) as (client, upstream):
            assert client.post(request(top_p=1))[0] == 503
        assert len(upstream.seen) == 5

    @pytest.mark.parametrize("native", [False, True])
    def test_an_empty_account_is_not_retried(self, native):
        error = {"type": "error", "error": {"type": "api_error", "message": "insufficient balance"},
                 "request_id": "theirs"}
        ways = self.native if native else gateway_over
        with ways((500, error), retries=3) as (client, upstream):
            name = "vllm/gpt-x" if native else "openai/gpt-x"
            status, headers, told = client.post(request(model=name))
        assert (status, len(upstream.seen), headers["x-should-retry"]) == (500, 1, "false")
        assert told == error if native else told["error"]["type"] == "billing_error"

    def test_a_tool_call_that_the_provider_garbled_is_retried_once(self):
        refusal = (400, {"error": {"message": "Failed to call a function",
                                   "code": "tool_use_failed"}})  # Groq
        with gateway_over(refusal, said(), refusal, refusal) as (client, upstream):
            assert client.post(request())[0] == 200
            assert client.post(request())[0] == 400
        assert len(upstream.seen) == 4

    @pytest.mark.parametrize("stream", [True, False])
    def test_an_answer_truncated_before_its_first_event_is_retried(self, stream):
        broken = sse(delta("error", role="assistant", content=""))
        with gateway_over(broken, said("Hi."), retries=1) as (client, upstream):
            status, _, data = client.post(request(stream=stream))
        message = ogx.message_from_events(read_events(data)) if stream else data
        assert status == 200 and len(upstream.seen) == 2
        assert message["content"] == [text("Hi.")]

    def test_an_answer_truncated_later_ends_in_an_error_event(self):
        with gateway_over(sse(delta(content="Half"), delta("network_error"))) as (client, upstream):
            events = read_events(client.post(request(stream=True))[2])
        assert [e["type"] for e in events[-2:]] == ["content_block_stop", "error"]
        assert len(upstream.seen) == 1

    def test_half_an_answer_is_never_retried(self):
        def answer(fake, connection):
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n{")

        with gateway_over(answer, said(), retries=3) as (client, upstream):
            assert client.post(request())[0] == 502
        assert len(upstream.seen) == 1

    def test_a_stream_that_began_is_never_retried(self):
        def answer(fake, connection):
            begin_stream(connection)
            send_chunk(connection, sse(delta(content="a"), done=False))

        with gateway_over(answer, said(), retries=3) as (client, upstream):
            assert b"event: error" in client.post(request(stream=True))[2]
        assert len(upstream.seen) == 1

    def test_a_client_disconnect_ends_the_backoff(self):
        with gateway_over((500, {}), retries=1, retry_seconds=60) as (client, upstream):
            client.gateway.backoff = 30
            with client.sending(request()):
                until(lambda: upstream.seen)
            until(lambda: not client.server.running)
        assert len(upstream.seen) == 1

    def test_a_pipelined_request_does_not_shorten_the_backoff(self):
        with gateway_over((500, {}), said(), retries=1) as (client, _):
            client.gateway.backoff = 0.2
            began = time.monotonic()
            with client.sending(request()) as sock:
                sock.sendall(b"GET /v1/health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                data = b""
                while b'"status"' not in data:
                    data += sock.recv(65536)
            assert time.monotonic() - began >= 0.2 * 0.8 and data.count(b"HTTP/1.1 200") == 2

    # -- chains

    @contextlib.contextmanager
    def chain(self, *answers):
        """(client, first, second): an alias `best` over two providers."""
        best = ogx.Alias("best", "all", "openai/a", ("openai/a", "groq/b", "gone/c"))
        with FakeUpstream(*answers, models=["a"]) as one, FakeUpstream(models=["b"]) as two:
            owners = provider("openai", one.url), provider("groq", two.url)
            with serving(*owners, aliases=[best]) as client:
                yield client, one, two

    @pytest.mark.parametrize("stream", [True, False])
    @cases(
        "answer",
        [
            (429, {"error": {"message": "slow"}}), (503, {"error": {"message": "busy"}}),
            (429, {"error": {"message": "m", "code": "insufficient_quota"}}),
            (402, {"error": {"message": "pay"}}),
            pytest.param(lambda fake, connection: connection.sendall(b"HTTP/1.1 "), id="cut off"),
        ],
    )  # fmt: skip
    def test_a_chain_falls_back_and_the_failed_target_cools_down(self, answer, stream):
        with self.chain(answer) as (client, one, two):
            status, headers, _ = client.post(request(model="best", stream=stream))
            assert (status, headers["x-ogx-served"]) == (200, "groq/b")
            assert client.post(request(model="best"))[1]["x-ogx-served"] == "groq/b"
            assert (len(one.seen), len(two.seen)) == (1, 2)
            client.gateway._cooling.clear()  # its rest is over
            assert client.post(request(model="best"))[1]["x-ogx-served"] == "openai/a"

    def test_a_refusal_of_the_request_itself_does_not_fall_back(self):
        with self.chain((400, {"error": {"message": "bad"}})) as (client, _, two):
            assert client.post(request(model="best"))[0] == 400
        assert two.seen == []

    def test_when_all_targets_fail_the_last_error_is_told(self):
        busy = (503, {"error": {"message": "busy"}})
        with self.chain(busy) as (client, _, two):
            two.answers.append((429, {"error": {"message": "slow"}}))
            status, _, body = client.post(request(model="best"))
        assert status == 429 and "slow (from groq" in body["error"]["message"]

    def test_a_chain_is_registered_over_the_api_and_in_the_file(self, tmp_path):
        path = str(tmp_path / "state.sqlite")
        body = {"model_id": "best", "provider_model_id": ["openai/b", "openai/a"]}
        for _ in range(2):
            with gateway_over(models="ab", store=ogx.Store(path)) as (client, upstream):
                if not client.gateway.registry.aliases:
                    assert client.post(body, "/v1/models")[0] == 200
                client.post(request(model="best"))
                assert upstream.seen[0]["model"] == "b"
        tree = {"registered_resources": {"models": [body]}}
        (alias,) = ogx.config_from_json(tree, "f", {}).aliases
        assert alias.targets == ("openai/b", "openai/a")
        for wrong in ([], [5], [""]):
            tree["registered_resources"]["models"] = [{**body, "provider_model_id": wrong}]
            assert "a list of them" in refused(ogx.config_from_json, tree, "f", {}).message

    def test_auto_falls_back_from_a_provider_that_is_down(self):
        auto = ogx.Alias("mine", "all", "auto")
        with FakeUpstream() as one, FakeUpstream() as two, serving(
            provider("openai", one.url), provider("groq", two.url), aliases=[auto]
        ) as client:
            client.post(request(model="mine"))
            client.gateway.registry.learn("openai", None, "connection refused")
            client.post(request(model="mine"))
            client.gateway.registry.learn("openai", None, "")
            client.post(request(model="mine"))
        assert (len(one.seen), len(two.seen)) == (2, 1)

    # -- places

    @contextlib.contextmanager
    def narrow(self, *answers, most=1, kind="openai", models=("gpt-x",), **options):
        """(client, upstream): a gateway over a provider that takes so many requests at once."""
        with FakeUpstream(*answers, models=models) as upstream:
            owner = dataclasses.replace(provider(kind, upstream.url), max_parallel=most)
            with serving(owner, **options) as client:
                yield client, upstream
                until(lambda: not any(client.gateway._queues.values()))  # all were given back

    @staticmethod
    def held(begins=b""):
        """An answer that begins so and lasts until the event is set: (answer, event)."""
        release = threading.Event()

        def answer(fake, connection):
            begin_stream(connection)
            if begins:
                send_chunk(connection, begins)
            assert release.wait(20)
            send_chunk(connection, said("held"))
            connection.sendall(b"0\r\n\r\n")

        return answer, release

    @staticmethod
    def waiting(client, number):
        """Wait until so many requests are under way or queued."""
        until(lambda: sum(map(len, client.gateway._queues.values())) == number)

    def asks(self, upstream):
        return [seen["messages"][-1]["content"] for seen in upstream.seen]

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("most", [1, 3], ids="{} at once".format)
    def test_requests_wait_for_a_place_in_the_order_they_came(self, most, stream):
        answers, releases = zip(*(self.held() for _ in range(most)))
        with self.narrow(*answers, most=most) as (client, upstream), contextlib.ExitStack() as all_:
            names = [f"number {n}" for n in range(most + 5)]
            socks = []
            for number, name in enumerate(names, 1):
                socks.append(all_.enter_context(
                    client.sending(request(name, stream=stream))))
                self.waiting(client, number)
            until(lambda: len(upstream.seen) == most)
            assert self.asks(upstream) == names[:most] or most > 1
            for release in releases:
                release.set()
            for sock in socks:
                assert b"200" in read_until(sock, b"stop_reason")
            until(lambda: len(upstream.seen) == len(names))
            assert sorted(self.asks(upstream)) == sorted(names)
            assert self.asks(upstream) == names or most > 1

    def test_without_a_limit_none_waits(self):
        answers, releases = zip(*(self.held() for _ in range(5)))
        with self.narrow(*answers, most=0) as (client, upstream), contextlib.ExitStack() as all_:
            for n in range(5):
                all_.enter_context(client.sending(request(f"{n}", stream=True)))
            until(lambda: len(upstream.seen) == 5)
            for release in releases:
                release.set()

    @cases("how", ["the end", "a refusal", "a failure", "half an answer", "nothing", "no HTTP",
                   "an error event", "a disconnect", "a disconnect before the answer"])  # fmt: skip
    @pytest.mark.parametrize("stream", [True, False])
    def test_a_place_is_given_back_however_an_answer_ends(self, how, stream):
        begins = {"a disconnect": sse(delta(content="a"), done=False)}.get(how, b"")
        held, release = self.held(begins)

        def cut_off(fake, connection):
            begin_stream(connection)
            send_chunk(connection, sse(delta(content="a"), done=False))

        answer = {
            "the end": said(), "a refusal": (400, {"error": {"message": "no"}}),
            "a failure": (503, {}), "half an answer": cut_off, "nothing": sse(done=False),
            "no HTTP": lambda fake, connection: connection.sendall(b"what?\r\n\r\n"),
            "an error event": b'data: {"error": {"message": "oops"}}\n\n'}.get(how, held)
        with self.narrow(answer) as (client, upstream):
            with client.sending(request("first", stream=stream)) as sock:
                until(lambda: upstream.seen)
                if "disconnect" not in how:
                    read_until(sock, b"HTTP/1.1")
            assert client.post(request("second"))[0] == 200
            release.set()
        assert self.asks(upstream) == ["first", "second"]

    def test_a_place_is_given_back_where_nothing_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        owner = dataclasses.replace(provider(url=url), max_parallel=1)
        with serving(owner, discover=False) as client:
            assert [client.post(request())[0] for _ in range(3)] == [502] * 3
            assert not any(client.gateway._queues.values())

    @pytest.mark.parametrize("stream", [True, False])
    def test_who_leaves_while_it_waits_is_out_at_once_and_never_asked_for(self, stream):
        held, release = self.held()
        with self.narrow(held) as (client, upstream), contextlib.ExitStack() as socks:
            one = socks.enter_context(client.sending(request("first", stream=True)))
            until(lambda: upstream.seen)
            with client.sending(request("second", stream=stream)):
                self.waiting(client, 2)
                three = socks.enter_context(client.sending(request("third", stream=stream)))
                self.waiting(client, 3)
            self.waiting(client, 2)  # while the first goes on
            release.set()
            read_until(three, b"end_turn")
            read_until(one, b"message_stop")
        assert self.asks(upstream) == ["first", "third"]

    def test_a_stream_that_waits_shows_signs_of_life(self):
        held, release = self.held()
        with self.narrow(held, tick=0.02) as (client, upstream), client.sending(
            request("first", stream=True)
        ):
            until(lambda: upstream.seen)
            with client.sending(request("second", stream=True)) as sock:
                data = read_until(sock, ogx.SIGN_OF_LIFE, 3)
                assert len(upstream.seen) == 1 and b"HTTP/1.1 200" in data
                release.set()
                read_until(sock, b"message_stop")

    def test_a_retry_takes_a_new_place_behind_those_that_wait(self):
        gate = threading.Event()

        def busy(fake, connection):
            assert gate.wait(20)
            send(connection, 503, b"{}", "application/json")

        with self.narrow(busy, retries=1) as (client, upstream):
            client.gateway.backoff = 0.3
            with client.sending(request("first")) as one:
                until(lambda: upstream.seen)
                with client.sending(request("second")) as two:
                    self.waiting(client, 2)
                    gate.set()
                    read_until(two, b"end_turn")
                    read_until(one, b"end_turn")
        assert self.asks(upstream) == ["first", "second", "first"]

    def test_a_remedy_holds_no_place_meanwhile(self):
        refusal = (400, {"error": {"message": "Unsupported parameter: 'top_p'"}})
        with self.narrow(refusal) as (client, upstream):
            assert client.post(request(top_p=1))[0] == 200
        assert len(upstream.seen) == 2

    def test_a_fallback_waits_for_its_own_provider_alone(self):
        held, release = self.held()
        chain = ogx.Alias("best", "all", "openai/a", ("openai/a", "groq/b"))
        with FakeUpstream(held, models=["a"]) as one, FakeUpstream(models=["b"]) as two:
            owners = [dataclasses.replace(provider(kind, upstream.url), max_parallel=1)
                      for kind, upstream in (("openai", one), ("groq", two))]
            with serving(*owners, aliases=[chain]) as client, client.sending(
                request("first", model="openai/a", stream=True)
            ) as sock:
                until(lambda: one.seen)
                assert client.post(request(model="groq/b"))[0] == 200
                one.answers.append((503, {}))
                with client.sending(request("second", model="best")) as other:
                    self.waiting(client, 2)
                    release.set()
                    assert b"groq/b" in read_until(other, b"end_turn")
                read_until(sock, b"message_stop")
            assert (len(one.seen), len(two.seen)) == (2, 2)

    def test_places_are_given_back_when_the_server_stops(self):
        held, release = self.held(sse(delta(content="a"), done=False))
        with self.narrow(held) as (client, upstream), contextlib.ExitStack() as socks:
            for number in range(1, 4):
                socks.enter_context(client.sending(request(stream=True)))
                self.waiting(client, number)
            until(lambda: upstream.seen)
            client.server.stop(drain=0)
            self.waiting(client, 0)
            release.set()

    def test_more_than_200_that_wait_are_told_to_come_back(self, monkeypatch):
        assert ogx.MAX_WAITING == 200
        monkeypatch.setattr(ogx, "MAX_WAITING", 2)
        held, release = self.held()
        with self.narrow(held, retries=3) as (client, upstream), contextlib.ExitStack() as all_:
            for n in range(3):
                all_.enter_context(client.sending(request(f"{n}", stream=True)))
                self.waiting(client, n + 1)
            status, headers, body = client.post(request("one too many"))
            assert (status, body["error"]["type"]) == (529, "overloaded_error")
            assert headers["retry-after"] == "10" and "max_parallel" in body["error"]["message"]
            release.set()
            until(lambda: len(upstream.seen) == 3)
            assert client.post(request("later"))[0] == 200

    def test_counting_and_lists_wait_for_no_place(self):
        held, release = self.held()
        with self.narrow(held) as (client, upstream), client.sending(request(stream=True)):
            until(lambda: upstream.seen)
            assert client.post(request(), "/v1/messages/count_tokens")[0] == 200
            assert client.get("/v1/models")[0] == 200
            release.set()

    def test_an_id_that_is_not_listed_waits_with_the_others(self):
        held, release = self.held()
        with FakeUpstream(held) as upstream:
            upstream.lists["/props"] = (200, {"total_slots": 1})
            with serving(provider("llama-cpp", upstream.url)) as client, client.sending(
                request("a", model="llama-cpp/other", stream=True)
            ):
                until(lambda: upstream.seen)
                with client.sending(request("b", model="llama-cpp/gpt-x")) as sock:
                    self.waiting(client, 2)
                    release.set()
                    read_until(sock, b"end_turn")
            assert self.asks(upstream) == ["a", "b"]

    def test_a_long_request_that_waited_is_sent_from_a_thread(self):
        held, release = self.held()
        threads = []
        with self.narrow(held) as (client, upstream), client.sending(
            request("first", stream=True)
        ) as one:
            until(lambda: upstream.seen)
            usual = client.gateway._pieces

            def pieces(attempt, reply, exchange):
                if len(exchange.raw) > ogx.LONG:
                    threads.append(threading.current_thread().name)
                return usual(attempt, reply, exchange)

            client.gateway._pieces = pieces
            with client.sending(request("x" * 2 * ogx.LONG)) as two:
                self.waiting(client, 2)
                release.set()
                read_until(two, b"end_turn")
            read_until(one, b"message_stop")
        assert threads and "loop" not in threads

    SHAPED = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    LOOK = {"name": "look", "input_schema": {"type": "object"}}

    @cases("url, fields, most", [
        ("http://127.0.0.1:9/v1", {"output_config": SHAPED}, 1024),
        ("http://10.1.2.3/v1", {"output_config": SHAPED, "max_tokens": 500}, 500),
        ("http://127.0.0.1:9/v1", {"output_config": SHAPED, "tools": [LOOK]}, 32000),
        ("http://127.0.0.1:9/v1", {}, 32000),
        ("https://api.example.com/v1", {"output_config": SHAPED}, 32000)])
    @pytest.mark.parametrize("dialect", ["chat", "messages", "responses"])
    def test_a_title_has_a_short_answer_on_a_local_server(self, url, fields, most, dialect):
        owner = dataclasses.replace(provider("vllm", url), dialect=dialect)
        body = request(**{"max_tokens": 32000, **fields})
        name = "max_output_tokens" if dialect == "responses" else "max_tokens"
        # An SDK's program, which has no session, may want more.
        for session, limit in (("s", most), ("", body["max_tokens"])):
            exchange = ogx.Exchange("req_1", body, json.dumps(body).encode(), session=session,
                                    dialect=dialect)
            sent = json.loads(ogx.Gateway(config(owner))._attempt(
                ogx.Model("vllm/m", owner, "m"), exchange, []).data)
            assert sent[name] == limit and exchange.request == body

    @pytest.mark.parametrize("native", [False, True])
    def test_a_failure_for_good_is_told_at_once(self, native):
        error = {"type": "error", "error": {"type": "api_error",
                                            "message": "tools param requires --jinja flag"}}
        ways = self.native if native else gateway_over
        with ways((500, error), retries=3) as (client, upstream):
            name = "vllm/gpt-x" if native else "openai/gpt-x"
            status, headers, told = client.post(request(model=name))
        assert (status, told["error"]["type"]) == (400, "invalid_request_error")
        assert "start its server with that flag" in told["error"]["message"]
        assert (len(upstream.seen), headers["x-should-retry"]) == (1, "false")

    def test_another_server_may_do_what_one_cannot(self):
        failure = (500, {"error": {"message": "tools param requires --jinja flag"}})
        with self.chain(failure) as (client, one, two):
            assert client.post(request(model="best"))[1]["x-ogx-served"] == "groq/b"
        assert (len(one.seen), len(two.seen)) == (1, 1)

    # -- calls as text

    CALL = '<tool_call>{"name": "Bash", "arguments": {"command": "ls",}}</tool_call>'

    @staticmethod
    def said_to(client, body):
        status, _, data = client.post(body)
        assert status == 200, data
        return ogx.message_from_events(read_events(data)) if body.get("stream") else data

    @contextlib.contextmanager
    def writing(self, *texts, kind="llama-cpp", props=None, **fields):
        """(client, upstream) with an upstream that answers with these texts, a word a chunk."""
        answers = [sse(*(delta(content=word) for word in re.findall(r"\S+\s*", text)),
                       delta("stop")) for text in texts]
        with FakeUpstream(*answers) as upstream:
            upstream.lists = {"/props": (200, props or {})}
            owner = dataclasses.replace(provider(kind, upstream.url), dialect="chat", **fields)
            with serving(owner) as client:
                yield client, upstream

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_call_as_text_becomes_one(self, stream, caplog):
        caplog.set_level("INFO", "ogx")
        body = request(model="llama-cpp/gpt-x", tools=[tool()], stream=stream)
        with self.writing(f"I look. {self.CALL}") as (client, _):
            message = self.said_to(client, body)
        assert [block["type"] for block in message["content"]] == ["text", "tool_use"]
        assert message["content"][0]["text"] == "I look. "
        assert message["content"][1]["input"] == {"command": "ls"}
        assert message["stop_reason"] == "tool_use" and "a call repaired" in caplog.text

    @cases("case", ["not local", "another kind", "switched off", "no tools", "an unknown tool",
                    "no call wanted"])
    def test_elsewhere_it_stays_text(self, case):
        fields = {"not local": {"kind": "openai"}, "another kind": {"kind": "groq"},
                  "switched off": {"text_calls": False}}.get(case, {})  # fmt: skip
        tools = {"no tools": [], "an unknown tool": [tool("Read")]}.get(case, [tool()])
        with self.writing(self.CALL, **fields) as (client, _):
            name = f"{fields.get('kind', 'llama-cpp')}/gpt-x"
            choice = {"tool_choice": {"type": "none"}} if case == "no call wanted" else {}
            message = self.said_to(client, request(model=name, tools=tools, **choice))
        assert [block["text"] for block in message["content"]] == [self.CALL]

    def test_which_providers_may_write_them(self):
        local = {kind.name for kind in ogx.PROVIDER_KINDS.values()
                 if provider(kind.name).reads_calls}
        assert local == {"ollama", "vllm", "lm-studio", "llama-cpp", "sglang", "openai-compatible"}
        assert not provider("vllm", "https://vllm.example.com/v1").reads_calls
        assert provider("vllm", "http://192.168.1.5:8000/v1").reads_calls

    def test_beside_a_real_call_it_stays_text(self):
        real = {"index": 0, "id": "c1", "function": {"name": "Bash", "arguments": "{}"}}
        chunks = [delta(content=self.CALL), delta(tool_calls=[real]), delta("tool_calls")]
        with gateway_over(sse(*chunks), kind="llama-cpp") as (client, _):
            body = request(model="llama-cpp/gpt-x", tools=[tool()])
            content = self.said_to(client, body)["content"]
        assert [block["type"] for block in content] == ["text", "tool_use"]
        assert content[0]["text"] == self.CALL

    def test_an_answer_that_breaks_off_keeps_its_words(self):
        with self.writing() as (client, upstream):
            cut = sse(delta(content="Hi <tool_call>{"))[:-len("data: [DONE]\n\n")]
            upstream.answers.append(cut)
            body = request(model="llama-cpp/gpt-x", tools=[tool()], stream=True)
            events = read_events(client.post(body)[2])
        text = "".join(event["delta"]["text"] for event in events
                       if event["type"] == "content_block_delta")
        assert text == "Hi <tool_call>{" and events[-1]["type"] == "error"

    def test_tools_are_told_in_words_where_the_template_has_none(self):
        props = {"chat_template_caps": {"supports_tools": False}}
        history = [user("go"), assistant([call("1", command="pwd")]), user([result("1", "/tmp")])]
        asked = request(*history, model="llama-cpp/gpt-x", tools=[tool(), tool("Read")])
        demanded = {**asked, "tool_choice": {"type": "tool", "name": "Bash"}}
        with self.writing("hm", self.CALL, "hm", props=props) as (client, upstream):
            for body in (asked, demanded, asked):
                self.said_to(client, body)
            before, words, after = upstream.seen
        assert len(before["tools"]) == 2
        assert "tools" not in words and "tool_choice" not in words
        assert '"name":"Bash"' in words["messages"][0]["content"].replace(" ", "")
        assert '"Read"' not in words["messages"][0]["content"]
        told = json.dumps(words["messages"])
        assert "/tmp" in told and "tool_calls" not in told
        schemas = words["response_format"]["json_schema"]["schema"]["anyOf"]
        assert [schema["properties"]["name"] for schema in schemas] == [{"const": "Bash"}]
        assert "tools" not in after and '"Read"' in json.loads(json.dumps(after))["messages"][0][
            "content"] and "response_format" not in after

    # -- disconnects

    @pytest.mark.parametrize("stream", [True, False])
    @cases("sent", [
        b"", b"HTTP/1.1 200 OK\r\n\r\n" + sse(delta(content="a"), done=False),
        b"HTTP/1.1 500 X\r\ncontent-length: 9\r\n\r\n{",
    ])  # fmt: skip
    def test_a_client_disconnect_cancels_the_upstream_request(self, sent, stream):
        got = threading.Event()

        def answer(fake, connection):
            connection.sendall(sent)
            got.set()
            await_end(fake, connection)

        with gateway_over(answer) as (client, upstream):
            with client.sending(request(stream=stream)):
                assert got.wait(5)
            assert upstream.client_left.wait(2)

    def test_a_client_disconnect_cancels_a_token_count(self):
        got = threading.Event()

        def answer(fake, connection):
            got.set()
            await_end(fake, connection)

        with gateway_over(answer, kind="vllm", native=True) as (client, upstream):
            with client.sending(request(model="vllm/gpt-x"), "/v1/messages/count_tokens"):
                assert got.wait(5)
            assert upstream.client_left.wait(2)

    @contextlib.contextmanager
    def stalled(self, **options):
        """A gateway over a server that takes the beginning of a request and no more of it:
        (client, event of that beginning, function that waits for the connection's end)."""
        begun, held = threading.Event(), []

        def serve():
            connection, _ = listener.accept()
            held.append(connection)
            connection.recv(1000)
            begun.set()

        def closed(seconds):
            held[0].settimeout(seconds)
            with contextlib.suppress(ConnectionResetError):
                while held[0].recv(1 << 20):
                    pass
            return True

        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=serve, daemon=True).start()
            owner = provider(url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
            with serving(owner, discover=False, **options) as client:
                client.gateway.registry.learn("openai", [ogx.Model("openai/gpt-x", owner, "x")], "")
                yield client, begun, closed
            held[0].close()

    def test_a_client_disconnect_cancels_the_upload(self):
        with self.stalled() as (client, begun, closed):
            with client.sending(request("x" * 20_000_000)):
                assert begun.wait(5)
            assert closed(2)

    # -- counting

    def test_count_tokens(self):
        with gateway_over() as (client, upstream):
            body = {"model": "openai/gpt-x", "messages": [user("foo")], "tools": []}
            status, _, counted = client.post(body, "/v1/messages/count_tokens?beta=true")
            assert status == 200 and 1 <= counted["input_tokens"] <= 20
            assert client.post({**body, "model": "no"}, "/v1/messages/count_tokens")[0] == 404
        assert upstream.seen == []

    COUNTED = "/v1/messages/count_tokens"

    def test_tokens_are_counted_by_who_can(self):
        with self.native({"input_tokens": 77}) as (client, upstream):
            body = {"model": "vllm/gpt-x", "messages": [user("x")]}
            assert client.post(body, self.COUNTED)[2] == {
                "input_tokens": 77, "context_management": {"original_input_tokens": 77}
            }
            assert upstream.heads[0][0] == self.COUNTED
            assert upstream.seen == [{"model": "gpt-x", "messages": [user("x")]}]

    def test_a_server_that_cannot_count_is_asked_once(self):
        with self.native((404, {}), (404, {})) as (client, upstream):
            for _ in range(2):
                body = {"model": "vllm/gpt-x", "messages": [user("x")]}
                assert 1 <= client.post(body, self.COUNTED)[2]["input_tokens"] < 20
        assert [path for path, _ in upstream.heads] == [self.COUNTED, "/tokenize"]

    @cases(
        ("kind", "dialect", "paths", "answers", "last"),
        [
            ("vllm", "chat", ["/tokenize"], [{"count": 7, "tokens": [1] * 7}],
             {"model": "gpt-x", "messages": [user("x")]}),
            ("llama-cpp", "chat", ["/apply-template", "/tokenize"],
             [{"prompt": "<u>x"}, {"tokens": [1] * 7}], {"model": "gpt-x", "content": "<u>x",
                                                          "add_special": True}),
            ("openai", "responses", ["/v1/responses/input_tokens"], [{"input_tokens": 7}],
             {"model": "gpt-x", "input": [{"role": "user", "content": [
                 {"type": "input_text", "text": "x"}]}]}),
        ],
    )  # fmt: skip
    def test_translated_requests_are_counted_where_a_tokenizer_is(
        self, kind, dialect, paths, answers, last
    ):
        tools = [tool("weather"), {"type": "web_search_20250305", "name": "web_search"}]
        body = {"model": f"{kind}/gpt-x", "messages": [user("x")], "thinking": {"type": "enabled"},
                "max_tokens": 5, "metadata": {"user_id": "u"}}  # fmt: skip
        with FakeUpstream(*answers, (404, {})) as upstream, serving(
            dataclasses.replace(provider(kind, upstream.url), dialect=dialect)
        ) as client:
            assert client.post(body, self.COUNTED)[2]["input_tokens"] == 7
            assert [path for path, _ in upstream.heads] == paths
            assert upstream.seen[-1] == last
            counts = {client.post({**body, "tools": tools}, self.COUNTED)[2]["input_tokens"]
                      for _ in range(2)}  # fmt: skip
            assert len(counts) == 1 and counts.pop() > 20  # it went away: estimated, asked once
            assert len(upstream.seen) == len(paths) + 1
            assert "weather" in json.dumps(upstream.seen[-1]["tools"])

    @cases("answer", [(500, {}), (400, {"error": "no"}), {"tokens": []}, b"", {},
                                        {"count": "7"}])  # fmt: skip
    def test_a_count_that_fails_is_estimated_and_asked_for_again(self, answer):
        with gateway_over(answer, {"count": 70}, kind="vllm") as (client, _):
            body = {"model": "vllm/gpt-x", "messages": [user("x")]}
            counts = [client.post(body, self.COUNTED)[2]["input_tokens"] for _ in range(2)]
        assert counts == [7, 70]

    def test_input_tokens_are_estimated_at_the_start_and_told_at_the_end(self):
        with gateway_over() as (client, _):
            _, _, data = client.post(request("word " * 400, stream=True))
        first, *_, last, _ = read_events(data)
        assert 300 <= first["message"]["usage"]["input_tokens"] <= 600
        assert (last["usage"]["input_tokens"], last["usage"]["output_tokens"]) == (30, 7)

    USAGE = {"prompt_tokens": 900, "completion_tokens": 2,
             "prompt_tokens_details": {"cached_tokens": 800}}  # fmt: skip

    NATIVE_USAGE = ogx.Usage(50, 2, 800, 50)

    @pytest.mark.parametrize(
        ("dialect", "stream", "answer"),
        [
            ("chat", True, sse(delta(content="Hi"), delta("stop", usage=USAGE))),
            ("chat", False, {"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}],
                             "usage": USAGE}),
            ("messages", True, native_stream(usage=NATIVE_USAGE)),
            ("messages", False, {**native_message(), "usage": {
                **NATIVE_USAGE.as_json(), "output_tokens": "2"}}),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )  # fmt: skip
    def test_estimates_learn_from_what_the_upstream_counts(self, dialect, stream, answer):
        body = request(O200K["prose"][1] * 4, stream=stream)
        with FakeUpstream(answer, said()) as upstream, serving(
            dataclasses.replace(provider(url=upstream.url), dialect=dialect)
        ) as client:
            ratios, prompt = client.gateway.ratios, ogx.TokenCounter().prompt(body)
            before = ratios.estimate(model(), prompt)
            assert client.post(body)[0] == 200
            client.get("/v1/health")  # after the end of the last answer
            assert before < 600 and ratios.estimate(model(), prompt) == 900

    def test_a_message_starts_with_the_estimate_and_ends_with_the_truth(self):
        answer = sse(delta(content="Hi"), delta("stop", usage=self.USAGE))
        with gateway_over(answer, answer) as (client, _):
            body = request(O200K["prose"][1] * 4, stream=True)
            told = []
            for _ in range(2):
                start, *_, end, _ = read_events(client.post(body)[2])
                told.append((start["message"]["usage"]["input_tokens"], end["usage"]))
        assert [first for first, _ in told] == [round(sum(ogx.TokenCounter().prompt(body))), 900]
        for _, usage in told:
            assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (100, 800)

    # -- models

    def test_registered_models_are_listed_replaced_and_survive(self, tmp_path):
        path = str(tmp_path / "state.sqlite")
        body = {"model_id": "claude-haiku-4-5-20251001", "provider_id": "openai",
                "provider_model_id": "b", "model_type": "llm"}  # the design document's
        with gateway_over(models="ab", store=ogx.Store(path)) as (client, upstream):
            assert client.post({**body, "provider_model_id": "a"}, "/v1/models")[0] == 200
            status, _, made = client.post(body, "/v1/models")
            assert (status, made["id"]) == (200, "claude-haiku-4-5-20251001")
            assert made["custom_metadata"]["alias_of"] == "openai/b"
            client.post(request(model="claude-haiku-4-5-20251001"))
            assert upstream.seen[0]["model"] == "b"
        with gateway_over(models="ab", store=ogx.Store(path)) as (client, _):
            ids = [e["id"] for e in client.get("/v1/models")[2]["data"]]
            assert ids == ["openai/a", "openai/b", "claude-haiku-4-5-20251001"]
            assert client.ask("DELETE", "/v1/models/claude-haiku-4-5-20251001")[2]["deleted"]
            assert client.ask("DELETE", "/v1/models/claude-haiku-4-5-20251001")[0] == 404
        with gateway_over(models="ab", store=ogx.Store(path)) as (client, _):
            assert len(client.get("/v1/models")[2]["data"]) == 2

    @cases(
        ("body", "status", "words"),
        [
            ([], 400, "expected a JSON object"),
            ({}, 400, "model_id: field required"),
            ({"model_id": " a"}, 400, "model_id: expected 1 to 256 characters"),
            ({"model_id": "a\n"}, 400, "model_id: expected"),
            ({"model_id": "\ud800"}, 400, "model_id: expected"),
            ({"model_id": "a" * 257}, 400, "model_id: expected"),
            ({"model_id": "a", "provider_id": "x"}, 400, "a configured provider (all, openai)"),
            ({"model_id": "a", "model_type": "embedding"}, 400, 'model_type: expected "llm"'),
            ({"model_id": "openai/gpt-x"}, 409, "is a provider's own id"),
            ({"model_id": "a", "provider_model_id": "a" * 257}, 400, "provider_model_id: expected"),
            ({"model_id": "a", "provider_model_id": "a" * 2**23}, 400, "provider_model_id: expec"),
            ({"model_id": "a", "provider_model_id": ["b", "a" * 257]}, 400, "1 to 256 characters"),
            ({"model_id": "a", "provider_model_id": ["b"] * 33}, 400, "at most 32 of them"),
            ({"model_id": "a", "provider_model_id": ["openai/gpt-x"] * 32}, 200, ""),
            ({"model_id": "a", "provider_model_id": "a" * 256}, 200, ""),
            ({"model_id": "a" * 256}, 200, ""),
            ({"model_id": "ein Name/mit: Zeichen é"}, 200, ""),
        ],
    )  # fmt: skip
    def test_what_may_be_registered(self, body, status, words):
        with gateway_over() as (client, _):
            got, _, answer = client.post(json.dumps(body).encode(), "/v1/models")
            assert got == status and words in json.dumps(answer).replace('\\"', '"')

    def test_more_than_the_most_are_not_registered(self, monkeypatch):
        monkeypatch.setattr(ogx, "MOST_REGISTERED", 2)
        with gateway_over() as (client, _):
            told = [client.post({"model_id": name}, "/v1/models") for name in ("a", "b", "c", "a")]
            assert [status for status, _, _ in told] == [200, 200, 400, 200]
            assert told[2][2]["error"]["message"] == (
                "model_id: 2 are registered; delete one before")
            assert client.ask("DELETE", "/v1/models/b")[0] == 200
            assert client.post({"model_id": "c"}, "/v1/models")[0] == 200

    @contextlib.contextmanager
    def two_on_one_file(self, path):
        """Clients of two servers that share a state file."""
        with FakeUpstream(models="ab") as upstream, serving(
            provider(url=upstream.url), store=ogx.Store(path)
        ) as one, serving(provider(url=upstream.url), store=ogx.Store(path)) as two:
            yield one, two

    def test_servers_that_share_a_file_see_each_others_registrations(self, tmp_path):
        path, mine = str(tmp_path / "state.sqlite"), "/v1/models/mine"
        body = {"model_id": "mine", "provider_model_id": "openai/a"}
        with self.two_on_one_file(path) as (one, two):
            for target in ("a", "b"):
                body = {"model_id": "mine", "provider_id": "openai", "provider_model_id": target}
                assert one.post(body, "/v1/models")[0] == 200
                until(lambda: two.get(mine)[0] == 200 and two.get(mine)[2]["custom_metadata"][
                    "alias_of"] == f"openai/{target}", 5)  # noqa: B023
            two.gateway.lessons.add(model(upstream_id="a"), [ogx.Lesson("drop", "stop")])
            until(lambda: "learned" in one.get("/v1/models/openai/a")[2]["custom_metadata"], 5)
            assert two.ask("DELETE", mine)[0] == 200
            until(lambda: one.get(mine)[0] == 404, 5)
            assert one.ask("DELETE", "/v1/models/openai/a")[0] == 200
            until(lambda: two.ask("DELETE", "/v1/models/openai/a")[0] == 404, 5)

    def test_what_many_register_at_two_servers_at_once_is_kept(self, tmp_path):
        path, statuses = str(tmp_path / "state.sqlite"), []

        def register(server, first):
            client = Client(server)
            for number in range(first, first + 15):
                statuses.append(client.post({"model_id": f"m{number}"}, "/v1/models")[0])
            client.connection.close()

        with self.two_on_one_file(path) as clients:
            threads = [threading.Thread(target=register, args=(clients[n % 2].server, 15 * n))
                       for n in range(20)]  # fmt: skip
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for client in clients:
                until(lambda: len(client.gateway.registry.aliases) == 300)  # noqa: B023
        assert statuses == [200] * 300 and len(ogx.Store(path).all("alias")) == 300

    @pytest.mark.parametrize("path", ["", "file/state.sqlite"], ids=["none", "no disk"])
    def test_what_may_be_lost_is_told(self, tmp_path, path):
        (tmp_path / "file").write_text("")
        store = ogx.Store(path and str(tmp_path / path))
        with gateway_over(store=store) as (client, _):
            for body in ({"model_id": "a"}, {"model_id": "b", "provider_model_id": "x"}):
                status, _, made = client.post(body, "/v1/models")
                assert (status, made["custom_metadata"]["warning"]) == (200, store.problem)
            assert client.get("/v1/models/a")[0] == 200
            _, _, gone = client.ask("DELETE", "/v1/models/a")
        assert gone == {"id": "a", "object": "model", "deleted": True, "warning": store.problem}

    def test_that_what_was_forgotten_may_come_back_is_told(self, tmp_path):
        path = str(tmp_path / "state.sqlite")
        with gateway_over(store=ogx.Store(path)) as (client, _):
            client.gateway.lessons.add(model(), [ogx.Lesson("drop", "stop")])
            with TestStore().locked(path):
                _, _, gone = client.ask("DELETE", "/v1/models/openai/gpt-x")
        assert "database is locked" in gone["warning"]

    def test_what_a_lock_kept_out_is_written_while_the_server_runs(self, tmp_path):
        path = str(tmp_path / "state.sqlite")
        with gateway_over(store=ogx.Store(path)) as (client, _):
            _, _, made = client.post({"model_id": "a"}, "/v1/models")
            assert "warning" not in made["custom_metadata"]
            with TestStore().locked(path):
                _, _, made = client.post({"model_id": "b"}, "/v1/models")
                assert "database is locked" in made["custom_metadata"]["warning"]
            until(lambda: not client.gateway.store.problem)
            assert set(ogx.Store(path).all("alias")) == {"a", "b"}

    def test_a_file_that_is_removed_is_made_anew_while_the_server_runs(self, tmp_path):
        path = str(tmp_path / "state.sqlite")
        with gateway_over(store=ogx.Store(path)) as (client, _):
            client.post({"model_id": "a"}, "/v1/models")
            os.remove(path)
            until(lambda: "a" in ogx.Store(path).all("alias"))

    @pytest.mark.parametrize(
        "kept", [[], {}, {"model_id": 5}, {"provider_id": None}, {"targets": 5}, {"targets": [5]},
                 {"provider_model_id": {}}, {"new": 1}], ids=str)  # fmt: skip
    def test_registrations_of_another_version_are_passed_over(self, kept):
        store, whole = ogx.Store(), dataclasses.asdict(ogx.Alias("mine", "openai", "gpt-x"))
        store.put("alias", "mine", {**whole, **kept} if kept else kept)
        with gateway_over(store=store) as (client, _):
            status = client.post(request(model="mine"))[0]
            assert status == (200 if "model_id" in kept else 404)  # the row's key tells the id
            assert client.get("/v1/models")[0] == 200

    def test_a_configured_alias_that_was_deleted_stays_away(self, tmp_path):
        path, mine = str(tmp_path / "state.sqlite"), ogx.Alias("mine", "all", "auto")
        with gateway_over(aliases=[mine], store=ogx.Store(path)) as (client, _):
            assert client.ask("DELETE", "/v1/models/mine")[0] == 200
        with gateway_over(aliases=[mine], store=ogx.Store(path)) as (client, _):
            assert client.get("/v1/models/mine")[0] == 404
            assert client.post({"model_id": "mine"}, "/v1/models")[0] == 200
        with gateway_over(aliases=[mine], store=ogx.Store(path)) as (client, _):
            assert client.get("/v1/models/mine")[0] == 200

    def test_an_alias_whose_provider_is_gone_says_so(self):
        alias = ogx.Alias("mine", "vllm", "x")
        with gateway_over(aliases=[alias]) as (client, _):
            status, _, body = client.post(request(model="mine"))
            assert [e["id"] for e in client.get("/v1/models")[2]["data"]] == ["openai/gpt-x"]
        assert status == 404
        assert body["error"]["message"] == "the provider 'vllm' of model 'mine' is not configured"

    def test_one_list_reads_as_openais_and_as_anthropics(self):
        with gateway_over(models=["gpt-x", "text-embedding-3"]) as (client, _):
            _, _, listing = client.get("/v1/models")
        (entry,) = listing["data"]
        assert listing["object"] == "list" and not listing["has_more"]
        assert (listing["first_id"], listing["last_id"]) == ("openai/gpt-x", "openai/gpt-x")
        assert {k: entry[k] for k in ("id", "object", "owned_by", "type", "display_name")} == {
            "id": "openai/gpt-x", "object": "model", "owned_by": "openai",
            "type": "model", "display_name": "openai/gpt-x",
        }  # fmt: skip
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["created_at"])
        assert entry["custom_metadata"]["model_type"] == "llm"

    @pytest.mark.parametrize(
        ("query", "ids", "has_more"),
        [
            ("", "abcde", False), ("?limit=2", "ab", True), ("?limit=5", "abcde", False),
            ("?limit=2&after_id=openai/b", "cd", True), ("?after_id=openai%2Fe", "", False),
            ("?limit=2&before_id=openai/d", "bc", True),
            ("?limit=9&before_id=openai/b", "a", False),
        ],
    )  # fmt: skip
    def test_the_model_list_is_paginated(self, query, ids, has_more):
        with gateway_over(models="abcde") as (client, _):
            _, _, listing = client.get("/v1/models" + query)
        assert [e["id"] for e in listing["data"]] == [f"openai/{i}" for i in ids]
        assert listing["has_more"] is has_more

    @cases("query", ["limit=0", "limit=x", "limit=1001", "after_id=nope",
                                       "limit=" + "9" * 5000])  # fmt: skip
    def test_a_wrong_page_is_told(self, query):
        with gateway_over() as (client, _):
            assert client.get(f"/v1/models?{query}")[0] == 400

    def test_one_model_with_its_slash_encoded_or_not(self):
        mine = ogx.Alias("mine", "all", "auto")
        with gateway_over(models=["a/b"], aliases=[mine]) as (client, _):
            for path in ("openai%2Fa%2Fb", "openai/a/b", "openai%2fa/b?x=1"):
                assert client.get(f"/v1/models/{path}")[2]["id"] == "openai/a/b"
            alias = client.get("/v1/models/mine")[2]
            assert (alias["id"], alias["custom_metadata"]["alias_of"]) == ("mine", "openai/a/b")
            assert client.get("/v1/models")[2]["data"][1]["id"] == "mine"
            assert client.get("/v1/models/claude-opus-9")[2]["id"] == "claude-opus-9"
            for path in ("nope", "openai/not-listed"):
                assert client.get(f"/v1/models/{path}")[0] == 404

    def test_the_list_tells_what_each_tier_means(self):
        with gateway_over(models=["a", "b"], tiers={"haiku": "openai/b"}) as (client, _):
            tiers = client.get("/v1/models")[2]["tiers"]
        assert tiers == {"haiku": "openai/b", **dict.fromkeys(("sonnet", "opus", "fable"),
                                                              "openai/a")}  # fmt: skip

    # -- sessions

    def test_a_session_counts_its_answers(self):
        main = {"x_claude_code_session_id": "s/1", "x_claude_code_request_class": "main"}
        title = {**main, "x_claude_code_request_class": "auxiliary"}
        other = {"x_claude_code_session_id": "s2"}
        broken = sse(delta("Hi"), {"error": {"message": "broke"}})
        answers = [said("a"), said("t"), said("b"), said("c"), (400, {"error": "no"}), broken]
        with gateway_over(*answers, models=["m", "n"]) as (client, _):
            for headers, model in ((title, "n"), (main, "m"), (main, "m"), (other, "n"),
                                   (main, "n")):  # fmt: skip
                client.post(request(model=f"openai/{model}"), **headers)
            status, _, one = client.get("/v1/sessions/s%2F1")
            assert (status, one) == (200, {
                "id": "s/1", "type": "session", "model": "openai/m", "requests": 3,
                "input_tokens": 90, "cache_read_input_tokens": 60, "output_tokens": 21,
                "cache_creation_input_tokens": 0, "context_tokens": 57,
                "max_input_tokens": None})  # fmt: skip
            assert client.get("/v1/sessions/s2")[2]["requests"] == 1
            status, _, unknown = client.get("/v1/sessions/%1b" + "x" * 300)
            assert status == 404 and "\x1b" not in unknown["error"]["message"]
            assert client.ask("DELETE", "/v1/sessions/s2")[0] == 405
            assert client.get("/v1/sessions/")[0] == client.get("/v1/sessions")[0] == 404

    def test_the_last_sessions_are_known(self):
        sessions = ogx.Sessions()
        for number in [*range(1000), 0, 1000]:
            exchange = ogx.Exchange("r", session=f"s{number}", usage=ogx.Usage(1))
            sessions.count(exchange)
        sessions.count(ogx.Exchange("r", session="failed"))
        assert sessions.entry("s0")["input_tokens"] == 2 and sessions.entry("s1000")
        for name in ("s1", "failed", ""):
            with pytest.raises(ogx.OgxError):
                sessions.entry(name)

    # -- discovery

    def test_a_provider_that_is_this_gateway_is_refused(self):
        with serving(discover=False) as client:
            url = f"http://127.0.0.1:{client.port}/v1"
            client.gateway.registry.adopt([provider("openai", url)])
            client.gateway.start()
            assert client.gateway.discovery.done.wait(5)
            problem = client.gateway.registry.problems["openai"]
            status, _, body = client.post(request())
        assert "a provider's base_url points back at ogx.py itself" in problem
        assert (status, "points back" in body["error"]["message"]) == (400, True)

    def test_a_page_instead_of_a_list_is_called_so(self):
        with FakeUpstream(models=(200, b"<html><title>Sign in</title></html>")) as fake:
            error = refused(ogx.Upstream().json, provider(url=fake.url), "/models", 5)
        assert error.message == (
            f"expected JSON from {fake.url}/models, got an HTML page: Sign in"
        )

    def test_a_request_that_comes_before_the_lists_waits_for_them(self):
        with gateway_over(discover=False) as (client, _):
            client.gateway.start()
            assert client.post(request(model="claude-opus-4"))[0] == 200

    # -- bedrock

    def test_bedrock_has_messages_for_claude_alone(self):
        with gateway_over(native_message(), said(), kind="bedrock") as (client, upstream):
            for upstream_id in ("us.anthropic.claude-sonnet-5", "openai.gpt-oss-120b"):
                assert client.post(request(model=f"bedrock/{upstream_id}"))[0] == 200
        assert [p for p, _ in upstream.heads] == ["/anthropic/v1/messages", "/v1/chat/completions"]

    @contextlib.contextmanager
    def signing(self, monkeypatch, *answers, **lists):
        """(client, upstream): a gateway over AWS's hosts, all behind one proxy."""
        for name, value in AWS_KEYS.items():
            monkeypatch.setenv(name, value)
        url = "http://bedrock-mantle.us-east-1.api.aws/v1"
        with FakeUpstream(*answers) as upstream:
            upstream.lists = lists
            monkeypatch.setenv("http_proxy", upstream.url[:-3])
            with serving(provider("bedrock", url, key=""), retries=1) as client:
                yield client, upstream

    PROFILES = {"inferenceProfileSummaries": [
        {"inferenceProfileId": i, "status": "ACTIVE", "type": "SYSTEM_DEFINED"} for i in (
            "us.anthropic.claude-opus-5-v1:0", "eu.anthropic.claude-opus-5", "us.meta.llama5-v1:0",
            "global.anthropic.claude-opus-5")]}  # fmt: skip

    def test_models_and_profiles_are_listed_by_signed_requests(self, aws, monkeypatch):
        models = {"data": [{"id": "anthropic.claude-opus-5"}, {"id": "openai.gpt-oss-120b"}]}
        versions = {"modelSummaries": [{"modelId": i} for i in (
            "openai.gpt-oss-120b-1:0", "meta.llama5-v1:0", "anthropic.claude-opus-5")]}
        lists = {"/models": (200, models), "profiles": (200, self.PROFILES),
                 "foundation": (200, versions)}  # fmt: skip
        with self.signing(monkeypatch, **lists) as (client, upstream):
            ids = [entry["id"] for entry in client.get("/v1/models")[2]["data"]]
        assert ids == ["bedrock/" + i for i in (
            "anthropic.claude-opus-5", "openai.gpt-oss-120b", "us.anthropic.claude-opus-5-v1:0",
            "eu.anthropic.claude-opus-5", "global.anthropic.claude-opus-5",
            "openai.gpt-oss-120b-1:0")]  # fmt: skip
        (models, head), (profiles, head2), (versions, _) = upstream.gets
        assert models == "http://bedrock-mantle.us-east-1.api.aws/v1/models"
        assert "/us-east-1/bedrock-mantle/aws4_request" in head["authorization"]
        assert profiles == ("http://bedrock.us-east-1.amazonaws.com/inference-profiles"
                            "?maxResults=1000&type=SYSTEM_DEFINED")  # fmt: skip
        assert versions == ("http://bedrock.us-east-1.amazonaws.com/foundation-models"
                            "?byInferenceType=ON_DEMAND&byOutputModality=TEXT")  # fmt: skip
        assert "/us-east-1/bedrock/aws4_request" in head2["authorization"]
        assert {h["x-amz-security-token"] for h in (head, head2)} == {"session-token-1234"}

    @pytest.mark.parametrize(("failing", "left"), [("/models", 3), ("profiles", 1)])
    def test_one_list_that_fails_leaves_the_other(self, aws, monkeypatch, failing, left):
        lists = {"/models": (200, {"data": [{"id": "anthropic.claude-opus-5"}]}),
                 "profiles": (200, self.PROFILES), "foundation": (403, {"message": "no"}),
                 failing: (403, {"message": "no"})}  # fmt: skip
        with self.signing(monkeypatch, **lists) as (client, _):
            assert len(client.get("/v1/models")[2]["data"]) == left
            assert client.gateway.registry.problems == {}

    def test_where_all_lists_fail_the_first_says_why(self, aws, monkeypatch):
        denied = (403, {"Message": "User: arn:aws:iam::1:user/x is not authorized"})
        with self.signing(monkeypatch, aws=denied) as (client, _):
            (problem,) = client.gateway.registry.problems.values()
        assert problem.startswith("User: arn:aws:iam::1:user/x is not authorized (from http://")

    def test_a_request_goes_to_the_server_that_has_the_model(self, aws, monkeypatch):
        answers = (native_message(), native_message(), said(), said(), {"input_tokens": 7})
        ids = ("anthropic.claude-opus-5", "us.anthropic.claude-opus-5", "openai.gpt-oss-120b",
               "openai.gpt-oss-120b-1:0")  # fmt: skip
        with self.signing(monkeypatch, *answers) as (client, upstream):
            for upstream_id in ids:
                assert client.post(request(model=f"bedrock/{upstream_id}"))[0] == 200
            body = {"model": f"bedrock/{ids[0]}", "messages": [user("x")]}
            assert client.post(body, "/v1/messages/count_tokens")[2]["input_tokens"] == 7
        assert [path for path, _ in upstream.heads] == [
            "http://bedrock-mantle.us-east-1.api.aws/anthropic/v1/messages",
            "http://bedrock-runtime.us-east-1.amazonaws.com/anthropic/v1/messages",
            "http://bedrock-mantle.us-east-1.api.aws/v1/chat/completions",
            "http://bedrock-runtime.us-east-1.amazonaws.com/openai/v1/chat/completions",
            "http://bedrock-mantle.us-east-1.api.aws/anthropic/v1/messages/count_tokens"]
        assert [body["model"] for body in upstream.seen] == [*ids, ids[0]]
        for _, head in upstream.heads:
            assert head["authorization"].startswith("aws4-hmac-sha256 credential=akidexample/")
            assert head["anthropic-version"] == "2023-06-01" and "x-api-key" not in head

    def test_a_retry_is_signed_anew(self, aws, monkeypatch):
        with self.signing(monkeypatch, (500, {"message": "x"}), said()) as (client, upstream):
            times = iter(range(1_790_000_000, 1_790_000_009))
            client.gateway.upstream.signer = ogx.Signer(lambda: next(times))
            assert client.post(request(model="bedrock/openai.gpt-oss-120b"))[0] == 200
        first, second = (head for _, head in upstream.heads)
        assert first["x-amz-date"] == "20260921t141320z" != second["x-amz-date"]
        assert first["authorization"] != second["authorization"]

    def test_claude_that_is_not_there_is_told_at_once(self, aws, monkeypatch):
        missing = (404, {"message": "Not Found"})
        with self.signing(monkeypatch, *[missing] * 5) as (client, upstream):
            status, _, body = client.post(request(model="bedrock/anthropic.claude-opus-9"))
        assert (status, len(upstream.seen)) == (404, 1)
        assert body["error"]["message"].startswith("Not Found (from bedrock, model anthropic.")

    def test_a_key_goes_before_a_signature(self, aws, monkeypatch):
        with self.signing(monkeypatch, said()) as (client, upstream):
            client.gateway.registry.providers["bedrock"] = provider(
                "bedrock", "http://bedrock-mantle.us-east-1.api.aws/v1", key="bearer-key-12")
            assert client.post(request(model="bedrock/openai.gpt-oss-120b"))[0] == 200
        head = upstream.heads[0][1]
        assert head["authorization"] == "bearer bearer-key-12" and "x-amz-date" not in head

    def test_a_model_at_another_route_and_api_is_found(self, aws, monkeypatch):
        answers = ((400, {"error": {"message": "model `openai.gpt-5.5` isn't supported on this "
                                               "route"}}),
                   (400, {"error": {"message": "The model 'openai.gpt-5.5' does not support the "
                                               "'/v1/chat/completions' API."}}),
                   *[sse(piece("output_text", 0, "Hi."), completed(), done=False)] * 2)
        with self.signing(monkeypatch, *answers) as (client, upstream):
            for _ in "ab":
                message = client.post(request(model="bedrock/openai.gpt-5.5"))[2]
                assert message["content"][0]["text"] == "Hi."
        paths = [path.partition(".api.aws")[2] for path, _ in upstream.heads]
        assert paths == ["/v1/chat/completions", "/openai/v1/chat/completions",
                         *["/openai/v1/responses"] * 2]  # fmt: skip

    @cases(
        ("refusal", "status", "error_type", "words"),
        [
            ((403, {"message": "The security token included in the request is expired"}), 401,
             "authentication_error", "is expired (from bedrock, model "),
            ((403, {"message": "Signature expired: 20260101T000000Z is now earlier than "
                               "20260101T001000Z (20260101T001500Z - 5 min.)"}), 401,
             "authentication_error", "; check the clock where ogx.py runs"),
            ((403, {"Message": "User: x is not authorized to perform: bedrock:InvokeModel"}), 403,
             "permission_error", "User: x is not authorized to perform: bedrock:InvokeModel"),
            ((429, {"message": "Too many tokens, please wait before trying again.",
                    "__type": "ThrottlingException"}, {"retry-after": "30"}), 429,
             "rate_limit_error", "Too many tokens, please wait before trying again."),
            ((400, {"message": "The provided model identifier is invalid."}), 400,
             "invalid_request_error", "The provided model identifier is invalid."),
            ((503, {"message": "Bedrock is unable to process your request.",
                    "__type": "ServiceUnavailableException"}, {"retry-after": "30"}), 503,
             "api_error", "Bedrock is unable to process your request."),
            ((403, {"message": "The request signature we calculated does not match. The Canonical "
                               "String should have been 'x-amz-security-token:session-token-1234 "
                               f"{AWS_KEYS['AWS_SECRET_ACCESS_KEY']}'"}), 401,
             "authentication_error", "'x-amz-security-token:*** ***'"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("upstream_id", ["us.anthropic.claude-opus-5", "openai.gpt-oss-120b"])
    def test_awss_own_words_with_the_right_type(self, aws, monkeypatch, caplog, refusal, status,
                                                error_type, words, upstream_id):  # fmt: skip
        with self.signing(monkeypatch, refusal) as (client, _), caplog.at_level("DEBUG"):
            got, _, body = client.post(request(model=f"bedrock/{upstream_id}"))
        assert (got, body["error"]["type"]) == (status, error_type)
        assert words in body["error"]["message"]
        for secret in ("session-token-1234", AWS_KEYS["AWS_SECRET_ACCESS_KEY"]):
            assert secret not in json.dumps(body) + caplog.text

    def test_an_error_inside_a_stream_has_awss_words_too(self, aws, monkeypatch):
        words = "Too many tokens, x-amz-security-token:session-token-1234"
        inner = {"type": "error", "error": {"type": "rate_limit_error", "message": words}}
        begun = native_stream().partition(b"event: content_block_stop")[0]
        native = begun + b"event: error\ndata: " + json.dumps(inner).encode() + b"\n\n"
        chat = sse(delta(content="Hel"), {"error": {"message": words, "code": 429}}, done=False)
        bare = sse(delta(content="Hel"), {"__type": "ThrottlingException", "message": words})
        with self.signing(monkeypatch, native, chat, bare) as (client, _):
            for upstream_id in ("us.anthropic.claude-opus-5", *["openai.gpt-oss-120b"] * 2):
                body = request(model=f"bedrock/{upstream_id}", stream=True)
                (event,) = [e for e in read_events(client.post(body)[2]) if e["type"] == "error"]
                assert event["error"]["type"] == "rate_limit_error"
                assert "Too many tokens, x-amz-security-token:***" in event["error"]["message"]

    def test_without_credentials_or_region_the_error_says_what_to_set(self, aws, monkeypatch):
        with self.signing(monkeypatch) as (client, upstream):
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
            client.gateway.upstream.signer = ogx.Signer()
            status, _, body = client.post(request(model="bedrock/openai.gpt-oss-120b"))
            assert (status, body["error"]["type"]) == (401, "authentication_error")
            assert body["error"]["message"].startswith("Unable to locate credentials")
            assert upstream.seen == []
        for key in ("", "bearer-key-12"):
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
            nowhere = provider("bedrock", "https://bedrock-mantle..api.aws/v1", key=key)
            with serving(nowhere, discover=False) as client:
                status, _, body = client.post(request(model="bedrock/x"))
            assert (status, body["error"]["type"]) == (400, "invalid_request_error")
            assert "You must specify a region" in body["error"]["message"]

    # -- bounds

    MOST = 1_000  # entries of any container

    def containers(self, *roots, passed_over=()):
        """(name, size) of every container that can be reached from objects of ogx.py."""
        plain, seen = (dict, list, tuple, set, frozenset), set()
        waiting = [(type(root).__name__, root) for root in roots]
        while waiting:
            name, node = waiting.pop()
            if id(node) in seen or isinstance(node, passed_over):
                continue
            seen.add(id(node))
            if isinstance(node, (*plain, collections.deque, weakref.WeakSet)):
                yield name, len(node)
                inner = [*node, *node.values()] if isinstance(node, dict) else list(node)
                waiting += [(f"{name}[]", value) for value in inner]
            if type(node).__module__ == ogx.__name__:
                fields = dict(getattr(node, "__dict__", {}))
                waiting += [(f"{name}.{key}", value) for key, value in fields.items()]

    def assert_bounded(self, client, most=MOST):
        kept = (ogx.Store, ogx.Lessons, ogx.Ratios)  # with bounds of their own
        server, gateway = client.server, client.gateway
        roots = (gateway, gateway.registry, gateway.upstream, server, server.loop)
        of_the_file = [v for v in vars(ogx).values() if isinstance(v, (list, tuple, dict))]
        sizes = list(self.containers(*roots, of_the_file, passed_over=kept))
        found = {name.rpartition(".")[2] for name, _ in sizes}
        assert {"_cooling", "uncounted_urls", "_tls", "running"} <= found
        assert [(name, size) for name, size in sizes if size > most] == []
        caches = [value for value in vars(ogx).values() if hasattr(value, "cache_info")]
        assert caches and all(0 < (c.cache_info().maxsize or 0) <= 1 << 16 for c in caches)

    def test_10_000_made_up_ids_hosts_sessions_and_tokens_leave_nothing(self, caplog):
        caplog.set_level("ERROR", "ogx")  # each line would be kept

        def answer_all(fake, connection):
            answer = json.dumps({"choices": [{"message": {"content": "a"},
                                              "finish_reason": "stop"}]}).encode()  # fmt: skip
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer)
            data = b"."
            while data:
                connection.sendall(head + answer)
                data = connection.recv(1 << 16)

        with gateway_over(answer_all) as (client, _), socket.create_connection(
            ("127.0.0.1", client.port), timeout=60
        ) as sock:
            reader = sock.makefile("rb")
            for first in range(0, 10_000, 100):
                sock.sendall(b"".join(map(self.made_up, range(first, first + 100))))
                for _ in range(100):
                    assert reader.readline().split()[1] == b"200"
                    head = dict(iter(lambda: reader.readline().strip().partition(b": ")[::2],
                                     (b"", b"")))  # fmt: skip
                    reader.read(int(head[b"content-length"]))
            self.assert_bounded(client)

    @staticmethod
    def made_up(n):
        data = json.dumps(request(f"prompt {n}", model=f"openai/m{n}", metadata={
            "user_id": json.dumps({"session_id": f"s{n}"})})).encode()  # fmt: skip
        path = "/v1/messages" if n % 5 == 0 else "/v1/messages/count_tokens"  # which is quicker
        return (f"POST {path}?n={n} HTTP/1.1\r\nhost: 127.{n >> 8}.{n & 255}.1\r\n"
                f"authorization: Bearer t{n}\r\nx-claude-code-session-id: s{n}\r\n"
                f"content-length: {len(data)}\r\n\r\n").encode() + data  # fmt: skip

    def test_targets_that_cool_down_are_forgotten_the_oldest_first(self):
        busy = (503, {"error": {"message": "busy"}})
        targets = tuple(f"openai/m{n}" for n in range(ogx.MAX_COOLING + 9))
        chain = ogx.Alias("best", "all", targets[0], targets)
        with gateway_over(*[busy] * len(targets), aliases=[chain]) as (client, _):
            assert client.post(request(model="best"))[0] == 503
            assert tuple(client.gateway._cooling) == targets[-ogx.MAX_COOLING :]


def flood(head, piece, times, end=b""):
    """A fake upstream's answer of many equal pieces."""
    def answer(fake, connection):
        with contextlib.suppress(OSError):
            connection.sendall(head)
            for _ in range(times):
                connection.sendall(piece)
            connection.sendall(end)

    return answer


class TestServer:
    HEAD = b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n"

    def stream_of(self, client, body=None):
        """A connection on which a stream was asked for."""
        sock = socket.create_connection(("127.0.0.1", client.port), timeout=20)
        data = json.dumps(body or request(stream=True)).encode()
        sock.sendall(b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n"
                     b"content-length: %d\r\n\r\n%b" % (len(data), data))  # fmt: skip
        return sock

    # -- routes

    def test_every_path_carries_request_id_and_version(self):
        with gateway_over() as (client, _):
            for method, path, status in (
                ("GET", "/", 200), ("HEAD", "/", 200), ("HEAD", "/api/hello", 200),
                ("GET", "/v1/health", 200), ("GET", "/v1/models", 200), ("GET", "/nope", 404),
                ("PUT", "/v1/models", 405), ("OPTIONS", "/v1/messages", 405),
                ("GET", "/v1/messages", 405), ("HEAD", "/v1/models", 200),
            ):  # fmt: skip
                got, headers, body = client.ask(method, path)
                assert got == status, (method, path)
                assert re.fullmatch("req_[0-9a-f]{24}", headers["request-id"])
                assert headers["anthropic-version"] == "2023-06-01"
                if got >= 400:
                    assert body["type"] == "error" and body["request_id"] == headers["request-id"]
                if method == "HEAD":
                    assert body == b""
            assert client.ask("PUT", "/v1/models")[1]["allow"] == "GET, POST, HEAD"

    @pytest.mark.parametrize(
        ("path", "status", "words"),
        [
            ("/v1/v1/messages", 404, "the base URL should end without /v1"),
            ("/v1/messages/batches", 404, "batches, files and skills are not served"),
            ("/v1/messages/batches/msgbatch_1/cancel", 404, "batches, files and skills are not"),
            ("/v1/files", 404, "batches, files and skills are not served"),
            ("/v1/skills?beta=true", 404, "batches, files and skills are not served"),
            ("/v1/complete", 404, "/v1/complete not found; ogx.py serves /v1/messages"),
        ],
    )
    def test_what_is_not_served_says_what_is(self, path, status, words):
        with gateway_over() as (client, _):
            got, _, body = client.post(request(), path)
        assert got == status and words in body["error"]["message"]

    def test_paths_match_without_their_query_and_with_any_beta(self):
        with gateway_over() as (client, _):
            for path in ("/v1/messages?beta=true", "//v1/messages", "http://localhost/v1/messages"):
                headers = {"anthropic_beta": "brand-new-2030-01-01", "anthropic_version": "2030"}
                assert client.post(request(), path, **headers)[0] == 200

    @pytest.mark.parametrize(
        ("path", "status", "words"),
        [
            ("//v1//messages", 200, ""), ("/v1/messages/", 404, "write it as /v1/messages"),
            ("/v1/./messages", 404, "write it as /v1/messages"),
            ("/x/../v1/messages", 404, "write it as /v1/messages"),
            ("/v1/%6dessages", 404, "write it as /v1/messages"),
            ("/v1%2fmessages", 404, "write it as /v1/messages"),
            ("http://localhost/v1/messages", 200, ""),
            ("http://localhost//v1/messages", 404, "write it as /v1/messages"),
            ("http://localhost/v1/%6dessages", 404, "write it as /v1/messages"),
            ("/V1/messages", 404, "ogx.py serves"),
        ],
    )  # fmt: skip
    def test_paths_are_what_they_say(self, path, status, words):
        with gateway_over() as (client, _):
            got, _, body = client.post(request(), path)
        assert got == status and words in json.dumps(body)

    def test_no_request_reaches_a_url_outside_the_configuration(self):
        with socket.create_server(("127.0.0.1", 0)) as other:
            other.setblocking(False)
            url = f"http://127.0.0.1:{other.getsockname()[1]}"
            source = {"type": "url", "url": f"{url}/a.png"}
            body = request(user(text("see"), {"type": "image", "source": source},
                                {"type": "document", "source": source}))  # fmt: skip
            with gateway_over((307, b"", {"location": f"{url}/v1/chat/completions"})) as (
                client, upstream,
            ):  # fmt: skip
                assert client.post(body)[0] == 502  # a redirect isn't followed
                headers = {"x_forwarded_host": "127.0.0.1", "forwarded": f"host={url}"}
                assert client.post(body, f"{url}/v1/messages", **headers)[0] == 200
                alias = {"model_id": "a", "provider_id": "openai", "provider_model_id": "gpt-x",
                         "config": {"base_url": url}, "base_url": url}  # fmt: skip
                client.post(alias, "/v1/models")
                assert client.post(request(model=url))[0] == 404
            assert f"{url}/a.png" in json.dumps(upstream.seen)  # handed on as it is
            with pytest.raises(BlockingIOError):
                other.accept()

    def test_hop_by_hop_and_other_client_headers_are_not_forwarded(self):
        with gateway_over(native_message(), native_message(), kind="anthropic", native=True) as (
            client, upstream,
        ):  # fmt: skip
            body = request(model="anthropic/gpt-x")
            client.post(body, anthropic_beta="one", cookie="a=b", te="x", x_odd="y")
            client.post(body, anthropic_beta="one", connection="Anthropic-Beta, keep-alive")
        (_, first), (_, second) = upstream.heads
        assert first["anthropic-beta"] == "one" and "anthropic-beta" not in second
        assert not {"cookie", "te", "x-odd", "connection", "keep-alive"} & {*first, *second}

    def test_a_clients_credentials_never_reach_an_upstream(self):
        with gateway_over() as (client, upstream):
            client.post(request(), authorization="Bearer client-secret", x_api_key="client-secret")
        assert "client-secret" not in json.dumps([upstream.heads, upstream.seen])

    def test_two_gateways_in_one_process(self):
        with gateway_over(models=["a"]) as (one, _), gateway_over(models=["b"]) as (two, _):
            assert one.get("/v1/models")[2]["first_id"] == "openai/a"
            assert two.get("/v1/models")[2]["first_id"] == "openai/b"

    # -- connection

    def test_no_cache_on_the_way_keeps_a_stream(self):
        with gateway_over() as (client, _):
            _, headers, _ = client.post(request(stream=True))
        assert (headers["content-type"], headers["cache-control"]) == (
            "text/event-stream", "no-cache")

    def test_keep_alive_outlives_a_stream_and_an_error(self):
        with gateway_over() as (client, _):
            client.get("/")
            first = client.connection.sock
            for body in (request(stream=True), request(max_tokens=0), request()):
                client.post(body)
                assert client.connection.sock is first

    def test_an_http_1_0_client_gets_a_stream_that_ends_with_the_connection(self):
        body = json.dumps(request(stream=True)).encode()
        head = f"POST /v1/messages HTTP/1.0\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        with gateway_over() as (client, _):
            answer = client.raw(head + body)
        head, _, data = answer.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head and b"connection: close" in head
        check_grammar(read_events(data))

    def test_pipelined_requests_are_answered_in_order(self):
        one = b"GET /v1/health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        last = b"GET /nope HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        with gateway_over() as (client, _):
            answer = client.raw(one + last)
        assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"404"]

    def test_a_request_pipelined_during_a_stream_is_answered_after_it(self):
        def slow(fake, connection):
            begin_stream(connection)
            send_chunk(connection, sse(delta(content="Hello"), done=False))
            fake.client_left.wait(20)
            send_chunk(connection, sse(delta("stop")))
            connection.sendall(b"0\r\n\r\n")

        with gateway_over(slow) as (client, upstream), self.stream_of(client) as sock:
            read_until(sock, b"Hello")
            sock.sendall(b"GET /v1/health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            time.sleep(0.05)
            upstream.client_left.set()
            rest = read_until(sock, b'"status"')
            assert rest.index(b"message_stop") < rest.index(b'"status"')

    def test_expect_100_continue(self):
        body = json.dumps(request()).encode()
        head = f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n" \
               f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"  # fmt: skip
        with gateway_over() as (client, _):
            answer = client.raw(head.encode() + body)
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")

    @pytest.mark.parametrize(
        ("host", "port", "words"),
        [("127.0.0.1", None, "is in use; choose another with --port"),
         ("203.0.113.7", 0, "can't listen on 203.0.113.7: it is no address of this machine"),
         ("no such host", 0, "can't listen on no such host: it is no address")],
    )  # fmt: skip
    def test_where_it_cannot_listen_it_says_why(self, host, port, words):
        gateway = ogx.Gateway(config())
        with ogx.Server(gateway, "127.0.0.1", 0) as taken:
            port = taken.server_port if port is None else port
            error = refused(ogx.Server, gateway, host, port)
        assert words in error.message and "\n" not in error.message

    def test_a_privileged_port_is_called_so(self):
        error = PermissionError(13, "Permission denied")
        assert ogx.listen_problem(error, "127.0.0.1", 80) == (
            "no permission to listen on port 80; ports below 1024 are privileged"
        )

    def test_ipv6_loopback(self):
        gateway = ogx.Gateway(config(ogx.DEMO_PROVIDER))
        server = ogx.Server(gateway, "::1", 0)
        server.start()
        try:
            assert server.url == f"http://[::1]:{server.server_port}"
            connection = http.client.HTTPConnection("::1", server.server_port, timeout=5)
            connection.request("GET", "/v1/health")
            assert connection.getresponse().status == 200
            connection.close()
        finally:
            server.stop()

    def test_starting_asks_no_dns(self, monkeypatch):
        def no_dns(*args):
            raise AssertionError("a reverse lookup stalls where no resolver answers")

        monkeypatch.setattr(socket, "getfqdn", no_dns)
        with gateway_over() as (client, _):
            assert client.get("/v1/health")[0] == 200

    # -- framing

    def test_a_chunked_and_a_gzip_body_are_read(self):
        body = gzip.compress(json.dumps(request()).encode())
        cut = len(body) // 2
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (body[:cut], body[cut:], b""))
        head = b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n" \
               b"content-encoding: gzip\r\n\r\n"  # fmt: skip
        last = b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        with gateway_over() as (client, _):
            answer = client.raw(head + chunks + last)
        assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"200"]

    @cases(
        ("body", "words"),
        [
            (b"", "the request has no body"),
            (b"{", "the request's body is not JSON: Expecting property name"),
            (b"\xff\xfe{}", "the request's body is not"),
            (b"[" * 100_000, "nested too deeply"),
            (b"[]", "expected a JSON object, got a list"),
            (b'"x"', "expected a JSON object, got a string"),
            (b"9" * 5000, "the request"),
            (b'{"temperature": NaN}', "NaN is no number of JSON"),
            (b'{"temperature": -Infinity}', "-Infinity is no number of JSON"),
            (b'{"temperature": 1e999}', "1e999 is no number of JSON"),
            (b'{"model": "m\xff"}', "the request's body is not UTF-8"),
        ],
    )
    def test_bad_json_is_a_400_and_never_a_trace(self, body, words, caplog):
        with gateway_over() as (client, _):
            status, _, answer = client.post(body)
            assert client.post(request())[0] == 200
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert words in answer["error"]["message"] and not caplog.records

    def test_huge_numbers_lone_surrogates_and_duplicate_keys_are_served_or_refused(self, caplog):
        huge = '{"max_tokens": 1%s, "model": "openai/gpt-x", "messages": [' % ("0" * 400)
        bodies = (
            huge + '{"role": "user", "content": "x"}]}',
            json.dumps(request("a \ud800 b")),
            json.dumps(request(model="openai/gpt-\ud800")),
            json.dumps(request()).replace('"model":', '"model": "openai/none", "model":'),
        )
        for kind in ("openai", "anthropic"):
            for body in bodies:
                named = body.replace("openai/", f"{kind}/").encode()
                with gateway_over(kind=kind, native=True) as (client, upstream):
                    assert client.post(named)[0] in (200, 400, 404, 502), body[:80]
                    assert client.get("/v1/health")[0] == 200
                    for raw in upstream.raw:
                        assert raw.count(b'"model"') == 1 and b"none" not in raw
        assert "Traceback" not in caplog.text

    def test_a_truncated_body_is_no_request(self):
        with gateway_over() as (client, upstream):
            head = self.HEAD + b"content-length: 999\r\n\r\n"
            assert client.raw(head + json.dumps(request()).encode(), shut=True) == b""
            assert client.get("/v1/health")[0] == 200
        assert upstream.seen == []

    def test_what_is_nested_too_deeply_anywhere_is_a_400(self):
        deep = json.loads("[" * 700 + "]" * 700)
        for body in (request(assistant([call("a", x=deep)])), request(tools=[tool(x=deep)])):
            with gateway_over() as (client, _):
                status = client.post(body)[0]
                assert status in (200, 400) and client.get("/")[0] == 200

    def test_what_a_gzip_body_may_not_be(self):
        with gateway_over() as (client, _):
            for data, coding, status in ((b"plain", "gzip", 400), (gzip.compress(b"{}")[:-4],
                                         "gzip", 400), (b"x", "br", 415)):  # fmt: skip
                assert client.post(data, content_encoding=coding)[0] == status
            bomb = gzip.compress(b" " * (32 * 1024 * 1024 + 1))
            assert client.post(bomb, content_encoding="gzip")[0] == 413

    @cases(
        "head",
        [
            "POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked",
            "POST / HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6",
            "POST / HTTP/1.1\r\ncontent-length: +5",
            "POST / HTTP/1.1\r\ntransfer-encoding: gzip, chunked",
            "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0x5",
            "GET / HTTP/1.1\r\nx: a\r\n folded",
            "GET / HTTP/1.1\r\nx: a\x00b",
            "GET / HTTP/1.1\r\nno colon",
            "GET / HTTP/2.0",
            "GET /a b HTTP/1.1",
            "get / HTTP/1.1",
            "nonsense",
            "\x16\x03\x01\x02",
        ],
    )
    def test_request_smuggling_is_a_400_and_ends_the_connection(self, head):
        second = "GET /v1/health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        with gateway_over() as (client, _):
            answer = client.raw(f"{head}\r\n\r\n{second}".encode())
        assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"400"]
        assert b"connection: close" in answer and b'"type":"error"' in answer

    @cases(
        ("head", "body", "answers"),
        [
            ("{head}content-length: {length}", "{body}", [b"200", b"200"]),
            ("Content-Length:{length}\r\nhost: localhost", "{body} ", [b"200", b"200"]),
            ("{head}x: y\r\ncontent-length: {length}", "{body}", [b"200", b"200"]),
            ("{head}transfer-encoding: chunked", "{size:x}\r\n{body}\r\n0\r\n\r\n",
             [b"200", b"200"]),
            ("{head}x: y", "", [b"200", b"400"]),
            ("{head}content-length: +5", "{body}", [b"200", b"400"]),
            ("{head}content-length: {length}\r\ncontent-length: {length}", "{body}",
             [b"200", b"400"]),
            ("{head}content-length: {length}\r\ntransfer-encoding: chunked", "{body}",
             [b"200", b"400"]),
            ("{head}content-length: {length}\r\n 1", "{body}", [b"200", b"400"]),
            ("{head}content-length: 0000000000000000{length}", "{body}", [b"200", b"400"]),
            ("{head}content-length: ", "", [b"200", b"400"]),
            ("{head}content-length: {length} ", "{body}", [b"200", b"200"]),
            ("{head}content-length: {longer}\r\ncontent-length: {length} ", "{body} ",
             [b"200", b"400"]),
            ("{head}content-length: {length}\r\norigin: http://evil.example", "{body}",
             [b"200", b"403"]),
        ],
    )  # fmt: skip
    def test_a_cached_head_is_the_same_but_for_its_length(self, head, body, answers):
        lines, first = "host: localhost\r\n", json.dumps(request())
        line = "POST /v1/messages HTTP/1.1\r\n"
        words = json.dumps(request(user("Another length.")))
        length = len(body.format(body=words, size=0))
        fields = {"head": lines, "body": words, "size": len(words), "length": length,
                  "longer": length + 1}  # fmt: skip
        second = f"{line}{head.format(**fields)}\r\nx-last: 1\r\n\r\n{body.format(**fields)}"
        with gateway_over() as (client, upstream):
            got = client.raw(
                f"{line}{lines}content-length: {len(first)}\r\nx-last: 1\r\n\r\n{first}"
                f"{second}{line}connection: close\r\n\r\n".encode())  # fmt: skip
        assert re.findall(rb"HTTP/1\.1 (\d+)", got)[:2] == answers
        assert len(upstream.seen) == answers.count(b"200")
        if len(upstream.seen) == 2:
            assert upstream.seen[1]["messages"][-1]["content"] == "Another length."

    def test_a_cached_head_keeps_no_content_length(self):
        head = "GET /v1/health HTTP/1.1\r\nhost: localhost\r\n"
        with gateway_over() as (client, _):
            got = client.raw(
                f"{head}content-length: 3\r\n\r\nabc{head}\r\n{head}\r\n"
                f"{head}content-length: 2\r\n\r\nab{head}connection: close\r\n\r\n".encode()
            )
        assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"200"] * 5

    @pytest.mark.parametrize("space", ["", " ", "\t", " \t"], ids=["none", "one", "tab", "two"])
    def test_a_cached_head_may_have_space_after_its_length(self, space):
        body = json.dumps(request(user("DELETE /v1/models/x HTTP/1.1")))
        head = "POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n" \
               f"content-length: {len(body)}{space}\r\n\r\n"  # fmt: skip
        with gateway_over() as (client, upstream):
            last = "GET /v1/health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
            got = client.raw((2 * (head + body) + last).encode("latin-1"))
        assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"200"] * 3 and len(upstream.seen) == 2

    @cases(("field", "status"), [("x-api-key: guess", b"401"),
                                                   ("origin: http://evil", b"403")])  # fmt: skip
    @cases("again", [
        "{head}\r\n\r\n", "{head}\r\n{length}\r\n\r\n{body}", "\n{length}\r\n\r\n{body}",
        "{length}\r\n\r\n{body}", "\r\n{head}\r\n{length}\r\n\r\n{body}"])  # fmt: skip
    def test_a_refused_head_is_refused_again_from_the_cache(self, field, status, again):
        head = f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n{field}"
        body = json.dumps(request())
        second = again.format(head=head, body=body, length=f"content-length: {len(body)}")
        with gateway_over() as (client, upstream):
            ask_for_token(client.server, "s3cret" if status == b"401" else "")
            got = client.raw(f"{head}\r\n\r\n{second}".encode(), shut=True)
        first, second = re.findall(rb"HTTP/1\.1 (\d+)", got)
        assert first == status and second in (status, b"400") and not upstream.seen

    @pytest.mark.parametrize("together", [True, False])
    def test_empty_lines_before_a_request_are_passed_over(self, together):
        head = b"GET /v1/health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        with gateway_over() as (client, _), socket.create_connection(
            ("127.0.0.1", client.port), timeout=5
        ) as sock:
            sock.sendall(b"\r\n" + head + (b"\r\n\n" + head if together else b""))
            if not together:
                assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
                sock.sendall(b"\r\n\n" + head)
            sock.shutdown(socket.SHUT_WR)
            got = b"".join(iter(lambda: sock.recv(65536), b""))
        assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"200"] * (2 if together else 1)

    def test_a_head_that_comes_byte_by_byte_is_read(self):
        head = b"\r\nGET /v1/health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        with gateway_over() as (client, _):
            address = ("127.0.0.1", client.port)
            with socket.create_connection(address, timeout=10) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for byte in head:
                    sock.sendall(bytes([byte]))
                answer = b"".join(iter(lambda: sock.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200 ")

    def test_only_spaces_and_tabs_surround_a_value(self):
        read = ogx.headers_from_bytes("a: \t b c\t \r\nb:\xa0x\x85\r\na:d".encode("latin-1"))
        assert read == {"a": "b c, d", "b": "\xa0x\x85"}
        with gateway_over() as (client, _):
            ask_for_token(client.server, "s3cret")
            for field in ("x-api-key: s3cret\xa0", "x-api-key:\x85s3cret"):
                head = f"GET / HTTP/1.1\r\nhost: localhost\r\n{field}\r\n\r\n".encode("latin-1")
                assert client.raw(head, shut=True).startswith(b"HTTP/1.1 401 ")

    @cases("line", ["content-length: 5\xa0", "transfer-encoding: chunked\xa0",
                                      "transfer-encoding:\x85chunked"])  # fmt: skip
    def test_other_white_space_is_part_of_a_length(self, line):
        head = f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n{line}\r\n\r\n"
        with gateway_over() as (client, _):
            answer = client.raw(head.encode("latin-1") + b"hello", shut=True)
        assert answer.startswith(b"HTTP/1.1 400 ")

    # -- guard

    @cases(
        ("line", "status"),
        [
            ("", 400), ("host: localhost\r\nhost: localhost", 400), ("host: a, b", 400),
            ("host: localhost\r\nHOST: evil.example", 400), ("host: localhost", 200),
            ("host:", 200),
        ],
    )  # fmt: skip
    def test_a_request_has_one_host(self, line, status):
        with gateway_over() as (client, _):
            head = f"GET / HTTP/1.1\r\n{line}\r\nconnection: close\r\n\r\n"
            answer = client.raw(head.replace("\r\n\r\nc", "\r\nc").encode())
            old = client.raw(b"GET / HTTP/1.0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status) and old.startswith(b"HTTP/1.1 200 ")

    @cases(
        ("headers", "status"),
        [
            ({"host": "localhost:1"}, 200),
            ({"host": "127.0.0.1"}, 200),
            ({"host": "[::1]:8321"}, 200),
            ({"host": "evil.example"}, 403),
            ({"host": "127.0.0.1.evil.example"}, 403),
            ({"host": "localhost:1", "origin": "http://localhost:1"}, 200),
            ({"host": "localhost:1", "origin": "http://evil.example"}, 403),
            ({"host": "localhost:1", "origin": "null"}, 403),
            ({"host": "localhost", "content-type": "text/plain"}, 415),
            ({"host": "localhost", "content-type": "application/x-www-form-urlencoded"}, 415),
            ({"host": "localhost", "content-type": "application/json; charset=utf-8"}, 200),
            ({"host": "localhost", "content-type": "Application/JSON"}, 200),
            ({"host": "localhost", "content-type": "text/json"}, 415),
            ({"host": "localhost", "content-type": "multipart/form-data; boundary=x"}, 415),
            ({"host": "localhost", "content-type": "x"}, 415),
            ({"host": "localhost", "sec-fetch-site": "cross-site"}, 403),
            ({"host": "localhost", "sec-fetch-site": "cross-site",
              "sec-fetch-mode": "navigate"}, 403),
            ({"host": "localhost", "sec-fetch-site": "same-site"}, 403),
            ({"host": "localhost", "sec-fetch-site": "none"}, 200),
            ({"host": "localhost", "sec-fetch-site": "same-origin"}, 200),
        ],
    )  # fmt: skip
    def test_cross_site_requests_and_dns_rebinding_are_refused(self, headers, status):
        with gateway_over() as (client, upstream):
            got, answer_headers, _ = client.ask("POST", "/v1/messages", request(), **headers)
        assert got == status and len(upstream.seen) == (status == 200)
        assert not [name for name in answer_headers if name.startswith("access-control")]

    @pytest.mark.parametrize(
        ("method", "path", "mode", "status"),
        [
            ("GET", "/v1/models", "no-cors", 403), ("GET", "/", "no-cors", 403),
            ("GET", "/", "navigate", 200), ("GET", "/v1/health", "navigate", 403),
            ("GET", "/v1/models/%1b%5d0;x%07", "no-cors", 403), ("HEAD", "/", "cors", 403),
            ("DELETE", "/v1/models/x", "cors", 403),
        ],
    )
    def test_cross_site_pages_embed_and_load_nothing(self, method, path, mode, status):
        with gateway_over() as (client, _):
            fetched = {"sec_fetch_site": "cross-site", "sec_fetch_mode": mode}
            assert client.ask(method, path, **fetched)[0] == status

    @pytest.mark.parametrize("path", ["/v1/files?beta=true", "/v1/messages/batches", "/v1/skills",
                                      "/v1/files/file_1/content"])  # fmt: skip
    @pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/json",
                                      "application/x-www-form-urlencoded"])  # fmt: skip
    def test_an_upload_is_refused_by_its_path(self, path, kind):
        with gateway_over() as (client, _):
            status, _, body = client.post(b"--x\r\n", path, content_type=kind)
            assert status == 404 and "are not served by ogx.py" in body["error"]["message"]
            assert client.post(request())[0] == 200

    @pytest.mark.parametrize("path", ["/v1/messages", "/v1/models", "//v1/messages"])
    def test_a_form_for_another_path_is_refused_by_its_type(self, path):
        with gateway_over() as (client, _):
            assert client.post(b"--x\r\n", path, content_type="multipart/form-data")[0] == 415

    def test_an_upload_with_a_wrong_token_is_refused(self):
        server = ogx.Server(ogx.Gateway(config(ogx.DEMO_PROVIDER)), "127.0.0.1", 0, "s3cret")
        server.start(poll=0.01)
        try:
            for token, status in (("no", 401), ("s3cret", 404)):
                client = Client(server)
                asked = client.post(b"x", "/v1/files", x_api_key=token,
                                    content_type="multipart/form-data")  # fmt: skip
                client.connection.close()
                assert asked[0] == status
        finally:
            server.stop()

    def test_bound_to_another_address_only_addresses_and_configured_names_may_come_in(self):
        def knows(host, bound, names=()):
            return ogx.Guard(bound, "http", names=names).knows_host(host)

        assert knows("192.168.1.5:8321", "0.0.0.0")
        assert knows("[fe80::1]:8321", "::")
        assert knows("gpu-box:8321", "gpu-box")
        assert knows("GPU.lan:8321", "0.0.0.0", ("gpu.lan",))
        assert knows("proxy.lan", "127.0.0.1", ("proxy.lan",))
        assert not knows(socket.gethostname() + ".x", "0.0.0.0", ("gpu.lan",))
        assert not knows("rebound.example", "0.0.0.0")
        assert not knows("192.168.1.5", "127.0.0.1")

    @pytest.mark.parametrize(("token", "status"), [("", 403), ("s3cret", 200)])
    def test_names_need_no_configuration_where_there_is_a_token(self, token, status):
        server = ogx.Server(ogx.Gateway(config(ogx.DEMO_PROVIDER)), "0.0.0.0", 0, token)
        server.start(poll=0.01)
        try:
            client = Client(server)
            for host, expected in (("gpu.lan", status), ("127.0.0.1", 200)):
                headers = {"host": host, "authorization": f"Bearer {token}"}
                got, _, told = client.get("/v1/health", **headers)
                assert got == expected
                if got == 403:
                    assert "add it to server.host_names" in told["error"]["message"]
            client.connection.close()
        finally:
            server.stop()

    @cases(
        ("headers", "status"),
        [
            ({}, 401), ({"authorization": "Bearer wrong"}, 401), ({"x_api_key": ""}, 401),
            ({"authorization": "Bearer s3cret"}, 200), ({"x_api_key": "s3cret"}, 200),
            ({"authorization": "bearer  s3cret", "x_api_key": "other"}, 200),
        ],
    )  # fmt: skip
    def test_a_right_token_is_accepted_and_a_wrong_one_refused(self, headers, status):
        with gateway_over() as (client, _):
            ask_for_token(client.server, "s3cret")
            got, answer_headers, body = client.post(request(), **headers)
        assert got == status and "s3cret" not in json.dumps(body)
        assert answer_headers.get("x-should-retry") == (None if status == 200 else "false")

    def test_a_wrong_token_is_refused_before_the_body_is_read(self):
        head = b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n" \
               b"content-length: 30000000\r\n\r\n"  # fmt: skip
        with gateway_over() as (client, _):
            ask_for_token(client.server, "s3cret")
            assert client.raw(head, shut=True).startswith(b"HTTP/1.1 401 ")

    def test_probes_need_no_token_and_tell_nothing(self):
        with gateway_over() as (client, _):
            ask_for_token(client.server, "s3cret")
            for path in ogx.PROBES:
                status, _, body = client.get(path)
                assert (status, body) == (200, {"status": "OK"})
                assert client.get(path, origin="http://evil.test")[0] == 403
                assert client.get(path, host="evil.test")[0] == 403
                for odd in (f"{path}?x", f"{path}/", f"/{path}", f"{path[:-1]}%{ord(path[-1]):x}"):
                    assert client.get(odd)[0] == 401
                assert client.post({}, path)[0] == 405
            assert client.get("/v1/models")[0] == client.get("/")[0] == 401

    def test_it_is_ready_while_it_can_serve(self):
        with gateway_over(models=(500, {})) as (client, _):
            status, _, body = client.get("/v1/ready")
            assert (status, body["error"]["message"]) == (503, "no provider has a model")
            assert client.get("/v1/health")[0] == 200
        with gateway_over() as (client, _):
            assert client.get("/v1/ready")[0] == 200
            client.server.stopping = True  # which closes connections as they get idle
            assert refused(client.server.readiness, "").status == 503

    # -- limits

    def test_a_body_too_large_is_refused_before_it_is_read(self):
        head = f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: " \
               f"{32 * 1024 * 1024 + 1}\r\n\r\n"  # fmt: skip
        with gateway_over() as (client, _):
            answer = client.raw(head.encode() + b"x" * 100_000, shut=True)
        assert answer.startswith(b"HTTP/1.1 413 ") and b'"request_too_large"' in answer

    def test_an_endless_chunked_body_is_bounded(self):
        head = self.HEAD + b"transfer-encoding: chunked\r\n\r\n"
        with gateway_over(limits=ogx.Limits(max_body=0.125)) as (client, _):
            answer = client.raw(head + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 3)
        assert answer.startswith(b"HTTP/1.1 413 ") and b"larger than 0.125 MB" in answer

    def test_endless_headers_are_bounded(self):
        with gateway_over() as (client, _):
            answer = client.raw(b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", shut=True)
        assert answer.startswith(b"HTTP/1.1 431 ")

    @cases(
        ("begin", "drop", "answer"),
        [
            (HEAD, b"x", b""),
            (HEAD + b"content-length: 999\r\n\r\n", b" ", b"HTTP/1.1 408 "),
            (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n", b"HTTP/1.1 408 "),
        ],
    )
    def test_a_slow_sender_times_out_and_starves_no_other(self, begin, drop, answer):
        with gateway_over(limits=ogx.Limits(client_timeout=0.2)) as (client, _):
            with socket.create_connection(("127.0.0.1", client.port), timeout=5) as sock:
                sock.sendall(begin)
                assert client.post(request())[0] == 200
                got = None
                sock.settimeout(0.01)  # between drops: each comes well within the limit
                while got is None:
                    with contextlib.suppress(socket.timeout):
                        got = sock.recv(65536)
                    if got is None:
                        sock.sendall(drop)
            assert got.startswith(answer) and bool(got) == bool(answer)

    def test_a_client_that_stops_sending_times_out(self):
        with gateway_over(limits=ogx.Limits(client_timeout=0.05)) as (client, _):
            assert client.raw(self.HEAD) == b""
            assert client.raw(self.HEAD + b"content-length: 9\r\n\r\n{").startswith(
                b"HTTP/1.1 408 "
            )

    def test_backpressure_bounds_memory_and_a_slow_reader_times_out(self):
        def answer(fake, connection):
            begin_stream(connection)
            with contextlib.suppress(OSError):
                for _ in range(2000):  # 200 MB
                    send_chunk(connection, sse(delta(content="x" * 100_000), done=False))
                    fake.sent += 1
            fake.client_left.set()

        limits = ogx.Limits(client_timeout=0.3)
        with gateway_over(answer, limits=limits) as (client, upstream):
            upstream.sent = 0
            with client.sending(request(stream=True)):
                assert upstream.client_left.wait(10)
            assert 0 < upstream.sent < 400  # what the sockets' buffers hold

    def test_a_client_that_floods_during_its_answer_fills_no_memory(self):
        def answer(fake, connection):
            begin_stream(connection)
            for _ in range(500):
                send_chunk(connection, sse(delta(content="Hello"), done=False))
                time.sleep(0.001)
            send_chunk(connection, sse(delta("stop")))
            connection.sendall(b"0\r\n\r\n")

        with gateway_over(answer) as (client, _), self.stream_of(client) as sock:
            read_until(sock, b"Hello")
            sock.setblocking(False)
            handler, held = next(iter(client.server.running)), 0
            while client.server.running:
                with contextlib.suppress(OSError):  # it takes no more, or answered and left
                    sock.send(b"x" * 65536)
                held = max(held, len(handler._received))
                with contextlib.suppress(OSError):
                    sock.recv(1 << 20)
        assert 0 < held <= 2 * ogx.MAX_HEAD

    def test_beyond_max_requests_is_a_529_and_idle_connections_do_not_count(self):
        begun, finish = threading.Event(), threading.Event()

        def answer(fake, connection):
            begun.set()
            finish.wait(10)
            send(connection, 200, said(), "text/event-stream")

        with gateway_over(answer, limits=ogx.Limits(max_requests=1)) as (client, _):
            idle = [Client(client.server) for _ in range(3)]
            for other in idle:
                assert other.get("/v1/health")[0] == 200
            with client.sending(request()) as sock:
                assert begun.wait(5)
                status, headers, told = client.post(request())
                assert (status, told["error"]["type"]) == (529, "overloaded_error")
                assert "OGX_MAX_REQUESTS" in told["error"]["message"]
                assert headers["retry-after"] == "1"
                assert idle[0].get("/v1/health")[0] == 200
                until(lambda: len(client.server.running) == 1)  # they are done and counted out
                finish.set()
                assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
                sock.sendall(self.HEAD + b"content-length: 2\r\n\r\n{}")  # there is room again
                assert sock.recv(65536).startswith(b"HTTP/1.1 400 ")
            for other in idle:
                other.connection.close()

    def test_of_too_many_keep_alive_connections_the_oldest_are_closed(self):
        with gateway_over(limits=ogx.Limits(max_idle=2)) as (client, _):
            clients = [Client(client.server) for _ in range(4)]
            for index in (0, 1, 2, 1, 3):  # when the last one comes, the third is the oldest
                clients[index].get("/")
                name = clients[index].connection.sock.getsockname()
                until(lambda name=name: [*client.server._idle][-1:] and
                      [*client.server._idle][-1].getpeername() == name)  # fmt: skip
            for each, closed in zip(clients, (True, False, True, False)):
                each.connection.sock.settimeout(5 if closed else 0.01)
                with contextlib.suppress(socket.timeout):
                    assert each.connection.sock.recv(1) == b"" and closed
                each.connection.close()

    def test_thread_exhaustion_is_a_529(self, monkeypatch):
        def none(thread):
            raise RuntimeError("can't start new thread")

        with gateway_over() as (client, _):
            assert client.post(request())[0] == 200
            monkeypatch.setattr(threading.Thread, "start", none)
            status, _, told = client.get("/v1/models")
            assert (status, told["error"]["type"]) == (529, "overloaded_error")
            assert client.post(request())[0] == 200  # by the connection that is there
            monkeypatch.undo()
            assert client.get("/v1/models")[0] == 200

    # -- disconnects

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_disconnect_before_the_answer_is_noticed(self, stream):
        def answer(fake, connection):
            await_end(fake, connection)

        with gateway_over(answer) as (client, upstream):
            with self.stream_of(client, request(stream=stream)):
                until(lambda: upstream.seen)
            assert upstream.client_left.wait(5)

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("begun", [True, False])
    def test_a_half_closed_client_gets_its_answer(self, stream, begun):
        def answer(fake, connection):
            begin_stream(connection)
            if begun:
                send_chunk(connection, sse(delta(content="One."), done=False))
            shut.wait(10)
            until(lambda: not shut.is_set())
            send_chunk(connection, said("Two."))
            connection.sendall(b"0\r\n\r\n")

        shut = threading.Event()
        with gateway_over(answer) as (client, upstream), self.stream_of(
            client, request(stream=stream)
        ) as sock:
            until(lambda: upstream.seen)
            if begun and stream:
                read_until(sock, b"One.")
            sock.shutdown(socket.SHUT_WR)
            shut.set()
            client.get("/v1/health")
            time.sleep(0.5)  # so long it has looked again more than once
            shut.clear()
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        assert b"Two." in answer and not upstream.client_left.is_set()
        heads = re.findall(rb"HTTP/1\.1 (\d+)", answer)
        assert heads in ([], [b"200"]) if begun and stream else set(heads[:-1]) == {b"100"}

    def test_a_disconnect_during_translation_sends_nothing_upstream(self):
        def slowly(usual, *arguments):
            gone.wait(10)
            return usual(*arguments)

        gone = threading.Event()
        with translating(slowly), gateway_over() as (client, upstream):
            with client.sending(request("x" * ogx.LONG)):
                until(lambda: client.server.running)
            gone.set()
            until(lambda: not client.server.running)
            assert client.post(request())[0] == 200
        assert len(upstream.seen) == 1

    def test_a_disconnect_during_a_pipelined_request_is_noticed(self):
        def late(fake, connection):
            both.wait(10)
            send(connection, 200, said("One."), "text/event-stream")

        def hang(fake, connection):
            await_end(fake, connection)

        both = threading.Event()
        with gateway_over(late, hang) as (client, upstream):
            with self.stream_of(client, request()) as sock:
                data = json.dumps(request()).encode()
                sock.sendall(self.HEAD + b"content-length: %d\r\n\r\n%b" % (len(data), data))
                until(lambda: upstream.seen)
                both.set()
                read_until(sock, b"One.")
                until(lambda: len(upstream.seen) == 2)
            assert upstream.client_left.wait(5)

    def test_an_upstream_disconnect_ends_in_an_error_event(self):
        def dies(fake, connection):
            begin_stream(connection)
            send_chunk(connection, sse(delta(content="Hello"), done=False))
            fake.client_left.wait(20)

        with gateway_over(dies) as (client, upstream), self.stream_of(client) as sock:
            read_until(sock, b"Hello")
            upstream.client_left.set()
            rest = read_until(sock, b"0\r\n\r\n")
            assert b"content_block_stop" in rest and b"event: error" in rest
            assert client.post(request())[0] == 200, "the server goes on"

    def test_one_clients_reset_ends_no_other_stream(self):
        def quiet(fake, connection):
            begin_stream(connection)
            send_chunk(connection, sse(delta(content="Hello"), done=False))
            fake.client_left.wait(20)
            with contextlib.suppress(OSError):
                send_chunk(connection, sse(delta("stop")))
                connection.sendall(b"0\r\n\r\n")

        with gateway_over(quiet, quiet, tick=0.05) as (client, upstream), self.stream_of(
            client
        ) as other:
            read_until(other, b"Hello")
            gone = self.stream_of(client)
            read_until(gone, b"Hello")
            gone.sendall(b"GET / HT")  # so that its end is not looked for any more
            read_until(gone, b"ping")
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone.close()  # by a reset
            read_until(other, b"ping")
            read_until(other, b"ping")
            upstream.client_left.set()
            read_until(other, b"0\r\n\r\n")

    # -- TLS

    @contextlib.contextmanager
    def over_tls(self, tmp_path, *answers, **options):
        """(server, upstream, function that connects) of a gateway that speaks TLS."""
        path = tmp_path / "localhost.pem"
        path.write_text(LOCALHOST_PEM)
        trust = ssl.create_default_context(cafile=str(path))
        with FakeUpstream(*answers) as upstream:
            gateway = ogx.Gateway(config(provider(url=upstream.url), **options))
            server = ogx.Server(gateway, "127.0.0.1", 0, tls=ogx.server_tls(str(path), None))
            server.start(poll=0.01)
            gateway.start()
            assert gateway.discovery.done.wait(10)

            def connected(**versions):
                sock = socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
                trust.maximum_version = versions.get("maximum", ssl.TLSVersion.TLSv1_3)
                return trust.wrap_socket(sock, server_hostname="localhost")

            try:
                yield server, upstream, connected
            finally:
                server.stop(drain=5)

    def test_https(self, tmp_path):
        body = json.dumps(request(stream=True)).encode()
        headers = {"origin": "https://localhost", "host": "localhost"}
        with self.over_tls(tmp_path) as (server, _, connected), connected() as sock:
            assert server.url == f"https://127.0.0.1:{server.server_port}"
            connection = http.client.HTTPConnection("localhost")
            connection.sock = sock
            for _ in range(2):
                connection.request("POST", "/v1/messages", body, headers)
                answer = connection.getresponse()
                assert answer.status == 200
                check_grammar(read_events(answer.read()))

    def test_a_tls_handshake_that_hangs_or_fails_starves_no_other(self, tmp_path, caplog):
        limits = ogx.Limits(client_timeout=0.3)
        with self.over_tls(tmp_path, limits=limits) as (server, _, connected):
            address = ("127.0.0.1", server.server_port)
            with socket.create_connection(address, timeout=10) as silent, \
                    socket.create_connection(address, timeout=10) as plain:  # fmt: skip
                plain.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
                with connected() as sock:
                    sock.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
                    assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
                assert silent.recv(10) == b""
                with contextlib.suppress(ConnectionResetError):
                    assert b"HTTP" not in plain.recv(65536)
        assert not caplog.records

    def test_tls_handshakes_take_no_threads(self, tmp_path):
        with self.over_tls(tmp_path, limits=ogx.Limits(max_idle=100)) as (server, _, connected):
            before = threading.active_count()
            silent = [socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
                      for _ in range(200)]  # fmt: skip
            with connected() as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
                assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
            assert threading.active_count() <= before + 1
            for sock in silent[:100]:  # the oldest of too many idle ones
                assert sock.recv(1) == b""
            for sock in silent:
                sock.close()

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    @pytest.mark.parametrize("politely", [True, False])
    def test_a_disconnect_is_noticed_behind_tls(self, tmp_path, politely, version):
        def answer(fake, connection):
            begin_stream(connection)
            send_chunk(connection, sse(delta(content="a"), done=False))
            await_end(fake, connection)

        body = json.dumps(request(stream=True)).encode()
        with self.over_tls(tmp_path, answer) as (_, upstream, connected), connected(
            maximum=version
        ) as sock:
            sock.sendall(self.HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
            assert b"text_delta" in sock.recv(65536)
            assert not upstream.client_left.is_set()
            if politely:
                sock.settimeout(0)
                with contextlib.suppress(OSError):
                    sock.unwrap()  # sends the alert; the connection stays open
            else:
                sock.close()
            assert upstream.client_left.wait(2)

    def test_who_leaves_a_stream_behind_tls_is_no_unexpected_error(self, tmp_path, caplog):
        def answer(fake, connection):
            begin_stream(connection)
            with contextlib.suppress(OSError):
                for _ in range(200):
                    send_chunk(connection, sse(delta(content="a" * 100_000), done=False))
            fake.client_left.set()

        caplog.set_level("INFO", "ogx")
        body = json.dumps(request(stream=True)).encode()
        with self.over_tls(tmp_path, answer) as (_, upstream, connected):
            with connected() as sock:
                sock.sendall(self.HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
                sock.recv(10)
            assert upstream.client_left.wait(10)
            until(lambda: caplog.records)
        assert " POST /v1/messages 200 " in caplog.text and "unexpected" not in caplog.text

    def test_two_bytes_are_no_disconnect_behind_tls(self, tmp_path):
        """A record of two bytes is as long as the alert before an end."""
        def answer(fake, connection):
            sent.wait(10)
            send(connection, 200, said("One."), "text/event-stream")

        sent = threading.Event()
        body = json.dumps(request(stream=True)).encode()
        with self.over_tls(tmp_path, answer) as (_, upstream, connected), connected() as sock:
            sock.sendall(self.HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
            until(lambda: upstream.seen)
            sock.sendall(b"\r\n")
            with pytest.raises(socket.timeout):  # TimeoutError from 3.10 on  # noqa: UP041
                sock.settimeout(0.3)
                sock.recv(1)
            sent.set()
            sock.settimeout(10)
            read_until(sock, b"One.")

    # -- stopping

    def test_graceful_shutdown_closes_keep_alive_connections(self):
        with gateway_over() as (client, _):
            client.get("/")
            client.server.stop()
            client.connection.sock.settimeout(5)
            assert client.connection.sock.recv(1) == b""

    def test_graceful_shutdown_lets_a_running_answer_finish(self):
        begun, finish = threading.Event(), threading.Event()

        def answer(fake, connection):
            begin_stream(connection)
            send_chunk(connection, sse(delta(content="a"), done=False))
            begun.set()
            finish.wait(5)
            send_chunk(connection, sse(delta("stop")))

        with gateway_over(answer) as (client, _):
            answers = []
            asking = threading.Thread(target=lambda: answers.append(client.post(
                request(stream=True))))  # fmt: skip
            asking.start()
            assert begun.wait(5)
            stopping = threading.Thread(target=client.server.stop)
            stopping.start()
            until(lambda: client.server.socket.fileno() == -1)
            finish.set()
            for thread in (asking, stopping):
                thread.join(5)
            assert not stopping.is_alive()  # it did not wait for all of the grace period
            with pytest.raises(OSError):
                socket.create_connection(("127.0.0.1", client.port), timeout=1)
        check_grammar(read_events(answers[0][2]))

    def test_a_request_during_shutdown_is_its_connections_last(self):
        asked, finish = threading.Event(), threading.Event()

        def answer(fake, connection):
            asked.set()
            finish.wait(5)

        with gateway_over(answer) as (client, _), client.sending(request()):
            with socket.create_connection(("127.0.0.1", client.port), timeout=5) as sock:
                sock.sendall(b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n")
                assert asked.wait(5)
                assert client.get("/v1/health")[0] == 200  # the loop has come round
                stopping = threading.Thread(target=client.server.stop)
                stopping.start()
                until(lambda: client.server.stopping)
                sock.sendall(b"content-length: 2\r\n\r\n{}")
                told = b"".join(iter(lambda: sock.recv(65536), b""))
            finish.set()
            stopping.join(5)
        assert told.startswith(b"HTTP/1.1 400 ") and b"\r\nconnection: close\r\n" in told

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("begun", [True, False])
    def test_after_the_grace_period_running_answers_end_in_an_error(self, begun, stream):
        asked = threading.Event()

        def answer(fake, connection):
            if begun:
                begin_stream(connection)
                send_chunk(connection, sse(delta(content="a"), done=False))
            asked.set()
            await_end(fake, connection)

        limits = ogx.Limits(drain_timeout=0.05)
        with gateway_over(answer, limits=limits, retries=3) as (client, upstream):
            with client.sending(request(stream=stream)) as sock:
                assert asked.wait(5)
                if begun and stream:
                    assert b"message_start" in sock.recv(65536)
                client.server.stop()
                assert upstream.client_left.wait(2)
                answer = b"".join(iter(lambda: sock.recv(65536), b""))
            assert len(upstream.seen) == 1
        assert b'"type":"error"' in answer and b"ogx.py is stopping" in answer
        assert answer.startswith(b"HTTP/1.1 503 ") != (begun and stream)

    def test_the_loop_goes_on_while_the_gateway_closes(self):
        def forever(fake, connection):
            begin_stream(connection)
            send_chunk(connection, sse(delta(content="Hello"), done=False))
            fake.client_left.wait(20)

        def close():
            until(lambda: not client.server.running)
            closed.append(True)
            usual()

        closed = []
        with gateway_over(forever, forever) as (client, upstream):
            with self.stream_of(client) as one, self.stream_of(client) as two:
                for sock in (one, two):
                    read_until(sock, b"Hello")
                usual, client.gateway.close = client.gateway.close, close
                client.server.stop(drain=0.01)
            upstream.client_left.set()
        assert closed

    def test_streams_that_outlive_the_grace_period_end_in_an_error_event(self):
        def forever(fake, connection):
            begin_stream(connection)
            send_chunk(connection, sse(delta(content="Hello"), done=False))
            fake.client_left.wait(20)

        with gateway_over(forever) as (client, upstream):
            with self.stream_of(client) as sock:
                read_until(sock, b"Hello")
                client.server.stop(drain=0.01)
                rest = read_until(sock, b"0\r\n\r\n")
            upstream.client_left.set()
        assert b"event: error" in rest and b"overloaded_error" in rest

    def test_a_partly_written_event_is_completed_before_the_error(self):
        def endless(fake, connection):
            begin_stream(connection)
            with contextlib.suppress(OSError):
                while not fake.client_left.is_set():
                    send_chunk(connection, sse(*[delta(content="z" * 900)] * 50, done=False))

        with gateway_over(endless) as (client, upstream), self.stream_of(client) as sock:
            read_until(sock, b"zzz")
            stop = threading.Thread(target=client.server.stop, args=(0.3,))
            stop.start()
            time.sleep(0.5)  # the client is behind when the time to finish is over
            raw = b"".join(iter(lambda: sock.recv(1 << 20), b""))
            stop.join(20)
            upstream.client_left.set()
        assert raw.endswith(b"\r\n0\r\n\r\n")
        last = raw[: raw.rindex(b"\r\n0\r\n\r\n")]
        assert last[last.rindex(b"\r\nevent: error") :].count(b"overloaded_error") == 1

    # -- loop

    def test_concurrent_streams_arrive_whole(self):
        def paced(fake, connection):
            begin_stream(connection)
            name = names.pop()
            for i in range(20):
                send_chunk(connection, sse(delta(content=f"{name}{i} "), done=False))
                everyone.wait(20)
            send_chunk(connection, sse(delta("stop")))
            connection.sendall(b"0\r\n\r\n")

        everyone, names = threading.Barrier(30), [f"s{n}-" for n in range(30)]
        expected = sorted("".join(f"{name}{i} " for i in range(20)) for name in names)
        with gateway_over(*[paced] * 30) as (client, _):
            answers = []

            def ask():
                with self.stream_of(client) as sock:
                    data = read_until(sock, b"\r\n0\r\n\r\n")
                body = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", data.split(b"\r\n\r\n", 1)[1])
                answers.append(b"".join(re.findall(rb'"text_delta","text":"(.*?)"', body)))

            threads = [threading.Thread(target=ask) for _ in range(30)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert sorted(answer.decode() for answer in answers) == expected

    def test_backpressure_reaches_the_readers_own_upstream_alone(self):
        taken, hold = [], threading.Event()

        def endless(fake, connection):
            begin_stream(connection)
            connection.settimeout(20)
            chunk = sse(*[delta(content="x" * 1000)] * 50, done=False)
            try:
                while not hold.is_set():
                    send_chunk(connection, chunk)
                    taken.append(len(chunk))
            except OSError:
                fake.client_left.set()

        def steady(fake, connection):
            begin_stream(connection)
            for word in ("one ", "two ", "three"):
                send_chunk(connection, sse(delta(content=word), done=False))
                go_on[word].wait(20)
            send_chunk(connection, sse(delta("stop")))
            connection.sendall(b"0\r\n\r\n")

        go_on = {word: threading.Event() for word in ("one ", "two ", "three")}
        with gateway_over(endless, steady) as (client, upstream):
            with self.stream_of(client) as stuck:
                read_until(stuck, b"xxx")
                amounts = []
                while len(amounts) < 3 or amounts[-1] != amounts[-3]:  # until nothing moves
                    amounts.append(len(taken))
                    time.sleep(0.05)
                with self.stream_of(client) as other:
                    for word in go_on:
                        read_until(other, word.strip().encode())
                        go_on[word].set()
                    read_until(other, b"0\r\n\r\n")
                assert sum(taken) < 30_000_000, "what a client doesn't take must not be kept"
            assert upstream.client_left.wait(10), "the upstream of a client that left is closed"
            hold.set()

    def test_a_slow_reader_gets_all_from_an_upstream_that_closes(self):
        def large(fake, connection):
            connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
            connection.sendall(sse(delta(content="x"), done=False))
            go_on.wait(20)
            connection.sendall(sse(delta(content="y" * 6_000_000), delta("stop")))

        go_on = threading.Event()
        with gateway_over(large) as (client, _), self.stream_of(client) as sock:
            read_until(sock, b'"x"')
            go_on.set()
            time.sleep(0.2)  # the server fills the buffers meanwhile
            data = b""
            while not data.endswith(b"\r\n0\r\n\r\n"):
                data += sock.recv(1 << 20)
            assert data.count(b"y") >= 6_000_000
            assert client.get("/v1/health")[0] == 200

    @pytest.mark.parametrize("counts", [True, False])
    def test_pooled_connections_serve_many_clients(self, counts):
        with gateway_over(kind="vllm", native=counts) as (client, upstream):
            statuses = []

            def ask():
                each = Client(client.server)
                for n in range(40):
                    path = "/v1/messages/count_tokens" if counts and n % 3 else "/v1/messages"
                    body = request(model="vllm/gpt-x", stream=not counts and n % 2 == 0)
                    statuses.append(each.post(body, path)[0])
                each.connection.close()

            threads = [threading.Thread(target=ask) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            expected = {200, 502} if counts else {200}  # a stream is no answer to a message
            assert len(statuses) == 320 and set(statuses) <= expected
            assert upstream.connections <= 10 or counts

    def test_a_waiting_request_takes_no_thread(self):
        def quiet(fake, connection):
            begin_stream(connection)
            send_chunk(connection, sse(delta(content="Hello"), done=False))
            fake.client_left.wait(20)

        with gateway_over(*[quiet] * 10) as (client, upstream):
            running = threading.active_count()
            with contextlib.ExitStack() as held:
                for _ in range(30):
                    held.enter_context(socket.create_connection(("127.0.0.1", client.port)))
                for _ in range(10):
                    read_until(held.enter_context(self.stream_of(client)), b"Hello")
                ours = {thread.name for thread in threading.enumerate()}
                assert threading.active_count() - running <= 10 + 1, ours  # the fake upstream's
            upstream.client_left.set()

    def test_a_blocking_connect_starves_no_other(self):
        go_on, begun = threading.Event(), threading.Event()

        def slow(*_):
            begun.set()
            assert go_on.wait(20)
            raise ogx.OgxError(502, "unreachable")

        with FakeUpstream() as upstream, serving(
            provider(url=upstream.url), provider("vllm", "http://127.0.0.1:9/v1")
        ) as client:
            connect = client.gateway.upstream.new_connection
            client.gateway.upstream.new_connection = lambda owner, timeout: (
                slow if owner.id == "vllm" else connect)(owner, timeout)  # fmt: skip
            with client.sending(request(model="vllm/m")) as sock:
                assert begun.wait(5)
                for _ in range(2):
                    assert client.post(request())[0] == 200
                go_on.set()
                assert sock.recv(65536).startswith(b"HTTP/1.1 502 ")

    def test_long_requests_are_translated_in_worker_threads(self):
        with gateway_over() as (client, _):
            threads, messages = [], client.gateway.messages

            def noting(exchange):
                threads.append(threading.current_thread().name)
                return messages(exchange)

            client.gateway.messages = noting
            for body in (request(), request("x" * ogx.LONG)):
                assert client.post(body)[0] == 200
            data = gzip.compress(json.dumps(request()).encode())
            assert client.post(data, content_encoding="gzip")[0] == 200
        assert threads[0] == "loop" and "loop" not in threads[1:] and len(threads) == 3

    def test_each_retry_of_a_long_request_is_made_in_a_worker_thread(self):
        def noting(usual, *arguments):
            threads.append(threading.current_thread().name)
            return usual(*arguments)

        threads, answers = [], [(503, {}), (503, {}), said()]
        with translating(noting), gateway_over(*answers, retries=3) as (client, _):
            assert client.post(request("x" * ogx.LONG))[0] == 200
        assert len(threads) == 3 and "loop" not in threads

    @cases("path", ["/v1/messages", "/v1/messages/count_tokens"])
    def test_waiting_for_the_first_lists_starves_no_other(self, path):
        body = request(model="listed-late")
        with gateway_over(discover=False) as (client, upstream), client.sending(body, path) as sock:
            until(lambda: client.server.running)
            assert client.get("/v1/health")[0] == 200
            late = ogx.Model("openai/listed-late", provider(url=upstream.url), "listed-late")
            client.gateway.registry.learn("openai", [late])
            client.gateway.discovery.done.set()
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")

    def test_a_pipelined_request_keeps_no_one_busy(self, monkeypatch):
        class Counting(selectors.DefaultSelector):
            def select(self, timeout=None):
                looks.append(timeout)
                return super().select(timeout)

        def paced(fake, connection):
            begin_stream(connection)
            for word in words:
                send_chunk(connection, sse(delta(content=word), done=False))
                words[word].wait(20)
            send_chunk(connection, sse(delta("stop")))
            connection.sendall(b"0\r\n\r\n")

        looks, words = [], {word: threading.Event() for word in ("one", "two", "three", "four")}
        monkeypatch.setattr(selectors, "DefaultSelector", Counting)
        with gateway_over(paced) as (client, _), self.stream_of(client) as sock:
            read_until(sock, b"one")
            sock.sendall(b"GET /v1/health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            looks.clear()
            for word in words:
                read_until(sock, word.encode()) if word != "one" else None
                words[word].set()
            assert b'"status":"OK"' in read_until(sock, b"OK")
        assert len(looks) < 50  # a busy loop looks some ten thousand times meanwhile

    @cases("flood", [
        b"\r\n" * 50_000, HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 50_000,
    ])  # fmt: skip
    def test_a_flooding_client_starves_no_other(self, flood):
        def send_on():
            with socket.create_connection(("127.0.0.1", client.port)) as sock, \
                    contextlib.suppress(OSError):  # fmt: skip
                sock.sendall(flood)
                while not done.is_set():
                    sock.sendall(flood[-60_000:])

        done = threading.Event()
        with gateway_over() as (client, _):
            assert client.post(request())[0] == 200
            threads = [threading.Thread(target=send_on) for _ in range(2)]
            for thread in threads:
                thread.start()
            client.connection.sock.settimeout(5)
            for _ in range(3):
                assert client.get("/v1/health")[0] == 200
                assert client.post(request())[0] == 200
            done.set()
            for thread in threads:
                thread.join(10)

    @contextlib.contextmanager
    def nobody_waiting(self, client):
        """Ask for /v1/health every 10 ms: for none may the loop's thread work for long."""
        # The newest: that of the test before may still be ending.
        loop = [thread for thread in threading.enumerate() if thread.name == "loop"][-1]
        clock, done, waits = time.pthread_getcpuclockid(loop.ident), threading.Event(), []

        def ask():
            probe = Client(client.server)
            while not done.wait(0.01):
                began = time.clock_gettime(clock)
                assert probe.get("/v1/health")[0] == 200
                waits.append(time.clock_gettime(clock) - began)
            probe.connection.close()

        prober = threading.Thread(target=ask)
        prober.start()
        gc.freeze()  # what all tests left would be looked through in the loop's time
        try:
            until(lambda: waits)
            yield
            count = len(waits)
            until(lambda: len(waits) > count)
        finally:
            done.set()
            prober.join(30)
            gc.unfreeze()
        assert max(waits) < 0.3  # where an unbounded input takes seconds; a busy machine triples it

    @pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clock of a thread")
    @pytest.mark.parametrize("attack", [
        b"GET / HTTP/1.1\r\nhost: localhost\r\na:" + b" " * 60_000 + b"\x01\r\n\r\n",
        b"GET /" + b"/" * 60_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /" + b"%2e%2e/" * 9000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: " + b":" * 60_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"host: localhost\r\n\r\n",
        b"GET /v1/models?limit=" + b"1" * 60_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n1;" + b"x" * 60_000 + b"\r\na\r\n0\r\n\r\n",
    ], ids=["spaces", "slashes", "dots", "host", "headers", "query", "chunk"])  # fmt: skip
    def test_no_head_blocks_the_loop(self, attack):
        with gateway_over() as (client, _), self.nobody_waiting(client):
            for _ in range(5):
                assert re.search(rb"HTTP/1\.1 [24]\d\d ", client.raw(attack, shut=True))

    @pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clock of a thread")
    @pytest.mark.parametrize("body", [
        lambda: request(model="openai/" + "qwen3" * 49),
        lambda: request(model="openai/" + "qwen3" * 6000 + "coder" + "x" * 30_000),
        lambda: request(model="x-" * 100),
        lambda: request(user(*[text("a")] * 20_000)),
        lambda: request(*[user("a"), {"role": "system", "content": "b"}] * 10_000),
        lambda: request("x" * 2_000_000), lambda: request(x=[[]] * 400_000),
        lambda: request(x=[[]] * 1_200_000), lambda: request(stop_sequences=["a" * 3999]),
        lambda: request(tools=[tool(f"t{i}", properties={"a": {"type": "string"}})
                               for i in range(5000)]),
        lambda: request(user({"type": "thinking", "thinking": "x" * 100_000, "signature": "y"})),
    ], ids=["effort", "long id", "unknown", "blocks", "systems", "text", "json", "elements", "stop",
            "tools", "thinking"])  # fmt: skip
    def test_no_request_blocks_the_loop(self, body):
        models = [f"vendor-{i % 40}/some-model-name-{i}" for i in range(1000)]
        answers = [said("a" * 5000) for _ in range(3)]
        with gateway_over(*answers, models=models) as (client, _), self.nobody_waiting(client):
            for _ in range(3):
                assert client.post(body())[0] in (200, 400, 404, 413)

    DELTA = sse(delta(content="a\xe9"), done=False)

    PACKED = zlib.compressobj(9, zlib.DEFLATED, 31)

    BOMB = PACKED.compress(b": x\n\n" * 3_000_000) + PACKED.flush()

    @pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clock of a thread")
    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("answer", [
        flood(b"HTTP/1.1 200 OK\r\nx:" + b" " * 60_000 + b"\x01\r\n\r\n", b"", 0),
        flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 4000, 20),
        *((500, b"<html>" + page * 100_000) for page in (b"<script>", b"<title", b"<")),
        flood(ENDLESS + b'{"choices":[', b"[]," * 300_000, 20, b"{}]}"),
        flood(ENDLESS + b'{"choices":[{"message":{"content":"', b"x" * 100_000, 100, b'"}}]}'),
        flood(ENDLESS, b" \n" * 50_000, 50), flood(ENDLESS, b"x" * 100_000, 50),
        flood(ENDLESS, DELTA * 1000, 30, sse(delta("stop"))),
        flood(ENDLESS, sse(delta(content="\n  "), done=False) * 1000, 20, said()),
        flood(ENDLESS + sse(delta(tool_calls=[fragment(0, "a", "Bash", '{"x":"')]), done=False),
              sse(delta(tool_calls=[fragment(0, arguments="abcd")]), done=False) * 1000, 20),
        flood(ENDLESS + b"data: {", b"x" * 100_000, 100, b"\n\n"),
        flood(ENDLESS + b'data: {"choices":[{"delta":{"content":"', b"\\u00e9" * 20_000, 100,
              b'"}}]}\n\n'),
        flood(ENDLESS, b"data: [\n\n" * 10_000, 10),
        flood(ENDLESS, b": x\n\n" * 20_000, 50),
        flood(CHUNKED, b"1\r\n:\r\n" * 10_000, 30),
        flood(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\n", BOMB, 2),
        (400, {"error": {"message": "max_tokens context length is 1 tokens " * 2000}}),
        (429, b"[" * 100_000), (400, b'{"error":' * 20_000),
    ], ids=["head", "1xx", "script", "title", "tag", "elements", "text", "space", "letters",
            "deltas", "white", "tool", "event", "escapes", "broken", "comments", "chunks", "gzip",
            "words", "lists", "nested"])  # fmt: skip
    def test_no_answer_blocks_the_loop(self, answer, stream):
        with gateway_over(answer) as (client, _), self.nobody_waiting(client):
            status, _, got = client.post(request(stream=stream))
            assert status in (200, 400, 429, 500, 502) and got

    @pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clock of a thread")
    @cases("piece", [b"x" * 1400, b'"type":', b"error ", b'"message_stop",'])
    def test_no_native_answer_blocks_the_loop(self, piece):
        begin = native_stream().split(b"event: content_block_stop")[0] + b'event: x\ndata: {"a":"'
        answer = flood(ENDLESS + begin, piece * (100_000 // len(piece)), 80, b'"}\n\n')
        with gateway_over(answer, kind="vllm", native=True) as (client, _), \
                self.nobody_waiting(client):  # fmt: skip
            assert client.post(request(model="vllm/gpt-x", stream=True))[0] == 200

    # -- log

    def test_an_unexpected_error_is_a_500_with_the_trace_in_the_log_alone(self, caplog):
        with gateway_over() as (client, _):
            client.gateway.count_tokens = lambda *_: 1 / 0
            body = {"model": "m", "messages": [user("x")]}
            status, _, answer = client.post(body, "/v1/messages/count_tokens")
            assert client.get("/v1/health")[0] == 200
        assert status == 500 and "division" not in json.dumps(answer)
        assert "ZeroDivisionError" in caplog.text

    def test_a_client_that_leaves_while_it_is_refused_has_its_log_line(self, caplog):
        caplog.set_level("INFO", "ogx")
        head = b"POST /v1/messages HTTP/1.1\r\nhost: evil.example\r\ncontent-length: 9\r\n\r\n"
        with gateway_over() as (client, _):
            with socket.create_connection(("127.0.0.1", client.port), timeout=10) as sock:
                sock.sendall(head)
                read_until(sock, b"not a name of this server")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            until(lambda: caplog.records)
        assert " POST /v1/messages 403 " in caplog.records[0].getMessage()

    def test_streams_ask_nginx_for_no_buffer(self):
        with gateway_over(said(), said()) as (client, _):
            headers = [client.post(request(stream=stream))[1] for stream in (True, False)]
        assert [one["x-accel-buffering"] for one in headers] == ["no", None]

    def test_one_log_line_per_request(self, caplog):
        caplog.set_level("INFO", "ogx")
        with gateway_over() as (client, _):
            client.post(request(stream=True), x_claude_code_session_id="s-1")
            client.get("/v1/health")
            client.post(request(max_tokens=0))
        first, second = [record.getMessage() for record in caplog.records]
        assert re.fullmatch(
            r"req_\w+ POST /v1/messages 200 openai/gpt-x -> openai/gpt-x by chat first [\d.]+s "
            r"total [\d.]+s in 30 cached 20 out 7 session s-1", first,
        )  # fmt: skip
        assert "400" in second and "error: max_tokens: expected at least 1, got 0" in second
        assert "sk-secret" not in caplog.text

    @pytest.mark.parametrize("stream", [True, False])
    def test_what_was_written_to_a_cache_counts_as_read_anew(self, caplog, stream):
        caplog.set_level("INFO", "ogx")
        usage = ogx.Usage(107, 7, 3968, 8832)  # of vLLM, with --enable-prompt-tokens-details
        answer = native_stream(usage=usage)
        answer = answer if stream else ogx.message_from_events(read_events(answer))
        with gateway_over(answer, kind="vllm", native=True) as (client, _):
            client.post(request(model="vllm/gpt-x", stream=stream))
            until(lambda: caplog.records)
        assert " in 8939 cached 3968 out 7" in caplog.records[-1].getMessage()

    def test_what_else_is_asked_has_its_line_too(self, caplog):
        caplog.set_level("INFO", "ogx")
        with gateway_over() as (client, _):
            for number, path in enumerate(("/", "/v1/models", "/v1/models/openai/gpt-x"), 1):
                client.get(path)
                until(lambda number=number: len(caplog.records) == number)
            client.raw(b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", shut=True)
            client.raw(b"nonsense\r\n\r\n")
            client.get("/" + "a" * 60_000)
            until(lambda: len(caplog.records) == 6)
            client.get("/v1/health")
            client.get("/v1/health?x")
            client.get("/last")
            until(lambda: len(caplog.records) == 7)
        assert "/last" in caplog.records[-1].getMessage()  # and the probes are told at debug
        lines = [record.getMessage() for record in caplog.records]
        assert [line.split(" nothing")[0].split()[1:4] for line in lines[:3]] == [
            ["GET", "/", "200"], ["GET", "/v1/models", "200"],
            ["GET", "/v1/models/openai/gpt-x", "200"]]  # fmt: skip
        assert " 431 " in lines[3] and "headers are too large" in lines[3] and " 400 " in lines[4]
        assert " 404 " in lines[5] and len(lines[5]) < 1000

    def test_what_a_status_line_asks_is_logged_when_it_is_kept_out(self, caplog):
        caplog.set_level("INFO")
        with gateway_over(said("a")) as (client, _):
            client.post(request(), x_claude_code_session_id="s")
            assert [client.get(f"/v1/sessions/{name}")[0] for name in "st"] == [200, 404]
            ask_for_token(client.server, "s3cret-token")
            assert client.get("/v1/sessions/s")[0] == 401
            until(lambda: len(caplog.records) == 2)
        assert [record.getMessage().split()[1:4] for record in caplog.records] == [
            ["POST", "/v1/messages", "200"], ["GET", "/v1/sessions/s", "401"]]

    def test_what_a_model_said_is_in_no_log(self, caplog):
        caplog.set_level("DEBUG")
        shape = {"format": {"type": "json_schema", "schema": {
            "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}}
        odd = b'data: {"choices":[{"delta":{"tool_calls":[7]}},"The secret of the model."]}\n\n'
        broken = b"data: The secret of the model.\n\n"
        with gateway_over(said("The secret of the model."), odd, broken,
                          kind="groq") as (client, _):  # fmt: skip
            told = client.post(request(tools=[tool()], output_config=shape, model="groq/gpt-x"))[2]
            again = [client.post(request(f"{n}", model="groq/gpt-x"))[2] for n in range(2)]
        for answer in (told, *again):
            assert "The secret of the model." in answer["error"]["message"]
        assert "The secret" not in caplog.text and caplog.text.count("error: groq") == 3

    @pytest.mark.parametrize("stream", [True, False])
    def test_logged_bodies_are_opt_in_redacted_and_bounded(
        self, caplog, stream
    ):
        caplog.set_level("DEBUG")
        words = "sk-secret-1234 s3cret-token sk-of-someone-else-9 " + "A" * 1000 + " end"
        body = request(words + " x" * 50_000, stream=stream)
        with gateway_over(said(words), said(words)) as (client, _):
            client.post(body)
            assert "end" not in caplog.text
            client.server.log_bodies = True
            ask_for_token(client.server, "s3cret-token")
            client.post(body, x_api_key="s3cret-token")
            client.post(body)  # a stranger's
        *_, asked, answered, _, stranger = [record.getMessage() for record in caplog.records]
        assert re.match(r"req_\w{24} request \{.*\*\*\* \*\*\* sk-\*\*\* \*\*\* end x x", asked)
        assert re.match(r"req_\w{24} answer .*\*\*\* \*\*\* sk-\*\*\* \*\*\* end", answered)
        assert len(asked) < ogx.LOG_LINE and " 401 " in stranger
        for secret in ("secret-1234", "s3cret", "someone-else", "AAAA"):
            assert secret not in caplog.text


def options(**given):
    flags = [word for name, value in given.items() if name != "print_env"
             for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
    flags += ["--print-env"] if given.get("print_env") else []
    return ogx.argument_parser().parse_args(["connect", "claude", *flags])


class TestConnect:
    def listing(self, *ids, tiers=None, **fields):
        entries = [{"id": i, "custom_metadata": {"model_type": "llm"}, **fields} for i in ids]
        return {"data": entries, "tiers": tiers or {}}

    def plan(self, listing, environ=None, **given):
        server = ogx.Provider("OGX", ogx.ProviderKind("x"), "http://localhost:8321", "ogx")
        return ogx.launch_plan(server, listing, options(**given), environ or {})

    def tiers(self, plan):
        return [plan.variables[f"ANTHROPIC_DEFAULT_{t.upper()}_MODEL"] for t in ogx.TIERS]

    def unset(self, plan):
        return {name for name, value in plan.variables.items() if not value}

    def test_the_variables_of_the_design_document(self):
        plan = self.plan(self.listing("openai/a", "openai/b"))
        assert plan.variables["ANTHROPIC_BASE_URL"] == "http://localhost:8321"
        assert plan.variables["ANTHROPIC_AUTH_TOKEN"] == "ogx"
        assert self.tiers(plan) == ["openai/a"] * 4
        assert {"CLAUDE_CODE_USE_VERTEX", "ANTHROPIC_VERTEX_PROJECT_ID", "CLAUDE_CODE_USE_BEDROCK",
                "ANTHROPIC_BEDROCK_SESSION_TOKEN"} <= self.unset(plan)  # fmt: skip

    def test_a_tier_is_its_flag_else_model_else_the_servers_choice_else_the_first(self):
        listing = self.listing("a", "b", "c", "d", tiers={"haiku": "b", "opus": "b"})
        assert self.tiers(self.plan(listing)) == ["b", "a", "b", "a"]
        assert self.tiers(self.plan(listing, model="c")) == ["c"] * 4
        plan = self.plan(listing, model="c", haiku_model="d", fable_model="a")
        assert self.tiers(plan) == ["d", "c", "c", "a"]

    def test_embeddings_rerankers_and_aliases_are_no_default(self):
        listing = {"data": [
            {"id": "openai/embed-x", "custom_metadata": {"model_type": "llm"}},
            {"id": "e", "custom_metadata": {"model_type": "embedding"}},
            {"id": "openai/bge-reranker"}, {"id": "alias", "custom_metadata": {"alias_of": "b"}},
            {"id": "b"},
        ]}  # fmt: skip
        assert self.tiers(self.plan(listing)) == ["b"] * 4

    def test_no_llm_at_all(self):
        for data in ([], [{"id": "bge-reranker"}], ["x", {}]):
            error = refused(self.plan, {"data": data})
            assert error.message == "Failed to find any LLM models on the OGX server."

    def test_an_unknown_model_lists_what_there_is(self):
        error = refused(self.plan, self.listing("openai/gpt-5", "vllm/q"), opus_model="gpt-5")
        assert error.message == (
            "Failed to find model 'gpt-5' on the OGX server. Did you mean 'openai/gpt-5'? "
            "--unlisted uses it all the same.\nAvailable models: openai/gpt-5, vllm/q"
        )
        error = refused(self.plan, self.listing(*(f"v/{n}" for n in range(420))), model="x")
        assert len(error.message) < 300 and error.message.endswith("v/9, ... (420 in all)")

    def launched(self, client, capfd, *flags):
        """The exit code, the opus model, and what was told."""
        code = ogx.main(["connect", "claude", "--port", str(client.port), *flags])
        out, err = capfd.readouterr()
        return code, json.loads(out)[1]["ANTHROPIC_DEFAULT_OPUS_MODEL"] if out else "", err

    @cases("model_id", ["opus", "claude-opus-4-6", "openai/gpt-x", "gpt-x", "mine"])
    def test_what_the_server_serves_can_be_named(self, claude, capfd, model_id):
        with gateway_over(aliases=[ogx.Alias("mine", "openai", "gpt-x")]) as (client, _):
            code, opus, _ = self.launched(client, capfd, "--model", model_id)
        assert (code, opus) == (7, model_id)

    @cases(("kind", "models"), [("azure", ["base"]), ("vllm", (404, {"detail": "Not Found"}))])
    def test_a_model_that_no_list_could_have_is_taken_with_a_word(
        self, claude, capfd, kind, models
    ):
        with gateway_over(kind=kind, models=models) as (client, _):
            code, opus, told = self.launched(client, capfd, "--model", f"{kind}/my-own")
        assert (code, opus) == (7, f"{kind}/my-own") and f"{kind} doesn't list it" in told

    def test_a_model_that_its_provider_does_not_list_needs_a_flag(self, claude, capfd):
        with gateway_over() as (client, _):
            code, _, told = self.launched(client, capfd, "--model", "openai/gpt-9")
            assert code == 1 and "Failed to find model 'openai/gpt-9'" in told
            code, opus, told = self.launched(client, capfd, "--unlisted", "--model", "openai/gpt-9")
        assert (code, opus) == (7, "openai/gpt-9") and "it is not listed" in told

    def test_a_servers_tiers_are_enough_where_no_list_can_be_read(self, claude, capfd):
        with gateway_over(kind="azure", models=(404, {}),
                          tiers=dict.fromkeys(ogx.TIERS, "azure/prod")) as (client, _):
            assert self.launched(client, capfd)[:2] == (7, "azure/prod")

    def test_claude_code_learns_the_true_window(self):
        plan = self.plan(self.listing("a", max_input_tokens=131072, max_tokens=8192))
        assert plan.variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "131072"
        assert plan.variables["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "8192"
        assert plan.variables["CLAUDE_CODE_DISABLE_1M_CONTEXT"] == "1"

    def test_a_small_window_gets_a_small_output(self):
        plan = self.plan(self.listing("a", max_input_tokens=32768))
        assert plan.variables["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "4096"

    @pytest.mark.parametrize(("small", "large", "given", "told", "words"), [
        (131_072, 1_000_000, {}, "1000000", "131,072 to 1,000,000 tokens"),
        (100_000, 100_001, {}, "100001", "100,000 to 100,001 tokens"),
        (99_999, 1_000_000, {}, "109999", "99,999 tokens, the smallest of the tiers'"),
        (None, 1_000_000, {}, "1000000", "1,000,000 tokens, the smallest of the tiers'"),
        (131_072, 131_072, {}, "131072", "131,072 tokens"),
        (131_072, 1_000_000, {"context": 150_000}, "150000", "150,000 tokens, the smallest")],
        ids=["large", "hardly", "small", "unknown", "like", "flag"])  # fmt: skip
    def test_unlike_windows_are_told_apart(self, claude, small, large, given, told, words):
        listing = self.listing("a", "b")
        for entry, window in zip(listing["data"], (small, large)):
            entry["max_input_tokens"] = window
        plan = self.plan(listing, opus_model="b", model="a", **given)
        assert plan.variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == told
        assert any(f"  window  {words}" in line for line in ogx.plan_lines(plan))
        apart = {"a": {"autoCompactWindow": small}, "b": {"autoCompactWindow": large}}
        made = ogx.merged_settings({}, plan).get("modelSettings")
        assert made == (apart if " to " in words else None)
        own = {"modelSettings": {"a": {"effortLevel": "low"}, "c": {"x": 1}}}
        made = ogx.merged_settings(own, plan)["modelSettings"]
        assert made["c"] == {"x": 1} and made["a"]["effortLevel"] == "low"
        assert made["a"].get("autoCompactWindow") == (small if " to " in words else None)

    def test_models_of_several_sizes_get_the_smallest_window_and_output(self):
        listing = {"data": [
            {"id": "large", "max_input_tokens": 200_000, "max_tokens": 64_000},
            {"id": "small", "max_input_tokens": 100_000, "max_tokens": 8_000},
            {"id": "unknown"}, {"id": "in no tier", "max_input_tokens": 9_000, "max_tokens": 9},
        ]}  # fmt: skip
        plan = self.plan(listing, model="large", haiku_model="small", opus_model="unknown")
        assert plan.variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "200000"  # haiku's doesn't count
        plan = self.plan(listing, model="large", sonnet_model="small", opus_model="unknown")
        assert plan.variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "100000"
        assert plan.variables["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "8000"
        listing["data"][0].update(max_input_tokens=32_768, max_tokens=2_000)
        plan = self.plan(listing, model="small", opus_model="large")
        assert plan.window == 32_768 and plan.variables["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "2000"

    @cases(("window", "told"), [(8_192, "18192"), (99_999, "109999"), (100_000, "100000"), (0, "")])
    def test_of_a_small_window_more_is_told(self, window, told):
        assert ogx.limit_variables(window, 0)["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == told

    @cases(("fields", "environ", "flags", "limits"), [
        ({"max_input_tokens": 200_000}, {"CONTEXT": "9"}, {"context": 150_000}, (150_000, 18_750)),
        ({"max_input_tokens": 200_000}, {"CONTEXT": "9", "OUTPUT": "8"}, {}, (200_000, 8)),
        ({}, {"CONTEXT": "400000", "OUTPUT": "64000"}, {}, (400_000, 64_000)),
        ({}, {"CONTEXT": "much"}, {"max_output": 5_000}, (0, 5_000)),
        ({"max_tokens": 9_000}, {}, {"context": 64_000, "max_output": 16_000}, (64_000, 16_000)),
        ({}, {}, {}, (0, 0))])
    def test_whose_numbers_count(self, fields, environ, flags, limits):
        environ = {f"CLAUDE_CODE_MAX_{name}_TOKENS": value for name, value in environ.items()}
        plan = self.plan(self.listing("a", **fields), environ, **flags)
        assert plan.window == limits[0]
        assert plan.variables["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == str(limits[1] or "")

    @cases(("window", "told", "output"), [
        (8_192, None, 1_024), (16_384, None, 2_048), (49_152, None, 6_144), (65_536, None, 8_192),
        (131_072, 4_096, 4_096), (160_000, 64_000, 20_000), (160_001, None, 0), (200_000, 9, 9)])
    def test_the_output_limit_leaves_most_of_a_window(self, window, told, output):
        plan = self.plan(self.listing("a", max_input_tokens=window, max_tokens=told))
        assert plan.variables["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == (str(output) if output else "")

    @cases(("window", "flags", "words"), [
        (4_096, {}, "this can't work: Claude Code's first request takes about 4,500 tokens"),
        (8_192, {}, "take about 4,500 of them"), (16_384, {}, ""),
        (33_000, {}, "take about 13,500 of them"), (65_536, {}, "")])
    def test_words_about_a_small_window(self, window, flags, words):
        told = "\n".join(ogx.plan_lines(self.plan(self.listing("a", max_input_tokens=window))))
        assert words in told and ("warning" in told) == bool(words)

    def test_problems_of_providers_and_models_are_told(self):
        listing = self.listing("a", "b")
        listing["data"][0]["custom_metadata"]["warning"] = "its chat template has no tools"
        listing["data"][1]["custom_metadata"]["warning"] = "not shown, since no tier means it"
        listing["problems"] = {"vllm": "can't reach it\x1b[2J\nx"}
        lines = ogx.plan_lines(self.plan(listing))
        assert lines[-2:] == ["  vllm: can't reach it\x1b[2J x",
                              "  warning: a: its chat template has no tools"]
        error = refused(self.plan, {"data": [], "problems": listing["problems"]})
        assert error.message.splitlines() == [
            "Failed to find any LLM models on the OGX server.", "  vllm: can't reach it\x1b[2J x"]

    def test_it_waits_for_a_model_that_is_loading(self, capfd, monkeypatch):
        loading = {"data": [], "problems": {"llama-cpp": "Loading model (HTTP 503)"}}
        loaded = self.listing("a")
        answers = [loading, loading, loaded]
        monkeypatch.setattr(ogx, "model_listing", lambda server: answers.pop(0))
        monkeypatch.setattr(ogx.time, "sleep", lambda seconds: None)
        assert ogx.loaded_listing(None, loading, options()) == loaded
        told = capfd.readouterr().err
        assert told == "llama-cpp: Loading model (HTTP 503); waiting for it (Ctrl-C to stop)\n"

    @cases("problems", [{}, {"vllm": "can't reach vllm: connection refused"}, None, [1]])
    def test_it_does_not_wait_for_what_is_down(self, problems):
        listing = {"data": [], "problems": problems}
        assert ogx.loaded_listing(None, listing, options()) is listing

    def test_an_unknown_window_is_not_made_up(self):
        plan = self.plan(self.listing("a"))
        assert "CLAUDE_CODE_MAX_CONTEXT_TOKENS" in self.unset(plan)

    def test_the_users_environment_stays_but_for_what_would_lead_elsewhere(self):
        environ = {"PATH": "/bin", "AWS_REGION": "eu", "CLAUDE_CODE_USE_BEDROCK": "1",
                   "ANTHROPIC_API_KEY": "sk", "NO_PROXY": "a.test,localhost"}  # fmt: skip
        plan = self.plan(self.listing("a"), environ)
        made = plan.environment(environ)
        assert (made["PATH"], made["AWS_REGION"]) == ("/bin", "eu")
        assert "CLAUDE_CODE_USE_BEDROCK" not in made and "ANTHROPIC_API_KEY" not in made
        assert made["NO_PROXY"] == "a.test,localhost,127.0.0.1"

    ODD_IDS = {
        "what shells know": "a/$(touch x) 'b' \"c\" `d`; {e} \\ \\' ~ * ? ! # & | < > () [] % ^ $x",
        "a straight quote": "m'; touch x; '",
        "curved single quotes": "\u2018m\u2019; touch x; \u201a\u201b '\u2019\u2018' \u2019",
        "curved double quotes": "m\u201c; touch x; \u201d \u201e \"",
        "dashes": "\u2013m \u2014m \u2015m -m --% m",
        "other spaces": "m\u00a0m\u2009m\u3000m  m",
        "a backslash at the end": "m\\",
        "nothing but quotes": "'\u2019\u2019'\u2018",
        "what looks quoted": "'m' + 'n'",
        "other scripts": "模型/naïve-🦙",
    }

    @pytest.mark.parametrize("shell", ["sh", "dash", "bash", "zsh", "fish"])
    def test_the_printed_lines_are_safe_to_eval(self, tmp_path, shell):
        if not shutil.which(shell):
            pytest.skip(f"no {shell} here")
        lines = []
        for odd in self.ODD_IDS.values():
            plan = self.plan(self.listing(odd))
            lines += ogx.shell_lines(plan.variables, "fish" if shell == "fish" else "sh")
            lines += ["printenv ANTHROPIC_DEFAULT_OPUS_MODEL", "printenv CLAUDE_CODE_USE_VERTEX"]
        (tmp_path / "here").mkdir()
        environ = {**os.environ, "CLAUDE_CODE_USE_VERTEX": "1", "HOME": str(tmp_path),
                   "LC_ALL": "C.UTF-8"}  # fmt: skip
        done = subprocess.run([shell, "-c", "\n".join([*lines, "true"])], capture_output=True,
                              cwd=tmp_path / "here", env=environ, check=True)  # fmt: skip
        told = done.stdout.decode().split("\n")
        assert told == [*self.ODD_IDS.values(), ""] and done.stderr == b""
        assert list((tmp_path / "here").iterdir()) == []

    def powershell_strings(self, line):
        """The strings of a line as PowerShell's tokenizer reads them (ScanStringLiteral), and what
        stands outside of them."""
        strings, outside, at = [], "", 0
        quotes = "'\u2018\u2019\u201a\u201b"
        while at < len(line):
            if line[at] not in quotes:
                outside, at = outside + line[at], at + 1
                continue
            text, at = "", at + 1
            while line[at] not in quotes or line[at + 1 : at + 2] in {*quotes}:
                at += line[at] in quotes
                text, at = text + line[at], at + 1
            strings, at = [*strings, text], at + 1
        return strings, outside

    @pytest.mark.parametrize("odd", ODD_IDS.values(), ids=ODD_IDS)
    def test_powershell_reads_each_value_as_one_string(self, odd):
        plan = self.plan(self.listing(odd))
        lines = ogx.shell_lines(plan.variables, "powershell")
        for (name, value), line in zip(plan.variables.items(), lines):
            assert not value or self.powershell_strings(line) == ([value], f"$env:{name} = ")

    @pytest.mark.parametrize("odd", [*ODD_IDS.values(), "m", "a/b:1.5@x ^ & | < >"],
                             ids=[*ODD_IDS, "plain", "signs"])  # fmt: skip
    def test_cmd_gets_what_its_quotes_hold(self, odd):
        """cmd expands %x% and !x! within quotes, another quote would end them, and what isn't
        ASCII depends on its code page."""
        plan = self.plan(self.listing(odd))
        if {*odd} & {*'%!"'} or not odd.isascii():
            message = refused(ogx.shell_lines, plan.variables, "cmd").message
            assert message.startswith("ANTHROPIC_DEFAULT_HAIKU_MODEL: cmd can't hold ")
        else:
            lines = ogx.shell_lines(plan.variables, "cmd")
            assert lines == [f'set "{name}={value}"' for name, value in plan.variables.items()]

    @cases("odd", ["\0", "a\0b", "a\nb", "a\rb", "\ud800", "a\udfffb", "\x1b[J"])  # fmt: skip
    def test_what_no_environment_can_hold_is_told_and_not_printed(self, odd, claude, capfd):
        good = {"id": "good", "custom_metadata": {"model_type": "llm"}}
        listing = {"data": [{"id": odd}, good], "tiers": {"opus": odd}}
        powershell = ["--print-env", "--shell", "powershell"]
        with FakeUpstream(models=(200, listing)) as fake:
            for flags in (["--print-env"], powershell, ["--check"], []):
                assert ogx.main(["connect", "claude", "--url", fake.url, *flags]) == 1
                out, err = capfd.readouterr()
                assert (out, err) == (
                    "", f"ANTHROPIC_DEFAULT_OPUS_MODEL: no variable can be {ascii(odd)}\n")
        assert refused(ogx.LaunchPlan, {"A": odd}).message.startswith("A: ")
        plan = self.plan({"data": [{"id": odd}, good]})
        assert self.tiers(plan) == ["good"] * 4

    @cases(
        ("given", "url"),
        [
            ({}, "http://localhost:8321"),
            ({"port": 9000}, "http://localhost:9000"),
            ({"host": "192.168.1.100", "port": 9000}, "http://192.168.1.100:9000"),
            ({"host": "::1"}, "http://[::1]:8321"),
            ({"host": "https://gw.test/x"}, "https://gw.test/x"),
            ({"host": "http://gw.test", "port": 90}, "http://gw.test:90"),
            ({"url": "http://localhost:8321/v1"}, "http://localhost:8321"),
            ({"url": "http://localhost:8321/v1/"}, "http://localhost:8321"),
            ({"url": "localhost:99"}, "http://localhost:99"),
            ({"host": "localhost:99"}, "http://localhost:99"),
        ],
    )
    def test_where_the_server_is(self, given, url):
        assert ogx.server_url(options(**given), {}) == url

    @pytest.mark.parametrize("url", ["http://localhost:abc", "http://localhost:99999",
                                     "http://[::1", "ftp://x", "http://"])  # fmt: skip
    def test_a_url_that_is_none_is_told(self, url):
        assert "expected a URL like" in refused(ogx.server_url, options(url=url), {}).message

    def test_ogx_port_is_read(self):
        assert ogx.server_url(options(), {"OGX_PORT": "9000"}) == "http://localhost:9000"
        assert ogx.server_url(options(port=1), {"OGX_PORT": "9000"}) == "http://localhost:1"

    def test_lines_for_other_shells(self):
        plan = ogx.LaunchPlan({"A": "it's \\ $x", "B": ""})
        assert ogx.shell_lines(plan.variables, "fish") == [r"set -gx A 'it\'s \\ $x'", "set -e B"]
        assert ogx.shell_lines(plan.variables, "powershell") == [
            "$env:A = 'it''s \\ $x'", "Remove-Item Env:B -ErrorAction SilentlyContinue"
        ]

    def test_a_small_window_is_warned_of(self):
        told = "\n".join(ogx.plan_lines(self.plan(self.listing("a", max_input_tokens=32768))))
        assert "window  32,768 tokens" in told and "warning: " in told
        told = "\n".join(ogx.plan_lines(self.plan(self.listing("a", max_input_tokens=131072))))
        assert "window  131,072 tokens" in told and "warning" not in told

    def test_discovery_is_on_where_claude_code_would_list_something(self):
        name = "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY"
        assert name not in self.plan(self.listing("a")).variables
        assert self.plan(self.listing("a", "anthropic/claude-x")).variables[name] == "1"
        alias = {"id": "claude-haiku-4-5", "custom_metadata": {"alias_of": "a"}}
        assert name not in self.plan({"data": [{"id": "a"}, alias]}).variables

    @cases(
        ("arguments", "interactive"),
        [
            ([], True), (["hello there"], True), (["--continue"], True), (["--model", "x"], True),
            (["-p", "hi"], False), (["--print"], False), (["mcp", "list"], False),
            (["fix"], True),
            (["--permission-mode", "plan"], False), (["--permission-mode=plan"], False),
            (["--dangerously-skip-permissions"], False), (["--version"], False),
        ],
    )  # fmt: skip
    def test_when_the_permission_mode_is_ours_to_choose(self, arguments, interactive):
        assert ogx.is_interactive(["claude", *arguments]) is interactive

    @cases(
        ("arguments", "rest", "value"),
        [
            (["-p", "x"], ["-p", "x"], ""),
            (["--settings", "a", "-p"], ["-p"], "a"),
            (["--settings=a", "--settings", "b"], [], "b"),
            (["--settings"], [], ""),
        ],
    )
    def test_the_users_own_settings_flag(self, arguments, rest, value):
        assert ogx.without_settings_flag(arguments) == (rest, value)

    # -- as a command

    @pytest.fixture
    def claude(self, tmp_path, monkeypatch):
        """A program named claude that tells its arguments, environment and settings file, and
        exits with 7; in a home and a project of its own."""
        script = tmp_path / "claude"
        script.write_text(
            f"#!{sys.executable}\nimport json, os, sys\nargs, settings = sys.argv[1:], None\n"
            "if '--settings' in args:\n    path = args[args.index('--settings') + 1]\n"
            "    settings = [path, os.stat(path).st_mode & 0o777, json.load(open(path))]\n"
            "print(json.dumps([args, dict(os.environ), settings]))\nsys.exit(7)\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        for name in ("OGX_PORT", "OGX_API_KEY", "CLAUDE_CONFIG_DIR"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "home" / ".claude").mkdir(parents=True)
        (tmp_path / "project").mkdir()
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("OGX_STATE", str(tmp_path / "state.sqlite"))
        monkeypatch.chdir(tmp_path / "project")
        return tmp_path

    def launch(self, client, capfd, *words):
        """What the program told: its arguments, its environment, its settings."""
        assert ogx.main(["connect", "claude", "--port", str(client.port), *words]) == 7
        return json.loads(capfd.readouterr().out)

    @pytest.mark.parametrize(
        ("where", "settings"),
        [
            ("home/.claude/settings.json", {"env": {"ANTHROPIC_BASE_URL": "http://elsewhere"}}),
            ("home/.claude/settings.json", {"env": {"CLAUDE_CODE_USE_BEDROCK": "1"}}),
            ("home/.claude/settings.json", {"apiKeyHelper": "echo key"}),
            ("project/.claude/settings.json", {"env": {"ANTHROPIC_API_KEY": "sk"}}),
            ("project/.claude/settings.json", {"env": {"HTTP_PROXY": "http://x", "no_proxy": "x"}}),
            ("project/.claude/settings.local.json", {"env": {"ANTHROPIC_AUTH_TOKEN": "x"}}),
            ("project/nowhere/known/settings.json", {}),
        ],
        ids=["url", "bedrock", "helper", "key", "proxy", "token", "none"],
    )
    def test_settings_of_our_own_beat_all_others(self, claude, capfd, where, settings):
        path = claude / where
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps(settings))
        with gateway_over() as (client, _):
            arguments, _, (file, mode, made) = self.launch(client, capfd, "--", "-p", "hi")
        assert arguments == ["--settings", file, "-p", "hi"] and mode == 0o600
        assert made["env"]["ANTHROPIC_BASE_URL"] == f"http://localhost:{client.port}"
        assert made["env"]["CLAUDE_CODE_USE_BEDROCK"] == "" and made["apiKeyHelper"] == ""
        for name in ("NO_PROXY", "no_proxy"):
            assert {"localhost", "127.0.0.1"} <= {*made["env"][name].split(",")}
        assert set(made) == {"env", "apiKeyHelper", "modelPicker", "skipWebFetchPreflight",
                             "statusLine"}  # fmt: skip
        assert not os.path.exists(file)
        assert json.loads(path.read_text()) == settings

    def test_what_the_users_settings_say_besides_stays(self, claude, capfd):
        (claude / "home/.claude/settings.json").write_text('{"env": {"MY": "1"}, "model": "opus"}')
        (claude / "project/.claude").mkdir()
        (claude / "project/.claude/settings.json").write_text("{broken")
        with gateway_over() as (client, _):
            _, _, (_, _, made) = self.launch(client, capfd, "--", "-p", "hi")
        assert "MY" not in made["env"] and "model" not in made

    def endless(self, path, kind):
        """Put in the place of a settings file what a reader must not wait for, or can't hold."""
        path.parent.mkdir(exist_ok=True)
        if kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a folder":
            path.mkdir()
        elif kind == "a large file":
            with path.open("wb") as file:
                file.write(b'{"env": {"ANTHROPIC_BASE_URL": "http://elsewhere"}}')
                file.truncate(1 << 30)
        elif kind == "a circle":
            path.symlink_to(path)
        else:
            path.symlink_to(kind)

    @pytest.mark.skipif(os.name == "nt", reason="has no such files")
    @pytest.mark.parametrize("kind", ["/dev/zero", "/dev/tty", "/proc/kmsg", "a pipe", "a folder",
                                      "a large file", "a circle"])  # fmt: skip
    def test_settings_that_never_end_are_left_out(self, claude, capfd, kind):
        for where in ("home/.claude.json", "project/.claude/settings.json"):
            self.endless(claude / where, kind)
            assert ogx.read_settings(str(claude / where)) is None
        with gateway_over() as (client, _):
            made = self.launch(client, capfd, "--", "-p", "hi")[2][2]
            assert made["env"]["ANTHROPIC_BASE_URL"] == f"http://localhost:{client.port}"
            assert ogx.main(["connect", "claude", "--print-env", "--port", str(client.port)]) == 0
            script = claude / "claude"  # it says what is wrong with them
            script.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\n")
            capfd.readouterr()
            words = ["--settings", str(claude / "home/.claude.json")]
            assert ogx.main(["connect", "claude", "--port", str(client.port), "--", *words]) == 0
        assert ast.literal_eval(capfd.readouterr().out) == words

    @pytest.mark.parametrize(
        "data",
        ['{"a": 1}'.encode("utf-16"), b'\xef\xbb\xbf{"a": 1}', b'{"a": 1}' + b" " * 2_000_000],
        ids=["utf-16", "byte order mark", "padded"],
    )
    def test_settings_that_claude_code_would_read_are_read(self, tmp_path, data):
        (tmp_path / "settings.json").write_bytes(data)
        assert ogx.read_settings(str(tmp_path / "settings.json")) == {"a": 1}

    @cases("text", ["", "{", "[1]", "1", "null", "\0", "{" * 9999,
                                      '{"a":' * 99999])
    def test_settings_that_are_none(self, tmp_path, text):
        path = tmp_path / "settings.json"
        path.write_text(text)
        assert ogx.read_settings(str(path)) is None and ogx.read_settings(text) is None

    @pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY", "No_Proxy", "anthropic_base_url",
                                      "ANTHROPIC_API_KEY", "Anthropic_Default_Model"])  # fmt: skip
    def test_print_env_warns_of_a_variable_in_any_case(self, name):
        plan = self.plan(self.listing("a"))
        assert ogx.overrides({"env": {name: "x"}}, plan)
        for settings in ({"env": {"MY": "1"}}, {"env": [name]}, {"env": name}, {}):
            assert not ogx.overrides(settings, plan)

    @pytest.mark.parametrize("as_file", [True, False])
    def test_the_users_own_settings_are_merged(self, claude, capfd, as_file):
        own = json.dumps({"env": {"MY": "1", "ANTHROPIC_BASE_URL": "x"}, "theme": "dark"})
        if as_file:
            (claude / "own.json").write_text(own)
            own = str(claude / "own.json")
        with gateway_over() as (client, _):
            _, _, (_, _, made) = self.launch(client, capfd, "--", "-p", "hi", "--settings", own)
        assert (made["theme"], made["env"]["MY"]) == ("dark", "1")
        assert made["env"]["ANTHROPIC_BASE_URL"] == f"http://localhost:{client.port}"

    def test_the_picker_has_the_tiers_models_and_then_the_others(self):
        listing = {"data": [
            {"id": "v/a", "custom_metadata": {"provider_id": "v"}, "max_input_tokens": 65_536},
            {"id": "v/b", "custom_metadata": {"provider_id": "\x1b[2J"}, "max_input_tokens": -1},
            {"id": "v/c"}, {"id": "bad\nid"}, *({"id": f"v/{n}"} for n in range(99)),
        ]}  # fmt: skip
        rows = ogx.picker_rows(self.plan(listing, haiku_model="v/b", model="v/c"))
        assert [row["model"] for row in rows[:4]] == ["v/b", "v/c", "v/a", "v/0"]
        assert [row["description"] for row in rows[:4]] == [
            "haiku", "sonnet and opus and fable", "v, 65,536 tokens", "served by ogx.py"]
        assert len(rows) == 60 and all(set(row) == {"model", "label", "description"}
                                       for row in rows)

    @pytest.mark.parametrize("place", ["given", "user's"])
    def test_a_picker_of_the_users_own_stays(self, claude, capfd, place):
        own = {"modelPicker": {"options": []}, "skipWebFetchPreflight": False}
        path = claude / ("home/.claude/settings.json" if place == "user's" else "own.json")
        path.write_text(json.dumps(own))
        given = ["--settings", str(path)] * (place == "given")
        with gateway_over() as (client, _):
            made = self.launch(client, capfd, "--", "-p", "hi", *given)[2][2]
        assert made.get("modelPicker") == (own["modelPicker"] if place == "given" else None)

    @cases(("stored", "words"), [
        ("openai/gpt-x", "model   openai/gpt-x, chosen in your settings"),
        ("azure/gone", "warning: your settings choose the model azure/gone"),
        ("opus", ""), ("claude-sonnet-5[1m]", ""), ("default", ""), (7, ""), ("a\x1b[2J", "")])
    def test_a_model_in_the_users_settings_is_told(self, claude, capfd, stored, words):
        (claude / "home/.claude/settings.json").write_text(json.dumps({"model": stored}))
        with gateway_over() as (client, _):
            port = str(client.port)
            assert ogx.main(["connect", "claude", "--port", port, "--", "-p", "hi"]) == 7
            told = capfd.readouterr().err
            assert ogx.main(["connect", "claude", "--port", port, "--model", "openai/gpt-x"]) == 7
        assert words in told and ("settings" in told) == bool(words)
        assert ("Claude Code keeps openai/gpt-x" in told) == (stored == "openai/gpt-x")
        assert "chosen in your settings" not in capfd.readouterr().err

    def test_a_small_window_starts_lean(self, claude, capfd):
        small = self.listing("a", max_input_tokens=16_384)
        plan = self.plan(small)
        assert plan.lean and plan.variables["CLAUDE_CODE_DISABLE_WORKFLOWS"] == "1"
        assert any("--no-lean" in line for line in ogx.plan_lines(plan))
        for larger in (self.plan(self.listing("a", max_input_tokens=32_768)),
                       self.plan(self.listing("a"))):
            assert not larger.lean and "CLAUDE_CODE_DISABLE_WORKFLOWS" not in larger.variables

    @cases(("flag", "words", "tools"), [
        ("--lean", ["-p", "hi"], ["--tools", "Bash,Read,Edit,Write,Grep,Glob"]),
        ("--no-lean", ["-p", "hi"], []), ("--lean", ["--tools", "Bash", "-p", "hi"], []),
        ("--lean", ["-p", "hi", "--tools=Bash"], []), ("--lean", ["mcp", "list"], [])])
    def test_lean_leaves_tools_out(self, claude, capfd, flag, words, tools):
        with gateway_over() as (client, _):
            arguments = self.launch(client, capfd, flag, "--", *words)[0]
        assert arguments[2:] == [*tools, *words]

    def test_models_of_other_jobs(self):
        listing = self.listing("a", "b")
        plan = self.plan(listing, subagent_model="b", auto_model="a")
        assert plan.variables["CLAUDE_CODE_SUBAGENT_MODEL"] == "b"
        assert plan.variables["CLAUDE_CODE_AUTO_MODE_MODEL"] == "a"
        assert {"CLAUDE_CODE_SUBAGENT_MODEL",
                "CLAUDE_CODE_AUTO_MODE_MODEL"} <= self.unset(self.plan(listing))
        assert "model 'c'" in refused(self.plan, listing, auto_model="c").message

    def test_a_tiers_model_that_is_not_listed_is_told(self):
        plan = self.plan(self.listing("a", tiers={"opus": "azure/mine"}))
        assert [line for line in ogx.plan_lines(plan) if "not in" in line] == [
            "  opus    azure/mine  (not in its provider's list)"]

    def test_permissions_are_asked_for_unless_the_user_chose(self, claude, capfd):
        with gateway_over() as (client, _):
            assert self.launch(client, capfd)[0][2:] == ["--permission-mode", "default"]
            assert self.launch(client, capfd, "--", "--permission-mode", "plan")[0][2:] == [
                "--permission-mode", "plan"
            ]
            path = claude / "home/.claude/settings.json"
            path.write_text('{"permissions": {"defaultMode": "acceptEdits"}}')
            assert self.launch(client, capfd)[0][2:] == []

    def test_the_model_flag_goes_before_the_settings_model(self, claude, capfd):
        (claude / "home/.claude/settings.json").write_text('{"model": "claude-opus-4-5"}')
        with gateway_over() as (client, _):
            flag = ["--model", "openai/gpt-x", "--", "-p", "hi"]
            assert self.launch(client, capfd, *flag)[2][2]["model"] == "openai/gpt-x"
            assert "model" not in self.launch(client, capfd, "--", "-p", "hi")[2][2]

    def test_settings_with_a_byte_order_mark_and_those_in_claude_json_count(self, claude, capfd):
        evil = json.dumps({"env": {"ANTHROPIC_BASE_URL": "http://elsewhere"}})
        for path in (claude / "home/.claude/settings.json", claude / "home/.claude.json"):
            path.write_text("\ufeff" + evil, encoding="utf-8")
            with gateway_over() as (client, _):
                made = self.launch(client, capfd, "--", "-p", "hi")[2][2]
            assert made["env"]["ANTHROPIC_BASE_URL"] == f"http://localhost:{client.port}"
            path.unlink()

    def test_settings_that_cannot_be_read_are_left_to_claude_code(self, claude, capfd, monkeypatch):
        script = claude / "claude"
        script.write_text(
            f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
        )
        with gateway_over() as (client, _):
            words = ["-p", "hi", "--settings", "/no/such.json"]
            assert ogx.main(["connect", "claude", "--port", str(client.port), "--", *words]) == 0
        assert json.loads(capfd.readouterr().out) == words

    @pytest.mark.parametrize(
        ("environ", "capitals", "small"),
        [
            ({}, "localhost,127.0.0.1", "localhost,127.0.0.1"),
            ({"NO_PROXY": "*"}, "*", "*"),
            ({"no_proxy": " * "}, "*", "*"),
            ({"NO_PROXY": "a, b\n"}, "a,b,localhost,127.0.0.1", "a,b,localhost,127.0.0.1"),
            ({"no_proxy": "corp.test", "NO_PROXY": ""}, *["corp.test,localhost,127.0.0.1"] * 2),
            ({"no_proxy": "a", "NO_PROXY": "b,127.0.0.1"}, "b,127.0.0.1,localhost",
             "a,localhost,127.0.0.1"),
        ],
        ids=["none", "all", "all, small", "capitals", "small", "both"],
    )  # fmt: skip
    def test_no_proxy_in_both_spellings(self, environ, capitals, small):
        plan = self.plan(self.listing("a"), environ)
        assert (plan.variables["NO_PROXY"], plan.variables["no_proxy"]) == (capitals, small)

    def test_quiet(self, claude, capfd):
        with gateway_over() as (client, _):
            ogx.main(["connect", "claude", "--port", str(client.port), "--quiet"])
        assert capfd.readouterr().err == ""

    def test_a_token_is_shown_to_a_server_that_asks_for_one(self, claude, capfd, monkeypatch):
        (claude / "token").write_text("s3cret\n")
        with gateway_over() as (client, _):
            ask_for_token(client.server, "s3cret")
            assert ogx.main(["connect", "claude", "--port", str(client.port)]) == 1
            assert "set OGX_API_KEY, or use --api-key-file" in capfd.readouterr().err
            flag = ["--api-key-file", str(claude / "token")]
            _, environ, _ = self.launch(client, capfd, *flag)
            assert environ["ANTHROPIC_AUTH_TOKEN"] == "s3cret"
            monkeypatch.setenv("OGX_API_KEY", "s3cret")
            assert self.launch(client, capfd)[1]["ANTHROPIC_AUTH_TOKEN"] == "s3cret"

    @pytest.mark.parametrize(("content", "words"), [("", "the file is empty"), (None, "No such"),
                                                    ("a b", "printable ASCII")])  # fmt: skip
    def test_a_token_file_that_holds_none(self, claude, capfd, content, words):
        if content is not None:
            (claude / "token").write_text(content)
        flag = ["--api-key-file", str(claude / "token")]
        assert ogx.main(["connect", "claude", *flag]) == 1
        assert words in capfd.readouterr().err

    HEADER = ["model", "tiers", "first", "total", "tokens/s", "tools", "JSON", "images", "cached",
              "window", "believed"]  # fmt: skip
    GOOD = sse(delta(tool_calls=[fragment(0, "a", "add", '{"a":2,"b":3}')]),
               delta("tool_calls", USAGE))  # fmt: skip
    JSON_ANSWER, COLOUR = said('{"a": 2, "b": 3}'), said("Green.")

    def checked(self, capfd, *flags):
        """The exit code of --check, its rows by column, and the other lines."""
        code = ogx.main(["connect", "claude", "--check", *flags])
        header, *lines = capfd.readouterr().out.splitlines()
        places = [(name, re.search(rf"(?<!\S){name}(?!\S)", header).start())
                  for name in self.HEADER]  # fmt: skip
        assert header.split() == self.HEADER
        rows = [{name: line[at:].split("  ")[0].strip() for name, at in places}
                for line in lines if line[0] != " "]  # fmt: skip
        return code, rows, [line.strip() for line in lines if line[0] == " "]

    def test_check_prints_a_table_of_every_tiers_model(self, claude, capfd):
        cached = {**USAGE, "prompt_tokens_details": {"cached_tokens": 5}}
        again = sse(delta(tool_calls=[fragment(0, "a", "add", '{"a":2,"b":3}')]),
                    delta("tool_calls", cached))  # fmt: skip
        first = [self.GOOD, again, self.JSON_ANSWER, self.COLOUR]
        listed = 200, {"data": [{"id": "a", "context_length": 131_072}, {"id": "b"}]}
        with gateway_over(*first, said("5"), models=listed) as (client, upstream):
            flags = ["--port", str(client.port), "--haiku-model", "openai/a", "--model", "openai/b"]
            code, (one, two), lines = self.checked(capfd, *flags)
            assert (code, len(upstream.raw)) == (1, 8) and upstream.raw[0] == upstream.raw[1]
            timed = {name: one.pop(name) for name in ("first", "total", "tokens/s")}
            assert one == {"model": "openai/a", "tiers": "haiku", "tools": "yes", "JSON": "yes",
                           "images": "yes", "cached": "5 of 50", "window": "131,072",
                           "believed": "200,000"}  # fmt: skip
            assert all(re.fullmatch(r"\d+(\.\d\d s)?|-", value) for value in timed.values())
            told = [two[name] for name in self.HEADER[5:]]
            assert two["tiers"] == "sonnet, opus, fable"
            assert told == ["no", "no", "no", "20 of 50", "unknown", "200,000"]
            assert [line.split(":")[0] for line in lines] == ["tools", "JSON", "images", "window"]
            assert "--context" in lines[-1]
            image = upstream.seen[3]["messages"][0]["content"][0]["image_url"]["url"]
            assert image == "data:image/png;base64," + ogx.GREEN
            assert upstream.seen[2]["response_format"]["type"] == "json_schema"

    @pytest.mark.parametrize(("answers", "code", "problem"), [
        ([(500, {"error": {"message": "oops"}})], 1, "tools: oops (from openai, model a)"),
        ([GOOD, (500, {"error": {"message": "not twice"}})], 1,
         "tools: not twice (from openai, model a)"),
        ([GOOD, GOOD, (400, {"error": {"message": "no such format"}})], 0,
         "JSON: no such format (from openai, model a)"),
        ([GOOD, GOOD, said("a is 2, b is 3"), COLOUR], 0,
         "JSON: answers otherwise where JSON is asked for"),
        ([GOOD, GOOD, said('{"a": 2}'), COLOUR], 0,
         "JSON: answers otherwise where JSON is asked for"),
        ([GOOD, GOOD, JSON_ANSWER, said("Red.")], 0,
         "images: sees no images: Claude Code's screenshots and pictures are lost on it"),
        ([sse(delta("length", reasoning="Well, ..."))], 1,
         "tools: its 2,000 tokens were used up before it was done")],
        ids=["error", "again", "format", "words", "half", "blind", "spent"])  # fmt: skip
    def test_check_says_what_fails(self, claude, capfd, answers, code, problem):
        with gateway_over(*answers, models=["a"]) as (client, _):
            flags = ["--port", str(client.port), "--context", "64000"]
            found, (row,), lines = self.checked(capfd, *flags)
        assert found == code and lines[0] == problem
        assert row["tiers"] == "all" and row[problem.split(":")[0]] == "no"
        assert row["believed"] == "64,000" and "window: unknown" not in " ".join(lines)

    def test_check_shows_each_window_where_they_are_told_apart(self, claude, capfd):
        listed = 200, {"data": [{"id": "a", "context_length": 131_072},
                                {"id": "b", "context_length": 1_000_000}]}  # fmt: skip
        answers = [self.GOOD, self.GOOD, self.JSON_ANSWER, self.COLOUR] * 2
        with gateway_over(*answers, models=listed) as (client, _):
            flags = ["--port", str(client.port), "--model", "openai/a", "--opus-model", "openai/b"]
            code, rows, lines = self.checked(capfd, *flags)
        assert [row["believed"] for row in rows] == ["131,072", "1,000,000"]
        assert (code, lines) == (0, [])

    def test_check_tells_the_demo_model_as_such(self, claude, capfd):
        with serving(ogx.DEMO_PROVIDER) as client:
            code, (row,), lines = self.checked(capfd, "--port", str(client.port))
        assert (code, row["model"], row["tools"]) == (1, "demo/echo", "no")
        assert "no real model" in lines[-1]

    CALL = {"type": "tool_use", "id": "t", "name": "add", "input": {}}
    USES = [{"type": "message_start", "message": {"content": [], "usage": {}}},
            {"type": "content_block_start", "index": 0, "content_block": CALL},
            {"type": "content_block_delta", "index": 0,
             "delta": {"type": "input_json_delta", "partial_json": '{"a":2,"b":3}'}},
            {"type": "message_delta", "delta": {}, "usage": {}}]  # fmt: skip
    FORMAT = "answers in another format than Anthropic's"
    WORKS = "0 of 0"

    def counted(new, written, cached, events=USES):  # noqa: N805
        usage = {"input_tokens": new, "cache_creation_input_tokens": written,
                 "cache_read_input_tokens": cached}  # fmt: skip
        return [*events[:3], {**events[3], "usage": usage}]

    def called_with(given, call=CALL):  # noqa: N805
        content = [{**call, "input": given}]
        return [{"type": "message_start", "message": {"content": content, "usage": {}}}]

    @cases(
        ("status", "body", "verdict"),
        [
            (200, USES, WORKS),
            (200, said("5"), FORMAT),
            (200, b"5", "an empty answer"),
            (200, b"[1, 2]", FORMAT),
            (200, b'{"id": "x"}', FORMAT),
            (200, b"nothing of JSON", "an empty answer"),
            (200, b"<html><title>Log in</title>", FORMAT),
            (200, b'{"a":' * 5000, FORMAT),
            (200, b'data: {"a":' + b"[" * 100_000 + b"\n\n", FORMAT),
            (200, b"data: " + b"9" * 5000 + b"\n\n", FORMAT),
            (200, [{"type": "error"}], '{"type": "error"}'),
            (200, [{"type": "error", "error": {"type": "x"}}],
             '{"type": "error", "error": {"type": "x"}}'),
            (200, [{"type": "error", "error": 5}], '{"type": "error", "error": 5}'),
            (200, [{"type": "error", "error": {"type": "x", "message": "a\n\ud800\x1b b"}}],
             "a ?? b"),
            (200, [{"type": "error", "error": {"type": "x", "message": " "}}], "failed"),
            (200, [{"type": "error", "error": {"type": "x", "message": 5}}],
             '{"type": "error", "error": {"type": "x", "message": 5}}'),
            (200, [{"no": "type"}, *USES], FORMAT),
            (200, [{"type": 5}, *USES], WORKS),
            (200, counted(9, 3, 20), "20 of 32"),
            (200, counted(0, 0, 95), "95 of 95"),
            (200, counted("9", None, [5]), WORKS),
            (200, [{**USES[0], "message": {"content": []}}, *USES[1:3]], FORMAT),
            (200, USES[1:], FORMAT),
            (200, [USES[0], USES[2]], FORMAT),
            (200, [{"type": "message_start"}], FORMAT),
            (200, [{"type": "message_start", "message": "x"}], FORMAT),
            (200, [{"type": "message_start", "message": {"content": 5}}], FORMAT),
            (200, [{"type": "message_start", "message": {"content": [5]}}], FORMAT),
            (200, [{"type": "message_start", "message": {"content": [{}]}}], FORMAT),
            (200, called_with(5), FORMAT),
            (200, called_with([[]]), FORMAT),
            (200, called_with(["\ud800"]), 'called the tool wrongly, with ["\\ud800"]'),
            (200, USES[:1],
             "answers, but called no tool: does the model, and its server, do tools?"),
            (200, b"data\n\n: hello\n\nevent: message_start\n\n", "an empty answer"),
            (200, b" " * 1_000_000, "an empty answer"),
            (200, b"", "an empty answer"),
            (200, [{"type": "ping"}] * 30_000, "an answer without end"),
            (204, b"", "No Content"),
            (302, b"", "Found"),
            (503, b'{"error": {"message": "a\\nb"}}', "a b"),
            (500, b"\xff\xfe\x00", "Internal Server Error"),
        ],
    )  # fmt: skip
    def test_check_takes_any_answer(self, capfd, status, body, verdict):
        if isinstance(body, list):
            body = b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in body)

        def answer(fake, connection):
            send(connection, status, body, "text/event-stream")

        flags = ["--haiku-model", "a", "--model", "b"]
        with FakeUpstream(*[answer] * 8, models=["a", "b"]) as fake:
            code, (one, two), lines = self.checked(capfd, "--url", fake.url, *flags)
        assert [one["model"], two["model"]] == ["a", "b"]
        works = " of " in verdict
        assert {one["tools"], two["tools"]} == {"yes" if works else "no"}
        assert works == (one["cached"] == verdict) and code == int(not works)
        assert works or lines.count(f"tools: {verdict}") == 2

    @cases(
        "listing",
        [b"5", b"[]", b"{", b'{"data": 5}', b'{"data": ' + b"[" * 100_000, b"\xff", b"",
         b" " * 10**6,
         b'{"data": [{"id": 9%s}]}' % (b"9" * 5000), b'{"data": []}',
         b'{"data": [[], 5, null, {}]}',
         b'{"data": [{"id": 5}, {"id": ""}, {"id": null}, {"id": {}}, {"id": ["a"]}]}',
         b'{"data": [{"id": "%s"}]}' % (b"m" * 257), b'{"data": [{"id": "a\\u0000"}]}'],
    )  # fmt: skip
    @pytest.mark.parametrize("flag", ["--print-env", "--check", "--quiet"])
    def test_model_lists_of_any_shape_are_one_clear_error(self, claude, capfd, listing, flag):
        with FakeUpstream(models=(200, listing)) as fake:
            assert ogx.main(["connect", "claude", flag, "--url", fake.url]) == 1
        out, err = capfd.readouterr()
        words = "Failed to (query models from|find any LLM models) .*\n"
        assert out == "" and re.fullmatch(words, err)

    def test_odd_entries_of_a_model_list_are_passed_over(self, claude, capfd):
        odd = [{"id": "x" * 257}, {"id": "a\0"}, {"id": "\ud800"}, {"id": 5}, 5, None, [],
               {"id": {}}, {"id": "b", "custom_metadata": {"model_type": []}}]  # fmt: skip
        good = {"id": "good", "custom_metadata": [], "max_input_tokens": "many", "max_tokens": -1}
        many = [{"id": f"m{n}", "max_input_tokens": 10**300} for n in range(10_000)]
        listing = {"data": [*odd, good, *many], "tiers": {"haiku": 5, "opus": "", "sonnet": "m7"}}
        with FakeUpstream(models=(200, listing)) as fake:
            assert ogx.main(["connect", "claude", "--url", fake.url]) == 7
        made = json.loads(capfd.readouterr().out)[1]
        tiers = [made[f"ANTHROPIC_DEFAULT_{t.upper()}_MODEL"] for t in ogx.TIERS]
        assert tiers == ["good", "m7", "good", "good"]

    def test_a_servers_choice_that_is_too_long_to_launch_is_told(self, claude, capfd):
        listing = {"data": [{"id": "a"}], "tiers": {"opus": "m" * 5_000_000}}
        with FakeUpstream(models=(200, listing)) as fake:
            assert ogx.main(["connect", "claude", "--quiet", "--url", fake.url]) == 1
        assert re.fullmatch("Failed to start '.*claude': .*\n", capfd.readouterr().err)

    # -- the status line

    @pytest.mark.parametrize("place", ["given", "user's", "project's", "local", "flag", "nowhere"])
    def test_a_status_line_where_the_user_has_none(self, claude, capfd, place):
        own = {"statusLine": {"type": "command", "command": "mine"}}
        path = claude / {"user's": "home/.claude/settings.json",
                         "project's": "project/.claude/settings.json",
                         "local": "project/.claude/settings.local.json"}.get(place, "own.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({} if place == "nowhere" else own))
        flags = ["--no-statusline"] * (place == "flag")
        given = ["--settings", str(path)] * (place == "given")
        with gateway_over() as (client, _):
            made = self.launch(client, capfd, *flags, "--", "-p", "hi", *given)[2][2]
        ours = {"type": "command", "command": shlex.join((sys.executable, ogx.__file__,
                                                          "statusline"))}  # fmt: skip
        assert made.get("statusLine") == {"given": own["statusLine"], "nowhere": ours}.get(place)

    def status_line(self, monkeypatch, capfd, url, described, token=""):
        described = described if isinstance(described, bytes) else json.dumps(described).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(described)))
        monkeypatch.setenv("ANTHROPIC_BASE_URL", url)
        monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", token)
        assert ogx.main(["statusline"]) == 0
        out, err = capfd.readouterr()
        assert err == "" and out.endswith("\n") and out.count("\n") == 1
        return out[:-1]

    def test_it_tells_what_the_server_knows(self, monkeypatch, capfd):
        described = {"session_id": "s-1", "model": {"id": "openai/other"}}
        listed = 200, {"data": [{"id": "gpt-x", "context_length": 1000}, {"id": "small"}]}
        with gateway_over(said("a"), said("b"), models=listed) as (client, _):
            url = f"http://127.0.0.1:{client.port}"
            ask_for_token(client.server, "s3cret")
            assert self.status_line(monkeypatch, capfd, url, described, "s3cret") == "openai/other"
            for model, job in (("gpt-x", "main"), ("small", "subagent")):
                client.post(request(model=f"openai/{model}"), x_claude_code_session_id="s-1",
                            x_claude_code_request_class=job, authorization="Bearer s3cret")
            told = self.status_line(monkeypatch, capfd, url, described, "s3cret")
            assert told == "openai/gpt-x | 100 tokens in, 40 % cached, 14 out | 5 % of 1,000"
            assert self.status_line(monkeypatch, capfd, url, described, "x") == "openai/other"

    def test_it_waits_for_no_server(self, monkeypatch, capfd):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            described = {"session_id": "s", "model": {"id": "m"}}
            assert self.status_line(monkeypatch, capfd, url, described) == "m"

    @cases(("answer", "described", "line"), [
        (None, {"session_id": "s", "model": {"id": "m"}}, "m"),
        ((200, b'{"model": "' + b"x" * 5_000_000), {"model": {"id": "m"}}, "m"),
        ((200, {"model": "a\x1b[2Jb\n\u202e", "input_tokens": 10**300, "context_tokens": "9"}),
         {}, None),
        ((200, {"model": 5, "input_tokens": -5, "output_tokens": 3, "max_input_tokens": 0}),
         {"model": {"id": "m"}}, ""),
        ((200, [1]), {"model": {"id": "m"}}, "m"),
        ((500, b""), {"model": {"id": "m\x1b]0;evil\x07"}}, "m?]0;evil?"),
        (None, b"", ""), (None, b"\xff\xfe", ""), (None, b"[" * 100_000, ""), (None, [], ""),
        (None, {"session_id": {"a": 1}, "model": "m"}, ""),
        (None, {"session_id": "\ud800", "model": {"id": "m\ud800"}}, "m?"),
        (None, {"session_id": "../../v1/models?x", "model": {"id": ["m"]}}, "")])  # fmt: skip
    @pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
    def test_it_is_one_harmless_line_in_time(self, monkeypatch, capfd, answer, described, line):
        with FakeUpstream(models=answer) as fake:
            url = fake.url[:-3] if answer else "http://127.0.0.1:9"
            told = self.status_line(monkeypatch, capfd, url, described)
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202e]", told) and len(told) < 700
        assert line is None or told == line

    @pytest.mark.parametrize("url", ["", "x", "ftp://x", "http://[", "http://user:pw@127.0.0.1:1"],
                             ids=["none", "word", "ftp", "half", "password"])  # fmt: skip
    def test_no_url_is_too_odd_for_it(self, monkeypatch, capfd, url):
        assert self.status_line(monkeypatch, capfd, url, {"model": {"id": "m"}}) == "m"

    # -- other clients

    def printed(self, capfd, client, *words):
        """What `connect` prints for a client of this name, and its hints."""
        flags = ["--port", str(client.port)]
        assert ogx.main(["connect", words[0], *flags, *words[1:]]) == 0
        out, err = capfd.readouterr()
        return out, err

    def test_opencode_gets_a_provider_of_its_own(self, claude, capfd, monkeypatch):
        (claude / "claude").rename(claude / "opencode")
        own = {"theme": "x", "model": "y", "provider": {"mine": {"a": 1}}}
        monkeypatch.setenv("OPENCODE_CONFIG_CONTENT", json.dumps(own))
        monkeypatch.setenv("OGX_API_KEY", "s3cret")
        listed = 200, {"data": [{"id": "a", "context_length": 8000}, {"id": "b"}]}
        with gateway_over(models=listed) as (client, _):
            ask_for_token(client.server, "s3cret")
            flags = ["--port", str(client.port), "--haiku-model", "openai/b"]
            assert ogx.main(["connect", "opencode", *flags, "run", "-c", "--", "--model"]) == 7
            out, err = capfd.readouterr()
            arguments, environ, _ = json.loads(out)
            shown = self.printed(capfd, client, "opencode", "--print-env", *flags[2:])[0]
        made = json.loads(environ["OPENCODE_CONFIG_CONTENT"])
        assert arguments == ["run", "-c", "--model"] and "opencode on http" in err
        assert (made["theme"], made["model"], made["small_model"]) == (
            "x", "ogx/openai/a", "ogx/openai/b")
        ours = made["provider"].pop("ogx")
        assert made["provider"] == own["provider"] and ours["npm"] == "@ai-sdk/anthropic"
        assert ours["options"] == {"baseURL": f"http://localhost:{client.port}/v1",
                                   "apiKey": "s3cret"}  # fmt: skip
        assert ours["models"] == {
            "openai/a": {"limit": {"context": 8000, "output": 2000}}, "openai/b": {}}  # fmt: skip
        made["provider"]["ogx"] = ours
        words = shlex.split(shown.splitlines()[0])
        assert words == ["export", "OPENCODE_CONFIG_CONTENT=" + json.dumps(made)]

    @pytest.mark.parametrize("odd", [*ODD_IDS.values(), "{file:~/.ssh/id}", "a{env:HOME}"],
                             ids=[*ODD_IDS, "file", "env"])  # fmt: skip
    def test_no_id_puts_a_file_into_opencodes_configuration(self, odd):
        plan = self.plan(self.listing(odd))
        own = {"OPENCODE_CONFIG_CONTENT": '{"theme": "{env:THEME}"}'}
        text = ogx.opencode_variables(plan, own)["OPENCODE_CONFIG_CONTENT"]
        made = json.loads(text)
        assert list(made["provider"]["ogx"]["models"]) == [odd]
        assert made["model"] == made["small_model"] == f"ogx/{odd}"
        assert re.findall("{[a-z]+:", text) == ["{env:"] and made["theme"] == "{env:THEME}"

    @pytest.mark.parametrize("own", ["{// mine\n}", "[]", "x"], ids=["comment", "list", "word"])
    def test_a_configuration_of_opencodes_that_is_none_is_told(self, own):
        plan = self.plan(self.listing("m"))
        error = refused(ogx.opencode_variables, plan, {"OPENCODE_CONFIG_CONTENT": own})
        assert error.message == "OPENCODE_CONFIG_CONTENT: expected a JSON object without comments"

    def test_opencode_that_is_not_there_is_told(self, claude, capfd, monkeypatch):
        monkeypatch.setenv("PATH", str(claude))
        assert ogx.main(["connect", "opencode"]) == 1
        assert "Failed to find 'opencode' in PATH" in capfd.readouterr().err

    def test_the_sdks_variables_are_printed(self, claude, capfd):
        with gateway_over() as (client, _):
            out, err = self.printed(capfd, client, "sdk")
            assert self.printed(capfd, client, "sdk", "--print-env") == (out, err) and err == ""
            cmd = self.printed(capfd, client, "sdk", "--shell", "cmd")[0].splitlines()
        names = ("ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_DEFAULT_OPUS_MODEL")
        script = f"eval {shlex.quote(out)}\nprintenv {' '.join(names)}"
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
        url = f"http://localhost:{client.port}"
        assert done.stdout.split() == [url, "ogx", "openai/gpt-x"]
        assert f"# export ANTHROPIC_BASE_URL={url}/v1" in out.splitlines()
        assert f'set "ANTHROPIC_BASE_URL={url}"' in cmd
        assert f'rem set "ANTHROPIC_BASE_URL={url}/v1"' in cmd

    def test_vs_codes_settings_are_printed(self, claude, capfd):
        with gateway_over() as (client, _):
            made = json.loads(self.printed(capfd, client, "vscode")[0])
        variables = {row["name"]: row["value"] for row in made["claudeCode.environmentVariables"]}
        assert variables["ANTHROPIC_BASE_URL"] == f"http://localhost:{client.port}"
        assert variables["ANTHROPIC_DEFAULT_OPUS_MODEL"] == "openai/gpt-x"
        assert variables["ANTHROPIC_API_KEY"] == "" and made["claudeCode.disableLoginPrompt"]

    @pytest.mark.parametrize(("system", "folder"), [
        ("linux", "conf"), ("darwin", "home/Library/Application Support"), ("win32", "local")],
        ids=["linux", "darwin", "win32"])  # fmt: skip
    def test_claude_desktop_is_printed_and_written(self, claude, capfd, monkeypatch, system,
                                                   folder):  # fmt: skip
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(claude / "conf"))
        monkeypatch.setenv("LOCALAPPDATA", str(claude / "local"))
        root = claude / folder / "Claude-3p"
        other = {"id": "other", "name": "Bedrock"}
        (root / "configLibrary").mkdir(parents=True)
        (root / "claude_desktop_config.json").write_text("{broken")
        meta = root / "configLibrary/_meta.json"
        meta.write_text(json.dumps({"appliedId": "other", "entries": [other], "x": 1}))
        with gateway_over() as (client, _):
            profile = json.loads(self.printed(capfd, client, "claude-desktop", "--print-env")[0])
            assert json.loads(meta.read_text())["appliedId"] == "other"
            told = self.printed(capfd, client, "claude-desktop", "--write")[1]
            assert not self.printed(capfd, client, "claude-desktop", "--write", "--print-env")[1]
            self.printed(capfd, client, "claude-desktop", "--write")
        assert profile == {
            "inferenceProvider": "gateway", "inferenceGatewayAuthScheme": "bearer",
            "inferenceGatewayBaseUrl": f"http://localhost:{client.port}",
            "inferenceGatewayApiKey": "ogx"}  # fmt: skip
        made = json.loads(meta.read_text())
        assert made["entries"] == [other, {"id": made["appliedId"], "name": "ogx.py"}]
        assert made["x"] == 1
        path = root / f"configLibrary/{made['appliedId']}.json"
        assert json.loads(path.read_text()) == profile and path.stat().st_mode & 0o777 == 0o600
        for name in ("Claude-3p", "Claude"):
            path = claude / folder / name / "claude_desktop_config.json"
            assert json.loads(path.read_text()) == {"deploymentMode": "3p"}
        copies = re.findall(r"what was there: (.*)\)", told)
        assert {Path(copy).read_text()[:7] for copy in copies} == {"{broken", '{"appli'}

    def test_what_cannot_be_written_is_told(self, claude, capfd, monkeypatch):
        (claude / "conf").write_text("a file")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(claude / "conf"))
        with gateway_over() as (client, _):
            flags = ["--port", str(client.port), "--write"]
            assert ogx.main(["connect", "claude-desktop", *flags]) == 1
        assert re.match(r"\S+/conf/Claude-3p/\S+: ", capfd.readouterr().err)

    @pytest.mark.parametrize(("name", "flag", "shell", "hint"), [
        ("claude", (), "/usr/bin/fish", True), ("sdk", (), "fish", True),
        ("claude", ("--shell", "sh"), "/usr/bin/fish", False), ("claude", (), "/bin/zsh", False),
        ("vscode", (), "/usr/bin/fish", False), ("claude", (), "", False)],
        ids=["claude", "sdk", "chosen", "zsh", "vscode", "none"])  # fmt: skip
    def test_fish_is_hinted_at(self, claude, capfd, monkeypatch, name, flag, shell, hint):
        monkeypatch.setenv("SHELL", shell)
        with gateway_over() as (client, _):
            err = self.printed(capfd, client, name, "--print-env", *flag)[1]
        assert ("--shell fish" in err) == hint

    @pytest.mark.parametrize(("words", "told"), [
        ((), "{claude,opencode,claude-desktop,vscode,sdk}"),
        (("claud",), "'claud', only claude, opencode, claude-desktop, vscode, sdk. Did you mean"),
        (("sdk", "-c"), "unrecognized arguments: -c"), (("vscode", "x"), "arguments: x"),
        (("sdk", "--", "x"), "arguments: x"), (("vscode", "--shell", "sh"), "arguments: --shell"),
        (("opencode", "--modle", "x"), "Did you mean --model?"),
        (("claude-desktop", "--wirte"), "Did you mean --write?"),
        (("sdk", "--check"), "unrecognized arguments: --check")],
        ids=["none", "claud", "flag", "word", "rest", "shell", "modle", "wirte", "check"])
    def test_what_a_client_has_not_is_told(self, claude, capfd, words, told):
        assert ogx.main(["connect", *words]) == 2
        assert told in capfd.readouterr().err

    # -- the program that is launched

    @pytest.mark.skipif(os.name == "nt", reason="absolute paths are written otherwise")
    @cases("path", ["", ":", "::/no/such", ".", "/no:", "bin", "./bin:.", None])
    def test_no_program_of_the_working_directory_is_run(self, claude, monkeypatch, path):
        (claude / "project/bin").mkdir()
        for folder in ("project", "project/bin"):
            shutil.copy(claude / "claude", claude / folder / "claude")
        environ = {} if path is None else {"PATH": path}
        with contextlib.suppress(ogx.OgxError):  # where this machine has one of its own
            program = ogx.client_program("claude", "x", environ)
            assert not program.startswith(str(claude))
        (claude / "home/.local/bin").mkdir(parents=True)
        known = str(shutil.copy(claude / "claude", claude / "home/.local/bin/claude"))
        assert ogx.client_program("claude", "x", environ) == known
        assert ogx.client_program("claude", "x", {"PATH": f".:{claude}"}) == str(claude / "claude")

    def test_a_program_that_the_system_finds_in_the_working_directory_is_none(self, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda *_, **__: ".\\claude.EXE")  # as on Windows
        error = refused(ogx.client_program, "claude", "x", {"PATH": "/bin"})
        assert error.message.startswith("Failed to find 'claude' in PATH.")

    # -- a server for the session

    @pytest.fixture
    def alone(self, claude, monkeypatch):
        """A provider that serves the model m, and no server at OGX_PORT."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            monkeypatch.setenv("OGX_PORT", str(free.getsockname()[1]))
        (claude / "tmp").mkdir()
        monkeypatch.setenv("TMPDIR", str(claude / "tmp"))
        monkeypatch.setattr(tempfile, "tempdir", None)
        for name in os.environ:
            if re.search("_API_KEY$|_URL$|TOKEN|ENDPOINT", name):
                monkeypatch.delenv(name)
        with FakeUpstream(models=["m"]) as upstream:
            monkeypatch.setenv("VLLM_URL", upstream.url)
            yield claude

    ASKS = f"""#!{sys.executable}
import http.client, json, os
port = int(os.environ["ANTHROPIC_BASE_URL"].rsplit(":", 1)[1])
token = os.environ["ANTHROPIC_AUTH_TOKEN"]
told = [token]
for shown in ("", "ogx", token):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/v1/models", headers={{"authorization": f"Bearer {{shown}}"}})
    told.append(connection.getresponse().status)
print(json.dumps(told))
"""

    def test_a_sessions_server_asks_for_a_token_of_its_own(self, alone, capfd, monkeypatch):
        (alone / "claude").write_text(self.ASKS)
        tokens = []
        for _ in range(2):
            assert ogx.main(["connect", "claude", "--serve"]) == 0
            token, *statuses = json.loads(capfd.readouterr().out)
            assert statuses == [401, 401, 200] and len(token) >= 32
            tokens.append(token)
        assert tokens[0] != tokens[1]
        monkeypatch.setenv("OGX_API_KEY", "s3cret-of-the-user")
        assert ogx.main(["connect", "claude", "--serve"]) == 0
        assert json.loads(capfd.readouterr().out) == ["s3cret-of-the-user", 401, 401, 200]
        (alone / "token").write_text("another-s3cret\n")
        flag = ["--api-key-file", str(alone / "token")]
        assert ogx.main(["connect", "claude", "--serve", *flag]) == 0
        assert json.loads(capfd.readouterr().out) == ["another-s3cret", 401, 401, 200]
        assert list((alone / "tmp").iterdir()) == []

    def serve_in_a_process(self):
        command = [sys.executable, "-B", str(HERE / "ogx.py"), "connect", "claude", "--serve"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "Traceback" not in done.stderr
        return re.search(r"its log is (.+)", done.stderr).group(1), done.stderr

    def test_a_sessions_log_is_beside_the_state_file(self, alone, monkeypatch):
        (alone / "claude").write_text(self.ASKS)
        state = alone / "new" / "folder" / "state.sqlite"
        monkeypatch.setenv("OGX_STATE", str(state))
        for _ in range(2):
            log_file, _ = self.serve_in_a_process()
            assert Path(log_file).parent == state.parent and not Path(log_file).exists()
        assert list((alone / "tmp").iterdir()) == []

    def test_a_log_with_a_warning_stays_for_a_week(self, alone, monkeypatch):
        (alone / "claude").write_text(self.ASKS)
        state = alone / "state.sqlite"
        state.write_text("no database")  # which is told
        monkeypatch.setenv("OGX_STATE", str(state))
        log_file = Path(self.serve_in_a_process()[0])
        assert log_file.read_text().count(" GET /v1/models 401") == 2
        assert " / opus " in re.sub(" +", " ", log_file.read_text())  # what `run` prints
        assert os.name == "nt" or log_file.stat().st_mode & 0o777 == 0o600
        os.utime(log_file, (time.time() - 8 * 86400,) * 2)
        other = log_file.with_name("other.log")
        other.write_text("x")
        os.utime(other, (0, 0))
        self.serve_in_a_process()
        assert not log_file.exists() and other.exists()

    def test_a_sessions_log_that_cannot_be_written_is_told(self, alone, monkeypatch):
        (alone / "claude").write_text(self.ASKS)
        monkeypatch.setenv("OGX_STATE", str(alone / "claude" / "state.sqlite"))
        told, err = self.serve_in_a_process()
        assert re.fullmatch(r"lost, since .*state.sqlite.\d+.log can't be written: .+", told)
        assert " GET /v1/models 401" not in err
        assert list((alone / "tmp").iterdir()) == []

    def test_one_terminal_is_enough(self, claude, capfd, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as free:
            monkeypatch.setenv("OGX_PORT", str(free.getsockname()[1]))
        with FakeUpstream(models=["m"]) as upstream:
            for name in os.environ:
                if re.search("_API_KEY$|_URL$|TOKEN|ENDPOINT", name):
                    monkeypatch.delenv(name)
            monkeypatch.setenv("VLLM_URL", upstream.url)
            for flags in (["--no-serve"], ["--print-env"], ["--port", os.environ["OGX_PORT"]],
                          ["--host", "127.0.0.1"], ["--url", "http://127.0.0.1:9"]):
                assert ogx.main(["connect", "claude", *flags]) == 1
                assert "Start the server first with" in capfd.readouterr().err
            assert ogx.main(["connect", "claude"]) == 7
        out, err = capfd.readouterr()
        _, environ, _ = json.loads(out)
        assert environ["ANTHROPIC_DEFAULT_OPUS_MODEL"] == "vllm/m"
        assert "for this session; its log is " in err
        with pytest.raises(OSError):
            port = int(environ["ANTHROPIC_BASE_URL"].rsplit(":", 1)[1])
            socket.create_connection(("127.0.0.1", port), timeout=1)

    def test_a_sessions_server_listens_where_the_user_says(self, claude, capfd):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        assert ogx.main(["connect", "claude", "--serve", "--port", str(port)]) == 7
        environ = json.loads(capfd.readouterr().out)[1]
        assert environ["ANTHROPIC_BASE_URL"] == f"http://127.0.0.1:{port}"

    def test_a_port_where_something_else_answers_is_told(self, claude, capfd, monkeypatch):
        with FakeUpstream(models=(404, b"no")) as other:
            monkeypatch.setenv("OGX_PORT", other.url.split(":")[2].split("/")[0])
            assert ogx.main(["connect", "claude"]) == 1
        assert "Failed to query models from OGX server" in capfd.readouterr().err

    @cases(("words", "arguments"), [
        (["-p", "hi"], ["-p", "hi"]), (["-c"], ["-c"]), (["--resume", "ID"], ["--resume", "ID"]),
        (["--print", "hi"], ["--print", "hi"]), (["a question"], ["a question"]),
        (["--verbose", "--", "--model", "x"], ["--verbose", "--model", "x"]),
        (["-p", "hi", "--fallback-model", "opus"], ["-p", "hi", "--fallback-model", "opus"])])
    def test_flags_of_claude_code_need_no_dashes_before_them(self, claude, capfd, words, arguments):
        with gateway_over() as (client, _):
            port = str(client.port)
            assert ogx.main(["connect", "claude", *words[:1], "--port", port, *words[1:]]) == 7
        told = json.loads(capfd.readouterr().out)[0]
        assert [word for word in told[2:] if word not in ("--permission-mode", "default")] == (
            arguments)

    @cases(("word", "near"), [
        ("--modle", "--model"), ("--prot=80", "--port"), ("--opus-modle", "--opus-model"),
        ("--chek", "--check"), ("--debug", ""), ("--resume", ""), ("--continue", ""),
        ("--mcp-config", ""), ("--fallback-model", ""), ("--print", ""), ("-c", ""), ("hots", "")])
    def test_what_is_nearly_a_flag_is_told(self, word, near):
        parser = ogx.argument_parser().parse_args(["connect", "claude"]).parser
        assert ogx.mistyped_flag(word, parser) == (near and f". Did you mean {near}?")

    def test_without_a_word_it_tells_how_to_begin(self, capsys):
        assert ogx.main([]) == 0
        told = capsys.readouterr().out
        assert told.startswith("ogx.py: run Claude Code") and "ogx.py connect claude" in told

    @cases(("words", "told"), [
        (["conect", "claude"], "Did you mean 'connect'?"), (["rum"], "Did you mean 'run'?"),
        (["run", "--prot", "9"], "usage: "), (["connect", "claude", "--modle", "x"],
                                              "Did you mean --model?")])
    def test_a_mistyped_command_or_flag_is_told(self, capsys, words, told):
        assert ogx.main(words) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.startswith("usage: ") and (len(words) < 3 or " ".join(words[:-2]) in error)

    def test_after_a_session_it_tells_how_to_resume(self, claude, capfd, monkeypatch):
        home = claude / "home/.claude/projects" / re.sub("[^A-Za-z0-9]", "-", os.getcwd())
        home.mkdir(parents=True)
        session = "95b4ebe0-01a6-4cd5-af1a-ad1b37be1455"
        with gateway_over() as (client, _):
            port = str(client.port)
            (home / f"{session}.jsonl").write_text("{}")
            os.utime(home / f"{session}.jsonl", (time.time() + 5,) * 2)
            (home / "notes.jsonl").write_text("{}")
            assert ogx.main(["connect", "claude", "--port", port]) == 7
            told = capfd.readouterr().err
            assert f"connect claude --port {port} --resume {session}" in told
            assert ogx.main(["connect", "claude", "--port", port, "-p", "hi"]) == 7
            os.utime(home / f"{session}.jsonl", (5, 5))  # of an earlier session
            assert ogx.main(["connect", "claude", "--port", port]) == 7
        assert "Resume" not in capfd.readouterr().err

    def test_it_launches_with_arguments_environment_and_exit_code(self, claude, capfd):
        with gateway_over() as (client, _):
            code = ogx.main(["connect", "claude", "--port", str(client.port), "--",
                             "-p", "hi", "--", "x"])  # fmt: skip
        out, err = capfd.readouterr()
        arguments, environ, _ = json.loads(out)
        assert (code, arguments[2:]) == (7, ["-p", "hi", "--", "x"])
        assert environ["ANTHROPIC_DEFAULT_OPUS_MODEL"] == "openai/gpt-x"
        assert environ["ANTHROPIC_BASE_URL"] == f"http://localhost:{client.port}"
        assert "opus" in err

    def test_print_env_launches_nothing_and_needs_no_claude(self, monkeypatch, capfd):
        monkeypatch.setenv("PATH", "")
        with gateway_over() as (client, _):
            assert ogx.main(["connect", "claude", "--port", str(client.port), "--print-env"]) == 0
        out, err = capfd.readouterr()
        assert err == "" and f"export ANTHROPIC_BASE_URL=http://localhost:{client.port}" in out
        assert all(re.match("(export|unset) [A-Za-z_]+", line) for line in out.splitlines())

    def test_without_claude_it_says_where_to_get_it_before_it_asks_the_server(
        self, monkeypatch, capsys
    ):
        monkeypatch.setenv("PATH", "")
        assert ogx.main(["connect", "claude", "--port", "1"]) == 1
        assert capsys.readouterr().err == (
            "Failed to find 'claude' in PATH. Install it from https://claude.com/download\n"
        )

    def test_without_a_server_it_says_how_to_start_one(self, claude, capsys):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        assert ogx.main(["connect", "claude", "--host", "127.0.0.1", "--port", str(port)]) == 1
        first, second = capsys.readouterr().err.splitlines()
        assert first.startswith(f"Failed to connect to OGX server at http://127.0.0.1:{port}: ")
        assert second.startswith("Start the server first with: ") and second.endswith(" run")

    @cases(
        ("answer", "words"),
        [((404, "no"), "(HTTP 404)"), ((200, [1]), ": it doesn't answer with a model list"),
         ((200, {"data": []}), "Failed to find any LLM models on the OGX server.")],
    )  # fmt: skip
    def test_a_server_of_another_kind_is_told(self, claude, capsys, answer, words):
        with FakeUpstream(models=answer) as fake:
            assert ogx.main(["connect", "claude", "--url", fake.url]) == 1
        told = capsys.readouterr().err
        assert told.startswith("Failed to ") and told.endswith(words + "\n")

    def test_a_server_for_the_session_needs_a_session(self, capsys):
        assert ogx.main(["connect", "claude", "--serve", "--print-env"]) == 2
        assert "--serve starts a server for a session" in capsys.readouterr().err

    def test_check_starts_a_server_too(self, alone, capfd):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        assert ogx.main(["connect", "claude", "--check", "--serve", "--port", port]) == 1
        assert "called no tool" in capfd.readouterr().out

    def test_print_env_names_settings_that_beat_it(self, claude, capfd):
        path = claude / "home/.claude/settings.json"
        path.write_text('{"env": {"ANTHROPIC_BASE_URL": "http://elsewhere"}}')
        with gateway_over() as (client, _):
            ogx.main(["connect", "claude", "--port", str(client.port), "--print-env"])
        assert capfd.readouterr().err == (
            f"{path} goes before these lines, and leads elsewhere\n"
        )


class TestCommandLine:
    @contextlib.contextmanager
    def running(self, *flags, env=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
        """`run` as a process; env replaces all variables that could name a provider."""
        environ = {k: v for k, v in os.environ.items() if k in ("PATH", "SYSTEMROOT", "OGX_STATE")}
        process = subprocess.Popen(
            [sys.executable, "-B", str(HERE / "ogx.py"), "run", "--port", "0", *flags],
            stdout=stdout, stderr=stderr, text=True, env={**environ, **(env or {})},
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe:
                    pipe.close()

    @pytest.fixture(autouse=True)
    def state_of_its_own(self, tmp_path, monkeypatch):
        monkeypatch.setenv("OGX_STATE", str(tmp_path / "state.sqlite"))

    @pytest.mark.parametrize("command", [["run"], ["connect", "claude"]], ids=" ".join)
    def test_a_wrong_port_is_told_with_its_flag(self, command, capsys):
        assert ogx.main([*command, "--port", "99999"]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.endswith(
            "error: argument --port: expected a port from 0 to 65535, got '99999'")  # fmt: skip

    def summary(self, process, last="Next, in another terminal:"):
        """What `run` prints, up to the line to type next."""
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith(last):
                return lines
        raise AssertionError(f"{lines} {process.stderr.read()}")

    def ask(self, process, body, path="/v1/messages"):
        """The status of the answer to a request, once the process serves."""
        lines = self.summary(process)
        port = int(re.search(r"127\.0\.0\.1:(\d+)$", lines[0]).group(1))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            return connection.getresponse().status

    @pytest.fixture
    def bare(self, tmp_path):
        """A configuration without providers that looks for no local servers."""
        path = tmp_path / "bare.json"
        path.write_text(json.dumps({"server": {"discover_local": False}}))
        return str(path)

    def test_a_credential_process_ends_with_the_server(self, tmp_path):
        signing = TestSigning()
        (tmp_path / "config").write_text("[profile p]\nregion = eu-west-1\ncredential_process = "
                                         + signing.program(tmp_path, signing.HANGS))  # fmt: skip
        env = {"AWS_PROFILE": "p", "AWS_CONFIG_FILE": str(tmp_path / "config")}
        with self.running(env=env) as process:
            until(lambda: len(signing.pids(tmp_path)) == 2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            until(lambda: all(map(signing.gone, signing.pids(tmp_path))))

    def test_without_a_home_nothing_is_made_and_that_is_said_once(self, tmp_path, bare):
        code = """if True:
            import os, sys
            os.path.expanduser = lambda path: path  # as where no home is known
            sys.path.insert(0, sys.argv[1])
            import ogx
            ogx.main(["run", sys.argv[2], "--port", "0"])"""
        program = [sys.executable, "-B", "-c", code, str(HERE), bare]
        (tmp_path / "here").mkdir()
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              cwd=tmp_path / "here", env={}) as process:  # fmt: skip
            assert self.ask(process, {"model_id": "a"}, "/v1/models") == 200
            process.send_signal(signal.SIGTERM)
            told = process.stderr.read()
        assert told.count("no home directory is known") == 1
        assert os.listdir(tmp_path / "here") == []

    def test_with_no_provider_the_demo_model_serves_and_says_so(self, bare):
        with self.running(bare) as process:
            lines = self.summary(process)
            port = int(re.search(r"127\.0\.0\.1:(\d+)$", lines[0]).group(1))
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            body = json.dumps(request(model="claude-opus-4"))
            connection.request("POST", "/v1/messages", body, {"content-type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            connection.close()
        told = "\n".join(lines)
        assert "only the built-in demo model answers" in told and "OPENAI_API_KEY" in told
        assert re.search(r"opus +demo/echo", told)
        assert lines[-1].endswith(f"connect claude --port {port}")
        assert answer["content"][0]["text"].startswith("This is ogx.py's built-in demo model")

    def test_it_tells_each_provider_and_tier(self):
        with FakeUpstream(models=["gpt-a", "gpt-b"]) as fake, self.running(
            env={"OPENAI_API_KEY": "sk-secret-1234", "OPENAI_BASE_URL": fake.url,
                 "VLLM_URL": "http://127.0.0.1:9/v1",
                 "ANTHROPIC_DEFAULT_HAIKU_MODEL": "openai/gpt-b"}
        ) as process:  # fmt: skip
            told = "\n".join(self.summary(process))
        assert re.search(r"openai +2 models$", told, re.M)
        assert re.search(r"vllm +no models: can't reach vllm at .*connection refused", told)
        assert re.search(r"haiku +openai/gpt-b$", told, re.M)
        assert re.search(r"opus +openai/gpt-a$", told, re.M)
        assert "sk-secret" not in told

    def test_a_tiers_model_that_cannot_be_served_is_told_beside_it(self):
        with FakeUpstream(models=["gpt-a"]) as fake, self.running(
            env={"OPENAI_API_KEY": "sk-secret-1234", "OPENAI_BASE_URL": fake.url,
                 "ANTHROPIC_DEFAULT_OPUS_MODEL": "openai/typo",
                 "ANTHROPIC_DEFAULT_FABLE_MODEL": "vllm/none"}
        ) as process:  # fmt: skip
            told = "\n".join(self.summary(process))
        assert re.search(r"opus +openai/typo  \(not in openai's list\)$", told, re.M)
        assert re.search(r"fable +no model: ANTHROPIC_DEFAULT_FABLE_MODEL names 'vllm/none'", told)
        assert re.search(r"haiku +openai/gpt-a$", told, re.M)

    def test_without_a_model_it_does_not_advise_to_connect(self):
        with self.running(env={"VLLM_URL": "http://127.0.0.1:9/v1"}) as process:
            told = "\n".join(self.summary(process, "No model can be used yet"))
        assert "connect claude" not in told

    def test_it_tells_how_others_connect(self):
        with self.running("--host", "0.0.0.0", env={"OGX_API_KEY": "s3cret"}) as process:
            told = "\n".join(self.summary(process, "On another machine"))
        assert re.search(r"On another machine: +OGX_API_KEY=\.\.\. .* --url http://\S+:\d+$", told)
        assert "s3cret" not in told

    def test_a_provider_that_hangs_does_not_delay_the_start(self):
        with socket.create_server(("127.0.0.1", 0)) as hanging, self.running(
            env={"VLLM_URL": f"http://127.0.0.1:{hanging.getsockname()[1]}"}
        ) as process:
            told = "\n".join(self.summary(process))
        assert "still asking for its models" in told

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_stops_it_with_exit_code_0(self, bare, number):
        with self.running(bare) as process:
            self.summary(process)
            process.send_signal(number)
            assert process.wait(10) == 0
            assert "Traceback" not in process.stderr.read()

    @contextlib.contextmanager
    def streaming(self, **env):
        """(process, connection of a client whose answer has begun and never ends)."""
        def answer(fake, connection):
            begin_stream(connection)
            send_chunk(connection, sse(delta(content="a"), done=False))
            fake.client_left.wait(10)

        with FakeUpstream(answer) as fake, self.running(
            env={"OPENAI_API_KEY": "sk-secret-1234", "OPENAI_BASE_URL": fake.url, **env}
        ) as process:
            lines = self.summary(process)
            client = Client.__new__(Client)
            client.port = int(re.search(r":(\d+)$", lines[0]).group(1))
            with client.sending(request(stream=True)) as sock:
                assert b"text_delta" in sock.recv(65536)
                yield process, sock
            fake.client_left.set()

    def test_https_from_the_command_line_and_connect_to_it(self, bare, tmp_path):
        path = tmp_path / "localhost.pem"
        path.write_text(LOCALHOST_PEM)
        with self.running(bare, "--tls-cert", str(path)) as process:
            *_, last = self.summary(process)
            url = re.search(r"connect claude --url (https://127\.0\.0\.1:\d+)$", last).group(1)
            command = [sys.executable, "-B", str(HERE / "ogx.py"), "connect", "claude",
                       "--print-env", "--url", url]  # fmt: skip
            for trust, code, words in ((str(path), 0, f"BASE_URL={url}"), ("", 1, "TLS cert")):
                environ = {**os.environ, "SSL_CERT_FILE": trust}
                ran = subprocess.run(command, capture_output=True, text=True, env=environ,
                                     timeout=20)  # fmt: skip
                assert ran.returncode == code and words in ran.stdout + ran.stderr

    def test_a_log_in_a_file_of_the_users_alone(self, bare, tmp_path):
        path = tmp_path / "ogx.log"
        with self.running(bare, "--log-file", str(path), "--log-level", "debug") as process:
            self.ask(process, request(model="claude-opus-4"))
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0 and process.stderr.read() == ""
        assert " POST /v1/messages 200 claude-opus-4 -> demo/echo by " in path.read_text()
        assert "answers have 30 s to finish" in path.read_text()
        assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o600

    def test_a_log_file_that_cannot_be_opened_is_one_line(self, bare, tmp_path):
        with self.running(bare, "--log-file", str(tmp_path)) as process:
            assert process.wait(10) == 1
            assert process.stderr.read() == f"--log-file {tmp_path}: Is a directory\n"

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
    def test_a_full_disk_never_stops_serving(self, bare):
        with self.running(bare, "--log-file", "/dev/full") as process:
            assert self.ask(process, request(model="claude-opus-4")) == 200
            process.terminate()
            assert process.wait(10) == 0
            told = process.stderr.read()
        assert told == "--log-file /dev/full: [Errno 28] No space left on device\n"

    def test_a_home_that_is_read_only_never_stops_serving(self, bare, tmp_path):
        state = str(tmp_path / "bare.json" / "no" / "folder")
        with self.running(bare, "--state", state) as process:
            alias = {"model_id": "mine", "provider_id": "demo", "provider_model_id": "echo"}
            assert self.ask(process, alias, "/v1/models") == 200

    def test_listening_elsewhere_without_a_token_warns_and_names_the_risk(self, bare):
        for token in ("", "s3cret-token"):
            with self.running(bare, "--host", "0.0.0.0", env={"OGX_API_KEY": token}) as process:
                lines = self.summary(process)
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 0
                told = process.stderr.read()
            risk = "listening on 0.0.0.0: everyone who reaches this port can use your providers'"
            assert (risk in told) != bool(token) and "s3cret" not in told + "".join(lines)

    def test_no_argument_takes_a_secret(self):
        commands = ogx.argument_parser()._subparsers._group_actions[0].choices
        flags = {word for action in commands["run"]._actions for word in action.option_strings}
        assert {f for f in flags if re.search("key|token|secret|password", f)} == {
            "--api-key-file", "--tls-key"
        }  # fmt: skip

    def test_a_key_without_a_certificate_is_told(self, bare, capsys):
        assert ogx.main(["run", "--tls-key", "key.pem"]) == 1
        assert capsys.readouterr().err == "--tls-key needs --tls-cert\n"

    @pytest.mark.parametrize("content", [None, "no certificate"])
    def test_a_certificate_that_cannot_be_used_is_one_line(self, bare, tmp_path, content):
        path = tmp_path / "cert.pem"
        if content:
            path.write_text(content)
        with self.running(bare, "--tls-cert", str(path)) as process:
            assert process.wait(10) == 1
            told = process.stderr.read()
        assert told.startswith(f"--tls-cert {path}, --tls-key {path}: ") and told.count("\n") == 1

    def test_after_the_grace_period_a_stream_ends_with_an_error_event_and_exit_code_0(self):
        with self.streaming(OGX_DRAIN_TIMEOUT="0.1") as (process, sock):
            process.send_signal(signal.SIGTERM)
            rest = b"".join(iter(lambda: sock.recv(65536), b""))
            assert process.wait(10) == 0
            assert "Traceback" not in process.stderr.read()
        assert b"event: error\n" in rest and b"ogx.py is stopping" in rest
        assert rest.endswith(b"0\r\n\r\n") and b"message_stop" not in rest

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_second_signal_ends_at_once(self, number):
        with self.streaming() as (process, sock):
            process.send_signal(number)
            for line in process.stderr:
                if "stopping; running answers have 30 s" in line:
                    break
            process.send_signal(number)
            assert process.wait(10) == 130

    @pytest.mark.skipif(not hasattr(select, "poll"), reason="can't be told there")
    def test_a_stalled_reader_of_the_log_blocks_no_request(self, tmp_path):
        bare = {"HOME": str(tmp_path)}
        with self.running(env=bare) as process:
            port = int(self.summary(process)[0].rpartition(":")[2])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            body = json.dumps(request(model="no/" + "m" * 180))
            for _ in range(400 + ogx.LOG_QUEUE):  # more than a pipe and the queue hold
                connection.request("POST", "/v1/messages", body)
                assert connection.getresponse().read()
            told = ""
            while "lines found no reader" not in told:
                connection.request("POST", "/v1/messages", body)
                assert connection.getresponse().read()
                told += os.read(process.stderr.fileno(), 65536).decode()
            connection.close()
        assert re.search(r"^[\d-]+ [\d:,]+ \(\d+ lines found no reader\) req_\w+ POST", told, re.M)

    def test_a_log_whose_reader_left_is_no_failure(self, bare):
        reader, writer = os.pipe()
        os.close(reader)
        with self.running(bare, stderr=writer) as process:
            os.close(writer)
            port = int(self.summary(process)[0].rpartition(":")[2])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            for _ in range(3):
                connection.request("GET", "/nothing")
                assert connection.getresponse().read()
            connection.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0

    def test_a_signal_stops_it_whatever_lock_the_main_thread_holds(self, bare):
        """Event.set() in a handler would wait for the lock that Event.wait() holds below it."""
        code = """
import os, signal, sys, threading, ogx
usual = threading.Condition.wait
def interrupted(self, timeout=None):
    if timeout == 3600:
        os.kill(os.getpid(), signal.SIGTERM)
    return usual(self, timeout)
threading.Condition.wait = interrupted
sys.exit(ogx.main(["run", "--port", "0", sys.argv[1]]))
"""
        with subprocess.Popen([sys.executable, "-B", "-c", code, bare], cwd=HERE, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            self.summary(process)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            try:
                assert process.wait(10) == 0
            finally:
                process.kill()

    def test_a_closed_stdout_is_no_reason_to_stop(self, bare):
        reader, writer = os.pipe()
        os.close(reader)
        with self.running(bare, "--log-level", "debug", stdout=writer) as process:
            os.close(writer)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.7)

    def test_a_port_in_use_is_one_line_and_exit_code_1(self, bare):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            with self.running(bare, "--port", port) as process:
                assert process.wait(10) == 1
                assert process.stderr.read() == (
                    f"port {port} on 127.0.0.1 is in use; choose another with --port, "
                    "or stop what uses it\n"
                )

    def test_a_port_is_a_number_that_a_port_can_be(self):
        parser = ogx.argument_parser()
        assert parser.parse_args(["run", "--port", "5"]).port == 5
        assert parser.parse_args(["run"]).port is None
        for wrong in ("x", "-1", "65536", "٣"):
            with pytest.raises(SystemExit):
                parser.parse_args(["run", "--port", wrong])

    def test_help_shows_every_limit_with_its_default(self, capsys):
        assert ogx.main(["run", "--help"]) == 0
        told = capsys.readouterr().out
        for name, default in dataclasses.asdict(ogx.Limits()).items():
            assert re.search(rf"^  OGX_{name.upper()} +{default}  \w", told, re.M)
        assert re.search(r"OGX_CONNECT_TIMEOUT +10 ", told) and "OGX_MAX_BODY" in told

    def test_a_wrong_command_shows_the_right_ones(self, capsys):
        assert ogx.main(["connect"]) == 2
        assert ogx.main(["connect", "claud"]) == 2
        assert "no client is called 'claud', only claude" in capsys.readouterr().err
        assert ogx.main(["serve"]) == 2
        assert "no command is called 'serve'" in capsys.readouterr().err

    # -- it can be debugged

    def under(self, *words, given=""):
        """What a debugger or the like prints that runs ogx.py; `given` is typed."""
        done = subprocess.run([sys.executable, "-B", *words], input=given, capture_output=True,
                              text=True, timeout=60, cwd=HERE)  # fmt: skip
        return done.stdout + done.stderr

    def test_a_debugger_reaches_a_breakpoint_in_run(self, bare):
        line = ogx.run.__code__.co_firstlineno + 2
        typed = f"break ogx.py:{line}\ncontinue\np 'reached', options.config\nquit\n"
        assert f"('reached', '{bare}')" in self.under("-m", "pdb", "ogx.py", "run", bare,
                                                      given=typed)  # fmt: skip

    def test_a_debugger_without_breakpoints_sees_the_program_end(self):
        told = self.under("-m", "pdb", "ogx.py", "run", "/no/such.json", given="continue\nquit\n")
        assert "expected 'starter' or a JSON file" in told and "sys.exit(). Exit status: 1" in told

    def test_a_profiler_and_a_tracer_see_main(self):
        told = self.under("-m", "cProfile", "ogx.py", "--version")
        assert re.search(r"ogx\.py:\d+\(main\)", told)
        assert "funcname: main" in self.under("-m", "trace", "--listfuncs", "ogx.py", "--version")

    def test_an_interactive_prompt_comes_after_main(self):
        told = self.under("-i", "ogx.py", "--version", given="print(main.__name__, 6 * 7)\n")
        assert f"ogx.py {ogx.__version__}" in told and "main 42" in told
