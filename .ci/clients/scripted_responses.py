"""OpenAI's Responses API, answering by a script, as strict as the real one.

What a request may look like is taken from the `openai` SDK's own types, closed against fields they
don't have; every event it streams is read by the SDK's types before it is sent. Encrypted reasoning
is remembered, so that one that comes back changed, elsewhere or under another id is refused.
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pydantic
from openai.types.responses import ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming
from scripted_upstream import (
    IMAGE,
    NAME,
    PARAMETERS,
    PDF,
    Json,
    Reply,
    ScriptedUpstream,
    UpstreamHandler,
    fit,
    named_event,
    need,
    pieces,
    text_of,
)

REASONS, PLAIN = "gpt-6-scripted", "gpt-4.1-scripted"
MOVED = "This model is only supported in v1/responses and not in v1/chat/completions."
UNVERIFIED = "Your organization must be verified to generate reasoning summaries. Please go to: " \
             "https://platform.openai.com/settings/organization/general and click on Verify " \
             "Organization. If you just verified, it can take up to 15 minutes for access to " \
             "propagate."
ENCRYPTED, SOURCES = "reasoning.encrypted_content", "web_search_call.action.sources"
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
EVENT_TYPES = frozenset(
    name for one in EVENT.json_schema()["$defs"].values()
    for name in [one.get("properties", {}).get("type", {}).get("const", "")]
    if "sequence_number" in one.get("properties", {})
)


# ======== What it says ======================================================================


@dataclass
class Response(Reply):
    """One turn: reasoning (a paragraph is a summary part), a search, texts, calls, so ordered."""

    hidden: bool = False  # it thinks, but has no summary to show
    search: str = ""  # what it looks for
    sources: list[str] = field(default_factory=list)  # the URLs it finds; it cites the first
    more: str = ""  # a second message right after the first
    refusal: str = ""
    ends: str = "completed"  # or a reason to be incomplete, or "failed CODE", or "error CODE"

    def items(self, body: Json) -> Iterator[Json]:
        """The response's output items, with what the request asked to see of them."""
        included = body.get("include", ())
        if self.reasoning or self.hidden:
            shown = self.reasoning and body.get("reasoning", {}).get("summary")
            texts = self.reasoning.split("\n\n") if shown else []
            yield {"type": "reasoning", "id": made_id("rs"),
                   "encrypted_content": made_id("gAAA") if ENCRYPTED in included else None,
                   "summary": [{"type": "summary_text", "text": text} for text in texts]}
        if self.search:
            found = [{"type": "url", "url": url} for url in self.sources]
            action = {"type": "search", "query": self.search, "queries": [self.search]}
            yield {"type": "web_search_call", "id": made_id("ws"), "status": "completed",
                   "action": {**action, **({"sources": found} if SOURCES in included else {})}}
            yield {"type": "web_search_call", "id": made_id("ws"), "status": "completed",
                   "action": {"type": "open_page", "url": self.sources[0]}}
        for text in filter(None, (self.text, self.more)):
            cited = [{"type": "url_citation", "url": url, "title": f"Title of {url}",
                      "start_index": 0, "end_index": len(text)} for url in self.sources[:1]]
            yield message({"type": "output_text", "text": text, "annotations": cited,
                           "logprobs": []})
        if self.refusal:
            yield message({"type": "refusal", "refusal": self.refusal})
        for name, arguments in self.calls:
            yield {"type": "function_call", "id": made_id("fc"), "call_id": made_id("call"),
                   "name": name, "arguments": json.dumps(arguments), "status": "completed"}


def made_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def message(part: Json) -> Json:
    return {"type": "message", "id": made_id("msg"), "role": "assistant", "status": "completed",
            "content": [part]}


USAGE = {
    "input_tokens": 1234, "output_tokens": 56, "total_tokens": 1290,
    "input_tokens_details": {"cached_tokens": 1000, "cache_write_tokens": 0},
    "output_tokens_details": {"reasoning_tokens": 20},
}


def whole(body: Json, output: list[Json], ends: str) -> Json:
    """The response object at its end."""
    done, code = ends == "completed", ends.partition(" ")[2]
    failed = {"code": code, "message": f"It failed: {code}."} if code else None
    return {
        "id": "resp_1", "object": "response", "created_at": 1, "model": body["model"],
        "status": "completed" if done else "failed" if code else "incomplete", "error": failed,
        "incomplete_details": None if done or code else {"reason": ends}, "output": output,
        "instructions": None, "metadata": {}, "parallel_tool_calls": True, "temperature": 1.0,
        "top_p": 1.0, "tool_choice": "auto", "tools": [], "usage": USAGE,
    }


