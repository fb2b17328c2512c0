#!/usr/bin/env python3
"""How many tokens of its prompts a real llama-server processes anew in a session of Claude Code:
directly on the server's own Messages API, and through ogx.py by chat and by Messages.

    make bench                                         needs make test-clients and make test-servers
    python3 .ci/prompt_tokens.py --file older/ogx.py   through another copy
    python3 .ci/prompt_tokens.py --window 32768        a session in a smaller window

Claude Code's prompts are its own; the model (.ci/tiny_model.py) says fixed things, as
its turns ask for, and its tokenizer knows few words, so that counts are higher than usual.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVERS, CLAUDE = ROOT / ".servers", ROOT / ".clients/npm/node_modules/.bin/claude"
TOOLS = "Bash,Read,Write,Edit,ToolSearch,NotebookEdit,WebFetch"
TURNS = ("Hello there.", "RUN-SHELL please.", "Hello again.")
SECOND = ("Hello, this is another session.", "RUN-SHELL in it.", "LOAD-TOOLS please.",
          "RUN-SHELL too.", "Hello, and good bye.")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetched(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as answer:
        return str(answer.read().decode())


def started(command: list[str], url: str, environment: dict[str, str],
            folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=folder)
    for _ in range(600):
        try:
            fetched(url)
            return process
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.05)
    raise SystemExit(f"{command[0]} doesn't serve:\n{(folder / 'log').read_text()[-2000:]}")


def new_tokens(server: str) -> int:
    """Of all prompts, since it was started."""
    match = re.search(r"^llamacpp:prompt_tokens_total (\d+)", fetched(f"{server}/metrics"), re.M)
    assert match
    return int(match[1])


class Session:
    def __init__(self, way: str, file: str, window: int, folder: Path) -> None:
        self.folder, self.begun, self.processes = folder, False, list[subprocess.Popen[bytes]]()
        (folder / "project").mkdir()
        (folder / "home").mkdir()
        self.environment = {
            "PATH": f"{CLAUDE.parent}:{os.environ['PATH']}", "HOME": str(folder / "home"),
            "LANG": "C.UTF-8", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1"}
        port, self.way = free_port(), way
        self.server = f"http://127.0.0.1:{port}"
        self.processes.append(started(
            [str(SERVERS / "llama-server"), "-m", str(SERVERS / "tiny.gguf"), "--alias", "tiny",
             "--jinja", "--chat-template-file", str(SERVERS / "tiny.jinja"), "-c", str(window),
             "--metrics", "--host", "127.0.0.1", "--port", str(port)],
            f"{self.server}/health", self.environment, folder))
        if way == "direct":
            names = {f"ANTHROPIC_DEFAULT_{tier}_MODEL": "tiny" for tier in (
                "HAIKU", "SONNET", "OPUS", "FABLE")}
            self.command = [str(CLAUDE)]
            self.environment.update(
                names, ANTHROPIC_BASE_URL=self.server, ANTHROPIC_AUTH_TOKEN="x",
                CLAUDE_CODE_MAX_CONTEXT_TOKENS=str(window))
            return
        config = {"base_url": f"{self.server}/v1", "api_key": "x", "dialect": way}
        kind = "llama-cpp" if way == "chat" else "vllm"  # the same server, as one with Messages
        (folder / "config.json").write_text(json.dumps({"providers": {"inference": [
            {"provider_id": "local", "provider_type": f"remote::{kind}", "config": config}]}}))
        own = free_port()
        self.processes.append(started(
            [sys.executable, file, "run", str(folder / "config.json"), "--port", str(own)],
            f"http://127.0.0.1:{own}/v1/health", self.environment, folder))
        time.sleep(1)
        self.command = [sys.executable, file, "connect", "claude", "--quiet", "--port", str(own),
                        "--"]

    def turn(self, prompt: str) -> tuple[int, str]:
        """The tokens that a turn processes anew, and what it says."""
        before = new_tokens(self.server)
        done = subprocess.run(
            [*self.command, "-p", prompt, *["--continue"] * self.begun, "--allowedTools", TOOLS],
            cwd=self.folder / "project", env=self.environment, timeout=600, text=True,
            stdin=subprocess.DEVNULL, capture_output=True)
        self.begun = True
        return new_tokens(self.server) - before, done.stdout.strip() or done.stderr.strip()[-300:]

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            process.wait(20)


def measured(way: str, file: str, window: int) -> list[tuple[int, str]]:
    with tempfile.TemporaryDirectory() as folder:
        session = Session(way, file, window, Path(folder))
        try:
            turns = [session.turn(prompt) for prompt in TURNS]
            session.begun = False
            return turns + [session.turn(prompt) for prompt in SECOND]
        finally:
            session.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--file", default=str(ROOT / "ogx.py"))
    parser.add_argument("--window", type=int, default=131_072)
    parser.add_argument("--ways", nargs="+", default=["direct", "chat", "messages"])
    parser.add_argument("--if-installed", action="store_true", help="else say so, and end well")
    options = parser.parse_args()
    if not ((SERVERS / "llama-server").exists() and CLAUDE.exists()):
        print("left out: prompt tokens processed anew, which make test-clients and make "
              "test-servers install", file=sys.stderr)
        return int(not options.if_installed)
    columns = [measured(way, options.file, options.window) for way in options.ways]
    width = max(map(len, (*TURNS, *SECOND))) + 2
    print("prompt tokens processed anew\n" + " " * width
          + "".join(f"{way:>10}" for way in options.ways))
    for place, prompt in enumerate((*TURNS, *SECOND)):
        print(f"{prompt:<{width}}" + "".join(f"{column[place][0]:>10,}" for column in columns))
    print(f"{'in all':<{width}}" + "".join(
        f"{sum(count for count, _ in column):>10,}" for column in columns))
    for way, column in zip(options.ways, columns):
        odd = [said for _, said in column if not re.match("Hello|The |Good", said)]
        if odd:
            print(f"{way}: {odd[0]!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
