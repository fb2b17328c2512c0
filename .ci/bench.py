#!/usr/bin/env python3
"""Measure what ogx.py adds between a client and an OpenAI-format upstream.

    make bench                                  the whole table, about half a minute
    python3 .ci/bench.py --quick                a look, about ten seconds
    python3 .ci/bench.py --json figures.json    the figures of every round too, for a program

    python3 .ci/bench.py --upstream-port 9100 --proxy other=http://127.0.0.1:4000 --model gpt-bench
        one more column: a proxy of yours that serves the Messages API at that URL, sends to
        http://127.0.0.1:9100/v1 and knows that model

A fake upstream and the gateway run as processes of their own, this process is the client, and all
traffic stays on 127.0.0.1. Each round starts a fresh gateway and measures every case directly
against the upstream (which answers the same bytes in Chat Completions, whatever their format) and
through each proxy, one right after the other; the table shows medians of the rounds. The client
keeps what comes in with its time and reads it after the clock has stopped: an answer whose text or
end isn't right counts as bad, and any bad answer makes the exit status 1. A timing never does.
"""
import argparse
import asyncio
import bisect
import contextlib
import functools
import gc
import itertools
import json
import os
import platform
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional
from urllib.parse import urlsplit

OGX = Path(__file__).resolve().parent.parent / "ogx.py"
Json = dict[str, Any]
Figures = dict[str, float]


class Column(NamedTuple):
    """A server to measure: the upstream itself, or a proxy of it."""
    name: str
    url: str
    model: str
    chat: bool          # whether it answers in chunks of Chat Completions


class Case(NamedTuple):
    """One kind of load. The client's prompt tells the upstream how to answer."""
    body: str           # small; large: a new conversation each time; turn: the next of one
    stream: bool
    chunks: int
    delay: int          # milliseconds between chunks
    clients: int
    requests: int


CASES = {
    "small": Case("small", False, 20, 0, 1, 300),
    "large": Case("large", False, 20, 0, 1, 150),
    "turn": Case("turn", False, 20, 0, 1, 150),
    "crowd": Case("small", False, 20, 0, 32, 1600),
    "stream": Case("large", True, 200, 0, 1, 40),
    "streams": Case("large", True, 200, 0, 16, 96),
    "paced": Case("small", True, 200, 5, 16, 16),
}
ROWS = (    # label, case, figure, unit, limit: of what ogx.py adds, or in s and MB of the figure
    ("ready: process start to first 200", "start", "ready", "s", 0.3),
    ("RSS, idle", "start", "idle", "MB", 40),
    ("RSS, after the load", "start", "loaded", "MB", None),
    ("small request, p50", "small", "p50", "ms", 1),
    ("small request, p99", "small", "p99", "ms", None),
    ("109 KB request, p50", "large", "p50", "ms", 4),
    ("109 KB request, p99", "large", "p99", "ms", None),
    ("109 KB, next turn of one, p50", "turn", "p50", "ms", 4),
    ("small requests, 32 clients", "crowd", "requests", "/s", None),
    ("1 stream, 109 KB: first event", "stream", "first", "ms", None),
    ("1 stream, 109 KB: events", "stream", "events", "/s", None),
    ("16 streams, 109 KB: first event", "streams", "first", "ms", None),
    ("16 streams, 109 KB: events", "streams", "events", "/s", None),
    ("16 streams, 5 ms: lateness p50", "paced", "late50", "ms", None),
    ("16 streams, 5 ms: lateness p99", "paced", "late99", "ms", None),
)

# ------------------------------------------------------------------------------------- Requests

HEADERS = """Accept: application/json | User-Agent: claude-cli/2.0.50 (external, cli) | x-app: cli
 | Authorization: Bearer bench | x-api-key: bench | anthropic-version: 2023-06-01
 | anthropic-beta: claude-code-20250219,interleaved-thinking-2025-05-14 | Accept-Language: *
 | anthropic-dangerous-direct-browser-access: true | Content-Type: application/json
 | X-Stainless-Arch: x64 | X-Stainless-Lang: js | X-Stainless-OS: Linux | Sec-Fetch-Mode: cors
 | X-Stainless-Package-Version: 0.70.0 | X-Stainless-Retry-Count: 0 | X-Stainless-Timeout: 600
 | X-Stainless-Runtime: node | X-Stainless-Runtime-Version: v20.20.2"""
SERIAL = itertools.count(10 ** 9)       # ten digits each, so that Content-Length stays the same


