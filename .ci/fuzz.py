#!/usr/bin/env python3
"""Feed what comes from outside with mutations: every reader of ogx.py must answer with a result or
an OgxError, must not grow, and must not care where its bytes are cut.

    make fuzz                                  about a minute, from a new seed
    python3 .ci/fuzz.py --seconds 5 --seed 7   the same inputs again, as many as fit into the time

A failure prints its seed and the input, and the exit status is 1. test_ogx.py gives some inputs to
each of TARGETS too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import expressions  # noqa: E402

import ogx  # noqa: E402

Outcome = tuple[str, Any]
ODD_BYTES = (b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b":", b" ",
             b"\t", b"data:", b"data: ", b"event: ping", b"0", b"0x10", b"-1", b"FFFFFFFFFFFFFFF",
             b";", b"9" * 400, b"[", b"{", b'"', b"\\ud800", b"\\u0000", b"NaN",
             b"1e999")  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**63, 10**400, -0.5, 1e308, "", "x", "\ud800", "\x00", "auto",
    "text", "tool_use", "tool_result", "${env.A}", "${env.B:=${env.A}}", "${env.", "http://[::1",
    "http://h:99999", [], [[]], {}, {"type": "text"}, [{"type": "image"}], {"": {}},
)  # fmt: skip
SSE = (b": hello\r\nevent: message\r\ndata: {\"a\":1}\r\ndata: {\"b\":2}\r\n\r\n"
       b"id: 5\ndata:x\n\ndata\n\nretry: 1\rdata: y\r\rdata: [DONE]\n\n")  # fmt: skip
CHUNKS = (b"5\r\nhello\r\n6;name=value\r\n world\r\n1a\nabcdefghijklmnopqrstuvwxyz\n"
          b"0\r\na: b\r\n\r\nmore")  # fmt: skip
HEADERS = b"host: localhost\r\ncontent-length: 12\r\nX-Odd:  a, b \r\naccept:*/*\r\ncookie: a=b"
REPLY = (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
         b"transfer-encoding: chunked\r\n\r\n" + CHUNKS)  # fmt: skip
TEXT_CALLS = (
    'I look.\n<tool_call>\n{"name": "Bash", "arguments": {"n": 1}}\n</tool_call>',
    "<function=Bash>\n<parameter=n>\n1\n</parameter>\n</function>",
    '[TOOL_CALLS]Bash[ARGS]{"n": 1}',
    '```json\n{"name": "Bash", "parameters": {"n": [1, {}]}}\n```', "[Bash(n=1), Bash(n='`')]",
    'I do. <|tool_call>call:Bash{n:1,s:<|"|>a, b: "c"<|"|>}<tool_call|>', "Bash(n=1)",
    '<tool_call>\n```json\n{"name": "Bash", "arguments": {"n": 1e9,}\n```\n</tool_call>',
    '<|tool_call|>[{"name": "Bash", "arguments": {}}]<|/tool_call|>', "[Bash(n={'a': 1})]",
    'So `<tool_call>` begins one:\n```\n<invoke name="Bash">\n```\nand so on.',
)
REQUEST = {
    "model": "claude-opus-4", "max_tokens": 100, "stream": True, "temperature": 0.5, "top_k": 3,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "stop_sequences": ["stop"], "thinking": {"type": "enabled", "budget_tokens": 50},
    "tools": [{"name": "Bash", "description": "run", "input_schema": {"type": "object"}},
              {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}],
    "tool_choice": {"type": "tool", "name": "Bash"}, "metadata": {"user_id": "u"},
    "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {}}},
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "text", "text": "ok"},
            {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True, "content": [
                {"type": "text", "text": "a"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                             "data": "aW1n"}}]},
            {"type": "document", "title": "t", "source": {"type": "text", "data": "words"}},
            {"type": "search_result", "source": "s", "title": "t", "content": []}]}],
}  # fmt: skip

SETTINGS = {
    "model": "opus", "apiKeyHelper": "echo key", "permissions": {"defaultMode": "plan"},
    "env": {"ANTHROPIC_BASE_URL": "http://elsewhere", "no_proxy": "x", "MY": "1"},
}  # fmt: skip
LISTING = {
    "data": [{"id": "openai/gpt-x", "max_input_tokens": 32_000, "max_tokens": 4096,
              "custom_metadata": {"model_type": "llm"}},
             {"id": "claude-opus-4", "custom_metadata": {"alias_of": "openai/gpt-x"}},
             {"id": "openai/embed-x", "custom_metadata": {"model_type": "embedding"}}],
    "tiers": {"haiku": "openai/gpt-x", "opus": "openai/gpt-x"},
}  # fmt: skip
ANSWER: list[ogx.Json] = [
    {"type": "message_start", "message": {"id": "m", "content": [], "usage": {"input_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}},
    {"type": "content_block_start", "index": 1,
     "content_block": {"type": "tool_use", "id": "t", "name": "add", "input": {}}},
    {"type": "content_block_delta", "index": 1,
     "delta": {"type": "input_json_delta", "partial_json": '{"a":2,"b":3}'}},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 1}},
    {"type": "error", "error": {"type": "api_error", "message": "no"}},
]  # fmt: skip


def outcome(call: Callable[[], Any]) -> Outcome:
    """What a call gives, or the status of its OgxError; any other exception is a failure, but for
    RecursionError, which the server and main() answer as bad input."""
    try:
        return "result", call()
    except ogx.OgxError as error:
        return "error", error.status
    except RecursionError:
        return "error", 400


def cut(data: bytes, chance: random.Random) -> list[bytes]:
    marks = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(6)))
    return [data[a:b] for a, b in zip([0, *marks], [*marks, len(data)])]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The bytes with a few of them changed, lost, repeated or exchanged for odd ones."""
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((0, 0, 1, 1, 2, 8, 64)))
        piece = chance.choice((b"", bytes([chance.randrange(256)]), chance.choice(ODD_BYTES),
                               data[at:end] * chance.choice((2, 3, 50))))  # fmt: skip
        data = data[:at] + piece + data[end:]
    return data


