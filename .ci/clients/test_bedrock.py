"""Claude Code and the anthropic SDK against ogx.py on Amazon Bedrock."""

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anthropic
import pytest
import scripted_bedrock
import signatures
from gateways import OGX, ROOT, Gateway, started
from scripted_upstream import Reply
from sdk_requests import ASK, USER

pytestmark = pytest.mark.clients

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
MANTLE, RUNTIME = scripted_bedrock.MANTLE, scripted_bedrock.RUNTIME


class Aws:
    """The user's AWS files, and the scripted Bedrock that knows their keys."""

    def __init__(self, home: Path, server: scripted_bedrock.ScriptedBedrock) -> None:
        self.folder, self.server = home / ".aws", server
        self.folder.mkdir()
        region = f"[profile work]\nregion = {scripted_bedrock.REGION}\n"
        (self.folder / "config").write_text(region)

    def hand_out(self, key_id: str, token: str) -> None:
        """Give the user temporary keys, which AWS's tools write into their file."""
        self.server.keys[key_id] = (SECRET, token)
        (self.folder / "credentials").write_text(
            f"[work]\naws_access_key_id = {key_id}\naws_secret_access_key = {SECRET}\n"
            f"aws_session_token = {token}\n"
        )


@pytest.fixture
def aws(tmp_path) -> Iterator[Aws]:
    (tmp_path / "home").mkdir()
    with scripted_bedrock.ScriptedBedrock() as server:
        files = Aws(tmp_path / "home", server)
        files.hand_out("ASIAFIRST", "first-token/+==")
        yield files
        server.shutdown()
    assert server.refusals == [], "the gateway sent what Bedrock refuses"


@pytest.fixture
def on_bedrock(aws, tmp_path, monkeypatch) -> Iterator[Gateway]:
    """A gateway whose way to AWS's hosts leads through the scripted ones; keys and region come
    from a profile."""
    url = "http://bedrock-mantle.${env.AWS_REGION}.api.aws/v1"
    line = {"provider_id": "bedrock", "provider_type": "remote::bedrock",
            "config": {"base_url": url}}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"providers": {"inference": [line]}}))
    variables = {"AWS_PROFILE": "work", "http_proxy": aws.server.url}
    with started(tmp_path, monkeypatch, variables, str(config)) as running:
        yield running
    log = (tmp_path / "gateway.log").read_text()
    assert not [secret for secret in (SECRET, "first-token", "second-token") if secret in log]