def requests_of(case: Case, count: int, column: Column) -> list[bytes]:
    """So many HTTP requests of this case, no two of them the same."""
    body = small_body() if case.body == "small" else large_body(case.body == "turn")
    body["messages"][-1]["content"][-1]["text"] += (
        f" Answer in {case.chunks} chunks, {case.delay} ms apart.")
    body.update(model=column.model, stream=case.stream)
    before, after = json.dumps(body, ensure_ascii=False).encode().split(b"SERIAL")
    address = urlsplit(column.url)
    head = "\r\n".join([
        f"POST {address.path}?beta=true HTTP/1.1", f"Host: {address.netloc}",
        *re.split(r"\s*\| ", HEADERS), f"Content-Length: {len(before) + 10 + len(after)}", "", ""])
    return [b"%s%s%d%s" % (head.encode(), before, next(SERIAL), after) for _ in range(count)]


def small_body() -> Json:
    return {"max_tokens": 1024, "system": words(500), "messages": [said("user", "SERIAL fox")]}


def large_body(turn: bool) -> Json:
    """The shape and size of what Claude Code sends in the middle of a session: 109 KB."""
    first, last = ("", "SERIAL ") if turn else ("SERIAL ", "")
    messages = [said("user", first + words(2500) + "na\u00efve caf\u00e9 \U0001f600")]
    for index in range(9):
        call = {"type": "tool_use", "id": f"toolu_{index:024}", "name": "mcp__server__tool_0",
                "input": {"command": f"cat module_{index}.py", "description": words(40)}}
        lines = "\n".join(f"{line:5}\u2192    {words(45)}" for line in range(55))
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": [block(lines)]}
        messages += [said("assistant", words(150), call), {"role": "user", "content": [result]}]
    messages += [said("assistant", words(100)), said("user", last + words(200))]
    arguments = {f"argument_{number}": {"type": kind, "description": words(110)}
                 for number, kind in enumerate(("string", "integer", "boolean") * 2)}
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object",
              "properties": arguments, "required": ["argument_0"], "additionalProperties": False}
    tools = [{"name": f"mcp__server__tool_{index}", "description": words(940),
              "input_schema": schema} for index in range(25)]
    return {"max_tokens": 8192, "temperature": 1, "metadata": {"user_id": "user_" + "0" * 64},
            "system": [{**block(words(18000)), "cache_control": {"type": "ephemeral"}}],
            "tools": tools, "messages": messages}


def said(role: str, text: str, *more: Json) -> Json:
    return {"role": role, "content": [block(text), *more]}


def block(text: str) -> Json:
    return {"type": "text", "text": text}


def words(length: int) -> str:
    return ("The command prints what it read from the file, or an error. " * length)[:length]


# ------------------------------------------------------------------------------------- Upstream

PIECES = ("The ", "quick ", '"fox" ', "jumps\n", "caf\u00e9 \u2014 ", "\U0001f600 ", "\\n ",
          "{}[] ", "</b>\t", "over ", "123 ")
TIME = "t{:017.6f} "                    # each chunk's text begins with the time of its sending
NO_TIME = TIME.format(0).encode()
WISH = re.compile(rb"Answer in (\d+) chunks, (\d+) ms apart")
USAGE = {"prompt_tokens": 25, "completion_tokens": 20, "total_tokens": 45}


