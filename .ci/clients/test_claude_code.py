"""The real Claude Code against ogx.py over chat."""

import base64
import json
import os
import pty
import re
import select
import shlex
import signal
import socketserver
import subprocess
import threading
import time
import uuid
from pathlib import Path

import pytest
from gateways import MODEL, OGX, PYTHON, pdf, png
from scripted_upstream import Reply, parts, text_of, tool_results
from scripted_vendors import DEMANDS, ids_and_calls

pytestmark = pytest.mark.clients


class TestClaudeCode:
    def test_answers_a_question(self, gateway, upstream):
        upstream.script = {"What is 2+2?": [Reply("It is **4**.")]}
        result = gateway.ask("What is 2+2?")
        assert result["result"] == "It is **4**."
        usage = result["usage"]
        assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (234, 1000)
        assert usage["output_tokens"] == 56
        (body,) = upstream.requests
        assert body["model"] == "scripted" and body["stream"] is True
        assert body["messages"][0]["role"] in ("system", "developer")
        tools = {one["function"]["name"] for one in body["tools"]}
        assert {"Bash", "Edit", "Read", "Write"} <= tools
        assert "x-anthropic-billing-header" not in json.dumps(body)

    def test_takes_the_first_language_model_when_none_is_named(self, gateway, upstream):
        upstream.script = {"Anyone there?": [Reply("Yes, here.")]}
        done = gateway.connect("--", "-p", "Anyone there?")
        assert (done.returncode, done.stdout) == (0, "Yes, here.\n"), done.stderr
        assert upstream.requests[-1]["model"] == "scripted"

    @pytest.mark.parametrize(("name", "expected"), [
        ("haiku", "scripted-mini"), ("opus", "scripted"), (MODEL + "-mini", "scripted-mini"),
        ("claude-haiku-4-5-20251001", "scripted"), ("claude-sonnet-4-5", "scripted"),
    ])
    def test_finds_a_model_under_any_name(self, gateway, upstream, name, expected):
        upstream.script = {"Hello": [Reply("Good day.")]}
        tiers = ["--model", MODEL, "--haiku-model", MODEL + "-mini"]
        done = gateway.connect(*tiers, "--", "--model", name, "-p", "Hello")
        assert (done.returncode, done.stdout) == (0, "Good day.\n"), done.stderr
        assert upstream.requests[-1]["model"] == expected

    def test_works_in_a_shell_that_took_over_the_environment(self, gateway, upstream):
        upstream.script = {"Hello": [Reply("Good day.")]}
        port = gateway.url.rsplit(":", 1)[1]
        words = [PYTHON, OGX, "connect", "claude", "--print-env", "--port", port, "--model", MODEL]
        done = gateway.run("bash", "-c", f'eval "$({shlex.join(words)})" && claude -p Hello')
        assert (done.returncode, done.stdout) == (0, "Good day.\n"), done.stderr

    def test_runs_a_shell_command_and_shows_the_model_its_output(self, gateway, upstream):
        call = ("Bash", {"command": "echo $((6*7))-from-the-shell", "description": "Compute"})
        upstream.script = {"Run it": [Reply("On it.", calls=[call]), Reply("The shell says 42.")]}
        assert gateway.ask("Run it", "--allowedTools", "Bash")["result"] == "The shell says 42."
        *_, assistant, result = upstream.requests[-1]["messages"]
        assert assistant["content"] == "On it." and text_of(result) == "42-from-the-shell"
        assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == call[1]

    def test_writes_a_file_and_edits_it(self, gateway, upstream):
        path = gateway.project / "hello.py"
        first, final = 'print("héllo")\n', 'print("wörld \\"2\\" \U0001f600")\n'
        edit = {"file_path": str(path), "old_string": first, "new_string": final}
        upstream.script = {"Make it": [
            Reply(calls=[("Write", {"file_path": str(path), "content": first})]),
            Reply(calls=[("Edit", edit)]),
            Reply("Done."),
        ]}
        assert gateway.ask("Make it", "--permission-mode", "acceptEdits")["result"] == "Done."
        assert path.read_text(encoding="utf-8") == final
        assert len(tool_results(upstream.requests[-1])) == 2

    def test_runs_parallel_tool_calls(self, gateway, upstream):
        calls = [("Bash", {"command": f"echo {word}"}) for word in ("first", "second")]
        upstream.script = {"Both": [Reply(calls=calls), Reply("Two results.")]}
        assert gateway.ask("Both", "--allowedTools", "Bash")["result"] == "Two results."
        results = {json.loads(asked)["command"]: said
                   for asked, said in tool_results(upstream.requests[-1]).items()}
        assert results == {"echo first": "first", "echo second": "second"}
        assert len(upstream.requests[-1]["messages"][-3]["tool_calls"]) == 2

    def test_continues_the_last_conversation(self, gateway, upstream):
        upstream.script = {"I have a dog": [Reply("Nice.")], "Its name?": [Reply("No idea.")]}
        gateway.ask("I have a dog")
        assert gateway.ask("Its name?", "--continue")["result"] == "No idea."
        told = [(one["role"], text_of(one)) for one in upstream.requests[-1]["messages"]]
        spoken = [role for role, text in told if re.search("I have a dog|^Nice.$|Its name", text)]
        assert spoken == ["user", "assistant", "user"]

    def test_shows_the_model_an_image(self, gateway, upstream):
        image = gateway.project / "red.png"
        image.write_bytes(png(4, 4, b"\xff\x00\x00"))
        read = Reply(calls=[("Read", {"file_path": str(image)})])
        upstream.script = {"Look": [read, Reply("It is red.")]}
        assert gateway.ask("Look")["result"] == "It is red."
        (part,) = parts(upstream.requests[-1], "image_url")
        head, data = part["url"].split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == image.read_bytes()

    def test_shows_the_model_a_pdf(self, gateway, upstream):
        document = gateway.project / "page.pdf"
        document.write_bytes(pdf("Hello from a page"))
        read = Reply(calls=[("Read", {"file_path": str(document)})])
        upstream.script = {"Read it": [read, Reply("It greets.")]}
        assert gateway.ask("Read it")["result"] == "It greets."
        (part,) = parts(upstream.requests[-1], "file")
        head, data = part["file_data"].split(",", 1)
        assert head == "data:application/pdf;base64" and part["filename"].endswith(".pdf")
        assert base64.b64decode(data) == document.read_bytes()

    def test_sends_a_subagent(self, gateway, upstream):
        errand = {"description": "Find out", "prompt": "SUBTASK: say hi", "model": "haiku",
                  "subagent_type": "general-purpose", "run_in_background": False}
        upstream.script = {
            "Delegate": [Reply(calls=[("Agent", errand)]), Reply("My agent said hi.")],
            "SUBTASK": [Reply("Hi from the agent.")],
        }
        assert gateway.ask("Delegate", "--allowedTools", "Agent")["result"] == "My agent said hi."
        assert len(upstream.seen("SUBTASK")) == 1
        (result,) = tool_results(upstream.seen("Delegate")[-1]).values()
        assert "Hi from the agent." in result

    def test_shows_the_thinking(self, gateway, upstream):
        look = [("Bash", {"command": "echo seen"})]
        upstream.script = {"Think": [
            Reply("So I look.", reasoning="Let me ponder this.", calls=look),
            Reply("Thought through."),
        ]}
        shown = ["--output-format", "stream-json", "--verbose", "--allowedTools", "Bash"]
        done = gateway.claude("Think", *shown)
        assert done.returncode == 0, done.stdout + done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        messages = [event["message"] for event in events if event["type"] == "assistant"]
        blocks = [block for message in messages for block in message["content"]]
        assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "text"]
        assert blocks[0]["thinking"] == "Let me ponder this."
        assert events[-1]["result"] == "Thought through."

    @pytest.mark.parametrize("reasoning", ["", "Let me ponder this."])
    def test_brings_back_what_the_provider_needs_of_its_reasoning(
        self, gateway, upstream, reasoning
    ):
        """Signatures and details travel in thinking blocks, or in redacted ones."""
        details = [{"type": "reasoning.encrypted", "data": "sealed", "index": 0}]
        signature = {"google": {"thought_signature": "signed"}}
        look = [("Bash", {"command": "echo seen"}), ("Bash", {"command": "echo twice"})]
        upstream.script = {"Think": [
            Reply("So I look.", reasoning=reasoning, details=details, calls=look,
                  signature=signature),
            Reply(calls=look[:1], signature=signature), Reply("Thought through."),
        ]}
        assert gateway.ask("Think", "--allowedTools", "Bash")["result"] == "Thought through."
        first, second = ids_and_calls(upstream.requests[-1])[1]
        assert first["reasoning_details"] == details and "reasoning_details" not in second
        signed = [call.get("extra_content") for turn in (first, second)
                  for call in turn["tool_calls"]]
        assert signed == [signature, None, signature]

    def test_gives_a_structured_answer(self, gateway, upstream):
        schema = {"type": "object", "properties": {"answer": {"type": "integer"}}}
        given = Reply(calls=[("StructuredOutput", {"answer": 4})])
        upstream.script = {"Count": [given, Reply("Given.")]}
        result = gateway.ask("Count", "--json-schema", json.dumps(schema))
        assert result["structured_output"] == {"answer": 4}
        tools = [one["function"] for one in upstream.requests[0]["tools"]]
        (tool,) = [one for one in tools if one["name"] == "StructuredOutput"]
        assert tool["parameters"]["properties"] == schema["properties"]

    def test_passes_the_exit_code_on(self, gateway):
        version = gateway.connect("--model", MODEL, "--", "--version")
        assert version.returncode == 0 and "Claude Code" in version.stdout
        assert gateway.connect("--model", MODEL, "--", "--no-such-flag").returncode == 1

    def test_reports_a_refused_key_at_once(self, gateway, upstream):
        upstream.script = {"Hello": [Reply("Your key was revoked on Tuesday.", status=401)]}
        began, done = time.monotonic(), gateway.claude("Hello")
        assert done.returncode == 1
        assert "Your key was revoked on Tuesday." in done.stdout + done.stderr
        assert len(upstream.requests) <= 2 and time.monotonic() - began < 20

    def test_waits_for_a_slow_model(self, gateway, upstream):
        upstream.script = {"Hello": [Reply("At last.", silence=12)]}
        assert gateway.ask("Hello")["result"] == "At last."
        assert len(upstream.requests) == 1

    def test_asks_a_small_model_for_less(self, gateway, upstream):
        upstream.most_tokens = 16_384
        upstream.script = {"Hello": [Reply("Good day.")]}
        assert gateway.ask("Hello")["result"] == "Good day."
        limits = [body["max_completion_tokens"] for body in upstream.requests]
        assert limits[0] > limits[1] == 16_384 and len(limits) == 2

    @pytest.mark.parametrize("words", [
        "This model's maximum context length is 4097 tokens. However, your messages resulted in "
        "4294 tokens. Please reduce the length of the messages.",  # OpenAI
        "request (20020 tokens) exceeds the available context size (16384 tokens), try increasing "
        "it",  # llama.cpp
        "The input token count (2845475) exceeds the maximum number of tokens allowed (1048576).",
        "Input is too long for requested model.",  # Bedrock
        "Input length (5000) exceeds model's maximum context length (4096).",  # vLLM
    ])
    def test_compacts_and_goes_on_when_the_prompt_got_too_long(self, gateway, upstream, words):
        upstream.too_long = words
        count = [Reply(calls=[("Bash", {"command": f"echo {n}", "description": "count"})])
                 for n in range(3)]
        upstream.script = {"TEXT ONLY": [Reply("We were counting to three.")],
                           "Count": [*count, Reply("Done.")]}
        gateway.ask("Count to three", "--allowedTools", "Bash")
        assert upstream.too_long == "" and upstream.seen("TEXT ONLY")
        assert "We were counting to three." in json.dumps(upstream.requests[-1])

    def test_costs_few_requests_when_the_upstream_refuses_for_a_reason_of_its_own(
        self, gateway, upstream
    ):
        upstream.script = {"Hello": [Reply("The moon is not full.", status=400)]}
        done = gateway.claude("Hello")
        assert done.returncode == 1 and "The moon is not full." in done.stdout + done.stderr
        # The client asks six times: as it is, without two betas, and the same without ToolSearch.
        assert len(upstream.requests) <= 6

    @pytest.mark.parametrize("provider", DEMANDS)
    def test_works_with_a_provider_that_refuses_until_the_request_is_right(
        self, gateway, upstream, provider
    ):
        upstream.strict, upstream.demand = False, DEMANDS[provider]
        calls = [("Bash", {"command": f"echo {n}", "description": "count"}) for n in range(2)]
        upstream.script = {"Count": [Reply(calls=calls), Reply(calls=calls[:1]), Reply("Done.")]}
        assert gateway.ask("Count", "--allowedTools", "Bash")["result"] == "Done."
        asked = len(upstream.requests)
        assert asked <= 3 + 2, "each habit is learned once"
        upstream.script = {"Again": [Reply(calls=calls), Reply("Done.")]}
        gateway.ask("Again", "--allowedTools", "Bash")
        assert len(upstream.requests) == asked + 2, "and known from then on"

    @pytest.mark.parametrize("users", [
        {"env": {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}},
        {"env": {"CLAUDE_CODE_USE_BEDROCK": "1"}},
        {"env": {"CLAUDE_CODE_USE_VERTEX": "1", "ANTHROPIC_API_KEY": "sk-of-the-user"}},
        {"apiKeyHelper": "echo key-of-the-helper"},
        {"model": "claude-opus-4-5"},
    ])
    def test_reaches_the_gateway_whatever_the_users_settings_say(self, gateway, upstream, users):
        folder = Path(gateway.environment["HOME"], ".claude")
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps(users))
        upstream.script = {"Hello": [Reply("Here I am.")]}
        assert gateway.ask("Hello")["result"] == "Here I am."

    @pytest.fixture
    def foreign_proxy(self):
        """(URL of a server that is not ours, and what it was sent)."""
        sent = []

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                sent.append(self.rfile.readline())
                self.wfile.write(b"HTTP/1.1 403 no\r\ncontent-length: 0\r\n\r\n")

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}", sent
            server.shutdown()

    @pytest.mark.parametrize("name", [
        "project/.claude/settings.json", "project/.claude/settings.local.json",
        "home/.claude/settings.json", "home/.claude.json",
        "settings.local.json of the repository", "in UTF-16", "padded", "nested deeply",
    ])
    @pytest.mark.parametrize("kind", ["proxy", "url", "proxy in both spellings"])
    def test_no_settings_file_leads_the_conversation_elsewhere(
        self, gateway, upstream, foreign_proxy, name, kind
    ):
        url, sent = foreign_proxy
        proxies = dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"], url)
        small = dict.fromkeys(map(str.lower, proxies), url)
        tree = {"env": {
            "proxy": {"HTTP_PROXY": url, "no_proxy": "x"},
            "proxy in both spellings": {**proxies, **small, "NO_PROXY": "x", "no_proxy": "x"},
            "url": {"ANTHROPIC_BASE_URL": url},
        }[kind]}
        path, data = gateway.project.parent / name, json.dumps(tree).encode()
        if "/" not in name:
            path = gateway.project / ".claude" / "settings.local.json"
        if "repository" in name:
            subprocess.run(["git", "init", "-q", str(gateway.project)], check=True)
            (gateway.project / "below").mkdir()
            gateway.project /= "below"
        elif "UTF-16" in name:
            data = json.dumps(tree).encode("utf-16")
        elif "padded" in name:
            data = b" " * 1_500_000 + data
        elif "nested" in name:
            data = data[:-1] + b', "x": %s}' % (b"[" * 5000 + b"]" * 5000)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        upstream.script = {"Hello": [Reply("Here I am.")]}
        assert gateway.ask("Hello")["result"] == "Here I am."
        assert sent == []

    @pytest.mark.parametrize("variable", [
        "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY",
        "CLAUDE_CODE_USE_MANTLE", "CLAUDE_CODE_USE_ANTHROPIC_AWS", "CLAUDE_CODE_USE_GATEWAY",
        "CLAUDE_CODE_USE_ANTHROPIC_GOOGLE_CLOUD", "ANTHROPIC_UNIX_SOCKET", "ANTHROPIC_API_KEY",
        "ANTHROPIC_MODEL", "ANTHROPIC_CUSTOM_HEADERS", "CLAUDE_CODE_OAUTH_TOKEN",
        "CLAUDE_CODE_SUBAGENT_MODEL", "ANTHROPIC_VERTEX_PROJECT_ID", "HTTP_PROXY",
        "ANTHROPIC_BEDROCK_SESSION_TOKEN", "ANTHROPIC_SMALL_FAST_MODEL", "CLAUDECODE",
        "CLAUDE_CODE_PROVIDER_MANAGED_BY_HOST", "CLAUDE_CODE_HOST_AUTH_ENV_VAR",
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS", "CLAUDE_CODE_MAX_OUTPUT_TOKENS",
        "ANTHROPIC_DEFAULT_MODEL",
    ])
    def test_reaches_the_gateway_whatever_is_exported(self, gateway, upstream, variable):
        values = {"ANTHROPIC_UNIX_SOCKET": "/nowhere", "HTTP_PROXY": "http://127.0.0.1:9",
                  "ANTHROPIC_CUSTOM_HEADERS": "Host: evil.test"}
        gateway.environment[variable] = values.get(variable, "1")
        upstream.script = {"Hello": [Reply("Here I am.")]}
        assert gateway.ask("Hello")["result"] == "Here I am."

    @pytest.fixture
    def window(self, request, upstream):
        """The context that the upstream lists, set before the gateway reads the list."""
        upstream.context = request.param
        return request.param

    @pytest.mark.parametrize("window", [32_768, 131_072, 1_048_576], indirect=True)
    def test_knows_the_true_window(self, window, gateway, upstream):
        upstream.script = {"Hello": [Reply("Hello.")]}
        usage = gateway.ask("Hello")["modelUsage"]
        told = window + 10_000 * (window < 100_000)  # so that it compacts where the window ends
        assert [one["contextWindow"] for one in usage.values()] == [told]

    @pytest.mark.parametrize(("window", "tokens", "compacts"), [
        (16_384, 10_000, False), (16_384, 12_000, True),
        (32_768, 24_000, False), (32_768, 27_000, True),
        (65_536, 52_000, False), (65_536, 56_000, True),
        (131_072, 98_000, False), (131_072, 103_000, True),
        (1_048_576, 900_000, False), (1_048_576, 1_020_000, True),
    ], indirect=["window"])
    def test_compacts_at_the_right_size(self, window, gateway, upstream, tokens, compacts):
        upstream.usage = {"prompt_tokens": tokens}
        count = [Reply(calls=[("Bash", {"command": f"echo {n}", "description": "count"})])
                 for n in range(3)]
        upstream.script = {"TEXT ONLY": [Reply("We were counting to three.")],
                           "Count": [*count, Reply("Done.")]}
        gateway.ask("Count to three", "--allowedTools", "Bash", "--max-turns", "8")
        assert bool(upstream.seen("TEXT ONLY")) is compacts

    @pytest.fixture
    def unlike(self, upstream):
        """Windows of the models, set before the gateway reads the list."""
        upstream.models = ["small", "large"]
        upstream.contexts = {"small": 131_072, "large": 1_048_576}

    @pytest.mark.parametrize(("model", "tokens", "compacts"), [
        ("small", 96_000, False), ("small", 103_000, True), ("large", 120_000, False)])
    def test_compacts_where_the_chosen_models_window_ends(self, unlike, gateway, upstream, model,
                                                          tokens, compacts):  # fmt: skip
        upstream.usage = {"prompt_tokens": tokens}
        count = [Reply(calls=[("Bash", {"command": f"echo {n}", "description": "count"})])
                 for n in range(3)]
        upstream.script = {"TEXT ONLY": [Reply("We were counting to three.")],
                           "Count": [*count, Reply("Done.")]}
        tiers = ["--opus-model", "openai/large", "--sonnet-model", "openai/small"]
        done = gateway.connect(*tiers, "-p", "Count to three", "--allowedTools", "Bash", "--model",
                               {"small": "sonnet", "large": "opus"}[model], "--max-turns", "8")
        assert done.returncode == 0, done.stdout + done.stderr
        assert bool(upstream.seen("TEXT ONLY")) is compacts

    def test_does_not_take_a_broken_answer_for_a_whole_one(self, gateway, upstream):
        gateway.environment["CLAUDE_CODE_MAX_RETRIES"] = "2"  # instead of 10, which take minutes
        upstream.script = {"Tell me": [Reply("This breaks off in the middle of it.", dies=99)]}
        done = gateway.claude("Tell me", "--output-format", "json")
        assert done.returncode == 1, done.stdout
        assert json.loads(done.stdout)["is_error"] is True

    def test_goes_on_after_an_answer_that_broke_off_once(self, gateway, upstream):
        # The client either asks for the rest of what it has or asks the whole again.
        broken = Reply("This breaks off in the middle of it, but ends well.", dies=1)
        upstream.script = {"Tell me": [broken, Reply("but ends well.")]}
        assert gateway.ask("Tell me")["result"].endswith("but ends well.")


