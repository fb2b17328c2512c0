#!/usr/bin/env python3
"""Measure what ogx.py adds between a client and an upstream, beside nginx as a plain proxy.

    make bench                                  both tables, about two minutes
    python3 .ci/bench.py --quick                a look, about half a minute
    python3 .ci/bench.py --json figures.json    where to write the figures of every round

    python3 .ci/bench.py --upstream-port 9100 --proxy other=http://127.0.0.1:4000 --model gpt-bench
        one more column: a proxy of yours that serves the Messages API at that URL, sends to
        http://127.0.0.1:9100/v1 and knows that model; end its URL in #PID for its CPU and RSS

The columns, each measured in every case right after the one before it, on 127.0.0.1 alone:

    direct   a fake upstream, asked for Messages without a proxy
    nginx    a plain reverse proxy before that, where nginx is on the PATH
    ogx.py   before the upstream's Chat Completions: translated there and back
    native   ogx.py before the upstream's Messages: passed through

The ratios divide by the figure of "direct" or nginx; where a time is what a proxy adds ("+"), the
one to "direct" is of the whole times. The goals are limits on a quiet machine.

Upstream and servers are processes of their own, this process is the client. It keeps what comes in
with its time and reads it after the clock has stopped: an answer whose text or end isn't right
counts as bad, and any bad answer makes the exit status 1. A timing never does. Upstream and client
are Python too and share the cores with what they measure: "direct" is the most they can do, and a
proxy that comes near to it is measured too low. CPU per request or event is the proxy's alone.
"""
import argparse
import bisect
import contextlib
import gc
import http.client
import io
import itertools
import json
import os
import platform
import re
import resource
import selectors
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional
from urllib.parse import urlsplit

from bench_upstream import NO_TIME, block, pieces

UPSTREAM = Path(__file__).resolve().with_name("bench_upstream.py")
OGX = UPSTREAM.parent.parent / "ogx.py"
NGINX = shutil.which("nginx")
MODELS = {      # what we start, and the model to ask it for
    **({"nginx": "bench"} if NGINX else {}), "ogx.py": "chat/bench", "native": "messages/bench"}
Json = dict[str, Any]
Figures = dict[str, float]


class Column(NamedTuple):
    """A server to measure: the upstream itself, or a proxy of it."""
    name: str
    url: str            # of its Messages endpoint
    model: str
    pid: int = 0        # 0: not known, or not of interest


class Case(NamedTuple):
    """One kind of load. The client's prompt tells the upstream how to answer."""
    body: str           # small; large: a new conversation each time; turn: the next of one
    stream: bool
    chunks: int
    delay: int          # milliseconds between chunks
    clients: int
    requests: int


CASES = {
    "small": Case("small", False, 20, 0, 1, 1000),
    "large": Case("large", False, 20, 0, 1, 400),
    "turn": Case("turn", False, 20, 0, 1, 400),
    "crowd": Case("small", False, 20, 0, 32, 4000),
    "stream": Case("large", True, 200, 0, 1, 200),
    "streams": Case("small", True, 200, 0, 64, 768),
    "slow": Case("small", True, 100, 20, 200, 200),
}
ROWS = (    # label, case, figure, unit, goal; "+ms": of a proxy is shown what it adds to direct
    ("first answer after start", "start", "first", "s", "0.20 s"),
    ("RSS after that", "start", "idle", "MB", "40 MB"),
    ("small request, p50", "small", "p50", "+ms", "+0.15 ms"),
    ("109 KB request, new conversation, p50", "large", "p50", "+ms", "+1.6 ms"),
    ("109 KB request, next turn of one, p50", "turn", "p50", "+ms", "+1.2 ms"),
    ("small requests, 32 clients", "crowd", "requests", "/s", "4,000 /s"),
    ("the same: CPU of the proxy per request", "crowd", "cpu", "us", ""),
    ("1 stream, 109 KB request: first event, p50", "stream", "first", "+ms", ""),
    ("1 stream, 109 KB request: events", "stream", "events", "/s", "50,000 /s; native 140,000 /s"),
    ("64 streams: events", "streams", "events", "/s", "100,000 /s"),
    ("the same: CPU of the proxy per event", "streams", "cpu", "us", ""),
    ("200 streams, 20 ms a chunk: lateness p50", "slow", "late50", "ms", ""),
    ("the same: lateness p99", "slow", "late99", "ms", "15 ms"),
    ("the same: CPU of the proxy per event", "slow", "cpu", "us", "50 us"),
    ("the same: highest RSS", "slow", "peak", "MB", "50 MB"),
)
SHOWN = {"s": "{:.2f} s", "MB": "{:.0f} MB", "ms": "{:.2f} ms", "+ms": "{:+.2f} ms",
         "us": "{:.1f} us", "/s": "{:,.0f} /s"}
