#!/usr/bin/env python3
"""Load ogx.py for a while and look whether it keeps what it should have let go.

    make soak                                about two minutes
    python3 .ci/soak.py --minutes 60         the hour that this stands for

A fake upstream and the gateway run as processes of their own, all traffic stays on 127.0.0.1:

    idle     1,000 keep-alive connections at once, and what each of them costs
    streams  200 streams at once, each of which must be complete and hold its own text
    rounds   requests of every kind for the rest of the time, 10,000 at least: streams, whole
             answers, counts, errors, refusals, clients that leave; after each round the gateway
             must have as many threads and file descriptors as before, and no more memory

Threads, descriptors and memory are read from /proc, so this needs Linux. Any failure makes the exit
status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

OGX = Path(__file__).resolve().parent.parent / "ogx.py"
HEADERS = {"content-type": "application/json"}
ROUND = 1000  # requests
CLIENTS = 16
KINDS = ("ok", "ok", "ok", "whole", "count", "bad", "refuse", "break", "leave")


class Upstream(BaseHTTPRequestHandler):
    """Chat Completions as the prompt's first word asks for: `ok`, `refuse`, `break` or `slow`; the
    answer's text is the prompt, once a chunk."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][-1]["content"] if "messages" in body else ""
        if self.path.endswith("/messages"):
            self.answer(404, {})
        elif prompt.startswith("refuse"):
            self.answer(400, {"error": {"message": f"no {prompt}"}})
        elif body.get("stream"):
            self.stream(prompt)
        else:
            message = {"role": "assistant", "content": prompt}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.answer(200, {"choices": [choice]})

    def stream(self, prompt: str) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for part in range(40):
            if prompt.startswith("slow"):
                time.sleep(0.02)
            if prompt.startswith("break") and part == 20:
                self.close_connection = True
                return
            self.chunk({"delta": {"content": f"{prompt} {part};"}})
        self.chunk({"delta": {}, "finish_reason": "stop"})
        self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def chunk(self, choice: Any) -> None:
        data = f"data: {json.dumps({'choices': [{'index': 0, **choice}]})}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True


class Server(ThreadingHTTPServer):
    request_queue_size = 1024
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class State(NamedTuple):
    threads: int
    files: int
    megabytes: float


def state_of(pid: int) -> State:
    status = Path(f"/proc/{pid}/status").read_text()
    numbers = [int(re.search(rf"{name}:\s+(\d+)", status).group(1))  # type: ignore[union-attr]
               for name in ("Threads", "VmRSS")]  # fmt: skip
    return State(numbers[0], len(os.listdir(f"/proc/{pid}/fd")), numbers[1] / 1024)


def settled(pid: int, before: State | None = None, seconds: float = 15.0) -> State:
    """The state once it stands still and, with `before`, is back there."""
    deadline, last = time.monotonic() + seconds, state_of(pid)
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = state_of(pid)
        back = not before or (now.threads <= before.threads and now.files <= before.files)
        if now[:2] == last[:2] and back:
            return now
        last = now
    return last


def connection(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=60)


