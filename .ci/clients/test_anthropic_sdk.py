"""The Python SDK, anthropic, against ogx.py over chat."""

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import anthropic
import pytest
import test_ogx as spec
from gateways import MODEL
from scripted_upstream import Json, Reply, text_of, tool_results
from sdk_requests import ASK, USER, WEATHER, City, valid

pytestmark = pytest.mark.clients


def counts(usage: Any) -> tuple[int, int, int]:
    return usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens


class TestAnthropicSdk:
    def test_creates_a_message(self, sdk, upstream):
        upstream.script = {"Hello": [Reply("Good day.")]}
        message = valid(sdk.messages.create(**ASK, system="Be kind.", stop_sequences=["END"]))
        assert [block.text for block in message.content] == ["Good day."]
        assert (message.stop_reason, message.model) == ("end_turn", MODEL)
        assert counts(message.usage) == (234, 1000, 56)
        (body,) = upstream.requests
        assert [text_of(one) for one in body["messages"]] == ["Be kind.", "Hello there"]
        assert body["stop"] == ["END"]
        assert 100 in (body.get("max_tokens"), body.get("max_completion_tokens"))

    def test_streams_a_message_piece_by_piece(self, sdk, upstream):
        arrived = threading.Event()
        upstream.script = {"Hello": [Reply("Good day to you all.", waits_for=arrived)]}
        with sdk.messages.stream(**ASK) as stream:
            texts = iter(stream.text_stream)
            began, first = time.monotonic(), next(texts)
            assert first == "Good da" and time.monotonic() - began < 5, "it was held back"
            arrived.set()
            assert first + "".join(texts) == "Good day to you all."
            message = valid(stream.get_final_message())
        assert counts(message.usage) == (234, 1000, 56) and message.stop_reason == "end_turn"

    def test_streams_thinking_and_parallel_tool_calls(self, sdk, upstream):
        calls = [("weather", {"city": "Oslo"}), ("weather", {"city": 'Bergen "west"'})]
        upstream.script = {"Hello": [Reply("I look.", reasoning="Two cities.", calls=calls)]}
        with sdk.messages.stream(**ASK, tools=[WEATHER]) as stream:
            message = valid(stream.get_final_message())
        thinking, text, *uses = message.content
        assert (thinking.thinking, text.text) == ("Two cities.", "I look.")
        assert [(use.name, use.input) for use in uses] == calls
        assert message.stop_reason == "tool_use"

    def test_loops_over_a_tool_by_hand(self, sdk, upstream):
        script = [Reply(calls=[("weather", {"city": "Oslo"})]), Reply("Rain in Oslo.")]
        upstream.script = {"Hello": script}
        first = sdk.messages.create(**ASK, tools=[WEATHER], tool_choice={"type": "any"})
        (use,) = valid(first).content
        assert (first.stop_reason, use.name) == ("tool_use", "weather")
        assert use.input == {"city": "Oslo"}
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}
        turns = [{"role": "assistant", "content": first.content},
                 {"role": "user", "content": [result]}]
        one_by_one = {"type": "auto", "disable_parallel_tool_use": True}
        last = sdk.messages.create(
            **{**ASK, "messages": [USER, *turns]}, tools=[WEATHER], tool_choice=one_by_one
        )
        assert last.content[0].text == "Rain in Oslo."
        assert upstream.requests[0]["tool_choice"] == "required"
        assert upstream.requests[1]["parallel_tool_calls"] is False
        assert list(tool_results(upstream.requests[1]).values()) == ["rain"]

    @pytest.mark.parametrize("streams", [False, True])
    def test_runs_tools_by_itself(self, sdk, upstream, streams):
        @anthropic.beta_tool
        def weather(city: str) -> str:
            """The weather in a city."""
            return f"snow in {city}"

        upstream.script = {"Hello": [Reply(calls=[("weather", {"city": "Oslo"})]), Reply("Snow.")]}
        runner = sdk.beta.messages.tool_runner(**ASK, tools=[weather], stream=streams)
        assert [block.text for block in runner.until_done().content] == ["Snow."]
        last = upstream.requests[-1]
        assert [one["role"] for one in last["messages"]] == ["user", "assistant", "tool"]
        assert list(tool_results(last).values()) == ["snow in Oslo"]

    def test_counts_tokens_without_asking_the_model(self, sdk, upstream):
        few = valid(sdk.messages.count_tokens(model=MODEL, messages=[USER])).input_tokens
        long = [{"role": "user", "content": "Hello there, how are you? " * 200}]
        many = sdk.messages.count_tokens(model=MODEL, messages=long, tools=[WEATHER]).input_tokens
        assert 1 <= few <= 50 and 600 <= many <= 4000
        assert upstream.requests == []

    def test_lists_models_whole_and_in_pages(self, sdk):
        whole = [valid(model).id for model in sdk.models.list()]
        assert [model.id for model in sdk.models.list(limit=1)] == whole
        assert {MODEL, MODEL + "-mini"} <= set(whole) and len(set(whole)) == len(whole)
        page = sdk.models.list(limit=1)
        assert page.has_more and page.first_id == page.last_id == whole[0]
        assert sdk.models.list(after_id=whole[0], limit=1).data[0].id == whole[1]
        assert sdk.models.list(before_id=whole[1], limit=1).data[0].id == whole[0]

    def test_retrieves_a_model_whose_id_holds_a_slash(self, sdk):
        model = valid(sdk.models.retrieve(MODEL))
        assert (model.id, model.type) == (MODEL, "model") and model.display_name
        with pytest.raises(anthropic.NotFoundError, match="openai/nope"):
            sdk.models.retrieve("openai/nope")

    def test_parses_structured_output(self, sdk, upstream):
        upstream.script = {"Hello": [Reply('{"name": "Oslo", "people": 700000}')]}
        message = sdk.messages.parse(**ASK, output_format=City)
        assert message.parsed_output == City(name="Oslo", people=700000)
        schema = upstream.requests[0]["response_format"]["json_schema"]["schema"]
        assert set(schema["properties"]) == {"name", "people"}

    @pytest.mark.parametrize("streams", [False, True])
    @pytest.mark.parametrize(("refused", "reply"), [
        (["response_format"],
         Reply("Let me see.", calls=[("give_answer", {"name": "Oslo", "people": 700000})])),
        (["response_format", "tool_choice"],
         Reply('Here it is:\n```json\n{"name": "Oslo", "people": 700000}\n```')),
    ])
    def test_parses_structured_output_in_every_way_it_is_asked_for(
        self, sdk, upstream, refused, reply, streams
    ):
        upstream.demand = lambda body: next(
            (f"Unsupported parameter: '{name}'" for name in refused if name in body), "")
        upstream.script = {"Hello": [reply]}
        if streams:
            with sdk.messages.stream(**ASK, output_format=City) as stream:
                message = stream.get_final_message()
        else:
            message = sdk.messages.parse(**ASK, output_format=City)
        assert message.parsed_output == City(name="Oslo", people=700000)
        assert valid(message).stop_reason == "end_turn"

    def test_is_told_when_an_answer_has_another_shape(self, sdk, upstream):
        upstream.demand = lambda body: next(
            (f"Unsupported parameter: '{name}'" for name in ("response_format", "tool_choice")
             if name in body), "")
        upstream.script = {"Hello": [Reply("Oslo, I think.")]}
        with pytest.raises(anthropic.InternalServerError, match="no JSON of the shape"):
            sdk.messages.parse(**ASK, output_format=City)

    @pytest.mark.parametrize("name", spec.TestGateway.GOLDEN)
    def test_reads_every_golden_stream(self, name):
        dialect, chunks = spec.TestGateway.GOLDEN[name]
        with spec.FakeUpstream(*[spec.sse(*chunks)] * 4) as fake, spec.serving(
            replace(spec.provider(url=fake.url), dialect=dialect)
        ) as client, anthropic.Anthropic(
            base_url=f"http://127.0.0.1:{client.port}", api_key="any", max_retries=0
        ) as sdk:
            for api in (sdk.messages, sdk.beta.messages):
                whole = valid(api.create(**ASK))
                with api.stream(**ASK) as stream:
                    streamed = valid(stream.get_final_message())
                kinds = [block.type for block in streamed.content]
                # A stream can't take back the beginning of a call that broke off; else it is told.
                kinds = ["text"] if name == "half a call" else kinds
                assert kinds == [block.type for block in whole.content]
                assert streamed.stop_reason == whole.stop_reason

    def test_tells_the_gateways_refusals_by_class(self, sdk, upstream):
        with pytest.raises(anthropic.NotFoundError, match="nope-9") as unknown:
            sdk.messages.create(**{**ASK, "model": "nope-9"})
        assert unknown.value.request_id
        assert unknown.value.body["error"]["type"] == "not_found_error"
        for messages in ([], [{"role": "robot", "content": "x"}],
                         [{"role": "user", "content": [{"type": "sound"}]}]):
            with pytest.raises(anthropic.BadRequestError, match="messages"):
                sdk.messages.create(**{**ASK, "messages": messages})
        with pytest.raises(anthropic.NotFoundError):
            sdk.messages.batches.list()
        assert upstream.requests == []

    @pytest.mark.parametrize(("status", "expected"), [
        (400, anthropic.BadRequestError), (401, anthropic.AuthenticationError),
        (403, anthropic.PermissionDeniedError), (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
    ])
    def test_tells_the_upstreams_refusals_in_its_words(self, sdk, upstream, status, expected):
        upstream.script = {"Hello": [Reply("No, said the upstream.", status=status)]}
        with pytest.raises(expected, match="No, said the upstream.") as refusal:
            sdk.messages.create(**ASK)
        assert refusal.value.status_code == status
        with pytest.raises(expected), sdk.messages.stream(**ASK) as stream:
            stream.get_final_message()

    def test_raises_when_the_upstream_dies_midway(self, sdk, upstream):
        upstream.script = {"Hello": [Reply("This breaks off in the middle.", dies=99)]}
        with pytest.raises(anthropic.APIError), sdk.messages.stream(**ASK) as stream:
            stream.get_final_message()
        with pytest.raises(anthropic.APIStatusError):
            sdk.messages.create(**ASK)

    def test_does_it_asynchronously(self, gateway, upstream):
        async def session() -> None:
            options: Json = {"base_url": gateway.url, "auth_token": "any", "max_retries": 0}
            async with anthropic.AsyncAnthropic(**options) as sdk:
                async with sdk.messages.stream(**ASK) as stream:
                    assert "".join([text async for text in stream.text_stream]) == "Good day."
                answers = await asyncio.gather(*(sdk.messages.create(**ASK) for _ in range(8)))
                assert {valid(answer).content[0].text for answer in answers} == {"Good day."}
                assert MODEL in [model.id async for model in sdk.models.list(limit=1)]
                assert (await sdk.models.retrieve(MODEL)).id == MODEL
                counted = await sdk.messages.count_tokens(model=MODEL, messages=[USER])
                assert counted.input_tokens > 0
                with pytest.raises(anthropic.NotFoundError):
                    await sdk.messages.create(**{**ASK, "model": "nope"})

        upstream.script = {"Hello": [Reply("Good day.")]}
        asyncio.run(session())
        assert len(upstream.requests) == 9
