"""The Vercel AI SDK, `ai` with @ai-sdk/anthropic, against ogx.py over chat, over Responses and
natively."""

import json
import threading

import pytest
from gateways import every_dialect, javascript, results_in
from scripted_upstream import Json, Reply

pytestmark = [pytest.mark.clients, every_dialect]

SETUP = """
import {generateObject, generateText, streamObject, streamText, isStepCount, Output, tool}
    from "ai";
import {createAnthropic} from "@ai-sdk/anthropic";
import * as z from "zod";

const anthropic = createAnthropic({baseURL: url + "/v1", apiKey: "any"});
const ask = {model: anthropic(model), prompt: "Hello there", maxRetries: 0, maxOutputTokens: 2000};
const weather = tool({description: "The weather in a city.",
                      inputSchema: z.object({city: z.string()}),
                      execute: async ({city}) => ({sky: "snow in " + city})});
const city = z.object({name: z.string(), people: z.number()});
const failure = (error) => [error.name, error.statusCode ?? null, error.message];
"""
OSLO, BERGEN = ("weather", {"city": "Oslo"}), ("weather", {"city": 'Bergen "\U0001f600"'})


class TestText:
    def test_is_generated(self, told, upstream):
        upstream.script = {"Hello": [Reply("Good day.")]}
        (answer,) = told("""
            const answer = await generateText({...ask, instructions: "Be kind."});
            say([answer.text, answer.finishReason, answer.usage, answer.warnings ?? []]);
        """)
        text, finish, usage, warnings = answer
        assert (text, finish, warnings) == ("Good day.", "stop", [])
        assert usage["outputTokens"] == 56 and usage["inputTokens"] >= 234
        (body,) = upstream.requests
        assert "Be kind." in json.dumps(body)

    def test_is_streamed_piece_by_piece(self, gateway, model, upstream):
        arrived = threading.Event()
        upstream.script = {"Hello": [Reply("Good day to you all.", waits_for=arrived)]}
        code = """
            const answer = streamText(ask);
            for await (const piece of answer.textStream) say(piece);
            say([await answer.finishReason, (await answer.usage).outputTokens]);
        """
        with javascript(gateway, model, SETUP + code) as process:
            assert process.stdout
            assert json.loads(process.stdout.readline()) == "Good da"
            arrived.set()
            out, errors = process.communicate(timeout=60)
        *rest, end = map(json.loads, out.splitlines())
        assert "".join(rest) == "y to you all.", errors
        assert end == ["stop", 56]

    def test_comes_with_its_reasoning(self, told, upstream):
        upstream.script = {"Hello": [Reply("Good day.", reasoning="Let me see.")]}
        answers = told("""
            const thinking = {type: "enabled", budgetTokens: 1024};
            const request = {...ask, providerOptions: {anthropic: {thinking}}};
            const whole = await generateText(request), streamed = streamText(request);
            say([whole.reasoningText, whole.text]);
            say([await streamed.reasoningText, await streamed.text]);
        """)
        assert answers == [["Let me see.", "Good day."]] * 2