class TestStatusLine:
    def test_tells_which_model_answered(self, gateway, upstream):
        """On a terminal, since it is shown nowhere else."""
        upstream.script = {"Hello": [Reply("Good day.")]}
        trusted = {str(gateway.project): {"hasTrustDialogAccepted": True}}
        settings = {"hasCompletedOnboarding": True, "projects": trusted}
        (Path(gateway.environment["HOME"]) / ".claude.json").write_text(json.dumps(settings))
        port = gateway.url.rsplit(":", 1)[1]
        words = [PYTHON, OGX, "connect", "claude", "--port", port, "--model", MODEL, "Hello"]
        terminal, inner = pty.openpty()
        environment = {**gateway.environment, "TERM": "xterm-256color", "COLUMNS": "200"}
        process = subprocess.Popen(words, cwd=gateway.project, env=environment, stdin=inner,
                                   stdout=inner, stderr=inner, start_new_session=True)
        shown, give_up = b"", time.monotonic() + 60
        try:
            while b"tokens in" not in shown and time.monotonic() < give_up:
                if select.select([terminal], [], [], 0.5)[0]:
                    shown += os.read(terminal, 65536)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
            os.close(terminal)
            os.close(inner)
        # What stood there before, the model, isn't drawn again.
        assert b" | 1,234 tokens in, 81 % cached, 56 out" in shown, shown[-3000:]

    def test_a_subagents_model_counts_and_is_not_the_one_that_answers(self, gateway, upstream):
        """Asked by the sub-agent, when its own model was the last to answer."""
        session = str(uuid.uuid4())
        described = shlex.quote(json.dumps({"session_id": session}))
        command = f"echo {described} | {shlex.join([PYTHON, OGX, 'statusline'])}"
        errand = {"description": "Find out", "prompt": "SUBTASK: say hi", "model": "haiku",
                  "subagent_type": "general-purpose", "run_in_background": False}
        upstream.script = {
            "Delegate": [Reply(calls=[("Agent", errand)]), Reply("It said hi.")],
            "SUBTASK": [Reply(calls=[("Bash", {"command": command})]), Reply("Hi.")],
        }
        tiers = ["--model", MODEL, "--haiku-model", MODEL + "-mini", "--session-id", session]
        done = gateway.connect(*tiers, "-p", "Delegate", "--allowedTools", "Agent,Bash")
        assert (done.returncode, done.stdout) == (0, "It said hi.\n"), done.stderr
        first, second = upstream.seen("SUBTASK")
        assert first["model"] == "scripted-mini"
        (told,) = tool_results(second).values()
        assert told == f"{MODEL} | 2,468 tokens in, 81 % cached, 112 out"
