"""What the tests with real clients share: a gateway before a scripted upstream, Claude Code on it,
and programs in JavaScript. Their fixtures are in conftest.py.

OGX_PYTHON names another Python to run the gateway with, OGX_FILE another copy of it.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import pytest
from scripted_messages import CLAUDE, ScriptedMessages
from scripted_responses import REASONS, ScriptedResponses
from scripted_upstream import KEY, Json, ScriptedUpstream, text_of

ROOT = Path(__file__).resolve().parents[2]
OGX = os.environ.get("OGX_FILE", str(ROOT / "ogx.py"))
PYTHON = os.environ.get("OGX_PYTHON", sys.executable)
NPM = ROOT / ".clients/npm"
CLAUDE_BIN = NPM / "node_modules/.bin"
MODEL = "openai/scripted"
# Keeps Claude Code from talking to anyone but the gateway: updates, telemetry, feature flags.
OFFLINE = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}
UPSTREAMS = {"chat": ScriptedUpstream, "responses": ScriptedResponses, "messages": ScriptedMessages}
DIALECTS = list(UPSTREAMS)
every_dialect = pytest.mark.parametrize("dialect", DIALECTS)
MODELS = {"chat": MODEL, "responses": f"openai/{REASONS}", "messages": f"anthropic/{CLAUDE}"}


@dataclass
class Gateway:
    url: str
    project: Path
    environment: dict[str, str]

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, cwd=self.project, env=self.environment, timeout=90,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )

    def connect(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        port = self.url.rsplit(":", 1)[1]
        return self.run(PYTHON, OGX, "connect", "claude", "--port", port, *arguments)

    def claude(self, prompt: str, *flags: str) -> "subprocess.CompletedProcess[str]":
        return self.connect("--model", MODEL, "--", "-p", prompt, *flags)

    def ask(self, prompt: str, *flags: str) -> Json:
        return self.ask_of("scripted", prompt, *flags)

    def ask_of(self, model: str, prompt: str, *flags: str) -> Json:
        """Claude Code's JSON result of a run that must succeed."""
        words = ["-p", prompt, *flags, "--output-format", "json"]
        done = self.connect("--model", f"openai/{model}", "--", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        result: Json = json.loads(done.stdout)
        assert result["subtype"] == "success" and not result["is_error"], result
        return result


@contextlib.contextmanager
def started(
    tmp_path: Path, monkeypatch: Any, variables: dict[str, str], *config: str
) -> Iterator[Gateway]:
    """A gateway with these variables, and a HOME that Claude Code shares with it."""
    for name in list(os.environ):
        if re.match(r"(?i)anthropic|openai|claude|aws_|.*_proxy$", name):
            monkeypatch.delenv(name)
    for folder in ("home", "project"):
        (tmp_path / folder).mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = f"{CLAUDE_BIN}:{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": os.environ["HOME"], "LANG": "C.UTF-8", **OFFLINE}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    log = tmp_path / "gateway.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [PYTHON, OGX, "run", *config, "--port", url.rsplit(":", 1)[1]], cwd=tmp_path,
            stdout=out, stderr=subprocess.STDOUT, env={**environment, **variables},
        )
    try:
        wait_until_healthy(url, process, log)
        yield Gateway(url, tmp_path / "project", environment)
    finally:
        process.terminate()
        process.wait(10)
    assert "Traceback" not in log.read_text(), log.read_text()


def wait_until_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    give_up = time.monotonic() + 10
    while True:
        try:
            return opener.open(f"{url}/v1/health", timeout=2).close()
        except OSError:
            alive = process.poll() is None and time.monotonic() < give_up
            assert alive, f"no gateway:\n{log.read_text()}"
            time.sleep(0.02)


def written_config(
    folder: Path, kind: str, upstream: ScriptedUpstream, settings: Optional[Json] = None,
    **more: Any,
) -> str:
    """The path of a configuration whose only provider is the upstream, of this kind."""
    config = {"base_url": upstream.url, "api_key": KEY, **more}
    entry = {"provider_id": kind, "provider_type": f"remote::{kind}", "config": config}
    file = folder / "config.json"
    file.write_text(json.dumps({"providers": {"inference": [entry]}, "server": settings or {}}))
    return str(file)


# ======== Files ===============================================================================


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


# ======== Programs in JavaScript ==============================================================


def javascript(gateway: Gateway, model: str, code: str) -> "subprocess.Popen[str]":
    """A running program, a module beside the installed packages; it knows `url` and `model`, and
    `say` writes a value as a line of JSON."""
    known = f"""
        const url = {json.dumps(gateway.url)}, model = {json.dumps(model)};
        const say = (value) => console.log(JSON.stringify(value));
    """
    process = subprocess.Popen(
        ["node", "--input-type=module"], cwd=NPM, env=gateway.environment, text=True,
        encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    assert process.stdin
    process.stdin.write(known + code)
    process.stdin.close()
    process.stdin = None  # so that communicate() doesn't look after it
    return process


def told_by(gateway: Gateway, model: str, code: str) -> list[Any]:
    """What a program says, whole: one that fails or warns is none that works."""
    with javascript(gateway, model, code) as process:
        try:
            out, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, ""), out
    return [json.loads(line) for line in out.splitlines()]


def results_in(body: Json) -> list[str]:
    """What a request's tool results say, whatever it speaks."""
    if "input" in body:
        return [one["output"] for one in body["input"] if one.get("type") == "function_call_output"]
    told = [one for one in body["messages"] if one["role"] == "tool"]
    told += [block for one in body["messages"] if isinstance(one["content"], list)
             for block in one["content"] if block["type"] == "tool_result"]
    return [text_of(one) for one in told]
