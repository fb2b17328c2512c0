"""Real upstream servers behind ogx.py: llama.cpp's llama-server, vLLM and `transformers serve`,
those that are installed.

    make test-servers       installs them (.ci/servers-install) and runs this file

All serve the same tiny model (.ci/tiny_model.py), which says fixed things: its answers show what
reached it. For the gateway llama.cpp is two providers, `chat` and `responses`, and vLLM `vllm-chat`
and `vllm-native`, which speaks Messages. OGX_PYTHON names another Python for it, OGX_FILE another
copy of it. The tests of one state of a server, such as that it loads, are after the common ones.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

pytestmark = pytest.mark.servers

ROOT = Path(__file__).resolve().parents[1]
OGX = os.environ.get("OGX_FILE", str(ROOT / "ogx.py"))
PYTHON = os.environ.get("OGX_PYTHON", sys.executable)
SERVERS = ROOT / ".servers"
CLAUDE_BIN = ROOT / ".clients/npm/node_modules/.bin"
KEY, CONTEXT = "the-key-of-llama", 65_536
DIALECTS = ["chat", "responses"]
LLAMA_SERVER, VLLM_SERVER = SERVERS / "llama-server", SERVERS / "vllm-server"
LLAMA = [f"{dialect}/tiny" for dialect in DIALECTS] * LLAMA_SERVER.exists()
VLLM = ["vllm-chat/tiny", "vllm-native/tiny"] * VLLM_SERVER.exists()
TRANSFORMERS = SERVERS / "venv/bin/transformers"
MODELS = [*LLAMA, *VLLM, *["transformers/ogx/tiny"] * TRANSFORMERS.exists()]
HELLO = "Hello from a tiny model \U0001f600 with bytes."
Json = dict[str, Any]
os.environ.update(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")  # for the SDKs

every_model = pytest.mark.parametrize("model", MODELS)
every_llama = pytest.mark.parametrize("model", LLAMA)
every_vllm = pytest.mark.parametrize("model", VLLM)
# vLLM without a parser for it shows thinking as text, natively, and refuses documents there.
every_thinker = pytest.mark.parametrize("model", [m for m in MODELS if m != "vllm-native/tiny"])
needs_llama = pytest.mark.skipif(not LLAMA, reason="llama-server isn't installed, or doesn't run")
needs_vllm = pytest.mark.skipif(not VLLM, reason="vLLM isn't installed")


# ======== Servers and the gateway ============================================================


class Server:
    """A process that serves HTTP on a free loopback port, the same one whenever it is started."""

    def __init__(self, folder: Path, name: str, health: str, command: list[Any]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.health = f"http://127.0.0.1:{self.port}", health
        self.command = [str(self.port if word == "PORT" else word) for word in command]
        self.folder, self.log = folder, folder / f"{name}.log"

    def __enter__(self) -> "Server":
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=base_environment(self.folder),
                stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        give_up = time.monotonic() + 120
        while self.process.poll() is None and time.monotonic() < give_up:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url + self.health, timeout=2).close()
                return self
            time.sleep(0.05)
        self.stop()
        raise AssertionError(f"{self.command} doesn't serve:\n{self.log.read_text()[-4000:]}")

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait(10)

    def sdk(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key="any", max_retries=0, timeout=60)


def base_environment(folder: Path) -> dict[str, str]:
    """Nothing of the developer's own, and no word to anyone but the gateway."""
    (folder / "home").mkdir(exist_ok=True)
    quiet = ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "DISABLE_AUTOUPDATER", "HF_HUB_OFFLINE")
    return {"PATH": f"{CLAUDE_BIN}:{os.environ['PATH']}", "HOME": str(folder / "home"),
            "LANG": "C.UTF-8", "HF_HUB_CACHE": str(SERVERS / "hub"), **dict.fromkeys(quiet, "1")}


def llama_server(folder: Path, *flags: Any) -> Server:
    run = [LLAMA_SERVER, "-m", SERVERS / "tiny.gguf", "--alias", "tiny", "--jinja",
           "-c", CONTEXT, "-np", 1, "--host", "127.0.0.1", "--port", "PORT",
           "--api-key", KEY, *flags]
    return Server(folder, "llama", "/health", run)