class Upstream(asyncio.Protocol):
    """One connection of an OpenAI-format server that sends bytes built beforehand."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.received = bytearray()

    def data_received(self, data: bytes) -> None:
        self.received += data
        head_end = self.received.find(b"\r\n\r\n") + 4
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self.received[:max(0, head_end)])
        if head_end >= 4 and len(self.received) >= head_end + (int(length[1]) if length else 0):
            request, self.received = bytes(self.received), bytearray()
            self.answer(request)

    def answer(self, request: bytes) -> None:
        wish = WISH.match(request, max(0, request.rfind(b"Answer in ")))
        if not wish:
            models = [{"id": "bench", "object": "model", "created": 1, "owned_by": "bench"}]
            self.transport.write(http_json({"object": "list", "data": models}))
        elif b'"stream": true' not in request and b'"stream":true' not in request:
            self.transport.write(whole_answer(int(wish[1])))
        else:
            self.send(iter(stream_answer(int(wish[1]))), int(wish[2]) / 1000, time.monotonic())

    def send(self, chunks: Iterator[bytes], delay: float, due: float) -> None:
        """Write one chunk, or ten where they aren't paced, and come back after the others' turn."""
        turn = list(itertools.islice(chunks, 1 if delay else 10))
        for chunk in turn:
            if self.transport.is_closing():
                return
            self.transport.write(chunk.replace(NO_TIME, TIME.format(time.monotonic()).encode()))
        if turn:
            due += delay
            asyncio.get_running_loop().call_at(due, self.send, chunks, delay, due)


@functools.cache
def stream_answer(count: int) -> list[bytes]:
    """The writes of a streamed answer: head and role, one per piece of text, then the end."""
    head = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"x-request-id: req_bench\r\nTransfer-Encoding: chunked\r\n\r\n")
    end = chat_chunk({}, "stop") + chat_chunk(None) + b"data: [DONE]\n\n"
    return [head + http_chunk(chat_chunk({"role": "assistant", "content": ""})),
            *(http_chunk(chat_chunk({"content": text})) for text in pieces(count)),
            http_chunk(end) + b"0\r\n\r\n"]


@functools.cache
def whole_answer(count: int) -> bytes:
    message = {"role": "assistant", "content": "".join(pieces(count)), "refusal": None}
    return http_json({"id": "chatcmpl-bench", "object": "chat.completion", "created": 1,
                      "model": "bench", "usage": USAGE, "choices": [
                          {"index": 0, "message": message, "finish_reason": "stop"}]})


def pieces(count: int) -> list[str]:
    return [NO_TIME.decode() + PIECES[index % len(PIECES)] for index in range(count)]


def chat_chunk(delta: Optional[Json], finish: Optional[str] = None) -> bytes:
    """One server-sent event; the one without a delta tells the usage."""
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    chunk = {"id": "chatcmpl-" + "Bench" * 5, "object": "chat.completion.chunk", "created": 1,
             "model": "bench", "service_tier": "default", "system_fingerprint": "fp_bench",
             **({"choices": [], "usage": USAGE} if delta is None else
                {"choices": choices, "usage": None})}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def http_json(data: Json) -> bytes:
    body = json.dumps(data).encode()
    return (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body))


async def serve_upstream(listener: socket.socket) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, sock=listener)
    await server.serve_forever()


# --------------------------------------------------------------------------------------- Client

class Answer(NamedTuple):
    sent: float
    raw: bytes                          # head and body, as they came in
    marks: list[tuple[int, float]]      # how many bytes had come in when

    def time_of(self, offset: int) -> float:
        return self.marks[bisect.bisect_left(self.marks, (offset, 0.0))][1]


class Client:
    """One keep-alive connection. What comes in is kept with its time and read later."""

    def __init__(self, address: tuple[str, int], selector: selectors.BaseSelector) -> None:
        self.address, self.selector = address, selector
        self.sock: Optional[socket.socket] = None

    def connect(self) -> None:
        self.sock = socket.create_connection(self.address, timeout=30)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(self.sock, selectors.EVENT_READ, self)

    def ask(self, request: bytes) -> None:
        if self.sock is None:
            self.connect()
        self.raw, self.marks, self.length, self.keep = bytearray(), [], None, True
        self.sent = time.monotonic()
        self.sock.sendall(request)

    def receive(self) -> Optional[Answer]:
        """Take in what has come; the answer if that completes it."""
        assert self.sock
        data = self.sock.recv(1 << 18)
        self.raw += data
        self.marks.append((len(self.raw), time.monotonic()))
        head_end = self.raw.find(b"\r\n\r\n") + 4
        if self.length is None and head_end >= 4:
            head = self.raw[:head_end].lower()
            length = re.search(rb"\r\ncontent-length: *(\d+)", head)
            self.length = head_end + int(length[1]) if length else 0
            self.keep = b"\r\nconnection: close" not in head
        complete = len(self.raw) >= self.length if self.length else (
            self.raw.endswith(b"\r\n0\r\n\r\n"))
        if data and not complete:
            return None
        if not data or not self.keep:
            self.close()
        return Answer(self.sent, bytes(self.raw), self.marks)

    def close(self) -> None:
        if self.sock:
            self.selector.unregister(self.sock)
            self.sock.close()
            self.sock = None


def load(url: str, requests: list[bytes], clients: int) -> tuple[list[Answer], float]:
    """Send the requests over so many connections, each its next when it has its answer."""
    selector = selectors.DefaultSelector()
    where = urlsplit(url)
    idle = [Client((where.hostname or "", where.port or 80), selector) for _ in range(clients)]
    answers: list[Answer] = []
    waiting, start = iter(requests), time.monotonic()
    try:
        for client in idle:
            client.connect()
        start = time.monotonic()
        while len(answers) < len(requests) and time.monotonic() < start + 60:
            for client, request in zip(idle, waiting):
                client.ask(request)
            idle = []
            for key, _ in selector.select(1):
                answer = key.data.receive()
                if answer:
                    answers.append(answer)
                    idle.append(key.data)
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr)
    finally:
        for key in list(selector.get_map().values()):
            key.data.close()
        selector.close()
    return answers, time.monotonic() - start


# -------------------------------------------------------------------------------------- Figures

def figures_of(case: Case, column: Column, share: float) -> Figures:
    """Put one load on this column's server, check every answer, and measure."""
    if not case.delay:
        load(column.url, requests_of(case, max(5, case.clients), column), case.clients)
    requests = requests_of(case, max(case.clients, int(case.requests * share)), column)
    answers, seconds = load(column.url, requests, case.clients)
    right = [answer for answer in answers if is_right(answer, case, column.chat)]
    took = [answer.marks[-1][1] - answer.sent for answer in right]
    first = [answer.time_of(answer.raw.find(b"data:") + 5) - answer.sent for answer in right]
    late = [answer.time_of(stamp.end()) - float(stamp[1]) for answer in right if case.stream
            for stamp in re.finditer(rb"t(\d{10}\.\d{6}) ", answer.raw)]
    return {"bad": len(requests) - len(right), "p50": 1000 * quantile(took, 0.5),
            "p99": 1000 * quantile(took, 0.99), "first": 1000 * quantile(first, 0.5),
            "requests": len(right) / seconds, "events": len(right) * case.chunks / seconds,
            "late50": 1000 * quantile(late, 0.5), "late99": 1000 * quantile(late, 0.99)}


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))] if values else 0.0


