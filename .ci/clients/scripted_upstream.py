"""An OpenAI server that answers by a script, refuses what OpenAI refuses and keeps every request.

Extend it by what a real client has to meet: fields of Reply for what a model says, `demand` for
what a server refuses, a subclass for another API. It needs the package jsonschema, which
.ci/clients-install installs beside the clients.
"""

import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Optional

import jsonschema

KEY = "test-key-1234"
MODELS = ["text-embedding-scripted", "scripted", "scripted-mini"]
FILLER = "Noted."  # the gateway's own word between a tool's result and an image
Json = dict[str, Any]


# ======== What it says ======================================================================


@dataclass
class Reply:
    """One turn of the scripted model, or an error status with a text."""

    text: str = ""
    reasoning: str = ""
    details: list[Json] = field(default_factory=list)  # of the reasoning, to be sent back
    signature: Json = field(default_factory=dict)  # on the first call, to be sent back
    calls: list[tuple[str, Json]] = field(default_factory=list)
    status: int = 200
    silence: float = 0  # seconds before it says anything
    dies: int = 0  # so many times the connection breaks halfway
    waits_for: Optional[threading.Event] = None  # set by the test once the first piece arrived
    finish: str = ""  # a reason to end that isn't OpenAI's
    fails: Json = field(default_factory=dict)  # this data ends its stream halfway, once

    def message(self, turn: int) -> Json:
        calls = [
            {"id": f"call_{turn}_{place}", "type": "function",
             "function": {"name": name, "arguments": json.dumps(arguments)}}
            for place, (name, arguments) in enumerate(self.calls)
        ]
        if self.signature:
            calls[0]["extra_content"] = self.signature
        return {"role": "assistant", "content": self.text or None,
                **({"reasoning_content": self.reasoning} if self.reasoning else {}),
                **({"reasoning_details": self.details} if self.details else {}),
                **({"tool_calls": calls} if calls else {})}

    def deltas(self, turn: int) -> Iterator[Json]:
        """The message in OpenAI's pieces: a call starts with id and name, its arguments dribble."""
        yield {"role": "assistant", "content": ""}
        yield from ({"reasoning_content": piece} for piece in pieces(self.reasoning))
        yield from ({"reasoning_details": [detail]} for detail in self.details)
        yield from ({"content": piece} for piece in pieces(self.text))
        for index, call in enumerate(self.message(turn).get("tool_calls", [])):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            start = {**call, "function": {"name": name, "arguments": ""}}
            more = ({"function": {"arguments": piece}} for piece in pieces(arguments))
            yield from ({"tool_calls": [{"index": index, **part}]} for part in [start, *more])

    @property
    def finish_reason(self) -> str:
        return self.finish or ("tool_calls" if self.calls else "stop")


def pieces(text: str) -> list[str]:
    return [text[at : at + 7] for at in range(0, len(text), 7)]


