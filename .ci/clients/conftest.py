"""The tests with real clients, a file for each: Claude Code, the SDKs, LangChain.

    make test-clients                          installs them (.ci/clients-install) and runs all
    make test-clients ARGS=.ci/clients/test_vercel.py

Each test has its own scripted upstream, which keeps every request, and its own gateway before it,
both on free loopback ports, with a fresh HOME; these fixtures make them. Which upstream to extend:

    scripted_upstream.py    what it says, in chat completions, or any upstream (Reply, `script`)
    scripted_vendors.py     what one vendor refuses and OpenAI doesn't
    scripted_messages.py    Anthropic's Messages, the native dialect
    scripted_responses.py   OpenAI's Responses (test_responses.py)
    scripted_bedrock.py     Amazon Bedrock's servers and signatures (test_bedrock.py)
    scripted_mcp.py         an MCP server that Claude Code starts (test_recovery.py)
"""

import sys
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from gateways import MODELS, ROOT, UPSTREAMS, Gateway, started, told_by, written_config
from scripted_upstream import KEY, Json, ScriptedUpstream

sys.path.insert(0, str(ROOT))  # for test_ogx, whose tables some tests use


@pytest.fixture
def dialect() -> str:
    """What the upstream speaks: chat, responses or messages."""
    return "chat"


@pytest.fixture
def model(dialect) -> str:
    return MODELS[dialect]


@pytest.fixture
def upstream(dialect) -> Iterator[ScriptedUpstream]:
    with UPSTREAMS[dialect]() as server:
        yield server
        server.shutdown()
    assert server.refusals == [], "the gateway sent what the upstream refuses"


@pytest.fixture
def settings() -> Json:
    """What its configuration says under `server`."""
    return {}


@pytest.fixture
def configuration(dialect, settings, upstream, tmp_path) -> list[str]:
    """The file that `run` is given, if any."""
    if dialect == "chat" and not settings:
        return []
    kind = "anthropic" if dialect == "messages" else "openai"
    return [written_config(tmp_path, kind, upstream, settings, dialect=dialect)]


@pytest.fixture
def gateway(upstream, configuration, tmp_path, monkeypatch) -> Iterator[Gateway]:
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url}
    given = {} if configuration else variables
    with started(tmp_path, monkeypatch, given, *configuration) as running:
        yield running


@pytest.fixture
def sdk(gateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def told(request, gateway, model) -> Any:
    """Runs a program in JavaScript after its file's SETUP; returns what it says."""
    return lambda code: told_by(gateway, model, request.module.SETUP + code)