class TestTools:
    def test_are_called_by_it_and_answered_by_hand(self, told, upstream):
        upstream.script = {"Hello": [Reply("I look.", calls=[OSLO, BERGEN]), Reply("Cold.")]}
        calls, last = told("""
            const {execute, ...bare} = weather, messages = [{role: "user", content: ask.prompt}];
            const tools = {weather: bare}, {prompt, ...rest} = ask;
            const first = await generateText({...rest, messages, tools});
            say(first.toolCalls.map((call) => [call.toolName, call.input]));
            const content = first.toolCalls.map((call, at) => (
                {type: "tool-result", toolCallId: call.toolCallId, toolName: call.toolName,
                 output: {type: "text", value: "rain " + at}}));
            messages.push(...first.response.messages, {role: "tool", content});
            say((await generateText({...rest, messages, tools})).text);
        """)
        assert [tuple(call) for call in calls] == [OSLO, BERGEN] and last == "Cold."
        assert results_in(upstream.requests[-1]) == ["rain 0", "rain 1"]

    @pytest.mark.parametrize("way", ["generateText", "streamText"])
    def test_are_run_by_itself_over_several_steps(self, told, upstream, way):
        upstream.script = {"Hello": [Reply("I look.", calls=[OSLO, BERGEN]), Reply(calls=[OSLO]),
                                     Reply("Snow everywhere.")]}
        text, steps = told(f"""
            const answer = await {way}({{...ask, tools: {{weather}}, stopWhen: isStepCount(5)}});
            say(await answer.text);
            say((await answer.steps).map((step) => step.finishReason));
        """)
        assert text == "Snow everywhere." and steps == ["tool-calls", "tool-calls", "stop"]
        told_results = [json.loads(one) for one in results_in(upstream.requests[-1])]
        assert told_results == [{"sky": f"snow in {city}"}
                                for city in ("Oslo", BERGEN[1]["city"], "Oslo")]

    @pytest.mark.parametrize("way", ["generateText", "streamText"])
    def test_are_answered_with_the_thoughts_that_led_to_them(self, told, upstream, way, dialect):
        upstream.script = {"Hello": [Reply("I look.", reasoning="Hm.", calls=[OSLO]),
                                     Reply("Snow.")]}
        (text,) = told(f"""
            const answer = await {way}({{...ask, tools: {{weather}}, stopWhen: isStepCount(5)}});
            say(await answer.text);
        """)
        assert text == "Snow."
        sent = json.dumps(upstream.requests[-1])  # to chat no thoughts go back
        assert {"chat": "I look.", "responses": "encrypted_content", "messages": "signature"}[
            dialect] in sent

    def test_can_be_demanded(self, told, upstream, dialect):
        upstream.script = {"Hello": [Reply(calls=[OSLO])]}
        calls = told("""
            for (const toolChoice of ["required", {type: "tool", toolName: "weather"}])
                say((await generateText({...ask, tools: {weather}, toolChoice})).toolCalls.length);
        """)
        assert calls == [1, 1]
        choices = [body["tool_choice"] for body in upstream.requests]
        first = {"type": "any"} if dialect == "messages" else "required"
        assert choices[0] == first and "weather" in json.dumps(choices[1])


class TestObjects:
    def test_are_generated(self, told, upstream):
        upstream.script = {"Hello": [Reply('{"name": "Oslo", "people": 700000}')]}
        given = told("""
            process.noDeprecation = true;  // the first two are old names by now
            globalThis.AI_SDK_LOG_WARNINGS = () => {};
            say((await generateObject({...ask, schema: city})).object);
            const stream = streamObject({...ask, schema: city});
            for await (const part of stream.partialObjectStream) void part;
            say(await stream.object);
            const output = Output.object({schema: city});
            say((await generateText({...ask, output})).output);
            say(await streamText({...ask, output}).output);
        """)
        assert given == [{"name": "Oslo", "people": 700000}] * 4
        assert all("people" in json.dumps(body) for body in upstream.requests)


class TestErrors:
    @pytest.fixture
    def settings(self) -> Json:
        return {"retries": 0}

    def test_have_the_upstreams_status_and_words(self, told, upstream):
        statuses = [400, 401, 429, 500]
        upstream.script = {f"Fail by {status}": [Reply(f"No, it said at {status}.", status=status)]
                           for status in statuses}
        errors = told(f"""
            for (const status of {statuses}) {{
                const failing = {{...ask, prompt: `Fail by ${{status}}`}};
                await generateText(failing).catch((error) => say(failure(error)));
                const parts = streamText({{...failing, onError: () => {{}}}}).fullStream;
                for await (const part of parts)
                    if (part.type === "error") say(failure(part.error));
            }}
        """)
        assert [status for _, status, _ in errors] == [one for one in statuses for _ in range(2)]
        for name, status, words in errors:
            assert name == "AI_APICallError" and f"No, it said at {status}." in words

    def test_are_raised_when_the_upstream_dies_midway(self, told, upstream):
        upstream.script = {"Hello": [Reply("This breaks off in the middle.", dies=99)]}
        whole, *parts = told("""
            await generateText(ask).then(say, (error) => say(error.name));
            for await (const part of streamText({...ask, onError: () => {}}).fullStream)
                say([part.type, part.finishReason ?? ""]);
        """)
        assert whole == "AI_APICallError"
        assert ["error", ""] in parts and ["finish", "stop"] not in parts