def vllm_server(folder: Path, *flags: Any) -> Server:
    run = [VLLM_SERVER, "--max-model-len", CONTEXT, "--enable-prompt-tokens-details",
           "--host", "127.0.0.1", "--port", "PORT", "--api-key", KEY, *flags]
    return Server(folder, "vllm", "/health", run)


def gateway_server(folder: Path, providers: list[Json]) -> Server:
    (folder / "config.json").write_text(json.dumps({"providers": {"inference": providers}}))
    run = [PYTHON, OGX, "run", folder / "config.json", "--port", "PORT"]
    return Server(folder, "gateway", "/v1/health", run)


def provider(name: str, kind: str, server: Server, dialect: str) -> Json:
    config = {"base_url": server.url + "/v1", "api_key": KEY, "dialect": dialect}
    return {"provider_id": name, "provider_type": f"remote::{kind}", "config": config}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("gateway")
    run = [TRANSFORMERS, "serve", "ogx/tiny", "--device", "cpu", "--host", "127.0.0.1",
           "--port", "PORT"]
    with contextlib.ExitStack() as stack:
        providers = []
        if LLAMA:
            llama = stack.enter_context(llama_server(folder))
            providers += [provider(dialect, "llama-cpp", llama, dialect) for dialect in DIALECTS]
        if VLLM:
            vllm = stack.enter_context(vllm_server(folder))
            providers += [provider("vllm-chat", "vllm", vllm, "chat"),
                          provider("vllm-native", "vllm", vllm, "messages"),
                          provider("vllm-auto", "vllm", vllm, "auto")]
        if TRANSFORMERS.exists():
            other = stack.enter_context(Server(folder, "transformers", "/health", run))
            providers.append(provider("transformers", "openai-compatible", other, "auto"))
        with gateway_server(folder, providers) as server:
            yield server
        assert not re.search(f"Traceback|{KEY}", server.log.read_text()), server.log.read_text()


@pytest.fixture(scope="module")
def sdk(gateway) -> Iterator[anthropic.Anthropic]:
    with gateway.sdk() as client:
        yield client


# ======== What is asked and answered =========================================================


def tool(name: str, **properties: str) -> Json:
    schema = {"type": "object", "required": list(properties),
              "properties": {one: {"type": kind} for one, kind in properties.items()}}
    return {"name": name, "input_schema": schema}


PNG = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
WEATHER, LOOKUP = tool("weather", city="string"), tool("lookup", q="string", n="integer")


def ask(model: str, content: Any, max_tokens: int = 200, **more: Any) -> Json:
    messages = [{"role": "user", "content": content}]
    return {"model": model, "max_tokens": max_tokens, "messages": messages, **more}


def answered(request: Json, content: list[Any], use_id: str, *result: Any) -> Json:
    """The next request, after an answer that ended in a tool call."""
    block = {"type": "tool_result", "tool_use_id": use_id, "content": result[0]}
    user = {"role": "user", "content": [block, *result[1:]]}
    turns = [{"role": "assistant", "content": content}, user]
    return {**request, "messages": request["messages"] + turns}


def streamed(sdk: anthropic.Anthropic, request: Json) -> anthropic.types.Message:
    """The message, whose events came in Anthropic's order: no block overlaps another."""
    with sdk.messages.stream(**request) as stream:
        events = [event for event in stream if event.type.startswith(("message_", "content_"))]
        message = stream.get_final_message()
    kinds = " ".join(event.type.replace("content_block_", "") for event in events)
    assert re.fullmatch("message_start( start( delta)* stop)* message_delta message_stop", kinds)
    indices = [event.index for event in events if hasattr(event, "index")]
    assert indices == sorted(indices) and set(indices) == set(range(len(message.content)))
    return message


def whole(sdk: anthropic.Anthropic, request: Json) -> anthropic.types.Message:
    message: anthropic.types.Message = sdk.messages.create(**request)
    return message


def both_ways(sdk: anthropic.Anthropic, request: Json) -> anthropic.types.Message:
    """The message, which is the same streamed and not, save ids and what a cache changes."""
    message, other = sdk.messages.create(**request), streamed(sdk, request)
    assert said(message) == said(other) and message.stop_reason == other.stop_reason
    assert message.model == other.model == request["model"]
    assert prompt_tokens(message) == prompt_tokens(other) > 0 < other.usage.output_tokens
    return message


