"""The real Claude Code goes on where an upstream refuses a request or breaks off an answer.

The words are plausible ones that no vendor is known to use, and that no rule of ogx.py was written
from: what is tested is whether the meaning was understood. Claude Code would ask six times after a
refusal that nobody understands, and for minutes after one that it takes for a passing one.
"""

import json
import re
import sys
from typing import Any

import pytest
from gateways import ROOT, Gateway, results_in
from scripted_upstream import Json, Reply

pytestmark = pytest.mark.clients

# What ogx.py does not do yet, by the names of the tests. One that passes all the same fails: take
# its name out then.
UNMENDED = {
    "'not available' and 'thinks at low or medium' are not read as a list of efforts": [
        "test_is_lowered_or_left_out[messages, listed]",
    ],
}
LIMIT, PROMPT = 32_768, 24_000


@pytest.fixture(autouse=True)
def _unmended(request) -> None:
    for reason, names in UNMENDED.items():
        if request.node.name in names:
            request.applymarker(pytest.mark.xfail(strict=True, reason=reason))


@pytest.fixture(autouse=True)
def _impatient(gateway) -> None:
    """Two retries of its own instead of ten, which take minutes."""
    gateway.environment["CLAUDE_CODE_MAX_RETRIES"] = "2"


def outcome(gateway: Gateway, model: str, prompt: str, *flags: str) -> Json:
    """What Claude Code says at the end, for better or worse."""
    done = gateway.connect("--model", model, "--", "-p", prompt, *flags, "--output-format", "json")
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    result: Json = json.loads(done.stdout)
    return result


def answer(gateway: Gateway, model: str, prompt: str, *flags: str) -> str:
    """What it answers in a run that must succeed."""
    result = outcome(gateway, model, prompt, *flags)
    assert result["subtype"] == "success" and not result["is_error"], result
    return str(result["result"])


def cases(table: dict[tuple[str, str], Any]) -> list[Any]:
    """The rows of a table as parameters: the dialect, a name, and what a test is about."""
    return [pytest.param(dialect, told, id=f"{dialect}, {name}")
            for (dialect, name), told in table.items()]


def error(status: int, message: str) -> tuple[int, Json]:
    return status, {"error": {"message": message, "type": "error"}}


COUNT = {
    "TEXT ONLY": [Reply("We were counting to three.")],
    "Count": [*(Reply(calls=[("Bash", {"command": f"echo {n}", "description": "count"})])
                for n in range(3)), Reply("Done.")],
}  # fmt: skip


# ======== Prompts that are too long ===========================================================

DOES_NOT_FIT = error(400, "Your prompt (45012 tokens) does not fit the context window of this "
                          "model, which is 32768 tokens.")
OVERFLOWS = {
    ("chat", "numbers with commas"):
        "Total input of 41,873 tokens is larger than the 32,768-token context of scripted.",
    ("messages", "does not fit"): DOES_NOT_FIT,
    ("chat", "too many"): (422, {"detail": "Too many tokens in messages: 40118. The maximum "
                                           "context of this model is 32768."}),
    ("messages", "no numbers"): (413, {"message": "The conversation is too long for the context of "
                                                  "this model."}),
    ("chat", "in a 500"): error(500, "engine core: sequence of 33871 tokens is longer than the "
                                     "context limit of 32768"),
    ("messages", "wrapped"): (400, {"error": {"message": "Upstream said no", "metadata": {
        "raw": json.dumps({"error": "input exceeds model context: 36111 tokens, limit 32768"})}}}),
}
# Much like those, but compaction would be no help.
OTHER_LIMITS = {
    ("chat", "image"): "The image in your last message is larger than the maximum of 5242880 "
                       "bytes.",
    ("messages", "stop"): "Too many stop sequences: 5, the maximum is 4.",
    ("chat", "quota"): error(400, "The limit of 20000 messages in your workspace is used up."),
}