def stream_events(body: Json, output: list[Json], ends: str) -> Iterator[Json]:
    """The events of a streamed response, each valid for the SDK, numbered."""
    begun = {**whole(body, [], "completed"), "status": "in_progress", "usage": None}
    steps: list[Json] = [{"type": f"response.{step}", "response": begun}
                         for step in ("created", "in_progress")]
    for index, item in enumerate(output):
        steps += ({**step, "output_index": index, "item_id": item["id"]}
                  for step in item_steps(item))
    kind, _, code = ends.partition(" ")
    if kind == "error":
        steps.append({"type": "error", "code": code, "message": f"It failed: {code}.",
                      "param": None})
    else:
        ending = kind if kind in ("completed", "failed") else "incomplete"
        steps.append({"type": f"response.{ending}", "response": whole(body, output, ends)})
    for number, step in enumerate(steps):
        event = {**step, "sequence_number": number}
        assert event["type"] in EVENT_TYPES
        EVENT.validate_python(event)
        yield event


def item_steps(item: Json) -> Iterator[Json]:
    """An item's own events between its beginning and its end."""
    empty = {"reasoning": {"summary": []}, "message": {"content": []},
             "function_call": {"arguments": ""}, "web_search_call": {"action": {"type": "search"}}}
    yield {"type": "response.output_item.added", "item": {
        **item, **empty[item["type"]], **({"status": "in_progress"} if "status" in item else {})}}
    if item["type"] == "reasoning":
        for index, part in enumerate(item["summary"]):
            head, at = "response.reasoning_summary", {"summary_index": index}
            begun = {"type": "summary_text", "text": ""}
            yield {"type": f"{head}_part.added", **at, "part": begun}
            yield from deltas(f"{head}_text", part["text"], at, "text")
            yield {"type": f"{head}_part.done", **at, "part": part}
    elif item["type"] == "message":
        (part,), at = item["content"], {"content_index": 0}
        name = "text" if "text" in part else "refusal"
        begun = {**part, name: "", **({"annotations": []} if name == "text" else {})}
        yield {"type": "response.content_part.added", **at, "part": begun}
        extra = {"logprobs": []} if name == "text" else {}
        yield from deltas(f"response.{part['type']}", part[name], {**at, **extra}, name)
        for place, one in enumerate(part.get("annotations", ())):
            yield {"type": "response.output_text.annotation.added", **at,
                   "annotation_index": place, "annotation": one}
        yield {"type": "response.content_part.done", **at, "part": part}
    elif item["type"] == "function_call":
        head = "response.function_call_arguments"
        *parts, done = deltas(head, item["arguments"], {}, "arguments")
        yield from [*parts, {**done, "name": item["name"]}]
    elif item["type"] == "web_search_call":
        for step in ("in_progress", "searching", "completed"):
            yield {"type": f"response.web_search_call.{step}"}
    yield {"type": "response.output_item.done", "item": item}


def deltas(head: str, text: str, at: Json, name: str) -> Iterator[Json]:
    """A text in pieces, padded against eavesdroppers as OpenAI pads them, and then whole."""
    for piece in pieces(text):
        yield {"type": f"{head}.delta", **at, "delta": piece, "obfuscation": "xYz"}
    yield {"type": f"{head}.done", **at, name: text}


# ======== What it refuses ===================================================================


def closed(schema: Any) -> Any:
    """A JSON schema whose objects take no fields but those it names."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(one) for name, one in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        made.setdefault("additionalProperties", False)
    return made


REQUEST: Json = closed(pydantic.TypeAdapter(ResponseCreateParamsStreaming).json_schema())
TYPES: Json = REQUEST.pop("$defs")
ITEMS = {
    "message": "EasyInputMessageParam", "said": "ResponseOutputMessageParam",
    "reasoning": "ResponseReasoningItemParam",
    "function_call": "ResponseFunctionToolCallParam", "function_call_output": "FunctionCallOutput",
    "web_search_call": "ResponseFunctionWebSearchParam",
}
TOOLS = {"function": "FunctionToolParam", "web_search": "WebSearchToolParam"}
FIELDS = {
    "model", "input", "instructions", "tools", "tool_choice", "parallel_tool_calls", "reasoning",
    "max_output_tokens", "max_tool_calls", "include", "store", "prompt_cache_key", "text", "stream",
    "temperature", "top_p", "safety_identifier",
}


def typed(value: Any, name: str, where: str) -> None:
    """Raise ValueError unless the SDK's type of that name can hold the value."""
    fit(value, {"$ref": f"#/$defs/{name}", "$defs": TYPES}, where)