def said(message: anthropic.types.Message) -> list[tuple[str, Any]]:
    """Its blocks: ("text", ...), ("thinking", ...) or (tool, input), without spaces around."""
    read = {"text": lambda b: ("text", b.text.strip()), "tool_use": lambda b: (b.name, b.input),
            "thinking": lambda b: ("thinking", b.thinking.strip())}
    return [read[block.type](block) for block in message.content]


def prompt_tokens(message: anthropic.types.Message) -> int:
    usage = message.usage
    cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    return usage.input_tokens + cached


class TestMessages:
    @every_model
    def test_answers_and_streams(self, sdk, model):
        message = both_ways(sdk, ask(model, "Hello", system="Be brief."))
        assert (said(message), message.stop_reason) == ([("text", HELLO)], "end_turn")
        assert message.usage.output_tokens == 9
        with sdk.messages.stream(**ask(model, "Hello")) as stream:
            assert len(list(stream.text_stream)) >= 3

    @every_thinker
    def test_shows_the_thinking_before_the_text(self, sdk, model):
        message = both_ways(sdk, ask(model, "THINK-FIRST"))
        assert said(message) == [("thinking", "Let me ponder this."), ("text", "Thought through.")]

    @every_model
    def test_calls_a_tool_and_reads_what_it_says(self, sdk, model):
        request = ask(model, "ASK-WEATHER", tools=[WEATHER])
        first = both_ways(sdk, request)
        assert said(first) == [("text", "I look."), ("weather", {"city": "Oslo"})]
        assert first.stop_reason == "tool_use"
        last = answered(request, first.content, first.content[-1].id, "42-from-the-shell")
        assert said(both_ways(sdk, last)) == [("text", "The shell says 42.")]

    @every_thinker
    def test_shows_text_after_the_tool_results_it_follows(self, sdk, model):
        call = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}}
        request = ask(model, "ASK-WEATHER", tools=[WEATHER])
        last = answered(request, [call], "call_1", "rain", {"type": "text", "text": "THINK-FIRST"})
        assert said(sdk.messages.create(**last))[-1] == ("text", "Thought through.")

    @every_llama
    def test_makes_the_call_that_is_demanded(self, sdk, model):
        tools, choice = [WEATHER, LOOKUP], {"type": "tool", "name": "lookup"}
        message = both_ways(sdk, ask(model, "Hello", tools=tools, tool_choice=choice))
        assert said(message) == [("text", HELLO), ("lookup", {"q": "", "n": 0})]
        message = both_ways(sdk, ask(model, "Hello", tools=[LOOKUP], tool_choice={"type": "any"}))
        assert said(message)[1:] == [("lookup", {"q": "", "n": 0})]

    # The others lose what is asked of them in these two.
    @needs_llama
    def test_makes_no_call_when_none_is_wanted(self, sdk):
        request = ask("chat/tiny", "ASK-WEATHER", tools=[WEATHER], tool_choice={"type": "none"})
        message = sdk.messages.create(**request)
        assert ([b.type for b in message.content], message.stop_reason) == (["text"], "end_turn")

    @needs_llama
    def test_gives_a_structured_answer(self, sdk):
        schema = {**WEATHER["input_schema"], "additionalProperties": False}
        wanted = {"format": {"type": "json_schema", "schema": schema}}
        message = both_ways(sdk, ask("chat/tiny", "Hello", output_config=wanted))
        assert json.loads(message.content[0].text) == {"city": ""}

    @every_model
    def test_stops_at_the_limit_and_at_a_stop_sequence(self, sdk, model):
        message = both_ways(sdk, ask(model, "TALK-ON", max_tokens=6))
        # OpenAI's least limit is 16 in Responses, and llama.cpp doesn't tell there that it ended.
        ended = ("end_turn", 16) if model == "responses/tiny" else ("max_tokens", 6)
        assert (message.stop_reason, message.usage.output_tokens) == ended
        message = sdk.messages.create(**ask(model, "TALK-ON", stop_sequences=[", then"]))
        assert said(message)[0][1].startswith("on and on and on and on")
        assert message.stop_reason != "max_tokens"
        # Responses takes no stop sequences: the rest is read, and paid for.
        assert message.usage.output_tokens < 10 or model == "responses/tiny"
        if model == "chat/tiny":  # which tells, where it's asked to
            assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ", then")

    @every_thinker
    def test_shows_a_text_document(self, sdk, model):
        source = {"type": "text", "media_type": "text/plain", "data": "It says THINK-FIRST."}
        content = [{"type": "document", "source": source}, {"type": "text", "text": "Hello"}]
        assert said(sdk.messages.create(**ask(model, content)))[-1] == ("text", "Thought through.")

    @every_llama
    def test_answers_or_refuses_for_good_what_has_an_image(self, sdk, model):
        with contextlib.suppress(anthropic.BadRequestError):  # other errors are tried again
            message = sdk.messages.create(**ask(model, [{"type": "image", "source": PNG}]))
            assert said(message) == [("text", HELLO)]

    @pytest.mark.skipif(not TRANSFORMERS.exists(), reason="make test-servers OGX_TRANSFORMERS=1")
    def test_passes_on_why_a_request_was_refused(self, sdk):
        with pytest.raises(anthropic.BadRequestError, match="Server is pinned to 'ogx/tiny'"):
            sdk.messages.create(**ask("transformers/other", "Hello"))

    @every_model
    def test_counts_tokens(self, sdk, model):
        request = ask(model, "Hello there")
        used = prompt_tokens(sdk.messages.create(**request))
        del request["max_tokens"]
        few = sdk.messages.count_tokens(**request).input_tokens
        many = sdk.messages.count_tokens(**request, tools=[WEATHER, LOOKUP]).input_tokens
        assert 1 < few < 50 < many < 500
        assert few == used or model not in LLAMA  # which has a tokenizer to ask

    @every_llama
    def test_words_a_prompt_that_is_too_long_for_claude_code(self, sdk, model):
        request = ask(model, "zq " * CONTEXT)
        for call in (sdk.messages.create, lambda **one: streamed(sdk, one)):
            words = rf"prompt is too long: 13\d+ tokens > {CONTEXT} maximum"
            with pytest.raises(anthropic.BadRequestError, match=words):
                call(**request)

    @every_llama
    def test_frees_the_server_when_the_client_leaves(self, sdk, model):
        with sdk.messages.stream(**ask(model, "TALK-ON", max_tokens=60_000)) as stream:
            next(iter(stream.text_stream))
        sdk.with_options(timeout=5).messages.create(**ask(model, "Hello"))  # its only slot is free