class TestPromptsThatAreTooLong:
    @pytest.mark.parametrize(("dialect", "told"), cases(OVERFLOWS))
    def test_are_compacted(self, gateway, model, upstream, told):
        upstream.too_long, upstream.script = told, COUNT
        answer(gateway, model, "Count to three", "--allowedTools", "Bash")
        assert upstream.too_long == "" and upstream.seen("TEXT ONLY")
        assert "We were counting to three." in json.dumps(upstream.requests[-1])

    @pytest.mark.parametrize(("dialect", "told"), cases(OTHER_LIMITS))
    def test_are_told_from_other_limits(self, gateway, model, upstream, told):
        upstream.too_long, upstream.script = told, COUNT
        assert answer(gateway, model, "Count to three", "--allowedTools", "Bash") == "Done."
        assert upstream.too_long == "" and not upstream.seen("TEXT ONLY")

    @pytest.mark.parametrize("dialect", ["chat", "messages"])
    def test_end_with_plain_words_where_nothing_can_be_compacted(self, gateway, model, upstream):
        upstream.demand = lambda body: DOES_NOT_FIT
        result = outcome(gateway, model, "Hello")
        assert result["is_error"] and "prompt is too long" in result["result"].lower()
        assert len(upstream.requests) <= 4


# ======== Prompts that fit, but not with the reserve for the answer ===========================

ROOMS = {
    ("chat", "sum"): lambda asked: f"{PROMPT} prompt tokens plus {asked} completion tokens come to "
        f"{PROMPT + asked}, and the context of this model is {LIMIT} tokens.",
    ("responses", "share"): lambda asked: f"Cannot reserve {asked} output tokens: the context "
        f"window holds {LIMIT} tokens, of which the input takes {PROMPT}.",
    ("messages", "formula"): lambda asked: (422, {
        "detail": f"context budget exceeded: input {PROMPT} + output {asked} > {LIMIT}"}),
}


def asked_for(body: Json) -> int:
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    return next(int(body[name]) for name in names if name in body)


class TestPromptsThatLeaveLittleRoom:
    @pytest.mark.parametrize(("dialect", "words"), cases(ROOMS))
    def test_are_answered_in_what_is_left(self, gateway, model, upstream, words):
        upstream.demand = lambda body: (
            words(asked_for(body)) if PROMPT + asked_for(body) > LIMIT else "")
        upstream.script = COUNT
        assert answer(gateway, model, "Count to three", "--allowedTools", "Bash") == "Done."
        assert not upstream.seen("TEXT ONLY"), "nothing was to be compacted"
        limits = [asked_for(body) for body in upstream.requests]
        assert len(limits) <= 8 and 1000 <= limits[-1] <= LIMIT - PROMPT


# ======== Tools ===============================================================================


def nodes(value: Any) -> Any:
    """Every object inside a value, itself included."""
    if isinstance(value, dict):
        yield value
    for one in value.values() if isinstance(value, dict) else value:
        if isinstance(one, (dict, list)):
            yield from nodes(one)


def functions(body: Json) -> list[Json]:
    return [tool.get("function", tool) for tool in body.get("tools", ())]


def schema_nodes(body: Json) -> list[Json]:
    return [node for tool in functions(body)
            for node in nodes(tool.get("parameters", tool.get("input_schema")))]


REGEX = "cannot build a grammar for the tool call: regex construct (?! is unknown"
SCHEMAS = {
    "grammar": (lambda node: isinstance(node.get("pattern"), str), error(400, REGEX)),
    "grammar in a 500": (lambda node: isinstance(node.get("pattern"), str),
                         (500, {"error": f"worker answered 400: {json.dumps({'msg': REGEX})}"})),
    "array": (lambda node: node.get("type") == "array" and "items" not in node,
              "function 'mcp__post__send': parameters.copies: an array needs to say what its items "
              "are"),
    "reference": (lambda node: "$ref" in node,
                  (422, {"detail": "tools: function parameters with $ref are not supported"})),
    "two types": (lambda node: isinstance(node.get("type"), list),
                  "Bad function declaration: 'type' in a schema has to be one string, not a list."),
    "type beside anyOf": (lambda node: "anyOf" in node and "type" in node,
                          "tool parameters rejected: where there is anyOf, type belongs inside it"),
}  # fmt: skip