HELD = {    # connections that stay, for their memory
    "idle connection": Case("small", False, 20, 0, 1, 1),
    "running stream": Case("small", True, 1000, 1000, 1, 1),
}
NUMBERS = (1, 10, 100, 1000)

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


def words(length: int) -> str:
    return ("The command prints what it read from the file, or an error. " * length)[:length]


# --------------------------------------------------------------------------------------- Client

class Answer(NamedTuple):
    sent: float
    raw: bytes                          # head and body, as they came in
    marks: list[tuple[int, float]]      # how many bytes had come in when

    def time_of(self, offset: int) -> float:
        return self.marks[bisect.bisect_left(self.marks, (offset, 0.0))][1]


class Client:
    """One keep-alive connection. What comes in is kept with its time and read later."""

    def __init__(self, url: str, selector: selectors.BaseSelector) -> None:
        where = urlsplit(url)
        self.address, self.selector = (where.hostname or "", where.port or 80), selector
        self.sock: Optional[socket.socket] = None

    def connect(self) -> None:
        self.sock = socket.create_connection(self.address)
        for limit in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):      # settimeout costs a poll each
            self.sock.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", 30, 0))
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
        data = self.sock.recv(1 << 18)
        self.raw += data
        self.marks.append((len(self.raw), time.monotonic()))
        if self.length is None:
            self.read_head()
        complete = len(self.raw) >= self.length if self.length else (
            self.raw.endswith(b"\r\n0\r\n\r\n"))
        if data and not complete:
            return None
        if not data or not self.keep:
            self.close()
        return Answer(self.sent, bytes(self.raw), self.marks)

    def read_head(self) -> None:
        """Learn the answer's length (0: it ends with an empty chunk), once its head is complete."""
        head_end = self.raw.find(b"\r\n\r\n") + 4
        if head_end >= 4:
            head = self.raw[:head_end].lower()
            length = re.search(rb"\r\ncontent-length: *(\d+)", head)
            self.length = head_end + int(length[1]) if length else 0
            self.keep = b"\r\nconnection: close" not in head

    def close(self) -> None:
        if self.sock:
            self.selector.unregister(self.sock)
            self.sock.close()
            self.sock = None


def load(url: str, requests: list[bytes], clients: int) -> tuple[list[Answer], float]:
    """Send the requests over so many connections, each its next when it has its answer.

    Returns the answers that came within a minute and the seconds that they took; raises OSError
    when a connection is refused or reset.
    """
    answers: list[Answer] = []
    waiting, limit = iter(requests), time.monotonic() + 60
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        idle = [Client(url, selector) for _ in range(clients)]
        for client in idle:
            stack.callback(client.close)
            client.connect()
        start = time.monotonic()
        while len(answers) < len(requests) and time.monotonic() < limit:
            for client, request in zip(idle, waiting):
                client.ask(request)
            idle = []
            for key, _ in selector.select(1):
                answer = key.data.receive()
                if answer:
                    answers.append(answer)
                    idle.append(key.data)
        return answers, time.monotonic() - start


# -------------------------------------------------------------------------------------- Figures