def test_lists_models_with_their_context(gateway, sdk):
    listed = {model.id: model.max_input_tokens for model in sdk.models.list()}
    told = [*LLAMA, *VLLM, *["vllm-auto/tiny"] * bool(VLLM)]  # by their servers
    others = {model: None for model in MODELS if model not in told}
    assert listed == {**dict.fromkeys(told, CONTEXT), **others}
    assert [sdk.models.retrieve(model).id for model in MODELS] == MODELS
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == list(listed)


@needs_llama
@pytest.mark.parametrize("dialect", DIALECTS)
def test_recovers_with_its_server(tmp_path, dialect):
    llama = llama_server(tmp_path)
    upstream, hello = provider("one", "llama-cpp", llama, dialect), ask("one/tiny", "Hello")
    with llama, gateway_server(tmp_path, [upstream]) as gateway, gateway.sdk() as sdk:
        assert said(both_ways(sdk, hello)) == [("text", HELLO)]
        with pytest.raises(anthropic.APIError, match=r"in the middle of its answer \(one\)"), \
                sdk.messages.stream(**ask("one/tiny", "TALK-ON", max_tokens=60_000)) as stream:
            for _ in stream.text_stream:
                if llama.process.poll() is None:
                    llama.stop(signal.SIGKILL)
        for call in (sdk.messages.create, lambda **request: streamed(sdk, request)):
            with pytest.raises(anthropic.APIStatusError, match="can't reach one at http") as gone:
                call(**hello)
            assert gone.value.status_code == 502
        with llama:
            assert said(both_ways(sdk, hello)) == [("text", HELLO)]


@contextlib.contextmanager
def one_llama(folder: Path, *flags: Any) -> Iterator[tuple[Server, Server, anthropic.Anthropic]]:
    """llama-server with more flags, as the provider `one` of a gateway, and a client of that."""
    llama = llama_server(folder, *flags)
    upstream = provider("one", "llama-cpp", llama, "chat")
    with llama, gateway_server(folder, [upstream]) as gateway, gateway.sdk() as sdk:
        yield llama, gateway, sdk