class TestToolsThatAreRefused:
    @pytest.fixture
    def post(self, gateway) -> list[str]:
        """The flags that give Claude Code the MCP server, all of its tools at once."""
        gateway.environment["ENABLE_TOOL_SEARCH"] = "false"
        server = {"command": sys.executable, "args": [str(ROOT / ".ci/clients/scripted_mcp.py")]}
        (gateway.project / "mcp.json").write_text(json.dumps({"mcpServers": {"post": server}}))
        return ["--mcp-config", "mcp.json", "--strict-mcp-config", "--allowedTools",
                "mcp__post__send"]

    @pytest.fixture
    def letter(self, upstream) -> Json:
        """What the model wants to send."""
        given = {"to": "ada@post.example", "kind": "letter"}
        upstream.script = {"Send": [Reply(calls=[("mcp__post__send", given)]), Reply("Sent.")]}
        upstream.strict = False
        return given

    @pytest.mark.parametrize(("is_bad", "told"), [
        pytest.param(*value, id=name) for name, value in SCHEMAS.items()
    ])
    def test_are_sent_in_a_form_that_is_taken(
        self, gateway, model, upstream, post, letter, is_bad, told
    ):
        upstream.demand = lambda body: told if any(map(is_bad, schema_nodes(body))) else ""
        assert answer(gateway, model, "Send it", *post) == "Sent."
        self.look_at(upstream, letter)

    def test_have_shorter_descriptions_where_long_ones_are_refused(
        self, gateway, model, upstream, post, letter
    ):
        def too_wordy(body: Json) -> str:
            longest = max((len(tool.get("description", "")) for tool in functions(body)), default=0)
            return "tools: a function's description may have 1024 characters at most, this one " \
                   f"has {longest}" if longest > 1024 else ""

        upstream.demand = too_wordy
        assert answer(gateway, model, "Send it", *post) == "Sent."
        self.look_at(upstream, letter)

    def look_at(self, upstream: Any, letter: Json) -> None:
        """The tool was among the others, was called and answered; few requests were refused."""
        last = upstream.requests[-1]
        assert results_in(last) == ["sent " + json.dumps(letter, sort_keys=True)]
        (tool,) = [one for one in functions(last) if one["name"] == "mcp__post__send"]
        assert {"to", "copies", "when", "kind", "weight"} <= set(tool["parameters"]["properties"])
        assert len(functions(last)) > 10
        assert len(upstream.requests) <= 2 + 4


# ======== Effort ==============================================================================


def effort_of(body: Json) -> str:
    fields = body.get("output_config") or body.get("reasoning") or {}
    return str(fields.get("effort") or body.get("reasoning_effort") or "")


# What is said, and what is taken.
EFFORTS = {
    ("messages", "listed"): ("The effort you asked for is not available: scripted thinks at low or "
                             "medium.", {"low", "medium", ""}),
    ("chat", "template"): (error(500, "chat template raised: reasoning effort must be one of "
                                      "minimal, low, medium"), {"minimal", "low", "medium", ""}),
    ("responses", "none"): (error(422, "reasoning effort cannot be chosen for this model"), {""}),
}


class TestEffortThatIsRefused:
    @pytest.mark.parametrize(("dialect", "case"), cases(EFFORTS))
    def test_is_lowered_or_left_out(self, gateway, model, upstream, case):
        told, taken = case
        upstream.demand = lambda body: "" if effort_of(body) in taken else told
        upstream.script = {"Hello": [Reply("Good day.")]}
        assert answer(gateway, model, "Hello", "--effort", "high") == "Good day."
        asked = len(upstream.requests)
        assert asked <= 3
        assert answer(gateway, model, "Hello again", "--effort", "high") == "Good day."
        assert len(upstream.requests) == asked + 1, "and it is known from then on"


# ======== Betas and fields that an older server of Messages doesn't know ======================

