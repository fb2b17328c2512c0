"""The openai SDK reads the same models, and finds the scripted upstream as strict as OpenAI."""

import openai
import pytest
from gateways import MODEL
from scripted_upstream import KEY, Json, Reply
from sdk_requests import USER, valid

pytestmark = pytest.mark.clients


class TestOpenaiSdk:
    def test_reads_the_same_model_list(self, gateway, sdk):
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0)
        models = [valid(model) for model in client.models.list()]
        ids = {model.id for model in sdk.models.list(limit=1000)}
        assert {model.id for model in models} == ids
        assert all(model.object == "model" and model.owned_by for model in models)
        assert valid(client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("openai/nope")

    def test_finds_the_scripted_upstream_like_openai(self, upstream):
        client = openai.OpenAI(base_url=upstream.url, api_key=KEY, max_retries=0)
        ask: Json = {"model": "scripted", "messages": [USER]}
        upstream.script = {"Hello": [Reply("One.", reasoning="Hm.", calls=[("f", {"x": 1})])]}
        answer = client.chat.completions.create(**ask)
        assert answer.choices[0].message.tool_calls[0].function.arguments == '{"x": 1}'
        ask["stream_options"] = {"include_usage": True}
        with client.chat.completions.stream(**ask) as stream:
            streamed = stream.get_final_completion()
        assert streamed.choices[0].message.content == "One."
        assert streamed.choices[0].message.tool_calls[0].function.arguments == '{"x": 1}'
        assert streamed.choices[0].finish_reason == "tool_calls"
        assert streamed.usage.prompt_tokens == 1234

    def test_finds_the_scripted_upstream_as_strict_as_openai(self, upstream):
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        asks = {"role": "assistant", "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": "c1", "content": "done"}
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        user: Json = {"messages": [USER]}
        good: Json = {"messages": [USER, asks, result], "tools": [tool], "tool_choice": "auto"}
        client = openai.OpenAI(base_url=upstream.url, api_key=KEY, max_retries=0)
        client.chat.completions.create(model="scripted", **good)
        for bad in (
            {"messages": [{"role": "robot", "content": ""}]},
            {"messages": [USER, asks]},
            {"messages": [USER, asks, USER, result]},
            {"messages": [USER, asks, {**result, "content": [image]}]},
            {"messages": [USER, {"role": "assistant", "content": None}]},
            {"messages": [{**USER, "cache_control": {}}]},
            {**user, "tools": []},
            {**user, "tool_choice": "auto"},
            {**user, "tools": [{"type": "function", "function": {"name": "a.b"}}]},
            {**user, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
            {**user, "stop": list("abcde")},
            {**user, "extra_body": {"thinking": {"type": "adaptive"}}},
        ):
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="scripted", **bad)
        assert len(upstream.refusals) == 12
        upstream.refusals.clear()