def body(prompt: str, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": prompt}]
    return json.dumps({"model": "p/m", "max_tokens": 100, "messages": messages, **fields}).encode()


def streamed_text(data: bytes) -> str:
    """The text of a stream, which must be complete."""
    events = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: ")]
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop", kinds[-1]
    return "".join(event["delta"].get("text", "") for event in events
                   if event["type"] == "content_block_delta")  # fmt: skip


def idle(port: int, pid: int, count: int) -> None:
    before = settled(pid)
    clients = [connection(port) for _ in range(count)]
    for client in clients:
        client.request("GET", "/v1/health")
        assert client.getresponse().read()
    state = settled(pid)
    cost = (state.megabytes - before.megabytes) * 1024 / count
    print(f"idle     {count} connections: {state}, {cost:.0f} KB each", flush=True)
    cpu = cpu_of(pid)
    time.sleep(2)
    assert cpu_of(pid) - cpu < 0.2, "idle connections cost processor time"
    for client in (clients[0], clients[-1]):  # the oldest lives on
        client.request("GET", "/v1/health")
        assert client.getresponse().status == 200
    for client in clients:
        client.close()
    assert cost < 100, "an idle connection costs too much memory"
    after = settled(pid, before)
    assert after.threads <= before.threads and after.files <= before.files, (before, after)


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def streams(port: int, pid: int, count: int) -> None:
    before = settled(pid)
    gate, wrong = threading.Barrier(count), []

    def one(number: int) -> None:
        client, prompt = connection(port), f"slow {number}"
        try:
            gate.wait(60)
            client.request("POST", "/v1/messages", body(prompt, stream=True), HEADERS)
            text = streamed_text(client.getresponse().read())
            assert text == "".join(f"{prompt} {part};" for part in range(40)), text[:100]
        except Exception as error:
            wrong.append(error)
        finally:
            client.close()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    print(f"streams  {count} at once, all complete: {settled(pid, before)}", flush=True)


def round_of(port: int, start: int) -> None:
    """ROUND requests of every kind, each checked."""

    def some(client_number: int) -> None:
        client = connection(port)
        for number in range(start + client_number, start + ROUND, CLIENTS):
            kind = KINDS[number % len(KINDS)]
            prompt = f"{kind} {number}"
            if kind == "leave":
                with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
                    data = body(f"slow {number}", stream=True)
                    head = f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n" \
                           f"content-length: {len(data)}\r\n\r\n"  # fmt: skip
                    sock.sendall(head.encode() + data)
                    sock.recv(100)
                continue
            path = "/v1/messages/count_tokens" if kind == "count" else "/v1/messages"
            data = b"{" if kind == "bad" else body(prompt, stream=kind in ("ok", "break"))
            client.request("POST", path, data, HEADERS)
            reply = client.getresponse()
            status, answer = reply.status, reply.read()
            if kind == "ok":
                wanted = "".join(f"{prompt} {part};" for part in range(40))
                assert streamed_text(answer) == wanted, answer[-200:]
            elif kind == "whole":
                assert json.loads(answer)["content"][0]["text"] == prompt
            elif kind == "break":
                assert b"event: error" in answer[-500:], answer[-200:]
            else:
                assert status == {"count": 200, "bad": 400, "refuse": 400}[kind], answer
        client.close()

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(some, range(CLIENTS)))


def rounds(port: int, pid: int, until: float) -> None:
    for number in range(5):  # until everything is allocated that stays
        round_of(port, number * ROUND)
    before, count = settled(pid), 0
    while count < 10_000 or time.monotonic() < until:
        round_of(port, (5 + count) * ROUND)
        count += ROUND
        if count % (5 * ROUND) == 0:
            now = settled(pid, before)
            print(f"rounds   {count} requests: {now}", flush=True)
            assert now.threads <= before.threads, (before, now)
            assert now.files <= before.files + CLIENTS, (before, now)  # idle ones to the upstream
            assert now.megabytes < before.megabytes + 4, (before, now)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=2)
    options = parser.parse_args()
    until = time.monotonic() + options.minutes * 60
    upstream = Server(("127.0.0.1", 0), Upstream)
    multiprocessing.get_context("fork").Process(target=upstream.serve_forever, daemon=True).start()
    settings = {
        "providers": {"inference": [{
            "provider_id": "p", "provider_type": "remote::openai-compatible", "config": {
                "base_url": f"http://127.0.0.1:{upstream.server_address[1]}/v1"}}]},
        "server": {"retries": 0}}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "soak.json"
        config.write_text(json.dumps(settings))
        gateway = subprocess.Popen(
            [sys.executable, str(OGX), "run", str(config), "--port", "0", "--log-level", "error",
             "--state", str(Path(folder) / "state.sqlite")],
            stdout=subprocess.PIPE, text=True)  # fmt: skip
        try:
            assert gateway.stdout
            port = int(gateway.stdout.readline().rpartition(":")[2])
            with contextlib.closing(connection(port)) as client:
                client.request("GET", "/v1/models")
                assert b'"p/m"' in client.getresponse().read()
            idle(port, gateway.pid, 1000)
            streams(port, gateway.pid, 200)
            rounds(port, gateway.pid, until)
            gateway.send_signal(signal.SIGTERM)
            assert gateway.wait(30) == 0
        finally:
            gateway.kill()
    print("soak: nothing was kept that should have been let go")
    return 0


if __name__ == "__main__":
    sys.exit(main())