def is_right(answer: Answer, case: Case, chat: bool) -> bool:
    """Whether the text is complete and the answer ends as it should."""
    head, _, body = answer.raw.partition(b"\r\n\r\n")
    try:
        if b"chunked" in head.lower():
            body = unchunked(body)
        datas = [body] if not case.stream else [
            line[5:].strip() for line in body.splitlines() if line.startswith(b"data:")]
        ended = not case.stream or (datas.pop() == b"[DONE]" if chat else
                                    json.loads(datas[-1])["type"] == "message_stop")
        texts, reasons = zip(*(piece(json.loads(data)) for data in datas))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return False
    text = re.sub(r"t\d{10}\.\d{6} ", NO_TIME.decode(), "".join(texts))
    return (b" 200 " in head[:13] and ended and ("stop" if chat else "end_turn") in reasons
            and text == "".join(pieces(case.chunks)))


def unchunked(body: bytes) -> bytes:
    parts, start = [], 0
    while True:
        line_end = body.index(b"\r\n", start)
        size = int(body[start:line_end].split(b";")[0], 16)
        if not size:
            return b"".join(parts)
        parts.append(body[line_end + 2:line_end + 2 + size])
        start = line_end + size + 4


def piece(data: Json) -> tuple[str, Optional[str]]:
    """Text and reason to stop in a completion, a chunk of one, a message or an event of one."""
    choice = (data.get("choices") or [data])[0]
    part = choice.get("delta") or choice.get("message") or choice
    content = part.get("content") or part.get("text") or ""
    text = content if isinstance(content, str) else "".join(each["text"] for each in content)
    return text, choice.get("finish_reason") or part.get("stop_reason")


# ------------------------------------------------------------------------------------ Processes

@contextlib.contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process of ours, which ends when we leave, however we leave."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def upstream(port: int) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", port), backlog=1024) as listener:
        port, number = listener.getsockname()[1], listener.fileno()
        with running([sys.executable, __file__, "--serve", str(number)], pass_fds=[number]):
            yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def gateway(upstream_url: str) -> Iterator[tuple[str, Figures, int]]:
    """A fresh `ogx.py run`: its URL, how it started, and its process id."""
    with tempfile.TemporaryDirectory() as home, open(f"{home}/log", "w+b") as log:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        env = {"PATH": os.environ["PATH"], "HOME": home, "OPENAI_API_KEY": "bench",
               "OPENAI_BASE_URL": f"{upstream_url}/v1"}
        start = time.monotonic()
        with running([sys.executable, str(OGX), "run", "--port", str(port)], env=env,
                     stdout=log, stderr=log) as process:
            while not healthy(port):
                if process.poll() is not None or time.monotonic() > start + 10:
                    log.seek(0)
                    sys.exit(f"ogx.py didn't start:\n{log.read().decode()}")
                time.sleep(0.001)
            ready = time.monotonic() - start
            time.sleep(0.3)
            yield (f"http://127.0.0.1:{port}", {"ready": ready, "idle": rss(process.pid)},
                   process.pid)


