#!/usr/bin/env python3
"""ogx.py: run Claude Code, and every Anthropic SDK program, on any model.

    export OPENAI_API_KEY=...        # or VLLM_URL, OLLAMA_URL, GROQ_API_KEY, ...
    python3 ogx.py run               # serves the Anthropic Messages API on 127.0.0.1:8321
    python3 ogx.py connect claude    # in a second terminal: Claude Code on your models

One file, the standard library alone, Python 3.9 or newer. Importing it has no effect;
`main([...])` returns an exit code, and several gateways can run in one process.

    Claude Code --HTTP--> Server --> Gateway --> Dialect.request --> Upstream --HTTP--> provider
                                        |           (pure)            (I/O)                |
                                     Registry                                              |
                                   (which model?)                                          |
    Claude Code <--SSE--- Server <-- Gateway <-- Dialect.translator <-- bytes, frames <----+
                                                    (pure)

Anthropic's words are message, block and event; OpenAI's are completion, choice, delta and
chunk; a name tells by its noun which protocol it speaks. Sections refer only upward:

    Values         JSON and text as all sections read and write them
    Errors         one exception type; an upstream's error body in all its shapes
    Checks         values that users and clients gave, and what is wrong with them
    Providers      one row of data per kind of provider
    Config         starter.json, or a file like it, and ${env.VAR:=default}
    Registry       models, aliases and tiers: which provider serves an id
    Requests       check a Messages request
    History        turns, words for blocks, documents and signatures for other dialects
    Tokens         estimate token counts
    Calls          tool calls that a model wrote as text
    Events         build, write, read and fold Anthropic events
    Chat           OpenAI Chat Completions: request there, chunks back
    Messages       Anthropic's own format, for upstreams that speak it
    Responses      OpenAI's Responses: request there, events back
    Dialects       the table of what upstreams speak, and the demo model
    Remedies       what an upstream's refusal teaches
    HTTP           heads, bodies and their framing, and the guard, for both sides
    Loop           tasks, what they wait for, and the one thread that runs them
    Log            what people read: the log, and lines at a terminal
    Store          what must outlive a request, or the process
    Signing        AWS's credentials, and the signatures made with them
    Upstream       connections to providers
    Discovery      what the providers serve: their lists, probes, local servers
    Gateway        one function per endpoint, from request to reply
    Server         HTTP for the clients
    Connect        launch Claude Code with the right environment
    Command line   flags and main
"""

from __future__ import annotations  # Python 3.9 or newer is needed

import argparse
import binascii
import collections
import email.utils
import enum
import errno
import functools
import http.client
import http.server
import ipaddress
import itertools
import json
import logging
import marshal
import math
import operator
import os
import queue
import random
import re
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import sys
import textwrap
import threading
import time
import urllib.parse
import uuid
import warnings
import weakref
import zlib

if sys.version_info < (3, 9):  # noqa: UP036
    sys.exit(f"ogx.py needs Python 3.9 or newer; this is {sys.version.split()[0]}")

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from typing import Any, Callable, ClassVar, NamedTuple, Union

__version__ = "0.1.0"

Json = dict[str, Any]  # an object on the wire, as json.loads gives it
log = logging.getLogger("ogx")

# ======== Values =============================================================================

MAX_HEAD = 64 * 1024  # bytes of a head: a stream's first event, or a status line and headers
MAX_ID = 256  # characters of a model's id
MAX_ELEMENTS = 1_000_000  # of a JSON text: Python's parser holds up all threads while it reads them
# What moves a terminal's cursor, turns text around or is half a character; all but line ends.
CONTROLS = r"\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
CONTROL, BAD_ID = re.compile(f"[{CONTROLS}]"), re.compile(f"[\n{CONTROLS}]")
KEY_CHARACTERS = "%+-./0123456789:=@ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~"
JSON_STRING = re.compile(rb'"[^"]*"?')  # without escapes; a group would keep each of its turns
HALF_PAIR = re.compile(rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|"
                       rb"(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F]..)")
COMPACT_JSON = json.JSONEncoder(separators=(",", ":"), check_circular=False)


def json_bytes(value: Any) -> bytes:
    return COMPACT_JSON.encode(value).encode("ascii")


def fingerprint(value: Any) -> int:
    """A hash of a JSON value, for a quarter of what its text costs; RecursionError if it is too
    deep."""
    try:
        return hash(marshal.dumps(value, 2))
    except ValueError:
        raise RecursionError from None


def without_halves(data: bytes) -> bytes:
    """JSON with U+FFFD for half surrogate pairs: servers refuse a whole body for one."""
    if not HALF_PAIR.search(data):
        return data
    marked = data.replace(b"\\\\", b"\0")  # what is a text's own backslash
    return HALF_PAIR.sub(rb"\\ufffd", marked).replace(b"\0", b"\\\\")


def number_or_none(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


PLAIN_JSON = json.JSONDecoder(parse_constant=number_or_none, parse_float=number_or_none)


def json_or_none(data: str | bytes) -> Any:
    """A JSON text's value; None for what is none or too large, and for NaN and infinities."""
    if has_too_many_elements(data):
        return None
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
        return PLAIN_JSON.decode(text)
    except (ValueError, RecursionError):
        return None


def has_too_many_elements(data: str | bytes) -> bool:
    """Whether a JSON text has more than MAX_ELEMENTS outside of strings."""
    if len(data) <= MAX_ELEMENTS:
        return False
    data = data.encode("utf-8", "replace") if isinstance(data, str) else data
    if sum(map(data.count, b",[{")) > MAX_ELEMENTS:
        data = JSON_STRING.sub(b"", data.replace(rb"\\", b"").replace(rb'\"', b""))
    return sum(map(data.count, b",[{")) > MAX_ELEMENTS


def is_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_ID and not BAD_ID.search(value)


def dict_or_empty(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def whole_number(value: Any) -> int:
    """A number from 1 to 2^53 - 1, which JavaScript knows too; 0 for any other value."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 < value < 1 << 53 else 0


def first_number(node: Json, *names: str) -> int:
    return next(filter(None, map(whole_number, map(node.get, names))), 0)


def text_part(text: str) -> Json:
    return {"type": "text", "text": text}


def without_controls(text: str) -> str:
    """A text with ? for control characters, but line ends, as a terminal may show it."""
    return CONTROL.sub("?", text)


def cut(text: str, size: int) -> str:
    """The beginning of a long text, up to a word's end: half a key would not be hidden."""
    return text if len(text) <= size else text[:size].rstrip(KEY_CHARACTERS) + "..."


def one_line(text: str) -> str:
    """500 characters of a text for the log, without line breaks."""
    return cut(" ".join(text[:5000].split()), 500)


def beginning(data: bytes) -> str:
    """How an odd answer begins: an HTML page's title, else 500 characters of text."""
    # Where a tag isn't closed, the expressions look for its end again and again: cut before.
    text = cut(data[:4000].decode("utf-8", "replace").strip(), 3900)
    if "<html" in text[:1000].lower() or text[:9].lower() == "<!doctype":
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.I | re.S)
        body = re.sub(r"(?s)<(script|style).*?</\1>|<[^>]+>", " ", text)
        return "an HTML page: " + cut(one_line(title[1] if title else body), 300)
    return one_line(text)


# ======== Errors =============================================================================
# One exception type for all that the client is told, caught at three edges: the HTTP handler,
# the stream writer and main.

ERROR_TYPES = {  # by status (OpenAPI of Anthropic's Messages API; gateway contract)
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error",
    403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 501: "not_supported", 504: "timeout_error", 529: "overloaded_error",
}
# Words in the code of an error that came with HTTP 200 -> the status it would have had.
CODE_STATUSES = (*((name, status) for status, name in ERROR_TYPES.items()),
                 ("rate.?limit|quota|throttl", 429), ("overloaded|slow_down", 529),
                 ("invalid|bad.?request|image|policy|context_length|residency", 400))
# How names of reasons end in error bodies, the best last.
REASON_NAMES = ("choices", "resp", "response", "error", "errors", "detail", "description", "msg",
                "message", "raw", "metadata")
# A quotation of four words or more is a user's or a model's text, but behind such a key.
QUOTATION = re.compile(r"""(\b(?:message|msg|error|detail)\\?['"]\s?:\s?\\?)?(?<!\w)"""
                       r"""(['"`])(?:[^\s'"`]{1,40}\s){3}.*?(?:\2(?!\w)|\Z)""", re.S)
NO_MONEY = (r"(?i)\b(insufficient|not enough|out of|used all)\b(?! permis).{0,30}\b(balance|"
            r"credit|fund)|\b(balance|credit|fund)s?\b.{0,30}(insufficient|not enough|too low)|"
            r"\brecharg|\barrears|\btop[ -]up\b")
# What a 500 says, the first that fits, and what helps where it will not pass by itself.
FAILURES = {
    r"(?i)time.?out|timed|unavailable|again|temporar|overload|busy|\bloading|memory": "",
    r"requires? .{0,20}--\w|using --jinja": "start its server with that flag",
    "(?i)grammar|json schema": "a plainer schema may help",
    r"(?i)jinja|prompt template|chat.?template|\{%-|at row \d+, column":
    "start its server with another --chat-template"}
RETRY_AFTER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?|\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT")


@dataclass(eq=False, repr=False)
class OgxError(Exception):
    """A failure told to the client. A raised one keeps its traceback alive: keep a replace()."""

    status: int  # of HTTP
    message: str
    type: str = ""  # Anthropic's; by default that of the status
    headers: Mapping[str, str] = field(default_factory=dict)
    details: Json | None = None
    raw: bytes = b""  # the body as an upstream that speaks Messages wrote it
    refusal: Refusal | None = None  # the upstream's own words
    quote: str = ""  # ends the message for the client alone: what a model said is in no log
    reason: str = ""  # why a connection failed, without to what

    def __post_init__(self) -> None:
        super().__init__(self.message)
        usual = "invalid_request_error" if 400 <= self.status < 500 else "api_error"
        self.type = self.type or ERROR_TYPES.get(self.status, usual)

    def hide(self, secrets: Iterable[str]) -> OgxError:
        """Hide keys that an upstream quoted, in this error itself, and return it."""
        for secret in secrets:
            self.message = self.message.replace(secret, "***")
            self.quote = self.quote.replace(secret, "***")
            self.raw = self.raw.replace(secret.encode(), b"***")
        return self

    def body(self, request_id: str) -> Json:
        message = without_controls(self.message + self.quote)
        details = {"details": self.details} if self.details else {}
        error = {"type": self.type, "message": message, **details}
        ours = {"type": "error", "error": error, "request_id": request_id}
        return {**ours, **dict_or_empty(json_or_none(self.raw))}


@dataclass(frozen=True)
class Refusal:
    """What an upstream said when it refused."""

    status: int
    message: str
    code: str = ""
    param: str = ""

    @functools.cached_property
    def words(self) -> str:
        """Message and param, where some gateways put the sentence, without quotations."""
        return QUOTATION.sub(lambda m: m[0] if m[1] else "''", f"{self.message} {self.param}")


def refusal_from_body(status: int, body: bytes) -> Refusal:
    """What a failed provider says in JSON, HTML or text; with HTTP 200, the status it meant."""
    text = body[:100_000].decode("utf-8", "replace").strip()
    node = json_or_none(text)
    if node is None:
        return Refusal(status, beginning(body) or http.client.responses.get(status, "no words"))
    reason = reason_in(node)
    codes = reason.get("codes") or [""]
    if status == 200 or status >= 500:  # a router's 502 may be its provider's 400
        status = next((int(code) for code in codes if re.fullmatch("[45][0-9]{2}", code)), status)
    if status == 200:
        names = " ".join(codes).lower()
        status = next((usual for stems, usual in CODE_STATUSES if re.search(stems, names)), 500)
    return Refusal(status, cut(reason.get("message", text), 2000), cut(codes[0], 200),
                   cut(reason.get("param", ""), 500))


def reason_in(node: Any, depth: int = 8) -> Json:
    """The innermost message, codes and param of an error body: gateways wrap them in words that
    say little."""
    if isinstance(node, str):
        return {"message": node, **reason_in(json_or_none(node), depth)}
    if isinstance(node, list) and node and depth > 0:
        reason = reason_in(node[0], depth - 1)
        if "loc" in dict_or_empty(node[0]):  # pydantic's
            with suppress(RecursionError):
                reason["message"] = json.dumps(node)
        return reason
    if not isinstance(node, dict) or depth <= 0:
        return {}
    own = [(name.lower(), node[name]) for name in sorted(node, key=len) if node[name]]
    plain = {name: str(value) for name, value in own if isinstance(value, (str, int))}
    path = [part for part in as_list(node.get("loc")) if isinstance(part, str)]
    codes = [plain[n] for end in ("code", "type", "status") for n in plain if n.endswith(end)]
    reason = {"param": [plain.get("param", ""), *path][-1], "codes": codes}
    reasons = [value for end in REASON_NAMES for name, value in own if name.endswith(end)]
    for value in sorted(reasons, key=lambda value: isinstance(value, (dict, list))):
        inner = reason_in(value, depth - 1)
        if "message" in inner:
            reason.update({name: value for name, value in inner.items() if value})
    if "message" in reason and "provider_name" in plain:  # OpenRouter's
        reason["message"] = f"{plain['provider_name']}: {reason['message']}"
    return reason


def is_failure(answer: Json) -> bool:
    """Whether what came with HTTP 200 is an error and no part of an answer."""
    is_answer = answer.get("choices") is not None or "content" in answer
    return bool(answer.get("error")) or not is_answer and "message" in reason_in(answer)


def unknown_data(words: str, data: bytes) -> OgxError:
    """The error for what is no answer. The log tells what it is of HTML pages alone."""
    shown = beginning(data)
    if shown.startswith("an HTML page"):
        return OgxError(502, f"{words} {shown}")
    return OgxError(502, f"{words} ", quote=shown)


def upstream_error(refusal: Refusal, origin: str, headers: Mapping[str, str]) -> OgxError:
    """An upstream's refusal as the client gets it. What can't get better by itself says so, or
    Claude Code would retry it for minutes."""
    retry_after = headers.get("retry-after", "")
    sent = {"retry-after": retry_after} if RETRY_AFTER.fullmatch(retry_after) else {}
    status, message = refusal.status, f"{refusal.message} (from {origin})"
    status = status if 400 <= status <= 599 else 502
    advice = (told for said, told in FAILURES.items() if re.search(said, refusal.words))
    helps = next(advice, "") if status == 500 else ""
    if helps:
        status, message, sent["x-should-retry"] = 400, f"{message}; {helps}", "false"
    if status == 403 and re.search("(?i)security token|bearer token|authentication|signature",
                                   refusal.message):
        status = 401  # AWS has 403 for wrong credentials, too
    out_of_money = (status in (400, 403) and "billing" in refusal.message) or (
        status == 429 and "quota" in refusal.code) or re.search(NO_MONEY, refusal.words)
    error_type = "billing_error" if out_of_money else ""
    if error_type or status in (401, 402, 403):
        sent["x-should-retry"] = "false"
    return OgxError(status, message, error_type, sent, refusal=refusal)


# ======== Checks =============================================================================
# OgxError(400) says where a wrong value is, what was expected there, and what it is.

CONTENT, NUMBER = (str, list), (int, float)
TYPE_NAMES = {str: "a string", list: "a list", dict: "an object", int: "a whole number",
              float: "a number", bool: "true or false", type(None): "null", NUMBER: "a number",
              CONTENT: "a string or a list of content blocks"}


def wrong(where: str, expected: str, value: Any) -> OgxError:
    return OgxError(400, f"{where}: expected {expected}, got {TYPE_NAMES[type(value)]}")


def wrong_value(where: str, expected: str, value: Any) -> OgxError:
    """The error that shows the value, unless it is or may hold a key."""
    hidden = where.endswith(".api_key") or (value and isinstance(value, (dict, list)))
    shown = "something else" if hidden else json.dumps(value)[:80]
    return OgxError(400, f"{where}: expected {expected}, got {shown}")


def expect(node: Any, where: str, types: Mapping[str, Any], required: bool = True) -> None:
    """Check that each field of an object (without a place: the request's body) is of a type, or
    among some types or words. Null counts as absent."""
    if type(node) is not dict:
        raise wrong(where or "the request body", "an object" if where else "a JSON object", node)
    for name in types if required else sorted(types.keys() & node.keys()):
        expected, value = types[name], node.get(name)
        if type(value) is expected or (value is None and not required):
            continue
        if isinstance(expected, tuple) and (value in expected or type(value) in expected):
            continue
        place = f"{where}.{name}" if where else name
        if value is None:
            raise OgxError(400, f"{place}: field required")
        if expected not in TYPE_NAMES:
            raise wrong_value(place, f"one of {', '.join(expected)}", value)
        raise wrong(place, TYPE_NAMES[expected], value)


def finite_number(text: str) -> float:
    number = number_or_none(text)
    if number is None:  # NaN, Infinity, 1e999
        raise ValueError(f"{text} is no number of JSON")
    return number


STRICT_JSON = json.JSONDecoder(parse_constant=finite_number, parse_float=finite_number)


def parsed_json(body: bytes) -> Any:
    if not body:
        raise OgxError(400, "the request has no body; expected a JSON object")
    if has_too_many_elements(body):
        raise OgxError(413, f"the request's JSON has more than {MAX_ELEMENTS:,} elements")
    try:
        return STRICT_JSON.decode(body.decode().removeprefix("\ufeff"))  # "utf-8-sig" is slow
    except UnicodeDecodeError:
        raise OgxError(400, "the request's body is not UTF-8") from None
    except ValueError as error:
        raise OgxError(400, f"the request's body is not JSON: {error}") from None


def port_number(value: Any, where: str) -> int:
    """A TCP port from a number or its digits; 0 lets the system choose."""
    if re.fullmatch("[0-9]{1,5}", str(value)) and int(value) <= 65535:
        return int(value)
    raise wrong_value(where, "a port from 0 to 65535", value)


def url_parts(url: str) -> urllib.parse.SplitResult | None:
    """The parts of an HTTP URL that ends before ? and #; None for any other text."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return None
    return parts if usable and not re.search("[^!-~]|[?#]", url) else None


# ======== Providers ==========================================================================
# One row per kind of provider. Code asks a row for its fields and never for its name. To add a
# provider: a row here, its line in starter.json (`make starter` writes it), a row in the tests.

Strings = tuple[str, ...]


@dataclass(frozen=True)
class ProviderKind:
    """A kind of provider; the defaults describe the OpenAI format as most servers speak it. Paths
    are below the base URL; those that begin with ~ are below the server's root."""

    name: str
    base_url: str = ""  # with the version segment; empty: the user must give one
    key_vars: Strings = ()  # variables with the key, of which the first that is set counts
    url_vars: Strings = ()
    verify_var: str = ""
    enabled_by: str = "key"  # "key" or "url": the variable that switches the starter's line on
    default_path: str = "/v1"  # of URLs without one, where base_url has none either
    key_headers: Strings = ("authorization",)  # takes "Bearer KEY"; others the bare key
    signed: str = ""  # pattern for AWS's service and region in a URL: SigV4 where no key is given
    signed_by: Strings = ()  # switch its line on, the last one, since they have other uses, too
    headers: tuple[tuple[str, str], ...] = ()  # sent with every request
    # How its models are found, and what is known about them.
    list_path: str = "/models"
    lists_all: bool = True  # what its list lacks isn't served
    built_in_models: Strings = ()  # ids of those that need no list
    warning: str = ""  # what to know about them
    more_lists: tuple[Strings, ...] = ()  # path, and pattern of the ids to take
    servers: tuple[Strings, ...] = ()  # pattern of ids or paths, then of base_url; replacement
    loaded_path: str = ""  # lists the models in memory with the context they have there
    props_path: str = ""  # tells how the server was started
    tokenizer: Strings = ()  # a path that counts a chat; or one that renders it, one that counts
    context_hint: str = ""
    local_port: int = 0  # where `run` looks for it when nothing is configured
    identity: Strings = ("", "")  # a path, and what only this server answers there
    # What it speaks. With both, one free probe tells whether this server has "messages".
    dialects: Strings = ("chat",)
    messages_path: str = "/messages"
    openai_root: str = ""  # where the paths of the other dialects begin
    native_gaps: Strings = ()  # what its Messages API refuses or loses: see unsupported_features()
    native_models: str = ""  # pattern of the ids that have it, and nothing else
    is_anthropic: bool = False  # takes all that Claude Code sends as it is
    # OpenAI's Responses API: where these hosts are, or where a refusal told (True), or never.
    responses_hosts: Strings = ()
    responses: bool | None = None
    own_reasoning: bool = True  # takes back the reasoning that it encrypted
    summaries: bool = True  # may show summaries of its reasoning
    # Quirks of its chat completions.
    max_tokens_field: str = "max_tokens"
    user_after_tool: bool = True  # takes a user message right after tool messages
    system_anywhere: bool = False  # takes a system message after the first user message
    images: bool = True
    files: bool = False  # takes `file` parts (PDF)
    top_k: bool = False
    cache_key: bool = False  # takes prompt_cache_key
    reasoning_echo: str = ""  # field of assistant messages that must carry the reasoning back
    stop_fields: tuple[tuple[str, Any], ...] = ()  # have it tell which stop sequence it met
    stream_above: int = 0  # refuses larger output limits unless streamed
    tool_ids: str = ""  # pattern of the ids of tool calls that it takes
    named_tool_choice: bool = True  # can be told to call one tool
    tool_call_extra: tuple[tuple[str, Any], ...] = ()  # fields that each call of the history needs
    format_with_tools: bool = True  # takes response_format beside tools; else it is asked in words
    answer_by: str = "format"  # how a JSON answer is asked for: as "format", "tool" or "words"
    root_unions: bool = True  # takes anyOf and its like at the root of a tool's schema
    # Of JSON schema, in tools. "*": all but STRUCTURE, "$ref": all that plain_schema() mends.
    refused_keywords: Strings = ()
    max_description: int = 0  # characters of a tool's; 0: any number
    max_tools: int = 0  # more are left out; 0: any number
    text_calls: bool = False  # calls that a model writes as text are read, on local servers
    tools_in_words: bool = False  # tools are described in words where its chat template has none

    @property
    def switches(self) -> Strings:
        return self.url_vars if self.enabled_by == "url" else self.key_vars + self.signed_by


BOTH = ("messages", "chat")
GAPS = ("document", "search_result", "server_tool")  # of most servers' Messages APIs
ANTHROPIC_VERSION = "2023-06-01"
VERSION_HEADER = (("anthropic-version", ANTHROPIC_VERSION),)
AWS_HOST = r"bedrock-(?:mantle|runtime)\.([a-z0-9-]*)\.[^/]+.*"
NINE, FORTY = "[a-zA-Z0-9]{9}", ".{1,40}"  # ids of tool calls
OWN_SERVER: Json = {"enabled_by": "url", "dialects": BOTH, "native_gaps": GAPS, "text_calls": True}
BESIDE: Json = {"dialects": BOTH, "messages_path": "~/anthropic/v1/messages"}
OPENAI: Json = {"max_tokens_field": "max_completion_tokens", "system_anywhere": True, "files": True,
                "cache_key": True, "root_unions": False, "max_tools": 128, "tool_ids": FORTY}
SKIP_SIGNATURE = (("extra_content", {"google": {
    "thought_signature": "skip_thought_signature_validator"}}),)
PROVIDER_KINDS = {kind.name: kind for kind in (
    ProviderKind("ollama", "http://localhost:11434/v1", ("OLLAMA_API_KEY",), ("OLLAMA_URL",),
        enabled_by="url", list_path="~/api/tags", loaded_path="~/api/ps", text_calls=True,
        context_hint="restart it with OLLAMA_CONTEXT_LENGTH=64000 ollama serve",
        local_port=11434, identity=("~/", "Ollama is running"), dialects=BOTH,
        native_gaps=("document", "url_image", "tool_choice", "search_result", "is_error",
                     "output_format")),
    ProviderKind("vllm", "", ("VLLM_API_TOKEN",), ("VLLM_URL", "HOSTED_VLLM_API_BASE"),
        verify_var="VLLM_TLS_VERIFY", local_port=8000, identity=("/models", '"owned_by":"vllm"'),
        context_hint="restart it with --max-model-len 65536",
        tokenizer=("~/tokenize",), top_k=True, **OWN_SERVER),
    ProviderKind("lm-studio", "http://localhost:1234/v1", ("LM_STUDIO_API_KEY",),
        ("LM_STUDIO_URL", "LM_STUDIO_API_BASE"), list_path="~/api/v0/models", local_port=1234,
        identity=("~/lmstudio-greeting", '"lmstudio":true'), **OWN_SERVER),
    ProviderKind("llama-cpp", "http://localhost:8080/v1", ("LLAMA_API_KEY",), ("LLAMA_CPP_URL",),
        enabled_by="url", local_port=8080, identity=("/models", '"owned_by":"llamacpp"'),
        context_hint="restart it with llama-server -c 65536", text_calls=True,
        named_tool_choice=False, top_k=True, tokenizer=("~/apply-template", "~/tokenize"),
        props_path="~/props",
        stop_fields=(("verbose", True), ("response_fields", ["stopping_word"]))),
    ProviderKind("sglang", "http://localhost:30000/v1", ("SGLANG_API_KEY",), ("SGLANG_URL",),
        top_k=True, **OWN_SERVER),
    ProviderKind("openai", "https://api.openai.com/v1", ("OPENAI_API_KEY",), ("OPENAI_BASE_URL",),
        responses_hosts=("api.openai.com",), **OPENAI),
    ProviderKind("anthropic", "https://api.anthropic.com/v1", ("ANTHROPIC_API_KEY",),
        key_headers=("x-api-key",), headers=VERSION_HEADER, list_path="/models?limit=1000",
        dialects=("messages",), is_anthropic=True),
    ProviderKind("fireworks", "https://api.fireworks.ai/inference/v1", ("FIREWORKS_API_KEY",),
        ("FIREWORKS_BASE_URL",), dialects=BOTH, native_gaps=("server_tool",), top_k=True,
        stream_above=4096, format_with_tools=False),
    ProviderKind("together", "https://api.together.ai/v1", ("TOGETHER_API_KEY",),
        ("TOGETHER_BASE_URL",), top_k=True),
    ProviderKind("groq", "https://api.groq.com/openai/v1", ("GROQ_API_KEY",), ("GROQ_BASE_URL",),
        format_with_tools=False, max_tools=128),
    # "mantle" serves short ids alone, "runtime" inference profiles (us.*) and versions (*:0).
    ProviderKind("bedrock",
        "https://bedrock-mantle.${env.AWS_REGION|AWS_DEFAULT_REGION:=}.api.aws/v1",
        ("AWS_BEARER_TOKEN_BEDROCK", "AWS_BEDROCK_BEARER_TOKEN"),
        signed=r"//(?:[\w-]+\.)?(bedrock(?:-mantle)?)[\w-]*\.([a-z0-9-]*)\.(?:vpce\.)?"
               r"(?:amazonaws\.|api\.aws)", signed_by=("AWS_ACCESS_KEY_ID", "AWS_PROFILE"),
        headers=VERSION_HEADER, native_models=r"anthropic\.", **BESIDE,
        more_lists=(("~/inference-profiles?maxResults=1000&type=SYSTEM_DEFINED",
                     r"\.(anthropic|openai)\."),
                    ("~/foundation-models?byInferenceType=ON_DEMAND&byOutputModality=TEXT",
                     "^(anthropic|openai).*:")),
        servers=((r"^~/(inf|found)", AWS_HOST, r"bedrock.\1.amazonaws.com"),
                 (r"^([a-z]{2}|us-gov|apac|amer|global)\.|:", AWS_HOST,
                  r"bedrock-runtime.\1.amazonaws.com/openai/v1"))),
    ProviderKind("azure", "", ("AZURE_OPENAI_API_KEY", "AZURE_API_KEY"),
        ("AZURE_OPENAI_ENDPOINT", "AZURE_API_BASE"), enabled_by="url",
        default_path="/openai/v1", key_headers=("api-key",), lists_all=False,
        responses_hosts=(".openai.azure.com", ".cognitiveservices.azure.com",
                         ".services.ai.azure.com"),
        **OPENAI),
    ProviderKind("gemini", "https://generativelanguage.googleapis.com/v1beta/openai",
        ("GEMINI_API_KEY", "GOOGLE_API_KEY", "GEMINI_ACCESS_TOKEN"),
        tool_call_extra=SKIP_SIGNATURE, root_unions=False, refused_keywords=(
            "$schema", "propertyNames", "exclusiveMinimum", "exclusiveMaximum",
            "patternProperties", "format")),
    ProviderKind("mistral", "https://api.mistral.ai/v1", ("MISTRAL_API_KEY",), tool_ids=NINE,
        named_tool_choice=False, user_after_tool=False),
    ProviderKind("deepseek", "https://api.deepseek.com", ("DEEPSEEK_API_KEY",), default_path="",
        native_gaps=(*GAPS, "image"), reasoning_echo="reasoning_content", **BESIDE),
    ProviderKind("moonshot", "https://api.moonshot.ai/v1", ("MOONSHOT_API_KEY",),
        native_gaps=GAPS, reasoning_echo="reasoning_content", **BESIDE),
    ProviderKind("openrouter", "https://openrouter.ai/api/v1", ("OPENROUTER_API_KEY",),
        dialects=BOTH, top_k=True, files=True),
    ProviderKind("zai", "https://api.z.ai/api/paas/v4", ("ZAI_API_KEY",), dialects=BOTH,
        messages_path="~/api/anthropic/v1/messages", native_gaps=GAPS),
    ProviderKind("minimax", "https://api.minimax.io/v1", ("MINIMAX_API_KEY",), native_gaps=GAPS,
        **BESIDE),
    ProviderKind("cerebras", "https://api.cerebras.ai/v1", ("CEREBRAS_API_KEY",),
        ("CEREBRAS_BASE_URL",), list_path="/models?format=openrouter",
        max_tokens_field="max_completion_tokens"),
    ProviderKind("xai", "https://api.x.ai/v1", ("XAI_API_KEY",)),
    ProviderKind("nvidia", "https://integrate.api.nvidia.com/v1", ("NVIDIA_API_KEY",),
        ("NVIDIA_BASE_URL",)),
    ProviderKind("sambanova", "https://api.sambanova.ai/v1", ("SAMBANOVA_API_KEY",)),
    # Any other server, by its URL.
    ProviderKind("openai-compatible", text_calls=True),
    ProviderKind("messages", dialects=("messages",),
        key_headers=("authorization", "x-api-key")))}
DEMO_KIND = ProviderKind(
    "demo", "demo:", dialects=("demo",), built_in_models=("echo",),
    warning="no real model: it is built in, says what it received and calls no tools")


@dataclass(frozen=True)
class Provider:
    """A configured provider: its id is the first part of its models' ids."""

    id: str
    kind: ProviderKind
    base_url: str
    api_key: str = field(default="", repr=False)
    dialect: str = "auto"  # or the one dialect to speak
    verify: bool = True  # its TLS certificate
    ca_file: str = ""  # of a private certificate authority
    own_headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # lower-case names
    secrets: Strings = field(default=(), repr=False)  # besides the key
    max_parallel: int = 0  # requests at once; 0: as many as it tells
    text_calls: bool = True  # as its row says; False: never

    @functools.cached_property
    def pool_key(self) -> str:
        """What providers that share connections have in common."""
        return f"{self.url('~')} {self.verify} {self.ca_file}"

    @functools.cached_property
    def headers(self) -> dict[str, str]:
        key = {name: "Bearer " * (name == "authorization") + self.api_key
               for name in self.kind.key_headers if self.api_key}
        return {"user-agent": f"ogx.py/{__version__}",
                "accept": "application/json, text/event-stream", "accept-encoding": "identity",
                **dict(self.kind.headers), **key, **dict(self.own_headers)}

    @functools.cached_property
    def is_local(self) -> bool:
        """Whether its host is this machine or in a private network, as far as its name tells."""
        host = urllib.parse.urlsplit(self.base_url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_private
        except ValueError:
            return "." not in host or host.endswith(".local")

    @property
    def reads_calls(self) -> bool:
        return self.kind.text_calls and self.text_calls and self.is_local

    def for_id_or_path(self, place: str) -> Provider:
        """This provider at the server that has a model's id or a list's path."""
        for pattern, here, there in self.kind.servers:
            if re.search(pattern, place):
                return replace(self, base_url=re.sub(here, there, self.base_url))
        return self

    def url(self, path: str) -> str:
        if path.startswith("~"):
            return "/".join(self.base_url.split("/")[:3]) + path[1:]
        return self.base_url + path


DEMO_PROVIDER = Provider("demo", DEMO_KIND, DEMO_KIND.base_url)

# ======== Config =============================================================================
# From the starter below or a JSON file of the same shape, and the environment, comes a Config, or
# an OgxError that names the file, the path inside it and what was expected.

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8321
TIERS = ("haiku", "sonnet", "opus", "fable")
ENV_REFERENCE = re.compile(r"\$\{env\.([A-Za-z0-9_|]+)(?:(:=|:\+)([^{}]*))?\}")
AROUND = " \t\r\n\"'"  # a value, left there by files and shells
# A user's own header, name and value; those that frame a request are ours.
HEADER = re.compile(r"(?!host\n|connection\n|content-|transfer-)[a-z0-9!#$%&'*+.^_`|~-]+\n[ -~]*")


@dataclass(frozen=True)
class Alias:
    """A registered model id."""

    model_id: str
    provider_id: str  # or "all"
    provider_model_id: str  # or "auto"
    targets: Strings = ()  # ids of several models, in the order they are tried


def tier_variable(tier: str) -> str:
    return f"ANTHROPIC_DEFAULT_{tier.upper()}_MODEL"


def limit_field(default: float, words: str) -> Any:
    return field(default=default, metadata={"words": words})


@dataclass(frozen=True)
class Limits:
    """What no other side can exceed: `server.NAME` in the configuration, else OGX_NAME."""

    connect_timeout: float = limit_field(10, "seconds to connect to a provider")
    first_byte_timeout: float = limit_field(600, "seconds of silence before an answer begins")
    idle_timeout: float = limit_field(300, "seconds of silence within an answer")
    client_timeout: float = limit_field(30, "seconds for a client to send its request, or read on")
    drain_timeout: float = limit_field(30, "seconds for running answers after a signal to stop")
    max_body: float = limit_field(32, "megabytes of a request, after decompression")
    max_requests: float = limit_field(1000, "requests that run at once; others get a 529")
    max_idle: float = limit_field(1000, "idle connections of clients; the oldest are closed first")


@dataclass(frozen=True)
class Config:
    host: str
    port: int
    providers: tuple[Provider, ...]
    aliases: tuple[Alias, ...]
    tiers: Mapping[str, str]  # tier -> model id or "", from ANTHROPIC_DEFAULT_*_MODEL
    discover_local: bool = True
    retries: int = 3  # of a request that failed before its first event
    retry_seconds: float = 5.0  # of waiting between them in all
    limits: Limits = Limits()
    host_names: Strings = ()  # that clients may call the server by, in lower case
    show_thinking: bool = True  # where a client asks to omit it, as Claude Code does, too


def starter_config() -> Json:
    """The built-in configuration, the same as starter.json's."""
    entries = []
    for kind in sorted(PROVIDER_KINDS.values(), key=lambda kind: kind.signed):
        keys, urls, switches = map("|".join, (kind.key_vars, kind.url_vars, kind.switches))
        settings = {"base_url": f"${{env.{urls}:={kind.base_url}}}" if urls else kind.base_url,
                    "api_key": f"${{env.{keys}:=}}"}
        if kind.verify_var:
            settings["verify"] = f"${{env.{kind.verify_var}:=true}}"
        if switches:
            entries.append({"provider_id": f"${{env.{switches}:+{kind.name}}}",
                            "provider_type": f"remote::{kind.name}", "config": settings})
    models = [{"model_id": model_id, "provider_id": "all", "provider_model_id": "auto",
               "model_type": "llm"} for model_id in (
                   "claude-haiku-4-5-20251001", "claude-sonnet-4-5-20250514",
                   "claude-opus-4-6-20260314")]
    return {"version": 2, "distro_name": "starter", "providers": {"inference": entries},
            "registered_resources": {"models": models},
            "server": {"host": DEFAULT_HOST, "port": DEFAULT_PORT, "discover_local": True}}


class Text(str):
    """A text of the configuration, which knows where it stands."""

    place = ""  # its path, or the variable it came from

    def at(self, place: str) -> Text:
        self.place = place
        return self

    def wrong(self, expected: str) -> OgxError:
        return wrong_value(self.place, expected, self)


def expanded(node: Any, environ: Mapping[str, str], where: str) -> Any:
    """The tree with `${env.VAR}`, `${env.VAR:=default}` and `${env.VAR:+value}` replaced. As in
    OGX, an empty variable counts as unset. `A|B` is the first of them that is set."""
    if isinstance(node, dict):
        return {k: expanded(v, environ, path_of(where, k)) for k, v in node.items()}
    if isinstance(node, list):
        return [expanded(v, environ, f"{where}[{i}]") for i, v in enumerate(node)]
    if not isinstance(node, str):
        return node
    used: list[str] = []

    def value_of(reference: re.Match[str]) -> str:
        names, mark, operand = reference.groups()
        name = next(filter(environ.get, names.split("|")), "")
        if name and mark != ":+":
            used.append(name)
            return environ[name]
        if mark is None:
            raise OgxError(400, f"{where}: the environment variable {names} is not set")
        return operand if name or mark == ":=" else ""

    inner = ENV_REFERENCE.sub(value_of, node)
    text = ENV_REFERENCE.sub(value_of, inner)  # a default may itself hold a reference
    return Text(text).at((*used, where)[0])


def path_of(where: str, name: str) -> str:
    """A path and a name: `my.json` -> `my.json: server` -> `my.json: server.port`."""
    return f"{where}{'.' if ': ' in where else ': '}{name}"


def checked(value: Any, table: Any, where: str) -> Any:
    """A part of a file with usual values for what it lacks; OgxError(400) for unknown names and
    wrong types. Strings may stand for flags and numbers, since variables hold nothing else."""
    where = getattr(value, "place", where)
    if table is None or callable(table):
        return table(value, where) if table else value
    if value is None:
        value = type(table)() if isinstance(table, (dict, list)) else table
    given, expected = value, TYPE_NAMES[type(table)]
    if isinstance(value, str) and isinstance(table, NUMBER):  # a flag is a number, too
        given = json_or_none(value.lower())
    if type(table) in NUMBER:
        if type(given) in NUMBER and 0 <= given < 1e6:
            return float(given)
        expected = "a number from 0 to 999999 (run --help tells its unit)"
    elif isinstance(given, type(table)):
        if isinstance(given, dict):
            return checked_object(given, table, where)
        if isinstance(given, list):
            return [checked(item, table[0], f"{where}[{i}]") for i, item in enumerate(given)]
        return Text(given).at(where) if isinstance(given, str) else given
    raise wrong_value(where, expected, value)


def checked_object(node: Json, table: Mapping[Any, Any], where: str) -> Json:
    for name in node:
        if not {name, ...} & table.keys():
            raise OgxError(400, f"{path_of(where, name)}: unknown key, expected "
                                f"{', '.join(table)}")
    return {name: checked(node.get(name), table.get(name, table.get(...)), path_of(where, name))
            for name in {**table, **node} if name is not ...}


def provider_or_none(value: Any, where: str) -> Provider | None:
    """The provider of an entry; None where an empty provider_id switches it off."""
    if isinstance(value, dict) and not value.get("provider_id"):
        return None
    entry = checked(value, ENTRY, where)
    if not re.fullmatch(r"[A-Za-z0-9._-]+", entry["provider_id"]):
        raise entry["provider_id"].wrong("letters, digits, '.', '_' or '-'")
    kind = PROVIDER_KINDS.get(entry["provider_type"].partition("remote::")[2])
    if kind is None:
        types = ", ".join(f"remote::{name}" for name in PROVIDER_KINDS)
        raise entry["provider_type"].wrong(f"one of {types}")
    settings = entry["config"]
    api_key = settings["api_key"].strip(AROUND)
    if re.search("[^!-~]", api_key):
        raise OgxError(400, f"{settings['api_key'].place}: expected a key of printable ASCII "
                            "without spaces")
    if settings["dialect"] not in ("auto", "responses", *BOTH):
        raise settings["dialect"].wrong('"auto", "messages", "chat" or "responses"')
    url, parts = checked_base_url(settings["base_url"], kind)
    own, key_header = settings["headers"], settings["key_header"]
    if key_header:
        kind = replace(kind, key_headers=())
        own[key_header] = Text(api_key).at(key_header.place)
    headers = checked_headers(own)
    if parts.username is not None:
        headers = {"authorization": basic_auth(parts), **headers}
    password = parts.password or ""
    secrets = [password, urllib.parse.unquote(password), *headers.values()]
    return Provider(
        entry["provider_id"], kind, url, api_key, settings["dialect"], settings["verify"],
        settings["ca_file"], tuple(headers.items()), (*secrets, *" ".join(secrets).split()),
        int(settings["max_parallel"]), settings["text_calls"])


def basic_auth(url: urllib.parse.SplitResult) -> str:
    pair = urllib.parse.unquote(f"{url.username}:{url.password or ''}")
    return "Basic " + binascii.b2a_base64(pair.encode(), newline=False).decode()


def checked_headers(own: dict[str, Text]) -> dict[str, str]:
    for name, value in own.items():
        if not HEADER.fullmatch(f"{name.lower()}\n{value.strip()}"):
            raise OgxError(400, f"{BAD_ID.sub('?', value.place)}: expected a header of printable "
                                "ASCII that doesn't frame the request")
    return {name.lower(): value.strip() for name, value in own.items() if value.strip()}


def checked_base_url(given: Text, kind: ProviderKind) -> tuple[str, urllib.parse.SplitResult]:
    """The URL without its user and a trailing slash, and all its parts. Without a scheme it gets
    `http://` where servers are local or it has a port, without a path the usual one."""
    url = given.strip(AROUND) or kind.base_url
    is_local = kind.enabled_by == "url" or re.match("[^/]+:[0-9]", url)
    if url and "://" not in url and is_local:
        url = "http://" + url
    parts = url_parts(url)
    if parts is None:
        before, _, rest = url.rpartition("@")  # before it may be a password, behind a ? a key
        shown, *query = re.split("[?#]", rest)
        words = "a URL that ends before ? and #" if query else "a URL like http://localhost:8000/v1"
        raise wrong_value(given.place, words, "***@" * bool(before) + shown)
    path = parts.path.rstrip("/")
    for ending in ("/chat/completions", "/messages"):
        path = path.removesuffix(ending).rstrip("/")
    usual = urllib.parse.urlsplit(kind.base_url).path or kind.default_path
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path or usual}", parts


def target_or_auto(value: Any, where: str) -> Any:
    value = "auto" if value in (None, "") else value
    if not 1 <= len(as_list(value)) <= 32 or not all(map(is_id, as_list(value))):
        raise wrong_value(where, f"an id of 1 to {MAX_ID} characters or a list of them, "
                                 "at most 32 of them", value)
    return value


def alias_from_entry(entry: Json, provider_ids: Collection[str]) -> Alias:
    model_id = entry["model_id"]
    if not is_id(model_id) or model_id.strip() != model_id:
        raise model_id.wrong("1 to 256 characters without control characters or outer spaces")
    if entry["model_type"] != "llm":
        raise entry["model_type"].wrong('"llm"')
    owners = sorted(["all", *provider_ids])
    if entry["provider_id"] not in owners:
        raise entry["provider_id"].wrong(f"a configured provider ({', '.join(owners)})")
    target = entry["provider_model_id"]
    if isinstance(target, list):
        return Alias(model_id, "all", target[0], tuple(target))
    return Alias(model_id, entry["provider_id"], target)


# What the objects of a file hold: usual values, whose types count; None: any value; `...`: any
# other name; or a function of the value, None where it's missing, and its place.
ALIAS: Json = {"model_id": "", "provider_id": "all", "provider_model_id": target_or_auto,
               "model_type": "llm"}
ENTRY: Json = {"provider_id": "", "provider_type": "", "config": {
    "base_url": "", "api_key": "", "dialect": "auto", "verify": True, "ca_file": "",
    "headers": {...: ""}, "key_header": "", "max_parallel": 0, "text_calls": True}}
FILE: Json = {
    "version": None, "distro_name": None, "providers": {"inference": [provider_or_none], ...: None},
    "registered_resources": {"models": [ALIAS], ...: None},
    "server": {
        "host": DEFAULT_HOST, "discover_local": True, "retries": 3, "retry_seconds": 5,
        "port": lambda value, where: port_number(DEFAULT_PORT if value is None else value, where),
        "host_names": "", "show_thinking": True, **asdict(Limits())}}


def config_from_json(tree: Any, source: str, environ: Mapping[str, str]) -> Config:
    root = checked(expanded(tree, environ, source), FILE, source)
    server, providers = root["server"], [p for p in root["providers"]["inference"] if p]
    ids = [provider.id for provider in providers]
    for provider_id in ids:
        if ids.count(provider_id) > 1:
            raise OgxError(400, f"{source}: two providers have the provider_id '{provider_id}'")
    aliases = [alias_from_entry(entry, ids) for entry in root["registered_resources"]["models"]]
    tiers = {tier: environ.get(tier_variable(tier), "") for tier in TIERS}
    usual = {f"OGX_{name.upper()}": server[name] for name in asdict(Limits())}
    limits = checked({name: environ.get(name) or None for name in usual}, usual, "environment")
    return Config(
        server["host"], port_number(environ.get("OGX_PORT") or server["port"], "OGX_PORT"),
        tuple(providers), tuple(aliases), tiers, server["discover_local"], int(server["retries"]),
        server["retry_seconds"], Limits(*limits.values()),
        tuple(server["host_names"].lower().replace(",", " ").split()), server["show_thinking"])


# ======== Registry ===========================================================================
# Every answer is computed when asked, and so heals by itself when a provider comes or goes.

# Ids that aren't chat models, for lists that don't say; found with public model maps.
NOT_LLM = re.compile(
    r"(^|[-_./])(tts|image|veo|e5-)|embed|rerank|whisper|transcri|speech|audio|realtime|dall-?e|"
    r"imagen|flux|stable-diffusion|sdxl|canvas|nano-banana|moderation|guard|ocr|sora|video|t2v|"
    r"i2v|lyria|bge-|gte-|minilm|colbert|nomic|jina-|voyage-|m2-bert|davinci-00|babbage|orpheus|"
    r"playai|kokoro|parakeet|scribe|chirp|reward|computer-use|deep-research|"
    r"search-(api|preview)", re.I)
# Fields of list entries with the context window and the output limit, in tokens: Anthropic, vLLM,
# Groq, Together and OpenRouter, LM Studio, Mistral, Fireworks, llama.cpp.
CONTEXT_FIELDS = ("max_input_tokens", "max_model_len", "context_window", "context_length",
                  "loaded_context_length", "max_context_length", "contextLength", "n_ctx")
OUTPUT_FIELDS = ("max_completion_tokens", "max_output_length", "max_tokens")
PRO = re.compile(r"(^|[-_./])pro\b", re.I)
MOST_REGISTERED = 2000  # ids


@dataclass(frozen=True)
class Model:
    """A model that can be asked: its public id, and the id its provider knows it by."""

    id: str
    provider: Provider
    upstream_id: str
    created: int = 0  # seconds since 1970
    context: int | None = None  # tokens
    max_output: int | None = None  # tokens
    tools: bool = True  # its chat template has them, as far as its server tells
    warning: str = ""

    @functools.cached_property
    def listed_id(self) -> str:
        """The id its provider lists it by, whatever it was asked as."""
        return f"{self.provider.id}/{self.upstream_id}"

    @property
    def origin(self) -> str:
        return f"{self.provider.id}, model {self.upstream_id}"


def models_from_list(provider: Provider, payload: Any) -> list[Model]:
    """The LLMs of a provider's list: {"data": [...]}, {"models": [...]} or a bare list."""
    if isinstance(payload, dict):
        names = ("data", "models", "inferenceProfileSummaries", "modelSummaries")
        payload = next(filter(None, map(payload.get, names)), [])
    models: dict[str, Model] = {}
    loaded = set()
    for entry in map(dict_or_empty, as_list(payload)):
        ids = map(entry.get, ("id", "name", "inferenceProfileId", "modelId"))
        upstream_id: Any = next(filter(None, ids), None)
        if not is_id(upstream_id) or not is_llm(upstream_id, entry):
            continue
        upstream_id = re.sub("^models/", "", upstream_id)
        created = whole_number(entry.get("created"))
        status = dict_or_empty(entry.get("status"))  # of llama-server where it has several
        loaded |= {upstream_id} if status.get("value") == "loaded" else set()
        limits = {"n_ctx": context_from_flags(as_list(status.get("args"))), **entry,
                  **dict_or_empty(entry.get("meta")), **dict_or_empty(entry.get("top_provider"))}
        models.setdefault(upstream_id, Model(
            f"{provider.id}/{upstream_id}", provider.for_id_or_path(upstream_id), upstream_id,
            created if created < 1 << 32 else 0,
            first_number(limits, *CONTEXT_FIELDS) or None,
            first_number(limits, *OUTPUT_FIELDS) or None))
    # Those in memory first, then the newest, which a tier means where nothing else is chosen; last
    # those called "pro", which tend to be slow and dear.
    return sorted(models.values(), key=lambda m: (
        m.upstream_id not in loaded, bool(PRO.search(m.upstream_id)), -m.created))


def context_from_flags(flags: Sequence[Any]) -> int:
    """The window that llama-server's command line gives a model; 0 where it doesn't."""
    words = " ".join(map(str, flags[:200])).replace("=", " ")
    match = re.search(r"(?:^| )(?:-c|--ctx-size) ([0-9]{1,9})(?: |$)", words)
    return int(match[1]) if match else 0


def model_with_props(model: Model, props: Any) -> Model:
    """The model with what llama.cpp's /props tell of its chat template."""
    capabilities = dict_or_empty(dict_or_empty(props).get("chat_template_caps"))
    if capabilities.get("supports_tools") is not False:
        return model
    words = "its chat template has no tools: start its server with another --chat-template"
    return replace(model, tools=False, warning=words)


def slots_from_props(props: Any) -> int:
    """1 where llama.cpp's /props tell of one slot, else 0."""
    return int(whole_number(dict_or_empty(props).get("total_slots")) == 1)


def is_llm(upstream_id: str, entry: Json) -> bool:
    """Whether a list entry is a chat model: by the provider's own fields, else by its name."""
    if entry.get("type") in ("llm", "vlm"):  # LM Studio
        return True
    capabilities = entry.get("capabilities")
    if isinstance(capabilities, dict) and "completion_chat" in capabilities:
        return bool(capabilities["completion_chat"])
    if isinstance(capabilities, list) and capabilities:
        return "completion" in capabilities
    modalities = dict_or_empty(entry.get("architecture")).get("output_modalities")
    if entry.get("supports_chat") is False or (
            isinstance(modalities, list) and "text" not in modalities):
        return False
    return not NOT_LLM.search(f"{entry.get('type')}/{upstream_id}")


def model_entry(model: Model, alias_of: str = "", learned: Sequence[str] = ()) -> Json:
    """A model as OpenAI's list and Anthropic's both have it; custom_metadata is OGX's."""
    created = datetime.fromtimestamp(model.created, timezone.utc)
    notes = {"alias_of": alias_of, "warning": model.warning, "learned": learned}
    metadata = {"model_type": "llm", "provider_id": model.provider.id,
                "provider_resource_id": model.upstream_id,
                **{name: value for name, value in notes.items() if value}}
    return {
        "id": model.id, "object": "model", "created": model.created, "owned_by": model.provider.id,
        "type": "model", "display_name": model.id, "created_at": f"{created:%Y-%m-%dT%H:%M:%SZ}",
        "lifecycle": "active", "capabilities": None, "max_input_tokens": model.context,
        "max_tokens": model.max_output, "custom_metadata": metadata}


class Registry:
    def __init__(self, config: Config) -> None:
        self.providers = {p.id: p for p in config.providers}
        self.aliases = {alias.model_id: alias for alias in config.aliases}
        self.tiers = dict(config.tiers)
        self.lists: dict[str, list[Model]] = {}  # provider id -> its LLMs
        self.problems: dict[str, str] = {}  # provider id -> why its last list failed
        self.passing: frozenset[str] = frozenset()  # ids of those whose problem may pass by itself
        self.native: dict[str, bool] = {}  # provider id -> whether it has a Messages API
        self.slots: dict[str, int] = {}  # provider id -> requests it takes at once, where it tells
        # Provider ids with the URLs of theirs that count no tokens.
        self.uncounted_urls: frozenset[tuple[str, str]] = frozenset()
        self._by_id: dict[str, Model] = {}
        self._lock = threading.Lock()

    def adopt(self, providers: Sequence[Provider]) -> None:
        """Take in the providers found when none was configured; without any, the demo model."""
        self.providers = {p.id: p for p in providers or [DEMO_PROVIDER]}

    def learn(self, provider_id: str, models: list[Model] | None = None,
              problem: str | None = None, native: bool | None = None,
              uncounted_url: str = "", passes: bool = False, slots: int | None = None) -> None:
        """Take in what was found out about a provider; what isn't given stays as it was. Tables
        are replaced and never altered, so readers need no lock."""
        with self._lock:
            if models is not None:
                self.lists = {**self.lists, provider_id: models}
                self._by_id = {model.id: model for model in self.models()}
            if problem is not None:
                problems = {**self.problems, provider_id: problem}
                self.problems = {k: v for k, v in problems.items() if v}
                self.passing = self.passing - {provider_id} | ({provider_id} if passes else set())
            if native is not None:  # it may be another server now
                self.native = {**self.native, provider_id: native}
                others = (pair for pair in self.uncounted_urls if pair[0] != provider_id)
                self.uncounted_urls = frozenset(others)
            if slots is not None:
                self.slots = {**self.slots, provider_id: slots}
            if uncounted_url:
                self.uncounted_urls |= {(provider_id, uncounted_url)}

    def models(self) -> list[Model]:
        return [model for pid in self.providers for model in self.lists.get(pid, [])]

    def listed(self, model: Model) -> Model | None:
        return self._by_id.get(model.listed_id)

    def resolve(self, model_id: str) -> Model:
        return self.chain(model_id)[0]

    def chain(self, model_id: str) -> list[Model]:
        """The models to try for an id, in order; OgxError(404) when there is none. An alias may
        name several. Other ids mean one, the first of: a listed id; an alias's fixed target; the
        tier's of ANTHROPIC_DEFAULT_*_MODEL; a bare id that one provider alone lists; for an alias
        of `auto` and any `claude-*` the first LLM, if possible of that family; `provider/anything`;
        `anyone/claude-*`."""
        wanted = model_id.strip().removesuffix("[1m]")
        alias = self.aliases.get(wanted)
        if alias and alias.provider_id not in (*self.providers, "all"):
            raise OgxError(404, f"the provider '{alias.provider_id}' of model '{wanted}' is not "
                                "configured")
        if alias and alias.targets:
            models = [self._explicit(target) for target in alias.targets]
        else:
            models = [self._named(wanted) or self._by_tier(wanted) or self._bare(wanted)
                      or self._automatic(wanted) or self._routed(wanted)]
        claude = re.search("(?<=[./:])claude-.*", wanted)  # behind its vendor
        if claude and not alias and not any(models):
            models = [*self.chain(claude[0])]
        if any(models):
            return [replace(model, id=model_id) for model in models if model]
        if alias:
            raise OgxError(404, f"no provider serves a target of model '{wanted[:200]}'")
        if self.passing and not self.models():
            raise self._nothing_serves(wanted, "all")
        hint = near_miss(model_id, [*(m.id for m in self.models()), *self.aliases])
        raise OgxError(404, f"model '{model_id[:200]}' not found.{hint} GET /v1/models lists what "
                            "there is.")

    def _explicit(self, wanted: str) -> Model | None:
        return self._named(wanted) or self._bare(wanted) or self._routed(wanted)

    def _named(self, wanted: str) -> Model | None:
        if wanted in self._by_id:
            return self._by_id[wanted]
        alias = self.aliases.get(wanted)
        if alias and alias.provider_model_id != "auto" and alias.provider_id != "all":
            return self._routed(f"{alias.provider_id}/{alias.provider_model_id}")
        return None

    def _by_tier(self, wanted: str) -> Model | None:
        tier = tier_of(wanted)
        chosen = self.tiers.get(tier, "").removesuffix("[1m]")
        if not chosen:
            return None
        model = self._explicit(chosen)
        if model is None and not tier_of(chosen):  # a tier that names a tier means the first LLM
            raise OgxError(404, f"{tier_variable(tier)} names '{chosen[:200]}', which no "
                                "provider here serves")
        return model

    def _automatic(self, wanted: str) -> Model | None:
        alias, tier = self.aliases.get(wanted), tier_of(wanted)
        if not (alias or tier or wanted.startswith("claude-")):
            return None
        alias = alias or Alias(wanted, "all", "auto")
        models = [m for m in self.models() if alias.provider_id in ("all", m.provider.id)
                  and alias.provider_model_id in ("auto", m.upstream_id)]
        if not models:
            raise self._nothing_serves(wanted, alias.provider_id)
        models.sort(key=lambda m: m.provider.id in self.problems)  # who may be down comes last
        family = (m for m in models if m.provider.id == models[0].provider.id
                  and tier_of(re.sub(r"^.*\.(?=claude-)", "", m.upstream_id)) == tier)
        return next(family, models[0]) if tier else models[0]

    def _nothing_serves(self, wanted: str, provider_id: str) -> OgxError:
        """404, but 503 while who could serve it is loading or down: clients wait then."""
        problems = {pid: why for pid, why in self.problems.items() if provider_id in ("all", pid)}
        words = "; ".join(f"{pid}: {why}" for pid, why in problems.items())
        words = f"no model to serve '{wanted[:200]}' ({words or 'no provider lists a model'})"
        passes = self.passing & {*problems}
        return OgxError(503 if passes else 404, words,
                        headers={"retry-after": "5"} if passes else {})

    def _bare(self, wanted: str) -> Model | None:
        same = [m for m in self.models() if m.upstream_id == wanted]
        return same[0] if len(same) == 1 else None

    def _routed(self, wanted: str) -> Model | None:
        provider_id, _, upstream_id = wanted.partition("/")
        if not upstream_id or provider_id not in self.providers:
            return None
        server = self.providers[provider_id].for_id_or_path(upstream_id)
        return self._by_id.get(wanted) or Model(wanted, server, upstream_id)


def registered_alias(body: Any, registry: Registry) -> Alias:
    """The alias that a POST /v1/models asks for; OgxError 400 or 409."""
    expect(body, "", {"model_id": str})
    given = {name: body[name] for name in ALIAS if body.get(name) not in (None, "")}
    alias = alias_from_entry(checked(given, ALIAS, "the model"), registry.providers)
    if any(model.id == alias.model_id for model in registry.models()):
        raise OgxError(409, f"model_id: '{alias.model_id}' is a provider's own id")
    if len({*registry.aliases, alias.model_id}) > MOST_REGISTERED:
        raise OgxError(400, f"model_id: {MOST_REGISTERED} are registered; delete one before")
    return alias


def near_miss(asked: str, known: Iterable[str]) -> str:
    """` Did you mean '...'?` where a known id is near to the one asked for, else nothing."""
    import difflib  # only now, to start sooner and smaller

    def parts(text: str) -> set[str]:
        return set(re.findall("[a-z]+|[0-9]+", text.lower()))

    # Comparing takes long: only with the ids that have most parts in common.
    asked, own = asked[:MAX_ID], parts(asked[:MAX_ID])
    likely = sorted(itertools.islice(known, 5000), key=lambda other: len(own & parts(other)))
    near = difflib.get_close_matches(asked, likely[-20:], 1, 0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def tier_of(model_id: str) -> str:
    """The tier in a Claude model's id of any version or date: claude-3-5-haiku-latest -> haiku."""
    if model_id.startswith("claude-"):
        return next((tier for tier in TIERS if tier in model_id), "")
    return model_id if model_id in TIERS else ""


# ======== Requests ===========================================================================

# Block types of Anthropic's OpenAPI and of its SDK 2.12 (messages and their betas, November 2026).
BLOCK_TYPES = frozenset((
    "text", "image", "document", "search_result", "thinking", "redacted_thinking", "tool_use",
    "tool_result", "tool_reference", "tool_addition", "tool_removal", "server_tool_use",
    "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result",
    "bash_code_execution_tool_result", "text_editor_code_execution_tool_result",
    "tool_search_tool_result", "advisor_tool_result", "mcp_tool_use", "mcp_tool_result",
    "mcp_tool_listing", "container_upload", "compaction", "fallback"))
BLOCK_FIELDS: dict[str, dict[str, type]] = {  # what translation relies on
    "text": {"text": str}, "image": {"source": dict}, "document": {"source": dict},
    "thinking": {"thinking": str}, "tool_use": {"id": str, "name": str, "input": dict},
    "tool_result": {"tool_use_id": str}, "search_result": {"content": list}}
SOURCE_FIELDS: dict[str, Json] = {
    "base64": {"media_type": str, "data": str}, "url": {"url": str}, "text": {"data": str},
    "file": {"file_id": str}, "content": {"content": CONTENT}}
OPTIONS = {"tools": list, "tool_choice": dict, "stop_sequences": list, "stream": bool,
           "temperature": NUMBER, "top_p": NUMBER, "top_k": int, "thinking": dict,
           "output_config": dict, "output_format": dict, "metadata": dict, "system": CONTENT}
EFFORTS = ("low", "medium", "high", "xhigh", "max")
PLACEHOLDER = "DeferredToolPlaceholder"  # Claude Code's; stands for tools that may be found later


def checked_json(body: bytes, counting: bool = False) -> Json:
    """Return the Messages request in a body, checked and in the form that the rest relies on."""
    request: Json = parsed_json(body)
    check_request(request, counting)
    for message in request["messages"]:
        if message.get("content") is None:  # a system message with nothing but an output_config
            message["content"] = []
    if request.get("output_format"):  # the older name
        config = request.get("output_config") or {}
        request["output_config"] = {"format": request["output_format"], **config}
    return request


def check_request(request: Any, counting: bool = False) -> None:
    """Raise OgxError(400) for the first wrong field; unknown ones are accepted."""
    expect(request, "", {"model": str})
    if not is_id(request["model"]) or not request["model"].strip():
        raise OgxError(400, f"model: expected 1 to {MAX_ID} characters, no control characters")
    expect(request, "", {"messages": list} if counting else {"messages": list, "max_tokens": int})
    if not counting and request["max_tokens"] < 1:
        raise OgxError(400, f"max_tokens: expected at least 1, got {request['max_tokens']}")
    if not request["messages"]:
        raise OgxError(400, "messages: expected at least one message")
    for index, message in enumerate(request["messages"]):
        where = f"messages.{index}"
        expect(message, where, {"role": ("user", "assistant", "system")})
        expect(message, where, {"content": CONTENT}, required=message["role"] != "system")
        expect(message, where, {"output_config": dict}, required=False)
        check_blocks(message.get("content"), f"{where}.content")
    check_options(request)
    check_blocks(request.get("system"), "system")


def check_blocks(content: Any, where: str) -> None:
    for index, block in enumerate(content if isinstance(content, list) else ()):
        here = f"{where}.{index}"
        if not isinstance(block, dict):
            raise wrong(here, "a content block", block)
        block_type = block.get("type")
        if not isinstance(block_type, str):
            shown = json.dumps(block_type)[:80]
            raise OgxError(400, f"{here}.type: expected the type of a content block, got {shown}")
        expect(block, here, BLOCK_FIELDS.get(block_type, {}))
        if block_type in ("tool_result", "search_result"):
            expect(block, here, {"content": CONTENT}, required=False)
            check_blocks(block.get("content"), f"{here}.content")
        elif block_type in ("image", "document"):
            here, source = f"{here}.source", block["source"]
            expect(source, here, {"type": tuple(SOURCE_FIELDS)})
            expect(source, here, SOURCE_FIELDS[source["type"]])
            if source["type"] == "content":
                check_blocks(source["content"], f"{here}.content")


def check_options(request: Json) -> None:
    expect(request, "", OPTIONS, required=False)
    for index, tool in enumerate(request.get("tools") or ()):
        where = f"tools.{index}"
        expect(tool, where, {"input_schema": dict, "type": str, "description": str}, required=False)
        expect(tool, where, {"name": str}, required=is_client_tool(tool))
    stops = request.get("stop_sequences") or ()
    for index, stop in enumerate(stops):
        if not isinstance(stop, str) or not stop:
            raise OgxError(400, f"stop_sequences.{index}: expected a string that isn't empty")
    if sum(map(len, stops)) > 4000:  # all text is searched for them
        raise OgxError(400, "stop_sequences: expected at most 4000 characters in all")
    choice = request.get("tool_choice")
    if choice:
        expect(choice, "tool_choice", {"type": ("auto", "any", "tool", "none")})
        expect(choice, "tool_choice", {"name": str}, required=choice["type"] == "tool")
    config = request.get("output_config") or {}
    expect(config, "output_config", {"effort": str, "format": dict}, required=False)
    wanted = config.get("format") or request.get("output_format") or {}
    if wanted.get("type") == "json_schema":
        expect(wanted, "output_config.format", {"schema": dict})


def is_client_tool(tool: Json) -> bool:
    """Whether the client runs the tool: custom tools, and Anthropic's with a schema of its own."""
    if tool.get("name") == PLACEHOLDER:
        return False
    return tool.get("type") in (None, "custom") or "input_schema" in tool


def refuse_untranslatable(request: Json, native: bool = False) -> None:
    """Raise OgxError(400) for what only Anthropic can do. The SDK's tool runner reads this error
    code and goes on without server-side threads. Where a 400 names `safeguards`, whose verdicts
    must never be made up, Claude Code checks tool calls by ordinary requests."""
    if request.get("thread"):
        raise OgxError(400, "thread: server-side threads are not supported here; send the whole "
                            "conversation", details={"error_code": "thread_unsupported_request",
                                                     "unsupported": ["thread"]})
    for name in ("safeguards", *(() if native else ("mcp_servers", "container"))):
        if request.get(name):
            raise OgxError(400, f"{name}: not supported by translated models")
    config = request.get("output_config") or {}
    if config.get("effort"):
        expect(config, "output_config", {"effort": EFFORTS})
    if config.get("format"):
        expect(config["format"], "output_config.format", {"type": ("json_schema",)})
    for index, message in enumerate(request["messages"]):
        content = message["content"]
        for place, block in enumerate(content if isinstance(content, list) else ()):
            if block["type"] not in BLOCK_TYPES:
                raise OgxError(400, f"messages.{index}.content.{place}.type: "
                    f"{json.dumps(block['type'])[:80]} is not a known type of content block")


def dropped_names(request: Json, sent: Json, all_of_them: bool) -> str:
    """Name for the log what a translated request leaves out; Claude Code's usual only on demand."""
    usual = {} if all_of_them else {
        "betas": request.get("betas"),
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}
    translated = {*OPTIONS, "model", "messages", "max_tokens"} - ({"top_k"} - sent.keys())
    names = [name for name, value in request.items()
             if not (name in translated or value in (None, usual.get(name)))]
    return ", ".join(BAD_ID.sub("?", name[:40]) for name in names[:10])


# ======== History ============================================================================

UNSEEN_BLOCKS = ("thinking", "redacted_thinking", "mcp_tool_listing", "fallback")
SIGNATURE_MARK = '{"ogx":'  # begins those of encode_signature()
BILLING_HEADER = "x-anthropic-billing-header:"  # varies per prompt and would spoil prefix caches
TOOL_ERROR = "[The tool reported an error]\n"
REMINDER = "<system-reminder>"  # begins what Claude Code, or the system, says in a user's message
UNICODE_JSON = json.JSONEncoder(ensure_ascii=False, check_circular=False)


def blocks_of(content: Any) -> list[Json]:
    """Return content as blocks without empty texts, which most providers refuse, and with the
    images of documents at the end."""
    if isinstance(content, str):
        return [text_part(content)] if content else []
    blocks = [b for b in content or () if b["type"] != "text" or b["text"]]
    for source in [b["source"] for b in blocks if b["type"] == "document"]:
        if source["type"] == "content" and isinstance(source["content"], list):
            blocks += [block for block in source["content"] if block["type"] == "image"]
    return blocks


def all_blocks(request: Json) -> Iterator[Json]:
    """The blocks of all messages, each tool result's after it."""
    for message in request["messages"]:
        for block in blocks_of(message["content"]):
            yield block
            if block["type"] == "tool_result":
                yield from blocks_of(block.get("content"))


def system_text(request: Json) -> str:
    texts = map(block_text, blocks_of(request.get("system")))
    return "\n\n".join(t for t in texts if not t.startswith(BILLING_HEADER))


@dataclass
class Turn:
    """A step of the history. Results answer each tool_use of the turn before, in that order."""

    role: str  # assistant, results, user or system
    blocks: list[Json]


def turns_from_messages(messages: Sequence[Json], system_anywhere: bool = True) -> list[Turn]:
    """Return turns in which every tool call is answered directly after it: late results move up,
    missing ones are made up, those without a call become text. Messages of one role are merged; the
    last is never the assistant's. Unless system messages may stand anywhere, they become marked
    text of the user: to move them would spoil prefix caches."""
    turns: list[Turn] = []
    missing: dict[str, Json] = {}  # results of the last calls, made up until they come
    for message in without_cleared(words_last(messages)):
        role, blocks = message["role"], blocks_of(message["content"])
        if role == "assistant":
            add_turn(turns, role, blocks)
            continue
        if role == "system" and blocks and not system_anywhere:
            text = "\n\n".join(map(block_text, blocks))
            marks = {k: v for block in blocks for k, v in block.items() if k == "cache_control"}
            text = f"{REMINDER}\n{text}\n</system-reminder>"
            role, blocks = "user", [{**text_part(text), **marks}]
        for block in blocks:
            if block["type"] in UNSEEN_BLOCKS:
                continue
            if turns and turns[-1].role == "assistant":
                missing = add_results(turns)
            if block["type"] != "tool_result":
                add_turn(turns, role, [block])
            elif block["tool_use_id"] in missing:
                missing.pop(block["tool_use_id"]).update({"content": None, **block})
            else:
                add_turn(turns, role, orphaned_result(block))
    if turns and turns[-1].role == "assistant":
        add_results(turns)
    if turns and turns[-1].role == "assistant" and any(map(block_text, turns[-1].blocks)):
        text = "[Go on from the very end of your last message, and repeat nothing of it.]"
        add_turn(turns, "user", [text_part(text)])
    return turns


def without_cleared(messages: Sequence[Json]) -> list[Json]:
    """Messages without those that the client wants gone by now."""
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    return [message for index, message in enumerate(messages)
            if message.get("clear_at") != "next_user_message" or index > last_user]


def words_last(messages: Sequence[Json]) -> Sequence[Json]:
    """Messages with what the system says directly after the first one before that one's own words.
    Claude Code describes the project there, in 9 KB: so a new session finds them in the server's
    prefix cache, and a small model reads the question last."""
    said = list(itertools.takewhile(
        lambda message: message["role"] == "system" and not message.get("clear_at"), messages[1:]))
    if not said or messages[0]["role"] != "user":
        return messages
    blocks = messages[0]["content"]
    blocks = [text_part(blocks)] if isinstance(blocks, str) else blocks
    reminders = list(itertools.takewhile(
        lambda block: str(block.get("text")).startswith(REMINDER), blocks))
    return [{"role": "user", "content": reminders}, *said,
            {"role": "user", "content": blocks[len(reminders) :]}, *messages[len(said) + 1 :]]


def add_results(turns: list[Turn]) -> dict[str, Json]:
    """Append made-up results of the last turn's calls, and return them by id."""
    content = "[No result: the tool call was interrupted before it answered.]"
    results = [{"type": "tool_result", "tool_use_id": block["id"], "content": content}
               for block in turns[-1].blocks if block["type"] == "tool_use"]
    add_turn(turns, "results", results)
    return {result["tool_use_id"]: result for result in results}


def add_turn(turns: list[Turn], role: str, blocks: list[Json]) -> None:
    if blocks and turns and turns[-1].role == role:
        turns[-1].blocks += blocks
    elif blocks:
        turns.append(Turn(role, blocks))


def orphaned_result(block: Json) -> list[Json]:
    title = f"[Result of tool call {block['tool_use_id']}]"
    if block.get("is_error"):
        title += f"\n{TOOL_ERROR}".rstrip()
    return [text_part(title), *blocks_of(block.get("content"))]


def tools_in_order(request: Json) -> list[Json]:
    """The tools with those that were loaded later at the end, in the order in which they were:
    the prompt up to them stays the same, for prefix caches."""
    tools = list(request.get("tools") or ())
    if not any(tool.get("defer_loading") for tool in tools):
        return tools
    names = [str(block.get("tool_name")) for block in all_blocks(request)
             if block["type"] == "tool_reference"]
    ranks = {name: rank for rank, name in reversed([*enumerate(names, 1)])}
    return sorted(tools, key=lambda tool: ranks.get(tool.get("name"), len(names) + 1)
                  if tool.get("defer_loading") else 0)


def block_text(block: Json) -> str:
    """Return a block in words, for upstreams that have no such block; "" for thinking."""
    block_type = block["type"]
    if block_type == "text":
        return str(block["text"])
    if block_type in UNSEEN_BLOCKS:
        return ""
    if block_type == "tool_result":
        return "\n".join(filter(None, map(block_text, orphaned_result(block))))
    if block_type == "document":
        return document_text(block)
    if block_type == "image":
        return f"[An image was here: {source_words(block['source'])}]"
    if block_type in ("tool_reference", "tool_addition", "tool_removal"):
        tool = dict_or_empty(block.get("tool"))
        name = block.get("tool_name") or tool.get("name") or json.dumps(tool.get("definition"))
        state = "not" if "definition" in tool else "now"
        state = "no longer" if block_type == "tool_removal" else state
        return f"[The tool {name} is {state} available.]"
    if block_type == "compaction":
        return str(block.get("content") or "[The summary of what was said is missing.]")
    if block_type == "search_result":
        text = "\n".join(map(block_text, blocks_of(block.get("content"))))
        return f"[Search result: {block.get('title')} <{block.get('source')}>]\n{text}"
    content = {k: v for k, v in block.items() if k not in ("type", "cache_control", "id")}
    content = without_keywords(content, ["encrypted_content"], [])  # Anthropic's alone
    return f"[{block_type}] {UNICODE_JSON.encode(content)}"


# What JSON schemas are made of (other keywords constrain, and the client checks them itself), what
# holds schemas by names that are no keywords, and what holds any values.
STRUCTURE = ("type", "description", "properties", "required", "items", "enum", "anyOf", "oneOf",
             "allOf", "$ref", "$defs", "definitions")
NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
VALUES = ("enum", "const", "default", "examples", "input")


def without_keywords(tree: Any, gone: Collection[str], lost: list[Any], path: str = "input") -> Any:
    """JSON without some fields or, in a schema, keywords, wherever they stand as such; the place,
    name and value of each go to `lost`. "*": without all but STRUCTURE."""
    if isinstance(tree, list):
        return [without_keywords(item, gone, lost, path) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kept: Json = {}
    for name, value in tree.items():
        if name in gone or ("*" in gone and name not in STRUCTURE):
            lost.append((path, name, value))
        elif name in NAMED_SCHEMAS and isinstance(value, dict):
            kept[name] = {k: without_keywords(v, gone, lost, f"{path}.{k}")
                          for k, v in value.items()}
        else:
            kept[name] = value if name in VALUES else without_keywords(value, gone, lost, path)
    return kept


def encode_signature(dialect: str, owner: str, state: Json) -> str:
    """Return what must go back to `owner`, a model, as a signature that the client keeps for us."""
    return COMPACT_JSON.encode({"ogx": dialect, "by": owner, **state})


def decode_signature(block: Json, dialect: str, owner: str) -> Json:
    state = dict_or_empty(json_or_none(str(block.get("signature") or block.get("data"))))
    return state if (state.get("ogx"), state.get("by")) == (dialect, owner) else {}


def document_text(block: Json) -> str:
    source, title = block["source"], str(block.get("title") or "document")
    context = f"{block['context']}\n" if block.get("context") else ""
    if source["type"] not in ("text", "content"):
        return (f"{context}[The document '{title}' could not be passed on to this model: "
                f"{source_words(source)}]")
    content = source["data"] if source["type"] == "text" else source["content"]
    text = "\n".join(map(block_text, blocks_of(content)))
    return f"<document title={UNICODE_JSON.encode(title)}>\n{context}{text}\n</document>"


def source_words(source: Json) -> str:
    """Return "image/png, 12 kB", a URL or a file's id."""
    if source["type"] == "base64":
        return f"{source['media_type']}, {len(source['data']) * 3 // 4000 + 1} kB"
    return str(source.get("url") or source.get("file_id") or source["type"])


# ======== Tokens =============================================================================
# Estimates, since providers count with vocabularies that we don't have.

# Bytes by class: "a" for small letters and most bytes of other scripts, "0" for digits, "." for
# punctuation; capitals, white space and the rest stay. "Hi, x = 12;" becomes "Ha. a . 00.".
BYTE_CLASSES = re.sub(rb"[!-/:-@\[-`{-~]", b".", re.sub(rb"[a-z\x80-\xc1\xca-\xe0]", b"a",
    re.sub(rb"[0-9]", b"0", bytes(range(256)).replace(b"\t", b" "))))
# Tokens of OpenAI's o200k, nearly: 0.428 for each byte, and these for each run of classes. Fitted
# to prose, code, JSON, listings and Claude Code's prompts: the mean of each is off by 3 %.
RUN_TOKENS = ((b"aa", -0.638), (b".a", 0.19), (b".0", 1.37), (b" 0", 2.51), (b" " * 6, -2.27),
              (b"." * 8, -3.02))


class TokenCounter:
    """Estimates tokens, and remembers those of 10,000 texts: each turn repeats all before it."""

    def __init__(self) -> None:
        self._tokens: dict[int, float] = {}  # by a text's hash

    def prompt(self, request: Json) -> tuple[float, int]:
        """Return the tokens of texts and tools, and of images and documents. Thinking doesn't
        count, since most upstreams drop it."""
        blocks = [b for message in request["messages"] for b in blocks_of(message["content"])]
        tokens = self.text(request["tools"]) if request.get("tools") else 0.0
        tokens += sum(map(self.text, (system_text(request), *map(block_text, blocks))))
        return tokens + 4 * len(request["messages"]) + 3, sum(map(attached_tokens, blocks))

    def text(self, value: Any) -> float:
        """Return the tokens of a text, or of a value's JSON."""
        key = hash(value) if isinstance(value, str) else fingerprint(value)
        tokens = self._tokens.get(key)
        if tokens is None:
            text = value if isinstance(value, str) else UNICODE_JSON.encode(value)
            data = text.encode("utf-8", "replace").translate(BYTE_CLASSES)
            tokens = 0.428 * len(data) + sum(data.count(part) * n for part, n in RUN_TOKENS)
            if len(self._tokens) >= 10_000:
                self._tokens.clear()
            self._tokens[key] = tokens
        return tokens


def attached_tokens(block: Json) -> int:
    block_type, source = block["type"], block.get("source") or {}
    if block_type == "tool_result":
        return sum(map(attached_tokens, blocks_of(block.get("content"))))
    if block_type not in ("image", "document") or source["type"] in ("text", "content"):
        return 0
    if block_type == "document" and source.get("data"):
        return len(source["data"]) * 3 // 4 // 40  # a page of 60 kB is about 1,500 tokens
    return 1_600  # Anthropic's upper bound for an image


# ======== Calls ==============================================================================
# Tool calls that a model wrote as text, since its server doesn't read them. Pure.

MOST_HELD, MOST_CALLS = 100_000, 100  # characters of held text; calls
CALL_MARKS = ("<tool_call>", "<function", "<invoke name=", "[TOOL_CALLS]", "<|python_tag|>",
              "<|tool_call", "<｜tool▁call")
A_MARK = re.compile("|".join(map(re.escape, CALL_MARKS)))
NAME = r"[\"']?(?:functions\.)?([\w.-]{1,200}?)[\"']?"
CALL_HEAD = re.compile(  # and perhaps its name
    rf"(?:(?:<(?:function_calls|tool_call)>\s*)?<(?:function=|invoke name=){NAME}>|"  # Qwen; Claude
    rf"<tool_call>\s*(?:{NAME}\s*(?=<arg_|</tool_call)|(?=[\[{{`]))|"  # GLM; Hermes, Qwen
    rf"\[TOOL_CALLS\]\s*(?:{NAME}(?:\[ARGS\])?\s*)??(?=[\[{{`])|"  # Mistral
    rf"<\|(?:python_tag|tool_call)\|>|<\|tool_call>call:{NAME}(?={{)|"  # Llama, Phi; Gemma
    r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?"  # DeepSeek
    rf"{NAME}(?:<｜tool▁sep｜>|\s*(?=[\{{`])))\s*(?:```(?:json)?\s*)?")
CALL_END = re.compile(  # and between calls
    r"(?:[\s;]|```|</(?:function_calls|tool_call|function|invoke)>|<｜tool▁calls?▁end｜>|"
    r"<\|/?\w{1,20}\|>|<tool_call\|>)*")
BARE_CALL = re.compile(  # a message that is a call without a mark, and its name
    r"\s*(?:```\w{0,20}\s*)?(?=(?:\[\s*)?(?:([A-Za-z_][\w.]{0,200})\(|"
    r"\{\s*\"(?:name\"\s*:\s*\"([^\"]{0,200})\"|(?:arguments|parameters|type|function)\")))")
PARAMETER = re.compile(r"<parameter(?:=| name=)[\"']?([^>\"']{1,200})[\"']?>(.*?)</parameter>\s*|"
                       r"<arg_key>(.{1,200}?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.S)
JSON_PART = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^"<`])*', re.S)
STRING_OR_COMMA = re.compile(r'("(?:[^"\\]|\\.)*"?)|,(?=\s*[\]}])', re.S)
GEMMA_PART = re.compile(r'<\|"\|>(.*?)<\|"\|>|(?<=[{,])\s*([\w-]{1,200})(?=:)', re.S)
LOOSE_JSON = json.JSONDecoder(strict=False)  # takes raw line breaks in strings


class CallReader:
    """Reads a text that is nothing but calls of these tools; what ends them may be missing."""

    def __init__(self, text: str, tools: Mapping[str, Json]) -> None:
        self._text, self._tools, self._at = text, tools, 0
        if "<|tool_call>" in text:  # Gemma's quotes aren't JSON's
            self._text = GEMMA_PART.sub(lambda m: json.dumps(m[2] or m[1]), text)
        self._found: list[tuple[str, Json]] = []
        self.repaired = False

    def calls(self) -> list[tuple[str, Json]]:
        """Pairs of a tool's name and its input; none where anything else stands in the text."""
        try:
            while self._at < len(self._text):
                head = self._skip(CALL_HEAD) or self._skip(BARE_CALL)
                if not head:
                    return []
                named = head.re is CALL_HEAD
                self.repaired |= named and "`" in head[0] and "▁" not in head[0]  # a fence
                self._read_call(next(filter(None, head.groups()), "") if named else "")
                self._skip(CALL_END)
            return self._found
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # ast's, too
            return []

    def _skip(self, pattern: re.Pattern[str]) -> Any:
        match = pattern.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return match

    def _read_call(self, name: str) -> None:
        if re.match(r"\{|\[\s*\{", self._text[self._at : self._at + 99]):
            value = self._json()
        else:
            value = self._parameters(name) if name else self._pythonic()
        self._add({"name": name, "arguments": value} if name else value)

    def _parameters(self, name: str) -> Json:
        schema = dict_or_empty(self._tools.get(name, {}).get("input_schema"))
        properties = dict_or_empty(schema.get("properties"))
        found = {}
        for match in iter(lambda: self._skip(PARAMETER), None):
            key, text = (match[1] or match[3]).strip(), match[2] or match[4] or ""
            found[key] = typed_value(text, dict_or_empty(properties.get(key)))
        return found

    def _pythonic(self) -> list[Json]:
        """Llama's and Gemma's `[f(a=1), g()]`."""
        import ast

        text = self._text[self._at :].partition("```")[0]
        self._at += len(text)
        tree, found = ast.parse(text[:10_000], mode="eval").body, []
        for call in tree.elts if isinstance(tree, ast.List) else [tree]:
            if not isinstance(call, ast.Call) or call.args:
                raise ValueError
            given = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
            found.append({"name": ast.unparse(call.func), "arguments": None not in given and given})
        return found

    def _add(self, node: Any) -> None:
        """Add the calls of a JSON object or list; ValueError for others."""
        for one in node if isinstance(node, list) else [node]:
            call = dict_or_empty(dict_or_empty(one).get("function")) or dict_or_empty(one)
            given = call.get("arguments", call.get("parameters"))
            given = json_or_none(given if isinstance(given, str) else UNICODE_JSON.encode(given))
            known = call.get("name") in self._tools and len(self._found) < MOST_CALLS
            if not known or not isinstance(given, dict):
                raise ValueError
            self._found.append((self._tools[call["name"]]["name"], given))

    def _json(self) -> Any:
        """The JSON value here, with raw line breaks, commas and closers put right."""
        for decoder in (PLAIN_JSON, LOOSE_JSON):
            with suppress(ValueError):
                value, self._at = decoder.raw_decode(self._text, self._at)
                self.repaired |= decoder is LOOSE_JSON
                return value
        part = STRING_OR_COMMA.sub(r"\1", self._skip(JSON_PART)[0])
        closers: list[str] = []
        for token in re.findall(r"[][{}]", STRING_OR_COMMA.sub("", part)):
            if token in "{[":
                closers.append("}" if token == "{" else "]")
            else:
                del closers[-1:]
        self.repaired = True
        return LOOSE_JSON.decode(part + "".join(reversed(closers)))


def typed_value(text: str, schema: Json) -> Any:
    """What was written without quotes, as a tool's schema has it."""
    text = text[text.startswith("\n") : len(text) - text.endswith("\n")]
    types = as_list(schema.get("type"))
    value = json_or_none(text.lower() if "boolean" in types else text)
    return text if value is None or not types or "string" in types else value


class CallHolder:
    """Holds a text back from where calls may begin, and hands on what are none, byte for byte."""

    repaired = False
    _begun = False  # a word of the message was handed on
    _fenced = _quoted = False  # what follows is code
    _ticks = ""  # one or two back-ticks before

    def __init__(self, tools: Mapping[str, Json]) -> None:
        self._tools = tools  # by the names that the model knows
        self._held: list[str] = []
        self._size = 0  # in characters

    def ignores(self, text: str) -> bool:
        """Whether a text may be handed on unfed."""
        plain = self._begun and not (self._size or self._is_code())
        return plain and not any(mark in text for mark in "<[`")

    def feed(self, text: str) -> str:
        """What may be handed on by now."""
        was_looked_at = self._size > 200
        self._held.append(text)
        self._size += len(text)
        if was_looked_at and self._size < MOST_HELD:
            return ""
        text, done = self._taken(), 0
        while done < len(text):
            start = self._start_of_calls(text, done)
            self._hand_on(text[done:start])
            done = start
            if start == len(text) or not self._is_code() and len(text) - start < MOST_HELD:
                break
            done += 1 if self._is_code() else MOST_HELD
            self._hand_on(text[start:done])
        self._held, self._size = [text[done:]], len(text) - done
        return text[:done]

    def end(self, whole: bool) -> tuple[list[tuple[str, Json]], str]:
        """The calls that the held text is if the model ended by itself, else that text."""
        text = self._taken()
        self._hand_on(text)
        reader = CallReader(text, self._tools)
        calls = reader.calls() if whole else []
        self.repaired = reader.repaired and bool(calls)
        return calls, "" if calls else text

    def _taken(self) -> str:
        text, self._held, self._size = "".join(self._held), [], 0
        return text

    def _is_code(self) -> bool:
        return self._fenced or self._quoted or bool(self._ticks)

    def _start_of_calls(self, text: str, begin: int) -> int:
        """Where calls begin, or may as far as the text goes; its end if nowhere."""
        if not self._begun and text.lstrip()[:1] in ("", *"{[`"):
            bare = BARE_CALL.match(text)
            if len(text) <= 100 or bare and {*bare.groups()} <= {None, *self._tools}:
                return 0
        for mark in A_MARK.finditer(text, begin):
            if len(text) - mark.end() < 120 or CALL_HEAD.match(text, mark.start()):
                return mark.start()
        return next((at for at in range(max(begin, len(text) - 14), len(text))
                     if any(one.startswith(text[at:]) for one in CALL_MARKS)), len(text))

    def _hand_on(self, text: str) -> None:
        """Follow the back-ticks of what is handed on: between them no call is meant."""
        self._begun |= text != ""
        text = self._ticks + text
        ticks = len(text) - len(text.rstrip("`"))
        self._ticks = "`" * ticks if ticks < 3 else ""
        text = text[: len(text) - len(self._ticks)]
        self._fenced ^= text.count("```") % 2 == 1
        _, line_break, line = text.rpartition("\n")
        before = self._quoted and not line_break
        self._quoted = (line.replace("```", "").count("`") + before) % 2 == 1


# ======== Events =============================================================================

MAX_EVENT = 8 * 1024 * 1024  # bytes of an upstream's
DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"),
          "tool_use": ("input_json_delta", "partial_json")}
STARTS = {"text": {"type": "text", "text": ""},
          "thinking": {"type": "thinking", "thinking": "", "signature": ""}}
DELTA_FIELDS = {**dict(DELTAS.values()), "signature_delta": "signature"}  # that hold text
DELTA_EVENT = ('event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
               '"delta":{"type":"%s","%s":%s}}\n\n')


def new_message(message_id: str, model: str, input_tokens: int) -> Json:
    """Return a message at its start, with every field that Anthropic's OpenAPI requires."""
    usage = {**Usage(input_tokens).as_json(), "cache_creation": None, "service_tier": "standard",
             "inference_geo": None, "speed": None}
    return {
        "id": message_id, "type": "message", "role": "assistant", "model": model, "content": [],
        "stop_reason": None, "stop_sequence": None, "stop_details": None, "container": None,
        "context_management": None, "usage": usage}


@dataclass
class Usage:
    """Tokens of one answer; input leaves out what was read from or written to a cache."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_written: int = 0
    searches: int = 0  # of the web, by the provider

    def as_json(self) -> Json:
        searches = {"web_search_requests": self.searches, "web_fetch_requests": 0}
        return {"input_tokens": self.input, "output_tokens": self.output,
                "cache_creation_input_tokens": self.cache_written,
                "cache_read_input_tokens": self.cache_read,
                "server_tool_use": searches if self.searches else None, "iterations": None}


@dataclass
class Block:
    """A block that is open or waits. To join its pieces each time would be quadratic."""

    key: Any  # what its fragments are recognised by
    type: str  # text, thinking, tool_use; or whole: one that needs no deltas
    content: Json | None = None  # at its start
    id: str = ""
    name: str = ""
    opened: bool = False
    pieces: list[str] = field(default_factory=list)  # of its text or input
    written: int = 0  # of them
    looks: int = 0  # how often may_close() has parsed the input
    signature: str = encode_signature("", "", {})  # some SDKs drop thinking that has none
    ended: bool = False

    def may_open(self) -> bool:
        return self.type != "tool_use" or self.name != ""

    def may_close(self) -> bool:
        """Whether another block may follow. To parse a call's input after each of many pieces would
        be quadratic: after 100 it waits for the end."""
        if self.type != "tool_use":
            return True
        self.looks += 1
        return self.looks <= 100 and is_json("".join(self.pieces))


def is_json(text: str) -> bool:
    return json_or_none(text) is not None or text.strip() == "null"


class MessageWriter:
    """Writes one message as events, which `take()` hands out. Blocks never overlap: _advance(),
    which alone opens and closes them, lets the others wait."""

    def __init__(self, message: Json, used_ids: Iterable[str] = (), stops: Sequence[str] = (),
                 hides_thinking: bool = False, holder: CallHolder | None = None) -> None:
        self._hides_thinking = hides_thinking
        self.holder = holder  # of calls that the model writes as text
        self._stops = stops  # for upstreams that don't look for them
        self._tail = ""  # of the text, held while it may be the beginning of a stop sequence
        self.stopped: str | None = None
        self._message: Json | None = message  # until it is started
        self.input_tokens: int = message["usage"]["input_tokens"]
        self._used_ids = set(used_ids)  # of tool calls; Claude Code drops a call whose id recurs
        self.events: list[Json | bytes] = []
        self._blocks: collections.deque[Block] = collections.deque()  # open, then those that wait
        self._by_key: dict[Any, Block] = {}  # these, and closed calls
        self._index = -1
        self.tools = 0
        self.wrote = False  # text or a call
        self.broken_input = False  # of a tool call
        self.repaired = self.wrote_calls = False  # of those that the model wrote as text

    def take(self) -> list[Json | bytes]:
        events, self.events = self.events, []
        return events

    def text(self, text: str) -> None:
        self._write_text(self.holder.feed(text) if self.holder and text else text)

    def _write_text(self, text: str) -> None:
        if self._stops:
            text = self._until_stop(text)
        if text:
            self._fragment("text", "text", text)

    def _until_stop(self, text: str) -> str:
        """Return the text up to a stop sequence, and hold an end that may yet become one."""
        text = "" if self.stopped else self._tail + text
        self._tail = ""
        matches = [(text.index(stop), stop) for stop in self._stops if stop in text]
        if matches:
            end, self.stopped = min(matches)
            return text[:end]
        for size in range(min(len(text), max(map(len, self._stops)) - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._tail = text[-size:]
                return text[:-size]
        return text

    def thinking(self, text: str) -> None:
        if text and not self._hides_thinking:
            self._write_held(whole=False)
            self._fragment("thinking", "thinking", text)

    def append_escaped_delta(self, block_type: str, escaped: str) -> bool:
        """Append a text in JSON's quotes to an open block; return False where none is open."""
        if self._stops or not self._blocks or self._blocks[0].type != block_type:
            return False
        if block_type == "text" and self.holder and not self.holder.ignores(escaped):
            return False
        event = DELTA_EVENT % (self._index, *DELTAS[block_type], escaped)
        self.events.append(event.encode("ascii"))
        return True

    def signature(self, signature: str) -> None:
        """Sign and end the thinking that is open, or write a block that stands for it."""
        if self._is_open("thinking"):
            self._blocks[0].signature = signature
            self._end_block()
        else:
            self.whole({"type": "redacted_thinking", "data": signature})

    def whole(self, content: Json) -> None:
        self._blocks.append(Block(object(), "whole", content))
        self._advance()

    def citation(self, citation: Json) -> None:
        if self._is_open("text"):
            self._delta("citations_delta", "citation", citation)

    def tool(self, key: Any, call_id: str, name: str, fragment: str) -> None:
        """Write a piece of a tool call; `key` tells calls apart, id and name may come later."""
        self._write_held(whole=False)
        self.holder = None  # who can call means no text as a call
        self._fragment(key, "tool_use", fragment, call_id, name)

    def finish(self, stop_reason: str, stop_sequence: str | None, usage: Usage) -> None:
        """Write what waits, and end the message; its calls may correct the reason."""
        self._start()
        self._write_held(stop_reason == "end_turn")
        self.end_text()
        self._advance(ending=True)
        if self.broken_input:
            stop_reason = "max_tokens"
        elif self.tools and stop_reason in ("end_turn", "stop_sequence"):
            stop_reason = "tool_use"
        elif not self.tools and stop_reason == "tool_use":
            stop_reason = "end_turn"
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence, "stop_details": None,
                 "container": None}
        self.events += [{"type": "message_delta", "delta": delta, "usage": usage.as_json(),
                         "context_management": None}, {"type": "message_stop"}]

    def _write_held(self, whole: bool) -> None:
        """Write the calls that the text held amounts to, or itself."""
        if not self.holder:
            return
        calls, text = self.holder.end(whole)
        self._write_text(text)
        self.repaired, self.wrote_calls = self.holder.repaired, bool(calls)
        for name, arguments in calls:
            self._fragment(object(), "tool_use", UNICODE_JSON.encode(arguments), "", name)

    def end_text(self) -> None:
        """Close an open text, as another one or an error follows: Claude Code then goes on from it.
        A tool call stays open, or half of one would count as whole."""
        if self._tail and self._message is None:  # what failed before it began may be tried again
            self._fragment("text", "text", self._tail)
            self._tail = ""
        if self._is_open("text", "whole"):
            self._end_block()

    def break_off(self) -> None:
        """Write what is held as an error follows, and close an open text."""
        if self._message is None:  # what failed before it began may be tried again
            self._write_held(whole=False)
        self.end_text()

    def _is_open(self, *types: str) -> bool:
        """Whether the first block is of these types; only a call may be first and not open yet."""
        return bool(self._blocks) and self._blocks[0].type in types

    def _end_block(self) -> None:
        self._blocks[0].ended = True
        self._advance()

    def _fragment(self, key: Any, block_type: str, text: str, call_id: str = "",
                  name: str = "") -> None:
        block = self._by_key.get(key)
        if block is None:
            self.wrote = self.wrote or block_type != "thinking"
            block = self._by_key[key] = Block(key, block_type, STARTS.get(block_type))
            self._blocks.append(block)
        if block.ended:
            return
        block.id = block.id or call_id
        block.name = block.name or name
        block.pieces.append(text)
        self._advance()

    def _advance(self, ending: bool = False) -> None:
        """Write what may be written by now: a block waits for the ones before it to close, which
        calls do when their input is complete, and a call for its name."""
        while self._blocks and self._blocks[0].may_open():
            block = self._blocks[0]
            if not block.opened:
                self._open(block)
            text = "".join(block.pieces[block.written:])
            if text:
                self._delta(*DELTAS[block.type], text)
            block.written = len(block.pieces)
            followed = len(self._blocks) > 1 and self._blocks[1].may_open()
            if not (ending or block.ended or (followed and block.may_close())):
                return
            self._close(self._blocks.popleft())
        if ending and self._blocks:
            raise OgxError(502, "the upstream sent a tool call without a name")

    def _start(self) -> None:
        if self._message is not None:
            self.events.append({"type": "message_start", "message": self._message})
            self._message = None

    def _open(self, block: Block) -> None:
        self._start()
        block.opened = True
        self._index += 1
        if block.type == "tool_use":
            self.tools += 1
            block.content = {"type": "tool_use", "id": self._fresh_id(block.id),
                             "name": block.name, "input": {}, "caller": {"type": "direct"}}
        self.events.append({"type": "content_block_start", "index": self._index,
                            "content_block": block.content})

    def _delta(self, delta_type: str, name: str, value: Any) -> None:
        self.events.append({"type": "content_block_delta", "index": self._index,
                            "delta": {"type": delta_type, name: value}})

    def _close(self, block: Block) -> None:
        block.ended = True
        if block.type == "thinking":
            self._delta("signature_delta", "signature", block.signature)
        if block.type != "tool_use":
            self._by_key.pop(block.key, None)
        elif not "".join(block.pieces).strip():
            self._delta(*DELTAS["tool_use"], "{}")
        elif not is_json("".join(block.pieces)):
            self.broken_input = True
        self.events.append({"type": "content_block_stop", "index": self._index})

    def _fresh_id(self, call_id: str) -> str:
        """Return an id of Anthropic's alphabet that the conversation doesn't have yet."""
        call_id = re.sub(r"[^A-Za-z0-9_-]", "_", call_id)
        if not call_id or call_id in self._used_ids:
            call_id = fresh_id("toolu")
        self._used_ids.add(call_id)
        return call_id


def fresh_id(prefix: str) -> str:
    """An id as Anthropic's look; it need not be hard to guess, so no system call is made for it."""
    return f"{prefix}_{random.getrandbits(96):024x}"


def message_from_events(events: Iterable[Json]) -> Json:
    folder = MessageFolder()
    for event in events:
        folder.add(event)
    return folder.message()


class MessageFolder:
    """Folds events into the message they amount to. `size` is what it holds, in characters."""

    def __init__(self) -> None:
        self.size = 0
        self._message: Json = {}
        self._pieces: dict[tuple[int, str], list[Any]] = {}  # by block and field

    def add(self, event: Json) -> None:
        event_type = event["type"]
        if event_type == "message_start":
            self._message = event["message"]
        elif event_type == "content_block_start":
            self._message["content"].append(dict(event["content_block"]))
            self.size += 500
        elif event_type == "content_block_delta":
            delta = event["delta"]
            name = DELTA_FIELDS.get(delta["type"], "citation")
            self._pieces.setdefault((event["index"], name), []).append(delta[name])
            self.size += len(delta[name]) + 50
        elif event_type == "message_delta":
            self._message.update(event["delta"])
            self._message["usage"].update(event["usage"])

    def message(self) -> Json:
        content = self._message["content"]
        for (index, name), pieces in self._pieces.items():
            if name == "citation":
                content[index]["citations"] = pieces
                continue
            text = "".join(pieces)
            if name != "partial_json":
                content[index][name] = text
            elif is_json(text):
                content[index]["input"] = json_or_none(text) or {}
            else:  # half a call must not run
                name = content[index]["name"]
                content[index] = text_part(f"[A call of {name} that broke off: {text}]")
        return self._message


def sse_bytes(event: Json | bytes) -> bytes:
    if isinstance(event, bytes):
        return event
    delta = event.get("delta", {})
    name = DELTA_FIELDS.get(delta.get("type"))
    if name:  # as nearly always: the same bytes as below at a sixth of the time
        text = json.encoder.encode_basestring_ascii(delta[name])
        return (DELTA_EVENT % (event["index"], delta["type"], name, text)).encode("ascii")
    return f"event: {event['type']}\ndata: {COMPACT_JSON.encode(event)}\n\n".encode("ascii")


class SseReader:
    """Reads the data of server-sent events from bytes cut anywhere (WHATWG HTML, 9.2)."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the data of each event that is complete now; OgxError(502) for too large ones."""
        if data[:6] == b"data: " and not (self._rest or self._data or self._after_cr):
            # Nearly all blocks are whole events of one line: the same as below, ten times as fast.
            events = data[6:-2].split(b"\n\ndata: ")
            if data.count(b"\n") == 2 * len(events) and b"\r" not in data and data[-2:] == b"\n\n":
                return events
        if self._after_cr and data[:1] == b"\n":  # the second half of a CRLF that was cut
            data, self._after_cr = data[1:], False
        if not data:
            return []
        self._after_cr = data.endswith(b"\r")
        self._rest += data
        if len(self._rest) + self._size > MAX_EVENT:
            raise OgxError(502, "the upstream sent an event that is too large")
        if b"\n" not in data and b"\r" not in data:  # not to split a long line again and again
            return []
        lines = bytes(self._rest).splitlines()
        self._rest = bytearray(b"" if data.endswith((b"\n", b"\r")) else lines.pop())
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
                self._size += len(line)
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data, self._size = [], 0
        return events

    def end(self) -> list[bytes]:
        return self.feed(b"\n\n") if self._rest or self._data else []


STOP_REASONS = (  # words in a finish_reason -> stop_reason; "": it broke off
    ("error|abort|cancel|fail|network|connect|time.?out|interrupt|resource|malformed|unexpected|"
     "incomplete|call_filter", ""),
    ("window|context|model_length", "model_context_window_exceeded"),
    ("length|max.{0,40}tokens|token_limit", "max_tokens"),
    ("filter|safety|sensitive|recitation|prohibited|block(list|ed)|spii|refus|guardrail|policy",
     "refusal"),
    ("stop|eos|end_turn|complete|done|tool|function_call", "end_turn"))


@functools.lru_cache(maxsize=100)
def known_stop_reason(words: str) -> str | None:
    return next((reason for stems, reason in STOP_REASONS if re.search(stems, words)), None)


class Translator:
    """Turns what an upstream sends into the events of one message; each dialect `_read`s it."""

    usage: Usage | None = None
    done = False
    _stop_reason = ""
    _stop_sequence: str | None = None
    _refused = False
    _holds = False  # the text until the end
    _chunks = 0
    _searches = 0

    def __init__(self, writer: MessageWriter, request: Json, model: Model) -> None:
        self.writer, self._model, self._origin = writer, model, model.origin

    def feed(self, data: bytes) -> None:
        """Write the events for the data of one server-sent event, or for a whole answer."""
        if self.done:
            return
        if data.strip() == b"[DONE]":
            self.end()
            return
        chunk = json_or_none(data)
        if chunk is None:
            raise unknown_data(f"{self._origin} sent no JSON but", data)
        self._chunks += 1
        try:
            self._read(chunk, data)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            raise unknown_data(f"{self._origin} sent what has no known shape:", data) from None
        if self.writer.stopped:
            self.end()

    def end(self) -> None:
        """Write the last events; OgxError(502) if the upstream stopped without saying why."""
        if self.done:
            return
        if not self._stop_reason and not self.writer.stopped:
            raise OgxError(502, f"{self._origin} ended the answer before it was complete")
        stop_sequence = self.writer.stopped or self._stop_sequence
        self._flush()
        self.done = True
        if self.usage is None:  # our estimate, and about a token a chunk
            self.usage = Usage(self.writer.input_tokens, self._chunks)
        self.usage.searches = self._searches
        reason = "stop_sequence" if stop_sequence else self._stop_reason
        self.writer.finish("refusal" if self._refused else reason, stop_sequence, self.usage)

    def _read(self, chunk: Json, data: bytes) -> None:
        raise NotImplementedError

    def _flush(self) -> None:
        """Write what is held until the end."""

    def _reason(self, finish: Any) -> str:
        """The stop_reason for an upstream's; OgxError where that tells of a failure, or is unknown
        and there is no answer."""
        words = one_line(str(finish))
        reason = known_stop_reason(words.lower())
        if reason is None and (self.writer.wrote or self._holds):
            reason = "end_turn"
        if not reason:
            raise upstream_error(Refusal(502, f"the answer broke off: {words}"), self._origin, {})
        return reason

    def _error(self, data: bytes) -> OgxError:
        return upstream_error(refusal_from_body(200, data), self._origin, {})


def usage_from_openai(usage: Json, estimate: int = 0) -> Usage:
    """Anthropic's usage from OpenAI's, whose input includes what was cached."""
    details = dict_or_empty(usage.get("prompt_tokens_details") or usage.get("input_tokens_details"))
    number = functools.partial(first_number, {**usage, **details})
    read = number("cached_tokens", "prompt_cache_hit_tokens")
    written = number("cache_write_tokens")
    prompt = number("prompt_tokens", "input_tokens") or estimate
    output = number("completion_tokens", "output_tokens")
    output = max(output, number("total_tokens") - prompt)  # xAI counts reasoning apart
    return Usage(max(0, prompt - read - written), output, read, written)


# ======== Chat ===============================================================================
# OpenAI's Chat Completions; a completion that wasn't streamed is one big chunk. Pure.

# Names of models that take reasoning_effort; others may refuse it.
REASONERS = re.compile(
    r"(^|[/:_-])(o[134](-|$)|gpt-(5|6|oss)|deepseek-(r|v4|reasoner)|qwq|magistral)|"
    r"thinking|reasoner|qwen3(?!.{0,250}(instruct|coder))", re.I)
UNIONS = ("anyOf", "oneOf", "allOf")
ROOT_UNIONS = (*UNIONS, "enum", "not")
TOOL_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")  # as OpenAI takes it
MAX_RULES = 200  # characters of a tool's description about keywords that its schema lost
MAX_INLINED = 30_000  # characters of definitions in a tool's schema
MEDIA_TYPES = {"image": ("image/jpeg", "image/png", "image/gif", "image/webp"),
               "document": ("application/pdf",)}
MAX_IMAGE = 5 * 1024 * 1024  # characters of base64, as at Anthropic
ANSWER_TOOL = "give_answer"  # is called with a JSON answer where no response_format is taken


def chat_request(request: Json, model: Model) -> Json:
    kind, request = model.provider.kind, with_tools_in_words(request, model)
    mode, schema = structured_output(request, kind)
    if mode == "tool":
        tool = {"name": ANSWER_TOOL, "description": "Give your answer.", "input_schema": schema}
        choice = {"type": "tool", "name": ANSWER_TOOL}
        request = {**request, "tools": [tool], "tool_choice": choice}
    most = request["max_tokens"]
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    return {
        "model": model.upstream_id, "messages": chat_messages(request, model),
        kind.max_tokens_field: min(most, model.max_output or most),
        **tool_fields(request, kind),
        **dict(kind.stop_fields if request.get("stop_sequences") else ()),
        **filled_in({
            "temperature": request.get("temperature"), "top_p": request.get("top_p"),
            "top_k": request.get("top_k") if kind.top_k else None,
            "stop": (request.get("stop_sequences") or [])[:4],  # the most it takes
            "prompt_cache_key": conversation_key(request) if kind.cache_key else "",
            "reasoning_effort": reasoning_effort(request, model),
            "response_format": {"type": "json_schema", "json_schema": answer_format(schema)}
            if mode == "format" else None}),
        **(streaming if request.get("stream") or 0 < kind.stream_above < most else {})}


def with_tools_in_words(request: Json, model: Model) -> Json:
    """The request with its tools in the system prompt, and calls and results as text, where the
    chat template has no tools, and the model has written calls before or one is demanded: then
    the answer's format leaves nothing else."""
    choice = request.get("tool_choice") or {}
    demanded, kind = choice.get("type") in ("any", "tool"), model.provider.kind
    tools = [chat_tool(tool, kind)["function"] for tool in sent_tools(request, kind)
             if choice.get("name") in (None, tool["name"])]
    if model.tools or not (tools and model.provider.reads_calls) or not (
            demanded or kind.tools_in_words):
        return request
    call = '{"name": "...", "arguments": {...}}'
    call = call if demanded else f"<tool_call>{call}</tool_call>"
    note = paragraphs(["You have these tools:", *map(UNICODE_JSON.encode, tools),
                       f"To call one, answer with nothing but\n{call}"])
    messages = [message if isinstance(message["content"], str) else {
        **message, "content": [call_as_text(block) for block in message["content"]]}
        for message in request["messages"]]
    calls = [{"type": "object", "required": ["name", "arguments"], "properties": {
        "name": {"const": tool["name"]}, "arguments": tool["parameters"]}} for tool in tools]
    config = {"output_config": {"format": {"schema": {"anyOf": calls}}}} if demanded else {}
    return {**request, **config, "tools": [], "tool_choice": None, "messages": messages,
            "system": [*blocks_of(request.get("system")), text_part(note)]}


def call_as_text(block: Json) -> Json:
    if block["type"] == "tool_use":
        call = UNICODE_JSON.encode({"name": block["name"], "arguments": block["input"]})
        return text_part(f"<tool_call>\n{call}\n</tool_call>")
    return text_part(block_text(block)) if block["type"] == "tool_result" else block


def filled_in(values: Json) -> Json:  # 0 and False are values
    return {name: value for name, value in values.items() if value not in (None, "", [], {})}


@dataclass(eq=False)
class ToolCall:
    id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)  # of its arguments
    size: int = 0  # of them, in characters

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)


def upstream_name(name: str) -> str:
    """A tool's name in 64 characters that OpenAI takes; Anthropic allows more."""
    if TOOL_NAME.fullmatch(name):
        return name
    return f"{re.sub('[^a-zA-Z0-9_-]', '_', name)[:55]}_{hex_digest(name)[:8]}"


class ToolNames:
    """The client's names of its tools, by what the upstream calls them."""

    def __init__(self, request: Json) -> None:
        names = [tool["name"] for tool in request.get("tools") or () if tool.get("name")]
        self._originals: dict[str, str] = {upstream_name(name): name for name in names}

    def continues(self, call: ToolCall, rest: str) -> bool:
        """Whether a call's name goes on so: some servers send it in pieces."""
        unfinished = not call.size and call.name not in self._originals
        return unfinished and any(n.startswith(call.name + rest) for n in self._originals)

    def back(self, name: str) -> str:
        """The client's name, without what chat templates leave around it (`functions.Bash`,
        `Bash<|channel|>commentary`, `<tool_call>Bash`)."""
        if name in self._originals:
            return self._originals[name]
        words = re.findall(r"[\w.-]+", re.sub(r"<[^<>]*>", " ", name))
        parts = (part for word in words for part in (word, word.split(".")[-1]))
        originals = (self._originals[part] for part in parts if part in self._originals)
        return next(originals, "".join(words[:1]) if "<" in name else name)


def chat_messages(request: Json, model: Model) -> list[Json]:
    """System prompt and history. The user's messages in a row become one or, where none may follow
    a tool's, are added to that."""
    kind = model.provider.kind
    mode, schema = structured_output(request, kind)
    note = "Your last answer must be JSON alone, valid against this JSON schema: "
    note = note + json.dumps(schema) if mode == "words" else ""
    system = paragraphs([system_text(request), unserved_tools_note(request, kind), note])
    messages: list[Json] = [{"role": "system", "content": system}] if system else []
    turns = turns_from_messages(request["messages"], kind.system_anywhere)
    history = (m for turn in turns for m in turn_messages(turn, model)
               if m["content"] or m.get("tool_calls"))
    for role, group in itertools.groupby(history, key=operator.itemgetter("role")):
        if role != "user":
            messages += group
            continue
        content: Any = [part for message in group for part in message["content"]]
        if all(part["type"] == "text" for part in content):  # not every server takes a list
            content = "\n\n".join(part["text"] for part in content)
        if messages and messages[-1]["role"] == "tool" and not kind.user_after_tool:
            if isinstance(content, str):
                messages[-1]["content"] += f"\n\n{content}"
                continue
            messages.append({"role": "assistant", "content": "Noted."})  # the results, that is
        messages.append({"role": "user", "content": content})
    return messages


def paragraphs(texts: Iterable[str]) -> str:
    return "\n\n".join(filter(None, texts))


def turn_messages(turn: Turn, model: Model) -> Iterator[Json]:
    """A turn as messages; a user's content is a list of parts."""
    kind = model.provider.kind
    if turn.role == "assistant":
        yield assistant_message(turn.blocks, model)
    elif turn.role == "results":
        yield from tool_messages(turn.blocks, kind)
    elif turn.role == "system":
        yield {"role": "system", "content": paragraphs(map(block_text, turn.blocks))}
    else:
        parts = [attachment_part(b, kind) or text_part(block_text(b)) for b in turn.blocks]
        yield {"role": "user", "content": parts}


def sent_tools(request: Json, kind: ProviderKind) -> list[Json]:
    tools = [tool for tool in tools_in_order(request) if is_client_tool(tool)]
    return tools[: kind.max_tools or None]


def tool_names(tools: Iterable[Json]) -> str:
    return ", ".join(tool.get("name") or str(tool.get("type")) for tool in tools)


def unserved_tools_note(request: Json, kind: ProviderKind, served: tuple[str, ...] = ()) -> str:
    """Words for the model about tools that it can't call; types in `served` run at the upstream."""
    sent = {PLACEHOLDER, *(tool["name"] for tool in sent_tools(request, kind))}
    names = tool_names(tool for tool in request.get("tools") or ()
                       if tool.get("name") not in sent
                       and not str(tool.get("type")).startswith(served))
    return names and f"These tools are not available through this gateway: {names}. " \
                     "If one of them is needed, tell the user so plainly."


def search_notice(request: Json) -> str:
    """Words for the user where all tools run at Anthropic: else WebSearch seems to find nothing."""
    tools = request.get("tools") or ()
    if not tools or any(map(is_client_tool, tools)):
        return ""
    return f"[{tool_names(tools)} is not available with this model; what follows is from its own " \
           "memory.]\n\n"


def assistant_message(blocks: Sequence[Json], model: Model) -> Json:
    kind = model.provider.kind
    extra = dict(kind.tool_call_extra)
    calls: list[Json] = []
    details: list[Json] = []
    for block in blocks:
        if block["type"] == "tool_use":
            function = {"name": upstream_name(block["name"]),
                        "arguments": UNICODE_JSON.encode(block["input"])}
            calls.append({"id": tool_call_id(block["id"], kind), "type": "function",
                          "function": function, **extra})
            extra = {}  # of parallel calls the first is signed
        elif kind.own_reasoning and block["type"] != "text":
            state = decode_signature(block, "chat", model.listed_id)
            extra = filled_in({"extra_content": state.get("extra_content")}) or extra
            details += as_list(state.get("reasoning_details"))
    text = paragraphs(block_text(b) for b in blocks if b["type"] != "tool_use")
    thoughts = "\n".join(b["thinking"] for b in blocks if b["type"] == "thinking")
    return {"role": "assistant", "content": text or None if calls else text,
            **filled_in({"reasoning_details": details, "tool_calls": calls}),
            **({kind.reasoning_echo: thoughts or " "} if kind.reasoning_echo else {})}


def tool_messages(results: Sequence[Json], kind: ProviderKind) -> Iterator[Json]:
    """A message per result, then a user's with their images and files."""
    attachments: list[Json] = []
    for result in results:
        texts = [TOOL_ERROR] if result.get("is_error") else []
        for block in blocks_of(result.get("content")):
            part = attachment_part(block, kind)
            if part is None:
                texts.append(block_text(block))
                continue
            label = f"[{block['type']} {len(attachments) // 2 + 1} from tool call " \
                    f"{result['tool_use_id']}]"
            texts.append(f"{label} follows in the next user message.")
            attachments += [text_part(f"{label}:"), part]
        yield {"role": "tool", "tool_call_id": tool_call_id(result["tool_use_id"], kind),
               "content": "\n".join(texts) or "(no output)"}
    if attachments:
        yield {"role": "user", "content": attachments}


def tool_call_id(call_id: str, kind: ProviderKind) -> str:
    if not kind.tool_ids or re.fullmatch(kind.tool_ids, call_id):
        return call_id
    return hex_digest(call_id)[:9]


def hex_digest(text: str) -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, ascii(text)).hex


def attachment_part(block: Json, kind: ProviderKind) -> Json | None:
    """An image or a PDF as a part of a message; None for what must become text."""
    source = block.get("source") or {}
    if block["type"] == "image" and source["type"] in ("base64", "url") and kind.images:
        return {"type": "image_url", "image_url": {"url": data_url(block)}}
    if block["type"] == "document" and source["type"] == "base64" and kind.files:
        name = str(block.get("title") or "document").removesuffix(".pdf") + ".pdf"  # tells the type
        return {"type": "file", "file": {"filename": name, "file_data": data_url(block)}}
    return None


def data_url(block: Json) -> str:
    """The URL of a source, a data: URL for base64. OgxError(400) has Anthropic's words, from which
    Claude Code knows that it must leave an image out."""
    source, place = block["source"], f"{block['type']}.source.base64"
    if source["type"] == "url":
        return str(source["url"])
    size, allowed = len(source["data"]), MEDIA_TYPES[block["type"]]
    if source["media_type"] not in allowed:
        raise OgxError(400, f"{place}.media_type: expected one of {', '.join(allowed)}")
    if block["type"] == "image" and size > MAX_IMAGE:
        excess = f"{size} bytes > {MAX_IMAGE} bytes"
        raise OgxError(400, f"{place}: image exceeds 5 MB maximum: {excess}")
    return f"data:{source['media_type']};base64,{source['data']}"


def tool_fields(request: Json, kind: ProviderKind) -> Json:
    tools = [chat_tool(tool, kind) for tool in sent_tools(request, kind)]
    if not tools:
        return {}
    body: Json = {"tools": tools}
    choice = request.get("tool_choice") or {}
    if choice.get("type") == "tool":
        name = upstream_name(choice["name"])
        named = [tool for tool in tools if tool["function"]["name"] == name]
        if named and kind.named_tool_choice:
            body["tool_choice"] = {"type": "function", "function": {"name": name}}
        elif named:
            body = {"tools": named, "tool_choice": "required"}
    elif choice:
        body["tool_choice"] = "required" if choice["type"] == "any" else choice["type"]
    if choice.get("disable_parallel_tool_use"):
        body["parallel_tool_calls"] = False
    return body


def chat_tool(tool: Json, kind: ProviderKind) -> Json:
    tool = plainer_tool(tool, kind)
    schema = {**tool["input_schema"], "type": "object"}
    schema["properties"] = schema.get("properties") or {}
    schema.pop("$schema", None)
    return {"type": "function", "function": filled_in({
        "name": upstream_name(tool["name"]), "description": tool.get("description"),
        "parameters": schema})}


def plainer_tool(tool: Json, kind: ProviderKind) -> Json:
    """A tool as the upstream takes it; the description tells what short rules the schema lost."""
    schema, refused = tool.get("input_schema") or {}, kind.refused_keywords
    plain = "$ref" in refused or not kind.root_unions
    unions = {k: schema[k] for k in ROOT_UNIONS if plain and k in schema}
    if unions or "$ref" in refused:
        schema = plain_schema(schema)
    lost: list[Any] = []
    schema = without_keywords(schema, refused, lost) if refused else schema
    note = ""
    for path, name, value in lost:
        rule = f"\n{path} has {name} {json.dumps(value)}"
        if name not in ("$schema", "title", "additionalProperties"):
            note += rule if len(note + rule) <= MAX_RULES else ""
    if unions:
        note += f"\n\nThe input must be valid against this JSON schema, too: {json.dumps(unions)}"
    description, most = tool.get("description") or "", kind.max_description or 1 << 30
    description = (description[: max(0, most - len(note))] + note)[:most]
    return {**tool, "input_schema": schema, **filled_in({"description": description})}


def plain_schema(root: Json) -> Json:
    """A schema with one type in each node, items in each array, no union at the root (it allows
    what any branch does), and what each `$ref` stands for in its place, while there is room."""
    room = MAX_INLINED

    def resolved(ref: Any, within: tuple[Any, ...]) -> Json:
        nonlocal room
        target: Any = root if ref not in within and room > 0 else {}
        for name in str(ref).split("/")[1:]:
            target = dict_or_empty(target).get(name)
        room -= len(str(target))
        return dict_or_empty(target) or {"type": "object"}

    def plain(node: Any, within: tuple[Any, ...] = (), at_root: bool = False) -> Json:
        node = {k: v for k, v in dict_or_empty(node).items() if k not in ("$defs", "definitions")}
        ref = node.pop("$ref", None)
        if ref is not None:
            return plain({**resolved(ref, within), **node}, (*within, ref), at_root)
        types = [name for name in as_list(node.pop("type", None)) if name != "null"]
        typed = {"type": types[0]} if types else {}
        options = [dict_or_empty(option) for k in UNIONS for option in as_list(node.pop(k, None))]
        branches = [plain({**typed, **o}, within) for o in options if o.get("type") != "null"]
        own = {k: plain(v, within) for k, v in dict_or_empty(node.pop("properties", None)).items()}
        if types[:1] == ["array"]:
            node["items"] = [*as_list(node.get("items")), {}][0] or {"type": "string"}
        node = {k: plain(v, within) if isinstance(v, dict) and k not in VALUES else v
                for k, v in node.items()}
        if own or at_root:
            gone = ROOT_UNIONS + ("additionalProperties",) * bool(branches)
            node = {k: v for k, v in node.items() if k not in gone}
            objects = [own, *(branch.get("properties", {}) for branch in branches)]
            return {**node, "type": "object", "properties": united_properties(objects)}
        if len(branches) > 1:
            return {**node, "anyOf": branches}
        return {**branches[0], **node} if branches else {**node, **typed}

    return plain(root, at_root=True)


def united_properties(objects: Iterable[Json]) -> Json:
    schemas: dict[str, list[Any]] = collections.defaultdict(list)
    for properties in objects:
        for name, schema in properties.items():
            if schemas[name][-1:] != [schema]:
                schemas[name].append(schema)
    return {name: {"anyOf": any_of} if any_of[1:] else any_of[0]
            for name, any_of in schemas.items()}


def conversation_key(request: Json) -> str:
    """At most 64 characters, for the prompt cache: the session that Claude Code writes as JSON into
    metadata.user_id, or a digest of that."""
    user_id = str((request.get("metadata") or {}).get("user_id") or "")
    session = dict_or_empty(json_or_none(user_id)).get("session_id")
    if isinstance(session, str) and 0 < len(session) <= 64 and session.isascii():
        return session
    return hex_digest(user_id) if user_id else ""


def reasoning_effort(request: Json, model: Model, default: str = "") -> str:
    """OpenAI's effort: the last asked for, or by the thinking budget; "" where none is taken."""
    thinking = request.get("thinking") or {}
    if not REASONERS.search(model.upstream_id[:MAX_ID]):
        return ""
    if thinking.get("type") == "disabled":
        return "none"
    configs = [m.get("output_config") or {} for m in (request, *request["messages"])]
    efforts = [c["effort"] for c in configs if c.get("effort") in EFFORTS]
    budget = thinking.get("budget_tokens")
    if efforts or thinking.get("type") != "enabled" or not isinstance(budget, int):
        return efforts[-1] if efforts else default
    return "low" if budget <= 2048 else "medium" if budget <= 8192 else "high"


def structured_output(request: Json, kind: ProviderKind) -> tuple[str, Json]:
    """How a JSON answer is asked for ("format", "tool", "words"; "" for none), and its schema."""
    schema: Json | None = ((request.get("output_config") or {}).get("format") or {}).get("schema")
    if schema is None:
        return "", {}
    has_tools = any(map(is_client_tool, request.get("tools") or ()))
    if kind.answer_by == "format" and (kind.format_with_tools or not has_tools):
        return "format", schema
    fits_tool = not has_tools and schema.get("type") in (None, "object")
    return ("tool" if fits_tool and kind.answer_by == "tool" else "words"), schema


def extracted_json(text: str, schema: Json) -> str:
    """The JSON in a model's words that fits the top of a schema; "" if there is none."""
    expected = {"object": dict, "array": list}.get(str(schema.get("type")), object)
    start = min((at for at in map(text.find, "[{") if at >= 0), default=0)
    for part in (text.strip(), text[start : max(map(text.rfind, "]}")) + 1]):
        value: Any = json_or_none(part)
        names = as_list(schema.get("required")) if isinstance(value, dict) else ()
        fits = value is not None and isinstance(value, expected)
        if fits and all(str(name) in value for name in names):
            return part
    return ""


def answer_format(schema: Json) -> Json:
    return {"name": "answer", "schema": schema, "strict": is_strict(schema)}


def is_strict(schema: Any) -> bool:
    """Whether every object closes its properties and requires all of them (OpenAI's rule)."""
    if isinstance(schema, list):
        return all(map(is_strict, schema))
    if not isinstance(schema, dict):
        return True
    properties, required = dict_or_empty(schema.get("properties")), as_list(schema.get("required"))
    closed = schema.get("additionalProperties") is False and all(p in required for p in properties)
    is_object = properties or schema.get("type") == "object"
    return (closed or not is_object) and all(map(is_strict, schema.values()))


class ChatTranslator(Translator):
    _answer: ToolCall | None = None  # of ANSWER_TOOL

    def __init__(self, writer: MessageWriter, request: Json, model: Model) -> None:
        super().__init__(writer, request, model)
        self._names = ToolNames(request)
        self._stops = request.get("stop_sequences") or ()
        self._calls: dict[Any, ToolCall] = {}  # by id, the last of each index, and of all by None
        self._tags = ThinkTagParser()
        self._details: dict[Any, Json] = {}  # reasoning that goes back as it came
        self._notice = search_notice(request)
        mode, self._schema = structured_output(request, model.provider.kind)
        self._holds = mode in ("tool", "words")  # since what isn't JSON is no part of the answer
        self._held: list[str] = []
        self._text = self._held.append if self._holds else writer.text
        self._template = ChunkTemplate(bool(request.get("stream")) and not self._stops)

    def feed(self, data: bytes) -> None:
        text, block_type = self._template.text_in(data), self._template.block_type
        if text and not self._details and self.writer.append_escaped_delta(block_type, text):
            self._chunks += 1
            return
        count = len(self.writer.events)
        super().feed(data)
        learns = self._template.tries and not self._details and self._tags.block_type != "thinking"
        if learns and len(self.writer.events) == count + 1:  # tagged thinking may end in any chunk
            self._template.learn(data, self.writer.events[-1])

    def _read(self, chunk: Json, data: bytes) -> None:
        choices = chunk.get("choices") or ()
        if is_failure(chunk) or any(choice.get("error") for choice in choices):
            raise self._error(data)
        for holder in (*choices, dict_or_empty(chunk.get("x_groq")), chunk):
            if isinstance(holder.get("usage"), dict):
                self.usage = usage_from_openai(holder["usage"])
        for choice in choices:
            self._read_choice(choice)
        for holder in (*choices, dict_or_empty(chunk.get("__verbose"))):  # vLLM's, llama.cpp's
            told = holder.get("stop_reason") or holder.get("stopping_word")
            self._stop_sequence = told if told in self._stops else self._stop_sequence

    def _flush(self) -> None:
        """Write what is held, or only the JSON in it; OgxError(502) for an answer without any."""
        self._write(self._tags.end())
        self._sign()
        if not self._holds:
            return
        text = self._answer.arguments if self._answer else "".join(self._held)
        answer = extracted_json(text, self._schema)
        complete = self._stop_reason == "end_turn" and not self._stop_sequence
        if complete and not (answer or self._refused or self.writer.tools):
            raise OgxError(502, f"{self._origin} answered with no JSON of the shape that was asked "
                                "for", quote=f" but: {one_line(text)}")
        self.writer.text(answer or text)

    def _sign(self) -> None:
        if self._details:
            self._write_state({"reasoning_details": list(self._details.values())})
            self._details = {}

    def _write_state(self, state: Json) -> None:
        self.writer.signature(encode_signature("chat", self._model.listed_id, state))

    def _read_choice(self, choice: Json) -> None:
        self.writer.text(self._notice)
        self._notice = ""
        delta = choice.get("delta") or choice.get("message") or {}
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(reasoning, str):
            self.writer.thinking(reasoning)
        if delta.get("reasoning_details"):
            self._read_details(delta["reasoning_details"], bool(reasoning))
        if delta.get("content"):
            self._read_content(delta["content"])
        if delta.get("refusal"):
            self._refused = True
            self.writer.text(delta["refusal"])
        for fragment in delta.get("tool_calls") or ():
            self._read_call(fragment)
        if choice.get("finish_reason"):
            self._stop_reason = self._reason(choice["finish_reason"])

    def _read_details(self, details: Sequence[Json], shown: bool) -> None:
        """Take in OpenRouter's reasoning, which goes back with its pieces joined."""
        for detail in details:
            self.writer.thinking("" if shown else detail.get("text") or detail.get("summary") or "")
            key = (detail.get("index", len(self._details)), detail.get("type"))
            whole = self._details.setdefault(key, {})
            for name, value in detail.items():
                if value is not None:
                    is_piece = name in ("text", "summary")
                    whole[name] = whole.get(name, "") + value if is_piece else value

    def _read_content(self, content: Any) -> None:
        """Take in text, or Mistral's list of parts."""
        self._sign()
        if isinstance(content, str):
            self._write(self._tags.feed(content))
            return
        for part in content if isinstance(content, list) else ():
            if part.get("type") == "thinking":
                thoughts = part.get("thinking") or ()
                self.writer.thinking("".join(t.get("text", "") for t in thoughts))
            elif isinstance(part.get("text"), str):
                self._text(part["text"])

    def _write(self, pieces: Iterable[tuple[str, str]]) -> None:
        for block_type, text in pieces:
            (self.writer.thinking if block_type == "thinking" else self._text)(text)

    def _read_call(self, fragment: Json) -> None:
        self._sign()
        self._write(piece for piece in self._tags.end() if piece[1].strip())
        function = fragment.get("function") or {}
        call_id = str(fragment.get("id") or "")
        name = self._names.back(function.get("name") or "")
        arguments = function.get("arguments") or ""
        if isinstance(arguments, dict):  # some servers send the object itself
            arguments = json.dumps(arguments)
        call = self._call_of(fragment.get("index"), call_id, name)
        if self._names.continues(call, name):
            call.name = self._names.back(call.name + name)
        call.id, call.name = call.id or call_id, call.name or name
        if call_id:
            self._calls[call_id] = call
        if arguments and call.size == 2 and call.arguments == "{}":  # in place of those to come
            call.pieces, call.size = [], 0
        if 0 < call.size <= len(arguments) and arguments.startswith(call.arguments):
            arguments = arguments[call.size :]  # they came from the beginning again
        if fragment.get("extra_content") and not call.size:  # Gemini's signature
            self._write_state({"extra_content": fragment["extra_content"]})
        call.pieces.append(arguments)
        call.size += len(arguments)
        if self._holds and call.name == ANSWER_TOOL:
            self._answer = self._answer or call
            return
        held = arguments == "{}" and call.size == 2
        name = "" if self._names.continues(call, "") else call.name
        self.writer.tool(call, call.id, name, "" if held else arguments)

    def _call_of(self, index: Any, call_id: str, name: str) -> ToolCall:
        """The call that a fragment belongs to. Servers leave out index, id or both, number every
        call 0, or repeat id and name. A new id begins a call; without ids so does a new name, or
        the same when the call's arguments are whole."""
        if call_id in self._calls:
            return self._calls[call_id]
        call = self._calls.get(index)
        is_new = call is None or bool(call.id and call_id)
        if call and call.name and name and not call_id:
            is_new = not self._names.continues(call, name) and (
                index is None or call.name != name or is_json(call.arguments))
        if call is None or is_new:
            call = self._calls[None] = self._calls[index] = ToolCall()
        return call


class ChunkTemplate:
    """What a stream's chunks have before and after their text. One that differs in nothing else,
    but OpenAI's noise, needn't be parsed, which would be two thirds of the work."""

    PLAIN = re.compile(  # text escaped just as we would
        rb'"(?:[^"\\\x00-\x1f\x7f-\xff]|\\["\\bfnrt]|\\u(?!00[0-7])[0-9a-f]{4})+"')
    NOISE = re.compile(rb'"obfuscation": ?"[A-Za-z0-9]*"')

    block_type = ""  # of the block that the text belongs to
    _prefix = b"\0"  # with which no chunk begins
    _suffix = b""  # without noise

    def __init__(self, learns: bool) -> None:
        self.tries = 10 * learns  # chunks to learn from until one is recognised

    def text_in(self, chunk: bytes) -> str | None:
        """The text in JSON's quotes; None for a chunk that must be parsed."""
        if not chunk.startswith(self._prefix) or len(chunk) > MAX_HEAD:
            return None
        match = self.PLAIN.match(chunk, len(self._prefix))
        suffix = chunk[match.end() :] if match else b""
        if suffix != self._suffix and self.NOISE.sub(b"", suffix) != self._suffix or not match:
            return None
        self.tries = 10
        return match.group().decode("ascii")

    def learn(self, chunk: bytes, event: Json | bytes) -> None:
        """Learn from a chunk and its one event."""
        delta = dict_or_empty(event).get("delta") or {}
        for block_type in delta.keys() & {"text", "thinking"}:
            text = json.encoder.encode_basestring_ascii(delta[block_type]).encode("ascii")
            prefix, found, suffix = chunk.partition(text)
            if found and text not in suffix and self.PLAIN.fullmatch(text):
                self.block_type, self._prefix = block_type, prefix
                self._suffix = self.NOISE.sub(b"", suffix)
        self.tries -= 1


class ThinkTagParser:
    """Tells text from the thinking that some servers leave at its beginning, between tags."""

    TAGS = ("<think>", "<thinking>", "<thought>")

    block_type = ""  # "thinking" or "text", once it is known
    _begun = False  # the first words after a tag, or without one, came
    _end_tag = ""

    def __init__(self) -> None:
        self._buffer: list[str] = []

    def feed(self, text: str) -> list[tuple[str, str]]:
        """Pairs of block type and text."""
        self._buffer.append(text)
        if not self._begun and not text.strip():  # it is joined once, with the words behind it
            return []
        words = "".join(self._buffer)
        self._buffer = []
        if not self.block_type:
            name, mark, rest = words.lstrip().partition(">")
            if name + mark in self.TAGS:
                self.block_type, self._end_tag = "thinking", f"</{name[1:]}>"
                return self.feed(rest)
            if any(tag.startswith(name + mark) for tag in self.TAGS):
                self._buffer = [words]
                return []
            self.block_type = "text"
        elif not self._begun:  # white space after a tag is the tag's
            words = words.lstrip()
        self._begun = True
        if self.block_type == "text":
            return [("text", words)]
        thought, end_tag, rest = words.partition(self._end_tag)
        if end_tag:
            self.block_type, self._begun = "text", False
            return [("thinking", thought), *self.feed(rest)]
        before, mark, partial = words.rpartition("<")
        if self._end_tag.startswith(mark + partial):
            words, self._buffer = before, [mark + partial]
        return [("thinking", words)]

    def end(self) -> list[tuple[str, str]]:
        """What is buffered, but for white space after a tag."""
        words = "".join(self._buffer) if self._begun or not self.block_type else ""
        self._buffer = []
        return [(self.block_type or "text", words)]


# ======== Messages ===========================================================================
# Upstreams that speak Anthropic's format: the client's bytes go there and theirs come back, but for
# the model's id and what a row of PROVIDER_KINDS says the server can't take. Pure.

CORE_BLOCKS = ("text", "image", "document", "search_result", "thinking", "redacted_thinking",
               "tool_use", "tool_result", "tool_reference")
EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
MODEL_FIELD = re.compile(rb'("model"\s*:\s*)"(?:[^"\\]|\\.)*"')
# Quotes and line breaks in a model's text are escaped, so none of these can stand in one.
LAST_EVENT = re.compile(
    rb'[\r\n](?:event: ?(?:message_stop|error)\b|'
    rb'data: ?\{"(?:type": ?"error"|error": ?["{]|object": ?"error"))|"type": ?"message_stop"')
THINKS_ALOUD = re.compile(rb'"text_delta",\s?"text":\s?"(?:\\n){0,4}(?:<|\\u003c)'
                          rb'(?:think|thinking|thought)(?:>|\\u003e)')  # Go escapes brackets
USAGE_FIELDS = ("input_tokens", "output_tokens", "cache_read_input_tokens",
                "cache_creation_input_tokens")


def unsupported_features(request: Json, kind: ProviderKind) -> set[str]:
    """What of ProviderKind.native_gaps a request has, which is translated then."""
    gaps = {*kind.native_gaps, *(["image"] if not kind.images else [])}
    if not gaps:
        return set()
    blocks = list(all_blocks(request))
    tools, choice = request.get("tools") or (), request.get("tool_choice")
    features = {
        "output_format": (request.get("output_config") or {}).get("format"),
        "tool_choice": choice and choice != {"type": "auto"},
        "server_tool": not all(is_client_tool(t) or t.get("name") == PLACEHOLDER for t in tools),
        "url_image": any(b["type"] == "image" and b["source"]["type"] != "base64" for b in blocks),
        "is_error": any(block.get("is_error") for block in blocks)}
    used = {b["type"] if b["type"] in CORE_BLOCKS else "server_tool" for b in blocks}
    return gaps & {*used, *(name for name, is_used in features.items() if is_used)}


def messages_request(request: Json, model: Model) -> Json:
    """The request without what is Anthropic's own business, or the row says isn't taken."""
    kind, body = model.provider.kind, {**request, "model": model.upstream_id}
    body.pop("output_format", None)  # stands in output_config
    if not kind.is_anthropic:
        if isinstance(body.get("system"), list):
            body["system"] = [block for block in body["system"]
                              if not block_text(block).startswith(BILLING_HEADER)]
        if body.get("tools"):
            body["tools"] = [tool for tool in tools_in_order(request)
                             if tool.get("name") != PLACEHOLDER]
        body["messages"] = [m if m["role"] == "assistant" else plainer_content(m, kind)
                            for m in with_reminders(request["messages"])]
    if body.get("tools") and (kind.refused_keywords or kind.max_description):
        body["tools"] = [plainer_tool(tool, kind) if "input_schema" in tool else tool
                         for tool in body["tools"]]
    is_claude = kind.is_anthropic or "claude" in model.upstream_id.lower()
    body["messages"] = list(without_foreign_thoughts(body["messages"], is_claude))
    return body


def without_foreign_thoughts(messages: Iterable[Json], is_claude: bool) -> Iterator[Json]:
    """Messages without what is_foreign_thought(), or that would be empty then."""
    for message in messages:
        blocks = message["content"] if message["role"] == "assistant" else ""
        kept = [b for b in blocks if isinstance(b, str) or not is_foreign_thought(b, is_claude)]
        if len(kept) == len(blocks):
            yield message
        elif kept:
            yield {**message, "content": kept}


def with_reminders(messages: Sequence[Json]) -> Sequence[Json]:
    """Messages with the system's as the user's: servers move those up, which spoils caches."""
    if all(message["role"] != "system" for message in messages):
        return messages
    turns = turns_from_messages(messages, False)
    groups = itertools.groupby(turns, lambda turn: turn.role.replace("results", "user"))
    return [{"role": role, "content": [block for turn in group for block in turn.blocks]}
            for role, group in groups]


def plainer_content(holder: Json, kind: ProviderKind) -> Json:
    """A message or tool result, with words for images that the model can't see; a result's texts
    are joined, since some servers show only the first."""
    blocks = holder.get("content")
    if not isinstance(blocks, list):
        return holder
    blocks = [text_part(block_text(b)) if b["type"] == "image" and not kind.images
              else plainer_content(b, kind) if b["type"] == "tool_result" else b for b in blocks]
    if "tool_use_id" in holder:
        runs = [list(same) for _, same in itertools.groupby(blocks, operator.itemgetter("type"))]
        blocks = [block for same in runs for block in (same if same[0]["type"] != "text" else [
            {**same[-1], "text": "\n".join(text["text"] for text in same)}])]
    return {**holder, "content": blocks}


def finished_messages(body: Json) -> Json:
    """The body with a thinking budget below the output limit, which a lesson may have lowered."""
    thinking, most = body.get("thinking") or {}, body.get("max_tokens")
    budget = thinking.get("budget_tokens")
    if not isinstance(budget, int) or not isinstance(most, int) or (budget and budget < most):
        return body
    if most <= 1024:  # the least budget that Anthropic takes
        return {name: value for name, value in body.items() if name != "thinking"}
    budget = most - 1 if budget else max(1024, most // 2)
    return {**body, "thinking": {**thinking, "budget_tokens": budget}}


def is_foreign_thought(block: Json, is_claude: bool) -> bool:
    """Whether a block is thinking that an upstream would refuse: what we signed, what nobody did
    where Anthropic asks for its own, and elsewhere what only Anthropic could read."""
    signature = str(block.get("signature") or block.get("data") or SIGNATURE_MARK * is_claude)
    return block["type"] == "redacted_thinking" and not is_claude or (
        "thinking" in block["type"] and signature.startswith(SIGNATURE_MARK))


def with_model_id(raw: bytes, request: Json, body: Json) -> bytes | None:
    """The client's bytes with another model's id; None where the body differs in more, or the id
    isn't the first field, as Claude Code and the SDKs write it."""
    same = body == {**request, "model": body["model"]}  # identical values aren't looked into
    match = MODEL_FIELD.match(raw, raw.find(b'"'))
    if not same or not match or raw[: match.start()].strip() != b"{":
        return None
    twice = any(raw.count(b'"%b":' % name) > 1 for name in (b"messages", b"system", b"tools"))
    if twice or json.loads(raw[match.end(1) : match.end()]) != request["model"]:
        return None  # the upstream may read the other one
    return raw[: match.end(1)] + json.dumps(body["model"]).encode() + raw[match.end() :]


def last_event(data: bytes) -> re.Match[bytes] | None:
    """Where the last event of a stream begins, if it is among these, and what tells it."""
    if b"message_stop" not in data and b"error" not in data:  # nearly all; the rest takes longer
        return None
    return LAST_EVENT.search(b"\n" + data)


class NativeStream:
    """Passes whole events on, so that a ping or an error can follow any of them, with the model's
    id that the client asked for; tells end and usage."""

    ended = False  # the last event came: message_stop, or an error
    thinks_aloud: bool | None = None  # its first words are a tag of thinking, which nobody parsed
    error = b""  # its data, or what came in a stream's place
    _named = False  # the first event, which names the model, went by
    _tail = b""  # of what was passed on

    def __init__(self, model_id: str) -> None:
        self._model = json.dumps(model_id).encode()
        self._rest = bytearray()  # the beginning of an event

    def feed(self, data: bytes) -> bytes:
        seen = max(0, len(self._rest) - 3)  # less of an end that was cut
        self._rest += data
        ends = ((self._rest.rfind(mark, seen), len(mark)) for mark in EVENT_ENDS)
        end = max((at + size for at, size in ends if at >= 0), default=0)
        events = bytes(self._rest[:end])
        del self._rest[:end]
        if len(self._rest) > MAX_EVENT:
            raise OgxError(502, "the upstream sent an event that is too large")
        return self._passed_on(events)

    def end(self) -> bytes:
        """The last event, if only the blank line after it is missing."""
        rest, self._rest = bytes(self._rest), bytearray()
        if last_event(rest):
            return self._passed_on(rest + b"\n\n")
        self.error = self.error or rest
        return b""

    def _passed_on(self, data: bytes) -> bytes:
        if not self._named and b"message_start" in data:
            self._named = True
            match = MODEL_FIELD.search(data[:MAX_HEAD])
            if match:
                data = data[: match.end(1)] + self._model + data[match.end() :]
        if self.thinks_aloud is None and b"content_block_delta" in data:
            self.thinks_aloud = bool(THINKS_ALOUD.search(data[:MAX_HEAD]))
        self._tail = (self._tail + data[-2000:])[-2000:]
        last = last_event(data)
        self.ended |= bool(last)
        if last and b"error" in last[0]:
            self.error = (SseReader().feed(data[last.start() :]) or [last[0]])[0]
            return data[: last.start()]
        return data

    @property
    def usage(self) -> Usage | None:
        """The tokens that the last events told, for the log."""
        counts = dict(re.findall(rb'"(\w+_tokens)"\s*:\s*(\d{1,15})', self._tail))
        numbers = (int(counts.get(name.encode(), 0)) for name in USAGE_FIELDS)
        return Usage(*numbers) if counts else None


# ======== Responses ==========================================================================
# OpenAI's Responses, which its newest models need for tools. Pure.

ENCRYPTED, SOURCES = "reasoning.encrypted_content", "web_search_call.action.sources"
SEARCH_ID = "srvtoolu_ws_"  # begins the ids of searches that we served: `ws_...` is OpenAI's own id


def responses_request(request: Json, model: Model) -> Json:
    """The Responses request, which finished_responses() ends after the lessons."""
    kind = model.provider.kind
    note = unserved_tools_note(request, kind, ("web_search",))
    items = [item for turn in turns_from_messages(request["messages"], kind.system_anywhere)
             for item in input_items(turn, model.provider)]
    for place, item in enumerate(items):
        if item.get("role") == "assistant":  # OpenAI's types want an id; unstored, any will do
            item["id"] = f"msg_{place}"
    mode, schema = structured_output(request, kind)
    effort = reasoning_effort(request, model, "medium")
    return {
        "model": model.upstream_id, "input": items, "store": False, "include": [ENCRYPTED],
        "max_output_tokens": max(16, min(request["max_tokens"], model.max_output or 1 << 40)),
        **flat_tool_fields(request, kind),
        **filled_in({
            "instructions": paragraphs([system_text(request), note]),
            "prompt_cache_key": conversation_key(request),
            "stream": request.get("stream") or bool(kind.stream_above) or None,
            "temperature": request.get("temperature"), "top_p": request.get("top_p"),
            "reasoning_effort": effort,
            "reasoning": {"summary": "auto"} if effort and kind.summaries else None,
            "text": {"format": {"type": "json_schema", **answer_format(schema)}}
            if mode else None})}


def finished_responses(body: Json) -> Json:
    body = dict(body)
    effort = body.pop("reasoning_effort", None)
    if effort:
        body["reasoning"] = {**(body.get("reasoning") or {}), "effort": effort}
    return body


def input_items(turn: Turn, provider: Provider) -> Iterator[Json]:
    """A turn as input items; reasoning that led to nothing would be refused."""
    if turn.role == "results":
        for result in turn.blocks:
            parts = [input_part(b, provider.kind) for b in blocks_of(result.get("content"))]
            if result.get("is_error"):
                parts.insert(0, {"type": "input_text", "text": TOOL_ERROR.strip()})
            output: Any = parts
            if all(part["type"] == "input_text" for part in parts):
                output = "\n".join(part["text"] for part in parts) or "(no output)"
            yield {"type": "function_call_output", "output": output,
                   "call_id": tool_call_id(result["tool_use_id"], provider.kind)}
    elif turn.role == "assistant":
        items = [item for b in turn.blocks for item in assistant_items(b, provider)]
        while items and items[-1].get("type") == "reasoning":
            items.pop()
        yield from items
    else:
        role = "developer" if turn.role == "system" else "user"
        yield {"role": role, "content": [input_part(b, provider.kind) for b in turn.blocks]}


def assistant_items(block: Json, provider: Provider) -> Iterator[Json]:
    block_type = block["type"]
    use_id = str(block.get("id") or block.get("tool_use_id"))
    if block_type == "tool_use":
        yield {"type": "function_call", "call_id": tool_call_id(use_id, provider.kind),
               "name": upstream_name(block["name"]),
               "arguments": UNICODE_JSON.encode(block["input"])}
    elif use_id.startswith(SEARCH_ID):
        if block_type == "server_tool_use" and provider.kind.own_reasoning:
            yield {"type": "web_search_call", "id": use_id[9:], "status": "completed",
                   "action": {"type": "search", **dict_or_empty(block.get("input"))}}
    elif block_type in ("thinking", "redacted_thinking"):
        state = decode_signature(block, "responses", provider.id)
        own = {name: state.get(name) for name in ("id", "encrypted_content")}
        if provider.kind.own_reasoning and all(isinstance(value, str) for value in own.values()):
            thought = block.get("thinking")
            summary = [{"type": "summary_text", "text": thought}] if thought else []
            yield {"type": "reasoning", "summary": summary, **own}
    elif block_text(block):
        content = [{"type": "output_text", "text": block_text(block), "annotations": []}]
        yield {"type": "message", "role": "assistant", "status": "completed", "content": content}


def input_part(block: Json, kind: ProviderKind) -> Json:
    part = attachment_part(block, kind)
    if part is None:
        return {"type": "input_text", "text": block_text(block)}
    if part["type"] == "image_url":
        return {"type": "input_image", "image_url": part["image_url"]["url"], "detail": "auto"}
    return {"type": "input_file", **part["file"]}


def flat_tool_fields(request: Json, kind: ProviderKind) -> Json:
    """tool_fields() in Responses' form, and the provider's own web search."""
    body = tool_fields(request, kind)
    tools = [{"type": "function", "strict": False, **tool["function"]}
             for tool in body.get("tools", ())]
    choice = {"type": "auto", **(request.get("tool_choice") or {})}
    for tool in request.get("tools") or ():
        if str(tool.get("type")).startswith("web_search"):
            tools.append({"type": "web_search", **filled_in({
                "user_location": tool.get("user_location"),
                "filters": filled_in({"allowed_domains": tool.get("allowed_domains")})})})
            body["include"] = [ENCRYPTED, SOURCES]
            if tool.get("max_uses"):
                body["max_tool_calls"] = tool["max_uses"]
            if choice.get("name") in (None, tool.get("name")):
                forced = choice["type"] in ("any", "tool")
                body.setdefault("tool_choice", "required" if forced else choice["type"])
    if isinstance(body.get("tool_choice"), dict):
        body["tool_choice"] = {"type": "function", **body["tool_choice"]["function"]}
    return {**body, "tools": tools} if tools else {}


class ResponsesTranslator(Translator):
    def __init__(self, writer: MessageWriter, request: Json, model: Model) -> None:
        super().__init__(writer, request, model)
        self._names = ToolNames(request)
        self._streamed: set[Any] = {None}  # indices of items whose deltas came

    def _read(self, chunk: Json, data: bytes) -> None:
        if chunk.get("object") != "response":
            self._read_event(chunk)
            return
        for index, item in enumerate(chunk.get("output") or ()):
            self._read_item(index, item)
        status = chunk.get("status") or "completed"
        self._read_event({"type": f"response.{status}", "response": chunk})

    def _read_event(self, event: Json) -> None:
        event_type, index = event.get("type") or "error", event.get("output_index")
        name = event_type.removeprefix("response.")
        if name.endswith(".delta"):
            self._streamed.add(index)
        if name in ("output_text.delta", "refusal.delta"):
            self._refused |= name == "refusal.delta"
            self.writer.text(event["delta"])
        elif name == "function_call_arguments.delta":
            self.writer.tool(index, "", "", event["delta"])
        elif name in ("reasoning_summary_text.delta", "reasoning_text.delta"):
            self.writer.thinking(event["delta"])
        elif name == "reasoning_summary_part.added" and event.get("summary_index"):
            self.writer.thinking("\n\n")
        elif name == "output_text.annotation.added":
            self._read_citation(event["annotation"])
        elif name == "output_item.added":
            item = event["item"]
            if item["type"] == "function_call":
                self.writer.tool(index, item["call_id"], self._names.back(item["name"]), "")
        elif name == "output_item.done":
            self._read_item(index, event["item"])
        elif name in ("completed", "incomplete"):
            self._finish(event["response"])
        elif name == "failed" or (name == event_type and is_failure(event)):
            raise self._error(json.dumps(event).encode())

    def _read_item(self, index: Any, item: Json) -> None:
        """Take in what an item's deltas didn't bring."""
        item_type, whole = item["type"], index not in self._streamed
        if item_type == "function_call" and whole:
            name, arguments = self._names.back(item["name"]), item.get("arguments") or ""
            self.writer.tool(index, item["call_id"], name, arguments)
        elif item_type == "message":
            for part in item.get("content") or () if whole else ():
                self._refused |= part["type"] == "refusal"
                self.writer.text(part.get("text") or part.get("refusal") or "")
                for annotation in part.get("annotations") or ():
                    self._read_citation(annotation)
            self.writer.end_text()
        elif item_type == "reasoning":
            if whole:
                parts = item.get("summary") or item.get("content") or ()
                self.writer.thinking("\n\n".join(part.get("text") or "" for part in parts))
            if item.get("encrypted_content"):
                state = {name: item[name] for name in ("id", "encrypted_content")}
                owner = self._model.provider.id  # only it can read its own
                self.writer.signature(encode_signature("responses", owner, state))
        elif item_type == "web_search_call":
            self._read_search(item)

    def _read_search(self, item: Json) -> None:
        """Show a search, or a page that it opened, as Anthropic's tool does."""
        action = item.get("action") or {}
        self._searches += action.get("type") == "search"
        use_id = "srvtoolu_" + re.sub(r"[^A-Za-z0-9_]", "_", item["id"])
        self.writer.whole({"type": "server_tool_use", "id": use_id, "name": "web_search",
                           "input": {"query": action.get("query") or action.get("url") or ""},
                           "caller": {"type": "direct"}})
        results = [{"type": "web_search_result", "url": source["url"], "page_age": None,
                    "title": source.get("title") or source["url"], "encrypted_content": ""}
                   for source in action.get("sources") or [action] if source.get("url")]
        self.writer.whole({"type": "web_search_tool_result", "tool_use_id": use_id,
                           "content": results, "caller": {"type": "direct"}})

    def _read_citation(self, annotation: Json) -> None:
        if annotation.get("type") == "url_citation":
            url = annotation["url"]
            self.writer.citation({
                "type": "web_search_result_location", "url": url, "cited_text": "",
                "title": annotation.get("title") or url, "encrypted_index": ""})

    def _finish(self, response: Json) -> None:
        self.usage = usage_from_openai(response.get("usage") or {}, self.writer.input_tokens)
        reason = (response.get("incomplete_details") or {}).get("reason") or response.get("status")
        self._stop_reason = self._reason(reason or "stop")
        self.end()


# ======== Dialects ===========================================================================
# What upstreams speak: how requests are made and answers are read, as a table. Pure.


@dataclass(frozen=True)
class Dialect:
    request: Callable[[Json, Model], Json]
    translator: Callable[[MessageWriter, Json, Model], Translator] = Translator
    finished: Callable[[Json], Json] = lambda body: body  # the request after the lessons
    native: bool = False  # Anthropic's own format: passed on as it is, and never translated


def demo_request(request: Json, model: Model) -> Json:
    """The demo model's "request": its answer."""
    tokens = round(sum(TokenCounter().prompt(request)))
    text = (f"This is ogx.py's built-in demo model; I received {len(request['messages'])} "
            f"messages, {len(request.get('tools') or ())} tools, about {tokens:,} tokens. Set "
            "OPENAI_API_KEY, VLLM_URL or OLLAMA_URL and start `run` again to talk to a real "
            "model.")
    return {"text": text}


def demo_stream(body: Json) -> Iterator[bytes]:
    """The answer as a chat completion stream, a word at a time."""
    for word in re.findall(r"\S+\s*", body["text"]):
        yield b"data: %b\n\n" % json_bytes({"choices": [{"delta": {"content": word}}]})
    yield b'data: {"choices": [{"finish_reason": "stop"}]}\n\n'


# A further dialect has a section above, with its request and its Translator; a row here, a path in
# request_path(), and its name in rows' `dialects` and, for users, in provider_or_none(). It answers
# in server-sent events, or in one body.
DIALECTS = {
    "chat": Dialect(chat_request, ChatTranslator),
    "responses": Dialect(responses_request, ResponsesTranslator, finished_responses),
    "messages": Dialect(messages_request, finished=finished_messages, native=True),
    "demo": Dialect(demo_request, ChatTranslator),
}
COUNTED_FIELDS = ("model", "messages", "tools", "instructions", "input")


def request_path(dialect: str, kind: ProviderKind) -> str:
    if dialect == "messages":
        return kind.messages_path
    return kind.openai_root + ("/responses" if dialect == "responses" else "/chat/completions")


def token_counters(dialect: str, request: Json,
                  model: Model) -> Iterator[tuple[Sequence[str], Json]]:
    """The paths where an upstream counts a request's tokens, and what is sent there, best first;
    of two paths the first makes the text for the second."""
    kind, via = model.provider.kind, "responses" if dialect == "responses" else "chat"
    if DIALECTS[dialect].native:
        yield [kind.messages_path + "/count_tokens"], messages_request(request, model)
    paths = kind.tokenizer if via == "chat" else ("/responses/input_tokens",)
    if paths:
        body = DIALECTS[via].request({"max_tokens": 1, **request}, model)
        yield paths, {name: body[name] for name in COUNTED_FIELDS if name in body}


# ======== Remedies ===========================================================================
# What an upstream's refusal teaches: lessons, each a change to one field. With the first that is of
# use the request is sent again. Patterns are generic; their real texts are in the tests. Pure.

EFFORT_LADDER = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# A thinking budget of 0 becomes half of the output limit.
THINKING = {"adaptive": {"type": "adaptive"}, "enabled": {"type": "enabled", "budget_tokens": 0}}
# What becomes of a field's value, given the lesson's.
ACTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "clamp": min,
    "raise": max,
    "cap_effort": lambda effort, most: min(effort, most, key=EFFORT_LADDER.index),
    "raise_effort": lambda effort, least: max(effort, least, key=EFFORT_LADDER.index),
    "strip_keyword": lambda tree, keyword: without_keywords(tree, [keyword], []),
    "unlist": lambda told, names: ",".join(n for n in told.split(",") if n not in names.split(",")),
    "retype": lambda thinking, mode: THINKING[mode]
    if thinking.get("type") in {*THINKING} - {mode} else thinking,
    "retry": lambda value, _: value,
}
LIMIT_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
# Fields a request can do without. Of others the client is told.
OPTIONAL_FIELDS = (*LIMIT_FIELDS, "temperature", "top_p", "top_k", "stop", "stream_options",
                   "reasoning_effort", "parallel_tool_calls", "response_format", "tool_choice",
                   "prompt_cache_key", "store", "include", "stop_sequences", "thinking",
                   "output_config", "metadata", "context_management", "max_tool_calls")
UNSUPPORTED = (
    "(?i)unsupported|unrecognized|unknown|unexpected|does not (support|match|know)|deprecated|"
    "not (supported|permitted|allowed|configured|enabled|(both )?be (chosen|set|used|specified))|"
    "extra (fields|inputs)|invalid beta|should be '")
ADVICE = r"(?i)(?<!n't )(?<!not )\b(?:use|did you mean)\b(?! of)(?:[^.;]|\.\w)*"
LISTED = (r"(?is).*\b(?:one of|(?:should|must) be|only supports?|(?:supported|allowed|valid|"
          r"expected)(?: \w+)?(?: are| is|:))\W(.+)")
# Where a name, the #, is a field's although it's an English word, and where a number is a limit.
NAMED = (r"(?i)[`'\"]#|\b(?:parameter|argument|field)s?\b(?:[^.:#]{0,30}:)?\W{0,3}#|"
         "#:? (?:parameter|argument|field|extra)")
MOST = (r"(?i)(?:at most|than|[<>≤]|exceed|above|over|only|up to|max(?!\w{0,20}tokens)|limit|range|"
        r"context|window)\D{0,40}(?:\b1\D{1,20})?#(?!(?: tokens)? ?[>+])|"
        r"# (?:\w+ )?(?:the |at )?(?:max|most)")
COUNT = r"(?<![\w./-])(?<!\bby )(?:\d{1,3}(?:,\d{3}){1,2}|\d{2,8})(?![\w/-]|,\d)"
# What is_about_window() looks for.
CONTEXT = (r"(?i)(?<![a-z])context(?![\W_]{0,3}(?:deadline|cancel|manag|=))|prompt (?:is )?too l|"
           "request too large for model")  # the last is Groq's, about tokens per minute
TOO_LONG = (r"(?i)exceed|too (?:long|large|many)|(?:greater|longer|larger|more|less) than|overflow|"
            r"range of|\b(?:over|above)\b")
PROMPT = (r"(?i)(?<![a-z])(?:prompt(?!_cache)|(?:inputs?|messages?|tokens?)\b|conversation|"
          "current length)")
BOUND = "(?i)max|limit|length|window|model|allowed|too long"
OTHERS = (r"(?i)\b(?:image|audio|video|pdf|file)(?!s? and text)|\d ?[KMG]i?B\b|byte|string|quota|"
          r"time|\b(?:tools?|name|ids?|rates?|daily|monthly|per (?:min|day|hour|sec)\w*)\b")
OUTPUT = (r"(?i)max_(?!input|prompt|model|seq)\w{0,20}tokens|maxOutputTokens|"
          r"\b(?:output|completion|maximum tokens|new tokens)\b")
ROOM = 256  # tokens of an answer that are worth asking for
# How a server differs from its row: words in any case, the row's field, its value. Seen live:
# llama.cpp's and chat templates'. The others are from vendors' pages and issue threads.
ROW_REMEDIES = (
    # OpenAI: models that take tools, or anything, only there, and those that don't
    ("not support(ed (in|on|with))? (the )?'?/?(v1/responses|responses API)", "responses", False),
    ("(use|only supported in) /?v1/responses|not a chat model|"
     "not support the '/v1/chat/completions' API", "responses", True),
    (r"(only|must|requires?|enable)\b.{0,25}\bstream|"
     r"\bstream(ing)?\b.{0,12}(must|required|only)|(for|with|in) non-?stream", "stream_above", 1),
    ("isn't supported on this route", "openai_root", "~/openai/v1"),  # Bedrock
    (r"encrypted content .*(verified|decrypted|invalid)|item with id '(rs|ws)_|"
     "without its required following item|reasoning_details|corrupted thought|"
     "thought.signature is not valid", "own_reasoning", False),
    ("must be verified to .*summar|summary.*verif", "summaries", False),
    ("roles must alternate|role 'user' after role 'tool'", "user_after_tool", False),
    ("Tool call id was .* must be a-z", "tool_ids", NINE),  # mistral-common
    (r"call(s\[\d+\]\.|_)id.{0,9}string too long", "tool_ids", FORTY),  # OpenAI
    ("reasoning_content.{0,60}(must be passed back|is missing)",
     "reasoning_echo", "reasoning_content"),  # DeepSeek, Moonshot
    (r"property 'reasoning\w*' is unsupported", "reasoning_echo", ""),  # Groq
    ("system message must be (at|the) (the )?(beginning|first)|role 'system' after role",
     "system_anywhere", False),  # Qwen, Mistral
    # OpenAI, vLLM, Groq, Ollama
    (r"(n[o']t|found that) support images?\b(?! \w*(larger|format|url|of))|mmproj|At most 0 image|"
     r"(not|n't) (a|have|support)\b.{0,15}\b(multi-?modal|vision)\b|\btext[- ]only model|"
     r"\bno (vision\b|image (input|support))|multi-?modal\b.{0,20}(not|n't) (supported|enabled)|"
     "image(_url| input) is (only|not) supported|unknown variant `image_url`|"
     "missing data required for image", "images", False),
    (r"(file|document|pdf).{0,40}not supported|'?type'?: ?'?file'?.{0,60}invalid|"
     "Invalid value: 'file'|unknown part type: file", "files", False),
    ("thought_signature", "tool_call_extra", SKIP_SIGNATURE),
    (r"not have [\w'/]+ at the top level", "root_unions", False))


@dataclass(frozen=True)
class Lesson:
    """One change to every request for a model."""

    action: str  # one of ACTIONS, "set", "drop", "rename" or "override"
    field: str  # of the request, or "object.field"; of ProviderKind for "override"
    value: Any = None
    keep: bool = True  # False: for this request only
    dialect: str = ""  # whose requests it is about; empty for "override"
    at: float = 0.0  # when it was learned, seconds since 1970

    def __str__(self) -> str:
        value = "" if self.value is None else f" to {self.value}"
        return f"{self.action} {self.field}{value}"


def with_lessons(body: Json, lessons: Iterable[Lesson]) -> Json:
    body = dict(body)
    for lesson in lessons:
        name, _, inner = lesson.field.partition(".")
        if lesson.action == "set":
            body[name] = lesson.value
        elif lesson.action == "override" or name not in body:
            continue
        elif inner:
            body[name] = with_lessons(body[name], [replace(lesson, field=inner)])
        elif lesson.action == "drop":
            del body[name]
        elif lesson.action == "rename":
            body[lesson.value] = body.pop(name)
        else:
            body[name] = ACTIONS[lesson.action](body[name], lesson.value)
    return body


def model_with_overrides(model: Model, lessons: Iterable[Lesson]) -> Model:
    learned = {lesson.field: lesson.value for lesson in lessons if lesson.action == "override"}
    if not learned:
        return model
    kind = replace(model.provider.kind, **learned)
    return replace(model, provider=replace(model.provider, kind=kind))


def lesson_from_refusal(refusal: Refusal, body: Json, model: Model,
                        learned: Sequence[Lesson] = ()) -> Lesson | None:
    """What to change so that the request is accepted; None where nothing new may help."""
    if refusal.status not in (400, 402, 404, 405, 413, 422, 500):
        return None
    kind = model.provider.kind
    overridden = {known.field for known in learned if known.action == "override"}
    for pattern, name, value in ROW_REMEDIES:
        differs = name not in overridden and getattr(kind, name) != value
        if differs and re.search(pattern, refusal.words, re.I):
            # Refused reasoning may be another key's, which tells nothing of other conversations.
            return Lesson("override", name, value, keep=name != "own_reasoning")
    no_path = refusal.status in (404, 405) and not re.search("(?i)model|item", refusal.words)
    if no_path and "input" in body:
        return Lesson("override", "responses", False)
    if any(known.action == "unlist" for known in learned):  # the next beta: name none, so all go
        words = re.sub(r"[\w-]{1,60}-20\d\d-\d\d-\d\d", "", refusal.words)
        refusal = replace(refusal, message=words)
    for remedy in REMEDIES[: {402: 1, 500: 2}.get(refusal.status)]:
        for lesson in remedy(refusal, body):
            changes = lesson.action in ("retry", "override") or with_lessons(body, [lesson]) != body
            if changes and not any(undoes(lesson, known) for known in learned):
                return lesson
    return plainer_tools(refusal, body, kind, "refused_keywords" not in overridden)


def undoes(lesson: Lesson, known: Lesson) -> bool:
    """Whether a lesson leads back to before a known one, or was tried for this request."""
    if lesson.action == known.action:
        return known.field == lesson.value or known.field == lesson.field and not known.keep
    return known.field == lesson.field and "set" in (lesson.action, known.action)


def around(words: str, match: re.Match[str]) -> str:
    """The words around a match, and a # in its place."""
    return f"{words[max(0, match.start() - 60) : match.start()]}#{words[match.end() :][:20]}"


def numbers_in(words: str) -> dict[int, Any]:
    """The first numbers in a text, each with whether it stands as a limit."""
    numbers: dict[int, Any] = {}
    for match in itertools.islice(re.finditer(COUNT, words), 20):
        number = int(match[0].replace(",", ""))
        numbers[number] = numbers.get(number) or re.search(MOST, around(words, match))
    return numbers


def told_lengths(refusal: Refusal, asked: int) -> tuple[str, int, int]:
    """What a refusal says of lengths where `asked` tokens of output were asked for: "overflow" (the
    prompt is too long), "room" (only with the output), "output" (no answer may be so long) or "";
    then the limit and the prompt's tokens, or 0."""
    words = f"{refusal.words} {refusal.code.replace('_', ' ')}"
    numbers = numbers_in(words)
    large = {n for n in numbers if n != asked and (n >= 1000 or asked and n + asked in numbers)}
    about_output = re.search(rf"{OUTPUT}|\b{asked or 'output'}\b", words)
    limits = {n for n in large if numbers[n]}
    most = (max if about_output or limits != large else min)(limits, default=0)
    others = large - {most}
    sums = {one + other for one in others for other in (*others, asked) if other}
    prompt = max(others - sums, default=0) if most else 0
    if is_about_window(words, prompt):
        if prompt:
            return "room" if prompt < most else "overflow", most, prompt
        if not about_output or not most and "context" in refusal.code:
            return "overflow", most if most >= 2048 else 0, 0  # smaller ones are codes
    most = next((n for n in numbers if numbers[n] and 16 <= n < asked), 0)
    return ("output", most, 0) if about_output and most else ("", 0, 0)


def is_about_window(words: str, prompt: int) -> bool:
    """Whether words are about a prompt that is too long, alone or with its answer."""
    if re.search(CONTEXT, words) and (prompt or re.search(TOO_LONG, words)):
        return True
    for part in re.split(r"(?<=[.!?;])\s+|\n", words):
        alone = re.search(TOO_LONG, part) and re.search(BOUND, part) and not re.search(OUTPUT, part)
        if (prompt or alone) and re.search(PROMPT, part) and not re.search(OTHERS, part):
            return True
    return False


def fitting_limit(refusal: Refusal, body: Json) -> Iterator[Lesson]:
    """The limit of answers; for this one alone the room that its prompt leaves, or what an account
    can afford; and the least of limits (`Expected a value >= 16`)."""
    words, name = refusal.words, next((name for name in LIMIT_FIELDS if name in body), None)
    if name is None:
        return
    verdict, most, prompt = told_lengths(refusal, body[name])
    left = (most - prompt) // (2 if "at least" in words else 1)  # vLLM counts no further
    keep = verdict == "output" and refusal.status != 402
    if keep or verdict in ("output", "room") and left >= ROOM:
        yield Lesson("clamp", name, left, keep)
    least = re.search(r"(?:Expected a value >= ?|at least |minimum (?:of|is) )(\d+)", words)
    if least and 0 < int(least[1]) <= 64 and "token" in words:
        yield Lesson("raise", name, int(least[1]))


def lower_effort(refusal: Refusal, body: Json) -> Iterator[Lesson]:
    """Of the efforts listed the highest that isn't above what was asked, else the lowest; without
    a list a step down the ladder."""
    words, name = refusal.words, "reasoning_effort"
    if "Function tools with reasoning_effort" in words:  # OpenAI's chat API takes none with them
        yield Lesson("set", name, "none")
    name = name if name in body else "output_config.effort"
    asked = body.get(name) or dict_or_empty(body.get("output_config")).get("effort")
    about = rf"(?i)effort(?!-2)|reasoning.{{0,80}}{asked}"  # not about a beta, effort-2025-11-24
    if asked not in EFFORT_LADDER or not re.search(about, re.sub(ADVICE, "", words)):
        return
    rank, listed, taken = EFFORT_LADDER.index(asked), re.match(LISTED, words), []
    if listed:
        taken = [effort for effort in EFFORT_LADDER[1:]
                 if effort != asked and re.search(rf"\b{effort}\b", listed[1])]
    elif not re.search(UNSUPPORTED, words) or "Unsupported parameter" in words or asked == "low":
        return
    elif re.search(rf"\b{asked}\b", words):  # else `effort cannot be chosen for this model`
        taken = [EFFORT_LADDER[max(2, rank - 1)]]
    lower = [effort for effort in EFFORT_LADDER[:rank] if effort in taken]
    if lower:
        yield Lesson("cap_effort", name, lower[-1])
    elif taken:
        yield Lesson("raise_effort", name, taken[0])
    else:
        yield Lesson("drop", name)


def older_fields(refusal: Refusal, body: Json) -> Iterator[Lesson]:
    """For older Messages APIs: nested fields (`tools.0.custom.x: Extra inputs ...`), the other mode
    of thinking, fewer betas: where none is named, those that Claude Code's requests need."""
    said = re.sub(ADVICE, "", refusal.words)
    if not re.search(UNSUPPORTED, said):
        return
    path = re.search(r"(?<![\w.])([a-z]\w*)(?:\.\w+)*\.(\w+): Extra inputs", said)
    if path:
        yield Lesson("strip_keyword", path[1], path[2])
    asked = dict_or_empty(body.get("thinking")).get("type")
    if asked in THINKING and "thinking" in said and re.search("adaptive|enabled", said):
        yield Lesson("retype", "thinking", "enabled" if asked == "adaptive" else "adaptive")
    name = "anthropic-beta"  # a header, but for lessons a field like others
    if re.search(r"(?i)\bbeta", said):
        betas = body.get(name, "").replace(" ", "").split(",")
        named = [beta for beta in betas if beta in said]
        others = [beta for beta in betas if not beta.startswith(("claude-", "interleaved-"))]
        yield Lesson("unlist", name, ",".join(named or others))


def other_ways(refusal: Refusal, body: Json) -> Iterator[Lesson]:
    """Fewer tools; another try where a call couldn't be read (Groq); JSON by a tool instead of
    response_format, and then in words."""
    words, message = refusal.words, refusal.message
    most = re.search(r"tools.{0,60}(?:maximum length|at most|maximum of) (\d+)", message)
    if most and 0 < int(most[1]) < len(body.get("tools") or ()):
        yield Lesson("override", "max_tools", int(most[1]))
    if refusal.code == "tool_use_failed" or "tool call validation failed" in message:
        yield Lesson("retry", "messages", keep=False)
    if "response_format" in body and re.search("(?i)response_?format|json_schema", words):
        yield Lesson("override", "answer_by", "tool", keep="nvalid schema" not in words)
    if "tool" in words and ANSWER_TOOL in [tool.get("name") for tool in tools_in(body)]:
        yield Lesson("override", "answer_by", "words")


def dropped_field(refusal: Refusal, body: Json) -> Iterator[Lesson]:
    """`Unsupported value: 'temperature' does not support 0.2`, `property 'x' is unsupported`."""
    said = re.sub(ADVICE, "", f"{refusal.param} {refusal.words}")
    if not re.search(UNSUPPORTED, f"{said} {refusal.code}"):
        return
    said = said.replace("reasoning.effort", "reasoning_effort")
    if "thinking" in body and re.search("thinking.{0,20}budget|budget_tokens", said):  # vLLM
        said = f"`thinking` {said}"
    if "think" in said:  # Ollama: `"m" does not support thinking`
        said += " reasoning_effort"
    names = (m[0] for m in re.finditer(r"\w+", said) if m[0] in OPTIONAL_FIELDS and (
        m[0] in (refusal.param, "temperature") or "_" in m[0] or re.search(NAMED, around(said, m))))
    name = next(names, "")
    if name in LIMIT_FIELDS[:2]:
        yield Lesson("rename", name, LIMIT_FIELDS[1 - LIMIT_FIELDS.index(name)])
    if name:  # tool_choice changes what the answer may be, so it is left out only this once
        yield Lesson("drop", name, keep=name != "tool_choice")
    elif re.search(r"\bstrict\b", said):
        for holder in ("tools", "response_format", "text"):
            yield Lesson("strip_keyword", holder, "strict")


def tools_in(body: Json) -> list[Json]:
    return [dict_or_empty(tool.get("function")) or tool for tool in body.get("tools") or ()]


# A refusal that tells of tools is about their schemas, but where it tells of these before.
OTHER_SUBJECTS = (
    r"(?s:^.*(\d tokens|messages\W{1,3}\d))|tokens|messages|prompt|\bcontent\b|image|endpoint|"
    r"quota|argument|rate.limit|api.?key|generated|(support\w{0,3}|call a) (tool|function)|"
    r"(tool|function)s?([ _.-]?(choice|call|output|result|response|use|id)(s|ing)?(?![a-z])|"
    r"\W+(is|are) not)")


def plainer_tools(refusal: Refusal, body: Json, kind: ProviderKind, first: bool) -> Lesson | None:
    """The next step for refused tools: descriptions of the length told; at `first` no keywords that
    are named, or whose values are; none that constrain; no forms that plain_schema() mends."""
    words, refused = f"{refusal.code} {refusal.words}", kind.refused_keywords
    weak = "" if refusal.status == 500 else "tool|function|"
    about = rf"(?i)(?P<other>{OTHER_SUBJECTS})|{weak}schema|grammar|regex|parameters|\$defs"
    subject = re.search(about, words)
    tools = tools_in(body)
    schemas = [tool.get("parameters") or tool.get("input_schema") for tool in tools]
    if not subject or subject["other"] or not any(schemas) or refusal.status == 402:
        return None
    if "escription" in words and re.search("(?i)long|length|charact|exceed", words):
        most = next((n for n, limits in numbers_in(words).items() if limits), 1024)
        if any(len(tool.get("description") or "") > most for tool in tools):
            return Lesson("override", "max_description", most)
    said = {*re.findall(r"[a-z$]+", words.lower().replace("_", "").replace("regex", "pattern"))}
    quoted = {part for quote in "'`\"" for part in words.split(quote)}
    rules: list[Any] = []
    without_keywords(schemas, ["*"], rules)
    named = {name for _, name, value in rules if name.lower() in said
             or isinstance(value, str) and value in quoted}
    more = sorted(named)[:20] if first and named else ["*"] if rules else ["$ref"]
    return None if "$ref" in refused else Lesson("override", "refused_keywords", (*refused, *more))


# A 402 concerns the first alone, a 500 the first two.
REMEDIES = (fitting_limit, lower_effort, older_fields, other_ways, dropped_field)


def overflow_error(refusal: Refusal, estimate: int, window: int | None,
                   asked: int = 0) -> OgxError | None:
    """Anthropic's error for a prompt that is too long, in the words that make Claude Code compact
    and go on; None for another refusal. Our numbers stand in for what wasn't told."""
    at_once = refusal.status == 429 and "Request too large" in refusal.words  # waiting won't help
    if refusal.status not in (400, 413, 422, 500) and not at_once:
        return None
    verdict, most, prompt = told_lengths(refusal, asked)
    message = f"input length and `max_tokens` exceed context limit: {prompt} + {asked} > {most}"
    if verdict == "overflow":
        prompt, most = prompt or estimate, most or window or prompt or estimate
        shown = f"{prompt} tokens > {most} maximum" if prompt > most else refusal.message
        message = f"prompt is too long: {shown}"
    elif verdict != "room" or most - prompt >= ROOM:
        return None
    return OgxError(400, message, refusal=refusal)


# ======== HTTP ===============================================================================
# HTTP/1.1 for both sides, clients and upstreams, without I/O: heads, bodies and their framing, and
# the guard that keeps browsers out. Values in, values out.

Headers = Mapping[str, str]  # by lower-case name
RECEIVE_SIZE = 64 * 1024  # bytes taken from a socket at once
HEAD_END = re.compile(rb"\n\r?\n")  # the \r before it is left to the last line
HEADER_LINE = re.compile(
    r"^([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)\r?$", re.M)
REQUEST_LINE = re.compile(rb"([A-Z]+) ([\x21-\x7e]+) HTTP/(1\.[01])\r?")
STATUS_LINE = re.compile(rb"HTTP/(1\.[01]) ([1-5][0-9][0-9])\b")
LENGTH = re.compile("([0-9]{1,18})(?: *,|$)")  # of a body; some servers send it twice
WHOLE_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")
MAX_ANSWER = 64 * 1024 * 1024  # bytes of an answer that isn't streamed
GZIP_OR_ZLIB = 47  # of zlib's wbits: the data tell which
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class RequestHead(NamedTuple):
    """The request line and the headers of a client's request."""

    method: str = ""
    target: str = ""  # path and query
    version: str = ""  # 1.0 or 1.1
    headers: Headers = {}
    options: Collection[str] = ()  # connection's: close, keep-alive, names of headers for us alone

    def has_body(self) -> bool:
        return "content-length" in self.headers or "transfer-encoding" in self.headers

    def closes(self) -> bool:
        """Whether the connection ends with the answer (RFC 9112, 9.3)."""
        keeps = "keep-alive" in self.options and "transfer-encoding" not in self.headers
        return "close" in self.options or (self.version == "1.0" and not keeps)


NO_HEAD = RequestHead()


def request_head(data: bytes) -> RequestHead:
    """Parse a request's head, its end left out; OgxError(400) for anything malformed."""
    first, _, lines = data.partition(b"\n")
    match = REQUEST_LINE.fullmatch(first)
    if not match:
        raise OgxError(400, "malformed request line")
    method, target, version = match.group(1, 2, 3)
    headers = headers_from_bytes(lines)
    options = [word.strip() for word in headers.get("connection", "").lower().split(",")]
    return RequestHead(method.decode(), target.decode(), version.decode(), headers, options)


def headers_from_bytes(lines: bytes) -> dict[str, str]:
    """Header fields by lower-case name; fields that come twice are joined by a comma.
    Raises OgxError(400) for what smuggles: continued lines, control characters, bad names."""
    matches = HEADER_LINE.findall(lines.decode("latin-1"))
    if len(matches) != lines.count(b"\n") + bool(lines):
        raise OgxError(400, "malformed header line")
    headers: dict[str, list[str]] = {}
    for name, value in matches:
        headers.setdefault(name.lower(), []).append(value.strip(" \t"))
    return {name: ", ".join(values) for name, values in headers.items()}


def request_bytes(provider: Provider, method: str, path: str, body: bytes | None, extra: Headers,
                  proxy: urllib.parse.SplitResult | None) -> bytes:
    """A whole request for the provider, or for the proxy that reads it."""
    _, _, address, target = address_of(provider.url(path))
    headers = {"Host": address, **provider.headers, **extra}
    if proxy:
        target = f"http://{address}{target}"
        headers.update(proxy_headers(proxy))
    if body is not None:
        headers["Content-Type"] = "application/json"
        headers["Content-Length"] = str(len(body))
    lines = [f"{method} {target} HTTP/1.1", *map(": ".join, headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + (body or b"")


def proxy_headers(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    """The proxy's credentials, from its URL."""
    return {"Proxy-Authorization": basic_auth(proxy)} if proxy.username else {}


@functools.lru_cache(maxsize=256)
def address_of(url: str) -> tuple[str, str, str, str]:
    """A URL's scheme, host, host with port, and what a request to it asks for."""
    parts = urllib.parse.urlsplit(url)
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    return parts.scheme, parts.hostname or "", parts.netloc, target


def answer_head(status: int, headers: Headers, now: float) -> bytes:
    """The head of an answer to a client; `now` is in seconds since 1970."""
    lines = [head_start(status, int(now)), *map(": ".join, headers.items()), "", ""]
    return "\r\n".join(lines).encode("ascii", "replace")


@functools.lru_cache(maxsize=8)
def head_start(status: int, seconds: int) -> str:
    """What the heads of all answers of one second begin with."""
    reason = http.client.responses.get(status, "Overloaded" if status == 529 else "Error")
    date = email.utils.formatdate(seconds, usegmt=True)
    return f"HTTP/1.1 {status} {reason}\r\ndate: {date}\r\nanthropic-version: {ANTHROPIC_VERSION}"


# -- bodies. A reader's feed() takes raw bytes, cut anywhere, and gives the payload in them; `done`
# tells that the body is complete, `rest` is what came after it. end() is for a connection's end.


class Body:
    rest = b""
    done = False

    def feed(self, data: bytes) -> bytes:
        return data

    def end(self) -> None:
        if not self.done:
            words = "the upstream closed the connection in the middle of its answer"
            raise OgxError(502, words)


class SizedBody(Body):
    """A body of known length (RFC 9112, 6.3, rule 6), or none at all."""

    def __init__(self, length: int) -> None:
        self.done = not length
        self._missing = length

    def feed(self, data: bytes) -> bytes:
        payload, self.rest = data[: self._missing], data[self._missing :]
        self._missing -= len(payload)
        self.done = not self._missing
        return payload


class EndlessBody(Body):
    """A body that only the connection's end ends (rule 8)."""

    def end(self) -> None:
        self.done = True


class ChunkedBody(Body):
    """A body in chunks (RFC 9112, 7.1); trailers are read, and dropped."""

    def __init__(self) -> None:
        self._next = "size"  # what comes next: size, data, end (of a chunk) or trailer
        self._missing = 0  # bytes of the chunk's data
        self._trailers = 0  # bytes of them
        self._buffer = b""

    def feed(self, data: bytes) -> bytes:
        # An index moves over the buffer: slicing it for every chunk would be quadratic.
        buffer, at = self._buffer + data, 0
        payload: list[bytes] = []
        while not self.done and at < len(buffer):
            # Nearly all chunks are there as a whole: the same as below, three times as fast.
            size = WHOLE_CHUNK_SIZE.match(buffer, at) if self._next == "size" else None
            if size:
                start, end = size.end(), size.end() + int(size[1], 16)
                if start < end < len(buffer) and buffer.startswith(b"\r\n", end):
                    payload.append(buffer[start:end])
                    at = end + 2
                    continue
            if self._next == "data":
                piece = buffer[at : at + self._missing]
                payload.append(piece)
                at += len(piece)
                self._missing -= len(piece)
                if self._missing:
                    break
                self._next = "end"
            end = buffer.find(b"\n", at)
            if end < 0:
                if len(buffer) - at > MAX_HEAD:
                    raise OgxError(400, "malformed chunked body: a line is too long")
                break
            line, at = buffer[at:end], end + 1
            self._read_line(line[:-1] if line.endswith(b"\r") else line)
        self._buffer, self.rest = (b"", buffer[at:]) if self.done else (buffer[at:], b"")
        return b"".join(payload)

    def _read_line(self, line: bytes) -> None:
        if self._next == "end":
            if line:
                raise OgxError(400, "malformed chunked body: a chunk is longer than it said")
            self._next = "size"
        elif self._next == "trailer":
            self.done = not line
            self._trailers += len(line) + 1
            if self._trailers > MAX_HEAD:
                raise OgxError(400, "malformed chunked body: too many trailers")
        else:
            digits = line.split(b";")[0].strip()
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", digits):
                raise OgxError(400, "malformed chunked body: a chunk size isn't hexadecimal")
            self._missing = int(digits, 16)
            self._next = "data" if self._missing else "trailer"


def answer_body(status: int, headers: Headers) -> Body:
    """The reader for the body of an upstream's answer."""
    length = LENGTH.match(headers.get("content-length", ""))
    if status in (204, 304):
        return SizedBody(0)
    if headers.get("transfer-encoding", "").lower().endswith("chunked"):
        return ChunkedBody()
    return SizedBody(int(length[1])) if length else EndlessBody()


def is_spent(body: Body, data: bytes | None) -> bool:
    """Whether a body is over, and nothing else came, after these last bytes, None for none: the
    end of a chunked one often comes a moment after the last event."""
    if body.done or not data:
        return body.done and data is None
    return isinstance(body, ChunkedBody) and not body.feed(data) and body.done and not body.rest


def request_body(headers: Headers, limit: int) -> Body:
    """The reader for the body of a client's request. Both lengths at once, or two, are how
    requests are smuggled past a proxy: OgxError(400); OgxError(413) above `limit` bytes."""
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding is not None:
        if length is not None or coding.lower() != "chunked":
            raise OgxError(400, "transfer-encoding: expected chunked alone, without a length")
        return ChunkedBody()
    if length is not None and not re.fullmatch("[0-9]{1,18}", length):
        raise OgxError(400, "content-length: expected one whole number")
    check_size(int(length or 0), limit)
    return SizedBody(int(length or 0))


def check_size(size: int, limit: int) -> None:
    if size > limit:
        words = f"the request is larger than {limit / 1024 / 1024:g} MB (see OGX_MAX_BODY)"
        raise OgxError(413, words)


def unpacked(data: bytes, coding: str, limit: int) -> bytes:
    """A body of at most `limit` bytes without its content-encoding; gzip and deflate are known."""
    if coding in ("", "identity"):
        return data
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise OgxError(415, f"content-encoding: expected gzip or identity, got {coding[:40]}")
    unpacker = zlib.decompressobj(GZIP_OR_ZLIB)
    try:
        plain = unpacker.decompress(data, limit + 1)
    except zlib.error:
        raise OgxError(400, f"the body is not {coding}, as its content-encoding says") from None
    check_size(len(plain), limit)
    if not unpacker.eof:
        raise OgxError(400, f"the {coding} body is cut off")
    return plain


# -- the guard


@functools.lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine by its spelling, without asking DNS."""
    host = host.strip("[]").lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


PROBES = "/v1/health", "/v1/ready", "/api/hello"  # Claude Code's; need no token, tell nothing


@dataclass(frozen=True)
class Guard:
    """Who may come in. A page that a user visits must not be able to spend their keys, by its own
    name for 127.0.0.1 (DNS rebinding), across origins, or by a form."""

    bound: str  # the host that the server listens on
    scheme: str  # http or https
    token: bytes = b""  # which clients must show; empty: none is needed
    names: tuple[str, ...] = ()  # that the server is called by, besides its own and loopback's
    instance: str = ""  # of this gateway, which must not be its own upstream

    def check(self, head: RequestHead) -> None:
        """Raise OgxError 400, 401 or 403 for a request that is kept out."""
        headers = head.headers
        host = headers.get("host", "")
        if "," in host or ("host" not in headers and head.version == "1.1"):
            raise OgxError(400, "host: expected one")
        open_to_names = bool(self.token) and not is_loopback(self.bound)
        if not open_to_names and not self.knows_host(host):
            raise OgxError(403, f"host '{host[:100]}' is not a name of this server; if it should "
                                "be, add it to server.host_names in the configuration")
        if self.instance and headers.get("x-ogx-instance") == self.instance:
            raise OgxError(400, "a provider's base_url points back at ogx.py itself",
                           headers={"x-should-retry": "false"})
        if self.token and head.target not in PROBES and not self.is_shown_by(headers):
            raise OgxError(401, "this server asks for its token, as Authorization: Bearer or "
                                "x-api-key", headers={"x-should-retry": "false"})
        foreign = headers.get("origin", f"{self.scheme}://{host}") != f"{self.scheme}://{host}"
        # Without an Origin: images and the like, and links, which may lead to the plain page.
        linked = headers.get("sec-fetch-mode") == "navigate" and head.target == "/"
        if foreign or (headers.get("sec-fetch-site") in ("cross-site", "same-site") and not linked):
            raise OgxError(403, "requests from web pages of another origin are refused")

    def knows_host(self, host: str) -> bool:
        """Whether a Host header may come in: configured names, those of loopback and, bound
        elsewhere, addresses, which no foreign page can point here."""
        name = re.sub(r":[0-9]*$", "", host).strip("[]").lower()
        if not host or is_loopback(name) or name in (self.bound.lower(), *self.names):
            return True  # browsers send a Host
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return not is_loopback(self.bound)

    def is_shown_by(self, headers: Headers) -> bool:
        """Whether a request shows the token; takes the same time whatever it shows."""
        import hmac  # only where there is a token, to start smaller

        bearer = re.sub("(?i)^bearer +", "", headers.get("authorization", ""))
        shown = (headers.get("x-api-key", "").encode(), bearer.encode())
        return any([hmac.compare_digest(self.token, key) for key in shown])


class AnswerReader:
    """What an upstream answers, as items: the data of each server-sent event, or a whole body as
    one. An answer larger than MAX_ANSWER raises OgxError(502)."""

    def __init__(self) -> None:
        self._events = SseReader()
        self._whole = bytearray()
        self._is_stream: bool | None = None  # told by the data, since content types lie

    def feed(self, data: bytes) -> list[bytes]:
        if self._is_stream is None and data.strip():  # DeepSeek sends empty lines at first
            self._is_stream = data.lstrip()[:1] not in (b"{", b"[", b"<")
        if self._is_stream:
            return self._events.feed(data)
        self._whole += data
        if len(self._whole) > MAX_ANSWER:
            raise OgxError(502, "the upstream's answer is too large")
        return []

    def end(self) -> list[bytes]:
        return [bytes(self._whole)] if self._is_stream is False else self._events.end()


# ======== Above this line nothing does I/O ===================================================

# ======== Loop ===============================================================================
# One thread serves all connections. What runs in it are tasks: generators that go as far as they
# can without waiting, and then yield what they need before their next step:
#
#     Wait(sockets, until)   one of these sockets ready, or that time; the yield gives the socket
#                            that is ready, or None when it is late
#     OTHERS_FIRST           nothing, but where the time slice is over it is the others' turn
#     MAY_BLOCK              a thread: what comes next asks a disk, DNS or a program, or takes long
#
#                                a socket is ready, or it is late
#                      +------------------------------------------------+
#                      v                                                |
#     start() --> runnable --> running, in the loop's thread -- Wait --> waiting
#                    ^  ^        |            |
#                    |  +--------+            | MAY_BLOCK
#                    |   OTHERS_FIRST         v
#                    +----------- running, in a thread of its own      (it can end in any of them)
#
# The rules that all else relies on:
# 1. A task has one owner, the loop or one thread, and only its owner steps it; each step asserts
#    that. The loop gives a task away before the thread starts, and the thread gives it back.
# 2. Code directly behind `yield MAY_BLOCK` runs in a thread of the task's own, and may wait. All
#    other code of tasks must neither wait nor take long: behind a Wait it runs in the loop's
#    thread, behind OTHERS_FIRST in whichever it was or in the loop's, in drive() in its caller's.
# 3. The loop's thread alone touches the selector, the run queue and what is noted about a task;
#    other threads use what `_lock` guards.
# 4. Tasks that were woken run at once, but for those whose Wait says `queued`. They run after the
#    others, in one time slice between two looks at the sockets: so answers that are under way come
#    before new requests.
#
# The loop knows nothing of HTTP. For callers that may wait, drive() runs the same generators.

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
SLICE = 0.002  # seconds for which one task, or the run queue, may hold up the others


class Wait(NamedTuple):
    """What a task waits for: sockets that become ready for READ or WRITE, and until when. To yield
    the same object again costs least; so one that may end too early is renewed only then."""

    sockets: tuple[tuple[socket.socket, int], ...] = ()
    until: float = math.inf  # of time.monotonic()
    queued: bool = False  # what comes next takes a while: others that were woken come first


NO_WAIT = Wait(until=0.0)  # one that is over


class Pause(enum.Enum):
    OTHERS_FIRST = "others first"
    MAY_BLOCK = "may block"


OTHERS_FIRST, MAY_BLOCK = Pause
Step = Union[Wait, Pause]
Steps = Generator[Step, Any, Any]


class Task:
    """A generator, and what the loop notes about it."""

    def __init__(self, steps: Steps, end: Callable[[], None]) -> None:
        self.steps = steps
        self.end = end  # to be called once it is over, even if it never began
        self.owner: object = None  # who may step it, the loop or a thread
        self.wait: Wait | None = None  # while it waits
        self.watched: dict[socket.socket, int] = {}  # what the selector watches for it
        self.interrupted = False


class Loop:
    def __init__(self) -> None:
        self._tasks: dict[Task, None] = {}  # those that the loop owns, the newest last
        self._runnable: dict[Task, Any] = {}  # the run queue, with the socket that each is told
        self._alarm = math.inf  # when the first of those that wait may be late
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakeups = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._wakeups, READ)
        self._lock = threading.Lock()  # of what follows
        self._added: list[tuple[Task, Step]] = []
        self._interruption: Callable[[], Exception] | None = None
        self._closed = False

    def start(self, steps: Steps, end: Callable[[], None]) -> None:
        """Take in a new task, from any thread. `end` is called once it is over."""
        self._add(Task(steps, end), OTHERS_FIRST)

    def interrupt(self, error: Callable[[], Exception]) -> None:
        """Raise an error in every task; in one that a thread has, once it comes back."""
        with self._lock:
            self._interruption = error
            self._wake()

    def close(self) -> None:
        """End every task that no thread has, and take in no more."""
        with self._lock:
            self._closed = True
            self._wake()

    def run(self) -> None:
        """Serve until close()."""
        try:
            while not self._closed:
                self._run_once()
        finally:
            self.close()
            for task in [*self._tasks, *(task for task, _ in self._added)]:
                self._end(task)
            for closable in (self._selector, self._waker, self._wakeups):
                closable.close()

    def _add(self, task: Task, step: Step) -> None:
        """Make the loop a task's owner; `step` is what it needs next."""
        task.owner = self
        with self._lock:
            closed = self._closed
            if not closed:
                self._added.append((task, step))
                self._wake()
        if closed:
            self._end(task)

    def _wake(self) -> None:
        with suppress(OSError):  # it was woken so often that it will be; or it has ended
            self._waker.send(b"!")

    def _run_once(self) -> None:
        """Look at the sockets once, then serve the run queue for a time slice."""
        for key, _ in self._ready():
            task, sock = key.data, key.fileobj
            if task is None:
                self._take_in()
            elif task.wait is None or sock not in task.watched:
                continue  # something before has made it go on
            elif task.wait.queued:
                self._enqueue(task, sock)
            else:
                self._step(task, sock)
        now = time.monotonic()
        if now >= self._alarm:
            self._enqueue_late(now)
        while self._runnable and time.monotonic() < now + SLICE:
            task = next(iter(self._runnable))
            self._step(task, self._runnable.pop(task))

    def _ready(self) -> list[tuple[selectors.SelectorKey, int]]:
        """What became ready, once something did or a task is late."""
        try:
            return self._selector.select(0.0 if self._runnable else seconds_until(self._alarm))
        except ValueError:  # more sockets than select() takes, on Windows
            if not self._tasks:
                raise
            self._end(next(reversed(self._tasks)))
            return []

    def _take_in(self) -> None:
        """Take in what other threads left, and an interruption."""
        self._wakeups.recv(1000)
        with self._lock:
            added, self._added = self._added, []
            interruption = self._interruption
        for task, step in added:
            self._tasks[task] = None
            self._arrange(task, step)
        for task in [*self._tasks]:
            if interruption and not task.interrupted:
                task.interrupted = True
                self._runnable.pop(task, None)
                self._step(task, None, interruption())

    def _enqueue(self, task: Task, sock: Any = None) -> None:
        task.wait = None
        self._runnable[task] = sock

    def _enqueue_late(self, now: float) -> None:
        """Let those go on that are late, and find out who will be next."""
        self._alarm = math.inf
        for task in self._tasks:
            if task.wait and task.wait.until <= now:
                self._enqueue(task)
            elif task.wait:
                self._alarm = min(self._alarm, task.wait.until)

    def _step(self, task: Task, sock: Any, error: Exception | None = None) -> None:
        """Step a task and arrange what it needs next. No failure of one ends the others."""
        step = self._stepped(task, self, sock, error)
        if step is None:
            self._end(task)
        elif step is not task.wait:
            self._arrange(task, step)

    def _stepped(self, task: Task, owner: object, sock: Any = None,
                 error: Exception | None = None) -> Step | None:
        """What a task needs before its next step, once it has had its time slice; None when it is
        over."""
        assert task.owner is owner, "only its owner steps a task"
        try:
            step = task.steps.throw(error) if error else task.steps.send(sock)
            if step is OTHERS_FIRST:
                slice_end = time.monotonic() + SLICE
                while step is OTHERS_FIRST and time.monotonic() < slice_end:
                    step = next(task.steps)
            return step
        except StopIteration:
            return None
        except Exception as failure:
            if failure is not error:  # which it is where the task had not begun
                log.exception("a connection failed unexpectedly")
            return None

    def _arrange(self, task: Task, step: Step) -> None:
        """Have a task wait for what it needs."""
        task.wait = step if isinstance(step, Wait) else None
        try:
            self._watch(task, dict(task.wait.sockets) if task.wait else {})
        except Exception:
            log.exception("a connection is lost")
            return self._end(task)
        if task.wait:
            self._alarm = min(self._alarm, task.wait.until)
        elif step is OTHERS_FIRST:
            self._enqueue(task)
        else:
            self._give_away(task)

    def _watch(self, task: Task, wanted: dict[socket.socket, int]) -> None:
        """Have the selector watch these sockets for a task, and no others."""
        for sock, events in [*task.watched.items()]:
            if wanted.get(sock) != events:
                del task.watched[sock]
                with suppress(KeyError, ValueError):  # it is closed
                    self._selector.unregister(sock)
        for sock, events in wanted.items():
            if sock not in task.watched:
                self._selector.register(sock, events, task)
                task.watched[sock] = events

    def _give_away(self, task: Task) -> None:
        """Have a thread of its own step a task, until it comes back."""
        del self._tasks[task]
        thread = threading.Thread(target=self._run_apart, args=(task,), daemon=True)
        task.owner = thread
        try:
            thread.start()
        except RuntimeError:  # the system has no more
            task.owner, self._tasks[task] = self, None
            self._step(task, None, OgxError(529, "no thread is left for this"))

    def _run_apart(self, task: Task) -> None:
        step: Step | None = MAY_BLOCK
        while step is MAY_BLOCK:
            step = self._stepped(task, threading.current_thread())
        if step is None:
            self._end(task)
        else:
            self._add(task, step)

    def _end(self, task: Task) -> None:
        """Forget a task that is over, or that nobody will step again."""
        self._tasks.pop(task, None)
        self._runnable.pop(task, None)
        try:
            self._watch(task, {})
            task.steps.close()
        except Exception:
            log.exception("a connection failed unexpectedly")
        task.end()


def sleep(seconds: float) -> Steps:
    """Wait, while others go on."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield Wait(until=until)


def drive(steps: Steps) -> Any:
    """Run a task to its end in this thread, which may wait; what it returns."""
    try:
        step = next(steps)
        while True:
            sock = ready_socket(step) if isinstance(step, Wait) else None
            step = steps.send(sock)
    except StopIteration as end:
        return end.value
    finally:
        steps.close()


def seconds_until(moment: float) -> float:
    """How long a selector may wait at once: epoll takes no more than 24 days."""
    return min(max(0.0, moment - time.monotonic()), 3600.0)


def ready_socket(wait: Wait) -> Any:
    """The first of a Wait's sockets to be ready; None when it is late, or after an hour."""
    with selectors.DefaultSelector() as selector:
        for sock, events in wait.sockets:
            selector.register(sock, events)
        ready = selector.select(seconds_until(wait.until))
        return next((key.fileobj for key, _ in ready), None)


# ======== Log ================================================================================
# What people read: the log, and lines at a terminal. Nothing else in this file writes to either:
# no control character gets there, and nobody who doesn't read holds up an answer.

LOG_LINE = 4000  # bytes
LOG_QUEUE = 1000  # lines that wait to be written; further ones are counted, and lost
LOG_PAUSE = 0.02  # seconds between two looks: to wake a thread for each line costs an eighth
OWNERS = functools.partial(os.open, mode=0o600)  # opens new files for the user's eyes alone


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes in a thread: a stopped terminal, a full pipe or a slow disk holds up nothing else.
    With logging's QueueHandler a blocked writer makes logging.shutdown hang at exit."""

    def __init__(self, path: str = "") -> None:
        stream = open(path, "a", encoding="utf-8", opener=OWNERS) if path else None  # noqa: SIM115
        super().__init__(stream)  # None: stderr
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.path, self.warned = path, False  # whether a warning or an error was logged
        self._path = path  # empty once a failure was told; the thread's
        self._lost = 0  # lines since the queue was full; under the handler's lock
        self._lines: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line; only a traceback, indented, brings further ones."""
        record.msg, record.args = " ".join(record.getMessage().splitlines()), None
        lines = without_controls(super().format(record)).encode("utf-8", "replace").split(b"\n")
        return "\n  ".join(line[:LOG_LINE].decode("utf-8", "ignore") for line in lines)

    def emit(self, record: logging.LogRecord) -> None:
        self.warned = self.warned or record.levelno >= logging.WARNING
        if self._lines.qsize() >= LOG_QUEUE:
            self._lost += 1
            return
        if self._lost:
            record.msg = f"({self._lost} lines found no reader) {record.msg}"
            self._lost = 0
        self._lines.put(self.format(record) + self.terminator)

    def flush(self) -> None:
        written = threading.Event()
        self._lines.put(written)
        written.wait(1.0)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            try:
                if isinstance(line, str):
                    self.stream.write(line)
                if self._lines.empty():
                    self.stream.flush()
            except Exception as error:  # a full disk, say; stderr may be closed, or none
                if self._path or self.stream is sys.stderr:  # which is then replaced
                    say(f"--log-file {self._path}: {error}" if self._path else "", to="stderr")
                    self._path = ""
            if isinstance(line, threading.Event):
                line.set()
            if self._lines.empty():
                time.sleep(LOG_PAUSE)


@contextmanager
def os_errors_of(source: str) -> Iterator[None]:
    """Turn the system's errors into OgxErrors that name their source."""
    try:
        yield
    except OSError as error:
        raise OgxError(400, f"{source}: {error.strerror or error}") from None


def start_log(path: str | None, level: str) -> None:
    with os_errors_of(f"--log-file {path}"):
        logging.basicConfig(level=level.upper(), handlers=[LogHandler(path or "")])


def say(*lines: str, to: str = "stdout") -> None:
    """Print lines; a closed stdout (`| head`) is no reason to stop serving."""
    stream = getattr(sys, to)
    coding = getattr(stream, "encoding", None) or "utf-8"  # some terminals have another one
    text = without_controls("\n".join(lines)).encode(coding, "backslashreplace").decode(coding)
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        setattr(sys, to, open(os.devnull, "w"))  # noqa: SIM115


# ======== Store ==============================================================================
# What must outlive the process, models registered over the API and lessons, in a sqlite file of one
# table, which several servers may share. It never stops serving: what can't be written yet is kept
# in memory; the log and the answers say so.

MOST_LEARNED = 1000  # models about which something is kept; the first make room for others
STATE_SECONDS = 1.0  # between two looks at the state file


class Store:
    """JSON values by namespace and key, in memory and, but for an empty path, in a file; safe for
    threads."""

    def __init__(self, path: str = "") -> None:
        self.path = os.path.abspath(path) if path else ""
        # Why the file lacks something; while set, sync() alone tries the file again.
        self.problem = "" if path else "there is no state file: this is lost when ogx.py stops"
        self._lock = threading.RLock()  # guards the file and all below
        self._saved: dict[tuple[str, str], str] = {}  # what the file held when it was last read
        self._unsaved: dict[tuple[str, str], str] = {}  # what it is to hold; "null": no longer
        self._version = -1  # of the file: begins anywhere, and grows by 1 with each write
        self.sync()

    def all(self, namespace: str) -> dict[str, Any]:
        """Values by key, oldest first."""
        with self._lock:
            facts = {**self._saved, **self._unsaved}
        values = {key: json_or_none(facts[of, key]) for of, key in facts if of == namespace}
        return {key: value for key, value in values.items() if isinstance(value, (dict, list))}

    def put(self, namespace: str, key: str, value: Any) -> str:
        """Keep a value, or forget it if None; return `problem`."""
        fact = namespace, key.encode("utf-8", "replace").decode()  # sqlite takes no half characters
        with self._lock:
            self._unsaved[fact] = json.dumps(value)
            if value is None and fact not in self._saved:
                del self._unsaved[fact]
            if not self.problem:
                self.sync()
            return self.problem

    def sync(self) -> None:
        """Write what the file lacks, and read what others wrote there."""
        if not self.path:
            return
        problem = ""
        with self._lock:
            try:
                self._write_and_read()
            except Exception as error:  # of the system, or of sqlite3, which not every Python has
                with suppress(OSError):
                    if self._set_aside(error):
                        return self.sync()
                problem = (f"can't use {self.path} as state file ({error}): what it lacks is lost "
                           "if ogx.py stops before it can")
            if problem != self.problem:
                log.warning("%s", problem or f"the state file {self.path} is used again")
            self.problem = problem

    def _write_and_read(self) -> None:
        if not (self._saved or self._unsaved or os.path.exists(self.path)):
            return
        import sqlite3  # only now: it costs a megabyte and start-up time

        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        with suppress(FileExistsError):  # to open and close one that exists would end its locks
            open(self.path, "x", opener=OWNERS).close()
        if not os.path.isfile(self.path):
            raise ValueError("it is no file")
        database = sqlite3.connect(self.path, timeout=2.0, isolation_level=None)
        with closing(database), database:
            database.execute("BEGIN IMMEDIATE" if self._unsaved else "BEGIN")
            version = self._read(database)
            if self._unsaved:
                version += 1
                rows = [(*fact, value, time.time()) for fact, value in self._unsaved.items()]
                database.executemany("REPLACE INTO facts VALUES (?, ?, ?, ?)", rows)
                database.execute("DELETE FROM facts WHERE value = 'null'")
                database.execute(f"PRAGMA user_version = {version}")
        facts = {**self._saved, **self._unsaved}
        self._saved = {fact: value for fact, value in facts.items() if value != "null"}
        self._unsaved, self._version = {}, version

    def _read(self, database: Any) -> int:
        """Take in what may be new in the file; return its version."""
        if not database.execute("SELECT * FROM sqlite_master").fetchone():  # it is new, or emptied
            database.execute("CREATE TABLE facts (kind TEXT, key TEXT, value TEXT, at REAL, "
                             "PRIMARY KEY (kind, key))")
            database.execute(f"PRAGMA user_version = {random.getrandbits(30)}")
        version: int = database.execute("PRAGMA user_version").fetchone()[0]
        if version == self._version and not self._unsaved:
            return version
        database.text_factory = lambda data: data.decode("utf-8", "replace")
        rows = database.execute("SELECT kind, key, value FROM facts ORDER BY at").fetchall()
        if not 0 <= version - self._version < 4096:  # another file, or an older copy
            self._unsaved = {**self._saved, **self._unsaved}
        self._saved = {(of, key): value for of, key, value in rows
                       if type(key) is type(value) is str}
        return version

    def _set_aside(self, error: Exception) -> bool:
        """Rename a corrupt file; return whether it was one."""
        if type(error).__name__ != "DatabaseError":  # locked, read-only, another program's
            return False
        with open(self.path, "rb") as file:
            if file.read(16) != b"SQLite format 3\0" and self._version < 0:
                return False  # it never was a state file
        aside = f"{self.path}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}"
        os.replace(self.path, aside)
        log.warning("%s was corrupt (%s); it is now %s", self.path, error, aside)
        return True

    def close(self) -> None:
        if self._unsaved:
            self.sync()


def state_path(given: str | None, environ: Mapping[str, str]) -> str:
    """The state file's path; empty where no home directory is known."""
    base = environ.get("XDG_STATE_HOME") or environ.get("LOCALAPPDATA") or "~/.local/state"
    path = os.path.expanduser(given or environ.get("OGX_STATE") or f"{base}/ogx/state.sqlite")
    if path.startswith("~"):
        log.warning("no home directory is known, so there is no state file (see --state)")
        return ""
    return path


class Lessons:
    """Lessons by model, each kept in the store for 30 days; safe for threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.RLock()  # held to change lessons, here and in the store
        self.load()

    def load(self) -> None:
        with self._lock:
            lessons: dict[str, dict[str, Lesson]] = {}
            for key, entries in self._store.all("lessons").items():
                served = key.rpartition("\n")[0] or key  # earlier versions kept all at one key
                for lesson in filter(None, map(lesson_from_json, entries)):
                    lessons.setdefault(served, {})[subject_of(lesson)] = lesson
            # By model and subject. A model's are replaced, never altered, so of() needs no lock.
            self._lessons = lessons

    def of(self, model: Model) -> tuple[Lesson, ...]:
        oldest = time.time() - 30 * 86400
        lessons = self._lessons.get(model.listed_id, {}).values()
        return tuple(lesson for lesson in lessons if lesson.at > oldest)

    def add(self, model: Model, lessons: Iterable[Lesson]) -> None:
        """Keep lessons, each in place of an older one about the same."""
        served = model.listed_id
        for lesson in (replace(lesson, at=time.time()) for lesson in lessons if lesson.keep):
            subject = subject_of(lesson)
            with self._lock:
                self._lessons[served] = {**self._lessons.get(served, {}), subject: lesson}
                self._store.put("lessons", f"{served}\n{subject}", [asdict(lesson)])
                if len(self._lessons) > MOST_LEARNED:
                    self.forget(next(iter(self._lessons)))

    def forget(self, served: str) -> bool:
        """Forget a model's lessons; return whether there were any."""
        with self._lock:
            lessons = self._lessons.pop(served, {})
            for key in (served, *(f"{served}\n{subject}" for subject in lessons)):
                self._store.put("lessons", key, None)
        return bool(lessons)


def subject_of(lesson: Lesson) -> str:
    value = lesson.value if lesson.action in ("unlist", "strip_keyword") else ""
    return f"{lesson.action} {lesson.field} {lesson.dialect} {value}"


def lesson_from_json(kept: Any) -> Lesson | None:
    """A lesson from the store, with tuples again; None for another version's."""
    try:
        value = kept["value"]
        if isinstance(value, list):
            value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        lesson = Lesson(**{**kept, "value": value})
        known = lesson.action in (*ACTIONS, "set", "drop", "rename") or (
            lesson.action == "override" and hasattr(ProviderKind, lesson.field))
    except (TypeError, KeyError):
        return None
    return lesson if known and isinstance(lesson.at, (int, float)) else None


class Ratios:
    """By model, its tokens for one of our estimate: the median of the last nine answers."""

    def __init__(self) -> None:
        self._seen: dict[str, list[float]] = {}  # lists are replaced, never altered, for threads

    def estimate(self, model: Model, prompt: tuple[float, int]) -> int:
        """A prompt's tokens as this model counts; `prompt` is what a TokenCounter gave."""
        seen = sorted(self._seen.get(model.listed_id, (1.0,)))
        return round(prompt[0] * seen[len(seen) // 2]) + prompt[1]

    def learn(self, model: Model, prompt: tuple[float, int], usage: Usage | None) -> None:
        """Compare an estimate with what the upstream told."""
        if not usage or prompt[0] < 250 or prompt[1]:  # mostly a template's, or an image's tokens
            return
        ratio = (usage.input + usage.cache_read + usage.cache_written) / prompt[0]
        if 0.5 < ratio < 4.0:  # else it tells nothing, or leaves out what was cached
            if len(self._seen) >= MOST_LEARNED:
                self._seen = {}  # one answer relearns it
            self._seen[model.listed_id] = [*self._seen.get(model.listed_id, [])[-8:], ratio]


# ======== Signing ============================================================================
# AWS takes signatures (version 4), made with keys from variables or a profile. Roles and sign-on:
# `credential_process = aws configure export-credentials --profile X`.

AWS_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
PROCESS_SECONDS, PROCESS_BYTES = 30.0, 65536  # of a credential_process and what it prints
SECRET = r"(?i)(secret|token|key|password)[\w\"']{0,30}\s?[=:]\s?\S+|[\w+/=-]{32,}"


def aws_signature(method: str, url: str, headers: Mapping[str, str], body: bytes,
                  keys: Sequence[str], scope: str, now: float) -> dict[str, str]:
    """The headers that sign a request and its headers, with the host, at `now`, in seconds since
    1970. `keys` are AWS_KEYS' values, `scope` is "region/service". Pure."""
    import hashlib  # only now: few need them
    import hmac

    key_id, secret, token = keys
    date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    added = {"x-amz-date": date, **({"x-amz-security-token": token} if token else {})}
    signed = sorted((k.lower(), " ".join(v.split())) for k, v in {**headers, **added}.items())
    names, parts = ";".join(name for name, _ in signed), urllib.parse.urlsplit(url)
    pairs = sorted(pair.partition("=")[::2] for pair in parts.query.split("&") if pair)
    path = urllib.parse.quote(parts.path or "/", safe="/~")  # encoded already, and once more here
    canonical = "\n".join((method, path, "&".join(map("=".join, pairs)), *map(":".join, signed),
                           "", names, hashlib.sha256(body).hexdigest()))
    scope = f"{date[:8]}/{scope}/aws4_request"
    digest, key = hashlib.sha256(canonical.encode()).hexdigest(), f"AWS4{secret}".encode()
    for part in (*scope.split("/"), f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{digest}"):
        key = hmac.digest(key, part.encode(), "sha256")
    return {**added, "authorization": f"AWS4-HMAC-SHA256 Credential={key_id}/{scope}, "
                                      f"SignedHeaders={names}, Signature={key.hex()}"}


def aws_settings(environ: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """The variables, then the profile in either file; OgxError(401) for one that can't be read."""
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or ""
    yield {"region": region, **{name: environ.get(name.upper(), "") for name in AWS_KEYS}}
    profile = environ.get("AWS_PROFILE") or "default"
    files = (environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials",
             environ.get("AWS_CONFIG_FILE") or "~/.aws/config")
    for path in filter(os.path.exists, map(os.path.expanduser, files)):
        import configparser  # only now, to start sooner

        parser = configparser.RawConfigParser(default_section="", strict=False)
        try:
            parser.read(path, encoding="utf-8")
        except (ValueError, configparser.Error) as error:  # whose words quote the file
            raise OgxError(401, f"can't read {path} ({type(error).__name__})") from None
        yield from (parser[s] for s in (profile, f"profile {profile}") if s in parser)


def with_aws_region(environ: Mapping[str, str]) -> Mapping[str, str]:
    """The environment with the profile's region where no variable names one."""
    with suppress(OgxError):
        regions = (settings.get("region") for settings in aws_settings(environ))
        return {**environ, "AWS_REGION": next(filter(None, regions), "")}
    return environ


def keys_from_process(command: str, stopped: threading.Event) -> tuple[float, list[str]]:
    """Until when to use a credential_process' keys, and AWS_KEYS' values; or OgxError(401)."""
    words = b""
    try:
        printed, words = output_of(command, stopped)
        keys = json.loads(printed)
        until = (keys.get("Expiration") or "9000-01-01T00:00:00Z").replace("Z", "+00:00")
        end = datetime.fromisoformat(until).timestamp() - 60
        return end, [keys["AccessKeyId"], keys["SecretAccessKey"], keys.get("SessionToken") or ""]
    except (OSError, ValueError, LookupError, AttributeError, RecursionError) as error:
        why = re.sub(SECRET, "***", words.decode("utf-8", "replace"))
        why = one_line(why) or type(error).__name__
        raise OgxError(401, f"the credential_process of the AWS profile failed: {why}") from None


def output_of(command: str, stopped: threading.Event) -> tuple[bytes, bytes]:
    """A command's stdout, empty if it fails, and stderr. It is killed, with all that it started,
    when it takes too long, prints too much, or `stopped` is set."""
    import subprocess

    end = time.monotonic() + PROCESS_SECONDS
    with subprocess.Popen(shlex.split(command), bufsize=0, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          start_new_session=True) as process:
        streams: list[Any] = [process.stdout, process.stderr]
        for stream in streams:
            with suppress(AttributeError):  # Windows' older Pythons wait for what it prints
                os.set_blocking(stream.fileno(), False)
        printed, runs = [b"", b""], True
        while runs:
            runs = process.poll() is None
            printed = [(data + (stream.read(PROCESS_BYTES) or b""))[:PROCESS_BYTES]
                       for data, stream in zip(printed, streams)]
            late = time.monotonic() > end or len(printed[0]) == PROCESS_BYTES
            if runs and (late or stopped.wait(0.02)):
                with suppress(OSError, AttributeError):  # Windows has no groups
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                return b"", b"it took too long, or printed too much"
    return b"" if process.returncode else printed[0], printed[1]


class Signer:
    """Signs with the user's keys of the moment, as files and processes give them."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.secrets: set[str] = set()  # all that were used
        self._clock = clock  # seconds since 1970
        self._lock = threading.Lock()  # guards _results, and is held while a process runs
        # By command, until when its keys or its failure are told.
        self._results: dict[str, tuple[float, list[str] | OgxError]] = {}
        self._stopped = threading.Event()

    def keys(self, environ: Mapping[str, str]) -> Sequence[str]:
        """AWS_KEYS' values; OgxError(401) where there are none."""
        command = ""
        for settings in aws_settings(environ):
            keys = [settings.get(name, "").strip() for name in AWS_KEYS]
            if keys[0] and keys[1]:
                return keys
            command = command or settings.get("credential_process", "")
        if not command:
            raise OgxError(401, "Unable to locate credentials: set AWS_ACCESS_KEY_ID and "
                                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for single sign-on and "
                                "roles to one with a credential_process")
        with self._lock:
            until, result = self._results.get(command, (0.0, []))
            if self._clock() > until:
                try:
                    until, result = keys_from_process(command, self._stopped)
                except OgxError as error:
                    until, result = self._clock() + 5, replace(error)
                self._results[command] = until, result
        if isinstance(result, OgxError):
            raise replace(result)
        return result

    def close(self) -> None:
        """End the process that runs, and wait for that."""
        self._stopped.set()
        with self._lock:
            pass

    def headers(self, signed: str, method: str, url: str, body: bytes | None) -> dict[str, str]:
        """The headers that sign a request now; none where the URL isn't AWS's."""
        match = re.search(signed, url)
        if not match:
            return {}
        content = {} if body is None else {"content-type": "application/json"}
        headers = {"host": urllib.parse.urlsplit(url).netloc, **content}
        keys, scope = self.keys(os.environ), f"{match[2]}/{match[1]}"
        self.secrets.update(keys[1:])
        return aws_signature(method, url, headers, body or b"", keys, scope, self._clock())


# ======== Upstream ===========================================================================
# Connections to providers. http.client makes them (TLS, proxies); requests are written and replies
# are read straight from the socket, which never waits: every piece is handed on as it comes.
# All of it runs in whichever thread steps the caller: the loop's, a task's own or that of drive().

MIN_SECRET = 8  # characters of a key worth hiding; shorter ones are dummies, and words of any text
POOL_SECONDS = 50.0  # an idle connection is used no longer: many servers close them after 60
POOL_SIZE = 64  # idle connections kept for one provider
MAX_INTERIM = 500  # heads with a status of 1xx before an answer
MAX_ASKED = 32 * 1024 * 1024  # bytes of a model list and the like
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
Piece = Union[bytes, Step]  # of a body, b"" at its end; or what to yield before the next read()


def received(sock: socket.socket, size: int = RECEIVE_SIZE) -> bytes | None:
    """What a connection holds, b"" at its end; None where it holds nothing yet, or with TLS half
    a record. All connections are non-blocking: with a timeout, Python asks the system twice."""
    try:
        return sock.recv(size)
    except WOULD_BLOCK:
        return None


def proxy_of(scheme: str, host: str) -> urllib.parse.SplitResult | None:
    """The proxy that the environment names for a host; never for loopback."""
    if is_loopback(host):
        return None
    import urllib.request  # only now: it costs a tenth of the start-up time

    url = urllib.request.getproxies().get(scheme)
    if not url or urllib.request.proxy_bypass(host):
        return None
    proxy = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if proxy.scheme.startswith("socks"):
        words = f"{scheme.upper()}_PROXY names a SOCKS proxy; ogx.py speaks to HTTP proxies alone"
        raise OgxError(502, words, headers={"x-should-retry": "false"})
    return proxy


class Connection(NamedTuple):
    """A connection to a provider; `proxy` is the one before it that reads the requests."""

    socket: socket.socket
    proxy: urllib.parse.SplitResult | None = None


class Upstream:
    """A pool of connections, by where they lead. Safe for threads."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        self.instance = uuid.uuid4().hex  # goes with every request, to recognise our own
        self.signer = Signer()
        self.closed = False
        self._lock = threading.Lock()  # of the next two
        self._idle: dict[str, list[tuple[float, Connection, Body]]] = {}
        self._made: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._tls: dict[tuple[bool, str], ssl.SSLContext] = {}

    def secrets(self, provider: Provider) -> list[str]:
        """What the provider knows and may quote, and no one else may see."""
        known = (provider.api_key, *provider.secrets, *self.signer.secrets)
        return [secret for secret in known if len(secret) >= MIN_SECRET]

    def send(self, provider: Provider, method: str, path: str, body: bytes | None = None,
             headers: Mapping[str, str] = {}, timeout: float | None = None,
             ) -> Generator[Step, Any, Reply]:
        """Send a request to one of the provider's paths; the reply is still to be read. OgxError
        502 or 504 where the provider can't be reached."""
        if provider.kind.built_in_models:
            return DemoReply(self, provider, body or b"{}")
        own = {"x-ogx-instance": self.instance, **headers}
        if provider.kind.signed and not provider.api_key:
            yield MAY_BLOCK  # files, or a program
            own.update(self.signer.headers(provider.kind.signed, method, provider.url(path), body))
        request = functools.partial(request_bytes, provider, method, path, body, own)
        reply = Reply(self, provider, request, timeout or self.limits.connect_timeout)
        yield from reply.connect()
        return reply

    def fetch(self, provider: Provider, path: str, timeout: float, body: bytes | None = None,
              headers: Mapping[str, str] = {}) -> Generator[Step, Any, tuple[Reply, bytes]]:
        """The reply to a GET, or to a POST where there is a body, and what it holds; OgxError 502,
        or 504 where that takes longer than `timeout` seconds."""
        method = "GET" if body is None else "POST"
        patience = min(timeout, self.limits.connect_timeout)
        reply = yield from self.send(provider, method, path, body, headers, patience)
        try:
            answer, complete = yield from reply.whole(timeout, MAX_ASKED)
        finally:
            reply.release()
        if complete:
            return reply, answer
        raise OgxError(504, f"no complete answer from {provider.base_url} within {timeout:g} s")

    def ask(self, provider: Provider, path: str, timeout: float,
            body: bytes | None = None) -> tuple[Reply, bytes]:
        """As fetch(), for callers that may wait."""
        asked: tuple[Reply, bytes] = drive(self.fetch(provider, path, timeout, body))
        return asked

    def json(self, provider: Provider, path: str, timeout: float) -> Any:
        """The JSON that a GET answers with status 200; OgxError otherwise. This waits."""
        reply, body = self.ask(provider, path, timeout)
        if reply.status != 200:
            refusal = refusal_from_body(reply.status, body)
            origin = f"{provider.url(path)}, HTTP {reply.status}"
            raise upstream_error(refusal, origin, reply.headers)
        value = json_or_none(body)
        if value is None:
            words = f"expected JSON from {provider.url(path)}, got {cut(beginning(body), 120)}"
            raise OgxError(502, words)
        return value

    def idle_connection(self, provider: Provider) -> Connection | None:
        """A connection to the provider that was used before and is still good."""
        while True:
            with self._lock:
                idle = self._idle.get(provider.pool_key)
                if not idle:
                    return None
                since, connection, body = idle.pop()
            with suppress(OSError, OgxError):
                # One that holds anything else was closed by the other side, or is out of step.
                if time.monotonic() - since < POOL_SECONDS and is_spent(
                    body, received(connection.socket)
                ):
                    return connection
            connection.socket.close()

    def give_back(self, provider: Provider, connection: Connection, body: Body) -> None:
        """Keep a connection for another request."""
        with self._lock:
            idle, now = self._idle.setdefault(provider.pool_key, []), time.monotonic()
            while idle and now - idle[0][0] > POOL_SECONDS:
                idle.pop(0)[1].socket.close()
            if len(idle) < POOL_SIZE and not self.closed:
                idle.append((now, connection, body))
                return
        connection.socket.close()

    def close(self) -> None:
        """Close what is idle, and end what runs."""
        self.closed = True
        with self._lock:
            for _, connection, _ in itertools.chain(*self._idle.values()):
                connection.socket.close()
            self._idle.clear()
            for sock in self._made:
                with suppress(OSError):  # of TCP, not of TLS: its state is another thread's
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def new_connection(self, provider: Provider, timeout: float) -> Connection:
        """A new connection, for which this waits; OgxError 502 or 504, told for the user, when the
        provider can't be reached."""
        parts = urllib.parse.urlsplit(provider.base_url)
        host, secure, proxy = parts.hostname or "", parts.scheme == "https", None
        try:
            proxy = proxy_of(parts.scheme, host)
            at = proxy or parts
            name, port = at.hostname or "", at.port or (443 if secure and not proxy else 80)
            connection = http.client.HTTPConnection(name, port, timeout=timeout)
            if secure:
                tls = self._context(provider)
                connection = http.client.HTTPSConnection(name, port, timeout=timeout, context=tls)
            if proxy and secure:
                connection.set_tunnel(host, parts.port or 443, proxy_headers(proxy))
            connection.connect()
        except (OSError, http.client.HTTPException, ValueError) as error:  # UnicodeError too
            raise unreachable(provider, error, proxy) from None
        sock: socket.socket = connection.sock
        sock.setblocking(False)
        with self._lock:
            self._made.add(sock)
        if self.closed:  # meanwhile, and this one was not among those that were ended
            sock.close()
            raise stopping_error()
        return Connection(sock, None if secure else proxy)

    def _context(self, provider: Provider) -> ssl.SSLContext:
        """The TLS settings for a provider; SSL_CERT_FILE is honoured by the ssl module."""
        key = (provider.verify, provider.ca_file)
        if key not in self._tls:
            try:
                context = ssl.create_default_context(cafile=provider.ca_file or None)
            except OSError as error:
                words = f"can't read its ca_file {provider.ca_file}: {error.strerror or error}"
                raise OgxError(502, f"{provider.id}: {words}") from None
            if not provider.verify:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self._tls[key] = context
        return self._tls[key]


def stopping_error() -> OgxError:
    """For who still waits when the server stops; clients try again after it."""
    return OgxError(503, "ogx.py is stopping; ask again in a moment", "overloaded_error")


UNREACHABLE = {  # the first that fits
    ssl.SSLCertVerificationError: "its TLS certificate was not accepted ({0.verify_message})",
    ssl.SSLError: "TLS failed ({0}); is the URL's https right?",
    socket.gaierror: "its host name can't be resolved",
    socket.timeout: "connecting took too long",  # TimeoutError's other name from 3.10 on
    ConnectionRefusedError: "connection refused; is the server running there?"}


def unreachable(provider: Provider, error: Exception,
                proxy: urllib.parse.SplitResult | None = None) -> OgxError:
    """Why a provider, or the proxy before it, can't be reached, and what to look at."""
    if provider.kind.signed and ".." in provider.base_url:
        return OgxError(400, f"{provider.id}: You must specify a region: set AWS_REGION")
    words = next((words for cls, words in UNREACHABLE.items() if isinstance(error, cls)), "{0}")
    why = words.format(error) or type(error).__name__
    status = 504 if isinstance(error, socket.timeout) else 502
    where = f"{provider.id} at {provider.base_url}"
    if proxy:
        scheme = provider.base_url.partition(":")[0].upper()
        where += f" through {scheme}_PROXY, {proxy.netloc.rpartition('@')[2]}"
    return OgxError(status, f"can't reach {where}: {why}", reason=why)


class Reply:
    """An upstream's answer while it comes in; headers by lower-case name. One that is `complete`
    has nothing to say any more, whatever its framing still waits for."""

    def __init__(self, upstream: Upstream, provider: Provider,
                 request: Callable[[urllib.parse.SplitResult | None], bytes],
                 timeout: float) -> None:
        self.status = 0
        self.headers: Headers = {}
        self.complete = False
        self._upstream, self._provider, self._timeout = upstream, provider, timeout
        self._connection: Connection | None = None
        self._reused = False  # the connection, which may be dead
        self._reusable = False  # once the body is done
        self._request: Any = request  # until the head is there: it may have to be sent once more
        self._unsent = memoryview(b"")  # of the request
        self._writable = True  # the upstream reads on, as far as is known
        self._buffer = b""  # what was received and not read
        self._would_block = False  # nothing more can be there yet
        self._interim = 0  # heads with a status of 1xx
        self._body: Body | None = None  # once the head is there
        self._unpacker: Any = None  # of its content-encoding
        self._last_activity = time.monotonic()  # when it sent something, or took some
        self._deadline = math.inf  # of whole()
        self._wait = NO_WAIT  # the last one, given again while it holds

    def secrets(self) -> list[str]:
        """What its errors may quote, and no one may see."""
        return self._upstream.secrets(self._provider)

    def connect(self) -> Steps:
        """Take an idle connection, or make one, and send as much as goes; OgxError 502 or 504."""
        idle = None if self._reused else self._upstream.idle_connection(self._provider)
        if idle is None:
            yield MAY_BLOCK
        connection = idle or self._upstream.new_connection(self._provider, self._timeout)
        self._connection, self._reused = connection, idle is not None
        self._unsent, self._writable = memoryview(self._request(connection.proxy)), True
        self._last_activity, self._wait = time.monotonic(), NO_WAIT
        self._send()

    def _send(self) -> None:
        """Send what the upstream takes now, though it may have begun to answer. An error is no
        reason to stop reading: it may have said before that the body is too large."""
        try:
            while self._unsent and self._connection:
                self._unsent = self._unsent[self._connection.socket.send(self._unsent) :]
                self._last_activity = time.monotonic()
        except WOULD_BLOCK:
            pass
        except OSError:
            self._writable = False
        if not self._unsent:  # an empty view would still hold the whole request
            self._unsent = memoryview(b"")
            self._wait = NO_WAIT

    def head(self) -> Steps:
        """Read on to the end of status and headers."""
        while self._body is None:
            data = self._receive()
            if not isinstance(data, bytes):
                yield data
            elif data:
                self._buffer += data
                self._parse_heads()
            elif self._is_dead():
                self.release()
                yield from self.connect()
            else:
                raise self._lost_connection(None)

    def _is_dead(self) -> bool:
        """Whether the connection, which has ended, may have been dead before this request."""
        at_once = time.monotonic() - self._last_activity < 1.0
        return self._reused and not (self._interim or self._buffer) and at_once

    def _parse_heads(self) -> None:
        """Take complete heads off the buffer; those with a status of 1xx are skipped."""
        while self._body is None:
            end = HEAD_END.search(self._buffer)
            if not end:
                if len(self._buffer) > MAX_HEAD:
                    raise OgxError(502, f"{self._provider.id} sent headers that are too large")
                return
            head, self._buffer = self._buffer[: end.start()], self._buffer[end.end() :]
            self._parse_head(head)
            self._interim += 1
            if self._interim > MAX_INTERIM:
                raise OgxError(502, f"{self._provider.id} sent {MAX_INTERIM} heads, no answer")

    def _parse_head(self, head: bytes) -> None:
        first, _, lines = head.partition(b"\n")
        match = STATUS_LINE.match(first)
        if not match:
            raise OgxError(502, f"{self._provider.id} at {self._provider.base_url} doesn't answer "
                                "in HTTP")
        if match[2].startswith(b"1"):
            return
        try:
            self.status, self.headers = int(match[2]), headers_from_bytes(lines)
        except OgxError:
            raise OgxError(502, f"{self._provider.id} sent malformed headers") from None
        self._body, self._request = answer_body(self.status, self.headers), None
        if self.headers.get("content-encoding", "").lower() in ("gzip", "deflate"):
            self._unpacker = zlib.decompressobj(GZIP_OR_ZLIB)
        closes = "close" in self.headers.get("connection", "").lower() or match[1] == b"1.0"
        self._reusable = not closes
        self._wait = NO_WAIT

    def read(self) -> Piece:
        """The next piece of the body, b"" at its end; or what is needed to go on."""
        body = self._body
        assert body is not None, "head() comes before read()"
        if body.done:
            return b""
        data, self._buffer = self._buffer, b""
        raw: Piece = data or self._receive()
        if not isinstance(raw, bytes):
            return raw
        try:
            if not raw:
                body.end()
                self._reusable = False
                return b""
            payload = body.feed(raw)
            if self._unpacker:
                payload = self._unpacker.decompress(payload, 128 * RECEIVE_SIZE)
                if self._unpacker.unconsumed_tail:
                    raise OgxError(400, "packed data that unpacks to too much")
        except zlib.error:
            raise OgxError(502, f"{self._provider.id} sent broken gzip data") from None
        except OgxError as error:
            raise OgxError(502, f"{error.message} ({self._provider.id})") from None
        # What brings nothing, such as empty lines, must not hold up others.
        return payload or (b"" if body.done else OTHERS_FIRST)

    def whole(self, seconds: float, size: int) -> Generator[Step, Any, tuple[bytes, bool]]:
        """The body as far as it comes in time and holds `size` bytes; whether that is all."""
        self._deadline, self._wait = time.monotonic() + seconds, NO_WAIT
        answer, head = bytearray(), self.head()
        while len(answer) < size and time.monotonic() < self._deadline:
            piece = next(head, None) or self.read()
            if piece == b"":
                return bytes(answer), True
            if isinstance(piece, bytes):
                answer += piece
                piece = OTHERS_FIRST
            yield piece
        return bytes(answer), False

    def items(self) -> Iterator[list[bytes]]:
        """The body's items as they come; see AnswerReader. This waits."""
        reader, piece = AnswerReader(), self.read()
        while piece != b"":
            if isinstance(piece, bytes):
                yield reader.feed(piece)
            elif isinstance(piece, Wait):
                ready_socket(piece)
            piece = self.read()
        yield reader.end()

    def _receive(self) -> Piece:
        """Bytes as they come, b"" at the end, or a Wait where there are none yet; OgxError(504)
        after too long a silence."""
        assert self._connection, "connect() comes before head()"
        sock = self._connection.socket
        if self._upstream.closed:
            raise stopping_error()
        if self._unsent and self._writable:
            self._send()
        if self._would_block:
            self._would_block = False
            return self._next_wait(sock)
        try:
            data = received(sock)
        except OSError as error:
            if self._is_dead():
                return b""
            raise self._lost_connection(error) from None
        if data is None:
            return self._next_wait(sock)
        if data:
            self._last_activity = time.monotonic()
            # A piece that is not full was all there is; but TLS may keep some back.
            self._would_block = len(data) < RECEIVE_SIZE and type(sock) is socket.socket
        return data

    def _next_wait(self, sock: socket.socket) -> Wait:
        """What to wait for: bytes and, while some are unsent, room for them."""
        now, limits = time.monotonic(), self._upstream.limits
        if now < self._wait.until and not self._unsent:
            return self._wait
        sends = bool(self._unsent) and self._writable
        begins = self._body is None and not self._unsent
        silence = limits.first_byte_timeout if begins else limits.idle_timeout
        until = self._last_activity + silence
        if until <= now < self._deadline:
            did = f"sent nothing for {now - self._last_activity:.3g} s"
            did = "stopped reading the request" if self._unsent else did
            raise OgxError(504, f"{self._provider.id} {did}")
        events = READ | WRITE if sends else READ
        self._wait = Wait(((sock, events),), min(until, self._deadline))
        return self._wait

    def _lost_connection(self, error: OSError | None) -> OgxError:
        why = (error and error.strerror) or "it closed the connection"
        return OgxError(502, f"lost the connection to {self._provider.id} at "
                             f"{self._provider.base_url}: {why}")

    def release(self) -> None:
        """Done with it: keep the connection where it is clean, else close it."""
        body, connection, self._connection = self._body, self._connection, None
        surplus = bool(self._buffer or self._unsent)
        ended = body and self._reusable and (self.complete or body.done)
        if connection and body and ended and not (surplus or body.rest):
            self._upstream.give_back(self._provider, connection, body)
        elif connection:
            connection.socket.close()


class DemoReply(Reply):
    """The demo model's answer, which is made here."""

    def __init__(self, upstream: Upstream, provider: Provider, request: bytes) -> None:
        super().__init__(upstream, provider, lambda _: request, 0.0)
        self.status = 200
        self._pieces = demo_stream(json.loads(request))

    def head(self) -> Steps:
        yield from ()

    def read(self) -> Piece:
        return next(self._pieces, b"")


# ======== Discovery ==========================================================================
# What the providers serve, asked at the start and from time to time, and told to the registry.

LIST_TIMEOUT = 5.0  # seconds for a provider's model list
ASK_AGAIN = 2.0  # seconds that a request waits for providers that had a problem
MAX_PAGES = 20  # of a model list
RETRYABLE = (408, 429, 500, 502, 503, 504, 529)  # statuses of failures that pass


class Discovery:
    """Asks providers in threads. `done` is set when each answered or failed once."""

    def __init__(self, config: Config, registry: Registry, upstream: Upstream) -> None:
        self.config = config
        self.registry = registry
        self.upstream = upstream
        self.refresh = 15.0  # seconds between lists of local servers, and after a problem
        self.done = threading.Event()
        self._closed = threading.Event()
        self._asking = threading.Lock()
        self._next_ask = 0.0  # when those with a problem may be asked again

    def start(self) -> None:
        """Begin to ask; local servers where no provider is configured."""
        if not self.registry.providers:
            kinds = PROVIDER_KINDS.values() if self.config.discover_local else ()
            self.registry.adopt(local_providers(self.upstream, kinds))
        threading.Thread(target=self._run, name="discovery", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def ask_again(self) -> None:
        """Ask those that have a problem, once a second at most, and wait a moment for them."""
        with self._asking:
            due = [provider for pid, provider in self.registry.providers.items()
                   if pid in self.registry.problems]
            if time.monotonic() >= self._next_ask:
                call_in_threads(self._ask, due, ASK_AGAIN)
                self._next_ask = time.monotonic() + 1.0

    def _run(self) -> None:
        for number in itertools.count():
            due = [provider for provider in self.registry.providers.values()
                   if number % 20 == 0 or provider.id in self.registry.problems
                   or is_loopback(address_of(provider.base_url)[1])]
            call_in_threads(self._ask, due, 3 * LIST_TIMEOUT)
            self.done.set()
            if self._closed.wait(self.refresh):
                return

    def _ask(self, provider: Provider) -> None:
        """Ask one provider; after a failure its old list stays."""
        before = self.registry.problems.get(provider.id, "")
        models, passes = None, False
        try:
            models = self._models_of(provider)
            problem = "" if models else "its list holds no LLM"
            if before or provider.id not in self.registry.native:  # may be another version now
                self._probe(provider)
        except OgxError as error:
            problem = error.hide(self.upstream.secrets(provider)).message
            problem += key_hint(error, provider.kind)
            passes = error.status in RETRYABLE
        except Exception:  # a list that no one foresaw must not take the others down
            log.exception("reading the model list of %s", provider.id)
            problem = "its model list could not be read"
        if problem != before and self.done.is_set():
            log.warning("%s: %s", provider.id, problem or "its models are listed again")
        self.registry.learn(provider.id, models, problem, passes=passes)

    def _models_of(self, provider: Provider) -> list[Model]:
        """The LLMs of its lists; OgxError if all of them failed."""
        kind, models, failure = provider.kind, list[Model](), None
        if kind.built_in_models:
            return [Model(f"{provider.id}/{name}", provider, name, warning=kind.warning)
                    for name in kind.built_in_models]
        lists = [(kind.list_path, ""), *kind.more_lists]
        for path, id_pattern in lists:
            try:
                for page in self._pages(provider.for_id_or_path(path), path):
                    models += [model for model in models_from_list(provider, page)
                               if re.search(id_pattern, model.upstream_id)]
            except OgxError as error:
                if error.status in (404, 405) and path == kind.list_path != "/models":
                    lists.append(("/models", ""))  # where all others have it
                else:
                    failure = failure or error
        if failure and not (models and kind.more_lists):
            raise failure
        if kind.loaded_path:
            with suppress(OgxError):  # welcome, not needed
                loaded = self.upstream.json(provider, kind.loaded_path, LIST_TIMEOUT)
                models = [with_loaded_context(model, loaded) for model in models]
        if kind.props_path:
            with suppress(OgxError):
                props = self.upstream.json(provider, kind.props_path, LIST_TIMEOUT)
                self.registry.learn(provider.id, slots=slots_from_props(props))
                models = [model_with_props(model, props) for model in models]
        return [with_small_context(model) for model in models]

    def _pages(self, server: Provider, path: str) -> Iterator[Any]:
        query = ""
        for _ in range(MAX_PAGES):
            page = self.upstream.json(server, path + query, LIST_TIMEOUT)
            yield page
            last_id = dict_or_empty(page).get("has_more") and page.get("last_id")  # Anthropic's
            if not last_id:
                return
            query = ("&" if "?" in path else "?") + urllib.parse.urlencode({"after_id": last_id})

    def _probe(self, provider: Provider) -> None:
        """Learn whether a server has a Messages API: only then it complains about the body of an
        empty request, which costs nothing."""
        kind = provider.kind
        if kind.dialects != BOTH or provider.dialect != "auto" or kind.native_models:
            return
        with suppress(OgxError):
            reply, _ = self.upstream.ask(provider, kind.messages_path, LIST_TIMEOUT, b"{}")
            if reply.status in (400, 404, 405, 422, 500, 501):
                self.registry.learn(provider.id, native=reply.status in (400, 422, 500))


def local_providers(upstream: Upstream, kinds: Iterable[ProviderKind],
                    timeout: float = 0.2) -> list[Provider]:
    """Servers at their usual ports here that identify themselves."""
    candidates = [Provider(kind.name, kind, f"http://127.0.0.1:{kind.local_port}/v1")
                  for kind in kinds if kind.local_port]
    identified = set()

    def identify(provider: Provider) -> None:
        path, mark = provider.kind.identity
        with suppress(OgxError):
            reply, body = upstream.ask(provider, path, timeout)
            if reply.status == 200 and "".join(mark.split()).encode() in b"".join(body.split()):
                identified.add(provider.id)

    call_in_threads(identify, candidates, 3 * timeout)
    return [provider for provider in candidates if provider.id in identified]


def call_in_threads(function: Callable[[Provider], None], providers: Iterable[Provider],
                    timeout: float) -> None:
    """Call a function with all providers at once; wait so many seconds for them."""
    until = time.monotonic() + timeout
    threads = [threading.Thread(target=function, args=(provider,), daemon=True)
               for provider in providers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def with_loaded_context(model: Model, loaded: Any) -> Model:
    """The model with the context it has in its server's memory."""
    for entry in map(dict_or_empty, as_list(dict_or_empty(loaded).get("models"))):
        context = whole_number(entry.get("context_length"))
        if context and model.upstream_id in (entry.get("name"), entry.get("model")):
            return replace(model, context=context)
    return model


def with_small_context(model: Model) -> Model:
    """The model with a warning where its window is small and its server could give it more. Ollama
    cuts longer prompts in silence, from the front."""
    context, hint = model.context or 0, model.provider.kind.context_hint
    if not hint or not 0 < context < 32_000:
        return model
    words = f"a context of {context:,} tokens is too small for Claude Code; {hint}"
    return replace(model, warning="; ".join(filter(None, (model.warning, words))))


def key_hint(error: OgxError, kind: ProviderKind) -> str:
    """Where to look after a refused key, as the end of a sentence."""
    if error.status != 401:
        return ""
    variables = " or ".join(kind.key_vars + kind.signed_by)
    variables = "the clock" if re.search("Z is (now|still) ", error.message) else variables
    return f"; check {variables or 'api_key'} where ogx.py runs"


# ======== Gateway ============================================================================
# One method per endpoint. messages() is the one way through: resolve the model, translate, send,
# learn from a refusal and send again, translate what comes back. Clients' keys stop here.

MAX_REQUESTS = 5  # to one upstream for one request of a client: remedies and retries together
BACKOFF = 0.3  # seconds before the first retry, doubled for each further one
COOLDOWN = 30.0  # seconds for which a failed target of a chain is tried last
MAX_COOLING = 64  # such targets
TICK = 10.0  # seconds of silence after which the client gets a sign of life
ERROR_BODY = (10.0, 1024 * 1024)  # seconds and bytes that an upstream has for its words
MAX_WAITING = 200  # requests for a place at one provider
COUNT_SECONDS = 30.0  # that it has to count tokens
LONG = 256 * 1024  # bytes that take so long to translate that they get a thread


@dataclass
class Exchange:
    """A client's request on its way through, and what the log tells about it."""

    request_id: str
    request: Json = field(default_factory=dict)
    raw: bytes = b""  # the request as the client wrote it
    headers: Headers = field(default_factory=dict)  # for upstreams that speak Messages
    session: str = ""  # Claude Code's
    is_main: bool = True  # not a sub-agent's, nor for a title and the like
    requested: str = ""  # the model's id, as the client wrote it
    served: str = ""  # the model that answers
    dialect: str = ""
    repaired: bool = False  # a call that the model wrote as text
    dropped: str = ""  # names of what the upstream has no word for
    started: float = field(default_factory=time.monotonic)
    first_event: float | None = None
    usage: Usage | None = None
    error: str = ""

    @property
    def stream(self) -> bool:
        return bool(self.request.get("stream"))

    def free_request(self) -> None:
        """Let go of the request, a megabyte with all its objects: its answer begins."""
        self.raw = b""
        self.request = {name: self.request.get(name) for name in ("model", "stream")}


class Sessions:
    """What sessions of Claude Code asked for; of those that did last."""

    MOST = 1000

    def __init__(self) -> None:
        self._entries: dict[str, Json] = {}
        self._lock = threading.Lock()

    def count(self, exchange: Exchange) -> None:
        """Count an answer, whole or broken off."""
        if not (exchange.session and exchange.usage):
            return
        usage = exchange.usage.as_json()
        names = [name for name in USAGE_FIELDS if name in usage]
        with self._lock:
            entry = self._entries.pop(exchange.session, {"requests": 0, "model": None})
            counts = {name: entry.get(name, 0) + usage[name] for name in names}
            entry = {**entry, **counts, "requests": entry["requests"] + 1}
            if exchange.is_main:
                entry.update(model=exchange.served, context_tokens=sum(usage[n] for n in names))
            self._entries[exchange.session] = entry
            if len(self._entries) > self.MOST:
                del self._entries[next(iter(self._entries))]

    def entry(self, session: str) -> Json:
        with self._lock:
            entry = self._entries.get(session)
        if entry is None:
            raise OgxError(404, f"session '{session[:64]}' has had no answer here")
        return {"id": session, "type": "session", **entry}


class Opened(NamedTuple):
    """An answer whose first bytes are there; `rest` gives the others, or what to yield first."""

    first: bytes
    rest: Iterator[Piece] = iter(())
    secrets: Callable[[], list[str]] = list  # to hide in its errors
    ends: ExitStack = ExitStack()  # to be closed after it


class Answer:
    """The answer to a client's request, from the steps that open it on."""

    def __init__(self, opening: Generator[Step, Any, Opened]) -> None:
        self._opening = opening
        self._opened: Opened | None = None

    def read(self) -> Piece:
        """The next bytes, b"" at the end; or what to yield before the next read(). Raises OgxError:
        before the first bytes it can still become an HTTP status."""
        if self._opened is None:
            try:
                return next(self._opening)
            except StopIteration as end:
                self._opened = end.value
                return self._opened.first
        try:
            return next(self._opened.rest, b"")
        except OgxError as error:
            raise error.hide(self._opened.secrets()) from None

    def close(self) -> None:
        """End it; a connection that still has some of it is closed."""
        self._opening.close()
        if self._opened:
            self._opened.ends.close()


@dataclass(eq=False)
class Attempt:
    """A request to an upstream, as remedies look at it and as it goes out."""

    model: Model  # as it was learned to be
    dialect: Dialect
    body: Json  # with the headers that lessons may change
    path: str
    headers: Headers
    data: bytes
    begun: bool = False  # the upstream answered with status 200

    def is_like(self, other: Attempt | None) -> bool:
        """Whether the upstream would see no difference."""
        return other is not None and (self.path, self.headers, self.data) == (
            other.path, other.headers, other.data)


class Encoder:
    """Writes requests as JSON, and remembers the last lists of tools: they are half of a request
    of Claude Code's, and the same in each turn."""

    def __init__(self) -> None:
        self._tools: dict[int, bytes] = {}  # by fingerprint

    def bytes_of(self, body: Json) -> bytes:
        tools = body.get("tools")
        if not tools:
            return without_halves(json_bytes(body))
        key = fingerprint(tools)
        if key not in self._tools:
            if len(self._tools) >= 16:
                self._tools.clear()
            self._tools[key] = without_halves(json_bytes(tools))
        rest = {name: value for name, value in body.items() if name != "tools"}
        return b'%b,"tools":%b}' % (without_halves(json_bytes(rest))[:-1], self._tools[key])


class Gateway:
    """The service behind the server. `tick` is the silence before a sign of life, in seconds. What
    answers /v1/messages never waits but after MAY_BLOCK; other methods may."""

    def __init__(self, config: Config, upstream: Upstream | None = None, tick: float = TICK,
                 store: Store | None = None) -> None:
        self.config = config
        self.store = store or Store()
        self.registry = Registry(config)
        self.upstream = upstream or Upstream(config.limits)
        self.discovery = Discovery(config, self.registry, self.upstream)
        self.lessons = Lessons(self.store)
        self.sessions = Sessions()
        self.ratios, self.tokens, self.encoder = Ratios(), TokenCounter(), Encoder()
        self.backoff = BACKOFF
        self.tick = tick
        self._queues: dict[str, list[Attempt]] = {}  # by provider id, the first of them under way
        self._cooling: dict[str, float] = {}  # model that failed -> until when it is tried last
        self._stopped = threading.Event()
        self._loading = threading.Lock()
        self._load()

    def start(self) -> None:
        """Begin what goes on in the background."""
        self.discovery.start()
        threading.Thread(target=self._keep_in_step, name="state", daemon=True).start()

    def close(self) -> None:
        self._stopped.set()
        self.discovery.close()
        self.upstream.close()
        self.upstream.signer.close()
        self.store.close()

    # -- messages

    def messages(self, exchange: Exchange) -> Answer:
        """The answer: server-sent events, or one JSON object where no stream was asked for."""
        return Answer(self._open(exchange))

    def _open(self, exchange: Exchange) -> Generator[Step, Any, Opened]:
        """Find a model that answers; its answer, once its first bytes are there."""
        exchange.requested = one_line(exchange.request["model"])
        chain = yield from self._chain(exchange.request["model"])
        for model, following in zip(chain, [*chain[1:], None]):
            try:
                return (yield from self._try_model(model, exchange))
            except OgxError as error:
                if len(chain) > 1 and is_retryable(error):
                    cooling = dict([*self._cooling.items()][1 - MAX_COOLING :])
                    self._cooling = {**cooling, model.listed_id: time.monotonic() + COOLDOWN}
                if following is None or not is_retryable(error):
                    raise
                log.warning("%s: %s failed: %s; trying %s", exchange.request_id, model.listed_id,
                            one_line(error.message), following.listed_id)
        raise AssertionError("no chain is empty")

    def _chain(self, model_id: str) -> Generator[Step, Any, list[Model]]:
        """The models to try, those that failed lately at the end; while the first lists are still
        on their way, wait for them."""
        try:
            chain = self.registry.chain(model_id)
        except OgxError:
            yield from self._until_discovered()
            if self.registry.problems:
                yield MAY_BLOCK
                self.discovery.ask_again()
            chain = self.registry.chain(model_id)
        if len(chain) == 1:
            return chain
        now = time.monotonic()
        return sorted(chain, key=lambda model: self._cooling.get(model.listed_id, 0.0) > now)

    def _until_discovered(self) -> Steps:
        if not self.discovery.done.is_set():
            yield MAY_BLOCK
            self.discovery.done.wait(LIST_TIMEOUT)

    def _try_model(self, model: Model, exchange: Exchange) -> Generator[Step, Any, Opened]:
        """One model's answer, its refusals remedied and its failures retried."""
        exchange.served = model.listed_id
        lessons = list(self.lessons.of(model))
        known, retries, waited = len(lessons), 0, 0.0
        refused: Attempt | None = None  # that the last lesson was learned from
        error = OgxError(500, "")  # by which it was refused
        for number in range(1, MAX_REQUESTS + 1):
            taught = model_with_overrides(model, lessons)
            attempt = yield from self._prepare(taught, exchange, lessons)
            in_vain = attempt.is_like(refused) and lessons[-1].action != "retry"
            if in_vain:  # the lesson changes nothing: the answer would be the same
                lessons[-1] = replace(lessons[-1], keep=False)
            else:
                try:
                    return (yield from self._send(attempt, exchange, lessons[known:]))
                except OgxError as failure:
                    error = replace(failure.hide(self.upstream.secrets(model.provider)))
            if len(exchange.raw) > LONG:
                yield MAY_BLOCK
            if number < MAX_REQUESTS and self._learn(error, attempt, exchange, lessons):
                refused = attempt
                continue
            refused = None
            error = self._client_error(error, attempt, exchange)
            delay = None if in_vain or number == MAX_REQUESTS else self._delay(
                error, attempt, retries, waited)
            if delay is None:
                raise error
            retries, waited = retries + 1, waited + delay
            log.info("%s: %s failed: %s; trying again in %.1f s", exchange.request_id,
                     exchange.served, one_line(error.message), delay)
            yield from sleep(delay)
        raise AssertionError("the last attempt returns or raises")

    def _prepare(self, model: Model, exchange: Exchange, lessons: Sequence[Lesson]
                 ) -> Generator[Step, Any, Attempt]:
        """What to send. A long request is translated in a thread."""
        plainer = model.provider.kind.refused_keywords  # of schemas, which takes long
        if len(exchange.raw) > (LONG // 4 if plainer else LONG):
            yield MAY_BLOCK
        exchange.dialect = yield from self._dialect_of(model, exchange.request)
        return self._attempt(model, exchange, lessons)

    def _dialect_of(self, model: Model, request: Json) -> Generator[Step, Any, str]:
        """The dialect for a request: the configured one, else Messages where the server has it
        and loses nothing of this request, else the other one of its kind."""
        provider, names = model.provider, model.provider.kind.dialects
        if provider.dialect == "auto" and speaks_responses(provider):
            return "responses"
        if provider.dialect != "auto" or len(names) == 1:
            return names[0] if provider.dialect == "auto" else provider.dialect
        if provider.kind.native_models:
            is_native = re.search(provider.kind.native_models, model.upstream_id)
            return "messages" if is_native else "chat"
        if provider.id not in self.registry.native:
            yield from self._until_discovered()
        native = self.registry.native.get(provider.id, False)
        native = native and not unsupported_features(request, provider.kind)
        return "messages" if native else names[-1]

    def _attempt(self, model: Model, exchange: Exchange, lessons: Sequence[Lesson]) -> Attempt:
        """The request in the dialect's words, after the lessons."""
        name, kind = exchange.dialect, model.provider.kind
        dialect = DIALECTS[name]
        if not kind.is_anthropic:
            refuse_untranslatable(exchange.request, dialect.native)
        own = [lesson for lesson in lessons if lesson.dialect in ("", name)]
        # A title of Claude Code's, which the user's own request waits for.
        may_be_title = model.provider.is_local and not exchange.request.get("tools")
        if exchange.session and may_be_title and structured_output(exchange.request, kind)[0]:
            own += (Lesson("clamp", limit, 1024) for limit in LIMIT_FIELDS)
        body = with_lessons(dialect.request(exchange.request, model), own)
        sent = dialect.finished(dict(body))
        data, headers = None, {}
        if dialect.native:
            data = with_model_id(exchange.raw, exchange.request, sent)
            headers = with_lessons({**exchange.headers}, own)
            headers = {name: value for name, value in headers.items() if value}
        else:
            everything = log.isEnabledFor(logging.DEBUG)
            exchange.dropped = dropped_names(exchange.request, sent, everything)
        data = without_halves(data) if data else self.encoder.bytes_of(sent)
        return Attempt(model, dialect, {**body, **headers}, request_path(name, kind), headers, data)

    def _send(self, attempt: Attempt, exchange: Exchange, lessons: Sequence[Lesson]
              ) -> Generator[Step, Any, Opened]:
        """Send a request once it has a place, which the answer keeps to its end; the answer, once
        its first bytes are there and new lessons, which have helped, are kept."""
        model = attempt.model
        with ExitStack() as ends:
            yield from self._place(attempt, ends)
            if len(exchange.raw) > LONG:  # and its client may have left meanwhile
                yield MAY_BLOCK
            reply = yield from self.upstream.send(model.provider, "POST", attempt.path,
                                                  attempt.data, attempt.headers)
            ends.callback(reply.release)
            # Estimating takes a while: it is done while the upstream works.
            pieces = self._pieces(attempt, reply, exchange)
            yield from reply.head()
            if reply.status != 200:
                words, _ = yield from reply.whole(*ERROR_BODY)
                refusal = refusal_from_body(reply.status, words)
                native = words if attempt.dialect.native else b""
                raise refused_error(refusal, model, reply.headers, native)
            attempt.begun = True
            for piece in pieces:
                if isinstance(piece, bytes):
                    exchange.free_request()
                    if lessons:
                        yield MAY_BLOCK  # a disk
                        self.lessons.add(model, lessons)
                    return Opened(piece, pieces, reply.secrets, ends.pop_all())
                yield piece
            raise OgxError(502, f"{model.origin} sent nothing")

    def _place(self, attempt: Attempt, ends: ExitStack) -> Steps:
        """Wait for a place at the provider, which `ends` gives back, or gives up. Those in front
        look more often whether it is their turn."""
        provider = attempt.model.provider
        most = provider.max_parallel or self.registry.slots.get(provider.id) or 0
        if not most:
            return
        queue = self._queues.setdefault(provider.id, [])
        if len(queue) >= most + MAX_WAITING:
            words = f"{provider.id} has {MAX_WAITING} requests waiting (see max_parallel)"
            raise OgxError(529, words, headers={"retry-after": "10"})
        ends.callback(queue.remove, attempt)
        queue.append(attempt)
        while queue.index(attempt) >= most:
            yield from sleep(min(0.5, (queue.index(attempt) - most + 1) / 50))

    def _pieces(self, attempt: Attempt, reply: Reply, exchange: Exchange) -> Iterator[Piece]:
        """What will read the answer to a request."""
        model, prompt = attempt.model, self.tokens.prompt(exchange.request)
        translator: Translator | None = None

        def finish(usage: Usage | None) -> None:
            exchange.usage = usage
            exchange.repaired = translator is not None and translator.writer.repaired
            self.ratios.learn(model, prompt, usage)

        asked = exchange.request["model"]
        if attempt.dialect.native and exchange.stream:
            stream = NativeStream(asked)

            def finish_stream(usage: Usage | None) -> None:
                finish(usage)
                # One's own server; what is translated tells thinking from text.
                if stream.thinks_aloud and model.provider.kind.text_calls:
                    self.registry.learn(model.provider.id, native=False)

            return native_pieces(reply, stream, model.listed_id, finish_stream)
        if attempt.dialect.native:
            return native_message_pieces(reply, asked, model.listed_id, finish)
        estimate = self.ratios.estimate(model, prompt)
        translator = new_translator(attempt.dialect, exchange, model, estimate,
                                    self.config.show_thinking)
        pieces = translated_pieces(reply, translator, exchange.stream, finish)
        return pieces if model.tools else self._learning_pieces(pieces, model, translator)

    def _learning_pieces(self, pieces: Iterator[Piece], model: Model, translator: Translator
                         ) -> Iterator[Piece]:
        """An answer's pieces; after calls as text, tools are told in words from then on."""
        yield from pieces
        if translator.writer.wrote_calls and not model.provider.kind.tools_in_words:
            yield MAY_BLOCK  # a disk
            self.lessons.add(model, [Lesson("override", "tools_in_words", True)])

    def _learn(self, error: OgxError, attempt: Attempt, exchange: Exchange,
               lessons: list[Lesson]) -> bool:
        """Learn from a refusal; whether that makes another request worthwhile."""
        refusal, provider = error.refusal, attempt.model.provider
        if refusal is None:
            return False
        if exchange.dialect == "messages" and refusal.status in (404, 405) and (
            "chat" in provider.kind.dialects and provider.dialect == "auto"
            and not provider.kind.native_models and "model" not in refusal.message.lower()
        ):  # the server was changed, or another one answered the probe
            self.registry.learn(provider.id, native=False)
            log.info("%s: %s has no Messages API; translating", exchange.request_id, provider.id)
            return True
        lesson = lesson_from_refusal(refusal, attempt.body, attempt.model, lessons)
        if lesson is None:
            return False
        about = "" if lesson.action == "override" else exchange.dialect
        lessons.append(replace(lesson, dialect=about))
        log.info("%s: %s refused: %s; sent again after: %s", exchange.request_id,
                 attempt.model.listed_id, one_line(error.message), lesson)
        return True

    def _client_error(self, error: OgxError, attempt: Attempt, exchange: Exchange) -> OgxError:
        """The error as the client understands it best: a prompt that is too long in Anthropic's
        words, where the upstream has others."""
        if error.refusal is None or "prompt is too long" in error.message:
            return error
        count = round(sum(self.tokens.prompt(exchange.request)))
        asked = max(attempt.body.get(name, 0) for name in LIMIT_FIELDS)
        return overflow_error(error.refusal, count, attempt.model.context, asked) or error

    def _delay(self, error: OgxError, attempt: Attempt, retries: int, waited: float
               ) -> float | None:
        """Seconds before a failed request is sent again; None when it is not. What was begun to
        be answered is never asked for twice, unless the upstream said itself that it failed."""
        if (attempt.begun and error.refusal is None) or self._stopped.is_set():
            return None
        delay = retry_delay(error, retries, self.backoff)
        if delay is None or retries == self.config.retries or (
            waited + delay > self.config.retry_seconds
        ):
            return None
        return delay

    def count_tokens(self, exchange: Exchange) -> Answer:
        """{"input_tokens": N}: by the upstream where it counts for free, else an estimate."""
        return Answer(self._count(exchange))

    def _count(self, exchange: Exchange) -> Generator[Step, Any, Opened]:
        request, count = exchange.request, 0
        chain = yield from self._chain(request["model"])
        model = model_with_overrides(chain[0], self.lessons.of(chain[0]))
        name = yield from self._dialect_of(model, request)
        for paths, body in token_counters(name, request, model):
            count = yield from self._count_upstream(model.provider, paths, body, exchange)
            if count:
                break
        count = count or self.ratios.estimate(model, self.tokens.prompt(request))
        counted = {"input_tokens": count, "context_management": {"original_input_tokens": count}}
        return Opened(json_bytes(counted) + b"\n")

    def _count_upstream(self, provider: Provider, paths: Sequence[str], body: Json,
                        exchange: Exchange) -> Generator[Step, Any, int]:
        """What the upstream counts; 0 where it doesn't, and that it has no such path is kept."""
        url, answer = provider.url(paths[0]), {}
        for path in () if (provider.id, url) in self.registry.uncounted_urls else paths:
            try:
                reply, data = yield from self.upstream.fetch(
                    provider, path, COUNT_SECONDS, json_bytes(body), exchange.headers)
            except OgxError:
                return 0
            if reply.status != 200:
                if reply.status in (404, 405, 501):
                    self.registry.learn(provider.id, uncounted_url=url)
                return 0
            answer = dict_or_empty(json_or_none(data))
            body = {"model": body.get("model"), "content": answer.get("prompt") or "",
                    "add_special": True}
        count = answer.get("input_tokens") or answer.get("count") or answer.get("tokens")
        return len(count) if isinstance(count, list) else whole_number(count)

    # -- models

    def model_list(self, query_string: str) -> Json:
        """One page that both SDKs read; without `limit` it holds all models."""
        query = dict(urllib.parse.parse_qsl(query_string[:4000]))
        self.discovery.done.wait(ASK_AGAIN)  # Claude Code waits 3 s for this list
        if self.discovery.done.is_set():
            self.discovery.ask_again()
        entries = [model_entry(m) for m in self.registry.models()]
        for alias_id in self.registry.aliases:
            with suppress(OgxError):  # that nothing serves it now
                entries.append(self._entry(self.registry.resolve(alias_id)))
        ids = [entry["id"] for entry in entries]
        after, before = query.get("after_id"), query.get("before_id")
        for name, anchor in (("after_id", after), ("before_id", before)):
            if anchor and anchor not in ids:
                raise OgxError(400, f"{name}: no model has the id '{anchor[:200]}'")
        start = ids.index(after) + 1 if after else 0
        rest = entries[start : ids.index(before) if before else None]
        size = query.get("limit") or str(len(entries))
        if "limit" in query and not re.fullmatch("[1-9][0-9]{0,2}|1000", size):
            raise OgxError(400, f"limit: expected a number from 1 to 1000, got '{size[:40]}'")
        page = rest[-int(size) :] if before else rest[: int(size)]
        shown = [entry["id"] for entry in page] or [None]
        return {"object": "list", "data": page, "has_more": len(page) < len(rest),
                "first_id": shown[0], "last_id": shown[-1], "tiers": self.tiers(),
                "problems": self.registry.problems}

    def tiers(self) -> dict[str, str]:
        """The provider's model behind each tier that has one: {"haiku": "openai/gpt-...", ...}."""
        tiers = {}
        for tier in TIERS:
            with suppress(OgxError):
                tiers[tier] = self.registry.resolve(f"claude-{tier}").listed_id
        return tiers

    def model(self, model_id: str) -> Json:
        """The entry of a listed model, an alias or a tier's id. Other ids of a provider are routed
        when asked, but whether they exist only the provider knows."""
        with suppress(OgxError):
            return self._entry(self.registry.resolve(model_id))
        self.discovery.done.wait(LIST_TIMEOUT)
        return self._entry(self.registry.resolve(model_id))

    def session(self, session: str) -> Json:
        """What a session of Claude Code asked for, and the window of the model that answered."""
        entry, window = self.sessions.entry(session), None
        with suppress(OgxError):
            window = entry["model"] and self.registry.resolve(entry["model"]).context
        return {**entry, "max_input_tokens": window}

    def register(self, body: Any) -> Json:
        """Register a model id of the user's own, or register it anew; its entry."""
        self.discovery.done.wait(LIST_TIMEOUT)
        alias = registered_alias(body, self.registry)
        self._put(alias.model_id, asdict(alias))
        metadata = {"model_type": "llm", "provider_id": alias.provider_id,
                    "provider_resource_id": alias.provider_model_id}
        entry: Json = {"id": alias.model_id, "object": "model", "type": "model"}
        with suppress(OgxError):
            entry = self._entry(self.registry.resolve(alias.model_id))
        metadata = entry.get("custom_metadata", metadata)
        return {**entry, "custom_metadata": {**metadata, **self._warning()}}

    def unregister(self, model_id: str) -> Json:
        """Forget a registered id or, for a provider's own model, what was learned about it."""
        if model_id in self.registry.aliases:
            configured = any(alias.model_id == model_id for alias in self.config.aliases)
            self._put(model_id, {"deleted": True} if configured else None)
        elif not self.lessons.forget(self.registry.resolve(model_id).listed_id):
            raise OgxError(404, f"nothing was registered or learned for '{model_id[:200]}'")
        return {"id": model_id, "object": "model", "deleted": True, **self._warning()}

    def _warning(self) -> Json:
        """For answers to changes that may be lost."""
        return {"warning": self.store.problem} if self.store.problem else {}

    def _put(self, model_id: str, alias: Json | None) -> None:
        self.store.put("alias", model_id, alias)
        self._load()

    def _load(self) -> None:
        with self._loading:
            aliases = {alias.model_id: alias for alias in self.config.aliases}
            for model_id, kept in self.store.all("alias").items():
                if "deleted" in kept:
                    aliases.pop(model_id, None)
                with suppress(TypeError):  # what another version kept is passed over
                    alias = Alias(**kept)
                    "".join((alias.provider_id, alias.provider_model_id, *alias.targets))  # texts
                    aliases[model_id] = alias
            self.registry.aliases = aliases

    def _keep_in_step(self) -> None:
        """Write what the state file lacks, and take in what other servers wrote there."""
        while not self._stopped.wait(STATE_SECONDS):
            self.store.sync()
            self._load()
            self.lessons.load()

    def _entry(self, model: Model) -> Json:
        known, owner = self.registry.listed(model), model.provider
        if known is None and owner.kind.lists_all and self.registry.lists.get(owner.id):
            raise OgxError(404, f"model '{model.id[:200]}' is not listed by {owner.id}")
        known = known or replace(model, id=model.listed_id, warning=f"{owner.id} doesn't list it")
        alias_of = "" if model.id == known.id else known.id
        learned = [str(lesson) for lesson in self.lessons.of(model)]
        return model_entry(replace(model, warning=known.warning), alias_of, learned)


def speaks_responses(provider: Provider) -> bool:
    """Whether requests go to the Responses API: known from the host, or learned."""
    _, host, _, _ = address_of(provider.base_url)
    learned = provider.kind.responses
    return host.endswith(provider.kind.responses_hosts) if learned is None else learned


def new_translator(dialect: Dialect, exchange: Exchange, model: Model, estimate: int,
                   shows: bool) -> Translator:
    """The dialect's translator, ready for the answer to a request, whose id the message shares."""
    request, message_id = exchange.request, exchange.request_id.replace("req", "msg", 1)
    message = new_message(message_id, request["model"], estimate)
    used = (b["id"] for m in request["messages"] if m["role"] == "assistant"
            for b in blocks_of(m["content"]) if b["type"] == "tool_use")
    hides = not shows and (request.get("thinking") or {}).get("display") == "omitted"
    holder = None
    unwanted = (request.get("tool_choice") or {}).get("type") == "none"
    if model.provider.reads_calls and request.get("tools") and not unwanted:
        tools = sent_tools(request, model.provider.kind)
        holder = CallHolder({upstream_name(tool["name"]): tool for tool in tools})
    writer = MessageWriter(message, used, request.get("stop_sequences") or (), hides, holder)
    return dialect.translator(writer, request, model)


# What reads an answer: bytes for the client, never empty, or what to yield first. `finish` is told
# the usage, as far as it is known.


def translated_pieces(reply: Reply, translator: Translator, stream: bool,
                      finish: Callable[[Usage | None], None]) -> Iterator[Piece]:
    """An answer in another dialect, as server-sent events or, at its end, as one message."""
    reader, writer, folder = AnswerReader(), translator.writer, MessageFolder()
    try:
        while not translator.done:
            data = reply.read()
            if not isinstance(data, bytes):
                yield data
                continue
            items = reader.feed(data) if data else reader.end()
            if items and (len(items[0]) > LONG or len(data) > LONG):
                yield MAY_BLOCK
            for item in items:
                translator.feed(item)
            if not data:
                translator.end()
            reply.complete = translator.done and not writer.stopped
            events: Any = writer.take()
            if stream:
                yield b"".join(map(sse_bytes, events)) or OTHERS_FIRST
                continue
            for event in events:
                folder.add(event)
            if folder.size > MAX_ANSWER:
                raise OgxError(502, "the upstream's answer is too large")
            yield OTHERS_FIRST
    except OgxError:  # what came before it is the client's
        writer.break_off()
        data = b"".join(map(sse_bytes, writer.take())) if stream else b""
        if data:
            yield data
        raise
    if not stream:
        if folder.size > LONG:
            yield MAY_BLOCK
        yield json_bytes(folder.message())
    finish(translator.usage)


def native_pieces(reply: Reply, stream: NativeStream, origin: str,
                  finish: Callable[[Usage | None], None]) -> Iterator[Piece]:
    """A stream of Anthropic's own events, but for the model's id."""
    begun, data = False, reply.read()
    while data != b"" and not stream.ended:
        if isinstance(data, bytes):
            events = stream.feed(data)
            if not begun and len(events) < LONG:
                raise_if_error(b"".join(SseReader().feed(events)[:1]), origin)
            begun, reply.complete = begun or bool(events), stream.ended
            yield events or OTHERS_FIRST
        else:
            yield data
        data = b"" if stream.ended else reply.read()
    yield stream.end() or OTHERS_FIRST
    finish(stream.usage)
    raise_if_error(stream.error, origin)
    if stream.error or not stream.ended:
        raise OgxError(502, f"{origin} ended the answer before it was complete")


def native_message_pieces(reply: Reply, model_id: str, origin: str,
                          finish: Callable[[Usage | None], None]) -> Iterator[Piece]:
    """Anthropic's own message, but for the model's id."""
    reader, whole, data = AnswerReader(), b"", reply.read()
    while data != b"":
        if isinstance(data, bytes):
            whole = b"".join(reader.feed(data)) or whole
        yield OTHERS_FIRST if isinstance(data, bytes) else data
        data = reply.read()
    whole = b"".join(reader.end()) or whole
    if len(whole) > LONG:
        yield MAY_BLOCK
    message = json_or_none(whole)
    if not isinstance(message, dict) or "content" not in message:
        raise_if_error(whole, origin)
        raise unknown_data(f"{origin} sent no message but", whole)
    usage = dict_or_empty(message.get("usage"))
    finish(Usage(*(whole_number(usage.get(name)) for name in USAGE_FIELDS)))
    yield json_bytes({**message, "model": model_id})


def refused_error(refusal: Refusal, model: Model, headers: Headers, native: bytes) -> OgxError:
    """The error for a refusal that nothing helps against. `native` is the body of an upstream that
    speaks Messages: in Anthropic's shape it is handed on, since clients read its wording."""
    error = upstream_error(refusal, model.origin, headers)
    if error.status == 400 < refusal.status:
        native = b""
    theirs = dict_or_empty(json_or_none(native))
    reason = dict_or_empty(theirs.get("error")).get("message")
    if theirs.get("type") == "error" and reason == without_controls(refusal.message):
        if theirs["error"].get("type") not in (*ERROR_TYPES.values(), "api_error"):  # vLLM's
            theirs["error"]["type"] = error.type
        error.raw, error.status = json_bytes(theirs), refusal.status  # escapes could hide a key
    else:
        error.message += key_hint(error, model.provider.kind)
    return error


def raise_if_error(answer: bytes, origin: str) -> None:
    """Raise the error that a native answer, or an event of one, is."""
    node = json_or_none(answer)
    if isinstance(node, dict) and is_failure(node):
        raise upstream_error(refusal_from_body(200, answer), origin, {})


def is_retryable(error: OgxError) -> bool:
    """Whether another upstream, or the same one later, may do better."""
    ours = error.status == 400 and "x-should-retry" in error.headers  # where it said 500
    return ours or error.status in (402, *RETRYABLE) or error.type == "billing_error"


def retry_delay(error: OgxError, retries: int, backoff: float) -> float | None:
    """Seconds before a request is sent again; None when that is no use, or up to the client."""
    if error.status not in RETRYABLE or error.headers.get("x-should-retry") == "false":
        return None
    if error.status == 504 and error.refusal is None:  # our own time limit: it was long enough
        return None
    retry_after = error.headers.get("retry-after", "")
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", retry_after):
        return float(retry_after)
    return None if retry_after else backoff * 2**retries * random.uniform(0.8, 1.2)


# ======== Server =============================================================================
# HTTP for the clients: guard, read, route, write, log. Everything that can be wrong with a
# request ends as one error in Anthropic's shape. Each connection is a task of the loop.

CLIENT_GONE = 499  # nginx's status for a client that closed before its answer
KEEP_ALIVE = 300.0  # seconds an idle connection stays open
PASSED_HEADERS = ("anthropic-beta", "anthropic-version")  # to upstreams that speak Messages
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
SIGN_OF_LIFE = b": waiting for the model\n\n"  # before message_start only comments may come
LOGGED_BODY = LOG_LINE - 200  # characters; the line is cut at so many bytes
FILE_OR_KEY = re.compile(r"[A-Za-z0-9+/=]{200,}|\b(?<=sk-)[\w-]{8,}")
ABOUT = {"service": "ogx.py", "version": __version__, "status": "OK"}
UNSERVED = ("/v1/messages/batches", "/v1/files", "/v1/skills")


class Server(http.server.ThreadingHTTPServer):
    """Takes from ThreadingHTTPServer the listening socket, serve_forever(), which accepts in a
    thread, and shutdown(). Connections get no threads: each is a task of one loop, since switching
    between threads would take most of the time, and an idle connection a stack.

    A gateway on a listening socket; port 0 takes a free one. `url` tells where it listens."""

    daemon_threads = True
    request_queue_size = 1024  # with fewer, a burst of clients loses SYNs and waits a second
    allow_reuse_address = os.name != "nt"  # on Windows it would let two programs share the port

    def __init__(self, gateway: Gateway, host: str = DEFAULT_HOST, port: int = 0,
                 token: str = "", tls: ssl.SSLContext | None = None) -> None:
        self.gateway, self.limits = gateway, gateway.config.limits
        self.tls, self.log_bodies = tls, False
        self.host = host.strip("[]")
        self.guard = Guard(self.host, "https" if tls else "http", token.encode(),
                           gateway.config.host_names, gateway.upstream.instance)
        self.loop = Loop()
        self.stopping = False
        self.running: set[Handler] = set()  # those with a request
        self._ended = threading.Condition()  # one of them has ended, while stopping
        self._idle: dict[socket.socket, None] = {}  # connections without a request, oldest first
        if ":" in self.host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((self.host, port), Handler)
        except (OSError, OverflowError) as error:
            raise OgxError(500, listen_problem(error, host, port)) from None

    def server_bind(self) -> None:
        """Bind without HTTPServer's reverse DNS query, which can stall for half a minute."""
        super(http.server.HTTPServer, self).server_bind()
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.guard.scheme}://{host}:{self.server_port}"

    def start(self, poll: float = 0.1) -> None:
        """Serve in threads of its own until stop(), which it notices within `poll` seconds."""
        threading.Thread(target=self.loop.run, name="loop", daemon=True).start()
        threading.Thread(target=self.serve_forever, args=(poll,), daemon=True).start()

    def readiness(self, _: Any) -> Json:
        """What /v1/ready answers; OgxError 503 while no request would be served."""
        if self.stopping or not self.gateway.tiers():
            raise stopping_error() if self.stopping else OgxError(503, "no provider has a model")
        return {"status": "OK"}

    def stop(self, drain: float | None = None) -> None:
        """Accept no more, let running answers finish for `drain` seconds (by default as the
        configuration says), end the others with an error, close."""
        self.stopping = True
        self.shutdown()
        self.server_close()
        self._close_idle(0)
        self._wait_for_answers(self.limits.drain_timeout if drain is None else drain)
        self.loop.interrupt(stopping_error)
        self.gateway.close()  # this may wait, and the loop's thread needs the lock
        self._wait_for_answers(2.0)
        self.loop.close()

    def _wait_for_answers(self, seconds: float) -> None:
        with self._ended:
            self._ended.wait_for(lambda: not self.running, seconds)

    def end(self, handler: Handler) -> None:
        """A connection's request runs no more."""
        self.running.discard(handler)
        if self.stopping:
            with self._ended:
                self._ended.notify_all()

    def note_idle(self, connection: socket.socket, waits: bool) -> None:
        """Note that a connection waits for a request, or no more; too many close the oldest."""
        self._idle.pop(connection, None)
        if waits:
            self._idle[connection] = None
            self._close_idle(0 if self.stopping else int(self.limits.max_idle))

    def _close_idle(self, kept: int) -> None:
        surplus = len(self._idle) - kept
        for connection in list(self._idle)[:surplus] if surplus > 0 else ():
            self._idle.pop(connection, None)
            with suppress(OSError):  # its task sees the end and closes it
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next connection; where the process may open no more files, an idle one goes."""
        try:
            return super().get_request()
        except OSError:
            self._close_idle(len(self._idle) - 1)
            time.sleep(0.02)  # it is tried again at once
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Make a task of a new connection, where ThreadingMixIn would start a thread."""
        try:
            if self.tls:
                request = self.tls.wrap_socket(request, True, do_handshake_on_connect=False)
            self.finish_request(request, client_address)
        except OSError:  # it has gone already
            request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection failed unexpectedly")


def listen_problem(error: Exception, host: str, port: int) -> str:
    """Why a server can't listen, in one line."""
    name = errno.errorcode.get(getattr(error, "errno", 0) or 0, "")
    if isinstance(error, socket.gaierror) or name in ("EADDRNOTAVAIL", "EINVAL"):
        return f"can't listen on {host}: it is no address of this machine (see --host)"
    if name == "EADDRINUSE":
        return f"port {port} on {host} is in use; choose another with --port, or stop what uses it"
    if name in ("EACCES", "EPERM"):
        return f"no permission to listen on port {port}; ports below 1024 are privileged"
    return f"can't listen on {host}:{port}: {error}"


def client_gone() -> OgxError:
    return OgxError(CLIENT_GONE, "the client closed the connection")


class Handler(http.server.BaseHTTPRequestHandler):
    """One client connection: its task serves one request after the other."""

    server: Server

    def setup(self) -> None:
        self.connection: socket.socket = self.request
        self.connection.setblocking(False)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.limits = self.server.limits
        self._received = b""  # and not yet read
        self._unsent: bytes | memoryview = b""  # what the client was too slow to take
        self._deadline = math.inf  # for more of a request
        self.close_connection = False
        self._begin()

    def _begin(self) -> None:
        """Begin a request."""
        self.exchange, self.head = Exchange(fresh_id("req")), NO_HEAD
        self.status = 0  # that was sent
        self._unread = False  # the client's body isn't, or not to its end
        self._probe_at = math.inf  # when to see whether a client that ended its side is there
        self._probe_after = 0.2  # seconds
        self._waited: tuple[Any, Wait] = (None, NO_WAIT)  # the last wait for an answer

    def handle(self) -> None:
        """Leave the connection to the loop."""
        self.server.loop.start(self._serve(), self.connection.close)

    def finish(self) -> None:
        pass

    def _serve(self) -> Steps:
        """Serve one request after the other."""
        try:
            yield from self._shake_hands()
            while not self.close_connection:
                self.close_connection = True
                self._begin()
                head = yield from self._read_head()
                if head:
                    self.exchange.started = time.monotonic()
                    self.server.running.add(self)
                    try:
                        yield from self._answer(head)
                    finally:
                        self.server.end(self)
                yield OTHERS_FIRST
        except (OSError, EOFError, OgxError) as error:  # the client left or was too slow
            log.debug("%s: connection lost: %s", self.exchange.request_id, error)
        finally:
            self.server.note_idle(self.connection, False)

    def _shake_hands(self) -> Steps:
        """TLS's handshake."""
        self.server.note_idle(self.connection, True)
        until = time.monotonic() + self.limits.client_timeout
        while isinstance(self.connection, ssl.SSLSocket):
            try:
                return self.connection.do_handshake()
            except ssl.SSLWantReadError:
                events = READ
            except ssl.SSLWantWriteError:
                events = WRITE
            if time.monotonic() >= until:
                raise socket.timeout("the handshake took too long")
            yield Wait(((self.connection, events),), until)

    # -- reading

    def _receive(self, size: int = RECEIVE_SIZE) -> Generator[Step, Any, bytes]:
        """Bytes from the client, b"" at its end; socket.timeout after the time for a request, to
        which 50 KB add a second."""
        data = received(self.connection, size)
        while data is None:
            if time.monotonic() >= self._deadline:
                raise socket.timeout("the client was too slow")
            yield Wait(((self.connection, READ),), self._deadline, queued=True)
            data = received(self.connection, size)
        self._deadline += len(data) / 50_000
        return data

    def _read_head(self) -> Generator[Step, Any, bytes]:
        """A request's head without its last line break, too long if it has no end; b"" when the
        client closed."""
        self._received = self._received.lstrip(b"\r\n")
        if not self._received:
            self.server.note_idle(self.connection, True)
            self._deadline = time.monotonic() + KEEP_ALIVE
            self._received = (yield from self._receive()).lstrip(b"\r\n")
            self.server.note_idle(self.connection, False)
        self._deadline = time.monotonic() + self.limits.client_timeout
        end, looked = HEAD_END.search(self._received), 0
        while not end and len(self._received) <= MAX_HEAD:
            data = yield from self._receive()
            if not data:
                return b""
            looked = max(0, len(self._received) - 2)
            self._received = (self._received + data).lstrip(b"\r\n")
            end = HEAD_END.search(self._received, looked)
            yield OTHERS_FIRST
        if not end:
            return self._received
        head, self._received = self._received[: end.start()], self._received[end.end() :]
        return head

    def _take_head(self, head: bytes) -> None:
        """Take in a request's head; OgxError for what is malformed or kept out."""
        self._unread = True
        if len(head) > MAX_HEAD:
            raise OgxError(431, "the request's headers are too large")
        self.head = request_head(head)
        self.close_connection = self.server.stopping or self.head.closes()
        self._unread = self.head.has_body()
        headers = self.head.headers
        self.exchange.session = headers.get("x-claude-code-session-id", "")[:64]
        self.exchange.is_main = headers.get("x-claude-code-request-class", "main") == "main"
        self.exchange.headers = {name: headers[name] for name in PASSED_HEADERS
                                 if name in headers and name not in self.head.options}
        self.server.guard.check(self.head)

    def _read_body(self) -> Generator[Step, Any, bytes]:
        """The request's body, unpacked."""
        headers = self.head.headers
        if not self.head.has_body():
            return b""
        if len(self.server.running) > self.limits.max_requests:
            words = "too many requests are running already (see OGX_MAX_REQUESTS)"
            raise OgxError(529, words, headers={"retry-after": "1"})
        limit = int(self.limits.max_body * 1024 * 1024)
        body = request_body(headers, limit)
        if headers.get("expect", "").lower() == "100-continue":
            yield from self._write(CONTINUE)
        pieces = [body.feed(self._received)]
        size = len(pieces[0])
        while not body.done:
            data = yield from self._receive(4 * RECEIVE_SIZE)
            if not data:
                raise ConnectionResetError("the client closed in the middle of its request")
            pieces.append(body.feed(data))
            size += len(pieces[-1])
            check_size(size, limit)
            yield OTHERS_FIRST
        self._received = body.rest
        self._unread, coding = False, headers.get("content-encoding", "identity").lower()
        if size > LONG or coding != "identity":
            yield MAY_BLOCK
        return unpacked(b"".join(pieces), coding, limit)

    # -- answering

    def _answer(self, head: bytes) -> Steps:
        try:
            self._take_head(head)
            self.exchange.raw = yield from self._read_body()
            yield from self._endpoint()
        except OgxError as error:
            yield from self._send_error(error)
        except socket.timeout:
            yield from self._send_error(OgxError(408, "the request took too long to come in"))
        except (ConnectionError, ssl.SSLError):
            yield from self._send_error(client_gone())
        except RecursionError:
            yield from self._send_error(OgxError(400, "the request's JSON is nested too deeply"))
        except Exception:
            log.exception("%s: unexpected error", self.exchange.request_id)
            words = "internal error; the log of ogx.py has the trace"
            yield from self._send_error(OgxError(500, words))
        finally:
            self._log()

    def _endpoint(self) -> Steps:
        """The steps of answering a request, by its path and method."""
        path, _, query = self.head.target.partition("?")
        if path.startswith("/"):
            path = re.sub("//+", "/", path)  # as after a base URL that ends in one
        else:
            path = re.sub("^https?://[^/]*", "", path)
        routes, argument = Handler.ROUTES.get(path), query
        for folder in ("/v1/models/", "/v1/sessions/"):
            if path.startswith(folder):
                routes = Handler.ROUTES[folder + "{id}"]
                argument = urllib.parse.unquote(path[len(folder) :])
        if routes is None:
            raise OgxError(404, not_served_words(path))
        method = "GET" if self.head.method == "HEAD" else self.head.method
        content_type = self.head.headers.get("content-type", "").partition(";")[0].strip(" \t")
        if method == "POST" and content_type.lower() not in ("", "application/json"):
            raise OgxError(415, f"content-type: expected application/json, got {content_type}")
        if method not in routes:
            allowed = ", ".join([*routes, *["HEAD"] * ("GET" in routes)])
            raise OgxError(405, f"{self.head.method} is not possible on {path}, only {allowed}",
                           headers={"allow": allowed})
        return routes[method](self, argument)

    def _post_messages(self, query: str) -> Steps:
        self.exchange.request = checked_json(self.exchange.raw)
        answer: Any = self.server.gateway.messages(self.exchange)
        if self.server.log_bodies:
            self._log_body("request", self.exchange.raw)
            answer = LoggedAnswer(answer, self._log_body)
        return self._stream(answer) if self.exchange.stream else self._whole(answer)

    def _post_count_tokens(self, query: str) -> Steps:
        self.exchange.request = checked_json(self.exchange.raw, counting=True)
        return self._whole(self.server.gateway.count_tokens(self.exchange))

    def _in_thread(self, function: Callable[[Any], Json], argument: Any) -> Steps:
        """Answer what a method of the gateway gives that may wait, for lists or a disk."""
        yield MAY_BLOCK
        yield from self._send_json(function(argument))

    ROUTES: ClassVar[dict[str, dict[str, Callable[[Handler, str], Steps]]]] = {
        "/v1/messages": {"POST": _post_messages},
        "/v1/messages/count_tokens": {"POST": _post_count_tokens},
        "/v1/models": {
            "GET": lambda self, query: self._in_thread(self.server.gateway.model_list, query),
            "POST": lambda self, _: self._in_thread(self.server.gateway.register,
                                                    parsed_json(self.exchange.raw))},
        "/v1/models/{id}": {
            "GET": lambda self, known: self._in_thread(self.server.gateway.model, known),
            "DELETE": lambda self, known: self._in_thread(self.server.gateway.unregister, known)},
        "/v1/sessions/{id}": {
            "GET": lambda self, known: self._in_thread(self.server.gateway.session, known)},
        **dict.fromkeys(("/v1/health", "/api/hello"), {
            "GET": lambda self, _: self._send_json({"status": "OK"})}),
        "/v1/ready": {"GET": lambda self, _: self._in_thread(self.server.readiness, "")},
        "/": {"GET": lambda self, _: self._send_json(ABOUT)},
    }

    def _whole(self, answer: Answer) -> Steps:
        """Write an answer once all of it is there."""
        whole: list[bytes] = []
        with closing(answer):
            piece = answer.read()
            while piece != b"":
                if isinstance(piece, bytes):
                    whole.append(piece)
                sock = yield self._with_client(piece)
                self._look_at_client(piece, sock)
                piece = answer.read()
        yield from self._send(200, b"".join(whole))

    def _stream(self, answer: Answer) -> Steps:
        """Write an answer as it comes, with signs of life while nothing does. Nothing is read from
        the upstream while the client has yet to take something: that is all the backpressure, and
        bounds what is kept. An error before the first bytes is the caller's to answer."""
        exchange, tick = self.exchange, self.server.gateway.tick
        written_at = time.monotonic()
        try:
            with closing(answer):
                piece = answer.read()
                while piece != b"":
                    data = piece if isinstance(piece, bytes) else b""
                    now = time.monotonic()
                    if data:
                        exchange.first_event = exchange.first_event or now
                    elif now >= written_at + tick:
                        data = PING if exchange.first_event else SIGN_OF_LIFE
                    if data:
                        written_at = now
                        if not self._send_now(self._framed(data)):
                            yield from self._write(b"")
                    if data is piece:
                        piece = answer.read()
                        if isinstance(piece, bytes):  # there is more already
                            yield OTHERS_FIRST
                    else:
                        sock = yield self._with_client(piece, written_at + tick)
                        if sock is None or sock is self.connection:
                            self._look_at_client(piece, sock)
                        piece = answer.read()
        except OgxError as error:
            if not self.status or error.status == CLIENT_GONE:
                raise
            exchange.error = f"the stream broke: {error.message}"
            yield from self._write(self._framed(sse_bytes(error.body(exchange.request_id))))
        yield from self._write(self._framed(b""))

    def _with_client(self, piece: Piece, until: float = math.inf) -> Step:
        """What to yield after a piece: a Wait for the upstream ends, too, when the client says
        something or leaves, and at a time. As long as it holds it is the same object."""
        if not isinstance(piece, Wait):
            return OTHERS_FIRST if isinstance(piece, bytes) else piece
        inner, wait = self._waited
        if inner is piece and time.monotonic() < wait.until:
            return wait
        sockets = piece.sockets
        if self._probe_at == math.inf and len(self._received) <= MAX_HEAD:
            sockets += ((self.connection, READ),)
        wait = Wait(sockets, min(piece.until, until, self._probe_at))
        self._waited = piece, wait
        return wait

    def _look_at_client(self, piece: Piece, sock: Any) -> None:
        """Notice a disconnect: look when the client's socket has something, when a probe is due,
        and before long work in a thread."""
        if piece is MAY_BLOCK or sock is self.connection or time.monotonic() >= self._probe_at:
            self._probe()
        if piece is MAY_BLOCK and self._probe_at != math.inf:  # it may have left: wait and see
            time.sleep(0.05)
            self._probe()

    def _probe(self) -> None:
        """Raise OgxError(499) where the client disconnected while it waits for an answer. It may
        have sent its next request, or closed its own side alone: what is then written to it
        tells, since who left refuses that in a moment."""
        self._waited = None, NO_WAIT
        if len(self._received) > MAX_HEAD:  # of requests to come: the rest can wait
            return
        try:
            data = received(self.connection)
            if data == b"":
                if self.server.tls or not (self.status or self.head.version == "1.1"):
                    raise client_gone()
                self._send_now(self._framed(SIGN_OF_LIFE) if self.status else CONTINUE)
                self._probe_at = time.monotonic() + self._probe_after
                self._probe_after *= 2
        except OSError:
            raise client_gone() from None
        self._received += data or b""

    # -- writing

    def _framed(self, data: bytes) -> bytes:
        """A piece of a stream, as a chunk for clients that know chunks; the head goes with the
        first."""
        chunked = self.head.version == "1.1"
        framed = b"%x\r\n%b\r\n" % (len(data), data) if chunked else data
        if self.status:
            return framed
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache",
                   "x-accel-buffering": "no"}  # nginx would send lumps
        if chunked:
            headers["transfer-encoding"] = "chunked"
        else:
            self.close_connection = True
        return self._head(200, headers) + framed

    def _send_now(self, data: bytes) -> bool:
        """Send what the client takes by now, after what is still unsent; whether that is all."""
        if not self._unsent:
            self._unsent = data
        elif data:
            self._unsent = bytes(self._unsent) + data
        try:
            sent = self.connection.send(self._unsent) if self._unsent else 0
        except WOULD_BLOCK:
            return False
        self._unsent = memoryview(self._unsent)[sent:] if sent < len(self._unsent) else b""
        return not self._unsent

    def _write(self, data: bytes) -> Steps:
        """Send it all; socket.timeout once the client took nothing for too long."""
        until = time.monotonic() + self.limits.client_timeout
        done, left = self._send_now(data), len(self._unsent)
        while not done:
            if time.monotonic() >= until:
                raise socket.timeout("the client reads nothing")
            yield Wait(((self.connection, WRITE),), until)
            done = self._send_now(b"")
            if len(self._unsent) < left:
                until, left = time.monotonic() + self.limits.client_timeout, len(self._unsent)

    def _send_json(self, value: Json) -> Steps:
        yield from self._send(200, json_bytes(value) + b"\n")

    def _send(self, status: int, data: bytes, headers: Mapping[str, str] = {}) -> Steps:
        fields = {"content-type": "application/json", "content-length": str(len(data)), **headers}
        head = self._head(status, fields)
        yield from self._write(head if self.head.method == "HEAD" else head + data)

    def _send_error(self, error: OgxError) -> Steps:
        """Answer with an error where an answer is still possible."""
        if self.status or error.status == CLIENT_GONE:
            self.close_connection = True
            self.status = self.status or error.status
            return
        self.close_connection = self.close_connection or self._unread or not self.head.method
        self.exchange.error = error.message
        body = error.body(self.exchange.request_id)
        yield from self._send(error.status, json_bytes(body) + b"\n", error.headers)
        if self._unread:
            yield from self._linger()

    def _linger(self) -> Steps:
        """Read on for a moment: closing at once on unread data would reset the connection, and
        the client would never see the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        wait = Wait(((self.connection, READ),), time.monotonic() + 2.0, queued=True)
        while received(self.connection) != b"" and time.monotonic() < wait.until:
            yield wait

    def _head(self, status: int, headers: Headers) -> bytes:
        """The head of an answer; from here on the answer counts as sent."""
        self.status = status
        fields = {"request-id": self.exchange.request_id, **headers}
        if self.exchange.served:
            fields["x-ogx-served"] = one_line(self.exchange.served)
        if self.close_connection:
            fields["connection"] = "close"
        return answer_head(status, fields, time.time())

    # -- log

    def _log(self) -> None:
        """One line per request; what clients and monitors ask all the time only at DEBUG."""
        exchange, usage = self.exchange, self.exchange.usage
        served = f"{exchange.served} by {exchange.dialect}" if exchange.served else "nothing"
        path = cut(self.head.target.partition("?")[0], 200)
        first = exchange.first_event and exchange.first_event - exchange.started
        parts: list[Any] = [
            f"{exchange.request_id} {self.head.method} {path} {self.status}",
            exchange.requested and f"{exchange.requested} -> {served}",
            first and f"first {first:.3f}s",
            f"total {time.monotonic() - exchange.started:.3f}s",
            usage and f"in {usage.input + usage.cache_written} cached {usage.cache_read} "
                     f"out {usage.output}",
            exchange.session and f"session {exchange.session}",
            exchange.repaired and "a call repaired",
            exchange.dropped and f"dropped: {exchange.dropped}",
            exchange.error and f"error: {one_line(exchange.error)}",
        ]
        often = path.startswith("/v1/sessions/") or path in PROBES
        quiet = often and (not exchange.error or self.status == 404)
        log.log(logging.DEBUG if quiet else logging.INFO, " ".join(filter(None, parts)))
        self.server.gateway.sessions.count(exchange)

    def _log_body(self, name: str, body: bytes | bytearray) -> None:
        """A body on one line, without keys and files, not too long."""
        gateway = self.server.gateway
        secrets = [self.server.guard.token.decode()] if self.server.guard.token else []
        for provider in gateway.registry.providers.values():
            secrets += gateway.upstream.secrets(provider)
        text = cut(body[: 8 * LOGGED_BODY].decode("utf-8", "replace"), 2 * LOGGED_BODY)
        for secret in secrets:
            text = text.replace(secret, "***")
        shown = cut(" ".join(FILE_OR_KEY.sub("***", text).split()), LOGGED_BODY)
        log.info("%s %s %s", self.exchange.request_id, name, shown)


class LoggedAnswer:
    """An answer whose bytes are logged when it ends."""

    def __init__(self, answer: Answer, log_body: Callable[[str, bytearray], None]) -> None:
        self._answer, self._log_body = answer, log_body
        self._data = bytearray()

    def read(self) -> Piece:
        piece = self._answer.read()
        if isinstance(piece, bytes) and len(self._data) < 100 * LOGGED_BODY:
            self._data += piece
        return piece

    def close(self) -> None:
        self._answer.close()
        self._log_body("answer", self._data)


def not_served_words(path: str) -> str:
    """Why a path is not served, and what to do."""
    plain = re.sub("//+", "/", os.path.normpath(urllib.parse.unquote(path)))
    if plain in Handler.ROUTES or plain.startswith("/v1/models/"):
        return f"{cut(path, 200)} not found: write it as {cut(plain, 200)}"
    if path.startswith("/v1/v1/"):
        return f"{path[:200]} not found: the base URL should end without /v1"
    if path.startswith(UNSERVED):
        return f"{path[:200]} not found: batches, files and skills are not served by ogx.py"
    return f"{path[:200]} not found; ogx.py serves {', '.join(Handler.ROUTES)}"


# ======== Connect ============================================================================
# `connect claude`: plan the environment for a server's models (pure); print it or launch Claude
# Code. What to set and unset was verified with the real client (2.1.332).

# Tokens. Claude Code keeps back its output limit: half of a window of 65,536 with the usual one.
RESERVED_WINDOW = 160_000
FIRST_REQUEST, LEAN_REQUEST = 13_500, 4_500  # what its first request takes (2.1.332)
USUAL_WINDOW = 200_000  # what it believes where it is told none
LEAN_WINDOW = 32_768  # tokens; below, Claude Code starts with what it can't do without
LEAN_TOOLS = "Bash,Read,Edit,Write,Grep,Glob"
LEAN = dict.fromkeys(map("CLAUDE_CODE_DISABLE_{}".format, (
    "BUNDLED_SKILLS", "WORKFLOWS", "GIT_INSTRUCTIONS", "AUTO_MEMORY")), "1")
# Without reports to Anthropic and questions for an opinion; the hints tell this server, and no
# upstream, what a request is for.
SWITCHES = {"DISABLE_ERROR_REPORTING": "1", "DISABLE_FEEDBACK_COMMAND": "1",
            "CLAUDE_CODE_DISABLE_FEEDBACK_SURVEY": "1", "CLAUDE_CODE_GATEWAY_HINT_HEADERS": "1",
            "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "off"}
JOBS = {"subagent": "CLAUDE_CODE_SUBAGENT_MODEL", "auto": "CLAUDE_CODE_AUTO_MODE_MODEL"}
PICKER_ROWS = 60
# These would send requests elsewhere or otherwise, or choose another model. What the user's own
# tools need inside Claude Code (AWS_*, GOOGLE_*) stays.
UNSET = (
    *map("CLAUDE_CODE_USE_{}".format, ("VERTEX", "BEDROCK", "FOUNDRY", "MANTLE", "ANTHROPIC_AWS",
                                       "ANTHROPIC_GOOGLE_CLOUD", "GATEWAY")),
    "ANTHROPIC_VERTEX_PROJECT_ID", "ANTHROPIC_BEDROCK_SESSION_TOKEN", "ANTHROPIC_UNIX_SOCKET",
    "ANTHROPIC_API_KEY", "ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL",
    "ANTHROPIC_CUSTOM_HEADERS", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_PROVIDER_MANAGED_BY_HOST",
    "CLAUDE_CODE_HOST_AUTH_ENV_VAR", "CLAUDECODE", *JOBS.values(),
    "ANTHROPIC_DEFAULT_MODEL")
LIMIT_VARIABLES = "CLAUDE_CODE_MAX_CONTEXT_TOKENS", "CLAUDE_CODE_MAX_OUTPUT_TOKENS"
CLAUDE_COMMANDS = {  # those that start no session
    "agents", "auth", "auto-mode", "config", "doctor", "install", "mcp", "migrate-installer",
    "plugin", "plugins", "setup-token", "update", "upgrade"}
class Shell(NamedTuple):
    """How a shell sets and unsets a variable; `unsafe`: a pattern of what its quotes don't hold."""

    export: str
    unset: str
    quoted: Callable[[str], str]
    comment: str = "# {}"
    unsafe: str = ""


SHELLS = {
    "sh": Shell("export {}={}", "unset {}", shlex.quote),
    "fish": Shell("set -gx {} {}", "set -e {}",
                  lambda text: "'" + re.sub(r"([\\'])", r"\\\1", text) + "'"),
    "powershell": Shell(  # takes curved quotes for straight ones (CharExtensions.IsSingleQuote)
        "$env:{} = {}", "Remove-Item Env:{} -ErrorAction SilentlyContinue",
        lambda text: "'" + re.sub("(['\u2018-\u201b])", r"\1\1", text) + "'"),
    "cmd": Shell('set "{}={}"', 'set "{}="', str, "rem {}", '[%!"]|[^ -~]')}
CHECK_SCHEMA = {"type": "object", "required": ["a", "b"], "additionalProperties": False,
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}
CHECK_TOOL = {"name": "add", "description": "Add two numbers.", "input_schema": CHECK_SCHEMA}


@dataclass(frozen=True)
class LaunchPlan:
    variables: Mapping[str, str]  # "" for those to unset
    model: str = ""  # for all tiers, if the user chose one
    models: Mapping[str, Json] = field(default_factory=dict)  # the server's list, by id
    window: int = 0  # tokens, of the tier that has fewest
    windows: Mapping[str, int] = field(default_factory=dict)  # by model, where they are told apart
    lean: bool = False
    problems: Sequence[str] = ()  # lines about the server's providers

    def __post_init__(self) -> None:
        for name, value in self.variables.items():
            if BAD_ID.search(value):
                raise OgxError(400, f"{name}: no variable can be {ascii(value)[:200]}")

    @property
    def url(self) -> str:
        return self.variables["ANTHROPIC_BASE_URL"]

    def model_of(self, tier: str) -> str:
        return self.variables[tier_variable(tier)]

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in {**environ, **self.variables}.items()
                if value or name not in self.variables}


def connect(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Launch a client, or print or check what it would get; the exit code."""
    client, prints = CLIENTS[options.client], options.print_env or options.check
    prints = prints or not client.install
    program = "" if prints else client_program(options.client, client.install, os.environ)
    with reached_server(options) as (server, listing):
        listing = with_named_models(server, loaded_listing(server, listing, options), options)
        plan = launch_plan(server, listing, options, os.environ)
        if options.check:
            return print_check(server, plan)
        if prints:
            say(*client.lines(plan, options.shell or "sh"))
            tell(options, *print_hints(options, plan))
            return 0
        tell(options, f"{client.title} on {server.base_url}", *plan_lines(plan))
        return client.launch(options, plan, [program, *arguments])


@contextmanager
def reached_server(options: argparse.Namespace) -> Iterator[tuple[Provider, Json]]:
    """The server that runs, else one for this session if that is wanted, and its model list."""
    token = server_token(options)
    # A Bearer token, unlike an API key, needs no approval in Claude Code.
    server = Provider("OGX", PROVIDER_KINDS["messages"], server_url(options, os.environ),
                      token or "ogx")
    own_server = None
    try:
        listing = model_listing(server)
    except OgxError as error:
        elsewhere = options.host != "localhost" or options.url
        named = elsewhere or options.port is not None or options.print_env
        by_itself = options.serve is None and not named and "connection refused" in error.message
        if elsewhere or not (options.serve or by_itself):
            raise
        token = token or uuid.uuid4().hex  # every user here reaches the port
        own_server = start_own_server(options, token)
        server = replace(server, base_url=own_server.url, api_key=token)
        listing = model_listing(server)
    try:
        yield server, listing
    finally:
        if own_server:
            own_server.stop(drain=0)
            forget_log()


def tell(options: argparse.Namespace, *lines: str) -> None:
    if lines and not options.quiet:
        say(*lines, to="stderr")


def print_hints(options: argparse.Namespace, plan: LaunchPlan) -> list[str]:
    """What to know about printed lines; with --write, what was written."""
    client = CLIENTS[options.client]
    if client.files and options.write and not options.print_env:
        return write_files(client.files(plan))
    hints = [f"{path} goes before these lines, and leads elsewhere"
             for path in overriding_files(plan) if options.client == "claude"]
    own_shell = os.path.basename(os.environ.get("SHELL", ""))
    if client.has_shell and not options.shell and own_shell == "fish":
        hints.append("these lines are for sh; --shell fish prints them for fish")
    return hints


def resume_lines(options: argparse.Namespace, session: str) -> list[str]:
    """How to go on with a session on the same server; Claude Code's own words lead elsewhere."""
    words = [word for name in ("url", "port", "api_key_file")
             for value in [getattr(options, name)] if value is not None
             for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--host", options.host] * (options.host != "localhost")
    command = " ".join([command_name(), "connect claude", *map(shlex.quote, words)])
    return [f"Resume this session here with: {command} --resume {session}"] * bool(session)


def last_session(began: float) -> str:
    """The id of Claude Code's newest session in this folder since then; "" if there is none."""
    home = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~/.claude")
    folder = os.path.join(home, "projects", re.sub("[^A-Za-z0-9]", "-", os.getcwd()))
    with suppress(OSError), os.scandir(folder) as files:
        times = {file.name[:-6]: file.stat().st_mtime for file in files
                 if re.fullmatch(r"[0-9a-f-]{36}\.jsonl", file.name)}
        newest = max(times, key=lambda name: times[name], default="")
        return newest if newest and times[newest] >= began else ""
    return ""


def client_program(name: str, install: str, environ: Mapping[str, str]) -> str:
    """A client's program, from PATH or where its installers put it."""
    places = [*environ.get("PATH", "").split(os.pathsep), *map(os.path.expanduser, (
        "~/.local/bin", "~/.claude/local", "~/.opencode/bin", "~/.npm-global/bin",
        "/usr/local/bin", "/opt/homebrew/bin"))]
    # Windows looks into the working directory as well.
    program = shutil.which(name, path=os.pathsep.join(filter(os.path.isabs, places)))
    if not program or not os.path.isabs(program):
        raise OgxError(400, f"Failed to find '{name}' in PATH. Install it from {install}")
    return program


def server_token(options: argparse.Namespace) -> str:
    """The server's token, if any: from --api-key-file (not from an argument, since those show in
    the process list), else OGX_API_KEY."""
    source, token = "OGX_API_KEY", os.environ.get("OGX_API_KEY", "")
    if options.api_key_file:
        source = f"--api-key-file {options.api_key_file}"
        with os_errors_of(source), open(options.api_key_file, errors="replace") as file:
            token = file.read().strip()
        if not token:
            raise OgxError(400, f"{source}: the file is empty")
    if re.search(r"[^\x21-\x7e]", token):
        raise OgxError(400, f"{source}: expected printable ASCII without spaces")
    return token


def start_own_server(options: argparse.Namespace, token: str) -> Server:
    """Start a server, on a free port if none was chosen, with a log file for the user alone."""
    state = state_path(None, os.environ)
    log_file = os.path.abspath(f"{state}.{os.getpid()}.log")
    try:
        os.makedirs(os.path.dirname(log_file), mode=0o700, exist_ok=True)
        forget_old_logs(os.path.abspath(state))
        start_log(log_file, "info")
    except OSError as error:
        log.addHandler(logging.NullHandler())  # the terminal is Claude Code's
        log_file = f"lost, since {log_file} can't be written: {error.strerror}"
    config = config_from_json(starter_config(), "starter", with_aws_region(os.environ))
    gateway = Gateway(config, store=Store(state))
    server = Server(gateway, port=options.port or 0, token=token)
    server.start()
    gateway.start()
    gateway.discovery.done.wait(LIST_TIMEOUT)
    log.info("%s", " / ".join(filter(None, summary_lines(gateway, server))))
    tell(options, f"ogx.py serves {server.url} for this session; its log is {log_file}")
    return server


def forget_old_logs(state: str) -> None:
    """Remove the logs of sessions that ended a week ago."""
    folder, name = os.path.split(state)
    with suppress(OSError), os.scandir(folder) as files:
        for file in files:
            is_log = file.name.startswith(name + ".") and file.name.endswith(".log")
            if is_log and file.stat().st_mtime < time.time() - 7 * 86400:
                os.remove(file.path)


def forget_log() -> None:
    """Remove the log of a session in which nothing went wrong."""
    for handler in [*logging.getLogger().handlers]:
        if isinstance(handler, LogHandler) and handler.path and not handler.warned:
            handler.flush()
            with suppress(OSError):
                os.remove(handler.path)


def server_url(options: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """The server's URL without /v1: --url, else --host (a name, address or URL) and --port, else
    OGX_PORT."""
    url, port = options.url or options.host, options.port
    if not (options.url or "://" in url or re.fullmatch(r"[^:]+:[0-9]+", url)):
        url = f"[{url.strip('[]')}]" if ":" in url else url
        if port is None:
            port = port_number(environ.get("OGX_PORT") or DEFAULT_PORT, "OGX_PORT")
    url = url if "://" in url else f"http://{url}"
    parts = url_parts(url)
    if parts is None:
        raise OgxError(400, f"--url: expected a URL like http://localhost:8321, got '{url}'")
    if port is not None and parts.port is None:
        parts = parts._replace(netloc=f"{parts.netloc}:{port}")
    return re.sub(r"/(v1/?)?$", "", urllib.parse.urlunsplit(parts))


def model_listing(server: Provider) -> Json:
    place = f"OGX server at {server.base_url}"
    with closing(Upstream()) as upstream:
        try:
            reply, body = upstream.ask(server, "/v1/models", 10.0)
        except OgxError as error:
            raise OgxError(502, f"Failed to connect to {place}: {error.reason or error.message}\n"
                                f"Start the server first with: {command_name()} run") from None
    listing = dict_or_empty(json_or_none(body))
    if reply.status == 200 and isinstance(listing.get("data"), list):
        return listing
    problem = {
        200: ": it doesn't answer with a model list",
        401: " (HTTP 401)\nIt asks for a token: set OGX_API_KEY, or use --api-key-file",
    }.get(reply.status, f" (HTTP {reply.status})")
    raise OgxError(502, f"Failed to query models from {place}{problem}")


def loaded_listing(server: Provider, listing: Json, options: argparse.Namespace) -> Json:
    """The server's list once a provider that is loading its model has done so, or has failed."""
    told = ""
    while not listing["data"]:
        loading = [line for line in problem_lines(listing) if re.search(r"(?i)\bloading\b", line)]
        if not loading:
            break
        if loading[0] != told:
            told = loading[0]
            tell(options, f"{told.strip()}; waiting for it (Ctrl-C to stop)")
        time.sleep(1.0)
        listing = model_listing(server)
    return listing


def with_named_models(server: Provider, listing: Json, options: argparse.Namespace) -> Json:
    """The list with what flags and tiers name beside it, if the server serves that."""
    flags = [getattr(options, f"{job}_model") for job in (*TIERS, *JOBS)]
    tiers = dict_or_empty(listing.get("tiers")).values()
    listed = [entry.get("id") for entry in map(dict_or_empty, listing["data"])]
    entries = []
    with closing(Upstream()) as upstream:
        for model_id in dict.fromkeys(filter(is_id, (options.model, *flags, *tiers))):
            if model_id in listed:
                continue
            if options.unlisted:
                entries.append({"id": model_id, "custom_metadata": {"warning": "it is not listed"}})
                continue
            path = f"/v1/models/{urllib.parse.quote(model_id, safe='/')}"
            with suppress(OgxError):
                entry = dict_or_empty(upstream.json(server, path, 10.0))
                entries += [entry] * (entry.get("id") == model_id)
    return {**listing, "data": [*listing["data"], *entries]}


def problem_lines(listing: Json) -> list[str]:
    problems = dict_or_empty(listing.get("problems"))
    return [f"  {one_line(pid)}: {one_line(str(why))}" for pid, why in problems.items()]


def command_name() -> str:
    """How to call this program again."""
    path = sys.argv[0]
    return f"python3 {shlex.quote(path)}" if path.endswith(".py") else os.path.basename(path)


def summary_lines(gateway: Gateway, server: Server) -> list[str]:
    """What `run` prints: URL, providers, tiers, what to type next."""
    registry = gateway.registry
    lines = [f"ogx.py {__version__} serves {server.url}", ""]
    width = max(map(len, [*registry.providers, "sonnet"]))
    for provider_id in registry.providers:
        models, problem = registry.lists.get(provider_id), registry.problems.get(provider_id)
        state = f"{len(models)} model{'s' * (len(models) != 1)}" if models else "no models"
        if problem:
            state += f": {problem}"
        elif models is None:
            state = "still asking for its models"
        lines.append(f"  {provider_id:<{width}}  {state}")
        lines += [f"  {'':<{width}}  {model.upstream_id}: {model.warning}"
                  for model in models or () if model.warning]
    if DEMO_PROVIDER in registry.providers.values():
        variables = ", ".join(kind.switches[0] for kind in PROVIDER_KINDS.values() if kind.switches)
        lines += ["", "No provider is configured: only the built-in demo model answers.",
                  "For real models set one of these variables and start again:",
                  *(f"  {line}" for line in textwrap.wrap(variables, 74))]
    lines += ["", *(f"  {tier:<{width}}  {tier_words(registry, tier)}" for tier in TIERS), ""]
    where = "" if server.server_port == DEFAULT_PORT else f" --port {server.server_port}"
    where = f" --url {server.url}" if server.tls else where
    key = "OGX_API_KEY=... " if server.guard.token else ""
    if registry.problems and not gateway.tiers():
        lines += ["No model can be used yet: see what is wrong above.", ""]
    else:
        command = f"{command_name()} connect claude"
        lines += [f"Next, in another terminal:  {key}{command}{where}", ""]
        if not is_loopback(server.host):
            scheme, port = "https" if server.tls else "http", server.server_port
            address = f"{scheme}://{socket.gethostname()}:{port}"
            lines[-1:] = [f"On another machine:         {key}{command} --url {address}", ""]
    return lines


def tier_words(registry: Registry, tier: str) -> str:
    """The model behind a tier, and what is wrong with it."""
    try:
        model = registry.resolve(f"claude-{tier}")
    except OgxError as error:
        return f"no model: {error.message}" if registry.tiers.get(tier) else "no model"
    lists = registry.lists.get(model.provider.id)
    unlisted = lists and not registry.listed(model)
    return model.listed_id + f"  (not in {model.provider.id}'s list)" * bool(unlisted)


def launch_plan(server: Provider, listing: Json, options: argparse.Namespace,
                environ: Mapping[str, str]) -> LaunchPlan:
    entries = filter(is_listed_llm, map(dict_or_empty, listing["data"]))
    models = {entry["id"]: entry for entry in entries}
    if not models:
        raise OgxError(404, "\n".join(["Failed to find any LLM models on the OGX server.",
                                       *problem_lines(listing)]))
    variables = {**dict.fromkeys(UNSET, ""),
                 "ANTHROPIC_BASE_URL": server.base_url, "ANTHROPIC_AUTH_TOKEN": server.api_key,
                 "CLAUDE_CODE_DISABLE_1M_CONTEXT": "1",
                 "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",  # it would defeat prefix caches
                 **SWITCHES}
    aliases = {model_id for model_id, entry in models.items()
               if dict_or_empty(entry.get("custom_metadata")).get("alias_of")}
    ids = sorted(models, key=aliases.__contains__)  # the others first
    server_choices = dict_or_empty(listing.get("tiers"))
    chosen = []
    for tier in TIERS:
        wanted = getattr(options, f"{tier}_model") or options.model
        model_id = tier_choice(wanted, server_choices.get(tier), ids)
        name = tier_variable(tier)
        variables.update({name: model_id, f"{name}_NAME": model_id,
                          f"{name}_DESCRIPTION": f"{tier} tier, served by ogx.py"})
        chosen.append(models.get(model_id, {}))
    chosen = chosen[1:]  # haiku's requests are short, and its window needn't bound the others'
    if any(re.search("claude|anthropic", model_id, re.I) for model_id in models.keys() - aliases):
        variables["CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY"] = "1"  # it lists only such ids
    window, output = known_limits(chosen, options, environ)
    windows = told_apart(chosen, options)
    variables.update(limit_variables(max(windows.values(), default=window), output))
    for job, name in JOBS.items():
        wanted = getattr(options, f"{job}_model")
        variables[name] = tier_choice(wanted, "", ids) if wanted else ""
    lean = 0 < window < LEAN_WINDOW if options.lean is None else options.lean
    variables.update(LEAN if lean else {})
    variables.update(proxy_variables(server.base_url, environ))
    return LaunchPlan(variables, options.model or "", models, window, windows, lean,
                      problem_lines(listing))


def proxy_variables(url: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What keeps Claude Code from asking a proxy for the server."""
    variables = {}
    for name in ("NO_PROXY", "no_proxy"):  # it looks at the second first
        value = environ.get(name) or environ.get("no_proxy") or environ.get("NO_PROXY") or ""
        hosts = value.replace(",", " ").split()
        if hosts != ["*"]:
            hosts += [address_of(url)[1], "localhost", "127.0.0.1"]
        variables[name] = ",".join(dict.fromkeys(hosts))
    return variables


def is_listed_llm(entry: Json) -> bool:
    model_type = dict_or_empty(entry.get("custom_metadata")).get("model_type", "llm")
    return is_id(entry.get("id")) and model_type == "llm" and not NOT_LLM.search(entry["id"])


def tier_choice(wanted: str | None, server_choice: Any, ids: Sequence[str]) -> str:
    """A tier's model: the flags' choice, else the server's, else the first."""
    if wanted and wanted not in ids:
        more = f", ... ({len(ids)} in all)" if len(ids) > 10 else ""
        raise OgxError(404, f"Failed to find model '{wanted}' on the OGX server."
                            f"{near_miss(wanted, ids)} --unlisted uses it all the same.\n"
                            f"Available models: {', '.join(ids[:10])}{more}")
    return wanted or (isinstance(server_choice, str) and server_choice) or ids[0]


def known_limits(entries: Sequence[Json], options: argparse.Namespace,
                 environ: Mapping[str, str]) -> tuple[int, int]:
    """The window and the output limit that hold for all tiers, 0 for an unknown one: by the flags,
    else the server's, else the user's own variables."""
    limits = []
    for flag, name, variable in zip((options.context, options.max_output),
                                    ("max_input_tokens", "max_tokens"), LIMIT_VARIABLES):
        told = filter(None, (whole_number(entry.get(name)) for entry in entries))
        own = environ.get(variable, "")
        limits.append(flag or min(told, default=0) or (int(own) if own.isdecimal() else 0))
    window, output = limits
    if 0 < window <= RESERVED_WINDOW and not options.max_output:
        most = max(1024, window // 8)
        output = min(output or most, most)
    return window, output


def told_apart(entries: Sequence[Json], options: argparse.Namespace) -> dict[str, int]:
    """Unlike windows of the tiers' models, where Claude Code can be told each: it takes none below
    100,000 for a single model (2.1.332)."""
    windows = {entry.get("id", ""): whole_number(entry.get("max_input_tokens"))
               for entry in entries}
    unlike = len({*windows.values()}) > 1 and min(windows.values()) >= 100_000
    return windows if unlike and not options.context else {}


def limit_variables(window: int, output: int) -> dict[str, str]:
    """What to tell Claude Code. It compacts where its output limit and 13,000 tokens are left of
    what it is told (2.1.332): of a small window so much more is told that 3,000 are left."""
    told = window + 10_000 if 0 < window < 100_000 else window
    return {name: str(tokens) if tokens else ""
            for name, tokens in zip(LIMIT_VARIABLES, (told, output))}


def plan_lines(plan: LaunchPlan) -> list[str]:
    lines = [f"  {tier:<7} {plan.model_of(tier)}"
             + "  (not in its provider's list)" * (plan.model_of(tier) not in plan.models)
             for tier in TIERS]
    if plan.window:
        most = max(plan.windows.values(), default=0)
        windows = {plan.models.get(plan.model_of(tier), {}).get("max_input_tokens")
                   for tier in TIERS[1:]}
        lines.append(f"  window  {plan.window:,}" + f" to {most:,}" * bool(most) + " tokens"
                     + ", the smallest of the tiers'" * (len(windows) > 1 and not most))
    if plan.lean:
        lines.append(f"  lean    only {LEAN_TOOLS}, a shorter prompt (--no-lean: all)")
    return [*lines, *window_words(plan), *plan.problems, *model_warnings(plan)]


def window_words(plan: LaunchPlan) -> list[str]:
    """What to know about a small window."""
    first = LEAN_REQUEST if plan.lean else FIRST_REQUEST
    if 0 < plan.window < first + 1024:
        return [f"  warning: this can't work: Claude Code's first request takes about {first:,} "
                "tokens; a model with a larger window is needed"]
    if 0 < plan.window < 3 * first:
        return [f"  warning: Claude Code's own prompt and tools take about {first:,} of them; a "
                "model with a larger window works better"]
    return []


def model_warnings(plan: LaunchPlan) -> list[str]:
    """What the server warns of in the tiers' models."""
    ids = dict.fromkeys(map(plan.model_of, TIERS))
    metadata = [(i, dict_or_empty(plan.models.get(i, {}).get("custom_metadata"))) for i in ids]
    return [f"  warning: {model_id}: {one_line(str(known['warning']))}"
            for model_id, known in metadata if known.get("warning")]


def shell_lines(variables: Mapping[str, str], shell: str = "sh") -> list[str]:
    """A shell's lines that set variables, or unset those that are ""."""
    row, lines = SHELLS[shell], []
    for name, value in variables.items():
        if row.unsafe and re.search(row.unsafe, value):
            raise OgxError(400, f"{name}: {shell} can't hold {ascii(value)[:200]}; powershell can")
        lines.append(row.export.format(name, row.quoted(value)) if value
                     else row.unset.format(name))
    return lines


def opencode_variables(plan: LaunchPlan, environ: Mapping[str, str]) -> dict[str, str]:
    """The server as a provider of opencode (1.18), for its Anthropic driver, in what the user has
    in the same variable. It puts files in the place of {file:...} before it reads the JSON, which
    no id may say."""
    models = {}
    for model_id in dict.fromkeys([*map(plan.model_of, TIERS), *plan.models]):
        entry = plan.models.get(model_id, {})
        window = whole_number(entry.get("max_input_tokens"))
        output = whole_number(entry.get("max_tokens")) or window // 4
        limit = {"limit": {"context": window, "output": output}} if window else {}
        models[model_id.replace("{", "\0")] = limit
    name = "OPENCODE_CONFIG_CONTENT"
    own = json_or_none(environ.get(name) or "{}")
    if not isinstance(own, dict):
        raise OgxError(400, f"{name}: expected a JSON object without comments")
    options = {"baseURL": plan.url + "/v1", "apiKey": plan.variables["ANTHROPIC_AUTH_TOKEN"]}
    provider = {"npm": "@ai-sdk/anthropic", "name": "ogx.py", "options": options, "models": models}
    chosen = {each: f"ogx/{plan.model_of(tier)}".replace("{", "\0")
              for each, tier in (("model", "opus"), ("small_model", "haiku"))}
    config = {**own, "provider": {**dict_or_empty(own.get("provider")), "ogx": provider}, **chosen}
    return {name: json.dumps(config).replace(r"\u0000", r"\u007b"),
            **{each: plan.variables[each] for each in ("NO_PROXY", "no_proxy")}}


def sdk_lines(plan: LaunchPlan, shell: str) -> list[str]:
    comment = SHELLS[shell].comment.format
    other = shell_lines({"ANTHROPIC_BASE_URL": plan.url + "/v1",
                         "ANTHROPIC_API_KEY": plan.variables["ANTHROPIC_AUTH_TOKEN"]}, shell)
    return [comment("Anthropic's SDKs, and the Agent SDK, which runs Claude Code:"),
            *shell_lines(plan.variables, shell),
            comment("The Vercel AI SDK instead:"), *map(comment, other)]


def vscode_settings(plan: LaunchPlan) -> Json:
    """For settings.json of VS Code, whose extension of Claude Code starts it with these."""
    variables = [{"name": name, "value": value} for name, value in plan.variables.items()]
    return {"claudeCode.environmentVariables": variables, "claudeCode.disableLoginPrompt": True}


DESKTOP_ID = "00000000-0000-4000-8000-000000008321"  # of its profile


def desktop_files(plan: LaunchPlan) -> dict[str, Json]:
    """What Claude Desktop reads of a gateway, by path in the user's folder of settings. Source:
    Ollama's launcher, cmd/launch/claude_desktop.go."""
    profile = {"inferenceProvider": "gateway", "inferenceGatewayBaseUrl": plan.url,
               "inferenceGatewayApiKey": plan.variables["ANTHROPIC_AUTH_TOKEN"],
               "inferenceGatewayAuthScheme": "bearer"}
    mode = {"deploymentMode": "3p"}
    return {f"Claude-3p/configLibrary/{DESKTOP_ID}.json": profile,
            "Claude-3p/configLibrary/_meta.json": {
                "appliedId": DESKTOP_ID, "entries": [{"id": DESKTOP_ID, "name": "ogx.py"}]},
            "Claude-3p/claude_desktop_config.json": mode,
            "Claude/claude_desktop_config.json": mode}


def write_files(files: Mapping[str, Json]) -> list[str]:
    """Merge JSON into the user's files, with a copy of each that was there; a line about each."""
    lines, environ = [], os.environ.get
    folder = {"darwin": "~/Library/Application Support",
              "win32": environ("LOCALAPPDATA", "~/AppData/Local")}.get(
                  sys.platform, environ("XDG_CONFIG_HOME", "~/.config"))
    for name, added in files.items():
        path = os.path.join(os.path.expanduser(folder), name)
        with os_errors_of(path):
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            was, copy = read_settings(path), f"{path}.{time.time_ns()}"
            if os.path.exists(path):
                shutil.copy2(path, copy)
            with open(f"{path}.new", "w", opener=OWNERS) as file:
                json.dump(merged(was or {}, added), file, indent=2)
            os.replace(file.name, path)
        lines.append(f"wrote {path}" + f" (what was there: {copy})" * os.path.exists(copy))
    return lines


def merged(was: Json, added: Json) -> Json:
    """`added` on top, but lists joined."""
    lists = {name: [each for each in was[name] if each not in value] + value
             for name, value in added.items()
             if isinstance(value, list) and isinstance(was.get(name), list)}
    return {**was, **added, **lists}


class Client(NamedTuple):
    """A client of `connect`. Without `install`, where its program comes from, it only prints;
    --write merges `files` into the user's."""

    title: str
    lines: Callable[[LaunchPlan, str], list[str]]
    install: str = ""
    launch: Callable[[argparse.Namespace, LaunchPlan, Sequence[str]], int] = lambda *_: 0
    has_shell: bool = True  # whether its lines are a shell's
    files: Callable[[LaunchPlan], dict[str, Json]] | None = None


CLIENTS = {
    "claude": Client("Claude Code", lambda plan, shell: shell_lines(plan.variables, shell),
                     "https://claude.com/download", lambda *given: run_claude(*given)),
    "opencode": Client("opencode", lambda plan, shell: shell_lines(
        opencode_variables(plan, os.environ), shell), "https://opencode.ai",
        lambda _, plan, argv: run_program(argv, {
            **os.environ, **opencode_variables(plan, os.environ)})),
    "claude-desktop": Client("Claude Desktop", lambda plan, _: json_lines(
        next(iter(desktop_files(plan).values()))), has_shell=False, files=desktop_files),
    "vscode": Client("Claude Code in VS Code", lambda plan, _: json_lines(vscode_settings(plan)),
                     has_shell=False),
    "sdk": Client("programs on Anthropic's SDKs, the Agent SDK, the Vercel AI SDK", sdk_lines),
}


def json_lines(value: Json) -> list[str]:
    return json.dumps(value, indent=2).split("\n")


def run_claude(options: argparse.Namespace, plan: LaunchPlan, argv: Sequence[str]) -> int:
    """Run Claude Code; its exit code. --settings beat all files that it reads; they are in a file,
    since arguments show in the process list."""
    import tempfile

    rest, source = without_settings_flag(argv)
    given = read_settings(source) if source else {}
    if given is None:  # Claude Code says best what is wrong with them
        return run_program(argv, plan.environment(os.environ))
    for path in overriding_files(plan):
        if "managed" in os.path.basename(path):
            tell(options, f"  warning: {path} can't be overridden, and names another server or key")
    starts_session = not set(rest[1:2]) & CLAUDE_COMMANDS
    if starts_session:
        tell(options, *stored_model_lines(stored_model(given), plan))
    if is_interactive(rest) and not sets_permission_mode(given):
        # Auto mode asks the model's provider for verdicts on tool calls, which only Anthropic has.
        rest[1:1] = ["--permission-mode", "default"]
    if plan.lean and starts_session and not any(re.match("--tools(=|$)", a) for a in rest):
        rest[1:1] = ["--tools", LEAN_TOOLS]
    temporary = os_errors_of("can't write a temporary settings file")
    with temporary, tempfile.TemporaryDirectory(prefix="ogx-") as folder:
        path = os.path.join(folder, "settings.json")
        with open(path, "w", opener=OWNERS) as file:
            json.dump(merged_settings(given, plan, options.statusline), file)
        rest[1:1] = ["--settings", path]
        began = time.time()
        code = run_program(rest, plan.environment(os.environ))
    stored = stored_model({})
    if stored in plan.models and not stored.startswith("claude-"):
        tell(options, f"Claude Code keeps {stored} as its model, which it finds here alone: before "
                      "you start it without connect, choose another with /model")
    if is_interactive(argv):
        tell(options, *resume_lines(options, last_session(began)))
    return code


def without_settings_flag(argv: Sequence[str]) -> tuple[list[str], str]:
    """The arguments without --settings, and the value of the last."""
    rest, settings, words = list[str](), "", iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--settings":
            settings = value if equals else next(words, "")
        else:
            rest.append(word)
    return rest, settings


def settings_files() -> list[str]:
    """Where Claude Code reads the user's, the project's and the administrator's settings."""
    chosen, home = os.environ.get("CLAUDE_CONFIG_DIR"), os.path.expanduser("~")
    managed = {"darwin": "/Library/Application Support/ClaudeCode",
               "win32": "C:/ProgramData/ClaudeCode"}.get(sys.platform, "/etc/claude-code")
    return [f"{chosen or home}/.claude.json", f"{chosen or home + '/.claude'}/settings.json",
            ".claude/settings.json", ".claude/settings.local.json",
            f"{managed}/managed-settings.json"]


def read_settings(source: str) -> Json | None:
    """Settings from a file or, as Claude Code's --settings takes them, from JSON text, or None."""
    data: str | bytes = source
    if not source.lstrip().startswith("{"):
        # A project's may link to a device, or to /proc, where sizes are 0.
        with suppress(OSError):
            if os.path.isfile(source) and os.path.getsize(source):
                with open(source, "rb") as file:
                    data = file.read(2 * 1024 * 1024)  # as much as Claude Code reads
    tree = json_or_none(data)
    return tree if isinstance(tree, dict) else None


def overrides(settings: Json, plan: LaunchPlan) -> bool:
    """Whether settings would beat the plan's environment."""
    names = map(str.upper, dict_or_empty(settings.get("env")))  # Windows ignores case
    planned = {name.upper() for name in plan.variables}.intersection(names)
    other_model = plan.model and settings.get("model") not in (None, plan.model)
    return bool(planned or settings.get("apiKeyHelper") or other_model)


def overriding_files(plan: LaunchPlan) -> list[str]:
    return [path for path in settings_files() if overrides(read_settings(path) or {}, plan)]


def merged_settings(given: Json, plan: LaunchPlan, statusline: bool = True) -> Json:
    """The user's own --settings with the plan on top; "" counts as unset."""
    env = {**dict_or_empty(given.get("env")), **plan.variables}
    model = {"model": plan.model} if plan.model else {}
    picker = {"options": picker_rows(plan), "replaceBuiltInOptions": True}
    command = shlex.join((sys.executable, os.path.abspath(__file__), "statusline"))
    extras: Json = {"modelPicker": picker}
    models = dict_or_empty(given.get("modelSettings"))
    apart = {model_id: {"autoCompactWindow": window, **dict_or_empty(models.get(model_id))}
             for model_id, window in plan.windows.items()}
    if statusline:  # Windows has Claude Code run it in a shell of Unix
        extras["statusLine"] = {"type": "command", "command": command.replace("\\", "/")}
    own = {name for settings in all_settings(given) for name in settings}
    # What a page is fetched from is no business of Anthropic's, and offline nobody could ask.
    return {"skipWebFetchPreflight": True,
            **{name: value for name, value in extras.items() if name not in own}, **given,
            **({"modelSettings": {**models, **apart}} if apart else {}),
            "env": env, "apiKeyHelper": "", **model}


def picker_rows(plan: LaunchPlan) -> list[Json]:
    """What /model offers: the tiers' models, then the server's others."""
    rows = []
    tiers = [plan.model_of(tier) for tier in TIERS]
    for model_id in list(dict.fromkeys([*tiers, *plan.models]))[:PICKER_ROWS]:
        entry = plan.models.get(model_id, {})
        owner = dict_or_empty(entry.get("custom_metadata")).get("provider_id")
        window = whole_number(entry.get("max_input_tokens"))
        jobs = " and ".join(tier for tier in TIERS if plan.model_of(tier) == model_id)
        facts = (str(owner) if is_id(owner) else "", f"{window:,} tokens" if window else "", jobs)
        rows.append({"model": model_id, "label": model_id,
                     "description": ", ".join(filter(None, facts)) or "served by ogx.py"})
    return rows


def all_settings(given: Json) -> list[Json]:
    """The settings that hold, from those that others beat to those that beat them."""
    return [*(read_settings(path) or {} for path in settings_files()), given]


def stored_model(given: Json) -> str:
    """The model that settings choose, "" for a tier or none."""
    models = [settings.get("model") for settings in all_settings(given)]
    chosen = next((str(model) for model in reversed(models) if is_id(model)), "")
    return "" if tier_of(chosen.removesuffix("[1m]")) or chosen == "default" else chosen


def stored_model_lines(model: str, plan: LaunchPlan) -> list[str]:
    """What to know about the model that the user's settings choose, before the session."""
    if not model or plan.model:
        return []
    if model in plan.models:
        return [f"  model   {model}, chosen in your settings (--model or /model changes it)"]
    return [f"  warning: your settings choose the model {model}, which this server doesn't list; "
            "choose another with --model or /model"]


def sets_permission_mode(given: Json) -> bool:
    return any(dict_or_empty(settings.get("permissions")).get("defaultMode")
               for settings in all_settings(given))


def print_statusline() -> int:
    """Print a line about the session that Claude Code describes on stdin, with what the server
    tells in a tenth of a second; always 0."""
    piped = sys.stdin and not sys.stdin.isatty()
    described = dict_or_empty(json_or_none(sys.stdin.buffer.read(1024 * 1024) if piped else b""))
    answers: Any = queue.SimpleQueue()

    def ask() -> None:
        environ = os.environ.get
        with suppress(Exception), closing(Upstream()) as upstream:
            server = Provider("OGX", PROVIDER_KINDS["messages"], environ("ANTHROPIC_BASE_URL", ""),
                              environ("ANTHROPIC_AUTH_TOKEN", ""))
            session = urllib.parse.quote(str(described.get("session_id")), safe="")
            answers.put(dict_or_empty(upstream.json(server, f"/v1/sessions/{session}", 1.0)))

    threading.Thread(target=ask, daemon=True).start()
    known: Json = {}
    with suppress(queue.Empty):
        known = answers.get(timeout=0.1)
    say(session_words(known, dict_or_empty(described.get("model")).get("id")))
    return 0


def session_words(known: Json, asked: Any) -> str:
    """A line about a session: the model that answered, else the one that is asked for; its tokens,
    and how full the window is."""
    model = known.get("model") or asked
    words = [cut(without_controls(one_line(model)), 100)] if isinstance(model, str) else []
    new, out, old, written = (whole_number(known.get(name)) for name in USAGE_FIELDS)
    if new + old + written:
        total = new + old + written
        words.append(f"{total:,} tokens in, {100 * old // total} % cached, {out:,} out")
    used, window = (whole_number(known.get(f"{name}_tokens")) for name in ("context", "max_input"))
    if used and window:
        words.append(f"{100 * used // window} % of {window:,}")
    return " | ".join(words)


def is_interactive(argv: Sequence[str]) -> bool:
    """Whether a session starts that asks for permissions as settings say."""
    flags = {word.partition("=")[0] for word in argv[1:]}
    chosen = flags & {"-p", "--print", "--permission-mode", "--dangerously-skip-permissions",
                      "-v", "--version", "-h", "--help"}
    return not chosen and not set(argv[1:2]) & CLAUDE_COMMANDS


def run_program(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program; its exit code, as a shell has it."""
    import subprocess

    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: Any) -> None:
        # Ctrl-C reaches the whole group; Claude Code decides. (SIG_IGN would be inherited.)
        if child and number != signal.SIGINT:
            child.send_signal(number)

    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.signal(number, pass_on) for number in signal.Signals if in_main
                and number.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")}
    try:
        with os_errors_of(f"Failed to start '{argv[0]}'"):
            child = subprocess.Popen(argv, env=environment)
        code = child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


def print_check(server: Provider, plan: LaunchPlan) -> int:
    """Try each tier's model, and print a table and what helps; 0 when all call tools."""
    tiers_of: dict[str, list[str]] = {}
    for tier in TIERS:
        tiers_of.setdefault(plan.model_of(tier), []).append(tier)
    jobs = {model_id: ", ".join(tiers) if len(tiers) < len(TIERS) else "all"
            for model_id, tiers in tiers_of.items()}
    columns = {"model": max(map(len, ("model", *jobs))),
               "tiers": max(map(len, ("tiers", *jobs.values()))), **CHECK_COLUMNS}
    say("  ".join(f"{name:<{width}}" for name, width in columns.items()).rstrip())
    failed, usual = False, plan.window or USUAL_WINDOW
    with closing(Upstream()) as upstream:
        for model_id, tiers in jobs.items():
            cells, sentences = tried_model(upstream, server, model_id)
            told = whole_number(plan.models.get(model_id, {}).get("max_input_tokens"))
            cells.update({"model": model_id, "tiers": tiers,
                          "window": f"{told:,}" if told else "unknown",
                          "believed": f"{plan.windows.get(model_id, usual):,}"})
            say("  ".join(f"{cells.get(name, '-'):<{width}}"
                          for name, width in columns.items()).rstrip(), *sentences)
            failed |= cells["tools"] != "yes"
    guess = f"  window: unknown, taken for {USUAL_WINDOW:,} tokens (--context tells another)"
    for line in (*[guess] * (not plan.window), *window_words(plan), *model_warnings(plan)):
        say(line)
    return int(failed)


def tried_model(upstream: Upstream, server: Provider,
                model_id: str) -> tuple[dict[str, str], list[str]]:
    """The cells of a model's row, by column, and a line for each thing that fails."""
    cells, sentences = dict[str, str](), []
    for name, (request, problem_of) in CHECKS.items():
        body = {"model": model_id, "max_tokens": CHECK_TOKENS, "stream": True, **request}
        try:
            message, first, seconds = timed_answer(upstream, server, body)
            if name == "tools":
                speed = whole_number(message["usage"].get("output_tokens")) / max(
                    seconds - first, 0.001)
                cells.update({"first": f"{first:.2f} s", "total": f"{seconds:.2f} s",
                              "tokens/s": f"{speed:.0f}" if first < seconds else "-"})
                usage = timed_answer(upstream, server, body)[0]["usage"]
                new, _, old, written = (whole_number(usage.get(name)) for name in USAGE_FIELDS)
                cells["cached"] = f"{old:,} of {new + old + written:,}"
            problem = problem_of(message)
            if problem and message.get("stop_reason") == "max_tokens":
                problem = f"its {CHECK_TOKENS:,} tokens were used up before it was done"
        except OgxError as error:
            problem = without_controls(one_line(error.message)) or "failed"
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            problem = "answers in another format than Anthropic's"
        cells[name] = "no" if problem else "yes"
        sentences += [f"  {name}: {problem}"] if problem else []
        if "cached" not in cells:
            break  # the others would fail likewise
    return cells, sentences


def timed_answer(upstream: Upstream, server: Provider, body: Json) -> tuple[Json, float, float]:
    """A streamed message, and the seconds to its first block and in all."""
    began, first, events = time.monotonic(), 0.0, []
    for event in answered_events(upstream, server, body):
        if not first and event["type"] == "content_block_start":
            first = time.monotonic() - began
        events.append(event)
    seconds = time.monotonic() - began
    return message_from_events(events), first or seconds, seconds


def tools_problem(message: Json) -> str:
    calls = [block for block in message["content"] if block["type"] == "tool_use"]
    if not calls:
        return "answers, but called no tool: does the model, and its server, do tools?"
    given = calls[0]["input"]
    wrong = not {"a", "b"} <= set(given)
    return f"called the tool wrongly, with {json.dumps(given)[:80]}" if wrong else ""


def json_problem(message: Json) -> str:
    answer = json_or_none(message_text(message))
    right = isinstance(answer, dict) and {"a", "b"} <= set(answer)
    return "" if right else "answers otherwise where JSON is asked for"


def image_problem(message: Json) -> str:
    seen = "green" in message_text(message).lower()
    return "" if seen else "sees no images: Claude Code's screenshots and pictures are lost on it"


def message_text(message: Json) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


GREEN = ("iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAAA1BMVEUAoAAJfYEzAAAAD0lEQVR42mNgGAWj"
         "gHwAAAJAAAHgTR1EAAAAAElFTkSuQmCC")  # a PNG of 64 by 64
# Column -> what to ask for, and what tells the problem of the answer, if any.
CHECKS: dict[str, tuple[Json, Callable[[Json], str]]] = {
    "tools": ({"tools": [CHECK_TOOL], "messages": [
        {"role": "user", "content": "Call the tool add with 2 and 3."}]}, tools_problem),
    "JSON": ({"output_config": {"format": {
        "type": "json_schema", "schema": CHECK_SCHEMA}}, "messages": [
        {"role": "user", "content": "Answer with JSON alone: a is 2, b is 3."}]}, json_problem),
    "images": ({"messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": GREEN}},
        {"type": "text", "text": "Which colour is this picture? Say one word."}]}]}, image_problem),
}
CHECK_TOKENS = 2000
# With their widths. `cached`: tokens of the prompt when it is asked again; `window`: as the server
# tells it, and as Claude Code is made to believe it.
CHECK_COLUMNS = {
    "first": 7, "total": 7, "tokens/s": 8, "tools": 5, "JSON": 4, "images": 6, "cached": 14,
    "window": 9, "believed": 9}


def answered_events(upstream: Upstream, server: Provider, body: Json) -> Iterator[Json]:
    """The events of a streamed answer, at least one; OgxError if it fails."""
    reply = drive(upstream.send(server, "POST", "/v1/messages", json_bytes(body)))
    try:
        drive(reply.head())
        items = itertools.chain.from_iterable(reply.items())
        if reply.status != 200:
            raise OgxError(502, refusal_from_body(reply.status, b"".join(items)).message)
        number = 0
        for number, item in enumerate(items, 1):
            event = json.loads(item)
            if event["type"] == "error":
                raise OgxError(502, refusal_from_body(502, item).message)
            if number > 20_000:
                raise OgxError(502, "an answer without end")
            yield event
        if not number:
            raise OgxError(502, "an empty answer")
    finally:
        reply.release()


# ======== Command line =======================================================================
# One line per flag. Errors are one clear line on stderr and exit code 1.


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    forwarded = words[split + 1 :]
    parser = argument_parser()
    warnings.simplefilter("ignore", SyntaxWarning)  # in a model's Python
    try:
        if not words:
            say(*(__doc__ or "").split("\n\n")[:2])
            return 0
        for kind, word, known in zip(("command", "client"), words, (COMMANDS, CLIENTS)):
            if word[:1] != "-" and word not in known:
                parser.error(f"no {kind} is called '{word}', only {', '.join(known)}."
                             f"{near_miss(word, known)}")
            if word != "connect":
                break
        options, extra = parser.parse_known_args(words[:split])
        connects = options.command == "connect"
        launches = connects and CLIENTS[options.client].install
        mistyped = "".join(mistyped_flag(word, options.parser) for word in extra if connects)
        if mistyped or (extra or forwarded) and not launches:
            unknown = " ".join(extra or forwarded)
            options.parser.error(f"unrecognized arguments: {unknown}{mistyped}")
        if not connects:
            return print_statusline() if options.command == "statusline" else run(options)
        if options.serve and options.print_env:
            options.parser.error("--serve starts a server for a session, which --print-env is not")
        return connect(options, [*extra, *forwarded])
    except SystemExit as stop:  # argparse, after its own words
        return int(stop.code or 0)
    except OgxError as error:
        say(error.message, to="stderr")
        return 1
    except RecursionError:
        say("the configuration is nested too deeply", to="stderr")
        return 1
    except KeyboardInterrupt:
        return 130


COMMANDS = ("run", "connect", "statusline")


def mistyped_flag(word: str, parser: argparse.ArgumentParser) -> str:
    """` Did you mean --model?` for what is nearly a flag of ours, and none of Claude Code's."""
    import difflib

    flag, flags = word.partition("=")[0], re.findall("--[a-z-]+", parser.format_help())
    near = difflib.get_close_matches(flag, flags, 1, 0.8) if flag[:2] == "--" else []
    return f". Did you mean {near[0]}?" if near and abs(len(flag) - len(near[0])) < 2 else ""


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(command_name(), description="Run Claude Code, and every "
                                     "Anthropic SDK program, on any model.")
    parser.add_argument("--version", action="version", version=f"ogx.py {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_run(commands)
    add_connect(commands)
    statusline = commands.add_parser("statusline", help="print a line about a session, for Claude "
                                     "Code, which describes it on stdin")
    statusline.set_defaults(parser=statusline)
    return parser


def add_run(commands: Any) -> None:
    limits = "".join(f"  OGX_{each.name.upper():<20}{each.default:>4}  {each.metadata['words']}\n"
                     for each in fields(Limits))
    parser = commands.add_parser(
        "run", help="serve the Anthropic Messages API",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"limits, also keys of `server` in the JSON file (client_timeout):\n{limits}")
    parser.set_defaults(parser=parser)
    flag = parser.add_argument
    flag("config", nargs="?", default="starter", help="'starter' (default) or a JSON file like it")
    flag("--host", help=f"address to listen on (default {DEFAULT_HOST})")
    flag("--port", type=port_argument, help=f"port (default OGX_PORT, else {DEFAULT_PORT})")
    flag("--state", metavar="FILE", help="where registered models are kept (default OGX_STATE, "
         "else ogx/state.sqlite in the user's state directory)")
    flag("--api-key-file", metavar="FILE", help="file with a token that clients must show "
         "(default OGX_API_KEY, else none)")
    flag("--tls-cert", metavar="FILE", help="serve HTTPS with this certificate (PEM)")
    flag("--tls-key", metavar="FILE", help="its key (default: in the same file)")
    flag("--log-level", default="info", choices=("debug", "info", "warning", "error"),
         help="how much to log (default info: a line per request)")
    flag("--log-file", metavar="FILE", help="where to log (default: stderr)")
    flag("--log-bodies", action="store_true", help="log requests and answers too, shortened and "
         "without keys: what is said to models is then in the log")


def add_connect(commands: Any) -> None:
    connect = commands.add_parser("connect", help="launch a client on a running server")
    clients = connect.add_subparsers(dest="client", required=True)
    for name, client in CLIENTS.items():
        takes = f" [{name.upper()}_ARGS...] [-- {name.upper()}_ARGS...]" if client.install else ""
        parser = clients.add_parser(name, help=client.title, allow_abbrev=False,
                                    usage=f"%(prog)s [options]{takes}")
        parser.set_defaults(parser=parser, serve=False, check=False, print_env=False, lean=None,
                            subagent_model=None, auto_model=None, write=False, shell=None)
        add_connect_flags(parser.add_argument, name, client)


def add_connect_flags(flag: Callable[..., Any], name: str, client: Client) -> None:
    flag("--model", help="model for all tiers (default: the server's choice)")
    for tier in TIERS:
        flag(f"--{tier}-model", metavar="MODEL", help=f"model for the {tier} tier")
    flag("--context", metavar="TOKENS", type=int, help="the models' window, where it isn't known")
    flag("--max-output", metavar="TOKENS", type=int, help="the most that an answer may have")
    flag("--unlisted", action="store_true", help="use the named models although they aren't listed")
    flag("--host", default="localhost", help="server host, or its whole URL (default localhost)")
    flag("--port", type=port_argument, help=f"server port (default OGX_PORT, else {DEFAULT_PORT})")
    flag("--url", help="server URL, with or without /v1, instead of --host and --port")
    flag("--api-key-file", metavar="FILE", help="the server's token (default OGX_API_KEY)")
    flag("--print-env", action="store_true", help="print what would be set, launch nothing")
    if client.has_shell:
        flag("--shell", choices=tuple(SHELLS), help="whose lines to print (default sh)")
    flag("--quiet", action="store_true", help="without a word besides")
    if client.install:
        flag("--serve", action=argparse.BooleanOptionalAction, default=None, help="start a server "
             "for this session if none is running, on --port or a free one (default: if no flag "
             "says where one is)")
    if client.files:
        flag("--write", action="store_true", help="write it where Claude Desktop looks, with a "
             "copy of what was there")
    if name != "claude":
        return
    flag("--subagent-model", metavar="MODEL", help="model for sub-agents (default: their tier's)")
    flag("--auto-model", metavar="MODEL", help="model that judges calls in auto mode")
    flag("--lean", action=argparse.BooleanOptionalAction, help="few tools and a short prompt, for "
         f"small models (default: below a window of {LEAN_WINDOW:,} tokens)")
    flag("--check", action="store_true", help="try every tier's model with tools, JSON and an "
         "image, print a table, launch nothing")
    flag("--no-statusline", dest="statusline", action="store_false", help="without a status line "
         "of ogx.py's; your own is never replaced")


def port_argument(text: str) -> int:
    try:
        return port_number(text, "port")
    except OgxError:
        words = f"expected a port from 0 to 65535, got '{text}'"
        raise argparse.ArgumentTypeError(words) from None


def run(options: argparse.Namespace) -> int:
    """Serve until a signal; the exit code."""
    start_log(options.log_file, options.log_level)
    allow_many_files()
    config = config_from_name(options.config, with_aws_region(os.environ))
    token = server_token(options)
    gateway = Gateway(config, store=Store(state_path(options.state, os.environ)))
    port = config.port if options.port is None else options.port
    if options.tls_key and not options.tls_cert:
        raise OgxError(400, "--tls-key needs --tls-cert")
    tls = server_tls(options.tls_cert, options.tls_key) if options.tls_cert else None
    server = Server(gateway, options.host or config.host, port, token, tls)
    server.log_bodies = options.log_bodies
    signals: Any = queue.SimpleQueue()  # which has no lock that a handler could meet
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # Gently at the first signal, at once at the second.
            signal.signal(number, lambda number, _: signals.put(number) if signals.empty()
                          else os._exit(130))
    if not is_loopback(server.host) and not token:
        log.warning("listening on %s: everyone who reaches this port can use your providers' keys",
                    server.host)
    server.start()
    gateway.start()
    discovered = gateway.discovery.done
    if not discovered.wait(1.0):
        say(*summary_lines(gateway, server))
        while signals.empty() and not discovered.wait(0.2):
            pass
    say(*summary_lines(gateway, server))
    while signals.empty():
        with suppress(queue.Empty):
            signals.put(signals.get(timeout=3600))  # a timeout lets Windows deliver Ctrl-C
    log.info("stopping; running answers have %g s to finish", server.limits.drain_timeout)
    server.stop()
    return 0


def allow_many_files() -> None:
    """Raise this process's limit of open files, 256 on macOS, since a stream takes two."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # below 0: none
        if 0 <= soft < 10_240:
            most = 10_240 if hard < 0 else min(10_240, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def server_tls(cert: str, key: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with os_errors_of(f"--tls-cert {cert}, --tls-key {key or cert}"):
        context.load_cert_chain(cert, key)
    return context


def config_from_name(name: str, environ: Mapping[str, str]) -> Config:
    """The built-in configuration for `starter`, else that of a JSON file."""
    tree: Any = starter_config()
    if name != "starter":
        try:
            with open(name, encoding="utf-8-sig") as file:
                tree = json.load(file)
        except OSError as error:
            expected = "expected 'starter' or a JSON file"
            raise OgxError(400, f"{name}: {error.strerror}; {expected}") from None
        except ValueError as error:
            raise OgxError(400, f"{name}: not JSON: {error}") from None
    return config_from_json(tree, name, environ)


def exit_with_main(*_: Any) -> None:
    """Run main() once nothing holds on to what it took to parse this file, 15 MB."""
    sys.excepthook = sys.__excepthook__
    with suppress(Exception):  # another C library
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)  # glibc would keep it
    sys.exit(main())


if __name__ == "__main__":
    if sys.flags.inspect or sys._getframe().f_back:  # -i, or a debugger or profiler runs this
        exit_with_main()
    sys.excepthook = exit_with_main  # Python holds on to it until the script is over
    raise RuntimeError("main() runs where errors of the script are told")