def changed(tree: Any, chance: random.Random) -> Any:
    """A copy of a JSON tree with a few values, keys or places in lists changed."""
    for _ in range(chance.randrange(1, 4)):
        tree = json.loads(json.dumps(tree))  # no value is in two places
        node: Any = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = chance.choice(keys)
            inner = node[key]
            if isinstance(inner, (dict, list)) and inner and chance.random() < 0.7:
                node = inner
                continue
            action = chance.randrange(5)
            if action == 0:
                del node[key]
            elif action == 1 and isinstance(node, dict):
                node[chance.choice(("type", "content", "id", "name", "role", "x"))] = inner
            elif action == 2 and isinstance(node, list):
                node.append(inner)
            elif action == 3:
                for _ in range(chance.choice((1, 3, 300))):
                    inner = [inner]
                node[key] = inner
            else:
                node[key] = chance.choice(ODD_VALUES)
            break
    return tree


# ---- what is fed ----------------------------------------------------------------------------


def sse_reader(chance: random.Random) -> bytes:
    data = mutated(SSE, chance)

    def read(pieces: list[bytes]) -> list[bytes]:
        reader = ogx.SseReader()
        return [event for piece in pieces for event in reader.feed(piece)] + reader.end()

    whole = outcome(lambda: read([data]))
    if len(data) < 4096:  # byte by byte takes long
        assert outcome(lambda: read(cut(data, chance))) == whole
        assert outcome(lambda: read([data[i : i + 1] for i in range(len(data))])) == whole
    return data


def chunked_reader(chance: random.Random) -> bytes:
    data = mutated(CHUNKS, chance)

    def read(pieces: list[bytes]) -> tuple[bytes, bool, bytes]:
        reader, payload, rest = ogx.ChunkedBody(), b"", b""
        for piece in pieces:
            if reader.done:
                rest += piece
                continue
            payload += reader.feed(piece)
            rest = reader.rest
        assert len(payload) <= len(data)
        return payload, reader.done, rest

    whole = outcome(lambda: read([data]))
    assert outcome(lambda: read(cut(data, chance))) == whole
    assert outcome(lambda: read([data[i : i + 1] for i in range(len(data))])) == whole
    return data


def text_calls(chance: random.Random) -> bytes:
    """A model's text is handed on whole, or ends in calls of known tools, wherever it is cut."""
    text = mutated(chance.choice(TEXT_CALLS).encode(), chance).decode("utf-8", "replace")
    tools = {"Bash": {"name": "Bash", "input_schema": {"properties": {"n": {"type": "integer"}}}}}

    def read(pieces: list[str]) -> tuple[str, Any]:
        holder = ogx.CallHolder(tools)
        handed = "".join(map(holder.feed, pieces))
        calls, rest = holder.end(whole=True)
        return handed + rest, calls

    handed, calls = read([text])
    assert text.startswith(handed) and (calls or handed == text)
    assert all(name == "Bash" and isinstance(given, dict) for name, given in calls)
    json.dumps(calls, allow_nan=False)
    if len(text) < 4096:
        assert read(list(text)) == (handed, calls)
        middle = chance.randrange(len(text) + 1)
        assert read([text[:middle], text[middle:]]) == (handed, calls)
    return text.encode("utf-8", "replace")


