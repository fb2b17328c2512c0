"""The fixtures of the tests with real clients: each test has its own scripted upstream, which keeps
every request, and its own gateway before it, both on free loopback ports, with a fresh HOME."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gateways import MODELS, UPSTREAMS, Gateway, started, written_config  # noqa: E402
from scripted_upstream import KEY, Json, ScriptedUpstream  # noqa: E402


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
