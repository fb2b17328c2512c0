#!/usr/bin/env python3
"""Feed what comes from outside with mutations: every reader of ogx.py must answer with a result or
an OgxError, must not grow, and must not care where its bytes are cut.

    make fuzz                                  about a minute, from a new seed
    python3 .ci/fuzz.py --seconds 5 --seed 7   the same inputs again, as many as fit into the time

A failure prints its seed and the input, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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
        reader = ogx.SseReader(limit=4096)
        return [event for piece in pieces for event in reader.feed(piece)] + reader.end()

    whole = outcome(lambda: read([data]))
    if len(data) < 4096:  # how much of too much comes out depends on the pieces
        assert outcome(lambda: read(cut(data, chance))) == whole
        assert outcome(lambda: read([data[i : i + 1] for i in range(len(data))])) == whole
    return data


def chunked_reader(chance: random.Random) -> bytes:
    data = mutated(CHUNKS, chance)

    def read(pieces: list[bytes]) -> tuple[bytes, bool, bytes]:
        reader, payload, rest = ogx.BodyReader(200, {"transfer-encoding": "chunked"}), b"", b""
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
            upstream.new_connection = lambda *_: here  # type: ignore[method-assign]
            upstream.give_back = lambda *_: None  # type: ignore[method-assign]
            provider = ogx.Provider("p", ogx.ProviderKind("p"), "http://127.0.0.1:9")
            reply, body = upstream.send(provider, "POST", "/x", b"{}"), b""
            for piece in pieces:
                there.sendall(piece)
            there.shutdown(socket.SHUT_WR)
            while not reply.head():
                reply.wait()
            while (piece := reply.read()) != b"":
                body += piece or b""
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
        assert ogx.prompt_tokens(request)[0] >= 0
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


TARGETS = (sse_reader, chunked_reader, header_reader, reply_reader, request_check, config_reader)


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