def header_reader(chance: random.Random) -> bytes:
    data = mutated(HEADERS, chance)
    kind, headers = outcome(lambda: ogx.headers_from_bytes(data))
    if kind == "result":
        for name, value in headers.items():
            assert name == name.lower() and name and not set(name) & set(" \t\r\n:\x00")
            assert not set(value) & set("\r\n\x00\x7f")
    return data


def reply_reader(chance: random.Random) -> bytes:
    """An upstream's whole answer, over a real socket: the same whether it comes at once or cut."""
    import socket

    data = mutated(REPLY, chance)

    def read(pieces: list[bytes]) -> Any:
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            upstream = ogx.Upstream()
            upstream.new_connection = lambda *_: ogx.Connection(here)  # type: ignore[method-assign]
            upstream.give_back = lambda *_: None  # type: ignore[method-assign]
            provider = ogx.Provider("p", ogx.ProviderKind("p"), "http://127.0.0.1:9")
            reply = ogx.drive(upstream.send(provider, "POST", "/x", b"{}"))
            body = b""
            for piece in pieces:
                there.sendall(piece)
            there.shutdown(socket.SHUT_WR)
            ogx.drive(reply.head())
            while (piece := reply.read()) != b"":
                body += piece if isinstance(piece, bytes) else b""
            reply.release()
            return reply.status, reply.headers, body

    whole = outcome(lambda: read([data]))
    assert outcome(lambda: read(cut(data, chance))) == whole
    return data


def request_check(chance: random.Random) -> bytes:
    """What a client sends: either it is refused, or every dialect can write it for a provider."""
    if chance.random() < 0.3:
        data = mutated(json.dumps(REQUEST).encode(), chance)
    else:
        data = json.dumps(changed(REQUEST, chance)).encode()
    kind, request = outcome(lambda: ogx.checked_json(data))
    assert kind == "result" or 400 <= request < 500
    if kind == "result":
        for row in chance.sample(sorted(ogx.PROVIDER_KINDS), 3):
            provider = ogx.Provider("p", ogx.PROVIDER_KINDS[row], "http://127.0.0.1:9/v1")
            names = provider.kind.dialects
            for name in (*names, "responses") if "chat" in names else names:
                dialect = ogx.DIALECTS[name]
                kind, body = outcome(lambda d=dialect, p=provider: written(request, p, d))
                assert kind == "result" or 400 <= body < 500, name
        assert ogx.TokenCounter().prompt(request)[0] >= 0
    return data


def written(request: ogx.Json, provider: ogx.Provider, dialect: ogx.Dialect) -> bytes:
    """The request as the gateway sends it."""
    if not provider.kind.is_anthropic:
        ogx.refuse_untranslatable(request)
    model = ogx.Model("p/m", provider, "gpt-5")
    return ogx.json_bytes(dialect.finished(dialect.request(request, model)))


def config_reader(chance: random.Random) -> bytes:
    tree = changed(ogx.starter_config(), chance)
    environ = {name: str(chance.choice(ODD_VALUES)) for name in chance.sample(
        ["OPENAI_API_KEY", "VLLM_URL", "OLLAMA_URL", "OGX_PORT", "OGX_IDLE_TIMEOUT", "A"], 3)}
    kind, config = outcome(lambda: ogx.config_from_json(tree, "fuzz.json", environ))
    assert kind == "result" or config == 400
    if kind == "result":
        ogx.Registry(config)
    return json.dumps([tree, environ]).encode()


def json_or_bytes(tree: Any, chance: random.Random) -> bytes:
    text = json.dumps(changed(tree, chance), ensure_ascii=chance.random() < 0.5)
    data = text.encode(chance.choice(("utf-8", "utf-8-sig", "utf-16")), "surrogatepass")
    return mutated(data, chance) if chance.random() < 0.3 else data


def settings_reader(chance: random.Random) -> bytes:
    """Settings of any shape: Claude Code still gets ours on top of them."""
    plan = ogx.LaunchPlan({"ANTHROPIC_BASE_URL": "http://ours", "ANTHROPIC_API_KEY": "",
                           **{ogx.tier_variable(tier): "m" for tier in ogx.TIERS}}, "m")
    data = json_or_bytes(SETTINGS, chance)
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        tree = ogx.read_settings(file.name)
    assert tree is None or isinstance(tree, dict)
    assert isinstance(ogx.overrides(tree or {}, plan), bool)
    assert isinstance(ogx.sets_permission_mode(tree or {}), bool)
    kind, text = outcome(lambda: json.dumps(ogx.merged_settings(tree or {}, plan)))
    if kind == "result":
        made = json.loads(text)
        assert made["env"].items() >= plan.variables.items() and made["apiKeyHelper"] == ""
        assert made["model"] == "m" and made["env"]["ANTHROPIC_API_KEY"] == ""
    ogx.read_settings(data.decode("latin-1"))
    return data