def figures_of(case: Case, column: Column, share: float) -> Figures:
    """Put one load on this column's server, check every answer, and measure."""
    requests = requests_of(case, max(case.clients, int(case.requests * share)), column)
    answers, seconds, before = [], 1.0, 0.0
    try:
        if not case.delay:
            load(column.url, requests_of(case, max(5, case.clients), column), case.clients)
        forget_peak(column.pid)
        before = cpu(column.pid)
        answers, seconds = load(column.url, requests, case.clients)
    except OSError as error:
        print(f"{column.name}: {error}", file=sys.stderr)
    used = cpu(column.pid) - before
    right = [answer for answer in answers if is_right(answer, case)]
    took = [answer.marks[-1][1] - answer.sent for answer in right]
    first = [answer.time_of(answer.raw.find(b"data:") + 5) - answer.sent for answer in right]
    late = [answer.time_of(stamp.end()) - float(stamp[1]) for answer in right if case.delay
            for stamp in re.finditer(rb"t(\d{10}\.\d{6}) ", answer.raw)]
    events = len(right) * case.chunks
    return {"bad": len(requests) - len(right), "p50": 1000 * quantile(took, 0.5),
            "first": 1000 * quantile(first, 0.5), "requests": len(right) / seconds,
            "events": events / seconds,
            "late50": 1000 * quantile(late, 0.5), "late99": 1000 * quantile(late, 0.99),
            "cpu": 1e6 * used / max(1, events if case.stream else len(right)),
            "peak": rss(column.pid, "VmHWM")}


def memory(column: Column, case: Case) -> Figures:
    """RSS in MB with no, 1, 10, ... connections that each had an answer, or are in a stream."""
    figures, clients, bad = {"0": rss(column.pid)}, [], 0
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for number in NUMBERS:
            for request in requests_of(case, number - len(clients), column):
                client, answer = Client(column.url, selector), None
                clients.append(client)
                client.ask(request)
                stack.callback(client.close)
                while not (answer or case.stream and b"content_block_delta" in client.raw):
                    answer = client.receive()
                bad += bool(answer) if case.stream else not is_right(answer, case)
            time.sleep(0.3)
            figures[str(number)] = rss(column.pid)
    return {**figures, "bad": bad}


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))] if values else 0.0