@needs_llama
def test_one_slot_gets_one_request_at_a_time(tmp_path):
    long = ask("one/tiny", "TALK-ON and count from 1 to 1000.", 60_000,
               extra_body={"temperature": 0})
    short = ask("one/tiny", "Hello", 9)
    done: list[str] = []

    def answer(name: str) -> None:
        sdk.messages.create(**short)
        done.append(name)

    with one_llama(tmp_path, "--metrics") as (llama, _, sdk):
        threads = [threading.Thread(target=answer, args=(name,)) for name in "abc"]
        with sdk.messages.stream(**long) as stream:
            text = iter(stream.text_stream)
            next(text)
            for thread in threads:
                thread.start()
                time.sleep(0.2)
            for _ in range(20):
                next(text)
            request = urllib.request.Request(llama.url + "/metrics",
                                             headers={"authorization": f"Bearer {KEY}"})
            told = urllib.request.urlopen(request, timeout=5).read().decode()
            assert re.search(r"(?m)^llamacpp:requests_processing 1$", told), told
            assert re.search(r"(?m)^llamacpp:requests_deferred 0$", told), told
            assert done == []
        for thread in threads:
            thread.join(60)
    assert done == ["a", "b", "c"]


@needs_llama
def test_what_needs_another_flag_is_told_at_once(tmp_path):
    with one_llama(tmp_path, "--no-jinja") as (_, _, sdk):
        began = time.monotonic()
        with pytest.raises(anthropic.BadRequestError, match="requires --jinja .*with that flag"):
            sdk.messages.create(**ask("one/tiny", "Hello", tools=[WEATHER]))
        assert time.monotonic() - began < 2
        sdk.messages.create(**ask("one/tiny", "Hello", 9))


@needs_llama
def test_check_tells_what_was_cached(tmp_path):
    with one_llama(tmp_path) as (_, gateway, _):
        run = [PYTHON, OGX, "connect", "claude", "--check", "--port", str(gateway.port)]
        done = subprocess.run(run, env=base_environment(tmp_path), capture_output=True, text=True,
                              timeout=120)
    told = re.search(r"  (\d+) of (\d+)  ", done.stdout)
    assert told and int(told[1]) == int(told[2]) - 1 > 20, done.stdout


def smol_server(folder: Path, *flags: Any) -> Server:
    """llama-server with real weights, whose chat template has no tools."""
    run = [LLAMA_SERVER, "-m", SERVERS / "smollm2.gguf", "--alias", "smol",
           "-c", 8192, "--host", "127.0.0.1", "--port", "PORT", *flags]
    return Server(folder, "smol", "/health", run)