def healthy(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            sock.sendall(b"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return b" 200 " in sock.recv(13)
    except OSError:
        return False


def rss(pid: int) -> float:
    """Resident memory in MB."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        return int(status.split("VmRSS:")[1].split()[0]) / 1024
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=False)
    return int(shown.stdout or 0) / 1024


# ---------------------------------------------------------------------------------------- Table

def measured_round(direct: Column, proxies: list[Column], share: float) -> Json:
    """One round: {column: {case: figures}}. The columns of a case follow each other closely."""
    with gateway(direct.url.partition("/v1")[0]) as (url, start, pid):
        ogx = Column("ogx.py", f"{url}/v1/messages", "openai/bench", False)
        columns = (direct, ogx, *proxies)
        result: dict[str, dict[str, Figures]] = {column.name: {} for column in columns}
        for (name, case), column in itertools.product(CASES.items(), columns):
            gc.collect()
            result[column.name][name] = figures_of(case, column, share)
        result["ogx.py"]["start"] = {**start, "loaded": rss(pid)}
    return result


def medians(rounds: list[Json]) -> Json:
    """{column: {case: {figure: median}}}; of bad answers the sum."""
    return {column: {case: {figure: (sum if figure == "bad" else statistics.median)(
        [each[column][case][figure] for each in rounds]) for figure in figures}
        for case, figures in cases.items()} for column, cases in rounds[0].items()}


def table(result: Json) -> Iterator[str]:
    shown = {"s": "{:.2f} s", "MB": "{:.1f} MB", "ms": "{:.2f} ms", "/s": "{:,.0f} /s"}
    direct, ogx, *others = result
    cells = [direct, ogx, "added", "limit", *others]
    yield f"{'':34}" + "".join(f"{cell:>13}" for cell in cells)
    for label, case, figure, unit, limit in ROWS:
        base, ours, *more = [cases.get(case, {}).get(figure) for cases in result.values()]
        cells = ["" if not value else shown[unit].format(value)
                 for value in (base, ours, *more)]
        added = "" if not (base and ours) else (
            f"{ours / base:.1%}" if unit == "/s" else f"{ours - base:+.2f} ms")
        cells[2:2] = [added, f"< {limit} {unit}" if limit else ""]
        yield f"{label:34}" + "".join(f"{cell:>13}" for cell in cells)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how many rounds (default: 5)")
    parser.add_argument("--quick", action="store_true", help="two rounds, a quarter of the load")
    parser.add_argument("--json", metavar="FILE", help="write medians and rounds to this file")
    parser.add_argument("--proxy", metavar="NAME=URL", action="append", default=[],
                        help="measure this Messages API too; may be given several times")
    parser.add_argument("--model", default="openai/bench",
                        help="the model to ask those proxies for (default: openai/bench)")
    parser.add_argument("--upstream-port", type=int, default=0, metavar="PORT",
                        help="where the fake upstream listens (default: any free port)")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve_upstream(socket.socket(fileno=options.serve)))
    proxies = [Column(name, f"{url.rstrip('/')}/v1/messages", options.model, False)
               for name, _, url in (each.partition("=") for each in options.proxy)]
    if not all(proxy.url.startswith("http://") for proxy in proxies):
        parser.error("--proxy takes NAME=http://HOST:PORT")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    gc.disable()                        # no pause of the client's own in the figures
    count, share = (2, 0.25) if options.quick else (max(1, options.rounds), 1)
    where = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    print(f"Python {platform.python_version()}, {where}; medians of {count} rounds\n", flush=True)
    with upstream(options.upstream_port) as url:
        direct = Column("direct", f"{url}/v1/chat/completions", "bench", True)
        rounds = [measured_round(direct, proxies, share) for _ in range(count)]
    result = medians(rounds)
    print("\n".join(table(result)))
    bad = {name: sum(figures.get("bad", 0) for figures in cases.values())
           for name, cases in result.items()}
    print("\nbad answers: " + ", ".join(f"{name} {number}" for name, number in bad.items()))
    if options.json:
        Path(options.json).write_text(json.dumps({
            "python": platform.python_version(), "machine": where, "medians": result,
            "rounds": rounds}, indent=1), encoding="utf-8")
    return 1 if any(bad.values()) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