def plan_reader(chance: random.Random) -> bytes:
    """A server's model list of any shape: an error, or what an environment and a shell can hold."""
    data = json_or_bytes(LISTING, chance)
    class Answers:
        def ask(self, *_: Any) -> Any:
            return argparse.Namespace(status=chance.choice((200, 200, 200, 401))), data

        def close(self) -> None:
            pass

    upstream, ogx.Upstream = ogx.Upstream, Answers  # type: ignore[assignment, misc]
    server = ogx.Provider("OGX", ogx.ProviderKind("OGX"), "http://127.0.0.1:9")
    try:
        kind, listing = outcome(lambda: ogx.model_listing(server))
    finally:
        ogx.Upstream = upstream  # type: ignore[misc]
    if kind == "result":
        environ = {"NO_PROXY": str(chance.choice(ODD_VALUES))}
        options = argparse.Namespace(**dict.fromkeys([f"{job}_model" for job in (
            *ogx.TIERS, *ogx.JOBS)]), lean=chance.choice((None, True, False)),
                                     context=None, max_output=chance.choice((None, 5)),
                                     model=chance.choice((None, "openai/gpt-x")))  # fmt: skip
        kind, plan = outcome(
            lambda: ogx.launch_plan(server, listing, options, environ))
    if kind == "result":
        for value in plan.variables.values():
            assert b"\0" not in value.encode() and "\n" not in value
        for shell in ogx.SHELLS:
            kind, lines = outcome(lambda shell=shell: ogx.shell_lines(plan.variables, shell))
            assert shell == "cmd" if kind == "error" else len(lines) == len(plan.variables)
        json.loads(ogx.opencode_variables(plan, {})["OPENCODE_CONFIG_CONTENT"])
        assert ogx.plan_lines(plan)
    return data


def check_reader(chance: random.Random) -> bytes:
    """What answers to --check: a table with a row for each model, whatever it is."""
    data = b"".join(b"data: %s\n\n" % json.dumps(event).encode()
                    for event in changed(ANSWER, chance))  # fmt: skip
    data = mutated(data, chance) if chance.random() < 0.5 else data

    class Answer:
        status, parts = chance.choice((200, 200, 200, 204, 500)), cut(data, chance)

        items = ogx.Reply.items

        def head(self) -> Iterator[Any]:
            yield from ()

        def read(self) -> bytes:
            return next((part for part in iter(lambda: self.parts and self.parts.pop(0), [])
                         if part), b"")  # fmt: skip

        def release(self) -> None:
            pass

    class Answers:
        def send(self, *_: Any) -> Iterator[Any]:
            yield from ()
            return Answer()

        def close(self) -> None:
            pass

    upstream, ogx.Upstream = ogx.Upstream, Answers  # type: ignore[assignment, misc]
    names = [f"ANTHROPIC_DEFAULT_{tier.upper()}_MODEL" for tier in ogx.TIERS]
    plan = ogx.LaunchPlan(dict.fromkeys(names, "m"))
    server = ogx.Provider("OGX", ogx.ProviderKind("OGX"), "http://127.0.0.1:9")
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            code = ogx.print_check(server, plan)
    finally:
        ogx.Upstream = upstream  # type: ignore[misc]
    header, row, *lines = told.getvalue().splitlines()
    assert told.getvalue().encode() and all(line[:2] == "  " for line in lines)
    assert code == (row[header.index("tools") :].split()[0] != "yes")
    return data


def expression(chance: random.Random) -> bytes:
    """A regular expression over a piece of it, repeated: no more than linear time."""
    method, pattern, most = chance.choice(expressions.expressions())
    worst = expressions.worst_input(method, pattern, most, chance)
    assert not worst, (pattern, worst)
    return worst.encode()


def state_reader(chance: random.Random) -> bytes:
    """A state file: whatever it holds, everyone gets an answer, and what isn't ours stays."""
    if chance.random() < 0.9:  # it takes a hundred times as long as the others
        return b""
    ogx.log.disabled = True
    try:
        return state_file(chance)
    finally:
        ogx.log.disabled = False