def check_response(body: Json, seen: dict[str, Json]) -> None:
    """Raise ValueError for what api.openai.com answers with a 400. `seen` holds the items that it
    gave out: id -> the item and what followed it."""
    for name in body:
        need(name in FIELDS, f"Unknown parameter: '{name}'.")
    rest = {"stream": True, **body, "input": "", "tools": []}  # these two are looked at below
    fit(rest, {**REQUEST, "$defs": TYPES}, "request")
    reasons = body["model"] == REASONS
    for name in ("temperature", "top_p") if reasons else ("reasoning",):
        need(name not in body, f"Unsupported parameter: '{name}' is not supported with this model.")
    need(reasons or ENCRYPTED not in body.get("include", ()),
         "Encrypted content is not supported with this model.")
    need(body.get("store") is False, "ogx.py stores nothing: 'store' must be false")
    need(16 <= body.get("max_output_tokens", 16) <= 128_000, "Invalid 'max_output_tokens': integer "
         "below minimum value. Expected a value >= 16.")
    for name in ("prompt_cache_key", "safety_identifier"):
        need(len(body.get(name, "")) <= 64, f"Invalid '{name}': string too long.")
    check_tools(body)
    answer = body.get("text", {}).get("format", {"name": "x"})
    fit(answer["name"], NAME, "text.format.name")
    need(not answer.get("strict") or is_strict(answer["schema"]), "Invalid schema for "
         "response_format 'answer': 'additionalProperties' is required to be supplied and to be "
         "false.")
    check_items(body["input"], seen)


def check_tools(body: Json) -> None:
    tools, choice = body.get("tools", []), body.get("tool_choice", "auto")
    need(len(tools) <= 128, "Invalid 'tools': array too long. Expected an array with maximum "
         f"length 128, but got an array with length {len(tools)} instead.")
    for at, tool in enumerate(tools):
        need(tool.get("type") in TOOLS, f"Invalid value: '{tool.get('type')}' at tools[{at}].")
        typed(tool, TOOLS[tool["type"]], f"tools[{at}]")
        if tool["type"] == "function":
            fit(tool["name"], NAME, f"tools[{at}].name")
            fit(tool["parameters"], PARAMETERS, f"tools[{at}].parameters")
            need(not tool["strict"] or is_strict(tool["parameters"]), f"Invalid schema at {at}.")
    names = [tool["name"] for tool in tools if "name" in tool]
    need(len(set(names)) == len(names), f"tool names must be unique: {names}")
    need(tools or not {"tool_choice", "parallel_tool_calls"} & set(body),
         "Tool choice 'auto' must be specified with 'tools' parameter.")
    if isinstance(choice, dict):
        need(choice.get("name") in names, f"Tool choice '{choice}' not found in 'tools' parameter.")
    searches = any(tool["type"] == "web_search" for tool in tools)
    need(searches or SOURCES not in body.get("include", ()), "Sources of a search that can't be.")


def is_strict(schema: Json) -> bool:
    inner = schema.get("properties", {})
    whole = schema.get("additionalProperties") is False and set(schema.get("required", ())) == set(
        inner)
    return (schema.get("type") != "object" or whole) and all(map(is_strict, inner.values()))


def check_items(items: list[Json], seen: dict[str, Json]) -> None:
    calls: dict[str, str] = {}
    ids = [item["id"] for item in items if "id" in item]
    need(len(ids) == len(set(ids)), "Duplicate item found. Remove duplicate items from your input.")
    for at, item in enumerate(items):
        kind, where = item.get("type", "message"), f"input[{at}]"
        need(kind in ITEMS, f"Invalid value: '{kind}' at {where}.")
        said = item.get("role") == "assistant" and isinstance(item.get("content"), list)
        typed(item, ITEMS["said" if said else kind], where)
        need(not said or item["id"].startswith("msg_"),
             f"Invalid '{where}.id': '{item.get('id')}'. Expected an ID that begins with 'msg'.")
        need(item.get("content", "x"), f"Invalid '{where}.content': empty.")
        inside = item.get("output") if kind == "function_call_output" else item.get("content")
        for part in inside if isinstance(inside, list) else ():
            check_part(part, where)
        if kind in ("reasoning", "web_search_call"):
            need(item["id"] in seen, f"Item with id '{item['id']}' not found. Items are not "
                 "persisted when `store` is set to false.")
        if kind == "reasoning":
            check_reasoning(item, items[at + 1] if at + 1 < len(items) else {}, seen)
        elif kind == "function_call":
            fit(item["name"], NAME, f"{where}.name")
            fit(json.loads(item["arguments"]), {"type": "object"}, f"{where}.arguments")
            need(len(item["call_id"]) <= 64, f"Invalid '{where}.call_id': string too long. "
                 "Expected a string with maximum length 64.")
            calls[item["call_id"]] = where
        elif kind == "function_call_output":
            need(item["call_id"] in calls, "No tool call found for function call output with "
                 f"call_id {item['call_id']}.")
            calls.pop(item["call_id"])
    need(not calls, f"No tool output found for function call {', '.join(calls)}.")