BETA = re.compile("claude-code-|interleaved-thinking-")  # those that every server knows
OLD_SERVERS = {
    "named": lambda betas, body: next((
        f"anthropic-beta: '{one}' is unknown here" for one in betas if not BETA.match(one)), ""),
    "all at once": lambda betas, body: "anthropic-beta: this server does not know "
        + ", ".join(unknown) if (unknown := [b for b in betas if not BETA.match(b)]) else "",
    "unnamed": lambda betas, body: "the anthropic-beta header holds an invalid beta flag"
        if not all(map(BETA.match, betas)) else "",
    "field": lambda betas, body: "context_management: Extra inputs are not permitted"
        if "context_management" in body else "",
    "inner field": lambda betas, body: "tools.0.defer_loading: Extra inputs are not permitted"
        if any("defer_loading" in tool for tool in body.get("tools", ())) else
        "thinking.display: Extra inputs are not permitted"
        if "display" in body.get("thinking", {}) else "",
    "thinking": lambda betas, body: "thinking: Input tag 'adaptive' found using 'type' does not "
        "match any of the expected tags: 'disabled', 'enabled'"
        if body.get("thinking", {}).get("type") == "adaptive" else "",
}  # fmt: skip


class TestServersThatAreOlderThanTheClient:
    @pytest.fixture
    def dialect(self) -> str:
        return "messages"

    @pytest.mark.parametrize("problem", OLD_SERVERS.values(), ids=OLD_SERVERS)
    def test_get_what_they_know(self, gateway, model, upstream, problem):
        upstream.demand = lambda body: problem([b for b in upstream.betas[-1] if b], body)
        calls = [("Bash", {"command": "echo found", "description": "Look"})]
        upstream.script = {"Look": [Reply("So.", reasoning="Hm.", calls=calls), Reply("Here.")]}
        assert answer(gateway, model, "Look", "--allowedTools", "Bash") == "Here."
        assert results_in(upstream.requests[-1]) == ["found"]
        asked = len(upstream.requests)
        assert asked <= 2 + 6
        assert answer(gateway, model, "Look again", "--allowedTools", "Bash") == "Here."
        assert len(upstream.requests) == asked + 2, "and it is known from then on"


# ======== Answers that break off ==============================================================

HALF = "The first half of the answer, and"


FAILURES = {
    ("chat", "text"): {"error": "GPU 3 fell off the bus"},
    ("chat", "object"): {"error": {"message": "GPU 3 is gone", "type": "server_error"}},
    ("messages", "text"): {"error": "GPU 3 fell off the bus"},
    ("messages", "object"): {"error": {"message": "GPU 3 is gone", "type": "server_error"}},
}


class TestAnswersThatBreakOff:
    @pytest.mark.parametrize("reason", ["internal_error", "request_aborted", "network_failure"])
    def test_for_a_reason_of_a_failure_are_resumed(self, gateway, model, upstream, reason):
        upstream.script = {"Tell me": [Reply(HALF, finish=reason), Reply(" the second half.")]}
        assert answer(gateway, model, "Tell me").endswith("the second half.")
        assert len(upstream.requests) == 2

    @pytest.mark.parametrize("reason", ["eos", "complete"])
    def test_for_a_reason_of_an_end_are_whole(self, gateway, model, upstream, reason):
        upstream.script = {"Tell me": [Reply("All of it.", finish=reason)]}
        assert answer(gateway, model, "Tell me") == "All of it."
        assert len(upstream.requests) == 1

    @pytest.mark.parametrize(("dialect", "fails"), cases(FAILURES))
    def test_with_an_error_in_the_stream_are_made_whole(self, gateway, model, upstream, fails):
        # The client either asks for the rest of what it has or asks the whole again.
        broken = Reply(f"{HALF} the second half.", fails=fails)
        upstream.script = {"Tell me": [broken, Reply(" the second half.")]}
        assert answer(gateway, model, "Tell me").endswith("the second half.")
        assert len(upstream.requests) == 2