def is_right(answer: Answer, case: Case) -> bool:
    """Whether the text is complete and the answer ends as it should."""
    raw = types.SimpleNamespace(makefile=lambda mode: io.BytesIO(answer.raw))
    response = http.client.HTTPResponse(raw)
    try:
        response.begin()
        body = response.read()
        datas = [json.loads(data) for data in ([body] if not case.stream else [
            line[5:] for line in body.splitlines() if line.startswith(b"data:")])]
        texts, reasons = zip(*map(piece, datas))
    except (http.client.HTTPException, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return False
    text = re.sub(r"t\d{10}\.\d{6} ", NO_TIME, "".join(texts))
    return (response.status == 200 and "end_turn" in reasons
            and datas[-1].get("type") == ("message_stop" if case.stream else "message")
            and text == "".join(pieces(case.chunks, case.delay > 0)))


def piece(data: Json) -> tuple[str, Optional[str]]:
    """Text and reason to stop in a message or an event of one."""
    part = data.get("delta", data)
    text = part.get("text", "") + "".join(each["text"] for each in part.get("content", []))
    return text, part.get("stop_reason")


# ------------------------------------------------------------------------------------ Processes

NGINX_CONFIG = """daemon off; master_process off; pid {home}/pid; error_log stderr;
events {{ worker_connections 8192; }}
http {{
    access_log off; keepalive_requests 1000000; client_max_body_size 0;
    client_body_buffer_size 1m; client_body_temp_path {home}; proxy_temp_path {home};
    fastcgi_temp_path {home}; uwsgi_temp_path {home}; scgi_temp_path {home};
    upstream fake {{ server {upstream}; keepalive 1024; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://fake; proxy_buffering off;
            proxy_http_version 1.1; proxy_set_header Connection "";
        }}
    }}
}}
"""


@contextlib.contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process of ours, which ends when we leave, however we leave."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()


@contextlib.contextmanager
def upstream(port: int) -> Iterator[str]:
    """The fake upstream: its HOST:PORT."""
    with socket.create_server(("127.0.0.1", port), backlog=1024) as listener:
        port, number = listener.getsockname()[1], listener.fileno()
        with running([sys.executable, str(UPSTREAM), str(number)], pass_fds=[number]):
            yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def started(name: str, upstream_address: str) -> Iterator[tuple[Column, Figures]]:
    """A fresh nginx or ogx.py, once it has given its first right answer, and how it started."""
    with tempfile.TemporaryDirectory() as home, open(f"{home}/log", "w+b") as log:
        config, port = Path(home, "config"), free_port()
        if name == "nginx":
            text = NGINX_CONFIG.format(home=home, upstream=upstream_address, port=port)
            command = [str(NGINX), "-p", home, "-c", str(config)]
        else:
            text = json.dumps({"providers": {"inference": [
                {"provider_id": dialect, "provider_type": "remote::openai-compatible",
                 "config": {"base_url": f"http://{upstream_address}/v1", "dialect": dialect}}
                for dialect in ("chat", "messages")]}})
            command = [sys.executable, str(OGX), "run", str(config), "--port", str(port)]
        config.write_text(text, encoding="utf-8")
        env, start = {"PATH": os.environ["PATH"], "HOME": home}, time.monotonic()
        with running(command, env=env, stdout=log, stderr=log) as process:
            column = Column(name, f"http://127.0.0.1:{port}/v1/messages", MODELS[name], process.pid)
            while not answers(column):
                if process.poll() is not None or time.monotonic() > start + 10:
                    log.seek(0)
                    sys.exit(f"{name} didn't start:\n{log.read().decode()}")
                time.sleep(0.001)
            first = time.monotonic() - start
            time.sleep(0.3)
            yield column, {"first": first, "idle": rss(process.pid)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def answers(column: Column) -> bool:
    with contextlib.suppress(OSError):
        got, _ = load(column.url, requests_of(CASES["small"], 1, column), 1)
        return is_right(got[0], CASES["small"])
    return False


def cpu(pid: int) -> float:
    """Seconds of CPU that a process and its threads have used so far."""
    try:
        return time.clock_gettime(~pid << 3 | 2) if pid else 0.0    # clock_getcpuclockid(3)
    except OSError:
        return 0.0


def rss(pid: int, line: str = "VmRSS") -> float:
    """Resident memory in MB: now, or as VmHWM the highest since forget_peak."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii") if pid else ""
        return int(status.split(f"{line}:")[1].split()[0]) / 1024 if status else 0.0
    return 0.0


def forget_peak(pid: int) -> None:
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


# ---------------------------------------------------------------------------------------- Table

def measured_round(address: str, proxies: list[Column], share: float) -> Json:
    """One round: {column: {case: figures}}. The columns of a case follow each other closely."""
    columns = [Column("direct", f"http://{address}/v1/messages", "bench")]
    result: dict[str, dict[str, Figures]] = {"direct": {"start": {}}}
    with contextlib.ExitStack() as stack:
        for name in MODELS:
            if name != "native":        # the same process as ogx.py
                column, start = stack.enter_context(started(name, address))
            columns.append(column._replace(name=name, model=MODELS[name]))
            result[name] = {"start": start if name == column.name else {}}
        for (name, case), column in itertools.product(CASES.items(), [*columns, *proxies]):
            gc.collect()
            result.setdefault(column.name, {"start": {}})[name] = figures_of(case, column, share)
    return result


def memories(address: str) -> Json:
    """{column: {kind of connection: {how many: RSS}}}, each measured on a fresh server."""
    result: Json = {name: {} for name in MODELS}
    for name, (kind, case) in itertools.product(MODELS, HELD.items()):
        with started(name, address) as (column, _):
            result[name][kind] = memory(column, case)
    return result


def medians(rounds: list[Json]) -> Json:
    """{column: {case: {figure: median}}}; of bad answers the sum."""
    return {column: {case: {figure: (sum if figure == "bad" else statistics.median)(
        [each[column][case][figure] for each in rounds]) for figure in figures}
        for case, figures in cases.items()} for column, cases in rounds[0].items()}


def speed_table(result: Json) -> Iterator[list[str]]:
    """Figures, and of each proxy but nginx the ratios to the direct upstream and to nginx."""
    against = [name for name in ("direct", "nginx") if name in result]
    yield ["", *itertools.chain.from_iterable(
        [name] if name in against else [name, *(f"/ {other}" for other in against)]
        for name in result), "goal"]
    for label, case, figure, unit, goal in ROWS:
        total = {name: cases[case].get(figure, 0) for name, cases in result.items()}
        added = {name: value - total["direct"] for name, value in total.items()}
        cells = [label]
        for name in total:
            plain = unit != "+ms" or name == "direct"
            value, form = (total, SHOWN[unit.strip("+")]) if plain else (added, SHOWN[unit])
            cells.append(form.format(value[name]) if total[name] else "")
            if name not in against:
                cells += [ratio(total[name], total["direct"]),
                          *(ratio(value[name], value["nginx"]) for _ in against[1:])]
        yield [*cells, goal]


def ratio(value: float, other: float) -> str:
    if not value or other <= 0:
        return ""
    return f"{value / other:.2f}" if value < 10 * other else f"{value / other:.0f}"


def memory_table(result: Json) -> Iterator[list[str]]:
    yield ["RSS, and what one costs, with", "none", *(f"{number:,}" for number in NUMBERS)]
    for name, kind in itertools.product(result, HELD):
        rest = result[name][kind]["0"]
        values = [(result[name][kind][str(number)], number) for number in NUMBERS]
        yield [f"{name}, {kind}", f"{rest:.1f} MB", *(
            f"{value:.1f} MB, {1024 * (value - rest) / number:.0f} KB" for value, number in values)]


def markdown(rows: Iterator[list[str]]) -> str:
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join("| " + " | ".join(
        cell.rjust(width) if index else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(row, widths))) + " |" for row in cells)


def proxy_column(argument: str) -> Column:
    parts = re.fullmatch(r"([^=]+)=(http://[^#]+?)/?(?:#(\d+))?", argument)
    if not parts:
        raise argparse.ArgumentTypeError("should be NAME=http://HOST:PORT[#PID]")
    return Column(parts[1], f"{parts[2]}/v1/messages", "", int(parts[3] or 0))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how many rounds (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one round, a quarter of the load")
    parser.add_argument("--json", metavar="FILE", default=str(OGX.parent / ".dev" / "bench.json"),
                        help="write medians and rounds to this file (default: .dev/bench.json)")
    parser.add_argument("--proxy", metavar="NAME=URL[#PID]", action="append", default=[],
                        type=proxy_column,
                        help="measure this Messages API too; may be given several times")
    parser.add_argument("--model", default="openai/bench",
                        help="the model to ask those proxies for (default: openai/bench)")
    parser.add_argument("--upstream-port", type=int, default=0, metavar="PORT",
                        help="where the fake upstream listens (default: any free port)")
    options = parser.parse_args()
    proxies = [column._replace(model=options.model) for column in options.proxy]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    gc.disable()                        # no pause of the client's own in the figures
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))    # a proxied stream takes two
    count, share = (1, 0.25) if options.quick else (max(1, options.rounds), 1)
    where = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    print(f"Python {platform.python_version()}, {where}; medians of {count} rounds\n", flush=True)
    with upstream(options.upstream_port) as address:
        rounds = [measured_round(address, proxies, share) for _ in range(count)]
        result = medians(rounds)
        print(markdown(speed_table(result)), flush=True)
        held = memories(address)
    print("\n" + markdown(memory_table(held)))
    bad = {name: sum(figures.get("bad", 0) for figures in (
        *cases.values(), *held.get(name, {}).values())) for name, cases in result.items()}
    print("\nbad answers: " + ", ".join(f"{name} {number}" for name, number in bad.items()))
    Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    Path(options.json).write_text(json.dumps({
        "python": platform.python_version(), "machine": where, "medians": result,
        "memory": held, "rounds": rounds}, indent=1), encoding="utf-8")
    return 1 if any(bad.values()) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
