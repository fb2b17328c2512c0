"""LangChain's ChatAnthropic against ogx.py over chat, over Responses and natively."""

import json
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import anthropic
import pydantic
import pytest
from gateways import every_dialect, results_in
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from scripted_messages import COUNTED
from scripted_upstream import Json, Reply

pytestmark = [pytest.mark.clients, every_dialect]

OSLO, BERGEN = ("weather", {"city": "Oslo"}), ("weather", {"city": 'Bergen "\U0001f600"'})
THINKS = {"type": "enabled", "budget_tokens": 1024}


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"snow in {city}"


class City(pydantic.BaseModel):
    """A city."""

    name: str
    people: int


@pytest.fixture
def make(gateway, model) -> Iterator[Any]:
    """Makes a chat model; what it warns of is a failure."""
    usual = {"model": model, "base_url": gateway.url, "api_key": "any", "max_retries": 0,
             "max_tokens": 2000}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield lambda **more: ChatAnthropic(**usual, **more)


class TestText:
    def test_is_invoked(self, make, upstream):
        upstream.script = {"Hello": [Reply("Good day.")]}
        answer = make().invoke([SystemMessage("Be kind."), HumanMessage("Hello there")])
        assert answer.text == "Good day."
        assert answer.response_metadata["stop_reason"] == "end_turn"
        usage = answer.usage_metadata
        assert usage["output_tokens"] == 56 and usage["input_tokens"] >= 234
        (body,) = upstream.requests
        assert "Be kind." in json.dumps(body) and not body.get("stream")

    def test_is_streamed_piece_by_piece(self, make, upstream):
        arrived = threading.Event()
        upstream.script = {"Hello": [Reply("Good day to you all.", waits_for=arrived)]}
        chunks = make().stream("Hello there")
        whole = next(chunk for chunk in chunks if chunk.text)
        assert whole.text == "Good da"
        arrived.set()
        for chunk in chunks:
            whole += chunk
        assert whole.text == "Good day to you all."
        assert whole.response_metadata["stop_reason"] == "end_turn"
        assert whole.usage_metadata["output_tokens"] == 56

    def test_comes_with_its_reasoning(self, make, upstream):
        upstream.script = {"Hello": [Reply("Good day.", reasoning="Let me see.")]}
        for streams in (False, True):
            answer = make(thinking=THINKS, streaming=streams).invoke("Hello there")
            thought, text = answer.content_blocks
            assert (thought["reasoning"], text["text"]) == ("Let me see.", "Good day.")

    def test_is_made_for_several_at_once(self, make, upstream):
        upstream.script = {f"Number {n}": [Reply(f"It is {n}.")] for n in range(8)}
        answers = make().batch([f"Number {n}" for n in range(8)])
        assert [answer.text for answer in answers] == [f"It is {n}." for n in range(8)]


class TestTools:
    @pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
    def test_are_called_and_answered(self, make, upstream, streams):
        upstream.script = {"Hello": [Reply("I look.", calls=[OSLO, BERGEN]), Reply("Cold.")]}
        llm, messages = make(streaming=streams).bind_tools([weather]), [HumanMessage("Hello")]
        first = llm.invoke(messages)
        assert [(call["name"], call["args"]) for call in first.tool_calls] == [OSLO, BERGEN]
        assert first.response_metadata["stop_reason"] == "tool_use"
        messages += [first, *(weather.invoke(call) for call in first.tool_calls)]
        assert isinstance(messages[-1], ToolMessage)
        assert llm.invoke(messages).text == "Cold."
        assert results_in(upstream.requests[-1]) == ["snow in Oslo", f"snow in {BERGEN[1]['city']}"]

    @pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
    def test_are_answered_with_the_thoughts_that_led_to_them(
        self, make, upstream, dialect, streams
    ):
        upstream.script = {"Hello": [Reply("I look.", reasoning="Hm.", calls=[OSLO]),
                                     Reply("Snow.")]}
        llm = make(streaming=streams, thinking=THINKS).bind_tools([weather])
        messages = [HumanMessage("Hello")]
        messages += [first := llm.invoke(messages), weather.invoke(first.tool_calls[0])]
        assert llm.invoke(messages).text == "Snow."
        sent = json.dumps(upstream.requests[-1])  # to chat no thoughts go back
        assert {"chat": "I look.", "responses": "encrypted_content", "messages": "signature"}[
            dialect] in sent

    def test_can_be_demanded(self, make, upstream, dialect):
        upstream.script = {"Hello": [Reply(calls=[OSLO])]}
        for choice in ("any", "weather"):
            (call,) = make().bind_tools([weather], tool_choice=choice).invoke("Hello").tool_calls
            assert call["args"] == {"city": "Oslo"}
        choices = [body["tool_choice"] for body in upstream.requests]
        first = {"type": "any"} if dialect == "messages" else "required"
        assert choices[0] == first and "weather" in json.dumps(choices[1])


class TestObjects:
    def test_are_made_by_a_call(self, make, upstream):
        upstream.script = {"Hello": [Reply(calls=[("City", {"name": "Oslo", "people": 700000})])]}
        llm = make().with_structured_output(City, method="function_calling")
        assert llm.invoke("Hello there") == City(name="Oslo", people=700000)

    def test_are_made_of_text(self, make, upstream):
        upstream.script = {"Hello": [Reply('{"name": "Oslo", "people": 700000}')]}
        llm = make().with_structured_output(City, method="json_schema")
        assert llm.invoke("Hello there") == City(name="Oslo", people=700000)
        assert "people" in json.dumps(upstream.requests[0])


class TestTheRest:
    def test_tokens_are_counted(self, make, upstream, dialect):
        counted = make().get_num_tokens_from_messages([HumanMessage("Hello there")])
        assert counted == COUNTED if dialect == "messages" else 1 <= counted <= 50
        assert upstream.requests == []

    @pytest.fixture
    def settings(self) -> Json:
        return {"retries": 0}

    def test_errors_have_the_upstreams_words_and_a_class_of_their_own(self, make, upstream):
        upstream.script = {f"Fail by {status}": [Reply(f"No, it said at {status}.", status=status)]
                           for status in (400, 401, 429, 500)}
        for status, expected in (
            (400, anthropic.BadRequestError), (401, anthropic.AuthenticationError),
            (429, anthropic.RateLimitError), (500, anthropic.InternalServerError),
        ):
            for streams in (False, True):
                with pytest.raises(expected, match=f"No, it said at {status}."):
                    make(streaming=streams).invoke(f"Fail by {status}")

    def test_an_answer_that_breaks_off_is_an_error(self, make, upstream):
        upstream.script = {"Hello": [Reply("This breaks off in the middle.", dies=99)]}
        for streams in (False, True):
            with pytest.raises(anthropic.APIError):
                make(streaming=streams).invoke("Hello there")
