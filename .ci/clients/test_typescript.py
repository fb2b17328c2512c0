"""The TypeScript SDK, @anthropic-ai/sdk, against ogx.py over chat, over Responses and natively."""

import json
import threading

import pytest
from gateways import every_dialect, javascript, results_in
from scripted_messages import COUNTED
from scripted_upstream import Json, Reply

pytestmark = [pytest.mark.clients, every_dialect]

SETUP = """
import Anthropic from "@anthropic-ai/sdk";
import {zodOutputFormat} from "@anthropic-ai/sdk/helpers/zod";
import {betaZodTool} from "@anthropic-ai/sdk/helpers/beta/zod";
import * as z from "zod";

const client = new Anthropic({baseURL: url, apiKey: "any", maxRetries: 0});
const messages = [{role: "user", content: "Hello there"}];
const ask = {model, max_tokens: 2000, messages};
const weather = {name: "weather", description: "The weather in a city.", input_schema: {
    type: "object", properties: {city: {type: "string"}}, required: ["city"]}};
"""
OSLO = ("weather", {"city": "Oslo"})


class TestMessages:
    def test_creates_a_message(self, told, upstream, model):
        upstream.script = {"Hello": [Reply("Good day.")]}
        (message,) = told("say(await client.messages.create({...ask, system: 'Be kind.'}));")
        assert [block["text"] for block in message["content"]] == ["Good day."]
        assert (message["stop_reason"], message["type"]) == ("end_turn", "message")
        assert message["model"] == model or model.endswith(f"/{message['model']}")
        usage = message["usage"]
        assert (usage["input_tokens"], usage["output_tokens"]) == (234, 56)
        (body,) = upstream.requests
        assert "Be kind." in json.dumps(body) and not body.get("stream")

    def test_streams_a_message_piece_by_piece(self, gateway, model, upstream):
        arrived = threading.Event()
        upstream.script = {"Hello": [Reply("Good day to you all.", waits_for=arrived)]}
        code = """
            const stream = client.messages.stream(ask);
            stream.on("text", say);
            await stream.finalMessage();
        """
        with javascript(gateway, model, SETUP + code) as process:
            assert process.stdout
            assert json.loads(process.stdout.readline()) == "Good da"
            assert not arrived.is_set()
            arrived.set()
            rest, errors = process.communicate(timeout=60)
        assert "".join(map(json.loads, rest.splitlines())) == "y to you all.", errors

    def test_streams_thinking_and_parallel_calls(self, told, upstream):
        calls = [OSLO, ("weather", {"city": 'Bergen "\U0001f600"'})]
        upstream.script = {"Hello": [Reply("I look.", reasoning="Two cities.", calls=calls)]}
        (message,) = told("""
            const thinking = {type: "enabled", budget_tokens: 1024};
            const stream = client.messages.stream({...ask, thinking, tools: [weather]});
            say(await stream.finalMessage());
        """)
        thought, text, *uses = message["content"]
        assert thought["thinking"] == "Two cities."
        assert text["text"] == "I look."
        assert [(use["name"], use["input"]) for use in uses] == calls
        assert message["stop_reason"] == "tool_use"

    def test_gets_a_signature_with_each_thought(self, told, upstream):
        upstream.script = {"Hello": [Reply("Hi.", reasoning="Hm.")]}
        thoughts = told("""
            const request = {...ask, thinking: {type: "enabled", budget_tokens: 1024}};
            say((await client.messages.create(request)).content[0]);
            say((await client.messages.stream(request).finalMessage()).content[0]);
        """)
        assert [bool(thought["signature"]) for thought in thoughts] == [True, True]

    def test_loops_over_a_tool_by_hand(self, told, upstream):
        upstream.script = {"Hello": [Reply("I look.", reasoning="Hm.", calls=[OSLO, OSLO]),
                                     Reply("Rain in Oslo.")]}
        answers = told("""
            const ways = [(request) => client.messages.create(request),
                          (request) => client.messages.stream(request).finalMessage()];
            for (const turn of ways) {
                const first = await turn({...ask, tools: [weather]});
                const uses = first.content.filter((block) => block.type === "tool_use");
                const results = uses.map((use, at) => (
                    {type: "tool_result", tool_use_id: use.id, content: "rain " + at}));
                const more = [...messages, {role: "assistant", content: first.content},
                              {role: "user", content: results}];
                const last = await turn({...ask, messages: more, tools: [weather]});
                say([uses[0].name, uses[0].input, last.content.at(-1).text]);
            }
        """)
        assert answers == [[*OSLO, "Rain in Oslo."]] * 2
        for body in upstream.requests[1::2]:
            assert results_in(body) == ["rain 0", "rain 1"]

    @pytest.mark.parametrize("streams", ["false", "true"], ids=["whole", "streamed"])
    def test_runs_tools_by_itself(self, told, upstream, streams):
        upstream.script = {"Hello": [Reply(calls=[OSLO]), Reply("Snow.")]}
        (message,) = told(f"""
            const tool = betaZodTool({{
                name: "weather", description: "The weather", run: ({{city}}) => "snow in " + city,
                inputSchema: z.object({{city: z.string()}})}});
            const runner = client.beta.messages.toolRunner(
                {{...ask, tools: [tool], stream: {streams}}});
            say(await runner.runUntilDone());
        """)
        assert message["content"][-1]["text"] == "Snow."
        assert results_in(upstream.requests[-1]) == ["snow in Oslo"]

    def test_parses_structured_output(self, told, upstream):
        upstream.script = {"Hello": [Reply('{"name": "Oslo", "people": 700000}')]}
        (city,) = told("""
            const format = zodOutputFormat(z.object({name: z.string(), people: z.number()}));
            const message = await client.messages.parse({...ask, output_config: {format}});
            say(message.parsed_output);
        """)
        assert city == {"name": "Oslo", "people": 700000}
        assert "people" in json.dumps(upstream.requests[0])

    def test_counts_tokens_without_asking_the_model(self, told, upstream, dialect):
        few, many = told("""
            const long = [{role: "user", content: "Hello there, how are you? ".repeat(200)}];
            for (const messages of [ask.messages, long])
                say((await client.messages.countTokens({model, messages})).input_tokens);
        """)
        if dialect == "messages":
            assert few == many == COUNTED
        else:
            assert 1 <= few <= 50 and 600 <= many <= 4000
        assert upstream.requests == []


