"""Claude Code and the Python SDKs against ogx.py over OpenAI's Responses."""

import base64
import json
import re
from collections.abc import Iterator

import anthropic
import openai
import pytest
import scripted_responses
from gateways import pdf, png, written_config
from scripted_responses import PLAIN, REASONS, Response, ScriptedResponses
from scripted_upstream import KEY, Json
from sdk_requests import ASK, USER, WEATHER, City, answer

pytestmark = pytest.mark.clients

SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
SOURCES = ["https://a.test/1", "https://b.test/2"]
# What each event of the SDK's stream is to us. Those of tools that we never ask for are ignored, as
# are those that repeat in whole what came in pieces, or tell of progress.
EVENTS = {
    "translated": """
        error response.completed response.failed response.function_call_arguments.delta
        response.incomplete response.output_item.added response.output_item.done
        response.output_text.annotation.added response.output_text.delta
        response.reasoning_summary_part.added response.reasoning_summary_text.delta
        response.reasoning_text.delta response.refusal.delta""",
    "whole what came in pieces": """
        response.content_part.done response.function_call_arguments.done response.output_text.done
        response.reasoning_summary_part.done response.reasoning_summary_text.done
        response.reasoning_text.done response.refusal.done""",
    "progress": """
        response.content_part.added response.created response.in_progress response.queued
        response.web_search_call.completed response.web_search_call.in_progress
        response.web_search_call.searching""",
    "of what is never asked for": """
        response.audio.delta response.audio.done response.audio.transcript.delta
        response.audio.transcript.done response.code_interpreter_call.completed
        response.code_interpreter_call.in_progress response.code_interpreter_call.interpreting
        response.code_interpreter_call_code.delta response.code_interpreter_call_code.done
        response.compaction.compacting response.custom_tool_call_input.delta
        response.custom_tool_call_input.done response.file_search_call.completed
        response.file_search_call.in_progress response.file_search_call.searching
        response.image_generation_call.completed response.image_generation_call.generating
        response.image_generation_call.in_progress response.image_generation_call.partial_image
        response.mcp_call.completed response.mcp_call.failed response.mcp_call.in_progress
        response.mcp_call_arguments.delta response.mcp_call_arguments.done
        response.mcp_list_tools.completed response.mcp_list_tools.failed
        response.mcp_list_tools.in_progress response.shell_call_command.added
        response.shell_call_command.delta response.shell_call_command.done
        response.shell_call_output_content.delta response.shell_call_output_content.done""",
}
ASK_REASONS: Json = {**ASK, "model": f"openai/{REASONS}"}


class OverResponses:
    """Over an upstream whose models are to be had by Responses alone."""

    @pytest.fixture
    def upstream(self) -> Iterator[ScriptedResponses]:
        with ScriptedResponses() as server:
            yield server
            server.shutdown()
        assert server.refusals == [], "the gateway sent what OpenAI refuses"