def connected(gateway: Server, folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    run = [PYTHON, OGX, "connect", "claude", "--port", str(gateway.port), *flags]
    return subprocess.run(run, env=base_environment(folder), capture_output=True, text=True,
                          timeout=120)


@needs_llama
def test_a_server_that_comes_up_is_asked_at_once(tmp_path):
    smol = smol_server(tmp_path)
    upstream = provider("one", "llama-cpp", smol, "chat")
    hello = ask("claude-opus-5", "Hello", 5)
    with gateway_server(tmp_path, [upstream]) as gateway, gateway.sdk() as sdk:
        with pytest.raises(anthropic.InternalServerError, match="no model to serve") as told:
            sdk.messages.create(**hello)
        assert told.value.status_code == 503 and told.value.response.headers["retry-after"] == "5"
        done = connected(gateway, tmp_path, "--check")
        assert done.returncode == 1 and "one: can't reach one" in done.stderr
        with smol:
            time.sleep(1)  # it is asked once a second at most
            assert sdk.messages.create(**hello).usage.output_tokens == 5


@needs_llama
def test_a_server_that_loads_is_waited_for(tmp_path):
    smol = smol_server(tmp_path)
    upstream = provider("one", "llama-cpp", smol, "chat")
    smol.health = "/nothing"  # to have it while it loads
    with gateway_server(tmp_path, [upstream]) as gateway:
        process = subprocess.Popen(smol.command, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, cwd=tmp_path)
        try:
            with contextlib.suppress(OSError, KeyError):
                while True:  # until it listens
                    time.sleep(0.01)
                    socket.create_connection(("127.0.0.1", smol.port), timeout=1).close()
                    break
            done = connected(gateway, tmp_path, "--print-env")
            give_up = time.monotonic() + 20
            while done.returncode and time.monotonic() < give_up:
                assert "one: " in done.stderr
                done = connected(gateway, tmp_path, "--print-env")
        finally:
            process.kill()
            process.wait(10)
    assert "export ANTHROPIC_DEFAULT_OPUS_MODEL=one/smol" in done.stdout


@needs_llama
def test_a_wrong_key_is_told(tmp_path):
    llama = llama_server(tmp_path)
    upstream = provider("one", "llama-cpp", llama, "chat")
    upstream["config"]["api_key"] = "another"
    with llama, gateway_server(tmp_path, [upstream]) as gateway, gateway.sdk() as sdk:
        with pytest.raises(anthropic.APIStatusError, match="Invalid API Key.*check ") as refused:
            sdk.messages.create(**ask("claude-opus-5", "Hello"))
        assert refused.value.status_code == 404  # it can't pass, so nobody waits
        done = connected(gateway, tmp_path, "--print-env")
        assert done.returncode == 1 and "Invalid API Key" in done.stderr, done.stderr
        assert "check " in done.stderr and "another" not in done.stderr + gateway.log.read_text()


@needs_llama
def test_a_template_without_tools_is_told_and_a_call_demanded_in_words(tmp_path):
    smol = smol_server(tmp_path)
    upstream = provider("one", "llama-cpp", smol, "chat")
    with smol, gateway_server(tmp_path, [upstream]) as gateway, gateway.sdk() as sdk:
        asked = ask("one/smol", "What is the weather in Oslo?", 60, tools=[WEATHER, LOOKUP],
                    tool_choice={"type": "tool", "name": "weather"},
                    extra_body={"temperature": 0})
        (block,) = sdk.messages.create(**asked).content
        assert (block.type, block.name) == ("tool_use", "weather") and "city" in block.input
        told = "its chat template has no tools"
        assert told in connected(gateway, tmp_path, "--check").stdout
        assert told in gateway.log.read_text()
        window = connected(gateway, tmp_path, "--print-env").stdout
        assert "MAX_CONTEXT_TOKENS=18192" in window and "MAX_OUTPUT_TOKENS=1024" in window


@needs_llama
def test_a_router_tells_windows_and_counts(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "smol.gguf").symlink_to((SERVERS / "smollm2.gguf").resolve())
    run = [LLAMA_SERVER, "--models-dir", folder, "-c", 4096, "--host", "127.0.0.1",
           "--port", "PORT"]
    router = Server(tmp_path, "router", "/health", run)
    upstream = provider("one", "llama-cpp", router, "chat")
    with router, gateway_server(tmp_path, [upstream]) as gateway, gateway.sdk() as sdk:
        (listed,) = sdk.models.list().data
        assert listed.max_input_tokens == 4096
        used = sdk.messages.create(**ask(listed.id, "Hello there", 5)).usage
        request = ask(listed.id, "Hello there")
        del request["max_tokens"]
        counted = sdk.messages.count_tokens(**request).input_tokens
        assert counted == used.input_tokens + (used.cache_read_input_tokens or 0)


@needs_llama
def test_an_image_becomes_words_where_the_model_sees_none(tmp_path):
    with one_llama(tmp_path) as (_, _, sdk):
        content = [{"type": "image", "source": PNG}, {"type": "text", "text": "Hello"}]
        for _ in range(2):
            assert said(sdk.messages.create(**ask("one/tiny", content))) == [("text", HELLO)]


# ======== vLLM ===============================================================================


@needs_vllm
class TestVllm:
    @every_vllm
    def test_an_image_becomes_words(self, sdk, model):
        content = [{"type": "image", "source": PNG}, {"type": "text", "text": "Hello"}]
        assert said(both_ways(sdk, ask(model, content))) == [("text", HELLO)]

    @every_vllm
    def test_an_image_in_a_tool_result_becomes_words(self, sdk, model):
        call = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}}
        request = ask(model, "ASK-WEATHER", tools=[WEATHER])
        last = answered(request, [call], "call_1", [{"type": "image", "source": PNG}])
        assert said(sdk.messages.create(**last)) == [("text", "The tool has answered.")]

    @every_vllm
    @pytest.mark.parametrize("call", [whole, streamed], ids=["whole", "streamed"])
    def test_a_thinking_budget_that_it_refuses_is_left_out(self, sdk, model, call):
        thinking = {"type": "enabled", "budget_tokens": 1024}
        message = call(sdk, ask(model, "Hello", 2000, thinking=thinking))
        assert said(message) == [("text", HELLO)]

    @needs_vllm
    def test_thinking_as_text_is_noticed(self, sdk):
        model = "vllm-auto/tiny"
        first = streamed(sdk, ask(model, "THINK-FIRST"))  # which shows it, natively
        assert said(first)[0][0] == "text"
        message = streamed(sdk, ask(model, "THINK-FIRST"))
        assert said(message) == [("thinking", "Let me ponder this."), ("text", "Thought through.")]

    @every_vllm
    @pytest.mark.parametrize("call", [whole, streamed], ids=["whole", "streamed"])
    def test_errors_have_anthropics_types(self, sdk, model, call):
        with pytest.raises(anthropic.BadRequestError) as refused:
            call(sdk, ask(model, "Hello", extra_body={"top_p": 7}))
        assert refused.value.body["error"]["type"] == "invalid_request_error"

    @every_vllm
    @pytest.mark.parametrize("call", [whole, streamed], ids=["whole", "streamed"])
    def test_a_long_prompt_is_told_in_words_that_claude_code_knows(self, sdk, model, call):
        with pytest.raises(anthropic.BadRequestError,
                           match=rf"prompt is too long: \d+ tokens > {CONTEXT}"):
            call(sdk, ask(model, "zq " * CONTEXT))

    @every_vllm
    def test_a_later_system_message_leaves_the_prefix_cached(self, sdk, model):
        request = ask(model, f"{model} says: " + "zq " * 800)
        answer = {"role": "assistant", "content": HELLO}
        note = {"role": "system", "content": "Note: a file changed on disk."}
        last = {**request, "messages": [*request["messages"], answer,
                                        {"role": "user", "content": "Hello again"}, note]}
        first, then = sdk.messages.create(**request), sdk.messages.create(**last)
        assert prompt_tokens(then) > prompt_tokens(first) > 1500
        block = 128  # of its cache
        assert then.usage.cache_read_input_tokens > prompt_tokens(first) - block

    @every_vllm
    def test_created_cache_tokens_are_logged_as_input(self, gateway, sdk, model):
        before = gateway.log.stat().st_size
        sdk.messages.create(**ask(model, f"{model} writes: " + "zq " * 800))
        while gateway.log.stat().st_size == before:  # it is written after the answer
            time.sleep(0.05)
        line = gateway.log.read_bytes()[before:].decode()
        told = re.search(r" in ([\d,]+)", line)
        assert told and int(told[1].replace(",", "")) > 1500, line