def check_part(part: Json, where: str) -> None:
    if part["type"] == "input_image":
        fit(part["image_url"], IMAGE, f"{where}.image_url")
    elif part["type"] == "input_file":
        fit(part["file_data"], PDF, f"{where}.file_data")
    else:
        need(part["text"], f"Invalid '{where}': empty text.")


def check_reasoning(item: Json, follower: Json, seen: dict[str, Json]) -> None:
    """Encrypted reasoning belongs to its id and stands before what it led to."""
    known = seen[item["id"]]
    need(known["item"].get("encrypted_content") == item.get("encrypted_content"), "The encrypted "
         f"content for item {item['id']} could not be verified. Reason: Encrypted content item_id "
         "did not match the target item id.")
    need(identity(follower) == identity(known["next"]) is not None, f"Item '{item['id']}' of type "
         "'reasoning' was provided without its required following item.")


def identity(item: Json) -> Any:
    """What an item is known by where it has no id: a call's id, a message's words."""
    words = text_of(item) or "".join(part.get("refusal", "") for part in item.get("content", ())
                                     if isinstance(part, dict))
    return item.get("call_id") or (words if item.get("role") == "assistant" else item.get("id"))


# ======== The server ========================================================================


class ScriptedResponses(ScriptedUpstream):
    """An OpenAI server whose models are to be had over Responses alone. `knocks` are the requests
    that came to Chat Completions, `moved` is how those are refused."""

    def __init__(self) -> None:
        super().__init__(ResponsesHandler)
        self.models = [REASONS, PLAIN]
        self.knocks: list[Json] = []
        self.moved = (404, MOVED)
        self.verified = True
        self.noise: list[str] = []  # types of events that it sends before the last one
        self.given: dict[str, Json] = {}

    def reply(self, messages: list[Json]) -> Response:
        found = super().reply(messages)
        return found if isinstance(found, Response) else Response(**vars(found))

    def seen(self, marker: str) -> list[Json]:
        return [body for body in self.requests if any(
            one["role"] == "user" and marker in text_of(one) for one in spoken(body)
        )]

    def remember(self, output: list[Json]) -> None:
        for item, follower in zip(output, [*output[1:], {}]):
            self.given[item["id"]] = {"item": item, "next": follower}


class ResponsesHandler(UpstreamHandler):
    server: ScriptedResponses

    def answer_post(self, body: Json) -> None:
        if self.path != "/v1/responses":
            self.server.knocks.append(body)
            return self.refuse(*self.server.moved)
        self.server.requests.append(body)
        if self.is_keyless():
            return None
        if body.get("model") not in self.server.models:
            return self.refuse(404, f"The model `{body.get('model')}` does not exist.")
        words = "" if self.server.verified else UNVERIFIED
        if words and body.get("reasoning", {}).get("summary"):
            return self.refuse(400, words)
        if self.is_unwanted(body, spoken(body)):
            return None
        try:
            check_response(body, self.server.given)
        except ValueError as error:
            self.server.refusals.append(str(error))
            about = "include" if str(error).startswith("Encrypted") else None
            return self.refuse(400, str(error), about)
        reply = self.server.reply(spoken(body))
        if reply.status != 200:
            return self.refuse(reply.status, reply.text)
        output = list(reply.items(body))
        self.server.remember(output)
        if body.get("stream"):
            *events, last = stream_events(body, output, reply.ends)
            said = dict.fromkeys(("delta", "text", "refusal", "arguments", "code"), "NOISE")
            noise = [{"type": name, "output_index": 0, **said} for name in self.server.noise]
            return self.send_stream(reply, [named_event(one) for one in (*events, *noise, last)])
        if reply.dies:
            return self.hang_up()
        return self.answer(200, whole(body, output, reply.ends))


def spoken(body: Json) -> list[Json]:
    """The input as messages; what the model said, called and thought in one go is one of them."""
    messages: list[Json] = []
    for item in body["input"]:
        by_model = item.get("role") == "assistant" or item.get("type") in (
            "reasoning", "function_call", "web_search_call")
        role = "assistant" if by_model else item.get("role", "tool")
        if not (messages and role == "assistant" == messages[-1]["role"]):
            messages.append({"role": role, "content": item.get("content") or ""})
    return messages
