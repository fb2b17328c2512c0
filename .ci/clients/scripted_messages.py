"""A server of Anthropic's Messages that answers by a script and refuses what Anthropic refuses.

Which blocks there are, and what a history must look like, is from Anthropic's API reference; the
words of the refusals are Anthropic's own.
"""

import json
from collections.abc import Iterator
from typing import Any, Optional

from scripted_upstream import (
    KEY,
    Json,
    Reply,
    ScriptedUpstream,
    UpstreamHandler,
    named_event,
    need,
    pieces,
)

CLAUDE = "claude-scripted-9"
SIGNATURE = "c2lnbmVk"
COUNTED = 4321
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
               413: "request_too_large", 429: "rate_limit_error", 529: "overloaded_error"}


# ======== What it says ======================================================================


def message_events(reply: Reply, body: Json, turn: int) -> Iterator[Json]:
    """The events of an answer; what has a cache breakpoint counts as read from the cache."""
    cached = 1000 if "cache_control" in json.dumps(body) else 0
    usage = {"input_tokens": 234, "output_tokens": 1, "cache_read_input_tokens": cached,
             "cache_creation_input_tokens": 0}
    yield {"type": "message_start", "message": {
        "id": f"msg_scripted_{turn}", "type": "message", "role": "assistant", "content": [],
        "model": body["model"], "stop_reason": None, "stop_sequence": None, "usage": usage}}
    for index, (start, deltas) in enumerate(blocks_of(reply, turn)):
        yield {"type": "content_block_start", "index": index, "content_block": start}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    stop = reply.finish or ("tool_use" if reply.calls else "end_turn")
    yield {"type": "message_delta", "usage": {"output_tokens": 56},
           "delta": {"stop_reason": stop, "stop_sequence": None}}
    yield {"type": "message_stop"}


def blocks_of(reply: Reply, turn: int) -> Iterator[tuple[Json, list[Json]]]:
    """Each block as it begins, and what is added to it."""
    if reply.reasoning:
        thought = [{"type": "thinking_delta", "thinking": piece}
                   for piece in pieces(reply.reasoning)]
        yield ({"type": "thinking", "thinking": "", "signature": ""},
               [*thought, {"type": "signature_delta", "signature": SIGNATURE}])
    if reply.text:
        yield ({"type": "text", "text": ""},
               [{"type": "text_delta", "text": piece} for piece in pieces(reply.text)])
    for place, (name, value) in enumerate(reply.calls):
        yield ({"type": "tool_use", "id": f"toolu_{turn}_{place}", "name": name, "input": {}},
               [{"type": "input_json_delta", "partial_json": piece}
                for piece in pieces(json.dumps(value))])


def whole_message(events: list[Json]) -> Json:
    """The message that the events amount to."""
    message, blocks = dict(events[0]["message"]), []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            block, (_, (field, piece)) = blocks[-1], event["delta"].items()
            block[field] = block.get(field, "") + piece
        elif event["type"] == "message_delta":
            message.update(event["delta"])
            message["usage"] = {**message["usage"], **event["usage"]}
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("partial_json"))
    return {**message, "content": blocks}


# ======== What it refuses ===================================================================

BLOCKS = {
    "user": {"text", "image", "document", "search_result", "tool_result"},
    "assistant": {"text", "thinking", "redacted_thinking", "tool_use"},
    "system": {"text"},
}


def check_messages(body: Json) -> None:
    """Raise ValueError for what Anthropic answers with a 400."""
    need(isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 0,
         "max_tokens: Field required")
    names = [tool["name"] for tool in body.get("tools", ())]
    need(len(set(names)) == len(names), "tools: Tool names must be unique.")
    need(names or "tool_choice" not in body, "tool_choice may only be specified with tools")
    need(body["messages"] and body["messages"][0]["role"] == "user",
         "messages: first message must use the \"user\" role")
    waiting: set[str] = set()
    for at, message in enumerate(body["messages"]):
        where = f"messages.{at}"
        need(message["role"] in BLOCKS, f"{where}: Unexpected role {message['role']!r}")
        blocks = content_of(message)
        for block in blocks:
            need(block["type"] in BLOCKS[message["role"]], f"{where}: unexpected {block['type']!r}")
            need(block.get("text", "x"), f"{where}: text content blocks must be non-empty")
            need(block["type"] != "thinking" or block["signature"] == SIGNATURE,
                 f"{where}: Invalid `signature` in `thinking` block")
        results = {block["tool_use_id"] for block in blocks if block["type"] == "tool_result"}
        need(results == waiting, f"{where}: `tool_use` ids were found without `tool_result` blocks "
             f"immediately after, or the other way round: {results ^ waiting}")
        waiting = {block["id"] for block in blocks if block["type"] == "tool_use"}
    need(not waiting, f"`tool_use` ids were found without `tool_result` blocks: {waiting}")


def content_of(message: Json) -> list[Json]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


# ======== The server ========================================================================


class ScriptedMessages(ScriptedUpstream):
    """A server of Messages; `betas` are those that each request named in its header."""

    def __init__(self) -> None:
        super().__init__(MessagesHandler)
        self.models = [CLAUDE]
        self.betas: list[list[str]] = []


class MessagesHandler(UpstreamHandler):
    server: ScriptedMessages

    def do_GET(self) -> None:  # noqa: N802
        if self.path.partition("?")[0] != "/v1/models":
            return self.refuse(404, f"Not found: {self.path}")
        models = [{"type": "model", "id": name, "display_name": name,
                   "created_at": "2026-01-01T00:00:00Z"} for name in self.server.models]
        return self.answer(200, {"data": models, "has_more": False, "first_id": models[0]["id"],
                                 "last_id": models[-1]["id"]})

    def answer_post(self, body: Json) -> None:
        path = self.path.partition("?")[0]
        if self.headers["x-api-key"] != KEY:
            return self.refuse(401, "invalid x-api-key")
        if not self.headers["anthropic-version"]:
            return self.refuse(400, "anthropic-version: header is required")
        if path == "/v1/messages/count_tokens":
            return self.answer(200, {"input_tokens": COUNTED})
        if path != "/v1/messages":
            return self.refuse(404, f"Not found: {path}")
        return self.send_message(body)

    def send_message(self, body: Json) -> None:
        if body.get("model") not in self.server.models:
            return self.refuse(404, f"model: {body.get('model')}")
        self.server.requests.append(body)
        self.server.betas.append((self.headers["anthropic-beta"] or "").split(","))
        if self.is_unwanted(body, body["messages"]):
            return None
        if "thread" in body:  # in these words the SDKs know that they must send the whole history
            details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
            return self.refuse(400, "thread: not supported", details=details)
        try:
            check_messages(body)
        except ValueError as error:
            self.server.refusals.append(str(error))
            return self.refuse(400, str(error))
        reply = self.server.reply(body["messages"])
        if reply.status != 200:
            return self.refuse(reply.status, reply.text)
        events = list(message_events(reply, body, len(body["messages"])))
        if not body.get("stream"):
            return self.hang_up() if reply.dies else self.answer(200, whole_message(events))
        return self.send_stream(reply, list(map(named_event, events)))

    def refuse(self, status: int, message: str, param: Optional[str] = None, **more: Any) -> None:
        usual = "api_error" if status >= 500 else "invalid_request_error"
        inner = {"type": ERROR_TYPES.get(status, usual), "message": message, **more}
        self.answer(status, {"type": "error", "error": inner, "request_id": "req_scripted"})