@needs_vllm
def test_vllm_that_is_not_up_yet_is_asked_at_once(tmp_path):
    vllm = vllm_server(tmp_path)
    hello = ask("claude-opus-5", "Hello", 5)
    upstream = provider("one", "vllm", vllm, "auto")
    with gateway_server(tmp_path, [upstream]) as gateway, gateway.sdk() as sdk:
        with pytest.raises(anthropic.InternalServerError, match="no model to serve"):
            sdk.messages.create(**hello)
        with vllm:
            time.sleep(1)  # it is asked once a second at most
            assert sdk.messages.create(**hello).usage.output_tokens == 5


# ======== Claude Code ========================================================================


def claude(gateway: Server, folder: Path, model: str, prompt: str, *flags: str) -> Json:
    run = [PYTHON, OGX, "connect", "claude", "--port", str(gateway.port), "--model", model, "--"]
    done = subprocess.run(
        [*run, "-p", prompt, "--output-format", "json", *flags], cwd=folder, timeout=120,
        env=base_environment(folder), stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result: Json = json.loads(done.stdout)
    assert result["subtype"] == "success" and not result["is_error"], result
    return result


@every_model
def test_claude_code_answers(gateway, tmp_path, model):
    result = claude(gateway, tmp_path, model, "Hello")
    assert (result["result"].strip(), result["num_turns"]) == (HELLO, 1)
    assert result["usage"]["output_tokens"] == 9


@every_model
def test_claude_code_runs_a_shell_command(gateway, tmp_path, model):
    result = claude(gateway, tmp_path, model, "RUN-SHELL", "--allowedTools", "Bash")
    assert (result["result"].strip(), result["num_turns"]) == ("The shell says 42.", 2)
