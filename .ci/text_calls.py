#!/usr/bin/env python3
"""How many calls a small model makes through ogx.py, of 100 prompts that each ask for one of three
tools. It needs a server with real weights, SmolLM2 on llama-server for example:

    python3 .ci/text_calls.py http://127.0.0.1:8080/v1              with the tools demanded
    python3 .ci/text_calls.py http://127.0.0.1:8080/v1 --choice auto
    OGX_FILE=older/ogx.py python3 .ci/text_calls.py ...             the same through another copy
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

FILE = os.environ.get("OGX_FILE", str(Path(__file__).resolve().parent.parent / "ogx.py"))
TOOLS = {
    "get_weather": ("Get the weather of a city.", "city"),
    "read_file": ("Read a file.", "path"),
    "run_command": ("Run a command in a shell.", "command"),
}
PROMPTS = [(name, words.format(thing)) for name, sentences, things in (
    ("get_weather", ("What is the weather in {}?", "Is it raining in {} today?"),
     ["Oslo", "Paris", "Rome", "Lima", "Tokyo", "Cairo", "Quito", "Delhi", "Accra", "Seoul",
      "Berlin", "Madrid", "Dublin", "Vienna", "Prague", "Athens", "Lisbon"]),
    ("read_file", ("Read the file {}.", "What does {} contain?"),
     [f"{stem}.{end}" for stem in ("notes", "main", "setup", "README") for end in (
         "txt", "py", "md", "json")]),
    ("run_command", ("Run the command {}.", "Please execute {} for me."),
     ["ls", "pwd", "whoami", "date", "uptime", "df", "free", "env", "id", "uname", "hostname",
      "ps", "top", "who", "w", "history", "jobs"]),
) for words in sentences for thing in things][:100]  # fmt: skip


def loaded(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("ogx", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["ogx"] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url", help="of an OpenAI-compatible server")
    parser.add_argument("--choice", choices=("any", "auto"), default="any")
    options = parser.parse_args()
    ogx = loaded(FILE)
    provider = ogx.Provider("local", ogx.PROVIDER_KINDS["llama-cpp"], options.url, "")
    gateway = ogx.Gateway(ogx.Config("127.0.0.1", 0, (provider,), (), {}))
    server = ogx.Server(gateway, "127.0.0.1", 0)
    server.start()
    gateway.start()
    gateway.discovery.done.wait(10)
    tools = [{"name": name, "description": words, "input_schema": {
        "type": "object", "required": [field], "properties": {field: {"type": "string"}}}}
        for name, (words, field) in TOOLS.items()]
    calls = right = 0
    for name, prompt in PROMPTS:
        body = {"model": "claude-opus-4-5", "max_tokens": 100, "temperature": 0, "tools": tools,
                "tool_choice": {"type": options.choice},
                "messages": [{"role": "user", "content": prompt}]}
        request = urllib.request.Request(f"{server.url}/v1/messages", json.dumps(body).encode(),
                                         {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            content = json.load(answer)["content"]
        named = [block["name"] for block in content if block["type"] == "tool_use"]
        calls, right = calls + bool(named), right + (named[:1] == [name])
    print(f"{len(PROMPTS)} prompts, tool_choice {options.choice}: {calls} with a call, {right} "
          "of the tool that was asked for")
    server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
