"""opencode, as `connect opencode` launches it, against ogx.py over chat and natively."""

import json

import pytest
from gateways import CLAUDE_BIN, MODELS, OGX, PYTHON
from scripted_upstream import Reply

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not (CLAUDE_BIN / "opencode").exists(), reason="opencode isn't installed"),
    pytest.mark.parametrize("dialect", ["chat", "messages"]),
]
OFFLINE = {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1",
           "OPENCODE_DISABLE_LSP_DOWNLOAD": "1"}  # fmt: skip


def test_runs_a_tool_and_tells_what_it_said(gateway, upstream, dialect):
    gateway.environment.update(OFFLINE)
    call = ("bash", {"command": "echo tool-$((40+2))", "description": "Add"})
    upstream.script = {"Say what": [Reply(calls=[call]), Reply("It said so.")]}
    port = gateway.url.rsplit(":", 1)[1]
    done = gateway.run(PYTHON, OGX, "connect", "opencode", "--port", port, "--model",
                       MODELS[dialect], "run", "Say what the tool says")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "It said so." in done.stdout
    assert "tool-42" in json.dumps(upstream.requests[-1]["messages"])


def test_no_id_puts_a_file_into_its_configuration(gateway, upstream, dialect):
    gateway.environment.update(OFFLINE)
    secret = gateway.project / "secret"
    secret.write_text("SECRETWORD")
    upstream.script = {"Hello": [Reply("Good day.")]}
    model = f"{MODELS[dialect].split('/')[0]}/a{{file:{secret}}}"
    done = gateway.run(PYTHON, OGX, "connect", "opencode", "--url", gateway.url, "--unlisted",
                       "--model", model, "run", "Hello")  # fmt: skip
    told = done.stdout + done.stderr + json.dumps(upstream.requests)
    assert "SECRETWORD" not in told and model.split("/", 1)[1] in told