def state_file(chance: random.Random) -> bytes:
    import sqlite3
    import tempfile
    from contextlib import closing

    with tempfile.TemporaryDirectory() as folder:
        path, data = Path(folder) / "state", b""
        if chance.random() < 0.9:
            with closing(sqlite3.connect(path)) as database:
                odd_database(database, chance)
            data = path.read_bytes()
        if chance.random() < 0.5:
            data = mutated(data, chance)
        elif chance.random() < 0.1:
            data = chance.choice((b"notes", b"\x00" * 9000, chance.randbytes(9000), b""))
        path.write_bytes(data)
        ours = data[:16] in (b"SQLite format 3\x00", b"")
        store = ogx.Store(str(path))
        provider = ogx.Provider("p", ogx.ProviderKind("p"), "http://127.0.0.1:9")
        config = ogx.Config("127.0.0.1", 0, (provider,), (ogx.Alias("c", "all", "auto"),), {})
        gateway = ogx.Gateway(config, store=store)
        for name in (*gateway.registry.aliases, "p/m"):
            kind, model = outcome(lambda n=name: gateway.registry.resolve(n))
            assert kind == "result" or model == 404
        model = ogx.Model("p/m", provider, "m")
        gateway.lessons.add(model, [ogx.Lesson("drop", "stop")])
        assert "drop stop" in [str(lesson) for lesson in gateway.lessons.of(model)]
        gateway.discovery.done.set()
        gateway.register({"model_id": "mine"})
        outcome(lambda: gateway.unregister("c"))
        gateway.close()
        kept = ogx.Store(str(path))
        if store.problem:  # and not for nothing
            assert kept.put("alias", "x", {}), store.problem
        else:
            assert "mine" in kept.all("alias") and "p/m" in str(kept.all("lessons"))
        assert ours or path.read_bytes() == data or len(data) == 1  # which is empty to sqlite
        assert store.problem or ours or len(data) == 1
        return data


def odd_database(database: Any, chance: random.Random) -> None:
    """A table of facts with rows that other versions and other programs may have left."""
    if chance.random() < 0.2:
        columns = chance.choice(("a", "kind, key, value, at, more", "kind, key, value", "value"))
        database.execute(f"CREATE TABLE {chance.choice(('facts', 'other'))} ({columns})")
        return
    database.execute("CREATE TABLE facts (kind TEXT, key TEXT, value TEXT, at REAL, "
                     "PRIMARY KEY (kind, key))")  # fmt: skip
    alias = {"model_id": "a", "provider_id": "p", "provider_model_id": "m", "targets": ["p/m"]}
    lesson = {"action": "clamp", "field": "max_tokens", "value": 5, "keep": True, "at": 9e9}
    for number in range(chance.randrange(8)):
        kind = chance.choice(("alias", "lessons", "ratio", None, 5))
        value: Any = json.dumps(changed(alias if kind == "alias" else [lesson], chance))
        value = chance.choice((value, value, value, None, 5, b"\xff", "null", "[" * 2000))
        key = chance.choice((f"k{number}", "p/m", "p/m\nx", "mine", "c", b"\xff", None))
        database.execute("REPLACE INTO facts VALUES (?, ?, ?, ?)",
                         (kind, key, value, chance.choice((1.5, None, "x"))))  # fmt: skip
    if chance.random() < 0.1:
        database.execute(f"PRAGMA user_version = {chance.choice((-5, 7, 2**31 - 1))}")
    database.commit()


TARGETS = (sse_reader, chunked_reader, header_reader, reply_reader, request_check, config_reader,
           text_calls, settings_reader, plan_reader, check_reader, state_reader,
           expression)  # fmt: skip


def fuzz(seed: int, seconds: float, targets: tuple[Callable[..., bytes], ...] = TARGETS) -> int:
    """The number of inputs that were tried; raises what a failure raised."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for target in targets:
            state = f"{target.__name__} {seed} {count}"
            try:
                target(random.Random(state))
            except Exception:
                print(f"fuzz: failed with --only {target.__name__} --seed {seed} at {count}",
                      file=sys.stderr)  # fmt: skip
                raise
        count += 1
    return count * len(targets)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--only", choices=[target.__name__ for target in TARGETS])
    options = parser.parse_args()
    targets = tuple(t for t in TARGETS if options.only in (None, t.__name__))
    print(f"fuzz: seed {options.seed}, {options.seconds:g} s", flush=True)
    fuzz(options.seed, options.seconds / 10, targets)  # fill caches
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    count = fuzz(options.seed + 1, options.seconds * 0.9, targets)
    grown = tracemalloc.get_traced_memory()[0] - before
    print(f"fuzz: {count} inputs, no failure; memory grew by {grown // 1024} KB")
    assert grown < 2 * 1024 * 1024, "something keeps what it was fed"
    return 0


if __name__ == "__main__":
    sys.exit(main())