class TestResponses(OverResponses):
    """With `dialect` set, so that no request goes anywhere else."""

    @pytest.fixture
    def configuration(self, upstream, tmp_path) -> Iterator[list[str]]:
        yield [written_config(tmp_path, "openai", upstream, dialect="responses")]
        assert upstream.knocks == []

    def test_claude_code_keeps_its_chain_of_thought_through_ten_turns(self, gateway, upstream):
        image = gateway.project / "red.png"
        image.write_bytes(png(4, 4, b"\xff\x00\x00"))
        steps = [[("Bash", {"command": f"echo {n}-done"})] for n in range(9)]
        steps[3] += [("Bash", {"command": "echo also"})]
        steps[5] = [("Read", {"file_path": str(image)})]
        script = [
            Response(f"Step {n}." if n % 3 else "", hidden=n % 4 == 1, calls=calls,
                     reasoning="" if n % 4 == 1 else f"Hm {n}.\n\nSo.")
            for n, calls in enumerate(steps)
        ]
        upstream.script = {"Ten": [*script, Response("All done.", reasoning="Finished.")]}
        assert gateway.ask_of(REASONS, "Ten", "--allowedTools", "Bash")["result"] == "All done."
        assert len(upstream.requests) == 10
        for turn, body in enumerate(upstream.requests):
            thoughts = [item for item in body["input"] if item.get("type") == "reasoning"]
            given = [one for one in upstream.given if one.startswith("rs_")]
            assert [one["id"] for one in thoughts] == given[:turn]
            assert body["stream"] is True and body["reasoning"]["summary"] == "auto"
        shown = [bool(one["summary"]) for one in thoughts]
        assert shown == [n % 4 != 1 for n in range(9)]
        outputs = [i["output"] for i in body["input"] if i.get("type") == "function_call_output"]
        assert outputs[:5] == ["0-done", "1-done", "2-done", "3-done", "also"]
        (picture,) = [part for part in outputs[6] if part["type"] == "input_image"]
        assert base64.b64decode(picture["image_url"].split(",", 1)[1]) == image.read_bytes()
        keys = {body["prompt_cache_key"] for body in upstream.requests}
        assert len(keys) == 1

    def test_claude_code_searches_the_web(self, gateway, upstream):
        found = Response("It rains.", reasoning="I look.", search="Oslo weather", sources=SOURCES)
        upstream.script = {
            "Perform a web search": [found],
            "How is it": [Response(calls=[("WebSearch", {"query": "Oslo weather"})], hidden=True),
                          Response("Wet.")],
        }
        asked = gateway.ask_of(REASONS, "How is it in Oslo?", "--allowedTools", "WebSearch")
        assert asked["result"] == "Wet."
        (searching,) = upstream.seen("Perform a web search")
        assert searching["tools"] == [{"type": "web_search"}]
        (output,) = [item["output"] for item in upstream.requests[-1]["input"]
                     if item.get("type") == "function_call_output"]
        assert "It rains." in output and all(url in output for url in SOURCES)
        assert [one["webSearchRequests"] for one in asked["modelUsage"].values()] == [1]

    @pytest.mark.parametrize("streams", [False, True])
    def test_the_sdk_gets_results_and_citations(self, sdk, upstream, streams):
        found = Response("It rains.", reasoning="I look.", search="Oslo weather", sources=SOURCES)
        upstream.script = {"Hello": [found], "And": [Response("Snow.")]}
        message = answer(sdk, streams, **ASK_REASONS, tools=[SEARCH])
        thinking, use, results, opening, opened, text = message.content
        assert (use.type, use.input) == ("server_tool_use", {"query": "Oslo weather"})
        assert results.tool_use_id == use.id
        assert [one.url for one in results.content] == SOURCES
        assert opening.input == {"query": SOURCES[0]} and opened.tool_use_id == opening.id
        assert [citation.url for citation in text.citations] == SOURCES[:1]
        assert message.usage.server_tool_use.web_search_requests == 1
        turns = [USER, {"role": "assistant", "content": message.content},
                 {"role": "user", "content": "And Bergen?"}]
        again = answer(sdk, streams, **{**ASK_REASONS, "messages": turns}, tools=[SEARCH])
        assert again.content[0].text == "Snow."
        sent = upstream.requests[-1]
        assert [item.get("type", item.get("role")) for item in sent["input"]] == [
            "user", "reasoning", "web_search_call", "web_search_call", "message", "user"]
        assert sent["max_tool_calls"] == 3

    def test_structured_output_parses(self, sdk, upstream):
        upstream.script = {"Hello": [Response('{"name": "Oslo", "people": 700000}', hidden=True)]}
        message = sdk.messages.parse(**ASK_REASONS, output_format=City)
        assert message.parsed_output == City(name="Oslo", people=700000)
        assert upstream.requests[0]["text"]["format"]["strict"] is True

    @pytest.mark.parametrize("streams", [False, True])
    def test_stop_sequences_end_the_text(self, sdk, upstream, streams):
        upstream.script = {"Hello": [Response("One, two, three, four.", reasoning="Count.")]}
        message = answer(sdk, streams, **ASK_REASONS, stop_sequences=["three"])
        assert message.content[-1].text == "One, two, "
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "three")

    @pytest.mark.parametrize("streams", [False, True])
    def test_without_verification_it_thinks_unseen(self, sdk, upstream, streams):
        upstream.verified = False
        upstream.script = {"Hello": [Response("Good day.", reasoning="Hm.")]}
        for _ in range(2):
            hidden, text = answer(sdk, streams, **ASK_REASONS).content
            assert (hidden.type, text.text) == ("redacted_thinking", "Good day.")
        first, *rest = [body["reasoning"] for body in upstream.requests]
        assert "summary" in first and len(rest) == 2 and all("summary" not in one for one in rest)

    @pytest.mark.parametrize("streams", [False, True])
    @pytest.mark.parametrize(("reply", "stop_reason"), [
        (Response("Half of", ends="max_output_tokens"), "max_tokens"),
        (Response("Half of", ends="content_filter"), "refusal"),
        (Response(refusal="I can't help with that."), "refusal"),
        (Response(calls=[("weather", {"city": "Oslo"})]), "tool_use"),
        (Response("Whole."), "end_turn"),
    ])
    def test_it_ends_as_it_ended(self, sdk, upstream, reply, stop_reason, streams):
        upstream.script = {"Hello": [reply]}
        message = answer(sdk, streams, **ASK_REASONS, tools=[WEATHER])
        assert message.stop_reason == stop_reason
        told = "".join(block.text for block in message.content if block.type == "text")
        assert told == reply.text + reply.refusal

    @pytest.mark.parametrize(("ends", "expected"), [
        ("failed server_error", anthropic.InternalServerError),
        ("failed rate_limit_exceeded", anthropic.RateLimitError),
        ("failed invalid_prompt", anthropic.BadRequestError),
        ("failed image_too_large", anthropic.BadRequestError),
        ("failed bio_policy", anthropic.BadRequestError),
        ("error server_error", anthropic.InternalServerError),
        ("error insufficient_quota", anthropic.RateLimitError),
        ("error rate_limit_exceeded", anthropic.RateLimitError),
    ])
    def test_a_failure_in_the_stream_is_told_by_its_class(self, sdk, upstream, ends, expected):
        upstream.script = {"Hello": [Response(ends=ends)]}
        with pytest.raises(expected, match=f"It failed: {ends.split()[1]}."):
            answer(sdk, True, **ASK_REASONS)
        upstream.script = {"Hello": [Response("A beginning", ends=ends)]}
        with pytest.raises(anthropic.APIStatusError, match="It failed"):
            answer(sdk, True, **ASK_REASONS)

    @pytest.mark.parametrize("streams", [False, True])
    def test_a_prompt_that_is_too_long_is_told_so_that_claude_code_compacts(
        self, sdk, upstream, streams
    ):
        words = "Your input exceeds the context window of this model. Please adjust your input " \
                "and try again."
        upstream.script = {"Hello": [Response(words, status=400)],
                           "Good": [Response(ends="error context_length_exceeded")]}
        evening = {**ASK_REASONS, "messages": [{"role": "user", "content": "Good evening"}]}
        for ask in (ASK_REASONS, evening) if streams else (ASK_REASONS,):
            with pytest.raises(anthropic.BadRequestError, match="prompt is too long: "):
                answer(sdk, streams, **ask)

    def test_every_kind_of_block_is_taken(self, sdk, upstream):
        data = {"type": "base64", "media_type": "image/png",
                "data": base64.b64encode(png(1, 1, b"123")).decode()}
        page = {**data, "media_type": "application/pdf",
                "data": base64.b64encode(pdf("a page")).decode()}
        documents = [{"type": "document", "source": source, "title": "a"} for source in (
            page, {"type": "text", "media_type": "text/plain", "data": "MARK-text"},
            {"type": "content", "content": [{"type": "text", "text": "MARK-content"}]})]
        found = {"type": "search_result", "source": "s", "title": "MARK-title",
                 "content": [{"type": "text", "text": "MARK-found"}]}
        use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "MARK-é"}}
        inside = [{"type": "text", "text": "MARK-result"}, {"type": "image", "source": data},
                  documents[0], {"type": "tool_reference", "tool_name": "MARK-tool"}]
        turns: list[Json] = [
            {"role": "user", "content": [{"type": "image", "source": data}, *documents, found]},
            {"role": "system", "content": "MARK-system"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "foreign", "signature": "of another"},
                {"type": "redacted_thinking", "data": "of another"},
                {"type": "text", "text": "MARK-said"},
                {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search",
                 "input": {"query": "MARK-query"}},
                {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [
                    {"type": "web_search_result", "url": "https://a.test/MARK-url", "title": "t",
                     "encrypted_content": "x"}]},
                use, {**use, "id": "toolu_2"}, {**use, "id": "toolu_3"}]},
            {"role": "system", "content": [{"type": "text", "text": "MARK-between"}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True,
                 "content": "MARK-error"},
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": inside},
                {"type": "tool_result", "tool_use_id": "toolu_9", "content": "MARK-orphan"},
                {"type": "text", "text": ""}, {"type": "text", "text": "Hello"}]},
        ]
        tools = [{"name": "no.schema at all", "input_schema": {}}, WEATHER, SEARCH,
                 {"type": "bash_20250124", "name": "bash"}]
        upstream.script = {"Hello": [Response("Taken.")]}
        taken = answer(sdk, True, **{**ASK_REASONS, "messages": turns}, tools=tools,
                       system=[{"type": "text", "text": "MARK-head"}])
        assert taken.content[0].text == "Taken."
        (body,) = upstream.requests
        sent = json.dumps(body, ensure_ascii=False)  # as the model sees it, so without escapes
        for mark in set(re.findall(r"MARK-[\wé]+", json.dumps(turns, ensure_ascii=False))):
            assert mark in sent, mark
        assert "MARK-head" in body["instructions"] and "bash" in body["instructions"]

    def test_two_messages_stay_two(self, sdk, upstream):
        upstream.script = {"Hello": [Response("I look at it first.", more="It is red.")]}
        for streams in (True, False):
            texts = [block.text for block in answer(sdk, streams, **ASK_REASONS).content]
            assert texts == ["I look at it first.", "It is red."]

    def test_a_model_that_does_not_reason_is_not_asked_to_for_long(self, sdk, upstream):
        upstream.script = {"Hello": [Response("Good day.")]}
        ask: Json = {**ASK_REASONS, "model": f"openai/{PLAIN}",
                     "thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2048}
        for _ in range(2):
            assert answer(sdk, True, **ask).content[0].text == "Good day."
        assert upstream.refusals == ["Encrypted content is not supported with this model."]
        upstream.refusals.clear()

    def test_nothing_that_it_sends_is_too_long(self, sdk, upstream):
        names = [f"{'very' * 20}_long.name-{n}" for n in range(2)]
        upstream.script = {"Hello": [Response("Good day.")]}
        tools = [{**WEATHER, "name": name} for name in names]
        uses = [{"type": "tool_use", "id": "0123456789" * 7 + str(n), "name": name, "input": {}}
                for n, name in enumerate(names)]
        results = [{"type": "tool_result", "tool_use_id": use["id"], "content": "x"}
                   for use in uses]
        turns = [USER, {"role": "assistant", "content": uses}, {"role": "user", "content": results}]
        ask: Json = {**ASK_REASONS, "messages": turns, "max_tokens": 1,
                     "metadata": {"user_id": "u" * 200}}
        answer(sdk, True, **ask, tools=tools)
        sent = upstream.requests[-1]
        assert len({item["call_id"] for item in sent["input"] if "call_id" in item}) == 2
        assert len({tool["name"] for tool in sent["tools"]}) == 2

    def test_what_was_cut_off_in_thought_is_not_sent_back_alone(self, sdk, upstream):
        upstream.script = {"Hello": [Response(reasoning="Long.", ends="max_output_tokens")],
                           "Go on": [Response("Good day.")]}
        message = answer(sdk, True, **ASK_REASONS)
        assert [block.type for block in message.content] == ["thinking"]
        turns = [USER, {"role": "assistant", "content": message.content},
                 {"role": "user", "content": "Go on"}]
        (text,) = answer(sdk, True, **{**ASK_REASONS, "messages": turns}).content
        assert text.text == "Good day."

    def test_reasoning_that_is_refused_is_left_out(self, sdk, upstream):
        upstream.script = {"Hello": [Response("Hi.", reasoning="Hm.")], "Now": [Response("Bye.")]}
        message = answer(sdk, True, **ASK_REASONS)
        upstream.given.clear()  # another organisation's key, say
        turns = [USER, {"role": "assistant", "content": message.content},
                 {"role": "user", "content": "Now?"}]
        assert answer(sdk, True, **{**ASK_REASONS, "messages": turns}).content[0].text == "Bye."
        (refusal,) = upstream.refusals
        assert "not found" in refusal
        upstream.refusals.clear()
        upstream.script = {"Hello": [Response("Hi.", reasoning="Hm.")], "Now": [Response("Bye.")]}
        message = answer(sdk, True, **ASK_REASONS)
        turns[1] = {"role": "assistant", "content": message.content}
        answer(sdk, True, **{**ASK_REASONS, "messages": turns})
        assert [item for item in upstream.requests[-1]["input"]
                if item.get("type") == "reasoning"], "one conversation's habit isn't the model's"


class TestWhichDialect(OverResponses):
    """With nothing configured: this host isn't OpenAI's, so chat comes first."""

    @pytest.mark.parametrize("moved", [
        (404, scripted_responses.MOVED),
        (404, "This is not a chat model and thus not supported in the v1/chat/completions endpoint."
              " Did you mean to use v1/completions?"),
        (400, "Function tools with reasoning_effort are not supported for gpt-6-scripted in "
              "/v1/chat/completions. To use function tools, use /v1/responses or set "
              "reasoning_effort to 'none'."),
        (400, "Function tools with reasoning_effort are not supported for gpt-6-scripted in "
              "/v1/chat/completions. Please use /v1/responses instead."),
    ])
    def test_claude_code_is_switched_once(self, gateway, upstream, moved):
        upstream.moved = moved
        calls = [("Bash", {"command": "echo found"})]
        upstream.script = {"Look": [Response(reasoning="Hm.", calls=calls), Response("Here.")]}
        for _ in range(2):
            asked = gateway.ask_of(REASONS, "Look", "--allowedTools", "Bash")
            assert asked["result"] == "Here."
        assert len(upstream.knocks) == 1 and len(upstream.requests) == 4


class TestWhatTheSdkKnows(OverResponses):
    """The openai SDK's types and the scripted upstream, compared with each other and with us."""

    def test_every_event_of_the_sdk_has_a_meaning_here(self, sdk, upstream):
        known = {what: names.split() for what, names in EVENTS.items()}
        assert sorted(sum(known.values(), [])) == sorted(scripted_responses.EVENT_TYPES)
        upstream.noise = [name for what in known if what != "translated" for name in known[what]]
        upstream.script = {"Hello": [Response("Good day.", reasoning="Hm.")]}
        thinking, text = answer(sdk, True, **ASK_REASONS).content
        assert (thinking.thinking, text.text) == ("Hm.", "Good day.")
        upstream.noise = ["response.reasoning_text.delta"]  # of open models
        thinking, text, more = answer(sdk, True, **ASK_REASONS).content
        assert more.thinking == "NOISE"

    def test_the_upstream_is_as_strict_as_openai(self, upstream):
        client = openai.OpenAI(base_url=upstream.url, api_key=KEY, max_retries=0)
        good: Json = {"model": REASONS, "store": False, "include": [scripted_responses.ENCRYPTED]}
        upstream.script = {"Hello": [Response("Hi.", reasoning="Hm.\n\nSo.", search="q",
                                              sources=SOURCES, calls=[("f", {"x": 1})])]}
        with client.responses.stream(**good, input=[USER]) as stream:
            response = stream.get_final_response()
        kinds = ["reasoning", "web_search_call", "web_search_call", "message", "function_call"]
        assert [item.type for item in response.output] == kinds
        assert client.responses.create(**good, input=[USER]).output_text == "Hi."
        thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        result = {"type": "function_call_output", "call_id": "c", "output": "x"}
        tool = {"type": "function", "name": "f", "strict": False, "parameters": {"type": "object"}}
        said = {"role": "assistant", "content": "Hi."}
        client.responses.create(**good, input=[USER, said, call, result], tools=[tool])
        mine, searched = (item.to_dict() for item in response.output[:2])
        client.responses.create(**good, input=[USER, mine, searched])
        for bad in (
            {"extra_body": {"stop": ["x"]}}, {"extra_body": {"max_tokens": 5}},
            {"store": True}, {"previous_response_id": "resp_1"}, {"include": ["reasoning.all"]},
            {"max_output_tokens": 15}, {"temperature": 0.5}, {"prompt_cache_key": "x" * 65},
            {"safety_identifier": "x" * 65}, {"tool_choice": "auto"},
            {"model": PLAIN, "include": [scripted_responses.ENCRYPTED]},
            {"model": PLAIN, "include": [], "reasoning": {"effort": "low"}},
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            {"tools": [{**tool, "name": "x" * 65}]}, {"tools": [tool, tool]},
            {"tools": [{**tool, "parameters": {}}]}, {"tools": [{**tool, "function": {}}]},
            {"tools": [{**tool, "strict": True}]},
            {"tools": [tool], "tool_choice": {"type": "function", "name": "g"}},
            {"input": [{"role": "robot", "content": "x"}]}, {"input": [{**USER, "content": []}]},
            {"input": [{**USER, "cache_control": {}}]}, {"input": [USER, call]},
            {"input": [USER, result]}, {"input": [USER, {**call, "name": "a.b"}, result]},
            {"input": [USER, {**call, "arguments": "{"}, result]}, {"input": [USER, thought, said]},
            {"input": [USER, mine]}, {"input": [USER, mine, said]},
            {"input": [USER, {**searched, "id": "ws_1"}]},
            {"input": [USER, {**mine, "id": searched["id"]}, said]},
            {"input": [USER, {**mine, "encrypted_content": "gAAA_of_another"}, said]},
            {"input": [{"role": "assistant", "content": [{"type": "input_text", "text": "x"}]}]},
            {"input": [{"role": "user", "content": [{"type": "input_image", "detail": "auto",
                                                     "image_url": "data:image/tiff;base64,AA"}]}]},
        ):
            before = len(upstream.refusals)
            with pytest.raises(openai.BadRequestError):
                client.responses.create(**{**good, "input": [USER], **bad})
            assert len(upstream.refusals) == before + 1, bad
        upstream.refusals.clear()
