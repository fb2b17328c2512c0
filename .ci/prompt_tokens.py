#!/usr/bin/env python3
"""How many tokens of its prompts a real llama-server, and a real vLLM, process anew in sessions of
Claude Code: directly on the server's own Messages API, and through ogx.py by chat and by Messages.

    make bench                                         needs make test-clients and make test-servers
    python3 .ci/prompt_tokens.py --file older/ogx.py   through another copy
    python3 .ci/prompt_tokens.py --window 32768        sessions in a smaller window
    python3 .ci/prompt_tokens.py --servers vllm        on one of the two

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
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVERS, CLAUDE = ROOT / ".servers", ROOT / ".clients/npm/node_modules/.bin/claude"
# What starts a server, but for its port and window; the option that sets the window; and the
# counter of the tokens that it processed.
COMMANDS = {
    "llama": [SERVERS / "llama-server", "-m", SERVERS / "tiny.gguf", "--alias", "tiny", "--jinja",
              "--chat-template-file", SERVERS / "tiny.jinja", "--metrics"],
    "vllm": [SERVERS / "vllm-server", "--enable-prompt-tokens-details"],
}
WINDOWS = {"llama": "-c", "vllm": "--max-model-len"}
COUNTERS = {
    "llama": r"llamacpp:prompt_tokens_total (\d+)",
    "vllm": r'vllm:prompt_tokens_by_source_total\{.*source="local_compute"\} (\d+)',
}
TOOLS = "Agent,Bash,Read,Write,Edit,ToolSearch,NotebookEdit,WebFetch"
CHANGED = "Hello, now that the notes changed."  # which Claude Code tells in a system message
SESSIONS = (
    ("Hello there.", "RUN-SHELL please.", "Hello again.", "WRITE-NOTES please.", CHANGED),
    ("Hello, this is another session.", "RUN-SHELL in it.", "LOAD-TOOLS please.",
     "ASK-AGENT please.", "Hello, and so on."),
    ("Hello, a third session.", "LOAD-TOOLS in it.", "Hello, and good bye."),
)
PROMPTS = [prompt for session in SESSIONS for prompt in session]


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
    give_up = time.monotonic() + 180
    while time.monotonic() < give_up:
        try:
            fetched(url)
            return process
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.05)
    raise SystemExit(f"{command[0]} doesn't serve:\n{(folder / 'log').read_text()[-2000:]}")


def new_tokens(kind: str, server: str) -> int:
    """Of all prompts, since it was started."""
    match = re.search(f"^{COUNTERS[kind]}", fetched(f"{server}/metrics"), re.M)
    assert match
    return int(match[1])


class Session:
    def __init__(self, kind: str, way: str, file: str, window: int, folder: Path) -> None:
        self.folder, self.processes = folder, list[subprocess.Popen[bytes]]()
        (folder / "project").mkdir()
        (folder / "home").mkdir()
        self.environment = {
            "PATH": f"{CLAUDE.parent}:{os.environ['PATH']}", "HOME": str(folder / "home"),
            "LANG": "C.UTF-8", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1"}
        port, self.kind = str(free_port()), kind
        self.server = f"http://127.0.0.1:{port}"
        self.processes.append(started(
            [*map(str, COMMANDS[kind]), WINDOWS[kind], str(window), "--host", "127.0.0.1",
             "--port", port], f"{self.server}/health", self.environment, folder))
        if way == "direct":
            names = {f"ANTHROPIC_DEFAULT_{tier}_MODEL": "tiny" for tier in (
                "HAIKU", "SONNET", "OPUS", "FABLE")}
            self.command = [str(CLAUDE)]
            self.environment.update(
                names, ANTHROPIC_BASE_URL=self.server, ANTHROPIC_AUTH_TOKEN="x",
                CLAUDE_CODE_MAX_CONTEXT_TOKENS=str(window))
            return
        config = {"base_url": f"{self.server}/v1", "api_key": "x", "dialect": way}
        row = "llama-cpp" if (kind, way) == ("llama", "chat") else "vllm"  # which has Messages, too
        (folder / "config.json").write_text(json.dumps({"providers": {"inference": [
            {"provider_id": "local", "provider_type": f"remote::{row}", "config": config}]}}))
        own = free_port()
        self.processes.append(started(
            [sys.executable, file, "run", str(folder / "config.json"), "--port", str(own)],
            f"http://127.0.0.1:{own}/v1/health", self.environment, folder))
        time.sleep(1)
        self.command = [sys.executable, file, "connect", "claude", "--quiet", "--port", str(own),
                        "--"]

    def turns(self, prompts: Sequence[str]) -> list[tuple[int, str]]:
        """Of a session of its own in the same project."""
        self.begun = False
        return [self.turn(prompt) for prompt in prompts]

    def turn(self, prompt: str) -> tuple[int, str]:
        """The tokens that a turn processes anew, and what it says."""
        before = new_tokens(self.kind, self.server)
        if prompt == CHANGED:
            (self.folder / "project/notes.txt").write_text("Another note.\n")
        done = subprocess.run(
            [*self.command, "-p", prompt, *["--continue"] * self.begun, "--allowedTools", TOOLS],
            cwd=self.folder / "project", env=self.environment, timeout=600, text=True,
            stdin=subprocess.DEVNULL, capture_output=True)
        self.begun = True
        said = done.stdout.strip() or done.stderr.strip()[-300:]
        return new_tokens(self.kind, self.server) - before, said

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            process.wait(20)


def measured(kind: str, way: str, file: str, window: int) -> list[tuple[int, str]]:
    with tempfile.TemporaryDirectory() as folder:
        session = Session(kind, way, file, window, Path(folder))
        try:
            return [turn for prompts in SESSIONS for turn in session.turns(prompts)]
        finally:
            session.close()


def installed(kind: str) -> bool:
    return Path(COMMANDS[kind][0]).exists() and CLAUDE.exists()


def show(kind: str, columns: dict[str, list[tuple[int, str]]]) -> None:
    width = max(map(len, PROMPTS)) + 2
    print(f"prompt tokens processed anew by {kind}\n" + " " * width
          + "".join(f"{way:>10}" for way in columns))
    for place, prompt in enumerate(PROMPTS):
        print(f"{prompt:<{width}}" + "".join(f"{one[place][0]:>10,}" for one in columns.values()))
    sums = {way: sum(count for count, _ in column) for way, column in columns.items()}
    print(f"{'in all':<{width}}" + "".join(f"{count:>10,}" for count in sums.values()))
    if "direct" in sums:
        shares = (f"{100 * count / sums['direct']:.0f} %" for count in sums.values())
        print(f"{'of direct':<{width}}" + "".join(f"{share:>10}" for share in shares))
    for way, column in columns.items():
        odd = [said for _, said in column if not re.match("Hello|The |Good", said)]
        if odd:
            print(f"{way}: {odd[0]!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--file", default=str(ROOT / "ogx.py"))
    parser.add_argument("--window", type=int, default=131_072)
    parser.add_argument("--ways", nargs="+", default=["direct", "chat", "messages"])
    parser.add_argument("--servers", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--if-installed", action="store_true", help="else say so, and end well")
    options = parser.parse_args()
    kinds = [kind for kind in options.servers if installed(kind)]
    for kind in sorted(set(options.servers) - set(kinds)):
        print(f"left out: prompt tokens that {kind} processes anew, which make test-clients and "
              "make test-servers install", file=sys.stderr)
    for kind in kinds:
        show(kind, {way: measured(kind, way, options.file, options.window)
                    for way in options.ways})
    return int(kinds != options.servers and not options.if_installed)


if __name__ == "__main__":
    sys.exit(main())