USAGE = {
    "prompt_tokens": 1234, "completion_tokens": 56, "total_tokens": 1290,
    "prompt_tokens_details": {"cached_tokens": 1000},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


# ======== What it refuses ===================================================================


def struct(required: str, **fields: Json) -> Json:
    """The JSON schema of an object with these fields and no others."""
    return {"type": "object", "required": required.split(), "properties": fields,
            "additionalProperties": False}


def listed(item: Json, most: int = 10_000) -> Json:
    return {"type": "array", "minItems": 1, "maxItems": most, "items": item}


def one_of(*words: str) -> Json:
    return {"enum": list(words)}


def pattern(text: str) -> Json:
    return {"type": "string", "pattern": text}


BOOL, STRING, WORDS = {"type": "boolean"}, {"type": "string"}, pattern(".")
NAME = pattern("^[a-zA-Z0-9_-]{1,64}$")
LIMIT = {"type": "integer", "minimum": 1, "maximum": 128_000}
FUNCTION = one_of("function")
TEXT = struct("type text", type=one_of("text"), text=STRING)
IMAGE = pattern("^(https?://|data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/])")
PDF = pattern("^data:application/pdf;base64,.")
FILE = struct("filename file_data", filename=WORDS, file_data=PDF)
PARTS = [
    TEXT,
    struct("type image_url", type=one_of("image_url"), image_url=struct("url", url=IMAGE)),
    struct("type file", type=one_of("file"), file=FILE),
]
TEXTS = {"anyOf": [STRING, listed(TEXT)]}
CALL = struct("id type function", id=pattern("^.{1,40}$"), type=FUNCTION, extra_content={},
              function=struct("name arguments", name=NAME, arguments=STRING))
SPEAKERS = {
    "system": struct("role content", role={}, content=TEXTS),
    "developer": struct("role content", role={}, content=TEXTS),
    "user": struct("role content", role={}, content={"anyOf": [STRING, listed({"anyOf": PARTS})]}),
    "tool": struct("role tool_call_id content", role={}, tool_call_id=STRING, content=TEXTS),
    "assistant": {"anyOf": [
        struct("role content", role={}, content=TEXTS, reasoning_details={}),
        struct("role tool_calls", role={}, content={"anyOf": [{"type": "null"}, TEXTS]},
               tool_calls=listed(CALL), reasoning_details={}),
    ]},
}
PARAMETERS = {"required": ["type"], "properties": {
    "type": {"const": "object"},
    **{word: False for word in ("oneOf", "anyOf", "allOf", "enum", "not")},
}}
TOOL = struct("type function", type=FUNCTION, function=struct(
    "name", name=NAME, description=STRING, parameters=PARAMETERS, strict=BOOL,
))
CHOICE = struct("type function", type=FUNCTION, function=struct("name", name=NAME))
ANSWER_SCHEMA = struct("name", name=NAME, schema={"type": "object"}, strict=BOOL)
CHAT = struct(
    "model messages", model=STRING, messages=listed({"type": "object"}),
    tools=listed(TOOL, most=128), parallel_tool_calls=BOOL,
    tool_choice={"anyOf": [one_of("none", "auto", "required"), CHOICE]},
    stream=BOOL, stream_options=struct("", include_usage=BOOL),
    stop={"anyOf": [WORDS, listed(WORDS, most=4)]},
    temperature={"type": "number", "minimum": 0, "maximum": 2},
    top_p={"type": "number", "minimum": 0, "maximum": 1},
    max_tokens=LIMIT, max_completion_tokens=LIMIT,
    reasoning_effort=one_of("none", "minimal", "low", "medium", "high", "xhigh"),
    response_format=struct("type", type=one_of("json_schema"), json_schema=ANSWER_SCHEMA),
    metadata={"type": "object", "additionalProperties": pattern("^.{0,512}$")},
    user=STRING, prompt_cache_key=STRING, store=BOOL,
)


def check(body: Json) -> None:
    """Raise ValueError for what OpenAI, or a server as strict, answers with a 400."""
    fit(body, CHAT, "request")
    waiting: list[str] = []
    for at, message in enumerate(body["messages"]):
        need(message.get("role") in SPEAKERS, f"messages[{at}]: unknown role in {message}")
        fit(message, SPEAKERS[message["role"]], f"messages[{at}]")
        if message["role"] == "tool":
            need(message["tool_call_id"] in waiting, f"messages[{at}] must follow its 'tool_calls'")
            waiting.remove(message["tool_call_id"])
            continue
        need(not waiting, f"messages[{at}]: these tool_call_ids have no response yet: {waiting}")
        waiting = [call["id"] for call in message.get("tool_calls", [])]
        for call in message.get("tool_calls", []):
            fit(json.loads(call["function"]["arguments"]), {"type": "object"}, "arguments")
    need(not waiting, f"these tool_call_ids have no response: {waiting}")
    names = [tool["function"]["name"] for tool in body.get("tools", [])]
    need(len(set(names)) == len(names), f"tool names must be unique: {names}")
    need(names or not {"tool_choice", "parallel_tool_calls"} & set(body), "this needs 'tools'")
    need(body.get("stream") or "stream_options" not in body, "'stream_options' without 'stream'")
    need(not {"max_tokens", "max_completion_tokens"} <= set(body), "two limits at once")


def fit(value: Any, schema: Json, where: str) -> None:
    errors = jsonschema.Draft202012Validator(schema).iter_errors(value)
    error = jsonschema.exceptions.best_match(errors)
    need(error is None, error and f"{where}, {error.json_path}: {error.message[:300]}")


def need(condition: object, message: Optional[str]) -> None:
    if not condition:
        raise ValueError(message)


# ======== The server ========================================================================


class ScriptedUpstream(socketserver.ThreadingTCPServer):
    """An OpenAI server. `script` maps a marker to replies: the last user message that holds a
    marker counts, each assistant turn since then takes the next reply, the last one repeats."""

    daemon_threads = True

    def __init__(self, handler: Optional[type[BaseHTTPRequestHandler]] = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or UpstreamHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.script: dict[str, list[Reply]] = {}
        self.requests: list[Json] = []
        self.refusals: list[str] = []
        self.models = MODELS
        self.strict = True  # as strict as OpenAI
        self.most_tokens = 128_000
        # What another provider would refuse: its words, or status and body; "" for what it takes.
        self.demand: Callable[[Json], Any] = lambda body: ""
        self.context = 0  # tokens that its list tells, if any
        self.contexts: dict[str, int] = {}  # of single models
        self.usage: Json = {}  # what it says beside USAGE
        self.counter: Callable[[Json], int] = lambda body: 0  # of a request's tokens, if any
        self.too_long: Any = ""  # refuses the first conversation of more than six messages so
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def reply(self, messages: list[Json]) -> Reply:
        turn = 0
        for message in reversed(messages):
            turn += message["role"] == "assistant" and message.get("content") != FILLER
            for marker, replies in self.script.items():
                if message["role"] == "user" and marker in text_of(message):
                    return replies[min(turn, len(replies) - 1)]
        return Reply("Nothing is scripted for this.")

    def seen(self, marker: str) -> list[Json]:
        """The requests in which the user says the marker, in order."""
        return [body for body in self.requests if any(
            one["role"] == "user" and marker in text_of(one) for one in body["messages"]
        )]


class UpstreamHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ScriptedUpstream

    def do_GET(self) -> None:
        if self.path.rstrip("/") != "/v1/models":
            return self.refuse(404, f"Unknown request URL: GET {self.path}")
        windows = {name: self.server.contexts.get(name, self.server.context)
                   for name in self.server.models}  # fmt: skip
        models = [{"id": name, "object": "model", "created": 1, "owned_by": "test",
                   **({"context_length": window} if window else {})}
                  for name, window in windows.items()]  # fmt: skip
        return self.answer(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        self.answer_post(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer_post(self, body: Json) -> None:
        if self.path != "/v1/chat/completions":
            return self.refuse(404, f"Unknown request URL: POST {self.path}")
        self.server.requests.append(body)
        if self.is_keyless():
            return None
        return self.complete(body)

    def is_keyless(self) -> bool:
        """Whether the key was wrong, and told."""
        wrong = self.headers["Authorization"] != f"Bearer {KEY}"
        if wrong:
            self.refuse(401, "Incorrect API key provided.")
        return wrong

    def complete(self, body: Json) -> None:
        """Answer a chat request."""
        if body.get("model") not in self.server.models:
            return self.refuse(404, f"The model `{body.get('model')}` does not exist.")
        asked, most = body.get("max_completion_tokens", 0), self.server.most_tokens
        if asked > most:
            return self.refuse(400, f"max_tokens is too large: {asked}. This model supports at "
                               f"most {most} completion tokens, whereas you provided {asked}.")
        if self.is_unwanted(body, body["messages"]):
            return None
        try:
            if self.server.strict:
                check(body)
        except ValueError as error:
            self.server.refusals.append(str(error))
            return self.refuse(400, str(error))
        reply, turn = self.server.reply(body["messages"]), len(body["messages"])
        time.sleep(reply.silence)
        if reply.status != 200:
            return self.refuse(reply.status, reply.text)
        if body.get("stream"):
            return self.stream(body, reply, turn)
        if reply.dies:
            reply.dies -= 1
            return self.hang_up()
        choice = {"message": reply.message(turn), "finish_reason": reply.finish_reason}
        head = self.head(body, "chat.completion")
        choices = [{"index": 0, **choice}]
        return self.answer(200, {**head, "choices": choices, "usage": self.usage(body)})

    def is_unwanted(self, body: Json, messages: list[Json]) -> bool:
        """Whether the request is more than the test lets pass, and told."""
        told = self.server.demand(body)
        if self.server.too_long and len(messages) > 6:
            told, self.server.too_long = self.server.too_long, ""
        if told:
            self.refuse(400, told) if isinstance(told, str) else self.answer(*told)
        return bool(told)

    def stream(self, body: Json, reply: Reply, turn: int) -> None:
        head = self.head(body, "chat.completion.chunk")
        deltas = [*((delta, None) for delta in reply.deltas(turn)), ({}, reply.finish_reason)]
        chunks = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
                  for delta, finish in deltas]
        if body.get("stream_options", {}).get("include_usage"):
            chunks = [{**chunk, "usage": None} for chunk in chunks]
            chunks.append({**head, "choices": [], "usage": self.usage(body)})
        self.send_stream(reply, [*map(data_line, chunks), b"data: [DONE]\n\n"])

    def send_stream(self, reply: Reply, events: list[bytes]) -> None:
        """The events, with the accidents of the reply."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        said = json.dumps(reply.text[:7])[1:-1].encode()
        for at, event in enumerate(events):
            if at == len(events) // 2 and reply.dies:
                reply.dies -= 1
                return self.hang_up()
            if at == len(events) // 2 and reply.fails:
                event, reply.fails = data_line(reply.fails), {}
                self.send_piece(event)
                break
            self.send_piece(event)
            if reply.waits_for and said in event:
                reply.waits_for.wait(10)
        return self.send_piece(b"")

    def send_piece(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def usage(self, body: Json) -> Json:
        counted = self.server.counter(body)
        return {**USAGE, **self.server.usage, **({"prompt_tokens": counted} if counted else {})}

    def head(self, body: Json, kind: str) -> Json:
        return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": body["model"]}

    def refuse(self, status: int, message: str, param: Optional[str] = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
        self.answer(status, {"error": error})

    def answer(self, status: int, body: Json) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def data_line(value: Json) -> bytes:
    """The server-sent event that holds nothing but this."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def named_event(value: Json) -> bytes:
    """The server-sent event that is named after the type of what it holds."""
    return f"event: {value['type']}\n".encode() + data_line(value)


def text_of(message: Json) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(p.get("text", "") for p in content)


def tool_results(body: Json) -> dict[str, str]:
    """What the request's tool messages say, by the arguments of the call that they answer."""
    calls = [call for message in body["messages"] for call in message.get("tool_calls") or []]
    asked = {call["id"]: call["function"]["arguments"] for call in calls}
    answers = [message for message in body["messages"] if message["role"] == "tool"]
    return {asked[answer["tool_call_id"]]: text_of(answer) for answer in answers}


def parts(body: Json, kind: str) -> list[Json]:
    """All content parts of one kind, in order, without their wrapping."""
    lists = [one["content"] for one in body["messages"] if isinstance(one.get("content"), list)]
    return [part[kind] for content in lists for part in content if part["type"] == kind]