class TestModels:
    def test_are_listed_whole_and_in_pages(self, told, model):
        whole, pages, one = told("""
            const ids = async (query) => {
                const found = [];
                for await (const one of client.models.list(query)) found.push(one.id);
                return found;
            };
            say(await ids());
            say(await ids({limit: 1}));
            say(await client.models.retrieve(model));
        """)
        assert model in whole and pages == whole and len(set(whole)) == len(whole)
        assert (one["id"], one["type"]) == (model, "model") and one["display_name"]


class TestErrors:
    @pytest.fixture
    def settings(self) -> Json:
        return {"retries": 0}

    def test_of_the_upstream_have_its_words_and_a_class_of_their_own(self, told, upstream):
        expected = [
            (400, "BadRequestError", "invalid_request_error"),
            (401, "AuthenticationError", "authentication_error"),
            (403, "PermissionDeniedError", "permission_error"),
            (429, "RateLimitError", "rate_limit_error"),
            (500, "InternalServerError", "api_error"),
        ]
        upstream.script = {f"Fail by {status}": [Reply(f"No, it said at {status}.", status=status)]
                           for status, _, _ in expected}
        errors = told("""
            for (const status of [400, 401, 403, 429, 500]) {
                const failing = {...ask, messages: [{role: "user", content: `Fail by ${status}`}]};
                for (const turn of [() => client.messages.create(failing),
                                    () => client.messages.stream(failing).finalMessage()])
                    await turn().catch((error) => say(
                        [error.status, error.constructor.name, error.type, error.apiMessage,
                         Boolean(error.requestID)]));
            }
        """)
        assert [tuple(error[:3]) for error in errors] == [one for one in expected for _ in range(2)]
        for status, _, _, words, has_id in errors:
            assert f"No, it said at {status}." in words and has_id

    def test_of_the_gateway_name_what_is_wrong(self, told, upstream):
        errors = told("""
            for (const more of [{model: "nope-9"}, {messages: []},
                                {messages: [{role: "robot", content: "x"}]}])
                await client.messages.create({...ask, ...more}).catch(
                    (error) => say([error.status, error.type, error.apiMessage]));
            await client.models.retrieve("openai/nope").catch((error) => say(
                [error.status, error.type, error.apiMessage]));
        """)
        assert [status for status, _, _ in errors] == [404, 400, 400, 404]
        assert [kind for _, kind, _ in errors[:2]] == ["not_found_error", "invalid_request_error"]
        for (_, _, words), named in zip(errors, ("nope-9", "messages", "messages", "openai/nope")):
            assert named in words
        assert upstream.requests == []

    def test_are_raised_when_the_upstream_dies_midway(self, told, upstream):
        upstream.script = {"Hello": [Reply("This breaks off in the middle.", dies=99)]}
        errors = told("""
            await client.messages.stream(ask).finalMessage().then(
                say, (error) => say([error instanceof Anthropic.APIError, "streamed"]));
            await client.messages.create(ask).then(
                say, (error) => say([error instanceof Anthropic.InternalServerError, "whole"]));
        """)
        assert errors == [[True, "streamed"], [True, "whole"]]
