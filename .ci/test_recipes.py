"""The recipes of .docs/operation.md with the real nginx, HAProxy and systemd, where they are.

    make test-recipes       what isn't installed is skipped, and told
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from test_ogx import FakeUpstream, ask_for_token, gateway_over, request, said  # noqa: E402

PAGE = (ROOT / ".docs/operation.md").read_text(encoding="utf-8")


def recipe(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return str(found)


def program(name: str) -> str:
    path = shutil.which(name, path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/bin")
    if not path:
        pytest.skip(f"{name} isn't installed")
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def proxy(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        give_up = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, process.communicate()[0].decode()
                assert time.monotonic() < give_up
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def nginx(folder: Path, server: int) -> Iterator[int]:
    port = free_port()
    location = recipe("nginx").replace("8321", str(server))
    user = "user root; " if os.geteuid() == 0 else ""  # else it can't reach its own files
    (folder / "nginx.conf").write_text(
        f"{user}daemon off; pid {folder}/pid; error_log stderr; worker_processes 1; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path "
        f"{folder}/proxy; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; "
        f"scgi_temp_path {folder}/s;\nserver {{ listen 127.0.0.1:{port}; {location} }} }}\n")
    with proxy([program("nginx"), "-c", str(folder / "nginx.conf"), "-p", str(folder)], port):
        yield port


@contextlib.contextmanager
def haproxy(folder: Path, server: int, other: int = 9) -> Iterator[int]:
    port = free_port()
    text = recipe("haproxy").replace("8080", str(port)).replace("8321", str(server))
    (folder / "haproxy.cfg").write_text(text.replace("8322", str(other)))
    with proxy([program("haproxy"), "-f", str(folder / "haproxy.cfg")], port):
        time.sleep(3)  # until both were looked at
        yield port


PROXIES = pytest.mark.parametrize("before", [nginx, haproxy], ids=["nginx", "haproxy"])


def streamed(port: int, body: dict[str, Any]) -> Iterator[str]:
    """The events' types, as they arrive."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        data = json.dumps(body).encode()
        sock.sendall(b"POST /v1/messages HTTP/1.1\r\nhost: claude.test\r\nx-api-key: s3cret\r\n"
                     b"content-type: application/json\r\nconnection: close\r\n"
                     b"content-length: %d\r\n\r\n%b" % (len(data), data))
        rest = b""
        while True:
            piece = sock.recv(65536)
            rest += piece
            found = re.findall(rb"event: (\w+)\r?\n", rest)
            yield from (name.decode() for name in found)
            rest = rest[rest.rfind(b"\n\n") + 1 :] if found else rest
            if not piece:
                return


@PROXIES
def test_each_event_arrives_as_it_is_sent(tmp_path: Path, before: Any) -> None:
    """The upstream says its second word only when the client has had the first."""
    def dribble(fake: FakeUpstream, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        for word in ("one ", "two ", "three "):
            chunk = {"choices": [{"index": 0, "delta": {"content": word}}]}
            connection.sendall(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            assert had.acquire(timeout=10), "the client waits for what was sent"
        connection.sendall(said("end"))
        connection.shutdown(socket.SHUT_WR)

    had = threading.Semaphore(0)
    with gateway_over(dribble) as (client, _), before(tmp_path, client.port) as port:
        names = []
        for name in streamed(port, request(stream=True)):
            names.append(name)
            if name == "content_block_delta":
                had.release()
    assert names.count("content_block_delta") == 4 and names[-1] == "message_stop"


@PROXIES
def test_a_large_request_passes_and_a_token_holds(tmp_path: Path, before: Any) -> None:
    with gateway_over(said()) as (client, upstream), before(tmp_path, client.port) as port:
        ask_for_token(client.server, "s3cret")
        body = request("x" * 20_000_000, stream=True)
        assert list(streamed(port, body))[-1] == "message_stop"
        ask_for_token(client.server, "another")
        assert not list(streamed(port, request(stream=True)))
        assert len(upstream.seen) == 1


def test_haproxy_leaves_out_who_is_not_ready(tmp_path: Path) -> None:
    with gateway_over(models=(500, {})) as (broken, _), gateway_over(*[said()] * 8) as (
            good, _), haproxy(tmp_path, broken.port, good.port) as port:
        for _ in range(8):
            assert list(streamed(port, request(stream=True)))[-1] == "message_stop"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "ogx.service"
    unit.write_text(recipe("ini").replace("/usr/bin/python3", sys.executable))
    done = subprocess.run([program("systemd-analyze"), "verify", str(unit)], capture_output=True,
                          text=True)
    assert done.returncode == 0 and "ogx.service" not in done.stderr, done.stderr


def test_the_container_runs_the_file() -> None:
    assert 'ENTRYPOINT ["python3", "/ogx.py", "run", "--host", "0.0.0.0"]' in recipe("dockerfile")