class TestBedrock:
    def test_signatures_are_botocores_today_too(self):
        spec = importlib.util.spec_from_file_location("ogx_under_test", OGX)
        ogx = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = ogx
        spec.loader.exec_module(ogx)
        assert len(signatures.CASES) >= 12
        for words, method, short, more, body, token in signatures.CASES:
            url, headers, scope = signatures.request_of(short, more)
            now = time.time()
            expected = signatures.signature(method, url, headers, body, token, scope, now)
            keys = (signatures.KEY_ID, signatures.SECRET, token)
            made = ogx.aws_signature(method, url, headers, body, keys, scope, now)
            assert made["authorization"] == expected, words

    def test_the_tests_without_botocore_know_its_signatures(self):
        assert signatures.table() in (ROOT / "test_ogx.py").read_text(encoding="utf-8")

    @pytest.mark.parametrize(("model", "where"), [
        (scripted_bedrock.CLAUDE[MANTLE], f"{MANTLE}/anthropic/v1/messages"),
        (scripted_bedrock.CLAUDE[RUNTIME], f"{RUNTIME}/anthropic/v1/messages"),
        (scripted_bedrock.OPEN[MANTLE], f"{MANTLE}/v1/chat/completions"),
        (scripted_bedrock.OPEN[RUNTIME], f"{RUNTIME}/openai/v1/chat/completions"),
    ])
    def test_claude_code_loops_over_tools(self, on_bedrock, aws, model, where):
        calls = [("Bash", {"command": f"echo {n}-from-the-shell"}) for n in range(3)]
        aws.server.script = {"Run them": [
            Reply("On it.", reasoning="Three of them.", calls=[call]) for call in calls
        ] + [Reply("All three ran.")]}
        done = on_bedrock.connect("--model", f"bedrock/{model}", "--", "-p", "Run them",
                                  "--allowedTools", "Bash", "--output-format", "json")
        assert done.returncode == 0, done.stdout + done.stderr
        result = json.loads(done.stdout)
        assert result["result"] == "All three ran." and result["num_turns"] == 4
        loop = aws.server.seen("Run them")
        assert len(loop) == 4 and {body["model"] for body in loop} == {model}
        assert "2-from-the-shell" in json.dumps(loop[-1]["messages"])
        assert aws.server.refused == []
        assert aws.server.asked.count(f"POST {where}") >= 4
        assert result["usage"]["cache_read_input_tokens"] == 4000
        if "anthropic" in model:
            assert all("cache_control" in json.dumps(body["system"]) for body in loop)
            thoughts = [b for m in loop[-1]["messages"] if m["role"] == "assistant"
                        for b in m["content"] if b["type"] == "thinking"]
            assert {b["signature"] for b in thoughts} == {"c2lnbmVk"}
            assert all(aws.server.betas)

    def test_models_and_profiles_are_listed(self, on_bedrock, aws):
        with anthropic.Anthropic(base_url=on_bedrock.url, api_key="any") as sdk:
            ids = {model.id for model in sdk.models.list() if not model.id.startswith("claude-")}
        claude, others = scripted_bedrock.CLAUDE.values(), scripted_bedrock.OPEN.values()
        assert ids == {f"bedrock/{name}" for name in (*claude, *others)}
        control = scripted_bedrock.CONTROL
        assert aws.server.asked == [f"GET {MANTLE}/v1/models", f"GET {control}/inference-profiles",
                                    f"GET {control}/foundation-models"]

    def test_tokens_are_counted_there(self, on_bedrock, aws):
        with anthropic.Anthropic(base_url=on_bedrock.url, api_key="any") as sdk:
            model = f"bedrock/{scripted_bedrock.CLAUDE[MANTLE]}"
            counted = sdk.messages.count_tokens(model=model, messages=[USER])
        assert counted.input_tokens == 4321

    def test_a_long_running_gateway_survives_new_keys(self, on_bedrock, aws):
        aws.server.script = {"Hello": [Reply("Good day.")]}
        ask = {**ASK, "model": f"bedrock/{scripted_bedrock.CLAUDE[RUNTIME]}"}
        with anthropic.Anthropic(base_url=on_bedrock.url, api_key="any", max_retries=0) as sdk:
            assert sdk.messages.create(**ask).content[0].text == "Good day."
            aws.server.expired.add("first-token/+==")
            with pytest.raises(anthropic.AuthenticationError, match="request is expired"):
                sdk.messages.create(**ask)
            aws.hand_out("ASIASECOND", "second-token/+==")
            assert sdk.messages.create(**ask).content[0].text == "Good day."

    @pytest.mark.parametrize("name", [
        scripted_bedrock.CLAUDE[MANTLE], scripted_bedrock.OPEN[MANTLE],
    ])
    def test_refusals_have_the_right_class_and_awss_words(self, on_bedrock, aws, name):
        ask = {**ASK, "model": f"bedrock/{name}"}
        busy = "Too many requests, please wait before trying again."
        aws.server.script = {"Hello": [Reply(busy, status=429)]}
        with anthropic.Anthropic(base_url=on_bedrock.url, api_key="any", max_retries=0) as sdk:
            with pytest.raises(anthropic.RateLimitError, match=busy):
                sdk.messages.create(**ask)
            aws.server.clock = 600
            with pytest.raises(anthropic.AuthenticationError, match="Signature expired.*the clock"):
                sdk.messages.create(**ask)
            aws.server.clock = 0
            aws.server.keys["ASIAFIRST"] = ("another-secret", "first-token/+==")
            with pytest.raises(anthropic.AuthenticationError, match="we calculated") as wrong:
                sdk.messages.create(**ask)
        assert "first-token" not in str(wrong.value) and SECRET not in str(wrong.value)
